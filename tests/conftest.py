"""Fixtures of all tests: Eventors over real files, and scripts in processes of their own."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time

import pytest

import eventor

# It would hide what is lost in a buffer.
os.environ.pop("PYTHONUNBUFFERED", None)
# With it, each of the processes that are started here would compile eventor anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_addoption(parser):
    """Let the proofs of durability run for longer."""
    parser.addoption(
        "--proofs",
        type=int,
        default=1,
        metavar="N",
        help="simulate, kill and damage N times as often in the proofs of durability",
    )


@pytest.fixture
def make(tmp_path):
    """Make Eventors whose files are in the test's directory, and close them at the end."""
    with contextlib.ExitStack() as stack:

        def build(store=None, *, config=None, **arguments):
            settings = {"logdir": tmp_path / "logs", **(config or {})}
            place = tmp_path / "flow.db" if store is None else store
            return stack.enter_context(eventor.Eventor(store=place, config=settings, **arguments))

        yield build


@pytest.fixture
def debug_log(tmp_path):
    """Read the debug file of the Eventors that `make` made."""
    return (tmp_path / "logs/conftest.debug.log").read_text


@pytest.fixture
def script(tmp_path):
    """Run a Python script, given as text, in a process and directory of its own."""

    def run(code, *arguments, timeout=60, **environment):
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

    def run(code, *arguments, options=("-W", "error")):
        path = tmp_path / "program.py"
        if not path.exists():  # another that was started may be about to read it
            path.write_text(textwrap.dedent(code))
        started.append(
            subprocess.Popen(
                [sys.executable, *options, path, *arguments],
                cwd=tmp_path,
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
    """Make a store of a run whose owner was killed."""
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
    """Run statements on a store as another program would; return what the last one found."""
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as connection, connection:
        return [connection.execute(statement).fetchall() for statement in statements][-1]
