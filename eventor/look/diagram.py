"""What a picture of a flow shows: nodes and edges, from the flow's definition as plain data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from eventor.errors import DefinitionError
from eventor.types import Counts, TaskCounts
from eventor.words import clean, exact_duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

STATES = {
    "failure": "✗",
    "cut": "↯",
    "active": "▶",
    "ready": "○",
    "success": "✓",
    "skipped": "↷",
    "raised": "●",
}
"""How things can stand with a step or an event, with their symbols: what matters most first."""


def called(word: str) -> str:
    """Return what a word of `STATES` is called."""
    return "cut short" if word == "cut" else word


GATES = ("and", "or")

_TRANSITIONS = {
    f"at_{word}": word for word in ("ready", "active", "success", "failure", "complete")
}


@dataclass(frozen=True, slots=True)
class Node:
    """An event, a step, or part of an expression.

    Attributes:
        key: unique in its diagram, and harmless in any notation: a letter and digits.
        kind: *event*, *step*, *and* or *or*.
        name: printable text; of a gate its kind.
        detail: what else is shown: of a step where its function stands, if that tells anything.
        more: what else is known of a step, a line each.
        counts: in how many sequences it stands how, by the words of `STATES`; none is missing.
    """

    key: str
    kind: str
    name: str
    detail: str = ""
    more: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """The word of `STATES` that matters most; empty where nothing has happened."""
        return next((word for word in STATES if word in self.counts), "")

    @property
    def told(self) -> str:
        """How it stands, in symbols and numbers; in words where there is one sequence."""
        if sum(self.counts.values()) == 1:
            return f"{STATES[self.state]} {called(self.state)}"
        return " ".join(
            f"{self.counts[word]} {STATES[word]}" for word in STATES if word in self.counts
        )


@dataclass(frozen=True, slots=True)
class Edge:
    """An arrow between two nodes, given by their keys.

    Attributes:
        tail: where it begins.
        head: where it ends.
        kind: *leads* (an association), the word of a transition, *operand*, *holds* (from a gate to
            what it leads to), or *needs* (a result).
        label: short text; may be empty.
    """

    tail: str
    head: str
    kind: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Diagram:
    """What there is to draw, in the order in which it was defined."""

    nodes: Mapping[str, Node]
    edges: tuple[Edge, ...]


def diagram(definition: Any, counts: Counts | None = None) -> Diagram:
    """Return what there is to draw of a flow.

    Args:
        definition: as `Flow.definition` gives it, or the store.
        counts: how things stand; what they tell of things that are not defined is left out.

    Raises:
        DefinitionError: the definition is none.
    """
    try:
        builder = _Builder(Counts({}, {}) if counts is None else counts)
        builder.add(definition)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise DefinitionError(
            f"the definition of the flow cannot be drawn: {error!r}; expected a mapping with "
            "'events', 'steps' and 'assocs', as the store keeps it"
        ) from error
    return Diagram(builder.nodes, tuple(builder.edges))


def without_links(whole: Diagram) -> Diagram:
    """Return a diagram without the events that only link a step or an expression to what follows.

    Such an event is raised by one transition of one step, or by an expression, and leads on.
    """
    entering: dict[str, list[Edge]] = {}
    leaving: dict[str, list[Edge]] = {}
    for edge in whole.edges:
        entering.setdefault(edge.head, []).append(edge)
        leaving.setdefault(edge.tail, []).append(edge)
    links = {
        key: entering[key][0]
        for key, node in whole.nodes.items()
        if node.kind == "event"
        and key in leaving
        and len(entering.get(key, ())) == 1
        and entering[key][0].kind in (*_TRANSITIONS.values(), "holds")
    }
    edges = []
    for edge in whole.edges:
        if edge.head in links:
            continue
        if (before := links.get(edge.tail)) is not None:
            label = f"{before.label} {edge.label}".strip()
            edges.append(Edge(before.tail, edge.head, before.kind, label))
        else:
            edges.append(edge)
    nodes = {key: node for key, node in whole.nodes.items() if key not in links}
    return Diagram(nodes, tuple(dict.fromkeys(edges)))


class _Builder:
    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._events: dict[str, Node] = {}
        self._steps: dict[str, Node] = {}
        self._gates: list[Node] = []
        self.edges: list[Edge] = []

    @property
    def nodes(self) -> dict[str, Node]:
        every = (*self._events.values(), *self._gates, *self._steps.values())
        return {node.key: node for node in every}

    def add(self, definition: Any) -> None:
        expressed = []
        for event in definition["events"]:
            self._event(event["name"])
            if event["expr"] is not None:
                expressed.append((event["name"], event["expr"]))
        needed = []
        for step in definition["steps"]:
            node = self._step(step["name"])
            self._steps[step["name"]] = dataclasses.replace(
                node, detail=_place(step["func"], step["name"]), more=tuple(_more(step))
            )
            for transition, raised in step["triggers"].items():
                word = _TRANSITIONS[transition]
                self.edges += (Edge(node.key, self._event(name), word, word) for name in raised)
            needed += [(name, node.key) for name in step.get("needs", ())]
        for name, expr in expressed:
            self._expression(self._event(name), expr)
        for assoc in definition["assocs"]:
            label = f"+{exact_duration(assoc['delay'])}" if "delay" in assoc else ""
            heads = [
                *(self._event(name) for name in assoc["events"]),
                *(self._step(name).key for name in assoc["steps"]),
            ]
            tail = self._event(assoc["event"])
            self.edges += (Edge(tail, head, "leads", label) for head in heads)
        self.edges += (Edge(self._step(name).key, head, "needs", "result") for name, head in needed)

    def _event(self, name: str) -> str:
        """Return the key of an event; also of one that another thread defines meanwhile."""
        node = self._events.get(name)
        if node is None:
            raised = self._counts.events.get(name, 0)
            counts = {"raised": raised} if raised else {}
            node = Node(f"e{len(self._events)}", "event", clean(name), counts=counts)
            self._events[name] = node
        return node.key

    def _step(self, name: str) -> Node:
        node = self._steps.get(name)
        if node is None:
            stand = self._counts.steps.get(name, TaskCounts())
            active = "active" if self._counts.live else "cut"
            numbers = {**dataclasses.asdict(stand), active: stand.active}
            if not self._counts.live:
                del numbers["active"]
            counts = {word: number for word in STATES if (number := numbers.get(word, 0))}
            node = Node(f"s{len(self._steps)}", "step", clean(name), counts=counts)
            self._steps[name] = node
        return node

    def _expression(self, event: str, expr: list[str | Mapping[str, int]]) -> None:
        """Draw what raises an event: gates, each after its operands."""
        drawn: dict[int, str] = {}
        root, gates = _simplified(expr)
        for number, (word, operands) in gates.items():
            gate = Node(f"g{len(self._gates)}", word, word)
            self._gates.append(gate)
            drawn[number] = gate.key
            self.edges += (
                Edge(
                    self._event(operand) if isinstance(operand, str) else drawn[operand],
                    gate.key,
                    "operand",
                )
                for operand in operands
            )
        if isinstance(root, str):
            self.edges.append(Edge(self._event(root), event, "operand"))
        else:
            self.edges.append(Edge(drawn[root], event, "holds"))


_Operand = str | int
"""The name of an event, or the number of a gate."""


def _simplified(
    expr: list[str | Mapping[str, int]],
) -> tuple[_Operand, dict[int, tuple[str, tuple[_Operand, ...]]]]:
    """Return the root of an expression, and its gates in an order from the leaves up.

    A gate within one of its own kind is part of that, and a gate over one thing is that thing.
    """
    words: dict[int, str] = {}
    operands: dict[int, dict[_Operand, None]] = {}
    stack: list[_Operand] = []
    for number, token in enumerate(expr):
        if isinstance(token, str):
            stack.append(token)
            continue
        ((word, count),) = token.items()
        if word not in GATES or not 0 < count <= len(stack):
            raise ValueError(token)
        parts = stack[-count:]
        del stack[-count:]
        same = [part for part in parts if isinstance(part, int) and words[part] == word]
        # The longest is grown, so that a long chain of one operator is not copied at each link.
        joined = operands[max(same, key=lambda part: len(operands[part]))] if same else {}
        for part in parts:
            if isinstance(part, int) and part in same:
                del words[part]
                joined.update(operands.pop(part))
            else:
                joined[part] = None
        if len(joined) == 1:
            stack.extend(joined)
            continue
        words[number], operands[number] = word, joined
        stack.append(number)
    (root,) = stack
    return root, {number: (words[number], tuple(operands[number])) for number in words}


def _place(func: str, step: str) -> str:
    """Return the name of a step's function as it is shown; nothing where it is the step's own."""
    shown = func.rpartition("<locals>.")[2].removeprefix("__main__.")
    return "" if shown.rpartition(".")[2] == step else clean(shown)


def _more(step: Mapping[str, Any]) -> Iterable[str]:
    yield clean(f"func: {step['func']}")
    for key, value in step["config"].items():
        yield clean(f"{key}: {value if isinstance(value, str) else json.dumps(value)}")


def counted(nodes: Iterable[Node]) -> dict[str, int]:
    """Return how many tasks of all steps stand how, by the words of `STATES`; none is missing."""
    of_steps = [node.counts for node in nodes if node.kind == "step"]
    totals = {word: sum(counts.get(word, 0) for counts in of_steps) for word in STATES}
    return {word: total for word, total in totals.items() if total}
