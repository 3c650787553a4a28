"""Pruning: the rule that tells which runs of a store are deleted, and what deletes them."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, delete, exists, literal, select

from eventor.errors import ConfigError
from eventor.storage import schema
from eventor.storage.history import History
from eventor.storage.store import is_held, latest_recovery
from eventor.types import OwnerStatus

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from datetime import timedelta

    from sqlalchemy import Connection

    from eventor.storage.backend import Backend
    from eventor.storage.store import Store
    from eventor.types import Run


def to_prune(
    runs: Iterable[Run], keep: int | None, older_than: timedelta | None, now: datetime
) -> list[Run]:
    """Return the runs that a rule deletes: a run is deleted if all that is given says so.

    Args:
        runs: all runs, or those of a name.
        keep: of each name, this many of the newest stay.
        older_than: a run stays that was heard of within this time.
        now: the time, in UTC.

    Returns:
        Those to delete, the first to begin first; never one that is live.

    Raises:
        ConfigError: neither is given, so that all runs would be deleted.
    """
    if keep is None and older_than is None:
        raise ConfigError("neither keep nor older_than is given; expected one of them, or both")
    newer: Counter[str] = Counter()
    found = []
    for run in sorted(runs, key=lambda run: run.run_id, reverse=True):
        newer[run.name] += 1
        if run.recoveries[-1].owner is OwnerStatus.live:
            continue
        beyond = keep is None or newer[run.name] > keep
        if beyond and (older_than is None or now - last_heard_of(run) > older_than):
            found.append(run)
    return found[::-1]


def last_heard_of(run: Run) -> datetime:
    """Return when a run has ended, or was last heard of, in UTC."""
    return max(
        moment
        for each in run.recoveries
        for moment in (each.began_at, each.heard_at, each.ended_at)
        if moment is not None
    )


def prune(
    store: Store,
    name: str | None = None,
    keep: int | None = None,
    older_than: timedelta | None = None,
) -> list[Run]:
    """Delete runs with all that belongs to them, in one transaction.

    A run that was taken up, continued or recovered by a program in the meantime stays.

    Args:
        store: open to be pruned.
        name: only runs of this name; those of each name by default.
        keep: as in `to_prune`.
        older_than: as in `to_prune`.

    Returns:
        The runs that were deleted, as they were.

    Raises:
        ConfigError: neither `keep` nor `older_than` is given.
        StoreError: nothing could be deleted; all is as it was.
    """
    now = datetime.now(UTC)
    chosen = to_prune(History(store).runs(name), keep, older_than, now)
    if not chosen:
        return []

    def work(connection: Connection) -> list[Run]:
        unchanged = [run for run in chosen if _is_unchanged(connection, store.backend, run)]
        if unchanged:
            gone = [run.run_id for run in unchanged]
            _delete(connection, store.backend, gone)
            left = exists().where(schema.run.c.run_id.in_(gone))
            store.backend.prove(lambda: select(literal(1)).where(~left))
        return unchanged

    return store.write("delete runs", work)


def give_back(store: Store) -> bool:
    """Give the space of what was deleted back to the file system, unless a run is live.

    It may take longer than the owner of a live run would wait for. SQLite uses the space again.

    Args:
        store: open to be pruned.

    Returns:
        Whether it was given back.

    Raises:
        StoreError: it could not be, for example because the disk is too full for a second copy.
    """
    if any(run.recoveries[-1].owner is OwnerStatus.live for run in History(store).runs()):
        return False
    store.shrink()
    return True


def _is_unchanged(connection: Connection, backend: Backend, run: Run) -> bool:
    """Tell whether no program has begun to run, or has run, what was seen to be at rest."""
    now = backend.hold(connection, run.run_id, datetime.now(UTC))
    latest = connection.execute(latest_recovery(run.run_id)).one_or_none()
    if latest is None or is_held(latest, now):
        return False
    seen = run.recoveries[-1]
    found = (latest.recovery, latest.heartbeat_at, latest.ended_at)
    return found == (seen.recovery, seen.heard_at, seen.ended_at)


def _delete(connection: Connection, backend: Backend, run_ids: Collection[int]) -> None:
    kept = schema.task.c.result_id
    results = [
        result_id
        for run_id in run_ids
        for result_id in connection.scalars(
            select(kept).where(schema.task.c.run_id == run_id, kept.is_not(None)).distinct()
        )
    ]
    runs = [{"of_run": run_id} for run_id in run_ids]
    # What refers to another stands after it, and goes before it.
    for table in reversed(schema.metadata.sorted_tables):
        if "run_id" in table.c:
            connection.execute(delete(table).where(table.c.run_id == bindparam("of_run")), runs)
    if results:
        backend.delete_results(connection, results)
