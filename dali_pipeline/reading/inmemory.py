"""InMemoryGraphs: short records of a split that fits in its window, kept in memory because reading each again is slower."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dali_pipeline.errors import PipelineError
from dali_pipeline.format.schema import LEVELS, Field, level_of
from dali_pipeline.reading.gather import read_rows
from dali_pipeline.reading.graphrows import GraphRows, ends_of, wrong_graphs
from dali_pipeline.reading.records import RecordIndex, spread
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.types import Array, Ints

if TYPE_CHECKING:
    from dali_pipeline.dataset.selection import Selection

SHORT_RECORD_BYTES = 4 << 10  # longer records are read from files about as fast
TABLE_BYTES = 200, 60  # memory per record, with its id, and per graph, beside their values
AHEAD = 2  # records loaded per record taken, until all are in memory


@dataclass(frozen=True, kw_only=True, eq=False)
class _Table:
    """Where the records are in the arrays.

    Attributes:
        records: (N, 3) label, first graph, number of graphs.
        graphs: (G, 5) first row and number of nodes, first row and number of edges, layer.
        ids: (N,) texts, as objects.
        hashes: (N,) uint64, XXH3-64 of each id.
    """

    records: Ints
    graphs: Ints
    ids: npt.NDArray[np.object_]
    hashes: Array


class InMemoryGraphs:
    """All records of a selection in memory; taking some copies rows and reads nothing.

    They are loaded little by little with the first takes, in the thread that takes. A thread beside it would wait for the
    interpreter lock, and be waited for, longer than it works. If anything is damaged, nothing is kept, and records are read,
    and damage is named, elsewhere. Several threads may take. A pickled one is empty.

    Args:
        fields: Arrays by name, `edge_index` among them, in the widest type stored.
        index: Index of the records.
        selection: The records.
    """

    def __init__(self, fields: Mapping[str, Field], index: RecordIndex, selection: Selection) -> None:
        self._arguments = fields, index, selection
        self._fields, self._index, self._selection = fields, index, selection
        self._arrays: dict[str, Array] = {}
        self._table: _Table | None = None
        self._loading: Generator[int, None, None] | None = self._load()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[InMemoryGraphs], tuple[Mapping[str, Field], RecordIndex, Selection]]:
        return InMemoryGraphs, self._arguments

    @staticmethod
    def fits(selection: Selection, window_bytes: int) -> bool:
        """Return whether records are short, and a whole split of them, in a folder, takes at most a window of memory."""
        _, most = selection.bounds("graph") or (0, 0)
        table_bytes = TABLE_BYTES[0] + TABLE_BYTES[1] * most
        return (
            selection.record_bytes <= SHORT_RECORD_BYTES
            and int(selection.nbytes.sum()) + table_bytes * selection.num_records <= window_bytes
            and selection.rows is None
            and selection.cache_bytes is None
        )

    @property
    def complete(self) -> bool:
        """Whether all records are in memory."""
        return self._table is not None

    def take(self, positions: Ints, buffers: Buffers) -> GraphRows | None:
        """Return the records at `positions` (B,), in that order; None until all are in memory."""
        if self._table is None:
            with self._lock:
                self._continue(AHEAD * len(positions))
        if (table := self._table) is None:
            return None
        labels, begins, graphs_per_record = np.ascontiguousarray(table.records[positions].T)
        graph = begins if (graphs_per_record == 1).all() else spread(begins, graphs_per_record)
        node_begins, node_counts, edge_begins, edge_counts, layer_index = np.ascontiguousarray(table.graphs[graph].T)
        rows = {"node": spread(node_begins, node_counts), "edge": spread(edge_begins, edge_counts), "graph": graph}
        arrays = {name: self._taken(name, rows[level_of(name)], buffers) for name in self._fields}
        return GraphRows(
            edge_index=arrays.pop("edge_index"),
            arrays=arrays,
            node_counts=node_counts,
            edge_counts=edge_counts,
            layer_index=layer_index,
            graphs_per_record=graphs_per_record,
            labels=labels,
            ids=table.ids[positions].tolist(),
            hashes=table.hashes[positions],
            positions=positions,
        )

    def _taken(self, name: str, rows: Ints, buffers: Buffers) -> Array:
        field = self._fields[name]
        out = buffers.take(len(rows) * field.row_bytes).view(field.storage).reshape(len(rows), *field.shape)
        return np.take(self._arrays[name], rows, axis=0, out=out, mode="clip")  # "raise" would copy again

    def _continue(self, records: int) -> None:
        try:
            while records > 0 and self._loading is not None:
                records -= next(self._loading)
        except (StopIteration, PipelineError, OSError):  # all records are in memory, or never will be
            self._loading = None
            if self._table is None:
                self._arrays.clear()

    def _load(self) -> Generator[int, None, None]:
        """Read all records in order; yield the number of records after each index part."""
        nbytes = int(self._selection.nbytes.sum())  # memory that is never touched takes no space
        for level in LEVELS:
            fields = {name: field for name, field in self._fields.items() if level_of(name) == level}
            for name, field in fields.items():
                num_rows = nbytes // sum(field.row_bytes for field in fields.values())
                self._arrays[name] = np.empty((num_rows, *field.shape), field.storage)
        filled = dict.fromkeys(LEVELS, 0)
        records, graphs, ids, hashes = [], [], [], []
        for part in self._index.parts():
            table, spans = part.table, part.spans
            if not len(spans):
                return
            counts = spans[:, 1::2] - spans[:, ::2]  # (G, 2)
            ends = {"node": spans[[0, -1], [0, 1]], "edge": spans[[0, -1], [2, 3]], "graph": table[[0, -1], [1, 2]]}
            rows = {level: bounds.tolist() for level, bounds in ends.items()}
            for name, array in self._arrays.items():
                (row, last), begin = rows[level_of(name)], filled[level_of(name)]
                out = array[begin : begin + last - row]
                read_rows(part.shard, name, row, last, out)
                if name == "edge_index" and len(wrong_graphs(out, counts)):
                    return
            graphs_per_record = table[:, 2] - table[:, 1]
            first = filled["graph"] + table[:, 1] - table[0, 1]
            assert part.labels is not None
            records.append(np.column_stack([part.labels, first, graphs_per_record]))
            nodes, edges = (
                filled[level] + ends_of(column)[:-1] for level, column in zip(("node", "edge"), counts.T, strict=True)
            )
            layers = spread(np.zeros_like(first), graphs_per_record)
            graphs.append(np.column_stack([nodes, counts[:, 0], edges, counts[:, 1], layers]))
            ids.append(part.ids)
            hashes.append(part.hashes)
            filled = {level: end + rows[level][1] - rows[level][0] for level, end in filled.items()}
            yield len(table)
        joined = [np.concatenate(columns) for columns in (records, graphs, ids, hashes)]
        self._table = _Table(records=joined[0], graphs=joined[1], ids=joined[2], hashes=joined[3])
