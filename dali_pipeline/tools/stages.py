"""Measure the speed of each stage alone, from the disk to the model, and of all stages together."""

from __future__ import annotations

import itertools
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dali_pipeline.dataset.dataset import Dataset
from dali_pipeline.loaders.graphs import GraphLoader
from dali_pipeline.loaders.loader import Loader
from dali_pipeline.reading.readahead import REQUESTS_IN_FLIGHT
from dali_pipeline.runtime.timing import StepTimer
from dali_pipeline.sampling.plan import EpochPlan
from dali_pipeline.storage.cachedfile import REQUEST_BYTES, Place, RemotePath
from dali_pipeline.storage.files import Files
from dali_pipeline.types import Kind

READ_BYTES = 256 << 20
LOOKED_AT = 4  # number of batches
Train = Callable[[Any], object]  # takes one training step on a batch
Tell = Callable[[str], None]  # called with the name of the stage that is measured now


def measure_stages(
    data: Dataset, kind: Kind, loader: Loader[Any], step: Train | None, record_bytes: float, tell: Tell, seconds: float
) -> dict[str, float]:
    """Return the records per second of every stage alone, in the order in which a record passes them.

    Args:
        data: The data set, whose training split is read.
        kind: Kind of record.
        loader: Loader of that split.
        step: Takes one training step on a batch, or None for no model.
        record_bytes: Mean size of a stored record.
        tell: Called with the name of each stage before it is measured.
        seconds: Measuring time per stage.
    """
    files = value_files(data, kind)
    plan = loader.plan(0)
    rates: dict[str, float] = {}
    if remote := [(place, nbytes) for place, nbytes in files.items() if isinstance(place, RemotePath)]:
        tell("store")
        rates["store"] = store_rate(remote, seconds) / record_bytes
        steps = len(list(islice(loader, LOOKED_AT)))  # the blocks of these steps are in the cache now
    else:
        tell("disk")
        paths = [place for place in files if isinstance(place, Path)]
        rates["disk"] = read_rate(paths, direct=True, seconds=seconds) / record_bytes
        tell("page cache")
        read_rate(paths, direct=False, seconds=seconds)  # fills the page cache
        rates["page cache"] = read_rate(paths, direct=False, seconds=seconds) / record_bytes
        steps = plan.num_steps
    tell("gather")
    gathered = list(
        islice(gathers(loader, plan, steps), LOOKED_AT)
    )  # also checks their hashes, and keeps their blocks in memory
    rates["gather"] = rate_of(gathers(loader, plan, steps), loader.batch_size, seconds, loader.device)
    if loader.window == "resident":  # the batches themselves come from the window
        whole = rate_of(itertools.chain.from_iterable(itertools.repeat(loader)), loader.batch_size, seconds, loader.device)
    tell("decode")
    rates["decode"] = rate_of(map(loader.decoded, _for_ever(gathered)), loader.batch_size, seconds, loader.device)
    if isinstance(loader, GraphLoader):
        tell("collate")
        collated = rate_of(map(loader.collated, _for_ever(gathered)), loader.batch_size, seconds, loader.device)
        rates["collate"] = _without(collated, rates["decode"])
    if loader.window == "resident":
        rates["gather"] = _without(whole, collated if isinstance(loader, GraphLoader) else rates["decode"])
    if loader.device.type == "cuda":
        tell("host to device")
        rates["host to device"] = copy_rate(loader.device) / record_bytes
    if step is not None:
        tell("model")
        rates["model"] = model_rate(loader, step, seconds)
    return rates


def _without(whole: float, part: float) -> float:
    """Return the records per second of some work without a part of it, from those of all of it and of the part."""
    return 1 / max(1 / whole - 1 / part, 0.01 / whole)


def model_rate(loader: Loader[Any], step: Train, seconds: float) -> float:
    """Return the records per second of training steps on one repeated batch: the maximum speed of the model."""
    batch = next(iter(loader))
    step(batch)
    return rate_of(map(step, _for_ever([batch])), loader.batch_size, seconds, loader.device)


def gathers(loader: Loader[Any], plan: EpochPlan, steps: int) -> Iterator[Any]:
    """Yield batches as stored, gathered one by one in the caller's thread; repeat the first `steps` steps endlessly."""
    while True:
        for step in range(steps):
            yield loader.gathered(plan, step)


def rate_of(work: Iterator[Any], records: int, seconds: float, device: torch.device) -> float:
    """Return the records per second of an endless iterator with `records` per item; wait for a GPU once, at the end."""
    next(work)
    wait_for(device)
    begun, done = time.perf_counter(), 0
    while done < 3 or time.perf_counter() - begun < seconds:
        next(work)
        done += 1
    wait_for(device)
    return done * records / (time.perf_counter() - begun)


def read_rate(files: list[Path], *, direct: bool, seconds: float) -> float:
    """Return the bytes per second of reading files in order, at most READ_BYTES or `seconds`.

    direct: whether to bypass the page cache.
    """
    buffer, read, spent = mmap.mmap(-1, 8 << 20), 0, 0.0
    for path in files:
        flags = getattr(os, "O_DIRECT", 0) if direct else 0
        try:
            fd = os.open(path, os.O_RDONLY | flags)
        except OSError:  # a file system without O_DIRECT
            fd = os.open(path, os.O_RDONLY)
        try:
            offset, begun = 0, time.perf_counter()
            while read < READ_BYTES and spent + time.perf_counter() - begun < seconds:
                nbytes = os.preadv(fd, [buffer], offset)
                offset, read = offset + nbytes, read + nbytes
                if nbytes < len(buffer):
                    break
            spent += time.perf_counter() - begun
        finally:
            os.close(fd)
        if read >= READ_BYTES or spent >= seconds:
            break
    return read / max(spent, 1e-9)


def value_files(data: Dataset, kind: Kind) -> dict[Place, int]:
    """Return the files that hold the values of the training split, and their sizes: shards, or the files that they refer to."""
    shards, files = data.shards("train", kind), dict[Place, int]()
    for number in range(len(shards.table)):
        if not shards.referenced or shards.files_root is None:
            files[data.shard_path("train", kind, number)] = shards.table.bytes[number]
            continue
        references = shards.open(number, Files(1)).references(shards.referenced[0])
        for name, size in zip(references.names, references.sizes.tolist(), strict=True):
            files[shards.files_root / name] = size
        if sum(files.values()) > 4 * READ_BYTES:  # more than is read; there may be a million
            break
    return files


def store_rate(shards: list[tuple[RemotePath, int]], seconds: float) -> float:
    """Return the bytes per second of reading shards (path, size) from a store, at most READ_BYTES or `seconds`.

    Keeps as many requests in flight as a loader.
    """
    spans = (
        (place, begin, min(begin + REQUEST_BYTES, nbytes))
        for place, nbytes in shards
        for begin in range(0, nbytes, REQUEST_BYTES)
    )
    begun = time.perf_counter()

    def fetch(number: int, place: RemotePath, begin: int, end: int) -> int:
        if number >= REQUESTS_IN_FLIGHT and time.perf_counter() - begun > seconds:
            return 0
        return len(place.store.read(place.key, begin, end))

    with ThreadPoolExecutor(REQUESTS_IN_FLIGHT) as pool:
        requests = islice(spans, READ_BYTES // REQUEST_BYTES)
        answers = [pool.submit(fetch, number, *request) for number, request in enumerate(requests)]
        read = sum(answer.result() for answer in answers)
    return read / max(time.perf_counter() - begun, 1e-9)


def copy_rate(device: torch.device) -> float:
    """Return the bytes per second of copies from pinned memory to the device."""
    source = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)
    target.copy_(source)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(8):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(device)
    return 8 * source.nbytes / (time.perf_counter() - begun)


def measure_together(loader: Loader[Any], step: Train, seconds: float) -> tuple[float, float]:
    """Return the records per second of loader and model together, and the share of time in which the device is idle.

    Leaves out the first steps. No step waits for the GPU, like in training.
    """
    timer = StepTimer(loader.device)
    batches = (batch for _ in _for_ever([0]) for batch in loader)
    for batch in islice(batches, 3):
        step(batch)
    wait_for(loader.device)
    begun = time.perf_counter()
    for done, batch in enumerate(timer(batches)):
        step(batch)
        if done > 2 and time.perf_counter() - begun > seconds:
            break
    wait_for(loader.device)
    share = timer.gap_share if loader.device.type == "cuda" else timer.wait_share
    return timer.records / (time.perf_counter() - begun), share


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished all its work; return at once for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _for_ever(items: list[Any]) -> Iterator[Any]:
    while True:
        yield from items
