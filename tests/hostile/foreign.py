"""Foreign files that must be refused. Each builder makes a folder with one good file and one bad; `words` is what is said."""

from __future__ import annotations

import gzip
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch_geometric.data import Data

ROWS, STEPS, FEATURES = 8, 3, 4


class Evil:
    """Runs a command where a pickle is loaded freely."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def sequences(first: int, features: int = FEATURES) -> dict[str, Any]:
    values = np.random.default_rng(first).normal(size=(ROWS, STEPS, features)).astype(np.float16)
    return {
        "sequences": torch.from_numpy(values),
        "labels": [row % 2 for row in range(ROWS)],
        "question_ids": [f"q{first + row}" for row in range(ROWS)],
    }


def graphs(first: int) -> dict[str, Any]:
    def layer() -> Data:
        return Data(x=torch.ones(3, FEATURES).half(), edge_index=torch.tensor([[0, 1], [1, 2]]), edge_attr=torch.ones(2).half())

    return {**sequences(first), "graphs": [[layer(), layer()] for _ in range(ROWS)]}


def trace(question: str, nodes: int = 3) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "question_id": question,
        "label": 1,
        "hidden_states": [rng.normal(size=(nodes, FEATURES)).astype(np.float16) for _ in range(2)],
        "attentions": [rng.random((2, nodes, nodes)).astype(np.float16) for _ in range(2)],
        "tokens": ["a"] * nodes,
    }


def arrays(first: int) -> dict[str, Any]:
    names = [f"r{first + row}" for row in range(ROWS)]
    return {"sequences": sequences(first)["sequences"].numpy(), "labels": np.arange(ROWS) % 2, "ids": np.array(names)}


def table(first: int) -> dict[str, Any]:
    given = arrays(first)
    return {"sequence": given["sequences"].tolist(), "label": given["labels"].tolist(), "id": given["ids"].tolist()}


def write_pt(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


def write_pkl(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        pickle.dump(content, file)


def write_npz(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **content)


def write_parquet(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(content), path)


@dataclass(frozen=True)
class Format:
    """write: a good file's content, from the number of its first record, to a path."""

    good: str
    bad: str
    content: Callable[[int], Any]
    write: Callable[[Path, Any], None]


FORMATS = {
    "pt": Format("lstm_solo/batch_0.pt", "lstm_solo/batch_1.pt", sequences, write_pt),
    "gnn": Format("gnn/batch_0.pt", "gnn/batch_1.pt", graphs, write_pt),
    "pkl": Format("a.pkl", "b.pkl", lambda first: [trace(f"q{first + row}") for row in range(ROWS)], write_pkl),
    "gz": Format("a.pkl.gz", "b.pkl.gz", lambda first: [trace(f"q{first + row}") for row in range(ROWS)], write_pkl),
    "npz": Format("a.npz", "b.npz", arrays, write_npz),
    "parquet": Format("a.parquet", "b.parquet", table, write_parquet),
}


def conjugated() -> torch.Tensor:
    """A view that carries its sign apart from its storage."""
    return torch.ones(ROWS, STEPS, FEATURES, dtype=torch.cfloat).conj().imag


def changed(content: Any, **fields: Any) -> Any:
    return {**content, **fields}


def with_edge(content: Any) -> Any:
    content["graphs"][3][1].edge_index = torch.tensor([[0, 1], [1, 99]])
    return content


def with_trace(content: Any, **fields: Any) -> Any:
    return [content[0], {**content[1], **fields}, *content[2:]]


# (format, what is wrong): what is done to the second file's content, and what must be said
CONTENTS: dict[tuple[str, str], tuple[Callable[[Any, Path], Any], str]] = {
    ("pt", "runs code"): (lambda c, ran: changed(c, more=Evil(ran)), r"batch_1.pt was refused: it asks for posix.system"),
    ("pt", "wrong dtype"): (
        lambda c, ran: changed(c, sequences=c["sequences"].to(torch.complex64)),
        "batch_1.pt was refused: it asks for torch.ComplexFloatStorage",
    ),
    ("pt", "unequal counts"): (
        lambda c, ran: changed(c, labels=c["labels"][1:]),
        "has 8 sequences, 7 labels and 8 question_ids",
    ),
    ("pt", "other hidden size"): (
        lambda c, ran: changed(c, sequences=c["sequences"][:, :, :-1].clone()),
        r"batch_1.pt: record 'q8', sequence has rows of shape \(3,\); expected \(4,\)",
    ),
    ("pt", "a sign apart"): (lambda c, ran: changed(c, sequences=conjugated()), "a view that only torch can resolve"),
    ("pt", "larger than its bytes"): (
        lambda c, ran: changed(c, sequences=torch.zeros(1).expand(ROWS, 10**9, FEATURES)),
        "is larger than its storage",
    ),
    ("pt", "endless labels"): (lambda c, ran: changed(c, labels=torch.zeros(1).expand(10**13)), "is larger than its storage"),
    ("pt", "labels one-hot"): (
        lambda c, ran: changed(c, labels=[torch.tensor([0, 1])] * ROWS),
        "labels holds a tensor of 2 numbers; expected one a record",
    ),
    ("pt", "endless label"): (
        lambda c, ran: changed(c, labels=[10**400] * ROWS),
        "labels holds 1000.*; expected whole numbers",
    ),
    ("pt", "no names"): (lambda c, ran: changed(c, question_ids=[None] * ROWS), "question_ids holds None; expected texts"),
    ("pt", "no text"): (
        lambda c, ran: changed(c, question_ids=["a\ud800"] * ROWS),
        "question_ids holds 'a.ud800'; expected texts",
    ),
    ("pt", "more digits"): (
        lambda c, ran: changed(c, sequences=c["sequences"].float()),
        "record 'q8': sequence is float32, and float16 in the first file; give --dtype",
    ),
    ("pt", "a name that is numbered"): (
        lambda c, ran: changed(c, question_ids=["a", "a", "a#1", *range(5)]),
        "'a#1' is also what a record of a recurring question is named",
    ),
    ("gnn", "edge beyond"): (
        lambda c, ran: with_edge(c),
        r"batch_1.pt: record 'q11', graph 1: edge \(1, 99\) leaves the graph's 3",
    ),
    ("gnn", "runs code"): (lambda c, ran: changed(c, more=Evil(ran)), "batch_1.pt was refused: it asks for posix.system"),
    ("gnn", "no nodes"): (
        lambda c, ran: changed(c, graphs=[[Data(edge_index=torch.zeros(2, 0, dtype=torch.int64))]] * ROWS),
        "batch_1.pt, record 0: expected a list of PyG Data with x",
    ),
    ("pkl", "runs code"): (lambda c, ran: [*c, Evil(ran)], "b.pkl was refused: it asks for posix.system"),
    ("pkl", "a tensor"): (
        lambda c, ran: with_trace(c, hidden_states=[torch.ones(3, 4)]),
        "b.pkl was refused: it asks for torch",
    ),
    ("pkl", "objects"): (
        lambda c, ran: with_trace(c, hidden_states=np.array([{}, {}], object)),
        "b.pkl, trace 1: found .*; expected an array of real numbers",
    ),
    ("pkl", "other tokens"): (
        lambda c, ran: with_trace(c, attentions=[np.ones((2, 5, 5), np.float16)] * 2),
        r"b.pkl, trace 1: attentions are \[2, 5, 5\]; expected \[heads, 3, 3\]",
    ),
    ("pkl", "fewer layers"): (
        lambda c, ran: with_trace(c, hidden_states=c[1]["hidden_states"][:1]),
        "b.pkl, trace 1: 1 hidden states and 2 attentions",
    ),
    ("pkl", "no field"): (lambda c, ran: [{"question_id": "q1"}], "b.pkl, trace 0 has no attentions"),
    ("gz", "runs code"): (lambda c, ran: [*c, Evil(ran)], "b.pkl.gz was refused: it asks for posix.system"),
    ("npz", "id twice"): (
        lambda c, ran: changed(c, ids=np.array(["r8", "r9", "r8", *(f"s{at}" for at in range(5))])),
        "b.npz: 'r8' is given to several records; expected each id once",
    ),
    ("npz", "id of another file"): (
        lambda c, ran: changed(c, ids=np.array(["r0", *(f"s{at}" for at in range(7))])),
        "b.npz: 'r0' is given to several records",
    ),
    ("npz", "unequal counts"): (lambda c, ran: changed(c, labels=c["labels"][1:]), "b.npz has 7 labels and 8 ids"),
    ("npz", "offsets go backward"): (
        lambda c, ran: {"values": np.ones((9, 4)), "offsets": [0, 5, 3, 9], "labels": [0, 1, 0]},
        "b.npz, offsets are int64",
    ),
    ("npz", "offsets past the end"): (
        lambda c, ran: {"values": np.ones((9, 4)), "offsets": [0, 5, 7, 11], "labels": [0, 1, 0]},
        "b.npz, offsets are int64",
    ),
    ("npz", "pickled"): (lambda c, ran: changed(c, labels=np.array([Evil(ran)], object)), "b.npz, labels is object .* pickled"),
    ("npz", "wrong dtype"): (
        lambda c, ran: changed(c, sequences=np.full((ROWS, STEPS, FEATURES), "x")),
        "b.npz: record 'r8': sequence is <U1; expected real numbers",
    ),
    ("parquet", "missing values"): (
        lambda c, ran: changed(c, sequence=[None, *c["sequence"][1:]]),
        "sequence has missing values",
    ),
    ("parquet", "uneven rows"): (
        lambda c, ran: changed(c, sequence=[[[1.0, 2.0], [1.0]], *c["sequence"][1:]]),
        r"b.parquet, records 0 to 7, sequence: a record's lists have \[1, 2\] numbers",
    ),
    ("pkl", "two pickles"): (lambda c, ran: c, "b.pkl holds more than one pickle"),
    ("parquet", "edges as pairs"): (
        lambda c, ran: {**c, "x": [[[1.0]] * 3] * ROWS, "edge_index": [[[0, 1], [1, 2], [2, 0]]] * ROWS},
        r"edge_index: row 0 is \[3, 2\]; expected two lists, sources and targets",
    ),
    ("parquet", "no group"): (lambda c, ran: changed(c, group=[None] * ROWS), "group holds None; expected texts"),
    ("parquet", "texts"): (lambda c, ran: changed(c, sequence=[["a"]] * ROWS), "expected 1 or 2 of numbers"),
    ("parquet", "no labels"): (
        lambda c, ran: {"sequence": c["sequence"]},
        "b.parquet has the columns sequence; expected label",
    ),
}
# what is done to the second file's bytes, and what must be said of it, whatever the format
BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda data: data[: len(data) // 2], "cannot be read"),
    "empty": (lambda data: b"", "is empty|cannot be read"),
    "text": (lambda data: b"<html>not found</html>", "cannot be read|was refused"),
}


def build(root: Path, form: str, wrong: str) -> tuple[Path, str, Path]:
    """A folder with a good file and a bad one; what must be said; and a path that exists once code has run."""
    one, ran = FORMATS[form], root / "ran"
    one.write(root / one.good, one.content(0))
    if wrong in BYTES:
        one.write(root / one.bad, one.content(ROWS))
        change, words = BYTES[wrong]
        (root / one.bad).write_bytes(change((root / one.bad).read_bytes()))
        return root / one.bad, words, ran
    edit, words = CONTENTS[form, wrong]
    one.write(root / one.bad, edit(one.content(ROWS), ran))
    if wrong == "two pickles":
        (root / one.bad).write_bytes((root / one.bad).read_bytes() * 2)
    return root / one.bad, words, ran


CASES = [*CONTENTS, *((form, wrong) for form in FORMATS for wrong in BYTES)]
