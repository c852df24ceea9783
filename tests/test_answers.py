"""Questions that people asked about real fine-tunes, answered; what is expected was worked out by hand or published.

The hand's figures leave out rounding, code books and norms: all of them together are less than a thousandth.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest

from clusters.cluster import Cluster
from clusters.errors import RequestError
from clusters.gpu import GIB, find_gpu
from orchestrator import plan
from orchestrator.devices import any_nodes
from orchestrator.plans import Plan
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

CUBLAS = 17e6
"""Its two workspaces before Hopper: 8.125 and 8.0625 MiB, as a T4 shows them."""
BUCKET = 4 * 5_000_000
"""In which ZeRO-3 reduces gradients: `launch` sets 5 million float32 elements."""


class Llama(NamedTuple):
    """A Llama, for sums by hand: layers, widths of the residual stream, of the feed-forward, of keys, and words."""

    layers: int
    hidden: int
    inner: int
    keys: int
    words: int

    @property
    def quantized(self) -> int:
        """Weights of q and o, k and v, gate, up and down in all layers."""
        return self.layers * self.hidden * (2 * self.hidden + 2 * self.keys + 3 * self.inner)

    @property
    def packed(self) -> float:
        """Half a byte a weight."""
        return self.quantized / 2

    @property
    def constants(self) -> float:
        """A byte for 64 weights, and a float32 for 256 of those bytes (QLoRA, section 3)."""
        return self.quantized / 64 * (1 + 4 / 256)

    @property
    def ends(self) -> int:
        """Elements of the embedding and the output head, which are not quantized."""
        return 2 * self.words * self.hidden

    def adapters(self, rank: int = 64) -> int:
        """Elements of the adapters on all linear layers: rank x (features in + out)."""
        attention = 2 * (self.hidden + self.hidden) + 2 * (self.hidden + self.keys)
        return rank * self.layers * (attention + 3 * (self.hidden + self.inner))

    def checkpoints(self, tokens: int, itemsize: int) -> int:
        """What gradient checkpointing keeps: the input of each layer."""
        return self.layers * tokens * self.hidden * itemsize

    def layer(self, tokens: int) -> int:
        """Bytes of one layer's activations in 16 bits beside float32 adapters, when its last product is at work.

        Of the stream's width: two norms keep their input in float32 and its normalised copy (6 each), six adapters a
        float32 copy of their input (4 each), attention its queries and result and the layer its middle (2 each); of the
        keys' width 2 x 2; of the feed-forward's: gate, its activation, up and their product (2 each), and the copy (4).
        """
        return tokens * ((2 * 6 + 6 * 4 + 3 * 2) * self.hidden + 4 * self.keys + 12 * self.inner)

    def wide_layer(self, tokens: int) -> int:
        """The same in float32, where nothing has to be copied: norms keep a copy, products their input."""
        return tokens * 4 * ((1 + 2 + 2 + 1 + 1) * self.hidden + 2 * self.keys + 4 * self.inner)

    def dequantized(self, itemsize: int) -> int:
        """The largest weight as bitsandbytes hands it to the product."""
        return self.hidden * self.inner * itemsize


LLAMA_7B = Llama(32, 4096, 11008, 4096, 32000)
LLAMA_33B = Llama(60, 6656, 17920, 6656, 32000)
LLAMA_65B = Llama(80, 8192, 22016, 8192, 32000)
LLAMA_2_70B = Llama(80, 8192, 28672, 1024, 32000)
LLAMA_31_405B = Llama(126, 16384, 53248, 1024, 128256)


def of_nodes(gpu: str, gpus: int, *, usable: float | None = None, host_gib: int | None = None) -> Cluster:
    """One node of so many GPUs."""
    pool = any_nodes(find_gpu(gpu), gpus)
    host = None if host_gib is None else host_gib * GIB
    pool = dataclasses.replace(pool, usable_bytes=int(usable or pool.usable_bytes), host_ram_bytes=host)
    return Cluster("desk", (pool,), None, None, "a test")


def live(model: Llama, rank: int = 64) -> float:
    """What ZeRO-3 has whole at once, of its packed bytes, 16-bit ends and float32 adapters alike.

    stage3_max_live_parameters is 1e9 elements and stage3_prefetch_bucket_size 5e7 (DeepSpeed 0.19.8, zero/config.py).
    """
    elements = model.packed + model.ends + model.adapters(rank)
    size = model.packed + 2 * model.ends + 4 * model.adapters(rank)
    return (1e9 + 5e7) * size / elements


def whole_adapters(model: Llama, rank: int = 64) -> int:
    """Adapters below stage3_param_persistence_threshold, 1e5 elements, stay whole: the second ones of k and v."""
    assert rank * model.keys < 100_000
    return 2 * model.layers * rank * model.keys * 4


# --- 65B on 48 GB -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["rtx-a6000", "a40", "l40s", "rtx-6000-ada"])
def test_65b_at_1_x_512_fits_every_48_gb_gpu(gpu: str) -> None:
    # the peak is in the first layer, when all others have their gradients
    by_hand = LLAMA_65B.packed + LLAMA_65B.constants + 2 * LLAMA_65B.ends + 8 * LLAMA_65B.adapters()
    by_hand += LLAMA_65B.layer(512) + LLAMA_65B.dequantized(2) + CUBLAS
    answer = plan("65b", recipe=Recipe(tokens_per_step=512), strategy=Strategy(), gpu=gpu)
    assert answer.verdict.allocated_bytes == pytest.approx(by_hand, rel=0.01)
    assert answer.fits
    assert not answer.verdict.barely


def original(micro_batch: int, accumulation: int, seq_len: int, gpu: str) -> Plan:
    """65B with what artidoro/qlora at 8532e01 (25 May 2023) does unless it is told otherwise.

    Without --bf16 its torch_dtype and compute dtype are float32 (qlora.py, get_accelerate_model). The rest is its
    defaults: rank 64 without dropout, paged 32-bit AdamW, the stock loss; transformers' LLaMA had eager attention only.
    """
    tokens = micro_batch * accumulation * seq_len
    recipe = Recipe(compute_dtype="float32", upcast="peft", seq_len=seq_len, tokens_per_step=tokens)
    strategy = Strategy(
        micro_batch=micro_batch,
        gradient_accumulation=accumulation,
        attention="eager",
        loss="full",
        paged_optimizer=True,
    )
    return plan("65b", recipe=recipe, strategy=strategy, gpu=gpu)


def test_65b_at_4_x_512_in_the_original_recipe_does_not_fit_48_gb_and_the_plan_says_where_the_bytes_go() -> None:
    # artidoro/qlora#17: scripts/finetune.sh as it was then, 4 x (384 + 128) tokens, 4 micro-batches a step, no --bf16,
    # on an RTX A6000. Of 46.45 GiB reserved 45.09 were allocated when another 688 MiB were asked for: 8192 x 22016 x 4,
    # a weight dequantized to float32. The libraries are others today, but not the sum
    assert LLAMA_65B.dequantized(4) == 688 * 2**20
    reported = 45.09 * GIB + LLAMA_65B.dequantized(4)
    answer = original(4, 4, 512, "rtx-a6000")
    assert answer.verdict.allocated_bytes == pytest.approx(reported, rel=0.02)
    assert not answer.fits
    a6000 = find_gpu("rtx-a6000")
    fragments = (46.45 - 45.09) * GIB  # theirs; there is room for half of that
    assert answer.verdict.allocated_bytes + fragments + a6000.context_bytes > a6000.usable_bytes

    tokens, scores = 4 * 512, 4 * 64 * 512 * 512 * 4
    parts = answer.estimate.gpu.components
    assert parts.base_weights == pytest.approx(LLAMA_65B.packed, rel=0.001)
    assert parts.quantization_constants == pytest.approx(LLAMA_65B.constants, rel=0.001)
    assert parts.unquantized_weights == pytest.approx(4 * LLAMA_65B.ends, rel=0.01)
    assert parts.lora_weights == parts.gradients == 4 * LLAMA_65B.adapters()
    activations = LLAMA_65B.checkpoints(tokens, 4) + LLAMA_65B.wide_layer(tokens) + scores
    assert parts.activations + parts.dequantization_workspace == pytest.approx(
        activations + LLAMA_65B.dequantized(4), rel=0.05
    )
    assert answer.estimate.gpu.paged_bytes == 8 * LLAMA_65B.adapters()
    # the same step in smaller pieces fits
    assert answer.alternatives[0].title == "a smaller micro-batch"
    assert answer.alternatives[0].process_bytes <= 47.4 * GIB


def test_65b_at_4_x_528_in_bfloat16_fits_48_gb_as_its_authors_did() -> None:
    # scripts/finetune_guanaco_65b.sh (0b46ca8): --bf16, with which qlora.py casts adapters, embedding and head to it
    recipe = Recipe(
        compute_dtype="bfloat16", lora_dtype="bfloat16", dropout=0.05, seq_len=528, tokens_per_step=16 * 528
    )
    strategy = Strategy(micro_batch=4, gradient_accumulation=4, attention="eager", loss="full")
    assert plan("65b", recipe=recipe, strategy=strategy, gpu="rtx-a6000").fits


def test_what_takes_60_gb_when_65b_is_trained_with_the_defaults() -> None:
    # artidoro/qlora#33: "about 60G" of a larger GPU, as a monitor shows it, with paged state, which stays where there
    # is room. The command is `python qlora.py` and no more: by default that is float32 and 1 x (1024 + 256) tokens,
    # 16 times a step. If GiB were meant, it is 5 % above the most that the plan says
    answer = original(1, 16, 1280, "a100-80gb")
    paged, sure = answer.estimate.gpu.paged_bytes, answer.verdict.confidence
    assert sure.low_bytes + paged < 60e9 < sure.high_bytes + paged
    weights = LLAMA_65B.packed + LLAMA_65B.constants + 4 * LLAMA_65B.ends  # 35.5 GB
    trained = 16 * LLAMA_65B.adapters()  # 12.8 GB: adapters, gradients and both moments, in float32
    kept = LLAMA_65B.checkpoints(1280, 4) + LLAMA_65B.wide_layer(1280) + 64 * 1280 * 1280 * 4  # 4.6 GB
    by_hand = weights + trained + kept + LLAMA_65B.dequantized(4) + CUBLAS
    assert answer.verdict.allocated_bytes + paged == pytest.approx(by_hand, rel=0.02)
    # the rest are the context and the allocator's fragments
    assert answer.verdict.process_bytes + paged == pytest.approx(60e9, rel=0.05)


# --- 70B on 24 GB -----------------------------------------------------------------------------------------------------

OFFLOADED = Strategy(world_size=2, zero_stage=3, offload="all", paged_optimizer=False)


def test_70b_on_2_x_24_gb_under_zero_3_with_offload() -> None:
    # peft's documents show 19.6 GB a GPU and 107 GB of host memory for FSDP at 2 x 2048, rank 8: another system, which
    # prefetches and keeps other things, and a monitor's figures
    model, answer = (
        LLAMA_2_70B,
        plan("llama-2-70b", recipe=Recipe(tokens_per_step=1024), strategy=OFFLOADED, gpu="rtx-3090"),
    )
    # constants are no parameters, so each rank has them all; its half of the adapters stays on the GPU
    stays = model.constants + 2 * model.adapters() + whole_adapters(model) + BUCKET + CUBLAS
    comes = live(model) + model.checkpoints(512, 2) + model.layer(512) + model.dequantized(2)
    assert answer.verdict.allocated_bytes == pytest.approx(stays + comes, rel=0.03)  # 5.4 GB
    assert answer.fits
    # on the host: the base, and of each adapter's element a master weight, two moments, a gradient and its copy; while
    # the optimizer steps, the square root of a moment and its corrected copy
    steady = model.packed + 2 * model.ends + 28 * model.adapters()
    assert answer.estimate.host.steady_bytes == pytest.approx(steady, rel=0.01)
    # each rank loads all of it there first, the last weight in 2 bytes an element beside the 14 of its quantization
    loading = 2 * (model.packed + model.constants + 2 * model.ends + 16 * model.hidden * model.inner)
    assert answer.estimate.host.load_peak_bytes == pytest.approx(loading, rel=0.01)  # 80 GB


@pytest.mark.parametrize(("host_gib", "fits"), [(64, False), (96, True)])
def test_70b_on_2_x_24_gb_needs_a_host_that_can_load_it_twice(host_gib: int, fits: bool) -> None:
    node = of_nodes("rtx-3090", 2, host_gib=host_gib)
    answer = plan("llama-2-70b", recipe=Recipe(tokens_per_step=1024), strategy=OFFLOADED, cluster=node)
    assert answer.fits is fits


def test_70b_on_2_x_24_gb_may_keep_its_halves_on_the_gpus_if_the_optimizer_is_offloaded() -> None:
    model, kept = LLAMA_2_70B, dataclasses.replace(OFFLOADED, offload="optimizer")
    answer = plan("llama-2-70b", recipe=Recipe(tokens_per_step=1024), strategy=kept, gpu="rtx-3090")
    halves = (model.packed + 2 * model.ends + 4 * model.adapters()) / 2
    stays = halves + model.constants + whole_adapters(model) + BUCKET + CUBLAS
    comes = live(model) + model.checkpoints(512, 2) + model.layer(512) + model.dequantized(2)
    assert answer.verdict.allocated_bytes == pytest.approx(stays + comes, rel=0.01)  # 23 of 25 GB
    assert answer.fits
    whole = plan(
        "llama-2-70b",
        recipe=Recipe(tokens_per_step=1024),
        strategy=dataclasses.replace(OFFLOADED, offload="none"),
        gpu="rtx-3090",
    )
    # master weights, two moments, a gradient of a half of the adapters: 6.6 GB more
    assert halves + model.constants + 16 * model.adapters() / 2 > find_gpu("rtx-3090").usable_bytes
    assert not whole.fits


def test_70b_on_one_24_gb_gpu_does_not_fit_and_what_would_be_needed_is_said() -> None:
    model, gpu = LLAMA_2_70B, find_gpu("rtx-3090")
    answer = plan("llama-2-70b", recipe=Recipe(tokens_per_step=512), strategy=Strategy(), gpu="rtx-3090")
    stays = model.packed + model.constants + 2 * model.ends + 8 * model.adapters()
    assert stays > 1.7 * gpu.usable_bytes
    assert not answer.fits
    assert answer.verdict.largest_micro_batch == answer.verdict.longest_seq_len == 0
    needed = {each.title: each for each in answer.alternatives}
    # a quarter of the packed base is 8.6 GB, and of two halves there is no room for the adapters' state
    assert (needed["more GPUs"].gpus, needed["more GPUs"].strategy.zero_stage) == (4, 3)
    assert needed["offloading"].strategy.offload == "all"
    larger = find_gpu(needed["a larger GPU"].gpu)
    assert stays < larger.usable_bytes
    assert larger.memory_bytes == 48 * GIB
    # neither a shorter sequence nor a smaller rank helps where the base alone is too large
    assert not {"shorter sequences", "a smaller rank", "8-bit optimizer state"} & set(needed)


# --- 7B on small cards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gib", [6, 8, 12])
def test_the_longest_sequence_of_7b_on_a_small_card(gib: int) -> None:
    # a card of 6 or 8 GB like the RTX 3060, which has 12: about 0.975 of it are usable (clusters/gpus.yaml)
    model, card = LLAMA_7B, of_nodes("rtx-3060", 1, usable=0.975 * gib * GIB)
    answer = plan("7b", recipe=Recipe(tokens_per_step=512, autocast=False), strategy=Strategy(), cluster=card)
    assert answer.fits
    longest = answer.verdict.longest_seq_len

    def room(tokens: int) -> float:
        """What is left by hand: while the last layer is recomputed beside all checkpoints, or the first, gradients."""
        stays = model.packed + model.constants + 2 * model.ends + 4 * model.adapters() + model.dequantized(2) + CUBLAS
        last = model.checkpoints(tokens, 2) + model.layer(tokens)
        first = 4 * model.adapters() + model.layer(tokens)
        return 0.975 * gib * GIB - find_gpu("rtx-3060").context_bytes - stays - max(last, first)

    # the hand knows no fragments: it finds room where the plan does, and still some further on, but not much
    assert room(longest) > 0
    assert room(longest * 5 // 4 + 256) < 0
    found = plan(
        "7b", recipe=Recipe(seq_len=longest, tokens_per_step=longest, autocast=False), strategy=Strategy(), cluster=card
    )
    assert found.fits
    beyond = Recipe(seq_len=longest + 1, tokens_per_step=longest + 1, autocast=False)
    assert not plan("7b", recipe=beyond, strategy=Strategy(), cluster=card).fits


# --- 33B on 24 GB, 405B on 8 x 80 GB ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", ["rtx-3090", "rtx-4090"])
def test_33b_fits_24_gb(gpu: str) -> None:
    # QLoRA, arXiv 2305.14314: 21 GB, with adapters in bfloat16, so that a 24 GB GPU is enough
    model, strategy = LLAMA_33B, Strategy(gradient_accumulation=16)
    answer = plan("33b", recipe=Recipe(autocast=False), strategy=strategy, gpu=gpu)
    stays = model.packed + model.constants + 2 * model.ends + 8 * model.adapters() + CUBLAS
    comes = model.checkpoints(512, 2) + model.layer(512) + model.dequantized(2)
    assert answer.verdict.allocated_bytes == pytest.approx(stays + comes, rel=0.01)  # 22.3 GB
    assert answer.fits
    narrow = plan("33b", recipe=Recipe(lora_dtype="bfloat16"), strategy=strategy, gpu=gpu)
    assert narrow.verdict.allocated_bytes == pytest.approx(21e9, rel=0.05)


def test_405b_on_8_x_80_gb_is_divided_and_the_host_has_to_load_it_eight_times() -> None:
    model, step = LLAMA_31_405B, Recipe(tokens_per_step=8 * 512)
    whole = plan("llama-3.1-405b", recipe=step, strategy=Strategy(world_size=8), gpu="a100-80gb")
    assert model.packed > 2 * find_gpu("a100-80gb").usable_bytes
    assert not whole.fits
    first = whole.alternatives[0]
    assert (first.title, first.gpus, first.strategy.zero_stage) == ("a higher ZeRO stage", 8, 3)
    divided = Strategy(world_size=8, zero_stage=3, paged_optimizer=False)
    # an NVIDIA DGX A100 640GB has 2 TB (its datasheet), an AWS p4de.24xlarge 1152 GiB (its instance types)
    answer = plan("llama-3.1-405b", recipe=step, strategy=divided, cluster=of_nodes("a100-80gb", 8, host_gib=2048))
    # an eighth of the weights, adapters, gradients, master weights and moments
    part = (model.packed + 2 * model.ends + (4 + 4 + 12) * model.adapters()) / 8
    stays = part + model.constants + whole_adapters(model) + BUCKET + CUBLAS
    comes = live(model) + model.checkpoints(512, 2) + model.layer(512) + model.dequantized(2)
    assert answer.verdict.allocated_bytes == pytest.approx(stays + comes, rel=0.01)  # 44 GB
    assert answer.fits
    loading = 8 * (model.packed + model.constants + 2 * model.ends + 16 * model.hidden * model.inner)
    assert answer.estimate.host.load_peak_bytes == pytest.approx(loading, rel=0.01)  # 1.8 TB
    small = of_nodes("a100-80gb", 8, host_gib=1152)
    assert not plan("llama-3.1-405b", recipe=step, strategy=divided, cluster=small).fits


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"strategy": {"zero_stage": 7, "attention": "all"}}, ["strategy.attention", "strategy.zero_stage"]),
        ({"strategy": {"micro_batch": -2, "loss": "bar"}}, ["strategy.micro_batch", "strategy.loss"]),
        ({"gpus": True, "tokens": 2.5}, ["gpus", "tokens"]),
        ({"gpu": "a100", "objective": "best", "open_fields": ["rank"]}, ["gpu", "objective", "open_fields"]),
        ({"open_fields": ["seq_len"]}, ["open_fields"]),
        ({"gpus": 3, "recipe": Recipe(), "strategy": {}}, ["strategy"]),  # 16 sequences a step are not 3
        ({"strategy": {"attention": "flash_attention_2"}}, ["strategy.attention"]),
    ],
)
def test_what_cannot_be_asked_in_python_is_refused_by_the_names_of_the_arguments(
    asked: dict[str, Any], words: list[str]
) -> None:
    strategy = {"strategy": Strategy(**asked["strategy"])} if "strategy" in asked else {}
    with pytest.raises(RequestError) as refused:
        plan("7b", **{"gpu": "t4", **asked, **strategy})
    assert [problem.where for problem in refused.value.problems] == words


def test_the_processor_of_this_host_is_a_device_in_python_too() -> None:
    answer = plan("smollm2-135m", gpu="cpu")
    assert answer.target.device.kind == "cpu"
    assert answer.verdict.process_bytes == answer.verdict.allocated_bytes, "no context, and nothing in reserve"
