"""Make the field's table: a model answers questions, and every baseline and detector tells right answers from wrong ones.

    python -m benchmarks.detectors           # SmolLM2-135M on 2,026 questions of SciQ: 18 minutes of processor time
    python -m benchmarks.detectors --quick   # a look at 300 of them, with one seed: 2 minutes
    python -m benchmarks.detectors --model ./Llama-3.1-8B --questions sciq.jsonl --shots shots.csv

Answers are greedy; an answer that matches no reference is hallucinated, label 1. Every seed trains all detectors and fits all
baselines; the metrics are means over the seeds, with intervals over questions and seeds. If it is stopped, the same command
continues; the first one also unpacks the model, in half a minute. The whole run on SciQ writes
results/detectors_<machine>_<date>.csv, of which `benchmarks.plot` makes the table and the picture of the documents; any other
run writes detectors.csv and .png into its own folder.
"""

from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads this when it loads: waiting threads release their cores

import typer
from transformers import AutoConfig

import dali_pipeline as dp
import train
from benchmarks.detectortable import COLUMNS, draw, markdown
from benchmarks.harness import Results
from dali_pipeline.cli.app import new_app, run
from dali_pipeline.cli.arguments import parse_blocks
from dali_pipeline.ingest.extract import demo
from dali_pipeline.ingest.extract.extract import extract
from dali_pipeline.ingest.extract.generate import GenerateConfig
from dali_pipeline.ingest.extract.matching import Match
from dali_pipeline.ingest.extract.tracer import ExtractConfig, first_line
from dali_pipeline.runtime.outside import Terminated
from dali_pipeline.storage.whole import write_whole
from training.baselines import BASELINES
from training.config import MODELS, Conduct, TrainConfig
from training.folder import PREDICTIONS_NAME
from training.interrupt import Interrupted
from training.intervals import difference, over_trainings
from training.metrics import Predictions
from training.prepare import Options
from training.report import read_predictions

QUICK_QUESTIONS = 300
PROBE = "linear_probe"
app = new_app()
Scored = tuple[Predictions, list[bytes]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run.

    Attributes:
        model: Folder or name of the model.
        questions: File of questions.
        folder: Folder of the answers and of the runs.
        extract: How the model answers, and what is kept.
        seeds: Number of seeds.
        epochs: Number of epochs of each training.
        device: Device of the model and of the trainings.
    """

    model: str
    questions: Path
    folder: Path
    extract: ExtractConfig
    seeds: int
    epochs: int
    device: str


def demonstration(folder: Path, quick: bool) -> tuple[str, Path, Path]:
    """Return the packaged model, its questions and examples for it, as files in a folder."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder.mkdir(parents=True, exist_ok=True)
    questions = demo.write_questions(folder / "sciq-questions.csv")
    if quick:
        lines = questions.read_text(encoding="utf-8")
        with io.StringIO(lines, newline="") as text:
            rows = list(csv.reader(text))[: QUICK_QUESTIONS + 1]
        questions = folder / "sciq-questions-quick.csv"
        with questions.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return str(demo.unpack_model(folder / "SmolLM2-135M-Instruct")), questions, demo.write_shots(folder / "sciq-shots.csv")


def middle_layers(model: str) -> tuple[int, ...]:
    """Return the layers of a model that lie where those of the demonstration lie in the packaged model's 30."""
    try:
        blocks = int(AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers)
    except (OSError, ValueError) as error:
        raise dp.UsageError(f"{model} is not a model that transformers can load ({first_line(error)})") from error
    return tuple(sorted({max(1, round(layer * blocks / 30)) for layer in demo.GRAPH_LAYERS}))


def answered(plan: Plan) -> dp.Dataset:
    """Let the model answer all questions; return the data set of its answers."""
    started = time.perf_counter()
    data = extract(plan.model, plan.questions, plan.folder / "answers", plan.extract, plan.device)
    print(f"{data.manifest.source['labels']} ({time.perf_counter() - started:.0f} s)", flush=True)
    return data


def scored(plan: Plan) -> list[dict[str, Scored]]:
    """Train all detectors and fit all baselines with every seed; return the test predictions of each, by seed and name."""
    runs = []
    for seed in range(plan.seeds):
        output = plan.folder / f"seed-{seed}"
        options = Options(
            data=plan.folder / "answers",
            preprocessed_dir=None,
            converted_dir=None,
            output_dir=output,
            resume="auto",
            seeds=1,
            folds=0,
            conduct=Conduct(device=plan.device),
        )
        train.main(options, TrainConfig(seed=seed, epochs=plan.epochs))
        runs.append(read_predictions(output / PREDICTIONS_NAME, "binary"))
    return runs


def rows_of(runs: Sequence[dict[str, Scored]]) -> list[dict[str, Any]]:
    """Return a row of the table per baseline and detector that every seed has."""
    rows = []
    for name in (*BASELINES, *MODELS):
        if not all(name in predictions for predictions in runs):
            continue
        own = [predictions[name][0] for predictions in runs]
        groups = runs[0][name][1]
        figures = over_trainings(own, groups)
        row: dict[str, Any] = {"detector": name}
        for metric, figure in figures.items():
            low, high = figure["interval"]
            row |= {metric: figure["mean"], f"{metric}_low": low, f"{metric}_high": high, f"{metric}_std": figure["std"]}
        if name != PROBE and all(PROBE in predictions for predictions in runs):
            gain = difference(own, [predictions[PROBE][0] for predictions in runs], groups)
            low, high = gain["interval"]
            row |= {"beside_probe": gain["difference"], "beside_probe_low": low, "beside_probe_high": high}
        labels = own[0].known().labels
        row |= {"seeds": len(own), "test_answers": len(labels), "test_questions": len(set(groups))}
        row |= {"test_right": int((labels == 0).sum()), "test_wrong": int((labels == 1).sum())}
        rows.append(row)
    return rows


def write(plan: Plan, data: dp.Dataset, rows: Sequence[dict[str, Any]], path: Path, facts: dict[str, str]) -> None:
    """Write the table as CSV, in the run's own folder with its picture, and print it."""
    common = {
        "model": Path(plan.model).name,
        "questions": plan.questions.name,
        "answers": data.manifest.source["labels"],
        **facts,
    }
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, COLUMNS)
    table.writeheader()
    shown = [{key: f"{value:.4f}" if isinstance(value, float) else str(value) for key, value in row.items()} for row in rows]
    table.writerows({**row, **common} for row in shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text.getvalue().encode())
    with path.open(newline="") as file:
        written = list(csv.DictReader(file))
    print(markdown(written))
    print(path)
    if path.parent == plan.folder:
        draw(written, path.with_suffix(".png"))
        print(path.with_suffix(".png"))


@app.command()
def main(
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_NAME", help="Causal model. [default: the packaged SmolLM2-135M]", show_default=False),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Questions with prompt and answers. [default: SciQ]", show_default=False),
    ] = None,
    shots: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Examples in front of each question.", show_default=False)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the tokenizer's chat template.")] = False,
    match: Annotated[str, typer.Option(metavar="contains|exact|rouge-l:X", help="When an answer is right.")] = "contains",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum number of tokens of an answer.")] = 16,
    batch_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum number of tokens per forward pass.")] = 1024,
    layers: Annotated[str, typer.Option(metavar="LIST", help="Layers whose hidden states are kept.")] = "all",
    graph_layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Layers whose attention becomes graphs. [default: three, at 2/5, 8/15 and 2/3 of the depth]"
        ),
    ] = None,
    positions: Annotated[
        str, typer.Option(metavar="answer|last|last-prompt", help="Tokens whose hidden states are kept.")
    ] = "answer",
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="Stored type: float16 or float32.")] = "float16",
    seeds: Annotated[int, typer.Option(min=1, help="Number of trainings; with --quick one.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 10,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N.")] = "auto",
    folder: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder of answers and runs.")] = Path("data/detectors"),
    quick: Annotated[bool, typer.Option("--quick", help="300 questions and one seed: a look, not a result.")] = False,
) -> None:
    """Let a model answer questions, and compare all baselines and detectors on its answers."""
    if (model is None) != (questions is None):
        raise dp.UsageError("--model and --questions belong together; give both, or none for the demonstration")
    own = model is not None
    if model is None or questions is None:
        model, questions, demo_shots = demonstration(folder, quick)
        shots = shots or demo_shots
    name = f"{Path(model).name}-{questions.stem}"
    plan = Plan(
        model=model,
        questions=questions,
        folder=folder / name,
        extract=ExtractConfig(
            layers=parse_blocks(layers),
            graph_layers=middle_layers(model) if graph_layers is None else parse_blocks(graph_layers),
            dtype=dtype,
            batch_tokens=batch_tokens,
            generate=GenerateConfig(
                max_new_tokens=max_new_tokens,
                chat=chat,
                shots=shots,
                match=Match.parse(match),
                positions=positions,  # type: ignore[arg-type]
                attention_features=True,
            ),
        ),
        seeds=1 if quick else seeds,
        epochs=epochs,
        device=device,
    )
    started = time.perf_counter()
    results = Results("detectors", ["torch", "transformers", "torch-geometric", "scikit-learn"])
    try:
        data = answered(plan)
        rows = rows_of(scored(plan))
    except (KeyboardInterrupt, Interrupted, Terminated) as stop:
        print("benchmarks.detectors: stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(getattr(stop, "exit_code", 130)) from None
    path = plan.folder / "detectors.csv" if own or quick else results.path
    write(plan, data, rows, path, results.facts | {"seconds": f"{time.perf_counter() - started:.0f}"})


if __name__ == "__main__":
    sys.exit(run(app, "benchmarks.detectors"))
