"""One live owner per run: who may recover, and when."""

import contextlib
import multiprocessing
import os
import socket
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

import eventor as evr
from eventor.storage import owner
from tests.conftest import statuses, wait_until

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def ago(seconds):
    return NOW - timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("running", "heartbeat_at", "held"),
    [
        (True, ago(1000), True),
        (False, ago(0), False),
        (None, ago(9.9), True),
        (None, ago(10), False),
        (None, ago(-1000), True),
        (None, None, False),
    ],
)
def test_whose_process_can_be_seen_needs_no_lease(running, heartbeat_at, held):
    assert owner.holds(running, heartbeat_at, 10, NOW) is held


def test_a_process_is_known_by_its_birth_and_its_place():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        other = owner.process_of(process.pid)
        assert owner.is_running(other) is True
        place, start = other.began.split(" ")
        later = owner.Owner(other.host, other.pid, f"{place} {int(start) + 1}")
        assert owner.is_running(later) is False
        elsewhere = owner.Owner(other.host, other.pid, f"elsewhere {start}")
        assert owner.is_running(elsewhere) is None
        process.kill()
        # As a zombie, which its parent has not yet asked for, it has ended all the same.
        wait_until(lambda: owner.is_running(other) is False)
    assert owner.is_running(other) is False


@pytest.mark.parametrize("began", ["", " ", "x", "None", "a b c d"])
@pytest.mark.parametrize("pid", [0, 1, 2**80, -1])
def test_what_no_eventor_has_written_is_no_running_process(began, pid):
    assert owner.is_running(owner.Owner("h", pid, began)) is None


def test_where_there_is_no_proc_ps_tells(monkeypatch, tmp_path):
    monkeypatch.setattr(owner, "PROC", tmp_path)
    monkeypatch.setattr(owner, "_place", owner._place.__wrapped__)
    assert owner._place() == socket.gethostname()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        other = owner.process_of(process.pid)
        assert owner.is_running(other) is True
        process.kill()
        wait_until(lambda: owner.is_running(other) is False)


def test_a_process_whose_birth_is_hidden_is_left_to_its_lease(monkeypatch):
    hidden = owner.process_of(os.getpid())

    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(owner, "stat_of", refuse)
    assert owner.is_running(hidden) is None


OWNER = """
import os, sys, time, eventor as evr
with evr.Eventor(store=os.environ["STORE"], config={"logdir": "."}) as ev:
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=time.sleep, args=(600,)))
    ev.trigger_event(go)
    ev()
"""


@pytest.fixture
def program(tmp_path, place):
    """Start a program whose step runs, and return its process."""
    path = tmp_path / "owner.py"
    path.write_text(OWNER)
    started = []

    def start():
        environment = {**os.environ, "STORE": place.store}
        process = subprocess.Popen(
            [sys.executable, path], cwd=tmp_path, env=environment, start_new_session=True
        )
        started.append(process)
        query = "SELECT count(*) FROM eventor_task WHERE status = 'active' AND pid IS NOT NULL"
        wait_until(lambda: place.exists() and place.sql(query) == [(1,)])
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def flow(ev):
    ev.add_assoc(ev.add_event("go"), ev.add_step("s", func=int))
    return ev


def test_a_run_is_recovered_only_once_its_owner_is_dead_and_then_at_once(make, program):
    process = program()
    with pytest.raises(evr.OwnershipError) as caught:
        make(run_mode=evr.RunMode.recover)
    told = f"run 1 is owned by process {process.pid} on host {socket.gethostname()!r}"
    assert told in str(caught.value)
    process.kill()
    wait_until(lambda: owner._start_of(process.pid) is None)
    ev = flow(make(run_mode=evr.RunMode.recover))
    assert ev() is True
    assert statuses(ev) == {"s[1]": "success"}


def test_a_recycled_pid_is_not_taken_for_the_owner(make, program, place):
    process = program()
    process.kill()
    process.wait()
    # As if the pid had been given to a process that lives: this one.
    place.sql(f"UPDATE eventor_recovery SET owner_pid = {os.getpid()}")
    assert flow(make(run_mode=evr.RunMode.recover))() is True


def test_an_owner_elsewhere_is_replaced_after_its_lease(make, place):
    make(config={"lease_seconds": 100}).close()
    elsewhere = "owner_host = 'far', owner_pid = 7, owner_began = 'there 1 1'"

    def heard_of(seconds):
        when = (datetime.now(UTC) - timedelta(seconds=seconds)).replace(tzinfo=None)
        place.sql(
            f"UPDATE eventor_recovery SET {elsewhere}, heartbeat_at = '{when}'",
        )

    heard_of(50)
    with pytest.raises(
        evr.OwnershipError, match=r"process 7 on host 'far'.* 5\d\.\d s ago.* 100 s"
    ):
        make(run_mode=evr.RunMode.recover)
    heard_of(101)
    assert make(run_mode=evr.RunMode.recover).recovery == 1


def test_an_owner_that_was_replaced_writes_no_more(make, tmp_path, place):
    ran = tmp_path / "ran"
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=ran.touch))
    far = "UPDATE eventor_recovery SET owner_began = 'far 1 1', heartbeat_at = NULL"
    place.sql(far)
    new = make(run_mode=evr.RunMode.recover)
    ev.trigger_event(go)
    with pytest.raises(evr.OwnershipError, match=r"recovery 0 of run 1 .*taken over by recovery 1"):
        ev()
    assert not ran.exists()
    # Neither does its close take the run from the new owner.
    with pytest.raises(evr.OwnershipError, match="is owned by"):
        make(run_mode=evr.RunMode.recover)
    assert new.events() == []


def test_a_run_whose_row_is_gone_is_not_owned(make, place):
    ev = make()
    place.sql("UPDATE eventor_recovery SET owner_began = NULL")
    with pytest.raises(evr.OwnershipError, match="not owned by this Eventor any more"):
        ev()


def test_in_one_program_a_run_is_recovered_once_it_is_closed(make):
    ev = make()
    for mode, what in (("recover", "recovered"), ("continue", "continued")):
        words = f"cannot be {what}: that is this program, which has to close it first"
        with pytest.raises(evr.OwnershipError, match=words):
            make(run_mode=mode)
    with make() as other:
        assert other.run_id == 2
    ev.close()
    assert make(run_mode=evr.RunMode.recover, name="").recovery == 1


@pytest.mark.stores("sqlite")
def test_what_could_not_be_released_is_let_go_of_all_the_same(make, place):
    # As on a full disk.
    ev = make()
    lock = sqlite3.connect(place.store, isolation_level=None)
    ev._store.backend.engine.connect().exec_driver_sql("PRAGMA busy_timeout = 10").close()
    lock.execute("BEGIN IMMEDIATE")
    ev.close()
    lock.close()
    query = "SELECT owner_pid FROM eventor_recovery "
    assert place.sql(query) == [(os.getpid(),)]
    assert make(run_mode=evr.RunMode.recover).recovery == 1


def test_a_running_flow_is_heard_of_within_its_lease(make, place):
    query = "SELECT heartbeat_at FROM eventor_recovery"

    def step():
        wait_until(lambda: place.sql("SELECT pid FROM eventor_task") != [(None,)])
        first = place.sql(query)
        wait_until(lambda: place.sql(query) > first)

    # Long enough for a busy machine to renew it before its steps would be ended.
    ev = make(config={"lease_seconds": 3})
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=step))
    ev.trigger_event(go)
    assert ev() is True


def test_of_many_recoveries_at_the_same_instant_exactly_one_wins(make, place, tmp_path):
    fork = multiprocessing.get_context("fork")
    make().close()
    rounds, programs = 10, 6
    gate, won = fork.Barrier(programs), fork.Queue()

    def program():
        for number in range(rounds):
            gate.wait(30)
            try:
                ev = evr.Eventor(store=place.store, run_mode="recover", config={"logdir": tmp_path})
            except Exception as error:
                won.put((number, type(error).__name__))
                gate.wait(30)
            else:
                won.put((number, ev.recovery))
                gate.wait(30)
                ev.close()

    processes = [fork.Process(target=program) for _ in range(programs)]
    for process in processes:
        process.start()
    got = sorted((won.get(timeout=60) for _ in range(rounds * programs)), key=str)
    for process in processes:
        process.join()
    won.close()
    won.join_thread()
    lost = [(number, "OwnershipError") for number in range(rounds)]
    expected = [(number, number + 1) for number in range(rounds)] + lost * (programs - 1)
    assert got == sorted(expected, key=str)


def test_a_run_that_was_interrupted_before_it_was_made_is_not_owned(make, monkeypatch):
    make().close()

    def refuse(*_):
        raise evr.StoreError("cannot be read")

    with monkeypatch.context() as patched:
        patched.setattr("eventor.storage.ledger.Ledger.left", refuse)
        with pytest.raises(evr.StoreError):
            make(run_mode=evr.RunMode.recover)
    assert make(run_mode=evr.RunMode.recover).recovery == 2


def test_a_process_that_ends_while_it_is_looked_at_has_ended(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        other = owner.process_of(process.pid)
        stat_of = owner.stat_of

        def late(pid):
            process.kill()
            process.wait()
            return stat_of(pid)

        monkeypatch.setattr(owner, "stat_of", late)
        assert owner.is_running(other) is False


ENDING = """
import atexit, os, sys, threading, time, warnings
from pathlib import Path
import eventor as evr

def step():
    Path("reached").touch()
    while not Path("go").exists():
        time.sleep(0.005)

warnings.simplefilter("ignore")
atexit.register(lambda: Path("ending").touch())
ev = evr.Eventor(store=os.environ["STORE"], config={"logdir": "."})
go = ev.add_event("go")
ev.add_assoc(go, ev.add_step("s", func=step))
ev.trigger_event(go)
threading.Thread(target=ev, daemon=True).start()
while not Path("reached").exists():
    time.sleep(0.005)
"""


def test_a_program_that_ends_while_a_thread_runs_its_flow_owns_it_until_it_is_dead(
    make, start, place, tmp_path
):
    process = start(ENDING, STORE=place.store)
    wait_until((tmp_path / "ending").exists)
    with pytest.raises(evr.OwnershipError, match=f"is owned by process {process.pid}"):
        make(run_mode=evr.RunMode.recover)
    (tmp_path / "go").touch()
    process.wait(30)
    assert flow(make(run_mode=evr.RunMode.recover))() is True


def test_a_run_whose_eventor_was_never_made_whole_is_free(make, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    make().close()
    for arguments in ({}, {"run_mode": "recover"}):
        with monkeypatch.context() as patched:
            patched.setattr("eventor.storage.ledger.Ledger.__init__", interrupt)
            with contextlib.suppress(KeyboardInterrupt):
                make(**arguments)
        make(run_mode=evr.RunMode.recover).close()


def test_an_eventor_in_a_place_that_is_gone_owns_nothing(tmp_path, monkeypatch):
    place = tmp_path / "gone"
    place.mkdir()
    monkeypatch.chdir(place)
    place.rmdir()
    with pytest.raises(evr.ConfigError, match="logdir is 'logs', and the path to it is unknown"):
        evr.Eventor(store=tmp_path / "flow.db", config={"logdir": "logs"})
    with pytest.raises(evr.StoreError, match=r"the store flow.db is no place"):
        evr.Eventor(store="flow.db", config={"logdir": tmp_path})
    assert list(tmp_path.iterdir()) == []
