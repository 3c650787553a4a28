"""The timeline of a report: where each task stands in it, in percent of the time and in pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from eventor.look.excerpt import STATES, ShownTask, after, label
from eventor.look.timeline import concurrency, distance, lanes
from eventor.types import TaskStatus
from eventor.words import duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

_FEW, _SOME = 40, 150
"""Up to so many tasks the timeline has high rows, or rows with names at all."""

_MOST_TICKS = (5, 10, 24)
"""How many ticks the time axis has at most, from the coarse to the fine."""

_MOST_STEPS = 60
"""Up to so many steps a timeline of more than `_SOME` tasks has them as its rows at first."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A piece of a row of the timeline: where it begins and how long it is, in percent of all."""

    style: str
    left: float
    width: float


@dataclass(frozen=True, slots=True)
class Row:
    """A task in the timeline: its pieces, and its top in the two orders, in pixels.

    Attributes:
        shown: the task.
        top: where it stands with a row for each task.
        lane: where it stands with the tasks of a step together; None if it is left out there.
        bars: its pieces.
    """

    shown: ShownTask
    top: int
    lane: int | None
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Band:
    """The tasks of a step in the timeline: where they stand, in pixels."""

    name: str
    tasks: int
    top: int
    height: int


@dataclass(frozen=True, slots=True)
class Tick:
    """A tick of the time axis, in percent of all.

    Attributes:
        left: where it stands.
        label: how long that is after the beginning.
        level: 0 for one whose label always has room, 1 on a wide page, 2 for one that is zoomed.
    """

    left: float
    label: str
    level: int


@dataclass(frozen=True, slots=True)
class Chart:
    """A timeline: tasks over time, and how many went on at once.

    Attributes:
        rows: the tasks in the order in which they began.
        row_height: of one of them, in pixels.
        bands: the steps in the order in which they began; none if each has one task.
        lane_height: of a task in a band, in pixels.
        bands_height: of all bands, in pixels.
        by_step: whether it is shown by steps at first.
        ticks: the time axis.
        area: the outline of how many went on at once, as an SVG path 10,000 wide.
        most: how many went on at once at most.
    """

    rows: tuple[Row, ...]
    row_height: int
    bands: tuple[Band, ...]
    lane_height: int
    bands_height: int
    by_step: bool
    ticks: tuple[Tick, ...]
    area: str
    most: int


def chart(shown: Sequence[ShownTask], began: datetime, seconds: float) -> Chart:
    """Return the timeline of tasks.

    Args:
        shown: the tasks; at least one.
        began: when the time of the report begins.
        seconds: how long that time is.
    """
    ready = {one.number: after(began, one.task.ready_at) for one in shown}
    ordered = sorted(
        shown, key=lambda one: one.attempts[0].began if one.attempts else ready[one.number]
    )
    many = len(ordered)
    row_height = 22 if many <= _FEW else 18 if many <= _SOME else 5
    several = len({one.task.step for one in ordered}) < many
    bands, lane_height, tops = _bands(ordered, ready) if several else ((), 0, {})
    rows = tuple(
        Row(one, index * row_height, tops.get(one.number), _bars(one, ready[one.number], seconds))
        for index, one in enumerate(ordered)
    )
    steps = concurrency((at.began, at.ended) for one in shown for at in one.attempts)
    most = max((number for _, number in steps), default=0)
    return Chart(
        rows,
        row_height,
        bands,
        lane_height,
        bands[-1].top + bands[-1].height if bands else 0,
        many > _SOME and 0 < len(bands) <= _MOST_STEPS,
        _ticks(seconds),
        _area(steps, seconds, most),
        most,
    )


def _ticks(seconds: float) -> tuple[Tick, ...]:
    levels: dict[float, int] = {0.0: 0}
    within = None
    for level, most in enumerate(_MOST_TICKS):
        within = distance(seconds, most, within)
        for number in range(1, int(seconds / within) + 1):
            levels.setdefault(round(number * within, 9), level)
    return tuple(Tick(_percent(at, seconds), duration(at), levels[at]) for at in sorted(levels))


def _bands(
    ordered: Sequence[ShownTask], ready: dict[int, float]
) -> tuple[tuple[Band, ...], int, dict[int, int]]:
    """Return the steps, how high their lanes are, and where each task stands in them."""
    of_step: dict[str, list[ShownTask]] = {}
    for one in ordered:
        of_step.setdefault(one.task.step, []).append(one)
    placed: dict[str, list[tuple[ShownTask, int]]] = {}
    for name, tasks in of_step.items():
        drawn = [one for one in tasks if one.attempts or one.state is STATES["skipped"]]
        times = [
            (one.attempts[0].began, one.attempts[-1].ended)
            if one.attempts
            else (ready[one.number], ready[one.number])
            for one in drawn
        ]
        placed[name] = list(zip(drawn, lanes(times), strict=True))
    numbers = {
        name: max((lane for _, lane in tasks), default=0) + 1 for name, tasks in placed.items()
    }
    all_lanes = sum(numbers.values())
    lane_height = 18 if all_lanes <= _FEW else 12 if all_lanes <= _SOME else 5
    bands, tops, top = [], {}, 0
    for name, drawn_tasks in placed.items():
        height = max(22, numbers[name] * lane_height + 6)
        over = (height - numbers[name] * lane_height) // 2
        for one, lane in drawn_tasks:
            tops[one.number] = top + over + lane * lane_height
        bands.append(Band(label(name), len(of_step[name]), top, height))
        top += height
    return tuple(bands), lane_height, tops


def _bars(one: ShownTask, ready: float, seconds: float) -> tuple[Bar, ...]:
    def bar(style: str, began: float, ended: float) -> Bar:
        left = _percent(began, seconds)
        return Bar(style, left, max(0.0, _percent(ended, seconds) - left))

    if one.state is STATES["skipped"]:
        return (bar("skipped", ready, ready),)
    bars: list[Bar] = []
    free_from = ready
    for attempt in one.attempts:
        if attempt.began > free_from:
            bars.append(bar("again" if bars else "wait", free_from, attempt.began))
        style = f"{attempt.state.style} open" if attempt.is_open else attempt.state.style
        bars.append(bar(style, attempt.began, attempt.ended))
        free_from = attempt.ended
    if one.task.status is TaskStatus.ready:
        bars.append(bar("again" if bars else "wait", free_from, seconds))
    return tuple(bars)


def _area(steps: Iterable[tuple[float, int]], seconds: float, most: int) -> str:
    """Return the outline of a step function over `most` times the time axis, upside down."""
    moves = "".join(
        f"H{round(_percent(at, seconds) * 100)}V{most - number}" for at, number in steps
    )
    return f"M0 {most}{moves}H10000V{most}Z"


def _percent(at: float, seconds: float) -> float:
    return round(100 * min(max(at / seconds, 0.0), 1.0), 3) if seconds > 0 else 0.0
