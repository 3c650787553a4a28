"""Retries: a failed task is tried again, and each attempt is on record."""

import multiprocessing
import os
import signal
import threading
from datetime import UTC, datetime, timedelta

import pytest

import eventor as evr
from tests.conftest import on_sqlite, statuses, wait_until


@pytest.fixture
def flaky(tmp_path):
    """Return a function that fails as often as it is told, whatever process it runs in."""
    count = tmp_path / "count"

    def run(times, fail=lambda: int("x")):
        with count.open("a") as file:
            file.write("!")
        return "done" if len(count.read_text()) > times else fail()

    run.count = lambda: len(count.read_text()) if count.exists() else 0
    return run


def one_step(make, func, *args, config, eventor_config=None, **arguments):
    """Make a flow of one step, with events at its ends, and trigger it."""
    ev = make(config=eventor_config, **arguments)
    go, good, bad = (ev.add_event(name) for name in ("go", "good", "bad"))
    triggers = {"at_success": good, "at_failure": bad}
    ev.add_assoc(go, ev.add_step("s", func, args=args, triggers=triggers, config=config))
    if not arguments:
        ev.trigger_event(go, 1)
    return ev


@pytest.mark.parametrize("most", [1, None])
def test_a_task_is_tried_until_it_ends_well(make, flaky, debug_log, most):
    config = {"max_attempts": 3}
    ev = one_step(make, flaky, 2, config=config, eventor_config={"max_tasks_per_child": most})
    assert ev() is True
    (task,) = ev.tasks()
    assert (task.status, task.attempt, task.result, task.error) == ("success", 3, "done", None)
    assert [attempt.number for attempt in task.attempts] == [1, 2, 3]
    assert [attempt.status for attempt in task.attempts] == ["failure", "failure", "success"]
    first, second, third = task.attempts
    assert first.error == second.error == "ValueError: invalid literal for int() with base 10: 'x'"
    assert "flaky" in first.traceback or "run" in first.traceback
    assert (first.pid, third.pid) != (None, None)
    assert first.started_at <= first.ended_at <= second.started_at <= third.started_at
    assert (third.started_at, third.ended_at) == (task.started_at, task.ended_at)
    assert [event.event for event in ev.events()] == ["go", "good"]
    log = debug_log()
    assert "Step s[1] failed in attempt 1 of 3, and is tried again at once: ValueError" in log
    assert log.count("Step completed s[1]") == 1


def test_a_failure_counts_when_the_last_attempt_has_failed(make, flaky):
    ev = one_step(make, flaky, 9, config={"max_attempts": 2})
    assert ev() is True  # its at_failure trigger handles it
    (task,) = ev.tasks()
    assert (task.status, task.attempt, len(task.attempts)) == ("failure", 2, 2)
    assert [event.event for event in ev.events()] == ["go", "bad"]
    assert flaky.count() == 2


def test_an_attempt_that_is_not_the_last_does_not_stop_the_flow(make, flaky):
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", flaky, args=(1,), config={"max_attempts": 2}))
    ev.add_assoc(go, ev.add_step("other", int))
    ev.trigger_event(go, 1)
    assert ev() is True
    assert statuses(ev) == {"s[1]": "success", "other[1]": "success"}


def test_a_delay_does_not_hold_a_slot_and_grows(make, flaky):
    config = {"max_attempts": 3, "retry_delay": 0.05, "retry_backoff": 3}
    ev = one_step(make, flaky, 2, config=config)
    ev.add_assoc(ev._flow.events["go"], ev.add_step("other", int))
    assert ev() is True
    task, other = ev.tasks()
    first, second, third = task.attempts
    assert (second.started_at - first.ended_at).total_seconds() >= 0.05
    assert (third.started_at - second.ended_at).total_seconds() >= 0.15
    # With one slot, and ready after it, the other has run in the delay.
    assert other.ended_at <= second.started_at


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.stores("either")
@pytest.mark.parametrize(
    ("fail", "retry_on", "attempts"),
    [
        (lambda: {}["x"], (KeyError, OSError), 3),
        (lambda: {}["x"], LookupError, 3),
        (lambda: {}["x"], OSError, 1),
        (lambda: {}["x"], [], 1),
        (lambda: {}["x"], None, 3),
        (die, None, 3),
        (die, Exception, 1),
        (lambda: os._exit(3), None, 3),
        (lambda: os._exit(3), (Exception,), 1),
    ],
)
def test_what_is_tried_again(make, flaky, fail, retry_on, attempts):
    config = {"max_attempts": 3, "retry_on": retry_on}
    ev = one_step(make, flaky, 9, fail, config=config)
    ev()
    assert flaky.count() == attempts
    assert ev.tasks()[0].attempt == attempts


@pytest.mark.stores("either")
@pytest.mark.parametrize("retry_on", [None, Exception])
@pytest.mark.parametrize("lacking", ["missing", "not unpicklable", "not picklable"])
def test_what_cannot_be_called_is_never_tried_again(make, lacking, retry_on):
    """Neither without a result that it takes, nor if it cannot be sent to its process."""
    spawn = multiprocessing.get_context("spawn").Process
    ev = make(config={"task_construct": spawn, "stop_on_exception": False})
    go = ev.add_event("go")
    earlier = ev.add_step("earlier", {"missing": divmod}.get(lacking, Tied), args=(1, 0))
    argument = threading.Lock() if lacking == "not picklable" else earlier.result
    config = {"max_attempts": 3, "retry_on": retry_on}
    ev.add_assoc(go, earlier)
    ev.add_assoc(earlier.complete, ev.add_step("s", print, args=(argument,), config=config))
    ev.trigger_event(go)
    ev()
    (task,) = ev.tasks("s")
    assert (task.status, task.attempt, len(task.attempts)) == ("failure", 1, 1)


class Tied:
    """Is pickled, and cannot be unpickled."""

    def __init__(self, *_):
        pass

    def __reduce__(self):
        return int, ("x",)


FLAKY = """
    import os, sys
    import eventor as evr

    def slow():
        with open("count", "a") as file:
            file.write("!")
        count = len(open("count").read())
        if count in (1, 3):
            raise ValueError("no")
        if count == 2:
            open("ready", "w").close()
            while True:
                __import__("time").sleep(60)

    config = {"logdir": "."}
    ev = evr.Eventor(store=os.environ["STORE"], run_mode=sys.argv[1], config=config)
    go = ev.add_event("go")
    retries = {"max_attempts": int(sys.argv[2])}
    ev.add_assoc(go, ev.add_step("s", slow, config=retries))
    ev.trigger_event(go, 1)
    print(ev())
    print([(a.number, str(a.status), a.error) for a in ev.tasks()[0].attempts])
"""


@pytest.mark.parametrize("mode", ["recover", "continue"])
@pytest.mark.parametrize("most", [*on_sqlite(2, 3), 4])
def test_after_a_crash_the_attempts_that_were_spent_count(start, place, tmp_path, mode, most):
    """The second is killed with its owner; the third fails, the fourth would end well.

    Where the crash took the last, one more is granted: the policy says that it is to run.
    """
    owner = start(FLAKY, "restart", str(most), STORE=place.store)
    wait_until((tmp_path / "ready").exists)
    owner.kill()
    owner.wait()
    told, _ = start(FLAKY, mode, str(most), STORE=place.store).communicate(timeout=60)
    third = [
        (1, "failure", "ValueError: no"),
        (2, "active", None),
        (3, "failure", "ValueError: no"),
    ]
    if most == 4:
        assert told == f"True\n{[*third, (4, 'success', None)]}\n"
    else:
        assert told == f"False\n{third}\n"


def test_a_recovery_waits_for_what_is_left_of_a_delay(make, place, flaky):
    config = {"max_attempts": 2, "retry_delay": 3600}
    ev = one_step(make, flaky, 1, config=config)
    assert ev.run(max_loops=1) is False
    (task,) = ev.tasks()
    assert (task.status, task.attempt, task.started_at, task.pid) == ("ready", 1, None, None)
    assert (task.due_at - task.attempts[0].ended_at).total_seconds() > 3500
    ev.close()
    for number in (1, 2):  # what is due does not begin anew, however often that is cut short
        ev = one_step(make, flaky, 1, config=config, run_mode="recover")
        ev.trigger_event(ev._flow.events["go"], 1)
        ev.stop()
        assert ev() is False
        assert (ev.recovery, ev.tasks()[0].due_at) == (number, task.due_at)
        assert ev.tasks()[0].attempts == task.attempts
        ev.close()
    past = datetime.now(UTC) - timedelta(seconds=1)
    place.sql(f"UPDATE eventor_task SET due_at = '{past:%F %T.%f}'")
    ev = one_step(make, flaky, 1, config=config, run_mode="recover")
    assert ev.preview().runs[0].previous == "ready"
    assert ev() is True
    (task,) = ev.tasks()
    assert (task.status, task.attempt, task.due_at) == ("success", 2, None)
    assert [attempt.status for attempt in task.attempts] == ["failure", "success"]


def test_a_failure_that_is_rerun_has_all_its_attempts_again(make, flaky):
    ev = one_step(make, flaky, 4, config={"max_attempts": 3})
    ev()
    ev.close()
    ev = one_step(make, flaky, 4, config={"max_attempts": 3}, run_mode="recover")
    assert ev() is True
    (task,) = ev.tasks()
    assert (task.attempt, [a.number for a in task.attempts]) == (2, [1, 2])


@pytest.mark.stores("either")
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_attempts": 0}, "max_attempts in the config of step 's' is 0; expected a whole num"),
        ({"max_attempts": True}, "max_attempts .* is True; expected a whole number, at least 1"),
        (
            {"retry_delay": -1},
            "retry_delay .* is -1; expected a number of seconds from 0 to 1,000,000,000",
        ),
        ({"retry_delay": 1e12}, "retry_delay .*; expected a number of seconds from 0 to 1,000,000"),
        ({"retry_backoff": 0}, "retry_backoff .* is 0; expected a finite number above 0"),
        ({"retry_jitter": "1"}, "retry_jitter .* is '1'; expected"),
        ({"retry_on": "OSError"}, "retry_on .* is 'OSError'; expected an exception class, a tuple"),
        ({"retry_on": (int,)}, "retry_on .* expected an exception class"),
        ({"max_retries": 3}, "has no key 'max_retries'; did you mean 'max_attempts'|known are"),
    ],
)
def test_bad_values_are_named(make, config, words):
    ev = make()
    with pytest.raises(evr.ConfigError, match=words):
        ev.add_step("s", int, config=config)
    ev.add_step("s", int)


@pytest.mark.stores("either")
def test_the_classes_reach_a_spawned_process(make):
    context = multiprocessing.get_context("spawn")
    config = {"max_attempts": 2, "retry_on": (OSError, ValueError)}
    ev = one_step(make, int, "x", config=config, eventor_config={"task_construct": context.Process})
    assert ev() is True
    assert [attempt.status for attempt in ev.tasks()[0].attempts] == ["failure", "failure"]


def test_a_result_that_is_not_there_is_not_tried_again(make):
    ev = make(config={"stop_on_exception": False})
    go = ev.add_event("go")
    bad = ev.add_step("bad", int, args=("x",))
    user = ev.add_step("user", print, args=(bad.result,), config={"max_attempts": 3})
    ev.add_assoc(go, bad, user)
    ev.trigger_event(go)
    assert ev() is False
    assert ev.tasks("user")[0].attempt == 1


def test_a_preview_takes_the_first_failure_for_the_last(make, flaky):
    ev = one_step(make, flaky, 9, config={"max_attempts": 3})
    assert len(ev.preview(failing="s").runs) == 1


def test_the_process_of_an_attempt_is_known_while_it_runs_and_after(make, tmp_path, place):
    """Its pid is recorded apart from its start where it runs for longer than a moment."""

    def wait():
        wait_until(lambda: place.sql("SELECT pid FROM eventor_task") != [(None,)])
        return os.getpid()

    ev = one_step(make, wait, config={})
    assert ev() is True
    (task,) = ev.tasks()
    assert task.pid == task.result == task.attempts[0].pid
