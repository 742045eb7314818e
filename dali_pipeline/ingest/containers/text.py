"""JSON, JSON lines and CSV as containers of numbers and texts."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers.leaf import missing_key, row_range
from dali_pipeline.ingest.containers.objects import Lazy, ObjectContainer
from dali_pipeline.ingest.containers.source import Source
from dali_pipeline.ingest.extract.prompts import any_length
from dali_pipeline.types import Array

MOST_BYTES = 2 << 30  # of JSON and CSV, which are parsed whole, and of one line of JSON lines
_CHUNK_BYTES = 8 << 20
_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_REAL = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|infinity)|nan", re.IGNORECASE)
_TRUTH = {"true": True, "false": False}
_JSON = msgspec.json.Decoder()


def _nothing(value: Any) -> Lazy | None:
    """Return the records themselves: JSON and CSV hold no objects but Python's own types."""
    return value if isinstance(value, Lazy) else None


def parse(path: Path, text: bytes, where: str = "") -> Any:
    """Return the content of a JSON text; NaN and Infinity, which Python's json writes, are numbers."""
    try:
        try:
            return _JSON.decode(text)
        except msgspec.MsgspecError:
            return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}{where} cannot be read as JSON ({str(error)[:99]}): truncated, or something else") from None


class JsonContainer(ObjectContainer):
    """A JSON file, parsed whole: a list of records, a dict of them by id, or one mapping."""

    def __init__(self, path: Path) -> None:
        source = Source(path, "JSON")
        if source.size > MOST_BYTES:
            raise FormatError(f"{path} has {source.size} bytes of JSON; expected at most {MOST_BYTES}, or JSON lines")
        content = parse(path, source.read(0, source.size))
        source.close()
        super().__init__(path, content, _nothing, nbytes=source.size)


class LinesContainer(ObjectContainer):
    """JSON lines: one record per line that is not blank. Only the line that is read is parsed."""

    def __init__(self, path: Path) -> None:
        self._source = Source(path, "JSON lines")
        self._begins, self._ends = self._lines()
        self.path = path
        super().__init__(path, Lazy(len(self._begins), self._line), _nothing, nbytes=self._source.size)

    def _lines(self) -> tuple[list[int], list[int]]:
        """Return the first byte of each line that is not blank, and the byte after its last."""
        breaks = [-1]
        for begin in range(0, self._source.size, _CHUNK_BYTES):
            part = self._source.array(begin, min(_CHUNK_BYTES, self._source.size - begin))
            breaks += (np.flatnonzero(part == ord("\n")) + begin).tolist()
        lines = [(begin + 1, end) for begin, end in pairwise([*breaks, self._source.size]) if end > begin + 1]
        if any(end - begin < 16 and not self._source.read(begin, end - begin).strip() for begin, end in lines):
            lines = [(begin, end) for begin, end in lines if end - begin >= 16 or self._source.read(begin, end - begin).strip()]
        return [begin for begin, _ in lines], [end for _, end in lines]

    def _line(self, number: int) -> Any:
        begin, end = self._begins[number], self._ends[number]
        if end - begin > MOST_BYTES:
            raise FormatError(f"{self.path}, record {number} has {end - begin} bytes; expected at most {MOST_BYTES}")
        return parse(self.path, self._source.read(begin, end - begin), f", record {number}")

    def close(self) -> None:
        """Close the file."""
        super().close()
        self._source.close()


class CsvContainer(ObjectContainer):
    """A CSV file with a header: one record per row, one key per column.

    A column is int64, float64 or bool if each of its cells is, and of texts otherwise. A number with a leading zero is a text,
    because it is one of an id.
    """

    def __init__(self, path: Path) -> None:
        source = Source(path, "CSV")
        if source.size > MOST_BYTES:
            raise FormatError(f"{path} has {source.size} bytes of CSV; expected at most {MOST_BYTES}")
        names, rows = _csv_rows(path, source.read(0, source.size))
        source.close()
        self._columns: dict[str, Array | list[str]] = {}
        if rows:
            self._columns = {name: _typed(cells) for name, cells in zip(names, zip(*rows, strict=True), strict=True)}
        columns = {
            name: column.tolist() if isinstance(column, np.ndarray) else column for name, column in self._columns.items()
        }
        records = Lazy(len(rows), lambda number: {name: column[number] for name, column in columns.items()})
        super().__init__(path, records, _nothing)

    def _column(self, key: str, begin: int, end: int | None) -> Array | list[str]:
        if key not in self._columns:
            raise missing_key(self.path, key, self._columns)
        begin, end = row_range(self.path, key, (len(self._records),), begin, end)
        return self._columns[key][begin:end]


def _csv_rows(path: Path, data: bytes) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns and the rows of cells."""
    try:
        with any_length():
            lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
            names = [name.strip() or f"column_{number}" for number, name in enumerate(next(lines, []))]
            rows = [row for row in lines if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"{path} cannot be read as CSV ({str(error)[:99]})") from None
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FormatError(f"{path} has two columns {twice[:99]!r}; expected different names")
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise FormatError(f"{path}, record {number} has {len(row)} cells; expected {len(names)}, one per column")
    return names, rows


def _typed(cells: Sequence[str]) -> Array | list[str]:
    """Return a column as numbers if all of its cells are, otherwise as texts."""
    if all(_WHOLE.fullmatch(cell) for cell in cells):
        try:
            return np.array([int(cell) for cell in cells], np.int64)
        except (OverflowError, ValueError):  # more than 64 bits, or more digits than Python takes
            return list(cells)
    if all(_REAL.fullmatch(cell) for cell in cells):
        return np.array([float(cell) for cell in cells])
    if all(cell.lower() in _TRUTH for cell in cells):
        return np.array([_TRUTH[cell.lower()] for cell in cells])
    return list(cells)
