"""What a model is asked: questions, examples in front of them, and labels of a judge, read and checked before anything runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from dali_pipeline.errors import UsageError
from dali_pipeline.format.label import Label
from dali_pipeline.ingest.extract.generate import Ask, GenerateConfig, Prompter
from dali_pipeline.ingest.extract.questions import Question, read_questions
from dali_pipeline.ingest.layouts.labels import label_rule, read_labels
from dali_pipeline.ingest.layouts.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Everything that is asked.

    Attributes:
        asks: The answers that are wanted, question by question.
        shots: Examples in front of every question.
        label: What a record's label is.
        facts: What identifies the input and the settings, in JSON types.
    """

    asks: list[Ask]
    shots: list[Question]
    label: Label
    facts: dict[str, Any]


def read_asking(path: Path, config: GenerateConfig) -> Asking:
    """Read the questions, the examples and the judge's labels.

    Args:
        path: File of questions.
        config: Settings.

    Raises:
        UsageError: A file cannot be read, or lacks something.
        FormatError: A judge's label is missing or does not fit.
    """
    matches = config.labels_from is None and config.match.rule != "none"
    questions = read_questions(path, with_answers=matches)
    shots = [] if config.shots is None else read_questions(config.shots)
    names = [
        (f"{question.id}-{sample}" if config.samples > 1 else question.id, question, sample)
        for question in questions
        for sample in range(config.samples)
    ]
    labels: list[Any] = [None] * len(names)
    label = Label() if matches else Label(kind="none")
    facts = {**asdict(config), "match": str(config.match), "questions": _digest(path)}
    if config.shots is not None:
        facts["shots"] = _digest(config.shots)
    if config.labels_from is not None:
        table = read_labels(config.labels_from)
        if table.rows is None:
            raise UsageError(f"{table.path} has no ids; expected --labels-from {table.path.name}:ID:LABEL")
        recipe = Recipe(label_threshold=config.label_threshold, label_above=config.label_above)
        rule = label_rule(recipe, table.values, str(table.path))
        labels = [rule.of(f"answer {name!r}", table.of(f"answer {name!r}", name)) for name, _, _ in names]
        label = rule.label
        facts["labels_from"] = [table.digest, *config.labels_from.rsplit(":", 2)[1:]]
    asks = [Ask(*name, given) for name, given in zip(names, labels, strict=True)]
    return Asking(asks=asks, shots=shots, label=label, facts=facts)


def _digest(path: Path) -> str:
    return xxhash.xxh3_128_hexdigest(path.read_bytes())


def shared_tokens(
    path: Path, prompter: Prompter, asking: Asking, config: GenerateConfig, limit: int | None, truncate: bool
) -> list[int]:
    """Return the tokens of the examples with which every prompt begins.

    Args:
        path: File of questions, for messages.
        prompter: Makes the tokens.
        asking: The questions.
        config: Settings.
        limit: Number of positions of the model, or None.
        truncate: Whether prompts are cut.

    Raises:
        UsageError: A prompt is too long for the model, together with its answer.
    """
    questions = [ask.question for ask in asking.asks[:: config.samples]]
    tokens = prompter.tokens(questions)
    for question, prompt in zip(questions, tokens, strict=True):
        if limit is not None and len(prompt) + config.max_new_tokens > limit:
            advice = "" if truncate else ", or give --truncate, which keeps its end"
            raise UsageError(
                f"{path}: prompt {question.id!r} has {len(prompt):,} tokens, with {config.max_new_tokens:,} new ones "
                f"too many for the model's {limit:,} positions; shorten it, give fewer --shots or --max-new-tokens{advice}"
            )
    return prompter.shared(tokens)
