"""The arguments and config keys of Eventor and of a step: their defaults, and what they may be."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import multiprocessing
import os
import re
import socket
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from eventor.errors import ConfigError

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from eventor.rules.queue import Needs
    from eventor.types import Transition

_E = TypeVar("_E")

Hook = Callable[["Transition"], object]
"""What a program has called upon what happens in a run."""

Hooks = tuple[Hook, ...]

_LONGEST_LEASE = 10_000_000

_LISTED = 30
"""How many known words a message lists."""

LONGEST_NAME, LONGEST_SEQUENCE = 500, 2_000
"""Bytes in UTF-8; together they have to go into a third of a page of 8 KB, which is what a row of
an index has in PostgreSQL (postgresql.org, B-Tree Indexes), so that each store takes all flows."""

_SHOWN = 40

_LONGEST_LABEL = 63
"""Characters between two dots of a host's name (RFC 1035)."""

LONGEST_DELAY = 1_000_000_000.0
"""Seconds, some 30 years: what waits longer than that is a mistake."""


def default_construct() -> type[Any]:
    """Return the Process of the fork context where there is one, else of spawn.

    Fork is asked for by name: it runs closures, lambdas and scripts without a main guard,
    and it is no longer the default of multiprocessing on Python 3.14.
    """
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    return multiprocessing.get_context(method).Process  # type: ignore[attr-defined, no-any-return]


def _directory(value: object) -> str:
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ValueError("the path of a directory (str or os.PathLike)")
    return os.fsdecode(value)


def _construct(value: object) -> Any:
    if _is_of_interpreters(value):
        raise ValueError(_NO_INTERPRETERS)
    if is_worker_class(value) or is_executor(value):
        return value
    if _is_client(value):
        raise ValueError("an executor, which a Client of Dask gives: client.get_executor()")
    if _is_factory(value):
        return value
    raise ValueError(
        "a class like multiprocessing.Process or threading.Thread (the class, not an instance); a "
        "concurrent.futures.Executor; or a function that takes nothing and returns one, such as "
        "its class"
    )


def is_worker_class(value: object) -> TypeGuard[type[Any]]:
    """Tell whether it is a class of workers of which each is started and joined."""
    return _is_class_with(value, "start", "join")


def is_executor(value: object) -> TypeGuard[Executor]:
    """Tell whether something takes calls as a `concurrent.futures.Executor` does."""
    return (
        not isinstance(value, type)
        and all(callable(getattr(value, name, None)) for name in ("submit", "shutdown"))
        and not _is_client(value)
    )


def _is_client(value: object) -> bool:
    """Tell whether it is a Client of Dask, whose futures are none of `concurrent.futures`."""
    return not isinstance(value, type) and hasattr(value, "get_executor")


_NO_INTERPRETERS = (
    "an executor of threads or of processes; steps do not run in interpreters of their own"
)


def _is_of_interpreters(value: object) -> bool:
    """Tell whether it is an InterpreterPoolExecutor, of Python 3.14 or later, or its class."""
    kind = value if isinstance(value, type) else type(value)
    return any(each.__name__ == "InterpreterPoolExecutor" for each in kind.__mro__)


def _is_factory(value: object) -> bool:
    """Tell whether it can be called with nothing, and may return an executor."""
    if not callable(value) or inspect.iscoroutinefunction(value):
        return False
    if isinstance(value, type) and not _is_class_with(value, "submit", "shutdown"):
        return False
    try:
        inspect.signature(value).bind()
    except TypeError:
        return False
    except ValueError:  # it does not tell what it takes
        return True
    return True


def _is_class_with(value: object, *names: str) -> bool:
    return isinstance(value, type) and all(hasattr(value, name) for name in names)


def _host(value: object) -> str | None:
    if value is None or (isinstance(value, str) and _is_host(value)):
        return value
    raise ValueError("the name or the IPv4 address of this host, as others reach it, or None")


def _is_host(name: str) -> bool:
    """Tell whether something may be the name of a host, or is an IPv4 address of one."""
    if not re.fullmatch(r"[\w.-]{1,253}", name):
        return False
    if not re.fullmatch(r"[\d.]+", name):
        lengths = [len(label) for label in name.removesuffix(".").split(".")]
        return min(lengths) > 0 and max(lengths) <= _LONGEST_LABEL
    try:
        return any(socket.inet_pton(socket.AF_INET, name))
    except OSError:
        return False


def _schema(value: object) -> str | None:
    if value is None or (isinstance(value, str) and value and value.isprintable()):
        return value
    raise ValueError("the name of a schema of a PostgreSQL database, or None")


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(value: object) -> int:
    if not _is_whole(value):
        raise ValueError("a whole number; below 1 means no limit")
    return value


def _tasks(value: object) -> int | None:
    if value is None:
        return None
    if not _is_whole(value) or value < 1:
        raise ValueError("a whole number, at least 1, or None for no limit")
    return int(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


def _finite(value: object) -> float | None:
    """Return a number as a float; None for what is no finite one."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            number = float(value)
            return number if math.isfinite(number) else None
    return None


def _seconds(value: object) -> float:
    if (seconds := _finite(value)) is None or seconds < 0:
        raise ValueError("a finite number of seconds, not below 0")
    return seconds


def _timeout(value: object) -> float | None:
    if value is None:
        return None
    if (seconds := _finite(value)) is None or seconds <= 0:
        raise ValueError("a finite number of seconds above 0, or None for no limit")
    return seconds


def _lease(value: object) -> float:
    if not 0 < (lease := _seconds(value)) <= _LONGEST_LEASE:
        raise ValueError(f"a number of seconds above 0, and at most {_LONGEST_LEASE:,}")
    return lease


def _linger(value: object) -> float:
    if isinstance(value, float) and value == math.inf:
        return math.inf
    try:
        return _seconds(value)
    except ValueError as error:
        raise ValueError(f"{error}, or math.inf") from None


def read_delay(value: object) -> float:
    """Return seconds to wait.

    Raises:
        ValueError: they are none, or too many; the message says what is expected.
    """
    if (delay := _finite(value)) is None or not 0 <= delay <= LONGEST_DELAY:
        raise ValueError(f"a number of seconds from 0 to {LONGEST_DELAY:,.0f}")
    return delay


def _integer(value: object) -> int:
    if not _is_whole(value):
        raise ValueError("a whole number; the higher, the sooner")
    return int(value)


def _attempts(value: object) -> int:
    if not _is_whole(value) or value < 1:
        raise ValueError("a whole number, at least 1")
    return int(value)


def _factor(value: object) -> float:
    if (factor := _finite(value)) is None or factor <= 0:
        raise ValueError("a finite number above 0")
    return factor


def _exceptions(value: object) -> tuple[type[BaseException], ...] | None:
    if value is None:
        return None
    classes = tuple(value) if isinstance(value, tuple | list | set | frozenset) else (value,)
    if not all(isinstance(one, type) and issubclass(one, BaseException) for one in classes):
        raise ValueError("an exception class, a tuple of them, or None for any failure")
    return classes


def _amounts(value: object) -> dict[str, int]:
    if isinstance(value, Mapping) and all(
        isinstance(name, str)
        and name.strip()
        and name.isprintable()
        and _is_whole(much)
        and much >= 0
        for name, much in value.items()
    ):
        return {str.__str__(name): int(much) for name, much in value.items()}
    raise ValueError("a mapping of names to whole numbers, not below 0, such as {'gpu': 2}")


def _needs(value: object) -> Needs:
    return tuple(sorted((name, much) for name, much in _amounts(value).items() if much))


def _hooks(value: object) -> Hooks:
    hooks = tuple(value) if isinstance(value, tuple | list) else (value,)
    if all(callable(one) and not inspect.iscoroutinefunction(one) for one in hooks):
        return hooks
    raise ValueError("a function of a Transition, which is no coroutine, or a list of them")


@dataclass(frozen=True, slots=True)
class Config:
    """The config of an Eventor (interface: *Eventor Class Initiator*, config).

    Attributes:
        workdir: kept for the interface, not in use.
        logdir: directory of the debug and error log files.
        task_construct: by what steps are executed: a class of processes or threads; a
            `concurrent.futures.Executor`, which whoever made it shuts down; or a function that
            takes nothing and returns one, which is called when `ev()` starts, and whose executor is
            shut down when that ends.
        callback_host: the name or IPv4 address at which the workers of an executor reach this host
            from another; None is its own name and address, and a loopback address keeps the port
            on this host. Workers on this host need it not.
        max_concurrent: how many steps may be in flight, with an executor those that have been
            submitted and have not ended; below 1 there is no limit.
        max_tasks_per_child: how many steps a process runs before it ends, one after the other; None
            is no limit. By default each step has a process of its own. Threads and executors are
            not affected.
        stop_on_exception: whether an unhandled failure keeps further steps from starting.
        sleep_between_loops: seconds, the longest wait between two passes of the loop, and between
            two looks at what other processes ask for.
        lease_seconds: seconds after which a run whose owner was not heard of may be taken over from
            another host; on the same host, a recovery sees whether the owner lives. `ev()` is
            heard of three times in that time.
        linger: seconds for which `ev()` waits for triggers, counted from the last activity, once
            there is nothing left to do; `math.inf` is until `stop` or a signal.
        strict_recovery: whether a recovery refuses to run a flow that is not what was recorded.
        schema: that of a PostgreSQL database in which the store is; it is made if it is missing.
            None is that which the database chooses, or which the URL of the store names.
        resources: how much there is of what steps ask for in their config, by name.
        on_transition: what is called with a `Transition` when something has happened in the run: a
            function, or a list of them.
    """

    workdir: str = "/tmp"  # noqa: S108 (the interface's default)
    logdir: str = "/tmp"  # noqa: S108 (the interface's default)
    task_construct: type[Any] | Executor | Callable[[], Executor] = field(
        default_factory=default_construct
    )
    callback_host: str | None = None
    max_concurrent: int = 1
    max_tasks_per_child: int | None = 1
    stop_on_exception: bool = True
    sleep_between_loops: float = 1
    lease_seconds: float = 30
    linger: float = 0
    strict_recovery: bool = False
    schema: str | None = None
    resources: Mapping[str, int] = field(default_factory=dict)
    on_transition: Hooks = ()


@dataclass(frozen=True, slots=True)
class StepConfig:
    """The config of a step (interface: `add_step`, config).

    Attributes:
        stop_on_exception: whether its unhandled failure keeps further steps from starting; None is
            the Eventor's value.
        max_attempts: how often a task is started, at most, until it ends well.
        retry_delay: seconds between the end of a failed attempt and the next one.
        retry_backoff: by what the delay is multiplied from one attempt to the next.
        retry_jitter: seconds; up to so many are added to each delay, by chance.
        retry_on: the exception classes upon which a task is tried again; None is any failure of
            what it calls, the death of its process included.
        resources: how much a task needs of the Eventor's resources, while it is active.
        timeout: seconds after which a task is ended, with all that it has started, and has failed;
            None is no limit. Threads, and what an executor runs, cannot be ended.
        capture_output: whether what a task and its subprocesses write to their standard output and
            error is kept with its record, and shown by the program. Threads, and what an executor
            runs, have none of their own.
        priority: of the tasks that are ready, those of a higher one start first.
    """

    stop_on_exception: bool | None = None
    max_attempts: int = 1
    retry_delay: float = 0.0
    retry_backoff: float = 1.0
    retry_jitter: float = 0.0
    retry_on: tuple[type[BaseException], ...] | None = None
    timeout: float | None = None
    capture_output: bool = False
    resources: Needs = ()
    priority: int = 0

    def retries(self, kind: type[BaseException]) -> bool:
        """Tell whether a task is tried again upon an exception of that class."""
        return self.retry_on is None or issubclass(kind, self.retry_on)


_READERS: dict[str, Callable[[object], Any]] = {
    "workdir": _directory,
    "logdir": _directory,
    "task_construct": _construct,
    "callback_host": _host,
    "max_concurrent": _count,
    "max_tasks_per_child": _tasks,
    "stop_on_exception": _flag,
    "timeout": _timeout,
    "capture_output": _flag,
    "sleep_between_loops": _seconds,
    "lease_seconds": _lease,
    "linger": _linger,
    "strict_recovery": _flag,
    "schema": _schema,
    "on_transition": _hooks,
    "max_attempts": _attempts,
    "retry_delay": read_delay,
    "retry_backoff": _factor,
    "retry_jitter": read_delay,
    "retry_on": _exceptions,
    "priority": _integer,
}


ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "max_attempts": ("retries", "max_retries", "tries", "max_tries", "stop", "stop_after_attempt"),
    "retry_delay": ("retry_delay_seconds", "default_retry_delay", "wait", "wait_fixed"),
    "retry_backoff": ("retry_exponential_backoff", "wait_exponential"),
    "retry_jitter": ("retry_jitter_factor", "wait_random"),
    "retry_on": ("autoretry_for", "retry_condition_fn", "retry_if_exception_type"),
    "timeout": ("timeout_seconds", "execution_timeout", "time_limit", "soft_time_limit"),
    "capture_output": ("log_prints",),
    "resources": ("cpu", "cpus", "gpu", "gpus", "memory", "pool", "pool_slots"),
    "priority": ("priority_weight",),
}
"""For keys of a step's config, what other engines (Airflow, Celery, Prefect, tenacity) call it."""


_FOR_PROCESSES = ("timeout", "capture_output")
"""What a step cannot have that runs in no process of eventor's own."""


def read_config(given: Mapping[str, Any]) -> Config:
    """Return the Eventor config that a program gave.

    Raises:
        ConfigError: an unknown key or an unusable value, named.
    """
    known = [key.name for key in fields(Config)]
    return Config(**_read(given, "Eventor's config", known, resources=_amounts))


def read_step_config(given: Mapping[str, Any], step: str, config: Config) -> StepConfig:
    """Return the config that a program gave to the step of that name.

    Args:
        given: the keys and values.
        step: the step's name.
        config: the Eventor's, with which it has to agree.

    Raises:
        ConfigError: an unknown key or an unusable value, named, or one that needs a process.
    """
    known = [key.name for key in fields(StepConfig)]
    owner = f"the config of step {step!r}"
    read = StepConfig(**_read(given, owner, known, resources=_needs))
    for name, much in read.resources:
        if name not in config.resources:
            near = _nearest(name, config.resources)
            raise ConfigError(
                f"resources in {owner} asks for {name!r}, and there is no such resource; expected "
                f"one of those in Eventor's config ({_listed(config.resources)})"
                + (f"; did you mean {near!r}?" if near else "")
            )
        there = config.resources[name]
        if much > there:
            raise ConfigError(
                f"resources in {owner} asks for {much} of {name!r}; expected at most {there}, "
                f"of which the resources in Eventor's config tell ({_listed(config.resources)})"
            )
    for key in _FOR_PROCESSES:
        if getattr(read, key) and not is_process(config.task_construct):
            raise ConfigError(
                f"{key} in {owner} is {given[key]!r}, and the task_construct "
                f"{_name_of(config.task_construct)} runs it "
                "in no process of its own; take a class of processes, such as "
                f"multiprocessing.Process, or leave {key} out"
            )
    return read


def is_process(worker: object) -> bool:
    """Tell whether a worker, or a class of them, is a process of its own, and no thread."""
    return hasattr(worker, "sentinel")


def _name_of(construct: object) -> str:
    """Return how a class, a function or an executor is called in a message."""
    kind = construct if hasattr(construct, "__qualname__") else type(construct)
    return f"{kind.__module__}.{kind.__qualname__}"


def read_executor(made: object, factory: Callable[[], object]) -> Executor:
    """Return what a factory has made.

    Raises:
        ConfigError: it is no executor, or one of interpreters.
    """
    expected = "a concurrent.futures.Executor"
    if _is_of_interpreters(made):
        expected = _NO_INTERPRETERS
    elif is_executor(made):
        return made
    elif _is_client(made):
        expected += "; a Client of Dask gives one: client.get_executor()"
    raise ConfigError(
        f"task_construct in Eventor's config is {factory!r}, which returned {made!r}; "
        f"expected {expected}"
    )


def _listed(amounts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {much}" for name, much in amounts.items()) or "there are none"


def read_level(given: object) -> int:
    """Return a logging level, given as a number or by its name.

    Raises:
        ConfigError: it is neither.
    """
    if _is_whole(given):
        return int(given)
    level = logging.getLevelNamesMapping().get(given) if isinstance(given, str) else None
    if level is None:
        raise ConfigError(f"logging_level is {given!r}; expected a level such as logging.INFO")
    return level


def read_run_name(given: object) -> str:
    """Return the name of a run.

    Raises:
        ConfigError: it is no str, not of printable characters, or too long.
    """
    if not isinstance(given, str) or not given.isprintable():
        raise ConfigError(f"the name is {given!r}; expected a str of printable characters")
    if (told := too_long("the name", given, LONGEST_NAME)) is not None:
        raise ConfigError(told)
    return given


def too_long(what: str, given: str, longest: int) -> str | None:
    """Say that a text has more bytes than a store can look it up by; None if it has not."""
    if (size := len(given.encode())) <= longest:
        return None
    return f"{what} is {given[:_SHOWN]!r}... of {size:,} bytes; expected {longest:,} at most"


def read_max_loops(given: object) -> int | None:
    """Return how many passes may launch something; None is no limit.

    Raises:
        ConfigError: it is neither that nor a number above 0.
    """
    if given is None or (_is_whole(given) and given > 0):
        return given
    raise ConfigError(f"max_loops is {given!r}; expected a whole number above 0, or None")


def read_progress(given: object) -> bool | None:
    """Return whether progress is shown; None is by where it would be shown.

    Raises:
        ConfigError: it is neither True, False nor None.
    """
    if given is None or isinstance(given, bool):
        return given
    raise ConfigError(f"progress is {given!r}; expected True, False, or None")


def read_word(kind: type[_E], given: object, what: str) -> _E:
    """Return the member of the enum `kind` that was given as itself or as its value.

    Raises:
        ConfigError: there is no such member; `what` names the argument.
    """
    try:
        return kind(given)  # type: ignore[call-arg]
    except ValueError:
        known = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)  # type: ignore[attr-defined]
        raise ConfigError(f"{what} is {given!r}; expected one of {known}") from None


def unknown(given: object, known: Collection[str]) -> str:
    """Say what was probably meant by a word that is none of `known`."""
    near = _nearest(given, known)
    if near:
        return f"did you mean {near!r}?"
    more = f", and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"known are {', '.join(islice(known, _LISTED))}{more}"


def _nearest(given: object, known: Collection[str]) -> str | None:
    for ours, theirs in ELSEWHERE.items():
        if given in theirs and ours in known:
            return ours
    import difflib  # noqa: PLC0415 (its import is slow, and only a mistake needs it)

    return next(iter(difflib.get_close_matches(str(given), known, n=1, cutoff=0.5)), None)


def _read(
    given: Mapping[str, Any], owner: str, known: list[str], **own_readers: Callable[[object], Any]
) -> dict[str, Any]:
    readers = _READERS | own_readers
    if not isinstance(given, Mapping):
        raise ConfigError(f"{owner} is {given!r}; expected a mapping of keys to values")
    values = {}
    for key, value in given.items():
        if key not in known:
            raise ConfigError(f"{owner} has no key {key!r}; {unknown(key, known)}")
        try:
            values[key] = readers[key](value)
        except ValueError as error:
            raise ConfigError(f"{key} in {owner} is {value!r}; expected {error}") from None
    return values
