"""The zygote: a copy of the owner that forks the processes of its steps.

    owner   -- fork ------------------------------------>  zygote
            -- a byte for each process that is wanted -->     |  -- fork -->  process of a step
            <-- its pid, and the owner's end of its pipe ---  |
            <-- the pid of one that ended, and how ---------  |

A fork costs most of what a step costs, and more than the call of it shows: after it, the owner
pays again for each page of its memory that it writes to, a thousand of them in each pass. So the
owner forks once, and the copy, which does little else, forks for it, while steps run.

The processes know what the owner knew when the zygote was forked.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import os
import select
import selectors
import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from eventor.steps import keeper, task
from eventor.steps.fork import unwarned
from eventor.steps.output import flush
from eventor.steps.signals import blocked
from eventor.storage.owner import is_running, process_of

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


Begin = Callable[[Callable[..., None], socket.socket, frozenset[int]], Any]
"""Starts a process: with its target, its end of its pipe, and the signals that it blocks."""

_Begin = Callable[[Callable[..., None], socket.socket], Any]

_RECORD = struct.Struct("=cii")
_BORN = b"+"
_ENDED = b"-"
_UNBORN = b"!"
_RECORDS_AT_ONCE = 400

_LOOK_SECONDS = 1.0
"""How often all processes are looked at, should a descendant of one hold its sentinel open."""

_CLOSING_SECONDS = 1.0
_SOON_SECONDS = 0.002
"""For how long, and how often, those are looked at that have closed their sentinel."""

_BIRTH_SECONDS = 1.0
"""How long the owner waits for a process before it forks one by itself."""


Birth = tuple["Offspring", socket.socket]
"""A process that a zygote has forked, and the owner's end of its pipe."""


class Offspring:
    """A process that a zygote has forked, as the owner holds it: a Process without a sentinel."""

    sentinel = None

    def __init__(self, pid: int, zygote: Zygote) -> None:
        self.pid = pid
        self.name = ""
        self.exitcode: int | None = None
        self._zygote = zygote

    def is_alive(self) -> bool:
        """Tell whether its end was not told yet; without the zygote, whether it is there."""
        if self.exitcode is not None:
            return False
        return not self._zygote.lost or bool(is_running(process_of(self.pid)))

    def join(self) -> None:
        """Do nothing: the zygote waits for it."""

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.exitcode is None:
            os.kill(self.pid, number)
            self._zygote.wake()


class Zygote:
    """The owner's hold on its zygote.

    Args:
        begin: is called in the zygote.
        pipe: the keeper's, by which the zygote announces itself.

    Attributes:
        lost: whether it has died, or was ended.

    Raises:
        OSError: it cannot be forked.
    """

    def __init__(self, begin: Begin, pipe: Connection) -> None:
        self.lost = False
        self.asked = 0
        """How many processes were asked for, and are neither born nor refused yet."""
        self.refused = False
        """Whether it could not fork what it was asked for, or that could not be taken over."""
        self._offspring: dict[int, Offspring] = {}
        owner = os.getpid()
        self._control, its = task.pipe()
        flush()  # or what is not yet written would be written by both
        try:
            with unwarned(), blocked(signal.valid_signals()) as before:
                self.pid = os.fork()
                if self.pid == 0:
                    self._control.close()
                    _live(its, lambda target, end: begin(target, end, before), pipe, owner)
        except BaseException:
            self._control.close()
            raise
        finally:
            its.close()

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._control.fileno()

    def ask(self, number: int) -> None:
        """Ask for so many processes, which `hear` returns once they are there."""
        with contextlib.suppress(OSError):
            self._control.sendall(bytes(number))
            self.asked += number

    def bear(self) -> bool:
        """Wait until one that was asked for may be there; tell whether that came in time."""
        if not self.asked:
            self.ask(1)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        return bool(poll.poll(_BIRTH_SECONDS * 1000))

    def hear(self) -> tuple[list[Birth], list[int]]:
        """Return the processes that are new, and the pids of those that have ended."""
        try:
            data, ends, flags, _address = socket.recv_fds(
                self._control, _RECORD.size * _RECORDS_AT_ONCE, 1, socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return [], []
        except OSError:
            data, ends, flags = b"", [], 0
        if not data:
            self.lost = True
            self.asked = 0
        born, ended = [], []
        for what, pid, code in _RECORD.iter_unpack(data):
            if what == _ENDED:
                if (offspring := self._offspring.pop(pid, None)) is not None:
                    offspring.exitcode = code
                    ended.append(pid)
                continue
            self.asked -= 1
            if what == _UNBORN or not ends or flags & socket.MSG_CTRUNC:
                # Where no descriptor was left for its pipe, it finds that ended, and ends.
                self.refused = True
                continue
            offspring = self._offspring[pid] = Offspring(pid, self)
            end = ends.pop()
            os.set_inheritable(end, False)
            pipe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=end)
            pipe.settimeout(None)
            born.append((offspring, pipe))
        return born, ended

    def wake(self) -> None:
        """Let it go on, should something have stopped it: it alone learns how processes end."""
        if not self.lost:
            self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        if not self.lost:
            self._signal(signal.SIGKILL)
        self.lost = True
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self._control.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.pid, number)


def _live(control: socket.socket, begin: _Begin, pipe: Connection, owner: int) -> NoReturn:
    """Be the zygote; its signals stay blocked, so it ends with its owner or by a kill alone."""
    try:
        os.setsid()
        keeper.announce(pipe)
        # The owner's garbage is none of theirs to look for, which would write to all their memory.
        gc.freeze()
        if os.getppid() == owner:
            _Brood(control, begin).serve()
    finally:
        os._exit(0)


class _Brood:
    """What a zygote has forked, in the zygote."""

    def __init__(self, control: socket.socket, begin: _Begin) -> None:
        self._control = control
        self._begin = begin
        self._forward = task.settle()
        # If the program lets the system reap its children, this process has to learn of them still.
        self._ignores_ends = signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
        if self._ignores_ends:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._processes: dict[int, Any] = {}
        self._closing: dict[int, float] = {}
        self._look_at = time.monotonic() + _LOOK_SECONDS
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def serve(self) -> None:
        """Fork what the owner asks for, and tell it what has ended, until it is gone."""
        while True:
            for key, _events in self._selector.select(self._seconds_to_wait()):
                if key.data is not None:
                    self._look(key.data, closed=True)
                elif wanted := self._control.recv(1 << 10):
                    for _ in wanted:
                        self._fork()
                else:
                    return
            for pid in tuple(self._closing):
                self._look(pid)
            if time.monotonic() >= self._look_at:
                self._look_at = time.monotonic() + _LOOK_SECONDS
                for pid in tuple(self._processes):
                    self._look(pid)

    def _seconds_to_wait(self) -> float:
        return _SOON_SECONDS if self._closing else _LOOK_SECONDS

    def _fork(self) -> None:
        try:
            mine, its = task.pipe()
            with its, contextlib.ExitStack() as unborn:
                unborn.callback(mine.close)
                process = self._begin(functools.partial(self._leave, mine), its)
                unborn.pop_all()
        except Exception:
            # The owner then begins it by itself, and tells what is wrong.
            self._control.sendall(_RECORD.pack(_UNBORN, 0, 0))
            return
        with mine:
            self._processes[process.pid] = process
            self._selector.register(process.sentinel, selectors.EVENT_READ, process.pid)
            record = _RECORD.pack(_BORN, process.pid, 0)
            socket.send_fds(self._control, [record], [mine.fileno()])

    def _look(self, pid: int, *, closed: bool = False) -> None:
        """Tell of a process that has ended; one that has closed its sentinel is about to."""
        process = self._processes[pid]
        if process.is_alive():
            if closed:
                self._selector.unregister(process.sentinel)
                self._closing[pid] = time.monotonic() + _CLOSING_SECONDS
            elif time.monotonic() > self._closing.get(pid, math.inf):
                del self._closing[pid]  # as daemons do: it goes on
            return
        if process.sentinel in self._selector.get_map():
            self._selector.unregister(process.sentinel)
        self._closing.pop(pid, None)
        del self._processes[pid]
        self._control.sendall(_RECORD.pack(_ENDED, pid, process.exitcode))
        process.close()

    def _leave(
        self, mine: socket.socket, job: task.Job, its: socket.socket, origin: task.Origin
    ) -> None:
        """Be a worker, and hold nothing by which the end of another would not be seen."""
        self._control.close()
        mine.close()
        if self._ignores_ends:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        task.work(job, task.Channel(its), origin, self._forward)
