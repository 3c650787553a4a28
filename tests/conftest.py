"""Fixtures of all tests: Eventors over real files, and scripts in processes of their own."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from hypothesis import HealthCheck, settings

import eventor
from tests import places, servers

# How fast the machine is at a moment fails no test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# It would hide what is lost in a buffer.
os.environ.pop("PYTHONUNBUFFERED", None)
# With it, each of the processes that are started here would compile eventor anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# By it coverage begins in each Python that is started, which costs more than most of them do.
MEASURE = "COVERAGE_PROCESS_CONFIG"
measured = os.environ.pop(MEASURE, None)
if "EVENTOR_TEST_POSTGRESQL" not in os.environ:
    # They would lead to another server than that of the tests.
    for variable in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[variable]


def pytest_addoption(parser):
    """Let the proofs of durability run for longer, and tests on the kinds of store asked for."""
    parser.addoption(
        "--stores",
        choices=("some", "both", "sqlite", "postgresql"),
        default="some",
        help="on which kinds of store to run what can be run on both; some (default): on both, but "
        "on SQLite alone what a store can hardly change",
    )
    parser.addoption(
        "--proofs",
        type=int,
        default=1,
        metavar="N",
        help="simulate, kill and damage N times as often in the proofs of durability",
    )


def pytest_generate_tests(metafunc):
    """Run what has a place for a store on the kinds of store that are asked for."""
    marked = metafunc.definition.get_closest_marker("stores")
    kind = marked.args[0] if marked else "both"
    if "place" not in metafunc.fixturenames or kind == "sqlite":
        return
    asked = metafunc.config.getoption("--stores")
    if kind in ("either", "both") and asked != "some":
        kind = asked
    elif kind == "either":
        kind = "sqlite"
    kinds = ("sqlite", "postgresql") if kind == "both" else (kind,)
    metafunc.parametrize("place", kinds, indirect=True)


def pytest_collection_modifyitems(config, items):
    """Leave out on PostgreSQL the parameters of a test that are marked for SQLite alone."""
    there = [
        item
        for item in items
        if hasattr(item, "callspec") and item.callspec.params.get("place") == "postgresql"
    ]
    out = {item for item in there if any(mark.name == "stores" for mark in item.callspec.marks)}
    config.hook.pytest_deselected(items=list(out))
    items[:] = [item for item in items if item not in out]
    for item in there:
        marked = item.get_closest_marker("stores")
        if marked is not None and marked.args == ("either",):
            # What they cover, they cover on SQLite; to measure it takes a third of their time.
            item.add_marker("no_cover")


def on_sqlite(*values):
    """Return parameters of a test that are not for PostgreSQL too."""
    return [pytest.param(value, marks=pytest.mark.stores("sqlite")) for value in values]


@pytest.fixture(scope="session")
def postgresql():
    """Return the URL of a PostgreSQL server that the tests share, in schemas of their own."""
    given = os.environ.get("EVENTOR_TEST_POSTGRESQL")
    if given:
        servers.driver()
        yield given
        return
    with servers.server(**servers.QUICK) as server:
        yield server.url()


@pytest.fixture
def place(request, tmp_path):
    """Return where the test has its store: nothing is there yet."""
    with contextlib.ExitStack() as stack:
        if getattr(request, "param", "sqlite") == "sqlite":
            yield places.File(tmp_path / "flow.db")
        else:
            yield stack.enter_context(places.schema(request.getfixturevalue("postgresql")))


@pytest.fixture
def measure(request, monkeypatch):
    """Measure what the processes that the test starts cover of eventor, if that is measured."""
    if measured is not None and request.node.get_closest_marker("no_cover") is None:
        monkeypatch.setenv(MEASURE, measured)


@pytest.fixture
def make(tmp_path, place, measure):
    """Make Eventors whose files are in the test's directory, and close them at the end."""
    with contextlib.ExitStack() as stack:

        def build(store=None, *, config=None, **arguments):
            settings = {"logdir": tmp_path / "logs", **(config or {})}
            where = place.store if store is None else store
            return stack.enter_context(eventor.Eventor(store=where, config=settings, **arguments))

        yield build


@pytest.fixture
def debug_log(tmp_path):
    """Read the debug file of the Eventors that `make` made."""
    return (tmp_path / "logs/conftest.debug.log").read_text


@pytest.fixture
def script(tmp_path):
    """Run a Python script, given as text, in a process and directory of its own."""

    def run(code, *arguments, timeout=100, **environment):
        path = tmp_path / "program.py"
        path.write_text(textwrap.dedent(code))
        return subprocess.run(
            [sys.executable, "-W", "error", path, *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


def take_signals():
    """Take the signals that whoever runs the tests ignores, as nohup and a shell's `&` do."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGABRT):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path):
    """Start a Python script, given as text, in a session and directory of its own."""
    started = []

    def run(code, *arguments, options=("-W", "error"), **environment):
        path = tmp_path / "program.py"
        if not path.exists():  # another that was started may be about to read it
            path.write_text(textwrap.dedent(code))
        started.append(
            subprocess.Popen(
                [sys.executable, *options, path, *arguments],
                cwd=tmp_path,
                env={**os.environ, **environment},
                start_new_session=True,
                preexec_fn=take_signals,  # noqa: PLW1509 (the tests have one thread)
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate(timeout=30)


@pytest.fixture
def crashed(start, tmp_path):
    """Make a SQLite store of a run whose owner was killed."""
    process = start("""
        import os, signal
        import eventor as evr
        ev = evr.Eventor("daily", "crashed.db", config={"logdir": "."})
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", os.kill, (os.getpid(), signal.SIGKILL)))
        ev.trigger_event(go)
        ev()
    """)
    process.wait(timeout=60)
    return tmp_path / "crashed.db"


def wait_until(condition, seconds=30):
    """Wait for a condition to hold, and fail at a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come to hold in time"
        time.sleep(0.005)


def statuses(ev):
    """Return the status of each task by its name."""
    return {f"{task.step}[{task.sequence}]": str(task.status) for task in ev.tasks()}


def sql(path, *statements):
    """Run statements on a SQLite file as another program would; return what the last found."""
    return places.File(path).sql(*statements)
