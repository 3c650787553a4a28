"""What a step writes to its standard output and error: captured in its process, kept in the owner.

    step's process                                owner
    --------------                                -----
    descriptors 1 and 2  -- a pipe for each -->   Output: its tail kept, and shown by a Display

The owner holds the reading ends, so what was written before the process dies, in whatever way, is
there. A pipe that is full makes the step wait, not the owner; so does a program's own output that
nobody reads.
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import fcntl
import os
import selectors
import sys
from typing import TYPE_CHECKING

from eventor.steps.display import Display
from eventor.types import storable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STREAMS = ("stdout", "stderr")

KEPT_BYTES = 1 << 16
"""How much is kept of each stream: its end."""

_CONTINUATION = bytes(range(0x80, 0xC0))
"""The bytes with which no character of UTF-8 begins."""
_MOST_CUT = 3
"""How many of them a character has at most."""

_CHUNK = 1 << 16
_LEFT_AT_ONCE = 32
"""Of how many streams that steps have left to what they started something is shown yet."""

_CHUNKS_AT_END = 32
"""How much is read when a step has ended, so that what it left running cannot go on for ever."""


@contextlib.contextmanager
def captured(hand_over: Callable[[list[int]], None]) -> Iterator[None]:
    """Have what this process and its children write read by another.

    Args:
        hand_over: gives the reading ends of two pipes to that.

    Raises:
        OSError: there is no descriptor left, or nobody takes the ends.
    """
    flush()
    with contextlib.ExitStack() as restored:
        ends = []
        for number in (1, 2):
            _keep(number, restored)
        with contextlib.ExitStack() as opened:
            for number in (1, 2):
                reading, writing = os.pipe()
                opened.callback(os.close, reading)
                opened.callback(os.close, writing)
                ends.append((reading, writing, number))
            hand_over([reading for reading, _writing, _number in ends])
            for _reading, writing, number in ends:
                os.dup2(writing, number)
        # Anew, and by lines, so that what was printed is out when the process is killed.
        restored.callback(flush)
        for number, name in enumerate(STREAMS, 1):
            restored.callback(setattr, sys, name, getattr(sys, name))
            setattr(sys, name, _text_on(number))
        restored.callback(flush)
        yield


def _keep(number: int, restored: contextlib.ExitStack) -> None:
    """Have a descriptor put back at the end, as it is now."""
    try:
        # Not one of the three by which programs know them, though it may be free.
        copy = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError:  # it is closed, and has to be taken before the pipes are made
        nowhere = os.open(os.devnull, os.O_RDWR)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
        restored.callback(_close, number)
        return
    restored.callback(os.close, copy)
    restored.callback(_put_back, copy, number)


def _put_back(copy: int, number: int) -> None:
    # Whatever the step has closed: what it has done is not undone by that.
    with contextlib.suppress(OSError):
        os.dup2(copy, number)


def _close(number: int) -> None:
    with contextlib.suppress(OSError):
        os.close(number)


def _text_on(number: int) -> object:
    return open(
        number, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )


def flush() -> None:
    """Show what was printed, as the end of a process does."""
    for name in STREAMS:
        with contextlib.suppress(Exception):
            getattr(sys, name).flush()


class Output:
    """The owner's end of one stream of a step.

    Args:
        descriptor: the reading end; it is closed with this.
        display: where it is shown.
    """

    def __init__(self, descriptor: int, display: Display) -> None:
        os.set_inheritable(descriptor, False)
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self.display = display
        self._tail = bytearray()
        self._cut = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.ended = False
        """Whether all who could write have ended."""

    @property
    def text(self) -> str:
        """The end of what was written, by whole characters; as a store keeps it, it is no longer.

        What stands in the place of bytes that are no text, and of NUL, takes more of them.
        """
        tail = self._tail
        if self._cut:
            tail = tail[:_MOST_CUT].lstrip(_CONTINUATION) + tail[_MOST_CUT:]
        text = tail.decode("utf-8", "replace")

        def is_short(start: int) -> bool:
            return len(storable(text[start:]).encode()) <= KEPT_BYTES

        start = bisect.bisect_left(range(len(text)), True, key=is_short)
        return storable(text[start:])

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._descriptor

    def read(self) -> bool:
        """Show and keep what has come in, up to a limit; tell whether there was any."""
        try:
            data = os.read(self._descriptor, _CHUNK)
        except BlockingIOError:
            return False
        self.ended = not data
        self._tail += data
        self._cut = self._cut or len(self._tail) > KEPT_BYTES
        del self._tail[:-KEPT_BYTES]
        self._show(data, final=self.ended)
        return not self.ended

    def read_all(self) -> None:
        """Show and keep what is there, without waiting for more."""
        for _ in range(_CHUNKS_AT_END):
            if self.ended or not self.read():
                return

    def close(self) -> None:
        """Close this end; who still writes gets a signal, or an error."""
        self._show(b"", final=True)
        os.close(self._descriptor)

    def _show(self, data: bytes, *, final: bool) -> None:
        if text := self._decoder.decode(data, final=final):
            self.display.show(text)


class Outputs:
    """All that is read of steps, those included that have ended and left something running.

    Args:
        selector: tells which of them can be read; it holds each as its data.
        make_way: is called before something is shown.
    """

    def __init__(self, selector: selectors.BaseSelector, make_way: Callable[[], None]) -> None:
        self._selector = selector
        self._make_way = make_way
        self._displays: tuple[Display, ...] = ()
        self._held: set[Display] = set()
        self._open: dict[Output, None] = {}
        self._left: dict[Output, None] = {}

    def listen(self, descriptors: tuple[int, ...]) -> tuple[Output, ...]:
        """Read what comes by these from now on; empty if they are none that can be read."""
        if not self._displays:
            self._displays = tuple(
                Display(name, self._selector, self._make_way) for name in STREAMS
            )
        try:
            outputs = tuple(
                Output(descriptor, display)
                for descriptor, display in zip(descriptors, self._displays, strict=True)
            )
            for output in outputs:
                self._selector.register(output, selectors.EVENT_READ, output)
        except (OSError, ValueError):  # a step that sends its own is not to harm others
            for descriptor in descriptors:
                if descriptor in self._selector.get_map():
                    self._selector.unregister(descriptor)
                os.close(descriptor)
            return ()
        self._open.update(dict.fromkeys(outputs))
        for output in outputs:
            if output.display in self._held:
                self._selector.unregister(output)
        return outputs

    def heed(self, ready: Output | Display) -> None:
        """Read what has come in of one, until all who could write have ended; or show more."""
        display = ready if isinstance(ready, Display) else ready.display
        if isinstance(ready, Display):
            ready.write()
        elif display not in self._held:  # else it was ready in the same moment
            ready.read()
            self._drop_ended(ready)
        self._hold_back(display)

    def shows(self, seconds: float) -> bool:
        """Whether something waits to be shown whose reader has not been idle for so long."""
        return any(display.full and display.stalled_for < seconds for display in self._displays)

    def take(self, outputs: tuple[Output, ...]) -> Iterator[str]:
        """Yield the tails of what a task has written that has ended."""
        for output in outputs:
            if output in self._open:
                output.read_all()
                self._drop_ended(output)
            yield output.text
            if output in self._open:
                self._left[output] = None
        while len(self._left) > _LEFT_AT_ONCE:
            self._drop(next(iter(self._left)))
        for display in self._displays:
            self._hold_back(display)

    def leave(self) -> None:
        """Close them in a process that was forked from the one that reads."""
        for output in self._open:
            os.close(output.fileno())

    def close(self) -> None:
        """Read what is there, and close them."""
        for output in self._open:
            output.read_all()
            output.close()
        self._open.clear()
        for display in self._displays:
            display.close()

    def _hold_back(self, display: Display) -> None:
        """Read no more for a display while something waits there; the steps then wait too."""
        if display.full is (display in self._held):
            return
        self._held ^= {display}
        for output in self._open:
            if output.display is display and display.full:
                self._selector.unregister(output)
            elif output.display is display:
                self._selector.register(output, selectors.EVENT_READ, output)

    def _drop_ended(self, output: Output) -> None:
        if output.ended:
            self._drop(output)

    def _drop(self, output: Output) -> None:
        if output.display not in self._held:
            self._selector.unregister(output)
        del self._open[output]
        self._left.pop(output, None)
        output.close()
