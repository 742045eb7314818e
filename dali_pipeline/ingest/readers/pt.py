"""Reader of `.pt` folders: `lstm_solo/` with sequences and `gnn/` with PyG graphs, written by `torch.save`.

Stacked tensors are read row by row. No code that the pickles name is run, not even PyG's classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.format.record import Graphs
from dali_pipeline.ingest.foreign import (
    LENGTHS,
    MASKS,
    Block,
    ForeignFile,
    Reader,
    Values,
    as_text,
    check_counts,
    edges_of,
    files_named,
    real_steps,
    rows_at_a_time,
    whole_numbers,
    without_padding,
)
from dali_pipeline.ingest.readers.inert import Bag
from dali_pipeline.ingest.readers.tensors import BFLOAT16, Tensor, TorchFile
from dali_pipeline.types import Kind

FOLDERS: dict[str, Kind] = {"lstm_solo": "sequences", "gnn": "graphs"}
PATTERNS = ("batch_*.pt", "preprocessed_*.pt")
WEIGHTS = ("edge_attr", "edge_weight")  # the first of these that is present becomes edge_attr
STRIDED_BLOCKS = 64
_STORAGES = ("BaseStorage", "GlobalStorage", "NodeStorage", "EdgeStorage")
PYG_NAMES = (
    *(f"torch_geometric.data.data.{name}" for name in ("Data", "DataEdgeAttr", "DataTensorAttr")),
    *(f"torch_geometric.data.storage.{name}" for name in _STORAGES),
)


def find_files(root: Path, files: list[Path]) -> list[Path]:
    """Return the files of both folders, sequences first."""
    if root.is_file() and root.suffix == ".pt" and root.parent.name in FOLDERS:
        return [root]
    paths = []
    for folder in FOLDERS:
        prefix = f"{root / folder}/"
        below = [path for path in files if str(path).startswith(prefix) and path.parent == root / folder]
        paths += files_named(root, below, PATTERNS)
    return paths


def open_file(path: Path, name: str) -> ForeignFile:
    """Read the names and labels of a file; raise FormatError if it does not have the layout of its folder."""
    kind = FOLDERS[path.parent.name]
    file = TorchFile(path, PYG_NAMES if kind == "graphs" else ())
    content = file.content
    if isinstance(content, list) and kind == "graphs":  # a flat list of Data: one graph per record, y is its label
        records = [_fields(file, row, data) for row, data in enumerate(content)]
        labels = [_one_number(file, "y", fields.get("y")) for fields in records]
        ids = [f"{path.stem}-{row}" for row in range(len(content))]
        return ForeignFile(
            path=path,
            kinds=(kind,),
            ids=ids,
            groups=ids,
            labels=whole_numbers(path, "y", labels),
            values=_graphs(file, content),
            not_taken=_attributes_not_taken(records, {"y"}),
        )
    if not isinstance(content, dict) or not {kind, "labels", "question_ids"} <= content.keys():
        has = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        if isinstance(content, Bag):
            has = "one tensor"
        raise FormatError(f"{path} holds {has}; expected a dict with {kind}, labels and question_ids")
    labels_, questions = (_flat_list(file, field, content[field]) for field in ("labels", "question_ids"))
    values: Any = content[kind] if isinstance(content[kind], list | tuple) else file.tensor(content[kind])
    check_counts(path, **{kind: len(values), "labels": len(labels_), "question_ids": len(questions)})
    read: Callable[[], Iterator[Values | Block]]
    if kind == "sequences":
        length, mask = (next((name for name in names if name in content), None) for names in (LENGTHS, MASKS))
        taken = {kind, "labels", "question_ids", length, mask}
        lengths_and_mask = [None if name is None else _numbers(file, name, content[name]) for name in (length, mask)]
        real, sequences = real_steps(path, len(labels_), *lengths_and_mask), _sequences(file, values)
        read, not_taken = lambda: without_padding(path, sequences(), real), tuple[str, ...]()
    else:
        taken, read = {kind, "labels", "question_ids"}, _graphs(file, values)
        layers = ((row, layer) for row, record in enumerate(values) for layer in _layers_of(record))
        not_taken = _attributes_not_taken((_fields(file, row, layer) for row, layer in layers), set())
    return ForeignFile(
        path=path,
        kinds=(kind,),
        ids=None,
        groups=[as_text(path, "question_ids", question) for question in questions],
        labels=whole_numbers(path, "labels", labels_),
        step_axis="layer",
        values=read,
        not_taken=(*sorted(str(name) for name in content.keys() - taken), *not_taken),
    )


PT = Reader(what=" or ".join(f"{name}/{pattern}" for name in FOLDERS for pattern in PATTERNS), find=find_files, open=open_file)


def _sequences(file: TorchFile, values: Tensor | Sequence[Any]) -> Callable[[], Iterator[Values | Block]]:
    def read() -> Iterator[Values | Block]:
        if not isinstance(values, Tensor):
            for value in values:
                tensor = file.tensor(value)
                yield Values(tensor.read(), None, ("sequence",) if tensor.dtype == BFLOAT16 else ())
            return
        narrow = ("sequence",) if values.dtype == BFLOAT16 else ()
        step = rows_at_a_time(math.prod(values.shape[1:]) * values.itemsize)
        if not values.rows(0, min(step, len(values))).dense:  # rows lie apart: more rows at a time make longer reads
            step *= STRIDED_BLOCKS
        for begin in range(0, len(values), step):
            yield Block(values.rows(begin, min(begin + step, len(values))).read(), narrow)

    return read


def _graphs(file: TorchFile, values: Any) -> Callable[[], Iterator[Values]]:
    def read() -> Iterator[Values]:
        for row, record in enumerate(values):
            layers = [_fields(file, row, layer) for layer in _layers_of(record)]
            if not layers:
                raise FormatError(f"{file.path}, record {row}: no graphs; expected a list of PyG Data, one a layer")
            with_attr = any(_has_attr(file, layer) for layer in layers)
            parts = [_Layer(file, layer, with_attr) for layer in layers]
            narrow = [name for name in ("x", "edge_attr") if all(name in part.bfloat16 for part in parts)]
            yield Values(None, Graphs.stack(parts), tuple(narrow))

    return read


def _layers_of(record: Any) -> Sequence[Any]:
    """Return the graphs of a record, which is a list of graphs or one graph."""
    return record if isinstance(record, list | tuple) else [record]


def _attributes_not_taken(graphs: Iterable[dict[str, Any]], taken: set[str]) -> tuple[str, ...]:
    """Return the names of attributes of PyG `Data` that are not converted; of two equivalent ones, the second."""
    not_taken: set[str] = set()
    for fields in graphs:
        has = {name for name, value in fields.items() if value is not None}
        used = {"x", "edge_index" if "edge_index" in has else "adj", next((name for name in WEIGHTS if name in has), "")}
        not_taken |= has - used - taken - {"num_nodes"}
    return tuple(sorted(not_taken))


def _fields(file: TorchFile, row: int, data: Any) -> dict[str, Any]:
    """Return the attributes of a pickled `Data`: from its store since PyG 2.0, from the object itself before."""
    state = data.state if isinstance(data, Bag) and data.path == PYG_NAMES[0] else None
    store = state.get("_store") if isinstance(state, dict) else None
    fields = (store.state or {}).get("_mapping") if isinstance(store, Bag) and isinstance(store.state, dict) else state
    if not isinstance(fields, dict) or fields.get("x") is None:
        raise FormatError(f"{file.path}, record {row}: expected a list of PyG Data with x, one a layer")
    return fields


class _Layer:
    """One `Data` as arrays. bfloat16: like in `Values`.

    edge_attr (e, 1) becomes (e,). A graph without edges needs no edge_attr. If there is none, `edge_weight` takes its place, or
    the values of a dense `adj` of real numbers.
    """

    def __init__(self, file: TorchFile, fields: dict[str, Any], with_attr: bool) -> None:
        x = file.tensor(fields["x"])
        self.x, self.edge_attr, self.bfloat16 = x.read(), None, {"x"} if x.dtype == BFLOAT16 else set()
        attr = next((file.tensor(fields[name]) for name in WEIGHTS if fields.get(name) is not None), None)
        self.edge_index, values = np.zeros((2, 0), np.int64), None
        if fields.get("edge_index") is not None:
            self.edge_index = file.tensor(fields["edge_index"]).read()
        elif fields.get("adj") is not None:
            adjacency = file.tensor(fields["adj"])
            self.edge_index, values = edges_of(file.path, adjacency.read(), len(self.x))
            values = None if attr is not None or values is None else values
            if values is not None and adjacency.dtype == BFLOAT16:
                self.bfloat16.add("edge_attr")
        if with_attr and attr is not None:
            values = attr.read()
            if attr.dtype == BFLOAT16:
                self.bfloat16.add("edge_attr")
        if with_attr and values is not None:
            self.edge_attr = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
        elif with_attr and not self.edge_index.shape[1]:
            self.edge_attr = np.zeros(0, np.float16)
            self.bfloat16.add("edge_attr")  # it has no values, so it fits any type


def _has_attr(file: TorchFile, fields: dict[str, Any]) -> bool:
    """Return whether a `Data` has a value for each edge."""
    if any(fields.get(name) is not None for name in WEIGHTS):
        return True
    if fields.get("edge_index") is not None or fields.get("adj") is None:
        return False
    return file.tensor(fields["adj"]).dtype in (BFLOAT16, "<f2", "<f4", "<f8")


def _numbers(file: TorchFile, name: str, value: Any) -> Any:
    """Return a tensor as an array, and a list of numbers or tensors as a list of numbers or arrays."""
    if isinstance(value, Bag):
        return file.tensor(value).read()
    if isinstance(value, list | tuple):
        return [_numbers(file, name, entry) for entry in value]
    return value


def _flat_list(file: TorchFile, name: str, value: Any) -> list[Any]:
    """Return a list of numbers or texts, from a tensor or a list, which may hold tensors."""
    if isinstance(value, Bag):
        return list(file.tensor(value).read().reshape(-1).tolist())
    if isinstance(value, list | tuple):
        return [_one_number(file, name, entry) for entry in value]
    raise FormatError(f"{file.path}, {name} is a {type(value).__name__}; expected a list or a tensor")


def _one_number(file: TorchFile, name: str, value: Any) -> Any:
    """Return the element of a tensor of one element; return anything but a tensor unchanged."""
    if not isinstance(value, Bag):
        return value
    numbers = file.tensor(value).read().reshape(-1).tolist()
    if len(numbers) != 1:
        raise FormatError(f"{file.path}, {name} holds a tensor of {len(numbers)} numbers; expected one a record")
    return numbers[0]
