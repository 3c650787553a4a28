"""How far a run is, as a picture of lines with bars; Rich has its text and its colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from eventor.types import TaskCounts
from eventor.words import clean, number_of, one_line, stopwatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from rich.text import Text

    from eventor.look.progress import Failure, Progress, Running, Sequences
    from eventor.types import Sequence

    _Bar = tuple[str, TaskCounts, Text]
    """A line with a bar: its name, what is counted, and what stands behind it."""

_WIDEST_BAR = 40
_NARROWEST_BAR = 6
_WIDEST_NAME = 28
_TALLEST = 24
_LINES_OF_RUNNING, _LINES_OF_FAILURES, _LINES_OF_SEQUENCES = 4, 3, 8

_NOTES = len("1 running")
"""Cells behind a bar that are kept free, so that bars do not jump when something runs."""

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
    several = len(progress.steps) > 1 and len(progress.sequences.counts) > 1
    share = 3 if several else 2
    of_failures = min(len(failures), _LINES_OF_FAILURES, max(0, (height - 2) // 3))
    of_running = min(len(running), _LINES_OF_RUNNING, max(0, (height - 2 - of_failures) // share))
    of_bars = height - 1 - of_failures - of_running
    lines = [
        _headline(progress, now, glyphs),
        *_of_bars(progress, now, width, of_bars, glyphs, several=several),
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


def _of_bars(
    progress: Progress, now: datetime, width: int, height: int, glyphs: Glyphs, *, several: bool
) -> Iterator[Text]:
    """Yield the bars of steps and, if there are several, below a line that of sequences.

    The steps have the larger half of the lines, and each has what the other does not need.
    """
    sequences, lines_below = progress.sequences, 0
    if several:
        wanted = min(1 + len(sequences.counts), 1 + _LINES_OF_SEQUENCES)
        lines_below = min(wanted, max(height // 2, height - len(progress.steps)))
    steps, left_out = _chosen_steps(progress.steps, height - lines_below)
    bars = [(name, progress.steps[name], _notes(progress.steps[name])) for name in steps]
    names = [clean(name) for name in steps]
    if lines_below > 1:
        chosen = sequences.chosen(lines_below - 1)
        bars += (_bar_of_sequence(sequences, sequence, now) for sequence in chosen)
        names.append(clean(sequences.longest))
    drawn = list(_drawn(bars, names, width, glyphs))
    yield from drawn[: len(steps)]
    if left_out:
        yield _of_more_steps(left_out, glyphs)
    if lines_below > 0:
        yield _of_sequences(sequences)
    yield from drawn[len(steps) :]


def _chosen_steps(steps: dict[str, TaskCounts], height: int) -> tuple[list[str], list[TaskCounts]]:
    """Return the steps that have a bar, those that matter most, and the counts of the others."""
    if len(steps) <= height:
        return list(steps), []
    by_weight = sorted(steps, key=lambda name: _weight(steps[name]))
    kept = set(by_weight[: max(0, height - 1)])
    left_out = [counts for name, counts in steps.items() if name not in kept]
    return [name for name in steps if name in kept], left_out if height > 0 else []


def _weight(counts: TaskCounts) -> tuple[bool, bool, bool]:
    return (not counts.active, not counts.failure, not counts.ready)


def _of_more_steps(left_out: list[TaskCounts], glyphs: Glyphs) -> Text:
    rest = sum(left_out, TaskCounts())
    line = _text(f"{glyphs.more} {number_of(len(left_out), 'more step')}", "bright_black")
    line.append(f"  {rest.ended:,}/{rest.all:,}")
    return line.append_text(_with_space(_notes(rest)))


def _of_sequences(sequences: Sequences) -> Text:
    line = _text(f"{sequences.ended:,} of {number_of(len(sequences.counts), 'sequence')}", "bold")
    if sequences.failed:
        line.append(f"  {sequences.failed:,} failed", _STYLES[_FAILED])
    if sequences.running:
        line.append(f"  {sequences.running:,} running", _STYLES[_RUNNING])
    return line


def _bar_of_sequence(sequences: Sequences, sequence: Sequence, now: datetime) -> _Bar:
    counts, since = sequences.counts[sequence], sequences.since(sequence)
    notes = _text("")
    if counts.failure:
        notes.append(f"{counts.failure:,} failed", _STYLES[_FAILED])
    if since is not None:
        told = stopwatch(max(0.0, (now - since).total_seconds()))
        notes.append(f"{'  ' if notes else ''}{told}", "cyan")
    return str(sequence), counts, notes


def _drawn(bars: list[_Bar], names: list[str], width: int, glyphs: Glyphs) -> Iterator[Text]:
    """Yield the lines with bars, one below the other.

    Args:
        bars: the bars.
        names: what is to have room as a name.
        width: as in `picture`.
        glyphs: as in `picture`.
    """
    if not bars:
        return
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415 (it is optional)

    widest = min(max(cell_len(_shown(name, glyphs)) for name in names), _WIDEST_NAME)
    widest = min(widest, max(8, width // 3))
    numbers = [f"{counts.ended:,}/{counts.all:,}" for _name, counts, _notes in bars]
    of_numbers = max(map(len, numbers))
    of_notes = max(_NOTES, *(notes.cell_len for _name, _counts, notes in bars))
    bar = min(_WIDEST_BAR, width - widest - of_numbers - of_notes - 6)
    noted = bar >= _NARROWEST_BAR
    if not noted:  # a bar says as much, and the headline has the failures
        bar = min(_WIDEST_BAR, width - widest - of_numbers - 4)
    for (given, counts, notes), number in zip(bars, numbers, strict=True):
        name = _shown(clean(given), glyphs)
        if cell_len(name) > widest:
            name = set_cell_size(name, widest - 1) + glyphs.more
        line = _text(f"{set_cell_size(name, widest)}  ")
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
