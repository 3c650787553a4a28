"""What a report tells of tasks: an excerpt of their records, short enough for one page."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median
from typing import TYPE_CHECKING

from eventor.types import OwnerStatus, Recovery, Task, TaskStatus, sequence_text
from eventor.words import duration, shorten, visible

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from eventor.types import Attempt

_FAILURES_SHOWN = 100
"""How many failures have a place of their own; those of the others are in the table."""

_TEXT_OF_FAILURES = 250_000
_TEXT_OF_OTHERS = 100_000
"""How many characters of tracebacks and outputs the page holds."""

_NAME, _ERROR = 80, 400
"""How many characters of a name in the timeline, and of an error in a line, are shown."""


@dataclass(frozen=True, slots=True)
class Words:
    """How a status is shown.

    Attributes:
        word: what it is called.
        style: the class of its colours.
        sign: the name of its sign.
    """

    word: str
    style: str
    sign: str


STATES = {
    "failure": Words("failure", "failure", "cross"),
    "cut": Words("cut short", "cut", "bolt"),
    "active": Words("active", "active", "play"),
    "ready": Words("ready", "ready", "clock"),
    "success": Words("success", "success", "check"),
    "skipped": Words("skipped", "skipped", "skip"),
}
"""How tasks stand, what matters most first."""

_RANKS = {word: rank for rank, word in enumerate(STATES)}


@dataclass(frozen=True, slots=True)
class Text:
    """The end of a text that a step left.

    Attributes:
        title: what the text is.
        end: its end.
        left_out: how many characters before that are left out; none if it is not above 0.
    """

    title: str
    end: str
    left_out: int


@dataclass(frozen=True, slots=True)
class ShownAttempt:
    """An attempt, as the page tells of it; the times are in seconds after the beginning."""

    number: int
    state: Words
    pid: int | None
    began_at: datetime
    began: float
    ended: float
    is_open: bool
    error: str | None
    texts: tuple[Text, ...]

    @property
    def ran(self) -> str:
        """For how long it has run."""
        return duration(self.ended - self.began)


@dataclass(frozen=True, slots=True)
class ShownTask:
    """A task, as the page tells of it.

    Attributes:
        number: its place in the order in which the tasks became ready, from 1.
        task: its record.
        rank: its status's place among all.
        state: how it stands.
        waited: for how many seconds it was ready before it first started; None if it has not.
        attempts: those of which this recovery knows.
        error: what it failed by, in a line.
        handled: whether its step has triggers for a failure.
        apart: whether it is told of among the failures.
    """

    number: int
    task: Task
    rank: int
    state: Words
    waited: float | None
    attempts: tuple[ShownAttempt, ...]
    error: str | None
    handled: bool
    apart: bool

    @property
    def name(self) -> str:
        """Its name, short enough for a label."""
        return f"{label(self.task.step)}[{label(sequence_text(self.task.sequence))}]"

    @property
    def ran(self) -> float | None:
        """For how many seconds its attempts have run; None if it has not started."""
        return sum(one.ended - one.began for one in self.attempts) if self.attempts else None

    @property
    def has_more(self) -> bool:
        """Whether there is more to tell than fits its row."""
        return any(one.texts for one in self.attempts) or len(self.attempts) > 1

    @property
    def told(self) -> str:
        """It in two lines, for who points at it."""
        tries = f" after {len(self.attempts)} attempts" if len(self.attempts) > 1 else ""
        lines = [f"{self.name}: {self.state.word}{tries}"]
        if self.ran is not None and self.waited is not None:
            began, ran = duration(self.attempts[0].began), duration(self.ran)
            lines.append(f"from {began} on, ran {ran}, waited {duration(self.waited)}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What the tasks of a step took, in seconds."""

    name: str
    tasks: int
    failures: int
    total: float
    median: float
    longest: float


def shown_tasks(
    recovery: Recovery,
    tasks: Sequence[Task],
    handling: Collection[str],
    began: datetime,
    ended: datetime,
) -> list[ShownTask]:
    """Return what a report tells of the tasks of a recovery.

    Args:
        recovery: the recovery.
        tasks: its tasks, as they became ready.
        handling: the steps whose failures are handled.
        began: when the time of the report begins.
        ended: when it ends; what has no end goes on up to then.
    """
    failed = [task for task in tasks if task.status is TaskStatus.failure]
    failed.sort(key=lambda task: task.step in handling)
    apart = {id(task) for task in failed[:_FAILURES_SHOWN]}
    longest = {
        of_failures: fitting(
            (
                len(text)
                for task in tasks
                if (task.status is TaskStatus.failure) is of_failures
                for one in task.attempts
                for _, text in _texts(one)
            ),
            _TEXT_OF_FAILURES if of_failures else _TEXT_OF_OTHERS,
        )
        for of_failures in (True, False)
    }
    live = recovery.owner is OwnerStatus.live
    shown = []
    for number, task in enumerate(tasks, 1):
        word = _state(task, live=live)
        attempts = _attempts(
            task, began, ended, longest[task.status is TaskStatus.failure], live=live
        )
        first = attempts[0].began if attempts else None
        ready = after(began, task.ready_at)
        shown.append(
            ShownTask(
                number,
                task,
                _RANKS[word],
                STATES[word],
                None if first is None else max(0.0, first - ready),
                attempts,
                None if task.error is None else shorten(visible(task.error), _ERROR),
                task.step in handling,
                id(task) in apart,
            )
        )
    return shown


def counts(shown: Iterable[ShownTask]) -> list[tuple[Words, int]]:
    """Return how many tasks stand where; those that do not are left out."""
    found = Counter(one.rank for one in shown)
    order = ("success", "skipped", "active", "cut", "ready", "failure")
    return [(STATES[word], found[_RANKS[word]]) for word in order if found[_RANKS[word]]]


def facts(shown: Sequence[ShownTask]) -> list[StepFacts]:
    """Return what each step took, that which took the most first."""
    of_step: dict[str, list[ShownTask]] = defaultdict(list)
    for one in shown:
        of_step[one.task.step].append(one)
    found = []
    for name, tasks in of_step.items():
        ran = [one.ran for one in tasks if one.ran is not None]
        failures = sum(one.task.status is TaskStatus.failure for one in tasks)
        found.append(
            StepFacts(
                name,
                len(tasks),
                failures,
                sum(ran),
                median(ran) if ran else 0.0,
                max(ran, default=0.0),
            )
        )
    return sorted(found, key=lambda step: -step.total)


def fitting(lengths: Iterable[int], all_of_them: int) -> int:
    """Return how long the longest of some texts may be, for what is left to be no more than that.

    Args:
        lengths: of the texts as they are.
        all_of_them: how long the texts may be, taken together.
    """
    left = all_of_them
    ordered = sorted(lengths)
    for index, length in enumerate(ordered):
        share = left // (len(ordered) - index)
        if length > share:
            return share
        left -= length
    return all_of_them


def _state(task: Task | Attempt, *, live: bool) -> str:
    if isinstance(task, Task) and task.skipped:
        return "skipped"
    return "cut" if task.status is TaskStatus.active and not live else task.status.value


def _attempts(
    task: Task, began: datetime, ended: datetime, longest: int, *, live: bool
) -> tuple[ShownAttempt, ...]:
    """Return the attempts of a task; of one without an end, up to when it may have run."""
    started = [one for one in task.attempts if one.started_at is not None]
    shown = []
    for index, one in enumerate(started):
        last = index == len(started) - 1
        first = after(began, one.started_at)
        if one.ended_at is not None:
            end = one.ended_at
        else:
            end = ended if last else started[index + 1].started_at or ended
        word = _state(one, live=live and last and task.status is TaskStatus.active)
        shown.append(
            ShownAttempt(
                one.number,
                STATES[word],
                one.pid,
                began + timedelta(seconds=first),
                first,
                max(first, after(began, end)),
                one.ended_at is None,
                None if one.error is None else shorten(visible(one.error), _ERROR),
                tuple(
                    Text(title, visible(text[-longest:] if longest else ""), len(text) - longest)
                    for title, text in _texts(one)
                ),
            )
        )
    return tuple(shown)


def _texts(attempt: Attempt) -> list[tuple[str, str]]:
    found = {
        "Traceback": attempt.traceback,
        "Standard output": attempt.stdout,
        "Standard error": attempt.stderr,
    }
    return [(title, text) for title, text in found.items() if text]


def after(began: datetime, at: datetime | None) -> float:
    """Return how many seconds after the beginning a time is; 0 for none."""
    return 0.0 if at is None else (at - began).total_seconds()


def label(name: str) -> str:
    """Return a name, short enough for a label."""
    return shorten(visible(name), _NAME)
