"""Before training: the data are found, and whatever cannot work is refused, before anything of the run is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dali_pipeline import DataError, Dataset, UsageError, open_dataset
from dali_pipeline.storage.cachedfile import Place
from training.config import MODELS, Conduct, ModelName, TrainConfig, kind_of
from training.folder import check_folder, check_resume, find_checkpoint

DATA_FOLDER = Path("data")
RUNS_FOLDER = Path("runs")
MOST_CLASSES = 4096  # figures of several classes take memory of their number times itself


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where input and output lie, how often and how training runs: what changes no number of a single run."""

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

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UsageError(f"seeds is {self.seeds}; expected at least 1")
        if self.folds < 0 or self.folds == 1:
            raise UsageError(f"folds is {self.folds}; expected 2 or more, or 0 for the split as it is stored")
        if self.folds and self.seeds > 1:
            raise UsageError("--seeds and --folds exclude each other; give one")
        if self.as_json and not self.doctor:
            raise UsageError("--json prints what --doctor finds; give both")
        if self.data and self.preprocessed_dir:
            raise UsageError("--data and --preprocessed-dir exclude each other; give one")

    @property
    def runs(self) -> int:
        """How many runs this asks for."""
        return self.folds or self.seeds


def find_data(options: Options) -> Dataset:
    """The data set that was named; the one converted from the folder that was named; or the demonstration's."""
    if options.data:
        return open_dataset(options.data, options.cache_dir, options.cache_bytes)
    if options.preprocessed_dir:
        return _converted(options.preprocessed_dir, options.converted_dir)
    from dali_pipeline.ingest.extract.demo import demo_dataset

    if not (DATA_FOLDER / "sciq" / "manifest.json").exists():
        print(f"making the demonstration's data in {DATA_FOLDER / 'sciq'}: some 3 minutes on two cores, once", flush=True)
    return demo_dataset(DATA_FOLDER)


def open_same(root: Place, digest: str) -> Dataset:
    """The data set, in each process. Raises UsageError where a machine holds another one under this name."""
    data = open_dataset(root)
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


def models_for(data: Dataset, asked: tuple[ModelName, ...]) -> tuple[ModelName, ...]:
    """The models that the data can train: all three asked of half a data set are those of that half."""
    possible = tuple(name for name in asked if kind_of(name) in data.schema.kinds)
    holds = f"{data.root} holds {' and '.join(data.schema.kinds)} only"
    if not possible or (possible != asked and asked != MODELS):
        raise DataError(f"{holds}, on which {', '.join(sorted(set(asked) - set(possible)))} cannot train")
    if possible != asked:
        print(f"{holds}: training {', '.join(possible)}")
    return possible


def check_labels(data: Dataset, models: Iterable[str]) -> None:
    """Raises DataError unless every split has records of two classes at least, or no score can be computed, for each model."""
    check_classes(data)
    for kind in dict.fromkeys(map(kind_of, models)):
        for split in ("train", "val", "test"):
            counts = data.label_counts(split, kind)
            if len(counts) < 2:
                found = f"labels all {next(iter(counts))} in its {kind}" if counts else f"no records of {kind}"
                raise DataError(
                    f"split {split!r} of {data.root} has {found}; expected at least two classes in train, val and test"
                )


def check_classes(data: Dataset) -> None:
    """Raises DataError for labels that are no classes, as a detector has an output for every number up to the highest."""
    if data.schema.labels.kind != "class":
        raise DataError(f"{data.root} has labels of kind {data.schema.labels.kind!r}; a detector needs one class per record")
    if data.num_classes > MOST_CLASSES:
        raise DataError(
            f"{data.root} has the label {data.num_classes - 1}, and a detector has an output for every number up to it; "
            f"expected labels below {MOST_CLASSES}: number the classes 0, 1, 2 … and write the set anew"
        )


def find_folder(options: Options, config: TrainConfig, data: Dataset) -> tuple[Path, dict[str, Any], bool]:
    """The output folder, what its config.json is to say, and whether the run begins anew; another run's folder is refused."""
    suffix = f"-{options.seeds}-seeds" if options.seeds > 1 else f"-{options.folds}-folds" if options.folds else ""
    folder = options.output_dir or RUNS_FOLDER / (config.folder_name(data) + suffix)
    described = {**config.to_dict(data), "seeds": options.seeds, "folds": options.folds}
    anew = options.resume == "never"
    check_folder(folder, described, replace=anew)
    return folder, described, anew


def check_settings(data: Dataset, config: TrainConfig, folder: Path, options: Options, world_size: int) -> None:
    """What would fail later fails now, before anything is written: shares, labels, layers, a device, a checkpoint."""
    from training.build import make_loader
    from training.checkpoint import read_checkpoint

    conduct = options.conduct
    config.check_shares(world_size)
    check_resume(options.resume, config.models, options.runs)
    check_trace(options.trace)
    for name, one in ((name, one) for _, one, _ in runs_of(options, config, data) for name in config.models):
        check_labels(one, [name])
        for split in data.splits:
            loader = make_loader(
                name, one, config, split, conduct.device, num_workers=conduct.num_workers, world_size=world_size
            )
            if split == "train" and loader.num_records < world_size:
                raise DataError(
                    f"{world_size} processes share {loader.num_records} training records; expected one each at least"
                )
        if options.runs == 1 and (checkpoint := find_checkpoint(options.resume, folder, name)):
            read_checkpoint(checkpoint, name, config.to_dict(data))


def check_trace(path: Path | None) -> None:
    """Raises UsageError where no trace could be written."""
    if path is None:
        return
    writable = path if path.exists() else path.absolute().parent
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(writable, os.W_OK):
        raise UsageError(f"{path} cannot be written; expected the name of a file in a folder that is there")


def runs_of(options: Options, config: TrainConfig, data: Dataset) -> Iterator[tuple[str, Dataset, TrainConfig]]:
    """Name of the folder, data and configuration of each run: one, one a seed, or one a fold."""
    if options.folds:
        for fold, part in enumerate(data.folds(options.folds, config.seed)):
            yield f"fold-{fold}", part, config
    elif options.seeds > 1:
        for seed in range(config.seed, config.seed + options.seeds):
            yield f"seed-{seed}", data, replace(config, seed=seed)
    else:
        yield "", data, config
