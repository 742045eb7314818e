"""A small language model, and prompts for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

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
