"""HeldGraphs: short records of a split that fits in its window, in memory, where reading each again would take longer."""

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
from dali_pipeline.reading.graphrows import GraphRows, ends_of, spread, wrong_graphs
from dali_pipeline.reading.records import RecordIndex
from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.types import Array, Ints

if TYPE_CHECKING:
    from dali_pipeline.dataset.selection import Selection

HELD_RECORD_BYTES = 4 << 10  # longer records are read about as fast
TABLE_BYTES = 200, 60  # of memory for a record, with its id, and for a graph, beside their values
AHEAD = 2  # records brought for one that is taken, until all are there


@dataclass(frozen=True, kw_only=True, eq=False)
class _Table:
    """records: (N, 3) label, which graph is its first, number of graphs · graphs: (G, 5) first row and number of its nodes, the
    same of its edges, layer."""

    records: Ints
    graphs: Ints
    ids: npt.NDArray[np.object_]


class HeldGraphs:
    """All records of a selection in memory: a take copies rows, and reads nothing.

    They are brought little by little with the first takes, in the thread that takes: a thread beside it would wait for the
    interpreter lock, and be waited for, longer than it works. Damage is not kept: all is left to be read, and named, elsewhere.
    fields: the arrays by name, `edge_index` among them, in the widest type stored. Several threads may take. A pickled one is
    empty.
    """

    def __init__(self, fields: Mapping[str, Field], index: RecordIndex, selection: Selection) -> None:
        self._arguments = fields, index, selection
        self._fields, self._index, self._selection = fields, index, selection
        self._arrays: dict[str, Array] = {}
        self._table: _Table | None = None
        self._bringing: Generator[int, None, None] | None = self._bring()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[HeldGraphs], tuple[Mapping[str, Field], RecordIndex, Selection]]:
        return HeldGraphs, self._arguments

    @staticmethod
    def fits(selection: Selection, window_bytes: int) -> bool:
        """Whether records are short, and all of them, of a whole split in a folder, take no more memory than a window."""
        _, most = selection.bounds("graph") or (0, 0)
        each = TABLE_BYTES[0] + TABLE_BYTES[1] * most
        return (
            selection.record_bytes <= HELD_RECORD_BYTES
            and int(selection.nbytes.sum()) + each * selection.num_records <= window_bytes
            and selection.rows is None
            and selection.cache_bytes is None
        )

    @property
    def complete(self) -> bool:
        """Whether all are here."""
        return self._table is not None

    def take(self, positions: Ints, buffers: Buffers) -> GraphRows | None:
        """The records at `positions` (B,), in that order; None until all are here."""
        if self._table is None:
            with self._lock:
                self._go_on(AHEAD * len(positions))
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
            positions=positions,
        )

    def _taken(self, name: str, rows: Ints, buffers: Buffers) -> Array:
        field = self._fields[name]
        out = buffers.take(len(rows) * field.row_bytes).view(field.storage).reshape(len(rows), *field.shape)
        return np.take(self._arrays[name], rows, axis=0, out=out, mode="clip")  # "raise" would copy once more

    def _go_on(self, records: int) -> None:
        try:
            while records > 0 and self._bringing is not None:
                records -= next(self._bringing)
        except (StopIteration, PipelineError, OSError):  # all are here, or will never be
            self._bringing = None
            if self._table is None:
                self._arrays.clear()

    def _bring(self) -> Generator[int, None, None]:
        """Reads all records, in order; yields after each part of them their number."""
        nbytes = int(self._selection.nbytes.sum())  # untouched, what is too much takes none
        for level in LEVELS:
            fields = {name: field for name, field in self._fields.items() if level_of(name) == level}
            for name, field in fields.items():
                most = nbytes // sum(each.row_bytes for each in fields.values())
                self._arrays[name] = np.empty((most, *field.shape), field.storage)
        filled = dict.fromkeys(LEVELS, 0)
        records, graphs, ids = [], [], []
        for part in self._index.parts():
            table, spans = part.table, part.spans
            if not len(spans):
                return
            counts = spans[:, 1::2] - spans[:, ::2]  # (G, 2)
            ends = {"node": spans[[0, -1], [0, 1]], "edge": spans[[0, -1], [2, 3]], "graph": table[[0, -1], [1, 2]]}
            rows = {level: each.tolist() for level, each in ends.items()}
            for name, array in self._arrays.items():
                (row, last), at = rows[level_of(name)], filled[level_of(name)]
                out = array[at : at + last - row]
                read_rows(part.shard, name, row, last, out)
                if name == "edge_index" and len(wrong_graphs(out, counts)):
                    return
            graphs_per_record = table[:, 2] - table[:, 1]
            first = filled["graph"] + table[:, 1] - table[0, 1]
            records.append(np.column_stack([table[:, 0], first, graphs_per_record]))
            nodes, edges = (filled[level] + ends_of(each)[:-1] for level, each in zip(("node", "edge"), counts.T, strict=True))
            layers = spread(np.zeros_like(first), graphs_per_record)
            graphs.append(np.column_stack([nodes, counts[:, 0], edges, counts[:, 1], layers]))
            ids.append(part.ids)
            filled = {level: at + rows[level][1] - rows[level][0] for level, at in filled.items()}
            yield len(table)
        self._table = _Table(records=np.concatenate(records), graphs=np.concatenate(graphs), ids=np.concatenate(ids))
