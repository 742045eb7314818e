"""Pickles of Python and of torch.save, read without running any of their code.

Tensors of torch.save are read from the file when they are used. Objects of unknown classes are kept as what the pickle says of
them, so a dataclass or a `Data` of PyG is a mapping of its attributes. Names of Python's standard library that are not data are
refused, because only a hostile file asks for them.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers.leaf import TEXT, texts_of
from dali_pipeline.ingest.containers.npy import array_leaf
from dali_pipeline.ingest.containers.objects import View
from dali_pipeline.ingest.containers.source import Source
from dali_pipeline.ingest.readers.inert import CONTAINERS, Bag, InertUnpickler
from dali_pipeline.ingest.readers.tensors import BFLOAT16, DTYPES, TORCH_NAMES, Tensor, TorchFile
from dali_pipeline.ingest.readers.traces import FROM_BUFFER, NUMPY_NAMES, RECONSTRUCT, SCALAR
from dali_pipeline.types import Array

OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how a file of torch.save before 1.6 begins
ZIP = b"PK\x03\x04"
EXPECTED = "tensors, arrays, lists, dicts, numbers, texts and plain objects"
_LARGE_MEMO = re.compile(rb"r(?=([\x00-\xff]{3}[\x01-\xff]))|p(?=0*([1-9][0-9]{7,20})\n)")  # an object numbered 2**24 or more
_STOP, _LONG_BINPUT, _PUT = b".rp"
_ARGUMENTS = {ord(operation.code): operation.arg.n if operation.arg else 0 for operation in pickletools.opcodes}
_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}  # bytes of the length before an argument
_LINES = dict.fromkeys(b"ci", 2)  # operations whose argument is of two lines
_WHAT = "a pickle"
_MOST_CLASSES = 1000
STORAGE = "torch.storage._load_from_bytes"
_REBUILD_V3 = "torch._utils._rebuild_tensor_v3"
_UNTYPED = "torch.storage.UntypedStorage"
_V3_DTYPES = {"torch.uint16": "<u2", "torch.uint32": "<u4", "torch.uint64": "<u8"}
_SIGNED = {"<u2": "torch.ShortStorage", "<u4": "torch.IntStorage", "<u8": "torch.LongStorage"}  # of as many bytes
_NAMES = {code: BFLOAT16 if code == BFLOAT16 else np.dtype(code).name for code in (*DTYPES.values(), *_V3_DTYPES.values())}
_REBUILDS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
PARAMETER = "torch._utils._rebuild_parameter"
ARRAYS = frozenset((*RECONSTRUCT, *FROM_BUFFER, *SCALAR))
TENSORS = frozenset((*_REBUILDS, _REBUILD_V3, PARAMETER))
_PYTHON2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # names in the protocols 0 to 2
_LIBRARY = frozenset(sys.stdlib_module_names) | {"exceptions", "commands", "__builtins__"}
_LIBRARY_DATA = (
    "argparse.Namespace", "types.SimpleNamespace", "collections.defaultdict", "collections.Counter", "collections.deque",
    "collections.UserDict", "copyreg._reconstructor", "builtins.object",
    "builtins.list", "builtins.dict", "builtins.int", "builtins.float", "builtins.str", "builtins.tuple", "datetime.datetime",
    "datetime.date", "datetime.time", "datetime.timedelta", "datetime.timezone", "decimal.Decimal", "fractions.Fraction",
    "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath", "uuid.UUID",
)  # fmt: skip


class Opaque(Bag):
    """Stands for an object of any class: keeps its arguments, state, and what was put into it as into a dict or a list."""

    items: dict[Any, Any] | None = None
    entries: list[Any] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args)
        if kwargs:
            self.items = dict(kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        if self.items is None:
            self.items = {}
        self.items[key] = value

    def append(self, value: Any) -> None:
        """Keep an item of a list."""
        if self.entries is None:
            self.entries = []
        self.entries.append(value)


def _opaque(name: str) -> type[Opaque]:
    return cast(type[Opaque], cast(Any, type(Bag))(name, (Opaque,), {"path": name}))


KNOWN: dict[str, Any] = CONTAINERS | {
    name: _opaque(name) for name in (*TORCH_NAMES, _REBUILD_V3, _UNTYPED, STORAGE, *NUMPY_NAMES, *_LIBRARY_DATA)
}  # shared by all files, since no file can change these classes


class Unpickler(InertUnpickler):
    """Reads one pickle. Objects of any class become Opaque, but names of the standard library that are not data are refused.

    Args:
        file: Open file.
        path: Its path, for messages.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file, path, (), what=_WHAT, expected=EXPECTED)
        self._known = KNOWN
        self._others: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name; raise FormatError for code of the standard library."""
        module = _PYTHON2.get(module, module)
        dotted = f"{module}.{name}"
        stand_in = KNOWN.get(dotted) or self._others.get(dotted)
        if stand_in is not None:
            return stand_in
        if module.partition(".")[0] in _LIBRARY or len(self._others) >= _MOST_CLASSES:
            return super().find_class(module, name)  # raises
        self._others[dotted] = _opaque(dotted)
        return self._others[dotted]

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that a torch pickle names; one without a dtype as bytes."""
        if isinstance(pid, tuple) and len(pid) > 1 and pid[1] is KNOWN[_UNTYPED]:
            pid = (pid[0], KNOWN["torch.ByteStorage"], *pid[2:])
        return super().persistent_load(pid)


def refuse_large_memo(source: Source, pickles: int) -> None:
    """Raise FormatError if a pickle numbers an object beyond what its bytes can hold.

    Python's unpickler would fill memory for twice as many objects as the number says, whatever the size of the file.

    Args:
        source: The bytes. Their operations are followed only if they hold the pattern of such a number.
        pickles: Number of pickles from the first byte on.
    """
    with source.mapped() as data:
        if not any(_memo_number(found) > source.size for found in _LARGE_MEMO.finditer(data)):
            return
        try:
            number = _largest_memo(data, pickles)
        except (IndexError, KeyError, ValueError):
            raise FormatError(f"{source.path} cannot be read as a pickle: truncated, or something else") from None
        if number > source.size:
            raise FormatError(f"{source.path} was refused: it numbers an object {number}; expected at most {source.size}")


def _largest_memo(data: bytes | mmap.mmap, pickles: int) -> int:
    """Return the largest number that pickles give an object; raise IndexError, KeyError or ValueError for a broken one."""
    position, largest = 0, 0
    for _ in range(pickles):
        operation = 0
        while operation != _STOP:
            operation = data[position]
            position += 1
            nbytes = _ARGUMENTS[operation]
            if nbytes >= 0:
                if operation == _LONG_BINPUT:
                    largest = max(largest, int.from_bytes(data[position : position + 4], "little"))
                position += nbytes
            elif nbytes in _LENGTHS:
                begin = position + _LENGTHS[nbytes]
                position = begin + int.from_bytes(data[position:begin], "little")
            else:
                for _ in range(_LINES.get(operation, 1)):
                    begin, position = position, data.find(b"\n", position) + 1
                    if not position:
                        raise ValueError("no end of a line")
                if operation == _PUT:
                    largest = max(largest, int(data[begin : position - 1]))
    return largest


def _memo_number(found: re.Match[bytes]) -> int:
    return int(found[2]) if found[1] is None else int.from_bytes(found[1], "little")


class TorchContent(TorchFile):
    """A file of torch.save inside a source, which may be memory. Like `TorchFile`, with objects of any class."""

    def __init__(self, source: Source) -> None:
        self.path = source.path
        self._bytes = source
        try:
            with source.file() as file:
                self.content = self._read_zip(file) if source.read(0, 1) == ZIP[:1] else self._read_old(file)
        except (OSError, ValueError, TypeError, OverflowError) as error:  # of sizes that no file has
            raise FormatError(f"{self.path} cannot be read as a file of torch.save ({error}): truncated or damaged") from None

    def _unpickler(self, file: IO[bytes]) -> InertUnpickler:
        if isinstance(file, io.BytesIO) and not file.tell() and self._bytes.read(0, 1) == ZIP[:1]:
            refuse_large_memo(Source(self.path, "a pickle", file.getvalue()), 1)
        return Unpickler(file, self.path)

    def tensor(self, value: Any) -> Tensor:
        """Return the tensor that a Bag stands for, also one of the dtypes that torch has had since 2.3."""
        if not (isinstance(value, Bag) and value.path == _REBUILD_V3):
            return super().tensor(value)
        dtype = _V3_DTYPES.get(getattr(value.args[6], "path", "")) if len(value.args) > 6 else None
        storage = value.args[0]
        if dtype is None or not isinstance(storage, tuple):
            raise FormatError(f"{self.path}: found a tensor of a dtype that NumPy does not have")
        signed = (*storage[:1], KNOWN[_SIGNED[dtype]], *storage[2:])
        return replace(super().tensor(KNOWN[_REBUILDS[0]](signed, *value.args[1:6])), dtype=dtype)


class TensorView(View):
    """A tensor in a file of torch.save."""

    __slots__ = ("_tensor",)

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.shape, _NAMES[tensor.dtype])
        self._tensor = tensor

    def rows(self, begin: int, end: int) -> Array:
        """Return rows; bfloat16 as float32."""
        whole = not self.shape or (begin == 0 and end == self.shape[0])
        return (self._tensor if whole else self._tensor.rows(begin, end)).read()

    def narrow(self, axis: int, begin: int, end: int) -> TensorView:
        """Return the part from one index to another along an axis."""
        part = self._tensor
        shape = (*part.shape[:axis], end - begin, *part.shape[axis + 1 :])
        first = part.begin + begin * part.stride[axis] * part.itemsize
        return TensorView(Tensor(part.file, part.dtype, shape, part.stride, first, part.itemsize))


class ArrayView(View):
    """A NumPy array inside a pickle."""

    __slots__ = ("_array", "_path")

    def __init__(self, path: Path, array: Array) -> None:
        leaf = array_leaf("", array.shape, array.dtype)
        super().__init__(leaf.shape, leaf.dtype)
        self._path, self._array = path, array

    def rows(self, begin: int, end: int) -> Array | list[str] | str:
        """Return rows, in native byte order; texts as a list."""
        rows = self._array[begin:end] if self.shape else self._array
        if self.dtype == TEXT:
            return texts_of(self._path, "", rows)
        return rows if rows.dtype.isnative else rows.astype(rows.dtype.newbyteorder("="))


def attributes_of(value: Bag) -> dict[Any, Any] | Sequence[Any] | str | None:
    """Return the attributes of an object, or what it was filled with; None if the pickle says nothing of it."""
    state = value.state
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # of a class with __slots__
        state = {**(state[0] if isinstance(state[0], dict) else {}), **state[1]}
    if value.path.startswith("torch_geometric.") and isinstance(state, dict):
        return _of_pyg(state)
    if isinstance(value, Opaque) and (value.items is not None or value.entries is not None):
        return value.entries if value.items is None else value.items
    if isinstance(state, dict):
        return state
    if value.path.startswith("pathlib.") and all(isinstance(part, str) for part in value.args):
        return "/".join(value.args)
    if value.path in ("torch.Size", "collections.Counter") and value.args and isinstance(value.args[0], dict | list | tuple):
        return value.args[0]
    return None


def _of_pyg(state: dict[Any, Any]) -> dict[Any, Any]:
    """Return the attributes of a `Data` of PyG: from its store since PyG 2.0, from the object itself before."""
    store = state.get("_store")
    own = store.state if isinstance(store, Bag) and isinstance(store.state, dict) else {}
    mapping = own.get("_mapping")
    fields = {**mapping, "_num_nodes": own.get("_num_nodes")} if isinstance(mapping, dict) else state
    return {key: part for key, part in fields.items() if part is not None}


def describe(value: Any) -> str:
    """Return a short description of an object of a pickle."""
    if isinstance(value, Bag):
        return f"an object of {value.path[:99]}"
    return value.path[:99] if isinstance(value, type) and issubclass(value, Bag) else type(value).__name__
