"""What a kind of database does for a store, apart from the SQL that all kinds have in common."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from contextlib import AbstractContextManager
    from datetime import datetime

    from sqlalchemy import Connection, Select

T = TypeVar("T")


class Access(Enum):
    """What a store is opened for; the value says what cannot be done without one that is there."""

    begin = ""
    recover = "recover"
    attach = "attach to"
    """To ask something of its runs. One of an earlier schema may have an owner of that schema, and
    is refused."""
    prune = "prune"
    """To delete runs of it. One of an earlier schema is refused, as for `attach`."""
    read = "look at"
    """Nothing is written, and it need not be writable."""

    @property
    def makes(self) -> bool:
        """Whether a store is made where there is none, or brought up to this schema."""
        return self in (Access.begin, Access.recover)


class Backend(Protocol):
    """A store in a database of one kind; one thread uses it at a time."""

    shared: bool
    """Whether other processes can reach it."""

    has_hosts: bool
    """Whether programs on other hosts can, who cannot see whether an owner lives."""

    def open(self) -> None:
        """Connect, and make sure that its tables are there."""

    def write(self, work: Callable[[Connection], T], until: float) -> T:
        """Do work in a transaction that is committed at its end, or undone.

        Args:
            work: what to do; where a connection was lost, it is done again from its beginning.
            until: until when that is tried, by `lease.clock`.
        """

    def read(self, work: Callable[[Connection], T], until: float) -> T:
        """Do work that writes nothing, in a transaction that sees one state of the store.

        Args:
            work: as in `write`.
            until: as in `write`.
        """

    def looking(self) -> AbstractContextManager[Connection]:
        """Give a connection in such a transaction; if it is lost, so is the look.

        Raises:
            StoreChangedError: the store was written meanwhile, and not one state of it was seen.
        """

    def hold(self, connection: Connection, run_id: int, now: datetime) -> datetime:
        """Keep others from writing to a run before this transaction ends; return as `clock`."""

    def clock(self, connection: Connection, now: datetime) -> datetime:
        """Return the time by which leases are counted: the database's, or `now` if it has none."""

    def prove(self, query: Callable[[], Select[Any]]) -> None:
        """Take note of what tells later whether this transaction was committed, if need be.

        Args:
            query: makes a query that finds a row if it was, and none if it was not.
        """

    def listed(self, numbers: Iterable[int]) -> Select[tuple[int]]:
        """Return a query for the numbers; there may be more than a statement can name."""

    def delete_results(self, connection: Connection, numbers: Collection[int]) -> None:
        """Delete the results of these numbers, to which no task refers any more."""

    def size(self) -> int:
        """Return how many bytes it takes."""

    def shrink(self) -> None:
        """Give the space of what was deleted back, if that is not done by itself."""

    def close(self) -> None:
        """Close the connection; what was committed stays."""
