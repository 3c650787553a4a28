"""The ledger: one recovery of one run, written down and read back by its owner."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from sqlalchemy import and_, bindparam, case, delete, func, insert, select, update

from eventor.errors import OwnershipError, RecoveryError
from eventor.rules.plan import Left, Standing, TaskKey, Trigger, Wait
from eventor.storage import lease, owner, schema
from eventor.storage.batch import Batch, insert_row, texts_of
from eventor.storage.lease import Lease
from eventor.storage.owner import Owner
from eventor.storage.rows import (
    Answer,
    Request,
    RequestKind,
    Row,
    left_of,
    of_sequence,
    owner_of,
    request_of,
    sequence_of,
    task_key,
)
from eventor.storage.store import Store, is_held, latest_recovery, latest_run, say_names
from eventor.types import (
    Cause,
    CauseKind,
    Counts,
    RaisedEvent,
    Sequence,
    StepReplay,
    StoredResult,
    Task,
    TaskStatus,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
    from datetime import datetime

    from sqlalchemy import ColumnElement, Connection, Select, Table, Update

    from eventor.rules.plan import Change

T = TypeVar("T")

_FROM_OUTSIDE = (CauseKind.call, CauseKind.step, CauseKind.process)

_LEFT = tuple(
    schema.task.c[name]
    for name in ("step", "sequence", "sequence_type", "status", "recovery", "attempt", "due_at")
)

_NONE = StoredResult("pickle", pickle.dumps(None))
"""The result of a step that returned None, of which no row is kept."""

_NAMES_AT_ONCE = 500
"""How many names are looked for at once; older SQLite takes 999 values in a statement."""


class Beginning(NamedTuple):
    """What a program tells of itself when it begins, recovers or continues a run.

    Attributes:
        program: the path of its script; None where there is none.
        lease_seconds: as in `Config`.
        now: the time, in UTC.
    """

    program: str | None
    lease_seconds: float
    now: datetime


def begin_run(store: Store, name: str, beginning: Beginning) -> Ledger:
    """Begin a new run of that name."""
    with _claimed() as claim:
        return store.write(
            "begin a run", lambda connection: _begin(connection, store, claim, name, beginning)
        )


def begin_recovery(store: Store, name: str, based_on: int | None, beginning: Beginning) -> Ledger:
    """Begin a new recovery of the latest run of that name.

    Args:
        store: where the run is.
        name: the run's name.
        based_on: the recovery from which it starts; None is the latest.
        beginning: what the program tells of itself.

    Raises:
        RecoveryError: there is no such run or recovery.
        OwnershipError: the run has a live owner.
    """

    def work(connection: Connection) -> Ledger:
        run_id, now = _hold_latest(connection, store, name, beginning.now)
        if run_id is None:
            raise RecoveryError(
                f"there is nothing to recover: the store {store.location} has no run "
                f"named {name!r}; {say_names(connection)}"
            )
        parents = _parents(connection, run_id)
        latest = max(parents)
        base = latest if based_on is None else based_on
        if base not in parents:
            raise RecoveryError(
                f"run {run_id} has no recovery {base} to recover from; "
                f"it has {', '.join(map(str, sorted(parents)))}"
            )
        keeper = _refuse_owned(connection, run_id, now, "recovered")
        lineage = tuple(_lineage(parents, base))
        _insert_recovery(connection, run_id, latest + 1, base, claim, beginning, now, keeper)
        store.backend.prove(lambda: _claim_of(claim))
        return Ledger(store, claim, beginning, run_id, latest + 1, lineage, keeper)

    with _claimed() as claim:
        return store.write("begin a recovery", work)


def continue_run(store: Store, name: str, beginning: Beginning) -> Ledger:
    """Take up the latest recovery of the latest run of that name, or begin a run if there is none.

    Raises:
        OwnershipError: the run has a live owner.
    """
    columns = schema.recovery.c

    def work(connection: Connection) -> Ledger:
        run_id, now = _hold_latest(connection, store, name, beginning.now)
        if run_id is None:  # of programs that find none at the same time, one begins it
            connection.execute(select(schema.schema.c.version).with_for_update())
            run_id, now = _hold_latest(connection, store, name, beginning.now)
        if run_id is None:
            return _begin(connection, store, claim, name, beginning)
        parents = _parents(connection, run_id)
        latest = max(parents)
        keeper = _refuse_owned(connection, run_id, now, "continued")
        connection.execute(
            update(schema.recovery).where(columns.run_id == run_id, columns.recovery == latest),
            _owned(claim, beginning, now),
        )
        store.backend.prove(lambda: _claim_of(claim))
        _forget_stops(connection, run_id, latest, beginning.now)
        lineage = tuple(_lineage(parents, latest))
        return Ledger(store, claim, beginning, run_id, latest, lineage, keeper, continues=True)

    with _claimed() as claim:
        return store.write("take up a run", work)


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
        beginning: Beginning,
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
        self._lease = Lease(beginning.lease_seconds)
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
        return self._store.backend.shared

    @property
    def is_trusted(self) -> bool:
        """Whether nobody can have taken over by now, so that what was recorded may be started."""
        return self._lease.is_trusted

    @property
    def steps_until(self) -> float:
        """Until when steps may go on if the lease is not renewed, by `lease.clock`.

        On the same host a run is not taken over while its owner lives: there they may for ever.
        """
        return self._lease.steps_until if self._store.backend.has_hosts else math.inf

    def overran(self, now: datetime) -> OwnershipError:
        """Return the error that the lease has run out while steps ran, which ended them.

        Raises:
            OwnershipError: somebody has taken over since.
        """
        self.record([], now)
        return OwnershipError(
            f"recovery {self.recovery} of run {self.run_id} in {self._store.location} was not "
            f"heard of for most of its lease of {self._lease.seconds:g} s: its steps were ended "
            "for that, and stay active for a recovery"
        )

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
        return dict(self._each("read what was run before", query, _task_left))

    def delays(self) -> dict[Wait, datetime]:
        """Return when what was delayed was to act, of which the recoveries before this one tell."""
        return self._delays("read what was delayed before", self._bases)

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
        what = "read where it stands"
        return Standing(
            dict(
                self._each(what, raised, lambda row: ((row.event, sequence_of(row)), row.raised_at))
            ),
            dict(self._each(what, created.order_by(tasks.task_id), _task_left)),
            self._delays(what, [self.recovery]),
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
        return self._each("read what was triggered before", query, _trigger_again)

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
        return set(self._each("read what was triggered", query, lambda row: str(row.event)))

    def definition_before(self) -> Any:
        """Return the definition that the recoveries before this one recorded last, or None."""
        return self._store.definition(self.run_id, self._lineage)

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

        def work(connection: Connection) -> list[Request]:
            text = texts_of(connection.dialect).waiting
            rows = connection.exec_driver_sql(text, {"of_run_id": self.run_id})
            return [request_of(row) for row in rows]

        return self._store.read("read what was asked of the run", work, self._lease.try_until)

    def answer(self, answers: Mapping[int, Answer]) -> bool:
        """Take note of what becomes of requests, by their numbers, for the next `record`.

        Returns:
            Whether there are any.
        """
        self._answers = answers
        return bool(answers)

    def record(self, changes: Collection[Change], now: datetime) -> None:
        """Write all changes of one pass in one transaction, which also renews the lease.

        Raises:
            OwnershipError: another recovery has begun, since this one was not heard of for longer
                than its lease; nothing is written any more.
        """

        def work(connection: Connection) -> float:
            asked_at = lease.clock()
            self._renew(connection, self._store.backend.hold(connection, self.run_id, now))
            if self._undefined is not None:
                self._define(connection, self._undefined[0])
            batch = Batch(connection, self._here, now)
            for change in changes:
                batch.add(change)
            batch.write()
            if self._answers:
                self._take_up(connection, now)
            if self._lease.is_due(asked_at):  # so much was written that it was long ago
                asked_at = lease.clock()
                self._renew(connection, self._store.backend.clock(connection, now))
            return asked_at

        renewed_at = self._store.write("record what happened", work, self._lease.try_until)
        self._lease.renew(renewed_at)
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
        names = list(steps)

        def work(connection: Connection) -> dict[str, StoredResult | str]:
            found: dict[str, StoredResult | str] = {}
            for start in range(0, len(names), _NAMES_AT_ONCE):
                some = names[start : start + _NAMES_AT_ONCE]
                found |= self._results(connection, some, sequence, earlier)
            return found

        return self._store.read("read results", work, self._lease.try_until)

    def events(
        self, event: str | None = None, sequence: Sequence | None = None
    ) -> list[RaisedEvent]:
        """Return the events that this recovery has raised, in that order."""
        return self._store.events(self.run_id, self.recovery, event, sequence)

    def count(self) -> Counts:
        """Return in numbers how things stand in this recovery."""
        return self._store.count(self.run_id, self.recovery)

    def release(self, now: datetime) -> None:
        """Record that this recovery has no owner any more; if that fails, it has none either."""
        columns = ("owner_host", "owner_pid", "owner_began", "heartbeat_at")
        mine = schema.recovery.c.owner_began == self._claim.began

        def work(connection: Connection) -> None:
            self._store.backend.hold(connection, self.run_id, now)
            connection.execute(
                update(schema.recovery).where(*self._mine(schema.recovery), mine),
                {**dict.fromkeys(columns), "ended_at": now},
            )
            self._store.backend.prove(
                lambda: select(schema.recovery.c.recovery).where(
                    *self._mine(schema.recovery), mine.is_not(True)
                )
            )

        try:
            self._store.write("release the run", work, self._lease.try_until)
        finally:
            owner.disclaim(self._claim)

    def _each(self, what: str, query: Select[Any], made: Callable[[Row], T]) -> list[T]:
        return self._store.each(what, query, made, self._lease.try_until)

    def _delays(self, what: str, recoveries: Collection[int]) -> dict[Wait, datetime]:
        columns = schema.delay.c
        query = select(schema.delay).where(
            columns.run_id == self.run_id, columns.recovery.in_(recoveries)
        )
        return dict(self._each(what, query, _wait_due))

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
                *of_sequence(schema.task, sequence),
            )
            .order_by(columns.recovery.desc())
        )
        tasks: dict[str, list[Row]] = {name: [] for name in steps}
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

    def _renew(self, connection: Connection, clock: datetime) -> None:
        """Be heard of, and make sure that nobody has taken over."""
        texts = texts_of(connection.dialect)
        row = {**self._of_here, **self._keeper, "new_heartbeat_at": texts.time(clock)}
        if connection.exec_driver_sql(texts.renew, row).rowcount:
            columns = schema.recovery.c
            self._store.backend.prove(
                lambda: select(columns.recovery).where(
                    *self._mine(schema.recovery), columns.heartbeat_at == clock
                )
            )
            return
        latest = connection.execute(latest_recovery(self.run_id)).one_or_none()
        here = f"recovery {self.recovery} of run {self.run_id} in {self._store.location}"
        if latest is None or latest.recovery == self.recovery:
            raise OwnershipError(f"{here} is not owned by this Eventor any more")
        raise OwnershipError(
            f"{here} was taken over by recovery {latest.recovery}, {owner_of(latest)}, "
            "since it was not heard of for longer than its lease"
        )

    def _mine(self, table: Table) -> tuple[ColumnElement[bool], ...]:
        return (table.c.run_id == self.run_id, table.c.recovery == self.recovery)


def _begin(
    connection: Connection,
    store: Store,
    claim: Owner,
    name: str,
    beginning: Beginning,
) -> Ledger:
    run_id = insert_row(connection, schema.run, {"name": name, "began_at": beginning.now})
    now = store.backend.clock(connection, beginning.now)
    _insert_recovery(connection, run_id, 0, None, claim, beginning, now)
    store.backend.prove(lambda: _claim_of(claim))
    return Ledger(store, claim, beginning, run_id, 0, ())


def _hold_latest(
    connection: Connection, store: Store, name: str, now: datetime
) -> tuple[int | None, datetime]:
    """Keep others from writing to the latest run of that name; return its number, and the time.

    Before it is held it may be pruned, and another may begin.
    """
    run_id = connection.scalar(latest_run(name))
    while run_id is not None:
        clock = store.backend.hold(connection, run_id, now)
        found, run_id = run_id, connection.scalar(latest_run(name))
        if run_id == found:
            return run_id, clock
    return None, now


def _claim_of(claim: Owner) -> Select[Any]:
    """Return the query for what an owner owns."""
    columns = schema.recovery.c
    return select(columns.recovery).where(
        columns.owner_host == claim.host,
        columns.owner_pid == claim.pid,
        columns.owner_began == claim.began,
    )


@contextmanager
def _claimed() -> Iterator[Owner]:
    """Give a claim that ends if what is done with it fails."""
    claim = owner.claim()
    try:
        yield claim
    except BaseException:
        owner.disclaim(claim)
        raise


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


def _insert_recovery(
    connection: Connection,
    run_id: int,
    recovery: int,
    based_on: int | None,
    claim: Owner,
    beginning: Beginning,
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
        "began_at": beginning.now,
        **_owned(claim, beginning, now),
        "keeper_pid": None if keeper is None else keeper.pid,
        "keeper_began": None if keeper is None else keeper.began,
    }
    connection.execute(insert(schema.recovery), row)


def _owned(claim: Owner, beginning: Beginning, now: datetime) -> dict[str, Any]:
    return {
        "owner_host": claim.host,
        "owner_pid": claim.pid,
        "owner_began": claim.began,
        "program": beginning.program,
        "lease_seconds": beginning.lease_seconds,
        "heartbeat_at": now,
        "ended_at": None,
    }


def _refuse_owned(connection: Connection, run_id: int, now: datetime, to_be: str) -> Owner | None:
    """Return the keeper of a run that nobody owns, if it has had one; it may be at work yet.

    Args:
        connection: to the store.
        run_id: the run.
        now: the time.
        to_be: what is to be done with the run, for the message.

    Raises:
        OwnershipError: the owner of its latest recovery lives.
    """
    row = connection.execute(latest_recovery(run_id)).one()
    if not is_held(row, now):
        if row.keeper_pid is None:
            return None
        return Owner(str(row.owner_host), int(row.keeper_pid), str(row.keeper_began))
    by = owner_of(row)
    held = f"run {run_id} is owned by {by}, in its recovery {row.recovery}, and cannot be {to_be}"
    if owner.is_running(by) is None:
        seen = max(0.0, (now - row.heartbeat_at).total_seconds())
        raise OwnershipError(
            f"{held} yet: that process cannot be looked at from here, was heard of "
            f"{seen:.1f} s ago, and counts as dead after {row.lease_seconds or 0.0:g} s"
        )
    if row.owner_pid == os.getpid():
        raise OwnershipError(f"{held}: that is this program, which has to close it first")
    raise OwnershipError(f"{held} while that process lives")


def _task_left(row: Row) -> tuple[TaskKey, Left]:
    return task_key(row), left_of(row)


def _wait_due(row: Row) -> tuple[Wait, datetime]:
    return Wait(row.event, sequence_of(row), row.seconds), row.due_at


def _trigger_again(row: Row) -> Trigger:
    cause = Cause(CauseKind.recovery, detail=str(row.recovery))
    return Trigger(row.event, sequence_of(row), cause)


def _last_end(tasks: list[Row], recovery: int) -> Row | str:
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


def _result(end: Row, kept: Mapping[int, Row]) -> StoredResult | str:
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


def _parents(connection: Connection, run_id: int) -> dict[int, int | None]:
    """Return the recoveries of a run, and on which each is based."""
    columns = schema.recovery.c
    query = select(columns.recovery, columns.based_on).where(columns.run_id == run_id)
    return {row.recovery: row.based_on for row in connection.execute(query)}
