"""The examples run on real input, also when they are killed in the middle."""

import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.conftest import sql, wait_until

# Each of them starts several programs, of which some take seconds where the machine is idle.
pytestmark = pytest.mark.timeout(600)

EXAMPLES = Path(__file__).parent.parent / "examples"
SECONDS = 200


def run(example, *arguments, cwd):
    return subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / example, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def start(example, *arguments, cwd):
    """Start an example in a session of its own, to be killed."""
    return subprocess.Popen(
        [sys.executable, EXAMPLES / example, *arguments],
        cwd=cwd,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.fixture
def library(tmp_path):
    """A small library: enough packages to be killed in the middle of."""
    root = tmp_path / "library"
    for number in range(12):
        package = root / f"package{number:02}"
        (package / "sub").mkdir(parents=True)
        (package / "__init__.py").write_text("def one():\n    return 1\n")
        body = "".join(f"class C{n}:\n    async def m(self):\n        pass\n" for n in range(200))
        for name in ("a", "b"):
            (package / "sub" / f"{name}.py").write_text(body)
    (root / "alone.py").write_text("def longest():\n    a = 1\n    b = 2\n    return a + b\n")
    (root / "broken.py").write_text("def (\n")
    return root


def test_recovery_runs_the_failed_step_again(tmp_path):
    ran = run("recovery.py", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"parse\s+failure", ran.stdout)
    assert re.search(r"extract\s+success\s+skip", ran.stdout)
    assert re.search(r"parse\s+success\s+rerun", ran.stdout)


def test_the_report_counts_what_is_there(tmp_path, library):
    ran = run("stdlib_report.py", "--library", library, "--jobs", "4", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    found = {line.split()[0]: line.split()[1:] for line in ran.stdout.splitlines() if line.strip()}
    # files, lines, functions, classes
    assert found["package00"][:4] == ["3", "1,202", "401", "400"]
    assert "longest" in ran.stdout
    assert ran.stdout.rstrip("\n") in (tmp_path / "stdlib_report/report.txt").read_text()


def test_the_report_of_a_killed_run_is_the_same_and_repeats_nothing(tmp_path, library):
    whole = run("stdlib_report.py", "--library", library, "--out", "whole", cwd=tmp_path)
    killed = start("stdlib_report.py", "--library", library, "--jobs", "2", cwd=tmp_path)
    log = tmp_path / "stdlib_report" / "measured.log"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, SECONDS)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(30)
    before = [line.split()[0] for line in log.read_text().splitlines()]
    recovered = run("stdlib_report.py", "--library", library, "--recover", cwd=tmp_path)
    assert recovered.returncode == 0, recovered.stderr
    assert recovered.stdout == whole.stdout
    after = [line.split()[0] for line in log.read_text().splitlines()][len(before) :]
    # Only what was in flight at the kill, at most one for each job, may have been measured twice.
    assert len(set(before) & set(after)) <= 2


def test_a_wrong_call_is_told_in_one_line(tmp_path, library):
    ran = run("stdlib_report.py", "--recover", "--library", library, cwd=tmp_path)
    assert (ran.returncode, ran.stderr.startswith("error: there is nothing to recover")) == (
        2,
        True,
    )
    ran = run("stdlib_report.py", "--library", tmp_path / "none", cwd=tmp_path)
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr


def test_a_backup_is_packed_and_checked(tmp_path, library):
    ran = run("backup.py", "--source", library, "--wait", "0.1", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "WARNING" not in ran.stderr
    told = [line.split() for line in ran.stdout.splitlines()]
    assert [words[0] for words in told] == ["(files)", *(f"package{n:02}" for n in range(12))]
    assert [words[1] for words in told] == ["2", *["3"] * 12]
    with tarfile.open(tmp_path / "backup/package03.tar.xz") as archive:
        packed = archive.extractfile("package03/sub/a.py").read()
    assert packed == (library / "package03/sub/a.py").read_bytes()


def test_a_backup_that_was_killed_goes_on_and_finds_what_was_damaged(tmp_path, library):
    killed = start("backup.py", "--source", library, "--wait", "3600", cwd=tmp_path)
    log = tmp_path / "backup/packed.log"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) == 13, SECONDS)
    query = "SELECT count(*) FROM eventor_task WHERE step = 'pack' AND status = 'success'"
    wait_until(lambda: sql(tmp_path / "backup/backup.db", query) == [(13,)])
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(30)
    # Time passes, and one archive goes bad.
    sql(tmp_path / "backup/backup.db", "UPDATE eventor_delay SET due_at = '2026-01-01 00:00:00'")
    good, bad = (tmp_path / f"backup/package{number:02}.tar.xz" for number in (4, 5))
    bad.write_bytes(good.read_bytes())
    # The source is not asked again: what was packed is known from the results.
    (library / "package07/__init__.py").write_text("changed since")
    ran = run("backup.py", "--source", library, "--recover", cwd=tmp_path)
    assert ran.returncode == 1
    assert len(log.read_text().splitlines()) == 13
    assert "package07                  3 files" in ran.stdout
    wrong = "check package05: ValueError: package05.tar.xz does not hold what was packed: package05"
    assert ran.stdout.splitlines()[-1].startswith(wrong)


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--rows", "0"), "argument --rows: 0 is too few; expected 1 or more"),
        (("--size", "0"), "argument --size: 0 is too few; expected 1 or more"),
        (("--workers", "-1"), "argument --workers: -1 is too few; expected 1 or more"),
        (("--dask", "foo://x"), "error: no scheduler of Dask at 'foo://x': unknown address scheme"),
        (("--dask", "127.0.0.1:1"), "error: no scheduler of Dask at '127.0.0.1:1': Timed out"),
    ],
)
def test_a_cluster_that_cannot_be_is_told_in_a_line(tmp_path, options, told):
    ran = run("cluster.py", *options, cwd=tmp_path)
    assert ran.returncode == 2
    assert told in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr


@pytest.mark.once
def test_the_same_picture_is_drawn_here_and_on_a_cluster(tmp_path, place):
    drawn = {}
    for out, options in (("here", ()), ("there", ("--dask", "--workers", "2"))):
        ran = run("cluster.py", *options, "--out", out, "--store", place.store, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        assert re.match(r"12 strips drawn by \d+ processes, 0 known before", ran.stdout)
        told = [line for line in ran.stderr.splitlines() if line.startswith("drawing strip")]
        assert len(told) == len(set(told)) == 12
        drawn[out] = (tmp_path / out / "mandelbrot.pgm").read_bytes()
    assert drawn["here"] == drawn["there"]
    header, _, pixels = drawn["here"].partition(b"\n")
    assert (header, len(pixels)) == (b"P5 240 240 255", 240 * 240)
    assert pixels[120 * 240 + 192] == 0  # the origin belongs to the set
    assert pixels[0] > 250  # a corner does not


@pytest.mark.once
@pytest.mark.parametrize("options", [(), ("--dask",)])
def test_a_picture_that_was_cut_is_finished_elsewhere(tmp_path, options):
    two = ("--workers", "2", "--size", "480")
    killed = start("cluster.py", *options, *two, cwd=tmp_path)
    store = tmp_path / "cluster/cluster.db"
    query = "SELECT count(*) FROM eventor_task WHERE recovery = 0 AND status = 'success'"
    wait_until(lambda: store.exists() and sql(store, query) >= [(2,)], SECONDS)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(30)
    ((before,),) = sql(store, query)
    assert 2 <= before < 24
    ran = run("cluster.py", "--recover", *two, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(f"{24 - before} strips drawn by")
    assert f", {before} known before" in ran.stdout
