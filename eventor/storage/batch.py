"""What one pass of the loop writes: its changes, gathered so that each kind is one statement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, exists, func, insert, literal_column, null, select, update

from eventor.rules.plan import (
    Delayed,
    EventRaised,
    Left,
    TaskActive,
    TaskEnded,
    TaskInterrupted,
    TaskKey,
    TaskLaunched,
    TaskReady,
    TaskRetried,
    TaskSkipped,
    TaskWithdrawn,
)
from eventor.storage import schema
from eventor.storage.rows import cause_columns, typed
from eventor.types import Cause, StepReplay, StoredResult, TaskStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from sqlalchemy import (
        BindParameter,
        Column,
        ColumnElement,
        Connection,
        Dialect,
        Insert,
        Select,
        Table,
        Update,
    )

    from eventor.rules.plan import Change

_WHICH = ("run_id", "recovery", "step", "sequence", "sequence_type")

_RENEWED = ("heartbeat_at", "keeper_pid", "keeper_began")

_NOT_STARTED = {"started_at": null(), "pid": null()}
"""What a task that is ready again tells no more: its earlier attempt does."""

ACTIVE = TaskStatus.active.value

_CHANGES_AT_ONCE = 1_000
"""How many changes are gathered before they are written, so that memory does not grow with them."""

_TOLD_OF_AN_END = ("status", "ended_at", "error", "traceback", "stdout", "stderr")


class Texts:
    """What is written most, as text for the driver.

    SQLAlchemy's own way from a statement to the driver costs more than SQLite's to the disk.
    """

    def __init__(self, dialect: Dialect) -> None:
        def text(statement: Insert | Select[Any] | Update, columns: Iterable[str] = ()) -> str:
            return str(statement.compile(dialect=dialect, column_keys=list(columns) or None))

        numbers = ("event_id", "task_id")
        self.event = text(
            insert(schema.event).inline(), (c.name for c in schema.event.c if c.name not in numbers)
        )
        later_known = (*numbers, "pid", *_TOLD_OF_AN_END[2:])
        self.task = text(
            insert(schema.task).inline(),
            (c.name for c in schema.task.c if c.name not in later_known),
        )
        self.started = text(_update_task("status", "started_at", "attempt").values(due_at=null()))
        self.launched = text(_update_task("pid"))
        ended = _update_task(*_TOLD_OF_AN_END, "result_id")
        known_pid = func.coalesce(_new(schema.task.c.pid), schema.task.c.pid)
        self.ended = text(ended.values(pid=known_pid))
        self.delayed = text(insert(schema.delay).inline())
        self.again = text(_update_task("status", "due_at").values(_NOT_STARTED))
        self.withdrawn = text(_update_task("status", "attempt").values(_NOT_STARTED))
        told = {name: _new(schema.attempt.c[name]) for name in _TOLD_OF_AN_END}
        self.attempted = text(_keep_attempts(schema.task, pid=known_pid, **told))
        here = _new(schema.attempt.c.recovery)
        active = schema.task.c.status == literal_column(f"'{ACTIVE}'")
        left = _keep_attempts(schema.task, active, recovery=here)
        self.copied = (text(_keep_attempts(schema.attempt, recovery=here)), text(left))
        self.renew = text(_renewal())
        self.waiting = text(_waiting())
        self._time = schema.UtcDateTime().dialect_impl(dialect).bind_processor(dialect)

    def time(self, moment: datetime) -> Any:
        """Return a time as this database keeps it."""
        return moment if self._time is None else self._time(moment)


_known_texts: dict[str, Texts] = {}


def texts_of(dialect: Dialect) -> Texts:
    """Return the texts for a kind of database, which are made once in a program."""
    if dialect.name not in _known_texts:
        _known_texts[dialect.name] = Texts(dialect)
    return _known_texts[dialect.name]


class Batch:
    """The rows of one pass, gathered so that each kind is one statement for many of them."""

    def __init__(self, connection: Connection, here: dict[str, Any], now: datetime) -> None:
        self._connection = connection
        self._texts = texts_of(connection.dialect)
        self._here = here
        self._at = now
        self._now = self._texts.time(now)
        self._count = 0
        self._events: list[dict[str, Any]] = []
        self._created: dict[TaskKey, dict[str, Any]] = {}
        self._started: list[dict[str, Any]] = []
        self._pids: dict[TaskKey, int] = {}
        self._ended: list[dict[str, Any]] = []
        # What follows is rare.
        self._delayed: list[dict[str, Any]] = []
        self._copied: list[dict[str, Any]] = []
        self._attempted: list[dict[str, Any]] = []
        self._again: list[dict[str, Any]] = []
        self._withdrawn: list[dict[str, Any]] = []

    def add(self, change: Change) -> None:
        """Take up a change."""
        if isinstance(change, EventRaised):
            self._events.append(
                {
                    **self._here,
                    "event": change.event,
                    **typed(change.sequence),
                    "raised_at": self._now,
                    **cause_columns(change.cause),
                }
            )
        elif isinstance(change, TaskReady):
            replay = None if change.replay is None else change.replay.value
            self._create(change.task, change.cause, TaskStatus.ready, replay)
            if change.left is not None:
                self._count_earlier(change.task, change.left)
        elif isinstance(change, TaskSkipped):
            self._create(change.task, change.cause, TaskStatus.success, StepReplay.skip.value)
            self._created[change.task] |= {"ended_at": self._now, "result_id": change.result}
        elif isinstance(change, TaskActive):
            created = self._created.get(change.task)
            if created is not None:
                created.update(
                    status=ACTIVE, started_at=self._now, attempt=change.attempt, due_at=None
                )
            else:
                row = self._which(change.task)
                row.update(new_status=ACTIVE, new_started_at=self._now, new_attempt=change.attempt)
                self._started.append(row)
        elif isinstance(change, TaskLaunched):
            self._pids[change.task] = change.pid
        elif isinstance(change, TaskEnded):
            row = self._end(change)
            row["new_result_id"] = self._keep(change.outcome.stored)
            self._ended.append(row)
        else:
            self._add_rare(change)
        self._count += 1
        if self._count >= _CHANGES_AT_ONCE:
            self.write()

    def _add_rare(self, change: Delayed | TaskRetried | TaskWithdrawn | TaskInterrupted) -> None:
        if isinstance(change, TaskRetried):
            self._attempted.append(self._end(change))
            self._be_ready(change.task, change.due)
        elif isinstance(change, TaskWithdrawn):
            self._pids.pop(change.task, None)
            row = {"new_status": TaskStatus.ready.value, "new_attempt": change.attempt}
            self._withdrawn.append(self._which(change.task) | row)
        elif isinstance(change, TaskInterrupted):
            self._interrupt(change)
        else:
            event, sequence, seconds = change.wait
            row = {"event": event, **typed(sequence), "seconds": seconds}
            due = {"due_at": self._texts.time(change.due)}
            self._delayed.append(self._here | row | due)

    def write(self) -> None:
        """Write what was taken up."""
        self._insert(self._texts.event, self._events)
        self._insert(self._texts.task, list(self._created.values()))
        self._insert(self._texts.delayed, self._delayed)
        for text in self._texts.copied:
            self._insert(text, self._copied)
        self._insert(self._texts.attempted, self._attempted)
        self._update(self._texts.again, self._again)
        self._update(self._texts.withdrawn, self._withdrawn)
        self._update(self._texts.started, self._started)
        launched = [self._which(task) | {"new_pid": pid} for task, pid in self._pids.items()]
        self._update(self._texts.launched, launched)
        self._update(self._texts.ended, self._ended)
        self._count = 0
        self._events, self._created, self._pids = [], {}, {}
        self._started, self._ended = [], []
        self._delayed, self._copied, self._attempted = [], [], []
        self._again, self._withdrawn = [], []

    def _insert(self, text: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            self._connection.exec_driver_sql(text, rows)

    def _update(self, text: str, rows: list[dict[str, Any]]) -> None:
        if rows and self._connection.exec_driver_sql(text, rows).rowcount < len(rows):
            raise ValueError("a task that was recorded is not there any more")

    def _keep(self, stored: StoredResult | None) -> int | None:
        if stored is None:
            return None
        row = {"encoding": stored.encoding, "data": stored.data}
        return insert_row(self._connection, schema.result, row)

    def _create(self, task: TaskKey, cause: Cause, status: TaskStatus, replay: str | None) -> None:
        self._created[task] = {
            **self._here,
            "step": task.step,
            **typed(task.sequence),
            "status": status.value,
            "replay": replay,
            "attempt": 0,
            "due_at": None,
            "ready_at": self._now,
            "started_at": None,
            "ended_at": None,
            "result_id": None,
            **cause_columns(cause),
        }

    def _end(self, change: TaskEnded | TaskRetried) -> dict[str, Any]:
        row = self._which(change.task)
        row.update(
            new_status=change.outcome.status.value,
            new_ended_at=self._now,
            new_error=change.outcome.error,
            new_traceback=change.outcome.traceback,
            new_stdout=change.outcome.stdout,
            new_stderr=change.outcome.stderr,
            new_pid=self._pids.pop(change.task, None),
        )
        return row

    def _be_ready(self, task: TaskKey, due: datetime | None) -> None:
        when = None if due is None else self._texts.time(due)
        row = {"new_status": TaskStatus.ready.value, "new_due_at": when}
        self._again.append(self._which(task) | row)

    def _count_earlier(self, task: TaskKey, left: Left) -> None:
        """Go on with the attempts that an earlier recovery had at a task."""
        due = left.due if left.status is TaskStatus.ready else None
        self._created[task].update(
            attempt=left.attempt, due_at=None if due is None else self._texts.time(due)
        )
        here = {"of_recovery": left.recovery, "new_recovery": self._here["recovery"]}
        self._copied.append(self._which(task) | here)

    def _interrupt(self, change: TaskInterrupted) -> None:
        which = self._which(change.task)
        replayed: dict[str, Any] = {"replay": change.replay.value}
        if change.replay is StepReplay.skip:
            replayed |= {"status": TaskStatus.success.value, "ended_at": self._at}
        else:
            told = dict.fromkeys([f"new_{name}" for name in _TOLD_OF_AN_END])
            self._attempted.append(which | told | {"new_status": ACTIVE, "new_pid": None})
            self._be_ready(change.task, None)
        self._connection.execute(_update_task().values(replayed), which)

    def _which(self, task: TaskKey) -> dict[str, Any]:
        return {
            "of_run_id": self._here["run_id"],
            "of_recovery": self._here["recovery"],
            "of_step": task.step,
            "of_sequence": str(task.sequence),
            "of_sequence_type": type(task.sequence).__name__,
        }


def _update_task(*names: str) -> Update:
    columns = schema.task.c
    return (
        update(schema.task)
        .where(*(columns[name] == bindparam(f"of_{name}") for name in _WHICH))
        .values({name: bindparam(f"new_{name}") for name in names})
    )


def _new(column: Column[Any]) -> BindParameter[Any]:
    """Return the parameter for a new value of a column, where the statement does not tell whose."""
    return bindparam(f"new_{column.name}", type_=column.type)


def _keep_attempts(source: Table, *where: ColumnElement[bool], **changed: Any) -> Insert:
    """Return what keeps as attempts what the rows of a task in `source` tell, with some changed."""
    names = (*_WHICH, "attempt", "pid", "started_at", *_TOLD_OF_AN_END)
    rows = select(*(changed.get(name, source.c[name]) for name in names)).where(
        *(source.c[name] == bindparam(f"of_{name}") for name in _WHICH), *where
    )
    return insert(schema.attempt).inline().from_select(names, rows)


def _renewal() -> Update:
    columns, later = schema.recovery.c, schema.recovery.alias("later")
    return (
        update(schema.recovery)
        .where(
            columns.run_id == bindparam("of_run_id"),
            columns.recovery == bindparam("of_recovery"),
            columns.owner_began == bindparam("of_owner_began"),
            ~exists().where(
                later.c.run_id == bindparam("of_run_id"),
                later.c.recovery > bindparam("of_recovery"),
            ),
        )
        .values({name: bindparam(f"new_{name}") for name in _RENEWED})
    )


def _waiting() -> Select[Any]:
    columns = schema.request.c
    return (
        select(schema.request)
        .where(columns.run_id == bindparam("of_run_id"), columns.taken_at.is_(None))
        .order_by(columns.request_id)
    )


def insert_row(connection: Connection, table: Table, row: Mapping[str, Any]) -> int:
    """Insert a row into a table that numbers its rows, and return its number."""
    number: int = connection.execute(insert(table), row).inserted_primary_key[0]  # type: ignore[index, unused-ignore]
    return number
