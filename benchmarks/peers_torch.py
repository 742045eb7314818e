"""Peers of the sequence loader that need only torch and NumPy, and the records that all its peers write.

Every batch is a mapping of `sequence` (B, T, F) float16, `label` and `id`, the record's number; every epoch is shuffled.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, get_worker_info

from benchmarks.peer import Batch, Epochs, Way

FILE_RECORDS = DEQUE_RECORDS = 250
VALUES = "values.npy"


class Records:
    """The written records: record i is values[i], its label i % 2, its id i."""

    def __init__(self, folder: Path) -> None:
        self.values = np.load(folder / VALUES, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, value in enumerate(self.values):
            yield {"sequence": value, "label": number % 2, "id": number}

    def check(self, batch: Batch) -> list[int]:
        """Return the ids of a batch after checking that it holds the written values."""
        sequences, ids = batch["sequence"], [int(id_) for id_ in batch["id"]]
        if not isinstance(sequences, torch.Tensor) or sequences.dtype != torch.float16:
            raise TypeError(f"sequences came as {getattr(sequences, 'dtype', type(sequences))}; expected a float16 tensor")
        if not np.array_equal(sequences.numpy(), self.values[ids]):
            raise ValueError(f"records {ids[:3]}… came with other values than were written")
        if [int(label) for label in batch["label"]] != [id_ % 2 for id_ in ids]:
            raise ValueError(f"records {ids[:3]}… came with other labels than were written")
        return ids


def write_values(folder: Path, values: np.ndarray[Any, Any]) -> None:
    """Write the values that `Records` reads."""
    np.save(folder / VALUES, values)


class PtFiles(Way):
    """A torch `IterableDataset` over `.pt` files of 250 records, through a deque of 250."""

    package, workers = "torch", (0, 2, 4)

    def write(self, folder: Path, records: Records) -> None:
        for begin in range(0, len(records), FILE_RECORDS):
            rows = range(begin, min(begin + FILE_RECORDS, len(records)))
            sequences = torch.from_numpy(records.values[rows.start : rows.stop].copy())
            labels, ids = [row % 2 for row in rows], list(rows)
            torch.save({"sequences": sequences, "labels": labels, "ids": ids}, folder / f"{begin:08}.pt")

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        return torch_epochs(PtDeque(sorted(folder.glob("*.pt"))), workers, batch_size=batch_size)


class PtDeque(IterableDataset[Any]):
    """Loads files, holds 250 records, and yields one of them for each that is loaded."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._rng = random.Random(0)

    def __iter__(self) -> Iterator[Batch]:
        info, rng, held = get_worker_info(), self._rng, []
        files = self._files[info.id :: info.num_workers] if info else list(self._files)
        rng.shuffle(files)
        for file in files:
            stored = torch.load(file, weights_only=True)
            for sequence, label, number in zip(stored["sequences"], stored["labels"], stored["ids"], strict=True):
                held.append({"sequence": sequence, "label": label, "id": number})
                if len(held) > DEQUE_RECORDS:
                    chosen = rng.randrange(len(held))
                    held[chosen], held[-1] = held[-1], held[chosen]
                    yield held.pop()
        rng.shuffle(held)
        yield from held


class MemoryMap(Way):
    """torch's `DataLoader` over a memory-mapped `.npy`, a record at a time."""

    package = "torch"

    def write(self, folder: Path, records: Records) -> None:
        write_values(folder, records.values)

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        return torch_epochs(MappedRecords(folder), workers, batch_size=batch_size, shuffle=True)


class MappedRecords(Dataset[Batch]):
    """A map-style data set."""

    def __init__(self, folder: Path) -> None:
        self._values = np.load(folder / VALUES, mmap_mode="c")  # as torch warns of what it may not write to

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, number: Any) -> Batch:
        """Return a record, or a batch for a list of numbers."""
        return {"sequence": torch.from_numpy(self._values[number]), "label": np.asarray(number) % 2, "id": number}


class MemoryMapBatches(MemoryMap):
    """Reads a batch at a time."""

    def loader(self, folder: Path, batch_size: int, workers: int) -> Epochs:
        records = MappedRecords(folder)
        sampler = BatchSampler(RandomSampler(records), batch_size, drop_last=False)
        return torch_epochs(records, workers, sampler=sampler, batch_size=None)


def torch_epochs(data: Any, workers: int, **options: Any) -> Epochs:
    """torch's `DataLoader`, with workers that persist."""
    return partial(iter, DataLoader(data, num_workers=workers, persistent_workers=workers > 0, **options))
