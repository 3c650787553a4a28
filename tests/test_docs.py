"""Every code sample of the README and of the documentation runs."""

import os
import re
import shlex
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import pytest

import eventor

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.rst", *sorted((ROOT / "docs").rglob("*.rst"))]
POSTGRESQL = ROOT / "docs/howto/postgresql.rst"
BLOCK = re.compile(r"^\.\. code:: (\w+)\n(?:   +:.*\n)*\n((?:(?: {3,}.*)?\n)+)", re.MULTILINE)


def blocks(page, language):
    found = BLOCK.findall(page.read_text() + "\n")
    return [textwrap.dedent(code) for kind, code in found if kind == language]


def untimed(log):
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "TIME", log)


@pytest.mark.once
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page != POSTGRESQL],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_samples_of_a_page_run_in_their_order(page, script):
    ran = script("\n".join(blocks(page, "python")))
    assert ran.returncode == 0, ran.stderr


@pytest.mark.stores("postgresql")
def test_the_samples_on_postgresql_run_in_their_order_on_a_server_of_the_tests(script, place):
    code = "\n".join(blocks(POSTGRESQL, "python"))
    told = "postgresql+psycopg://flows:secret@db.example.org/flows"
    assert code.count(told) == 2
    code = code.replace(f"{told}?schema=nightly", place.store).replace(told, place.server)
    ran = script(code.replace('"schema": "nightly"', f'"schema": "{place.name}"'))
    assert ran.returncode == 0, ran.stderr
    assert place.sql("SELECT step FROM eventor_v_task") == [("load",)]


def test_the_output_in_the_readme_is_what_its_example_prints(script):
    readme = ROOT / "README.rst"
    ran = script(blocks(readme, "python")[0])
    assert untimed(ran.stderr) == untimed(blocks(readme, "text")[0].rstrip("\n") + "\n")


def stable(output):
    """Return what a command prints without times, durations, sizes and the widths of columns."""
    output = re.sub(r"\d\d:\d\d:\d\d(\.\d+)?", "TIME", output)
    output = re.sub(r"\b\d+(\.\d+)? (ms|s|min( \d+ s)?|bytes|KB|MB)\b", "NUMBER", output)
    output = output.replace("; NUMBER given back", "")
    return [re.sub(r"(?<=\S) {2,}", "  ", line) for line in output.splitlines()]


@pytest.mark.timeout(600)
def test_the_commands_of_the_page_on_the_command_print_what_it_shows(tmp_path):
    page = ROOT / "docs/howto/command.rst"
    (tmp_path / "nightly_load.py").write_text("\n".join(blocks(page, "python")))
    # Where it is about noon: at midnight, the times of what has just been are told with their day.
    noon = f"NOON{datetime.now(UTC).hour - 12:+}"
    environment = {**os.environ, "COLUMNS": "80", "TZ": noon}
    ran = [sys.executable, "-W", "error", "nightly_load.py"]
    subprocess.run(ran, cwd=tmp_path, env=environment, check=True, capture_output=True)
    for shown in blocks(page, "console"):
        for told in re.split(r"^\$ ", shown, flags=re.MULTILINE)[1:]:
            command, _, output = told.partition("\n")
            ran = subprocess.run(
                [sys.executable, "-m", *shlex.split(command)],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            assert stable(ran.stdout) == stable(output.rstrip()), command


def test_the_readme_and_the_examples_have_the_same_simple_example():
    (sample,) = blocks(ROOT / "README.rst", "python")
    assert sample.strip() == (ROOT / "examples/simple_example.py").read_text().strip()


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs/reference.rst").read_text()
    assert [name for name in eventor.__all__ if not re.search(rf"\b{name}\b", reference)] == []


def test_every_page_is_found_from_the_index():
    names = "".join(page.read_text() for page in PAGES if page.name in ("index.rst", "README.rst"))
    pages = [str(page.relative_to(ROOT / "docs"))[:-4] for page in PAGES[1:]]
    assert [page for page in pages if page != "index" and page not in names] == []
