"""Measure the standard library of the Python that runs this, and write a report as a table.

List its packages, measure each in parallel with `ast`, join, report:

    python examples/stdlib_report.py --jobs 4

Kill it in the middle, run it again with `--recover`, and it ends with the same report; what was
measured is not measured again.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import eventor as evr

SINGLE = "(modules)"
"""The name under which all modules that stand alone are measured together."""

LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}

COLUMNS = ("files", "lines", "functions", "classes")


def packages(library: Path) -> list[str]:
    """Return the names of the packages, which are the steps of the flow."""
    found = (entry.name for entry in library.iterdir() if (entry / "__init__.py").is_file())
    return [SINGLE, *sorted(set(found) - LEFT_OUT)]


def write(path: Path, text: str) -> None:
    """Write a file at once, so that a kill never leaves half of one."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)


def list_files(library: Path, names: list[str], out: Path) -> int:
    """Write down which files each package has; return how many there are."""
    listing = {}
    for name in names:
        found = library.glob("*.py") if name == SINGLE else (library / name).rglob("*.py")
        listing[name] = sorted(
            str(path) for path in found if not LEFT_OUT & set(path.relative_to(library).parts)
        )
    write(out / "listing.json", json.dumps(listing))
    return sum(map(len, listing.values()))


def measure(name: str, out: Path) -> None:
    """Measure one package."""
    row: dict[str, Any] = {"package": name, **dict.fromkeys(COLUMNS, 0)}
    row |= {"unreadable": 0, "longest": 0, "where": ""}
    for file in json.loads((out / "listing.json").read_text())[name]:
        source = Path(file).read_bytes()
        row["files"] += 1
        row["lines"] += source.count(b"\n")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            row["unreadable"] += 1
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                row["classes"] += 1
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                row["functions"] += 1
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > row["longest"]:
                    row |= {"longest": length, "where": f"{Path(file).name}:{node.name}"}
    write(out / f"measured {name}.json", json.dumps(row))
    with (out / "measured.log").open("a") as log:
        log.write(f"{name} {os.getpid()}\n")


def report(names: list[str], out: Path) -> None:
    """Join what was measured into a table."""
    rows = [json.loads((out / f"measured {name}.json").read_text()) for name in names]
    rows.sort(key=lambda row: (-row["lines"], row["package"]))
    sums = {column: sum(row[column] for row in rows) for column in (*COLUMNS, "unreadable")}
    longest = max(rows, key=lambda row: row["longest"])
    rows.append({**longest, "package": "total", **sums})
    numbers = "".join(f"{column:>11}" for column in (*COLUMNS, "unreadable", "longest"))
    lines = [f"{'package':20}{numbers}  longest function"]
    for row in rows:
        told = "".join(f"{row[column]:>11,}" for column in (*COLUMNS, "unreadable", "longest"))
        lines.append(f"{row['package']:20}{told}  {row['where']}".rstrip())
    write(out / "report.txt", "\n".join(lines) + "\n")


def run(library: Path, out: Path, jobs: int, mode: evr.RunMode) -> list[str]:
    """Define the flow and run it; return which steps failed."""
    names = packages(library)
    config = {"max_concurrent": jobs, "logdir": out}
    with evr.Eventor(store=out / "report.db", run_mode=mode, config=config) as ev:
        begin, listed = ev.add_event("begin"), ev.add_event("listed")
        at_success = evr.StepTriggers.at_success
        first = ev.add_step(
            "list", list_files, args=(library, names, out), triggers={at_success: listed}
        )
        ev.add_assoc(begin, first)
        measured = []
        for name in names:
            done = ev.add_event(f"measured {name}")
            step = ev.add_step(
                f"measure {name}", measure, args=(name, out), triggers={at_success: done}
            )
            ev.add_assoc(listed, step)
            measured.append(done)
        all_measured = ev.add_event("all measured", expr=tuple(measured))
        ev.add_assoc(all_measured, ev.add_step("report", report, args=(names, out)))
        if mode is evr.RunMode.restart:
            ev.trigger_event(begin)
        ev()
        return [f"{task.step}: {task.error}" for task in ev.tasks(status=evr.TaskStatus.failure)]


def main() -> int:
    """Read the command line, run the flow, and print the report."""
    parser = argparse.ArgumentParser(description="Measure the standard library of this Python.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="steps at a time")
    parser.add_argument("--recover", action="store_true", help="go on with the run that was cut")
    parser.add_argument("--out", type=Path, default=Path("stdlib_report"), help="where files go")
    parser.add_argument(
        "--library", type=Path, default=Path(sysconfig.get_path("stdlib")), help="what to measure"
    )
    given = parser.parse_args()
    library, out = given.library.resolve(), given.out.resolve()
    if not library.is_dir():
        parser.error(f"--library {given.library} is not a directory")
    out.mkdir(parents=True, exist_ok=True)
    try:
        mode = evr.RunMode.recover if given.recover else evr.RunMode.restart
        failed = run(library, out, given.jobs, mode)
    except evr.EventorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if failed:
        print("\n".join(failed), file=sys.stderr)
        return 1
    print((out / "report.txt").read_text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
