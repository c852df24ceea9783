"""The time of one optimizer step, as a roofline: what is computed over what a GPU computes in a second, and so on.

A rank runs kernels one after another, so their times add up: matrix products at a share of the tensor cores' rate,
everything else at a share of the memory's bandwidth. Where kernels are over before the next are started, the processor
that starts them sets the pace. Between GPUs, rings move gradients and, under ZeRO-3, weights. What is achieved of each
rate is a range with its source (`ACHIEVED`): a step's time is an interval, never a bare number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from qlora_core.architecture import ModelArchitecture
from qlora_core.memory import bytes as exact
from qlora_core.memory.device import Device
from qlora_core.memory.tape import Size, value
from qlora_core.recipe import DTYPE_BYTES, Recipe
from qlora_core.strategy import Strategy
from qlora_core.work import Work, work

Pace = Literal[0, 1, 2]
SLOW, TYPICAL, FAST = 0, 1, 2


class Range(NamedTuple):
    """What is achieved: at the slow end, typically, at the fast end."""

    slow: float
    typical: float
    fast: float


ACHIEVED = {
    "products": Range(0.45, 0.65, 0.85),
    "wide_products": Range(0.5, 0.75, 0.9),
    "attention": Range(0.2, 0.4, 0.6),
    "memory": Range(0.6, 0.8, 0.92),
    "link": Range(0.4, 0.65, 0.85),
    "network": Range(0.4, 0.7, 0.9),
    "pcie": Range(0.4, 0.7, 0.9),
    "managed": Range(0.15, 0.4, 0.8),
    "overlap": Range(0.0, 0.5, 1.0),
}
"""Shares of each rate, and of the exchange between GPUs that is hidden behind computing."""
STARTED_PER_SECOND = Range(60e3, 110e3, 200e3)
"""Kernels that a processor starts, Python and autograd included."""
HOST_ADAM_ELEMENTS_PER_SECOND = Range(0.3e9, 1e9, 2e9)
"""Elements that DeepSpeed's CPU Adam updates on one host."""
READ_PER_WRITTEN = 2
"""Bytes moved for each one that is written: a kernel reads about what it writes."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one GPU and its connections could do at best, a second.

    Attributes:
        flops: dense, in the compute dtype.
        wide_flops: in float32, without TF32.
        memory_bytes: of its own memory.
        pcie_bytes: to and from the host, one direction.
        link_bytes: to the other GPUs of a node, one direction.
        network_bytes: of a node to other nodes, one direction; None where nobody said.
        gpus_per_node: how many share a node.
    """

    flops: float
    wide_flops: float
    memory_bytes: float
    pcie_bytes: float
    link_bytes: float
    network_bytes: float | None
    gpus_per_node: int


class Times(NamedTuple):
    """Seconds of one optimizer step by what takes them; they add up.

    Attributes:
        products: matrix products of the base model and its head, and what of attention is products.
        adapters: products in float32 (adapters, what peft's upcast makes float32).
        attention: attention's own products.
        memory: all that kernels read and write, dequantization among it.
        starting: what starting kernels takes beyond that.
        exchange: between GPUs, as far as computing does not hide it.
        host: to and from the host: offloading, paging, the optimizer on the host's processor.
        optimizer: clipping and the optimizer's kernels.
    """

    products: float
    adapters: float
    attention: float
    memory: float
    starting: float
    exchange: float
    host: float
    optimizer: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """One optimizer step of all ranks.

    Attributes:
        seconds: as expected; `low` and `high`: if everything is achieved at the fast and at the slow end.
        parts: what the expected seconds consist of.
        tokens: of the step, over all ranks.
    """

    seconds: float
    low: float
    high: float
    parts: Times
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks, as expected."""
        return self.tokens / self.seconds


class Load(NamedTuple):
    """What a step asks of a rank and its connections, whatever the micro-batch and the sequence length.

    Attributes:
        work: of one micro-batch.
        reduced_each: bytes of gradients that each rank puts into a ring with every micro-batch.
        reduced: bytes of gradients and trained weights that it puts into rings once a step.
        gathered: bytes of weights that ZeRO-3 gathers with every micro-batch.
        fetched: bytes that come from the host with every micro-batch.
        to_host: bytes that a step moves to and from the host.
        on_host: elements that the host's processor updates, for all ranks of a node.
        optimizer_bytes: bytes that the optimizer's kernels move.
        optimizer_kernels: how many of them there are.
    """

    work: Work
    reduced_each: int
    reduced: int
    gathered: int
    fetched: int
    to_host: int
    on_host: int
    optimizer_bytes: int
    optimizer_kernels: int


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
    slow, typical, fast = (
        times(asked, strategy, recipe.seq_len, rates, pace, paged_out) for pace in (SLOW, TYPICAL, FAST)
    )
    return StepTime(
        seconds=sum(typical),
        low=sum(fast),
        high=sum(slow),
        parts=typical,
        tokens=strategy.sequences_per_step * recipe.seq_len,
    )


def load(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Load:
    """What depends neither on the length nor on the micro-batch (but for whether that is one), prepared once."""
    alike = replace(
        strategy, micro_batch=min(strategy.micro_batch, 2), gradient_accumulation=1, world_size=strategy.world_size
    )
    return _load(architecture, recipe, alike, device)


@lru_cache(maxsize=1024)
def _load(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Load:
    stage, world = strategy.zero_stage, strategy.world_size
    tensors = exact.trainable_tensors(architecture, recipe)
    numel = sum(size * count for size, count in tensors)
    # DeepSpeed is used without a 16-bit section: its gradients are float32 (memory/sharding.py)
    item = 4 if stage else DTYPE_BYTES[exact.trainable_dtype(recipe, device.compute_dtype)]
    part = -(-numel // world) if stage else numel
    weights = exact.weights(architecture, recipe, device.compute_dtype)
    divided = sum(size * count for size, count in (*weights.base, *weights.unquantized)) if stage == 3 else 0
    several = world > 1
    offloaded = strategy.offload != "none"
    fused = recipe.optimizer == "adamw_8bit" or strategy.paged_optimizer
    of_element = (16 if recipe.optimizer == "adamw_8bit" else 28) if fused else FOREACH_BYTES
    return Load(
        work=work(architecture, recipe, strategy, device),
        reduced_each=numel * item if several and stage >= 2 else 0,
        reduced=_once(numel * item, stage) if several else 0,
        gathered=2 * (divided + numel * item) if several and stage == 3 else 0,
        fetched=2 * divided // world if strategy.offload == "all" else 0,
        to_host=part * (item + 4) if offloaded else 0,
        on_host=part * device.ranks_per_host if offloaded else 0,
        optimizer_bytes=part * ((0 if offloaded else of_element) + CLIPPING_BYTES),
        optimizer_kernels=sum(count for _, count in tensors) if fused and not stage else 12,
    )


FOREACH_BYTES = 80
"""What torch's foreach AdamW moves for a float32 element, operator by operator (torch/optim/adamw.py,
_multi_tensor_adamw: decay 8, lerp 12, mul 8, addcmul 12, sqrt 8, div 8, add 8, addcdiv 16)."""
CLIPPING_BYTES = 12
"""Of a float32 element: its norm reads it, the scaling reads and writes it."""


def _once(size: int, stage: int) -> int:
    """Bytes put into rings once a step: an all-reduce is a reduce-scatter and an all-gather."""
    return {0: 2 * size, 1: 2 * size, 2: size, 3: 0}[stage]


def times(
    asked: Load, strategy: Strategy, seq_len: int, rates: Rates, pace: int, paged_out: int = 0
) -> Times:
    """Seconds of one optimizer step at one end of what is achieved, or typically."""
    micro_batches = strategy.gradient_accumulation
    tokens = strategy.micro_batch * seq_len
    done = asked.work
    share = SHARES[pace]
    products = done.products * tokens / (rates.flops * share.products)
    adapters = done.wide_products * tokens / (rates.wide_flops * share.wide_products)
    attention = done.attention * tokens * seq_len
    attention /= (rates.wide_flops if done.wide_attention else rates.flops) * share.attention
    moved = READ_PER_WRITTEN * value(done.written, (1, seq_len, tokens, tokens * seq_len, 0))
    memory = moved / (rates.memory_bytes * share.memory)
    running = products + adapters + attention + memory
    starting = max(done.kernels / share.started_per_second - running, 0.0)
    computing = micro_batches * (running + starting)

    ring = _ring_seconds(strategy.world_size, rates, share)
    exchange = ring * (micro_batches * (asked.reduced_each + asked.gathered) + asked.reduced)
    exchange -= share.overlap * min(exchange, computing)

    fetched = micro_batches * asked.fetched / (rates.pcie_bytes * share.pcie)
    fetched -= share.overlap * min(fetched, computing)
    host = fetched + asked.to_host / (rates.pcie_bytes * share.pcie) + asked.on_host / share.host_adam
    host += 2 * paged_out / (rates.pcie_bytes * share.managed)
    optimizer = asked.optimizer_bytes / (rates.memory_bytes * share.memory)
    optimizer = max(optimizer, asked.optimizer_kernels / share.started_per_second)
    return Times(
        micro_batches * products,
        micro_batches * adapters,
        micro_batches * attention,
        micro_batches * memory,
        micro_batches * starting,
        exchange,
        host,
        optimizer,
    )


class Shares(NamedTuple):
    """What is achieved, at one pace."""

    products: float
    wide_products: float
    attention: float
    memory: float
    link: float
    network: float
    pcie: float
    managed: float
    overlap: float
    started_per_second: float
    host_adam: float


SHARES = tuple(
    Shares(
        **{name: achieved[pace] for name, achieved in ACHIEVED.items()},
        started_per_second=STARTED_PER_SECOND[pace],
        host_adam=HOST_ADAM_ELEMENTS_PER_SECOND[pace],
    )
    for pace in (SLOW, TYPICAL, FAST)
)


def _ring_seconds(world: int, rates: Rates, share: Shares) -> float:
    """Seconds for each byte that every rank puts into a ring: (n - 1) / n of it passes each connection.

    Inside a node over its links; between nodes over the network, which all GPUs of a node share and each byte passes
    once. Both work at the same time, so the slower one counts.
    """
    if world == 1:
        return 0.0
    inside = min(world, rates.gpus_per_node)
    nodes = -(-world // rates.gpus_per_node)
    seconds = (inside - 1) / inside / (rates.link_bytes * share.link)
    if nodes > 1:
        network = rates.network_bytes or UNSTATED_NETWORK
        seconds = max(seconds, (nodes - 1) / nodes / (network * share.network))
    return seconds


UNSTATED_NETWORK = 1.25e9
"""Of a node whose network nobody stated: 10 Gbit/s, what a plain server has."""
