"""The `eventor` command: looks at the runs of a store, asks something of them, and prunes them.

A command is a function below, registered in the table `cli`; it returns its exit code, or None for
0. What it shows is read with `History`, so that nothing is written and nothing unpickled.
"""

from __future__ import annotations

import io
import sys
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

import eventor
from eventor.attached import attach
from eventor.cli import show
from eventor.cli.command import (
    FAILED,
    Commands,
    Looked,
    checked_output,
    coloured,
    console,
    json_option,
    look,
    name_option,
    names_of,
    no_color,
    output_option,
    owners_of,
    print_json,
    read_age,
    read_number,
    reading,
    run_command,
    say,
    store_argument,
    which_recovery,
    write_output,
)
from eventor.cli.export import FORMATS
from eventor.cli.named import named_event, named_thing, sequences_of
from eventor.cli.plain import event_data, flow_data, recovery_data, run_data, task_data, why_data
from eventor.cli.rehearse import rehearse
from eventor.cli.watch import watch
from eventor.errors import DefinitionError, EventorError, RecoveryError, StoreError
from eventor.look.draw import Graph
from eventor.look.report import report as report_of
from eventor.rules.config import unknown
from eventor.storage.backend import Access
from eventor.storage.history import History
from eventor.storage.location import locate
from eventor.storage.prune import give_back, prune, to_prune
from eventor.storage.store import Store
from eventor.types import OwnerStatus, RunStatus, TaskStatus, ThingKind
from eventor.words import number_of, size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from eventor.storage.history import Place
    from eventor.types import Counts, Run, Task

_LISTED = 10
"""How many runs a note lists."""

HAS_FAILED = (RunStatus.failed, RunStatus.unfinished, RunStatus.crashed)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(eventor.__version__, prog_name="eventor", message="%(prog)s %(version)s")
@no_color
def cli() -> None:
    """Look at the runs of eventor's stores, during a run, after it, and after a crash.

    STORE is the path of a store, or its SQLAlchemy URL. To look at it writes nothing.

    \b
    Examples:
      eventor runs flow.db
      eventor show flow.db --status failure --traceback
      eventor why flow.db 'report[1]'
      eventor graph flow.py -o flow.svg
      eventor COMMAND --help

    \b
    Exit codes:
      0  as asked
      1  the run that was looked at has failed (watch, show --check)
      2  bad usage, no such thing, or a store that cannot be used
    """


@cli.command()
@store_argument
@name_option
@json_option
@no_color
def runs(store: str, name: str | None, *, as_json: bool) -> None:
    """List runs and their recoveries.

    A recovery is called by the number of its run and its own: 4.0 is run 4 itself, and 4.1 the
    first recovery of it.

    \b
    Examples:
      eventor runs flow.db
      eventor runs flow.db --name daily
      eventor runs flow.db --json | jq '.runs[-1].recoveries[-1].status'
    """
    with reading(store) as history:
        if name is not None:
            history.find(name)
        found = history.runs(name)
        owners = owners_of(history, found)
    now = datetime.now(UTC)
    if as_json:
        print_json({"runs": [run_data(run, owners.get(run.run_id), now) for run in found]})
    elif found:
        show.show_runs(console(), found, owners, now)
    else:
        click.echo("the store has no runs")


@cli.command("show")
@store_argument
@which_recovery
@click.option(
    "--step", metavar="STEP", shell_complete=names_of([ThingKind.step]), help="Tasks of this step."
)
@click.option("--sequence", metavar="S", help="Tasks of this sequence.")
@click.option(
    "--status",
    type=click.Choice([*TaskStatus, "skipped"]),
    help="Tasks that stand there.",
)
@click.option(
    "--check", is_flag=True, help="Exit with 1 if it has failed, crashed, or is unfinished."
)
@click.option("--traceback", is_flag=True, help="Print the tracebacks of all attempts that failed.")
@click.option("--output", is_flag=True, help="Print what the steps have written, if captured.")
@json_option
@no_color
def show_command(
    store: str,
    name: str | None,
    run: tuple[int, int | None] | None,
    recovery: int | None,
    step: str | None,
    sequence: str | None,
    status: str | None,
    *,
    check: bool,
    traceback: bool,
    output: bool,
    as_json: bool,
) -> int | None:
    """Show the tasks of a run.

    It is the latest run of the store, or of the name, if none is named. With --check, a run that
    still goes on has not failed: to wait for its end, watch it. The document of --json has the
    tasks with all that is known of their attempts, and the events.

    \b
    Examples:
      eventor show flow.db
      eventor show flow.db --run 4.1 --step load
      eventor show flow.db --status failure --traceback
      eventor show flow.db --check || echo 'the run has failed'
    """
    with reading(store) as history:
        looked = look(history, name, run, recovery)
        if step is not None:
            _check_step(history, looked.place, step)
        tasks = [
            task
            for task in _tasks(history, looked.place, step, sequence)
            if status in (None, show.status_of(task))
        ]
        events = history.events(*looked.place) if as_json else []
    if as_json:
        data = {
            "run_id": looked.run.run_id,
            "name": looked.run.name,
            **recovery_data(looked.recovery, looked.owner, looked.now),
            "tasks": [task_data(task) for task in tasks],
            "events": [event_data(event) for event in events],
        }
        print_json(data)
    else:
        _show_tasks(looked, tasks, traceback=traceback, output=output)
    if check and looked.recovery.status in HAS_FAILED:
        say(f"{show.called(looked.run, looked.recovery)} {show.STANDS[looked.recovery.status]}")
        return FAILED
    return None


@cli.command()
@store_argument
@click.argument("what", metavar="STEP[SEQUENCE]", shell_complete=names_of(ThingKind))
@which_recovery
@click.option("--event", "kind", flag_value="event", help="It is an event.")
@click.option("--step", "kind", flag_value="step", help="It is a step.")
@json_option
@no_color
def why(
    store: str,
    what: str,
    name: str | None,
    run: tuple[int, int | None] | None,
    recovery: int | None,
    kind: str | None,
    *,
    as_json: bool,
) -> None:
    """Tell why a step has run, or has not.

    Or why an event was raised; and for what has not happened, what it still waits for.
    The sequence may be left out where there is only one. 1 is the int where there is such a
    sequence, else the str; '1' in quotes is the str.

    \b
    Examples:
      eventor why flow.db 'report[1]'
      eventor why flow.db 'load.success[monday]' --run 4
    """
    with reading(store) as history:
        looked = look(history, name, run, recovery)
        named = named_thing(history, looked.place, what, ThingKind(kind) if kind else None)
        answer = history.why(looked.place, named.name, named.sequence, named.kind)
    if as_json:
        told = {"kind": named.kind.value, "name": named.name, "sequence": named.sequence}
        print_json(told | why_data(answer))
    else:
        show.show_why(console(), answer, live=looked.recovery.owner is OwnerStatus.live)


@cli.command("watch")
@store_argument
@which_recovery
@json_option
@no_color
def watch_command(
    store: str,
    name: str | None,
    run: tuple[int, int | None] | None,
    recovery: int | None,
    *,
    as_json: bool,
) -> int | None:
    """Watch a run until it ends; the exit code tells how.

    On a terminal there are bars of steps and sequences, what is running and for how long, and the
    latest failures; elsewhere a line for each failure. With --json one document is printed at the
    end.

    \b
    Examples:
      eventor watch flow.db
      eventor watch flow.db && deploy
    """
    with reading(store, at_once=False) as history:
        looked = look(history, name, run, recovery)
        stream = io.StringIO() if as_json else sys.stdout
        ended = watch(history, looked.place, stream, colour=coloured())
    if as_json:
        of_run = {"run_id": looked.run.run_id, "name": looked.run.name}
        print_json({**of_run, **recovery_data(ended, None, datetime.now(UTC))})
    return FAILED if ended.status in HAS_FAILED else None


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("source", metavar="STORE|SCRIPT.py", type=click.Path())
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@which_recovery
@click.option(
    "--events",
    type=click.Choice(["all", "few"]),
    default="all",
    help="Draw all events, or leave out those that only link.",
)
@output_option()
@json_option
def graph(
    source: str,
    arguments: tuple[str, ...],
    name: str | None,
    run: tuple[int, int | None] | None,
    recovery: int | None,
    events: str,
    output: str | None,
    *,
    as_json: bool,
) -> None:
    """Draw the flow of a run or of a script.

    That of a run is drawn with how things stand. A script is executed, with the arguments after
    its name, up to its first call of ev(), and its flow is not run. The ending of the file tells
    the format: .svg, .png, .html, .mmd (Mermaid) or .dot; without a file Mermaid is printed. With
    --json the flow's definition is printed, and how many tasks stand where.

    \b
    Examples:
      eventor graph flow.db -o flow.svg
      eventor graph flow.py -o flow.png -- --its-own option
    """
    if source.endswith(".py"):
        if (name, run, recovery) != (None, None, None):
            told = "a script has no runs; options of its own come after --"
            raise click.UsageError(told, click.get_current_context())
        path = checked_output(output, None)
        found = rehearse(source, arguments)
        definition, counts, title = found.definition, None, found.name
    else:
        if arguments:
            told = f"{arguments[0]!r} is one argument too many; only a script takes its own"
            raise click.UsageError(told, click.get_current_context())
        path = checked_output(output, source)
        with reading(source) as history:
            definition, counts, title = _flow(history, look(history, name, run, recovery))
    if as_json:
        print_json(flow_data(definition, counts, title), path)
        return
    drawn = Graph(definition, counts, events=events, title=title)
    if path is None:
        write_output(drawn.mermaid.encode(), None)
    else:
        drawn.save(path)


@cli.command()
@store_argument
@which_recovery
@output_option(required=True)
def report(
    store: str,
    name: str | None,
    run: tuple[int, int | None] | None,
    recovery: int | None,
    output: str | None,
) -> None:
    """Write a page that tells all of a run.

    It has the graph, a timeline, the failures and all tasks, in one file of HTML that needs no
    other and loads nothing.

    \b
    Examples:
      eventor report flow.db -o run.html
      eventor report flow.db -o run-4.html --run 4.1
    """
    path = checked_output(output, store)
    with reading(store) as history:
        looked = look(history, name, run, recovery)
        try:
            definition, counts, title = _flow(history, looked)
            drawn = Graph(definition, counts, events="few", title=title).svg
        except EventorError as error:  # the page says that there is none
            say(f"without a graph: {error}")
            drawn = None
        page = report_of(history, *looked.place, drawn)
    write_output(page.encode(), path)


@cli.command()
@store_argument
@click.argument("what", metavar="EVENT[SEQUENCE]", shell_complete=names_of([ThingKind.event]))
@name_option
@json_option
def trigger(store: str, what: str, name: str | None, *, as_json: bool) -> None:
    """Trigger an event of a run.

    It is the latest run, or the latest of the name.
    A live run takes it up within its sleep_between_loops. If the run is not live, the trigger is
    kept for its next recovery; a note says so, and the exit code is 0. A sequence that reads as an
    int is one, but in quotes.

    \b
    Examples:
      eventor trigger shop.db 'order[17]'
      eventor trigger shop.db 'order[monday]' --name shop
      eventor trigger shop.db "order['17']"
    """
    with reading(store) as history:
        looked = look(history, name, None, None)
        named = named_event(history, looked.place, what)
    with attach(store, looked.run.name) as attached:
        live = attached.trigger(named.name, named.sequence)
    if as_json:
        asked = {"event": named.name, "sequence": named.sequence}
        print_json({"run_id": looked.run.run_id, "name": looked.run.name, **asked, "live": live})
    else:
        event = show.thing(named.name, named.sequence)
        click.echo(f"{_of_name(looked.run)} is asked to raise {event}")
    if not live:
        say(f"{_of_name(looked.run)} is not live: the trigger is kept for its next recovery")


@cli.command()
@store_argument
@name_option
@json_option
def stop(store: str, name: str | None, *, as_json: bool) -> None:
    """Ask a run to stop, and let finish what runs.

    It is the latest run, or the latest of the name. If it is not live, there is nothing to stop,
    and the exit code is 2.

    \b
    Example:
      eventor stop shop.db
    """
    with reading(store) as history:
        looked = look(history, name, None, None)
    with attach(store, looked.run.name) as attached:
        live = attached.stop()
    if not live:
        raise RecoveryError(f"{_of_name(looked.run)} is not live; there is nothing to stop")
    if as_json:
        print_json({"run_id": looked.run.run_id, "name": looked.run.name})
    else:
        click.echo(f"{_of_name(looked.run)} is asked to stop")


@cli.command("prune")
@store_argument
@click.option("--keep", type=read_number, metavar="N", help="Keep the newest N runs of each name.")
@click.option(
    "--older-than",
    type=read_age,
    metavar="AGE",
    help="Keep runs heard of within 30d, 12h, 90m or 2w.",
)
@name_option
@click.option("--dry-run", is_flag=True, help="Delete nothing; say what would be deleted.")
@json_option
@no_color
def prune_command(
    store: str,
    keep: int | None,
    older_than: timedelta | None,
    name: str | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete whole runs, and give their space back.

    With both --keep and --older-than only what is beyond both is deleted. A live run never is.
    One that has crashed, failed or is unfinished is, and can then not be recovered.

    \b
    Examples:
      eventor prune flow.db --keep 10 --dry-run
      eventor prune flow.db --older-than 30d
      eventor prune flow.db --keep 3 --name daily
    """
    if keep is None and older_than is None:
        raise click.UsageError(
            "missing option '--keep' or '--older-than'", click.get_current_context()
        )
    with closing(Store(locate(store), Access.read if dry_run else Access.prune)) as opened:
        history = History(opened)
        if name is not None:
            history.find(name)
        owners = owners_of(history, history.runs(name))
        now = datetime.now(UTC)
        if dry_run:
            gone, freed = to_prune(history.runs(name), keep, older_than, now), 0
        else:
            before = opened.size()
            gone = prune(opened, name, keep, older_than)
            freed = _give_back(opened, before) if gone else 0
    if as_json:
        deleted = [run_data(run, owners.get(run.run_id), now) for run in gone]
        print_json({"dry_run": dry_run, "runs": deleted, "bytes_given_back": freed})
    else:
        if gone:
            show.show_runs(console(), gone, owners, now)
        number = number_of(len(gone), "run") if gone else "no run"
        given_back = f"; {size(freed)} given back" if freed else ""
        click.echo(f"{number} {'would be deleted' if dry_run else 'deleted'}{given_back}")
    lost = [run for run in gone if run.recoveries[-1].status is not RunStatus.succeeded]
    if lost:
        some = ", ".join(f"{run.run_id} ({run.recoveries[-1].status})" for run in lost[:_LISTED])
        which = some + (f", and {len(lost) - _LISTED:,} more" if len(lost) > _LISTED else "")
        would = "could then" if dry_run else "can now"
        say(f"what had not succeeded {would} not be recovered: {which}")


@cli.command("export")
@store_argument
@which_recovery
@click.option("--format", "kind", type=click.Choice(list(FORMATS)), default="json")
@output_option()
def export_command(
    store: str,
    name: str | None,
    run: tuple[int, int | None] | None,
    recovery: int | None,
    kind: str,
    output: str | None,
) -> None:
    """Write all that is known of runs as JSON or CSV.

    All runs, if none is named. CSV has a row for each task; JSON, which is written by default, has
    the events and attempts, too. The results of steps are left out.

    \b
    Examples:
      eventor export flow.db --format csv -o tasks.csv
      eventor export flow.db --format json --name daily | jq '.runs[].name'
    """
    path = checked_output(output, store)
    with reading(store) as history:
        if run is None and recovery is None:
            if name is not None:
                history.find(name)
            chosen = [(each, tuple(each.recoveries)) for each in history.runs(name)]
        else:
            looked = look(history, name, run, recovery)
            whole = recovery is None and run is not None and run[1] is None
            chosen = [(looked.run, looked.run.recoveries if whole else (looked.recovery,))]
        owners = owners_of(history, [each for each, _ in chosen])
        text = io.StringIO(newline="")
        FORMATS[kind](history, chosen, owners, text)
    write_output(text.getvalue().encode(), path)


def run(args: Sequence[str] | None = None) -> int:
    """Run the command with arguments, by default those of the program; return its exit code."""
    return run_command(cli, args)


def _show_tasks(looked: Looked, tasks: list[Task], *, traceback: bool, output: bool) -> None:
    screen = console()
    show.show_recovery(screen, looked.run, looked.recovery, looked.owner, looked.now)
    if tasks:
        click.echo()
        show.show_tasks(screen, tasks, looked.recovery, looked.now)
    if traceback and not show.show_tracebacks(screen, tasks):
        say("no attempt at these tasks has failed")
    if output and not show.show_output(screen, tasks):
        say("of these tasks no output was captured; for that their config needs capture_output")


def _flow(history: History, looked: Looked) -> tuple[Any, Counts, str]:
    """Return the definition of a recovery's flow, how things stand in it, and its title."""
    definition = history.definition(*looked.place)
    if definition is None:
        raise DefinitionError(f"run {looked.run.run_id} has recorded no definition of its flow yet")
    title = f"{looked.run.name or 'flow'}, run {looked.run.run_id}.{looked.recovery.recovery}"
    live = looked.recovery.owner is OwnerStatus.live
    return definition, history.count(*looked.place, live=live), title


def _tasks(history: History, place: Place, step: str | None, sequence: str | None) -> list[Task]:
    """Return the tasks of a step and of the first sequence with any that a text may mean."""
    if sequence is None:
        return history.tasks(*place, step)
    meant = (history.tasks(*place, step, one) for one in sequences_of(sequence))
    return next(filter(None, meant), [])


def _check_step(history: History, place: Place, step: str) -> None:
    """Make sure that a flow is not known to have no such step."""
    known = history.names(place)[ThingKind.step]
    if known and step not in known:
        raise DefinitionError(f"run {place[0]} has no step {step!r}; {unknown(step, known)}")


def _give_back(store: Store, before: int) -> int:
    """Give the space of deleted runs back, if it can be; return how much it was, in bytes."""
    try:
        if not give_back(store):
            say("a run is live, so the space is left in the store, to be used again")
    except StoreError as error:
        say(f"the runs are deleted, and their space is left in the store: {error}")
    return max(0, before - store.size())


def _of_name(run: Run) -> str:
    return f"run {run.run_id}" + (f" of {run.name}" if run.name else "")
