"""Anatomy of a language model: how wide each hidden state is, and which blocks have attention, as one short pass tells."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

TOKENS = 3  # of the pass


class Anatomy(NamedTuple):
    """What a model gives.

    widths: numbers of each hidden state, 0 for the embeddings, l for the output of block l · attention: of each block that has
    some, by its number from 1 on, the place in the model's list of attentions.
    """

    widths: list[int]
    attention: dict[int, int]


def examine(model: Any, device: torch.device) -> Anatomy:
    """Run a few tokens through a model without head, and look at what it gives.

    Hybrid models list the attention of those blocks alone that have some, so a place in the list is not the block's number:
    each attention is found in the outputs of the modules of its own block. Costs one short forward pass.
    """
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)
    blocks = _blocks(model)
    with torch.inference_mode(), _owners(blocks) as owners:
        out = call(model, tokens, torch.ones_like(tokens), attentions=True)
        attentions = list(getattr(out, "attentions", None) or ())
    whole = len(attentions) == len(blocks) and not any(id(one) in owners for one in attentions)
    found: dict[int, int] = {}
    for place, attention in enumerate(attentions):
        block = place if whole else owners.get(id(attention))
        if isinstance(attention, torch.Tensor) and block is not None and attention.shape[-2:] == (TOKENS, TOKENS):
            found[block + 1] = place
    return Anatomy([int(state.shape[-1]) for state in out.hidden_states], found)


def call(model: Any, tokens: torch.Tensor, mask: torch.Tensor, *, attentions: bool) -> Any:
    """Run a forward pass that gives hidden states, and attentions if they are asked for and the model knows of any."""
    options: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "output_hidden_states": True, "use_cache": False}
    if not attentions:
        return model(**options)
    try:
        return model(**options, output_attentions=True)
    except TypeError:  # a model without attention takes no such argument
        return model(**options)


def _blocks(model: Any) -> list[nn.Module]:
    """The model's blocks, in order: the list of modules that is as long as the configuration says."""
    count = int(model.config.get_text_config().num_hidden_layers)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0]) if lists else []


@contextmanager
def _owners(blocks: list[nn.Module]) -> Iterator[dict[int, int]]:
    """Within it, which block each tensor that a module gives comes from, by the tensor's id; the tensors are kept meanwhile."""
    owners: dict[int, int] = {}
    kept: list[torch.Tensor] = []
    running = 0  # the block whose turn it is, as blocks may share modules

    def begin(number: int) -> Any:
        def hook(_: nn.Module, __: Any) -> None:
            nonlocal running
            running = number

        return hook

    def note(_: nn.Module, __: Any, output: Any) -> None:
        for one in output if isinstance(output, tuple | list) else (output,):
            if isinstance(one, torch.Tensor) and one.ndim == 4:
                owners[id(one)] = running
                kept.append(one)

    hooks = [block.register_forward_pre_hook(begin(number)) for number, block in enumerate(blocks)]
    try:
        modules = dict.fromkeys(module for block in blocks for module in block.modules())
        hooks += [module.register_forward_hook(note) for module in modules]
        yield owners
    finally:
        for hook in hooks:
            hook.remove()
