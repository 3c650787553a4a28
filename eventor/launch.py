"""The owner's side of a step's process: start it, hear it out, and learn of its end.

A worker is any Process-like object: `multiprocessing` processes of any context, and threads.
Its pipe and its sentinel are waited on together. Whoever ends has first written its outcome,
so a worker that is found dead is read once more before it is given up.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import warnings
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventor import task
from eventor.keeper import Keeper, unwarned
from eventor.plan import TaskEnded, TaskKey
from eventor.signals import TAKEN
from eventor.types import Outcome, failure

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from eventor.flow import Step

GRACE_SECONDS = 5.0
"""How long a process may linger after its step has returned, and after it was told to end."""

_DESCRIPTORS_PER_WORKER = 4
_SPARE_DESCRIPTORS = 64


def most_at_once() -> int:
    """Return how many workers the limit on open files allows, at least one."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    left = soft - len(list(Path("/dev/fd").iterdir())) - _SPARE_DESCRIPTORS
    return max(1, left // _DESCRIPTORS_PER_WORKER)


class Worker:
    """A started process or thread, and what has come from it."""

    def __init__(self, key: TaskKey, process: Any, connection: Connection) -> None:
        self.key = key
        self.heard = False
        """Whether its outcome has come in."""
        self._process = process
        self._inlet = task.Inlet(connection)
        self._sentinel: int | None = getattr(process, "sentinel", None)

    @property
    def pid(self) -> int:
        """The process in which it runs; a thread's is the owner's."""
        return self._process.pid if self.is_process else os.getpid()

    @property
    def is_process(self) -> bool:
        """Whether it is a process of its own, which can be ended, and no thread of the owner."""
        return self._sentinel is not None

    def signals(self) -> list[Any]:
        """Return what becomes ready when there is something to hear."""
        sentinel = [] if self._sentinel is None else [self._sentinel]
        return sentinel if self._inlet.ended else [self._inlet, *sentinel]

    def hear(self) -> tuple[list[task.Message], bool]:
        """Return what has come in, and whether nothing more will come."""
        # In this order: what a worker has sent before it was seen dead is then read for sure.
        dead = not self._process.is_alive() or self._is_reaped()
        messages = self._inlet.read()
        return messages, dead or (self._inlet.ended and not self.is_process)

    def silent_end(self) -> Outcome:
        """Return the outcome of one that ended without sending any."""
        if self._inlet.garbled:
            return failure("what came through its pipe was not sent by eventor")
        code = getattr(self._process, "exitcode", None)
        if code is not None and code < 0:
            return failure(f"killed by {_signal_name(-code)}")
        if not self.is_process:
            told = "its thread ended"
        elif code is None:
            told = "its process ended, with an exit code that something else has waited for,"
        else:
            told = f"its process ended with exit code {code}"
        return failure(f"{told} before the step returned")

    def end(self, number: int) -> None:
        """Send SIGTERM or SIGKILL to its group; to itself, where it does not lead one yet."""
        try:
            os.killpg(self.pid, number)
        except OSError:
            with contextlib.suppress(OSError):
                (self._process.kill if number == signal.SIGKILL else self._process.terminate)()

    def end_rest(self) -> None:
        """Kill what it has started, now that it is dead itself."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)

    def release(self) -> None:
        """Free what it holds here, once it is dead."""
        self._process.join()
        self._inlet.close()
        if hasattr(self._process, "close"):
            with contextlib.suppress(ValueError):  # it takes one that was reaped for running
                self._process.close()

    def _is_reaped(self) -> bool:
        """Whether something else in this program has waited for it; it then never seems dead."""
        if not self.is_process:
            return False
        try:
            os.kill(self.pid, 0)
        except OSError as error:
            return isinstance(error, ProcessLookupError)
        return False


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Launcher:
    """All workers of one call of `ev()`.

    Args:
        construct: the class of the workers.
        on_record: what handles the log records that they send.
    """

    def __init__(
        self, construct: type[Any], on_record: Callable[[logging.LogRecord], None]
    ) -> None:
        self._construct = construct
        self._on_record = on_record
        self._workers: list[Worker] = []
        self._keeper: Keeper | None = None
        self._abandoning = False

    def prepare(self) -> int | None:
        """Make sure that no process outlives this one; to be called before any is recorded.

        Returns:
            The pid of the keeper, or None for threads, which need none.

        Raises:
            OSError: the keeper cannot be started.
            RuntimeWarning: where warnings are errors, and a fork would be beside other threads.
        """
        if issubclass(self._construct, threading.Thread):
            return None
        if self._keeper is None:
            _warn_of_threads(self._construct)
            self._keeper = Keeper()
        return self._keeper.ensure(worker.pid for worker in self._workers)

    def start(self, key: TaskKey, step: Step) -> int | Outcome:
        """Start a worker for a task; return its pid, or how it failed to start."""
        reading, writing = Pipe(duplex=False)
        call = task.Call(step.name, key.sequence, step.func, step.args, step.kwargs)
        # Blocked, so that a Ctrl-C finds the new process in its own group, or not at all.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, TAKEN)
        origin = task.Origin(
            os.getpid(),
            task.LogLevels.of_this_process(),
            frozenset(map(int, blocked)),
            None if self._keeper is None else self._keeper.pipe,
        )
        try:
            with unwarned():
                process = self._construct(
                    target=task.main, args=(call, writing, origin), name=str(key)
                )
                process.start()
        except Exception as error:
            reading.close()
            writing.close()
            return failure(f"it could not be started: {task.describe(error)}")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        worker = Worker(key, process, reading)
        if worker.is_process:
            writing.close()
        self._workers.append(worker)
        return worker.pid

    def wait(self, bell: list[Any], seconds: float) -> None:
        """Wait until there is something to collect, or the bell rings, or the time is over."""
        wait([*bell, *(signal for worker in self._workers for signal in worker.signals())], seconds)

    def collect(self) -> list[TaskEnded]:
        """Return the ends that have come in, and pass on the log records."""
        ends = []
        lasting = []
        for worker in self._workers:
            messages, gone = worker.hear()
            for message in messages:
                if isinstance(message, Outcome):
                    worker.heard = True
                    ends.append(TaskEnded(worker.key, message))
                else:
                    self._on_record(logging.makeLogRecord(message))
            if not gone:
                lasting.append(worker)
                continue
            if not worker.heard:
                ends.append(TaskEnded(worker.key, worker.silent_end()))
            self._dismiss(worker)
        self._workers = lasting
        return ends

    def finish(self) -> list[TaskKey]:
        """Wait for workers whose outcome is in to end; return those that had to be ended."""
        self._await_ends(GRACE_SECONDS)
        late = [worker.key for worker in self._workers]
        self.abandon()
        return late

    def abandon(self) -> None:
        """End all processes and what they started, by force if need be; threads cannot be ended."""
        self._workers = [worker for worker in self._workers if worker.is_process]
        self._abandoning = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            for worker in self._workers:
                worker.end(number)
            self._await_ends(GRACE_SECONDS)
        self._abandoning = False

    def close(self) -> None:
        """Let go of the keeper; to be called when nothing runs any more."""
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None

    def _dismiss(self, worker: Worker) -> None:
        if worker.is_process:
            if self._abandoning:
                worker.end_rest()
            if self._keeper is not None:
                self._keeper.forget(worker.pid)
        worker.release()

    def _await_ends(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._workers and (left := deadline - time.monotonic()) > 0:
            self.wait([], min(left, 1))
            self.collect()


def _warn_of_threads(construct: type[Any]) -> None:
    """Warn of a fork beside other threads: a lock that one of them holds is never let go."""
    method = getattr(construct, "_start_method", None) or multiprocessing.get_start_method()
    others = threading.active_count() - 1
    if method == "fork" and others:
        message = (
            f"eventor is about to fork beside {others} other thread(s) of this program, and locks "
            "that they hold stay locked in the steps; call ev() before threads are started, or "
            "take a task_construct that does not fork, such as "
            "multiprocessing.get_context('spawn').Process"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=_depth_of_caller())


def _depth_of_caller() -> int:
    """Return the `stacklevel` at which the program stands that has called eventor."""
    here = str(Path(__file__).parent)
    depth, frame = 1, sys._getframe(1)  # noqa: SLF001 (warnings name their place by it)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        depth, frame = depth + 1, frame.f_back
    return depth
