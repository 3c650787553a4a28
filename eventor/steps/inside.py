"""Inside a step: which task it does, and the triggers that it sends to the owner of its run."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eventor.errors import DefinitionError, UsageError
from eventor.rules.config import unknown
from eventor.rules.flow import Event, read_sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from eventor.types import Sequence


@dataclass(frozen=True, slots=True, eq=False)
class CurrentStep:
    """The task that a step does just now, as `eventor.current` returns it.

    Attributes:
        step: the step's name.
        sequence: the sequence in which it runs.
        run_id: the number of the run in its store.
        recovery: the number of the recovery in the run; 0 is the initial run.
        attempt: how many times the task was started since it last ended, this time included.
    """

    step: str
    sequence: Sequence
    run_id: int
    recovery: int
    attempt: int
    # By name; a process that does not inherit them knows the names alone.
    _events: Mapping[str, Event | None] = field(repr=False)
    _send: Callable[[CurrentStep, str, Sequence], None] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.step}[{self.sequence}]"

    def trigger(self, event: Event | str, sequence: Sequence | None = None) -> Sequence:
        """Raise an event while the step runs; once per sequence, again is a no-op.

        It is sent to the program at once, which takes it up at its next pass: what depends on it
        may start while this step still runs. It is recorded then, at the latest in the transaction
        that records how this step ends. If the program dies before, the step is still recorded as
        active, and triggers again when it is run again.

        Args:
            event: the event, or its name.
            sequence: an int or a str; None is the step's own.

        Returns:
            The sequence.

        Raises:
            DefinitionError: it is no event of the step's own Eventor.
            TriggerError: the sequence is neither an int nor a str.
            UsageError: the step has ended; or this is a process that the step has started.
        """
        name = self._name(event)
        chosen = self.sequence if sequence is None else read_sequence(sequence)
        self._send(self, name, chosen)
        return chosen

    def is_of(self, events: Mapping[str, Event]) -> bool:
        """Tell whether these are the events of the flow to which the step belongs."""
        return self._events is events

    def _name(self, event: Event | str) -> str:
        known = self._events
        if isinstance(event, str):
            if event not in known:
                raise DefinitionError(f"there is no event {event!r}; {unknown(event, list(known))}")
            return str.__str__(event)
        if not isinstance(event, Event):
            raise DefinitionError(
                f"the event to trigger is {event!r}; expected an event or the name of one"
            )
        if event.name not in known or known[event.name] not in (event, None):
            raise DefinitionError(f"the event to trigger is {event!r} of another Eventor")
        return event.name


_of_context: ContextVar[CurrentStep | None] = ContextVar("eventor_step", default=None)
_of_process: CurrentStep | None = None


def enter(current: CurrentStep, *, whole_process: bool) -> None:
    """Be inside a step, in this context alone or in all threads of this process."""
    global _of_process  # noqa: PLW0603 (a process of steps is inside one of them at a time)
    _of_context.set(current)
    if whole_process:
        _of_process = current


def current() -> CurrentStep:
    """Return what the step knows that calls this: its name, sequence, run, recovery and attempt.

    It is there in the step's function; where the step has a process of its own, in all threads of
    that.

    Raises:
        UsageError: no step calls this.
    """
    found = current_or_none()
    if found is None:
        raise UsageError(
            "eventor.current() was called outside a step; expected in the function of a step, "
            "or in a thread that a step has started in a process of its own"
        )
    return found


def current_or_none() -> CurrentStep | None:
    """Return what `current` returns, and None outside a step."""
    return _of_context.get() or _of_process
