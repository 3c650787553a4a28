"""The report of a run: one page of HTML that stands alone, for light and dark, screen and paper.

`page/` has its markup, its style and its script. All text of a run is escaped by the template
engine. Nothing is unpickled.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.util
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING

from eventor.errors import ReportError
from eventor.look.chart import chart
from eventor.look.excerpt import STATES, Words, counts, facts, shown_tasks
from eventor.rules.why import Definition
from eventor.types import OwnerStatus, Recovery, Run, RunStatus, Task, TaskStatus, sequence_text
from eventor.words import duration, number_of, visible

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from jinja2 import Template
    from markupsafe import Markup

    from eventor.storage.history import History

_RUN_STATES = {
    RunStatus.running: Words("running", "active", "play"),
    RunStatus.succeeded: Words("succeeded", "success", "check"),
    RunStatus.failed: Words("failed", "failure", "cross"),
    RunStatus.unfinished: Words("unfinished", "ready", "clock"),
    RunStatus.crashed: Words("crashed", "cut", "bolt"),
}


def report(
    history: History,
    run_id: int | None = None,
    recovery: int | None = None,
    graph_svg: str | None = None,
) -> str:
    """Return the report of a recovery of a run, as a page of HTML that needs no other file.

    Args:
        history: of the store.
        run_id: the number of the run; the latest by default.
        recovery: the number of the recovery in it; its latest by default.
        graph_svg: the flow's graph as an SVG element. It is put into the page as it is, so it has
            to come from who escapes the names in it.

    Raises:
        ReportError: Jinja2 is not installed.
        RecoveryError: there is no such run or recovery.
        StoreError: the store cannot be read.
    """
    place = history.find(None, run_id, recovery)
    run, which = history.at(place)
    owner = history.owner(run.run_id) if which is run.recoveries[-1] else None
    recorded = history.definition(*place)
    return page(
        run,
        which,
        history.tasks(*place),
        owner=None if owner is None else str(owner),
        handling=set() if recorded is None else Definition(recorded).handling,
        graph_svg=graph_svg,
        now=datetime.now(UTC),
    )


def page(
    run: Run,
    recovery: Recovery,
    tasks: Sequence[Task],
    *,
    owner: str | None,
    handling: Collection[str],
    graph_svg: str | None,
    now: datetime,
) -> str:
    """Return the page of a recovery.

    Args:
        run: its run.
        recovery: the recovery.
        tasks: its tasks, as they became ready.
        owner: which process owns it, if it has an owner that has not ended.
        handling: the steps whose failures are handled.
        graph_svg: as in `report`.
        now: when this is, in UTC.

    Raises:
        ReportError: Jinja2 is not installed.
    """
    template, mark, style, script = _template()
    began, ended = _span(recovery, tasks, now)
    shown = shown_tasks(recovery, tasks, handling, began, ended)
    seconds = (ended - began).total_seconds()
    attempts = [one for task in shown for one in task.attempts]
    failed = [task for task in shown if task.task.status is TaskStatus.failure]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.render(
        run=run,
        recovery=recovery,
        owner=owner if recovery.owner is not OwnerStatus.ended else None,
        run_states=_RUN_STATES,
        states=STATES,
        counts=counts(shown),
        dated=began.date() != ended.date(),
        began=began,
        ended=ended,
        seconds=seconds,
        worked=sum(one.ended - one.began for one in attempts),
        tasks=shown,
        failures=sorted((task for task in failed if task.apart), key=lambda task: task.handled),
        failures_in_all=len(failed),
        cut=[task for task in shown if task.state is STATES["cut"]],
        steps=facts(shown),
        timeline=chart(shown, began, seconds) if shown else None,
        graph=None if graph_svg is None else mark(graph_svg),
        now=now,
        style=mark(style),
        script=mark(script),
        script_digest=digest,
    )


@functools.cache
def _template() -> tuple[Template, type[Markup], str, str]:
    """Return the page's template, what marks a text as markup, its style and its script."""
    if importlib.util.find_spec("jinja2") is None:
        raise ReportError(
            "a report is written by Jinja2, which is not installed; pip install 'eventor[report]'"
        )
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415 (optional)
    from markupsafe import Markup  # noqa: PLC0415 (a part of the same)

    environment = Environment(
        autoescape=True,
        loader=PackageLoader("eventor.look", "page"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        duration=duration,
        visible=visible,
        sequence=sequence_text,
        number=number_of,
        clock=_clock,
        iso=_iso,
        brief=_brief,
    )
    files = resources.files("eventor.look") / "page"
    style, script = (
        (files / name).read_text(encoding="utf-8") for name in ("report.css", "report.js")
    )
    return environment.get_template("report.html"), Markup, style, script


def _span(recovery: Recovery, tasks: Sequence[Task], now: datetime) -> tuple[datetime, datetime]:
    """Return when a recovery began, and up to when the page tells of it."""
    if recovery.owner is OwnerStatus.live:
        last = now
    else:
        last = recovery.ended_at or recovery.heard_at or recovery.began_at
    times = [recovery.began_at, last]
    for task in tasks:
        times.append(task.ready_at)
        for one in task.attempts:
            times += (at for at in (one.started_at, one.ended_at) if at is not None)
    return min(times), max(times)


def _clock(at: datetime, *, dated: bool = True) -> str:
    """Return a time in UTC, to the millisecond."""
    return f"{at:%Y-%m-%d %H:%M:%S}"[0 if dated else 11 :] + f".{at.microsecond // 1000:03}"


def _iso(at: datetime) -> str:
    return f"{_clock(at).replace(' ', 'T')}Z"


def _brief(number: float) -> str:
    return f"{number:.7g}"
