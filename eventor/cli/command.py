"""What all commands share: their table and its errors, their arguments, what they look at."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
import traceback
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from eventor.cli import show
from eventor.errors import EventorError, StoreChangedError
from eventor.look.files import write_file
from eventor.rules.config import unknown
from eventor.storage.backend import Access
from eventor.storage.history import History
from eventor.storage.location import locate
from eventor.storage.sqlite import BESIDE
from eventor.storage.store import Store
from eventor.types import OwnerStatus
from eventor.words import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import TextIO

    from rich.console import Console

    from eventor.storage.history import Place
    from eventor.storage.owner import Owner
    from eventor.types import Recovery, Run, ThingKind

FAILED, USAGE, INTERRUPTED = 1, 2, 130
"""Exit codes: the run that was looked at has failed; bad usage; Ctrl-C."""

_COLOUR = "eventor.colour"

_SQLITE = b"SQLite format 3\0"
"""How each of its files begins (sqlite.org/fileformat.html, 1.3)."""

_LOOKS = 4
"""How often to look again at a store that was written meanwhile."""

_UNWRITABLE = (
    *(errno.ENOSPC, errno.EIO, errno.EBADF, errno.EFBIG, errno.EDQUOT, errno.EPIPE),
    errno.EAGAIN,
)

_AGES = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Commands(click.Group):
    """A table of commands, which says what was probably meant by one that is not there."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command by its name."""
        known = ctx.resilient_parsing or self.get_command(ctx, args[0]) is not None
        if not known and not args[0].startswith("-"):
            near = unknown(args[0], self.list_commands(ctx))
            raise click.UsageError(f"there is no command {args[0]!r}; {near}", ctx)
        return super().resolve_command(ctx, args)


def run_command(commands: click.Command, args: Sequence[str] | None = None) -> int:
    """Run a command; an error is one line on standard error.

    Args:
        commands: the table of commands.
        args: its arguments; by default those of the program.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _again(lambda: commands.main(args, "eventor", standalone_mode=False) or 0)
        sys.stdout.flush()  # here it can still be told if that fails
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
    except (click.ClickException, EventorError, OSError) as error:
        say(_reason(error))
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except Exception:  # not to be taken for a run that has failed, whose exit code is 1
        traceback.print_exc()
        say("this should not be: the store was changed by hand, or eventor has a bug")
    else:
        return code
    return USAGE


def _again(command: Callable[[], int]) -> int:
    """Do what only looks, and prints when it has looked, until nobody has written meanwhile."""
    for _ in range(_LOOKS):
        with suppress(StoreChangedError):
            return command()
    return command()


def _reason(error: Exception) -> str:
    """Return in a line why a command has not done what it was asked."""
    if isinstance(error, click.UsageError):
        path = "eventor" if error.ctx is None else error.ctx.command_path
        return f"{_lowered(error.format_message())} (see {path} --help)"
    if isinstance(error, click.ClickException):
        return _lowered(error.format_message())
    if isinstance(error, OSError) and error.filename is None and error.errno in _UNWRITABLE:
        _give_up(sys.stdout)
        return f"standard output cannot be written: {error.strerror}"
    return str(error)


def _give_up(stream: TextIO) -> None:
    """Let what is left of a stream that cannot be written not be tried again at the end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def read_number(written: str) -> int:
    """Return a number from 0 on, such as a store can keep."""
    if re.fullmatch("[0-9]{1,18}", written) is None:
        raise click.BadParameter(f"{written!r} is no number; expected one from 0 on")
    return int(written)


def read_run(written: str) -> tuple[int, int | None]:
    """Return the number of a run, and that of a recovery of it if it is named: `4` and `4.1`."""
    found = re.fullmatch(r"([0-9]{1,18})(?:\.([0-9]{1,18}))?", written)
    if found is None:
        told = f"{written!r} is no run; expected its number, as 4, or 4.1 for recovery 1 of it"
        raise click.BadParameter(told)
    return int(found[1]), None if found[2] is None else int(found[2])


def read_age(written: str) -> timedelta:
    """Return how long ago something is, written as `30d`, `12h`, `90m` or `2w`."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", written)
    try:
        if found:
            return timedelta(**{_AGES[found[2]]: float(found[1])})
    except OverflowError:
        pass
    raise click.BadParameter(f"{written!r} is no age; expected one such as 30d, 12h, 90m or 2w")


@contextmanager
def reading(store: str, *, at_once: bool = True) -> Iterator[History]:
    """Give what a store tells of its runs: of one state, or of another at each look."""
    with closing(Store(locate(store), Access.read)) as opened:
        if not at_once:
            yield History(opened)
            return
        with opened.at_once():
            yield History(opened)


class Looked(NamedTuple):
    """A recovery that is looked at."""

    place: Place
    run: Run
    recovery: Recovery
    owner: Owner | None
    now: datetime


def look(
    history: History, name: str | None, run: tuple[int, int | None] | None, recovery: int | None
) -> Looked:
    """Find the recovery that options name: by default the latest.

    Raises:
        RecoveryError: there is no such run or recovery.
    """
    run_id, of_run = (None, None) if run is None else run
    if None not in (of_run, recovery) and of_run != recovery:
        told = f"--run names recovery {of_run}, and --recovery {recovery}; expected one of them"
        raise click.UsageError(told, click.get_current_context(silent=True))
    place = history.find(name, run_id, of_run if recovery is None else recovery)
    found, each = history.at(place)
    owner = history.owner(place[0]) if each is found.recoveries[-1] else None
    return Looked(place, found, each, owner, datetime.now(UTC))


def coloured() -> bool:
    """Tell whether the running command may print in colours."""
    return bool(click.get_current_context().meta.get(_COLOUR, True))


def console() -> Console:
    """Return where the running command prints for people."""
    return show.terminal(colour=coloured())


def print_json(data: Any, path: Path | None = None) -> None:
    """Print one JSON document, or write it to a file."""
    utf8 = path is not None or "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()
    text = json.dumps(data, indent=2, ensure_ascii=not utf8)
    if path is None:
        click.echo(text)
    else:
        write_output(f"{text}\n".encode(), path)


def checked_output(output: str | None, store: str | None) -> Path | None:
    """Return the file to write, None for standard output, before anything is looked at.

    Raises:
        UsageError: it is the store, or a log beside it.
    """
    if output is None or output == "-":
        return None
    path = Path(output)
    of_store = None if store is None else locate(store).path
    told = None
    for suffix in ("", *BESIDE) if of_store is not None else ():
        # SQLite keeps its log beside the file itself, whatever link leads there.
        if _are_one(path, Path(f"{os.path.realpath(str(of_store))}{suffix}")):
            told = "a part of the store" if suffix else "the store itself"
    if told is None:
        told = _other_database(Path(os.path.realpath(path)))
    if told is not None:
        raise click.UsageError(
            f"{output} is {told}; expected another file", click.get_current_context()
        )
    return path


def _other_database(path: Path) -> str | None:
    """Say what a file is of a SQLite database, which may be another store; None if it is none."""
    for suffix in BESIDE:
        name = path.name.removesuffix(suffix)
        if name != path.name and name and _is_database(path.with_name(name)):
            return "a part of a SQLite database, which may be another store"
    return "a SQLite database, which may be another store" if _is_database(path) else None


def _is_database(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_SQLITE)) == _SQLITE
    except (OSError, ValueError):  # it is told when it is written
        return False


def _are_one(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:  # one of them is not there, yet
        return os.path.realpath(path) == os.path.realpath(other)


def write_output(content: bytes, path: Path | None) -> None:
    """Write to a file, or to standard output for None."""
    if path is None:
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()
        return
    try:
        write_file(path, content)
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise click.ClickException(f"{path} cannot be written: {told}") from error


def say(told: str) -> None:
    """Print a line on standard error: an error, or a note."""
    with suppress(OSError):  # there is nobody else to tell
        click.echo(f"eventor: {one_line(told)}", err=True)


def _lowered(told: str) -> str:
    told = told.removesuffix(".")
    return told[:1].lower() + told[1:]


def owners_of(history: History, runs: Iterable[Run]) -> dict[int, Owner]:
    """Return, by the numbers of runs, the owners of their latest recoveries that have not ended."""
    found = {run.run_id: history.owner(run.run_id) for run in runs if _is_owned(run)}
    return {run_id: owner for run_id, owner in found.items() if owner is not None}


def _is_owned(run: Run) -> bool:
    return run.recoveries[-1].owner is not OwnerStatus.ended


def names_of(kinds: Iterable[ThingKind]) -> Callable[..., list[CompletionItem]]:
    """Return what completes the names of events or steps of the store."""

    def known(ctx: click.Context, history: History) -> Iterable[str]:
        options = (ctx.params.get(option) for option in ("name", "run", "recovery"))
        names = history.names(look(history, *options).place)
        return [name for kind in kinds for name in names[kind]]

    return _completing(known)


def _completing(
    known: Callable[[click.Context, History], Iterable[str]],
) -> Callable[..., list[CompletionItem]]:
    """Return what completes words that a store knows; without a store there are none."""

    def complete(
        ctx: click.Context, _param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        # Where the last word is an option that lacks its value, the store is among what is left.
        given = ctx.params.get("store") or next(iter(ctx.args), "")
        # The shell has not done it yet. As a path, a URL would lose one of its slashes.
        store = os.path.expandvars(given if "://" in given else Path(given).expanduser())
        try:
            with reading(store) as history:
                found = known(ctx, history)
        except EventorError:
            return []
        words = [word for word in found if word.startswith(incomplete)]
        if os.environ.get("_EVENTOR_COMPLETE", "").startswith("bash"):
            # It would take what is in the names for its own; the other shells quote by themselves.
            words = [shlex.quote(word) for word in words]
        return [CompletionItem(word) for word in words]

    return complete


def _run_names(_ctx: click.Context, history: History) -> Iterable[str]:
    return dict.fromkeys(run.name for run in history.runs())


def _set_colour(ctx: click.Context, _param: click.Parameter, off: bool) -> None:
    if off:
        ctx.meta[_COLOUR] = False


no_color = click.option(
    "--no-color",
    is_flag=True,
    expose_value=False,
    callback=_set_colour,
    help="Print without colours, as with NO_COLOR in the environment.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
store_argument = click.argument(
    "store",
    shell_complete=lambda _ctx, _param, incomplete: [CompletionItem(incomplete, type="file")],
)
name_option = click.option(
    "--name",
    metavar="NAME",
    shell_complete=_completing(_run_names),
    help="Of the runs of this name.",
)


def output_option(*, required: bool = False) -> Callable[..., Any]:
    """Return the option that names a file to write."""
    told = "Write to this file; - is standard output."
    if not required:
        told = "Write to this file rather than to standard output."
    return click.option(
        "-o", "--output", type=click.Path(), metavar="FILE", required=required, help=told
    )


def which_recovery(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name a run and a recovery of it."""
    for option in (
        name_option,
        click.option(
            "--recovery",
            type=read_number,
            metavar="N",
            help="This recovery of the run, else the latest.",
        ),
        click.option(
            "--run",
            type=read_run,
            metavar="N",
            help="This run, else the latest; 4.1 is recovery 1 of run 4.",
        ),
    ):
        command = option(command)
    return command
