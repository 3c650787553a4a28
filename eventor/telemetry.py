"""Runs as traces of OpenTelemetry, by a hook: a span for the run, the tasks and the attempts.

- *run*: a call of `ev()`;
- *step align*: in it, a task, from the time it was ready to its end; it links to those before it;
- *attempt align*: in that, one of the times that it was started.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from eventor.errors import ConfigError
from eventor.types import CauseKind, Sequence, TransitionKind, sequence_told

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext, Tracer

    from eventor.types import Cause, Transition

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_EXCEPTION = re.compile(r"([^\W\d][\w.<>]*)(?:: |$)")
"""How the error of a task begins that is an exception."""

_ENDS = {
    TransitionKind.task_success: "success",
    TransitionKind.task_failure: "failure",
    TransitionKind.task_skipped: "skipped",
}

_Key = tuple[str, Sequence]
"""An event or a step by name, in a sequence."""


class _Waiting(NamedTuple):
    """A task that is ready: since when, and why."""

    since: int
    cause: Cause | None
    sources: tuple[SpanContext, ...]


class OpenTelemetry:
    """A hook for `on_transition` that makes a trace of each call of `ev()`.

    Each Eventor needs one of its own, if several run at the same time.

    Args:
        tracer: makes the spans; by default the one named `eventor` of the program's provider.

    Raises:
        ConfigError: the package opentelemetry-api is missing.
    """

    def __init__(self, tracer: Tracer | None = None) -> None:
        try:
            from opentelemetry import trace  # noqa: PLC0415 (it is optional)
        except ImportError as error:
            raise ConfigError(
                "eventor.telemetry needs the package opentelemetry-api, which cannot be imported "
                f"({error}); install it with pip install 'eventor[telemetry]'"
            ) from error
        self._api = trace
        self._tracer = trace.get_tracer("eventor") if tracer is None else tracer
        self._run: Span | None = None
        self._failures = 0
        self._waiting: dict[_Key, _Waiting] = {}
        self._tasks: dict[_Key, Span] = {}
        self._attempts: dict[_Key, Span] = {}
        self._begun: dict[_Key, SpanContext] = {}
        """The spans of tasks, those that have ended too, since others may link to them."""
        self._raised: dict[_Key, tuple[SpanContext, ...]] = {}
        """For each event that tasks have raised, the spans of these."""

    def __call__(self, told: Transition) -> None:
        """Begin or end the spans that a transition is about."""
        if told.name is None or told.sequence is None:
            self._heed_run(told)
            return
        key, at = (told.name, told.sequence), _nanoseconds(told.at)
        if told.kind is TransitionKind.event_raised:
            if sources := self._sources(told.cause, told.sequence):
                self._raised[key] = sources
        elif told.kind is TransitionKind.task_ready:
            sources = self._sources(told.cause, told.sequence)
            self._waiting[key] = _Waiting(at, told.cause, sources)
        elif told.kind is TransitionKind.task_active:
            self._begin_attempt(key, told, at)
        elif told.kind is TransitionKind.task_skipped:
            self._begin_task(key, told, at)
            self._end_task(key, told, at)
        else:
            self._end_attempt(key, told, at)
            if told.kind is not TransitionKind.attempt_failed:
                self._end_task(key, told, at)

    def _heed_run(self, told: Transition) -> None:
        at = _nanoseconds(told.at)
        if told.kind is TransitionKind.run_started:
            self._failures = 0
            self._run = self._tracer.start_span("run", start_time=at, attributes=_of_run(told))
            return
        for span in (*self._attempts.values(), *self._tasks.values()):
            span.set_status(self._api.StatusCode.ERROR, "it had not ended when the run did")
            span.end(at)
        self._attempts.clear()
        self._tasks.clear()
        if self._run is not None:
            self._run.set_attribute("eventor.succeeded", bool(told.succeeded))
            if told.error is not None:
                self._set_error(self._run, told.error)
            elif self._failures and not told.succeeded:
                self._run.set_status(self._api.StatusCode.ERROR, f"{self._failures} tasks failed")
            self._run.end(at)
            self._run = None

    def _begin_task(self, key: _Key, told: Transition, at: int) -> Span:
        sources = self._sources(told.cause, key[1])
        waiting = self._waiting.pop(key, _Waiting(at, told.cause, sources))
        attributes = _of_run(told) | _of_task(key)
        if waiting.cause is not None:
            attributes["eventor.cause"] = str(waiting.cause)
        span = self._tracer.start_span(
            f"step {key[0]}",
            self._within(self._run),
            attributes=attributes,
            links=[self._api.Link(source) for source in waiting.sources],
            start_time=waiting.since,
        )
        self._tasks[key] = span
        self._begun[key] = span.get_span_context()
        return span

    def _begin_attempt(self, key: _Key, told: Transition, at: int) -> None:
        task = self._tasks.get(key) or self._begin_task(key, told, at)
        attributes = _of_task(key) | {"eventor.attempt": told.attempt or 1}
        if told.pid is not None:
            attributes["process.pid"] = told.pid
        self._attempts[key] = self._tracer.start_span(
            f"attempt {key[0]}", self._within(task), attributes=attributes, start_time=at
        )

    def _end_attempt(self, key: _Key, told: Transition, at: int) -> None:
        span = self._attempts.pop(key)
        if told.error is not None:
            self._set_error(span, told.error)
            if told.traceback is not None:
                exception = {
                    "exception.type": _type_of(told.error),
                    "exception.message": told.error.partition(": ")[2],
                    "exception.stacktrace": told.traceback,
                }
                span.add_event("exception", exception, at)
        span.end(at)

    def _end_task(self, key: _Key, told: Transition, at: int) -> None:
        span = self._tasks.pop(key)
        span.set_attribute("eventor.status", _ENDS[told.kind])
        if told.error is not None:
            self._failures += 1
            self._set_error(span, told.error)
        span.end(at)

    def _set_error(self, span: Span, error: str) -> None:
        span.set_attribute("error.type", _type_of(error))
        span.set_status(self._api.StatusCode.ERROR, error)

    def _within(self, span: Span | None) -> Any:
        return None if span is None else self._api.set_span_in_context(span)

    def _sources(self, cause: Cause | None, sequence: Sequence) -> tuple[SpanContext, ...]:
        """Return the spans of the tasks that are behind a cause."""
        if cause is None or cause.source is None:
            return ()
        if cause.kind in (CauseKind.association, CauseKind.expression):
            return self._raised.get((cause.source, sequence), ())
        if cause.kind is CauseKind.status:
            return self._of_step((cause.source, sequence))
        of_step = sequence if cause.detail is None else sequence_told(cause.detail)
        return self._of_step((cause.source, of_step))

    def _of_step(self, key: _Key) -> tuple[SpanContext, ...]:
        """Return the span of a task; of one that is ready and has none yet, those behind it."""
        if key in self._begun:
            return (self._begun[key],)
        return self._waiting[key].sources if key in self._waiting else ()


def _of_run(told: Transition) -> dict[str, Any]:
    return {
        "eventor.run_id": told.run_id,
        "eventor.recovery": told.recovery,
        "eventor.run_name": told.run_name,
    }


def _of_task(key: _Key) -> dict[str, Any]:
    return {"eventor.step": key[0], "eventor.sequence": key[1]}


def _type_of(error: str) -> str:
    """Return the exception's type; for another error what OpenTelemetry has for those."""
    found = _EXCEPTION.match(error)
    return "_OTHER" if found is None else found[1]


def _nanoseconds(at: datetime) -> int:
    return (at - _EPOCH) // timedelta(microseconds=1) * 1000
