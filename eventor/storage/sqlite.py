"""Stores in SQLite: which files may be one, and the settings under which they are used.

A file that is not a store of eventor is told from one without writing a byte to it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import stat
import time
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sqlalchemy import URL, create_engine, event, insert, inspect, select, update
from sqlalchemy.pool import NullPool, StaticPool

from eventor.errors import RecoveryError, StoreError
from eventor.storage import schema

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy import Connection, Engine

BUSY_SECONDS = 10.0
"""How long a statement waits for the lock that another program holds on the store."""

WRITING = "eventor_writing"
"""The execution option of a connection whose transactions write."""

LOGS = ("-wal", "-shm")
BESIDE = (*LOGS, "-journal")
"""How the names of the files end that SQLite keeps beside one."""

_RETRY_SECONDS = 0.01

_DRAFT_NAME = 40
"""Characters of a store's name that its draft bears; a name has at most 255 bytes."""

_NO_LINK = (errno.EEXIST, errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

# Not even root is to write to what somebody has made read-only.
_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH

Identity = tuple[tuple[int, int], ...]
"""Which files a store is: by device and inode, its own and, if it matters, that of its log."""


def check_file(path: Path, *, needed_to: str = "", to_write: bool = True) -> None:
    """Make sure that `path` is a store of eventor, or that one can be made there.

    Args:
        path: the file.
        needed_to: what cannot be done without one that is there.
        to_write: whether it is going to be written to.

    Raises:
        StoreError: neither holds; the message says why, and nothing has been changed.
        RecoveryError: `needed_to`, and there is no file, or an empty one.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if needed_to:
            raise RecoveryError(
                f"there is nothing to {needed_to}: the store {path} does not exist"
            ) from None
        _check_place(path)
        _check_leftovers(path)
        return
    except (OSError, ValueError) as error:
        raise StoreError(f"the store {path} cannot be looked at: {error}") from error
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise StoreError(f"the store {path} is a directory; expected a file")
    if not stat.S_ISREG(mode):
        raise StoreError(f"the store {path} is no regular file; expected a SQLite file")
    if to_write:
        if not (mode & _WRITABLE and os.access(path, os.R_OK | os.W_OK)):
            raise StoreError(f"the store {path} cannot be both read and written by this user")
        _check_place(path)
    else:
        _check_log(path)
    if not (status.st_size and _has_tables(path)) and needed_to:
        raise RecoveryError(f"there is nothing to {needed_to}: the store {path} is empty")


def open_engine(path: Path | None) -> Engine:
    """Return an engine of one connection to the SQLite file, or to a store in memory for None.

    Write-ahead logging lets other programs read while this one writes; with `synchronous` FULL a
    commit is on the disk when it returns (sqlite.org/pragma.html#pragma_synchronous).
    """
    engine = create_engine(
        URL.create("sqlite", database=":memory:" if path is None else str(path)),
        connect_args={"check_same_thread": False, "timeout": BUSY_SECONDS},
        poolclass=StaticPool,
        paramstyle="named",
    )

    @event.listens_for(engine, "connect")
    def settle(connection: sqlite3.Connection, _record: Any) -> None:
        # Transactions are begun below, not by the driver, which would begin them too late.
        connection.isolation_level = None
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            # A damaged page is found when it is read, and what a stranger has put into the schema
            # runs nothing but plain SQL (sqlite.org/security.html).
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute("PRAGMA trusted_schema = OFF")
        except BaseException:
            connection.close()  # nobody else knows of it yet
            raise

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer takes its lock at once: one that reads first and writes later can be refused
        # by SQLite without waiting (sqlite.org/lang_transaction.html).
        writing = connection.get_execution_options().get(WRITING, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def open_reader(path: Path) -> Engine:
    """Return an engine that reads a file and writes nothing, with a connection for each look.

    So it sees at each look what others have written, even if the file was at rest before.
    """

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(_uri(path), uri=True, timeout=BUSY_SECONDS)
        connection.isolation_level = None
        return connection

    engine = create_engine("sqlite://", creator=connect, poolclass=NullPool, paramstyle="named")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def create(path: Path) -> None:
    """Make an empty store at once: nobody ever sees it half made, and a failure leaves nothing.

    It is made without a log, so that all of it is in the one file. If another program makes one at
    the same time, one of the two stays. Where a file cannot have two names, nothing is done here:
    SQLite then makes the file when it is opened.
    """
    draft = path.with_name(f"{path.name[:_DRAFT_NAME]}.{uuid.uuid4().hex}.new")
    try:
        engine = open_engine(draft)
        try:
            add_tables(engine)
        finally:
            engine.dispose()
        path.hardlink_to(draft)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
    finally:
        for suffix in ("", "-journal"):
            draft.with_name(draft.name + suffix).unlink(missing_ok=True)


def enter_wal(path: Path) -> None:
    """Switch a file to write-ahead logging, which its header then keeps.

    SQLite does not wait for others that are about to do the same, so this does.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)
            else:
                return


def shrink(path: Path) -> None:
    """Write a file anew without the space of what was deleted, and empty the log beside it.

    Others wait meanwhile, for as long as it takes to write all that is left.
    """
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def add_tables(engine: Engine) -> None:
    """Make the tables of a store, or bring those of an earlier version up to this one."""
    with engine.connect().execution_options(**{WRITING: True}) as connection, connection.begin():
        if not inspect(connection).has_table(schema.schema.name):
            schema.metadata.create_all(connection)
            for statement in (*schema.indexes("sqlite"), *schema.views("sqlite")):
                connection.exec_driver_sql(statement)
            connection.execute(insert(schema.schema), {"version": schema.VERSION})
            return
        found = connection.scalar(select(schema.schema.c.version))
        _check_version(found, str(engine.url.database))  # again: it may have changed since
        for version in range(found or 0, schema.VERSION):
            for statement in schema.MIGRATIONS[version]:
                connection.exec_driver_sql(statement)
            connection.execute(update(schema.schema), {"version": version + 1})


def check_tables(engine: Engine, path: Path | None) -> None:
    """Make sure that a store has the tables of this version, and leave them as they are.

    Raises:
        StoreError: it is of an earlier version, or of a later one.
    """
    with engine.connect() as connection, connection.begin():
        found = connection.scalar(select(schema.schema.c.version))
    _check_version(found, str(path))
    if found != schema.VERSION:
        raise StoreError(
            f"the store {path} has schema version {found}, and is left as it is: an Eventor that "
            f"begins or recovers a run in it brings it up to version {schema.VERSION}; it can "
            "then be attached to and looked at"
        )


def identify(path: Path, *, to_write: bool = True) -> Identity:
    """Return which files an open store is; the log is none of them for who only reads.

    SQLite goes on with a file that was deleted or replaced (sqlite.org/howtocorrupt.html), so that
    has to be looked for.

    Raises:
        OSError: a file is gone, or can no longer be written.
    """
    own = os.stat(path)  # noqa: PTH116 (twice in each transaction, and pathlib's is slower)
    if not to_write:  # others may begin a log, and remove it
        return ((own.st_dev, own.st_ino),)
    if not own.st_mode & _WRITABLE:
        raise PermissionError("it was made read-only")
    log = os.stat(f"{path}-wal")  # noqa: PTH116
    return ((own.st_dev, own.st_ino), (log.st_dev, log.st_ino))


def at_rest(path: Path) -> tuple[int, int] | None:
    """Return by what it shows that a file without a log was written; None for one with a log.

    Such a file is read as one that does not change (`_uri`), so whether it did has to be looked for
    (sqlite.org/uri.html, immutable).
    """
    if os.path.lexists(f"{path}-wal"):
        return None
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _check_place(path: Path) -> None:
    """SQLite writes beside the store, so its directory has to be writable too."""
    place = path.parent
    if not place.is_dir():
        raise StoreError(f"the store {path} cannot be made: {place} is not a directory")
    if not os.access(place, os.W_OK | os.X_OK):
        raise StoreError(f"the store {path} cannot be used: directory {place} is not writable")


def _check_log(path: Path) -> None:
    """Refuse a log that a crash has left where nothing can be written, so not even be read."""
    log, index = (path.with_name(path.name + suffix) for suffix in LOGS)
    if log.exists() and not index.exists() and not os.access(path.parent, os.W_OK | os.X_OK):
        raise StoreError(
            f"the store {path} cannot be looked at: its last owner has left the log {log}, and to "
            f"read that SQLite makes {index}, in a directory which is not writable; copy the store "
            "and its log to another, and look there"
        )


def _check_leftovers(path: Path) -> None:
    """Refuse a place where a log was left, which SQLite would take for that of the new store.

    It makes a log only beside a file, so one that is seen before the file is missing is left over.
    """
    logs = [path.with_name(path.name + suffix) for suffix in LOGS]
    left = [str(log) for log in logs if log.exists()]
    if left and not path.exists():
        raise StoreError(
            f"the store {path} does not exist, and {' and '.join(left)} of a store that was there "
            "before does; put that store back, or remove what it has left"
        )


def _has_tables(path: Path) -> bool:
    """Tell a store from an empty database, and refuse anything else and another schema.

    No one but SQLite may open it: when any descriptor of a file is closed, this process loses all
    its locks on that file (sqlite.org/howtocorrupt.html, 2.2).
    """
    try:
        with contextlib.closing(
            sqlite3.connect(_uri(path), uri=True, timeout=BUSY_SECONDS)
        ) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
            versions = (
                connection.execute("SELECT version FROM eventor_schema").fetchall()
                if schema.schema.name in tables
                else []
            )
    except (sqlite3.Error, ValueError) as error:
        foreign = getattr(error, "sqlite_errorname", None) == "SQLITE_NOTADB"
        why = "it is a file, but not a SQLite database" if foreign else str(error)
        raise StoreError(f"the store {path} cannot be read as a SQLite database: {why}") from error
    if tables and not versions:
        raise StoreError(
            f"the store {path} is a SQLite database of something else; it is left as it is"
        )
    for (version,) in versions:
        _check_version(version, str(path))
    return bool(tables)


def _uri(path: Path) -> str:
    """Return the URI by which a file is only read, and not made if it is missing.

    Without a log beside it, nobody writes to it, and it is opened as immutable: else SQLite would
    leave files beside a database that is in write-ahead mode.
    """
    logged = path.with_name(path.name + "-wal").exists()
    return f"file:{quote(os.fsencode(path))}?mode=ro{'' if logged else '&immutable=1'}"


def _check_version(version: object, path: str) -> None:
    if version not in (*schema.MIGRATIONS, schema.VERSION):
        raise StoreError(
            f"the store {path} has schema version {version!r}, and this eventor knows "
            f"versions up to {schema.VERSION}; it is left as it is"
        )
