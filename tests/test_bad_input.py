"""Every wrong call is an `EventorError` at that call, which names the thing and changes nothing."""

import dataclasses
import itertools
import logging
import os
import socket
import sqlite3
import threading

import pytest

import eventor as evr
from eventor.rules.config import ELSEWHERE, StepConfig

pytestmark = pytest.mark.stores("either")


@pytest.fixture
def ev(tmp_path):
    with evr.Eventor(store=":memory:", config={"logdir": tmp_path / "logs"}) as ev:
        yield ev


@pytest.fixture
def foreign(tmp_path):
    """Make an event and a step of another Eventor, named like those of `ev`."""
    with evr.Eventor(store=":memory:", config={"logdir": tmp_path / "logs"}) as other:
        yield other.add_event("a"), other.add_step("s", func=int)


@pytest.mark.parametrize("add", ["add_event", "add_step"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "expected printable characters"),
        ("  ", "expected printable characters"),
        ("a\nb", "expected printable characters"),
        ("\ud800", "expected printable characters"),
        ("é" * 251, r"is 'é{40}'\.\.\. of 502 bytes; expected 500 at most"),
        (None, "is None; expected a str"),
        (7, "is 7; expected a str"),
        (b"a", "expected a str"),
        ("taken", "'taken' already; its name must be unique"),
    ],
)
def test_names(ev, add, name, words):
    more = {} if add == "add_event" else {"func": int}
    getattr(ev, add)("taken", **more)
    with pytest.raises(evr.DefinitionError, match=words):
        getattr(ev, add)(name, **more)


def test_an_event_and_a_step_may_share_a_name(ev):
    ev.add_event("same")
    ev.add_step("same", func=int)


@pytest.mark.parametrize(
    ("expr", "words"),
    [
        ((), "is empty"),
        ([], "is empty"),
        (((), ()), "is empty"),
        ("a", "'a' is no part of an expression"),
        (("a",), "'a' is no part of an expression"),
        (1, "1 is no part of an expression"),
        ({1}, r"\{1\} is no part of an expression"),
    ],
)
def test_expressions(ev, expr, words):
    with pytest.raises(evr.DefinitionError, match=words):
        ev.add_event("x", expr=expr)
    ev.add_event("x")


def test_expressions_that_are_empty_endless_or_of_others(ev, foreign):
    event, step = foreign
    ev.add_event("a")
    endless = []
    endless.append(endless)
    for build, words in [
        (evr.or_, "is empty"),
        (evr.and_, "is empty"),
        (lambda: evr.or_("a"), "'a' is no part"),
        (lambda: event & 1, "1 is no part"),
        (lambda: event and event, "neither true nor false"),
        (lambda: ev.add_event("x", expr=endless), "contains itself"),
        (lambda: ev.add_event("x", expr=event), r"Event\('a'\) of another Eventor"),
        (lambda: ev.add_event("x", expr=evr.or_(event)), "of another Eventor"),
        (lambda: ev.add_event("x", expr=step), r"Step\('s'\) is no part"),
    ]:
        with pytest.raises(evr.DefinitionError, match=words):
            build()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"func": None}, "func of step 's' is None; expected a callable"),
        ({"func": 5}, "expected a callable"),
        ({"args": "abc"}, "args of step 's' is 'abc'; expected a tuple"),
        ({"args": 1}, "args of step 's' is 1"),
        ({"kwargs": [1]}, r"kwargs of step 's' is \[1\]"),
        ({"kwargs": {1: 2}}, "expected a mapping with str keys"),
        ({"triggers": [1]}, r"triggers of step 's' is \[1\]"),
        ({"triggers": {"at_sucess": ()}}, "no status 'at_sucess'; did you mean 'at_success'"),
        ({"triggers": {evr.TaskStatus.ready: ()}}, "no status .*ready.*did you mean 'at_ready'"),
        ({"triggers": {3: ()}}, "no status 3; known are at_ready, at_active"),
        ({"triggers": {"at_ready": "a"}}, "at_ready in triggers of step 's' is 'a'"),
        ({"triggers": {"at_ready": (None,)}}, "is None; expected an event"),
        ({"triggers": {"at_ready": 5}}, "is 5; expected an event"),
        ({"recovery": 5}, "recovery of step 's' is 5"),
        ({"recovery": {"sucess": "skip"}}, "no status 'sucess'; did you mean 'success'"),
        ({"recovery": {"success": "run"}}, "success in recovery of step 's' is 'run'"),
        ({"recovery": {"success": None}}, "is None; expected StepReplay.rerun or StepReplay.skip"),
        ({"config": 5}, "the config of step 's' is 5"),
        ({"config": {"max_concurrent": 5}}, "step 's' has no key 'max_concurrent'"),
        ({"config": {"stop_on_exeption": 1}}, "did you mean 'stop_on_exception'"),
        ({"config": {"stop_on_exception": 1}}, "stop_on_exception in .* is 1; expected True or"),
    ],
)
def test_steps(ev, arguments, words):
    with pytest.raises(evr.EventorError, match=words):
        ev.add_step("s", **{"func": int, **arguments})
    ev.add_step("s", func=int)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("retries", "max_attempts"),
        ("max_retries", "max_attempts"),
        ("retry_delay_seconds", "retry_delay"),
        ("default_retry_delay", "retry_delay"),
        ("retry_exponential_backoff", "retry_backoff"),
        ("retry_jitter_factor", "retry_jitter"),
        ("autoretry_for", "retry_on"),
        ("wait", "retry_delay"),
        ("stop", "max_attempts"),
        ("timeout_seconds", "timeout"),
        ("execution_timeout", "timeout"),
        ("soft_time_limit", "timeout"),
        ("cpu", "resources"),
        ("gpus", "resources"),
        ("pool", "resources"),
        ("priority_weight", "priority"),
        ("log_prints", "capture_output"),
    ],
)
def test_a_key_that_other_engines_have_leads_to_ours(ev, given, meant):
    words = f"the config of step 's' has no key '{given}'; did you mean '{meant}'\\?$"
    with pytest.raises(evr.ConfigError, match=words):
        ev.add_step("s", int, config={given: 1})


def test_what_was_meant_is_one_of_the_keys_there(make):
    ours = {field.name for field in dataclasses.fields(StepConfig)}
    assert set(ELSEWHERE) <= ours
    assert ours.isdisjoint(itertools.chain(*ELSEWHERE.values()))
    for given, words in (("cpu", "did you mean 'resources'"), ("stop", "known are workdir")):
        with pytest.raises(evr.ConfigError, match=f"has no key '{given}'; {words}"):
            make(config={given: 1})


def test_associations_and_triggers_of_the_wrong_things(ev, foreign):
    event, step = foreign
    a, s = ev.add_event("a"), ev.add_step("s", func=int)
    for call, words in [
        (lambda: ev.add_assoc(a), "event 'a' is with nothing"),
        (lambda: ev.add_assoc(s, a), r"is Step\('s'\); expected an event"),
        (lambda: ev.add_assoc("a", s), "is 'a'; expected an event"),
        (lambda: ev.add_assoc(a, "s"), "an association of event 'a' is 's'"),
        (lambda: ev.add_assoc(a, [s]), r"is \[Step\('s'\)\]; expected an event"),
        (lambda: ev.add_assoc(a, s, None), "is None; expected an event"),
        (lambda: ev.add_assoc(event, s), "of another Eventor"),
        (lambda: ev.add_assoc(a, event), "of another Eventor"),
        (lambda: ev.add_assoc(a, s, step), r"is Step\('s'\) of another Eventor"),
        (lambda: ev.add_step("x", func=int, triggers={"at_ready": event}), "of another Eventor"),
        (lambda: ev.trigger_event(event), "event to trigger is .* of another Eventor"),
        (lambda: ev.trigger_event("a"), "event to trigger is 'a'; expected an event"),
        (lambda: ev.trigger_event(s), "expected an event"),
        (lambda: ev.tasks("x"), "there is no step 'x'; did you mean|known are s"),
        (lambda: ev.tasks(step), "of another Eventor"),
        (lambda: ev.tasks(a), "expected a step"),
        (lambda: ev.events("x"), "there is no event 'x'"),
        (lambda: ev.events(s), "expected an event"),
    ]:
        with pytest.raises(evr.DefinitionError, match=words):
            call()
    ev.trigger_event(a)
    assert ev() is True
    assert ev.tasks() == []


def test_sequences_of_more_than_2000_bytes(ev):
    a = ev.add_event("a")
    for call in (lambda: ev.trigger_event(a, "é" * 1_001), lambda: ev.tasks(sequence="s" * 2_001)):
        with pytest.raises(
            evr.TriggerError, match=r"\.\.\. of 2,00\d bytes; expected 2,000 at most"
        ):
            call()
    assert ev.events() == []
    ev.trigger_event(a, "é" * 1_000)


def test_the_name_of_a_run_has_at_most_500_bytes():
    with pytest.raises(evr.ConfigError, match=r"the name is 'n{40}'\.\.\. of 501 bytes"):
        evr.Eventor("n" * 501, ":memory:")


@pytest.mark.parametrize("sequence", [1.0, True, b"1", (1,), 2**63, -(2**63) - 1, "a\0b", "\udc80"])
def test_sequences(ev, sequence):
    a = ev.add_event("a")
    for call in (lambda: ev.trigger_event(a, sequence), lambda: ev.tasks(sequence=sequence)):
        with pytest.raises(evr.TriggerError, match=r"the sequence is .*expected an int"):
            call()
    assert ev.events() == []


@pytest.mark.parametrize("sequence", [2**63 - 1, -(2**63)])
def test_a_sequence_may_be_any_int_of_64_bits(ev, sequence):
    ev.trigger_event(ev.add_event("a"), sequence)
    assert [event.sequence for event in ev.events()] == [sequence]


def test_a_status_that_is_none(ev):
    with pytest.raises(
        evr.ConfigError, match=r"status is 'done'; expected one of TaskStatus\.ready"
    ):
        ev.tasks(status="done")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": None}, "the name is None"),
        ({"name": "a\nb"}, "printable"),
        ({"run_mode": "again"}, "run_mode is 'again'; expected one of RunMode.restart"),
        ({"run_mode": None}, "run_mode is None"),
        ({"recovery_run": 0}, "needs run_mode=RunMode.recover"),
        ({"recovery_run": -1}, "recovery_run is -1"),
        ({"recovery_run": "1"}, "recovery_run is '1'"),
        ({"recovery_run": True}, "recovery_run is True"),
        ({"logging_level": "LOUD"}, "logging_level is 'LOUD'"),
        ({"logging_level": None}, "logging_level is None"),
        ({"config": 5}, "Eventor's config is 5; expected a mapping"),
        ({"config": {5: 5}}, "Eventor's config has no key 5; known are workdir"),
        ({"config": {"max_concurent": 2}}, "no key 'max_concurent'; did you mean 'max_concurrent'"),
        ({"config": {"max_concurrent": 1.5}}, "max_concurrent in .* is 1.5; expected a whole"),
        ({"config": {"max_concurrent": True}}, "max_concurrent in .* is True"),
        ({"config": {"stop_on_exception": 0}}, "stop_on_exception in .* is 0"),
        ({"config": {"sleep_between_loops": -1}}, "is -1; expected a finite number of seconds"),
        ({"config": {"sleep_between_loops": float("nan")}}, "is nan"),
        ({"config": {"sleep_between_loops": "1"}}, "is '1'"),
        ({"config": {"sleep_between_loops": 10**400}}, "expected a finite number of seconds"),
        ({"config": {"lease_seconds": 0}}, "is 0; expected a number of seconds above 0"),
        ({"config": {"lease_seconds": 1e9}}, "at most 10,000,000"),
        ({"config": {"linger": -1}}, "linger .* is -1; expected a finite number .*, or math.inf"),
        ({"config": {"linger": None}}, "linger in .* is None"),
        ({"config": {"strict_recovery": 1}}, "is 1; expected True or False"),
        ({"config": {"workdir": 5}}, "workdir in .* is 5; expected the path of a directory"),
        ({"config": {"logdir": ""}}, "logdir in .* is ''"),
        ({"config": {"task_construct": threading.Thread()}}, "the class, not an instance"),
        ({"config": {"task_construct": "x"}}, "expected a class like multiprocessing.Process"),
        ({"config": {"task_construct": int}}, "expected a class like"),
    ],
)
def test_arguments_of_the_eventor(tmp_path, arguments, words):
    with pytest.raises(evr.EventorError, match=words):
        evr.Eventor(store=tmp_path / "x.db", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_levels_are_given_as_numbers_or_names(make):
    make(logging_level="DEBUG")
    make(logging_level=logging.WARNING)


@pytest.fixture
def unusable(tmp_path):
    """Make places that are no store, by what the message says of them."""
    text = tmp_path / "text.db"
    text.write_text("no database at all, but a long enough text")
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    other = tmp_path / "other.db"
    newer = tmp_path / "newer.db"
    wal = tmp_path / "wal.db"
    for path, sql in [
        (other, "CREATE TABLE mine (x)"),
        (wal, "PRAGMA journal_mode = WAL; CREATE TABLE mine (x)"),
        (newer, "CREATE TABLE eventor_schema (version); INSERT INTO eventor_schema VALUES (99)"),
    ]:
        with sqlite3.connect(path) as connection:
            connection.executescript(sql)
        connection.close()
    os.mkfifo(tmp_path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.close()
    return {
        text: "not a SQLite database",
        broken: "cannot be read as a SQLite database",
        other: "a SQLite database of something else",
        wal: "a SQLite database of something else",
        newer: "schema version 99, and this eventor knows versions up to 5",
        tmp_path: "is a directory",
        tmp_path / "fifo": "no regular file",
        tmp_path / "socket": "no regular file",
        tmp_path / "none" / "x.db": "is not a directory",
        text / "x.db": "cannot be looked at",
        "/proc/x.db": "the store /proc/x.db",
        "a\0b": "expected a path",
        5: "the store is of type int; expected a path",
        b"x.db": "expected a path",
        None: "the store is of type NoneType",
        "nonsense://x": "a URL of kind nonsense that eventor cannot use",
        "sqlite:///x.db?mode=ro": "a URL of kind sqlite that eventor cannot use",
        "sqlite://host:port/x": "a URL of kind sqlite that eventor cannot use",
    }


@pytest.mark.parametrize("mode", list(evr.RunMode))
def test_stores_that_cannot_be_used_are_left_as_they_are(unusable, tmp_path, mode):
    def contents():
        return {path: path.read_bytes() if path.is_file() else None for path in tmp_path.iterdir()}

    before = contents()
    for store, words in unusable.items():
        if mode is evr.RunMode.recover and str(store).endswith("none/x.db"):
            words = "does not exist"  # noqa: PLW2901
        with pytest.raises(evr.EventorError, match=words):
            evr.Eventor(store=store, run_mode=mode)
        assert contents() == before, store


def test_an_unwritable_place(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    (tmp_path / "there.db").touch()
    for name, words in [("new.db", "is not writable"), ("there.db", "both read and written")]:
        with pytest.raises(evr.StoreError, match=words):
            evr.Eventor(store=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["there.db"]


def test_a_store_that_cannot_be_made_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "eventor.storage.schema.metadata.create_all",
        lambda _: (_ for _ in ()).throw(OSError("disk full")),
    )
    with pytest.raises(evr.StoreError, match=r"x.db cannot be opened: disk full"):
        evr.Eventor(store=tmp_path / "x.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.stores("sqlite")
def test_an_empty_file_becomes_a_store(make, tmp_path):
    (tmp_path / "flow.db").touch()
    assert make().run_id == 1


def test_there_must_be_something_to_recover(make, tmp_path):
    recover = {"run_mode": evr.RunMode.recover}
    empty = tmp_path / "empty.db"
    empty.touch()
    make(name="a").close()
    for arguments, words in [
        ({"store": ":memory:"}, "a store in memory keeps no runs"),
        ({"store": tmp_path / "none.db"}, "none.db does not exist"),
        ({"store": empty}, "empty.db is empty"),
        ({"name": "b"}, "has no run named 'b'; it has runs named 'a'"),
        ({"name": "a", "recovery_run": 3}, "run 1 has no recovery 3 to recover from; it has 0"),
    ]:
        with pytest.raises(evr.RecoveryError, match=words):
            make(**recover, **arguments)
    assert not (tmp_path / "none.db").exists()
    assert empty.read_bytes() == b""
    assert make(name="a", **recover).recovery == 1
