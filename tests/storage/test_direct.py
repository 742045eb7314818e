from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dali_pipeline.storage import direct
from dali_pipeline.storage.direct import read_past_cache
from dali_pipeline.storage.openfile import OpenFile

SIZE = 5_000_001


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_bytes(np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes())
    return file


def check(path: Path) -> None:
    """Read parts that begin and end anywhere, to addresses anywhere, and compare with the file."""
    rng, data = np.random.default_rng(1), np.frombuffer(path.read_bytes(), np.uint8)
    offsets = np.array([0, 1, 4095, 4096, 512, SIZE - 1, 3 << 20, *rng.integers(0, SIZE, 20)])
    sizes = np.array([SIZE, 4_000_000, 1, 4096, 300_000, 1, 1_000_000, *rng.integers(1, 3_000_000, 20)])
    sizes = np.minimum(sizes, SIZE - offsets)
    places = np.cumsum(sizes + 3) - sizes
    memory = np.full(int(places[-1] + sizes[-1]) + 1, 7, np.uint8)
    expected = memory.copy()
    for offset, size, place in zip(offsets.tolist(), sizes.tolist(), places.tolist(), strict=True):
        expected[place : place + size] = data[offset : offset + size]
    found = read_past_cache([OpenFile(path)] * len(offsets), offsets, memory.ctypes.data + places, sizes)
    assert found.tolist() == sizes.tolist()
    assert np.array_equal(memory, expected)


def is_direct(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("least", [1, direct.LEAST_BYTES])
def test_any_part_to_any_address(path: Path, monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    monkeypatch.setattr(direct, "LEAST_BYTES", least)
    check(path)


def test_a_file_that_ends_before(path: Path) -> None:
    memory = np.zeros(2_000_000, np.uint8)
    found = read_past_cache(
        [OpenFile(path)] * 2, np.array([SIZE - 1_000_000, SIZE + 5]), np.full(2, memory.ctypes.data), np.full(2, 2_000_000)
    )
    assert found.tolist() == [1_000_000, 0]


def test_a_file_that_was_replaced_is_still_the_one_that_was_opened(path: Path) -> None:
    file, size = OpenFile(path), 1_000_000
    old = path.read_bytes()[:size]
    other = path.with_name("other")
    other.write_bytes(bytes(SIZE))
    other.rename(path)
    memory = np.zeros(size, np.uint8)
    assert read_past_cache([file], np.array([0]), np.array([memory.ctypes.data]), np.array([size])).tolist() == [size]
    assert memory.tobytes() == old


def test_a_read_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> tuple[int, int]:
        return -1, errno.EIO

    if not is_direct(path):
        pytest.skip("this file system has no O_DIRECT")
    monkeypatch.setattr(direct, "_pread", fails)
    memory = np.zeros(1_000_000, np.uint8)
    found = read_past_cache([OpenFile(path)], np.array([5]), np.array([memory.ctypes.data]), np.array([len(memory)]))
    assert found.tolist() == [-errno.EIO]


@pytest.mark.parametrize("when", ["opened", "read"])
def test_a_file_system_that_refuses(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    opened = os.open

    def opens(name: Any, flags: int, *others: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return opened(name, flags, *others)

    if when == "opened":
        monkeypatch.setattr(os, "open", opens)
    else:
        monkeypatch.setattr(direct, "_pread", lambda *_: (-1, errno.EINVAL))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            check(path)
    assert len([record for record in caplog.records if "refuses O_DIRECT" in record.message]) == 1


def test_no_read_is_under_way_while_the_process_forks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end, read = threading.Event(), threading.Event(), direct._LIBC_PREAD
    under_way: list[bool] = []

    def waits(*arguments: Any) -> int:
        under_way.append(True)
        begun.set()
        may_end.wait(10)
        found = read(*arguments)
        under_way.clear()
        return int(found)

    monkeypatch.setattr(direct, "_LIBC_PREAD", waits)
    memory = np.zeros(1_000_000, np.uint8)
    arguments = [OpenFile(path)], np.array([0]), np.array([memory.ctypes.data]), np.array([len(memory)])
    reader = threading.Thread(target=read_past_cache, args=arguments)
    reader.start()
    assert begun.wait(10)
    threading.Timer(0.3, may_end.set).start()
    child = os.fork()
    if not child:
        os._exit(int(bool(under_way)))  # and reads of its own are possible
    reader.join()
    assert os.waitpid(child, 0)[1] == 0
    assert memory.tobytes() == path.read_bytes()[: len(memory)]


def test_a_child_reads_too(path: Path) -> None:
    check(path)
    child = os.fork()
    if not child:
        failed = 1
        try:
            check(path)
            failed = 0
        finally:
            os._exit(failed)
    assert os.waitpid(child, 0)[1] == 0
    check(path)


@pytest.mark.parametrize("block", [512, 4096])
def test_a_disk_of_larger_blocks(path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Reads that are no multiples of its blocks are refused, and then made by way of memory of the thread's own."""
    read, refused = direct._pread, []

    def strict(fd: int, address: int, nbytes: int, offset: int) -> tuple[int, int]:
        if address % block or nbytes % block or offset % block:
            refused.append(offset)
            return -1, errno.EINVAL
        return read(fd, address, nbytes, offset)

    monkeypatch.setattr(direct, "_pread", strict)
    file, data = OpenFile(path), np.frombuffer(path.read_bytes(), np.uint8)
    memory = np.zeros(3_000_000, np.uint8)
    aligned = memory.ctypes.data + -memory.ctypes.data % 4096
    for offset in (0, 512, 1024, 4096, 700):
        target = aligned + offset % 4096
        found = read_past_cache([file], np.array([offset]), np.array([target]), np.array([2_000_000]))
        assert found.tolist() == [2_000_000]
        begin = target - memory.ctypes.data
        assert np.array_equal(memory[begin : begin + 2_000_000], data[offset : offset + 2_000_000])
        memory[:] = 0
    assert file.direct_block == (block if is_direct(path) else 512)
    assert not file.refuses_direct or not is_direct(path)
    assert len(refused) <= 1
