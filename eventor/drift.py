"""What has changed in a flow since its definition was recorded: a pure comparison of plain data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from eventor.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from eventor.plan import Left, TaskKey, Trigger

_SHOWN = 80
_NAMED = 5


def differences(before: object, now: object) -> list[str]:
    """Name what is new, changed and missing in a definition as `Flow.definition` gives it.

    Raises:
        StoreError: `before` is nothing that `Flow.definition` has given.
    """
    try:
        then = _things(before)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StoreError(
            f"the definition that the run has recorded cannot be read: {error!r}"
        ) from error
    here = _things(now)
    return [
        *(f"new {kind} {name}" for kind, name in here if (kind, name) not in then),
        *(
            f"changed {kind} {name} ({_changed(then[kind, name], details)})"
            for (kind, name), details in here.items()
            if then.get((kind, name), details) != details
        ),
        *(f"missing {kind} {name}" for kind, name in then if (kind, name) not in here),
    ]


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


def _things(definition: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the details of each thing that is defined, by its kind and name."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for kind in ("event", "step"):
        for thing in definition[f"{kind}s"]:
            details = dict(thing)
            found[kind, str(details.pop("name"))] = details
    for assoc in definition["assocs"]:
        for kind in ("event", "step"):
            for target in assoc[f"{kind}s"]:
                found["association", f"{assoc['event']} -> {kind} {target}"] = {}
    return found


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = dict.fromkeys([*before, *now])
    return ", ".join(
        f"{key}: {_short(before.get(key))} -> {_short(now.get(key))}"
        for key in keys
        if before.get(key) != now.get(key)
    )


def _short(value: object) -> str:
    written = value if isinstance(value, str) else json.dumps(value)
    return written if len(written) <= _SHOWN else f"{written[:_SHOWN]}..."


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
