"""Why something has happened, or why it has not: told by the store alone."""

import itertools
import os

import pytest

import eventor as evr
from eventor.storage.backend import Access
from eventor.storage.history import History
from eventor.storage.location import locate
from eventor.storage.store import Store
from tests.conftest import on_sqlite


def names(told):
    return [f"{one.kind} {one.name}[{one.sequence}]" for one in told]


@pytest.fixture
def flow(make):
    """Two steps that a third waits for, of which the second fails."""

    def build(**arguments):
        ev = make(config={"stop_on_exception": False}, **arguments)
        begin = ev.add_event("begin")
        first, second = ev.add_step("first", int), ev.add_step("second", lambda: 1 / 0)
        both = ev.add_event("both", (first.success, second.success))
        ev.add_assoc(begin, first, second)
        ev.add_assoc(both, ev.add_step("third", int))
        return ev

    return build


def test_the_chain_of_causes_leads_from_the_trigger_to_the_thing(flow):
    ev = flow()
    ev.trigger_event(ev._flow.events["begin"], "a")
    ev()
    why = ev.why("first.success", "a")
    assert why.happened
    assert names(why.chain) == ["event begin[a]", "step first[a]", "event first.success[a]"]
    begin, first, success = why.chain
    assert (begin.cause.kind, first.cause.source) == ("call", "begin")
    assert (success.cause.source, success.cause.detail) == ("first", "at_success")
    assert (first.status, begin.status) == ("success", None)
    assert begin.at <= first.at <= first.ended_at <= success.at
    assert str(why).splitlines()[1] == "step first[a] (association begin), success"


def test_what_has_not_happened_is_told_by_what_it_waits_for(flow):
    ev = flow()
    ev.trigger_event(ev._flow.events["begin"])
    ev()
    why = ev.why("third")
    assert not why.happened
    assert str(why).splitlines() == [
        "step third[1] has not run",
        "  association of event both[1] is not raised; it needs first.success and second.success",
        "    expression of event second.success[1] is not raised",
        "      at_success of step second[1] failed: ZeroDivisionError: division by zero",
    ]
    assert [lack.depth for lack in why.lacks] == [0, 1, 2, 3]


def test_what_nothing_leads_to_waits_for_a_trigger(flow):
    ev = flow()
    ev.add_step("loose", int)
    assert str(ev.why("begin")) == "event begin[1] is not raised: it waits for a trigger"
    assert str(ev.why("loose")) == "step loose[1] has not run, and nothing leads to it"
    assert str(ev.why("first", 7)).splitlines() == [
        "step first[7] has not run",
        "  association of event begin[7] is not raised: it waits for a trigger",
    ]


def test_a_delayed_association_tells_when_it_is_due(make):
    ev = make()
    go = ev.add_event("go")
    later = ev.add_step("later", int)
    ev.add_assoc(go, later, delay=10_000)
    ev.add_assoc(go, ev.add_step("stop", ev.stop and int))
    ev.trigger_event(go)
    ev.stop()
    assert ev() is False
    _step, delayed = ev.why(later).lacks
    assert (delayed.seconds, delayed.leads_by) == (10_000, "association")
    assert (delayed.due_at - delayed.happened_at).total_seconds() == 10_000
    assert "is raised, due at 20" in str(delayed)


@pytest.mark.stores("either")
def test_a_circle_is_told_once(make):
    ev = make()
    a, b = ev.add_event("a"), ev.add_event("b")
    ev.add_assoc(a, b)
    ev.add_assoc(b, a)
    told = str(ev.why(a)).splitlines()
    assert told == [
        "event a[1] is not raised",
        "  association of event b[1] is not raised",
        "    association of event a[1] is not raised (as above)",
    ]


@pytest.mark.parametrize("speaker", ["7", *on_sqlite(7, "'7'", "'", "-07", "x")])
def test_a_trigger_from_within_leads_on_into_another_sequence(make, speaker):
    def say():
        if evr.current().sequence == speaker:
            evr.current().trigger(said, "other")

    ev = make()
    go, said = ev.add_event("go"), ev.add_event("said")
    ev.trigger_events(go, ["7", 7, "'7'", "'", "-07", "x"])
    ev.add_assoc(go, ev.add_step("say", say))
    ev()
    chain = [(one.name, one.sequence) for one in ev.why(said, "other").chain]
    assert chain == [("go", speaker), ("say", speaker), ("said", "other")]


def test_a_recovery_tells_of_which_recovery_the_trigger_was(flow):
    ev = flow()
    ev.trigger_event(ev._flow.events["begin"])
    ev()
    ev.close()
    ev = flow(run_mode="recover")
    ev()
    begin, first = ev.why("first").chain
    assert (str(begin.cause), first.status) == ("recovery 0", "success")


@pytest.mark.stores("either")
def test_a_long_chain_is_told_in_full(make):
    ev = make()
    events = [ev.add_event(f"e{number}") for number in range(1500)]
    for before, after in itertools.pairwise(events):
        ev.add_assoc(before, after)
    assert len((why := ev.why(events[-1])).lacks) == 1500
    assert len(str(why)) < 1500 * 200
    ev.trigger_event(events[0])
    ev()
    assert len(ev.why(events[-1]).chain) == 1500


@pytest.mark.stores("either")
def test_what_is_not_defined_is_refused_with_what_is_meant(flow):
    ev = flow()
    with pytest.raises(evr.DefinitionError, match="no step or event 'frist'; did you mean 'first'"):
        ev.why("frist")
    with pytest.raises(evr.TriggerError, match=r"1\.5"):
        ev.why("first", 1.5)
    with pytest.raises(evr.DefinitionError, match="as add_event returns it"):
        ev.why(7)


@pytest.fixture
def look(place):
    """Look at the store of a test as another program does."""
    stores = []

    def build(store=place.store):
        stores.append(Store(locate(store), Access.read))
        return History(stores[-1])

    yield build
    for store in stores:
        store.close()


def test_whoever_looks_at_a_store_is_told_the_same(flow, look):
    ev = flow()
    ev.trigger_event(ev._flow.events["begin"])
    ev()
    for what in ("first", "third", "begin", "both"):
        assert look().why((1, 0), what, 1) == ev.why(what, 1)
    ev.close()
    with pytest.raises(evr.DefinitionError, match="has no step or event 'four'"):
        look().why((1, 0), "four", 1)


def test_a_look_leaves_no_trace(flow, look, place):
    ev = flow()
    ev.trigger_event(ev._flow.events["begin"])
    ev()
    ev.close()
    before = place.content()
    history = look()
    assert [run.recoveries[0].status for run in history.runs()] == ["failed"]
    assert len(history.tasks(1, 0)) == 2
    assert place.content() == before


def test_a_store_is_seen_anew_at_each_look(make, look):
    make().close()
    history = look()
    assert len(history.runs()) == 1
    ev = make()
    assert [run.recoveries[0].status for run in history.runs()] == ["succeeded", "running"]
    ev.close()


@pytest.mark.stores("sqlite")
def test_a_store_that_is_made_read_only_can_be_looked_at(make, look, tmp_path):
    make().close()
    (tmp_path / "flow.db").chmod(0o444)
    assert len(look().runs()) == 1


@pytest.mark.stores("sqlite")
def test_a_log_that_a_crash_has_left_where_nothing_can_be_written_is_told(
    crashed, look, tmp_path, monkeypatch
):
    assert look(crashed).runs()[0].recoveries[0].status == "crashed"
    (tmp_path / "crashed.db-shm").unlink()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    with pytest.raises(evr.StoreError, match=r"has left the log .*crashed\.db-wal"):
        look(crashed)
    monkeypatch.undo()
    assert look(crashed).runs()[0].recoveries[0].status == "crashed"


@pytest.mark.parametrize(
    "damage", ["{}", "[1]", '{"events": [{"name": "a", "expr": [{"and": 2}]}]}']
)
def test_a_definition_that_eventor_has_not_written_is_told(flow, look, place, damage):
    ev = flow()
    ev.trigger_event(ev._flow.events["begin"])
    ev()
    ev.close()
    place.sql(f"UPDATE eventor_definition SET definition = '{damage}'")
    with pytest.raises(evr.StoreError, match="not one that eventor has written"):
        look().why((1, 0), "first", 1)


def test_a_run_is_told_by_how_it_has_ended(make, look):
    def run(*steps, handled=False, stopped=False, delay=0):
        with make() as ev:
            go = ev.add_event("go")
            for number, func in enumerate(steps):
                step = ev.add_step(str(number), func)
                ev.add_assoc(go, step, delay=delay)
                if handled:
                    ev.add_assoc(step.failure, go)
            ev.trigger_event(go)
            if stopped:
                ev.stop()
            ev()
        (recovery,) = look().runs()[-1].recoveries
        return recovery.status, recovery.tasks

    fails = (lambda: 1 / 0, int)
    assert run(int, int) == ("succeeded", evr.TaskCounts(success=2))
    assert run(*fails) == ("failed", evr.TaskCounts(ready=1, failure=1))
    assert run(*fails, handled=True) == ("succeeded", evr.TaskCounts(success=1, failure=1))
    assert run(int, stopped=True) == ("unfinished", evr.TaskCounts(ready=1))
    assert run(int, stopped=True, delay=9000) == ("unfinished", evr.TaskCounts())


@pytest.mark.stores("sqlite")
def test_a_run_whose_owner_has_died_has_crashed(crashed, look, tmp_path):
    (run,) = look(crashed).runs()
    (recovery,) = run.recoveries
    assert (run.name, recovery.owner, recovery.status) == ("daily", "dead", "crashed")
    assert (recovery.ended_at, recovery.tasks.active) == (None, 1)
    assert recovery.heard_at >= recovery.began_at
    assert recovery.program == str(tmp_path / "program.py")


@pytest.mark.stores("either")
def test_an_error_of_many_lines_is_told_by_its_first(make):
    ev = make(config={"stop_on_exception": False})
    go = ev.add_event("go")

    def fail():
        raise ValueError("first\nevent forged[1] (call)")

    bad = ev.add_step("bad", fail)
    ev.add_assoc(go, bad)
    ev.add_assoc(bad.success, ev.add_step("next", int))
    ev.trigger_event(go)
    ev()
    assert str(ev.why(bad)).endswith("step bad[1] (association go), failure: ValueError: first ...")
    assert str(ev.why("next")).endswith("step bad[1] failed: ValueError: first ...")
