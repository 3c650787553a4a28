"""Hooks: what they are told, when, and that nothing which they do touches the run."""

import collections
import contextlib
import json
import random
import signal
import threading
from datetime import UTC, datetime, timedelta

import pytest

import eventor as evr
from eventor import TransitionKind as Kind
from eventor.rules.plan import TaskEnded
from eventor.storage.ledger import Ledger
from eventor.types import Outcome, TaskStatus, failure
from tests.conftest import statuses

pytestmark = pytest.mark.stores("either")


def told(transitions):
    """Return transitions as a reader would tell them."""
    return [str(transition) for transition in transitions]


def pair(ev, first=int, second=int, **arguments):
    """Define two steps, one after the other, and return the event that leads to the first."""
    go, between = ev.add_event("go"), ev.add_event("between")
    ev.add_assoc(go, ev.add_step("a", first, triggers={"at_success": between}, **arguments))
    ev.add_assoc(between, ev.add_step("b", second))
    return go


def boom():
    raise ValueError("no")


def test_a_hook_is_told_of_each_transition_in_the_order_of_their_reasons(make):
    seen = []
    ev = make(name="flow", config={"on_transition": seen.append})
    ev.trigger_event(pair(ev, second=boom))
    assert ev() is False
    assert told(seen) == [
        "run_started 1.0",
        "event_raised go[1]",
        "task_ready a[1]",
        "task_active a[1]",
        "task_success a[1]",
        "event_raised between[1]",
        "task_ready b[1]",
        "task_active b[1]",
        "task_failure b[1]: ValueError: no",
        "run_ended 1.0",
    ]
    assert {(one.run_id, one.recovery, one.run_name) for one in seen} == {(1, 0, "flow")}
    assert [one.succeeded for one in seen] == [None] * 9 + [False]


@pytest.mark.stores("both")
def test_what_a_hook_is_told_is_what_the_store_tells(make):
    seen = []
    ev = make(config={"on_transition": seen.append})
    ev.trigger_event(pair(ev, second=boom), "x")
    ev()
    by = {(one.kind, one.name): one for one in seen}
    first, second = ev.tasks()
    for task, end in ((first, Kind.task_success), (second, Kind.task_failure)):
        ready, active = by[Kind.task_ready, task.step], by[Kind.task_active, task.step]
        ended = by[end, task.step]
        assert (ready.at, active.at, ended.at) == (task.ready_at, task.started_at, task.ended_at)
        assert (ready.cause, ready.attempt, ready.pid) == (task.cause, 0, None)
        assert (active.attempt, active.pid) == (ended.attempt, ended.pid) == (1, task.pid)
        assert (ended.error, ended.traceback) == (task.error, task.traceback)
        assert ready.sequence == active.sequence == ended.sequence == "x"
    for event in ev.events():
        raised = by[Kind.event_raised, event.event]
        assert (raised.at, raised.cause) == (event.raised_at, event.cause)


def test_an_attempt_that_failed_is_no_failure_of_its_task(make):
    seen, config = [], {"max_attempts": 2, "retry_delay": 0.01}
    ev = make(config={"on_transition": seen.append})
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", boom, config=config))
    ev.trigger_event(go)
    ev()
    of_task = [one for one in seen if one.name == "s"]
    assert [(str(one.kind), one.attempt) for one in of_task] == [
        ("task_ready", 0),
        ("task_active", 1),
        ("attempt_failed", 1),
        ("task_active", 2),
        ("task_failure", 2),
    ]
    assert of_task[2].error == "ValueError: no"
    assert of_task[2].at < of_task[2].due_at <= of_task[3].at


def test_what_cannot_be_started_is_active_without_a_process_and_then_a_failure(make):
    seen = []
    ev = make(config={"on_transition": seen.append})
    go, missing = ev.add_event("go"), ev.add_step("missing", int)
    ev.add_assoc(go, ev.add_step("s", print, args=(missing.result,)))
    ev.trigger_event(go)
    ev()
    active, failed = [one for one in seen if one.name == "s"][1:]
    assert (active.kind, active.pid) == (Kind.task_active, None)
    assert (failed.kind, failed.pid) == (Kind.task_failure, None)


@pytest.mark.stores("both")
def test_what_a_recovery_skips_is_told_as_skipped(make):
    before = make()
    before.trigger_event(pair(before, second=boom))
    before()
    before.close()
    seen = []
    ev = make(run_mode=evr.RunMode.recover, config={"on_transition": seen.append})
    pair(ev)
    assert ev() is True
    assert told(seen) == [
        "run_started 1.1",
        "event_raised go[1]",
        "task_skipped a[1]",
        "event_raised between[1]",
        "task_ready b[1]",
        "task_active b[1]",
        "task_success b[1]",
        "run_ended 1.1",
    ]


@pytest.mark.stores("both")
def test_an_event_that_is_recorded_before_the_run_is_told_then_and_not_again(make):
    seen = []
    ev = make(config={"on_transition": seen.append})
    go = pair(ev)
    ev.trigger_events(go, [1, 2])
    assert told(seen) == ["event_raised go[1]", "event_raised go[2]"]
    ev.trigger_event(go, 3)
    assert len(seen) == 2
    ev.close()
    assert told(seen)[2:] == ["event_raised go[3]"]


def test_each_call_begins_and_ends_a_run(make):
    seen = []
    ev = make(config={"on_transition": seen.append})
    ev.trigger_event(pair(ev))
    assert ev.run(max_loops=1) is False
    assert ev() is True
    ends = [one.succeeded for one in seen if one.kind is Kind.run_ended]
    assert ends == [False, True]
    of_tasks = [one for one in told(seen) if not one.startswith("run")]
    assert len(of_tasks) == len(set(of_tasks)) == 8


def test_hooks_are_called_in_the_order_given_and_one_that_raises_is_told_of_once(make, debug_log):
    seen = []

    def first(transition):
        seen.append(("first", transition))
        raise RuntimeError("of the hook")

    def second(transition):
        seen.append(("second", transition))

    ev = make(config={"on_transition": (first, second)})
    ev.trigger_event(pair(ev))
    assert ev() is True
    assert [name for name, _ in seen] == ["first", "second"] * (len(seen) // 2)
    log = debug_log()
    assert log.count("RuntimeError: of the hook") == 1
    (line,) = [line for line in log.splitlines() if "The hook" in line]
    assert "WARNING" in line
    assert "first has raised upon run_started 1.0; the run goes on" in line


@pytest.mark.stores("both")
def test_a_hook_may_trigger_events_and_read_the_tasks(make):
    found = []

    def on_transition(transition):
        if transition.kind is Kind.task_success and transition.name == "b":
            ev.trigger_event(more, transition.sequence)
        if transition.kind is Kind.run_ended:
            ev.trigger_event(more, "last")
        found.append([str(task.status) for task in ev.tasks()])

    ev = make(config={"on_transition": on_transition})
    ev.trigger_event(pair(ev))
    more = ev.add_event("more")
    ev.add_assoc(more, ev.add_step("c", int))
    assert ev() is True
    assert statuses(ev) == {"a[1]": "success", "b[1]": "success", "c[1]": "success"}
    assert ["success", "active"] in found
    assert [event.sequence for event in ev.events(more)] == [1, "last"]  # for the next call


@pytest.mark.stores("both")
def test_what_a_hook_triggers_while_the_eventor_is_closed_is_recorded(make, place):
    def on_transition(transition):
        if transition.name == "go":
            ev.trigger_event(more, transition.sequence)

    ev = make(config={"on_transition": on_transition})
    ev.trigger_event(pair(ev))
    more = ev.add_event("more")
    ev.close()
    assert place.sql("SELECT event FROM eventor_event") == [("go",), ("more",)]


def test_a_hook_may_stop_the_run(make):
    ev = make(config={"on_transition": lambda one: one.name == "a" and ev.stop()})
    ev.trigger_event(pair(ev))
    assert ev() is False
    assert statuses(ev)["a[1]"] in ("ready", "success")
    assert "b[1]" not in statuses(ev) or statuses(ev)["b[1]"] == "ready"


@pytest.mark.parametrize("call", ["__call__", "close", "preview", "check"])
def test_what_a_hook_cannot_do_is_refused_and_never_waits(make, call):
    refused = []

    def on_transition(_transition):
        with pytest.raises(evr.UsageError) as caught:
            getattr(ev, call)()
        refused.append(str(caught.value))

    ev = make(config={"on_transition": on_transition})
    ev.trigger_event(pair(ev))
    assert ev() is True
    assert all("running" in message for message in refused)
    assert len(refused) == 10


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_goes_through_and_cuts_the_run_short(make, error):
    seen = []

    def on_transition(transition):
        if transition.kind is Kind.task_active:
            raise error

    ev = make(config={"on_transition": [seen.append, on_transition]})
    ev.trigger_event(pair(ev, first=signal.pause))
    with pytest.raises(error):
        ev()
    assert statuses(ev) == {"a[1]": "active"}
    assert str(seen[-1]) == f"run_ended 1.0: {error.__name__}"


@pytest.mark.stores("both")
def test_a_run_that_fails_is_told_as_ended(make, place):
    seen = []

    def on_transition(transition):
        seen.append(transition)
        if transition.kind is Kind.task_active:
            place.sql("UPDATE eventor_recovery SET owner_began = 'another'")

    ev = make(config={"on_transition": on_transition})
    ev.trigger_event(pair(ev))
    with pytest.raises(evr.OwnershipError) as caught:
        ev()
    assert told(seen)[-1] == f"run_ended 1.0: OwnershipError: {caught.value}"
    assert seen[-1].succeeded is False


def test_hooks_are_called_in_the_owner_and_its_thread_with_threads_too(make):
    threads = set()
    config = {
        "task_construct": threading.Thread,
        "on_transition": lambda _: threads.add(threading.get_ident()),
    }
    ev = make(config=config)
    ev.trigger_event(pair(ev))
    assert ev() is True
    assert threads == {threading.get_ident()}


async def coroutine(_transition):
    pass


@pytest.mark.parametrize("given", ["print", 3, None, [print, 3], {print}, coroutine])
def test_what_is_no_hook_is_refused(make, given):
    with pytest.raises(evr.ConfigError, match="on_transition in Eventor's config is"):
        make(config={"on_transition": given})


KILLED = """
import json, os, signal, sys
import eventor as evr

def hook(one):
    with open("told", "a") as file:
        print(json.dumps([str(one.kind), one.name, one.sequence]), file=file, flush=True)
    if one.name == sys.argv[1] and one.kind == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)

with evr.Eventor(store=os.environ["STORE"], config={"logdir": ".", "on_transition": hook}) as ev:
    go = before = ev.add_event("go")
    for name in "abc":
        step = ev.add_step(name, int)
        ev.add_assoc(before, step)
        before = step.success
    ev.trigger_event(go, 1)
    ev()
"""

STORED = """
SELECT 'event_raised', event FROM eventor_event UNION ALL
SELECT 'task_ready', step FROM eventor_task UNION ALL
SELECT 'task_active', step FROM eventor_task WHERE started_at IS NOT NULL UNION ALL
SELECT 'task_success', step FROM eventor_task WHERE status = 'success'
"""


@pytest.mark.stores("both")
@pytest.mark.parametrize(
    ("name", "kind"), [("go", "event_raised"), ("b", "task_active"), ("b", "task_success")]
)
def test_no_hook_was_told_of_what_a_kill_has_kept_from_the_store(
    start, tmp_path, name, kind, place
):
    assert start(KILLED, name, kind, STORE=place.store).wait(60) == -signal.SIGKILL
    lines = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    seen = {(kind, name) for kind, name, _sequence in lines if name is not None}
    assert len(seen) == len(lines) - 1  # the start of the run; and nothing is told twice
    assert (kind, name) in seen
    assert seen <= set(place.sql(STORED))


class Crash(BaseException):
    """The end of the owner, at a commit."""


class Launcher:
    """Starts nothing; what was given to it ends in a random order, well or not."""

    def __init__(self, dice):
        self.dice, self.running = dice, []
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    @property
    def busy(self):
        return False

    def shows(self, *, patient):
        return False

    overran = False

    def allow_until(self, until):
        """Do nothing."""

    def prepare(self):
        return None

    def start(self, key, _step, _attempt, _results):
        if self.dice.random() < 0.1:
            return failure("it could not be started")
        self.running.append(key)
        return self.dice.randrange(1, 1000)

    def wait(self, _bell, seconds):
        self.now += timedelta(seconds=max(seconds, 0.001))

    def collect(self):
        self.dice.shuffle(self.running)
        ended = [self.running.pop() for _ in range(self.dice.randint(0, len(self.running)))]
        bad = failure("bad")
        good = Outcome(TaskStatus.success, "None")
        return [TaskEnded(key, self.dice.choice([good, good, bad])) for key in ended]

    def hurry(self):
        return []

    withdraw = hurry

    def stock(self, wanted):
        """Do nothing, as what follows."""

    renew = finish = close = abandon = lambda self, *_: None


def random_flow(ev, dice):
    events = [ev.add_event(f"e{number}") for number in range(6)]
    for number in range(8):
        triggers = {
            transition: dice.sample(events, dice.randint(1, 2))
            for transition in dice.sample(list(evr.StepTriggers), 2)
        }
        config = {"max_attempts": dice.randint(1, 3), "stop_on_exception": False}
        step = ev.add_step(f"s{number}", int, triggers=triggers, config=config)
        ev.add_assoc(dice.choice(events), step, delay=dice.choice([0, 0, 1]))
    ev.add_assoc(ev.add_event("both", expr=(events[0], events[1])), events[2])
    for number in range(3):
        ev.trigger_event(events[number], dice.choice([1, "1", 2]))


def stored(ev, earlier):
    """Return what the store tells, as what is told to hooks, without its order.

    Of the attempts that earlier recoveries had at a task, it tells too: `earlier` is how many.
    """
    found = [
        (Kind.event_raised, one.event, one.sequence, None, one.raised_at) for one in ev.events()
    ]
    for task in ev.tasks():
        which = (task.step, task.sequence)
        if task.replay is evr.StepReplay.skip:
            found.append((Kind.task_skipped, *which, None, task.ended_at))
            continue
        found.append((Kind.task_ready, *which, earlier.get(which, 0), task.ready_at))
        for attempt in task.attempts[earlier.get(which, 0) :]:  # not those of before
            which = (task.step, task.sequence, attempt.number)
            found.append((Kind.task_active, *which, attempt.started_at))
            if attempt.status is TaskStatus.success:
                found.append((Kind.task_success, *which, attempt.ended_at))
            elif attempt.status is TaskStatus.failure:
                last = task.status is TaskStatus.failure and attempt is task.attempts[-1]
                kind = Kind.task_failure if last else Kind.attempt_failed
                found.append((kind, *which, attempt.ended_at))
    return collections.Counter(found)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_told_is_what_is_stored_each_once_wherever_the_owner_crashes(
    make, monkeypatch, seed
):
    dice = random.Random(seed)
    launcher = Launcher(dice)
    monkeypatch.setattr("eventor.eventor.Launcher", lambda *_: launcher)
    monkeypatch.setattr("eventor.eventor._now", lambda: launcher.now)
    record, commits, crash_at = Ledger.record, 0, dice.randint(1, 12)
    before_it = dice.random() < 0.5

    def crashing(ledger, changes, now):
        nonlocal commits
        commits += 1
        if commits == crash_at and before_it:
            raise Crash
        record(ledger, changes, now)
        if commits == crash_at:
            raise Crash

    monkeypatch.setattr(Ledger, "record", crashing)
    seen = []

    def live(**arguments):
        seen.clear()
        launcher.running.clear()
        config = {"on_transition": seen.append, "max_concurrent": dice.randint(1, 3)}
        ev = make(config=config, **arguments)
        random_flow(ev, random.Random(seed))
        ended = None
        with contextlib.suppress(Crash):
            ended = ev()
        assert [seen[0].kind, seen[-1].kind] == [Kind.run_started, Kind.run_ended]
        heard = [(t.kind, t.name, t.sequence, t.attempt, t.at) for t in seen if t.name]
        ready = [one for one in seen if one.kind is Kind.task_ready]
        there = stored(ev, {(one.name, one.sequence): one.attempt for one in ready})
        assert len(set(heard)) == len(heard)
        assert collections.Counter(heard) <= there
        if ended is not None or before_it:
            assert collections.Counter(heard) == there
        assert [at for *_, at in heard] == sorted(at for *_, at in heard)
        raised = [one[1:3] for one in heard if one[0] is Kind.event_raised]
        assert raised == [(one.event, one.sequence) for one in ev.events()][: len(raised)]
        ready = [one[1:3] for one in heard if one[0] in (Kind.task_ready, Kind.task_skipped)]
        assert ready == [(one.step, one.sequence) for one in ev.tasks()][: len(ready)]
        ev.close()

    live()
    live(run_mode=evr.RunMode.recover)
