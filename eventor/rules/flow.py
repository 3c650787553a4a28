"""What a program defines: events, steps and associations, checked, and indexed for the plan."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Any

from eventor.errors import DefinitionError, TriggerError, UsageError
from eventor.rules.config import (
    LONGEST_NAME,
    LONGEST_SEQUENCE,
    Config,
    StepConfig,
    read_delay,
    read_step_config,
    too_long,
    unknown,
)
from eventor.rules.data import ResultOf, placeholders, resolve
from eventor.rules.expr import Atom, Expr, ExprLike, Gate, atoms, expression, postfix
from eventor.types import Sequence, StepReplay, StepTriggers, TaskStatus

DEFAULT_RECOVERY: Mapping[TaskStatus, StepReplay] = {
    TaskStatus.ready: StepReplay.rerun,
    TaskStatus.active: StepReplay.rerun,
    TaskStatus.failure: StepReplay.rerun,
    TaskStatus.success: StepReplay.skip,
}
"""What a recovery does by default (interface: `add_step`, *recovery*)."""

ENDS = (TaskStatus.success, TaskStatus.failure)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Event(Atom):
    """An event, as `Eventor.add_event` returns it.

    Attributes:
        name: unique among the events of its Eventor.
        expr: the expression that raises it by itself, or None.
    """

    expr: Expr | None = None


_HIDDEN = ("__module__", "__doc__", "__annotations__")
"""What a step has as its function has it, and would have of its class."""

_AS_THE_FUNCTION = frozenset(
    # The last three are those by which `inspect` tells a coroutine function, also on Python 3.11.
    ("__name__", "__qualname__", "__type_params__", "__code__", "__defaults__", "__kwdefaults__")
)
"""What a step has as its function has it, if that does."""


# Without slots, since the one place for a module and a docstring that differ from those of the
# class is the `__dict__` of a step.
@dataclass(frozen=True, eq=False)
class Step:
    """A step, as `Eventor.add_step` returns it; called, it calls its function here and now.

    It has the name, module, docstring and annotations of its function, as with `functools.wraps`.

    Its events `ready`, `active`, `success`, `failure` and `complete` stand wherever an event may.
    Each is made on first use, named `<step>.success` and so on, and the step's `triggers` raise it
    from then on. So whoever looks at `failure` or `complete` has the failure handled.

    Raises:
        DefinitionError: the program has defined an event of that name itself.
        UsageError: it is first used in another process than the Eventor's, as inside a step.

    Attributes:
        name: unique among the steps of its Eventor.
        func: what it calls, with `args` and `kwargs`.
        triggers: the events that each transition of its tasks raises.
        recovery: what a recovery does with a task, by the status in which it was left.
        config: its overrides of the Eventor's config.
        needs: the names of the steps whose results it takes.
        has_placeholders: whether its arguments have to be resolved when it starts.
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    triggers: dict[StepTriggers, tuple[Event, ...]]
    recovery: Mapping[TaskStatus, StepReplay]
    config: StepConfig
    _flow: Flow
    needs: tuple[str, ...]
    has_placeholders: bool

    def __post_init__(self) -> None:
        for name in _HIDDEN:
            if hasattr(self.func, name):
                vars(self)[name] = getattr(self.func, name)

    def __getattr__(self, name: str) -> Any:
        if name in _AS_THE_FUNCTION:
            return getattr(self.func, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is the function's, which need not be picklable."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def __repr__(self) -> str:
        return f"Step({self.name!r})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call its function here and now; nothing is recorded."""
        return self.func(*args, **kwargs)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The function, for `inspect.signature` and its like."""
        return self.func

    @property
    def ready(self) -> Event:
        """The event that its task is ready to run."""
        return self._flow.event_of(self, StepTriggers.at_ready)

    @property
    def active(self) -> Event:
        """The event that its task is running."""
        return self._flow.event_of(self, StepTriggers.at_active)

    @property
    def success(self) -> Event:
        """The event that its task ended well."""
        return self._flow.event_of(self, StepTriggers.at_success)

    @property
    def failure(self) -> Event:
        """The event that its task failed, which is thereby handled."""
        return self._flow.event_of(self, StepTriggers.at_failure)

    @property
    def complete(self) -> Event:
        """The event that its task ended, well or not; a failure is thereby handled."""
        return self._flow.event_of(self, StepTriggers.at_complete)

    @property
    def result(self) -> Any:
        """What stands for its result in the same sequence, in the arguments of another step."""
        return ResultOf(self.name, self)

    @property
    def handles_failure(self) -> bool:
        """Whether the flow goes on from its failure, by the step's own triggers."""
        return StepTriggers.at_failure in self.triggers or StepTriggers.at_complete in self.triggers

    @property
    def leads_on(self) -> bool:
        """Whether its end raises events."""
        return any(end in self.triggers for end in _AT_END)


_AT_END = (StepTriggers.at_success, StepTriggers.at_failure, StepTriggers.at_complete)


class Flow:
    """The definitions of one Eventor.

    Attributes:
        events: all events by name.
        steps: all steps by name.
        associated: for an event's name, what it leads to by association, once each and in order
            (the keys; the values mean nothing).
        expressed: for an event's name, the events whose expressions name it.
        delayed: for an event's name, what it leads to by association some seconds later.
        gates: for the name of an event that has an expression, its gate.
        revision: grows with each definition.

    Args:
        config: the Eventor's.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._pid = os.getpid()
        self.events: dict[str, Event] = {}
        self.steps: dict[str, Step] = {}
        self.associated: dict[str, dict[Event | Step, None]] = {}
        self.delayed: dict[str, dict[float, dict[Event | Step, None]]] = {}
        self.expressed: dict[str, list[Event]] = {}
        self.gates: dict[str, Gate] = {}
        self.revision = 0
        self._of_steps: dict[tuple[str, StepTriggers], Event] = {}

    def add_event(self, name: str, expr: ExprLike | None = None) -> Event:
        """Define an event; see `Eventor.add_event`."""
        name = self._new_name("event", name, self.events)
        what = f"part of the expression of event {name!r}"
        tree = None if expr is None else self.own_expression(expr, what)
        event = self.events[name] = Event(name, tree)
        if tree is not None:
            self.gates[name] = Gate(tree)
            for atom in atoms(tree):
                self.expressed.setdefault(atom.name, []).append(event)
        self.revision += 1
        return event

    def event_of(self, step: Step, transition: StepTriggers) -> Event:
        """Return the event of a step's own that `transition` raises; it is made on first use.

        Raises:
            DefinitionError: the program has defined an event of its name.
            UsageError: this is another process, for example a step's; the run would not know it.
        """
        known = self._of_steps.get((step.name, transition))
        if known is not None:
            return known
        name = f"{step.name}.{transition.removeprefix('at_')}"
        if os.getpid() != self._pid:
            raise UsageError(
                f"event {name!r} cannot be made in process {os.getpid()}, for example inside a "
                f"step; ask for it once in the program's own, {self._pid}, before ev()"
            )
        if name in self.events:
            raise DefinitionError(
                f"step {step.name!r} cannot have its own event {name!r}: the program has defined "
                "an event of that name itself; give that another name"
            )
        event = self._of_steps[step.name, transition] = self.add_event(name)
        step.triggers[transition] = (*step.triggers.get(transition, ()), event)
        return event

    def add_step(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        triggers: Mapping[Any, Event | Iterable[Event]],
        recovery: Mapping[Any, StepReplay],
        config: Mapping[str, Any],
    ) -> Step:
        """Define a step; see `Eventor.add_step`."""
        name = self._new_name("step", name, self.steps)
        if isinstance(func, Step):
            func = func.func
        if not callable(func):
            raise DefinitionError(f"func of step {name!r} is {func!r}; expected a callable")
        if not isinstance(args, tuple | list):
            raise DefinitionError(
                f"args of step {name!r} is {args!r}; expected a tuple, of one value `(value,)`"
            )
        if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
            raise DefinitionError(
                f"kwargs of step {name!r} is {kwargs!r}; expected a mapping with str keys"
            )
        needs, has_placeholders = self._needs((tuple(args), dict(kwargs)), name)
        step = self.steps[name] = Step(
            name,
            func,
            tuple(args),
            dict(kwargs),
            self._triggers(triggers, name),
            _recovery(recovery, name),
            read_step_config(config, name, self._config),
            self,
            needs,
            has_placeholders,
        )
        self.revision += 1
        return step

    def add_step_after(
        self, after: Expr | None, name: str | None, func: Callable[..., Any], *rest: Any
    ) -> Step:
        """Define a step and what leads to it, both or neither; see `Eventor.step`.

        Args:
            after: what leads to it, as `own_expression` returns it.
            name: its name; None is that of `func`.
            func: what it calls.
            rest: what else `add_step` takes.
        """
        if isinstance(func, Step):
            func = func.func
        if name is None:
            name = getattr(func, "__name__", None)
            if name is None:
                raise DefinitionError(
                    f"the step that calls {func!r} needs a `name`, since that has no __name__"
                )
        if after is not None and not isinstance(after, Event):
            name = self._new_name("step", name, self.steps)
            leading = self._new_name("event", f"{name}.after", self.events)
            step = self.add_step(name, func, *rest)
            self.add_assoc(self.add_event(leading, after), step)
            return step
        step = self.add_step(name, func, *rest)
        if after is not None:
            self.add_assoc(after, step)
        return step

    def add_assoc(self, event: Event, *assocs: Event | Step, delay: float = 0) -> None:
        """Associate; see `Eventor.add_assoc`."""
        self.own_event(event, "the event of an association")
        if not assocs:
            raise DefinitionError(
                f"the association of event {event.name!r} is with nothing; "
                "expected at least one event or step after it"
            )
        for target in assocs:
            if isinstance(target, Step):
                self.own_step(target, f"an association of event {event.name!r}")
            else:
                self.own_event(target, f"an association of event {event.name!r}")
        try:
            seconds = read_delay(delay)
        except ValueError as error:
            raise DefinitionError(
                f"the delay of an association of event {event.name!r} is {delay!r}; "
                f"expected {error}"
            ) from None
        if seconds:
            targets = self.delayed.setdefault(event.name, {}).setdefault(seconds, {})
        else:
            targets = self.associated.setdefault(event.name, {})
        targets.update(dict.fromkeys(assocs))
        self.revision += 1

    def targets_of(self, event: str) -> Collection[Event | Step]:
        """Return what an event leads to by association, at once or later."""
        at_once = self.associated.get(event, {})
        if event not in self.delayed:
            return at_once.keys()
        return dict.fromkeys(itertools.chain(at_once, *self.delayed[event].values())).keys()

    def own_expression(self, expr: ExprLike, what: str) -> Expr:
        """Return the tree of an expression, if it is over events of this flow.

        Raises:
            DefinitionError: it is not; `what` says where its parts were given.
        """
        tree = expression(expr)
        for atom in atoms(tree):
            self.own_event(atom, what)
        return tree

    def own_event(self, value: object, what: str) -> Event:
        """Return `value` if it is an event of this flow.

        Raises:
            DefinitionError: it is not; `what` says where it was given.
        """
        if isinstance(value, Step):
            raise DefinitionError(f"{what} is {value!r}; expected an event, such as its `success`")
        if not isinstance(value, Event):
            raise DefinitionError(f"{what} is {value!r}; expected an event as add_event returns it")
        if self.events.get(value.name) is not value:
            raise DefinitionError(f"{what} is {value!r} of another Eventor")
        return value

    def own_step(self, value: object, what: str) -> Step:
        """Return `value` if it is a step of this flow.

        Raises:
            DefinitionError: it is not; `what` says where it was given.
        """
        if not isinstance(value, Step):
            raise DefinitionError(f"{what} is {value!r}; expected a step as add_step returns it")
        if self.steps.get(value.name) is not value:
            raise DefinitionError(f"{what} is {value!r} of another Eventor")
        return value

    def definition(self) -> dict[str, Iterator[dict[str, Any]]]:
        """Return the whole flow as plain data, for the store: names and words, no objects.

        Each thing is made when it is asked for: together, they are larger than the flow itself.
        Another thread may define more meanwhile.
        """
        return {
            "events": (
                {"name": event.name, "expr": None if event.expr is None else postfix(event.expr)}
                for event in tuple(self.events.values())
            ),
            "steps": (
                {
                    "name": step.name,
                    "func": qualified_name(step.func),
                    "triggers": {
                        status.value: [event.name for event in raised]
                        for status, raised in tuple(step.triggers.items())
                    },
                    "recovery": {
                        status.value: replay.value for status, replay in step.recovery.items()
                    },
                    "config": _config(step.config),
                    **({"needs": list(step.needs)} if step.needs else {}),
                }
                for step in tuple(self.steps.values())
            ),
            "assocs": self._associations(),
        }

    def _associations(self) -> Iterator[dict[str, Any]]:
        for event, targets in tuple(self.associated.items()):
            yield _assoc(event, tuple(targets))
        for event, delays in tuple(self.delayed.items()):
            for seconds, targets in tuple(delays.items()):
                yield _assoc(event, tuple(targets)) | {"delay": seconds}

    def _triggers(
        self, given: Mapping[Any, Event | Iterable[Event]], step: str
    ) -> dict[StepTriggers, tuple[Event, ...]]:
        if not isinstance(given, Mapping):
            raise DefinitionError(
                f"triggers of step {step!r} is {given!r}; "
                "expected a mapping of StepTriggers to events"
            )
        triggers = {}
        for key, value in given.items():
            known = [trigger.value for trigger in StepTriggers]
            if key not in known:
                raise DefinitionError(
                    f"triggers of step {step!r} has no status {key!r}; {unknown(key, known)}"
                )
            events = value if isinstance(value, Iterable) else (value,)
            what = f"{StepTriggers(key)} in triggers of step {step!r}"
            own = tuple(self.own_event(event, what) for event in events)
            if isinstance(events, AbstractSet):  # which has another order in each process
                own = tuple(sorted(own, key=lambda event: event.name))
            if own:
                triggers[StepTriggers(key)] = own
        return triggers

    def _needs(self, arguments: tuple[Any, ...], step: str) -> tuple[tuple[str, ...], bool]:
        """Return the names of the steps whose results a step takes, and whether to resolve any."""
        found = list(placeholders(arguments))
        results = [one for one in found if isinstance(one, ResultOf)]
        for result in results:
            known = self.steps.get(result.step)
            if known is None or result.defined not in (None, known):
                raise DefinitionError(
                    f"step {step!r} is given {result!r} of another Eventor; "
                    "expected that of a step of its own"
                )
        if found:
            try:
                resolve(arguments, id)
            except RecursionError:
                raise DefinitionError(
                    f"the arguments of step {step!r} hold {found[0]!r}, and are nested too deeply, "
                    "or contain themselves"
                ) from None
        return tuple(dict.fromkeys(result.step for result in results)), bool(found)

    @staticmethod
    def _new_name(kind: str, name: str, taken: Mapping[str, object]) -> str:
        if not isinstance(name, str):
            raise DefinitionError(f"the name of the {kind} is {name!r}; expected a str")
        if not name.strip() or not name.isprintable():
            raise DefinitionError(
                f"the name of the {kind} is {name!r}; expected printable characters, at least one"
            )
        if (told := too_long(f"the name of the {kind}", name, LONGEST_NAME)) is not None:
            raise DefinitionError(told)
        if name in taken:
            article = "an" if kind == "event" else "a"
            raise DefinitionError(
                f"there is {article} {kind} {name!r} already; its name must be unique"
            )
        return str.__str__(name)


def _assoc(event: str, targets: Iterable[Event | Step]) -> dict[str, Any]:
    return {
        "event": event,
        "events": [target.name for target in targets if isinstance(target, Event)],
        "steps": [target.name for target in targets if isinstance(target, Step)],
    }


def _config(config: StepConfig) -> dict[str, Any]:
    """Return the config of a step as plain data: what is not as it is by default."""
    plain: dict[str, Any] = {"stop_on_exception": config.stop_on_exception}
    for key in _CONFIG_KEYS:
        value = getattr(config, key)
        if value != getattr(_PLAIN, key):
            plain[key] = value
    if config.resources:
        plain["resources"] = dict(config.resources)
    if config.retry_on is not None:
        plain["retry_on"] = [qualified_name(kind) for kind in config.retry_on]
    return plain


_PLAIN = StepConfig()
_CONFIG_KEYS = (
    "max_attempts",
    "retry_delay",
    "retry_backoff",
    "retry_jitter",
    "timeout",
    "capture_output",
    "priority",
)

_INTS = range(-(2**63), 2**63)


def read_sequence(given: object) -> Sequence:
    """Return a sequence that a program gave, as a plain int or str.

    Raises:
        TriggerError: it is neither an int nor a str, or one that no store can keep.
    """
    if isinstance(given, int) and not isinstance(given, bool) and int(given) in _INTS:
        return int(given)
    if isinstance(given, str) and _storable(given):
        if (told := too_long("the sequence", given, LONGEST_SEQUENCE)) is not None:
            raise TriggerError(told)
        return str.__str__(given)
    raise TriggerError(
        f"the sequence is {given!r} ({type(given).__name__}); "
        "expected an int that fits in 64 bits, or a str without NUL and lone surrogates"
    )


def _storable(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def qualified_name(func: Callable[..., Any]) -> str:
    """Return where the code of a callable stands: module and qualified name."""
    while isinstance(func, functools.partial):
        func = func.func
    named = func if hasattr(func, "__qualname__") else type(func)
    return f"{named.__module__ or 'builtins'}.{named.__qualname__}"


_POLICY_KEYS: Mapping[str, tuple[TaskStatus, ...]] = {
    "complete": ENDS,
    StepTriggers.at_complete: ENDS,
    **{status.value: (status,) for status in TaskStatus},
    **{f"at_{status.value}": (status,) for status in TaskStatus},
}


def _recovery(given: Mapping[Any, StepReplay], step: str) -> Mapping[TaskStatus, StepReplay]:
    """Return the whole policy of a step; a key for one status outweighs *complete*."""
    if not isinstance(given, Mapping):
        raise DefinitionError(
            f"recovery of step {step!r} is {given!r}; "
            "expected a mapping of TaskStatus to StepReplay"
        )
    replays = [replay.value for replay in StepReplay]
    for key, replay in given.items():
        if key not in _POLICY_KEYS:
            known = [status.value for status in TaskStatus]
            raise DefinitionError(
                f"recovery of step {step!r} has no status {key!r}; {unknown(key, known)}"
            )
        if replay not in replays:
            raise DefinitionError(
                f"{key} in recovery of step {step!r} is {replay!r}; "
                "expected StepReplay.rerun or StepReplay.skip"
            )
    if not given:
        return DEFAULT_RECOVERY
    policy = dict(DEFAULT_RECOVERY)
    for key, replay in sorted(given.items(), key=lambda item: -len(_POLICY_KEYS[item[0]])):
        policy.update(dict.fromkeys(_POLICY_KEYS[key], StepReplay(replay)))
    return policy
