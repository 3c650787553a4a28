"""The keeper: a small process that ends what a dead owner has left running.

    owner  -- fork, before any step -->  keeper
    step   -- begun, as its first act --->  |
    owner  -- ended, or: kill all ---------> |   over one pipe

Each step leads a session and a process group of its own, so what it starts is in these too. The
death of the owner ends the pipe, or shows in the keeper's parent; the keeper then kills all groups
that it knows. So it does when an owner that is stopped or cut off has let its lease run out. A
signal upon the parent's death would need no keeper, but Linux alone has one, and it does not reach
what a step has started.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import struct
import time
from multiprocessing import Pipe
from typing import TYPE_CHECKING, NoReturn

from eventor.steps.fork import unwarned
from eventor.steps.signals import blocked
from eventor.storage.lease import clock
from eventor.storage.owner import PROC, stat_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from multiprocessing.connection import Connection

_RECORD = struct.Struct("=cq")
_BEGUN = b"+"
_ENDED = b"-"
_KILL = b"!"
_ALLOWED = b"~"

_MILLI = 1000

_SWEEPS = 5

_LOOK_SECONDS = 0.2
"""How often the keeper reads its pipe, and looks at its parent, should others hold that open."""

_KILL_SECONDS = 1.0
_WAIT_SECONDS = 0.002
"""How long a living owner waits for its keeper to kill what is left, and how often it looks."""


def announce(pipe: Connection) -> None:
    """Tell the keeper, from a step's process, the group that it leads.

    If the owner lives after this, its keeper has heard of the group, or will before it ends. If it
    does not, nobody may have, and the step must not go on.
    """
    _send(pipe, _BEGUN, os.getpid())


def _send(pipe: Connection, what: bytes, number: int) -> None:
    # A pipe that is full or broken is that of a keeper which is stopped or dead.
    with contextlib.suppress(OSError):
        os.write(pipe.fileno(), _RECORD.pack(what, number))


def kill_sessions(leaders: Collection[int]) -> None:
    """Kill what has left the groups of steps and is still in their sessions, as timeout(1) does.

    Only where there is a /proc: else nothing tells at a bearable price who is in a session.
    """
    for _ in range(_SWEEPS):
        found = [pid for pid in _processes() if _session_of(pid) in leaders] if leaders else []
        if not found:
            return
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _processes() -> Iterator[int]:
    with contextlib.suppress(OSError):
        for name in os.listdir(PROC):  # noqa: PTH208
            if name.isdecimal():
                yield int(name)


def _session_of(pid: int) -> int | None:
    try:
        state, _parent, _group, session, *_ = stat_of(pid)
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(session)


class Groups:
    """The process groups in which something may still run.

    Args:
        signal_group: sends a signal to a group, as `os.killpg`.
    """

    def __init__(self, signal_group: Callable[[int, int], None] = os.killpg) -> None:
        self.condemned = False
        """Whether the owner has asked to kill them all."""
        self.allowed_until = math.inf
        """Until when they may go on, by `lease.clock`."""
        self._signal = signal_group
        self._running: set[int] = set()
        self._left: set[int] = set()
        self._buffer = b""

    def take(self, data: bytes) -> None:
        """Take in what has come over the pipe."""
        self._buffer += data
        whole = len(self._buffer) - len(self._buffer) % _RECORD.size
        for what, number in _RECORD.iter_unpack(self._buffer[:whole]):
            if what == _BEGUN:
                self._running.add(number)
            elif what == _KILL:
                self.condemned = True
            elif what == _ALLOWED:
                self.allowed_until = number / _MILLI if number >= 0 else math.inf
            else:
                self._running.discard(number)
                self._left.add(number)
        self._buffer = self._buffer[whole:]
        self.forget_empty()

    def forget_empty(self) -> None:
        """Forget the groups of ended steps that are empty: their number may be given again."""
        for group in tuple(self._left):
            try:
                self._signal(group, 0)
            except OSError:
                self._left.discard(group)

    def kill(self) -> None:
        """Kill all groups, and forget them."""
        for group in self._running | self._left:
            with contextlib.suppress(OSError):
                self._signal(group, signal.SIGKILL)
        kill_sessions(self._running)
        self._running.clear()
        self._left.clear()


class Keeper:
    """The owner's hold on its keeper.

    Attributes:
        pipe: what a step's process `announce`s itself by.
        allowed_until: until when steps may go on, as it was told.
    """

    def __init__(self) -> None:
        self._reading, self.pipe = Pipe(duplex=False)
        for end in (self._reading, self.pipe):
            os.set_blocking(end.fileno(), False)
        self._pid = 0
        self.allowed_until = math.inf

    def ensure(self, groups: Iterable[int]) -> int:
        """Return the pid of a keeper that lives; a new one learns of `groups`, which run now.

        Raises:
            OSError: it cannot be forked.
        """
        if not self._lives():
            owner = os.getpid()
            with unwarned(), blocked(signal.valid_signals()):
                pid = os.fork()
                if pid == 0:
                    _keep(self._reading.fileno(), owner)
            self._pid = pid
            self.allowed_until = math.inf
            for group in groups:
                _send(self.pipe, _BEGUN, group)
        return self._pid

    def allow_until(self, until: float) -> None:
        """Say until when steps may go on, by `lease.clock`, unless a later time is said by then."""
        if until != self.allowed_until:
            self.allowed_until = until
            _send(self.pipe, _ALLOWED, -1 if until == math.inf else round(until * _MILLI))

    def forget(self, group: int) -> None:
        """Say that a step has ended."""
        _send(self.pipe, _ENDED, group)

    def close(self, *, kill: bool) -> None:
        """End the keeper, which kills all that steps have left running first if `kill` is True."""
        if kill:
            _send(self.pipe, _KILL, 0)
            self.pipe.close()  # which wakes it
            deadline = time.monotonic() + _KILL_SECONDS
            while self._lives() and time.monotonic() < deadline:
                time.sleep(_WAIT_SECONDS)
        if self._lives():
            os.kill(self._pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
        self._pid = 0
        self._reading.close()
        self.pipe.close()

    def _lives(self) -> bool:
        if not self._pid:
            return False
        try:
            return os.waitpid(self._pid, os.WNOHANG) == (0, 0)
        except ChildProcessError:
            return False


def _keep(reading: int, owner: int) -> NoReturn:
    """Be the keeper; its signals stay blocked, so it ends with its owner or by a kill alone."""
    try:
        _detach(reading)
        groups = Groups()
        ended = False
        while not (ended or groups.condemned) and os.getppid() == owner:
            ended = _has_ended(reading, _LOOK_SECONDS)
            _hear(groups, reading)
            groups.forget_empty()
            if clock() > groups.allowed_until:
                groups.kill()
        _hear(groups, reading)  # all that was said while the owner lived; see `announce`
        groups.kill()
    finally:
        os._exit(0)


def _detach(reading: int) -> None:
    """Leave the owner's session, and hold nothing of its own open but the pipe."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    for descriptor in [int(name) for name in os.listdir("/dev/fd")]:  # noqa: PTH208
        if descriptor > 2 and descriptor != reading:  # noqa: PLR2004
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _has_ended(reading: int, seconds: float) -> bool:
    """Wait until the pipe has ended, and tell whether it has.

    What comes in wakes nobody: it matters only when the owner is dead, and steps are to be fast.
    """
    poll = select.poll()
    poll.register(reading, 0)
    return bool(poll.poll(seconds * 1000))


def _hear(groups: Groups, reading: int) -> None:
    """Take all that has come in."""
    with contextlib.suppress(BlockingIOError):
        while data := os.read(reading, 1 << 16):
            groups.take(data)
