"""Reader of prompt files: CSV with the columns prompt and label, and optionally id and group."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dali_pipeline.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of the prompts file."""

    id: str
    group: str
    text: str
    label: int


def read_prompts(path: Path) -> list[Prompt]:
    """Return the rows of a CSV file with the columns `prompt` and `label`, and optionally `id` and `group`.

    Without `id` the id is the number of the row, and without `group` the group is the id. Raises UsageError for any other file.
    """
    prompts = [_prompt(path, number, row) for number, row in enumerate(csv_rows(path, ("prompt", "label")))]
    check_ids(path, [prompt.id for prompt in prompts])
    return prompts


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file; raise UsageError if it cannot be read, or lacks one of the columns."""
    try:
        with any_length(), path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            names = rows.fieldnames or []
            for column in columns:
                if column not in names:
                    raise UsageError(f"{path} has no column {column!r}; it has {', '.join(names) or 'no header'}")
            yield from rows
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as CSV ({error})") from error


def check_ids(path: Path, ids: Sequence[str]) -> None:
    """Raise UsageError if a file has no rows, or gives an id to several."""
    if not ids:
        raise UsageError(f"{path} has no rows; expected a prompt in each")
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise UsageError(f"{path} gives the id {repeated[0]!r} to several rows; expected each id once")


@contextmanager
def any_length() -> Iterator[None]:
    """Allow CSV fields of any length within the block; the process-wide limit of 128 KiB is restored afterwards."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _prompt(path: Path, number: int, row: dict[str, str]) -> Prompt:
    try:
        label = int(float(row["label"]))
        whole = label == float(row["label"]) and label >= 0
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole:
        raise UsageError(f"{path}, row {number + 1} has the label {row['label']!r}; expected a whole number of 0 or more")
    if not row["prompt"]:
        raise UsageError(f"{path}, row {number + 1} has an empty prompt")
    name = row.get("id") or str(number)
    return Prompt(id=name, group=row.get("group") or name, text=row["prompt"], label=label)
