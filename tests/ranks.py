"""Trains every detector with 1, 2 and 4 gloo processes and prints what each came to; run by test_ranks.py.

The processes are forked after the imports, which take longer than all the training.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import nvidia.dali.plugin.pytorch
import torch

import dali_pipeline as dp
from training.config import MODELS, ModelName, TrainConfig
from training.interrupt import Interrupts
from training.processes import Processes
from training.trainer import Conduct, Trainer

BATCH = 16


def train(name: ModelName, data: dp.Dataset, folder: Path, accumulate: int, processes: Processes) -> dict[str, Any]:
    """Losses of every step, gradients of the last, scores of test."""
    config = TrainConfig(models=(name,), epochs=2, batch_size=BATCH, dropout=0.0, accumulate=accumulate)
    folder.mkdir(exist_ok=True)
    trainer = Trainer(name, data, config, folder, Conduct(device="cpu"), Interrupts(processes), processes)
    losses: list[float] = []
    while not trainer.finished:
        trainer.train_epoch(lambda step, share: losses.append(processes.sum([float(share)])[0]))
    trainer.writer.wait()
    test = trainer.predict("test")
    return {
        "losses": losses,
        "gradients": [
            value for one in trainer.model.parameters() if one.grad is not None for value in one.grad.flatten().tolist()
        ],
        "history": [[row["train_loss"], row["val_loss"], row["val_auroc"]] for row in trainer.history],
        "scores": test.scores.tolist(),
        "ids": test.ids,
        "delivered": trainer.delivered,
        "files": sorted(path.name for path in folder.iterdir()),
    }


def as_rank(rank: int, world_size: int, accumulate: int, data: dp.Dataset, out: Path) -> None:
    """What one process does."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    with Processes.join("cpu") as processes:
        at = f"{world_size}-{accumulate}"
        found = {name: train(name, data, out / f"{at}-rank-{rank}-{name}", accumulate, processes) for name in MODELS}
    (out / f"{at}-rank-{rank}.json").write_text(json.dumps(found))


def main(root: str, out: str, port: int) -> None:
    """Forks the processes of every world, one world after the other; a process that fails fails the whole."""
    data = dp.open_dataset(root)
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    for world_size, accumulate in [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)]:
        os.environ["MASTER_PORT"] = str(port)
        port += 1
        children = []
        for rank in range(world_size):
            child = os.fork()
            if not child:
                as_rank(rank, world_size, accumulate, data, Path(out))
                os._exit(0)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]  # of all of them
        if any(codes):
            sys.exit(1)


if __name__ == "__main__":
    assert nvidia.dali.plugin.pytorch  # imported before the forks, not once in each process
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
