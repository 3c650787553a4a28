"""The loop of eventor. One pass:

    inbox    what has come in: the ends of workers, triggers
    plan     the changes that follow, from pure rules
    commit   one transaction writes them all
    launch   start what the commit made active
    wait     until something comes in, at most `sleep_between_loops`

Nothing is launched, and nothing is said, that is not recorded.
"""  # noqa: D415 (a picture comes before the words)

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

from eventor.launch import Launcher
from eventor.plan import TaskActive, TaskEnded, TaskLaunched, Trigger
from eventor.types import Outcome, TaskStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from eventor.flow import Flow
    from eventor.logs import Journal
    from eventor.plan import Change, Plan
    from eventor.store import Ledger

_LONGEST_WAIT = 1.0
"""Seconds; processes are looked at this often, should a descendant hold their sentinel open."""

_SHORTEST_WAIT = 0.01
"""Seconds; a `sleep_between_loops` of 0 must not keep a core busy."""

_BEATS_PER_LEASE = 3

_UNWRITTEN_WAIT = 0.05
"""Seconds that a pid waits to be written with something else."""


class Inbox:
    """Triggers that wait for the loop; any thread may add one."""

    def __init__(self) -> None:
        self._triggers: deque[Trigger] = deque()
        self._bell: int | None = None

    def __len__(self) -> int:
        return len(self._triggers)

    def put(self, trigger: Trigger) -> None:
        """Add a trigger, and wake the loop."""
        self._triggers.append(trigger)
        bell = self._bell
        if bell is not None:
            with contextlib.suppress(BlockingIOError):
                os.write(bell, b"!")

    def take(self) -> list[Trigger]:
        """Take out all that is there."""
        return [self._triggers.popleft() for _ in range(len(self._triggers))]

    @contextlib.contextmanager
    def listening(self) -> Iterator[int]:
        """Give a descriptor that becomes readable when a trigger is added."""
        reading, self._bell = os.pipe()
        ringing = self._bell
        os.set_blocking(reading, False)
        os.set_blocking(ringing, False)
        try:
            yield reading
        finally:
            self._bell = None
            os.close(ringing)
            os.close(reading)


class Loop:
    """Passes over one recovery until there is nothing to do.

    Args:
        flow: the definitions.
        plan: the state, and the rules.
        ledger: where every change is written.
        journal: where it is said.
        inbox: where triggers come in.
        construct: the class of the workers.
        sleep: seconds, the longest wait between two passes.
        lease: seconds, the longest time in which nothing is written.
    """

    def __init__(
        self,
        flow: Flow,
        plan: Plan,
        ledger: Ledger,
        journal: Journal,
        inbox: Inbox,
        construct: Callable[..., Any],
        sleep: float,
        lease: float,
    ) -> None:
        self._flow = flow
        self._plan = plan
        self._ledger = ledger
        self._journal = journal
        self._inbox = inbox
        self._launcher = Launcher(construct, journal.pass_on)
        self._beat = timedelta(seconds=lease / _BEATS_PER_LEASE)
        self._heard_of = datetime.min.replace(tzinfo=UTC)
        longest = min(sleep, _LONGEST_WAIT, self._beat.total_seconds())
        self._sleep = max(_SHORTEST_WAIT, longest)
        self._unwritten: list[TaskLaunched] = []

    def run(self) -> None:
        """Pass until nothing runs and nothing may start.

        Raises:
            StoreError: something could not be recorded; what ran was ended.
            OwnershipError: another host has taken over; what ran was ended.
        """
        with self._inbox.listening() as bell:
            try:
                self._pass_until_idle(bell)
            except BaseException:
                self._launcher.abandon()
                raise
        for task in self._launcher.finish():
            message = f"Process of step {task} was ended: it went on after its step had returned"
            self._journal.say(logging.WARNING, message, "loop_session_start")

    def _pass_until_idle(self, bell: int) -> None:
        failed: list[TaskEnded] = []
        while True:
            ends = failed + self._launcher.collect()
            changes = self._plan.advance([*self._inbox.take(), *ends])
            self._commit(changes)
            self._report(changes)
            failed = self._launch(changes)
            if self._plan.idle and not self._inbox and not failed:
                return
            if not failed:
                wait(
                    [bell, *self._launcher.signals()],
                    min(self._sleep, _UNWRITTEN_WAIT) if self._unwritten else self._sleep,
                )
                with contextlib.suppress(BlockingIOError):
                    os.read(bell, 1 << 16)

    def _commit(self, changes: list[Change]) -> None:
        now = datetime.now(UTC)
        if changes or self._unwritten or not timedelta(0) <= now - self._heard_of < self._beat:
            self._ledger.record([*self._unwritten, *changes], now)
            self._unwritten = []
            self._heard_of = now

    def _report(self, changes: list[Change]) -> None:
        for change in changes:
            if isinstance(change, TaskEnded):
                self._report_end(change)
            else:
                self._journal.say(logging.DEBUG, repr(change), "loop_session_start")

    def _report_end(self, end: TaskEnded) -> None:
        outcome = end.outcome
        well = outcome.status is TaskStatus.success
        self._journal.say(
            logging.INFO if well else logging.ERROR,
            f"Step completed {end.task}, status: {outcome.status}, result {outcome.shown}",
            "task_wrapper",
            outcome.traceback,
        )
        if outcome.warning is not None:
            message = f"Step {end.task}: {outcome.warning}"
            self._journal.say(logging.WARNING, message, "task_wrapper")

    def _launch(self, changes: list[Change]) -> list[TaskEnded]:
        """Start what has become active; return what could not be started."""
        failed = []
        for change in changes:
            if isinstance(change, TaskActive):
                self._journal.say(logging.INFO, f"Running step {change.task}", "task_wrapper")
                begun = self._launcher.start(change.task, self._flow.steps[change.task.step])
                if isinstance(begun, Outcome):
                    failed.append(TaskEnded(change.task, begun))
                else:
                    self._unwritten.append(TaskLaunched(change.task, begun))
        return failed
