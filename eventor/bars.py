"""How far a run is, as a picture of lines with bars; Rich has its text and its colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from eventor.types import TaskCounts
from eventor.words import clean, one_line, stopwatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from rich.text import Text

    from eventor.progress import Failure, Progress, Running

_WIDEST_BAR = 40
_NARROWEST_BAR = 6
_WIDEST_NAME = 28
_TALLEST = 24
_LINES_OF_RUNNING, _LINES_OF_FAILURES = 4, 3

_DONE, _SKIPPED, _FAILED, _RUNNING, _WAITING = range(5)
_STYLES = ("green", "cyan", "bold red", "yellow", "bright_black")


class Glyphs(NamedTuple):
    """What a picture is made of.

    Attributes:
        bar: for each kind of task, of what a bar consists.
        running: what stands before one that runs.
        failed: what stands before one that failed.
        more: what stands for what is left out.
    """

    bar: str
    running: str
    failed: str
    more: str


COLOURED = Glyphs("━━━━━", "▶", "✗", "…")
UNCOLOURED = Glyphs("█▓x▒░", "▶", "✗", "…")
ASCII = Glyphs("#=x>.", ">", "x", "~")


def picture(
    progress: Progress, now: datetime, width: int, height: int, glyphs: Glyphs
) -> list[Text]:
    """Return the lines that show how far it is.

    Args:
        progress: what to show.
        now: the time.
        width: how many cells a line may have.
        height: how many lines there may be.
        glyphs: of what it is made.
    """
    height = max(1, min(height, _TALLEST))
    running, failures = progress.running, list(progress.failures)
    of_failures = min(len(failures), _LINES_OF_FAILURES, max(0, (height - 2) // 3))
    of_running = min(len(running), _LINES_OF_RUNNING, max(0, (height - 2 - of_failures) // 2))
    of_steps = height - 1 - of_failures - of_running
    lines = [
        _headline(progress, now, glyphs),
        *_of_steps(progress.steps, width, of_steps, glyphs),
        *_of_running(running, now, of_running, glyphs),
        *(_of_failure(one, glyphs) for one in failures[len(failures) - of_failures :]),
    ]
    for line in lines:
        line.truncate(width, overflow="crop" if glyphs is ASCII else "ellipsis")
    return lines


def shares(counts: TaskCounts, width: int) -> list[int]:
    """Return how many cells of a bar are for each kind of task; what there is has at least one."""
    numbers = [counts.success, counts.skipped, counts.failure, counts.active, counts.ready]
    total = counts.all
    cells = [max(1, number * width // total) if number else 0 for number in numbers]
    while (over := sum(cells) - width) != 0:
        # The largest gives, or takes, what is left by the rounding.
        largest = max(range(len(cells)), key=lambda kind: (cells[kind], numbers[kind]))
        if over > 0 and cells[largest] <= 1:
            break
        cells[largest] -= over if over < 0 else 1
    return cells


def _headline(progress: Progress, now: datetime, glyphs: Glyphs) -> Text:
    total = progress.total
    line = _text(f"eventor run {progress.run}", "bold")
    line.append(f"  {total.ended:,} of {total.all:,} tasks")
    if total.failure:
        line.append(f"  {total.failure:,} failed", "bold red")
    line.append(f"  {stopwatch(progress.seconds(now))}", "cyan")
    if progress.name:
        line.append(f"  {_shown(clean(progress.name), glyphs)}", "bright_black")
    return line


def _of_steps(
    steps: dict[str, TaskCounts], width: int, height: int, glyphs: Glyphs
) -> Iterator[Text]:
    """Yield a bar for each step, or for those that matter most, and a line for the rest."""
    chosen = list(steps)
    if len(chosen) > height:
        weights = {name: _weight(steps[name]) for name in chosen}
        kept = sorted(chosen, key=lambda name: weights[name])[: max(0, height - 1)]
        chosen = [name for name in steps if name in set(kept)]
    if chosen:
        rows = [(name, steps[name], _notes(steps[name])) for name in chosen]
        yield from _rows(rows, width, glyphs)
    if height > 0 and len(chosen) < len(steps):
        left_out = (steps[name] for name in steps.keys() - set(chosen))
        rest = sum(left_out, TaskCounts())
        line = _text(f"{glyphs.more} {len(steps) - len(chosen):,} more steps", "bright_black")
        line.append(f"  {rest.ended:,}/{rest.all:,}")
        yield line.append_text(_with_space(_notes(rest)))


def _weight(counts: TaskCounts) -> tuple[bool, bool, bool]:
    return (not counts.active, not counts.failure, not counts.ready)


def _rows(rows: list[tuple[str, TaskCounts, Text]], width: int, glyphs: Glyphs) -> Iterator[Text]:
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415 (it is optional)

    names = [_shown(clean(name), glyphs) for name, _counts, _notes in rows]
    widest = min(max(map(cell_len, names)), _WIDEST_NAME, max(8, width // 3))
    numbers = [f"{counts.ended:,}/{counts.all:,}" for _name, counts, _notes in rows]
    of_numbers = max(map(len, numbers))
    of_notes = max(notes.cell_len for _name, _counts, notes in rows)
    bar = min(_WIDEST_BAR, width - widest - of_numbers - of_notes - 6)
    noted = bar >= _NARROWEST_BAR
    if not noted:  # a bar says as much, and the headline has the failures
        bar = min(_WIDEST_BAR, width - widest - of_numbers - 4)
    for name, number, (_name, counts, notes) in zip(names, numbers, rows, strict=True):
        shown = name
        if cell_len(name) > widest:
            shown = set_cell_size(name, widest - 1) + glyphs.more
        line = _text(f"{set_cell_size(shown, widest)}  ")
        if bar >= _NARROWEST_BAR:
            for kind, cells in enumerate(shares(counts, bar)):
                line.append(glyphs.bar[kind] * cells, _STYLES[kind])
            line.append("  ")
        line.append(number.rjust(of_numbers))
        yield line.append_text(_with_space(notes)) if noted else line


def _notes(counts: TaskCounts) -> Text:
    line = _text("")
    for number, what, kind in (
        (counts.failure, "failed", _FAILED),
        (counts.active, "running", _RUNNING),
        (counts.skipped, "skipped", _SKIPPED),
    ):
        if number:
            line.append(f"{'  ' if line else ''}{number:,} {what}", _STYLES[kind])
    return line


def _with_space(notes: Text) -> Text:
    return _text("  ").append_text(notes) if notes else notes


def _of_running(
    running: list[Running], now: datetime, height: int, glyphs: Glyphs
) -> Iterator[Text]:
    told = running if len(running) <= height else running[: height - 1]
    for one in told[:height]:
        line = _text(f"{glyphs.running} ", _STYLES[_RUNNING])
        line.append(_shown(clean(one.task), glyphs))
        seconds = max(0.0, (now - one.since).total_seconds())
        line.append(f"  {stopwatch(seconds)}", "cyan")
        if one.attempt > 1:
            line.append(f"  attempt {one.attempt}", _STYLES[_RUNNING])
        yield line
    if height > 0 and len(told) < len(running):
        yield _text(f"{glyphs.more} {len(running) - len(told):,} more run", "bright_black")


def _of_failure(failure: Failure, glyphs: Glyphs) -> Text:
    line = _text(f"{glyphs.failed} ", _STYLES[_FAILED])
    line.append(_shown(clean(failure.task), glyphs))
    return line.append(f"  {_shown(one_line(failure.error), glyphs)}", "red")


def _text(text: str, style: str = "") -> Text:
    from rich.text import Text  # noqa: PLC0415 (it is optional)

    return Text(no_wrap=True, end="").append(text, style)


def _shown(text: str, glyphs: Glyphs) -> str:
    """Return a clean text in what the terminal has."""
    return text.encode("ascii", "replace").decode() if glyphs is ASCII else text
