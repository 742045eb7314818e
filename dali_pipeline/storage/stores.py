"""Store: objects behind a URL, through fsspec, with retries, and with messages free of secrets in the URL."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import xxhash

from dali_pipeline.errors import DataError, FormatError, PipelineError, UsageError

T = TypeVar("T")
TRIES, FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 7, 0.1, 5.0  # some 10 seconds until a request fails
EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError")
_REFUSED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken")


class GoneError(FormatError):
    """Error for an object that does not exist."""


class NoBucketError(GoneError):
    """Error for a bucket that does not exist."""


def is_url(root: str | os.PathLike[str]) -> bool:
    """Return whether a path names a store instead of a folder."""
    return "://" in os.fspath(root)


class Store:
    """Objects below a URL that fsspec knows: s3, gs, az, http, memory and so on. Credentials come from the environment.

    After pickling, and in a forked child, it connects again. `str` is the URL without user, password and query; no message
    contains these, nor text from a library.

    Args:
        url: The URL.

    Raises:
        UsageError: The kind of URL is unknown, or its package is missing.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        parts = urlsplit(self._url)
        if not parts.scheme:
            raise UsageError("the URL has no kind before ://; expected one such as s3://bucket/set")
        self._parts, self._connection = parts, (-1, None)
        self._shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        self._connect()

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self._url,)

    def __str__(self) -> str:
        return self._shown

    def beside(self, relative: str) -> Store:
        """Return the store at a path relative to this one, such as `../raw`; raise UsageError if it leaves the URL's host."""
        parts, steps = self._parts, list[str]()
        for step in [*parts.path.split("/"), *relative.split("/")]:
            if step == ".." and not steps:
                raise UsageError(f"{self} refers to files at {relative!r}, beyond its bucket; name their URL by files_root")
            if step == "..":
                steps.pop()
            elif step not in ("", "."):
                steps.append(step)
        path = "".join(f"/{step}" for step in steps)
        return Store(urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")))

    def _connect(self) -> Any:
        process, files = self._connection
        if process == os.getpid():
            return files
        import fsspec

        scheme, options = self._parts.scheme, {}
        if scheme == "s3":  # retried here and nowhere else; no request for an object's size before it is read
            retries = {"total_max_attempts": 1}
            options = {"config_kwargs": {"retries": retries, "max_pool_connections": 64}, "max_concurrency": 1}
        try:
            files = fsspec.filesystem(scheme, skip_instance_cache=scheme != "memory", **options)
        except ImportError:
            package = EXTRAS.get(scheme, "a package of fsspec's")
            raise UsageError(f"{self}: {scheme}:// needs {package}; pip install dali-pipeline[{scheme}]") from None
        except ValueError:
            raise UsageError(f"{self}: {scheme}:// is no kind of URL that fsspec knows; expected s3, gs, az, http …") from None
        except Exception as error:
            raise UsageError(f"{self} cannot be connected to ({type(error).__name__}); check the environment") from None
        if scheme == "s3":
            files.retries = 1
        self._connection = (os.getpid(), files)
        return files

    def _path(self, key: str) -> str:
        """Return the path for fsspec: for http a URL with its query, otherwise what follows `://`."""
        parts = self._parts
        path = f"{parts.path}/{key}" if key else parts.path
        if parts.scheme in ("http", "https"):
            return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        return f"{parts.netloc}{path}"

    def read(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        """Read bytes of an object, by default all.

        After an interrupted request, what arrived is kept and the rest requested. Raises GoneError if the object does not
        exist; DataError if the store cannot be reached, refuses, or returns other bytes.
        """
        kept = bytearray()

        def ask() -> bytes:
            files = self._connect()
            if end is None:
                return bytes(files.cat_file(self._path(key)))
            data = files.cat_file(self._path(key), start=begin + len(kept), end=end)
            if len(data) > end - begin - len(kept):
                raise UsageError(f"{self}/{key}: the server gave more than the range asked for; expected one that knows ranges")
            if len(data) == end - begin:  # nearly always: no copy
                return bytes(data)
            kept.extend(data)
            if len(kept) < end - begin:
                raise EOFError
            return bytes(kept)

        return self._retry(key, ask)

    def size(self, key: str) -> int | None:
        """Return the bytes of an object, or None if it does not exist."""
        try:
            return int(self._retry(key, lambda: self._connect().info(self._path(key), refresh=True)["size"]))
        except GoneError:
            return None

    def names(self) -> list[str]:
        """Return the names of all objects below the URL."""
        return sorted(self.listed())

    def listed(self) -> dict[str, tuple[int, int]]:
        """Return size and time of change per object below the URL.

        The size is in bytes, the time in ns; a time below 0 if the store does not report one.
        """

        def ask() -> dict[str, dict[str, Any]]:
            files = self._connect()
            files.invalidate_cache()
            return dict(files.find(self._path(""), detail=True))

        base, infos = self._path("").strip("/"), self._retry("", ask)
        by_name = {name.strip("/").removeprefix(base).strip("/"): info for name, info in infos.items()}
        return {name: (int(info.get("size") or 0), _changed(info)) for name, info in by_name.items()}

    def put(self, source: Path, key: str) -> None:
        """Upload a file; the store makes its object appear atomically."""
        self._retry(key, lambda: self._connect().put_file(str(source), self._path(key)))

    def _retry(self, key: str, ask: Callable[[], T]) -> T:
        where = f"{self}/{key}" if key else str(self)
        for turn in range(TRIES):
            try:
                return ask()
            except PipelineError:
                raise
            except FileNotFoundError as error:
                words = f"{error} {error.__cause__}".lower()
                if "nosuchbucket" in words or "bucket does not exist" in words:
                    raise NoBucketError(f"{where}: there is no such bucket; check the URL's first part") from None
                raise GoneError(f"{where} is not there") from None
            except Exception as error:
                self._raise_permanent(where, error)
                wait = min(FIRST_WAIT_SECONDS * 2**turn, LONGEST_WAIT_SECONDS)
                if turn < TRIES - 1:
                    time.sleep(wait * random.uniform(0.5, 1))
                else:
                    why = f"{type(error).__name__}, {TRIES} times"
                    raise DataError(f"{where} cannot be reached or read ({why}); check the network, then start again") from None
        raise AssertionError

    def _raise_permanent(self, where: str, error: Exception) -> None:
        """Raise DataError for an error that will not pass."""
        names = {type(cause).__name__ for cause in (error, error.__cause__, error.__context__)}
        refused = getattr(error, "status", 0) in (401, 403) or any(word in str(error) for word in _REFUSED)
        if names & set(_NO_CREDENTIALS):
            raise DataError(f"{where}: no credentials were found; set those of the store in the environment") from None
        if isinstance(error, PermissionError) or refused:
            raise DataError(
                f"{where}: access was refused; check the credentials in the environment, and their rights"
            ) from None
        if isinstance(error, NotImplementedError):
            raise UsageError(f"{where}: this kind of store cannot be written to; expected s3, gs or az") from None


def _changed(info: dict[str, Any]) -> int:
    """Return the time of change in ns, from the field that this kind of store has.

    If the time has no fraction, a hash of the ETag replaces the digits below the second. Without a time, the hash stands alone,
    below 0.
    """
    tag = xxhash.xxh3_64_intdigest(str(info.get("ETag") or info.get("etag") or "").encode())
    for name in ("LastModified", "last_modified", "updated", "mtime", "created"):
        value = info.get(name)
        if isinstance(value, str):
            value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            value = value.timestamp()
        if isinstance(value, int | float):
            return round(value * 1e9) if value % 1 else (int(value) - 1) * 10**9 + tag % 10**9
    return -1 - (tag >> 1)
