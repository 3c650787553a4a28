"""What a program may name as its store, and what is told of a wrong URL: nothing that is secret."""

from pathlib import Path

import pytest

import eventor as evr
from eventor.cli import commands as cli

pytestmark = pytest.mark.stores("sqlite")

S = "s3cret"

WRONG = {
    "has an @ too many": [
        f"postgresql://u:p@{S}@h/db",
        f"postgresql+psycopg://u:p@{S}/x@127.0.0.1:1/db",
        f"postgresql+psycopg://u:p@x:{S}@127.0.0.1:1/db",
        f"postgresql://u:p@x?{S}@h/db",
        f"postgresql://u:p@x?y={S}@h/db",
        f"postgresql://u:a@[{S}]@h/db",
        f"postgresql://host:5432/db?password=x@{S}",
    ],
    "or a / in its user": [
        f"postgresql+psycopg://dom/user:{S}@127.0.0.1:1/db",
        f"postgresql:///u:{S}@h/db",
    ],
    "a ; or = outside": [
        f"postgresql://u@h/db;password={S}",
        f"postgresql://u@h/db&password={S}",
        f"postgresql://u@h;{S}/db",
        f"postgresql://user=u password={S}@h/db",
        f"postgresql://host=h password={S}",
        f"postgresql://u@h/host=h port=1 password={S}",
        f"postgresql://h/db:{S}",
    ],
    "a parameter that is not name=value": [
        f"postgresql://u@h/db?{S}",
        f"postgresql://u@h/db?sslmode%20{S}=x",
        f"postgresql://u@h/db?sslmode {S}=x",
    ],
    r"a ;, \? or = in the value of user": [
        f"postgresql://h/db?user=u;password={S}",
        f"postgresql://h/db?user=u?password={S}",
        f"postgresql://h/db?user=u password={S}",
    ],
    "in the value of options": [f"postgresql://h/db?options=-c x=y;password={S}"],
    "a port that is no number": [
        f"postgresql://u:{S}/db",
        f"postgresql://u@h:1,{S}:2/db",
        f"postgresql://u@h/db?port={S}",
        f"postgresql://u@/db?host=a:{S}&host=b:1",
        f"postgresql://u:{S}@h/db?host=a&host=b&port=1&port=2&port=3",
    ],
    "a character that cannot be printed, or NUL": [
        f"postgresql://u:{S}@h/db\0",
        f"postgresql://u:{S}\0@h/db",
        f"postgresql://u:{S}%00@h/db",
        f"postgresql://u:p@h/db?password={S}%00",
        f"postgresql://u:{S}\udc80@h/db",
        f"postgresql://u:{S}@h/db\n",
    ],
    "has no value for schema": [f"postgresql://u:{S}@h/db?schema="],
    "has no value for sslmode": [f"postgresql://u:{S}@h/db?sslmode=&password={S}"],
    "has schema more than once": [f"postgresql://u@h/db?schema=a&schema=b&password={S}"],
    "has password more than once": [f"postgresql://u@h/db?password={S}&password={S}2"],
    r"the schema of the store postgresql\+psycopg://u:\*\*\*@h/db is": [
        f"postgresql://u:{S}@h/db?schema=$user",
        f"postgresql://u:{S}@h/db?schema={'x' * 64}",
    ],
    "kind .*that eventor cannot use": [
        f"mysql://u:{S}@h/db",
        f"mssql+pyodbc:///?odbc_connect=PWD%3D{S}",
        f"postgresql+asyncpg://u@h/db?Password={S}",
        f"postgres://u:{S}@h/db",
        f"POSTGRESQL://u:{S}@h/db",
        f" postgresql://u:{S}@h/db",
        f"jdbc:postgresql://h/db?user=u&password={S}",
        f"sqlite:///x?password={S}",
        f"sqlite://u:{S}@x/db",
    ],
    "looks like a connection string": [
        f"host=h password={S}",
        f"host = h password={S}",
        f"sslmode=require host=h user=u password={S}",
        f"connect_timeout=3 password={S}",
        f"service=s {S}",
        f"oauth_client_secret={S}",
        f"Server=h;Uid=u;Pwd={S}",
        f"PGPASSWORD = {S}",
        f"h/db?user=u&password={S}",
        f"h/db;user={S}",
        f"postgresql:/u:{S}@h/db",
        f"jdbc:postgresql+psycopg:/{S}",
        f"postgresql//u:{S}@h/db",
        f"postgresql:u:{S}@h/db",
        f"u:{S}@h/db",
        f"u:x/y@{S}@h/db",
        f"u:{S}@h:5432",
        f"//u:{S}@h/db",
        f"sqlite:///u:{S}@h/db",
        Path(f"postgresql://u:{S}@h/db"),
    ],
    "is of type dict": [{"password": S}],
    "is of type bytes": [f"postgresql://u:{S}@h/db".encode()],
}


@pytest.mark.parametrize(
    ("words", "store"), [(words, store) for words, stores in WRONG.items() for store in stores]
)
def test_what_cannot_be_a_store_is_told_in_a_line_without_what_may_be_secret(
    words, store, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(evr.StoreError, match=rf"{words}.*; expected ") as caught:
        evr.Eventor(store=store)
    error = caught.value
    assert S not in f"{error} {error.__cause__!r} {error.__context__!r}"
    assert str(error).isprintable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "autocommit",
        "conninfo",
        "context",
        "cursor_factory",
        "plugin",
        "plugins",
        "prepare_threshold",
        "row_factory",
    ],
)
def test_a_parameter_that_is_not_of_libpq_is_refused(name, capsys):
    store = f"postgresql://u:{S}@h/db?sslmode=require&{name}={S}"
    assert cli.run(["show", store]) == 2
    told = "eventor: the URL of the store has the parameter {}; expected only those of libpq, and"
    said = capsys.readouterr().err
    assert said.startswith(told.format(name))
    assert said.count("\n") == 1
    assert S not in said


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("u:s3cret@h:5432/db?", "u:***@h:5432/db?"),
        ("u:s3/cret=;x@h/db?", "u:***@h/db?"),
        ("me%40corp:s3cret@h/a%3Bb%3D?", "me%40corp:***@h/a%3Bb%3D?"),
        ("[::1]:5432/db?", "[::1]:5432/db?"),
        ("u@/db?host=%2Frun%2Fpg&", "u@/db?host=%2Frun%2Fpg&"),
        ("/db?host=a:1&host=b:2&", "/db?host=a%3A1&host=b%3A2&"),
        ("/db?host=a,b&port=1,2&", "/db?host=a%2Cb&port=1%2C2&"),
        ("h/db?password=s3cret==&", "h/db?password=***&"),
        ("h/db?PASSWORD=s3cret&", "h/db?PASSWORD=***&"),
        ("h/db?passwd=s3cret&pwd=s3cret&pass=s3cret&", "h/db?pass=***&passwd=***&pwd=***&"),
        ("h/db?options=-c a=s3cret&", "h/db?options=***&"),
        ("h/db?connect_timeout=3&passfile=s3cret&", "h/db?connect_timeout=3&passfile=***&"),
        ("h/db?application_name=a b&", "h/db?application_name=a+b&"),
    ],
)
def test_of_a_url_what_is_known_to_be_harmless_is_shown(given, shown):
    with pytest.raises(evr.ConfigError) as caught:
        evr.Eventor(store=f"postgresql://{given}schema=z", config={"schema": "other"})
    assert f"the store postgresql+psycopg://{shown}schema=z names another;" in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "a=b.db",
        "me@corp.db",
        "12:30.db",
        "my flow; today & tomorrow?.db",
        "run=1/day=2/flow.db",
        "/data/user=5/host=web1/flow.db",
        "./host=web1/flow.db",
        "schema=1/flow.db",
        "/run/gvfs/dav:host=h,ssl=true,user=me@corp/flow.db",
        "./u:p@h/flow.db",
        "me@corp/12:30/flow.db",
        "postgres/flow.db",
        "postgresql:flow.db",
        "password.db",
        "my_password=1.db",
        "sqlite:///me@corp/a=b:c.db",
        "sqlite:///a%20b.db",
    ],
)
def test_a_path_may_have_what_a_connection_string_has(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = path.removeprefix("sqlite:///").replace("%20", " ").removeprefix("./")
    with pytest.raises(evr.RecoveryError) as caught:
        evr.attach(path, "x")
    assert f"{name} does not exist" in str(caught.value)
