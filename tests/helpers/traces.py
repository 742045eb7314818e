"""Traces that `Trace` wrote, read and checked."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

Event = dict[str, Any]


def read(path: Path) -> list[Event]:
    """The spans of a sound file: each complete, its process and thread named, nested within each thread."""
    events = json.loads(path.read_text())
    names = {(one["name"], one["pid"], one["tid"]) for one in events if one["ph"] == "M"}
    spans = [one for one in events if one["ph"] == "X"]
    assert len(names) + len(spans) == len(events)
    threads = defaultdict(list)
    for one in spans:
        assert one["ts"] >= 0
        assert one["dur"] >= 0
        assert ("process_name", one["pid"], one["pid"]) in names
        assert ("thread_name", one["pid"], one["tid"]) in names
        threads[one["tid"]].append((one["ts"], one["ts"] + one["dur"]))
    for each in threads.values():
        open_ends: list[float] = []
        for begin, end in sorted(each, key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= begin + 0.002:  # rounded to nanoseconds
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 0.002, "it ends within what it began in"
            open_ends.append(end)
    return spans


def within(inner: Event, outer: Event) -> bool:
    return bool(
        inner["tid"] == outer["tid"]
        and outer["ts"] - 0.002 <= inner["ts"]
        and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.002
    )
