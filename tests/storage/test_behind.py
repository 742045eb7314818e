"""WriteBehind: the bytes that were given, wherever they begin and however the file system takes them."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dali_pipeline.storage.behind import WriteBehind


def write(path: Path, begin: int, parts: list[bytes], nbytes: int) -> bytes:
    """Write parts of at most `nbytes`, the last by `finish`; return the file."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        behind = WriteBehind(fd, begin, nbytes)
        for part in parts[:-1]:
            behind.free[: len(part)] = part
            behind.write(len(part))
        behind.free[: len(parts[-1])] = parts[-1]
        behind.finish(len(parts[-1]))
        assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT  # small writes follow, anywhere
        os.pwrite(fd, b"head", 0)
    finally:
        os.close(fd)
    return path.read_bytes()


def random_parts(sizes: list[int]) -> list[bytes]:
    return [np.random.default_rng(size).bytes(size) for size in sizes]


@pytest.mark.parametrize("begin", [8, 4096, 6408, 12296])
@pytest.mark.parametrize("sizes", [[0], [10], [8192, 0], [8192, 8192, 8192, 5], [3, 1000, 8191, 4096, 17], [24] * 1000])
def test_every_byte_is_at_its_place(tmp_path: Path, begin: int, sizes: list[int]) -> None:
    parts = random_parts(sizes)
    found = write(tmp_path / "file", begin, parts, 8192)
    assert found[begin:] == b"".join(parts)
    assert found[:4] == b"head"


@pytest.mark.parametrize("refused", ["flag", "write"])
def test_a_file_system_without_direct_writes_takes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    set_flags, pwrite = fcntl.fcntl, os.pwrite
    refusals = 0

    def no_flag(fd: int, command: int, flags: int = 0) -> int:
        nonlocal refusals
        if refused == "flag" and command == fcntl.F_SETFL and flags & os.O_DIRECT:
            refusals += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return set_flags(fd, command, flags)

    def no_write(fd: int, data: Any, begin: int) -> int:
        nonlocal refusals
        if refused == "write" and set_flags(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refusals += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwrite(fd, data, begin)

    monkeypatch.setattr(fcntl, "fcntl", no_flag)
    monkeypatch.setattr(os, "pwrite", no_write)
    parts = random_parts([8192] * 5 + [100])
    assert write(tmp_path / "file", 6408, parts, 8192)[6408:] == b"".join(parts)
    assert refusals == 1


@pytest.mark.parametrize("good", [0, 1, 3])
def test_a_write_that_fails_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int) -> None:
    pwrite, calls = os.pwrite, 0

    def full(fd: int, data: Any, begin: int) -> int:
        nonlocal calls
        calls += 1
        if calls > good:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, begin)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", 6408, random_parts([8192] * 3 + [100]), 8192)
