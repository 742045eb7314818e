"""Peers of the sequence loader: each writes the records in its own format and reads them as its documentation recommends.

Where that leaves a choice, the fastest that was found (docs/log.md). Nothing is compressed. Each imports its library where it
uses it, as this module is also read where they are not installed.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler

from benchmarks.peer import Batch, Epochs, Way
from benchmarks.peers_torch import MemoryMap, MemoryMapBatches, PtFiles, Records, torch_epochs

SHARD_BYTES = 64 << 20  # as ours; LitData's examples and Streaming's default are as large
SHUFFLE_RECORDS = 1000  # as in WebDataset's examples


class MosaicStreaming(Way):
    """MosaicML Streaming: MDS shards, `StreamingDataset` with its batch size, workers that persist (its FAQ)."""

    package = "mosaicml-streaming"

    def write(self, folder: Path, records: Records) -> None:
        # its image sets want torchvision, which does not load where it was built for CUDA and torch was not
        sys.modules["streaming.vision"] = ModuleType("streaming.vision")
        from streaming import MDSWriter

        steps, features = records.values.shape[1:]
        columns = {"sequence": f"ndarray:float16:{steps},{features}", "label": "int", "id": "int"}
        with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as writer:
            for record in records:
                writer.write(record)

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        from streaming import StreamingDataLoader, StreamingDataset

        data = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size)
        loader = StreamingDataLoader(data, batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0)
        return partial(iter, loader)


class LitData(Way):
    """LitData: `optimize` into chunks of 64 MB, `StreamingDataset` and `StreamingDataLoader`."""

    package = "litdata"

    def write(self, folder: Path, records: Records) -> None:
        from litdata import optimize

        work = partial(_record_at, str(records.values.filename))
        optimize(fn=work, inputs=list(range(len(records))), output_dir=str(folder), num_workers=1, chunk_bytes=SHARD_BYTES)

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        from litdata import StreamingDataLoader, StreamingDataset

        data = StreamingDataset(str(folder), shuffle=True)
        loader = StreamingDataLoader(data, batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0)
        return partial(iter, loader)


def _record_at(file: str, number: int) -> dict[str, Any]:
    value = torch.from_numpy(np.load(file, mmap_mode="r")[number].copy())
    return {"sequence": value, "label": number % 2, "id": number}


class WebDataset(Way):
    """WebDataset: tar shards of `.npy` and `.cls`, shards shuffled, 1,000 records shuffled, batched in the workers."""

    package = "webdataset"

    def write(self, folder: Path, records: Records) -> None:
        import webdataset

        size = min(SHARD_BYTES, records.values.nbytes // 8)  # a worker without a shard is an error
        with webdataset.ShardWriter(str(folder / "%06d.tar"), maxsize=size, verbose=0) as writer:
            for record in records:
                writer.write({"__key__": f"{record['id']:08}", "npy": record["sequence"], "cls": record["label"]})

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        import webdataset

        shards = sorted(str(path) for path in folder.glob("*.tar"))
        data = webdataset.WebDataset(shards, shardshuffle=len(shards)).shuffle(SHUFFLE_RECORDS).decode()
        data = data.to_tuple("npy", "cls", "__key__").batched(batch_size)
        loader = webdataset.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
        names = ("sequence", "label", "id")
        return lambda: (
            dict(zip(names, (torch.as_tensor(values), labels, keys), strict=True)) for values, labels, keys in loader
        )


class HuggingFace(Way):
    """Hugging Face `datasets`: fixed-size lists, a batch a query, in Arrow's format, as torch's copies more."""

    package = "datasets"

    def write(self, folder: Path, records: Records) -> None:
        import pyarrow
        from datasets import Dataset

        self._shape = records.values.shape[1:]
        values = pyarrow.array(records.values.reshape(-1))
        ids = np.arange(len(records))
        sequences = pyarrow.FixedSizeListArray.from_arrays(values, records.values[0].size)
        Dataset(pyarrow.table({"sequence": sequences, "label": ids % 2, "id": ids})).save_to_disk(folder)

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        from datasets import load_from_disk

        def batch(table: Any) -> Batch:
            values = table["sequence"].combine_chunks().flatten().to_numpy().reshape(-1, *self._shape)
            return {"sequence": torch.from_numpy(values), "label": table["label"].to_pylist(), "id": table["id"].to_pylist()}

        data = load_from_disk(folder).with_format("arrow")
        sampler = BatchSampler(RandomSampler(data), batch_size, drop_last=False)
        return torch_epochs(data, workers, sampler=sampler, batch_size=None, collate_fn=batch)


class Grain(Way):
    """Grain: ArrayRecord, a global shuffle, `mp_prefetch` where there are workers, `repeat`, as they take seconds to start.

    One reading thread, four batches ahead: with its 16, and even with 2, the interpreter lock made it slower (docs/log.md).
    """

    package = "grain"

    def write(self, folder: Path, records: Records) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._shape = records.values.shape[1:]
        writer = ArrayRecordWriter(str(folder / "records.array_record"), "group_size:1,uncompressed")
        for record in records:
            writer.write(struct.pack("<qq", record["id"], record["label"]) + record["sequence"].tobytes())
        writer.close()

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        import grain

        source = grain.sources.ArrayRecordDataSource(str(folder / "records.array_record"))
        data = grain.MapDataset.source(source).seed(0).shuffle().map(partial(_parsed, self._shape)).batch(batch_size)
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        batches, data = len(data), data.repeat().to_iter_dataset(ahead)
        if workers:
            data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        endless = iter(data)
        return lambda: ({**batch, "sequence": torch.from_numpy(batch["sequence"])} for batch in islice(endless, batches))


def _parsed(shape: tuple[int, ...], stored: bytes) -> dict[str, Any]:
    number, label = struct.unpack_from("<qq", stored)
    return {"sequence": np.frombuffer(stored, np.float16, offset=16).reshape(shape), "label": label, "id": number}


class Spdl(Way):
    """SPDL, which has no format of its own: an `.npy` a record, read and stacked a batch at a time in its threads."""

    package, workers = "spdl", (1, 2, 4)

    def write(self, folder: Path, records: Records) -> None:
        for record in records:
            np.save(folder / f"{record['id']:08}.npy", record["sequence"])

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        import spdl.io
        from spdl.pipeline import PipelineBuilder

        paths, rng = sorted(folder.glob("*.npy")), np.random.default_rng(0)

        def load(ids: list[int]) -> Batch:
            values = np.stack([spdl.io.load_npy(paths[id_].read_bytes()) for id_ in ids])
            return {"sequence": torch.from_numpy(values), "label": [id_ % 2 for id_ in ids], "id": ids}

        def epoch() -> Iterator[Batch]:
            order = rng.permutation(len(paths)).tolist()
            batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
            built = PipelineBuilder().add_source(batches).pipe(load, concurrency=workers).add_sink(2 * workers)
            pipeline = built.build(num_threads=workers)
            with pipeline.auto_stop():
                yield from pipeline

        return epoch


PEERS: dict[str, type[Way]] = {
    ".pt IterableDataset": PtFiles,
    "memory-mapped .npy, records": MemoryMap,
    "memory-mapped .npy, batches": MemoryMapBatches,
    "MosaicML Streaming": MosaicStreaming,
    "LitData": LitData,
    "WebDataset": WebDataset,
    "Hugging Face datasets": HuggingFace,
    "Grain": Grain,
    "SPDL": Spdl,
}
