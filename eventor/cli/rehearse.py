"""The flow of a script without its run: the script is executed up to its first call of `ev()`.

That is done in a process of its own, which ends there: so nothing that the script has begun, such
as a thread, goes on, and nothing that it does can be taken for the doing of who asks.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from eventor.errors import UsageError
from eventor.eventor import Eventor
from eventor.steps.signals import name_of
from eventor.types import RunMode

if TYPE_CHECKING:
    from collections.abc import Sequence

_SILENT = logging.CRITICAL + 1
_STDERR = 2

_CHILD = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from eventor.cli.rehearse import perform
perform(*sys.argv[2:])
"""


class Rehearsal(NamedTuple):
    """What a script has defined.

    Attributes:
        definition: the flow as plain data, as the store would keep it.
        name: the name of its Eventor, or that of the script.
    """

    definition: Mapping[str, Any]
    name: str


def rehearse(script: str | os.PathLike[str], arguments: Sequence[str] = ()) -> Rehearsal:
    """Return the flow of a script's Eventor when it first calls `ev()`, which does not run.

    Its store is in memory: what the script names as its store is neither read nor written. All else
    that the script does before that call is done; what it prints goes to standard error. If it
    never calls `ev()`, that is returned which it has made last.

    Args:
        script: the path of the script.
        arguments: what the script finds in `sys.argv` after its own name.

    Raises:
        UsageError: there is no such script, it has made no Eventor, or it has ended before.
    """
    path = Path(script)
    if not path.is_file():
        raise UsageError(f"there is no script {str(path)!r}")
    with tempfile.TemporaryDirectory() as logdir:
        told = Path(logdir) / "told"
        # With -P no file of this directory is taken for a module before the script's own are.
        command = [sys.executable, "-P", "-c", _CHILD, json.dumps(sys.path), logdir, str(told)]
        ended = subprocess.run(  # noqa: S603 (the script is what was asked for)
            [*command, str(path), *arguments], stdout=_STDERR, check=False
        )
        try:
            found = json.loads(told.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(
                f"the script {str(path)!r} ended before it called ev(): {_end(ended.returncode)}"
            ) from None
    if "error" in found:
        raise UsageError(f"the script {str(path)!r} {found['error']}")
    return Rehearsal(found["definition"], found["name"])


def perform(logdir: str, told: str, script: str, *arguments: str) -> None:
    """Execute a script, in the process that `rehearse` has started for it, and tell of its flow.

    Args:
        logdir: where its Eventor may write its logs.
        told: the file in which it is told, as JSON.
        script: its path.
        arguments: of the script.
    """
    stage = _Stage(Path(told), logdir, Path(script).stem)
    atexit.register(stage.end)  # called when the threads have ended, of which one may call ev()
    sys.argv[:] = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    stage.take_the_place_of(Eventor)
    try:
        runpy.run_path(script, run_name="__main__")
    except KeyboardInterrupt:
        os._exit(1)
    except SystemExit as error:
        if error.code not in (None, 0):
            stage.tell({"error": f"ended before it called ev(): {_raised(error, script)}"})
    except BaseException as error:
        stage.tell({"error": f"ended before it called ev(): {_raised(error, script)}"})


class _Stage:
    """Where a script is rehearsed: what it has made, and what is told of it.

    Args:
        told: the file in which it is told.
        logdir: where its Eventor may write its logs.
        name: that of an Eventor to which the script gives none.
    """

    def __init__(self, told: Path, logdir: str, name: str) -> None:
        self._told = told
        self._name = name
        self._logdir = logdir
        self._made: list[Eventor] = []

    def take_the_place_of(self, kind: type[Eventor]) -> None:
        """Change a class, under whatever name a script has it, and with it all that derive."""
        begin, stage = kind.__init__, self

        def __init__(  # noqa: N807 (it takes that place)
            self: Eventor,
            name: str = "",
            store: str | os.PathLike[str] = "",  # noqa: ARG001 (the signature is Eventor's)
            run_mode: RunMode = RunMode.restart,  # noqa: ARG001
            recovery_run: int | None = None,  # noqa: ARG001
            logging_level: int = logging.INFO,  # noqa: ARG001
            config: Mapping[str, Any] = {},
        ) -> None:
            if isinstance(config, Mapping):
                config = {**config, "logdir": stage._logdir}
            begin(self, name or stage._name, ":memory:", logging_level=_SILENT, config=config)
            stage._made.append(self)

        def run(self: Eventor, *_arguments: Any, **_options: Any) -> NoReturn:
            stage.tell(_flow_of(self))

        for name, function in (("__init__", __init__), ("run", run)):
            setattr(kind, name, functools.wraps(getattr(kind, name))(function))

    def tell(self, found: Mapping[str, Any]) -> NoReturn:
        """Tell what was found, and end the process; no `except` of the script is to keep that."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        draft = self._told.with_suffix(".draft")
        draft.write_text(json.dumps(found), encoding="utf-8")
        draft.replace(self._told)
        os._exit(0)

    def end(self) -> NoReturn:
        """Tell what the script has made last: it has ended without a call of `ev()`."""
        if self._told.exists():  # a process that it has forked has called it
            os._exit(0)
        self.tell(_flow_of(self._made[-1]) if self._made else {"error": "has made no Eventor"})


def _flow_of(ev: Eventor) -> dict[str, Any]:
    flow = {kind: list(all_) for kind, all_ in ev._flow.definition().items()}  # noqa: SLF001
    return {"definition": flow, "name": ev._stem}  # noqa: SLF001 (only the class is not its own)


def _raised(error: BaseException, script: str) -> str:
    """Return what a script has raised, and where."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == script
    ]
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"


def _end(code: int) -> str:
    return f"exit code {code}" if code >= 0 else name_of(-code)
