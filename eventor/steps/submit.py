"""The submissions of one call of `ev()` to an executor of `concurrent.futures`.

    submitted   it waits in the executor, which may have less room than there are submissions
    begun       its worker has asked whether it may begin, and was told yes; it was told so once
    reported    its future is done; it is held until all has come in that the step has sent
    ended

What comes in from workers of other processes comes by lines (`line`), from threads by a call. The
futures tell of themselves in threads of the executor: they ring a pipe, on which `wait` waits too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import logging
import math
import os
import pickle
import reprlib
import secrets
import selectors
import signal
import threading
import time
from collections import deque
from concurrent.futures import BrokenExecutor, CancelledError, Executor, ThreadPoolExecutor
from concurrent.futures.process import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, cast

from eventor.errors import EventorError, LaunchError
from eventor.rules.config import is_executor, read_executor
from eventor.rules.plan import TaskEnded, TaskKey, TaskLaunched, Trigger, by_step
from eventor.steps import remote, task
from eventor.steps.fork import unwarned
from eventor.steps.line import Caller, Desk, MayBegin, Said, WhichEvents, hosts_of, own_hosts
from eventor.steps.signals import blocked
from eventor.storage.lease import clock
from eventor.storage.owner import process_of
from eventor.types import Outcome, StoredResult, failure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from eventor.rules.flow import Event, Step

_PATIENCE_SECONDS = 5.0
"""How long a report is held for what its step has sent before."""

_LOOK_SECONDS = 1.0

_LOST_SECONDS = 60.0
"""How long a report may come after the line of its worker has ended: where results go by files of a
network, others see a new one that late."""

_IDLE_SECONDS = 60.0
"""For how long an executor may begin nothing before that is warned of."""

Arrival = Trigger | TaskEnded | TaskLaunched


_CLOSED = "its executor was closed, as its client was"


class _ClosedError(BrokenExecutor):
    """An executor was closed, and may say nothing of what it was given."""

    def __init__(self) -> None:
        super().__init__(_CLOSED)


@dataclass(eq=False, slots=True)
class _Pool:
    """An executor.

    Attributes:
        executor: itself.
        has_begun: whether any step was told that it may begin in it.
        asks_nobody: whether any has run that could not ask.
    """

    executor: Executor
    has_begun: bool = False
    asks_nobody: bool = False

    @property
    def is_of_threads(self) -> bool:
        """Whether it runs calls in this process."""
        return isinstance(self.executor, ThreadPoolExecutor)

    @property
    def is_here(self) -> bool:
        """Whether it runs them in processes that it has started on this host."""
        modules = [kind.__module__.split(".") for kind in type(self.executor).__mro__]
        return isinstance(self.executor, ProcessPoolExecutor) or any(
            "loky" in names for names in modules
        )


@dataclass(eq=False, slots=True)
class _Submission:
    """A task that was submitted.

    Attributes:
        key: the task.
        call: what is called.
        pool: to which it was submitted.
        ticket: by which its worker asks; nobody else knows it.
        future: what the executor has given for it.
        has_begun: whether a worker was told that it may begin.
        is_placed: whether it was told in which process it runs.
        caller: who was told that it may begin, if that was by a line.
        is_asked_after: whether its executor was made to look after it, as its caller had ended.
        heard: how many of its messages have come in.
        report: what has come back.
        patient_until: for how long that is held, by `time.monotonic`.
    """

    key: TaskKey
    call: task.Call
    pool: _Pool
    ticket: int = field(default_factory=lambda: secrets.randbits(63))
    future: Future[Any] | None = None
    has_begun: bool = False
    is_placed: bool = False
    caller: Caller | None = None
    is_asked_after: bool = False
    heard: int = 0
    report: remote.Report | None = None
    patient_until: float = math.inf


class Submitter:
    """All submissions of one call of `ev()`.

    Args:
        construct: the executor, or what makes one.
        events: all events by name, which may grow meanwhile.
        run_id: the run whose steps are submitted.
        recovery: the recovery in that run.
        on_record: what handles the log records that come from workers.
        callback_host: where workers on other hosts reach this one; None is where they probably do.

    Raises:
        ConfigError: what was to make an executor has made something else.
        LaunchError: it has raised, or there is no port at which workers could reach this process,
            or no host of that name.
    """

    def __init__(
        self,
        construct: Executor | Callable[[], Executor],
        events: Mapping[str, Event],
        run_id: int,
        recovery: int,
        on_record: Callable[[logging.LogRecord], None],
        callback_host: str | None,
    ) -> None:
        given = construct if is_executor(construct) else None
        self._make = None if given else cast("Callable[[], Executor]", construct)
        self._events = events
        self._run_id = run_id
        self._recovery = recovery
        self._on_record = on_record
        self._callback_host = callback_host
        self._submissions: dict[int, _Submission] = {}
        self._held: dict[_Submission, None] = {}
        self._arrivals: list[Arrival] = []
        # What other threads say, and that futures are done.
        self._told: deque[Said | _Submission] = deque()
        self._lock = threading.RLock()
        self._admission = threading.Condition(self._lock)
        self._allowed_until = math.inf
        self._asked: list[tuple[Caller, MayBegin]] = []
        """Questions that wait until it is known whether the run is still the owner's."""
        self._is_void = False
        self._thread = threading.get_ident()
        self._ending: list[threading.Thread] = []
        self._bell: int | None = None
        self._look_at = 0.0
        self._idle_since = math.inf
        self._is_told_idle = False
        self._desk: Desk | None = None
        self._pool = _Pool(given) if given else None
        self._selector = selectors.DefaultSelector()
        self._reading, self._ringing = os.pipe()
        for end in (self._reading, self._ringing):
            os.set_blocking(end, False)
        self._selector.register(self._reading, selectors.EVENT_READ)
        try:
            pool = self._ready_pool()
            if not pool.is_of_threads:
                self._open_desk(pool)
        except BaseException:
            self.close()
            raise

    @property
    def _is_late(self) -> bool:
        """Whether somebody may have taken over the run by now."""
        return clock() > self._allowed_until

    @property
    def busy(self) -> bool:
        """Whether any submission has not ended yet."""
        return bool(self._submissions)

    def shows(self, *, patient: bool) -> bool:  # noqa: ARG002 (the loop's word)
        """Whether there is output to be shown: none of it comes through here."""
        return False

    def prepare(self) -> int | None:
        """Return the pid of a keeper: there is none, for no process here is eventor's."""
        return None

    @property
    def overran(self) -> bool:
        """Whether what runs may have been ended: nothing of an executor's is."""
        return False

    def allow_until(self, until: float) -> None:
        """Let steps begin until then, by `lease.clock`; what has begun cannot be ended."""
        with self._admission:
            self._allowed_until = until
            self._admission.notify_all()
        if self._is_late:
            return
        asked, self._asked = self._asked, []
        for caller, question in asked:
            self._answer(caller, question)

    def stock(self, wanted: int) -> None:
        """Do nothing ahead: the executor has its own ways."""

    def renew(self) -> None:
        """Do nothing: each call goes with all that it needs."""

    def finish(self) -> None:
        """Do nothing: the workers are the executor's."""

    def hurry(self) -> list[TaskKey]:
        """End nothing: the workers are the executor's."""
        return []

    def start(
        self, key: TaskKey, step: Step, attempt: int, results: task.Results | None
    ) -> int | Outcome | None:
        """Submit a task.

        Args:
            key: the task.
            step: its step.
            attempt: how many times it has been started, this time included.
            results: what placeholders in its arguments stand for; None if there are none.

        Returns:
            The pid of its process, None where that is not known yet, or how it failed to start.
        """
        return self._submit(key, task.ByName(step.name, key.sequence, attempt, results).of(step))

    def wait(self, bell: int | None, seconds: float) -> None:
        """Wait until there is something to collect, or the bell rings, or the time is over."""
        if bell != self._bell:
            if self._bell is not None:
                self._selector.unregister(self._bell)
            if bell is not None:
                self._selector.register(bell, selectors.EVENT_READ)
            self._bell = bell
        now = time.monotonic()
        due = min((held.patient_until for held in self._held), default=math.inf)
        for key, _events in self._selector.select(min(seconds, max(0.0, due - now))):
            if isinstance(key.data, Desk):
                self._admit(key.data)
            elif isinstance(key.data, Caller):
                self._hear(key.data)
            elif key.fd == self._reading:
                os.read(self._reading, 1 << 16)
        if now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            self._look()

    def collect(self) -> list[Arrival]:
        """Return the triggers, processes and ends that have come in; pass on the log records."""
        while self._told:
            told = self._told.popleft()
            if isinstance(told, _Submission):
                self._take_back(told)
            else:
                self._take(told)
        for submission in list(self._held):
            self._let_go(submission)
        arrivals, self._arrivals = self._arrivals, []
        return arrivals

    def withdraw(self) -> list[TaskKey]:
        """Let nothing begin any more that has not; return the tasks of that."""
        with self._lock:
            waiting = [
                one
                for one in self._submissions.values()
                if not (one.has_begun or one.pool.asks_nobody or one.report or _is_done(one))
            ]
            for submission in waiting:
                del self._submissions[submission.ticket]
        for submission in waiting:
            _cancel(submission)
        return [submission.key for submission in waiting]

    def abandon(self, until: float = math.inf) -> None:  # noqa: ARG002 (nothing is ended)
        """Let nothing begin any more that has not; what has begun cannot be ended."""
        with self._admission:
            self._is_void = True
            self._admission.notify_all()
        for submission in self._submissions.values():
            _cancel(submission)
        self._submissions.clear()
        self._held.clear()
        if self._make is not None and self._pool is not None:
            self._shut_down(self._pool.executor, wait=False)
            self._pool = None

    def close(self) -> None:
        """Hang up, and shut down the executor, if it is eventor's."""
        with self._admission:
            if self._ringing < 0:
                return
            abandoned, self._is_void = self._is_void, True
            self._admission.notify_all()
            os.close(self._ringing)
            self._ringing = -1
        if self._desk is not None:
            del remote.owners_here[self._desk.address.key]
            self._desk.close()
        self._selector.close()
        os.close(self._reading)
        if self._make is not None and self._pool is not None:
            self._shut_down(self._pool.executor, wait=True)
            self._pool = None
        for thread in () if abandoned else self._ending:
            thread.join()

    def say(self, message: Said) -> None:
        """Take what a step says in a thread of this process.

        Raises:
            OSError: nobody hears any more.
        """
        with self._lock:
            if self._is_void:
                raise BrokenPipeError("the flow has ended")
            self._tell(message)

    def admit(self, ticket: int) -> str | None:
        """Tell the first who asks that a submission may begin, by None; others why it may not.

        While it is not sure that the run is still the owner's, a thread waits here.
        """
        with self._admission:
            while self._is_late and not self._is_void and threading.get_ident() != self._thread:
                self._admission.wait()
            if self._is_late:
                return remote.LATE
            submission = self._submissions.get(ticket)
            if submission is None or submission.has_begun or self._is_void:
                return remote.TWICE
            submission.has_begun = submission.pool.has_begun = True
            self._idle_since = math.inf
            return None

    def perform(self, call: task.Call, ticket: int) -> remote.Report:
        """Run a step that may begin, in this thread."""
        voice = remote.Voice(ticket, self)
        return remote.perform(call, voice, self._run_id, self._recovery, self._events)

    def _look(self) -> None:
        """Look for what nobody tells, from time to time."""
        if not self._is_told_idle:
            self._look_for_idleness()
        if self._desk is None:
            return
        self._desk.look()
        late = time.monotonic() - _LOST_SECONDS
        for submission in list(self._submissions.values()):
            caller = submission.caller
            if _is_done(submission):
                continue
            if _is_closed(submission.pool.executor):
                self._lose(submission, _ClosedError())
            elif caller is not None and caller.ended < late:
                told = "its connection has ended, and its executor says nothing"
                self._end(submission, failure(f"its worker was lost: {told}"))
            elif caller is not None and caller.ended < math.inf and not submission.is_asked_after:
                submission.is_asked_after = True
                self._wake(submission.pool)

    def _wake(self, pool: _Pool) -> None:
        """Have a pool of processes look after them: one that was started late is not seen to die.

        That of CPython 3.11, for one, looks which there are when something is submitted, and starts
        another after that.
        """
        if isinstance(pool.executor, ProcessPoolExecutor):
            with contextlib.suppress(Exception), blocked((signal.SIGINT,)), unwarned():
                pool.executor.submit(int)

    def _look_for_idleness(self) -> None:
        """Warn of an executor that begins nothing, while nothing runs in it."""
        now = time.monotonic()
        waiting = next(iter(self._submissions.values()), None)
        if waiting is None or any(
            one.has_begun or one.pool.asks_nobody for one in self._submissions.values()
        ):
            self._idle_since = math.inf
        elif self._idle_since == math.inf:
            self._idle_since = now
        elif now - self._idle_since > _IDLE_SECONDS:
            self._is_told_idle = True
            self._warn(
                f"No step has begun for {_IDLE_SECONDS:g} s in the executor, where {waiting.key} "
                "waits: it may have no worker that is free, or none with the version of eventor "
                "that the program has; or its workers run steps, and cannot reach the program"
            )

    def _submit(
        self, key: TaskKey, call: task.Call, *, once_more: bool = True
    ) -> int | Outcome | None:
        try:
            pool = self._ready_pool()
            self._give(_Submission(key, call, pool))
        except BrokenExecutor as error:
            self._retire(pool)
            if self._make is not None and once_more:
                return self._submit(key, call, once_more=False)
            return self._unfit(error)
        except Exception as error:
            # What made no executor now may make one later.
            is_final = isinstance(error, EventorError) and not isinstance(error, LaunchError)
            told = f"it could not be started: {task.describe(error)}"
            return failure(told, retriable=False if is_final else None)
        return os.getpid() if pool.is_of_threads else None

    def _unfit(self, error: BrokenExecutor) -> Outcome:
        told = f"it could not be started: {_told(error)}"
        if self._make is not None:
            return failure(told)
        advice = "a broken executor stays so; give a function that makes one as task_construct"
        return failure(f"{told}; {advice}", retriable=False)

    def _give(self, submission: _Submission) -> None:
        """Give a submission to its executor."""
        pool = submission.pool
        if _is_closed(pool.executor):
            raise _ClosedError
        arguments: tuple[Any, ...]
        if pool.is_of_threads:
            submission.is_placed = True
            arguments = (self._perform, submission)
        else:
            arguments = (remote.run, self._packed(submission))
        self._submissions[submission.ticket] = submission
        if pool.is_here and not isinstance(pool.executor, ProcessPoolExecutor):
            # Else loky starts its server while SIGINT is blocked, which would let it through.
            resource_tracker.ensure_running()
        try:
            # Its processes may be started now: a Ctrl-C is for the owner, which lets them finish.
            masked = () if pool.is_of_threads else (signal.SIGINT,)
            with blocked(masked), unwarned():
                submission.future = pool.executor.submit(*arguments)
            submission.future.add_done_callback(functools.partial(self._note, submission))
        except BaseException:
            del self._submissions[submission.ticket]
            raise

    def _packed(self, submission: _Submission) -> bytes:
        pool, call = submission.pool, submission.call
        desk = self._open_desk(pool)
        knows_main = isinstance(pool.executor, ProcessPoolExecutor)
        if call.results and not knows_main:
            results = {name: _known_anywhere(one) for name, one in call.results.items()}
            call = dataclasses.replace(call, results=results)
        dumps = functools.partial(_dumps, knows_main=knows_main)
        home = remote.Home(
            desk.address,
            self._run_id,
            self._recovery,
            task.LogLevels.of_this_process(),
            is_shared=not pool.is_here,
        )
        data = pickle.dumps(call.pickled(dumps))
        return pickle.dumps(remote.Errand(submission.ticket, len(self._events), data, home))

    def _perform(self, submission: _Submission) -> remote.Report:
        """Run a step, in a thread of the executor."""
        if (why := self.admit(submission.ticket)) is not None:
            return remote.Report(submission.ticket, failure(why), None)
        return self.perform(submission.call, submission.ticket)

    def _note(self, submission: _Submission, _future: Future[Any]) -> None:
        with self._lock:
            self._tell(submission)

    def _tell(self, what: Said | _Submission) -> None:
        self._told.append(what)
        if self._ringing >= 0:
            with contextlib.suppress(BlockingIOError):
                os.write(self._ringing, b"!")

    def _admit(self, desk: Desk) -> None:
        if not desk.admit(len(self._submissions)):
            busy = {submission.caller for submission in self._submissions.values()}
            desk.make_room(busy.union(caller for caller, _question in self._asked))

    def _hear(self, caller: Caller) -> None:
        desk = self._desk
        if desk is None:
            return
        for message in desk.hear(caller):
            if isinstance(message, MayBegin) and self._is_late:
                self._asked.append((caller, message))
            elif isinstance(message, MayBegin):
                self._answer(caller, message)
            elif isinstance(message, WhichEvents):
                desk.answer(caller, frozenset(self._events))
            elif isinstance(message, Said):
                self._take(message)

    def _answer(self, caller: Caller, question: MayBegin) -> None:
        """Answer whether a submission may begin."""
        if self._desk is None or not self._desk.knows(caller):
            return
        why = self.admit(question.ticket)
        if why is None:
            submission = self._submissions[question.ticket]
            submission.caller, submission.is_placed = caller, True
            self._arrivals.append(TaskLaunched(submission.key, question.pid))
        self._desk.answer(caller, why)

    def _take(self, said: Said) -> None:
        submission = self._submissions.get(said.ticket)
        if submission is not None:
            submission.heard += 1
        if isinstance(said.message, dict):
            self._on_record(logging.makeLogRecord(said.message))
        elif submission is not None:
            self._trigger(submission.key, said.message)

    def _trigger(self, key: TaskKey, triggered: task.Triggered) -> None:
        if triggered.event in self._events:
            cause = by_step(key, triggered.sequence)
            self._arrivals.append(Trigger(triggered.event, triggered.sequence, cause))
        else:
            self._warn(f"Step {key} triggers {triggered.event!r}, and there is no such event")

    def _take_back(self, submission: _Submission) -> None:
        """Take what the future of a submission has."""
        future = submission.future
        if future is None or submission.ticket not in self._submissions:
            return
        report = found = None
        try:
            error = CancelledError() if future.cancelled() else future.exception()
            if error is None:
                report = found = future.result()
            if isinstance(found, bytes):
                report = pickle.loads(found)
        except Exception as broken:
            error = broken
        if error is not None:
            self._lose(submission, error)
        elif not isinstance(report, remote.Report):
            told = f"its executor returned {reprlib.repr(found)}, which is no report of a step"
            self._end(submission, failure(told))
        elif report.ticket != submission.ticket:
            told = "its executor returned the outcome of something else that was submitted"
            self._end(submission, failure(told))
        else:
            submission.report = report
            submission.patient_until = time.monotonic() + _PATIENCE_SECONDS
            self._held[submission] = None

    def _let_go(self, submission: _Submission) -> None:
        """Let a task end whose report is there, once all is there that it has sent."""
        report = submission.report
        if report is None or (
            submission.heard < report.sent
            and (self._desk is None or self._desk.knows(submission.caller))
            and time.monotonic() < submission.patient_until
        ):
            return
        if report.pid is not None and not submission.is_placed:
            submission.pool.asks_nobody = True
            self._arrivals.append(TaskLaunched(submission.key, report.pid))
        for attributes in report.records:
            self._on_record(logging.makeLogRecord(attributes))
        for triggered in report.triggers:
            self._trigger(submission.key, triggered)
        self._end(submission, report.outcome)

    def _lose(self, submission: _Submission, error: BaseException) -> None:
        """Let a task fail, or be submitted anew, whose executor has not run it to its end."""
        pool = submission.pool
        is_broken = isinstance(error, BrokenExecutor)
        if is_broken:
            self._retire(pool)
        if is_broken and self._make and pool.has_begun and not submission.has_begun:
            # It was not its worker that was lost; and the executor was of use before.
            del self._submissions[submission.ticket]
            begun = self._submit(submission.key, submission.call)
            if isinstance(begun, Outcome):
                self._arrivals.append(TaskEnded(submission.key, begun))
            return
        if isinstance(error, CancelledError):
            told = "its executor has cancelled it"
        else:
            # By name, for Dask is not imported here.
            names = {kind.__name__ for kind in type(error).__mro__}
            is_lost = is_broken or "KilledWorker" in names
            what = "its worker was lost" if is_lost else "its executor could not run it"
            told = f"{what}: {_told(error)}"
        if isinstance(error, ImportError | AttributeError) and "eventor" in told:
            told += "; expected the version of eventor there that the program has"
        self._end(submission, failure(told))

    def _end(self, submission: _Submission, outcome: Outcome) -> None:
        del self._submissions[submission.ticket]
        self._held.pop(submission, None)
        self._arrivals.append(TaskEnded(submission.key, outcome))

    def _ready_pool(self) -> _Pool:
        """Return the executor, which is made if there is none.

        Raises:
            ConfigError: what was to make it has made something else.
            LaunchError: it has raised.
        """
        if self._pool is None:
            make = self._make
            assert make is not None
            try:
                with blocked((signal.SIGINT,)), unwarned():
                    made = make()
            except Exception as error:
                raise LaunchError(
                    f"task_construct, {make!r}, has made no executor: {task.describe(error)}"
                ) from error
            self._pool = _Pool(read_executor(made, make))
        return self._pool

    def _retire(self, pool: _Pool) -> None:
        """Use a broken executor no more, if another can be made."""
        if self._make is None or pool is not self._pool:
            return
        self._pool = None
        if isinstance(pool.executor, ProcessPoolExecutor):
            # It has asked them to end, and what ignores that would run beside its next attempt.
            for process in list((getattr(pool.executor, "_processes", None) or {}).values()):
                process.kill()
        # It may wait for workers that do not end at once.
        thread = threading.Thread(target=self._shut_down, args=(pool.executor,))
        self._ending.append(thread)
        thread.start()

    def _shut_down(self, executor: Executor, *, wait: bool = True) -> None:
        if _is_closed(executor):
            return  # and it would wait for ever for what it does not tell
        options = {"wait": wait}
        if not wait and "cancel_futures" in inspect.signature(executor.shutdown).parameters:
            options["cancel_futures"] = True
        try:
            executor.shutdown(**options)
        except Exception as error:
            self._warn(f"The executor {executor!r} cannot be shut down: {task.describe(error)}")

    def _open_desk(self, pool: _Pool) -> Desk:
        if self._desk is None:
            hosts = () if pool.is_here else self._hosts()
            try:
                self._desk = Desk(process_of(os.getpid()), hosts, self._selector, self._warn)
                remote.owners_here[self._desk.address.key] = self
            except OSError as error:
                raise LaunchError(
                    f"there is no port at which workers can reach this process: {error}"
                ) from error
        return self._desk

    def _hosts(self) -> tuple[str, ...]:
        if self._callback_host is None:
            return own_hosts()
        try:
            return hosts_of(self._callback_host)
        except (OSError, UnicodeError) as error:
            raise LaunchError(
                f"callback_host in Eventor's config is {self._callback_host!r}; expected the name "
                f"or the IPv4 address of this host: {error}"
            ) from error

    def _warn(self, message: str) -> None:
        record = logging.getLogger("eventor").makeRecord(
            "eventor", logging.WARNING, "main.py", 0, message, (), None, "task_wrapper"
        )
        self._on_record(record)


def _is_done(submission: _Submission) -> bool:
    try:
        return submission.future is not None and submission.future.done()
    except Exception:
        return False  # whoever takes it back says what is wrong


def _cancel(submission: _Submission) -> None:
    """Have an executor forget a submission, if it can; it is told no if it asks."""
    if submission.future is not None:
        with contextlib.suppress(Exception):
            submission.future.cancel()


def _is_closed(executor: Executor) -> bool:
    """Whether it is of a Client of Dask that is closed, as when its scheduler is gone for long."""
    return getattr(getattr(executor, "_client", None), "status", None) == "closed"


def _told(error: BaseException) -> str:
    return _CLOSED if isinstance(error, _ClosedError) else task.describe(error)


def _dumps(part: object, *, knows_main: bool) -> bytes:
    """Pickle a part of a call.

    Args:
        part: the part.
        knows_main: whether the worker has the program's main module.

    Raises:
        EventorError: cloudpickle could do it, and is not installed.
    """
    try:
        data = pickle.dumps(part)
    except Exception as error:
        why = str(error)
    else:
        if knows_main or b"__main__" not in data:
            return data
        why = "it is defined in the program's own script, which its worker does not have"
    try:
        return _dumps_by_value(part)
    except ImportError:
        raise EventorError(f"{why}; python -m pip install 'eventor[executors]' may help") from None


def _dumps_by_value(value: object) -> bytes:
    """Pickle functions and classes with all that they are made of.

    Raises:
        ImportError: cloudpickle, which does that, is not installed.
    """
    return bytes(importlib.import_module("cloudpickle").dumps(value))


def _known_anywhere(stored: StoredResult) -> StoredResult:
    """Return a result so that it can be loaded where the program's main module is another."""
    if stored.encoding != "pickle" or b"__main__" not in stored.data:
        return stored
    try:
        return StoredResult(stored.encoding, _dumps_by_value(stored.load()))
    except Exception:
        return stored  # whoever loads it says what is wrong
