"""The workers of one call of `ev()`: started, given tasks, heard out, and ended.

    spare     forked ahead, while a step runs; it waits for a task
    working   it does a task
    free      it has done a task, and may do another (`max_tasks_per_child`)
    ending    it has no more to do; it is let end by itself, for a while

The process of the next step is forked while this one runs, by the zygote. It knows all that the
owner knew when that was forked, and needs only to be told a name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import multiprocessing
import os
import resource
import selectors
import signal
import sys
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventor.errors import EventorError, LaunchError
from eventor.rules.plan import TaskEnded, TaskKey, Trigger, by_step
from eventor.steps import task
from eventor.steps.display import Display, settle
from eventor.steps.fork import unwarned, warn_of_threads
from eventor.steps.keeper import Keeper, kill_sessions
from eventor.steps.output import Output, Outputs
from eventor.steps.signals import TAKEN, blocked
from eventor.steps.worker import GRACE_SECONDS, Worker
from eventor.steps.zygote import Zygote
from eventor.storage.lease import clock
from eventor.storage.owner import process_of
from eventor.types import Outcome, failure

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Mapping

    from eventor.rules.flow import Event, Step

_LOOK_SECONDS = 1.0
"""How often all workers are looked at, should a descendant of one hold its sentinel open."""

_DESCRIPTORS_PER_WORKER = 6
_SPARE_DESCRIPTORS = 64


def most_at_once() -> int:
    """Return how many workers the limit on open files allows, at least one."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return sys.maxsize
    left = soft - len(list(Path("/dev/fd").iterdir())) - _SPARE_DESCRIPTORS
    return max(1, left // _DESCRIPTORS_PER_WORKER)


class Launcher:
    """All workers of one call of `ev()`.

    Args:
        construct: the class of the workers.
        most: how many tasks a process does before it ends; None is no limit.
        steps: all steps by name, which may grow meanwhile.
        events: all events by name, which may grow too.
        run_id: the run whose steps they are.
        recovery: the recovery in that run.
        on_record: what handles the log records that come from workers.
        make_way: is called before what they print is shown.
    """

    def __init__(
        self,
        construct: type[Any],
        most: int | None,
        steps: Mapping[str, Step],
        events: Mapping[str, Event],
        run_id: int,
        recovery: int,
        on_record: Callable[[logging.LogRecord], None],
        make_way: Callable[[], None],
    ) -> None:
        self._construct = construct
        self._threads = issubclass(construct, threading.Thread)
        self._forks = not self._threads and _forks(construct)
        self._most = 1 if self._threads else most
        self._steps = steps
        self._events = events
        self._run_id = run_id
        self._recovery = recovery
        self._on_record = on_record
        self._workers: dict[Worker, None] = {}
        self._waiting: dict[Worker, None] = {}
        self._ready: dict[Worker, bool] = {}
        self._ending: dict[Worker, None] = {}
        self._limited: dict[Worker, None] = {}
        self._selector = selectors.DefaultSelector()
        self._outputs = Outputs(self._selector, make_way)
        self._bell: int | None = None
        self._look_at = time.monotonic() + _LOOK_SECONDS
        self._process = process_of(os.getpid())
        self._keeper: Keeper | None = None
        self._zygote: Zygote | None = None
        self._knows = 0
        self._retired = not _is_plain(construct)
        self._by_pid: dict[int, Worker] = {}
        self._most_spares = os.cpu_count() or 1
        self._abandoned = False
        self._overran = False

    @property
    def busy(self) -> bool:
        """Whether any of its workers has not ended yet, or is still to come."""
        coming = self._zygote is not None and self._zygote.asked > 0
        return bool(self._workers) or (coming and not self._retired)

    def shows(self, *, patient: bool) -> bool:
        """Whether there is output of steps that who reads the program's own has not taken yet.

        Args:
            patient: whether one who takes nothing for a while is waited for.
        """
        return self._outputs.shows(math.inf if patient else GRACE_SECONDS)

    def prepare(self) -> int | None:
        """Make sure that no process outlives this one; to be called before any is recorded.

        Returns:
            The pid of the keeper, or None for threads, which need none.

        Raises:
            LaunchError: the keeper cannot be started.
            RuntimeWarning: where warnings are errors, and a fork would be beside other threads.
        """
        if self._threads:
            return None
        try:
            if self._keeper is None:
                if self._forks:
                    warn_of_threads()
                else:
                    # Else the first worker starts its server, which would let all signals through.
                    resource_tracker.ensure_running()
                self._keeper = Keeper()
            return self._keeper.ensure(self._groups())
        except OSError as error:
            raise LaunchError(f"no process can be started to keep the steps: {error}") from error

    @property
    def overran(self) -> bool:
        """Whether the keeper may have ended what runs, since it was allowed until before now."""
        return self._overran or (
            self._keeper is not None
            and clock() > self._keeper.allowed_until
            and any(worker.is_process and worker.key is not None for worker in self._workers)
        )

    def allow_until(self, until: float) -> None:
        """Let the keeper end what runs at a time by `lease.clock`, unless a later one is told."""
        if self._keeper is not None:
            self._overran = self.overran
            self._keeper.allow_until(until)

    def _groups(self) -> Iterator[int]:
        """Yield the groups that a keeper has to know."""
        yield from (worker.pid for worker in self._workers | self._limited)
        if self._zygote is not None and not self._zygote.lost:
            yield self._zygote.pid

    @property
    def _breeds(self) -> bool:
        """Whether what the zygote forks is of use."""
        zygote = self._zygote
        return (
            zygote is not None
            and not (self._retired or zygote.lost)
            and self._knows == self._defined
        )

    @property
    def _defined(self) -> int:
        """How much is defined by now, of which what was forked before may know less."""
        return len(self._steps) + len(self._events)

    def start(
        self, key: TaskKey, step: Step, attempt: int, results: task.Results | None
    ) -> int | Outcome:
        """Give a task to a worker.

        Args:
            key: the task.
            step: its step.
            attempt: how many times it has been started, this time included.
            results: what placeholders in its arguments stand for; None if there are none.

        Returns:
            The pid of the worker, or how it failed to start.
        """
        order = task.ByName(step.name, key.sequence, attempt, results)
        try:
            worker = self._give(key, order, step) or self._begin(key, order.of(step))
        except Exception as error:
            retriable = False if isinstance(error, EventorError) else None
            told = f"it could not be started: {task.describe(error)}"
            return failure(told, retriable=retriable)
        if step.config.timeout is not None:
            worker.limit(step.config)
            self._limited[worker] = None
        return worker.pid

    def stock(self, wanted: int) -> None:
        """Have processes forked ahead for so many tasks that may start soon."""
        if not self._forks or self._most != 1 or self._retired or not wanted:
            return
        if self._zygote is None and self._keeper is not None:
            # Without one, the owner forks: it is not missed.
            with contextlib.suppress(OSError):
                self._knows = self._defined
                self._zygote = Zygote(self._begin_in_zygote, self._keeper.pipe)
                self._selector.register(self._zygote, selectors.EVENT_READ, self._zygote)
        if self._zygote is not None and self._breeds:
            missing = min(wanted, self._most_spares) - len(self._waiting) - self._zygote.asked
            if missing > 0:
                self._zygote.ask(missing)

    def renew(self) -> None:
        """Start no more processes from what is forked: they do not know what the owner knows now.

        From then on it forks by itself, in this call of `ev()`: this may happen again at any time.
        """
        self._retired = True
        for worker in [worker for worker in self._waiting if worker.did is None]:
            self._dismiss(worker)

    def finish(self) -> None:
        """Let all workers end that have nothing to do."""
        for worker in list(self._waiting):
            self._dismiss(worker)

    def wait(self, bell: int | None, seconds: float) -> None:
        """Wait until there is something to collect, or the bell rings, or the time is over."""
        if bell != self._bell:
            if self._bell is not None:
                self._selector.unregister(self._bell)
            if bell is not None:
                self._selector.register(bell, selectors.EVENT_READ)
            self._bell = bell
        if self._limited:
            due = min(worker.due for worker in self._limited)
            seconds = min(seconds, max(0.0, due - time.monotonic()))
        for key, _events in self._selector.select(seconds):
            if isinstance(key.data, Zygote):
                self._hear_zygote(key.data)
            elif isinstance(key.data, Output | Display):
                self._outputs.heed(key.data)
            elif (worker := key.data) is not None:
                self._ready[worker] = self._ready.get(worker, False) or key.fd == worker.sentinel

    def collect(self) -> list[Trigger | TaskEnded]:
        """Return the triggers and ends that have come in, and pass on the log records."""
        ready, self._ready = self._ready, {}
        arrivals = [arrival for worker in ready for arrival in self._hear(worker)]
        for worker, by_sentinel in ready.items():
            if worker in self._workers:
                self._let_alone(worker, by_sentinel)
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _LOOK_SECONDS
            arrivals += [
                arrival for worker in list(self._workers) for arrival in self._hear(worker)
            ]
        if self._limited:
            arrivals += self._end_late()
        return arrivals

    def hurry(self) -> list[TaskKey]:
        """End processes that go on long after their steps have returned; return those told now."""
        return [worker.did for worker in self._ending if worker.hurry() and worker.did]

    def withdraw(self) -> list[TaskKey]:
        """Withdraw nothing: each task has a process by the time that it is active."""
        return []

    def abandon(self, until: float = math.inf) -> None:
        """End all processes and what they started, by force if need be; threads cannot be ended.

        Args:
            until: by when they have to have ended, by `lease.clock`.
        """
        self.finish()
        self._workers = {worker: None for worker in self._workers if worker.is_process}
        self._abandoned = True
        leaders = [worker.pid for worker in self._workers | self._limited]
        self._limited.clear()
        # Whoever handles what they log may raise: not before all have ended.
        records: list[logging.LogRecord] = []
        pass_on, self._on_record = self._on_record, records.append
        grace = min(GRACE_SECONDS, until - clock())
        for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, GRACE_SECONDS)):
            for worker in self._workers:
                worker.end(number)
            self._await_ends(seconds)
        kill_sessions(leaders)
        for record in records:
            pass_on(record)

    def close(self) -> None:
        """Let go of the keeper, and of workers that could not be ended in time."""
        for worker in self._workers:
            if worker.is_process:
                worker.end(signal.SIGKILL)
                worker.inlet.close()
        self._outputs.close()
        if self._zygote is not None:
            self._zygote.close()
            if self._keeper is not None:
                self._keeper.forget(self._zygote.pid)
        if self._keeper is not None:
            self._keeper.close(kill=self._abandoned)
            self._keeper = None
        self._selector.close()

    def _give(self, key: TaskKey, by_name: task.ByName, step: Step) -> Worker | None:
        """Give a task to a worker that waits for one, and return it, if there is any."""
        order = by_name if self._forks else by_name.of(step)
        self._await_spare()
        while self._waiting:
            worker = next(reversed(self._waiting))
            if worker.knows != self._defined:
                self._dismiss(worker)
                continue
            try:
                worker.order(key, order)
            except OSError:  # it has died meanwhile
                self._dismiss(worker)
                continue
            del self._waiting[worker]
            return worker
        return None

    def _await_spare(self) -> None:
        while not self._waiting and self._breeds and self._zygote is not None:
            if not self._zygote.bear():
                self._retired = True
                self._zygote.wake()
                return
            self._hear_zygote(self._zygote)

    def _hear_zygote(self, zygote: Zygote) -> None:
        born, ended = zygote.hear()
        for process, pipe in born:
            worker = self._add(Worker(process, pipe, 1, self._knows, None))
            if self._retired or self._abandoned:
                self._dismiss(worker)
        for pid in ended:
            self._ready.setdefault(self._by_pid.pop(pid), False)
        if zygote.refused:
            self._retired = True
        if zygote.lost:
            self._unregister(zygote.fileno())

    def _begin(self, key: TaskKey, call: task.Call) -> Worker:
        """Start a worker with its first task."""
        knows = self._defined
        with contextlib.ExitStack() as opened:
            mine, its = task.pipe()
            opened.callback(mine.close)
            opened.callback(its.close)
            job = task.Job(call, self._steps if self._forks else {}, self._most)
            # Blocked, so that a Ctrl-C finds the new process in its own group, or not at all.
            with blocked(TAKEN) as before, unwarned():
                target = functools.partial(self._leave, mine) if self._forks else task.main
                process = self._start(target, job, its, before, str(key))
            opened.pop_all()
        worker = Worker(process, mine, self._most, knows, key)
        if worker.is_process:
            its.close()
        return self._add(worker)

    def _leave(
        self, mine: socket.socket, job: task.Job, its: socket.socket, origin: task.Origin
    ) -> None:
        """Be a worker, and hold nothing by which the end of the owner would not be seen."""
        mine.close()
        if self._most != 1:  # one that ends after its task waits for nothing
            for worker in self._workers:
                worker.inlet.close()
            self._outputs.leave()
        task.main(job, its, origin)

    def _begin_in_zygote(
        self, target: Callable[..., None], its: socket.socket, before: frozenset[int]
    ) -> Any:
        return self._start(target, task.Job(None, self._steps, 1), its, before, "spare")

    def _start(
        self,
        target: Callable[..., None],
        job: task.Job,
        its: socket.socket,
        before: frozenset[int],
        name: str,
    ) -> Any:
        """Start a process or thread, whose own its end of the pipe is from then on."""
        origin = task.Origin(
            self._process,
            None if self._forks or self._threads else task.LogLevels.of_this_process(),
            before,
            None if self._keeper is None else self._keeper.pipe,
            self._run_id,
            self._recovery,
            self._events if self._forks or self._threads else dict.fromkeys(self._events),
        )
        process = self._construct(target=target, args=(job, its, origin), name=name)
        settle()
        process.start()
        return process

    def _end_late(self) -> list[Trigger | TaskEnded]:
        """End what runs for longer than its timeout; return what comes in of it."""
        arrivals: list[Trigger | TaskEnded] = []
        now = time.monotonic()
        for worker in [worker for worker in self._limited if worker.due <= now]:
            if not worker.is_late:
                arrivals += self._hear(worker)  # what it has said before it is late counts
            if worker in self._workers and worker in self._limited:
                worker.end_late()
                if self._zygote is not None:
                    self._zygote.wake()
            elif worker in self._limited and not worker.has_late_rest():
                worker.end_rest()
                kill_sessions([worker.pid])
                self._forget(worker)
                if worker.key is not None and worker.late_end is not None:
                    arrivals.append(self._end(worker, worker.key, worker.late_end))
        return arrivals

    def _add(self, worker: Worker) -> Worker:
        self._workers[worker] = None
        if worker.key is None:
            self._waiting[worker] = None
        self._selector.register(worker.inlet, selectors.EVENT_READ, worker)
        if worker.sentinel is not None:
            self._selector.register(worker.sentinel, selectors.EVENT_READ, worker)
        elif worker.is_process:
            self._by_pid[worker.pid] = worker
        return worker

    def _hear(self, worker: Worker) -> list[Trigger | TaskEnded]:
        messages, gone = worker.hear()
        taken = [self._take(worker, message) for message in messages]
        arrivals = [arrival for arrival in taken if arrival is not None]
        if gone:
            if worker.did is None and not worker.is_ending:
                self._retired = True  # something ends what is forked ahead
            if worker.is_late:
                worker.due = time.monotonic()
            elif worker.key is not None and (silent := worker.silent_end()) is not None:
                arrivals.append(self._end(worker, worker.key, silent))
            self._release(worker)
        elif worker.inlet.garbled and self._most != 1 and worker.is_process:
            worker.end(signal.SIGKILL)  # it would wait for its next task, unheard
        return arrivals

    def _take(self, worker: Worker, message: task.Message) -> Trigger | TaskEnded | None:
        if isinstance(message, dict):
            self._on_record(logging.makeLogRecord(message))
        elif isinstance(message, task.Captured):
            worker.outputs = self._outputs.listen(message.descriptors)
        elif worker.key is None:
            return None
        elif isinstance(message, task.Triggered):
            cause = by_step(worker.key, message.sequence)
            return Trigger(message.event, message.sequence, cause)
        elif worker.is_late:
            worker.dismiss()
        else:
            end = self._end(worker, worker.key, message)
            self._take_back(worker)
            return end
        return None

    def _end(self, worker: Worker, key: TaskKey, outcome: Outcome) -> TaskEnded:
        """Return the end of a worker's task."""
        self._limited.pop(worker, None)
        if worker.outputs:
            stdout, stderr = self._outputs.take(worker.outputs)
            worker.outputs = ()
            outcome = dataclasses.replace(outcome, stdout=stdout, stderr=stderr)
        return TaskEnded(key, outcome)

    def _take_back(self, worker: Worker) -> None:
        """Have a worker wait for its next task, or end."""
        worker.key = None
        if worker.is_free and not self._abandoned:
            self._waiting[worker] = None
        else:
            self._ending[worker] = None

    def _dismiss(self, worker: Worker) -> None:
        del self._waiting[worker]
        self._ending[worker] = None
        worker.dismiss()

    def _let_alone(self, worker: Worker, by_sentinel: bool) -> None:
        """No longer wait on what is ready for ever."""
        if worker.inlet.ended:
            self._unregister(worker.inlet.fileno())
        if by_sentinel and worker.is_deaf() and worker.sentinel is not None:
            self._unregister(worker.sentinel)

    def _release(self, worker: Worker) -> None:
        for group in (self._workers, self._waiting, self._ending):
            group.pop(worker, None)
        self._unregister(worker.inlet.fileno())
        if worker.sentinel is not None:
            self._unregister(worker.sentinel)
        if worker.is_process:
            if self._abandoned:
                worker.end_rest()
            if worker not in self._limited:
                self._forget(worker)
        worker.release()

    def _forget(self, worker: Worker) -> None:
        if self._keeper is not None:
            self._keeper.forget(worker.pid)

    def _unregister(self, descriptor: int) -> None:
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    def _await_ends(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.busy and (left := deadline - time.monotonic()) > 0:
            self.wait(None, min(left, _LOOK_SECONDS))
            self.collect()


def _is_plain(construct: type[Any]) -> bool:
    """Whether it does nothing of its own, which a program may expect to happen in the owner."""
    return construct.__module__.partition(".")[0] == "multiprocessing"


def _forks(construct: type[Any]) -> bool:
    method = getattr(construct, "_start_method", None) or multiprocessing.get_start_method()
    return bool(method == "fork")
