"""Progress on a terminal, drawn with Rich, below what the program and its steps write.

There is no thread, and nothing of `sys` is changed: the owner forks. The loop calls `View.watch`
before it waits; what is about to write calls `View.erase` first. The cursor rests above the
picture, on an empty line. So what a step writes by itself is not lost: the next picture is below.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from eventor import inside
from eventor.display import is_writable, own
from eventor.errors import ConfigError
from eventor.progress import Failure, Progress, Running
from eventor.types import TaskCounts
from eventor.words import clean, one_line, stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from rich.console import Console
    from rich.text import Text

    from eventor.types import Transition

_SECONDS_BETWEEN = 0.1
"""How often a picture is made, at most."""

_SECONDS_TO_LOOK = 0.25
"""How often the loop comes by, at least."""

_SECONDS_BEFORE = 0.2
"""A run that ends sooner has no picture."""

_COLUMNS, _LINES = 80, 24
"""The size of a terminal that does not know its own."""

_WIDEST_BAR = 40
_NARROWEST_BAR = 6
_WIDEST_NAME = 28
_TALLEST = 24
_LINES_OF_RUNNING, _LINES_OF_FAILURES = 4, 3

_DONE, _SKIPPED, _FAILED, _RUNNING, _WAITING = range(5)
_STYLES = ("green", "cyan", "bold red", "yellow", "bright_black")

_on_terminal = threading.Lock()
"""Held by who draws on the terminal; there is one in a program, and none in its forks."""


class Glyphs(NamedTuple):
    """What a picture is made of.

    Attributes:
        bar: for each kind of task, of what a bar consists.
        running: what stands before one that runs.
        failed: what stands before one that failed.
        more: what stands for what is left out.
    """

    bar: str
    running: str
    failed: str
    more: str


COLOURED = Glyphs("━━━━━", "▶", "✗", "…")
UNCOLOURED = Glyphs("█▓x▒░", "▶", "✗", "…")
ASCII = Glyphs("#=x>.", ">", "x", "~")


class View:
    """What is shown of one call of `ev()`.

    Args:
        clock: gives the time, in UTC.
        terminal: where the picture is drawn; None for a summary alone.
        shares: whether the program's own hooks may write there too.
    """

    def __init__(
        self, clock: Callable[[], datetime], terminal: Terminal | None, *, shares: bool
    ) -> None:
        self.progress = Progress()
        self._clock = clock
        self._terminal = self._opened = terminal
        self._shares = shares
        self._next = time.monotonic() + _SECONDS_BEFORE

    def heed(self, told: Transition) -> None:
        """Count what a transition tells; it is the first of the hooks."""
        self.progress(told)
        if self._shares:
            self.erase()

    def watch(self) -> float:
        """Show how far it is; return the seconds after which to come by again."""
        if self._terminal is None:
            return math.inf
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SECONDS_BETWEEN
            self._guarded(self._terminal.draw, self.progress, self._clock())
        else:
            self._guarded(self._terminal.draw_again)
        return _SECONDS_TO_LOOK

    def erase(self) -> None:
        """Make way for something that is written there."""
        if self._terminal is not None:
            self._guarded(self._terminal.erase)

    def close(self) -> None:
        """Leave a summary in place of the picture."""
        self.erase()
        if self._opened is not None:
            self._opened.close()
        if self.progress.began_at is None:
            return
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"{self.progress.summary(self._clock())}\n")
            sys.stderr.flush()

    def _guarded(self, do: Callable[..., object], *arguments: object) -> None:
        """Do something with the terminal; if it cannot be done, as after a hangup, do no more."""
        try:
            do(*arguments)
        except (OSError, ValueError):
            self._terminal = None


class Terminal:
    """The place on a terminal where a picture is.

    Args:
        stream: a text stream that writes to it.
    """

    def __init__(self, stream: Any) -> None:
        from rich.console import Console  # noqa: PLC0415 (it is optional, and slow to import)

        # Its own, so that writing there need not wait for a terminal that takes nothing.
        self._descriptor, _at_once = own(stream.fileno())
        self._encoding = stream.encoding
        self._console = Console(
            file=stream, force_terminal=True, highlight=False, markup=False, emoji=False
        )
        self._glyphs = _glyphs(self._console, stream.encoding)
        self._drawn = False
        self._columns = 0
        self._picture = ""

    def draw(self, progress: Progress, now: datetime) -> None:
        """Draw a picture in place of the last one."""
        size = os.get_terminal_size(self._descriptor)
        self._columns = size.columns or _COLUMNS
        height = (size.lines or _LINES) - 2
        lines = picture(progress, now, self._columns - 1, height, self._glyphs)
        with self._console.capture() as captured:
            for line in lines:
                self._console.print(line, no_wrap=True, overflow="crop", width=self._columns)
        # The last line may be that of the terminal, so that no line is begun after it.
        shown = captured.get().rstrip("\n").replace("\n", "\x1b[K\r\n")
        self._picture = f"\r\n{shown}\x1b[J\x1b[{len(lines)}A\r"
        self._drawn = False
        self.draw_again()

    def draw_again(self) -> None:
        """Draw the last picture, if it was erased."""
        if self._picture and not self._drawn and self._write(self._to_a_line + self._picture):
            self._drawn = True

    def erase(self) -> None:
        """Erase the picture."""
        if self._drawn and self._write(f"{self._to_a_line}\x1b[J"):
            self._drawn = False

    def close(self) -> None:
        """Let go of the terminal."""
        os.close(self._descriptor)

    @property
    def _to_a_line(self) -> str:
        """What moves the cursor to the start of an empty line, this one if it is empty.

        A step may have left it behind what it wrote; so many spaces then go on to the next line.
        """
        return f"{' ' * self._columns}\r"

    def _write(self, text: str) -> bool:
        """Write, and tell so, unless the terminal takes nothing, as after Ctrl-S."""
        if not is_writable(self._descriptor):
            return False
        try:
            os.write(self._descriptor, text.encode(self._encoding, "replace"))
        except BlockingIOError:
            return False
        return True


def installed() -> bool:
    """Tell whether Rich is."""
    return importlib.util.find_spec("rich") is not None


@contextlib.contextmanager
def shown(
    wanted: bool | None, clock: Callable[[], datetime], *, speaks: bool, shares: bool
) -> Iterator[View | None]:
    """Give the view of a call of `ev()`, and close it.

    Args:
        wanted: whether there is to be one; None is by what standard error is.
        clock: gives the time, in UTC.
        speaks: whether eventor itself writes its log there.
        shares: whether the program's hooks may write there.

    Raises:
        ConfigError: it is wanted, and Rich is missing.
    """
    if wanted is False or (wanted is None and not (speaks and _is_terminal() and installed())):
        yield None
        return
    if not installed():
        raise ConfigError(
            "progress is True, which needs the package rich; install it with "
            "pip install 'eventor[cli]', or leave progress out"
        )
    drawing = _is_terminal() and _on_terminal.acquire(blocking=False)
    try:
        if wanted is None and not drawing:
            yield None
            return
        view = View(clock, Terminal(sys.stderr) if drawing else None, shares=shares)
        try:
            yield view
        finally:
            view.close()
    finally:
        if drawing:
            _on_terminal.release()


def _is_terminal() -> bool:
    """Tell whether standard error is a terminal on which a picture can be drawn."""
    if inside.current_or_none() is not None or os.environ.get("TERM", "dumb") == "dumb":
        return False
    try:
        return os.isatty(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):
        return False


def _glyphs(console: Console, encoding: str) -> Glyphs:
    if _is_plain(encoding):
        return ASCII
    return UNCOLOURED if console.no_color or console.color_system is None else COLOURED


def _is_plain(encoding: str) -> bool:
    """Whether a terminal shows ASCII alone; Python itself takes UTF-8 where the locale is C."""
    if not encoding.lower().replace("-", "").startswith("utf8"):
        return True
    all_, type_, default = (os.environ.get(name, "") for name in ("LC_ALL", "LC_CTYPE", "LANG"))
    if all_:
        return all_ in ("C", "POSIX")
    return default in ("C", "POSIX") and type_ in ("", "C", "POSIX", "C.UTF-8")


def picture(
    progress: Progress, now: datetime, width: int, height: int, glyphs: Glyphs
) -> list[Text]:
    """Return the lines that show how far it is.

    Args:
        progress: what to show.
        now: the time.
        width: how many cells a line may have.
        height: how many lines there may be.
        glyphs: of what it is made.
    """
    height = max(1, min(height, _TALLEST))
    running, failures = progress.running, list(progress.failures)
    of_failures = min(len(failures), _LINES_OF_FAILURES, max(0, (height - 2) // 3))
    of_running = min(len(running), _LINES_OF_RUNNING, max(0, (height - 2 - of_failures) // 2))
    of_steps = height - 1 - of_failures - of_running
    lines = [
        _headline(progress, now, glyphs),
        *_of_steps(progress.steps, width, of_steps, glyphs),
        *_of_running(running, now, of_running, glyphs),
        *(_of_failure(one, glyphs) for one in failures[len(failures) - of_failures :]),
    ]
    for line in lines:
        line.truncate(width, overflow="crop" if glyphs is ASCII else "ellipsis")
    return lines


def shares(counts: TaskCounts, width: int) -> list[int]:
    """Return how many cells of a bar are for each kind of task; what there is has at least one."""
    numbers = [counts.success, counts.skipped, counts.failure, counts.active, counts.ready]
    total = counts.all
    cells = [max(1, number * width // total) if number else 0 for number in numbers]
    while (over := sum(cells) - width) != 0:
        # The largest gives, or takes, what is left by the rounding.
        largest = max(range(len(cells)), key=lambda kind: (cells[kind], numbers[kind]))
        if over > 0 and cells[largest] <= 1:
            break
        cells[largest] -= over if over < 0 else 1
    return cells


def _headline(progress: Progress, now: datetime, glyphs: Glyphs) -> Text:
    total = progress.total
    line = _text(f"eventor run {progress.run}", "bold")
    line.append(f"  {total.ended:,} of {total.all:,} tasks")
    if total.failure:
        line.append(f"  {total.failure:,} failed", "bold red")
    line.append(f"  {stopwatch(progress.seconds(now))}", "cyan")
    if progress.name:
        line.append(f"  {_shown(clean(progress.name), glyphs)}", "bright_black")
    return line


def _of_steps(
    steps: dict[str, TaskCounts], width: int, height: int, glyphs: Glyphs
) -> Iterator[Text]:
    """Yield a bar for each step, or for those that matter most, and a line for the rest."""
    chosen = list(steps)
    if len(chosen) > height:
        weights = {name: _weight(steps[name]) for name in chosen}
        kept = sorted(chosen, key=lambda name: weights[name])[: max(0, height - 1)]
        chosen = [name for name in steps if name in set(kept)]
    if chosen:
        rows = [(name, steps[name], _notes(steps[name])) for name in chosen]
        yield from _rows(rows, width, glyphs)
    if height > 0 and len(chosen) < len(steps):
        left_out = (steps[name] for name in steps.keys() - set(chosen))
        rest = sum(left_out, TaskCounts())
        line = _text(f"{glyphs.more} {len(steps) - len(chosen):,} more steps", "bright_black")
        line.append(f"  {rest.ended:,}/{rest.all:,}")
        yield line.append_text(_with_space(_notes(rest)))


def _weight(counts: TaskCounts) -> tuple[bool, bool, bool]:
    return (not counts.active, not counts.failure, not counts.ready)


def _rows(rows: list[tuple[str, TaskCounts, Text]], width: int, glyphs: Glyphs) -> Iterator[Text]:
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415 (it is optional)

    names = [_shown(clean(name), glyphs) for name, _counts, _notes in rows]
    widest = min(max(map(cell_len, names)), _WIDEST_NAME, max(8, width // 3))
    numbers = [f"{counts.ended:,}/{counts.all:,}" for _name, counts, _notes in rows]
    of_numbers = max(map(len, numbers))
    of_notes = max(notes.cell_len for _name, _counts, notes in rows)
    bar = min(_WIDEST_BAR, width - widest - of_numbers - of_notes - 6)
    noted = bar >= _NARROWEST_BAR
    if not noted:  # a bar says as much, and the headline has the failures
        bar = min(_WIDEST_BAR, width - widest - of_numbers - 4)
    for name, number, (_name, counts, notes) in zip(names, numbers, rows, strict=True):
        shown = name
        if cell_len(name) > widest:
            shown = set_cell_size(name, widest - 1) + glyphs.more
        line = _text(f"{set_cell_size(shown, widest)}  ")
        if bar >= _NARROWEST_BAR:
            for kind, cells in enumerate(shares(counts, bar)):
                line.append(glyphs.bar[kind] * cells, _STYLES[kind])
            line.append("  ")
        line.append(number.rjust(of_numbers))
        yield line.append_text(_with_space(notes)) if noted else line


def _notes(counts: TaskCounts) -> Text:
    line = _text("")
    for number, what, kind in (
        (counts.failure, "failed", _FAILED),
        (counts.active, "running", _RUNNING),
        (counts.skipped, "skipped", _SKIPPED),
    ):
        if number:
            line.append(f"{'  ' if line else ''}{number:,} {what}", _STYLES[kind])
    return line


def _with_space(notes: Text) -> Text:
    return _text("  ").append_text(notes) if notes else notes


def _of_running(
    running: list[Running], now: datetime, height: int, glyphs: Glyphs
) -> Iterator[Text]:
    told = running if len(running) <= height else running[: height - 1]
    for one in told[:height]:
        line = _text(f"{glyphs.running} ", _STYLES[_RUNNING])
        line.append(_shown(clean(one.task), glyphs))
        seconds = max(0.0, (now - one.since).total_seconds())
        line.append(f"  {stopwatch(seconds)}", "cyan")
        if one.attempt > 1:
            line.append(f"  attempt {one.attempt}", _STYLES[_RUNNING])
        yield line
    if height > 0 and len(told) < len(running):
        yield _text(f"{glyphs.more} {len(running) - len(told):,} more run", "bright_black")


def _of_failure(failure: Failure, glyphs: Glyphs) -> Text:
    line = _text(f"{glyphs.failed} ", _STYLES[_FAILED])
    line.append(_shown(clean(failure.task), glyphs))
    return line.append(f"  {_shown(one_line(failure.error), glyphs)}", "red")


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text  # noqa: PLC0415 (it is optional)

    return Text(no_wrap=True, end="").append(text, style)


def _shown(text: str, glyphs: Glyphs) -> str:
    """Return a clean text in what the terminal has."""
    return text.encode("ascii", "replace").decode() if glyphs is ASCII else text
