"""A run goes on with another number of workers and another ZeRO stage, and learns what one that stayed would learn."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import TIMEOUT, Run, make_run
from safetensors.torch import load_file
from strikes import Row, Rows

from qlora_core.training.manifest import check, complete

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workers")]

STEPS = 120
RECIPE = {"tokens_per_step": 768, "dropout": 0.0, "compute_dtype": "float32", "steps": STEPS}
"""Twelve sequences a step, which one, two and three workers divide."""
SIZES = ({"world_size": 2, "zero_stage": 2}, {"world_size": 1, "zero_stage": 0}, {"world_size": 2, "zero_stage": 1},
         {"world_size": 3, "zero_stage": 3})  # fmt: skip
TOLERANCE = {"adamw": 1e-4, "adamw_8bit": 1e-3}
"""Of the loss, relative. 8-bit moments are quantized over other blocks on another number of workers, and differ by up
to half a step of the code book each time, with and without a change on the way."""


@pytest.fixture(scope="module")
def new_run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, conversations: Path) -> Callable[..., Run]:
    def make(optimizer: str) -> Run:
        folder = tmp_path_factory.mktemp("run")
        # slow enough to be stopped in time, and to differ if anything were lost
        recipe = {**RECIPE, "optimizer": optimizer, "learning_rate": 1e-3}
        changes: dict[str, dict[str, Any]] = {"recipe": recipe, "checkpoints": {"every_steps": 200}, "evaluation": {}}
        return make_run(folder, tiny_base, conversations, **changes, strategy={"micro_batch": 1})

    return make


def losses(run: Run) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in run.events() if event["event"] == "step"}


def sized(size: dict[str, int]) -> list[str]:
    return [f"strategy.{field}={value}" for field, value in size.items()]


def stopped_after(run: Run, step: int, size: dict[str, int]) -> int:
    """Run at a size until it is stopped soon after a step; returns the step of the checkpoint that it left."""
    process = run.start(*sized(size))
    run.wait_for_step(step, process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130, output
    return max(complete(run.folder / "checkpoints"))


def went_through_sizes(run: Run, sizes: tuple[dict[str, int], ...]) -> list[int]:
    """Run at one size after the other to the end; returns the steps at which it changed."""
    changed = [stopped_after(run, 10 + 25 * place, size) for place, size in enumerate(sizes[:-1])]
    code, output = run.finish(*sized(sizes[-1]))
    assert code == 0, output
    return changed


def whole(run: Run, size: dict[str, int]) -> Run:
    code, output = run.finish(*sized(size))
    assert code == 0, output
    return run


def hold_together(run: Run, stayed: Run, changed: list[int], tolerance: float) -> None:
    assert changed == sorted(set(changed))
    found, expected = losses(run), losses(stayed)
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=tolerance), f"step {step}, changed after {changed}"
    rates = [{e["step"]: e["learning_rate"] for e in each.events() if e["event"] == "step"} for each in (run, stayed)]
    assert rates[0] == rates[1]


@pytest.mark.chaos
@pytest.mark.parametrize("optimizer", TOLERANCE)
def test_from_two_workers_over_one_and_two_to_three(optimizer: str, new_run: Callable[[str], Run], rows: Rows) -> None:
    run, stayed = new_run(optimizer), whole(new_run(optimizer), SIZES[0])
    hold_together(run, stayed, went_through_sizes(run, SIZES), TOLERANCE[optimizer])
    rows.add(Row(f"2 workers, then 1, 2 and 3 ({optimizer})", True, 0, None))


@pytest.mark.chaos
def test_from_two_workers_with_zero_2_to_one_without(new_run: Callable[[str], Run], rows: Rows) -> None:
    run, stayed = new_run("adamw"), whole(new_run("adamw"), SIZES[1])
    hold_together(run, stayed, went_through_sizes(run, SIZES[:2]), TOLERANCE["adamw"])
    last = run.folder / "checkpoints" / f"step-{STEPS:08d}"
    assert check(last)["world_size"] == 1
    mine, other = (load_file(each.folder / "adapter" / "adapter_model.safetensors") for each in (run, stayed))
    for name, weight in mine.items():
        torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=1e-5)
    rows.add(Row("2 workers with ZeRO 2, then 1 without", True, 0, None))
