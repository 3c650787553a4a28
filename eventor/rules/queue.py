"""The tasks that wait for their turn: by priority, then first come, first served.

A task that asks for resources waits until it can have all of them at once. While it waits for
them, none that comes after it is given any of the resources that it asks for; so it gets them in
the end, and tasks that ask for others, or for none, pass it by.

So a task may start if, for each resource that it asks for, it is the first of all that ask for it,
and enough of it is left. What asks for it stands in a heap of that resource, and only the first
there is looked at again, when it has become the first or something is given back.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")

Needs = tuple[tuple[str, int], ...]
"""How much of which resources something asks for; all amounts are above 0."""

_Waiting = tuple[int, int, T, Needs]
"""The negative priority and a number of its own, which order it, what waits, and its needs."""


class Queue(Generic[T]):
    """What waits, and what is left of the resources.

    Args:
        resources: how much there is of each.
    """

    def __init__(self, resources: Mapping[str, int]) -> None:
        self._left = dict(resources)
        self._asking: dict[str, list[_Waiting[T]]] = {name: [] for name in resources}
        self._offered: list[_Waiting[T]] = []
        """All that may start, and some that could until another came before them: a heap."""
        self._numbers_offered: set[int] = set()
        self._pushed = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, item: T, priority: int, needs: Needs) -> None:
        """Let something wait."""
        waiting = (-priority, self._pushed, item, needs)
        self._pushed += 1
        self._size += 1
        for name, _much in needs:
            heapq.heappush(self._asking[name], waiting)
        self._offer(waiting)

    def pop(self) -> T | None:
        """Return what is next, with what it asks for; None if nothing can have that now."""
        while self._offered:
            waiting = heapq.heappop(self._offered)
            _order, number, item, needs = waiting
            self._numbers_offered.remove(number)
            if not self._may_start(waiting):
                continue  # it is offered again when it may
            self._size -= 1
            for name, much in needs:
                self._left[name] -= much
                heapq.heappop(self._asking[name])
            for name, _much in needs:
                self._offer_first(name)
            return item
        return None

    def give_back(self, needs: Needs) -> None:
        """Take back what something had that was popped."""
        for name, much in needs:
            self._left[name] += much
        for name, _much in needs:
            self._offer_first(name)

    def _may_start(self, waiting: _Waiting[T]) -> bool:
        _order, number, _item, needs = waiting
        return all(
            self._asking[name][0][1] == number and self._left[name] >= much for name, much in needs
        )

    def _offer_first(self, name: str) -> None:
        if self._asking[name]:
            self._offer(self._asking[name][0])

    def _offer(self, waiting: _Waiting[T]) -> None:
        number = waiting[1]
        if number not in self._numbers_offered and self._may_start(waiting):
            self._numbers_offered.add(number)
            heapq.heappush(self._offered, waiting)
