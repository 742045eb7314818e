"""Conversion and extraction on a Ray cluster of two nodes on this machine: the same bytes as here alone, whatever happens."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import dali_pipeline as dp
from dali_pipeline.cli.app import app, run
from dali_pipeline.ingest import convert as convert_module
from dali_pipeline.ingest import sources
from dali_pipeline.ingest.config import ConvertConfig
from dali_pipeline.ingest.convert import convert
from dali_pipeline.ingest.extract.extract import extract
from dali_pipeline.ingest.extract.generate import GenerateConfig
from dali_pipeline.ingest.onray import Asks, on_ray
from tests.helpers.folders import assert_same_bytes, break_file, make_folder
from tests.helpers.languagemodels import CONFIG, make_answering_model, make_model, write_prompts, write_questions

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray 2.60 leaves its pipes to the collector
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two nodes of a core each, at this address, which the environment names."""
    import ray
    from ray.cluster_utils import Cluster

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        cluster.add_node(**node)
        environment.setenv("RAY_ADDRESS", cluster.address)
        yield cluster.address
        ray.shutdown()
        cluster.shutdown()
    _, alive = psutil.wait_procs([child for child in psutil.Process().children(recursive=True) if child.pid not in before], 10)
    for child in alive:
        child.kill()
    assert not alive


@pytest.fixture
def src(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 1)  # a task a file of the eight
    return make_folder(tmp_path / "src", files=4)


RAY = ConvertConfig(engine="ray", shard_bytes=4000)
HERE = ConvertConfig(num_workers=1, shard_bytes=4000)


@pytest.mark.slow
def test_many_machines_write_what_one_does(cluster: str, src: Path, tmp_path: Path) -> None:
    convert(src, tmp_path / "here", HERE)
    convert(src, tmp_path / "ray", RAY)
    assert_same_bytes(tmp_path / "here", tmp_path / "ray")
    convert(src, tmp_path / "here8", replace(HERE, dtype="int8"))  # a pass for the scales goes before
    convert(src, tmp_path / "ray8", replace(RAY, dtype="int8"))
    assert_same_bytes(tmp_path / "here8", tmp_path / "ray8")


@pytest.mark.slow
def test_a_killed_worker_costs_its_task_alone(cluster: str, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(src, tmp_path / "here", HERE)
    real, turns = convert_module.write_chunk, tmp_path / "turns"
    turns.mkdir()

    def dies_once(job: Any, chunk: range, root: Path, advance: Any) -> Any:
        turn = len(list(turns.glob(f"{chunk.start}-*")))
        (turns / f"{chunk.start}-{turn}").touch()
        written = real(job, chunk, root, advance)
        if chunk.start == 1 and turn == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    def write(job: Any, parts: Path, number: int, advance: Any) -> Any:
        part = parts / f"{number}-{os.getpid()}"
        return part, *dies_once(job, job.source.chunks[number], part, advance)

    monkeypatch.setattr(convert_module, "_write", write)  # goes to the workers by value
    convert(src, tmp_path / "ray", RAY)
    assert_same_bytes(tmp_path / "here", tmp_path / "ray")
    assert sorted(path.name for path in turns.iterdir()) == sorted(["1-1", *(f"{number}-0" for number in range(8))])


@pytest.mark.slow
def test_what_is_wrong_is_said_as_here_and_nothing_is_left(cluster: str, src: Path, tmp_path: Path) -> None:
    break_file(src, "code")
    said = []
    for config in (HERE, RAY):
        with pytest.raises(dp.PipelineError) as error:
            convert(src, tmp_path / "dst", config)
        said.append((type(error.value), str(error.value)))
        assert not (tmp_path / "dst").exists()
    assert said[0] == said[1]


@pytest.mark.slow
def test_a_folder_that_a_node_does_not_see_is_said(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(dp.UsageError, match=r"nowhere is not there on node .*; expected folders that all nodes share"):
        list(on_ray(lambda number, advance: number, range(3), lambda _: None, [tmp_path / "nowhere"], lambda _: Asks()))
    with pytest.raises(dp.UsageError, match="no node of the Ray cluster has the 9 cores that a task asks for"):
        list(on_ray(lambda number, advance: number, range(3), lambda _: None, [], lambda _: Asks(cores=9)))


@pytest.mark.slow
def test_at_the_command_line_from_a_folder_of_its_own(
    cluster: str, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for engine in ("local", "ray"):
        monkeypatch.setattr(sys, "argv", ["dali_pipeline", "convert", "src", engine, "--engine", engine])
        assert run(app, "dali_pipeline") == 0
        assert capfd.readouterr().err == ""
    assert_same_bytes(tmp_path / "local", tmp_path / "ray")


@pytest.mark.slow
def test_errors_of_other_libraries_are_a_sentence(cluster: str) -> None:
    def fails(number: int, advance: Any) -> int:
        if number:
            raise ModuleNotFoundError("No module named 'nowhere'")
        raise KeyError("torn")

    for number, words in ((0, r"a task ended with KeyError \('torn'\)"), (1, "a node cannot import .*nowhere")):
        with pytest.raises(dp.PipelineError, match=words):
            list(on_ray(fails, [number], lambda _: None, [], lambda _: Asks()))


def test_another_file_of_the_same_name_is_said(src: Path) -> None:
    source = sources.Source.find(src)
    source.check_file(0)
    os.utime(source.files[0], ns=(0, source.times[0] + 1))
    with pytest.raises(dp.FormatError, match="has another size or date on"):
        source.check_file(0)


@pytest.mark.slow
def test_extraction_on_many_machines_writes_what_one_does(cluster: str, tmp_path: Path) -> None:
    model, prompts = make_model(tmp_path / "model"), write_prompts(tmp_path / "prompts.csv")
    assert torch.get_num_threads() == 1
    extract(model, prompts, tmp_path / "here", CONFIG, device="cpu")
    extract(model, prompts, tmp_path / "ray", CONFIG, device="cpu", engine="ray")
    assert_same_bytes(tmp_path / "here", tmp_path / "ray")


@pytest.mark.slow
def test_answers_of_many_machines_are_those_of_one(cluster: str, tmp_path: Path) -> None:
    model, questions = make_answering_model(tmp_path / "model"), write_questions(tmp_path / "q.jsonl", 40)
    config = replace(CONFIG, generate=GenerateConfig(max_new_tokens=6, temperature=1.0, samples=2, attention_features=True))
    extract(model, questions, tmp_path / "here", config, device="cpu")
    extract(model, questions, tmp_path / "ray", config, device="cpu", engine="ray")
    assert_same_bytes(tmp_path / "here", tmp_path / "ray")


def test_an_engine_that_is_none_and_a_cluster_that_is_not_there_are_said(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(dp.UsageError, match="engine is 'spark'; expected local or ray"):
        ConvertConfig(engine="spark")  # type: ignore[arg-type]
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(dp.UsageError, match=r"no Ray cluster was reached at 127\.0\.0\.1:1 .*; check RAY_ADDRESS"):
        convert(src, tmp_path / "dst", RAY)
