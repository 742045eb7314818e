"""One process of torchrun: an epoch from a URL through its node's cache; says what it delivered. Run by test_store_nodes.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import dali_pipeline as dp


def main(url: str, folder: str) -> None:
    node = os.environ["GROUP_RANK"]
    data = dp.open_dataset(url, cache_dir=Path(folder) / f"cache-{node}", cache_bytes=10**9)
    loader = dp.SequenceLoader(
        data, batch_size=4, window_bytes=20_000, num_partitions=2, engine="torch", num_workers=0, device="cpu"
    )
    ids = [batch.ids for batch in loader]
    told = {"node": node, "ids": ids, "records": loader.digest.records}
    (Path(folder) / f"{os.environ['RANK']}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
