"""Steps on executors of `concurrent.futures`: threads, processes, loky, and a cluster of Dask."""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import multiprocessing
import os
import pickle
import re
import resource
import selectors
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import _ExecutorManagerThread
from multiprocessing.connection import wait as wait_for
from pathlib import Path

import pytest

import eventor as evr
from eventor import types
from eventor.steps import line, remote, submit, task
from eventor.storage import lease, owner, sqlite_backend
from tests.conftest import statuses, wait_until

SPAWN = multiprocessing.get_context("spawn")

pytestmark = pytest.mark.stores("either")


def processes(workers=2):
    return ProcessPoolExecutor(workers, mp_context=SPAWN)


def loky_processes(workers=2):
    from loky import ProcessPoolExecutor

    return ProcessPoolExecutor(workers)


@contextlib.contextmanager
def dask():
    import distributed

    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=2,
            dashboard_address=":0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()
    # Dask keeps a thread for ever, and other tests fork.
    distributed.utils._offload_executor.shutdown()
    distributed.utils._offload_executor = ThreadPoolExecutor(1)


MAKERS = {"threads": ThreadPoolExecutor, "processes": processes, "loky": loky_processes}
ONCE = pytest.mark.once
HERE_ALONE = [ONCE, pytest.mark.stores("sqlite")]
"""What is dear, and whose workers know of no store."""

LOKY, DASK = (pytest.param(kind, marks=HERE_ALONE) for kind in ("loky", "dask"))
REMOTE = [pytest.param("processes", marks=ONCE), LOKY, DASK]
KINDS = ["threads", *REMOTE]


@pytest.fixture(scope="module")
def instances():
    """Make one executor of each kind for all tests of this module, when it is asked for."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def instance(kind):
            return stack.enter_context(dask() if kind == "dask" else MAKERS[kind](4))

        yield instance


@pytest.fixture
def on(make, instances):
    """Make Eventors on an executor of a kind."""

    def build(kind, store=None, **config):
        settings = {"task_construct": instances(kind), "max_concurrent": 4, **config}
        return make(store, config=settings)

    return build


def add(ev, func, *args, name=None, **more):
    """Define a step that an event of its own starts, and trigger that."""
    name = name or getattr(func, "__name__", "step")
    event = ev.add_event(f"start {name}")
    step = ev.add_step(name, func, args, **more)
    ev.add_assoc(event, step)
    ev.trigger_event(event, 1)
    return step


def the_task(ev, step=None):
    (task,) = ev.tasks(step)
    return task


# What steps do.


def plus(one, two=0):
    return one + two


def fail(words):
    raise ValueError(words)


def here():
    current = evr.current()
    return (current.step, current.sequence, current.run_id, current.recovery, current.attempt)


def speak(words):
    log = logging.getLogger("of.a.step")
    log.debug("%s in debug", words)
    log.info("%s in info", words)
    log.error("%s in error", words)
    logging.getLogger("of.a.step.quiet").info("%s too quiet", words)
    logging.getLogger("of.a.step.disabled").error("%s disabled", words)


def fail_until(path, times):
    with path.open("a") as file:
        file.write("!")
    if len(path.read_text()) < times:
        raise OSError("not yet")
    return evr.current().attempt


def begin_and_wait(begun, goes_on):
    """Say that it runs, and wait until it may go on."""
    begun.write_text(str(os.getpid()))
    wait_until(goes_on.exists, 60)
    return os.getpid()


def trigger_and_wait(event, path):
    evr.current().trigger(event)
    wait_until(path.exists)


def trigger_many(event, sequences):
    for sequence in sequences:
        evr.current().trigger(event, sequence)


def die_once(path, number=signal.SIGKILL):
    """End the process in which this runs, the first time."""
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), number)
        wait_until(lambda: False)
    return evr.current().attempt


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    wait_until(lambda: False)


def overlap(directory):
    """Count how many of these run at the same time."""
    me = directory / str(evr.current().sequence)
    me.touch()
    seen = len(list(directory.iterdir()))
    time.sleep(0.02)  # so that others have a chance to be wrong
    me.unlink()
    return seen


class Point:
    def __init__(self, x):
        self.x = x

    def __eq__(self, other):
        return self.x == other.x

    __hash__ = None


class Unreadable:
    def __reduce__(self):
        return fail, ("as it must",)


# The seam.


@pytest.mark.parametrize("kind", KINDS)
def test_steps_end_well_or_not_and_data_goes_between_them(on, kind):
    ev = on(kind, stop_on_exception=False)
    first = add(ev, plus, 40, name="first", kwargs={"two": 2})
    second = ev.add_step("second", plus, (first.result, evr.sequence))
    ev.add_assoc(first.success, second)
    third = ev.add_step("third", Point, (second.result,))
    ev.add_assoc(second.success, third)
    add(ev, fail, "no good", name="bad")
    add(ev, here)
    assert ev() is False
    assert statuses(ev) == {
        "first[1]": "success",
        "second[1]": "success",
        "third[1]": "success",
        "bad[1]": "failure",
        "here[1]": "success",
    }
    assert ev.result("third", 1) == Point(43)
    assert ev.result("here", 1) == ("here", 1, 1, 0, 1)
    task = the_task(ev, "bad")
    assert task.error == "ValueError: no good"
    assert task.traceback.splitlines()[1].endswith("in fail")
    assert all(isinstance(task.pid, int) for task in ev.tasks())
    assert (the_task(ev, "first").pid == os.getpid()) == (kind == "threads")


@pytest.mark.parametrize("kind", ["threads", *REMOTE[:2]])
def test_a_factory_is_called_when_ev_starts_and_shut_down_when_it_ends(make, kind):
    made = []

    def factory():
        made.append(MAKERS[kind](1))
        return made[-1]

    ev = make(config={"task_construct": factory})
    add(ev, plus, 1)
    assert made == []
    assert ev() is True
    add(ev, plus, 1, name="more")
    assert ev() is True
    assert len(made) == 2
    for executor in made:
        with pytest.raises(RuntimeError, match=r"shutdown|ShutdownExecutor|after"):
            executor.submit(int)


def test_the_class_of_an_executor_is_a_factory(make):
    ev = make(config={"task_construct": ThreadPoolExecutor})
    add(ev, plus, 1)
    assert ev() is True


def test_a_pool_that_forks_runs_what_is_in_its_memory(script, place):
    ran = script(
        """
        import logging, multiprocessing, os, sys
        from concurrent.futures import ProcessPoolExecutor
        import eventor as evr

        logging.basicConfig(stream=sys.stdout, format="%(message)s")

        def fork():
            return ProcessPoolExecutor(2, multiprocessing.get_context("fork"))

        def step(number):
            logging.warning("in step %d", number)
            evr.current().trigger("also", number)

        config = {"logdir": ".", "task_construct": fork, "max_concurrent": 2}
        with evr.Eventor(store=os.environ["STORE"], logging_level="ERROR", config=config) as ev:
            begin, also = ev.add_event("begin"), ev.add_event("also")
            ev.add_assoc(begin, ev.add_step("step", step, (evr.sequence,)))
            ev.add_assoc(also, ev.add_step("lambda", lambda: 1))
            ev.trigger_events(begin, range(3))
            assert ev() is True
            assert len(ev.tasks("lambda")) == 3
        """,
        STORE=place.store,
    )
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.splitlines()) == ["in step 0", "in step 1", "in step 2"]


class AtOnce(Executor):
    """Runs what is submitted before it returns."""

    def submit(self, func, *args):
        future = Future()
        future.set_result(func(*args))
        return future


class OwnThreads(Executor):
    """Runs what is submitted in threads, and is no `ThreadPoolExecutor`."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(2)

    def submit(self, func, *args):
        return self.pool.submit(func, *args)

    def shutdown(self, wait=True):
        self.pool.shutdown(wait)


class ByHand(Executor):
    """Has a test do what is submitted, in a thread of the test's own."""

    def __init__(self, do):
        self.do = do
        self.threads = []
        self.errands = []

    def submit(self, func, data):
        future = Future()
        future.set_running_or_notify_cancel()
        self.errands.append(data)
        thread = threading.Thread(target=self._do, args=(func, data, future))
        self.threads.append(thread)
        thread.start()
        return future

    def _do(self, func, data, future):
        try:
            future.set_result(self.do(func, data))
        except BaseException as error:
            future.set_exception(error)

    def shutdown(self, wait=True):
        for thread in self.threads:
            thread.join(30)


@pytest.mark.parametrize("construct", [AtOnce, OwnThreads])
def test_an_executor_of_another_kind_may_run_steps_in_this_process(make, construct, caplog):
    ev = make(config={"task_construct": construct, "max_concurrent": 4})
    ev.add_assoc(ev.add_event("found"), ev.add_step("plus", plus, (evr.sequence, 1)))
    add(ev, trigger_many, "found", [5, 6])
    add(ev, speak, "here")
    assert ev() is True
    assert [task.result for task in ev.tasks("plus")] == [6, 7]
    assert {task.pid for task in ev.tasks()} == {os.getpid()}
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count("here in error") == 1
    assert remote.owners_here == {}


def test_trigger_event_in_a_thread_of_an_executor_is_that_of_the_step(make):
    ev = make(config={"task_construct": ThreadPoolExecutor})
    found = ev.add_event("found")
    add(ev, lambda: ev.trigger_event(found), name="find")
    assert ev() is True
    assert [str(event.cause) for event in ev.events(found)] == ["step find"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_tried_again(on, kind, tmp_path):
    ev = on(kind)
    add(ev, fail_until, tmp_path / "tries", 3, config={"max_attempts": 3, "retry_on": OSError})
    assert ev() is True
    task = the_task(ev)
    assert (task.attempt, task.result) == (3, 3)
    assert [attempt.error for attempt in task.attempts] == ["OSError: not yet"] * 2 + [None]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_raised_that_is_not_to_be_retried_is_the_end(on, kind, tmp_path):
    ev = on(kind)
    add(ev, fail_until, tmp_path / "tries", 3, config={"max_attempts": 3, "retry_on": KeyError})
    assert ev() is False
    assert the_task(ev).attempt == 1


@pytest.mark.parametrize("kind", KINDS)
def test_records_of_steps_reach_the_handlers_of_the_owner_once(on, kind, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(logging.getLogger("of.a.step.quiet"), "level", logging.ERROR)
    monkeypatch.setattr(logging.getLogger("of.a.step.disabled"), "disabled", True)
    ev = on(kind)
    add(ev, speak, "first", name="one")
    add(ev, speak, "second", name="two")
    assert ev() is True
    found = [record.getMessage() for record in caplog.records if record.name.startswith("of.")]
    expected = [f"{which} in {how}" for which in ("first", "second") for how in ("info", "error")]
    assert sorted(found) == sorted(expected)
    (record,) = [one for one in caplog.records if one.getMessage() == "first in info"]
    assert (record.process == os.getpid()) == (kind == "threads")
    # They come before the end of their step is told.
    messages = [record.getMessage() for record in caplog.records]
    end = next(index for index, one in enumerate(messages) if "completed one[1]" in one)
    assert messages.index("first in error") < end


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_step_triggers_starts_while_it_still_runs(on, kind, tmp_path):
    ev = on(kind)
    also = ev.add_event("also")
    ev.add_assoc(also, ev.add_step("touch", Path.touch, (tmp_path / "touched",)))
    add(ev, trigger_and_wait, "also", tmp_path / "touched")
    assert ev() is True
    (event,) = ev.events("also")
    assert (str(event.cause), event.sequence) == ("step trigger_and_wait", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_each_of_several_steps_at_once_knows_itself_and_none_of_its_triggers_is_lost(on, kind):
    ev = on(kind, max_concurrent=0)
    found, begin = ev.add_event("found"), ev.add_event("begin")
    ev.add_assoc(begin, ev.add_step("here", here))
    ev.add_assoc(begin, ev.add_step("many", trigger_many, ("found", range(100, 130))))
    ev.trigger_events(begin, range(20))
    assert ev() is True
    assert [ev.result("here", number)[1] for number in range(20)] == list(range(20))
    assert {event.sequence for event in ev.events(found)} == set(range(100, 130))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_trigger_is_an_error_at_the_call(on, kind):
    ev = on(kind, stop_on_exception=False)
    ev.add_event("known")
    add(ev, trigger_many, "nkown", [1], name="wrong event")
    add(ev, trigger_many, "known", [1.5], name="wrong sequence")
    assert ev() is False
    assert "there is no event 'nkown'; did you mean 'known'?" in the_task(ev, "wrong event").error
    assert "TriggerError" in the_task(ev, "wrong sequence").error
    assert ev.events("known") == []


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_are_submitted_than_may_be_in_flight(on, kind, tmp_path):
    directory = tmp_path / "running"
    directory.mkdir()
    ev = on(kind, max_concurrent=2)
    begin = ev.add_event("begin")
    ev.add_assoc(begin, ev.add_step("overlap", overlap, (directory,)))
    ev.trigger_events(begin, range(12))
    assert ev() is True
    assert max(task.result for task in ev.tasks()) <= 2


@pytest.mark.parametrize("kind", REMOTE)
def test_what_cannot_be_sent_fails_its_step_and_is_named(on, kind):
    ev = on(kind, stop_on_exception=False)
    lock = threading.Lock()
    config = {"max_attempts": 3}
    add(ev, plus, lock, name="locked", config=config)
    add(ev, lambda: (lock, 1), name="closed over")
    add(ev, print, name="by keyword", kwargs={"file": lock})
    add(ev, plus, Unreadable(), name="unreadable")
    add(ev, plus, 1, name="good")
    assert ev() is False
    for name, part in (("locked", "args"), ("closed over", "func"), ("by keyword", "kwargs")):
        task = the_task(ev, name)
        assert f"EventorError: {part} of step {name!r}, " in task.error
        assert "cannot be sent to its process: cannot pickle '_thread.lock' object" in task.error
        assert task.attempt == 1
    assert (
        "args of step 'unreadable' cannot be rebuilt in its process: ValueError: as it must"
        in the_task(ev, "unreadable").error
    )
    assert the_task(ev, "good").result == 1


@pytest.mark.parametrize("kind", KINDS)
def test_lambdas_and_closures_are_sent_by_value(on, kind):
    number = 41
    ev = on(kind)
    step = add(ev, lambda: number + 1, name="closure")
    ev.add_assoc(step.success, ev.add_step("next", lambda one: one + 1, (step.result,)))
    assert ev() is True
    assert ev.result("next", 1) == 43


def test_without_cloudpickle_a_lambda_is_told_how_to_be_sent(on, monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    ev = on("processes")
    add(ev, lambda: 1, name="nameless")
    assert ev() is False
    assert "python -m pip install 'eventor[executors]' may help" in the_task(ev).error
    assert "func of step 'nameless'" in the_task(ev).error


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_that_cannot_be_pickled_is_kept_as_its_repr(on, kind, caplog):
    ev = on(kind)
    add(ev, threading.Lock, name="lock")
    assert ev() is True
    assert "unlocked _thread.lock" in the_task(ev).result
    assert "its result cannot be pickled, its repr is kept" in caplog.text


# Lost workers.


@pytest.mark.once
@pytest.mark.parametrize(
    ("kind", "attempts"),
    [
        ("processes", 1),
        ("processes", 2),
        *(pytest.param(kind, 2, marks=HERE_ALONE) for kind in ("loky", "dask")),
    ],
)
def test_a_lost_worker_is_a_failure_that_a_retry_mends(make, instances, kind, attempts, tmp_path):
    construct = instances(kind) if kind == "dask" else functools.partial(MAKERS[kind], 1)
    settings = {"task_construct": construct, "max_concurrent": 4, "stop_on_exception": False}
    ev = make(config=settings)
    lost = add(ev, die_once, tmp_path / "died", config={"max_attempts": attempts})
    after = ev.add_step("after", plus, (1,))
    ev.add_assoc(lost.complete, after)
    ev.add_assoc(after.success, ev.add_step("last", plus, (2,)))
    assert ev() is True  # the end is handled
    task = the_task(ev, "die_once")
    assert "its worker was lost" in task.attempts[0].error
    assert (task.attempts[0].error == remote.TWICE) == (kind == "dask")
    if attempts == 2:
        assert (task.attempt, task.result) == (2, 2)
    else:
        assert task.status == "failure"
    assert statuses(ev)["last[1]"] == "success"


@pytest.mark.once
@pytest.mark.parametrize("kind", ["processes", LOKY])
def test_what_had_not_begun_when_an_executor_broke_is_submitted_anew(make, kind, tmp_path):
    ev = make(
        config={
            "task_construct": functools.partial(MAKERS[kind], 1),
            "max_concurrent": 0,
            "stop_on_exception": False,
        }
    )
    begin, die_event = ev.add_event("begin"), ev.add_event("die")
    ev.add_assoc(die_event, ev.add_step("die", die))
    ev.add_assoc(begin, ev.add_step("innocent", plus, (evr.sequence,)))
    ev.trigger_event(die_event, 0)
    ev.trigger_events(begin, range(6))
    assert ev() is False
    assert "its worker was lost" in the_task(ev, "die").error
    assert [task.result for task in ev.tasks("innocent")] == list(range(6))
    assert {task.attempt for task in ev.tasks("innocent")} == {1}


@pytest.mark.once
@pytest.mark.parametrize("kind", ["processes", DASK])
def test_a_worker_killed_from_outside_takes_no_others_with_it_that_retries_mend(
    make, instances, kind, tmp_path
):
    construct = instances("dask") if kind == "dask" else processes
    ev = make(config={"task_construct": construct, "max_concurrent": 4})
    begun, goes_on, killed = tmp_path / "begun", tmp_path / "goes on", []

    def kill():
        wait_until(lambda: begun.exists() and begun.read_text(), 60)
        killed.append(int(begun.read_text()))
        os.kill(killed[0], signal.SIGKILL)
        goes_on.touch()

    killer = threading.Thread(target=kill)
    killer.start()
    add(ev, begin_and_wait, begun, goes_on, config={"max_attempts": 2})
    begin = ev.add_event("begin")
    ev.add_assoc(begin, ev.add_step("beside", plus, (evr.sequence,), config={"max_attempts": 3}))
    ev.trigger_events(begin, range(8))
    assert ev() is True
    killer.join()
    task = the_task(ev, "begin_and_wait")
    assert task.attempt == 2
    assert task.attempts[0].pid == killed[0] != task.pid
    assert [task.result for task in ev.tasks("beside")] == list(range(8))


def ignore_sigterm_once(path):
    """Wait in the first attempt, whatever comes; in the next one, for the end of that."""
    if not path.exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        path.write_text(str(os.getpid()))
        wait_until(lambda: False, 60)
    first = int(path.read_text())
    wait_until(lambda: not owner.is_running(owner.process_of(first)), 30)
    return evr.current().attempt


def die_once_after(path, died):
    if not died.exists():
        wait_until(lambda: path.exists() and path.read_text())
    return die_once(died)


@pytest.mark.once
def test_what_ignores_sigterm_in_a_broken_pool_does_not_go_on_beside_its_retry(make, tmp_path):
    ev = make(config={"task_construct": processes, "max_concurrent": 2})
    path, retries = tmp_path / "pid", {"max_attempts": 2}
    add(ev, ignore_sigterm_once, path, config=retries)
    add(ev, die_once_after, path, tmp_path / "died", config=retries)
    assert ev() is True
    assert [task.result for task in ev.tasks()] == [2, 2]


@pytest.mark.once
def test_a_pool_that_has_not_noticed_the_death_of_a_worker_is_woken(make, tmp_path, monkeypatch):
    plain, calls = _ExecutorManagerThread.wait_result_broken_or_wakeup, []

    def wait(manager):
        """Wait as it does if a process was started after it had looked which there are."""
        calls.append(manager)
        if len(calls) == 2:
            readers = manager.result_queue._reader, manager.thread_wakeup._reader
            wait_for(readers)
        return plain(manager)

    monkeypatch.setattr(_ExecutorManagerThread, "wait_result_broken_or_wakeup", wait)
    monkeypatch.setattr("eventor.steps.submit._LOST_SECONDS", math.inf)
    ev = make(config={"task_construct": lambda: processes(1)})
    add(ev, die_once, tmp_path / "died", config={"max_attempts": 2})
    assert ev() is True
    assert the_task(ev).attempt == 2


@pytest.mark.once
def test_a_broken_instance_fails_its_steps_with_advice(make):
    with processes(1) as pool:
        ev = make(config={"task_construct": pool, "stop_on_exception": False})
        lost = add(ev, die, config={"max_attempts": 2})
        ev.add_assoc(lost.complete, ev.add_step("after", plus, (1,), config={"max_attempts": 5}))
        ev()
    first, second = the_task(ev, "die").attempts
    assert "its worker was lost: BrokenProcessPool" in first.error
    assert "give a function that makes one as task_construct" in second.error
    assert the_task(ev, "after").attempt == 1


def test_an_executor_that_is_shut_down_fails_the_step_and_not_the_flow(make):
    with ThreadPoolExecutor() as pool:
        pass
    ev = make(config={"task_construct": pool})
    add(ev, plus, 1)
    assert ev() is False
    assert "RuntimeError: cannot schedule new futures after shutdown" in the_task(ev).error


@pytest.mark.once
def test_a_factory_whose_executors_all_break_ends(make):
    ev = make(
        config={
            "task_construct": lambda: ProcessPoolExecutor(
                1, SPAWN, initializer=os._exit, initargs=(3,)
            ),
            "stop_on_exception": False,
            "max_concurrent": 2,
        }
    )
    begin = ev.add_event("begin")
    ev.add_assoc(begin, ev.add_step("never", plus, (1,)))
    ev.trigger_events(begin, range(3))
    assert ev() is False
    assert {str(task.status) for task in ev.tasks()} == {"failure"}
    assert all("BrokenProcessPool" in task.error for task in ev.tasks())


def answer(func, data, end):
    end.send(func(data))


class Forgets(ByHand):
    """Runs each call in a process; if the first one dies, says so when the next has begun."""

    def __init__(self):
        self.over = threading.Event()
        super().__init__(self.run)

    def run(self, func, data):
        if len(self.threads) > 1:
            submit._LOST_SECONDS = math.inf  # this one ends well, however late that is told
            self.over.set()
            self.threads[0].join(30)
        here, there = SPAWN.Pipe(duplex=False)
        process = SPAWN.Process(target=answer, args=(func, data, there))
        process.start()
        there.close()
        with here:
            try:
                return here.recv()
            except EOFError:
                self.over.wait(60)
                late = types.failure("it is late"), process.pid
                return pickle.dumps(remote.Report(pickle.loads(data).ticket, *late))
            finally:
                process.join()


@pytest.mark.once
def test_a_worker_is_lost_whose_executor_says_nothing_and_later_is_too_late(
    make, monkeypatch, tmp_path
):
    monkeypatch.setattr(submit, "_LOST_SECONDS", 0.1)
    with Forgets() as executor:
        ev = make(config={"task_construct": executor})
        add(ev, die_once, tmp_path / "died", config={"max_attempts": 2})
        assert ev() is True
        assert executor.over.is_set()
    told = "its worker was lost: its connection has ended, and its executor says nothing"
    assert [attempt.error for attempt in the_task(ev).attempts] == [told, None]
    assert ev.result("die_once", 1) == 2


def cut_off_and_wait(path, how):
    (opened,) = remote._lines.values()
    how(opened._connection)
    assert opened._connection.recv(1) == b""  # the other side has hung up, too
    path.touch()
    wait_until(lambda: not path.exists())


@pytest.mark.parametrize("lost", [True, False])
def test_a_worker_is_lost_that_has_hung_up_and_none_on_whom_was_hung_up(
    by_hand, monkeypatch, tmp_path, lost
):
    """As by the network, while it lives; or since it sends what nobody understands."""
    monkeypatch.setattr(submit, "_LOST_SECONDS", 0.1)
    monkeypatch.setattr(submit, "_LOOK_SECONDS", 0.01)
    cut, looks = tmp_path / "cut", []
    look = line.Desk.look

    def count(self):
        look(self)
        if cut.exists() and not lost:
            looks.append(time.monotonic())
            if looks[-1] - looks[0] > 1:
                cut.unlink()

    monkeypatch.setattr(line.Desk, "look", count)

    def hang_up(connection):
        connection.shutdown(socket.SHUT_WR)

    def say_nonsense(connection):
        connection.sendall(b"\xff" * 100)

    ev, _ = by_hand(lambda func, data: func(data), sleep_between_loops=0.05)
    add(ev, cut_off_and_wait, cut, hang_up if lost else say_nonsense)
    assert ev() is not lost
    if lost:
        assert "its worker was lost: its connection has ended" in the_task(ev).error
        wait_until(cut.exists)
        cut.unlink()


class OfAClient(ByHand):
    """As Dask's: of a client, which may close, and then nobody tells of what was submitted."""

    class Client:
        status = "running"

    def __init__(self, close_in_attempt):
        self._client = self.Client()
        self.close_in_attempt = close_in_attempt
        self.over = threading.Event()
        super().__init__(self.run)

    def run(self, func, data):
        if len(self.threads) == self.close_in_attempt:
            self._client.status = "closed"
            self.over.wait(60)
        return func(data)

    def shutdown(self, wait=True):
        self.over.set()
        super().shutdown()


def test_what_is_pending_on_a_closed_client_fails_and_so_does_what_comes_after(make):
    with OfAClient(close_in_attempt=1) as executor:
        ev = make(config={"task_construct": executor, "stop_on_exception": False})
        lost = add(ev, plus, 1, name="lost", config={"max_attempts": 5})
        ev.add_assoc(lost.complete, ev.add_step("after", plus, (1,), config={"max_attempts": 5}))
        assert ev() is False
    closed = "its executor was closed, as its client was"
    first, second = the_task(ev, "lost").attempts
    assert first.error == f"its worker was lost: {closed}"
    advice = "a broken executor stays so; give a function that makes one as task_construct"
    assert second.error == f"it could not be started: {closed}; {advice}"
    assert the_task(ev, "after").error == second.error
    assert len(executor.threads) == 1


def test_in_the_place_of_a_closed_client_a_function_makes_another(make):
    made = [OfAClient(close_in_attempt=1), OfAClient(close_in_attempt=0)]
    left = iter(made)
    with made[0]:
        ev = make(config={"task_construct": lambda: next(left)})
        add(ev, plus, 1, config={"max_attempts": 2})
        assert ev() is True
    assert the_task(ev).attempt == 2
    assert [len(one.threads) for one in made] == [1, 1]


# Wrong executors.


def no_executor():
    return 5


def raising():
    raise OSError("no cluster today")


async def later():
    """Be of no use."""


class Client:
    """As Dask's: what it submits has futures of its own."""

    def submit(self, func):
        """Do nothing."""

    shutdown = submit

    def get_executor(self):
        """Do nothing."""


class InterpreterPoolExecutor(ThreadPoolExecutor):
    """As that of Python 3.14, by its name and its parent."""


@pytest.mark.parametrize(
    ("construct", "words"),
    [
        (InterpreterPoolExecutor, "expected an executor of threads or of processes; steps do not"),
        (InterpreterPoolExecutor(), "expected an executor of threads or of processes; steps do no"),
        (Client(), r"expected an executor, which a Client of Dask gives: client.get_executor\(\)"),
        (5, "expected a class like .*; a concurrent.futures.Executor; or a function that takes"),
        (int, "expected a class like"),
        (lambda needed: needed, "or a function that takes nothing and returns one"),
        (later, "or a function that takes nothing"),
    ],
)
def test_what_is_no_construct_is_refused(make, construct, words):
    with pytest.raises(evr.ConfigError, match=words):
        make(config={"task_construct": construct})


@pytest.mark.once
def test_a_client_of_dask_is_refused(make, instances):
    with pytest.raises(evr.ConfigError, match=r"a Client of Dask gives: client.get_executor\(\)"):
        make(config={"task_construct": instances("dask")._client})


@pytest.mark.parametrize(
    ("factory", "kind", "words"),
    [
        (
            no_executor,
            evr.ConfigError,
            "no_executor at .*, which returned 5; expected a concurrent",
        ),
        (
            functools.partial(InterpreterPoolExecutor, 1),
            evr.ConfigError,
            "returned .*; expected an executor of threads or of processes; steps do not run in int",
        ),
        (Client, evr.ConfigError, r"a Client of Dask gives one: client.get_executor\(\)"),
        (raising, evr.LaunchError, "has made no executor: OSError: no cluster today"),
    ],
)
def test_a_factory_that_makes_no_executor_is_told_before_anything_runs(make, factory, kind, words):
    ev = make(config={"task_construct": factory})
    add(ev, plus, 1)
    with pytest.raises(kind, match=words):
        ev()
    assert ev.tasks() == []


def test_after_a_factory_has_failed_ev_can_be_called_again(make):
    makers = [raising, ThreadPoolExecutor]

    def factory():
        return makers.pop(0)()

    ev = make(config={"task_construct": factory})
    add(ev, plus, 1)
    with pytest.raises(evr.LaunchError):
        ev()
    assert ev() is True


@pytest.mark.parametrize(
    ("construct", "name"),
    [
        (ThreadPoolExecutor, "concurrent.futures.thread.ThreadPoolExecutor"),
        (processes, "tests.test_executors.processes"),
        (functools.partial(processes, 1), "functools.partial"),
        (ThreadPoolExecutor(), "concurrent.futures.thread.ThreadPoolExecutor"),
    ],
)
@pytest.mark.parametrize("key", [{"timeout": 5}, {"capture_output": True}])
def test_what_needs_a_process_of_eventors_own_is_refused(make, construct, name, key):
    ev = make(config={"task_construct": construct})
    with pytest.raises(evr.ConfigError, match=f"the task_construct {name} runs it in no process"):
        ev.add_step("s", plus, (1,), config=key)


@pytest.mark.parametrize(
    "host",
    [5, "", " ", "a\nb", "my host", "::1", "999.1.1.1", "10.1", "0.0.0.0", "x" * 64, "a..b", ".a"],
)
def test_a_wrong_callback_host_is_refused(make, host):
    with pytest.raises(
        evr.ConfigError, match=r"callback_host in .*; expected the name or the IPv4 addr"
    ):
        make(config={"callback_host": host})


@pytest.mark.parametrize("host", ["nowhere.invalid", "\u00fc" * 63], ids=["unknown", "too long"])
def test_a_callback_host_that_nobody_knows_is_told_before_anything_runs(make, host):
    ev = make(config={"task_construct": AtOnce, "callback_host": host})
    add(ev, plus, 1)
    told = f"callback_host in .* is {host!r}; expected the name or the IPv4 address of this"
    with pytest.raises(evr.LaunchError, match=told):
        ev()
    assert ev.tasks() == []


@pytest.mark.skipif(sys.platform != "linux", reason="has no other address for itself")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1.2.3", None])
def test_with_a_loopback_address_the_port_is_open_to_this_host_alone(by_hand, host):
    found = []

    def do(func, data):
        with socket.socket() as another:
            found.append(another.connect_ex(("127.0.0.2", pickle.loads(data).home.address.port)))
        return func(data)

    ev, _ = by_hand(do, callback_host=host)
    add(ev, plus, 1)
    assert ev() is True
    assert found == [errno.ECONNREFUSED if host else 0]


def test_an_address_does_not_show_its_key():
    address = line.Address((), 1, b"secret", owner.process_of(os.getpid()))
    assert "secret" not in repr(address)


def test_max_concurrent_has_no_limit_by_open_files(make):
    ev = make(config={"task_construct": ThreadPoolExecutor, "max_concurrent": 0})
    assert ev._plan._max_concurrent == sys.maxsize


# What eventor leaves behind.


@pytest.mark.once
def test_nothing_of_eventors_is_left(script, place):
    ran = script(
        """
        import gc, logging, multiprocessing, os, threading
        from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
        import eventor as evr

        def open_files():
            gc.collect()
            return len(os.listdir("/dev/fd"))

        def work(construct):
            config = {"logdir": ".", "task_construct": construct}
            with evr.Eventor(store=os.environ["STORE"], config=config) as ev:
                begin = ev.add_event("begin")
                ev.add_assoc(begin, ev.add_step("log", logging.error, ("of a step",)))
                ev.trigger_event(begin)
                assert ev() is True

        def threads():
            # With more, it may start another one before it has seen that the first is idle.
            return ThreadPoolExecutor(1)

        def processes():
            return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

        if __name__ == "__main__":
            for make in (threads, processes):
                work(make)  # what is opened once in a program is open by now
                before = open_files()
                work(make)
                assert (open_files(), threading.active_count()) == (before, 1)
                with make() as shared:
                    work(shared)
                    before, threads = open_files(), set(threading.enumerate())
                    work(shared)
                    assert (open_files(), set(threading.enumerate())) == (before, threads)
        """,
        STORE=place.store,
    )
    assert ran.returncode == 0, ran.stderr


# The worker's side, by hand.


@pytest.fixture
def by_hand(make, monkeypatch):
    """Make Eventors on a `ByHand`, as if it were elsewhere; what workers know is then forgotten."""
    monkeypatch.setattr(remote, "_owner_here", lambda _address: None)
    made = []

    def build(do, **config):
        made.append(ByHand(do))
        return make(config={"task_construct": made[-1], **config}), made[-1]

    yield build
    for one in made:
        one.shutdown()
    remote._hang_up()
    for lines in (remote._lines, remote._unreachable, remote._reached, remote._names):
        for opened in lines.values():
            if isinstance(opened, line.Line):
                opened.close()
        lines.clear()


def test_a_submission_begins_once(by_hand, tmp_path):
    reports = []

    def twice(func, data):
        reports.extend(pickle.loads(func(data)) for _ in range(2))
        return pickle.dumps(reports[-1])

    ev, _ = by_hand(twice)
    add(ev, fail_until, tmp_path / "tries", 1, config={"max_attempts": 2})
    assert ev() is False
    # The attempt is the second's to tell here; it has not begun, and the next one has.
    assert (tmp_path / "tries").read_text() == "!!"
    task = the_task(ev)
    assert [attempt.error for attempt in task.attempts] == [remote.TWICE] * 2
    assert [report.outcome.status for report in reports] == ["success", "failure"] * 2


def test_what_is_left_when_ev_has_ended_does_not_begin(by_hand, tmp_path):
    ev, executor = by_hand(lambda func, data: func(data))
    add(ev, fail_until, tmp_path / "tries", 1)
    assert ev() is True
    report = pickle.loads(remote.run(executor.errands[0]))
    assert report.pid is None
    assert "it has not begun: its worker lost touch with the program" in report.outcome.error
    assert (tmp_path / "tries").read_text() == "!"


def test_what_a_dead_program_has_submitted_does_not_begin(by_hand, tmp_path, monkeypatch):
    ev, executor = by_hand(lambda func, data: func(data))
    add(ev, fail_until, tmp_path / "tries", 1)
    assert ev() is True
    monkeypatch.setattr(remote, "is_running", lambda _owner: False)
    report = pickle.loads(remote.run(executor.errands[0]))
    assert "is dead" in report.outcome.error
    assert (tmp_path / "tries").read_text() == "!"


@pytest.fixture
def unreachable(monkeypatch):
    """Have no way from workers to the owner, as on a host from which there is none."""

    def refuse(*_):
        raise OSError("no route")

    monkeypatch.setattr(remote, "is_running", lambda _owner: None)
    monkeypatch.setattr(line.socket, "create_connection", refuse)


def test_where_the_owner_cannot_be_reached_all_comes_with_the_end(by_hand, unreachable, caplog):
    caplog.set_level(logging.INFO)
    ev, _ = by_hand(lambda func, data: func(data))
    ev.add_assoc(ev.add_event("found"), ev.add_step("plus", plus, (evr.sequence, 1)))
    add(ev, trigger_many, "found", [5, 6])
    add(ev, speak, "far away")
    assert ev() is True
    assert [task.result for task in ev.tasks("plus")] == [6, 7]
    assert the_task(ev, "speak").pid == os.getpid()
    assert "far away in info" in caplog.text


def test_hooks_are_told_a_process_that_is_known_with_the_end_alone(by_hand, unreachable):
    told = []
    ev, _ = by_hand(lambda func, data: func(data), on_transition=told.append)
    add(ev, os.getpid)
    assert ev() is True
    pids = [one.pid for one in told if one.kind in ("task_active", "task_success")]
    assert pids == [None, os.getpid()]


def test_a_trigger_that_could_not_be_checked_is_warned_of(by_hand, unreachable, caplog):
    ev, _ = by_hand(lambda func, data: func(data))
    add(ev, trigger_many, "nkown", [5])
    assert ev() is True
    assert "Step trigger_many[1] triggers 'nkown', and there is no such event" in caplog.text


def test_what_could_not_be_sent_in_the_middle_comes_with_the_end(by_hand, caplog):
    caplog.set_level(logging.INFO)

    def cut():
        evr.current().trigger("found", 1)
        for opened in remote._lines.values():
            opened._connection.shutdown(socket.SHUT_RDWR)
        evr.current().trigger("found", 2)
        speak("cut off")

    ev, _ = by_hand(lambda func, data: func(data))
    ev.add_event("found")
    add(ev, cut)
    assert ev() is True
    assert [event.sequence for event in ev.events("found")] == [1, 2]
    found = [one.process for one in caplog.records if one.getMessage() == "cut off in info"]
    assert len(found) == 2  # by the handler here, as in a worker of its own, and by the owner's


def test_who_is_strange_is_not_heard_and_holds_up_nobody(by_hand, monkeypatch):
    monkeypatch.setattr(line, "_PAUSES", (0.0, 0.0))
    strangers = []

    def do(func, data):
        errand = pickle.loads(data)
        port = errand.home.address.port
        silent = socket.create_connection(("127.0.0.1", port))
        loud = socket.create_connection(("127.0.0.1", port))
        loud.sendall(pickle.dumps(Unreadable()) * 10)
        wrong = line.Address((), port, b"another key", errand.home.address.owner)
        strangers.extend([silent, loud])
        with pytest.raises(OSError, match=r"hung up|reset"):
            line.connect(wrong)
        assert loud.recv(32)  # the nonce
        assert loud.recv(1) == b""
        return func(data)

    ev, _ = by_hand(do)
    add(ev, plus, 1)
    assert ev() is True
    silent = strangers[0]
    assert len(silent.recv(100)) == 32
    assert silent.recv(1) == b""  # it was hung up on in the end
    for stranger in strangers:
        stranger.close()


def test_strangers_who_say_nothing_are_dropped(by_hand, monkeypatch):
    monkeypatch.setattr(line, "_MOST_STRANGERS", 2)
    opened = []

    def do(func, data):
        port = pickle.loads(data).home.address.port
        opened.extend(socket.create_connection(("127.0.0.1", port)) for _ in range(5))
        for one in opened:
            assert len(one.recv(32)) == 32
        # Beside the two, as many are let wait as there are submissions.
        assert [one.recv(1) for one in opened[:2]] == [b""] * 2
        with pytest.raises(BlockingIOError):
            opened[2].recv(1, socket.MSG_DONTWAIT)
        return func(data)

    ev, _ = by_hand(do)
    add(ev, plus, 1)
    assert ev() is True
    for one in opened:
        one.close()


@contextlib.contextmanager
def a_worker():
    """Collect what a handler of a worker shows, and what is shown where there is none."""
    found, last = [], []

    class Shows(logging.Handler):
        def __init__(self, level, to):
            super().__init__(level)
            self.to = to

        def emit(self, record):
            self.to.append(record.getMessage())

    # As in a worker of a cluster; pytest's own handlers would be in the way.
    before = logging.root.handlers[:], logging.root.level, logging.lastResort
    logging.root.handlers[:] = []
    logging.root.setLevel(logging.WARNING)
    logging.lastResort = Shows(logging.WARNING, last)
    try:
        yield Shows(logging.NOTSET, found), found, last
    finally:
        logging.root.handlers[:], logging.root.level, logging.lastResort = before
        logging.root.manager._clear_cache()


def speak_beside(others):
    log = logging.getLogger("of.a.step")
    thread = threading.Thread(target=lambda: [others.info("other info"), others.error("other")])
    thread.start()
    thread.join()
    log.info("own info")
    log.error("own error")


HOME = remote.Home(
    line.Address((), 1, b"", None), 1, 0, task.LogLevels({"": logging.INFO}, 0), is_shared=True
)


class Heard(list):
    """A way to somebody."""

    def say(self, said):
        self.append(said.message["msg"])


def perform(func, *args, home=HOME):
    way = Heard()
    call = task.Call("s", 1, 1, func, args, {}, None)
    report = remote.perform(call, remote.Voice(1, way), 1, 0, {}, home)
    assert report.outcome.status == "success", report.outcome.traceback
    assert report.sent == len(way)
    return way


def test_a_shared_worker_shows_what_it_would_show_anyway():
    with a_worker() as (handler, found, last):
        logging.root.addHandler(handler)
        way = perform(speak_beside, logging.getLogger("of.others"))
        assert way == ["own info", "own error"]
        assert found == ["other", "own error"]
        assert logging.root.level == logging.WARNING
        assert logging.root.handlers == [handler]
        assert (handler.filters, last) == ([], [])


def test_a_worker_without_handlers_shows_of_others_what_logging_would():
    with a_worker() as (_handler, _found, last):
        way = perform(speak_beside, logging.getLogger("of.others"))
        assert (way, last) == (["own info", "own error"], ["other"])


def test_in_a_process_of_the_programs_own_executor_it_alone_shows_records():
    home = dataclasses.replace(HOME, is_shared=False)
    with a_worker() as (handler, found, _last):
        logging.root.addHandler(handler)
        way = perform(speak_beside, logging.getLogger("of.others"), home=home)
        assert (way, found) == (["own info", "own error"], ["other"])


def test_a_logger_that_hands_nothing_on_is_heard_once():
    aside = logging.getLogger("aside")
    aside.propagate = False
    try:
        assert perform(logging.getLogger("aside.of.it").info, "said") == ["said"]
        assert aside.handlers == []
    finally:
        aside.propagate = True


def test_a_level_that_a_step_sets_stays():
    with a_worker():
        perform(logging.root.setLevel, logging.ERROR)
        assert logging.root.level == logging.ERROR


def test_a_step_that_has_ended_says_nothing_more():
    left = []
    ended = remote.perform(
        task.Call("s", 1, 1, lambda: left.append(evr.current()), (), {}, None),
        remote.Voice(1, Heard()),
        1,
        0,
        {"known": None},
    )
    assert ended.outcome.status == "success"
    with pytest.raises(evr.UsageError, match="after it has ended"):
        left[0].trigger("known")


def test_a_process_that_a_step_forks_cannot_trigger_there(make):
    def fork():
        current = evr.current()
        child = os.fork()
        if not child:
            try:
                current.trigger("known")
            except evr.UsageError as error:
                os._exit(3 if "which it has started" in str(error) else 4)
            os._exit(5)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    ev = make(config={"task_construct": lambda: processes(1)})
    ev.add_event("known")
    add(ev, fork, name="fork")
    assert ev() is True
    assert ev.result("fork", 1) == 3
    assert ev.events("known") == []


NEEDED = "; expected the version of eventor there that the program has"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ModuleNotFoundError("No module named 'eventor'"), NEEDED),
        (AttributeError("Can't get attribute 'Errand' on <module 'eventor.steps.remote'>"), NEEDED),
        (ModuleNotFoundError("No module named 'numpy'"), ""),
        (OSError("no room for eventor"), ""),
    ],
)
def test_a_future_that_fails_otherwise_fails_its_step(by_hand, error, advice):
    def do(func, data):
        raise error

    ev, _ = by_hand(do)
    add(ev, plus, 1)
    assert ev() is False
    told = f"its executor could not run it: {type(error).__name__}: {error}{advice}"
    assert the_task(ev).error == told


@pytest.fixture
def looks(monkeypatch, caplog):
    """Look for what nobody tells at each pass; collect how often idleness was warned of by then."""
    found, look = [], submit.Submitter._look

    def count(self):
        look(self)
        found.append(caplog.text.count("No step has begun"))

    monkeypatch.setattr(submit.Submitter, "_look", count)
    monkeypatch.setattr(submit, "_LOOK_SECONDS", 0)
    return found


def test_an_executor_that_begins_nothing_is_warned_of_once(by_hand, looks, monkeypatch, caplog):
    monkeypatch.setattr(submit, "_IDLE_SECONDS", 0.05)

    def do(func, data):
        wait_until(lambda: looks.count(1) > 3)
        return func(data)

    ev, _ = by_hand(do, max_concurrent=2, sleep_between_loops=0.01)
    add(ev, plus, 1, name="one")
    add(ev, plus, 1, name="two")
    assert ev() is True
    assert max(looks) == 1
    assert "No step has begun for 0.05 s in the executor, where one[1] waits" in caplog.text


def test_what_waits_while_others_run_is_not_warned_of(by_hand, looks, monkeypatch, tmp_path):
    begun, goes_on = tmp_path / "begun", tmp_path / "goes on"

    def do(func, data):
        if data is not executor.errands[0]:
            wait_until(begun.exists)
            monkeypatch.setattr(submit, "_IDLE_SECONDS", -1)
            done = len(looks)
            wait_until(lambda: len(looks) > done + 3)
            monkeypatch.setattr(submit, "_IDLE_SECONDS", 60)
            goes_on.touch()  # not before: from then on nothing may run
        return func(data)

    ev, executor = by_hand(do, max_concurrent=2, sleep_between_loops=0.01)
    add(ev, begin_and_wait, begun, goes_on)
    add(ev, plus, 1, name="two")
    assert ev() is True
    assert max(looks) == 0


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (None, "None"),
        ("x", "'x'"),
        (bytearray(b"x"), r"bytearray\(b'x'\)"),
        (pickle.dumps(3), r"b'.*\.'"),
    ],
)
def test_a_future_that_has_no_report_fails_its_step(by_hand, found, told):
    ev, _ = by_hand(lambda func, data: found)
    add(ev, plus, 1)
    assert ev() is False
    expected = f"its executor returned {told}, which is no report of a step"
    assert re.fullmatch(expected, the_task(ev).error)


@pytest.mark.parametrize("method", ["cancelled", "exception", "result"])
def test_a_future_whose_methods_raise_fails_its_step(make, method):
    class Odd(AtOnce):
        def submit(self, func, *args):
            future = super().submit(func, *args)
            setattr(future, method, functools.partial(fail, "odd"))
            return future

    ev = make(config={"task_construct": Odd})
    add(ev, plus, 1)
    assert ev() is False
    assert the_task(ev).error == "its executor could not run it: ValueError: odd"


def test_a_future_that_cannot_be_looked_at_or_cancelled_is_withdrawn(make):
    class Odd(AtOnce):
        def submit(self, func, *args):
            ev.stop()
            future = Future()
            future.done = future.cancel = functools.partial(fail, "odd")
            return future

    ev = make(config={"task_construct": Odd})
    add(ev, plus, 1)
    assert ev() is False
    assert statuses(ev) == {"plus[1]": "ready"}


def test_what_its_executor_has_cancelled_is_told_as_that(make):
    class Cancels(AtOnce):
        def submit(self, func, *args):
            future = Future()
            future.cancel()
            return future

    ev = make(config={"task_construct": Cancels})
    add(ev, plus, 1)
    assert ev() is False
    assert the_task(ev).error == "its executor has cancelled it"


def test_an_outcome_of_another_submission_is_a_failure(make):
    class Swaps(AtOnce):
        def __init__(self):
            self.futures = []

        def submit(self, func, *args):
            self.futures.append((Future(), super().submit(func, *args)))
            if len(self.futures) == 2:
                (one, first), (other, second) = self.futures
                one.set_result(second.result())
                other.set_result(first.result())
            return self.futures[-1][0]

    ev = make(config={"task_construct": Swaps, "max_concurrent": 2, "stop_on_exception": False})
    add(ev, plus, 1, name="one")
    add(ev, plus, 2, name="two")
    assert ev() is False
    told = "its executor returned the outcome of something else that was submitted"
    assert [task.error for task in ev.tasks()] == [told, told]


def test_hooks_are_told_the_process_of_a_remote_step(on):
    told = []
    ev = on("processes", on_transition=told.append)
    add(ev, os.getpid)
    assert ev() is True
    (end,) = [one for one in told if one.kind == "task_success"]
    assert end.pid == ev.result("getpid", 1) == the_task(ev).pid


@contextlib.contextmanager
def a_desk(warn):
    """Make a desk for workers of this host, and what waits on it."""
    with selectors.DefaultSelector() as selector:
        made = line.Desk(owner.process_of(os.getpid()), (), selector, warn)
        yield made
        made.close()


@pytest.fixture
def desk():
    """Make a desk that warns of nothing."""
    warned = []
    with a_desk(warned.append) as made:
        yield made
    assert warned == []


def heard(desk):
    """Let in who connects, and return what those who have say, and who says it."""
    found = []
    for key, _ in desk._selector.select(0.1):
        if key.data is desk:
            desk.admit(0)
        else:
            found += [(key.data, message) for message in desk.hear(key.data)]
    return found


def answered(desk, *answers):
    """Let in who connects, and answer the questions; return what else was said."""
    said, left = [], list(answers)
    deadline = time.monotonic() + 30
    while left:
        assert time.monotonic() < deadline
        for caller, message in heard(desk):
            if isinstance(message, line.Said):
                said.append(message)
            else:
                desk.answer(caller, left.pop(0))
    return said


def test_what_is_large_goes_by_a_line_in_full(desk, monkeypatch):
    monkeypatch.setattr(line, "_ANSWER_SECONDS", 30)
    names = frozenset(f"event {number}" for number in range(200_000))

    def work():
        opened = line.connect(desk.address)
        opened.say(line.Said(1, {"msg": "x" * 5_000_000}))
        found = opened.ask(line.WhichEvents())
        opened.close()
        return found

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        (said,) = answered(desk, names)
        assert future.result(30) == names
    assert len(said.message["msg"]) == 5_000_000


def test_who_waits_for_an_answer_gives_up_when_the_owner_is_dead(desk, monkeypatch):
    def ask():
        opened = line.connect(desk.address)
        monkeypatch.setattr(line, "is_running", lambda _owner: False)
        with pytest.raises(OSError, match="the owner is dead"):
            opened.ask(line.MayBegin(1, 1))
        opened.close()
        return True

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(ask)
        wait_until(lambda: heard(desk))  # a fork of the dead owner has inherited it: it stays open
        assert future.result(30)


def test_who_listens_and_says_nothing_is_no_owner(monkeypatch):
    monkeypatch.setattr(line, "_NONCE_SECONDS", 0)
    monkeypatch.setattr(line, "is_running", lambda _owner: None)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        nobody = line.Address((), port, b"key", owner.process_of(os.getpid()))
        with pytest.raises(TimeoutError, match="whoever listens there says nothing"):
            line.connect(nobody)


def test_an_owner_that_lives_may_be_held_up_for_longer(desk, monkeypatch):
    monkeypatch.setattr(line, "_NONCE_SECONDS", 0)
    monkeypatch.setattr(line, "_LOOK_SECONDS", 0.01)
    looks = []

    def is_running(_owner):
        looks.append(1)
        return True

    monkeypatch.setattr(line, "is_running", is_running)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(line.connect, desk.address)
        wait_until(lambda: len(looks) > 3)
        wait_until(lambda: heard(desk) or future.done())
        future.result().close()


def test_a_worker_that_is_dropped_before_it_is_welcome_connects_again(desk, monkeypatch):
    monkeypatch.setattr(line, "_PAUSES", (0.0, 0.0))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(line.connect, desk.address)
        wait_until(lambda: desk._selector.select(0.1))
        desk.admit(0)
        for caller in list(desk._callers):
            desk.forget(caller)
        wait_until(lambda: heard(desk) or future.done())
        future.result().close()


def test_both_ends_notice_that_the_host_of_the_other_is_gone(desk):
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(line.connect, desk.address)
        wait_until(lambda: heard(desk) or future.done())
    opened = future.result()
    (caller,) = desk._callers
    for end in (opened._connection, caller._connection):
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for name, value in line._KEEPALIVE.items():
            if hasattr(socket, name):
                assert end.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # What nobody acknowledges keeps the system from asking whether anybody is there.
        option = (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert caller._connection.getsockopt(*option) == line._UNHEARD_MILLISECONDS
        assert opened._connection.getsockopt(*option) == 0
    opened.close()


@pytest.fixture
def alone(instances):
    """Call a function where no other thread opens and closes files meanwhile, as Dask's do here."""

    def call(func):
        instances("processes").submit(func).result(100)

    return call


@contextlib.contextmanager
def no_descriptor_left():
    """Have this process open no file more."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Path(os.devnull).open() as next_one:
        free = next_one.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (least, most))


def let_in_until_no_descriptor_is_left():
    warned = []
    with contextlib.ExitStack() as stack:
        desk = stack.enter_context(a_desk(warned.append))
        first, second, third = (
            stack.enter_context(socket.create_connection((line._HERE, desk.address.port)))
            for _ in range(3)
        )
        desk.admit(0)
        assert len(first.recv(100)) == 32
        with no_descriptor_left():
            for _ in range(2):
                wait_until(lambda: desk._selector.select(0.1))
                desk.admit(0)
                assert desk._selector.select(0) == []  # it does not spin
                desk.look()
        assert len(warned) == 1
        assert re.match(r"Workers wait to be let in: .*; this process may have \d+ open", warned[0])
        desk.admit(0)
        assert len(second.recv(100)) == 32
        with no_descriptor_left():
            desk.admit(0)
        first.close()
        (caller,) = [key.data for key, _ in desk._selector.select(10)]
        desk.hear(caller)
        heard(desk)  # there is room for one now
        assert len(third.recv(100)) == 32


def test_where_no_descriptor_is_left_who_has_connected_stays_and_others_wait(alone):
    alone(let_in_until_no_descriptor_is_left)


def make_room_where_no_descriptor_is_left():
    with a_desk([].append) as desk:
        with ThreadPoolExecutor(1) as pool:
            connected = pool.submit(line.connect, desk.address)
            wait_until(lambda: heard(desk) or connected.done())
            opened = connected.result()
            (caller,) = desk._callers
            desk.make_room(())
            assert desk.knows(caller)  # which has not asked yet
            asked = pool.submit(opened.ask, line.MayBegin(1, 1))
            answered(desk, None)
            assert asked.result() is None
        desk.make_room({caller})
        assert desk.knows(caller)
        with socket.create_connection((line._HERE, desk.address.port)) as another:
            with no_descriptor_left():
                wait_until(lambda: desk._selector.select(0.1))
                assert not desk.admit(0)
                desk.make_room(())
                assert not desk.knows(caller)
                heard(desk)
            assert len(another.recv(100)) == 32
        with pytest.raises(line.NotTakenError):
            opened.ask(line.MayBegin(2, 1))
        assert opened.is_lost


def test_an_idle_worker_makes_room_for_another_one_and_asks_by_a_new_line(alone):
    alone(make_room_where_no_descriptor_is_left)


def test_a_step_begins_in_a_worker_whose_line_has_made_room_for_another(by_hand):
    def make_room(transition):
        if transition.kind == "task_success" and transition.name == "first":
            (submitter,) = remote.owners_here.values()
            submitter._desk.make_room(())

    lines = []

    def do(func, data):
        done = func(data)
        lines.extend(remote._lines.values())
        return done

    ev, _ = by_hand(do, on_transition=make_room)
    first = add(ev, plus, 1, name="first")
    second = ev.add_step("second", plus, (first.result,))
    ev.add_assoc(first.success, second)
    assert ev() is True
    assert the_task(ev, "second").attempt == 1
    assert lines[0] is not lines[1]


def test_the_next_way_is_tried_where_one_leads_nowhere(desk, monkeypatch):
    tried, connect = [], socket.create_connection

    def some(place, seconds):
        tried.append(place[0])
        if place[0] != "third":
            raise OSError(f"no {place[0]}")
        return connect(("127.0.0.1", place[1]), seconds)

    monkeypatch.setattr(line.socket, "create_connection", some)
    monkeypatch.setattr(line, "is_running", lambda _owner: None)
    there = dataclasses.replace(desk.address, hosts=("first", "second", "third"))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(line.connect, there)
        wait_until(lambda: heard(desk) or future.done())
        future.result().close()
    assert tried == ["first", "second", "third"]
    with pytest.raises(OSError, match="no first"):
        line.connect(dataclasses.replace(there, hosts=("first", "second")))


def test_a_stranger_that_says_nothing_is_hung_up_on_in_time(desk, monkeypatch):
    monkeypatch.setattr(line, "_GREETING_SECONDS", -1)
    with socket.create_connection(("127.0.0.1", desk.address.port)) as silent:
        wait_until(lambda: desk._selector.select(0.1))
        desk.admit(0)
        desk.look()
        assert len(silent.recv(32)) == 32
        assert silent.recv(1) == b""


def test_one_who_is_dropped_before_being_heard_is_not_heard(desk, monkeypatch):
    monkeypatch.setattr(line, "_MOST_STRANGERS", 1)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(socket.create_connection((line._HERE, desk.address.port)))
        wait_until(lambda: desk._selector.select(0.1))
        desk.admit(0)
        first.sendall(b"!")
        stack.enter_context(socket.create_connection((line._HERE, desk.address.port)))
        wait_until(lambda: len(desk._selector.select(0.1)) == 2)
        ready = [key.data for key, _ in desk._selector.select(0)]
        desk.admit(0)
        (caller,) = [one for one in ready if one is not desk]
        assert desk.hear(caller) == []
        desk.forget(caller)
        assert not desk.knows(caller)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.1.2.3", ("10.1.2.3", "me")),
        ("127.0.1.1", ("me",)),
        (OSError("unknown"), ("me",)),
        (UnicodeError("label empty"), ()),
    ],
)
def test_a_host_tells_others_its_address_and_its_name(monkeypatch, address, expected):
    def look_up(_name):
        if isinstance(address, Exception):
            raise address
        return address

    monkeypatch.setattr(line.socket, "gethostname", lambda: "me")
    monkeypatch.setattr(line.socket, "gethostbyname", look_up)
    assert line.own_hosts() == expected


@pytest.mark.parametrize(
    ("given", "address", "expected"),
    [
        ("gate", "10.1.2.3", ("gate",)),
        ("gate", "127.0.0.1", ()),
        ("LOCALHOST", "127.0.0.1", ()),
        # As Debian writes it into its own hosts file; others know that name otherwise.
        ("Me", "127.0.1.1", ("Me",)),
        ("me.example", "127.0.1.1", ("me.example",)),
    ],
)
def test_a_name_of_loopback_that_is_not_the_hosts_own_is_nothing_for_others(
    monkeypatch, given, address, expected
):
    monkeypatch.setattr(line.socket, "gethostname", lambda: "me")
    monkeypatch.setattr(line.socket, "gethostbyname", lambda _name: address)
    assert line.hosts_of(given) == expected


def test_what_a_step_has_sent_is_waited_for_and_not_for_ever(by_hand, monkeypatch):
    monkeypatch.setattr(submit, "_PATIENCE_SECONDS", 0.05)

    def do(func, data):
        report = pickle.loads(func(data))
        return pickle.dumps(dataclasses.replace(report, sent=report.sent + 1))

    ev, _ = by_hand(do)
    add(ev, plus, 1)
    assert ev() is True


@pytest.mark.parametrize("kind", ["threads", "by hand"])
def test_what_would_begin_after_the_lease_waits_until_it_is_renewed(make, by_hand, kind):
    """The owner may have been stopped, and somebody may have taken over its run."""
    asked, told = threading.Event(), []
    allow = submit.Submitter.allow_until
    collect = submit.Submitter.collect
    admit = submit.Submitter.admit

    def late(self, _until):
        told.append(bool(self._submissions))
        allow(self, math.inf if asked.is_set() and len(told) >= 4 else 0)

    def look(self):
        if self._asked:
            asked.set()
        return collect(self)

    def ask(self, ticket):
        if kind == "threads":
            asked.set()
        return admit(self, ticket)

    ev = make(config={"task_construct": ThreadPoolExecutor})
    if kind == "by hand":
        ev, _ = by_hand(lambda func, data: func(data))
    add(ev, plus, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submit.Submitter, "allow_until", late)
        patch.setattr(submit.Submitter, "collect", look)
        patch.setattr(submit.Submitter, "admit", ask)
        patch.setattr("eventor.loop._BEATS_PER_LEASE", 300)  # a commit each 0.1 s
        assert ev() is True
    assert asked.is_set()
    assert len(told) >= 4
    assert the_task(ev).attempt == 1


later = [0.0]
"""Seconds by which a clock is ahead."""


def take_long():
    later[0] += 900


@pytest.mark.parametrize("is_held_up", [False, True])
def test_what_runs_in_submit_may_take_longer_than_the_lease(make, monkeypatch, is_held_up):
    monkeypatch.setitem(globals(), "later", [0.0])
    for module in (lease, submit):
        monkeypatch.setattr(module, "clock", lambda: time.monotonic() + later[0])
    monkeypatch.setattr(sqlite_backend.SQLiteBackend, "has_hosts", True)

    class HeldUp(AtOnce):
        def submit(self, func, *args):
            later[0] += 900
            return super().submit(func, *args)

    ev = make(
        config={
            "task_construct": HeldUp if is_held_up else AtOnce,
            "lease_seconds": 1000,
            "max_concurrent": 3,
            "stop_on_exception": False,
        }
    )
    begin = ev.add_event("begin")
    ev.add_assoc(begin, ev.add_step("take long", take_long))
    ev.trigger_events(begin, range(3))
    assert ev() is not is_held_up
    # Before it begins nothing else could have made sure of the run; after that, each has.
    error = remote.LATE if is_held_up else None
    assert [task.error for task in ev.tasks()] == [error] * 3


def test_an_executor_that_cannot_be_shut_down_is_warned_of(make, caplog):
    class Stubborn(ThreadPoolExecutor):
        def shutdown(self, wait=True, **options):
            super().shutdown(wait, **options)
            raise OSError("no")

    ev = make(config={"task_construct": Stubborn})
    add(ev, plus, 1)
    assert ev() is True
    assert "cannot be shut down: OSError: no" in caplog.text


# Ends.


@pytest.mark.parametrize("kind", ["threads", *REMOTE])
def test_stop_lets_finish_what_has_begun(on, kind, tmp_path):
    ev = on(kind, max_concurrent=2)
    begun, goes_on = tmp_path / "begun", tmp_path / "goes on"
    step = add(ev, begin_and_wait, begun, goes_on)
    ev.add_assoc(step.success, ev.add_step("after", plus, (1,)))

    def stop():
        wait_until(begun.exists)
        ev.stop()
        goes_on.touch()

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert ev() is False
    stopper.join()
    assert statuses(ev) == {"begin_and_wait[1]": "success", "after[1]": "ready"}


def test_what_a_stop_finds_in_a_pool_has_used_up_no_attempt(make, tmp_path):
    begun, goes_on, ready = tmp_path / "begun", tmp_path / "goes on", []

    def see(told):
        if told.kind == "task_ready" and told.cause is None:
            ready.append((told.name, told.sequence, told.attempt))
            goes_on.touch()

    def submitted():
        return begun.exists() and statuses(ev)["wait[3]"] == "active"

    config = {"max_concurrent": 3, "resources": {"room": 3}, "on_transition": see}
    with ThreadPoolExecutor(1) as pool:
        ev = make(config={"task_construct": pool, **config})
        begin = ev.add_event("begin")
        some = {"max_attempts": 2, "resources": {"room": 1}}
        wait = ev.add_step("wait", begin_and_wait, (begun, goes_on), config=some)
        ev.add_assoc(begin, wait)
        ev.trigger_events(begin, [1, 2, 3, 4])
        stopper = threading.Thread(target=lambda: (wait_until(submitted), ev.stop()))
        stopper.start()
        assert ev() is False
        stopper.join()
        assert ready == [("wait", 2, 0), ("wait", 3, 0)]
        assert [str(task.status) for task in ev.tasks()] == ["success", *["ready"] * 3]
        assert [(task.attempt, task.pid, task.started_at) for task in ev.tasks()[1:]] == [
            (0, None, None)
        ] * 3
        assert ev() is True
    assert [(task.attempt, len(task.attempts)) for task in ev.tasks()] == [(1, 1)] * 4


def test_a_worker_that_comes_after_a_stop_is_told_no(by_hand, tmp_path):
    begun, goes_on, is_withdrawn, late = tmp_path / "1", tmp_path / "2", threading.Event(), []

    def do(func, data):
        if data is executor.errands[0]:
            return func(data)
        is_withdrawn.wait(60)
        late.append(pickle.loads(func(data)))
        goes_on.touch()
        return pickle.dumps(late[0])

    def see(told):
        if told.kind == "task_ready" and told.cause is None:
            is_withdrawn.set()

    def submitted():
        return begun.exists() and len(executor.errands) == 2

    ev, executor = by_hand(do, max_concurrent=2, on_transition=see)
    add(ev, begin_and_wait, begun, goes_on)
    add(ev, plus, 1, name="late")
    stopper = threading.Thread(target=lambda: (wait_until(submitted), ev.stop()))
    stopper.start()
    assert ev() is False
    stopper.join()
    assert statuses(ev) == {"begin_and_wait[1]": "success", "late[1]": "ready"}
    assert [report.pid for report in late] == [None]


def test_where_workers_cannot_ask_a_stop_waits_for_what_may_have_begun(
    by_hand, unreachable, caplog
):
    def do(func, data):
        if len(executor.errands) == 2:
            ev.stop()
            wait_until(lambda: "Stopping by stop()" in caplog.text)
        return func(data)

    ev, executor = by_hand(do)
    first = add(ev, plus, 1, name="first")
    ev.add_assoc(first.success, ev.add_step("second", plus, (2,)))
    assert ev() is True
    assert statuses(ev) == {"first[1]": "success", "second[1]": "success"}


PROGRAM = """
    import multiprocessing, os, sys
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
    from pathlib import Path
    import eventor as evr
    from tests.conftest import wait_until

    def wait(name):
        with open("begun", "a") as file:
            file.write(f"{name}\\n")
        wait_until(Path("goes on").exists, 60)
        return name

    def processes():
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def loky():
        import loky
        return loky.ProcessPoolExecutor(1)

    def threads():
        return ThreadPoolExecutor(1)

    if __name__ == "__main__":
        kind, mode = sys.argv[1:]
        construct = {"processes": processes, "loky": loky, "threads": threads}[kind]
        config = {"logdir": ".", "task_construct": construct, "max_concurrent": 2}
        with evr.Eventor("x", os.environ["STORE"], evr.RunMode(mode), config=config) as ev:
            begin = ev.add_event("begin")
            ev.add_assoc(begin, ev.add_step("wait", wait, (evr.sequence,)))
            if mode == "restart":
                ev.trigger_events(begin, ["a", "b", "c"])
            try:
                print(ev())
            finally:
                Path("ended").touch()
"""


@pytest.fixture
def program(start, tmp_path, monkeypatch, place):
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.chdir(tmp_path)

    started = []

    def run(kind, mode="restart"):
        started.append(start(PROGRAM, kind, mode, STORE=place.store))
        return started[-1]

    yield run
    for process in started:  # and the workers of their executors, which nobody else ends
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def begun():
    path = Path("begun")
    return path.read_text().split() if path.exists() else []


def stored(place):
    query = "SELECT sequence, status FROM eventor_task WHERE recovery = 0 ORDER BY sequence"
    return dict(place.sql(query))


@pytest.mark.once
@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_a_first_signal_lets_finish_and_a_second_one_lets_nothing_begin(program, kind, place):
    process = program(kind)
    wait_until(begun)
    # As a terminal does: for all that is in the group.
    os.killpg(process.pid, signal.SIGINT)
    log = Path("x.debug.log")
    wait_until(lambda: "Stopping by SIGINT" in (log.read_text() if log.exists() else ""))
    assert not Path("ended").exists()
    os.killpg(process.pid, signal.SIGINT)
    wait_until(Path("ended").exists)
    assert stored(place) == {"a": "active", "b": "ready", "c": "ready"}
    Path("goes on").touch()
    _out, err = process.communicate(timeout=60)
    assert begun() == ["a"]
    assert "KeyboardInterrupt" in err
    assert process.returncode != 0


@pytest.mark.once
@pytest.mark.parametrize("kind", ["processes", LOKY])
def test_a_first_signal_alone_lets_finish_what_has_begun_and_a_recovery_does_the_rest(
    program, kind, place
):
    process = program(kind)
    wait_until(begun)
    os.killpg(process.pid, signal.SIGINT)
    log = Path("x.debug.log")
    wait_until(lambda: "Stopping by SIGINT" in (log.read_text() if log.exists() else ""))
    Path("goes on").touch()
    process.communicate(timeout=60)
    assert stored(place) == {"a": "success", "b": "ready", "c": "ready"}
    out, err = program(kind, "recover").communicate(timeout=100)
    assert out == "True\n", err
    assert begun() == ["a", "b", "c"]


@pytest.mark.once
def test_a_killed_owner_is_recovered_and_nothing_more_of_it_begins(program):
    process = program("processes")
    wait_until(begun)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    # What runs goes on, and is nobody's; what had not begun does not, in the same worker.
    Path("goes on").touch()
    recovery = program("processes", "recover")
    out, err = recovery.communicate(timeout=100)
    assert (recovery.returncode, out) == (0, "True\n"), err
    os.killpg(process.pid, signal.SIGKILL)  # the worker, which waits for ever
    assert sorted(begun()) == ["a", "a", "b", "c"]


@pytest.mark.once
@pytest.mark.parametrize("kind", ["processes", "loky", "dask"])
def test_a_script_without_a_module_of_its_own_runs_there(start, kind, tmp_path):
    process = start(f"KIND = {kind!r}\n" + SCRIPT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1]) == [6, "Pair", True]


SCRIPT = """
import contextlib, json, multiprocessing
from concurrent.futures import ProcessPoolExecutor
import eventor as evr

class Pair:
    def __init__(self, one, two):
        self.one, self.two, self.kind = one, two, Pair
        self.adds = add

def add(one, two):
    return one + two

def pair(number):
    return Pair(number, number + 1)

def total(pair):
    return pair.adds(pair.one, pair.two) + 1

@contextlib.contextmanager
def executor():
    if KIND == "processes":
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield pool
    elif KIND == "loky":
        import loky
        with loky.ProcessPoolExecutor(1) as pool:
            yield pool
    else:
        import distributed
        with distributed.LocalCluster(
            n_workers=1, dashboard_address=":0", silence_logs=50
        ) as cluster, distributed.Client(cluster) as client:
            yield client.get_executor()

if __name__ == "__main__":
    with executor() as construct:
        config = {"logdir": ".", "task_construct": construct}
        with evr.Eventor(store="flow.db", config=config) as ev:
            begin = ev.add_event("begin")
            first = ev.add_step("pair", pair, (2,))
            ev.add_assoc(begin, first)
            ev.add_assoc(first.success, ev.add_step("total", total, (first.result,)))
            ev.trigger_event(begin)
            ev()
            found = ev.result("pair", 1)
            result = [ev.result("total", 1), type(found).__name__, type(found) is Pair]
            assert found.kind is Pair and found.adds is add
            print(json.dumps(result), flush=True)
"""
