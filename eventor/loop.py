"""The loop of eventor. One pass:

    inbox    what has come in: triggers, the ends of steps, what other processes ask for
    plan     the changes that follow, from pure rules
    commit   one transaction writes them all
    launch   start what the commit made active
    wait     until something comes in, at most `sleep_between_loops`

Nothing is launched, and nothing is said, that is not recorded.
"""  # noqa: D415 (a picture comes before the words)

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
from collections import deque
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from eventor.requests import Requests
from eventor.rules.data import lacking
from eventor.rules.plan import (
    NEVER,
    TaskActive,
    TaskEnded,
    TaskLaunched,
    TaskRetried,
    TaskWithdrawn,
    Trigger,
)
from eventor.steps.task import describe
from eventor.types import Outcome, StoredResult, TaskStatus, failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from eventor.hooks import Announcer
    from eventor.logs import Journal
    from eventor.rules.flow import Flow, Step
    from eventor.rules.plan import Change, Plan, TaskKey
    from eventor.steps.task import Results
    from eventor.storage.ledger import Ledger

_LONGEST_WAIT = 1.0
"""Seconds; processes are looked at this often, should a descendant hold their sentinel open."""

_SHORTEST_WAIT = 0.01
"""Seconds; a `sleep_between_loops` of 0 must not keep a core busy."""

_BEATS_PER_LEASE = 3

_UNWRITTEN_WAIT = timedelta(seconds=0.05)
"""How long a pid waits to be written with something else."""


class Inbox:
    """What waits for the loop: triggers and requests to stop.

    Any thread may add to it, and so may a signal handler at any point of the main thread; hence a
    lock that the thread which holds it can take again.
    """

    def __init__(self) -> None:
        self._triggers: deque[Trigger] = deque()
        self._signals: list[int] = []
        self._stopped_by: str | None = None
        self._lock = threading.RLock()
        self._bell: int | None = None

    def __len__(self) -> int:
        return len(self._triggers)

    @property
    def stopped_by(self) -> str | None:
        """What has asked that nothing more is started, if anything has."""
        if self._signals:
            return signal.Signals(self._signals[0]).name
        return self._stopped_by

    @property
    def cut_by(self) -> str | None:
        """The signal that has asked for an end at once, if one has: the second."""
        return signal.Signals(self._signals[1]).name if len(self._signals) > 1 else None

    def put(self, *triggers: Trigger) -> None:
        """Add triggers, and wake the loop."""
        self._triggers.extend(triggers)
        self._ring()

    def stop(self, by: str = "stop()") -> None:
        """Ask that nothing more is started."""
        self._stopped_by = by
        self._ring()

    def interrupt(self, number: int) -> None:
        """Ask by a signal: the first as `stop`, the second for an end at once."""
        self._signals.append(number)
        self._ring()

    def take(self) -> list[Trigger]:
        """Take out all triggers that are there."""
        return [self._triggers.popleft() for _ in range(len(self._triggers))]

    def peek(self) -> list[Trigger]:
        """Return all triggers that are there, and leave them."""
        return list(self._triggers)

    def forget_signals(self) -> None:
        """Forget the signals: they have had their effect."""
        self._signals.clear()

    def forget_stop(self) -> None:
        """Forget the request to stop: it has been followed."""
        self._stopped_by = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[int]:
        """Give a descriptor that becomes readable when something is added."""
        reading, ringing = os.pipe()
        os.set_blocking(reading, False)
        os.set_blocking(ringing, False)
        self._bell = ringing
        try:
            yield reading
        finally:
            with self._lock:
                self._bell = None
                os.close(ringing)
            os.close(reading)

    def _ring(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._bell is not None:
                os.write(self._bell, b"!")


class Starter(Protocol):
    """What the loop needs of what starts the steps, such as a `Launcher` or a `Submitter`."""

    @property
    def busy(self) -> bool:
        """Whether anything that it has started has not ended yet."""

    def shows(self, *, patient: bool) -> bool:
        """Whether there is output of steps that nobody has taken yet, and that is waited for."""

    def prepare(self) -> int | None:
        """Be ready to start, before that is recorded; return the pid of the keeper, if any."""

    def start(
        self, key: TaskKey, step: Step, attempt: int, results: Results | None, /
    ) -> int | Outcome | None:
        """Start a task; return its pid, None where that comes later, or how it has failed."""

    @property
    def overran(self) -> bool:
        """Whether what runs may have been ended, since it was to go on until before now alone."""

    def allow_until(self, until: float, /) -> None:
        """Let what runs go on until then, by `lease.clock`, unless a later time is told."""

    def stock(self, wanted: int, /) -> None:
        """Do ahead what can be done for so many tasks that may start soon."""

    def renew(self) -> None:
        """Take it that the program may have changed since what was done ahead."""

    def finish(self) -> None:
        """Let go of what has nothing more to do."""

    def wait(self, bell: int | None, seconds: float, /) -> None:
        """Wait until there is something to collect, or the bell rings, or the time is over."""

    def collect(self) -> Sequence[Trigger | TaskEnded | TaskLaunched]:
        """Return what has come in."""

    def hurry(self) -> list[TaskKey]:
        """End what goes on for too long after its step; return the tasks of those told now."""

    def withdraw(self) -> list[TaskKey]:
        """Let nothing begin that has not yet; return the tasks of that, which are its no more."""

    def abandon(self, until: float = math.inf, /) -> None:
        """End all that can be ended, until a time by `lease.clock` at the latest."""


class Loop:
    """Passes over one recovery until there is nothing to do.

    Args:
        flow: the definitions.
        plan: the state, and the rules.
        ledger: where every change is written.
        journal: where it is said.
        announcer: tells the program's hooks of it.
        inbox: where triggers and requests to stop come in.
        launcher: what starts the steps, and hears of their triggers and ends; whoever made it
            closes it.
        sleep: seconds, the longest wait between two passes, and between two looks at what other
            processes ask for; those are no more frequent either.
        lease: seconds, the longest time in which nothing is written.
        linger: seconds for which it waits for triggers when there is nothing to do.
        clock: gives the time, in UTC.
        watch: is called before each wait, and returns the seconds after which it is to be again.
    """

    def __init__(
        self,
        flow: Flow,
        plan: Plan,
        ledger: Ledger,
        journal: Journal,
        announcer: Announcer,
        inbox: Inbox,
        launcher: Starter,
        sleep: float,
        lease: float,
        linger: float,
        clock: Callable[[], datetime],
        watch: Callable[[], float],
    ) -> None:
        self._flow = flow
        self._plan = plan
        self._ledger = ledger
        self._journal = journal
        self._announcer = announcer
        self._inbox = inbox
        self._launcher = launcher
        self._clock = clock
        self._watch = watch
        self._beat = timedelta(seconds=lease / _BEATS_PER_LEASE)
        self._heard_of = NEVER
        longest = min(sleep, _LONGEST_WAIT, self._beat.total_seconds())
        self._sleep = max(_SHORTEST_WAIT, longest)
        self._requests = Requests(flow, ledger, max(_SHORTEST_WAIT, sleep))
        self._linger = linger
        self._active_at = clock()
        self._unwritten: list[TaskLaunched] = []
        self._unwritten_until = self._heard_of
        self.paused = False
        """Whether it ended since it had launched as often as it was to."""

    def run(self, max_loops: int | None = None) -> bool:
        """Pass until nothing runs and nothing may start, and nothing more is waited for.

        Args:
            max_loops: how many passes may launch something; None is no limit.

        Returns:
            Whether that came by itself or by a request to stop; False if what ran was ended
            by a second signal, and stays recorded as active.

        Raises:
            StoreError: something could not be recorded; what ran was ended.
            OwnershipError: another host has taken over; what ran was ended.
        """
        try:
            with self._inbox.listening() as bell:
                whole = self._pass_until_idle(bell, max_loops)
            if not whole:
                self._launcher.abandon()
                return self._plan.idle
        except BaseException:
            self._launcher.abandon(self._ledger.steps_until)
            raise
        return True

    def _pass_until_idle(self, bell: int, max_loops: int | None) -> bool:
        failed: list[TaskEnded] = []
        launches = 0
        while True:
            now = self._clock()
            changes = self._decide(failed, now)
            try:
                failed = self._launch(changes)
            finally:  # they are recorded, whatever becomes of what they launch
                self._announcer.tell(changes, now)
            self._report(changes)
            if max_loops is not None and any(isinstance(one, TaskActive) for one in changes):
                launches += 1
                if launches == max_loops:
                    self.paused = True
                    self._plan.stop()
            self._hurry()
            if self._inbox.cut_by is not None:
                return False
            if self._is_done(failed, now):
                if self._requests.look_last(changes):
                    return True
            elif not failed:
                self._launcher.stock(self._plan.about_to_start)
                self._launcher.wait(bell, min(self._watch(), self._seconds_to_wait()))
                with contextlib.suppress(BlockingIOError):
                    os.read(bell, 1 << 16)

    def _decide(self, failed: list[TaskEnded], now: datetime) -> list[Change]:
        """Return what follows from what has come in, recorded."""
        if self._launcher.overran:
            # That says nothing of the steps, which may have been about to end well.
            raise self._ledger.overran(now)
        arrivals: list[Trigger | TaskEnded] = [*failed]
        for arrival in self._launcher.collect():
            if isinstance(arrival, TaskLaunched):
                self._note_launched(arrival)
            else:
                arrivals.append(arrival)
        asked = self._requests.look(now)
        self._heed_request()
        triggers = self._inbox.take()
        changes = self._plan.advance([*triggers, *asked, *arrivals], now)
        # While steps run too: who kills the keeper must not have their owner's death go unseen.
        another = not self._plan.idle and self._ledger.kept_by(self._launcher.prepare())
        answered = self._requests.answer(changes)
        self._commit(changes, another or answered, now)
        if triggers:
            # Who triggers may have prepared something of which no earlier fork knows.
            self._launcher.renew()
        if changes or triggers or answered or not self._plan.idle:
            self._active_at = now
        return changes

    def _is_done(self, failed: list[TaskEnded], now: datetime) -> bool:
        if not self._plan.idle or self._inbox or failed or self._linger_left(now):
            return False
        self._launcher.finish()
        # A signal is not to wait for a reader of the program's output that may never read on.
        patient = self._inbox.stopped_by is None
        return not (self._launcher.busy or self._launcher.shows(patient=patient))

    def _seconds_to_wait(self) -> float:
        now = self._clock()
        seconds = [self._sleep]
        if (due := self._plan.next_due) is not None:
            seconds.append((due - now).total_seconds())
        if self._unwritten:
            seconds.append((self._unwritten_until - now).total_seconds())
        if linger := self._linger_left(now):
            seconds.append(linger)
        return max(0.0, min(*seconds, self._requests.seconds_left(now)))

    def _linger_left(self, now: datetime) -> float:
        """Return for how many seconds to wait for triggers yet, if there is nothing to do."""
        if not self._linger or self._plan.stopping or not self._plan.idle:
            return 0.0
        # A clock that is set back makes it begin anew, rather than last for so much longer.
        self._active_at = min(self._active_at, now)
        return max(0.0, self._linger - (now - self._active_at).total_seconds())

    def _hurry(self) -> None:
        for task in self._launcher.hurry():
            message = f"Process of step {task} was ended: it went on after its step returned"
            self._journal.say(logging.WARNING, message, "loop_session_start")

    def _heed_request(self) -> None:
        """Start nothing more once somebody has asked for it, and say so once."""
        process = self._requests.stopped_by
        if process is not None and self._inbox.stopped_by is None:
            self._inbox.stop(f"stop() of process {process}")
        reason = self._inbox.stopped_by
        if reason is None:
            return
        for task in self._launcher.withdraw():
            self._plan.withdraw(task)
        if self._plan.stopping:
            return
        self._plan.stop()
        if not self._plan.idle:
            message = f"Stopping by {reason}: the steps that run are waited for"
            self._journal.say(logging.WARNING, message, "loop_session_start")

    def _commit(self, changes: list[Change], noted: bool, now: datetime) -> None:
        due = changes or noted or (self._unwritten and now >= self._unwritten_until)
        if due or not timedelta(0) <= now - self._heard_of < self._beat:
            self._record([*self._unwritten, *changes], now)
            self._unwritten = []
            self._heard_of = now

    def _record(self, changes: list[Change], now: datetime) -> None:
        self._ledger.record(changes, now)
        self._launcher.allow_until(self._ledger.steps_until)

    def _report(self, changes: list[Change]) -> None:
        self._requests.report(self._journal)
        for change in changes:
            if isinstance(change, TaskEnded):
                self._report_end(change)
            elif isinstance(change, TaskActive):
                self._journal.say(logging.INFO, f"Running step {change.task}", "task_wrapper")
            elif isinstance(change, TaskRetried):
                self._report_retry(change)
            elif isinstance(change, TaskWithdrawn):
                message = f"Step {change.task} had not begun, and is ready again"
                self._journal.say(logging.INFO, message, "task_wrapper")
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

    def _report_retry(self, retry: TaskRetried) -> None:
        most = self._flow.steps[retry.task.step].config.max_attempts
        seconds = (retry.due - self._clock()).total_seconds()
        when = f"in {seconds:.1f} s" if seconds > 0 else "at once"
        self._journal.say(
            logging.WARNING,
            f"Step {retry.task} failed in attempt {retry.attempt} of {most}, "
            f"and is tried again {when}: {retry.outcome.shown}",
            "task_wrapper",
            retry.outcome.traceback,
        )

    def _launch(self, changes: list[Change]) -> list[TaskEnded]:
        """Start what has become active; return what could not be started."""
        failed = []
        for change in changes:
            if isinstance(change, TaskActive):
                if not self._ledger.is_trusted:
                    self._record([], self._clock())  # it may have been taken over
                begun = self._start(change)
                if isinstance(begun, Outcome):
                    failed.append(TaskEnded(change.task, begun))
                elif begun is not None:
                    self._note_launched(TaskLaunched(change.task, begun))
        return failed

    def _note_launched(self, launched: TaskLaunched) -> None:
        if not self._unwritten:
            self._unwritten_until = self._clock() + _UNWRITTEN_WAIT
        self._unwritten.append(launched)
        self._announcer.note(launched)

    def _start(self, change: TaskActive) -> int | Outcome | None:
        """Start a task with the results that it needs; return as `Starter.start` does."""
        task, step = change.task, self._flow.steps[change.task.step]
        if not step.has_placeholders:
            return self._launcher.start(task, step, change.attempt, None)
        results = {}
        for name, found in self._ledger.results(step.needs, task.sequence).items():
            if not isinstance(found, StoredResult):
                error = lacking(step.name, name, task.sequence, found)
                return failure(describe(error), retriable=False)
            results[name] = found
        return self._launcher.start(task, step, change.attempt, results)
