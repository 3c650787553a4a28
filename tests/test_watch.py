"""A run that another program runs, watched from its store."""

import contextlib
import io

import pytest

import eventor as evr
from eventor.history import History
from eventor.store import Access, Store, locate
from eventor.watch import watch
from tests.conftest import sql


@pytest.fixture
def history(tmp_path):
    """Look at the store of the Eventors that `make` made."""
    with contextlib.ExitStack() as stack:

        def look():
            store = Store(locate(tmp_path / "flow.db"), Access.read)
            return History(stack.enter_context(contextlib.closing(store)))

        yield look


def test_what_is_told_in_a_pipe_does_nothing_to_a_terminal(make, history, tmp_path):
    def fail():
        raise ValueError("red \x1b[31m\x07\n  and \u202e\x9b more")

    ev = make(config={"stop_on_exception": False})
    begin = ev.add_event("begin")
    ev.add_assoc(begin, ev.add_step("fail", fail))
    ev.trigger_event(begin, "odd\x1b]0;title\x07")
    ev()
    ev.close()
    sql(tmp_path / "flow.db", "UPDATE eventor_task SET step = step || char(27)")
    shown = io.StringIO()
    assert watch(history(), (1, 0), shown).status is evr.RunStatus.failed
    failed, ended = shown.getvalue().splitlines()
    assert failed == (
        r"failed: fail\x1b[odd\x1b]0;title\x07]: "
        r"ValueError: red \x1b[31m\x07 and \u202e\x9b more"
    )
    assert ended.startswith("eventor run 1.0: 1 failed in ")
