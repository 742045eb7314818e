"""Conversion whose workers write slowly, PAUSE seconds per record; they import this, and know no test's patches."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from dali_pipeline.ingest import convert
from dali_pipeline.writing.filler import ShardFiller

_write_record, _write_files = ShardFiller.write, convert._write


def write(job: Any, parts: Path, number: int, advance: Any) -> Any:
    """What `convert._write` does, slowly."""
    ShardFiller.write = _slow  # type: ignore[method-assign]
    return _write_files(job, parts, number, advance)


def _slow(self: ShardFiller, record: Any) -> None:
    time.sleep(float(os.environ["PAUSE"]))
    _write_record(self, record)
