"""Recent and Files: a bounded cache that threads share, and the open files kept in one."""

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

_every: weakref.WeakSet[Recent[Any, Any]] = weakref.WeakSet()
K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Values by key up to a budget of cost, the least recently used let go first; the newest always stays. Thread-safe."""

    def __init__(self, budget: int) -> None:
        _every.add(self)
        self._left = budget
        self._kept: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """The value, now the most recently used, or None."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: K, value: V, cost: int = 1) -> V:
        """Keeps the value and returns it; where another thread was first, its value stays and is returned."""
        with self._lock:
            if key in self._kept:
                return self._kept[key][0]
            self._kept[key] = (value, cost)
            self._left -= cost
            while self._left < 0 and len(self._kept) > 1:
                self._left += self._kept.popitem(last=False)[1][1]
            return value

    def unlock(self) -> None:
        """In a forked child: a thread that held the lock is not there to give it back."""
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Lets everything go."""
        with self._lock:
            self._left += sum(cost for _, cost in self._kept.values())
            self._kept.clear()


def _unlock_all() -> None:
    for one in _every:
        one.unlock()


os.register_at_fork(after_in_child=_unlock_all)


class Files:
    """Open files by path; a file stays open while a caller holds it, even if it is let go here.

    limit: kept open at a time; an eighth of what the process may open by default, 96 at most, so that several loaders fit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit or max(8, min(96, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
        self._open: Recent[Place, OpenFile] = Recent(self.limit)

    def get(self, path: Place) -> OpenFile:
        """The file, opened for reading. Raises FormatError where it is gone, PipelineError where it cannot be opened now."""
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
