"""The program's own standard output and error, for what captured steps write.

Whoever reads them may be slow, or not read at all. The loop must not wait for that: what cannot be
written at once waits here, and is written when it can be.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import selectors
import socket
import stat
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_MOST_WAITING = 1 << 22
"""How much waits to be shown; steps wait long before, those that have ended cannot."""

_WHOLE = sys.maxsize

_WITH_MARK = ("utf-8-sig", "utf-16", "utf-32")
"""Encodings that begin with a mark, which is not to stand before each piece."""


def settle() -> None:
    """Have nothing wait in the program's streams that a new process would write once more.

    Of a stream whose reader has gone it is dropped: else no process could be started beside it.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                _drop(stream)
        except (AttributeError, ValueError):  # there is none, or it is closed
            continue


def _drop(stream: Any) -> None:
    """Let go of what waits in a stream that cannot be written to."""
    descriptor = stream.fileno()
    kept, nowhere = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, descriptor)
        stream.flush()
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)
        os.close(nowhere)


class Display:
    """One of the program's streams, on which is shown what steps write.

    Args:
        name: *stdout* or *stderr*; the stream is the one that `sys` has of that name now.
        selector: tells when more can be written; it holds this as its data.
        make_way: is called before text is shown.
    """

    def __init__(
        self, name: str, selector: selectors.BaseSelector, make_way: Callable[[], None]
    ) -> None:
        self._make_way = make_way
        self._stream: Any = getattr(sys, name)
        self._selector = selector
        self._descriptor: int | None = None
        self._at_once = 0
        self._put: Callable[[int, memoryview], int] = os.write
        self._encoding, self._errors = "utf-8", "surrogateescape"
        self._waiting = bytearray()
        self._missed = 0
        self._moved_at = 0.0
        self._open()

    @property
    def full(self) -> bool:
        """Whether something waits to be written."""
        return bool(self._waiting)

    @property
    def stalled_for(self) -> float:
        """For how many seconds nothing of what waits could be written."""
        return time.monotonic() - self._moved_at

    def fileno(self) -> int:
        """Return the descriptor to wait on.

        Raises:
            ValueError: there is none; nothing waits then.
        """
        if self._descriptor is None:
            raise ValueError("it is written to as an object")
        return self._descriptor

    def show(self, text: str) -> None:
        """Write text, whose surrogates stand for bytes that are no UTF-8, now or when it can be."""
        self._make_way()
        if self._descriptor is None:
            self._write_text(text)
            return
        data = text.encode(self._encoding, self._errors)
        if len(self._waiting) + len(data) > _MOST_WAITING:
            self._missed += len(data)
            return
        if not self._waiting:
            self._moved_at = time.monotonic()
        self._waiting += data
        self.write()

    def write(self) -> None:
        """Write what can be written at once of what waits."""
        waited = self.full and self._is_registered()
        while self._waiting and self._write_some():
            self._moved_at = time.monotonic()
            if self._missed and not self._waiting:
                self._waiting += b"\n[eventor: %d bytes are not shown]\n" % self._missed
                self._missed = 0
        if self.full and not waited:
            self._selector.register(self, selectors.EVENT_WRITE, self)
        elif waited and not self.full:
            self._selector.unregister(self)

    def close(self) -> None:
        """Let go of the stream; what waits is not shown."""
        if self._descriptor is not None:
            if self._is_registered():
                self._selector.unregister(self)
            os.close(self._descriptor)
            self._descriptor = None
            self._waiting.clear()

    def _open(self) -> None:
        """Take the stream's descriptor, if it may be slow, and text goes there unchanged."""
        stream = self._stream
        with contextlib.suppress(Exception):
            stream.flush()  # what the program has written comes first
            encoding = codecs.lookup(stream.encoding).name
            if not _is_plain(stream) or encoding in _WITH_MARK:
                return
            self._descriptor, self._at_once = own(stream.fileno())
            if stat.S_ISSOCK(os.fstat(self._descriptor).st_mode):
                self._put = _send
            if encoding != "utf-8":
                self._encoding, self._errors = stream.encoding, "backslashreplace"

    def _is_registered(self) -> bool:
        return self._descriptor in self._selector.get_map()

    def _write_some(self) -> bool:
        """Write what can be written at once; tell whether there was any."""
        descriptor = self.fileno()
        part = memoryview(self._waiting)[: self._at_once]
        try:
            if self._at_once != _WHOLE and not is_writable(descriptor):
                return False
            written = self._put(descriptor, part)
        except BlockingIOError:
            return False
        except OSError:  # nobody reads it any more: that is no failure of the step
            written = len(self._waiting)
        finally:
            part.release()
        del self._waiting[:written]
        return True

    def _write_text(self, text: str) -> None:
        readable = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        with contextlib.suppress(Exception):
            try:
                self._stream.write(readable)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(readable.encode(encoding, "backslashreplace").decode(encoding))
            self._stream.flush()


def _is_plain(stream: Any) -> bool:
    """Whether text that is written to a stream comes to its descriptor as it is, and nowhere else.

    A compressed file has a descriptor, too, and a class or an object may have a `write` of its own.
    """
    buffer = stream.buffer
    return (
        type(stream) is io.TextIOWrapper
        and "write" not in vars(stream)
        and type(buffer) in (io.BufferedWriter, io.FileIO)
        and type(getattr(buffer, "raw", buffer)) is io.FileIO
        # Only such a one may have been opened with line ends of its own.
        and (stream in (sys.__stdout__, sys.__stderr__) or not _is_regular(stream.fileno()))
    )


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def _send(descriptor: int, data: memoryview) -> int:
    """Send what can be sent to a socket without waiting."""
    connection = socket.socket(fileno=os.dup(descriptor))
    with connection:
        return connection.send(data, socket.MSG_DONTWAIT)


def own(descriptor: int) -> tuple[int, int]:
    """Return a descriptor of one's own to write to the same, and how much to write at once.

    To a socket it is to be sent without waiting.

    Whether writing waits is a property that is shared by all who have a descriptor from the same
    opening, in other programs too. So a pipe or terminal is opened anew, where that can be.

    Raises:
        OSError: it is closed.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISSOCK(mode):
        return os.dup(descriptor), _WHOLE
    if (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)) and sys.platform == "linux":
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{descriptor}", flags), _WHOLE
    return os.dup(descriptor), select.PIPE_BUF


def is_writable(descriptor: int) -> bool:
    """Tell whether something can be written without waiting."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(0))
