"""A run that another program runs, watched as it goes on."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from eventor.errors import StoreChangedError, StoreError
from eventor.look.live import Terminal, can_draw
from eventor.look.progress import Progress
from eventor.types import RunStatus, TaskStatus, Transition, TransitionKind, thing_text
from eventor.words import one_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from eventor.storage.history import Brief, History, Place
    from eventor.types import Recovery, Run

_SECONDS = 0.5
"""How often is looked, at most."""

_SHARE = 10
"""A look takes no more than one of so many parts of the time,"""

_MOST_SECONDS = 10.0
"""unless the next would be later than that: a look may have waited for a store that was away."""

_ENDS = {
    TaskStatus.success: TransitionKind.task_success,
    TaskStatus.failure: TransitionKind.task_failure,
}


class Watched:
    """A recovery as it goes on in its store; a look reads what has changed since the last one.

    Args:
        history: of its store.
        place: the numbers of the run and of the recovery.
    """

    def __init__(self, history: History, place: Place) -> None:
        self.progress = Progress()
        self._history = history
        self._place = place
        self._began: tuple[str, datetime, datetime] | None = None
        self._latest = 0
        self._running: dict[int, int] = {}
        """By the numbers of tasks, their attempts."""
        self._waiting: set[int] = set()

    def look(self) -> tuple[Recovery, list[Transition]]:
        """Return the recovery, and what has happened to its tasks since the last look.

        Raises:
            StoreError: the store cannot be read, or has another run in the place of that.
        """
        run, recovery = self._history.at(self._place)
        first = self._began is None
        self._check(run, recovery)
        here = (run.run_id, recovery.recovery, run.name)
        if first:
            began = Transition(TransitionKind.run_started, recovery.began_at, *here)
            self.progress(began)
        briefs = self._history.briefs(self._place, self._latest, self._running, self._waiting)
        happened = [
            Transition(
                kind,
                at,
                *here,
                name=one.step,
                sequence=one.sequence,
                attempt=one.attempt,
                error=one.error,
            )
            for one in briefs
            for kind, at in self._news(one)
        ]
        happened.sort(key=lambda told: told.at)
        for told in happened:
            self.progress(told)
        end = recovery.ended_at or recovery.heard_at
        if recovery.status is not RunStatus.running and end is not None:
            self.progress(Transition(TransitionKind.run_ended, end, *here))
        return recovery, happened

    def _check(self, run: Run, recovery: Recovery) -> None:
        """Make sure that it is the same run as before, and not one of a store in its place."""
        began = (run.name, run.began_at, recovery.began_at)
        if self._began not in (None, began):
            raise StoreError(
                f"the store {self._history.location} has another run "
                f"{run.run_id}.{recovery.recovery} than the one that was watched: it began at "
                f"{recovery.began_at:%Y-%m-%d %H:%M:%S} UTC"
            )
        self._began = began

    def _news(self, one: Brief) -> Iterator[tuple[TransitionKind, datetime]]:
        """Yield what has happened to a task since the last look, in order, and note it."""
        number, at = one.task_id, one.ready_at
        attempt = self._running.pop(number, None)
        if number > self._latest:
            self._latest = number
            yield TransitionKind.task_ready, at
        self._waiting.discard(number)
        if one.started_at is not None and attempt != one.attempt:
            at = max(at, one.started_at)
            yield TransitionKind.task_active, at
        if one.status is TaskStatus.ready:
            self._waiting.add(number)
            if one.started_at is not None:  # it waits for its next attempt
                yield TransitionKind.attempt_failed, at
        elif one.status is TaskStatus.active:
            self._running[number] = one.attempt
        else:
            kind = TransitionKind.task_skipped if one.skipped else _ENDS[one.status]
            yield kind, max(at, one.ended_at or at)


def watch(history: History, place: Place, stream: TextIO, *, colour: bool = True) -> Recovery:
    """Show how far a run is until it ends: a picture on a terminal, else its failures as they come.

    Args:
        history: of its store.
        place: the numbers of the run and of the recovery.
        stream: where it is shown.
        colour: whether it may be in colours.

    Returns:
        The recovery as it has ended.

    Raises:
        StoreError: the store cannot be read, or has another run in the place of that.
    """
    drawing = stream.isatty() and can_draw()
    terminal = Terminal(stream, colour=colour) if drawing else None
    watched = Watched(history, place)
    try:
        while True:
            began = time.monotonic()
            try:
                recovery, happened = watched.look()
            except StoreChangedError:  # its end, for example, was written at this moment
                continue
            if terminal is not None:
                terminal.draw(watched.progress, datetime.now(UTC))
            else:
                for told in happened:
                    if told.kind is TransitionKind.task_failure:
                        _say(stream, f"failed: {_called(told)}: {told.error}")
            if recovery.status is not RunStatus.running:
                break
            took = time.monotonic() - began
            time.sleep(max(_SECONDS, min(took * _SHARE, _MOST_SECONDS)))
    finally:
        if terminal is not None:
            terminal.erase()
            terminal.close()
    _say(stream, f"{watched.progress.summary(datetime.now(UTC))}: {recovery.status}")
    return recovery


def _called(told: Transition) -> str:
    return thing_text(told.name or "", "" if told.sequence is None else told.sequence)


def _say(stream: TextIO, line: str) -> None:
    stream.write(f"{one_line(line)}\n")
    stream.flush()
