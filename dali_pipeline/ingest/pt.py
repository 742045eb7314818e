"""Reader of `.pt` folders: `lstm_solo/` with sequences, `gnn/` with PyG graphs, as `torch.save` left them.

Nothing is unpickled freely: `torch.load(weights_only=True)` with PyG's own classes allowed, and no others.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dali_pipeline.schema import Array, FormatError, Graphs, Kind, UsageError

FOLDERS: dict[Kind, str] = {"sequences": "lstm_solo", "graphs": "gnn"}
PATTERNS = ("batch_*.pt", "preprocessed_*.pt")


@dataclass(frozen=True, kw_only=True)
class PtFile:
    """What one file holds, record by record; the tensors still lie in the file where that can be mapped.

    values: a tensor (N, L, D), a list of N tensors (L_i, D), or a list of N lists of `Data`.
    """

    path: Path
    kind: Kind
    question_ids: list[str]
    labels: list[int]
    values: Any

    def __len__(self) -> int:
        return len(self.labels)

    def sequence(self, number: int) -> Array:
        """The record's sequence (L, D)."""
        return to_numpy(self.values[number])

    def graphs(self, number: int) -> Graphs:
        """The record's graphs; edge_attr (e, 1) becomes (e,), and a graph without edges needs none."""
        layers = self.values[number] if isinstance(self.values[number], list | tuple) else [self.values[number]]
        if not layers or not all(hasattr(layer, "x") and hasattr(layer, "edge_index") for layer in layers):
            raise FormatError(f"{self.path}, record {number}: expected a list of PyG Data, one a layer")
        with_attr = any(getattr(layer, "edge_attr", None) is not None for layer in layers)
        return Graphs.stack(_Layer(layer, with_attr) for layer in layers)


class _Layer:
    """One `Data` as arrays."""

    def __init__(self, data: Any, with_attr: bool) -> None:
        self.x = to_numpy(data.x)
        self.edge_index = np.zeros((2, 0), np.int64) if data.edge_index is None else to_numpy(data.edge_index)
        self.edge_attr: Array | None = None
        if with_attr and data.edge_attr is not None:
            attr = to_numpy(data.edge_attr)
            self.edge_attr = attr[:, 0] if attr.ndim == 2 and attr.shape[1] == 1 else attr
        elif with_attr and not self.edge_index.shape[1]:
            self.edge_attr = np.zeros(0, np.float16)


def to_numpy(tensor: Any) -> Array:
    """The tensor's memory as an array; bfloat16, which NumPy lacks, as float32."""
    if not isinstance(tensor, torch.Tensor):
        raise FormatError(f"found {type(tensor).__name__}; expected a tensor")
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def find_files(root: Path) -> dict[Kind, list[Path]]:
    """The `.pt` files of each kind that the folder has, batch_2 before batch_10. Raises UsageError where there are none."""
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; expected one with {' or '.join(name + '/' for name in FOLDERS.values())}")
    found = {
        kind: sorted((path for pattern in PATTERNS for path in (root / name).glob(pattern)), key=_natural)
        for kind, name in FOLDERS.items()
    }
    found = {kind: files for kind, files in found.items() if files}
    if not found:
        places = " or ".join(f"{name}/{pattern}" for name in FOLDERS.values() for pattern in PATTERNS)
        raise UsageError(f"{root} holds no {places}; expected at least one such file")
    return found


def _natural(path: Path) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def read_file(path: Path, kind: Kind) -> PtFile:
    """Opens one file; a zip `.pt` is mapped, so tensors are read when they are used.

    Raises FormatError, with the file and the reason, for anything but the layout that `kind` has.
    """
    loaded = load_safely(path)
    key = "sequences" if kind == "sequences" else "graphs"
    if isinstance(loaded, list) and kind == "graphs":  # a flat list of Data, one graph a record, y its label
        labels = [_number(path, "y", getattr(data, "y", None)) for data in loaded]
        return PtFile(
            path=path, kind=kind, question_ids=[f"{path.stem}-{n}" for n in range(len(loaded))], labels=labels, values=loaded
        )
    if not isinstance(loaded, dict) or not {key, "labels", "question_ids"} <= loaded.keys():
        has = sorted(map(str, loaded)) if isinstance(loaded, dict) else type(loaded).__name__
        raise FormatError(f"{path} holds {has}; expected a dict with {key}, labels and question_ids")
    values = loaded[key]
    labels = [_number(path, "labels", label) for label in _listed(path, "labels", loaded["labels"])]
    question_ids = [str(one) for one in _listed(path, "question_ids", loaded["question_ids"])]
    if not isinstance(values, torch.Tensor | list | tuple):
        raise FormatError(f"{path}, {key} is a {type(values).__name__}; expected a tensor or a list")
    if not len(values) == len(labels) == len(question_ids):
        raise FormatError(
            f"{path} has {len(values)} {key}, {len(labels)} labels and {len(question_ids)} question_ids; expected equal numbers"
        )
    return PtFile(path=path, kind=kind, question_ids=question_ids, labels=labels, values=values)


def load_safely(path: Path) -> Any:
    """`torch.load` that runs no code of the file's own."""
    try:
        if path.stat().st_size == 0:
            raise FormatError(f"{path} is empty; expected a file of torch.save")
        with torch.serialization.safe_globals(_pyg_classes(path)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {named.group(1)}" if named else "it is damaged, or more than plain tensors"
        raise FormatError(f"{path} was refused: {what}; expected tensors, lists, dicts and PyG Data only") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise FormatError(f"{path} cannot be read as a file of torch.save ({reason}): truncated, or something else") from None


def _pyg_classes(path: Path) -> list[Any]:
    """PyG's own classes that a pickled `Data` names; importing PyG takes seconds, so only for graphs."""
    if path.parent.name != FOLDERS["graphs"]:
        return []
    from torch_geometric.data import Data
    from torch_geometric.data.data import DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import BaseStorage, EdgeStorage, GlobalStorage, NodeStorage

    return [Data, DataEdgeAttr, DataTensorAttr, BaseStorage, GlobalStorage, NodeStorage, EdgeStorage]


def _listed(path: Path, name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, torch.Tensor):
        return value.reshape(-1).tolist()
    if isinstance(value, list | tuple):
        return value
    raise FormatError(f"{path}, {name} is a {type(value).__name__}; expected a list or a tensor")


def _number(path: Path, name: str, value: Any) -> int:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, int | float) and float(value).is_integer() and value >= 0:
        return int(value)
    raise FormatError(f"{path}, {name} holds {value!r}; expected whole numbers of 0 or more")
