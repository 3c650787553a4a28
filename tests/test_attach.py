"""Triggers and requests to stop from other processes, and how long `ev()` waits for them."""

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

import eventor as evr
from eventor.loop import Loop
from eventor.requests import Requests
from eventor.storage import owner
from eventor.storage.location import locate
from tests.conftest import on_sqlite, statuses, wait_until
from tests.test_store import UNDO

FORK = multiprocessing.get_context("fork")

OWNER = """
import math, multiprocessing, os, sys, threading, time
from pathlib import Path
import eventor as evr

def note(name):
    Path(f"{name} began").touch()
    while name == "slow" and not Path("go on").exists():
        time.sleep(0.005)

KINDS = {
    "fork": {},
    "spawn": {"task_construct": multiprocessing.get_context("spawn").Process},
    "thread": {"task_construct": threading.Thread},
    "warm": {"max_tasks_per_child": None},
}

if __name__ == "__main__":
    mode, kind = sys.argv[1:]
    linger = math.inf if mode == "restart" else 0
    config = {"logdir": ".", "linger": linger, "sleep_between_loops": 0.05, "max_concurrent": 3}
    with evr.Eventor("mine", os.environ["STORE"], mode, config=config | KINDS[kind]) as ev:
        slow, quick = ev.add_event("slow"), ev.add_event("quick")
        ev.add_assoc(slow, ev.add_step("slow", note, args=("slow",)))
        ev.add_assoc(quick, ev.add_step("quick", note, args=("quick",)))
        print(ev())
"""

REQUESTS = "SELECT kind, event, sequence, sequence_type, taken_in, answer FROM eventor_request"


@pytest.fixture
def program(start, tmp_path, place):
    """Start the program above, and attach to its run."""
    with contextlib.ExitStack() as stack:

        def run(mode="restart", kind="fork"):
            process = start(OWNER, mode, kind, STORE=place.store)
            query = "SELECT count(*) > 0 FROM eventor_definition"
            wait_until(lambda: place.exists() and place.sql(query) == [(True,)])
            return process, stack.enter_context(evr.attach(place.store, "mine"))

        yield run


def flow(ev, func=int):
    """Define an event that leads to a step."""
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func))
    return go


@pytest.mark.parametrize("kind", ["fork", *on_sqlite("spawn", "thread", "warm")])
def test_a_live_run_takes_up_triggers_while_steps_run_and_while_it_waits(program, tmp_path, kind):
    process, run = program(kind=kind)
    assert run.trigger("slow", 1) is True
    wait_until((tmp_path / "slow began").exists)
    for sequence in (1, "1", 2):
        assert run.trigger("quick", sequence) is True
    wait_until(lambda: len(run.tasks("quick", status="success")) == 3)
    assert run.tasks(status="active", sequence=1)[0].step == "slow"
    (tmp_path / "go on").touch()
    wait_until(lambda: len(run.tasks(status="success")) == 4)
    assert run.stop() is True
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "True\n")
    assert [event.sequence for event in run.events("quick")] == [1, "1", 2]
    (slow,) = run.events("slow")
    here = f"{socket.gethostname()}:{os.getpid()}"
    assert slow.cause == evr.Cause(evr.CauseKind.process, detail=here)


def test_a_trigger_of_an_owner_that_is_killed_is_taken_by_its_recovery(program, place):
    process, run = program()
    os.kill(process.pid, signal.SIGSTOP)
    assert run.trigger("quick", "a") is True
    process.kill()
    process.wait()
    assert run.runs()[0].recoveries[0].owner == "dead"
    assert run.trigger("quick", "b") is False
    process, run = program("recover")
    out, _ = process.communicate(timeout=30)
    assert out == "True\n"
    assert [task.sequence for task in run.tasks(status="success")] == ["a", "b"]
    assert place.sql(REQUESTS) == [
        ("trigger", "quick", "a", "str", 1, "raised"),
        ("trigger", "quick", "b", "str", 1, "raised"),
    ]


def test_many_programs_trigger_at_the_same_time_and_each_trigger_is_raised_once(program, place):
    process, run = program(kind="thread")
    programs, triggers = 4, 25

    def attacher(number):
        with evr.attach(place.store, "mine") as attached:
            for sequence in range(triggers):
                # Each sequence comes from two of them.
                assert attached.trigger("quick", number // 2 * triggers + sequence) is True

    attachers = [FORK.Process(target=attacher, args=(number,)) for number in range(programs)]
    for one in attachers:
        one.start()
    for one in attachers:
        one.join()
    assert [one.exitcode for one in attachers] == [0] * programs
    different = programs * triggers // 2
    wait_until(lambda: len(run.tasks(status="success")) == different)
    run.stop()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert sorted(event.sequence for event in run.events()) == list(range(different))
    query = "SELECT answer, count(*) FROM eventor_request WHERE kind = 'trigger' GROUP BY answer"
    assert place.sql(query) == [("raised", different), ("raised before", different)]


@pytest.mark.parametrize("number", [signal.SIGINT, *on_sqlite(signal.SIGTERM)])
def test_a_signal_ends_the_wait_for_triggers_at_once(program, number):
    process, run = program()
    run.trigger("quick", 1)
    wait_until(lambda: run.tasks(status="success"))
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == -number
    assert run.runs()[0].recoveries[0].owner == "ended"


def test_linger_is_counted_from_the_last_activity(make, monkeypatch):
    ev = make(config={"linger": 0.2, "task_construct": threading.Thread})
    ended = []
    go, more = flow(ev), ev.add_event("more")
    ev.add_assoc(more, ev.add_step("t", lambda: ended.append(time.monotonic())))
    ev.trigger_event(go)
    linger_left = Loop._linger_left
    lingered = []

    def trigger_late(loop, now):
        left = linger_left(loop, now)
        if left and not lingered:
            lingered.append(left)
            time.sleep(0.1)
            ev.trigger_event(more)
        return left

    monkeypatch.setattr(Loop, "_linger_left", trigger_late)
    assert ev() is True
    assert time.monotonic() - ended[0] >= 0.2
    assert statuses(ev) == {"s[1]": "success", "t[2]": "success"}


def test_a_failure_that_stops_the_flow_and_a_stop_do_not_linger(make):
    ev = make(config={"linger": math.inf})
    ev.trigger_event(flow(ev, lambda: 1 / 0))
    assert ev() is False
    ev.stop()
    assert ev() is False


def test_a_step_may_attach_and_what_it_asks_for_is_seen_before_the_end(make, place):
    def step():
        with evr.attach(place.store) as run:
            return run.trigger("more", "x")

    # No look but the first and the last is due.
    ev = make(config={"sleep_between_loops": 1000})
    go, more = flow(ev, step), ev.add_event("more")
    ev.add_assoc(more, ev.add_step("t", int))
    ev.trigger_event(go)
    assert ev() is True
    assert ev.tasks("s")[0].result is True
    assert statuses(ev) == {"s[1]": "success", "t[x]": "success"}


def test_between_two_calls_a_trigger_waits_for_the_next(make, place):
    ev = make()
    go = flow(ev)
    ev.trigger_event(go, 1)
    assert ev() is True
    with evr.attach(place.store) as run:
        assert run.trigger("go", 2) is True
        assert run.trigger("go", 1) is True
        assert [str(task) for task in ev.preview().runs] == ["s[2]"]
        assert ev() is True
        assert [task.sequence for task in run.tasks()] == [1, 2]
    answers = [row[-1] for row in place.sql(REQUESTS)]
    assert answers == ["raised", "raised before"]


def test_a_stop_waits_for_the_next_call_but_not_for_a_recovery(make, place):
    ev = make()
    ev.trigger_event(flow(ev))
    with evr.attach(place.store) as run:
        assert run.stop() is True
        assert ev.preview().runs == ()
        assert ev() is False
        assert statuses(ev) == {"s[1]": "ready"}
        assert run.stop() is True
        ev.close()
        assert run.stop() is False
        ev = make(run_mode="recover")
        flow(ev)
        assert ev() is True
    assert place.sql(REQUESTS) == [
        ("stop", None, None, None, 0, "stopped"),
        ("stop", None, None, None, 1, "too late"),
    ]


def test_an_event_that_the_flow_does_not_have_is_refused(make, place, debug_log):
    ev = make()
    with evr.attach(place.store) as run:
        run.trigger("gone", 1)  # nothing is defined yet
        go = flow(ev)
        assert ev() is True
        assert ev() is True
        told = f"Trigger of process {socket.gethostname()}:{os.getpid()} is refused: there is no"
        assert debug_log().count(f"{told} event 'gone' (sequence 1); did you mean 'go'?") == 1
        with pytest.raises(evr.DefinitionError, match="run 1 has no event 'gone'; did you mean 'g"):
            run.trigger("gone", 1)
        for call in (run.trigger, run.tasks):
            with pytest.raises(evr.DefinitionError, match=r"the (event|step) is .*; expected the"):
                call(go, 1)
        with pytest.raises(evr.DefinitionError, match="has no step 'x'; known are s"):
            run.tasks("x")
    assert [row[-1] for row in place.sql(REQUESTS)] == ["refused"]


def test_requests_stay_with_the_run_for_which_they_were_made(make, place):
    make().close()
    with evr.attach(place.store) as run:
        assert run.trigger("go", 1) is False
        ev = make()
        flow(ev)
        assert ev() is True
        assert run.tasks() == []
        assert run.trigger("go", 2) is True
        assert ev() is True
        assert [task.sequence for task in run.tasks()] == [2]
    assert [row[4] for row in place.sql(REQUESTS)] == [None, 0]


def test_runs_and_their_recoveries_are_listed(make, place):
    ev = make(name="a")
    ev.trigger_event(flow(ev))
    ev()
    ev.close()
    make(name="other").close()
    flow(ev := make(name="a", run_mode="recover"))
    ev()
    make(name="a")
    place.sql("UPDATE eventor_recovery SET owner_began = '' WHERE recovery = 1")
    with evr.attach(place.store, "a") as run:
        first, second = run.runs()
        assert (first.run_id, first.name, second.run_id) == (1, "a", 3)
        found = [(each.recovery, each.based_on, each.owner) for each in first.recoveries]
        assert found == [(0, None, evr.OwnerStatus.ended), (1, 0, evr.OwnerStatus.live)]
        assert first.began_at <= first.recoveries[0].began_at <= second.began_at
        # Of an owner that cannot be looked at, its lease tells.
        place.sql("UPDATE eventor_recovery SET heartbeat_at = NULL")
        assert [run.recoveries[-1].owner for run in run.runs()] == ["dead", "live"]
        assert run.tasks() == run.events() == []
        assert [task.replay for task in run.tasks(run_id=1)] == ["skip"]
        assert [task.replay for task in run.tasks(run_id=1, recovery=0)] == [None]
        assert [event.cause.kind for event in run.events("go", 1, 1)] == ["recovery"]
        for numbers, words in [
            ({"run_id": 2}, "has no run 2 named 'a'; the latest is 3"),
            ({"run_id": "1"}, "run_id is '1'; expected its number"),
            ({"recovery": 1}, "run 3 has no recovery 1; the latest is 0"),
            ({"recovery": True}, "recovery is True"),
        ]:
            with pytest.raises(evr.RecoveryError, match=words):
                run.tasks(**numbers)


def test_where_there_is_nothing_to_attach_to(tmp_path):
    (tmp_path / "empty.db").touch()
    for store, words in [
        (tmp_path / "none.db", "the store .*none.db does not exist"),
        (tmp_path / "empty.db", "the store .*empty.db is empty"),
        (":memory:", "a store in memory keeps no runs"),
    ]:
        with pytest.raises(evr.RecoveryError, match=f"nothing to attach to: {words}"):
            evr.attach(store)
    for store, words in [
        ("", "the store is ''"),
        (None, "the store is of type NoneType"),
        (tmp_path, "is a directory"),
    ]:
        with pytest.raises(evr.EventorError, match=words):
            evr.attach(store)
    assert (tmp_path / "empty.db").read_bytes() == b""
    assert not (tmp_path / "none.db").exists()


@pytest.mark.stores("sqlite")
def test_a_file_may_be_named_by_its_url(make, place):
    make(name="a").close()
    with evr.attach(f"sqlite:///{place.store}", "a") as run:
        assert [each.name for each in run.runs()] == ["a"]


def test_what_is_asked_for_wrongly_is_refused_and_not_recorded(make, place):
    make(name="a").close()
    told = "nothing to attach to: .*no run named ''; it has runs named 'a'"
    with pytest.raises(evr.RecoveryError, match=told):
        evr.attach(place.store)
    for name, words in [(None, "the name is None"), ("a\n", "printable")]:
        with pytest.raises(evr.EventorError, match=words):
            evr.attach(place.store, name)
    with evr.attach(place.store, "a") as run:
        for sequence in (None, 1.0, True, "a\0b"):
            with pytest.raises(evr.TriggerError, match=r"the sequence is .*expected an int"):
                run.trigger("go", sequence)
        with pytest.raises(evr.ConfigError, match="status is 'done'"):
            run.tasks(status="done")
    assert place.sql("SELECT count(*) FROM eventor_request") == [(0,)]


@pytest.mark.stores("sqlite")
def test_a_store_that_is_read_only_is_refused_and_one_that_becomes_so_keeps_nothing(
    make, tmp_path, place
):
    store = tmp_path / "flow.db"
    ev = make()
    with evr.attach(store) as run:
        store.chmod(0o444)
        with pytest.raises(evr.StoreError, match=r"cannot record a trigger: .*read-only"):
            run.trigger("go", 1)
        with pytest.raises(evr.StoreError, match="cannot be both read and written"):
            evr.attach(store)
        store.chmod(0o644)
        assert run.trigger("go", 2) is True
    ev.close()
    assert [row[2] for row in place.sql(REQUESTS)] == ["2"]


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize(
    ("version", "words"), [(3, "has schema version 3, and is left as it is"), (6, "up to 5")]
)
def test_a_store_of_another_schema_is_left_as_it_is(make, tmp_path, version, words, place):
    """PostgreSQL has had no earlier one, which a recovery would bring up to this."""
    store = tmp_path / "flow.db"
    make().close()
    made = place.sql("SELECT name, sql FROM sqlite_master WHERE name LIKE 'eventor_request%'")
    place.sql(*UNDO[4], *UNDO[3], f"UPDATE eventor_schema SET version = {version}")
    before = store.read_bytes()
    with pytest.raises(evr.StoreError, match=words):
        evr.attach(store)
    assert store.read_bytes() == before
    if version == 3:
        flow(ev := make(run_mode="recover"))
        with evr.attach(store) as run:
            assert run.trigger("go", 1) is True
        assert ev() is True
        assert statuses(ev) == {"s[1]": "success"}
        now = place.sql("SELECT name, sql FROM sqlite_master WHERE name LIKE 'eventor_request%'")
        plain = [[(name, "".join(text.split())) for name, text in rows] for rows in (made, now)]
        assert plain[0] == plain[1]


def test_what_is_attached_is_of_use_in_its_process_until_it_is_closed(make, tmp_path, place):
    ev = make()
    run = evr.attach(place.store)
    assert repr(run) == f"<Attached to runs named '' in {locate(place.store)}>"

    def elsewhere():
        with pytest.raises(evr.UsageError, match=r"belongs to process .*; attach there"):
            run.runs()

    ev.trigger_event(flow(ev, elsewhere))
    assert ev() is True
    run.close()
    run.close()
    for call in (run.runs, run.stop, run.tasks, run.events, lambda: run.trigger("go", 1)):
        with pytest.raises(evr.UsageError, match="is closed"):
            call()


def test_an_owner_elsewhere_is_live_within_its_lease(make, place, monkeypatch):
    make(config={"lease_seconds": 1000})
    with evr.attach(place.store) as run:
        monkeypatch.setattr(owner, "is_running", lambda _: None)
        assert run.trigger("go", 1) is True
        place.sql("UPDATE eventor_recovery SET heartbeat_at = '2026-01-01'")
        assert run.trigger("go", 2) is False


class Asked:
    """A ledger of which nobody asks anything."""

    shared, recovery = True, 0

    def requests(self):
        return []


def test_a_look_beside_other_changes_is_not_the_last():
    requests, now = Requests(None, Asked(), 1.0), datetime(2030, 1, 1, tzinfo=UTC)
    requests.look(now)
    assert requests.look_last([object()]) is False
    assert requests.seconds_left(now) < 0
    requests.look(now)
    assert requests.look_last([]) is True


def test_a_clock_that_is_set_back_does_not_keep_it_from_looking():
    requests, now = Requests(None, Asked(), 1.0), datetime(2030, 1, 1, tzinfo=UTC)
    requests.look(now)
    requests.look(now - timedelta(days=1))
    assert requests.look_last([]) is True


def test_a_request_to_stop_was_for_the_owner_that_is_gone(make, place):
    ev = make(run_mode="continue")
    flow(ev)
    assert ev() is True
    with evr.attach(place.store) as run:
        assert run.stop() is True
    ev.close()
    ev = make(run_mode="continue")
    ev.trigger_event(flow(ev), 5)
    assert ev() is True
    assert statuses(ev)["s[5]"] == "success"


def test_a_preview_foresees_in_which_order_requests_are_taken_up(make, place):
    ev = make()
    first, asked = ev.add_event("first"), ev.add_event("asked")
    led_to = ev.add_event("led to")
    both = ev.add_event("both", (led_to, asked))
    ev.add_assoc(first, led_to)
    ev.add_assoc(asked, ev.add_step("fails", lambda: 1 / 0))
    ev.add_assoc(both, ev.add_step("later", int))
    ev.trigger_event(first, 1)
    with evr.attach(place.store) as run:
        run.trigger("asked", 1)
    assert [str(task) for task in ev.preview(failing=["fails"]).runs] == ["fails[1]"]
    assert ev() is False
    assert statuses(ev) == {"fails[1]": "failure", "later[1]": "ready"}
