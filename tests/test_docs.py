"""Every code sample of the README and of the documentation runs."""

import re
import textwrap
from pathlib import Path

import pytest

import eventor

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.rst", *sorted((ROOT / "docs").rglob("*.rst"))]
BLOCK = re.compile(r"^\.\. code:: (\w+)\n(?:   +:.*\n)*\n((?:(?: {3,}.*)?\n)+)", re.MULTILINE)


def blocks(page, language):
    found = BLOCK.findall(page.read_text() + "\n")
    return [textwrap.dedent(code) for kind, code in found if kind == language]


def untimed(log):
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "TIME", log)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python")],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_samples_of_a_page_run_in_their_order(page, script):
    ran = script("\n".join(blocks(page, "python")))
    assert ran.returncode == 0, ran.stderr


def test_the_output_in_the_readme_is_what_its_example_prints(script):
    readme = ROOT / "README.rst"
    ran = script(blocks(readme, "python")[0])
    assert untimed(ran.stderr) == untimed(blocks(readme, "text")[0].rstrip("\n") + "\n")


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
