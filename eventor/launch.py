"""The owner's side of a step's process: start it, hear it out, and learn of its end.

A worker is any Process-like object: `multiprocessing` processes of any context, and threads.
Its pipe and its sentinel are waited on together. Whoever ends has first written its outcome,
so a worker that is found dead is read once more before it is given up.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventor import task
from eventor.plan import TaskEnded, TaskKey
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
        dead = not self._process.is_alive()
        messages = self._inlet.read()
        return messages, dead or (self._inlet.ended and not self.is_process)

    def silent_end(self) -> Outcome:
        """Return the outcome of one that ended without sending any."""
        if self._inlet.garbled:
            return failure("what came through its pipe was not sent by eventor")
        code = getattr(self._process, "exitcode", None)
        if code is not None and code < 0:
            return failure(f"killed by {_signal_name(-code)}")
        told = "its thread ended" if code is None else f"its process ended with exit code {code}"
        return failure(f"{told} before the step returned")

    def end(self, how: str) -> None:
        """Call `terminate` or `kill` of a process."""
        with contextlib.suppress(OSError):
            getattr(self._process, how)()

    def release(self) -> None:
        """Free what it holds here, once it is dead."""
        self._process.join()
        self._inlet.close()
        if hasattr(self._process, "close"):
            self._process.close()


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
        self, construct: Callable[..., Any], on_record: Callable[[logging.LogRecord], None]
    ) -> None:
        self._construct = construct
        self._on_record = on_record
        self._workers: list[Worker] = []

    def start(self, key: TaskKey, step: Step) -> int | Outcome:
        """Start a worker for a task; return its pid, or how it failed to start."""
        reading, writing = Pipe(duplex=False)
        call = task.Call(step.name, key.sequence, step.func, step.args, step.kwargs)
        arguments = (call, writing, os.getpid(), task.LogLevels.of_this_process())
        process = None
        try:
            process = self._construct(target=task.main, args=arguments, name=str(key))
            process.start()
        except Exception as error:
            reading.close()
            writing.close()
            return failure(f"it could not be started: {task.describe(error)}")
        worker = Worker(key, process, reading)
        if worker.is_process:
            writing.close()
        self._workers.append(worker)
        return worker.pid

    def signals(self) -> list[Any]:
        """Return what becomes ready when there is something to collect."""
        return [signal for worker in self._workers for signal in worker.signals()]

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
            worker.release()
        self._workers = lasting
        return ends

    def finish(self) -> list[TaskKey]:
        """Wait for workers whose outcome is in to end; return those that had to be ended."""
        self._await_ends(GRACE_SECONDS)
        late = [worker.key for worker in self._workers]
        self.abandon()
        return late

    def abandon(self) -> None:
        """End all processes, by force if need be; threads cannot be ended."""
        self._workers = [worker for worker in self._workers if worker.is_process]
        for how in ("terminate", "kill"):
            for worker in self._workers:
                worker.end(how)
            self._await_ends(GRACE_SECONDS)

    def _await_ends(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._workers and (left := deadline - time.monotonic()) > 0:
            wait(self.signals(), min(left, 1))
            self.collect()
