"""The store: its transactions, and what others than its owner do in it."""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import case, func, insert, null, select, union_all
from sqlalchemy.exc import SQLAlchemyError

from eventor.errors import StoreError, UsageError
from eventor.storage import lease, owner, schema
from eventor.storage.backend import Access
from eventor.storage.rows import (
    RequestKind,
    Row,
    attempt_of,
    event_of,
    is_skipped,
    of_sequence,
    owner_of,
    task_key,
    task_of,
    typed,
)
from eventor.storage.sqlite_backend import SQLiteBackend
from eventor.types import (
    Attempt,
    Counts,
    RaisedEvent,
    Sequence,
    Task,
    TaskCounts,
    TaskStatus,
)
from eventor.words import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from datetime import datetime

    from sqlalchemy import CompoundSelect, Connection, Select

    from eventor.rules.plan import TaskKey
    from eventor.storage.backend import Backend
    from eventor.storage.location import Location
    from eventor.storage.owner import Owner

T = TypeVar("T")

_PATIENCE_SECONDS = 10.0
"""How long a lost connection is tried again, where no lease says for how long."""


class Store:
    """An open store.

    Args:
        location: where it lives.
        access: what it is opened for.
        lease_seconds: that of a run which is to be owned in it; others write for a moment alone.

    Attributes:
        location: as given.
        backend: what its kind of database does for it.

    Raises:
        StoreError: it cannot be used; what is there is left as it was.
        RecoveryError: it has to exist, and there is none.
    """

    def __init__(
        self,
        location: Location,
        access: Access = Access.begin,
        lease_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        self.location = location
        self.backend = _backend(location, access, lease_seconds)
        # One connection serves all threads of the program, one transaction after the other.
        self._lock = threading.RLock()
        self._holder: int | None = None
        self._looking: Connection | None = None
        try:
            with self._translated("be opened"):
                self.backend.open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; what was committed stays."""
        with self._lock:
            self.backend.close()

    def size(self) -> int:
        """Return how many bytes it takes.

        Raises:
            StoreError: that cannot be read.
        """
        with self._held(), self._translated("tell its size"):
            return self.backend.size()

    def shrink(self) -> None:
        """Give the space of what was deleted back to the file system.

        Raises:
            StoreError: it could not be.
        """
        with self._held(), self._translated("give space back"):
            self.backend.shrink()

    def definition(self, run_id: int, recoveries: Collection[int] | None = None) -> Any:
        """Return the definition that a run, or some of its recoveries, recorded last, or None."""
        columns = schema.definition.c
        query = select(columns.definition).where(columns.run_id == run_id)
        if recoveries is not None:
            query = query.where(columns.recovery.in_(recoveries))
        query = query.order_by(columns.recovery.desc()).limit(1)

        def work(connection: Connection) -> Any:
            written = connection.scalar(query)
            return None if written is None else json.loads(written)

        return self.read("read the definition", work)

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

        def work(connection: Connection) -> list[Task]:
            earlier: dict[TaskKey, list[Attempt]] = {}
            for row in connection.execute(attempts):
                earlier.setdefault(task_key(row), []).append(attempt_of(row))
            return [
                task_of(row, earlier.get(task_key(row), [])) for row in connection.execute(query)
            ]

        return self.read("read its tasks", work)

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
        return self.each("read its events", query, event_of)

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
        for name, stands, number in self.each("count its tasks", query, tuple):
            if stands is None:
                raised[name] = number
            else:
                steps.setdefault(name, {})[stands] = number
        return Counts({step: TaskCounts(**found) for step, found in steps.items()}, raised)

    def ask_to_trigger(
        self, run_id: int, event: str, sequence: Sequence, by: Owner, now: datetime
    ) -> bool:
        """Record that a process asks a run to raise an event; tell whether its owner lives."""

        def work(connection: Connection) -> bool:
            clock = self.backend.hold(connection, run_id, now)
            latest = connection.execute(latest_recovery(run_id)).one()
            asked = {"event": event, **typed(sequence)}
            self._insert_request(connection, latest, RequestKind.trigger, asked, by, now)
            return is_held(latest, clock)

        return self.write("record a trigger", work)

    def ask_to_stop(self, run_id: int, by: Owner, now: datetime) -> bool:
        """Record that a process asks the owner of a run to stop, if that lives; tell whether."""

        def work(connection: Connection) -> bool:
            clock = self.backend.hold(connection, run_id, now)
            latest = connection.execute(latest_recovery(run_id)).one()
            held = is_held(latest, clock)
            if held:
                self._insert_request(connection, latest, RequestKind.stop, {}, by, now)
            return held

        return self.write("record a request to stop", work)

    def _insert_request(
        self,
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
        columns = schema.request.c
        self.backend.prove(
            lambda: select(columns.request_id).where(
                *(columns[name] == value for name, value in row.items())
            )
        )

    def write(self, what: str, work: Callable[[Connection], T], until: float | None = None) -> T:
        """Do work in a transaction that is committed at its end, or undone.

        Args:
            what: what it is, for a message.
            work: what to do; where a connection was lost, it is done again from its beginning.
            until: until when that is tried, by `lease.clock`.

        Raises:
            StoreError: it could not be committed, or the file in which it was is not there.
        """
        with self._held(), self._translated(what):
            return self.backend.write(work, _patient(until))

    def read(self, what: str, work: Callable[[Connection], T], until: float | None = None) -> T:
        """Do work that writes nothing, in a transaction that sees one state of the store.

        Args:
            what: as in `write`.
            work: as in `write`.
            until: as in `write`.

        Raises:
            StoreError: it could not be read, or it is not the file that it was.
        """
        if self._looking is not None and self._holder == threading.get_ident():
            with self._translated(what):
                return work(self._looking)
        with self._held(), self._translated(what):
            return self.backend.read(work, _patient(until))

    def each(
        self,
        what: str,
        query: Select[Any] | CompoundSelect[Any],
        made: Callable[[Row], T],
        until: float | None = None,
    ) -> list[T]:
        """Return what is made of each row that a query finds; else as `read`."""
        return self.read(what, lambda connection: list(map(made, connection.execute(query))), until)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let all that is read meanwhile, in this thread, be of one state of the store.

        Raises:
            StoreChangedError: it was at rest, and was written meanwhile: what was read is of more
                than one state.
            StoreError: as for `read`.
        """
        with self._held(), ExitStack() as stack:
            with self._translated("be looked at"):
                self._looking = stack.enter_context(self.backend.looking())
            stack.callback(self._look_no_more)
            yield

    def _look_no_more(self) -> None:
        self._looking = None

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
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise StoreError(
                f"the store {self.location} cannot {what}: "
                f"it holds something that eventor has not written: {error}"
            ) from error
        except (SQLAlchemyError, sqlite3.Error, OSError) as error:
            # A server adds where in the statement it was.
            said, _, _ = str(getattr(error, "orig", None) or error).partition("\nLINE ")
            told = one_line(said)
            raise StoreError(f"the store {self.location} cannot {what}: {told}") from error


def _backend(location: Location, access: Access, lease_seconds: float) -> Backend:
    if location.url is None:
        return SQLiteBackend(location, access)
    try:
        from eventor.storage.postgresql import PostgreSQLBackend  # noqa: PLC0415 (few have psycopg)
    except ImportError as error:
        raise StoreError(
            f"the store {location} needs psycopg: pip install 'eventor[postgresql]' ({error})"
        ) from error
    return PostgreSQLBackend(location, access, lease_seconds)


def _patient(until: float | None) -> float:
    return lease.clock() + _PATIENCE_SECONDS if until is None else until


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
