"""A flow as a picture: SVG, PNG, a page of HTML, and the notations of Graphviz and of Mermaid."""

from __future__ import annotations

import functools
import html
import importlib.util
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eventor.errors import DrawError
from eventor.look import picture
from eventor.look.diagram import (
    GATES,
    STATES,
    Diagram,
    Node,
    called,
    counted,
    diagram,
    without_links,
)
from eventor.look.files import write_file
from eventor.words import clean, number_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from eventor.types import Counts

_DETAILS = ("all", "few")

_LARGEST_SCALE = 100

_MOST_PIXELS = 50_000_000
"""The largest PNG, which takes 200 MB and some seconds to be drawn."""


class Graph:
    """A flow as a picture, as `Eventor.graph` returns it. A notebook shows it.

    Events are pills, steps are boxes, and the parts of expressions circles. An arrow from a step
    tells the transition that raises the event, one from an event what it leads to, a dotted one
    the result that a step takes. How things stand is told by colours, and by signs and numbers.

    `svg`, `png` and `html` need `pip install 'eventor[draw]'`; `dot` and `mermaid` do not.

    Args:
        definition: the flow as the store keeps it, as plain data.
        counts: how things stand in a run; None draws the flow alone.
        events: *all* draws every event; *few* leaves out those that only link a step, or an
            expression, to what follows, which makes large flows easier to read.
        title: what is drawn, for the page and for those who do not see the picture.

    Raises:
        DefinitionError: the definition is none.
        DrawError: `events` is neither *all* nor *few*.
    """

    def __init__(
        self,
        definition: Mapping[str, Any],
        counts: Counts | None = None,
        *,
        events: str = "all",
        title: str = "flow",
    ) -> None:
        if events not in _DETAILS:
            raise DrawError(f"events is {events!r}; expected 'all' or 'few'")
        whole = diagram(definition, counts)
        self._diagram = whole if events == "all" else without_links(whole)
        self._title = clean(title)

    def __repr__(self) -> str:
        kinds = [node.kind for node in self._diagram.nodes.values()]
        steps, events = kinds.count("step"), kinds.count("event")
        stand = counted(self._diagram.nodes.values())
        told = ", ".join(f"{number:,} {called(word)}" for word, number in stand.items())
        return (
            f"<Graph of {self._title!r}: {number_of(steps, 'step')}, {number_of(events, 'event')}"
            f"{f'; tasks: {told}' if told else ''}>"
        )

    @property
    def dot(self) -> str:
        """The graph in the language of Graphviz."""
        return _dot(self._diagram, self._title)

    @property
    def mermaid(self) -> str:
        """The graph in the language of Mermaid, which pages of Markdown show as a picture."""
        return _mermaid(self._diagram)

    @property
    def svg(self) -> str:
        """The picture as SVG, for light and dark pages.

        Raises:
            DrawError: what draws it is not installed, or the layout has failed.
        """
        return self._picture.svg

    def png(self, scale: float = 2.0) -> bytes:
        """Return the picture as PNG, on a light ground.

        Args:
            scale: pixels of the PNG for one of the SVG, at most 100. One that makes a PNG of more
                than 50 million pixels is lessened, with a warning.

        Raises:
            DrawError: what draws it is not installed, `scale` is no number above 0, or this
                machine has no fonts.
        """
        number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not number or not 0 < scale <= _LARGEST_SCALE:
            raise DrawError(
                f"scale is {scale!r}; expected a number above 0, at most {_LARGEST_SCALE}"
            )
        drawn = self._picture
        pixels = drawn.width * drawn.height * scale**2
        if pixels > _MOST_PIXELS:
            fitting = scale * (_MOST_PIXELS / pixels) ** 0.5
            warnings.warn(
                f"a PNG of {drawn.width * scale:.0f} x {drawn.height * scale:.0f} pixels is too "
                f"large: it is drawn with scale={fitting:.3g} in place of {scale:g}; an SVG has "
                "no such limit",
                stacklevel=2,
            )
            scale = fitting
        return _rasterized(drawn.svg, scale)

    @property
    def html(self) -> str:
        """A page of its own with the picture, for light and dark; it loads nothing.

        Raises:
            DrawError: as `svg`.
        """
        return _page(self._diagram, self._title, self.svg)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph to a file, whole or not at all; the ending tells the format.

        Args:
            path: a file that ends in .svg, .png, .html, .mmd (Mermaid) or .dot.

        Raises:
            DrawError: the ending is another, the file cannot be written, or as `svg` and `png`.
        """
        target = Path(path)
        write = _FORMATS.get(target.suffix.lower())
        if write is None:
            raise DrawError(
                f"a graph cannot be saved as {str(target)!r}; expected a name that ends in "
                f"{', '.join(_FORMATS)}"
            )
        content = write(self)
        try:
            write_file(target, content)
        except (OSError, ValueError) as error:
            told = getattr(error, "strerror", None) or error
            raise DrawError(f"a graph cannot be saved as {str(target)!r}: {told}") from error

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """Return what a notebook shows: the picture if it can be drawn, and text."""
        del include, exclude  # a notebook leaves out by itself what it does not want
        try:
            return {"image/svg+xml": self.svg, "text/plain": repr(self)}
        except DrawError as error:
            return {"text/plain": f"{self!r}\n{error}"}

    @functools.cached_property
    def _picture(self) -> picture.Picture:
        return picture.draw(self._diagram, self._title)


_FORMATS: Mapping[str, Callable[[Graph], bytes]] = {
    ".svg": lambda graph: graph.svg.encode(),
    ".png": lambda graph: graph.png(),
    ".html": lambda graph: graph.html.encode(),
    ".mmd": lambda graph: graph.mermaid.encode(),
    ".dot": lambda graph: graph.dot.encode(),
}


def _lines(node: Node) -> list[str]:
    """Return the text of a node in a notation that lays it out itself."""
    if node.kind == "event":
        times = node.counts.get("raised", 0)
        name = f"{STATES['raised']} {node.name}" if times else node.name
        return [f"{name} {picture.TIMES}{times}" if times > 1 else name]
    return [line for line in (node.name, node.detail, node.told if node.counts else "") if line]


_LINKS = {"failure": "dashed", "needs": "dotted"}


def _dot(graph: Diagram, title: str) -> str:
    colours = picture.LIGHT
    lines = [
        f"digraph {_dot_text([title])} {{",
        'graph [bgcolor="white"]',
        'node [fontname="Helvetica" fontsize=12 style="filled"]',
        'edge [fontname="Helvetica" fontsize=10 arrowsize=0.8]',
    ]
    shapes = {"event": "oval", "step": "box", "and": "circle", "or": "circle"}
    for key, node in graph.nodes.items():
        of = colours[node.state or ("gate" if node.kind in GATES else node.kind)]
        lines.append(
            f"{key} [label={_dot_text(_lines(node))} shape={shapes[node.kind]} "
            f'fillcolor="{of.ground}" color="{of.border}" fontcolor="{of.ink}"]'
        )
    for edge in graph.edges:
        of = colours[edge.kind if edge.kind in colours else "page"]
        style = _LINKS.get(edge.kind, "solid")
        label = f"label={_dot_text([edge.label])} " if edge.label else ""
        lines.append(
            f"{edge.tail} -> {edge.head} "
            f'[{label}style={style} color="{of.border}" fontcolor="{of.ink}"]'
        )
    return "\n".join((*lines, "}")) + "\n"


def _dot_text(lines: list[str]) -> str:
    r"""Return a label, in which Graphviz would read `\N`, `\n` and `&lt;` in its own way."""
    escaped = (
        line.replace("&", "&amp;").replace("\\", r"\\").replace('"', "&quot;") for line in lines
    )
    return '"' + r"\n".join(escaped) + '"'


def _mermaid(graph: Diagram) -> str:
    shapes = {"event": "([{}])", "step": "[{}]", "and": "(({}))", "or": "(({}))"}
    lines = ["flowchart TD"]
    for key, node in graph.nodes.items():
        text = "<br>".join(map(_mermaid_text, _lines(node)))
        shape = shapes[node.kind].format(f'"{text}"')
        lines.append(f"    {key}{shape}:::{node.state or node.kind}")
    for edge in graph.edges:
        arrow = "-.->" if edge.kind in _LINKS else "-->"
        label = f'|"{_mermaid_text(edge.label)}"|' if edge.label else ""
        lines.append(f"    {edge.tail} {arrow}{label} {edge.head}")
    failing = [str(at) for at, edge in enumerate(graph.edges) if edge.kind == "failure"]
    if failing:
        lines.append(f"    linkStyle {','.join(failing)} stroke:{picture.LIGHT['failure'].border}")
    for word, of in picture.LIGHT.items():
        for kind in GATES if word == "gate" else (word,):
            style = f"fill:{of.ground},stroke:{of.border},color:{of.ink}"
            lines.append(f"    classDef {kind} {style}")
    return "\n".join(lines) + "\n"


def _mermaid_text(text: str) -> str:
    """Return a text with all that Mermaid may take for its own, or for HTML, as its entities."""
    return "".join(
        char if char.isalnum() or char in " _." or ord(char) > 0x7F else f"#{ord(char)};"  # noqa: PLR2004
        for char in text
    )


def _rasterized(svg: str, scale: float) -> bytes:
    if importlib.util.find_spec("resvg_py") is None:
        raise DrawError(f"a PNG is drawn by resvg_py, {picture.MISSING}")
    from resvg_py import svg_to_bytes  # noqa: PLC0415 (an optional library, and a slow one)

    nothing = svg_to_bytes(svg_string=_LETTER.format(""))
    for family in _SANS_SERIF:
        if svg_to_bytes(svg_string=_LETTER.format("A"), sans_serif_family=family) != nothing:
            break
    else:
        raise DrawError(
            "a PNG cannot be drawn: this machine has no fonts that are known for such text, and it "
            "would be missing; install one, for example the package fonts-dejavu-core, or draw an "
            "SVG"
        )
    try:
        return bytes(svg_to_bytes(svg_string=svg, zoom=scale, sans_serif_family=family))
    except ValueError as error:
        raise DrawError(f"a PNG with scale={scale:g} cannot be drawn: {error}") from error


_SANS_SERIF = (
    *("Arial", "Liberation Sans", "DejaVu Sans", "Noto Sans", "Helvetica", "Helvetica Neue"),
    *("Roboto", "Open Sans", "Ubuntu", "Cantarell", "Verdana", "FreeSans"),
)
"""Families of which machines have one: the renderer knows Arial alone by itself."""

_LETTER = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">'
    '<text y="18" font-family="sans-serif">{}</text></svg>'
)


def _page(graph: Diagram, title: str, svg: str) -> str:
    shown = html.escape(title)
    kinds = [node.kind for node in graph.nodes.values()]
    facts = [f"<li>{number_of(kinds.count(kind), kind)}</li>" for kind in ("step", "event")]
    stand = counted(graph.nodes.values())
    facts += (
        f'<li class="{word}">{STATES[word]} {number:,} {called(word)}</li>'
        for word, number in stand.items()
    )
    return _PAGE.format(title=shown, facts="\n".join(facts), style=_page_style(), svg=svg)


def _page_style() -> str:
    light, dark = (
        "\n".join(
            f"li.{word} {{ background: {of[word].ground}; border-color: {of[word].border}; "
            f"color: {of[word].ink}; }}"
            for word in STATES
        )
        + f"\nbody {{ background: {of['event'].ground}; color: {of['step'].ink}; }}"
        + f"\nli {{ border-color: {of['event'].border}; }}"
        for of in (picture.LIGHT, picture.DARK)
    )
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}"


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ margin: 0; padding: 1.5rem; font-family: system-ui, sans-serif; }}
h1 {{ margin: 0 0 0.75rem; font-size: 1.4rem; overflow-wrap: anywhere; }}
ul {{ display: flex; flex-wrap: wrap; gap: 0.5rem; margin: 0 0 1rem; padding: 0; }}
li {{ list-style: none; border: 1px solid; border-radius: 1rem; padding: 0.15rem 0.7rem; }}
li, label {{ font-size: 0.9rem; }}
#fit:checked ~ main svg {{ max-width: 100%; height: auto; }}
main {{ margin-top: 1rem; overflow: auto; }}
main svg {{ display: block; margin: auto; }}
{style}
</style>
</head>
<body>
<h1>{title}</h1>
<ul>
{facts}
</ul>
<input type="checkbox" id="fit"> <label for="fit">fit to the width</label>
<main>
{svg}</main>
</body>
</html>
"""
