"""Where a store lives: a SQLite file, memory alone, or a schema of a PostgreSQL database."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from eventor.errors import ConfigError, StoreError
from eventor.storage.url import DRIVERS, EXAMPLE, is_connection_string, read_url, shown

if TYPE_CHECKING:
    from sqlalchemy import URL

MEMORY = ":memory:"

_SQLITE = ("sqlite", "sqlite+pysqlite")

_OF_USER = "$user"
"""In a search_path, the schema of whoever looks, and no name."""

_LONGEST_NAME = 63
"""Bytes; PostgreSQL cuts longer names off (postgresql.org, Lexical Structure)."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a store lives.

    Attributes:
        path: of a SQLite file; None for one that is elsewhere, or in memory only.
        url: of a PostgreSQL database.
        schema: in which its tables are there; None for that which the database chooses.
    """

    path: Path | None = None
    url: URL | None = None
    schema: str | None = None

    def __str__(self) -> str:
        """Return what `locate` takes, but for what may be secret."""
        if self.url is None:
            return MEMORY if self.path is None else str(self.path)
        named = {} if self.schema is None else {"schema": self.schema}
        return shown(self.url.update_query_dict(named))


def locate(store: str | os.PathLike[str], schema: str | None = None) -> Location:
    """Return where the store that a program named lives.

    Args:
        store: ':memory:', the path of a SQLite file, or the SQLAlchemy URL of one or of a
            PostgreSQL database, which may name the schema as in `?schema=flows`.
        schema: that of the config, if it names one.

    Raises:
        StoreError: it is none of these.
        ConfigError: there is no such thing as a schema in it, or it names another.
    """
    location = _locate(store)
    if schema is None or schema == location.schema:
        return location
    if location.url is None:
        raise ConfigError(
            f"schema in Eventor's config is {schema!r}, and the store {location} has none; expected"
            " a PostgreSQL store, or to leave schema out"
        )
    if location.schema is not None:
        raise ConfigError(
            f"schema in Eventor's config is {schema!r}, and the store {location} names another; "
            "expected it in one of the two places"
        )
    return Location(url=location.url, schema=_schema(schema, location))


def _locate(store: str | os.PathLike[str]) -> Location:
    if not isinstance(store, str | os.PathLike):
        raise StoreError(
            f"the store is of type {type(store).__name__}; expected a path, a URL or ':memory:'"
        )
    place = os.fsdecode(store)
    if isinstance(store, str) and "://" in place:
        return _locate_url(place)
    if place == MEMORY:
        return Location()
    if is_connection_string(place):
        raise StoreError(
            "the store looks like a connection string of PostgreSQL; expected a URL, such as "
            f"{EXAMPLE}, or ./ before the path of a file"
        )
    if not place or "\0" in place:
        raise StoreError(f"the store is {place!r}; expected a path, a URL or ':memory:'")
    try:
        return Location(Path(place).absolute())
    except OSError as error:
        raise StoreError(f"the store {place} is no place that can be known: {error}") from error


def _locate_url(place: str) -> Location:
    kind, _, rest = place.partition("://")
    if kind in _SQLITE and rest[:1] in ("", "/") and "?" not in rest:
        return _locate(unquote(rest[1:]) or MEMORY)
    if kind not in DRIVERS:
        # What stands there may be anything, in what is no URL.
        named = f"kind {kind}" if re.fullmatch("[a-z]+[+]?[a-z0-9]*", kind) else "a kind"
        raise StoreError(
            f"the store is a URL of {named} that eventor cannot use; expected "
            f"sqlite:///relative/path.db, sqlite:////absolute/path.db or {EXAMPLE}"
        )
    url = read_url(place)
    schema = url.query.get("schema")
    found = Location(url=url.difference_update_query(["schema"]))
    return found if schema is None else Location(url=found.url, schema=_schema(schema, found))


def _schema(name: object, location: Location) -> str:
    is_name = isinstance(name, str) and name.isprintable() and name != _OF_USER
    if is_name and 0 < len(str(name).encode()) <= _LONGEST_NAME:
        return str(name)
    raise StoreError(
        f"the schema of the store {location} is {name!r}; expected one name of printable "
        f"characters, {_LONGEST_NAME} bytes at most"
    )
