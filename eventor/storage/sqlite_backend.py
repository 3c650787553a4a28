"""A store in a SQLite file, or in memory."""

from __future__ import annotations

import json
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import bindparam, delete, func, select
from sqlalchemy.exc import SQLAlchemyError

from eventor.errors import RecoveryError, StoreChangedError, StoreError
from eventor.storage import schema, sqlite
from eventor.storage.backend import Access

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy import Connection, Select

    from eventor.storage.location import Location

T = TypeVar("T")


class SQLiteBackend:
    """See `backend.Backend`.

    Args:
        location: the file, or memory.
        access: what it is opened for.

    Raises:
        StoreError: it cannot be used; what is there is left as it was.
        RecoveryError: it has to exist, and there is none.
    """

    has_hosts = False

    def __init__(self, location: Location, access: Access) -> None:
        self._location = location
        self._access = access
        path = self._path = _real(location)
        if path is not None:
            sqlite.check_file(path, needed_to=access.value, to_write=access is not Access.read)
        elif access is not Access.begin:
            raise RecoveryError(
                f"there is nothing to {access.value}: a store in memory keeps no runs"
            )
        self.shared = path is not None
        self._keeps = access is not Access.read
        if path is None or self._keeps:
            self.engine = sqlite.open_engine(path)
        else:
            self.engine = sqlite.open_reader(path)
        self._connection: Connection | None = None
        self._identity: sqlite.Identity | None = None

    def open(self) -> None:
        """Make sure that the file has the tables of this version, and know it again from now on."""
        path = self._path
        if path is not None and not self._keeps:
            self._identity = sqlite.identify(path, to_write=False)
        if not self._access.makes:
            sqlite.check_tables(self.engine, path)
        if not self._keeps:
            return
        if path is not None:
            if not path.exists():
                sqlite.create(path)
            sqlite.enter_wal(path)
        if self._access.makes:
            sqlite.add_tables(self.engine)
        self._identity = None if path is None else sqlite.identify(path)

    def write(self, work: Callable[[Connection], T], _until: float) -> T:
        """Do work in a transaction, once: the lock on the file is waited for by SQLite."""
        self._check_files()
        with self._transaction(writing=True) as connection:
            found = work(connection)
        self._check_files()
        return found

    def read(self, work: Callable[[Connection], T], _until: float) -> T:
        """Do work that writes nothing."""
        with self.looking() as connection:
            return work(connection)

    @contextmanager
    def looking(self) -> Iterator[Connection]:
        """Give a connection in a transaction; who only looks opens the file anew each time."""
        if self._keeps or self._path is None:
            with self._transaction(writing=False) as connection:
                yield connection
            return
        self._check_files()
        before = sqlite.at_rest(self._path)
        try:
            with self._transaction(writing=False) as connection:
                yield connection
        except (StoreError, SQLAlchemyError, sqlite3.Error) as error:
            self._check_rest(before, error)
            raise
        self._check_rest(before)
        self._check_files()

    def hold(self, _connection: Connection, _run_id: int, now: datetime) -> datetime:
        """Return `now`: the transaction has the whole file."""
        return now

    def clock(self, _connection: Connection, now: datetime) -> datetime:
        """Return `now`: SQLite has the clock of the program."""
        return now

    def prove(self, _query: Callable[[], Select[Any]]) -> None:
        """Do nothing: SQLite tells whether a transaction was committed."""

    def listed(self, numbers: Iterable[int]) -> Select[tuple[int]]:
        """Return a query for the numbers."""
        each = func.json_each(json.dumps(list(numbers))).table_valued("value")
        return select(each.c.value)

    def delete_results(self, connection: Connection, numbers: Collection[int]) -> None:
        """Delete results.

        For each, SQLite looks whether a task refers to it still: without an index, at all tasks.
        One that stays would cost each step of every run a little.
        """
        connection.exec_driver_sql("CREATE INDEX eventor_pruning ON eventor_task (result_id)")
        gone = schema.result.c.result_id == bindparam("of_result")
        rows = [{"of_result": number} for number in numbers]
        connection.execute(delete(schema.result).where(gone), rows)
        connection.exec_driver_sql("DROP INDEX eventor_pruning")

    def size(self) -> int:
        """Return how many bytes its file takes, with the log beside it."""
        if self._path is None:
            return 0
        files = (self._path, self._path.with_name(f"{self._path.name}-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def shrink(self) -> None:
        """Give the space of what was deleted back to the file system."""
        if self._path is not None:
            sqlite.shrink(self._path)

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
        self.engine.dispose()

    @contextmanager
    def _transaction(self, *, writing: bool) -> Iterator[Connection]:
        if not self._keeps:
            with self.engine.connect() as connection, connection.begin():
                yield connection
            return
        if self._connection is None:
            self._connection = self.engine.connect()
        try:
            self._connection.execution_options(**{sqlite.WRITING: writing})
            with self._connection.begin():
                yield self._connection
        except BaseException:
            # One whose commit has failed may be in its transaction still.
            failed, self._connection = self._connection, None
            if failed is not None:
                failed.close()
            raise

    def _check_rest(self, before: object, error: Exception | None = None) -> None:
        """Make sure that a file which was at rest still is what it was."""
        if before is not None and self._path is not None and sqlite.at_rest(self._path) != before:
            raise StoreChangedError(
                f"the store {self._location} was written while it was looked at; look again"
            ) from error

    def _check_files(self) -> None:
        if self._path is None:
            return
        if sqlite.identify(self._path, to_write=self._keeps) != self._identity:
            which = "it, or the log beside it," if self._keeps else "it"
            raise FileNotFoundError(f"{which} was replaced while it was in use")


def _real(location: Location) -> Path | None:
    """Return the file of a store, through all links: SQLite keeps its log beside that.

    Raises:
        StoreError: the links lead in a circle.
    """
    try:
        return None if location.path is None else location.path.resolve()
    except (OSError, RuntimeError) as error:
        raise StoreError(f"the store {location} cannot be looked at: {error}") from error
