"""Tensors inside a file of torch.save, read by pread when they are used; both zip archives and the older format."""

from __future__ import annotations

import io
import math
import reprlib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.readers.inert import Bag, InertUnpickler
from dali_pipeline.ingest.readers.storedzip import Bytes, StoredZip
from dali_pipeline.types import Array

BFLOAT16 = "bfloat16"
DENSE_BYTES = 4096  # spans up to this size are read at once, even if they hold other elements too
DTYPES = {
    "torch.HalfStorage": "<f2", "torch.FloatStorage": "<f4", "torch.DoubleStorage": "<f8", "torch.BFloat16Storage": BFLOAT16,
    "torch.LongStorage": "<i8", "torch.IntStorage": "<i4", "torch.ShortStorage": "<i2", "torch.CharStorage": "<i1",
    "torch.ByteStorage": "<u1", "torch.BoolStorage": "?",
}  # fmt: skip
_PARAMETER = "torch._utils._rebuild_parameter"
_REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
TORCH_NAMES = (*DTYPES, *_REBUILD, _PARAMETER)
_OLD_MAGIC = 0x1950A86A20F9469CFC6C


class TorchFile:
    """A file of torch.save. `content` is its content with Bags instead of tensors; `tensor` resolves such a Bag.

    Opening reads the pickle and a few bytes per tensor, but no tensor.

    Args:
        path: The file.
        names: Dotted names that the pickle may use besides those of torch's tensors.

    Raises:
        FormatError: The file uses another name, or is damaged.
    """

    def __init__(self, path: Path, names: tuple[str, ...] = ()) -> None:
        self.path = path
        self._names = (*TORCH_NAMES, *names)
        self._bytes = Bytes(path, "a file of torch.save")
        self._place: Callable[[Any], tuple[int, int]]  # returns first byte and length of a storage, by its key
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                self.content = self._read_zip(file)
            elif self._bytes.read(0, 1) == b"P":  # the first byte of a zip
                raise FormatError(
                    f"{path} cannot be read as a file of torch.save: the end of the archive is missing, truncated"
                )
            else:
                self.content = self._read_old(file)

    def _read_zip(self, file: IO[bytes]) -> Any:
        archive = StoredZip(self._bytes, file)
        pickled = [name for name in archive.names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickled) != 1 or archive.compressed:
            raise FormatError(f"{self.path} is a zip, but not a file of torch.save; expected one")
        prefix = pickled[0].removesuffix("data.pkl")
        if f"{prefix}byteorder" in archive.names and archive.read(f"{prefix}byteorder") != b"little":
            raise FormatError(f"{self.path} is big-endian; expected a file written on a machine like this")
        self._place = lambda key: archive.place(f"{prefix}data/{key}")
        return self._unpickler(io.BytesIO(archive.read(pickled[0]))).load()

    def _read_old(self, file: IO[bytes]) -> Any:
        """Read the format before torch 1.6.

        It holds pickles of a magic number, a version, the system, the content and the keys of the storages; then the storages.
        """
        file.seek(0)
        if self._unpickler(file).load() != _OLD_MAGIC:
            raise FormatError(f"{self.path} is a pickle, but not a file of torch.save; expected one")
        self._unpickler(file).load(), self._unpickler(file).load()
        unpickler = self._unpickler(file)
        content, keys = unpickler.load(), self._unpickler(file).load()
        places: dict[Any, tuple[int, int]] = {}
        for key in keys if isinstance(keys, list) else []:
            begin = file.tell() + 8
            nbytes = int.from_bytes(self.read(begin - 8, 8), "little") * _dtype(self.path, unpickler.storages.get(key))[1]
            places[key] = (begin, nbytes)
            file.seek(begin + nbytes)
        self._place = places.__getitem__
        return content

    def _unpickler(self, file: IO[bytes]) -> InertUnpickler:
        return InertUnpickler(
            file, self.path, self._names, what="a file of torch.save", expected="tensors, lists, dicts and PyG Data"
        )

    def read(self, begin: int, nbytes: int) -> bytes:
        """Return `nbytes` bytes from byte `begin` on; raise FormatError if the file ends before."""
        return self._bytes.read(begin, nbytes)

    def tensor(self, value: Any) -> Tensor:
        """Return the tensor that a Bag stands for; raise FormatError for anything else, and if it exceeds its storage."""
        while isinstance(value, Bag) and value.path == _PARAMETER and value.args:
            value = value.args[0]
        if not (isinstance(value, Bag) and value.path in _REBUILD and len(value.args) >= 4):
            name = value.path if isinstance(value, Bag) else type(value).__name__
            raise FormatError(f"{self.path}: found {name}; expected a tensor")
        storage, offset, shape, stride = value.args[:4]
        dtype, itemsize = _dtype(self.path, storage)
        try:
            last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
            empty = 0 in shape
            begin, nbytes = self._place(storage[2])
            whole = all(type(number) is int for number in (offset, *shape, *stride))
            within = empty or max((last + 1) * itemsize, math.prod(shape) * itemsize) <= nbytes
            sound = whole and within and min((offset, *shape, *stride)) >= 0
        except (TypeError, ValueError, KeyError):
            sound = False
        if not sound or (len(value.args) > 6 and value.args[6]):
            raise FormatError(
                f"{self.path}: a tensor {reprlib.repr(shape)} of {dtype} is larger than its storage, or a view that only torch "
                "can resolve; save a contiguous copy"
            )
        return Tensor(self, dtype, tuple(shape), tuple(stride), begin + offset * itemsize, itemsize)


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file. begin: first byte of its first element; stride: in elements."""

    file: TorchFile
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    begin: int
    itemsize: int

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def rows(self, begin: int, end: int) -> Tensor:
        """Return some of its rows as a tensor; reads nothing."""
        first = self.begin + begin * self.stride[0] * self.itemsize
        return Tensor(self.file, self.dtype, (end - begin, *self.shape[1:]), self.stride, first, self.itemsize)

    @property
    def span(self) -> int:
        """Number of elements in the file from the tensor's first element to its last."""
        return 0 if 0 in self.shape else 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def dense(self) -> bool:
        """Whether its span holds mostly its own elements, so that one read is efficient."""
        return self.span <= 2 * math.prod(self.shape) or self.span * self.itemsize <= DENSE_BYTES

    def read(self) -> Array:
        """Read its elements; bfloat16 becomes float32, because NumPy has no bfloat16. Raises FormatError if the file ends.

        The time is linear in the size of the tensor, whatever its strides: a tensor that is not dense is read part by part
        along its longest stride.
        """
        if not self.dense:
            axis = max((axis for axis, size in enumerate(self.shape) if size > 1), key=lambda axis: self.stride[axis])
            return np.stack([self._part(axis, index).read() for index in range(self.shape[axis])], axis=axis)
        raw = self.file.read(self.begin, self.span * self.itemsize) if self.span else b""
        flat = np.frombuffer(raw, "<u2" if self.dtype == BFLOAT16 else self.dtype)
        if self.dtype == BFLOAT16:
            flat = (flat.astype("<u4") << 16).view("<f4")
        if math.prod(self.shape) == self.span and self.stride == _contiguous(self.shape):
            return flat.reshape(self.shape)
        return np.lib.stride_tricks.as_strided(
            flat, self.shape, [step * flat.itemsize for step in self.stride], writeable=False
        )

    def _part(self, axis: int, index: int) -> Tensor:
        """Return the part with an index along an axis, without that axis."""
        shape, stride = (sizes[:axis] + sizes[axis + 1 :] for sizes in (self.shape, self.stride))
        begin = self.begin + index * self.stride[axis] * self.itemsize
        return Tensor(self.file, self.dtype, shape, stride, begin, self.itemsize)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _dtype(path: Path, storage: Any) -> tuple[str, int]:
    """Return the NumPy type (or bfloat16) of a storage's elements, and the bytes per element."""
    kind = storage[1] if isinstance(storage, tuple) and len(storage) >= 5 else None
    name = DTYPES.get(getattr(kind, "path", ""))
    if name is None:
        raise FormatError(f"{path}: found {kind!r} where a tensor's storage was expected; the file is damaged")
    return name, 2 if name == BFLOAT16 else np.dtype(name).itemsize
