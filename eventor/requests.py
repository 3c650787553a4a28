"""What other processes ask of a live run, through its store: looked for now and then, and answered.

A request is marked as taken up by the same transaction that records what became of it.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from eventor.rules.config import unknown
from eventor.rules.plan import NEVER, EventRaised
from eventor.storage.rows import Answer

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from datetime import datetime

    from eventor.logs import Journal
    from eventor.rules.flow import Flow
    from eventor.rules.plan import Change, Trigger
    from eventor.storage.ledger import Ledger
    from eventor.storage.rows import Request


class Requests:
    """The requests of one recovery.

    Args:
        flow: the definitions.
        ledger: where they stand; a store in memory alone is not looked at.
        seconds: between two looks, at least.
    """

    def __init__(self, flow: Flow, ledger: Ledger, seconds: float) -> None:
        self._flow = flow
        self._ledger = ledger
        self._seconds = seconds
        self._looked_at = NEVER
        self._looked = False
        self._taken: list[Request] = []
        self._refused: set[int] = set()
        self.stopped_by: str | None = None
        """The process that has asked to stop, if one has."""

    def look(self, now: datetime) -> list[Trigger]:
        """Take up what waits, if it is time to look, and return the triggers of known events."""
        since = (now - self._looked_at).total_seconds()
        self._looked = self._ledger.shared and not 0 <= since < self._seconds
        self._taken = []
        if self._looked:
            self._looked_at = now
            self._taken = self._ledger.requests()
        triggers = []
        self._refused = set()  # once for all: another thread may define the event meanwhile
        for request in self._taken:
            if request.trigger is None:
                if self._is_for_this(request):
                    self.stopped_by = request.by
            elif request.trigger.event in self._flow.events:
                triggers.append(request.trigger)
            else:
                self._refused.add(request.number)
        return triggers

    def answer(self, changes: Iterable[Change]) -> bool:
        """Have the ledger note, for its next `record`, what became of what was taken up.

        Returns:
            Whether there is any of that.
        """
        if not self._taken:
            return False
        causes = {id(change.cause) for change in changes if isinstance(change, EventRaised)}
        answers = {request.number: self._answer(request, causes) for request in self._taken}
        return self._ledger.answer(answers)

    def report(self, journal: Journal) -> None:
        """Say which were refused."""
        for request in self._taken:
            trigger = request.trigger
            if trigger is not None and request.number in self._refused:
                message = (
                    f"Trigger of process {request.by} is refused: there is no event "
                    f"{trigger.event!r} (sequence {trigger.sequence!r}); "
                    f"{unknown(trigger.event, list(self._flow.events))}"
                )
                journal.say(logging.WARNING, message, "loop_session_start")

    def look_last(self, changes: Collection[Change]) -> bool:
        """Tell whether this pass has looked and recorded nothing else; if not, the next one looks.

        So what was asked before the last transaction, by who was told that the run is live, does
        not wait for the next recovery.
        """
        if (self._looked and not changes) or not self._ledger.shared:
            return True
        self._looked_at = NEVER
        return False

    def seconds_left(self, now: datetime) -> float:
        """Return the seconds until the next look."""
        if not self._ledger.shared:
            return math.inf
        return self._seconds - (now - self._looked_at).total_seconds()

    def _answer(self, request: Request, causes: set[int]) -> Answer:
        if request.trigger is None:
            return Answer.stopped if self._is_for_this(request) else Answer.too_late
        if request.number in self._refused:
            return Answer.refused
        raised = id(request.trigger.cause) in causes
        return Answer.raised if raised else Answer.raised_before

    def _is_for_this(self, request: Request) -> bool:
        return request.recovery == self._ledger.recovery
