"""The tables of the store. They are meant to be read by people and by other tools.

Statuses, causes and sequence types are words; times are in UTC; names stand where a reader would
look for them. A task and an event are found by run, recovery, name, and the typed sequence.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeDecorator

if TYPE_CHECKING:
    from typing import Any

    from sqlalchemy.engine import Dialect
    from sqlalchemy.types import TypeEngine

VERSION = 5
"""The version of this schema, recorded in the store."""

_TASK_VIEW = """CREATE VIEW eventor_v_task AS SELECT
    eventor_run.name AS run,
    eventor_task.run_id,
    eventor_task.recovery,
    step,
    sequence,
    status,
    replay,
    attempt,
    ready_at,
    started_at,
    eventor_task.ended_at,
    {waited} AS waited_seconds,
    {seconds} AS seconds,
    due_at,
    pid,
    error,
    traceback,
    stdout,
    stderr,
    cause_kind || coalesce(' ' || cause_source, '') || coalesce(' (' || cause_detail || ')', '')
        AS cause,
    sequence_type,
    task_id
FROM eventor_task JOIN eventor_run ON eventor_run.run_id = eventor_task.run_id"""

_RUN_VIEW = """CREATE VIEW eventor_v_run AS SELECT
    eventor_run.name AS run,
    eventor_run.run_id,
    recovery,
    program,
    eventor_recovery.began_at,
    ended_at,
    {lasted} AS seconds,
    coalesce(ready, 0) AS ready,
    coalesce(active, 0) AS active,
    coalesce(success, 0) AS success,
    coalesce(failure, 0) AS failure,
    coalesce(skipped, 0) AS skipped,
    based_on,
    owner_host || ':' || owner_pid AS owner
FROM eventor_recovery
JOIN eventor_run ON eventor_run.run_id = eventor_recovery.run_id
LEFT JOIN (
    SELECT
        run_id AS of_run_id,
        recovery AS of_recovery,
        count(CASE WHEN status = 'ready' THEN 1 END) AS ready,
        count(CASE WHEN status = 'active' THEN 1 END) AS active,
        count(CASE WHEN status = 'success' AND coalesce(replay, '') <> 'skip' THEN 1 END)
            AS success,
        count(CASE WHEN status = 'failure' THEN 1 END) AS failure,
        count(CASE WHEN status = 'success' AND replay = 'skip' THEN 1 END) AS skipped
    FROM eventor_task GROUP BY run_id, recovery
) AS counted ON of_run_id = eventor_recovery.run_id AND of_recovery = recovery"""

_SECONDS = {
    "sqlite": "round((julianday({end}) - julianday({begin})) * 86400, 3)",
    "postgresql": "round(extract(epoch FROM {end} - {begin})::numeric, 3)::float8",
}
"""How many seconds have passed between two times, as each kind of database tells it."""


# Written out, for SQLAlchemy would load each kind of database to know of an index of some rows.
_WAITING_INDEX = """CREATE INDEX eventor_request_waiting ON eventor_request (run_id)
    WHERE taken_at IS NULL"""
"""Of requests that wait, so that a look at them costs the same however many there have been."""

_RESULT_INDEX = """CREATE INDEX eventor_task_result ON eventor_task (result_id)
    WHERE result_id IS NOT NULL"""
"""By it PostgreSQL sees that no task refers to a result which is deleted. For that, SQLite makes an
index of its own, which nobody who uses the same file notices."""


def indexes(kind: str) -> list[str]:
    """Return the statements that make the indexes of some rows alone.

    Args:
        kind: of the database: *sqlite* or *postgresql*.
    """
    return [_WAITING_INDEX, _RESULT_INDEX] if kind == "postgresql" else [_WAITING_INDEX]


def views(kind: str) -> list[str]:
    """Return the statements that make the views, whose columns other tools may rely on.

    Args:
        kind: of the database: *sqlite* or *postgresql*.
    """

    def between(begin: str, end: str) -> str:
        return _SECONDS[kind].format(begin=begin, end=end)

    return [
        _TASK_VIEW.format(
            waited=between("ready_at", "started_at"),
            seconds=between("started_at", "eventor_task.ended_at"),
        ),
        _RUN_VIEW.format(lasted=between("eventor_recovery.began_at", "ended_at")),
    ]


MIGRATIONS = {
    1: (
        "ALTER TABLE eventor_recovery ADD COLUMN keeper_pid INTEGER",
        "ALTER TABLE eventor_recovery ADD COLUMN keeper_began TEXT",
    ),
    2: (
        """CREATE TABLE eventor_definition (
            run_id INTEGER NOT NULL,
            recovery INTEGER NOT NULL,
            definition TEXT NOT NULL,
            PRIMARY KEY (run_id, recovery),
            FOREIGN KEY(run_id, recovery) REFERENCES eventor_recovery (run_id, recovery)
        )""",
        """INSERT INTO eventor_definition SELECT run_id, recovery, definition
            FROM eventor_recovery WHERE definition IS NOT NULL""",
        "ALTER TABLE eventor_recovery DROP COLUMN definition",
    ),
    3: (
        "ALTER TABLE eventor_task ADD COLUMN due_at DATETIME",
        "ALTER TABLE eventor_task ADD COLUMN stdout TEXT",
        "ALTER TABLE eventor_task ADD COLUMN stderr TEXT",
        """CREATE TABLE eventor_attempt (
            attempt_id INTEGER NOT NULL,
            run_id INTEGER NOT NULL,
            recovery INTEGER NOT NULL,
            step TEXT NOT NULL,
            sequence TEXT NOT NULL,
            sequence_type TEXT NOT NULL,
            attempt INTEGER NOT NULL,
            status TEXT NOT NULL,
            pid INTEGER,
            started_at DATETIME,
            ended_at DATETIME,
            error TEXT,
            traceback TEXT,
            stdout TEXT,
            stderr TEXT,
            PRIMARY KEY (attempt_id),
            UNIQUE (run_id, recovery, step, sequence, sequence_type, attempt),
            FOREIGN KEY(run_id, recovery) REFERENCES eventor_recovery (run_id, recovery)
        )""",
        """CREATE TABLE eventor_delay (
            run_id INTEGER NOT NULL,
            recovery INTEGER NOT NULL,
            event TEXT NOT NULL,
            sequence TEXT NOT NULL,
            sequence_type TEXT NOT NULL,
            seconds FLOAT NOT NULL,
            due_at DATETIME NOT NULL,
            PRIMARY KEY (run_id, recovery, event, sequence, sequence_type, seconds),
            FOREIGN KEY(run_id, recovery) REFERENCES eventor_recovery (run_id, recovery)
        )""",
        """CREATE TABLE eventor_request (
            request_id INTEGER NOT NULL,
            run_id INTEGER NOT NULL,
            recovery INTEGER NOT NULL,
            kind TEXT NOT NULL,
            event TEXT,
            sequence TEXT,
            sequence_type TEXT,
            made_at DATETIME NOT NULL,
            made_by_host TEXT NOT NULL,
            made_by_pid INTEGER NOT NULL,
            taken_at DATETIME,
            taken_in INTEGER,
            answer TEXT,
            PRIMARY KEY (request_id),
            FOREIGN KEY(run_id, recovery) REFERENCES eventor_recovery (run_id, recovery)
        )""",
        _WAITING_INDEX,
    ),
    4: (
        "ALTER TABLE eventor_recovery ADD COLUMN program TEXT",
        "ALTER TABLE eventor_recovery ADD COLUMN ended_at DATETIME",
        *views("sqlite"),
    ),
}
"""For an earlier version, the statements that make the next one of it, in SQLite.

There have been stores in PostgreSQL since version 5.
"""


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime, in UTC; SQLite keeps it without its zone."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the type of the column."""
        return dialect.type_descriptor(DateTime(timezone=dialect.name == "postgresql"))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return what the database keeps."""
        if value is None or dialect.name == "postgresql":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: object, _dialect: Dialect) -> datetime | None:
        """Return what a program sees."""
        if value is None:
            return None
        if not isinstance(value, datetime):  # somebody has changed the column
            raise TypeError(f"{value!r} is no time")
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


Number = Integer().with_variant(BigInteger(), "postgresql")
"""The number of a row; SQLite has but one kind of integers."""

metadata = MetaData()

schema = Table(
    "eventor_schema",
    metadata,
    Column("version", Integer, primary_key=True),
)

run = Table(
    "eventor_run",
    metadata,
    Column("run_id", Number, primary_key=True),
    Column("name", Text, nullable=False, index=True),
    Column("began_at", UtcDateTime, nullable=False),
    sqlite_autoincrement=True,  # the number of a run that was pruned is not given again
)

recovery = Table(
    "eventor_recovery",
    metadata,
    Column("run_id", ForeignKey(run.c.run_id), primary_key=True),
    Column("recovery", Integer, primary_key=True, autoincrement=False),
    Column("based_on", Integer),
    Column("began_at", UtcDateTime, nullable=False),
    Column("owner_host", Text),
    Column("owner_pid", Integer),
    Column("owner_began", Text),
    Column("lease_seconds", Float),
    Column("heartbeat_at", UtcDateTime),
    Column("keeper_pid", Integer),
    Column("keeper_began", Text),
    Column("program", Text),
    Column("ended_at", UtcDateTime),
)

# Apart from the recovery, whose row is written anew by each transaction, however long it is.
definition = Table(
    "eventor_definition",
    metadata,
    Column("run_id", Number, primary_key=True, autoincrement=False),
    Column("recovery", Integer, primary_key=True, autoincrement=False),
    Column("definition", Text, nullable=False),
    ForeignKeyConstraint(["run_id", "recovery"], [recovery.c.run_id, recovery.c.recovery]),
)

result = Table(
    "eventor_result",
    metadata,
    Column("result_id", Number, primary_key=True),
    Column("encoding", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
)


def _cause() -> tuple[Column[str], Column[str], Column[str]]:
    return (
        Column("cause_kind", Text, nullable=False),
        Column("cause_source", Text),
        Column("cause_detail", Text),
    )


event = Table(
    "eventor_event",
    metadata,
    Column("event_id", Number, primary_key=True),
    Column("run_id", Number, nullable=False),
    Column("recovery", Integer, nullable=False),
    Column("event", Text, nullable=False),
    Column("sequence", Text, nullable=False),
    Column("sequence_type", Text, nullable=False),
    Column("raised_at", UtcDateTime, nullable=False),
    *_cause(),
    UniqueConstraint("run_id", "recovery", "event", "sequence", "sequence_type"),
    ForeignKeyConstraint(["run_id", "recovery"], [recovery.c.run_id, recovery.c.recovery]),
)

task = Table(
    "eventor_task",
    metadata,
    Column("task_id", Number, primary_key=True),
    Column("run_id", Number, nullable=False),
    Column("recovery", Integer, nullable=False),
    Column("step", Text, nullable=False),
    Column("sequence", Text, nullable=False),
    Column("sequence_type", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("replay", Text),
    Column("attempt", Integer, nullable=False),
    Column("pid", Integer),
    Column("ready_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Column("due_at", UtcDateTime),
    Column("result_id", ForeignKey(result.c.result_id)),
    Column("error", Text),
    Column("traceback", Text),
    Column("stdout", Text),
    Column("stderr", Text),
    *_cause(),
    UniqueConstraint("run_id", "recovery", "step", "sequence", "sequence_type"),
    ForeignKeyConstraint(["run_id", "recovery"], [recovery.c.run_id, recovery.c.recovery]),
)

# The attempts at a task that came before the one that its own row tells of.
attempt = Table(
    "eventor_attempt",
    metadata,
    Column("attempt_id", Number, primary_key=True),
    Column("run_id", Number, nullable=False),
    Column("recovery", Integer, nullable=False),
    Column("step", Text, nullable=False),
    Column("sequence", Text, nullable=False),
    Column("sequence_type", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("status", Text, nullable=False),
    Column("pid", Integer),
    Column("started_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Column("error", Text),
    Column("traceback", Text),
    Column("stdout", Text),
    Column("stderr", Text),
    UniqueConstraint("run_id", "recovery", "step", "sequence", "sequence_type", "attempt"),
    ForeignKeyConstraint(["run_id", "recovery"], [recovery.c.run_id, recovery.c.recovery]),
)

# When the delayed associations of an event act, in a sequence.
delay = Table(
    "eventor_delay",
    metadata,
    Column("run_id", Number, primary_key=True, autoincrement=False),
    Column("recovery", Integer, primary_key=True, autoincrement=False),
    Column("event", Text, primary_key=True),
    Column("sequence", Text, primary_key=True),
    Column("sequence_type", Text, primary_key=True),
    Column("seconds", Float, primary_key=True),
    Column("due_at", UtcDateTime, nullable=False),
    ForeignKeyConstraint(["run_id", "recovery"], [recovery.c.run_id, recovery.c.recovery]),
)

# What other processes ask of a run, and what became of it in the recovery that took it up.
request = Table(
    "eventor_request",
    metadata,
    Column("request_id", Number, primary_key=True),
    Column("run_id", Number, nullable=False),
    Column("recovery", Integer, nullable=False),
    Column("kind", Text, nullable=False),
    Column("event", Text),
    Column("sequence", Text),
    Column("sequence_type", Text),
    Column("made_at", UtcDateTime, nullable=False),
    Column("made_by_host", Text, nullable=False),
    Column("made_by_pid", Integer, nullable=False),
    Column("taken_at", UtcDateTime),
    Column("taken_in", Integer),
    Column("answer", Text),
    ForeignKeyConstraint(["run_id", "recovery"], [recovery.c.run_id, recovery.c.recovery]),
)
