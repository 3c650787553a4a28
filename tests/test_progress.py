"""Progress: what is counted, the picture of it, and what is seen on a terminal."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from datetime import UTC, datetime, timedelta

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

import eventor as evr
from eventor import TransitionKind as Kind
from eventor.look import live
from eventor.look.bars import ASCII, COLOURED, UNCOLOURED, picture, shares
from eventor.look.progress import Progress
from tests.conftest import take_signals

pytestmark = [pytest.mark.stores("either"), pytest.mark.usefixtures("measure")]

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def feed(*told):
    """Return the progress of a run that was told so: kind, step, sequence, and what else."""
    progress = Progress()
    progress(evr.Transition(Kind.run_started, BEGAN, 3, 0, "flow"))
    for second, (kind, step, sequence, more) in enumerate(told, 1):
        at = BEGAN + timedelta(seconds=second)
        progress(evr.Transition(Kind(kind), at, 3, 0, "flow", name=step, sequence=sequence, **more))
    return progress


def after(seconds):
    return BEGAN + timedelta(seconds=seconds)


def texts(progress, width=80, height=24, glyphs=COLOURED, seconds=10):
    return [line.plain for line in picture(progress, after(seconds), width, height, glyphs)]


def test_a_task_is_counted_where_it_stands():
    ready, active = ("task_ready", "s", 1, {}), ("task_active", "s", 1, {"attempt": 1})
    assert feed(("event_raised", "s", 1, {})).steps == {}
    assert feed(ready).steps == {"s": evr.TaskCounts(ready=1)}
    assert feed(ready, active).steps == {"s": evr.TaskCounts(active=1)}
    again = ("attempt_failed", "s", 1, {"error": "no"})
    assert feed(ready, active, again).steps == {"s": evr.TaskCounts(ready=1)}
    assert feed(ready, active, again).failures == feed().failures
    ended = ("task_success", "s", 1, {})
    assert feed(ready, active, again, active, ended).steps == {"s": evr.TaskCounts(success=1)}
    failed = feed(ready, active, ("task_failure", "s", 1, {"error": "E: no"}))
    assert failed.steps == {"s": evr.TaskCounts(failure=1)}
    assert [(one.task, one.error) for one in failed.failures] == [("s[1]", "E: no")]
    assert feed(("task_skipped", "s", 1, {})).steps == {"s": evr.TaskCounts(skipped=1)}


def test_a_task_of_an_earlier_call_is_counted_from_where_it_goes_on():
    assert feed(("task_active", "s", 1, {"attempt": 1})).steps == {"s": evr.TaskCounts(active=1)}


@pytest.mark.parametrize(
    ("told", "summary"),
    [
        ([], "nothing to do"),
        ([("task_success", "s", number, {}) for number in range(1200)], "1,200 succeeded"),
        (
            [
                ("task_success", "s", 1, {}),
                ("task_failure", "s", 2, {}),
                ("task_skipped", "s", 3, {}),
                ("task_active", "s", 4, {}),
                ("task_ready", "s", 5, {}),
            ],
            "1 succeeded, 1 failed, 1 skipped, 1 cut short, 1 left waiting",
        ),
    ],
)
def test_a_summary_is_one_line_of_what_there_was(told, summary):
    progress = feed(*told)
    progress(evr.Transition(Kind.run_ended, after(3.44), 3, 0, "flow", succeeded=True))
    assert progress.summary(after(100)) == f"eventor run 3.0: {summary} in 3.4 s"


@given(st.lists(st.integers(0, 10**6), min_size=5, max_size=5).filter(any), st.integers(6, 60))
def test_a_bar_is_full_and_has_a_cell_for_each_kind_of_task_that_there_is(numbers, width):
    words = ("success", "skipped", "failure", "active", "ready")
    cells = shares(evr.TaskCounts(**dict(zip(words, numbers, strict=True))), width)
    assert sum(cells) == width
    assert [number > 0 for number in numbers] == [cell > 0 for cell in cells]


def test_a_picture_has_a_bar_for_each_step_what_runs_and_what_failed():
    progress = feed(
        ("task_success", "fetch", 1, {}),
        ("task_success", "fetch", 2, {}),
        ("task_active", "convert", 1, {"attempt": 2}),
        ("task_failure", "convert", 2, {"error": "ValueError: no"}),
    )
    assert texts(progress, glyphs=ASCII) == [
        "eventor run 3.0  3 of 4 tasks  1 failed  10.0 s  flow",
        "fetch    ########################################  2/2",
        "convert  xxxxxxxxxxxxxxxxxxxx>>>>>>>>>>>>>>>>>>>>  1/2  1 failed  1 running",
        "1 of 2 sequences  1 failed  1 running",
        "1        ####################>>>>>>>>>>>>>>>>>>>>  1/2  7.0 s",
        "2        ####################xxxxxxxxxxxxxxxxxxxx  2/2  1 failed",
        "> convert[1]  7.0 s  attempt 2",
        "x convert[2]  ValueError: no",
    ]


def many_steps(steps):
    return feed(
        *(("task_success", f"step {number}", 1, {}) for number in range(steps - 2)),
        ("task_failure", f"step {steps - 2}", 1, {"error": "E: no"}),
        *(("task_active", f"step {steps - 1}", number, {"attempt": 1}) for number in range(9)),
    )


def test_of_more_steps_than_there_are_lines_those_that_run_or_failed_are_shown():
    lines = texts(many_steps(50), height=12, glyphs=ASCII)
    assert len(lines) == 12
    names = [line[:7] for line in lines if line.startswith("step")]
    assert {"step 48", "step 49"} <= set(names)
    assert names == sorted(names, key=lambda name: int(name.split()[1]))
    assert f"~ {50 - len(names)} more steps  {50 - len(names)}/{50 - len(names)}" in lines
    assert "0 of 9 sequences  1 failed  9 running" in lines
    assert "~ 7 more run" in lines
    assert lines[-1] == "x step 48[1]  E: no"


def test_a_sequence_that_failed_and_goes_on_has_failed_and_runs():
    told = [("task_failure", "a", 1, {"error": "E: no"}), ("task_active", "b", 1, {"attempt": 1})]
    sequences = feed(*told).sequences
    assert (sequences.ended, sequences.failed, sequences.running) == (0, 1, 1)
    assert sequences.since(1) == after(2)
    sequences = feed(*told, ("task_success", "b", 1, {})).sequences
    assert (sequences.ended, sequences.failed, sequences.running) == (1, 1, 0)
    assert sequences.since(1) is None


def test_a_sequence_is_under_way_from_its_first_step_on():
    progress = feed(("task_active", "a", 1, {"attempt": 1}), ("task_active", "a", 2, {}))
    run = (3, 0, "flow")
    for second in (3, 4):
        for kind, step in (
            (Kind.task_success, "ab"[second - 3]),
            (Kind.task_ready, "bc"[second - 3]),
        ):
            progress(evr.Transition(kind, after(second), *run, name=step, sequence=1))
        assert progress.sequences.since(1) == after(1)
        assert progress.sequences.chosen(1) == [1]
        step = "bc"[second - 3]
        progress(evr.Transition(Kind.task_active, after(second), *run, name=step, sequence=1))
    progress(evr.Transition(Kind.task_success, after(5), *run, name="c", sequence=1))
    assert progress.sequences.since(1) is None
    assert progress.sequences.chosen(1) == [2]


TRANSITIONS = st.lists(
    st.tuples(
        st.sampled_from([kind.value for kind in Kind if kind.value.startswith("task")]),
        st.sampled_from("ab"),
        st.integers(1, 9) | st.sampled_from("123"),
        st.just({"attempt": 1}),
    ),
    max_size=60,
)


@given(TRANSITIONS, st.integers(0, 12))
def test_sequences_are_counted_as_their_tasks_are(told, most):
    progress = feed(*told)
    sequences = progress.sequences
    counts = list(sequences.counts.values())
    assert sum(counts, evr.TaskCounts()) == progress.total
    assert sequences.ended == sum(one.ended == one.all for one in counts)
    assert sequences.failed == sum(one.failure > 0 for one in counts)
    assert sequences.running == sum(one.active > 0 for one in counts)
    for sequence, one in sequences.counts.items():
        assert sequences.since(sequence) is None or one.ended < one.all
        assert sequences.since(sequence) is not None or not one.active
    chosen = sequences.chosen(most)
    assert len(set(chosen)) == len(chosen) == min(most, len(counts))
    assert set(chosen) <= set(sequences.counts)


def many_sequences(ended, steps=("fetch", "align", "call"), sequences=1000, at_once=4):
    """Return the progress of a run that is in the midst of it: each hundredth sequence fails."""
    told = [("task_ready", steps[0], number, {}) for number in range(sequences)]
    for number in range(ended):
        for step in steps:
            failed = number % 100 == 99 and step == steps[1]
            told.append(("task_failure" if failed else "task_success", step, number, {"error": ""}))
    for number in range(ended, ended + at_once):
        told.append(("task_success", steps[0], number, {}))
        told.append(("task_active", steps[1], number, {"attempt": 1}))
    return feed(*told), len(told)


def test_of_many_sequences_those_that_failed_and_run_the_longest_have_a_bar():
    progress, seconds = many_sequences(500)
    lines = texts(progress, 79, 22, ASCII, seconds + 3)
    assert len(lines) == 20
    assert lines[4] == "500 of 1,000 sequences  5 failed  4 running"
    bars = [line.split() for line in lines[5:13]]
    assert [name for name, *_ in bars] == ["399", "499", "500", "501", "502", "503", "504", "505"]
    assert bars[0][2:] == ["3/3", "1", "failed"]
    assert bars[2][2:] == ["1/2", "9.0", "s"]
    assert bars[7][2:] == ["0/1"]


def test_in_a_small_picture_there_is_a_line_for_steps_sequences_what_runs_and_what_failed():
    progress, seconds = many_sequences(500)
    assert texts(progress, 39, 10, ASCII, seconds + 3) == [
        "eventor run 3.0  1,504 of 2,004 tasks  ",
        "fetch  ###########..........  504/1,000",
        "align  ###################x>    500/504",
        "call   #####################    500/500",
        "500 of 1,000 sequences  5 failed  4 run",
        "500    ###########>>>>>>>>>>        1/2",
        "> align[500]  9.0 s",
        "~ 3 more run",
        "x align[399]  ",
        "x align[499]  ",
    ]


@pytest.mark.parametrize(("width", "height"), [(79, 22), (39, 10)])
def test_a_picture_of_many_sequences_does_not_jump_about(width, height):
    shapes = set()
    for ended in range(300, 320):
        progress, seconds = many_sequences(ended)
        lines = texts(progress, width, height, ASCII, seconds + 70)
        bars = [re.search(r"[#=x>.]{2,}", line) for line in lines]
        shapes.add(tuple(bar and bar.span() for bar in bars))
    assert len(shapes) == 1


def test_where_there_is_one_step_or_one_sequence_there_are_no_bars_of_sequences():
    told = [("task_active", "a", number, {"attempt": 1}) for number in range(5)]
    assert "sequence" not in "".join(texts(feed(*told)))
    told = [("task_active", step, 1, {"attempt": 1}) for step in "abc"]
    assert "sequence" not in "".join(texts(feed(*told)))


def odd_texts():
    return st.text(st.sampled_from("aä漢\x1b\n\r\t\u0301é👍 "), min_size=1, max_size=40)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([kind.value for kind in Kind if kind.value.startswith("task")]),
            odd_texts(),
            st.integers(1, 3) | odd_texts(),
            odd_texts().map(lambda text: {"error": text}),
        ),
        max_size=40,
    ),
    st.integers(1, 130),
    st.integers(-1, 40),
    st.sampled_from([COLOURED, UNCOLOURED, ASCII]),
)
def test_a_picture_fits_the_terminal_whatever_it_shows(told, width, height, glyphs):
    lines = texts(feed(*told), width, height, glyphs)
    assert 1 <= len(lines) <= max(1, height)
    for line in lines:
        assert cell_len(line) <= width
        assert line.isprintable()
        assert line.isascii() or glyphs is not ASCII


FLOW = """
import os, sys, threading
import eventor as evr

def flow(func, sequences=3, progress=None, config={}, step={}, **arguments):
    config = {"logdir": "logs", "max_concurrent": 2, "stop_on_exception": False, **config}
    with evr.Eventor(store=":memory:", config=config, **arguments) as ev:
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("work", func, args=(evr.sequence,), config=step))
        ev.trigger_events(go, range(sequences))
        return ev(progress=progress)

def wait(sequence):
    gate = os.open("gate", os.O_RDONLY)
    os.read(gate, 1)
    os.close(gate)
"""


class Terminal:
    """A script on a terminal, and what is seen there."""

    def __init__(self, path, code, size, variables):
        os.mkfifo(path / "gate")
        self.gate = os.open(path / "gate", os.O_RDWR)
        (path / "program.py").write_text(FLOW + textwrap.dedent(code))
        self.path = path
        self.screen = pyte.HistoryScreen(*size, history=1000)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.descriptor, other = pty.openpty()
        self.resize(*size)
        unset = dict.fromkeys(("NO_COLOR", "LC_ALL", "LC_CTYPE", "LANG", "COLUMNS", "LINES"))
        known = {**os.environ, **unset, "TERM": "xterm", "LANG": "C.UTF-8", **variables}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "program.py"],
            cwd=path,
            env={name: value for name, value in known.items() if value is not None},
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            preexec_fn=self.take_terminal,  # noqa: PLW1509 (the tests have one thread)
        )
        os.close(other)

    @staticmethod
    def take_terminal():
        take_signals()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def resize(self, columns, lines):
        self.screen.resize(lines, columns)
        packed = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, packed)

    @property
    def lines(self):
        """All lines that were seen, those that were scrolled away too."""
        above = [
            "".join(line[column].data for column in range(self.screen.columns))
            for line in self.screen.history.top
        ]
        lines = [line.rstrip() for line in (*above, *self.screen.display)]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def read(self):
        """Read on; tell whether there may be more."""
        try:
            ready, _, _ = select.select([self.descriptor], [], [], 30)
            assert ready, "the program shows nothing more"
            data = os.read(self.descriptor, 1 << 16)
        except OSError:  # Linux tells the end of the last program there so
            return False
        self.raw += data
        self.stream.feed(data)
        return bool(data)

    def until(self, *patterns):
        """Read on until there are lines with that, one below the other.

        What was read last may end in the middle of a picture, above what is left of the one before.
        """
        below = re.compile("\n".join(patterns), re.MULTILINE)
        deadline = time.monotonic() + 30
        while not below.search("\n".join(self.lines)):
            assert self.read(), "\n".join(self.lines)
            assert time.monotonic() < deadline, "\n".join(self.lines)

    def open_gate(self):
        """Let go on the steps that wait, and those that will."""
        os.write(self.gate, b"!" * 1000)

    def end(self):
        """Read to the end; return the exit code."""
        while self.read():
            pass
        return self.process.wait(30)

    def close(self):
        self.process.kill()
        self.process.wait(30)
        os.close(self.descriptor)
        os.close(self.gate)


@pytest.fixture
def terminal(tmp_path):
    """Run a script on a terminal of its own."""
    opened = []

    def run(code, size=(80, 24), **variables):
        opened.append(Terminal(tmp_path, code, size, variables))
        return opened[-1]

    yield run
    for one in opened:
        one.close()


SUMMARY = r"eventor run 1\.0: (.*) in \d+\.\d s"


def summary_of(lines):
    """Return what the last line tells; there is but one such line."""
    found = [one for line in lines if (one := re.fullmatch(SUMMARY, line))]
    assert len(found) == 1, "\n".join(lines)
    assert lines[-1] == found[0][0]
    return found[0][1]


def test_on_a_terminal_there_is_a_picture_while_it_runs_and_a_line_at_the_end(terminal):
    seen = terminal("flow(wait, logging_level=100)")
    seen.until(r"0 of 3 tasks")
    seen.until(r"^▶ work\[1\]  \d+\.\d s$")
    assert seen.lines[1].startswith("eventor run 1.0  0 of 3 tasks")
    assert re.fullmatch("work  ━{40}  0/3  2 running", seen.lines[2])
    first = seen.lines[3]
    seen.until(rf"^(?!{re.escape(first)}$)▶ work\[0\]  \d+\.\d s$")  # it is redrawn by itself
    seen.open_gate()
    assert seen.end() == 0
    assert seen.lines == [seen.lines[0]]
    assert summary_of(seen.lines) == "3 succeeded"
    assert b"\x1b[?" not in seen.raw  # the cursor is never hidden


@pytest.mark.parametrize(("size", "bar"), [((80, 24), 40), ((40, 12), 14)])
def test_on_a_terminal_there_are_bars_of_steps_and_of_sequences(terminal, size, bar):
    seen = terminal(
        """
        config = {"logdir": "logs", "max_concurrent": 3}
        with evr.Eventor(store=":memory:", config=config, logging_level=100) as ev:
            go = ev.add_event("go")
            first = ev.add_step("first", int)
            ev.add_assoc(go, first)
            ev.add_assoc(first.success, ev.add_step("second", wait, (evr.sequence,)))
            ev.trigger_events(go, ["monday", "tuesday", "friday"])
            ev()
        """,
        size,
    )
    seen.until(
        r"^eventor run 1\.0  3 of 6 tasks  \d+\.\d s",
        f"first    ━{{{bar}}}  3/3",
        f"second   ━{{{bar}}}  0/3  3 running",
        "0 of 3 sequences  3 running",
        *(f"{day:7}  ━{{{bar}}}  1/2  .* s" for day in ("monday", "tuesday", "friday")),
        r"▶ second\[\w+\]  .* s",
        r"(▶ second\[\w+\]  .* s\n▶ second\[\w+\]  .* s|… 2 more run)$",
    )
    seen.open_gate()
    assert seen.end() == 0
    assert summary_of(seen.lines) == "6 succeeded"


def test_log_lines_are_above_the_picture_and_whole(terminal):
    seen = terminal("flow(wait, 2)", size=(120, 24))
    seen.until("▶ work")
    assert [line[-1:] for line in seen.lines[:4]] == ["]", "]", "]", ""]
    assert seen.lines[4].startswith("eventor run 1.0")
    seen.open_gate()
    assert seen.end() == 0
    assert len([line for line in seen.lines if line.startswith("[ 20")]) == 6
    assert all(re.fullmatch(r"\[ 20.*_\w+ \]|\[.*main\.\w+ \]", one) for one in seen.lines[:-1])
    assert summary_of(seen.lines) == "2 succeeded"


def test_what_steps_print_by_themselves_is_not_lost(terminal):
    seen = terminal(
        """
        def work(sequence):
            wait(sequence)
            print(f"own {sequence}\\nunended", end="", flush=True)
            wait(sequence)

        flow(work, 1, logging_level=100)
        """
    )
    seen.until(r"▶ work\[0\]")
    os.write(seen.gate, b"!")
    seen.until("unended")
    seen.until(r"^eventor run 1.0")  # it is below
    seen.open_gate()
    assert seen.end() == 0
    assert seen.lines[0] == "own 0"
    assert seen.lines[1].startswith("unended")
    assert summary_of(seen.lines) == "1 succeeded"


def test_captured_output_leaves_no_trace_of_the_picture(terminal):
    seen = terminal(
        """
        def captured(sequence):
            wait(sequence)
            print("captured\\n" * 3, end="")

        flow(captured, 1, logging_level=100, step={"capture_output": True})
        """
    )
    seen.until(r"▶ work\[0\]")
    seen.open_gate()
    assert seen.end() == 0
    assert seen.lines[:-1] == ["captured"] * 3


def test_what_failed_is_told_and_what_a_hook_prints_is_above(terminal):
    seen = terminal(
        """
        def fail(sequence):
            if sequence == 0:
                raise ValueError("not so")
            wait(sequence)

        flow(fail, 2, logging_level=100, config={"on_transition": print})
        """
    )
    seen.until(r"✗ work\[0\]  ValueError: not so$")
    seen.until("1 failed  1 running")
    seen.open_gate()
    assert seen.end() == 0
    assert seen.lines[0] == "event_raised go[0]"
    assert seen.lines[-2] == "run_ended 1.0"
    assert len(seen.lines) == 2 + 2 + 2 + 2 + 2 + 1  # the last is the summary
    assert summary_of(seen.lines) == "1 succeeded, 1 failed"


def test_ctrl_c_leaves_the_terminal_as_it_was(terminal):
    seen = terminal("flow(wait, 5)")
    seen.until("▶ work")
    os.write(seen.descriptor, b"\x03")
    seen.until("Stopping by SIGINT")
    seen.until("▶ work")
    seen.open_gate()
    assert seen.end() == -signal.SIGINT
    assert any(re.fullmatch(SUMMARY, line) for line in seen.lines)
    assert "2 succeeded, 3 left waiting" in "\n".join(seen.lines)
    assert "━" not in "\n".join(seen.lines)
    assert seen.lines[-1] == "KeyboardInterrupt"


def test_a_terminal_may_be_resized(terminal):
    seen = terminal("flow(wait, 5, logging_level=100)", size=(100, 24))
    seen.until("━{40}  0/5  2 running")
    seen.resize(40, 10)
    seen.until("━{17}  0/5  2 running")
    seen.open_gate()
    assert seen.end() == 0
    assert summary_of(seen.lines) == "5 succeeded"


def test_a_terminal_that_takes_nothing_holds_up_nobody(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    reading, writing = pty.openpty()
    with os.fdopen(writing, "w") as stream, contextlib.closing(live.Terminal(stream)) as terminal:
        for second in range(300):
            terminal.draw(many_steps(9), after(second))
            terminal.erase()
    os.close(reading)


def test_a_terminal_that_takes_pictures_in_parts_keeps_none_of_them(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    reading, writing = pty.openpty()
    screen = pyte.Screen(80, 24)
    seen, stream = pyte.ByteStream(screen), os.fdopen(writing, "w")
    write, raw = os.write, b""
    with stream, contextlib.closing(live.Terminal(stream)) as terminal:
        with monkeypatch.context() as slow:
            slow.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:700]))
            for second in range(7):
                terminal.draw(many_steps(9), after(second))
        terminal.erase()
        stream.write("end")
        stream.flush()
        while not raw.endswith(b"end"):
            raw += os.read(reading, 1 << 16)
    os.close(reading)
    seen.feed(raw)
    assert [line.strip() for line in screen.display if line.strip()] == ["end"]
    assert raw.count(b"eventor run 3.0") == 3  # the others would have been late


def test_a_small_terminal_has_a_small_picture(terminal):
    seen = terminal("flow(wait, 1, logging_level=100)", size=(18, 4))
    seen.until(r"^eventor run 1\.0 …$")
    assert len(seen.lines) <= 3
    seen.open_gate()
    assert seen.end() == 0


def test_without_unicode_or_colours_it_is_drawn_in_what_there_is(terminal, tmp_path):
    seen = terminal("flow(wait, 4, logging_level=100)", LANG="C")
    seen.until(r"^work  >{20}\.{20}  0/4  2 running$")
    seen.open_gate()
    assert seen.end() == 0
    assert seen.raw.isascii()


def test_no_colour_is_used_where_none_is_wanted(terminal):
    seen = terminal("flow(wait, 4, logging_level=100)", NO_COLOR="1")
    seen.until("▒{20}░{20}")
    seen.open_gate()
    assert seen.end() == 0
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9]m", seen.raw)


def test_there_is_no_thread_and_no_other_stream_in_the_program_or_its_steps(terminal):
    seen = terminal(
        """
        streams = sys.stdout, sys.stderr
        hooks = sys.displayhook, sys.excepthook

        def same(_=None):
            assert (sys.stdout, sys.stderr) == streams
            assert (sys.displayhook, sys.excepthook) == hooks
            assert threading.active_count() == 1

        def work(sequence):
            wait(sequence)
            same()

        sys.exit(not flow(work, 2, config={"on_transition": same}))
        """
    )
    seen.until("▶ work")
    seen.open_gate()
    assert seen.end() == 0
    assert "has raised" not in "\n".join(seen.lines)
    assert summary_of(seen.lines) == "2 succeeded"


@pytest.mark.parametrize(
    ("code", "variables"),
    [
        ("flow(int, progress=False)", {}),
        ("import logging; logging.basicConfig(level=30); flow(int)", {}),
        ("sys.modules['rich'] = None; sys.path_hooks.clear(); flow(int)", {}),
        ("flow(int)", {"TERM": "dumb"}),
    ],
)
def test_without_being_asked_for_nothing_is_shown(terminal, code, variables):
    seen = terminal(code.replace("flow(int", "flow(int, 1"), **variables)
    assert seen.end() == 0
    assert not any(re.fullmatch(SUMMARY, line) for line in seen.lines)


def test_what_runs_in_a_step_shows_nothing(terminal):
    seen = terminal("sys.exit(not flow(lambda sequence: flow(int, 1), 1, logging_level=100))")
    assert seen.end() == 0
    assert summary_of(seen.lines) == "1 succeeded"


def test_where_there_is_no_terminal_only_the_summary_is_shown_and_if_asked_for(script):
    flows = """
flow(int, 1, logging_level=100)
flow(int, 2, True, logging_level=100)
sys.stderr = None
flow(int, 3, True)
"""
    ran = script(FLOW + flows)
    assert ran.returncode == 0
    (line,) = ran.stderr.splitlines()
    assert summary_of([line]) == "2 succeeded"


def test_without_rich_it_says_what_to_install(make, monkeypatch):
    monkeypatch.setattr("eventor.look.live.installed", lambda: False)
    with pytest.raises(evr.ConfigError, match=r"pip install 'eventor\[cli\]'"):
        make().run(progress=True)


@pytest.mark.parametrize("given", [1, "yes", []])
def test_what_is_no_answer_is_refused(make, given):
    with pytest.raises(evr.ConfigError, match="progress is"):
        make()(progress=given)


def test_eventor_imports_nothing_of_it(script):
    ran = script("import sys, eventor; print('rich' in sys.modules)")
    assert ran.stdout == "False\n"
