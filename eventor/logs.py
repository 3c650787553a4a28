"""What eventor says: on the console, in the debug and error files, and to the program's handlers.

Nothing of the program's logging is changed. A message goes to the program's own handlers where it
has any for the logger `eventor`, else to standard error in eventor's format; and to the files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import sys
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import TextIOWrapper

FORMAT = "[ %(asctime)s ][ %(levelname)s ][ %(message)s ][ %(module)s.%(funcName)s ]"
"""The format of the interface's *Example Output*."""

MAX_BYTES = 10_000_000
"""The size at which a log file is rotated."""

BACKUPS = 3
"""How many rotated files are kept of each."""

_log = logging.getLogger("eventor")


class Journal:
    """The log of one Eventor.

    Args:
        level: what is below it goes to the debug file alone.
        logdir: directory of the files.
        stem: how the names of the files begin.
    """

    def __init__(self, level: int, logdir: str, stem: str) -> None:
        self._level = level
        formatter = _Formatter(FORMAT)
        self._console = logging.StreamHandler(sys.stderr)
        path = Path(logdir) / file_name(stem)
        self._files = [
            _LogFile(f"{path}.debug.log", logging.DEBUG, self),
            _LogFile(f"{path}.error.log", logging.ERROR, self),
        ]
        self._make_way: Callable[[], None] | None = None
        self._console.setFormatter(formatter)
        for file in self._files:
            file.setFormatter(formatter)

    @property
    def is_alone(self) -> bool:
        """Whether the program has no log handlers, so that eventor writes to standard error."""
        return not _log.hasHandlers()

    @contextlib.contextmanager
    def above(self, make_way: Callable[[], None]) -> Iterator[None]:
        """Have something called before a message is shown, for what else is on the terminal."""
        self._make_way = make_way
        try:
            yield
        finally:
            self._make_way = None

    def say(self, level: int, message: str, function: str, details: str | None = None) -> None:
        """Log a message of eventor itself.

        Args:
            level: the level, as in `logging`.
            message: the message, as it is.
            function: which of the interface's functions speaks.
            details: a traceback, to stand below it.
        """
        record = _log.makeRecord(_log.name, level, "main.py", 0, message, (), None, function)
        record.exc_text = details
        self._to_files(record)
        if level < self._level or _log.manager.disable >= level:
            return
        if self._make_way is not None:
            self._make_way()
        if _log.hasHandlers():
            if _log.isEnabledFor(level):
                self._hand_over(record, _log.handle)
        elif not _log.disabled and level >= _log.level:
            self._console.handle(record)

    def pass_on(self, record: logging.LogRecord) -> None:
        """Hand a record that came from a step's process to the handlers of its logger here."""
        self._to_files(record)
        if self._make_way is not None:
            self._make_way()
        logger = logging.getLogger(record.name)
        if logger.hasHandlers():
            self._hand_over(record, logger.callHandlers)
        else:
            self._console.handle(record)

    def _hand_over(
        self, record: logging.LogRecord, handle: Callable[[logging.LogRecord], object]
    ) -> None:
        """Give a record to the program; if that raises, tell it as `logging` does, and go on."""
        try:
            handle(record)
        except Exception:
            self._console.handleError(record)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _to_files(self, record: logging.LogRecord) -> None:
        for file in tuple(self._files):
            if record.levelno >= file.level:
                file.handle(record)

    def give_up(self, file: _LogFile, reason: BaseException | None) -> None:
        """Go on without a file that cannot be written, and say so once."""
        if file in self._files:
            self._files.remove(file)
            message = f"Log file {file.baseFilename} cannot be written: {reason}"
            self.say(logging.WARNING, message, "__init__")


class _Formatter(logging.Formatter):
    """Writes a record once for all who show it, and the time once in a second."""

    def __init__(self, style: str) -> None:
        super().__init__(style)
        self._written: tuple[logging.LogRecord | None, str] = (None, "")
        self._time = (0, "")

    def format(self, record: logging.LogRecord) -> str:
        last, text = self._written
        if record is not last:
            text = super().format(record)
            self._written = (record, text)
        return text

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        second, text = self._time
        if int(record.created) != second:
            second = int(record.created)
            text = time.strftime(datefmt or self.default_time_format, time.localtime(second))
            self._time = (second, text)
        return f"{text},{int(record.msecs):03}"


class _LogFile(RotatingFileHandler):
    """A rotated file that is made on first use, and never through a symbolic link."""

    def __init__(self, path: str, level: int, journal: Journal) -> None:
        super().__init__(
            path,
            maxBytes=MAX_BYTES,
            backupCount=BACKUPS,
            encoding="utf-8",
            errors="backslashreplace",
            delay=True,
        )
        self.setLevel(level)
        self._journal = journal

    def _open(self) -> TextIOWrapper:
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        return open(
            self.baseFilename, "a", encoding=self.encoding, errors=self.errors, opener=_open_safely
        )

    def shouldRollover(self, record: logging.LogRecord) -> bool:  # noqa: N802
        """Tell whether the file is full, by less than the four looks at it of the base class."""
        stream = self.stream = self.stream or self._open()
        size = os.fstat(stream.fileno()).st_size
        return size + len(self.format(record)) >= self.maxBytes

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 (logging's name)
        self._journal.give_up(self, sys.exception())


def file_name(name: str) -> str:
    """Return a name, which may be any text, in a form that is part of a file's name."""
    return re.sub(r"[^\w.-]", "_", name)[:100]


def _open_safely(path: str, flags: int) -> int:
    """Open a regular file of this user's; in a directory for all, others may have put a trap."""
    # Not blocking, since opening a named pipe would wait for its reader.
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_uid != os.geteuid():
        os.close(descriptor)
        raise PermissionError("it is not a regular file of this user")
    return descriptor
