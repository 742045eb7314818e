"""Folders of `.pt` files, sound and broken."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_geometric.data import Data

LAYERS, HIDDEN = 4, 6


def layer(rng: np.random.Generator, nodes: int, edges: int, *, flat: bool = True) -> Data:
    attr = torch.from_numpy(rng.random(edges)).half()
    return Data(
        x=torch.from_numpy(rng.normal(size=(nodes, HIDDEN))).half(),
        edge_index=torch.from_numpy(rng.integers(0, nodes, size=(2, edges))),
        edge_attr=attr if flat else attr[:, None],
    )


def make_folder(root: Path, per_file: int = 12, files: int = 3, *, halves: str = "both", name: str = "batch") -> Path:
    """The layout that users have: stacked sequences in two files, a list of tensors in the third, and their graphs."""
    rng = np.random.default_rng(0)
    for number in range(files):
        ids: list[Any] = [f"q{number * per_file + row}" for row in range(per_file)]
        labels = [row % 2 for row in range(per_file)]
        if halves != "gnn":
            (root / "lstm_solo").mkdir(parents=True, exist_ok=True)
            sequences: Any = torch.from_numpy(rng.normal(size=(per_file, LAYERS, HIDDEN))).half()
            if number == 2:
                sequences = [row[: 2 + at % 3] for at, row in enumerate(sequences)]
            torch.save(
                {"sequences": sequences, "labels": torch.tensor(labels), "question_ids": ids},
                root / "lstm_solo" / f"{name}_{number}.pt",
            )
        if halves != "lstm":
            (root / "gnn").mkdir(parents=True, exist_ok=True)
            graphs = [
                [layer(rng, 3 + row % 4, (row + at) % 5, flat=number != 1) for at in range(LAYERS)] for row in range(per_file)
            ]
            torch.save({"graphs": graphs, "labels": labels, "question_ids": ids}, root / "gnn" / f"{name}_{number}.pt")
    return root


def assert_same_bytes(one: Path, other: Path) -> None:
    files = {path.relative_to(one): path.read_bytes() for path in one.rglob("*") if path.is_file()}
    assert files == {path.relative_to(other): path.read_bytes() for path in other.rglob("*") if path.is_file()}


class Evil:
    """Would run code where a pickle is loaded freely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def one_edge_too_far(file: dict[str, Any]) -> dict[str, Any]:
    file["graphs"][3][1].edge_index = torch.tensor([[0], [99]])
    file["graphs"][3][1].edge_attr = torch.ones(1).half()
    return file


# what each does to the second file of its half
CHANGES: dict[str, Callable[[dict[str, Any], Path], Any]] = {
    "code": lambda file, root: {**file, "extra": Evil(root / "ran")},
    "numpy": lambda file, root: {**file, "sequences": file["sequences"].numpy()},
    "keys": lambda file, root: {"sequences": file["sequences"]},
    "tensor": lambda file, root: file["sequences"],
    "count": lambda file, root: {**file, "labels": file["labels"][:-1]},
    "label": lambda file, root: {**file, "labels": [0.5] * 12},
    "hidden": lambda file, root: {**file, "sequences": file["sequences"][:, :, :-1].clone()},
    "graph edge": lambda file, root: one_edge_too_far(file),
    "graph count": lambda file, root: {**file, "question_ids": ["q12", *file["question_ids"][:-1]]},
    "graph label": lambda file, root: {**file, "labels": [1 - label for label in file["labels"]]},
    "graph none": lambda file, root: {**file, "graphs": [*file["graphs"][:3], [], *file["graphs"][4:]]},
}


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "text": lambda content: b"not a file of torch.save",
}


def break_file(root: Path, how: str) -> Path:
    path = root / ("gnn" if how.startswith("graph") else "lstm_solo") / "batch_1.pt"
    if how in BYTES:
        path.write_bytes(BYTES[how](path.read_bytes()))
    else:
        torch.save(CHANGES[how](torch.load(path, weights_only=False), root), path)
    return path
