"""Restart and recover: what the interface promises for each status, along the lineage."""

import json
import os
import signal
import subprocess
import sys

import pytest

import eventor as evr
from eventor.steps import launch
from tests.conftest import on_sqlite, statuses, wait_until


@pytest.fixture
def four(make, place, tmp_path):
    """Make a run whose tasks stand in each of the four statuses, then recover it."""
    log = tmp_path / "log"

    def note(name):
        with log.open("a") as file:
            file.write(f"{name} ")

    def build(recovery=None, **arguments):
        ev = make(**arguments)
        go = ev.add_event("go")

        def failing():
            note("failure")
            if arguments.get("run_mode") is None:
                raise ValueError("bad input")

        funcs = {"success": lambda: note("success"), "failure": failing}
        for name in ("success", "active", "failure", "ready"):
            func = funcs.get(name, lambda name=name: note(name))
            ev.add_assoc(go, ev.add_step(name, func=func, recovery=recovery or {}))
        return ev, go

    def crashed():
        ev, go = build()
        ev.trigger_event(go, 1)
        assert ev() is False
        ev.close()
        # What a crash of the owner leaves: `active` and `ready` were recorded, and never ended.
        place.sql(
            "UPDATE eventor_task SET status = 'active', ended_at = NULL WHERE step = 'active'"
        )
        log.write_text("")
        return build

    return crashed, lambda: log.read_text().split()


def test_by_default_all_but_success_is_run_again(four):
    crashed, ran = four
    ev, _ = crashed()(run_mode=evr.RunMode.recover)
    assert ev() is True
    assert ran() == ["active", "failure", "ready"]
    assert {task.step: task.replay for task in ev.tasks()} == {
        "success": "skip",
        "active": "rerun",
        "failure": "rerun",
        "ready": "rerun",
    }
    assert (ev.run_id, ev.recovery) == (1, 1)


@pytest.mark.parametrize("status", list(evr.TaskStatus))
@pytest.mark.parametrize("replay", list(evr.StepReplay))
@pytest.mark.parametrize(
    "key", [lambda s: s, *on_sqlite(lambda s: s.value, lambda s: f"at_{s.value}")]
)
def test_the_policy_of_a_status_decides(four, status, replay, key):
    crashed, ran = four
    ev, _ = crashed()(recovery={key(status): replay}, run_mode=evr.RunMode.recover)
    assert ev() is True
    (task,) = ev.tasks(status.value)
    assert task.replay is replay
    assert (status.value in ran()) == (replay is evr.StepReplay.rerun)
    assert task.status is evr.TaskStatus.success


def test_complete_stands_for_both_ends_and_one_status_outweighs_it(make):
    ev = make()
    both = ev.add_step("both", func=int, recovery={"complete": evr.StepReplay.rerun})
    assert set(both.recovery.values()) == {evr.StepReplay.rerun}
    policy = {"success": "skip", evr.StepTriggers.at_complete: "rerun", "failure": "skip"}
    one = ev.add_step("one", func=int, recovery=policy)
    assert one.recovery[evr.TaskStatus.success] == one.recovery[evr.TaskStatus.failure] == "skip"


def test_restart_keeps_earlier_runs_and_recover_takes_the_latest_of_its_name(make, place):
    for name in ("a", "b", "a"):
        with make(name=name) as ev:
            ev.trigger_event(ev.add_event(f"of {ev.run_id}"))
            ev()
    with make(name="b", run_mode=evr.RunMode.recover) as ev:
        assert (ev.run_id, ev.recovery) == (2, 1)
    with make(name="a", run_mode="recover") as ev:
        assert (ev.run_id, ev.recovery) == (3, 1)
    assert place.sql("SELECT count(*) FROM eventor_event") == [(3,)]


def test_a_skipped_step_keeps_its_result_and_raises_its_triggers(make):
    def build(**arguments):
        ev = make(**arguments)
        go = ev.add_event("go")
        names = ("at_ready", "at_active", "at_success", "at_complete", "at_failure")
        triggers = {name: ev.add_event(name) for name in names}
        ev.add_assoc(go, ev.add_step("first", func=os.getpid, triggers=triggers))
        ev.add_assoc(triggers["at_success"], ev.add_step("next", func=int))
        return ev, go

    ev, go = build()
    ev.trigger_event(go)
    ev()
    (first,) = ev.tasks("first")
    ev.close()
    for recovery in (1, 2):
        ev, _ = build(run_mode=evr.RunMode.recover)
        assert ev() is True
        (task,) = ev.tasks("first")
        assert (task.recovery, task.replay, task.result) == (recovery, "skip", first.result)
        assert (task.pid, task.started_at, task.attempt) == (None, None, 0)
        assert {event.event for event in ev.events()} == {
            "go",
            "at_ready",
            "at_active",
            "at_success",
            "at_complete",
        }
        assert statuses(ev)["next[1]"] == "success"
        ev.close()


def test_a_recovery_that_reached_nothing_loses_nothing(four, make):
    crashed, ran = four
    build = crashed()
    for _ in range(3):
        build(run_mode=evr.RunMode.recover)[0].close()
    ev, _ = build(run_mode=evr.RunMode.recover)
    assert ev.recovery == 4
    assert ev() is True
    assert ran() == ["active", "failure", "ready"]


def test_recovery_run_names_the_recovery_to_start_from(four):
    crashed, ran = four
    build = crashed()
    first, _ = build(run_mode=evr.RunMode.recover)
    first()
    first.close()
    again, _ = build(run_mode=evr.RunMode.recover, recovery_run=0)
    again()
    assert again.recovery == 2
    assert ran() == ["active", "failure", "ready"] * 2
    again.close()
    latest, _ = build(run_mode=evr.RunMode.recover, recovery_run=2)
    latest()
    assert len(ran()) == 6
    assert {task.replay for task in latest.tasks()} == {evr.StepReplay.skip}


def test_what_was_triggered_is_raised_again_unless_the_program_does(four):
    crashed, _ = four
    ev, go = crashed()(run_mode=evr.RunMode.recover)
    ev.trigger_event(go, 2)
    assert ev() is True
    assert [(e.sequence, str(e.cause)) for e in ev.events("go")] == [(2, "call"), (1, "recovery 0")]
    ev.close()
    ev, go = crashed()(run_mode=evr.RunMode.recover)
    ev.trigger_event(go)
    ev()
    assert [(e.sequence, str(e.cause)) for e in ev.events("go")] == [(1, "call")]


def test_a_trigger_of_an_event_that_is_gone_is_named(make, debug_log):
    with make() as ev:
        ev.trigger_event(ev.add_event("gone"))
    ev = make(run_mode=evr.RunMode.recover)
    assert ev() is True
    assert ev.events() == []
    assert "event gone was triggered before in sequence 1, and is no longer defined" in debug_log()


def test_the_definition_stands_in_the_store(make, place):
    ev = make()
    a, b = ev.add_event("a"), ev.add_event("b")
    ev.add_event("c", expr=evr.or_((a, b), a))
    ev.add_assoc(a, b, ev.add_step("s", func=os.getpid, triggers={"at_success": b}))
    ev()
    ((definition,),) = place.sql("SELECT definition FROM eventor_definition")
    told = json.loads(definition)
    assert told["events"][2]["expr"] == ["a", "b", {"and": 2}, "a", {"or": 2}]
    assert told["steps"][0]["func"] == "posix.getpid"
    assert told["steps"][0]["triggers"]["at_success"] == ["b"]
    assert told["assocs"][0]["steps"] == ["s"]


PROGRAM = """
import sys, os, time
import eventor as evr

def step(number):
    with open("log", "a") as file:
        file.write(f"begin {number}\\n")
    if number == 2 and sys.argv[1] == "restart":
        open("reached", "w").close()
        time.sleep(600)
    with open("log", "a") as file:
        file.write(f"end {number}\\n")

with evr.Eventor(store=os.environ["STORE"], run_mode=sys.argv[1], config={"logdir": "."}) as ev:
    events = [ev.add_event(f"e{number}") for number in range(5)]
    for number in range(4):
        ev.add_assoc(events[number], ev.add_step(f"s{number}", func=step, args=(number,),
                     triggers={evr.StepTriggers.at_success: events[number + 1]}))
    if sys.argv[1] == "restart":
        ev.trigger_event(events[0], "the one")
    print(ev())
"""


def test_a_program_killed_in_a_step_is_recovered_by_running_it_again(tmp_path, script, place):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    killed = subprocess.Popen(
        [sys.executable, program, "restart"],
        cwd=tmp_path,
        env={**os.environ, "STORE": place.store},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until((tmp_path / "reached").exists)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(30) == -signal.SIGKILL
    recovered = script(PROGRAM, "recover", STORE=place.store)
    assert recovered.stdout == "True\n"
    log = (tmp_path / "log").read_text().split("\n")[:-1]
    assert log == [
        *("begin 0", "end 0", "begin 1", "end 1", "begin 2"),
        *("begin 2", "end 2", "begin 3", "end 3"),
    ]
    assert place.sql(
        "SELECT recovery, step, status, replay FROM eventor_task ORDER BY task_id",
    ) == [
        (0, "s0", "success", None),
        (0, "s1", "success", None),
        (0, "s2", "active", None),
        (1, "s0", "success", "skip"),
        (1, "s1", "success", "skip"),
        (1, "s2", "success", "rerun"),
        (1, "s3", "success", None),
    ]


def test_an_eventor_whose_call_was_cut_short_says_so(make, monkeypatch):
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=signal.pause))
    ev.trigger_event(go)
    wait = launch.Launcher.wait

    def interrupted(launcher, bell, seconds):
        if bell:
            raise KeyboardInterrupt("now")
        wait(launcher, bell, seconds)

    monkeypatch.setattr(launch.Launcher, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ev()
    with pytest.raises(evr.UsageError, match=r"cut short .*KeyboardInterrupt.*recover"):
        ev()
    assert statuses(ev) == {"s[1]": "active"}


def changing(make, **config):
    """Make a recovery of a run whose flow has changed in all the ways in which it can."""
    with make() as ev:
        a, gone, c = ev.add_event("a"), ev.add_event("gone"), ev.add_event("c")
        ev.add_event("joined", expr=(a, c))
        ev.add_assoc(a, ev.add_step("kept", func=int), ev.add_step("over", func=int))
        ev.add_assoc(gone, ev.add_step("waiting", func=int))
        ev.add_assoc(a, ev.add_step("fails", func=int, args=("x",)))
        ev.trigger_event(a)
        ev.trigger_event(gone, "g")
        assert ev() is False
    ev = make(run_mode=evr.RunMode.recover, config=config)
    a, c = ev.add_event("a"), ev.add_event("c")
    ev.add_event("joined", expr=evr.or_(a, c))
    triggers = {"at_success": ev.add_event("fresh")}
    policy = {"success": evr.StepReplay.rerun}
    ev.add_assoc(a, c, ev.add_step("kept", func=str, triggers=triggers, recovery=policy))
    ev.add_step("fails", func=int, config={"stop_on_exception": False})
    return ev


DRIFT = [
    "new event fresh",
    "new association a -> event c",
    'changed event joined (expr: ["a", "c", {"and": 2}] -> ["a", "c", {"or": 2}])',
    (
        'changed step kept (func: builtins.int -> builtins.str, triggers: {} -> {"at_success": '
        '["fresh"]}, recovery: ...)'
    ),
    'changed step fails (config: {"stop_on_exception": null} -> {"stop_on_exception": false})',
    "missing event gone",
    "missing step over",
    "missing step waiting",
    "missing association a -> step over",
    "missing association a -> step fails",
    "missing association gone -> step waiting",
    "event gone was triggered before in sequence g, and is no longer defined",
    "waiting[g] was left ready, and step waiting is no longer defined",
]


def without_cut(named):
    return [name.split(", recovery:")[0] for name in named]


def test_what_has_changed_since_is_named_in_one_warning(make, debug_log):
    ev = changing(make)
    assert without_cut(ev.preview().drift) == without_cut(DRIFT)
    assert ev() is True
    (warning,) = [line for line in debug_log().splitlines() if "not what the run" in line]
    assert all(part in warning for part in without_cut(DRIFT))
    assert statuses(ev) == {"kept[1]": "success"}
    assert ev() is True
    assert debug_log().count("not what the run") == 1


def test_a_strict_recovery_of_a_changed_flow_runs_nothing(make):
    ev = changing(make, strict_recovery=True)
    with pytest.raises(evr.RecoveryError, match=r"new event fresh.*; nothing has run"):
        ev()
    assert statuses(ev) == {}


def test_a_strict_recovery_of_the_same_flow_runs(make):
    for arguments in ({}, {"run_mode": "recover", "config": {"strict_recovery": True}}):
        with make(**arguments) as ev:
            go = ev.add_event("go")
            ev.add_assoc(go, ev.add_step("s", func=int))
            ev.trigger_event(go, 1)
            assert ev() is True


def test_of_many_tasks_that_are_lost_some_are_named(make, debug_log):
    with make() as ev:
        go = ev.add_event("go")
        for sequence in range(9):
            ev.trigger_event(go, sequence)
        ev.add_assoc(go, ev.add_step("s", func=int, args=("x",)))
        ev()
    ev = make(run_mode="recover")
    assert ev() is True
    assert "s[1], s[2], s[3], s[4], s[5] and 3 more was left ready" in debug_log()
    assert "sequence 0, 1, 2, 3, 4 and 4 more" in debug_log()


def test_a_definition_that_eventor_has_not_written_is_named(make, place):
    for written in ("{", "[]", '{"events": [1]}', '{"events": [], "steps": 7}'):
        with make() as ev:
            ev()
        place.sql(f"UPDATE eventor_definition SET definition = '{written}'")
        ev = make(run_mode="recover")
        with pytest.raises(evr.StoreError, match="definition"):
            ev()
        ev.close()


def test_a_preview_tells_what_would_be_done_and_does_nothing(four, place):
    crashed, ran = four
    ev, go = crashed()(run_mode=evr.RunMode.recover)
    ev.trigger_event(go, "more")
    before = place.sql("SELECT * FROM eventor_event", "SELECT * FROM eventor_task")
    preview = ev.preview(failing="ready")
    assert [str(task) for task in preview.runs] == [
        *("success[more]", "active[more]", "failure[more]", "ready[more]"),
    ]
    preview = ev.preview()
    assert str(preview).splitlines() == [
        *("run: success[more]", "run: active[more]", "run: failure[more]", "run: ready[more]"),
        *("run: active[1] (was active)", "run: failure[1] (was failure)"),
        *("run: ready[1] (was ready)", "skip: success[1] (was success)"),
        "trigger again: go[1] (of recovery 0)",
    ]
    assert preview.skips[0].replay is evr.StepReplay.skip
    assert ran() == []
    after = place.sql("SELECT * FROM eventor_event", "SELECT * FROM eventor_task")
    assert before == after
    assert ev() is True
    assert str(ev.preview()) == "nothing to do"
    with pytest.raises(evr.DefinitionError, match="there is no step 'nosuch'"):
        ev.preview(["nosuch"])


def test_a_result_outlives_a_recovery_that_died_in_its_step(make, place):
    policy = {"success": "rerun", "active": "skip"}

    def run(**arguments):
        with make(**arguments) as ev:
            go = ev.add_event("go")
            ev.add_assoc(go, ev.add_step("s", func=lambda: 42, recovery=policy))
            ev.trigger_event(go, 1)
            ev()
            return [(task.replay, task.result) for task in ev.tasks()]

    assert run() == [(None, 42)]
    assert run(run_mode="recover") == [("rerun", 42)]
    died = "UPDATE eventor_task SET status = 'active', result_id = NULL WHERE recovery = 1"
    place.sql(died)
    assert run(run_mode="recover") == [("skip", 42)]


def test_what_is_defined_between_two_calls_is_recovered_between_them(make, debug_log):
    def run(first, second, **arguments):
        with make(**arguments) as ev:
            a = ev.add_event("a")
            ev.add_assoc(a, ev.add_step("one", func=int))
            if not arguments:
                ev.trigger_event(a, 1)
            assert ev() is first
            b = ev.add_event("b")
            ev.add_assoc(b, ev.add_step("two", func=int, args=() if arguments else ("x",)))
            if not arguments:
                ev.trigger_event(b, 1)
            preview = ev.preview()
            assert ev() is second
            return preview, statuses(ev)

    assert run(True, False)[1] == {"one[1]": "success", "two[1]": "failure"}
    preview, found = run(True, True, run_mode="recover")
    assert found == {"one[1]": "success", "two[1]": "success"}
    assert str(preview).splitlines() == [
        "run: two[1] (was failure)",
        "trigger again: b[1] (of recovery 0)",
    ]


@pytest.mark.stores("either")
def test_triggers_in_a_set_are_the_same_in_each_process(script, place):
    program = """
        import os, sys
        import eventor as evr
        config = {"logdir": ".", "strict_recovery": True}
        with evr.Eventor(store=os.environ["STORE"], run_mode=sys.argv[1], config=config) as ev:
            some = [object() for _ in range(int(sys.argv[2]))]
            events = {ev.add_event(str(number)) for number in range(20)}
            ev.add_step("s", func=int, triggers={"at_success": events})
            print(ev())
    """
    for mode, number in [("restart", "0"), ("recover", "1"), ("recover", "1000")]:
        ran = script(program, mode, number, STORE=place.store)
        assert ran.stdout == "True\n", ran.stderr


def test_a_strict_recovery_that_was_refused_leaves_nothing_behind(make):
    strict = {"run_mode": "recover", "config": {"strict_recovery": True}}

    def build(name, **arguments):
        ev = make(**arguments)
        event = ev.add_event(name)
        ev.add_assoc(event, ev.add_step("s", func=int))
        ev.trigger_event(event, 1)
        return ev

    with build("go") as ev:
        assert ev() is True
    with build("typo", **strict) as ev:
        assert ev.tasks() == []
        with pytest.raises(evr.RecoveryError, match="new event typo"):
            ev()
        # What was missing can still be given.
        assert ev.events() == []
    with build("go", **strict) as ev:
        assert [str(event.cause) for event in ev.events()] == ["call"]
        assert ev() is True


def test_a_change_that_was_run_with_is_no_change_any_more(make):
    def run(*names, **arguments):
        with make(**arguments) as ev:
            for name in names:
                event = ev.add_event(name)
                if not arguments:
                    ev.trigger_event(event)
            return ev()

    assert run("a", "b")
    assert run("a", run_mode="recover")
    assert run("a", run_mode="recover", config={"strict_recovery": True})


def test_names_that_look_like_associations_are_told_apart(make):
    def build(swapped, **arguments):
        ev = make(**arguments)
        a, ab, c, bc = (ev.add_event(n) for n in ("a", "a -> event b", "c", "b -> event c"))
        ev.add_assoc(*((ab, c) if swapped else (a, bc)))
        return ev

    with build(False) as ev:
        ev()
    drift = build(True, run_mode="recover").preview().drift
    assert drift == (
        "new association a -> event b -> event c",
        "missing association a -> event b -> event c",
    )


def test_of_a_long_change_the_place_is_shown_where_it_begins(make):
    def build(last, **arguments):
        ev = make(**arguments)
        parts = [ev.add_event(f"part {number}") for number in range(100)]
        ev.add_event("all", expr=(*parts, ev.add_event(last)))
        return ev

    with build("one") as ev:
        ev()
    changed = build("two", run_mode="recover").preview().drift[1]
    assert changed == (
        'changed event all (expr: ...rt 98", "part 99", "one", {"and": 101}] -> '
        '...rt 98", "part 99", "two", {"and": 101}])'
    )


def test_a_preview_heeds_a_request_to_stop_and_no_stop_that_is_over(make):
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("fails", func=int, args=("x",)), ev.add_step("waits", func=int))
    ev.trigger_event(go)
    ev.stop()
    assert ev.preview().runs == ()
    assert ev() is False
    assert statuses(ev) == {"fails[1]": "ready", "waits[1]": "ready"}
    assert [str(task) for task in ev.preview("fails").runs] == ["fails[1]"]
    assert ev() is False
    assert [str(task) for task in ev.preview().runs] == ["waits[1]"]
    assert ev() is False
    assert statuses(ev) == {"fails[1]": "failure", "waits[1]": "success"}


@pytest.mark.parametrize("how", ["fork", "warning"])
def test_what_was_triggered_is_recovered_if_no_process_could_be_started(make, monkeypatch, how):
    def build(**arguments):
        ev = make(**arguments)
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", func=int))
        return ev, go

    def refuse(*_):
        raise BlockingIOError("no more processes") if how == "fork" else RuntimeWarning("threads")

    ev, go = build()
    ev.trigger_event(go)
    with monkeypatch.context() as patched:
        patched.setattr(
            "os.fork" if how == "fork" else "eventor.steps.launch.warn_of_threads", refuse
        )
        error = evr.LaunchError if how == "fork" else RuntimeWarning
        with pytest.raises(error, match=r"no more processes|threads"):
            ev()
    ev.close()
    ev, _ = build(run_mode="recover")
    assert ev() is True
    assert statuses(ev) == {"s[1]": "success"}
