"""What has changed in a flow since its definition was recorded: a pure comparison of plain data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from eventor.errors import DefinitionError, StoreError
from eventor.rules.config import unknown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from eventor.rules.plan import Left, TaskKey, Trigger

_SHOWN = 80
_CONTEXT = 20
_NAMED = 5


def differences(before: object, now: object) -> list[str]:
    """Name what is new, changed and missing in a definition as `Flow.definition` gives it.

    Raises:
        StoreError: `before` is nothing that `Flow.definition` has given.
    """
    then, here = _recorded(before), _things(now)
    return [
        *(f"new {_words(thing)}" for thing in here if thing not in then),
        *(
            f"changed {_words(thing)} ({_changed(then[thing], details)})"
            for thing, details in here.items()
            if then.get(thing, details) != details
        ),
        *(f"missing {_words(thing)}" for thing in then if thing not in here),
    ]


def names(recorded: object, kind: str) -> list[str]:
    """Return the names that a recorded definition gives to its things of a kind, *event* or *step*.

    Raises:
        StoreError: `recorded` is nothing that `Flow.definition` has given.
    """
    return [thing[1] for thing in _recorded(recorded) if thing[0] == kind]


def known(recorded: object, kind: str, name: str, run_id: int) -> str:
    """Return the name of a thing, if a run is not known to have none such.

    Args:
        recorded: the definition that it has recorded; None for none.
        kind: of what kind the thing is, *event* or *step*.
        name: its name.
        run_id: the number of the run, for the message.

    Raises:
        DefinitionError: the definition has no such thing.
        StoreError: `recorded` is nothing that `Flow.definition` has given.
    """
    if recorded is not None and name not in (there := names(recorded, kind)):
        near = unknown(name, there) if there else "it has none at all"
        raise DefinitionError(f"run {run_id} has no {kind} {name!r}; {near}")
    return name


def lost_triggers(triggers: Iterable[Trigger], events: Mapping[str, Any]) -> list[str]:
    """Name the events that an earlier recovery was triggered with, and that are not in `events`."""
    sequences: dict[str, list[str]] = {}
    for trigger in triggers:
        if trigger.event not in events:
            sequences.setdefault(trigger.event, []).append(str(trigger.sequence))
    return [
        f"event {event} was triggered before in sequence {_some(found)}, and is no longer defined"
        for event, found in sequences.items()
    ]


def lost_tasks(left: Mapping[TaskKey, Left], steps: Mapping[str, Any]) -> list[str]:
    """Name the tasks that have not ended, and whose steps are not in `steps`."""
    waiting: dict[tuple[str, str], list[str]] = {}
    for task, how in left.items():
        if task.step not in steps and how.status in ("ready", "active"):
            waiting.setdefault((task.step, how.status), []).append(str(task))
    return [
        f"{_some(tasks)} was left {status}, and step {step} is no longer defined"
        for (step, status), tasks in waiting.items()
    ]


_Thing = tuple[str, ...]
"""The kind and name of an event or a step; for an association, what it leads to, too."""


def _words(thing: _Thing) -> str:
    kind, name, *target = thing
    return f"{kind} {name}" if not target else f"{kind} {name} -> {' '.join(target)}"


def _recorded(definition: object) -> dict[_Thing, dict[str, Any]]:
    try:
        return _things(definition)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(
            f"the definition that the run has recorded cannot be read: {error!r}"
        ) from error


def _things(definition: Any) -> dict[_Thing, dict[str, Any]]:
    """Return the details of each thing that is defined."""
    found: dict[_Thing, dict[str, Any]] = {}
    for kind in ("event", "step"):
        for thing in definition[f"{kind}s"]:
            details = dict(thing)
            found[kind, str(details.pop("name"))] = details
    for assoc in definition["assocs"]:
        after = (f"after {assoc['delay']} s",) if "delay" in assoc else ()
        for kind in ("event", "step"):
            for target in assoc[f"{kind}s"]:
                found["association", str(assoc["event"]), kind, str(target), *after] = {}
    return found


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = dict.fromkeys([*before, *now])
    return ", ".join(
        f"{key}: {_difference(_written(before.get(key)), _written(now.get(key)))}"
        for key in keys
        if before.get(key) != now.get(key)
    )


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _difference(one: str, other: str) -> str:
    """Show two texts, from shortly before they begin to differ if they are long."""
    start = 0
    if max(len(one), len(other)) > _SHOWN:
        pairs = enumerate(zip(one, other, strict=False))
        same = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
        start = max(0, same - _CONTEXT)
    return f"{_short(one, start)} -> {_short(other, start)}"


def _short(written: str, start: int) -> str:
    head, tail = "..." if start else "", "..." if len(written) > start + _SHOWN else ""
    return f"{head}{written[start : start + _SHOWN]}{tail}"


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
