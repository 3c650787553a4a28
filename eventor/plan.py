"""The rules of eventor, pure: what follows from what has come in.

`Plan` holds the state of one recovery in memory and knows neither SQL nor processes.
`Plan.advance` takes what has come in and returns the changes that follow, to a fixpoint; the loop
writes them down, and then acts on them.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from eventor.flow import Event
from eventor.types import (
    Cause,
    CauseKind,
    Outcome,
    Sequence,
    StepReplay,
    StepTriggers,
    TaskStatus,
    failure,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from eventor.flow import Flow, Step


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
    """How earlier recoveries left a task: its newest status, and where its result stands."""

    status: TaskStatus
    result: int | None = None


@dataclass(frozen=True, slots=True)
class EventRaised:
    """Change: an event was raised."""

    event: str
    sequence: Sequence
    cause: Cause


@dataclass(frozen=True, slots=True)
class TaskReady:
    """Change: a task was created, and waits for its turn."""

    task: TaskKey
    cause: Cause
    replay: StepReplay | None


@dataclass(frozen=True, slots=True)
class TaskSkipped:
    """Change: a task was created and counts as a success; its earlier result stands."""

    task: TaskKey
    cause: Cause
    result: int | None


@dataclass(frozen=True, slots=True)
class TaskActive:
    """Change: a task is to be launched."""

    task: TaskKey


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


Change = EventRaised | TaskReady | TaskSkipped | TaskActive | TaskLaunched | TaskEnded

_SKIPPED_THROUGH = (
    StepTriggers.at_ready,
    StepTriggers.at_active,
    StepTriggers.at_success,
    StepTriggers.at_complete,
)


class Plan:
    """The state of one recovery of a run, and the rules by which it advances.

    Args:
        flow: the definitions; they may grow between two calls of `advance`.
        previous: how each task was left that earlier recoveries of this run recorded.
        max_concurrent: how many tasks may be active at once.
        stop_on_exception: what holds for a step that does not say it itself.
    """

    def __init__(
        self,
        flow: Flow,
        previous: Mapping[TaskKey, Left],
        max_concurrent: int,
        *,
        stop_on_exception: bool,
    ) -> None:
        self._flow = flow
        self._previous = previous
        self._max_concurrent = max_concurrent
        self._stop_on_exception = stop_on_exception
        # What keeps from doing a thing twice is all that is kept of what has ended.
        self._raised: set[tuple[str, Sequence]] = set()
        self._created: set[TaskKey] = set()
        self._progress: dict[tuple[str, Sequence], dict[str | int, int]] = {}
        self._ready: deque[TaskKey] = deque()
        self._active: set[TaskKey] = set()
        self._leading_on = 0
        self._agenda: deque[EventRaised] = deque()
        self._noted: deque[EventRaised] = deque()
        self._changes: list[Change] = []
        self._stopping = False
        self.all_handled = True
        """Whether every failure so far was handled by its step's triggers."""

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing may start."""
        return not self._active and (self._stopping or not self._ready)

    @property
    def waiting(self) -> int:
        """How many tasks are ready and have not started."""
        return len(self._ready)

    @property
    def about_to_start(self) -> int:
        """How many tasks may start when those that are active end."""
        if self._stopping:
            return 0
        return min(len(self._active), len(self._ready) + self._leading_on)

    @property
    def stopping(self) -> bool:
        """Whether an unhandled failure, or a call of `stop`, keeps tasks from starting."""
        return self._stopping

    def stop(self) -> None:
        """Let no more tasks start."""
        self._stopping = True

    def resume(self) -> None:
        """Let ready tasks start again after a failure or a call has stopped them."""
        self._stopping = False

    def note(self, triggers: Iterable[Trigger]) -> list[Change]:
        """Return the changes of raising events; what follows from them waits for `advance`.

        So a trigger can be recorded before the flow is fully defined.
        """
        for trigger in triggers:
            change = EventRaised(trigger.event, trigger.sequence, trigger.cause)
            if self._raise(change):
                self._noted.append(change)
        return self._take_changes()

    def advance(self, arrivals: Iterable[Trigger | TaskEnded]) -> list[Change]:
        """Return all changes that follow from what has come in, in the order of their reasons."""
        while self._noted:
            self._follow(self._noted.popleft())
            self._settle()
        for arrival in arrivals:
            if isinstance(arrival, Trigger):
                self._agenda.append(EventRaised(arrival.event, arrival.sequence, arrival.cause))
            else:
                self._end(arrival)
            self._settle()
        while self._ready and not self._stopping and len(self._active) < self._max_concurrent:
            self._start(self._ready.popleft())
            self._settle()
        return self._take_changes()

    def foresee(
        self, triggers: Iterable[Trigger], fails: Callable[[TaskKey], bool], *, stopped: bool
    ) -> list[Change]:
        """Return the changes that would follow, until nothing is left; this plan stays as it is.

        Args:
            triggers: what would come in first.
            fails: tells which of the tasks that run would fail.
            stopped: whether nothing would start.
        """
        shared = {id(what): what for what in (self._flow, self._previous)}
        plan = copy.deepcopy(self, shared)
        plan.resume()
        if stopped:
            plan.stop()
        changes = plan.note(triggers) + plan.advance([])
        for change in changes:  # which grows meanwhile
            if isinstance(change, TaskActive):
                ended = failure("") if fails(change.task) else Outcome(TaskStatus.success, "")
                changes += plan.advance([TaskEnded(change.task, ended)])
        return changes

    def how_left(self, task: TaskKey) -> TaskStatus | None:
        """Return the status in which earlier recoveries left a task; None for a new one."""
        left = self._previous.get(task)
        return None if left is None else left.status

    def _take_changes(self) -> list[Change]:
        changes, self._changes = self._changes, []
        return changes

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
            by_association = Cause(CauseKind.association, name)
            for target in targets:
                if isinstance(target, Event):
                    self._agenda.append(EventRaised(target.name, sequence, by_association))
                else:
                    self._create(target, sequence, by_association)
        for event in self._flow.expressed.get(name, ()):
            if (event.name, sequence) not in self._raised and self._holds(event, name, sequence):
                cause = Cause(CauseKind.expression, name, self._flow.gates[event.name].text)
                self._agenda.append(EventRaised(event.name, sequence, cause))

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
        else:
            self._changes.append(TaskReady(task, cause, replay))
            self._ready.append(task)
            self._transition(step, sequence, StepTriggers.at_ready)

    def _start(self, task: TaskKey) -> None:
        step = self._flow.steps[task.step]
        self._active.add(task)
        self._leading_on += step.leads_on
        self._changes.append(TaskActive(task))
        self._transition(step, task.sequence, StepTriggers.at_active)

    def _end(self, change: TaskEnded) -> None:
        self._active.remove(change.task)
        self._changes.append(change)
        step = self._flow.steps[change.task.step]
        self._leading_on -= step.leads_on
        if change.outcome.status is TaskStatus.success:
            end = StepTriggers.at_success
        else:
            end = StepTriggers.at_failure
            self._fail(step)
        self._transition(step, change.task.sequence, end, StepTriggers.at_complete)

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
