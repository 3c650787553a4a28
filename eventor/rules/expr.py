"""Logical expressions over events: a small tree of `And`, `Or` and atoms.

A tree may be of any depth, so nothing here recurses.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar

from eventor.errors import DefinitionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")


class Expr:
    """Part of an expression; `&` and `|` join two of them, as in SQLAlchemy."""

    __slots__ = ()

    def __and__(self, other: ExprLike) -> Expr:
        return and_(self, other)

    def __rand__(self, other: ExprLike) -> Expr:
        return and_(other, self)

    def __or__(self, other: ExprLike) -> Expr:
        return or_(self, other)

    def __ror__(self, other: ExprLike) -> Expr:
        return or_(other, self)

    def __bool__(self) -> NoReturn:
        raise DefinitionError(
            "an event or expression is neither true nor false; "
            "join them by `&` and `|` or by and_() and or_(), not by `and`, `or` and `not`"
        )


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Atom(Expr):
    """An expression that holds when the event of that name is raised."""

    name: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Operator(Expr):
    """An expression over other expressions."""

    operands: tuple[Expr, ...]

    def __repr__(self) -> str:
        return f"<expression {text(self)}>"


class And(Operator):
    """Holds when all of its operands hold."""

    __slots__ = ()


class Or(Operator):
    """Holds when any of its operands holds."""

    __slots__ = ()


ExprLike = Expr | tuple["ExprLike", ...] | list["ExprLike"]
"""What a program may write for an expression (interface: `add_event`, *expr*)."""


def and_(*operands: ExprLike) -> Expr:
    """Return the expression that holds when all `operands` hold (interface: `add_event`).

    Raises:
        DefinitionError: no operands, or one that is not an expression.
    """
    return _build(And, operands)


def or_(*operands: ExprLike) -> Expr:
    """Return the expression that holds when any of `operands` holds (interface: `add_event`).

    Raises:
        DefinitionError: no operands, or one that is not an expression.
    """
    return _build(Or, operands)


def expression(value: ExprLike) -> Expr:
    """Return the tree for what a program wrote: an event, a tuple or list (*and*), or a tree.

    Raises:
        DefinitionError: `value` or something in it is not an expression.
    """
    return value if isinstance(value, Expr) else _build(And, (value,))


def atoms(expr: Expr) -> Iterator[Atom]:
    """Yield each atom of `expr` once, in no particular order."""
    seen: set[int] = set()
    agenda = [expr]
    while agenda:
        node = agenda.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Operator):
            agenda.extend(node.operands)
        elif isinstance(node, Atom):
            yield node


class Gate:
    """An expression laid out so that each event which is raised costs the same.

    A gate keeps nothing of what was raised: that is in the `progress` of one sequence, a dict which
    is empty at first. It counts down, for each operator, the operands that have yet to hold.
    """

    def __init__(self, expr: Expr) -> None:
        self._expr = expr
        self._missing: list[int] = []
        self._above: list[list[int]] = []
        self._atoms: dict[str, list[int]] = {}
        numbers: dict[int, int] = {}
        # The root is an operator, also above a single event.
        agenda = [expr if isinstance(expr, Operator) else And((expr,))]
        numbers[id(agenda[0])] = self._add(agenda[0])
        while agenda:
            operator = agenda.pop()
            number = numbers[id(operator)]
            for operand in operator.operands:
                if isinstance(operand, Atom):
                    self._atoms.setdefault(operand.name, []).append(number)
                elif isinstance(operand, Operator):
                    if id(operand) not in numbers:
                        numbers[id(operand)] = self._add(operand)
                        agenda.append(operand)
                    self._above[numbers[id(operand)]].append(number)

    @functools.cached_property
    def text(self) -> str:
        """The expression as a person writes it."""
        return text(self._expr)

    def begin(self, raised: Callable[[str], bool]) -> dict[str | int, int]:
        """Return the progress of a sequence of which `raised` tells what was raised by now."""
        progress: dict[str | int, int] = {}
        for name in self._atoms:
            if raised(name):
                self.take(progress, name)
        return progress

    def take(self, progress: dict[str | int, int], name: str) -> None:
        """Take into account that the event of that name was raised; again is a no-op."""
        if name in progress:
            return
        progress[name] = 0
        agenda = list(self._atoms[name])
        while agenda:
            number = agenda.pop()
            missing = progress[number] = progress.get(number, self._missing[number]) - 1
            if missing == 0:
                agenda.extend(self._above[number])

    def is_open(self, progress: dict[str | int, int]) -> bool:
        """Tell whether the expression holds."""
        return progress.get(0, 1) <= 0

    def _add(self, operator: Operator) -> int:
        self._missing.append(len(operator.operands) if isinstance(operator, And) else 1)
        self._above.append([])
        return len(self._above) - 1


def text(expr: Expr) -> str:
    """Return `expr` as a person writes it: `a and (b or c)`."""
    written = fold(
        expr,
        lambda atom: atom.name,
        lambda operator, parts: (
            f"({(' and ' if isinstance(operator, And) else ' or ').join(parts)})"
        ),
    )
    return written[1:-1] if isinstance(expr, Operator) else written


def postfix(expr: Expr) -> list[str | dict[str, int]]:
    """Return `expr` as flat data: names, each operator after its operands with their count.

    `a and (b or c)` is `["a", "b", "c", {"or": 2}, {"and": 2}]`.
    """
    written: list[str | dict[str, int]] = []
    agenda: list[Expr | dict[str, int]] = [expr]
    while agenda:
        node = agenda.pop()
        if isinstance(node, Operator):
            word = "and" if isinstance(node, And) else "or"
            agenda.append({word: len(node.operands)})
            agenda.extend(reversed(node.operands))
        elif isinstance(node, Atom):
            written.append(node.name)
        elif isinstance(node, dict):
            written.append(node)
    return written


def fold(expr: Expr, leaf: Callable[[Atom], T], join: Callable[[Operator, list[T]], T]) -> T:
    """Compute a value from the leaves up; a part that stands in several places once."""
    values: dict[int, T] = {}
    agenda = [expr]
    while agenda:
        node = agenda[-1]
        if isinstance(node, Operator):
            missing = [part for part in node.operands if id(part) not in values]
            if missing:
                agenda.extend(missing)
                continue
            values[id(node)] = join(node, [values[id(part)] for part in node.operands])
        elif isinstance(node, Atom):
            values[id(node)] = leaf(node)
        agenda.pop()
    return values[id(expr)]


@dataclass(frozen=True, slots=True)
class _End:
    """Where a tuple or list ends whose operands begin at `start` among the built ones."""

    kind: type[Operator]
    start: int
    container: int


def _build(kind: type[Operator], operands: tuple[ExprLike, ...]) -> Expr:
    """Return the tree of `kind` over what a program wrote; one operand stands for itself."""
    built: list[Expr] = []
    open_containers: set[int] = set()
    agenda: list[object] = [operands]
    while agenda:
        value = agenda.pop()
        if isinstance(value, Expr):
            built.append(value)
        elif isinstance(value, _End):
            open_containers.discard(value.container)
            parts = tuple(built[value.start :])
            built[value.start :] = [parts[0] if len(parts) == 1 else value.kind(parts)]
        elif isinstance(value, tuple | list):
            if not value:
                raise DefinitionError("an expression is empty; it needs at least one event")
            if id(value) in open_containers:
                raise DefinitionError("an expression contains itself")
            open_containers.add(id(value))
            agenda.append(_End(kind if value is operands else And, len(built), id(value)))
            agenda.extend(reversed(value))
        else:
            raise DefinitionError(
                f"{value!r} is no part of an expression; expected what add_event returns, "
                "a tuple or list of expressions (and), and_(...) or or_(...)"
            )
    return built[0]
