"""What a notebook is given: records that go into a table, and how far a run is."""

import os
import re
import textwrap

import pandas as pd
import pytest
from jupyter_client.manager import KernelManager

import eventor as evr

pytestmark = pytest.mark.stores("either")


@pytest.fixture
def ran(make):
    ev = make(config={"stop_on_exception": False})
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("well", int), ev.add_step("ill", lambda: 1 / 0))
    ev.trigger_event(go)
    ev.trigger_event(go, "monday")
    assert ev() is False
    return ev


def test_tasks_are_rows_of_a_table(ran):
    tasks = pd.DataFrame(ran.tasks())
    assert tasks.step.tolist() == ["well", "ill"] * 2
    assert tasks.sequence.tolist() == [1, 1, "monday", "monday"]
    assert tasks[tasks.status == evr.TaskStatus.failure].step.unique().tolist() == ["ill"]
    assert tasks[tasks.status == "failure"].error.str.startswith("ZeroDivisionError").all()
    seconds = (tasks.ended_at - tasks.started_at).dt.total_seconds()
    assert seconds.between(0, 60).all()


def test_events_are_rows_of_a_table(ran):
    events = pd.DataFrame(ran.events())
    assert events.groupby("event").sequence.count().to_dict() == {"go": 2}
    assert str(events.raised_at.dt.tz) == "UTC"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Start a kernel; run cells in it, and return what it has sent."""
    path = tmp_path_factory.mktemp("kernel")
    directories = {name: str(path / name) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
    # By sockets in a directory: another program may take a port before the kernel does.
    sockets = {"transport": "ipc", "ip": str(path / "k")}
    manager = KernelManager(connection_file=str(path / "kernel.json"), **sockets)
    manager.start_kernel(cwd=path, env={**os.environ, **directories, "TERM": "xterm"})
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def run(code):
        sent = []
        reply = client.execute_interactive(
            textwrap.dedent(code), timeout=60, output_hook=sent.append, allow_stdin=False
        )
        assert reply["content"]["status"] == "ok", reply["content"]
        return [(one["header"]["msg_type"], one["content"]) for one in sent]

    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    manager.cleanup_resources()


FLOW = """
    import threading
    import eventor as evr

    def flow(func, progress=None, sequences=2):
        config = {"logdir": "logs", "stop_on_exception": False, "task_construct": construct}
        with evr.Eventor(store=":memory:", logging_level=100, config=config) as ev:
            begin = ev.add_event("begin")
            work = ev.add_step("<b>work</b>", func)
            ev.add_assoc(begin, work)
            ev.add_assoc(work.success, ev.add_step("more", int))
            ev.trigger_events(begin, range(sequences))
            before = set(threading.enumerate())
            ev(progress=progress)
            assert not set(threading.enumerate()) - before

    construct = threading.Thread
    drawing = threading.Event()
"""

DRAWN = """
    from eventor.look.cell import Cell
    draw = Cell.draw

    def drawn(*arguments):
        draw(*arguments)
        drawing.set()

    Cell.draw = drawn
"""


def outputs(sent, *kinds):
    return [content for kind, content in sent if kind in kinds]


SUMMARY = r"eventor run 1\.0: (.*) in \d+\.\d s"


@pytest.mark.parametrize("asked", ["None", "True"])
def test_a_notebook_shows_how_far_it_is_in_one_place(kernel, asked):
    kernel(FLOW)
    kernel(DRAWN)
    sent = kernel(f"flow(lambda: drawing.wait(30), {asked}); Cell.draw = draw")
    (first,) = outputs(sent, "display_data")
    later = outputs(sent, "update_display_data")
    assert later
    assert {one["transient"]["display_id"] for one in (first, *later)} == {
        first["transient"]["display_id"]
    }
    plain = first["data"]["text/plain"].splitlines()
    assert plain[0].startswith("eventor run 1.0  0 of 2 tasks")
    assert re.fullmatch(r"<b>work</b>  ━{40}  0/2  \d running", plain[1])
    shown = first["data"]["text/html"]
    assert shown.startswith("<pre style=")
    assert "&lt;b&gt;work&lt;/b&gt;" in shown
    assert "<b>" not in shown
    assert re.search(r'<span style="color: #\w{6}[^"]*">━+</span>', shown)
    assert [*later[-1]["data"]] == ["text/plain"]
    assert re.fullmatch(SUMMARY, later[-1]["data"]["text/plain"])[1] == "4 succeeded"
    assert outputs(sent, "stream", "error") == []


def test_a_notebook_shows_the_summary_alone_of_what_ends_soon_and_nothing_if_told(kernel):
    kernel(FLOW)
    sent = kernel("from eventor.look import live; live._SECONDS_BEFORE = 1e9; flow(int)")
    kernel("live._SECONDS_BEFORE = 0.2")
    (one,) = outputs(sent, "display_data", "update_display_data")
    assert re.fullmatch(SUMMARY, one["data"]["text/plain"])[1] == "4 succeeded"
    assert outputs(kernel("flow(int, False)"), "display_data", "update_display_data") == []


def test_steps_of_a_notebook_are_forked_beside_its_picture(kernel):
    kernel(FLOW)
    sent = kernel(
        """
        import multiprocessing, warnings
        construct = multiprocessing.get_context("fork").Process
        warnings.simplefilter("ignore")
        flow(lambda: flow(int, True), True)
        """
    )
    shown = outputs(sent, "display_data", "update_display_data")
    assert len({one["transient"]["display_id"] for one in shown}) == 1
    assert re.fullmatch(SUMMARY, shown[-1]["data"]["text/plain"])[1] == "4 succeeded"


def test_what_a_notebook_cannot_display_ends_no_run(kernel):
    kernel(FLOW)
    sent = kernel(
        """
        import IPython.display

        def refuse(*arguments, **more):
            raise RuntimeError("no")

        display, IPython.display.display = IPython.display.display, refuse
        try:
            flow(int)
        finally:
            IPython.display.display = display
        """
    )
    (told,) = outputs(sent, "stream")
    assert told["name"] == "stderr"
    assert re.fullmatch(SUMMARY + "\n", told["text"])[1] == "4 succeeded"
