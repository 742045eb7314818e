"""Source: the files of a foreign folder, whatever their format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from dali_pipeline.ingest.foreign import Block, ForeignFile, Reader, Values, files_named
from dali_pipeline.ingest.npz import NPZ
from dali_pipeline.ingest.own import OWN
from dali_pipeline.ingest.pt import PT
from dali_pipeline.ingest.traces import TraceOptions, traces_reader
from dali_pipeline.schema import FormatError, PipelineError, UsageError

STRETCH_BYTES = 512 << 20  # of source files that are final together, and that one worker takes


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a foreign folder, in order, and the reader that opens them. sizes, times: bytes of each, and when it
    was last changed, in ns; -1 where that cannot be told."""

    root: Path
    reader: Reader
    files: list[Path]
    sizes: list[int]
    times: list[int]

    @classmethod
    def find(cls, root: Path, traces: TraceOptions | None = None) -> Source:
        """Recognises the format. Raises UsageError where the folder holds nothing that can be read, or two formats."""
        if not root.exists():
            raise UsageError(f"{root} is not a folder; expected one with files to convert, or such a file")
        readers = _readers(traces or TraceOptions())
        found = {reader.what: (reader, files) for reader in readers if (files := reader.find(root))}
        if not found:
            raise UsageError(
                f"{root} holds no {' nor '.join(reader.what for reader in readers)}; expected at least one such file"
            )
        if len(found) > 1:
            raise UsageError(f"{root} holds {' and '.join(found)}; expected one format, so convert each folder alone")
        ((reader, files),) = found.values()
        found_stats = [_stat(path) for path in files]
        return cls(
            root=root, reader=reader, files=files, sizes=[one[0] for one in found_stats], times=[one[1] for one in found_stats]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(max(size, 0) for size in self.sizes)

    @property
    def names(self) -> list[str]:
        """Paths within the folder."""
        names = (path.relative_to(self.root).as_posix() if path != self.root else path.name for path in self.files)
        return [name.encode("utf-8", "backslashreplace").decode() for name in names]

    @property
    def stretches(self) -> list[range]:
        """The numbers of consecutive files, cut where they come to STRETCH_BYTES."""
        cuts, nbytes = [0], 0
        for number, size in enumerate(self.sizes):
            if nbytes and nbytes + size > STRETCH_BYTES:
                cuts.append(number)
                nbytes = 0
            nbytes += max(size, 0)
        return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(self.files)], strict=True)]

    def open(self, number: int) -> ForeignFile:
        """One file. Raises FormatError where it, or later one of its records, is not what it says, whatever went wrong."""
        path, name = self.files[number], self.names[number]
        with _named(path):
            file = self.reader.open(path, name.removesuffix("".join(path.suffixes[-1:])))
        return replace(file, values=partial(_named_values, path, file.values))

    def told(self, error: Exception) -> str:
        """An error's words without the folder's own path, which differs from machine to machine."""
        return str(error).replace(f"{self.root}/", "").replace(str(self.root), self.root.name)

    def check_older(self, made: Path) -> None:
        """Raises UsageError for a file that changed after `made` was made of them: as `make` would see it."""
        changed = [path for path, time in zip(self.files, self.times, strict=True) if time > made.stat().st_mtime_ns]
        if changed:
            raise UsageError(
                f"{changed[0]} is newer than {made.parent}, which was made of it; remove {made.parent}, choose another folder, "
                f"or, if only the date is new, `touch {made}`"
            )

    def check_unchanged(self) -> None:
        """Raises FormatError for a file that changed since they were found."""
        for path, size, time in zip(self.files, self.sizes, self.times, strict=True):
            if _stat(path) != (size, time):
                raise FormatError(f"{path} changed while it was converted; convert again")


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # gone, or a link that leads nowhere: who opens it says so
        return -1, -1
    return found.st_size, found.st_mtime_ns


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever a foreign file makes a reader stumble over becomes a sentence with its name."""
    try:
        yield
    except PipelineError as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from None
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise FormatError(f"{path} is not what its format asks for ({type(error).__name__}: {reason})") from error


def _named_values(path: Path, values: Callable[[], Iterator[Values | Block]]) -> Iterator[Values | Block]:
    with _named(path):
        yield from values()


def _readers(traces: TraceOptions) -> tuple[Reader, ...]:
    columns = partial(files_named, patterns=("*.parquet", "*.arrow"), skip="cache-")
    tables = Reader(what="*.parquet or *.arrow", find=columns, open=_open_columns)
    return PT, traces_reader(traces), NPZ, tables, OWN


def _open_columns(path: Path, name: str) -> ForeignFile:
    from dali_pipeline.ingest.columns import open_file  # pyarrow takes a quarter of a second to import

    return open_file(path, name)
