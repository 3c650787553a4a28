"""The worker's side: what happens in the process, or thread, that runs steps.

    owner                                      worker
    -----                                      ------
    launch  -- Job: its first task, ---------> main
               the steps that it knows
    Inlet   -- frames: the next order ------>  Channel -> run
    Inlet   <- frames: log records, ---------  Channel
               what the step triggers,
               then the Outcome

The owner has `Inlet`, and what makes a pipe and an order; a zygote has `settle`. All else of this
module runs in the worker; it knows nothing of events or of the store.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import multiprocessing
import os
import pickle
import reprlib
import signal
import socket
import struct
import sys
import threading
import traceback
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import _bootstrap
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, NamedTuple

from eventor.errors import EventorError, UsageError
from eventor.rules.config import StepConfig
from eventor.rules.data import Placeholder, ResultOf, lacking, resolve
from eventor.steps import inside, keeper
from eventor.steps.output import STREAMS, captured, flush
from eventor.storage.owner import Owner, is_running
from eventor.types import Outcome, Sequence, StoredResult, TaskStatus, failure, storable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from multiprocessing.connection import Connection

    from eventor.rules.flow import Event, Step

_HEADER = struct.Struct("!Q")
_CHUNK = 1 << 16
_INT_BYTES = array("i").itemsize
_SHOWN = 200
_SMALL_PICKLE = 10_000
LARGEST_PICKLE = 999_000_000
"""Bytes; SQLite keeps no row above 1,000,000,000 (sqlite.org/limits.html)."""


Dumps = Callable[[Any], bytes | memoryview]
"""What pickles."""


class Triggered(NamedTuple):
    """What a step triggers: an event by name, in a sequence."""

    event: str
    sequence: Sequence


class Captured(NamedTuple):
    """The reading ends of pipes to which a step writes its standard output and error."""

    descriptors: tuple[int, ...] = ()


Message = Outcome | Triggered | Captured | dict[str, Any]
"""What a worker sends: triggers, the attributes of log records, and at last the outcome."""

Results = dict[str, StoredResult]
"""By the names of steps, the results that a call takes."""


@dataclass(frozen=True, slots=True)
class Call:
    """What a worker is to do.

    Attributes:
        step: the step's name.
        sequence: the sequence in which it runs.
        attempt: how many times its task has been started, this time included.
        func: what to call, with `args` and `kwargs`.
        results: what placeholders in these stand for; None if there are none.
        config: the step's.
    """

    step: str
    sequence: Sequence
    attempt: int
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: Results | None
    config: StepConfig = field(default_factory=StepConfig)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle for a spawned worker, so that a problem on either side is told in full.

        Raises:
            EventorError: something cannot be pickled; the message names it.
        """
        return rebuild, self.pickled(ForkingPickler.dumps)

    def pickled(self, dumps: Dumps) -> tuple[Any, ...]:
        """Return what `rebuild` takes, each part pickled by itself.

        Raises:
            EventorError: something cannot be pickled; the message names it.
        """
        parts = {name: getattr(self, name) for name in ("func", "args", "kwargs", "config")}
        data = {name: _sendable(part, name, self.step, dumps) for name, part in parts.items()}
        return self.step, self.sequence, self.attempt, data, self.results

    def arguments(self) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """Return the arguments with the values in place of the placeholders.

        Raises:
            ResultError: a result cannot be unpickled here; the message names both tasks.
        """
        if self.results is None:
            return self.args, self.kwargs
        known: dict[str, Any] = {}

        def stands_for(placeholder: Placeholder) -> Any:
            if not isinstance(placeholder, ResultOf):
                return self.sequence
            if placeholder.step not in known:
                known[placeholder.step] = self._load(placeholder.step)
            return known[placeholder.step]

        args, kwargs = resolve((self.args, self.kwargs), stands_for)
        return args, kwargs

    def _load(self, step: str) -> Any:
        stored = None if self.results is None else self.results.get(step)
        if stored is None:
            why = "was put into its arguments after it was added"
        else:
            try:
                return stored.load()
            except BaseException as error:
                why = f"cannot be unpickled here: {describe(error)}"
        raise lacking(self.step, step, self.sequence, why)


class ByName(NamedTuple):
    """What a worker is to do, where it knows the step by its name; see `Call`."""

    step: str
    sequence: Sequence
    attempt: int
    results: Results | None

    def of(self, step: Step) -> Call:
        """Return the call, given the step."""
        return Call(
            self.step,
            self.sequence,
            self.attempt,
            step.func,
            step.args,
            step.kwargs,
            self.results,
            step.config,
        )


Order = ByName | Call | None
"""What a worker is told: to do a step that it knows, a call, or to end."""


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is there for.

    Attributes:
        first: its first task; None for one that waits for it.
        steps: the steps that it knows by name, which only those have that share or inherit the
            owner's memory.
        most: how many tasks it does before it ends; None is no limit.
    """

    first: Call | None
    steps: Mapping[str, Step]
    most: int | None


def _sendable(part: object, name: str, step: str, dumps: Dumps) -> bytes:
    try:
        return bytes(dumps(part))
    except Exception as error:
        raise EventorError(
            f"{name} of step {step!r}, {reprlib.repr(part)}, cannot be sent to its process: {error}"
        ) from error


def rebuild(
    step: str,
    sequence: Sequence,
    attempt: int,
    data: Mapping[str, bytes],
    results: Results | None,
) -> Call:
    """Return a call that was pickled; where that is not possible, one that fails and says why."""
    parts = {}
    for name, part in data.items():
        try:
            parts[name] = pickle.loads(part)
        except Exception as error:
            message = f"{name} of step {step!r} cannot be rebuilt in its process: {describe(error)}"
            refuse = functools.partial(_refuse, message)
            return Call(step, sequence, attempt, refuse, (), {}, None, StepConfig(retry_on=()))
    return Call(step, sequence, attempt, results=results, **parts)


def _refuse(message: str) -> None:
    raise EventorError(message)


@dataclass(frozen=True, slots=True)
class LogLevels:
    """The levels of the owner's loggers, for a worker that does not inherit them."""

    levels: Mapping[str, int]
    disabled: int
    silent: frozenset[str] = frozenset()
    """The names of those that are disabled."""

    @classmethod
    def of_this_process(cls) -> LogLevels:
        """Return the levels that were set here."""
        known = {"": logging.root, **loggers()}
        levels = {name: logger.level for name, logger in known.items() if logger.level}
        silent = frozenset(logger.name for logger in known.values() if logger.disabled)
        return cls(levels, logging.root.manager.disable, silent)

    def enables(self, record: logging.LogRecord) -> bool:
        """Tell whether the owner's logger of that name would take a record."""
        name = record.name
        if name in self.silent:
            return False
        while name and name not in self.levels:
            name = name.rpartition(".")[0]
        return record.levelno > self.disabled and record.levelno >= self.levels.get(name, 0)

    def set(self) -> None:
        """Set them here."""
        for name, level in self.levels.items():
            logging.getLogger(name).setLevel(level)
        for name in self.silent:
            logging.getLogger(name).disabled = True
        logging.disable(self.disabled)


@dataclass(frozen=True, slots=True)
class Origin:
    """From where a worker was started.

    Attributes:
        owner: the owner's process; a thread finds itself in it.
        levels: the levels of the owner's loggers, for a process that does not inherit them.
        blocked: the signals that were blocked there; more are while a worker is started.
        keeper: the pipe by which a process `keeper.announce`s itself.
        run_id: the run whose steps it does.
        recovery: the recovery in that run.
        events: what its steps may trigger, by name; a process that does not inherit the events
            knows the names alone.
    """

    owner: Owner
    levels: LogLevels | None
    blocked: frozenset[int]
    keeper: Connection | None
    run_id: int
    recovery: int
    events: Mapping[str, Event | None]


def pipe() -> tuple[socket.socket, socket.socket]:
    """Return the owner's and the worker's end of a pipe for both directions.

    Raises:
        OSError: there is no descriptor left.
    """
    ends = socket.socketpair()
    for end in ends:
        end.settimeout(None)  # whatever the program's default is
    return ends


class Channel:
    """The worker's end of its pipe; several threads may send."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)  # sent to another process, it is made anew there
        self._connection = connection
        # A handler of signals may send in the middle of what its own thread sends.
        self._lock = threading.RLock()
        self._frames: deque[tuple[bytes, bytes]] = deque()
        self._writing = False
        self._pid = os.getpid()
        self._pipe = self._identify()
        self._current: inside.CurrentStep | None = None

    @property
    def mine(self) -> bool:
        """Whether this process may send; one that the step forked would break into a frame."""
        return os.getpid() == self._pid

    @property
    def whole(self) -> bool:
        """Whether the pipe is there; a step may have closed it, and put a file in its place."""
        return self._identify() == self._pipe

    def begin(self, call: Call, origin: Origin) -> None:
        """Let what is called from now on know in which step it is."""
        self._current = inside.CurrentStep(
            call.step,
            call.sequence,
            origin.run_id,
            origin.recovery,
            call.attempt,
            origin.events,
            self.trigger,
        )
        inside.enter(self._current, whole_process=self._pid != origin.owner.pid)

    def trigger(self, current: inside.CurrentStep, event: str, sequence: Sequence) -> None:
        """Send what a step triggers; it then comes before the step's outcome.

        Raises:
            UsageError: the step cannot be heard: it has ended, or this is a process of its own.
        """
        if not self.mine:
            raise UsageError(
                f"step {current} triggers event {event!r} in process {os.getpid()}, which it has "
                f"started; expected in its own, {self._pid}"
            )
        data = pickle.dumps(Triggered(event, sequence))
        with self._lock:
            if self._current is not current:
                raise UsageError(f"step {current} triggers event {event!r} after it has ended")
            try:
                self._send(data)
            except OSError as error:
                raise UsageError(
                    f"step {current} cannot trigger event {event!r}: {error}"
                ) from error

    def end(self, outcome: Outcome) -> None:
        """Send how the step ended, after which it triggers nothing more.

        Raises:
            OSError: as `send`.
        """
        with self._lock:
            self._current = None
        self.send(outcome)

    def send(self, message: Message) -> None:
        """Send one message.

        Raises:
            OSError: the owner is gone, or the step has closed the pipe.
        """
        data = pickle.dumps(message)
        with self._lock:
            self._send(data)

    def hand_over(self, descriptors: list[int]) -> None:
        """Send the reading ends of what is captured.

        Raises:
            OSError: the owner is gone.
        """
        data = pickle.dumps(Captured())
        with self._lock:
            socket.send_fds(self._connection, [_HEADER.pack(len(data)) + data], descriptors)

    def receive(self) -> Order:
        """Wait for the next order, which is to end if nobody is left to give another."""
        size = _HEADER.unpack(self._read(_HEADER.size) or _HEADER.pack(0))[0]
        data = self._read(size)
        order: Order = pickle.loads(data) if data else None
        return order

    def close(self) -> None:
        """Close; the owner reads an end of file."""
        with self._lock:
            self._connection.close()

    def _send(self, data: bytes) -> None:
        if not self.whole:
            raise BrokenPipeError("the step has closed the pipe by which it is heard")
        self._frames.append((_HEADER.pack(len(data)), data))
        if self._writing:
            return  # whoever is writing goes on with this
        self._writing = True
        try:
            while self._frames:
                for part in self._frames.popleft():
                    self._write(memoryview(part))
        finally:
            self._writing = False

    def _identify(self) -> tuple[int, int] | None:
        try:
            status = os.fstat(self._connection.fileno())
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def _read(self, size: int) -> bytes:
        """Return so many bytes, or none if the owner is gone."""
        data = bytearray()
        while len(data) < size:
            part = os.read(self._connection.fileno(), min(size - len(data), _CHUNK))
            if not part:
                return b""
            data += part
        return bytes(data)

    def _write(self, rest: memoryview) -> None:
        while rest:
            rest = rest[os.write(self._connection.fileno(), rest) :]


def packed(order: Order) -> bytes:
    """Return an order as it is sent.

    Raises:
        EventorError: something of a call cannot be pickled; the message names it.
    """
    return bytes(ForkingPickler.dumps(order)) if isinstance(order, Call) else pickle.dumps(order)


class Inlet:
    """The owner's end of a worker's pipe; it never waits for the rest of a message."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()
        self._descriptors = array("i")
        self.ended = False
        """Whether the worker has closed its end."""
        self.garbled = False
        """Whether something else than a worker's messages has come in; what follows is lost."""

    @property
    def lost(self) -> bool:
        """Whether nothing can be said or heard any more."""
        return self.ended or self.garbled

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._connection.fileno()

    def send(self, data: bytes) -> None:
        """Send a packed order to a worker that waits for one.

        Raises:
            OSError: it is dead.
        """
        self._connection.sendall(_HEADER.pack(len(data)) + data)

    def read(self) -> list[Message]:
        """Return the messages that have come in, in full; nothing that comes in raises here."""
        while not self.ended:
            try:
                data = self._receive()
            except BlockingIOError:
                break
            except OSError:  # a socket tells a death in the middle of something by an error
                data = b""
            if not self.garbled:
                self._buffer += data
            self.ended = not data
        return [] if self.garbled else list(iter(self._message, None))

    def close(self) -> None:
        """Close this end."""
        self._connection.close()
        for descriptor in self._descriptors:
            os.close(descriptor)

    def _receive(self) -> bytes:
        room = socket.CMSG_SPACE(len(STREAMS) * _INT_BYTES)
        data, received, *_ = self._connection.recvmsg(_CHUNK, room, socket.MSG_DONTWAIT)
        for _level, _kind, packed in received:
            self._descriptors.frombytes(packed[: len(packed) - len(packed) % _INT_BYTES])
        return data

    def _message(self) -> Message | None:
        head = self._buffer[: _HEADER.size]
        if len(head) < _HEADER.size:
            return None
        end = _HEADER.size + _HEADER.unpack(head)[0]
        if len(self._buffer) < end:
            return None
        try:
            message = pickle.loads(memoryview(self._buffer)[_HEADER.size : end].tobytes())
        except Exception:
            message = None
        del self._buffer[:end]
        if isinstance(message, Captured):
            descriptors, self._descriptors = tuple(self._descriptors), array("i")
            return Captured(descriptors)
        if isinstance(message, Outcome | Triggered | dict):
            return message
        self.garbled = True
        return None


def main(job: Job, connection: socket.socket, origin: Origin) -> None:
    """Do what a worker has to do; the target of its process or thread.

    Args:
        job: what it is there for.
        connection: the worker's end of its pipe.
        origin: from where it was started.
    """
    channel = Channel(connection)
    if os.getpid() != origin.owner.pid:
        forward = settle()
        if origin.levels is not None:
            origin.levels.set()
        work(job, channel, origin, forward)
    elif job.first is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, origin.blocked)
        channel.begin(job.first, origin)
        channel.end(run(job.first))
        channel.close()


def settle() -> Forward:
    """Make a process its own where it is tied to what it was copied from.

    Returns:
        What stands in the place of all log handlers.
    """
    _forget_threads()
    forward = Forward()
    forward.take_over()
    return forward


def work(job: Job, channel: Channel, origin: Origin, forward: Forward) -> None:
    """Run steps, in a process that is settled, until there is no more to do."""
    forward.channel = channel
    _lead_session(origin)
    call = job.first or _next_call(channel, job)
    done = 0
    while call is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, origin.blocked)
        multiprocessing.current_process().name = f"{call.step}[{call.sequence}]"
        channel.begin(call, origin)
        _tell_by_environment(call, origin)
        outcome = run_captured(call, channel) if call.config.capture_output else run(call)
        # A child that the step has forked returns here too; the outcome is the step's to tell.
        if not channel.mine:
            return
        done += 1
        flush()  # the next step may begin and print before this process has ended
        if job.most == done:
            _tell(outcome, call, channel)
            return  # and the pipe stays open: what is logged while it ends still has a way
        forward.take_over()  # again: the task may have changed it
        _tell(outcome, call, channel)
        call = _next_call(channel, job)


def _tell(outcome: Outcome, call: Call, channel: Channel) -> None:
    """Send how a step ended; where there is no way for it, end, and so count as failed."""
    try:
        channel.end(outcome)
    except OSError:
        if not channel.whole:  # else the owner is gone, of whom nobody has to be told
            told = "has closed the pipe by which its process says how it ended; it counts as failed"
            step = f"{call.step}[{call.sequence}]"
            with contextlib.suppress(OSError):
                os.write(2, f"eventor: step {step} {told}\n".encode())
        sys.exit(1)


def _next_call(channel: Channel, job: Job) -> Call | None:
    order = channel.receive()
    return order.of(job.steps[order.step]) if isinstance(order, ByName) else order


def _tell_by_environment(call: Call, origin: Origin) -> None:
    """Let the programs that the step starts know in which step they are."""
    # As bytes: where the locale is plain, Python refuses to encode other text.
    for name, value in (
        (b"EVENTOR_STEP_NAME", call.step.encode()),
        (b"EVENTOR_STEP_SEQUENCE", str(call.sequence).encode()),
        (b"EVENTOR_STEP_RECOVERY", b"%d" % origin.recovery),
    ):
        os.environb[name] = value


def _lead_session(origin: Origin) -> None:
    """Lead a session and its group, so that a Ctrl-C for the owner's is not for this process.

    Without a terminal of its own, it is not stopped for ever if it asks for one.
    """
    with contextlib.suppress(PermissionError):  # who leads a group cannot lead a new session
        os.setsid()
    if origin.keeper is not None:
        keeper.announce(origin.keeper)
        origin.keeper.close()
        # Its parent, unless a server forks for it; and a parent that has died is one no more.
        if os.getppid() != origin.owner.pid and is_running(origin.owner) is False:
            os._exit(1)
    if signal.SIGINT in signal.sigpending():
        # It came while this process was still in the owner's group.
        signal.signal(signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN))


def _forget_threads() -> None:
    """Make a forked process its own where something is still tied to threads of the owner."""
    # By an event loop's descriptor, a signal for this process would reach the owner's loop; without
    # it, asyncio's handlers do nothing.
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        if getattr(signal.getsignal(number), "__module__", None) == "asyncio.unix_events":
            signal.signal(number, signal.SIG_DFL)
    # What another thread was importing stays locked: it is imported anew, if it is asked for.
    locks = getattr(_bootstrap, "_module_locks", {})
    for name, reference in list(locks.items()):
        holder = getattr(reference(), "owner", None)
        if holder not in (None, threading.get_ident()):
            del locks[name]
            sys.modules.pop(name, None)


def run(call: Call, dumps: Dumps = pickle.dumps) -> Outcome:
    """Call the step's function and return how it ended; nothing that it does raises here.

    Args:
        call: the call.
        dumps: pickles what it returns.
    """
    try:
        args, kwargs = call.arguments()
    except BaseException as error:  # a ResultError, or what a handler of signals has raised
        return failure(describe(error), retriable=False)
    try:
        value = call.func(*args, **kwargs)
        if inspect.iscoroutine(value):
            import asyncio  # noqa: PLC0415 (slow to import, and most steps do without)

            value = asyncio.run(value)
    except SystemExit as stop:
        return _exited(stop.code, retriable=call.config.retries(type(stop)))
    except BaseException as error:
        retriable = call.config.retries(type(error))
        return failure(describe(error), _traceback(error), retriable=retriable)
    return _succeeded(value, dumps)


def run_captured(call: Call, channel: Channel) -> Outcome:
    """Call the step's function as `run` does, while the owner reads what it writes."""
    try:
        with captured(channel.hand_over):
            return run(call)
    except OSError as error:
        return failure(f"its output cannot be captured: {describe(error)}")


def describe(error: BaseException) -> str:
    """Return the type and message of an exception."""
    try:
        message = str(error)
    except Exception as broken:
        message = f"<its message cannot be had: {type(broken).__name__}>"
    return f"{type(error).__qualname__}: {message}" if message else type(error).__qualname__


class Forward(logging.Handler):
    """Sends the records of all loggers of this process to the owner, once it has a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.channel: Channel | None = None
        self._own = logging.StreamHandler(sys.stderr)

    def take_over(self) -> None:
        """Stand in the place of all handlers."""
        for logger in (logging.root, *loggers().values()):
            stops_here = logger is logging.root or not logger.propagate
            handlers: list[logging.Handler] = [self] if stops_here else []
            if logger.handlers != handlers:  # what is not written stays shared with the owner
                logger.handlers = handlers

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record; where there is no pipe any more, show it here."""
        channel = self.channel
        if channel is None or not (channel.mine and channel.whole):
            self._own.handle(record)
            return
        try:
            channel.send(attributes(record))
        except Exception:
            self.handleError(record)


def attributes(record: logging.LogRecord) -> dict[str, Any]:
    """Return what the owner needs to build an equal record, as plain data."""
    told = dict(vars(record), msg=record.getMessage(), args=None)
    if record.exc_info and not record.exc_text:
        told["exc_text"] = logging.Formatter().formatException(record.exc_info)
    told["exc_info"] = None
    return {name: _plain(value) for name, value in told.items()}


def _plain(value: Any) -> Any:
    """Return `value`, with the repr in place of what only the worker may be able to unpickle."""
    if type(value) in (str, int, float, bool, type(None)):
        return value
    if type(value) in (list, tuple):
        return [_plain(item) for item in value]
    if type(value) is dict:
        return {str(key): _plain(item) for key, item in value.items()}
    return _repr(value)


def loggers() -> dict[str, logging.Logger]:
    """Return the loggers of this process by their names, without the root."""
    known = dict(logging.root.manager.loggerDict)
    return {name: logger for name, logger in known.items() if isinstance(logger, logging.Logger)}


def _exited(code: object, *, retriable: bool) -> Outcome:
    if code is None or (isinstance(code, int) and code == 0):
        return _succeeded(None, pickle.dumps)
    told = f"exit code {code:d}" if isinstance(code, int) else f"exit code 1: {code}"
    return failure(f"SystemExit: {told}", retriable=retriable)


def _succeeded(value: Any, dumps: Dumps) -> Outcome:
    if value is None:
        return Outcome(TaskStatus.success, "None")
    try:
        data = _pickled(value, dumps)
    except BaseException as error:
        told = storable(_repr(value))
        return Outcome(
            TaskStatus.success,
            _cut(told),
            StoredResult("repr", told.encode()),
            warning=f"its result cannot be pickled, its repr is kept: {describe(error)}",
        )
    told = _repr(value) if len(data) <= _SMALL_PICKLE else reprlib.repr(value)
    return Outcome(TaskStatus.success, _cut(storable(told)), StoredResult("pickle", data))


def _pickled(value: object, dumps: Dumps) -> bytes:
    data = bytes(dumps(value))
    if len(data) > LARGEST_PICKLE:
        raise ValueError(f"its {len(data):,} bytes are more than the {LARGEST_PICKLE:,} of a store")
    return data


def _repr(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__qualname__} whose repr failed: {describe(error)}>"


def _cut(told: str) -> str:
    return told if len(told) <= _SHOWN else f"{told[:_SHOWN]}..."


def _traceback(error: BaseException) -> str:
    """Return the traceback as Python prints it, from the step's own function on."""
    frames = error.__traceback__.tb_next if error.__traceback__ is not None else None
    try:
        return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
    except Exception as broken:
        return f"<the traceback cannot be had: {describe(broken)}>"
