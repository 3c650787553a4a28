"""The side of an executor's workers: what happens where `submit` has a step run.

A step begins when the owner has said that it may, and it says so once for each submission: an
executor that starts a call again on its own, as Dask does when a worker was lost, starts nothing
twice. How a step ended is what `run` returns. What it triggers and logs goes to the owner at once,
by a `Line`; what it has triggered comes once more with its end, and so does what could not be sent.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import logging
import operator
import os
import pickle
import sys
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from io import BytesIO
from types import FunctionType
from typing import TYPE_CHECKING, Any, Protocol

from eventor.errors import UsageError
from eventor.steps import inside, task
from eventor.steps.line import (
    Address,
    Line,
    MayBegin,
    NotTakenError,
    Said,
    WhichEvents,
    connect,
)
from eventor.storage.owner import is_running
from eventor.types import Outcome, Sequence, failure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eventor.rules.flow import Event

_UNREACHABLE_SECONDS = 60.0
"""For how long an owner that could not be reached is not tried again."""

_MOST_REACHED = 1_000

TWICE = "its worker was lost, and the executor started it again"
LATE = "it has not begun: another process may have taken over the run by then"


@dataclass(frozen=True, slots=True)
class Home:
    """From where calls come.

    Attributes:
        address: where the owner listens.
        run_id: the run whose steps are called.
        recovery: the recovery in that run.
        levels: the levels of the owner's loggers.
        is_shared: whether the workers are the program's guests: what is logged in them is shown
            there too.
    """

    address: Address
    run_id: int
    recovery: int
    levels: task.LogLevels
    is_shared: bool


@dataclass(frozen=True, slots=True)
class Errand:
    """What a worker is to do.

    Attributes:
        ticket: a number of this submission alone.
        defined: how many events the flow had.
        call: what `task.rebuild` takes, pickled.
        home: from where it comes.
    """

    ticket: int
    defined: int
    call: bytes
    home: Home


@dataclass(frozen=True, slots=True)
class Report:
    """What comes back.

    Attributes:
        ticket: of the submission of which it tells.
        outcome: how the step ended, or why it has not begun.
        pid: the process in which it ran; None if it has not begun.
        triggers: all that it has triggered.
        records: the attributes of the log records that could not be sent.
        sent: how many messages could be.
    """

    ticket: int
    outcome: Outcome
    pid: int | None
    triggers: tuple[task.Triggered, ...] = ()
    records: tuple[dict[str, Any], ...] = ()
    sent: int = 0


class Way(Protocol):
    """What a step says something by."""

    def say(self, message: Said) -> None:
        """Send a message.

        Raises:
            OSError: nobody hears.
        """


class OwnerHere(Way, Protocol):
    """An owner in this process, as a worker finds it that is a thread of it."""

    def admit(self, ticket: int) -> str | None:
        """Tell the first who asks that a submission may begin, by None; others why it may not."""

    def perform(self, call: task.Call, ticket: int) -> Report:
        """Run a step that may begin, in this thread."""


owners_here: dict[bytes, OwnerHere] = {}
"""By their keys, the owners in this process."""


class Voice:
    """What one step says while it runs.

    Args:
        ticket: of its submission.
        way: by what it is heard; None if it cannot be before it ends.
    """

    def __init__(self, ticket: int, way: Way | None) -> None:
        self._ticket = ticket
        self._way = way
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._sent = 0
        self._triggers: dict[task.Triggered, None] = {}
        self._records: list[dict[str, Any]] = []
        self._has_ended = False

    def trigger(self, current: inside.CurrentStep, event: str, sequence: Sequence) -> None:
        """Say what the step triggers.

        Raises:
            UsageError: it has ended, or this is a process of its own.
        """
        told = f"step {current} triggers event {event!r}"
        if not self.is_mine:
            raise UsageError(
                f"{told} in process {os.getpid()}, which it has started; expected in its own, "
                f"{self._pid}"
            )
        with self._lock:
            if self._has_ended:
                raise UsageError(f"{told} after it has ended")
            triggered = task.Triggered(event, sequence)
            self._triggers[triggered] = None
            self._say(triggered)

    def log(self, record: logging.LogRecord) -> None:
        """Say what the step logs."""
        told = task.attributes(record)
        with self._lock:
            if not (self._has_ended or self._say(told)):
                self._records.append(told)

    @property
    def is_mine(self) -> bool:
        """Whether this is the step's process, and none that it has forked."""
        return os.getpid() == self._pid

    def end(self, outcome: Outcome) -> Report:
        """Say nothing more, and return what is left to be told."""
        with self._lock:
            self._has_ended = True
        told = tuple(self._triggers), tuple(self._records)
        return Report(self._ticket, outcome, self._pid, *told, self._sent)

    def _say(self, message: task.Triggered | dict[str, Any]) -> bool:
        if self._way is None:
            return False
        try:
            self._way.say(Said(self._ticket, message))
        except OSError:
            self._way = None
            return False
        self._sent += 1
        return True


def perform(
    call: task.Call,
    voice: Voice,
    run_id: int,
    recovery: int,
    events: Mapping[str, Event | None],
    home: Home | None = None,
) -> Report:
    """Run a step in this thread, beside whatever else runs in this process.

    Args:
        call: what it calls.
        voice: by what it speaks.
        run_id: its run.
        recovery: the recovery in that run.
        events: what it may trigger, by name.
        home: from where it comes; None in the owner's own process.
    """
    current = inside.CurrentStep(
        call.step, call.sequence, run_id, recovery, call.attempt, events, voice.trigger
    )

    def within() -> Outcome:
        inside.enter(current, whole_process=False)
        if home is None:
            return task.run(call)
        with _relayed(voice, home):
            return task.run(call, _dumps)

    return voice.end(contextvars.copy_context().run(within))


def run(data: bytes) -> bytes:
    """Do a pickled errand, and return the pickled report: what is submitted to an executor."""
    errand: Errand = pickle.loads(data)
    return pickle.dumps(_do(errand))


def _do(errand: Errand) -> Report:
    home = errand.home
    if (owner := _owner_here(home.address)) is not None:
        if (why := owner.admit(errand.ticket)) is not None:
            return Report(errand.ticket, failure(why), None)
        return owner.perform(task.rebuild(*pickle.loads(errand.call)), errand.ticket)
    try:
        line, why = _ask(home.address, MayBegin(errand.ticket, os.getpid()))
        if why is not None:
            return Report(errand.ticket, failure(why), None)
    except OSError as error:
        told = f"it has not begun: its worker lost touch with the program: {task.describe(error)}"
        return Report(errand.ticket, failure(told), None)
    call = task.rebuild(*pickle.loads(errand.call))
    names = _Names(line, errand.defined)
    voice = Voice(errand.ticket, line)
    return perform(call, voice, home.run_id, home.recovery, names, home)


def _ask(address: Address, question: MayBegin) -> tuple[Line | None, str | None]:
    """Ask an owner why something may not begin, by a line that is returned too, if there is a way.

    Raises:
        OSError: it is gone, and what it has submitted is not to begin.
    """
    while (line := _reach(address)) is not None:
        with contextlib.suppress(NotTakenError):
            return line, line.ask(question)
    return None, None


def _owner_here(address: Address) -> OwnerHere | None:
    # Not where this was forked, and what was there is a copy.
    return owners_here.get(address.key) if address.owner.pid == os.getpid() else None


class _Names(Mapping[str, None]):
    """The names of the events, for which the owner is asked when they are needed.

    Where it cannot be asked, any name is taken for that of an event.
    """

    def __init__(self, line: Line | None, defined: int) -> None:
        self._line = line
        self._defined = defined

    def __contains__(self, name: object) -> bool:
        known = self._known()
        return known is None or name in known

    def __getitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known() or ())

    def __len__(self) -> int:
        return len(self._known() or ())

    def _known(self) -> frozenset[str] | None:
        if self._line is None or not self._line.is_mine:
            return None
        known = _names.get(self._line, frozenset())
        if len(known) < self._defined:
            try:
                known = _names[self._line] = self._line.ask(WhichEvents())
            except OSError:
                return None
        return known


_lock = threading.Lock()
_lines: dict[bytes, Line] = {}
"""By their keys, the lines of this process, each of which all its steps of one owner use."""

_names: dict[Line, frozenset[str]] = {}
_unreachable: dict[bytes, float] = {}
"""By their keys, the owners that cannot be reached, and until when none is tried again."""

_reached: dict[bytes, None] = {}
"""The keys of owners that were reached, the latest of them."""


def _reach(address: Address) -> Line | None:
    """Return a line to an owner; None if there is no way to it from this host.

    Raises:
        OSError: it is gone, and what it has submitted is not to begin.
    """
    running = is_running(address.owner)
    if running is False:
        raise ConnectionError(f"the program, {address.owner}, is dead")
    with _lock:
        _hang_up()
        if address.key in _lines:
            return _lines[address.key]
        if address.key in _unreachable:
            return None
        try:
            line = connect(address)
        except OSError:
            if running or address.key in _reached:
                raise
            _unreachable[address.key] = time.monotonic() + _UNREACHABLE_SECONDS
            return None
        _reached[address.key] = None
        if len(_reached) > _MOST_REACHED:
            del _reached[next(iter(_reached))]
        _lines[address.key] = line
        return line


def _hang_up() -> None:
    """Give up the lines to owners that are gone, and those of the process that forked this one."""
    for key, line in list(_lines.items()):
        if line.is_lost or not line.is_mine:
            del _lines[key]
            _names.pop(line, None)
            line.close()
    for key in [key for key, until in _unreachable.items() if until < time.monotonic()]:
        del _unreachable[key]


_voice: ContextVar[Voice | None] = ContextVar("eventor_voice", default=None)


class _Relay(logging.Handler):
    """Has the voice of a step say what the step logs; all else is left to other handlers."""

    def handle(self, record: logging.LogRecord) -> bool:
        """Handle a record; not by turns, for one that waits for its owner is not to hold others."""
        self.emit(record)
        return True

    def emit(self, record: logging.LogRecord) -> None:
        """Relay a record, or show it as `logging` does where there is no handler."""
        voice = _voice.get()
        if voice is not None and voice.is_mine:
            home = _ears.homes.get(voice)
            if home is not None and home.levels.enables(record):
                try:
                    voice.log(record)
                except Exception:
                    self.handleError(record)
            return
        last = logging.lastResort
        if last is None or not _is_alone(record):
            return
        if record.levelno >= max(last.level, _ears.level_before(record.name)):
            last.handle(record)


def _is_alone(record: logging.LogRecord) -> bool:
    """Whether no handler but eventor's gets a record."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None:
        if any(not isinstance(handler, _Relay) for handler in logger.handlers):
            return False
        logger = logger.parent if logger.propagate else None
    return True


class _Ears:
    """What eventor has changed in the logging of this process, while steps run in it.

    Loggers let through what the owner's let through; the handlers that were there let through no
    more than before.

    Attributes:
        homes: from where the steps come that run now.
    """

    def __init__(self) -> None:
        self.homes: dict[Voice, Home] = {}
        self._lock = threading.Lock()
        self._relay = _Relay()
        self._before: dict[str, tuple[int, int]] = {}
        self._filtered: list[logging.Handler] = []
        self._heard: list[logging.Logger] = []

    def open(self, voice: Voice, home: Home) -> None:
        """Hear what a step logs."""
        with self._lock:
            self.homes[voice] = home
            known = {"": logging.root, **task.loggers()}
            for logger in known.values():
                stops_here = logger is logging.root or not logger.propagate
                if stops_here and self._relay not in logger.handlers:
                    logger.addHandler(self._relay)
                    self._heard.append(logger)
                for handler in logger.handlers:
                    if handler is not self._relay and self._filter not in handler.filters:
                        handler.addFilter(self._filter)
                        self._filtered.append(handler)
            for name, level in home.levels.levels.items():
                logger = logging.getLogger(name or None)
                if logger.getEffectiveLevel() > level:
                    before = self._before.get(name, (logger.level, 0))[0]
                    self._before[name] = (before, level)
                    logger.setLevel(level)

    def close(self, voice: Voice) -> None:
        """Hear it no more; when nothing runs, all is as it was."""
        with self._lock:
            del self.homes[voice]
            if self.homes:
                return
            for name, (before, level) in self._before.items():
                logger = logging.getLogger(name or None)
                if logger.level == level:  # else the step has set another
                    logger.setLevel(before)
            for handler in self._filtered:
                handler.removeFilter(self._filter)
            for logger in self._heard:
                logger.removeHandler(self._relay)
            self._before, self._filtered, self._heard = {}, [], []

    def level_before(self, name: str) -> int:
        """Return the level that a logger would have without eventor."""
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            key = "" if logger is logging.root else logger.name
            before, level = self._before.get(key, (logger.level, logger.level))
            own = before if logger.level == level else logger.level
            if own:
                return own
            logger = logger.parent
        return logging.NOTSET

    def _filter(self, record: logging.LogRecord) -> bool:
        voice = _voice.get()
        home = None if voice is None or not voice.is_mine else self.homes.get(voice)
        if home is not None and not home.is_shared:
            return False  # the owner's handlers show it, of which these are copies
        return record.levelno >= self.level_before(record.name)


_ears = _Ears()


@contextlib.contextmanager
def _relayed(voice: Voice, home: Home) -> Iterator[None]:
    """Relay what is logged in this context."""
    _voice.set(voice)
    _ears.open(voice, home)
    try:
        yield
    finally:
        _ears.close(voice)


class _ByName(pickle.Pickler):
    """Pickles what the program's main module defines by its name there.

    A worker that has another main module has got it by value, and could not refer to it else.
    """

    def reducer_override(self, thing: Any) -> Any:
        """Return how something is pickled, `NotImplemented` for as ever."""
        main = sys.modules["__main__"]
        if thing is main:
            return importlib.import_module, ("__main__",)
        if not isinstance(thing, type | FunctionType) or thing.__module__ != "__main__":
            return NotImplemented
        name = thing.__qualname__
        try:
            is_there = operator.attrgetter(name)(main) is thing
        except AttributeError:
            is_there = False
        if is_there or "<locals>" in name or "<lambda>" in name:
            return NotImplemented
        return operator.attrgetter(name), (main,)


def _dumps(value: object) -> bytes:
    """Pickle a result for the owner, and for recoveries, whose main module is the program's."""
    file = BytesIO()
    _ByName(file).dump(value)
    return file.getvalue()
