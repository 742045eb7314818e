"""Source: the files of a foreign folder, whatever their format."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from dali_pipeline.errors import FormatError, PipelineError, UsageError, needs_extra
from dali_pipeline.ingest.foreign import Block, ForeignFile, Reader, Values, files_named, list_files
from dali_pipeline.ingest.own import OWN
from dali_pipeline.ingest.readers.npz import NPZ
from dali_pipeline.ingest.readers.pt import PT
from dali_pipeline.ingest.readers.traces import TraceOptions, traces_reader
from dali_pipeline.ingest.remote import Fetched, Remote

COMPANIONS = {"dataset_info.json", "dataset_dict.json", "state.json"}
STRETCH_BYTES = 512 << 20  # of source files that are final together, and that one worker takes


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a foreign folder, in order, and the reader that opens them. sizes, times: bytes of each, and when it
    was last changed, in ns; -1 where that cannot be told. remote: where the files lie in a store; `files` is what they are
    called then, and nothing is there. not_taken: names of the folder's other files, of which no reader knows the format."""

    root: Path
    reader: Reader
    files: list[Path]
    sizes: list[int]
    times: list[int]
    remote: Remote | None = None
    not_taken: tuple[str, ...] = ()

    @classmethod
    def find(cls, root: Path, traces: TraceOptions | None = None, remote: Remote | None = None) -> Source:
        """Recognises the format. Raises UsageError where the folder holds nothing that can be read, or two formats."""
        readers = _readers(traces or TraceOptions())
        with nullcontext() if remote is None else remote.placed():
            if not root.exists():
                raise UsageError(f"{root} is not a folder; expected one with files to convert, or such a file")
            try:
                every, again = list_files(root)
            except OSError as error:
                raise UsageError(
                    f"{error.filename} cannot be listed ({error.strerror}); expected folders that can be read"
                ) from None
            found = {reader.what: (reader, files) for reader in readers if (files := reader.find(root, every))}
        if not found:
            raise UsageError(
                f"{root} holds no {' nor '.join(reader.what for reader in readers)}; expected at least one such file"
            )
        if len(found) > 1:
            raise UsageError(f"{root} holds {' and '.join(found)}; expected one format, so convert each folder alone")
        ((reader, files),) = found.values()
        stats = [_stat(path) if remote is None else remote.listed[path.relative_to(root).as_posix()] for path in files]
        sizes, times = ([one[column] for one in stats] for column in (0, 1))
        left = [path.relative_to(root) for path in (*every, *again) if reader is not OWN] if root.is_dir() else []
        taken = {path.relative_to(root) for path in files} if left else set()
        not_taken = tuple(str(name) for name in left if name not in taken and not _is_companion(name))
        return cls(root=root, reader=reader, files=files, sizes=sizes, times=times, remote=remote, not_taken=not_taken)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(max(size, 0) for size in self.sizes)

    @property
    def folders(self) -> list[Path]:
        """What a machine must see to open them."""
        return [] if self.remote is not None else [self.root]

    @cached_property  # asked for with every file
    def names(self) -> list[str]:
        """Paths within the folder."""
        names = (path.relative_to(self.root).as_posix() if path != self.root else path.name for path in self.files)
        return [name.encode("utf-8", "backslashreplace").decode() for name in names]

    @cached_property
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
        path, name, here = self.files[number], self.names[number], self._fetched(number)
        at = path if here is None else here.path
        with _named(path, at):
            file = self.reader.open(at, name.removesuffix("".join(path.suffixes[-1:])))
        return replace(file, path=path, values=partial(_named_values, path, at, file.values, here))

    def _fetched(self, number: int) -> Fetched | None:
        """A file of a store, here as long as this is held; the next one of its stretch is on its way."""
        if self.remote is None:
            return None
        stretch = next(each for each in self.stretches if number in each)
        known = {at: self.files[at].relative_to(self.root).as_posix() for at in range(number - 1, number + 2) if at in stretch}
        return self.remote.fetch(known[number], known.get(number - 1), known.get(number + 1))

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

    def check_file(self, number: int) -> None:
        """Raises FormatError where a file is not the one that was found: a machine may have a folder of its own there."""
        if self.remote is None and _stat(self.files[number]) != (self.sizes[number], self.times[number]):
            raise FormatError(f"{self.files[number]} has another size or date on {socket.gethostname()}; convert again")

    def check_unchanged(self) -> None:
        """Raises FormatError for a file that changed since they were found."""
        listed = None if self.remote is None else self.remote.store.listed()
        for path, size, time in zip(self.files, self.sizes, self.times, strict=True):
            now = _stat(path) if listed is None else listed.get(path.relative_to(self.root).as_posix())
            if now != (size, time):
                raise FormatError(f"{path} changed while it was converted; convert again")


def _is_companion(name: Path) -> bool:
    """Whether a file is none of the data: hidden, or what Hugging Face `datasets` writes beside them."""
    hidden = any(part.startswith(".") for part in name.parts)
    return hidden or name.name in COMPANIONS or (name.name.startswith("cache-") and name.suffix == ".arrow")


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # gone, or a link that leads nowhere: who opens it says so
        return -1, -1
    return found.st_size, found.st_mtime_ns


@contextmanager
def _named(path: Path, at: Path) -> Iterator[None]:
    """Whatever a foreign file makes a reader stumble over becomes a sentence with its name, wherever it lies just now."""
    try:
        yield
    except PipelineError as error:
        told = str(error).replace(str(at), str(path))
        if told == str(error) and str(path) in told:
            raise
        raise type(error)(told if str(path) in told else f"{path}: {told}") from None
    except Exception as error:
        reason = str(error).replace(str(at), str(path)).strip().split("\n")[0][:120]
        raise FormatError(f"{path} is not what its format asks for ({type(error).__name__}: {reason})") from error


def _named_values(
    path: Path, at: Path, values: Callable[[], Iterator[Values | Block]], here: Fetched | None
) -> Iterator[Values | Block]:
    with _named(path, at):
        yield from values()
    del here  # held until now


def _readers(traces: TraceOptions) -> tuple[Reader, ...]:
    columns = partial(files_named, patterns=("*.parquet", "*.arrow"), skip="cache-")
    tables = Reader(what="*.parquet or *.arrow", find=columns, open=_open_columns)
    return PT, traces_reader(traces), NPZ, tables, OWN


def _open_columns(path: Path, name: str) -> ForeignFile:
    with needs_extra("tables", f"{path}: reading a table"):
        from dali_pipeline.ingest.readers.columns import open_file  # pyarrow takes a quarter of a second to import

    return open_file(path, name)
