"""Tracer: run batches of prompts through a causal Hugging Face model, and return records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from dali_pipeline.errors import DataError, UsageError
from dali_pipeline.format.record import Graphs, Record
from dali_pipeline.format.schema import Schema
from dali_pipeline.ingest.extract.anatomy import call, examine
from dali_pipeline.ingest.extract.generate import GenerateConfig
from dali_pipeline.ingest.extract.prompts import Prompt
from dali_pipeline.ingest.readers.attention import attention_edges
from dali_pipeline.loaders.device import resolve_device
from dali_pipeline.runtime.world import World
from dali_pipeline.types import Array
from dali_pipeline.writing.split import SplitRule
from dali_pipeline.writing.writer import SHARD_BYTES

CHUNK_BYTES = 1 << 30  # maximum size of the records in memory


Tokens = tuple[Prompt, list[int]]


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Settings of an extraction.

    Layers are numbered like in transformers: 0 is the embeddings, l the output of block l. A graph of layer l has the hidden
    states l as nodes and the attention of block l as edges.

    Attributes:
        layers: Layers whose hidden states become sequences; None for every block.
        graph_layers: Layers that become graphs; None for every block that has attention, () for no graphs.
        truncate: Whether to cut prompts that have more tokens than the model has positions. They are cut at the start, because
            only their end is read.
        attention_threshold: Mean attention over heads above which two tokens get an edge, from 0 to below 1.
        dtype: Stored type, "float16" or "float32".
        batch_tokens: Maximum number of tokens per forward pass, with padding.
        commit_every: Number of prompts after which work is final; a restart continues there.
        shard_bytes: Maximum size of a shard in bytes.
        split: Rule that assigns groups to splits.
        generate: Settings of answers that the model gives itself; None if the prompts hold the answers.

    Raises:
        UsageError: A value is out of range.
    """

    layers: tuple[int, ...] | None = None
    graph_layers: tuple[int, ...] | None = None
    truncate: bool = False
    attention_threshold: float = 0.01
    dtype: str = "float16"
    batch_tokens: int = 1024
    commit_every: int = 512
    shard_bytes: int = SHARD_BYTES
    split: SplitRule = field(default_factory=SplitRule)
    generate: GenerateConfig | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise UsageError(f"dtype is {self.dtype!r}; expected 'float16' or 'float32'")
        if self.batch_tokens < 1 or self.commit_every < 1:
            raise UsageError("batch tokens and prompts a commit must be at least 1")
        if not 0 <= self.attention_threshold < 1:
            raise UsageError(f"attention threshold is {self.attention_threshold}; expected 0 or more and less than 1")


@lru_cache(maxsize=1)
def load_tokenizer(model_name: str) -> Any:
    """Return the tokenizer of a model; raises the exceptions of transformers."""
    return AutoTokenizer.from_pretrained(model_name)


@lru_cache(maxsize=1)
def _loaded(model_name: str, device: str) -> tuple[Any, torch.device]:
    """Return the model, on the CPU, and the device that is asked for."""
    resolved = resolve_device(device, World())
    try:
        dtype = torch.float32 if resolved.type == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(model_name, attn_implementation="eager", dtype=dtype)
        return model.eval(), resolved
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"{model_name} cannot be loaded on {device} as a causal model ({first_line(error)})") from error


def load_model(model_name: str, device: str) -> tuple[Any, Any, torch.device]:
    """Return the tokenizer, the model without its language-model head, and the model's device."""
    model, resolved = _loaded(model_name, device)
    return load_tokenizer(model_name), model.base_model.to(resolved), resolved


def load_causal_model(model_name: str, device: str) -> tuple[Any, Any, torch.device]:
    """Return the tokenizer, the model with its head, and the model's device."""
    model, resolved = _loaded(model_name, device)
    return load_tokenizer(model_name), model.to(resolved), resolved


def forget_model() -> None:
    """Drop the model and the tokenizer that were loaded last."""
    _loaded.cache_clear()
    load_tokenizer.cache_clear()


class Tracer:
    """A model that turns batches of prompts into records."""

    def __init__(self, model_name: str, schema: Schema, config: ExtractConfig, device: str) -> None:
        self.config, self.schema = config, schema
        self._tokenizer, self._model, self.device = load_model(model_name, device)
        self._attention = examine(self._model, self.device).attention if config.graph_layers else {}
        self._limit = positions_of(self._model.config) if config.truncate else None

    def in_order(self, prompts: Sequence[Prompt], first: int, advance: Callable[[int], None]) -> Iterator[Record]:
        """Yield the records of prompts in their order, whatever the order of the batches.

        Args:
            prompts: The prompts.
            first: Number of the first one in the whole file; plays no part here.
            advance: Called with the number of prompts of each batch.
        """
        for chunk in self.chunks(prompts):
            records: dict[str, Record] = {}
            for batch in self.batches(chunk):
                records.update((record.id, record) for record in self.records(batch))
                advance(len(batch))
            for prompt, _ in chunk:
                yield records.pop(prompt.id)

    def chunks(self, prompts: Sequence[Prompt]) -> Iterator[list[Tokens]]:
        """Yield the prompts with their tokens, in chunks whose records take at most CHUNK_BYTES."""
        assert self.schema.sequence is not None
        assert self.config.layers is not None
        layers, graph_layers = len(self.config.layers), len(self.config.graph_layers or ())
        tokens = tokens_of(self._tokenizer, prompts, self._limit)
        nbytes = [self.schema.sequence.row_bytes * (layers + graph_layers * len(prompt)) for prompt in tokens]
        begin = 0
        while begin < len(prompts):
            count = max(1, int(np.searchsorted(np.cumsum(nbytes[begin:]), CHUNK_BYTES, side="right")))
            yield list(zip(prompts[begin : begin + count], tokens[begin : begin + count], strict=True))
            begin += count

    def batches(self, chunk: Sequence[Tokens]) -> Iterator[list[Tokens]]:
        """Yield the prompts of a chunk sorted by length, in batches of at most `batch_tokens` tokens with padding."""
        by_length = sorted(chunk, key=lambda pair: len(pair[1]))
        batch: list[Tokens] = []
        for pair in by_length:
            if not pair[1]:
                raise DataError(f"prompt {pair[0].id!r} has no tokens")
            if batch and (len(batch) + 1) * len(pair[1]) > self.config.batch_tokens:
                yield batch
                batch = []
            batch.append(pair)
        if batch:
            yield batch

    @torch.inference_mode()
    def records(self, batch: Sequence[Tokens]) -> Iterator[Record]:
        """Yield the records of one forward pass. Padding is on the right, where real tokens of a causal model never attend."""
        lengths = torch.tensor([len(tokens) for _, tokens in batch])
        width = int(lengths.max())
        mask = torch.arange(width) < lengths[:, None]
        input_ids = torch.zeros(len(batch), width, dtype=torch.int64)
        input_ids[mask] = torch.tensor([token for _, tokens in batch for token in tokens])
        graph_layers = self.config.graph_layers or ()
        on_device = input_ids.to(self.device), mask.to(self.device, torch.int64)
        out = call(self._model, *on_device, attentions=bool(graph_layers))
        rows, last = torch.arange(len(batch)), lengths - 1
        assert self.config.layers is not None
        # sequences: (B, layers, hidden); nodes: (B, graph layers, width, hidden); attention: (B, graph layers, width, width)
        sequences = torch.stack([out.hidden_states[layer][rows, last] for layer in self.config.layers], dim=1).float().cpu()
        if graph_layers:
            nodes = torch.stack([out.hidden_states[layer] for layer in graph_layers], dim=1).float().cpu()
            attention = torch.stack([self._mean_attention(out, layer) for layer in graph_layers], dim=1).cpu()
        for row, (prompt, tokens) in enumerate(batch):
            record = Record(id=prompt.id, group=prompt.group, label=prompt.label, sequence=sequences[row].numpy())
            graphs = (
                graphs_of(nodes[row], attention[row], len(tokens), self.config.attention_threshold) if graph_layers else None
            )
            yield replace(record, graphs=graphs).stored(self.schema)

    def _mean_attention(self, out: Any, layer: int) -> torch.Tensor:
        """Return the attention of a block as the mean over its heads, (B, width, width)."""
        mean: torch.Tensor = out.attentions[self._attention[layer]].float().mean(1)
        return mean


def tokens_of(tokenizer: Any, prompts: Sequence[Prompt], limit: int | None = None) -> list[list[int]]:
    """Return the tokens of each prompt; prompts longer than `limit` are cut at the start, after the special token."""
    tokenizer.truncation_side = "left"
    options = {"truncation": limit is not None, "max_length": limit, "verbose": False}
    token_ids: list[list[int]] = tokenizer([prompt.text for prompt in prompts], **options)["input_ids"]
    return token_ids


def positions_of(model_config: Any) -> int | None:
    """Return the maximum number of tokens that a model has positions for, or None if it has no such limit."""
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def graphs_of(
    nodes: torch.Tensor, attention: torch.Tensor, count: int, threshold: float, fields: Mapping[str, Array] | None = None
) -> Graphs:
    """Return the graphs of one record.

    nodes: (layers, width, hidden). attention: (layers, width, width). count: number of tokens, at most `width`.
    """
    edge_index, weights, edge_counts = attention_edges(attention[:, :count, :count].numpy(), threshold)
    return Graphs(
        x=nodes[:, :count].reshape(-1, nodes.shape[-1]).numpy(),
        edge_index=edge_index,
        edge_attr=weights,
        node_counts=np.full(len(nodes), count),
        edge_counts=edge_counts,
        fields=fields or {},
    )


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return str(error).strip().split("\n")[0].rstrip(".")
