"""Why an event was raised or a step has run, or why not: pure, over what was recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from eventor.errors import StoreError
from eventor.types import (
    Cause,
    CauseKind,
    Lack,
    Occurrence,
    RaisedEvent,
    Sequence,
    StepTriggers,
    Task,
    ThingKind,
    Why,
    sequence_told,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime


_HANDLING = frozenset((StepTriggers.at_failure, StepTriggers.at_complete))


class Record(Protocol):
    """What a recovery has recorded."""

    def event(self, name: str, sequence: Sequence) -> RaisedEvent | None:
        """Return an event that was raised in a sequence."""

    def task(self, step: str, sequence: Sequence) -> Task | None:
        """Return the task of a step in a sequence."""

    def due(self, event: str, sequence: Sequence, seconds: float) -> datetime | None:
        """Return when a delayed association of an event acts in a sequence."""


class _Thing(NamedTuple):
    kind: ThingKind
    name: str
    sequence: Sequence


class _Source(NamedTuple):
    """Something that leads to another, how, and how many seconds later."""

    kind: ThingKind
    name: str
    leads_by: str
    seconds: float = 0.0


class Definition:
    """What leads to what, by a definition as `Flow.definition` gives it and the store keeps it.

    Args:
        recorded: that definition.

    Raises:
        StoreError: it is none.
    """

    def __init__(self, recorded: Any) -> None:
        self.names: dict[ThingKind, list[str]] = {}
        self.handling: set[str] = set()
        """The steps whose failures are handled by their own triggers."""
        self._sources: dict[tuple[ThingKind, str], dict[_Source, None]] = {}
        self._expressions: dict[str, str] = {}
        try:
            for kind in ThingKind:
                self.names[kind] = [str(thing["name"]) for thing in recorded[f"{kind}s"]]
            for step in recorded["steps"]:
                if not _HANDLING.isdisjoint(step["triggers"]):
                    self.handling.add(step["name"])
            for event in recorded["events"]:
                if event["expr"] is not None:
                    self._expressions[event["name"]] = _written(event["expr"])
            for kind, name, source in _arrows(recorded):
                self._sources.setdefault((kind, name), {})[source] = None
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"the definition of the run is not one that eventor has written: {error!r}"
            ) from error

    def sources(self, kind: ThingKind, name: str) -> list[_Source]:
        """Return what leads to an event or a step."""
        return list(self._sources.get((kind, name), ()))

    def expression(self, event: str) -> str | None:
        """Return the expression of an event, as a person writes it."""
        return self._expressions.get(event)


def _arrows(recorded: Any) -> Iterator[tuple[ThingKind, str, _Source]]:
    """Yield what leads to what."""
    for assoc in recorded["assocs"]:
        source = _Source(ThingKind.event, assoc["event"], "association", assoc.get("delay", 0.0))
        for kind in ThingKind:
            for name in assoc[f"{kind}s"]:
                yield kind, name, source
    for step in recorded["steps"]:
        for transition, events in step["triggers"].items():
            for name in events:
                yield ThingKind.event, name, _Source(ThingKind.step, step["name"], transition)
    for event in recorded["events"]:
        for part in event["expr"] or ():
            if isinstance(part, str):
                source = _Source(ThingKind.event, part, "expression")
                yield ThingKind.event, event["name"], source


def _written(postfix: list[Any]) -> str:
    """Return an expression as a person writes it, given as `expr.postfix` gives it."""
    parts: list[tuple[str, bool]] = []
    for part in postfix:
        if isinstance(part, str):
            parts.append((part, False))
            continue
        ((word, count),) = part.items()
        operands = parts[-count:]
        del parts[-count:]
        joined = (f"({text})" if is_joined else text for text, is_joined in operands)
        parts.append((f" {word} ".join(joined), True))
    ((text, _is_joined),) = parts
    return text


def why(
    kind: ThingKind, name: str, sequence: Sequence, definition: Definition, record: Record
) -> Why:
    """Return why something has happened, or why it has not.

    Args:
        kind: whether it is an event or a step.
        name: its name.
        sequence: the sequence.
        definition: what leads to what.
        record: what has happened.
    """
    thing = _Thing(kind, name, sequence)
    if _occurrence(thing, record) is not None:
        return Why(tuple(reversed(list(_back(thing, record)))), ())
    return Why((), tuple(_lacks(thing, definition, record)))


def _occurrence(thing: _Thing, record: Record) -> Occurrence | None:
    if thing.kind is ThingKind.event:
        event = record.event(thing.name, thing.sequence)
        return None if event is None else Occurrence(*thing, event.raised_at, event.cause)
    task = record.task(thing.name, thing.sequence)
    if task is None:
        return None
    return Occurrence(*thing, task.ready_at, task.cause, task.status, task.ended_at, task.error)


def _back(thing: _Thing | None, record: Record) -> Iterator[Occurrence]:
    """Yield what has led to a thing, from that back to where it began."""
    seen = set()
    while thing is not None and thing not in seen:
        seen.add(thing)
        found = _occurrence(thing, record)
        if found is None:
            return
        yield found
        thing = _before(found.cause, thing.sequence)


def _before(cause: Cause, sequence: Sequence) -> _Thing | None:
    if cause.source is None:
        return None
    if cause.kind in (CauseKind.association, CauseKind.expression):
        return _Thing(ThingKind.event, cause.source, sequence)
    if cause.kind is CauseKind.step and cause.detail is not None:
        sequence = sequence_told(cause.detail)
    return _Thing(ThingKind.step, cause.source, sequence)


def _lacks(thing: _Thing, definition: Definition, record: Record) -> Iterator[Lack]:
    """Yield what a thing waits for that has not happened, depth first."""
    told = set()
    agenda: list[tuple[int, _Thing, str | None, float]] = [(0, thing, None, 0.0)]
    while agenda:
        depth, one, leads_by, seconds = agenda.pop()
        found = _occurrence(one, record)
        happened_at = None if found is None else found.at
        due_at = status = error = None
        if one.kind is ThingKind.step and (task := record.task(one.name, one.sequence)) is not None:
            due_at, status, error = task.due_at, task.status, task.error
        elif seconds and happened_at is not None:
            due_at = record.due(one.name, one.sequence, seconds)
        expression = None
        if one.kind is ThingKind.event and happened_at is None:
            expression = definition.expression(one.name)
        sources = definition.sources(one.kind, one.name)
        yield Lack(
            depth,
            *one,
            leads_by=leads_by,
            seconds=seconds,
            happened_at=happened_at,
            status=status,
            due_at=due_at,
            error=error,
            expression=expression,
            sources=len(sources),
            told_before=happened_at is None and one in told,
        )
        if happened_at is not None or one in told:
            continue
        told.add(one)
        agenda += [
            (depth + 1, _Thing(source.kind, source.name, one.sequence), *source[2:])
            for source in reversed(sources)
            # Of an expression, what holds already is no lack.
            if source.leads_by != "expression" or record.event(source.name, one.sequence) is None
        ]
