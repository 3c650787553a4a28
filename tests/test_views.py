"""The views of the store, which other tools read by plain SQL."""

import math
import time

import pytest

import eventor as evr

TASK = (
    *("run", "run_id", "recovery", "step", "sequence", "status", "replay", "attempt"),
    *("ready_at", "started_at", "ended_at", "waited_seconds", "seconds", "due_at", "pid"),
    *("error", "traceback", "stdout", "stderr", "cause", "sequence_type", "task_id"),
)
RUN = (
    *("run", "run_id", "recovery", "program", "began_at", "ended_at", "seconds"),
    *("ready", "active", "success", "failure", "skipped", "based_on", "owner"),
)
"""The columns that docs/howto/sql.rst promises; a later version may add some at the end."""


def tasks(place):
    """Return the rows of the view of tasks as another program would read them."""
    rows = place.sql("SELECT * FROM eventor_v_task ORDER BY task_id")
    return [dict(zip(TASK, row, strict=True)) for row in rows]


def recoveries(place):
    """Return the rows of the view of recoveries as another program would read them."""
    rows = place.sql("SELECT * FROM eventor_v_run ORDER BY run_id, recovery")
    return [dict(zip(RUN, row, strict=True)) for row in rows]


@pytest.fixture
def flow(make):
    def build(**arguments):
        ev = make(name="daily", **arguments)
        go = ev.add_event("go")
        well = ev.add_step("well", time.sleep, (0.05,))
        ill = ev.add_step("ill", lambda: 1 / 0)
        ev.add_assoc(go, well, ill)
        never = ev.add_step("never", int)
        ev.add_assoc(go, never)
        return ev, go

    return build


def seconds(later, earlier):
    return pytest.approx((later - earlier).total_seconds(), abs=0.001)


def test_a_task_is_a_row_with_names_causes_and_durations(flow, place):
    ev, go = flow()
    ev.trigger_event(go, "monday")
    assert ev() is False
    rows = tasks(place)
    assert [(row["run"], row["run_id"], row["recovery"]) for row in rows] == [("daily", 1, 0)] * 3
    assert [(row["step"], row["sequence"], row["status"], row["attempt"]) for row in rows] == [
        ("well", "monday", "success", 1),
        ("ill", "monday", "failure", 1),
        ("never", "monday", "ready", 0),
    ]
    for row, task in zip(rows[:2], ev.tasks()[:2], strict=True):
        assert row["waited_seconds"] == seconds(task.started_at, task.ready_at)
        assert row["seconds"] == seconds(task.ended_at, task.started_at)
    assert rows[0]["seconds"] >= 0.05
    assert rows[1]["error"] == "ZeroDivisionError: division by zero"
    assert rows[2]["waited_seconds"] is rows[2]["seconds"] is None
    assert {row["cause"] for row in rows} == {"association go"}


def test_a_recovery_is_a_row_with_its_counts(flow, place):
    """From begin to end, the end of a recovery that is live or has crashed being unknown."""
    ev, go = flow()
    ev.trigger_event(go)
    (live,) = recoveries(place)
    assert (live["run"], live["run_id"], live["recovery"], live["based_on"]) == (
        "daily",
        1,
        0,
        None,
    )
    assert live["program"].endswith("conftest.py")
    assert live["owner"].endswith(f":{ev._pid}")
    assert live["ended_at"] is live["seconds"] is None
    assert ev() is False
    ev.close()
    ev, _go = flow(run_mode="recover", config={"stop_on_exception": False})
    assert ev() is False
    ev.close()
    first, second = recoveries(place)
    counts = ("ready", "active", "success", "failure", "skipped")
    assert [first[name] for name in counts] == [1, 0, 1, 1, 0]
    assert [second[name] for name in counts] == [0, 0, 1, 1, 1]
    assert second["based_on"] == 0
    assert first["owner"] is second["owner"] is None
    assert first["seconds"] > 0.05
    assert math.isfinite(second["seconds"])


def test_a_run_that_is_continued_has_no_end_until_it_ends_again(make, place):
    make().close()
    assert recoveries(place)[0]["ended_at"] is not None
    ev = make(run_mode=evr.RunMode.continue_)
    assert recoveries(place)[0]["ended_at"] is None
    ev.close()
    assert recoveries(place)[0]["ended_at"] is not None


@pytest.mark.parametrize(("view", "columns"), [("eventor_v_task", TASK), ("eventor_v_run", RUN)])
def test_columns_of_the_views_stay(make, place, view, columns):
    make().close()
    assert place.columns(view) == list(columns)
