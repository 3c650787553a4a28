"""Data between steps: results as arguments of others, and read back."""

import collections
import copy
import inspect
import multiprocessing
import pickle
import pprint
import threading
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

import eventor as evr
from eventor.rules.data import placeholders, resolve
from tests.conftest import on_sqlite, wait_until
from tests.test_cost import counting

SPAWN = multiprocessing.get_context("spawn").Process

CONSTRUCTS = {
    "fork": {},
    "many": {"max_tasks_per_child": None},
    "spawn": {"task_construct": SPAWN},
    "spawned many": {"task_construct": SPAWN, "max_tasks_per_child": None},
    "threads": {"task_construct": threading.Thread},
}

each_construct = pytest.mark.parametrize(
    "config", [{}, *on_sqlite(*list(CONSTRUCTS.values())[1:])], ids=CONSTRUCTS
)


def echo(*args, **kwargs):
    return args, kwargs


def refuse():
    raise LookupError("not here")


class Tied:
    """Is pickled, and cannot be unpickled."""

    def __reduce__(self):
        return refuse, ()


class Flow:
    """Steps that follow each other, whether they end well or not."""

    def __init__(self, ev):
        self.ev = ev
        self.begin = self.event = ev.add_event("begin")

    def add(self, name, func, *args, **more):
        """Add a step after all others."""
        event = self.event
        self.event = self.ev.add_event(f"after {name}")
        triggers = {"at_complete": self.event}
        step = self.ev.add_step(name, func, args, triggers=triggers, **more)
        self.ev.add_assoc(event, step)
        return step

    def run(self, sequence=1):
        self.ev.trigger_event(self.begin, sequence)
        return self.ev()

    def error(self, step):
        (task,) = self.ev.tasks(step)
        return task.error


@each_construct
def test_a_result_is_an_argument_of_steps_that_follow(make, config):
    flow = Flow(ev := make(config=config))
    extract = flow.add("extract", divmod, 17, 5)
    pair = flow.add("pair", echo, extract.result, evr.sequence)
    load = flow.add(
        "load",
        echo,
        [extract.result, (1, {"deep": [pair.result]})],
        kwargs={"of": evr.sequence, "again": extract.result},
    )
    assert (extract.needs, pair.needs, load.needs) == ((), ("extract",), ("extract", "pair"))
    assert flow.run("monday") is True
    paired = (((3, 2), "monday"), {})
    assert ev.result(pair, "monday") == paired
    assert ev.result("load", "monday") == (
        ([(3, 2), (1, {"deep": [paired]})],),
        {"of": "monday", "again": (3, 2)},
    )


@pytest.mark.stores("either")
@pytest.mark.parametrize("construct", ["fork", "many", "spawned many"])
def test_a_result_that_cannot_be_unpickled_fails_the_step_that_needs_it(make, construct):
    flow = Flow(make(config=CONSTRUCTS[construct]))
    extract = flow.add("extract", Tied)
    load = flow.add("load", echo, [extract.result])
    assert flow.run() is True
    assert flow.error(load) == (
        "ResultError: step 'load' needs the result of extract[1], "
        "which cannot be unpickled here: LookupError: not here"
    )
    with pytest.raises(evr.ResultError, match=r"extract\[1\] cannot be unpickled here: LookupE"):
        flow.ev.result(extract, 1)


LACKING = {
    "failed": (lambda: 1 / 0, "failed"),
    "died": (lambda: refuse.missing, "failed"),
    "unpicklable": (threading.Lock, "could not be pickled"),
}


@pytest.mark.stores("either")
@pytest.mark.parametrize("lacking", LACKING)
def test_a_step_whose_argument_does_not_exist_fails_and_names_both(make, lacking):
    func, why = LACKING[lacking]
    flow = Flow(ev := make(config={"stop_on_exception": False}))
    extract = flow.add("extract", func)
    flow.add("load", echo, extract.result)
    last = flow.add("last", int)
    assert flow.run() is True  # since each failure is handled
    assert flow.error("load") == (
        f"ResultError: step 'load' needs the result of extract[1], which {why}"
    )
    assert ev.tasks("load")[0].pid is None
    assert ev.result(last, 1) == 0
    with pytest.raises(evr.ResultError, match=rf"no result of extract\[1\], which {why}"):
        ev.result(extract, 1)


def test_a_result_is_that_of_the_same_sequence_once_it_has_ended(make, place):
    ev = make(config={"stop_on_exception": False, "max_concurrent": 3})
    go, other, active = (ev.add_event(name) for name in ("go", "other", "active"))

    def outlast():
        # It is active in the pass in which `early` waits for its turn, and may end before the next.
        query = "SELECT status FROM eventor_task WHERE step = 'early'"
        wait_until(lambda: place.sql(query) == [("failure",)])

    extract = ev.add_step("extract", outlast, triggers={"at_active": active})
    never = ev.add_step("never", echo)
    for name, event, step in [
        ("early", active, extract),
        ("elsewhere", other, extract),
        ("alone", go, never),
    ]:
        ev.add_assoc(event, ev.add_step(name, echo, (step.result,)))
    ev.add_assoc(go, extract)
    ev.add_assoc(other, ev.add_step("late", echo))
    ev.trigger_event(go, "1")
    ev.trigger_event(other, 1)
    assert ev() is False
    assert {
        task.step: task.error.partition("result of ")[2] for task in ev.tasks() if task.error
    } == {
        "early": "extract[1], which still runs",
        "elsewhere": "extract[1], which has not run",
        "alone": "never[1], which has not run",
    }


def test_a_step_that_waits_for_its_turn_has_no_result_yet(make):
    flow = Flow(make(config={"stop_on_exception": False}))
    extract = flow.ev.add_step("extract", echo)
    load = flow.add("load", echo, extract.result)
    flow.ev.add_assoc(flow.begin, extract)
    assert flow.run() is True
    assert flow.error(load).endswith("the result of extract[1], which has not run yet")
    assert flow.ev.result(extract, 1) == ((), {})


def program(make, run_mode, fate, policy=None, **arguments):
    """Run a flow whose first step takes its fate from outside; return what the second got."""
    ev = make(run_mode=run_mode, config={"stop_on_exception": False}, **arguments)
    flow = Flow(ev)
    extract = flow.add("extract", fate, recovery=policy or {})
    flow.add("load", echo, extract.result, recovery={"complete": "rerun"})
    if run_mode == "restart":
        ev.trigger_event(flow.begin)
    ev()
    (first,), (task,) = ev.tasks("extract"), ev.tasks("load")
    ev.close()
    assert task.error is not None or task.result[0][0] == first.result
    return task.error or task.result[0][0]


def test_a_skipped_step_gives_the_result_with_which_it_ended_last(make):
    rerun, skip = {"success": "rerun", "failure": "skip"}, {"complete": "skip"}
    give = lambda value: lambda: value  # noqa: E731
    assert program(make, "restart", give(42)) == 42
    assert program(make, "recover", refuse) == 42
    assert program(make, "recover", give(43), rerun) == 43
    assert program(make, "recover", refuse, rerun).endswith("extract[1], which failed")
    assert program(make, "recover", refuse, skip) == 43
    assert program(make, "recover", give(None), rerun) is None
    assert program(make, "recover", refuse, skip) is None
    assert program(make, "recover", refuse, skip, recovery_run=0) == 42


def test_a_step_that_was_skipped_and_never_ended_well_has_none(make):
    assert program(make, "restart", refuse).endswith("which failed")
    told = program(make, "recover", refuse, {"failure": "skip"})
    assert told.endswith("needs the result of extract[1], which was skipped, and has none")


def test_a_result_is_read_back_along_the_line_of_recoveries(make):
    ev = make()
    flow = Flow(ev)
    step = flow.add("s", dict, recovery={"success": "rerun"})
    flow.run("a")
    ev.close()
    ev = make(run_mode="recover")
    flow = Flow(ev)
    step = flow.add("s", refuse, recovery={"success": "rerun"})
    assert ev.result(step, "a") == {}
    with pytest.raises(evr.ResultError, match=r"there is no result of s\[b\], which has not run"):
        ev.result("s", "b")
    assert ev() is True
    with pytest.raises(evr.ResultError, match=r"s\[a\], which failed"):
        ev.result(step, "a")
    for arguments, error in [
        (("x", 1), evr.DefinitionError),
        ((5, 1), evr.DefinitionError),
        ((step, 1.5), evr.TriggerError),
    ]:
        with pytest.raises(error):
            ev.result(*arguments)


def test_what_was_cut_short_has_no_result(make, place):
    flow = Flow(ev := make())
    step = flow.add("s", int)
    flow.run()
    ev.close()
    place.sql("UPDATE eventor_task SET status = 'active', result_id = NULL")
    ev = make(run_mode="recover")
    ev.add_step("s", int)
    with pytest.raises(evr.ResultError, match=r"no result of s\[1\], which was cut short"):
        ev.result(step.name, 1)


@pytest.mark.stores("sqlite")
def test_a_result_that_is_gone_from_the_store_is_an_error_of_the_store(make, place):
    """PostgreSQL lets nobody delete it; SQLite does, unless it is asked to look."""
    flow = Flow(ev := make())
    step = flow.add("s", dict)
    flow.run()
    place.sql("DELETE FROM eventor_result")
    with pytest.raises(evr.StoreError, match="result that was recorded is not there any more"):
        ev.result(step, 1)


@pytest.mark.parametrize("most", [1, None])
def test_results_may_be_large_and_many(make, most):
    ev = make(config={"max_tasks_per_child": most, "max_concurrent": 2})
    go = ev.add_event("go")
    large = ev.add_step(
        "large", bytes, (3_000_000,), triggers={"at_success": (at := ev.add_event("at"))}
    )
    ev.add_assoc(go, large)
    ev.add_assoc(at, ev.add_step("second", len, (large.result,)), ev.add_step("third", int))
    ev.trigger_event(go)
    assert ev() is True
    assert ev.result("second", 1) == 3_000_000


def test_more_results_than_a_statement_takes_values(make, place):
    flow = Flow(ev := make(config={"task_construct": threading.Thread}))
    steps = [ev.add_step(f"s{number}", int) for number in range(1_200)]
    flow.add("all", sum, [step.result for step in steps])
    ev.trigger_event(flow.begin)
    insert = (
        "INSERT INTO eventor_task (run_id, recovery, step, sequence, sequence_type, status,"
        " attempt, ready_at, cause_kind) VALUES "
    )
    result = place.blob(pickle.dumps(2))
    rows = ",".join(
        f"(1, 0, 's{n}', '1', 'int', 'success', 1, '2026-01-01 00:00:00', 'call')"
        for n in range(1_200)
    )
    place.sql(
        insert + rows,
        f"INSERT INTO eventor_result VALUES (9000, 'pickle', {result})",
        "UPDATE eventor_task SET result_id = 9000",
    )
    assert ev() is True
    assert ev.result("all", 1) == 2_400


@pytest.mark.stores("either")
def test_what_holds_no_placeholder_is_passed_as_it_is(make):
    """And what holds one more than once is made once; what was given stays as it was."""
    Point = collections.namedtuple("Point", "x y")  # noqa: PYI024
    flow = Flow(make(config={"task_construct": threading.Thread}))
    one = flow.add("one", dict)
    given = [["plain"], Point(one.result, 2), {"k": one.result}, (one.result,)]
    got = []
    flow.add("take", lambda *args: got.extend(args), *given, given[2], [[one.result]])
    assert flow.run() is True
    plain, point, mapping, pair, again, nested = got
    assert plain is given[0]
    assert point is given[1]
    assert repr(given[2]) == "{'k': <the result of step 'one'>}"
    assert mapping is again
    assert mapping == {"k": {}}
    assert mapping["k"] is pair[0] is nested[0][0]


@pytest.mark.stores("either")
def test_what_is_put_into_arguments_later_is_no_result_of_the_step(make):
    flow = Flow(make(config={"stop_on_exception": False}))
    one, two = flow.add("one", int), flow.add("two", int)
    late = [one.result]
    flow.add("take", echo, late)
    late.append(two.result)
    flow.run()
    assert flow.error("take").endswith(
        "result of two[1], which was put into its arguments after it was added"
    )


@pytest.mark.stores("either")
def test_what_cannot_be_resolved_is_refused(make):
    ev, other = make(), make(store=":memory:")
    own = ev.add_step("own", int)
    foreign = [other.add_step(name, int) for name in ("own", "else")]
    endless, deep = [own.result], own.result
    endless.append(endless)
    for _ in range(20_000):
        deep = [deep]
    for arguments, words in [
        ({"args": (foreign[0].result,)}, "step 's' is given <the result of step 'own'> of another"),
        ({"kwargs": {"a": [{1: foreign[1].result}]}}, "<the result of step 'else'> of another"),
        ({"args": (endless,)}, "arguments of step 's' .*nested too deeply, or contain themselves"),
        (
            {"args": (deep,)},
            "arguments of step 's' hold <the result of step 'own'>, and are nested",
        ),
    ]:
        with pytest.raises(evr.DefinitionError, match=words):
            ev.add_step("s", echo, **arguments)
    with pytest.raises(evr.DefinitionError, match="own'> cannot be in a set, nor a key of a dict"):
        ev.add_step("s", echo, ({own.result},))
    with pytest.raises(evr.DefinitionError, match=r"eventor\.sequence cannot be in a set"):
        ev.add_step("s", echo, ({evr.sequence: 1},))
    # What has none of them may be of any shape.
    endless[0], endless[1:] = 1, [endless]
    assert ev.add_step("s", echo, (endless,)).has_placeholders is False


@pytest.mark.stores("either")
def test_a_part_of_a_result_cannot_be_taken_before_it_is_there(make):
    step = make().add_step("own", dict)
    for placeholder, told in [
        (step.result, "<the result of step 'own'>"),
        (evr.sequence, "eventor.sequence"),
    ]:
        for take, part in [
            (lambda one: one["a"], "['a']"),
            (lambda one: one.rows, ".rows"),
            (lambda one: one.rows(), ".rows"),
            (lambda one: [*one], "[0]"),
            (lambda one: 1 in one, "[0]"),
        ]:
            with pytest.raises(evr.DefinitionError) as caught:
                take(placeholder)
            assert str(caught.value) == (
                f"{told} stands for the whole value, which is there only when a step runs that is "
                f"given it; take {part} of it in the function of that step"
            )


@pytest.mark.stores("either")
def test_who_looks_at_a_placeholder_finds_no_more_than_it_has(make):
    """As those do that copy, show or inspect what they do not know."""
    step = make().add_step("own", dict)
    for placeholder in (step.result, evr.sequence):
        for probed in ("rows", "__array__", "_repr_html_", "__deepcopy__", "__wrapped__"):
            assert not hasattr(placeholder, probed)
        with pytest.raises(AttributeError) as caught:
            _ = placeholder.__array__
        assert not isinstance(caught.value, evr.EventorError)
        assert inspect.unwrap(placeholder) is placeholder
        for same in (copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
            assert repr(same(placeholder)) == repr(placeholder)
        assert pprint.pformat([placeholder]) == f"[{placeholder!r}]"


@pytest.mark.stores("either")
def test_a_placeholder_is_copied_and_pickled_by_its_name(make):
    flow = Flow(ev := make())
    made = flow.add("made", lambda: 42)
    taken = flow.add("taken", echo, copy.deepcopy({"k": [made.result]}))
    assert taken.needs == ("made",)
    assert flow.run() is True
    assert ev.result(taken, 1) == (({"k": [42]},), {})
    assert pickle.loads(pickle.dumps(evr.sequence)) is evr.sequence
    with pytest.raises(evr.DefinitionError, match="of another Eventor"):
        make(store=":memory:").add_step("s", echo, (copy.copy(made.result),))


def test_a_change_of_the_results_that_a_step_takes_is_drift(make):
    def build(taken, **arguments):
        flow = Flow(make(config={"strict_recovery": True}, **arguments))
        one = flow.add("one", int)
        flow.add("two", echo, one.result if taken else 5)
        return flow

    flow = build(taken=False)
    flow.run()
    flow.ev.close()
    flow = build(taken=True, run_mode="recover")
    with pytest.raises(evr.RecoveryError, match=r'changed step two \(needs: null -> \["one"\]\)'):
        flow.ev()


def test_a_step_that_takes_results_reads_them_by_two_statements(make, monkeypatch):
    # What a slow machine would write in between: a pid alone.
    monkeypatch.setattr("eventor.loop._UNWRITTEN_WAIT", timedelta(days=1))

    def run(*args):
        flow = Flow(ev := make(store=":memory:", config={"lease_seconds": 1_000_000}))
        one = flow.add("one", dict)
        flow.add("two", echo, *(one.result if arg is None else arg for arg in args))
        with counting(ev) as counted:
            assert flow.run() is True
        return counted

    plain = run(1)
    assert run(evr.sequence)["reads"] == plain["reads"]
    assert run(None, None)["reads"] == plain["reads"] + 2
    assert run(None)["commits"] == plain["commits"]


STEPS = [evr.Step(f"s{n}", int, (), {}, {}, {}, None, None, (), False) for n in range(3)]
atoms = st.integers() | st.sampled_from([step.name for step in STEPS])
values = st.recursive(
    atoms,
    lambda parts: (
        st.lists(parts, max_size=3)
        | st.lists(parts, max_size=3).map(tuple)
        | st.dictionaries(st.integers(), parts, max_size=3)
    ),
    max_leaves=20,
)


def planted(value, stand_in):
    """Put something in the place of each step's name, naively."""
    if isinstance(value, str):
        return stand_in(value)
    if isinstance(value, dict):
        return {key: planted(part, stand_in) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(planted(part, stand_in) for part in value)
    return value


@given(values)
def test_placeholders_are_found_and_resolved_wherever_they_stand(value):
    results = {step.name: step.result for step in STEPS}
    given = planted(value, results.get)
    names = []
    expected = planted(value, lambda name: names.append(name) or name.upper())
    assert [found.step for found in placeholders([given])] == names
    assert resolve(given, lambda one: one.step.upper()) == expected


@pytest.mark.stores("either")
def test_a_result_in_a_text_is_refused_where_it_is_written(make):
    step = make().add_step("s", int)
    with pytest.raises(evr.DefinitionError, match=r"the result of step 's'> stands for the whole"):
        f"{step.result}.csv"
    assert repr(step.result) == f"{step.result!r}" == "<the result of step 's'>"
