"""extract: run prompts, or questions that it answers, through a causal Hugging Face model, and write sequences and graphs."""

from __future__ import annotations

import shutil
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
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from dali_pipeline.dataset.dataset import Dataset, open_dataset
from dali_pipeline.errors import UsageError
from dali_pipeline.format.manifest import MANIFEST_NAME
from dali_pipeline.format.schema import Field, Schema
from dali_pipeline.ingest.extract.anatomy import Anatomy, examine
from dali_pipeline.ingest.extract.answers import ANSWERS_NAME, Answerer, answers_schema, describe_answers
from dali_pipeline.ingest.extract.asking import Asking, read_asking, shared_tokens
from dali_pipeline.ingest.extract.generate import Prompter
from dali_pipeline.ingest.extract.prompts import Prompt, read_prompts
from dali_pipeline.ingest.extract.tracer import (
    ExtractConfig,
    Tracer,
    first_line,
    load_model,
    load_tokenizer,
    positions_of,
    tokens_of,
)
from dali_pipeline.ingest.onray import Asks, deal
from dali_pipeline.ingest.workers import Advance, Engine
from dali_pipeline.loaders.device import resolve_device
from dali_pipeline.reading.damage import log
from dali_pipeline.runtime.progress import progress_bar, shown
from dali_pipeline.runtime.world import World
from dali_pipeline.writing.filler import Contents, ShardFiller
from dali_pipeline.writing.journal import remove_leftovers
from dali_pipeline.writing.writer import ShardWriter

TOKENISED_TOGETHER = 1000  # number of prompts
LATER = ("truncate", "generate")  # settings that a fingerprint has only if they are used, as they came later


def extract(
    model_name: str, prompts_path: Path, out: Path, config: ExtractConfig, device: str = "auto", engine: Engine = "local"
) -> Dataset:
    """Write the data set `out`; continue an interrupted run with the same input and settings.

    The same model, prompts, settings, kind of machine and number of threads give the same bytes, on one machine or many,
    interrupted or not. Memory: the model, one batch with all its attentions (with `config.generate` those of one block), and
    twice the records of a chunk (1 GiB at most).

    Args:
        model_name: Folder of a model, or a name that transformers knows.
        prompts_path: CSV file of prompts and labels; with `config.generate` CSV file or JSON lines of questions.
        out: Folder of the data set, new or unfinished.
        config: Settings.
        device: "auto", "cpu", "cuda" or "cuda:N".
        engine: "local", or "ray" for tasks of a Ray cluster, each with `commit_every` prompts and, if the cluster has GPUs, a
            GPU. The nodes must see `out` and the model.

    Returns:
        The finished data set.

    Raises:
        UsageError: The model, the prompts or the settings make no sense.
        DataError: The dtype cannot represent a value.
    """
    if engine not in get_args(Engine):
        raise UsageError(f"engine is {engine!r}; expected {' or '.join(get_args(Engine))}")
    asking = None if config.generate is None else read_asking(prompts_path, config.generate)
    prompts: Sequence[Any] = read_prompts(prompts_path) if asking is None else asking.asks
    folder = Path(model_name)
    if engine == "local":
        resolve_device(device, World())
    if engine == "ray":  # Ray workers have other working folders
        out = out.absolute()
        model_name = str(folder.absolute()) if folder.exists() else model_name
    transformers_logging.disable_progress_bar()
    model_config, tokenizer = _configured(model_name)
    asked = config.graph_layers
    config = _with_all_layers(config, int(model_config.get_text_config().num_hidden_layers))
    shared: list[int] = []
    facts: dict[str, Any] = {"prompts": xxhash.xxh3_128_hexdigest(prompts_path.read_bytes())}
    if asking is None or config.generate is None:
        _check_lengths(prompts_path, prompts, tokenizer, positions_of(model_config), config.truncate)
    else:
        shared = _shared(prompts_path, asking, config, tokenizer, model_config)
        facts = {"generate": asking.facts, "ends": _ends(folder, tokenizer if config.generate.chat else None)}
    described = {
        **{name: value for name, value in asdict(replace(config, generate=None)).items() if name not in LATER or value},
        "model": _identity(model_name, model_config),
        **facts,
    }
    fingerprint = xxhash.xxh3_128_hexdigest(msgspec.json.encode(described, order="sorted"))
    if (out / MANIFEST_NAME).exists():
        data = open_dataset(out)
        if data.manifest.source.get("fingerprint") != fingerprint:
            raise UsageError(f"{out} is a data set of another model, prompts or settings; expected a new folder")
        remove_leftovers(out)
        shutil.rmtree(out / ANSWERS_NAME, ignore_errors=True)
        return data
    threads = torch.get_num_threads()
    # a model that cannot be loaded raises before a folder is made
    anatomy = _examined(model_name, device) if engine == "local" else _anatomy(model_config)
    config = _with_attention(model_name, config, asked, anatomy)
    schema = _schema(model_name, config, anatomy, asking)
    source = _source(model_name, config, anatomy, fingerprint)
    with (
        ShardWriter(
            out, schema, shard_bytes=config.shard_bytes, split=config.split, source=source, fingerprint=fingerprint
        ) as writer,
        progress_bar() as bar,
    ):
        writer.parts.mkdir(exist_ok=True)
        begun, every = writer.cursor, config.commit_every
        tracer: Callable[[], Tracer | Answerer] = partial(Tracer, model_name, schema, config, device)
        if asking is not None:
            answers = out.absolute() / ANSWERS_NAME
            answers.mkdir(exist_ok=True)
            writer.commit(begun)  # answers outlive an interruption of the first part too
            tracer = partial(Answerer, model_name, asking.shots, shared, answers, schema, config, device)
        show = shown(bar, "extract" if asking is None else "answers", len(prompts), begun)
        numbers = range(-(-(len(prompts) - begun) // every))
        work = partial(_write, tracer, threads, prompts[begun:], begun, writer.parts)
        folders = [writer.parts, *([Path(model_name)] if folder.exists() else [])]
        with closing(deal(engine, work, numbers, 1, show, folders, partial(_asks, device, threads))) as results:
            for number, (part, contents) in results:
                writer.adopt(part, contents, min(begun + (number + 1) * every, len(prompts)), {})
        if asking is not None:
            writer.source |= describe_answers(out / ANSWERS_NAME)
    shutil.rmtree(out / ANSWERS_NAME, ignore_errors=True)
    return open_dataset(out)


def _source(model_name: str, config: ExtractConfig, anatomy: Anatomy, fingerprint: str) -> dict[str, Any]:
    """Return what the manifest says about where the records come from."""
    source = {
        "made_by": "extract",
        "model": Path(model_name).name,
        "layers": config.layers,
        "graph_layers": config.graph_layers,
        "attention_threshold": config.attention_threshold,
        "fingerprint": fingerprint,
    }
    of_heads = config.generate is not None and config.generate.attention_features
    return {**source, "attention_layers": sorted(anatomy.heads)} if of_heads else source


def _configured(model_name: str) -> tuple[Any, Any]:
    """Return the configuration and the tokenizer of a model; raise UsageError if it has none."""
    try:
        return AutoConfig.from_pretrained(model_name), load_tokenizer(model_name)
    except (OSError, ValueError) as error:
        raise UsageError(f"{model_name} is not a model that transformers can load ({first_line(error)})") from error


def _shared(path: Path, asking: Asking, config: ExtractConfig, tokenizer: Any, model_config: Any) -> list[int]:
    """Return the tokens with which all prompts begin, after a check that the model has positions for every prompt."""
    own, limit = config.generate, positions_of(model_config)
    assert own is not None
    if config.truncate and (own.chat or own.shots is not None):
        raise UsageError("--truncate cuts prompts at their start, where --chat and --shots put words; leave --truncate out")
    if config.truncate and limit is not None and limit <= own.max_new_tokens:
        raise UsageError(f"the model has {limit:,} positions; expected --max-new-tokens below that")
    cut = None if limit is None or not config.truncate else limit - own.max_new_tokens
    prompter = Prompter(tokenizer, own, asking.shots, cut)
    return shared_tokens(path, prompter, asking, own, limit, config.truncate)


def _ends(folder: Path, tokenizer: Any) -> str:
    """Return a hash of what else says how a model's answers begin and end: its generation settings, and a chat template."""
    path = folder / "generation_config.json"
    template = "" if tokenizer is None else str(tokenizer.chat_template)
    return xxhash.xxh3_128_hexdigest((path.read_bytes() if path.is_file() else b"") + template.encode())


def _schema(model_name: str, config: ExtractConfig, anatomy: Anatomy, asking: Asking | None) -> Schema:
    """Return the schema of the records; raise UsageError if the model cannot give what it names."""
    hidden, graphs = _width(model_name, config, anatomy), bool(config.graph_layers)
    if asking is None:
        return Schema(
            sequence=Field(dtype=config.dtype, shape=(hidden,)),
            x=Field(dtype=config.dtype, shape=(hidden,)) if graphs else None,
            edge_attr=Field(dtype=config.dtype) if graphs else None,
            step_axis="layer",
        )
    assert config.generate is not None
    counts = sorted(set(anatomy.heads.values()))
    if config.generate.attention_features and len(counts) != 1:
        what = f"{' and '.join(map(str, counts))} heads" if counts else "no attention from token to token"
        raise UsageError(f"{model_name} has {what}; --attention-features needs blocks of equally many heads, so leave it out")
    return answers_schema(config, hidden, (len(anatomy.heads), max(counts, default=0)), asking.label)


def _asks(device: str, threads: int, gpus: float) -> Asks:
    """Return the resources of a task, on a cluster with `gpus` GPUs."""
    if device.startswith("cuda") or (device == "auto" and gpus > 0):
        return Asks(cores=1, gpus=1)
    return Asks(cores=threads, gpus=0)


def _write(
    tracer: Callable[[], Tracer | Answerer],
    threads: int,
    prompts: Sequence[Any],
    begun: int,
    parts: Path,
    number: int,
    advance: Advance,
) -> tuple[Path, Contents]:
    """Write the records of `commit_every` prompts to a new folder, in file order, whatever the order of the batches.

    tracer: returns a Tracer, whose model a process loads once. threads: number of torch threads, on which the last bits of
    results may depend. begun: number of prompts before these.
    """
    torch.set_num_threads(threads)
    trace = tracer()
    part, every = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=parts)), trace.config.commit_every
    filler = ShardFiller(part, trace.schema, trace.config.shard_bytes, trace.config.split, Contents())
    asked = range(number * every, min((number + 1) * every, len(prompts)))
    for record in trace.in_order(prompts[asked.start : asked.stop], begun + asked.start, advance):
        filler.write(record)
    filler.flush()
    return part, filler.contents


def _with_all_layers(config: ExtractConfig, blocks: int) -> ExtractConfig:
    all_blocks = tuple(range(1, blocks + 1))
    config = replace(
        config,
        layers=all_blocks if config.layers is None else config.layers,
        graph_layers=all_blocks if config.graph_layers is None else config.graph_layers,
    )
    assert config.layers is not None
    assert config.graph_layers is not None
    if not config.layers or not all(0 <= layer <= blocks for layer in config.layers):
        raise UsageError(f"layers are {config.layers}; expected some of 0 to {blocks}")
    if not all(1 <= layer <= blocks for layer in config.graph_layers):
        raise UsageError(f"graph layers are {config.graph_layers}; expected some of 1 to {blocks}")
    return config


def _examined(model_name: str, device: str) -> Anatomy:
    """Return the anatomy of a model that is loaded in this process; raise UsageError if it does not run like a causal model."""
    _, model, on = load_model(model_name, device)
    try:
        return examine(model, on)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{model_name} does not give hidden states as causal models of transformers do ({why})") from error


def _anatomy(model_config: Any) -> Anatomy:
    """The anatomy of a model that is not here, by its configuration: on torch's device without memory, or else a plain one."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, attn_implementation="eager").base_model.eval()
        return examine(model, torch.device("meta"))
    except Exception:  # whatever a model does with the values of its tensors, which are not there
        text = model_config.get_text_config()
        blocks = int(text.num_hidden_layers)
        types = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ["attention"] * blocks
        having = [block for block, kind in enumerate(types, 1) if "attention" in kind and "linear" not in kind]
        heads = dict.fromkeys(having, int(getattr(text, "num_attention_heads", 0)))
        return Anatomy([int(text.hidden_size)] * (blocks + 1), {block: place for place, block in enumerate(having)}, heads)


def _with_attention(model_name: str, config: ExtractConfig, asked: tuple[int, ...] | None, anatomy: Anatomy) -> ExtractConfig:
    """Restrict the graphs to blocks that have attention; raise UsageError if others, or missing states, are asked for."""
    assert config.layers is not None
    assert config.graph_layers is not None
    if max((*config.layers, *config.graph_layers), default=0) >= len(anatomy.widths):
        raise UsageError(
            f"{model_name} gives {len(anatomy.widths)} hidden states; expected layers of 0 to {len(anatomy.widths) - 1}"
        )
    without = [layer for layer in config.graph_layers if layer not in anatomy.attention]
    if not without:
        return config
    having = ", ".join(map(str, anatomy.attention)) or "none"
    if asked is not None:
        raise UsageError(
            f"block {without[0]} of {model_name} has no attention from token to token, of which graphs are made; blocks that "
            f"have some: {having}"
        )
    log.warning("%s: graphs are made of the blocks that have attention: %s", model_name, having)
    return replace(config, graph_layers=tuple(anatomy.attention))


def _width(model_name: str, config: ExtractConfig, anatomy: Anatomy) -> int:
    """Return the number of features of the hidden states that are asked for; raise UsageError if they differ."""
    chosen = [*(config.layers or ()), *(config.graph_layers or ())]
    for layer in chosen:
        if anatomy.widths[layer] != anatomy.widths[chosen[0]]:
            raise UsageError(
                f"{model_name}: hidden state {layer} has {anatomy.widths[layer]} numbers, and {chosen[0]} has "
                f"{anatomy.widths[chosen[0]]}; expected one width, so leave one of them out of --layers and --graph-layers"
            )
    return anatomy.widths[chosen[0]]


def _check_lengths(path: Path, prompts: Sequence[Prompt], tokenizer: Any, limit: int | None, truncate: bool) -> None:
    """Raise UsageError if a prompt has more tokens than the model has positions; with `truncate` only log how many are cut."""
    if limit is None:
        return
    cut = 0
    for begin in range(0, len(prompts), TOKENISED_TOGETHER):
        part = prompts[begin : begin + TOKENISED_TOGETHER]
        for prompt, tokens in zip(part, tokens_of(tokenizer, part), strict=True):
            if len(tokens) > limit and not truncate:
                raise UsageError(
                    f"{path}: prompt {prompt.id!r} has {len(tokens):,} tokens, and the model {limit:,} positions; shorten it, "
                    "or give --truncate, which keeps its end"
                )
            cut += len(tokens) > limit
    if cut:
        log.warning("%d of %d prompts are cut to the last %d tokens", cut, len(prompts), limit)


def _identity(model_name: str, model_config: Any) -> dict[str, Any]:
    """Return what identifies a model: its configuration, and if it is a folder the sizes of its weights and vocabulary.

    Leaves out other files, which may differ from machine to machine, because the data set's digest depends on the result.
    """
    folder = Path(model_name)
    kinds = (".safetensors", ".bin", ".gguf", ".model", "tokenizer.json")
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*")) if path.name.endswith(kinds)}
    return {"config": model_config.to_json_string(), "files": files, "name": None if files else model_name}
