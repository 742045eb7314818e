"""Recent and Files: a bounded cache that threads share, and a cache of open files."""

from __future__ import annotations

import errno
import os
import resource
import threading
import weakref
from collections import OrderedDict
from typing import Any, Generic, TypeVar

from dali_pipeline.storage.cachedfile import CachedFile, Place, RemotePath
from dali_pipeline.storage.openfile import OpenFile, kind_of

_instances: weakref.WeakSet[Recent[Any, Any]] = weakref.WeakSet()
K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Thread-safe cache by key, up to a budget of cost.

    The least recently used value is evicted first; the newest always stays.

    Args:
        budget: Sum of the values' costs, at most.
    """

    def __init__(self, budget: int) -> None:
        _instances.add(self)
        self._budget_left = budget
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """Return the value, now the most recently used, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: K, value: V, cost: int = 1) -> V:
        """Store and return the value; if another thread stored one first, return that one."""
        with self._lock:
            if key in self._entries:
                return self._entries[key][0]
            self._entries[key] = (value, cost)
            self._budget_left -= cost
            while self._budget_left < 0 and len(self._entries) > 1:
                self._budget_left += self._entries.popitem(last=False)[1][1]
            return value

    def unlock(self) -> None:
        """Replace the lock in a forked child, where the thread that held it does not exist."""
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Remove all values."""
        with self._lock:
            self._budget_left += sum(cost for _, cost in self._entries.values())
            self._entries.clear()


def _unlock_all() -> None:
    for recent in _instances:
        recent.unlock()


os.register_at_fork(after_in_child=_unlock_all)


class Files:
    """Open files by path. A file stays open while a caller holds it, even if it is evicted here.

    Args:
        limit: Files kept open. Default: an eighth of what the process may open, at least 8 and at most 96, so that several
            loaders fit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit or max(8, min(96, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
        self._open: Recent[Place, OpenFile] = Recent(self.limit)

    def get(self, path: Place) -> OpenFile:
        """Return the file, open for reading; raise FormatError if it is gone, PipelineError if it cannot be opened now."""
        return self._open.get(path) or self._open.put(path, self._opened(path))

    def _opened(self, path: Place) -> OpenFile:
        try:
            try:
                return _open(path)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                self._open.clear()
                return _open(path)
        except OSError as error:
            advice = "raise `ulimit -n`" if error.errno == errno.EMFILE else "the manifest names it"
            raise kind_of(error)(f"{path} cannot be opened ({error.strerror}); {advice}") from error


def _open(path: Place) -> OpenFile:
    return CachedFile(path) if isinstance(path, RemotePath) else OpenFile(path)
