"""`RunMode.continue_` and `run(max_loops)`: a flow that is advanced a little at a time."""

import pytest

import eventor as evr
from tests.conftest import statuses, wait_until


def chain(make, length=4, **arguments):
    ev = make(run_mode=evr.RunMode.continue_, **arguments)
    events = [ev.add_event(f"e{number}") for number in range(length)]
    for number, event in enumerate(events):
        triggers = {"at_success": events[number + 1]} if number + 1 < length else {}
        ev.add_assoc(event, ev.add_step(f"s{number}", int, triggers=triggers))
    ev.trigger_event(events[0], 1)
    return ev


def test_a_flow_goes_on_where_it_stands_in_the_same_recovery(make, place):
    for number in range(1, 5):
        ev = chain(make)
        assert (ev.run_id, ev.recovery) == (1, 0)
        assert ev.run(max_loops=1) is (number == 4)
        expected = {f"s{done}[1]": "success" for done in range(number)}
        if number < 4:
            expected[f"s{number}[1]"] = "ready"
        assert statuses(ev) == expected
        ev.close()
    ev = chain(make)
    assert ev() is True
    assert [task.attempt for task in ev.tasks()] == [1, 1, 1, 1]
    ev.close()
    assert place.sql("SELECT count(*) FROM eventor_recovery") == [(1,)]


def test_what_runs_is_let_finish(make, debug_log):
    ev = make(config={"max_concurrent": 2})
    go = ev.add_event("go")
    ev.add_assoc(go, *(ev.add_step(f"s{number}", int) for number in range(5)))
    ev.trigger_event(go)
    assert ev.run(max_loops=1) is False
    assert list(statuses(ev).values()) == ["success"] * 2 + ["ready"] * 3
    assert "Paused by max_loops: 3 tasks stay ready for the next call" in debug_log()
    assert ev.run(max_loops=9) is True
    assert ev() is True


def test_failed_tasks_stay_failed(make, tmp_path):
    def build():
        ev = make(run_mode="continue", config={"stop_on_exception": False})
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("bad", (tmp_path / "made").mkdir), ev.add_step("good", int))
        ev.trigger_event(go, 1)
        return ev

    (tmp_path / "made").touch()
    ev = build()
    assert ev() is False
    ev.close()
    (tmp_path / "made").unlink()
    ev = build()
    assert ev() is False
    assert statuses(ev) == {"bad[1]": "failure", "good[1]": "success"}
    assert not (tmp_path / "made").exists()


CRASH = """
    import os, sys, time
    import eventor as evr

    ev = evr.Eventor(store=os.environ["STORE"], run_mode=sys.argv[1], config={"logdir": "."})
    go, done = ev.add_event("go"), ev.add_event("done")
    recovery = {"active": sys.argv[2]}

    def hold():
        with open("held", "a") as file:
            file.write("!")
        time.sleep(60 if sys.argv[1] == "restart" else 0)

    triggers = {"at_success": done}
    ev.add_assoc(go, ev.add_step("hold", hold, triggers=triggers, recovery=recovery))
    ev.add_assoc(done, ev.add_step("last", int))
    ev.trigger_event(go, 1)
    skips = [task.step for task in ev.preview().skips]
    done = ev()
    print(done, [(t.step, str(t.status), f"{t.replay}", t.attempt) for t in ev.tasks()], skips)
"""


@pytest.mark.parametrize(
    ("policy", "held", "told"),
    [
        ("rerun", "!!", "[('hold', 'success', 'rerun', 2), ('last', 'success', 'None', 1)] []"),
        ("skip", "!", "[('hold', 'success', 'skip', 1), ('last', 'success', 'None', 1)] ['hold']"),
    ],
)
def test_what_a_dead_owner_left_active_follows_its_policy(
    start, place, tmp_path, policy, held, told
):
    owner = start(CRASH, "restart", policy, STORE=place.store)
    wait_until(lambda: (tmp_path / "held").exists() and (tmp_path / "held").read_text() == "!")
    refused = start(CRASH, "continue", policy, STORE=place.store).communicate(timeout=30)[1]
    assert "OwnershipError: run 1 is owned by process" in refused
    owner.kill()
    owner.wait()
    assert (
        start(CRASH, "continue", policy, STORE=place.store).communicate(timeout=30)[0]
        == f"True {told}\n"
    )
    assert (tmp_path / "held").read_text() == held


def test_a_continued_recovery_replays_what_those_before_it_left(make):
    ev = chain(make)
    assert ev.run(max_loops=2) is False
    ev.close()
    ev = make(run_mode="recover")
    ev.close()
    ev = chain(make)
    assert (ev.run_id, ev.recovery) == (1, 1)
    assert ev() is True
    assert [task.replay for task in ev.tasks()] == ["skip", "skip", "rerun", None]


def test_without_a_run_one_begins(make):
    ev = chain(make, store=":memory:")
    assert (ev.run_id, ev.recovery, ev()) == (1, 0, True)


def test_a_trigger_that_was_recorded_and_not_followed_is_followed(make):
    ev = chain(make)
    ev.close()
    ev = make(run_mode="continue")
    event = ev.add_event("e0")
    ev.add_assoc(event, ev.add_step("s0", int))
    assert ev() is True
    assert statuses(ev) == {"s0[1]": "success"}


def test_an_owner_that_was_replaced_records_nothing_more(make, place):
    """Also where the same recovery goes on: the claim tells, not the number."""
    ev = chain(make)
    assert ev.run(max_loops=1) is False
    far = "UPDATE eventor_recovery SET owner_began = 'far 1 1'"
    place.sql(far, "UPDATE eventor_recovery SET heartbeat_at = '2020-01-01'")
    other = chain(make)
    with pytest.raises(evr.OwnershipError, match="is not owned by this Eventor any more"):
        ev()
    ev.close()
    assert other() is True
    owned = "SELECT owner_pid IS NOT NULL FROM eventor_recovery"
    assert place.sql(owned) == [(1,)]


@pytest.mark.stores("either")
@pytest.mark.parametrize("loops", [0, -1, 1.0, "1", True])
def test_bad_loops_are_named(make, loops):
    ev = make()
    with pytest.raises(evr.ConfigError, match=f"max_loops is {loops!r}; expected a whole number"):
        ev.run(max_loops=loops)


def test_a_recovery_run_cannot_be_chosen(make):
    with pytest.raises(evr.RecoveryError, match="recovery_run is 0, which needs"):
        make(run_mode="continue", recovery_run=0)


def test_what_an_interrupted_task_leads_to_later_counts_from_now(make, place):
    def build(**arguments):
        ev = make(run_mode="continue", **arguments)
        go = ev.add_event("go")
        step = ev.add_step("s", int, recovery={"active": "skip"})
        ev.add_assoc(go, step)
        ev.add_assoc(step.success, ev.add_step("late", int), delay=3600)
        ev.trigger_event(go, 1)
        return ev

    ev = build()
    assert ev.run(max_loops=1) is False
    ev.close()
    undo = "UPDATE eventor_task SET status = 'active', ended_at = NULL"
    place.sql(undo, "DELETE FROM eventor_delay")
    place.sql("DELETE FROM eventor_event WHERE event = 's.success'")
    ev = build()
    ev.stop()
    assert ev() is False
    assert [task.ended_at is None for task in ev.tasks()] == [False]
    ((due,),) = place.sql("SELECT due_at > CURRENT_TIMESTAMP FROM eventor_delay")
    assert due


def test_what_follows_from_an_event_waits_until_it_is_defined(make):
    """Of a recovery that is continued, as of triggers that a program notes."""

    def program(*, cut):
        ev = make(run_mode="continue")
        one = ev.add_event("one")
        ev.add_assoc(one, ev.add_step("s", int))
        ev.trigger_event(one, 1)
        assert ev() is True
        two = ev.add_event("two")
        ev.add_assoc(two, ev.add_step("t", int))
        ev.trigger_event(two, 1)
        if cut:
            assert [event.event for event in ev.events()] == ["one", "two"]  # and so recorded
        else:
            assert ev() is True
        done = statuses(ev)
        ev.close()
        return done

    assert program(cut=True) == {"s[1]": "success"}
    assert program(cut=False) == {"s[1]": "success", "t[1]": "success"}


@pytest.mark.stores("sqlite")
def test_of_two_that_begin_at_once_one_has_the_run(make, monkeypatch):
    """To a SQLite file one writes at a time: the other waits, and is told so if that is long."""
    from eventor.storage import ledger

    others = []
    latest_run = ledger.latest_run

    def meanwhile(name):
        if not others:
            others.append(name)
            with pytest.raises(evr.StoreError, match="locked"):
                make(run_mode="continue")
        return latest_run(name)

    monkeypatch.setattr("eventor.storage.sqlite.BUSY_SECONDS", 0.1)
    monkeypatch.setattr(ledger, "latest_run", meanwhile)
    ev = make(run_mode="continue")
    assert (others, ev.run_id) == ([""], 1)


def test_a_task_whose_step_is_gone_is_named_and_is_not_done(make, caplog):
    def program(*names, loops):
        with make(run_mode="continue") as ev:
            go = ev.add_event("go")
            for name in names:
                ev.add_assoc(go, ev.add_step(name, int))
            ev.trigger_event(go, 1)
            return ev.run(max_loops=loops), statuses(ev)

    assert program("x", "y", loops=1)[0] is False
    told = (False, {"x[1]": "success", "y[1]": "ready"})
    assert program("x", loops=None) == told
    assert "y[1] was left ready, and step y is no longer defined" in caplog.text
    assert program("x", "y", loops=None) == (True, {"x[1]": "success", "y[1]": "success"})


def test_a_handled_failure_stays_handled(make):
    for _ in range(2):
        with make(run_mode="continue") as ev:
            go = ev.add_event("go")
            step = ev.add_step("s", divmod, args=(1, 0))
            ev.add_assoc(go, step)
            ev.add_assoc(step.failure, ev.add_step("tell", int))
            ev.trigger_event(go, 1)
            assert ev() is True


def test_a_preview_tells_that_a_ready_task_waits_on(make):
    ev = make()
    go = ev.add_event("go")
    steps = [ev.add_step(name, int, recovery={"ready": "skip"}) for name in ("a", "b")]
    ev.add_assoc(go, *steps)
    ev.trigger_event(go, 1)
    assert ev.run(max_loops=1) is False
    ev.close()
    ev = make(run_mode="continue")
    for name in ("a", "b"):
        ev.add_step(name, int, recovery={"ready": "skip"})
    (planned,) = ev.preview().runs
    assert (str(planned), planned.replay) == ("b[1] (was ready)", None)
    assert ev() is True


def test_an_association_that_has_acted_is_not_due_any_more(make):
    def build():
        ev = make(run_mode="continue")
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("late", int), delay=0.05)
        ev.trigger_event(go, 1)
        return ev

    with build() as ev:
        assert ev() is True
    with build() as ev:
        ev.stop()
        assert ev() is True
