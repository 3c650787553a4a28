"""The store: where it lives, its transactions, and what others than its owner do in it."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import case, func, insert, null, select, union_all
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from eventor.errors import RecoveryError, StoreChangedError, StoreError, UsageError
from eventor.storage import owner, schema, sqlite
from eventor.storage.rows import (
    RequestKind,
    Row,
    attempt_of,
    cause_of,
    is_skipped,
    of_sequence,
    owner_of,
    sequence_of,
    task_key,
    task_of,
    typed,
)
from eventor.types import (
    Attempt,
    Counts,
    RaisedEvent,
    Sequence,
    Task,
    TaskCounts,
    TaskStatus,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from datetime import datetime

    from sqlalchemy import Connection, Select

    from eventor.rules.plan import TaskKey
    from eventor.storage.owner import Owner

MEMORY = ":memory:"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a store lives: the path of a SQLite file, or memory only for None."""

    path: Path | None

    def __str__(self) -> str:
        return MEMORY if self.path is None else str(self.path)


def locate(store: str | os.PathLike[str]) -> Location:
    """Return where the store that a program named lives.

    Args:
        store: ':memory:', the path of a SQLite file, or an SQLAlchemy URL of one.

    Raises:
        StoreError: it is none of these.
    """
    if not isinstance(store, str | os.PathLike):
        raise StoreError(f"the store is {store!r}; expected a path, a URL or ':memory:'")
    place = os.fsdecode(store)
    if isinstance(store, str) and "://" in place:
        return _locate_url(place)
    if place == MEMORY:
        return Location(None)
    if not place or "\0" in place:
        raise StoreError(f"the store is {place!r}; expected a path, a URL or ':memory:'")
    try:
        return Location(Path(place).absolute())
    except OSError as error:
        raise StoreError(f"the store {place} is no place that can be known: {error}") from error


def _real(location: Location) -> Path | None:
    """Return the file of a store, through all links: SQLite keeps its log beside that.

    Raises:
        StoreError: the links lead in a circle.
    """
    try:
        return None if location.path is None else location.path.resolve()
    except (OSError, RuntimeError) as error:
        raise StoreError(f"the store {location} cannot be looked at: {error}") from error


def _locate_url(place: str) -> Location:
    try:
        url = make_url(place)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"the store is no URL that SQLAlchemy can read: {error}") from error
    if url.drivername not in ("sqlite", "sqlite+pysqlite") or url.query or url.host:
        raise StoreError(
            f"the store {url.render_as_string()} is of a kind that eventor cannot use; "
            "expected sqlite:///relative/path.db or sqlite:////absolute/path.db"
        )
    return locate(url.database or MEMORY)


class Access(Enum):
    """What a store is opened for; the value says what cannot be done without one that is there."""

    begin = ""
    recover = "recover"
    attach = "attach to"
    """To ask something of its runs. One of an earlier schema may have an owner of that schema, and
    is refused."""
    prune = "prune"
    """To delete runs of it. One of an earlier schema is refused, as for `attach`."""
    read = "look at"
    """Nothing is written, and it need not be writable."""


class Store:
    """An open store.

    Args:
        location: where it lives.
        access: what it is opened for.

    Raises:
        StoreError: it cannot be used; what is there is left as it was.
        RecoveryError: it has to exist, and there is none.
    """

    def __init__(self, location: Location, access: Access = Access.begin) -> None:
        self.location = location
        path = self._path = _real(location)
        if path is not None:
            sqlite.check_file(path, needed_to=access.value, to_write=access is not Access.read)
        elif access is not Access.begin:
            raise RecoveryError(
                f"there is nothing to {access.value}: a store in memory keeps no runs"
            )
        # One connection serves all threads of the program, one transaction after the other.
        self._lock = threading.RLock()
        self._holder: int | None = None
        self._looking: Connection | None = None
        self._keeps = access is not Access.read
        if path is None or self._keeps:
            self._engine = sqlite.open_engine(path)
        else:
            self._engine = sqlite.open_reader(path)
        self._connection: Connection | None = None
        self._identity: sqlite.Identity | None = None
        try:
            with self._translated("be opened"):
                self._open(access)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; what was committed stays."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._engine.dispose()

    def size(self) -> int:
        """Return how many bytes its file takes, with the log beside it."""
        if self._path is None:
            return 0
        files = (self._path, self._path.with_name(f"{self._path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def shrink(self) -> None:
        """Give the space of what was deleted back to the file system.

        Raises:
            StoreError: it could not be.
        """
        with self._lock, self._translated("give space back"):
            if self._path is not None:
                sqlite.shrink(self._path)

    def definition(self, run_id: int, recoveries: Collection[int] | None = None) -> Any:
        """Return the definition that a run, or some of its recoveries, recorded last, or None."""
        columns = schema.definition.c
        query = select(columns.definition).where(columns.run_id == run_id)
        if recoveries is not None:
            query = query.where(columns.recovery.in_(recoveries))
        query = query.order_by(columns.recovery.desc()).limit(1)
        with self.reading("read the definition") as connection:
            written = connection.scalar(query)
            return None if written is None else json.loads(written)

    def tasks(
        self,
        run_id: int,
        recovery: int,
        step: str | None,
        sequence: Sequence | None,
        status: TaskStatus | None,
        *,
        results: bool = True,
    ) -> list[Task]:
        """Return the tasks of a recovery in the order in which they became ready.

        Their results, which may be large, are left out where they are not wanted.
        """
        columns, kept = schema.task.c, schema.result.c
        query = select(schema.task, null().label("encoding"), null().label("data"))
        if results:
            query = select(schema.task, kept.encoding, kept.data).outerjoin(
                schema.result, columns.result_id == kept.result_id
            )
        query = (
            query.where(columns.run_id == run_id, columns.recovery == recovery)
            .where(*of_sequence(schema.task, sequence))
            .order_by(columns.task_id)
        )
        if step is not None:
            query = query.where(columns.step == step)
        if status is not None:
            query = query.where(columns.status == status.value)
        attempts = (
            select(schema.attempt)
            .where(schema.attempt.c.run_id == run_id, schema.attempt.c.recovery == recovery)
            .where(*of_sequence(schema.attempt, sequence))
            .order_by(schema.attempt.c.attempt)
        )
        with self.reading("read its tasks") as connection:
            earlier: dict[TaskKey, list[Attempt]] = {}
            for row in connection.execute(attempts):
                earlier.setdefault(task_key(row), []).append(attempt_of(row))
            return [
                task_of(row, earlier.get(task_key(row), [])) for row in connection.execute(query)
            ]

    def events(
        self, run_id: int, recovery: int, event: str | None, sequence: Sequence | None
    ) -> list[RaisedEvent]:
        """Return the events that a recovery has raised, in that order."""
        columns = schema.event.c
        query = (
            select(schema.event)
            .where(columns.run_id == run_id, columns.recovery == recovery)
            .where(*of_sequence(schema.event, sequence))
            .order_by(columns.event_id)
        )
        if event is not None:
            query = query.where(columns.event == event)
        with self.reading("read its events") as connection:
            return [
                RaisedEvent(row.event, sequence_of(row), row.recovery, row.raised_at, cause_of(row))
                for row in connection.execute(query)
            ]

    def count(self, run_id: int, recovery: int) -> Counts:
        """Return how many tasks of each step stand how, and how often each event was raised."""
        tasks, events = schema.task.c, schema.event.c
        status = case((is_skipped(), "skipped"), else_=tasks.status).label("status")
        query = union_all(
            select(tasks.step.label("name"), status, func.count().label("number"))
            .where(tasks.run_id == run_id, tasks.recovery == recovery)
            .group_by(tasks.step, status),
            select(events.event, null(), func.count())
            .where(events.run_id == run_id, events.recovery == recovery)
            .group_by(events.event),
        )
        steps: dict[str, dict[str, int]] = {}
        raised: dict[str, int] = {}
        with self.reading("count its tasks") as connection:
            for row in connection.execute(query):
                if row.status is None:
                    raised[row.name] = row.number
                else:
                    steps.setdefault(row.name, {})[row.status] = row.number
        return Counts({step: TaskCounts(**found) for step, found in steps.items()}, raised)

    def ask_to_trigger(
        self, run_id: int, event: str, sequence: Sequence, by: Owner, now: datetime
    ) -> bool:
        """Record that a process asks a run to raise an event; tell whether its owner lives."""
        with self.writing("record a trigger") as connection:
            latest = connection.execute(latest_recovery(run_id)).one()
            asked = {"event": event, **typed(sequence)}
            _insert_request(connection, latest, RequestKind.trigger, asked, by, now)
            return is_held(latest, now)

    def ask_to_stop(self, run_id: int, by: Owner, now: datetime) -> bool:
        """Record that a process asks the owner of a run to stop, if that lives; tell whether."""
        with self.writing("record a request to stop") as connection:
            latest = connection.execute(latest_recovery(run_id)).one()
            held = is_held(latest, now)
            if held:
                _insert_request(connection, latest, RequestKind.stop, {}, by, now)
            return held

    @contextmanager
    def writing(self, what: str) -> Iterator[Connection]:
        """Give a connection in a transaction that is committed at the end, or undone.

        Raises:
            StoreError: it could not be committed, or the file in which it was is not there.
        """
        with self._held(), self._translated(what):
            self._check_files()
            with self._transaction(writing=True) as connection:
                yield connection
            self._check_files()

    @contextmanager
    def reading(self, what: str) -> Iterator[Connection]:
        """Give a connection in a transaction that sees one state of the store.

        Raises:
            StoreError: it could not be read, or it is not the file that it was.
        """
        if self._looking is not None and self._holder == threading.get_ident():
            with self._translated(what):
                yield self._looking
            return
        with self._held(), self._translated(what), self._look() as connection:
            yield connection

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let all that is read meanwhile, in this thread, be of one state of the store.

        Raises:
            StoreChangedError: it was at rest, and was written meanwhile: what was read is of more
                than one state.
            StoreError: as for `reading`.
        """
        with self._held(), ExitStack() as stack:
            with self._translated("be looked at"):
                self._looking = stack.enter_context(self._look())
            stack.callback(self._look_no_more)
            yield

    def _look_no_more(self) -> None:
        self._looking = None

    @contextmanager
    def _look(self) -> Iterator[Connection]:
        if self._keeps or self._path is None:
            with self._transaction(writing=False) as connection:
                yield connection
            return
        # The file is opened anew each time.
        self._check_files()
        before = sqlite.at_rest(self._path)
        try:
            with self._transaction(writing=False) as connection:
                yield connection
        except (StoreError, SQLAlchemyError, sqlite3.Error) as error:
            self._check_rest(before, error)
            raise
        self._check_rest(before)
        self._check_files()

    def _check_rest(self, before: object, error: Exception | None = None) -> None:
        """Make sure that a file which was at rest still is what it was."""
        if before is not None and self._path is not None and sqlite.at_rest(self._path) != before:
            raise StoreChangedError(
                f"the store {self.location} was written while it was looked at; look again"
            ) from error

    def _open(self, access: Access) -> None:
        path = self._path
        if path is not None and access is Access.read:
            self._identity = sqlite.identify(path, to_write=False)
        if access in (Access.attach, Access.prune, Access.read):
            sqlite.check_tables(self._engine, path)
        if access is Access.read:
            return
        if path is not None:
            if not path.exists():
                sqlite.create(path)
            sqlite.enter_wal(path)
        if access in (Access.begin, Access.recover):
            sqlite.add_tables(self._engine)
        self._identity = None if path is None else sqlite.identify(path)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Be the only one who uses the connection.

        Raises:
            UsageError: this thread is in the middle of using it, as a signal handler finds it.
        """
        if self._holder == threading.get_ident():
            raise UsageError(
                f"the store {self.location} was asked for in the middle of a transaction, as by a "
                "signal handler; expected calls of stop() and trigger_event() alone there"
            )
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    @contextmanager
    def _transaction(self, *, writing: bool) -> Iterator[Connection]:
        if not self._keeps:
            with self._engine.connect() as connection, connection.begin():
                yield connection
            return
        if self._connection is None:
            self._connection = self._engine.connect()
        try:
            self._connection.execution_options(**{sqlite.WRITING: writing})
            with self._connection.begin():
                yield self._connection
        except BaseException:
            # One whose commit has failed may be in its transaction still.
            failed, self._connection = self._connection, None
            if failed is not None:
                failed.close()
            raise

    def _check_files(self) -> None:
        if self._path is None:
            return
        if sqlite.identify(self._path, to_write=self._keeps) != self._identity:
            which = "it, or the log beside it," if self._keeps else "it"
            raise FileNotFoundError(f"{which} was replaced while it was in use")

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise StoreError(
                f"the store {self.location} cannot {what}: "
                f"it holds something that eventor has not written: {error}"
            ) from error
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            cause = getattr(error, "orig", None) or error
            raise StoreError(f"the store {self.location} cannot {what}: {cause}") from error


def _insert_request(
    connection: Connection,
    latest: Row,
    kind: RequestKind,
    asked: Mapping[str, str],
    by: Owner,
    now: datetime,
) -> None:
    row = {
        "run_id": latest.run_id,
        "recovery": latest.recovery,
        "kind": kind.value,
        **asked,
        "made_at": now,
        "made_by_host": by.host,
        "made_by_pid": by.pid,
    }
    connection.execute(insert(schema.request), row)


def is_held(latest: Row, now: datetime) -> bool:
    """Tell whether the owner of the latest recovery of a run lives."""
    running = False if latest.owner_pid is None else owner.is_running(owner_of(latest))
    return owner.holds(running, latest.heartbeat_at, latest.lease_seconds or 0.0, now)


def latest_run(name: str) -> Select[Any]:
    """Return the query for the number of the latest run of that name."""
    return select(func.max(schema.run.c.run_id)).where(schema.run.c.name == name)


def latest_recovery(run_id: int) -> Select[Any]:
    """Return the query for the row of the latest recovery of a run."""
    columns = schema.recovery.c
    query = select(schema.recovery).where(columns.run_id == run_id)
    return query.order_by(columns.recovery.desc()).limit(1)


def say_names(connection: Connection) -> str:
    """Say which runs there are, for a message."""
    names = connection.scalars(select(schema.run.c.name).distinct().limit(5)).all()
    return f"it has runs named {', '.join(map(repr, names))}" if names else "it has no runs at all"
