"""Every row of the interface, through the public names."""

import inspect
import logging
import multiprocessing
import re
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import eventor as evr
from eventor.rules.config import Config
from eventor.storage.location import locate
from tests.conftest import statuses, wait_until

EXAMPLES = Path(__file__).parent.parent / "examples"

OUTPUT = """\
Eventor store file: :memory: ][ main.__init__
Running step s1[1] ][ main.task_wrapper
Step completed s1[1], status: success, result 'prog1' ][ main.task_wrapper
Running step s2[1] ][ main.task_wrapper
Step completed s2[1], status: success, result 'prog2' ][ main.task_wrapper
Running step s3[1] ][ main.task_wrapper
Step completed s3[1], status: success, result 'prog3' ][ main.task_wrapper
Processing finished ][ main.loop_session_start
"""


def test_the_simple_example_prints_its_eight_messages(script):
    ran = script((EXAMPLES / "simple_example.py").read_text())
    assert ran.returncode == 0
    assert ran.stdout == ""
    lines = ran.stderr.splitlines()
    form = r"\[ \d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \]\[ INFO \]\[ (.*) \]"
    assert [re.fullmatch(form, line).group(1) for line in lines] == OUTPUT.splitlines()


def test_the_signatures_are_those_of_the_interface():
    def defaults(function):
        parameters = list(inspect.signature(function).parameters.values())[1:]
        empty = inspect.Parameter.empty
        return {p.name: None if p.default is empty else p.default for p in parameters}

    assert defaults(evr.Eventor.__init__) == {
        "name": "",
        "store": "",
        "run_mode": evr.RunMode.restart,
        "recovery_run": None,
        "logging_level": logging.INFO,
        "config": {},
    }
    assert defaults(evr.Eventor.add_event) == {"name": None, "expr": None}
    assert defaults(evr.Eventor.add_step) == {
        "name": None,
        "func": None,
        "args": (),
        "kwargs": {},
        "triggers": {},
        "recovery": {},
        "config": {},
    }
    assert list(defaults(evr.Eventor.add_assoc)) == ["event", "assocs", "delay"]
    assert defaults(evr.Eventor.add_assoc)["delay"] == 0
    assert defaults(evr.Eventor.trigger_event) == {"event": None, "sequence": None}


def test_the_defaults_of_the_config_are_those_of_the_interface():
    config = Config()
    assert (config.workdir, config.logdir) == ("/tmp", "/tmp")
    assert issubclass(config.task_construct, multiprocessing.process.BaseProcess)
    assert config.max_concurrent == 1
    assert config.stop_on_exception is True
    assert config.sleep_between_loops == 1


@pytest.mark.stores("either")
def test_args_and_kwargs_reach_the_function(make):
    ev = make()
    go = ev.add_event("go")
    step = ev.add_step("s", func=lambda *a, **k: (a, k), args=(1, "x"), kwargs={"y": [2]})
    ev.add_assoc(go, step)
    ev.trigger_event(go)
    assert ev() is True
    assert ev.tasks(step)[0].result == ((1, "x"), {"y": [2]})


def test_and_or_expressions_nest(make):
    ev = make()
    a, b, c = (ev.add_event(name) for name in "abc")
    both = ev.add_event("both", expr=(a, b))
    nested = ev.add_event("nested", expr=evr.or_((a, b, c), [both, evr.or_(c, a)]))
    operators = ev.add_event("operators", expr=(a | b) & evr.and_(b, c))
    alone = ev.add_event("alone", expr=c)
    ev.trigger_event(a, 1)
    ev.trigger_event(b, 1)
    ev.trigger_event(c, 2)
    ev()
    raised = {(record.event, record.sequence) for record in ev.events()}
    assert {(both.name, 1), (nested.name, 1), (alone.name, 2)} <= raised
    assert operators.name not in {event for event, _ in raised}


def test_an_expression_of_great_depth_holds(make):
    ev = make()
    a, b = ev.add_event("a"), ev.add_event("b")
    tree = a
    for _ in range(5000):
        tree = evr.or_((tree, b), b)
    deep = ev.add_event("deep", expr=tree)
    ev.trigger_event(b)
    ev()
    assert [record.event for record in ev.events(deep)] == ["deep"]


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (False, {"at_ready", "at_active", "at_success", "at_complete"}),
        (True, {"at_ready", "at_active", "at_failure", "at_complete"}),
    ],
)
def test_each_transition_raises_its_events(make, fails, expected):
    ev = make()
    go = ev.add_event("go")
    triggers = {trigger: ev.add_event(trigger.value) for trigger in evr.StepTriggers}
    step = ev.add_step("s", func=lambda: 1 / (not fails), triggers=triggers)
    ev.add_assoc(go, step)
    ev.trigger_event(go, "x")
    assert ev() is True
    raised = {record.event: record for record in ev.events(sequence="x")}
    assert set(raised) == expected | {"go"}
    assert str(raised["at_complete"].cause) == "status s at_complete"


def test_a_trigger_takes_several_events_of_any_iterable(make):
    ev = make()
    go, one, two = (ev.add_event(name) for name in ("go", "one", "two"))
    step = ev.add_step("s", func=int, triggers={evr.StepTriggers.at_success: {one, two}})
    ev.add_assoc(go, step)
    ev.trigger_event(go)
    ev()
    assert len(ev.events()) == 3


def test_an_association_leads_to_events_and_steps(make):
    ev = make()
    go, then = ev.add_event("go"), ev.add_event("then")
    first, second = ev.add_step("first", func=int), ev.add_step("second", func=int)
    ev.add_assoc(go, first, then)
    ev.add_assoc(then, second, go, first)
    ev.trigger_event(go)
    ev()
    assert statuses(ev) == {"first[1]": "success", "second[1]": "success"}
    assert str(ev.events(then)[0].cause) == "association go"
    assert str(ev.tasks(second)[0].cause) == "association then"


def test_a_task_runs_once_per_sequence_whatever_leads_to_it(make, tmp_path):
    ev = make()
    a, b = ev.add_event("a"), ev.add_event("b")

    def write():
        with (tmp_path / "ran").open("a") as file:
            file.write("x")

    ev.add_assoc(a, ev.add_step("s", func=write))
    ev.add_assoc(b, ev._flow.steps["s"])
    for event in (a, b, a):
        ev.trigger_event(event, 1)
    ev.trigger_event(a, "1")
    ev()
    assert (tmp_path / "ran").read_text() == "xx"
    assert [(task.sequence) for task in ev.tasks()] == [1, "1"]


def test_sequences_are_counted_from_one_and_skip_what_is_used(make):
    ev = make()
    go = ev.add_event("go")
    given = [ev.trigger_event(go, sequence) for sequence in (None, 2, None, "4", None, -7)]
    assert given == [1, 2, 3, "4", 4, -7]
    assert [record.sequence for record in ev.events(go)] == given


def test_a_trigger_is_seen_before_the_call_and_acts_on_what_is_defined_after_it(make):
    ev = make()
    go = ev.add_event("go")
    ev.trigger_event(go, 1)
    assert [str(record.cause) for record in ev.events()] == ["call"]
    assert ev.tasks() == []
    ev.add_assoc(go, ev.add_step("s", func=int))
    ev.add_event("derived", expr=go)
    assert ev()
    assert statuses(ev) == {"s[1]": "success"}
    assert len(ev.events("derived")) == 1


def test_calling_again_goes_on_in_the_same_run(make):
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=int))
    assert ev() is True
    ev.trigger_event(go)
    assert ev() is True
    ev.trigger_event(go)
    ev.add_assoc(go, ev.add_step("late", func=int))
    assert ev() is True
    assert list(statuses(ev)) == ["s[1]", "s[2]", "late[2]"]
    assert (ev.run_id, ev.recovery) == (1, 0)


def test_records_say_what_happened(make):
    before = datetime.now(UTC)
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=dict, kwargs={"a": 1}))
    ev.trigger_event(go)
    ev()
    (task,) = ev.tasks("s", 1, evr.TaskStatus.success)
    assert (task.step, task.sequence, task.recovery, task.attempt) == ("s", 1, 0, 1)
    assert task.replay is task.error is task.traceback is None
    assert task.result == {"a": 1}
    assert task.pid > 0
    assert before <= task.ready_at <= task.started_at <= task.ended_at <= datetime.now(UTC)
    assert task.ended_at.utcoffset() == timedelta(0)
    (event,) = ev.events(go, 1)
    assert (event.event, event.sequence, event.recovery) == ("go", 1, 0)
    assert event.raised_at.tzinfo is not None
    with pytest.raises(AttributeError):
        task.status = "x"
    assert ev.tasks(status="failure") == ev.tasks(sequence="1") == ev.events(sequence=2) == []


def test_an_unhandled_failure_stops_what_has_not_started(make):
    ev = make()
    go = ev.add_event("go")
    for name, func in (("a", int), ("bad", lambda: 1 / 0), ("c", int)):
        ev.add_assoc(go, ev.add_step(name, func=func))
    ev.trigger_event(go)
    assert ev() is False
    assert statuses(ev) == {"a[1]": "success", "bad[1]": "failure", "c[1]": "ready"}
    assert ev() is False
    assert statuses(ev)["c[1]"] == "success"


def test_what_runs_beside_an_unhandled_failure_is_let_finish(make, place):
    ev = make(config={"max_concurrent": 2})
    go, after = ev.add_event("go"), ev.add_event("after")

    def failure_is_recorded():
        query = "SELECT count(*) FROM eventor_task WHERE status = 'failure'"
        return place.sql(query) == [(1,)]

    last = ev.add_step(
        "last", func=wait_until, args=(failure_is_recorded,), triggers={"at_success": after}
    )
    ev.add_assoc(go, last, ev.add_step("bad", func=lambda: 1 / 0))
    ev.add_assoc(after, ev.add_step("never", func=int))
    ev.trigger_event(go)
    assert ev() is False
    assert statuses(ev) == {"last[1]": "success", "bad[1]": "failure", "never[1]": "ready"}


@pytest.mark.stores("either")
@pytest.mark.parametrize(
    ("whole", "own", "goes_on"),
    [(True, None, False), (False, None, True), (True, False, True), (False, True, False)],
)
def test_stop_on_exception_of_the_step_outweighs_that_of_the_eventor(make, whole, own, goes_on):
    ev = make(config={"stop_on_exception": whole})
    go = ev.add_event("go")
    config = {} if own is None else {"stop_on_exception": own}
    ev.add_assoc(go, ev.add_step("bad", func=lambda: 1 / 0, config=config))
    ev.add_assoc(go, ev.add_step("next", func=int))
    ev.trigger_event(go)
    assert ev() is False
    assert statuses(ev)["next[1]"] == ("success" if goes_on else "ready")


@pytest.mark.parametrize("trigger", [evr.StepTriggers.at_failure, evr.StepTriggers.at_complete])
def test_a_handled_failure_lets_the_flow_go_on(make, trigger):
    ev = make()
    go, mend = ev.add_event("go"), ev.add_event("mend")
    ev.add_assoc(go, ev.add_step("bad", func=lambda: 1 / 0, triggers={trigger: mend}))
    ev.add_assoc(go, ev.add_step("next", func=int))
    ev.add_assoc(mend, ev.add_step("mender", func=int))
    ev.trigger_event(go)
    assert ev() is True
    assert statuses(ev) == {"bad[1]": "failure", "next[1]": "success", "mender[1]": "success"}


@pytest.mark.stores("either")
@pytest.mark.parametrize(("limit", "most"), [(1, 1), (3, 3), (0, 6), (-1, 6)])
def test_max_concurrent_limits_the_steps_in_flight(make, limit, most):
    ev = make(config={"max_concurrent": limit})
    go = ev.add_event("go")
    running, peak = multiprocessing.Value("i", 0), multiprocessing.Value("i", 0)
    gate = multiprocessing.Barrier(most)

    def step():
        with running.get_lock():
            running.value += 1
            peak.value = max(peak.value, running.value)
        gate.wait(30)
        with running.get_lock():
            running.value -= 1

    for number in range(6):
        ev.add_assoc(go, ev.add_step(f"s{number}", func=step))
    ev.trigger_event(go)
    assert ev() is True
    assert peak.value == most
    assert [task.step for task in ev.tasks()] == [f"s{number}" for number in range(6)]


def test_an_eventor_is_closed_by_its_context_and_twice(make, place):
    ev = make()
    with ev as same:
        assert same is ev
        assert str(locate(place.store)) in repr(ev)
    ev.close()
    with pytest.raises(evr.UsageError, match="closed"):
        ev.add_event("x")


def test_two_eventors_share_a_program_and_a_store(make):
    one, two = make(name="one"), make(name="two")
    for ev in (one, two):
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", func=str, args=(ev.run_id,)))
        ev.trigger_event(go)
    assert two() is one() is True
    assert (one.tasks()[0].result, two.tasks()[0].result) == ("1", "2")


def test_the_store_is_named_after_the_calling_script(script, tmp_path):
    code = "import eventor\nwith eventor.Eventor(config={'logdir': '.'}) as ev: print(ev.run_id)"
    assert script(code).stdout == "1\n"
    assert (tmp_path / "program.db").exists()
    assert script(code).stdout == "2\n"


@pytest.mark.stores("sqlite")
def test_an_url_and_a_path_name_the_same_store(make, tmp_path):
    make(store=str(tmp_path / "x.db")).close()
    assert make(store=f"sqlite:///{tmp_path}/x.db").run_id == 2
    assert make(store="sqlite://").run_id == 1


def test_many_sequences_are_triggered_in_one_transaction(make, place):
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=int))
    assert ev.trigger_event(go, 2) == 2
    assert ev.trigger_events(go, (number for number in (1, 2, "1", 5))) == [1, 2, "1", 5]
    # They are recorded, and what was triggered before them.
    recorded = place.sql("SELECT sequence FROM eventor_event ORDER BY event_id")
    assert recorded == [("2",), ("1",), ("1",), ("5",)]
    assert ev.trigger_event(go) == 3
    assert ev.trigger_events(go, []) == []
    assert ev() is True
    assert {task.sequence for task in ev.tasks()} == {1, 2, 3, "1", 5}


@pytest.mark.stores("either")
def test_sequences_of_which_one_is_wrong_trigger_nothing(make):
    ev = make()
    go = ev.add_event("go")
    for wrong, told in (
        ([1, 2.5], "the sequence is 2.5"),
        ([1, None], "the sequence is None"),
        ("12", "the sequences are '12'; expected an iterable"),
        (b"12", "the sequences are b'12'; expected an iterable"),
        (3, "the sequences are 3; expected an iterable"),
    ):
        with pytest.raises(evr.TriggerError, match=told):
            ev.trigger_events(go, wrong)
    with pytest.raises(evr.DefinitionError, match="the event to trigger"):
        ev.trigger_events("go", [1])
    assert ev.events() == []
    assert ev.trigger_event(go) == 1


def test_many_sequences_are_triggered_while_a_flow_runs(make, tmp_path, place):
    ev = make(config={"max_concurrent": 2})
    go, more = ev.add_event("go"), ev.add_event("more")
    ev.add_assoc(go, ev.add_step("waits", func=lambda: wait_until((tmp_path / "told").exists)))
    ev.add_assoc(more, ev.add_step("s", func=int))
    ev.trigger_event(go)

    def trigger():
        query = "SELECT count(*) FROM eventor_task WHERE status = 'active'"
        wait_until(lambda: place.sql(query) == [(1,)])
        ev.trigger_events(more, range(20))
        (tmp_path / "told").touch()

    thread = threading.Thread(target=trigger)
    thread.start()
    with pytest.warns(RuntimeWarning, match="beside 1 other thread"):
        assert ev() is True
    thread.join()
    assert len(ev.tasks("s", status="success")) == 20
