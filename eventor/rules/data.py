"""Placeholders: what stands in the arguments of a step for a value that is there once it starts."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, NoReturn

from eventor.errors import DefinitionError, ResultError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from eventor.types import Sequence


class PartOfPlaceholderError(DefinitionError, AttributeError):
    """An attribute is asked of a placeholder, as if the value were there for which it stands.

    An AttributeError too, so that whoever looks whether there is that attribute is told no.
    """


class Placeholder:
    """Stands for a value: as an argument, or inside lists, tuples and dicts in one."""

    __slots__ = ()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # it is Python, or a tool, that looks what this is
            raise AttributeError(name, name=name, obj=self)
        raise PartOfPlaceholderError(self._tell(f".{name}"))

    def __getitem__(self, key: object) -> NoReturn:
        raise DefinitionError(self._tell(f"[{key!r}]"))

    def __format__(self, spec: str) -> NoReturn:
        raise DefinitionError(self._tell("the text"))

    def _tell(self, part: str) -> str:
        return (
            f"{self!r} stands for the whole value, which is there only when a step runs that is "
            f"given it; take {part} of it in the function of that step"
        )

    def __hash__(self) -> NoReturn:
        raise DefinitionError(
            f"{self!r} cannot be in a set, nor a key of a dict; expected it as a value, "
            "or inside lists, tuples and dicts"
        )


class ResultOf(Placeholder):
    """Stands for the result of a step in the same sequence, as `Step.result` returns it.

    Attributes:
        step: the step's name.
        defined: the step itself; None where this was copied, for which the name is enough.
    """

    __slots__ = ("defined", "step")

    def __init__(self, step: str, defined: object = None) -> None:
        self.step = step
        self.defined = defined

    def __repr__(self) -> str:
        return f"<the result of step {self.step!r}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name alone: a step's function need not be picklable."""
        return ResultOf, (self.step,)


class OwnSequence(Placeholder):
    """Stands for the sequence in which the step runs: `eventor.sequence`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "eventor.sequence"

    def __reduce__(self) -> str:
        return "sequence"


sequence = OwnSequence()
"""As an argument of a step: the sequence in which it runs."""

_CONTAINERS = (list, tuple, dict)
_OF_INTEREST = {*_CONTAINERS, ResultOf, OwnSequence}


def placeholders(value: object) -> Iterator[Placeholder]:
    """Yield the placeholders in `value`, in the order in which they stand there."""
    seen = set()
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, Placeholder):
            yield one
        elif id(one) not in seen:
            seen.add(id(one))
            pending.extend(reversed(_items(one)))


def resolve(value: Any, stands_for: Callable[[Placeholder], Any]) -> Any:
    """Return `value` with what its placeholders stand for.

    Lists, tuples and dicts that hold one are made anew; all else is what it was.

    Raises:
        RecursionError: they contain themselves, or are nested too deeply.
    """
    made: dict[int, Any] = {}

    def resolved(one: Any) -> Any:
        if isinstance(one, Placeholder):
            return stands_for(one)
        items = _items(one)
        if not items:
            return one
        if id(one) not in made:
            found = list(map(resolved, items))
            if all(map(operator.is_, found, items)):
                made[id(one)] = one
            else:
                kind = type(one)
                made[id(one)] = kind(zip(one, found, strict=True) if kind is dict else found)
        return made[id(one)]

    return resolved(value)


def lacking(step: str, needed: str, sequence: Sequence, why: str) -> ResultError:
    """Return the error of a step that needs a result which there is not."""
    return ResultError(f"step {step!r} needs the result of {needed}[{sequence}], which {why}")


def _items(one: Any) -> list[Any] | tuple[Any, ...]:
    """Return the values of a list, tuple or dict among which a placeholder may be, else nothing."""
    if type(one) not in _CONTAINERS:
        return ()
    items: list[Any] | tuple[Any, ...] = list(one.values()) if type(one) is dict else one
    return () if _OF_INTEREST.isdisjoint(map(type, items)) else items
