"""SIGINT and SIGTERM while `ev()` runs: noted first, and given their effect when it has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType
    from typing import Self

TAKEN = (signal.SIGINT, signal.SIGTERM)


def name_of(number: int) -> str:
    """Return the name of a signal; those for programs of their own have a number alone."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Signals:
    """Takes the signals within a `with` block; at its end they have the effect they had before.

    Only the main thread can take them, so in any other this does nothing. A signal that the program
    ignores, or that something else than Python handles, is left as it is.

    Args:
        on_signal: is called with the number of each signal that comes, between two bytecodes.
        on_end: is called before a signal ends this process by default.
    """

    def __init__(self, on_signal: Callable[[int], None], on_end: Callable[[], Any]) -> None:
        self._on_signal = on_signal
        self._on_end = on_end
        self._earlier: dict[int, Any] = {}
        self._came: dict[int, None] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Blocked, so that none comes while only some of them are taken.
            with blocked(TAKEN):
                for number in TAKEN:
                    if (earlier := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                        self._earlier[number] = earlier
                        signal.signal(number, self._note)
                _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self not in _active:
            return
        # Blocked, so that none comes between the last look at them and their earlier handlers.
        with blocked(TAKEN):
            _active.remove(self)
            self.give_back()
        with contextlib.ExitStack() as effects:  # each has its own, even if another raises
            for number in reversed(self._came):
                effects.callback(self._take_effect, number)

    def give_back(self) -> None:
        """Set the handlers that were there before, unless the program has set others since."""
        for number, earlier in self._earlier.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, earlier)

    def _take_effect(self, number: int) -> None:
        earlier = self._earlier[number]
        if callable(earlier):
            # Not by the signal again: a wakeup descriptor, as asyncio has one, has had it already.
            earlier(number, sys._getframe())  # noqa: SLF001 (what Python gives to a handler)
        else:
            self._on_end()
            os.kill(os.getpid(), number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._came[number] = None
        self._on_signal(number)


@contextlib.contextmanager
def blocked(numbers: Iterable[int]) -> Iterator[frozenset[int]]:
    """Block signals in this thread, and give those that were blocked before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield frozenset(map(int, before))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_active: list[Signals] = []


def _give_back_in_child() -> None:
    """A forked process, a step's or another, is no owner: its signals mean what they meant."""
    while _active:
        _active.pop().give_back()


os.register_at_fork(after_in_child=_give_back_in_child)
