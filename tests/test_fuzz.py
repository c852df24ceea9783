"""Whatever is asked: an estimate that holds together, or one clear refusal; never a traceback."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_architecture import CASES

from clusters.errors import RequestError
from launch import command
from launch.plan import plan
from qlora_core.architecture import ModelArchitecture
from qlora_core.catalogue import find_model
from qlora_core.huggingface.config import architecture_from_config
from qlora_core.memory.device import Device
from qlora_core.memory.estimate import GpuEstimate
from qlora_core.memory.formula import estimate, kernel_in_use
from qlora_core.memory.sizes import has_several_chunks
from qlora_core.recipe import Recipe
from qlora_core.strategy import LOSS_CHUNK_TOKENS, Attention, Strategy

CONFIGS: list[dict[str, Any]] = [
    {"model_type": case.values[0], **case.values[1]}  # type: ignore[dict-item]
    for case in CASES
]
SMALL = [architecture_from_config(fields, name="small", source="test") for fields in CONFIGS]
WINDOWS = (7, 8, 9, 4095, 4096, 4097)
CHUNKS = (LOSS_CHUNK_TOKENS - 1, LOSS_CHUNK_TOKENS, LOSS_CHUNK_TOKENS + 1)


def assert_sane(gpu: GpuEstimate) -> None:
    """Whole bytes, none negative, that add up, in the order of the three tiers."""
    parts = gpu.components._asdict()
    sizes = [*parts.values(), *gpu.phases, *gpu.reserved_interval, gpu.paged_bytes]
    tiers = [gpu.allocated_bytes, gpu.reserved_bytes, gpu.process_bytes]
    assert all(type(size) is int for size in (*sizes, *tiers))
    assert min(sizes) >= 0
    assert sum(parts.values()) == gpu.allocated_bytes > 0
    assert tiers == sorted(tiers)
    assert max(gpu.phases.forward, gpu.phases.backward, gpu.phases.optimizer) == gpu.allocated_bytes
    low, high = gpu.reserved_interval
    assert gpu.allocated_bytes <= low <= gpu.reserved_bytes <= high


# --- configs ----------------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.sampled_from([10_000, 100_000, 1_000_000, 100_000_000])
    | st.sampled_from([2**31, 10**12, 10**30, -(10**12), 0.5, 1e308, math.nan, math.inf, -math.inf])
    | st.just(4400).map(lambda digits: 10**digits)  # too long to print
    | st.text(max_size=6)
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
EXTRA_FIELDS = sorted(
    {field for fields in CONFIGS for field in fields}
    | {
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "hidden_act",
        "hidden_dropout",
        "is_encoder_decoder",
        "layer_types",
        "logit_scale",
        "logits_scaling",
        "max_window_layers",
        "mlp_only_layers",
        "no_rope_layers",
        "norm_topk_prob",
        "partial_rotary_factor",
        "quantization_config",
        "resid_pdrop",
        "rope_parameters",
        "rotary_pct",
        "sliding_window",
        "torch_dtype",
    }
)


@st.composite
def mutated_configs(draw: st.DrawFn) -> dict[str, Any]:
    """The config of a small model with some fields gone, some changed, some added."""
    fields: dict[str, Any] = copy.deepcopy(draw(st.sampled_from(CONFIGS)))
    for field in draw(st.lists(st.sampled_from(sorted(fields)), max_size=2)):
        fields.pop(field, None)
    return fields | draw(st.dictionaries(st.sampled_from(EXTRA_FIELDS), JUNK, max_size=3))


def check_config(fields: dict[str, Any]) -> None:
    try:
        architecture = architecture_from_config(fields, name="any", source="any")
    except RequestError as error:
        for problem in error.problems:
            assert problem.where.startswith("any: ")
            assert problem.rule
            assert problem.remedy
        return
    assert architecture.parameters > 0
    assert_sane(estimate(architecture, Recipe(), Strategy(), Device(kind="cuda", compute_dtype="bfloat16")).gpu)


@given(mutated_configs())
@settings(max_examples=300, deadline=None)
def test_a_config_is_a_model_with_an_estimate_or_is_refused(fields: dict[str, Any]) -> None:
    check_config(fields)


@given(st.dictionaries(st.sampled_from(EXTRA_FIELDS) | st.text(max_size=6), JUNK, max_size=6))
@settings(max_examples=100, deadline=None)
def test_a_config_of_anything_is_a_model_or_is_refused(fields: dict[str, Any]) -> None:
    check_config(fields)


# --- recipes, strategies, devices -------------------------------------------------------------------------------------

LENGTHS = st.integers(1, 64) | st.sampled_from((*WINDOWS, *CHUNKS, 2047, 10_000, 2**20))
DEVICES = st.sampled_from(
    [
        Device(kind="cuda", compute_dtype="float16", context_bytes=100 * 2**20, compute_capability=(7, 5)),
        Device(kind="cuda", compute_dtype="bfloat16", context_bytes=500 * 2**20, compute_capability=(8, 0)),
        Device(kind="cuda", compute_dtype="bfloat16", compute_capability=(9, 0), ranks_per_host=8, output_held=True),
        Device(kind="cuda", compute_dtype="float32", compute_capability=(8, 6), emptied_after_load=False),
        Device(kind="cpu", compute_dtype="float32"),
        Device(kind="cpu", compute_dtype="bfloat16", ranks_per_host=2),
    ]
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    method: Any = draw(st.sampled_from(["qlora", "qlora", "lora", "full"]))
    length = draw(LENGTHS)
    return Recipe(
        method=method,
        quantization=draw(st.sampled_from(["nf4", "fp4", "int8"])) if method == "qlora" else "none",
        double_quantization=draw(st.booleans()),
        block_size=draw(st.sampled_from([64, 4096])),
        rank=draw(st.integers(1, 8) | st.sampled_from([64, 1000])),
        dropout=draw(st.sampled_from([0.0, 0.1])),
        lora_dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        upcast=draw(st.sampled_from(["none", "peft"])),
        autocast=draw(st.sampled_from(["auto", True, False])),
        optimizer=draw(st.sampled_from(["adamw", "adamw_8bit"])),
        seq_len=length,
        tokens_per_step=length,
    )


@st.composite
def strategies(draw: st.DrawFn) -> Strategy:
    stage: Any = draw(st.sampled_from([0, 0, 1, 2, 3]))
    return Strategy(
        world_size=draw(st.sampled_from([1, 2, 3, 64])),
        micro_batch=draw(st.sampled_from([1, 2, 3, 16, 1000])),
        gradient_accumulation=draw(st.sampled_from([1, 1, 4])),
        gradient_checkpointing=draw(st.booleans()),
        attention=draw(st.sampled_from(["sdpa", "eager", "flash_attention_2"])),
        loss=draw(st.sampled_from(["full", "chunked"])),
        paged_optimizer=draw(st.booleans()),
        zero_stage=stage,
        offload=draw(st.sampled_from({0: ["none"], 3: ["none", "optimizer", "all"]}.get(stage, ["none", "optimizer"]))),
    )


MODELS = st.sampled_from(SMALL) | st.sampled_from(
    [find_model(name) for name in ("smollm2-360m", "pythia-410m", "falcon-7b", "gemma-2-9b", "mixtral-8x7b", "65b")]
)


@given(MODELS, recipes(), strategies(), DEVICES)
@settings(max_examples=200, deadline=None)
def test_an_estimate_holds_together(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device
) -> None:
    found = estimate(architecture, recipe, strategy, device)
    assert_sane(found.gpu)
    assert min(found.host.load_peak_bytes, found.host.steady_bytes) >= 0


def test_no_block_is_smaller_than_what_was_asked_for() -> None:
    """Twelve layers of it leave less over than six, and 42 are not to leave less than nothing."""
    recipe = Recipe(quantization="int8", double_quantization=False, rank=1, seq_len=1, tokens_per_step=1)
    device = Device(kind="cuda", compute_dtype="float32", compute_capability=(8, 6), warmed_up=True)
    assert_sane(estimate(find_model("gemma-2-9b"), recipe, Strategy(gradient_checkpointing=False), device).gpu)


def longer(recipe: Recipe, length: int) -> Recipe:
    return dataclasses.replace(recipe, seq_len=length, tokens_per_step=length)


@example(  # of whose blocks less is left over with one sequence more
    find_model("falcon-7b"),
    Recipe(method="full", quantization="none", double_quantization=False, rank=1, seq_len=1, tokens_per_step=1000),
    Strategy(micro_batch=1000, gradient_checkpointing=False, loss="full"),
    Device(kind="cuda", compute_dtype="float16", compute_capability=(7, 5)),
    1,
    1,
)
@example(  # of which one chunk of the loss becomes two
    find_model("gemma-2-9b"),
    Recipe(method="full", quantization="none", double_quantization=False, rank=1, seq_len=1023, tokens_per_step=1023),
    Strategy(gradient_checkpointing=False),
    Device(kind="cuda", compute_dtype="float16", compute_capability=(7, 5), keys_expanded=False, warmed_up=True),
    1,
    3,
)
@given(MODELS, recipes(), strategies(), DEVICES, st.integers(1, 3), st.integers(1, 2000))
@settings(max_examples=100, deadline=None)
def test_more_never_means_less_memory(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device, times: int, more: int
) -> None:
    def needed(recipe: Recipe, strategy: Strategy = strategy) -> GpuEstimate:
        return estimate(architecture, recipe, strategy, device).gpu

    def at_least(larger: GpuEstimate, here: GpuEstimate, spared: int) -> bool:
        """Its tensors are; the blocks that they lie in may be too large by less."""
        tensors, before = (each.allocated_bytes - each.components.framework for each in (larger, here))
        return larger.allocated_bytes >= here.allocated_bytes or tensors + spared >= before

    def spared(micro_batch: int, length: int) -> int:
        """One chunk's gradient of a tied head is a view, and its sum with the embedding's a tensor of its own.

        What several chunks have summed is none, and takes the embedding's in place: that is a weight less.
        """
        chunked = recipe.method == "full" and architecture.tied_embeddings and strategy.loss == "chunked"
        before, now = has_several_chunks(strategy.micro_batch, recipe.seq_len), has_several_chunks(micro_batch, length)
        return 4 * architecture.embedding_parameters if chunked and now > before else 0

    here, micro_batch = needed(recipe), times * strategy.micro_batch + more
    larger = needed(recipe, dataclasses.replace(strategy, micro_batch=micro_batch))
    less = spared(micro_batch, recipe.seq_len)
    assert at_least(larger, here, less)
    # by how tensors fall into segments; 0.976 was seen
    assert larger.process_bytes + less >= 0.9 * here.process_bytes
    length = times * recipe.seq_len + more
    kernels = [kernel_in_use(architecture, asked, strategy, device) for asked in (recipe, longer(recipe, length))]
    # where grouped keys lead to the math kernel, with all scores in memory, the mask of a window leads away from it
    alike = at_least(needed(longer(recipe, length)), here, spared(strategy.micro_batch, length))
    assert alike or kernels == ["math", "masked"]
    # tensors of a certain size are paged, are kept in 8 bits, or are divided by ZeRO-3: a higher rank makes them so
    if strategy.zero_stage < 3 and recipe.optimizer == "adamw" and not strategy.paged_optimizer:
        higher = needed(dataclasses.replace(recipe, rank=times * recipe.rank + more))
        # and a tensor that fills a block better leaves less of it over
        requested, before = (gpu.allocated_bytes - gpu.components.framework for gpu in (higher, here))
        assert requested >= before


def test_a_window_s_mask_may_need_less_than_none_where_keys_are_grouped() -> None:
    """On a GPU before Ampere: a length at which this stops being so must go from the law above, too."""
    mistral = find_model("mistral-7b-v0.1")
    t4 = Device(kind="cuda", compute_dtype="float16", compute_capability=(7, 5))
    below, above = (
        estimate(mistral, Recipe(seq_len=length, tokens_per_step=length), Strategy(), t4).gpu.allocated_bytes
        for length in (4095, 4096)
    )
    assert above < 0.6 * below


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_only_sdpa_makes_a_mask_for_a_window(attention: Attention) -> None:
    """flash_attention_2 takes the window itself (transformers, masking_utils.py, flash_attention_mask)."""
    windowed, ampere = find_model("mistral-7b-v0.1"), Device("cuda", "bfloat16", compute_capability=(8, 0))
    endless = dataclasses.replace(windowed, sliding_window=None, sliding_layers=0)
    recipe, strategy = Recipe(seq_len=8192, tokens_per_step=8192), Strategy(attention=attention)
    with_window, without = (estimate(each, recipe, strategy, ampere).gpu for each in (windowed, endless))
    assert (with_window.allocated_bytes > without.allocated_bytes) == (attention == "sdpa")


def test_layers_without_a_window_need_their_scores_beside_those_with_one() -> None:
    gemma = find_model("gemma-3-1b")
    t4 = Device(kind="cuda", compute_dtype="float16", compute_capability=(7, 5))
    mixed = dataclasses.replace(gemma, num_heads=8, num_kv_heads=2, head_dim=128)
    endless = dataclasses.replace(mixed, sliding_window=None, sliding_layers=0)
    recipe = Recipe(seq_len=8192, tokens_per_step=8192)
    here, there = (estimate(each, recipe, Strategy(), t4).gpu.allocated_bytes for each in (mixed, endless))
    assert here >= there


def test_of_layers_that_keep_their_activations_those_without_a_window_keep_all_scores() -> None:
    gemma = find_model("gemma-3-1b")
    t4 = Device(kind="cuda", compute_dtype="float16", compute_capability=(7, 5))
    recipe = Recipe(seq_len=4096, tokens_per_step=4096, autocast=False)
    strategy = Strategy(gradient_checkpointing=False)
    fewer = dataclasses.replace(gemma, sliding_layers=gemma.sliding_layers - 1)
    few, more = (estimate(each, recipe, strategy, t4).gpu.allocated_bytes for each in (gemma, fewer))
    # float32 scores of every head, in place of a mask in 16 bits, and float32 keys and values copied for all heads
    scores = 4 * gemma.num_heads * 4096**2
    copies = 2 * 4 * gemma.num_heads * gemma.head_dim * 4096
    assert more - few == pytest.approx(scores + copies - 2 * 4096**2, rel=0.03)


# --- command lines ----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, list[str]] = {
    "--gpus": ["2", "8"],
    "--gpu": ["t4", "A100 80GB", "h200", "cpu"],
    "--compare": ["t4,h200", "cpu", "rtx-4090, t4"],
    "--method": ["qlora", "lora", "full"],
    "--quant": ["nf4", "fp4", "int8", "none"],
    "--block-size": ["64", "4096"],
    "--rank": ["1", "64", "1000000"],
    "--targets": ["all-linear", "q_proj", "q_proj,v_proj", "c_proj", r".*_proj", r".*\.(q|v)_proj"],
    "--lora-dtype": ["float32", "bfloat16", "float16"],
    "--lora-dropout": ["0", "0.1"],
    "--optimizer": ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"],
    "--micro-batch": ["1", "3", "100000"],
    "--seq-len": ["1", "1024", "4097", "10000000"],
    "--attention": ["sdpa", "eager", "flash_attention_2"],
    "--loss": ["full", "chunked"],
    "--compute-dtype": ["auto", "float32", "bfloat16", "float16"],
    "--upcast": ["none", "peft"],
    "--zero-stage": ["0", "1", "2", "3"],
    "--offload": ["none", "optimizer", "all"],
    "--host-ram": ["0.001", "512"],
    "--stack": ["ours", "trainer", "loop"],
}
"""Right values, each by itself."""
WRONG_NUMBERS = [
    "",
    "0",
    "-1",
    "1.5",
    "nan",
    "inf",
    "1e308",
    "two",
    str(2**40),
    str(2**40 + 1),
    str(10**30),
    "9" * 5000,
]
WRONG_WORDS = [",", "none", "auto", "\0", "é", "..", "/", "~", "-", "--", "(", "*,q", r".*layers\.[01]\..*", "x" * 5000]
WRONG = st.text(max_size=8) | st.sampled_from(WRONG_NUMBERS) | st.sampled_from(WRONG_WORDS)
MODEL_NAMES = ["7b", "llama-2-70b", "mixtral-8x7b", "gpt2", "gemma-2-9b", "falcon-7b"]
FLAGS = ["--no-double-quant", "--no-gradient-checkpointing", "--autocast", "--explain"]
ODD = [["--list-models"], ["--list-gpus"], ["extra"], ["--nothing"], ["--gpu"], ["--gpus", "1", "--gpus", "2"]]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Mostly right ones, so that what is wrong is found late; none that starts torch or writes files."""
    asked = {"--model": MODEL_NAMES} | {
        name: OPTIONS[name] for name in draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4, unique=True))
    }
    values = {name: draw(st.sampled_from(right)) for name, right in asked.items()}
    if draw(st.integers(0, 3)) == 0:
        values[draw(st.sampled_from(sorted(values)))] = draw(WRONG)
    arguments = [part for pair in values.items() for part in pair]
    arguments += draw(st.lists(st.sampled_from(FLAGS), max_size=2))
    if draw(st.integers(0, 9)) == 0:
        arguments += draw(st.sampled_from(ODD))
    return [*arguments, *draw(st.sampled_from([[], ["--json"]]))]


def check_command(arguments: list[str]) -> tuple[int, str, str]:
    """Run `qlora-plan` as its console script does; its exit code, stdout and stderr, which keep the contract."""
    with pytest.MonkeyPatch.context() as patch, CliRunner().isolation() as (out, err, _):
        patch.setattr("sys.argv", ["qlora-plan", *arguments])
        with pytest.raises(SystemExit) as end:
            command.main(plan)
        printed, told = out.getvalue().decode(), err.getvalue().decode()
    assert "Traceback" not in printed + told
    assert "Unexpected" not in told, told
    assert end.value.code in (0, 1, 2)
    if end.value.code == 2:
        assert printed == ""
        assert told.startswith("error: ")
    elif "--json" in arguments:
        assert isinstance(json.loads(printed), dict)
    else:
        assert printed
    assert isinstance(end.value.code, int)
    return end.value.code, printed, told


@given(command_lines())
@settings(max_examples=100, deadline=None)
def test_a_command_line_is_answered_or_refused(arguments: list[str]) -> None:
    check_command(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        "--gpus 8 --seq-len 100000000000 --objective fastest --gpu h200",
        "--seq-len 1000000000000 --objective fastest",
        "--micro-batch 1000 --seq-len 1000000000 --objective fewest-gpus --gpu h200",
        "--micro-batch 100000 --seq-len 10000000 --compare t4,h200",
    ],
)
def test_a_step_that_more_gpus_would_make_larger_than_any_may_be_is_not_among_the_ways_to_run(arguments: str) -> None:
    code, printed, _ = check_command(["--model", "7b", *arguments.split()])
    assert code == 1
    assert printed.startswith("DOES NOT FIT")
