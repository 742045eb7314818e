"""Trains in one process and in several and prints what came of it; run by test_ranks.py, for threads do not survive a fork.

The processes are forked after the imports, which take longer than all the training.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nvidia.dali.plugin.pytorch
import torch

import dali_pipeline as dp
from training.config import MODELS, Conduct, ModelName, TrainConfig
from training.interrupt import Interrupted, Interrupts
from training.processes import EndedElsewhere, Processes
from training.trainer import Trainer

BATCH = 16
# processes, and pieces that each one's part of a batch is cut in
ALIKE = [(1, 1), (2, 1), (2, 2), (4, 1)]


def trainer_of(name: ModelName, data: dp.Dataset, folder: Path, processes: Processes, **config: Any) -> Trainer:
    """A checkpoint every 3 steps; goes on where one is."""
    folder.mkdir(exist_ok=True)
    settings = TrainConfig(models=(name,), batch_size=BATCH, **config)
    conduct = Conduct(device="cpu", checkpoint_steps=3)
    trainer = Trainer(name, data, settings, folder, conduct, Interrupts(processes), processes)
    if processes.first(trainer.last_path.exists):
        trainer.restore(trainer.last_path)
    return trainer


def outcome(trainer: Trainer) -> dict[str, Any]:
    """What must be the same however it was come by."""
    gradients = [one.grad.flatten() for one in trainer.model.parameters() if one.grad is not None]
    test = trainer.predict("test")
    return {
        "gradients": torch.cat(gradients).tolist() if gradients else [],
        "history": [[row["epoch"], row["train_loss"], row["val_loss"], row["val_auroc"]] for row in trainer.history],
        "scores": test.scores.tolist(),
        "ids": test.ids,
        "delivered": trainer.delivered,
    }


def alike(data: dp.Dataset, out: Path, accumulate: int) -> Callable[[Processes], None]:
    """Every detector, an epoch; the outcome with the loss of every step."""

    def in_process(processes: Processes) -> None:
        at, found = f"alike-{processes.world_size}-{accumulate}-rank-{processes.rank}", {}
        for name in MODELS:
            trainer = trainer_of(name, data, out / f"{at}-{name}", processes, epochs=1, dropout=0.0, accumulate=accumulate)
            losses: list[float] = []
            while not trainer.finished:
                trainer.train_epoch(lambda step, share: losses.append(processes.sum([float(share)])[0]))  # noqa: B023
            trainer.writer.wait()
            files = sorted(path.name for path in trainer.folder.iterdir())
            found[name] = outcome(trainer) | {"losses": losses, "files": files}
        (out / f"{at}.json").write_text(json.dumps(found))

    return in_process


def stopped(data: dp.Dataset, out: Path, stop: tuple[int, int, int] | None, **config: Any) -> Callable[[Processes], None]:
    """One run of two epochs in folder `out`. stop: at this step of the process's own a signal strikes this rank."""

    def in_process(processes: Processes) -> None:
        trainer, steps = trainer_of("gvae_lstm", data, out, processes, epochs=2, **config), 0
        if processes.is_first:
            with out.with_suffix(".began").open("a") as file:
                file.write(f"{trainer.epoch} {trainer.position['step']}\n")

        def on_step(step: int, share: torch.Tensor) -> None:
            nonlocal steps
            steps += 1
            if stop is not None and (steps, processes.rank) == stop[:2]:
                trainer.writer.wait()
                os.kill(os.getpid(), stop[2])

        while not trainer.finished:
            trainer.train_epoch(on_step)
        trainer.writer.wait()
        found = outcome(trainer)
        if processes.is_first:
            out.with_suffix(".json").write_text(json.dumps(found))

    return in_process


def in_processes(world_size: int, work: Callable[[Processes], None]) -> list[int]:
    """Forks so many processes and returns how each ended: its exit code, or minus a signal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(world_size)}
    children = []
    for rank in range(world_size):
        if not (child := os.fork()):
            torch.set_num_threads(1)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os._exit(_exit_code(work))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _exit_code(work: Callable[[Processes], None]) -> int:
    try:
        with Processes.join("cpu") as processes:
            work(processes)
    except Interrupted as stop:
        return stop.exit_code
    except EndedElsewhere:
        return 2
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        return 1
    return 0


def main(root: str, folder: str) -> None:
    """Everything; the exit codes of all processes go to codes.json."""
    data, out = dp.open_dataset(root), Path(folder)
    codes: dict[str, Sequence[int]] = {}
    for world_size, accumulate in ALIKE:
        codes[f"alike-{world_size}-{accumulate}"] = in_processes(world_size, alike(data, out, accumulate))
    codes["whole-1"] = in_processes(1, stopped(data, out / "whole-1", None))
    codes["whole-2"] = in_processes(2, stopped(data, out / "whole-2", None, dropout=0.0))
    for number, step in enumerate((5, 4, 5)):
        codes[f"torn-1-{number}"] = in_processes(1, stopped(data, out / "torn-1", (step, 0, signal.SIGKILL)))
    codes["torn-1"] = in_processes(1, stopped(data, out / "torn-1", None))
    codes["torn-2-0"] = in_processes(2, stopped(data, out / "torn-2", (5, 1, signal.SIGKILL), dropout=0.0))
    codes["torn-2-1"] = in_processes(2, stopped(data, out / "torn-2", (4, 1, signal.SIGTERM), dropout=0.0))
    codes["torn-2"] = in_processes(1, stopped(data, out / "torn-2", None, dropout=0.0))
    (out / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    assert nvidia.dali.plugin.pytorch  # imported before the forks, not once in each process
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    main(*sys.argv[1:])
