"""Epochs of draws: mixes of several data sets, and balance and weights within one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dali_pipeline.dataset.dataset import Dataset, View
from dali_pipeline.dataset.selection import Selection, derived_digest
from dali_pipeline.errors import DataError, UsageError
from dali_pipeline.runtime.checks import mapping, real, shown
from dali_pipeline.sampling.draws import Draws
from dali_pipeline.types import Kind

MAX_WEIGHTS = 64  # different ones; each is a part with its own window


def mix(datasets: Sequence[Dataset], weights: Sequence[float] | None = None) -> Dataset:
    """Combine several data sets into one whose training batches draw from each by its weight.

    An epoch of `train` has as many draws as the data sets have records together. Each data set is drawn without replacement
    until it is exhausted, then begins its next pass, across epochs too. With `mix([a, b], weights=[0.7, 0.3])`, seven tenths of
    every batch come from a, evenly spread. The other splits contain every record of all data sets once. The position of a
    record counts through the data sets in the order given.

    Args:
        datasets: Data sets with one schema, each given once.
        weights: One number above 0 per data set, with any sum. Default: each data set's own share of the records.

    Returns:
        A `Dataset` that a loader takes like any other; it has no shards of its own.

    Raises:
        UsageError: No data sets, one of them twice, or weights that are not one positive number for each.
        DataError: The schemas or layer numbers differ, or a data set has no training records.

    Costs nothing beyond the manifests, which are already read.
    """
    sets, shares = _checked(datasets, weights)
    digest = derived_digest("mix", *(word for data, share in zip(sets, shares, strict=True) for word in (data.digest, share)))
    selections: dict[str, dict[Kind, Selection]] = {}
    for split in (split for split in sets[0].splits if all(split in data.splits for data in sets)):
        selections[split] = {}
        for kind in sets[0].schema.kinds:
            parts = [data.select(split, kind) for data in sets]
            if any(part.draws for part in parts):
                raise UsageError("a mix cannot be mixed again; give all its data sets at once")
            chained = Selection.chain(parts, digest)
            if split == "train":
                if not all(part.num_records for part in parts):
                    raise DataError(f"a data set of the mix has no {kind} in its train split; leave it out")
                ends = np.cumsum([len(part.records) for part in parts]).tolist()
                spans = zip([0, *ends[:-1]], ends, shares, strict=True)
                draws = tuple(Draws(begin=begin, end=end, share=share) for begin, end, share in spans)
                chained = replace(chained, draws=draws, num_draws=chained.num_records)
            selections[split][kind] = chained
    counts = {
        split: {kind: _sum([data.label_counts(split, kind) for data in sets]) for kind in kinds}
        for split, kinds in selections.items()
    }
    return View(
        sets[0].root, replace(sets[0].manifest, statistics=None, node_statistics=None), digest, selections, counts, mixed=True
    )


def _checked(datasets: Sequence[Dataset], weights: Sequence[float] | None) -> tuple[list[Dataset], list[float]]:
    example = "mix([a, b], weights=[0.7, 0.3])"
    if not isinstance(datasets, list | tuple) or not datasets or not all(isinstance(data, Dataset) for data in datasets):
        raise UsageError(f"mix takes a list of data sets and a list of weights, such as {example}")
    sets = list(datasets)
    if len({id(data) for data in sets}) < len(sets):
        raise UsageError("mix was given a data set twice; expected each once")
    if weights is None:
        weights = [float(max(1, sum(data.num_records("train", kind) for kind in data.schema.kinds))) for data in sets]
    if isinstance(weights, np.ndarray):
        weights = weights.tolist()
    if not isinstance(weights, list | tuple) or len(weights) != len(sets):
        raise UsageError(f"weights are {shown(weights)}; expected a number for each of {len(sets)} data sets, as in {example}")
    shares = [real("a weight", weight, "a number above 0", above=0) for weight in weights]
    for other in sets[1:]:
        if other.schema != sets[0].schema:
            orders = [bool(data.schema.sequence and data.schema.sequence.step_major) for data in (sets[0], other)]
            way = "without --in-place" if orders[0] != orders[1] else "with one --dtype"
            raise DataError(f"{other.root} has another schema than {sets[0].root}; expected the same, so convert {way}")
        for kind in sets[0].schema.kinds:
            first_layers, other_layers = (data.layer_numbers(kind) for data in (sets[0], other))
            if first_layers != other_layers:
                raise DataError(
                    f"{other.root} has the layers {other_layers} in its {kind}, and {sets[0].root} {first_layers}; "
                    "expected the same, so convert with one --layers"
                )
    return sets, shares


def _sum(counts: list[dict[int, int]]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for labels in counts:
        total.update(labels)
    return dict(sorted(total.items()))


def reweighed(selection: Selection, class_balanced: bool, group_weights: Mapping[str, float] | None) -> Selection:
    """Return epochs of N draws with classes in equal numbers, or groups by their weights (1 if not named).

    Reads the labels, or groups, of all records. Raises UsageError for other arguments, or for more than MAX_WEIGHTS different
    weights; DataError if no record has a weight above 0.
    """
    if not class_balanced and group_weights is None:
        return selection
    if class_balanced and group_weights is not None:
        raise UsageError("class_balanced and group_weights exclude each other; give one")
    if selection.draws:
        raise UsageError("a mix draws by its own weights; class_balanced and group_weights go with one data set")
    if group_weights is None:
        which = np.unique(selection.labels(), return_inverse=True)[1]
        shares, words = np.ones(which.max(initial=-1) + 1), ["balance", "label"]  # unchanged words keep the digests
    else:
        values, which = np.unique(_weight_of_each(selection, group_weights), return_inverse=True)
        shares = values * np.bincount(which, minlength=len(values))
        words = ["weights", *sorted(f"{group!r} {float(weight)!r}" for group, weight in group_weights.items())]
    drawn = np.flatnonzero(shares).tolist()
    if len(drawn) > MAX_WEIGHTS:
        raise UsageError(f"{len(drawn)} different weights or labels; expected at most {MAX_WEIGHTS}, so round the weights")
    if not drawn:
        raise DataError("no record of this split has a weight above 0; expected at least one")
    parts = [(np.flatnonzero(which == part), float(shares[part])) for part in drawn]
    return selection.drawn(parts, derived_digest(selection.digest, *words))


def _weight_of_each(selection: Selection, group_weights: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """Return the weight of each record's group, (N,)."""
    by_group = {
        str(group).encode("utf-8", "replace"): real(f"the weight of group {group!r}", weight, "a number of at least 0", least=0)
        for group, weight in mapping("group_weights", group_weights, "weights by group, such as {'rare': 3.0}").items()
    }
    groups = selection.texts("groups")
    if not any(group in by_group for group in groups):
        raise DataError("none of the groups in group_weights is in this split; expected some of its groups")
    return np.array([by_group.get(group, 1.0) for group in groups])
