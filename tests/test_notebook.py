"""What a notebook is given: records that go straight into a table."""

import pandas as pd
import pytest

import eventor as evr


@pytest.fixture
def ran(make):
    ev = make(config={"stop_on_exception": False})
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("well", int), ev.add_step("ill", lambda: 1 / 0))
    ev.trigger_event(go)
    ev.trigger_event(go, "monday")
    assert ev() is False
    return ev


def test_tasks_are_rows_of_a_table(ran):
    tasks = pd.DataFrame(ran.tasks())
    assert tasks.step.tolist() == ["well", "ill"] * 2
    assert tasks.sequence.tolist() == [1, 1, "monday", "monday"]
    assert tasks[tasks.status == evr.TaskStatus.failure].step.unique().tolist() == ["ill"]
    assert tasks[tasks.status == "failure"].error.str.startswith("ZeroDivisionError").all()
    seconds = (tasks.ended_at - tasks.started_at).dt.total_seconds()
    assert seconds.between(0, 60).all()


def test_events_are_rows_of_a_table(ran):
    events = pd.DataFrame(ran.events())
    assert events.groupby("event").sequence.count().to_dict() == {"go": 2}
    assert str(events.raised_at.dt.tz) == "UTC"
