"""doctor: is this run input-bound, and what to do. Every stage alone, all of them together, then the most promising change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dali_pipeline.dataset import Dataset, open_dataset
from dali_pipeline.graphs import GraphLoader
from dali_pipeline.loader import Loader
from dali_pipeline.machine import describe_machine, warnings_about
from dali_pipeline.schema import DataError, Kind
from dali_pipeline.sequences import SequenceLoader
from dali_pipeline.stages import Tell, Train, measure_stages, measure_together

SECONDS = 3.0  # a stage
WAITING = 0.1  # share of the time: more is input-bound


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured: a loader's options, as far as doctor changes them."""

    batch_size: int
    workers: int | Literal["auto"] = "auto"
    engine: Literal["dali", "torch"] = "dali"
    dtype: torch.dtype = torch.float32
    device: str = "auto"

    def loader(self, data: Dataset, kind: Kind) -> Loader[Any]:
        """Of the training split."""
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "workers": self.workers,
            "dtype": self.dtype,
            "device": self.device,
        }
        return SequenceLoader(data, engine=self.engine, **options) if kind == "sequences" else GraphLoader(data, **options)


def examine(
    root: Path, kind: Kind, setup: Setup, make_step: Callable[[Loader[Any]], Train], tell: Tell, seconds: float = SECONDS
) -> dict[str, Any]:
    """Keys: root, records, stages (name -> records and bytes a second), narrowest, together (records a second, share waiting),
    verdict, next (what to change, predicted and measured records a second) or None, machine, warnings; JSON types.

    make_step: gives what trains on a batch of the loader · tell: told what is measured · seconds: for each stage. Raises
    DataError for an empty training split.
    """
    data = open_dataset(root)
    loader = setup.loader(data, kind)
    if not loader.num_records:
        raise DataError(f"the training split of {root} has no {kind}; expected some to measure with")
    machine = describe_machine(root)
    record_bytes = int(loader.selection.nbytes.sum()) / loader.selection.num_records
    step = make_step(loader)
    rates = measure_stages(data, kind, loader, step, record_bytes, tell, seconds)
    from_disk = loader.selection.nbytes.sum() > 0.8 * machine["memory_available"]  # else the page cache soon has all of it
    counted = {name: rate for name, rate in rates.items() if name != "disk" or from_disk}
    narrowest = min(counted, key=lambda name: counted[name])
    tell("together")
    together, share = measure_together(loader, step, 2 * seconds)
    tell("a change")
    # what cannot be seen in a short run, as the page cache serves it
    starved = from_disk and rates["disk"] < rates["model"]
    return {
        "root": str(root),
        "records": kind,
        "bytes_per_record": record_bytes,
        "from_disk": bool(from_disk),
        "stages": {
            name: {"records_per_second": rate, "bytes_per_second": rate * record_bytes, "counted": name in counted}
            for name, rate in rates.items()
        },
        "narrowest": narrowest,
        "together": {"records_per_second": together, "wait_share": share},
        "verdict": "input-bound" if share > WAITING or starved else "fed",
        "next": best_change(data, kind, setup, rates, together, make_step, seconds),
        "machine": machine,
        "warnings": warnings_about(machine),
    }


def best_change(
    data: Dataset, kind: Kind, setup: Setup, rates: dict[str, float], together: float,
    make_step: Callable[[Loader[Any]], Train], seconds: float,
) -> dict[str, Any] | None:  # fmt: skip
    """The change that the stages promise most of, tried; None where none promises a tenth more."""
    promised = {name: predict(rates, change, kind) for name, change in changes(kind, setup).items()}
    now = predict(rates, setup, kind)
    gains = {name: together * rate / now for name, rate in promised.items()}
    if not gains or max(gains.values()) < 1.1 * together:
        return None
    name = max(gains, key=lambda one: gains[one])
    loader = changes(kind, setup)[name].loader(data, kind)
    measured, _ = measure_together(loader, make_step(loader), 2 * seconds)
    return {"change": name, "predicted": gains[name], "measured": measured}


def changes(kind: Kind, setup: Setup) -> dict[str, Setup]:
    """What can be changed without converting the data anew."""
    found = {f"workers={workers}": replace(setup, workers=workers) for workers in (0, 1, 2) if workers != setup.workers}
    found["dtype=torch.float16"] = replace(setup, dtype=torch.float16)
    found[f"batch_size={2 * setup.batch_size}"] = replace(setup, batch_size=2 * setup.batch_size)
    if kind == "sequences" and setup.engine == "dali":
        found["engine='torch'"] = replace(setup, engine="torch")
    return found


def predict(rates: dict[str, float], setup: Setup, kind: Kind) -> float:
    """Records a second: a sum of the stages' times in one thread; with background threads, the slower of reading and the rest.

    DALI copies once more, about as long as a gather; half the type is half of the decoding; a step's fixed costs are unknown,
    so a larger batch promises nothing.
    """
    gather = 1 / rates["gather"]
    decode = 1 / rates["decode"] / (2 if setup.dtype == torch.float16 else 1)
    model = 1 / rates["model"]
    copy = gather if setup.engine == "dali" and kind == "sequences" else 0
    threads = {"auto": 1}.get(str(setup.workers), setup.workers)
    if not threads:
        return 1 / (gather + copy + decode + model)
    assert isinstance(threads, int)
    return 1 / max(gather / threads, copy + decode + model)
