"""The facade: the interface that a program uses. It checks who may call, and delegates."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sys
import threading
import weakref
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventor.errors import (
    ConfigError,
    DefinitionError,
    RecoveryError,
    ResultError,
    StoreError,
    TriggerError,
    UsageError,
)
from eventor.hooks import Announcer
from eventor.logs import Journal, file_name
from eventor.look import live
from eventor.loop import Inbox, Loop
from eventor.requests import Requests
from eventor.rules import check, drift
from eventor.rules.config import (
    is_worker_class,
    read_config,
    read_level,
    read_max_loops,
    read_progress,
    read_run_name,
    read_word,
    unknown,
)
from eventor.rules.flow import Event, Flow, Step, read_sequence
from eventor.rules.plan import EventRaised, Plan, TaskActive, TaskKey, Trigger, is_skip
from eventor.steps import inside
from eventor.steps.launch import Launcher, most_at_once
from eventor.steps.signals import Signals
from eventor.storage.backend import Access
from eventor.storage.history import History
from eventor.storage.ledger import Beginning, begin_recovery, begin_run, continue_run
from eventor.storage.location import locate
from eventor.storage.owner import has_ended
from eventor.storage.store import Store
from eventor.types import (
    Cause,
    CauseKind,
    Finding,
    FindingKind,
    PlannedTask,
    PlannedTrigger,
    Preview,
    RaisedEvent,
    RunMode,
    Sequence,
    StepReplay,
    StepTriggers,
    StoredResult,
    Task,
    TaskStatus,
    ThingKind,
    Why,
    storable,
)
from eventor.words import number_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType, TracebackType
    from typing import Self

    from eventor.look.draw import Graph
    from eventor.look.live import View
    from eventor.rules.expr import ExprLike
    from eventor.steps.submit import Submitter
    from eventor.storage.ledger import Ledger


_KEEPER_SECONDS = 10.0

_CALL = Cause(CauseKind.call)

_WARNED = 20
"""How many findings of a check are logged one by one."""


class Eventor:
    """A flow of events and steps, and one run of it (interface: *Eventor Interface*).

    Args:
        name: names the run in its store; a recovery takes up the latest run of that name.
        store: where the run is kept: the path of a SQLite file, ':memory:', or the SQLAlchemy URL
            of a SQLite file or of a PostgreSQL database, 'postgresql+psycopg://...'. By default the
            path of the calling script, with .db in place of .py.
        run_mode: `RunMode.restart` begins a new run, `RunMode.recover` a new recovery of the
            latest run; `RunMode.continue_` goes on with the latest recovery of the latest run
            where it stands, or begins a run if there is none.
        recovery_run: in `RunMode.recover`, the recovery to start from; by default the latest.
        logging_level: what is below it goes to the debug log file alone.
        config: see `eventor.config.Config` for the keys and their defaults.

    Raises:
        ConfigError: an argument or a config key is unknown or unusable.
        StoreError: the store cannot be used; it is left as it was.
        RecoveryError: there is no such run or recovery.
        OwnershipError: another live Eventor owns the run.
    """

    def __init__(
        self,
        name: str = "",
        store: str | os.PathLike[str] = "",
        run_mode: RunMode = RunMode.restart,
        recovery_run: int | None = None,
        logging_level: int = logging.INFO,
        config: Mapping[str, Any] = {},
    ) -> None:
        caller = sys._getframe(1)  # noqa: SLF001 (the store is named after the calling script)
        _refuse_reimport(caller)
        read_run_name(name)
        self._config = read_config(config)
        level = read_level(logging_level)
        mode = read_word(RunMode, run_mode, "run_mode")
        base = _read_recovery_run(recovery_run, mode)
        file = caller.f_globals.get("__file__")
        script = None if file is None else Path(file)
        place = _default_store(script, name) if store == "" else store
        location = locate(place, self._config.schema)
        stem = self._stem = name or (_stem(script) if script else "eventor")

        self._flow = Flow(self._config)
        self._inbox = Inbox()
        self._used: set[int] = set()
        self._next = 1
        self._resumed = False
        self._again: list[Trigger] = []
        self._broken: str | None = None
        self._recorded = -1
        self._checked = False
        self._turns = _Turns()
        self._pid = os.getpid()
        self._journal = _open_journal(level, self._config.logdir, stem)
        access = Access.recover if mode is RunMode.recover else Access.begin
        self._store = Store(location, access, self._config.lease_seconds)
        beginning = Beginning(
            None if script is None else storable(str(script)), self._config.lease_seconds, _now()
        )
        ledger = None
        try:
            if mode is RunMode.recover:
                ledger = begin_recovery(self._store, name, base, beginning)
            elif mode is RunMode.continue_:
                ledger = continue_run(self._store, name, beginning)
            else:
                ledger = begin_run(self._store, name, beginning)
            self._ledger = ledger
            self._announcer = Announcer(
                self._config.on_transition, ledger.run_id, ledger.recovery, name, self._journal
            )
            _await_keeper(ledger)
            self._left = ledger.left()
            self._standing = ledger.standing()
            limit = self._config.max_concurrent
            self._plan = Plan(
                self._flow,
                self._left,
                limit if limit >= 1 else self._no_limit(),
                stop_on_exception=self._config.stop_on_exception,
                resources=self._config.resources,
                due=ledger.delays(),
                standing=self._standing,
            )
        except BaseException:
            if ledger is not None:
                with contextlib.suppress(StoreError):
                    ledger.release(_now())
            self._store.close()
            raise
        self._release = weakref.finalize(
            self, _release, self._pid, self._ledger, self._store, self._journal, self._turns
        )
        self._journal.say(logging.INFO, f"Eventor store file: {location}", "__init__")

    def __repr__(self) -> str:
        return f"<Eventor run {self.run_id}.{self.recovery} in {self._store.location}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def run_id(self) -> int:
        """The number of this run in its store."""
        return self._ledger.run_id

    @property
    def recovery(self) -> int:
        """The number of this recovery in its run; 0 is the initial run."""
        return self._ledger.recovery

    def add_event(self, name: str, expr: ExprLike | None = None) -> Event:
        """Define an event (interface: `add_event`).

        Args:
            name: unique among the events of this Eventor.
            expr: what raises it by itself: an event, a tuple or list of expressions (all of
                them), `or_(...)` (any of them), `and_(...)`, or `&` and `|` between them.

        Returns:
            The event, for expressions, associations and the triggers of steps.

        Raises:
            DefinitionError: the name is taken or unusable, or the expression is.
            UsageError: this Eventor is closed, or was made by another process.
        """
        self._check_usable()
        return self._flow.add_event(name, expr)

    def add_step(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = {},
        triggers: Mapping[StepTriggers, Event | Iterable[Event]] = {},
        recovery: Mapping[TaskStatus | StepTriggers | str, StepReplay] = {},
        config: Mapping[str, Any] = {},
    ) -> Step:
        """Define a step (interface: `add_step`).

        Args:
            name: unique among the steps of this Eventor.
            func: any callable; a coroutine that it returns is run to its end.
            args: the values with which it is called.
            kwargs: the keyword arguments with which it is called.
            triggers: for a transition of its tasks, the event or events to raise.
            recovery: for the status in which an earlier recovery left a task, whether to rerun
                or to skip it. `complete` stands for success and failure.
            config: see `eventor.config.StepConfig` for the keys.

        Returns:
            The step, for associations.

        Raises:
            DefinitionError: the name is taken or unusable, or something else that was given.
            ConfigError: a config key is unknown, or its value unusable, also by what the Eventor's
                `task_construct` can do.
            UsageError: this Eventor is closed, or was made by another process.
        """
        self._check_usable()
        return self._flow.add_step(name, func, args, kwargs, triggers, recovery, config)

    def step(
        self,
        after: ExprLike | None = None,
        *,
        name: str | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] = {},
        triggers: Mapping[StepTriggers, Event | Iterable[Event]] = {},
        recovery: Mapping[TaskStatus | StepTriggers | str, StepReplay] = {},
        config: Mapping[str, Any] = {},
    ) -> Callable[[Callable[..., Any]], Step]:
        """Make a function a step, and say what leads to it: `add_step` and `add_assoc` in one.

        It is a decorator, written `@ev.step(after=...)` or `@ev.step()`. What bears the function's
        name is then the step; called, it calls the function.

        Args:
            after: the event that leads to it, or an expression, for which the event
                `<step>.after` is made; None for nothing so far.
            name: as in `add_step`; by default the function's `__name__`.
            args: as in `add_step`.
            kwargs: as in `add_step`.
            triggers: as in `add_step`.
            recovery: as in `add_step`.
            config: as in `add_step`.

        Returns:
            What makes a function a step, and raises the errors of `add_step`. After an error
            nothing is defined.

        Raises:
            DefinitionError: `after` is no event or expression of this Eventor.
            UsageError: this Eventor is closed, or was made by another process.
        """
        self._check_usable()
        what = "what a step is to come after"
        if callable(after):
            raise DefinitionError(
                f"{what} is {after!r}; expected an event, such as the `success` of a step, or an "
                "expression; without one, write `@ev.step()`"
            )
        leading = None if after is None else self._flow.own_expression(after, what)

        def define(func: Callable[..., Any]) -> Step:
            self._check_usable()
            return self._flow.add_step_after(
                leading, name, func, args, kwargs, triggers, recovery, config
            )

        return define

    def add_assoc(self, event: Event, *assocs: Event | Step, delay: float = 0) -> None:
        """Let an event lead to events and steps (interface: `add_assoc`).

        Args:
            event: the event.
            assocs: what it leads to.
            delay: seconds from the raise of the event to what follows. The time at which that is
                due is kept in the store, so that it stays the same in a recovery.

        Raises:
            DefinitionError: one of them is no event or step of this Eventor, or there is none; or
                the delay is no number of seconds.
            UsageError: this Eventor is closed, or was made by another process.
        """
        self._check_usable()
        self._flow.add_assoc(event, *assocs, delay=delay)

    def trigger_event(self, event: Event, sequence: Sequence | None = None) -> Sequence:
        """Raise an event (interface: `trigger_event`); once per sequence, again is a no-op.

        What follows from it happens in `ev()`. It is recorded when `ev()` begins, or before, when
        this Eventor is read or closed. In a step of this Eventor it is `CurrentStep.trigger`.

        Args:
            event: the event.
            sequence: an int or a str, and `1` is not `"1"`; all that derives from the event
                carries it. None is the next positive integer that was not used here yet; in a step
                of this Eventor, the step's own sequence.

        Returns:
            The sequence.

        Raises:
            DefinitionError: it is no event of this Eventor.
            TriggerError: the sequence is neither an int nor a str.
            UsageError: this Eventor is closed, or was made by another process.
        """
        step = inside.current_or_none()
        if step is not None and step.is_of(self._flow.events):
            return step.trigger(event, sequence)
        self._check_usable()
        self._check_whole()
        name = self._flow.own_event(event, "the event to trigger").name
        chosen = self._next_sequence() if sequence is None else read_sequence(sequence)
        self._put_triggers(name, [chosen])
        return chosen

    def trigger_events(self, event: Event, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Raise an event in many sequences at once, as many calls of `trigger_event` would.

        They are recorded in one transaction: before this returns, or while `ev()` runs, at its next
        pass.

        Args:
            event: the event.
            sequences: as in `trigger_event`, each an int or a str.

        Returns:
            The sequences.

        Raises:
            DefinitionError: it is no event of this Eventor.
            TriggerError: one of the sequences is neither an int nor a str; none is triggered.
            StoreError: they could not be recorded.
            UsageError: this Eventor is closed, or was made by another process.
        """
        self._check_usable()
        self._check_whole()
        name = self._flow.own_event(event, "the event to trigger").name
        if isinstance(sequences, str | bytes) or not isinstance(sequences, Iterable):
            raise TriggerError(f"the sequences are {sequences!r}; expected an iterable of them")
        chosen = [read_sequence(sequence) for sequence in sequences]
        self._put_triggers(name, chosen)
        self._record_triggers()
        return chosen

    def __call__(self, progress: bool | None = None) -> bool:
        """Run what is triggered until there is nothing to do (interface: `ev()`): `run()`."""
        return self.run(progress=progress)

    def run(self, max_loops: int | None = None, progress: bool | None = None) -> bool:
        """Run what is triggered until there is nothing to do, or a little at a time.

        With the config key `linger` it then waits for triggers for a while. What other processes
        have triggered by `Attached.trigger`, before or meanwhile, is raised too.

        In a recovery, what the recovered run was triggered with is raised again first, unless
        the program has done so already. Called again, it goes on in the same run.

        A SIGINT or SIGTERM stops it as `stop` does, and has its own effect when `ev()` has
        ended, for SIGINT a KeyboardInterrupt. A second one ends the running steps; they stay
        recorded as active, and this Eventor is of no more use but to be read and closed.

        Args:
            max_loops: after so many passes of the loop that have launched something, nothing more
                starts: what runs is let finish and is recorded, and what is ready stays so for the
                next call, or for `RunMode.continue_` or `RunMode.recover`. None is no limit.
            progress: whether to show how far it is, and a summary at the end: in a notebook below
                its cell, else on standard error; where that is no terminal, the summary alone.
                None is to do so, if the extra `cli` is installed, in a notebook, and on a terminal
                if the program has no log handlers of its own.

        Returns:
            Whether every failure in this recovery was handled by its step's own triggers, and
            nothing was left waiting by a stop or by `max_loops`.

        Raises:
            ConfigError: `max_loops` is no whole number above 0, or `progress` is neither True,
                False nor None, or is True without the extra `cli`; or what `task_construct` returns
                is no executor.
            StoreError: something could not be recorded; nothing was launched after that.
            LaunchError: the process that guards the steps cannot be started; or `task_construct`
                has raised instead of making an executor, and nothing was launched.
            OwnershipError: another host has taken over the run, since this Eventor was not heard
                of for longer than its lease; nothing was launched after that.
            RecoveryError: the flow is not what was recorded, and `strict_recovery` is True.
            UsageError: this Eventor is closed, already running, or was made by another process.
        """
        self._check_usable()
        self._check_whole()
        most, wanted = read_max_loops(max_loops), read_progress(progress)
        if not self._turns.take():
            raise UsageError("ev() is running already; it cannot be called again before it ends")
        try:
            # One may have come when the last call was over but for its end.
            self._inbox.forget_signals()
            with (
                Signals(self._inbox.interrupt, self._release_at_end),
                live.shown(
                    wanted,
                    _now,
                    speaks=self._journal.is_alone,
                    shares=bool(self._config.on_transition),
                ) as view,
                contextlib.ExitStack() as viewed,
            ):
                if view is not None:
                    viewed.enter_context(self._announcer.telling(view.heed))
                    viewed.enter_context(self._journal.above(view.erase))
                return self._run(most, view)
        finally:
            self._turns.give_back()

    def preview(self, failing: Iterable[Step | str] = ()) -> Preview:
        """Tell what `ev()` would do with what is recorded now; nothing is written or run.

        Args:
            failing: the steps, as themselves or by name, that are taken to fail; all others are
                taken to end well.

        Raises:
            DefinitionError: there is no such step.
            StoreError: the store cannot be read.
            UsageError: this Eventor is closed, running, or was made by another process.
        """
        self._check_usable()
        self._check_whole()
        if isinstance(failing, str | Step):
            failing = (failing,)
        failed = {self._step_name(step) for step in failing}
        if not self._turns.take():
            raise UsageError("ev() is running; what it would do cannot be told before it ends")
        try:
            again, changed = (self._again, []) if self._resumed else self._look_back()
            requests = Requests(self._flow, self._ledger, 0)
            asked = requests.look(_now())
            changes = self._plan.foresee(
                [*self._inbox.peek(), *self._defined(again)],
                asked,
                lambda task: task.step in failed,
                _now(),
                stopped=(self._inbox.stopped_by or requests.stopped_by) is not None,
            )
        finally:
            self._turns.give_back()
        return Preview(
            tuple(self._planned(c.task) for c in changes if isinstance(c, TaskActive)),
            tuple(self._planned(c.task) for c in changes if is_skip(c)),
            tuple(
                PlannedTrigger(c.event, c.sequence, int(c.cause.detail or 0))
                for c in changes
                if isinstance(c, EventRaised) and c.cause.kind is CauseKind.recovery
            ),
            tuple(changed),
        )

    def check(self) -> list[Finding]:
        """Look for what is wrong with the flow as it is defined by now; nothing is run.

        Found are steps to which no event leads, events that nothing raises, expressions that can
        never hold, and steps that use a result which cannot be there by then. It is taken that an
        event which the flow itself can raise is triggered by nobody else, unless it was already.
        `ev()` logs what is found, as warnings, at its first call; of an event that nothing in the
        flow raises it does so at its end, if neither a step nor somebody outside has by then.

        Returns:
            What was found; empty for a flow with which nothing is seen to be wrong.

        Raises:
            StoreError: the store cannot be read.
            UsageError: this Eventor is closed, running, or was made by another process.
        """
        self._check_usable()
        if not self._turns.take():
            raise UsageError("ev() is running; its flow cannot be checked before it ends")
        try:
            return self._findings()
        finally:
            self._turns.give_back()

    def graph(self, *, events: str = "all") -> Graph:
        """Draw the flow as it is defined by now, with how things stand in this recovery.

        Args:
            events: *all*, or *few* to leave out those that only link a step, or an expression, to
                what follows.

        Returns:
            The graph, which a notebook shows, and which `Graph.save` writes to a file.

        Raises:
            DrawError: `events` is another.
            StoreError: the store cannot be read.
            UsageError: this Eventor is closed, or was made by another process.
        """
        from eventor.look.draw import Graph  # noqa: PLC0415 (few programs draw, and all would load it)

        self._check_usable()
        self._record_triggers()
        title = f"{self._stem}, run {self.run_id}.{self.recovery}"
        return Graph(self._flow.definition(), self._ledger.count(), events=events, title=title)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Return what a notebook shows: the flow's graph if it can be drawn, and text."""
        try:
            return {**self.graph()._repr_mimebundle_(include, exclude), "text/plain": repr(self)}
        except Exception:  # a closed one, for example, is still shown as text
            return {"text/plain": repr(self)}

    def stop(self) -> None:
        """Let `ev()` start nothing more: what runs finishes and is recorded, then it returns.

        Tasks that are ready stay so, for the next call of `ev()` or for a recovery. It may be
        called from any thread, and from a signal handler. While `ev()` does not run, it is kept
        for the next call. A first SIGINT or SIGTERM while `ev()` runs in the main thread does the
        same; a second one ends the running steps. Another process asks for it by `Attached.stop`.

        Raises:
            UsageError: this Eventor was made by another process; a step may trigger an event.
        """
        self._check_process()
        self._inbox.stop()

    def tasks(
        self,
        step: Step | str | None = None,
        sequence: Sequence | None = None,
        status: TaskStatus | None = None,
    ) -> list[Task]:
        """Return the tasks of this recovery, in the order in which they became ready.

        Args:
            step: only those of this step, given as itself or by its name.
            sequence: only those of this sequence.
            status: only those that stand there.

        Raises:
            DefinitionError: there is no such step.
            TriggerError: the sequence is neither an int nor a str.
            ConfigError: there is no such status.
            StoreError: the store cannot be read.
            UsageError: this Eventor is closed, or was made by another process.
        """
        self._check_usable()
        self._record_triggers()
        return self._ledger.tasks(
            None if step is None else self._step_name(step),
            None if sequence is None else read_sequence(sequence),
            None if status is None else read_word(TaskStatus, status, "status"),
        )

    def events(
        self, event: Event | str | None = None, sequence: Sequence | None = None
    ) -> list[RaisedEvent]:
        """Return the events that this recovery has raised, in that order.

        Args:
            event: only this event, given as itself or by its name.
            sequence: only those of this sequence.

        Raises:
            DefinitionError: there is no such event.
            TriggerError: the sequence is neither an int nor a str.
            StoreError: the store cannot be read.
            UsageError: this Eventor is closed, or was made by another process.
        """
        self._check_usable()
        self._record_triggers()
        return self._ledger.events(
            None if event is None else self._event_name(event),
            None if sequence is None else read_sequence(sequence),
        )

    def result(self, step: Step | str, sequence: Sequence) -> Any:
        """Return what a step has returned in a sequence.

        Where this recovery has not begun that task, it is what the task returned in those on which
        this one is based. It is unpickled at each call.

        Args:
            step: the step, given as itself or by its name.
            sequence: the sequence.

        Raises:
            ResultError: there is no result, for which the message gives the reason, or it cannot
                be unpickled here.
            DefinitionError: there is no such step.
            TriggerError: the sequence is neither an int nor a str.
            StoreError: the store cannot be read.
            UsageError: this Eventor is closed, or was made by another process.
        """
        self._check_usable()
        task = TaskKey(self._step_name(step), read_sequence(sequence))
        found = self._ledger.results([task.step], task.sequence, earlier=True)[task.step]
        if not isinstance(found, StoredResult):
            raise ResultError(f"there is no result of {task}, which {found}")
        try:
            return found.load()
        except Exception as error:
            raise ResultError(
                f"the result of {task} cannot be unpickled here: {type(error).__name__}: {error}"
            ) from error

    def why(self, what: Event | Step | str, sequence: Sequence = 1) -> Why:
        """Return why an event was raised or a step has run in this recovery, or why not.

        What has happened is told by the chain of its causes, what has not by what it waits for.

        Args:
            what: the event or the step, given as itself or by its name; by the name of both, the
                step.
            sequence: the sequence; the first that `trigger_event` gives by itself, by default.

        Raises:
            DefinitionError: there is no such event or step.
            TriggerError: the sequence is neither an int nor a str.
            StoreError: the store cannot be read.
            UsageError: this Eventor is closed, or was made by another process.
        """
        self._check_usable()
        self._record_triggers()
        if isinstance(what, Step):
            name, kind = self._flow.own_step(what, "the step to explain").name, ThingKind.step
        elif isinstance(what, str) and what in self._flow.steps:
            name, kind = what, ThingKind.step
        elif isinstance(what, str) and what not in self._flow.events:
            known = [*self._flow.steps, *self._flow.events]
            raise DefinitionError(f"there is no step or event {what!r}; {unknown(what, known)}")
        else:
            name, kind = self._event_name(what), ThingKind.event
        definition = {kind: list(things) for kind, things in self._flow.definition().items()}
        place = (self.run_id, self.recovery)
        history = History(self._store)
        return history.why(place, name, read_sequence(sequence), kind, definition)

    def close(self) -> None:
        """Record what is still waiting, and release the store; closing twice is a no-op.

        Where even that cannot be recorded, a warning says so: the run can then be recovered by this
        program, and by others once it has ended.

        Raises:
            StoreError: what was waiting could not be recorded; the store is released.
            UsageError: `ev()` is running, or this Eventor was made by another process.
        """
        if not self._release.alive:
            return
        self._check_usable()
        if not self._turns.take():
            raise UsageError("ev() is running; it cannot be closed before it ends")
        self._turns.give_back()
        try:
            self._record_triggers()
        finally:
            self._release()

    def _release_at_end(self) -> None:
        """Release the run before a signal ends this process; `ev()` has done its work."""
        self._release.detach()
        _release(self._pid, self._ledger, self._store, self._journal)

    def _run(self, max_loops: int | None, view: View | None) -> bool:
        if not self._resumed:
            self._resume_run()
        self._raise_again()
        try:
            self._announcer.begin(_now())
            succeeded = self._run_flow(max_loops, view)
        except BaseException as error:
            self._announcer.end(_now(), error)
            raise
        self._announcer.end(_now(), succeeded=succeeded)
        return succeeded

    def _run_flow(self, max_loops: int | None, view: View | None) -> bool:
        doubtful = self._warn_before()
        with contextlib.closing(self._starter(view)) as starter:
            try:
                self._define()
                self._note_triggers()
                self._plan.resume()
                loop = Loop(
                    self._flow,
                    self._plan,
                    self._ledger,
                    self._journal,
                    self._announcer,
                    self._inbox,
                    starter,
                    self._config.sleep_between_loops,
                    self._config.lease_seconds,
                    self._config.linger,
                    _now,
                    (lambda: math.inf) if view is None else view.watch,
                )
                whole = loop.run(max_loops)
                if self._define():
                    self._ledger.record([], _now())
            except BaseException as error:
                self._broken = f"{type(error).__name__}: {error}"
                raise
        if not whole:
            self._broken = f"{self._inbox.cut_by} ended the running steps"
        reason = self._inbox.stopped_by
        self._inbox.forget_stop()
        left = [
            number_of(number, one, many)
            for number, one, many in (
                (self._plan.waiting, "task stays ready", "tasks stay ready"),
                (
                    self._plan.delayed,
                    "delayed association stays due",
                    "delayed associations stay due",
                ),
            )
            if number and self._plan.stopping
        ]
        self._warn_after(doubtful)
        self._report_end(reason, " and ".join(left), paused=loop.paused)
        return whole and self._plan.all_handled and not (left or self._plan.lost)

    def _starter(self, view: View | None) -> Launcher | Submitter:
        """Return what starts the steps; the one place that knows in which ways they may be."""
        construct = self._config.task_construct
        if is_worker_class(construct):
            return Launcher(
                construct,
                self._config.max_tasks_per_child,
                self._flow.steps,
                self._flow.events,
                self.run_id,
                self.recovery,
                self._journal.pass_on,
                (lambda: None) if view is None else view.erase,
            )
        from eventor.steps.submit import Submitter  # noqa: PLC0415 (most programs do without)

        return Submitter(
            construct,
            self._flow.events,
            self.run_id,
            self.recovery,
            self._journal.pass_on,
            self._config.callback_host,
        )

    def _no_limit(self) -> int:
        """Return how many steps may be in flight where there is no limit."""
        return most_at_once() if is_worker_class(self._config.task_construct) else sys.maxsize

    def _findings(self) -> list[Finding]:
        waiting = {trigger.event for trigger in self._inbox.peek()}
        return check.findings(self._flow, waiting | self._ledger.triggered())

    def _warn_before(self) -> list[Finding]:
        """Log what is wrong with the flow, once; return what may prove to be right."""
        if self._checked:
            return []
        self._checked = True
        found = self._findings()
        self._warn(one for one in found if one.kind is not FindingKind.unraised_event)
        return [one for one in found if one.kind is FindingKind.unraised_event]

    def _warn_after(self, doubtful: list[Finding]) -> None:
        """Log which of the events have not been raised after all, by a step or from outside."""
        if doubtful:
            raised = self._plan.raised()
            self._warn(finding for finding in doubtful if finding.name not in raised)

    def _warn(self, findings: Iterable[Finding]) -> None:
        found = list(findings)
        for finding in found[:_WARNED]:
            self._journal.say(logging.WARNING, finding.message, "loop_session_start")
        if len(found) > _WARNED:
            more = number_of(
                len(found) - _WARNED,
                "more warning of this kind is",
                "more warnings of this kind are",
            )
            message = f"{more} in ev.check()"
            self._journal.say(logging.WARNING, message, "loop_session_start")

    def _define(self) -> bool:
        """Have the flow's definition recorded with what comes next, if it has grown."""
        if self._recorded == self._flow.revision:
            return False
        self._recorded = self._flow.revision  # before it is read: another thread may define more
        self._ledger.define(self._flow.definition())
        return True

    def _report_end(self, reason: str | None, left: str, *, paused: bool) -> None:
        if self._broken is not None:
            message = f"Cut short: {self._broken}, which stay active for a recovery"
            self._journal.say(logging.WARNING, message, "loop_session_start")
        elif left and paused and reason is None and self._plan.all_handled:
            message = f"Paused by max_loops: {left} for the next call"
            self._journal.say(logging.INFO, message, "loop_session_start")
        elif left:
            message = f"Stopped by {reason or 'a failure'}: {left} for a recovery"
            self._journal.say(logging.WARNING, message, "loop_session_start")
        self._journal.say(logging.INFO, "Processing finished", "loop_session_start")

    def _resume_run(self) -> None:
        """Take up what the recovered run was triggered with, if the flow is still the same."""
        again, changed = self._look_back()
        if changed:
            message = f"The flow is not what the run has recorded: {'; '.join(changed)}"
            if self._config.strict_recovery:
                raise RecoveryError(f"{message}; nothing has run, since strict_recovery is True")
            self._journal.say(logging.WARNING, message, "loop_session_start")
        self._again = again
        self._resumed = True

    def _raise_again(self) -> None:
        """Raise again what is defined by now; the rest waits, for the flow may grow."""
        for trigger in self._defined(self._again):
            self._inbox.put(trigger)
        self._again = [trigger for trigger in self._again if trigger.event not in self._flow.events]

    def _defined(self, triggers: list[Trigger]) -> list[Trigger]:
        return [trigger for trigger in triggers if trigger.event in self._flow.events]

    def _look_back(self) -> tuple[list[Trigger], list[str]]:
        """Return the triggers to raise again, and what has changed in the flow."""
        triggers = self._ledger.triggers()
        before = self._ledger.definition_before()
        changed = [] if before is None else drift.differences(before, self._flow.definition())
        if changed or before is None:  # else it was known before, and the run went on without
            changed += drift.lost_triggers(triggers, self._flow.events)
            standing = {} if self._standing is None else self._standing.tasks
            changed += drift.lost_tasks({**self._left, **standing}, self._flow.steps)
        return triggers, changed

    def _planned(self, task: TaskKey) -> PlannedTask:
        left = self._plan.how_left(task)
        replay = None if left is None else self._flow.steps[task.step].recovery[left]
        if left is TaskStatus.ready and self._plan.stands(task):
            replay = None  # it waits on, as if nothing had been
        return PlannedTask(task.step, task.sequence, left, replay)

    def _record_triggers(self) -> None:
        """Record what is waiting in the inbox; while `ev()` runs, it does so itself."""
        with self._turns.look() as may:
            if not may or self._broken is not None:
                return
            try:
                while self._inbox and not self._is_refused():  # a hook may trigger more
                    self._note_triggers()
            except BaseException as error:
                self._broken = f"{type(error).__name__}: {error}"
                raise

    def _note_triggers(self) -> None:
        now = _now()
        changes = self._plan.note(self._inbox.take(), now)
        if changes:
            self._ledger.record(changes, now)
            self._announcer.tell(changes, now)
        for change in changes:
            self._journal.say(logging.DEBUG, repr(change), "trigger_event")

    def _is_refused(self) -> bool:
        """Whether `ev()` would refuse the flow; its triggers are then not recorded."""
        return self._config.strict_recovery and not self._resumed and bool(self._look_back()[1])

    def _put_triggers(self, event: str, sequences: list[Sequence]) -> None:
        self._used.update(sequence for sequence in sequences if isinstance(sequence, int))
        self._inbox.put(*(Trigger(event, sequence, _CALL) for sequence in sequences))

    def _next_sequence(self) -> int:
        while self._next in self._used:
            self._next += 1
        return self._next

    def _step_name(self, step: Step | str) -> str:
        if not isinstance(step, str):
            return self._flow.own_step(step, "the step to look up").name
        return _known(step, "step", self._flow.steps)

    def _event_name(self, event: Event | str) -> str:
        if not isinstance(event, str):
            return self._flow.own_event(event, "the event to look up").name
        return _known(event, "event", self._flow.events)

    def _check_usable(self) -> None:
        self._check_process()
        if not self._release.alive:
            raise UsageError(f"{self!r} is closed")

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise UsageError(
                f"{self!r} belongs to process {self._pid} and cannot be used in another "
                f"(here {os.getpid()}), for example inside a step"
            )

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise UsageError(
                f"{self!r} was cut short ({self._broken}) and cannot go on; "
                "close it and recover the run with RunMode.recover"
            )


class _Turns:
    """Who has the run: a call of `ev()` or the like, or for a moment somebody who looks at it."""

    def __init__(self) -> None:
        self._running = threading.Lock()
        self._looking = threading.RLock()  # a signal handler may look in the middle of a look
        self._looks = False

    @property
    def taken(self) -> bool:
        """Whether a call of `ev()` has it."""
        return self._running.locked()

    def take(self) -> bool:
        """Have it until it is given back, if nobody else has; who only looks is waited for."""
        with self._looking:
            return not self._looks and self._running.acquire(blocking=False)

    def give_back(self) -> None:
        """Let others have it."""
        self._running.release()

    @contextlib.contextmanager
    def look(self) -> Iterator[bool]:
        """Have it for a moment; tell whether nobody else has."""
        with self._looking:
            if self._looks or self.taken:
                yield False
                return
            self._looks = True
            try:
                yield True
            finally:
                self._looks = False


def _now() -> datetime:
    return datetime.now(UTC)


def _open_journal(level: int, logdir: str, stem: str) -> Journal:
    try:
        return Journal(level, logdir, stem)
    except OSError as error:
        raise ConfigError(
            f"logdir is {logdir!r}, and the path to it is unknown: {error}"
        ) from error


def _release(
    pid: int,
    ledger: Ledger,
    store: Store,
    journal: Journal,
    turns: _Turns | None = None,
) -> None:
    """Let go of what an Eventor holds; a forked process has nothing of it.

    A program that ends while `ev()` runs in a thread owns its run until it is dead, and its keeper
    then ends the steps.
    """
    if os.getpid() != pid or (turns is not None and turns.taken):
        return
    try:
        ledger.release(_now())
    except StoreError as error:
        message = f"Others can recover run {ledger.run_id} once this program has ended: {error}"
        journal.say(logging.WARNING, message, "__init__")
    store.close()
    journal.close()


def _await_keeper(ledger: Ledger) -> None:
    """Wait until what a dead owner left running is ended, which takes milliseconds."""
    keeper = ledger.keeper_before
    if keeper is not None and not has_ended(keeper, _KEEPER_SECONDS):
        raise RecoveryError(
            f"steps of run {ledger.run_id}, whose owner has died, are still being ended "
            f"by process {keeper.pid} of this host"
        )


def _refuse_reimport(caller: FrameType) -> None:
    """Refuse to begin a run in a spawned step, which imports the program's script anew."""
    if caller.f_globals.get("__name__") == "__mp_main__" and caller.f_code.co_name == "<module>":
        raise UsageError(
            "this script is imported by the process of a spawned step; put what makes and runs "
            "the Eventor under `if __name__ == '__main__':`"
        )


def _read_recovery_run(given: object, mode: RunMode) -> int | None:
    if given is None:
        return None
    if not isinstance(given, int) or isinstance(given, bool) or given < 0:
        raise RecoveryError(
            f"recovery_run is {given!r}; expected the number of a recovery, from 0 on"
        )
    if mode is not RunMode.recover:
        raise RecoveryError(f"recovery_run is {given!r}, which needs run_mode=RunMode.recover")
    return int(given)


def _default_store(script: Path | None, name: str) -> Path:
    """Return the path of the calling script with .db in place of .py."""
    if script is not None:
        return script.with_name(f"{_stem(script)}.db")
    return Path(f"{file_name(name) or 'eventor'}.db")


def _stem(script: Path) -> str:
    return re.sub(r"\.py[wc]?$", "", script.name)


def _known(name: str, kind: str, known: Mapping[str, object]) -> str:
    if name not in known:
        raise DefinitionError(f"there is no {kind} {name!r}; {unknown(name, list(known))}")
    return name
