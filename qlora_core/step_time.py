"""The time of one optimizer step, as a roofline: what is computed over what a GPU computes in a second, and so on.

A rank runs kernels one after another, so their times add up: matrix products at a share of the tensor cores' rate,
everything else at a share of the memory's bandwidth. Where kernels are over before the next are started, the processor
that starts them sets the pace. Between GPUs, rings move gradients and, under ZeRO-3, weights. What is achieved of each
rate is a range with its source (`PRODUCTS` and those after it): a step's time is an interval, never a bare number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from qlora_core.architecture import ModelArchitecture
from qlora_core.memory import bytes as exact
from qlora_core.memory.delta_net import CHUNK
from qlora_core.memory.device import Device
from qlora_core.memory.tape import value
from qlora_core.recipe import DTYPE_BYTES, Recipe
from qlora_core.strategy import Offload, Strategy
from qlora_core.work import MOVED_PER_SUM, Work, work

SLOW, TYPICAL, FAST = 0, 1, 2


class Range(NamedTuple):
    """What is achieved: at the slow end, typically, at the fast end."""

    slow: float
    typical: float
    fast: float


PRODUCTS: dict[tuple[int, int], Range] = {
    (6, 0): Range(0.5, 0.8, 0.95),
    (7, 0): Range(0.45, 0.7, 0.75),
    (7, 5): Range(0.25, 0.37, 0.65),
    (8, 0): Range(0.55, 0.8, 0.87),
    (8, 6): Range(0.5, 0.8, 1.05),
    (8, 9): Range(0.5, 0.75, 1.0),
    (9, 0): Range(0.4, 0.65, 0.8),
    (10, 0): Range(0.38, 0.6, 0.78),
    (12, 0): Range(0.5, 0.8, 1.1),
}
"""Of the dense tensor-core rate, by the newest compute capability that is not newer than the GPU's.

The fast end is the best of one large product: A100 0.87, H100 0.80, B200 0.78 (stas00/ml-engineering at 744d01e,
compute/accelerator); V100 0.71, T4 0.65, A6000 0.80, RTX 3090 1.07, L40S 0.74, RTX 4090 1.05, RTX 5090 1.15, which
pass their nominal clock (zzc0721/torch-performance-test-data at 0785868). The slow end is what whole training steps
reach, all else included: A100 0.56 to 0.68, H100 0.40 to 0.50 (mosaicml/llm-foundry at 8c8dd48, HFU), B200 0.39. A T4
sustains 0.37 under its 70 W (NVIDIA, forum thread 264462). Typical is in between, and ours."""
ATTENTION: dict[tuple[int, int], Range] = {
    (6, 0): Range(0.2, 0.35, 0.5),
    (7, 5): Range(0.15, 0.25, 0.5),
    (8, 0): Range(0.3, 0.48, 0.6),
    (9, 0): Range(0.15, 0.25, 0.33),
    (12, 0): Range(0.3, 0.48, 0.6),
}
"""Of the same rate, by fused attention, forward and backward, the half above the diagonal not counted: FlashAttention-2
at heads of 64 and 128 from 512 to 16,384 tokens reaches 88 to 189 TFLOP/s on an A100 and 141 to 328 on an H100
(Dao-AILab/flash-attention at 0251105, assets/flash2_*_fwd_bwd_benchmark.png). Others are taken to be alike."""
WIDE_PRODUCTS = Range(0.5, 0.75, 0.9)
"""Of the float32 rate of CUDA cores: ours."""
MEMORY = Range(0.74, 0.8, 0.87)
"""Of the memory's bandwidth: H100 NVL 0.78 to 0.84 (BabelStream 5.0), V100 0.87 and A100 0.75 (FastIceFlo), T4 0.75."""
DEQUANTIZING = Range(0.25, 0.4, 0.6)
"""The same, by bitsandbytes' 4-bit kernels: 0.28 on an A10G and an A100 before 0.48, from differences of LitGPT's 4-bit
and 16-bit runs; since then 1.36 to 2.07 times that on A100 and H100 (bitsandbytes pull request 1747)."""
NVLINK = Range(0.6, 0.8, 0.82)
"""Of one direction, bus bandwidth of NCCL's rings: 0.78 on 8 A100, 0.82 on 8 H200 (ml-engineering, network)."""
PCIE_RING = Range(0.1, 0.4, 0.55)
"""Of one direction, where GPUs meet over PCIe: 0.45 to 0.55 on 4 and 8 RTX 5090 (NVIDIA/nccl issue 1639); boards with
fewer lanes reach a tenth (derived from answerdotai/fsdp_qlora's two RTX 3090)."""
NETWORK = Range(0.31, 0.7, 0.8)
"""Of a node's network: 0.31 of untuned RoCE (CCI-MOC/roce-testing), 0.74 of EFA (ml-engineering, network)."""
PCIE = Range(0.6, 0.82, 0.88)
"""Of a link to the host, pinned memory: 0.82 on A100 (jdh4/della-gpu-A100), 0.88 on H200 (nvbandwidth)."""
MANAGED = Range(0.15, 0.4, 0.5)
"""The same, of managed memory: "half or worse" (bitsandbytes at 95f9af30, docs/source/explanations/optimizers.mdx)."""
STARTED_PER_SECOND = Range(40e3, 90e3, 200e3)
"""Kernels that a processor starts, Python and autograd included: 11 microseconds each in an eager Llama on a B200's
host (ml-engineering, training/performance), 5 to 25 elsewhere."""
HOST_ADAM = Range(0.5e9, 1.1e9, 4e9)
"""Elements that DeepSpeed's CPU Adam updates a second on one host: at least 1e9 (DeepSpeed issue 7474)."""
OVERLAP = Range(0.0, 0.5, 1.0)
"""Part of an exchange that is hidden behind computing: from none to all, for want of a measurement."""
READ_PER_DEQUANTIZED = 1.28
"""For each byte of a dequantized 16-bit weight: half a byte of the packed one and 0.06 of its constants for two."""


class Achieved(NamedTuple):
    """What one GPU achieves of its rates; `achieved_by` has what is assumed where nothing was measured.

    Attributes:
        products, attention: of the dense rate in the compute dtype.
        wide_products: of the float32 rate.
        memory, dequantization: of its memory's bandwidth.
        pcie: of one direction of its link to the host.
        starting: kernels that its host starts, a second.
    """

    products: Range
    attention: Range
    wide_products: Range = WIDE_PRODUCTS
    memory: Range = MEMORY
    dequantization: Range = DEQUANTIZING
    pcie: Range = PCIE
    starting: Range = STARTED_PER_SECOND


class Rates(NamedTuple):
    """What one GPU and its connections could do at best, a second.

    Attributes:
        achieved: what of that is achieved.
        flops: dense, in the compute dtype.
        wide_flops: in float32, without TF32.
        memory_bytes: of its own memory.
        pcie_bytes: to and from the host, one direction.
        link_bytes: to the other GPUs of a node, one direction; `link`: what of that is achieved.
        network_bytes: of a node to other nodes, one direction; None where nobody said.
        gpus_per_node: how many share a node.
    """

    achieved: Achieved
    flops: float
    wide_flops: float
    memory_bytes: float
    pcie_bytes: float
    link_bytes: float
    link: Range
    network_bytes: float | None
    gpus_per_node: int


class Times(NamedTuple):
    """Seconds of one optimizer step by what takes them; they add up.

    Attributes:
        products: matrix products of the base model and its head, and what of attention is products.
        adapters: products in float32 (adapters, what peft's upcast makes float32).
        attention: attention's own products.
        memory: all that other kernels read and write.
        dequantization: 4-bit weights made 16-bit ones.
        starting: what starting kernels takes beyond that.
        exchange: between GPUs, as far as computing does not hide it.
        host: to and from the host: offloading, paging, the optimizer on the host's processor.
        optimizer: clipping and the optimizer's kernels.
    """

    products: float
    adapters: float
    attention: float
    memory: float
    dequantization: float
    starting: float
    exchange: float
    host: float
    optimizer: float


class StepTime(NamedTuple):
    """One optimizer step of all ranks.

    Attributes:
        seconds: as expected; `low` and `high`: if everything is achieved at the fast and at the slow end.
        floor: seconds under the roofline: at the nominal rates, with nothing waiting for a host that starts kernels.
        parts: what the expected seconds consist of.
        tokens: of the step, over all ranks.
        correction: the factor that measured runs put to it.
        runs: how many these are.
    """

    seconds: float
    low: float
    high: float
    parts: Times
    tokens: int
    floor: float
    correction: float = 1.0
    runs: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks, as expected."""
        return self.tokens / self.seconds


class StateLoad(NamedTuple):
    """What the trainable state, and how all is divided, ask of a rank and its connections.

    Attributes:
        reduced_each: bytes of gradients that each rank puts into a ring with every micro-batch.
        reduced: bytes of gradients and trained weights that it puts into rings once a step.
        gathered: bytes of weights that ZeRO-3 gathers with every micro-batch.
        fetched: bytes that come from the host with every micro-batch.
        to_host: bytes that a step moves to and from the host.
        on_host: elements that the host's processor updates, for all ranks of a node.
        summed_bytes: bytes that adding a micro-batch's gradients to those before it moves.
        optimizer_bytes: bytes that the optimizer's kernels move.
        optimizer_kernels: how many of them there are.
    """

    reduced_each: int
    reduced: int
    gathered: int
    fetched: int
    to_host: int
    on_host: int
    summed_bytes: int
    optimizer_bytes: int
    optimizer_kernels: int


class Load(NamedTuple):
    """What a step asks of a rank and its connections, whatever the micro-batch and the sequence length.

    Attributes:
        work: of one micro-batch.
        state: all else.
    """

    work: Work
    state: StateLoad


def step_time(
    architecture: ModelArchitecture,
    recipe: Recipe,
    strategy: Strategy,
    device: Device,
    rates: Rates,
    paged_out: int = 0,
) -> StepTime:
    """The time of a step of `recipe` as `strategy` runs it; `paged_out` bytes of optimizer state find no room."""
    asked = load(architecture, recipe, strategy, device)
    counts = strategy.world_size, strategy.micro_batch, strategy.gradient_accumulation
    slow, typical, fast = (
        times(asked, *counts, recipe.seq_len, rates, pace, paged_out) for pace in (SLOW, TYPICAL, FAST)
    )
    return StepTime(
        seconds=sum(typical),
        low=sum(fast),
        high=sum(slow),
        parts=typical,
        tokens=strategy.sequences_per_step * recipe.seq_len,
        floor=sum(times(asked, *counts, recipe.seq_len, at_best(rates), FAST, round(paged_out * MANAGED[FAST]))),
    )


def at_best(rates: Rates) -> Rates:
    """A GPU of these rates that achieves all of them; what a host's processor could do at best nobody states."""
    network = None if rates.network_bytes is None else rates.network_bytes / NETWORK[FAST]
    whole, at_once = Range(1.0, 1.0, 1.0), Range(math.inf, math.inf, math.inf)
    achieved = Achieved(whole, whole, whole, whole, whole, whole, starting=at_once)
    return rates._replace(achieved=achieved, link=whole, network_bytes=network)


def load(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Load:
    """What depends neither on the length nor on the micro-batch (but for whether that is one), prepared once."""
    state = _state_load(
        architecture,
        recipe,
        device,
        strategy.world_size,
        strategy.zero_stage,
        strategy.offload,
        strategy.paged_optimizer,
    )
    return Load(work(architecture, recipe, strategy, device), state)


@lru_cache(maxsize=1024)
def _state_load(
    architecture: ModelArchitecture,
    recipe: Recipe,
    device: Device,
    world: int,
    stage: int,
    offload: Offload,
    paged_optimizer: bool,
) -> StateLoad:
    tensors = exact.trainable_tensors(architecture, recipe)
    numel = sum(size * count for size, count in tensors)
    # DeepSpeed is used without a 16-bit section: its gradients are float32 (memory/sharding.py)
    item = 4 if stage else DTYPE_BYTES[exact.trainable_dtype(recipe, device.compute_dtype)]
    part = -(-numel // world) if stage else numel
    weights = exact.weights(architecture, recipe, device.compute_dtype)
    divided = sum(size * count for size, count in (*weights.base, *weights.unquantized)) if stage == 3 else 0
    several = world > 1
    offloaded = offload != "none"
    fused = recipe.optimizer == "adamw_8bit" or paged_optimizer
    trained = DTYPE_BYTES[exact.trainable_dtype(recipe, device.compute_dtype)]
    adapters = 0 if recipe.method == "full" else numel * trained
    return StateLoad(
        reduced_each=numel * item if several and stage >= 2 else 0,
        reduced=_once(numel * item, stage) if several else 0,
        gathered=2 * (divided + adapters) if several and stage == 3 else 0,
        fetched=2 * divided // world if offload == "all" else 0,
        to_host=part * (item + 4) if offloaded else 0,
        on_host=part * device.ranks_per_host if offloaded else 0,
        summed_bytes=numel * item * MOVED_PER_SUM,
        optimizer_bytes=part * ((0 if offloaded else _optimizer_bytes(recipe, fused, item)) + CLIPPED * item),
        optimizer_kernels=sum(count for _, count in tensors) if fused and not stage else 12,
    )


CLIPPED = 3
"""How often clipping moves an element of a gradient: its norm reads it, the scaling reads and writes it."""
FOREACH = 20
"""How often torch's foreach AdamW moves an element, operator by operator, all in the dtype of the trained weight
(torch/optim/adamw.py, _multi_tensor_adamw: decay 2, lerp 3, mul 2, addcmul 3, sqrt 2, div 2, add 2, addcdiv 4)."""


def _optimizer_bytes(recipe: Recipe, fused: bool, item: int) -> int:
    """Bytes that AdamW's kernels move for an element of `item` bytes.

    bitsandbytes' read weight and gradient, write the weight, and read and write two moments of one byte or of four.
    """
    if not fused:
        return FOREACH * item
    return 3 * item + 4 * (1 if recipe.optimizer == "adamw_8bit" else 4)


def _once(size: int, stage: int) -> int:
    """Bytes put into rings once a step: an all-reduce is a reduce-scatter and an all-gather."""
    return {0: 2 * size, 1: 2 * size, 2: size, 3: 0}[stage]


def times(
    asked: Load,
    world: int,
    micro_batch: int,
    micro_batches: int,
    seq_len: int,
    rates: Rates,
    pace: int,
    paged_out: int = 0,
) -> Times:
    """Seconds of one optimizer step, of so many `micro_batches`, at one end of what is achieved, or typically."""
    tokens = micro_batch * seq_len
    done, state = asked
    achieved = rates.achieved
    tensor_cores = rates.flops * achieved.products[pace]
    wide = rates.wide_flops * achieved.wide_products[pace]
    moving = rates.memory_bytes * achieved.memory[pace]
    variables = (1, seq_len, tokens, tokens * seq_len, 0)
    products = max((done.products * tokens + done.fixed) / tensor_cores, value(done.product_bytes, variables) / moving)
    adapters = (done.wide_products * tokens + done.wide_fixed) / wide
    attention = done.attention * tokens * seq_len
    if done.wide_attention:
        attention /= wide
    else:
        attention /= rates.flops * achieved.attention[pace] if done.fused else tensor_cores
    memory = value(done.moved, variables) / moving
    dequantizing = READ_PER_DEQUANTIZED * done.dequantized / (rates.memory_bytes * achieved.dequantization[pace])
    running = products + adapters + attention + memory + dequantizing
    kernels = done.kernels + done.chunk_kernels * math.ceil(seq_len / CHUNK)
    starting = max(kernels / achieved.starting[pace] - running, 0.0)
    summing = (micro_batches - 1) * state.summed_bytes / moving
    computing = micro_batches * (running + starting) + summing

    exchange = ring_seconds(world, rates, pace) * (
        micro_batches * (state.reduced_each + state.gathered) + state.reduced
    )
    exchange -= OVERLAP[pace] * min(exchange, computing)

    pcie = rates.pcie_bytes * achieved.pcie[pace]
    fetched = micro_batches * state.fetched / pcie
    fetched -= OVERLAP[pace] * min(fetched, computing)
    host = fetched + state.to_host / pcie + state.on_host / HOST_ADAM[pace]
    host += 2 * paged_out / (rates.pcie_bytes * MANAGED[pace])
    optimizer = max(state.optimizer_bytes / moving, state.optimizer_kernels / achieved.starting[pace])
    return Times(
        micro_batches * products,
        micro_batches * adapters,
        micro_batches * attention,
        micro_batches * memory + summing,
        micro_batches * dequantizing,
        micro_batches * starting,
        exchange,
        host,
        optimizer,
    )


def achieved_by(capability: tuple[int, int]) -> Achieved:
    """What a GPU of that compute capability is taken to achieve where it was not measured."""
    return Achieved(by_capability(PRODUCTS, capability), by_capability(ATTENTION, capability))


def by_capability(known: Mapping[tuple[int, int], Range], capability: tuple[int, int]) -> Range:
    """What is known of the newest compute capability that is not newer than `capability`; else of the oldest."""
    return known[max((each for each in known if each <= capability), default=min(known))]


def ring_seconds(world: int, rates: Rates, pace: int) -> float:
    """Seconds for each byte that every rank puts into a ring: (n - 1) / n of it passes each connection.

    Inside a node over its links; between nodes over the network, which all GPUs of a node share and each byte passes
    once. Both work at the same time, so the slower one counts.
    """
    if world == 1:
        return 0.0
    inside = min(world, rates.gpus_per_node)
    nodes = -(-world // rates.gpus_per_node)
    seconds = (inside - 1) / inside / (rates.link_bytes * rates.link[pace])
    if nodes > 1:
        network = rates.network_bytes or UNSTATED_NETWORK
        seconds = max(seconds, (nodes - 1) / nodes / (network * NETWORK[pace]))
    return seconds


UNSTATED_NETWORK = 1.25e9
"""Of a node whose network nobody stated: 10 Gbit/s, what a plain server has."""
