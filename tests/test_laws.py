"""The laws of docs/laws.md: each on every kind of loader; and on any data and world against one plain reading."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import dali_pipeline as dp
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from dali_pipeline.ingest.layouts.recipe import Recipe
from tests.helpers.records import FIELDS, SCHEMA, make_records, with_fields, write
from tests.laws import LAWS, LOOPS, REFUSALS, Case

Worlds = tuple[tuple[dict[str, Any], tuple[int, ...]], ...]


@dataclass(frozen=True, kw_only=True)
class Sets:
    """What is read: the usual set, its sequences in place, another, one of few positives, a short and a long one."""

    usual: dp.Dataset
    in_place: dp.Dataset
    other: dp.Dataset
    skewed: dp.Dataset
    short_and_long: tuple[dp.Dataset, dp.Dataset]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A kind of loader.

    of: The data that it reads, made from a set and the other one. case: what a Case must be told of it. only: numbers of the
    laws that it is held to, where another kind is held to all; `loops` are those that no law speaks of.
    """

    loader: Any = dp.SequenceLoader
    options: dict[str, Any]
    of: Callable[[dp.Dataset, dp.Dataset], dp.Dataset] = lambda data, other: data
    base: Callable[[Sets], dp.Dataset] = lambda sets: sets.usual
    case: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = (*(name[:2] for name in LAWS), "loops")
    slow: bool = False


def sequences(**options: Any) -> Asked:
    changes = [{"num_workers": 0}, {"num_workers": 3}, {"engine": "torch"}, {"engine": "dali"}]
    window_bytes = options.get("window_bytes", 1)
    worlds: Worlds = (({}, (1, 2, 3, 16)), ({"batch_size": 4, "num_partitions": 4, "window_bytes": window_bytes}, (1, 2, 4)))
    case = {"changes": changes, "worlds": worlds, "stays": ({}, {"dtype": torch.float16})}
    return Asked(options={"batch_size": 16, "window_bytes": 6000, **options}, case=case)


def resident(**options: Any) -> Asked:
    """A window of several groups, each of several batches, so that batches come from the resident window.

    Its memory is counted in tests/loaders/test_resident.py, which has DALI too: there it is the default only for whole splits.
    """
    asked = sequences(batch_size=4, window_bytes=60_000, **options)
    changes = [*asked.case["changes"], {"window": "gather"}]
    return replace(asked, case={**asked.case, "changes": changes}, only=tuple(law for law in Asked.only if law != "08"))


def graphs(*, slow: bool = False, **options: Any) -> Asked:
    changes = [{"num_workers": 0}, {"num_workers": 1}, {"num_workers": 2}, {"num_workers": "auto"}]
    worlds: Worlds = (({}, (1, 2, 3)), ({"batch_size": 4, "num_partitions": 4, "window_bytes": 1}, (2,)))
    case = {"changes": changes, "worlds": worlds, "steps": lambda count: (1, count - 1, count), "processes": slow}
    only = tuple(name for name in Asked.only if name != "08" or not slow)  # memory of other processes
    return Asked(
        loader=dp.GraphLoader, options={"batch_size": 16, "window_bytes": 6000, **options}, case=case, slow=slow, only=only
    )


def budget(*, slow: bool = False, **options: Any) -> Asked:
    """A record of the sets has up to 4 graphs of up to a dozen nodes."""
    case = {
        "changes": [{"num_workers": 0}, {"num_workers": 1}, {"num_workers": "auto"}, {"num_workers": 0, "window": "gather"}],
        "worlds": (({}, (1, 3)), ({"num_partitions": 2}, (1, 2, 4)), ({"num_partitions": 4}, (2,))),
        "steps": lambda count: (1, count - 2),
        "refusals": [
            ({"max_nodes": 80}, "max_nodes 80; this loader has 60"),
            ({"max_edges": None}, "max_edges None; this loader has 70"),
            ({"layers": [2, 0]}, "filled by the graphs 2,0; this loader fills them by the graphs that a record has"),
            ({"seed": 3}, "seed 3"),
            ({"num_partitions": 2}, "partitions 2"),
        ],
        "budget": True,
        "processes": slow,
    }
    usual = {"max_nodes": 60, "max_edges": 70, "window_bytes": 6000}
    only = tuple(name for name in Asked.only if name != "08" or not slow)
    return Asked(loader=dp.GraphLoader, options={**usual, **options}, case=case, slow=slow, only=only)


def steps(**options: Any) -> Asked:
    """Sequences of the sets have 2 to 8 steps, so a batch has a handful of records."""
    case = {
        "changes": [{"num_workers": 0}, {"num_workers": 3}, {"engine": "torch"}, {"engine": "dali"}, {"window": "gather"}],
        "worlds": (({}, (1, 3)), ({"num_partitions": 2}, (1, 2, 4)), ({"num_partitions": 4}, (2,))),
        "steps": lambda count: (1, count - 2),
        "refusals": [
            ({"max_steps": 50}, "max_steps 50; this loader has 40"),
            ({"count_padding": False}, "count_padding False; this loader has True"),
            ({"steps": slice(0, -1)}, "filled by the steps 0:-1:1; this loader fills them by the steps that a record has"),
            ({"seed": 3}, "seed 3"),
            ({"num_partitions": 2}, "partitions 2"),
        ],
        "budget": True,
    }
    return Asked(options={"max_steps": 40, "window_bytes": 6000, **options}, case=case)


def single_steps(**options: Any) -> Asked:
    """Single steps. The sets have some 1,200 of them, so batches are larger than of records."""
    asked = sequences(unit="step", batch_size=16, window_bytes=40_000, **options)
    worlds: Worlds = (({}, (1, 2, 3)), ({"batch_size": 4, "num_partitions": 4, "window_bytes": 8000}, (1, 2, 4)))
    refusals = (
        *REFUSALS,
        ({"unit": "record", "mask": None}, "unit 'record'; this loader has 'step'"),
        ({"mask": None if options.get("mask") else "mask"}, "the state has mask "),
        ({"steps": [0]}, "filled by the steps 0; this loader"),
    )
    case = {**asked.case, "worlds": worlds, "rows": True, "refusals": refusals}
    case["changes"] = [*asked.case["changes"], {"window": "gather"}, {"window": "resident"}]
    return replace(asked, case=case, only=tuple(law for law in Asked.only if law != "08"))


def bucketed() -> Asked:
    asked = sequences(engine="torch", bucket_by_length=True, window_bytes=10**6, window="gather")
    refusals = (*REFUSALS, ({"steps": [0, 1]}, "filled by the steps 0,1; this loader"))
    return replace(asked, case={**asked.case, "refusals": refusals})


def mixed(data: dp.Dataset, other: dp.Dataset) -> dp.Dataset:
    alike = other.manifest.schema == data.manifest.schema
    return dp.mix([data, other], weights=[0.6, 0.4]) if alike else dp.mix([data], weights=[1])


def made_of_others(name: str, *, whole: str) -> dict[str, Asked]:
    """Mixes, balance and folds, read by a loader of this name; those named in `whole` are held to all laws."""
    loader: dict[str, Any] = {"loader": dp.GraphLoader if name == "graphs" else dp.SequenceLoader}
    options: dict[str, Any] = {"batch_size": 8} | ({} if name == "graphs" else {"engine": name})
    folds: Worlds = (({}, (1, 2, 3)), ({"batch_size": 4, "num_partitions": 2}, (2,)))
    weights = [{"class_balanced": False, **weights} for weights in ({}, {"group_weights": {"g3": 2.0}})]
    refusals = [(change, words) for change, words in REFUSALS if "split" not in change]  # there is one split
    refusals += [(change, "data set digest") for change in weights]
    return {
        f"mix, {name}": Asked(
            **loader,
            options=options,
            of=mixed,
            case={"steps": lambda count: (1, 5), "parts": (lambda one: one[:5], {"other": 44, "recor": 218})},
            only=Asked.only if "mix" in whole else ("03", "05", "13", "loops"),
        ),
        f"balance, {name}": Asked(
            **loader,
            options={"class_balanced": True, "window_bytes": 3000, **options},
            base=lambda sets: sets.skewed,
            case={
                "steps": lambda count: (1, 7),
                "refusals": refusals,
                "pieces": True,
                "parts": (lambda one: str(int(one[1:]) % 10 == 0), {"True": 20, "False": 180}),
            },
            only=Asked.only if "balance" in whole else ("03", "05", "13"),
        ),
        f"fold, {name}": Asked(
            **loader,
            options={"window_bytes": 4000, **options},
            of=lambda data, other: data.folds(4, seed=3)[1],
            case={"steps": lambda count: (2,), "worlds": folds, "pieces": True},
            only=Asked.only if "fold" in whole else ("01", "02", "05", "06", "12"),
        ),
    }


FEW = ("04", "06", "12", "loops")
IN_PLACE = ("01", "02", "03", "04", "05", "06", "07", "11", "12", "13", "loops")  # of bytes and shards test_in_place.py speaks
KINDS: dict[str, Asked] = {
    "dali": sequences(engine="dali", window="gather"),
    "dali, no thread": replace(sequences(engine="dali", num_workers=0, window="gather"), only=FEW, slow=True),
    "torch": sequences(engine="torch", window="gather"),
    "torch, threads": replace(sequences(engine="torch", num_workers=3, window="gather"), only=FEW, slow=True),
    "window, torch": resident(engine="torch"),
    "window, no thread": replace(resident(engine="torch", num_workers=0), only=FEW, slow=True),
    "window, in place": replace(resident(engine="torch"), base=lambda sets: sets.in_place, only=FEW, slow=True),
    "window, packed": replace(resident(engine="torch", packed=True), only=FEW, slow=True),
    "in place": replace(sequences(engine="torch"), base=lambda sets: sets.in_place, only=IN_PLACE),
    "in place, dali": replace(sequences(engine="dali"), base=lambda sets: sets.in_place, only=FEW, slow=True),
    "bucket_by_length": bucketed(),
    "graphs": graphs(),
    "graphs, no thread": replace(graphs(num_workers=0), slow=True),
    "graphs, processes": graphs(num_workers=2, slow=True),
    "budget": budget(num_workers=0),
    "budget, processes": budget(num_workers=2, slow=True),
    "max_steps": steps(engine="torch", num_workers=0),
    "max_steps, dali": replace(steps(engine="dali"), only=FEW, slow=True),
    "max_steps, gather": replace(steps(engine="torch", window="gather"), only=FEW, slow=True),
    "max_steps, packed": replace(steps(engine="torch", packed=True, window_bytes=60_000), only=("03", "05", *FEW), slow=True),
    "packed": replace(sequences(engine="torch", packed=True), only=FEW, slow=True),
    "rows": single_steps(engine="torch"),
    "rows, dali": replace(single_steps(engine="dali"), only=FEW),
    "rows, no thread, masked": replace(
        single_steps(engine="torch", num_workers=0, mask="mask"), only=("01", "02", "05", "12", "loops")
    ),
    "rows, in place": replace(single_steps(engine="dali"), base=lambda sets: sets.in_place, only=("01", "03", "12"), slow=True),
    "rows, gather": replace(single_steps(engine="torch", window="gather"), only=("10", *FEW), slow=True),
    **{name: replace(asked, slow=True) for name, asked in made_of_others("dali", whole="").items()},
    **made_of_others("torch", whole="balance"),
    **made_of_others("graphs", whole="mix"),
}


def write_in_place(files: Path, root: Path, records: list[dp.Record]) -> dp.Dataset:
    """The sequences of records and their step fields in a file each, and a data set that refers to these."""
    files.mkdir()
    for one in records:
        arrays = {"states": one.sequence, "token": one.fields["step.token"], "score": one.fields["record.score"]}
        save_file({**arrays, "label": np.array(one.label)}, files / f"{one.id}.safetensors")
    fields = (("step.token", "token"), ("record.score", "score"))
    recipe = Recipe(sequence="states", label="label", fields=fields, layout="record-per-file")
    return convert(files, root, ConvertConfig(recipe=recipe, in_place=True, shard_bytes=2048, num_workers=1))


@pytest.fixture(scope="module")
def sets(records: dict[str, dp.Record], tmp_path_factory: pytest.TempPathFactory) -> Sets:
    root = tmp_path_factory.mktemp("sets")
    others = [
        dp.Record(id=f"other-{one.id}", group=f"other-{one.group}", label=one.label, sequence=one.sequence, graphs=one.graphs)
        for one in make_records(60, seed=9)
    ]
    skewed = [
        dp.Record(id=f"r{at}", group=f"g{at // 2}", label=int(at % 10 == 0), sequence=one.sequence, graphs=one.graphs)
        for at, one in enumerate(make_records(200))
    ]
    schema = replace(SCHEMA, fields=FIELDS)
    usual = [with_fields(record, number) for number, record in enumerate(records.values())]
    return Sets(
        usual=write(root / "usual", usual, schema=schema),
        in_place=write_in_place(root / "files", root / "in_place", usual),
        other=write(root / "other", [with_fields(one, 10**6 + at) for at, one in enumerate(others)], schema=schema),
        skewed=write(root / "skewed", skewed, shares="100/0/0"),
        short_and_long=(
            write(root / "short", make_records(200), shares="100/0/0"),
            write(root / "long", make_records(800), shares="100/0/0"),
        ),
    )


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    """Kept for all laws, as several look at the same epochs."""
    return {}


@pytest.fixture
def case(request: pytest.FixtureRequest, cases: dict[str, Case], sets: Sets, tmp_path_factory: pytest.TempPathFactory) -> Case:
    asked = KINDS[request.param]
    if request.param in cases:
        return cases[request.param]

    def make(**options: Any) -> Any:
        chosen = {**asked.options, **options}
        return asked.loader(asked.of(chosen.pop("data", asked.base(sets)), sets.other), **chosen)

    kind: Any = "graphs" if asked.loader is dp.GraphLoader else "sequences"
    folder = tmp_path_factory.mktemp("case")
    short, long = sets.short_and_long
    cases[request.param] = Case(make=make, kind=kind, folder=folder, other=short, short_and_long=(short, long), **asked.case)
    return cases[request.param]


def pairs(functions: dict[str, Any]) -> list[Any]:
    """Every kind with each of these that it is held to; the name of a law begins with its number."""
    return [
        pytest.param(kind, function, id=f"{name}-{kind}", marks=[pytest.mark.slow] if asked.slow else [])
        for kind, asked in KINDS.items()
        for name, function in functions.items()
        if name[:2] in asked.only or ("loops" in asked.only and function in LOOPS)
    ]


@pytest.mark.parametrize(("case", "law"), pairs(LAWS), indirect=["case"])
def test_law(case: Case, law: Callable[[Case], None]) -> None:
    law(case)


@pytest.mark.parametrize(("case", "loop"), pairs({one.__name__: one for one in LOOPS}), indirect=["case"])
def test_loop(case: Case, loop: Callable[[Case], None]) -> None:
    loop(case)


def make(data: dp.Dataset, kind: str, num_workers: int, **options: Any) -> Any:
    if kind == "graphs":
        return dp.GraphLoader(data, num_workers=min(num_workers, 1) if num_workers < 3 else "auto", **options)
    return dp.SequenceLoader(data, engine="dali" if kind == "dali" else "torch", num_workers=num_workers, **options)


def rows(batches: list[Any]) -> list[tuple[list[str], list[bool]]]:
    return [(batch.ids, batch.valid.tolist()) for batch in batches]


@pytest.mark.parametrize("kind", ["dali", "torch", "graphs"])
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 60),
    shard_bytes=st.sampled_from([1, 300, 1500, 1 << 20]),
    world_size=st.integers(1, 16),
    batch_size=st.integers(1, 5),
    window_bytes=st.sampled_from([1, 500, 3000, 1 << 28]),
    num_workers=st.sampled_from([0, 1, 3]),
    num_partitions=st.integers(1, 2),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 10**6),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    data_seed=st.integers(0, 3),
    stop=st.integers(0, 30),
)
def test_any_world_delivers_one_order(
    kind: str, count: int, shard_bytes: int, world_size: int, batch_size: int, window_bytes: int, num_workers: int,
    num_partitions: int, seed: int, epoch: int, drop_last: bool, shuffle: bool, data_seed: int, stop: int,
) -> None:  # fmt: skip
    """Laws 1, 2, 3, 5, 6 and 12: every rank's rows are its share of one global order, which is a function of the data alone."""
    with tempfile.TemporaryDirectory() as folder:
        data = write(Path(folder) / "set", make_records(count, seed=data_seed), shard_bytes=shard_bytes, shares="100/0/0")
        num_partitions = min(num_partitions, len(data.table("train", "graphs")), len(data.table("train", "sequences")))
        batch_size *= num_partitions
        order: dict[str, Any] = {
            "window_bytes": window_bytes,
            "num_partitions": num_partitions,
            "seed": seed,
            "drop_last": drop_last,
            "shuffle": shuffle,
        }
        size = batch_size * world_size
        if drop_last and count < 2 * size:
            drop_last = order["drop_last"] = False
        reference = make(data, "graphs" if kind == "graphs" else "torch", 0, batch_size=size, **order)
        reference.set_epoch(epoch)
        alone = rows(list(reference))
        ranks = [
            make(data, kind, num_workers, batch_size=batch_size, rank=rank, world_size=world_size, **order)
            for rank in range(min(world_size, 4))
        ]
        seen: Counter[str] = Counter()
        only: list[str] = []  # real rows of an epoch's only batch, where it needs fewer rows than asked for
        for rank, loader in enumerate(ranks):
            loader.set_epoch(epoch)
            own = rows(list(loader))
            assert len(own) == len(loader) == len(alone) > 0
            mine = slice(rank * batch_size, (rank + 1) * batch_size)
            if loader.batch_size == batch_size and reference.batch_size == size:
                assert own == [(ids[mine], valid[mine]) for ids, valid in alone]
            else:
                only += [one for ids, valid in own for one, real in zip(ids, valid, strict=True) if real]
            stop = min(stop, len(own))
            fresh = make(data, kind, num_workers, batch_size=batch_size, rank=rank, world_size=world_size, **order)
            fresh.load_state_dict(json.loads(json.dumps({**loader.state_dict(), "epoch": epoch, "step": stop})))
            assert rows(list(fresh)) == own[stop:]
        for ids, valid in alone:
            seen.update(one for one, real in zip(ids, valid, strict=True) if real)
        assert set(seen.values()) == {1}
        assert only == list(seen)[: len(only)]
        assert len(only) == len(seen) or not only or len(ranks) < world_size
        if not drop_last:
            assert sorted(seen) == sorted(record.id for record in make_records(count))
        assert reference.check_digest(reference.digest)


@pytest.mark.parametrize("kind", ["dali", "torch", "graphs"])
def test_fewer_shards_than_ranks(tmp_path: Path, kind: str) -> None:
    """Two shards, five records, sixteen ranks: eleven of them take padding alone, marked, and equal steps."""
    data = write(tmp_path / "set", make_records(5), shard_bytes=700, shares="100/0/0")
    assert len(data.table("train", "sequences")) < 16
    ranks = [make(data, kind, 0, batch_size=1, rank=rank, world_size=16) for rank in range(16)]
    batches = [list(loader) for loader in ranks]
    assert {len(own) for own in batches} == {1}
    assert sorted(own[0].ids[0] for own in batches if own[0].valid[0]) == [f"record-{at}" for at in range(5)]
    assert sum(bool(own[0].valid[0]) for own in batches) == 5
    assert ranks[0].check_digest(sum((loader.digest for loader in ranks), dp.EpochDigest())) == "5 of 5 records, each once"
