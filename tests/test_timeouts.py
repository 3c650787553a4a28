"""A step that runs for longer than its timeout is ended, with all that it has started."""

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
from eventor.steps.launch import Launcher
from eventor.storage import owner
from tests.conftest import statuses, wait_until

pytestmark = pytest.mark.stores("either")

SPAWN = multiprocessing.get_context("spawn").Process
CONSTRUCTS = [
    pytest.param({}, id="fork"),
    pytest.param({"max_tasks_per_child": None}, id="warm"),
    pytest.param({"task_construct": SPAWN}, id="spawn"),
]
FOREVER = 600
TOLD = "TimeoutError: the step ran for longer than its timeout of 0.3 s"
TOLD_FOREVER = TOLD.replace("0.3", f"{FOREVER}")
HAS_PROC = Path("/proc/self/stat").exists()


@pytest.fixture
def line(make):
    """Let steps follow each other, given as functions or with their timeouts."""

    def build(*steps, **config):
        ev = make(config=config)
        events = [ev.add_event(f"e{number}") for number in range(len(steps) + 1)]
        for number, given in enumerate(steps):
            func, timeout = given if isinstance(given, tuple) else (given, None)
            triggers = {"at_complete": events[number + 1]}
            step = ev.add_step(f"s{number}", func, triggers=triggers, config={"timeout": timeout})
            ev.add_assoc(events[number], step)
        ev.trigger_event(events[0])
        return ev

    return build


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr("eventor.steps.worker.GRACE_SECONDS", 0.4)


@pytest.fixture
def long_grace(monkeypatch):
    """Let what obeys take as long as a busy machine makes it take."""
    monkeypatch.setattr("eventor.steps.worker.GRACE_SECONDS", 60)


def be_late_when(condition, monkeypatch):
    """Let the time of what runs be over once a condition holds, and not before."""
    wait = Launcher.wait

    def wait_for_it(launcher, bell, seconds):
        for worker in launcher._limited:
            if not worker.is_late and condition():
                worker.due = 0
        wait(launcher, bell, min(seconds, 0.01))

    monkeypatch.setattr(Launcher, "wait", wait_for_it)


def is_gone(pid):
    return owner._start_of(pid) is None


def errors(ev):
    return [task.error for task in ev.tasks()]


def sleep():
    """Sleep for ever; a signal that came just before one long sleep would be heard at its end."""
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize("config", CONSTRUCTS)
def test_a_step_that_takes_too_long_fails_alone(line, config):
    """Also one that was forked ahead, as the third is by default, or whose process is used again.

    A spawned process has to import the tests within the timeout of its step.
    """
    quick = (int, 60)
    ev = line(quick, int, (sleep, 0.3), quick, (sleep, 0.3), os.getpid, **config)
    assert ev() is True
    assert errors(ev) == [None, None, TOLD, None, TOLD, None]
    assert all(is_gone(task.pid) for task in ev.tasks())


def ignore():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(FOREVER)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("config", CONSTRUCTS[:2])
@pytest.mark.parametrize("func", [ignore, stop])
def test_a_step_that_cannot_be_told_to_end_is_killed(line, short_grace, config, func):
    ev = line(int, (func, 0.3), int, **config)
    assert ev() is True
    assert errors(ev) == [None, TOLD, None]


def deaf_and_stopped():
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
    stop()


def test_a_step_that_stops_itself_when_told_to_end_is_killed(line, short_grace):
    ev = line((deaf_and_stopped, 0.3))
    assert ev() is True
    assert errors(ev) == [TOLD]


@pytest.mark.parametrize("config", CONSTRUCTS[:2])
@pytest.mark.parametrize(
    "ends",
    [lambda *_: sys.exit(0), lambda *_: os._exit(0), lambda *_: 1 / 0],
    ids=["sys.exit", "os._exit", "raise"],
)
def test_what_a_late_step_says_does_not_count(line, config, ends):
    def obey():
        signal.signal(signal.SIGTERM, ends)
        sleep()

    ev = line((obey, 0.3), os.getpid, **config)
    assert ev() is True
    assert errors(ev) == [TOLD, None]
    assert ev.tasks()[0].pid != ev.tasks()[1].pid
    assert ev.tasks()[0].traceback is None


@pytest.mark.parametrize("config", CONSTRUCTS[:2])
def test_what_a_late_step_triggers_before_it_is_dead_is_raised(make, config, tmp_path, monkeypatch):
    """So no trigger that has returned is lost, in whichever moment the time was over."""
    ev = make(config=config)
    go, said = ev.add_event("go"), ev.add_event("said")

    def late():
        signal.signal(signal.SIGTERM, lambda *_: evr.current().trigger(said) and os._exit(0))
        (tmp_path / "begun").touch()
        sleep()

    be_late_when((tmp_path / "begun").exists, monkeypatch)
    late = ev.add_step("late", late, config={"timeout": FOREVER, "stop_on_exception": False})
    ev.add_assoc(go, late)
    ev.add_assoc(said, ev.add_step("next", int))
    ev.trigger_event(go)
    assert ev() is False
    assert statuses(ev) == {"late[1]": "failure", "next[1]": "success"}
    (raised,) = [one for one in ev.events() if one.event == "said"]
    assert (raised.cause.kind, raised.cause.source) == ("step", "late")


def test_an_end_that_came_in_time_counts_however_late_the_owner_looks(line, monkeypatch):
    ev = line((lambda: 7, 1e-6))
    report = ev._journal.say

    def slow(level, message, *details):
        if message.startswith("Running step"):
            wait_until(lambda: not multiprocessing.active_children())
        report(level, message, *details)

    monkeypatch.setattr(ev._journal, "say", slow)
    assert ev() is True
    assert ev.tasks()[0].result == 7


def test_what_a_late_step_has_started_has_time_to_end(line, tmp_path, long_grace, monkeypatch):
    """Though the step itself ends at once; SIGTERM is blocked until there is who takes it."""
    code = """if True:
        import pathlib, signal, time
        def obey(*_):
            time.sleep(0.2)
            pathlib.Path("in order").touch()
            raise SystemExit
        signal.signal(signal.SIGTERM, obey)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        while True:
            time.sleep(0.01)
    """

    def start():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        (tmp_path / "started").touch()
        time.sleep(FOREVER)

    be_late_when((tmp_path / "started").exists, monkeypatch)
    ev = line((start, FOREVER), (tmp_path / "in order").exists)
    assert ev() is True
    assert errors(ev) == [TOLD_FOREVER, None]
    assert ev.tasks("s1")[0].result is True


def leave_deaf(place):
    """Start what takes no SIGTERM, and what is in another group, and note them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    deaf = [subprocess.Popen(["sleep", "600"])]
    if HAS_PROC:
        deaf.append(subprocess.Popen(["sleep", "600"], process_group=0))
    (place / "new").write_text(" ".join(str(process.pid) for process in deaf))
    (place / "new").rename(place / "pids")


@pytest.mark.parametrize("step_is_deaf", [True, False])
def test_nothing_of_a_late_step_is_left(line, tmp_path, short_grace, monkeypatch, step_is_deaf):
    def start():
        leave_deaf(tmp_path)
        if not step_is_deaf:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        time.sleep(FOREVER)

    be_late_when((tmp_path / "pids").exists, monkeypatch)
    ev = line((start, FOREVER), int)
    assert ev() is True
    assert errors(ev) == [TOLD_FOREVER, None]
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    wait_until(lambda: all(map(is_gone, pids)))


def test_other_steps_go_on_while_one_has_time_to_end(
    make, tmp_path, place, long_grace, monkeypatch
):
    """One waits for the SIGTERM of the late one, which waits for the end of the one after that."""
    told = tmp_path / "told"
    ev = make(config={"max_concurrent": 2})
    go, then = ev.add_event("go"), ev.add_event("then")
    query = "SELECT status FROM eventor_task WHERE step = 'last'"

    def obey(*_):
        told.touch()
        wait_until(lambda: place.sql(query) == [("success",)])
        os._exit(0)

    def late():
        signal.signal(signal.SIGTERM, obey)
        (tmp_path / "begun").touch()
        sleep()

    def waits():
        wait_until(told.exists)

    be_late_when((tmp_path / "begun").exists, monkeypatch)
    ev.add_assoc(go, ev.add_step("late", late, config={"timeout": FOREVER}))
    ev.add_assoc(go, ev.add_step("waits", waits, triggers={"at_success": then}))
    ev.add_assoc(then, ev.add_step("last", int))
    ev.trigger_event(go)
    assert ev() is False
    assert statuses(ev) == {"late[1]": "failure", "waits[1]": "success", "last[1]": "success"}
    assert errors(ev)[0] == TOLD_FOREVER
    late, _waits, last = ev.tasks()
    assert late.ended_at > last.ended_at


PROGRAM = """
    import os, pathlib, signal, sys
    sys.path.insert(0, sys.argv[1])
    import pytest
    import eventor as evr
    from eventor.steps import worker
    from tests.test_timeouts import FOREVER, be_late_when, leave_deaf, sleep

    def obey_when_told_again(*_):
        if told.exists():
            os._exit(0)
        told.touch()

    def step():
        leave_deaf(pathlib.Path())
        signal.signal(signal.SIGTERM, obey_when_told_again)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        sleep()

    told = pathlib.Path("told")
    worker.GRACE_SECONDS = 60
    be_late_when(pathlib.Path("pids").exists, pytest.MonkeyPatch())
    with evr.Eventor(store=os.environ["STORE"], config={"logdir": "."}) as ev:
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", step, config={"timeout": FOREVER}))
        ev.trigger_event(go)
        ev()
"""


@pytest.mark.parametrize("how", ["kill", "twice"])
def test_a_late_step_does_not_outlive_its_owner_and_stays_active(start, tmp_path, how, place):
    program = start(PROGRAM, str(Path(__file__).parent.parent), STORE=place.store)
    wait_until((tmp_path / "told").exists)
    wait_until(lambda: place.sql("SELECT pid FROM eventor_task") != [(None,)])
    ((step,),) = place.sql("SELECT pid FROM eventor_task")
    if how == "kill":
        program.kill()
    else:
        program.send_signal(signal.SIGINT)
        wait_until(lambda: "Stopping" in (tmp_path / "program.debug.log").read_text())
        program.send_signal(signal.SIGINT)
    program.wait(30)
    pids = [step, *map(int, (tmp_path / "pids").read_text().split())]
    wait_until(lambda: all(map(is_gone, pids)))
    assert place.sql("SELECT status FROM eventor_task") == [("active",)]


@pytest.mark.parametrize("given", [0, -1, True, "5", float("nan"), float("inf")])
def test_a_timeout_is_a_number_of_seconds_or_none(make, given):
    ev = make()
    with pytest.raises(evr.ConfigError, match=r"timeout .* 's' is .*seconds above 0, or None"):
        ev.add_step("s", int, config={"timeout": given})
    ev.add_step("s", int, config={"timeout": None})


def test_a_timeout_of_a_thread_is_refused(make):
    ev = make(config={"task_construct": threading.Thread})
    with pytest.raises(evr.ConfigError, match=r"timeout .* 's' is 1.*threading\.Thread.*Process"):
        ev.add_step("s", int, config={"timeout": 1})
    ev.add_step("s", int, config={"timeout": None})


def test_a_changed_timeout_is_named_in_a_recovery(make, caplog):
    def program(timeout, **arguments):
        ev = make(**arguments)
        ev.add_step("s", int, config={"timeout": timeout})
        ev()
        ev.close()

    program(None)
    program(None, run_mode=evr.RunMode.recover)
    assert "changed" not in caplog.text
    program(5, run_mode=evr.RunMode.recover)
    assert '"timeout": 5.0' in caplog.text


def one(make, func, *args, timeout=0.3, step=None, **config):
    ev = make(config=config)
    go = ev.add_event("go")
    settings = {"timeout": timeout, **(step or {})}
    ev.add_assoc(go, ev.add_step("s", func, args=args, config=settings))
    ev.trigger_event(go, 1)
    return ev


@pytest.mark.parametrize(
    ("retry_on", "attempts"), [(None, 2), ((TimeoutError,), 2), ((OSError,), 2), ((ValueError,), 1)]
)
def test_a_timeout_is_tried_again_as_a_timeout_error(make, retry_on, attempts):
    ev = one(make, time.sleep, FOREVER, step={"max_attempts": 2, "retry_on": retry_on})
    assert ev() is False
    assert [attempt.error for attempt in ev.tasks()[0].attempts] == [TOLD] * attempts


def test_the_time_counts_for_each_attempt(make, tmp_path):
    def second_is_quick():
        if not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            time.sleep(FOREVER)

    assert one(make, second_is_quick, step={"max_attempts": 2}, timeout=3)() is True


def test_what_a_late_step_has_printed_is_kept(make, tmp_path, monkeypatch):
    def talk():
        print("before", flush=True)
        (tmp_path / "said").touch()
        time.sleep(FOREVER)

    be_late_when((tmp_path / "said").exists, monkeypatch)
    ev = one(make, talk, step={"capture_output": True}, timeout=FOREVER)
    assert ev() is False
    assert (ev.tasks()[0].error, ev.tasks()[0].stdout) == (TOLD_FOREVER, "before\n")


def test_a_kept_process_that_is_late_is_replaced_and_others_stay(make):
    ev = make(config={"max_tasks_per_child": None, "stop_on_exception": False})
    go = ev.add_event("go")
    for name, func in (("a", os.getpid), ("late", sleep), ("b", os.getpid), ("c", os.getpid)):
        timeout = 0.3 if name == "late" else None
        ev.add_assoc(go, ev.add_step(name, func, config={"timeout": timeout}))
    ev.trigger_event(go)
    assert ev() is False
    first, _, third, fourth = (task.pid for task in ev.tasks())
    assert first != third == fourth
