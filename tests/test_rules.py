"""The pure rules, against a naive model of the interface: random flows, triggers and outcomes."""

import itertools
import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from eventor.expr import And, Atom, Gate, Or, and_, or_, postfix, text
from eventor.flow import Event, Flow
from eventor.plan import (
    EventRaised,
    Left,
    Plan,
    TaskActive,
    TaskEnded,
    TaskKey,
    TaskReady,
    TaskSkipped,
    Trigger,
)
from eventor.types import Cause, CauseKind, Outcome, StepReplay, TaskStatus, failure

CALL = Cause(CauseKind.call)
TRANSITIONS = ("at_ready", "at_active", "at_success", "at_failure", "at_complete")


@dataclass
class Case:
    """A flow in plain words, from which both the real flow and the model are made."""

    exprs: list  # per event: None, or nested ("and" | "or", [parts]) over indices of earlier events
    triggers: list  # per step: {transition: [events]}
    policies: list  # per step: {status: replay}
    fails: list  # per step: whether it fails
    assocs: list  # (event, "event" | "step", index)
    calls: list  # (event, sequence)
    limit: int
    seed: int
    left: dict = field(default_factory=dict)


@st.composite
def cases(draw):
    events = draw(st.integers(1, 6))
    steps = draw(st.integers(1, 5))

    def expression(index):
        atom = st.integers(0, index - 1)
        return st.recursive(
            atom,
            lambda parts: st.tuples(
                st.sampled_from(["and", "or"]), st.lists(parts, min_size=1, max_size=3)
            ),
            max_leaves=6,
        )

    event = st.integers(0, events - 1)
    sequence = st.sampled_from([1, "1", 2])
    status = st.sampled_from([status.value for status in TaskStatus])
    return Case(
        exprs=[draw(st.none() | expression(index)) if index else None for index in range(events)],
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
                st.tuples(event, st.just("event"), event)
                | st.tuples(event, st.just("step"), st.integers(0, steps - 1)),
                max_size=8,
            )
        ),
        calls=draw(st.lists(st.tuples(event, sequence), min_size=1, max_size=5)),
        limit=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 1000)),
        left=draw(
            st.dictionaries(st.tuples(st.integers(0, steps - 1), sequence), status, max_size=6)
        ),
    )


DEFAULT = {"ready": "rerun", "active": "rerun", "failure": "rerun", "success": "skip"}


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
            for source, kind, target in case.assocs:
                if source == event and kind == "event":
                    raised.add((target, sequence))
                elif source == event and (target, sequence) not in tasks:
                    left = case.left.get((target, sequence))
                    policy = {**DEFAULT, **case.policies[target]}
                    if left is not None and policy[left] == "skip":
                        tasks[target, sequence] = "skipped"
                    else:
                        tasks[target, sequence] = "failure" if case.fails[target] else "success"
        for step, sequence in tasks:
            failed = tasks[step, sequence] == "failure"
            for transition, events in case.triggers[step].items():
                if transition != ("at_success" if failed else "at_failure"):
                    raised.update((event, sequence) for event in events)
        for sequence in {sequence for _, sequence in raised}:
            raised.update(
                (index, sequence)
                for index, expr in enumerate(case.exprs)
                if expr is not None and holds(expr, sequence)
            )
        if before == (len(raised), len(tasks)):
            return raised, tasks


def build(case):
    flow = Flow()

    def tree(expr):
        if isinstance(expr, int):
            return flow.events[f"e{expr}"]
        return (and_ if expr[0] == "and" else or_)(*map(tree, expr[1]))

    for index, expr in enumerate(case.exprs):
        flow.add_event(f"e{index}", None if expr is None else tree(expr))
    for index, (triggers, policy) in enumerate(zip(case.triggers, case.policies, strict=True)):
        named = {key: [flow.events[f"e{e}"] for e in events] for key, events in triggers.items()}
        flow.add_step(f"s{index}", int, (), {}, named, policy, {})
    for event, kind, target in case.assocs:
        known = flow.events if kind == "event" else flow.steps
        flow.add_assoc(flow.events[f"e{event}"], known[f"{kind[0]}{target}"])
    return flow


def play(case, flow, plan):
    """Run the plan with outcomes in a random order; return all its changes."""
    dice = random.Random(case.seed)
    calls = [Trigger(f"e{event}", sequence, CALL) for event, sequence in case.calls]
    cut = dice.randrange(len(calls) + 1)
    changes = [*plan.note(calls[:cut]), *plan.advance([])]
    late, active, seen = calls[cut:], [], 0
    while True:
        active += [change.task for change in changes[seen:] if isinstance(change, TaskActive)]
        seen = len(changes)
        assert len(active) <= case.limit
        if not active and not late:
            return changes
        if late and (not active or dice.random() < 0.5):
            arrivals = [late.pop(0)]
        else:
            task = active.pop(dice.randrange(len(active)))
            failed = case.fails[int(task.step[1:])]
            arrivals = [
                TaskEnded(task, failure("x") if failed else Outcome(TaskStatus.success, ""))
            ]
        changes += plan.advance(arrivals)


@settings(max_examples=400, deadline=None)
@given(cases())
def test_what_is_raised_and_run_equals_the_naive_model(case):
    flow = build(case)
    left = {
        TaskKey(f"s{step}", sequence): Left(TaskStatus(status), 7)
        for (step, sequence), status in case.left.items()
    }
    plan = Plan(flow, left, case.limit, stop_on_exception=False)
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
    assert started == created
    handled = all(
        flow.steps[step].handles_failure for (step, _), end in ended.items() if end == "failure"
    )
    assert plan.all_handled == handled


@settings(max_examples=200, deadline=None)
@given(cases())
def test_an_unhandled_failure_lets_nothing_start_after_it(case):
    flow = build(case)
    plan = Plan(flow, {}, case.limit, stop_on_exception=True)
    stopped = False
    for change in play(case, flow, plan):
        assert not (stopped and isinstance(change, TaskActive))
        if isinstance(change, TaskEnded) and change.outcome.status is TaskStatus.failure:
            stopped = stopped or not flow.steps[change.task.step].handles_failure
    assert plan.stopping == stopped
    waited = plan.waiting
    plan.resume()
    changes = plan.advance([])
    # A start may raise events that make further tasks ready.
    waited += sum(isinstance(change, TaskReady) for change in changes)
    assert sum(isinstance(change, TaskActive) for change in changes) == min(waited, case.limit)


def test_every_change_names_its_cause():
    flow = Flow()
    a = flow.add_event("a")
    b = flow.add_event("b", expr=or_(a, a))
    flow.add_assoc(b, flow.add_step("s", int, (), {}, {}, {}, {}))
    changes = Plan(flow, {}, 1, stop_on_exception=True).advance([Trigger("a", 1, CALL)])
    assert [str(change.cause) for change in changes[:3]] == [
        "call",
        "expression a a or a",
        "association b",
    ]
    assert changes[2].replay is None
    assert StepReplay.skip not in [getattr(change, "replay", None) for change in changes]


def test_a_chain_of_any_length_is_followed():
    flow = Flow()
    events = [flow.add_event(f"e{number}") for number in range(20_000)]
    for one, next_ in itertools.pairwise(events):
        flow.add_assoc(one, next_)
    changes = Plan(flow, {}, 1, stop_on_exception=True).advance([Trigger("e0", 1, CALL)])
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
