"""The proof of durability: random flows, crashed at every point, and recovered until they are done.

The Eventor, its loop and its store are the real ones; the launcher is not: it starts nothing, and
ends what it was given in a random order. `--proofs 50` makes it 100,000 flows.
"""

import collections
import contextlib
import dataclasses
import random
import sqlite3

import pytest
from hypothesis import HealthCheck, given, settings

import eventor as evr
from eventor import owner, store
from eventor.plan import TaskEnded, TaskKey
from eventor.types import Outcome, TaskStatus, failure
from tests.test_rules import DEFAULT, cases, model

FLOWS, QUICK_FLOWS = 2_000, 100
POINTS = (4, 10, 30)


class Crash(BaseException):
    """The end of the owner, at a point at which it may come."""


class World:
    """What happens outside: which steps fail, in which order they end, and when the owner dies."""

    def __init__(self, path):
        self.reader = sqlite3.connect(path, isolation_level=None)
        self.crashes = 0

    def begin(self, dice, failing, countdown):
        self.dice, self.failing, self.countdown = dice, failing, countdown
        self.started, self.running, self.ended = [], [], []

    def point(self):
        """Be a point at which the owner may die."""
        if self.countdown is not None:
            self.countdown -= 1
            if self.countdown < 0:
                self.crashes += 1
                raise Crash

    # What follows is what the loop knows of a launcher.

    def prepare(self):
        self.point()

    def start(self, key, step):
        self.point()
        query = (
            "SELECT status FROM eventor_task WHERE step = ? AND sequence = ? AND sequence_type = ?"
            " ORDER BY task_id DESC LIMIT 1"
        )
        named = (key.step, str(key.sequence), type(key.sequence).__name__)
        assert self.reader.execute(query, named).fetchall() == [("active",)]
        self.started.append(key)
        self.running.append(key)
        self.point()
        return 1

    def wait(self, bell, seconds):
        if self.running:
            self.running.sort(key=str)
            key = self.running.pop(self.dice.randrange(len(self.running)))
            good = Outcome(TaskStatus.success, "")
            failed = key.step in self.failing
            self.ended.append(TaskEnded(key, failure("x") if failed else good))

    def collect(self):
        ended, self.ended = self.ended, []
        return ended

    def finish(self):
        return []

    def abandon(self):
        self.running.clear()

    def close(self):
        """Do nothing."""


@pytest.fixture
def world(tmp_path, monkeypatch):
    with evr.Eventor(store=tmp_path / "flow.db", config={"logdir": tmp_path}):
        world = World(tmp_path / "flow.db")
    monkeypatch.setattr("eventor.eventor.Launcher", lambda *_: world)
    for name in ("record", "define"):
        plain = getattr(store.Ledger, name)

        def crashing(ledger, *arguments, plain=plain):
            world.point()
            plain(ledger, *arguments)
            world.point()

        monkeypatch.setattr(store.Ledger, name, crashing)
    yield world
    world.reader.close()


def build(case, ev):
    def tree(expr):
        if isinstance(expr, int):
            return ev_events[expr]
        return (evr.and_ if expr[0] == "and" else evr.or_)(*map(tree, expr[1]))

    ev_events = []
    for index, expr in enumerate(case.exprs):
        ev_events.append(ev.add_event(f"e{index}", None if expr is None else tree(expr)))
    steps = [
        ev.add_step(
            f"s{index}",
            int,
            triggers={key: [ev_events[e] for e in found] for key, found in triggers.items()},
            recovery=policy,
        )
        for index, (triggers, policy) in enumerate(zip(case.triggers, case.policies, strict=True))
    ]
    for event, kind, target in case.assocs:
        ev.add_assoc(ev_events[event], (ev_events if kind == "event" else steps)[target])
    return ev_events


def die(ev):
    """Let go of an Eventor as a death of its process would: nothing more is written."""
    ev._release.detach()
    owner.disclaim(ev._ledger._claim)
    ev._store.close()
    ev._journal.close()


def check_starts(case, world, left):
    """What was started was asked to run by its policy, and once."""
    assert len(world.started) == len(set(world.started))
    for key in world.started:
        found = left.get(key)
        policy = {**DEFAULT, **case.policies[int(key.step[1:])]}
        assert found is None or policy[found.status.value] == "rerun"


def check_whole(case, world, left, ev, preview, calls):
    """A recovery that came to its end did what the naive model expects, and what was foreseen."""
    now = dataclasses.replace(
        case,
        calls=calls,
        fails=[f"s{index}" in world.failing for index in range(len(case.fails))],
        left={(int(key.step[1:]), key.sequence): how.status.value for key, how in left.items()},
    )
    raised, expected = model(now)
    tasks = {(int(task.step[1:]), task.sequence): task for task in ev.tasks()}
    assert {
        key: "skipped" if task.replay == "skip" else str(task.status) for key, task in tasks.items()
    } == expected
    events = [(int(event.event[1:]), event.sequence) for event in ev.events()]
    assert collections.Counter(events) == collections.Counter(raised)
    skipped = {
        TaskKey(task.step, task.sequence) for task in tasks.values() if task.replay == "skip"
    }
    assert {TaskKey(task.step, task.sequence) for task in preview.runs} == set(world.started)
    assert {TaskKey(task.step, task.sequence) for task in preview.skips} == skipped
    assert {(trigger.event, trigger.sequence) for trigger in preview.triggers} == {
        (event.event, event.sequence) for event in ev.events() if event.cause.kind == "recovery"
    }


def live(case, world, tmp_path, name):
    """Run a flow to its end, through crashes."""
    dice = random.Random(case.seed)
    crashes = dice.randrange(1, 5)
    calls, recorded = list(case.calls), False
    mode = evr.RunMode.restart
    config = {
        "logdir": tmp_path,
        "max_concurrent": case.limit,
        "stop_on_exception": False,
        "strict_recovery": True,
    }
    while True:
        crash = crashes > 0
        crashes -= 1
        failing = {
            f"s{index}" for index, fails in enumerate(case.fails) if fails and dice.random() < 0.6
        }
        world.begin(dice, failing, None)
        ev = evr.Eventor(
            name=name,
            store=tmp_path / "flow.db",
            run_mode=mode,
            logging_level=100,
            config=config,
        )
        with contextlib.ExitStack() as stack:
            stack.callback(die, ev)
            events = build(case, ev)
            # A program that finds its triggers recorded need not raise them again.
            recorded = recorded or bool(ev._ledger.triggers())
            if not recorded or dice.random() < 0.3:
                for event, sequence in calls:
                    ev.trigger_event(events[event], sequence)
            left = ev._ledger.left()
            preview = ev.preview(failing)
            world.countdown = dice.randrange(dice.choice(POINTS)) if crash else None
            try:
                ev()
            except Crash:
                check_starts(case, world, left)
            else:
                world.countdown = None
                check_starts(case, world, left)
                check_whole(case, world, left, ev, preview, calls)
                if not crash:
                    return
        mode = evr.RunMode.recover


def simulate(world, tmp_path, flows):
    count = 0

    @settings(
        max_examples=flows,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def check(case):
        nonlocal count
        count += 1
        live(case, world, tmp_path, str(count))

    check()
    print(f"\nsimulated {count} flows with {world.crashes} crashes")
    assert world.crashes > flows


@pytest.mark.timeout(36_000)
@pytest.mark.slow
def test_whatever_the_point_of_a_crash_nothing_is_lost_and_nothing_done_twice(
    world, tmp_path, request
):
    simulate(world, tmp_path, FLOWS * request.config.getoption("--proofs"))


@pytest.mark.timeout(600)
def test_at_some_points_of_a_crash_nothing_is_lost_and_nothing_done_twice(world, tmp_path):
    simulate(world, tmp_path, QUICK_FLOWS)
