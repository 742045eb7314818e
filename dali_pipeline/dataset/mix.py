"""Mixes of several data sets, and balance and weights within one: epochs of draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dali_pipeline.dataset.dataset import Dataset, View
from dali_pipeline.dataset.selection import Selection, derived_digest
from dali_pipeline.errors import DataError, UsageError
from dali_pipeline.runtime.checks import mapping, one_of, real
from dali_pipeline.sampling.draws import Draws
from dali_pipeline.types import Kind

MAX_WEIGHTS = 64  # that differ; each is a part with a window of its own


def mix(shares: Mapping[Dataset, float]) -> Dataset:
    """Several data sets as one, `mix({a: 0.7, b: 0.3})`: of every batch of `train`, seven tenths are from a, evenly spread.

    An epoch of `train` is as many draws as the sets have records together; each set is drawn without replacement until it is
    exhausted, then begins its next pass, over the epochs' borders too. The other splits hold every record of all once. A
    record's position counts through the sets in the order given. Raises UsageError for shares that are no positive numbers,
    DataError for schemas that differ.
    """
    by_set = _checked(shares)
    sets = list(by_set)
    digest = derived_digest("mix", *(word for one, share in by_set.items() for word in (one.digest, share)))
    selections: dict[str, dict[Kind, Selection]] = {}
    for split in (split for split in sets[0].splits if all(split in one.splits for one in sets)):
        selections[split] = {}
        for kind in sets[0].schema.kinds:
            parts = [one.select(split, kind) for one in sets]
            if any(part.draws for part in parts):
                raise UsageError("a mix cannot be mixed again; give all its data sets at once")
            chained = Selection.chain(parts, digest)
            if split == "train":
                if not all(part.num_records for part in parts):
                    raise DataError(f"a data set of the mix has no {kind} in its train split; leave it out")
                ends = np.cumsum([len(part.records) for part in parts]).tolist()
                spans = zip([0, *ends[:-1]], ends, by_set.values(), strict=True)
                draws = tuple(Draws(begin=begin, end=end, share=share) for begin, end, share in spans)
                chained = replace(chained, draws=draws, num_draws=chained.num_records)
            selections[split][kind] = chained
    counts = {
        split: {kind: _sum([one.label_counts(split, kind) for one in sets]) for kind in kinds}
        for split, kinds in selections.items()
    }
    return View(sets[0].root, replace(sets[0].manifest, statistics=None), digest, selections, counts, mixed=True)


def _checked(shares: Mapping[Dataset, float]) -> dict[Dataset, float]:
    if not isinstance(shares, Mapping) or not shares or not all(isinstance(one, Dataset) for one in shares):
        raise UsageError("mix takes data sets and their shares, such as mix({a: 0.7, b: 0.3})")
    found = {one: real("a share", share, "a number above 0", above=0) for one, share in shares.items()}
    sets = list(found)
    for other in sets[1:]:
        if other.schema != sets[0].schema:
            raise DataError(
                f"{other.root} has another schema than {sets[0].root}; expected the same, so convert with one --dtype"
            )
        for kind in sets[0].schema.kinds:
            ours, theirs = (one.layer_numbers(kind) for one in (sets[0], other))
            if ours != theirs:
                raise DataError(
                    f"{other.root} has the layers {theirs} in its {kind}, and {sets[0].root} {ours}; expected the same, so "
                    "convert with one --layers"
                )
    return found


def _sum(counts: list[dict[int, int]]) -> dict[int, int]:
    total: Counter[int] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def reweighed(selection: Selection, balance: str | None, weights: Mapping[str, float] | None) -> Selection:
    """Epochs of N draws with labels in equal numbers (`balance="label"`), or groups by their weights (1 where not named).

    Reads the labels, or groups, of all records. Raises UsageError for anything else, or more than MAX_WEIGHTS different
    weights, DataError where no record has a weight above 0.
    """
    if balance is None and weights is None:
        return selection
    if balance is not None and weights is not None:
        raise UsageError("balance and weights exclude each other; give one")
    one_of("balance", balance, ("label", None))
    if selection.draws:
        raise UsageError("a mix draws by its own shares; balance and weights go with one data set")
    if weights is None:
        which = np.unique(selection.labels(), return_inverse=True)[1]
        shares, words = np.ones(which.max(initial=-1) + 1), ["balance", "label"]
    else:
        values, which = np.unique(_weight_of_each(selection, weights), return_inverse=True)
        shares = values * np.bincount(which, minlength=len(values))
        words = ["weights", *sorted(f"{group!r} {float(weight)!r}" for group, weight in weights.items())]
    drawn = np.flatnonzero(shares).tolist()
    if len(drawn) > MAX_WEIGHTS:
        raise UsageError(f"{len(drawn)} different weights or labels; expected at most {MAX_WEIGHTS}, so round the weights")
    if not drawn:
        raise DataError("no record of this split has a weight above 0; expected at least one")
    parts = [(np.flatnonzero(which == at), float(shares[at])) for at in drawn]
    return selection.drawn(parts, derived_digest(selection.digest, *words))


def _weight_of_each(selection: Selection, weights: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """(N,) the weight of each record's group."""
    by_group = {
        str(group).encode("utf-8", "replace"): real(f"the weight of group {group!r}", weight, "a number of at least 0", least=0)
        for group, weight in mapping("weights", weights, "weights by group, such as {'rare': 3.0}").items()
    }
    groups = selection.texts("groups")
    if not any(group in by_group for group in groups):
        raise DataError("none of the groups in weights is in this split; expected some of its groups")
    return np.array([by_group.get(group, 1.0) for group in groups])
