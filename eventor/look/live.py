"""Progress as it is seen: on a terminal, below what the program and its steps write, or elsewhere.

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
from typing import TYPE_CHECKING, Any

from eventor.errors import ConfigError
from eventor.look.bars import ASCII, COLOURED, UNCOLOURED, Glyphs, picture
from eventor.look.cell import Cell, in_notebook
from eventor.look.progress import Progress
from eventor.steps import inside
from eventor.steps.display import is_writable, own

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from rich.console import Console

    from eventor.types import Transition

_SECONDS_BETWEEN = 0.1
"""How often a picture is made, at most."""

_SECONDS_TO_LOOK = 0.25
"""How often the loop comes by, at least."""

_SECONDS_BEFORE = 0.2
"""A run that ends sooner has no picture."""

_COLUMNS, _LINES = 80, 24
"""The size of a terminal that does not know its own."""

_on_terminal = threading.Lock()
"""Held by who draws on the terminal; there is one in a program, and none in its forks."""


class View:
    """What is shown of one call of `ev()`.

    Args:
        clock: gives the time, in UTC.
        place: where the picture is drawn; None for a summary alone.
        shares: whether the program's own hooks may write there too.
    """

    def __init__(
        self, clock: Callable[[], datetime], place: Terminal | Cell | None, *, shares: bool
    ) -> None:
        self.progress = Progress()
        self._clock = clock
        self._place = self._opened = place
        self._shares = shares
        self._next = time.monotonic() + _SECONDS_BEFORE

    def heed(self, told: Transition) -> None:
        """Count what a transition tells; it is the first of the hooks."""
        self.progress(told)
        if self._shares:
            self.erase()

    def watch(self) -> float:
        """Show how far it is; return the seconds after which to come by again."""
        if self._place is None:
            return math.inf
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SECONDS_BETWEEN
            self._guarded(self._place.draw, self.progress, self._clock())
        else:
            self._guarded(self._place.draw_again)
        return _SECONDS_TO_LOOK

    def erase(self) -> None:
        """Make way for something that is written there."""
        if self._place is not None:
            self._guarded(self._place.erase)

    def close(self) -> None:
        """Leave a summary in place of the picture."""
        self.erase()
        begun = self.progress.began_at is not None
        summary = self.progress.summary(self._clock()) if begun else ""
        with contextlib.suppress(OSError):
            if self._opened is not None:
                self._opened.close(summary)
                return
        _say(sys.stderr, summary)

    def _guarded(self, do: Callable[..., object], *arguments: object) -> None:
        """Do something at the place; if it cannot be done, as after a hangup, do no more."""
        try:
            do(*arguments)
        except (OSError, ValueError):
            self._place = None


class Terminal:
    """The place on a terminal where a picture is.

    Args:
        stream: a text stream that writes to it.
        colour: False for no colours; else the environment tells.
    """

    def __init__(self, stream: Any, *, colour: bool = True) -> None:
        from rich.console import Console  # noqa: PLC0415 (it is optional, and slow to import)

        self._stream = stream
        # Its own, so that writing there need not wait for a terminal that takes nothing.
        self._descriptor, _at_once = own(stream.fileno())
        self._encoding = stream.encoding
        self._console = Console(
            file=stream,
            force_terminal=True,
            no_color=None if colour else True,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._glyphs = _glyphs(self._console, stream.encoding)
        self._drawn = False
        self._columns = 0
        self._picture = ""
        self._rest = b""

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
        self._show()

    def draw_again(self) -> None:
        """Draw the last picture, if it was erased."""
        if self._picture and not self._drawn:
            self._show()

    def erase(self) -> None:
        """Erase the picture."""
        if self._drawn and self._write(f"{self._to_a_line}\x1b[J"):
            self._drawn = False

    def close(self, summary: str = "") -> None:
        """Let go of the terminal, and leave a line there; nothing if it is empty."""
        os.close(self._descriptor)
        _say(self._stream, summary)

    @property
    def _to_a_line(self) -> str:
        """What moves the cursor to the start of an empty line, this one if it is empty.

        A step may have left it behind what it wrote; so many spaces then go on to the next line.
        """
        return f"{' ' * self._columns}\r"

    def _show(self) -> None:
        if self._write(self._to_a_line + self._picture):
            self._drawn = True

    def _write(self, text: str) -> bool:
        """Write, and tell so, unless the terminal takes nothing, as after Ctrl-S.

        What it does not take at once comes first the next time, for the cursor is in the middle of
        it.
        """
        self._rest = self._untaken(self._rest)
        if self._rest:
            return False
        data = text.encode(self._encoding, "replace")
        self._rest = self._untaken(data)
        if len(self._rest) < len(data):
            return True
        self._rest = b""
        return False

    def _untaken(self, data: bytes) -> bytes:
        """Write, and return what the terminal does not take at once."""
        if not data or not is_writable(self._descriptor):
            return data
        try:
            return data[os.write(self._descriptor, data) :]
        except BlockingIOError:
            return data


def _say(stream: Any, line: str) -> None:
    """Write a line, if there is one, and something to write to."""
    if line:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.write(f"{line}\n")
            stream.flush()


def installed() -> bool:
    """Tell whether Rich is."""
    return importlib.util.find_spec("rich") is not None


@contextlib.contextmanager
def shown(
    wanted: bool | None, clock: Callable[[], datetime], *, speaks: bool, shares: bool
) -> Iterator[View | None]:
    """Give the view of a call of `ev()`, and close it.

    Args:
        wanted: whether there is to be one; None is by what standard error is, and whether this is
            a notebook.
        clock: gives the time, in UTC.
        speaks: whether eventor itself writes its log there.
        shares: whether the program's hooks may write there.

    Raises:
        ConfigError: it is wanted, and Rich is missing.
    """
    notebook = inside.current_or_none() is None and in_notebook()
    seen = notebook or (speaks and _is_terminal())
    if wanted is False or (wanted is None and not (seen and installed())):
        yield None
        return
    if not installed():
        raise ConfigError(
            "progress is True, which needs the package rich; install it with "
            "pip install 'eventor[cli]', or leave progress out"
        )
    if notebook:
        with contextlib.closing(View(clock, Cell(), shares=False)) as view:
            yield view
        return
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


def can_draw() -> bool:
    """Tell whether the terminal of this program can be drawn on."""
    return os.environ.get("TERM", "dumb") != "dumb"


def _is_terminal() -> bool:
    """Tell whether standard error is a terminal on which a picture can be drawn."""
    if inside.current_or_none() is not None or not can_draw():
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
