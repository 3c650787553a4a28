"""The flow of a script without its run: the script is executed up to its first call of `ev()`."""

from __future__ import annotations

import contextlib
import logging
import runpy
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from unittest import mock

import eventor
from eventor.errors import UsageError
from eventor.eventor import Eventor
from eventor.types import RunMode

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_SILENT = logging.CRITICAL + 1


class _Reached(BaseException):
    """The script has called `ev()`; no `except Exception` of it is to keep that."""


def rehearse(
    script: str | os.PathLike[str], look: Callable[[Eventor], T], arguments: Sequence[str] = ()
) -> T:
    """Return what is seen of a script's Eventor when it first calls `ev()`, which does not run.

    Its store is in memory: what the script names as its store is neither read nor written. All else
    that the script does before that call is done. If it never calls `ev()`, that is seen which it
    has made last.

    Args:
        script: the path of the script.
        look: is given the Eventor.
        arguments: what the script finds in `sys.argv` after its own name.

    Raises:
        UsageError: there is no such script, it has made no Eventor, or it has raised before.
    """
    path = Path(script)
    if not path.is_file():
        raise UsageError(f"there is no script {str(path)!r}")
    seen: list[T] = []
    made: list[Eventor] = []
    try:
        with tempfile.TemporaryDirectory() as logdir:
            _execute(path, arguments, _kind(made, lambda ev: seen.append(look(ev)), logdir))
            for ev in made:
                ev.close()
    except _Reached:
        return seen[-1]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UsageError(
            f"the script {str(path)!r} ended before it called ev(): {type(error).__name__}: {error}"
        ) from error
    finally:
        for ev in made:
            ev.close()
    if not seen:
        raise UsageError(f"the script {str(path)!r} has made no Eventor")
    return seen[-1]


def _kind(made: list[Eventor], see: Callable[[Eventor], None], logdir: str) -> type[Eventor]:
    """Return the class that stands in the place of Eventor."""

    class Rehearsed(Eventor):
        def __init__(
            self,
            name: str = "",
            store: str | os.PathLike[str] = "",  # noqa: ARG002 (the signature is that of Eventor)
            run_mode: RunMode = RunMode.restart,  # noqa: ARG002
            recovery_run: int | None = None,  # noqa: ARG002
            logging_level: int = logging.INFO,  # noqa: ARG002
            config: Mapping[str, Any] = {},
        ) -> None:
            if isinstance(config, Mapping):
                config = {**config, "logdir": logdir}
            self.reached = False
            super().__init__(name, ":memory:", logging_level=_SILENT, config=config)
            made.append(self)

        def run(self, *_arguments: Any, **_options: Any) -> NoReturn:
            see(self)
            self.reached = True
            raise _Reached

        def close(self) -> None:
            if self._release.alive and not self.reached:
                see(self)
                self.reached = True
            super().close()

    return Rehearsed


def _execute(path: Path, arguments: Sequence[str], kind: type[Eventor]) -> None:
    """Execute a script as `python script` does, with another class for its Eventor."""
    place = [str(path.resolve().parent), *sys.path]
    with (
        mock.patch.object(eventor, "Eventor", kind),
        mock.patch.object(sys, "argv", [str(path), *arguments]),
        mock.patch.object(sys, "path", place),
        # What it prints is not what was asked for.
        contextlib.redirect_stdout(sys.stderr),
    ):
        runpy.run_path(str(path), run_name="__main__")
