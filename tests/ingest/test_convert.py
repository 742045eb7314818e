from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch_geometric.data import Data

import dali_pipeline as dp
from dali_pipeline.ingest import convert as convert_module
from dali_pipeline.ingest import sources
from dali_pipeline.ingest import workers as workers_module
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.foreign import list_files
from dali_pipeline.ingest.layouts.recipe import Recipe
from dali_pipeline.ingest.readers.pt import PT
from dali_pipeline.runtime.workerprocess import start_workers
from dali_pipeline.tools.verify import verify
from tests.helpers.folders import assert_same_bytes, break_file, make_folder, one_edge_too_far
from tests.helpers.scripts import HEARS_CTRL_C, HELPERS


def convert(src: Path, dst: Path, **options: Any) -> dp.Dataset:
    return convert_module.convert(src, dst, ConvertConfig(**options))


def test_both_halves_become_one_data_set(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src")
    data = convert(src, tmp_path / "dst", split=dp.SplitRule.parse("50/25/25"))
    expected = {
        name: row
        for path in sorted((src / "lstm_solo").iterdir())
        for file in [torch.load(path)]
        for name, row in zip(file["question_ids"], file["sequences"], strict=True)
    }
    graphs = {
        name: row
        for path in sorted((src / "gnn").iterdir())
        for file in [torch.load(path, weights_only=False)]
        for name, row in zip(file["question_ids"], file["graphs"], strict=True)
    }
    found: dict[str, str] = {}
    for split in data.splits:
        for batch in dp.SequenceLoader(data, split, engine="torch", dtype=torch.float16, shuffle=False):
            for row, length, name, valid in zip(batch.sequences, batch.lengths, batch.ids, batch.valid, strict=True):
                assert torch.equal(row[:length], expected[name])
                if valid:
                    found[name] = split
        for graph_batch in dp.GraphLoader(data, split, dtype=torch.float16, shuffle=False):
            ours = iter(graph_batch.graphs.to_data_list())
            for name in graph_batch.ids:
                assert found[name] == split
                for theirs in graphs[name]:
                    mine = next(ours)
                    assert torch.equal(mine.x, theirs.x)
                    assert torch.equal(mine.edge_index, theirs.edge_index)
                    assert torch.equal(mine.edge_attr, theirs.edge_attr.reshape(-1))
    assert len(found) == 36
    assert "in_one_half" not in data.manifest.source


@pytest.mark.parametrize("halves", ["lstm", "gnn"])
def test_one_half_alone_is_enough(tmp_path: Path, halves: str) -> None:
    data = convert(make_folder(tmp_path / "src", halves=halves, name="preprocessed"), tmp_path / "dst")
    assert data.schema.kinds == (("sequences",) if halves == "lstm" else ("graphs",))


def test_recurring_questions_are_numbered_alike_and_stay_together(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", per_file=8)
    for kind in ("lstm_solo", "gnn"):
        for number in (0, 2):
            path = src / kind / f"batch_{number}.pt"
            file = torch.load(path, weights_only=False)
            file["question_ids"] = [7, "q1", 7, *file["question_ids"][3:]]
            file["labels"] = torch.zeros(8).tolist()
            torch.save(file, path)
    data = convert(src, tmp_path / "dst")
    homes: dict[str, set[str]] = {"7": set(), "q1": set()}
    names = []
    for split in data.splits:
        for batch in dp.SequenceLoader(data, split, engine="torch"):
            for name, valid in zip(batch.ids, batch.valid.tolist(), strict=True):
                if valid:
                    names.append(name)
                    if name.split("#")[0] in homes:
                        homes[name.split("#")[0]].add(split)
    assert {"7#0", "7#1", "7#2", "7#3", "q1#0", "q1#1", "q9"} <= set(names)
    assert len(names) == 24
    assert all(len(splits) == 1 for splits in homes.values())


def test_files_are_taken_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        (tmp_path / "gnn").mkdir(exist_ok=True)
        (tmp_path / "gnn" / f"batch_{number}.pt").touch()
    assert [path.name for path in PT.find(tmp_path, list_files(tmp_path)[0])] == ["batch_1.pt", "batch_9.pt", "batch_10.pt"]


def test_killed_and_started_again_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_folder(tmp_path / "src")
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1)
    whole = convert(src, tmp_path / "whole", shard_bytes=700, num_workers=1)
    calls: list[int] = []
    whole_open = sources.Source.open

    def dies(self: sources.Source, number: int) -> Any:
        calls.append(number)
        if len(calls) == 13:  # 6 files for their names, 2 for the schema; behind the commit of the fourth
            raise KeyboardInterrupt
        return whole_open(self, number)

    with monkeypatch.context() as dying:
        dying.setattr(sources.Source, "open", dies)
        with pytest.raises(KeyboardInterrupt):
            convert(src, tmp_path / "torn", shard_bytes=700, num_workers=1)
    assert not (tmp_path / "torn" / "manifest.json").exists()
    assert any((tmp_path / "torn").rglob("*.safetensors"))
    torn = convert(src, tmp_path / "torn", shard_bytes=700, num_workers=2)
    assert_same_bytes(torn.folder, whole.folder)


@pytest.mark.parametrize("split_by", ["group", "file"])
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split_by: Any) -> None:
    src = make_folder(tmp_path / "src", files=3)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1)
    options = {"shard_bytes": 700, "split_by": split_by, "layers": [1, 0]}
    one = convert(src, tmp_path / "one", num_workers=1, **options)
    for num_workers in (2, 5):
        assert_same_bytes(convert(src, tmp_path / str(num_workers), num_workers=num_workers, **options).folder, one.folder)
    assert verify(one.folder).damages == []
    assert not list(tmp_path.rglob(".parts"))


def test_chunks_of_an_interrupted_conversion_are_those_that_it_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut otherwise, its cursor would skip files, or write them twice."""
    src = make_folder(tmp_path / "src", files=4)
    listed = sources.Source.find(src)
    monkeypatch.setattr(sources, "CHUNK_BYTES", sum(listed.sizes[:3]))
    opened = sources.Source.open

    def dies(self: Any, number: int) -> Any:
        if number == 6 and (tmp_path / "torn" / ".parts").exists():
            raise KeyboardInterrupt
        return opened(self, number)

    with monkeypatch.context() as dying:
        dying.setattr(sources.Source, "open", dies)
        with pytest.raises(KeyboardInterrupt):
            convert(src, tmp_path / "torn", num_workers=1)
    shards = sorted((tmp_path / "torn").rglob("*.safetensors"))
    assert shards
    with monkeypatch.context() as cut:
        cut.setattr(sources, "CHUNK_FILES", 2)
        cut.setattr(sources, "LEAST_CHUNK_BYTES", 1)
        with pytest.raises(dp.UsageError, match="holds an unfinished data set of other input or settings"):
            convert(src, tmp_path / "torn", num_workers=1)
    assert sorted((tmp_path / "torn").rglob("*.safetensors")) == shards
    assert_same_bytes(convert(src, tmp_path / "torn").folder, convert(src, tmp_path / "whole").folder)


def test_many_files_are_opened_by_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To the same data set, and the same words about what is left out, as one after the other."""
    src = tmp_path / "src"
    src.mkdir()
    for number in range(9):
        states = torch.full((3, 4), number, dtype=torch.float16)
        torch.save({"states": states, "label": number % 2, "name": f"q{number // 2}"}, src / f"r{number}.pt")
    recipe = Recipe(sequence="states", label="label", group="name", layout="record-per-file")
    monkeypatch.setattr("dali_pipeline.ingest.job.FILES_AT_ONCE", 2)
    monkeypatch.setattr(sources, "CHUNK_FILES", 4)
    monkeypatch.setattr(sources, "LEAST_CHUNK_BYTES", 1)
    options: dict[str, Any] = {"recipe": recipe, "split": dp.SplitRule.parse("100/0/0")}

    def converted(name: str, many: int, **others: Any) -> dp.Dataset:
        monkeypatch.setattr("dali_pipeline.ingest.job.MANY_FILES", many)
        return convert(src, tmp_path / name, num_workers=2, **options, **others)

    one = converted("one", 10)
    assert_same_bytes(converted("two", 9).folder, one.folder)
    assert [one.record("train", number).label for number in range(9)] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert len(one.table("train", "sequences")) == 3
    (src / "r5.pt").write_bytes(b"PK nothing")
    words = []
    for many in (10, 9):
        with pytest.raises(dp.FormatError, match=r"r5\.pt") as refused:
            converted(f"bad {many}", many)
        words.append(str(refused.value))
        caplog.clear()
        data = converted(f"skip {many}", many, skip_bad=True)
        assert data.num_records("train", "sequences") == 8
        words.append(str(data.manifest.source["left_out"]))
    assert words[:2] == words[2:]


@pytest.mark.slow
def test_killed_with_its_workers_and_gone_on_gives_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL to the parent alone: the workers die too, the folder is free, and the same command ends as if undisturbed."""
    src = make_folder(tmp_path / "src", per_file=400, files=6)
    code = (
        f"{HEARS_CTRL_C}import sys, time\nfrom pathlib import Path\n"
        f"sys.path.append({str(HELPERS)!r})\nimport slowly\n"
        "from dali_pipeline.ingest import convert, sources\nsources.CHUNK_BYTES = 1\nconvert._write = slowly.write\n"
        "config = convert.ConvertConfig(shard_bytes=20_000, num_workers=2)\n"
        "convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), config)\n"
    )

    def start(dst: Path, pause: float) -> subprocess.Popen[bytes]:
        environment = os.environ | {"PAUSE": str(pause)}
        return subprocess.Popen([sys.executable, "-c", code, str(src), str(dst)], stderr=subprocess.PIPE, env=environment)

    with start(tmp_path / "whole", 0) as process:
        process.wait()
    torn = tmp_path / "torn"
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        with start(torn, 0.001) as process:
            children: list[psutil.Process] = []
            journal = torn / "journal.json"
            before = journal.read_bytes() if journal.exists() else b""
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:  # until something more is final
                children = psutil.Process(process.pid).children(recursive=True) or children
                if (
                    children
                    and journal.exists()
                    and journal.read_bytes() != before
                    and b'"committed":true' in journal.read_bytes()
                ):
                    break
                time.sleep(0.01)
            process.send_signal(number)
            process.wait(timeout=30)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert len(children) == 2
        assert not alive
        assert not (torn / "manifest.json").exists()
        with pytest.raises(dp.FormatError):
            dp.open_dataset(torn)
    with start(torn, 0) as process:
        assert process.wait() == 0
    assert_same_bytes(torn, tmp_path / "whole")


def test_a_worker_that_is_killed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_folder(tmp_path / "src", files=3)
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1)
    start = start_workers

    def start_and_kill(*arguments: Any) -> Any:
        crew = start(*arguments)
        crew[0].kill()
        return crew

    monkeypatch.setattr(workers_module, "start_workers", start_and_kill)
    with pytest.raises(dp.PipelineError, match="a worker process was killed, perhaps for memory"):
        convert(src, tmp_path / "dst", num_workers=2)
    assert not (tmp_path / "dst").exists()


def test_whole_files_are_dealt_and_groups_go_with_their_first(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", per_file=10, files=6, halves="lstm")
    for number in range(1, 6):
        path = src / "lstm_solo" / f"batch_{number}.pt"
        file = torch.load(path)
        file["question_ids"][0] = "q3"  # of the first file
        torch.save(file, path)
    data = convert(src, tmp_path / "dst", split=dp.SplitRule.parse("50/25/25"), split_by="file")
    homes: dict[str, str] = {}
    for split in data.splits:
        for batch in dp.SequenceLoader(data, split, engine="torch"):
            homes |= {name: split for name, valid in zip(batch.ids, batch.valid.tolist(), strict=True) if valid}
    for number in range(6):
        assert len({homes[f"q{number * 10 + row}"] for row in range(1, 10) if number or row != 3}) == 1
    assert len({split for name, split in homes.items() if name.startswith("q3#")}) == 1
    assert len([name for name in homes if name.startswith("q3#")]) == 6
    assert data.manifest.source["moved"] == 1
    counts = [data.num_records(split, "sequences") for split in data.splits]
    assert sum(counts) == 60
    assert all(abs(count - share) <= 10 for count, share in zip(counts, (30, 15, 15), strict=True))


def test_chosen_layers_alone_are_kept(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", files=1)
    data = convert(src, tmp_path / "dst", layers=slice(1, 3), split=dp.SplitRule.parse("100/0/0"))
    graphs = torch.load(src / "gnn" / "batch_0.pt", weights_only=False)["graphs"]
    sequences = torch.load(src / "lstm_solo" / "batch_0.pt")["sequences"]
    for batch in dp.SequenceLoader(data, engine="torch", dtype=torch.float16, shuffle=False, batch_size=12):
        assert torch.equal(batch.sequences, sequences[:, 1:3])
    (graph_batch,) = dp.GraphLoader(data, dtype=torch.float16, shuffle=False, batch_size=12)
    expected = [layer for record in graphs for layer in record[1:3]]
    for mine, theirs in zip(graph_batch.graphs.to_data_list(), expected, strict=True):
        assert torch.equal(mine.x, theirs.x)
        assert torch.equal(mine.edge_index, theirs.edge_index)
    with pytest.raises(dp.DataError, match=r"layers \[7\] asked of a record with 4"):
        convert(src, tmp_path / "other", layers=[7])


def test_what_is_left_out_of_one_half_never_pairs_other_answers(tmp_path: Path) -> None:
    """Question 0 is answered in both files; each half lacks another file, so no answer has both halves."""
    src = make_folder(tmp_path / "src", files=2)
    for half in ("lstm_solo", "gnn"):
        for number in (0, 1):
            path = src / half / f"batch_{number}.pt"
            file = torch.load(path, weights_only=False)
            file["question_ids"][0] = "q0"
            torch.save(file, path)
    for path in (src / "lstm_solo" / "batch_0.pt", src / "gnn" / "batch_1.pt"):
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(dp.DataError, match="no records that can be taken in"):
        convert(src, tmp_path / "dst", skip_bad=True)
    file = torch.load(make_folder(tmp_path / "again", files=2) / "gnn" / "batch_1.pt", weights_only=False)
    file["question_ids"][0] = "q0"
    torch.save(file, src / "gnn" / "batch_1.pt")
    data = convert(src, tmp_path / "dst", skip_bad=True)
    assert sorted(data.manifest.source["left_out"]) == ["gnn/batch_0.pt", "lstm_solo/batch_0.pt"]
    assert "its other half, lstm_solo/batch_0.pt, cannot be read" in data.manifest.source["left_out"]["gnn/batch_0.pt"]
    assert "in_one_half" not in data.manifest.source


def test_records_in_one_half_alone_are_counted(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", files=2)
    path = src / "gnn" / "batch_1.pt"
    file = torch.load(path, weights_only=False)
    torch.save({name: value[:5] for name, value in file.items()}, path)
    assert convert(src, tmp_path / "dst").manifest.source["in_one_half"] == 7
    torch.save(one_edge_too_far(file), path)
    data = convert(src, tmp_path / "other", skip_bad=True)  # found bad only when its values are read
    assert data.manifest.source["in_one_half"] == 12


def test_whole_files_of_one_name_in_many_folders_are_dealt_apart(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / "src" / str(number)).mkdir(parents=True)
        np.savez(tmp_path / "src" / str(number) / "data.npz", sequences=np.ones((2, 1, 1)), labels=[0, 1])
    data = convert(tmp_path / "src", tmp_path / "dst", split_by="file", split=dp.SplitRule.parse("50/25/25"))
    assert [data.num_records(split, "sequences") for split in data.splits] == [12, 6, 6]


def test_space_already_used_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_folder(tmp_path / "src", files=3, halves="lstm")
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1)
    real, calls = convert_module.write_chunk, 0

    def dies(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as dying:
        dying.setattr(convert_module, "write_chunk", dies)
        with pytest.raises(KeyboardInterrupt):
            convert(src, tmp_path / "dst", num_workers=1)
    sizes = [path.stat().st_size for path in sorted((src / "lstm_solo").iterdir())]
    left = shutil.disk_usage(tmp_path)._replace(free=int(sizes[2] * 1.2))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: left)
    assert convert(src, tmp_path / "dst", num_workers=1).num_records("train", "sequences")


def test_a_file_that_changes_while_it_is_converted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_folder(tmp_path / "src", files=2)
    real = convert_module.write_chunk

    def touches(*arguments: Any) -> Any:
        os.utime(src / "gnn" / "batch_0.pt")
        return real(*arguments)

    monkeypatch.setattr(convert_module, "write_chunk", touches)
    with pytest.raises(dp.FormatError, match=r"batch_0\.pt changed while it was converted"):
        convert(src, tmp_path / "dst", num_workers=1)
    assert not (tmp_path / "dst" / "manifest.json").exists()


def test_an_impatient_ctrl_c_still_ends_it(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", per_file=40, files=4)
    code = (
        f"{HEARS_CTRL_C}import sys\nsys.path.append({str(HELPERS)!r})\nimport slowly\n"
        "from dali_pipeline.cli import app as cli\nfrom dali_pipeline.ingest import convert, sources\n"
        "sources.CHUNK_BYTES = 1\nconvert._write = slowly.write\n"
        "sys.argv = ['dali_pipeline', 'convert', *sys.argv[1:], '--num-workers', '2']\ncli.main()\n"
    )
    command, environment = [sys.executable, "-c", code, str(src), str(tmp_path / "dst")], os.environ | {"PAUSE": "0.5"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        deadline = time.monotonic() + 30
        while len(children := psutil.Process(process.pid).children()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert process.wait(timeout=10) in (130, -signal.SIGINT)
        assert process.stderr is not None
        assert b"Bad file descriptor" not in process.stderr.read()
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert not (tmp_path / "dst" / "manifest.json").exists()


def test_a_finished_conversion_is_taken_and_another_refused(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", files=1)
    first = convert(src, tmp_path / "dst")
    assert convert(src, tmp_path / "dst").digest == first.digest
    with pytest.raises(dp.UsageError, match="other files or settings"):
        convert(src, tmp_path / "dst", shard_bytes=5)
    more = make_folder(tmp_path / "more", files=2)
    for path in more.rglob("*.pt"):
        os.utime(path, ns=(0, 0))
    with pytest.raises(dp.UsageError, match="other files or settings"):
        convert(more, tmp_path / "dst")


def test_a_file_changed_since_is_never_trained_on_unseen(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", files=1)
    first = convert(src, tmp_path / "dst")
    path = src / "gnn" / "batch_0.pt"
    os.utime(path, ns=(0, (first.folder / "manifest.json").stat().st_mtime_ns + 1))
    with pytest.raises(dp.UsageError, match=r"batch_0.pt is newer than .*dst, which was made of it"):
        convert(src, tmp_path / "dst")
    os.utime(path, ns=(0, 0))
    assert convert(src, tmp_path / "dst").digest == first.digest


def test_the_schema_is_that_of_the_first_record_that_tells(tmp_path: Path) -> None:
    """Empty files, and records whose graphs have no edges and so no edge_attr, say nothing of the others."""
    src = make_folder(tmp_path / "src", files=2)
    for kind, key in (("lstm_solo", "sequences"), ("gnn", "graphs")):
        torch.save({key: [], "labels": [], "question_ids": []}, src / kind / "batch_00.pt")
    path = src / "gnn" / "batch_0.pt"
    file = torch.load(path, weights_only=False)
    for row in range(5):
        for each in file["graphs"][row]:
            each.edge_index, each.edge_attr = torch.zeros(2, 0, dtype=torch.int64), None
    torch.save(file, path)
    assert convert(src, tmp_path / "dst").schema.edge_attr == dp.Field(dtype="float16")
    file["graphs"] = [[Data(x=each.x, edge_index=each.edge_index) for each in row] for row in file["graphs"]]
    torch.save(file, path)
    with pytest.raises(dp.DataError, match="has edge_attr, which the first graphs with edges had not"):
        convert(src, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_folders_without_any_record_are_refused(tmp_path: Path) -> None:
    (tmp_path / "src" / "gnn").mkdir(parents=True)
    torch.save({"graphs": [], "labels": [], "question_ids": []}, tmp_path / "src" / "gnn" / "batch_0.pt")
    with pytest.raises(dp.DataError, match="src holds no records"):
        convert(tmp_path / "src", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_files_of_the_old_format_are_read_too(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", files=2)
    expected = convert(src, tmp_path / "expected", shard_bytes=1000)
    for path in src.rglob("*.pt"):
        torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
        os.utime(path, ns=(0, 0))
    found = convert(src, tmp_path / "dst", shard_bytes=1000)
    for path in expected.folder.rglob("*.safetensors"):
        assert (found.folder / path.relative_to(expected.folder)).read_bytes() == path.read_bytes()


def test_one_byte_shards_and_whole_labels_of_any_type(tmp_path: Path) -> None:
    src = make_folder(tmp_path / "src", files=1, halves="lstm")
    path = src / "lstm_solo" / "batch_0.pt"
    file = torch.load(path)
    file["labels"] = [True, False, 1.0, 0.0, *[torch.tensor(1)] * 8]
    torch.save(file, path)
    data = convert(src, tmp_path / "dst", shard_bytes=1, split=dp.SplitRule.parse("100/0/0"))
    assert data.label_counts("train") == {0: 2, 1: 10}
    assert len(data.table("train", "sequences")) == 12


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("code", r"batch_1.pt was refused: it asks for posix.system"),
        ("numpy", r"batch_1.pt was refused: it asks for numpy"),
        ("truncated", "batch_1.pt cannot be read as a file of torch.save"),
        ("empty", "batch_1.pt is empty"),
        ("text", "batch_1.pt (cannot be read|was refused)"),
        ("keys", r"batch_1.pt holds \['sequences'\]; expected a dict with sequences, labels"),
        ("tensor", "batch_1.pt holds one tensor; expected a dict"),
        ("count", "batch_1.pt has 12 sequences, 11 labels and 12 question_ids"),
        ("label", "batch_1.pt, labels holds 0.5; expected whole numbers"),
        ("hidden", r"batch_1.pt: record 'q12', sequence has rows of shape \(5,\); expected \(6,\)"),
        ("graph edge", r"batch_1.pt: record 'q15', graph 1: edge \(0, 99\) leaves the graph's"),
        ("graph count", r"batch_1.pt: 'q12' recurs, with 1 sequences and 2 records of graphs"),
        ("graph label", r"batch_1.pt: 'q12' has the label 0 as a sequence and 1 as graphs"),
        ("graph none", "batch_1.pt, record 3: no graphs; expected a list of PyG Data"),
    ],
)
def test_bad_files_are_named_and_nothing_is_left(tmp_path: Path, how: str, words: str) -> None:
    src = make_folder(tmp_path / "src")
    path = break_file(src, how)
    others = {other: other.read_bytes() for other in src.rglob("*.pt")}
    with pytest.raises(dp.PipelineError, match=words) as found:
        convert(src, tmp_path / "dst", shard_bytes=500)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "dst").exists()
    assert not (src / "ran").exists()
    assert {other: other.read_bytes() for other in src.rglob("*.pt")} == others
    assert path.exists()


def test_missing_and_empty_folders_are_said(tmp_path: Path) -> None:
    with pytest.raises(dp.UsageError, match="is not a folder"):
        convert(tmp_path / "missing", tmp_path / "dst")
    with pytest.raises(dp.UsageError, match="holds no lstm_solo/batch"):
        convert(tmp_path, tmp_path / "dst")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_folder(tmp_path / "src", files=1)
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(dp.UsageError, match=r"needs about .* has 0.0 MB free"):
        convert(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()
