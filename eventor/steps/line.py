"""The line between the owner of a run and a process that runs its steps for an executor.

    owner                                         worker
    -----                                         ------
    Desk   <- connects -------------------------  Line
           -- a nonce ------------------------->
           <- signed frames: a greeting, then
              questions, and what steps say ----
           -- signed frames: a welcome, then
              answers ------------------------->

All frames are signed by a key that goes with the calls, for one connection and in their order.
What is not signed so, by a stranger, is not read any further, and nothing of it is unpickled. They
are not encrypted. Neither side needs a thread: the owner never waits for the rest of a frame, and
the worker reads only while it waits for an answer. It asks nothing before it is welcome: where it
is dropped before, no question of its was taken, and it connects again.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import math
import os
import pickle
import resource
import secrets
import selectors
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing import util
from typing import TYPE_CHECKING, NamedTuple

from eventor.storage.owner import Owner, is_running

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator
    from typing import Any

    from eventor.steps.task import Triggered

_HERE = "127.0.0.1"
_NONCE_BYTES = 32
_HEADER = struct.Struct("!I32s")
"""How many bytes follow, and by what they are signed."""

_CHUNK = 1 << 16
_LARGEST_FRAME = 1 << 30
_GREETING_SECONDS = 10.0
_NONCE_SECONDS = 120.0
"""How long an owner may be held up, by a hook or a lock, before it lets in who has connected; one
that is seen to live may be for longer."""

_MOST_STRANGERS = 64
"""How many who have said nothing yet are let wait, beside as many workers as may come."""

_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_PAUSES = (0.1, 0.5, 2.0, 0.0)
"""Seconds after each try to connect in which the owner has hung up."""

_ANSWER_SECONDS = 1.0
"""For how long somebody may take nothing of an answer."""

_LOOK_SECONDS = 1.0
_CONNECT_SECONDS = 5.0
_BACKLOG = 512
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Seconds, and how often: a host that is gone is found to be, where the system can."""

_UNHEARD_MILLISECONDS = 60_000
"""How long an answer may be on its way to a host that is gone. The worker has no such limit, which
would count for an owner too that is held up, and reads nothing."""


class MayBegin(NamedTuple):
    """The question why a submission may not begin in the process of that pid; None is no reason."""

    ticket: int
    pid: int


class WhichEvents(NamedTuple):
    """The question for the names of the events."""


class Goodbye(NamedTuple):
    """What comes in the place of an answer where the owner has taken no question any more."""


class NotTakenError(ConnectionError):
    """The owner has hung up before it took a question."""


class Said(NamedTuple):
    """What a step says: what it triggers, or the attributes of a log record."""

    ticket: int
    message: Triggered | dict[str, Any]


@dataclass(frozen=True, slots=True)
class Address:
    """Where an owner listens.

    Attributes:
        hosts: names and addresses of its host, for processes on others.
        port: the port there.
        key: by which frames are signed.
        owner: its process.
    """

    hosts: tuple[str, ...]
    port: int
    key: bytes = field(repr=False)
    owner: Owner


def _sign(key: bytes, side: bytes, nonce: bytes, number: int, body: bytes) -> bytes:
    return hmac.digest(key, b"%s %b %d %b" % (side, nonce, number, body), "sha256")


def _set_up(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Caller:
    """The owner's end of one connection, by whoever has connected.

    Attributes:
        since: when it has connected, by `time.monotonic`.
        is_known: whether it has signed anything; until then it may send a greeting alone.
        ended: when it was seen to have hung up, by `time.monotonic`; infinite until then, and for
            ever if it was this side that has.
    """

    def __init__(self, connection: socket.socket, key: bytes) -> None:
        self.since = time.monotonic()
        self.is_known = False
        self.ended = math.inf
        self._connection = connection
        self._key = key
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._buffer = bytearray()
        self._heard = self._said = 0
        connection.setblocking(False)
        _set_up(connection)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            option = (socket.TCP_USER_TIMEOUT, _UNHEARD_MILLISECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, *option)
        connection.send(self._nonce)

    @property
    def is_served(self) -> bool:
        """Whether a question of its was answered, beside its greeting."""
        return self._said > 1

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._connection.fileno()

    def hear(self) -> tuple[list[object], bool]:
        """Return what has come in, and whether nothing more will."""
        try:
            data = self._connection.recv(_CHUNK)
        except BlockingIOError:
            return [], False
        except OSError:
            data = b""
        self._buffer += data
        messages: list[object] = []
        while (frame := self._frame()) is not None:
            try:
                if frame:
                    messages.append(pickle.loads(frame))
                else:
                    self.answer(None)
            except Exception:  # another version of eventor, or gone
                self._heard = -1
        if not data:
            self.ended = time.monotonic()
        return messages, not data or self._is_strange()

    def answer(self, value: object) -> None:
        """Answer its question, of which it has one at a time.

        Raises:
            OSError: it is gone, or reads nothing.
        """
        body = pickle.dumps(value)
        signed = _sign(self._key, b"owner", self._nonce, self._said, body)
        self._said += 1
        data = memoryview(_HEADER.pack(len(body), signed) + body)
        deadline = time.monotonic() + _ANSWER_SECONDS
        while data:
            try:
                data = data[self._connection.send(data) :]
                deadline = time.monotonic() + _ANSWER_SECONDS
            except BlockingIOError:
                # It waits for nothing else than this; but names may be many.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)

    def close(self) -> None:
        """Hang up, for whoever has inherited this end too."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _frame(self) -> bytes | None:
        if len(self._buffer) < _HEADER.size or self._is_strange():
            return None
        size, signed = _HEADER.unpack_from(self._buffer)
        end = _HEADER.size + size
        if len(self._buffer) < end:
            return None
        body = bytes(memoryview(self._buffer)[_HEADER.size : end])
        if not hmac.compare_digest(
            signed, _sign(self._key, b"worker", self._nonce, self._heard, body)
        ):
            self._heard = -1
            return None
        self._heard += 1
        self.is_known = True
        del self._buffer[:end]
        return body

    def _is_strange(self) -> bool:
        if self._heard < 0:
            return True
        if len(self._buffer) < _HEADER.size:
            return False
        size, _signed = _HEADER.unpack_from(self._buffer)
        return bool(size > (_LARGEST_FRAME if self.is_known else 0))


class Desk:
    """Where the lines of one call of `ev()` come together.

    Args:
        owner: the process of that call.
        hosts: names and addresses at which others reach this host; none where all workers are here,
            and nobody else is to reach it.
        selector: tells when there is something to hear; it holds this, or a `Caller`, as its data.
        warn: is told once that workers have to wait, for there is no descriptor left.

    Raises:
        OSError: there is no port.
    """

    def __init__(
        self,
        owner: Owner,
        hosts: tuple[str, ...],
        selector: selectors.BaseSelector,
        warn: Callable[[str], None],
    ) -> None:
        self._selector = selector
        self._warn = warn
        self._has_warned = self._is_listening = False
        self._key = secrets.token_bytes(32)
        self._callers: dict[Caller, None] = {}
        here = "" if hosts else _HERE
        self._listening = socket.create_server((here, 0), backlog=_BACKLOG)
        self._listening.setblocking(False)
        self._listen()
        port = self._listening.getsockname()[1]
        self.address = Address(hosts, port, self._key, owner)

    def admit(self, workers: int) -> bool:
        """Let in who has connected, and return whether there is room for it.

        Args:
            workers: as many of those who say nothing yet may be workers.
        """
        try:
            connection, _address = self._listening.accept()
        except OSError as error:
            if error.errno in _FULL:
                self._pause(error)
                return False
            return True  # it has gone again
        try:
            caller = Caller(connection, self._key)
        except OSError:
            connection.close()
            return True
        self._callers[caller] = None
        self._selector.register(caller, selectors.EVENT_READ, caller)
        self._drop_strangers(_MOST_STRANGERS + workers)
        return True

    def make_room(self, busy: Container[Caller | None]) -> None:
        """Hang up on one who was of use, and is not busy; it connects again when it has to ask."""
        for caller in self._callers:
            if caller.is_served and caller not in busy:
                self.answer(caller, Goodbye())
                self.forget(caller)
                return

    def hear(self, caller: Caller) -> list[object]:
        """Return what somebody has said; one who is gone, or strange, is forgotten."""
        if caller not in self._callers:
            return []  # dropped since the selector told of it
        messages, gone = caller.hear()
        if gone:
            self.forget(caller)
        return messages

    def answer(self, caller: Caller, value: object) -> None:
        """Answer a question."""
        if caller in self._callers:
            try:
                caller.answer(value)
            except BlockingIOError:
                self.forget(caller)
            except OSError:
                caller.ended = time.monotonic()
                self.forget(caller)

    def knows(self, caller: Caller | None) -> bool:
        """Whether there is somebody from whom more may come."""
        return caller in self._callers

    def forget(self, caller: Caller) -> None:
        """Hang up, if that was not done."""
        if caller not in self._callers:
            return
        del self._callers[caller]
        self._selector.unregister(caller)
        caller.close()
        self._listen()

    def look(self) -> None:
        """Hang up on those who have said nothing for too long; to be called from time to time."""
        self._listen()
        late = time.monotonic() - _GREETING_SECONDS
        for caller in [one for one in self._callers if not one.is_known and one.since < late]:
            self.forget(caller)

    def close(self) -> None:
        """Hang up on all, and listen no more."""
        for caller in list(self._callers):
            self.forget(caller)
        if self._is_listening:
            self._selector.unregister(self._listening)
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # for who has inherited it too
        self._listening.close()

    def _listen(self) -> None:
        if not self._is_listening:
            self._is_listening = True
            self._selector.register(self._listening, selectors.EVENT_READ, self)

    def _pause(self, error: OSError) -> None:
        """Let those who connect wait until somebody has hung up, or the next look."""
        self._is_listening = False
        self._selector.unregister(self._listening)
        if not self._has_warned:
            self._has_warned = True
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            self._warn(
                f"Workers wait to be let in: {error}; this process may have {most} open files "
                "(ulimit -n), and each process of an executor needs one of them"
            )

    def _drop_strangers(self, most: int) -> None:
        strangers = [one for one in self._callers if not one.is_known]
        for caller in strangers[: max(0, len(strangers) - most)]:
            self.forget(caller)


class Line:
    """The worker's end; several threads may use it.

    Args:
        address: where the owner listens.
        connection: to there.

    Attributes:
        close: hangs up.

    Raises:
        OSError: whoever listens there is no owner.
    """

    def __init__(self, address: Address, connection: socket.socket) -> None:
        self._address = address
        self._connection = connection
        deadline = time.monotonic() + _NONCE_SECONDS
        self._nonce = self._receive(_NONCE_BYTES, deadline)
        self._asking = threading.Lock()
        # A handler of signals may speak in the middle of what its own thread says.
        self._speaking = threading.RLock()
        self._bodies: deque[bytes] = deque([b""])
        self._said = self._heard = 0
        self._is_writing = False
        self._pid = os.getpid()
        # A process that ends says so, and complains of nothing that is open.
        self.close = util.Finalize(self, connection.close, exitpriority=0)
        self._send_all()
        self._answer(deadline)

    @property
    def is_lost(self) -> bool:
        """Whether the owner has hung up."""
        try:
            return not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    @property
    def is_mine(self) -> bool:
        """Whether this process may speak; one that a step has forked would break into a frame."""
        return os.getpid() == self._pid

    def ask(self, question: MayBegin | WhichEvents) -> Any:
        """Ask, and wait for the answer.

        Raises:
            NotTakenError: it can be asked anew, by another line.
            OSError: the owner is gone, or somebody else has answered.
        """
        with self._asking:
            try:
                self.say(question)
            except OSError as error:  # the owner takes no part of a frame
                self.close()
                raise NotTakenError(str(error)) from error
            answer = self._answer()
            if isinstance(answer, Goodbye):
                self.close()
                raise NotTakenError("the owner has hung up")
            return answer

    def say(self, message: MayBegin | WhichEvents | Said) -> None:
        """Send something.

        Raises:
            OSError: the owner is gone.
        """
        body = pickle.dumps(message)
        with self._speaking:
            self._bodies.append(body)
            self._send_all()

    def _send_all(self) -> None:
        if self._is_writing:
            return  # whoever is writing goes on with this
        self._is_writing = True
        try:
            while self._bodies:
                body = self._bodies.popleft()
                signed = _sign(self._address.key, b"worker", self._nonce, self._said, body)
                self._said += 1
                self._connection.sendall(_HEADER.pack(len(body), signed) + body)
        finally:
            self._is_writing = False

    def _answer(self, deadline: float | None = None) -> Any:
        size, signed = _HEADER.unpack(self._receive(_HEADER.size, deadline))
        body = self._receive(size, deadline)
        number, self._heard = self._heard, self._heard + 1
        right = _sign(self._address.key, b"owner", self._nonce, number, body)
        if not hmac.compare_digest(signed, right):
            raise ConnectionError("the answer was not signed by the owner")
        return pickle.loads(body)

    def _receive(self, size: int, deadline: float | None = None) -> bytes:
        data = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            while len(data) < size:
                if not selector.select(_LOOK_SECONDS):
                    # What others have inherited of a dead owner keeps the connection open.
                    running = is_running(self._address.owner)
                    if running is False:
                        raise ConnectionError("the owner is dead")
                    if not running and deadline is not None and time.monotonic() > deadline:
                        raise TimeoutError("whoever listens there says nothing")
                    continue
                part = self._connection.recv(min(size - len(data), _CHUNK))
                if not part:
                    raise ConnectionError("the owner has hung up")
                data += part
        return bytes(data)


def connect(address: Address) -> Line:
    """Reach an owner, on this host or another.

    Raises:
        OSError: that is not possible.
    """
    errors: list[OSError] = []
    for host in _hosts(address):
        for pause in _PAUSES:
            try:
                connection = socket.create_connection((host, address.port), _CONNECT_SECONDS)
            except OSError as error:
                errors.append(error)
                break
            try:
                connection.settimeout(None)
                _set_up(connection)
                return Line(address, connection)
            except OSError as error:
                connection.close()
                errors.append(error)
                if not isinstance(error, ConnectionError):
                    break
            time.sleep(pause)
    raise errors[0]


def _hosts(address: Address) -> Iterator[str]:
    if is_running(address.owner) is not None or not address.hosts:
        yield _HERE
    yield from address.hosts


def own_hosts() -> tuple[str, ...]:
    """Return at what this host is probably reached from others."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return (name,)
    except UnicodeError:
        return ()  # nobody can look up such a name
    # Some hosts know themselves by an address that is the same everywhere.
    return (name,) if address.startswith("127.") else (address, name)


def hosts_of(given: str) -> tuple[str, ...]:
    """Return at what this host is reached, of which that was said: nothing if it is itself alone.

    Raises:
        OSError: that is no name or address of a host.
        UnicodeError: nor can it be one.
    """
    if given.lower() == "localhost" or given.startswith("127."):
        return ()
    address = socket.gethostbyname(given)
    # A host may know its own name as loopback, and others know it otherwise.
    is_own = _label(given) == _label(socket.gethostname()) != "localhost"
    return () if address.startswith("127.") and not is_own else (given,)


def _label(name: str) -> str:
    return name.partition(".")[0].lower()
