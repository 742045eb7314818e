"""Layouts of public projects, made small: every value, type, order, length and label equals the source to the bit."""

from __future__ import annotations

import gzip
import json
import pickle
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch_geometric.data import Data, InMemoryDataset

import dali_pipeline as dp
from dali_pipeline.cli.app import app, run
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from dali_pipeline.ingest.layouts.recipe import Recipe, parse_fields, read_recipe
from dali_pipeline.tools.verify import verify

rng = np.random.default_rng(0)


def taken(
    src: Path, recipe: Recipe | None = None, dst: Path | None = None, **options: Any
) -> tuple[dp.Dataset, dict[str, Any]]:
    """Convert, verify, and return the data set and its records by id."""
    target = dst or src.parent / "dst"
    data = convert(src, target, ConvertConfig(recipe=recipe or Recipe(), num_workers=1, **options))
    assert verify(data.folder).damages == []
    records = {}
    for split in data.splits:
        for row in range(data.num_records(split, "sequences")):
            record = data.record(split, row)
            assert record.id not in records
            records[record.id] = record
    return data, records


def bf16(*shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32)).bfloat16()


def f32(*shape: int) -> Any:
    return rng.normal(size=shape).astype(np.float32)


def equal(given: Any, expected: Any) -> None:
    """Assert equal shapes and equal bits."""
    array = expected.float().numpy() if isinstance(expected, torch.Tensor) and expected.dtype == torch.bfloat16 else expected
    array = np.asarray(array)
    assert np.shape(given) == array.shape
    assert np.array_equal(np.asarray(given), array)


def sequence_dtype(data: dp.Dataset) -> str:
    assert data.schema.sequence is not None
    return data.schema.sequence.dtype


def test_vllm_hidden_states(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    states = {f"hs_{number}": bf16(2 + number % 5, 3, 4) for number in range(12)}
    ids = {name: torch.randint(0, 50_000, (len(states[name]),)) for name in states}
    for name, tensor in states.items():
        save_file({"hidden_states": tensor, "token_ids": ids[name]}, tmp_path / "src" / f"{name}.safetensors")
    data, records = taken(tmp_path / "src")
    assert sequence_dtype(data) == "bfloat16"
    assert (data.schema.steps, data.schema.sequence.axes) == ("token", ("layer", "feature"))  # type: ignore[union-attr]
    assert data.schema.labels.kind == "none"
    assert data.schema.step_fields["step.token_ids"].dtype == "int64"
    assert sorted(records) == sorted(states)
    for name, record in records.items():
        equal(record.sequence, states[name])
        equal(record.fields["token_ids"], ids[name])
        assert record.label is None
    (tmp_path / "labels.csv").write_text("\n".join(["id,label", *(f"{name},{len(name) % 2}" for name in states)]))
    _, records = taken(tmp_path / "src", Recipe(labels_from=f"{tmp_path}/labels.csv"), tmp_path / "labelled")
    assert {name: record.label for name, record in records.items()} == {name: len(name) % 2 for name in states}
    data, records = taken(tmp_path / "src", dst=tmp_path / "few", layers=[0, 2])
    for name, record in records.items():
        equal(record.sequence, states[name][:, [0, 2]])


def test_honest_llama(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "src").mkdir()
    layer_wise, labels = f32(20, 5, 8), rng.integers(0, 2, 20)
    np.save(tmp_path / "src" / "llama_tqa_layer_wise.npy", layer_wise)
    np.save(tmp_path / "src" / "llama_tqa_head_wise.npy", f32(20, 4, 8))
    np.save(tmp_path / "src" / "llama_tqa_labels.npy", labels)
    data, records = taken(tmp_path / "src")
    assert (data.schema.steps, sequence_dtype(data)) == ("layer", "float32")
    assert len(records) == 20
    for row in range(20):
        record = records[f"llama_tqa_layer_wise-{row}"]
        equal(record.sequence, layer_wise[row])
        assert record.label == labels[row]
    assert "{set}_head_wise" in caplog.text
    _, heads = taken(tmp_path / "src", Recipe(sequence="{set}_head_wise"), tmp_path / "heads")
    equal(heads["llama_tqa_head_wise-3"].sequence, np.load(tmp_path / "src" / "llama_tqa_head_wise.npy")[3])
    assert heads["llama_tqa_head_wise-3"].label == labels[3]


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_haloscope(tmp_path: Path, threshold: float | None) -> None:
    (tmp_path / "src").mkdir()
    states, scores = f32(15, 4, 6), rng.random(15).astype(np.float32)
    np.save(tmp_path / "src" / "embeddings.npy", states)
    np.save(tmp_path / "src" / "bleurt.npy", scores)
    data, records = taken(tmp_path / "src", Recipe(label_threshold=threshold))
    assert data.schema.labels.kind == ("value" if threshold is None else "class")
    for row in range(15):
        record = records[f"embeddings-{row}"]
        equal(record.sequence, states[row])
        assert record.label == (scores[row] if threshold is None else int(scores[row] < threshold))


def test_dictionary_learning(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    shards = [bf16(10, 6), bf16(7, 6)]
    for number, shard in enumerate(shards):
        (tmp_path / "src" / f"shard_{number}.memmap").write_bytes(shard.view(torch.int16).numpy().tobytes())
        meta = {"shape": list(shard.shape), "dtype": "torch.bfloat16"}
        (tmp_path / "src" / f"shard_{number}.meta").write_text(json.dumps(meta))
    data, records = taken(tmp_path / "src")
    assert sequence_dtype(data) == "bfloat16"
    assert len(records) == 17
    for number, shard in enumerate(shards):
        for row in range(len(shard)):
            equal(records[f"shard_{number}-{row}"].sequence, shard[row : row + 1])


def test_eeg_windows(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    windows = [f32(4, 9) for _ in range(10)]
    for number, window in enumerate(windows):
        np.savez(tmp_path / "src" / f"window_{number}.npz", X=window, y=number % 3)
    data, records = taken(tmp_path / "src", Recipe(sequence="X", label="y", axes=("channel", "time")))
    assert (data.schema.steps, data.schema.sequence.axes) == ("time", ("channel",))  # type: ignore[union-attr]
    for number, window in enumerate(windows):
        equal(records[f"window_{number}"].sequence, window.T)
        assert records[f"window_{number}"].label == number % 3


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_stacked_by_any_key(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "src").mkdir()
    values, labels, mask = f32(30, 6, 4), rng.integers(0, 4, 30), np.zeros((30, 6), np.int64)
    lengths = rng.integers(1, 7, 30)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    tokens, scores = rng.integers(0, 99, (30, 6)).astype(np.int32), f32(30)
    arrays = {"acts": values, "target": labels, "mask": mask, "tokens": tokens, "score": scores, "who": np.arange(30) + 100}
    if suffix == "npz":
        np.savez(tmp_path / "src" / "a.npz", **arrays)
    else:
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / "src" / "a.safetensors")
    fields = (("step.tokens", "tokens"), ("record.score", "score"))
    recipe = Recipe(sequence="acts", label="target", mask="mask", id="who", fields=fields)
    data, records = taken(tmp_path / "src", recipe)
    assert data.schema.step_fields["step.tokens"].dtype == "int32"
    assert sorted(records) == sorted(str(100 + row) for row in range(30))
    for row, length in enumerate(lengths):
        record = records[str(100 + row)]
        equal(record.sequence, values[row, :length])
        equal(record.fields["tokens"], tokens[row, :length])
        equal(record.fields["score"], scores[row])
        assert record.label == labels[row]


@pytest.mark.parametrize("suffix", [".ckpt", ".ckpt.gz"])
def test_specforge(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "src").mkdir()
    samples = {}
    for number in range(8):
        steps = 1 + number
        sample = {
            "input_ids": torch.randint(0, 999, (steps,)),
            "loss_mask": torch.randint(0, 2, (steps,)),
            "hidden_state": bf16(1, steps, 6),
            "aux_hidden_state": bf16(1, steps, 18),
        }
        samples[f"data_{number}"] = sample
        path = tmp_path / "src" / f"data_{number}{suffix}"
        with gzip.open(path, "wb") if suffix.endswith("gz") else path.open("wb") as file:
            torch.save(sample, file)  # type: ignore[arg-type]
    data, records = taken(tmp_path / "src")
    assert sequence_dtype(data) == "bfloat16"
    assert data.schema.steps == "token"
    assert sorted(records) == sorted(samples)
    for name, record in records.items():
        equal(record.sequence, samples[name]["hidden_state"][0])
        equal(record.fields["input_ids"], samples[name]["input_ids"])
        equal(record.fields["loss_mask"], samples[name]["loss_mask"])
    assert "aux_hidden_state" in caplog.text
    _, records = taken(tmp_path / "src", Recipe(sequence="aux_hidden_state"), tmp_path / "aux")
    for name, record in records.items():
        equal(record.sequence, samples[name]["aux_hidden_state"][0])


def test_saelens(tmp_path: Path) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    states, ids = f32(23, 5, 4), rng.integers(0, 999, (23, 5)).astype(np.int32)
    table = pa.table(
        {
            "blocks.8.hook_resid_post": pa.array(states.tolist(), pa.list_(pa.list_(pa.float32()))),
            "token_ids": pa.array(ids.tolist(), pa.list_(pa.int32())),
        }
    )
    for number, (begin, end) in enumerate([(0, 12), (12, 23)]):
        path = str(folder / f"data-{number:05d}-of-00002.arrow")
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table.slice(begin, end - begin))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text("{}")
    data, records = taken(folder)
    assert (sequence_dtype(data), data.schema.labels.kind) == ("float32", "none")
    assert data.schema.step_fields["step.token_ids"].dtype == "int32"
    for row in range(23):
        record = records[f"data-0000{row // 12}-of-00002-{row % 12}"]
        equal(record.sequence, states[row])
        equal(record.fields["token_ids"], ids[row])


def test_semantic_entropy_probes(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    content = {
        f"q{number}": {
            "question": "why?",
            "most_likely_answer": {
                "embedding": torch.randn(1, 6),
                "emb_last_tok_before_gen": torch.randn(4, 1, 6),
                "accuracy": float(number % 2),
            },
        }
        for number in range(9)
    }
    (tmp_path / "src" / "train_generations.pkl").write_bytes(pickle.dumps(content))
    answer = "most_likely_answer"
    keys = Recipe(sequence=f"{answer}.emb_last_tok_before_gen", label=f"{answer}.accuracy", axes=("layer", "feature"))
    data, records = taken(tmp_path / "src", keys)
    assert (data.schema.steps, data.schema.labels.kind) == ("layer", "class")
    assert sorted(records) == sorted(content)
    for name, record in records.items():
        equal(record.sequence, content[name][answer]["emb_last_tok_before_gen"][:, 0].numpy())  # type: ignore[index]
        assert record.label == int(name[1:]) % 2
    _, records = taken(tmp_path / "src", Recipe(sequence=f"{answer}.embedding", label=f"{answer}.accuracy"), tmp_path / "one")
    for name, record in records.items():
        equal(record.sequence, content[name][answer]["embedding"].numpy())  # type: ignore[index]


def test_geometry_of_truth(tmp_path: Path) -> None:
    folder = tmp_path / "src" / "cities"
    folder.mkdir(parents=True)
    states = {layer: bf16(60, 6) for layer in (6, 7, 8, 9, 10)}
    for layer, rows in states.items():
        for begin in (0, 25, 50):
            torch.save(rows[begin : begin + 25].clone(), folder / f"layer_{layer}_{begin}.pt")
    labels = rng.integers(0, 2, 60)
    lines = ["statement,label", *(f'"City {row}, of",{label}' for row, label in enumerate(labels))]
    (tmp_path / "cities.csv").write_text("\n".join(lines))
    recipe = Recipe(sequence="layer_{layer}_{row}.pt", labels_from=f"{tmp_path}/cities.csv::label")
    data, records = taken(tmp_path / "src", recipe)
    assert (data.schema.steps, data.schema.layers, sequence_dtype(data)) == ("layer", (6, 7, 8, 9, 10), "bfloat16")
    assert len(records) == 60
    for row in range(60):
        record = records[f"cities/layer_6_{row // 25 * 25}-{row % 25}"]
        equal(record.sequence, torch.stack([states[layer][row] for layer in states]))
        assert record.label == labels[row]
    _, records = taken(tmp_path / "src", recipe, tmp_path / "few", layers=[7, 10])
    equal(records["cities/layer_6_25-3"].sequence, torch.stack([states[7][28], states[10][28]]))
    (folder / "layer_8_25.pt").unlink()
    with pytest.raises(dp.FormatError, match=r"has no layer_8_25\.pt"):
        taken(tmp_path / "src", recipe, tmp_path / "gap")
    for layer in states:
        (folder / f"layer_{layer}_25.pt").unlink(missing_ok=True)
    with pytest.raises(dp.FormatError, match=r"layer_\*_25\.pt is missing"):
        taken(tmp_path / "src", recipe, tmp_path / "gap")


def test_lookback_lens(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    content = [
        {"lookback_ratio": torch.randn(3, 2, 4 + number), "model_completion_ids": list(range(4 + number))}
        for number in range(7)
    ]
    torch.save(content, tmp_path / "src" / "lookback.pt")
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps({"index": n, "is_correct": n % 2}) for n in range(7)))
    recipe = Recipe(
        sequence="lookback_ratio",
        axes=("layer", "head", "token"),
        fields=(("step.ids", "model_completion_ids"),),
        labels_from=f"{tmp_path}/labels.jsonl::is_correct",
    )
    data, records = taken(tmp_path / "src", recipe)
    assert (data.schema.steps, data.schema.sequence.axes) == ("token", ("layer", "head"))  # type: ignore[union-attr]
    for row, sample in enumerate(content):
        record = records[f"lookback-{row}"]
        equal(record.sequence, np.moveaxis(sample["lookback_ratio"].numpy(), 2, 0))  # type: ignore[attr-defined]
        equal(record.fields["ids"], np.arange(4 + row))
        assert record.label == row % 2


@pytest.mark.parametrize("tokens", [0, 5])
def test_sae_probes(tmp_path: Path, tokens: int) -> None:
    (tmp_path / "src").mkdir()
    shape = (12, tokens, 6) if tokens else (12, 6)
    states = {layer: torch.randn(shape) for layer in (3, 9, 12)}
    for layer, rows in states.items():
        torch.save(rows, tmp_path / "src" / f"87_glue_blocks.{layer}.hook_resid_post.pt")
    (tmp_path / "y.csv").write_text(
        "\n".join(["prompt,target", *(f"p{row},{'yes' if row % 3 else 'no'}" for row in range(12))])
    )
    recipe = Recipe(sequence="{set}_blocks.{layer}.hook_resid_post.pt", labels_from=f"{tmp_path}/y.csv::target")
    data, records = taken(tmp_path / "src", recipe)
    assert data.schema.layers == (3, 9, 12)
    assert data.schema.labels.class_names == ("no", "yes")
    assert data.schema.steps == ("token" if tokens else "layer")
    for row in range(12):
        record = records[f"87_glue_blocks.3.hook_resid_post-{row}"]
        layered = np.stack([states[layer][row].numpy() for layer in states], axis=1 if tokens else 0)
        equal(record.sequence, layered)
        assert record.label == int(bool(row % 3))


def test_layers_in_keys(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    states = {layer: f32(10, 4) for layer in range(12)}
    arrays = {f"blocks.{layer}.hook_resid_post": rows for layer, rows in states.items()}
    np.savez(tmp_path / "src" / "a.npz", **arrays, y=np.linspace(0, 1, 10))
    data, records = taken(tmp_path / "src", Recipe(sequence="blocks.{layer}.hook_resid_post"))
    assert (data.schema.layers, data.schema.labels.kind) == (tuple(range(12)), "value")
    for row in range(10):
        equal(records[f"a-{row}"].sequence, np.stack([states[layer][row] for layer in range(12)]))
        assert records[f"a-{row}"].label == np.float32(np.linspace(0, 1, 10)[row])
    for layer in (2, *range(4, 12)):
        del arrays[f"blocks.{layer}.hook_resid_post"]
    np.savez(tmp_path / "src" / "a.npz", **arrays)
    with pytest.raises(dp.FormatError, match=r"has no blocks\.2\.hook_resid_post"):
        taken(tmp_path / "src", Recipe(sequence="blocks.{layer}.hook_resid_post"), tmp_path / "gap")


def graphs_of(data: dp.Dataset) -> dict[str, Any]:
    found = {}
    for split in data.splits:
        for row in range(data.num_records(split, "graphs")):
            record = data.record(split, row)
            found[record.id] = record
    return found


def random_graph(nodes: int, **more: Any) -> Data:
    edges = torch.randint(0, nodes, (2, 2 * nodes + 1))
    return Data(x=torch.randn(nodes, 4).half(), edge_index=edges, edge_attr=torch.randn(2 * nodes + 1, 3).half(), **more)


def compare(record: Any, graph: Data) -> None:
    equal(record.graphs.x, graph.x.numpy())
    equal(record.graphs.edge_index, graph.edge_index.numpy())
    equal(record.graphs.edge_attr, graph.edge_attr.numpy())


@pytest.mark.parametrize("by_token", [False, True])
def test_charm(tmp_path: Path, by_token: bool) -> None:
    (tmp_path / "src" / "raw").mkdir(parents=True)
    graphs = []
    for number in range(11):
        nodes = 5 + number
        rows = torch.arange(3, nodes)
        y = torch.randint(0, 2, (len(rows),)) if by_token else torch.tensor(number % 2)
        more = {
            "response_index": rows,
            "prompt_len": 3,
            "data_idx": number,
            "head": torch.arange(2 * nodes + 1),
            "name": f"é{number}",
        }
        graphs.append(random_graph(nodes, y=y, pos=torch.randn(nodes, 2), **more))
    torch.save(graphs, tmp_path / "src" / "raw" / "data_list.pt")
    data = convert(tmp_path / "src", tmp_path / "dst", ConvertConfig(num_workers=1))
    assert verify(data.folder).damages == []
    assert data.schema.x.dtype == data.schema.edge_attr.dtype == "float16"  # type: ignore[union-attr]
    records = graphs_of(data)
    assert len(records) == 11
    for number, graph in enumerate(graphs):
        record = records[f"raw/data_list-{number}"]
        compare(record, graph)
        equal(record.graphs.fields["node.pos"], graph.pos.numpy())
        equal(record.graphs.fields["edge.head"], graph.head.numpy())
        assert (record.fields["prompt_len"], record.fields["data_idx"], record.fields["name"]) == (3, number, f"é{number}")
        if by_token:
            equal(record.graphs.fields["node.target"][3:], graph.y.numpy())
            equal(record.graphs.fields["node.is_target"], np.arange(5 + number) >= 3)
            assert record.label is None
        else:
            assert record.label == number % 2


@pytest.mark.parametrize("form", ["one per file", "in memory", "in memory, older"])
def test_processed_graphs(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "src" / "processed"
    folder.mkdir(parents=True)
    graphs = [random_graph(2 + number, y=torch.tensor([number / 4])) for number in range(9)]
    torch.save("nothing", folder / "pre_transform.pt")
    if form == "one per file":
        for number, graph in enumerate(graphs):
            torch.save(graph, folder / f"data_{number}.pt")
    else:
        merged, slices = InMemoryDataset.collate(graphs)
        torch.save((merged, slices) if "older" in form else (merged.to_dict(), slices, Data), folder / "data.pt")
    data = convert(tmp_path / "src", tmp_path / "dst", ConvertConfig(num_workers=1))
    assert data.schema.labels.kind == "value"
    records = graphs_of(data)
    for number, graph in enumerate(graphs):
        record = records[f"processed/data_{number}" if form == "one per file" else f"processed/data-{number}"]
        compare(record, graph)
        assert record.label == np.float32(number / 4)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dali_pipeline", *arguments])
    return run(app, "dali_pipeline")


def test_dry_run_says_what_convert_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src = tmp_path / "src"
    src.mkdir()
    for number in range(20):
        np.savez(src / f"window_{number}.npz", X=f32(4, 9), y=number % 2, who="x")
    assert call(monkeypatch, "convert", str(src), "--dry-run") == 2
    out, _ = capsys.readouterr()
    assert "X: float32 [4, 9]" in out
    command = out.splitlines()[-1].strip().replace("DST", str(tmp_path / "dst"))
    assert "--sequence X --label y" in command
    assert list(tmp_path.iterdir()) == [src]
    arguments = shlex.split(command)[3:]
    assert call(monkeypatch, *arguments, "--axes", "channel,time", "--dry-run") == 0
    out, _ = capsys.readouterr()
    assert "records: 20 in 20 files" in out
    assert "not taken: who" in out
    assert "sequence: float32 [4] per time, axes time, channel" in out
    assert "labels: class (0: 10, 1: 10)" in out
    assert list(tmp_path.iterdir()) == [src]
    assert call(monkeypatch, *shlex.split(out.splitlines()[-1])[3:]) == 0
    assert dp.open_dataset(tmp_path / "dst").schema.steps == "time"
    capsys.readouterr()
    assert call(monkeypatch, "convert", str(src), str(tmp_path / "other")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "X: float32 [4, 9]" in err
    assert f"convert {src} {tmp_path / 'other'} --sequence X --label y" in err
    assert not (tmp_path / "other").exists()


def many(folder: Path, count: int = 30) -> dict[str, Any]:
    """Write `count` files of one record each, `acts` (4, 3) and `y`; return the values."""
    folder.mkdir(parents=True)
    values = {f"r_{number}": f32(4, 3) for number in range(count)}
    for number, (name, rows) in enumerate(values.items()):
        save_file({"acts": torch.from_numpy(rows), "y": torch.tensor(number % 2)}, folder / f"{name}.safetensors")
    return values


ACTS = Recipe(sequence="acts", label="y")


def spoil_shape(path: Path) -> None:
    save_file({"acts": torch.zeros(4, 5), "y": torch.tensor(0)}, path)


def spoil_dtype(path: Path) -> None:
    save_file({"acts": torch.zeros(4, 3).double(), "y": torch.tensor(0)}, path)


def spoil_label(path: Path) -> None:
    save_file({"acts": torch.zeros(4, 3)}, path)


def spoil_value(path: Path) -> None:
    save_file({"acts": torch.zeros(4, 3), "y": torch.tensor(-1)}, path)


def spoil_by_cutting(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_shape, r"acts has rows of the shape \(5,\); expected \(3,\) as in the first file"),
        (spoil_dtype, r"sequence is float64, and float32 in the first file; give --dtype"),
        (spoil_label, r"has no key 'y'; there are acts"),
        (spoil_value, r"has the label -1; expected a whole number"),
        (spoil_by_cutting, r""),
    ],
)
@pytest.mark.parametrize("number", [17, 0])
def test_one_bad_file_is_one_sentence(tmp_path: Path, spoil: Any, words: str, number: int) -> None:
    many(tmp_path / "src")
    spoil(tmp_path / "src" / f"r_{number}.safetensors")
    if number:
        with pytest.raises(dp.PipelineError, match=rf"r_17\.safetensors.*{words}") as caught:
            taken(tmp_path / "src", ACTS)
        assert "\n" not in str(caught.value)
        _, records = taken(tmp_path / "src", ACTS, tmp_path / "rest", skip_bad=True)
        assert len(records) == 29
    elif spoil is spoil_by_cutting:
        _, records = taken(tmp_path / "src", ACTS, tmp_path / "rest", skip_bad=True)
        assert len(records) == 29


def test_labels_by_id(tmp_path: Path) -> None:
    values = many(tmp_path / "src", 12)
    lines = ["id,score", *(f"{name},{number / 10}" for number, name in enumerate(reversed(values)))]
    (tmp_path / "scores.csv").write_text("\n".join(lines))
    recipe = Recipe(sequence="acts", labels_from=f"{tmp_path}/scores.csv:id:score", label_above=0.45)
    _, records = taken(tmp_path / "src", recipe)
    for number, name in enumerate(reversed(values)):
        assert records[name].label == int(number / 10 > 0.45)
        equal(records[name].sequence, values[name])
    (tmp_path / "scores.csv").write_text("\n".join([*lines, "nobody,0.3"]))
    with pytest.raises(dp.DataError, match=r"scores\.csv has labels of 1 ids that no record has, such as 'nobody'"):
        taken(tmp_path / "src", recipe, tmp_path / "other")
    _, records = taken(tmp_path / "src", recipe, tmp_path / "other", skip_bad=True)
    assert len(records) == 12
    (tmp_path / "scores.csv").write_text("\n".join(lines[:-1]))
    with pytest.raises(dp.FormatError, match=r"r_0\.safetensors: record 'r_0' has no label in .*scores\.csv.*the nearest is"):
        taken(tmp_path / "src", recipe, tmp_path / "third")
    by_order = Recipe(sequence="acts", labels_from=f"{tmp_path}/scores.csv::score")
    with pytest.raises(
        dp.DataError,
        match=r"has 11 labels, and .* 48 records \(12 by --layout record-per-file\); expected equal numbers",
    ):
        taken(tmp_path / "src", by_order, tmp_path / "third")
    with pytest.raises(dp.UsageError, match=r"has no column 'scores'; the nearest is 'score'"):
        taken(tmp_path / "src", Recipe(sequence="acts", labels_from=f"{tmp_path}/scores.csv:id:scores"), tmp_path / "third")


def test_keys_that_match_nothing_name_the_nearest(tmp_path: Path) -> None:
    many(tmp_path / "src")
    with pytest.raises(dp.UsageError, match=r"no key and no file called 'act'; the nearest is 'acts'"):
        taken(tmp_path / "src", Recipe(sequence="act"))
    with pytest.raises(dp.UsageError, match=r"has no key 'label', .*; there are y, acts"):
        taken(tmp_path / "src", Recipe(sequence="acts", label="label"))
    with pytest.raises(dp.UsageError, match=r"acts has records of the shape \(4, 3\), and --axes names 3"):
        taken(tmp_path / "src", Recipe(sequence="acts", axes=("a", "b", "c"), layout="record-per-file"))


def test_labels_that_are_texts_values_or_missing(tmp_path: Path) -> None:
    values = f32(8, 3, 2)
    np.savez(tmp_path / "a.npz", acts=values, y=np.array(["cat", "dog", "cat", "eel", "dog", "cat", "cat", "dog"]))
    data, records = taken(tmp_path / "a.npz", Recipe(sequence="acts", label="y"), tmp_path / "1")
    assert data.schema.labels.class_names == ("cat", "dog", "eel")
    assert [records[f"a-{row}"].label for row in range(8)] == [0, 1, 0, 2, 1, 0, 0, 1]
    for number, (labels, kind) in enumerate(
        [
            (np.arange(8.0), "class"),
            (np.arange(8) - 0.5, "value"),
            (rng.random((8, 3)), "value"),
            (rng.random((8, 3)) > 0.5, "multilabel"),
            (np.arange(8) > 3, "class"),
        ]
    ):
        np.savez(tmp_path / "a.npz", acts=values, y=labels)
        data, records = taken(tmp_path / "a.npz", Recipe(sequence="acts", label="y"), tmp_path / f"k{number}")
        assert data.schema.labels.kind == kind
        for row in range(8):
            assert np.array_equal(records[f"a-{row}"].label, labels[row].astype(np.float32) if kind == "value" else labels[row])
    np.savez(tmp_path / "a.npz", acts=values, y=np.array([0.5, np.nan] * 4))
    with pytest.raises(dp.FormatError, match=r"a\.npz, record 'a-1' has the label nan, which is none"):
        taken(tmp_path / "a.npz", Recipe(sequence="acts", label="y"), tmp_path / "nan")
    data, _ = taken(tmp_path / "a.npz", Recipe(sequence="acts", label_kind="none"), tmp_path / "none")
    assert data.schema.labels.kind == "none"


def test_records_one_after_the_other(tmp_path: Path) -> None:
    lengths = np.array([3, 1, 5, 2])
    values, tokens = f32(11, 6), np.arange(11)
    save_file(
        {"h": torch.from_numpy(values), "n": torch.from_numpy(lengths), "t": torch.from_numpy(tokens)},
        tmp_path / "a.safetensors",
    )
    recipe = Recipe(sequence="h", lengths="n", fields=(("step.t", "t"),), label_kind="none")
    _, records = taken(tmp_path / "a.safetensors", recipe)
    for row, (rows, ids) in enumerate(
        zip(np.split(values, np.cumsum(lengths)[:-1]), np.split(tokens, np.cumsum(lengths)[:-1]), strict=True)
    ):
        equal(records[f"a-{row}"].sequence, rows)
        equal(records[f"a-{row}"].fields["t"], ids)


def test_one_array_per_file(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    values = [f32(3 + number, 4) for number in range(8)]
    for number, rows in enumerate(values):
        np.save(tmp_path / "src" / f"x_{number}.npy", rows)
        np.save(tmp_path / "src" / f"label_{number}.npy", np.int64(number % 3))
    recipe = Recipe(sequence="x_{n}", label="label_{n}", layout="record-per-file", axes=("time", "channel"))
    data, records = taken(tmp_path / "src", recipe)
    assert data.schema.steps == "time"
    for number, rows in enumerate(values):
        equal(records[f"x_{number}"].sequence, rows)
        assert records[f"x_{number}"].label == number % 3


RECIPE_YAML = """
sequence: X
label: y
axes: [channel, time]
field:
  record.who: who
labels_from: null
"""


def test_a_recipe_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE_YAML.replace("labels_from: null\n", "label-threshold: 0.5\n"))
    recipe = read_recipe(path)
    assert recipe == Recipe(
        sequence="X", label="y", axes=("channel", "time"), fields=(("record.who", "who"),), label_threshold=0.5
    )
    assert Recipe(label_above=3).over(recipe) == Recipe(
        sequence="X", label="y", axes=("channel", "time"), fields=(("record.who", "who"),), label_above=3
    )
    assert parse_fields(recipe.flags()[-1:] if "=" in recipe.flags()[-1] else ["record.who=who"]) == recipe.fields
    (tmp_path / "labels.csv").write_text("label\n1\n")
    path.write_text("labels-from: labels.csv::label\n")
    assert read_recipe(path).labels_from == f"{tmp_path}/labels.csv::label"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sequences: X", "unknown name 'sequences'; the nearest is 'sequence'"),
        ("a: &a [x, x]\nb: *a", "anchors, aliases or tags"),
        ("sequence: !!python/object/apply:os.system ['true']", "anchors, aliases or tags"),
        ("sequence: [a, b]", "sequence is .*; expected one text"),
        ("label-threshold: high", "label-threshold is 'high'; expected a number"),
        ("- a", "holds no names and values"),
        ("field: {token_ids: a}", "field 'token_ids' has no such level"),
        ("layout: piled", "layout is 'piled'"),
        ("sequence: {", "cannot be read as YAML"),
        ("x" * 70_000, "larger than 64 KiB"),
        ("[" * 2_000, "cannot be read as YAML"),
    ],
)
def test_recipe_files_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(dp.UsageError, match=words) as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(caught.value)


def test_a_restart_notices_another_recipe(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", acts=f32(5, 3, 2), y=np.linspace(0, 1, 5))
    taken(tmp_path / "a.npz", Recipe(sequence="acts", label="y", label_above=0.5))
    taken(tmp_path / "a.npz", Recipe(sequence="acts", label="y", label_above=0.5))
    with pytest.raises(dp.UsageError, match="other files or settings"):
        taken(tmp_path / "a.npz", Recipe(sequence="acts", label="y", label_above=0.6))


def test_records_with_keys_of_their_own(tmp_path: Path) -> None:
    values = [f32(2 + number, 4) for number in range(11)]
    labels = rng.integers(0, 3, 11)
    arrays = {f"sample_{number}": torch.from_numpy(rows) for number, rows in enumerate(values)}
    arrays |= {f"label_{number}": torch.tensor(labels[number]) for number in range(11)} | {"all": torch.from_numpy(labels)}
    save_file(arrays, tmp_path / "a.safetensors")
    for label in ("label_{row}", "all"):
        recipe = Recipe(sequence="sample_{row}", label=label)
        _, records = taken(tmp_path / "a.safetensors", recipe, tmp_path / label.strip("{}"))
        for number, rows in enumerate(values):
            equal(records[f"a-{number}"].sequence, rows)
            assert records[f"a-{number}"].label == labels[number]
    del arrays["sample_4"]
    save_file(arrays, tmp_path / "a.safetensors")
    with pytest.raises(dp.FormatError, match="has no row 4 between 3 and 5; expected no gap"):
        taken(tmp_path / "a.safetensors", Recipe(sequence="sample_{row}"), tmp_path / "gap")
    named = {f"{name}/layer{layer}": f32(6) for name in ("ann", "bob") for layer in (1, 2, 3)}
    np.savez(tmp_path / "b.npz", **named)
    data, records = taken(tmp_path / "b.npz", Recipe(sequence="{id}/layer{layer}"), tmp_path / "named")
    assert data.schema.layers == (1, 2, 3)
    for name in ("ann", "bob"):
        equal(records[name].sequence, np.stack([named[f"{name}/layer{layer}"] for layer in (1, 2, 3)]))


def test_a_tuple_and_folders_paired_by_stem(tmp_path: Path) -> None:
    x, y = torch.randn(12, 5, 3), torch.randint(0, 2, (12,))
    torch.save((x, y), tmp_path / "pair.pt")
    _, records = taken(tmp_path / "pair.pt", Recipe(sequence="[0]", label="[1]"), tmp_path / "pairs")
    for row in range(12):
        equal(records[f"pair-{row}"].sequence, x[row].numpy())
        assert records[f"pair-{row}"].label == int(y[row])
    for folder in ("x", "y"):
        (tmp_path / "src" / folder).mkdir(parents=True)
    for row in range(12):
        np.save(tmp_path / "src" / "x" / f"{row}.npy", x[row].numpy())
        np.save(tmp_path / "src" / "y" / f"{row}.npy", y[row].numpy())
    recipe = Recipe(sequence="x/{n}", label="y/{n}", layout="record-per-file")
    _, records = taken(tmp_path / "src", recipe, tmp_path / "paired")
    for row in range(12):
        equal(records[f"x/{row}"].sequence, x[row].numpy())
        assert records[f"x/{row}"].label == int(y[row])


def test_tables_and_lines_by_any_column(tmp_path: Path) -> None:
    values, ids = [f32(2 + row % 3, 4) for row in range(10)], [f"who{row}" for row in range(10)]
    table = pa.table({"name": ids, "acts": [rows.tolist() for rows in values], "good": [row / 4 for row in range(10)]})
    table = table.set_column(1, "acts", table["acts"].cast(pa.list_(pa.list_(pa.float32()))))
    pq.write_table(table, tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    for suffix in ("parquet", "jsonl"):
        recipe = Recipe(sequence="acts", label="good", id="name")
        data, records = taken(tmp_path / f"t.{suffix}", recipe, tmp_path / suffix)
        assert data.schema.labels.kind == "value"
        for row, rows in enumerate(values):
            equal(np.asarray(records[ids[row]].sequence, np.float32), rows)
            assert records[ids[row]].label == np.float32(row / 4)


def test_hdf5_windows(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "src").mkdir()
    windows = [f32(4, 9) for _ in range(6)]
    for number, window in enumerate(windows):
        with h5py.File(tmp_path / "src" / f"w{number}.h5", "w") as file:
            file["X"], file["y"] = window, number % 2
    _, records = taken(tmp_path / "src", Recipe(sequence="X", label="y", axes=("channel", "time")))
    for number, window in enumerate(windows):
        equal(records[f"w{number}"].sequence, window.T)
        assert records[f"w{number}"].label == number % 2


def test_raw_traces_take_their_scores_by_the_new_words(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    traces = [
        {
            "question_id": f"q{number}",
            "hidden_states": [f32(3, 4)] * 2,
            "attentions": [rng.random((2, 3, 3)).astype(np.float32)] * 2,
        }
        for number in range(6)
    ]
    (tmp_path / "src" / "a.pkl").write_bytes(pickle.dumps(traces))
    (tmp_path / "s.csv").write_text("\n".join(["question_id,bleurt", *(f"q{number},{number / 5}" for number in range(6))]))
    reference = f"{tmp_path}/s.csv:question_id:bleurt"
    for name, recipe, one in (
        ("below", Recipe(labels_from=reference, label_threshold=0.5), {0, 1, 2}),
        ("above", Recipe(labels_from=reference, label_above=0.5), {3, 4, 5}),
    ):
        _, records = taken(tmp_path / "src", recipe, tmp_path / name)
        assert {number for number in range(6) if records[f"q{number}"].label == 1} == one


def test_the_estimate_of_the_space_counts_further_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, rng, estimates = tmp_path / "src", np.random.default_rng(0), list[int]()
    src.mkdir()
    np.savez(
        src / "all.npz",
        states=rng.standard_normal((400, 20, 8)).astype(np.float16),
        tokens=rng.integers(0, 9, (400, 20)),
        score=rng.random((400, 64)),
        question=np.array(["why is it so? " * 9] * 400),
        label=rng.integers(0, 2, 400),
    )
    monkeypatch.setattr("dali_pipeline.ingest.convert.check_space", lambda needed, _dst: estimates.append(needed))
    fields = (("step.tokens", "tokens"), ("record.score", "score"), ("record.question", "question"))
    data, _ = taken(src, Recipe(sequence="states", label="label", fields=fields))
    written = sum(path.stat().st_size for path in data.folder.glob("*/*.safetensors"))
    assert 0.85 * written < estimates[0] < 1.05 * written


def write_vllm(folder: Path, count: int = 12) -> list[dict[str, Any]]:
    """Write hidden states as vLLM does, and beside the folder JSON lines of prompts, answers and scores."""
    folder.mkdir()
    rows = []
    for number in range(count):
        states, ids = bf16(2 + number % 5, 3, 4), torch.randint(0, 50_000, (2 + number % 5,))
        save_file({"hidden_states": states, "token_ids": ids}, folder / f"hs_{number}.safetensors")
        rows.append(
            {
                "id": f"hs_{number}",
                "question_id": number // 2,
                "prompt": f"Frage {number}?",
                "answer": f"Antwort {number} – ü" if number else "",
                "score": number / count,
                "prompt_steps": 1 + number % 2,
            }
        )
    lines = [json.dumps(row) + "\n" for row in reversed(rows)]  # by id, not by order
    (folder.parent / "answers.jsonl").write_text("".join(lines))
    return rows


VLLM_FIELDS = parse_fields(["record.prompt=prompt", "record.answer=answer", "record.prompt_steps=prompt_steps"])


@pytest.mark.parametrize("in_place", [False, True])
def test_vllm_with_prompts_answers_and_scores_beside(tmp_path: Path, in_place: bool) -> None:
    rows = write_vllm(tmp_path / "src")
    recipe = Recipe(
        labels_from=f"{tmp_path}/answers.jsonl:id:score", label_threshold=0.5, group="question_id", fields=VLLM_FIELDS
    )
    data, records = taken(tmp_path / "src", recipe, in_place=in_place)
    fields = data.schema.record_fields
    assert {name: field.dtype for name, field in fields.items()} == {
        "record.prompt": "text",
        "record.answer": "text",
        "record.prompt_steps": "int64",
    }
    assert sorted(records) == sorted(row["id"] for row in rows)
    for row in rows:
        record = records[row["id"]]
        assert record.label == int(row["score"] < 0.5)
        assert record.group == str(row["question_id"])
        assert record.fields["prompt"] == row["prompt"]
        assert record.fields["answer"] == row["answer"]
        assert int(record.fields["prompt_steps"]) == row["prompt_steps"]
        assert len(record.fields["token_ids"]) == len(record.sequence)


def test_columns_beside_stacked_records(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    states, names = f32(10, 3, 4), [f"r{number}" for number in range(10)]
    np.savez(tmp_path / "src" / "states.npz", acts=states, ids=np.array(names))
    lines = [json.dumps({"id": name, "y": 1, "text": f"t {name}", "n": number}) for number, name in enumerate(names)]
    (tmp_path / "t.jsonl").write_text("\n".join(reversed(lines)))
    fields = parse_fields(["record.text=text", "record.n=n"])
    recipe = Recipe(sequence="acts", id="ids", labels_from=f"{tmp_path}/t.jsonl:id:y", fields=fields)
    _, records = taken(tmp_path / "src", recipe)
    for number, name in enumerate(names):
        equal(records[name].sequence, states[number])
        assert (records[name].fields["text"], int(records[name].fields["n"])) == (f"t {name}", number)


def test_a_column_that_is_nowhere_is_named(tmp_path: Path) -> None:
    write_vllm(tmp_path / "src")
    recipe = Recipe(labels_from=f"{tmp_path}/answers.jsonl:id:score", fields=parse_fields(["record.answer=anwser"]))
    with pytest.raises(dp.UsageError, match=r"has no key 'anwser'.*'?answer"):
        taken(tmp_path / "src", recipe)
