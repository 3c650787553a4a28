"""Progress in a notebook: a display below its cell, which is updated in place.

IPython is asked for nothing but to display: it is there, since the notebook's kernel is.
"""

from __future__ import annotations

import importlib
import io
import sys
from typing import TYPE_CHECKING, Any

from eventor.look.bars import COLOURED, picture

if TYPE_CHECKING:
    from datetime import datetime

    from rich.text import Text

    from eventor.look.progress import Progress

_COLUMNS, _LINES = 80, 24

_PAGE = (
    '<pre style="margin: 0; line-height: 1.3; white-space: pre; overflow-x: auto; '
    "font-family: Menlo, Consolas, 'DejaVu Sans Mono', monospace\">{code}</pre>"
)

_GREY, _RED, _GREEN, _YELLOW, _CYAN = (
    *((128, 128, 128), (214, 64, 64), (36, 150, 72)),
    *((178, 126, 0), (22, 140, 160)),
)
"""Colours that can be read on a light page, and on a dark one."""


class Cell:
    """The place in a notebook where a picture is."""

    def __init__(self) -> None:
        self._display: Any = importlib.import_module("IPython.display").display
        self._handle: Any = None

    def draw(self, progress: Progress, now: datetime) -> None:
        """Show a picture in place of the last one.

        Raises:
            OSError: it cannot be shown.
        """
        lines = picture(progress, now, _COLUMNS, _LINES, COLOURED)
        plain = "\n".join(line.plain for line in lines)
        self._show(_Shown({"text/plain": plain, "text/html": _html(lines)}))

    def draw_again(self) -> None:
        """Do nothing: it is still there."""

    def erase(self) -> None:
        """Do nothing: what is written is shown elsewhere."""

    def close(self, summary: str) -> None:
        """Leave a line in place of the picture; nothing if it is empty.

        Raises:
            OSError: it cannot be shown.
        """
        if summary:
            self._show(_Shown({"text/plain": summary}))

    def _show(self, shown: _Shown) -> None:
        try:
            if self._handle is None:
                self._handle = self._display(shown, display_id=True)
            else:
                self._handle.update(shown)
        except Exception as error:
            raise OSError(f"the notebook cannot show it: {error}") from error


class _Shown:
    """What IPython is given to display: the same in several forms."""

    def __init__(self, forms: dict[str, str]) -> None:
        self._forms = forms

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        del include, exclude  # a notebook leaves out by itself what it does not want
        return self._forms


def in_notebook() -> bool:
    """Tell whether this program is the kernel of a notebook."""
    shell_of = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return shell_of is not None and getattr(shell_of(), "kernel", None) is not None


def _html(lines: list[Text]) -> str:
    """Return lines as HTML that needs no style of the page, and is escaped."""
    from rich.console import Console  # noqa: PLC0415 (it is optional, and slow to import)
    from rich.terminal_theme import TerminalTheme  # noqa: PLC0415

    black, white = (0, 0, 0), (255, 255, 255)
    normal = [black, _RED, _GREEN, _YELLOW, _GREY, _GREY, _CYAN, _GREY]
    theme = TerminalTheme(white, black, normal, [_GREY, *normal[1:]])
    console = Console(
        record=True,
        file=io.StringIO(),
        width=_COLUMNS,
        force_terminal=True,
        force_jupyter=False,
        color_system="standard",
        highlight=False,
    )
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop")
    return console.export_html(theme=theme, code_format=_PAGE, inline_styles=True)
