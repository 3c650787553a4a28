"""The pure rules, against a naive model of the interface: random flows, triggers and outcomes."""

import collections
import itertools
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventor.rules.config import LONGEST_DELAY, Config, StepConfig
from eventor.rules.expr import And, Atom, Gate, Or, and_, or_, postfix, text
from eventor.rules.flow import Event, Flow
from eventor.rules.plan import (
    Delayed,
    EventRaised,
    Left,
    Plan,
    TaskActive,
    TaskEnded,
    TaskKey,
    TaskReady,
    TaskRetried,
    TaskSkipped,
    Trigger,
    seconds_to_retry,
)
from eventor.rules.queue import Queue
from eventor.types import Cause, CauseKind, Outcome, StepReplay, TaskStatus, failure

CALL = Cause(CauseKind.call)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
RESOURCES = {"gpu": 2, "licence": 1}
TRANSITIONS = ("at_ready", "at_active", "at_success", "at_failure", "at_complete")


@dataclass
class Case:
    """A flow in plain words, from which both the real flow and the model are made."""

    exprs: list  # per event: None, or nested ("and" | "or", [parts]) over indices of earlier events
    triggers: list  # per step: {transition: [events]}
    policies: list  # per step: {status: replay}
    fails: list  # per step: whether it fails
    assocs: list  # (event, "event" | "step", index, delay)
    calls: list  # (event, sequence)
    limit: int
    seed: int
    configs: list  # per step: its config
    stumbles: list  # per step that does not fail: how many of its attempts do, all but the last
    left: dict = field(default_factory=dict)
    fixed: dict = field(default_factory=dict)  # how tasks have ended already
    within: list = field(default_factory=list)  # per step: [(event, sequence or None)] it triggers
    needs: list = field(default_factory=list)  # per step: the earlier steps whose results it takes
    lacking: set = field(default_factory=set)  # the tasks that fail for want of a result

    def attempt_fails(self, step, attempt):
        return self.fails[step] or attempt <= self.stumbles[step]


def expressions(events):
    """Expressions over the first of the events."""
    return st.recursive(
        st.integers(0, events - 1),
        lambda parts: st.tuples(
            st.sampled_from(["and", "or"]), st.lists(parts, min_size=1, max_size=3)
        ),
        max_leaves=6,
    )


@st.composite
def cases(draw):
    events = draw(st.integers(1, 6))
    steps = draw(st.integers(1, 5))

    event = st.integers(0, events - 1)
    sequence = st.sampled_from([1, "1", 2])
    status = st.sampled_from([status.value for status in TaskStatus])
    needs = st.fixed_dictionaries({}, optional={n: st.integers(1, m) for n, m in RESOURCES.items()})
    delay = st.sampled_from([0, 0, 0, 0.5, 3])
    configs = draw(
        st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "max_attempts": st.integers(1, 3),
                    "retry_delay": st.sampled_from([0, 2]),
                    "retry_jitter": st.just(0.5),
                    "priority": st.integers(-1, 1),
                    "resources": needs,
                },
            ),
            min_size=steps,
            max_size=steps,
        )
    )
    return Case(
        exprs=[draw(st.none() | expressions(index)) if index else None for index in range(events)],
        triggers=[
            draw(
                st.dictionaries(
                    st.sampled_from(TRANSITIONS),
                    st.lists(event, min_size=1, max_size=2),
                    max_size=3,
                )
            )
            for _ in range(steps)
        ],
        policies=[
            draw(st.dictionaries(status, st.sampled_from(["rerun", "skip"]))) for _ in range(steps)
        ],
        fails=draw(st.lists(st.booleans(), min_size=steps, max_size=steps)),
        assocs=draw(
            st.lists(
                st.tuples(event, st.just("event"), event, delay)
                | st.tuples(event, st.just("step"), st.integers(0, steps - 1), delay),
                max_size=8,
            )
        ),
        calls=draw(st.lists(st.tuples(event, sequence), min_size=1, max_size=5)),
        limit=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 1000)),
        configs=configs,
        stumbles=[draw(st.integers(0, c.get("max_attempts", 1) - 1)) for c in configs],
        left=draw(
            st.dictionaries(st.tuples(st.integers(0, steps - 1), sequence), status, max_size=6)
        ),
        within=[
            draw(st.just([]) | st.lists(st.tuples(event, st.none() | sequence), max_size=2))
            for _ in range(steps)
        ],
        needs=[
            draw(st.just([]) | st.lists(st.integers(0, step - 1), max_size=2)) if step else []
            for step in range(steps)
        ],
    )


DEFAULT = {"ready": "rerun", "active": "rerun", "failure": "rerun", "success": "skip"}


def end_of(case, task):
    if task in case.fixed:
        return case.fixed[task]
    left = case.left.get(task)
    policy = {**DEFAULT, **case.policies[task[0]]}
    if left is not None and policy[left] == "skip":
        return "skipped"
    return "failure" if case.fails[task[0]] or task in case.lacking else "success"


def model(case):
    """What is raised and run in the end: the interface read naively, over and over until still."""
    raised, tasks = set(case.calls), {}

    def holds(expr, sequence):
        if isinstance(expr, int):
            return (expr, sequence) in raised
        found = [holds(part, sequence) for part in expr[1]]
        return all(found) if expr[0] == "and" else any(found)

    while True:
        before = (len(raised), len(tasks))
        for event, sequence in list(raised):
            for source, kind, target, _delay in case.assocs:
                if source == event and kind == "event":
                    raised.add((target, sequence))
                elif source == event:
                    tasks.setdefault((target, sequence), end_of(case, (target, sequence)))
        for step, sequence in tasks:
            failed = tasks[step, sequence] == "failure"
            for transition, events in case.triggers[step].items():
                if transition != ("at_success" if failed else "at_failure"):
                    raised.update((event, sequence) for event in events)
        raised.update(
            (event, sequence if other is None else other)
            for (step, sequence), end in tasks.items()
            if end != "skipped" and (step, sequence) not in case.lacking
            for event, other in case.within[step]
        )
        for sequence in {sequence for _, sequence in raised}:
            raised.update(
                (index, sequence)
                for index, expr in enumerate(case.exprs)
                if expr is not None and holds(expr, sequence)
            )
        if before == (len(raised), len(tasks)):
            return raised, tasks


def build(case):
    flow = Flow(Config(resources=RESOURCES))

    def tree(expr):
        if isinstance(expr, int):
            return flow.events[f"e{expr}"]
        return (and_ if expr[0] == "and" else or_)(*map(tree, expr[1]))

    for index, expr in enumerate(case.exprs):
        flow.add_event(f"e{index}", None if expr is None else tree(expr))
    steps = zip(case.triggers, case.policies, case.configs, strict=True)
    for index, (triggers, policy, config) in enumerate(steps):
        named = {key: [flow.events[f"e{e}"] for e in events] for key, events in triggers.items()}
        flow.add_step(f"s{index}", int, (), {}, named, policy, config)
    for event, kind, target, delay in case.assocs:
        known = flow.events if kind == "event" else flow.steps
        flow.add_assoc(flow.events[f"e{event}"], known[f"{kind[0]}{target}"], delay=delay)
    return flow


def plan_of(flow, case, left, *, stops):
    chance = random.Random(case.seed).random
    return Plan(flow, left, case.limit, stop_on_exception=stops, resources=RESOURCES, chance=chance)


def triggers_within(case, task):
    """Return what a task triggers while it runs."""
    cause = Cause(CauseKind.step, task.step)
    return [
        Trigger(f"e{event}", task.sequence if other is None else other, cause)
        for event, other in case.within[int(task.step[1:])]
    ]


def play(case, flow, plan):
    """Run the plan with outcomes in a random order, at random times; return all its changes."""
    dice = random.Random(case.seed)
    now = NOW
    calls = [Trigger(f"e{event}", sequence, CALL) for event, sequence in case.calls]
    cut = dice.randrange(len(calls) + 1)
    changes = [*plan.note(calls[:cut], now), *plan.advance([], now)]
    late, active, seen, due = calls[cut:], {}, 0, {}
    while True:
        for change in changes[seen:]:
            if isinstance(change, TaskActive):
                assert change.task not in active
                assert due.pop(change.task, now) <= now
                active[change.task] = change.attempt
            elif isinstance(change, TaskRetried):
                due[change.task] = change.due
        seen = len(changes)
        assert len(active) <= case.limit
        used = collections.Counter()
        for task in active:
            used.update(dict(flow.steps[task.step].config.resources))
        assert all(used[name] <= most for name, most in RESOURCES.items())
        if not active and not late and plan.next_due is None:
            return changes
        if plan.next_due is not None and (not (active or late) or dice.random() < 0.3):
            now = max(now, plan.next_due)
            arrivals = []
        elif late and (not active or dice.random() < 0.5):
            arrivals = [late.pop(0)]
        else:
            now += timedelta(seconds=dice.random())
            task = dice.choice(sorted(active, key=str))
            failed = case.attempt_fails(int(task.step[1:]), active.pop(task))
            outcome = failure("x") if failed else Outcome(TaskStatus.success, "")
            arrivals = [*triggers_within(case, task), TaskEnded(task, outcome)]
        changes += plan.advance(arrivals, now)


@pytest.mark.no_cover
@pytest.mark.once
@settings(max_examples=200)
@given(cases())
def test_what_is_raised_and_run_equals_the_naive_model(case):
    flow = build(case)
    left = {
        TaskKey(f"s{step}", sequence): Left(TaskStatus(status), 7, 0, int(status == "active"))
        for (step, sequence), status in case.left.items()
    }
    plan = plan_of(flow, case, left, stops=False)
    changes = play(case, flow, plan)
    raised, tasks = model(case)

    events = [(c.event, c.sequence) for c in changes if isinstance(c, EventRaised)]
    assert len(events) == len(set(events))
    assert set(events) == {(f"e{event}", sequence) for event, sequence in raised}

    ended = {
        (c.task.step, c.task.sequence): c.outcome.status.value
        for c in changes
        if isinstance(c, TaskEnded)
    }
    skipped = [c for c in changes if isinstance(c, TaskSkipped)]
    ended |= {(c.task.step, c.task.sequence): "skipped" for c in skipped}
    assert ended == {(f"s{step}", sequence): end for (step, sequence), end in tasks.items()}
    assert all(c.result == 7 for c in skipped)
    assert plan.idle
    # Nothing is kept of an expression that has held.
    assert not {(c.event, c.sequence) for c in changes if isinstance(c, EventRaised)} & {
        *plan._progress
    }

    created = [c.task for c in changes if isinstance(c, TaskReady)]
    started = [c.task for c in changes if isinstance(c, TaskActive)]
    assert set(started) == set(created)
    if not any(case.configs):
        assert started == created
    check_attempts(case, flow, changes)
    check_delays(flow, changes)
    handled = all(
        flow.steps[step].handles_failure for (step, _), end in ended.items() if end == "failure"
    )
    assert plan.all_handled == handled


def check_attempts(case, flow, changes):
    """A task is tried until it ends well, as often as it may be, from where it was left."""
    counted = collections.defaultdict(list)
    for change in changes:
        if isinstance(change, TaskReady):
            counted[change.task] = [change.left.attempt if change.left else 0]
        elif isinstance(change, TaskActive):
            counted[change.task].append(change.attempt)
    for task, (spent, *attempts) in counted.items():
        step = int(task.step[1:])
        most = flow.steps[task.step].config.max_attempts
        last = most if case.fails[step] else case.stumbles[step] + 1
        assert attempts == list(range(spent + 1, max(last, spent + 1) + 1))


def check_delays(flow, changes):
    """Of an event, each delayed association is set once, and by the time that was asked for."""
    delays = [change.wait for change in changes if isinstance(change, Delayed)]
    assert sorted(delays, key=str) == sorted(
        (
            (change.event, change.sequence, seconds)
            for change in changes
            if isinstance(change, EventRaised)
            for seconds in flow.delayed.get(change.event, ())
        ),
        key=str,
    )
    causes = [c.cause for c in changes if isinstance(c, TaskReady | EventRaised)]
    for cause in causes:
        if cause.kind == "association":
            assert cause.detail in (None, "after 0.5 s", "after 3 s")


@pytest.mark.no_cover
@pytest.mark.once
@settings(max_examples=200)
@given(cases())
def test_an_unhandled_failure_lets_nothing_start_after_it(case):
    flow = build(case)
    plan = plan_of(flow, case, {}, stops=True)
    stopped = False
    for change in play(case, flow, plan):
        assert not (stopped and isinstance(change, TaskActive))
        if isinstance(change, TaskEnded) and change.outcome.status is TaskStatus.failure:
            stopped = stopped or not flow.steps[change.task.step].handles_failure
    assert plan.stopping == stopped
    waited = plan.waiting
    plan.resume()
    changes = plan.advance([], NOW + timedelta(days=1))
    # A start may raise events that make further tasks ready.
    waited += sum(isinstance(change, TaskReady) for change in changes)
    started = sum(isinstance(change, TaskActive) for change in changes)
    if any(config.get("resources") for config in case.configs):
        assert bool(started) == bool(waited)
    else:
        assert started == min(waited, case.limit)


def test_every_change_names_its_cause():
    flow = Flow(Config())
    a = flow.add_event("a")
    b = flow.add_event("b", expr=or_(a, a))
    flow.add_assoc(b, flow.add_step("s", int, (), {}, {}, {}, {}))
    changes = Plan(flow, {}, 1, stop_on_exception=True).advance([Trigger("a", 1, CALL)], NOW)
    assert [str(change.cause) for change in changes[:3]] == [
        "call",
        "expression a a or a",
        "association b",
    ]
    assert changes[2].replay is None
    assert StepReplay.skip not in [getattr(change, "replay", None) for change in changes]


def test_a_chain_of_any_length_is_followed():
    flow = Flow(Config())
    events = [flow.add_event(f"e{number}") for number in range(20_000)]
    for one, next_ in itertools.pairwise(events):
        flow.add_assoc(one, next_)
    changes = Plan(flow, {}, 1, stop_on_exception=True).advance([Trigger("e0", 1, CALL)], NOW)
    assert len(changes) == 20_000


def test_an_expression_prints_as_it_is_written():
    a, b, c = (Event(name) for name in "abc")
    tree = a & (b | c)
    assert (text(tree), text(a), text(Or((a,)))) == ("a and (b or c)", "a", "a")
    assert repr(tree) == "<expression a and (b or c)>"
    assert postfix(tree) == ["a", "b", "c", {"or": 2}, {"and": 2}]
    assert text((a, b) | c) == "(a and b) or c"
    assert text([a] & c) == "a and c"
    assert isinstance(and_(a, b), And)
    assert and_(a) is a


def test_a_part_that_stands_in_many_places_is_looked_at_once():
    node = Atom("a")
    for _ in range(200):
        node = And((node, Or((node, node))))
    gate = Gate(node)
    assert gate.is_open(gate.begin({"a"}.__contains__))
    assert not gate.is_open(gate.begin({"b"}.__contains__))


class NaiveQueue:
    """The rule of `Queue`, read naively."""

    def __init__(self, resources):
        self.waiting, self.left = [], dict(resources)

    def push(self, item, priority, needs):
        self.waiting.append((item, priority, needs))

    def pop(self):
        kept = set()
        for entry in sorted(self.waiting, key=lambda entry: -entry[1]):  # which keeps the order
            item, _priority, needs = entry
            if all(much <= self.left[name] and name not in kept for name, much in needs):
                self.waiting.remove(entry)
                self.give_back([(name, -much) for name, much in needs])
                return item
            kept |= {name for name, _much in needs}
        return None

    def give_back(self, needs):
        for name, much in needs:
            self.left[name] += much


LEFT = {"gpu": 2, "licence": 1, "disk": 3, "tape": 1}
NEEDS = st.fixed_dictionaries(
    {}, optional={name: st.integers(1, much) for name, much in LEFT.items()}
).map(lambda needs: tuple(needs.items()))


@pytest.mark.once
@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(-1, 1), NEEDS) | st.none() | st.integers(0, 9), max_size=60))
def test_who_is_next_equals_the_naive_rule(moves):
    """A move pushes something, pops, or lets one of those end that were popped."""
    queue, naive, needs, held = Queue(LEFT), NaiveQueue(LEFT), {}, []
    for number, move in enumerate(moves):
        if isinstance(move, tuple):
            needs[number] = move[1]
            queue.push(number, *move)
            naive.push(number, *move)
        elif move is None:
            item = queue.pop()
            assert item == naive.pop()
            held += [] if item is None else [item]
        elif held:
            ended = held.pop(move % len(held))
            queue.give_back(needs[ended])
            naive.give_back(needs[ended])
        assert len(queue) == len(naive.waiting)
    while len(queue):  # nothing starves: once all is given back, all gets its turn
        for item in held:
            queue.give_back(needs[item])
        held = list(iter(queue.pop, None))
        assert held


class Compared(int):
    """A priority that counts how often one is compared with another."""

    count = 0

    def __neg__(self):
        return self

    def __eq__(self, other):
        Compared.count += 1
        return int(self) == int(other)

    __hash__ = int.__hash__


def test_what_all_asks_for_something_else_is_not_looked_at_each_time_that_one_starts():
    """Though all share a resource, for which they wait."""
    many = 1_000
    queue = Queue({"gpu": 1, **{str(number): 1 for number in range(many)}})
    Compared.count = 0
    for number in range(many):
        queue.push(number, Compared(0), (("gpu", 1), (str(number), 1)))
    for number in range(many):
        assert queue.pop() == number
        assert queue.pop() is None
        queue.give_back((("gpu", 1), (str(number), 1)))
    assert Compared.count < 50 * many


def test_a_delay_grows_by_its_factor_up_to_what_is_sensible():
    config = StepConfig(retry_delay=2, retry_backoff=3, retry_jitter=10)
    assert [seconds_to_retry(config, attempt, 0) for attempt in (1, 2, 3)] == [2, 6, 18]
    assert seconds_to_retry(config, 1, 0.5) == 7
    assert seconds_to_retry(config, 10_000, 1) == LONGEST_DELAY
    assert seconds_to_retry(StepConfig(retry_backoff=3), 10_000, 0) == 0


def test_who_came_first_is_known_when_a_line_was_empty_in_between():
    queue = Queue({"x": 9, "y": 9, "z": 9})
    queue.push(0, 0, (("x", 1),))
    queue.push(1, 0, (("y", 1),))
    assert queue.pop() == 0
    queue.push(2, 0, (("z", 1),))
    assert (queue.pop(), queue.pop()) == (1, 2)


def test_nothing_that_is_due_acts_while_it_is_stopped():
    flow = Flow(Config())
    go, late = flow.add_event("go"), flow.add_event("late")
    flow.add_assoc(go, late, delay=5)
    plan = Plan(flow, {}, 1, stop_on_exception=True)
    plan.advance([Trigger("go", 1, CALL)], NOW)
    plan.stop()
    assert plan.advance([], NOW + timedelta(seconds=9)) == []
    plan.resume()
    assert [change.event for change in plan.advance([], NOW + timedelta(seconds=9))] == ["late"]
