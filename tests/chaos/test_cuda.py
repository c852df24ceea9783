"""On a GPU: memory really runs out in the midst of a run, which is planned anew and finished."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import make_run
from strikes import Row, Rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.chaos,
    pytest.mark.xdist_group("workers"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
INJECT = Path(__file__).with_name("inject")


def test_a_real_cuda_out_of_memory_is_planned_around(
    tmp_path: Path, tiny_base: Path, conversations: Path, rows: Rows
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "recipe": {"tokens_per_step": 2048, "steps": 20},
        "strategy": {"world_size": 1, "zero_stage": 0, "micro_batch": "auto"},
    }
    run = make_run(tmp_path, tiny_base, conversations, **changes)
    faults = [{"fault": "full gpu", "rank": 0, "step": 7, "attempts": [1]}]
    path = f"{INJECT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    run.environment |= {"QLORA_FAULTS": json.dumps(faults), "PYTHONPATH": path}
    started = time.time()
    code, output = run.finish()
    assert code == 0, output
    first, second = run.record["attempts"]
    assert (first["failure"]["kind"], first["decision"]["action"]) == ("gpu memory", "replan")
    assert first["failure"]["measured"]["reserved"] > 0
    assert second["process_bytes"] <= 0.9 * first["process_bytes"]
    assert second["from_step"] == 6
    rows.add(Row("out of GPU memory, really", True, 0, time.time() - started))
