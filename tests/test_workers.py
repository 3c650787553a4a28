"""Processes that are forked ahead, and processes that run many steps: what holds for one holds."""

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import eventor as evr
from eventor.steps import zygote
from eventor.storage import owner
from tests.conftest import statuses, wait_until
from tests.test_steps import pipes

pytestmark = pytest.mark.stores("either")

SPAWN = multiprocessing.get_context("spawn").Process


def line(ev, *funcs, **options):
    """Let steps follow each other, whether they end well or not; return what begins the first."""
    events = [ev.add_event(f"e{number}") for number in range(len(funcs) + 1)]
    for number, func in enumerate(funcs):
        triggers = {"at_complete": events[number + 1]}
        ev.add_assoc(events[number], ev.add_step(f"s{number}", func, triggers=triggers, **options))
    ev.trigger_event(events[0])
    return events[0]


def results(ev):
    return [task.result for task in ev.tasks()]


def pids(ev):
    return [task.pid for task in ev.tasks()]


def descendants(pid):
    """Return the processes below one, zombies and who looks excepted."""
    ps = ["ps", "-A", "-o", "pid=,ppid=,stat="]
    with subprocess.Popen(ps, stdout=subprocess.PIPE, text=True) as looking:
        rows = [row.split() for row in looking.stdout]
    parents = {int(child): int(parent) for child, parent, stat in rows if stat[0] != "Z"}
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid, looking.pid}


@pytest.mark.parametrize("most", [1, 2, 3, None])
def test_a_process_runs_as_many_steps_as_it_may(make, most):
    ev = make(config={"max_tasks_per_child": most})
    line(ev, *[os.getpid] * 7)
    assert ev() is True
    assert results(ev) == pids(ev)
    assert len(set(pids(ev))) == -(-7 // (most or 7))
    assert os.getpid() not in pids(ev)


def test_each_step_has_a_process_of_its_own_by_default(make):
    held = []
    ev = make()
    line(ev, *[lambda: held.append(1) or (len(held), os.getpid())] * 5)
    assert ev() is True
    assert [length for length, _ in results(ev)] == [1] * 5
    assert len(set(pids(ev))) == 5


@pytest.mark.parametrize("given", [0, -1, True, "2", 1.5])
def test_max_tasks_per_child_is_a_number_or_none(make, given):
    with pytest.raises(evr.ConfigError, match=r"max_tasks_per_child .*at least 1, or None"):
        make(config={"max_tasks_per_child": given})


def test_a_process_of_many_steps_holds_closures_and_keeps_what_they_did(make):
    held = []
    ev = make(config={"max_tasks_per_child": None})
    line(ev, *[lambda number=number: held.append(number) or list(held) for number in range(3)])
    assert ev() is True
    assert results(ev) == [[0], [0, 1], [0, 1, 2]]
    assert held == []


def test_two_processes_serve_a_fan_out(make):
    ev = make(config={"max_tasks_per_child": None, "max_concurrent": 2})
    go = ev.add_event("go")
    for number in range(40):
        ev.add_assoc(go, ev.add_step(f"s{number}", func=pow, args=(number, 2)))
    ev.trigger_event(go)
    assert ev() is True
    assert sorted(results(ev)) == [number**2 for number in range(40)]
    assert len(set(pids(ev))) == 2


DEATHS = {
    "exit": (lambda: os._exit(3), "exit code 3"),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), "killed by SIGKILL"),
    "term": (lambda: os.kill(os.getpid(), signal.SIGTERM), "killed by SIGTERM"),
}


@pytest.mark.parametrize("most", [1, None])
@pytest.mark.parametrize("death", DEATHS)
def test_a_process_that_dies_takes_its_own_step_alone(make, most, death):
    dies, told = DEATHS[death]
    ev = make(config={"max_tasks_per_child": most})
    line(ev, int, dies, int, dies, int)
    assert ev() is True
    ends = ["success", "failure", "success", "failure", "success"]
    assert list(statuses(ev).values()) == ends
    assert all(told in task.error for task in ev.tasks(status="failure"))


def test_what_a_step_raises_or_exits_with_ends_that_step_alone(make):
    ev = make(config={"max_tasks_per_child": None})
    line(ev, int, lambda: 1 / 0, lambda: sys.exit(4), sys.exit, os.getpid)
    assert ev() is True
    assert [str(task.status) for task in ev.tasks()] == [
        "success",
        "failure",
        "failure",
        "success",
        "success",
    ]
    assert [task.error for task in ev.tasks(status="failure")] == [
        "ZeroDivisionError: division by zero",
        "SystemExit: exit code 4",
    ]
    assert len(set(pids(ev))) == 1


def test_a_process_that_dies_while_it_waits_is_replaced(make, tmp_path, place):
    """Its death fails no step."""
    ev = make(config={"max_tasks_per_child": None, "max_concurrent": 2})
    go = ev.add_event("go")
    then = ev.add_event("then")

    def kill_other():
        wait_until((tmp_path / "waits").exists)
        other = int((tmp_path / "waits").read_text())
        query = f"SELECT status FROM eventor_task WHERE pid = {other}"
        wait_until(lambda: place.sql(query) == [("success",)])
        os.kill(other, signal.SIGKILL)
        wait_until(lambda: owner._start_of(other) is None)

    def note():
        (tmp_path / "now").write_text(str(os.getpid()))
        (tmp_path / "now").rename(tmp_path / "waits")

    ev.add_assoc(go, ev.add_step("dies", note))
    ev.add_assoc(go, ev.add_step("kills", kill_other, triggers={"at_success": then}))
    for number in range(3):
        ev.add_assoc(then, ev.add_step(f"after {number}", time.sleep, args=(0.05,)))
    ev.trigger_event(go)
    assert ev() is True
    assert set(statuses(ev).values()) == {"success"}
    assert len(set(pids(ev))) == 3


def test_what_is_logged_by_every_step_reaches_the_owner(make, caplog):
    log = logging.getLogger("mine")

    def step(number):
        log.warning("before %d", number)
        logging.basicConfig(force=True)  # which takes the handlers away, in its process
        log.handlers = [logging.NullHandler()]

    ev = make(config={"max_tasks_per_child": None})
    line(ev, *[lambda number=number: step(number) for number in range(3)])
    assert ev() is True
    assert [r.getMessage() for r in caplog.records if r.name == "mine"] == [
        "before 0",
        "before 1",
        "before 2",
    ]


@pytest.mark.parametrize("most", [1, None])
def test_a_record_names_the_process_by_its_task(make, caplog, most):
    ev = make(config={"max_tasks_per_child": most})
    line(ev, *[lambda: logging.getLogger("mine").warning("x")] * 3)
    assert ev() is True
    names = [r.processName for r in caplog.records if r.name == "mine"]
    assert names == ["s0[1]", "s1[1]", "s2[1]"]


def test_what_a_step_prints_is_shown_before_the_next_begins(script):
    """Also where the process of the first ends last."""
    ran = script("""
        import os, pathlib, time
        from multiprocessing import util
        import eventor as evr

        def show(number):
            print(number)
            if number == 0:
                util.Finalize(None, await_last, exitpriority=1)
            elif number == 2:
                pathlib.Path("over").touch()

        def await_last():
            while not os.path.exists("over"):
                time.sleep(0.005)

        for most in (1, None):
            config = {"logdir": ".", "max_tasks_per_child": most}
            with evr.Eventor(store=":memory:", config=config) as ev:
                events = [ev.add_event(str(number)) for number in range(4)]
                for number in range(3):
                    triggers = {"at_success": events[number + 1]}
                    step = ev.add_step(f"s{number}", show, (number,), triggers=triggers)
                    ev.add_assoc(events[number], step)
                ev.trigger_event(events[0])
                ev()
    """)
    assert (ran.stdout, ran.returncode) == ("0\n1\n2\n" * 2, 0)


def test_a_process_of_many_steps_may_spawn(make):
    ev = make(config={"max_tasks_per_child": None, "task_construct": SPAWN})
    line(ev, os.getpid, os.getpid, threading.Lock, os.getpid)
    ev.add_assoc(ev._flow.events["e3"], ev.add_step("unsendable", func=lambda: 1))
    assert ev() is False
    assert len(set(pids(ev)) - {None}) == 1
    (unsendable,) = ev.tasks(status="failure")
    assert unsendable.step == "unsendable"
    assert "func of step 'unsendable'" in unsendable.error


def test_threads_are_not_used_again(make):
    ev = make(config={"max_tasks_per_child": None, "task_construct": threading.Thread})
    line(ev, *[lambda: threading.current_thread().name] * 3)
    assert ev() is True
    assert results(ev) == ["s0[1]", "s1[1]", "s2[1]"]


def test_no_process_is_left_when_a_flow_has_ended(make):
    for most in (1, 2, None):
        ev = make(config={"max_tasks_per_child": most, "max_concurrent": 3})
        line(ev, *[int] * 6)
        before = descendants(os.getpid())  # the server of the store is below, too
        assert ev() is True
        assert descendants(os.getpid()) <= before


@pytest.mark.parametrize("most", [1, None])
def test_a_step_knows_what_was_prepared_before_its_trigger(make, most):
    """Also when a process was forked ahead for it, or has run other steps."""
    ev = make(config={"max_tasks_per_child": most})
    go, more = ev.add_event("go"), ev.add_event("more")
    prepared = {}
    ev.add_assoc(go, *(ev.add_step(f"s{number}", time.sleep, (0.02,)) for number in range(5)))
    ev.add_assoc(more, ev.add_step("read", lambda: dict(prepared)))
    say = ev._journal.say

    def react(level, message, *details):
        if message.startswith("Step completed s2"):
            prepared["x"] = 1
            if most is None:
                ev.add_assoc(more, ev.add_step("defined late", lambda: dict(prepared)))
            ev.trigger_event(more)
        say(level, message, *details)

    ev._journal.say = react
    ev.trigger_event(go)
    assert ev() is True
    assert ev.tasks("read")[0].result == {"x": 1}
    if most is None:
        assert ev.tasks("defined late")[0].result == {"x": 1}


@pytest.mark.parametrize("most", [1, 3, None])
def test_a_step_is_its_own_session_and_group(make, most):
    ev = make(config={"max_tasks_per_child": most})
    line(ev, *[lambda: (os.getpid(), os.getsid(0), os.getpgrp())] * 4)
    assert ev() is True
    for pid, session, group in results(ev):
        assert pid == session == group


@pytest.mark.parametrize(
    "config",
    [{}, {"max_tasks_per_child": None}, {"task_construct": threading.Thread}],
    ids=["fresh", "many", "threads"],
)
def test_the_mask_of_a_step_is_that_of_the_program(make, config):
    """What it starts inherits it: a blocked SIGTERM would keep that from being ended."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    ev = make(config=config)
    line(ev, *[lambda: set(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))] * 3)
    assert ev() is True
    assert results(ev) == [before] * 3


@pytest.mark.parametrize("most", [1, None])
def test_the_handlers_of_a_step_are_those_of_the_program(make, most):
    ev = make(config={"max_tasks_per_child": most})
    line(ev, *[lambda: signal.getsignal(signal.SIGINT)] * 3)
    assert ev() is True
    assert results(ev) == [signal.getsignal(signal.SIGINT)] * 3


PROGRAM = """
    import os, pathlib, signal, sys, time
    import eventor as evr

    most = None if sys.argv[1] == "None" else int(sys.argv[1])
    config = {"logdir": ".", "max_tasks_per_child": most, "max_concurrent": 2}
    with evr.Eventor(store=os.environ["STORE"], config=config) as ev:
        go, then = ev.add_event("go"), ev.add_event("then")
        ev.add_assoc(go, ev.add_step("first", int, triggers={"at_success": then}))

        def wait(number):
            pathlib.Path(f"{number}.new").write_text(str(os.getpid()))
            os.rename(f"{number}.new", f"{number}.pid")
            signal.pause()

        for number in range(2):
            ev.add_assoc(then, ev.add_step(f"waits {number}", wait, (number,)))
        ev.add_assoc(then, ev.add_step("never", int, triggers={"at_success": then}))
        ev.trigger_event(go)
        print(ev())
"""


@pytest.mark.parametrize("most", ["1", "None"])
@pytest.mark.parametrize("how", ["kill", "twice"])
def test_nothing_outlives_its_owner(start, tmp_path, most, how, place):
    program = start(PROGRAM, most, STORE=place.store)
    paths = [tmp_path / f"{number}.pid" for number in range(2)]
    wait_until(lambda: all(path.exists() for path in paths))
    below = descendants(program.pid)
    assert {int(path.read_text()) for path in paths} <= below
    if how == "kill":
        program.kill()
    else:
        program.send_signal(signal.SIGINT)
        wait_until(lambda: "Stopping" in (tmp_path / "program.debug.log").read_text())
        program.send_signal(signal.SIGINT)
    program.wait(30)
    wait_until(lambda: not any(owner._start_of(pid) for pid in below))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_flow_goes_on_without_its_zygote(make, monkeypatch, how):
    """What it has forked is not ended; how that ends is then not known by its exit code."""

    def end_parent():
        parent = os.getppid()
        if parent != program:
            os.kill(parent, how)
            if how == signal.SIGKILL:
                wait_until(lambda: os.getppid() != parent)
                time.sleep(0.2)  # while the owner looks at all that runs
        return parent

    def die():
        end_parent()
        os._exit(3)

    monkeypatch.setattr("eventor.steps.launch._LOOK_SECONDS", 0.05)
    # Else the owner forks by itself where the machine is slow, and no step has a zygote.
    monkeypatch.setattr("eventor.steps.zygote._BIRTH_SECONDS", 30)
    program = os.getpid()
    ev = make()
    line(ev, int, end_parent, int, die, int)
    assert ev() is True
    assert results(ev)[1] != program
    assert [str(task.status) for task in ev.tasks()] == [
        "success",
        "success",
        "success",
        "failure",
        "success",
    ]
    assert "ended" in ev.tasks("s3")[0].error


def test_a_step_that_leaves_a_child_with_all_it_holds_is_heard_of(make, tmp_path):
    """A descendant holds the pipe and the sentinel of a step that died without a word."""

    def leave():
        if os.fork() == 0:
            wait_until((tmp_path / "gone").exists)
            os._exit(0)
        os._exit(5)

    ev = make()
    line(ev, int, leave, (tmp_path / "gone").touch)
    assert ev() is True
    assert "exit code 5" in ev.tasks("s1")[0].error


def test_where_nothing_can_be_forked_ahead_the_owner_forks(make, monkeypatch):
    """And does not ask again and again."""
    asked = []
    ask = zygote.Zygote.ask
    monkeypatch.setattr(zygote.Zygote, "ask", lambda self, n: asked.append(n) or ask(self, n))

    def refuse(*_):
        raise BlockingIOError("no more processes")

    monkeypatch.setattr("eventor.steps.launch.Launcher._begin_in_zygote", refuse)
    ev = make()
    line(ev, *[os.getppid] * 4)
    assert ev() is True
    assert results(ev) == [os.getpid()] * 4
    assert asked == [1]


def test_what_is_killed_ahead_is_not_forked_again_and_again(make, monkeypatch, tmp_path):
    asked = []
    ask, hear = zygote.Zygote.ask, zygote.Zygote.hear

    def note_ends(self):
        born, ended = hear(self)
        if ended:
            (tmp_path / "killed").touch()
        return born, ended

    monkeypatch.setattr(zygote.Zygote, "hear", note_ends)
    monkeypatch.setattr(zygote.Zygote, "ask", lambda self, n: asked.append(n) or ask(self, n))
    monkeypatch.setattr("eventor.steps.task.Channel.receive", lambda _: os._exit(1))
    ev = make()
    line(ev, lambda: wait_until((tmp_path / "killed").exists), *[os.getppid] * 3)
    assert ev() is True
    assert results(ev)[1:] == [os.getpid()] * 3
    assert asked == [1]


def test_a_construct_of_the_program_is_used_by_the_owner_alone(make):
    """What it does of its own, such as counting, is done where the program expects it."""
    made = []

    class Counted(multiprocessing.get_context("fork").Process):
        def start(self):
            super().start()
            made.append(self.name)

    ev = make(config={"task_construct": Counted})
    line(ev, *[os.getppid] * 3)
    assert ev() is True
    assert results(ev) == [os.getpid()] * 3
    assert made == ["s0[1]", "s1[1]", "s2[1]"]


ODD = {
    "ignores its children": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "has many files open": (
        "resource.setrlimit(resource.RLIMIT_NOFILE, (2000, 2000));"
        "held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]"
    ),
    "has a timeout for sockets": "socket.setdefaulttimeout(0.05)",
}


@pytest.mark.parametrize("odd", ODD)
def test_a_program_may_be_odd(script, odd, place):
    ran = script(
        f"""
        import os, resource, signal, socket, time
        import eventor as evr

        {ODD[odd]}
        handler = signal.getsignal(signal.SIGCHLD)

        def step():
            time.sleep(0.1)
            return signal.getsignal(signal.SIGCHLD) == handler

        for most in (1, None):
            config = {{"logdir": ".", "max_tasks_per_child": most}}
            with evr.Eventor(store=os.environ["STORE"], config=config) as ev:
                events = [ev.add_event(str(number)) for number in range(5)]
                for number in range(4):
                    triggers = {{"at_success": events[number + 1]}}
                    looks = ev.add_step(f"s{{number}}", step, triggers=triggers)
                    ev.add_assoc(events[number], looks)
                ev.trigger_event(events[0])
                print(ev(), [task.result for task in ev.tasks()])
        """,
        STORE=place.store,
    )
    assert ran.stdout == "True [True, True, True, True]\n" * 2, ran.stderr
    assert "was ended" not in ran.stderr


def test_a_zygote_that_was_stopped_holds_nothing_up_for_ever(make, monkeypatch):
    monkeypatch.setattr("eventor.steps.worker.GRACE_SECONDS", 0.3)
    monkeypatch.setattr("eventor.steps.zygote._BIRTH_SECONDS", 0.1)
    program = os.getpid()

    def stop():
        if os.getppid() != program:
            os.kill(os.getppid(), signal.SIGSTOP)

    ev = make()
    line(ev, int, stop, int, int)
    assert ev() is True
    assert set(statuses(ev).values()) == {"success"}


def test_the_mask_and_the_handlers_of_loggers_are_as_before_for_each_step(make):
    def spoil():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        logging.root.handlers.clear()

    def look():
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return signal.SIGUSR1 in blocked, len(logging.root.handlers)

    ev = make(config={"max_tasks_per_child": None})
    line(ev, spoil, look)
    assert ev() is True
    assert results(ev)[1] == (False, 1)


def test_what_the_program_has_printed_is_shown_once(script):
    """Also where it waits in a buffer while processes are forked."""
    ran = script(
        """
        import logging, sys, time
        import eventor as evr

        class Print(logging.Handler):
            def emit(self, record):
                sys.stdout.write(f"{most}: {record.getMessage()}\\n")

        logging.getLogger("eventor").addHandler(Print())
        logging.getLogger("eventor").setLevel(logging.INFO)
        for most in (1, None):
            config = {"logdir": ".", "max_tasks_per_child": most}
            with evr.Eventor(store=":memory:", config=config) as ev:
                events = [ev.add_event(str(number)) for number in range(5)]
                for number in range(4):
                    triggers = {"at_success": events[number + 1]}
                    step = ev.add_step(f"s{number}", time.sleep, (0.05,), triggers=triggers)
                    ev.add_assoc(events[number], step)
                ev.trigger_event(events[0])
                ev()
        """,
        PYTHONUNBUFFERED="",
    )
    lines = ran.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 2 * (2 + 2 * 4), ran.stdout


@pytest.mark.parametrize("most", [1, None])
def test_a_step_that_writes_to_all_it_holds_but_its_own_pipe_harms_nobody(make, most):
    held = set(pipes())

    def spoil():
        own = sys._getframe(2).f_locals["channel"]._connection.fileno()
        for inode, descriptors in pipes().items():
            for descriptor in descriptors if inode not in held else ():
                if descriptor != own:
                    with contextlib.suppress(OSError):
                        os.write(descriptor, b"\x7f" * 12)

    ev = make(config={"max_tasks_per_child": most})
    line(ev, spoil, int, spoil, int)
    assert ev() is True
    assert set(statuses(ev).values()) == {"success"}


def test_processes_of_many_steps_end_when_their_owner_and_its_keeper_do(start, tmp_path, place):
    """They wait at their pipes, of which nobody else may hold the owner's end."""
    program = start(
        """
        import os, pathlib, time
        import eventor as evr

        def note(number):
            time.sleep(0.1)
            pathlib.Path(f"{number}.new").write_text(str(os.getpid()))
            os.rename(f"{number}.new", f"{number}.pid")

        def end_late():
            while not os.path.exists("over"):
                time.sleep(0.005)

        config = {"logdir": ".", "max_tasks_per_child": None, "max_concurrent": 3}
        with evr.Eventor(store=os.environ["STORE"], config=config) as ev:
            go = ev.add_event("go")
            for number in range(2):
                ev.add_assoc(go, ev.add_step(f"notes {number}", note, (number,)))
            ev.add_assoc(go, ev.add_step("ends late", end_late))
            ev.trigger_event(go)
            ev()
        """,
        STORE=place.store,
    )
    query = "SELECT pid FROM eventor_task WHERE status = 'success'"
    wait_until(lambda: place.exists() and len(place.sql(query)) == 2)
    idle = [pid for (pid,) in place.sql(query)]
    ((keeper,),) = place.sql("SELECT keeper_pid FROM eventor_recovery")
    os.kill(program.pid, signal.SIGSTOP)
    os.kill(keeper, signal.SIGKILL)
    program.kill()
    wait_until(lambda: not any(owner._start_of(pid) for pid in idle))
    (tmp_path / "over").touch()


@pytest.mark.parametrize("most", [1, None])
def test_a_step_that_spoils_its_own_pipe_fails_alone(make, most):
    def spoil():
        own = sys._getframe(2).f_locals["channel"]._connection.fileno()
        os.write(own, b"\0" * 7 + b"\3abc")

    ev = make(config={"max_tasks_per_child": most})
    line(ev, int, spoil, int)
    assert ev() is True
    assert list(statuses(ev).values()) == ["success", "failure", "success"]
    assert ev.tasks("s1")[0].error == "what came through its pipe was not sent by eventor"
