"""The owner's hold on one worker: a process or thread that runs steps.

A worker is any Process-like object: `multiprocessing` processes of any context, and threads.
Its pipe and its sentinel are waited on together. Whoever ends has first written its outcome,
so a worker that is found dead is read once more before it is given up.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from typing import TYPE_CHECKING, Any

from eventor.rules.config import is_process
from eventor.steps import task
from eventor.steps.signals import name_of
from eventor.types import Outcome, failure, timed_out

if TYPE_CHECKING:
    import socket

    from eventor.rules.config import StepConfig
    from eventor.rules.plan import TaskKey
    from eventor.steps.output import Output

GRACE_SECONDS = 5.0
"""How long a process may linger after its step has returned, and after it was told to end."""

_EMPTY_SECONDS = 0.02
"""How often is looked whether a group is empty whose leader has died."""

_CLOSING_SECONDS = 1.0
"""How long a process may take to end once it has closed its pipe, which takes microseconds."""


class Worker:
    """A started process or thread, and what has come from it.

    Args:
        process: the process or thread.
        connection: the owner's end of its pipe.
        most: how many tasks it does before it ends; None is no limit.
        knows: how many steps and events were defined when it was started.
        key: its first task, if it has one by now.

    Attributes:
        key: the task that it does, None while it has none.
        did: the task that it was given last.
        late_end: how that ends if it takes for longer than it may; None is no limit.
        due: when it is to be looked at for that, by `time.monotonic`.
        is_late: whether it took longer, and what it says of its task counts no more.
        outputs: what its task writes, where that is captured.
    """

    def __init__(
        self,
        process: Any,
        connection: socket.socket,
        most: int | None,
        knows: int,
        key: TaskKey | None,
    ) -> None:
        self.key = self.did = key
        self.knows = knows
        self.late_end: Outcome | None = None
        self.due = math.inf
        self.is_late = False
        self.outputs: tuple[Output, ...] = ()
        self.inlet = task.Inlet(connection)
        self.sentinel: int | None = getattr(process, "sentinel", None)
        self.is_process = is_process(process)
        """Whether it is a process of its own, which can be ended, and no thread of the owner."""
        self.pid: int = process.pid if self.is_process else os.getpid()
        """The process in which it runs; a thread's is the owner's."""
        self._process = process
        self._left = most
        self._ends_since: float | None = None
        self._ready_since: float | None = None
        self._told: int | None = None
        self._kill_at = math.inf

    @property
    def is_free(self) -> bool:
        """Whether it waits for a task."""
        return self.key is None and self._ends_since is None and not self.inlet.lost

    @property
    def is_ending(self) -> bool:
        """Whether it has no more to do than to end."""
        return self._ends_since is not None

    def order(self, key: TaskKey, order: task.Order) -> None:
        """Give a task to one that is free.

        Raises:
            OSError: it has died.
            EventorError: something of a call cannot be pickled; the message names it.
        """
        self.inlet.send(task.packed(order))
        self.key = self.did = key
        self._process.name = str(key)

    def dismiss(self) -> None:
        """Let one that is free end; one that has done nothing has nothing to put in order."""
        self._ends_since = time.monotonic()
        if self.did is not None:
            with contextlib.suppress(OSError):
                self.inlet.send(task.packed(None))
        else:
            self._end_alone(signal.SIGKILL)

    def hear(self) -> tuple[list[task.Message], bool]:
        """Return what has come in, and whether nothing more will come."""
        # In this order: what a worker has sent before it was seen dead is then read for sure.
        dead = not self._process.is_alive() or self._is_reaped()
        messages = self.inlet.read()
        if any(isinstance(message, Outcome) for message in messages):
            self._count_task()
        return messages, dead or (self.inlet.ended and not self.is_process)

    def is_deaf(self) -> bool:
        """Tell whether its sentinel was found ready for a while, though it lives.

        A process closes it when it ends. One that has closed it and does not end, as daemons do,
        would be ready all the time.
        """
        now = time.monotonic()
        if self._ready_since is None:
            self._ready_since = now
        return now >= self._ready_since + _CLOSING_SECONDS

    def silent_end(self) -> Outcome | None:
        """Return the outcome of one that ended in the middle of its task, None if it had none."""
        if self.key is None:
            return None
        if self.inlet.garbled:
            return failure("what came through its pipe was not sent by eventor")
        code = getattr(self._process, "exitcode", None)
        if code is not None and code < 0:
            return failure(f"killed by {name_of(-code)}")
        if not self.is_process:
            told = "its thread ended"
        elif code is None:
            told = "its process ended, with an exit code that something else has waited for,"
        else:
            told = f"its process ended with exit code {code}"
        return failure(f"{told} before it said how the step ended")

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
        if self._ends_since is None or not self.is_process:
            return False
        late = time.monotonic() - self._ends_since
        if late < GRACE_SECONDS:
            return False
        number = signal.SIGTERM if late < 2 * GRACE_SECONDS else signal.SIGKILL
        if number == self._told:
            return False
        first, self._told = self._told is None, number
        self._end_alone(number)
        return first

    def limit(self, config: StepConfig) -> None:
        """Give it the time for its task that the step's config tells, from now on."""
        if config.timeout is not None:
            self.late_end = timed_out(config.timeout, retriable=config.retries(TimeoutError))
            self.due = time.monotonic() + config.timeout

    def end_late(self) -> None:
        """End its group, since its task has run for too long: by SIGTERM, then by SIGKILL."""
        now = time.monotonic()
        if not self.is_late:
            self.is_late = True
            self.due = self._kill_at = now + GRACE_SECONDS
            self.end(signal.SIGTERM)
            self.end(signal.SIGCONT)  # one that is stopped takes no other signal
        else:
            self.due = math.inf
            self.end(signal.SIGKILL)

    def has_late_rest(self) -> bool:
        """Tell whether what a late one has started has time to end yet, now that it is dead."""
        now = time.monotonic()
        self.due = min(self._kill_at, now + _EMPTY_SECONDS)
        try:
            os.killpg(self.pid, 0)
        except OSError:
            return False
        return now < self._kill_at

    def end_rest(self) -> None:
        """Kill what it has started, now that it is dead itself."""
        with contextlib.suppress(OSError):
            os.killpg(self.pid, signal.SIGKILL)

    def release(self) -> None:
        """Free what it holds here, once it is dead."""
        self._process.join()
        self.inlet.close()
        if hasattr(self._process, "close"):
            with contextlib.suppress(ValueError):  # it takes one that was reaped for running
                self._process.close()

    def _count_task(self) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                self._ends_since = time.monotonic()

    def _end_alone(self, number: int) -> None:
        with contextlib.suppress(OSError):
            (self._process.kill if number == signal.SIGKILL else self._process.terminate)()

    def _is_reaped(self) -> bool:
        """Whether something else in this program has waited for it; it then never seems dead."""
        if self.sentinel is None:
            return False
        try:
            os.kill(self.pid, 0)
        except OSError as error:
            return isinstance(error, ProcessLookupError)
        return False
