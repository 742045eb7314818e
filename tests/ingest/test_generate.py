"""extract --generate on small models of all kinds: every value against one prompt at a time, without padding or cache."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import dali_pipeline as dp
from dali_pipeline.ingest.extract.extract import extract
from dali_pipeline.ingest.extract.generate import EIGENVALUES, GenerateConfig
from dali_pipeline.ingest.extract.tracer import ExtractConfig, forget_model
from tests.helpers.languagemodels import WORDS, make_model

NEW = 6
ENDS = [2, 5, 8]  # so that answers differ in length
OWN = GenerateConfig(max_new_tokens=NEW, attention_features=True)
CONFIG = ExtractConfig(
    batch_tokens=60, commit_every=8, dtype="float32", split=dp.SplitRule(shares=(100, 0, 0)), attention_threshold=0.02
)
SMALL: dict[str, Any] = {"vocab_size": len(WORDS) + 1, "hidden_size": 16, "num_hidden_layers": 3}
HEADS: dict[str, Any] = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {**SMALL, **HEADS}),
    "Gemma2": ("Gemma2ForCausalLM", {**SMALL, **HEADS, "head_dim": 8, "sliding_window": 4}),
    "GPT2": ("GPT2LMHeadModel", {"vocab_size": 12, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}),
    "Bloom": ("BloomForCausalLM", {"vocab_size": 12, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "Lfm2": ("Lfm2ForCausalLM", {**SMALL, **HEADS, "layer_types": ["conv", "full_attention", "conv"]}),
    "Mamba": ("MambaForCausalLM", {**SMALL, "state_size": 4, "use_mambapy": False}),
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    forget_model()


def save(folder: Path, name: str = "Llama", ends: list[int] | None = None) -> str:
    """Save a model of random weights, large enough to be sure of something, with the tokenizer of whole words."""
    make_model(folder)
    class_name, settings = MODELS[name]
    torch.manual_seed(1)
    model = getattr(transformers, class_name)(getattr(transformers, f"{name}Config")(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8 if name not in ("Lfm2", "Mamba") else 2)
    model.generation_config.eos_token_id = ENDS if ends is None else ends
    model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    return str(folder)


def write_questions(path: Path, count: int = 20) -> Path:
    rng = np.random.default_rng(3)
    rows = [
        {"id": f"q{row}", "prompt": " ".join(rng.choice(WORDS, rng.integers(2, 9))), "answers": [str(rng.choice(WORDS))]}
        for row in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_shots(path: Path) -> Path:
    path.write_text("prompt,answers\nwhat is this,the one\nis this wrong,right\n")
    return path


def records_of(data: dp.Dataset) -> dict[str, Any]:
    """Return the records by id, with both halves."""
    found = {}
    for split in data.splits:
        for position in range(data.num_records(split, "sequences")):
            record = data.record(split, position)
            found[record.id] = record
    return found


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("shots", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_answers_and_traces_are_those_of_one_prompt_at_a_time(tmp_path: Path, name: str, shots: bool) -> None:
    model = save(tmp_path / "model", name)
    path = write_questions(tmp_path / "q.jsonl")
    features = name != "Mamba"
    own = replace(
        OWN,
        attention_features=features,
        shots=write_shots(tmp_path / "shots.csv") if shots else None,
        stop=(),
    )
    data = extract(model, path, tmp_path / "set", replace(CONFIG, generate=own), device="cpu")
    reference = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    examples = "what is this the one\n\nis this wrong right\n\n" if shots else ""
    before = len(tokenizer(examples)["input_ids"]) if shots else 0
    records, lengths = records_of(data), set()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        record = records[row["id"]]
        prompt = tokenizer(examples + row["prompt"])["input_ids"]
        given = torch.tensor([prompt])
        with torch.inference_mode():
            out = reference.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
        answer = out[0, len(prompt) :].tolist()
        end = next((place for place, token in enumerate(answer) if token in ENDS), len(answer))
        answer, kept = answer[:end], answer[: max(end, 1)]
        text = tokenizer.decode(answer, skip_special_tokens=True)
        lengths.add(len(answer))
        assert record.fields["token_ids"].tolist() == kept
        assert (record.fields["answer"], record.fields["prompt"]) == (text, row["prompt"])
        assert record.fields["prompt_steps"] == len(prompt)
        assert record.label == int(row["answers"][0] not in text.split() or row["answers"][0] == "a")
        tokens = torch.tensor([prompt + kept])
        with torch.inference_mode():
            # a model without attention takes no output_attentions
            asked = {"output_attentions": True} if features else {}
            out = reference(tokens, output_hidden_states=True, use_cache=False, **asked)
        states = torch.stack(out.hidden_states[1:], dim=2)[0, len(prompt) :]
        assert np.allclose(record.sequence, states.numpy(), atol=1e-4, rtol=1e-3)
        logprobs = out.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert np.allclose(record.fields["logprob"], logprobs[range(len(kept)), kept], atol=1e-4)
        assert np.allclose(record.fields["entropy"], -(logprobs.exp() * logprobs).sum(-1), atol=1e-4)
        if not features:
            assert data.schema.kinds == ("sequences",)
            continue
        maps = {
            layer + 1: attention[0].double().numpy()
            for layer, attention in enumerate(_by_block(out.attentions, name))
            if attention is not None
        }
        check_features(record, maps, len(prompt))
        check_graphs(record, maps, out.hidden_states, len(prompt), before)
    assert len(lengths) > 1


def _by_block(attentions: Any, name: str) -> list[Any]:
    return [None, attentions[0], None] if name == "Lfm2" and len(attentions) == 1 else list(attentions)


def check_features(record: Any, maps: dict[int, Any], prompt: int) -> None:
    """Compare the lookback ratio with a loop, and the eigenvalues with those of the whole Laplacian."""
    for number, block in enumerate(sorted(maps)):
        for head, attention in enumerate(maps[block]):
            ratios = []
            for row in range(prompt, len(attention)):
                on_prompt, on_answer = attention[row, :prompt].mean(), attention[row, prompt : row + 1].mean()
                ratios.append(on_prompt / (on_prompt + on_answer))
            assert record.fields["lookback_ratio"][number, head] == pytest.approx(np.mean(ratios), abs=1e-5)
            degrees = [attention[:, column].sum() / (len(attention) - column) for column in range(len(attention))]
            eigenvalues = np.sort(np.linalg.eigvals(np.diag(degrees) - attention).real)[::-1][:EIGENVALUES]
            expected = np.pad(eigenvalues, (0, EIGENVALUES - len(eigenvalues)))
            assert np.allclose(record.fields["laplacian_eigenvalues"][number, head], expected, atol=1e-5)


def check_graphs(record: Any, maps: dict[int, Any], states: Any, prompt: int, before: int) -> None:
    """Compare nodes and edges with a double loop over the tokens behind the examples."""
    graphs, node, edge = record.graphs, 0, 0
    for number, block in enumerate(sorted(maps)):
        mean = maps[block].mean(0)[before:, before:]
        count = int(graphs.node_counts[number])
        assert count == len(mean)
        assert np.allclose(graphs.x[node : node + count], states[block][0, before:].numpy(), atol=1e-4, rtol=1e-3)
        assert graphs.fields["node.is_answer"][node : node + count].tolist() == [
            position >= prompt - before for position in range(count)
        ]
        pairs = [(j, i) for i in range(count) for j in range(i + 1) if mean[i, j] > 0.02]
        edges = int(graphs.edge_counts[number])
        assert [tuple(pair) for pair in graphs.edge_index[:, edge : edge + edges].T.tolist()] == pairs
        assert np.allclose(graphs.edge_attr[edge : edge + edges], [mean[i, j] for j, i in pairs], atol=1e-5)
        node, edge = node + count, edge + edges
