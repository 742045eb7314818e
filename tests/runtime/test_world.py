from __future__ import annotations

import pytest

from dali_pipeline.errors import UsageError
from dali_pipeline.runtime.world import World


def test_one_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert World.detect() == World(rank=0, world_size=1, local_rank=0)


def test_torchrun_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert World.detect() == World(rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert World.detect(2, 4) == World(rank=2, world_size=4, local_rank=1, local_world_size=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert World.detect(2, 4).local_world_size == 1


def test_ranks_share_a_node_where_nothing_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert World.detect(2, 4).local_world_size == 4
    assert World.detect(0, 1).local_world_size == 1


@pytest.mark.parametrize(("rank", "size"), [("8", "8"), ("-1", "8"), ("0", "0"), ("one", "2")])
def test_senseless_worlds_are_refused(monkeypatch: pytest.MonkeyPatch, rank: str, size: str) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError):
        World.detect()
