"""The rows of the store as records, and back; and what other processes can ask of a run."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_

from eventor.rules.plan import Left, TaskKey, Trigger
from eventor.storage import schema
from eventor.storage.owner import Owner
from eventor.types import (
    Attempt,
    Cause,
    CauseKind,
    RaisedEvent,
    Sequence,
    StepReplay,
    StoredResult,
    Task,
    TaskStatus,
)

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Table


class RequestKind(StrEnum):
    """What another process can ask of a run."""

    trigger = "trigger"
    stop = "stop"


class Answer(StrEnum):
    """What became of a request."""

    raised = "raised"
    raised_before = "raised before"
    """The event was raised in that sequence already."""
    refused = "refused"
    """The flow has no such event."""
    stopped = "stopped"
    too_late = "too late"
    """It asked an owner to stop that has ended since."""


@dataclass(frozen=True, slots=True)
class Request:
    """What another process has asked of a run.

    Attributes:
        number: its number in the store.
        by: the host and pid of that process.
        recovery: the latest recovery of the run when it was made.
        trigger: the event that it asks to raise; None for a request to stop.
    """

    number: int
    by: str
    recovery: int
    trigger: Trigger | None


Row = Any  # SQLAlchemy 2.0 and 2.1 type their rows in different ways


def typed(sequence: Sequence) -> dict[str, str]:
    """Return a sequence as columns, with its type."""
    return {"sequence": str(sequence), "sequence_type": type(sequence).__name__}


def sequence_of(row: Row) -> Sequence:
    """Return the sequence that a row names."""
    written: str = row.sequence
    return int(written) if row.sequence_type == "int" else written


def of_sequence(table: Table, sequence: Sequence | None) -> list[ColumnElement[bool]]:
    """Return the conditions for rows of a sequence; none where it does not matter."""
    if sequence is None:
        return []
    return [table.c[name] == value for name, value in typed(sequence).items()]


def is_skipped() -> ColumnElement[bool]:
    """Return the condition for what `Task.skipped` tells of a task."""
    columns = schema.task.c
    return and_(columns.status == TaskStatus.success.value, columns.replay == StepReplay.skip.value)


def task_key(row: Row) -> TaskKey:
    """Return the task that a row names."""
    return TaskKey(row.step, sequence_of(row))


def cause_of(row: Row) -> Cause:
    """Return the cause that a row tells."""
    return Cause(CauseKind(row.cause_kind), row.cause_source, row.cause_detail)


def cause_columns(cause: Cause) -> dict[str, str | None]:
    """Return a cause as columns."""
    return {
        "cause_kind": cause.kind.value,
        "cause_source": cause.source,
        "cause_detail": cause.detail,
    }


def event_of(row: Row) -> RaisedEvent:
    """Return the record of an event."""
    return RaisedEvent(row.event, sequence_of(row), row.recovery, row.raised_at, cause_of(row))


def owner_of(row: Row) -> Owner:
    """Return the owner of a recovery that has one."""
    return Owner(str(row.owner_host), row.owner_pid, str(row.owner_began))


def request_of(row: Row) -> Request:
    """Return what a row of requests asks."""
    by = f"{row.made_by_host}:{row.made_by_pid}"
    trigger = None
    if RequestKind(row.kind) is RequestKind.trigger:
        trigger = Trigger(row.event, sequence_of(row), Cause(CauseKind.process, detail=by))
    return Request(row.request_id, by, row.recovery, trigger)


def left_of(row: Row) -> Left:
    """Return how a row of tasks left its task."""
    status = TaskStatus(row.status)
    return Left(status, row.result_id, row.recovery, row.attempt, row.due_at)


def attempt_of(row: Row) -> Attempt:
    """Return the attempt of which a row tells, of attempts or of tasks."""
    return Attempt(
        number=row.attempt,
        status=TaskStatus(row.status),
        pid=row.pid,
        started_at=row.started_at,
        ended_at=row.ended_at,
        error=row.error,
        traceback=row.traceback,
        stdout=row.stdout,
        stderr=row.stderr,
    )


def task_of(row: Row, earlier: list[Attempt]) -> Task:
    """Return the record of a task, given its earlier attempts."""
    return Task(
        step=row.step,
        sequence=sequence_of(row),
        recovery=row.recovery,
        status=TaskStatus(row.status),
        replay=None if row.replay is None else StepReplay(row.replay),
        attempt=row.attempt,
        pid=row.pid,
        ready_at=row.ready_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        error=row.error,
        traceback=row.traceback,
        stdout=row.stdout,
        stderr=row.stderr,
        cause=cause_of(row),
        due_at=row.due_at,
        attempts=[*earlier, attempt_of(row)] if row.started_at is not None else earlier,
        stored=None if row.data is None else StoredResult(row.encoding, row.data),
    )
