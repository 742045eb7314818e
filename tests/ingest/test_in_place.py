"""Data sets in place: the same records, to the bit, as a copied set of the same files, while the values stay where they lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dali_pipeline as dp
from dali_pipeline.cli.app import app, run
from dali_pipeline.errors import DataError, FormatError, PipelineError, UsageError
from dali_pipeline.format.references import ForeignNames
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from dali_pipeline.ingest.layouts.recipe import Recipe
from dali_pipeline.tools.verify import verify

COUNT = 60


def vllm(root: Path) -> Recipe:
    """One prompt per file, [T, L, H] bfloat16 with token ids: the layers of a token lie together."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        steps = int(rng.integers(3, 12))
        states = torch.from_numpy(rng.normal(size=(steps, 3, 40))).bfloat16()
        tokens = torch.from_numpy(rng.integers(0, 999, steps))
        save_file({"hidden_states": states, "token_ids": tokens}, root / f"hs_{number}.safetensors")
    return Recipe()


def stacked_npy(root: Path) -> Recipe:
    """States [N, L, H] in two files, labels in others."""
    rng = np.random.default_rng(1)
    for number in range(2):
        np.save(root / f"states_{number}.npy", rng.normal(size=(COUNT // 2, 9, 24)).astype(np.float16))
        np.save(root / f"labels_{number}.npy", rng.integers(0, 2, COUNT // 2))
    return Recipe(sequence="states_{row}", label="labels_{row}", axes=("layer", "feature"))


def layers_first(root: Path) -> Recipe:
    """One record per file, [L, T, H]: one layer of all its tokens lies together."""
    rng = np.random.default_rng(2)
    for number in range(COUNT):
        steps = int(rng.integers(3, 12))
        np.save(root / f"r{number}.npy", rng.normal(size=(4, steps, 16)).astype(np.float32))
    lines = [f"r{number},{number % 2}" for number in range(COUNT)]
    (root / "labels.csv").write_text("\n".join(["id,label", *lines]))
    return Recipe(labels_from=str(root / "labels.csv"), axes=("layer", "token", "feature"))


def raw(root: Path) -> Recipe:
    """Raw numbers beside a JSON."""
    rng = np.random.default_rng(3)
    for number in range(2):
        rng.normal(size=(COUNT // 2, 6, 10)).astype(np.float32).tofile(root / f"shard_{number}.memmap")
        (root / f"shard_{number}.meta").write_text(json.dumps({"shape": [COUNT // 2, 6, 10], "dtype": "float32"}))
    return Recipe(axes=("token", "feature"), label_kind="none")


def padded(root: Path) -> Recipe:
    """Padded sequences with lengths, and a field as large as the sequence."""
    rng = np.random.default_rng(4)
    lengths = rng.integers(1, 9, COUNT)
    tensors = {
        "states": torch.from_numpy(rng.normal(size=(COUNT, 8, 12)).astype(np.float32)),
        "second": torch.from_numpy(rng.normal(size=(COUNT, 8, 20)).astype(np.float64)),
        "pooled": torch.from_numpy(rng.normal(size=(COUNT, 40)).astype(np.float16)),
        "lengths": torch.from_numpy(lengths),
        "label": torch.from_numpy(rng.integers(0, 3, COUNT)),
    }
    save_file(tensors, root / "all.safetensors")
    fields = (("step.second", "second"), ("record.pooled", "pooled"))
    return Recipe(sequence="states", lengths="lengths", label="label", fields=fields)


def ragged(root: Path) -> Recipe:
    """Records one after the other, with their lengths."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(1, 9, COUNT)
    tensors = {
        "states": torch.from_numpy(rng.normal(size=(int(lengths.sum()), 12)).astype(np.float32)),
        "tokens": torch.from_numpy(rng.integers(0, 99, int(lengths.sum()))),
        "lengths": torch.from_numpy(lengths),
        "label": torch.from_numpy(rng.integers(0, 3, COUNT)),
    }
    save_file(tensors, root / "all.safetensors")
    return Recipe(sequence="states", lengths="lengths", label="label", fields=(("step.tokens", "tokens"),))


LAYOUTS: dict[str, Callable[[Path], Recipe]] = {
    layout.__name__: layout for layout in (vllm, stacked_npy, layers_first, raw, padded, ragged)
}


def both(tmp_path: Path, layout: str, **options: Any) -> tuple[dp.Dataset, dp.Dataset]:
    """Return a copied set and one in place of the same files."""
    (tmp_path / "src").mkdir()
    recipe = LAYOUTS[layout](tmp_path / "src")
    settings: dict[str, Any] = {"recipe": recipe, "num_workers": 1, "shard_bytes": 4000, **options}
    copied = convert(tmp_path / "src", tmp_path / "copied", ConvertConfig(**settings))
    placed = convert(tmp_path / "src", tmp_path / "placed", ConvertConfig(in_place=True, **settings))
    return copied, placed


def records(data: dp.Dataset) -> dict[tuple[str, str], Any]:
    return {
        (split, record.id): record
        for split in data.splits
        for position in range(data.num_records(split, "sequences"))
        for record in [data.record(split, position)]
    }


def assert_equal(one: Any, other: Any) -> None:
    assert (one.group, one.fields.keys()) == (other.group, other.fields.keys())
    assert np.array_equal(np.asarray(one.label), np.asarray(other.label))
    assert one.sequence.dtype == other.sequence.dtype
    assert np.array_equal(one.sequence, other.sequence, equal_nan=True)
    for name in one.fields:
        assert np.array_equal(one.fields[name], other.fields[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_batches_and_statistics_are_those_of_a_copy(tmp_path: Path, layout: str) -> None:
    copied, placed = both(tmp_path, layout)
    assert verify(placed.root).damages == []  # type: ignore[arg-type]
    expected, found = records(copied), records(placed)
    assert expected.keys() == found.keys()
    for key in expected:
        assert_equal(expected[key], found[key])
    assert placed.manifest.files
    assert placed.manifest.files.path == "../src"
    for one, other in ((data.manifest.statistics for data in (copied, placed)),):
        assert one is not None
        assert other is not None
        assert one.count == other.count
        assert np.allclose(one.mean, other.mean, rtol=0, atol=1e-6)
        assert np.allclose(one.std, other.std, rtol=1e-6)
    assert len(placed.table("train", "sequences")) > 1
    for engine in ("torch", "dali"):
        epochs = []
        for data in (copied, placed):
            loader = dp.SequenceLoader(data, batch_size=8, engine=engine, seed=3, num_workers=1)
            epochs.append({name: rows for _ in range(2) for batch in loader for name, rows in by_id(batch).items()})
        assert epochs[0].keys() == epochs[1].keys()
        for name, rows in epochs[0].items():
            assert torch.equal(rows, epochs[1][name])


def by_id(batch: Any) -> dict[str, torch.Tensor]:
    """Return the bits of each valid record's sequence."""
    rows = batch.sequences.view(torch.int32)
    return {
        name: row[:length]
        for name, row, length, valid in zip(batch.ids, rows, batch.lengths.tolist(), batch.valid.tolist(), strict=True)
        if valid
    }


@pytest.mark.parametrize("layout", ["vllm", "layers_first"])
@pytest.mark.parametrize("chosen", [[1], [2, 0], [-1, 1]])
def test_chosen_layers_and_steps(tmp_path: Path, layout: str, chosen: list[int]) -> None:
    copied, placed = both(tmp_path, layout)
    for steps in (None, slice(1, 3)):
        for packed in (False, True):
            epochs = []
            for data in (copied, placed):
                loader = dp.SequenceLoader(data, batch_size=5, shuffle=False, layers=chosen, steps=steps, packed=packed)
                epochs.append(list(loader))
            ids = [[name for batch in epoch for name in batch.ids] for epoch in epochs]
            assert ids[0] == ids[1]
            for one, other in zip(*epochs, strict=True):
                assert torch.equal(one.sequences.view(torch.int32), other.sequences.view(torch.int32))


def test_a_field_as_large_as_the_sequence_stays_too(tmp_path: Path) -> None:
    copied, placed = both(tmp_path, "padded")
    written = sum(path.stat().st_size for path in placed.folder.rglob("*") if path.is_file())
    assert written < sum(path.stat().st_size for path in copied.folder.rglob("*") if path.is_file()) / 2
    one, other = (
        dp.SequenceLoader(data, batch_size=7, shuffle=False, fields=["second", "pooled"]) for data in (copied, placed)
    )
    for left, right in zip(one, other, strict=True):
        assert torch.equal(left.fields["second"], right.fields["second"])
        assert torch.equal(left.fields["pooled"], right.fields["pooled"])


def test_written_bytes(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for number in range(400):
        np.save(src / f"hs_{number}.npy", np.full((64, 256), number, np.float32))
    recipe = Recipe(label_kind="none", layout="record-per-file")
    data = convert(src, tmp_path / "set", ConvertConfig(recipe=recipe, in_place=True, num_workers=1))
    written = sum(path.stat().st_size for path in data.folder.rglob("*") if path.is_file())
    assert written < 0.001 * data.nbytes + 128 * (400 + 400)
    assert data.nbytes > 400 * 64 * 256 * 4


def test_the_set_moves_with_its_files_or_is_told_where_they_are(tmp_path: Path) -> None:
    _, placed = both(tmp_path, "stacked_npy")
    expected = records(placed)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "src", tmp_path / "elsewhere" / "src")
    with pytest.raises(FormatError, match="files_root"):
        dp.open_dataset(placed.folder)
    with pytest.raises(UsageError, match="not a folder"):
        dp.open_dataset(placed.folder, files_root=tmp_path / "nowhere")
    moved = dp.open_dataset(placed.folder, files_root=tmp_path / "elsewhere" / "src")
    shutil.move(placed.folder, tmp_path / "elsewhere" / "set")
    beside = dp.open_dataset(tmp_path / "elsewhere" / "set")
    for data in (beside, dp.open_dataset(tmp_path / "elsewhere" / "set", files_root=tmp_path / "elsewhere" / "src")):
        found = records(data)
        for key in expected:
            assert_equal(expected[key], found[key])
    assert moved.digest == beside.digest
    with pytest.raises(UsageError, match="leave it out"):
        dp.open_dataset(tmp_path / "copied", files_root=tmp_path / "elsewhere")


@pytest.mark.parametrize("damage", ["flipped", "cut", "grown", "gone", "other content"])
def test_a_file_that_changed_is_named_at_the_first_block_read(tmp_path: Path, damage: str) -> None:
    _, placed = both(tmp_path, "vllm")
    path = tmp_path / "src" / "hs_7.safetensors"
    data = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif damage == "cut":
        path.write_bytes(data[:-6])
    elif damage == "grown":
        path.write_bytes(data + b"\0\0")
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"\0" * len(data))
    data_set = dp.open_dataset(placed.folder)
    loader = dp.SequenceLoader(data_set, split="train", batch_size=4, engine="torch")
    where = next(split for split in data_set.splits if "hs_7" in names(data_set, split))
    loader = dp.SequenceLoader(data_set, split=where, batch_size=4, engine="torch")
    with pytest.raises(PipelineError, match=r"hs_7\.safetensors"):
        list(loader)
    damages = verify(placed.folder).damages
    assert damages
    assert all("hs_7.safetensors" in line for line in damages)
    skipping = dp.SequenceLoader(data_set, split=where, batch_size=4, on_error="skip")
    delivered = {name for batch in skipping for name, valid in zip(batch.ids, batch.valid.tolist(), strict=True) if valid}
    assert delivered == names(data_set, where) - {"hs_7"}


def names(data: dp.Dataset, split: str) -> set[str]:
    return {text.decode() for text in data.select(split, "sequences").texts("ids")}


def test_a_file_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, placed = both(tmp_path, "vllm")
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 64))  # few files stay open, so that others are opened again
    loader = dp.SequenceLoader(placed, batch_size=8, engine="torch", num_workers=0, window="gather")  # not kept in memory
    assert len(list(loader)) > 1
    for path in (tmp_path / "src").glob("hs_*.safetensors"):
        other = path.with_suffix(".new")
        other.write_bytes(path.read_bytes()[:-4] + b"\x01\x02\x03\x04")
        other.replace(path)
    with pytest.raises(PipelineError, match=r"hs_\d+\.safetensors.*(replaced|changed)"):
        for _ in range(2):
            list(loader)


def test_what_cannot_stay_is_refused(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    values = np.zeros((6, 5, 4), np.float32)
    cases: dict[str, Any] = {}
    np.savez(src / "a.npz", states=values)
    cases["npz"] = src / "a.npz", Recipe(sequence="states", label_kind="none")
    torch.save({"states": torch.from_numpy(values)}, src / "a.pt")
    cases["pt"] = src / "a.pt", Recipe(sequence="states", label_kind="none")
    np.save(src / "fortran.npy", np.asfortranarray(np.arange(120.0).reshape(6, 5, 4)))
    cases["fortran"] = src / "fortran.npy", Recipe(label_kind="none", layout="stacked")
    np.save(src / "big.npy", values.astype(">f4"))
    cases["big-endian"] = src / "big.npy", Recipe(label_kind="none", layout="stacked")
    np.save(src / "c.npy", values)
    cases["strided"] = src / "c.npy", Recipe(label_kind="none", layout="stacked", axes=("channel", "time"))
    for name, (path, recipe) in cases.items():
        with pytest.raises(UsageError, match="without it, which copies them"):
            convert(path, tmp_path / name, ConvertConfig(recipe=recipe, in_place=True, num_workers=1))
        assert not (tmp_path / name).exists()
    with pytest.raises(UsageError, match="leave --dtype"):
        ConvertConfig(in_place=True, dtype="float16")
    masked = {"states": torch.from_numpy(values), "mask": torch.tensor([[1, 0, 1, 0, 0]] * 6)}
    save_file(masked, src / "masked.safetensors")
    recipe = Recipe(sequence="states", mask="mask", label_kind="none")
    with pytest.raises(FormatError, match="real steps behind padding"):
        convert(src / "masked.safetensors", tmp_path / "masked", ConvertConfig(recipe=recipe, in_place=True, num_workers=1))


def test_one_bad_file_among_many(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    recipe = vllm(src)
    states = torch.zeros(4, 3, 41).bfloat16()
    save_file({"hidden_states": states, "token_ids": torch.zeros(4, dtype=torch.int64)}, src / "hs_30.safetensors")
    save_file(
        {"hidden_states": states[:, :, :40].float(), "token_ids": torch.zeros(4, dtype=torch.int64)}, src / "hs_31.safetensors"
    )
    save_file(
        {"hidden_states": states[:, :, :40].clone(), "token_ids": torch.zeros(3, dtype=torch.int64)}, src / "hs_32.safetensors"
    )
    with pytest.raises((FormatError, DataError), match="hs_30"):
        convert(src, tmp_path / "set", ConvertConfig(recipe=recipe, in_place=True, num_workers=1))
    data = convert(src, tmp_path / "kept", ConvertConfig(recipe=recipe, in_place=True, num_workers=1, skip_bad=True))
    left_out = data.manifest.source["left_out"]
    assert sorted(left_out) == ["hs_30.safetensors", "hs_31.safetensors", "hs_32.safetensors"]
    assert sum(data.num_records(split, "sequences") for split in data.splits) == COUNT - 3


def test_a_set_in_place_becomes_a_real_one(tmp_path: Path) -> None:
    copied, placed = both(tmp_path, "vllm")
    real = convert(placed.folder, tmp_path / "real", ConvertConfig(num_workers=1))
    assert not real.manifest.files
    shutil.rmtree(tmp_path / "src")
    expected, found = records(copied), records(real)
    assert expected.keys() == found.keys()
    for key in expected:
        assert_equal(expected[key], found[key])


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, placed = both(tmp_path, "vllm")
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 64))
    loader = dp.SequenceLoader(placed, batch_size=30, engine="torch", num_workers=0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    most = 0
    for _ in loader:
        most = max(most, len(list(Path("/proc/self/fd").iterdir())) - before)
    assert most <= 8 + 4


def test_resume_folds_and_subsets(tmp_path: Path) -> None:
    _, placed = both(tmp_path, "stacked_npy")
    loader = dp.SequenceLoader(placed, batch_size=5, seed=1)
    iterator = iter(loader)
    first = [next(iterator).ids for _ in range(3)]
    state = loader.state_dict()
    again = dp.SequenceLoader(dp.open_dataset(placed.folder), batch_size=5, seed=1)
    again.load_state_dict(state)
    assert first + [batch.ids for batch in again] == [batch.ids for batch in dp.SequenceLoader(placed, batch_size=5, seed=1)]
    folds = placed.folds(3)
    seen = [name for fold in folds for batch in dp.SequenceLoader(fold, "val", batch_size=4) for name in valid_ids(batch)]
    assert sorted(seen) == sorted(names(placed, "train") | names(placed, "val"))
    subset = placed.subset("train", [3, 1])
    (batch,) = dp.SequenceLoader(subset, batch_size=2, shuffle=False)
    assert np.array_equal(batch.sequences[0].numpy(), placed.record("train", 3).sequence.astype(np.float32))


def valid_ids(batch: Any) -> list[str]:
    return [name for name, valid in zip(batch.ids, batch.valid.tolist(), strict=True) if valid]


def test_from_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set and its files in one bucket; and the set here, with the files in the bucket."""
    _, placed = both(tmp_path, "vllm")
    store = fsspec.filesystem("memory")
    for path in [*placed.folder.rglob("*"), *(tmp_path / "src").iterdir()]:
        if path.is_file():
            store.pipe(f"memory://bucket/{tmp_path.name}/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    url, expected = f"memory://bucket/{tmp_path.name}", records(placed)
    far = dp.open_dataset(f"{url}/placed", cache_dir=tmp_path / "cache", cache_bytes=1 << 26)
    near = dp.open_dataset(placed.folder, cache_dir=tmp_path / "other", cache_bytes=1 << 26, files_root=f"{url}/src")
    for data in (far, near):
        found = records(data)
        for key in expected:
            assert_equal(expected[key], found[key])
        loaders = [dp.SequenceLoader(each, batch_size=8, seed=3, num_workers=0) for each in (placed, data)]
        for _ in range(2):
            for one, other in zip(*loaders, strict=True):
                assert one.ids == other.ids
                assert torch.equal(one.sequences, other.sequences)
    assert verify(f"{url}/placed").damages == []
    broken = store.cat(f"{url}/src/hs_7.safetensors")
    store.pipe(f"{url}/src/hs_7.safetensors", broken[:-1] + bytes([broken[-1] ^ 1]))
    assert any("hs_7.safetensors" in line for line in verify(f"{url}/placed").damages)
    store.rm(f"memory://bucket/{tmp_path.name}", recursive=True)


@pytest.mark.parametrize("word", ["../x", "/etc/passwd", "a//b", ".", "a/../b", ""])
def test_a_shard_names_no_file_outside_its_folder(tmp_path: Path, word: str) -> None:
    with pytest.raises(FormatError, match="no name below"):
        ForeignNames(str(tmp_path), word.encode(), np.array([0, len(word)]))[0]


def test_commands_take_the_folder_of_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["x", *words])
        return run(app, "x")

    _, placed = both(tmp_path, "stacked_npy")
    shutil.move(tmp_path / "src", tmp_path / "moved")
    flags = ["--files-root", str(tmp_path / "moved")]
    for command in ("verify", "inspect"):
        assert called(command, str(placed.folder)) == 2
        assert "files_root" in capsys.readouterr().err
        assert called(command, str(placed.folder), *flags) == 0
    assert called("convert", str(placed.folder), str(tmp_path / "real"), *flags) == 0
    assert called("convert", str(tmp_path / "moved"), str(tmp_path / "no"), *flags, "--sequence", "states_{row}") == 2
    assert "made in place" in capsys.readouterr().err


def test_raw_files_whose_descriptions_differ_are_not_taken_for_alike(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    rng = np.random.default_rng(0)
    expected = {}
    for number in range(40):
        dtype = "float16" if number == 17 else "float32"
        values = rng.normal(size=(12 if number == 17 else 6, 10)).astype(dtype)
        expected[f"r{number}"] = values
        values.tofile(src / f"r{number}.memmap")
        (src / f"r{number}.meta").write_text(json.dumps({"shape": list(values.shape), "dtype": dtype}))
    recipe = Recipe(layout="record-per-file", axes=("token", "feature"), label_kind="none")
    copied = convert(src, tmp_path / "copied", ConvertConfig(recipe=recipe, num_workers=1))
    found = {name: record for (_, name), record in records(copied).items()}
    assert all(np.array_equal(found[name].sequence, values.astype(np.float32)) for name, values in expected.items())
    with pytest.raises(DataError, match=r"r17\.memmap.*float16, and float32 in the first"):
        convert(src, tmp_path / "placed", ConvertConfig(recipe=recipe, num_workers=1, in_place=True))


@pytest.mark.parametrize(
    ("shape", "suffix", "at"),
    [
        ((2, 5, 8), "npy", 0),
        ((2, 5, 8), "safetensors", 17),
        ((8,), "npy", 17),
        ((8,), "safetensors", 0),
        ((1, 5, 9), "npy", 17),
        ((0, 5, 8), "safetensors", 17),
    ],
)
def test_one_record_of_another_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], suffix: str, at: int
) -> None:
    """A leading axis of a batch that is none in one file, or whose rows differ: refused as in a copy, or left out."""
    src = tmp_path / "src"
    src.mkdir()
    monkeypatch.setattr("dali_pipeline.ingest.sources.CHUNK_BYTES", 1000)  # the odd file comes first in its chunk, or not
    for number in range(30):
        values = np.ones(shape if number == at + 3 else (1, 5, 8), np.float32)
        if suffix == "npy":
            np.save(src / f"r{number}.npy", values)
        else:
            save_file({"h": torch.from_numpy(values)}, src / f"r{number}.safetensors")
    key = None if suffix == "npy" else "h"
    recipe = Recipe(sequence=key, layout="record-per-file", axes=("token", "feature"), label_kind="none")
    for in_place in (False, True):
        settings = ConvertConfig(recipe=recipe, num_workers=1, in_place=in_place, shard_bytes=1000)
        with pytest.raises((FormatError, DataError), match=f"r{at + 3}"):
            convert(src, tmp_path / f"set{in_place}", settings)
        kept = ConvertConfig(recipe=recipe, num_workers=1, in_place=in_place, shard_bytes=1000, skip_bad=True)
        data = convert(src, tmp_path / f"kept{in_place}", kept)
        assert list(data.manifest.source["left_out"]) == [f"r{at + 3}.{suffix}"]


@pytest.mark.parametrize("name", ["record.e", "step.e"])
def test_a_field_of_another_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    src = tmp_path / "src"
    src.mkdir()
    monkeypatch.setattr("dali_pipeline.ingest.sources.CHUNK_BYTES", 20_000)
    for number in range(40):
        width = 64 if number < 10 else 128
        field = torch.ones(width) if name == "record.e" else torch.ones(5, width)
        save_file({"h": torch.ones(5, 40), "e": field}, src / f"r{number}.safetensors")
    recipe = Recipe(sequence="h", fields=((name, "e"),), layout="record-per-file", label_kind="none")
    for in_place in (False, True):
        with pytest.raises((FormatError, DataError), match=r"r10\D.*128"):
            convert(src, tmp_path / f"s{in_place}", ConvertConfig(recipe=recipe, num_workers=1, in_place=in_place))


def test_records_of_one_step_with_fields_of_several_columns(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    rng = np.random.default_rng(0)
    for number in range(30):
        steps = 1 if number % 3 == 0 else 4
        tensors = {name: torch.from_numpy(rng.normal(size=(steps, width))) for name, width in (("h", 16), ("a", 2), ("b", 20))}
        save_file(tensors, src / f"r{number}.safetensors")
    fields = (("step.a", "a"), ("step.b", "b"))
    recipe = Recipe(sequence="h", fields=fields, layout="record-per-file", label_kind="none")
    one, other = (
        records(convert(src, tmp_path / f"s{in_place}", ConvertConfig(recipe=recipe, num_workers=1, in_place=in_place)))
        for in_place in (False, True)
    )
    assert one.keys() == other.keys()
    for key in one:
        assert_equal(one[key], other[key])


def test_lengths_without_padding_behind_another_axis(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    values = torch.arange(6 * 3 * 4 * 5.0).reshape(6, 3, 4, 5)
    save_file({"h": values, "n": torch.full((6,), 4)}, src / "a.safetensors")
    recipe = Recipe(sequence="h", lengths="n", axes=("layer", "token", "feature"), label_kind="none")
    one, other = (
        records(convert(src, tmp_path / f"s{in_place}", ConvertConfig(recipe=recipe, num_workers=1, in_place=in_place)))
        for in_place in (False, True)
    )
    for key in one:
        assert_equal(one[key], other[key])


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for name in ("a", "b", "c\udcff"):
        np.save(src / f"{name}.npy", np.ones((3, 4), np.float32))
    recipe = Recipe(layout="record-per-file", label_kind="none")
    with pytest.raises(PipelineError, match="UTF-8"):
        convert(src, tmp_path / "set", ConvertConfig(recipe=recipe, num_workers=1, in_place=True))


def test_a_set_within_the_folder_of_its_files(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for number in range(6):
        np.save(src / f"r{number}.npy", np.full((3, 4), number, np.float32))
    settings = ConvertConfig(recipe=Recipe(layout="record-per-file", label_kind="none"), num_workers=1, in_place=True)
    data = convert(src, src / "set", settings)
    assert convert(src, src / "set", settings).digest == data.digest
    assert data.manifest.files
    assert data.manifest.files.path == ".."
    assert verify(data.folder).damages == []
