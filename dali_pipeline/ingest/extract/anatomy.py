"""Find the width of each hidden state of a language model, and the blocks that have attention, in one short forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

TOKENS = 3  # number of tokens in the pass


class Anatomy(NamedTuple):
    """The outputs of a model.

    widths: number of features of each hidden state; index 0 is the embeddings, l the output of block l.
    attention: index in the model's list of attentions, for each block that has attention, by its number from 1 on.
    """

    widths: list[int]
    attention: dict[int, int]


def examine(model: Any, device: torch.device) -> Anatomy:
    """Run a few tokens through a model without its head, and return its anatomy. Costs one short forward pass.

    Hybrid models list attention only for the blocks that have it, so an index in the list is not the block's number. Each
    attention is therefore found in the outputs of the modules of its block.
    """
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)
    blocks = _blocks(model)
    with torch.inference_mode(), _owners(blocks) as owners:
        out = call(model, tokens, torch.ones_like(tokens), attentions=True)
        attentions = list(getattr(out, "attentions", None) or ())
    one_per_block = len(attentions) == len(blocks) and not any(id(attention) in owners for attention in attentions)
    attention_index: dict[int, int] = {}
    for index, attention in enumerate(attentions):
        block = index if one_per_block else owners.get(id(attention))
        if isinstance(attention, torch.Tensor) and block is not None and attention.shape[-2:] == (TOKENS, TOKENS):
            attention_index[block + 1] = index
    return Anatomy([int(state.shape[-1]) for state in out.hidden_states], attention_index)


def call(model: Any, tokens: torch.Tensor, mask: torch.Tensor, *, attentions: bool) -> Any:
    """Run a forward pass that returns hidden states, and attentions if they are asked for and the model has any."""
    options: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "output_hidden_states": True, "use_cache": False}
    if not attentions:
        return model(**options)
    try:
        return model(**options, output_attentions=True)
    except TypeError:  # a model without attention takes no such argument
        return model(**options)


def _blocks(model: Any) -> list[nn.Module]:
    """Return the model's blocks in order: the first ModuleList with as many modules as the configuration has layers."""
    count = int(model.config.get_text_config().num_hidden_layers)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0]) if lists else []


@contextmanager
def _owners(blocks: list[nn.Module]) -> Iterator[dict[int, int]]:
    """Record within the block which model block each tensor of its modules comes from, by the tensor's id.

    Keeps the tensors alive meanwhile, so that their ids stay unique.
    """
    owners: dict[int, int] = {}
    kept: list[torch.Tensor] = []
    running = 0  # the block that is running, because blocks may share modules

    def begin(number: int) -> Any:
        def hook(_: nn.Module, __: Any) -> None:
            nonlocal running
            running = number

        return hook

    def note(_: nn.Module, __: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4:
                owners[id(tensor)] = running
                kept.append(tensor)

    hooks = [block.register_forward_pre_hook(begin(number)) for number, block in enumerate(blocks)]
    try:
        modules = dict.fromkeys(module for block in blocks for module in block.modules())
        hooks += [module.register_forward_hook(note) for module in modules]
        yield owners
    finally:
        for hook in hooks:
            hook.remove()
