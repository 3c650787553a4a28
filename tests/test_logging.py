"""What is said, to whom, and in which form: scripts in processes of their own."""

import logging
import os
from pathlib import Path

import pytest

pytestmark = [pytest.mark.stores("either"), pytest.mark.usefixtures("measure")]

FLOW = """
import logging, os, sys, threading, multiprocessing
import eventor as evr

def flow(func, **arguments):
    config = {"logdir": "logs", **arguments.pop("config", {})}
    with evr.Eventor(store=":memory:", config=config, **arguments) as ev:
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", func=func))
        ev.trigger_event(go)
        return ev()
"""


def test_records_of_a_step_reach_the_owners_handlers_once(script, tmp_path):
    ran = script(
        FLOW
        + """
class Odd:
    def __repr__(self): return "<odd>"

def step():
    logging.getLogger("a.b").info("of %s", "a.b")
    logging.getLogger("alone").warning("alone", extra={"odd": Odd(), "more": [1, {"x": (2,)}]})
    logging.getLogger("quiet").warning("never")
    try:
        1 / 0
    except ZeroDivisionError:
        logging.exception("with its traceback")
    logging.getLogger("a").info("bad format %d", "x")

alone = logging.getLogger("alone")
alone.propagate = False
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("ALONE %(message)s %(odd)s %(more)s %(processName)s"))
alone.addHandler(handler)
logging.getLogger("quiet").setLevel(logging.ERROR)
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="ROOT %(name)s: %(message)s")
logging.getLogger("a").addHandler(logging.NullHandler())
flow(step)
"""
    )
    assert ran.returncode == 0
    lines = ran.stdout.splitlines()
    assert lines.count("ROOT a.b: of a.b") == 1
    assert lines.count("ALONE alone <odd> [1, {'x': [2]}] s[1]") == 1
    assert "never" not in ran.stdout
    assert lines.count("ROOT root: with its traceback") == 1
    assert lines.count("ZeroDivisionError: division by zero") == 1
    assert lines.count("ROOT eventor: Processing finished") == 1
    assert "--- Logging error ---" in ran.stderr
    assert "[ INFO ]" not in ran.stderr
    debug = (tmp_path / "logs/program.debug.log").read_text()
    assert debug.count("[ of a.b ]") == 1
    assert debug.count("[ Running step s[1] ]") == 1
    assert "EventRaised" in debug
    error = (tmp_path / "logs/program.error.log").read_text()
    assert "with its traceback" in error
    assert "Running" not in error


def test_without_logging_of_the_program_the_console_is_eventors(script):
    ran = script(FLOW + "\nflow(lambda: logging.getLogger('x').warning('look'))")
    assert ran.stderr.count("[ WARNING ][ look ][ program.<lambda> ]") == 1
    assert ran.stderr.count("\n") == 5


@pytest.mark.parametrize(
    ("setting", "seen"),
    [
        ("pass", 4),
        ("logging.getLogger('eventor').setLevel(logging.WARNING)", 0),
        ("logging.getLogger('eventor').disabled = True", 0),
        ("logging.disable(logging.INFO)", 0),
        ("logging.getLogger('eventor').addHandler(logging.NullHandler())", 0),
        ("logging.basicConfig()", 0),
        ("logging.basicConfig(level=logging.INFO)", 4),
        ("logging.basicConfig(level=logging.DEBUG)", 4),
    ],
)
def test_the_programs_own_configuration_is_respected(script, setting, seen):
    ran = script(FLOW + setting + "\nflow(int)\nprint(len(logging.root.handlers))")
    assert ran.stderr.count("\n") == seen
    assert ran.stdout == ("1\n" if "basicConfig" in setting else "0\n")


def test_the_level_of_an_eventor_is_its_own(script, tmp_path):
    ran = script(FLOW + "flow(int, logging_level=logging.ERROR)\nflow(int, logging_level='DEBUG')")
    assert ran.stderr.count("Processing finished") == 1
    assert "TaskReady" in ran.stderr
    assert (tmp_path / "logs/program.debug.log").read_text().count("Processing finished") == 2


def test_levels_reach_a_spawned_step(script):
    ran = script(
        FLOW
        + """
def step():
    logging.getLogger("mine").debug("seen")
    logging.getLogger("other").debug("unseen")
    logging.getLogger("disabled").error("unseen")

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("mine").setLevel(logging.DEBUG)
    logging.getLogger("disabled").disabled = True
    flow(step, config={"task_construct": multiprocessing.get_context("spawn").Process})
"""
    )
    assert ran.stderr.count("DEBUG:mine:seen") == 1
    assert "unseen" not in ran.stderr


def test_threads_of_a_step_may_all_log_and_its_children_do_not_break_in(script):
    ran = script(
        FLOW
        + """
def shout(name):
    for number in range(200):
        logging.warning("%s %d %s", name, number, "x" * 3000)

def step():
    threads = [threading.Thread(target=shout, args=(name,)) for name in "ab"]
    child = multiprocessing.get_context("fork").Process(target=shout, args=("child",))
    child.start()
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    child.join()
    return "well"

logging.basicConfig(format="ROOT %(message)s")
print(flow(step))
"""
    )
    assert ran.stdout == "True\n"
    assert ran.stderr.count("ROOT a ") == ran.stderr.count("ROOT b ") == 200
    assert ran.stderr.count("\nchild ") + ran.stderr.startswith("child ") == 200


@pytest.mark.parametrize("trap", ["symlink", "fifo", "directory", "hard link"])
def test_log_files_are_never_written_through_a_trap(script, tmp_path, trap):
    logs = tmp_path / "logs"
    logs.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = logs / "program.debug.log"
    {
        "symlink": lambda: path.symlink_to(victim),
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "hard link": lambda: path.hardlink_to(victim),
    }[trap]()
    ran = script(FLOW + "print(flow(int))")
    assert ran.stdout == "True\n"
    assert ran.stderr.count("program.debug.log cannot be written") == 1
    assert victim.read_text() == "mine"


def test_a_logdir_that_cannot_be_made_is_a_warning(script, tmp_path):
    (tmp_path / "logs").write_text("a file")
    ran = script(FLOW + "print(flow(lambda: 1 / 0))")
    assert ran.stdout == "False\n"
    assert ran.stderr.count("cannot be written") == 2


def test_log_files_are_rotated_and_their_names_are_no_paths(make, monkeypatch, tmp_path):
    monkeypatch.setattr("eventor.logs.MAX_BYTES", 1000)
    ev = make(name="../a b")
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("s", func=int))
    for _ in range(5):
        ev.trigger_event(go)
    ev()
    names = sorted(path.name for path in (tmp_path / "logs").iterdir())
    assert names == [".._a_b.debug.log", *(f".._a_b.debug.log.{n}" for n in (1, 2, 3))]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "logs").iterdir())


def test_importing_eventor_changes_nothing(script):
    ran = script("""
        import logging, os, signal, threading
        before = (os.listdir("."), logging.root.handlers[:], signal.getsignal(signal.SIGINT))
        import eventor
        assert before == (os.listdir("."), logging.root.handlers, signal.getsignal(signal.SIGINT))
        assert threading.active_count() == 1
        assert not logging.getLogger("eventor").handlers
    """)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_failure_is_logged_with_its_traceback(caplog, make, tmp_path):
    with caplog.at_level(logging.INFO):
        ev = make()
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("s", func=lambda: {}["key"]))
        ev.add_assoc(go, ev.add_step("t", func=int))
        ev.trigger_event(go)
        ev()
    assert "Step completed s[1], status: failure, result KeyError: 'key'" in caplog.text
    assert "Traceback (most recent call last):" in caplog.text
    assert "Stopped by a failure: 1 task stays ready for a recovery" in caplog.text
    assert "KeyError: 'key'" in Path(tmp_path / "logs/conftest.error.log").read_text()
