"""Measure what flows cost, against floors of the same run.

Each measurement is a process of its own. They are taken in turn, run by run, so that whatever slows
the machine for a while slows floors and flows alike; medians over the runs are compared.
"""

import argparse
import collections
import compileall
import importlib.metadata
import importlib.util
import json
import os
import platform
import sqlite3
import statistics
import sys
import time
from pathlib import Path

from tests.benchmarks import child, floors, suite

PIECE_SECONDS = 0.05
QUICK = 20
FORMATS = {"B": (",.0f", " B"), "cores": (".4f", " cores"), "ratio": (".2f", "")}


def main():
    given = read_arguments()
    # As an installed package has it.
    compileall.compile_dir(child.ROOT / "eventor", quiet=1)
    iterations = floors.iterations_of(PIECE_SECONDS)
    figures = [
        figure.sized(QUICK if given.quick else 1, iterations)
        for figure in suite.FIGURES
        if given.only is None or figure.workload in given.only
    ]
    often = commands(figure for figure in figures if figure.workload != suite.ONCE)
    once = commands(figure for figure in figures if figure.workload == suite.ONCE)
    samples = collections.defaultdict(list)
    for number in range(given.runs):
        take(often, samples, f"run {number + 1} of {given.runs}")
    take(once, samples, "once")
    rows = [compare(figure, samples) for figure in figures]
    report(rows)
    given.out.mkdir(parents=True, exist_ok=True)
    results = {
        "machine": machine(),
        "runs": given.runs,
        "quick": given.quick,
        "figures": rows,
        "samples": samples,
    }
    (given.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if once:
        # Not before: the peak memory of a child begins at the size of its parent.
        from tests.benchmarks import plot

        plot.draw(samples, given.out)


def read_arguments():
    names = list(dict.fromkeys(figure.workload for figure in suite.FIGURES))
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="how often (default: 5)")
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument(
        "--out", type=Path, default="benchmarks-out", metavar="DIR", help="for what is written"
    )
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, for which the targets are not meant"
    )
    given = parser.parse_args()
    if given.runs < 1:
        parser.error("--runs is at least 1")
    if suite.ONCE in (given.only or names) and importlib.util.find_spec("matplotlib") is None:
        parser.error("growth is drawn with matplotlib: python -m pip install -e '.[benchmarks]'")
    return given


def commands(figures):
    """Return the commands by which figures are measured, each once, and floors first."""
    pairs = ((figure.floor, figure.measured) for figure in figures)
    names = [name for floor, measured in pairs for name in (*floor, measured)]
    found = dict.fromkeys(name.partition(":")[0] for name in names)
    return sorted(found, key=lambda command: module_of(command) == "workloads")


def module_of(command):
    return "floors" if command.split()[0] in floors.KNOWN else "workloads"


def take(commands, samples, turn):
    """Take measurements one after the other, and add what they find to the samples."""
    for command in commands:
        began = time.monotonic()
        for name, value in child.measure(module_of(command), command).items():
            samples[f"{command}: {name}"].append(value)
        print(f"{turn}: {command} ({time.monotonic() - began:.1f} s)", file=sys.stderr)


def compare(figure, samples):
    """Return what a figure comes to."""
    measured = statistics.median(samples[figure.measured])
    floor = sum(statistics.median(samples[name]) for name in figure.floor) or None
    ratio = measured / floor if floor else None
    reached = measured if ratio is None else ratio
    return {
        "figure": figure.title,
        "unit": figure.measured.split()[-1],
        "measured": measured,
        "floor": floor,
        "ratio": ratio,
        "target": figure.target,
        "met": None if figure.target is None else reached <= figure.target,
        "samples": len(samples[figure.measured]),
    }


def report(rows):
    """Print the table; a target is of the ratio where there is one."""
    table = [("figure", "measured", "floor", "ratio", "target", "met", "samples")]
    for row in rows:
        unit, ratio = row["unit"], row["ratio"]
        cells = (
            shown(row["measured"], unit),
            shown(row["floor"], unit),
            shown(ratio, "ratio"),
            shown(row["target"], unit if ratio is None else "ratio"),
            {None: "", True: "yes", False: "NO"}[row["met"]],
            str(row["samples"]),
        )
        table.append((row["figure"], *cells))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for title, *cells in table:
        columns = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        print("  ".join((title.ljust(widths[0]), *columns)))


def shown(value, unit):
    """Return a value as a person reads it."""
    if value is None:
        return ""
    if unit in FORMATS:
        return format(value, FORMATS[unit][0]) + FORMATS[unit][1]
    for factor, name in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {name}"
    return f"{value * 1e6:.3g} µs"


def machine():
    return {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "sqlalchemy": importlib.metadata.version("sqlalchemy"),
    }


if __name__ == "__main__":
    main()
