"""How far a call of `ev()` is, as its transitions tell: counted, and in words."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import TYPE_CHECKING

from eventor.types import TaskCounts, TransitionKind, thing_text
from eventor.words import stopwatch

if TYPE_CHECKING:
    from datetime import datetime

    from eventor.types import Sequence, Transition

_FAILURES = 20
"""How many failures are kept: the latest."""

_SHOWN = 500
"""How much of an error is kept."""


_AFTER = {
    TransitionKind.task_ready: "ready",
    TransitionKind.attempt_failed: "ready",
    TransitionKind.task_active: "active",
    TransitionKind.task_success: "success",
    TransitionKind.task_failure: "failure",
    TransitionKind.task_skipped: "skipped",
}
"""Where a task stands after a transition, by the words of `TaskCounts`."""

_NONE = TaskCounts()

_FROM = {None: _NONE, "ready": TaskCounts(ready=-1), "active": TaskCounts(active=-1)}
_CHANGES = {
    (before, after): less + TaskCounts(**{after: 1})
    for before, less in _FROM.items()
    for after in _AFTER.values()
}
"""What changes in the counts when a task goes from where it stood, if anywhere, to another."""


@dataclass(frozen=True, slots=True)
class Running:
    """An attempt that runs: of which task, its number, and since when."""

    task: str
    attempt: int
    since: datetime


@dataclass(frozen=True, slots=True)
class Failure:
    """A task that has failed, and its error."""

    task: str
    error: str


class Sequences:
    """How far the sequences of a run are; a change costs the same, whatever their number."""

    def __init__(self) -> None:
        self.counts: dict[Sequence, TaskCounts] = {}
        """By sequences, in the order in which these had their first task."""
        self.ended = 0
        """In how many nothing runs or waits, so far."""
        self.running = 0
        """In how many something runs."""
        self.longest = ""
        """The longest of them, as text."""
        self._failed: dict[Sequence, None] = {}
        self._under_way: dict[Sequence, datetime] = {}
        self._to_begin: dict[Sequence, None] = {}
        self._perhaps_over: list[Sequence] = []
        self._at: datetime | None = None

    @property
    def failed(self) -> int:
        """In how many something has failed."""
        return len(self._failed)

    def since(self, sequence: Sequence) -> datetime | None:
        """Return since when a sequence is under way; None if it has not begun, or has ended."""
        over = _has_ended(self.counts.get(sequence, _NONE))
        return None if over else self._under_way.get(sequence)

    def chosen(self, most: int) -> list[Sequence]:
        """Return all sequences, or so many of them if there are more.

        Those are the latest that failed, up to a third, and those that are under way for the
        longest; then the next to begin, more that failed, and the last ones.
        """
        if len(self.counts) <= most:
            return list(self.counts)
        self._settle()
        failed = list(islice(reversed(self._failed), most))
        first = failed[: most // 3]
        others = chain(self._under_way, self._to_begin, failed, reversed(self.counts))
        unique = dict.fromkeys(chain(reversed(first), islice(others, 4 * most)))
        return list(islice(unique, most))

    def change(self, sequence: Sequence, change: TaskCounts, at: datetime) -> None:
        """Count a change of a task of a sequence."""
        if at != self._at:
            self._settle()
            self._at = at
        before = self.counts.get(sequence)
        if before is None:
            self._to_begin[sequence] = None
            self.longest = max(self.longest, str(sequence), key=len)
        else:
            self.ended -= _has_ended(before)
            self.running -= before.active > 0
        after = self.counts[sequence] = _sum(before or _NONE, change)
        self.ended += _has_ended(after)
        self.running += after.active > 0
        if change.failure:
            self._failed.pop(sequence, None)  # it is the latest once more
            self._failed[sequence] = None
        if _has_ended(after):
            self._perhaps_over.append(sequence)
        elif after.active and sequence not in self._under_way:
            self._to_begin.pop(sequence, None)
            self._under_way[sequence] = at

    def _settle(self) -> None:
        """Let go of what has ended: what follows from an end is told after it, at the same time."""
        for sequence in self._perhaps_over:
            if _has_ended(self.counts[sequence]):
                self._to_begin.pop(sequence, None)
                self._under_way.pop(sequence, None)
        self._perhaps_over.clear()


@lru_cache(1 << 12)
def _sum(one: TaskCounts, other: TaskCounts) -> TaskCounts:
    """Add up two counts; sequences that are alike share the result, as there may be many."""
    return one + other


def _has_ended(counts: TaskCounts) -> bool:
    return not counts.ready and not counts.active


class Progress:
    """The state of one call of `ev()`, fed with its transitions; it is a hook."""

    def __init__(self) -> None:
        self.run = ""
        """The run and its recovery, as `3.0`."""
        self.name = ""
        """The name of the run."""
        self.began_at: datetime | None = None
        self.steps: dict[str, TaskCounts] = {}
        """By the names of steps, in the order in which these had their first task."""
        self.sequences = Sequences()
        self.failures: deque[Failure] = deque(maxlen=_FAILURES)
        self._running: dict[tuple[str, Sequence], Running] = {}
        self._waiting: set[tuple[str, Sequence]] = set()
        self._ended: Transition | None = None

    def __call__(self, told: Transition) -> None:
        """Count what a transition tells."""
        if told.kind is TransitionKind.run_started:
            self.run, self.name = f"{told.run_id}.{told.recovery}", told.run_name
            self.began_at = told.at
        elif told.kind is TransitionKind.run_ended:
            self._ended = told
        elif told.kind in _AFTER and told.name is not None and told.sequence is not None:
            self._count((told.name, told.sequence), told)

    @property
    def running(self) -> list[Running]:
        """What runs, the longest first."""
        return list(self._running.values())

    @property
    def total(self) -> TaskCounts:
        """The counts of all steps together."""
        return sum(self.steps.values(), _NONE)

    def seconds(self, now: datetime) -> float:
        """Return for how long the call runs, or did run."""
        if self.began_at is None:
            return 0.0
        end = now if self._ended is None else self._ended.at
        return max(0.0, (end - self.began_at).total_seconds())

    def summary(self, now: datetime) -> str:
        """Return in a line what has become of it."""
        total = self.total
        numbers = {
            "succeeded": total.success,
            "failed": total.failure,
            "skipped": total.skipped,
            "cut short": total.active,
            "left waiting": total.ready,
        }
        parts = [f"{number:,} {what}" for what, number in numbers.items() if number]
        told = ", ".join(parts) or "nothing to do"
        return f"eventor run {self.run}: {told} in {stopwatch(self.seconds(now))}"

    def _count(self, task: tuple[str, Sequence], told: Transition) -> None:
        step, sequence = task
        after = _AFTER[told.kind]
        change = _CHANGES[self._leave(task), after]
        self.steps[step] = self.steps.get(step, _NONE) + change
        self.sequences.change(sequence, change, told.at)
        if after == "ready":
            self._waiting.add(task)
        elif after == "active":
            self._running[task] = Running(thing_text(step, sequence), told.attempt or 1, told.at)
        elif after == "failure":
            error = (told.error or "")[:_SHOWN]
            self.failures.append(Failure(thing_text(step, sequence), error))

    def _leave(self, task: tuple[str, Sequence]) -> str | None:
        """Take a task from where it stood; return where that was, None for nowhere."""
        if task in self._waiting:
            self._waiting.remove(task)
            return "ready"
        return None if self._running.pop(task, None) is None else "active"
