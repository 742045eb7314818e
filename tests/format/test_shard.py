from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import xxhash
from safetensors.numpy import load_file

from dali_pipeline.errors import FormatError, PipelineError
from dali_pipeline.format.header import parse_header
from dali_pipeline.format.shard import Shard, ShardInfo
from dali_pipeline.format.shardfile import ShardFile
from dali_pipeline.storage.files import Files
from dali_pipeline.types import BLOCK_BYTES
from tests.helpers.records import write_shard

ARRAYS: dict[str, Any] = {
    "sequence": np.arange(3 * 700 * 300, dtype=np.float32).reshape(-1, 300),  # 2.5 MB: ten blocks
    "sequence.offsets": np.array([0, 700, 1400, 2100]),
    "labels": np.array([0, 1, 0]),
    "empty": np.zeros((0, 2), np.uint8),
}


def write(tmp_path: Path) -> tuple[Path, ShardInfo]:
    path = tmp_path / "sequences-00000.safetensors"
    return path, write_shard(path, "sequences", 3, ARRAYS)


def opened(path: Path, info: ShardInfo) -> Shard:
    return Shard(path, nbytes=info.bytes, digest=info.digest, sound=bytearray(info.blocks), files=Files())


def test_any_safetensors_tool_reads_it(tmp_path: Path) -> None:
    path, info = write(tmp_path)
    assert path.stat().st_size == info.bytes
    loaded = load_file(path)
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert np.array_equal(loaded[name], array)
        assert np.array_equal(opened(path, info).read(name), array)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_same_arrays_same_bytes(tmp_path: Path) -> None:
    one, info = write(tmp_path)
    other = tmp_path / "again.safetensors"
    assert write_shard(other, "sequences", 3, dict(reversed(ARRAYS.items()))) == info
    assert one.read_bytes() == other.read_bytes()


def test_rows_are_read_from_anywhere(tmp_path: Path) -> None:
    shard = opened(*write(tmp_path))
    assert np.array_equal(shard.read("sequence", 5, 1999), ARRAYS["sequence"][5:1999])
    assert shard.read("sequence", 7, 7).shape == (0, 300)
    with pytest.raises(FormatError, match="offsets do not fit"):
        shard.read("sequence", 0, 2101)


def test_every_flipped_byte_is_found_and_named(tmp_path: Path) -> None:
    """Law 10, header and data alike; blocks that are sound stay readable."""
    path, info = write(tmp_path)
    good = path.read_bytes()
    arrays = opened(path, info).arrays
    layout, header_end = arrays["sequence"], min(layout.begin for layout in arrays.values())
    places = [0, 9, header_end - 1, layout.begin, layout.begin + BLOCK_BYTES + 5, layout.begin + layout.nbytes - 1]
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        if place < header_end:
            with pytest.raises(FormatError, match=path.name):
                opened(path, info)
            continue
        with pytest.raises(FormatError, match=r"sequence: bytes \d+ to \d+ are damaged"):
            opened(path, info).read("sequence")
        assert np.array_equal(opened(path, info).read("labels"), ARRAYS["labels"])
    path.write_bytes(good)
    assert np.array_equal(opened(path, info).read("sequence"), ARRAYS["sequence"])


def test_a_block_is_hashed_once(tmp_path: Path) -> None:
    path, info = write(tmp_path)
    sound = bytearray(info.blocks)
    shard = Shard(path, nbytes=info.bytes, digest=info.digest, sound=sound, files=Files())
    assert sum(sound) == 0
    shard.read("sequence", 0, 10)
    assert sum(sound) == 1
    shard.read("sequence")
    assert sum(sound) == math.ceil(2100 * 300 * 4 / BLOCK_BYTES)


def test_truncated_and_missing_files_are_errors(tmp_path: Path) -> None:
    path, info = write(tmp_path)
    shard = opened(path, info)
    os.truncate(path, info.bytes - 1000)
    with pytest.raises(FormatError, match="cut while in use"):
        shard.read("sequence")
    with pytest.raises(FormatError, match=f"expected {info.bytes} as in the manifest"):
        opened(path, info)
    path.unlink()
    with pytest.raises(FormatError, match="cannot be opened"):
        opened(path, info)


def test_few_files_stay_open(tmp_path: Path) -> None:
    def number_open() -> int:
        return sum(file.path.startswith(f"{tmp_path}/") for file in psutil.Process().open_files())

    files = Files(limit=4)
    paths = [tmp_path / str(number) for number in range(20)]
    for path in paths:
        path.write_bytes(b"x")
        assert os.pread(files.get(path).fd, 1, 0) == b"x"
    assert number_open() == 4
    kept = files.get(paths[0])
    for path in paths:
        files.get(path)
    assert os.pread(kept.fd, 1, 0) == b"x"  # put out, but open as long as it is held
    del files, kept
    assert number_open() == 0


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="could not be written"):
        write_shard(tmp_path / "missing" / "a.safetensors", "sequences", 3, ARRAYS)
    assert list(tmp_path.iterdir()) == []


def header_of(table: dict[str, Any], hashes: dict[str, str], **meta: Any) -> bytes:
    inner = {"block_bytes": BLOCK_BYTES, "hashes": hashes, "kind": "sequences", "records": 1, "version": 1, **meta}
    text = json.dumps({**table, "__metadata__": {"dali_pipeline": json.dumps(inner)}}).encode()
    return len(text).to_bytes(8, "little") + text


def entry(begin: int, end: int, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


HASH = xxhash.xxh3_64_hexdigest(b"")


@pytest.mark.parametrize(
    ("table", "hashes", "data_bytes"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, {"a": HASH, "b": HASH}, 12),  # overlap
        ({"a": entry(0, 4), "b": entry(8, 12)}, {"a": HASH, "b": HASH}, 12),  # hole
        ({"a": entry(0, 8)}, {"a": HASH}, 12),  # bytes behind the last array
        ({"a": entry(0, 16)}, {"a": HASH}, 12),  # array beyond the end
        ({"a": entry(8, 0)}, {"a": ""}, 8),  # backward
        ({"a": entry(0, 8, "F16")}, {"a": HASH}, 8),  # shape and bytes disagree
        ({"a": entry(0, 8, shape=[-8])}, {"a": HASH}, 8),
        ({"a": entry(0, 8, shape="8")}, {"a": HASH}, 8),
        ({"a": entry(0, 8, "C64")}, {"a": HASH}, 8),  # a type that does not exist
        ({"a": entry(0, 8)}, {}, 8),  # no hash
        ({"a": entry(0, 8)}, {"a": HASH * 2}, 8),  # a hash too many
        ({"a": entry(0, 8)}, {"a": "zz"}, 8),
        ({"a": 5}, {"a": HASH}, 8),
        ({"a": {"dtype": "U8"}}, {"a": HASH}, 8),
    ],
)
def test_headers_that_lie_are_refused(table: dict[str, Any], hashes: dict[str, str], data_bytes: int) -> None:
    header = header_of(table, hashes)
    with pytest.raises(FormatError, match=r"x\.safetensors"):
        parse_header(Path("x.safetensors"), header, len(header) + data_bytes)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    for number, content in enumerate(
        [b"", b"PK", b"\xff" * 8 + b"{}", (2).to_bytes(8, "little") + b"{}", (3).to_bytes(8, "little") + b"[1]"]
    ):
        path = tmp_path / f"{number}"
        path.write_bytes(content)
        digest = xxhash.xxh3_128_hexdigest(content)
        with pytest.raises(FormatError, match=str(path)):
            Shard(path, nbytes=len(content), digest=digest, sound=bytearray(), files=Files())


def test_room_is_made_where_names_take_more_than_was_left(tmp_path: Path) -> None:
    """Many more bytes of other arrays than expected: their hashes do not fit the room that was left for the header."""
    path = tmp_path / "sequences-00000.safetensors"
    rows = np.arange(3_000_000, dtype=np.float32).reshape(-1, 3)
    file = ShardFile(path, "sequences", "sequence", "float32", (3,), expected_bytes=1)
    file.append(rows)
    others: dict[str, Any] = {"ids": np.arange(200 << 20, dtype=np.uint8), "labels": np.zeros(1, np.int64)}
    info = file.close(1, others)
    shard = opened(path, info)
    assert np.array_equal(shard.read("sequence"), rows)
    assert np.array_equal(shard.read("ids"), others["ids"])
    assert load_file(path)["sequence"].shape == rows.shape
