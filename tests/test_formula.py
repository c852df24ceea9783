"""The formula: real steps on this CPU, bitsandbytes' own bytes, the paper's models, and laws that always hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, core_model_loading

from qlora_core.architecture import ModelArchitecture
from qlora_core.huggingface.config import architecture_from_config
from qlora_core.memory import bytes as exact
from qlora_core.memory import sharding
from qlora_core.memory.device import Device
from qlora_core.memory.estimate import Phases
from qlora_core.memory.formula import LEARNING, course, estimate, least_bytes, prepared, step_of
from qlora_core.memory.measure import StorageMeter
from qlora_core.memory.settled import settled
from qlora_core.memory.step import on_tape, recorded
from qlora_core.recipe import Recipe
from qlora_core.strategy import Offload, Strategy, ZeroStage
from qlora_core.training.lora import adapt_under_autocast
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import attach_adapters, load_base, trainable
from qlora_core.training.optimizer import build_optimizer

A100 = Device(kind="cuda", compute_dtype="bfloat16", compute_capability=(8, 0))
MODELS = Path(exact.__file__).parents[1] / "models"


def model(name: str) -> ModelArchitecture:
    return architecture_from_config(json.loads((MODELS / f"{name}.json").read_text()), name=name, source=name)


def recipe(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {"seq_len": 512, "tokens_per_step": 512 * 64, "autocast": False, **changes}
    fields["tokens_per_step"] = fields["seq_len"] * 64
    return Recipe(**fields)


def strategy_of(architecture: ModelArchitecture, **changes: Any) -> Strategy:
    """Without paging, with the attention and the loss that there are for this architecture."""
    fields: dict[str, Any] = {
        "micro_batch": 2,
        "attention": "sdpa" if architecture.has_sdpa else "eager",
        "loss": "chunked" if architecture.plain_logits else "full",
        "paged_optimizer": False,
    }
    return Strategy(**{**fields, **changes})


# --- real steps on this CPU -------------------------------------------------------------------------------------------

TINY = LlamaConfig(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=2048,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    AutoModelForCausalLM.from_config(TINY).save_pretrained(folder)
    return folder


def measured_second_step(
    folder: Path, asked: Recipe, strategy: Strategy, dtype: Any, plain_autocast: bool = False
) -> Phases:
    """The peaks of a real second step: bitsandbytes, peft and transformers, every tensor's storage followed.

    Autocast is around model and loss, as transformers' Trainer has it; `plain_autocast` leaves it as it has it, too.
    """
    torch.set_num_threads(1)
    base = load_base(str(folder), asked, strategy, dtype, torch.device("cpu"))
    adapted = attach_adapters(base, asked, seed=0).train()
    loss_of = SummedLoss(adapted, strategy.loss)
    if asked.under_autocast and not plain_autocast:
        adapt_under_autocast(adapted)
    optimizer = build_optimizer(trainable(adapted), asked, strategy)
    tokens = torch.randint(0, TINY.vocab_size, (strategy.micro_batch, asked.seq_len))
    for _ in range(2):
        meter = StorageMeter()
        meter.loaded(adapted)
        meter._tracker.adopt(
            tensor
            for state in optimizer.state.values()
            for tensor in state.values()
            if isinstance(tensor, torch.Tensor)
        )
        casts = torch.autocast("cpu", torch.bfloat16, enabled=asked.under_autocast, cache_enabled=plain_autocast)
        with meter.phase("forward"), casts:
            if asked.packing:
                loss = loss_of(tokens, tokens, torch.arange(asked.seq_len).expand_as(tokens) % 40)
            else:
                loss = loss_of(tokens, tokens)
        with meter.phase("backward"):
            loss.backward()
        with meter.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        del loss
    return meter.peaks()


@pytest.mark.parametrize(
    ("asked", "strategy", "dtype"),
    [
        (recipe(rank=16, seq_len=128), Strategy(micro_batch=2), "float32"),
        (recipe(rank=16, seq_len=512), Strategy(micro_batch=4), "float32"),
        (recipe(rank=16, seq_len=128), Strategy(micro_batch=2), "bfloat16"),
        (recipe(rank=16, seq_len=128, lora_dtype="bfloat16"), Strategy(gradient_checkpointing=False), "bfloat16"),
        (recipe(rank=16, seq_len=128, targets=("q_proj", "v_proj")), Strategy(micro_batch=3), "float32"),
        (recipe(rank=8, seq_len=128), Strategy(micro_batch=2, gradient_checkpointing=False), "float32"),
        (recipe(rank=16, seq_len=128), Strategy(micro_batch=2, attention="eager"), "float32"),
        (recipe(rank=16, seq_len=128, dropout=0.1), Strategy(micro_batch=2), "float32"),
        (recipe(rank=16, seq_len=128, quantization="fp4", double_quantization=False), Strategy(), "float32"),
        (recipe(rank=16, seq_len=128, method="lora", quantization="none"), Strategy(micro_batch=2), "float32"),
        (recipe(rank=16, seq_len=128, method="lora", quantization="none"), Strategy(attention="eager"), "bfloat16"),
        (recipe(rank=16, seq_len=512, packing=True), Strategy(micro_batch=2), "float32"),
        (recipe(rank=8, seq_len=256, packing=True), Strategy(micro_batch=2, gradient_checkpointing=False), "float32"),
        (recipe(rank=16, seq_len=256, packing=True), Strategy(micro_batch=2, attention="eager"), "bfloat16"),
        (recipe(rank=16, seq_len=128, use_dora=True, dropout=0.1), Strategy(micro_batch=2), "float32"),
        (recipe(rank=16, seq_len=128, use_dora=True), Strategy(gradient_checkpointing=False), "bfloat16"),
    ],
)
def test_a_real_step_on_this_cpu_needs_what_the_formula_says(
    tiny_folder: Path, asked: Recipe, strategy: Strategy, dtype: Any
) -> None:
    strategy = dataclasses.replace(strategy, paged_optimizer=False)
    real = measured_second_step(tiny_folder, asked, strategy, dtype)
    architecture = architecture_from_config(TINY.to_dict(), name="tiny", source="tiny")
    said = estimate(architecture, asked, strategy, Device(kind="cpu", compute_dtype=dtype)).gpu.phases
    for phase in ("forward", "backward"):
        assert getattr(said, phase) == pytest.approx(getattr(real, phase), rel=0.02), phase


# --- exact bytes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(704, 256), (256, 704), (1000, 96)])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 128])
def test_constants_are_those_bitsandbytes_makes(shape: tuple[int, int], double: bool, block: int) -> None:
    packed, state = bnb.quantize_4bit(torch.randn(shape), quant_type="nf4", compress_statistics=double, blocksize=block)
    tensors = [state.absmax, state.code]
    if double:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    numel = shape[0] * shape[1]
    assert packed.nbytes == -(-numel // 2)
    assert sorted(tensor.nbytes for tensor in tensors) == sorted(exact.constant_tensors(numel, block, double))


def test_optimizer_state_is_that_of_bitsandbytes() -> None:
    eight = recipe(optimizer="adamw_8bit")
    numel = 64 * 4096
    assert exact.optimizer_state([(numel, 1)], eight, 4, paged=False).resident == (
        2 * numel + 8 * (numel // 256) + exact.STATE_CODE_BYTES
    )
    small = exact.optimizer_state([(4095, 2)], eight, 4, paged=False)
    assert small.resident == 2 * 8 * 4095 + exact.STATE_CODE_BYTES
    paged = exact.optimizer_state([(16 * 4096, 1), (64 * 4096, 1)], recipe(), 4, paged=True)
    assert (paged.resident, paged.paged) == (8 * 16 * 4096, 8 * 64 * 4096)


# --- the paper, and what people ran into ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bfloat16_adapters", "float32_adapters"),
    [
        # GB, from a trace of the real code on torch's meta device: CUDA's foreach AdamW and the allocator; paged state
        ("llama-7b", 5.5, 5.45),
        ("llama-13b", 9.8, 9.6),
        ("llama-33b", 22.3, 21.9),
        ("llama-65b", 42.5, 41.6),
    ],
)
def test_the_papers_models(name: str, bfloat16_adapters: float, float32_adapters: float) -> None:
    narrow = estimate(model(name), recipe(lora_dtype="bfloat16"), Strategy(paged_optimizer=False, loss="full"), A100)
    assert narrow.gpu.allocated_bytes / 1e9 == pytest.approx(bfloat16_adapters, rel=0.01)
    wide = estimate(model(name), recipe(), Strategy(loss="full"), A100)
    assert wide.gpu.allocated_bytes / 1e9 == pytest.approx(float32_adapters, rel=0.015)
    assert wide.gpu.paged_bytes > 0


def test_why_65b_is_tight_on_48_gb_at_batch_4() -> None:
    # artidoro/qlora#17; its stack casts what is not quantized to float32, computes the stock loss and pages the state
    stock = recipe(upcast="peft", dropout=0.05)
    theirs = estimate(model("llama-65b"), stock, Strategy(micro_batch=4, loss="full"), A100).gpu
    ours = estimate(model("llama-65b"), recipe(), Strategy(micro_batch=1), A100).gpu
    assert theirs.allocated_bytes + theirs.paged_bytes > 48 * 1024**3
    assert ours.allocated_bytes + ours.paged_bytes < 48 * 1000**3


@pytest.mark.parametrize(("name", "accumulation", "reserved_gib"), [("llama-7b", 1, 7.9), ("llama-65b", 4, 47.4)])
def test_what_is_reserved_for_a_4_bit_base_that_comes_in_float32(
    name: str, accumulation: int, reserved_gib: float
) -> None:
    # by the trace, which takes 10 and 85 s. While loading, transformers asks at once for half a byte of each weight
    # that is going to be quantized, whatever it comes in (quantized_element_size)
    wide = Device(kind="cuda", compute_dtype="float32", compute_capability=(8, 6))
    strategy = Strategy(micro_batch=4, gradient_accumulation=accumulation, attention="eager", loss="full")
    said = estimate(model(name), recipe(), strategy, wide).gpu
    assert said.reserved_bytes == pytest.approx(reserved_gib * 1024**3, rel=0.1)


def test_the_peak_is_named() -> None:
    deep = estimate(model("llama-65b"), recipe(), Strategy(), A100).gpu
    assert deep.peak_moment == "backward of layer 1, while its down_proj is recomputed"
    wide = estimate(model("qwen2.5-0.5b"), recipe(), Strategy(loss="full", micro_batch=8), A100).gpu
    assert wide.peak_moment == "backward of the loss"


def test_int8_keeps_every_layers_inputs_in_spite_of_checkpointing() -> None:
    # bitsandbytes' MatMul8bitLt holds its input in ctx.tensors, which no checkpoint sees
    eight = estimate(model("llama-7b"), recipe(quantization="int8"), Strategy(micro_batch=4), A100).gpu
    four = estimate(model("llama-7b"), recipe(), Strategy(micro_batch=4), A100).gpu
    assert eight.components.activations > 5 * four.components.activations


def test_zero_3_divides_weights_but_not_their_constants() -> None:
    one = estimate(model("llama-65b"), recipe(), Strategy(), A100).gpu.components
    four = estimate(model("llama-65b"), recipe(), Strategy(world_size=4, zero_stage=3), A100).gpu
    assert four.components.quantization_constants == one.quantization_constants
    assert four.components.base_weights == pytest.approx(one.base_weights / 4, rel=0.01)


def test_zero_3_loads_the_whole_base_on_the_host_and_a_part_on_each_gpu() -> None:
    # by hand: Llama-2-70B has 80 layers of 8192 x (2 x 8192 + 2 x 1024 + 3 x 28672) weights that are quantized
    quantized = 80 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    packed = quantized / 2  # 34.2 GB
    constants = quantized / 64 + 4 * quantized / 64 / 256  # 1.1 GB; code books are less than a megabyte
    embeddings = 2 * 2 * 32000 * 8192  # with the output head, in bfloat16
    # rank 64: in and out features of each layer's q and o, k and v, gate and up, down; in float32
    adapters = 4 * 80 * 64 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    device = dataclasses.replace(A100, ranks_per_host=2)
    strategy = Strategy(world_size=2, zero_stage=3, paged_optimizer=False)
    said = estimate(model("llama-2-70b"), recipe(), strategy, device)
    # DeepSpeed then makes float32 masters and room for gradients of its part, and a bucket of 5 million
    engine = adapters / 2 + adapters / 2 + 4 * 5_000_000
    after_load = (packed + embeddings + adapters) / 2 + constants + engine
    assert said.gpu.phases.after_load == pytest.approx(after_load, rel=0.002)
    # the largest weight comes in 2 bytes an element, and takes 14 more while a CPU quantizes it
    each = packed + constants + embeddings + max(adapters, 16 * 8192 * 28672)
    assert said.host.load_peak_bytes == pytest.approx(2 * each, rel=0.002)
    assert said.host.load_peak_bytes > 2 * 37e9
    assert max(said.gpu.phases.after_load, said.gpu.phases.forward) < packed
    # offloaded parts go back to the host, and the optimizer's with them: constants and adapters stay
    everything = dataclasses.replace(strategy, offload="all")
    offloaded = estimate(model("llama-2-70b"), recipe(), everything, device)
    assert offloaded.gpu.phases.after_load == pytest.approx(constants + adapters / 2 + 4 * 5_000_000, rel=0.002)
    assert offloaded.host.load_peak_bytes == said.host.load_peak_bytes
    # where there are no constants, an embedding, the largest weight, takes more when it passes the GPU on its way back
    unquantized = estimate(model("llama-2-70b"), recipe(method="lora", quantization="none"), everything, device)
    assert unquantized.gpu.phases.after_load == pytest.approx(adapters / 2 + embeddings / 2, rel=0.002)
    assert unquantized.host.load_peak_bytes == pytest.approx(2 * (2 * quantized + embeddings + adapters), rel=0.002)


@pytest.mark.parametrize(("quantization", "at_a_time"), [("nf4", 1), ("none", 4)])
def test_weights_are_on_their_way_through_the_host_as_many_at_a_time_as_transformers_loads(
    quantization: Any, at_a_time: int, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(method="qlora" if at_a_time == 1 else "lora", quantization=quantization)
    gpu = Device(kind="cuda", compute_dtype="bfloat16")
    # of 65B an embedding is the largest
    said = estimate(model("llama-65b"), asked, Strategy(), gpu).host.load_peak_bytes
    assert said == at_a_time * 2 * 32000 * 8192
    pools: list[Any] = []
    real = core_model_loading.ThreadPoolExecutor

    def counted(**how: Any) -> Any:
        pools.append(how)
        return real(**how)

    monkeypatch.setattr(core_model_loading, "ThreadPoolExecutor", counted)
    monkeypatch.setattr(core_model_loading, "GLOBAL_WORKERS", 4)  # min(4, cores)
    load_base(str(tiny_folder), asked, Strategy(), "float32", torch.device("cpu"))
    assert pools == ([] if at_a_time == 1 else [{"max_workers": 4}])


def test_on_a_cpu_zero_3_loads_the_whole_base_in_each_process() -> None:
    cpu = Device(kind="cpu", compute_dtype="float32", ranks_per_host=2)
    whole = estimate(model("smollm2-135m"), recipe(), Strategy(), cpu).gpu.phases.after_load
    divided = estimate(model("smollm2-135m"), recipe(), Strategy(world_size=2, zero_stage=3), cpu).gpu
    assert divided.phases.after_load == whole


def test_offloaded_state_moves_to_the_host() -> None:
    strategy = Strategy(world_size=4, zero_stage=2, paged_optimizer=False)
    device = dataclasses.replace(A100, ranks_per_host=4)
    kept = estimate(model("llama-13b"), recipe(), strategy, device)
    moved = estimate(model("llama-13b"), recipe(), dataclasses.replace(strategy, offload="optimizer"), device)
    assert moved.gpu.phases.backward < kept.gpu.phases.backward
    assert kept.host.steady_bytes == 0
    # by hand: 40 layers of width 5120, 13824 inside; adapters of rank 64
    numel = 40 * 64 * (4 * 2 * 5120 + 3 * (5120 + 13824))
    of_largest = 4 * 64 * 13824
    # of its part each rank has there, in float32, the weights, new ones on their way back, gradients, two moments, and
    # what AdamW makes of these; and a buffer for a gradient on its way, which there is on the GPU, too
    assert moved.host.steady_bytes == 4 * ((4 + 4 + 4 + 8 + 8) * numel // 4 + of_largest)
    assert moved.gpu.phases.optimizer == pytest.approx(kept.gpu.phases.after_load + of_largest, rel=0.01)


@pytest.mark.parametrize("world_size", [1, 2])
def test_without_zero_no_bucket_of_deepspeed_is_counted(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    full = recipe(method="full", quantization="none")
    strategy = Strategy(world_size=world_size, paged_optimizer=False)
    said = estimate(model("llama-3-8b"), full, strategy, A100)
    monkeypatch.setattr(sharding, "LARGEST_BUCKET_ELEMENTS", 10_000_000_000)
    # what is kept of an estimate is kept by architecture, of which the name is a part
    assert estimate(dataclasses.replace(model("llama-3-8b"), name="again"), full, strategy, A100) == said


def test_zero_3_widens_what_is_larger_than_a_bucket_and_brings_it_back_for_its_norm() -> None:
    """Full fine-tuning of Llama 3 8B on 8 GPUs: most is there when the gradient of the head, the first, is reduced."""
    head, parameters = 128256 * 4096, 8_030_261_248
    device = dataclasses.replace(A100, ranks_per_host=8)
    full = recipe(method="full", quantization="none")
    strategy = Strategy(world_size=8, zero_stage=3, loss="full", paged_optimizer=False)
    kept = estimate(model("llama-3-8b"), full, strategy, device).gpu.phases.backward
    moved = estimate(model("llama-3-8b"), full, dataclasses.replace(strategy, offload="optimizer"), device).gpu
    # of its part a rank has in float32 the weights, two moments and a gradient less; of the head's gradient its part in
    # float32 and in float64 more, beside the whole in bfloat16 and in float32, which both have
    assert kept - moved.phases.backward == pytest.approx(16 * parameters / 8 - 12 * head / 8, rel=0.01)
    # DeepSpeed has a billion elements whole at once, of which the head has been let go, and a bucket of 5 million;
    # 32 layers keep a sequence of 4,096 numbers a token
    whole, kept_activations = 2 * (1_000_000_000 - head), 2 * 33 * 4096 * full.seq_len
    reducing = 2 * parameters / 8 + whole + 2 * head + 4 * head + 12 * head / 8 + 4 * 5_000_000 + kept_activations
    assert moved.phases.backward == pytest.approx(reducing, rel=0.03)


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")])
def test_a_cpu_has_what_is_offloaded_in_the_same_memory(stage: ZeroStage, offload: Offload) -> None:
    cpu = Device(kind="cpu", compute_dtype="float32", ranks_per_host=2)
    kept = Strategy(world_size=2, zero_stage=stage, paged_optimizer=False)
    both = [kept, dataclasses.replace(kept, offload=offload)]
    stays, moves = (estimate(model("smollm2-135m"), recipe(), strategy, cpu) for strategy in both)
    assert moves.host.steady_bytes == 0
    assert moves.gpu.phases.optimizer >= stays.gpu.phases.optimizer


# --- laws (more in test_fuzz.py) --------------------------------------------------------------------------------------

SMALL = [model(name) for name in ("smollm2-360m", "qwen3-0.6b", "opt-125m", "pythia-410m", "falcon-7b", "gemma-2b")]

strategies = st.builds(
    Strategy,
    world_size=st.sampled_from([1, 2, 8]),
    micro_batch=st.integers(1, 16),
    gradient_accumulation=st.sampled_from([1, 4]),
    gradient_checkpointing=st.booleans(),
    attention=st.sampled_from(["sdpa", "eager"]),
    loss=st.sampled_from(["full", "chunked"]),
    paged_optimizer=st.booleans(),
    zero_stage=st.sampled_from([0, 1, 2, 3]),
)
recipes = st.builds(
    recipe,
    quantization=st.sampled_from(["nf4", "fp4", "int8"]),
    double_quantization=st.booleans(),
    rank=st.integers(1, 128),
    dropout=st.sampled_from([0.0, 0.05]),
    lora_dtype=st.sampled_from(["float32", "bfloat16"]),
    upcast=st.sampled_from(["none", "peft"]),
    autocast=st.booleans(),
    optimizer=st.sampled_from(["adamw", "adamw_8bit"]),
    seq_len=st.sampled_from([64, 500, 2048]),
)
devices = st.sampled_from(
    [
        A100,
        Device(kind="cuda", compute_dtype="float16", compute_capability=(7, 5), context_bytes=1),
        Device(kind="cpu", compute_dtype="float32"),
    ]
)


@given(st.sampled_from(SMALL), recipes, strategies, devices)
@settings(max_examples=60, deadline=None)
def test_components_add_up_and_none_is_negative(
    architecture: ModelArchitecture, asked: Recipe, strategy: Strategy, device: Device
) -> None:
    gpu = estimate(architecture, asked, strategy, device).gpu
    assert gpu.components.total == gpu.allocated_bytes
    assert min(gpu.components) >= 0
    assert gpu.allocated_bytes == max(gpu.phases.forward, gpu.phases.backward, gpu.phases.optimizer)
    assert gpu.allocated_bytes <= gpu.reserved_bytes <= gpu.process_bytes


MIXED = [*SMALL, model("mixtral-8x7b"), model("gemma-3-1b")]


@given(st.sampled_from(MIXED), recipes, strategies, devices, st.integers(1, 9), st.integers(1, 9000))
@settings(max_examples=60, deadline=None)
def test_what_a_search_asks_is_the_estimates(
    architecture: ModelArchitecture,
    asked: Recipe,
    strategy: Strategy,
    device: Device,
    micro_batch: int,
    seq_len: int,
) -> None:
    """`asked` has another micro-batch and another length, on the other side of a sliding window at times."""
    longer = dataclasses.replace(asked, seq_len=seq_len, tokens_per_step=seq_len)
    said = estimate(architecture, longer, dataclasses.replace(strategy, micro_batch=micro_batch), device).gpu
    sizes = prepared(architecture, asked, strategy, device)
    assert sizes.reserved_bytes(micro_batch, seq_len) == said.reserved_bytes


@given(st.sampled_from(MIXED), recipes, strategies, devices, st.sampled_from(["none", "optimizer", "all"]))
@settings(max_examples=150, deadline=None)
def test_no_number_of_ranks_needs_less_than_the_least(
    architecture: ModelArchitecture, asked: Recipe, strategy: Strategy, device: Device, offload: Offload
) -> None:
    if strategy.zero_stage > (2 if offload == "all" else 0):
        strategy = dataclasses.replace(strategy, offload=offload, paged_optimizer=False)
    least = least_bytes(architecture, asked, strategy, device, strategy.micro_batch)
    assert least <= estimate(architecture, asked, strategy, device).gpu.allocated_bytes
    checkpointed_again = strategy.zero_stage == 3 and strategy.gradient_checkpointing
    assert (least > 0) == (strategy.zero_stage > 0 and not checkpointed_again)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_least_tells_what_activations_alone_rule_out(stage: ZeroStage) -> None:
    """16 unchecked sequences of 2,048 tokens: nearly all of it is activations, which no number of ranks divides."""
    asked = recipe(seq_len=2048)
    strategy = Strategy(world_size=4, zero_stage=stage, micro_batch=16, gradient_checkpointing=False)
    needed = estimate(model("llama-7b"), asked, strategy, A100).gpu.allocated_bytes
    assert least_bytes(model("llama-7b"), asked, strategy, A100, 16) > 0.9 * needed


@given(st.sampled_from(MIXED), recipes, strategies, devices)
@settings(max_examples=30, deadline=None)
def test_the_tape_of_any_rank_is_the_tape_of_each(
    architecture: ModelArchitecture, asked: Recipe, strategy: Strategy, device: Device
) -> None:
    step = step_of(architecture, asked, strategy, device)
    at_any = recorded(on_tape(step)).of(step)
    assert (
        recorded(step._replace(layers=min(step.layers, 2))).of(step) == at_any
    )  # what knows its rank and buffer does not depend on another


def test_learning_has_no_size() -> None:
    """Who adds a field to Recipe has to say so, or sizes are prepared for each of its values."""
    plain, other = recipe(), recipe(learning_rate=1e-3, alpha=8.0, beta2=0.5, epochs=3.0, steps=7)
    assert prepared(model("gpt2"), plain, Strategy(), A100) is prepared(model("gpt2"), other, Strategy(), A100)
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert fields > LEARNING
    assert {"method", "quantization", "rank", "targets", "lora_dtype", "upcast", "optimizer"} <= fields - LEARNING


@example(  # its peak is when gradients are reduced, and no activations are left whose blocks could be too large
    model("falcon-7b"),
    recipe(rank=63, lora_dtype="bfloat16", upcast="peft", seq_len=64),
    Strategy(zero_stage=1, gradient_checkpointing=False, loss="full", paged_optimizer=False),
    A100,
)
@given(st.sampled_from(SMALL), recipes, strategies, devices)
@settings(max_examples=30, deadline=None)
def test_more_never_needs_less(
    architecture: ModelArchitecture, asked: Recipe, strategy: Strategy, device: Device
) -> None:
    def allocated(asked: Recipe, strategy: Strategy) -> int:
        return estimate(architecture, asked, strategy, device).gpu.allocated_bytes

    here = allocated(asked, strategy)
    assert allocated(asked, dataclasses.replace(strategy, micro_batch=strategy.micro_batch + 1)) >= here
    longer = dataclasses.replace(asked, seq_len=2 * asked.seq_len, tokens_per_step=2 * asked.tokens_per_step)
    assert allocated(longer, strategy) >= here


def test_a_recipe_whose_targets_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is trained"):
        estimate(model("gpt2"), recipe(targets=("q_proj",)), Strategy(), A100)


def test_an_int8_base_lies_in_segments_of_a_byte_a_weight() -> None:
    # 32 layers of 4096 x (4 x 4096 + 3 x 11008) weights: 6.48 GB, where two to a byte would be 3.24
    weights = 32 * 4096 * (4 * 4096 + 3 * 11008)
    loaded = settled(model("llama-7b"), recipe(quantization="int8", double_quantization=False), A100)
    assert loaded.reserved > weights


def test_the_course_of_layers_that_take_turns_has_the_first_and_the_last_of_each_kind() -> None:
    moments = course(model("qwen3.5-0.8b"), recipe(seq_len=1024), Strategy(), A100)
    layers = [(name, phase) for name, phase, _ in moments if "layers" in name]
    first, last = "first 4 layers", "last 4 layers"
    assert layers == [(first, "forward"), (last, "forward"), (last, "backward"), (first, "backward")]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_course_of_a_step_reaches_the_peak_of_each_phase_and_no_more(
    zero_stage: ZeroStage, checkpointing: bool
) -> None:
    strategy = Strategy(world_size=2, micro_batch=2, gradient_checkpointing=checkpointing, zero_stage=zero_stage)
    asked = model("llama-7b"), recipe(seq_len=1024), strategy, A100
    peaks = estimate(*asked).gpu.phases._asdict()
    moments = course(*asked)
    assert [moments[0][:2], moments[-1][:2]] == [("before", None), ("optimizer", "optimizer")]
    for phase in ("forward", "backward", "optimizer"):
        assert max(found.total for _, of, found in moments if of == phase) == peaks[phase]
    if not checkpointing:  # what 32 layers keep is there by the last one, and gone by the first one's backward pass
        by_part = {(part, of): found.activations for part, of, found in moments}
        assert by_part["last layer", "forward"] > 20 * by_part["first layer", "forward"] > 0
        assert by_part["first layer", "backward"] < by_part["last layer", "backward"] / 10
