"""Records whose arrays have keys of their own: `sample_{row}`, `{id}.hidden`; the placeholders name the records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dali_pipeline.errors import FormatError
from dali_pipeline.ingest.containers.base import Container, Leaf
from dali_pipeline.ingest.foreign import natural

PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


class KeyedRecords:
    """A container as one of records, by a KEY with placeholders that stand for parts of its keys.

    Args:
        container: The file; it holds no records.
        pattern: The KEY as a regular expression with a group per placeholder.
        templates: All KEYs of the recipe, with the same placeholders or without any.

    Raises:
        FormatError: No key matches, or one is missing between two numbers that {row} stands for.
    """

    def __init__(self, container: Container, pattern: re.Pattern[str], templates: Iterable[str]) -> None:
        self.path: Path = container.path
        self._container, self._templates = container, tuple(templates)
        self._leaves = {leaf.key: leaf for leaf in container.leaves()}
        found = {tuple(match.groupdict().items()) for key in self._leaves if (match := pattern.fullmatch(key))}
        if not found:
            raise FormatError(f"{self.path} has no key that matches; it has {', '.join(list(self._leaves)[:12]) or 'none'}")
        self._values = [dict(values) for values in sorted(found, key=lambda entry: [natural(text) for _, text in entry])]
        self.records: Sequence[str] | None = ["_".join(values.values()) for values in self._values]
        rows = [int(values["row"]) for values in self._values if "row" in values]
        for before, after in pairwise(rows):
            if after - before > 1 and len(self._values[0]) == 1:
                raise FormatError(f"{self.path} has no row {before + 1} between {before} and {after}; expected no gap")

    def leaves(self, record: int = 0) -> list[Leaf]:
        """Return the KEYs as leaves of a record; a key without placeholders has an entry per record."""
        found = []
        for template in self._templates:
            leaf = self._leaves.get(self._key(template, record))
            if leaf is not None:
                shape = leaf.shape if PLACEHOLDER.search(template) else leaf.shape[1:]
                found.append(Leaf(template, shape, leaf.dtype, leaf.why))
        return found

    def read(self, key: str, begin: int = 0, end: int | None = None, record: int | None = None) -> Any:
        """Return an array of one record; of all records, from a key without placeholders, if `record` is None."""
        if PLACEHOLDER.search(key) is None:
            if record is None:
                return self._container.read(key, begin, end)
            return self._container.read(key, record, record + 1)[0]
        if record is None:
            raise FormatError(f"{self.path}, {key} is read record by record")
        return self._container.read(self._key(key, record), begin, end)

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _key(self, template: str, record: int) -> str:
        return PLACEHOLDER.sub(lambda match: self._values[record].get(match[1], match[0]), template)
