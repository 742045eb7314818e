"""Reads in one call, with and without the system's own; memory that is used again; rows gathered across all borders."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from dali_pipeline.runtime.memory import Buffers
from dali_pipeline.storage import reads


@pytest.fixture(params=["together", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "one by one":
        monkeypatch.setattr(reads, "_context", lambda: None)
    return str(request.param)


def read(fds: list[int], offsets: list[int], out: np.ndarray, size: int) -> list[int]:
    addresses = out.ctypes.data + np.arange(len(fds)) * size
    found = reads.read_many(np.array(fds), np.array(offsets), addresses, np.full(len(fds), size))
    return [int(each) for each in found]


def test_every_read_lands_where_it_should(tmp_path: Path, way: str) -> None:
    """More reads than go into one call, in any order, from two files."""
    content = np.random.default_rng(0).integers(0, 256, (2, 100_000), dtype=np.uint8)
    fds = []
    for number, each in enumerate(content):
        (tmp_path / str(number)).write_bytes(each.tobytes())
        fds.append(os.open(tmp_path / str(number), os.O_RDONLY))
    count = 2 * reads.READS_AT_ONCE + 7
    which, offsets = np.arange(count) % 2, np.random.default_rng(1).integers(0, 99_000, count)
    out = np.zeros((count, 50), np.uint8)
    assert read([fds[each] for each in which], offsets.tolist(), out, 50) == [50] * count
    assert all((out[i] == content[which[i], offsets[i] : offsets[i] + 50]).all() for i in range(count))
    for fd in fds:
        os.close(fd)


def test_short_and_failing_reads_are_told_from_whole_ones(tmp_path: Path, way: str) -> None:
    (tmp_path / "short").write_bytes(b"x" * 60)
    fd = os.open(tmp_path / "short", os.O_RDONLY)
    closed = os.open(tmp_path / "short", os.O_RDONLY)
    os.close(closed)
    out = np.zeros((4, 40), np.uint8)
    whole, short, behind, failed = read([fd, fd, fd, closed], [0, 40, 90, 0], out, 40)
    assert (whole, short, behind) == (40, 20, 0)
    assert failed < 0
    os.close(fd)


def test_a_sandbox_that_forbids_half_of_the_calls_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reads are told as failed, and whoever called does them one by one."""
    (tmp_path / "file").write_bytes(b"abcd" * 10)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    setup, _, submit = reads._NUMBERS[os.uname().machine]
    monkeypatch.setitem(reads._NUMBERS, os.uname().machine, (setup, 9999, submit))
    assert read([fd] * 3, [0, 4, 8], np.zeros((3, 4), np.uint8), 4) == [-1] * 3
    os.close(fd)


def test_a_forked_child_reads_with_calls_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abcd" * 10)
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    out = np.zeros((3, 4), np.uint8)
    assert read([fd] * 3, [0, 4, 8], out, 4) == [4] * 3
    child = os.fork()
    if not child:
        os._exit(0 if read([fd] * 3, [0, 4, 8], out, 4) == [4] * 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    os.close(fd)


def test_memory_is_used_again_only_when_nothing_looks_at_it() -> None:
    buffers = Buffers()
    first = buffers.take(3 << 20, phase=40)
    assert (first.ctypes.data % 4096, len(first)) == (40, 3 << 20)
    at = first.ctypes.data
    tensor = torch.from_numpy(first.view(np.float16)).view(3, -1)[1]
    tensor.fill_(7)
    del first
    second = buffers.take(3 << 20)
    second[:] = 0
    assert (tensor == 7).all()
    assert abs(second.ctypes.data - at) > 4096
    del tensor, second
    again = {buffers.take(3 << 20, phase=40).ctypes.data for _ in range(4)}  # each let go before the next
    assert at in again
    assert len(again) == 2


def test_memory_of_another_size_is_let_go_and_pieces_survive_a_pickle() -> None:
    buffers = pickle.loads(pickle.dumps(Buffers(kept=3)))
    buffers.take(2 << 20)
    large = buffers.take(20 << 20)
    assert len(large) == 20 << 20
    assert [len(piece) for piece in buffers._pieces] == [22 << 20]
    del large
    assert len(buffers.take(9)) == 9
    for _ in range(9):
        batches = [buffers.take(20 << 20) for _ in range(4)]
    assert len(buffers._pieces) == 3
    del batches
