"""The views of the store, which other tools read by plain SQL."""

import contextlib
import math
import sqlite3
import time

import pytest

import eventor as evr


def look(path, view):
    """Return the rows of a view as another program would read them."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {view}")]


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


def test_a_task_is_a_row_with_names_causes_and_durations(flow, tmp_path):
    ev, go = flow()
    ev.trigger_event(go, "monday")
    assert ev() is False
    rows = look(tmp_path / "flow.db", "eventor_v_task")
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


def test_a_recovery_is_a_row_with_its_counts(flow, tmp_path):
    """From begin to end, the end of a recovery that is live or has crashed being unknown."""
    ev, go = flow()
    ev.trigger_event(go)
    (live,) = look(tmp_path / "flow.db", "eventor_v_run")
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
    first, second = look(tmp_path / "flow.db", "eventor_v_run")
    counts = ("ready", "active", "success", "failure", "skipped")
    assert [first[name] for name in counts] == [1, 0, 1, 1, 0]
    assert [second[name] for name in counts] == [0, 0, 1, 1, 1]
    assert second["based_on"] == 0
    assert first["owner"] is second["owner"] is None
    assert first["seconds"] > 0.05
    assert math.isfinite(second["seconds"])


def test_a_run_that_is_continued_has_no_end_until_it_ends_again(make, tmp_path):
    make().close()
    assert look(tmp_path / "flow.db", "eventor_v_run")[0]["ended_at"] is not None
    ev = make(run_mode=evr.RunMode.continue_)
    assert look(tmp_path / "flow.db", "eventor_v_run")[0]["ended_at"] is None
    ev.close()
    assert look(tmp_path / "flow.db", "eventor_v_run")[0]["ended_at"] is not None


def test_columns_of_the_views_stay(make, tmp_path):
    """They are promised in docs/howto/sql.rst; a later version may add some at the end."""
    make().close()
    with contextlib.closing(sqlite3.connect(tmp_path / "flow.db")) as connection:
        task, run = (
            [name for _, name, *_ in connection.execute(f"PRAGMA table_info({view})")]
            for view in ("eventor_v_task", "eventor_v_run")
        )
    assert task == [
        *("run", "run_id", "recovery", "step", "sequence", "status", "replay", "attempt"),
        *("ready_at", "started_at", "ended_at", "waited_seconds", "seconds", "due_at", "pid"),
        *("error", "traceback", "stdout", "stderr", "cause", "sequence_type", "task_id"),
    ]
    assert run == [
        *("run", "run_id", "recovery", "program", "began_at", "ended_at", "seconds"),
        *("ready", "active", "success", "failure", "skipped", "based_on", "owner"),
    ]
