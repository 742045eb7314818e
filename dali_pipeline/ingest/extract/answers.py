"""Answerer: let a causal Hugging Face model answer questions, and return the answers with their traces as records.

A batch of prompts is answered, then each prompt runs once more together with its answer, and everything is read from that
pass. Position t holds token t: its hidden states are those at t, its log-probability is given by the pass at t - 1.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from dali_pipeline.errors import DataError
from dali_pipeline.format.encoding import TEXT
from dali_pipeline.format.label import Label
from dali_pipeline.format.record import Record
from dali_pipeline.format.schema import Field, Schema
from dali_pipeline.ingest.extract.anatomy import attention_taps, call, each_attention, examine
from dali_pipeline.ingest.extract.generate import EIGENVALUES, Answer, Ask, Generator, Prompter, repeated
from dali_pipeline.ingest.extract.heads import Received, laplacian_eigenvalues, lookback_ratio
from dali_pipeline.ingest.extract.questions import Question
from dali_pipeline.ingest.extract.tracer import CHUNK_BYTES, ExtractConfig, graphs_of, load_causal_model, positions_of
from dali_pipeline.storage.whole import write_whole

ANSWERS_NAME = ".answers"
LOGIT_BYTES = 1 << 26  # of float32 log-probabilities at a time


class Asked(NamedTuple):
    """One answer that is wanted, with the tokens of its prompt."""

    ask: Ask
    prompt: list[int]


class Answered(NamedTuple):
    """One answer. tokens: those of the prompt and of the answer. prompt: number of tokens of the prompt."""

    ask: Ask
    answer: Answer
    tokens: list[int]
    prompt: int


def answers_schema(config: ExtractConfig, hidden: int, heads: tuple[int, int], label: Label) -> Schema:
    """Return the schema of the records.

    Args:
        config: Settings, with the numbers of all layers.
        hidden: Number of features of a hidden state.
        heads: Number of blocks that have attention, and of their heads.
        label: What a record's label is.
    """
    assert config.generate is not None
    assert config.layers is not None
    graphs = bool(config.graph_layers)
    fields = {
        "step.token_ids": Field(dtype="int32"),
        "step.logprob": Field(dtype="float32"),
        "step.entropy": Field(dtype="float32"),
        "record.answer": Field(dtype=TEXT),
        "record.prompt": Field(dtype=TEXT),
        "record.prompt_steps": Field(dtype="int32"),
    }
    if config.generate.attention_features:
        fields["record.lookback_ratio"] = Field(dtype="float32", shape=heads, axes=("layer", "head"))
        shape, axes = (*heads, EIGENVALUES), ("layer", "head", "eigenvalue")
        fields["record.laplacian_eigenvalues"] = Field(dtype="float32", shape=shape, axes=axes)
    if graphs:
        fields["node.is_answer"] = Field(dtype="bool")
    return Schema(
        sequence=Field(dtype=config.dtype, shape=(len(config.layers), hidden), axes=("layer", "feature")),
        x=Field(dtype=config.dtype, shape=(hidden,)) if graphs else None,
        edge_attr=Field(dtype=config.dtype) if graphs else None,
        fields=fields,
        step_axis="token",
        layers=config.layers,
        label=label,
    )


@dataclass
class Prefix:
    """Examples in front of every prompt, computed once.

    count: number of tokens. cache: their keys and values for one prompt, or None if every pass computes them anew. received:
    attention among them, by block.
    """

    count: int = 0
    cache: Any = None
    received: dict[int, Received] = field(default_factory=dict)

    @property
    def cached(self) -> int:
        """Number of tokens that passes leave out."""
        return 0 if self.cache is None else self.count


class Answerer:
    """A model that turns questions into records.

    Args:
        model_name: Folder of a model, or a name that transformers knows.
        shots: Examples in front of every question.
        shared: Tokens at the begin of every prompt that are the examples'.
        answers: Folder of the answers that were given before.
        schema: Schema of the records.
        config: Settings.
        device: "auto", "cpu", "cuda" or "cuda:N".
    """

    def __init__(
        self,
        model_name: str,
        shots: Sequence[Question],
        shared: Sequence[int],
        answers: Path,
        schema: Schema,
        config: ExtractConfig,
        device: str,
    ) -> None:
        assert config.generate is not None
        self.config, self.schema, self._own, self._answers = config, schema, config.generate, answers
        tokenizer, self._model, self.device = load_causal_model(model_name, device)
        limit = positions_of(self._model.config) if config.truncate else None
        self._prompter = Prompter(tokenizer, self._own, shots, None if limit is None else limit - self._own.max_new_tokens)
        self._generator = Generator(tokenizer, self._model, self._own)
        anatomy = examine(self._model.base_model, self.device)
        self._attention = anatomy.attention
        self._wanted = set(config.graph_layers or ()) | (set(self._attention) if self._own.attention_features else set())
        self._taps = attention_taps(self._model.base_model, self.device) if self._wanted else {}
        # states of other kinds than attention's keys and values know nothing of padding, nor can they be continued
        self._pads = len(self._attention) == len(anatomy.widths) - 1
        text_config = self._model.config.get_text_config()
        windows = [getattr(text_config, name, None) for name in ("sliding_window", "attention_chunk_size")]
        # a window counts the padding between a prefix and the rest of a prompt
        self._window = min([window for window in windows if window], default=sys.maxsize)
        self._keeps = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._prefix = self._prefix_of(shared)

    @torch.inference_mode()
    def _prefix_of(self, tokens: Sequence[int]) -> Prefix:
        prefix = Prefix(count=len(tokens))
        if not tokens or not self._pads or self._window < len(tokens) + self.config.batch_tokens:
            return prefix
        received: dict[int, Received] = {}
        cache = DynamicCache()
        ids = torch.tensor([list(tokens)], device=self.device)
        out = self._pass(
            ids, torch.ones_like(ids), cache, lambda block, map_: received.update({block: Received.of(map_.float()[0])})
        )
        if isinstance(out.past_key_values, DynamicCache) and out.past_key_values.get_seq_length() == len(tokens):
            prefix = Prefix(count=len(tokens), cache=out.past_key_values, received=received)
        return prefix

    def in_order(self, asks: Sequence[Ask], first: int, advance: Callable[[int], None]) -> Iterator[Record]:
        """Yield the records of answers in the order of `asks`, whatever the order of the batches.

        Args:
            asks: What is asked.
            first: Number of the first one in the whole file, by which answers are found again.
            advance: Called with the number of answers of each batch.
        """
        prompts = self._prompter.tokens([ask.question for ask in asks])
        asked = [Asked(ask, prompt) for ask, prompt in zip(asks, prompts, strict=True)]
        number = 0
        for chunk in self.chunks(asked):
            records: dict[str, Record] = {}
            for batch in self.batches(chunk):
                answers = self.answers(batch, self._answers / f"{first:09d}-{number:05d}.json")
                number += 1
                records.update((record.id, record) for record in self.records(batch, answers))
                advance(len(batch))
            for one in chunk:
                yield records.pop(one.ask.id)

    def chunks(self, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
        """Yield the prompts in chunks whose records take at most CHUNK_BYTES, however long the answers are."""
        assert self.schema.sequence is not None
        longest = self._own.max_new_tokens
        steps = longest if self._own.positions == "answer" else 1
        node_bytes = 0 if self.schema.x is None else self.schema.x.row_bytes * len(self.config.graph_layers or ())
        chunk: list[Asked] = []
        nbytes = 0
        for one in asked:
            own = self.schema.sequence.row_bytes * steps + node_bytes * (len(one.prompt) - self._prefix.count + longest)
            if chunk and nbytes + own > CHUNK_BYTES:
                yield chunk
                chunk, nbytes = [], 0
            chunk.append(one)
            nbytes += own
        if chunk:
            yield chunk

    def batches(self, chunk: Sequence[Asked]) -> Iterator[list[Asked]]:
        """Yield a chunk sorted by length, in batches of at most `batch_tokens` tokens with padding and new ones."""
        batch: list[Asked] = []
        for one in sorted(chunk, key=lambda asked: len(asked.prompt)):
            if not one.prompt:
                raise DataError(f"prompt {one.ask.question.id!r} has no tokens")
            tokens = (len(batch) + 1) * (len(one.prompt) - self._prefix.cached + self._own.max_new_tokens)
            differs = bool(batch) and len(batch[0].prompt) != len(one.prompt)
            if batch and (tokens > self.config.batch_tokens or (differs and not self._pads)):
                yield batch
                batch = []
            batch.append(one)
        if batch:
            yield batch

    def answers(self, batch: Sequence[Asked], path: Path) -> list[Answer]:
        """Return the answers of a batch, from a file if they were given before; otherwise write that file."""
        names = [one.ask.id for one in batch]
        if path.exists():
            known = json.loads(path.read_bytes())
            if [answer["id"] for answer in known] == names:
                return [Answer(answer["tokens"], answer["text"]) for answer in known]
        answers = self._generator.answers(
            [one.ask for one in batch], [one.prompt for one in batch], self._prefix.cached, self._prefix.cache
        )
        rows = [
            {"id": one.ask.id, "tokens": answer.tokens, "text": answer.text, "right": self._is_right(one.ask, answer)}
            for one, answer in zip(batch, answers, strict=True)
        ]
        write_whole(path, json.dumps(rows).encode())
        return answers

    def _is_right(self, ask: Ask, answer: Answer) -> bool | None:
        """Return whether an answer matches its references; None if something else, or nothing, is its label."""
        if self.schema.labels.kind == "none" or ask.label is not None:
            return None
        return self._own.match.is_right(answer.text, ask.question.answers)

    @torch.inference_mode()
    def records(self, batch: Sequence[Asked], answers: Sequence[Answer]) -> Iterator[Record]:
        """Yield the records of one forward pass. Padding is on the right, where real tokens of a causal model never attend."""
        begin = self._prefix.cached
        answered = [
            Answered(one.ask, answer, [*one.prompt, *answer.tokens], len(one.prompt))
            for one, answer in zip(batch, answers, strict=True)
        ]
        length_B = torch.tensor([len(one.tokens) for one in answered])
        prompt_B = torch.tensor([one.prompt for one in answered])
        width = int(length_B.max())
        ids_BR = torch.zeros(len(batch), width - begin, dtype=torch.int64)
        for row, one in enumerate(answered):
            ids_BR[row, : len(one.tokens) - begin] = torch.tensor(one.tokens[begin:])
        mask_BC = (torch.arange(width) < length_B[:, None]).long()
        steps = [self._steps(one) for one in answered]
        lowest, highest = max(0, min(span.start for span in steps) - 1 - begin), max(span.stop for span in steps) - 1 - begin
        heads = _Heads(self, prompt_B.to(self.device), length_B.to(self.device))
        cache = None if self._prefix.cache is None else repeated(self._prefix.cache, len(batch))
        kept = torch.arange(lowest, highest, device=self.device)
        more = {"logits_to_keep": kept} if self._keeps else {}
        out = self._pass(ids_BR.to(self.device), mask_BC.to(self.device), cache, heads.take, **more)
        logits_BKV = out.logits if self._keeps else out.logits[:, lowest:highest]
        assert self.config.layers is not None
        for row, (one, span) in enumerate(zip(answered, steps, strict=True)):
            own = slice(span.start - begin, span.stop - begin)
            states_TLH = torch.stack([out.hidden_states[layer][row, own] for layer in self.config.layers], dim=1)
            logprob_T, entropy_T = _probabilities(logits_BKV[row], one.tokens, span, begin + lowest + 1)
            fields = {
                "step.token_ids": np.array(one.tokens[span.start : span.stop]),
                "step.logprob": logprob_T,
                "step.entropy": entropy_T,
                "record.answer": one.answer.text,
                "record.prompt": one.ask.question.text,
                "record.prompt_steps": np.array(one.prompt),
                **heads.fields(row),
            }
            right = self._is_right(one.ask, one.answer)
            record = Record(
                id=one.ask.id,
                group=one.ask.question.group,
                label=one.ask.label if right is None else int(not right),
                sequence=states_TLH.float().cpu().numpy(),
                graphs=self._graphs(out, heads, row, one),
                fields=fields,
            )
            yield record.stored(self.schema)

    def _steps(self, one: Answered) -> range:
        """Return the positions whose hidden states are kept."""
        if self._own.positions == "answer":
            return range(one.prompt, len(one.tokens))
        end = one.prompt if self._own.positions == "last-prompt" else len(one.tokens)
        return range(end - 1, end)

    def _graphs(self, out: Any, heads: _Heads, row: int, one: Answered) -> Any:
        """Return the graphs of one record, whose nodes are the tokens behind the examples."""
        if not self.config.graph_layers:
            return None
        count, begin = len(one.tokens) - self._prefix.count, self._prefix.count - self._prefix.cached
        nodes = [out.hidden_states[layer][row, begin : begin + count] for layer in self.config.graph_layers]
        maps = [heads.maps[layer][row, :count, :count] for layer in self.config.graph_layers]
        is_answer = np.arange(count) >= one.prompt - self._prefix.count
        return graphs_of(
            torch.stack(nodes).float().cpu(),
            torch.stack(maps),
            count,
            self.config.attention_threshold,
            {"node.is_answer": np.tile(is_answer, len(nodes))},
        )

    def _pass(
        self, ids: torch.Tensor, mask: torch.Tensor, cache: Any, take: Callable[[int, torch.Tensor], None], **more: Any
    ) -> Any:
        """Run the model, with its head, and hand over every attention that is wanted, one after the other."""
        if cache is not None:
            more |= {"past_key_values": cache, "use_cache": True}
        if not self._wanted:
            return call(self._model, ids, mask, attentions=False, **more)

        def chosen(block: int, attention: torch.Tensor) -> None:
            if block in self._wanted:
                take(block, attention)

        if self._taps:
            with each_attention(self._model.base_model, self._taps, chosen):
                return call(self._model, ids, mask, attentions=False, **more)
        out = call(self._model, ids, mask, attentions=True, **more)
        for block, index in self._attention.items():
            chosen(block, out.attentions[index])
        return out


class _Heads:
    """What is kept of the attentions of one pass, block by block.

    Attributes:
        maps: The mean over the heads among the tokens behind the examples, (B, n, n) on the CPU, by block.
    """

    def __init__(self, answerer: Answerer, prompt_B: torch.Tensor, length_B: torch.Tensor) -> None:
        self.maps: dict[int, torch.Tensor] = {}
        self._prefix, self._config = answerer._prefix, answerer.config
        self._features = answerer._own.attention_features
        self._prompt_B, self._length_B = prompt_B, length_B
        self._lookback: dict[int, torch.Tensor] = {}
        self._eigenvalues: dict[int, torch.Tensor] = {}

    def take(self, block: int, attention: torch.Tensor) -> None:
        """Take what is kept of the attention of a block, (B, heads, rows, columns)."""
        whole = attention.float()
        if block in (self._config.graph_layers or ()):
            begin = self._prefix.count
            self.maps[block] = whole[:, :, begin - self._prefix.cached :, begin:].mean(1).cpu()
        if self._features:
            self._lookback[block] = lookback_ratio(whole, self._prompt_B, self._length_B).cpu()
            before = self._prefix.received.get(block) if self._prefix.cached else None
            self._eigenvalues[block] = laplacian_eigenvalues(whole, self._length_B, EIGENVALUES, before).cpu()

    def fields(self, row: int) -> dict[str, Any]:
        """Return the record fields of one prompt."""
        if not self._features:
            return {}
        return {
            "record.lookback_ratio": np.stack([self._lookback[block][row].numpy() for block in sorted(self._lookback)]),
            "record.laplacian_eigenvalues": np.stack(
                [self._eigenvalues[block][row].numpy() for block in sorted(self._eigenvalues)]
            ),
        }


def _probabilities(logits_KV: torch.Tensor, tokens: Sequence[int], span: range, first: int) -> tuple[Any, Any]:
    """Return the log-probability of the tokens at some positions, and the entropy of the distribution of each, (T,) float32.

    Both are of the model's own distribution: without temperature or top-p. Those of the very first token, which nothing stands
    before, are NaN.

    Args:
        logits_KV: Logits; row k is the distribution of the token at position `first` + k.
        tokens: All tokens.
        span: The positions.
        first: See `logits_KV`.
    """
    logprobs, entropies = np.full(len(span), np.nan, np.float32), np.full(len(span), np.nan, np.float32)
    at_a_time = max(1, LOGIT_BYTES // (4 * logits_KV.shape[-1]))
    positions = [position for position in span if position > 0]
    for begin in range(0, len(positions), at_a_time):
        part = positions[begin : begin + at_a_time]
        rows = slice(part[0] - first, part[-1] - first + 1)
        log_TV = logits_KV[rows].float().log_softmax(-1)
        given_T = log_TV.gather(1, torch.tensor([[tokens[position]] for position in part], device=log_TV.device))[:, 0]
        entropy_T = torch.special.entr(log_TV.exp()).sum(-1)
        own = slice(part[0] - span.start, part[-1] - span.start + 1)
        logprobs[own], entropies[own] = given_T.cpu().numpy(), entropy_T.cpu().numpy()
    return logprobs, entropies


def describe_answers(folder: Path) -> dict[str, Any]:
    """Return what the manifest says about all answers in a folder: how many match, and how many are empty."""
    rows = [row for path in sorted(folder.glob("*.json")) for row in json.loads(path.read_bytes())]
    right, empty = sum(row["right"] is True for row in rows), sum(not row["text"] for row in rows)
    judged = sum(row["right"] is not None for row in rows)
    sentence = f"{len(rows):,} answers"
    if judged:
        sentence += f": {right:,} match a reference (label 0), {judged - right:,} do not (label 1, the positive class)"
    return {"labels": sentence + f"; {empty:,} {'is' if empty == 1 else 'are'} empty", "empty_answers": empty}
