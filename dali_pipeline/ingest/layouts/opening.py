"""Open the files of a source, wherever they lie: here, or in a store, from which they are fetched first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from dali_pipeline.ingest.containers.base import Container, open_container

_FETCH: ContextVar[Callable[[Path], Path] | None] = ContextVar("fetch", default=None)


@contextmanager
def fetching(fetch: Callable[[Path], Path] | None) -> Iterator[None]:
    """Open files within the block at the paths that `fetch` returns for theirs; None opens them where they are."""
    token = _FETCH.set(fetch)
    try:
        yield
    finally:
        _FETCH.reset(token)


def opened(path: Path) -> Container:
    """Open a file of the source, like `open_container`."""
    fetch = _FETCH.get()
    return open_container(path if fetch is None else fetch(path))
