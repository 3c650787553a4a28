"""A run that another program runs, watched from its store."""

import contextlib
import io
import itertools
import re
import shutil
import types

import pytest

import eventor as evr
from eventor.cli import commands as cli
from eventor.cli.watch import Watched, watch
from eventor.storage.backend import Access
from eventor.storage.history import History
from eventor.storage.location import locate
from eventor.storage.store import Store


@pytest.fixture
def look(place):
    """Look at stores, by default that of the Eventors that `make` made."""
    with contextlib.ExitStack() as stack:

        def read(store=place.store):
            found = Store(locate(store), Access.read)
            return History(stack.enter_context(contextlib.closing(found)))

        yield read


def test_what_is_told_in_a_pipe_does_nothing_to_a_terminal(make, look, place):
    def fail():
        raise ValueError("red \x1b[31m\x07\n  and \u202e\x9b more")

    ev = make(config={"stop_on_exception": False})
    begin = ev.add_event("begin")
    ev.add_assoc(begin, ev.add_step("fail", fail))
    ev.trigger_event(begin, "odd\x1b]0;title\x07")
    ev()
    ev.close()
    place.sql("UPDATE eventor_task SET step = step || '\x1b'")
    shown = io.StringIO()
    assert watch(look(), (1, 0), shown).status is evr.RunStatus.failed
    failed, ended = shown.getvalue().splitlines()
    assert failed == (
        r"failed: fail\x1b[odd\x1b]0;title\x07]: "
        r"ValueError: red \x1b[31m\x07 and \u202e\x9b more"
    )
    assert ended.startswith("eventor run 1.0: 1 failed in ")


def test_after_a_look_that_had_to_wait_for_the_store_the_next_is_not_far_off(
    make, look, monkeypatch
):
    ev = make()
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        ev.close()

    clock = itertools.count(step=20)
    time = types.SimpleNamespace(monotonic=lambda: next(clock), sleep=sleep)
    monkeypatch.setattr("eventor.cli.watch.time", time)
    watch(look(), (1, 0), io.StringIO())
    assert slept == [10]


@pytest.fixture
def worked(make):
    """Make a run that has worked, and whose owner lives."""

    def work():
        ev = make()
        begin = ev.add_event("begin")
        ev.add_assoc(begin, ev.add_step("work", int))
        ev.trigger_event(begin)
        ev()
        return ev

    return work


@pytest.fixture
def copied(worked, tmp_path):
    """Make a copy of the store of a run whose owner lives, as it is: with its log, or without."""

    def copy(*, logged=True):
        ev = worked()
        if not logged:
            ev.close()
        for part in tmp_path.glob("flow.db*"):
            shutil.copy(part, tmp_path / part.name.replace("flow", "copy"))
        return tmp_path / "copy.db"

    return copy


GONE = [
    f"DELETE FROM {table}"
    for table in ("eventor_event", "eventor_task", "eventor_definition", "eventor_recovery")
]


def where(place):
    """Return the name by which messages call a store."""
    return str(locate(place.store))


def files(path):
    return sorted(one.name for one in path.iterdir())


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("logged", [True, False])
def test_a_store_that_is_deleted_while_it_is_looked_at_is_told(copied, look, tmp_path, logged):
    store = copied(logged=logged)
    history = look(store)
    assert history.find() == (1, 0)
    store.unlink()
    before = files(tmp_path)
    with pytest.raises(evr.StoreError, match=r"copy\.db cannot read its runs: .*No such file"):
        history.at((1, 0))
    assert files(tmp_path) == before


@pytest.mark.stores("sqlite")
def test_a_store_that_is_replaced_while_it_is_looked_at_is_told(copied, look, make, tmp_path):
    history = look(store := copied())
    assert history.find() == (1, 0)
    make(tmp_path / "other.db").close()
    (tmp_path / "other.db").replace(store)
    with pytest.raises(evr.StoreError, match=r"copy\.db cannot read its runs: .*was replaced"):
        history.at((1, 0))


@pytest.mark.parametrize(
    ("statements", "told"),
    [
        (["UPDATE eventor_run SET began_at = '2020-02-02 02:02:02.000000'"], r"another run 1\.0"),
        (
            ["UPDATE eventor_recovery SET began_at = '2020-02-02 02:02:02.000000'"],
            r"another run 1\.0",
        ),
        (GONE, "no recovery 0 of run 1 any more"),
        ([*GONE, "DELETE FROM eventor_run"], "no recovery 0 of run 1 any more"),
    ],
)
def test_another_run_of_that_number_is_not_taken_for_the_same(
    worked, look, place, monkeypatch, statements, told
):
    worked()
    history = look()
    monkeypatch.setattr("eventor.cli.watch.time.sleep", lambda _seconds: place.sql(*statements))
    with pytest.raises(evr.StoreError, match=rf"the store {re.escape(where(place))} has {told}"):
        watch(history, (1, 0), io.StringIO())


@pytest.mark.stores("sqlite")
def test_the_command_ends_when_the_store_is_gone(copied, monkeypatch, capsys, tmp_path):
    store = copied()
    monkeypatch.setattr("eventor.cli.watch.time.sleep", lambda _seconds: store.unlink())
    assert cli.run(["watch", str(store)]) == 2
    assert re.fullmatch(r"eventor: the store .* cannot read .*\n", capsys.readouterr().err)
    assert not store.exists()


def test_a_look_reads_what_has_changed_and_knows_the_same_as_the_first(make, look, monkeypatch):
    def fail(number):
        assert number % 4

    def build(**arguments):
        ev = make(config={"stop_on_exception": False, "max_concurrent": 5}, **arguments)
        begin = ev.add_event("begin")
        tried = ev.add_step("tried", fail, (evr.sequence,), config={"max_attempts": 2})
        ev.add_assoc(begin, tried)
        ev.add_assoc(tried.success, ev.add_step("next", int))
        ev.trigger_events(begin, range(12))
        return ev

    with build() as ev:
        ev.run(max_loops=4)
    recovered = build(run_mode=evr.RunMode.recover)
    reading, read = History.briefs, []

    def briefs(history, *arguments):
        read.append(reading(history, *arguments))
        return read[-1]

    monkeypatch.setattr(History, "briefs", briefs)
    history = look()
    watched = Watched(history, (1, 1))
    while True:
        recovery, _ = watched.look()
        fresh = Watched(history, (1, 1))
        fresh.look()
        assert (
            watched.progress.steps == fresh.progress.steps == history.count(1, 1, live=False).steps
        )
        assert watched.progress.sequences.counts == fresh.progress.sequences.counts
        assert watched.progress.total == recovery.tasks
        if recovery.tasks.ended == recovery.tasks.all > 0:
            break
        recovered.run(max_loops=1)
    assert recovery.tasks.skipped
    assert recovery.tasks.failure
    assert len(read[-2]) < len(read[-1]) == recovery.tasks.all


def test_what_runs_is_known_with_its_attempt_and_its_begin(worked, look, place):
    worked()
    history = look()
    watched = Watched(history, (1, 0))
    place.sql("UPDATE eventor_task SET status = 'active', attempt = 2, ended_at = NULL")
    watched.look()
    (one,) = watched.progress.running
    assert (one.task, one.attempt) == ("work[1]", 2)
    assert [one.started_at for one in history.tasks(1, 0)] == [one.since]
    place.sql("UPDATE eventor_task SET status = 'ready'")
    watched.look()
    assert watched.progress.total == evr.TaskCounts(ready=1)
    assert watched.look()[1] == []
    place.sql(f"UPDATE eventor_task SET status = 'failure', error = 'E: {'x' * 2000}'")
    _, (active, failed) = watched.look()
    assert (active.kind, failed.kind) == ("task_active", "task_failure")
    assert len(failed.error) == 1000
    assert watched.progress.total == evr.TaskCounts(failure=1)
