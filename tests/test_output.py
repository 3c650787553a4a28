"""Captured output: kept with the record of the task, and shown all the same."""

import io
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import eventor as evr
from eventor.task import Captured
from tests.conftest import wait_until

SPAWN = multiprocessing.get_context("spawn").Process
CONSTRUCTS = [{}, {"max_tasks_per_child": None}, {"task_construct": SPAWN}]


@pytest.fixture
def capturing(make):
    """Make a flow of steps whose output is captured, after one whose output is not."""

    def build(*funcs, step=None, **config):
        ev = make(config={"stop_on_exception": False, **config})
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("plain", int))
        for number, (func, *args) in enumerate(funcs):
            settings = {"capture_output": True, **(step or {})}
            ev.add_assoc(go, ev.add_step(f"s{number}", func, args=tuple(args), config=settings))
        ev.trigger_event(go, 1)
        return ev

    return build


def talk():
    print("printed")
    print("warned", file=sys.stderr)
    code = "import sys; print('of a child'); print('of a child, too', file=sys.stderr)"
    subprocess.run([sys.executable, "-c", code], check=True)
    os.write(1, b"raw\n")


@pytest.mark.parametrize("config", CONSTRUCTS, ids=["fork", "kept", "spawn"])
def test_what_is_written_is_kept_and_shown(capturing, capsys, config):
    ev = capturing((talk,), (talk,), **config)
    assert ev() is True
    plain, *tasks = ev.tasks()
    assert (plain.stdout, plain.stderr) == (None, None)
    for task in tasks:
        # Whatever the program has put in their place: here, pytest has.
        assert sorted(task.stdout.splitlines()) == ["of a child", "printed", "raw"]
        assert task.stderr == "warned\nof a child, too\n"
        assert (task.attempts[0].stdout, task.attempts[0].stderr) == (task.stdout, task.stderr)
    shown, told = capsys.readouterr()
    assert shown.count("printed") == shown.count("of a child") == 2
    assert told.count("warned") == 2


def end(how):
    print("last words")
    sys.stdout.flush()
    how()


@pytest.mark.parametrize(
    "how", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(1), lambda: int("x")]
)
def test_what_was_written_before_a_bad_end_is_kept(capturing, how):
    ev = capturing((end, how))
    assert ev() is False
    assert ev.tasks()[1].stdout == "last words\n"


def test_each_attempt_has_its_own(capturing, tmp_path):
    def count():
        with (tmp_path / "count").open("a") as file:
            file.write("!")
        print((tmp_path / "count").read_text())
        if len((tmp_path / "count").read_text()) < 3:
            int("x")

    ev = capturing((count,), step={"max_attempts": 3})
    assert ev() is True
    assert [attempt.stdout for attempt in ev.tasks()[1].attempts] == ["!\n", "!!\n", "!!!\n"]


def test_of_much_the_end_is_kept(capturing, capsys):
    ev = capturing((print, "x" * 300_000 + "end"))
    assert ev() is True
    kept = ev.tasks()[1].stdout
    assert (len(kept), kept[-4:]) == (1 << 16, "end\n")
    assert len(capsys.readouterr().out) == 300_004


def test_what_is_no_text_is_kept_as_far_as_it_can_be(capturing, capsys):
    ev = capturing((os.write, 1, "ü\0".encode() + b"\xff"))
    assert ev() is True
    assert ev.tasks()[1].stdout == "ü\\x00\ufffd"
    assert capsys.readouterr().out == "ü\0\ufffd"


def test_a_process_that_is_kept_has_its_own_output_back(capturing, tmp_path):
    def where():
        return [str(Path(f"/proc/self/fd/{number}").readlink()) for number in (1, 2)]

    ev = capturing((where,), max_tasks_per_child=None)
    go = ev._flow.events["go"]
    ev.add_assoc(go, ev.add_step("after", where))
    assert ev() is True
    _, captured, after = (task.result for task in ev.tasks())
    assert all(place.startswith("pipe:") for place in captured)
    assert after == where()


def test_what_a_step_has_left_running_is_shown_and_does_not_hold_it_up(capturing, tmp_path, capsys):
    go_on = tmp_path / "go on"

    def leave():
        code = f"""
import os, time
while not os.path.exists({str(go_on)!r}):
    time.sleep(0.01)
print('late', flush=True)
"""
        subprocess.Popen([sys.executable, "-c", code])

    def wait():
        go_on.touch()
        wait_until((tmp_path / "shown").exists)

    class Shown(io.StringIO):
        def write(self, text):
            if "late" in text:
                (tmp_path / "shown").touch()
            return super().write(text)

    ev = capturing((leave,))
    left = ev._flow.steps["s0"]
    ev.add_assoc(left.success, ev.add_step("wait", wait))
    stdout, sys.stdout = sys.stdout, Shown()
    try:
        assert ev() is True
        assert sys.stdout.getvalue() == "late\n"
    finally:
        sys.stdout = stdout
    assert ev.tasks("s0")[0].stdout == ""


def test_what_cannot_be_shown_is_kept(capturing, monkeypatch):
    class Broken(io.StringIO):
        def write(self, _text):
            raise OSError("no space")

    monkeypatch.setattr(sys, "stdout", Broken())
    ev = capturing((os.write, 1, b"kept"))
    assert ev() is True
    assert ev.tasks()[1].stdout == "kept"


def test_nothing_stays_open(capturing):
    def count():
        return len(list(Path("/proc/self/fd").iterdir()))

    ev = capturing((talk,))
    before = count()
    for sequence in range(2, 5):
        ev.trigger_event(ev._flow.events["go"], sequence)
        assert ev() is True
        assert count() == before


def test_a_bad_value_is_named(make):
    words = "capture_output in the config of step 's' is 1; expected True or False"
    with pytest.raises(evr.ConfigError, match=words):
        make().add_step("s", int, config={"capture_output": 1})


def test_a_thread_has_no_output_of_its_own(make):
    ev = make(config={"task_construct": threading.Thread})
    words = "capture_output in the config of step 's' is True, and the task_construct threading"
    with pytest.raises(evr.ConfigError, match=words):
        ev.add_step("s", int, config={"capture_output": True})
    ev.add_step("s", int)


def test_a_step_that_sends_descriptors_of_its_own_harms_nobody(make):
    def send():
        connection = socket.socket(fileno=os.dup(evr.current()._send.__self__._connection.fileno()))
        data = pickle.dumps(Captured())
        frame = struct.pack("!Q", len(data)) + data
        files = [os.open(os.devnull, os.O_RDONLY), os.open(__file__, os.O_RDONLY)]
        for sent in (files, files[:1], []):
            socket.send_fds(connection, [frame], sent)
        return "sent"

    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("send", send), ev.add_step("next", int))
    ev.trigger_event(go)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert ev() is True
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert ev.tasks()[0].result == "sent"
