"""Where a test has its store: a file of SQLite, or a schema of a PostgreSQL server."""

import contextlib
import sqlite3
import uuid
from dataclasses import dataclass
from pathlib import Path

from tests import servers


@dataclass(frozen=True)
class File:
    """A SQLite file, which is not there yet.

    Attributes:
        store: what is passed to an Eventor, to attach(), to commands and to scripts.
    """

    store: Path

    errors = sqlite3.Error

    def exists(self):
        """Tell whether somebody has made a store there."""
        return self.store.exists()

    def clear(self):
        """Remove the store, and what was beside it."""
        for path in self.store.parent.glob(f"{self.store.name}*"):
            path.unlink()

    def content(self):
        """Return what is there and when it was written, to tell whether that has changed."""
        paths = self.store.parent.glob(f"{self.store.name}*")
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    def blob(self, data):
        """Return bytes as a statement has them."""
        return f"x'{data.hex()}'"

    def columns(self, table):
        """Return the names of the columns of a table or a view."""
        return [name for _, name, *_ in self.sql(f"PRAGMA table_info({table})")]

    def sql(self, *statements):
        """Run statements as another program would; return what the last one found."""
        with contextlib.closing(sqlite3.connect(self.store, timeout=30)) as connection, connection:
            return [connection.execute(statement).fetchall() for statement in statements][-1]


@dataclass(frozen=True)
class Schema:
    """A schema of a PostgreSQL server, which is not there yet.

    Attributes:
        store: what is passed to an Eventor, to attach(), to commands and to scripts.
    """

    server: str
    name: str

    @property
    def store(self):
        return f"{self.server}{'&' if '?' in self.server else '?'}schema={self.name}"

    @property
    def errors(self):
        return servers.driver().Error

    def clear(self):
        """Remove the store."""
        # Whoever still held a lock on its tables would be a program that was left behind.
        self.sql("SET lock_timeout = '30s'", f"DROP SCHEMA IF EXISTS {self.name} CASCADE")

    def exists(self):
        """Tell whether somebody has made a store there."""
        return self.sql("SELECT to_regclass('eventor_schema') IS NOT NULL") == [(True,)]

    def content(self):
        """Return what is there and what has written it, to tell whether that has changed."""
        tables = self.sql(f"SELECT tablename FROM pg_tables WHERE schemaname = '{self.name}'")
        return {table: self.sql(f"SELECT xmin, * FROM {table}") for (table,) in tables}

    def blob(self, data):
        """Return bytes as a statement has them."""
        return f"'\\x{data.hex()}'::bytea"

    def columns(self, table):
        """Return the names of the columns of a table or a view."""
        return [
            name
            for (name,) in self.sql(
                "SELECT column_name FROM information_schema.columns "
                f"WHERE table_schema = '{self.name}' AND table_name = '{table}' "
                "ORDER BY ordinal_position"
            )
        ]

    def sql(self, *statements):
        """Run statements as another program would; return what the last one found."""
        with servers.connect(self.server, self.name) as connection:
            done = [connection.execute(statement) for statement in statements][-1]
            return done.fetchall() if done.description else []


@contextlib.contextmanager
def schema(server):
    """Give a place in a server; what was made there is dropped at the end."""
    place = Schema(server, f"test_{uuid.uuid4().hex}")
    try:
        yield place
    finally:
        place.clear()
