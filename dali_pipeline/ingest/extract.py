"""extract: prompts through a causal Hugging Face model to sequences (last token, every layer) and attention graphs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import msgspec
import torch
import xxhash
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from dali_pipeline.dataset import Dataset, open_dataset
from dali_pipeline.filler import Contents, ShardFiller
from dali_pipeline.ingest.onray import Asks, deal
from dali_pipeline.ingest.prompts import Prompt, read_prompts
from dali_pipeline.ingest.tracer import ExtractConfig, Tracer, first_line, load_model, load_tokenizer
from dali_pipeline.ingest.workers import Advance, Engine
from dali_pipeline.journal import remove_leftovers
from dali_pipeline.manifest import MANIFEST_NAME
from dali_pipeline.progress import progress_bar, shown
from dali_pipeline.record import Record
from dali_pipeline.schema import Field, Schema, UsageError
from dali_pipeline.writer import ShardWriter


def extract(
    model_name: str, prompts_path: Path, out: Path, config: ExtractConfig, device: str = "auto", engine: Engine = "local"
) -> Dataset:
    """Writes the data set `out`; goes on where an earlier run with the same input and settings was stopped.

    model_name: a folder or a name that transformers knows. engine: `ray` for tasks of a Ray cluster, `commit_every` prompts
    each, on a GPU each where it has some; the nodes see `out` and the model. The same model, prompts, settings, kind of machine
    and number of threads give the same bytes, on one machine or many, interrupted or not. Raises UsageError for input that
    makes no sense, DataError for a value that the dtype cannot hold. Memory: the model, one batch with all its attentions, and
    twice the records of a stretch (1 GiB at most).
    """
    if engine not in get_args(Engine):
        raise UsageError(f"engine is {engine!r}; expected {' or '.join(get_args(Engine))}")
    prompts, folder = read_prompts(prompts_path), Path(model_name)
    if engine == "ray":  # whose workers stand in other folders
        out = out.absolute()
        model_name = str(folder.absolute()) if folder.exists() else model_name
    transformers_logging.disable_progress_bar()
    try:
        model_config = AutoConfig.from_pretrained(model_name)
        load_tokenizer(model_name)
    except (OSError, ValueError) as error:
        raise UsageError(f"{model_name} is not a model that transformers can load ({first_line(error)})") from error
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
    threads = torch.get_num_threads()
    if engine == "local":
        load_model(model_name, device)  # one that cannot be loaded is told before a folder is made
    with (
        ShardWriter(
            out, schema, shard_bytes=config.shard_bytes, split=config.split, source=source, fingerprint=fingerprint
        ) as writer,
        progress_bar() as bar,
    ):
        writer.parts.mkdir(exist_ok=True)
        begun, every = writer.cursor, config.commit_every
        show = shown(bar, "extract", len(prompts), begun)
        numbers, tracer = range(-(-(len(prompts) - begun) // every)), partial(Tracer, model_name, schema, config, device)
        work = partial(_write, tracer, threads, prompts[begun:], writer.parts)
        folders = [writer.parts, *([Path(model_name)] if folder.exists() else [])]
        with closing(deal(engine, work, numbers, 1, show, folders, partial(_asks, device, threads))) as results:
            for number, (part, contents) in results:
                writer.adopt(part, contents, min(begun + (number + 1) * every, len(prompts)), {})
    return open_dataset(out)


def _asks(device: str, threads: int, gpus: float) -> Asks:
    """Of a cluster with so many GPUs."""
    takes = device.startswith("cuda") or (device == "auto" and gpus > 0)
    return Asks(cores=1 if takes else threads, gpus=int(takes))


def _write(
    tracer: Callable[[], Tracer], threads: int, prompts: Sequence[Prompt], parts: Path, number: int, advance: Advance
) -> tuple[Path, Contents]:
    """Writes the records of `commit_every` prompts to a folder of its own, in file order, whatever that of the batches.

    tracer: makes one, whose model a process loads once · threads: of torch, on which the last bits of its results may depend.
    """
    torch.set_num_threads(threads)
    trace = tracer()
    part, every = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=parts)), trace.config.commit_every
    filler = ShardFiller(part, trace.schema, trace.config.shard_bytes, trace.config.split, Contents())
    for stretch in trace.stretches(prompts[number * every : (number + 1) * every]):
        records: dict[str, Record] = {}
        for batch in trace.batches(stretch):
            records.update((record.id, record) for record in trace.records(batch))
            advance(len(batch))
        for prompt, _ in stretch:
            filler.write(records[prompt.id])
    filler.flush()
    return part, filler.contents


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
