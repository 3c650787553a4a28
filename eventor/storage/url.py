"""The URL of a PostgreSQL database: read, and shown without what may be secret.

Nothing of a URL that is wrong is repeated, since its password may be anywhere in it: somebody has
not quoted a character, or has written a `;` for an `&`. Of one that is right, what is not known to
be harmless is hidden.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import quote_plus, unquote

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from eventor.errors import StoreError

if TYPE_CHECKING:
    from sqlalchemy import URL

EXAMPLE = "postgresql+psycopg://user:password@host/database"

_PARAMETERS = "parameters as in ?sslmode=require&connect_timeout=10"

DRIVERS = ("postgresql", "postgresql+psycopg")
"""How such a URL begins."""

_HARMLESS = re.compile(
    "application_name|channel_binding|connect_timeout|dbname|gssencmode|host|hostaddr|"
    r"keepalives\w*|load_balance_hosts|port|require_auth|schema|service|sslcert|sslcrl|sslmode|"
    "sslnegotiation|sslrootcert|target_session_attrs|tcp_user_timeout|user"
)
"""Parameters of libpq, and our own, whose values are shown."""

_SECRET = re.compile("oauth_client_secret|password|scram_client_key|scram_server_key|sslpassword")
"""Those in which any character may be, and which no error repeats."""

_NOT_OF_LIBPQ = re.compile(
    "autocommit|conninfo|context|cursor_factory|plugins?|prepare_threshold|row_factory"
)
"""What psycopg and SQLAlchemy take for arguments of their own."""

_PASSWORD = re.compile(r"\b(?:pg|ssl)?(?:password|passwd|pwd)\s*=", re.IGNORECASE)

_CONNECTION_STRING = re.compile(
    rf"""
    {_PASSWORD.pattern}
    | (?:^|[\s;&?]) (?!schema) (?:{_HARMLESS.pattern}|{_SECRET.pattern}) \s* =
    | postgres\w*(?:\+\w+)?:/
    | (?:^|//) [^/:]* : .* @ [^/]+ (?:/|:\d+$)  # user:password@host/database
    """,
    re.IGNORECASE | re.VERBOSE,
)


def is_connection_string(text: str) -> bool:
    """Tell whether what is no URL was meant as one, or as a connection string of libpq."""
    return _CONNECTION_STRING.search(text) is not None


def shown(url: URL) -> str:
    """Return a URL as people may see it."""
    query = [
        f"{name}={quote_plus(value) if _HARMLESS.fullmatch(name) else '***'}"
        for name, values in sorted(url.normalized_query.items())
        for value in values
    ]
    return url.set(query={}).render_as_string() + (f"?{'&'.join(query)}" if query else "")


def read_url(text: str) -> URL:
    """Return the URL of a database.

    Raises:
        StoreError: it is wrong, or it can be read in more than one way.
    """
    if not text.isprintable() or "\0" in unquote(text):
        raise _wrong(
            "a character that cannot be printed, or NUL",
            "%0A and the like for one in a password, and no NUL",
        )
    before, _, query = text.partition("://")[2].partition("?")
    login, _, place = before.rpartition("@")
    user, database = login.partition(":")[0], place.partition("/")[2]
    if "@" in login + query or "/" in user:
        raise _wrong(
            "an @ too many, or a / in its user",
            "%40 for an @, %2F for a / and %3F for a ? in a user or a password",
        )
    if re.search("[;=]", user + place) or ":" in database:
        raise _wrong(
            "a ; or = outside of its parameters, or a : in its database",
            f"{_PARAMETERS}, and %3B for a ;, %3D for a = and %3A for a : in a name",
        )
    _check_query(query)
    url = _parse(text)
    if url is None:
        raise _wrong(
            "a port that is no number, or not one port for each host",
            "user:password@host:5432/database, with %3A for a : and %2F for a / in the password, "
            "and several hosts as in ?host=one,two&port=5432,5433",
        )
    return url


def _check_query(query: str) -> None:
    given = [part.partition("=") for part in query.split("&") if part]
    names = [name for name, _, _ in given]
    for name, equals, value in given:
        if not equals or re.fullmatch(r"\w+", name) is None:
            raise _wrong("a parameter that is not name=value", _PARAMETERS)
        if _NOT_OF_LIBPQ.fullmatch(name):
            raise _wrong(f"the parameter {name}", "only those of libpq, and schema")
        if not value:
            raise _wrong(f"no value for {name}", "one, or to leave it out")
        if names.count(name) > 1 and name not in ("host", "port"):
            raise _wrong(f"{name} more than once", "it once")
        if not _SECRET.fullmatch(name) and _goes_on(name, value):
            raise _wrong(
                f"a ;, ? or = in the value of {name}",
                "an & between parameters, and %3B, %3F and %3D in a value",
            )


def _goes_on(name: str, value: str) -> bool:
    """Tell whether another parameter may be in the value of one."""
    if name == "options":  # in which settings have a = of their own
        return _PASSWORD.search(unquote(value)) is not None
    return re.search("[;?=]", value) is not None


def _parse(text: str) -> URL | None:
    try:
        url = make_url(text).set(drivername=DRIVERS[1])
        url.get_dialect()().create_connect_args(url)
    except (ArgumentError, ValueError):  # which say what was given
        return None
    return url


def _wrong(what: str, expected: str) -> StoreError:
    return StoreError(f"the URL of the store has {what}; expected {expected}")
