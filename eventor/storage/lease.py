"""For how long an owner may trust that its run is its own (Gray and Cheriton, Leases, SOSP 1989).

The database's clock tells others when the lease has run out. The owner counts from before it has
asked for it, and stops early, so that it has stopped by then whatever the network does.
"""

from __future__ import annotations

import time

_TRUSTED, _ENDED = 2 / 3, 5 / 6
"""The parts of a lease after which its owner trusts it no more, and after which nothing that it has
started goes on."""

LAST_TRY_SECONDS = 1.0
"""For how long who was held up until it was too late tries once more, at most."""


def part_of(seconds: float) -> float:
    """Return the seconds that are a small part of a lease."""
    return seconds / 6


def last_try(seconds: float) -> float:
    """Return for how many seconds who was held up tries once more, given its lease."""
    return min(LAST_TRY_SECONDS, part_of(seconds))


def clock() -> float:
    """Return seconds by a clock that is never set, and that goes on while the machine sleeps."""
    # On macOS, which has no such clock, the monotonic one does.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Lease:
    """The lease of an owner, by its own clock.

    Args:
        seconds: how long it lasts once it was renewed.

    Attributes:
        seconds: as given.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._renewed_at = clock()

    @property
    def is_trusted(self) -> bool:
        """Whether nobody can have taken over by now."""
        return clock() < self._renewed_at + self.seconds * _TRUSTED

    @property
    def try_until(self) -> float:
        """Until when to try to renew it, by `clock`; if that is past, once more for a moment."""
        last = clock() + last_try(self.seconds)
        return max(self._renewed_at + self.seconds * _TRUSTED, last)

    @property
    def steps_until(self) -> float:
        """Until when what its owner has started may go on, by `clock`, if it is not renewed."""
        return self._renewed_at + self.seconds * _ENDED

    def is_due(self, asked_at: float) -> bool:
        """Tell whether one that was asked for at that time should be renewed by now."""
        return clock() > asked_at + part_of(self.seconds)

    def renew(self, asked_at: float) -> None:
        """Take note that it was renewed, by who had asked for that at `asked_at` or later."""
        self._renewed_at = asked_at
