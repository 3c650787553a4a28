"""The store under other hands: what other programs read, and what happens when it cannot write."""

import errno
import itertools
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import threading

import pytest
from sqlalchemy import event

import eventor as evr
from eventor.storage import sqlite
from tests import places, servers
from tests.conftest import on_sqlite, sql, statuses
from tests.test_cost import counting


def test_the_store_can_be_read_while_it_is_written(make, place):
    ev = make()
    go = ev.add_event("go")

    def look():
        return place.sql(
            "SELECT step, sequence, sequence_type, status, attempt, cause_kind, cause_source,"
            " ended_at FROM eventor_task",
        )

    ev.add_assoc(go, ev.add_step("look", func=look))
    ev.trigger_event(go, "7")
    assert ev() is True
    assert ev.tasks()[0].result == [
        ("look", "7", "str", "active", 1, "association", "go", None),
    ]


@pytest.mark.stores("sqlite")
def test_what_is_committed_is_on_the_disk_and_refers_to_what_is_there(make, place):
    ev = make()
    assert place.sql("PRAGMA journal_mode") == [("wal",)]
    with ev._store.backend.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


@pytest.mark.stores("postgresql")
@pytest.mark.parametrize(
    ("given", "kept"), [("off", "on"), ("local", "local"), ("remote_apply", "remote_apply")]
)
def test_who_commits_waits_for_the_disk_whatever_the_server_is_set_to(make, place, given, kept):
    ev = make(f"{place.store}&options=-csynchronous_commit%3D{given}")
    with ev._store.backend.engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == kept


def test_the_store_carries_its_version_owner_and_lineage(make, place):
    ev = make(name="mine")
    query = """SELECT name, recovery, based_on, owner_pid IS NULL
        FROM eventor_recovery, eventor_run ORDER BY recovery"""
    assert place.sql(query) == [("mine", 0, None, False)]
    ev.close()
    make(name="mine", run_mode="recover").close()
    assert place.sql(query) == [("mine", 0, None, True), ("mine", 1, 0, True)]
    assert place.sql("SELECT version FROM eventor_schema") == [(5,)]


UNDO = {
    4: (
        "DROP VIEW eventor_v_task",
        "DROP VIEW eventor_v_run",
        "ALTER TABLE eventor_recovery DROP COLUMN program",
        "ALTER TABLE eventor_recovery DROP COLUMN ended_at",
    ),
    3: (
        "ALTER TABLE eventor_task DROP COLUMN due_at",
        "ALTER TABLE eventor_task DROP COLUMN stdout",
        "ALTER TABLE eventor_task DROP COLUMN stderr",
        "DROP TABLE eventor_attempt",
        "DROP TABLE eventor_delay",
        "DROP TABLE eventor_request",
    ),
    2: (
        "ALTER TABLE eventor_recovery ADD COLUMN definition TEXT",
        "UPDATE eventor_recovery SET definition = (SELECT definition FROM eventor_definition)",
        "DROP TABLE eventor_definition",
    ),
    1: (
        "ALTER TABLE eventor_recovery DROP COLUMN keeper_pid",
        "ALTER TABLE eventor_recovery DROP COLUMN keeper_began",
    ),
}
"""What makes a store of the version before out of one that has no more than one recovery."""


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_store_of_an_earlier_version_is_brought_up_to_this_one(make, tmp_path, version):
    def build(**arguments):
        ev = make(**arguments)
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", func=int))
        return ev, go

    ev, go = build()
    ev.trigger_event(go)
    assert ev() is True
    ev.close()
    store = tmp_path / "flow.db"
    for undo in itertools.chain(*(UNDO[step] for step in (4, 3, 2, 1) if step >= version)):
        sql(store, undo)
    sql(store, f"UPDATE eventor_schema SET version = {version}")
    ev, go = build(run_mode=evr.RunMode.recover)
    ev.add_assoc(go, ev.add_step("another", func=int))
    assert ev.preview().drift[0] == "new step another"
    assert ev() is True
    assert [task.replay for task in ev.tasks()] == ["skip", None]
    assert sql(
        store, "SELECT version, keeper_pid IS NULL FROM eventor_schema, eventor_recovery"
    ) == [
        (5, 1 if version == 1 else 0),
        (5, 0),
    ]
    fresh = make(store=tmp_path / "fresh.db")._store.location.path
    columns = "SELECT t.name, c.name, c.type FROM sqlite_schema t, pragma_table_info(t.name) c"
    assert sorted(sql(store, columns)) == sorted(sql(fresh, columns))


@pytest.fixture
def impatient(place, monkeypatch):
    """Let no Eventor wait for long for a lock that another program holds."""
    if isinstance(place, places.File):
        monkeypatch.setattr(sqlite, "BUSY_SECONDS", 0.1)
    else:
        monkeypatch.setattr("eventor.storage.postgresql._LONGEST_LOCK_SECONDS", 0.05)
        # It would be past all leases before the second try.
        monkeypatch.setattr("eventor.storage.postgresql._FIRST_PAUSE", 1_000_000)


def lock(place):
    """Keep others from writing to a run, as another program would; return its connection."""
    if isinstance(place, places.File):
        connection = sqlite3.connect(place.store, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
    else:
        connection = servers.connect(place.server, place.name)
        connection.execute("SELECT * FROM eventor_run FOR UPDATE")
    return connection


@pytest.mark.usefixtures("impatient")
def test_a_lock_that_is_held_too_long_stops_the_run_and_loses_nothing(
    make, place, tmp_path, monkeypatch
):
    ran, held = tmp_path / "ran", []

    def build(**arguments):
        ev = make(**arguments)
        first, second = ev.add_event("first"), ev.add_event("second")
        ev.add_assoc(first, ev.add_step("lock", func=int, triggers={"at_success": second}))
        ev.add_assoc(second, ev.add_step("next", func=ran.touch))
        return ev, first

    ev, first = build()
    ev.trigger_event(first)
    record = ev._ledger.record

    def record_late(changes, now):
        if any(getattr(change, "outcome", None) for change in changes):
            held.append(lock(place))
        record(changes, now)

    monkeypatch.setattr(ev._ledger, "record", record_late)
    with pytest.raises(evr.EventorError, match="locked"):
        ev()
    assert not ran.exists()
    with pytest.raises(evr.UsageError, match="recover the run"):
        ev.trigger_event(first)
    held[0].rollback()
    held[0].close()
    ev.close()

    ev, _ = build(run_mode=evr.RunMode.recover)
    assert ev() is True
    assert ran.exists()
    assert [task.replay for task in ev.tasks()] == ["rerun", None]


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("empty_file", [False, True])
def test_many_programs_make_one_store_at_the_same_time(tmp_path, empty_file):
    """Each gets a run of its own, and what one of them made is never taken from the others."""
    fork = multiprocessing.get_context("fork")
    place, rounds, programs = tmp_path / "stores", 10, 8
    place.mkdir()
    if empty_file:
        for number in range(rounds):
            (place / f"{number}.db").touch()
    gate, made = fork.Barrier(programs), fork.Queue()

    def program():
        for number in range(rounds):
            gate.wait(30)
            try:
                with evr.Eventor(store=place / f"{number}.db", config={"logdir": tmp_path}) as ev:
                    made.put((number, ev.run_id))
            except Exception as error:
                made.put((number, repr(error)))

    processes = [fork.Process(target=program) for _ in range(programs)]
    for process in processes:
        process.start()
    got = {made.get(timeout=60) for _ in range(rounds * programs)}
    for process in processes:
        process.join()
    made.close()
    made.join_thread()
    assert got == {(n, run + 1) for n in range(rounds) for run in range(programs)}
    assert not [path for path in place.iterdir() if ".new" in path.name]


@pytest.mark.parametrize("store", [None, *on_sqlite(":memory:")])
def test_another_thread_reads_while_the_flow_runs(make, store):
    ev = make(store, config={"task_construct": threading.Thread})
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=lambda: [str(task.status) for task in ev.tasks()]))
    ev.trigger_event(go)
    assert ev() is True
    assert ev.tasks()[0].result == ["active"]


def test_triggers_that_were_never_run_are_recorded_at_the_close(make):
    with make() as ev:
        ev.trigger_event(ev.add_event("go"), 5)
    ev = make(run_mode=evr.RunMode.recover)
    ev.add_assoc(ev.add_event("go"), ev.add_step("s", func=int))
    assert ev() is True
    assert [task.sequence for task in ev.tasks(status="success")] == [5]


READER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(connection.execute("SELECT count(*) FROM eventor_run").fetchone()[0])
connection.close()
"""


@pytest.mark.stores("sqlite")
def test_eventors_side_by_side_keep_their_locks_on_the_store(make, tmp_path):
    """Else a reader would take itself for the last one, and remove the log when it leaves."""
    store = tmp_path / "flow.db"
    ev = make(name="one")
    make(name="two")
    with pytest.raises(evr.OwnershipError):
        make(name="one", run_mode=evr.RunMode.recover)

    def read():
        ran = subprocess.run(
            [sys.executable, "-c", READER, store], capture_output=True, text=True, check=True
        )
        return ran.stdout

    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("read", func=read))
    ev.trigger_event(go)
    assert ev() is True
    assert ev.tasks()[0].result == "2\n"
    assert (tmp_path / "flow.db-wal").exists()


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("suffix", ["-wal", "-shm"])
def test_a_new_store_is_not_made_beside_the_log_of_another(make, tmp_path, suffix):
    log = tmp_path / f"flow.db{suffix}"
    log.write_bytes(b"of another")
    with pytest.raises(evr.StoreError, match=f"flow.db does not exist, and .*flow.db{suffix} of"):
        make()
    assert log.read_bytes() == b"of another"
    assert not (tmp_path / "flow.db").exists()
    log.unlink()
    assert make().run_id == 1


@pytest.mark.stores("sqlite")
def test_a_store_may_be_named_by_links(make, tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "place/real.db")
    (tmp_path / "deep").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "place")
    for number, store in enumerate(["link.db", "place/real.db", "there/real.db"], 1):
        ev = make(tmp_path / store)
        assert ev.run_id == number
        assert ev() is True
    assert make(tmp_path / "there/../side.db").run_id == 1
    names = {path.name for path in tmp_path.rglob("*.db")}
    assert names == {"link.db", "real.db", "side.db"}
    assert (tmp_path / "side.db").exists()
    (tmp_path / "round.db").symlink_to("round.db")
    with pytest.raises(evr.StoreError, match=r"round.db cannot be looked at"):
        make(tmp_path / "round.db")


@pytest.mark.stores("sqlite")
def test_what_a_link_leads_to_is_left_as_it_is_if_it_is_no_store(make, tmp_path):
    other = sqlite3.connect(tmp_path / "other.db", isolation_level=None)
    other.execute("PRAGMA journal_mode = WAL")
    other.execute("CREATE TABLE theirs (x)")
    (tmp_path / "link.db").symlink_to("other.db")
    with pytest.raises(evr.StoreError, match="a SQLite database of something else"):
        make(tmp_path / "link.db")
    assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]
    other.close()


@pytest.mark.stores("sqlite")
def test_a_path_need_not_be_utf_8(make, tmp_path):
    store = os.fsencode(tmp_path) + b"/caf\xe9 %20?#.db"
    make(os.fsdecode(store)).close()
    assert make(os.fsdecode(store), run_mode=evr.RunMode.recover).recovery == 1
    assert store in {os.fsencode(path) for path in tmp_path.iterdir()}


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_store_is_made_where_files_have_one_name_only(make, tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, "no links here")

    monkeypatch.setattr("pathlib.Path.hardlink_to", refuse)
    make().close()
    assert make().run_id == 2
    assert not list(tmp_path.glob("*.new*"))


@pytest.mark.stores("sqlite")
def test_a_fault_while_a_store_is_made_leaves_nothing(make, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "no luck")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.hardlink_to", refuse)
        with pytest.raises(evr.StoreError, match=r"cannot be opened: .*no luck"):
            make()
    assert not list(tmp_path.glob("*.db*")) + list(tmp_path.glob("*.new*"))
    assert make().run_id == 1


@pytest.mark.stores("sqlite")
def test_a_store_that_another_eventor_has_just_migrated_is_refused(make, tmp_path, monkeypatch):
    make().close()
    check = sqlite.check_file

    def late(path, **arguments):
        check(path, **arguments)
        sql(path, "UPDATE eventor_schema SET version = 99")

    monkeypatch.setattr(sqlite, "check_file", late)
    with pytest.raises(evr.StoreError, match="schema version 99"):
        make()


def test_a_run_that_cannot_be_released_is_told_of(make, place, debug_log):
    ev = make()
    place.sql("ALTER TABLE eventor_recovery RENAME TO away")
    ev.close()
    assert "Others can recover run 1 once this program has ended" in debug_log()
    place.sql("ALTER TABLE away RENAME TO eventor_recovery")
    assert make(run_mode=evr.RunMode.recover).recovery == 1


def test_a_pass_is_recorded_whole_or_not_at_all(make, place):
    ev = make()
    go, then = ev.add_event("go"), ev.add_event("then")
    ev.add_assoc(go, ev.add_step("s", func=int, triggers={"at_success": then}))
    ev.add_assoc(then, ev.add_step("t", func=int))
    ev.trigger_event(go)
    seen = []

    def refuse(_connection, _cursor, statement, parameters, *_):
        if statement.startswith("UPDATE eventor_task") and "ended_at" in statement:
            seen.append(place.sql("SELECT count(*) FROM eventor_event"))
            statement = statement.replace("eventor_task", "no_luck")
        return statement, parameters

    event.listen(ev._store.backend.engine, "before_cursor_execute", refuse, retval=True)
    with pytest.raises(evr.StoreError, match="no_luck"):
        ev()
    event.remove(ev._store.backend.engine, "before_cursor_execute", refuse)
    # The event `then` was written before it was refused, in the same transaction.
    assert seen == [[(1,)]]
    assert [raised.event for raised in ev.events()] == ["go"]
    assert statuses(ev) == {"s[1]": "active"}


@pytest.mark.stores("sqlite")
def test_a_connection_that_cannot_be_settled_is_closed(tmp_path, monkeypatch):
    """Else it would be left to the garbage collector, and warned of."""
    made = []

    class Broken(sqlite3.Connection):
        def execute(self, *arguments):
            made.append(self)
            raise sqlite3.OperationalError("disk full")

    plain = sqlite3.connect
    monkeypatch.setattr(sqlite3.dbapi2, "connect", lambda *a, **k: plain(*a, **k, factory=Broken))
    with pytest.raises(evr.StoreError, match="disk full"):
        evr.Eventor(store=tmp_path / "flow.db")
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        made[0].cursor()


def test_a_commit_that_fails_leaves_nothing_open(make, place):
    ev = make()
    ev.trigger_event(ev.add_event("go"))
    # What refers to nothing is found at the end of a transaction.
    wrong = "INSERT INTO wrong VALUES (99)"
    place.sql(
        "CREATE TABLE wrong (version INTEGER"
        " REFERENCES eventor_schema (version) DEFERRABLE INITIALLY DEFERRED)",
        f"CREATE TRIGGER too AFTER INSERT ON eventor_event BEGIN {wrong}; END"
        if isinstance(place, places.File)
        else f"CREATE RULE too AS ON INSERT TO eventor_event DO ALSO {wrong}",
    )
    with counting(ev) as counted, pytest.raises(evr.StoreError, match=r"(?i)foreign key"):
        ev()
    assert counted["commits"] == counted["INSERT event"] == 1
    ev.close()
    assert place.sql("SELECT owner_pid FROM eventor_recovery") == [(None,)]
    assert place.sql("SELECT * FROM eventor_event") == []


def test_how_things_stand_is_counted_in_one_query(make):
    def build(**arguments):
        ev = make(config={"stop_on_exception": False}, **arguments)
        go, good = ev.add_event("go"), ev.add_event("good")
        triggers = {"at_success": good}
        ev.add_assoc(go, ev.add_step("odd", func=odd, args=(evr.sequence,), triggers=triggers))
        ev.add_assoc(good, ev.add_step("next", func=int))
        ev.trigger_events(go, range(1, 6))
        return ev

    def odd(number):
        assert number % 2 or recovered

    recovered = False
    ev = build()
    ev()
    counts = ev._store.count(ev.run_id, ev.recovery)
    assert counts.steps == {
        "odd": evr.TaskCounts(success=3, failure=2),
        "next": evr.TaskCounts(success=3),
    }
    assert counts.events == {"go": 5, "good": 3}
    ev.close()

    recovered = True
    ev = build(run_mode=evr.RunMode.recover)
    assert ev._store.count(ev.run_id, ev.recovery) == evr.Counts({}, {"go": 5})
    ev.run(max_loops=1)
    counts = ev._store.count(ev.run_id, ev.recovery)
    assert counts.steps["odd"] == evr.TaskCounts(skipped=3, success=1, ready=1)
    with counting(ev) as counted:
        ev._store.count(ev.run_id, ev.recovery)
    assert counted == {"reads": 1, "commits": 0}
