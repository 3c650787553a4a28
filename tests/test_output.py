"""What a step writes to standard output and error is kept with its record, and shown."""

import bz2
import contextlib
import gzip
import io
import lzma
import multiprocessing
import os
import pickle
import pty
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tty
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eventor as evr
from eventor.steps import launch, output
from eventor.steps.task import Captured
from tests.conftest import wait_until
from tests.test_timeouts import be_late_when

pytestmark = [pytest.mark.stores("either"), pytest.mark.usefixtures("measure")]

SPAWN = multiprocessing.get_context("spawn").Process
CONSTRUCTS = [
    pytest.param({}, id="fork"),
    pytest.param({"max_tasks_per_child": None}, id="warm"),
    pytest.param({"task_construct": SPAWN}, id="spawn"),
]
KEPT = 65_536


@pytest.fixture
def line(make):
    """Let steps follow each other, whose output is captured unless `steps` says else."""

    def build(*funcs, config=None, steps=None):
        ev = make(config=config)
        events = [ev.add_event(f"e{number}") for number in range(len(funcs) + 1)]
        for number, func in enumerate(funcs):
            triggers = {"at_complete": events[number + 1]}
            settings = {"capture_output": True, **(steps or {})}
            step = ev.add_step(f"s{number}", func, triggers=triggers, config=settings)
            ev.add_assoc(events[number], step)
        ev.trigger_event(events[0])
        return ev

    return build


@pytest.fixture
def captured(line):
    """Run one step, and return its record."""

    def run(func, **settings):
        ev = line(func, **settings)
        ev()
        (task,) = ev.tasks()
        return task

    return run


def write():
    print("printed, ü")
    print("and in error", file=sys.stderr)
    sys.stdout.buffer.write(b"bytes\n")
    sys.stdout.flush()
    os.system("echo started; echo started in error >&2")
    os.write(1, b"written\n")


OUT, ERR = "printed, ü\nbytes\nstarted\nwritten\n", "and in error\nstarted in error\n"


@pytest.mark.parametrize("config", CONSTRUCTS)
def test_what_a_step_and_its_subprocesses_write_is_kept_and_shown(line, capsys, config):
    """Also of one that was forked ahead, and of one whose process is used again."""
    ev = line(write, int, write, write, config=config)
    assert ev() is True
    assert [(task.stdout, task.stderr) for task in ev.tasks()] == [
        (OUT, ERR),
        ("", ""),
        (OUT, ERR),
        (OUT, ERR),
    ]
    shown = capsys.readouterr()
    assert shown.out == 3 * OUT
    assert shown.err.count(ERR) == 3


def test_nothing_is_kept_of_a_step_that_is_not_captured(captured):
    task = captured(write, steps={"capture_output": False})
    assert (task.stdout, task.stderr) == (None, None)


ENDS = {
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": lambda: 1 / 0,
    "sys.exit": lambda: sys.exit("with a word"),
    "timeout": lambda: time.sleep(600),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("config", CONSTRUCTS[:2])
def test_what_was_written_before_a_step_failed_is_kept(
    captured, config, end, tmp_path, monkeypatch
):
    def step():
        write()
        (tmp_path / "written").touch()
        ENDS[end]()

    if end == "timeout":
        be_late_when((tmp_path / "written").exists, monkeypatch)
    task = captured(step, config=config, steps={"timeout": 600})
    assert task.status == "failure"
    assert (task.stdout, task.stderr) == (OUT, ERR)


def test_the_end_of_what_is_written_is_kept(captured, capsys):
    """By bytes; a character that this cuts is left out, and not one of what is shown."""
    task = captured(lambda: print(end="ü" * 500_000 + "x"))
    assert task.stdout == "ü" * (KEPT // 2 - 1) + "x"
    assert capsys.readouterr().out == "ü" * 500_000 + "x"


PARTS = [b"a", b"\0", b"\xff", *(char.encode() for char in "ü\u20ac\U0001f600\ufffd")]
# And parts of characters, as they are left where one is cut.
PARTS += [b"\x80", b"\xe2\x82", b"\xf0\x9f", b"\xf0\x9f\x98"]


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(PARTS), st.integers(1, 20)), max_size=12), st.integers(8, 40)
)
def test_what_is_kept_is_the_end_by_whole_characters(parts, kept):
    """Where the cut is inside a character, that is left out; what is no text takes more bytes."""
    written = b"".join(part * times for part, times in parts)
    whole = written.decode("utf-8", "replace").replace("\0", "\\x00")
    reading, writing = os.pipe()
    os.write(writing, written)
    os.close(writing)
    with mock.patch.object(output, "KEPT_BYTES", kept):
        one = output.Output(reading, mock.Mock())
        one.read_all()
        one.close()
        text = one.text
    assert whole.endswith(text)
    assert len(text.encode()) <= kept
    # One character more would not fit, or the part of one was left out.
    assert len(text.encode()) >= min(kept, len(whole.encode())) - 3


def test_no_more_is_kept_of_what_is_no_text(captured):
    task = captured(lambda: os.write(1, b"\x80" * 100_000) and os.write(1, b"\0\xff" * 50_000))
    assert task.stdout.endswith("\\x00\ufffd")
    assert KEPT - 7 < len(task.stdout.encode()) <= KEPT


def test_what_is_no_text_is_kept_as_a_store_can_keep_it(captured):
    def step():
        os.write(1, b"\0\xff\xc3")
        time.sleep(0.05)
        os.write(1, b"\xbc\r\n")
        print("\ud800")

    assert captured(step).stdout == "\\x00\ufffdü\r\n\\ud800\n"


def test_a_step_that_writes_more_than_a_pipe_holds_holds_up_nobody(make, tmp_path):
    """It goes on until another step has run."""
    written, done = tmp_path / "written", tmp_path / "done"
    ev = make(config={"max_concurrent": 2})
    go = ev.add_event("go")

    def flood():
        for _ in range(1000):
            os.write(1, b"x" * 1000)
        written.touch()
        while not done.exists():
            os.write(1, b"x" * 1000)

    def other():
        wait_until(written.exists)
        done.touch()

    ev.add_assoc(go, ev.add_step("flood", flood, config={"capture_output": True}))
    ev.add_assoc(go, ev.add_step("other", other))
    ev.trigger_event(go)
    assert ev() is True
    assert ev.tasks("flood")[0].stdout == "x" * KEPT


def test_it_is_shown_while_the_step_runs(line, monkeypatch, tmp_path):
    class Shown(io.StringIO):
        def write(self, text):
            (tmp_path / "shown").touch()
            return super().write(text)

    def step():
        print("now")
        wait_until((tmp_path / "shown").exists)

    monkeypatch.setattr("sys.stdout", Shown())
    assert line(step)() is True
    assert sys.stdout.getvalue() == "now\n"


_SURELY_TAKEN = 90_000
"""Bytes that are more than the 64 KiB of a pipe, and that two take though nobody reads them.

A pipe has 16 pages, of which pieces of a little more than half a page leave the rest empty.
"""

FLOOD = """
    import os, pathlib, subprocess, sys, time
    import eventor as evr
    from eventor.steps import launch

    def flood():
        for number in range(300):
            os.write(1, b"x" * 1000)
            if number == 80:  # more than the pipe to the reader holds; see _SURELY_TAKEN
                pathlib.Path("stalls").touch()
        os.write(1, b"the last words")

    def sleep():
        time.sleep(600)

    def say():
        pathlib.Path("said").touch()

    if sys.argv[2:]:
        launch.GRACE_SECONDS = float(sys.argv[2])
    if sys.argv[3:]:
        sys.path.insert(0, sys.argv[3])
        import pytest
        from tests.test_timeouts import be_late_when
        waits = pathlib.Path("stalls"), pathlib.Path("said")
        be_late_when(lambda: all(path.exists() for path in waits), pytest.MonkeyPatch())
    settings = {"logdir": ".", "max_concurrent": 2}
    with evr.Eventor(store=os.environ["STORE"], config=settings) as ev:
        go, late = ev.add_event("go"), ev.add_event("late")
        config = {"capture_output": True, **eval(sys.argv[1])}
        ev.add_assoc(go, ev.add_step("flood", flood, config=config))
        late_config = {"timeout": 0.2}
        late = ev.add_step("sleep", sleep, config=late_config, triggers={"at_failure": late})
        ev.add_assoc(go, late)
        ev.add_assoc(late.failure, ev.add_step("say", say))
        ev.trigger_event(go)
        sys.exit(ev() is not True)
"""


def test_a_reader_who_stalls_holds_up_what_he_reads_and_nothing_else(start, tmp_path, place):
    """All comes to him in the end, and is waited for."""
    process = start(FLOOD, "{}", STORE=place.store)
    wait_until((tmp_path / "said").exists)
    assert process.poll() is None
    shown, errors = process.communicate(timeout=30)
    assert (process.returncode, shown) == (0, "x" * 300_000 + "the last words"), errors


def test_a_timeout_is_not_held_up_by_a_reader_who_stalls(start, tmp_path, place):
    root = Path(__file__).parent.parent
    process = start(FLOOD, "{'timeout': 600}", "5", root, STORE=place.store)
    query = "SELECT status FROM eventor_task WHERE step = 'flood'"
    wait_until((tmp_path / "said").exists)
    wait_until(lambda: ("failure",) in place.sql(query))
    assert process.poll() is None
    shown, _errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert set(shown) == {"x"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_not_held_up_by_a_reader_who_stalls(start, tmp_path, number, place):
    """The first lets the steps end, of which one waits for that reader; the second ends it."""
    process = start(FLOOD, "{}", STORE=place.store)
    wait_until((tmp_path / "said").exists)
    process.send_signal(number)
    wait_until(lambda: "Stopping by SIG" in (tmp_path / "program.debug.log").read_text())
    process.send_signal(number)
    assert process.wait(timeout=30) == -number


def test_after_a_signal_a_reader_who_stalls_is_not_waited_for(start, tmp_path, place):
    """What the step has written is kept all the same."""
    flood = f"range({_SURELY_TAKEN // 1000})"
    process = start(FLOOD.replace("range(300)", flood), "{}", "0.5", STORE=place.store)
    wait_until((tmp_path / "said").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM
    (kept,) = place.sql("SELECT stdout FROM eventor_task WHERE step = 'flood'")
    assert kept[0].endswith("x" * 1000 + "the last words")


def test_a_reader_who_has_gone_harms_nobody(start, place):
    process = start(FLOOD, "{}", STORE=place.store)
    process.stdout.close()
    process.stdout = None
    assert process.wait(timeout=60) == 0, process.stderr.read()


@pytest.mark.parametrize("settings", [{}, {"max_tasks_per_child": None}, {"task_construct": SPAWN}])
def test_what_the_program_has_printed_to_nobody_fails_no_step(tmp_path, settings):
    """It is lost, as it is without eventor; the program's own next print may tell it."""
    code = f"""if True:
        import multiprocessing, sys
        import eventor as evr

        if __name__ == "__main__":
            sys.stdin.read()
            print("to nobody")
            config = {{"logdir": {str(tmp_path)!r}, "max_tasks_per_child": {
        settings.get("max_tasks_per_child", 1)
    }}}
            if {"task_construct" in settings}:
                config["task_construct"] = multiprocessing.get_context("spawn").Process
            with evr.Eventor(store=":memory:", config=config) as ev:
                go = ev.add_event("go")
                ev.add_assoc(go, ev.add_step("a", int), ev.add_step("b", int))
                ev.trigger_event(go)
                ok = ev()
                errors = [task.error for task in ev.tasks()]
            sys.stderr.write(f"{{ok}} {{errors}}")
    """
    path = tmp_path / "program.py"
    path.write_text(code)
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(
        [sys.executable, path],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    process.stdin.close()
    process.stdin = process.stdout = None
    _shown, errors = process.communicate(timeout=60)
    assert errors.rstrip().endswith("True [None, None]"), errors


@pytest.mark.parametrize("kind", ["pipe", "socket", "terminal", "file"])
def test_what_steps_write_comes_through_whole_and_in_order(tmp_path, kind):
    """Bytes that are no text included, however slowly they are read."""
    code = f"""if True:
        import os, sys
        import eventor as evr

        def flood(number):
            data = b"%d\\xff\\xc3" % number + "ü".encode()
            for _ in range(500):
                os.write(1, data * 100)
            print("end", number)

        print("begin")
        config = {{"logdir": {str(tmp_path)!r}}}
        with evr.Eventor(store=":memory:", config=config) as ev:
            go = ev.add_event("go")
            for number in range(3):
                step = ev.add_step(str(number), flood, (number,), config={{"capture_output": True}})
                ev.add_assoc(go, step)
            ev.trigger_event(go)
            ev()
        print("end")
    """
    if kind == "socket":
        reading, writing = (end.detach() for end in socket.socketpair())
    elif kind == "terminal":
        reading, writing = pty.openpty()
        tty.setraw(writing)
    elif kind == "pipe":
        reading, writing = os.pipe()
    else:
        writing = os.open(tmp_path / "shown", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        reading = os.open(tmp_path / "shown", os.O_RDONLY)
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", code], stdout=writing)
    os.close(writing)
    if kind == "file":
        assert process.wait(timeout=60) == 0
    shown = b""
    # A terminal whose other side has gone is read with an error.
    with contextlib.suppress(OSError):
        while part := os.read(reading, 1000):
            shown += part
    os.close(reading)
    assert process.wait(timeout=60) == 0
    floods = [b"%d\xff\xc3\xc3\xbc" % number * 50_000 + b"end %d\n" % number for number in range(3)]
    assert shown == b"begin\n" + b"".join(floods) + b"end\n"


def test_what_the_program_cannot_encode_is_shown_with_escapes(script):
    ran = script(
        r"""
        import os
        import eventor as evr

        def step():
            print("before, ä€\n", end="after\n")
            os.write(1, b"\xff\n")

        with evr.Eventor(store=":memory:", config={"logdir": "."}) as ev:
            go = ev.add_event("go")
            ev.add_assoc(go, ev.add_step("s", step, config={"capture_output": True}))
            ev.trigger_event(go)
            ev()
            assert ev.tasks()[0].stdout == "before, ä€\nafter\n\ufffd\n"
        """,
        PYTHONIOENCODING="ascii",
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "before, \\xe4\\u20ac\nafter\n\\udcff\n"


class Narrow(io.StringIO):
    encoding = "ascii"

    def write(self, text):
        text.encode("ascii")
        return super().write(text)


def test_what_an_object_for_a_stream_cannot_encode_is_shown_with_escapes(captured, monkeypatch):
    monkeypatch.setattr("sys.stdout", Narrow())
    assert captured(lambda: print("ü")).stdout == "ü\n"
    assert sys.stdout.getvalue() == "\\xfc\n"


@pytest.mark.parametrize("kind", [gzip, bz2, lzma])
def test_what_is_shown_in_a_compressed_file_can_be_read(captured, tmp_path, kind):
    with kind.open(tmp_path / "shown", "wt") as file, contextlib.redirect_stdout(file):
        print("before")
        captured(lambda: print("step"))
        print("after")
    with kind.open(tmp_path / "shown", "rt") as file:
        assert file.read() == "before\nstep\nafter\n"


def test_what_is_shown_has_the_line_ends_of_the_file(captured, tmp_path):
    with (
        (tmp_path / "shown").open("w", newline="\r\n") as file,
        contextlib.redirect_stdout(file),
    ):
        captured(lambda: print("step"))
    assert (tmp_path / "shown").read_bytes() == b"step\r\n"


def test_a_write_that_a_program_has_put_in_place_is_called(captured, tmp_path):
    shown = []
    with (tmp_path / "shown").open("w") as file, contextlib.redirect_stdout(file):
        file.write = shown.append
        captured(lambda: print("step"))
    assert shown == ["step\n"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_no_mark_of_an_encoding_stands_within_what_is_shown(tmp_path, encoding):
    code = f"""if True:
        import eventor as evr

        print("begin")
        with evr.Eventor(store=":memory:", config={{"logdir": {str(tmp_path)!r}}}) as ev:
            go = ev.add_event("go")
            step = ev.add_step("s", print, (evr.sequence,), config={{"capture_output": True}})
            ev.add_assoc(go, step)
            ev.trigger_events(go, range(3))
            ev()
    """
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    assert ran.stdout.decode(encoding) == "begin\n0\n1\n2\n"


class Broken(io.StringIO):
    def write(self, text):
        raise ValueError("no way out")


@pytest.mark.parametrize("stream", [None, Broken()])
def test_what_cannot_be_shown_is_kept(captured, monkeypatch, stream):
    monkeypatch.setattr("sys.stdout", stream)
    task = captured(write)
    assert (task.status, task.stdout) == ("success", OUT)


def test_a_process_that_a_step_has_left_does_not_hold_up_its_end(line, tmp_path, capsys):
    """What it writes then is shown, and not kept; from the end of `ev()` on, nobody reads it."""

    def leave():
        code = f"""if True:
            import os, pathlib, time
            print("first", flush=True)
            place = pathlib.Path({str(tmp_path)!r})
            while not (place / "next").exists():
                time.sleep(0.005)
            print("later", flush=True)
            (place / "said").touch()
            try:
                while True:
                    print("x", flush=True)
                    time.sleep(0.005)
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                (place / "over").touch()
        """
        child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        child.returncode = 0
        print("step")

    def go_on():
        (tmp_path / "next").touch()
        wait_until((tmp_path / "said").exists)

    ev = line(leave, go_on)
    assert ev() is True
    assert "later" not in ev.tasks("s0")[0].stdout
    assert "later\n" in capsys.readouterr().out
    wait_until((tmp_path / "over").exists)


def test_a_process_of_many_steps_has_its_own_output_back(script):
    ran = script(
        """
        import os, sys
        import eventor as evr

        def both(number):
            print("printed", number)
            os.write(1, b"written\\n")
            sys.stderr = None
            return sys.stdout.encoding, sys.stdout.line_buffering, sys.stdout is stdout

        stdout = sys.stdout
        config = {"logdir": ".", "max_tasks_per_child": None}
        with evr.Eventor(store=":memory:", config=config) as ev:
            events = [ev.add_event(str(number)) for number in range(4)]
            for number in range(3):
                step = ev.add_step(
                    f"s{number}",
                    both,
                    (number,),
                    triggers={"at_success": events[number + 1]},
                    config={"capture_output": number == 1},
                )
                ev.add_assoc(events[number], step)
            ev.trigger_event(events[0])
            ev()
            print([task.stdout for task in ev.tasks()])
            first, second, third = [task.result for task in ev.tasks()]
            assert first == third == ("iso8859-1", False, True), (first, third)
            assert second == ("utf-8", True, False), second
    """,
        PYTHONUNBUFFERED="",
        PYTHONIOENCODING="iso8859-1",
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        *("written", "printed 0", "printed 1", "written", "written", "printed 2"),
        "[None, 'printed 1\\nwritten\\n', None]",
    ]


def count_descriptors():
    return len(list(Path("/dev/fd").iterdir()))


def spoil():
    os.write(2, b"last words")
    for number in (1, 2):
        os.close(number)


@pytest.mark.parametrize("config", CONSTRUCTS[:2])
def test_a_step_that_closes_its_output_ends_well(line, capfd, config):
    ev = line(spoil, write, config=config)
    assert ev() is True
    assert [task.stderr for task in ev.tasks()] == ["last words", ERR]


def test_the_output_of_a_thread_cannot_be_captured(make):
    ev = make(config={"task_construct": threading.Thread})
    with pytest.raises(evr.ConfigError, match=r"capture_output .* 's' is True.*threading\.Thread"):
        ev.add_step("s", int, config={"capture_output": True})
    assert ev.add_step("s", int, config={"capture_output": False})


@pytest.mark.parametrize("given", [1, None, "yes"])
def test_capture_output_is_true_or_false(make, given):
    with pytest.raises(evr.ConfigError, match=r"capture_output .* 's' is .*True or False"):
        make().add_step("s", int, config={"capture_output": given})


def test_each_attempt_has_its_own(line, tmp_path):
    def count():
        with (tmp_path / "count").open("a") as file:
            file.write("!")
        print((tmp_path / "count").read_text())
        if len((tmp_path / "count").read_text()) < 3:
            int("x")

    ev = line(count, steps={"max_attempts": 3})
    assert ev() is True
    assert [attempt.stdout for attempt in ev.tasks()[0].attempts] == ["!\n", "!!\n", "!!!\n"]


def test_nothing_stays_open(line):
    ev = line(write, write)
    before = count_descriptors()
    for sequence in range(2, 5):
        ev.trigger_event(ev._flow.events["e0"], sequence)
        assert ev() is True
        assert count_descriptors() == before


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
    before = count_descriptors()
    assert ev() is True
    assert count_descriptors() == before
    assert ev.tasks()[0].result == "sent"


def test_a_step_whose_output_was_closed_before_it_is_captured_too(line):
    def close_both():
        os.close(1)
        os.close(2)

    ev = line(close_both, write, close_both, config={"max_tasks_per_child": None})
    assert ev() is True
    assert [task.stdout for task in ev.tasks()] == ["", OUT, ""]


def test_what_many_steps_have_left_takes_few_descriptors(make):
    ev = make()
    go = ev.add_event("go")

    def leave():
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])

    ev.add_assoc(go, ev.add_step("leave", leave, config={"capture_output": True}))
    ev.trigger_events(go, range(40))
    before, most = count_descriptors(), 0
    loop_wait = launch.Launcher.wait

    def wait(launcher, bell, seconds):
        nonlocal most
        most = max(most, count_descriptors())
        loop_wait(launcher, bell, seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Launcher, "wait", wait)
        assert ev() is True
    assert most - before < 60
    for task in ev.tasks():
        with contextlib.suppress(OSError):
            os.killpg(task.pid, signal.SIGKILL)
