"""What can go wrong: every error that eventor raises of its own is an `EventorError`."""


class EventorError(Exception):
    """The root of all errors raised by eventor.

    The message names what was given, what was expected, and what to do.
    """


class ConfigError(EventorError):
    """An argument or a config key of Eventor or of a step is unknown, or its value unusable."""


class DefinitionError(EventorError):
    """An event, expression, step or association cannot be defined as it was given."""


class TriggerError(EventorError):
    """An event cannot be triggered, or looked up, as it was asked for."""


class ResultError(EventorError):
    """The result of a step that is asked for does not exist, or cannot be had here."""


class StoreError(EventorError):
    """The store cannot be opened, read or written, or what it holds cannot be used."""


class StoreChangedError(StoreError):
    """A store that was at rest has been written while it was looked at; look again."""


class RecoveryError(EventorError):
    """There is no such run or recovery to recover from, or to attach to."""


class UsageError(EventorError):
    """An Eventor is used where it cannot work: closed, already running, or in another process."""


class LaunchError(EventorError):
    """No process or executor can be had by which steps would run."""


class OwnershipError(EventorError):
    """The run has another live owner, or another owner has taken it over."""


class ReportError(EventorError):
    """A report of a run cannot be made: what writes it is not installed."""


class DrawError(EventorError):
    """A graph cannot be drawn or written as it was asked for, or what draws it is not installed."""
