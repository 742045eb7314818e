"""extract --generate on small models of all kinds: every value against one prompt at a time, without padding or cache."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dali_pipeline as dp
from dali_pipeline.cli.app import app
from dali_pipeline.cli.app import run as run_app
from dali_pipeline.ingest.extract import answers as answers_module
from dali_pipeline.ingest.extract.answers import _Heads
from dali_pipeline.ingest.extract.extract import extract
from dali_pipeline.ingest.extract.generate import EIGENVALUES, GenerateConfig, Generator
from dali_pipeline.ingest.extract.matching import Match
from dali_pipeline.ingest.extract.tracer import ExtractConfig, forget_model
from dali_pipeline.writing.journal import WorkFolder
from tests.helpers.languagemodels import ENDS, MODELS, WORDS, make_answering_model, write_questions

NEW = 6
OWN = GenerateConfig(max_new_tokens=NEW, attention_features=True)
CONFIG = ExtractConfig(
    batch_tokens=60, commit_every=8, dtype="float32", split=dp.SplitRule(shares=(100, 0, 0)), attention_threshold=0.02
)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    forget_model()


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
    model = make_answering_model(tmp_path / "model", name)
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


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return make_answering_model(tmp_path / "model")


def run(model: str, tmp_path: Path, name: str = "set", questions: Path | None = None, **options: Any) -> dict[str, Any]:
    """Answer questions; return the records."""
    names = ("batch_tokens", "commit_every", "truncate")
    config: dict[str, Any] = {name: options.pop(name) for name in names if name in options}
    path = questions or write_questions(tmp_path / "q.jsonl")
    own = replace(OWN, attention_features=False, **options)
    data = extract(model, path, tmp_path / name, replace(CONFIG, generate=own, graph_layers=(), **config), device="cpu")
    return records_of(data)


@pytest.mark.parametrize(("stop", "killed"), [(1, False), (2, True), (4, False), (5, True)])
def test_stopped_anywhere_it_goes_on_and_gives_the_same_bytes(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, killed: bool
) -> None:
    """Killed: nothing is tidied up behind it. No batch is answered twice."""
    path = write_questions(tmp_path / "q.jsonl", 12)
    config = replace(CONFIG, generate=replace(OWN, temperature=0.9, samples=2))
    extract(llama, path, tmp_path / "whole", config, device="cpu")
    real, asked = Generator.answers, list[str]()

    def counted(self: Any, asks: Any, *more: Any) -> Any:
        if stop_at and len(asked) >= stop_at:
            raise KeyboardInterrupt
        asked.append(asks[0].id)
        return real(self, asks, *more)

    monkeypatch.setattr(Generator, "answers", counted)
    if killed:
        monkeypatch.setattr(WorkFolder, "abandon", WorkFolder._unlock)
    stop_at = stop
    with pytest.raises(KeyboardInterrupt):
        extract(llama, path, tmp_path / "torn", config, device="cpu")
    assert len(asked) == stop
    stop_at = 0
    data = extract(llama, path, tmp_path / "torn", config, device="cpu")
    assert len(asked) == len(set(asked)) >= 6
    assert files(tmp_path / "torn") == files(tmp_path / "whole")
    assert sum(data.num_records(split, "sequences") for split in data.splits) == 24
    count = len(asked)
    extract(llama, path, tmp_path / "torn", config, device="cpu")
    assert len(asked) == count  # a finished set is taken as it is
    with pytest.raises(dp.UsageError, match="another model, prompts or settings"):
        extract(llama, path, tmp_path / "torn", replace(config, generate=OWN), device="cpu")


def test_samples_share_a_group_and_depend_on_their_question_alone(llama: str, tmp_path: Path) -> None:
    drawn: dict[str, Any] = {"temperature": 1.5, "samples": 3, "seed": 5}
    records = run(llama, tmp_path, **drawn)
    assert sorted(records) == sorted(f"q{row}-{sample}" for row in range(20) for sample in range(3))
    assert all(record.group == name.rpartition("-")[0] for name, record in records.items())
    tokens = {name: record.fields["token_ids"].tolist() for name, record in records.items()}
    assert any(tokens[f"q{row}-0"] != tokens[f"q{row}-1"] for row in range(20))
    few = run(llama, tmp_path, "few", write_questions(tmp_path / "few.jsonl", 7), batch_tokens=30, **drawn)
    assert {name: record.fields["token_ids"].tolist() for name, record in few.items()} == {name: tokens[name] for name in few}
    other = run(llama, tmp_path, "other", **{**drawn, "seed": 6})
    assert any(record.fields["token_ids"].tolist() != tokens[name] for name, record in other.items())


def test_draws_follow_the_models_distribution(llama: str, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("id,prompt,answers\nq,what is this,x\n")
    count, temperature = 1000, 2.5
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    tokens = AutoTokenizer.from_pretrained(llama)("what is this", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        shares = (model(tokens).logits[0, -1] / temperature).softmax(-1).double().numpy()
    for top_p in (1.0, 0.7):
        options: dict[str, Any] = {"temperature": temperature, "samples": count, "max_new_tokens": 1, "top_p": top_p}
        records = run(llama, tmp_path, f"p{top_p}", tmp_path / "one.csv", batch_tokens=4000, commit_every=count, **options)
        drawn = np.bincount([record.fields["token_ids"][0] for record in records.values()], minlength=len(shares))
        order = np.argsort(-shares)
        kept = order[: int(np.searchsorted(np.cumsum(shares[order]), top_p)) + 1]
        expected = np.zeros_like(shares)
        expected[kept] = shares[kept] / shares[kept].sum()
        assert len(kept) > 2
        assert np.abs(drawn / count - expected).max() < 4 * np.sqrt(0.25 / count)
        assert (drawn[expected == 0] == 0).all()


def test_positions(llama: str, tmp_path: Path) -> None:
    whole, last, prompt = (run(llama, tmp_path, name, positions=name) for name in ("answer", "last", "last-prompt"))
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for name, record in whole.items():
        assert len(last[name].sequence) == len(prompt[name].sequence) == 1
        assert np.allclose(last[name].sequence[0], record.sequence[-1], atol=1e-4)
        for field in ("token_ids", "logprob", "entropy"):
            assert np.allclose(last[name].fields[field], record.fields[field][-1:], atol=1e-4)
        tokens = tokenizer(record.fields["prompt"], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = model(tokens, output_hidden_states=True)
        states = torch.stack(out.hidden_states[1:], dim=2)[0, -1]
        assert np.allclose(prompt[name].sequence[0], states, atol=1e-4, rtol=1e-3)
        assert prompt[name].fields["token_ids"].tolist() == [int(tokens[0, -1])]
        logprob = out.logits[0, -2].log_softmax(-1)[tokens[0, -1]]
        assert prompt[name].fields["logprob"] == pytest.approx(float(logprob), abs=1e-4)
        assert record.label == last[name].label == prompt[name].label


def test_the_first_token_of_all_has_no_probability(llama: str, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("prompt,answers\nwhat,x\nwhat is,x\n")
    records = run(llama, tmp_path, questions=tmp_path / "one.csv", positions="last-prompt")
    assert np.isnan(records["0"].fields["logprob"]).all()
    assert np.isfinite(records["1"].fields["logprob"]).all()


def test_empty_answers_are_kept_as_the_token_that_ended_them(tmp_path: Path) -> None:
    model = make_answering_model(tmp_path / "model", ends=list(range(12)))
    records = run(model, tmp_path)
    for record in records.values():
        assert (len(record.sequence), record.fields["answer"], record.label) == (1, "", 1)
        assert record.fields["logprob"][0] < 0
    assert dp.open_dataset(tmp_path / "set").manifest.source["labels"] == (
        "20 answers: 0 match a reference (label 0), 20 do not (label 1, the positive class); 20 are empty"
    )


def test_answers_end_before_a_stop_text(tmp_path: Path) -> None:
    model = make_answering_model(tmp_path / "model", ends=[])
    whole, cut = run(model, tmp_path), run(model, tmp_path, "cut", stop=("wrong", "answer to"))
    stopped = 0
    for name, record in cut.items():
        tokens, before = record.fields["token_ids"].tolist(), whole[name].fields["token_ids"].tolist()
        texts = ["?", *WORDS]
        ends = [
            n
            for n in range(NEW)
            if "wrong" in texts[before[n]] or [texts[t] for t in before[n - 1 : n + 1]] == ["answer", "to"]
        ]
        end = ends[0] if ends else NEW
        stopped += bool(ends)
        assert tokens == before[: max(end, 1)]
    assert 0 < stopped < len(cut)


def test_an_end_of_text_that_the_model_lacks(tmp_path: Path) -> None:
    model = make_answering_model(tmp_path / "model", ends=[50_256])
    assert {len(record.sequence) for record in run(model, tmp_path).values()} == {NEW}


def test_labels_of_a_judge(llama: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"id": f"q{row}", "prompt": WORDS[row % 11]}) + "\n" for row in range(10)))
    (tmp_path / "judged.csv").write_text("id,score\n" + "".join(f"q{row},{row / 10}\n" for row in reversed(range(10))))
    reference = f"{tmp_path}/judged.csv:id:score"
    records = run(llama, tmp_path, questions=path, labels_from=reference, label_threshold=0.45)
    assert {name: record.label for name, record in records.items()} == {f"q{row}": int(row < 5) for row in range(10)}
    values = run(llama, tmp_path, "values", path, labels_from=reference)
    assert float(values["q3"].label) == pytest.approx(0.3)
    assert run(llama, tmp_path, "none", path, match=Match.parse("none"))["q1"].label is None
    (tmp_path / "judged.csv").write_text("id,score\nq0,1\n")
    with pytest.raises(dp.FormatError, match=r"answer 'q1' has no label in .*judged\.csv"):
        run(llama, tmp_path, "missing", path, labels_from=reference)


TEMPLATE = "{% for m in messages %}{{ 'question' if m.role == 'user' else 'answer' }} {{ m.content }} {% endfor %}answer"


def test_chat_templates(llama: str, tmp_path: Path) -> None:
    with pytest.raises(dp.UsageError, match="has no chat template; expected one for --chat"):
        run(llama, tmp_path, chat=True)
    assert not (tmp_path / "set").exists()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(llama)
    forget_model()
    chatted = run(llama, tmp_path, chat=True, shots=write_shots(tmp_path / "shots.csv"))
    front = "question what is this answer the one question is this wrong answer right"
    lines = (tmp_path / "q.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "prompt": f"{front} question {json.loads(line)['prompt']} answer"} for line in lines]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = run(llama, tmp_path, "plain", tmp_path / "plain.jsonl")
    tokenizer.chat_template = TEMPLATE + " "
    tokenizer.save_pretrained(llama)
    forget_model()
    with pytest.raises(dp.UsageError, match="another model, prompts or settings"):
        run(llama, tmp_path, chat=True, shots=tmp_path / "shots.csv")
    for name, record in chatted.items():
        assert record.fields["token_ids"].tolist() == plain[name].fields["token_ids"].tolist()
        assert record.fields["prompt_steps"] == plain[name].fields["prompt_steps"]
        assert np.allclose(record.sequence, plain[name].sequence, atol=1e-4, rtol=1e-3)


def test_one_attention_is_alive_at_a_time(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most: list[int] = []
    real = _Heads.take

    def watched(self: Any, block: int, attention: torch.Tensor) -> None:
        real(self, block, attention)
        most.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(attention))

    monkeypatch.setattr(_Heads, "take", watched)
    extract(llama, write_questions(tmp_path / "q.jsonl"), tmp_path / "set", replace(CONFIG, generate=OWN), device="cpu")
    assert len(most) > 10
    assert max(most) == 0


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, "has no column 'prompt'; it has no header"),
        ("prompt\na\n", {}, "has no column 'answers'; it has prompt"),
        ("prompt,answers\n", {}, "has no rows"),
        ("prompt,answers\nwhat,\n", {}, "row 1 has no reference answer; expected one at least, or labels by --labels-from"),
        ("prompt,answers\nwhat,[]\n", {}, "row 1 has no reference answer"),
        ("prompt,answers\nwhat,+\n", {}, "row 1 has the reference '\\+', which no answer matches"),
        ("prompt,answers\n ,x\n", {}, "row 1 has the prompt ' '; expected a text"),
        ("prompt,answers,id\na,x,q\nb,y,q\n", {}, "gives the id 'q' to several rows"),
        ('prompt,answers\na,"[{""x"": 1}]"\n', {}, "row 1 has the reference {'x': 1}; expected a text"),
        ("prompt,answers\na,b\n", {"max_new_tokens": 0}, "at least 1"),
        ("prompt,answers\na,b\n", {"samples": 2}, "give a --temperature above 0"),
        ("prompt,answers\na,b\n", {"top_p": 0.5}, "give a --temperature above 0"),
        ("prompt,answers\na,b\n", {"top_p": 0.0}, "top-p is 0.0"),
        ("prompt,answers\na,b\n", {"temperature": -1.0}, "temperature is -1.0"),
        ("prompt,answers\na,b\n", {"positions": "first"}, "positions are 'first'"),
        ("prompt,answers\na,b\n", {"stop": ("",)}, "a stop text is empty"),
        ("prompt,answers\na,b\n", {"label_above": 0.5}, "a threshold is for the scores of --labels-from"),
        ("prompt,answers\na,b\n", {"labels_from": "x.csv", "match": Match.parse("exact")}, "expected one of them"),
    ],
)
def test_bad_questions_and_settings_are_named(
    llama: str, tmp_path: Path, text: str, options: dict[str, Any], words: str
) -> None:
    (tmp_path / "q.csv").write_text(text)
    with pytest.raises(dp.UsageError, match=words):
        run(llama, tmp_path, questions=tmp_path / "q.csv", **options)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 holds list; expected an object"),
        ('{"prompt": "a"}', "line 2 has no 'answers'; it has prompt"),
        ('{"prompt": 1, "answers": "b"}', "line 2 has the prompt 1"),
        ('{"prompt": "a", "answers": [null]}', "line 2 has the reference None"),
        ('{"prompt": "a \\ud800", "answers": "b"}', "line 2 holds half a character"),
    ],
)
def test_bad_lines_are_named(llama: str, tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "answers": ["b", 1990]}\n' + line + "\n")
    with pytest.raises(dp.UsageError, match=words):
        run(llama, tmp_path, questions=tmp_path / "q.jsonl")


def test_prompts_beyond_the_models_positions(tmp_path: Path) -> None:
    model = make_answering_model(tmp_path / "model", "GPT2")
    long = " ".join(WORDS[number % 11] for number in range(70))
    (tmp_path / "q.csv").write_text(f"id,prompt,answers\na,what is,x\nb,{long},x\nc,{' '.join(long.split()[-58:])},x\n")
    with pytest.raises(dp.UsageError, match=r"'b' has 70 tokens, with 6 new ones too many for the model's 64 .*--truncate"):
        run(model, tmp_path, questions=tmp_path / "q.csv")
    records = run(model, tmp_path, questions=tmp_path / "q.csv", truncate=True)
    assert records["b"].fields["prompt_steps"] == 58
    assert records["b"].fields["token_ids"].tolist() == records["c"].fields["token_ids"].tolist()
    with pytest.raises(dp.UsageError, match="leave --truncate out"):
        run(model, tmp_path, "other", tmp_path / "q.csv", truncate=True, shots=write_shots(tmp_path / "s.csv"))
    with pytest.raises(dp.UsageError, match="the model has 64 positions; expected --max-new-tokens below that"):
        run(model, tmp_path, "other", tmp_path / "q.csv", truncate=True, max_new_tokens=64)


def test_a_model_without_attention_has_no_figures_of_heads(tmp_path: Path) -> None:
    model = make_answering_model(tmp_path / "model", "Mamba")
    config = replace(CONFIG, generate=OWN)
    with pytest.raises(dp.UsageError, match="has no attention from token to token; --attention-features needs"):
        extract(model, write_questions(tmp_path / "q.jsonl"), tmp_path / "set", config, device="cpu")
    assert not (tmp_path / "set").exists()


def test_attentions_that_come_only_all_together(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, config = write_questions(tmp_path / "q.jsonl"), replace(CONFIG, generate=OWN)
    extract(llama, path, tmp_path / "whole", config, device="cpu")
    monkeypatch.setattr(answers_module, "attention_taps", lambda *_: {})
    extract(llama, path, tmp_path / "held", config, device="cpu")
    assert files(tmp_path / "held") == files(tmp_path / "whole")


def test_the_command_line(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_questions(tmp_path / "q.jsonl")
    common = ["extract", "--model", llama, "--prompts", str(questions), "--device", "cpu", str(tmp_path / "set")]

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["dali_pipeline", *common, *arguments])
        code = run_app(app, "dali_pipeline")
        return code, *capsys.readouterr()

    code, _, said = call("--samples", "2")
    assert (code, said) == (2, "dali_pipeline: --samples is about answers of the model's own; give --generate too\n")
    code, _, said = call("--generate", "--match", "fuzzy")
    assert (code, said) == (2, "dali_pipeline: match is 'fuzzy'; expected contains, exact, rouge-l:0.3 or none\n")
    code, out, _ = call("--generate", "--max-new-tokens", "3", "--attention-features", "--stop", "\\n")
    assert code == 0
    data = dp.open_dataset(tmp_path / "set")
    labels = [data.record(split, row).label for split in data.splits for row in range(data.num_records(split, "sequences"))]
    assert out.splitlines()[1] == (
        f"20 answers: {labels.count(0)} match a reference (label 0), {labels.count(1)} do not (label 1, the positive class); "
        f"{data.manifest.source['empty_answers']} {'is' if data.manifest.source['empty_answers'] == 1 else 'are'} empty"
    )
    assert 0 < labels.count(0) < 20
    assert data.schema.layers == (1, 2, 3)
    assert data.manifest.source["attention_layers"] == [1, 2, 3]
    assert (data.schema.steps, data.layer_numbers("graphs")) == ("token", [1, 2, 3])
