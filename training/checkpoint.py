"""Checkpoints: plain tensors and numbers, written whole or not at all, read without running code of the file's own."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dali_pipeline import UsageError
from dali_pipeline.shard import write_whole

# what `Trainer.state` holds, beside the name and the configuration
PARTS = {"best", "model", "optimizer", "scheduler", "loader", "epoch", "loss_sum", "loss_count", "history", "best_auroc"}
PARTS |= {"random", "random_cuda", "delivered"}


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Anything that `torch.load(weights_only=True)` reads."""
    content = io.BytesIO()
    torch.save(dict(state), content)
    write_whole(path, content.getvalue())


def read_checkpoint(path: Path, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The state in `path`. Raises UsageError for a file that is none, another model's, or of another configuration."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        theirs, missing = (state["name"], state["config"]), PARTS - state.keys()
    except Exception as error:
        raise UsageError(
            f"{path} is not a checkpoint of train.py ({type(error).__name__}); name another, or begin anew with --resume never"
        ) from None
    if theirs[0] != name:
        raise UsageError(f"{path} is a checkpoint of {theirs[0]}; expected one of {name}")
    if missing:
        raise UsageError(f"{path} holds no {sorted(missing)[0]}, so nothing can go on from it; expected {name}-last.pt")
    for key in config.keys() - {"models"}:
        if theirs[1].get(key) != config[key]:
            raise UsageError(f"{path} was trained with {key} {theirs[1].get(key)!r}; this run has {config[key]!r}")
    return dict(state)
