"""Generate answers in batches: left padding, a shared prefix that is computed once, and draws that no batch changes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import xxhash
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from dali_pipeline.errors import UsageError
from dali_pipeline.ingest.extract.matching import Match
from dali_pipeline.ingest.extract.questions import Question

Positions = Literal["answer", "last", "last-prompt"]
SHOTS_END = "\n\n"  # between the examples in front of a question
EIGENVALUES = 10  # number of the largest ones that are kept per head


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Settings of answers that the model gives itself.

    Attributes:
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: 0 takes the likeliest token; above 0 tokens are drawn.
        top_p: Share of probability that tokens are drawn from, likeliest first.
        samples: Number of answers per question; more than one needs a temperature.
        seed: Seed of the draws. An answer depends on the seed, the question's id and the number of the sample alone.
        chat: Whether the tokenizer's chat template is applied.
        shots: File of examples that are put in front of every question, or None.
        stop: Texts at which an answer ends; None for the end of the line with `shots` and without `chat`, otherwise for none.
        match: When an answer counts as right.
        labels_from: Table with a judge's labels by id, FILE[:ID:LABEL], instead of `match`; or None.
        label_threshold: A judge's score below this value gives label 1; or None.
        label_above: A judge's score above this value gives label 1; or None.
        positions: Tokens whose hidden states are kept: all of the "answer", its "last", or the "last-prompt".
        attention_features: Whether the lookback ratio and the Laplacian's eigenvalues of every head are kept.

    Raises:
        UsageError: A value is out of range, or two exclude each other.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    samples: int = 1
    seed: int = 0
    chat: bool = False
    shots: Path | None = None
    stop: tuple[str, ...] | None = None
    match: Match = field(default_factory=Match)
    labels_from: str | None = None
    label_threshold: float | None = None
    label_above: float | None = None
    positions: Positions = "answer"
    attention_features: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.samples < 1 or self.seed < 0:
            raise UsageError("new tokens and samples must be at least 1, and the seed at least 0")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}; expected 0 for the likeliest tokens, or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p is {self.top_p}; expected more than 0 and up to 1")
        if not self.temperature and (self.samples > 1 or self.top_p < 1):
            raise UsageError("the likeliest tokens are the same in every sample; give a --temperature above 0")
        if self.positions not in get_args(Positions):
            raise UsageError(f"positions are {self.positions!r}; expected {', '.join(get_args(Positions))}")
        if self.stop is not None and not all(self.stop):
            raise UsageError("a stop text is empty; expected a text at which answers end")
        if self.labels_from is not None and self.match != Match():
            raise UsageError("labels come from --labels-from and from --match; expected one of them")
        if self.labels_from is None and (self.label_threshold is not None or self.label_above is not None):
            raise UsageError("a threshold is for the scores of --labels-from; give both")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts at which an answer ends."""
        if self.stop is not None:
            return self.stop
        return ("\n",) if self.shots is not None and not self.chat else ()


class Ask(NamedTuple):
    """One answer that is wanted: a question, the number of the sample, and the record's id and label.

    label: a judge's label; None if the answer is matched with the references.
    """

    id: str
    question: Question
    sample: int
    label: Any = None


class Answer(NamedTuple):
    """An answer of a model.

    tokens: its tokens without the one that ended it; of an empty answer that one alone. text: without special tokens and spaces
    at its ends.
    """

    tokens: list[int]
    text: str


class Prompter:
    """Makes the tokens of prompts: with examples in front, or by the tokenizer's chat template.

    Args:
        tokenizer: The tokenizer.
        config: Settings.
        shots: Examples in front of every question.
        limit: Number of tokens beyond which a plain prompt is cut at its start, or None.
    """

    def __init__(self, tokenizer: Any, config: GenerateConfig, shots: Sequence[Question], limit: int | None = None) -> None:
        self._tokenizer, self._config, self._shots, self._limit = tokenizer, config, shots, limit
        if config.chat and not getattr(tokenizer, "chat_template", None):
            raise UsageError("the model's tokenizer has no chat template; expected one for --chat, so leave --chat out")

    def tokens(self, questions: Sequence[Question]) -> list[list[int]]:
        """Return the tokens of each question's prompt."""
        if self._config.chat:
            turns = self._turns()
            return [self._templated([*turns, _said("user", question.text)], prompt=True) for question in questions]
        return self._plain([self._examples() + question.text for question in questions])

    def shared(self, tokens: Sequence[Sequence[int]]) -> list[int]:
        """Return the tokens of the examples, as far as all prompts begin with them; two tokens of each prompt are left."""
        if not self._shots:
            return []
        own = self._templated(self._turns(), prompt=False) if self._config.chat else self._plain([self._examples()])[0]
        count = min(_common(own, prompt) for prompt in tokens)
        return own[: max(0, min(count, min(map(len, tokens)) - 2))]

    def _plain(self, texts: list[str]) -> list[list[int]]:
        self._tokenizer.truncation_side = "left"
        options = {"truncation": self._limit is not None, "max_length": self._limit, "verbose": False}
        token_ids: list[list[int]] = self._tokenizer(texts, **options)["input_ids"]
        return token_ids

    def _examples(self) -> str:
        return "".join(f"{_before(shot.text)}{shot.answers[0]}{SHOTS_END}" for shot in self._shots)

    def _turns(self) -> list[dict[str, str]]:
        return [turn for shot in self._shots for turn in (_said("user", shot.text), _said("assistant", shot.answers[0]))]

    def _templated(self, turns: list[dict[str, str]], *, prompt: bool) -> list[int]:
        try:
            tokens = self._tokenizer.apply_chat_template(turns, add_generation_prompt=prompt, tokenize=True, return_dict=True)
        except Exception as error:  # whatever the template's own code raises
            raise UsageError(f"the tokenizer's chat template cannot be applied ({' '.join(str(error).split())})") from error
        return list(tokens["input_ids"])


def _said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _before(text: str) -> str:
    """Return a prompt with a space behind it, unless it ends with one."""
    return text if text[-1].isspace() else text + " "


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the number of tokens that two prompts have in common at their begin."""
    count = next((number for number, (left, right) in enumerate(zip(one, other, strict=False)) if left != right), None)
    return min(len(one), len(other)) if count is None else count


class Generator:
    """Generates the answers of a batch.

    Args:
        tokenizer: The tokenizer.
        model: The causal model, with its head. Its own generation settings, such as a temperature, are replaced.
        config: Settings.
    """

    def __init__(self, tokenizer: Any, model: Any, config: GenerateConfig) -> None:
        self._tokenizer, self._model, self._config = tokenizer, model, config
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        known = model.get_input_embeddings().num_embeddings  # some models end their text with a token that they lack
        candidates = (tokenizer.pad_token_id, *self._ends)
        self._pad = next((token for token in candidates if token is not None and 0 <= token < known), 0)
        model.generation_config = GenerationConfig(
            max_new_tokens=config.max_new_tokens, do_sample=False, eos_token_id=self._ends or None, pad_token_id=self._pad
        )

    @torch.inference_mode()
    def answers(self, asks: Sequence[Ask], prompts: Sequence[Sequence[int]], prefix: int, cache: Any) -> list[Answer]:
        """Return the answers of a batch.

        Args:
            asks: What is asked.
            prompts: Tokens of each prompt.
            prefix: Number of tokens at the begin of every prompt whose states `cache` holds.
            cache: The states of these tokens for one prompt, which are not changed, or None.
        """
        width, count = max(map(len, prompts)), len(prompts)
        ids = torch.full((count, width), self._pad, dtype=torch.int64)
        mask = torch.zeros(count, width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            padding = width - len(prompt)  # between the prefix and the rest of the prompt
            ids[row, :prefix], mask[row, :prefix] = torch.tensor(prompt[:prefix], dtype=torch.int64), 1
            ids[row, prefix + padding :], mask[row, prefix + padding :] = torch.tensor(prompt[prefix:], dtype=torch.int64), 1
        device = self._model.device
        out = self._model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=LogitsProcessorList(self._drawing(asks, width)),
            stopping_criteria=StoppingCriteriaList([_Stop(self, width)] if self._config.stops else []),
            **({} if cache is None else {"past_key_values": repeated(cache, count)}),
        )
        return [self.cut(tokens) for tokens in out[:, width:].tolist()]

    def cut(self, tokens: Sequence[int]) -> Answer:
        """Return the answer before the first token that ends a text, or with which a stop text is complete."""
        end = next((number for number, token in enumerate(tokens) if token in self._ends), len(tokens))
        if self.stopped(tokens[:end]):
            end = next(number for number in range(end) if self.stopped(tokens[: number + 1]))
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        return Answer(list(tokens[: max(end, 1)]), text)

    def stopped(self, tokens: Sequence[int]) -> bool:
        """Return whether tokens hold a stop text."""
        text = self._tokenizer.decode(tokens) if self._config.stops else ""
        return any(stop in text for stop in self._config.stops)

    def _drawing(self, asks: Sequence[Ask], width: int) -> list[LogitsProcessor]:
        config = self._config
        if not config.temperature:
            return []
        top_p = [TopPLogitsWarper(config.top_p)] if config.top_p < 1 else []
        numbers = np.stack([_numbers(config, ask) for ask in asks])
        return [TemperatureLogitsWarper(config.temperature), *top_p, _Draw(torch.from_numpy(numbers), width)]


def _numbers(config: GenerateConfig, ask: Ask) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the random numbers, in [0, 1), by which the tokens of one answer are drawn."""
    words = (config.seed, xxhash.xxh3_64_intdigest(ask.question.id.encode()), ask.sample)
    return np.random.default_rng(np.random.SeedSequence(words)).random(config.max_new_tokens)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Draw the next token of each row by a random number of its own, and leave that token alone.

    transformers draws all rows from one stream, so that an answer would depend on its neighbours.

    numbers: (B, new tokens). width: number of tokens of a prompt with padding.
    """

    def __init__(self, numbers: torch.Tensor, width: int) -> None:
        self._numbers_BN, self._width = numbers, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn_B1 = self._numbers_BN[:, input_ids.shape[1] - self._width, None].to(scores.device)
        sums_BV = scores.double().softmax(-1).cumsum(-1)
        token_B1 = torch.searchsorted(sums_BV, drawn_B1 * sums_BV[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """End the rows whose answer holds a stop text."""

    def __init__(self, generator: Generator, width: int) -> None:
        self._generator, self._width = generator, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = input_ids[:, self._width :].tolist()
        return torch.tensor([self._generator.stopped(row) for row in rows], device=input_ids.device)


def repeated(cache: Any, count: int) -> Any:
    """Return a copy of a cache of one prompt for `count` prompts."""
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(count)
    return own
