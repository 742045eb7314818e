"""The errors that name what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PipelineError(Exception):
    """Any error with a message for the user: one sentence that says what is wrong, where, and what was expected."""


class FormatError(PipelineError):
    """A file is not what it says: shard, manifest or foreign input."""


class DataError(PipelineError):
    """The data are readable, but not what was asked for."""


class UsageError(PipelineError, ValueError):
    """An argument makes no sense: the caller can mend it without touching the data."""


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
