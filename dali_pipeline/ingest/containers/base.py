"""Container: the view that all families share, and the choice of the family for a file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from dali_pipeline.errors import FormatError, needs_extra
from dali_pipeline.ingest.containers.leaf import BFLOAT16, OBJECT, TEXT, Leaf
from dali_pipeline.types import Array

if TYPE_CHECKING:
    from dali_pipeline.ingest.containers.source import Extent

__all__ = ["BFLOAT16", "OBJECT", "TEXT", "Container", "Leaf", "extent_of", "is_container", "open_container"]

_HERE = __name__.rpartition(".")[0]
_FAMILIES = {  # suffix: module and class
    ".safetensors": ("safetensor", "SafetensorsContainer"),
    ".npy": ("npy", "NpyContainer"),
    ".npz": ("npy", "NpzContainer"),
    ".memmap": ("raw", "RawContainer"),
    ".bin": ("raw", "RawContainer"),
    ".dat": ("raw", "RawContainer"),
    ".raw": ("raw", "RawContainer"),
    ".pt": ("pickled", "PickleContainer"),
    ".pth": ("pickled", "PickleContainer"),
    ".ckpt": ("pickled", "PickleContainer"),
    ".pkl": ("pickled", "PickleContainer"),
    ".pickle": ("pickled", "PickleContainer"),
    ".h5": ("hdf5", "Hdf5Container"),
    ".hdf5": ("hdf5", "Hdf5Container"),
    ".parquet": ("table", "TableContainer"),
    ".arrow": ("table", "TableContainer"),
    ".jsonl": ("text", "LinesContainer"),
    ".json": ("text", "JsonContainer"),
    ".csv": ("text", "CsvContainer"),
}
SUFFIXES = tuple(_FAMILIES)
GZIP = ".gz"  # may follow any of the suffixes


class Container(Protocol):
    """A file that holds arrays.

    Attributes:
        path: The file or, for a data set saved by Hugging Face `datasets`, its folder.
        records: None if the file is one mapping of keys. Otherwise its top level is a list of records, or a dict of them by id:
            the records' names (keys of the dict as text, or "0", "1", ...). Then `leaves` describes the first record.
    """

    path: Path
    records: Sequence[str] | None

    def leaves(self, record: int = 0) -> list[Leaf]:
        """Return all leaves of the file, or of one of its records, in the file's order, without reading array data."""
        ...

    def read(self, key: str, begin: int = 0, end: int | None = None, record: int | None = None) -> Array | list[str] | str:
        """Return rows of a leaf.

        Args:
            key: Key of the leaf.
            begin: First row, along the first axis. A scalar has no rows: it is returned whole.
            end: Row after the last one. Default: all rows.
            record: Number of the record, 0 or more. None if the file has no records; if it has, None stands for all of them,
                and begin and end are numbers of records.

        Returns:
            The rows, in the dtype of the file; bfloat16 as float32, with equal values. Texts as str or list of str. Of several
            records: their values, stacked.

        Raises:
            FormatError: The key or the record does not exist, the leaf cannot be taken, or the file is damaged.
        """
        ...

    def close(self) -> None:
        """Close the file; no rows can be read afterwards."""
        ...


def extent_of(container: Container, key: str) -> Extent | None:
    """Return where a leaf lies in the file as it lies in memory; None if it does not, as in every pickled or packed file."""
    family = getattr(container, "extent", None)  # families whose files never hold plain arrays have none
    return None if family is None else cast("Extent | None", family(key))


def suffix_of(name: str) -> str:
    """Return the suffix of a file name that decides on the family, in lower case and without a final .gz."""
    dot_at = name.rfind(".")
    if name[dot_at:] in _FAMILIES and dot_at > 0 and name[dot_at - 1] != "/":  # nearly always; a folder may have a million
        return name[dot_at:]
    stem, dot, suffix = name.lower().removesuffix(GZIP).rpartition(".")
    return f".{suffix}" if dot and stem and not stem.endswith("/") else ""


def is_container(path: Path) -> bool:
    """Return whether the name is one that `open_container` knows; reads nothing."""
    return suffix_of(path.name) in _FAMILIES


def open_container(path: Path) -> Container:
    """Open a file, or a folder saved by Hugging Face `datasets`.

    Args:
        path: The file; its suffix decides how it is read.

    Raises:
        FormatError: The name has no suffix that is known, or the file is damaged or not what its name says.
        UsageError: The format needs an extra that is not installed.
    """
    suffix = suffix_of(path.name)
    if suffix in _FAMILIES:
        module, name = _FAMILIES[suffix]
        if module == "raw" and _is_torch(path):
            module, name = _FAMILIES[".pt"]
    elif path.is_dir():
        module, name = "table", "TableContainer"
    else:
        raise FormatError(f"{path} is none of {', '.join(SUFFIXES)}, optionally with {GZIP}; expected a file of arrays")
    with needs_extra("tables", f"{path}: reading a table") if module == "table" else nullcontext():
        family: Any = getattr(import_module(f"{_HERE}.{module}"), name)
    return cast(Container, family(path))


def _is_torch(path: Path) -> bool:
    """Return whether a file such as pytorch_model.bin is one of torch.save: no JSON describes it, and it begins like one."""
    raw = import_module(f"{_HERE}.raw")
    if raw.sidecar_of(path) is not None:
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"PK\x03\x04", b"\x80\x02\x8a\n")
    except OSError:
        return False
