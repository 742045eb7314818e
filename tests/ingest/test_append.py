"""convert --append: a data set that grows is the old one or the new one at any moment, with the splits of its own rule."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dali_pipeline as dp
from dali_pipeline.cli.app import app, run
from dali_pipeline.errors import DataError, FormatError, PipelineError, UsageError
from dali_pipeline.format.manifest import Manifest
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import append, convert
from dali_pipeline.ingest.layouts.recipe import Recipe
from dali_pipeline.tools.verify import verify
from dali_pipeline.writing import growth
from dali_pipeline.writing.growth import ADDITION
from dali_pipeline.writing.split import SplitRule

COUNT = 40
RECIPE = Recipe(sequence="states", label="label", id="id", group="group", fields=(("record.score", "score"),))


def write(path: Path, first: int, dtype: str = "float32", scale: float = 1.0, **changed: Any) -> dict[str, Any]:
    """Write COUNT records from number `first` on; return the sequence of each by id."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first)
    values = {
        "states": (rng.normal(size=(COUNT, 5, 6)) * scale).astype(dtype),
        "label": rng.integers(0, 2, COUNT),
        "id": np.array([f"r{first + row}" for row in range(COUNT)]),
        "group": np.array([f"g{(first + row) // 3}" for row in range(COUNT)]),
        "score": rng.random(COUNT),
        **changed,
    }
    np.savez(path, **values)
    return dict(zip(values["id"].tolist(), values["states"], strict=True))


def config(**options: Any) -> ConvertConfig:
    return ConvertConfig(**{"recipe": RECIPE, "num_workers": 1, "shard_bytes": 2000, **options})


def contents(data: dp.Dataset) -> dict[str, tuple[str, Any, str]]:
    found = {}
    for split in data.splits:
        for position in range(data.num_records(split, "sequences")):
            record = data.record(split, position)
            assert record.id not in found
            found[record.id] = split, record, str(record.group)
    return found


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_records_splits_counts_and_statistics(tmp_path: Path) -> None:
    expected = write(tmp_path / "a" / "a.npz", 0) | write(tmp_path / "b" / "b.npz", COUNT)
    split = SplitRule.parse("60/20/20", 5)
    data = convert(tmp_path / "a", tmp_path / "set", config(split=split))
    before, old_digest = files(data.folder), data.digest
    loader = dp.SequenceLoader(data, batch_size=4)
    iterator = iter(loader)
    ids = [next(iterator).ids]
    grown = append(tmp_path / "b", tmp_path / "set", config())
    after = files(grown.folder)
    assert {name: data for name, data in after.items() if name in before and name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }
    assert verify(grown.folder).damages == []
    assert not (grown.folder / ADDITION).exists()
    found = contents(grown)
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert np.array_equal(found[name][1].sequence, rows)
        assert found[name][0] == split.of(found[name][2])
    train = np.concatenate([expected[name] for name, (home, _, _) in found.items() if home == "train"]).astype(np.float64)
    assert grown.manifest.statistics is not None
    assert np.allclose(grown.manifest.statistics.mean, train.mean(axis=0), atol=1e-6)
    assert np.allclose(grown.manifest.statistics.std, train.std(axis=0), rtol=1e-6)
    assert grown.manifest.statistics.count == (len(train),) * 6
    assert grown.digest != old_digest
    epoch = sorted(name for batch in dp.SequenceLoader(grown, batch_size=4, drop_last=True) for name in batch.ids)
    assert len(set(epoch)) == len(epoch)
    # the running loader keeps the old set; its state is not one of the new set
    ids += [batch.ids for batch in iterator]
    assert {name for batch in ids for name in batch} <= {name for name in expected if int(name[1:]) < COUNT}
    with pytest.raises(PipelineError, match="has data set digest"):
        dp.SequenceLoader(grown, batch_size=4).load_state_dict(loader.state_dict())
    assert grown.manifest.source["appended"][0]["files"] == 1
    again = append(tmp_path / "b", tmp_path / "set", config())
    assert again.digest == grown.digest


def test_the_same_as_one_conversion(tmp_path: Path) -> None:
    """A set that grew holds what a set made at once of all files holds."""
    write(tmp_path / "a" / "a.npz", 0)
    write(tmp_path / "b" / "b.npz", COUNT)
    (tmp_path / "all").mkdir()
    for path in (tmp_path / "a" / "a.npz", tmp_path / "b" / "b.npz"):
        shutil.copy(path, tmp_path / "all")
    convert(tmp_path / "a", tmp_path / "set", config())
    grown, whole = append(tmp_path / "b", tmp_path / "set", config()), convert(tmp_path / "all", tmp_path / "whole", config())
    one, other = contents(grown), contents(whole)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name][0] == other[name][0]
        assert np.array_equal(one[name][1].sequence, other[name][1].sequence)
        assert one[name][1].fields == other[name][1].fields
    for split in whole.splits:
        assert grown.label_counts(split) == whole.label_counts(split)
        assert grown.table(split, "sequences").ids == whole.table(split, "sequences").ids


def test_a_repeated_id_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "a.npz", 0)
    write(tmp_path / "b" / "b.npz", COUNT - 1)
    data = convert(tmp_path / "a", tmp_path / "set", config())
    before = files(data.folder)
    with pytest.raises(DataError, match=r"1 ids are in .* already, such as 'r39'"):
        append(tmp_path / "b", tmp_path / "set", config())
    assert files(data.folder) == before
    with pytest.raises(DataError, match="40 ids are in"):
        append(tmp_path / "a", tmp_path / "set", config())
    assert files(data.folder) == before


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"states": np.zeros((COUNT, 5, 7), np.float32)}, r"sequence in rows of \(7,\)"),
        ({"states": np.zeros((COUNT, 5), np.float32)}, "sequence in rows of"),
        ({"label": np.full(COUNT, 0.5)}, "label"),
        ({"score": np.zeros((COUNT, 2))}, "record.score in rows of"),
    ],
)
def test_other_records_are_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    write(tmp_path / "a" / "a.npz", 0)
    write(tmp_path / "b" / "b.npz", COUNT, **changed)
    data = convert(tmp_path / "a", tmp_path / "set", config())
    before = files(data.folder)
    with pytest.raises((UsageError, FormatError, DataError), match=words):
        append(tmp_path / "b", tmp_path / "set", config())
    assert files(data.folder) == before


def test_types_are_kept_and_not_narrowed_unasked(tmp_path: Path) -> None:
    write(tmp_path / "a" / "a.npz", 0, "float16")
    expected = write(tmp_path / "b" / "b.npz", COUNT, "float32")
    convert(tmp_path / "a", tmp_path / "set", config())
    with pytest.raises((DataError, FormatError), match="--dtype"):
        append(tmp_path / "b", tmp_path / "set", config())
    with pytest.raises(UsageError, match="stores as float16"):
        append(tmp_path / "b", tmp_path / "set", config(dtype="sequence=bfloat16"))
    shutil.rmtree(tmp_path / "set" / ADDITION, ignore_errors=True)
    grown = append(tmp_path / "b", tmp_path / "set", config(dtype="sequence=float16"))
    found = contents(grown)
    assert all(np.array_equal(found[name][1].sequence, rows.astype(np.float16)) for name, rows in expected.items())


def test_a_scale_that_the_new_data_exceed_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a" / "a.npz", 0)
    write(tmp_path / "b" / "b.npz", COUNT, scale=0.1)
    write(tmp_path / "c" / "c.npz", 2 * COUNT, scale=100.0)
    data = convert(tmp_path / "a", tmp_path / "set", config(dtype="int8"))
    before = files(data.folder)
    with pytest.raises(DataError, match="int8"):
        append(tmp_path / "c", tmp_path / "set", config())
    assert {name: value for name, value in files(data.folder).items() if not name.startswith(ADDITION)} == before
    assert verify(data.folder).damages == []
    grown = append(tmp_path / "b", tmp_path / "set", config())
    assert grown.schema == data.schema


def test_texts_as_classes_are_those_of_the_set(tmp_path: Path) -> None:
    names = np.array(["no", "yes", "perhaps"])
    write(tmp_path / "a" / "a.npz", 0, label=names[np.arange(COUNT) % 3])
    write(tmp_path / "b" / "b.npz", COUNT, label=names[np.arange(COUNT) % 2])
    write(tmp_path / "c" / "c.npz", 2 * COUNT, label=np.array(["never"] * COUNT))
    data = convert(tmp_path / "a", tmp_path / "set", config())
    with pytest.raises(FormatError, match=r"never.*expected one of no, perhaps, yes"):
        append(tmp_path / "c", tmp_path / "set", config())
    grown = append(tmp_path / "b", tmp_path / "set", config())
    assert grown.schema.labels.names == data.schema.labels.names == ("no", "perhaps", "yes")
    found = contents(grown)
    assert [found[f"r{COUNT + row}"][1].label for row in range(2)] == [0, 2]


def test_owners_splits(tmp_path: Path) -> None:
    for name, first in (("train", 0), ("test", COUNT)):
        write(tmp_path / "a" / f"{name}.npz", first)
        write(tmp_path / "b" / f"{name}_more.npz", first + 1000)
    write(tmp_path / "c" / "more.npz", 5000)
    convert(tmp_path / "a", tmp_path / "set", config())
    grown = append(tmp_path / "b", tmp_path / "set", config())
    assert verify(grown.folder).damages == []
    homes = {name: home for name, (home, _, _) in contents(grown).items()}
    assert {homes[f"r{COUNT + 1000 + row}"] for row in range(COUNT)} == {"test"}
    with pytest.raises(UsageError, match="by --split"):
        append(tmp_path / "c", tmp_path / "set", config())
    grown = append(tmp_path / "c", tmp_path / "set", config(split=SplitRule.parse("50/25/25")))
    assert verify(grown.folder).damages == []
    with pytest.raises(UsageError, match="has a rule"):
        write(tmp_path / "d" / "d.npz", 0)
        convert(tmp_path / "c", tmp_path / "other", config())
        append(tmp_path / "d", tmp_path / "other", config(split=SplitRule()))


def test_groups_stay_where_whole_files_were_dealt(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / "a" / f"{number}.npz", number * COUNT)
    group = np.array([f"g{row}" for row in range(COUNT)])
    write(tmp_path / "b" / "b.npz", 10 * COUNT, group=group)
    data = convert(tmp_path / "a", tmp_path / "set", config(split_by="file"))
    homes = {group: home for home, _, group in contents(data).values()}
    grown = append(tmp_path / "b", tmp_path / "set", config())
    assert verify(grown.folder).damages == []
    for home, _, name in contents(grown).values():
        assert homes.get(name, home) == home


@pytest.mark.parametrize("moment", ["while writing", "before moving", "within moving", "before the manifest", "at the end"])
def test_interrupted_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    write(tmp_path / "a" / "a.npz", 0)
    write(tmp_path / "b" / "b.npz", COUNT)
    data = convert(tmp_path / "a", tmp_path / "set", config())
    before, expected = (tmp_path / "set" / "manifest.json").read_bytes(), contents(data)

    class Stop(BaseException):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        if moment == "while writing":
            patch.setattr("dali_pipeline.ingest.convert.ShardWriter.adopt", stop)
        elif moment == "before moving":
            patch.setattr(growth._Shards, "move", stop)
        elif moment == "within moving":
            replace, moved = Path.replace, list[Path]()

            def some(path: Path, target: Path) -> Path:
                if ADDITION in path.parts and path.suffix == ".safetensors" and ADDITION not in Path(target).parts:
                    moved.append(path)
                    if len(moved) == 2:
                        raise Stop
                return replace(path, target)

            patch.setattr(Path, "replace", some)
        elif moment == "before the manifest":
            save = Manifest.save
            patch.setattr(Manifest, "save", lambda self, root: stop() if ADDITION not in root.parts else save(self, root))
        else:
            patch.setattr("dali_pipeline.writing.growth.shutil.rmtree", stop)
        with pytest.raises(Stop):
            append(tmp_path / "b", tmp_path / "set", config())
    if moment != "at the end":
        assert (tmp_path / "set" / "manifest.json").read_bytes() == before
        assert contents(dp.open_dataset(tmp_path / "set")).keys() == expected.keys()
    assert verify(tmp_path / "set").damages == []
    grown = append(tmp_path / "b", tmp_path / "set", config())
    assert len(contents(grown)) == 2 * COUNT
    assert verify(grown.folder).damages == []
    assert not (grown.folder / ADDITION).exists()


@pytest.mark.slow
def test_killed(tmp_path: Path) -> None:
    """SIGKILL at several moments; then the same command again."""
    write(tmp_path / "a" / "a.npz", 0)
    for number in range(30):
        write(tmp_path / "b" / f"{number}.npz", (number + 1) * COUNT)
    data = convert(tmp_path / "a", tmp_path / "set", config())
    before = contents(data)
    flags = [
        "--sequence",
        "states",
        "--label",
        "label",
        "--id",
        "id",
        "--group",
        "group",
        "--field",
        "record.score=score",
        "--shard-size",
        "2000",
    ]
    places = str(tmp_path / "b"), str(tmp_path / "set")
    command = [sys.executable, "-m", "dali_pipeline", "convert", "--append", *places, *flags]
    for seconds in (1.6, 2.2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = contents(dp.open_dataset(tmp_path / "set"))
        assert len(now) in (len(before), 31 * COUNT)
        assert verify(tmp_path / "set").damages == []
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert len(contents(dp.open_dataset(tmp_path / "set"))) == 31 * COUNT
    assert verify(tmp_path / "set").damages == []


def test_in_place(tmp_path: Path) -> None:
    """Files that lie below the folder of a set in place are added in place."""
    recipe = Recipe(label_kind="none", layout="record-per-file")
    rng = np.random.default_rng(0)
    expected = {}
    for folder, begin in (("raw/one", 0), ("raw/two", 20), ("other", 40)):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(begin, begin + 20):
            expected[f"r{number}"] = rng.normal(size=(4, 6)).astype(np.float32)
            np.save(tmp_path / folder / f"r{number}.npy", expected[f"r{number}"])
    data = convert(tmp_path / "raw", tmp_path / "whole", config(recipe=recipe, in_place=True))
    assert len(contents(data)) == 40
    shutil.move(tmp_path / "raw" / "two", tmp_path / "two")
    data = convert(tmp_path / "raw", tmp_path / "set", config(recipe=recipe, in_place=True))
    shutil.move(tmp_path / "two", tmp_path / "raw" / "two")
    grown = append(tmp_path / "raw" / "two", tmp_path / "set", config(recipe=recipe))
    assert verify(grown.folder).damages == []
    found = contents(grown)
    assert len(found) == 40
    for name, (_, record, _) in found.items():
        assert np.array_equal(record.sequence, expected[name.rpartition("/")[2]])
    assert sum(path.stat().st_size for path in grown.folder.rglob("*.safetensors")) < 60_000
    with pytest.raises(UsageError, match="does not lie below"):
        append(tmp_path / "other", tmp_path / "set", config(recipe=recipe))


def test_refusals_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a" / "a.npz", 0)
    write(tmp_path / "b" / "b.npz", COUNT)
    convert(tmp_path / "a", tmp_path / "set", config())

    def called(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["x", "convert", "--append", *words])
        assert run(app, "x") == 2
        return capsys.readouterr().err

    flags = ["--sequence", "states", "--label", "label", "--id", "id", "--group", "group"]
    more = str(tmp_path / "b")
    assert "not a folder" in called(more, str(tmp_path / "none"), *flags)
    assert "further fields" in called(more, str(tmp_path / "set"), *flags)
    assert "is a URL" in called(more, "memory://x/y", *flags)
    assert "leave --in-place out" in called(more, str(tmp_path / "set"), *flags, "--in-place")
    with pytest.raises(PipelineError):
        append(tmp_path / "a", tmp_path / "a", config())


def test_files_of_the_same_names_and_sizes_are_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for day in range(4):
        write(tmp_path / f"day{day}" / "shard.npz", 100 + day * COUNT)
    sizes = {(tmp_path / f"day{day}" / "shard.npz").stat().st_size for day in range(4)}
    assert len(sizes) == 1
    convert(tmp_path / "day0", tmp_path / "set", config())
    append(tmp_path / "day1", tmp_path / "set", config())
    with monkeypatch.context() as patch:
        patch.setattr("dali_pipeline.ingest.convert.grow", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            append(tmp_path / "day2", tmp_path / "set", config())
    with pytest.raises(UsageError, match="was interrupted; repeat that first"):
        append(tmp_path / "day3", tmp_path / "set", config())
    append(tmp_path / "day2", tmp_path / "set", config())
    grown = append(tmp_path / "day3", tmp_path / "set", config())
    assert {int(name[1:]) for name in contents(grown)} == set(range(100, 100 + 4 * COUNT))


def test_the_threshold_of_the_set(tmp_path: Path) -> None:
    scores = np.linspace(0, 10, COUNT)
    write(tmp_path / "a" / "a.npz", 0, label=scores)
    write(tmp_path / "b" / "b.npz", COUNT, label=scores)
    above = Recipe(**{**RECIPE.__dict__, "label_above": 5.0})
    convert(tmp_path / "a", tmp_path / "set", config(recipe=above))
    with pytest.raises(UsageError, match="label 1 above 5"):
        append(tmp_path / "b", tmp_path / "set", config(recipe=Recipe(**{**RECIPE.__dict__, "label_above": 9.0})))
    grown = append(tmp_path / "b", tmp_path / "set", config())
    found = contents(grown)
    assert [found[f"r{COUNT + row}"][1].label for row in range(COUNT)] == [int(score > 5) for score in scores]


def test_a_data_set_with_other_classes(tmp_path: Path) -> None:
    write(tmp_path / "a" / "a.npz", 0, label=np.array(["cat", "dog"] * (COUNT // 2)))
    write(tmp_path / "b" / "b.npz", COUNT, label=np.array(["dog", "zebra"] * (COUNT // 2)))
    convert(tmp_path / "a", tmp_path / "set", config())
    convert(tmp_path / "b", tmp_path / "other", config())
    with pytest.raises(UsageError, match="classes named"):
        append(tmp_path / "other", tmp_path / "set", config(recipe=Recipe()))


def test_in_place_through_links_and_a_wrong_folder(tmp_path: Path) -> None:
    recipe = Recipe(label_kind="none", layout="record-per-file")
    for folder in ("root/one", "root/two", "elsewhere/x"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(6):
            np.save(tmp_path / folder / f"{folder[-1]}{number}.npy", np.full((3, 4), number, np.float32))
    shutil.move(tmp_path / "root" / "two", tmp_path / "two")
    data = convert(tmp_path / "root", tmp_path / "set", config(recipe=recipe, in_place=True))
    before = files(data.folder)
    shutil.move(tmp_path / "two", tmp_path / "root" / "two")
    (tmp_path / "root" / "two" / "link").symlink_to(tmp_path / "elsewhere" / "x")
    (tmp_path / "alias").symlink_to(tmp_path)
    with pytest.raises(PipelineError, match="does not lie below"):
        append(tmp_path / "alias" / "root" / "two", tmp_path / "set", config(recipe=recipe))
    shutil.rmtree(tmp_path / "set" / ADDITION, ignore_errors=True)
    (tmp_path / "wrong" / "new").mkdir(parents=True)
    np.save(tmp_path / "wrong" / "new" / "w.npy", np.ones((3, 4), np.float32))
    with pytest.raises(UsageError, match="the folder of its values"):
        append(tmp_path / "wrong" / "new", tmp_path / "set", config(recipe=recipe, files_root=str(tmp_path / "wrong")))
    assert files(data.folder) == before
    (tmp_path / "root" / "two" / "link").unlink()
    grown = append(tmp_path / "alias" / "root" / "two", tmp_path / "set", config(recipe=recipe))
    assert len(contents(grown)) == 12
    assert verify(grown.folder).damages == []


def test_whole_files_stay_whole(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / "a" / f"{number}.npz", number * COUNT)
        write(
            tmp_path / "b" / f"more_{number}.npz",
            (10 + number) * COUNT,
            group=np.array([f"h{number}-{row}" for row in range(COUNT)]),
        )
    write(tmp_path / "c" / "c.npz", 0)
    convert(tmp_path / "a", tmp_path / "set", config(split_by="file"))
    grown = append(tmp_path / "b", tmp_path / "set", config())
    homes: dict[str, set[str]] = {}
    for name, (home, _, _) in contents(grown).items():
        if int(name[1:]) >= 10 * COUNT:
            homes.setdefault(str(int(name[1:]) // COUNT), set()).add(home)
    assert len(homes) == 6
    assert all(len(found) == 1 for found in homes.values())
    convert(tmp_path / "c", tmp_path / "by_group", config())
    with pytest.raises(UsageError, match="leave --split-by out"):
        append(tmp_path / "b", tmp_path / "by_group", config(split_by="file"))


def test_torn_groups_of_owners_splits_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, first in (("train", 0), ("val", COUNT), ("test", 2 * COUNT)):
        write(tmp_path / "a" / f"{name}.npz", first)
    same = np.array([f"g{row // 3}" for row in range(COUNT)])  # those of train
    write(tmp_path / "b" / "train_more.npz", 1000)
    write(tmp_path / "b" / "test_more.npz", 2000, group=same)
    convert(tmp_path / "a", tmp_path / "set", config())
    grown = append(tmp_path / "b", tmp_path / "set", config())
    assert "14 groups are in another split" in caplog.text
    homes = {home for name, (home, _, _) in contents(grown).items() if 1000 <= int(name[1:]) < 1000 + COUNT}
    assert homes == {"train"}  # the set has a val of its own
    assert verify(grown.folder).damages == []
