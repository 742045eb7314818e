"""What a GPU is asked for: on a pretended one, which counts waits, copies and kernels (`make pretended-gpu`), or a real one.

The budgets hold what a step of training, and a batch of a loader, may cost; whoever makes one of them worse sees it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dali_pipeline as dp
from dali_pipeline.format.manifest import FeatureStatistics
from dali_pipeline.loaders.decoding import Decoding, sequence_graph
from dali_pipeline.loaders.sidestream import UnderWay, to_device
from dali_pipeline.reading.residency import Residency
from dali_pipeline.runtime.memory import Buffers
from models import GNNLSTMDetector, LSTMDetector
from tests.helpers.batches import assert_same
from tests.helpers.records import FIELDS, SCHEMA, make_records, with_fields, write
from tests.pretended_gpu import Log
from tests.pretended_gpu.cuda import PretendedEvent
from training.build import build_model, forward, make_loader, unfit_records
from training.config import MODELS, Conduct, TrainConfig
from training.interrupt import Interrupts
from training.objective import Objective
from training.processes import Processes
from training.scoring import score_batches
from training.step import Stepper
from training.target import Target, find_target
from training.trainer import Trainer

TWO = Target(name="label", task="binary", classes=2)
CUDA = torch.device("cuda", 0)


def without_last_graph(record: dp.Record) -> dp.Record:
    graphs = record.graphs
    assert graphs is not None
    assert graphs.edge_attr is not None
    nodes, edges = (int(counts[:-1].sum()) for counts in (graphs.node_counts, graphs.edge_counts))
    fewer = dp.Graphs(
        x=graphs.x[:nodes],
        edge_index=graphs.edge_index[:, :edges],
        edge_attr=graphs.edge_attr[:edges],
        node_counts=graphs.node_counts[:-1],
        edge_counts=graphs.edge_counts[:-1],
    )
    return replace(record, graphs=fewer)


@pytest.fixture(params=["ragged", "uniform"])
def shape(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dp.Dataset]:
    """40 records, all in the training split, whose sequences and numbers of graphs differ, or do not."""
    ragged = request.param == "ragged"
    records = make_records(40, ragged=ragged)
    records = [without_last_graph(one) if ragged and number % 3 else one for number, one in enumerate(records)]
    return request.param, write(tmp_path / "set", records, shares="100/0/0")


# Per step of training on a batch of 8 records, at most: kernels with fp32, bf16 and fp16, as the pretended GPU counts them, and
# copies of pinned memory to the device. Waits and pageable copies are none in all of them.
STEP = {
    ("lstm", "uniform"): (86, 94, 123, 0),
    ("lstm", "ragged"): (104, 112, 141, 1),
    ("gnn_lstm", "uniform"): (181, 229, 258, 1),
    ("gnn_lstm", "ragged"): (192, 240, 270, 2),
    ("gvae_lstm", "uniform"): (312, 379, 407, 3),
    ("gvae_lstm", "ragged"): (325, 390, 420, 4),
}
CUT = {"lstm": 0, "gnn_lstm": 10, "gvae_lstm": 14}  # kernels that cutting a batch in pieces takes, per piece


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", MODELS)
def test_a_step_of_training_waits_for_nothing(
    gpu_log: Log, shape: tuple[str, dp.Dataset], model: Any, precision: Any, accumulate: int
) -> None:
    config = TrainConfig(models=(model,), batch_size=8, accumulate=accumulate, precision=precision)
    loader = make_loader(model, shape[1], config, "train", "cuda")
    net = build_model(model, shape[1].schema, TWO, config).to(CUDA)
    stepper = Stepper(net, config, Objective(TWO, CUDA), 100, CUDA, Processes(dp.World()))
    batches = list(islice(loader, 3))
    noisy = model == "gvae_lstm"
    stepper.step(batches[0], 0, 8, 0 if noisy else None)  # what is made once: the optimizer's state
    gpu_log.clear()
    for number, batch in enumerate(batches[1:], 1):
        stepper.step(batch, number, 8, number if noisy else None)
    assert gpu_log.lines("wait") == gpu_log.lines("pageable copy") == []
    *kernels, copies = STEP[model, shape[0]]
    budget = kernels[("fp32", "bf16", "fp16").index(precision)] + (CUT[model] if accumulate > 1 else 0)
    assert gpu_log.number("kernel") <= 2 * budget * accumulate
    assert gpu_log.number("pinned copy") <= 2 * copies * accumulate


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("model", "name"),
    [("lstm", "step.mask"), ("lstm", "record.score"), ("gnn_lstm", "record.score"), ("gvae_lstm", "node.charge")],
)
def test_a_step_waits_for_nothing_whatever_the_target(gpu_log: Log, tmp_path: Path, model: Any, name: str) -> None:
    schema = replace(SCHEMA, fields=FIELDS)
    records = [with_fields(record, number) for number, record in enumerate(make_records(40))]
    data = write(tmp_path / "set", records, schema=schema, shares="100/0/0")
    config = TrainConfig(models=(model,), batch_size=8, target=name)
    target = find_target(data, "sequences" if model == "lstm" else "graphs", name, splits=("train",))
    net = build_model(model, data.schema, target, config).to(CUDA)
    stepper = Stepper(net, config, Objective(target, CUDA), 100, CUDA, Processes(dp.World()))
    batches = list(islice(make_loader(model, data, config, "train", "cuda"), 3))
    noisy = model == "gvae_lstm"
    stepper.step(batches[0], 0, 8, 0 if noisy else None)
    gpu_log.clear()
    shares = [stepper.step(batch, number, 8, number if noisy else None) for number, batch in enumerate(batches[1:], 1)]
    assert gpu_log.lines("wait") == gpu_log.lines("pageable copy") == []
    assert all(torch.isfinite(share.cpu()) for share in shares)


# Per batch of 8 records, over an epoch of 5, at most: kernels, and copies of pinned memory. Labels cross per superbatch.
BATCH = {
    "sequences, torch": (1, 1.8),
    "sequences, torch, normalized": (6, 2.8),
    "sequences, dali": (0.2, 1),
    "graphs": (9.4, 0.6),
    "graphs, processes": (9.4, 0.6),
}


def loader_of(name: str, data: dp.Dataset) -> Any:
    if name.startswith("graphs"):
        return dp.GraphLoader(
            data, batch_size=8, device="cuda", num_workers=2 if "processes" in name else "auto", window="gather"
        )
    return dp.SequenceLoader(
        data,
        batch_size=8,
        device="cuda",
        engine="torch" if "torch" in name else "dali",
        normalize="normalized" in name,
        window="gather",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(BATCH))
def test_a_batch_waits_for_nothing(gpu_log: Log, shape: tuple[str, dp.Dataset], name: str) -> None:
    loader = loader_of(name, shape[1])
    gpu_log.clear()
    assert len(list(loader)) == len(loader) == 5
    assert [line for line in gpu_log.lines("wait") if "event.synchronize" not in line] == []  # at an epoch's end
    assert gpu_log.lines("pageable copy") == []
    kernels, copies = BATCH[name]
    assert gpu_log.number("kernel") <= kernels * len(loader)
    assert gpu_log.number("pinned copy") <= copies * len(loader)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("uniform", [False, True])
def test_a_batch_from_the_window_is_one_kernel(gpu_log: Log, tmp_path: Path, uniform: bool, engine: Any) -> None:
    """One copy per piece, and one of indices, labels and fields for up to 64 batches; no wait, no pageable copy."""
    rng, names = np.random.default_rng(0), [name for name in FIELDS if name.startswith(("step", "record"))]
    schema = dp.Schema(
        sequence=dp.Field(dtype="int8", shape=(8,), scale=((0.5,) * 8,)), fields={name: FIELDS[name] for name in names}
    )
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=4096) as writer:
        for number in range(1000):
            steps = 5 if uniform else int(rng.integers(1, 9))
            values = rng.integers(-50, 50, (steps, 8)).astype(np.float32)
            fields = with_fields(replace(make_records(1)[0], sequence=values), number).fields
            writer.write({"id": number, "label": 0, "sequence": values, "fields": fields})
    data = dp.open_dataset(tmp_path / "set")
    options: dict[str, Any] = {"batch_size": 4, "window_bytes": 60_000, "engine": engine, "normalize": True}
    loader = dp.SequenceLoader(data, device="cuda", **options)
    assert loader.window == "resident"
    residency = Residency.of(loader.plan(0), 0, 1)
    assert residency is not None
    groups = len(residency.groups)
    pieces = sum(len(list(residency.pieces(group, loader.selection.record_bytes))) for group in residency.groups)
    gpu_log.clear()
    batches = list(loader)
    assert groups > 5
    assert len(batches) == 250
    assert [line for line in gpu_log.lines("wait") if "event.synchronize" not in line] == []
    assert gpu_log.lines("pageable copy") == []
    superbatches = 7 + groups + len(batches) // 64  # of 1, 2, 4 ... 64 batches, ended by each group
    assert gpu_log.number("pinned copy") <= (pieces if engine == "torch" else 0) + superbatches
    assert gpu_log.number("kernel") <= len(batches) + 6 * pieces + 3 * superbatches  # decoding a piece, widening the fields
    for ours, theirs in zip(batches, dp.SequenceLoader(data, device="cpu", window="gather", **options), strict=True):
        assert_same([ours.to("cpu")], [theirs])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [dp.SequenceLoader, dp.GraphLoader])
def test_a_window_that_the_device_has_no_memory_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    data = write(tmp_path / "set", make_records(40), shares="100/0/0")
    loader = kind(data, batch_size=4, device="cuda")

    def refuse(residency: Residency) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(loader, "_window_memory", refuse)
    with pytest.raises(dp.UsageError, match=r"the resident window takes 0\.00 GB on cuda:0, which has less left; expected"):
        next(iter(loader))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3000, 6000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    with pytest.raises(dp.UsageError, match="window='resident' does not fit: the resident window takes"):
        kind(data, batch_size=1, device="cuda", window="resident")
    assert kind(data, batch_size=1, device="cuda").window == "gather"


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["torch", "dali"])
@pytest.mark.parametrize("layers", [None, [2], [3, 0]])
def test_a_batch_of_single_steps_is_one_kernel(gpu_log: Log, tmp_path: Path, layers: Any, engine: Any) -> None:
    """One copy per piece, and one of numbers, labels and fields for many batches; no wait, no pageable copy."""
    rng, layered = np.random.default_rng(0), layers is not None
    shape: dict[str, Any] = {"shape": (4, 8), "axes": ("layer", "feature")} if layered else {"shape": (8,)}
    schema = dp.Schema(
        sequence=dp.Field(dtype="float16", **shape), step_axis="token", fields={"step.token": dp.Field(dtype="int32")}
    )
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0"), shard_bytes=4096) as writer:
        for number in range(500):
            steps = int(rng.integers(1, 9))
            values = rng.integers(-50, 50, (steps, *shape["shape"])).astype(np.float32)
            writer.write({"id": number, "label": 0, "sequence": values, "fields": {"step.token": np.arange(steps)}})
    data = dp.open_dataset(tmp_path / "set")
    options: dict[str, Any] = {"batch_size": 16, "window_bytes": 60_000, "engine": engine, "normalize": True, "layers": layers}
    loader: Any = dp.SequenceLoader(data, device="cuda", unit="step", **options)
    residency = Residency.of(loader.plan(0), 0, 1)
    assert (loader.window, residency is not None and residency.whole) == ("resident", False)
    assert residency is not None
    pieces = sum(len(list(residency.pieces(group, loader._record_bytes))) for group in residency.groups)
    gpu_log.clear()
    batches = list(loader)
    assert len(batches) == len(loader) > 100
    assert [line for line in gpu_log.lines("wait") if "event.synchronize" not in line] == []
    assert gpu_log.lines("pageable copy") == []
    superbatches = 7 + len(residency.groups) + len(batches) // 64
    assert gpu_log.number("pinned copy") <= (pieces if engine == "torch" else 0) + superbatches
    # with a layer axis, a batch is decoded when it is taken: cast, subtract, multiply, and once more contiguous
    assert gpu_log.number("kernel") <= (6 if layered else 1) * len(batches) + 6 * pieces + 3 * superbatches
    on_cpu: Any = dp.SequenceLoader(data, device="cpu", window="gather", unit="step", **options)
    for ours, theirs in zip(batches, on_cpu, strict=True):
        assert_same([ours.to("cpu")], [theirs])


@pytest.mark.gpu
def test_batches_of_graphs_from_the_window_share_their_kernels(gpu_log: Log, tmp_path: Path) -> None:
    """One copy per piece, and one for up to 64 batches, which are made at once; no wait, no pageable copy."""
    schema = replace(SCHEMA, fields=FIELDS)
    records = [with_fields(record, number) for number, record in enumerate(make_records(1000))]
    data = write(tmp_path / "set", records, schema=schema, shares="100/0/0")
    options: dict[str, Any] = {"batch_size": 4, "window_bytes": 300_000}
    loader = dp.GraphLoader(data, device="cuda", **options)
    assert loader.window == "resident"
    residency = Residency.of(loader.plan(0), 0, 1)
    assert residency is not None
    assert not residency.whole
    groups = len(residency.groups)
    pieces = sum(len(list(residency.pieces(group, loader.selection.record_bytes))) for group in residency.groups)
    gpu_log.clear()
    batches = list(loader)
    assert len(batches) == 250
    assert [line for line in gpu_log.lines("wait") if "event.synchronize" not in line] == []
    assert gpu_log.lines("pageable copy") == []
    superbatches = 7 + groups + len(batches) // 64
    assert gpu_log.number("pinned copy") <= pieces + superbatches
    fields = 2 + len(FIELDS)
    assert gpu_log.number("kernel") <= len(batches) + fields * pieces + (20 + 2 * fields) * superbatches
    for ours, theirs in zip(batches, dp.GraphLoader(data, device="cpu", window="gather", **options), strict=True):
        assert_same([ours.to("cpu")], [theirs])


@pytest.mark.gpu
def test_scores_cost_a_wait_per_batch(gpu_log: Log, shape: tuple[str, dp.Dataset]) -> None:
    config = TrainConfig(models=("lstm",), batch_size=8)
    net = build_model("lstm", shape[1].schema, TWO, config)
    loader = make_loader("lstm", shape[1], config, "train", "cuda", shuffle=False)
    on_cpu = make_loader("lstm", shape[1], config, "train", "cpu", shuffle=False)
    expected = torch.cat([part.logits for part in score_batches(net, on_cpu, "fp32", Objective(TWO, torch.device("cpu")))])
    net = net.to(CUDA)
    gpu_log.clear()
    found = torch.cat([part.logits for part in score_batches(net, loader, "fp32", Objective(TWO, CUDA))])
    assert gpu_log.number("wait") <= len(loader) + 1
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", MODELS)
def test_bf16_is_never_float16(gpu_log: Log, shape: tuple[str, dp.Dataset], model: Any, precision: Any) -> None:
    """cuDNN's LSTM under autocast is float16 whatever was asked for, and there is no loss scaling but with fp16."""
    config = TrainConfig(models=(model,), batch_size=8, precision=precision)
    net = build_model(model, shape[1].schema, TWO, config).to(CUDA)
    stepper = Stepper(net, config, Objective(TWO, CUDA), 100, CUDA, Processes(dp.World()))
    batch = next(iter(make_loader(model, shape[1], config, "train", "cuda")))
    gpu_log.clear()
    share = stepper.step(batch, 0, 8, 0 if model == "gvae_lstm" else None)
    types = {what for kind, what, _ in gpu_log.counts if kind == "LSTM"}
    assert types == {"float16" if precision == "fp16" else "float32"}
    assert torch.isfinite(share.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_training_on_a_gpu_is_that_of_a_cpu(tmp_path: Path, model: Any) -> None:
    """Losses and scores, and the same on going on from a checkpoint."""
    data = write(tmp_path / "set", make_records(90))
    config = TrainConfig(models=(model,), epochs=2, batch_size=16, dropout=0.0)

    def trained(name: str, device: str) -> Trainer:
        folder = tmp_path / name
        folder.mkdir()
        processes = Processes(dp.World())
        return Trainer(model, data, config, folder, Conduct(device=device), Interrupts(processes), processes)

    found: dict[str, tuple[Any, Any]] = {}
    for device in ("cpu", "cuda"):
        trainer = trained(device, device)
        history = [trainer.train_epoch(lambda *_: None) for _ in range(2)]
        trainer.load_best()
        found[device] = [row["train_loss"] for row in history], trainer.predict("test").scores
        trainer.writer.wait()
    for ours, theirs in zip(found["cpu"], found["cuda"], strict=True):
        assert np.allclose(ours, theirs, atol=2e-4)
    again = trained("again", "cuda")
    again.restore(tmp_path / "cuda" / f"{model}-last.pt")
    assert again.finished
    again.load_best()
    assert np.allclose(again.predict("test").scores, found["cuda"][1], atol=1e-5)


@pytest.mark.gpu
def test_unfit_records_are_named_on_a_gpu_too(tmp_path: Path) -> None:
    records = make_records(8, ragged=False)
    assert records[5].graphs is not None
    records[5].graphs.x[3] = np.nan
    data = write(tmp_path / "set", records, shares="100/0/0")
    (batch,) = dp.GraphLoader(data, batch_size=8, device="cuda", shuffle=False)
    assert unfit_records(batch) == ["record-5"]


@pytest.mark.gpu
def test_ragged_normalized_padding_is_zero(shape: tuple[str, dp.Dataset]) -> None:
    for batch in dp.SequenceLoader(shape[1], batch_size=8, device="cuda", engine="torch", normalize=True):
        for row, length in zip(batch.sequences.cpu(), batch.lengths.tolist(), strict=True):
            assert (row[length:] == 0).all()
            assert (row[:length] != 0).any()


@pytest.mark.gpu
def test_pinned_memory_is_not_used_again_while_it_is_read(gpu_log: Log, tmp_path: Path) -> None:
    """Large enough that buffers are used again; the pretended GPU reads late, and finds what was changed meanwhile."""
    rows = np.random.default_rng(0).normal(size=(64, 33, 512)).astype(np.float16)
    schema = dp.Schema(sequence=dp.Field(dtype="float16", shape=(512,)))
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        for number, row in enumerate(rows):
            writer.write({"id": str(number), "label": 0, "sequence": row})
    loader = dp.SequenceLoader(
        dp.open_dataset(tmp_path / "set"), batch_size=32, device="cuda", engine="torch", dtype=torch.float16, num_workers=2
    )
    for _ in range(12):
        for batch in loader:
            assert torch.equal(batch.sequences[0].cpu(), torch.from_numpy(rows[int(batch.ids[0])]))
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_the_pretended_gpu_sees_memory_that_is_used_too_soon(gpu_log: Log) -> None:
    """Or the test above could not fail."""
    memory = Buffers(pinned=True)
    array = memory.take(4096)
    array[:] = 1
    copied = torch.from_numpy(array).to(CUDA, non_blocking=True)
    array[:] = 2
    with pytest.raises(AssertionError, match="used again"):
        torch.cuda.synchronize()
    early = copied.to("cpu", non_blocking=True)
    assert int(early.sum()) == 0  # not there yet
    torch.cuda.synchronize()
    assert int(early.sum()) == 4096
    with UnderWay(CUDA) as under_way:
        under_way.keep(array)
        assert len(under_way._kept) == 1
        under_way.keep(array)
        under_way.keep(array)
        assert len(under_way._kept) < 3  # the first has passed
    assert not under_way._kept
    with pytest.raises(RuntimeError, match="same device"):
        copied + torch.ones(4096)


@pytest.mark.gpu
def test_a_gpus_gaps_are_its_own(gpu_log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that waits for data beside a busy GPU loses nothing; a GPU that waits is told, whatever the host does."""
    now = [0.0]
    monkeypatch.setattr(PretendedEvent, "record", lambda self, *_: setattr(self, "at", now[0]))
    monkeypatch.setattr(PretendedEvent, "query", lambda _: True)
    monkeypatch.setattr(PretendedEvent, "elapsed_time", lambda self, other: 1e3 * (other.at - self.at))

    def batches() -> Iterator[int]:
        for number in range(4):
            now[0] += 100.0 if not number else 1.0  # before the first batch there is no gap
            yield number

    timer = dp.StepTimer(CUDA)
    for _ in timer(batches()):
        now[0] += 3.0
    assert timer.gap_share == pytest.approx(3 / (3 + 12))
    for _ in timer([0]):  # a second loop, after a pause that is no gap
        now[0] += 3.0
    assert timer.gap_share == pytest.approx(3 / (3 + 15))
    assert dp.StepTimer().gap_share == dp.StepTimer(CUDA).gap_share == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sequences", "graphs"])
def test_too_little_memory_is_said_with_what_is_needed(
    gpu_log: Log, shape: tuple[str, dp.Dataset], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    make: Callable[..., Any] = dp.SequenceLoader if kind == "sequences" else dp.GraphLoader
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2000, 9_000_000))
    with pytest.raises(dp.UsageError, match=r"a batch of 32 .* takes \d\.\d\d GB on cuda:0.* expected a smaller batch_size"):
        make(shape[1], batch_size=32, device="cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 1_000_000)  # which torch keeps for later, and hands out again
    make(shape[1], batch_size=32, device="cuda")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 1_000_000)
    with pytest.raises(dp.UsageError, match="are free"):
        make(shape[1], batch_size=32, device="cuda")


@pytest.mark.gpu
def test_a_step_that_does_not_fit_is_a_sentence(gpu_log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "set", make_records(60))
    processes = Processes(dp.World())
    config = TrainConfig(models=("lstm",), epochs=1, batch_size=16)
    trainer = Trainer("lstm", data, config, tmp_path, Conduct(device="cuda"), Interrupts(processes), processes)

    def step(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB")

    monkeypatch.setattr(trainer.stepper, "step", step)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 7_000_000_000)
    with pytest.raises(dp.PipelineError) as caught:
        trainer.train_epoch(lambda *_: None)
    assert str(caught.value) == (
        "lstm: a step on 16 records takes more memory than cuda:0 has: 7.00 of 8.59 GB were in use at most, and then it tried "
        "to allocate 2.00 GiB; take a smaller --batch-size, or --accumulate 2 or more to go through it in pieces"
    )


def test_processes_that_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs are told apart by their names: a launcher may show every process one GPU alone, and all of them call it number 0."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for count, expected in ((1, 0), (4, 3)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        Processes(dp.World(rank=3, world_size=4, local_rank=3))._take_gpu("cuda")
        assert taken[-1] == expected

    class Properties:
        uuid = "GPU-1"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    processes = Processes(dp.World(rank=0, world_size=4))
    monkeypatch.setattr(processes, "first", lambda check: check())
    for others, shared in ((["GPU-2", "GPU-3", "GPU-4"], False), (["GPU-2", "GPU-1", "GPU-4"], True)):
        monkeypatch.setattr(processes, "gather", lambda own, others=others: [own, *((own[0], one) for one in others)])
        if shared:
            with pytest.raises(dp.UsageError, match=r"processes 0 and 2 share GPU GPU-1 of .*; expected a GPU each"):
                processes._check_gpus()
        else:
            processes._check_gpus()


def test_a_gpu_named_by_its_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or GPU 0 would give the random numbers and have a context."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for device in ("cuda:1", "cpu"):
        with Processes.join(device):
            pass
    assert taken == [torch.device("cuda", 1)]
    with pytest.raises(dp.UsageError, match="torch sees 2 GPUs"), Processes.join("cuda:2"):
        pass


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "int8 by step", "int16", "uint8"])
def test_dalis_graph_is_all_on_the_gpu(dtype: str, normalize: bool, pads: bool) -> None:
    """Every operator is registered for the GPU, and no constant is on the CPU, from where it would cross for every sample."""
    backend: Any = pytest.importorskip("nvidia.dali.backend")

    steps = 3 if "step" in dtype else 1
    field = dp.Field.scaled(np.ones((steps, 4), np.float32)) if "int8" in dtype and "u" not in dtype else None
    field = field or dp.Field(dtype=dtype, shape=(4,))
    statistics = FeatureStatistics(mean=(0.5,) * 4, std=(2.0,) * 4) if normalize else None
    decoding = Decoding.of(field, None, statistics, torch.float16, torch.device("cpu"))
    options = {"batch_size": 4, "num_threads": 1, "prefetch_queue_depth": 2}

    def feed() -> list[np.ndarray[Any, Any]]:
        raise StopIteration

    graph = sequence_graph(feed, decoding=decoding, pads=pads, device_id=0, **options)
    graph._build_graph()  # in Python alone: no device is needed
    names = {}
    for operator in graph._ops:
        (output,) = operator.outputs
        kind = operator.name.strip("_").rpartition("_")[0]
        names[kind] = output.device
    source = names.pop("ExternalSource")
    assert source == "cpu"
    assert set(names.values()) == {"gpu"}
    registered = {name.strip("_") for name in backend.RegisteredGPUOps()}
    assert {name.strip("_") for name in names} <= registered
    assert ("Constant" in names) == (normalize or bool(field.scales))


def test_models_take_counts_from_either_device() -> None:
    """A GNN's counts come on the CPU; those that lie elsewhere cost a wait, and no error."""
    model = GNNLSTMDetector(SCHEMA.x.shape[0] if SCHEMA.x else 1)
    assert isinstance(model, torch.nn.Module)
    sequences, lengths = torch.randn(5, 7, 3), torch.tensor([7, 2, 5, 1, 7])
    net = LSTMDetector(3).eval()
    together = net(sequences, lengths).logits_BK
    for row, length in enumerate(lengths.tolist()):
        alone = net(sequences[row : row + 1, :length], lengths[row : row + 1]).logits_BK
        assert torch.allclose(together[row], alone[0], atol=1e-6)


def test_on_a_cpu_nothing_is_pinned() -> None:
    values = torch.ones(3)
    assert to_device(values, torch.device("cpu")) is values
    assert forward is not None
