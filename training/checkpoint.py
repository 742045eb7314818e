"""Checkpoints of plain tensors and numbers, written whole or not at all, and read without running code in the file."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dali_pipeline import UsageError
from dali_pipeline.runtime.trace import span
from dali_pipeline.storage.whole import write_whole
from training.config import TrainConfig

IDENTITY = {"name", "config", "schema", "target"}
# the other entries that `Trainer.save` writes, and their types
PARTS: dict[str, type] = dict.fromkeys(("best", "model", "optimizer", "scheduler", "scaler", "loader", "delivered"), dict)
PARTS |= {"epoch": int, "loss_sum": float, "loss_count": int, "history": list, "best_score": float, "random": list}


class CheckpointWriter:
    """Writes checkpoints in a background thread, one after the other, at most two at a time.

    `write` copies the state before it returns, so that training continues at once. An error of the thread, such as a full disk,
    is raised by the next call of any method. The previous checkpoint is then still complete.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: deque[Future[None]] = deque()

    def write(self, path: Path, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; costs the copy to the CPU, and waits if two are being written already."""
        self.check()
        if len(self._under_way) > 1:
            self._under_way.popleft().result()
        self._under_way.append(self._thread.submit(write_checkpoint, path, snapshot(state)))

    def check(self) -> None:
        """Raise the PipelineError of a checkpoint that could not be written; costs nothing."""
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft().result()

    def wait(self) -> None:
        """Wait until all checkpoints are on the disk or have failed, then raise like `check`."""
        futures.wait(self._under_way)
        self.check()


def snapshot(value: Any) -> Any:
    """Return the same nested dicts and lists, with tensors copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: snapshot(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(entry) for entry in value)
    return value


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state that `torch.load(weights_only=True)` can read; raise PipelineError if that fails."""
    with span("checkpoint"):
        content = io.BytesIO()
        torch.save(dict(state), content)
        write_whole(path, content.getvalue())


def load_checkpoint(path: Path, advice: str) -> dict[str, Any]:
    """Return the checkpoint of any model; raise UsageError, which ends in `advice`, if the file is no checkpoint."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = IDENTITY - state.keys()
    except Exception as error:
        raise UsageError(f"{path} is not a checkpoint of train.py ({type(error).__name__}); {advice}") from None
    if missing:
        raise UsageError(f"{path} is not a checkpoint of train.py (it holds no {sorted(missing)[0]}); {advice}")
    return dict(state)


def read_checkpoint(path: Path, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state in a file; raise UsageError if it is no checkpoint of this model and configuration."""
    state = load_checkpoint(path, "name another, or begin anew with --resume never")
    if state["name"] != name:
        raise UsageError(f"{path} is a checkpoint of {state['name']}; expected one of {name}")
    if missing := sorted(part for part, kind in PARTS.items() if not isinstance(state.get(part), kind)):
        raise UsageError(f"{path} holds no {missing[0]}, so nothing can go on from it; expected {name}-last.pt")
    stored = TrainConfig.in_new_words(state["config"])
    for key in config.keys() - {"models"}:
        theirs = stored.get(key)
        if theirs != config[key]:
            setting = "data of digest" if key == "data_digest" else key
            raise UsageError(f"{path} was trained with {setting} {theirs!r}; this run has {config[key]!r}")
    return state
