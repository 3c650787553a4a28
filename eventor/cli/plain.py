"""Records as plain data, for JSON and CSV. The keys are part of the interface of the command.

Times are ISO 8601 with their zone, UTC; durations are in seconds; a sequence keeps its type.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from eventor.types import OwnerStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eventor.storage.owner import Owner
    from eventor.types import Cause, Counts, Lack, Occurrence, RaisedEvent, Recovery, Run, Task, Why

Plain = dict[str, Any]

TASK_COLUMNS = (
    *("run_id", "name", "recovery", "step", "sequence", "sequence_type", "status", "replay"),
    *("attempt", "ready_at", "started_at", "ended_at", "seconds", "due_at", "pid"),
    *("cause_kind", "cause_source", "cause_detail", "error", "traceback", "stdout", "stderr"),
)
"""The columns of a table of tasks."""


def seconds_of(recovery: Recovery, now: datetime) -> float | None:
    """Return how long a recovery took, in seconds.

    That is to its end, until now while its owner lives, and to when that was last heard of if it
    has died; None where this is not known.
    """
    end = now if recovery.owner is OwnerStatus.live else recovery.ended_at or recovery.heard_at
    return seconds_between(recovery.began_at, end)


def seconds_between(start: datetime | None, end: datetime | None) -> float | None:
    """Return the seconds from one time to another, None if one of them is not known."""
    return None if start is None or end is None else (end - start).total_seconds()


def run_data(run: Run, owner: Owner | None, now: datetime) -> Plain:
    """Return a run with its recoveries.

    Args:
        run: the run.
        owner: of its latest recovery, if that has not ended.
        now: the time, in UTC.
    """
    latest = run.recoveries[-1]
    return {
        "run_id": run.run_id,
        "name": run.name,
        "began_at": _time(run.began_at),
        "recoveries": [
            recovery_data(each, owner if each is latest else None, now) for each in run.recoveries
        ],
    }


def recovery_data(recovery: Recovery, owner: Owner | None, now: datetime) -> Plain:
    """Return a recovery, with its owner if that has not ended."""
    return {
        "recovery": recovery.recovery,
        "based_on": recovery.based_on,
        "status": recovery.status.value,
        "began_at": _time(recovery.began_at),
        "ended_at": _time(recovery.ended_at),
        "heard_at": _time(recovery.heard_at),
        "seconds": seconds_of(recovery, now),
        "program": recovery.program,
        "owner": recovery.owner.value,
        "owner_host": None if owner is None else owner.host,
        "owner_pid": None if owner is None else owner.pid,
        "counts": asdict(recovery.tasks) | {"all": recovery.tasks.all},
    }


def task_data(task: Task) -> Plain:
    """Return a task with its attempts, without its result."""
    return {
        "step": task.step,
        "sequence": task.sequence,
        "status": task.status.value,
        "replay": None if task.replay is None else task.replay.value,
        "attempt": task.attempt,
        "ready_at": _time(task.ready_at),
        "started_at": _time(task.started_at),
        "ended_at": _time(task.ended_at),
        "seconds": seconds_between(task.started_at, task.ended_at),
        "due_at": _time(task.due_at),
        "pid": task.pid,
        "cause": cause_data(task.cause),
        "error": task.error,
        "traceback": task.traceback,
        "stdout": task.stdout,
        "stderr": task.stderr,
        "attempts": [
            {
                "number": attempt.number,
                "status": attempt.status.value,
                "started_at": _time(attempt.started_at),
                "ended_at": _time(attempt.ended_at),
                "seconds": seconds_between(attempt.started_at, attempt.ended_at),
                "pid": attempt.pid,
                "error": attempt.error,
                "traceback": attempt.traceback,
                "stdout": attempt.stdout,
                "stderr": attempt.stderr,
            }
            for attempt in task.attempts
        ],
    }


def task_row(run: Run, task: Task) -> list[Any]:
    """Return a task as a row of `TASK_COLUMNS`."""
    data = task_data(task) | {
        "run_id": run.run_id,
        "name": run.name,
        "recovery": task.recovery,
        "sequence_type": type(task.sequence).__name__,
        **{f"cause_{part}": value for part, value in cause_data(task.cause).items()},
    }
    return [data[column] for column in TASK_COLUMNS]


def event_data(event: RaisedEvent) -> Plain:
    """Return a raised event."""
    return {
        "event": event.event,
        "sequence": event.sequence,
        "raised_at": _time(event.raised_at),
        "cause": cause_data(event.cause),
    }


def flow_data(definition: Mapping[str, Any], counts: Counts | None, title: str) -> Plain:
    """Return a flow: its definition as the store keeps it, and how things stand in a run of it."""
    stand = None if counts is None else asdict(counts)
    return {"title": title, "definition": definition, "counts": stand}


def cause_data(cause: Cause) -> Plain:
    """Return the reason for an event or a task."""
    return {"kind": cause.kind.value, "source": cause.source, "detail": cause.detail}


def why_data(why: Why) -> Plain:
    """Return why something has happened, or has not."""
    return {
        "happened": why.happened,
        "chain": [_occurrence_data(one) for one in why.chain],
        "lacks": [_lack_data(one) for one in why.lacks],
    }


def _occurrence_data(one: Occurrence) -> Plain:
    return {
        "kind": one.kind.value,
        "name": one.name,
        "sequence": one.sequence,
        "at": _time(one.at),
        "cause": cause_data(one.cause),
        "status": None if one.status is None else one.status.value,
        "ended_at": _time(one.ended_at),
        "error": one.error,
    }


def _lack_data(one: Lack) -> Plain:
    data = asdict(one) | {
        "kind": one.kind.value,
        "status": None if one.status is None else one.status.value,
    }
    return data | {name: _time(data[name]) for name in ("happened_at", "due_at")}


def _time(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat(timespec="microseconds")
