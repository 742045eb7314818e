"""Source: the files of a folder in a foreign format."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dali_pipeline.errors import FormatError, PipelineError, UsageError, needs_extra
from dali_pipeline.ingest.foreign import Block, ForeignFile, Reader, Values, files_named, list_files
from dali_pipeline.ingest.layouts.labels import LabelRule, Relabelling
from dali_pipeline.ingest.layouts.opening import fetching
from dali_pipeline.ingest.layouts.recipe import Recipe
from dali_pipeline.ingest.own import OWN, opened, own_reader
from dali_pipeline.ingest.readers.npz import NPZ
from dali_pipeline.ingest.readers.pt import PT
from dali_pipeline.ingest.readers.traces import TRACES, TraceOptions, traces_reader
from dali_pipeline.ingest.remote import Fetched, Remote

if TYPE_CHECKING:
    from dali_pipeline.dataset.dataset import Dataset
    from dali_pipeline.ingest.layouts.plan import Plan

COMPANIONS = {"dataset_info.json", "dataset_dict.json", "state.json"}
FETCHED = 8  # files of a store that are here at a time while a layout is recognised
CHUNK_BYTES = 512 << 20
CHUNK_FILES = 4096  # small ones take as long to open as 512 MiB to copy
LEAST_CHUNK_BYTES = 64 << 20  # with fewer, shards would be small


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files of a foreign folder, in order, and the reader that opens them.

    Attributes:
        root: The folder, or one file.
        reader: Reader of the format.
        files: Paths of the files. With `remote` these are only names, and no such files exist.
        sizes: Size of each file in bytes; -1 if unknown.
        times: Time of the last change of each file in ns; -1 if unknown.
        remote: Store of the files, or None.
        not_taken: Names of other files in the folder, whose format no reader knows.
        plan: What a recipe makes of the files; None for a layout with a reader of its own.
        chunk_bytes: Bytes of source files per chunk, which one worker converts, and which becomes final as a whole; at least
            CHUNK_BYTES.
        files_root: Folder of the values of the source, if that is a data set in place; None for where they lay.
        relabelling: Other labels for the records of a data set; None for its own.
    """

    root: Path
    reader: Reader
    files: list[Path]
    sizes: list[int]
    times: list[int]
    remote: Remote | None = None
    not_taken: tuple[str, ...] = ()
    plan: Plan | None = None
    chunk_bytes: int = 0
    files_root: str | None = None
    relabelling: Relabelling | None = None

    @classmethod
    def find(
        cls,
        root: Path,
        traces: TraceOptions | None = None,
        remote: Remote | None = None,
        recipe: Recipe | None = None,
        *,
        skip_bad: bool = False,
        files_root: str | None = None,
        dst: Path | None = None,
    ) -> Source:
        """Recognise the format, and list the files.

        Args:
            root: The folder, or one file.
            traces: Options for reading traces.
            remote: Store of the files, or None.
            recipe: What the flags say about keys; an empty one leaves today's formats to their own readers.
            skip_bad: Whether a label without a record is left out instead of raised.
            files_root: Folder of the values of a data set in place; None for where they lay.
            dst: Folder that is written to, whose files are none of the source. Default: none.

        Raises:
            UsageError: The folder holds no known format, or several, or nothing that the recipe names.
            FormatError, DataError: Files and labels do not follow the recipe.
        """
        from dali_pipeline.ingest.layouts.known import is_of_today, plan_for  # each format imports its own modules

        readers = _readers(traces or TraceOptions(), files_root)
        with nullcontext() if remote is None else remote.placed():
            if not root.exists():
                raise UsageError(f"{root} is not a folder; expected one with files to convert, or such a file")
            try:
                all_files, repeated = list_files(root)
                if dst is not None and dst.exists() and root != dst and dst.resolve().is_relative_to(root.resolve()):
                    begin = f"{root / dst.resolve().relative_to(root.resolve())}/"
                    all_files = [path for path in all_files if not str(path).startswith(begin)]
            except OSError as error:
                raise UsageError(
                    f"{error.filename} cannot be listed ({error.strerror}); expected folders that can be read"
                ) from None
            formats = {reader.what: (reader, files) for reader in readers if (files := reader.find(root, all_files))}
            known = [what for what, (_, files) in formats.items() if remote is not None or is_of_today(what, files[0])]
            plan: Plan | None = None
            relabelling: Relabelling | None = None
            labels_alone = recipe is not None and known in ([TRACES], [OWN]) and recipe.tells_labels_alone
            if recipe and labels_alone and known == [OWN]:
                relabelling = Relabelling.of(recipe)
                formats[OWN] = own_reader(files_root, relabelling), formats[OWN][1]
            if not labels_alone and (recipe or not known):
                _refuse_keys(root, OWN in formats and bool(recipe))
                with _fetching(root, remote):
                    plan = plan_for(root, all_files, recipe or Recipe(), skip_bad=skip_bad)
        if plan is not None:
            reader = Reader(what=plan.what, find=files_named, open=plan.open)  # type: ignore[arg-type]
            formats = {reader.what: (reader, list(plan.parts))}
        if not formats:
            raise UsageError(
                f"{root} holds no {' nor '.join(reader.what for reader in readers)}, nor any other file of arrays, such as "
                ".safetensors, .npy or .h5; expected at least one"
            )
        if len(formats) > 1:
            raise UsageError(f"{root} holds {' and '.join(formats)}; expected one format, so convert each folder alone")
        ((reader, files),) = formats.values()
        stats = [_state(path, plan) if remote is None else remote.listed[path.relative_to(root).as_posix()] for path in files]
        sizes, times = [size for size, _ in stats], [time for _, time in stats]
        not_taken: tuple[str, ...] = ()
        if root.is_dir() and reader.what != OWN:
            taken = {str(path) for path in (*files, *_beside(plan))}
            names = [path.relative_to(root) for path in (*all_files, *repeated) if str(path) not in taken]
            not_taken = tuple(str(name) for name in names if not _is_companion(name))
        return cls(
            root=root,
            reader=reader,
            files=files,
            sizes=sizes,
            times=times,
            remote=remote,
            not_taken=not_taken,
            plan=plan,
            files_root=files_root,
            relabelling=relabelling,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "files": list(map(str, self.files))}  # paths cost ten times as much

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, files=list(map(Path, state["files"])))

    @property
    def own(self) -> Dataset | None:
        """The data set that is the source; None for any other source."""
        return opened(self.root, self.files_root) if self.reader.what == OWN else None

    @property
    def label_rule(self) -> LabelRule | None:
        """How labels become those of records, if a recipe says where they come from."""
        if self.relabelling is not None:
            return self.relabelling.rule
        return None if self.plan is None else self.plan.rule

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(max(size, 0) for size in self.sizes)

    @property
    def folders(self) -> list[Path]:
        """Folders that a machine must see to open the files."""
        return [] if self.remote is not None else [self.root]

    @cached_property  # used for every file
    def names(self) -> list[str]:
        """Paths of the files within the folder."""
        begin = len(self.root.as_posix().rstrip("/")) + 1 if self.root != Path() else 0
        names = (path.as_posix()[begin:] or path.name for path in self.files)
        return [name.encode("utf-8", "backslashreplace").decode() for name in names]

    @cached_property
    def chunks(self) -> list[range]:
        """Ranges of consecutive file numbers, each of at most CHUNK_BYTES, or `chunk_bytes` if that is more, or of one file.

        From LEAST_CHUNK_BYTES on, of at most CHUNK_FILES files.
        """
        return self._cut(CHUNK_FILES)

    def _cut(self, most_files: int) -> list[range]:
        most, least = max(CHUNK_BYTES, self.chunk_bytes), min(LEAST_CHUNK_BYTES, CHUNK_BYTES)
        cuts, nbytes = [0], 0
        for number, size in enumerate(self.sizes):
            if (nbytes and nbytes + size > most) or (nbytes >= least and number - cuts[-1] >= most_files):
                cuts.append(number)
                nbytes = 0
            nbytes += max(size, 0)
        return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(self.files)], strict=True)]

    @property
    def chunk_rule(self) -> str:
        """How chunks are cut, if not by their bytes alone, as they were once: an interrupted conversion has counted them."""
        return "" if self.chunks == self._cut(len(self.files)) else f" in chunks of {CHUNK_FILES} files"

    def open(self, number: int) -> ForeignFile:
        """Open a file; raise FormatError, now or while its values are read, if it does not have its format."""
        path, name, fetched = self.files[number], self.names[number], self._fetched(number)
        local_path = path if fetched is None else fetched.path
        with named(path, local_path):
            own_name = name.removesuffix(path.suffix)
            if self.plan is not None and fetched is not None:
                file = self.plan.open(path, own_name, local_path)
            else:
                file = self.reader.open(local_path, own_name)
        return replace(file, path=path, values=partial(_named_values, path, local_path, file.values, fetched))

    @property
    def is_named_outside(self) -> bool:
        """Whether every file is one record that is named by the file, and whose label lies elsewhere."""
        return self.plan is not None and self.remote is None and self.plan.is_named_outside

    def outside(self, number: int) -> tuple[str, Any]:
        """Return the name and the label of a file's one record, without opening the file; raise FormatError for no label."""
        assert self.plan is not None
        path = self.files[number]
        return self.plan.outside(path, self.names[number].removesuffix(path.suffix))

    def _fetched(self, number: int) -> Fetched | None:
        """Fetch a file from the store, if there is one, and start to fetch the next file of its chunk.

        The file stays on the disk as long as the result is referenced.
        """
        if self.remote is None:
            return None
        chunk = next(chunk for chunk in self.chunks if number in chunk)
        neighbours = [neighbour for neighbour in range(number - 1, number + 2) if neighbour in chunk]
        names = {neighbour: self.files[neighbour].relative_to(self.root).as_posix() for neighbour in neighbours}
        return self.remote.fetch(names[number], names.get(number - 1), names.get(number + 1))

    def without_root(self, error: Exception) -> str:
        """Return the words of an error without the path of the folder, which differs from machine to machine."""
        return str(error).replace(f"{self.root}/", "").replace(str(self.root), self.root.name)

    def check_older(self, manifest: Path) -> None:
        """Raise UsageError if a file is newer than a manifest, like `make` compares dates."""
        changed = [path for path, time in zip(self.files, self.times, strict=True) if time > manifest.stat().st_mtime_ns]
        if changed:
            raise UsageError(
                f"{changed[0]} is newer than {manifest.parent}, which was made of it; remove {manifest.parent}, choose another "
                f"folder, or, if only the date is new, `touch {manifest}`"
            )

    def check_file(self, number: int) -> None:
        """Raise FormatError if a file has another size or date than when it was listed, for example on another machine."""
        if self.remote is None and _state(self.files[number], self.plan) != (self.sizes[number], self.times[number]):
            raise FormatError(f"{self.files[number]} has another size or date on {socket.gethostname()}; convert again")

    def check_unchanged(self) -> None:
        """Raise FormatError if a file changed since it was listed."""
        listed = None if self.remote is None else self.remote.store.listed()
        for path, size, time in zip(self.files, self.sizes, self.times, strict=True):
            now = _state(path, self.plan) if listed is None else listed.get(path.relative_to(self.root).as_posix())
            if now != (size, time):
                raise FormatError(f"{path} changed while it was converted; convert again")


def _is_companion(name: Path) -> bool:
    """Return whether a file is no data: hidden, or written by Hugging Face `datasets` beside the data."""
    hidden = any(part.startswith(".") for part in name.parts)
    return hidden or name.name in COMPANIONS or (name.name.startswith("cache-") and name.suffix == ".arrow")


def _stat(path: Path) -> tuple[int, int]:
    try:
        stat = os.stat(str(path))  # half the time of path.stat()
    except OSError:  # gone, or a broken link; opening the file raises the error
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


@contextmanager
def _fetching(root: Path, remote: Remote | None) -> Iterator[None]:
    """Fetch the files that are opened within the block, if they are in a store; errors name them by their path in it."""
    if remote is None:
        yield
        return
    held: dict[Path, Fetched] = {}

    def fetch(path: Path) -> Path:
        if path not in held:
            while len(held) >= FETCHED:
                del held[next(iter(held))]
            held[path] = remote.fetch(path.relative_to(root).as_posix(), None, None)
        return held[path].path

    try:
        with fetching(fetch):
            yield
    except PipelineError as error:
        raise type(error)(str(error).replace(f"{root}/{os.getpid()}/", f"{root}/")) from None


def _state(path: Path, plan: Plan | None) -> tuple[int, int]:
    """Return the bytes and the last change of a file and of those that are read with it; -1 if one is gone."""
    if plan is None or not plan.has_beside:
        return _stat(path)
    stats = [_stat(path), *map(_stat, plan.parts[path].beside)]
    if (-1, -1) in stats:
        return -1, -1
    return sum(size for size, _ in stats), max(time for _, time in stats)


def _beside(plan: Plan | None) -> list[Path]:
    """Return the files that a plan reads besides those that name its parts."""
    if plan is None:
        return []
    return [*plan.used, *(path for part in plan.parts.values() if plan.has_beside for path in part.beside)]


@contextmanager
def named(path: Path, local_path: Path) -> Iterator[None]:
    """Turn every exception of a reader into an error that names the file by `path`, wherever it is stored."""
    try:
        yield
    except PipelineError as error:
        words = str(error).replace(str(local_path), str(path))
        if words == str(error) and str(path) in words:
            raise
        raise type(error)(words if str(path) in words else f"{path}: {words}") from None
    except Exception as error:
        reason = str(error).replace(str(local_path), str(path)).strip().split("\n")[0][:120]
        raise FormatError(f"{path} is not what its format asks for ({type(error).__name__}: {reason})") from error


def _named_values(
    path: Path, local_path: Path, values: Callable[[], Iterator[Values | Block]], fetched: Fetched | None
) -> Iterator[Values | Block]:
    with named(path, local_path):
        yield from values()
    del fetched  # referenced until here, so that the file stays on the disk


def _refuse_keys(root: Path, is_own: bool) -> None:
    """Raise UsageError if keys are named for a data set of ours."""
    if is_own:
        raise UsageError(
            f"{root} is a data set, whose fields have names; --sequence, --label and the like are not for it, but "
            "--labels-from FILE:ID:LABEL is"
        )


def _readers(traces: TraceOptions, files_root: str | None) -> tuple[Reader, ...]:
    columns = partial(files_named, patterns=("*.parquet", "*.arrow"), skip="cache-")
    tables = Reader(what="*.parquet or *.arrow", find=columns, open=_open_columns)
    return PT, traces_reader(traces), NPZ, tables, own_reader(files_root)


def _open_columns(path: Path, name: str) -> ForeignFile:
    with needs_extra("tables", f"{path}: reading a table"):
        from dali_pipeline.ingest.readers.columns import open_file  # pyarrow takes a quarter of a second to import

    return open_file(path, name)
