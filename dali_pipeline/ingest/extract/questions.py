"""Questions with reference answers, which a model answers: CSV and JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dali_pipeline.errors import UsageError
from dali_pipeline.ingest.extract.matching import words_of
from dali_pipeline.ingest.extract.prompts import check_ids, csv_rows

JSON_LINES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One row of a file of questions.

    Attributes:
        id: Name of the question.
        group: Name of its group; its samples are always in one group.
        text: The prompt.
        answers: Reference answers.
    """

    id: str
    group: str
    text: str
    answers: tuple[str, ...]


def read_questions(path: Path, *, with_answers: bool = True) -> list[Question]:
    """Return the rows of a CSV file or of JSON lines with `prompt` and `answers`, and optionally `id` and `group`.

    Args:
        path: The file; `.jsonl`, `.ndjson` and `.json` are JSON lines, anything else is CSV. `answers` is one text or a list
            of texts; in CSV a JSON list.
        with_answers: Whether each question must have a reference answer.

    Raises:
        UsageError: The file cannot be read, or a row lacks something; names the row.
    """
    questions = [_question(where, number, row, with_answers) for number, (where, row) in enumerate(_rows(path, with_answers))]
    check_ids(path, [question.id for question in questions])
    return questions


def _rows(path: Path, with_answers: bool) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each row, with its place for messages."""
    columns = ("prompt", "answers") if with_answers else ("prompt",)
    if path.suffix.lower() not in JSON_LINES:
        for number, row in enumerate(csv_rows(path, columns), 1):
            yield f"{path}, row {number}", row
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", _json_row(f"{path}, line {number}", line, columns)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as JSON lines ({error})") from error


def _json_row(where: str, line: str, columns: tuple[str, ...]) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON ({error}); expected one object per line") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where} holds {type(row).__name__}; expected an object with {' and '.join(columns)}")
    for column in columns:
        if column not in row:
            raise UsageError(f"{where} has no {column!r}; it has {', '.join(map(str, row)) or 'nothing'}")
    return row


def _question(where: str, number: int, row: Mapping[str, Any], with_answers: bool) -> Question:
    text = row["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where} has the prompt {text!r}; expected a text")
    answers = _answers(where, row.get("answers"))
    if with_answers:
        if not answers:
            raise UsageError(f"{where} has no reference answer; expected one at least, or labels by --labels-from")
        for answer in answers:
            if not words_of(answer):
                raise UsageError(f"{where} has the reference {answer!r}, which no answer matches; expected letters or digits")
    name = _name(row.get("id"), str(number))
    group = _name(row.get("group"), name)
    try:
        "".join((text, name, group, *answers)).encode()
    except UnicodeEncodeError:
        raise UsageError(f"{where} holds half a character (a lone surrogate); expected text that UTF-8 can hold") from None
    return Question(id=name, group=group, text=text, answers=answers)


def _answers(where: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            parsed = value  # a text that begins with a bracket
        value = parsed
    values = [] if value is None else value if isinstance(value, list) else [value]
    for entry in values:
        if isinstance(entry, bool) or not isinstance(entry, str | int | float):
            raise UsageError(f"{where} has the reference {entry!r}; expected a text, or a list of texts")
    return tuple(text for text in map(str, values) if text.strip())


def _name(value: Any, otherwise: str) -> str:
    return otherwise if value is None or value == "" else str(value)
