"""Reader of `.pt` folders: `lstm_solo/` with sequences, `gnn/` with PyG graphs, as `torch.save` left them.

Stacked tensors are read row by row; nothing that the pickles name is run, PyG's own classes included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipeline.ingest.foreign import (
    Block,
    ForeignFile,
    Reader,
    Values,
    as_text,
    check_counts,
    in_natural_order,
    rows_at_a_time,
    whole_numbers,
)
from dali_pipeline.ingest.inert import Bag
from dali_pipeline.ingest.tensors import Tensor, TorchFile
from dali_pipeline.record import Graphs
from dali_pipeline.schema import Array, FormatError, Kind

FOLDERS: dict[str, Kind] = {"lstm_solo": "sequences", "gnn": "graphs"}
PATTERNS = ("batch_*.pt", "preprocessed_*.pt")
_STORAGES = ("BaseStorage", "GlobalStorage", "NodeStorage", "EdgeStorage")
PYG_NAMES = (
    *(f"torch_geometric.data.data.{name}" for name in ("Data", "DataEdgeAttr", "DataTensorAttr")),
    *(f"torch_geometric.data.storage.{name}" for name in _STORAGES),
)


def find_files(root: Path) -> list[Path]:
    """The files of both halves, sequences first, batch_2 before batch_10."""
    found = []
    for folder in FOLDERS:
        found += in_natural_order(root, {path for pattern in PATTERNS for path in (root / folder).glob(pattern)})
    if root.is_file() and root.suffix == ".pt" and root.parent.name in FOLDERS:
        found = [root]
    return found


def open_file(path: Path, name: str) -> ForeignFile:
    """Opens a file as far as names and labels. Raises FormatError for anything but the layout that its half has."""
    kind = FOLDERS[path.parent.name]
    file = TorchFile(path, PYG_NAMES if kind == "graphs" else ())
    content = file.content
    if isinstance(content, list) and kind == "graphs":  # a flat list of Data, one graph a record, y its label
        labels = [_one_number(file, "y", _fields(file, row, data).get("y")) for row, data in enumerate(content)]
        ids = [f"{path.stem}-{row}" for row in range(len(content))]
        return ForeignFile(
            path=path,
            kinds=(kind,),
            ids=ids,
            groups=ids,
            labels=whole_numbers(path, "y", labels),
            values=_graphs(file, content),
        )
    if not isinstance(content, dict) or not {kind, "labels", "question_ids"} <= content.keys():
        has = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        if isinstance(content, Bag):
            has = "one tensor"
        raise FormatError(f"{path} holds {has}; expected a dict with {kind}, labels and question_ids")
    labels_, questions = (_flat_list(file, field, content[field]) for field in ("labels", "question_ids"))
    values = content[kind] if isinstance(content[kind], list | tuple) else file.tensor(content[kind])
    check_counts(path, **{kind: len(values), "labels": len(labels_), "question_ids": len(questions)})
    return ForeignFile(
        path=path,
        kinds=(kind,),
        ids=None,
        groups=[as_text(path, "question_ids", one) for one in questions],
        labels=whole_numbers(path, "labels", labels_),
        values=_sequences(file, values) if kind == "sequences" else _graphs(file, values),
    )


PT = Reader(what=" or ".join(f"{name}/{pattern}" for name in FOLDERS for pattern in PATTERNS), find=find_files, open=open_file)


def _sequences(file: TorchFile, values: Tensor | Sequence[Any]) -> Callable[[], Iterator[Values | Block]]:
    def read() -> Iterator[Values | Block]:
        if not isinstance(values, Tensor):
            yield from (Values(file.tensor(value).read(), None) for value in values)
            return
        step = rows_at_a_time(math.prod(values.shape[1:]) * values.itemsize)
        for begin in range(0, len(values), step):
            yield Block(values.rows(begin, min(begin + step, len(values))).read())

    return read


def _graphs(file: TorchFile, values: Any) -> Callable[[], Iterator[Values]]:
    def read() -> Iterator[Values]:
        for row, record in enumerate(values):
            layers = [_fields(file, row, layer) for layer in (record if isinstance(record, list | tuple) else [record])]
            if not layers:
                raise FormatError(f"{file.path}, record {row}: no graphs; expected a list of PyG Data, one a layer")
            with_attr = any(layer.get("edge_attr") is not None for layer in layers)
            yield Values(None, Graphs.stack([_Layer(file, layer, with_attr) for layer in layers]))

    return read


def _fields(file: TorchFile, row: int, data: Any) -> dict[str, Any]:
    """The attributes of a pickled `Data`: in its store since PyG 2.0, in the object itself before."""
    state = data.state if isinstance(data, Bag) and data.path == PYG_NAMES[0] else None
    store = state.get("_store") if isinstance(state, dict) else None
    fields = (store.state or {}).get("_mapping") if isinstance(store, Bag) and isinstance(store.state, dict) else state
    if not isinstance(fields, dict) or fields.get("x") is None:
        raise FormatError(f"{file.path}, record {row}: expected a list of PyG Data with x, one a layer")
    return fields


class _Layer:
    """One `Data` as arrays; edge_attr (e, 1) becomes (e,), and a graph without edges needs none."""

    def __init__(self, file: TorchFile, fields: dict[str, Any], with_attr: bool) -> None:
        self.x = file.tensor(fields["x"]).read()
        edge_index = fields.get("edge_index")
        self.edge_index = np.zeros((2, 0), np.int64) if edge_index is None else file.tensor(edge_index).read()
        self.edge_attr: Array | None = None
        if with_attr and fields.get("edge_attr") is not None:
            attr = file.tensor(fields["edge_attr"]).read()
            self.edge_attr = attr[:, 0] if attr.ndim == 2 and attr.shape[1] == 1 else attr
        elif with_attr and not self.edge_index.shape[1]:
            self.edge_attr = np.zeros(0, np.float16)


def _flat_list(file: TorchFile, name: str, value: Any) -> list[Any]:
    """A list of numbers or texts, from a list (of tensors, perhaps) or a tensor."""
    if isinstance(value, Bag):
        return list(file.tensor(value).read().reshape(-1).tolist())
    if isinstance(value, list | tuple):
        return [_one_number(file, name, one) for one in value]
    raise FormatError(f"{file.path}, {name} is a {type(value).__name__}; expected a list or a tensor")


def _one_number(file: TorchFile, name: str, value: Any) -> Any:
    """What a tensor of one element holds; anything but a tensor as it is."""
    if not isinstance(value, Bag):
        return value
    found = file.tensor(value).read().reshape(-1).tolist()
    if len(found) != 1:
        raise FormatError(f"{file.path}, {name} holds a tensor of {len(found)} numbers; expected one a record")
    return found[0]
