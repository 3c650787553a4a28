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
GROUPS = 10
WEIGHTS = {
    "simulation": 6,
    "postgresql": 5,
    "docs": 5,
    "executors": 3,
    "cli": 4,
    "timeouts": 4,
    "examples": 3,
    "kills": 3,
    "draw": 3,
    "workers": 2,
    "steps": 2,
    "package": 2,
}
"""Of modules that take longer than by their size."""

NO_TESTS = 5
"""With what pytest ends if its arguments leave none of a group."""


def groups():
    """Return the modules in groups of about the same size, the largest module first."""
    found = [(0, []) for _ in range(GROUPS)]
    modules = {
        path: path.stat().st_size * WEIGHTS.get(path.stem.removeprefix("test_"), 1)
        for path in (ROOT / "tests").glob("test_*.py")
    }
    for path in sorted(modules, key=lambda path: (-modules[path], path)):
        size, group = found.pop(0)
        found = sorted([*found, (size + modules[path], [*group, path])], key=lambda one: one[0])
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
