from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import dali_pipeline as dp
from dali_pipeline.format.schema import FIELD_DTYPES
from dali_pipeline.loaders.decoding import Decoding, sequence_graph
from dali_pipeline.runtime import ahead
from tests import laws
from tests.helpers.batches import assert_same
from tests.helpers.records import make_records, write

ENGINES = ["torch", "dali"]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make(data: dp.Dataset, engine: str) -> laws.Make:
    def make_loader(**options: Any) -> dp.SequenceLoader:
        return dp.SequenceLoader(**{"data": data, "batch_size": 16, "window_bytes": 6000, "engine": engine, **options})

    return make_loader


def test_equal_lengths_need_no_padding(tmp_path: Path, engine: Any) -> None:
    records = {record.id: record for record in make_records(40, ragged=False)}
    data = write(tmp_path / "set", list(records.values()))
    for batch in dp.SequenceLoader(data, batch_size=8, engine=engine):
        assert batch.sequences.shape == (8, 5, 8)
        assert torch.equal(batch.sequences, torch.stack([torch.from_numpy(records[one].sequence).float() for one in batch.ids]))


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("dtype", FIELD_DTYPES)
def test_every_stored_type_is_delivered(tmp_path: Path, engine: Any, dtype: str, ragged: bool) -> None:
    rng, given = np.random.default_rng(0), "float32" if dtype == "bfloat16" else dtype  # NumPy has none
    rows = {str(n): rng.integers(0, 100, size=(2 + n % 3 if ragged else 4, 3)).astype(given) for n in range(12)}
    schema = dp.Schema(sequence=dp.Field(dtype=dtype, shape=(3,)), step_axis="layer")
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        for name, sequence in rows.items():
            writer.write({"id": name, "label": 0, "sequence": sequence})
    for delivered in (torch.float32, torch.float64):
        for batch in dp.SequenceLoader(dp.open_dataset(tmp_path / "set"), batch_size=5, engine=engine, dtype=delivered):
            assert batch.sequences.dtype == delivered
            expected = pad_sequence([torch.from_numpy(rows[one].astype(np.float64)) for one in batch.ids], batch_first=True)
            assert torch.equal(batch.sequences.double(), expected)


def test_set_epoch_in_a_running_loop_is_for_the_next(make: laws.Make) -> None:
    loader = make()
    for step, _ in enumerate(loader):
        if step == 2:
            loader.set_epoch(5)
    state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (5, 0)
    other = make()
    other.load_state_dict(state)
    assert_same(loader, other)


def test_a_split_too_small_to_drop_from_is_said(make: laws.Make) -> None:
    with pytest.raises(dp.DataError, match="too few for one batch with drop_last=True"):
        make(drop_last=True, batch_size=1000)


def test_values_are_those_that_were_written(make: laws.Make, records: dict[str, dp.Record]) -> None:
    positions = []
    for batch in make(shuffle=False):
        rows = [torch.from_numpy(np.asarray(records[one].sequence)).float() for one in batch.ids]
        assert torch.equal(batch.sequences, pad_sequence(rows, batch_first=True))
        assert batch.lengths.tolist() == [len(row) for row in rows]
        assert batch.labels.tolist() == [records[one].label for one in batch.ids]
        assert batch.sequences.dtype == torch.float32
        assert (batch.lengths.dtype, batch.labels.dtype, batch.valid.dtype) == (torch.int64, torch.int64, torch.bool)
        positions += batch.positions[batch.valid].tolist()
    assert positions == list(range(len(positions)))
    assert len(positions) > 100


@pytest.mark.parametrize("layers", [slice(1, 3), slice(None, None, 2), [1, 0], [-1], [0, 1, 1]])
def test_layers_choose_steps(make: laws.Make, records: dict[str, dp.Record], layers: Any) -> None:
    (batch, *_) = make(layers=layers)
    for row, length, one in zip(batch.sequences, batch.lengths.tolist(), batch.ids, strict=True):
        assert np.array_equal(row[:length].numpy(), np.asarray(records[one].sequence)[layers])


def test_layers_that_a_record_lacks_are_named(make: laws.Make) -> None:
    with pytest.raises(dp.DataError, match=r"layers \[7\] asked of a record with \d in split 'train'"):
        list(make(layers=[7]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
def test_dtype_is_what_is_delivered(make: laws.Make, dtype: torch.dtype) -> None:
    (batch, *_) = make(dtype=dtype)
    expected, *_ = make(dtype=torch.float32)
    assert batch.sequences.dtype == dtype
    assert torch.equal(batch.sequences, expected.sequences.to(dtype))


@pytest.mark.parametrize("ragged", [True, False])
def test_dali_casts_and_pads_as_torch_does(ragged: bool) -> None:
    """The graph that a GPU runs, on the CPU: cast in DALI, held against torch."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, size=6) if ragged else np.full(6, 5)
    rows = [rng.normal(scale=100, size=(n, 4)).astype(np.float16) for n in lengths]
    values: Any = rows if ragged else np.stack(rows)
    decoding = Decoding(bfloat16=False, scale=None, mean=None, inverse=None, dtype=torch.float32)
    pipeline = sequence_graph(
        lambda: values,
        decoding=decoding,
        pads=ragged,
        batch_size=6,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
    )
    pipeline.build()
    (output,) = pipeline.run()
    sequences = torch.utils.dlpack.from_dlpack(output.as_tensor())
    assert torch.equal(sequences, pad_sequence([torch.from_numpy(row).float() for row in rows], batch_first=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_is_raised_behind_the_good_batches(tmp_path: Path, engine: Any, num_workers: int) -> None:
    data = write(tmp_path / "set", make_records(100), shard_bytes=1500)
    path = data.shard_path("train", "sequences", 3)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    loader = dp.SequenceLoader(data, batch_size=4, shuffle=False, engine=engine, num_workers=num_workers)
    good = 0
    with pytest.raises(dp.FormatError, match=r"sequences-00003\.safetensors.*damaged"):
        for _ in loader:
            good += 1
    assert good == sum(data.table("train", "sequences").records[:3]) // 4


def test_damage_is_named_by_file_field_and_record(tmp_path: Path, engine: Any) -> None:
    data = write(tmp_path / "set", make_records(10), shares="100/0/0", shard_bytes=1 << 20)
    path = data.shard_path("train", "sequences", 0)
    content = bytearray(path.read_bytes())
    content[content.index(make_records(10)[0].sequence.tobytes())] ^= 1
    path.write_bytes(content)
    words = r"sequences-00000\.safetensors, sequence: bytes 0 to .* damaged .*\(met in record 'record-0'\)"
    with pytest.raises(dp.FormatError, match=words):
        list(dp.SequenceLoader(data, batch_size=4, shuffle=False, engine=engine))


def test_nothing_is_left_behind(make: laws.Make) -> None:
    """No thread and no file descriptor more after 30 epochs, most of them broken off."""
    loader = make(num_workers=2)

    def epochs(count: int) -> None:
        for epoch in range(count):
            for step, _ in enumerate(loader):
                if step == epoch % 5:
                    break
        gc.collect()

    list(loader)  # opens every shard
    epochs(3)
    before = threading.active_count(), psutil.Process().num_fds(), psutil.Process().num_threads()
    epochs(30)
    after = threading.active_count(), psutil.Process().num_fds(), psutil.Process().num_threads()
    assert after <= before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"num_workers": "many"}, "num_workers is 'many'"),
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"engine": "tensorflow"}, "engine is 'tensorflow'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "cuda:99"}, "torch sees"),
        ({"rank": 1}, "give both rank and world_size"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"num_partitions": 3}, "does not divide by 3 partitions"),
        ({"seed": -1}, "seed is -1"),
        ({"window_bytes": 0}, "window_bytes is 0"),
        ({"window_bytes": 2**70}, "window_bytes is"),
        ({"layers": 5}, "layers are 5"),
        ({"layers": "last"}, "layers are 'last'"),
        ({"layers": [True, False]}, "layers are"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"dtype": torch.int64}, "dtype is torch.int64"),
        ({"shuffle": "no"}, "shuffle is 'no'"),
        ({"device": None}, "device is 'None'"),
        ({"rank": "0", "world_size": 1}, "rank is '0'"),
        ({"data": "folder"}, "data is 'folder'"),
    ],
)
def test_senseless_arguments_are_refused(make: laws.Make, options: dict[str, Any], words: str) -> None:
    with pytest.raises(dp.UsageError, match=words):
        make(**options)
    with pytest.raises(dp.UsageError, match="epoch is -1"):
        make().set_epoch(-1)


def test_an_empty_split_is_an_empty_epoch(tmp_path: Path, engine: Any) -> None:
    data = write(tmp_path / "set", make_records(20), shares="100/0/0")
    loader = dp.SequenceLoader(data, "val", engine=engine)
    assert len(loader) == 0
    assert list(loader) == []
    assert len(list(dp.SequenceLoader(data, "train", engine=engine))) == 1


def test_foreign_workers_are_refused(make: laws.Make) -> None:
    from torch.utils.data import DataLoader

    assert [batch.ids for batch in DataLoader(make(), batch_size=None)] == [batch.ids for batch in make()]
    with pytest.raises(dp.UsageError, match="workers of its own"):
        next(iter(DataLoader(make(), batch_size=None, num_workers=1, multiprocessing_context="fork")))


def test_auto_is_a_thread_unless_it_would_only_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, short, long, on_gpu in ((1, 0, 0, 1), (2, 0, 1, 1), (3, 1, 1, 1), (8, 1, 1, 2), (16, 1, 1, 4), (96, 1, 1, 4)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        for record_bytes, threads in ((0, short), (2_000, short), (67_584, long)):
            assert ahead.background_threads(torch.device("cpu"), record_bytes) == threads
            assert ahead.background_threads(torch.device("cuda", 0), record_bytes) == on_gpu


def test_torch_leaves_the_cores_that_others_work_on(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("dali_pipeline.runtime.ahead.allowed_cores", lambda: 8.0)
    assert [ahead.cores_beside(busy) for busy in (0, 1, 3, 8, 20)] == [8, 7, 5, 1, 1]
    seen: list[int] = []
    try:
        torch.set_num_threads(4)
        with ahead.on_threads(1):
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
            seen.append(torch.get_num_threads())
        with ahead.on_threads(8):  # no more than the user wants
            seen.append(torch.get_num_threads())
        assert (seen, torch.get_num_threads()) == ([4, 1, 4], 4)
    finally:
        torch.set_num_threads(before)


def test_decodes_on_the_cores_that_are_left(data: dp.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dali_pipeline.runtime.ahead.allowed_cores", lambda: 8.0)
    options: list[dict[str, Any]] = [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "dtype": torch.float16}]
    cores = [dp.SequenceLoader(data, engine=engine, **each).cores for engine in ("torch", "dali") for each in options]
    assert cores == [8, 6, 8, 6, 4, 8]
    found: list[int] = []
    run = Decoding.run

    def seen(*arguments: Any) -> torch.Tensor:
        found.append(torch.get_num_threads())
        return run(*arguments)

    monkeypatch.setattr(Decoding, "run", seen)
    monkeypatch.setattr("dali_pipeline.runtime.ahead.allowed_cores", lambda: 2.0)
    every = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for num_workers in (0, 1):
            next(iter(dp.SequenceLoader(data, engine="torch", num_workers=num_workers)))
    finally:
        torch.set_num_threads(every)
    assert found == [2, 1]
