"""SIGINT, SIGTERM and stop(): what runs finishes, or is ended and stays recorded as active."""

import _thread
import asyncio
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

import eventor as evr
from eventor.steps.signals import Signals
from eventor.storage import owner
from tests.conftest import statuses, wait_until

pytestmark = pytest.mark.stores("either")

FORK = multiprocessing.get_context("fork").Process

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import eventor as evr
from eventor.steps import launch

def first():
    Path("reached").write_text(str(os.getpid()))
    while not Path("go").exists():
        time.sleep(0.005)

def deaf():
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    Path("draft").write_text(f"{os.getpid()} {child}")
    Path("draft").rename("reached")
    time.sleep(600)

if "handle" in sys.argv:
    signal.signal(signal.SIGTERM, lambda number, _: print("handled", number, flush=True))
launch.GRACE_SECONDS = 0.2
config = {"logdir": "."}
ev = evr.Eventor(store=os.environ["STORE"], run_mode=sys.argv[1], config=config)
one, two = ev.add_event("one"), ev.add_event("two")
func = deaf if "deaf" in sys.argv else first
ev.add_assoc(one, ev.add_step("first", func=func, triggers={"at_success": two}))
ev.add_assoc(two, ev.add_step("second", func=Path("second").touch))
if sys.argv[1] == "restart":
    ev.trigger_event(one)
handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
try:
    print(ev(), flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
"""


@pytest.fixture
def interrupt(start, tmp_path, place):
    """Start the program, send it signals one by one, and return its process at its end."""

    def run(*numbers, word="plain"):
        process = start(PROGRAM, "restart", *word.split(), STORE=place.store)
        wait_until((tmp_path / "reached").exists)
        log = tmp_path / "program.debug.log"
        for number in numbers:
            os.killpg(process.pid, number)
            wait_until(lambda: "Stopping by SIG" in log.read_text())
        (tmp_path / "go").touch()
        return process, *process.communicate(timeout=60)

    return run


def tasks(place):
    query = "SELECT recovery, step, status, replay FROM eventor_task ORDER BY task_id"
    return place.sql(query)


def test_the_first_interrupt_lets_what_runs_finish(interrupt, script, tmp_path, place):
    process, out, _ = interrupt(signal.SIGINT)
    assert (process.returncode, out) == (0, "interrupted\n")
    assert tasks(place) == [(0, "first", "success", None), (0, "second", "ready", None)]
    assert not (tmp_path / "second").exists()
    assert script(PROGRAM, "recover", STORE=place.store).stdout == "True\n"
    assert tasks(place)[2:] == [
        (1, "first", "success", "skip"),
        (1, "second", "success", "rerun"),
    ]


def test_a_termination_has_its_default_effect_once_all_is_recorded(interrupt, place):
    process, out, err = interrupt(signal.SIGTERM)
    assert (process.returncode, out) == (-signal.SIGTERM, "")
    assert tasks(place) == [(0, "first", "success", None), (0, "second", "ready", None)]
    assert place.sql("SELECT owner_pid FROM eventor_recovery") == [(None,)]
    assert "Stopped by SIGTERM: 1 task stays ready" in err


def test_a_termination_reaches_the_handler_of_the_program(interrupt):
    process, out, _ = interrupt(signal.SIGTERM, word="handle")
    assert (process.returncode, out) == (0, "handled 15\nFalse\n")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_ends_what_runs_and_leaves_it_active(interrupt, tmp_path, script, second, place):
    process, out, err = interrupt(signal.SIGINT, second, word="deaf")
    if second == signal.SIGINT:
        assert (process.returncode, out) == (0, "interrupted\n")
    else:
        assert process.returncode == -signal.SIGTERM
    assert f"Cut short: {second.name} ended the running steps" in err
    assert tasks(place) == [(0, "first", "active", None)]
    # Each closes what it holds, and with it the program's output, before it is seen dead.
    pids = (tmp_path / "reached").read_text().split()
    wait_until(lambda: not any(owner._start_of(int(pid)) for pid in pids))
    assert script(PROGRAM, "recover", STORE=place.store).stdout == "True\n"
    assert tasks(place)[1][3] == "rerun"


@pytest.fixture
def two(make):
    """Make a flow whose second step waits for its first."""

    def build(first, **arguments):
        ev = make(**arguments)
        one, then = ev.add_event("one"), ev.add_event("then")
        ev.add_assoc(one, ev.add_step("first", func=first, triggers={"at_success": then}))
        ev.add_assoc(then, ev.add_step("second", func=int))
        ev.trigger_event(one)
        return ev

    return build


def goes_on(ev, *, left):
    assert ev() is False
    assert statuses(ev) == left
    assert ev() is True
    assert statuses(ev) == {"first[1]": "success", "second[1]": "success"}


def test_stop_in_a_thread_lets_nothing_more_start(two):
    def stop():
        ev.stop()

    ev = two(stop, config={"task_construct": threading.Thread})
    goes_on(ev, left={"first[1]": "success", "second[1]": "ready"})


def test_stop_in_a_signal_handler_lets_nothing_more_start(two):
    ev = two(lambda: os.kill(os.getppid(), signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, lambda *_: ev.stop())
    try:
        goes_on(ev, left={"first[1]": "success", "second[1]": "ready"})
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_stop_before_the_call_holds_for_it(two):
    ev = two(int)
    ev.stop()
    goes_on(ev, left={"first[1]": "ready"})


def test_a_stop_after_which_nothing_waits_is_an_end_like_any_other(two):
    ev = two(int)
    assert ev() is True
    ev.stop()
    assert ev() is True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_the_program_ignores_stops_nothing(two, number):
    ev = two(lambda: os.kill(os.getppid(), number))
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert ev() is True
    finally:
        signal.signal(number, before)


def test_handlers_that_are_set_while_the_flow_runs_stay(two):
    def mine(*_):
        """Do nothing."""

    before = signal.getsignal(signal.SIGTERM)
    ev = two(int)
    put = ev._inbox.forget_stop

    def set_mine():
        signal.signal(signal.SIGTERM, mine)
        put()

    ev._inbox.forget_stop = set_mine
    try:
        assert ev() is True
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_of_asyncio_is_called_once(two):
    async def program():
        came = []
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, came.append, "came")
        ev = two(lambda: os.kill(os.getppid(), signal.SIGTERM))
        assert ev() is False
        await asyncio.sleep(0.01)
        return came

    assert asyncio.run(program()) == ["came"]


def test_of_two_signals_each_has_its_effect(interrupt, place):
    process, out, err = interrupt(signal.SIGINT, signal.SIGTERM, word="handle deaf")
    assert (process.returncode, out) == (0, "handled 15\ninterrupted\n")
    assert "Cut short: SIGTERM" in err
    assert tasks(place) == [(0, "first", "active", None)]


class Interrupted(FORK):
    """A process that a Ctrl-C finds while it is still in its owner's group."""

    def run(self):
        os.kill(os.getpid(), signal.SIGINT)
        super().run()


@pytest.mark.parametrize("construct", [FORK, Interrupted])
def test_a_step_has_the_signals_of_the_program_and_a_group_of_its_own(two, construct):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def look():
        return (
            [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before,
            signal.pthread_sigmask(signal.SIG_BLOCK, ()),
            os.getpgrp() == os.getsid(0) == os.getpid(),
        )

    ev = two(look, config={"task_construct": construct})
    assert ev() is True
    assert ev.tasks("first")[0].result == (True, set(), True)


@pytest.mark.filterwarnings("ignore:eventor is about to fork")
@pytest.mark.parametrize("construct", [FORK, threading.Thread])
def test_a_flow_runs_in_any_thread(two, construct):
    ev = two(os.getpid, config={"task_construct": construct})
    results = []
    thread = threading.Thread(target=lambda: results.append(ev()))
    thread.start()
    thread.join()
    assert results == [True]


@pytest.fixture
def waiting_thread():
    """Have another thread."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.fixture
def other_thread():
    """Have another thread, which logs, writes and imports all the time."""
    stop = threading.Event()

    def work():
        with Path(os.devnull).open("w") as file:
            while not stop.is_set():
                logging.getLogger("other").warning("x")
                print("x", file=file)
                importlib.reload(sys.modules["this_and_that"])

    sys.modules["this_and_that"] = importlib.import_module("colorsys")
    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_a_fork_beside_other_threads_gives_one_warning(two, waiting_thread):
    ev = two(int)
    with pytest.warns(RuntimeWarning) as caught:
        assert ev() is True
    # What another test has left open is told of whenever the collector comes upon it.
    (warning,) = [one for one in caught if one.category is not ResourceWarning]
    assert "fork beside 1 other thread(s)" in str(warning.message)
    assert warning.filename == __file__


def test_as_an_error_it_comes_before_anything_is_active(two, waiting_thread):
    ev = two(int)
    with pytest.raises(RuntimeWarning, match="get_context"):
        ev()
    assert statuses(ev) == {}
    spawn = multiprocessing.get_context("spawn").Process
    assert two(int, config={"task_construct": spawn, "max_tasks_per_child": None})() is True


@pytest.mark.filterwarnings("ignore:eventor is about to fork")
def test_locks_of_other_threads_do_not_stop_a_step(make, other_thread):
    def step():
        logging.getLogger("other").warning("y")
        print("y")
        importlib.reload(importlib.import_module("colorsys"))

    ev = make(config={"max_concurrent": 4})
    go = ev.add_event("go")
    for number in range(40):
        ev.add_assoc(go, ev.add_step(f"s{number}", func=step))
    ev.trigger_event(go)
    assert ev() is True


def test_a_signal_that_comes_when_all_is_over_does_not_count_for_the_next_call(two):
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        ev = two(int)
        with pytest.MonkeyPatch.context() as patch:
            at_end = lambda *_, **__: signal.raise_signal(signal.SIGTERM)  # noqa: E731
            patch.setattr(ev, "_report_end", at_end)
            assert ev() is True
        assert came == [signal.SIGTERM]
        ev.trigger_event(ev.add_event("more"))
        ev.trigger_event(ev._flow.events["one"], "again")
        assert ev() is True
        assert statuses(ev)["second[again]"] == "success"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_that_raises_while_signals_are_taken_leaves_none_taken(monkeypatch):
    taken, plain = [], signal.signal

    def late(number, handler):
        earlier = plain(number, handler)
        if number == signal.SIGINT and not taken:
            taken.append(number)
            signal.raise_signal(signal.SIGTERM)
        return earlier

    def refuse(*_):
        raise ValueError("no more")

    before = plain(signal.SIGINT, signal.default_int_handler), plain(signal.SIGTERM, refuse)
    monkeypatch.setattr(signal, "signal", late)
    came = []
    try:
        with pytest.raises(ValueError, match="no more"), Signals(came.append, int):
            assert came == [signal.SIGTERM]
        assert taken
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is refuse
    finally:
        plain(signal.SIGINT, before[0])
        plain(signal.SIGTERM, before[1])


@pytest.mark.slow
def test_the_first_spawned_process_is_as_safe_from_an_interrupt_as_the_others(script):
    ran = script("""
        import multiprocessing, signal
        import eventor as evr

        class Looking(multiprocessing.get_context("spawn").Process):
            def start(self):
                super().start()
                print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))))

        if __name__ == "__main__":
            config = {"logdir": ".", "task_construct": Looking}
            with evr.Eventor(store=":memory:", config=config) as ev:
                go = ev.add_event("go")
                ev.add_assoc(go, ev.add_step("one", func=int), ev.add_step("two", func=int))
                ev.trigger_event(go)
                print(ev())
    """)
    assert ran.stdout == "[2, 15]\n[2, 15]\nTrue\n", ran.stderr


CUT = """
import os, signal, sys, time
from pathlib import Path
import eventor as evr
from eventor.steps import launch

def mild():
    is_deaf = signal.SIGTERM, signal.SIG_IGN
    if sys.argv[1] == "hears":
        signal.signal(*is_deaf)
    child = os.fork()
    if child == 0:
        if sys.argv[1] == "deaf":
            signal.signal(*is_deaf)
        else:
            signal.signal(signal.SIGTERM, lambda *_: Path("heard").touch() or os._exit(0))
        Path("draft").write_text(str(os.getpid()))
        Path("draft").rename("reached")
        time.sleep(600)
        os._exit(0)
    if sys.argv[1] == "deaf":
        time.sleep(600)
    while not Path("heard").exists():
        time.sleep(0.005)

launch.GRACE_SECONDS = 5 if sys.argv[1] == "hears" else 0.2
ev = evr.Eventor(store=os.environ["STORE"], config={"logdir": "."})
one = ev.add_event("one")
ev.add_assoc(one, ev.add_step("mild", func=mild))
ev.trigger_event(one)
try:
    ev()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("word", ["deaf", "hears"])
def test_the_second_reaches_what_a_step_has_started(start, tmp_path, word, place):
    process = start(CUT, word, STORE=place.store)
    wait_until((tmp_path / "reached").exists)
    log = tmp_path / "program.debug.log"
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "Stopping by SIGINT" in log.read_text())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "interrupted\n"
    child = int((tmp_path / "reached").read_text())
    wait_until(lambda: owner._start_of(child) is None)
    assert (tmp_path / "heard").exists() == (word == "hears")


def test_a_signal_for_a_step_does_not_reach_the_event_loop_of_the_program(two):
    async def program():
        came = []
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, came.append, "came")
        ev = two(lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert ev() is False
        await asyncio.sleep(0.01)
        return came, ev.tasks()[0].error

    assert asyncio.run(program()) == ([], "killed by SIGTERM")


def test_threads_that_threading_does_not_know_are_warned_of(two):
    lock = _thread.allocate_lock()

    def hold():
        lock.acquire()

    with lock:
        _thread.start_new_thread(hold, ())
        wait_until(lambda: len(sys._current_frames()) > 1)
        with pytest.warns(RuntimeWarning, match="fork beside 1 other thread"):
            assert two(int)() is True
    wait_until(lambda: len(sys._current_frames()) == 1)


def test_what_another_thread_is_importing_can_be_imported_in_a_step(script, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, time\nopen('begun', 'w').close()\n"
        "while not os.path.exists('go'):\n    time.sleep(0.005)\n"
    )
    ran = script("""
        import os, pathlib, threading, time, warnings
        import eventor as evr

        def step():
            pathlib.Path("go").touch()
            import slow
            return slow.__name__

        warnings.simplefilter("ignore")
        other = threading.Thread(target=__import__, args=("slow",))
        with evr.Eventor(store=":memory:", config={"logdir": "."}) as ev:
            begin = ev.add_event("begin")
            ev.add_assoc(begin, ev.add_step("s", func=step))
            ev.trigger_event(begin)
            other.start()
            while not os.path.exists("begun"):
                time.sleep(0.005)
            print(ev(), ev.tasks()[0].result)
            other.join()
    """)
    assert ran.stdout == "True slow\n", ran.stderr


LEFT = """
import os, subprocess, time
from pathlib import Path
import eventor as evr

def leaves():
    left = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    Path("left").write_text(str(left.pid))

def waits():
    Path("reached").touch()
    time.sleep(600)

ev = evr.Eventor(store=os.environ["STORE"], config={"logdir": "."})
one, two = ev.add_event("one"), ev.add_event("two")
ev.add_assoc(one, ev.add_step("leaves", func=leaves, triggers={"at_success": two}))
ev.add_assoc(two, ev.add_step("waits", func=waits))
ev.trigger_event(one)
ev()
"""


def test_the_second_ends_what_ended_steps_have_left(start, tmp_path, place):
    process = start(LEFT, STORE=place.store)
    wait_until((tmp_path / "reached").exists)
    process.send_signal(signal.SIGINT)
    log = tmp_path / "program.debug.log"
    wait_until(lambda: "Stopping by SIGINT" in log.read_text())
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    left = int((tmp_path / "left").read_text())
    wait_until(lambda: owner._start_of(left) is None)


@pytest.mark.stores("both")
def test_a_look_of_another_thread_does_not_keep_a_run_from_its_begin(make):
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", int))
    ev.trigger_event(go)
    recording, let = threading.Event(), threading.Event()
    record = ev._ledger.record

    def slow(changes, now):
        ev._ledger.record = record
        recording.set()
        let.wait(30)
        record(changes, now)

    ev._ledger.record = slow
    looks = threading.Thread(target=ev.tasks)
    looks.start()
    recording.wait(30)
    called = []

    def both():
        runs = threading.Thread(target=lambda: called.append(ev()))
        runs.start()
        let.set()
        looks.join()
        runs.join()

    with pytest.warns(RuntimeWarning, match="fork beside"):
        both()
    assert called == [True]


@pytest.mark.stores("both")
def test_a_look_of_a_signal_handler_in_a_transaction_is_refused_and_harms_nobody(make):
    """In between it may look; what runs goes on in any case."""
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", int))
    refused = []

    def look(*_):
        try:
            ev.tasks()
        except evr.UsageError as error:
            refused.append(str(error))

    write = ev._store.write

    def interrupted(what, work, until=None):
        def working(connection):
            signal.raise_signal(signal.SIGUSR1)
            return work(connection)

        return write(what, working, until)

    before = signal.signal(signal.SIGUSR1, look)
    ev._store.write = interrupted
    try:
        ev.trigger_events(go, range(20))
        assert ev() is True
    finally:
        signal.signal(signal.SIGUSR1, before)
        del ev._store.write
    assert len(refused) > 20
    assert "expected calls of stop() and trigger_event() alone" in refused[0]
    assert len(ev.tasks(status="success")) == 20
