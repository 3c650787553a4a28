"""Run all tests, on both kinds of store, and report what they cover.

    python -m tests [PYTEST-ARGUMENT ...]

A few modules run in a process, and two processes at a time, for the tests wait more than they work.
A module is never split, so all that its tests share stays so.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
AT_ONCE = 2
GROUPS = 8
SECONDS = {
    "executors": 250,
    "cli": 160,
    "postgresql": 100,
    "output": 70,
    "docs": 65,
    "timeouts": 60,
    "draw": 55,
    "retries": 55,
    "simulation": 55,
    "recovery": 50,
    "steps": 50,
    "workers": 50,
    "progress": 45,
    "signals": 45,
    "inside": 40,
    "examples": 35,
    "rules": 35,
    "attach": 30,
    "continue": 30,
    "hooks": 30,
    "check": 25,
    "data": 25,
    "keeper": 25,
    "kills": 25,
    "package": 25,
    "faults": 20,
    "interface": 20,
    "logging": 20,
    "owner": 20,
    "why": 20,
}
"""How long modules take, about and next to each other; those that are not named take OTHERS."""

OTHERS = 8

NO_TESTS = 5
"""With what pytest ends if its arguments leave none of a group."""


def groups():
    """Return the modules in groups that take about as long as each other, the longest first."""
    found = [(0, []) for _ in range(GROUPS)]
    modules = {
        path: SECONDS.get(path.stem.removeprefix("test_"), OTHERS)
        for path in (ROOT / "tests").glob("test_*.py")
    }
    for path in sorted(modules, key=lambda path: (-modules[path], path)):
        seconds, group = found.pop(0)
        found = sorted([*found, (seconds + modules[path], [*group, path])], key=lambda one: one[0])
    return [group for _, group in reversed(found)]


def run(number, group, arguments, place):
    """Run the tests of a group; return how that has ended, and what it has printed."""
    command = [sys.executable, "-m", "pytest", "--cov", "--cov-report=", "-p", "no:cacheprovider"]
    command += ["--stores", "both"]
    names = [path.relative_to(ROOT) for path in group]
    ran = subprocess.run(
        [*command, *arguments, *names],
        cwd=ROOT,
        env={**os.environ, "COVERAGE_FILE": f"{place}/{number}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return ran.returncode, ran.stdout


def main(arguments):
    """Run all groups, print what each has printed when it has ended, and return an exit code."""
    code = 0
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(AT_ONCE) as pool:
        runs = [
            pool.submit(run, number, group, arguments, place)
            for number, group in enumerate(groups())
        ]
        for done in runs:
            ended, told = done.result()
            sys.stdout.buffer.write(told)
            sys.stdout.buffer.flush()
            code = code if ended in (0, NO_TESTS) else ended
        coverage = [sys.executable, "-m", "coverage"]
        # Not what a process that ends late is about to write, or has just taken away.
        data = [path for number in range(GROUPS) if (path := Path(place, f"{number}")).exists()]
        subprocess.run([*coverage, "combine", "-q", *data], cwd=ROOT, check=True)
        subprocess.run([*coverage, "report"], cwd=ROOT, check=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
