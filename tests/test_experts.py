"""Mixtures of experts: the formula and the trace beside real steps on this CPU, and beside each other."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_models import LINEAR_ATTENTION
from test_formula import devices, measured_second_step, recipe, recipes, strategies
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_core.architecture import ModelArchitecture
from qlora_core.catalogue import find_model
from qlora_core.huggingface.config import architecture_from_config
from qlora_core.memory import formula, trace
from qlora_core.memory.device import Device
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

A100 = Device(kind="cuda", compute_dtype="bfloat16", compute_capability=(8, 0))
T4 = Device(kind="cuda", compute_dtype="float16", compute_capability=(7, 5))
COMMON = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
SIXTEEN = {"moe_intermediate_size": 96, "num_experts": 16, "num_experts_per_tok": 4}
TINY = {
    "mixtral": {"intermediate_size": 352, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {**SIXTEEN, "head_dim": 32, "norm_topk_prob": True},
    "olmoe": {"intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4},
    "qwen2_moe": {**SIXTEEN, "shared_expert_intermediate_size": 384},
    "qwen3_5_moe_text": {**SIXTEEN, "shared_expert_intermediate_size": 384, "head_dim": 32, **LINEAR_ATTENTION},
    "granitemoe": {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {"intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 32},
}
"""gpt_oss, Qwen 3.5 and Qwen2's shared expert have no adapters on their routed experts; Mixtral, Qwen3 and OLMoE do."""


@cache
def fields(family: str) -> dict[str, Any]:
    described: dict[str, Any] = AutoConfig.for_model(family, **COMMON, **TINY[family]).to_dict()
    return described


def tiny(family: str) -> ModelArchitecture:
    return architecture_from_config(fields(family), name=family, source=family)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experts")
    for family in TINY:
        config = AutoConfig.for_model(**fields(family))
        AutoModelForCausalLM.from_config(config).save_pretrained(root / family)
    return root


def on_this_cpu(family: str, strategy: Strategy) -> Strategy:
    attention = strategy.attention if tiny(family).has_sdpa else "eager"
    return dataclasses.replace(strategy, paged_optimizer=False, attention=attention)


# --- real steps on this CPU -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(
    ("asked", "strategy", "dtype"),
    [
        (recipe(rank=8, seq_len=128), Strategy(), "float32"),
        pytest.param(recipe(rank=8, seq_len=64), Strategy(micro_batch=2), "bfloat16", marks=pytest.mark.grid),
        (recipe(rank=8, seq_len=64), Strategy(micro_batch=2, gradient_checkpointing=False), "bfloat16"),
        pytest.param(recipe(rank=32, seq_len=512), Strategy(), "float32", marks=pytest.mark.grid),
        (recipe(rank=8, seq_len=128, method="lora", quantization="none"), Strategy(micro_batch=2), "float32"),
        (recipe(rank=8, seq_len=256, targets=("q_proj", "v_proj")), Strategy(micro_batch=2), "float32"),
        pytest.param(
            recipe(rank=8, seq_len=128, targets=("q_proj",)),
            Strategy(gradient_checkpointing=False),
            "bfloat16",
            marks=pytest.mark.grid,
        ),
    ],
)
def test_a_real_step_on_this_cpu_needs_what_the_formula_says(
    folders: Path, family: str, asked: Recipe, strategy: Strategy, dtype: Any
) -> None:
    strategy = on_this_cpu(family, strategy)
    real = measured_second_step(folders / family, asked, strategy, dtype)
    said = formula.estimate(tiny(family), asked, strategy, Device(kind="cpu", compute_dtype=dtype)).gpu.phases
    for phase in ("forward", "backward"):
        assert getattr(said, phase) == pytest.approx(getattr(real, phase), rel=0.02), phase


@pytest.mark.parametrize("family", TINY)
def test_a_real_step_on_this_cpu_needs_what_the_trace_says(folders: Path, family: str) -> None:
    asked, strategy = recipe(rank=8, seq_len=128), on_this_cpu(family, Strategy(micro_batch=2))
    real = measured_second_step(folders / family, asked, strategy, "float32")
    said = trace.estimate(tiny(family), asked, strategy, Device(kind="cpu", compute_dtype="float32")).gpu.phases
    for phase in ("after_load", "forward", "backward"):
        assert getattr(said, phase) == pytest.approx(getattr(real, phase), rel=0.01), phase


# --- the two estimators hold each other -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mixtral-8x7b", marks=pytest.mark.grid),
        pytest.param("qwen1.5-moe-a2.7b", marks=pytest.mark.slow),
        pytest.param("qwen3-30b-a3b", marks=pytest.mark.grid),
        pytest.param("gpt-oss-20b", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("asked", "strategy", "device"),
    [
        (recipe(), Strategy(), A100),
        pytest.param(
            recipe(targets=("q_proj", "v_proj"), seq_len=1024), Strategy(micro_batch=2), A100, marks=pytest.mark.grid
        ),
        (recipe(rank=8), Strategy(gradient_checkpointing=False, loss="full"), A100),
        # older GPUs have no grouped products: transformers' own make the experts' gradients whether needed or not
        (recipe(rank=16), Strategy(micro_batch=2), T4),
    ],
)
def test_the_formula_says_what_the_trace_says(name: str, asked: Recipe, strategy: Strategy, device: Device) -> None:
    architecture = find_model(name)
    strategy = dataclasses.replace(strategy, attention="sdpa" if architecture.has_sdpa else "eager")
    by_trace = trace.estimate(architecture, asked, strategy, device).gpu
    by_formula = formula.estimate(architecture, asked, strategy, device).gpu
    assert by_formula.allocated_bytes == pytest.approx(by_trace.allocated_bytes, rel=0.005)


# --- what it costs to adapt experts -----------------------------------------------------------------------------------


def test_adapted_experts_are_whole_copies_of_a_layers_experts() -> None:
    # peft's ParamWrapper computes base + B A for all experts at once: without checkpointing every layer keeps that
    mixtral = find_model("mixtral-8x7b")
    strategy = Strategy(gradient_checkpointing=False)

    def forward(targets: Any) -> int:
        return formula.estimate(mixtral, recipe(rank=8, targets=targets), strategy, A100).gpu.phases.forward

    copies = mixtral.num_layers * 2 * mixtral.expert_parameters
    assert forward("all-linear") - forward(("q_proj", "k_proj", "v_proj", "o_proj")) > copies


def test_the_peak_is_named() -> None:
    said = formula.estimate(find_model("mixtral-8x7b"), recipe(), Strategy(), A100).gpu
    assert said.peak_moment == "backward of layer 1, while its down_proj is differentiated"


@given(st.sampled_from(sorted(TINY)), recipes, strategies, devices)
@settings(max_examples=40, deadline=None)
def test_components_add_up_and_none_is_negative(family: str, asked: Recipe, strategy: Strategy, device: Device) -> None:
    gpu = formula.estimate(tiny(family), asked, strategy, device).gpu
    assert gpu.components.total == gpu.allocated_bytes
    assert min(gpu.components) >= 0
