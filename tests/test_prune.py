"""Pruning: which runs are deleted, that all of them goes, and never one that is live."""

import contextlib
import multiprocessing
import os
import sqlite3
from datetime import UTC, datetime, timedelta

import pytest

import eventor as evr
from eventor.storage import schema
from eventor.storage.backend import Access
from eventor.storage.location import locate
from eventor.storage.prune import give_back, prune, to_prune
from eventor.storage.store import Store
from tests.conftest import wait_until

FORK = multiprocessing.get_context("fork")
NOW = datetime(2030, 1, 1, tzinfo=UTC)
TABLES = [table.name for table in schema.metadata.sorted_tables if table is not schema.schema]


def run(number, name="", days=0.0, owner="ended"):
    at = NOW - timedelta(days=days)
    times = {"ended_at": at, "heard_at": None}
    if owner != "ended":
        times = {"ended_at": None, "heard_at": at}
    recovery = evr.Recovery(
        0,
        None,
        NOW - timedelta(days=1000),
        evr.OwnerStatus(owner),
        None,
        status=evr.RunStatus.succeeded,
        tasks=evr.TaskCounts(),
        **times,
    )
    return evr.Run(number, name, recovery.began_at, (recovery,))


@pytest.mark.parametrize(
    ("keep", "days", "gone"),
    [
        (0, None, [1, 2, 3, 5]),
        (1, None, [1, 2, 3]),
        (2, None, [1]),
        (9, None, []),
        (None, 30, [1, 2]),
        (None, 5, [1, 2, 5]),
        (None, 1000, []),
        (2, 5, [1]),
        (2, 1000, []),
    ],
)
def test_runs_are_chosen_by_their_rank_within_their_name_and_by_their_age(keep, days, gone):
    runs = [
        run(1, "a", 90),
        run(2, "b", 60),
        run(3, "a", 2, "dead"),
        run(4, "a", 1, "live"),
        run(5, "b", 10),
    ]
    older_than = None if days is None else timedelta(days=days)
    assert [each.run_id for each in to_prune(runs, keep, older_than, NOW)] == gone


def test_without_a_rule_nothing_is_deleted():
    with pytest.raises(evr.ConfigError, match="neither keep nor older_than is given"):
        to_prune([run(1)], None, None, NOW)


@contextlib.contextmanager
def opened(place):
    with contextlib.closing(Store(locate(place.store), Access.prune)) as store:
        yield store


def flow(ev, result=None, **config):
    go = ev.add_event("go")
    later = ev.add_event("later")
    ev.add_assoc(go, ev.add_step("s", lambda: result or os.urandom(40_000), config=config))
    ev.add_assoc(go, ev.add_step("fails", lambda: 1 / 0, config={"max_attempts": 2}))
    ev.add_assoc(go, later, delay=0.001)
    return go


def rows(place):
    counts = {table: f"SELECT count(*) FROM {table}" for table in TABLES}
    return {table: place.sql(count)[0][0] for table, count in counts.items()}


def test_all_that_belongs_to_a_run_goes_and_nothing_else(make, place):
    def once(mode, name):
        ev = make(name=name, run_mode=mode, config={"stop_on_exception": False})
        go = flow(ev)
        with evr.attach(place.store, name) as attached:
            attached.trigger("go", "asked")
        if mode == "restart":
            ev.trigger_event(go)
        ev()
        ev.close()

    once("restart", "kept")
    before = rows(place)
    assert all(before.values())
    for mode in ("restart", "recover", "restart"):
        once(mode, "old")
    with opened(place) as store:
        gone = prune(store, "old", keep=0)
        assert [(each.run_id, len(each.recoveries)) for each in gone] == [(2, 2), (3, 1)]
        assert rows(place) == before
        assert prune(store, "old", keep=0) == []
    once("recover", "kept")
    ev = make(name="old")
    assert ev.run_id == 4, "the number of a run is not given again"


@pytest.mark.stores("sqlite")
def test_the_file_is_whole_and_smaller_afterwards(make, place):
    ev = make()
    ev.trigger_event(flow(ev))
    ev()
    ev.close()
    with opened(place) as store:
        assert len(prune(store, keep=0)) == 1
        size = place.store.stat().st_size
        assert give_back(store) is True
        assert place.store.stat().st_size < size
    assert place.sql("PRAGMA foreign_key_check") == []
    assert place.sql("PRAGMA integrity_check") == [("ok",)]
    assert place.sql("SELECT name FROM sqlite_master WHERE name = 'eventor_pruning'") == []


def test_a_live_run_stays_and_its_owner_need_not_wait(make, place):
    make().close()
    make()
    with opened(place) as store:
        assert [each.run_id for each in prune(store, keep=0)] == [1]
        assert [each.run_id for each in prune(store, older_than=timedelta(0))] == []


def test_an_owner_elsewhere_that_was_replaced_by_nobody_finds_its_run_gone(make, place):
    ev = make()
    go = flow(ev)
    ev.trigger_event(go)
    gone = "UPDATE eventor_recovery SET owner_began = 'elsewhere', heartbeat_at = '2020-01-01'"
    place.sql(gone)
    with opened(place) as store:
        assert len(prune(store, keep=0)) == 1
    with pytest.raises(evr.OwnershipError, match="is not owned by this Eventor any more"):
        ev()


@pytest.mark.parametrize("then", ["recovered", "recovered and closed", "pruned"])
def test_a_run_that_has_changed_since_it_was_chosen_stays(make, place, monkeypatch, then):
    make().close()

    def meanwhile(*arguments):
        chosen = to_prune(*arguments)
        if then == "pruned":
            with opened(place) as other:
                monkeypatch.undo()
                assert len(prune(other, keep=0)) == 1
            return chosen
        ev = make(run_mode="continue")
        if then == "recovered and closed":
            ev.close()
        return chosen

    monkeypatch.setattr("eventor.storage.prune.to_prune", meanwhile)
    with opened(place) as store:
        assert prune(store, keep=0) == []
    assert rows(place)["eventor_run"] == (0 if then == "pruned" else 1)


def test_what_cannot_be_deleted_is_all_still_there(make, place):
    for _ in range(2):
        ev = make(config={"stop_on_exception": False})
        ev.trigger_event(flow(ev))
        ev()
        ev.close()
    before = rows(place)
    place.sql(
        "CREATE TABLE other (run_id INTEGER REFERENCES eventor_run)",
        "INSERT INTO other VALUES (2)",
    )
    told = "(?i)cannot delete runs: .*foreign key constraint"
    with opened(place) as store, pytest.raises(evr.StoreError, match=told):
        prune(store, keep=0)
    assert rows(place) == before


@pytest.mark.stores("sqlite")
def test_space_that_cannot_be_given_back_is_told_of(make, place, monkeypatch):
    make().close()
    monkeypatch.setattr("eventor.storage.sqlite.BUSY_SECONDS", 0.01)
    with opened(place) as store:
        with contextlib.closing(sqlite3.connect(place.store)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(evr.StoreError, match="cannot give space back: database is locked"):
                give_back(store)
        assert give_back(store) is True


def test_where_there_is_nothing_to_prune(tmp_path):
    (tmp_path / "empty.db").touch()
    for name, words in [("none.db", "does not exist"), ("empty.db", "is empty")]:
        with pytest.raises(evr.RecoveryError, match=f"nothing to prune: the store .*{words}"):
            Store(locate(tmp_path / name), Access.prune)


def recovers(place, logdir, told):
    """Recover the run again and again, and tell how often; end when it is gone."""
    recovered = 0
    while True:
        try:
            config = {"logdir": logdir}
            with evr.Eventor(store=place.store, run_mode="recover", config=config) as ev:
                recovered += 1
                told.value = recovered
                go = ev.add_event("go")
                ev.add_assoc(go, ev.add_step("s", int))
                ev.trigger_event(go, recovered)
                assert ev() is True
        except evr.RecoveryError:
            return


def test_pruning_beside_a_program_that_recovers_the_run_again_and_again(make, place, tmp_path):
    make().close()
    told = FORK.Value("i", 0)
    program = FORK.Process(target=recovers, args=(place, tmp_path, told))
    program.start()
    wait_until(lambda: told.value >= 3)
    with opened(place) as store:
        wait_until(lambda: prune(store, keep=0))
    program.join()
    # No recovery was deleted under a live owner: that would be an OwnershipError there.
    assert program.exitcode == 0
    assert set(rows(place).values()) == {0}
