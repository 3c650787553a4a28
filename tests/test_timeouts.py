"""Timeouts: what runs for too long is ended with all that it has started, and has failed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import eventor as evr
from eventor import launch, worker
from tests.conftest import wait_until

SPAWN = multiprocessing.get_context("spawn").Process
CONSTRUCTS = [{}, {"max_tasks_per_child": None}, {"task_construct": SPAWN}]
LATE = "TimeoutError: the step ran for longer than its timeout of 0.2 s"


@pytest.fixture
def limited(make, monkeypatch):
    """Make a flow of steps with a timeout; what ends by force does so soon."""
    monkeypatch.setattr(worker, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.3)

    def build(*funcs, timeout=0.2, step=None, **config):
        ev = make(config={"stop_on_exception": False, "max_concurrent": 9, **config})
        go = ev.add_event("go")
        for number, (func, *args) in enumerate(funcs):
            settings = {"timeout": timeout, **(step or {})}
            ev.add_assoc(go, ev.add_step(f"s{number}", func, args=tuple(args), config=settings))
        ev.trigger_event(go, 1)
        return ev

    return build


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def sleep_deaf(path):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    path.write_text(str(os.getpid()))
    time.sleep(60)


def sleep_politely(path):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    path.write_text(str(os.getpid()))
    time.sleep(60)


def stand_still(path):
    path.write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("func", [sleep_deaf, sleep_politely, stand_still])
@pytest.mark.parametrize("config", CONSTRUCTS, ids=["fork", "kept", "spawn"])
def test_what_takes_too_long_is_ended(limited, tmp_path, config, func):
    path = tmp_path / "pid"
    # A spawned process takes its time to begin, and that counts.
    timeout = 3 if config.get("task_construct") is SPAWN else 0.2
    ev = limited((int,), (func, path), (int,), timeout=timeout, **config)
    assert ev() is False
    told = LATE.replace("0.2", str(timeout))
    assert [task.error for task in ev.tasks()] == [None, told, None]
    assert not is_alive(int(path.read_text()))


def start_others(path):
    """Start a child that does not hear SIGTERM, and one that has left the group."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True)"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", f"{code}; time.sleep(60)"], stdout=subprocess.PIPE, **more
        )
        for more in ({}, {"process_group": 0})
    ]
    for child in children:
        child.stdout.readline()
    path.write_text(" ".join(str(child.pid) for child in children))
    time.sleep(60)


def test_what_it_has_started_is_ended_too(limited, tmp_path):
    path = tmp_path / "pids"
    ev = limited((start_others, path), timeout=2)
    assert ev() is False
    assert ev.tasks()[0].error == LATE.replace("0.2", "2")
    wait_until(lambda: not any(map(is_alive, map(int, path.read_text().split()))))


def test_others_go_on_meanwhile(limited, tmp_path):
    """While a deaf step is being ended, others start, end, and are recorded."""
    ev = limited((sleep_deaf, tmp_path / "pid"), max_concurrent=2)
    go, done = ev._flow.events["go"], ev.add_event("done")
    ended = tmp_path / "ended"
    ev.add_assoc(go, ev.add_step("wait", wait_until, args=((tmp_path / "pid").exists,)))
    last = ev.add_step("last", ended.touch)
    ev.add_assoc(done, last)
    wait = ev._flow.steps["wait"]
    ev.add_assoc(wait.success, done)
    assert ev() is False
    late, _, after = ev.tasks()
    assert after.ended_at < late.ended_at


def test_an_outcome_that_came_in_time_counts(limited):
    def linger():
        threading.Thread(target=time.sleep, args=(0.5,)).start()
        return "in time"

    ev = limited((linger,), timeout=0.3)
    assert ev() is True
    assert ev.tasks()[0].result == "in time"


@pytest.mark.parametrize(
    ("retry_on", "attempts"), [(None, 2), ((TimeoutError,), 2), ((OSError,), 2), ((ValueError,), 1)]
)
def test_a_timeout_is_tried_again_as_a_timeout_error(limited, retry_on, attempts):
    step = {"max_attempts": 2, "retry_on": retry_on}
    ev = limited((time.sleep, 60), step=step)
    assert ev() is False
    assert [attempt.error for attempt in ev.tasks()[0].attempts] == [LATE] * attempts


def test_a_timeout_counts_for_each_attempt(limited, tmp_path):
    def second_is_quick():
        if not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            time.sleep(60)

    ev = limited((second_is_quick,), step={"max_attempts": 2})
    assert ev() is True


def test_a_kept_process_that_is_late_is_replaced_and_others_stay(limited, tmp_path):
    config = {"max_tasks_per_child": None, "max_concurrent": 1}
    ev = limited((os.getpid,), (time.sleep, 60), (os.getpid,), (os.getpid,), **config)
    assert ev() is False
    first, _, third, fourth = (task.pid for task in ev.tasks())
    assert first != third == fourth


@pytest.mark.parametrize("key", ["timeout", "capture_output"])
def test_a_thread_cannot_have_it(make, key):
    ev = make(config={"task_construct": threading.Thread})
    words = f"{key} in the config of step 's' is .*, and the task_construct threading.Thread runs"
    with pytest.raises(evr.ConfigError, match=words):
        ev.add_step("s", int, config={key: 1 if key == "timeout" else True})
    ev.add_step("s", int)


@pytest.mark.parametrize("timeout", [0, -1, "1", True, float("inf"), float("nan")])
def test_a_bad_timeout_is_named(make, timeout):
    words = rf"timeout in the config of step 's' is {timeout!r}; expected a finite number of sec"
    with pytest.raises(evr.ConfigError, match=words):
        make().add_step("s", int, config={"timeout": timeout})
