"""How far a call of `ev()` is, as its transitions tell: counted, and in words."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eventor.types import TaskCounts, TransitionKind
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

_ONE_MORE = {word: TaskCounts(**{word: 1}) for word in _AFTER.values()}
_ONE_LESS = {None: TaskCounts(), "ready": TaskCounts(ready=-1), "active": TaskCounts(active=-1)}


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


class Progress:
    """The state of one call of `ev()`, fed with its transitions; it is a hook."""

    def __init__(self) -> None:
        self.run = ""
        """The run and its recovery, as `3.0`."""
        self.name = ""
        """The name of the run."""
        self.began_at: datetime | None = None
        self.total = TaskCounts()
        """Of all steps together."""
        self.steps: dict[str, TaskCounts] = {}
        """By the names of steps, in the order in which these had their first task."""
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
        change = _ONE_LESS[self._leave(task)] + _ONE_MORE[after]
        self.steps[step] = self.steps.get(step, TaskCounts()) + change
        self.total += change
        if after == "ready":
            self._waiting.add(task)
        elif after == "active":
            self._running[task] = Running(f"{step}[{sequence}]", told.attempt or 1, told.at)
        elif after == "failure":
            error = (told.error or "")[:_SHOWN]
            self.failures.append(Failure(f"{step}[{sequence}]", error))

    def _leave(self, task: tuple[str, Sequence]) -> str | None:
        """Take a task from where it stood; return where that was, None for nowhere."""
        if task in self._waiting:
            self._waiting.remove(task)
            return "ready"
        return None if self._running.pop(task, None) is None else "active"
