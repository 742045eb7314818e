"""Folds, mixes, balance and weights: data sets made of the shards of others, and epochs of draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dali_pipeline as dp
from dali_pipeline.sampling.draws import Draws, apportion
from dali_pipeline.sampling.order import Order
from dali_pipeline.sampling.plan import EpochPlan
from tests.helpers.batches import assert_same, content
from tests.helpers.records import make_records, write

KINDS: dict[str, dict[str, Any]] = {
    "dali": {"loader": dp.SequenceLoader},
    "torch": {"loader": dp.SequenceLoader, "engine": "torch"},
    "graphs": {"loader": dp.GraphLoader},
    "graphs, processes": {"loader": dp.GraphLoader, "num_workers": 2},
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    return KINDS[request.param]


@pytest.fixture(params=["dali", "torch", "graphs"])
def quick_kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Without processes, where a test runs many epochs."""
    return KINDS[request.param]


def load(data: dp.Dataset, kind: dict[str, Any], **options: Any) -> Any:
    chosen = {**kind, "batch_size": 8, **options}
    return chosen.pop("loader")(data, **chosen)


def valid_ids(batches: Any) -> list[str]:
    return [one for batch in batches for one, valid in zip(batch.ids, batch.valid.tolist(), strict=True) if valid]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> dp.Dataset:
    """Another data set of the same schema, a fifth as large, with ids of its own."""
    records = [
        dp.Record(id=f"other-{one.id}", group=f"other-{one.group}", label=one.label, sequence=one.sequence, graphs=one.graphs)
        for one in make_records(60, seed=9)
    ]
    return write(tmp_path_factory.mktemp("other") / "set", records)


# ------------------------------------------------------------------ the plan alone


@settings(deadline=None, max_examples=25)
@given(
    parts=st.lists(
        st.tuples(st.lists(st.integers(1, 30), min_size=4, max_size=8), st.floats(0.01, 10)), min_size=1, max_size=5
    ),
    num_draws=st.integers(8, 400),
    num_partitions=st.integers(1, 4),
    world_size=st.integers(1, 4),
    share=st.integers(1, 5),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63),
)
def test_draws_of_any_parts(
    parts: list[tuple[list[int], float]],
    num_draws: int,
    num_partitions: int,
    world_size: int,
    share: int,
    shuffle: bool,
    seed: int,
) -> None:
    """N draws an epoch, each part its share and without replacement within its own passes, alike for any world."""
    sizes = [size for shards, _ in parts for size in shards]
    ends = np.cumsum([len(shards) for shards, _ in parts]).tolist()
    draws = [Draws(begin=b, end=e, share=s) for b, e, (_, s) in zip([0, *ends[:-1]], ends, parts, strict=True)]
    size = num_partitions * world_size * share
    order = Order(
        digest="5",
        split="train",
        seed=seed,
        shuffle=shuffle,
        global_batch_size=size,
        window_bytes=900,
        num_partitions=num_partitions,
        drop_last=False,
    )
    total = sum(share for _, share in parts)
    drawn: list[list[int]] = []
    for epoch in range(3):
        plan = EpochPlan(order, epoch, sizes, [40 * n for n in sizes], draws, num_draws)
        batches = [plan.batch(step) for step in range(plan.num_steps)]
        for step, batch in enumerate(batches):
            ranks = [plan.batch(step, rank, world_size) for rank in range(world_size)]
            valid = np.concatenate([rank.positions[rank.valid] for rank in ranks])  # the ranks' padding is their own
            assert np.array_equal(valid, batch.positions[batch.valid])
        drawn.append([one for batch in batches for one in batch.positions[batch.valid].tolist()])
        assert len(drawn[-1]) == num_draws
    record_ends = np.cumsum(sizes)[np.array(ends) - 1]
    for number, (_, part_share) in enumerate(parts):
        begin, end = (record_ends[number - 1] if number else 0), record_ends[number]
        own = [[one for one in epoch if begin <= one < end] for epoch in drawn]
        # every partition rounds to a whole number once
        assert all(abs(len(epoch) - num_draws * part_share / total) <= 2 * num_partitions for epoch in own)
        assert len({len(epoch) for epoch in own}) == 1
        if num_partitions == 1:
            every = [one for epoch in own for one in epoch]
            for at in range(0, len(every), end - begin):
                one_pass = every[at : at + end - begin]
                assert len(set(one_pass)) == len(one_pass)  # over the borders of epochs too


@given(total=st.integers(0, 10**6), shares=st.lists(st.floats(0.001, 1000), min_size=1, max_size=20))
def test_apportioned_numbers_sum_to_the_total(total: int, shares: list[float]) -> None:
    counts = apportion(total, shares)
    assert sum(counts) == total
    assert all(abs(count - total * share / sum(shares)) < 1 + 1e-6 for count, share in zip(counts, shares, strict=True))


def spread(rows: Sequence[bool], of: int) -> tuple[int, int]:
    """Fewest and most hits in any `of` rows that follow each other."""
    hits = np.convolve(np.array(rows, int), np.ones(of, int), "valid")
    return int(hits.min()), int(hits.max())


# ------------------------------------------------------------------ mixes


def test_a_mix_keeps_its_shares_in_every_batch(data: dp.Dataset, other: dp.Dataset, kind: dict[str, Any]) -> None:
    mixed = dp.mix([data, other], weights=[0.7, 0.3])
    loader = load(mixed, kind, batch_size=10)
    total = data.num_records("train", "graphs") + other.num_records("train", "graphs")
    assert loader.num_records == total
    epochs = [valid_ids(loader) for _ in range(3)]
    for ids in epochs:
        assert len(ids) == total
        assert (
            spread([one.startswith("other-") for one in ids], of=10) == (3, 3)
            or spread([one.startswith("other-") for one in ids], of=10)[0] >= 2
        )
        assert abs(sum(one.startswith("other-") for one in ids) - 0.3 * total) < 1
        assert "draws of" in loader.check_digest(loader.digest)
    # each set is drawn without replacement within its own pass, over the epochs' borders
    for prefix, count in (("other-", other.num_records("train", "graphs")), ("record-", data.num_records("train", "graphs"))):
        drawn = [one for ids in epochs for one in ids if one.startswith(prefix)]
        for at in range(0, len(drawn), count):
            assert len(set(drawn[at : at + count])) == len(drawn[at : at + count])
    # the other splits hold every record once
    val = load(mixed, kind, split="val")
    ids = valid_ids(val)
    assert len(set(ids)) == len(ids) == sum(one.num_records("val", "graphs") for one in (data, other))
    assert val.check_digest(val.digest).endswith("each once")


def test_a_mix_delivers_the_records_themselves(data: dp.Dataset, other: dp.Dataset, kind: dict[str, Any]) -> None:
    rows: dict[str, Any] = {}
    firsts = {}
    at = 0
    for one in (data, other):
        loader = load(one, kind, shuffle=False, batch_size=1)
        for batch in loader:
            rows[batch.ids[0]] = content(batch)
            firsts[batch.ids[0]] = at + int(batch.positions[0])
        at += loader.num_records
    for batch in load(dp.mix([data, other], weights=[1, 1]), kind, batch_size=1):
        assert int(batch.positions[0]) == firsts[batch.ids[0]]
        found = content(batch)
        assert_same([found | {"positions": rows[batch.ids[0]]["positions"]}], [rows[batch.ids[0]]])


def test_states_of_other_weights_folds_and_balance_are_refused(
    data: dp.Dataset, other: dp.Dataset, skewed: dp.Dataset, quick_kind: dict[str, Any]
) -> None:
    mixes = [dp.mix([data, other], weights=weights) for weights in ([0.6, 0.4], [0.5, 0.5])]
    loaders = [[load(one, quick_kind) for one in both] for both in (mixes, data.folds(4, seed=3)[1:3])]
    draws: list[dict[str, Any]] = [{"class_balanced": True}, {}, {"group_weights": {"g3": 2.0}}]
    balanced, plain, weighted = (load(skewed, quick_kind, **options) for options in draws)
    loaders += [[balanced, plain], [balanced, weighted]]
    for ours, theirs in loaders:
        with pytest.raises(dp.StateError, match="data set digest"):
            theirs.load_state_dict(ours.state_dict())


def test_mixes_that_make_no_sense_are_refused(data: dp.Dataset, other: dp.Dataset, tmp_path: Path) -> None:
    mixed = dp.mix([data, other], weights=[1, 2])
    with pytest.raises(dp.UsageError, match="cannot be mixed again"):
        dp.mix([mixed, data], weights=[1, 1])
    with pytest.raises(dp.UsageError, match="a weight is 0"):
        dp.mix([data], weights=[0])
    with pytest.raises(dp.UsageError, match="a weight is nan"):
        dp.mix([data], weights=[float("nan")])
    with pytest.raises(dp.UsageError, match="mix takes a list"):
        dp.mix([])
    with pytest.raises(dp.UsageError, match="folds are made of"):
        mixed.folds(3)
    with pytest.raises(dp.UsageError, match="class_balanced and group_weights go with one data set"):
        dp.SequenceLoader(mixed, class_balanced=True)
    with pytest.raises(dp.UsageError, match="unknown split 'dev'"):
        dp.SequenceLoader(mixed, split="dev")
    with dp.ShardWriter(tmp_path / "wide", dp.Schema(sequence=dp.Field(dtype="float32", shape=(2,)))) as writer:
        writer.write({"id": "a", "label": 0, "sequence": np.zeros((1, 2))})
    with pytest.raises(dp.DataError, match="has another schema"):
        dp.mix([data, dp.open_dataset(tmp_path / "wide")], weights=[1, 1])


# ------------------------------------------------------------------ folds


def test_folds_part_the_groups(data: dp.Dataset, records: dict[str, dp.Record]) -> None:
    pool = {one for split in ("train", "val") for one in valid_ids(dp.GraphLoader(data, split=split))}
    assert len(pool) > 200
    folds = data.folds(3, seed=1)
    seen: Counter[str] = Counter()
    for fold in folds:
        sides = {}
        for split in ("train", "val"):
            loaders = [load(fold, one, split=split) for one in KINDS.values()]
            ids = [set(valid_ids(loader)) for loader in loaders]
            assert all(each == ids[0] for each in ids)  # both kinds and engines agree
            assert all(loader.check_digest(loader.digest).endswith("each once") for loader in loaders)
            sides[split] = ids[0]
            assert fold.num_records(split, "graphs") == len(ids[0])
            assert fold.label_counts(split) == dict(sorted(Counter(records[one].label for one in ids[0]).items()))
        assert sides["train"] | sides["val"] == pool
        assert not {records[one].group for one in sides["train"]} & {records[one].group for one in sides["val"]}
        seen.update(sides["val"])
        assert fold.num_classes == 2
        assert valid_ids(dp.SequenceLoader(fold, split="test", shuffle=False)) == valid_ids(
            dp.SequenceLoader(data, split="test", shuffle=False)
        )
    assert set(seen) == pool
    assert set(seen.values()) == {1}
    groups = [len({records[one].group for one in valid_ids(dp.GraphLoader(fold, split="val"))}) for fold in folds]
    assert max(groups) - min(groups) <= 1
    assert {fold.digest for fold in data.folds(3)}.isdisjoint({fold.digest for fold in folds})


def test_folds_of_nothing_are_refused(data: dp.Dataset, tmp_path: Path) -> None:
    for k in (0, 1, True, 2.5):
        with pytest.raises(dp.UsageError, match="k is"):
            data.folds(k)  # type: ignore[arg-type]
    with pytest.raises(dp.UsageError, match="seed is -1"):
        data.folds(2, seed=-1)
    few = write(tmp_path / "few", make_records(6), shares="100/0/0")
    with pytest.raises(dp.DataError, match="have 3 groups; expected at least 4"):
        few.folds(4)


# ------------------------------------------------------------------ balance and weights


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> dp.Dataset:
    """One positive in ten."""
    records = [
        dp.Record(id=f"r{at}", group=f"g{at // 2}", label=int(at % 10 == 0), sequence=one.sequence, graphs=one.graphs)
        for at, one in enumerate(make_records(200))
    ]
    return write(tmp_path_factory.mktemp("skewed") / "set", records, shares="100/0/0")


def test_balanced_batches_hold_labels_in_equal_numbers(skewed: dp.Dataset, quick_kind: dict[str, Any]) -> None:
    loader = load(skewed, quick_kind, class_balanced=True, batch_size=10)
    assert len(loader) == 20
    counts: Counter[str] = Counter()
    for _ in range(9):  # nine epochs draw 100 of each label: five passes over 180, forty-five over 20
        batches = list(loader)
        assert all(batch.labels.tolist().count(1) == 5 for batch in batches)
        counts.update(valid_ids(batches))
    assert {counts[f"r{at}"] for at in range(0, 200, 10)} == {45}
    assert {counts[f"r{at}"] for at in range(200) if at % 10} == {5}
    assert loader.check_digest(loader.digest) == "200 draws of 120 records, one at most 5 times"


def test_balance_where_labels_lie_one_behind_the_other(tmp_path: Path, quick_kind: dict[str, Any]) -> None:
    """In one shard, label 0 first: the parts meet within it, and neither may lend the other a record."""
    records = [
        dp.Record(id=f"r{at}", label=int(at >= 30), sequence=one.sequence, graphs=one.graphs)
        for at, one in enumerate(make_records(40))
    ]
    data = write(tmp_path / "set", records, shard_bytes=1 << 20, shares="100/0/0")
    loader = load(data, quick_kind, class_balanced=True, batch_size=4)
    counts: Counter[str] = Counter()
    for _ in range(3):
        for batch in loader:
            assert sorted(batch.labels.tolist()) == [0, 0, 1, 1]
            counts.update(batch.ids)
    assert {counts[f"r{at}"] for at in range(30)} == {2}
    assert {counts[f"r{at}"] for at in range(30, 40)} == {6}


def test_balance_tells_the_split_s_own_positions(skewed: dp.Dataset, kind: dict[str, Any]) -> None:
    own = {batch.ids[0]: int(batch.positions[0]) for batch in load(skewed, kind, shuffle=False, batch_size=1)}
    for batch in load(skewed, kind, class_balanced=True):
        assert [own[one] for one in batch.ids] == batch.positions.tolist()


def test_weights_of_groups(skewed: dp.Dataset, quick_kind: dict[str, Any]) -> None:
    weights = {"g0": 8, "g1": 0, "g2": 4.0}
    loader = load(skewed, quick_kind, group_weights=weights)
    counts: Counter[str] = Counter()
    for _ in range(20):
        counts.update(valid_ids(loader))
    assert not counts["r2"] + counts["r3"]
    ones = np.mean([counts[f"r{at}"] for at in range(6, 200)])
    assert 7.5 < (counts["r0"] + counts["r1"]) / 2 / ones < 8.5
    assert 3.7 < (counts["r4"] + counts["r5"]) / 2 / ones < 4.3
    assert sum(counts.values()) == 20 * 200


def test_equal_weights_are_every_record_once(skewed: dp.Dataset, kind: dict[str, Any]) -> None:
    loader = load(skewed, kind, group_weights={"g0": 1.0})
    for _ in range(2):
        ids = valid_ids(loader)
        assert len(set(ids)) == len(ids) == 200
        assert loader.check_digest(loader.digest) == "200 draws of 200 records, one at most 1 times"


def test_senseless_draws_are_refused(skewed: dp.Dataset) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"class_balanced": "group"}, dp.UsageError, "class_balanced is 'group'"),
        ({"class_balanced": True, "group_weights": {"g1": 1}}, dp.UsageError, "exclude each other"),
        ({"group_weights": {"g1": -1}}, dp.UsageError, "weight of group 'g1' is -1"),
        ({"group_weights": {"nobody": 2}}, dp.DataError, "none of the groups"),
        ({"group_weights": {f"g{at}": at + 1.0 for at in range(100)}}, dp.UsageError, "at most 64"),
        ({"group_weights": {f"g{at}": 0 for at in range(100)}}, dp.DataError, "no record of this split has a weight above 0"),
    ]
    for options, error, words in cases:
        with pytest.raises(error, match=words):
            dp.SequenceLoader(skewed, **options)
