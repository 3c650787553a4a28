"""The report of a run: one page that tells all of it, whatever the texts in it are."""

import contextlib
import dataclasses
import html.parser
import os
import re
import shutil
import signal
import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eventor as evr
from eventor.look import excerpt
from eventor.look import report as module
from eventor.look.excerpt import fitting
from eventor.look.report import page, report
from eventor.storage.backend import Access
from eventor.storage.history import History
from eventor.storage.location import locate
from eventor.storage.store import Store
from eventor.types import StepReplay, TaskCounts
from eventor.words import visible

BEGAN = datetime(2026, 11, 24, 10, 7, 48, 572_000, tzinfo=UTC)
HOSTILE = (
    "</title></style></script><script>alert(1)</script>\"' onmouseover='alert(2)' {{ 7*7 }} &lt;"
)
VOID = {"meta", "link", "hr", "input", "br", "path", "use"}


class Page(html.parser.HTMLParser):
    """A page, taken apart."""

    def __init__(self, source):
        super().__init__()
        self.elements = []
        self.texts = {}
        self._open = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_data(self, data):
        kind = self._open[-1] if self._open and self._open[-1] in ("script", "style") else "text"
        self.texts[kind] = self.texts.get(kind, "") + data

    def handle_endtag(self, tag):
        self._open.append(f"/{tag}")

    @property
    def text(self):
        return " ".join(self.texts["text"].split())

    def all(self, kind, tag=None):
        """Return the attributes of the elements of a class."""
        return [
            attributes
            for name, attributes in self.elements
            if kind in (attributes.get("class") or "").split() and tag in (None, name)
        ]

    @property
    def skeleton(self):
        """What there is of markup: all but the texts, and the values of two attributes."""
        return [
            (tag, {name: value for name, value in attributes.items() if name != "title"})
            for tag, attributes in self.elements
        ]


@pytest.fixture
def read(place):
    """Make the report of a run that the test's store has."""

    def build(*which, **arguments):
        store = Store(locate(place.store), Access.read)
        with contextlib.closing(store):
            return Page(report(History(store), *which, **arguments))

    return build


def at(seconds):
    return None if seconds is None else BEGAN + timedelta(seconds=seconds)


def a_task(number=1, *spans, step="build", status="success", ready=0.0, text=None, **changes):
    """Return a task whose attempts went on in these spans; all but the last have failed."""
    attempts = [
        evr.Attempt(
            count,
            evr.TaskStatus(status if count == len(spans) else "failure"),
            4711,
            at(began),
            at(ended),
            *[text if status == "failure" or count < len(spans) else None] * 2,
            *[text] * 2,
        )
        for count, (began, ended) in enumerate(spans, 1)
    ]
    last = attempts[-1] if attempts else evr.Attempt(0, None, None, None, None, *[None] * 4)
    task = evr.Task(
        step=step,
        sequence=number,
        recovery=0,
        status=evr.TaskStatus(status),
        replay=None,
        attempt=len(attempts),
        pid=last.pid,
        ready_at=at(ready),
        started_at=last.started_at,
        ended_at=last.ended_at,
        error=last.error,
        traceback=last.traceback,
        stdout=last.stdout,
        stderr=last.stderr,
        cause=evr.Cause(evr.CauseKind.call),
        due_at=None,
        attempts=attempts,
        stored=None,
    )
    return dataclasses.replace(task, **changes)


def source_of(*tasks, name="nightly", status="succeeded", ended=None, heard=None, **arguments):
    owner = {"running": "live", "crashed": "dead"}.get(status, "ended")
    recovery = evr.Recovery(
        0,
        None,
        BEGAN,
        evr.OwnerStatus(owner),
        arguments.pop("program", None),
        at(ended),
        at(heard),
        evr.RunStatus(status),
        TaskCounts(success=len(tasks)),
    )
    given = {"owner": None, "handling": (), "graph_svg": None, "now": at(100), **arguments}
    return page(evr.Run(1, name, BEGAN, (recovery,)), recovery, tasks, **given)


def page_of(*tasks, **arguments):
    return Page(source_of(*tasks, **arguments))


def bars(shown):
    """Return what is drawn: kind, and from where to where in percent."""
    found = []
    for tag, attributes in shown.elements:
        if tag == "i":
            left, width = (
                float(re.search(f"{name}:([^%]+)%", attributes["style"] + f";{name}:0%")[1])
                for name in ("left", "width")
            )
            found.append((attributes["class"], left, round(left + width, 2)))
    return found


def test_a_run_is_told_with_its_failure_and_what_that_printed(make, read):
    ev = make(name="nightly")
    go = ev.add_event("go")

    def fail():
        print("seen before")
        raise ValueError("no <such> thing")

    ev.add_assoc(go, ev.add_step("fail", fail, config={"capture_output": True, "max_attempts": 2}))
    ev.add_assoc(go, ev.add_step("never", int))
    ev.trigger_event(go, "a")
    assert ev() is False
    ev.close()
    shown = read()
    assert "nightly failed" in shown.text
    assert "Failures 1 fail[a] ValueError: no <such> thing" in shown.text
    assert "1 earlier attempt" in shown.text
    assert shown.text.count("Standard output seen before") == 2
    assert "made without a graph" in shown.text
    assert [kind for kind, _, _ in bars(shown)].count("b-failure") == 2
    assert len(shown.all("failure", "details")) == 1


def test_a_handled_failure_is_told_as_such(make, read):
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, step := ev.add_step("fail", lambda: 1 / 0, triggers={"at_failure": go}))
    ev.trigger_event(go)
    assert ev() is True
    ev.close()
    assert "ZeroDivisionError: division by zero handled" in read().text
    assert step.name in read().text


def test_failures_that_nothing_handles_come_first():
    tasks = [
        a_task(1, (0, 1), step=step, status="failure", text="wrong")
        for step in ("handled", "not handled")
    ]
    shown = page_of(*tasks, status="failed", ended=1, handling={"handled"})
    assert "Failures 2 not handled[1] wrong" in shown.text


def test_a_recovery_shows_what_it_skipped_and_the_recoveries_before(make, read):
    for mode in ("restart", "recover", "recover"):
        with make(run_mode=mode) as ev:
            go = ev.add_event("go")
            ev.add_assoc(go, ev.add_step("once", int))
            ev.trigger_event(go, 1)
            ev()
    shown = read()
    assert "Report of run 1, recovery 2" in shown.text
    assert [kind for kind, _, _ in bars(shown)] == ["b-skipped"]
    (current,) = shown.all("this", "tr")
    assert current["aria-current"] == "true"
    assert "Report of run 1, recovery 0" in read(1, 0).text
    with pytest.raises(evr.RecoveryError, match="run 1 has no recovery 7"):
        read(1, 7)


def test_a_running_run_has_an_owner(make, read):
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("look", lambda: read().text))
    ev.trigger_event(go)
    assert ev() is True
    text = ev.tasks()[0].result
    assert "running" in text
    assert f"process {os.getpid()} on host" in text
    assert "So far" in text


def test_of_a_run_that_was_killed_it_is_told_what_was_cut_short(script, read, place):
    ran = script(
        """
        import os, signal
        import eventor as evr

        program = os.getpid()

        def kill():
            os.kill(program, signal.SIGKILL)
            signal.pause()

        ev = evr.Eventor(store=os.environ["STORE"], config={"logdir": "logs"})
        go = ev.add_event("go")
        ev.add_assoc(go, ev.add_step("last", kill))
        ev.trigger_event(go)
        ev()
        """,
        STORE=place.store,
    )
    assert ran.returncode == -signal.SIGKILL
    shown = read()
    assert "crashed" in shown.text
    assert "1 task had no end by then: last[1]" in shown.text
    assert [kind for kind, _, _ in bars(shown)][-1] == "b-cut open"
    assert "Last heard of" in shown.text


def test_what_was_cut_short_is_drawn_up_to_when_its_owner_was_last_heard_of():
    shown = page_of(
        a_task(1, (0, 5)),
        a_task(2, (5, None), status="active", ready=2),
        status="crashed",
        heard=10,
    )
    assert "Cut short 1" in shown.text
    assert bars(shown) == [
        ("b-success", 0, 50),
        ("b-wait", 20, 50),
        ("b-cut open", 50, 100),
    ]


def test_a_task_that_is_active_is_drawn_up_to_now():
    shown = page_of(a_task(1, (50, None), status="active"), status="running", now=at(200))
    assert bars(shown) == [("b-wait", 0, 25), ("b-active open", 25, 100)]


def test_retries_are_pieces_with_waits_between():
    shown = page_of(a_task(1, (1, 2), (4, 5), (8, 10)), ended=10)
    assert bars(shown) == [
        ("b-wait", 0, 10),
        ("b-failure", 10, 20),
        ("b-again", 20, 40),
        ("b-failure", 40, 50),
        ("b-again", 50, 80),
        ("b-success", 80, 100),
    ]


def test_an_attempt_whose_owner_died_ends_at_the_latest_where_the_next_begins():
    task = a_task(1, (0, None), (6, 8))
    task.attempts[0] = dataclasses.replace(task.attempts[0], status=evr.TaskStatus.active)
    shown = page_of(task, ended=10)
    assert bars(shown) == [("b-cut open", 0, 60), ("b-success", 60, 80)]


def test_clocks_that_were_set_back_do_no_harm():
    shown = page_of(a_task(1, (5, 3)), a_task(2, (-4, 2), ready=-5), ended=1)
    assert all(0 <= left <= right <= 100 for _, left, right in bars(shown))


@pytest.mark.parametrize("ended", [0, 0.004, 60, 86_400 * 30])
def test_a_run_without_tasks_is_a_page(ended):
    shown = page_of(ended=ended, name="")
    assert "This recovery has no tasks." in shown.text
    assert not shown.all("chart")


@pytest.mark.parametrize("seconds", [0, 0.002, 1, 3_600, 86_400 * 30, 86_400 * 5_000])
def test_the_time_axis_has_few_round_ticks(seconds):
    shown = page_of(a_task(1, (0, seconds)), ended=seconds)
    labels = shown.all("axis")
    assert len(labels) == 1
    assert 1 <= len([tag for tag in shown.all("level-0", "span")]) <= 6
    assert len(shown.all("level-2", "hr")) <= 24


def test_a_large_run_is_shown_by_steps_at_first_and_is_no_large_page():
    output = "some words of output\n" * 20
    tasks = [
        a_task(number, (number, number + 7.5), step=f"step {number % 10}", text=output)
        for number in range(1000)
    ]
    source = source_of(*tasks, ended=1010)
    assert len(source.encode()) < 1_500_000
    shown = Page(source)
    checked = [
        attributes["id"]
        for _, attributes in shown.elements
        if "checked" in attributes and attributes.get("name") == "rows"
    ]
    assert checked == ["rows-step"]
    assert len(shown.all("b", "div")) == 1000
    assert "up to 8 at once" in shown.text
    assert "Standard output, without 3" in shown.text


def test_of_very_many_failures_the_rest_is_in_the_table():
    tasks = [
        a_task(number, (0, 1), status="failure", text=f"E{number}.") for number in range(1, 131)
    ]
    shown = page_of(*tasks, status="failed", ended=1)
    assert len(shown.all("failure", "details")) == excerpt._FAILURES_SHOWN
    assert "30 more failures are in the table of tasks" in shown.text
    for number in (1, 100, 101, 130):
        assert shown.text.count(f"Traceback E{number}.") == 1


def test_the_graph_is_put_in_as_it_is():
    shown = page_of(a_task(1, (0, 1)), ended=1, graph_svg='<svg class="of-flow"><g/></svg>')
    assert shown.all("of-flow", "svg")
    assert "without a graph" not in shown.text


def test_the_page_loads_nothing_and_allows_its_own_script_alone():
    shown = page_of(a_task(1, (0, 1), text=HOSTILE), ended=1)
    policies = [
        attributes["content"]
        for tag, attributes in shown.elements
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha")
    links = [
        value
        for _, attributes in shown.elements
        for name, value in attributes.items()
        if name in ("src", "href", "action", "data", "srcset", "poster")
    ]
    assert all(link.startswith("#") or link == "data:," for link in links)
    assert "url(" not in shown.texts["style"]
    assert "@import" not in shown.texts["style"]


def hostile_page(text):
    """Return a page that has a text wherever a run can have one."""
    shown = {"step": text, "sequence": text, "cause": evr.Cause(evr.CauseKind.status, text, text)}
    return page_of(
        a_task(1, (0, 1), (2, 3), status="failure", text=text, **shown),
        a_task(2, (0, None), status="active", text=text, **shown),
        a_task(3, status="success", replay=StepReplay.skip, **shown),
        name=text,
        program=text,
        owner=text,
        status="crashed",
        heard=4,
    )


HARMLESS = hostile_page("x")


@settings(max_examples=80)
@given(
    st.one_of(
        st.text(min_size=1),
        st.lists(
            st.sampled_from(
                ["<", ">", '"', "'", "&", "/", "=", "-->", "<!--", "]]>", "</script>", "<script>",
                 "</style>", "</title>", "</pre>", "</svg>", "{{", "}}", "{%", "\0", "\r", "\n",
                 "\x1b[31m", "javascript:", "&#60;", "`", "${", "\ud800", "\u202e", HOSTILE]
            ),
            min_size=1,
        ).map("".join),
    )
)  # fmt: skip
def test_no_text_of_a_run_becomes_markup_or_script(text):
    shown = hostile_page(text)
    if not visible(text):  # there is nothing to show
        return
    assert shown.skeleton == HARMLESS.skeleton
    assert shown.texts["script"] == HARMLESS.texts["script"]
    assert shown.texts["style"] == HARMLESS.texts["style"]


def test_what_cannot_be_seen_is_made_visible():
    shown = page_of(
        a_task(1, (0, 1), status="failure", text="a\x1b[1;31mred\x1b[0m\a b\r\nc\td\x00"), ended=1
    )
    assert "ared\u2407 b c d\\x00" in shown.text


def test_no_text_turns_the_direction_of_what_follows():
    assert "\u202e" not in source_of(a_task("\u202egnp.exe", (0, 1), text="\u2066"), ended=1)


def test_without_jinja_it_is_said_what_to_install(monkeypatch):
    module._template.cache_clear()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(evr.ReportError, match=r"pip install 'eventor\[report\]'"):
        source_of()


def test_jinja_is_loaded_by_a_report_alone(script):
    ran = script("import sys, eventor, eventor.look.report; assert 'jinja2' not in sys.modules")
    assert ran.returncode == 0, ran.stderr


def test_nothing_is_unpickled(make, read, place):
    ev = make()
    go = ev.add_event("go")
    ev.add_assoc(go, ev.add_step("one", int))
    ev.trigger_event(go)
    ev()
    ev.close()
    place.sql(f"UPDATE eventor_result SET data = {place.blob(bytes(1))}")
    assert "one[1]" in read().text


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(0, 5000))
def test_texts_are_cut_no_more_than_they_have_to_be(lengths, all_of_them):
    longest = fitting(lengths, all_of_them)
    assert sum(min(length, longest) for length in lengths) <= all_of_them
    if sum(lengths) > all_of_them:
        assert sum(min(length, longest + 1) for length in lengths) > all_of_them


# A real browser.

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed")
def test_a_browser_runs_the_script_and_has_nothing_to_say(tmp_path):
    file = tmp_path / "run.html"
    tasks = [
        a_task(1, (0, 1), text=HOSTILE, step=HOSTILE),
        a_task(2, (1, 2), status="failure", text=HOSTILE, step=HOSTILE),
    ]
    file.write_text(source_of(*tasks, status="failed", ended=2, name=HOSTILE))
    options = ["--headless", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")
    ran = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()],
        env={**os.environ, "TZ": "Asia/Tokyo", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "CONSOLE" not in ran.stderr
    shown = Page(ran.stdout)
    titles = {attributes.get("title") for tag, attributes in shown.elements if tag == "time"}
    assert "2026-11-24 10:07:48.572 UTC" in titles
    assert "2026-11-24 19:07:48.572" in shown.text
    assert "Times are in Asia/Tokyo" in shown.text
    assert [attributes for _, attributes in shown.elements if attributes.get("id") == "tip"]
    (controls,) = shown.all("needs-script")
    assert "hidden" not in controls
    assert not [tag for tag, attributes in shown.elements if "onmouseover" in attributes]
