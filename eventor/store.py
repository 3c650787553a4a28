"""The store: every transaction of eventor, and nothing of its rules.

A `Store` opens a place; its `begin_run` or `begin_recovery` gives a `Ledger`, in which one
recovery of one run is written down and read back.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sqlite3
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal_column,
    null,
    select,
    update,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from eventor import owner, schema, sqlite
from eventor.errors import OwnershipError, RecoveryError, StoreError
from eventor.owner import Owner
from eventor.plan import (
    Delayed,
    EventRaised,
    Left,
    Standing,
    TaskActive,
    TaskEnded,
    TaskInterrupted,
    TaskKey,
    TaskLaunched,
    TaskReady,
    TaskRetried,
    TaskSkipped,
    Trigger,
    Wait,
)
from eventor.types import (
    Attempt,
    Cause,
    CauseKind,
    OwnerStatus,
    RaisedEvent,
    Recovery,
    Run,
    Sequence,
    StepReplay,
    StoredResult,
    Task,
    TaskStatus,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
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

    from eventor.plan import Change

MEMORY = ":memory:"

_FROM_OUTSIDE = (CauseKind.call, CauseKind.step, CauseKind.process)


@dataclass(frozen=True, slots=True)
class Location:
    """Where a store lives: the path of a SQLite file, or memory only for None."""

    path: Path | None

    def __str__(self) -> str:
        return MEMORY if self.path is None else str(self.path)


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


class Store:
    """An open store.

    Args:
        location: where it lives.
        must_exist: whether it is an error that there is none yet.
        attaching: whether it has to exist, and one of an earlier schema is refused, for a run in
            it may have an owner of that schema.

    Raises:
        StoreError: it cannot be used; what is there is left as it was.
        RecoveryError: it has to exist, and there is none.
    """

    def __init__(
        self, location: Location, *, must_exist: bool = False, attaching: bool = False
    ) -> None:
        self.location = location
        needed_to = "attach to" if attaching else "recover" if must_exist else ""
        path = self._path = _real(location)
        if path is not None:
            sqlite.check_file(path, needed_to=needed_to)
        elif needed_to:
            raise RecoveryError(f"there is nothing to {needed_to}: a store in memory keeps no runs")
        # One connection serves all threads of the program, one transaction after the other.
        self._lock = threading.RLock()
        self._engine = sqlite.open_engine(path)
        self._connection: Connection | None = None
        self._identity: sqlite.Identity | None = None
        try:
            with self._translated("be opened"):
                if attaching:
                    sqlite.check_tables(self._engine)
                elif path is not None and not path.exists():
                    sqlite.create(path)
                if path is not None:
                    sqlite.enter_wal(path)
                if not attaching:
                    sqlite.add_tables(self._engine)
                self._identity = None if path is None else sqlite.identify(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; what was committed stays."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._engine.dispose()

    def begin_run(self, name: str, lease_seconds: float, now: datetime) -> Ledger:
        """Begin a new run of that name; `lease_seconds` as in `Config`."""
        with self._claimed() as claim, self.writing("begin a run") as connection:
            row = {"name": name, "began_at": now}
            run_id = _insert(connection, schema.run, row)
            _insert_recovery(connection, run_id, 0, None, claim, lease_seconds, now)
            return Ledger(self, claim, run_id, 0, ())

    def begin_recovery(
        self, name: str, based_on: int | None, lease_seconds: float, now: datetime
    ) -> Ledger:
        """Begin a new recovery of the latest run of that name.

        Args:
            name: the run's name.
            based_on: the recovery from which it starts; None is the latest.
            lease_seconds: as in `Config`.
            now: the time, in UTC.

        Raises:
            RecoveryError: there is no such run or recovery.
            OwnershipError: the run has a live owner.
        """
        with self._claimed() as claim, self.writing("begin a recovery") as connection:
            run_id = connection.scalar(_latest_run(name))
            if run_id is None:
                raise RecoveryError(
                    f"there is nothing to recover: the store {self.location} has no run "
                    f"named {name!r}; {_say_names(connection)}"
                )
            parents = _parents(connection, run_id)
            latest = max(parents)
            base = latest if based_on is None else based_on
            if base not in parents:
                raise RecoveryError(
                    f"run {run_id} has no recovery {base} to recover from; "
                    f"it has {', '.join(map(str, sorted(parents)))}"
                )
            keeper = _refuse_owned(connection, run_id, latest, now)
            lineage = tuple(_lineage(parents, base))
            _insert_recovery(
                connection, run_id, latest + 1, base, claim, lease_seconds, now, keeper
            )
            return Ledger(self, claim, run_id, latest + 1, lineage, keeper)

    def continue_run(self, name: str, lease_seconds: float, now: datetime) -> Ledger | None:
        """Take up the latest recovery of the latest run of that name; None if there is no run.

        Raises:
            OwnershipError: the run has a live owner.
        """
        columns = schema.recovery.c
        with self._claimed() as claim, self.writing("take up a run") as connection:
            run_id = connection.scalar(_latest_run(name))
            if run_id is None:
                owner.disclaim(claim)
                return None
            parents = _parents(connection, run_id)
            latest = max(parents)
            keeper = _refuse_owned(connection, run_id, latest, now)
            connection.execute(
                update(schema.recovery).where(columns.run_id == run_id, columns.recovery == latest),
                _owned(claim, lease_seconds, now),
            )
            _forget_stops(connection, run_id, latest, now)
            lineage = tuple(_lineage(parents, latest))
            return Ledger(self, claim, run_id, latest, lineage, keeper, continues=True)

    def find(
        self, name: str, run_id: int | None = None, recovery: int | None = None
    ) -> tuple[int, int]:
        """Return the numbers of a run of that name, and of a recovery of it: by default the latest.

        Raises:
            RecoveryError: there is no such run or recovery.
        """
        runs, recoveries = schema.run.c, schema.recovery.c
        with self.reading("find a run") as connection:
            latest = connection.scalar(select(func.max(runs.run_id)).where(runs.name == name))
            if latest is None:
                raise RecoveryError(
                    f"there is nothing to attach to: the store {self.location} has no run "
                    f"named {name!r}; {_say_names(connection)}"
                )
            of_name = select(runs.run_id).where(runs.name == name, runs.run_id == run_id)
            if run_id is not None and connection.scalar(of_name) is None:
                raise RecoveryError(
                    f"the store {self.location} has no run {run_id} named {name!r}; "
                    f"the latest is {latest}"
                )
            run = latest if run_id is None else run_id
            of_run = select(recoveries.recovery).where(recoveries.run_id == run)
            newest = max(known := connection.scalars(of_run).all())
            if recovery is not None and recovery not in known:
                raise RecoveryError(f"run {run} has no recovery {recovery}; the latest is {newest}")
            return run, newest if recovery is None else recovery

    def runs(self, name: str, now: datetime) -> list[Run]:
        """Return all runs of that name with their recoveries, in the order in which they began."""
        query = (
            select(schema.run.c.name, schema.run.c.began_at.label("run_began_at"), schema.recovery)
            .join_from(schema.run, schema.recovery)
            .where(schema.run.c.name == name)
            .order_by(schema.run.c.run_id, schema.recovery.c.recovery)
        )
        with self.reading("read its runs") as connection:
            of_runs = [
                list(rows) for _, rows in groupby(connection.execute(query), lambda row: row.run_id)
            ]
        return [
            Run(
                rows[0].run_id,
                rows[0].name,
                rows[0].run_began_at,
                tuple(
                    Recovery(
                        row.recovery,
                        row.based_on,
                        row.began_at,
                        _owner_status(row, rows[-1].recovery, now),
                    )
                    for row in rows
                ),
            )
            for rows in of_runs
        ]

    def definition(self, run_id: int) -> Any:
        """Return the definition that a run has recorded last, or None."""
        columns = schema.definition.c
        query = (
            select(columns.definition)
            .where(columns.run_id == run_id)
            .order_by(columns.recovery.desc())
            .limit(1)
        )
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
    ) -> list[Task]:
        """Return the tasks of a recovery in the order in which they became ready."""
        columns = schema.task.c
        query = (
            select(schema.task, schema.result.c.encoding, schema.result.c.data)
            .outerjoin(schema.result, columns.result_id == schema.result.c.result_id)
            .where(columns.run_id == run_id, columns.recovery == recovery)
            .where(*_of_sequence(schema.task, sequence))
            .order_by(columns.task_id)
        )
        if step is not None:
            query = query.where(columns.step == step)
        if status is not None:
            query = query.where(columns.status == status.value)
        attempts = (
            select(schema.attempt)
            .where(schema.attempt.c.run_id == run_id, schema.attempt.c.recovery == recovery)
            .where(*_of_sequence(schema.attempt, sequence))
            .order_by(schema.attempt.c.attempt)
        )
        with self.reading("read its tasks") as connection:
            earlier: dict[TaskKey, list[Attempt]] = {}
            for row in connection.execute(attempts):
                earlier.setdefault(_task_key(row), []).append(_attempt(row))
            return [
                _task(row, earlier.get(_task_key(row), [])) for row in connection.execute(query)
            ]

    def events(
        self, run_id: int, recovery: int, event: str | None, sequence: Sequence | None
    ) -> list[RaisedEvent]:
        """Return the events that a recovery has raised, in that order."""
        columns = schema.event.c
        query = (
            select(schema.event)
            .where(columns.run_id == run_id, columns.recovery == recovery)
            .where(*_of_sequence(schema.event, sequence))
            .order_by(columns.event_id)
        )
        if event is not None:
            query = query.where(columns.event == event)
        with self.reading("read its events") as connection:
            return [
                RaisedEvent(row.event, _sequence(row), row.recovery, row.raised_at, _cause(row))
                for row in connection.execute(query)
            ]

    def ask_to_trigger(
        self, run_id: int, event: str, sequence: Sequence, by: Owner, now: datetime
    ) -> bool:
        """Record that a process asks a run to raise an event; tell whether its owner lives."""
        with self.writing("record a trigger") as connection:
            latest = _latest_recovery(connection, run_id)
            asked = {"event": event, **_typed(sequence)}
            _insert_request(connection, latest, RequestKind.trigger, asked, by, now)
            return _is_held(latest, now)

    def ask_to_stop(self, run_id: int, by: Owner, now: datetime) -> bool:
        """Record that a process asks the owner of a run to stop, if that lives; tell whether."""
        with self.writing("record a request to stop") as connection:
            latest = _latest_recovery(connection, run_id)
            held = _is_held(latest, now)
            if held:
                _insert_request(connection, latest, RequestKind.stop, {}, by, now)
            return held

    @contextmanager
    def writing(self, what: str) -> Iterator[Connection]:
        """Give a connection in a transaction that is committed at the end, or undone.

        Raises:
            StoreError: it could not be committed, or the file in which it was is not there.
        """
        with self._lock, self._translated(what):
            self._check_files()
            with self._transaction(writing=True) as connection:
                yield connection
            self._check_files()

    @contextmanager
    def reading(self, what: str) -> Iterator[Connection]:
        """Give a connection in a transaction that sees one state of the store."""
        with self._lock, self._translated(what), self._transaction(writing=False) as connection:
            yield connection

    @contextmanager
    def _transaction(self, *, writing: bool) -> Iterator[Connection]:
        if self._connection is None:
            self._connection = self._engine.connect()
        try:
            self._connection.execution_options(**{sqlite.WRITING: writing})
            with self._connection.begin():
                yield self._connection
        except BaseException:
            # One whose commit has failed may be in its transaction still.
            failed, self._connection = self._connection, None
            failed.close()
            raise

    @staticmethod
    @contextmanager
    def _claimed() -> Iterator[Owner]:
        """Give a claim that ends if what is done with it fails."""
        claim = owner.claim()
        try:
            yield claim
        except BaseException:
            owner.disclaim(claim)
            raise

    def _check_files(self) -> None:
        if self._path is not None and sqlite.identify(self._path) != self._identity:
            raise FileNotFoundError("it, or the log beside it, was replaced while it was in use")

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


class Ledger:
    """One recovery of one run in a store.

    Attributes:
        run_id: the run's number in the store.
        recovery: the recovery's number in the run; 0 is the initial run.
        keeper_before: the process that ends the steps of the owner before this one, if it died.
        continues: whether the recovery was there before, and is taken up where it stands.
    """

    def __init__(
        self,
        store: Store,
        claim: Owner,
        run_id: int,
        recovery: int,
        lineage: tuple[int, ...],
        keeper_before: Owner | None = None,
        *,
        continues: bool = False,
    ) -> None:
        self.continues = continues
        self.keeper_before = keeper_before
        self.run_id = run_id
        self.recovery = recovery
        self._store = store
        self._claim = claim
        self._lineage = lineage
        self._bases = [base for base in lineage if base != recovery]
        self._here: dict[str, Any] = {"run_id": run_id, "recovery": recovery}
        self._of_here = {
            "of_run_id": run_id,
            "of_recovery": recovery,
            "of_owner_began": claim.began,
        }
        self._keeper: dict[str, Any] = {"new_keeper_pid": None, "new_keeper_began": None}
        self._defined = b""
        self._undefined: tuple[str, bytes] | None = None
        self._answers: Mapping[int, Answer] = {}

    @property
    def shared(self) -> bool:
        """Whether other processes can reach this store, and ask something of the run."""
        return self._store.location.path is not None

    def left(self) -> dict[TaskKey, Left]:
        """Return how the recoveries on which this one is based left their tasks.

        That is a task's newest status, and the result with which it ended last.
        """
        columns, ended = schema.task.c, schema.task.alias("ended")
        which = (columns.step, columns.sequence, columns.sequence_type)
        well = and_(
            columns.status == TaskStatus.success.value,
            columns.replay.is_distinct_from(StepReplay.skip.value),
        )
        newest = (
            select(
                *which,
                func.max(columns.recovery).label("recovery"),
                func.max(case((well, columns.recovery))).label("ended"),
            )
            .where(columns.run_id == self.run_id, columns.recovery.in_(self._bases))
            .group_by(*which)
            .subquery()
        )

        def row_of(table: Any, recovery: str) -> ColumnElement[bool]:
            same = (table.c[column.name] == newest.c[column.name] for column in which)
            return and_(
                table.c.run_id == self.run_id, table.c.recovery == newest.c[recovery], *same
            )

        query = (
            select(*_LEFT, ended.c.result_id)
            .join_from(newest, schema.task, row_of(schema.task, "recovery"))
            .outerjoin(ended, row_of(ended, "ended"))
            .order_by(columns.task_id)
        )
        with self._store.reading("read what was run before") as connection:
            return {_task_key(row): _left(row) for row in connection.execute(query)}

    def delays(self) -> dict[Wait, datetime]:
        """Return when what was delayed was to act, of which the recoveries before this one tell."""
        with self._store.reading("read what was delayed before") as connection:
            return _delays(connection, self.run_id, self._bases)

    def standing(self) -> Standing | None:
        """Return where this recovery stands, if it is continued."""
        if not self.continues:
            return None
        events, tasks = schema.event.c, schema.task.c
        raised = (
            select(events.event, events.sequence, events.sequence_type, events.raised_at)
            .where(*self._mine(schema.event))
            .order_by(events.event_id)
        )
        created = select(*_LEFT, tasks.result_id).where(*self._mine(schema.task))
        with self._store.reading("read where it stands") as connection:
            return Standing(
                {(row.event, _sequence(row)): row.raised_at for row in connection.execute(raised)},
                {
                    _task_key(row): _left(row)
                    for row in connection.execute(created.order_by(tasks.task_id))
                },
                _delays(connection, self.run_id, [self.recovery]),
            )

    def triggers(self) -> list[Trigger]:
        """Return what the recoveries on which this one is based were triggered with, once each."""
        columns = schema.event.c
        which = (columns.event, columns.sequence, columns.sequence_type)
        query = (
            select(*which, func.min(columns.recovery).label("recovery"))
            .where(
                columns.run_id == self.run_id,
                columns.recovery.in_(self._lineage),
                columns.cause_kind.in_([kind.value for kind in _FROM_OUTSIDE]),
            )
            .group_by(*which)
            .order_by(func.min(columns.event_id))
        )
        with self._store.reading("read what was triggered before") as connection:
            return [
                Trigger(
                    row.event,
                    _sequence(row),
                    Cause(CauseKind.recovery, detail=str(row.recovery)),
                )
                for row in connection.execute(query)
            ]

    def triggered(self) -> set[str]:
        """Return the events that this recovery, or one before it, was triggered with."""
        columns = schema.event.c
        query = (
            select(columns.event)
            .where(
                columns.run_id == self.run_id,
                columns.recovery.in_((*self._lineage, self.recovery)),
                columns.cause_kind.in_([kind.value for kind in _FROM_OUTSIDE]),
            )
            .distinct()
        )
        with self._store.reading("read what was triggered") as connection:
            return set(connection.scalars(query))

    def definition_before(self) -> Any:
        """Return the definition that the recoveries before this one recorded last, or None."""
        columns = schema.definition.c
        query = (
            select(columns.definition)
            .where(columns.run_id == self.run_id, columns.recovery.in_(self._lineage))
            .order_by(columns.recovery.desc())
            .limit(1)
        )
        with self._store.reading("read the definition") as connection:
            written = connection.scalar(query)
            return None if written is None else json.loads(written)

    def define(self, definition: Mapping[str, Iterable[Any]]) -> None:
        """Take note of the flow's definition for the next `record`, if it is not recorded yet."""
        encode = json.JSONEncoder(ensure_ascii=False).encode
        kinds = (f'"{kind}": [{", ".join(map(encode, all_))}]' for kind, all_ in definition.items())
        written = f"{{{', '.join(kinds)}}}"
        digest = hashlib.sha256(written.encode(errors="surrogatepass")).digest()
        self._undefined = None if digest == self._defined else (written, digest)

    def kept_by(self, keeper: int | None) -> bool:
        """Take note of the process that ends the steps if this one dies, for the next `record`.

        Returns:
            Whether it is another than before.
        """
        if keeper is None or keeper == self._keeper["new_keeper_pid"]:
            return False
        began = owner.process_of(keeper).began
        self._keeper = {"new_keeper_pid": keeper, "new_keeper_began": began}
        return True

    def requests(self) -> list[Request]:
        """Return what other processes have asked of this run and nobody has taken up, in order."""
        with self._store.reading("read what was asked of the run") as connection:
            text = _texts(connection.dialect).waiting
            rows = connection.exec_driver_sql(text, {"of_run_id": self.run_id})
            return [_request(row) for row in rows]

    def answer(self, answers: Mapping[int, Answer]) -> bool:
        """Take note of what becomes of requests, by their numbers, for the next `record`.

        Returns:
            Whether there are any.
        """
        self._answers = answers
        return bool(answers)

    def record(self, changes: Iterable[Change], now: datetime) -> None:
        """Write all changes of one pass in one transaction, which also renews the lease.

        Raises:
            OwnershipError: another recovery has begun, since this one was not heard of for longer
                than its lease; nothing is written any more.
        """
        with self._store.writing("record what happened") as connection:
            self._renew(connection, now)
            if self._undefined is not None:
                self._define(connection, self._undefined[0])
            batch = _Batch(connection, self._here, now)
            for change in changes:
                batch.add(change)
            batch.write()
            if self._answers:
                self._take_up(connection, now)
        if self._undefined is not None:
            self._defined, self._undefined = self._undefined[1], None
        self._answers = {}

    def tasks(
        self,
        step: str | None = None,
        sequence: Sequence | None = None,
        status: TaskStatus | None = None,
    ) -> list[Task]:
        """Return the tasks of this recovery in the order in which they became ready."""
        return self._store.tasks(self.run_id, self.recovery, step, sequence, status)

    def results(
        self, steps: Collection[str], sequence: Sequence, *, earlier: bool = False
    ) -> dict[str, StoredResult | str]:
        """Return the results of steps in a sequence, or for each why there is none.

        The result of a task that was skipped is that with which it ended last.

        Args:
            steps: the names of the steps.
            sequence: the sequence.
            earlier: whether those on which this recovery is based count for what it has not begun.
        """
        found: dict[str, StoredResult | str] = {}
        names = list(steps)
        with self._store.reading("read results") as connection:
            for start in range(0, len(names), _NAMES_AT_ONCE):
                some = names[start : start + _NAMES_AT_ONCE]
                found |= self._results(connection, some, sequence, earlier)
        return found

    def events(
        self, event: str | None = None, sequence: Sequence | None = None
    ) -> list[RaisedEvent]:
        """Return the events that this recovery has raised, in that order."""
        return self._store.events(self.run_id, self.recovery, event, sequence)

    def release(self) -> None:
        """Record that this recovery has no owner any more; if that fails, it has none either."""
        columns = ("owner_host", "owner_pid", "owner_began", "heartbeat_at")
        try:
            with self._store.writing("release the run") as connection:
                mine = schema.recovery.c.owner_began == self._claim.began
                connection.execute(
                    update(schema.recovery).where(*self._mine(schema.recovery), mine),
                    dict.fromkeys(columns),
                )
        finally:
            owner.disclaim(self._claim)

    def _results(
        self, connection: Connection, steps: list[str], sequence: Sequence, earlier: bool
    ) -> dict[str, StoredResult | str]:
        columns = schema.task.c
        query = (
            select(
                columns.step, columns.recovery, columns.status, columns.replay, columns.result_id
            )
            .where(
                columns.run_id == self.run_id,
                columns.recovery.in_([self.recovery, *self._lineage]),
                columns.step.in_(steps),
                *_of_sequence(schema.task, sequence),
            )
            .order_by(columns.recovery.desc())
        )
        tasks: dict[str, list[_Row]] = {name: [] for name in steps}
        for row in connection.execute(query):
            if earlier or row.recovery == self.recovery or tasks[row.step]:
                tasks[row.step].append(row)
        ends = {name: _last_end(rows, self.recovery) for name, rows in tasks.items()}
        numbers = [end.result_id for end in ends.values() if not isinstance(end, str)]
        query = select(schema.result).where(schema.result.c.result_id.in_(numbers))
        kept = {row.result_id: row for row in connection.execute(query)}
        return {
            name: end if isinstance(end, str) else _result(end, kept) for name, end in ends.items()
        }

    def _define(self, connection: Connection, written: str) -> None:
        connection.execute(delete(schema.definition).where(*self._mine(schema.definition)))
        connection.execute(insert(schema.definition), self._here | {"definition": written})

    def _take_up(self, connection: Connection, now: datetime) -> None:
        """Mark requests as taken up, with what became of them."""
        rows = [
            {
                "of_request_id": number,
                "new_taken_at": now,
                "new_taken_in": self.recovery,
                "new_answer": answer.value,
            }
            for number, answer in self._answers.items()
        ]
        connection.execute(_answering(), rows)

    def _renew(self, connection: Connection, now: datetime) -> None:
        """Be heard of, and make sure that nobody has taken over."""
        texts = _texts(connection.dialect)
        row = {**self._of_here, **self._keeper, "new_heartbeat_at": texts.time(now)}
        if connection.exec_driver_sql(texts.renew, row).rowcount:
            return
        query = (
            select(schema.recovery)
            .where(schema.recovery.c.run_id == self.run_id)
            .order_by(schema.recovery.c.recovery.desc())
            .limit(1)
        )
        latest = connection.execute(query).one_or_none()
        here = f"recovery {self.recovery} of run {self.run_id} in {self._store.location}"
        if latest is None or latest.recovery == self.recovery:
            raise OwnershipError(f"{here} is not owned by this Eventor any more")
        raise OwnershipError(
            f"{here} was taken over by recovery {latest.recovery}, {_owner(latest)}, "
            "since it was not heard of for longer than its lease"
        )

    def _mine(self, table: Table) -> tuple[ColumnElement[bool], ...]:
        return (table.c.run_id == self.run_id, table.c.recovery == self.recovery)


_WHICH = ("run_id", "recovery", "step", "sequence", "sequence_type")

_RENEWED = ("heartbeat_at", "keeper_pid", "keeper_began")

_LEFT = tuple(
    schema.task.c[name]
    for name in ("step", "sequence", "sequence_type", "status", "recovery", "attempt", "due_at")
)

_NOT_STARTED = {"started_at": null(), "pid": null()}
"""What a task that is ready again tells no more: its earlier attempt does."""

_ACTIVE = TaskStatus.active.value

_NONE = StoredResult("pickle", pickle.dumps(None))
"""The result of a step that returned None, of which no row is kept."""

_NAMES_AT_ONCE = 500
"""How many names are looked for at once; older SQLite takes 999 values in a statement."""

_CHANGES_AT_ONCE = 1_000
"""How many changes are gathered before they are written, so that memory does not grow with them."""


_TOLD_OF_AN_END = ("status", "ended_at", "error", "traceback", "stdout", "stderr")


class _Texts:
    """What is written most, as text for the driver.

    SQLAlchemy's own way from a statement to the driver costs more than SQLite's to the disk.
    """

    def __init__(self, dialect: Dialect) -> None:
        def text(statement: Insert | Select[Any] | Update, columns: Iterable[str] = ()) -> str:
            return str(statement.compile(dialect=dialect, column_keys=list(columns) or None))

        numbers = ("event_id", "task_id")
        self.event = text(
            insert(schema.event), (c.name for c in schema.event.c if c.name not in numbers)
        )
        later_known = (*numbers, "pid", *_TOLD_OF_AN_END[2:])
        self.task = text(
            insert(schema.task), (c.name for c in schema.task.c if c.name not in later_known)
        )
        self.started = text(_update_task("status", "started_at", "attempt").values(due_at=null()))
        self.launched = text(_update_task("pid"))
        ended = _update_task(*_TOLD_OF_AN_END, "result_id")
        known_pid = func.coalesce(_new(schema.task.c.pid), schema.task.c.pid)
        self.ended = text(ended.values(pid=known_pid))
        self.delayed = text(insert(schema.delay))
        self.again = text(_update_task("status", "due_at").values(_NOT_STARTED))
        told = {name: _new(schema.attempt.c[name]) for name in _TOLD_OF_AN_END}
        self.attempted = text(_keep_attempts(schema.task, pid=known_pid, **told))
        here = _new(schema.attempt.c.recovery)
        active = schema.task.c.status == literal_column(f"'{_ACTIVE}'")
        left = _keep_attempts(schema.task, active, recovery=here)
        self.copied = (text(_keep_attempts(schema.attempt, recovery=here)), text(left))
        self.renew = text(_renewal())
        self.waiting = text(_waiting())
        self._time = schema.UtcDateTime().dialect_impl(dialect).bind_processor(dialect)

    def time(self, moment: datetime) -> Any:
        """Return a time as this database keeps it."""
        return moment if self._time is None else self._time(moment)


_known_texts: dict[str, _Texts] = {}


def _texts(dialect: Dialect) -> _Texts:
    """Return the texts for a kind of database, which are made once in a program."""
    if dialect.name not in _known_texts:
        _known_texts[dialect.name] = _Texts(dialect)
    return _known_texts[dialect.name]


class _Batch:
    """The rows of one pass, gathered so that each kind is one statement for many of them."""

    def __init__(self, connection: Connection, here: dict[str, Any], now: datetime) -> None:
        self._connection = connection
        self._texts = _texts(connection.dialect)
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

    def add(self, change: Change) -> None:
        """Take up a change."""
        if isinstance(change, EventRaised):
            self._events.append(
                {
                    **self._here,
                    "event": change.event,
                    **_typed(change.sequence),
                    "raised_at": self._now,
                    **_cause_columns(change.cause),
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
                    status=_ACTIVE, started_at=self._now, attempt=change.attempt, due_at=None
                )
            else:
                row = self._which(change.task)
                row.update(new_status=_ACTIVE, new_started_at=self._now, new_attempt=change.attempt)
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

    def _add_rare(self, change: Delayed | TaskRetried | TaskInterrupted) -> None:
        if isinstance(change, TaskRetried):
            self._attempted.append(self._end(change))
            self._be_ready(change.task, change.due)
        elif isinstance(change, TaskInterrupted):
            self._interrupt(change)
        else:
            event, sequence, seconds = change.wait
            row = {"event": event, **_typed(sequence), "seconds": seconds}
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
        self._update(self._texts.started, self._started)
        launched = [self._which(task) | {"new_pid": pid} for task, pid in self._pids.items()]
        self._update(self._texts.launched, launched)
        self._update(self._texts.ended, self._ended)
        self._count = 0
        self._events, self._created, self._pids = [], {}, {}
        self._started, self._ended = [], []
        self._delayed, self._copied, self._attempted, self._again = [], [], [], []

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
        return _insert(self._connection, schema.result, row)

    def _create(self, task: TaskKey, cause: Cause, status: TaskStatus, replay: str | None) -> None:
        self._created[task] = {
            **self._here,
            "step": task.step,
            **_typed(task.sequence),
            "status": status.value,
            "replay": replay,
            "attempt": 0,
            "due_at": None,
            "ready_at": self._now,
            "started_at": None,
            "ended_at": None,
            "result_id": None,
            **_cause_columns(cause),
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
            self._attempted.append(which | told | {"new_status": _ACTIVE, "new_pid": None})
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


_Row = Any  # SQLAlchemy 2.0 and 2.1 type their rows in different ways


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
    return insert(schema.attempt).from_select(names, rows)


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


def _answering() -> Update:
    columns = schema.request.c
    return (
        update(schema.request)
        .where(columns.request_id == bindparam("of_request_id"))
        .values(
            taken_at=bindparam("new_taken_at"),
            taken_in=bindparam("new_taken_in"),
            answer=bindparam("new_answer"),
        )
    )


def _forget_stops(connection: Connection, run_id: int, recovery: int, now: datetime) -> None:
    """Answer requests to stop that an owner has not lived to read: they were for that one alone."""
    columns = schema.request.c
    connection.execute(
        update(schema.request)
        .where(columns.run_id == run_id, columns.taken_at.is_(None))
        .where(columns.kind == RequestKind.stop.value)
        .values(taken_at=now, taken_in=recovery, answer=Answer.too_late.value)
    )


def _insert_request(
    connection: Connection,
    latest: _Row,
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


def _insert_recovery(
    connection: Connection,
    run_id: int,
    recovery: int,
    based_on: int | None,
    claim: Owner,
    lease_seconds: float,
    now: datetime,
    keeper: Owner | None = None,
) -> None:
    """Insert a recovery; until it has a keeper of its own, that of the dead owner before it stays.

    So whoever recovers next waits for that keeper too, should this recovery die before it has.
    """
    row = {
        "run_id": run_id,
        "recovery": recovery,
        "based_on": based_on,
        "began_at": now,
        **_owned(claim, lease_seconds, now),
        "keeper_pid": None if keeper is None else keeper.pid,
        "keeper_began": None if keeper is None else keeper.began,
    }
    connection.execute(insert(schema.recovery), row)


def _owned(claim: Owner, lease_seconds: float, now: datetime) -> dict[str, Any]:
    return {
        "owner_host": claim.host,
        "owner_pid": claim.pid,
        "owner_began": claim.began,
        "lease_seconds": lease_seconds,
        "heartbeat_at": now,
    }


def _refuse_owned(connection: Connection, run_id: int, latest: int, now: datetime) -> Owner | None:
    """Return the keeper of a run that nobody owns, if it has had one; it may be at work yet.

    Raises:
        OwnershipError: the owner of its latest recovery lives.
    """
    columns = schema.recovery.c
    row = connection.execute(
        select(schema.recovery).where(columns.run_id == run_id, columns.recovery == latest)
    ).one()
    running = False if row.owner_pid is None else owner.is_running(_owner(row))
    lease = row.lease_seconds or 0.0
    if not owner.holds(running, row.heartbeat_at, lease, now):
        if row.keeper_pid is None:
            return None
        return Owner(str(row.owner_host), int(row.keeper_pid), str(row.keeper_began))
    held = f"run {run_id} is owned by {_owner(row)}, in its recovery {latest}, and cannot be "
    if running is None:
        seen = max(0.0, (now - row.heartbeat_at).total_seconds())
        raise OwnershipError(
            f"{held}recovered yet: that process cannot be looked at from here, was heard of "
            f"{seen:.1f} s ago, and counts as dead after {lease:g} s"
        )
    if row.owner_pid == os.getpid():
        raise OwnershipError(f"{held}recovered: that is this program, which has to close it first")
    raise OwnershipError(f"{held}recovered while that process lives")


def _latest_recovery(connection: Connection, run_id: int) -> _Row:
    columns = schema.recovery.c
    query = select(schema.recovery).where(columns.run_id == run_id)
    return connection.execute(query.order_by(columns.recovery.desc()).limit(1)).one()


def _is_held(latest: _Row, now: datetime) -> bool:
    """Tell whether the owner of the latest recovery of a run lives."""
    running = False if latest.owner_pid is None else owner.is_running(_owner(latest))
    return owner.holds(running, latest.heartbeat_at, latest.lease_seconds or 0.0, now)


def _owner_status(row: _Row, latest: int, now: datetime) -> OwnerStatus:
    if row.owner_pid is None:
        return OwnerStatus.ended
    lives = row.recovery == latest and _is_held(row, now)
    return OwnerStatus.live if lives else OwnerStatus.dead


def _owner(row: _Row) -> Owner:
    return Owner(str(row.owner_host), row.owner_pid, str(row.owner_began))


def _insert(connection: Connection, table: Table, row: Mapping[str, Any]) -> int:
    """Insert a row into a table that numbers its rows, and return its number."""
    number: int = connection.execute(insert(table), row).inserted_primary_key[0]  # type: ignore[index, unused-ignore]
    return number


def _last_end(tasks: list[_Row], recovery: int) -> _Row | str:
    """Return the row with which a task ended last, given the newest first, or why it has not."""
    if not tasks:
        return "has not run"
    newest = tasks[0]
    if newest.status == TaskStatus.failure:
        return "failed"
    if newest.status != TaskStatus.success:
        runs = newest.status == TaskStatus.active
        if newest.recovery != recovery:
            return "was cut short" if runs else "has not run"
        return "still runs" if runs else "has not run yet"
    for row in tasks:
        if row.status == TaskStatus.success and row.replay != StepReplay.skip:
            return row
    return "was skipped, and has none"


def _result(end: _Row, kept: Mapping[int, _Row]) -> StoredResult | str:
    """Return the result with which a task ended, or why it cannot be had."""
    if end.result_id is None:
        return _NONE
    if end.result_id not in kept:
        raise ValueError("a result that was recorded is not there any more")
    row = kept[end.result_id]
    stored = StoredResult(row.encoding, row.data)
    return "could not be pickled" if stored.encoding == "repr" else stored


def _lineage(parents: Mapping[int, int | None], base: int) -> Iterator[int]:
    recovery: int | None = base
    while recovery is not None:
        yield recovery
        parent = parents.get(recovery, recovery)
        if parent is not None and not parent < recovery:
            raise ValueError(f"recovery {recovery} is based on {parent}")
        recovery = parent


def _latest_run(name: str) -> Select[Any]:
    return select(func.max(schema.run.c.run_id)).where(schema.run.c.name == name)


def _parents(connection: Connection, run_id: int) -> dict[int, int | None]:
    """Return the recoveries of a run, and on which each is based."""
    columns = schema.recovery.c
    query = select(columns.recovery, columns.based_on).where(columns.run_id == run_id)
    return {row.recovery: row.based_on for row in connection.execute(query)}


def _delays(connection: Connection, run_id: int, recoveries: Collection[int]) -> dict[Wait, Any]:
    columns = schema.delay.c
    query = select(schema.delay).where(columns.run_id == run_id, columns.recovery.in_(recoveries))
    return {
        Wait(row.event, _sequence(row), row.seconds): row.due_at
        for row in connection.execute(query)
    }


def _say_names(connection: Connection) -> str:
    names = connection.scalars(select(schema.run.c.name).distinct().limit(5)).all()
    return f"it has runs named {', '.join(map(repr, names))}" if names else "it has no runs at all"


def _typed(sequence: Sequence) -> dict[str, str]:
    return {"sequence": str(sequence), "sequence_type": type(sequence).__name__}


def _sequence(row: _Row) -> Sequence:
    written: str = row.sequence
    return int(written) if row.sequence_type == "int" else written


def _of_sequence(table: Table, sequence: Sequence | None) -> list[ColumnElement[bool]]:
    if sequence is None:
        return []
    return [table.c[name] == value for name, value in _typed(sequence).items()]


def _task_key(row: _Row) -> TaskKey:
    return TaskKey(row.step, _sequence(row))


def _cause(row: _Row) -> Cause:
    return Cause(CauseKind(row.cause_kind), row.cause_source, row.cause_detail)


def _cause_columns(cause: Cause) -> dict[str, str | None]:
    return {
        "cause_kind": cause.kind.value,
        "cause_source": cause.source,
        "cause_detail": cause.detail,
    }


def _request(row: _Row) -> Request:
    by = f"{row.made_by_host}:{row.made_by_pid}"
    trigger = None
    if RequestKind(row.kind) is RequestKind.trigger:
        trigger = Trigger(row.event, _sequence(row), Cause(CauseKind.process, detail=by))
    return Request(row.request_id, by, row.recovery, trigger)


def _left(row: _Row) -> Left:
    status = TaskStatus(row.status)
    return Left(status, row.result_id, row.recovery, row.attempt, row.due_at)


def _attempt(row: _Row) -> Attempt:
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


def _task(row: _Row, earlier: list[Attempt]) -> Task:
    return Task(
        step=row.step,
        sequence=_sequence(row),
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
        cause=_cause(row),
        due_at=row.due_at,
        attempts=[*earlier, _attempt(row)] if row.started_at is not None else earlier,
        stored=None if row.data is None else StoredResult(row.encoding, row.data),
    )
