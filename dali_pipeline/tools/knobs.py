"""Knobs: list the changes that may speed up a loader, and predict the gain of each from the speeds of the stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.format.encoding import BFLOAT16
from dali_pipeline.format.layers import Layers
from dali_pipeline.format.schema import Field, Schema
from dali_pipeline.loaders.device import resolve_device
from dali_pipeline.loaders.graphs import GraphLoader
from dali_pipeline.loaders.loader import Loader
from dali_pipeline.loaders.options import WindowKind
from dali_pipeline.loaders.sequences import SequenceLoader
from dali_pipeline.runtime.ahead import background_threads
from dali_pipeline.runtime.container import allowed_cores
from dali_pipeline.runtime.world import World
from dali_pipeline.sampling.order import WINDOW_BYTES
from dali_pipeline.types import Kind

FASTER_DISK = 2.0  # speed relative to now


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The loader options that doctor changes, and what it reads of each record.

    Attributes:
        record_bytes: Size of a record, for num_workers="auto".
        layers, steps, fields: As those of a loader; `steps` of sequences alone.
        Others: As those of a loader.
    """

    batch_size: int
    num_workers: int | Literal["auto"] = "auto"
    engine: Literal["dali", "torch"] = "dali"
    dtype: torch.dtype = torch.float32
    device: str = "auto"
    window_bytes: int = WINDOW_BYTES
    window: WindowKind = "auto"
    record_bytes: float = 0.0
    layers: Layers = None
    steps: Layers = None
    fields: tuple[str, ...] | None = None

    def loader(self, data: Dataset, kind: Kind) -> Loader[Any]:
        """Return a loader of the training split with these options."""
        names = ("batch_size", "num_workers", "dtype", "device", "window_bytes", "window", "layers", "fields")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        if kind == "graphs":
            return GraphLoader(data, **options)
        return SequenceLoader(data, engine=self.engine, steps=self.steps, **options)


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A change, and its effect on the stages.

    Attributes:
        setup: Options with the change; None if it takes more than options.
        stored: Stored bytes per record, relative to now.
        model: Speed of the model, relative to now.
        disk: Speed of the disk, relative to now.
    """

    setup: Setup | None = None
    stored: float = 1.0
    model: float = 1.0
    disk: float = 1.0


def knobs_of(schema: Schema, kind: Kind, setup: Setup, larger_batch: float) -> dict[str, Knob]:
    """Return the changes by name.

    larger_batch: records per second of the model with batches twice as large, relative to now.
    """
    counts = [number for number in (0, 1, 2, 4) if number != _threads(setup) and number <= max(1, allowed_cores())]
    kind_of_window = setup.window if kind == "sequences" else "auto"  # processes that read graphs have no resident window
    knobs = {
        f"num_workers={number}": Knob(setup=replace(setup, num_workers=number, window=kind_of_window)) for number in counts
    }
    if setup.dtype != torch.float16:
        knobs["dtype=torch.float16"] = Knob(setup=replace(setup, dtype=torch.float16))
    twice = replace(setup, batch_size=2 * setup.batch_size)
    knobs[f"batch_size={twice.batch_size}"] = Knob(setup=twice, model=larger_batch)
    if kind == "sequences":
        other: Literal["dali", "torch"] = "torch" if setup.engine == "dali" else "dali"
        knobs[f"engine='{other}'"] = Knob(setup=replace(setup, engine=other))
    # a smaller window means shorter reads, but reading ahead hides that; so a larger window promises no gain
    window = 2 * setup.window_bytes
    knobs[f"window_bytes={window >> 20} << 20"] = Knob(setup=replace(setup, window_bytes=window))
    knobs["layers=, half of them"] = Knob(stored=0.5, model=2.0)
    if kind == "sequences" and (field := schema.sequence) is not None and not field.scales:
        knobs["convert --dtype sequence=int8"] = Knob(stored=1 / _width(field))
    if kind == "graphs" and (field := schema.x) is not None and _width(field) > 2:
        knobs["convert --dtype x=bfloat16"] = Knob(stored=2 / _width(field))
    knobs["a disk twice as fast"] = Knob(disk=FASTER_DISK)
    return knobs


def _threads(setup: Setup) -> int:
    return background_threads(resolve_device(setup.device, World()), setup.record_bytes, setup.num_workers)


def _width(field: Field) -> int:
    return 2 if field.dtype == BFLOAT16 else torch.empty(0, dtype=getattr(torch, field.dtype)).itemsize


def predict(rates: dict[str, float], kind: Kind, now: Setup, knob: Knob) -> float:
    """Predict the records per second with a change.

    In one thread the times of the stages add up. With background threads the slowest of three counts: gathering, all other
    stages, and the cores. The disk works in parallel to all of them. On the CPU, DALI makes one more copy, which takes about as
    long as a gather. A type of half the size halves the time of decoding.

    Args:
        rates: Records per second of each stage that counts.
        kind: Kind of record.
        now: Present options.
        knob: The change.
    """
    setup = knob.setup or now
    device = resolve_device(setup.device, World())
    seconds = {name: 1 / rate for name, rate in rates.items()}
    gather = seconds["gather"] * knob.stored
    decode = seconds["decode"] * torch.finfo(setup.dtype).bits / torch.finfo(now.dtype).bits
    if knob.setup is None and knob.model > 1:  # fewer layers mean fewer values in every stage
        decode *= knob.stored
    rest = (
        decode
        + seconds.get("collate", 0)
        + seconds.get("model", 0) / knob.model
        + seconds.get("host to device", 0) * knob.stored
    )
    if setup.engine == "dali" and kind == "sequences" and device.type == "cpu":
        rest += gather
    threads = _threads(setup)
    if threads:
        whole = max(gather / threads, rest, (gather + rest) / max(1.0, allowed_cores()) if device.type == "cpu" else 0.0)
    else:
        whole = gather + rest
    disk, store = seconds.get("disk", 0) / knob.disk, seconds.get("store", 0)
    return 1 / max(whole, (disk + store) * knob.stored)
