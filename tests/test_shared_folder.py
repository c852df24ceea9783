"""A node that does not see the run's folder is found before the base is loaded. The nodes are a stand-in: folders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from clusters.errors import RequestError
from orchestrator import worker
from qlora_core.strategy import Strategy


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    node = SimpleNamespace(get_node_id=lambda: "a-node")
    monkeypatch.setattr("orchestrator.worker.ray.get_runtime_context", lambda: node)
    monkeypatch.setattr(worker, "SHARED_SECONDS", 0.3)


def order(folder: Path) -> Any:
    strategy = Strategy(world_size=2, zero_stage=1)
    return cast(Any, SimpleNamespace(alive=folder / ".alive", checkpoints=folder / "checkpoints", strategy=strategy))


def test_a_folder_that_all_see_is_fine(tmp_path: Path) -> None:
    (tmp_path / ".alive").mkdir()
    (tmp_path / ".alive" / "rank-1").touch()
    worker.check_shared(order(tmp_path), 0)
    assert (tmp_path / ".alive" / "rank-0").read_text() == "a-node"


def test_a_node_without_the_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"output: the node \S+ cannot write there: No such file"):
        worker.check_shared(order(tmp_path), 0)


def test_a_node_with_a_folder_of_its_own_at_that_path_is_named(tmp_path: Path) -> None:
    (tmp_path / ".alive").mkdir()
    with pytest.raises(RequestError, match=r"does not see there what rank-1 wrote"):
        worker.check_shared(order(tmp_path), 0)
