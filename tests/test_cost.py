"""What a step costs, in statements and commits: counted, so that no machine's speed matters."""

import contextlib
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import event

from eventor.rules.plan import TaskEnded
from eventor.storage import sqlite
from eventor.types import Outcome, TaskStatus
from tests import places
from tests.conftest import on_sqlite

WRITES = ("INSERT", "UPDATE", "DELETE")


@contextlib.contextmanager
def counting(ev):
    """Count the commits of what writes, its statements by verb and table, and the rows they write.

    What only locks the row of a run counts as a hold, and not as a read.
    """
    counted = Counter()

    def heed(_connection, _cursor, statement, parameters, _context, many):
        words = statement.replace("INSERT INTO", "INSERT").replace("DELETE FROM", "DELETE").split()
        if words[0] in WRITES:
            counted[f"{words[0]} {words[1].removeprefix('eventor_')}"] += 1
            counted["rows"] += len(parameters) if many else 1
        elif words[0] == "SELECT":
            counted["holds" if statement.endswith(" UPDATE") else "reads"] += 1

    def commit(connection):
        options = connection.get_execution_options()
        counted["commits"] += options.get(sqlite.WRITING, not options.get("postgresql_readonly"))

    engine = ev._store.backend.engine
    event.listen(engine, "before_cursor_execute", heed)
    event.listen(engine, "commit", commit)
    try:
        yield counted
    finally:
        event.remove(engine, "before_cursor_execute", heed)
        event.remove(engine, "commit", commit)


@pytest.fixture
def holds(place):
    """Return by how many statements a transaction keeps others from writing to its run.

    In SQLite to begin it is enough: that locks the file.
    """
    return 0 if isinstance(place, places.File) else 1


@pytest.fixture
def cost(make, monkeypatch):
    """Return what `ev()` costs on a flow, for each step more."""
    # What a slow machine would do in between, as often as it is slow: a pid alone, a beat, a look.
    monkeypatch.setattr("eventor.loop._UNWRITTEN_WAIT", timedelta(days=1))

    def run(build, size, **config):
        unhurried = {"lease_seconds": 1_000_000, "sleep_between_loops": 1_000_000}
        ev = make(config={**unhurried, **config})
        ev.trigger_event(build(ev, size))
        with counting(ev) as counted:
            assert ev() is True
        return counted

    def per_step(build, **config):
        few, many = run(build, 5, **config), run(build, 25, **config)
        return Counter({name: (number - few[name]) / 20 for name, number in many.items()})

    return per_step


def chain(ev, length, func=lambda: None):
    events = [ev.add_event(f"e{number}") for number in range(length)]
    for number, one in enumerate(events):
        triggers = {"at_success": events[number + 1]} if number + 1 < length else {}
        ev.add_assoc(one, ev.add_step(f"s{number}", func=func, triggers=triggers))
    return events[0]


def chain_of_results(ev, length):
    return chain(ev, length, func=int)


def fan_out(ev, width):
    go = ev.add_event("go")
    ends = [ev.add_event(f"end {number}") for number in range(width)]
    for number, end in enumerate(ends):
        step = ev.add_step(f"s{number}", func=lambda: None, triggers={"at_success": end})
        ev.add_assoc(go, step)
    ev.add_assoc(ev.add_event("joined", expr=tuple(ends)), ev.add_step("last", func=int))
    return go


@pytest.mark.parametrize("most", [1, 3, None])
def test_a_step_of_a_chain_is_one_commit_of_four_statements(cost, holds, most):
    """The lease is renewed, one task has ended, an event was raised, the next task is created."""
    assert cost(chain, max_tasks_per_child=most) == Counter(
        {
            "commits": 1,
            "holds": holds,
            "UPDATE recovery": 1,
            "UPDATE task": 1,
            "INSERT event": 1,
            "INSERT task": 1,
            "rows": 4,
        }
    )


def test_a_result_is_one_statement_more(cost):
    more = Counter({"INSERT result": 1, "rows": 1})
    assert cost(chain_of_results) == cost(chain) + more


def test_a_step_of_a_fan_out_is_one_commit_of_four_statements(cost, holds):
    """The lease is renewed, one task has ended, an event was raised, the next task starts.

    All tasks were created in one pass, by one statement.
    """
    assert cost(fan_out) == Counter(
        {
            "commits": 1,
            "holds": holds,
            "UPDATE recovery": 1,
            "UPDATE task": 2,
            "INSERT event": 1,
            "rows": 5,
        }
    )


class Launcher:
    """Starts nothing; all that was given to it ends at once, after some waits."""

    busy = False

    def __init__(self, waits):
        self.waits, self.running = waits, []
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def shows(self, *, patient):
        return False

    overran = False

    def allow_until(self, until):
        """Do nothing."""

    def prepare(self):
        return None

    def start(self, key, _step, _attempt, _results):
        self.running.append(key)
        return 1

    def wait(self, _bell, seconds):
        self.waits -= 1
        self.now += timedelta(seconds=seconds)

    def collect(self):
        if self.waits > 0:
            return []
        ended, self.running = self.running, []
        return [TaskEnded(key, Outcome(TaskStatus.success, "None")) for key in ended]

    def hurry(self):
        return []

    withdraw = hurry

    def stock(self, wanted):
        """Do nothing, as what follows."""

    renew = finish = close = abandon = lambda self, *_: None


@pytest.fixture
def launcher(monkeypatch):
    launcher = Launcher(1)
    monkeypatch.setattr("eventor.eventor.Launcher", lambda *_: launcher)
    monkeypatch.setattr("eventor.eventor._now", lambda: launcher.now)
    monkeypatch.setattr("eventor.loop._UNWRITTEN_WAIT", timedelta(days=1))
    return launcher


def test_what_ends_together_is_one_commit(make, launcher, holds):
    ev = make(config={"max_concurrent": 50})
    ev.trigger_event(fan_out(ev, 50))
    with counting(ev) as counted:
        assert ev() is True
    # The trigger with the definition; 50 starts; 50 ends, and the start of the last; its end.
    assert counted["commits"] == 4
    assert counted["holds"] == 4 * holds
    assert counted["INSERT task"] == 2
    assert counted["INSERT event"] == 2
    assert counted["UPDATE task"] == 2


@pytest.mark.parametrize("store", [None, *on_sqlite(":memory:")])
@pytest.mark.parametrize("sleep", [1, 3])
def test_a_pass_without_changes_costs_the_lease_and_a_look_at_requests_now_and_then(
    make, launcher, holds, store, sleep
):
    def idle(waits):
        launcher.waits = waits
        ev = make(store, config={"lease_seconds": 30, "sleep_between_loops": sleep})
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", func=int))
        ev.trigger_event(go)
        with counting(ev) as counted:
            assert ev() is True
        return counted

    # Each second is a pass; of a lease of 30 seconds, each tenth is heard of. A store that other
    # processes can reach is read once in `sleep_between_loops`.
    short, long = idle(15), idle(75)
    long.subtract(short)
    looks = 60 / sleep if store is None else 0
    assert long == Counter(
        {"commits": 6, "holds": 6 * holds, "UPDATE recovery": 6, "rows": 6, "reads": looks}
    )


def test_what_waits_for_its_time_costs_no_more_than_what_runs(make, launcher, holds):
    def wait(seconds):
        launcher.waits = 0
        ev = make(config={"lease_seconds": 30})
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", func=int), delay=seconds)
        ev.trigger_event(go)
        with counting(ev) as counted:
            assert ev() is True
        counted["passes"] = -launcher.waits
        return counted

    short, long = wait(15.5), wait(75.5)
    long.subtract(short)
    written = {"commits": 6, "holds": 6 * holds, "UPDATE recovery": 6, "rows": 6}
    assert long == Counter({"passes": 60, "reads": 60, **written})
