"""One measurement: a process of its own, so that none leaves anything to the next."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def measure(module, command):
    """Take the measurement of a module that a command names; return its values by their units.

    Raises:
        SystemExit: it has failed.
    """
    words = [sys.executable, "-m", f"tests.benchmarks.{module}", *command.split()]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+") as errors:
        ran = subprocess.run(
            words,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=False,
        )
        if ran.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(words)} has failed:\n{errors.read()[-5_000:]}")
    return json.loads(ran.stdout)


def by_name(*functions):
    """Return functions by the names that a command line gives them."""
    return {function.__name__.replace("_", "-"): function for function in functions}


def main(known):
    """Take the measurement that the command line names, and print it as one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=known)
    parser.add_argument("arguments", nargs="*", help="sizes and words, as the measurement takes")
    given = parser.parse_args()
    values = [int(value) if value.isdecimal() else value for value in given.arguments]
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(known[given.name](Path(place), *values)))
