"""Out of memory leads to a leaner plan at the same tokens per step, and the loss curve is that of an unharmed run."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_runs import COMMAND, Run, make_run
from strikes import Row, Rows

from benchmarks.training.loops import Watch, begun
from qlora_core.training.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workers")]

INJECT = Path(__file__).with_name("inject")
SMOOTH = {"optimizer": "adamw", "dropout": 0.0, "compute_dtype": "float32"}
"""What makes a curve comparable to 1e-4: no draws, no rounded state."""


@pytest.fixture(scope="module")
def new_run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, conversations: Path) -> Callable[..., Run]:
    def make(*faults: dict[str, Any], **changes: dict[str, Any]) -> Run:
        defaults: dict[str, dict[str, Any]] = {
            "recipe": SMOOTH,
            "strategy": {"micro_batch": "auto"},
            "checkpoints": {"every_steps": 2},
        }
        run = make_run(tmp_path_factory.mktemp("run"), tiny_base, conversations, **{**defaults, **changes})
        path = f"{INJECT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        run.environment |= {"QLORA_FAULTS": json.dumps(faults), "PYTHONPATH": path}
        return run

    return make


@pytest.fixture(scope="module")
def whole(new_run: Callable[..., Run]) -> dict[int, float]:
    """The loss of each step where nothing happens: by one process that trains alone, without Ray."""
    run = new_run(strategy={"world_size": 1, "zero_stage": 0})
    watch = Watch()
    train(begun(run.specification)[0], watch, None)
    return {step["step"]: step["loss"] for step in watch.steps}


def losses(run: Run) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in run.events() if event["event"] == "step"}


def same_mathematics(before: dict[str, int], after: dict[str, int]) -> bool:
    """Whether two strategies have the same sequences in a step."""
    sizes = ("world_size", "micro_batch", "gradient_accumulation")
    return math.prod(before[name] for name in sizes) == math.prod(after[name] for name in sizes)


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.chaos)])
def test_a_stand_in_for_cuda_out_of_memory_on_one_rank_is_planned_around(
    times: int, new_run: Callable[..., Run], whole: dict[int, float], rows: Rows
) -> None:
    fault = {"fault": "gpu memory", "rank": 1, "step": 4, "attempts": list(range(1, 1 + times))}
    run = new_run(fault)
    started = time.time()
    code, output = run.finish()
    assert code == 0, output
    attempts = run.record["attempts"]
    assert [one["decision"]["action"] for one in attempts[:-1]] == ["replan"] * times
    assert all(one["failure"]["kind"] == "gpu memory" and one["failure"]["rank"] == 1 for one in attempts[:-1])
    assert attempts[0]["failure"]["measured"]["backward"] > 0  # for the ledger: it took at least that
    assert [one["from_step"] for one in attempts] == [0, *[2] * times]
    needs = [one["process_bytes"] for one in attempts]
    assert all(later <= 0.9 * earlier for earlier, later in itertools.pairwise(needs))
    for earlier, later in itertools.pairwise(attempts):
        assert earlier["strategy"] != later["strategy"]
        assert same_mathematics(earlier["strategy"], later["strategy"])
    assert "It goes on from step 2 with a leaner plan: " in output
    assert losses(run) == pytest.approx(whole, rel=1e-4)
    often = "twice" if times == 2 else "once"
    seconds = (time.time() - started) / (1 + times)
    rows.add(Row(f"out of GPU memory on one rank, {often} (injected)", True, run.done_twice(), seconds))

    # the next plan of this kind is right at first
    planned = subprocess.run(
        [*COMMAND, run.specification, "--dry-run", "--json", "output=elsewhere"],
        env=run.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    plan = json.loads(planned.stdout)
    verdict, then = plan["verdicts"][0], run.record["plan"]["verdicts"][0]
    # the stand-in's memory is the host's, of which other processes may have given some back since
    usable = verdict["usable_bytes"] / then["usable_bytes"]
    assert verdict["process_bytes"] <= 0.9 * needs[-2] * usable
    assert any("ran out of memory" in choice["reason"] for choice in plan["choices"])


@pytest.mark.chaos
def test_really_out_of_host_memory_is_planned_around(
    new_run: Callable[..., Run], whole: dict[int, float], rows: Rows
) -> None:
    run = new_run({"fault": "host memory", "rank": 0, "step": 3, "attempts": [1]})
    code, output = run.finish()
    assert code == 0, output
    first, second = run.record["attempts"]
    assert (first["failure"]["kind"], first["decision"]["action"]) == ("host memory", "replan")
    assert second["process_bytes"] <= 0.9 * first["process_bytes"]
    assert losses(run) == pytest.approx(whole, rel=1e-4)
    rows.add(Row("out of host memory under a limit", True, run.done_twice(), None))


@pytest.mark.chaos
def test_where_no_plan_is_leaner_the_run_ends_and_says_so(new_run: Callable[..., Run]) -> None:
    fault = {"fault": "gpu memory", "rank": 0, "step": 1, "attempts": list(range(1, 99))}
    run = new_run(fault, recipe={**SMOOTH, "tokens_per_step": 128}, strategy={"micro_batch": 1, "zero_stage": 2})
    code, output = run.finish()
    assert code == 1
    assert "no plan for it is left" in output
    assert "Traceback" not in output
    assert run.record["status"] == "failed"


@pytest.mark.chaos
def test_a_worker_that_hangs_is_noticed_and_replaced(
    new_run: Callable[..., Run], whole: dict[int, float], rows: Rows
) -> None:
    run = new_run(
        {"fault": "stop", "rank": 1, "step": 6, "attempts": [1]},
        recovery={"hang_minutes": 0.2},
        strategy={"micro_batch": "auto"},
    )
    code, output = run.finish()
    assert code == 0, output
    first, second = run.record["attempts"]
    assert (first["failure"]["kind"], first["decision"]["action"]) == ("hung", "retry")
    assert second["from_step"] in (2, 4)  # that of step 4 may not have been written yet when it was stopped
    assert losses(run) == pytest.approx(whole, rel=1e-4)
    run.assert_nothing_is_left()
    rows.add(Row("a worker that is stopped and hangs", True, run.done_twice(), None))
