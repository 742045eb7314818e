"""The errors that name what is wrong."""

from __future__ import annotations


class PipelineError(Exception):
    """Any error with a message for the user: one sentence that says what is wrong, where, and what was expected."""


class FormatError(PipelineError):
    """A file is not what it says: shard, manifest or foreign input."""


class DataError(PipelineError):
    """The data are readable, but not what was asked for."""


class UsageError(PipelineError, ValueError):
    """An argument makes no sense: the caller can mend it without touching the data."""
