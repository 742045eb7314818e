"""Sequences stored layer by layer: the same batches, and a layer's bytes alone are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dali_pipeline as dp
from dali_pipeline.format import shard as shard_module
from dali_pipeline.format.layout import ByLayer
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from dali_pipeline.reading import gather as gather_module
from dali_pipeline.storage import reads
from dali_pipeline.tools.verify import verify
from tests.helpers.records import make_records, write


@given(steps=st.integers(1, 6), together=st.integers(1, 9), records=st.integers(1, 40))
def test_every_row_has_one_place(steps: int, together: int, records: int) -> None:
    layout, total = ByLayer(steps=steps, records=together), steps * records
    rows = np.arange(total)
    stored = layout.stored(rows, total)
    assert sorted(stored.tolist()) == rows.tolist()
    assert np.array_equal(layout.numbered(stored, total), rows)
    for step in range(steps):
        for begin, end in ((0, records), (records // 3, records), (records // 2, records // 2 + 1)):
            spans = [row for a, b in layout.spans(begin, end, step, total) for row in range(a, b)]
            assert spans == layout.stored(np.arange(begin, end) * steps + step, total).tolist()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dp.Dataset, dp.Dataset]:
    """The same records, record by record and layer by layer; a shard ends amid records stored together."""
    layout = ByLayer(steps=5, records=7)
    schemas = [dp.Field(dtype="float16", shape=(8,)), dp.Field(dtype="float16", shape=(8,), by_layer=layout)]
    found = []
    for name, field in zip("ab", schemas, strict=True):
        with dp.ShardWriter(tmp_path / name, dp.Schema(sequence=field, step_axis="layer"), shard_bytes=2000) as writer:
            for record in make_records(100, ragged=False):
                writer.write({"id": record.id, "group": record.group, "label": record.label, "sequence": record.sequence})
        found.append(dp.open_dataset(tmp_path / name))
    return found[0], found[1]


def by_id(data: dp.Dataset, **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for split in data.splits:
        for batch in dp.SequenceLoader(data, split, batch_size=8, window_bytes=6000, **options):
            found |= {one: (row, int(label)) for one, row, label in zip(batch.ids, batch.sequences, batch.labels, strict=True)}
    return found


@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("layers", [None, slice(1, 3), [4, 0]])
def test_the_same_records_are_delivered(pair: tuple[dp.Dataset, dp.Dataset], layers: Any, engine: Any) -> None:
    ours, theirs = (by_id(data, layers=layers, engine=engine) for data in pair)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 100
    for name, (row, label) in ours.items():
        assert row.equal(theirs[name][0])
        assert label == theirs[name][1]
    for name in ("mean", "std"):
        assert np.allclose(*(getattr(data.manifest.statistics, name) for data in pair))
    assert verify(pair[1].folder).damages == []


@pytest.mark.parametrize("dtype", [None, "int8", "bfloat16"])
def test_converted_to_and_fro(pair: tuple[dp.Dataset, dp.Dataset], tmp_path: Path, dtype: str | None) -> None:
    options: dict[str, Any] = {"dtype": dtype, "shard_bytes": 3000}
    plain = convert(pair[0].folder, tmp_path / "plain", ConvertConfig(**options))
    layered = convert(pair[0].folder, tmp_path / "layered", ConvertConfig(by_layer=True, **options))
    again = convert(pair[1].folder, tmp_path / "again", ConvertConfig(**options))
    field = layered.schema.sequence
    assert field is not None
    assert field.layout == ByLayer(steps=5, records=(1 << 20) // field.row_bytes)
    for other in (layered, again):
        ours, theirs = by_id(other), by_id(plain)
        assert ours.keys() == theirs.keys()
        assert all(row.equal(theirs[name][0]) for name, (row, _) in ours.items())
        assert other.manifest.statistics is not None
        assert plain.manifest.statistics is not None
        assert np.allclose(other.manifest.statistics.mean, plain.manifest.statistics.mean)
        assert np.allclose(other.manifest.statistics.std, plain.manifest.statistics.std)
        assert verify(other.folder).damages == []


def test_one_length_is_asked_for(tmp_path: Path) -> None:
    data = write(tmp_path / "set", make_records(40))
    with pytest.raises(dp.DataError, match=r"steps; expected \d, as rows are stored by layer"):
        convert(data.folder, tmp_path / "one", ConvertConfig(by_layer=True))
    with pytest.raises(dp.UsageError, match="for `sequence` alone"):
        dp.Schema(x=dp.Field(dtype="float16", by_layer=ByLayer(steps=2, records=2)))
    with pytest.raises(dp.UsageError, match="expected at least 1 of each"):
        dp.Field(dtype="float16", by_layer=ByLayer(steps=0, records=2))


def test_nan_is_told_by_layer(tmp_path: Path) -> None:
    field = dp.Field(dtype="float16", shape=(4,), by_layer=ByLayer(steps=3, records=5))
    with dp.ShardWriter(
        tmp_path / "set", dp.Schema(sequence=field, step_axis="layer"), split=dp.SplitRule.parse("100/0/0")
    ) as writer:
        for number in range(12):
            rows = np.full((3, 4), number, np.float16)
            rows[1, 2] = np.nan if number in (4, 11) else 0
            writer.write({"id": number, "label": 0, "sequence": rows})
    (damage,) = verify(tmp_path / "set").damages
    assert "2 NaN and 0 infinite values; by layer 1: 2" in damage


def test_a_layers_bytes_alone_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 4 KiB, ten layers: two of them are a fifth of what is read; stored so, of the first epoch too, blocks and all."""
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(10, 2048)).astype(np.float16) for _ in range(600)]
    read = 0
    read_many, pread = reads.read_many, shard_module.Shard._pread

    def counted(fds: Any, offsets: Any, addresses: Any, sizes: Any) -> Any:
        nonlocal read
        read += int(sizes.sum())
        return read_many(fds, offsets, addresses, sizes)

    def counted_one(self: Any, name: str, extent: Any, offset: int, out: memoryview) -> None:
        nonlocal read
        read += len(out) if name == "sequence" else 0
        pread(self, name, extent, offset, out)

    monkeypatch.setattr(gather_module, "read_many", counted)
    monkeypatch.setattr(shard_module.Shard, "_pread", counted_one)
    for name, layout in (("plain", {}), ("layered", {"by_layer": ByLayer.of(10, 4096)})):
        schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(2048,), **layout), step_axis="layer")  # type: ignore[arg-type]
        with dp.ShardWriter(tmp_path / name, schema, split=dp.SplitRule.parse("100/0/0")) as writer:
            for number, row in enumerate(rows):
                writer.write({"id": number, "label": 0, "sequence": row})
        data = dp.open_dataset(tmp_path / name)
        loader = dp.SequenceLoader(data, batch_size=8, layers=slice(4, 6), engine="torch", num_workers=0, window="gather")
        counts = []
        for _ in range(2):
            read = 0
            assert sum(len(batch) for batch in loader) == 600
            counts.append(read)
        selected = 600 * 2 * 4096
        assert counts[1] == selected
        assert counts[0] > 10 * 600 * 4096 if name == "plain" else counts[0] <= 3 * selected
