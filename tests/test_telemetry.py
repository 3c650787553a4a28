"""Runs as traces of OpenTelemetry."""

import signal
import sys
import threading

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

import eventor as evr
from eventor.telemetry import OpenTelemetry, _nanoseconds

pytestmark = pytest.mark.stores("either")


class Traced:
    """What an exporter was given; spans by their names, of which each is there once."""

    def __init__(self):
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = provider.get_tracer("test")
        self.hook = OpenTelemetry(self.tracer)

    @property
    def spans(self):
        return {span.name: span for span in self.exporter.get_finished_spans()}

    def links(self, name):
        """Return the names of the spans to which one links."""
        by_id = {span.context.span_id: span.name for span in self.spans.values()}
        return [by_id[link.context.span_id] for link in self.spans[name].links]

    def parent(self, name):
        by_id = {span.context.span_id: span.name for span in self.spans.values()}
        parent = self.spans[name].parent
        return None if parent is None else by_id[parent.span_id]


@pytest.fixture
def traced():
    return Traced()


def boom():
    raise ValueError("no: not so")


def test_a_run_is_a_trace_of_its_tasks_and_attempts_with_their_times(make, traced):
    ev = make(name="flow", config={"on_transition": traced.hook})
    a = ev.add_step("a", int)
    go = ev.add_event("go")
    ev.add_assoc(go, a)
    ev.trigger_event(go, "x")
    assert ev() is True

    assert list(traced.spans) == ["attempt a", "step a", "run"]
    assert [traced.parent(name) for name in traced.spans] == ["step a", "run", None]
    assert len({span.context.trace_id for span in traced.spans.values()}) == 1
    assert {span.status.status_code for span in traced.spans.values()} == {StatusCode.UNSET}
    (task,) = ev.tasks()
    times = {name: (span.start_time, span.end_time) for name, span in traced.spans.items()}
    ended = _nanoseconds(task.ended_at)
    assert times["step a"] == (_nanoseconds(task.ready_at), ended)
    assert times["attempt a"] == (_nanoseconds(task.started_at), ended)
    assert times["run"][0] <= times["step a"][0] <= ended <= times["run"][1]
    of_run = {"eventor.run_id": 1, "eventor.recovery": 0, "eventor.run_name": "flow"}
    of_task = {"eventor.step": "a", "eventor.sequence": "x"}
    assert dict(traced.spans["run"].attributes) == {**of_run, "eventor.succeeded": True}
    assert dict(traced.spans["step a"].attributes) == {
        **of_run,
        **of_task,
        "eventor.cause": "association go",
        "eventor.status": "success",
    }
    assert dict(traced.spans["attempt a"].attributes) == {
        **of_task,
        "eventor.attempt": 1,
        "process.pid": task.pid,
    }


def test_times_are_exact_to_the_microsecond(make, traced):
    ev = make(config={"on_transition": traced.hook})
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("a", int))
    ev.trigger_event(go)
    ev()
    (task,) = ev.tasks()
    start = traced.spans["attempt a"].start_time
    assert start % 1_000_000_000 == task.started_at.microsecond * 1000
    assert start // 1_000_000_000 == int(task.started_at.timestamp())


def test_a_failure_is_an_error_of_its_attempt_its_task_and_the_run(make, traced):
    ev = make(config={"on_transition": traced.hook})
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("a", boom))
    ev.trigger_event(go)
    assert ev() is False
    for name in ("attempt a", "step a"):
        status = traced.spans[name].status
        assert (status.status_code, status.description) == (
            StatusCode.ERROR,
            "ValueError: no: not so",
        )
        assert traced.spans[name].attributes["error.type"] == "ValueError"
    (event,) = traced.spans["attempt a"].events
    (task,) = ev.tasks()
    assert event.name == "exception"
    assert dict(event.attributes) == {
        "exception.type": "ValueError",
        "exception.message": "no: not so",
        "exception.stacktrace": task.traceback,
    }
    assert event.timestamp == traced.spans["attempt a"].end_time
    assert traced.spans["run"].status.description == "1 tasks failed"


def test_a_death_by_signal_is_an_error_without_an_exception(make, traced):
    ev = make(config={"on_transition": traced.hook})
    go = ev.add_event("go")
    step = ev.add_step("a", lambda: signal.raise_signal(signal.SIGKILL))
    ev.add_assoc(go, step)
    ev.add_assoc(step.failure, ev.add_step("b", int))
    ev.trigger_event(go)
    assert ev() is True
    span = traced.spans["attempt a"]
    assert span.events == ()
    assert span.status.description == "killed by SIGKILL"
    assert span.attributes["error.type"] == "_OTHER"
    assert traced.spans["run"].status.status_code is StatusCode.UNSET  # it was handled


def test_each_attempt_has_its_span_and_its_task_one(make, traced):
    ev = make(config={"on_transition": traced.hook})
    go = ev.add_event("go")
    config = {"max_attempts": 2, "retry_delay": 0.01}

    def second():
        if evr.current().attempt == 1:
            boom()

    ev.add_assoc(go, ev.add_step("a", second, config=config))
    ev.trigger_event(go)
    assert ev() is True
    first, again, task, _run = traced.exporter.get_finished_spans()
    assert [first.name, again.name, task.name] == ["attempt a", "attempt a", "step a"]
    assert [span.attributes["eventor.attempt"] for span in (first, again)] == [1, 2]
    codes = [span.status.status_code for span in (first, again, task)]
    assert codes == [StatusCode.ERROR, StatusCode.UNSET, StatusCode.UNSET]
    assert task.start_time <= first.start_time < first.end_time < again.start_time
    assert again.end_time == task.end_time


def test_a_task_links_to_the_tasks_that_have_led_to_it(make, traced):
    ev = make(config={"on_transition": traced.hook})
    go, inner, other, named = (ev.add_event(name) for name in ("go", "inner", "other", "named"))

    def trigger():
        evr.current().trigger(inner)
        evr.current().trigger(other, "7")

    a = ev.add_step("a", trigger, triggers={"at_success": named})
    ev.add_assoc(go, a)
    ev.add_assoc(inner, ev.add_step("by step", int))
    ev.add_assoc(other, ev.add_step("by step of another sequence", int))
    ev.add_assoc(named, ev.add_event("chained"))
    chained = ev.add_event("joined", expr=(named, ev._flow.events["chained"]))
    ev.add_assoc(chained, ev.add_step("by expression", int))
    ev.add_assoc(named, ev.add_step("by status", int))
    ev.add_assoc(a.ready, ev.add_step("by ready", int))
    ev.add_assoc(a.active, ev.add_step("by active", int))
    ev.trigger_event(go, 1)
    assert ev() is True
    assert ev.tasks("by step of another sequence")[0].cause.source == "other"
    linked = {name: traced.links(name) for name in traced.spans if name.startswith("step")}
    assert linked.pop("step a") == []
    assert linked.pop("step by ready") == []  # it was ready before a had begun
    assert set(map(tuple, linked.values())) == {("step a",)}
    assert len(linked) == 5


def test_what_is_raised_when_a_task_is_ready_links_to_what_has_led_to_that(make, traced):
    ev = make(config={"on_transition": traced.hook})
    a, b, c = (ev.add_step(name, int) for name in "abc")
    go = ev.add_event("go")
    ev.add_assoc(go, a)
    ev.add_assoc(a.success, b)
    ev.add_assoc(b.ready, c)
    ev.trigger_event(go)
    assert ev() is True
    assert traced.links("step c") == ["step a"]


def test_a_skipped_task_has_a_span_without_an_attempt(make, traced):
    def define(**arguments):
        ev = make(**arguments)
        a, b = ev.add_step("a", int), ev.add_step("b", boom)
        go = ev.add_event("go")
        ev.add_assoc(go, a)
        ev.add_assoc(a.success, b)
        return ev, go

    ev, go = define()
    ev.trigger_event(go)
    ev()
    ev.close()
    ev, _go = define(run_mode=evr.RunMode.recover, config={"on_transition": traced.hook})
    ev()
    assert traced.spans["step a"].attributes["eventor.status"] == "skipped"
    assert traced.spans["step a"].start_time == traced.spans["step a"].end_time
    assert "attempt a" not in traced.spans
    assert traced.links("step b") == ["step a"]
    assert traced.spans["run"].attributes["eventor.recovery"] == 1


def test_the_spans_of_what_is_cut_short_end_with_the_run(make, traced):
    def on_transition(transition):
        if transition.kind is evr.TransitionKind.task_active:
            raise SystemExit

    ev = make(config={"on_transition": [traced.hook, on_transition]})
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("a", signal.pause))
    ev.trigger_event(go)
    with pytest.raises(SystemExit):
        ev()
    assert list(traced.spans) == ["attempt a", "step a", "run"]
    described = {name: span.status.description for name, span in traced.spans.items()}
    assert described["step a"] == "it had not ended when the run did"
    assert described["run"] == "SystemExit"


def test_a_task_that_a_paused_run_has_left_ready_is_in_the_trace_of_the_next_call(make, traced):
    ev = make(config={"on_transition": traced.hook})
    a, b = ev.add_step("a", int), ev.add_step("b", int)
    go = ev.add_event("go")
    ev.add_assoc(go, a)
    ev.add_assoc(a.success, b)
    ev.trigger_event(go)
    assert ev.run(max_loops=1) is False
    assert "step b" not in traced.spans
    assert traced.spans["run"].status.status_code is StatusCode.UNSET
    assert ev() is True
    first, second = [one for one in traced.exporter.get_finished_spans() if one.name == "run"]
    assert traced.spans["step b"].parent.span_id == second.context.span_id
    (link,) = traced.spans["step b"].links
    assert link.context.trace_id == first.context.trace_id


def test_the_run_is_part_of_the_trace_in_which_it_is_called(make, traced):
    ev = make(config={"on_transition": traced.hook})
    with traced.tracer.start_as_current_span("program"):
        ev()
        assert trace.get_current_span().is_recording()
    assert traced.parent("run") == "program"


def test_without_a_tracer_it_is_that_of_the_programs_provider(make):
    ev = make(config={"on_transition": OpenTelemetry(), "task_construct": threading.Thread})
    assert ev() is True


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(evr.ConfigError, match=r"pip install 'eventor\[telemetry\]'"):
        OpenTelemetry()


def test_eventor_imports_nothing_of_it(script):
    ran = script("import sys, eventor, eventor.telemetry; print('opentelemetry' in sys.modules)")
    assert ran.stdout == "False\n"
