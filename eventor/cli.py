"""The commands: what a store tells, asked for in a shell.

All but `trigger`, `stop` and `prune` read the store and write nothing; none unpickles anything.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import eventor
from eventor import drift, plain, show
from eventor.attached import attach
from eventor.config import unknown
from eventor.draw import Graph, write_whole
from eventor.errors import DefinitionError, EventorError, RecoveryError, TriggerError
from eventor.history import History
from eventor.prune import give_back, prune, to_prune
from eventor.rehearse import rehearse
from eventor.report import report as report_of
from eventor.store import Access, Store, locate
from eventor.types import RunStatus, Sequence, ThingKind
from eventor.watch import watch
from eventor.why import Definition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from eventor.history import Place
    from eventor.types import Recovery, Run, Task

_AS_ASKED, _FAILED, _REFUSED, _INTERRUPTED = 0, 1, 2, 130

_AGES = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_LISTED = 5

_HAS_FAILED = (RunStatus.failed, RunStatus.unfinished, RunStatus.crashed)

F = TypeVar("F", bound="Callable[..., Any]")


_EXIT_CODES = """

\b
Exit codes:
  0  as asked
  1  the run that was looked at has failed (watch, show --check)
  2  bad usage, no such thing, or a store that cannot be used"""


def _examples(*lines: str) -> str:
    r"""Return the end of a help page; a `\b` keeps its lines as they are."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


class _Commands(click.Group):
    """The commands; one that is not known is told with the one that was meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            known = self.list_commands(ctx)
            ctx.fail(f"there is no command {args[0]!r}; {unknown(args[0], known)}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_examples(
        "eventor runs flow.db",
        "eventor show flow.db --status failure --traceback",
        "eventor why flow.db 'load[7]'",
        "eventor graph flow.py -o flow.svg",
        "eventor report flow.db -o run.html",
    )
    + _EXIT_CODES,
)
@click.version_option(eventor.__version__, prog_name="eventor", message="%(prog)s %(version)s")
def cli() -> None:
    """See what has happened in the runs of a store, what is happening, and why.

    STORE is the path of a SQLite file, or an SQLAlchemy URL of one.
    """


def main(arguments: list[str]) -> int:
    """Run the command of these arguments; return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(arguments, prog_name="eventor", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        return _REFUSED
    except (EventorError, click.ClickException, OSError) as error:
        told = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"eventor: {' '.join(told.split())}", err=True)
        return _REFUSED
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    return code if isinstance(code, int) else _AS_ASKED


def _store(command: F) -> F:
    return click.argument("store", type=click.Path())(command)


def _json(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def _place(command: F) -> F:
    """Add the options that tell which run and recovery; the latest by default."""
    for option in (
        click.option("--recovery", type=int, help="The recovery in it; the latest by default."),
        click.option("--run", "run_id", type=int, help="The run; the latest by default."),
        click.option("--name", help="The name that the run has to have."),
    ):
        command = option(command)
    return command


def _colour(command: F) -> F:
    return click.option("--no-color", is_flag=True, help="Print without colours.")(command)


@cli.command(
    epilog=_examples(
        "eventor runs flow.db",
        "eventor runs flow.db --json | jq '.[-1].recoveries[-1].status'",
    ),
)
@_store
@click.option("--name", help="Only the runs of this name.")
@_json
@_colour
def runs(store: str, name: str | None, as_json: bool, no_color: bool) -> None:
    """List the runs of a store, and their recoveries.

    That is how they stand, when they began, how long they took, and whether their owner lives.
    """
    with _opened(store) as history:
        found, now = history.runs(name), datetime.now(UTC)
        owners = {run.run_id: owner for run in found if (owner := history.owner(run.run_id))}
    if as_json:
        _print_json([plain.run_data(run, owners.get(run.run_id), now) for run in found])
    elif found:
        show.show_runs(show.terminal(colour=not no_color), found, owners, now)
    else:
        click.echo("there are no runs", err=True)


@cli.command(
    "show",
    epilog=_examples(
        "eventor show flow.db",
        "eventor show flow.db --run 3 --recovery 0 --status failure --traceback",
        "eventor show flow.db --check && echo all is well",
    ),
)
@_store
@_place
@click.option("--step", help="Only the tasks of this step.")
@click.option("--sequence", help="Only those of this sequence; '\"1\"' is the str.")
@click.option(
    "--status",
    type=click.Choice(["ready", "active", "success", "failure", "skipped"]),
    help="Only those that stand there.",
)
@click.option("--traceback", is_flag=True, help="Print the tracebacks of all attempts.")
@click.option("--output", is_flag=True, help="Print what was captured of their output.")
@click.option("--check", is_flag=True, help="Exit with 1 if it failed, crashed or is unfinished.")
@_json
@_colour
def show_command(
    store: str,
    name: str | None,
    run_id: int | None,
    recovery: int | None,
    step: str | None,
    sequence: str | None,
    status: str | None,
    traceback: bool,
    output: bool,
    check: bool,
    as_json: bool,
    no_color: bool,
) -> int:
    """Show the tasks of a run.

    That is their status, times, attempts and errors, below how it stands with the run.
    """
    with _opened(store) as history:
        place = history.find(name, run_id, recovery)
        run, which = history.at(place)
        if step is not None:
            drift.known(history.definition(*place), ThingKind.step, step, run.run_id)
        wanted = None if sequence is None else _sequence(history, place, sequence)
        tasks = [
            task
            for task in history.tasks(*place, step, wanted)
            if status in (None, show.status_of(task))
        ]
        owner, now = history.owner(run.run_id), datetime.now(UTC)
    owner = owner if which is run.recoveries[-1] else None
    if as_json:
        data = _with_tasks(plain.recovery_data(which, owner, now), tasks)
        _print_json({"run_id": run.run_id, "name": run.name} | data)
    else:
        console = show.terminal(colour=not no_color)
        show.show_recovery(console, run, which, owner, now)
        if tasks:
            console.print()
            show.show_tasks(console, tasks, which, now)
        if traceback:
            show.show_tracebacks(console, tasks)
        if output:
            show.show_output(console, tasks)
    return _FAILED if check and which.status in _HAS_FAILED else _AS_ASKED


@cli.command(
    epilog=_examples(
        "eventor why flow.db 'load[7]'",
        "eventor why flow.db 'all loaded[monday]' --event",
    ),
)
@_store
@click.argument("what", metavar="STEP[SEQUENCE]")
@_place
@click.option("--event", "kind", flag_value="event", help="It is an event, if a step is named so.")
@click.option("--step", "kind", flag_value="step", help="It is a step.")
@_json
@_colour
def why(
    store: str,
    what: str,
    name: str | None,
    run_id: int | None,
    recovery: int | None,
    kind: str | None,
    as_json: bool,
    no_color: bool,
) -> None:
    """Tell why something has happened, or not.

    For a step or an event that is the chain of its causes, or what it waits for. Without a
    sequence it is the only one that there is.
    """
    with _opened(store) as history:
        place = history.find(name, run_id, recovery)
        thing, written = _thing(history, place, what)
        kinds = [ThingKind(kind)] if kind else [ThingKind.step, ThingKind.event]
        if written is None:
            sequence = _only_sequence(history, place, thing, kinds)
        else:
            sequence = _sequence(history, place, written)
        found = history.why(place, thing, sequence, ThingKind(kind) if kind else None)
    if as_json:
        _print_json(plain.why_data(found))
    else:
        show.show_why(show.terminal(colour=not no_color), found)


@cli.command("watch", epilog=_examples("eventor watch flow.db && echo all is well"))
@_store
@_place
@_json
def watch_command(
    store: str, name: str | None, run_id: int | None, recovery: int | None, as_json: bool
) -> int:
    """Watch a run until it ends; the exit code tells how.

    On a terminal there are bars for the steps, what is running and for how long, and the latest
    failures; elsewhere the failures, a line each. With --json nothing is shown before the end.
    """
    with _opened(store) as history:
        place = history.find(name, run_id, recovery)
        ended = watch(history, place, io.StringIO() if as_json else sys.stdout)
    if as_json:
        _print_json(plain.recovery_data(ended, None, datetime.now(UTC)))
    return _FAILED if ended.status in _HAS_FAILED else _AS_ASKED


@cli.command(
    epilog=_examples(
        "eventor trigger shop.db 'order[4711]'",
    ),
)
@_store
@click.argument("what", metavar="EVENT[SEQUENCE]")
@click.option("--name", help="The name of the run; that of the latest by default.")
def trigger(store: str, what: str, name: str | None) -> None:
    """Trigger an event of a run.

    The latest run of the name takes it up if it is live. If it is not, the trigger is kept for
    its next recovery, and a line says so.
    """
    with _opened(store) as history:
        place = history.find(name)
        run, _ = history.at(place)
        event, written = _thing(history, place, what)
        if written is None:
            raise TriggerError(f"{what!r} names no sequence; expected 'EVENT[SEQUENCE]'")
        sequence = _sequence(history, place, written)
    with attach(store, run.name) as attached:
        live = attached.trigger(event, sequence)
    told = f"event {event}[{show.sequence_text(sequence)}] of run {run.run_id}"
    if live:
        click.echo(f"{told} is triggered")
    else:
        click.echo(f"{told} is kept for its next recovery: the run is not live")


@cli.command(
    epilog=_examples(
        "eventor stop shop.db",
    ),
)
@_store
@click.option("--name", help="The name of the run; that of the latest by default.")
def stop(store: str, name: str | None) -> None:
    """Ask a live run to stop.

    It starts nothing more, and ends when what runs has ended.
    """
    with _opened(store) as history:
        run, _ = history.at(history.find(name))
    with attach(store, run.name) as attached:
        if not attached.stop():
            raise RecoveryError(f"run {run.run_id} is not live: there is nothing to stop")
    click.echo(f"run {run.run_id} is asked to stop")


@cli.command(
    "prune",
    epilog=_examples(
        "eventor prune flow.db --keep 10 --dry-run",
        "eventor prune flow.db --older-than 30d",
    ),
)
@_store
@click.option("--keep", type=click.IntRange(0), help="Keep so many of the newest of each name.")
@click.option("--older-than", metavar="AGE", help="Only what is older: 90m, 12h, 30d or 2w.")
@click.option("--name", help="Only runs of this name.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be deleted.")
@_json
@_colour
def prune_command(
    store: str,
    keep: int | None,
    older_than: str | None,
    name: str | None,
    dry_run: bool,
    as_json: bool,
    no_color: bool,
) -> None:
    """Delete old runs.

    Whole runs are deleted, with all that belongs to them, and their space is given back. A live
    run is never deleted. With both rules, a run has to fall under both. A run that has crashed
    can no longer be recovered once it is deleted.
    """
    age = None if older_than is None else _age(older_than)
    now = datetime.now(UTC)
    if dry_run:
        with _opened(store) as history:
            gone = to_prune(history.runs(name), keep, age, now)
    else:
        with contextlib.closing(Store(locate(store), Access.prune)) as opened:
            gone = prune(opened, name, keep, age)
            if gone and not give_back(opened):
                click.echo("a run is live: the space is used again, and given back later", err=True)
    if as_json:
        _print_json([plain.run_data(run, None, now) for run in gone])
        return
    if gone:
        show.show_runs(show.terminal(colour=not no_color), gone, {}, now)
    click.echo(f"{len(gone)} {'would be' if dry_run else 'are'} deleted", err=True)


@cli.command(
    epilog=_examples(
        "eventor export flow.db --format csv -o tasks.csv",
        "eventor export flow.db --run 3 | jq .",
    ),
)
@_store
@_place
@click.option("--format", "form", type=click.Choice(["json", "csv"]), default="json")
@click.option("-o", "--output", type=click.Path(), help="The file; standard output by default.")
def export(
    store: str,
    name: str | None,
    run_id: int | None,
    recovery: int | None,
    form: str,
    output: str | None,
) -> None:
    """Write runs and tasks as JSON or CSV.

    All of the store is written, or what the options say.
    """
    with _opened(store) as history:
        if run_id is not None or recovery is not None:
            history.find(name, run_id, recovery)
        latest = history.find(name)[0] if recovery is not None and run_id is None else run_id
        chosen = [run for run in history.runs(name) if latest in (None, run.run_id)]
        written = (_exported_json if form == "json" else _exported_csv)(history, chosen, recovery)
    _write(written, output)


@cli.command(
    context_settings={"ignore_unknown_options": True},
    epilog=_examples(
        "eventor graph flow.db -o flow.svg",
        "eventor graph flow.py -o flow.png -- --its-own option",
    ),
)
@click.argument("source", metavar="STORE|SCRIPT.py", type=click.Path())
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@_place
@click.option("--events", type=click.Choice(["all", "few"]), default="all", show_default=True)
@click.option(
    "-o", "--output", type=click.Path(), help="The file, by its ending .svg .png .html .mmd .dot."
)
def graph(
    source: str,
    arguments: tuple[str, ...],
    name: str | None,
    run_id: int | None,
    recovery: int | None,
    events: str,
    output: str | None,
) -> None:
    """Draw the flow of a run or of a script.

    Of a run it is drawn with how things stand; the flow of a script is not run: the script is
    executed up to its first call of ev(), with the arguments after its name. Without -o the
    graph is printed as text for Mermaid.
    """
    if source.endswith(".py"):
        drawn = rehearse(source, lambda ev: ev.graph(events=events), arguments)
    else:
        with _opened(source) as history:
            drawn = _graph(history, history.find(name, run_id, recovery), events)
    if output is None:
        click.echo(drawn.mermaid, nl=False)
    else:
        drawn.save(output)


@cli.command(
    epilog=_examples(
        "eventor report flow.db -o run.html",
    ),
)
@_store
@_place
@click.option(
    "-o", "--output", type=click.Path(), required=True, help="The file, such as run.html."
)
def report(
    store: str, name: str | None, run_id: int | None, recovery: int | None, output: str
) -> None:
    """Write a page that tells all of a run.

    It has the graph, a timeline, the failures and all tasks, in one file of HTML. The page
    needs no other file and loads nothing.
    """
    with _opened(store) as history:
        place = history.find(name, run_id, recovery)
        try:
            drawn = _graph(history, place, "few").svg
        except EventorError as error:  # the page says that there is none
            click.echo(f"eventor: without a graph: {error}", err=True)
            drawn = None
        written = report_of(history, *place, drawn)
    _write(written, output)


@contextlib.contextmanager
def _opened(store: str) -> Iterator[History]:
    with contextlib.closing(Store(locate(store), Access.read)) as opened:
        yield History(opened)


def _graph(history: History, place: Place, events: str) -> Graph:
    definition = history.definition(*place)
    if definition is None:
        raise DefinitionError(f"run {place[0]} has recorded no definition of its flow yet")
    run, recovery = history.at(place)
    title = f"{run.name or 'flow'}, run {run.run_id}.{recovery.recovery}"
    return Graph(definition, history.count(*place), events=events, title=title)


def _thing(history: History, place: Place, what: str) -> tuple[str, str | None]:
    """Return the name that was given, and the sequence in the brackets behind it, if there is any.

    A name may have brackets, too: what is a name as a whole is one.
    """
    recorded = history.definition(*place)
    names = Definition(recorded).names if recorded is not None else {}
    if any(what in known for known in names.values()) or not what.endswith("]"):
        return what, None
    name, bracket, rest = what.rpartition("[")
    return (name, rest[:-1]) if bracket and name else (what, None)


def _sequence(history: History, place: Place, written: str) -> Sequence:
    """Return the sequence that was written: `1` is the int, but if there is the str alone."""
    if written[:1] in "'\"" and written[:1] == written[-1:] and len(written) > 1:
        return written[1:-1]
    if not re.fullmatch(r"-?\d+", written):
        return written
    seen = _sequences(history, place)
    return written if written in seen and int(written) not in seen else int(written)


def _sequences(history: History, place: Place) -> list[Sequence]:
    """Return the sequences in which a recovery has raised events."""
    return list(dict.fromkeys(event.sequence for event in history.events(*place)))


def _only_sequence(history: History, place: Place, name: str, kinds: list[ThingKind]) -> Sequence:
    found: list[Sequence] = []
    for kind in kinds:
        if kind is ThingKind.step:
            found += [task.sequence for task in history.tasks(*place, name)]
        else:
            found += [event.sequence for event in history.events(*place, name)]
    seen = list(dict.fromkeys(found)) or _sequences(history, place)
    if len(seen) > 1:
        some = ", ".join(show.sequence_text(one) for one in seen[:_LISTED])
        more = ", ..." if len(seen) > _LISTED else ""
        raise TriggerError(
            f"{name!r} stands in {len(seen)} sequences ({some}{more}); expected '{name}[SEQUENCE]'"
        )
    return seen[0] if seen else 1


def _age(written: str) -> timedelta:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", written)
    if found is None:
        raise click.BadParameter(f"{written!r} is no age; expected for example 90m, 12h, 30d or 2w")
    try:
        return timedelta(**{_AGES[found[2]]: float(found[1])})
    except OverflowError:
        raise click.BadParameter(f"{written!r} is too long an age") from None


def _exported(
    history: History, run: Run, recovery: int | None
) -> Iterator[tuple[Recovery, list[Task]]]:
    for one in run.recoveries:
        if recovery in (None, one.recovery):
            yield one, history.tasks(run.run_id, one.recovery)


def _exported_json(history: History, chosen: list[Run], recovery: int | None) -> str:
    now = datetime.now(UTC)
    data = []
    for run in chosen:
        of_run = plain.run_data(run, history.owner(run.run_id), now)
        by_number = {one["recovery"]: one for one in of_run["recoveries"]}
        of_run["recoveries"] = []
        for one, tasks in _exported(history, run, recovery):
            told = by_number[one.recovery]
            events = history.events(run.run_id, one.recovery)
            of_run["recoveries"].append(
                _with_tasks(told, tasks) | {"events": [plain.event_data(event) for event in events]}
            )
        data.append(of_run)
    return _as_json(data)


def _exported_csv(history: History, chosen: list[Run], recovery: int | None) -> str:
    written = io.StringIO(newline="")
    table = csv.writer(written, lineterminator="\n")
    table.writerow(plain.TASK_COLUMNS)
    for run in chosen:
        for _one, tasks in _exported(history, run, recovery):
            table.writerows(plain.task_row(run, task) for task in tasks)
    return written.getvalue()


def _with_tasks(recovery: plain.Plain, tasks: list[Task]) -> plain.Plain:
    """Return a recovery with its tasks in the place of their numbers, which are its counts."""
    told = [plain.task_data(task) for task in tasks]
    return recovery | {"counts": recovery["tasks"], "tasks": told}


def _as_json(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"


def _print_json(data: object) -> None:
    click.echo(_as_json(data), nl=False)


def _write(text: str, output: str | None) -> None:
    if output is None:
        click.echo(text, nl=False)
    else:
        write_whole(Path(output), text.encode())
