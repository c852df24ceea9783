"""A real step of each family of models on this CPU, beside what the trace and the formula say of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from test_architecture import COMMON, SMALL
from test_formula import measured_second_step, recipe, strategy_of
from transformers import AutoConfig

from qlora_core.huggingface.config import architecture_from_config
from qlora_core.huggingface.hybrid import HYBRID
from qlora_core.memory import formula, trace
from qlora_core.memory.device import Device
from qlora_core.training.model import model_class

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 256),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 512),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 512),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 3),
    "vocab_size": 2048,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
    "head_dim": 32,
    "rotary_dim": 16,
    "sliding_window": 64,
}
"""Large enough that what a layer needs counts; the kinds stay those of test_architecture.py."""
FURTHER = {"ernie4_5": 0.02, "falcon": 0.025, "seed_oss": 0.025, **dict.fromkeys(HYBRID, 0.02)}
"""Where the formula is further off than one per cent: it leaves out that each layer makes rotary tables of its own;
that a sum of gradients is not in place while operators are followed, of which the last layer's is large where a tied
head leaves it in 16 bits; what dropout of all scores makes on the way; and that the first of a sequence's chunks,
of which there are two here, keeps less than the others in linear attention."""
CASES = [
    pytest.param(family, changes, id=f"{family}-{number}", marks=() if chosen % 6 == 0 else pytest.mark.grid)
    for chosen, (family, number, changes) in enumerate(
        (family, number, changes) for family, several in SMALL.items() for number, changes in enumerate(several)
    )
]


def scaled(changes: Mapping[str, object]) -> dict[str, Any]:
    """A config of test_architecture.py with these sizes, where it has them."""
    if isinstance(text := changes.get("text_config"), dict):
        return {**changes, "text_config": scaled(text)}
    base = {} if {"n_embd", "d_model"} & changes.keys() else COMMON
    fields = {**base, **changes}
    for name, size in SIZES.items():
        if isinstance(fields.get(name), int):
            fields[name] = size
    if isinstance(interval := fields.get("full_attention_interval"), int):
        return {**fields, "num_hidden_layers": 2 * interval, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
    kinds = fields.get("layer_types")
    return {**fields, "layer_types": list(itertools.islice(kinds, 3))} if isinstance(kinds, list) else fields


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(("family", "changes"), CASES)
def test_a_real_step_needs_what_the_trace_says_and_nearly_what_the_formula_does(
    tmp_path: Path, request: pytest.FixtureRequest, family: str, changes: Mapping[str, object], method: str
) -> None:
    config = AutoConfig.for_model(family, **scaled(changes))
    model_class(config).from_config(config).save_pretrained(tmp_path)
    name = f"{request.node.callspec.id} on a CPU"
    architecture = architecture_from_config(config.to_dict(), name=name, source="a test")
    strategy = strategy_of(architecture, gradient_checkpointing=False)
    fields = {"autocast": True} if method == "qlora" else {"method": method, "quantization": "none"}
    asked = recipe(rank=16, seq_len=128, **fields)
    real = measured_second_step(tmp_path, asked, strategy, "bfloat16")
    said_of = architecture, asked, strategy, Device(kind="cpu", compute_dtype="bfloat16", plain_autocast=False)
    by_trace, by_formula = trace.estimate(*said_of).gpu.phases, formula.estimate(*said_of).gpu.phases
    tolerance = FURTHER.get(family, 0.01)
    for phase in ("after_load", "forward", "backward"):
        assert getattr(by_trace, phase) == pytest.approx(getattr(real, phase), rel=0.003), phase
        assert getattr(by_formula, phase) == pytest.approx(getattr(real, phase), rel=tolerance), phase
