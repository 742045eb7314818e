"""ByLayer: rows of many records stored layer by layer, so that one layer of all of them lies together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

TOGETHER_BYTES = 1 << 20  # of one layer: a hash block, so that a layer's blocks hold little else


@dataclass(frozen=True, kw_only=True)
class ByLayer:
    """Step 0 of `records` records, then step 1 of them, …; then the next ones. Every record has `steps` steps.

    The last records of an array may be fewer. Rows are numbered record by record everywhere but in the file.
    """

    steps: int
    records: int

    @classmethod
    def of(cls, steps: int, row_bytes: int) -> ByLayer:
        """As `convert` writes it: about 1 MiB of a layer together."""
        return cls(steps=steps, records=max(1, TOGETHER_BYTES // row_bytes))

    def stored(self, rows: npt.NDArray[np.int64], total: Any) -> npt.NDArray[np.int64]:
        """Where rows stand in an array of `total` rows, a number or one for each of them."""
        record, step = np.divmod(rows, self.steps)
        first = record // self.records * self.records
        together = np.minimum(self.records, total // self.steps - first)
        return np.asarray(first * self.steps + step * together + record - first)

    def numbered(self, stored: npt.NDArray[np.int64], total: int) -> npt.NDArray[np.int64]:
        """Which rows stand there: the other way round."""
        first = stored // (self.records * self.steps) * self.records
        together = np.minimum(self.records, total // self.steps - first)
        step, record = np.divmod(stored - first * self.steps, together)
        return np.asarray((first + record) * self.steps + step)

    def spans(self, begin: int, end: int, step: int, total: int) -> Iterator[tuple[int, int]]:
        """Stored rows, from and to, of one step of records `begin` to `end`."""
        while begin < end:
            border = min(end, (begin // self.records + 1) * self.records)
            at = int(self.stored(np.array([begin * self.steps + step]), total)[0])
            yield at, at + border - begin
            begin = border
