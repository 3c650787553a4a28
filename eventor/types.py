"""The words of the interface, and the records that a program reads back.

The values of the enums are the words that stand in the store.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from eventor.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

Sequence = int | str
"""What ties together all that derives from one trigger; `1` and `"1"` are two sequences."""

_INT = re.compile(r"-?[0-9]+")


def sequence_text(sequence: Sequence) -> str:
    """Return a sequence as a person writes it: in quotes if it is a str that reads as an int."""
    if isinstance(sequence, int):
        return str(sequence)
    quoted = _INT.fullmatch(sequence) is not None or sequence.startswith("'")
    return f"'{sequence}'" if quoted else sequence


def thing_text(name: str, sequence: Sequence) -> str:
    """Return a step or an event in a sequence as a person writes it."""
    return f"{name}[{sequence_text(sequence)}]"


def sequence_told(text: str) -> Sequence:
    """Return the sequence that `sequence_text` has written."""
    if text.startswith("'"):
        return text[1:-1]
    return int(text) if _INT.fullmatch(text) else text


class RunMode(StrEnum):
    """How an Eventor begins (interface: *Eventor Class Initiator*)."""

    restart = "restart"
    """Begin a new run; earlier runs in the store stay as they are."""
    recover = "recover"
    """Begin a new recovery of the latest run of that name in the store."""
    continue_ = "continue"
    """Go on with the latest recovery of the latest run of that name, where it stands."""


class TaskStatus(StrEnum):
    """The status of a task: ready -> active -> success or failure."""

    ready = "ready"
    """Triggered, and waiting for its turn."""
    active = "active"
    """Recorded as running."""
    success = "success"
    """Ended well, or skipped by a recovery."""
    failure = "failure"
    """Ended by an exception, a nonzero exit code or a signal, or could not be started."""


class StepReplay(StrEnum):
    """What a recovery does with a task that an earlier recovery left in some status."""

    rerun = "rerun"
    """Run it."""
    skip = "skip"
    """Count it as a success without running it; its earlier result stands."""


class StepTriggers(StrEnum):
    """The transitions of a task that can raise events (interface: `add_step`, *triggers*)."""

    at_ready = "at_ready"
    """The task is ready to run."""
    at_active = "at_active"
    """The task is running."""
    at_success = "at_success"
    """The task ended well."""
    at_failure = "at_failure"
    """The task failed."""
    at_complete = "at_complete"
    """The task ended, well or not."""


class CauseKind(StrEnum):
    """The kinds of reasons for which an event is raised or a task created."""

    call = "call"
    """`Eventor.trigger_event` was called by the program."""
    step = "step"
    """A running step triggered the event."""
    process = "process"
    """Another process triggered the event."""
    association = "association"
    """An event leads to it by `Eventor.add_assoc`."""
    expression = "expression"
    """The event's expression came to hold."""
    status = "status"
    """A step's `triggers` name the event."""
    recovery = "recovery"
    """A recovery raised again a trigger that an earlier recovery had from outside."""


class OwnerStatus(StrEnum):
    """How it stands with the owner of a recovery, the program that runs it."""

    live = "live"
    """It owns the run."""
    dead = "dead"
    """It died without releasing the run, or was replaced after its lease."""
    ended = "ended"
    """It has closed its Eventor."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Why an event was raised, or why a task was created.

    Attributes:
        kind: the kind of reason.
        source: the name of the event (association; expression: the one that completed it)
            or of the step (status, step) that is the reason; None where there is none.
        detail: the expression, the transition (`at_success`), for a recovery the number of the
            recovery that had the trigger, for a process its host and pid (`host:1234`), for a step
            that runs in another sequence that sequence, in quotes if it is a str that reads as an
            int; None where there is none.
    """

    kind: CauseKind
    source: str | None = None
    detail: str | None = None

    def __str__(self) -> str:
        known = (part for part in (self.source, self.detail) if part is not None)
        return " ".join((self.kind.value, *known))


@dataclass(frozen=True, slots=True)
class RaisedEvent:
    """One raised event, as `Eventor.events` returns it.

    Attributes:
        event: the event's name.
        sequence: the sequence under which it was raised.
        recovery: the recovery that raised it.
        raised_at: when, in UTC.
        cause: why.
    """

    event: str
    sequence: Sequence
    recovery: int
    raised_at: datetime
    cause: Cause


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """A task that `ev()` would run or skip, as `Eventor.preview` foresees it.

    Attributes:
        step: the step's name.
        sequence: the sequence in which it runs.
        previous: how earlier recoveries left it; None for one that was never begun.
        replay: what the step's recovery policy decides for that; None likewise.
    """

    step: str
    sequence: Sequence
    previous: TaskStatus | None
    replay: StepReplay | None

    def __str__(self) -> str:
        was = "" if self.previous is None else f" (was {self.previous})"
        return f"{self.step}[{self.sequence}]{was}"


@dataclass(frozen=True, slots=True)
class PlannedTrigger:
    """A trigger that `ev()` would raise again, as `Eventor.preview` foresees it.

    Attributes:
        event: the event's name.
        sequence: the sequence.
        recovery: the recovery that was triggered with it.
    """

    event: str
    sequence: Sequence
    recovery: int

    def __str__(self) -> str:
        return f"{self.event}[{self.sequence}] (of recovery {self.recovery})"


@dataclass(frozen=True, slots=True)
class Preview:
    """What `ev()` would do, as `Eventor.preview` foresees it. It prints as a list.

    Attributes:
        runs: the tasks that would run, in the order in which they would start.
        skips: the tasks that would be skipped.
        triggers: the triggers that would be raised again.
        drift: what has changed in the flow since it was recorded.
    """

    runs: tuple[PlannedTask, ...]
    skips: tuple[PlannedTask, ...]
    triggers: tuple[PlannedTrigger, ...]
    drift: tuple[str, ...]

    def __str__(self) -> str:
        parts = {
            "run": self.runs,
            "skip": self.skips,
            "trigger again": self.triggers,
            "changed": self.drift,
        }
        lines = [f"{verb}: {item}" for verb, items in parts.items() for item in items]
        return "\n".join(lines) or "nothing to do"


class TransitionKind(StrEnum):
    """What has happened, of which a `Transition` tells."""

    run_started = "run_started"
    """A call of `ev()` has begun."""
    event_raised = "event_raised"
    """An event was raised."""
    task_ready = "task_ready"
    """A task was created, was cut short before, or has not begun; it waits for its turn."""
    task_active = "task_active"
    """An attempt at a task was recorded as active, and was started."""
    attempt_failed = "attempt_failed"
    """An attempt has failed, and the task waits for the next."""
    task_success = "task_success"
    """A task has ended well."""
    task_failure = "task_failure"
    """A task has failed."""
    task_skipped = "task_skipped"
    """A task counts as a success without running."""
    run_ended = "run_ended"
    """A call of `ev()` is over."""


@dataclass(frozen=True, slots=True)
class Transition:
    """One thing that has happened in a run, as the hooks in `on_transition` are told.

    Attributes:
        kind: what has happened.
        at: when, in UTC, as it stands in the store.
        run_id: the number of the run.
        recovery: the number of the recovery.
        run_name: the name of the run.
        name: the event's or the step's name, by the kind; None for the run itself.
        sequence: the sequence; None for the run itself.
        cause: why an event was raised or a task created; None for other kinds, and for a task that
            a continued recovery found cut short, or that has not begun.
        attempt: for a task, how many times it was started since it last ended, earlier recoveries
            included; None where that is not told, as for one that is skipped.
        pid: the process of an attempt; None where there is none.
        error: for a failure the exception's type and message, the exit code, or the signal; for
            the end of the run, the exception that `ev()` raises.
        traceback: the exception's traceback, if a task failed by one.
        due_at: for a failed attempt, when the next may start, in UTC.
        succeeded: for the end of the run, whether `ev()` returns True; None for other kinds.
    """

    kind: TransitionKind
    at: datetime
    run_id: int
    recovery: int
    run_name: str
    name: str | None = None
    sequence: Sequence | None = None
    cause: Cause | None = None
    attempt: int | None = None
    pid: int | None = None
    error: str | None = None
    traceback: str | None = field(default=None, repr=False)
    due_at: datetime | None = None
    succeeded: bool | None = None

    def __str__(self) -> str:
        run = f"{self.run_id}.{self.recovery}"
        of = run if self.name is None else f"{self.name}[{self.sequence}]"
        return f"{self.kind} {of}" + ("" if self.error is None else f": {self.error}")


class FindingKind(StrEnum):
    """The kinds of what `Eventor.check` finds."""

    unreachable_step = "unreachable_step"
    """No event leads to the step."""
    unraised_event = "unraised_event"
    """The event leads to something; nothing has raised it, and nothing in the flow can."""
    impossible_expression = "impossible_expression"
    """The expression of the event can never hold."""
    unavailable_result = "unavailable_result"
    """The step uses the result of one that cannot have succeeded by then."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is probably wrong with a flow, as `Eventor.check` finds it.

    Attributes:
        kind: what kind of thing.
        name: the name of the step or of the event, by the kind.
        message: what is wrong, in a sentence that names all that is part of it.
    """

    kind: FindingKind
    name: str
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A step's return value as the store keeps it.

    Attributes:
        encoding: `pickle`, or `repr` for a value that cannot be pickled.
        data: the pickle, or the repr in UTF-8.
    """

    encoding: str
    data: bytes

    def load(self) -> Any:
        """Return the value; the repr (a str) of one that could not be pickled.

        Whatever unpickling raises goes through to the caller.
        """
        if self.encoding == "repr":
            return self.data.decode()
        return pickle.loads(self.data)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended, as its worker or its launcher reports it.

    Attributes:
        status: success or failure.
        shown: the result or the error in a form short enough for a log line.
        stored: the return value of a success.
        error: for a failure the exception's type and message, the exit code, or the signal.
        traceback: the exception's traceback, if it was one.
        warning: what else the user should know, or None.
        retriable: for a failure, whether the step's config asks for another attempt upon such an
            exception; None where there was none, as when the process has died.
        stdout: the end of what it wrote to its standard output, if that was captured.
        stderr: the same of its standard error.
    """

    status: TaskStatus
    shown: str
    stored: StoredResult | None = None
    error: str | None = None
    traceback: str | None = None
    warning: str | None = None
    retriable: bool | None = None
    stdout: str | None = None
    stderr: str | None = None


def failure(error: str, traceback: str | None = None, *, retriable: bool | None = None) -> Outcome:
    """Return the outcome of a task that failed by `error`; the rest as in `Outcome`."""
    error = storable(error)
    return Outcome(
        TaskStatus.failure,
        error,
        error=error,
        traceback=None if traceback is None else storable(traceback),
        retriable=retriable,
    )


def timed_out(seconds: float, *, retriable: bool) -> Outcome:
    """Return the outcome of a task that has run for longer than its timeout, in seconds."""
    told = f"TimeoutError: the step ran for longer than its timeout of {seconds:g} s"
    return failure(told, retriable=retriable)


def storable(text: str) -> str:
    """Return `text` with what no database keeps in a text (NUL, lone surrogates) written out."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\x00")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One of the times that a task was started.

    Attributes:
        number: from 1; in a recovery, one that was under way before is counted on.
        status: where it stands; active also for one whose owner has died.
        pid: the process in which it runs or ran; None before it is known.
        started_at: when it was recorded as active, in UTC.
        ended_at: when its end came in, in UTC; None for one whose owner has died.
        error: for a failure the exception's type and message, the exit code, or the signal.
        traceback: the exception's traceback, if it was one.
        stdout: the last 64 KB of its standard output, if its step's config has `capture_output`.
        stderr: the same of its standard error.
    """

    number: int
    status: TaskStatus
    pid: int | None
    started_at: datetime | None
    ended_at: datetime | None
    error: str | None
    traceback: str | None
    stdout: str | None
    stderr: str | None


@dataclass(frozen=True, slots=True)
class Task:
    """One step in one sequence, as `Eventor.tasks` returns it.

    Attributes:
        step: the step's name.
        sequence: the sequence in which it runs.
        recovery: the recovery to which this record belongs.
        status: where it stands.
        replay: None for a task that this run had never begun before; else what the step's
            recovery policy decided.
        attempt: how many times it was started since it last ended, earlier recoveries included.
        pid: the process in which it runs or ran; None before it is known, and for a skipped one.
        ready_at: when it became ready, in UTC.
        started_at: when it was recorded as active, in UTC.
        ended_at: when its end came in, in UTC.
        error: for a failure the exception's type and message, the exit code, or the signal.
        traceback: the exception's traceback, if it was one.
        stdout: the last 64 KB of its standard output, if its step's config has `capture_output`.
        stderr: the same of its standard error.
        cause: why the task was created.
        due_at: when the next attempt may start, in UTC, while it waits for that.
        attempts: the attempts, the latest last.
    """

    step: str
    sequence: Sequence
    recovery: int
    status: TaskStatus
    replay: StepReplay | None
    attempt: int
    pid: int | None
    ready_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    error: str | None
    traceback: str | None
    stdout: str | None
    stderr: str | None
    cause: Cause
    due_at: datetime | None
    attempts: list[Attempt]
    stored: StoredResult | None = field(repr=False)
    """The return value as it was kept; `result` is the value itself."""

    @property
    def skipped(self) -> bool:
        """Whether it counts as a success since a recovery has skipped it."""
        return self.status is TaskStatus.success and self.replay is StepReplay.skip

    @property
    def result(self) -> Any:
        """What the step returned; None before it has, the repr of what could not be pickled.

        It is unpickled at each access, and not before.

        Raises:
            StoreError: the value cannot be unpickled here, for example because its class is gone.
        """
        if self.stored is None:
            return None
        try:
            return self.stored.load()
        except Exception as error:
            raise StoreError(
                f"the result of {self.step}[{self.sequence}] cannot be unpickled here: "
                f"{type(error).__name__}: {error}; `stored.data` holds its pickle"
            ) from error


class RunStatus(StrEnum):
    """How it stands with a recovery as a whole."""

    running = "running"
    """Its owner lives."""
    succeeded = "succeeded"
    """It has ended, and every failure was handled."""
    failed = "failed"
    """It has ended, and a failure was not handled by its step's triggers."""
    unfinished = "unfinished"
    """It has ended without such a failure, and left tasks or delayed associations for later."""
    crashed = "crashed"
    """Its owner died, or was replaced after its lease."""


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """How many tasks stand where.

    Attributes:
        ready: wait for their turn.
        active: run, or were cut short if their owner does not live.
        success: have run and ended well.
        failure: have failed.
        skipped: count as a success since an earlier recovery has run them.
    """

    ready: int = 0
    active: int = 0
    success: int = 0
    failure: int = 0
    skipped: int = 0

    def __add__(self, other: TaskCounts) -> TaskCounts:
        """Return how many there are where in both together."""
        return TaskCounts(
            self.ready + other.ready,
            self.active + other.active,
            self.success + other.success,
            self.failure + other.failure,
            self.skipped + other.skipped,
        )

    @property
    def ended(self) -> int:
        """How many have ended, well or not, or were skipped."""
        return self.success + self.failure + self.skipped

    @property
    def all(self) -> int:
        """How many there are."""
        return self.ready + self.active + self.ended


@dataclass(frozen=True, slots=True)
class Counts:
    """How things stand in a recovery, in numbers.

    Attributes:
        steps: for the name of a step that has tasks, how many of them stand where.
        events: for the name of an event, in how many sequences it was raised.
        live: whether the owner lives; if it does not, what is active was cut short.
    """

    steps: Mapping[str, TaskCounts]
    events: Mapping[str, int]
    live: bool = True


@dataclass(frozen=True, slots=True)
class Recovery:
    """One recovery of a run, as `Attached.runs` returns it within its `Run`.

    Attributes:
        recovery: its number in the run; 0 is the initial run.
        based_on: the recovery from which it started; None for the initial run.
        began_at: when, in UTC.
        owner: whether the program that runs it lives.
        program: the path of that program's script; None where there is none.
        ended_at: when its owner ended, in UTC; None while it lives, or if it has died.
        heard_at: when the owner was last heard of, in UTC; None once it has ended.
        status: how it stands as a whole.
        tasks: how many of its tasks stand where.
    """

    recovery: int
    based_on: int | None
    began_at: datetime
    owner: OwnerStatus
    program: str | None
    ended_at: datetime | None
    heard_at: datetime | None
    status: RunStatus
    tasks: TaskCounts


@dataclass(frozen=True, slots=True)
class Run:
    """One run, as `Attached.runs` returns it.

    Attributes:
        run_id: its number in the store.
        name: its name.
        began_at: when, in UTC.
        recoveries: its recoveries, from the initial run to the latest.
    """

    run_id: int
    name: str
    began_at: datetime
    recoveries: tuple[Recovery, ...]


class ThingKind(StrEnum):
    """What `Eventor.why` can be asked about."""

    event = "event"
    step = "step"


_DEEPEST = 30
"""From which depth on lines are not indented further."""


def _first_line(text: str) -> str:
    lines = text.splitlines() or [""]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ..."


@dataclass(frozen=True, slots=True)
class Occurrence:
    """An event that was raised, or a task that was created, with its reason.

    Attributes:
        kind: whether it is an event or a step.
        name: its name.
        sequence: the sequence in which it happened.
        at: when the event was raised, or the task became ready, in UTC.
        cause: why.
        status: where the task stands; None for an event.
        ended_at: when the task ended, in UTC; None for an event, or before that.
        error: of a failed task.
    """

    kind: ThingKind
    name: str
    sequence: Sequence
    at: datetime
    cause: Cause
    status: TaskStatus | None = None
    ended_at: datetime | None = None
    error: str | None = None

    def __str__(self) -> str:
        status = "" if self.status is None else f", {self.status}"
        error = "" if self.error is None else f": {_first_line(self.error)}"
        thing = f"{self.kind} {thing_text(self.name, self.sequence)}"
        return f"{thing} ({self.cause}){status}{error}"


@dataclass(frozen=True, slots=True)
class Lack:
    """What has not happened, or has without leading on: one line of why something else has not.

    Attributes:
        depth: how many steps of reasoning lie between this and what was asked about.
        kind: whether it is an event or a step.
        name: its name.
        sequence: the sequence.
        leads_by: how it would lead to the line above it: `association`, `expression`, or a
            transition such as `at_success`; None for what was asked about.
        seconds: for a delayed association, by how much.
        happened_at: when the event was raised, or the task became ready, if that has happened.
        status: where the task stands, if there is one.
        due_at: when a delayed association, or the next attempt of a task, is due.
        error: of a failed task.
        expression: what raises the event, if it has an expression.
        sources: how many things of the flow lead to it; an event without any waits for a trigger.
        told_before: whether the lines that explain it stand further above.
    """

    depth: int
    kind: ThingKind
    name: str
    sequence: Sequence
    leads_by: str | None = None
    seconds: float = 0.0
    happened_at: datetime | None = None
    status: TaskStatus | None = None
    due_at: datetime | None = None
    error: str | None = None
    expression: str | None = None
    sources: int = 0
    told_before: bool = False

    def __str__(self) -> str:
        how = "" if self.leads_by is None else f"{self.leads_by} of "
        if self.status is not None:
            told = "" if self.error is None else _first_line(self.error)
            state = f"failed: {told}" if told else f"is {self.status}"
        elif self.happened_at is not None:
            state = "is raised"
        else:
            state = "has not run" if self.kind is ThingKind.step else "is not raised"
            if not self.sources:
                step = self.kind is ThingKind.step
                state += ", and nothing leads to it" if step else ": it waits for a trigger"
        due = "" if self.due_at is None else f", due at {self.due_at:%Y-%m-%d %H:%M:%S} UTC"
        expression = "" if self.expression is None else f"; it needs {self.expression}"
        again = " (as above)" if self.told_before else ""
        thing = f"{self.kind} {thing_text(self.name, self.sequence)}"
        indent = "  " * min(self.depth, _DEEPEST)
        return f"{indent}{how}{thing} {state}{due}{expression}{again}"


@dataclass(frozen=True, slots=True)
class Why:
    """Why something has happened, or has not, as `Eventor.why` returns it. It prints as lines.

    Attributes:
        chain: what has led to it, from the trigger with which it began to the thing itself; empty
            for what has not happened.
        lacks: for what has not happened, what it waits for, each thing before what that waits for
            in turn; the first is the thing itself. Where nothing in the flow leads to an event,
            it waits for a trigger.
    """

    chain: tuple[Occurrence, ...]
    lacks: tuple[Lack, ...]

    @property
    def happened(self) -> bool:
        """Whether it has happened."""
        return bool(self.chain)

    def __str__(self) -> str:
        return "\n".join(map(str, self.chain or self.lacks))
