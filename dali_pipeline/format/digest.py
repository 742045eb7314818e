"""EpochDigest: proof of which records were delivered, in any order, and that each came once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from dali_pipeline.errors import DataError, UsageError
from dali_pipeline.types import Mask

_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class EpochDigest:
    """Number of records, and the sum of the XXH3-64 of their ids modulo 2**64.

    The sum is the same in any order, and `+` merges ranks. A lost, doubled or exchanged record changes it, with one chance in
    2**64 of a miss.

    With `unit="step"`, rows take the place of records, and the hash of a row comes from the id of its record and its step.

    Attributes:
        records: Number of records delivered. Default: 0.
        total: Sum of the hashes. Default: 0.
        left_out: Number of records that could not be read and were replaced by padding. Default: 0.
        drawn: (draws,) uint64 hashes in an epoch of draws, from which `times` counts how often each record came; 8 bytes per
            draw. Empty in any other epoch.
    """

    records: int = 0
    total: int = 0
    left_out: int = 0
    drawn: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64), compare=False, repr=False)

    @classmethod
    def of(cls, ids: Iterable[str] | Iterable[bytes], steps: npt.ArrayLike | None = None) -> EpochDigest:
        """Compute the digest of ids, or of single steps of records.

        Args:
            ids: Ids, as text or as UTF-8 bytes.
            steps: (N,) step within its record of each row, for the digest of `unit="step"`. Default: none, of records.

        Returns:
            The `EpochDigest`.
        """
        hashes = [
            xxhash.xxh3_64_intdigest(record_id.encode() if isinstance(record_id, str) else record_id) for record_id in ids
        ]
        if steps is not None:
            hashes = step_hashes(np.array(hashes, np.uint64), np.asarray(steps, np.int64)).tolist()
        return cls(records=len(hashes), total=sum(hashes) & _MASK)

    def __add__(self, other: EpochDigest) -> EpochDigest:
        drawn = np.concatenate([self.drawn, other.drawn]) if len(other.drawn) else self.drawn
        return EpochDigest(
            records=self.records + other.records,
            total=(self.total + other.total) & _MASK,
            left_out=self.left_out + other.left_out,
            drawn=drawn,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types for a checkpoint, so an epoch that another process finishes is checked as a whole.

        Returns:
            A dict that `from_dict` reads.
        """
        counts = {"records": self.records, "total": f"{self.total:016x}", "left_out": self.left_out}
        return {**counts, "drawn": self.drawn.tobytes().hex()}

    @classmethod
    def from_dict(cls, digest: Mapping[str, Any]) -> EpochDigest:
        """Read what `to_dict` returned.

        Args:
            digest: The dict.

        Returns:
            The `EpochDigest`.

        Raises:
            UsageError: The mapping is not such a dict.
        """
        try:
            drawn = np.frombuffer(bytes.fromhex(digest["drawn"]), np.uint64)
            left_out = int(digest.get("left_out", 0))
            return cls(records=int(digest["records"]), total=int(digest["total"], 16), left_out=left_out, drawn=drawn)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not a digest ({error!r}); expected what to_dict() returned") from None

    @property
    def times(self) -> dict[int, int]:
        """Number of records that came once, twice and so on in an epoch of draws. Costs a sort of the draws."""
        repeats = np.unique(self.drawn, return_counts=True)[1]
        return {int(count): int(records) for count, records in zip(*np.unique(repeats, return_counts=True), strict=True)}

    def check(self, expected: EpochDigest, what: str = "records") -> str:
        """Compare the digest with that of the expected records.

        Args:
            expected: Digest of the records that the epoch should have delivered.
            what: What is counted, in words. Default: records.

        Returns:
            A sentence such as `2,816 of 2,816 records, each once`.

        Raises:
            DataError: Other records were delivered.
        """
        if self == expected:
            return f"{self.records:,} of {expected.records:,} {what}, each once"
        if self.left_out and self.records + self.left_out == expected.records:
            return f"{self.records:,} of {expected.records:,} {what}, {self.left_out:,} left out as damaged or not finite"
        if self.records != expected.records:
            raise DataError(f"the epoch delivered {self.records:,} {what}; expected {expected.records:,}, each once")
        raise DataError(
            f"the epoch delivered {self.records:,} {what}, but not each of the split's {expected.records:,} once: "
            f"the sum of their ids' hashes is {self.total:016x}; expected {expected.total:016x}"
        )

    def describe(self, what: str = "records") -> str:
        """Describe an epoch of draws.

        Args:
            what: What is counted, in words. Default: records.

        Returns:
            A sentence such as `2,816 draws of 1,912 records, one at most 4 times`.
        """
        times = self.times
        return f"{self.records:,} draws of {sum(times.values()):,} {what}, one at most {max(times, default=0)} times"


def step_hashes(hashes: npt.NDArray[np.uint64], steps: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash per row, (N,), from the XXH3-64 of its record's id and its step within the record.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014) mixes both, so that no two sums of rows are alike by arithmetic.
    """
    mixed = hashes + (steps.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    hashed: npt.NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return hashed


class Delivered:
    """Running digest of what an iterator delivers.

    Args:
        drawn: Whether to keep the hash of every draw.
    """

    def __init__(self, drawn: bool) -> None:
        self._drawn, self._records, self._total, self._left_out = drawn, 0, 0, 0
        self._hashes: list[npt.NDArray[np.uint64]] = []

    def add(self, hashes: npt.NDArray[np.uint64], valid: Mask, left_out: int = 0) -> None:
        """Add one batch, (B,) hashes of its ids, and the number of its records that were left out."""
        hashes = hashes[valid]
        self._records, self._total = self._records + len(hashes), self._total + int(hashes.sum())  # sums modulo 2**64
        self._left_out += left_out
        if self._drawn:
            self._hashes.append(hashes)

    @property
    def digest(self) -> EpochDigest:
        """The digest of all batches so far."""
        drawn = np.concatenate([np.zeros(0, np.uint64), *self._hashes])
        return EpochDigest(records=self._records, total=self._total % 2**64, left_out=self._left_out, drawn=drawn)
