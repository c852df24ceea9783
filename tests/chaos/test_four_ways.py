"""One run, interrupted in four ways, whose loss curve is that of a run that never was."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_runs import TIMEOUT, Run, make_run

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.xdist_group("workers")]

STEPS = 320
INJECT = Path(__file__).with_name("inject")
OUT_OF_MEMORY = 150


@pytest.fixture
def new_run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, conversations: Path) -> Callable[..., Run]:
    def make(*faults: dict[str, Any]) -> Run:
        recipe = {"optimizer": "adamw", "dropout": 0.0, "compute_dtype": "float32", "steps": STEPS}
        changes: dict[str, dict[str, Any]] = {
            "recipe": {**recipe, "learning_rate": 4e-4},
            "strategy": {"micro_batch": "auto"},
            "checkpoints": {"every_steps": 20},
            "evaluation": {},
        }
        run = make_run(tmp_path_factory.mktemp("run"), tiny_base, conversations, **changes)
        path = f"{INJECT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        run.environment |= {"QLORA_FAULTS": json.dumps(faults), "PYTHONPATH": path}
        return run

    return make


def losses(run: Run) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in run.events() if event["event"] == "step"}


def test_a_run_interrupted_in_four_ways_has_the_curve_of_one_that_never_was(new_run: Callable[..., Run]) -> None:
    whole = new_run()
    code, output = whole.finish()
    assert code == 0, output
    fault = {"fault": "gpu memory", "rank": 1, "step": OUT_OF_MEMORY, "attempts": list(range(1, 4))}
    run = new_run(fault)

    process = run.start()
    run.wait_for_step(30, process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130, output
    interrupted = [(run.record["attempts"][0]["to_step"], "SIGTERM")]

    process = run.start()
    run.wait_for_step(70, process)
    run.workers()[0].kill()
    # then, without anybody's help, out of memory on one rank
    run.wait_for_step(210, process)
    process.kill()
    process.communicate()
    run.assert_nothing_is_left()

    code, output = run.finish()
    assert code == 0, output
    attempts = run.record["attempts"]
    failed = [one for one in attempts if one["failure"]]
    # the last is the driver's: what it did not live to note the next start did
    assert [one["failure"]["kind"] for one in failed] == ["worker lost", "gpu memory", "worker lost"]
    interrupted += [(one["to_step"], one["failure"]["kind"]) for one in failed[:-1]]
    interrupted.append((attempts[-1]["from_step"], "kill -9 of the driver"))
    assert losses(run) == pytest.approx(losses(whole), rel=1e-4)
    assert len(losses(run)) == STEPS
    if path := os.environ.get("CHAOS_CURVES"):
        curves = {"whole": losses(whole), "harmed": losses(run), "interrupted": interrupted}
        Path(path).write_text(json.dumps(curves))
