"""No leftovers: when the owner dies, so do its steps and what they have started."""

import math
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import eventor as evr
from eventor.steps import task
from eventor.steps.keeper import Groups, Keeper
from eventor.storage import lease, owner
from tests.conftest import wait_until

pytestmark = pytest.mark.stores("either")

PROGRAM = """
import multiprocessing, os, signal, subprocess, sys, threading, time, hashlib
from pathlib import Path
import eventor as evr

HAS_PROC = Path("/proc/self/stat").exists()
STORE = os.environ["STORE"]

def tell(*pids):
    Path("draft").write_text(" ".join(map(str, [os.getpid(), *pids])))
    Path("draft").rename("reached")

def deaf():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    grandchild = subprocess.Popen(
        [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '600'])"]
    )
    apart = [subprocess.Popen(["sleep", "600"], process_group=0)] if HAS_PROC else []
    tell(child.pid, grandchild.pid, *(process.pid for process in apart))
    hashlib.pbkdf2_hmac("sha256", b"in a C call", b"", 1 << 26)

def leave():
    child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
    Path("left").write_text(str(child.pid))
    child.returncode = 0

def behind():
    tell(Path("left").read_text())
    time.sleep(600)

def await_kill():
    Path("awaited").touch()
    while not Path("killed").exists():
        time.sleep(0.005)

def build(store, first, second=deaf, **config):
    ev = evr.Eventor(store=store, config={"logdir": ".", **config})
    one, two = ev.add_event("one"), ev.add_event("two")
    ev.add_assoc(one, ev.add_step("first", func=first, triggers={"at_success": two}))
    ev.add_assoc(two, ev.add_step("second", func=second))
    ev.trigger_event(one)
    return ev

if __name__ == "__main__":
    what = sys.argv[1]
    if what == "fork":
        build(STORE, deaf)()
    elif what == "spawn":
        build(STORE, deaf, task_construct=multiprocessing.get_context("spawn").Process)()
    elif what == "leave":
        build(STORE, leave, behind)()
    elif what == "kill keeper":
        build(STORE, await_kill)()
    elif what == "kill it later":
        def later():
            deaf_child = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
            await_kill()
            tell(deaf_child.pid)
            time.sleep(600)
        build(STORE, int, later)()
    elif what == "side by side":
        # Each holds the other's pipe open.
        def other():
            Path("its draft").write_text(str(os.getpid()))
            Path("its draft").rename("other")
            time.sleep(600)
        def first():
            while not Path("other").exists():
                time.sleep(0.005)
            tell(Path("other").read_text())
            time.sleep(600)
        threading.Thread(target=build("other.db", other)).start()
        build(STORE, first)()
    elif what == "held":
        # A child of the program holds the pipe of the keeper open.
        def other(*_):
            if os.fork() == 0:
                os.closerange(0, 3)
                Path("held").touch()
                while not Path("over").exists():
                    time.sleep(0.005)
                os._exit(0)
        signal.signal(signal.SIGUSR1, other)
        def held():
            os.kill(os.getppid(), signal.SIGUSR1)
            while not Path("held").exists():
                time.sleep(0.005)
            deaf()
        build(STORE, held)()
    elif what == "end":
        assert build(STORE, leave, int)() is True
        child = int(Path("left").read_text())
        os.kill(child, signal.SIGKILL)
        try:
            print(os.waitpid(-1, 0))
        except ChildProcessError:
            print("no child is left")
"""


def keeper(place):
    ((pid,),) = place.sql("SELECT keeper_pid FROM eventor_recovery")
    return pid


def gone(pid):
    return owner._start_of(int(pid)) is None


@pytest.mark.parametrize(
    ("what", "number"),
    [
        *(("fork", number) for number in (signal.SIGKILL, signal.SIGHUP, signal.SIGABRT)),
        ("leave", signal.SIGHUP),
        ("kill keeper", signal.SIGKILL),
        ("kill it later", signal.SIGKILL),
        ("side by side", signal.SIGKILL),
        ("held", signal.SIGKILL),
        pytest.param("spawn", signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_what_steps_have_started_dies_with_the_owner(start, tmp_path, what, number, place):
    process = start(PROGRAM, what, options=("-W", "ignore"), STORE=place.store)
    killed = None
    if what.startswith("kill"):
        wait_until(lambda: (tmp_path / "awaited").exists() and keeper(place) is not None)
        killed = keeper(place)
        os.kill(killed, signal.SIGKILL)
        (tmp_path / "killed").touch()
    wait_until((tmp_path / "reached").exists)
    pids = (tmp_path / "reached").read_text().split()
    assert len(pids) > 1
    assert not any(map(gone, pids))
    # One that was killed is soon replaced; it need not have died yet.
    wait_until(lambda: keeper(place) != killed)
    assert not gone(keeper(place))
    pids.append(keeper(place))
    process.send_signal(number)
    process.wait(30)
    wait_until(lambda: all(map(gone, pids)))
    (tmp_path / "over").touch()


def test_what_a_step_has_left_outlives_a_flow_that_ends_well(script, place):
    ran = script(PROGRAM, "end", STORE=place.store)
    assert ran.stdout == "no child is left\n", ran.stderr


def test_a_keeper_ends_what_an_owner_has_started_that_has_let_its_lease_run_out():
    keeper = Keeper()
    steps = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2)]
    try:
        keeper.ensure([step.pid for step in steps])
        keeper.allow_until(lease.clock() + 60)
        keeper.allow_until(math.inf)  # there is nobody who could take over
        keeper.allow_until(lease.clock() + 0.1)
        assert [step.wait(30) for step in steps] == [-signal.SIGKILL] * 2
        # It may have been renewed after all, and more may start.
        keeper.allow_until(lease.clock() + 60)
        steps.append(subprocess.Popen(["true"], start_new_session=True))
        assert steps[-1].wait(30) == 0
    finally:
        for step in steps:
            step.kill()
            step.wait()
        keeper.close(kill=False)


def records(*messages):
    return b"".join(struct.pack("=cq", what, group) for what, group in messages)


def test_the_keeper_knows_which_groups_may_still_have_processes():
    sent, empty = [], {2}

    def signal_group(group, number):
        if group in empty:
            raise ProcessLookupError
        sent.append((group, number))

    groups = Groups(signal_group)
    data = records((b"+", 1), (b"+", 2), (b"+", 3), (b"-", 2), (b"-", 3), (b"-", 9))
    for cut in range(len(data)):
        groups.take(data[cut : cut + 1])
    empty.add(9)
    groups.forget_empty()
    sent.clear()
    groups.kill()
    assert sorted(sent) == [(1, signal.SIGKILL), (3, signal.SIGKILL)]
    groups.kill()
    assert len(sent) == 2


def test_a_recovery_waits_until_the_steps_of_a_dead_owner_are_ended(make, place, monkeypatch):
    make().close()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        keeper = owner.process_of(process.pid)
        here = keeper.began.split(" ")[0]
        place.sql(
            f"UPDATE eventor_recovery SET owner_host = 'h', owner_pid = {os.getpid()}, "
            f"owner_began = '{here} 1 1', keeper_pid = {keeper.pid}, "
            f"keeper_began = '{keeper.began}'",
        )
        monkeypatch.setattr("eventor.eventor._KEEPER_SECONDS", 0.05)
        with pytest.raises(evr.RecoveryError, match=f"still being ended by process {keeper.pid}"):
            make(run_mode=evr.RunMode.recover)
        process.kill()
    assert make(run_mode=evr.RunMode.recover).recovery == 2


def test_who_recovers_next_waits_too_if_a_recovery_has_waited_in_vain(make, place, monkeypatch):
    make().close()
    monkeypatch.setattr("eventor.eventor._KEEPER_SECONDS", 0.05)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        keeper = owner.process_of(process.pid)
        here = keeper.began.split(" ")[0]
        dead = f"owner_host = 'h', owner_pid = {os.getpid()}, owner_began = '{here} 1 1'"
        kept = f"keeper_pid = {keeper.pid}, keeper_began = '{keeper.began}'"
        place.sql(f"UPDATE eventor_recovery SET {dead}, {kept}")
        for died in ("", f"UPDATE eventor_recovery SET {dead} WHERE recovery = 2"):
            for _ in range(2):
                with pytest.raises(evr.RecoveryError, match="still being ended"):
                    make(run_mode=evr.RunMode.recover)
            place.sql(died)
        process.kill()
    ev = make(run_mode=evr.RunMode.recover)
    ev.add_assoc(ev.add_event("go"), ev.add_step("s", func=int))
    assert ev() is True
    ev.close()
    assert make(run_mode=evr.RunMode.recover).recovery == 6


def test_a_step_that_finds_its_owner_dead_does_not_begin(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as dead:
        was = owner.process_of(dead.pid)
        dead.kill()
    reading, pipe = multiprocessing.Pipe(duplex=False)
    reading.close()  # as its keeper is dead, too
    own, its = task.pipe()
    origin = task.Origin(was, task.LogLevels.of_this_process(), frozenset(), pipe, 1, 0, {})
    call = task.Call("s", 1, 1, (tmp_path / "ran").touch, (), {}, None)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=task.main, args=(task.Job(call, {}, 1), its, origin))
    process.start()
    process.join()
    assert process.exitcode == 1
    process.close()
    assert not (tmp_path / "ran").exists()
    for connection in (pipe, own, its):
        connection.close()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="there is no /proc here")
def test_a_keeper_is_out_of_reach_and_holds_nothing(make, place):
    def step():
        wait_until(lambda: keeper(place) is not None)
        pid = keeper(place)

        def look():
            apart = os.getsid(pid) == pid != os.getsid(os.getppid())
            return apart, len(list(Path(f"/proc/{pid}/fd").iterdir()))

        # It is recorded when it is forked, and lets go of all that by itself.
        wait_until(lambda: look() == (True, 4))

    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=step))
    ev.trigger_event(go)
    assert ev() is True
