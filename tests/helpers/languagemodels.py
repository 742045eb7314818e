"""A small language model, and prompts for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import dali_pipeline as dp
from dali_pipeline.ingest.extract.tracer import ExtractConfig

WORDS = ["what", "is", "the", "right", "answer", "to", "this", "question", "a", "wrong", "one"]


def make_model(folder: Path) -> str:
    """A Llama of 3 blocks with random weights and a tokenizer of whole words, saved as any model folder is."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"?": 0, **{word: at + 1 for at, word in enumerate(WORDS)}}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return str(folder)


def write_prompts(path: Path, count: int = 40) -> Path:
    rng = np.random.default_rng(0)
    lines = ["prompt,label,id,group"]
    lines += [f"{' '.join(rng.choice(WORDS, rng.integers(1, 12)))},{row % 2},p{row},g{row // 2}" for row in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


CONFIG = ExtractConfig(batch_tokens=40, commit_every=16, shard_bytes=3000, split=dp.SplitRule(shares=(100, 0, 0)))


ENDS = [2, 5, 8]  # tokens that end an answer, so that answers differ in length
_SMALL: dict[str, Any] = {"vocab_size": len(WORDS) + 1, "hidden_size": 16, "num_hidden_layers": 3}
_HEADS: dict[str, Any] = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {**_SMALL, **_HEADS}),
    "Gemma2": ("Gemma2ForCausalLM", {**_SMALL, **_HEADS, "head_dim": 8, "sliding_window": 4}),
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": 12, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}),
    "Bloom": ("BloomForCausalLM", {"vocab_size": 12, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "Lfm2": ("Lfm2ForCausalLM", {**_SMALL, **_HEADS, "layer_types": ["conv", "full_attention", "conv"]}),
    "Mamba": ("MambaForCausalLM", {**_SMALL, "state_size": 4, "use_mambapy": False}),
}


def make_answering_model(folder: Path, name: str = "Llama", ends: list[int] | None = None) -> str:
    """Save a model of random weights, large enough to be sure of something, with the tokenizer of whole words."""
    make_model(folder)
    class_name, settings = MODELS[name]
    torch.manual_seed(1)
    model = getattr(transformers, class_name)(getattr(transformers, f"{name}Config")(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8 if name not in ("Lfm2", "Mamba") else 2)
    model.generation_config.eos_token_id = ENDS if ends is None else ends
    model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    return str(folder)


def write_questions(path: Path, count: int = 20, references: int = 1) -> Path:
    """Write questions of 2 to 8 words, each with random words as references."""
    rng = np.random.default_rng(3)
    lines = []
    for row in range(count):
        prompt = " ".join(rng.choice(WORDS, rng.integers(2, 9)))
        lines.append(json.dumps({"id": f"q{row}", "prompt": prompt, "answers": rng.choice(WORDS, references).tolist()}))
    path.write_text("\n".join(lines) + "\n")
    return path
