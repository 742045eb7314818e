"""Before training: find the data, and refuse settings that cannot work, before anything of the run is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dali_pipeline import DataError, Dataset, UsageError, open_dataset
from dali_pipeline.storage.cachedfile import Place
from dali_pipeline.types import KINDS
from training.config import MODELS, Conduct, ModelName, TrainConfig, kind_of
from training.folder import check_folder, check_resume, find_checkpoint

DATA_FOLDER = Path("data")
RUNS_FOLDER = Path("runs")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Paths, number of runs, and other settings that change no number of a single run."""

    data: str | Path | None
    preprocessed_dir: Path | None
    converted_dir: Path | None
    output_dir: Path | None
    resume: str
    seeds: int
    folds: int
    conduct: Conduct
    replay: bool = False
    doctor: bool = False
    as_json: bool = False
    trace: Path | None = None
    cache_dir: Path | None = None
    cache_bytes: int | None = None
    files_root: str | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UsageError(f"seeds is {self.seeds}; expected at least 1")
        if self.folds < 0 or self.folds == 1:
            raise UsageError(f"folds is {self.folds}; expected 2 or more, or 0 for the split as it is stored")
        if self.folds and self.seeds > 1:
            raise UsageError("--seeds and --folds exclude each other; give one")
        if self.as_json and not self.doctor:
            raise UsageError("--json prints what --doctor finds; give both")
        if self.files_root is not None and not self.data:
            raise UsageError("--files-root belongs to a data set made in place; name that by --data")
        if self.data and self.preprocessed_dir:
            raise UsageError("--data and --preprocessed-dir exclude each other; give one")

    @property
    def runs(self) -> int:
        """Number of runs."""
        return self.folds or self.seeds


def find_data(options: Options) -> Dataset:
    """Open the data set that --data names, or convert that of --preprocessed-dir, or make the demonstration's."""
    if options.data:
        return open_dataset(options.data, options.cache_dir, options.cache_bytes, options.files_root)
    if options.preprocessed_dir:
        return _converted(options.preprocessed_dir, options.converted_dir)
    from dali_pipeline.ingest.extract.demo import demo_dataset

    if not (DATA_FOLDER / "sciq" / "manifest.json").exists():
        print(f"making the demonstration's data in {DATA_FOLDER / 'sciq'}: some 3 minutes on two cores, once", flush=True)
    return demo_dataset(DATA_FOLDER)


def open_same(root: Place, digest: str, files_root: Place | None = None) -> Dataset:
    """Open the data set in each process; raise UsageError if a machine has another data set under this name."""
    data = open_dataset(root, files_root=files_root)
    if data.digest != digest:
        raise UsageError(f"{data.root} here has the digest {data.digest}; the first process opened {digest}")
    return data


def _converted(folder: Path, converted_dir: Path | None) -> Dataset:
    from dali_pipeline.ingest.convert import convert, gigabytes
    from dali_pipeline.ingest.sources import Source

    source, beside = Source.find(folder), folder.resolve()
    converted = converted_dir or beside.with_name(beside.name + "_converted")
    if converted_dir is None and not converted.exists() and not os.access(beside.parent, os.W_OK):
        raise UsageError(f"{beside.parent} cannot be written to; name a folder for the converted data with --converted-dir")
    if not (converted / "manifest.json").exists():
        existing = next(parent for parent in converted.absolute().parents if parent.exists())
        free = gigabytes(shutil.disk_usage(existing).free)
        print(
            f"converting {gigabytes(source.nbytes)} in {len(source.files)} files to {converted} ({free} free), once", flush=True
        )
    return convert(folder, converted)


def models_for(data: Dataset, asked: tuple[ModelName, ...], level: str = "record") -> tuple[ModelName, ...]:
    """Return the models that the data can train; of all three, those whose kind of record the data, and the target, have."""
    kinds = {"step": ("sequences",), "node": ("graphs",)}.get(level, KINDS)
    fitting = tuple(name for name in asked if kind_of(name) in kinds)
    if not fitting:
        raise UsageError(
            f"a target per {level} is of {kinds[0]}; {', '.join(asked)} reads {kind_of(asked[0])}; expected another --model"
        )
    possible = tuple(name for name in fitting if kind_of(name) in data.schema.kinds)
    holds = f"{data.root} holds {' and '.join(data.schema.kinds)} only"
    if not possible or (possible != fitting and asked != MODELS):
        raise DataError(f"{holds}, on which {', '.join(sorted(set(fitting) - set(possible)))} cannot train")
    if possible != fitting:
        print(f"{holds}: training {', '.join(possible)}")
    return possible


def find_folder(options: Options, config: TrainConfig, data: Dataset) -> tuple[Path, dict[str, Any], bool]:
    """Return the output folder, the content of config.json, and whether to start anew; refuse another run's folder."""
    suffix = f"-{options.seeds}-seeds" if options.seeds > 1 else f"-{options.folds}-folds" if options.folds else ""
    folder = options.output_dir or RUNS_FOLDER / (config.folder_name(data) + suffix)
    described = {**config.to_dict(data), "seeds": options.seeds, "folds": options.folds}
    anew = options.resume == "never"
    check_folder(folder, described, replace=anew)
    return folder, described, anew


def check_settings(data: Dataset, config: TrainConfig, folder: Path, options: Options, world_size: int) -> None:
    """Check shares, labels, layers, device and checkpoint, so that errors come before anything is written."""
    from training.build import make_loader
    from training.checkpoint import read_checkpoint
    from training.target import find_target

    conduct = options.conduct
    config.check_shares(world_size)
    check_resume(options.resume, config.models, options.runs)
    check_trace(options.trace)
    for name, part in ((name, part) for _, part, _ in runs_of(options, config, data) for name in config.models):
        find_target(part, kind_of(name), config.target, config.task, layers=config.layers)
        for split in data.splits:
            loader = make_loader(
                name, part, config, split, conduct.device, num_workers=conduct.num_workers, world_size=world_size
            )
            if split == "train" and loader.num_records < world_size:
                raise DataError(
                    f"{world_size} processes share {loader.num_records} training records; expected one each at least"
                )
        if options.runs == 1 and (checkpoint := find_checkpoint(options.resume, folder, name)):
            read_checkpoint(checkpoint, name, config.to_dict(data))


def check_trace(path: Path | None) -> None:
    """Raise UsageError if a trace cannot be written to the path."""
    if path is None:
        return
    writable = path if path.exists() else path.absolute().parent
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(writable, os.W_OK):
        raise UsageError(f"{path} cannot be written; expected the name of a file in a folder that is there")


def runs_of(options: Options, config: TrainConfig, data: Dataset) -> Iterator[tuple[str, Dataset, TrainConfig]]:
    """Yield folder name, data and configuration of each run: a single run, one per seed, or one per fold."""
    if options.folds:
        for fold, part in enumerate(data.folds(options.folds, config.seed)):
            yield f"fold-{fold}", part, config
    elif options.seeds > 1:
        for seed in range(config.seed, config.seed + options.seeds):
            yield f"seed-{seed}", data, replace(config, seed=seed)
    else:
        yield "", data, config
