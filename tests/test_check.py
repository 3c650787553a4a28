"""What is found wrong with a flow before it runs, and that nothing is which can be right."""

import dataclasses
import itertools
import logging
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eventor as evr
from eventor.rules.check import findings
from eventor.rules.config import Config
from eventor.rules.flow import Flow, Step
from eventor.types import FindingKind
from tests.conftest import wait_until
from tests.test_rules import TRANSITIONS, Case, build, cases, expressions, model

pytestmark = pytest.mark.stores("either")

CANNOT_COME = {FindingKind.impossible_expression, FindingKind.unraised_event}


def found(flow, *triggered):
    return [(str(finding.kind), finding.name) for finding in findings(flow, set(triggered))]


def messages(flow, *triggered):
    return [str(finding) for finding in findings(flow, set(triggered))]


def step(flow, name, *causes, **triggers):
    """Define a step that some events lead to."""
    made = flow.add_step(name, int, (), {}, triggers, {}, {})
    for cause in causes:
        flow.add_assoc(cause, made)
    return made


@pytest.fixture
def needs(monkeypatch):
    """Say which results steps use, by their names."""
    used = {}
    monkeypatch.setattr(Step, "needs", told_by(used), raising=False)
    return used


def told_by(used):
    """Return an attribute of steps that a table tells, whatever is set when they are made."""
    return property(lambda step: tuple(used.get(step.name, ())), lambda *_: None)


def test_a_flow_in_which_all_is_well_has_no_findings():
    flow = Flow(Config())
    go, by_hand, unused = (flow.add_event(name) for name in ("go", "by hand", "unused"))
    one = step(flow, "one", go)
    two = step(flow, "two", one.success, by_hand, at_failure=unused)
    mend = step(flow, "mend", two.failure)
    flow.add_assoc(flow.add_event("end", expr=(two.success | mend.success, by_hand)), one)
    assert found(flow, "go", "by hand") == []


def test_a_step_that_no_event_leads_to_is_found_alone():
    flow = Flow(Config())
    one = step(flow, "one")
    step(flow, "two", one.success)
    assert found(flow) == [("unreachable_step", "one")]


def test_an_event_that_leads_to_something_and_that_nothing_raises_is_found():
    flow = Flow(Config())
    go, part, source, _ = (flow.add_event(name) for name in ("go", "part", "source", "unused"))
    between = flow.add_event("between")
    flow.add_assoc(source, between)
    step(flow, "one", go, between, flow.add_event("both", expr=(go, part)))
    assert found(flow) == [("unraised_event", name) for name in ("go", "part", "source")]
    assert found(flow, "go", "part") == [("unraised_event", "source")]
    (message,) = messages(flow, "go", "part")
    assert message == (
        "Nothing has raised event 'source', and nothing in the flow does; "
        "a step or another program may still trigger it"
    )


def test_steps_that_wait_for_each_other_are_found_once():
    flow = Flow(Config())
    go = flow.add_event("go")
    step(flow, "well", go)
    behind, one, two = flow.add_event("behind"), step(flow, "one"), step(flow, "two")
    step(flow, "after", behind, at_ready=flow.add_event("far behind"))
    flow.add_assoc(one.success, two, behind)
    flow.add_assoc(two.success, one)
    step(flow, "last", flow.events["far behind"])
    (message,) = messages(flow, "go")
    assert message == (
        "Nothing raises event 'one.success' but what follows from it: "
        "'one.success', 'two', 'two.success', 'one'"
    )
    flow.add_event("far expression", flow.add_event("expression", expr=(go, behind)))
    assert found(flow, "go") == [
        ("unraised_event", "one.success"),
        ("impossible_expression", "expression"),
    ]


@pytest.mark.parametrize("transitive", [False, True])
def test_an_expression_that_needs_both_ends_of_a_step_is_found(transitive):
    flow = Flow(Config())
    go, other = flow.add_event("go"), flow.add_event("other")
    first = step(flow, "first", go)
    well, ill = first.success, first.failure
    if transitive:
        well, ill = step(flow, "then", well).complete, step(flow, "mend", ill).success
        flow.add_assoc(ill, middle := flow.add_event("middle"))
        ill = flow.add_event("ill", expr=((middle | ill) & go) | (ill, other))
    expression = (well, other, evr.or_((ill, other), ill))
    step(flow, "last", flow.add_event("both", expr=expression))
    (message,) = messages(flow, "go", "other")
    assert message == (
        "The expression of event 'both' can never hold: it needs both the success and the failure "
        "of step 'first' in one sequence"
    )
    # However it is said.
    flow.add_event("said otherwise", expr=(evr.or_((well, ill), (ill, go, well)), go))
    assert [name for _, name in found(flow, "go", "other")] == ["both", "said otherwise"]
    # What was triggered by hand is nobody's end.
    assert found(flow, "go", "other", well.name) == []
    assert found(flow, "go", "other", "both", "said otherwise") == []


def test_an_expression_that_can_hold_in_some_way_is_not_found():
    flow = Flow(Config())
    go, by_hand, event, circle = (flow.add_event(name) for name in ("go", "by hand", "e", "circle"))
    first = step(flow, "first", go)
    well, ill = first.success, first.failure
    flow.add_assoc(well, event)
    flow.add_assoc(by_hand, event)
    after = step(flow, "after", well, ill)
    # The failure enters the circle elsewhere.
    flow.add_assoc(well, circle)
    one = step(flow, "one", circle)
    flow.add_assoc(step(flow, "two", one.success, ill).success, circle)
    ways = {
        "each alone": well | ill,
        "on the way": (well, first.ready, first.active, first.complete, go),
        "or by hand": (evr.or_(well, by_hand), ill),
        "or not at all": ((well, ill) | by_hand, ill),
        "an event of both": (event, ill),
        "a step of both": (after.success, ill),
        "a circle": (circle, ill),
    }
    for name, expr in ways.items():
        flow.add_event(name, expr)
    assert found(flow, "go", "by hand") == []


def test_an_expression_that_waits_for_what_follows_from_it_is_found():
    flow = Flow(Config())
    go, late = flow.add_event("go"), flow.add_event("late")
    begin = flow.add_event("begin", expr=(go, late | late))
    step(flow, "one", begin, at_success=late)
    step(flow, "two", flow.add_event("after", expr=(begin, late)))
    assert messages(flow, "go") == [
        "The expression of event 'begin' can never hold: 'late' cannot be raised before it"
    ]
    assert found(flow, "go", "late") == []


def test_a_result_that_cannot_be_there_is_found(needs):
    flow = Flow(Config())
    go = flow.add_event("go")
    one, beside = step(flow, "one", go), step(flow, "beside", go)
    two = step(flow, "two", one.success)
    step(flow, "joined", flow.add_event("both", expr=(two.success, beside.complete)))
    step(flow, "mend", one.failure)
    needs |= {"joined": ("one", "two", "beside", "joined"), "beside": ("one", "one")}
    needs |= {"mend": ("one",), "two": ("one",)}
    assert found(flow, "go") == [
        ("unavailable_result", name) for name in ("beside", "joined", "mend")
    ]
    assert messages(flow, "go")[:2] == [
        "Step 'beside' uses the result of step 'one', whose success does not lead to it",
        "Step 'joined' uses its own result, which is not there before it has run",
    ]


@st.composite
def branches(draw):
    """Flows in which the ends of each step lead on, and expressions join them again."""
    steps, joins = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    plain = 2 + 2 * steps  # two from outside, and the ends of each step
    event = st.integers(0, plain + joins - 1)
    assocs = []
    for index in range(steps):
        causes = st.integers(0, 1 + 2 * index) | event
        assocs += [
            (cause, "step", index, 0) for cause in draw(st.lists(causes, min_size=1, max_size=2))
        ]
    return Case(
        exprs=[None] * plain + [draw(expressions(plain + join)) for join in range(joins)],
        triggers=[
            {
                "at_success": [2 + 2 * step],
                "at_failure": [3 + 2 * step],
                draw(st.sampled_from(TRANSITIONS[:2])): draw(st.lists(event, max_size=1)),
            }
            for step in range(steps)
        ],
        policies=[{}] * steps,
        fails=[False] * steps,
        assocs=assocs,
        calls=[(0, 1)],
        limit=1,
        seed=0,
        configs=[{}] * steps,
        stumbles=[0] * steps,
        within=[[]] * steps,
        needs=[[]] * steps,
    )


def test_a_result_that_comes_round_a_circle_is_not_missed(needs):
    flow = Flow(Config())
    one = step(flow, "one", flow.add_event("go"))
    two = step(flow, "two", one.success)
    flow.add_assoc(two.success, one)
    step(flow, "three", one.success)
    needs |= {"one": ("two",), "two": ("one",), "three": ("two",)}
    assert found(flow, "go") == []


def outcomes(case, known):
    """Return what can be raised, whichever steps fail, if those events are triggered."""
    raised = set()
    for fails in itertools.product([False, True], repeat=len(case.fails)):
        this = dataclasses.replace(
            case,
            fails=fails,
            calls=[(e, 1) for e in known],
            left={},
            within=[[]] * len(case.fails),  # of which a flow does not tell
        )
        raised |= {event for event, _sequence in model(this)[0]}
    return raised


def without_cause(case):
    """Return the events that nothing raises."""
    given = {target for _, kind, target, _ in case.assocs if kind == "event"}
    given.update(e for triggers in case.triggers for events in triggers.values() for e in events)
    return {e for e, expr in enumerate(case.exprs) if expr is None and e not in given}


@pytest.mark.no_cover
@pytest.mark.once
@settings(max_examples=150)
@given(cases() | branches())
def test_what_is_said_to_be_impossible_never_comes_whatever_is_triggered_and_fails(case):
    flow = build(case)
    triggered = {event for event, sequence in case.calls if sequence == 2}
    outside = without_cause(case)
    result = findings(flow, {f"e{event}" for event in triggered})
    raised = outcomes(case, triggered | outside)
    impossible = {
        finding.name
        for finding in result
        if finding.kind in CANNOT_COME and int(finding.name[1:]) not in outside
    }
    assert not impossible & {f"e{event}" for event in raised}
    if not result:  # all comes that leads to something, but for what needs both ends of a step
        ends = [not {"at_success", "at_failure"} <= set(triggers) for triggers in case.triggers]
        never = set(range(len(case.exprs))) - raised
        assert not never or not all(ends)


@pytest.mark.no_cover
@pytest.mark.once
@settings(max_examples=60)
@given(cases(), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6))
def test_a_result_is_missed_if_no_path_leads_from_its_step_to_its_user(case, pairs):
    used = {}
    for user, needed in pairs:
        if max(user, needed) < len(case.fails):
            used.setdefault(f"s{user}", []).append(f"s{needed}")
    flow = build(case)
    after = {}
    for name, event in flow.events.items():
        after[event] = set(flow.expressed.get(name, ()))
        for targets in (flow.associated.get(name, {}), *flow.delayed.get(name, {}).values()):
            after[event].update(targets)
    for one in flow.steps.values():
        after[one] = set().union(*one.triggers.values())

    def leads(one, user):
        reached, agenda = set(), [*one.triggers.get("at_success", ())]
        agenda += one.triggers.get("at_complete", ())
        while agenda:
            if (thing := agenda.pop()) not in reached:
                reached.add(thing)
                agenda += after.get(thing, ())
        return user in reached

    missed = {
        (user, needed)
        for user, all_needed in used.items()
        for needed in all_needed
        if user == needed or not leads(flow.steps[needed], flow.steps[user])
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "needs", told_by(used), raising=False)
        result = [f for f in findings(flow, set()) if f.kind is FindingKind.unavailable_result]
    assert len(result) == len(missed)
    assert {finding.name for finding in result} == {user for user, _ in missed}
    assert all(any(repr(n) in f.message for _, n in missed) for f in result if "own" not in str(f))


def test_ev_logs_what_is_found_once(make, caplog):
    ev = make()
    go = ev.add_event("go")
    alone = ev.add_step("alone", func=int)
    ev.add_assoc(go, ev.add_step("s", func=int))
    assert [(f.kind, f.name) for f in ev.check()] == [
        (evr.FindingKind.unreachable_step, "alone"),
        (evr.FindingKind.unraised_event, "go"),
    ]
    ev.trigger_event(go)
    assert [finding.name for finding in ev.check()] == ["alone"]
    caplog.set_level(logging.WARNING, "eventor")
    for _ in range(2):
        assert ev() is True
        assert caplog.messages == ["No event leads to step 'alone', so it never runs"]
    ev.add_assoc(go, alone)
    assert ev.check() == []
    # What a step has raised is not triggered.
    ev.add_event("both", expr=(alone.success, alone.failure))
    ev.trigger_event(go)
    assert ev() is True
    assert [finding.name for finding in ev.check()] == ["both"]


def test_what_an_earlier_recovery_was_triggered_with_counts(make):
    def program(mode):
        ev = make(run_mode=mode)
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", func=int))
        return ev, go

    ev, go = program(evr.RunMode.restart)
    ev.trigger_event(go)
    ev()
    assert ev.check() == []
    ev.close()
    ev, _ = program(evr.RunMode.recover)
    assert ev.check() == []
    ev()
    assert ev.check() == []


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (25, "5 more warnings of this kind are in ev.check()"),
        (21, "1 more warning of this kind is in ev.check()"),
    ],
)
def test_of_many_findings_some_are_logged(make, caplog, steps, told):
    ev = make()
    for number in range(steps):
        ev.add_step(f"s{number}", func=int)
    ev()
    assert len(caplog.messages) == 21
    assert caplog.messages[-1] == told


def test_a_flow_that_runs_or_is_closed_cannot_be_checked(make):
    ev = make(config={"task_construct": threading.Thread})
    go, running, done = ev.add_event("go"), threading.Event(), threading.Event()

    def wait():
        running.set()
        done.wait(30)

    ev.add_assoc(go, ev.add_step("s", func=wait))
    ev.trigger_event(go)
    thread = threading.Thread(target=ev)
    thread.start()
    wait_until(running.is_set)
    with pytest.raises(evr.UsageError, match="is running"):
        ev.check()
    done.set()
    thread.join(30)
    ev.close()
    with pytest.raises(evr.UsageError, match="is closed"):
        ev.check()


def test_flows_of_any_depth_and_width_are_checked(needs):
    flow, size = Flow(Config()), 3000
    go = flow.add_event("go")
    last = go
    for number in range(size):
        one = step(flow, f"s{number}", last, at_failure=flow.add_event(f"f{number}"))
        needs[one.name] = (f"s{number - 1}", "s0") if number else ()
        last = flow.add_event(f"e{number}", expr=(one.success, go))
    wide = [step(flow, f"w{number}", last) for number in range(size)]
    joined = flow.add_event("joined", expr=tuple(one.success for one in wide))
    for number, one in enumerate(wide):
        needs[step(flow, f"after {number}", joined).name] = (one.name, "s1")
    tree = go
    for _ in range(size):
        tree = evr.or_((tree, joined), go)
    flow.add_event("deep", expr=tree)
    assert found(flow, "go") == []
    flow.add_event("split", expr=(joined, flow.events["f7"]))
    assert found(flow, "go") == [("impossible_expression", "split")]


def test_an_event_that_a_step_or_another_program_raises_is_not_warned_of(make, caplog):
    caplog.set_level(logging.WARNING, "eventor")
    ev = make()
    go, within, never = (ev.add_event(name) for name in ("go", "within", "never"))
    ev.add_assoc(go, ev.add_step("trigger", func=lambda: evr.current().trigger("within")))
    ev.add_assoc(within, ev.add_step("s", func=int))
    ev.add_assoc(never, ev.add_step("t", func=int))
    ev.trigger_event(go)
    assert [finding.name for finding in ev.check()] == ["within", "never"]
    assert ev() is True
    (told,) = caplog.messages
    assert told.startswith("Nothing has raised event 'never', and nothing in the flow does")
