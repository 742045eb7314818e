"""extract: prompts through a causal Hugging Face model to sequences (last token, every layer) and attention graphs."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import xxhash
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from dali_pipeline.ingest.attention import attention_edges
from dali_pipeline.ingest.progress import progress_bar
from dali_pipeline.manifest import MANIFEST_NAME, Dataset, open_dataset
from dali_pipeline.schema import DataError, Field, Graphs, Record, Schema, UsageError
from dali_pipeline.split import Split
from dali_pipeline.writer import SHARD_BYTES, ShardWriter


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of the prompts file."""

    id: str
    group: str
    text: str
    label: int


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


def read_prompts(path: Path) -> list[Prompt]:
    """Rows of a CSV file with the columns `prompt` and `label`, and perhaps `id` (else the row's number) and `group`."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = rows.fieldnames or []
            for column in ("prompt", "label"):
                if column not in columns:
                    raise UsageError(f"{path} has no column {column!r}; it has {', '.join(columns) or 'no header'}")
            prompts = [_prompt(path, number, row) for number, row in enumerate(rows)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read as CSV ({error})") from error
    if not prompts:
        raise UsageError(f"{path} has no rows; expected a prompt in each")
    twice = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if twice:
        raise UsageError(f"{path} gives the id {twice[0]!r} to several rows; expected each id once")
    return prompts


def _prompt(path: Path, number: int, row: dict[str, str]) -> Prompt:
    try:
        label = int(row["label"])
    except (TypeError, ValueError):
        raise UsageError(f"{path}, row {number + 1} has the label {row['label']!r}; expected a whole number") from None
    if not row["prompt"]:
        raise UsageError(f"{path}, row {number + 1} has an empty prompt")
    name = row.get("id") or str(number)
    return Prompt(id=name, group=row.get("group") or name, text=row["prompt"], label=label)


def extract(model_name: str, prompts_path: Path, out: Path, config: ExtractConfig, device: str = "auto") -> Dataset:
    """Writes the data set `out`; goes on where an earlier run with the same input and settings was stopped.

    model_name: a folder or a name that transformers knows. The same model, prompts, settings and machine give the same
    bytes, interrupted or not. Raises UsageError for input that makes no sense, DataError for a value that the dtype cannot
    hold. Memory: the model, one batch with all its attentions, and the shards of `commit_every` prompts.
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
        return data
    hidden = int(model_config.get_text_config().hidden_size)
    graphs = bool(config.graph_layers)
    writer = ShardWriter(
        out,
        Schema(
            sequence=Field(dtype=config.dtype, shape=(hidden,)),
            x=Field(dtype=config.dtype, shape=(hidden,)) if graphs else None,
            edge_attr=Field(dtype=config.dtype) if graphs else None,
        ),
        shard_bytes=config.shard_bytes,
        split=config.split,
        source={
            "made_by": "extract",
            "model": Path(model_name).name,
            "layers": config.layers,
            "graph_layers": config.graph_layers,
            "attention_threshold": config.attention_threshold,
            "fingerprint": fingerprint,
        },
        fingerprint=fingerprint,
    )
    with writer:
        if writer.cursor < len(prompts):
            tracer = _Tracer(model_name, tokenizer, config, device)
            with progress_bar() as bar:
                task = bar.add_task("extract", total=len(prompts), completed=writer.cursor)
                for begin in range(writer.cursor, len(prompts), config.commit_every):
                    stretch = prompts[begin : begin + config.commit_every]
                    records: dict[Prompt, Record] = {}
                    for batch in tracer.batches(stretch):
                        records.update(zip((prompt for prompt, _ in batch), tracer.records(batch), strict=True))
                        bar.advance(task, len(batch))
                    for prompt in stretch:  # file order, whatever the order of the batches
                        writer.write(records[prompt])
                    writer.commit(begin + len(stretch))
    return open_dataset(out)


class _Tracer:
    """A model that gives records for batches of prompts."""

    def __init__(self, model_name: str, tokenizer: Any, config: ExtractConfig, device: str) -> None:
        self.config = config
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        dtype = torch.float32 if self.device.type == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(model_name, attn_implementation="eager", dtype=dtype)
        self._model = model.base_model.to(self.device).eval()  # without the language-model head
        self._tokenizer = tokenizer

    def batches(self, prompts: Sequence[Prompt]) -> Iterator[list[tuple[Prompt, list[int]]]]:
        """Prompts with their tokens, sorted by length, as many a batch as `batch_tokens` holds with padding."""
        tokens = self._tokenizer([prompt.text for prompt in prompts])["input_ids"]
        by_length = sorted(zip(prompts, tokens, strict=True), key=lambda pair: len(pair[1]))
        batch: list[tuple[Prompt, list[int]]] = []
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
    def records(self, batch: Sequence[tuple[Prompt, list[int]]]) -> Iterator[Record]:
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
        # sequences: (B, layers, hidden)
        sequences = torch.stack([out.hidden_states[layer][rows, last] for layer in self.config.layers], dim=1).cpu().numpy()
        # nodes: (B, layers, width, hidden) · attention: (B, layers, width, width)
        nodes = torch.stack([out.hidden_states[layer] for layer in graph_layers], dim=1).cpu() if graph_layers else None
        attention = (
            torch.stack([out.attentions[layer - 1].float().mean(1) for layer in graph_layers], dim=1).cpu()
            if graph_layers
            else None
        )
        for row, (prompt, tokens) in enumerate(batch):
            graphs = None
            if nodes is not None and attention is not None:
                n = len(tokens)
                edge_index, weights, edge_counts = attention_edges(attention[row, :, :n, :n], self.config.attention_threshold)
                graphs = Graphs(
                    x=nodes[row, :, :n].reshape(-1, nodes.shape[-1]).numpy().astype(self.config.dtype),
                    edge_index=edge_index.numpy(),
                    edge_attr=weights.numpy().astype(self.config.dtype),
                    node_counts=np.full(len(graph_layers), n),
                    edge_counts=edge_counts.numpy(),
                )
            yield Record(id=prompt.id, group=prompt.group, label=prompt.label, sequence=sequences[row], graphs=graphs)


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
    """What tells this model from another: its configuration, and the names and sizes of its files where it is a folder."""
    folder = Path(model_name)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()} if folder.is_dir() else {}
    return {"config": model_config.to_json_string(), "files": files, "name": None if files else model_name}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
