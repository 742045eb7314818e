"""Remote: raw files that lie in a store; each is fetched whole when it is opened, and gone after its use.

A process holds two at most: the one in use, and the next one, which is fetched meanwhile where files are opened in order.
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

RANGE_BYTES, RANGES_IN_FLIGHT = 8 << 20, 8  # of a file on its way


class Fetched:
    """A file that is on the disk as long as somebody holds this."""

    def __init__(self, path: Path) -> None:
        self.path = path
        weakref.finalize(self, _remove, path, os.getpid())


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # a forked child has but a copy
        path.unlink(missing_ok=True)


class Remote:
    """The objects below a URL, under `scratch` while they are used. listed: by name bytes and time of change, as the store
    tells them. Pickled, and used in a forked child, it begins anew, with nothing fetched."""

    def __init__(self, store: Store, scratch: Path, listed: dict[str, tuple[int, int]]) -> None:
        self.store, self.scratch, self.listed = store, scratch, listed
        self._process, self._newest = -1, ""
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: tuple[str, Future[Fetched]] | None = None

    def __reduce__(self) -> tuple[type[Remote], tuple[Store, Path, dict[str, tuple[int, int]]]]:
        return Remote, (self.store, self.scratch, self.listed)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Empty files of these names meanwhile, by which readers find what is theirs."""
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
        """A file; where it, or the one `before` it, was fetched last, the one `behind` is fetched meanwhile.

        Raises FormatError where it is not what was listed, DataError where the store does not do, or the disk is full.
        """
        if self._process != os.getpid():
            self._process, self._pool, self._ahead, self._newest = os.getpid(), ThreadPoolExecutor(1), None, ""
        assert self._pool is not None
        ahead, self._ahead = self._ahead, None
        found = None
        if ahead is not None and ahead[0] == name:
            found = ahead[1].result()
        elif ahead is not None and ahead[0] == behind:
            self._ahead = ahead
        found = found or self._get(name)
        if behind is not None and self._ahead is None and self._newest in (name, before):
            self._ahead = behind, self._pool.submit(self._get, behind)
        self._newest = name
        return found

    def close(self) -> None:
        """Waits for what is on its way."""
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
                for begin in range(0, nbytes, RANGE_BYTES * RANGES_IN_FLIGHT):  # some at a time, for they are in memory
                    begins = range(begin, min(begin + RANGE_BYTES * RANGES_IN_FLIGHT, nbytes), RANGE_BYTES)
                    for part in pool.map(lambda at: self.store.read(name, at, min(at + RANGE_BYTES, nbytes)), begins):
                        file.write(part)
        except GoneError:
            raise FormatError(f"{self.store}/{name} is gone since it was listed; convert again") from None
        except OSError as error:
            raise DataError(f"{self.scratch.parent} cannot take {name} ({error.strerror}); free some space") from None
        return fetched


@contextmanager
def raw_files(url: str, dst: str) -> Iterator[Remote]:
    """The raw files at a URL, on their way to `dst`, and their scratch folder, beside the caches and gone at the end; what a
    killed run left there goes first. Errors name files by the URL.

    Raises UsageError for a place without objects, or with a data set, and where another run is under way; DataError where the
    store does not do.
    """
    store = Store(url)
    listed = {name: found for name, found in store.listed().items() if name and not name.endswith("/")}
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
    """Raises UsageError where another process has the folder."""
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
