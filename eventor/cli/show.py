"""What the command prints for people: lines and tables as wide as the terminal, with colours.

Into a pipe or a file nothing is cut or wrapped, so that other tools find whole names there.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePath
from typing import TYPE_CHECKING

from rich.ansi import AnsiDecoder
from rich.console import Console
from rich.text import Text

from eventor.cli.plain import seconds_between, seconds_of
from eventor.types import (
    CauseKind,
    OwnerStatus,
    RunStatus,
    TaskCounts,
    TaskStatus,
    sequence_text,
)
from eventor.words import clean, duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from eventor import types
    from eventor.storage.owner import Owner
    from eventor.types import Attempt, Cause, Lack, Occurrence, Recovery, Run, Task, Why

STYLES = {
    "running": "cyan",
    "succeeded": "green",
    "failed": "bold red",
    "unfinished": "yellow",
    "crashed": "bold magenta",
    "ready": "blue",
    "active": "cyan",
    "success": "green",
    "failure": "bold red",
    "skipped": "dim green",
}
"""The colours of the words for how it stands with a recovery, and with a task."""

STANDS = {
    RunStatus.running: "is running",
    RunStatus.succeeded: "has succeeded",
    RunStatus.failed: "has failed",
    RunStatus.unfinished: "is unfinished",
    RunStatus.crashed: "has crashed",
}

_GAP = 2
_LEAST = 8
"""Cells of a column that is made narrower, at least."""
_BOUNDLESS = 1 << 20
_MINUTE, _HOUR = 60, 3600


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        right: whether its cells end, rather than begin, below each other.
        spare: whether it is left out where there is no room; the last one first.
        below: whether it comes below its row where there is no room; for the last column.
    """

    title: str
    right: bool = False
    spare: bool = False
    below: bool = False


def terminal(*, colour: bool) -> Console:
    """Return what prints to standard output: in colour if that is a terminal.

    Args:
        colour: False for no colour at all; else `NO_COLOR` and `FORCE_COLOR` count, too.
    """
    told = os.environ.get("COLUMNS", "")
    columns = int(told) if re.fullmatch("[1-9][0-9]{0,5}", told) else None
    if columns is None and not sys.stdout.isatty():
        columns = _BOUNDLESS
    plain = not colour or bool(os.environ.get("NO_COLOR"))
    return Console(
        width=columns or shutil.get_terminal_size().columns,
        color_system=None if plain else "auto",
        markup=False,
        emoji=False,
        highlight=False,
    )


def show_runs(
    console: Console, runs: Iterable[Run], owners: Mapping[int, Owner], now: datetime
) -> None:
    """Print runs and their recoveries.

    Args:
        console: where.
        runs: the runs.
        owners: by the numbers of runs, the owners of their latest recoveries that have not ended.
        now: the time, in UTC.
    """
    named = any(run.name for run in runs)
    rows = [
        [
            Text(f"{run.run_id}.{each.recovery}"),
            Text(clean(run.name) or "''", "" if run.name else "dim") if named else Text(),
            _word(each.status.value),
            Text(ago(each.began_at, now)),
            Text(duration(seconds_of(each, now))),
            counts(each.tasks),
            _owner(each, owners.get(run.run_id)),
            Text(clean(PurePath(each.program).name) if each.program else ""),
        ]
        for run in runs
        for each in run.recoveries
    ]
    columns = [
        *(Column("RUN"), Column("NAME"), Column("STATUS"), Column("BEGAN")),
        *(Column("TOOK", right=True), Column("TASKS")),
        *(Column("OWNER", spare=True), Column("PROGRAM", spare=True)),
    ]
    _show_table(console, columns, rows)


def show_recovery(
    console: Console, run: Run, recovery: Recovery, owner: Owner | None, now: datetime
) -> None:
    """Print how it stands with a recovery as a whole."""
    line = Text(f"{called(run, recovery)} ")
    line.append(STANDS[recovery.status], STYLES[recovery.status.value])
    line.append(": ").append_text(counts(recovery.tasks) if recovery.tasks.all else Text("no task"))
    console.print(line)
    began = moment(recovery.began_at, now)
    if (relative := ago(recovery.began_at, now)).endswith("ago"):
        began += f" ({relative})"
    took = duration(seconds_of(recovery, now))
    told = [
        clean(PurePath(recovery.program).name) if recovery.program else "",
        f"began {began}",
        f"took {took}" if recovery.ended_at and took else "",
        f"for {took}" if recovery.owner is OwnerStatus.live else "",
        f"last heard of after {took}" if recovery.owner is OwnerStatus.dead and took else "",
        "" if recovery.based_on is None else f"based on recovery {recovery.based_on}",
        f"owner {_owner(recovery, owner).plain}" if owner else "",
    ]
    console.print(Text(", ".join(filter(None, told)), "dim"))


def show_tasks(console: Console, tasks: Sequence[Task], recovery: Recovery, now: datetime) -> None:
    """Print tasks of a recovery as a table."""
    several = any(task.attempt > 1 for task in tasks)
    live = recovery.owner is OwnerStatus.live
    rows = [
        [
            _word(status_of(task)),
            Text(clean(task.step)),
            Text(clean(sequence_text(task.sequence))),
            Text(clock(task.started_at, recovery.began_at)),
            Text(duration(_task_seconds(task, now if live else None))),
            Text(str(task.attempt) if several and task.attempt else ""),
            _note(task, recovery),
        ]
        for task in tasks
    ]
    columns = [
        *(Column("STATUS"), Column("STEP"), Column("SEQUENCE"), Column("BEGAN")),
        *(Column("TOOK", right=True), Column("ATTEMPT", right=True), Column("NOTE", below=True)),
    ]
    _show_table(console, columns, rows)


def show_tracebacks(console: Console, tasks: Iterable[Task]) -> bool:
    """Print the tracebacks of all attempts of tasks; tell whether there are any."""
    any_shown = False
    for task in tasks:
        for attempt in task.attempts:
            if attempt.error is None:
                continue
            any_shown = True
            _show_heading(console, task, attempt, "error")
            for line in (attempt.traceback or attempt.error).splitlines():
                console.print(Text(f"  {clean(line.expandtabs())}"), soft_wrap=True)
    return any_shown


def show_output(console: Console, tasks: Iterable[Task]) -> bool:
    """Print what all attempts of tasks have written and was captured; tell whether there is any."""
    any_shown = False
    for task in tasks:
        for attempt in task.attempts:
            for stream, written in (("stdout", attempt.stdout), ("stderr", attempt.stderr)):
                if not written:
                    continue
                any_shown = True
                _show_heading(console, task, attempt, stream)
                for line in written.removesuffix("\n").split("\n"):
                    console.print(Text("  ").append_text(_coloured(line)), soft_wrap=True)
    return any_shown


def show_why(console: Console, why: Why, *, live: bool) -> None:
    """Print why something has happened, or has not, in a run that is live or is not."""
    if why.happened:
        rows = [_link(one, live=live) for one in why.chain]
        columns = [Column("AT"), Column("STATUS"), Column("WHAT"), Column("BECAUSE OF")]
        _show_table(console, [*columns, Column("NOTE", below=True)], rows)
        return
    for lack in why.lacks:
        indent = " " * min(2 * lack.depth, console.width // 2)
        told = Text(clean(str(lack).lstrip(" ")), "" if lack.depth else "bold")
        told.stylize(_lack_style(lack))
        room = max(3 * _LEAST, console.width - len(indent) - 2 * _GAP)
        for number, line in enumerate(told.wrap(console, room)):
            line.rstrip()
            more = " " * (2 * _GAP if number else 0)
            console.print(Text(indent + more).append_text(line), soft_wrap=True)


def called(run: Run, recovery: Recovery) -> str:
    """Return how a recovery is called in a sentence."""
    name = f" of {clean(run.name)}" if run.name else ""
    return f"run {run.run_id}.{recovery.recovery}{name}"


def counts(tasks: TaskCounts) -> Text:
    """Return how many tasks stand where, in words."""
    words = ("failure", "active", "ready", "success", "skipped")
    found = [(word, number) for word in words if (number := getattr(tasks, word))]
    return Text(", ").join([Text(f"{number} {word}", STYLES[word]) for word, number in found])


def status_of(task: Task) -> str:
    """Return the word for where a task stands: its status, or *skipped*."""
    return "skipped" if task.skipped else task.status.value


def thing(name: str, sequence: types.Sequence) -> str:
    """Return how a step or an event in a sequence is called."""
    return f"{clean(name)}[{clean(sequence_text(sequence))}]"


def ago(at: datetime, now: datetime) -> str:
    """Return when something was: within the last hour by how long ago, else the local time."""
    seconds = (now - at).total_seconds()
    if 0 <= seconds < _MINUTE:
        return f"{int(seconds)} s ago"
    if 0 <= seconds < _HOUR:
        return f"{int(seconds // _MINUTE)} min ago"
    return moment(at, now)


def moment(at: datetime, now: datetime) -> str:
    """Return a time as local time: the date where it is not today's, the year where not this."""
    local, today = at.astimezone(), now.astimezone()
    if local.date() == today.date():
        return f"{local:%H:%M:%S}"
    if (today.date() - local.date()).days == 1:
        return f"yesterday {local:%H:%M}"
    return f"{local:%d %b %H:%M}" if local.year == today.year else f"{local:%Y-%m-%d %H:%M}"


def clock(at: datetime | None, beside: datetime, *, exact: bool = False) -> str:
    """Return a local time, with its date where that is another than of what stands beside it."""
    if at is None:
        return ""
    local = at.astimezone()
    date = "" if local.date() == beside.astimezone().date() else f"{local:%d %b} "
    return f"{date}{local:%H:%M:%S}" + (f".{local.microsecond // 1000:03}" if exact else "")


def because(cause: Cause) -> str:
    """Return the reason for an event or a task in words."""
    source, detail = cause.source or "?", cause.detail or "?"
    return {
        CauseKind.call: "trigger of the program",
        CauseKind.step: f"trigger of step {source}",
        CauseKind.process: f"trigger of process {detail}",
        CauseKind.association: f"association of {source}",
        CauseKind.expression: f"expression {detail}",
        CauseKind.status: f"{detail} of {source}",
        CauseKind.recovery: f"trigger of recovery {detail}",
    }[cause.kind]


def _word(word: str) -> Text:
    return Text(word, STYLES[word])


def _owner(recovery: Recovery, owner: Owner | None) -> Text:
    if recovery.owner is OwnerStatus.live and owner is not None:
        return Text(f"{owner.pid}@{clean(owner.host)}", STYLES["running"])
    return Text(recovery.owner.value, "dim")


def _task_seconds(task: Task, now: datetime | None) -> float | None:
    """Return how long a task took, or has been active in a recovery that lives."""
    end = now if task.status is TaskStatus.active else task.ended_at
    return seconds_between(task.started_at, end)


def _note(task: Task, recovery: Recovery) -> Text:
    if task.due_at is not None:
        return Text(f"next attempt at {clock(task.due_at, recovery.began_at)}", "yellow")
    if task.error is not None:
        return _first_line(task.error)
    if task.status is TaskStatus.active and recovery.owner is not OwnerStatus.live:
        return Text("was cut short", "yellow")
    return Text()


def _first_line(error: str | None) -> Text:
    return Text(clean(next(iter((error or "").splitlines()), "")), "red")


def _link(one: Occurrence, *, live: bool) -> list[Text]:
    status = Text("raised") if one.status is None else _word(one.status.value)
    if one.status is TaskStatus.active and not live:
        status = Text("cut short", "yellow")
    return [
        Text(clock(one.at, datetime.now(UTC), exact=True)),
        status,
        Text(f"{one.kind} {thing(one.name, one.sequence)}"),
        Text(clean(because(one.cause))),
        _first_line(one.error),
    ]


def _lack_style(lack: Lack) -> str:
    if lack.error is not None:
        return "red"
    return "" if lack.happened_at is None else "green"


def _show_heading(console: Console, task: Task, attempt: Attempt, what: str) -> None:
    which = f", attempt {attempt.number}" if len(task.attempts) > 1 else ""
    name = thing(task.step, task.sequence)
    console.print()
    console.print(Text(f"{what} of {name}{which}", "bold"), soft_wrap=True)


def _coloured(line: str) -> Text:
    """Return a line that a step has written, with its colours and nothing else that it would do."""
    text = AnsiDecoder().decode_line(line.expandtabs().removesuffix("\r"))
    return text if text.plain.isprintable() else Text(clean(text.plain))


def _show_table(console: Console, columns: list[Column], rows: list[list[Text]]) -> None:
    """Print a table, without columns that are empty, and those for which there is no room."""
    used = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    widths = {
        number: max(len(columns[number].title), *(row[number].cell_len for row in rows))
        for number in used
    }
    below = None
    for number in reversed(used):
        if _excess(widths, console.width) > 0 and (columns[number].spare or columns[number].below):
            del widths[number]
            below = number if columns[number].below else below
    while _excess(widths, console.width) > 0 and max(widths.values()) > _LEAST:
        widths[max(widths, key=lambda number: widths[number])] -= 1
    shown = [columns[number] for number in widths]
    _show_row(console, shown, widths, [Text(column.title, "bold") for column in shown])
    indent = next(iter(widths.values())) + _GAP
    for row in rows:
        _show_row(console, shown, widths, [row[number] for number in widths])
        if below is not None and row[below]:
            note = row[below].copy()
            note.truncate(max(_LEAST, console.width - indent), overflow="ellipsis")
            console.print(Text(" " * indent).append_text(note), soft_wrap=True)


def _excess(widths: Mapping[int, int], room: int) -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1) - room


def _show_row(
    console: Console, columns: list[Column], widths: Mapping[int, int], cells: list[Text]
) -> None:
    wrapped = [
        _fitted(console, width, cell) for width, cell in zip(widths.values(), cells, strict=True)
    ]
    for number in range(max(map(len, wrapped))):
        line, end = Text(), 0
        for column, width, parts in zip(columns, widths.values(), wrapped, strict=True):
            part = parts[number] if number < len(parts) else Text()
            begin = end + (width - part.cell_len if column.right else 0)
            if part:
                line.append(" " * (begin - line.cell_len)).append_text(part)
            end += width + _GAP
        console.print(line, soft_wrap=True)


def _fitted(console: Console, width: int, cell: Text) -> list[Text]:
    if cell.cell_len <= width:
        return [cell]
    lines = list(cell.wrap(console, width, overflow="fold"))
    for line in lines:
        line.rstrip()
    return lines
