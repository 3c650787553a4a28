"""Draw the pictures of docs/howto/graph.rst and docs/howto/progress.rst anew.

python docs/pictures/draw.py
"""

import io
import os
import re
import runpy
import sys
import tempfile
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme

from eventor import Transition, TransitionKind
from eventor.look.bars import COLOURED, picture
from eventor.look.progress import Progress

PICTURES = Path(__file__).resolve().parent
SAMPLE = re.compile(r"^\.\. code:: python\n\n((?: {4}.*\n|\n)+)", re.MULTILINE)

THEME = TerminalTheme(
    (24, 26, 31),
    (222, 224, 230),
    [
        *((24, 26, 31), (240, 98, 98), (92, 190, 112), (226, 178, 72)),
        *((130, 150, 230), (200, 130, 220), (78, 186, 200), (222, 224, 230)),
    ],
    [(128, 133, 145)],
)

SCREEN = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">
<style>
.{unique_id}-matrix {{
  font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width;
}}
.{unique_id}-title {{ font-size: 18px; font-family: system-ui, sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})"
 clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""As Rich has it, without the fonts that it would load."""


def draw_graphs():
    """Run the samples of the page in which graphs are saved."""
    samples = SAMPLE.findall((PICTURES.parent / "howto/graph.rst").read_text())
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, "program.py")
        program.write_text("\n".join(map(textwrap.dedent, samples)))
        os.chdir(directory)
        runpy.run_path(str(program), run_name="__main__")
        for drawn in Path(directory).glob("*.svg"):
            write(drawn.name, drawn.read_text())


def draw_progress():
    """Draw a terminal in the midst of a run of a hundred sequences."""
    began = datetime(2026, 1, 1, tzinfo=UTC)
    steps = ("fetch", "align", "call variants", "report")
    progress = Progress()

    def tell(seconds, kind, step=None, sample=None, error=None, attempt=1):
        at = began + timedelta(seconds=seconds)
        name = None if sample is None else f"sample-{sample}"
        kind = TransitionKind(kind)
        more = {"name": step, "sequence": name, "error": error, "attempt": attempt}
        progress(Transition(kind, at, 3, 0, "pipeline", **more))

    tell(0, "run_started")
    for sample in range(1, 101):
        tell(0, "task_ready", steps[0], sample)
    for sample in range(1, 58):
        for step in steps:
            if step == "call variants" and sample in (17, 42):
                tell(sample, "task_failure", step, sample, "ValueError: no such column: 'qual'")
                break
            tell(sample, "task_success", step, sample)
    for sample in range(58, 62):
        began_at = 57 + (sample - 57) * 2.9
        done = 61 - sample
        for step in steps[:done]:
            tell(began_at, "task_active", step, sample)
            tell(began_at, "task_success", step, sample)
        attempt = 2 if sample == 59 else 1  # noqa: PLR2004 (one of them is tried again)
        tell(began_at, "task_active", steps[done], sample, attempt=attempt)
    console = Console(record=True, file=io.StringIO(), width=80, force_terminal=True)
    for line in picture(progress, began + timedelta(seconds=72.4), 79, 22, COLOURED):
        console.print(line, highlight=False)
    svg = console.export_svg(
        title="python pipeline.py", theme=THEME, code_format=SCREEN, unique_id="progress"
    )
    write("progress.svg", svg)


def write(name, text):
    """Write a picture beside this file."""
    (PICTURES / name).write_text("".join(f"{line.rstrip()}\n" for line in text.splitlines()))
    sys.stdout.write(f"{name}\n")


if __name__ == "__main__":
    draw_progress()
    draw_graphs()
