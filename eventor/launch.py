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
from multiprocessing import Pipe, resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventor import task
from eventor.errors import LaunchError
from eventor.fork import unwarned, warn_of_threads
from eventor.keeper import Keeper, kill_sessions
from eventor.owner import process_of
from eventor.plan import TaskEnded, TaskKey
from eventor.signals import TAKEN, blocked
from eventor.types import Outcome, failure

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from eventor.flow import Step

GRACE_SECONDS = 5.0
"""How long a process may linger after its step has returned, and after it was told to end."""

_CLOSING_SECONDS = 1.0
"""How long a process may take to end once it has closed its pipe, which takes microseconds."""

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
        self._process = process
        self._inlet = task.Inlet(connection)
        self._sentinel: int | None = getattr(process, "sentinel", None)
        self.pid: int = process.pid if self.is_process else os.getpid()
        """The process in which it runs; a thread's is the owner's."""
        self._returned_at: float | None = None
        self._closed_at: float | None = None
        self._told: int | None = None

    @property
    def is_process(self) -> bool:
        """Whether it is a process of its own, which can be ended, and no thread of the owner."""
        return self._sentinel is not None

    def signals(self) -> list[Any]:
        """Return what becomes ready when there is something to hear.

        A process closes its pipe when it ends. One that has closed it and does not end has closed
        its sentinel too, as daemons do: that would be ready all the time, so it is let alone.
        """
        sentinel = [] if self._sentinel is None else [self._sentinel]
        if self._closed_at is None:
            return [self._inlet, *sentinel]
        return sentinel if time.monotonic() < self._closed_at + _CLOSING_SECONDS else []

    def hear(self) -> tuple[list[task.Message], bool]:
        """Return what has come in, and whether nothing more will come."""
        # In this order: what a worker has sent before it was seen dead is then read for sure.
        dead = not self._process.is_alive() or self._is_reaped()
        messages = self._inlet.read()
        if any(isinstance(message, Outcome) for message in messages):
            self._returned_at = time.monotonic()
        if self._inlet.ended and self._closed_at is None:
            self._closed_at = time.monotonic()
        return messages, dead or (self._inlet.ended and not self.is_process)

    def silent_end(self) -> Outcome | None:
        """Return the outcome of one that ended, None if it has sent it itself."""
        if self._returned_at is not None:
            return None
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
            self._end_alone(number)

    def hurry(self) -> bool:
        """End it if it goes on for too long after its step has returned; what it has left stays.

        Returns:
            Whether it had not been told before.
        """
        if self._returned_at is None or not self.is_process:
            return False
        late = time.monotonic() - self._returned_at
        if late < GRACE_SECONDS:
            return False
        number = signal.SIGTERM if late < 2 * GRACE_SECONDS else signal.SIGKILL
        if number == self._told:
            return False
        first, self._told = self._told is None, number
        self._end_alone(number)
        return first

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

    def _end_alone(self, number: int) -> None:
        with contextlib.suppress(OSError):
            (self._process.kill if number == signal.SIGKILL else self._process.terminate)()

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
        self._workers: dict[Worker, None] = {}
        self._process = process_of(os.getpid())
        self._keeper: Keeper | None = None
        self._abandoned = False

    @property
    def busy(self) -> bool:
        """Whether any of its workers has not ended yet."""
        return bool(self._workers)

    def prepare(self) -> int | None:
        """Make sure that no process outlives this one; to be called before any is recorded.

        Returns:
            The pid of the keeper, or None for threads, which need none.

        Raises:
            LaunchError: the keeper cannot be started.
            RuntimeWarning: where warnings are errors, and a fork would be beside other threads.
        """
        if issubclass(self._construct, threading.Thread):
            return None
        try:
            if self._keeper is None:
                if _forks(self._construct):
                    warn_of_threads()
                else:
                    # Else the first worker starts its server, which would let all signals through.
                    resource_tracker.ensure_running()
                self._keeper = Keeper()
            return self._keeper.ensure(worker.pid for worker in self._workers)
        except OSError as error:
            raise LaunchError(f"no process can be started to keep the steps: {error}") from error

    def start(self, key: TaskKey, step: Step) -> int | Outcome:
        """Start a worker for a task; return its pid, or how it failed to start."""
        call = task.Call(step.name, key.sequence, step.func, step.args, step.kwargs)
        with contextlib.ExitStack() as opened:
            try:
                reading, writing = Pipe(duplex=False)
                opened.callback(reading.close)
                opened.callback(writing.close)
                process = self._begin(call, writing, str(key))
            except Exception as error:
                return failure(f"it could not be started: {task.describe(error)}")
            opened.pop_all()
        worker = Worker(key, process, reading)
        if worker.is_process:
            writing.close()
        self._workers[worker] = None
        return worker.pid

    def wait(self, bell: list[Any], seconds: float) -> None:
        """Wait until there is something to collect, or the bell rings, or the time is over."""
        wait([*bell, *(signal for worker in self._workers for signal in worker.signals())], seconds)

    def collect(self) -> list[TaskEnded]:
        """Return the ends that have come in, and pass on the log records."""
        ends = []
        for worker in tuple(self._workers):
            messages, gone = worker.hear()
            for message in messages:
                if isinstance(message, Outcome):
                    ends.append(TaskEnded(worker.key, message))
                else:
                    self._on_record(logging.makeLogRecord(message))
            if gone:
                if (silent := worker.silent_end()) is not None:
                    ends.append(TaskEnded(worker.key, silent))
                self._dismiss(worker)
        return ends

    def hurry(self) -> list[TaskKey]:
        """End processes that go on long after their steps have returned; return those told now."""
        return [worker.key for worker in self._workers if worker.hurry()]

    def abandon(self) -> None:
        """End all processes and what they started, by force if need be; threads cannot be ended."""
        self._workers = {worker: None for worker in self._workers if worker.is_process}
        self._abandoned = True
        leaders = [worker.pid for worker in self._workers]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for worker in self._workers:
                worker.end(number)
            self._await_ends(GRACE_SECONDS)
        kill_sessions(leaders)

    def close(self) -> None:
        """Let go of the keeper, and of workers that could not be ended in time."""
        for worker in self._workers:
            if worker.is_process:
                worker.end(signal.SIGKILL)
        if self._keeper is not None:
            self._keeper.close(kill=self._abandoned)
            self._keeper = None

    def _begin(self, call: task.Call, writing: Connection, name: str) -> Any:
        """Start a process or thread, whose own the writing end of the pipe is from then on."""
        # Blocked, so that a Ctrl-C finds the new process in its own group, or not at all.
        with blocked(TAKEN) as before, unwarned():
            origin = task.Origin(
                self._process,
                task.LogLevels.of_this_process(),
                before,
                None if self._keeper is None else self._keeper.pipe,
            )
            process = self._construct(target=task.main, args=(call, writing, origin), name=name)
            process.start()
        return process

    def _dismiss(self, worker: Worker) -> None:
        del self._workers[worker]
        if worker.is_process:
            if self._abandoned:
                worker.end_rest()
            if self._keeper is not None:
                self._keeper.forget(worker.pid)
        worker.release()

    def _await_ends(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._workers and (left := deadline - time.monotonic()) > 0:
            self.wait([], min(left, 1))
            self.collect()


def _forks(construct: type[Any]) -> bool:
    method = getattr(construct, "_start_method", None) or multiprocessing.get_start_method()
    return bool(method == "fork")
