"""docs/format.md shows the bytes of a shard; here they are held against the writer, byte by byte."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import dali_pipeline as dp
from tests.helpers.scripts import ROOT

PAGE = ROOT / "docs" / "format.md"


def dump(data: bytes) -> list[str]:
    """Dump bytes like `hexdump -C`: 16 bytes per line, a star for lines like the one before."""
    lines: list[str] = []
    before = b""
    for at in range(0, len(data), 16):
        part = data[at : at + 16]
        if part == before:
            if lines[-1] != "*":
                lines.append("*")
            continue
        before = part
        hexes = f"{part[:8].hex(' ')}  {part[8:].hex(' ')}".strip()
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{at:08x}  {hexes:<48}  |{text}|")
    return [*lines, f"{len(data):08x}"]


def test_the_worked_example_is_what_the_writer_writes(tmp_path: Path) -> None:
    field = dp.Field(dtype="float16", shape=(2, 1), axes=("layer", "feature"))
    fields = {"step.mask": dp.Field(dtype="bool"), "record.note": dp.Field(dtype="text")}
    schema = dp.Schema(sequence=field, fields=fields, step_axis="token", label=dp.Label(kind="value"))
    with dp.ShardWriter(tmp_path / "set", schema, split=dp.SplitRule.parse("100/0/0")) as writer:
        writer.write(
            {
                "id": "a",
                "group": "q",
                "label": 0.5,
                "sequence": [[[1], [2]], [[3], [4]]],
                "fields": {"step.mask": [0, 1], "record.note": "x"},
            }
        )
        writer.write(
            {"id": "b", "group": "q", "label": -1, "sequence": [[[-1], [0.5]]], "fields": {"step.mask": [1], "record.note": ""}}
        )
    data = (tmp_path / "set" / "train" / "sequences-00000.safetensors").read_bytes()
    block = re.search(r"(?m)(?:^    (?:[0-9a-f]{8}.*|\*)\n)+", PAGE.read_text())
    assert block is not None
    assert [line[4:].rstrip() for line in block.group().splitlines()] == dump(data)
    # the example's own claims
    begin = 8 + int.from_bytes(data[:8], "little")
    # layer 0 of both steps of a, layer 1 of them; then b, which has one step
    assert np.frombuffer(data[begin : begin + 12], "<f2").tolist() == [1, 3, 2, 4, -1, 0.5]
    assert len(data) % 2 == 0
