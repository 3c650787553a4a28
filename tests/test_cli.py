"""The command: what it prints, its exit codes, and that it leaves stores as they are."""

import contextlib
import csv
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET

import pyte
import pytest

import eventor as evr
from eventor import cli
from tests.conftest import sql, statuses, wait_until


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command; return its exit code, and what it printed to standard output and error."""
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert "Traceback (most" not in shown.err
        return code, shown.out, shown.err

    return call


@pytest.fixture
def build(make, tmp_path):
    """Build a flow of which one sequence fails, and call it."""

    def check(number):
        print("checking", number)
        if number == 3:
            raise ValueError("bad number\nand more")

    def call(name="daily", sequences=(1, 3, "x", "1"), **arguments):
        ev = make(name=name, config={"stop_on_exception": False}, **arguments)
        begin = ev.add_event("begin")
        config = {"capture_output": True, "max_attempts": 2}
        load = ev.add_step("load", int)
        checked = ev.add_step("check", check, (evr.sequence,), config=config)
        ev.add_assoc(begin, load)
        ev.add_assoc(load.success, checked)
        ev.add_assoc(checked.success, ev.add_step("report", int))
        ev.trigger_events(begin, sequences)
        ev()
        return ev

    return call


@pytest.fixture
def store(build, tmp_path):
    """Make a store of a run that has failed, and of one that has succeeded before."""
    build("quick", [1]).close()
    build().close()
    return tmp_path / "flow.db"


def test_runs_are_listed(run, store):
    code, shown, _ = run("runs", store)
    heads, first, second = (re.split(r" {2,}", line) for line in shown.splitlines())
    assert heads[:3] == ["RUN", "NAME", "STATUS"]
    assert first[:3] == ["1.0", "quick", "succeeded"]
    assert second[:3] == ["2.0", "daily", "failed"]
    assert "1 failure, 10 success" in second
    assert code == 0
    assert len(run("runs", store, "--name", "quick")[1].splitlines()) == 2
    assert run("runs", store, "--name", "none")[1:] == ("", "there are no runs\n")


def test_runs_as_json_keep_times_and_counts(run, store):
    _code, shown, _ = run("runs", store, "--json")
    _quick, daily = json.loads(shown)
    (recovery,) = daily["recoveries"]
    assert (daily["name"], recovery["status"], recovery["owner"]) == ("daily", "failed", "ended")
    assert recovery["tasks"] == {
        "ready": 0,
        "active": 0,
        "success": 10,
        "failure": 1,
        "skipped": 0,
        "all": 11,
    }
    assert recovery["began_at"].endswith("+00:00")
    assert 0 < recovery["seconds"] < 60


def test_tasks_are_shown(run, store):
    code, shown, _ = run("show", store)
    assert code == 0
    assert shown.startswith("run 2.0 of daily has failed: 1 failure, 10 success\n")
    assert len(shown.splitlines()) == 4 + 11
    code, shown, _ = run("show", store, "--status", "failure", "--traceback", "--output")
    assert re.search(r"failure +check +3 .* 2 +ValueError: bad number\n", shown)
    assert shown.count('raise ValueError("bad number\\nand more")') == 2
    assert shown.count("stdout of check[3], attempt") == 2
    assert "  checking 3\n" in shown


@pytest.mark.parametrize(
    ("options", "tasks"),
    [
        (["--step", "load"], 4),
        (["--sequence", "1"], 3),
        (["--sequence", "'1'"], 3),
        (["--sequence", "x", "--step", "report"], 1),
        (["--run", "1"], 3),
        (["--name", "quick", "--recovery", "0"], 3),
        (["--status", "skipped"], 0),
    ],
)
def test_tasks_are_chosen(run, store, options, tasks):
    _code, shown, _ = run("show", store, "--json", *options)
    found = json.loads(shown)["tasks"]
    assert len(found) == tasks
    if options[:1] == ["--sequence"] and options[1].strip("'") == "1":
        assert {type(task["sequence"]) for task in found} == {str if "'" in options[1] else int}


def test_a_check_tells_by_its_exit_code(run, store, crashed, make):
    assert run("show", store, "--check")[0] == 1
    assert run("show", store, "--run", "1", "--check")[0] == 0
    code, shown, _ = run("show", crashed, "--check")
    assert (code, shown.split(":")[0]) == (1, "run 1.0 of daily has crashed")
    assert re.search(r"active +s .* was cut short", shown)
    live = make(store=crashed.parent / "live.db")
    code, shown, _ = run("show", crashed.parent / "live.db", "--check")
    assert (code, shown.splitlines()[0]) == (0, "run 1.0 is running: no task")
    live.close()


def test_why_is_told(run, store):
    code, shown, _ = run("why", store, "report[x]")
    assert code == 0
    assert re.findall(r"(?:event|step) \S+", shown) == [
        *("event begin[x]", "step load[x]", "event load.success[x]", "step check[x]"),
        *("event check.success[x]", "step report[x]"),
    ]
    _code, shown, _ = run("why", store, "report[3]")
    assert shown.splitlines() == [
        "step report[3] has not run",
        "  association of event check.success[3] is not raised",
        "    at_success of step check[3] failed: ValueError: bad number ...",
    ]
    told = json.loads(run("why", store, "check.success[3]", "--event", "--json")[1])
    assert (told["happened"], [lack["depth"] for lack in told["lacks"]]) == (False, [0, 1])


def test_a_sequence_that_is_not_told_is_the_only_one(run, store):
    code, _, errors = run("why", store, "load")
    assert (code, errors) == (
        2,
        "eventor: 'load' stands in 4 sequences (1, 3, x, '1'); expected 'load[SEQUENCE]'\n",
    )
    assert run("why", store, "load", "--run", "1")[0] == 0


def test_a_live_run_is_triggered_and_stopped(run, start, tmp_path):
    process = start("""
        import eventor as evr
        config = {"logdir": ".", "linger": 600, "sleep_between_loops": 0.05}
        with evr.Eventor("shop", "shop.db", config=config) as ev:
            order = ev.add_event("order [big]")
            ev.add_assoc(order, ev.add_step("ship", int))
            ev()
    """)
    store = tmp_path / "shop.db"
    wait_until(lambda: store.exists() and sql(store, "SELECT * FROM eventor_definition"))
    assert run("trigger", store, "order [big][7]") == (
        0,
        "event order [big][7] of run 1 is triggered\n",
        "",
    )
    wait_until(lambda: sql(store, "SELECT * FROM eventor_task WHERE status = 'success'"))
    assert run("prune", store, "--keep", "0") == (0, "", "0 are deleted\n")
    assert run("stop", store) == (0, "run 1 is asked to stop\n", "")
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert run("trigger", store, "order [big]['7']")[1] == (
        "event order [big]['7'] of run 1 is kept for its next recovery: the run is not live\n"
    )
    assert run("stop", store)[::2] == (
        2,
        "eventor: run 1 is not live: there is nothing to stop\n",
    )
    assert run("trigger", store, "order [big]")[0] == 2


WATCHED = """
    import pathlib, sys, time
    import eventor as evr

    def slow():
        while not pathlib.Path("go").exists():
            time.sleep(0.01)

    config = {"logdir": ".", "stop_on_exception": False, "max_concurrent": 2}
    with evr.Eventor("watched", "watched.db", config=config) as ev:
        begin = ev.add_event("begin")
        ev.add_assoc(begin, ev.add_step("slow", slow))
        if len(sys.argv) > 1:
            ev.add_assoc(begin, ev.add_step("bad", lambda: 1 / 0))
        ev.trigger_event(begin)
        ev()
"""


@pytest.mark.parametrize("bad", [True, False])
def test_a_run_is_watched_until_it_ends(start, tmp_path, bad):
    start(WATCHED, *["bad"] * bad)
    store = tmp_path / "watched.db"
    query = f"SELECT * FROM eventor_task WHERE status = '{'failure' if bad else 'active'}'"
    wait_until(lambda: store.exists() and sql(store, query))
    process = subprocess.Popen(
        [sys.executable, "-m", "eventor", "watch", store], stdout=subprocess.PIPE, text=True
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


def test_a_run_is_watched_on_a_terminal(start, tmp_path):
    start(WATCHED, "bad")
    store = tmp_path / "watched.db"
    wait_until(
        lambda: (
            store.exists()
            and sql(store, "SELECT * FROM eventor_task WHERE status = 'failure'")
            and sql(store, "SELECT * FROM eventor_task WHERE status = 'active'")
        )
    )
    mine, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "eventor", "watch", store],
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


def test_what_has_ended_is_watched_no_more(run, store, crashed):
    code, shown, _ = run("watch", store)
    assert (code, shown.splitlines()[0]) == (1, "failed: check[3]: ValueError: bad number and more")
    assert run("watch", store, "--run", "1")[0] == 0
    code, shown, _ = run("watch", crashed, "--json")
    assert (code, json.loads(shown)["status"]) == (1, "crashed")


def test_runs_are_pruned(run, store):
    before = store.read_bytes()
    code, shown, errors = run("prune", store, "--keep", "0", "--name", "quick", "--dry-run")
    assert (code, errors) == (0, "1 would be deleted\n")
    assert "quick" in shown
    assert store.read_bytes() == before
    assert run("prune", store, "--older-than", "30d") == (0, "", "0 are deleted\n")
    assert run("prune", store, "--keep", "0", "--name", "quick")[0] == 0
    assert [one["name"] for one in json.loads(run("runs", store, "--json")[1])] == ["daily"]


def test_all_is_exported(run, store, tmp_path):
    code, shown, _ = run("export", store, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(shown)))
    assert (code, len(rows)) == (0, 14)
    (failed,) = [row for row in rows if row["status"] == "failure"]
    assert failed["error"] == "ValueError: bad number\nand more"
    assert [row["sequence_type"] for row in rows if row["sequence"] == "1"].count("str") == 3
    assert run("export", store, "--name", "daily", "-o", tmp_path / "all.json")[:2] == (0, "")
    (daily,) = json.loads((tmp_path / "all.json").read_text())
    (recovery,) = daily["recoveries"]
    assert (len(recovery["tasks"]), len(recovery["events"])) == (11, 4 + 4 + 3)


def test_a_flow_is_drawn_of_a_run_and_of_a_script(run, store, tmp_path):
    code, shown, _ = run("graph", store)
    assert (code, shown.splitlines()[0]) == (0, "flowchart TD")
    assert run("graph", store, "-o", tmp_path / "a.svg", "--events", "few")[0] == 0
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, eventor\n"
        "ev = eventor.Eventor()\n"
        "ev.add_assoc(ev.add_event('go'), ev.add_step(sys.argv[2], int))\n"
        "ev()\n"
    )
    code, shown, _ = run("graph", script, "--", "--name", "first")
    assert (code, "first" in shown) == (0, True)
    assert not (tmp_path / "script.db").exists()
    assert run("graph", store, "-o", tmp_path / "a.gif")[0] == 2


def test_a_run_is_reported(run, store, tmp_path):
    assert run("report", store, "-o", tmp_path / "run.html") == (0, "", "")
    page = (tmp_path / "run.html").read_text()
    assert "<svg" in page
    assert "ValueError: bad number" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs", "nothing.db"], "does not exist"),
        (["runs", "."], "is a directory"),
        (["runs", "text"], "not a SQLite database"),
        (["runs", "empty"], "is empty"),
        (["runs", "other.db"], "of something else"),
        (["runs", "postgresql://x/y"], "of a kind that eventor cannot use"),
        (["show", "flow.db", "--run", "7"], "has no run 7"),
        (["show", "flow.db", "--recovery", "7"], "has no recovery 7"),
        (["show", "flow.db", "--step", "lode"], "did you mean 'load'"),
        (["why", "flow.db", "lode[1]"], "did you mean 'load'"),
        (["trigger", "flow.db", "began[1]"], "did you mean 'begin'"),
        (["prune", "flow.db"], "neither keep nor older_than"),
        (["prune", "flow.db", "--older-than", "3 years"], "is no age"),
        (["graph", "nothing.py"], "there is no script"),
        (["export", "flow.db", "-o", "no/such/place"], "No such file or directory"),
        (["shw", "flow.db"], "did you mean 'show'"),
        (["show", "flow.db", "--sort"], "No such option"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(run, store, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("no database")
    (tmp_path / "empty").touch()
    sql(tmp_path / "other.db", "CREATE TABLE mine (x)")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    code, shown, errors = run(*arguments)
    assert (code, shown) == (2, "")
    assert words in errors
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {name for name in after if not name.endswith(("-wal", "-shm"))} == set(before)


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "eventor", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_it_is_a_program(store):
    assert command("--version").stdout == f"eventor {evr.__version__}\n"
    assert "Exit codes" in command("--help").stdout
    ran = command("show", store, "--check")
    assert (ran.returncode, ran.stderr) == (1, "")
    assert "\x1b" not in ran.stdout
    env = {**os.environ, "FORCE_COLOR": "1"}
    assert "\x1b[" in command("show", store, env=env).stdout
    assert "\x1b[" not in command("show", store, "--no-color", env=env).stdout


def test_who_reads_on_no_more_is_no_error(store):
    process = subprocess.Popen(
        [sys.executable, "-m", "eventor", "export", store],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdout = None
    _shown, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) in [(-signal.SIGPIPE, b""), (0, b"")]


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_it_tells_what_to_install(tmp_path, missing):
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError(name={missing!r})")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = command("runs", "flow.db", env=env, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == f"eventor: the command needs {missing}: pip install 'eventor[cli]'\n"


def test_a_crashed_run_can_be_looked_at_and_recovered_after(run, crashed, make):
    before = crashed.read_bytes()
    for command in ("runs", "show", "graph"):
        assert run(command, crashed)[0] == 0
    assert run("why", crashed, "s")[0] == 0
    assert crashed.read_bytes() == before
    ev = make(name="daily", store=crashed, run_mode="recover")
    ev.add_assoc(ev.add_event("go"), ev.add_step("s", int))
    assert ev() is True
    assert statuses(ev) == {"s[1]": "success"}
