"""When the tasks of a run went on, as places on a linear scale: pure rules for a picture.

Times are in seconds after the beginning of what is shown.
"""

from __future__ import annotations

import heapq
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Interval = tuple[float, float]
"""When something began, and when it ended; it was over at the latter."""

_MINUTE, _HOUR, _DAY = 60.0, 3_600.0, 86_400.0

_STEPS = (
    *(digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 5)),
    *(10.0, 15.0, 30.0),
    *(_MINUTE * times for times in (1, 2, 5, 10, 15, 30)),
    *(_HOUR * times for times in (1, 2, 3, 6, 12)),
    *(_DAY * times for times in (1, 2, 7, 14, 28)),
)
"""What may lie between two ticks of an axis."""


def distance(seconds: float, most: int, within: float | None = None) -> float:
    """Return a round distance between the ticks of an axis.

    Args:
        seconds: how long the axis is.
        most: how many ticks there may be besides the one at 0; at least 1.
        within: the distance of coarser ticks, all of which have to be among these; if there are
            no finer ones, it is what is returned.
    """
    step = next((step for step in _STEPS if step * most >= seconds and _fits(step, within)), 0.0)
    if not step:
        step = within or _STEPS[-1]
        while step * most < seconds:
            step *= 2
    return step


def _fits(step: float, within: float | None) -> bool:
    return within is None or abs(within / step - round(within / step)) < 1e-9  # noqa: PLR2004


def concurrency(intervals: Iterable[Interval]) -> list[tuple[float, int]]:
    """Return when the number of intervals that go on changes, and what it is from there on."""
    changes: list[tuple[float, int]] = []
    for began, ended in intervals:
        if began < ended:
            changes += ((began, 1), (ended, -1))
    steps: list[tuple[float, int]] = []
    number = 0
    for at, group in groupby(sorted(changes), lambda change: change[0]):
        before = number
        number += sum(change for _, change in group)
        if number != before:
            steps.append((at, number))
    return steps


def lanes(intervals: Sequence[Interval]) -> list[int]:
    """Return a lane from 0 on for each interval, so that no two in one lane overlap.

    An interval gets the first lane that is free by then, so there are no more than have to be.
    """
    found = [0] * len(intervals)
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    for index in sorted(range(len(intervals)), key=intervals.__getitem__):
        began, ended = intervals[index]
        while busy and busy[0][0] <= began:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        found[index] = lane
        heapq.heappush(busy, (ended, lane))
    return found
