"""Store: the objects behind a URL, through fsspec; asked again where that helps, and told without what is secret in the URL."""

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
TRIES, FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 7, 0.1, 5.0  # some 10 seconds before a request is given up
EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError")
_REFUSED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken")


class GoneError(FormatError):
    """An object that is not there."""


class NoBucketError(GoneError):
    """Nor is there what should hold it."""


def is_url(root: str | os.PathLike[str]) -> bool:
    """Whether it names a store rather than a folder."""
    return "://" in os.fspath(root)


class Store:
    """What lies below a URL that fsspec knows: s3, gs, az, http, memory, …; credentials come from the environment.

    Pickled, and used in a forked child, it connects anew. Raises UsageError for a URL of an unknown kind, or whose package
    is missing. `str` is the URL without user, password and query; no message holds them, nor what a library said.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        parts = urlsplit(self._url)
        if not parts.scheme:
            raise UsageError("the URL has no kind before ://; expected one such as s3://bucket/set")
        self._parts, self._made = parts, (-1, None)
        self._told = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        self._connect()

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self._url,)

    def __str__(self) -> str:
        return self._told

    def _connect(self) -> Any:
        process, files = self._made
        if process == os.getpid():
            return files
        import fsspec

        scheme, options = self._parts.scheme, {}
        if scheme == "s3":  # asked again here, and nowhere else; an object's size not asked for before it is read whole
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
        self._made = (os.getpid(), files)
        return files

    def _path(self, key: str) -> str:
        """As fsspec takes it: a URL for http, with its query, else what is behind the kind."""
        parts = self._parts
        path = f"{parts.path}/{key}" if key else parts.path
        if parts.scheme in ("http", "https"):
            return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
        return f"{parts.netloc}{path}"

    def read(self, key: str, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes of an object, all by default; what a cut request brought is kept, and the rest asked for.

        Raises GoneError where it is not there, DataError where the store cannot be reached, refuses, or gives other bytes.
        """
        kept = bytearray()

        def ask() -> bytes:
            files = self._connect()
            if end is None:
                return bytes(files.cat_file(self._path(key)))
            data = files.cat_file(self._path(key), start=begin + len(kept), end=end)
            if len(data) > end - begin - len(kept):
                raise UsageError(f"{self}/{key}: the server gave more than the range asked for; expected one that knows ranges")
            if len(data) == end - begin:  # as nearly always: no copy
                return bytes(data)
            kept.extend(data)
            if len(kept) < end - begin:
                raise EOFError
            return bytes(kept)

        return self._again(key, ask)

    def size(self, key: str) -> int | None:
        """Bytes of an object; None where there is none."""
        try:
            return int(self._again(key, lambda: self._connect().info(self._path(key), refresh=True)["size"]))
        except GoneError:
            return None

    def names(self) -> list[str]:
        """Of all objects, below the URL."""
        return sorted(self.listed())

    def listed(self) -> dict[str, tuple[int, int]]:
        """By the name of every object below the URL its bytes, and when it was changed last, in ns; a number below 0 where that
        is not told."""

        def ask() -> dict[str, dict[str, Any]]:
            files = self._connect()
            files.invalidate_cache()
            return dict(files.find(self._path(""), detail=True))

        base, found = self._path("").strip("/"), self._again("", ask)
        told = {name.strip("/").removeprefix(base).strip("/"): one for name, one in found.items()}
        return {name: (int(one.get("size") or 0), _changed(one)) for name, one in told.items()}

    def put(self, source: Path, key: str) -> None:
        """Uploads a file; its object is there whole or not at all, as the store has it."""
        self._again(key, lambda: self._connect().put_file(str(source), self._path(key)))

    def _again(self, key: str, ask: Callable[[], T]) -> T:
        where = f"{self}/{key}" if key else str(self)
        for turn in range(TRIES):
            try:
                return ask()
            except PipelineError:
                raise
            except FileNotFoundError as error:
                said = f"{error} {error.__cause__}".lower()
                if "nosuchbucket" in said or "bucket does not exist" in said:
                    raise NoBucketError(f"{where}: there is no such bucket; check the URL's first part") from None
                raise GoneError(f"{where} is not there") from None
            except Exception as error:
                self._give_up(where, error)
                wait = min(FIRST_WAIT_SECONDS * 2**turn, LONGEST_WAIT_SECONDS)
                if turn < TRIES - 1:
                    time.sleep(wait * random.uniform(0.5, 1))
                else:
                    why = f"{type(error).__name__}, {TRIES} times"
                    raise DataError(f"{where} cannot be reached or read ({why}); check the network, then start again") from None
        raise AssertionError

    def _give_up(self, where: str, error: Exception) -> None:
        """Raises DataError for what will not be better a moment later."""
        names = {type(one).__name__ for one in (error, error.__cause__, error.__context__)}
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
    """In ns, as the kinds of store have it; an ETag's hash stands below the second where none is told, and alone, below
    0, where no time is."""
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
