"""Reserved memory by playing the formula's own timeline to the allocator, held against the traced step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from test_formula import recipe, strategy_of

from benchmarks.accuracy import grid
from clusters.errors import RequestError
from clusters.gpu import find_gpu
from orchestrator.devices import gpu_target
from orchestrator.planner import plan_request
from orchestrator.plans import SURE
from qlora_core.catalogue import find_model, list_models
from qlora_core.huggingface.config import architecture_from_config
from qlora_core.memory import formula, played, trace
from qlora_core.memory.device import Device
from qlora_core.strategy import Strategy

A100 = Device(kind="cuda", compute_dtype="bfloat16", compute_capability=(8, 0))


@pytest.mark.parametrize(("of", "fewest", "nine_of_ten"), [(grid.usual, 300, 0.03), (grid.further, 130, 0.035)])
def test_it_says_what_the_trace_says_of_both_grids(
    of: Callable[[], grid.Grid], fewest: int, nine_of_ten: float
) -> None:
    # the traces were written by `make accuracy GRID=1`
    played_rows = [(row.played, row.traced) for row in of().rows() if row.played is not None]
    errors = sorted(abs(gpu.reserved_bytes / traced["reserved"] - 1) for gpu, traced in played_rows)
    assert len(errors) >= fewest
    assert errors[len(errors) // 2] <= 0.004
    assert errors[len(errors) * 9 // 10] <= nine_of_ten


def test_its_interval_holds_for_models_that_gave_it_nothing() -> None:
    assert grid.held_out_played() >= 0.87 * sum(row.played is not None for row in grid.all_rows())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_model_of_few_layers_leaves_nothing_behind(layers: int) -> None:
    config = {**dict(find_model("qwen2.5-0.5b").whole_config), "num_hidden_layers": layers}
    architecture = architecture_from_config(config, name=f"{layers} layers", source="a test")
    request = architecture, recipe(seq_len=2048), Strategy(micro_batch=2), A100
    by_trace, by_playing = trace.estimate(*request).gpu, played.estimate(*request).gpu
    assert by_playing.reserved_bytes == pytest.approx(by_trace.reserved_bytes, rel=0.02)


@pytest.mark.parametrize("name", [listed.entry.name for listed in list_models()])
def test_segments_hold_at_least_what_is_allocated(name: str) -> None:
    # `estimate` would hide it: it never says that less is reserved than allocated
    architecture = find_model(name)
    strategy = strategy_of(architecture, loss="full", micro_batch=1, paged_optimizer=True)
    request = architecture, recipe(seq_len=512), strategy, A100
    sizes = formula.prepared(*request)
    segments = played.Player(*request, sizes, sizes.step(1, 512), draw=0).reserved()
    assert segments >= 0.995 * formula.estimate(*request).gpu.allocated_bytes


def test_all_but_reserved_memory_is_the_closed_forms() -> None:
    request = find_model("llama-3.2-1b"), recipe(seq_len=2048), Strategy(), A100
    closed, found = formula.estimate(*request), played.estimate(*request)
    assert found.gpu.reserved_interval != closed.gpu.reserved_interval
    assert found.host == closed.host
    apart = {"reserved_bytes", "process_bytes", "reserved_interval"}
    for name in set(closed.gpu._fields) - apart:
        assert getattr(found.gpu, name) == getattr(closed.gpu, name), name
    low, high = found.gpu.reserved_interval
    assert found.gpu.allocated_bytes <= low <= found.gpu.reserved_bytes <= high


@pytest.mark.parametrize(
    ("model", "strategy", "said"),
    [
        ("smollm2-135m", Strategy(world_size=2, zero_stage=2), "ZeRO stage 2"),
        # windowed layers with a mask and others without: each keeps something else
        ("gemma-3-1b", Strategy(gradient_checkpointing=False), "those with a window"),
    ],
)
def test_what_cannot_be_played_is_refused_with_the_reason(model: str, strategy: Strategy, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        played.estimate(find_model(model), recipe(seq_len=2048), strategy, A100)


def test_so_are_several_chunks_of_a_loss_whose_head_is_trained() -> None:
    all_trained = recipe(method="full", quantization="none", double_quantization=False, seq_len=129)
    request = find_model("smollm2-135m"), all_trained
    played.estimate(*request, Strategy(micro_batch=8), A100)  # 1,024 tokens are learned of 1,032
    with pytest.raises(RequestError, match="chunks of the loss"):
        played.estimate(*request, Strategy(micro_batch=9), A100)


def test_a_cpu_reserves_what_it_allocates() -> None:
    gpu = played.estimate(find_model("smollm2-135m"), recipe(), Strategy(), dataclasses.replace(A100, kind="cpu")).gpu
    assert gpu.reserved_interval == (gpu.allocated_bytes, gpu.allocated_bytes)


# --- where a plan asks for it -----------------------------------------------------------------------------------------


def test_a_plan_that_the_closed_form_leaves_open_is_told_of_it_and_decided_by_it() -> None:
    asked = find_model("llama-3.2-1b"), recipe(seq_len=2048), Strategy(loss="full")
    card = gpu_target(find_gpu("a100-80gb"), "auto")
    closed, found = (by(*asked, card.device).gpu.reserved_interval for by in (formula.estimate, played.estimate))
    # more than the step can need, less than the closed form says it may
    usable = (found[1] + closed[1]) // 2 + card.device.context_bytes
    assert found[1] + card.device.context_bytes < usable < closed[1] + card.device.context_bytes
    target = dataclasses.replace(card, usable_bytes=usable)
    open_, decided = (plan_request(*asked, [target], estimator=by) for by in (formula.estimate, played.estimate))
    assert open_.verdict.confidence.chance < SURE
    assert any("--estimator played is more exact" in warning for warning in open_.warnings)
    assert decided.verdict.confidence.chance == SURE
    assert decided.estimate.estimator == "played"
    assert not any("by how its memory fragments" in warning for warning in decided.warnings)
