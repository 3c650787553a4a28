"""Forks of the owner beside other threads of its program: warned of once, and by eventor alone."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def warn_of_threads() -> None:
    """Warn of a fork beside other threads: a lock that one of them holds is never let go."""
    others = _other_threads()
    if others:
        message = (
            f"eventor is about to fork beside {others} other thread(s) of this program, and locks "
            "that they hold stay locked in the steps; call ev() before threads are started, or "
            "take a task_construct that does not fork, such as "
            "multiprocessing.get_context('spawn').Process"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=_depth_of_caller())


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Fork without Python's own warning of other threads: eventor gives one, and only one."""
    if sys.version_info < (3, 12) or not _other_threads():
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"This process \(pid=\d+\) is multi-threaded")
        yield


def _other_threads() -> int:
    """Return how many other threads run Python here, those that `threading` does not know too."""
    return len(sys._current_frames()) - 1  # noqa: SLF001 (nothing else tells)


def _depth_of_caller() -> int:
    """Return the `stacklevel` at which the program stands that has called eventor."""
    here = str(Path(__file__).parents[1])
    depth, frame = 1, sys._getframe(1)  # noqa: SLF001 (warnings name their place by it)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(here):
        depth, frame = depth + 1, frame.f_back
    return depth
