"""Reader of raw traces, `.pkl` and `.pkl.gz`: hidden states and attentions of a language model, as NumPy arrays in a pickle.

Each file is a list of dicts: `question_id`, `hidden_states` ([n, D] per layer), `attentions` ([heads, n, n] per layer). The
sequence is the last token's state at every layer; the attention of each layer becomes a graph. No code in the pickle is run.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipeline.errors import FormatError, UsageError
from dali_pipeline.format.record import Graphs
from dali_pipeline.ingest.extract.prompts import any_length
from dali_pipeline.ingest.foreign import ForeignFile, Reader, Values, as_text, files_named, whole_numbers
from dali_pipeline.ingest.readers.attention import attention_edges
from dali_pipeline.ingest.readers.inert import Bag, InertUnpickler
from dali_pipeline.types import Array

TRACES = "*.pkl or *.pkl.gz"
TAKEN = {"question_id", "hidden_states", "attentions"}
_CORES = ("numpy.core", "numpy._core")
RECONSTRUCT = tuple(f"{core}.multiarray._reconstruct" for core in _CORES)
FROM_BUFFER = tuple(f"{core}.numeric._frombuffer" for core in _CORES)
SCALAR = tuple(f"{core}.multiarray.scalar" for core in _CORES)
NUMPY_NAMES = (*RECONSTRUCT, *FROM_BUFFER, *SCALAR, "numpy.ndarray", "numpy.dtype")


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Options for reading traces.

    Attributes:
        scores: Score of each question id; None if the traces have a `label`.
        score_threshold: Scores below this value get label 1.
        attention_threshold: Mean attention over heads above which two tokens get an edge, from 0 to below 1.

    Raises:
        UsageError: A threshold is out of range.
    """

    scores: Mapping[str, float] | None = None
    score_threshold: float = 0.5
    attention_threshold: float = 0.01

    def __post_init__(self) -> None:
        if math.isnan(self.score_threshold) or not 0 <= self.attention_threshold < 1:
            raise UsageError(
                f"thresholds are {self.score_threshold} of scores and {self.attention_threshold} of attention; expected "
                "numbers, the second from 0 to below 1"
            )


def traces_reader(options: TraceOptions) -> Reader:
    """Return the reader with its options."""
    return Reader(
        what=TRACES,
        find=partial(files_named, patterns=("*.pkl", "*.pkl.gz")),
        open=partial(open_file, options=options),
    )


def open_file(path: Path, name: str, options: TraceOptions) -> ForeignFile:
    """Read the names and labels of a file.

    Reads the whole file, because a pickle has no directory. Its arrays are released, and `values` reads the file again.
    """
    traces = _load(path)
    groups, labels = [], []
    for row, trace in enumerate(traces):
        question = _question(path, row, trace)
        groups.append(question)
        labels.append(_label(path, question, trace, options))
    return ForeignFile(
        path=path,
        kinds=("sequences", "graphs"),
        ids=None,
        groups=groups,
        labels=whole_numbers(path, "label", labels),
        step_axis="layer",
        values=partial(_values, path, options.attention_threshold),
        not_taken=tuple(
            sorted({str(key) for trace in traces for key in trace} - TAKEN - ({"label"} if options.scores is None else set()))
        ),
    )


def read_scores(path: Path, column: str | None) -> dict[str, float]:
    """Return scores by question id.

    Args:
        path: CSV file with a column `question_id` and columns of scores.
        column: Name of the column of scores; None for the only other column.

    Raises:
        UsageError: A column is missing, a score is not a number, or a question has two different scores.
    """
    scores: dict[str, float] = {}
    try:
        with any_length(), path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = list(rows.fieldnames or [])
            others = [name for name in columns if name != "question_id"]
            column = column or (others[0] if len(others) == 1 else None)
            if "question_id" not in columns or column not in columns:
                wanted = column or "one of scores, named with --score-column"
                raise UsageError(f"{path} has the columns {', '.join(columns) or '(none)'}; expected question_id and {wanted}")
            for number, row in enumerate(rows, 2):
                try:
                    score = float(row[column])
                except (TypeError, ValueError):
                    score = math.nan
                if math.isnan(score):
                    raise UsageError(f"{path}, line {number}: {column} is {row[column]!r}; expected a number")
                if scores.setdefault(row["question_id"], score) != score:
                    raise UsageError(f"{path}, line {number}: question {row['question_id']!r} has two scores; expected one")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as CSV ({error})") from error
    return scores


def _load(path: Path) -> list[Any]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if not path.stat().st_size:
                raise FormatError(f"{path} is empty; expected a pickle of traces")
            expected = "NumPy arrays, lists, dicts, numbers and texts"
            traces = InertUnpickler(file, path, NUMPY_NAMES, what="a pickle", expected=expected).load()  # type: ignore[arg-type]
            if file.read(1):  # reading to the end also lets gzip check the checksum
                raise FormatError(f"{path} holds more than one pickle; expected one list of traces")
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path} cannot be read ({error}): truncated, or something else") from None
    if not isinstance(traces, list) or not all(isinstance(trace, dict) for trace in traces):
        raise FormatError(f"{path} holds {type(traces).__name__}; expected a list of dicts, one a trace")
    return traces


def _question(path: Path, row: int, trace: dict[str, Any]) -> str:
    missing = TAKEN - trace.keys()
    if missing:
        raise FormatError(f"{path}, trace {row} has no {sorted(missing)[0]}; it has {', '.join(sorted(map(str, trace)))}")
    question = trace["question_id"]
    if isinstance(question, Bag):
        question = to_array(path, question, kinds="iuUS").item()
    return as_text(path, "question_id", question)


def _label(path: Path, question: str, trace: dict[str, Any], options: TraceOptions) -> Any:
    if options.scores is not None:
        if question not in options.scores:
            raise FormatError(f"{path}: question {question!r} has no score; expected every question in the scores")
        return int(options.scores[question] < options.score_threshold)
    if "label" not in trace:
        raise UsageError(f"{path} has no labels; give --scores, a CSV file with question_id and a column of scores")
    label = trace["label"]
    return to_array(path, label).item() if isinstance(label, Bag) else label


def _values(path: Path, threshold: float) -> Iterator[Values]:
    traces = _load(path)
    for row in range(len(traces)):
        trace, traces[row] = traces[row], None  # releases the traces one by one
        where = Path(f"{path}, trace {row}")
        hidden, attentions = (_layers(where, trace[name]) for name in ("hidden_states", "attentions"))
        yield _record(str(where), hidden, attentions, threshold)


def _record(where: str, hidden: list[Array], attentions: list[Array], threshold: float) -> Values:
    nodes, width = hidden[0].shape if hidden and hidden[0].ndim == 2 else (0, 0)
    if not nodes or any(layer.shape != (nodes, width) for layer in hidden):
        raise FormatError(f"{where}: hidden_states are {_shapes(hidden)}; expected [n, D] of each layer, n at least 1")
    if any(layer.ndim != 3 or layer.shape[1:] != (nodes, nodes) or not len(layer) for layer in attentions):
        raise FormatError(f"{where}: attentions are {_shapes(attentions)}; expected [heads, {nodes}, {nodes}] of each layer")
    if not attentions or len(hidden) - len(attentions) not in (0, 1):
        raise FormatError(
            f"{where}: {len(hidden)} hidden states and {len(attentions)} attentions; expected as many, or one more (embeddings)"
        )
    return Values(np.stack([layer[-1] for layer in hidden]), attention_graphs(hidden, attentions, threshold))


def attention_graphs(hidden: list[Array], attentions: list[Array], threshold: float) -> Graphs:
    """Return one graph per layer of attention, with the edges that `attention_edges` finds in the mean over heads.

    Args:
        hidden: Hidden states, (n, D) per layer; the last `len(attentions)` layers become nodes.
        attentions: (heads, n, n) per layer.
        threshold: Weight that an edge must exceed.

    Returns:
        Graphs whose weights have the type of `hidden`.
    """
    nodes, count = len(hidden[0]), len(attentions)
    means = [layer.mean(axis=0, dtype=np.float32) for layer in attentions]
    edge_index, weights, edge_counts = attention_edges(np.stack(means), threshold)
    return Graphs(
        x=np.concatenate(hidden[len(hidden) - count :]),
        edge_index=edge_index,
        edge_attr=weights.astype(hidden[0].dtype),
        node_counts=np.full(count, nodes),
        edge_counts=edge_counts,
    )


def _layers(where: Path, value: Any) -> list[Array]:
    """Return one array per layer, from a list of arrays or one array with a row per layer."""
    return list(to_array(where, value)) if isinstance(value, Bag) else [to_array(where, layer) for layer in value]


def _shapes(layers: list[Array]) -> str:
    return ", ".join(sorted({str(list(layer.shape)) for layer in layers})) or "none"


def to_array(path: Path, value: Any, kinds: str = "fiub") -> Array:
    """Return the array that a Bag stands for; raise FormatError unless its dtype is of one of the NumPy `kinds`."""
    try:
        name, args, state = value.path, value.args, value.state
        if name in RECONSTRUCT:
            _, shape, dtype, fortran, data = state
            return np.frombuffer(data, _dtype(dtype, kinds)).reshape(shape, order="F" if fortran else "C")
        if name in FROM_BUFFER:
            data, dtype, shape, order = args
            return np.frombuffer(data, _dtype(dtype, kinds)).reshape(shape, order=order)
        if name in SCALAR:
            dtype, data = args
            return np.frombuffer(data, _dtype(dtype, kinds)).reshape(())
    except (AttributeError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: found {_described(value)}; expected an array of real numbers ({error})") from None
    raise FormatError(f"{path}: found {_described(value)}; expected an array of real numbers")


def _described(value: Any) -> str:
    return value.path if isinstance(value, Bag) else type(value).__name__


def _dtype(bag: Any, kinds: str) -> np.dtype[Any]:
    """Return the dtype of a pickled `numpy.dtype("f2", False, True)`, whose byte order is in the state."""
    named = bag.args[0] if isinstance(bag, Bag) and bag.path == "numpy.dtype" and bag.args else None
    if not isinstance(named, str) or not re.fullmatch(r"[a-zA-Z]\d*", named):
        raise TypeError("a dtype that is none")
    swapped = isinstance(bag.state, tuple) and len(bag.state) > 1 and bag.state[1] == ">"
    dtype = np.dtype(named).newbyteorder(">" if swapped else "<")
    if dtype.kind not in kinds:
        raise TypeError(f"a dtype of {dtype}")
    return dtype
