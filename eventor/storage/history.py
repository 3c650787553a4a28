"""What a store tells of its runs to whoever looks: nothing is written, and nothing unpickled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, func, or_, select

from eventor.errors import DefinitionError, RecoveryError, StoreError
from eventor.rules.config import unknown
from eventor.rules.why import Definition, why
from eventor.storage import schema
from eventor.storage.rows import is_skipped, of_sequence, owner_of, sequence_of
from eventor.storage.store import is_held, latest_recovery, say_names
from eventor.types import (
    Counts,
    OwnerStatus,
    RaisedEvent,
    Recovery,
    Run,
    RunStatus,
    Sequence,
    Task,
    TaskCounts,
    TaskStatus,
    ThingKind,
    Why,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy import ColumnElement, Connection, Select

    from eventor.storage.location import Location
    from eventor.storage.owner import Owner
    from eventor.storage.rows import Row
    from eventor.storage.store import Store

Place = tuple[int, int]
"""The numbers of a run and of a recovery of it."""


_ERROR = 1000
"""How many characters of an error are read where it is told in a line."""


@dataclass(frozen=True, slots=True)
class Brief:
    """Where a task stands, in short.

    Attributes:
        task_id: its number in the store; a later one has a higher one.
        step: its step.
        sequence: its sequence.
        status: where it stands.
        skipped: whether it was skipped.
        attempt: as in `Task`.
        ready_at: as in `Task`.
        started_at: as in `Task`.
        ended_at: as in `Task`.
        error: the beginning of that.
    """

    task_id: int
    step: str
    sequence: Sequence
    status: TaskStatus
    skipped: bool
    attempt: int
    ready_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    error: str | None


class History:
    """The runs of a store.

    Args:
        store: the open store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._definitions: dict[Place, Any] = {}

    @property
    def location(self) -> Location:
        """Where the store lives."""
        return self._store.location

    def runs(self, name: str | None = None) -> list[Run]:
        """Return all runs, or those of a name, with their recoveries, in the order of beginning.

        Raises:
            StoreError: the store cannot be read.
        """
        return self._runs() if name is None else self._runs(schema.run.c.name == name)

    def at(self, place: Place) -> tuple[Run, Recovery]:
        """Return the run and the recovery of these numbers, as `find` returns them.

        Raises:
            StoreError: the store cannot be read, or they are gone.
        """
        run_id, number = place
        for run in self._runs(schema.run.c.run_id == run_id):
            for recovery in run.recoveries:
                if recovery.recovery == number:
                    return run, recovery
        raise StoreError(
            f"the store {self.location} has no recovery {number} of run {run_id} any more"
        )

    def _runs(self, *which: ColumnElement[bool]) -> list[Run]:
        query = (
            select(schema.run.c.name, schema.run.c.began_at.label("run_began_at"), schema.recovery)
            .join_from(schema.run, schema.recovery)
            .where(*which)
            .order_by(schema.run.c.run_id, schema.recovery.c.recovery)
        )
        of_runs = select(schema.run.c.run_id).where(*which)

        def work(connection: Connection) -> tuple[Any, ...]:
            return (
                self._store.backend.clock(connection, datetime.now(UTC)),
                connection.execute(query).all(),
                _counts(connection, of_runs),
                _failed(connection, of_runs),
                _due(connection, of_runs),
            )

        now, rows, counts, failed, due = self._store.read("read its runs", work)
        return [
            Run(
                run_id,
                recoveries[0].name,
                recoveries[0].run_began_at,
                tuple(
                    self._recovery(
                        row,
                        _owner_status(row, recoveries[-1].recovery, now),
                        counts.get((run_id, row.recovery), TaskCounts()),
                        failed.get((run_id, row.recovery), set()),
                        due.get((run_id, row.recovery)),
                    )
                    for row in recoveries
                ),
            )
            for run_id, recoveries in (
                (run_id, list(group)) for run_id, group in groupby(rows, lambda row: row.run_id)
            )
        ]

    def find(
        self,
        name: str | None = None,
        run_id: int | None = None,
        recovery: int | None = None,
        *,
        in_vain: str = "",
    ) -> Place:
        """Return the numbers of a run and of a recovery of it: by default the latest.

        Args:
            name: the name that the run has to have, if that matters.
            run_id: the number of the run.
            recovery: the number of the recovery in it.
            in_vain: what the message begins with if there is no run to choose from.

        Raises:
            RecoveryError: there is no such run or recovery.
        """
        runs, recoveries = schema.run.c, schema.recovery.c
        where = [] if name is None else [runs.name == name]
        named = "" if name is None else f" named {name!r}"

        def work(connection: Connection) -> Place:
            latest = connection.scalar(select(func.max(runs.run_id)).where(*where))
            if latest is None:
                raise RecoveryError(
                    f"{in_vain}the store {self.location} has no run{named}; {say_names(connection)}"
                )
            run = latest if run_id is None else run_id
            if connection.scalar(select(runs.run_id).where(*where, runs.run_id == run)) is None:
                raise RecoveryError(
                    f"the store {self.location} has no run {run}{named}; the latest is {latest}"
                )
            of_run = select(recoveries.recovery).where(recoveries.run_id == run)
            newest = max(known := connection.scalars(of_run).all())
            if recovery is not None and recovery not in known:
                raise RecoveryError(f"run {run} has no recovery {recovery}; the latest is {newest}")
            return run, newest if recovery is None else recovery

        return self._store.read("find a run", work)

    def owner(self, run_id: int) -> Owner | None:
        """Return the owner of the latest recovery of a run, if it has not ended."""

        def found(row: Row) -> Owner | None:
            return None if row.owner_pid is None else owner_of(row)

        (owner,) = self._store.each("read who owns a run", latest_recovery(run_id), found)
        return owner

    def tasks(
        self,
        run_id: int,
        recovery: int,
        step: str | None = None,
        sequence: Sequence | None = None,
        status: TaskStatus | None = None,
    ) -> list[Task]:
        """Return the tasks of a recovery as they became ready, without their results."""
        return self._store.tasks(run_id, recovery, step, sequence, status, results=False)

    def briefs(
        self, place: Place, after: int, running: Iterable[int], waiting: Iterable[int]
    ) -> list[Brief]:
        """Return where tasks of a recovery stand, in the order in which they became ready.

        Args:
            place: the numbers of the run and of the recovery.
            after: all tasks of higher numbers are among them,
            running: those of these numbers,
            waiting: and those of these numbers that are no longer ready.
        """
        columns = schema.task.c
        query = (
            select(
                *(columns.task_id, columns.step, columns.sequence, columns.sequence_type),
                *(columns.status, func.coalesce(is_skipped(), False).label("skipped")),
                *(columns.attempt, columns.ready_at, columns.started_at, columns.ended_at),
                func.substr(columns.error, 1, _ERROR).label("error"),
            )
            .where(columns.run_id == place[0], columns.recovery == place[1])
            .order_by(columns.task_id)
        )
        no_longer_ready = columns.status != TaskStatus.ready.value
        which = or_(
            columns.task_id > after,
            columns.task_id.in_(self._store.backend.listed(running)),
            and_(columns.task_id.in_(self._store.backend.listed(waiting)), no_longer_ready),
        )

        def brief(row: Row) -> Brief:
            return Brief(
                *(row.task_id, row.step, sequence_of(row), TaskStatus(row.status)),
                *(bool(row.skipped), row.attempt, row.ready_at, row.started_at, row.ended_at),
                row.error,
            )

        return self._store.each("read its tasks", query.where(which), brief)

    def events(
        self,
        run_id: int,
        recovery: int,
        event: str | None = None,
        sequence: Sequence | None = None,
    ) -> list[RaisedEvent]:
        """Return the events that a recovery has raised, in that order."""
        return self._store.events(run_id, recovery, event, sequence)

    def count(self, run_id: int, recovery: int, *, live: bool) -> Counts:
        """Return in numbers how things stand in a recovery, which is live or not."""
        return replace(self._store.count(run_id, recovery), live=live)

    def definition(self, run_id: int, recovery: int) -> Any:
        """Return the flow's definition as plain data, as a recovery had it; None if unknown.

        It is that which the recovery has recorded, or one before it if it has not come so far.
        """
        place = (run_id, recovery)
        if place not in self._definitions:
            found = self._store.definition(run_id, range(recovery + 1))
            if found is None:
                return None  # it may still come
            self._definitions[place] = found
        return self._definitions[place]

    def names(self, place: Place) -> dict[ThingKind, list[str]]:
        """Return the names of the events and steps of a recovery's flow; none if it is unknown."""
        recorded = self.definition(*place)
        return {kind: [] for kind in ThingKind} if recorded is None else Definition(recorded).names

    def why(
        self,
        place: Place,
        name: str,
        sequence: Sequence,
        kind: ThingKind | None = None,
        recorded: Any = None,
    ) -> Why:
        """Return why something has happened in a recovery, or why it has not.

        Args:
            place: the numbers of the run and of the recovery.
            name: the name of an event or a step.
            sequence: the sequence.
            kind: whether it is an event or a step; None for a step of that name, else an event.
            recorded: the flow's definition as plain data; by default that of the recovery.

        Raises:
            DefinitionError: there is no such thing in the flow's definition, or none is recorded.
            StoreError: the store cannot be read.
        """
        recorded = self.definition(*place) if recorded is None else recorded
        if recorded is None:
            raise DefinitionError(
                f"recovery {place[1]} of run {place[0]} has recorded no definition of its flow yet"
            )
        definition = Definition(recorded)
        kinds = [ThingKind.step, ThingKind.event] if kind is None else [kind]
        for one in kinds:
            if name in definition.names[one]:
                return why(one, name, sequence, definition, _Record(self._store, place))
        known = [known for one in kinds for known in definition.names[one]]
        near = unknown(name, known) if known else "it has none at all"
        raise DefinitionError(f"run {place[0]} has no {' or '.join(kinds)} {name!r}; {near}")

    def _recovery(
        self,
        row: Row,
        owner: OwnerStatus,
        counts: TaskCounts,
        failed: set[str],
        due: datetime | None,
    ) -> Recovery:
        if owner is not OwnerStatus.ended:
            status = RunStatus.running if owner is OwnerStatus.live else RunStatus.crashed
        elif failed and failed - self._handling(row.run_id, row.recovery):
            status = RunStatus.failed
        elif counts.ready or counts.active or (due and row.ended_at and due > row.ended_at):
            status = RunStatus.unfinished
        else:
            status = RunStatus.succeeded
        return Recovery(
            row.recovery,
            row.based_on,
            row.began_at,
            owner,
            row.program,
            row.ended_at,
            row.heartbeat_at,
            status,
            counts,
        )

    def _handling(self, run_id: int, recovery: int) -> set[str]:
        """Return the steps whose failures are handled."""
        recorded = self.definition(run_id, recovery)
        return set() if recorded is None else Definition(recorded).handling


class _Record:
    """What one recovery has recorded, looked up as it is asked for."""

    def __init__(self, store: Store, place: Place) -> None:
        self._store = store
        self._place = place

    def event(self, name: str, sequence: Sequence) -> RaisedEvent | None:
        return next(iter(self._store.events(*self._place, name, sequence)), None)

    def task(self, step: str, sequence: Sequence) -> Task | None:
        found = self._store.tasks(*self._place, step, sequence, None, results=False)
        return next(iter(found), None)

    def due(self, event: str, sequence: Sequence, seconds: float) -> datetime | None:
        columns = schema.delay.c
        run_id, recovery = self._place
        query = (
            select(columns.due_at)
            .where(columns.run_id == run_id, columns.recovery == recovery)
            .where(columns.event == event, columns.seconds == seconds)
            .where(*of_sequence(schema.delay, sequence))
        )
        due: datetime | None = self._store.read(
            "read what is delayed", lambda connection: connection.scalar(query)
        )
        return due


def _counts(connection: Connection, of_runs: Select[Any]) -> Mapping[Place, TaskCounts]:
    columns = schema.task.c
    query = select(
        columns.run_id,
        columns.recovery,
        columns.status,
        func.coalesce(is_skipped(), False).label("skipped"),
        func.count().label("count"),
    ).group_by(columns.run_id, columns.recovery, columns.status, "skipped")
    found: dict[Place, dict[str, int]] = {}
    for row in connection.execute(query.where(columns.run_id.in_(of_runs))):
        name = "skipped" if row.skipped else TaskStatus(row.status).value
        found.setdefault((row.run_id, row.recovery), {})[name] = row[4]
    return {place: TaskCounts(**counts) for place, counts in found.items()}


def _failed(connection: Connection, of_runs: Select[Any]) -> Mapping[Place, set[str]]:
    columns = schema.task.c
    query = select(columns.run_id, columns.recovery, columns.step).distinct()
    found: dict[Place, set[str]] = {}
    query = query.where(columns.status == TaskStatus.failure.value, columns.run_id.in_(of_runs))
    for row in connection.execute(query):
        found.setdefault((row.run_id, row.recovery), set()).add(row.step)
    return found


def _due(connection: Connection, of_runs: Select[Any]) -> Mapping[Place, datetime]:
    """Return when the last delayed association of each recovery was to act."""
    columns = schema.delay.c
    query = select(columns.run_id, columns.recovery, func.max(columns.due_at).label("due_at"))
    query = query.where(columns.run_id.in_(of_runs)).group_by(columns.run_id, columns.recovery)
    rows = connection.execute(query)
    return {(row.run_id, row.recovery): row.due_at for row in rows}


def _owner_status(row: Row, latest: int, now: datetime) -> OwnerStatus:
    if row.owner_pid is None:
        return OwnerStatus.ended
    lives = row.recovery == latest and is_held(row, now)
    return OwnerStatus.live if lives else OwnerStatus.dead
