"""The view of a run from another process: what it asks of it, and what it reads."""

from __future__ import annotations

import os
import weakref
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from eventor.errors import DefinitionError, RecoveryError, UsageError
from eventor.rules import drift
from eventor.rules.config import read_run_name, read_word
from eventor.rules.flow import read_sequence
from eventor.storage.backend import Access
from eventor.storage.history import History
from eventor.storage.location import locate
from eventor.storage.owner import process_of
from eventor.storage.store import Store
from eventor.types import RaisedEvent, Run, Sequence, Task, TaskStatus

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from eventor.storage.history import Place


def attach(store: str | os.PathLike[str], name: str = "") -> Attached:
    """Open a store for its runs of a name, which this or another program runs or has run.

    Args:
        store: as in `Eventor`; it has to exist, and ':memory:' is of its own program alone.
        name: the name of the runs.

    Raises:
        ConfigError: the name is no str of printable characters.
        StoreError: the store cannot be used, or is of an earlier schema; it is left as it was.
        RecoveryError: there is no such store, or no run of that name in it.
    """
    read_run_name(name)
    opened = Store(locate(store), Access.attach)
    try:
        _find(opened, name)
        return Attached(opened, name)
    except BaseException:
        opened.close()
        raise


class Attached:
    """The runs of one name in a store, as `attach` returns them.

    Each call is about the run that is the latest by then, so a program may stay attached while
    others are begun. It may be used by any thread, and is a context manager that closes it.

    Args:
        store: the open store; it is closed with this.
        name: the name of the runs.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._process = process_of(os.getpid())
        self._close = weakref.finalize(self, _close, store, self._process.pid)

    def __repr__(self) -> str:
        return f"<Attached to runs named {self._name!r} in {self._store.location}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def trigger(self, event: str, sequence: Sequence) -> bool:
        """Ask the latest run to raise an event; this is recorded when it returns.

        A live run takes it up within its `sleep_between_loops` while `ev()` runs, else when `ev()`
        is called next. If it ends before, or has ended, the next recovery of that run does so. An
        event that is raised in that sequence already is not raised again.

        Args:
            event: the event's name.
            sequence: an int or a str, as in `Eventor.trigger_event`.

        Returns:
            Whether the run has a live owner; if not, the trigger is kept for its next recovery.

        Raises:
            DefinitionError: the run has recorded its definition, and has no such event.
            TriggerError: the sequence is neither an int nor a str.
            RecoveryError: there is no run of that name any more.
            StoreError: it could not be recorded.
            UsageError: this is closed, or was made by another process.
        """
        self._check_usable()
        sequence = read_sequence(sequence)
        run_id, _ = _find(self._store, self._name)
        event = self._known(run_id, "event", event)
        return self._store.ask_to_trigger(run_id, event, sequence, self._process, _now())

    def stop(self) -> bool:
        """Ask the live owner of the latest run to stop, as `Eventor.stop` does.

        Returns:
            Whether there is one; if not, nothing is recorded, and no recovery will be stopped.

        Raises:
            RecoveryError: there is no run of that name any more.
            StoreError: it could not be recorded.
            UsageError: this is closed, or was made by another process.
        """
        self._check_usable()
        run_id, _ = _find(self._store, self._name)
        return self._store.ask_to_stop(run_id, self._process, _now())

    def runs(self) -> list[Run]:
        """Return all runs of that name, with their recoveries, from the first to the latest.

        Raises:
            StoreError: the store cannot be read.
            UsageError: this is closed, or was made by another process.
        """
        self._check_usable()
        return History(self._store).runs(self._name)

    def tasks(
        self,
        step: str | None = None,
        sequence: Sequence | None = None,
        status: TaskStatus | None = None,
        run_id: int | None = None,
        recovery: int | None = None,
    ) -> list[Task]:
        """Return the tasks of a recovery, in the order in which they became ready.

        Args:
            step: only those of the step of this name.
            sequence: only those of this sequence.
            status: only those that stand there.
            run_id: the run; the latest by default.
            recovery: the recovery of that run; its latest by default.

        Raises:
            DefinitionError: the run has recorded its definition, and has no such step.
            TriggerError: the sequence is neither an int nor a str.
            ConfigError: there is no such status.
            RecoveryError: there is no such run of that name, or no such recovery of it.
            StoreError: the store cannot be read.
            UsageError: this is closed, or was made by another process.
        """
        of_run, of_recovery = self._find(run_id, recovery)
        return self._store.tasks(
            of_run,
            of_recovery,
            None if step is None else self._known(of_run, "step", step),
            None if sequence is None else read_sequence(sequence),
            None if status is None else read_word(TaskStatus, status, "status"),
        )

    def events(
        self,
        event: str | None = None,
        sequence: Sequence | None = None,
        run_id: int | None = None,
        recovery: int | None = None,
    ) -> list[RaisedEvent]:
        """Return the events that a recovery has raised, in that order.

        Args:
            event: only the event of this name.
            sequence: only those of this sequence.
            run_id: the run; the latest by default.
            recovery: the recovery of that run; its latest by default.

        Raises:
            DefinitionError: the run has recorded its definition, and has no such event.
            TriggerError: the sequence is neither an int nor a str.
            RecoveryError: there is no such run of that name, or no such recovery of it.
            StoreError: the store cannot be read.
            UsageError: this is closed, or was made by another process.
        """
        of_run, of_recovery = self._find(run_id, recovery)
        return self._store.events(
            of_run,
            of_recovery,
            None if event is None else self._known(of_run, "event", event),
            None if sequence is None else read_sequence(sequence),
        )

    def close(self) -> None:
        """Close the store; closing twice is a no-op."""
        self._close()

    def _find(self, run_id: int | None, recovery: int | None) -> Place:
        self._check_usable()
        for what, number in (("run_id", run_id), ("recovery", recovery)):
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise RecoveryError(f"{what} is {number!r}; expected its number")
        return _find(self._store, self._name, run_id, recovery)

    def _known(self, run_id: int, kind: str, name: str) -> str:
        """Return the name of an event or a step, if the run is not known to have none such."""
        if not isinstance(name, str) or not name.isprintable():
            raise DefinitionError(f"the {kind} is {name!r}; expected the name of one, a str")
        return drift.known(self._store.definition(run_id), kind, str.__str__(name), run_id)

    def _check_usable(self) -> None:
        if os.getpid() != self._process.pid:
            raise UsageError(
                f"{self!r} belongs to process {self._process.pid} and cannot be used in another "
                f"(here {os.getpid()}); attach there"
            )
        if not self._close.alive:
            raise UsageError(f"{self!r} is closed")


def _find(store: Store, name: str, run_id: int | None = None, recovery: int | None = None) -> Place:
    in_vain = "there is nothing to attach to: "
    return History(store).find(name, run_id, recovery, in_vain=in_vain)


def _now() -> datetime:
    return datetime.now(UTC)


def _close(store: Store, pid: int) -> None:
    """Close a store, but in a forked process, which has nothing of it."""
    if os.getpid() == pid:
        store.close()
