"""The trace: real steps on this CPU, real T4 steps, bitsandbytes' own bytes, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from test_architecture import SMALL as FAMILIES
from test_families import scaled
from test_formula import TINY, measured_second_step, recipe, strategy_of, tiny_folder
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig

from benchmarks.accuracy import grid
from benchmarks.accuracy.grid import Combination, everything, figures
from benchmarks.accuracy.t4 import FIGURES, by_trace, t4_rows
from clusters.errors import RequestError
from qlora_core.architecture import ACTIVATIONS, ModelArchitecture
from qlora_core.catalogue import find_model
from qlora_core.huggingface.config import architecture_from_config
from qlora_core.huggingface.families import DECODERS
from qlora_core.huggingface.older_decoders import OLDER
from qlora_core.memory import formula, reserve, trace
from qlora_core.memory.allocator import AllocatorSettings
from qlora_core.memory.arrivals import arrivals
from qlora_core.memory.device import MIB, Device
from qlora_core.memory.replay import Allocated, Marked, Released, loaded_by_threads, replay, second_step
from qlora_core.recipe import Recipe
from qlora_core.strategy import Attention, Strategy

__all__ = ["tiny_folder"]
T4 = Device(kind="cuda", compute_dtype="float16", compute_capability=(7, 5))
A100 = Device(kind="cuda", compute_dtype="bfloat16", compute_capability=(8, 0))


UNDER_AUTOCAST = recipe(rank=16, seq_len=128, autocast=True)


@pytest.mark.parametrize(
    ("asked", "strategy", "dtype"),
    [
        (UNDER_AUTOCAST, Strategy(), "bfloat16"),
        (dataclasses.replace(UNDER_AUTOCAST, method="lora", quantization="none"), Strategy(), "bfloat16"),
        (
            dataclasses.replace(UNDER_AUTOCAST, method="lora", quantization="none"),
            Strategy(gradient_checkpointing=False),
            "bfloat16",
        ),
        (UNDER_AUTOCAST, Strategy(gradient_checkpointing=False), "bfloat16"),
        (UNDER_AUTOCAST, Strategy(attention="eager", gradient_checkpointing=False, loss="full"), "bfloat16"),
        (recipe(rank=16, seq_len=128), Strategy(micro_batch=2), "float32"),
        (
            recipe(rank=16, seq_len=128),
            Strategy(micro_batch=2, attention="eager", gradient_checkpointing=False),
            "float32",
        ),
        (recipe(rank=8, seq_len=256), Strategy(micro_batch=2, loss="full"), "float32"),
        (recipe(rank=16, seq_len=128, method="lora", quantization="none"), Strategy(), "float32"),
        (recipe(rank=16, seq_len=256, packing=True), Strategy(micro_batch=2), "float32"),
    ],
)
def test_a_real_step_on_this_cpu_needs_what_the_trace_says(
    tiny_folder: Path, asked: Any, strategy: Strategy, dtype: Any
) -> None:
    strategy = dataclasses.replace(strategy, paged_optimizer=False)
    architecture = architecture_from_config(TINY.to_dict(), name="tiny", source="tiny")
    for plain in (True, False) if asked.under_autocast else (False,):
        real = measured_second_step(tiny_folder, asked, strategy, dtype, plain)
        request = architecture, asked, strategy, Device(kind="cpu", compute_dtype=dtype, plain_autocast=plain)
        said, by_formula = trace.estimate(*request).gpu.phases, formula.estimate(*request).gpu.phases
        for phase in ("after_load", "forward", "backward"):
            assert getattr(said, phase) == pytest.approx(getattr(real, phase), rel=0.01), phase
            assert getattr(by_formula, phase) == pytest.approx(getattr(real, phase), rel=0.02), phase


@pytest.mark.parametrize(
    "keys", [{}, {"new_decoder_architecture": True, "num_kv_heads": 2}], ids=["one key", "grouped"]
)
@pytest.mark.parametrize("strategy", [Strategy(micro_batch=2, gradient_checkpointing=False), Strategy(micro_batch=2)])
def test_so_does_falcon_which_masks_always_and_does_not_say_that_heads_share_a_key(
    tmp_path: Path, keys: dict[str, Any], strategy: Strategy
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 2048, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = FalconConfig(**sizes, **keys)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    strategy = dataclasses.replace(strategy, paged_optimizer=False)
    asked = recipe(rank=16, seq_len=128, method="lora", quantization="none")
    real = measured_second_step(tmp_path, asked, strategy, "bfloat16")
    architecture = architecture_from_config(config.to_dict(), name=f"falcon {keys}", source="a test")
    request = architecture, asked, strategy, Device(kind="cpu", compute_dtype="bfloat16")
    by_trace, by_formula = trace.estimate(*request).gpu.phases, formula.estimate(*request).gpu.phases
    for phase in ("after_load", "forward", "backward"):
        assert getattr(by_trace, phase) == pytest.approx(getattr(real, phase), rel=0.002), phase
        assert getattr(by_formula, phase) == pytest.approx(getattr(real, phase), rel=0.01), phase


def test_where_cudnn_does_not_come_first_falcon_holds_all_scores() -> None:
    asked, strategy = recipe(rank=64, seq_len=2048), Strategy()
    architecture = find_model("falcon-7b")
    before, cudnn = (
        formula.estimate(architecture, asked, strategy, dataclasses.replace(A100, compute_capability=capability)).gpu
        for capability in ((8, 0), (9, 0))
    )
    # in float32: the softmax's result and, while it is differentiated, its gradient
    scores = architecture.num_heads * 2048 * 2048 * 4
    assert before.phases.backward - cudnn.phases.backward > 2 * scores


# --- forty real steps on a T4; the whole table is docs/accuracy.md's --------------------------------------------------


def test_it_said_what_a_t4_measured() -> None:
    # written by `make accuracy`; the next test traces some rows again
    said = by_trace()
    assert said is not None

    def errors(figure: str, **only: str) -> list[float]:
        return [
            abs(100 * (of_row[figure] / MIB / row.measured[FIGURES[figure][0]] - 1))
            for row, of_row in zip(t4_rows(), said, strict=True)
            if all(getattr(row, fact) == value for fact, value in only.items())
        ]

    assert fmean(errors("allocated")) <= 0.1
    assert max(errors("allocated")) <= 0.6
    for phase in ("forward", "backward", "optimizer"):
        assert fmean(errors(phase)) <= 0.1
        assert max(errors(phase)) <= 0.9
    for tier in ("reserved", "process"):
        assert fmean(errors(tier)) <= 1.2
        assert max(errors(tier)) <= 4
        # loading is threaded where it quantizes, and not the same twice; where it does not, all of it is known
        assert fmean(errors(tier, quantization="none")) <= 0.2
        assert max(errors(tier, quantization="none")) <= 0.8
    assert max(errors("after loading", quantization="none")) < 0.001


STILL = 13, 22


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(index, marks=pytest.mark.slow if index in STILL else pytest.mark.grid)
        for index in (13, 20, 22, 26, 28, 33)
    ],
)
def test_it_says_so_still(index: int) -> None:
    row = t4_rows()[index]
    gpu = trace.estimate(row.architecture, row.recipe, row.strategy, row.device).gpu
    assert {figure: bytes_of(gpu) for figure, (_, bytes_of) in FIGURES.items()} == (by_trace() or ())[index]


# --- the two estimators hold each other -------------------------------------------------------------------------------

SAMPLE = tuple(range(0, len(everything()), 92))
"""Each is of another model, and every other one under autocast: see `grid._turns`."""


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=pytest.mark.slow if number in SAMPLE else pytest.mark.grid)
        for number in range(len(everything()))
    ],
    ids=lambda number: str(everything()[number]),
)
def test_the_formula_says_what_the_trace_says(number: int) -> None:
    asked: Combination = everything()[number]
    request = asked.architecture, asked.recipe, asked.strategy, asked.device
    by_trace, by_formula = figures(trace.estimate(*request).gpu), formula.estimate(*request).gpu
    within = (grid.usual() if number < grid.COMBINATIONS else grid.further()).tolerance
    assert by_formula.allocated_bytes == pytest.approx(by_trace["allocated"], rel=within)
    assert by_trace == grid.all_rows()[number].traced  # which `make accuracy GRID=1` wrote


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes", "strategy", "device"),
    [
        ("smollm2-135m", {}, Strategy(micro_batch=4, loss="full"), A100),
        # a residual stream in float32, all products in 16 bits
        ("llama-3.2-1b", {"upcast": "peft"}, Strategy(), A100),
        ("qwen3-0.6b", {"upcast": "peft", "quantization": "none", "method": "lora"}, Strategy(attention="eager"), T4),
        # LayerNorm, whose result autocast makes float32, and a power that it computes in float32
        ("pythia-1.4b", {"rank": 8}, Strategy(micro_batch=2, gradient_checkpointing=False), A100),
        ("phi-2", {}, Strategy(micro_batch=2, gradient_checkpointing=False, loss="full"), T4),
        # a GELU without a power
        ("gpt-neox-20b", {}, Strategy(gradient_checkpointing=False), A100),
    ],
)
def test_the_formula_says_what_the_trace_says_under_autocast(
    model: str, changes: dict[str, Any], strategy: Strategy, device: Device
) -> None:
    request = find_model(model), recipe(autocast=True, **changes), strategy, device
    by_trace, by_formula = trace.estimate(*request).gpu, formula.estimate(*request).gpu
    assert by_formula.allocated_bytes == pytest.approx(by_trace.allocated_bytes, rel=0.01)


SMALL: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def recipe_of(method: str, **changes: Any) -> Recipe:
    """QLoRA of rank 16, or the training of all weights in 16 bit."""
    quantized = method == "qlora"
    quantization = {"quantization": "nf4" if quantized else "none", "double_quantization": quantized}
    return recipe(method=method, rank=16, **quantization, **changes)


DENSE = [name for name, family in DECODERS.items() if family.experts is None]


@pytest.mark.slow
@pytest.mark.parametrize("family", DENSE)
def test_the_formula_says_what_the_trace_says_of_each_family(family: str) -> None:
    """Their norms, activations and rotary embeddings differ, and so does what these keep."""
    config = AutoConfig.for_model(family, **SMALL, head_dim=64).to_dict()  # Ministral's wants it said
    architecture = architecture_from_config(config, name=family, source="a test")
    for method, checkpointing in (("qlora", False), ("full", True)):
        asked = recipe_of(method, autocast=method == "qlora")
        strategy = strategy_of(architecture, gradient_checkpointing=checkpointing)
        request = architecture, asked, strategy, A100
        by_trace, by_formula = trace.estimate(*request).gpu.phases, formula.estimate(*request).gpu.phases
        for phase in ("forward", "backward", "optimizer"):
            assert getattr(by_formula, phase) == pytest.approx(getattr(by_trace, phase), rel=0.015), (method, phase)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "device"),
    [
        pytest.param(family, device, id=f"{family}-{name}", marks=() if number % 2 == at else pytest.mark.grid)
        for number, family in enumerate(OLDER)
        for at, (name, device) in enumerate({"a100": A100, "t4": T4}.items())
    ],
)
def test_the_formula_says_what_the_trace_says_of_older_families(family: str, device: Device) -> None:
    """Theirs have no rotary embedding, or ALiBi, learned positions, dropouts, and scores of their own."""
    for number, changes in enumerate(FAMILIES[family]):
        config = AutoConfig.for_model(family, **scaled(changes)).to_dict()
        architecture = architecture_from_config(config, name=f"{family}-{number}", source="a test")
        ways = (("qlora", False), ("qlora", True), ("full", False))
        for (method, autocast), checkpointing in itertools.product(ways, (True, False)):
            asked = recipe_of(method, seq_len=512, autocast=autocast)
            request = architecture, asked, strategy_of(architecture, gradient_checkpointing=checkpointing), device
            by_trace, by_formula = trace.estimate(*request).gpu, formula.estimate(*request).gpu
            case = number, method, autocast, checkpointing
            # of three families without checkpointing all layers together keep 2 MB of 60 more than the formula says
            assert by_formula.allocated_bytes == pytest.approx(by_trace.allocated_bytes, rel=0.035), case


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_formula_says_what_the_trace_says_of_each_activation(name: str, autocast: bool) -> None:
    sizes = {"vocab_size": 2000, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 4}
    config = {"model_type": "gpt_neox", "num_attention_heads": 8, **sizes, "hidden_act": name}
    architecture = architecture_from_config(config, name=f"by {name}", source="a test")
    for checkpointing in (True, False):
        strategy = strategy_of(architecture, gradient_checkpointing=checkpointing)
        request = architecture, recipe(rank=16, seq_len=1024, autocast=autocast), strategy, A100
        by_trace, by_formula = trace.estimate(*request).gpu, formula.estimate(*request).gpu
        assert by_formula.allocated_bytes == pytest.approx(by_trace.allocated_bytes, rel=0.001), checkpointing


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "heads",
    [{"num_attention_heads": 71, "hidden_size": 1136}, {"alibi": True, "multi_query": False, "parallel_attn": False}],
    ids=["7b", "rw"],
)
def test_the_formula_says_what_the_trace_says_of_falcon(
    heads: dict[str, Any], attention: Attention, autocast: bool
) -> None:
    """Scores are scaled in place, ALiBi is added in float32, and one head of keys is picked by index: 7B and RW 1B."""
    sizes = {"vocab_size": 5000, "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16}
    fields = {"model_type": "falcon", **sizes, **heads}
    architecture = architecture_from_config(fields, name=str(heads), source="a test")
    device = dataclasses.replace(A100, compute_capability=(9, 0))
    for checkpointing in (True, False):
        strategy = strategy_of(architecture, gradient_checkpointing=checkpointing, attention=attention)
        request = architecture, recipe(rank=16, seq_len=1024, autocast=autocast), strategy, device
        by_trace, by_formula = trace.estimate(*request).gpu, formula.estimate(*request).gpu
        assert by_formula.allocated_bytes == pytest.approx(by_trace.allocated_bytes, rel=0.007), checkpointing
        assert by_formula.components.base_weights == by_trace.components.base_weights == 0


LINEAR: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    **{f"linear_{name}_head_dim": 32 for name in ("key", "value")},
    **{"linear_num_key_heads": 4, "linear_num_value_heads": 8},
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 128}


def linear_attention(model_type: str) -> ModelArchitecture:
    experts = {**EXPERTS, "shared_expert_intermediate_size": 256} if "moe" in model_type else {}
    config = AutoConfig.for_model(model_type, **LINEAR, **experts).to_dict()
    return architecture_from_config(config, name=f"small {model_type}", source="a test")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "device"), [("qwen3_5_text", A100), ("qwen3_5_text", T4), ("qwen3_5_moe_text", A100)]
)
def test_the_formula_says_what_the_trace_says_of_linear_attention(model_type: str, device: Device) -> None:
    """Three layers of four have it: the layers of a period stand for all, and one operator for the loop over chunks."""
    architecture = linear_attention(model_type)
    ways = (("qlora", False), ("qlora", True), ("full", False))
    for (method, autocast), checkpointing in itertools.product(ways, (True, False)):
        asked = recipe_of(method, seq_len=1024, autocast=autocast)
        strategy = strategy_of(architecture, gradient_checkpointing=checkpointing, micro_batch=2)
        request = architecture, asked, strategy, device
        by_trace, by_formula = trace.estimate(*request).gpu, formula.estimate(*request).gpu
        case = method, autocast, checkpointing
        assert by_formula.allocated_bytes == pytest.approx(by_trace.allocated_bytes, rel=0.01), case


def test_a_sequence_is_counted_as_whole_chunks_of_linear_attention() -> None:
    architecture = linear_attention("qwen3_5_text")
    strategy = strategy_of(architecture, gradient_checkpointing=True)
    part, whole = (
        formula.estimate(architecture, recipe_of("qlora", seq_len=length), strategy, A100) for length in (961, 1024)
    )
    assert part == whole


@pytest.mark.slow
def test_dropout_of_composed_attention_keeps_a_byte_for_each_score() -> None:
    """As CUDA's native_dropout does, which at::dropout chooses there (aten/src/ATen/native/Dropout.cpp)."""
    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 160}
    config = AutoConfig.for_model("gpt_bigcode", **fields, attn_pdrop=0.1, bos_token_id=1, eos_token_id=2).to_dict()
    architecture = architecture_from_config(config, name="one layer", source="a test")
    asked = recipe(rank=4, seq_len=96, tokens_per_step=192)
    strategy = strategy_of(architecture, gradient_checkpointing=False, micro_batch=2)
    events = trace.record(architecture, asked, strategy, T4).events
    scores = 2 * 4 * 96 * 96
    forward = itertools.takewhile(lambda event: event != Marked("backward"), events[second_step(events) :])
    alive: dict[int, int] = {}
    for event in forward:
        if isinstance(event, Allocated):
            alive[event.number] = event.size
        elif isinstance(event, Released):
            alive.pop(event.number, None)
    kept = [size for size in alive.values() if size in (scores, 4 * scores)]
    assert sorted(kept) == [scores, 4 * scores, 4 * scores]  # what is dropped; the softmax, and what of it is left


@pytest.mark.slow
@pytest.mark.parametrize("keys", [1, 2, 8])
@pytest.mark.parametrize("family", ["gemma", "qwen3"])
def test_the_formula_says_what_the_trace_says_of_shared_keys_on_a_t4(family: str, keys: int) -> None:
    """There grouped heads take torch's math kernel, which copies one key head out to all as well."""
    config = AutoConfig.for_model(family, **{**SMALL, "num_key_value_heads": keys}, head_dim=64).to_dict()
    architecture = architecture_from_config(config, name=f"{family} of {keys}", source="a test")
    for checkpointing, attention in itertools.product((True, False), ("sdpa", "eager")):
        strategy = strategy_of(architecture, gradient_checkpointing=checkpointing, attention=attention)
        request = architecture, recipe(rank=16), strategy, T4
        by_trace, by_formula = trace.estimate(*request).gpu.phases, formula.estimate(*request).gpu.phases
        for phase in ("forward", "backward"):
            assert getattr(by_formula, phase) == pytest.approx(getattr(by_trace, phase), rel=0.01), phase


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "seq_len", "strategy"),
    [
        # the output head's gradient waits for the embedding's, and the sum of both is a third
        ("smollm2-135m", 128, Strategy(gradient_accumulation=2)),
        # so does that of one chunk of the loss for the next one's, and what they give the hidden states for all others
        ("qwen2.5-0.5b", 1024, Strategy(micro_batch=2)),
        ("smollm2-360m", 1900, Strategy(micro_batch=4)),
        # a norm that multiplies in float32 keeps its input in float32
        ("gemma-3-1b", 512, Strategy(micro_batch=2, gradient_checkpointing=False, loss="full")),
        # one key for all heads, cut out of a fused projection by its number
        ("falcon-7b", 512, Strategy()),
    ],
)
def test_the_formula_says_what_the_trace_says_where_all_weights_are_trained(
    model: str, seq_len: int, strategy: Strategy
) -> None:
    asked = recipe(method="full", quantization="none", double_quantization=False, autocast=False, seq_len=seq_len)
    request = find_model(model), asked, dataclasses.replace(strategy, paged_optimizer=False), A100
    by_trace, by_formula = trace.estimate(*request).gpu.phases, formula.estimate(*request).gpu.phases
    for phase in ("forward", "backward", "optimizer"):
        assert getattr(by_formula, phase) == pytest.approx(getattr(by_trace, phase), rel=0.02), phase


def test_the_constants_of_fragmentation_are_those_of_the_traced_grids() -> None:
    assert grid.fragmentation(checkpointing=True) == reserve.CHECKPOINTED
    assert grid.fragmentation(checkpointing=False) == reserve.KEPT
    assert grid.fragmentation_played() == reserve.PLAYED


def test_the_interval_of_reserved_memory_holds_for_models_that_gave_it_nothing() -> None:
    assert grid.held_out() >= 0.87 * len(grid.all_rows())


@pytest.mark.parametrize("of", [grid.usual, grid.further])
def test_allocated_memory_of_all_of_both_grids_is_near_the_traces(of: Callable[[], grid.Grid]) -> None:
    rows = of().rows()
    assert rows
    errors = sorted(abs(row.closed.allocated_bytes / row.traced["allocated"] - 1) for row in rows)
    assert errors[len(errors) // 2] <= 0.003
    assert errors[-1] <= of().tolerance


def test_components_add_up_and_are_those_of_the_formula() -> None:
    request = find_model("smollm2-135m"), recipe(rank=8, optimizer="adamw_8bit"), Strategy(paged_optimizer=False), A100
    by_trace, by_formula = trace.estimate(*request), formula.estimate(*request)
    assert by_trace.estimator == "trace"
    assert by_trace.gpu.components.total == by_trace.gpu.allocated_bytes
    for component in ("base_weights", "quantization_constants", "lora_weights", "optimizer_state", "gradients"):
        said, expected = getattr(by_trace.gpu.components, component), getattr(by_formula.gpu.components, component)
        assert said == pytest.approx(expected, rel=0.001), component
    assert by_trace.host == by_formula.host


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gpt_2_s_linears_are_base_weights_where_they_stay_in_16_bits(method: str) -> None:
    sizes = {"vocab_size": 4096, "n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 256}
    architecture = architecture_from_config({"model_type": "gpt2", **sizes}, name="a GPT-2", source="a test")
    request = architecture, recipe_of(method), Strategy(paged_optimizer=False), A100
    by_trace, by_formula = trace.estimate(*request).gpu.components, formula.estimate(*request).gpu.components
    linears = 4 * 12 * 256**2  # fused qkv 3, output 1, up 4, down 4
    assert by_trace.base_weights == by_formula.base_weights == 2 * linears


def test_paged_state_is_outside_the_sum() -> None:
    request = find_model("smollm2-135m"), recipe(rank=256), Strategy(), A100
    said = trace.estimate(*request).gpu
    assert said.paged_bytes == formula.estimate(*request).gpu.paged_bytes > 0
    assert said.components.optimizer_state < said.paged_bytes


def test_expandable_segments_never_reserve_more() -> None:
    request = find_model("smollm2-135m"), recipe(seq_len=1024), Strategy(attention="eager", loss="full"), A100
    plain = trace.estimate(*request).gpu
    expandable = trace.estimate(*request, AllocatorSettings(expandable_segments=True)).gpu
    assert expandable.reserved_bytes < plain.reserved_bytes


# --- what it leaves as it was, and what it refuses --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_scaling": "x"}, "transformers makes no model of it: "),
        ({"rope_scaling": {"rope_type": "unknown", "factor": 2.0}}, "transformers makes no model of it: "),
        ({"pad_token_id": 10**6}, "transformers makes no model of it: Padding_idx must be within"),
    ],
)
def test_a_config_that_transformers_refuses_is_a_mistake_in_the_request(changes: dict[str, Any], says: str) -> None:
    refused = architecture_from_config(TINY.to_dict() | changes, name="tiny", source="tiny/config.json")
    with pytest.raises(RequestError, match=f"tiny/config.json: {says}"):
        trace.estimate(refused, recipe(seq_len=64, rank=4), Strategy(), A100)


def test_pytorch_is_as_before_afterwards() -> None:
    functions = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.softmax
    tiny = architecture_from_config(TINY.to_dict(), name="tiny", source="tiny")
    trace.estimate(tiny, recipe(seq_len=64, rank=4), Strategy(), A100)
    assert (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.softmax) == functions
    assert torch.zeros(1).device.type == "cpu"


@pytest.mark.parametrize(
    ("model", "changes", "strategy", "said"),
    [
        ("smollm2-135m", {}, Strategy(world_size=2, zero_stage=2), "ZeRO stage 2"),
        ("smollm2-135m", {"quantization": "int8", "double_quantization": False}, Strategy(), "int8"),
    ],
)
def test_what_it_cannot_follow_is_refused_with_the_reason(
    model: str, changes: dict[str, Any], strategy: Strategy, said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        trace.estimate(find_model(model), recipe(**changes), strategy, A100)


# --- replaying --------------------------------------------------------------------------------------------------------


def test_threads_bring_weights_while_others_are_put_in_their_places() -> None:
    def weight(number: int, size: int) -> list[Any]:
        come = [Marked("weight"), Allocated(number, size, "base_weights", "")]
        return [*come, Allocated(number + 100, size // 4, "base_weights", ""), Released(number)]

    embedding, layers = weight(0, 1 << 30), [weight(number, 512) for number in range(1, 9)]
    events = [*embedding, *itertools.chain(*layers), Marked("weights loaded"), Marked("loaded")]

    def order(threads: int, draw: int = 0) -> list[int]:
        played = loaded_by_threads(events, threads, draw)
        return [event.number for event in played if not isinstance(event, Marked)]

    # without threads as it was recorded; with two, one is at the embedding, and the other brings all else meanwhile
    assert order(0) == [event.number for event in events if not isinstance(event, Marked)]
    assert order(2) == [*range(9), *itertools.chain(*((100 + number, number) for number in range(9)))]


@pytest.mark.parametrize("draw", range(5))
def test_weights_come_in_their_order_and_are_put_in_their_places_in_it(draw: int) -> None:
    sizes = [1000 + 37 * number for number in range(50)]
    happened = list(arrivals(sizes, 4, draw))
    come, placed = ([weight for weight, comes in happened if comes is which] for which in (True, False))
    assert come == placed == list(range(50))
    in_flight = 0
    for weight, comes in happened:
        in_flight += 1 if comes else -1
        assert in_flight >= 0, weight  # none is put anywhere before it has come
    assert happened == list(arrivals(sizes, 4, draw))


def test_peaks_are_those_of_the_second_step() -> None:
    first, second = 64 * MIB, 32 * MIB
    events: list[Any] = [Allocated(0, 16 * MIB, "base_weights", ""), Marked("loaded")]
    for step, size in enumerate((first, second), start=1):
        events += [Marked("forward"), Allocated(step, size, "activations", "here"), Marked("backward"), Released(step)]
        events += [Marked("optimizer")]
    played = replay(events, caching=True)
    assert played.after_load == 16 * MIB
    assert played.peaks == {"forward": 48 * MIB, "backward": 48 * MIB, "optimizer": 16 * MIB}
    assert played.allocated == 48 * MIB
    assert played.rooms == {"base_weights": 16 * MIB, "activations": 32 * MIB}
    assert played.reserved == 80 * MIB  # what the first step took stays
