"""The store under other hands: what other programs read, and what happens when it cannot write."""

import multiprocessing
import sqlite3
import threading

import pytest

import eventor as evr
from eventor import sqlite
from tests.conftest import sql


def test_the_store_is_durable_and_can_be_read_while_it_is_written(make, tmp_path):
    ev = make()
    go = ev.add_event("go")

    def look():
        return sql(
            tmp_path / "flow.db",
            "SELECT step, sequence, sequence_type, status, attempt, cause_kind, cause_source,"
            " ended_at FROM eventor_task",
        )

    ev.add_assoc(go, ev.add_step("look", func=look))
    ev.trigger_event(go, "7")
    assert ev() is True
    assert ev.tasks()[0].result == [
        ("look", "7", "str", "active", 1, "association", "go", None),
    ]
    assert sql(tmp_path / "flow.db", "PRAGMA journal_mode") == [("wal",)]
    with ev._store._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_the_store_carries_its_version_owner_and_lineage(make, tmp_path):
    ev = make(name="mine")
    query = "SELECT name, recovery, based_on, owner_pid IS NULL FROM eventor_recovery, eventor_run"
    assert sql(tmp_path / "flow.db", query) == [("mine", 0, None, 0)]
    ev.close()
    make(name="mine", run_mode="recover").close()
    assert sql(tmp_path / "flow.db", query) == [("mine", 0, None, 1), ("mine", 1, 0, 1)]
    assert sql(tmp_path / "flow.db", "SELECT version FROM eventor_schema") == [(2,)]


def test_a_store_of_an_earlier_version_is_brought_up_to_this_one(make, tmp_path):
    def build(**arguments):
        ev = make(**arguments)
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", func=int))
        return ev, go

    ev, go = build()
    ev.trigger_event(go)
    assert ev() is True
    ev.close()
    store = tmp_path / "flow.db"
    for column in ("keeper_pid", "keeper_began"):
        sql(store, f"ALTER TABLE eventor_recovery DROP COLUMN {column}")
    sql(store, "UPDATE eventor_schema SET version = 1")
    ev, _ = build(run_mode=evr.RunMode.recover)
    assert ev() is True
    assert [task.replay for task in ev.tasks()] == ["skip"]
    assert sql(store, "SELECT version, keeper_pid FROM eventor_schema, eventor_recovery") == [
        (2, None),
        (2, None),
    ]


def test_a_lock_that_is_held_too_long_stops_the_run_and_loses_nothing(make, tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.1)
    ran = tmp_path / "ran"

    def build(**arguments):
        ev = make(**arguments)
        first, second = ev.add_event("first"), ev.add_event("second")
        ev.add_assoc(first, ev.add_step("lock", func=int, triggers={"at_success": second}))
        ev.add_assoc(second, ev.add_step("next", func=ran.touch))
        return ev, first

    ev, first = build()
    ev.trigger_event(first)
    other = sqlite3.connect(tmp_path / "flow.db", isolation_level=None)
    record = ev._ledger.record

    def record_late(changes, now):
        if any(getattr(change, "outcome", None) for change in changes):
            other.execute("BEGIN IMMEDIATE")
        record(changes, now)

    monkeypatch.setattr(ev._ledger, "record", record_late)
    with pytest.raises(evr.StoreError, match=r"flow.db cannot record what happened: .*locked"):
        ev()
    assert not ran.exists()
    with pytest.raises(evr.UsageError, match="recover the run"):
        ev.trigger_event(first)
    other.close()
    ev.close()

    ev, _ = build(run_mode=evr.RunMode.recover)
    assert ev() is True
    assert ran.exists()
    assert [task.replay for task in ev.tasks()] == ["rerun", None]


@pytest.mark.parametrize("empty_file", [False, True])
def test_many_programs_make_one_store_at_the_same_time(tmp_path, empty_file):
    """Each gets a run of its own, and what one of them made is never taken from the others."""
    fork = multiprocessing.get_context("fork")
    place, rounds, programs = tmp_path / "stores", 10, 8
    place.mkdir()
    if empty_file:
        for number in range(rounds):
            (place / f"{number}.db").touch()
    gate, made = fork.Barrier(programs), fork.Queue()

    def program():
        for number in range(rounds):
            gate.wait(30)
            try:
                with evr.Eventor(store=place / f"{number}.db", config={"logdir": tmp_path}) as ev:
                    made.put((number, ev.run_id))
            except Exception as error:
                made.put((number, repr(error)))

    processes = [fork.Process(target=program) for _ in range(programs)]
    for process in processes:
        process.start()
    got = {made.get(timeout=60) for _ in range(rounds * programs)}
    for process in processes:
        process.join()
    made.close()
    made.join_thread()
    assert got == {(n, run + 1) for n in range(rounds) for run in range(programs)}
    assert not [path for path in place.iterdir() if ".new" in path.name]


def test_another_thread_reads_while_the_flow_runs(make):
    ev = make(store=":memory:", config={"task_construct": threading.Thread})
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=lambda: [str(task.status) for task in ev.tasks()]))
    ev.trigger_event(go)
    assert ev() is True
    assert ev.tasks()[0].result == ["active"]


def test_triggers_that_were_never_run_are_recorded_at_the_close(make):
    with make() as ev:
        ev.trigger_event(ev.add_event("go"), 5)
    ev = make(run_mode=evr.RunMode.recover)
    ev.add_assoc(ev.add_event("go"), ev.add_step("s", func=int))
    assert ev() is True
    assert [task.sequence for task in ev.tasks(status="success")] == [5]
