"""How far a call of `ev()` is, as its transitions tell: counted, and in words."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eventor.types import TransitionKind
from eventor.words import stopwatch

if TYPE_CHECKING:
    from datetime import datetime

    from eventor.types import Sequence, Transition

_FAILURES = 20
"""How many failures are kept: the latest."""

_SHOWN = 500
"""How much of an error is kept."""


@dataclass(slots=True)
class Counts:
    """How many tasks stand where.

    Attributes:
        succeeded: ended well.
        skipped: counted as a success without running.
        failed: failed.
        running: have an attempt that runs.
        waiting: are ready, or wait for their next attempt.
    """

    succeeded: int = 0
    skipped: int = 0
    failed: int = 0
    running: int = 0
    waiting: int = 0

    @property
    def done(self) -> int:
        """How many have ended."""
        return self.succeeded + self.skipped + self.failed

    @property
    def total(self) -> int:
        """How many there are, so far."""
        return self.done + self.running + self.waiting

    def add(self, other: Counts) -> None:
        """Count what `other` counts, too."""
        self.succeeded += other.succeeded
        self.skipped += other.skipped
        self.failed += other.failed
        self.running += other.running
        self.waiting += other.waiting


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
        self.steps: dict[str, Counts] = {}
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
        elif (
            told.kind is not TransitionKind.event_raised
            and told.name is not None
            and told.sequence is not None
        ):
            counts = self.steps.setdefault(told.name, Counts())
            self._count(counts, (told.name, told.sequence), told)

    @property
    def running(self) -> list[Running]:
        """What runs, the longest first."""
        return list(self._running.values())

    @property
    def total(self) -> Counts:
        """The counts of all steps together."""
        total = Counts()
        for counts in self.steps.values():
            total.add(counts)
        return total

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
            "succeeded": total.succeeded,
            "failed": total.failed,
            "skipped": total.skipped,
            "cut short": total.running,
            "left waiting": total.waiting,
        }
        parts = [f"{number:,} {what}" for what, number in numbers.items() if number]
        told = ", ".join(parts) or "nothing to do"
        return f"eventor run {self.run}: {told} in {stopwatch(self.seconds(now))}"

    def _count(self, counts: Counts, task: tuple[str, Sequence], told: Transition) -> None:
        self._leave(counts, task)
        if told.kind is TransitionKind.task_active:
            counts.running += 1
            label = f"{task[0]}[{task[1]}]"
            self._running[task] = Running(label, told.attempt or 1, told.at)
        elif told.kind is TransitionKind.task_success:
            counts.succeeded += 1
        elif told.kind is TransitionKind.task_skipped:
            counts.skipped += 1
        elif told.kind is TransitionKind.task_failure:
            counts.failed += 1
            error = (told.error or "")[:_SHOWN]
            self.failures.append(Failure(f"{task[0]}[{task[1]}]", error))
        else:
            counts.waiting += 1
            self._waiting.add(task)

    def _leave(self, counts: Counts, task: tuple[str, Sequence]) -> None:
        """No longer count a task where it stood."""
        if task in self._waiting:
            self._waiting.remove(task)
            counts.waiting -= 1
        elif self._running.pop(task, None) is not None:
            counts.running -= 1
