"""The output folder of a run: check it before anything is written, then claim it; never touch another run's folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from dali_pipeline import UsageError
from dali_pipeline.storage.whole import lock, write_whole
from training.config import MODELS, ModelName, TrainConfig
from training.provenance import note_start

CONFIG_NAME, METRICS_NAME, STARTS_NAME = "config.json", "metrics.json", "starts.json"
BASELINES_NAME, DIFFERENCES_NAME = "baselines.json", "differences.csv"
HISTORY_NAME, PREDICTIONS_NAME, CURVES_NAME = EXTRAS = "history.csv", "predictions.parquet", "curves.png"
WRITTEN = (CONFIG_NAME, METRICS_NAME, STARTS_NAME, BASELINES_NAME, DIFFERENCES_NAME, "layers.csv", *EXTRAS)


def checkpoint_path(folder: Path, model: ModelName, which: Literal["best", "last"]) -> Path:
    """Return the path of `<model>-last.pt`, to continue from, or `<model>-best.pt`, the weights of the best epoch."""
    return folder / f"{model}-{which}.pt"


def check_folder(folder: Path, described: Mapping[str, Any], *, replace: bool) -> None:
    """Raise UsageError unless the run `described` may use `folder`; writes nothing.

    The folder may be missing, empty, of the same run, or of another run if nothing was trained yet or `replace` is set.
    """
    try:
        path = folder / CONFIG_NAME
        if not path.exists():
            leftovers = {f"{name}.tmp" for name in WRITTEN}  # of a process that was killed when it began
            if folder.exists() and any(entry.name not in leftovers for entry in folder.iterdir()):
                raise UsageError(f"{folder} is not empty and holds no run; choose another --output-dir")
            return
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _unusable(folder, error) from error
    if not isinstance(stored, dict) or "data_digest" not in stored:
        raise UsageError(f"{path} was not written by train.py; choose another --output-dir")
    trained = (folder / METRICS_NAME).exists() or any(folder.rglob("*-last.pt"))
    if TrainConfig.in_new_words(stored) != described and trained and not replace:
        raise UsageError(
            f"{folder} holds a run of another configuration; give another --output-dir, or --resume never to replace it"
        )


def lacks(folder: Path) -> str:
    """Return a sentence on files that a finished run, or the first such run in a sub-folder, lacks; empty if none."""
    for run in sorted(path.parent for path in folder.glob(f"*/{METRICS_NAME}")) or [folder]:
        missing = [name for name in EXTRAS if not (run / name).exists()]
        if missing:
            marks = dict.fromkeys((run / METRICS_NAME, folder / METRICS_NAME))
            return (
                f"{run} lacks {', '.join(missing)}; remove {' and '.join(map(str, marks))}, and the same command makes it anew"
            )
    return ""


class FolderLock(AbstractContextManager["FolderLock"]):
    """Keeps other processes from training in the same folder, until the end of the block or of this process.

    Forked processes release the lock, so that none of them keeps it after this process has ended.
    """

    def __init__(self) -> None:
        self._fd = -1

    def take(self, folder: Path) -> None:
        """Lock the folder, and make it if it is missing; raise UsageError if another process has it or it cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            lock(self._fd)
        except BlockingIOError:
            raise UsageError(f"another process trains in {folder}; wait for it, or give another --output-dir") from None
        except OSError as error:
            raise _unusable(folder, error) from error
        os.register_at_fork(after_in_child=self.release)

    def release(self) -> None:
        """Release the folder; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()


def claim_folder(folder: Path, described: Mapping[str, Any], *, replace: bool) -> None:
    """Makes the folder, with the run's configuration in it, and notes this start with the code that runs.

    `replace` takes away what an earlier run wrote, no more. Raises UsageError as `check_folder` does: another process may have
    had the folder since then.
    """
    check_folder(folder, described, replace=replace)
    try:
        if replace:
            _remove_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG_NAME, (json.dumps(described, indent=2) + "\n").encode())
        note_start(folder / STARTS_NAME)
    except OSError as error:
        raise _unusable(folder, error) from error


def _remove_run(folder: Path) -> None:
    checkpoints = [f"{name}-{which}.pt" for name in MODELS for which in ("best", "last")]
    for run_folder in (folder, *folder.glob("seed-*"), *folder.glob("fold-*")):
        for name in (*WRITTEN, *checkpoints):
            (run_folder / name).unlink(missing_ok=True)
            (run_folder / f"{name}.tmp").unlink(missing_ok=True)
        shutil.rmtree(run_folder / "tensorboard", ignore_errors=True)


def _unusable(folder: Path, error: Exception) -> UsageError:
    return UsageError(f"{folder} cannot be an output folder ({error}); choose another --output-dir")


def check_resume(resume: str, models: tuple[ModelName, ...], runs: int) -> None:
    """Raise UsageError if `--resume PATH` names no checkpoint of these models."""
    if resume in ("auto", "never"):
        return
    path = Path(resume)
    if runs > 1:
        raise UsageError(f"--resume {path} goes with one run; leave --seeds and --folds out, or go on with --resume auto")
    if path.is_file():
        if len(models) > 1:
            raise UsageError(f"--resume {path} is one model's checkpoint; name its --model, or the folder that it lies in")
    elif not any(checkpoint_path(path, name, "last").is_file() for name in models):
        names = " or ".join(f"{name}-last.pt" for name in models)
        raise UsageError(f"--resume {path} is no checkpoint, nor a folder with {names}; expected auto, never, or one of these")


def find_checkpoint(resume: str, folder: Path, model: ModelName) -> Path | None:
    """Return the checkpoint to continue from, or None: the folder's for "auto", none for "never", otherwise that of a path."""
    if resume == "never":
        return None
    path = folder if resume == "auto" else Path(resume)
    if resume == "auto" or path.is_dir():
        path = checkpoint_path(path, model, "last")
    return path if path.is_file() else None
