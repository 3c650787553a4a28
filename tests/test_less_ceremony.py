"""Events of a step's own, and functions that are made steps where they are defined."""

import asyncio
import copy
import dataclasses
import doctest
import functools
import inspect
import multiprocessing
import pickle
import pydoc
import threading
import types

import pytest

import eventor as evr
from eventor.rules.config import Config
from eventor.rules.flow import Flow
from eventor.rules.plan import Plan, TaskActive, TaskEnded, Trigger
from eventor.types import Cause, CauseKind, Outcome
from tests.conftest import statuses
from tests.test_rules import NOW

pytestmark = pytest.mark.stores("either")

WORDS = ("ready", "active", "success", "failure", "complete")


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (False, {"s.ready", "s.active", "s.success", "s.complete"}),
        (True, {"s.ready", "s.active", "s.failure", "s.complete"}),
    ],
)
def test_the_events_of_a_step_are_raised_beside_those_that_were_declared(make, fails, expected):
    ev = make()
    go, declared = ev.add_event("go"), ev.add_event("declared")
    step = ev.add_step("s", func=lambda: 1 / (not fails), triggers={"at_complete": declared})
    ev.add_assoc(go, step)
    events = [getattr(step, word) for word in WORDS]
    assert [getattr(step, word) for word in WORDS] == events
    ev.trigger_event(go, "x")
    assert ev() is True
    raised = {record.event: str(record.cause) for record in ev.events(sequence="x")}
    assert set(raised) == expected | {"go", "declared"}
    assert raised["s.complete"] == "status s at_complete"


def test_the_events_of_a_step_stand_wherever_an_event_may(make):
    ev = make()
    one, two, three = (ev.add_step(name, func=int) for name in ("one", "two", "three"))
    four = ev.add_step("four", func=int, triggers={evr.StepTriggers.at_ready: three.success})
    ev.add_assoc(one.success, two, four)
    ev.add_assoc(ev.add_event("both", expr=(one.success, two.success | two.failure)), three)
    ev.trigger_event(one.success, 7)
    assert ev() is True
    assert statuses(ev) == {"two[7]": "success", "four[7]": "success", "three[7]": "success"}
    assert len(ev.events(three.success, 7)) == 1


@pytest.mark.parametrize("word", ["failure", "complete"])
def test_who_uses_the_event_of_a_failure_has_it_handled(make, word):
    ev = make()
    go = ev.add_event("go")
    fails, after = ev.add_step("fails", func=lambda: 1 / 0), ev.add_step("after", func=int)
    ev.add_assoc(go, fails)
    ev.add_assoc(getattr(fails, word), after)
    ev.trigger_event(go, 1)
    assert ev() is True
    assert statuses(ev) == {"fails[1]": "failure", "after[1]": "success"}


def test_the_name_of_an_own_event_may_not_be_taken(make):
    ev = make()
    ev.add_event("s.success")
    step = ev.add_step("s", func=int)
    with pytest.raises(evr.DefinitionError, match="the program has defined an event of that name"):
        _ = step.success
    assert step.triggers == {}
    assert step.ready.name == "s.ready"
    with pytest.raises(evr.DefinitionError, match=r"there is an event 's\.ready' already"):
        ev.add_event("s.ready")


def test_an_own_event_made_while_its_task_runs_is_raised_at_its_end():
    flow = Flow(Config())
    go = flow.add_event("go")
    step = flow.add_step("s", int, (), {}, {}, {}, {})
    flow.add_assoc(go, step)
    plan = Plan(flow, {}, 1, stop_on_exception=True)
    active = plan.advance([Trigger("go", 1, Cause(CauseKind.call))], NOW)[-1]
    assert isinstance(active, TaskActive)
    flow.add_assoc(step.success, flow.add_step("t", int, (), {}, {}, {}, {}))
    ended = plan.advance([TaskEnded(active.task, Outcome(evr.TaskStatus.success, ""))], NOW)
    assert ended[-1] == TaskActive(("t", 1), 1)
    assert plan.about_to_start == 0  # which the event that came late has not put out of balance


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_tasks_per_child": None},
        {"task_construct": threading.Thread},
    ],
)
def test_a_decorated_function_is_a_step_and_can_be_called_as_before(make, config):
    ev = make(config=config)
    go = ev.add_event("go")

    @ev.step(after=go)
    def first(number: int = 1) -> int:
        return number + 1

    @ev.step(after=first.success, args=(2,), name="renamed", triggers={"at_ready": go})
    def second(number):
        return first(number) * 10

    @ev.step(after=(first.success, evr.or_(second.success, second.failure)))
    def third():
        return "end"

    @ev.step()
    def fourth():
        """Nothing leads to it."""

    assert first(4) == 5
    assert list(inspect.signature(first).parameters) == ["number"]
    assert isinstance(first, evr.Step)
    ev.trigger_event(go, 1)
    assert ev() is True
    results = {task.step: task.result for task in ev.tasks()}
    assert results == {"first": 2, "renamed": 30, "third": "end"}
    (led,) = ev.tasks("third")
    assert str(led.cause) == "association third.after"


def test_a_step_is_described_as_its_function(make):
    ev = make()

    @ev.step(name="another")
    def documented(number: int = 1) -> int:
        """Return the next.

        >>> documented(4)
        5
        """
        return number + 1

    @ev.step()
    async def undocumented():
        return 3

    for word in functools.WRAPPER_ASSIGNMENTS:
        assert getattr(documented, word) == getattr(documented.func, word)
    assert undocumented.__doc__ is None
    assert (documented.name, documented.__name__) == ("another", "documented")
    assert "Return the next." in pydoc.render_doc(documented, renderer=pydoc.plaintext)
    module = types.SimpleNamespace(__name__=__name__, documented=documented)
    tests = doctest.DocTestFinder(recurse=False).find(documented, "documented", module, {}, {})
    assert [len(test.examples) for test in tests] == [1]
    for is_kind in (inspect.iscoroutinefunction, asyncio.iscoroutinefunction):
        assert is_kind(undocumented)
        assert not is_kind(documented)
    assert asyncio.run(undocumented()) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        documented.__name__ = "else"


def test_the_class_of_steps_is_described_as_itself(make):
    step = make().add_step("s", copy.copy)
    assert evr.Step.__doc__.startswith("A step, as `Eventor.add_step` returns it")
    assert (evr.Step.__module__, evr.Step.__qualname__) == ("eventor.rules.flow", "Step")
    assert pickle.loads(pickle.dumps(evr.Step)) is evr.Step
    for copied in (copy.copy(step), copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        assert (copied.__name__, copied.func, copied.name) == ("copy", copy.copy, "s")
        assert copied.__doc__ == copy.copy.__doc__


def test_a_step_has_no_name_that_its_function_has_not(make):
    ev = make()
    for name, func in [("partial", functools.partial(int, "3")), ("object", Adds())]:
        step = ev.add_step(name, func)
        for word in ("__name__", "__qualname__"):
            with pytest.raises(AttributeError, match=word):
                getattr(step, word)
        assert step.__doc__ == func.__doc__
        assert step() == 3
        assert not inspect.iscoroutinefunction(step)


class Adds:
    """Can be called."""

    def __call__(self):
        return 3


def test_a_function_is_made_a_step_without_its_name_for_processes_that_look_for_that(make):
    ev = make(config={"task_construct": multiprocessing.get_context("spawn").Process})
    go = ev.add_event("go")
    step = ev.step(after=go, args=("x",))(inspect.cleandoc)
    ev.trigger_event(go)
    assert ev() is True
    assert [task.result for task in ev.tasks(step)] == ["x"]


def test_a_step_can_be_the_function_of_another(make):
    ev = make()
    go = ev.add_event("go")

    @ev.step(after=go, name="once")
    @ev.step(after=go, name="twice")
    def work():
        return 3

    ev.add_assoc(go, ev.add_step("thrice", func=work))
    ev.trigger_event(go)
    assert ev() is True
    assert [(task.step, task.result) for task in ev.tasks()] == [
        ("twice", 3),
        ("once", 3),
        ("thrice", 3),
    ]


def test_an_error_leaves_nothing_defined(make):
    ev, other = make(), make(name="other")
    go, foreign = ev.add_event("go"), other.add_event("go")
    ev.add_event("work.after")

    def work():
        """Do nothing."""

    def refused(match, *arguments, func=work, **keywords):
        with pytest.raises(evr.EventorError, match=match):
            ev.step(*arguments, **keywords)(func)
        assert list(ev._flow.events) == ["go", "work.after"]
        assert not ev._flow.steps
        assert not ev._flow.associated

    refused("of another Eventor", after=foreign)
    refused("of another Eventor", after=(go, foreign))
    refused("write `@ev.step\\(\\)`", work)
    refused("is no part of an expression", after="go")
    refused("an event 'work.after' already", after=(go, go))
    refused("has no key 'colour'", after=(go, go), name="w", config={"colour": 1})
    refused("has no status 'at_end'", after=go, triggers={"at_end": go})
    refused("needs a `name`", after=go, func=3)
    refused("expected a callable", after=go, func=3, name="three")
    refused("expected a str", after=(go, go), name=3)
    step = ev.add_step("s", func=int)
    with pytest.raises(evr.DefinitionError, match="such as the `success` of a step"):
        ev.step(after=step)
    with pytest.raises(evr.DefinitionError, match="such as its `success`"):
        ev.add_assoc(step, step)
    assert step.triggers == {}


def test_what_is_defined_while_the_flow_runs_is_recorded_with_it(make):
    ev = make(config={"task_construct": threading.Thread})
    go = ev.add_event("go")

    @ev.step(after=go)
    def grow():
        ev.add_assoc(grow.success, ev.add_step("late", func=int))

    ev.trigger_event(go, 1)
    assert ev() is True
    assert statuses(ev) == {"grow[1]": "success", "late[1]": "success"}
    ev.close()
    definition = make(run_mode=evr.RunMode.recover)._ledger.definition_before()
    assert [event["name"] for event in definition["events"]] == ["go", "grow.success"]
    assert [step["name"] for step in definition["steps"]] == ["grow", "late"]


def test_a_recovery_of_a_flow_with_own_events_knows_it(make):
    def program(mode):
        ev = make(run_mode=mode, config={"strict_recovery": True})
        go = ev.add_event("go")

        @ev.step(after=go)
        def first():
            return 1

        @ev.step(after=(first.success, go), triggers={"at_success": first.failure})
        def second():
            return 1 / (mode is evr.RunMode.recover)

        if mode is evr.RunMode.restart:
            ev.trigger_event(go, 1)
        well = ev()
        tasks = {task.step: (task.status, task.replay) for task in ev.tasks()}
        ev.close()
        return well, tasks

    assert program(evr.RunMode.restart) == (
        False,
        {"first": ("success", None), "second": ("failure", None)},
    )
    assert program(evr.RunMode.recover) == (
        True,
        {"first": ("success", "skip"), "second": ("success", "rerun")},
    )
