"""What people name on a command line, as `step[sequence]`: which step or event, which sequence.

Names and sequences may hold brackets themselves; what the flow and the store know decides.
"""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from eventor.errors import DefinitionError, TriggerError
from eventor.rules.flow import read_sequence
from eventor.types import ThingKind

if TYPE_CHECKING:
    from collections.abc import Collection

    from eventor.storage.history import History, Place
    from eventor.types import Sequence

_INT = re.compile(r"-?[0-9]+")
_LISTED = 5
"""How many sequences a message lists."""


class Named(NamedTuple):
    """A step or an event in a sequence."""

    kind: ThingKind
    name: str
    sequence: Sequence


def split(what: str, known: Collection[str]) -> tuple[str, str | None]:
    """Return the name and the sequence, if there is one, that `what` tells.

    Of several ways to read it, that with a known name counts, and the longest name among those; a
    name alone counts last, as it can be written with its sequence, too.
    """
    ways = [
        (what[:at], what[at + 1 : -1])
        for at in range(len(what) - 2, 0, -1)
        if what[at] == "[" and what.endswith("]")
    ]
    for name, sequence in ways:
        if name in known:
            return name, sequence
    if what in known or not ways:
        return what, None
    return ways[-1]


def sequences_of(written: str) -> list[Sequence]:
    """Return the sequences that a text may mean, what it means first of all before the others."""
    if len(written) > 1 and written[0] == written[-1] and written[0] in "'\"":
        return [written[1:-1], written]
    with suppress(ValueError, TriggerError):
        return [read_sequence(int(written)), written] if _INT.fullmatch(written) else [written]
    return [written]


def named_event(history: History, place: Place, what: str) -> Named:
    """Return the event and the sequence to trigger.

    Raises:
        DefinitionError: no sequence is named.
    """
    name, written = split(what, history.names(place)[ThingKind.event])
    if written is None:
        raise DefinitionError(f"{what!r} names no sequence; expected one, as in '{what}[1]'")
    return Named(ThingKind.event, name, sequences_of(written)[0])


def named_thing(history: History, place: Place, what: str, kind: ThingKind | None) -> Named:
    """Return the step or event that is asked about, and its sequence.

    Args:
        history: of the store.
        place: the run and its recovery.
        what: what is named.
        kind: whether it is an event or a step; None for a step of that name, else an event.

    Raises:
        DefinitionError: the flow has no such thing; or the sequence is left out, and there is not
            just one.
    """
    names = history.names(place)
    kinds = [ThingKind.step, ThingKind.event] if kind is None else [kind]
    name, written = split(what, {name for one in kinds for name in names[one]})
    kind = next((one for one in kinds if name in names[one]), kinds[0])
    if written is None:
        return Named(kind, name, _only_sequence(history, place, kind, name))
    meant = sequences_of(written)
    if len(meant) == 1:
        return Named(kind, name, meant[0])
    for sequence in meant:
        if _happened(history, place, kind, name, sequence):
            return Named(kind, name, sequence)
    for sequence in meant:
        if history.events(*place, sequence=sequence):
            return Named(kind, name, sequence)
    return Named(kind, name, meant[0])


def _happened(
    history: History, place: Place, kind: ThingKind, name: str, sequence: Sequence
) -> bool:
    if kind is ThingKind.event:
        return bool(history.events(*place, name, sequence))
    return bool(history.tasks(*place, name, sequence))


def _only_sequence(history: History, place: Place, kind: ThingKind, name: str) -> Sequence:
    """Return the only sequence of a thing, or, if it has not happened, of its recovery."""
    if name not in history.names(place)[kind]:
        history.why(place, name, 1, kind)  # which says what is known
    of_steps = kind is ThingKind.step
    told = history.tasks(*place, name) if of_steps else history.events(*place, name)
    found = list(dict.fromkeys(one.sequence for one in told))
    if not found:
        found = list(dict.fromkeys(one.sequence for one in history.events(*place)))
    if len(found) == 1:
        return found[0]
    if not found:
        raise DefinitionError(
            f"{kind} {name} has happened in no sequence; name one, as in '{name}[1]'"
        )
    some = ", ".join(repr(sequence) for sequence in islice(found, _LISTED))
    more = ", ..." if len(found) > _LISTED else ""
    raise DefinitionError(
        f"there are {len(found)} sequences for {kind} {name}: {some}{more}; "
        f"name one, as in '{name}[{found[-1]}]'"
    )
