"""Delayed associations: they act some time after the event, and that time survives a crash."""

from datetime import UTC, datetime, timedelta

import pytest

import eventor as evr
from tests.conftest import statuses, wait_until


def delayed(make, seconds, **arguments):
    ev = make(**arguments)
    go, late = ev.add_event("go"), ev.add_event("late")
    ev.add_assoc(go, ev.add_step("now", int))
    ev.add_assoc(go, late, ev.add_step("then", int), delay=seconds)
    ev.add_assoc(late, ev.add_step("after", int))
    return ev, go


def test_an_association_acts_its_delay_after_the_event(make):
    ev, go = delayed(make, 0.3)
    ev.trigger_event(go, 1)
    assert ev() is True
    assert statuses(ev) == {"now[1]": "success", "then[1]": "success", "after[1]": "success"}
    raised = {event.event: event for event in ev.events()}
    assert raised["late"].raised_at - raised["go"].raised_at >= timedelta(seconds=0.3)
    assert str(raised["late"].cause) == "association go after 0.3 s"
    then = ev.tasks("then")[0]
    assert then.ready_at - raised["go"].raised_at >= timedelta(seconds=0.3)
    assert str(then.cause) == "association go after 0.3 s"


def test_a_delay_counts_from_the_trigger_and_not_from_the_call(make, place):
    ev, go = delayed(make, 3600)
    ev.trigger_event(go, 1)
    (raised,) = ev.events()
    ev.stop()
    assert ev() is False
    assert place.sql("SELECT event, sequence, seconds FROM eventor_delay") == [("go", "1", 3600.0)]
    ((due,),) = place.sql("SELECT due_at FROM eventor_delay")
    assert str(due).startswith(str(raised.raised_at + timedelta(hours=1))[:19])


def test_a_stop_leaves_what_is_due_later_for_a_recovery(make, place, debug_log):
    ev, go = delayed(make, 3600)
    ev.trigger_event(go, 1)
    assert ev.run(max_loops=1) is False
    assert "Paused by max_loops: 1 delayed association stays due for the next call" in debug_log()
    ev.close()
    for mode in ("recover", "continue"):
        # What is due does not begin anew: its time is that of the first recovery.
        ev, go = delayed(make, 3600, run_mode=mode)
        assert [str(task) for task in ev.preview().runs] == ["then[1]", "after[1]"]
        ev.stop()
        assert ev() is False
        ev.close()
    due = "SELECT DISTINCT due_at FROM eventor_delay"
    assert len(place.sql(due)) == 1
    past = f"'{datetime.now(UTC) - timedelta(seconds=1):%F %T.%f}'"
    place.sql(f"UPDATE eventor_delay SET due_at = {past}")
    ev, go = delayed(make, 3600, run_mode="continue")
    assert ev() is True
    assert statuses(ev) == {"now[1]": "success", "then[1]": "success", "after[1]": "success"}


def test_a_crash_while_it_waits_loses_nothing(start, tmp_path, place):
    code = """
        import os, sys
        import eventor as evr

        ev = evr.Eventor(store=os.environ["STORE"], run_mode=sys.argv[1], config={"logdir": "."})
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("now", int))
        ev.add_assoc(go, ev.add_step("then", int), delay=3600)
        ev.trigger_event(go, 1)
        print(ev(), [(t.step, str(t.status), t.replay and str(t.replay)) for t in ev.tasks()])
    """
    owner = start(code, "restart", STORE=place.store)
    wait_until(place.exists)
    query = "SELECT count(*) FROM eventor_task WHERE status = 'success'"
    wait_until(lambda: place.sql(query) == [(1,)])
    owner.kill()
    owner.wait()
    # What is left of the hour is a moment, as if the crash had come at its end.
    soon = f"'{datetime.now(UTC) + timedelta(seconds=1.5):%F %T.%f}'"
    place.sql(f"UPDATE eventor_delay SET due_at = {soon}")
    ((due,),) = place.sql("SELECT due_at FROM eventor_delay")
    told, _ = start(code, "recover", STORE=place.store).communicate(timeout=60)
    assert told == "True [('now', 'success', 'skip'), ('then', 'success', None)]\n"
    query = "SELECT ready_at FROM eventor_task WHERE step = 'then'"
    ((ready,),) = place.sql(query)
    assert ready >= due


@pytest.mark.parametrize("delay", [-1, "1", None, True, 1e12, float("nan"), float("inf")])
def test_a_bad_delay_is_named(make, delay):
    ev = make()
    go = ev.add_event("go")
    words = (
        rf"the delay of an association of event 'go' is {delay!r}; "
        "expected a number of seconds from 0 to 1,000,000,000$"
    )
    with pytest.raises(evr.DefinitionError, match=words.replace("+", r"\+")):
        ev.add_assoc(go, ev.add_step("s", int), delay=delay)
    assert not ev._flow.delayed
    assert not ev._flow.associated


def test_a_changed_delay_is_a_change_of_the_flow(make):
    ev, go = delayed(make, 0.1)
    ev.trigger_event(go, 1)
    assert ev() is True
    ev.close()
    ev, go = delayed(make, 0.2, run_mode="recover")
    assert ev.preview().drift == (
        "new association go -> event late after 0.2 s",
        "new association go -> step then after 0.2 s",
        "missing association go -> event late after 0.1 s",
        "missing association go -> step then after 0.1 s",
    )


def test_it_is_on_time_however_long_the_loop_may_sleep(make):
    """With a sleep of an hour, it would be an hour late."""
    ev, go = delayed(make, 0.3, config={"sleep_between_loops": 3600, "lease_seconds": 100_000})
    ev.trigger_event(go, 1)
    assert ev() is True
    raised = {event.event: event.raised_at for event in ev.events()}
    assert raised["late"] - raised["go"] < timedelta(seconds=60)
