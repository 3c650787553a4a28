"""The hooks of a program: told of each transition, once, when it is recorded and in that order.

A hook that raises is told of in the log, once, and touches neither the run nor other hooks.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from typing import TYPE_CHECKING, Any

from eventor.rules.plan import (
    EventRaised,
    TaskActive,
    TaskEnded,
    TaskInterrupted,
    TaskKey,
    TaskReady,
    TaskRetried,
    TaskSkipped,
    TaskWithdrawn,
    is_skip,
)
from eventor.steps.task import describe
from eventor.types import TaskStatus, Transition, TransitionKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from datetime import datetime

    from eventor.logs import Journal
    from eventor.rules.config import Hook
    from eventor.rules.plan import Change, TaskLaunched
    from eventor.types import Outcome

_ENDS = {
    TaskStatus.success: TransitionKind.task_success,
    TaskStatus.failure: TransitionKind.task_failure,
}


class Announcer:
    """Tells hooks what has become of one recovery of a run.

    Args:
        hooks: what is called, in this order.
        run_id: the run.
        recovery: its recovery.
        run_name: the name of the run.
        journal: where it is said that a hook has raised.
    """

    def __init__(
        self, hooks: Iterable[Hook], run_id: int, recovery: int, run_name: str, journal: Journal
    ) -> None:
        self._hooks = list(hooks)
        self._failed: list[Hook] = []
        self._run_id = run_id
        self._recovery = recovery
        self._run_name = run_name
        self._journal = journal
        self._attempts: dict[TaskKey, int] = {}
        self._pids: dict[TaskKey, int] = {}

    @contextlib.contextmanager
    def telling(self, hook: Hook) -> Iterator[None]:
        """Tell another one too, before all others."""
        self._hooks.insert(0, hook)
        try:
            yield
        finally:
            del self._hooks[0]

    def begin(self, now: datetime) -> None:
        """Tell that a call of `ev()` begins."""
        self._call(TransitionKind.run_started, now)

    def note(self, launched: TaskLaunched) -> None:
        """Know in which process a task runs, of which it is told with what comes next of it."""
        if self._hooks:
            self._pids[launched.task] = launched.pid

    def tell(self, changes: Iterable[Change], now: datetime) -> None:
        """Tell of changes.

        Args:
            changes: what was recorded, in that order.
            now: the time with which it was recorded.
        """
        if not self._hooks:
            return
        for change in changes:
            if isinstance(change, EventRaised):
                self._call(
                    TransitionKind.event_raised,
                    now,
                    name=change.event,
                    sequence=change.sequence,
                    cause=change.cause,
                )
            elif (found := self._of_task(change)) is not None:
                task, kind, told = found
                self._call(kind, now, name=task.step, sequence=task.sequence, **told)

    def end(
        self, now: datetime, error: BaseException | None = None, *, succeeded: bool = False
    ) -> None:
        """Tell that a call of `ev()` ends: what it returns, or by which error."""
        self._attempts.clear()
        self._pids.clear()
        told = None if error is None else describe(error)
        self._call(TransitionKind.run_ended, now, error=told, succeeded=succeeded)

    def _of_task(self, change: Change) -> tuple[TaskKey, TransitionKind, dict[str, Any]] | None:
        """Return what a change tells of a task; None for what is no transition of one."""
        told: dict[str, Any] = {}
        if isinstance(change, TaskActive):
            kind = TransitionKind.task_active
            self._attempts[change.task] = change.attempt
            told = {"attempt": change.attempt, "pid": self._pids.get(change.task)}
        elif isinstance(change, TaskEnded):
            kind = _ENDS[change.outcome.status]
            told = self._told_of_end(change.task, change.outcome)
        elif isinstance(change, TaskRetried):
            kind = TransitionKind.attempt_failed
            told = self._told_of_end(change.task, change.outcome) | {"due_at": change.due}
        elif isinstance(change, TaskReady):
            kind = TransitionKind.task_ready
            attempt = 0 if change.left is None else change.left.attempt
            told = {"cause": change.cause, "attempt": attempt}
        elif isinstance(change, TaskWithdrawn):
            kind, told = TransitionKind.task_ready, {"attempt": change.attempt}
            del self._attempts[change.task]
            self._pids.pop(change.task, None)
        elif isinstance(change, TaskSkipped):
            kind, told = TransitionKind.task_skipped, {"cause": change.cause}
        elif isinstance(change, TaskInterrupted):
            skips = is_skip(change)
            kind = TransitionKind.task_skipped if skips else TransitionKind.task_ready
        else:
            return None
        return change.task, kind, told

    def _told_of_end(self, task: TaskKey, outcome: Outcome) -> dict[str, Any]:
        return {
            "attempt": self._attempts.pop(task),
            "pid": self._pids.pop(task, None),
            "error": outcome.error,
            "traceback": outcome.traceback,
        }

    def _call(self, kind: TransitionKind, at: datetime, **told: Any) -> None:
        if not self._hooks:
            return
        transition = Transition(kind, at, self._run_id, self._recovery, self._run_name, **told)
        for hook in self._hooks:
            try:
                hook(transition)
            except Exception:
                self._say_failed(hook, transition)

    def _say_failed(self, hook: Hook, transition: Transition) -> None:
        if any(hook is other for other in self._failed):
            return
        self._failed.append(hook)
        name = getattr(hook, "__qualname__", type(hook).__qualname__)
        message = (
            f"The hook {name} has raised upon {transition}; "
            "the run goes on, and more of its errors are not told"
        )
        details = traceback.format_exc().rstrip()
        self._journal.say(logging.WARNING, message, "loop_session_start", details)
