"""Files of torch.save and pickles as containers; (data, slices) of PyG's InMemoryDataset as records."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers.objects import Lazy, ObjectContainer
from dali_pipeline.ingest.containers.source import Source
from dali_pipeline.ingest.containers.unpickled import (
    ARRAYS,
    KNOWN,
    OLD_TORCH,
    PARAMETER,
    STORAGE,
    TENSORS,
    ZIP,
    ArrayView,
    TensorView,
    TorchContent,
    Unpickler,
    attributes_of,
    describe,
    refuse_large_memo,
)
from dali_pipeline.ingest.readers.inert import Bag
from dali_pipeline.ingest.readers.tensors import Tensor
from dali_pipeline.ingest.readers.traces import to_array


class PickleContainer(ObjectContainer):
    """A pickle or a file of torch.save; its first bytes decide which, whatever its name."""

    def __init__(self, path: Path) -> None:
        self._source = Source(path, "a file of torch.save or a pickle")
        self._torch: TorchContent | None = None
        self._storages: dict[int, TorchContent] = {}
        self._views: dict[int, TensorView] = {}  # by identity of objects of the content, which lives as long
        head = self._source.read(0, min(len(OLD_TORCH), self._source.size))
        if head[:1] == ZIP[:1]:
            if head[: len(ZIP)] != ZIP:
                raise FormatError(f"{path} cannot be read as a file of torch.save or a pickle: it is something else")
            self._torch = TorchContent(self._source)
            content = self._torch.content
        elif head == OLD_TORCH:
            refuse_large_memo(self._source, 5)
            self._torch = TorchContent(self._source)
            content = self._torch.content
        else:
            refuse_large_memo(self._source, 1)
            with self._source.file() as file:
                content = Unpickler(file, path).load()
                if file.read(1):
                    raise FormatError(f"{path} holds more than one pickle; expected one")
        self.path = path
        sliced = self._sliced(content)
        super().__init__(path, content if sliced is None else sliced, self._stands_for, describe, self._source.size)

    def close(self) -> None:
        """Close the file, and forget its content."""
        super().close()
        self._torch = None
        self._storages.clear()
        self._views.clear()
        self._source.close()

    def _stands_for(self, value: Any) -> Any:
        """Return the array, mapping or list that an object of the pickle stands for; None for an unknown one."""
        if isinstance(value, Lazy):
            return value
        if not isinstance(value, Bag):
            return None
        if value.path in TENSORS:
            view = self._views.get(id(value))
            if view is None:
                view = self._views[id(value)] = TensorView(self._tensor(value))
            return view
        if value.path in ARRAYS:
            return ArrayView(self.path, to_array(self.path, value, "fiubUS"))
        return attributes_of(value)

    def _tensor(self, value: Bag) -> Tensor:
        """Return a tensor of a file of torch.save, or of a plain pickle, where each storage is such a file as bytes."""
        while value.path == PARAMETER and value.args and isinstance(value.args[0], Bag):
            value = value.args[0]
        storage = value.args[0] if value.args else None
        if not (isinstance(storage, Bag) and storage.path == STORAGE):
            if self._torch is None:
                raise FormatError(f"{self.path}: found a tensor without its storage; the file is damaged")
            return self._torch.tensor(value)
        data = storage.args[0] if storage.args else None
        if not isinstance(data, bytes):
            raise FormatError(f"{self.path}: found a tensor without its storage; the file is damaged")
        inner = self._storages.get(id(data))
        if inner is None:
            inner = self._storages[id(data)] = self._storage(data)
        return inner.tensor(KNOWN[value.path](inner.content, *value.args[1:]))

    def _storage(self, data: bytes) -> TorchContent:
        source = Source(self.path, "the storage of a tensor", data)
        refuse_large_memo(source, 5)
        return TorchContent(source)

    def _sliced(self, content: Any) -> Lazy | None:
        """Return the records of (data, slices), what an InMemoryDataset of PyG saves; None for anything else."""
        if not (isinstance(content, tuple) and 2 <= len(content) <= 3):
            return None
        data, slices = (_plain_mapping(part) for part in content[:2])
        if data is None or not slices or not slices.keys() <= data.keys():
            return None
        bounds: dict[str, list[int]] = {}
        for key, value in slices.items():
            seen = self._stands_for(value) if isinstance(value, Bag) else None
            if not isinstance(seen, TensorView) or len(seen.shape) != 1 or seen.dtype != "int64":
                return None
            bounds[key] = seen.rows(0, seen.shape[0]).tolist()
        counts = {len(ends) - 1 for ends in bounds.values()}
        if len(counts) != 1:
            raise FormatError(f"{self.path} has slices for {sorted(counts)} records; expected one number")
        parts = {key: self._whole(key, data[key], ends) for key, ends in bounds.items()}
        nodes = data.get("_num_nodes")
        (count,) = counts

        def record(number: int) -> dict[str, Any]:
            fields = {
                key: value.narrow(axis, bounds[key][number], bounds[key][number + 1]) if axis >= 0 else value[number]
                for key, (axis, value) in parts.items()
            }
            if isinstance(nodes, list) and len(nodes) == count and "num_nodes" not in fields:
                fields["num_nodes"] = nodes[number]
            return fields

        return Lazy(count, record)

    def _whole(self, key: str, value: Any, ends: list[int]) -> tuple[int, Any]:
        """Return the axis along which an attribute of all records is joined, and the attribute; -1 for a list of values."""
        if isinstance(value, list | tuple):
            if len(value) < len(ends) - 1:
                raise FormatError(f"{self.path}, {key} has {len(value)} values for {len(ends) - 1} records")
            return -1, value
        view = self._stands_for(value)
        if not isinstance(view, TensorView) or not view.shape:
            raise FormatError(f"{self.path}, {key} is {describe(value)}; expected a tensor of all records, or a list")
        axis = len(view.shape) - 1 if "index" in key or key == "face" else 0
        rising = all(0 <= begin <= end for begin, end in itertools.pairwise(ends))
        if not rising or (ends and ends[-1] > view.shape[axis]):
            raise FormatError(f"{self.path}, {key}: slices do not fit its shape {list(view.shape)}; expected rising numbers")
        return axis, view


def _plain_mapping(value: Any) -> dict[Any, Any] | None:
    seen = attributes_of(value) if isinstance(value, Bag) else value
    return seen if isinstance(seen, dict) else None
