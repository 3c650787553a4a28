"""What a step may be, how it may end, and by what it is executed."""

import asyncio
import contextlib
import functools
import logging
import multiprocessing
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import threading
import time

import pytest

import eventor as evr
from eventor.storage import owner
from tests.conftest import statuses, wait_until

pytestmark = pytest.mark.stores("either")

SPAWN = multiprocessing.get_context("spawn").Process
CONSTRUCTS = [None, threading.Thread, pytest.param(SPAWN, marks=pytest.mark.slow)]


@pytest.fixture
def run_one(make):
    """Run one step and return its record."""

    def run(func, *args, construct=None, **kwargs):
        ev = make(config={} if construct is None else {"task_construct": construct})
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", func=func, args=args, kwargs=kwargs))
        ev.trigger_event(go)
        well = ev()
        (task,) = ev.tasks()
        assert well == (task.status is evr.TaskStatus.success)
        return task

    return run


@pytest.fixture
def run_all(make):
    """Run steps, each a function and its arguments; return their records."""

    def run(calls, construct):
        config = {"stop_on_exception": False}
        if construct is not None:
            config["task_construct"] = construct
        if construct is SPAWN:
            config["max_tasks_per_child"] = None  # a start takes long: one does for all
        ev = make(config=config)
        go = ev.add_event("go")
        for number, (func, *args) in enumerate(calls):
            ev.add_assoc(go, ev.add_step(f"s{number}", func=func, args=tuple(args)))
        ev.trigger_event(go)
        ev()
        return ev.tasks()

    return run


def double(number=21):
    return 2 * number


async def double_later(number=21):
    await asyncio.sleep(0)
    return 2 * number


class Doubler:
    def __init__(self, number=21):
        self.number = number

    def double(self):
        return 2 * self.number

    async def __call__(self):
        return self.double()


class Fussy(Exception):
    """An exception that cannot be pickled, nor rebuilt from its arguments."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")
        self.lock = threading.Lock()


class Mute:
    def __repr__(self):
        raise ValueError("no repr")

    def __reduce__(self):
        raise ValueError("no pickle")


class Silent(Exception):
    def __str__(self):
        raise ValueError("no message")


def fussy():
    raise Fussy("this", "that")


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_any_callable_is_a_step(run_all, construct):
    functions = [
        double,
        functools.partial(double, number=21),
        Doubler().double,
        double_later,
        functools.partial(double_later, 21),
        Doubler(),
    ]
    tasks = run_all([(func,) for func in functions], construct)
    assert [task.result for task in tasks] == [42] * 6
    here = construct is threading.Thread
    assert [task.pid == os.getpid() for task in tasks] == [here] * 6


@pytest.mark.parametrize("construct", [None, threading.Thread])
def test_lambdas_and_closures_are_steps(run_one, construct):
    number = 40
    assert run_one(lambda x: x + number, 2, construct=construct).result == 42


def test_an_exception_is_a_failure_with_its_traceback(run_one):
    task = run_one(fussy)
    assert task.error == "Fussy: this and that"
    assert task.traceback.startswith("Traceback (most recent call last):\n")
    assert "task.py" not in task.traceback
    assert 'raise Fussy("this", "that")' in task.traceback


@pytest.mark.parametrize(
    ("exception", "error"),
    [
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (BaseException("odd"), "BaseException: odd"),
        (Silent(), "Silent: <its message cannot be had: ValueError>"),
        (ValueError("a\0b\ud800"), "ValueError: a\\x00b\\ud800"),
        (ExceptionGroup("all", [ValueError("x")]), "ExceptionGroup: all (1 sub-exception)"),
    ],
)
def test_whatever_is_raised_is_a_failure(run_one, exception, error):
    def step():
        raise exception

    assert run_one(step).error == error


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_sys_exit_ends_a_step_by_its_code(run_all, construct):
    codes = [None, 0, False, 3, True, "words"]
    assert [task.error for task in run_all([(sys.exit, code) for code in codes], construct)] == [
        *[None] * 3,
        "SystemExit: exit code 3",
        "SystemExit: exit code 1",
        "SystemExit: exit code 1: words",
    ]


@pytest.mark.parametrize(
    ("func", "args", "error"),
    [
        (signal.raise_signal, (signal.SIGKILL,), "killed by SIGKILL"),
        (signal.raise_signal, (signal.SIGTERM,), "killed by SIGTERM"),
        (signal.raise_signal, (40,), "killed by signal 40"),
        (signal.raise_signal, (signal.SIGUSR1,), "killed by SIGUSR1"),
        (os._exit, (3,), "its process ended with exit code 3 before it said how the step ended"),
        (os._exit, (0,), "its process ended with exit code 0 before it said how the step ended"),
        (
            os.closerange,
            (3, 200),
            "its process ended with exit code 1 before it said how the step ended",
        ),
    ],
)
@pytest.mark.filterwarnings("default")
def test_a_process_that_dies_is_a_failure(run_one, func, args, error):
    assert run_one(func, *args).error == error


@pytest.mark.stores("both")
@pytest.mark.parametrize("construct", CONSTRUCTS[:2])
def test_a_result_that_cannot_be_pickled_is_kept_as_its_repr(run_one, construct, debug_log):
    task = run_one(lambda: [lambda: 1], construct=construct)
    assert task.result.startswith("[<function ")
    assert task.stored.encoding == "repr"
    assert "cannot be pickled" in debug_log()
    assert run_one(Mute).result == "<Mute whose repr failed: ValueError: no repr>"


def test_a_result_that_cannot_be_rebuilt_here_is_named(run_one):
    def step():
        class_ = type("Gone", (), {"__module__": "__main__"})
        sys.modules["__main__"].Gone = class_
        return class_()

    task = run_one(step)
    assert task.status is evr.TaskStatus.success
    with pytest.raises(evr.StoreError, match=r"result of s\[1\] cannot be unpickled.*Gone"):
        _ = task.result


@pytest.mark.slow
@pytest.mark.parametrize("construct", CONSTRUCTS[:2])
def test_a_result_of_20_megabytes_comes_through(run_one, construct):
    assert run_one(bytes, 20_000_000, construct=construct).result == bytes(20_000_000)


def test_what_a_spawned_process_cannot_be_sent_is_named(run_one):
    task = run_one(lambda: 1, construct=SPAWN)
    assert "func of step 's', <function" in task.error
    assert "cannot be sent to its process" in task.error
    task = run_one(double, threading.Lock(), construct=SPAWN)
    assert "args of step 's', (<unlocked _th" in task.error


class Trap:
    """What can be pickled here, and not be rebuilt there."""

    def __reduce__(self):
        return int, ("trap",)


@pytest.mark.slow
def test_what_a_spawned_process_cannot_rebuild_is_named(run_one):
    error = run_one(double, Trap(), construct=SPAWN).error
    assert error.startswith("EventorError: args of step 's' cannot be rebuilt in its process")


@pytest.mark.slow
def test_a_spawned_step_needs_a_main_guard_and_says_so(script):
    ran = script("""
        import eventor as evr, multiprocessing
        spawn = multiprocessing.get_context("spawn").Process
        ev = evr.Eventor(config={"logdir": ".", "task_construct": spawn})
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", func=print))
        ev.trigger_event(go)
        print(ev(), ev.run_id)
    """)
    assert ran.stdout == "False 1\n"
    assert "put what makes and runs the Eventor under `if __name__ == '__main__':`" in ran.stderr


class Refusing(multiprocessing.get_context("fork").Process):
    def start(self):
        raise OSError("no more processes")


def test_a_step_that_cannot_be_started_is_a_failure(run_one):
    task = run_one(double, construct=Refusing)
    assert task.error == "it could not be started: OSError: no more processes"
    assert (task.status, task.pid) == (evr.TaskStatus.failure, None)


@pytest.mark.parametrize(
    "use", [lambda ev: ev.add_event("more"), evr.Eventor.stop, evr.Eventor.tasks]
)
def test_an_eventor_cannot_be_used_inside_a_step(make, use):
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", use, (ev,)))
    ev.trigger_event(go)
    assert ev() is False
    assert "cannot be used in another" in ev.tasks()[0].error


def test_an_event_of_a_steps_own_is_not_made_inside_a_step(make):
    """The program would not know of it; what it has made itself can be triggered."""
    ev = make()
    go = ev.add_event("go")
    first = ev.add_step("first", lambda: evr.current().trigger(last.active))
    last = ev.add_step("last", lambda: evr.current().trigger(first.success))
    ev.add_assoc(go, last)
    ev.add_assoc(first.success, first)
    ev.trigger_event(go)
    assert ev() is False
    assert statuses(ev) == {"last[1]": "success", "first[1]": "failure"}
    error = ev.tasks("first")[0].error
    assert error.startswith("UsageError: event 'last.active' cannot be made in process")


def test_what_a_step_logs_is_handled_by_the_owner(run_one, caplog):
    def step():
        logger = logging.getLogger("step's own")
        logger.propagate = False
        logging.warning("from %s", "inside", extra={"odd": Mute(), "plain": [{"a": (1,)}]})
        try:
            fussy()
        except Fussy:
            logging.exception("caught")
        forked = multiprocessing.get_context("fork").Process(target=logging.warning, args=("x",))
        forked.start()
        forked.join()
        return forked.exitcode

    assert run_one(step).result == 0
    (record,) = [record for record in caplog.records if record.message == "from inside"]
    assert record.odd == "<Mute whose repr failed: ValueError: no repr>"
    assert record.plain == [{"a": [1]}]
    assert record.process != os.getpid()
    assert "Fussy: this and that" in caplog.text


def test_a_thread_can_trigger_an_event_of_a_running_eventor(make):
    ev = make(config={"task_construct": threading.Thread, "sleep_between_loops": 1})
    go, more = ev.add_event("go"), ev.add_event("more")
    done = threading.Event()

    def first():
        ev.trigger_event(more, "inside")
        assert done.wait(30)
        with pytest.raises(evr.UsageError, match="running"):
            ev()
        with pytest.raises(evr.UsageError, match="running"):
            ev.close()
        return len(ev.tasks())

    ev.add_assoc(go, ev.add_step("first", func=first))
    ev.add_assoc(more, ev.add_step("second", func=done.set))
    ev._plan._max_concurrent = 2
    ev.trigger_event(go)
    assert ev() is True
    assert statuses(ev) == {"first[1]": "success", "second[inside]": "success"}


def test_a_descendant_that_lives_on_does_not_hold_the_loop(run_one, tmp_path):
    def step():
        if os.fork() == 0:
            (tmp_path / "draft").write_text(str(os.getpid()))
            (tmp_path / "draft").rename(tmp_path / "child")
            signal.pause()
        wait_until((tmp_path / "child").exists)
        os._exit(5)

    task = run_one(step)
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert "exit code 5" in task.error


REAPERS = {"reap": "ended", "signal.SIG_IGN": "ended, with an exit code that something else"}
"""How a program has its children waited for, and what is then said of one that ended in silence.

A handler runs after the end that it is called for, and may come too late to take the exit code
away; the system never does.
"""


@pytest.mark.parametrize("reaper", REAPERS)
def test_a_program_that_reaps_all_children_does_not_hold_the_loop(script, reaper, place):
    ran = script(
        f"""
        import os, signal
        import eventor as evr

        def reap(*_):
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                pass

        def reaped(code):
            os._exit(code) if code else None

        signal.signal(signal.SIGCHLD, {reaper})
        config = {{"logdir": ".", "stop_on_exception": False}}
        with evr.Eventor(store=os.environ["STORE"], config=config) as ev:
            go = ev.add_event("go")
            ev.add_assoc(go, ev.add_step("silent", func=reaped, args=(3,)))
            ev.add_assoc(go, ev.add_step("well", func=reaped, args=(0,)))
            ev.trigger_event(go)
            print(ev())
            for task in ev.tasks():
                print(task.status, task.error)
        """,
        STORE=place.store,
    )
    assert "was ended" not in ran.stderr
    well, first, second = ran.stdout.splitlines()
    assert (well, second) == ("False", "success None")
    assert first.startswith(f"failure its process {REAPERS[reaper]}")


def test_a_step_that_forks_ends_once(run_one):
    def step():
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        return "the child" if pid == 0 else "the step"

    assert run_one(step).result == "the step"


def pipes():
    """Return the descriptors of the pipes and sockets that are open here, by what they lead to."""
    found = {}
    for descriptor in range(3, 200):
        with contextlib.suppress(OSError):
            status = os.fstat(descriptor)
            if stat.S_ISFIFO(status.st_mode) or stat.S_ISSOCK(status.st_mode):
                found.setdefault(status.st_ino, []).append(descriptor)
    return found


def test_what_else_writes_to_the_pipe_of_a_step_fails_that_step_alone(make):
    others = pipes()

    def step():
        for pipe, descriptors in pipes().items():
            for descriptor in descriptors if pipe not in others else ():
                with contextlib.suppress(OSError):
                    os.write(descriptor, struct.pack("!Q", 4) + b"junk")
        return "x" * 1_000_000

    ev = make(config={"stop_on_exception": False})
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=step), ev.add_step("next", func=int))
    ev.trigger_event(go)
    assert ev() is False
    assert statuses(ev) == {"s[1]": "failure", "next[1]": "success"}
    assert ev.tasks("s")[0].error == "what came through its pipe was not sent by eventor"


def test_a_process_that_lingers_after_its_step_is_ended(run_one, debug_log, monkeypatch):
    monkeypatch.setattr("eventor.steps.worker.GRACE_SECONDS", 0.2)

    def step():
        threading.Thread(target=signal.pause).start()
        threading.Thread(target=threading.Event().wait).start()
        return 1

    assert run_one(step).result == 1
    assert "Process of step s[1] was ended" in debug_log()


@pytest.mark.slow
@pytest.mark.stores("sqlite")
def test_no_outcome_is_lost_on_a_busy_machine(make):
    """A worker may send its outcome and die between the looks at its pipe and at its process."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        ev = make(config={"max_concurrent": 8})
        go = ev.add_event("go")
        for number in range(100):
            size = 1 if number % 3 else 200_000
            ev.add_assoc(go, ev.add_step(f"s{number}", func=lambda size=size: b"x" * size))
        ev.trigger_event(go)
        assert ev() is True
        assert {len(task.result) for task in ev.tasks()} == {1, 200_000}
        assert len(ev.tasks(status="success")) == 100
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_an_outcome_sent_just_before_the_process_is_seen_dead_is_read(make, monkeypatch):
    """The race, made certain: the pipe is looked at only once the process has ended."""
    from eventor.steps.launch import Worker

    heard = Worker.hear

    def late(worker):
        wait_until(lambda: not worker._process.is_alive())
        return heard(worker)

    monkeypatch.setattr(Worker, "hear", late)
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=double))
    ev.trigger_event(go)
    assert ev() is True
    assert ev.tasks()[0].result == 42


def test_a_step_that_ends_wakes_the_loop(make, monkeypatch):
    """With waits that never end by themselves, the flow would stand still if it did not."""
    from eventor.steps import launch

    wait = launch.Launcher.wait
    monkeypatch.setattr(launch.Launcher, "wait", lambda self, bell, _: wait(self, bell, None))
    # What takes long to die would be given up, and be looked at when such a wait ends by itself.
    monkeypatch.setattr("eventor.steps.worker._CLOSING_SECONDS", 3600)
    ev = make(config={"sleep_between_loops": 3600})
    events = [ev.add_event(f"e{number}") for number in range(21)]
    for number in range(20):
        triggers = {"at_success": events[number + 1]}
        ev.add_assoc(events[number], ev.add_step(f"s{number}", func=int, triggers=triggers))
    ev.trigger_event(events[0])
    assert ev() is True
    assert len(ev.tasks(status="success")) == 20


def test_a_handler_of_the_program_that_raises_does_not_end_the_flow(make, capsys):
    def refuse(_record):
        raise ValueError("no filter at all")

    def step():
        logging.getLogger("mine").warning("x")

    ev = make(config={"max_concurrent": 2})
    go = ev.add_event("go")
    for number in range(3):
        ev.add_assoc(go, ev.add_step(f"s{number}", func=step))
    ev.trigger_event(go)
    handler = logging.StreamHandler()
    handler.addFilter(refuse)
    logging.getLogger().addHandler(handler)
    try:
        assert ev() is True
    finally:
        logging.getLogger().removeHandler(handler)
    assert "no filter at all" in capsys.readouterr().err


def test_whatever_breaks_the_loop_ends_what_runs(make, monkeypatch, tmp_path):
    def refuse(*_):
        raise KeyboardInterrupt("now")

    def step():
        logging.getLogger("mine").warning("x")
        signal.pause()

    ev = make(config={"max_concurrent": 3})
    monkeypatch.setattr(ev._journal, "pass_on", refuse)
    go = ev.add_event("go")
    for number in range(3):
        ev.add_assoc(go, ev.add_step(f"s{number}", func=os._exit if number == 1 else step, args=()))
    ev.trigger_event(go)
    with pytest.raises(KeyboardInterrupt, match="now"):
        ev()
    assert not multiprocessing.active_children()


def test_what_breaks_the_ending_takes_no_step_the_time_to_end(make, monkeypatch, tmp_path):
    """What they log when they are told to end breaks it again and again."""
    here, in_order = tmp_path / "here", tmp_path / "in order"
    here.mkdir()
    in_order.mkdir()

    def refuse(*_):
        raise KeyboardInterrupt("now")

    def step(name):
        def end(*_):
            logging.getLogger("mine").warning("not yet")
            time.sleep(0.3)  # as long as it takes to put something in order
            (in_order / name).touch()
            os._exit(0)

        signal.signal(signal.SIGTERM, end)
        (here / name).touch()
        while True:  # a signal that came just before one long wait would not be heard
            time.sleep(0.01)

    def break_it():
        wait_until(lambda: len(list(here.iterdir())) == 3)
        logging.getLogger("mine").warning("x")
        signal.pause()

    ev = make(config={"max_concurrent": 4})
    monkeypatch.setattr(ev._journal, "pass_on", refuse)
    monkeypatch.setattr("eventor.steps.launch.GRACE_SECONDS", 60)
    go = ev.add_event("go")
    ev.add_assoc(go, *(ev.add_step(name, step, (name,)) for name in "abc"))
    ev.add_assoc(go, ev.add_step("last", break_it))
    ev.trigger_event(go)
    with pytest.raises(KeyboardInterrupt, match="now"):
        ev()
    assert not multiprocessing.active_children()
    assert sorted(path.name for path in in_order.iterdir()) == ["a", "b", "c"]


def test_a_process_that_lingers_does_not_outlast_its_grace_beside_others(
    make, monkeypatch, tmp_path, debug_log
):
    monkeypatch.setattr("eventor.steps.worker.GRACE_SECONDS", 0.2)
    lingers = tmp_path / "lingers"

    def first():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Thread(target=threading.Event().wait).start()
        left = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
        lingers.write_text(f"{os.getpid()} {left.pid}")

    def second():
        pid, left = map(int, lingers.read_text().split())
        wait_until(lambda: owner._start_of(pid) is None)
        os.kill(left, signal.SIGKILL)  # which lives on

    ev = make()
    go, then = ev.add_event("go"), ev.add_event("then")
    ev.add_assoc(go, ev.add_step("first", func=first, triggers={"at_success": then}))
    ev.add_assoc(then, ev.add_step("second", func=second))
    ev.trigger_event(go)
    assert ev() is True
    assert debug_log().count("Process of step first[1] was ended") == 1


def test_a_step_that_closes_all_it_holds_does_not_keep_the_loop_busy(run_one, monkeypatch):
    from eventor.steps.launch import Launcher

    looks = []
    collect = Launcher.collect
    monkeypatch.setattr("eventor.steps.worker._CLOSING_SECONDS", 0.0)
    monkeypatch.setattr(Launcher, "collect", lambda self: looks.append(1) or collect(self))
    reading, writing = os.pipe()

    def step():
        os.dup2(reading, 0)
        os.closerange(3, 1000)
        select.select([], [], [], 0.5)  # as a daemon that does nothing
        os._exit(7)

    task = run_one(step)
    os.close(reading)
    os.close(writing)
    assert "exit code 7" in task.error
    assert len(looks) < 100


@pytest.mark.stores("both")
def test_a_result_above_what_a_store_keeps_is_kept_as_its_repr(run_one, monkeypatch, debug_log):
    monkeypatch.setattr("eventor.steps.task.LARGEST_PICKLE", 1000)
    assert run_one(lambda: "x" * 900).result == "x" * 900
    assert run_one(lambda: "x" * 1001).result == repr("x" * 1001)
    assert "are more than the 1,000 of a store" in debug_log()


def test_a_step_for_which_no_pipe_is_left_is_a_failure(run_one, monkeypatch):
    def refuse(**_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("socket.socketpair", refuse)
    assert "could not be started: OSError: [Errno 24]" in run_one(int).error


def test_a_step_that_closes_its_pipe_and_opens_files_keeps_them(script, tmp_path, place):
    ran = script(
        """
        import os, pathlib
        import eventor as evr

        kept = []

        def step():
            os.closerange(3, 256)
            for number in range(100):
                kept.append(open(f"{number}.txt", "w"))
                print("mine", file=kept[-1], flush=True)
            return "x"

        with evr.Eventor(store=os.environ["STORE"], config={"logdir": "."}) as ev:
            go = ev.add_event("go")
            ev.add_assoc(go, ev.add_step("s", func=step))
            ev.trigger_event(go)
            ev()
            print(ev.tasks()[0].error)
        """,
        STORE=place.store,
    )
    assert ran.stdout == "its process ended with exit code 1 before it said how the step ended\n"
    assert "eventor: step s[1] has closed the pipe by which its process says how it" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert {path.read_bytes() for path in tmp_path.glob("*.txt")} == {b"mine\n"}
