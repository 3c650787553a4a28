"""The proof of durability: random flows, hit at every point, and recovered until they are done.

The Eventor, its loop and its store are the real ones. The clock is not, nor is the launcher: it
starts nothing, and ends what it was given in a random order. Meanwhile other processes trigger
events and ask for a stop, over a connection of their own. What a recovery should find is read
from the tables here, naively, and never asked of eventor. With `--proofs 1200` there are well over
100,000 flows.

On a server a connection may be lost, too, anywhere: then all goes on as if nothing had happened.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import pickle
import random
import sqlite3
from datetime import UTC, datetime, timedelta
from unittest import mock

import pytest
import sqlalchemy
from hypothesis import HealthCheck, given, settings

import eventor as evr
from eventor import eventor as facade
from eventor.attached import Attached
from eventor.rules.plan import TaskEnded
from eventor.storage import lease, owner, sqlite, store
from eventor.storage.backend import Access
from eventor.storage.ledger import Ledger
from eventor.storage.location import locate
from eventor.storage.rows import Answer
from eventor.types import Outcome, StoredResult, TaskStatus, failure, timed_out
from tests import places, servers
from tests.test_rules import DEFAULT, RESOURCES, cases, model, triggers_within

FLOWS, QUICK_FLOWS, FEW_FLOWS = 100, 60, 5
SWEPT_FLOWS = 1
POINTS = (4, 10, 30)
LEASE = 2.5


class Crash(BaseException):
    """The end of the owner, at a point at which it may come."""


class World:
    """What happens outside: which steps fail, how they end, and what hits the owner, and when.

    Args:
        database: where the store is.
    """

    def __init__(self, database):
        self.database = database
        self.store = database.place.store
        self.attached = Attached(store.Store(locate(self.store), Access.attach), "")
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.hits = collections.Counter()
        self.values = itertools.count()
        self.name = ""
        self.starts = []
        self.answers = collections.Counter()

    def begin_flow(self, name, case, requests):
        self.name, self.starts, self.case = name, [], case
        self.left_to_ask, self.asked = requests, 0
        ((self.asked_before,),) = self.database.rows(
            "SELECT coalesce(max(request_id), 0) FROM eventor_request"
        )
        self.attached._name = name
        self.printed = collections.defaultdict(set)

    def begin_life(self, dice, failing, stopping, incident, countdown):
        self.dice, self.incident, self.countdown = dice, incident, countdown
        self.failing, self.stopping = failing, stopping
        self.ev, self.hit, self.harmed = None, False, False
        self.database.losing = []
        self.running, self.attempts, self.arrived = {}, {}, []
        self.launching = False
        self.begin_call()

    def begin_call(self):
        """Begin a call of `ev()`; a request to stop, and a failure, hold for one."""
        self.asked_to_stop = False
        self.allowed = None
        self.withdrawn = {}
        self.stopped_before = len(self.requests("stopped"))

    def ask(self):
        """Be another process, which now and then asks something of the run."""
        if not self.left_to_ask or self.dice.random() > 0.2:
            return
        self.left_to_ask -= 1
        # There may be no run yet, or its flow may be known not to have that event.
        with contextlib.suppress(evr.RecoveryError, evr.DefinitionError):
            if self.dice.random() < 0.2:
                self.asked += self.attached.stop()
            else:
                event = self.dice.randrange(len(self.case.exprs) + 1)
                self.attached.trigger(f"e{event}", self.dice.choice([1, "1", 2]))
                self.asked += 1

    def requests(self, answer):
        """Return the triggers that had this answer: event, sequence, when made, where taken."""
        query = "SELECT event, sequence, sequence_type, recovery, taken_in" + OF_REQUESTS
        query += " AND request_id > ? AND coalesce(answer, '') = ?"
        found = self.rows(query, self.asked_before, answer or "")
        return [(event, typed(*sequence), made, taken) for event, *sequence, made, taken in found]

    def point(self, *, launching=False):
        """Be a point at which the owner may be hit.

        Args:
            launching: whether it has made sure that its run is its own, and is about to launch.
        """
        self.launching = launching
        self.ask()
        if self.countdown is None:
            return
        self.countdown -= 1
        needs_ev = self.incident in (stop, takeover)
        if self.countdown < 0 and not (needs_ev and self.ev is None):
            self.countdown, self.hit, self.harmed = None, True, self.incident is not lose
            self.hits[self.incident.__name__] += 1
            self.incident(self)

    def clock(self):
        return self.now

    def seconds(self):
        return self.now.timestamp()

    def rows(self, query, *values):
        return self.database.rows(query, self.name, *values)

    def recoveries(self):
        """Return the recoveries of the flow's run, and on which each is based."""
        return dict(self.rows("SELECT recovery, based_on" + OF_RUN + " ORDER BY recovery"))

    def line(self, recovery):
        """Return a recovery and those on which it is based, the latest first."""
        bases = self.recoveries()
        found = []
        while recovery is not None:
            found.append(recovery)
            recovery = bases[recovery]
        return found

    def tasks(self, recovery, what="status"):
        """Return the status of each task of a recovery, or something else of its row."""
        found = self.rows(
            f"SELECT step, sequence, sequence_type, {what}" + OF_TASKS + " AND recovery = ?",
            recovery,
        )
        return {(step, typed(*sequence)): value for step, *sequence, value in found}

    def result(self, step, sequence):
        """Return the result that a step has in this recovery, in a tuple; None if there is none."""
        here, *before = self.line(self.ev.recovery)
        if self.tasks(here).get((step, sequence)) != "success":
            return None
        for recovery in (here, *before):
            found = self.rows(
                "SELECT data FROM eventor_task JOIN eventor_run USING (run_id)"
                " LEFT JOIN eventor_result USING (result_id) WHERE name = ? AND step = ?"
                " AND sequence = ? AND sequence_type = ? AND recovery = ?"
                " AND status = 'success' AND coalesce(replay, '') <> 'skip'",
                *(step, str(sequence), type(sequence).__name__, recovery),
            )
            if found:
                return (None if found[0][0] is None else pickle.loads(found[0][0]),)
        return None

    def triggers_within(self, line):
        """Return what steps have triggered in these recoveries."""
        found = self.rows(
            "SELECT recovery, event, sequence, sequence_type FROM eventor_event"
            " JOIN eventor_run USING (run_id) WHERE name = ? AND cause_kind = 'step'"
        )
        return [(int(e[1:]), typed(*sequence)) for at, e, *sequence in found if at in line]

    def is_triggered(self, line):
        query = "SELECT recovery FROM eventor_event JOIN eventor_run USING (run_id) WHERE name = ?"
        return any(recovery in line for (recovery,) in self.rows(query))

    # What follows is what the loop knows of a launcher.

    busy = False

    def shows(self, *, patient):
        return False

    overran = False

    def allow_until(self, until):
        """Do nothing."""

    def prepare(self):
        self.point()

    def start(self, key, step, attempt, results):
        self.point(launching=True)
        task, recovery = (key.step, key.sequence), self.ev.recovery
        assert self.tasks(recovery)[task] == "active", "launched, and not recorded as active"
        assert self.allowed is None or task in self.allowed, "launched, and was not to be"
        needs = [f"s{index}" for index in self.case.needs[int(key.step[1:])]]
        taken = None if results is None else {name: (r.load(),) for name, r in results.items()}
        assert taken == ({name: self.result(name, key.sequence) for name in needs} or None)
        assert len(self.requests("stopped")) == self.stopped_before, "launched after a stop"
        assert self.tasks(recovery, "attempt")[task] == attempt
        self.attempts[task] = attempt
        self.allowed = None if self.allowed is None else ()
        self.starts.append((recovery, task, attempt))
        self.running[task] = key
        self.point()
        return 1

    def wait(self, bell, seconds):
        self.ask()
        ((heartbeat_at,),) = self.rows("SELECT max(heartbeat_at)" + OF_RUN)
        heard_of = self.database.heard_of(heartbeat_at, self.now)
        self.now += timedelta(seconds=self.dice.choice([seconds, self.dice.uniform(0, seconds)]))
        assert self.now - heard_of < timedelta(seconds=LEASE) or self.allowed is not None
        running = sorted(self.running, key=str)
        for task in self.dice.sample(running, self.dice.randint(0, min(1, len(running)))):
            self.arrived += triggers_within(self.case, self.running[task])
        for task in self.dice.sample(running, self.dice.randint(0, min(3, len(running)))):
            key = self.running.pop(task)
            value = self.dice.choice([None, next(self.values)])
            kept = None if value is None else StoredResult("pickle", pickle.dumps(value))
            good = Outcome(TaskStatus.success, "", kept)
            failed = (
                task[0] in self.failing
                or self.attempts[task] <= self.case.stumbles[int(task[0][1:])]
            )
            bad = self.dice.choice([failure("x"), timed_out(1, retriable=True)])
            printed = self.dice.choice([None, f"printed {value}"])
            self.printed[task, self.attempts[task]].add(printed)
            end = TaskEnded(key, dataclasses.replace(bad if failed else good, stdout=printed))
            self.arrived += [*triggers_within(self.case, key), end]

    def collect(self):
        if self.withdrawn:
            recovery = self.ev.recovery
            status, attempt = self.tasks(recovery), self.tasks(recovery, "attempt")
            for task, count in self.withdrawn.items():
                assert (status[task], attempt[task]) == ("ready", count)
        arrived, self.arrived = self.arrived, []
        failed = {
            end.task.step
            for end in arrived
            if isinstance(end, TaskEnded)
            and end.outcome.status == "failure"
            and self.is_last(end.task)
        }
        if self.asked_to_stop or failed & self.stopping:
            self.allowed = ()
        return arrived

    def is_last(self, task):
        return self.attempts[task] >= self.ev._flow.steps[task.step].config.max_attempts

    def hurry(self):
        return []

    def withdraw(self):
        waiting = sorted(self.running, key=str)
        waiting = self.dice.sample(waiting, self.dice.randint(0, len(waiting)))
        for task in waiting:
            self.starts.remove((self.ev.recovery, task, self.attempts[task]))
            self.withdrawn[task] = self.attempts[task] - 1
        return [self.running.pop(task) for task in waiting]

    def renew(self):
        """Do nothing: nothing is forked here."""

    def stock(self, wanted):
        """Do nothing, as `renew`."""

    def finish(self):
        """Do nothing, as `renew`."""

    def abandon(self, until=None):
        self.running.clear()

    def close(self):
        """Do nothing."""


OF_RUN = " FROM eventor_recovery JOIN eventor_run USING (run_id) WHERE name = ?"
OF_EVENTS = " FROM eventor_event JOIN eventor_run USING (run_id) WHERE name = ?"
OF_REQUESTS = " FROM eventor_request JOIN eventor_run USING (run_id) WHERE name = ?"
OF_TASKS = " FROM eventor_task JOIN eventor_run USING (run_id) WHERE name = ?"


def typed(sequence, kind):
    return int(sequence) if kind == "int" else sequence


def numbered(triggers):
    return [(int(event[1:]), sequence) for event, sequence, *_ in triggers]


def crash(world):
    """The owner dies."""
    world.allowed = ()
    raise Crash


def fault(world):
    """The store fails; what was written just before is there all the same."""
    world.allowed = ()
    raise evr.StoreError("out of order")


def stop(world):
    """Something asks the flow to stop."""
    world.ev.stop()
    world.asked_to_stop = True


def takeover(world):
    """The owner hangs for longer than its lease, and a recovery begins on another host."""
    here = world.tasks(world.ev.recovery)
    active = [task for task, status in here.items() if status == "active"]
    world.allowed = active if world.launching else ()
    world.now += timedelta(seconds=LEASE)
    world.database.age(world.ev.run_id, LEASE)
    mode = world.dice.choice(["recover", "continue"])
    with mock.patch.object(owner, "is_running", return_value=None):  # as seen from elsewhere
        die(evr.Eventor(world.name, world.store, mode, logging_level=100, config=QUIET))


def lose(world):
    """Soon connections are lost, of the owner or of who asks something of it, and those after."""
    dice, losses = world.dice, world.database.LOSSES
    world.database.losing = [(dice.choice(losses), dice.randrange(dice.choice(POINTS)))]
    while dice.random() < 0.3:
        world.database.losing.append((dice.choice(losses), dice.randrange(3)))


QUIET = {"logdir": "/nonexistent"}


class OnFile:
    """A SQLite file, and a connection that reads it.

    Args:
        place: the file.
        monkeypatch: pytest's.
    """

    INCIDENTS = (crash, crash, fault, stop, takeover)
    LOSSES = ()

    def __init__(self, place, monkeypatch):
        self.place = place
        self.lost = collections.Counter()
        self._plain = sqlite.open_engine
        self._patch = functools.partial(monkeypatch.setattr, sqlite, "open_engine")
        self._patch(self._open)

    def read(self):
        self._reader = sqlite3.connect(self.place.store, isolation_level=None)
        # A life opens its own; that it need not compile its statements again saves hours.
        self._patch(functools.cache(self._open))

    def rows(self, query, *values):
        return self._reader.execute(query, values).fetchall()

    def age(self, _run_id, _seconds):
        """Do nothing: a lease is counted by the clock of the world."""

    def heard_of(self, heartbeat_at, _now):
        """Return when an owner was heard of, by the clock of the world."""
        return datetime.fromisoformat(heartbeat_at).replace(tzinfo=UTC)

    def close(self):
        self._reader.close()

    def _open(self, path):
        """Return an engine that does not wait for the disk: whatever dies here, that does not."""
        engine = self._plain(path)

        @sqlalchemy.event.listens_for(engine, "connect")
        def settle(connection, _record):
            connection.execute("PRAGMA synchronous = OFF")

        return engine


class OnServer:
    """A schema of a PostgreSQL server, a connection that reads it, and what cuts those to it.

    Args:
        place: the schema.
        monkeypatch: pytest's.

    Attributes:
        losing: where connections are lost next, of `LOSSES`, and how often they are there before.
        lost: how many were lost, by where.
    """

    INCIDENTS = (*OnFile.INCIDENTS, lose, lose)
    LOSSES = ("before a statement", "before a commit", "after a commit")

    def __init__(self, place, monkeypatch):
        from eventor.storage import postgresql

        self.place = place
        self.losing = []
        self.lost = collections.Counter()
        self._beat = None, None
        self._plain = postgresql._open_engine
        self._engines, self._settings = {}, {}
        monkeypatch.setattr(postgresql, "_open_engine", self._open)

    def read(self):
        self._reader = servers.connect(self.place.server, self.place.name)
        self._reader.autocommit = True

    def rows(self, query, *values):
        found = self._reader.execute(query.replace("?", "%s"), values)
        return found.fetchall() if found.description else []

    def age(self, run_id, seconds):
        """Let the lease of a run be older: the server counts it by a clock that nobody moves."""
        self.rows(
            "UPDATE eventor_recovery SET heartbeat_at = heartbeat_at - make_interval(secs => ?)"
            " WHERE run_id = ?",
            *(seconds, run_id),
        )

    def heard_of(self, heartbeat_at, now):
        """Return when an owner was heard of; if that is new, time has stood still since."""
        if self._beat[0] != heartbeat_at:
            self._beat = heartbeat_at, now
        return self._beat[1]

    def close(self):
        self._reader.close()

    def _open(self, location, _patience, _to_connect, settings):
        """Return an engine, which keeps no connection, but its statements as they are compiled."""
        which = (location, *settings.__self__._seconds.items())
        self._settings[which] = settings
        if which not in self._engines:
            patience = functools.partial(float, servers.SECONDS)
            told = functools.partial(self._told, which)
            engine = self._engines[which] = self._plain(location, patience, patience, told)
            sqlalchemy.event.listen(engine, "before_cursor_execute", self._before_statement)
            sqlalchemy.event.listen(engine, "commit", self._before_commit)
        return self._engines[which]

    def _told(self, which):
        """Return what who has opened last asks for, of those who ask for the same."""
        return self._settings[which]()

    def _before_statement(self, connection, *_):
        if self._is_due("before a statement"):
            self._end(connection)

    def _before_commit(self, connection):
        if connection.get_execution_options()["postgresql_readonly"]:
            return
        if self._is_due("before a commit"):
            self._end(connection)
        elif self._is_due("after a commit"):
            driven = connection.connection.dbapi_connection
            driven.commit()
            self._end(connection)
            driven.close()  # else it would send nothing more, and not notice

    def _is_due(self, where):
        if not self.losing or self.losing[0][0] != where:
            return False
        _, left = self.losing.pop(0)
        if left:
            self.losing.insert(0, (where, left - 1))
            return False
        self.lost[where] += 1
        return True

    def _end(self, connection):
        pid = connection.connection.dbapi_connection.info.backend_pid
        self.rows("SELECT pg_terminate_backend(?)", pid)


@pytest.fixture
def world(place, tmp_path, monkeypatch):
    database = (OnFile if isinstance(place, places.File) else OnServer)(place, monkeypatch)
    with evr.Eventor(store=place.store, config={"logdir": tmp_path}):
        world = World(database)
    database.read()
    monkeypatch.setitem(QUIET, "logdir", tmp_path)
    monkeypatch.setattr("eventor.eventor.Launcher", lambda *_: world)
    monkeypatch.setattr("eventor.eventor._now", world.clock)
    monkeypatch.setattr("eventor.attached._now", world.clock)
    # Nobody's patience ends while it stands still, so nothing depends on the machine's speed.
    monkeypatch.setattr(lease, "clock", world.seconds)
    for kind, name in (
        (facade, "begin_run"),
        (facade, "begin_recovery"),
        (facade, "continue_run"),
        (Ledger, "record"),
        (Ledger, "define"),
        (Ledger, "results"),
        (Ledger, "release"),
        (Ledger, "requests"),
    ):
        plain = getattr(kind, name)

        def pointed(*arguments, plain=plain, launching=name == "results"):
            world.point(launching=launching)
            done = plain(*arguments)
            world.point(launching=launching)
            return done

        monkeypatch.setattr(kind, name, pointed)
    read = Ledger.results

    def checked(ledger, steps, sequence):
        found = read(ledger, steps, sequence)
        there = {name for name, result in found.items() if isinstance(result, StoredResult)}
        assert there == {name for name in steps if world.result(name, sequence) is not None}
        return found

    monkeypatch.setattr(Ledger, "results", checked)
    yield world
    database.close()
    world.attached.close()


def build(case, ev):
    def tree(expr):
        if isinstance(expr, int):
            return ev_events[expr]
        return (evr.and_ if expr[0] == "and" else evr.or_)(*map(tree, expr[1]))

    ev_events = []
    for index, expr in enumerate(case.exprs):
        ev_events.append(ev.add_event(f"e{index}", None if expr is None else tree(expr)))
    steps = []
    definitions = zip(case.triggers, case.policies, case.configs, case.needs, strict=True)
    for index, (triggers, policy, config, needs) in enumerate(definitions):
        step = ev.add_step(
            f"s{index}",
            int,
            args=tuple(steps[needed].result for needed in needs),
            triggers={key: [ev_events[e] for e in found] for key, found in triggers.items()},
            recovery=policy,
            config=config,
        )
        steps.append(step)
    for event, kind, target, delay in case.assocs:
        targets = ev_events if kind == "event" else steps
        ev.add_assoc(ev_events[event], targets[target], delay=delay)
    return ev_events


def die(ev):
    """Let go of an Eventor as a death of its process would: nothing more is written."""
    ev._release.detach()
    owner.disclaim(ev._ledger._claim)
    ev._store.close()
    ev._journal.close()


def policy_of(case, task):
    return {**DEFAULT, **case.policies[int(task[0][1:])]}


def check_starts(case, world, recovery, left):
    """What was started was asked to run by its policy, once an attempt, and no more than it may."""
    started = [start for start in world.starts if start[0] == recovery]
    assert len(started) == len(set(started))
    for _recovery, task, _attempt in started:
        assert task not in left or policy_of(case, task)[left[task]] == "rerun"
    line = world.line(recovery)
    along = collections.Counter(task for number, task, _attempt in world.starts if number in line)
    for task, count in along.items():
        policy = policy_of(case, task)
        never_again = {policy[status] for status in ("active", "success", "failure")} == {"skip"}
        most = case.configs[int(task[0][1:])].get("max_attempts", 1)
        assert count <= most or not never_again, f"{task} had to run at most {most} times"


def ended(world, recovery):
    """Return how the tasks of a recovery have ended, of those that have, as the model tells it."""
    replays = world.tasks(recovery, "replay")
    return {
        (int(step[1:]), sequence): "skipped" if replays[step, sequence] == "skip" else status
        for (step, sequence), status in world.tasks(recovery).items()
        if status in ("success", "failure")
    }


def lacking(ev):
    """Return the tasks that failed for want of a result."""
    failed = ev.tasks(status="failure")
    return {(int(t.step[1:]), t.sequence) for t in failed if t.error.startswith("ResultError")}


def check_whole(case, world, left, before, triggered, ev):
    """A recovery that came to its end did what the naive model expects."""
    line = world.line(ev.recovery)
    asked = [trigger for trigger in world.requests("raised") if trigger[-1] in line]
    now = dataclasses.replace(
        case,
        calls=[*case.calls, *numbered(asked), *triggered],
        lacking=lacking(ev),
        fails=[f"s{index}" in world.failing for index in range(len(case.fails))],
        left={(int(step[1:]), sequence): status for (step, sequence), status in left.items()},
        fixed=before,
    )
    raised, expected = model(now)
    assert ended(world, ev.recovery) == expected
    assert [task.attempt for task in ev.tasks()] == [
        task.attempts[-1].number if task.attempts else 0 for task in ev.tasks()
    ]
    for task in ev.tasks():
        numbers = [attempt.number for attempt in task.attempts]
        assert numbers == list(range(1, task.attempt + 1))
        for attempt in task.attempts:
            called = attempt.ended_at and not (attempt.error or "").startswith("ResultError")
            # One that is skipped may have ended in attempts before it was continued, or nowhere.
            if called and not (task.replay == "skip" and attempt.stdout is None):
                printed = world.printed[(task.step, task.sequence), attempt.number]
                assert attempt.stdout in printed
            else:
                assert attempt.stdout is None
        assert task.stdout == (task.attempts[-1].stdout if task.attempts else None)
    events = [(int(event.event[1:]), event.sequence) for event in ev.events()]
    assert collections.Counter(events) == collections.Counter(raised)


def done_so_far(world, recovery):
    """Return what a recovery has started, skipped, and raised again."""
    replays = world.tasks(recovery, "replay")
    again = world.rows(
        "SELECT event, sequence, sequence_type FROM eventor_event JOIN eventor_run USING (run_id)"
        " WHERE name = ? AND recovery = ? AND cause_kind = 'recovery'",
        recovery,
    )
    return (
        {(task, attempt) for number, task, attempt in world.starts if number == recovery},
        {task for task, _end in ended(world, recovery).items() if replays[named(task)] == "skip"},
        {(event, typed(*sequence)) for event, *sequence in again},
    )


def named(task):
    return (f"s{task[0]}", task[1])


def check_requests(case, world):
    """In the end each request was taken up once, and had the answer that it should."""
    assert not world.requests(None)
    ((count,),) = world.rows(
        "SELECT count(*)" + OF_REQUESTS + " AND request_id > ?", world.asked_before
    )
    assert count == world.asked
    query = "SELECT event, sequence, sequence_type, recovery" + OF_EVENTS
    raised = {
        kind: collections.Counter(
            (event, typed(*sequence), recovery)
            for event, *sequence, recovery in world.rows(query + " AND cause_kind LIKE ?", kind)
        )
        for kind in ("%", "process")
    }
    of_requests = collections.Counter(
        (event, sequence, taken_in) for event, sequence, _, taken_in in world.requests("raised")
    )
    assert of_requests == raised["process"]
    for event, sequence, _, taken_in in world.requests("raised before"):
        assert (event, sequence, taken_in) in raised["%"]
    assert all(event == len(case.exprs) for event, _ in numbered(world.requests("refused")))
    assert all(made_in == taken_in for *_, made_in, taken_in in world.requests("stopped"))
    assert all(made_in <= taken_in for *_, made_in, taken_in in world.requests("too late"))
    for answer in Answer:
        world.answers[answer] += len(world.requests(answer))


def check_preview(world, ev, preview, before):
    """What was foreseen of one call of `ev()` is what it did, but for what no rule tells."""
    if lacking(ev) or any(event.cause.kind == "step" for event in ev.events()):
        return
    started, skipped, again = (
        now - then for now, then in zip(done_so_far(world, ev.recovery), before, strict=True)
    )
    for seen, foreseen in (
        ({task for task, _attempt in started}, [(t.step, t.sequence) for t in preview.runs]),
        (set(map(named, skipped)), [(t.step, t.sequence) for t in preview.skips]),
        (again, [(t.event, t.sequence) for t in preview.triggers]),
    ):
        assert sorted(seen, key=str) == sorted(foreseen, key=str)


def unhandled(case):
    """Return the steps whose failure stops the flow, where failures do."""
    return {
        f"s{index}"
        for index, triggers in enumerate(case.triggers)
        if not triggers.keys() & {"at_failure", "at_complete"}
    }


class Life:
    """One program: an Eventor over a flow, from its beginning to its end, good or bad."""

    def __init__(self, case, world, dice, *, stops):
        self.case, self.world, self.dice, self.stops = case, world, dice, stops

    def live(self):
        """Live, and tell whether all was done."""
        bases = self.world.recoveries()
        arguments = {}
        base, before = max(bases, default=None), {}
        line = [] if base is None else self.world.line(base)
        bases_of_left = line
        if bases:
            mode = arguments["run_mode"] = evr.RunMode(self.dice.choice(["recover", "continue"]))
            if mode is evr.RunMode.continue_:
                bases_of_left = line[1:]
                before = ended(self.world, base) | self.interrupted(base)
            elif self.dice.random() < 0.2:
                base = arguments["recovery_run"] = self.dice.choice(list(bases))
                bases_of_left = line = self.world.line(base)
        left = {}
        for recovery in reversed(bases_of_left):
            left |= self.world.tasks(recovery)
        triggered = self.world.triggers_within(line)
        config = {
            **QUIET,
            "max_concurrent": self.case.limit,
            "stop_on_exception": self.stops,
            "strict_recovery": True,
            "lease_seconds": LEASE,
            "resources": RESOURCES,
            "linger": self.dice.choice([0, 0, 1]),
        }
        name, path = self.world.name, self.world.store
        try:
            ev = evr.Eventor(name, path, logging_level=100, config=config, **arguments)
        except (Crash, evr.StoreError):
            assert self.world.harmed
            owner._claims.clear()
            return False
        self.world.ev = ev
        with contextlib.ExitStack() as stack:
            stack.callback(die, ev)
            try:
                # A program that finds its triggers recorded need not raise them again.
                again = not self.world.is_triggered(line) or self.dice.random() < 0.3
                done = self.run(ev, left, before, triggered, again=again)
                ev.close()
            except (Crash, evr.StoreError, evr.OwnershipError):
                assert self.world.harmed
                done = False
            check_starts(self.case, self.world, ev.recovery, left)
        return done

    def depends_on_time(self):
        """Tell whether the order in which tasks end is not that in which they start."""
        retried = any(config.get("max_attempts", 1) > 1 for config in self.case.configs)
        return self.case.limit > 1 or retried or any(assoc[3] for assoc in self.case.assocs)

    def interrupted(self, recovery):
        """Return the tasks that count as a success when a recovery is continued, if any."""
        return {
            (int(step[1:]), sequence): "skipped"
            for (step, sequence), status in self.world.tasks(recovery).items()
            if status == "active" and policy_of(self.case, (step, sequence))["active"] == "skip"
        }

    def run(self, ev, left, before, triggered, *, again):
        events = build(self.case, ev)
        if again:
            for event, sequence in self.case.calls:
                ev.trigger_event(events[event], sequence)
        asked, preview = self.world.asked, ev.preview(self.world.failing)
        so_far = done_so_far(self.world, ev.recovery)
        whole = ev()
        undisturbed = not self.world.harmed and self.world.asked == asked
        # Where a failure stops the flow, it matters which step ends first; else it does not.
        if undisturbed and not (self.stops and self.depends_on_time()):
            check_preview(self.world, ev, preview, so_far)
        while ev.tasks(status="ready") or ev._plan.delayed:
            assert not whole
            if self.dice.random() < 0.5:
                return False
            self.world.begin_call()
            whole = ev()
        check_whole(self.case, self.world, left, before, triggered, ev)
        return True


def live(case, world, name, first=None):
    """Run a flow to its end, through incidents.

    Args:
        case: the flow.
        world: where it runs.
        name: the name of its run.
        first: what hits its first life, and at which of its points.

    Returns:
        Whether its first life was hit.
    """
    dice = random.Random(case.seed)
    world.begin_flow(name, case, dice.randrange(8))
    incidents = collections.deque([first] if first else [])
    for _ in range(dice.randrange(1, 5)):
        incidents.append(
            (dice.choice(world.database.INCIDENTS), dice.randrange(dice.choice(POINTS)))
        )
    hits, done = [], False
    while not done:
        failing = {
            f"s{index}" for index, fails in enumerate(case.fails) if fails and dice.random() < 0.6
        }
        stops = dice.random() < 0.3
        incident, countdown = incidents.popleft() if incidents else (None, None)
        stopping = unhandled(case) if stops else set()
        world.begin_life(dice, failing, stopping, incident, countdown)
        whole = Life(case, world, dice, stops=stops).live()
        hits.append(world.hit)
        done = whole and incident is None and not world.requests(None)
    check_requests(case, world)
    return hits[0]


def simulate(world, flows, live_through):
    counter = itertools.count()

    @settings(
        max_examples=flows,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def check(case):
        live_through(case, counter)

    check()
    hits = ", ".join(f"{count} of {name}" for name, count in sorted(world.hits.items()))
    answers = ", ".join(f"{count} {answer}" for answer, count in sorted(world.answers.items()))
    print(f"\nsimulated {next(counter)} flows with {world.hits.total()} hits: {hits}")
    print(f"and {world.answers.total()} requests: {answers}")
    lost = ", ".join(f"{count} {where}" for where, count in sorted(world.database.lost.items()))
    print(f"and {world.database.lost.total()} connections lost: {lost}")
    assert all(world.hits[incident.__name__] for incident in world.database.INCIDENTS)


def proofs(world, request):
    """Return how often to prove it; once, on a server, is left to the few flows of a quick test."""
    times = request.config.getoption("--proofs")
    if times == 1 and isinstance(world.database, OnServer):
        pytest.skip("a flow takes longer on a server: say --proofs 2 or more")
    return times


def check_what_came(world):
    """All came that may, so that something was shown of it."""
    assert world.answers[Answer.raised]
    assert world.answers[Answer.stopped]
    assert world.database.lost.keys() == set(world.database.LOSSES)


@pytest.mark.stores("either")
@pytest.mark.timeout(36_000)
@pytest.mark.slow
@pytest.mark.no_cover
def test_whatever_hits_the_owner_nothing_is_lost_and_nothing_done_twice(world, request):
    def live_through(case, counter):
        live(case, world, str(next(counter)))

    flows = FLOWS * proofs(world, request)
    simulate(world, flows, live_through)
    assert world.hits.total() > flows
    check_what_came(world)


@pytest.mark.no_cover
@pytest.mark.stores("sqlite")
@pytest.mark.once
@pytest.mark.timeout(600)
def test_what_may_hit_the_owner_hits_it_somewhere(world):
    simulate(world, QUICK_FLOWS, lambda case, counter: live(case, world, str(next(counter))))
    check_what_came(world)


@pytest.mark.no_cover
@pytest.mark.stores("postgresql")
@pytest.mark.once
@pytest.mark.timeout(600)
def test_what_may_hit_an_owner_hits_one_on_a_server(world):
    def live_through(case, counter):
        for incident in dict.fromkeys(world.database.INCIDENTS):
            point = random.Random(case.seed).randrange(2, 8)
            live(case, world, str(next(counter)), (incident, point))

    simulate(world, FEW_FLOWS, live_through)


@pytest.mark.stores("either")
@pytest.mark.timeout(36_000)
@pytest.mark.slow
@pytest.mark.no_cover
def test_it_is_hit_at_every_point_of_its_first_life(world, request):
    def live_through(case, counter):
        for incident in dict.fromkeys(world.database.INCIDENTS):
            for point in itertools.count():
                if not live(case, world, str(next(counter)), (incident, point)):
                    break

    simulate(world, SWEPT_FLOWS * proofs(world, request), live_through)
    check_what_came(world)
