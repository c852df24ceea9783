"""What `--explain` says of weights, gradients and optimizer state adds up to what is planned, on however many ranks."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from clusters.gpu import find_gpu
from launch.report.divided import gradient_rows
from launch.report.explain import explain
from orchestrator.devices import cpu_target, gpu_target
from orchestrator.planner import plan_request
from orchestrator.plans import Plan
from qlora_core.catalogue import find_model
from qlora_core.memory.residents import residents
from qlora_core.recipe import Method, Recipe
from qlora_core.strategy import Offload, Strategy, ZeroStage

ROW = re.compile(r" *([\d.]+) (GiB|MiB|bytes)  (.*)")
UNITS = {"GiB": 2**30, "MiB": 2**20, "bytes": 1}
TRAINED = {"qlora": 167_772_160, "lora": 167_772_160, "full": 8_030_261_248}
"""Llama 3.1 8B's adapters of rank 64, 32 x 64 x 81,920, and all of its weights (its model card)."""
STAGES = [(0, "none"), *itertools.product((1, 2, 3), ("none", "optimizer")), (3, "all")]


def planned(
    model: str, method: Method, stage: ZeroStage, offload: Offload, several: int, on: str = "h200", **recipe: Any
) -> Plan:
    fields = {"quantization": "nf4" if method == "qlora" else "none", "optimizer": "adamw", **recipe}
    strategy = Strategy(
        world_size=4,
        zero_stage=stage,
        offload=offload,
        gradient_accumulation=several,
        paged_optimizer=False,
    )
    target = cpu_target("auto", 4, 2**40) if on == "cpu" else gpu_target(find_gpu(on), "auto", 4)
    return plan_request(
        find_model(model), Recipe(method=method, tokens_per_step=4 * 512 * several, **fields), strategy, (target,)
    )


def section(plan: Plan, name: str) -> dict[str, int]:
    """The rows of a section: bytes, rounded as they are printed, by what they are."""
    (lines,) = (part.lines for part in explain(plan) if part.title.startswith(name))
    found = filter(None, map(ROW.fullmatch, lines))
    return {match[3].split(":")[0].split(",")[0]: round(float(match[1]) * UNITS[match[2]]) for match in found}


def rounding(rows: dict[str, int]) -> float:
    """By how much the sum of rows with two digits may be off."""
    return sum(0.0051 * (2**30 if size >= 2**30 else 2**20) for size in rows.values())


@pytest.mark.parametrize("on", ["h200", "cpu"])
@pytest.mark.parametrize("several", [1, 4])
@pytest.mark.parametrize(("stage", "offload"), STAGES)
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_gradients_and_optimizer_state_add_up(
    method: Method, stage: ZeroStage, offload: Offload, several: int, on: str
) -> None:
    for lora_dtype in ("float32",) if method == "full" else ("float32", "bfloat16"):
        plan = planned("llama-3.1-8b", method, stage, offload, several, on, lora_dtype=lora_dtype)
        gpu, device = plan.estimate.gpu, plan.target.device
        state, gradients = section(plan, "optimizer state"), section(plan, "gradients")
        assert sum(state.values()) == pytest.approx(gpu.components.optimizer_state, abs=rounding(state))
        assert sum(gradients.values()) == pytest.approx(gpu.components.gradients, abs=rounding(gradients))
        assert all(size > 0 for size in gradients.values())

        # what outlasts a micro-batch's backward pass is told apart from what that one holds
        stays = residents(plan.architecture, plan.recipe, plan.strategy, device)
        lasting = stays.between.get("gradients", 0) + stays.added[gpu.peak_phase].get("gradients", 0)
        *rows, passing = gradient_rows(plan)
        if stage or several == 1:
            assert sum(row.size for row in rows) == lasting
        assert passing.size >= 0
        if stage and gpu.peak_phase == "optimizer":
            assert passing.size == 0

        on_gpu = offload == "none" or on == "cpu"
        if stage and on_gpu:  # DeepSpeed divides float32 moments and master weights (arXiv 1910.02054, section 3.1)
            part = TRAINED[method] // 4
            assert state["moments"] == pytest.approx(8 * part, rel=1e-2)
            assert state["float32 master weights"] == pytest.approx(4 * part, rel=1e-2)
        elif not on_gpu:
            assert state == {}


@pytest.mark.parametrize("several", [1, 4])
@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")])
@pytest.mark.parametrize("method", ["qlora", "full"])
def test_what_is_offloaded_adds_up_to_a_ranks_share_of_the_host(
    method: Method, stage: ZeroStage, offload: Offload, several: int
) -> None:
    plan = planned("llama-3.1-8b", method, stage, offload, several)
    rows = section(plan, "The host")
    assert sum(rows.values()) == pytest.approx(plan.estimate.host.steady_bytes / 4, abs=rounding(rows))
    part = TRAINED[method] // 4
    assert rows["moments"] == pytest.approx(8 * part, rel=1e-2)
    assert rows["float32 master weights"] == pytest.approx(4 * part, rel=1e-2)
    assert rows["gradients in float32"] == pytest.approx(4 * part, rel=1e-2)
    assert ("base weights" in rows) == (offload == "all")


def test_16_bit_weights_have_16_bit_moments_without_zero() -> None:
    plan = planned("llama-3.1-8b", "full", 0, "none", 1)
    assert section(plan, "optimizer state")["moments"] == pytest.approx(4 * TRAINED["full"], rel=1e-2)  # torch's AdamW


def test_of_offloaded_weights_it_is_said_where_they_are() -> None:
    plan = planned("llama-3.1-8b", "qlora", 3, "all", 1)
    texts = {part.title.split(":")[0]: " ".join(part.lines) for part in explain(plan)}
    part = 6_979_321_856 // 2 // 4  # packed weights of the linear layers, among four workers
    assert f"a part {part / 2**20:.2f} MiB. Offloading keeps it in the host's memory." in texts["base weights"]
    assert "Offloading" not in texts["lora weights"]


def test_the_experts_that_bitsandbytes_leaves_are_named_as_experts() -> None:
    plan = planned("mixtral-8x7b", "qlora", 0, "none", 1)
    rows = section(plan, "unquantized weights")
    assert sum(rows.values()) == pytest.approx(plan.estimate.gpu.components.unquantized_weights, abs=rounding(rows))
    assert rows["experts"] == 2 * 32 * 8 * 3 * 4096 * 14336  # 84 GiB: w1, w2 and w3 of 8 experts in 32 layers
    assert rows["norms"] < 3 * 2**20  # 65 norms and 32 routers


def test_linear_layers_that_bitsandbytes_leaves_are_not_called_quantized() -> None:
    plan = planned("falcon-7b", "qlora", 0, "none", 1)
    rows = section(plan, "unquantized weights")
    assert sum(rows.values()) == pytest.approx(plan.estimate.gpu.components.unquantized_weights, abs=rounding(rows))
    of_layer = 4544 * (4544 + 2 * 64 + 4544 + 2 * 18176)  # query_key_value, dense and both of the MLP
    assert rows["linear layers"] == pytest.approx(2 * 32 * of_layer, abs=2**23)
    said = {part.title.split(":")[0]: " ".join(part.lines) for part in explain(plan)}
    assert "leaves them all as they are" in said["base weights"]
    assert "packs" not in said["base weights"]
    assert "quantization constants" not in said


def test_a_vision_towers_other_parameters_are_not_called_norms() -> None:
    plan = planned("gemma-3-4b", "qlora", 0, "none", 1)
    rows = section(plan, "unquantized weights")
    assert sum(rows.values()) == pytest.approx(plan.estimate.gpu.components.unquantized_weights, abs=rounding(rows))
    others = 419_820_656 - 411_070_464  # of its parameters and the projector's those in no linear layer
    assert rows["vision tower"] == pytest.approx(2 * others, rel=0.02)
