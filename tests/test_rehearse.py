"""The flow of a script, without its run."""

import sys
import textwrap

import pytest

import eventor as evr
from eventor.cli.rehearse import rehearse


@pytest.fixture
def written(tmp_path):
    def write(code):
        path = tmp_path / "script.py"
        path.write_text(textwrap.dedent(code))
        return path

    return write


FLOW = """
    import pathlib, sys
    from helper import step
    import eventor

    CONFIG = {"logdir": "logs"}

    def main():
        try:
            with eventor.Eventor("daily", "flow.db", run_mode="recover", config=CONFIG) as ev:
                go = ev.add_event("go")
                ev.add_assoc(go, ev.add_step(sys.argv[1], step))
                ev.trigger_event(go)
                print("before")
                ev()
                pathlib.Path("after").touch()
        except Exception:
            pathlib.Path("caught").touch()

    if __name__ == "__main__":
        main()
"""


def steps(found):
    return [step["name"] for step in found.definition["steps"]]


def test_a_script_is_executed_up_to_its_first_call(written, tmp_path, monkeypatch, capfd):
    """It finds what stands beside it, and its arguments; its store is neither read nor written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper.py").write_text("def step(): pass\n")
    path, before = written(FLOW), (list(sys.path), list(sys.argv), evr.Eventor)
    found = rehearse(path, ["first"])
    assert (steps(found), found.name) == (["first"], "daily")
    assert (sys.path, sys.argv, evr.Eventor) == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == [
        "helper.py",
        "script.py",
    ]
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "before\n")


def test_a_script_that_never_calls_shows_what_it_made_last(written):
    path = written("""
        from eventor import Eventor
        Eventor("one").add_step("a", int)
        with Eventor("two") as ev:
            ev.add_step("b", int)
        raise SystemExit(0)
    """)
    found = rehearse(path)
    assert (steps(found), found.name) == (["b"], "two")


@pytest.mark.parametrize(
    "rest",
    [
        "threading.Thread(target=ev).start()",
        """
            try:
                ev()
            except BaseException:
                pass
            raise SystemExit(3)
        """,
        """
            threading.Thread(target=threading.Event().wait).start()
            ev()
        """,
        """
            import multiprocessing
            process = multiprocessing.get_context("fork").Process(target=ev)
            process.start()
            process.join()
        """,
        """
            from eventor.eventor import Eventor
            class Mine(Eventor):
                def __init__(self, name):
                    super().__init__(name)
            with Mine("mine") as own:
                own.add_step("a", int)
                own()
        """,
    ],
    ids=["in a thread", "all is caught", "a thread stays", "a fork", "under another name"],
)
def test_the_first_call_is_the_end_whatever_a_script_does_about_it(written, rest):
    path = written(
        f"""
            import threading, eventor
            ev = eventor.Eventor()
            ev.add_step("a", int)
            {textwrap.dedent(rest).strip().replace(chr(10), chr(10) + " " * 12)}
        """
    )
    assert steps(rehearse(path)) == ["a"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1", "has made no Eventor"),
        (
            "1 / 0",
            "ended before it called ev\\(\\): ZeroDivisionError: division by zero \\(line 1\\)",
        ),
        ("import sys; sys.exit('no input')", "ended before it called .*SystemExit: no input"),
        ("import eventor; eventor.Eventor(config=7)", "ConfigError: .*config is 7"),
        ("def", "SyntaxError"),
        ("import os; os._exit(3)", "ended before it called ev\\(\\): exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "ended before it called ev\\(\\): SIGKILL"),
    ],
)
def test_a_script_without_a_flow_is_told(written, code, words):
    with pytest.raises(evr.UsageError, match=words):
        rehearse(written(code))


def test_what_is_no_script_is_told(tmp_path):
    with pytest.raises(evr.UsageError, match=r"no script '.*nothing\.py'"):
        rehearse(tmp_path / "nothing.py")
