"""Stores in PostgreSQL: a server that is killed, connections that are lost, owners elsewhere.

What PostgreSQL has in common with SQLite is tested where that is; the fixture `place` is both.
"""

import itertools
import random
import re
import shutil
import signal
import socket
import threading
from datetime import UTC, datetime, timedelta

import psutil
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

import eventor as evr
from eventor.cli import commands as cli
from eventor.storage import postgresql
from tests import places, servers
from tests.conftest import wait_until

pytestmark = pytest.mark.stores("postgresql")

LANES, LENGTH = 2, 20
STEPS = {f"s{lane}.{number}" for lane in range(LANES) for number in range(LENGTH)}

PROGRAM = f"""
import os, sys, time
import eventor as evr
from eventor.storage import owner

mode, lease, host = sys.argv[1:]
if host:
    owner._place = lambda: host

def step(name):
    with open("log", "a") as file:
        file.write(f"{{name}}\\n")
    time.sleep(0.01)

def hold(name):
    step(name)
    while not os.path.exists("go on"):
        time.sleep(0.005)

config = {{"logdir": ".", "lease_seconds": float(lease), "max_concurrent": {LANES}}}
with evr.Eventor("lanes", os.environ["STORE"], mode, config=config) as ev:
    go = ev.add_event("go")
    for lane in range({LANES}):
        before = go
        for number in range({LENGTH}):
            held = "HOLD" in os.environ and (lane, number) == (0, 5)
            name = f"s{{lane}}.{{number}}"
            now = ev.add_step(name, hold if held else step, (name,))
            ev.add_assoc(before, now)
            before = now.success
    ev.trigger_event(go, 1)
    sys.exit(not ev())
"""


@pytest.fixture(scope="module")
def shared_server():
    # Its log reaches the disk with a commit, and by itself as late as can be: what a kill leaves
    # of a transaction that was not committed is nothing.
    with servers.server(wal_writer_delay="10s") as server:
        yield server


@pytest.fixture
def server(shared_server):
    """Return a server that a test may kill."""
    if shared_server.process.poll() is not None:
        shared_server.start()
    return shared_server


@pytest.fixture
def place(server):
    """Return a place in the server that a test may kill."""
    with places.schema(server.url()) as place:
        yield place
        if server.process.poll() is not None:
            server.start()


@pytest.fixture
def begun(tmp_path):
    """Return which steps have begun, in that order."""
    log = tmp_path / "log"
    return lambda: log.read_text().split() if log.exists() else []


@pytest.fixture
def run(start):
    """Start the program above."""

    def program(place, mode="restart", *, lease=30, host="", **environment):
        return start(PROGRAM, mode, str(lease), host, STORE=place.store, **environment)

    return program


def ended(process):
    """Return how a program has ended, and what it has said."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def is_alive(pid):
    """Tell whether a process runs; one that has ended, and is waited for by nobody, does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def history(place):
    """Return all that a store tells of a run."""
    tables = ("eventor_run", "eventor_event", "eventor_task", "eventor_definition")
    return [
        *(place.sql(f"SELECT * FROM {table} ORDER BY 1, 2, 3") for table in tables),
        # An owner that was replaced may say of its own recovery that it has ended.
        place.sql("SELECT * FROM eventor_recovery WHERE recovery > 0"),
    ]


def check_whole(place, recovery=0):
    """Make sure that each task and event of a recovery that went on to the end is place, once."""
    where = f"FROM eventor_task WHERE recovery = {recovery}"
    tasks = place.sql(f"SELECT step, status {where}")
    assert sorted(tasks) == sorted((step, "success") for step in STEPS)
    events = place.sql(f"SELECT event FROM eventor_event WHERE recovery = {recovery}")
    assert sorted(events) == [("go",), *sorted((f"{step}.success",) for step in STEPS)]


def test_a_server_that_is_killed_in_the_middle_of_a_run_loses_nothing(server, place, run, begun):
    program = run(place)
    for number in (3, 10, 18, 30):
        wait_until(lambda number=number: len(begun()) >= number)
        server.kill()
        server.start()
    assert ended(program)[0] == 0
    assert sorted(begun()) == sorted(STEPS)
    check_whole(place)
    assert {attempt for (attempt,) in place.sql("SELECT attempt FROM eventor_task")} == {1}
    assert place.sql("SELECT count(*) FROM eventor_recovery") == [(1,)]


def test_an_owner_whose_server_is_away_for_longer_than_its_lease_ends(server, place, run, begun):
    program = run(place, lease=3, HOLD="1")  # else it might come to its end before
    wait_until(lambda: len(begun()) >= 5)
    server.kill()
    then = begun()
    code, said = ended(program)
    assert code == 1
    assert re.search(r"StoreError: the store .* cannot record what happened: ", said)
    assert len(begun()) <= len(then) + LANES  # those that were recorded as active
    before = begun()
    server.start()
    recorded = {step for (step,) in place.sql("SELECT step FROM eventor_task")}
    assert recorded >= set(before)
    well = place.sql("SELECT step FROM eventor_task WHERE status = 'success'")
    assert ended(run(place, "recover"))[0] == 0
    again = begun()[len(before) :]
    assert sorted(again) == sorted(STEPS - {step for (step,) in well})
    check_whole(place, 1)


def test_an_owner_whose_server_does_not_answer_for_longer_than_its_lease_ends(
    server, place, run, begun
):
    program = run(place, lease=3, HOLD="1")  # else it might come to its end before
    wait_until(lambda: len(begun()) >= 5)
    server.send(signal.SIGSTOP)
    try:
        code, said = ended(program)
    finally:
        server.send(signal.SIGCONT)
    assert code == 1
    assert "StoreError" in said
    before = begun()
    assert len(before) < len(STEPS)
    assert ended(run(place, "recover"))[0] == 0
    assert set(begun()) == STEPS
    check_whole(place, 1)


def test_an_owner_that_was_stopped_and_replaced_writes_and_launches_nothing(
    place, run, begun, tmp_path
):
    program = run(place, lease=6, HOLD="1")
    wait_until(lambda: "s0.5" in begun() and f"s1.{LENGTH - 1}" in begun())
    count = "SELECT count(*) FROM eventor_task WHERE status = 'success'"
    wait_until(lambda: place.sql(count) == [(LENGTH + 5,)])
    program.send_signal(signal.SIGSTOP)
    before = begun()
    late = "SELECT heartbeat_at < clock_timestamp() - interval '6s' FROM eventor_recovery"
    wait_until(lambda: place.sql(late) == [(True,)])
    new = run(place, "recover", host="elsewhere", HOLD="1")
    wait_until(lambda: begun().count("s0.5") == 2)
    (tmp_path / "go on").touch()
    assert ended(new)[0] == 0
    kept, done = history(place), begun()
    program.send_signal(signal.SIGCONT)
    code, said = ended(program)
    assert code == 1
    assert "OwnershipError: recovery 0 of run 1" in said
    assert "was taken over by recovery 1" in said
    assert history(place) == kept
    assert begun() == done
    assert sorted(done[len(before) :]) == sorted(f"s0.{number}" for number in range(5, LENGTH))
    check_whole(place, 1)


def test_what_ran_when_an_owner_was_stopped_for_its_lease_stays_active(place, run, begun):
    program = run(place, lease=6, HOLD="1")
    wait_until(lambda: "s0.5" in begun() and f"s1.{LENGTH - 1}" in begun())
    count = "SELECT count(*) FROM eventor_task WHERE status = 'success'"
    wait_until(lambda: place.sql(count) == [(LENGTH + 5,)])
    known = "SELECT pid FROM eventor_task WHERE step = 's0.5' AND pid IS NOT NULL"
    wait_until(lambda: place.sql(known))
    ((pid,),) = place.sql(known)
    program.send_signal(signal.SIGSTOP)
    wait_until(lambda: not is_alive(pid))
    program.send_signal(signal.SIGCONT)
    code, said = ended(program)
    assert code == 1
    assert "OwnershipError: recovery 0 of run 1" in said
    assert "its steps were ended for that, and stay active for a recovery" in said
    assert place.sql("SELECT status FROM eventor_task WHERE step = 's0.5'") == [("active",)]
    assert ended(run(place, "recover"))[0] == 0
    check_whole(place, 1)


def test_of_programs_that_continue_a_run_that_is_not_there_yet_one_has_it(
    place, run, begun, tmp_path
):
    programs = [run(place, "continue", HOLD="1") for _ in range(4)]
    wait_until(lambda: sum(program.poll() is not None for program in programs) == 3, 60)
    (tmp_path / "go on").touch()
    codes = [ended(program) for program in programs]
    assert sorted(code for code, _ in codes) == [0, 1, 1, 1]
    assert all("OwnershipError" in said for code, said in codes if code)
    assert sorted(begun()) == sorted(STEPS)
    assert place.sql("SELECT count(*) FROM eventor_run") == [(1,)]


def test_programs_share_a_schema_and_each_has_its_own_run(place, start, tmp_path):
    code = PROGRAM.replace('"lanes"', 'os.environ["NAME"]').replace('"log"', 'os.environ["NAME"]')
    names = ["a", "b", "c"]
    programs = [start(code, "restart", "30", "", STORE=place.store, NAME=name) for name in names]
    assert [ended(program)[0] for program in programs] == [0, 0, 0]
    for name in names:
        assert sorted((tmp_path / name).read_text().split()) == sorted(STEPS)
        whole = f"SELECT count(*) FROM eventor_v_task WHERE run = '{name}' AND status = 'success'"
        assert place.sql(whole) == [(len(STEPS),)]


@pytest.fixture
def proxy(server):
    """Return a proxy to the server."""
    proxy = servers.Proxy(server.directory / "proxy")
    yield proxy
    proxy.close()
    (proxy.directory / servers.SOCKET).unlink()
    proxy.directory.rmdir()


def opened(by):
    """Return what is opened; None if the connection was lost before that."""
    try:
        return by()
    except evr.StoreError as error:
        if "cannot be opened" not in str(error):
            raise
        return None


def live(make, store, number, ran):
    """Run a flow, and attach to it meanwhile; tell whether its store could be opened."""
    config = {"task_construct": threading.Thread, "stop_on_exception": False}
    ev = opened(lambda: make(store=store, name=number, config=config, logging_level=100))
    if ev is None:
        return False

    def ask():
        ran.append("ask")
        while (run := opened(lambda: evr.attach(store, number))) is None:
            pass
        with run:
            assert run.trigger("asked", 1) is True

    def note(name):
        ran.append(name)
        return name * 5

    go, asked = ev.add_event("go"), ev.add_event("asked")
    first = ev.add_step("first", note, ("first",))
    ev.add_assoc(go, first, ev.add_step("ask", ask))
    ev.add_assoc(first.success, ev.add_step("next", note, (first.result,)))
    ev.add_assoc(asked, ev.add_step("last", note, ("last",)))
    ev.trigger_event(go, 1)
    assert ev() is True
    ev.close()
    return True


def check_cut(place, number, ran):
    """Make sure that nothing was lost, and nothing is there twice."""
    assert sorted(ran) == ["ask", "first", "first" * 5, "last"]
    run = f"FROM eventor_run WHERE name = '{number}'"
    of_run = f"WHERE run_id IN (SELECT run_id {run})"
    assert place.sql(f"SELECT count(*) {run}") == [(1,)]
    assert place.sql(f"SELECT count(*), count(owner_pid) FROM eventor_recovery {of_run}") == [
        (1, 0)
    ]
    tasks = place.sql(f"SELECT step, status, attempt FROM eventor_task {of_run}")
    assert sorted(tasks) == [(step, "success", 1) for step in ("ask", "first", "last", "next")]
    events = place.sql(f"SELECT event FROM eventor_event {of_run}")
    assert sorted(events) == [("asked",), ("first.success",), ("go",)]
    assert place.sql(f"SELECT answer FROM eventor_request {of_run}") == [("raised",)]


def sweep(make, place, proxy, how, first, step):
    """Cut a connection at each so many-th of its sends, until a life has not so many."""
    make().close()
    through = places.Schema(place.server.replace(*hosts(proxy)), place.name)
    points, proxy.was_cut = first, True
    while proxy.was_cut:
        proxy.cut(how, points)
        ran = []
        number = f"{how} {points}"
        if live(make, through.store, number, ran):
            check_cut(place, number, ran)
        else:
            assert place.sql(f"SELECT * FROM eventor_run WHERE name = '{number}'") == []
        points += step
    return points


@pytest.fixture
def step(request):
    """Return how many points are left out between two; `--proofs 9` leaves out none."""
    return max(1, 9 // request.config.getoption("--proofs"))


def hosts(proxy):
    server = servers.quote(str(proxy.directory.parent), safe="")
    return server, servers.quote(str(proxy.directory), safe="")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("how", "first"), [("not", 0), ("half", 3), ("whole", 6)])
def test_a_connection_that_is_lost_loses_and_doubles_nothing(make, place, proxy, how, first, step):
    assert sweep(make, place, proxy, how, first, step) > 50


LOCK, RENEW, COMMIT = b"FOR NO KEY UPDATE", b"UPDATE eventor_recovery", b"COMMIT"
INSERT = b"INSERT INTO eventor_task"


@pytest.mark.parametrize(
    ("how", "words", "told"),
    [
        ("not", (LOCK, RENEW), "nobody"),
        ("not", (LOCK, COMMIT), "nobody"),
        ("whole", (LOCK, COMMIT), "nobody"),
        ("whole", (LOCK, RENEW), "program"),
        ("not", (LOCK, COMMIT), "program"),
        ("not", (LOCK, INSERT, INSERT), "program"),
    ],
)
def test_one_dead_connection_ends_no_run_and_nothing_is_written_twice(
    make, place, proxy, how, words, told
):
    through = places.Schema(place.server.replace(*hosts(proxy)), place.name)
    config = {"task_construct": threading.Thread, "lease_seconds": 6}
    ev = make(store=through.store, config=config)
    ran = []

    def first():
        ran.append("first")
        proxy.cut(how, words=words, told=told)

    go, then = ev.add_event("go"), ev.add_step("then", ran.append, ("then",))
    step = ev.add_step("first", first)
    ev.add_assoc(go, step)
    ev.add_assoc(step.success, then, ev.add_step("last", ran.append, ("last",)))
    ev.trigger_event(go, 1)
    assert ev() is True
    ev.close()
    assert proxy.was_cut
    assert sorted(ran) == ["first", "last", "then"]
    tasks = place.sql("SELECT step, status, attempt FROM eventor_task ORDER BY task_id")
    assert tasks == [(name, "success", 1) for name in ("first", "then", "last")]
    events = place.sql("SELECT event FROM eventor_event ORDER BY event_id")
    assert events == [("go",), ("first.success",)]


def test_a_trigger_whose_connection_the_server_takes_for_alive_is_recorded_once(make, place, proxy):
    ev = make()
    through = places.Schema(place.server.replace(*hosts(proxy)), place.name)
    with evr.attach(through.store) as run:
        proxy.cut("not", words=(LOCK, COMMIT), told="program")
        assert run.trigger("go", 1) is True
    assert proxy.was_cut
    go = ev.add_event("go")
    assert ev() is True
    assert [event.event for event in ev.events()] == [go.name]
    assert place.sql("SELECT answer FROM eventor_request") == [("raised",)]


def test_a_lease_may_be_longer_than_a_server_lets_a_transaction_be_idle(make):
    ev = make(config={"lease_seconds": 10_000_000})
    ev.trigger_event(ev.add_event("go"), 1)
    assert ev() is True


def test_a_server_that_is_long_at_work_is_waited_for(make, place, monkeypatch):
    asked = []

    def is_dead(again, session, look=postgresql._is_dead):
        # One that has not had its turn yet to read what it was sent seems to wait for that.
        waits = f"FROM pg_stat_activity WHERE pid = {session['pid']} AND wait_event_type = 'Lock'"
        is_at_work = place.sql(f"SELECT 1 {waits}") == [(1,)]
        found = look(again, session)
        if is_at_work:
            asked.append(found)
        return found

    monkeypatch.setattr(postgresql, "_is_dead", is_dead)
    monkeypatch.setattr(postgresql, "_SILENT_PART", 0)
    monkeypatch.setattr(postgresql, "_SHORTEST_SILENCE", 0.1)
    monkeypatch.setattr(postgresql, "_LONGEST_LOCK_SECONDS", 1_000)
    ev = make(config={"lease_seconds": 10_000})
    ev.trigger_event(ev.add_event("go"), 1)
    with servers.connect(place.server, place.name) as connection:
        connection.execute("SELECT * FROM eventor_run FOR UPDATE")
        thread = threading.Thread(target=ev)
        thread.start()
        wait_until(lambda: len(asked) >= 3)
        while_it_waited = asked[:3]
    thread.join()
    assert not any(while_it_waited)
    assert len(ev.events()) == 1


@pytest.fixture
def silent(server):
    """Return a socket of a host that takes connections and never answers."""
    directory = server.directory / "silent"
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / servers.SOCKET))
        listener.listen()
        yield listener
    shutil.rmtree(directory)


def test_a_host_that_is_silent_costs_a_part_of_the_time_and_once(
    make, server, place, silent, monkeypatch
):
    monkeypatch.setattr(postgresql, "_OPEN_SECONDS", 4)
    two = f"{silent.getsockname()},{server.directory}".replace(f"/{servers.SOCKET}", "")
    attributes = {"schema": place.name, "target_session_attrs": "read-write"}
    ev = make(store=server.url(host=two, **attributes), config={"task_construct": threading.Thread})
    silent.accept()[0].close()
    name = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = "
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("cut", place.sql, (f"{name}'eventor'",)))
    ev.trigger_event(go, 1)
    assert ev() is True
    silent.setblocking(False)
    with pytest.raises(BlockingIOError):
        silent.accept()


@pytest.mark.parametrize(("number", "seconds"), [(1, 10), (3, 4), (20, 2)])
def test_all_hosts_share_the_time_in_which_a_connection_has_to_come(
    make, server, place, monkeypatch, number, seconds
):
    given = []
    connect = postgresql._PatientConnection.connect

    def noted(*arguments, **how):
        given.append(how["connect_timeout"])
        return connect(*arguments, **how)

    monkeypatch.setattr(postgresql._PatientConnection, "connect", noted)
    make(store=server.url(host=",".join([str(server.directory)] * number), schema=place.name))
    assert given == [seconds]


SECRET = "it is a s@cret"


@pytest.fixture(scope="module")
def guarded(shared_server):
    """Return the name of a user who has to give the password, and may make nothing."""
    with servers.connect(shared_server.url()) as connection:
        connection.execute(f"CREATE ROLE guarded LOGIN PASSWORD '{SECRET}'")
        connection.execute("REVOKE CREATE ON SCHEMA public FROM public")
    return "guarded"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"password": "a wr@ng one"}, "password authentication failed for user"),
        ({}, "no password supplied"),
        ({"password": SECRET, "database": "nowhere"}, 'database "nowhere" does not exist'),
        ({"password": SECRET}, "permission denied for schema public"),
        ({"password": SECRET, "schema": "new"}, "permission denied for database"),
        ({"password": SECRET, "host": "/nowhere"}, "No such file or directory"),
    ],
)
def test_a_server_that_refuses_is_told_of_and_no_password(server, guarded, capsys, words, told):
    store = server.url(user=guarded, **words)
    with pytest.raises(evr.StoreError, match=rf"cannot be opened: .*{told}") as caught:
        evr.Eventor(store=store)
    assert cli.run(["runs", store]) == 2
    said = f"{caught.value} {caught.value.__cause__!r} {capsys.readouterr()}"
    for secret in (SECRET, "a wr@ng one", servers.quote(SECRET, safe=""), "wr%40ng"):
        assert secret not in said


def test_a_schema_may_have_any_name_and_is_named_in_the_config_or_the_url(make, server):
    name = "a \"b\" 'c'; DROP -- ü%"
    ev = make(store=server.url(), config={"schema": name})
    try:
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", int))
        ev.trigger_event(go, 1)
        assert ev() is True
        with evr.attach(server.url(schema=name)) as run:
            assert [str(task.status) for task in run.tasks()] == ["success"]
        assert str(ev._store.location) in repr(ev)
    finally:
        ev.close()
        with servers.connect(server.url()) as connection:
            quoted = name.replace('"', '""')
            connection.execute(f'DROP SCHEMA "{quoted}" CASCADE')


def test_the_longest_names_and_sequences_are_kept(make):
    chance = random.Random(1)  # what can be compressed takes less of an index

    def text(size):
        return "".join(chr(chance.randrange(0x4E00, 0x9FFF)) for _ in range(size // 3)) + "xy"

    ev = make(name=text(500))
    go, later = ev.add_event(text(500)), ev.add_event(text(500))
    retried = {"max_attempts": 2}
    step = ev.add_step(text(500), int, ("x",), triggers={"at_failure": later}, config=retried)
    ev.add_assoc(go, step)
    ev.add_assoc(later, ev.add_step("s", int), delay=0.01)
    ev.trigger_event(go, text(2_000))
    assert ev() is True
    assert [len(task.attempts) for task in ev.tasks()] == [2, 1]


def test_settings_of_a_user_do_not_matter(make, server, place):
    with servers.connect(server.url()) as connection:
        connection.execute("CREATE ROLE german SUPERUSER LOGIN")
        connection.execute("ALTER ROLE german SET DateStyle = 'German'")
        connection.execute("ALTER ROLE german SET TimeZone = 'Asia/Kolkata'")
        connection.execute("ALTER ROLE german SET synchronous_commit = 'off'")
        connection.execute("ALTER ROLE german SET client_encoding = 'LATIN1'")
    ev = make(store=server.url(user="german", schema=place.name))
    before = datetime.now(UTC)
    ev.trigger_event(ev.add_event("g"), "日本")
    assert ev() is True
    (raised,) = ev.events()
    assert raised.sequence == "日本"
    assert abs(raised.raised_at - before) < timedelta(minutes=1)


def test_a_delay_is_read_back_to_its_last_digit(make, server, place):
    with servers.connect(server.url()) as connection:
        connection.execute("CREATE ROLE terse SUPERUSER LOGIN")
        connection.execute("ALTER ROLE terse SET extra_float_digits = 0")
    store = server.url(user="terse", schema=place.name)

    def flow(mode):
        ev = make(store=store, run_mode=mode)
        go, first = ev.add_event("go"), ev.add_step("first", int)
        ev.add_assoc(go, first)
        ev.add_assoc(first.success, ev.add_step("later", int), delay=1 / 3)
        ev.add_assoc(first.success, ev.add_step("next", int))
        return ev, go

    ev, go = flow("restart")
    ev.trigger_event(go, 1)
    assert ev.run(max_loops=2) is False
    ev.close()
    ev, _ = flow("continue")
    assert ev() is True
    assert place.sql("SELECT seconds FROM eventor_delay") == [(1 / 3,)]


def test_a_database_of_another_encoding_is_refused(server):
    with servers.connect(server.url()) as connection:
        connection.autocommit = True
        connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(evr.StoreError, match="of the encoding LATIN1; expected UTF8"):
        evr.Eventor(store=server.url(database="latin"))


def test_a_user_without_a_right_to_the_schema_is_told_so(make, server, place, guarded):
    make().close()
    with pytest.raises(evr.StoreError, match=r"has not the right \(USAGE\) to its schema"):
        evr.attach(server.url(user=guarded, password=SECRET, schema=place.name))


def test_an_owner_stopped_in_a_transaction_is_replaced_after_its_lease(place, start, run):
    stopped = start(
        """
        import os, signal
        import eventor as evr
        from eventor.storage import owner
        from eventor.storage.batch import Batch

        owner._place = lambda: "elsewhere"
        ev = evr.Eventor("lanes", os.environ["STORE"], config={"logdir": ".", "lease_seconds": 6})
        go = ev.add_event("go")
        ev.trigger_event(go, 1)
        Batch.write = lambda _: os.kill(os.getpid(), signal.SIGSTOP)
        ev()
        """,
        STORE=place.store,
    )
    wait_until(lambda: psutil.Process(stopped.pid).status() == psutil.STATUS_STOPPED)
    held = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'"
    late = "SELECT heartbeat_at < clock_timestamp() - interval '6s' FROM eventor_recovery"
    wait_until(lambda: place.sql(held) == [(0,)] and place.sql(late) == [(True,)])
    with evr.Eventor("lanes", place.store, "recover") as ev:
        assert ev.recovery == 1
        stopped.send_signal(signal.SIGCONT)
        code, said = ended(stopped)
    assert code == 1
    assert "was taken over by recovery 1" in said


@pytest.mark.parametrize(("ask", "wait"), [("recover", 0.05), ("recover", 0.6), ("trigger", 5)])
def test_a_run_that_somebody_has_locked_is_told_as_such(make, place, monkeypatch, ask, wait):
    make(name="lanes").close()
    monkeypatch.setattr("eventor.storage.store._PATIENCE_SECONDS", 3)
    monkeypatch.setattr("eventor.storage.postgresql._LONGEST_LOCK_SECONDS", wait)
    with (
        evr.attach(place.store, "lanes") as run,
        servers.connect(place.server, place.name) as connection,
    ):
        connection.execute("SELECT * FROM eventor_run FOR UPDATE")
        with pytest.raises(evr.OwnershipError, match="is locked by another program"):
            run.trigger("go", 1) if ask == "trigger" else make(name="lanes", run_mode=ask)
        connection.rollback()
    assert make(name="lanes", run_mode="recover").recovery == 1


def test_without_a_schema_the_search_path_of_the_server_decides(make, place):
    place.sql(f"CREATE SCHEMA {place.name}")
    options = servers.quote(f"-c search_path={place.name}", safe="")
    make(store=f"{place.server}&options={options}").close()
    assert place.sql("SELECT count(*) FROM eventor_run") == [(1,)]


@pytest.mark.parametrize("mode", evr.RunMode)
def test_a_store_of_another_schema_version_is_left_as_it_is(make, place, mode):
    make().close()
    place.sql("UPDATE eventor_schema SET version = 99")
    with pytest.raises(evr.StoreError, match="has schema version 99, and this"):
        make(run_mode=mode)
    with pytest.raises(evr.StoreError, match="has schema version 99, and this"):
        evr.attach(place.store)
    assert place.sql("SELECT count(*) FROM eventor_run") == [(1,)]


@pytest.mark.parametrize("mode", ["recover", "attach"])
def test_where_there_is_nothing_none_is_made(place, mode):
    with pytest.raises(evr.RecoveryError, match=rf"nothing to {mode}.* is empty"):
        evr.attach(place.store) if mode == "attach" else evr.Eventor("", place.store, mode)
    assert place.sql(f"SELECT * FROM pg_namespace WHERE nspname = '{place.name}'") == []


def test_programs_that_make_a_store_at_the_same_time_make_one(place, start):
    code = """
        import os
        import eventor as evr
        with evr.Eventor(store=os.environ["STORE"], config={"logdir": "."}):
            pass
    """
    programs = [start(code, STORE=place.store) for _ in range(6)]
    assert [ended(program)[0] for program in programs] == [0] * 6
    assert place.sql("SELECT version FROM eventor_schema") == [(5,)]
    runs = "SELECT run_id FROM eventor_run ORDER BY run_id"
    assert place.sql(runs) == [(n,) for n in range(1, 7)]


def test_who_keeps_a_program_from_making_its_tables_keeps_no_other(
    make, place, monkeypatch, tmp_path
):
    held = threading.Event()
    go_on = threading.Event()

    def stop(_connection, _cursor, statement, *_):
        if (
            "CREATE SCHEMA" in statement
            and threading.current_thread() is not threading.main_thread()
        ):
            held.set()
            go_on.wait(60)

    event.listen(Engine, "after_cursor_execute", stop)
    # Who makes tables may be idle for long; who waits for that hears of it long before it gives up.
    monkeypatch.setattr(postgresql, "_IDLE_PART", 100)
    config = {"logdir": tmp_path}
    maker = threading.Thread(target=lambda: evr.Eventor("a", place.store, config=config).close())
    maker.start()
    try:
        assert held.wait(60)
        with places.schema(place.server) as other:
            make(store=other.store).close()
        monkeypatch.setattr(postgresql, "_LOCK_PART", 0.03)
        with pytest.raises(evr.StoreError, match=r"its tables are made: process \d+ .*'eventor'"):
            evr.Eventor("b", place.store)
    finally:
        go_on.set()
        maker.join()
        event.remove(Engine, "after_cursor_execute", stop)
    assert place.sql("SELECT name FROM eventor_run") == [("a",)]


def test_a_store_that_is_there_is_opened_whoever_holds_its_lock(make, place):
    make().close()
    with servers.connect(place.server) as connection:
        lock = f"SELECT pg_advisory_xact_lock(x'65766E74'::int, hashtext('{place.name}'))"
        connection.execute(lock)
        make().close()


def test_without_psycopg_it_is_said_what_to_install(script):
    ran = script("""
        import sys
        sys.modules["psycopg"] = None
        import eventor as evr
        try:
            evr.Eventor(store="postgresql://me:secret@host/database")
        except evr.StoreError as error:
            print(error)
    """)
    assert "needs psycopg: pip install 'eventor[postgresql]'" in ran.stdout
    assert "me:***@host" in ran.stdout


@pytest.mark.parametrize("others", [0, 20])
def test_the_number_of_a_transaction_that_a_crash_has_undone_may_be_given_again(
    make, server, place, others, step
):
    """A crash comes before some of the commits of a flow; then others take the numbers."""
    make().close()
    left = 0

    def crash(_connection):
        nonlocal left
        left -= 1
        if left != 0:
            return
        server.kill()
        server.start()
        with servers.connect(server.url()) as connection:
            connection.autocommit = True
            for _ in range(others):
                connection.execute("SELECT pg_current_xact_id()")

    event.listen(Engine, "commit", crash)
    try:
        for point in itertools.count(1 + bool(others), max(1, step // 3)):
            left, ran, name = point, [], f"crash {point}"
            if live(make, place.store, name, ran):
                check_cut(place, name, ran)
            if left > 0:
                break
    finally:
        event.remove(Engine, "commit", crash)
    assert point > 10
