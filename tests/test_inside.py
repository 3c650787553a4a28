"""What a step can know and do from within."""

import asyncio
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import eventor as evr
from eventor.rules.plan import EventRaised, TaskEnded
from tests.conftest import statuses, wait_until
from tests.test_data import CONSTRUCTS, each_construct

pytestmark = pytest.mark.stores("either")

FORKSERVER = multiprocessing.get_context("forkserver").Process
WORDS = ("NAME", "SEQUENCE", "RECOVERY")


def tell():
    current = evr.current()
    return current.step, current.sequence, current.run_id, current.recovery, current.attempt


def tell_all():
    return tell(), [os.environ.get(f"EVENTOR_STEP_{word}") for word in WORDS]


def trigger(*arguments):
    return evr.current().trigger(*arguments)


async def tell_soon():
    await asyncio.sleep(0)
    return tell()


def tell_in_a_thread():
    told = []
    thread = threading.Thread(target=lambda: told.append(tell()))
    thread.start()
    thread.join()
    return told[0]


def release(path):
    path.touch()


def await_release(path, event):
    """Trigger an event, and wait for what that leads to."""
    evr.current().trigger(event)
    wait_until(path.exists)


@pytest.fixture
def run_in_step(make):
    """Run a function in a step; return its result, or its whole record."""

    def run(func, *, whole=True, **config):
        ev = make(config={"stop_on_exception": False, **config})
        go = ev.add_event("go")
        ev.add_event("more")
        ev.add_assoc(go, ev.add_step("s", func))
        ev.trigger_event(go)
        assert ev() is whole
        return ev.result("s", 1) if whole else ev.tasks("s")[0]

    return run


@each_construct
def test_a_step_knows_where_it_is(make, config):
    ev = make(config=config)
    go = ev.add_event("go")
    ev.add_assoc(go, *(ev.add_step(name, tell_all) for name in ("one", "two")))
    ev.trigger_event(go, "\u00e9 1")
    assert ev() is True
    for name in ("one", "two"):
        # The environment of threads is the program's.
        threads = config.get("task_construct") is threading.Thread
        environment = [None] * 3 if threads else [name, "\u00e9 1", "0"]
        assert ev.result(name, "\u00e9 1") == ((name, "\u00e9 1", 1, 0, 1), environment)


@pytest.mark.parametrize("construct", ["fork", "many", "threads"])
def test_a_coroutine_knows_where_it_is_and_in_which_recovery(make, construct):
    for mode in ("restart", "restart", "recover"):
        ev = make(run_mode=mode, config=CONSTRUCTS[construct])
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", tell_soon, recovery={"success": "rerun"}))
        ev.trigger_event(go)
        assert ev() is True
        told = ev.result("s", 1)
        ev.close()
    assert told == ("s", 1, 2, 1, 1)


@pytest.mark.parametrize(
    "config", [{}, {"max_tasks_per_child": None}, {"task_construct": FORKSERVER}]
)
def test_threads_of_a_step_know_it_where_it_has_a_process_of_its_own(make, config):
    ev = make(config=config)
    go = ev.add_event("go")
    for name in ("one", "two"):
        ev.add_assoc(go, ev.add_step(name, tell_in_a_thread))
    ev.trigger_event(go)
    assert ev() is True
    assert [task.result[0] for task in ev.tasks()] == ["one", "two"]


@each_construct
def test_what_a_step_triggers_starts_while_it_runs(make, tmp_path, config):
    ev = make(config={**config, "max_concurrent": 2})
    go, more, last = (ev.add_event(name) for name in ("go", "more", "last"))
    ev.add_assoc(go, ev.add_step("first", await_release, (tmp_path / "released", "more")))
    released = ev.add_step("more", release, (tmp_path / "released",), triggers={"at_success": last})
    ev.add_assoc(more, released)
    # What was forked ahead triggers too.
    ev.add_assoc(last, ev.add_step("second", trigger, ("other", 2)))
    ev.add_assoc(ev.add_event("other"), ev.add_step("third", int))
    ev.trigger_event(go, "x")
    assert ev() is True
    assert statuses(ev) == dict.fromkeys(
        ["first[x]", "more[x]", "second[x]", "third[2]"], "success"
    )
    assert ev.result("second", "x") == 2
    causes = {event.event: str(event.cause) for event in ev.events() if event.cause.kind == "step"}
    assert causes == {"more": "step first", "other": "step second x"}


def dies(event):
    evr.current().trigger(event)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_step_triggers_is_recorded_before_its_end_or_with_it(make):
    """Even of one that dies right after."""
    ev = make(config={"stop_on_exception": False})
    recorded = []
    record = ev._ledger.record

    def note(changes, now):
        record(changes, now)
        recorded.extend(changes)

    ev._ledger.record = note
    go = ev.add_event("go")
    for name, func in [("lives", trigger), ("dies", dies), ("dies again", dies)]:
        ev.add_event(f"by {name}")
        ev.add_assoc(go, ev.add_step(name, func, (f"by {name}",)))
    ev.trigger_event(go)
    assert ev() is False
    for name in ("lives", "dies", "dies again"):
        ends = [c for c in recorded if isinstance(c, TaskEnded) and c.task.step == name]
        raised = [c for c in recorded if isinstance(c, EventRaised) and c.event == f"by {name}"]
        assert recorded.index(raised[0]) < recorded.index(ends[0])


PROGRAM = """
    import os, pathlib, sys, time
    import eventor as evr
    from tests.conftest import wait_until

    mode, policy = sys.argv[1:]
    config = {"logdir": ".", "max_concurrent": 2}

    def first():
        evr.current().trigger("more", "from within")
        with open("first", "a") as file:
            file.write("ran ")
        wait_until(pathlib.Path("released").exists)

    with evr.Eventor(store=os.environ["STORE"], run_mode=mode, config=config) as ev:
        go, more = ev.add_event("go"), ev.add_event("more")
        ev.add_assoc(go, ev.add_step("first", first, recovery={"active": policy}))
        ev.add_assoc(more, ev.add_step("second", int))
        if mode == "restart":
            ev.trigger_event(go)
        well = ev()
        causes = [f"{event.event} {event.cause}" for event in ev.events()]
        print(well, sorted(causes), sep="; ")
"""


@pytest.mark.stores("both")
@pytest.mark.parametrize(
    ("policy", "ran"),
    [("rerun", "ran ran "), pytest.param("skip", "ran ", marks=pytest.mark.stores("sqlite"))],
    ids=["rerun", "skip"],
)
def test_what_a_step_has_triggered_outlives_the_owner(
    start, tmp_path, monkeypatch, policy, ran, place
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    program = start(PROGRAM, "restart", policy, STORE=place.store)
    query = "SELECT count(*) FROM eventor_task WHERE step = 'second' AND status = 'success'"
    first = tmp_path / "first"
    wait_until(lambda: first.exists() and first.read_text())
    wait_until(lambda: place.sql(query) == [(1,)])
    program.kill()
    program.wait(30)
    (tmp_path / "released").touch()
    told, errors = start(PROGRAM, "recover", policy, STORE=place.store).communicate(timeout=60)
    assert told == "True; ['go recovery 0', 'more recovery 0']\n", errors
    assert first.read_text() == ran


def wrong_calls():
    """Make each wrong call in a step; return what it raises."""
    current = evr.current()
    told = []
    foreign = evr.Event("go")
    for arguments in [("gone",), (5,), (foreign,), ("go", 1.5), ("go", True), ("go", "\0")]:
        try:
            current.trigger(*arguments)
        except evr.EventorError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


@pytest.mark.parametrize("construct", ["fork", "spawned many", "threads"])
def test_a_wrong_trigger_is_an_error_at_the_call(make, construct):
    ev = make(config=CONSTRUCTS[construct])
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", wrong_calls))
    ev.trigger_event(go)
    assert ev() is True
    told = ev.result("s", 1)
    expected = [
        "DefinitionError: there is no event 'gone'; did you mean 'go'?",
        "DefinitionError: the event to trigger is 5; expected an event or the name of one",
        "DefinitionError: the event to trigger is Event('go') of another Eventor",
        "TriggerError: the sequence is 1.5 (float); expected an int",
        "TriggerError: the sequence is True (bool); expected an int",
        "TriggerError: the sequence is '\\x00' (str); expected an int",
    ]
    if construct == "spawned many":
        del expected[2]  # only the names of the events are known there
    assert [line[: len(start)] for line, start in zip(told, expected, strict=True)] == expected
    assert len(ev.events()) == 1


def test_outside_a_step_there_is_no_current_one():
    with pytest.raises(evr.UsageError, match=r"current\(\) was called outside a step"):
        evr.current()


def test_a_process_that_a_step_starts_knows_it_and_cannot_trigger(run_in_step):
    def step():
        receiving, sending = multiprocessing.Pipe(duplex=False)

        def child():
            try:
                sending.send((tell(), trigger("more")))
            except evr.UsageError as error:
                sending.send((tell()[0], str(error)))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        told = receiving.recv()
        process.join()
        return told, os.getpid(), process.pid

    (name, error), mine, its = run_in_step(step)
    assert name == "s"
    assert error == (
        f"step s[1] triggers event 'more' in process {its}, which it has started; "
        f"expected in its own, {mine}"
    )


def test_a_step_that_has_closed_its_pipe_cannot_trigger(run_in_step):
    def step():
        os.closerange(3, 256)
        try:
            trigger("more")
        except evr.UsageError as error:
            os.write(2, str(error).encode())
            os._exit(0)

    task = run_in_step(step, whole=False)
    assert "exit code 0" in task.error


@pytest.mark.parametrize(
    "config", [{"max_tasks_per_child": None}, {"task_construct": threading.Thread}]
)
def test_a_step_that_has_ended_triggers_nothing_more(make, config):
    """Not even by a thread that it has left, while the same process runs the next step."""
    held, told = [], []

    def late():
        try:
            held[0].trigger("more")
        except evr.UsageError as error:
            told.append(str(error))
        return told

    ev = make(config=config)
    go, then = ev.add_event("go"), ev.add_event("then")
    ev.add_event("more")
    first = ev.add_step("first", lambda: held.append(evr.current()), triggers={"at_success": then})
    ev.add_assoc(go, first)
    ev.add_assoc(then, ev.add_step("late", late))
    ev.trigger_event(go)
    assert ev() is True
    assert ev.result("late", 1) == ["step first[1] triggers event 'more' after it has ended"]


@pytest.mark.parametrize("construct", ["fork", "many", "threads"])
def test_trigger_event_in_a_step_is_that_of_the_step(make, construct):
    ev = make(config=CONSTRUCTS[construct])
    go, more = ev.add_event("go"), ev.add_event("more")
    other = make(store=":memory:").add_event("more")

    def first():
        with pytest.raises(evr.DefinitionError, match="of another Eventor"):
            ev.trigger_event(other)
        return ev.trigger_event(more), ev.trigger_event(more, 5)

    ev.add_assoc(go, ev.add_step("first", first))
    ev.add_assoc(more, ev.add_step("second", first))
    ev.trigger_event(go, "x")
    assert ev() is True
    assert ev.result("first", "x") == ev.result("second", "x") == ("x", 5)
    assert {(e.event, e.sequence): str(e.cause) for e in ev.events(more)} == {
        ("more", "x"): "step first",
        ("more", 5): "step first x",
    }
    assert ev.trigger_event(more) == 1


def test_an_eventor_that_a_step_makes_is_its_own(run_in_step, tmp_path):
    def step():
        config = {"logdir": tmp_path, "task_construct": threading.Thread}
        with evr.Eventor(store=":memory:", config=config) as inner:
            go = inner.add_event("go")
            inner.add_assoc(go, inner.add_step("inner", tell))
            assert inner.trigger_event(go) == 1
            assert inner() is True
            return inner.result("inner", 1), tell()

    assert run_in_step(step) == (("inner", 1, 1, 0, 1), ("s", 1, 1, 0, 1))


@pytest.mark.parametrize("most", [1, None])
def test_a_step_knows_the_events_that_were_defined_before_its_trigger(make, most):
    """Also when its process was forked before."""
    ev = make(config={"max_tasks_per_child": most})
    go, more = ev.add_event("go"), ev.add_event("more")
    ev.add_assoc(go, *(ev.add_step(f"s{number}", int) for number in range(4)))
    ev.add_assoc(more, ev.add_step("late", trigger, ("defined late",)))
    say = ev._journal.say

    def react(level, message, *details):
        if message.startswith("Step completed s2"):
            ev.add_event("defined late")
            ev.trigger_event(more)
        say(level, message, *details)

    ev._journal.say = react
    ev.trigger_event(go)
    assert ev() is True
    assert ev.events("defined late")[0].sequence == 2


def test_what_a_step_starts_knows_it_by_the_environment(make):
    """And nothing is left of the step before in a process that runs many."""
    show = "import os; print(*(os.environ['EVENTOR_STEP_' + x] for x in ('NAME', 'SEQUENCE')))"
    ev = make(config={"max_tasks_per_child": None})
    go = ev.add_event("go")
    for name in ("one", "two"):
        ev.add_assoc(
            go, ev.add_step(name, subprocess.check_output, ([sys.executable, "-c", show],))
        )
    ev.trigger_event(go, -3)
    assert ev() is True
    assert [task.result for task in ev.tasks()] == [b"one -3\n", b"two -3\n"]


def test_a_plain_locale_does_not_matter(script, place):
    ran = script(
        """
        import os
        import eventor as evr

        with evr.Eventor(store=os.environ["STORE"], config={"logdir": "."}) as ev:
            go = ev.add_event("go")
            ev.add_assoc(go, ev.add_step("\\u00e9", os.environb.get, (b"EVENTOR_STEP_NAME",)))
            ev.trigger_event(go)
            assert ev() is True
            assert ev.result("\\u00e9", 1) == "\\u00e9".encode()
        """,
        STORE=place.store,
        LC_ALL="C",
        PYTHONCOERCECLOCALE="0",
        PYTHONUTF8="0",
    )
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr


def test_a_handler_of_signals_may_trigger_and_log_in_the_middle(make, caplog):
    """In the middle of what its own thread sends: each comes whole, and none waits for ever."""

    def step():
        here, came, within, numbers = evr.current(), [], [], itertools.count(1)
        # Not in the handler: in the middle of another, it would find a logger half made.
        big, small = logging.getLogger("big"), logging.getLogger("small")

        def set_alarm():
            if len(came) < 200:
                signal.setitimer(signal.ITIMER_REAL, 0.0003)

        def handle(_number, _frame):
            number = next(numbers)  # at once: a handler may come in the middle of this one
            within.append(None)
            if len(within) < 3:  # or on a slow machine there would be no end of them
                set_alarm()
            here.trigger("within", number)
            small.warning("from the handler")
            came.append(None)
            within.pop()
            if not within:
                set_alarm()

        signal.signal(signal.SIGALRM, handle)
        set_alarm()
        while len(came) < 200:
            big.warning("x" * 100_000)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return len(came)

    ev = make()
    go, _within = ev.add_event("go"), ev.add_event("within")
    ev.add_assoc(go, ev.add_step("s", step, config={"timeout": 60}))
    ev.trigger_event(go, 1)
    assert ev() is True
    count = ev.tasks()[0].result
    assert len(ev.events("within")) == count
    assert {event.sequence for event in ev.events("within")} == set(range(1, count + 1))
    told = [record for record in caplog.records if record.name == "small"]
    assert len(told) == count
