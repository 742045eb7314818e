"""doctor: find out whether a run is input-bound, and what to change.

Measures every stage alone, all stages together, and then the most promising change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.errors import DataError
from dali_pipeline.loaders.loader import Loader
from dali_pipeline.runtime.machine import describe_machine, warnings_about
from dali_pipeline.runtime.outside import readable
from dali_pipeline.runtime.threads import default_threads
from dali_pipeline.storage.cachedfile import RemotePath
from dali_pipeline.tools.knobs import Knob, Setup, knobs_of, predict
from dali_pipeline.tools.stages import Tell, Train, measure_stages, measure_together, model_rate
from dali_pipeline.types import Kind

SECONDS = 3.0  # measuring time per stage
WAITING = 0.1  # a run that waits for a larger share of the time is input-bound
FASTER_ALONE = 1.1  # if one thread is faster than several by more than this factor, a warning says so
WORTH_TRYING = 1.1  # factor of records per second from which a change is tried
MakeStep = Callable[[Loader[Any]], Train]


def examine(
    data: Dataset, kind: Kind, setup: Setup, make_step: MakeStep | None, tell: Tell, seconds: float = SECONDS
) -> dict[str, Any]:
    """Measure all stages of a loader and a model, and try the most promising change. Takes under a minute.

    Args:
        data: The data set, whose training split is loaded.
        kind: Kind of record.
        setup: Options of the loader.
        make_step: Returns a callable that trains on a batch of a given loader. None examines the loader alone, and the verdict
            is "no model".
        tell: Called with the name of each stage before it is measured.
        seconds: Measuring time per stage.

    Returns:
        JSON types with the keys root, records, bytes_per_record, from_disk, stages (records and bytes per second by name),
        narrowest, together (records per second, share of time waiting), verdict, knobs (predicted and measured records per
        second by change), next (the change that was tried, or None), machine and warnings.

    Raises:
        DataError: The training split is empty.
    """
    torch.set_num_threads(default_threads())  # like train.py
    loader = setup.loader(data, kind)
    if not loader.num_records:
        raise DataError(f"the training split of {data.root} has no {kind}; expected some to measure with")
    machine = describe_machine(data.root.cache.folder if isinstance(data.root, RemotePath) else data.root)
    record_bytes = loader.selection.record_bytes
    setup = replace(setup, record_bytes=record_bytes)
    step = make_step(loader) if make_step is not None else None
    rates = measure_stages(data, kind, loader, step, record_bytes, tell, seconds)
    warnings = [*warnings_about(machine), *(_about_threads(loader, step, seconds) if step is not None else [])]
    source, cache_bytes = "store", loader.selection.cache_bytes
    if cache_bytes is None:
        source, cache_bytes = "disk", int(0.8 * machine["memory_available"])
    # data that fit in the cache are soon read from it alone
    from_source = loader.selection.nbytes.sum() > cache_bytes
    counted = {name: rate for name, rate in rates.items() if name != source or from_source}
    narrowest = min(counted, key=lambda name: counted[name])
    tell("together")
    together, share = measure_together(loader, step or _nothing, 2 * seconds)
    tell("twice the batch")
    larger = 1.0 if make_step is None else _larger_batch(data, kind, setup, make_step, seconds) / rates["model"]
    knobs = knobs_of(data.schema, kind, setup, larger)
    now = predict(counted, kind, setup, Knob())
    promised = {name: together * predict(counted, kind, setup, knob) / now for name, knob in knobs.items()}
    knob_rates: dict[str, dict[str, float | None]] = {
        name: {"predicted": rate, "measured": None} for name, rate in promised.items()
    }
    tell("a change")
    best = max((name for name in promised if knobs[name].setup), key=lambda name: promised[name])
    tried = None
    if promised[best] >= WORTH_TRYING * together:
        knob_rates[best]["measured"] = _try(data, kind, knobs[best], make_step, seconds)
        tried = {"change": best, **knob_rates[best]}
    # a short run cannot show this, because the page cache serves its reads
    starved = from_source and rates[source] < rates.get("model", 0.0)
    verdict = "input-bound" if share > WAITING or starved else "fed"
    return {
        "root": readable(data.root),
        "records": kind,
        "bytes_per_record": record_bytes,
        "from_disk": bool(from_source),
        "stages": {
            name: {"records_per_second": rate, "bytes_per_second": rate * record_bytes, "counted": name in counted}
            for name, rate in rates.items()
        },
        "narrowest": narrowest,
        "together": {"records_per_second": together, "wait_share": share},
        "verdict": "no model" if step is None else verdict,
        "knobs": knob_rates,
        "next": tried,
        "machine": machine,
        "warnings": warnings,
    }


def _nothing(batch: Any) -> None:
    """Take a batch and do nothing."""


def _about_threads(loader: Loader[Any], step: Train, seconds: float) -> list[str]:
    """Return a warning if torch's threads wait for each other, so that one thread alone trains faster."""
    count = torch.get_num_threads()
    if loader.device.type != "cpu" or count == 1:
        return []
    rates = {}
    for threads in (count, 1):  # in direct succession, because the load of other processes changes
        torch.set_num_threads(threads)
        rates[threads] = model_rate(loader, step, seconds / 2)
    torch.set_num_threads(count)
    if rates[1] < FASTER_ALONE * rates[count]:
        return []
    return [
        f"torch's {count} threads wait for each other: the model takes {rates[count]:,.0f} records/s with them and "
        f"{rates[1]:,.0f} with one; set --threads 1, or OMP_NUM_THREADS=1"
    ]


def _larger_batch(data: Dataset, kind: Kind, setup: Setup, make_step: MakeStep, seconds: float) -> float:
    """Return the records per second of the model alone with batches twice as large; almost 0 if they do not fit on the GPU."""
    loader = replace(setup, batch_size=2 * setup.batch_size).loader(data, kind)
    try:
        return model_rate(loader, make_step(loader), seconds)
    except torch.OutOfMemoryError:
        return 1e-9


def _try(data: Dataset, kind: Kind, knob: Knob, make_step: MakeStep | None, seconds: float) -> float:
    """Return the records per second of all stages together, with a change."""
    assert knob.setup is not None
    loader = knob.setup.loader(data, kind)
    return measure_together(loader, _nothing if make_step is None else make_step(loader), 2 * seconds)[0]
