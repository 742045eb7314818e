"""Find the width of each hidden state of a language model, and the modules that have attention, in short forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

TOKENS = 3  # number of tokens in the pass


class Anatomy(NamedTuple):
    """The outputs of a model.

    widths: number of features of each hidden state; index 0 is the embeddings, l the output of block l.
    attention: index in the model's list of attentions, for each block that has attention, by its number from 1 on.
    heads: number of heads of these blocks, likewise.
    """

    widths: list[int]
    attention: dict[int, int]
    heads: dict[int, int]


class Tap(NamedTuple):
    """Where the attention of a block comes out. module: gives it as item number `item` of its outputs."""

    module: nn.Module
    item: int


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
    heads: dict[int, int] = {}
    for index, attention in enumerate(attentions):
        owner = owners.get(id(attention))
        block = index if one_per_block else None if owner is None else owner.block
        if isinstance(attention, torch.Tensor) and block is not None and attention.shape[-2:] == (TOKENS, TOKENS):
            attention_index[block + 1], heads[block + 1] = index, int(attention.shape[1])
    return Anatomy([int(state.shape[-1]) for state in out.hidden_states], attention_index, heads)


def attention_taps(model: Any, device: torch.device) -> dict[int, Tap]:
    """Return where the attention of each block comes out while the model runs, by the block's number from 1 on.

    Costs two short forward passes. Returns {} if the model gives attentions only when it is asked to return them all.
    """
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device=device)
    mask, blocks = torch.ones_like(tokens), _blocks(model)
    with torch.inference_mode():
        with _owners(blocks) as owners:
            out = call(model, tokens, mask, attentions=True)
            given = [owners.get(id(attention)) for attention in getattr(out, "attentions", None) or ()]
        taps = {owner.block + 1: Tap(owner.module, owner.item) for owner in given if owner is not None and owner.item >= 0}
        seen: list[int] = []
        with each_attention(model, taps, lambda block, attention: seen.append(block) if _is_square(attention) else None):
            call(model, tokens, mask, attentions=False)
    return taps if sorted(seen) == sorted(taps) else {}


def _is_square(attention: Any) -> bool:
    return isinstance(attention, torch.Tensor) and attention.shape[-2:] == (TOKENS, TOKENS)


@contextmanager
def each_attention(model: Any, taps: dict[int, Tap], take: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `take(block, attention)` within the block as soon as each attention is there; the model keeps none of them."""
    running = 0

    def begin(number: int) -> Any:
        def hook(_: nn.Module, __: Any) -> None:
            nonlocal running
            running = number

        return hook

    def hand(module: nn.Module, _: Any, output: Any) -> None:
        tap = taps.get(running)
        if tap is not None and tap.module is module:
            take(running, output[tap.item])

    hooks = [block.register_forward_pre_hook(begin(number)) for number, block in enumerate(_blocks(model), 1)]
    try:
        hooks += [module.register_forward_hook(hand) for module in dict.fromkeys(tap.module for tap in taps.values())]
        yield
    finally:
        for hook in hooks:
            hook.remove()


def call(model: Any, tokens: torch.Tensor, mask: torch.Tensor, *, attentions: bool, **more: Any) -> Any:
    """Run a forward pass that returns hidden states, and attentions if they are asked for and the model has any."""
    options: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "output_hidden_states": True, "use_cache": False}
    options |= more
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


class _Owner(NamedTuple):
    """Where a tensor came out. block: number from 0 on. item: its number in the module's outputs, -1 if it is the only one."""

    block: int
    module: nn.Module
    item: int


@contextmanager
def _owners(blocks: list[nn.Module]) -> Iterator[dict[int, _Owner]]:
    """Record within the block where each tensor of the model blocks' modules comes out, by the tensor's id.

    Keeps the tensors alive meanwhile, so that their ids stay unique.
    """
    owners: dict[int, _Owner] = {}
    kept: list[torch.Tensor] = []
    running = 0  # the block that is running, because blocks may share modules

    def begin(number: int) -> Any:
        def hook(_: nn.Module, __: Any) -> None:
            nonlocal running
            running = number

        return hook

    def note(module: nn.Module, _: Any, output: Any) -> None:
        items = enumerate(output) if isinstance(output, tuple | list) else [(-1, output)]
        for item, tensor in items:
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4:
                known = owners.get(id(tensor))
                if known is None or known.item < 0:  # the innermost module that gives it among others
                    owners[id(tensor)] = _Owner(running, module, item)
                kept.append(tensor)

    hooks = [block.register_forward_pre_hook(begin(number)) for number, block in enumerate(blocks)]
    try:
        modules = dict.fromkeys(module for block in blocks for module in block.modules())
        hooks += [module.register_forward_hook(note) for module in modules]
        yield owners
    finally:
        for hook in hooks:
            hook.remove()
