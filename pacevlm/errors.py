"""Errors that a user can act on: each message says what was given, what is allowed and what to do."""

from __future__ import annotations


class PacevlmError(Exception):
    """Base class of every error that pacevlm raises on purpose."""


class ConfigError(PacevlmError, ValueError):
    """A setting is unknown, has the wrong type or lies outside its range."""


class KnobError(PacevlmError, ValueError):
    """A knob value is unknown to the knob space, or the model cannot run it."""


class ImageError(PacevlmError, ValueError):
    """An image cannot be read or has a shape that the model cannot take."""


class QuestionError(PacevlmError, ValueError):
    """A question is empty, too long for the model or not text."""


class BudgetError(PacevlmError, ValueError):
    """A latency budget is not a positive, finite number of milliseconds."""


class DataError(PacevlmError, ValueError):
    """A data set is missing, malformed or has no such split or example."""


class CheckpointError(PacevlmError, ValueError):
    """A checkpoint is missing, truncated, corrupt or of another format."""


class IdentityError(CheckpointError):
    """Artefacts that were made for different models, knob spaces or devices were combined."""


class ProfileError(PacevlmError, ValueError):
    """A latency profile or an estimator is missing, malformed or does not fit its use."""


class StorageError(PacevlmError, OSError):
    """A file could not be written, for example because the disk is full; nothing half-written is left."""


class MemoryLimitError(PacevlmError, MemoryError):
    """The device has too little memory for even the smallest piece of work."""


class OverloadError(PacevlmError, RuntimeError):
    """A request cannot be answered within its budget behind those that were accepted before it.

    Attributes:
        retry_after_s: seconds until a request like it would be accepted if nothing else arrived.
        soonest_budget_ms: the smallest budget that could be promised now.
    """

    def __init__(self, message: str, retry_after_s: float, soonest_budget_ms: float) -> None:
        super().__init__(message)
        self.retry_after_s, self.soonest_budget_ms = retry_after_s, soonest_budget_ms


class DeadlineError(PacevlmError, TimeoutError):
    """A request's budget was over before it could begin; it was not run."""


class WorkerError(PacevlmError, RuntimeError):
    """The process that runs requests died of this one, or could not be started."""


class RankError(PacevlmError, RuntimeError):
    """Another rank of the launch is gone, cannot be reached, or failed at what is a fault there."""
