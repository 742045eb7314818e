"""extract: prompts through a causal Hugging Face model to sequences (last token, every layer) and attention graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dali_pipeline.dataset import Dataset, open_dataset
from dali_pipeline.ingest.attention import attention_edges
from dali_pipeline.ingest.prompts import Prompt, read_prompts
from dali_pipeline.journal import remove_leftovers
from dali_pipeline.manifest import MANIFEST_NAME
from dali_pipeline.progress import progress_bar
from dali_pipeline.record import Graphs, Record
from dali_pipeline.schema import DataError, Field, Schema, UsageError
from dali_pipeline.split import Split
from dali_pipeline.writer import SHARD_BYTES, ShardWriter

STRETCH_BYTES = 1 << 30  # of records in memory between two points of restart


Tokens = tuple[Prompt, list[int]]


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """What to take out of the model.

    layers, graph_layers: numbers of hidden states, 0 for the embeddings, l for the output of block l; None for every
    block; () for no graphs. A graph of layer l has the hidden states l as nodes and the attention of block l as edges,
    where its mean over heads is above `attention_threshold`. batch_tokens: padded tokens a forward pass. commit_every:
    prompts after which work is final and a restart goes on.
    """

    layers: tuple[int, ...] | None = None
    graph_layers: tuple[int, ...] | None = None
    attention_threshold: float = 0.01
    dtype: str = "float16"
    batch_tokens: int = 1024
    commit_every: int = 512
    shard_bytes: int = SHARD_BYTES
    split: Split = field(default_factory=Split)

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise UsageError(f"dtype is {self.dtype!r}; expected 'float16' or 'float32'")
        if self.batch_tokens < 1 or self.commit_every < 1:
            raise UsageError("batch tokens and prompts a commit must be at least 1")
        if not 0 <= self.attention_threshold < 1:
            raise UsageError(f"attention threshold is {self.attention_threshold}; expected 0 or more and less than 1")


def extract(model_name: str, prompts_path: Path, out: Path, config: ExtractConfig, device: str = "auto") -> Dataset:
    """Writes the data set `out`; goes on where an earlier run with the same input and settings was stopped.

    model_name: a folder or a name that transformers knows. The same model, prompts, settings and machine give the same
    bytes, interrupted or not. Raises UsageError for input that makes no sense, DataError for a value that the dtype cannot
    hold. Memory: the model, one batch with all its attentions, and twice the records of a stretch (1 GiB at most).
    """
    prompts = read_prompts(prompts_path)
    transformers_logging.disable_progress_bar()
    try:
        model_config = AutoConfig.from_pretrained(model_name)
        tokenizer = AutoTokenizer.from_pretrained(model_name)
    except (OSError, ValueError) as error:
        raise UsageError(f"{model_name} is not a model that transformers can load ({_first_line(error)})") from error
    config = _with_all_layers(config, int(model_config.get_text_config().num_hidden_layers))
    described = {
        **asdict(config),
        "model": _identity(model_name, model_config),
        "prompts": xxhash.xxh3_128_hexdigest(prompts_path.read_bytes()),
    }
    fingerprint = xxhash.xxh3_128_hexdigest(msgspec.json.encode(described, order="sorted"))
    if (out / MANIFEST_NAME).exists():
        data = open_dataset(out)
        if data.manifest.source.get("fingerprint") != fingerprint:
            raise UsageError(f"{out} is a data set of another model, prompts or settings; expected a new folder")
        remove_leftovers(out)
        return data
    hidden, graphs = int(model_config.get_text_config().hidden_size), bool(config.graph_layers)
    schema = Schema(
        sequence=Field(dtype=config.dtype, shape=(hidden,)),
        x=Field(dtype=config.dtype, shape=(hidden,)) if graphs else None,
        edge_attr=Field(dtype=config.dtype) if graphs else None,
    )
    source = {
        "made_by": "extract",
        "model": Path(model_name).name,
        "layers": config.layers,
        "graph_layers": config.graph_layers,
        "attention_threshold": config.attention_threshold,
        "fingerprint": fingerprint,
    }
    tracer = _Tracer(model_name, tokenizer, schema, config, device)
    with (
        ShardWriter(
            out, schema, shard_bytes=config.shard_bytes, split=config.split, source=source, fingerprint=fingerprint
        ) as writer,
        progress_bar() as bar,
    ):
        task = bar.add_task("extract", total=len(prompts), completed=writer.cursor)
        for stretch in tracer.stretches(prompts, writer.cursor):
            records: dict[str, Record] = {}
            for batch in tracer.batches(stretch):
                records.update((record.id, record) for record in tracer.records(batch))
                bar.advance(task, len(batch))
            for prompt, _ in stretch:  # file order, whatever the order of the batches
                writer.write(records[prompt.id])
            writer.commit(writer.cursor + len(stretch))
    return open_dataset(out)


class _Tracer:
    """A model that gives records for batches of prompts."""

    def __init__(self, model_name: str, tokenizer: Any, schema: Schema, config: ExtractConfig, device: str) -> None:
        self.config, self.schema = config, schema
        self._tokenizer = tokenizer
        try:
            self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
            dtype = torch.float32 if self.device.type == "cpu" else "auto"
            model = AutoModelForCausalLM.from_pretrained(model_name, attn_implementation="eager", dtype=dtype)
            self._model = model.base_model.to(self.device).eval()  # without the language-model head
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"{model_name} cannot be loaded on {device} as a causal model ({_first_line(error)})") from error

    def stretches(self, prompts: Sequence[Prompt], begin: int) -> Iterator[list[Tokens]]:
        """Prompts with their tokens from `begin` on, cut where work becomes final: every `commit_every`, or STRETCH_BYTES."""
        assert self.schema.sequence is not None
        assert self.config.layers is not None
        layers, graph_layers = len(self.config.layers), len(self.config.graph_layers or ())
        while begin < len(prompts):
            chunk = prompts[begin : begin + self.config.commit_every]
            tokens = self._tokenizer([prompt.text for prompt in chunk])["input_ids"]
            nbytes = np.cumsum([self.schema.sequence.row_bytes * (layers + graph_layers * len(each)) for each in tokens])
            count = max(1, int(np.searchsorted(nbytes, STRETCH_BYTES, side="right")))
            yield list(zip(chunk[:count], tokens[:count], strict=True))
            begin += count

    def batches(self, stretch: Sequence[Tokens]) -> Iterator[list[Tokens]]:
        """The stretch sorted by length, as many prompts a batch as `batch_tokens` holds with padding."""
        by_length = sorted(stretch, key=lambda pair: len(pair[1]))
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
        """One forward pass. Padding stands on the right, where a causal model's real tokens never look."""
        lengths = torch.tensor([len(tokens) for _, tokens in batch])
        width = int(lengths.max())
        mask = torch.arange(width) < lengths[:, None]
        input_ids = torch.zeros(len(batch), width, dtype=torch.int64)
        input_ids[mask] = torch.tensor([token for _, tokens in batch for token in tokens])
        graph_layers = self.config.graph_layers or ()
        out = self._model(
            input_ids=input_ids.to(self.device),
            attention_mask=mask.to(self.device, torch.int64),
            output_hidden_states=True,
            output_attentions=bool(graph_layers),
            use_cache=False,
        )
        rows, last = torch.arange(len(batch)), lengths - 1
        assert self.config.layers is not None
        # sequences: (B, layers, hidden) · nodes: (B, graph layers, width, hidden) · attention: (B, graph layers, width, width)
        sequences = torch.stack([out.hidden_states[layer][rows, last] for layer in self.config.layers], dim=1).float().cpu()
        if graph_layers:
            nodes = torch.stack([out.hidden_states[layer] for layer in graph_layers], dim=1).float().cpu()
            attention = torch.stack([out.attentions[layer - 1].float().mean(1) for layer in graph_layers], dim=1).cpu()
        for row, (prompt, tokens) in enumerate(batch):
            record = Record(id=prompt.id, group=prompt.group, label=prompt.label, sequence=sequences[row].numpy())
            graphs = _graphs(nodes[row], attention[row], len(tokens), self.config.attention_threshold) if graph_layers else None
            yield replace(record, graphs=graphs).stored(self.schema)


def _graphs(nodes: torch.Tensor, attention: torch.Tensor, count: int, threshold: float) -> Graphs:
    """One record's graphs. nodes: (layers, width, hidden) · attention: (layers, width, width) · count: tokens, <= width."""
    edge_index, weights, edge_counts = attention_edges(attention[:, :count, :count], threshold)
    return Graphs(
        x=nodes[:, :count].reshape(-1, nodes.shape[-1]).numpy(),
        edge_index=edge_index.numpy(),
        edge_attr=weights.numpy(),
        node_counts=np.full(len(nodes), count),
        edge_counts=edge_counts.numpy(),
    )


def _with_all_layers(config: ExtractConfig, blocks: int) -> ExtractConfig:
    every = tuple(range(1, blocks + 1))
    config = replace(
        config,
        layers=every if config.layers is None else config.layers,
        graph_layers=every if config.graph_layers is None else config.graph_layers,
    )
    assert config.layers is not None
    assert config.graph_layers is not None
    if not config.layers or not all(0 <= layer <= blocks for layer in config.layers):
        raise UsageError(f"layers are {config.layers}; expected some of 0 to {blocks}")
    if not all(1 <= layer <= blocks for layer in config.graph_layers):
        raise UsageError(f"graph layers are {config.graph_layers}; expected some of 1 to {blocks}")
    return config


def _identity(model_name: str, model_config: Any) -> dict[str, Any]:
    """What tells this model from another: its configuration, and the sizes of its weights and vocabulary where it is a folder.

    Other files may differ from machine to machine, and the data set's digest depends on this.
    """
    folder = Path(model_name)
    kinds = (".safetensors", ".bin", ".gguf", ".model", "tokenizer.json")
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*")) if path.name.endswith(kinds)}
    return {"config": model_config.to_json_string(), "files": files, "name": None if files else model_name}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
