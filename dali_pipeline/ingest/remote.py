"""Remote: raw files in a store; each file is fetched whole when it is opened, and removed after its use.

A process holds two files at most: the one in use, and the next one, which is fetched meanwhile if files are opened in order.
"""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash

from dali_pipeline.dataset.dataset import default_cache
from dali_pipeline.errors import DataError, FormatError, PipelineError, UsageError
from dali_pipeline.format.manifest import MANIFEST_NAME
from dali_pipeline.storage.stores import GoneError, Store, is_url
from dali_pipeline.storage.whole import lock

RANGE_BYTES, RANGES_IN_FLIGHT = 8 << 20, 8  # bytes and number of parallel requests, while a file is fetched


class Fetched:
    """A file that stays on the disk as long as this object lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, _remove, path, os.getpid())


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child has only a copy of the object
        path.unlink(missing_ok=True)


class Remote:
    """The objects below a URL, which are in the folder `scratch` while they are used.

    After pickling, and in a forked child, it starts again with no file fetched.

    Attributes:
        store: The store.
        scratch: Folder for fetched files.
        listed: Size in bytes and time of the last change of each object, by name.
    """

    def __init__(self, store: Store, scratch: Path, listed: dict[str, tuple[int, int]]) -> None:
        self.store, self.scratch, self.listed = store, scratch, listed
        self._process, self._newest = -1, ""
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[str, Future[Fetched]] | None = None

    def __reduce__(self) -> tuple[type[Remote], tuple[Store, Path, dict[str, tuple[int, int]]]]:
        return Remote, (self.store, self.scratch, self.listed)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Create empty files with these names for the time of the block, so that readers can find their files."""
        try:
            for name in self.listed:
                path = self.scratch / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            yield
        except OSError as error:
            raise DataError(f"{self.scratch.parent} cannot be written to ({error.strerror}); expected free space") from None
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def fetch(self, name: str, before: str | None, behind: str | None) -> Fetched:
        """Return a file, and fetch the next one in the background if files are opened in order.

        Args:
            name: Name of the file.
            before: Name of the file before it, or None.
            behind: Name of the file after it, or None. It is fetched if `name` or `before` was fetched last.

        Raises:
            FormatError: The file is gone since it was listed.
            DataError: The store fails, or the disk is full.
        """
        if self._process != os.getpid():
            self._process, self._pool, self._ahead, self._newest = os.getpid(), ThreadPoolExecutor(1), None, ""
        assert self._pool is not None
        ahead, self._ahead = self._ahead, None
        fetched = None
        if ahead is not None and ahead[0] == name:
            fetched = ahead[1].result()
        elif ahead is not None and ahead[0] == behind:
            self._ahead = ahead
        fetched = fetched or self._get(name)
        if behind is not None and self._ahead is None and self._newest in (name, before):
            self._ahead = behind, self._pool.submit(self._get, behind)
        self._newest = name
        return fetched

    def close(self) -> None:
        """Wait for the file that is being fetched."""
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool, self._ahead, self._process = None, None, -1

    def _get(self, name: str) -> Fetched:
        nbytes, _ = self.listed[name]
        path = self.scratch / str(os.getpid()) / name
        fetched = Fetched(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file, ThreadPoolExecutor(RANGES_IN_FLIGHT) as pool:
                for begin in range(0, nbytes, RANGE_BYTES * RANGES_IN_FLIGHT):  # a few at a time, because they are in memory
                    begins = range(begin, min(begin + RANGE_BYTES * RANGES_IN_FLIGHT, nbytes), RANGE_BYTES)
                    for part in pool.map(lambda first: self.store.read(name, first, min(first + RANGE_BYTES, nbytes)), begins):
                        file.write(part)
        except GoneError:
            raise FormatError(f"{self.store}/{name} is gone since it was listed; convert again") from None
        except OSError as error:
            raise DataError(f"{self.scratch.parent} cannot take {name} ({error.strerror}); free some space") from None
        return fetched


@contextmanager
def raw_files(url: str, dst: str) -> Iterator[Remote]:
    """Yield the raw files at a URL that are converted to `dst`; errors within the block name files by the URL.

    Their scratch folder is beside the caches. It is removed at the end, and at the start if a killed run left one.

    Raises:
        UsageError: The URL holds no objects, or a data set, or another run converts the same files to the same place.
        DataError: The store fails.
    """
    store = Store(url)
    listed = {name: facts for name, facts in store.listed().items() if name and not name.endswith("/")}
    if not listed:
        raise UsageError(f"{store} holds no objects; expected a folder of files to convert")
    if MANIFEST_NAME in listed:
        raise UsageError(f"{store} is a data set, not raw files; copy it to a folder to convert it anew")
    for name in listed:
        if {"..", ".", ""} & set(name.split("/")) or "\0" in name:
            raise UsageError(f"{store} holds an object named {name!r}, which no file can have; expected plain names")
    own = dst if is_url(dst) else str(Path(dst).absolute())
    folder = default_cache() / "downloads" / xxhash.xxh3_64_hexdigest(f"{store} {own}".encode())
    scratch = folder / (str(store).rpartition("/")[2] or "files")
    with _alone(folder):
        shutil.rmtree(scratch, ignore_errors=True)
        remote = Remote(store, scratch, listed)
        try:
            yield remote
        except PipelineError as error:
            raise type(error)(str(error).replace(str(scratch), str(store))) from None
        finally:
            remote.close()
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock a folder for the time of the block; raise UsageError if another process holds the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written to ({error.strerror}); set XDG_CACHE_HOME to a folder that can") from None
    try:
        try:
            lock(fd)
        except BlockingIOError:
            raise UsageError("another run converts the same files into the same place; wait for it, or stop it") from None
        yield
    finally:
        os.close(fd)
