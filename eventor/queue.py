"""The tasks that wait for their turn: by priority, then first come, first served.

A task that asks for resources waits until it can have all of them at once. While it waits for
them, none that comes after it is given any of the resources that it asks for; so it gets them in
the end, and tasks that ask for others, or for none, pass it by.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

T = TypeVar("T")

Needs = tuple[tuple[str, int], ...]
"""How much of which resources something asks for; all amounts are above 0."""


class Queue(Generic[T]):
    """What waits, and what is left of the resources.

    Args:
        resources: how much there is of each.
    """

    def __init__(self, resources: Mapping[str, int]) -> None:
        self._left = dict(resources)
        self._lines: dict[Needs, list[tuple[int, int, T]]] = {}
        self._pushed = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, item: T, priority: int, needs: Needs) -> None:
        """Let something wait; of what has the same needs, a heap tells which is first."""
        line = self._lines.setdefault(needs, [])
        heapq.heappush(line, (-priority, self._pushed, item))
        self._pushed += 1
        self._size += 1

    def pop(self) -> T | None:
        """Return what is next, with what it asks for; None if nothing can have that now."""
        waited_for: set[str] = set()
        for needs, line in sorted(self._lines.items(), key=lambda item: item[1][0][:2]):
            if all(name not in waited_for and self._left[name] >= much for name, much in needs):
                for name, much in needs:
                    self._left[name] -= much
                item = heapq.heappop(line)[2]
                if not line:
                    del self._lines[needs]
                self._size -= 1
                return item
            waited_for.update(name for name, _much in needs)
        return None

    def give_back(self, needs: Needs) -> None:
        """Take back what something had that was popped."""
        for name, much in needs:
            self._left[name] += much
