"""An embeddable, event-driven, durable flow engine.

Register events, steps and associations with an `Eventor` and call it; its steps run in processes
of their own, and every transition is kept in one store, from which a crashed run is recovered.
"""

from typing import TYPE_CHECKING, Any

from eventor.attached import Attached, attach
from eventor.errors import (
    ConfigError,
    DefinitionError,
    DrawError,
    EventorError,
    LaunchError,
    OwnershipError,
    RecoveryError,
    ReportError,
    ResultError,
    StoreChangedError,
    StoreError,
    TriggerError,
    UsageError,
)
from eventor.eventor import Eventor
from eventor.rules.data import sequence
from eventor.rules.expr import and_, or_
from eventor.rules.flow import Event, Step
from eventor.steps.inside import CurrentStep, current
from eventor.types import (
    Attempt,
    Cause,
    CauseKind,
    Counts,
    Finding,
    FindingKind,
    Lack,
    Occurrence,
    OwnerStatus,
    PlannedTask,
    PlannedTrigger,
    Preview,
    RaisedEvent,
    Recovery,
    Run,
    RunMode,
    RunStatus,
    Sequence,
    StepReplay,
    StepTriggers,
    Task,
    TaskCounts,
    TaskStatus,
    ThingKind,
    Transition,
    TransitionKind,
    Why,
)

if TYPE_CHECKING:
    from eventor.look.draw import Graph

__version__ = "0.1.0"

__all__ = [
    "Attached",
    "Attempt",
    "Cause",
    "CauseKind",
    "ConfigError",
    "Counts",
    "CurrentStep",
    "DefinitionError",
    "DrawError",
    "Event",
    "Eventor",
    "EventorError",
    "Finding",
    "FindingKind",
    "Graph",
    "Lack",
    "LaunchError",
    "Occurrence",
    "OwnerStatus",
    "OwnershipError",
    "PlannedTask",
    "PlannedTrigger",
    "Preview",
    "RaisedEvent",
    "Recovery",
    "RecoveryError",
    "ReportError",
    "ResultError",
    "Run",
    "RunMode",
    "RunStatus",
    "Sequence",
    "Step",
    "StepReplay",
    "StepTriggers",
    "StoreChangedError",
    "StoreError",
    "Task",
    "TaskCounts",
    "TaskStatus",
    "ThingKind",
    "Transition",
    "TransitionKind",
    "TriggerError",
    "UsageError",
    "Why",
    "and_",
    "attach",
    "current",
    "or_",
    "sequence",
]


def __getattr__(name: str) -> Any:
    """Import what few programs use when it is asked for."""
    if name == "Graph":
        from eventor.look.draw import Graph  # noqa: PLC0415

        return Graph
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
