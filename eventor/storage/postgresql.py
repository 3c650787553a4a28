"""A store in a PostgreSQL database, in a schema of it, which many programs may share.

A transaction that writes to a run locks the row of that run first. So those of one run come one
after the other, as in SQLite, and each sees what the one before it has left; those of others go on
at the same time. Whether a transaction has been committed whose connection was lost in the middle
of that is asked of the database (postgresql.org, pg_xact_status). It is known there by its number,
which a server that has crashed meanwhile may give to another: so what it has written is looked for
too.

A connection may be dead, and its server not know. So who holds a run may be idle for a part of a
lease alone, and where a server is silent, another connection asks it what the first one waits for.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import time
import weakref
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy import BigInteger, create_engine, delete, event, func, insert, literal, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateSchema

from eventor.errors import OwnershipError, RecoveryError, StoreError
from eventor.storage import lease, schema
from eventor.storage.backend import Access

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
    from datetime import datetime

    from sqlalchemy import Connection, Engine, Select

    from eventor.storage.location import Location

T = TypeVar("T")

_OPEN_SECONDS = 10.0

_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 1.0
"""Seconds between two tries, of which each takes twice as long as the one before."""

_OLDEST = 130_000
"""The version from which on it tells what has become of a transaction, as libpq writes it."""

_LONGEST_IDLE_SECONDS = 3600.0
_LONGEST_LOCK_SECONDS = 5.0

_LOCK_PART = 3 / 4
"""The part of its patience for which who waits for a lock waits at most, to hear that it is one."""

_IDLE_PART = 1 / 4
"""The part of a lease for which an owner that holds its run may be idle; it tries for longer."""

_SHORTEST_IDLE_SECONDS = 0.5
_ASKING_IDLE_SECONDS = 1.0
"""The same, at least, and for who asks something of a run: its owner may have a short lease."""

_SILENT_PART = 1 / 3
"""The part of its patience after which who waits asks whether its connection is dead."""

_SHORTEST_SILENCE = 1.0
"""Seconds after which that is asked, at least."""

_SESSIONS = 16
"""How many of its sessions a program looks after when it connects anew."""

_HOSTS = {"host": "PGHOST", "hostaddr": "PGHOSTADDR"}
"""Parameters that may name several, with the variables that stand in for them (libpq)."""

_IN_THE_FUTURE = "22023"
"""What is said of a transaction's number that was never given, as it was forgotten in a crash."""

_READ_ONLY_SERVER = "25006"
"""What a server says that has become a replica (postgresql.org, Error Codes)."""

_TOO_LARGE = "54"
"""With what begins what is said of something that is beyond a limit, and stays so."""

_LOCKED = "55P03"

_HOLD = """SELECT pg_current_xact_id()::text AS number, clock_timestamp() AS now,
    set_config('idle_in_transaction_session_timeout', %(idle)s, true)
    FROM eventor_run WHERE run_id = %(run_id)s FOR NO KEY UPDATE"""
_NUMBER = """SELECT pg_current_xact_id()::text,
    set_config('idle_in_transaction_session_timeout', %(idle)s, true)"""
_STATUS = "SELECT pg_xact_status(%(number)s::xid8)"
_MAKE = """SELECT set_config('idle_in_transaction_session_timeout', %(idle)s, true),
    set_config('lock_timeout', %(lock)s, true)"""
_BE_ALONE = """SELECT pg_advisory_xact_lock(
    x'65766E74'::int, hashtext(coalesce(%(name)s, current_schema(), '')))"""
"""Under this lock tables are made; its numbers are the letters evnt, and one for the schema."""
_WHO_IS = """SELECT pid, application_name FROM pg_locks LEFT JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'advisory' AND granted AND objsubid = 2
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND classid::bigint = x'65766E74'::bigint
        AND objid::bigint = x'FFFFFFFF'::bigint
            & hashtext(coalesce(%(name)s, current_schema(), ''))"""
_NOW = "SELECT clock_timestamp()"
_SIZE = """SELECT coalesce(sum(pg_total_relation_size(to_regclass(name))), 0)
    FROM unnest(%(names)s::text[]) AS name"""
_SCHEMAS = "SELECT count(*) FROM pg_namespace WHERE nspname = %(name)s"
_MAY_USE = "SELECT has_schema_privilege(oid, 'USAGE') FROM pg_namespace WHERE nspname = %(name)s"
_SETTINGS = """SELECT set_config('TimeZone', 'UTC', false),
    set_config('DateStyle', 'ISO', false),
    set_config('extra_float_digits', '1', false),
    set_config('idle_in_transaction_session_timeout', %(idle)s, false),
    set_config('lock_timeout', %(lock)s, false),
    CASE WHEN current_setting('synchronous_commit') = 'off'
        THEN set_config('synchronous_commit', 'on', false) END"""
_SESSION = """SELECT pid, backend_start::text AS began FROM pg_stat_activity
    WHERE pid = pg_backend_pid() AND backend_start IS NOT NULL"""
_WAITS_FOR = """SELECT wait_event_type FROM pg_stat_activity
    WHERE pid = %(pid)s AND backend_start = %(began)s::timestamptz"""
_END = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    JOIN unnest(%(pids)s::int[], %(began)s::timestamptz[]) AS before (of_pid, began)
        ON pid = of_pid AND backend_start = began
    WHERE state = 'active' AND wait_event_type = 'Client'"""
"""Ends sessions that wait for the rest of what they were sent: for them nothing is ever too long.

None of them can be about to commit, since its program waits for an answer before it asks for that.
"""
_CLIENT = "Client"
"""What a session waits for whose server waits for its program (postgresql.org, Wait Events)."""


class PostgreSQLBackend:
    """See `backend.Backend`.

    Args:
        location: the database, and the schema.
        access: what it is opened for.
        lease_seconds: after what a run may be taken over, if this is to own one. For a part of it
            the lock on a run stays, too, of a program that has died in the middle of a transaction,
            and that the server cannot see.
    """

    shared = has_hosts = True

    def __init__(self, location: Location, access: Access, lease_seconds: float) -> None:
        self._location = location
        self._access = access
        self._last_try = lease.last_try(lease_seconds)
        idle = _LONGEST_IDLE_SECONDS
        if access is not Access.read:
            idle = min(lease_seconds, idle)
        self._seconds = {
            "idle": idle,
            "lock": min(_LONGEST_LOCK_SECONDS, lease.part_of(lease_seconds)),
        }
        held = min(idle, max(idle * _IDLE_PART, _SHORTEST_IDLE_SECONDS))
        if access is Access.attach:
            held = _ASKING_IDLE_SECONDS
        elif access is Access.prune:  # it holds runs that nobody owns, and may have much to name
            held = idle
        self._idle = {"idle": _milliseconds(held)}
        self.engine = _open_engine(
            location,
            lambda: self._patience,
            lambda: self._patience_to_connect,
            self._set,
        )
        self._lock_seconds = math.inf
        self._connection: Connection | None = None
        self._patience = self._patience_to_connect = _OPEN_SECONDS
        self._tries_again = False
        self._number: str | None = None
        self._proof: Callable[[], Select[Any]] | None = None

    def open(self) -> None:
        """Make sure that the schema has the tables of this version; a lost connection is lost."""
        until = lease.clock() + _OPEN_SECONDS
        if self._access.makes:
            self._write(self._add_tables, until)
        else:
            self._read(self._check_tables, until)
        self._tries_again = True

    def write(self, work: Callable[[Connection], T], until: float) -> T:
        """Do work in a transaction, again if a connection was lost before it was committed."""
        return self._retried(functools.partial(self._write, work), until)

    def read(self, work: Callable[[Connection], T], until: float) -> T:
        """Do work that writes nothing, again if a connection was lost."""
        return self._retried(functools.partial(self._read, work), until)

    @contextmanager
    def looking(self) -> Iterator[Connection]:
        """Give a connection in a transaction that sees one state of the database."""
        with self._connected(lease.clock() + _OPEN_SECONDS, reads=True) as connection:
            yield connection
            connection.commit()

    def hold(self, connection: Connection, run_id: int, _now: datetime) -> datetime:
        """Lock the row of a run, and return the time of the database."""
        held = connection.exec_driver_sql(_HOLD, {"run_id": run_id, **self._idle}).one_or_none()
        if held is None:
            return self.clock(connection, _now)
        self._number = held.number
        now: datetime = held.now
        return now

    def clock(self, connection: Connection, _now: datetime) -> datetime:
        """Return the time of the database."""
        now: datetime = connection.exec_driver_sql(_NOW).scalar_one()
        return now

    def prove(self, query: Callable[[], Select[Any]]) -> None:
        """Take note of what tells whether this transaction was committed."""
        self._proof = query

    def listed(self, numbers: Iterable[int]) -> Select[tuple[int]]:
        """Return a query for the numbers."""
        return select(func.unnest(literal(list(numbers), ARRAY(BigInteger))))

    def delete_results(self, connection: Connection, numbers: Collection[int]) -> None:
        """Delete results."""
        columns = schema.result.c
        connection.execute(delete(schema.result).where(columns.result_id.in_(self.listed(numbers))))

    def size(self) -> int:
        """Return how many bytes its tables take, with their indexes."""
        names = {"names": list(schema.metadata.tables)}
        return int(
            self._read(
                lambda connection: connection.exec_driver_sql(_SIZE, names).scalar_one(),
                lease.clock() + _OPEN_SECONDS,
            )
        )

    def shrink(self) -> None:
        """Do nothing: PostgreSQL uses the space again by itself (autovacuum)."""

    def close(self) -> None:
        """Close the connection."""
        self._discard()
        self.engine.dispose()

    def _write(self, work: Callable[[Connection], T], until: float) -> T:
        self._number = self._proof = None
        with self._connected(until) as connection:
            found = work(connection)
            number = self._number or connection.exec_driver_sql(_NUMBER, self._idle).scalar_one()
            try:
                connection.commit()
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                lost = error
            else:
                return found
        self._discard()
        if not self._has_committed(number, until):
            raise lost
        return found

    def _read(self, work: Callable[[Connection], T], until: float) -> T:
        with self._connected(until, reads=True) as connection:
            found = work(connection)
            connection.commit()
            return found

    def _has_committed(self, number: str, until: float) -> bool:
        """Tell what has become of a transaction of which the end was not heard."""
        while True:
            status = self.read(functools.partial(self._status, number), until)
            if status != "in progress":
                return status == "committed"
            if lease.clock() > until:
                raise StoreError(
                    f"the store {self._location} does not tell whether what it was given last is "
                    "recorded: the connection was lost, and that transaction has not ended yet"
                )
            time.sleep(_FIRST_PAUSE)

    def _status(self, number: str, connection: Connection) -> str | None:
        try:
            status: str | None = connection.exec_driver_sql(
                _STATUS, {"number": number}
            ).scalar_one()
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != _IN_THE_FUTURE:
                raise
            connection.rollback()
            return None
        if status == "committed" and self._proof is not None:
            return status if connection.execute(self._proof()).first() else None
        return status

    def _retried(self, once: Callable[[float], T], until: float) -> T:
        """Do what needs a connection, again after a while if that was lost, until it is too late.

        A program that was stopped meanwhile, or has slept, tries once more when it goes on.
        """
        pause = _FIRST_PAUSE
        held_up = False
        locked: DBAPIError | None = None
        while True:
            try:
                return once(until)
            except DBAPIError as error:
                now = lease.clock()
                if _is_locked(error):
                    locked = error
                elif not isinstance(error.orig, _SilentError):
                    locked = None
                if not _passes(error):
                    raise
                if now + pause > until:
                    if held_up or now < until + lease.LAST_TRY_SECONDS:
                        if locked is not None:
                            raise self._locked() from locked
                        raise
                    held_up, until = True, now + self._last_try
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _locked(self) -> OwnershipError:
        return OwnershipError(
            f"the run in the store {self._location} is locked by another program, which has been "
            "in the middle of a transaction for too long; if it is stopped or cut off, that is "
            "undone after a quarter of its lease, or within 10 s if it owns no run"
        )

    @contextmanager
    def _connected(self, until: float, *, reads: bool = False) -> Iterator[Connection]:
        """Give a connection, which begins a transaction by itself; after an error it is closed."""
        left = self._patience = max(0.0, until - lease.clock())
        self._patience_to_connect = _part_of(left) if self._tries_again else left
        try:
            if left < self._lock_seconds:  # it would not be heard what is waited for
                self._discard()
            if self._connection is None:
                self._connection = self.engine.connect()
            self._connection.execution_options(
                isolation_level="REPEATABLE READ" if reads else "READ COMMITTED",
                postgresql_readonly=reads,
            )
            yield self._connection
        except BaseException:
            self._discard()
            raise

    def _set(self) -> dict[str, float]:
        """Return how long transactions of a new connection may be idle, and may wait for a lock."""
        self._lock_seconds = min(self._seconds["lock"], self._patience * _LOCK_PART)
        return {**self._seconds, "lock": self._lock_seconds}

    def _discard(self) -> None:
        failed, self._connection = self._connection, None
        if failed is not None:
            # Not by a rollback, for which it would wait if the network is gone.
            with contextlib.suppress(DBAPIError):
                failed.invalidate()
            failed.close()

    def _add_tables(self, connection: Connection) -> None:
        """Make the tables of a store, unless they are there."""
        if not _has_tables(connection):
            self._check_needed(connection)
            is_there = self._be_alone(connection)
            if not _has_tables(connection):
                self._make_tables(connection, is_there)
                return
        self._check_version(connection)

    def _be_alone(self, connection: Connection) -> bool:
        """Wait for who makes the tables of this schema, if somebody does; tell whether it is there.

        The server looks at what that one has changed when a transaction first uses a table, as to
        tell this, and else goes by what it has known before.
        """
        name = {"name": self._location.schema}
        limits = {"idle": _OPEN_SECONDS * _IDLE_PART, "lock": _OPEN_SECONDS * _LOCK_PART}
        connection.rollback()
        connection.exec_driver_sql(
            _MAKE, {limit: _milliseconds(seconds) for limit, seconds in limits.items()}
        )
        try:
            connection.exec_driver_sql(_BE_ALONE, name)
        except DBAPIError as error:
            if not _is_locked(error):
                raise
            connection.rollback()
            holders = connection.exec_driver_sql(_WHO_IS, name)
            who = ", ".join(f"process {pid} of the server ({named!r})" for pid, named in holders)
            raise StoreError(
                f"the store {self._location} cannot be opened: another program holds the lock "
                f"under which its tables are made: {who or 'it has just ended'}"
            ) from error
        return bool(connection.exec_driver_sql(_SCHEMAS, name).scalar_one())

    def _make_tables(self, connection: Connection, is_there: bool) -> None:
        named = self._location.schema
        if named is not None and not is_there:  # else one would need a permission to do nothing
            connection.execute(CreateSchema(named))
        schema.metadata.create_all(connection, checkfirst=False)
        for statement in (*schema.indexes("postgresql"), *schema.views("postgresql")):
            connection.exec_driver_sql(statement)
        connection.execute(insert(schema.schema), {"version": schema.VERSION})

    def _check_tables(self, connection: Connection) -> None:
        if not _has_tables(connection):
            self._check_needed(connection)
        self._check_version(connection)

    def _check_needed(self, connection: Connection) -> None:
        name = {"name": self._location.schema}
        if connection.exec_driver_sql(_MAY_USE, name).scalar() is False:
            raise StoreError(
                f"the store {self._location} cannot be looked at: this user has not the right "
                "(USAGE) to its schema"
            )
        if self._access.value:
            raise RecoveryError(
                f"there is nothing to {self._access.value}: the store {self._location} is empty"
            )

    def _check_version(self, connection: Connection) -> None:
        found = connection.scalar(select(schema.schema.c.version))
        if found != schema.VERSION:
            raise StoreError(
                f"the store {self._location} has schema version {found!r}, and this eventor knows "
                f"version {schema.VERSION}; it is left as it is"
            )


class _SilentError(psycopg.OperationalError):
    """A server has not answered in time, which it may have meant to do."""


class _PatientConnection(psycopg.Connection[Any]):
    """A connection that is closed if its server is silent for longer than it may be, or it is dead.

    Attributes:
        patience: tells for how many seconds the server may be silent.
        is_dead: asks another connection whether this one is.
    """

    patience: Callable[[], float] = staticmethod(lambda: math.inf)
    is_dead: Callable[[], bool] = staticmethod(lambda: False)

    def wait(self, gen: Generator[Any, Any, T], *arguments: Any, **options: Any) -> T:
        """Wait for what psycopg does, as it does, but not for ever."""
        return super().wait(self._limited(gen), *arguments, **options)

    def _limited(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        try:
            waits_for = next(gen)
            heard_at = asked_at = lease.clock()
            while True:
                ready = yield waits_for
                if ready:
                    heard_at = asked_at = lease.clock()
                elif lease.clock() > heard_at + self.patience():
                    self.pgconn.finish()
                    raise _SilentError("the server has not answered in time")
                elif lease.clock() > asked_at + _part_of(self.patience()):
                    if self.is_dead():
                        self.pgconn.finish()
                        raise psycopg.OperationalError(
                            "the connection is dead, and the server is not"
                        )
                    asked_at = lease.clock()
                waits_for = gen.send(ready)
        except StopIteration as end:
            found: T = end.value
            return found


def _part_of(patience: float) -> float:
    return max(patience * _SILENT_PART, _SHORTEST_SILENCE)


def _is_dead(again: Callable[[], _PatientConnection], session: dict[str, Any] | None) -> bool:
    """Tell whether the server waits for a program that waits for it, or has ended the session.

    Where it is at work, however long, or cannot be asked, that is no.
    """
    if session is None:
        return False
    try:
        with contextlib.closing(again()) as connection:
            found = connection.execute(_WAITS_FOR, session).fetchone()
    except psycopg.Error:
        return False
    return found is None or found[0] == _CLIENT


_open: weakref.WeakSet[psycopg.Connection[Any]] = weakref.WeakSet()
"""The connections of this process."""


def _part() -> None:
    """Let a forked process hold no connection of its parent, whose end the server has to see."""
    connections = [connection for connection in _open if not connection.closed]
    if not connections:
        return
    nowhere = os.open(os.devnull, os.O_RDWR)
    for connection in connections:
        os.dup2(nowhere, connection.pgconn.socket, inheritable=False)
    os.close(nowhere)


os.register_at_fork(after_in_child=_part)


def _open_engine(
    location: Location,
    patience: Callable[[], float],
    patience_to_connect: Callable[[], float],
    seconds: Callable[[], Mapping[str, float]],
) -> Engine:
    """Return an engine for a location.

    Args:
        location: where it connects to.
        patience: for how many seconds a server may be silent before a connection is closed.
        patience_to_connect: and before that is open, all hosts of the location together.
        seconds: for how long a transaction may be idle, and may wait for a lock, from then on.
    """
    assert location.url is not None
    engine = create_engine(location.url, poolclass=NullPool, use_native_hstore=False)
    last: dict[str, Any] = {}
    before: deque[dict[str, Any]] = deque(maxlen=_SESSIONS)

    def connected(given: Any, named: dict[str, Any], seconds: float) -> _PatientConnection:
        # Each host has a timeout of its own, in whole seconds, from 2 on.
        how: dict[str, Any] = {
            "connect_timeout": max(2, math.ceil(seconds / _number_of_hosts(named))),
            "fallback_application_name": "eventor",
            **named,
            **last,
            "client_encoding": "utf8",
        }
        return _PatientConnection.connect(*given, **how)

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _record: Any, given: Any, named: dict[str, Any]) -> Any:
        connection = connected(given, named, patience_to_connect())
        connection.patience = patience
        try:
            _check_server(connection, location)
            settings = {name: _milliseconds(value) for name, value in seconds().items()}
            connection.execute(_SETTINGS, settings)
            session = connection.cursor(row_factory=dict_row).execute(_SESSION).fetchone()
            if before:
                pids, began = zip(*map(dict.values, before), strict=True)
                connection.execute(_END, {"pids": list(pids), "began": list(began)})
            if location.schema is not None:
                path = sql.Identifier(location.schema).as_string()
                connection.execute("SELECT set_config('search_path', %s, false)", (path,))
            connection.commit()
        except BaseException:
            connection.close()
            raise
        if session is not None:
            before.append(session)
        last.update(_last_first(named, connection))

        def again() -> _PatientConnection:
            seconds = _part_of(patience())
            another = connected(given, dict(named), seconds)
            another.patience = lambda: seconds
            return another

        connection.is_dead = functools.partial(_is_dead, again, session)
        _open.add(connection)
        return connection

    return engine


def _number_of_hosts(named: Mapping[str, Any]) -> int:
    lists = (str(named.get(name, os.environ.get(_HOSTS[name], ""))) for name in _HOSTS)
    return 1 + max(list_.count(",") for list_ in lists)


def _last_first(named: Mapping[str, Any], connection: _PatientConnection) -> dict[str, str]:
    """Return the lists of hosts with that of a connection first, as those before it may be silent.

    Only if it was chosen for what it is: another may be up, and refuse to write.
    """
    lists = {
        name: str(named[name]).split(",")
        for name in (*_HOSTS, "port")
        if "," in str(named.get(name, ""))
    }
    if named.get("target_session_attrs", "any") == "any" or not lists:
        return {}
    for index, row in enumerate(zip(*lists.values(), strict=True)):
        where = zip(lists, row, strict=True)
        if all(str(getattr(connection.info, name)) == given for name, given in where if given):
            return {name: ",".join([list_.pop(index), *list_]) for name, list_ in lists.items()}
    return {}


def _milliseconds(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


def _check_server(connection: _PatientConnection, location: Location) -> None:
    version = connection.info.server_version
    if version < _OLDEST:
        raise StoreError(
            f"the store {location} is on PostgreSQL {version // 10_000}; expected "
            f"{_OLDEST // 10_000} or later"
        )
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise StoreError(
            f"the store {location} is in a database of the encoding {encoding}; expected UTF8, "
            "since steps and sequences may have any name"
        )


def _has_tables(connection: Connection) -> bool:
    return bool(connection.scalar(select(func.to_regclass(schema.schema.name).is_not(None))))


def _is_locked(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlstate", None) == _LOCKED


def _passes(error: DBAPIError) -> bool:
    """Tell whether what has failed may go well if it is tried again."""
    state = getattr(error.orig, "sqlstate", None) or ""
    return (
        error.connection_invalidated
        or isinstance(error.orig, psycopg.OperationalError)
        or state == _READ_ONLY_SERVER
    ) and not state.startswith(_TOO_LARGE)
