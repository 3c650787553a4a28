"""Draw the pictures of docs/howto/graph.rst anew: run its samples here.

python docs/pictures/draw.py
"""

import os
import re
import runpy
import sys
import tempfile
import textwrap
from pathlib import Path

PICTURES = Path(__file__).resolve().parent
SAMPLE = re.compile(r"^\.\. code:: python\n\n((?: {4}.*\n|\n)+)", re.MULTILINE)

if __name__ == "__main__":
    samples = SAMPLE.findall((PICTURES.parent / "howto/graph.rst").read_text())
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory, "program.py")
        program.write_text("\n".join(map(textwrap.dedent, samples)))
        os.chdir(directory)
        runpy.run_path(str(program), run_name="__main__")
        for picture in Path(directory).glob("*.svg"):
            (PICTURES / picture.name).write_bytes(picture.read_bytes())
            sys.stdout.write(f"{picture.name}\n")
