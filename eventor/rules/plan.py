"""The rules of eventor, pure: what follows from what has come in.

`Plan` holds the state of one recovery in memory and knows neither SQL nor processes.
`Plan.advance` takes what has come in and returns the changes that follow, to a fixpoint; the loop
writes them down, and then acts on them.
"""

from __future__ import annotations

import copy
import heapq
import random
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from eventor.rules.config import LONGEST_DELAY
from eventor.rules.flow import ENDS, Event
from eventor.rules.queue import Queue
from eventor.types import (
    Cause,
    CauseKind,
    Outcome,
    Sequence,
    StepReplay,
    StepTriggers,
    TaskStatus,
    failure,
    sequence_text,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from eventor.rules.config import StepConfig
    from eventor.rules.flow import Flow, Step


class TaskKey(NamedTuple):
    """Which task: a step, by name, in a sequence."""

    step: str
    sequence: Sequence

    def __str__(self) -> str:
        return f"{self.step}[{self.sequence}]"


@dataclass(frozen=True, slots=True)
class Trigger:
    """A request from outside the rules to raise an event."""

    event: str
    sequence: Sequence
    cause: Cause


@dataclass(frozen=True, slots=True)
class Left:
    """How a task was left: by earlier recoveries, or in one that is continued.

    Attributes:
        status: its newest status.
        result: where its result stands.
        recovery: the recovery that left it so.
        attempt: how many times it was started since it last ended.
        due: when it was to be tried again, if it waited for that.
    """

    status: TaskStatus
    result: int | None = None
    recovery: int = 0
    attempt: int = 0
    due: datetime | None = None


class Wait(NamedTuple):
    """What a delayed association waits for: some time after an event in a sequence."""

    event: str
    sequence: Sequence
    seconds: float


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a recovery stands that is continued.

    Attributes:
        events: the events that it has raised, and when.
        tasks: its tasks, in the order in which they became ready.
        due: when its delayed associations are to act, or have acted.
    """

    events: Mapping[tuple[str, Sequence], datetime]
    tasks: Mapping[TaskKey, Left]
    due: Mapping[Wait, datetime]


@dataclass(frozen=True, slots=True)
class EventRaised:
    """Change: an event was raised."""

    event: str
    sequence: Sequence
    cause: Cause


@dataclass(frozen=True, slots=True)
class Delayed:
    """Change: an event was raised, some of whose associations act later."""

    wait: Wait
    due: datetime


@dataclass(frozen=True, slots=True)
class TaskReady:
    """Change: a task was created, and waits for its turn.

    Attributes:
        left: how it was left, if its earlier attempts count.
    """

    task: TaskKey
    cause: Cause
    replay: StepReplay | None
    left: Left | None = None


@dataclass(frozen=True, slots=True)
class TaskSkipped:
    """Change: a task was created and counts as a success; its earlier result stands."""

    task: TaskKey
    cause: Cause
    result: int | None


@dataclass(frozen=True, slots=True)
class TaskActive:
    """Change: a task is to be launched, for the attempt of that number."""

    task: TaskKey
    attempt: int


@dataclass(frozen=True, slots=True)
class TaskLaunched:
    """Change: a task got its process."""

    task: TaskKey
    pid: int


@dataclass(frozen=True, slots=True)
class TaskEnded:
    """Change, and what has come in: a task ended."""

    task: TaskKey
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class TaskRetried:
    """Change: an attempt failed, and the next one may start when it is due."""

    task: TaskKey
    outcome: Outcome
    attempt: int
    due: datetime


@dataclass(frozen=True, slots=True)
class TaskWithdrawn:
    """Change: a task that was active had not begun, and is ready again.

    Attributes:
        attempt: how many attempts it has had; that one is none.
    """

    task: TaskKey
    attempt: int


@dataclass(frozen=True, slots=True)
class TaskInterrupted:
    """Change: a task was active when its owner died; it is ready again, or counts as a success."""

    task: TaskKey
    replay: StepReplay


Change = (
    EventRaised
    | Delayed
    | TaskReady
    | TaskSkipped
    | TaskActive
    | TaskLaunched
    | TaskEnded
    | TaskRetried
    | TaskWithdrawn
    | TaskInterrupted
)

NEVER = datetime.min.replace(tzinfo=UTC)
"""Before all times."""

_SKIPPED_THROUGH = (
    StepTriggers.at_ready,
    StepTriggers.at_active,
    StepTriggers.at_success,
    StepTriggers.at_complete,
)


_AGAIN = Cause(CauseKind.recovery)


class Plan:
    """The state of one recovery of a run, and the rules by which it advances.

    Args:
        flow: the definitions; they may grow between two calls of `advance`.
        previous: how each task was left that earlier recoveries of this run recorded.
        max_concurrent: how many tasks may be active at once.
        stop_on_exception: what holds for a step that does not say it itself.
        resources: how much there is of what steps ask for.
        due: when the delayed associations were to act, of which earlier recoveries recorded it.
        standing: for a recovery that is continued, where it stands.
        chance: gives numbers from 0 to 1, uniformly.
    """

    def __init__(
        self,
        flow: Flow,
        previous: Mapping[TaskKey, Left],
        max_concurrent: int,
        *,
        stop_on_exception: bool,
        resources: Mapping[str, int] | None = None,
        due: Mapping[Wait, datetime] | None = None,
        standing: Standing | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._flow = flow
        self._previous = previous
        self._max_concurrent = max_concurrent
        self._stop_on_exception = stop_on_exception
        self._due = due or {}
        self._chance = chance
        # What keeps from doing a thing twice is all that is kept of what has ended.
        self._raised: set[tuple[str, Sequence]] = set()
        self._created: set[TaskKey] = set()
        self._progress: dict[tuple[str, Sequence], dict[str | int, int]] = {}
        self._ready: Queue[TaskKey] = Queue(resources or {})
        self._attempts: dict[TaskKey, int] = {}
        """For a task that is ready, the attempts that it has had, if any."""
        self._active: dict[TaskKey, int] = {}
        """For a task that is active, which attempt it is."""
        self._timers: list[tuple[datetime, int, TaskKey | Wait]] = []
        self._timer = 0
        self._retrying = 0
        self._leading_on: set[TaskKey] = set()
        self._agenda: deque[EventRaised] = deque()
        self._noted: deque[tuple[EventRaised, datetime]] = deque()
        self._standing: dict[TaskKey, Left] = {}
        self._standing_due: Mapping[Wait, datetime] = {}
        self._standing_seen = 0
        self._changes: list[Change] = []
        self._now = NEVER
        self._stopping = False
        self.all_handled = True
        """Whether every failure so far was handled by its step's triggers."""
        if standing is not None:
            self._stand(standing)

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing may start, now or later."""
        return not self._active and (self._stopping or not (self._ready or self._timers))

    @property
    def waiting(self) -> int:
        """How many tasks are ready and have not started."""
        return len(self._ready) + self._retrying

    @property
    def lost(self) -> bool:
        """Whether tasks of a continued recovery have not ended whose steps are not defined."""
        return any(left.status not in ENDS for left in self._standing.values())

    @property
    def delayed(self) -> int:
        """How many events are raised some of whose associations are to act later."""
        return len(self._timers) - self._retrying

    @property
    def about_to_start(self) -> int:
        """How many tasks may start when those that are active end."""
        if self._stopping:
            return 0
        return min(len(self._active), len(self._ready) + len(self._leading_on))

    @property
    def next_due(self) -> datetime | None:
        """When something is to happen that waits for nothing but the time."""
        return self._timers[0][0] if self._timers and not self._stopping else None

    @property
    def stopping(self) -> bool:
        """Whether an unhandled failure, or a call of `stop`, keeps tasks from starting."""
        return self._stopping

    def stop(self) -> None:
        """Let no more tasks start."""
        self._stopping = True

    def withdraw(self, task: TaskKey) -> None:
        """Let a task wait for its turn again that is active, and has not begun."""
        attempt = self._leave(task) - 1
        self._changes.append(TaskWithdrawn(task, attempt))
        self._queue(task, Left(TaskStatus.ready, attempt=attempt))

    def resume(self) -> None:
        """Let ready tasks start again after a failure or a call has stopped them."""
        self._stopping = False

    def note(self, triggers: Iterable[Trigger], now: datetime) -> list[Change]:
        """Return the changes of raising events; what follows from them waits for `advance`.

        So a trigger can be recorded before the flow is fully defined.
        """
        for trigger in triggers:
            change = EventRaised(trigger.event, trigger.sequence, trigger.cause)
            if self._raise(change):
                self._noted.append((change, now))
        return self._take_changes()

    def advance(self, arrivals: Iterable[Trigger | TaskEnded], now: datetime) -> list[Change]:
        """Return all changes that follow from what has come in, in the order of their reasons."""
        self._now = now
        self._take_up()
        self._follow_noted()
        self._now = now
        for arrival in arrivals:
            if isinstance(arrival, Trigger):
                self._agenda.append(EventRaised(arrival.event, arrival.sequence, arrival.cause))
            else:
                self._end(arrival)
            self._settle()
        while self._timers and self._timers[0][0] <= now and not self._stopping:
            self._act(heapq.heappop(self._timers)[2])
            self._settle()
        while not self._stopping and len(self._active) < self._max_concurrent:
            if (task := self._ready.pop()) is None:
                break
            self._start(task)
            self._settle()
        return self._take_changes()

    def foresee(
        self,
        triggers: Iterable[Trigger],
        arrivals: Iterable[Trigger],
        fails: Callable[[TaskKey], bool],
        now: datetime,
        *,
        stopped: bool,
    ) -> list[Change]:
        """Return the changes that would follow, until nothing is left; this plan stays as it is.

        Args:
            triggers: what would be noted first.
            arrivals: what would come in then.
            fails: tells which of the tasks that run would fail.
            now: the time; what is due later would happen then.
            stopped: whether nothing would start.
        """
        shared = {id(what): what for what in (self._flow, self._previous, self._due)}
        plan = copy.deepcopy(self, shared)
        plan.resume()
        if stopped:
            plan.stop()
        changes = plan.note(triggers, now) + plan.advance(arrivals, now)
        seen = 0
        while seen < len(changes) or plan.next_due is not None:
            if seen == len(changes):
                now = max(now, plan.next_due or now)
                changes += plan.advance([], now)
                continue
            change, seen = changes[seen], seen + 1
            if isinstance(change, TaskActive):
                ended = Outcome(TaskStatus.success, "")
                if fails(change.task):
                    ended = failure("", retriable=False)
                changes += plan.advance([TaskEnded(change.task, ended)], now)
        return changes

    def raised(self) -> set[str]:
        """Return the names of the events that were raised in any sequence."""
        return {name for name, _sequence in self._raised}

    def how_left(self, task: TaskKey) -> TaskStatus | None:
        """Return the status in which a task was left before; None for a new one."""
        left = self._standing.get(task) or self._previous.get(task)
        return None if left is None else left.status

    def stands(self, task: TaskKey) -> bool:
        """Whether a task is one of a recovery that is continued."""
        return task in self._standing

    def _take_changes(self) -> list[Change]:
        changes, self._changes = self._changes, []
        return changes

    def _stand(self, standing: Standing) -> None:
        """Stand where a recovery stands that is continued; what follows waits for `advance`."""
        self._raised.update(standing.events)
        self._noted.extend(
            # They are followed again: one that was triggered and not followed yet looks the same.
            (EventRaised(*which, _AGAIN), at)
            for which, at in standing.events.items()
        )
        self._created.update(standing.tasks)
        self._standing.update(
            (task, left)
            for task, left in standing.tasks.items()
            if left.status is not TaskStatus.success
        )
        self._standing_due = standing.due

    def _take_up(self) -> None:
        """Take up the tasks of a recovery that is continued, as far as their steps are defined."""
        if self._standing_seen == len(self._flow.steps):
            return
        self._standing_seen = len(self._flow.steps)
        known = [task for task in self._standing if task.step in self._flow.steps]
        for task in known:
            left, step = self._standing.pop(task), self._flow.steps[task.step]
            if left.status is TaskStatus.ready:
                self._queue(task, left)
            elif left.status is TaskStatus.active:
                replay = step.recovery[left.status]
                self._changes.append(TaskInterrupted(task, replay))
                if replay is StepReplay.rerun:
                    self._queue(task, left)
                else:
                    self._transition(step, task.sequence, *_SKIPPED_THROUGH)
            elif left.status is TaskStatus.failure and not step.handles_failure:
                self.all_handled = False
        self._settle()

    def _follow_noted(self) -> None:
        """Do what noted events lead to, as far as they are defined by now."""
        noted, self._noted = self._noted, deque()
        for change, self._now in noted:
            if change.event in self._flow.events:
                self._follow(change)
                self._settle()
            else:
                self._noted.append((change, self._now))

    def _settle(self) -> None:
        while self._agenda:
            change = self._agenda.popleft()
            if self._raise(change):
                self._follow(change)

    def _raise(self, change: EventRaised) -> bool:
        """Raise an event, and tell whether it was not raised in its sequence before."""
        which = (change.event, change.sequence)
        if which in self._raised:
            return False
        self._raised.add(which)
        self._progress.pop(which, None)
        self._changes.append(change)
        return True

    def _follow(self, change: EventRaised) -> None:
        """Do what a raised event leads to, by association and by expressions that name it."""
        name, sequence = change.event, change.sequence
        if targets := self._flow.associated.get(name):
            self._lead(targets, sequence, Cause(CauseKind.association, name))
        for seconds in self._flow.delayed.get(name, ()):
            wait = Wait(name, sequence, seconds)
            due = self._standing_due.get(wait)
            if due is not None and self._has_acted(wait):
                continue
            if due is None:
                due = self._due.get(wait) or self._later(seconds)
                self._changes.append(Delayed(wait, due))
            self._set_timer(due, wait)
        for event in self._flow.expressed.get(name, ()):
            if (event.name, sequence) not in self._raised and self._holds(event, name, sequence):
                cause = Cause(CauseKind.expression, name, self._flow.gates[event.name].text)
                self._agenda.append(EventRaised(event.name, sequence, cause))

    def _has_acted(self, wait: Wait) -> bool:
        """Whether there is all to which a delayed association leads."""
        return all(
            (target.name, wait.sequence) in self._raised
            if isinstance(target, Event)
            else TaskKey(target.name, wait.sequence) in self._created
            for target in self._flow.delayed[wait.event][wait.seconds]
        )

    def _lead(self, targets: Iterable[Event | Step], sequence: Sequence, cause: Cause) -> None:
        for target in targets:
            if isinstance(target, Event):
                self._agenda.append(EventRaised(target.name, sequence, cause))
            else:
                self._create(target, sequence, cause)

    def _holds(self, event: Event, name: str, sequence: Sequence) -> bool:
        """Tell whether the expression of `event` holds, now that the event of `name` is raised."""
        gate = self._flow.gates[event.name]
        progress = self._progress.get((event.name, sequence))
        if progress is None:
            progress = gate.begin(lambda name: (name, sequence) in self._raised)
            self._progress[event.name, sequence] = progress
        gate.take(progress, name)
        return gate.is_open(progress)

    def _create(self, step: Step, sequence: Sequence, cause: Cause) -> None:
        task = TaskKey(step.name, sequence)
        if task in self._created:
            return
        self._created.add(task)
        left = self._previous.get(task)
        replay = None if left is None else step.recovery[left.status]
        if left is not None and replay is StepReplay.skip:
            self._changes.append(TaskSkipped(task, cause, left.result))
            self._transition(step, sequence, *_SKIPPED_THROUGH)
            return
        if left is not None and (left.status in ENDS or not left.attempt):
            left = None  # one that had ended, or had not begun, begins anew
        self._changes.append(TaskReady(task, cause, replay, left))
        self._queue(task, left)
        self._transition(step, sequence, StepTriggers.at_ready)

    def _queue(self, task: TaskKey, left: Left | None = None) -> None:
        """Let a task wait for its turn, or before that for the time of its next attempt."""
        if left is not None and left.attempt:
            self._attempts[task] = left.attempt
        if left is not None and left.due is not None and left.status is TaskStatus.ready:
            self._retrying += 1
            self._set_timer(left.due, task)
        else:
            config = self._flow.steps[task.step].config
            self._ready.push(task, config.priority, config.resources)

    def _set_timer(self, due: datetime, what: TaskKey | Wait) -> None:
        self._timer += 1
        heapq.heappush(self._timers, (due, self._timer, what))

    def _later(self, seconds: float) -> datetime:
        return self._now + timedelta(seconds=seconds)

    def _act(self, what: TaskKey | Wait) -> None:
        """Do what was to be done now."""
        if isinstance(what, TaskKey):
            self._retrying -= 1
            self._queue(what)
            return
        targets = self._flow.delayed.get(what.event, {}).get(what.seconds, {})
        cause = Cause(CauseKind.association, what.event, f"after {what.seconds:g} s")
        self._lead(targets, what.sequence, cause)

    def _start(self, task: TaskKey) -> None:
        step = self._flow.steps[task.step]
        attempt = self._attempts.pop(task, 0) + 1
        self._active[task] = attempt
        if step.leads_on:
            self._leading_on.add(task)
        self._changes.append(TaskActive(task, attempt))
        self._transition(step, task.sequence, StepTriggers.at_active)

    def _leave(self, task: TaskKey) -> int:
        """Have a task active no more, and return which attempt that was."""
        self._leading_on.discard(task)
        self._ready.give_back(self._flow.steps[task.step].config.resources)
        return self._active.pop(task)

    def _end(self, change: TaskEnded) -> None:
        task, outcome = change.task, change.outcome
        attempt = self._leave(task)
        step = self._flow.steps[task.step]
        if outcome.status is TaskStatus.success:
            end = StepTriggers.at_success
        elif attempt < step.config.max_attempts and _is_retriable(outcome, step.config):
            self._retry(change, step, attempt)
            return
        else:
            end = StepTriggers.at_failure
            self._fail(step)
        self._changes.append(change)
        self._transition(step, task.sequence, end, StepTriggers.at_complete)

    def _retry(self, change: TaskEnded, step: Step, attempt: int) -> None:
        due = self._later(seconds_to_retry(step.config, attempt, self._chance()))
        self._changes.append(TaskRetried(change.task, change.outcome, attempt, due))
        self._queue(change.task, Left(TaskStatus.ready, attempt=attempt, due=due))

    def _fail(self, step: Step) -> None:
        if step.handles_failure:
            return
        self.all_handled = False
        own = step.config.stop_on_exception
        if self._stop_on_exception if own is None else own:
            self._stopping = True

    def _transition(self, step: Step, sequence: Sequence, *transitions: StepTriggers) -> None:
        for transition in transitions:
            for event in step.triggers.get(transition, ()):
                cause = Cause(CauseKind.status, step.name, transition.value)
                self._agenda.append(EventRaised(event.name, sequence, cause))


def is_skip(change: Change) -> TypeGuard[TaskSkipped | TaskInterrupted]:
    """Tell whether a change lets a task count as a success that has not run to its end."""
    if isinstance(change, TaskInterrupted):
        return change.replay is StepReplay.skip
    return isinstance(change, TaskSkipped)


def by_step(key: TaskKey, sequence: Sequence) -> Cause:
    """Return the cause of what a task triggers; it names the task's sequence if that is another."""
    detail = None if key.sequence == sequence else sequence_text(key.sequence)
    return Cause(CauseKind.step, key.step, detail)


def _is_retriable(outcome: Outcome, config: StepConfig) -> bool:
    if outcome.retriable is None:
        return config.retry_on is None
    return outcome.retriable


def seconds_to_retry(config: StepConfig, attempt: int, chance: float) -> float:
    """Return the seconds between the end of an attempt and the next.

    Args:
        config: the step's.
        attempt: the number of the attempt that failed, from 1.
        chance: a number from 0 to 1, which chooses in the jitter.
    """
    seconds = config.retry_delay
    try:
        seconds *= config.retry_backoff ** (attempt - 1)
    except OverflowError:
        seconds = seconds and LONGEST_DELAY
    return min(seconds + config.retry_jitter * chance, LONGEST_DELAY)
