"""The `eventor` command: what it tells of stores, asks of runs, and how it ends."""

import contextlib
import csv
import io
import json
import os
import pty
import re
import signal
import stat
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyte
import pytest
from click.shell_completion import ShellComplete

import eventor as evr
from eventor.cli import commands as cli
from eventor.cli import show
from eventor.cli.named import sequences_of, split
from eventor.storage.history import History
from tests.conftest import on_sqlite, sql, wait_until

pytestmark = pytest.mark.stores("either")

PROGRAM = """
import math, os, signal, sys, time
import eventor as evr

def work(name):
    if name == "die":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

if __name__ == "__main__":
    mode, name, linger = sys.argv[1:]
    config = {"logdir": ".", "linger": float(linger), "sleep_between_loops": 0.05,
              "max_tasks_per_child": None}
    with evr.Eventor("daily", os.environ["STORE"], mode, config=config) as ev:
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("work", work, args=(name,)))
        if mode == "restart":
            ev.trigger_event(go, "monday")
        ev()
"""


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run a command, and return its exit code, and what it has printed and said."""
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def command(*arguments):
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        printed, said = capsys.readouterr()
        return code, printed, said

    return command


@pytest.fixture
def data(run):
    """Run a command, and return the document that it prints."""

    def command(*arguments):
        code, printed, said = run(*arguments, "--json")
        assert (code, said) == (0, "")
        return json.loads(printed)

    return command


def shell(tmp_path, *arguments, **environment):
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "eventor", *arguments],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def words_of(command, place):
    """Return the words of a command, with the place of the test for STORE."""
    return [str(place.store) if word == "STORE" else word for word in command.split()]


def loads(text):
    print("read", text)
    return int(text)


@pytest.fixture
def failed(make):
    """A run of which a step has failed twice, after one that captured its output."""
    ev = make(name="daily", config={"stop_on_exception": False})
    go = ev.add_event("go")
    captured = {"capture_output": True}
    load = ev.add_step("load", loads, args=("7",), config=captured)
    config = {"max_attempts": 2, **captured}
    check = ev.add_step("check[all]", loads, args=("x",), config=config)
    both = ev.add_event("both", (load.success, check.success))
    ev.add_assoc(go, load, check)
    ev.add_assoc(both, ev.add_step("report", int))
    ev.trigger_event(go, "monday")
    ev()
    ev.close()
    return ev


@pytest.fixture
def simple(make):
    """Make runs of one step, in some sequences."""

    def build(*sequences, name="", run_mode="restart", step=int):
        ev = make(name=name, run_mode=run_mode, config={"stop_on_exception": False})
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", step))
        for sequence in sequences:
            ev.trigger_event(go, sequence)
        ev()
        ev.close()
        return ev

    return build


@pytest.mark.stores("both")
def test_a_live_run_is_shown_triggered_and_stopped_from_a_shell(start, run, data, tmp_path, place):
    process = start(PROGRAM, "restart", "well", "600", STORE=place.store)
    wait_until(lambda: run("show", place.store)[0] == 0)

    def done():
        return data("show", place.store)["counts"]["success"]

    wait_until(lambda: done() == 1)
    told = data("show", place.store)
    assert (told["status"], told["owner"], told["owner_pid"]) == ("running", "live", process.pid)
    assert f" {process.pid}@{told['owner_host']}" in run("runs", place.store)[1]
    asked = shell(tmp_path, "trigger", place.store, "go[2]")
    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout == "run 1 of daily is asked to raise go[2]\n"
    wait_until(lambda: done() == 2)
    checked = shell(tmp_path, "show", place.store, "--check")
    assert (checked.returncode, checked.stderr) == (0, "")
    stopped = shell(tmp_path, "stop", place.store, "--name", "daily")
    assert (stopped.returncode, stopped.stdout) == (0, "run 1 of daily is asked to stop\n")
    process.communicate(timeout=30)
    assert process.returncode == 0
    shown = shell(tmp_path, "show", place.store, "--check")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("run 1.0 of daily has succeeded: 2 success\nprogram.py, began ")


@pytest.mark.stores("both")
def test_a_crashed_run_is_told_from_others_and_its_recovery_takes_up_a_trigger(
    start, run, data, place
):
    process = start(PROGRAM, "restart", "die", "0", STORE=place.store)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    code, printed, said = run("show", place.store, "--check")
    assert (code, said) == (1, "eventor: run 1.0 of daily has crashed\n")
    assert re.search(r"^active +work +monday +\S+ +was cut short$", printed, re.MULTILINE)
    (crashed,) = data("runs", place.store)["runs"][0]["recoveries"]
    assert (crashed["status"], crashed["owner"], crashed["ended_at"]) == ("crashed", "dead", None)
    heard = datetime.fromisoformat(crashed["heard_at"])
    began = datetime.fromisoformat(crashed["began_at"])
    assert crashed["seconds"] == pytest.approx((heard - began).total_seconds())
    assert crashed["owner_pid"] == process.pid
    code, printed, said = run("trigger", place.store, "go[5]")
    assert (code, printed) == (0, "run 1 of daily is asked to raise go[5]\n")
    kept = "run 1 of daily is not live: the trigger is kept for its next recovery"
    assert said == f"eventor: {kept}\n"
    nothing = "eventor: run 1 of daily is not live; there is nothing to stop\n"
    assert run("stop", place.store) == (2, "", nothing)
    start(PROGRAM, "recover", "well", "0", STORE=place.store).communicate(timeout=30)
    assert [task["sequence"] for task in data("show", place.store)["tasks"]] == ["monday", 5]
    code, printed, said = run("prune", place.store, "--keep", "0")
    assert (code, said) == (0, "")
    assert printed.splitlines()[-1].startswith("1 run deleted")


@pytest.mark.stores("both")
def test_runs_are_listed_with_their_recoveries(failed, simple, run, data, place):
    simple(1, 2, step=lambda: None)
    simple(run_mode="recover")
    code, printed, said = run("runs", place.store)
    assert (code, said) == (0, "")
    lines = [re.split(r"  +", line) for line in printed.splitlines()]
    assert lines[0] == ["RUN", "NAME", "STATUS", "BEGAN", "TOOK", "TASKS", "OWNER", "PROGRAM"]
    assert [line[:3] for line in lines[1:]] == [
        ["1.0", "daily", "failed"],
        ["2.0", "''", "succeeded"],
        ["2.1", "''", "succeeded"],
    ]
    assert [line[5] for line in lines[1:]] == ["1 failure, 1 success", "2 success", "2 skipped"]
    assert not any(line.endswith(" ") for line in printed.splitlines())
    runs = data("runs", place.store)["runs"]
    assert [(each["run_id"], each["name"]) for each in runs] == [(1, "daily"), (2, "")]
    recovery = runs[1]["recoveries"][1]
    assert {key: recovery[key] for key in ("recovery", "based_on", "owner", "counts")} == {
        "recovery": 1,
        "based_on": 0,
        "owner": "ended",
        "counts": {"ready": 0, "active": 0, "success": 0, "failure": 0, "skipped": 2, "all": 2},
    }
    assert datetime.fromisoformat(recovery["began_at"]).utcoffset() == timedelta(0)
    assert len(data("runs", place.store, "--name", "daily")["runs"]) == 1


@pytest.mark.stores("both")
def test_a_failed_run_is_shown_with_its_errors_tracebacks_and_output(failed, run, data, place):
    code, printed, said = run("show", place.store, "--traceback", "--output")
    assert (code, said) == (0, "")
    assert printed.startswith("run 1.0 of daily has failed: 1 failure, 1 success\n")
    error = "ValueError: invalid literal for int() with base 10: 'x'"
    assert re.search(
        rf"^failure +check\[all\] +monday .* 2  {re.escape(error)}$", printed, re.MULTILINE
    )
    headings = re.findall(r"^(\w+ of .*)$", printed, re.MULTILINE)
    assert headings == [
        "error of check[all][monday], attempt 1",
        "error of check[all][monday], attempt 2",
        "stdout of load[monday]",
        "stdout of check[all][monday], attempt 1",
        "stdout of check[all][monday], attempt 2",
    ]
    assert printed.count("  Traceback (most recent call last):\n") == 2
    assert "\n  read 7\n" in printed
    assert run("show", place.store, "--check")[0] == 1
    told = data("show", place.store, "--status", "failure")
    (task,) = told["tasks"]
    assert (task["step"], task["attempt"], task["error"]) == ("check[all]", 2, error)
    assert [one["status"] for one in task["attempts"]] == ["failure", "failure"]
    assert task["attempts"][0]["stdout"] == "read x\n"
    assert task["cause"] == {"kind": "association", "source": "go", "detail": None}
    assert [event["event"] for event in told["events"]][:1] == ["go"]


def test_tasks_are_chosen_by_step_sequence_and_status(simple, run, data, place):
    simple(1, "1", 2)
    simple(run_mode="recover")

    def chosen(*options):
        return [task["sequence"] for task in data("show", place.store, *options)["tasks"]]

    assert chosen() == [1, "1", 2]
    assert chosen("--sequence", "1") == [1]
    assert chosen("--sequence", "'1'") == ["1"]
    assert chosen("--sequence", "7" * 5000) == []
    assert chosen("--status", "skipped") == [1, "1", 2]
    assert chosen("--status", "success") == []
    assert chosen("--status", "success", "--run", "1.0", "--step", "s") == [1, "1", 2]
    assert chosen("--status", "success", "--run", "1", "--recovery", "0") == [1, "1", 2]
    _, printed, said = run("show", place.store, "--traceback", "--output")
    assert "  '1'\n" in printed
    assert "based on recovery 0\n" in printed
    nothing, uncaptured = said.splitlines()
    assert nothing == "eventor: no attempt at these tasks has failed"
    assert uncaptured.startswith("eventor: of these tasks no output was captured; ")
    unknown = "eventor: run 1 has no step 'x'; known are s\n"
    assert run("show", place.store, "--step", "x") == (2, "", unknown)


def test_why_tells_the_chain_of_causes_or_what_is_missing(failed, run, data, place):
    code, printed, _ = run("why", place.store, "check[all][monday]")
    assert code == 0
    lines = [re.split(r"  +", line) for line in printed.splitlines()]
    assert lines == [
        ["AT", "STATUS", "WHAT", "BECAUSE OF", "NOTE"],
        [lines[1][0], "raised", "event go[monday]", "trigger of the program"],
        [lines[2][0], "failure", "step check[all][monday]", "association of go", lines[2][4]],
    ]
    assert lines[2][4].startswith("ValueError: ")
    assert run("why", place.store, "check[all]")[1] == printed
    code, printed, _ = run("why", place.store, "report")
    assert code == 0
    needs = "it needs load.success and check[all].success"
    error = "ValueError: invalid literal for int() with base 10: 'x'"
    assert printed.splitlines() == [
        "step report[monday] has not run",
        f"  association of event both[monday] is not raised; {needs}",
        "    expression of event check[all].success[monday] is not raised",
        f"      at_success of step check[all][monday] failed: {error}",
    ]
    told = data("why", place.store, "go", "--event")
    assert (told["kind"], told["sequence"], told["happened"]) == ("event", "monday", True)
    assert told["chain"][0]["cause"]["kind"] == "call"
    told = data("why", place.store, "report[monday]")
    assert [lack["depth"] for lack in told["lacks"]] == [0, 1, 2, 3]
    assert told["lacks"][3]["status"] == "failure"


def test_why_says_what_is_not_there(failed, simple, run, place):
    known = "known are go, load.success, check[all].success, both"
    told = f"eventor: run 1 has no event 'report'; {known}\n"
    assert run("why", place.store, "report[monday]", "--event") == (2, "", told)
    assert run("why", place.store, "chek[all]")[2].endswith("did you mean 'check[all]'?\n")
    simple()
    code, _, said = run("why", place.store, "s")
    assert (code, said) == (
        2,
        "eventor: step s has happened in no sequence; name one, as in 's[1]'\n",
    )
    simple(*range(7))
    several = "there are 7 sequences for step s: 0, 1, 2, 3, 4, ...; name one, as in 's[6]'"
    assert run("why", place.store, "s") == (2, "", f"eventor: {several}\n")


def test_a_sequence_is_the_int_where_there_is_such_a_one_else_the_str(simple, data, place):
    def sequence(what, *options):
        return data("why", place.store, what, *options)["sequence"]

    simple(1, "1", "2", "'3'")
    assert [sequence(what) for what in ("s[1]", "s['1']", 's["1"]')] == [1, "1", "1"]
    assert (sequence("s[2]"), sequence("go[2]")) == ("2", "2")
    assert sequence("s['3']") == "'3'"
    assert sequence("s[9]") == 9
    assert sequence("s[monday]") == "monday"


@pytest.mark.parametrize(
    ("what", "name", "sequence"),
    [
        ("s", "s", None),
        ("s[1]", "s", "1"),
        ("s[a[b]]", "s", "a[b]"),
        ("s[x][1]", "s[x]", "1"),
        ("s[x]", "s", "x"),
        ("t[x]", "t[x]", None),
        ("unknown[x[1]]", "unknown", "x[1]"),
        ("unknown", "unknown", None),
        ("[1]", "[1]", None),
        ("s[1", "s[1", None),
        ("", "", None),
    ],
)
def test_a_name_may_have_brackets_as_the_flow_knows_it(what, name, sequence):
    assert split(what, ["s", "s[x]", "t[x]"]) == (name, sequence)


def test_what_reads_as_an_int_and_is_none_is_a_str():
    assert sequences_of("9" * 30) == ["9" * 30]
    assert sequences_of("-5") == [-5, "-5"]
    assert sequences_of("--5") == ["--5"]
    assert sequences_of("٣") == ["٣"]
    assert sequences_of("'") == ["'"]


@pytest.mark.stores("both")
def test_a_trigger_names_its_sequence_with_its_type(simple, data, run, place):
    simple(name="old")
    simple(name="new")
    code, printed, said = run("trigger", place.store, "go['7']", "--json")
    assert (code, said.count("kept for its next recovery")) == (0, 1)
    assert json.loads(printed) == {
        "run_id": 2,
        "name": "new",
        "event": "go",
        "sequence": "7",
        "live": False,
    }
    run("trigger", place.store, "go[7]", "--name", "old")
    assert place.sql("SELECT run_id, sequence_type FROM eventor_request") == [
        (2, "str"),
        (1, "int"),
    ]
    for what, words in [
        ("go", "'go' names no sequence; expected one, as in 'go[1]'"),
        ("og[1]", "run 2 has no event 'og'; did you mean 'go'?"),
    ]:
        assert run("trigger", place.store, what) == (2, "", f"eventor: {words}\n")


WATCHED = """
    import os, pathlib, sys, time
    import eventor as evr

    def slow():
        while not pathlib.Path("go").exists():
            time.sleep(0.01)

    config = {"logdir": ".", "stop_on_exception": False, "max_concurrent": 2}
    with evr.Eventor("watched", os.environ["STORE"], config=config) as ev:
        begin = ev.add_event("begin")
        ev.add_assoc(begin, ev.add_step("slow", slow))
        if len(sys.argv) > 1:
            ev.add_assoc(begin, ev.add_step("bad", lambda: 1 / 0))
        ev.trigger_event(begin)
        ev()
"""


@pytest.mark.stores("both")
@pytest.mark.parametrize("bad", [True, *on_sqlite(False)])
def test_a_run_is_watched_until_it_ends(start, tmp_path, bad, place):
    start(WATCHED, *["bad"] * bad, STORE=place.store)
    query = f"SELECT * FROM eventor_task WHERE status = '{'failure' if bad else 'active'}'"
    wait_until(lambda: place.exists() and place.sql(query))
    process = subprocess.Popen(
        [sys.executable, "-m", "eventor", "watch", place.store], stdout=subprocess.PIPE, text=True
    )
    if bad:
        assert process.stdout.readline() == "failed: bad[1]: ZeroDivisionError: division by zero\n"
    assert process.poll() is None
    (tmp_path / "go").touch()
    shown, _ = process.communicate(timeout=60)
    told = "1 succeeded, 1 failed" if bad else "1 succeeded"
    end = "failed" if bad else "succeeded"
    assert re.fullmatch(rf"eventor run 1\.0: {told} in \d.*: {end}\n", shown)
    assert process.returncode == bad


def test_a_run_is_watched_on_a_terminal(start, tmp_path, place):
    start(WATCHED, "bad", STORE=place.store)
    wait_until(
        lambda: (
            place.exists()
            and place.sql("SELECT * FROM eventor_task WHERE status = 'failure'")
            and place.sql("SELECT * FROM eventor_task WHERE status = 'active'")
        )
    )
    mine, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "eventor", "watch", place.store],
        stdout=its,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LANG": "C.UTF-8"},
    )
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # the other side has gone
        while part := os.read(mine, 1000):
            shown += part
            if b"slow[1]" in shown:
                (tmp_path / "go").touch()
    os.close(mine)
    assert process.wait(timeout=60) == 1
    screen = pyte.Screen(80, 24)
    pyte.ByteStream(screen).feed(shown)
    left = [line.rstrip() for line in screen.display if line.strip()]
    assert len(left) == 1
    assert left[0].startswith("eventor run 1.0: 1 succeeded, 1 failed in ")
    assert b"1 of 2 tasks" in shown


def test_what_has_ended_is_watched_no_more(failed, simple, run, crashed, place):
    code, printed, said = run("watch", place.store)
    assert (code, said) == (1, "")
    told = "ValueError: invalid literal for int() with base 10: 'x'"
    assert printed.splitlines()[0] == f"failed: check[all][monday]: {told}"
    simple(1, name="well")
    assert run("watch", place.store)[0] == 0
    code, printed, said = run("watch", str(crashed), "--json")
    assert (code, said) == (1, "")
    document = json.loads(printed)
    assert (document["name"], document["status"]) == ("daily", "crashed")


def test_a_flow_is_drawn_of_a_run_and_of_a_script(failed, run, tmp_path, place):
    code, printed, said = run("graph", place.store)
    assert (code, printed.splitlines()[0], said) == (0, "flowchart TD", "")
    assert run("graph", place.store, "-o", "a.svg", "--events", "few") == (0, "", "")
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    (tmp_path / "script.py").write_text(
        "import sys, eventor\n"
        "ev = eventor.Eventor()\n"
        "ev.add_assoc(ev.add_event('go'), ev.add_step(sys.argv[2], int))\n"
        "ev()\n"
    )
    code, printed, said = run("graph", "script.py", "--", "--name", "first")
    assert (code, "first" in printed, said) == (0, True, "")
    assert not (tmp_path / "script.db").exists()
    document = json.loads(run("graph", place.store, "--json")[1])
    assert [step["name"] for step in document["definition"]["steps"]][:1] == ["load"]
    assert document["counts"]["events"]["go"] == 1
    assert document["counts"]["steps"]["load"]["success"] == 1
    document = json.loads(run("graph", "script.py", "--json", "--", "--name", "first")[1])
    assert (document["title"], document["counts"]) == ("script", None)
    assert document["definition"]["assocs"] == [{"event": "go", "events": [], "steps": ["first"]}]
    for arguments, words in [
        (("-o", "a.gif"), "cannot be saved as 'a.gif'; expected a name that ends in .svg"),
        (("more",), "'more' is one argument too many"),
    ]:
        code, _, said = run("graph", place.store, *arguments)
        assert (code, words in said) == (2, True)


def test_a_run_is_reported(failed, run, tmp_path, place):
    assert run("report", place.store, "-o", "run.html") == (0, "", "")
    page = (tmp_path / "run.html").read_text()
    assert "<svg" in page
    assert "invalid literal for int()" in page
    assert run("report", place.store, "-o", "-")[1].startswith("<!doctype html>")


@pytest.mark.stores("both")
def test_prune_says_what_it_deletes_and_what_cannot_be_recovered_then(
    failed, simple, run, data, place
):
    for name in ("a", "a", "b"):
        simple(1, name=name)
    code, printed, said = run("prune", place.store, "--keep", "0", "--dry-run")
    assert (code, len(printed.splitlines())) == (0, 6)
    assert printed.endswith("\n4 runs would be deleted\n")
    assert said == "eventor: what had not succeeded could then not be recovered: 1 (failed)\n"
    assert len(data("runs", place.store)["runs"]) == 4
    pruned = data("prune", place.store, "--keep", "1", "--name", "a")
    assert [each["run_id"] for each in pruned["runs"]] == [2]
    assert not pruned["dry_run"]
    assert run("prune", place.store, "--older-than", "2w", "--dry-run")[1] == (
        "no run would be deleted\n"
    )
    assert run("prune", place.store, "--older-than", "2w") == (0, "no run deleted\n", "")
    code, printed, said = run("prune", place.store, "--older-than", "0s", "--keep", "0")
    assert (code, len(printed.splitlines())) == (0, 5)
    assert re.search(r"\n3 runs deleted(; \S+ (bytes|KB|MB) given back)?\n$", printed)
    assert said == "eventor: what had not succeeded can now not be recovered: 1 (failed)\n"
    assert run("runs", place.store) == (0, "the store has no runs\n", "")
    assert run("show", place.store)[0] == 2


def test_prune_leaves_a_live_run_and_the_space(simple, make, run, place):
    simple(1)
    make()
    code, printed, said = run("prune", place.store, "--keep", "0")
    assert (code, printed.splitlines()[-1]) == (0, "1 run deleted")
    assert said == "eventor: a run is live, so the space is left in the store, to be used again\n"


@pytest.mark.stores("sqlite")
def test_prune_says_so_where_space_cannot_be_given_back(simple, run, monkeypatch):
    """PostgreSQL gives it back by itself."""

    def full(*_):
        raise OSError("No space left on device")

    simple(1)
    monkeypatch.setattr("eventor.storage.sqlite.shrink", full)
    code, printed, said = run("prune", "flow.db", "--keep", "0")
    assert (code, printed.splitlines()[-1]) == (0, "1 run deleted")
    assert "the runs are deleted, and their space is left in the store: " in said
    assert "cannot give space back: No space left on device" in said


def test_prune_takes_a_rule_that_can_be_read(simple, run, place):
    simple(1)
    assert run("prune", place.store) == (
        2,
        "",
        "eventor: missing option '--keep' or '--older-than' (see eventor prune --help)\n",
    )
    for age in ("", "d", "30", "30y", "-1d", "99999999999999w", "1e3d"):
        code, _, said = run("prune", place.store, "--older-than", age)
        assert code == 2
        assert f"{age!r} is no age; expected one such as 30d, 12h, 90m or 2w" in said
    for number in ("-1", "x", "9" * 20):
        assert f"{number!r} is no number" in run("prune", place.store, f"--keep={number}")[2]


def test_csv_has_a_row_for_each_task_and_keeps_what_is_in_it(simple, run, tmp_path, place):
    def odd():
        raise ValueError('a "b", c\nd\re\0f ü')

    simple(1, "1,\n2", step=odd)
    assert run("export", place.store, "--format", "csv", "-o", "out.csv") == (0, "", "")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["sequence"], row["sequence_type"]) for row in rows] == [
        ("1", "int"),
        ("1,\n2", "str"),
    ]
    assert rows[0]["error"] == 'ValueError: a "b", c\nd\re\\x00f ü'
    assert (rows[0]["run_id"], rows[0]["step"], rows[0]["cause_source"]) == ("1", "s", "go")
    assert float(rows[0]["seconds"]) >= 0
    printed = run("export", place.store, "--format", "csv", "--run", "1.0")[1]
    assert list(csv.DictReader(io.StringIO(printed, newline=""))) == rows


@pytest.mark.stores("both")
def test_json_has_runs_recoveries_tasks_and_events(failed, simple, run, place):
    simple("a", name="b")
    simple(name="b", run_mode="recover")

    def exported(*options):
        code, printed, said = run("export", place.store, "--format", "json", *options)
        assert (code, said) == (0, "")
        return json.loads(printed)["runs"]

    everything = exported()
    assert [(one["run_id"], len(one["recoveries"])) for one in everything] == [(1, 1), (2, 2)]
    first = everything[0]["recoveries"][0]
    assert [len(task["attempts"]) for task in first["tasks"]] == [1, 2]
    assert first["events"][0]["event"] == "go"
    assert exported("--name", "b") == everything[1:] == exported("--run", "2")
    assert exported("--run", "2.0")[0]["recoveries"] == everything[1]["recoveries"][:1]
    assert exported("--recovery", "1")[0]["recoveries"] == everything[1]["recoveries"][1:]


WRITES = [("export",), ("report",), ("graph",)]


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("command", WRITES, ids=" ".join)
def test_the_file_of_a_store_is_not_written_over(command, simple, run, tmp_path):
    simple(1)
    before = (tmp_path / "flow.db").read_bytes()
    (tmp_path / "link").symlink_to("flow.db")
    (tmp_path / "other").hardlink_to(tmp_path / "flow.db")
    for place, words in [
        ("flow.db", "flow.db is the store itself; expected another file"),
        (f"../{tmp_path.name}/flow.db", "flow.db is the store itself; expected another file"),
        ("link", "link is the store itself"),
        ("other", "other is the store itself"),
        ("flow.db-wal", "flow.db-wal is a part of the store"),
        ("flow.db-shm", "flow.db-shm is a part of the store"),
    ]:
        code, _, said = run(*command, "flow.db", "-o", place)
        assert (code, words in said) == (2, True)
    assert (tmp_path / "flow.db").read_bytes() == before
    assert not list(tmp_path.glob("flow.db-*"))


def test_a_file_is_written_as_it_is_asked_for(simple, run, tmp_path, place):
    simple(1)
    printed = run("export", place.store)[1]
    (tmp_path / "mine").write_text("before")
    (tmp_path / "mine").chmod(0o640)
    (tmp_path / "link").symlink_to("mine")
    assert run("export", place.store, "-o", "link") == (0, "", "")
    assert (tmp_path / "mine").read_text() == printed
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o640
    assert run("export", place.store, "-o", "-") == (0, printed, "")
    assert not (tmp_path / "-").exists()
    for path, words in [
        ("none/out", "none/out cannot be written: No such file or directory"),
        (".", "cannot be written: Is a directory"),
        ("mine/x", "cannot be written: Not a directory"),
    ]:
        code, _, said = run("export", place.store, "-o", path)
        assert (code, words in said) == (2, True)
    others = {path.name for path in tmp_path.iterdir()} - {"flow.db", "logs"}
    assert others == {"link", "mine"}


LOOKS = [
    ("runs",),
    ("show",),
    ("why", "s[1]"),
    ("watch",),
    ("graph",),
    ("report", "-o", "-"),
    ("export",),
    ("prune", "--keep", "0", "--dry-run"),
]
ASKS = [("trigger", "go[1]"), ("stop",), ("prune", "--keep", "0")]


@pytest.mark.parametrize("command", [*LOOKS, *ASKS], ids=" ".join)
def test_what_is_no_store_is_told_in_one_line_and_left_as_it_is(command, run, tmp_path):
    (tmp_path / "empty.db").touch()
    (tmp_path / "text.db").write_text("no store " * 100)
    sql(tmp_path / "other.db", "CREATE TABLE x (y)")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for store, words in [
        ("none.db", "none.db does not exist"),
        ("empty.db", "empty.db is empty"),
        ("text.db", "it is a file, but not a SQLite database"),
        ("other.db", "is a SQLite database of something else"),
        (".", "is a directory"),
        (":memory:", "a store in memory keeps no runs"),
        ("mysql://x/y", "is a URL of kind mysql that eventor cannot use"),
    ]:
        code, printed, said = run(command[0], store, *command[1:])
        assert (code, printed) == (2, "")
        assert words in said
        assert said.startswith("eventor: ")
        assert said.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("command", [*LOOKS, *ASKS], ids=" ".join)
def test_a_store_of_another_schema_is_left_as_it_is(command, version, simple, run, place):
    simple(1)
    place.sql(f"UPDATE eventor_schema SET version = {version}")
    before = place.content()
    code, _, said = run(command[0], place.store, *command[1:])
    assert code == 2
    assert re.fullmatch(rf"eventor: .*has schema version {version}.*left as it is.*\n", said)
    assert place.content() == before


@pytest.mark.parametrize("command", LOOKS, ids=" ".join)
def test_to_look_writes_nothing(command, simple, run, tmp_path, place):
    simple(1)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}, place.content()
    assert run(command[0], place.store, *command[1:])[0] == 0
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}, place.content()
    assert after == before


@pytest.mark.stores("sqlite")
def test_a_file_may_be_named_by_its_url(simple, run, place):
    simple(1)
    before = place.content()
    for command in ("runs", "show", "graph"):
        assert run(command, f"sqlite:///{place.store}")[0] == 0
    assert place.content() == before


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("rnus", "there is no command 'rnus'; did you mean 'runs'? (see eventor --help)"),
        ("runs", "missing argument 'STORE' (see eventor runs --help)"),
        ("runs STORE --nmae x", "no such option"),
        ("show STORE --status done", "'done' is not one of 'ready', 'active'"),
        ("show STORE --run x", "'x' is no run; expected its number, as 4, or 4.1"),
        ("show STORE --run 9", "has no run 9; the latest is 1"),
        ("show STORE --run 1.5", "run 1 has no recovery 5; the latest is 0"),
        ("show STORE --recovery 5", "run 1 has no recovery 5; the latest is 0"),
        ("show STORE --name x", "has no run named 'x'; it has runs named ''"),
        ("runs STORE --name x", "has no run named 'x'; it has runs named ''"),
        ("report STORE", "missing option '-o'"),
        ("export STORE --format xml", "'xml' is not one of"),
        ("graph none.py", "there is no script 'none.py'"),
    ],
)
def test_bad_usage_is_told_in_one_line(command, words, simple, run, place):
    simple(1)
    code, printed, said = run(*words_of(command, place))
    assert (code, printed) == (2, "")
    assert words in said
    assert re.match("eventor: .", said)


def test_help_has_examples_for_each_command(run):
    code, printed, _ = run("--help")
    assert code == 0
    assert "Exit codes:\n" in printed
    for name in cli.cli.commands:
        code, printed, _ = run(name, "-h")
        assert code == 0
        assert re.search(rf"Examples?:\n    eventor {name} ", printed), name
        assert max(map(len, printed.splitlines())) <= 80
    assert run("--version") == (0, f"eventor {evr.__version__}\n", "")
    code, printed, said = run()
    assert (code, printed) == (2, "")
    assert said.startswith("Usage: eventor ")


def test_colours_are_for_terminals_and_can_be_had_and_refused(failed, run, monkeypatch, place):
    plain = run("show", place.store)[1]
    assert "\x1b" not in plain
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = run("show", place.store)[1]
    assert "\x1b[" in coloured
    undone = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert re.sub(r"\(.*ago\)", "", undone) == re.sub(r"\(.*ago\)", "", plain)
    for arguments in (("show", place.store, "--no-color"), ("--no-color", "show", place.store)):
        assert "\x1b" not in run(*arguments)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("show", place.store)[1]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_tables_are_as_wide_as_the_terminal(columns, make, run, monkeypatch, place):
    ev = make(name="a name of a run that is somewhat long", config={"stop_on_exception": False})
    go = ev.add_event("go")
    long = "a step whose name is so long that it takes a line of its own, and then some more of it"
    ev.add_assoc(go, ev.add_step(long, loads, args=("x" * 100,)), ev.add_step("short", int))
    ev.trigger_event(go, "a sequence that is long")
    ev()
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in (("show",), ("runs",), ("why", f"{long}[a sequence that is long]")):
        code, printed, _ = run(command[0], place.store, *command[1:])
        assert code == 0
        table = printed.splitlines()[2 if command == ("show",) else 0 :]
        assert max(map(len, table)) <= columns
        assert "…" in printed or command == ("runs",)
        words = "".join(printed.split())
        assert command == ("runs",) or "shortint" in words or "takes" in words


def test_what_would_do_something_to_a_terminal_is_written_out(make, run, place):
    def step():
        print("\x1b[31mred\x1b[0m\x1b]0;title\x07 10%\r100%\x1b[2J\x08")
        raise ValueError("a\x1b[31m\tb")

    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", step, config={"capture_output": True}))
    ev.trigger_event(go, "\x1b[1mx\n")
    ev()
    code, printed, _ = run("show", place.store, "--traceback", "--output")
    assert code == 0
    assert r"\x1b[1mx\n" in printed
    assert r"ValueError: a\x1b[31m\tb" in printed
    assert not set(printed) & {"\x1b", "\x07", "\x08", "\r"}


def test_a_pipe_that_is_closed_early_ends_the_command_quietly(simple, place):
    simple(1)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "eventor", "show", place.store]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (-signal.SIGPIPE, b"")


@pytest.mark.parametrize("how", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_is_written_to_nowhere(simple, how, place):
    simple(1)
    command = f'exec {sys.executable} -W error -m eventor show "$0" {how}'
    ran = subprocess.run(
        ["sh", "-c", command, place.store], capture_output=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, b"")


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="there is no device that is full")
@pytest.mark.parametrize("command", ["show STORE", "export STORE", "--help"])
def test_output_that_cannot_be_written_is_told(simple, command, place):
    simple(1)
    with FULL.open("w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "eventor", *words_of(command, place)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    told = "eventor: standard output cannot be written: No space left on device\n"
    assert (ran.returncode, ran.stderr) == (2, told)


def test_ctrl_c_ends_it_with_130(run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("eventor.cli.command.Store", interrupted)
    code, printed, said = run("runs", "flow.db")
    assert (code, printed, said.strip()) == (130, "", "")


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_it_says_what_to_install(missing, tmp_path):
    code = (
        f"import sys, runpy; sys.modules[{missing!r}] = None; sys.argv = ['eventor', 'runs']; "
        "runpy.run_module('eventor', run_name='__main__')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    told = f"eventor: the command needs {missing}: pip install 'eventor[cli]'\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", told)


def test_to_import_eventor_does_not_import_what_the_command_needs(tmp_path):
    code = (
        "import sys, eventor; print({'click', 'rich', 'eventor.cli.commands'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


def completed(*arguments):
    *before, last = map(str, arguments)
    complete = ShellComplete(cli.cli, {}, "eventor", "_EVENTOR_COMPLETE")
    return [(item.value, item.type) for item in complete.get_completions(before, last)]


def test_a_shell_completes_commands_stores_names_steps_and_events(failed, run, tmp_path, place):
    assert ("runs", "plain") in completed("ru")
    assert completed("show", "fl") == [("fl", "file")]
    assert completed("show", place.store, "--name", "d") == [("daily", "plain")]
    assert completed("show", place.store, "--step", "ch") == [("check[all]", "plain")]
    assert completed("trigger", place.store, "g") == [("go", "plain")]
    names = [name for name, _ in completed("why", place.store, "")]
    assert {"load", "report", "go", "both"} <= set(names)
    assert completed("why", "none.db", "") == completed("show", "none.db", "--name", "") == []
    words = {"_EVENTOR_COMPLETE": "bash_complete", "COMP_WORDS": "eventor ru", "COMP_CWORD": "1"}
    assert shell(tmp_path, **words).stdout == "plain,runs\n"


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (timedelta(seconds=5), "5 s ago"),
        (timedelta(minutes=59, seconds=59), "59 min ago"),
        (timedelta(hours=2), "10:00:00"),
        (timedelta(hours=13), "yesterday 23:00"),
        (timedelta(days=40), "09 Jun 12:00"),
        (timedelta(days=400), "2029-06-14 12:00"),
        (timedelta(seconds=-5), "12:00:05"),
    ],
)
def test_when_something_was_is_told_in_words_and_in_local_time(before, words):
    now = datetime(2030, 7, 19, 12).astimezone()
    assert show.ago((now - before).astimezone(UTC), now.astimezone(UTC)) == words


def test_the_log_of_a_store_is_not_written_over_through_a_link(crashed, run, tmp_path):
    (tmp_path / "link.db").symlink_to(crashed.name)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("crashed.db*")}
    for place in ("crashed.db-wal", "crashed.db-shm", "crashed.db"):
        code, _, said = run("export", "link.db", "-o", place)
        assert (code, f"{place} is " in said) == (2, True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("crashed.db*")} == before


def test_another_store_is_not_written_over(simple, run, tmp_path, place):
    simple(1)
    sql(tmp_path / "other.db", "CREATE TABLE x (y)")
    before = (tmp_path / "other.db").read_bytes()
    code, _, said = run("export", place.store, "-o", "other.db")
    assert (code, "is a SQLite database, which may be another store" in said) == (2, True)
    assert (tmp_path / "other.db").read_bytes() == before


@pytest.mark.stores("both")
def test_what_a_command_reads_is_of_one_state(
    simple, make, run, data, monkeypatch, tmp_path, place
):
    simple(1)
    reading, deleted = History.tasks, []

    def prune_first(history, *arguments):
        if not deleted:
            deleted.append(shell(tmp_path, "prune", place.store, "--keep", "0").returncode)
        return reading(history, *arguments)

    monkeypatch.setattr(History, "tasks", prune_first)
    simple(2)
    live = make(name="live")
    told = data("show", place.store, "--name", "")
    assert (told["counts"]["success"], len(told["tasks"])) == (1, 1)
    assert deleted == [0]
    assert run("show", place.store, "--name", "")[0] == 2
    live.close()


@pytest.mark.stores("sqlite")
def test_a_look_at_a_file_at_rest_is_repeated_if_it_was_written_meanwhile(
    simple, data, monkeypatch, tmp_path
):
    simple(1)
    simple(1, 2)
    reading, deleted = History.tasks, []

    def prune_first(history, *arguments):
        if not deleted:
            deleted.append(shell(tmp_path, "prune", "flow.db", "--keep", "1").returncode)
        return reading(history, *arguments)

    monkeypatch.setattr(History, "tasks", prune_first)
    told = data("show", "flow.db", "--status", "success")
    assert (told["run_id"], told["counts"]["success"], len(told["tasks"])) == (2, 2, 2)
    assert deleted == [0]


@pytest.mark.stores("sqlite")
def test_a_look_at_a_file_that_is_always_written_ends_with_an_error(simple, run, monkeypatch):
    simple(1)
    reading = History.tasks

    def touch_first(history, *arguments):
        os.utime("flow.db")
        return reading(history, *arguments)

    monkeypatch.setattr(History, "tasks", touch_first)
    code, printed, said = run("show", "flow.db")
    assert (code, printed, "was written while it was looked at; look again" in said) == (
        2,
        "",
        True,
    )


@pytest.mark.parametrize("columns", ["0", "x", "-7", "9" * 9])
def test_a_width_that_is_none_does_not_count(columns, simple, run, monkeypatch, place):
    simple(1)
    printed = run("show", place.store)[1]
    monkeypatch.setenv("COLUMNS", columns)
    again = run("show", place.store)[1]
    assert again.splitlines()[2:] == printed.splitlines()[2:]


def test_what_should_not_be_is_not_taken_for_a_failed_run(simple, run, monkeypatch, place):
    def broken(*_):
        raise TypeError("of no type")

    simple(1)
    monkeypatch.setattr(History, "runs", broken)
    code, _, said = run("runs", place.store)
    assert (code, "TypeError: of no type" in said, "eventor has a bug" in said) == (2, True, True)


def test_what_was_cut_short_is_not_told_as_active(crashed, run, tmp_path):
    code, printed, _ = run("why", str(crashed), "s")
    assert (code, re.findall("cut short|active", printed)) == (0, ["cut short"])
    assert run("graph", str(crashed), "-o", "cut.svg")[0] == 0
    picture = (tmp_path / "cut.svg").read_text()
    assert ">cut short<" in picture
    assert ">active<" not in picture
    assert 'class="node step cut"' in picture


def test_a_run_and_its_recovery_are_not_named_in_two_ways(simple, run, place):
    simple(1)
    code, _, said = run("show", place.store, "--run", "1.1", "--recovery", "0")
    assert (code, "expected one of them" in said) == (2, True)
    assert run("show", place.store, "--run", "1.0", "--recovery", "0")[0] == 0


def test_names_are_completed_in_quotes_where_bash_needs_them(make, run, monkeypatch, place):
    with make(name="a run; with `words`") as ev:
        ev.add_step("plain", int)
        ev.add_step("in $HOME", int)
        ev()
    monkeypatch.setenv("_EVENTOR_COMPLETE", "bash_complete")
    assert completed("show", place.store, "--step", "") == [
        ("plain", "plain"),
        ("'in $HOME'", "plain"),
    ]
    assert completed("show", place.store, "--name", "a") == [("'a run; with `words`'", "plain")]
    assert completed("nothing", "x") == []
    monkeypatch.setenv("_EVENTOR_COMPLETE", "zsh_complete")
    assert completed("show", place.store, "--step", "in") == [("in $HOME", "plain")]


@pytest.mark.stores("sqlite")
@pytest.mark.parametrize("path", ["~/flow.db", "$HOME/flow.db", "sqlite:///$HOME/flow.db"])
def test_the_path_of_a_file_is_read_as_a_shell_would(path, simple, run, monkeypatch):
    simple(1)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert completed("show", path, "--step", "") == [("s", "plain")]


def test_a_script_that_never_ends_is_ended_with_the_command(start, tmp_path):
    (tmp_path / "never.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path('pid').write_text(f'{os.getpid()} ')\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "eventor", "graph", "never.py"], cwd=tmp_path, text=True
    )
    pid = tmp_path / "pid"
    wait_until(lambda: pid.exists() and pid.read_text().endswith(" "))
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    wait_until(lambda: not Path(f"/proc/{int(pid.read_text())}").exists())


def keys_of(document):
    if isinstance(document, list):
        return {key for one in document for key in keys_of(one)}
    if not isinstance(document, dict):
        return set()
    return set(document) | {key for one in document.values() for key in keys_of(one)}


def test_the_keys_of_documents_are_on_the_page_about_the_command(failed, data, run, place):
    page = (Path(__file__).parent.parent / "docs/howto/command.rst").read_text()
    documents = [data(name, place.store) for name in ("runs", "show")]
    documents.append(data("prune", place.store, "--keep", "9"))
    documents.append(json.loads(run("watch", place.store, "--json")[1]))
    documents.append(json.loads(run("trigger", place.store, "go[1]", "--json")[1]))
    documents.append(json.loads(run("export", place.store)[1]))
    keys = {key for one in documents for key in keys_of(one)}
    of_graph = json.loads(run("graph", place.store, "--json")[1])
    keys |= set(of_graph) | set(of_graph["counts"])
    keys |= set(data("why", place.store, "report[monday]"))
    assert sorted(key for key in keys if f"``{key}``" not in page) == []
    assert len(keys) > 45


@pytest.mark.parametrize("command", ['export "$0"', 'show "$0" --json'])
def test_output_that_is_cut_short_is_told_where_python_does_not_buffer(
    simple, command, tmp_path, place
):
    simple(*range(50))
    limited = f"ulimit -f 8; exec {sys.executable} -m eventor {command} > cut"
    # What measures the tests could not write its own file either.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    ran = subprocess.run(
        ["bash", "-c", limited, place.store],
        cwd=tmp_path,
        env={**environment, "PYTHONUNBUFFERED": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    told = "eventor: standard output cannot be written: File too large\n"
    assert (ran.returncode, ran.stderr) == (2, told)


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_what_belongs_to_another_store_is_not_written_over(
    simple, run, crashed, suffix, tmp_path, place
):
    simple(1)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("crashed.db*")}
    (tmp_path / "link").symlink_to(f"crashed.db{suffix}")
    for path in (f"crashed.db{suffix}", "link"):
        code, _, said = run("export", place.store, "-o", path)
        assert (code, f"{path} is a part of a SQLite database" in said) == (2, True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("crashed.db*")} == before


def test_a_flow_as_json_is_written_to_a_file(simple, run, tmp_path, place):
    simple(1)
    printed = run("graph", place.store, "--json")[1]
    assert run("graph", place.store, "--json", "-o", "flow.json") == (0, "", "")
    assert (tmp_path / "flow.json").read_text() == printed


@pytest.mark.parametrize("option", ["--run=1", "--recovery=0", "--name=x"])
def test_a_script_has_no_runs(run, option, tmp_path):
    (tmp_path / "script.py").write_text("import eventor; eventor.Eventor()()")
    code, _, said = run("graph", "script.py", option)
    assert (code, "a script has no runs" in said) == (2, True)


@pytest.mark.parametrize(
    ("term", "options", "drawn", "coloured"),
    [
        ("xterm", [], True, True),
        ("xterm", ["--no-color"], True, False),
        ("dumb", [], False, False),
    ],
)
def test_a_picture_is_drawn_as_the_terminal_can(
    start, tmp_path, term, options, drawn, coloured, place
):
    start(WATCHED, STORE=place.store)
    query = "SELECT * FROM eventor_task WHERE status = 'active'"
    wait_until(lambda: place.exists() and place.sql(query))
    mine, its = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "80", "LANG": "C.UTF-8"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "eventor", "watch", place.store, *options],
        stdout=its,
        env=environment,
    )
    os.close(its)
    shown = b""
    if not drawn:
        (tmp_path / "go").touch()
    with contextlib.suppress(OSError):  # the other side has gone
        while part := os.read(mine, 1000):
            shown += part
            if b"slow[1]" in shown:
                (tmp_path / "go").touch()
    os.close(mine)
    assert process.wait(timeout=60) == 0
    in_colours = re.search(rb"\x1b\[[0-9;]*(3|9)[0-9]m", shown) is not None
    assert (b"\x1b[" in shown, in_colours) == (drawn, coloured)
