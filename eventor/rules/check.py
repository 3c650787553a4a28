"""What can be seen to be wrong with a flow before it runs: pure, and nearly linear in its size.

It is taken that whoever triggers an event from outside triggers one that nothing in the flow
raises, or one that was triggered before. All else is in favour of the flow: a step may end in each
way, and what was found wrong once counts as right for all that follows from it.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, cast

from eventor.rules.expr import And, atoms, fold
from eventor.rules.flow import Event, Step
from eventor.types import Finding, FindingKind, StepTriggers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from collections.abc import Set as AbstractSet

    from eventor.rules.expr import Atom, Expr, Operator
    from eventor.rules.flow import Flow

Thing = Event | Step

_BOTH_ENDS = {StepTriggers.at_success, StepTriggers.at_failure}

_WITH_RESULT = (StepTriggers.at_success, StepTriggers.at_complete)

_NAMED = 5
"""How many names a message has at most."""

_BATCH = 4096
"""How many steps are followed at once, each with a bit of a number of its own."""


def findings(flow: Flow, triggered: AbstractSet[str]) -> list[Finding]:
    """Return what is wrong with a flow, kind by kind and in the order of its definitions.

    Args:
        flow: the definitions.
        triggered: the names of the events that were triggered so far.
    """
    led: set[Thing] = set().union(*map(flow.targets_of, flow.events))
    raised = led.union(*(events for s in flow.steps.values() for events in s.triggers.values()))
    unled = [step for step in flow.steps.values() if step not in led]
    unraised = [e for e in flow.events.values() if e.expr is None and e not in raised]
    reach = _Reach(flow)
    reach.spread(event.name for event in unraised)
    reach.spread(flow.events.keys() & triggered)
    for step in unled:
        reach.run(step)
    stuck = list(_stuck(flow, reach))
    known = {*triggered, *(finding.name for finding in stuck)}
    joined = [
        event
        for event in flow.events.values()
        if event.expr is not None and event not in raised and event.name not in known
    ]
    graph = _Graph(flow)
    return [
        *(_unreachable(step) for step in unled),
        *(
            _untriggered(event)
            for event in unraised
            if event.name not in triggered
            and (flow.targets_of(event.name) or event.name in flow.expressed)
        ),
        *_circles(flow, reach),
        *stuck,
        *_contradictions(flow, graph, triggered, joined),
        *_early(flow, graph),
    ]


def _unreachable(step: Step) -> Finding:
    message = f"No event leads to step {step.name!r}, so it never runs"
    return Finding(FindingKind.unreachable_step, step.name, message)


def _untriggered(event: Event) -> Finding:
    message = (
        f"Nothing has raised event {event.name!r}, and nothing in the flow does; "
        "a step or another program may still trigger it"
    )
    return Finding(FindingKind.unraised_event, event.name, message)


class _Reach:
    """What can be raised and run at all, if each step may end in each way.

    Attributes:
        events: the names of the events.
        steps: the names of the steps.
    """

    def __init__(self, flow: Flow) -> None:
        self.events: set[str] = set()
        self.steps: set[str] = set()
        self._flow = flow
        self._progress: dict[str, dict[str | int, int]] = {}

    def run(self, step: Step) -> None:
        """Let a step run, and all that follows."""
        self.steps.add(step.name)
        self.spread(_names(step))

    def spread(self, names: Iterable[str]) -> None:
        """Let events be raised, and all that follows."""
        flow = self._flow
        agenda = list(names)
        while agenda:
            name = agenda.pop()
            if name in self.events:
                continue
            self.events.add(name)
            for target in flow.targets_of(name):
                if isinstance(target, Event):
                    agenda.append(target.name)
                elif target.name not in self.steps:
                    self.steps.add(target.name)
                    agenda.extend(_names(target))
            for event in flow.expressed.get(name, ()):
                if event.name not in self.events:
                    gate, progress = flow.gates[event.name], self._progress
                    gate.take(progress.setdefault(event.name, {}), name)
                    if gate.is_open(progress[event.name]):
                        agenda.append(event.name)


def _names(step: Step) -> Iterator[str]:
    return (event.name for events in step.triggers.values() for event in events)


def _stuck(flow: Flow, reach: _Reach) -> Iterator[Finding]:
    """Find expressions that wait for what cannot come, and let them hold for what follows."""
    for event in flow.events.values():
        if event.expr is None or event.name in reach.events:
            continue
        missing = (atom.name for atom in atoms(event.expr) if atom.name not in reach.events)
        message = (
            f"The expression of event {event.name!r} can never hold: "
            f"{_some(sorted(missing))} cannot be raised before it"
        )
        yield Finding(FindingKind.impossible_expression, event.name, message)
        reach.spread([event.name])


def _circles(flow: Flow, reach: _Reach) -> Iterator[Finding]:
    """Find events that only follow from themselves: what is out of reach is all behind such."""
    rest = [event for event in flow.events.values() if event.name not in reach.events]
    before = _reasons(flow, reach) if rest else {}
    for event in rest:
        if event.name in reach.events:
            continue
        path: set[Thing] = set()
        thing: Thing = event
        while thing not in path:
            path.add(thing)
            thing = before[thing]
        if isinstance(thing, Step):
            thing = before[thing]
        names = [thing.name]
        other = before[thing]
        while other is not thing:
            names.append(other.name)
            other = before[other]
        way = _some([thing.name, *reversed(names[1:])])
        message = f"Nothing raises event {thing.name!r} but what follows from it: {way}"
        yield Finding(FindingKind.unraised_event, thing.name, message)
        reach.spread([thing.name])


def _reasons(flow: Flow, reach: _Reach) -> dict[Thing, Thing]:
    """Return something that leads to each thing out of reach, which is out of reach itself."""
    before: dict[Thing, Thing] = {}
    for name, event in flow.events.items():
        if name not in reach.events:
            before.update(dict.fromkeys(flow.targets_of(name), event))
    for step in flow.steps.values():
        if step.name not in reach.steps:
            for events in step.triggers.values():
                before.update(dict.fromkeys(events, step))
    return before


class _Graph:
    """What leads to what, and in which order."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    def after(self, thing: Thing) -> Iterable[Thing]:
        """Return what an event or step leads to, by itself or as a part of an expression."""
        if isinstance(thing, Step):
            return itertools.chain.from_iterable(thing.triggers.values())
        flow, name = self._flow, thing.name
        if name not in flow.expressed:
            return flow.targets_of(name)
        return itertools.chain(flow.targets_of(name), flow.expressed[name])

    def behind(self, things: Iterable[Thing]) -> set[Thing]:
        """Return all that things lead to, and themselves."""
        agenda = list(things)
        found = set(agenda)
        while agenda:
            new = [thing for thing in self.after(agenda.pop()) if thing not in found]
            found.update(new)
            agenda += new
        return found

    @functools.cached_property
    def _sorted(self) -> tuple[list[Thing], set[Thing]]:
        after = self.after
        things: list[Thing] = [*self._flow.events.values(), *self._flow.steps.values()]
        waits = dict.fromkeys(things, 0)
        for thing in things:
            for target in after(thing):
                waits[target] += 1
        order: list[Thing] = []
        cut: set[Thing] = set()
        rest = iter(things)
        agenda = [thing for thing in things if not waits[thing]]
        while len(order) < len(things):
            if not agenda:
                thing = next(thing for thing in rest if waits[thing] > 0)
                waits[thing] = 0
                cut.add(thing)
                agenda.append(thing)
            thing = agenda.pop()
            order.append(thing)
            for target in after(thing):
                waits[target] -= 1
                if waits[target] == 0:
                    agenda.append(target)
        return order, cut

    @property
    def order(self) -> list[Thing]:
        """All events and steps, each after all that lead to it, except for those that are `cut`."""
        return self._sorted[0]

    @property
    def cut(self) -> set[Thing]:
        """Those in circles, or behind them, at which the circles were cut to have an order."""
        return self._sorted[1]


class _Past:
    """What must have come before, as a tree: above each node stands only what surely did.

    Node 0 is the beginning. A node jumps to one far above it, so that two paths are compared in a
    time that is logarithmic in their length.
    """

    def __init__(self) -> None:
        self.depth = [0]
        self._above = [0]
        self._jump = [0]

    def add(self, above: int) -> int:
        """Add a node below `above`."""
        depth, jump = self.depth, self._jump
        near = jump[above]
        far = jump[near]
        even = depth[above] - depth[near] == depth[near] - depth[far]
        jump.append(far if even else above)
        depth.append(depth[above] + 1)
        self._above.append(above)
        return len(depth) - 1

    def part(self, one: int, other: int) -> tuple[int, int]:
        """Return the nodes at which two paths from the beginning differ first.

        If one of the paths is a part of the other, they are the same: its end.
        """
        depth, above, jump = self.depth, self._above, self._jump
        level = min(depth[one], depth[other])
        while depth[one] > level:
            one = jump[one] if depth[jump[one]] >= level else above[one]
        while depth[other] > level:
            other = jump[other] if depth[jump[other]] >= level else above[other]
        while one != other and above[one] != above[other]:
            way = above if jump[one] == jump[other] else jump
            one, other = way[one], way[other]
        return one, other

    def common(self, one: int, other: int) -> int:
        """Return the last node that two paths have in common."""
        one, other = self.part(one, other)
        return one if one == other else self._above[one]

    def surely(self, operator: Operator, nodes: list[int]) -> int:
        """Return what must have come before an operator holds, given that of its operands."""
        if isinstance(operator, And):  # all of them; the tree keeps the longest path
            return max(nodes, key=self.depth.__getitem__)
        return functools.reduce(self.common, nodes)

    def ranks(self) -> list[int]:
        """Return for each node a number, by which all that is below a node stands together."""
        below: list[list[int]] = [[] for _ in self._above]
        for node in range(len(below) - 1, 0, -1):
            below[self._above[node]].append(node)
        ranks = [0] * len(below)
        agenda = [0]
        for rank in range(len(below)):
            node = agenda.pop()
            ranks[node] = rank
            agenda.extend(below[node])
        return ranks


class _Places:
    """Where everything stands in the past.

    Attributes:
        past: the tree.
        of: the place of each event and step.
        ends: the steps whose success and failure both lead on, by the place of the success; that of
            the failure is the next.
    """

    def __init__(self, flow: Flow, graph: _Graph, triggered: AbstractSet[str]) -> None:
        self.past = _Past()
        self.of: dict[Atom | Step, int] = {}
        self.ends: dict[int, Step] = {}
        self._before: dict[Thing, int] = {}
        for thing in graph.order:
            if thing in graph.cut or (thing.name in triggered and isinstance(thing, Event)):
                self._before[thing] = 0
            elif isinstance(thing, Event) and thing.expr is not None:
                self._lead(fold(thing.expr, self.of.__getitem__, self.past.surely), thing)
            place = self.of[thing] = self.past.add(self._before.get(thing, 0))
            if isinstance(thing, Step):
                self._lead_from(thing, place)
            else:
                self._lead(place, *flow.targets_of(thing.name))

    def _lead_from(self, step: Step, place: int) -> None:
        ends = {}
        if step.triggers.keys() >= _BOTH_ENDS:
            success, failure = self.past.add(place), self.past.add(place)
            ends = {StepTriggers.at_success: success, StepTriggers.at_failure: failure}
            self.ends[success] = step
        for transition, events in step.triggers.items():
            self._lead(ends.get(transition, place), *events)

    def _lead(self, place: int, *targets: Thing) -> None:
        for target in targets:
            known = self._before.get(target)
            self._before[target] = place if known is None else self.past.common(known, place)


def _contradictions(
    flow: Flow, graph: _Graph, triggered: AbstractSet[str], joined: list[Event]
) -> Iterator[Finding]:
    """Find expressions that need both ends of a step in one sequence."""
    failures = itertools.chain.from_iterable(
        step.triggers[StepTriggers.at_failure]
        for step in flow.steps.values()
        if step.triggers.keys() >= _BOTH_ENDS
    )
    if graph.behind(failures).isdisjoint(joined):  # as it is in most flows, and soon seen
        return
    places = _Places(flow, graph, triggered)
    past, ranks = places.past, places.past.ranks()
    split = [""]

    def weigh(operator: Operator, nodes: list[int | None]) -> int | None:
        """Return what must have come before; None if the operator cannot hold."""
        possible = [node for node in nodes if node is not None]
        if not possible or (isinstance(operator, And) and len(possible) < len(nodes)):
            return None
        if isinstance(operator, And):
            possible.sort(key=ranks.__getitem__)
            for pair in itertools.pairwise(possible):
                one, other = past.part(*pair)
                if one in places.ends and other == one + 1:
                    split[0] = places.ends[one].name
                    return None
        return past.surely(operator, possible)

    for event in joined:
        expr = cast("Expr", event.expr)
        if fold(expr, lambda atom: cast("int | None", places.of[atom]), weigh) is None:
            message = (
                f"The expression of event {event.name!r} can never hold: it needs both the success "
                f"and the failure of step {split[0]!r} in one sequence"
            )
            yield Finding(FindingKind.impossible_expression, event.name, message)


def _early(flow: Flow, graph: _Graph) -> Iterator[Finding]:
    """Find steps that use the result of one whose success does not lead to them."""
    users: dict[Step, list[Step]] = {}
    for step in flow.steps.values():
        for name in dict.fromkeys(step.needs):
            users.setdefault(flow.steps[name], []).append(step)
    if not users:
        return
    at = {thing: number for number, thing in enumerate(graph.order)}
    needed = sorted(users, key=at.__getitem__)
    found: dict[Step, list[Step]] = {}
    for start in range(0, len(needed), _BATCH):
        batch = needed[start : start + _BATCH]
        last = max(at[user] for step in batch for user in users[step])
        marks = _marks(batch, graph, graph.order[at[batch[0]] : last + 1])
        for number, step in enumerate(batch):
            for user in users[step]:
                if user is step or not marks.get(user, 0) >> number & 1:
                    found.setdefault(user, []).append(step)
    for user in flow.steps.values():
        for step in found.get(user, ()):
            yield _unavailable(user.name, step.name)


def _marks(steps: list[Step], graph: _Graph, between: list[Thing]) -> dict[Thing, int]:
    """Return to what the successes of `steps` lead: for each thing a bit set for each of them.

    Args:
        steps: the steps, as many as a number has bits at a cost that is no concern.
        graph: what leads to what.
        between: where to look, if there is an order.
    """
    marks: dict[Thing, int] = {}
    for number, step in enumerate(steps):
        for transition in _WITH_RESULT:
            for event in step.triggers.get(transition, ()):
                marks[event] = marks.get(event, 0) | 1 << number
    things = graph.order if graph.cut else between
    while _carry(marks, things, graph) and graph.cut:
        things = things[::-1]
    return marks


def _carry(marks: dict[Thing, int], things: list[Thing], graph: _Graph) -> bool:
    """Give the marks of each of `things` to what it leads to; tell whether any was new."""
    new = False
    for thing in things:
        mark = marks.get(thing)
        if mark is None:
            continue
        for target in graph.after(thing):
            known = marks.get(target, 0)
            marks[target] = known | mark
            new = new or marks[target] != known
    return new


def _unavailable(user: str, needed: str) -> Finding:
    message = (
        f"Step {user!r} uses its own result, which is not there before it has run"
        if user == needed
        else f"Step {user!r} uses the result of step {needed!r}, whose success does not lead to it"
    )
    return Finding(FindingKind.unavailable_result, user, message)


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:_NAMED]))
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
