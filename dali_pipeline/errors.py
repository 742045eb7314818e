"""Errors of the library, each with a message of one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PipelineError(Exception):
    """Base of all errors with a message for the user: one sentence that says what is wrong, where, and what was expected.

    It is raised itself if neither the data nor the call is at fault, for example for a full disk or a worker that died.
    """


class FormatError(PipelineError):
    """A file is not what it claims to be: a damaged or truncated shard, a manifest, or foreign input."""


class DataError(PipelineError):
    """The data are readable, but not what was asked for, for example a kind or feature statistics that they do not have."""


class UsageError(PipelineError, ValueError):
    """An argument makes no sense; the caller can correct it without touching the data.

    It is also a ValueError.
    """


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Turn a missing package inside the block into a UsageError that says which extra installs it.

    Args:
        extra: Name of an extra in pyproject.toml, such as "graphs".
        purpose: What needs the package: the first words of the sentence.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0]
        raise UsageError(f"{purpose} needs {package}, which is not installed: pip install 'dali-pipeline[{extra}]'") from None
