"""Faults of the store, for real: full, deleted, replaced, read-only, damaged, or not a store."""

import os
import random
import shutil
import subprocess
import threading

import pytest

import eventor as evr
from tests.conftest import on_sqlite

FUZZ, QUICK_FUZZ = 400, 60


def build(make, during=lambda: None, ran=lambda: None, **arguments):
    """Make a flow whose first step does something to the store, and whose second must not run."""
    ev = make(**arguments)
    first, second = ev.add_event("first"), ev.add_event("second")
    ev.add_assoc(first, ev.add_step("fault", func=during, triggers={"at_success": second}))
    ev.add_assoc(second, ev.add_step("next", func=ran))
    if not arguments:
        ev.trigger_event(first)
    return ev


def replace(path):
    other = path.with_name("other")
    shutil.copy(path, other)
    other.rename(path)


FAULTS = {
    "deleted": (lambda place: place.clear(), None, "(No such file or directory|does not exist)"),
    "log deleted": (
        lambda place: place.store.with_name("flow.db-wal").unlink(),
        None,
        "No such file or directory",
    ),
    "replaced": (lambda place: replace(place.store), None, "replaced while it was in use"),
    "read-only": (
        lambda place: place.store.chmod(0o444),
        lambda place: place.store.chmod(0o644),
        "made read-only",
    ),
}
"""What becomes of a store, what mends it, and what is told of it."""


@pytest.mark.parametrize("fault", ["deleted", *on_sqlite("log deleted", "replaced", "read-only")])
def test_nothing_goes_on_in_a_store_that_is_not_what_it_was(
    make, place, tmp_path, fault, debug_log
):
    do, mend, told = FAULTS[fault]
    ran = tmp_path / "ran"
    ev = build(make, lambda: do(place), ran.touch)
    # A step that takes a while ends after a look at what others ask for, which fails as well.
    what = "(record what happened|read what was asked of the run)"
    with pytest.raises(evr.StoreError, match=f"cannot {what}: .*{told}"):
        ev()
    assert not ran.exists()
    assert "Running step fault[1]" in debug_log()
    assert "Step completed" not in debug_log()
    with pytest.raises(evr.UsageError, match="recover the run"):
        ev()
    ev.close()
    if mend is not None:
        mend(place)
        ev = build(make, int, ran.touch, run_mode=evr.RunMode.recover)
        assert ev() is True
        assert ran.exists()
        assert [task.replay for task in ev.tasks()] == ["rerun", None]


@pytest.mark.stores("sqlite")
def test_a_store_that_is_full_stops_the_run_and_is_recovered_once_there_is_room(make, tmp_path):
    ran = tmp_path / "ran"
    ev = build(make, lambda: os.urandom(1_000_000), ran.touch)
    with ev._store.backend.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 5}")
    with pytest.raises(evr.StoreError, match=r"cannot record what happened: .*full"):
        ev()
    assert not ran.exists()
    ev.close()
    assert build(make, int, ran.touch, run_mode=evr.RunMode.recover)() is True
    assert ran.exists()


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 1 MB, where that is allowed."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place]
    mounted = shutil.which("mount") and subprocess.run(mount, check=False, capture_output=True)
    if not mounted or mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.stores("sqlite")
def test_a_disk_that_is_full_stops_the_run_and_loses_nothing(make, small_disk):
    store, ballast = small_disk / "flow.db", small_disk / "ballast"

    def chain(**arguments):
        ev = make(store, **arguments)
        events = [ev.add_event(f"e{number}") for number in range(31)]
        for number in range(30):
            step = ev.add_step(
                f"s{number}",
                func=lambda: os.urandom(5_000),
                triggers={"at_success": events[number + 1]},
            )
            ev.add_assoc(events[number], step)
        return ev, events[0]

    ev, first = chain()
    ev.trigger_event(first)
    ballast.write_bytes(bytes(400_000))
    with pytest.raises(evr.StoreError, match=r"cannot record what happened: .*(full|I/O)"):
        ev()
    done = len(ev.tasks(status="success"))
    assert 0 < done < 30
    ev.close()
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    ev, _ = chain(run_mode=evr.RunMode.recover)
    assert ev() is True
    replays = [task.replay for task in ev.tasks()]
    assert replays[:done] == ["skip"] * done
    assert evr.StepReplay.skip not in replays[done:]


@pytest.mark.stores("sqlite")
def test_a_disk_that_is_full_when_a_store_is_made_leaves_none(make, small_disk):
    store, ballast = small_disk / "flow.db", small_disk / "ballast"
    told = []
    for pages in range(4, 60, 4):
        room = os.statvfs(small_disk)
        ballast.write_bytes(bytes(room.f_bavail * room.f_bsize - pages * 4096))
        try:
            make(store).close()
        except evr.StoreError as error:
            told.append(str(error))
        ballast.unlink()
        with make(store) as ev:
            assert ev() is True
        for path in small_disk.iterdir():
            assert path.name.startswith("flow.db")
            path.unlink()
    assert 0 < len(told) < 14
    assert all("full" in words or "No space" in words or "I/O" in words for words in told)


@pytest.mark.stores("sqlite")
def test_an_error_of_the_disk_is_told(script):
    ran = script("""
        import resource
        import eventor as evr
        ev = evr.Eventor(store="flow.db", config={"logdir": "."})
        go = ev.add_event("go")
        def limit():
            limits = (150_000, resource.RLIM_INFINITY)
            resource.prlimit(os.getppid(), resource.RLIMIT_FSIZE, limits)
            return bytes(500_000)
        import os
        ev.add_assoc(go, ev.add_step("s", func=limit))
        ev.trigger_event(go)
        try:
            ev()
        except evr.StoreError as error:
            print(error)
        # What measures the tests writes a file at the end, too.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    """)
    assert "flow.db cannot record what happened: " in ran.stdout, ran.stderr


@pytest.mark.stores("sqlite")
def test_a_store_that_is_made_read_only_is_not_begun(make, tmp_path):
    make().close()
    (tmp_path / "flow.db").chmod(0o444)
    with pytest.raises(evr.StoreError, match="cannot be both read and written"):
        make()


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("table", ["eventor_recovery", "eventor_task", "eventor_event"])
def test_a_damaged_page_is_told(make, place, table):
    with build(make) as ev:
        ev()
    ((page,),) = place.sql(f"SELECT rootpage FROM sqlite_master WHERE name = '{table}'")
    ((size,),) = place.sql("PRAGMA page_size")
    with place.store.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(evr.StoreError, match=r"flow.db cannot .*(malformed|damaged)"):
        build(make, run_mode=evr.RunMode.recover)()


def test_a_task_that_a_stranger_has_removed_stops_the_run(make, place, tmp_path):
    ran = tmp_path / "ran"
    ev = build(make, lambda: place.sql("DELETE FROM eventor_task"), ran.touch)
    with pytest.raises(evr.StoreError, match="a task that was recorded is not there any more"):
        ev()
    assert not ran.exists()


@pytest.mark.parametrize("based_on", [1, 5, *on_sqlite("'x'")])
def test_a_line_of_recoveries_that_goes_in_a_circle_is_told(make, place, based_on):
    make().close()
    make(run_mode="recover").close()
    place.sql(f"UPDATE eventor_recovery SET based_on = {based_on}")
    with pytest.raises(evr.StoreError, match="something that eventor has not written"):
        make(run_mode="recover")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE eventor_task SET status = 'odd'",
        "UPDATE eventor_task SET sequence = 'x', sequence_type = 'int'",
        pytest.param(f"UPDATE eventor_definition SET definition = '{'[' * 200_000}'", id="nested"),
        "DROP VIEW eventor_v_run; DROP VIEW eventor_v_task; DROP TABLE eventor_task",
        "ALTER TABLE eventor_task RENAME COLUMN traceback TO told",
        *on_sqlite(
            "UPDATE eventor_recovery SET heartbeat_at = 7, owner_pid = 'x', owner_began = 'x'",
            "UPDATE eventor_recovery SET recovery = 9223372036854775807",
            "UPDATE eventor_recovery SET keeper_pid = 'x'",
        ),
    ],
)
def test_what_eventor_has_not_written_is_told(make, place, tmp_path, change):
    with build(make) as ev:
        ev()
    place.sql(*change.split("; "))
    with pytest.raises(evr.StoreError, match=r"the store .* cannot ") as caught:
        look(place.store, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.stores("postgresql")
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE eventor_recovery SET heartbeat_at = 'infinity'",
        "INSERT INTO eventor_recovery (run_id, recovery, began_at) VALUES (1, 2147483647, now())",
        "ALTER TABLE eventor_recovery ALTER keeper_pid TYPE TEXT USING 'x'",
        "DROP VIEW eventor_v_task; ALTER TABLE eventor_task ALTER ready_at TYPE TEXT",
    ],
)
def test_what_only_postgresql_keeps_is_told_too(make, place, tmp_path, change):
    test_what_eventor_has_not_written_is_told(make, place, tmp_path, change)


def look(store, logdir):
    """Do with a store all that a program can do."""
    config = {"task_construct": threading.Thread, "logdir": logdir}
    with evr.Eventor(store=store, run_mode="recover", logging_level=100, config=config) as ev:
        first, second = ev.add_event("first"), ev.add_event("second")
        ev.add_assoc(first, ev.add_step("fault", func=int, triggers={"at_success": second}))
        ev.add_assoc(second, ev.add_step("next", func=int))
        ev.preview()
        ev()
        for task in ev.tasks():
            assert task.result is None or task.result == 0
        ev.events()


def mutate(good, dice):
    """Return what may have become of a good store, or what never was one."""
    data = bytearray(good)
    kind = dice.randrange(7)
    if kind == 0:
        return dice.randbytes(dice.randrange(1, 20_000))
    if kind == 1:
        return b"SQLite format 3\0" + dice.randbytes(dice.randrange(1, 20_000))
    if kind == 2:
        return bytes(data[: dice.randrange(1, len(data))])
    if kind == 3:
        start = dice.randrange(len(data))
        data[start : start + dice.randrange(1, 5_000)] = dice.randbytes(dice.randrange(5_000))
        return bytes(data)
    if kind == 4:
        size = 4096
        one, two = (size * dice.randrange(len(data) // size) for _ in range(2))
        data[one : one + size], data[two : two + size] = (
            data[two : two + size],
            data[one : one + size],
        )
        return bytes(data)
    for _ in range(dice.choice([1, 10, 100])):
        data[dice.randrange(len(data))] = dice.randrange(256)
    return bytes(data)


def fuzz(make, tmp_path, inputs):
    with build(make) as ev:
        ev()
    assert not (tmp_path / "flow.db-wal").exists()
    good = (tmp_path / "flow.db").read_bytes()
    told = 0
    for seed in range(inputs):
        place = tmp_path / "fuzz"
        place.mkdir()
        (place / "flow.db").write_bytes(mutate(good, random.Random(seed)))
        try:
            look(place / "flow.db", tmp_path)
        except evr.EventorError:
            told += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error
        shutil.rmtree(place)
    print(f"\n{inputs} damaged stores, {told} of them told of")
    assert 0 < told < inputs


@pytest.mark.stores("sqlite")
@pytest.mark.timeout(36_000)
@pytest.mark.slow
def test_any_bytes_are_an_eventor_error_or_a_right_answer(make, tmp_path, request):
    fuzz(make, tmp_path, FUZZ * request.config.getoption("--proofs"))


@pytest.mark.stores("sqlite")
def test_some_bytes_are_an_eventor_error_or_a_right_answer(make, tmp_path):
    fuzz(make, tmp_path, QUICK_FUZZ)


@pytest.mark.stores("sqlite")
def test_a_log_of_any_bytes_is_an_eventor_error_or_a_right_answer(make, tmp_path):
    with build(make) as ev:
        ev()
    for seed in range(20):
        place = tmp_path / "fuzz"
        place.mkdir()
        shutil.copy(tmp_path / "flow.db", place / "flow.db")
        (place / "flow.db-wal").write_bytes(random.Random(seed).randbytes(10_000))
        look(place / "flow.db", tmp_path)
        shutil.rmtree(place)
