"""ByLayer: rows of many records stored layer by layer, so that one layer of all of them is contiguous."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

TOGETHER_BYTES = 1 << 20  # per layer: one hash block, so that the blocks of a layer contain little else


@dataclass(frozen=True, kw_only=True)
class ByLayer:
    """Layout of blocks of records: step 0 of all records of a block, then step 1 of them, and so on; then the next block.

    The last block of an array may have fewer records. Rows are numbered record by record everywhere but in the file.

    Attributes:
        steps: Steps of every record.
        records: Records per block.
    """

    steps: int
    records: int

    @classmethod
    def of(cls, steps: int, row_bytes: int) -> ByLayer:
        """Return the layout that `convert` writes: about 1 MiB per layer of a block."""
        return cls(steps=steps, records=max(1, TOGETHER_BYTES // row_bytes))

    def stored(self, rows: npt.NDArray[np.int64], total: Any) -> npt.NDArray[np.int64]:
        """Return the positions in the file of rows in an array of `total` rows: one number, or one per row."""
        record, step = np.divmod(rows, self.steps)
        first = record // self.records * self.records
        block_records = np.minimum(self.records, total // self.steps - first)
        return np.asarray(first * self.steps + step * block_records + record - first)

    def numbered(self, stored: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
        """Return the row numbers at positions in the file, the inverse of `stored`."""
        first = stored // (self.records * self.steps) * self.records
        block_records = np.minimum(self.records, total // self.steps - first)
        step, record = np.divmod(stored - first * self.steps, block_records)
        return np.asarray((first + record) * self.steps + step)

    def spans(self, begin: int, end: int, step: int, total: int) -> Iterator[tuple[int, int]]:
        """Yield the spans (begin, end) of stored rows that hold one step of records `begin` to `end`."""
        while begin < end:
            block_end = min(end, (begin // self.records + 1) * self.records)
            position = int(self.stored(np.array([begin * self.steps + step]), total)[0])
            yield position, position + block_end - begin
            begin = block_end
