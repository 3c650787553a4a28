"""A run that another program runs, watched as it goes on."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from eventor.errors import StoreError
from eventor.live import Terminal
from eventor.progress import Failure, Progress
from eventor.types import RunStatus, TaskStatus, Transition, TransitionKind
from eventor.words import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TextIO

    from eventor.history import History, Place
    from eventor.types import Recovery, Run, Task

_SECONDS = 0.5
"""How often is looked, at most."""

_SHARE = 10
"""A look takes no more than one of so many parts of the time."""

_KINDS = {
    TaskStatus.ready: TransitionKind.task_ready,
    TaskStatus.active: TransitionKind.task_active,
    TaskStatus.success: TransitionKind.task_success,
    TaskStatus.failure: TransitionKind.task_failure,
}


def progress_of(run: Run, recovery: Recovery, tasks: Iterable[Task]) -> Progress:
    """Return how far a recovery is.

    Args:
        run: its run.
        recovery: the recovery.
        tasks: its tasks.
    """
    progress = Progress()
    here = (run.run_id, recovery.recovery, run.name)
    progress(Transition(TransitionKind.run_started, recovery.began_at, *here))
    for task in sorted(tasks, key=lambda task: task.ended_at or datetime.max.replace(tzinfo=UTC)):
        progress(
            Transition(
                TransitionKind.task_skipped if task.skipped else _KINDS[task.status],
                task.started_at or task.ready_at,
                *here,
                name=task.step,
                sequence=task.sequence,
                attempt=task.attempt,
                error=task.error,
            )
        )
    end = recovery.ended_at or recovery.heard_at
    if recovery.status is not RunStatus.running and end is not None:
        progress(Transition(TransitionKind.run_ended, end, *here))
    return progress


def watch(
    history: History,
    place: Place,
    stream: TextIO,
) -> Recovery:
    """Show how far a run is until it ends: a picture on a terminal, else its failures as they come.

    Args:
        history: of its store.
        place: the numbers of the run and of the recovery.
        stream: where it is shown.

    Returns:
        The recovery as it has ended.

    Raises:
        StoreError: the store cannot be read, or has another run in the place of that.
    """
    terminal = Terminal(stream) if stream.isatty() else None
    told: set[Failure] = set()
    watched = None
    try:
        while True:
            began = time.monotonic()
            run, recovery = history.at(place)
            known = (run.name, run.began_at, recovery.began_at)
            if (watched := watched or known) != known:
                raise StoreError(
                    f"the store {history.location} has another run {run.run_id}.{recovery.recovery}"
                    f" than the one that was watched: it began at {recovery.began_at:%F %T} UTC"
                )
            progress = progress_of(run, recovery, history.tasks(*place))
            if terminal is None:
                for failure in progress.failures:
                    if failure not in told:
                        told.add(failure)
                        _say(stream, f"failed: {failure.task}: {failure.error}")
            else:
                terminal.draw(progress, datetime.now(UTC))
            if recovery.status is not RunStatus.running:
                break
            took = time.monotonic() - began
            time.sleep(max(_SECONDS, took * _SHARE))
    finally:
        if terminal is not None:
            terminal.erase()
            terminal.close()
    _say(stream, f"{progress.summary(datetime.now(UTC))}: {recovery.status}")
    return recovery


def _say(stream: TextIO, line: str) -> None:
    stream.write(f"{one_line(line)}\n")
    stream.flush()
