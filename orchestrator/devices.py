"""The devices that a plan can be held against: GPUs of the catalogue, GPUs of a cluster, a host's processor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clusters.cluster import Pool
from clusters.gpu import Gpu, list_gpus
from orchestrator.plans import Choice, Target
from qlora_core.memory.device import STACKS, Device, Stack
from qlora_core.recipe import Dtype
from qlora_core.step_time import NVLINK, PCIE_RING, TYPICAL, Achieved, Range, Rates, achieved_by

NODE_GPUS = 8
"""GPUs of a node where only their kind is known: boards and cloud instances have up to 8."""
ON_A_CORE = Range(0.1, 0.35, 0.9)
"""What of a processor's nominal rates is achieved: ours."""
CORE_FLOPS = 64e9
CORE_BYTES_PER_S = 10e9
"""A core's float32 rate, 2 GHz x two AVX2 units x 8 lanes x 2, and its share of a server's memory bandwidth: nominal,
so that strategies can be compared on a CPU and a ledger has something to correct."""


def compute_dtype(requested: str, kind: str, capability: tuple[int, int], has_bfloat16: bool = False) -> Choice:
    """The dtype of activations and dequantized weights, with its reason."""
    if requested != "auto":
        reason = "asked for"
        if requested == "bfloat16" and kind == "cuda" and capability < (8, 0):
            reason = f"asked for, though compute capability {capability[0]}.{capability[1]} only emulates it"
        return Choice("compute_dtype", requested, reason)
    if kind == "cpu":
        if has_bfloat16:
            reason = "this CPU multiplies it faster, by AMX or AVX512-BF16; attention rounds its scores to it, too"
            return Choice("compute_dtype", "bfloat16", reason)
        reason = "a CPU without AMX and AVX512-BF16 computes about 1.5 times faster in it than in bfloat16"
        return Choice("compute_dtype", "float32", reason)
    if capability >= (8, 0):
        return Choice("compute_dtype", "bfloat16", "the GPU has bfloat16 (Ampere and later)")
    return Choice("compute_dtype", "float16", "the GPU is older than Ampere and has no bfloat16")


def as_dtype(value: str) -> Dtype:
    """`value` as one of the dtypes that a recipe knows."""
    known: dict[str, Dtype] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
    return known[value]


def gpu_target(gpu: Gpu, requested_dtype: str, ranks_per_host: int = 1) -> Target:
    """A GPU of the catalogue as the target of a plan, in nodes of which nothing else is known."""
    return pool_target(any_nodes(gpu), requested_dtype, ranks_per_host)


def any_nodes(gpu: Gpu, gpus: int = NODE_GPUS) -> Pool:
    """Nodes of a GPU of which nothing but the kind and the number is known."""
    return Pool(
        name=gpu.name,
        gpu=gpu,
        gpus_per_node=min(gpus, NODE_GPUS),
        nodes=-(-gpus // NODE_GPUS),
        usable_bytes=gpu.usable_bytes,
        host_ram_bytes=None,
        disk_bytes=None,
        nvlink=gpu.has_nvlink_fabric,
        network_bytes_per_s=None,
        price_per_hour=None,
        spot=False,
        exists=False,
    )


def pool_target(pool: Pool, requested_dtype: str, ranks: int = 1) -> Target:
    """A GPU of a pool as the target of a plan with `ranks` workers in it; it is called like the pool."""
    gpu = pool.gpu
    choice = compute_dtype(requested_dtype, "cuda", gpu.compute_capability)
    device = Device(
        kind="cuda",
        compute_dtype=as_dtype(choice.value),
        context_bytes=gpu.context_bytes,
        compute_capability=gpu.compute_capability,
        ranks_per_host=min(ranks, pool.gpus_per_node),
    )
    return Target(pool.name, device, pool.usable_bytes, choice, pool)


def on_stack(target: Target, stack: Stack) -> Target:
    """`target` where that stack's loop trains, and not ours."""
    return replace(target, stack=stack, device=replace(target.device, **STACKS[stack]))


def cpu_target(requested_dtype: str, workers: int, memory_bytes: int, has_bfloat16: bool = False) -> Target:
    """A host's CPU as the target of a plan: `workers` processes share its free memory."""
    choice = compute_dtype(requested_dtype, "cpu", (0, 0), has_bfloat16)
    device = Device(kind="cpu", compute_dtype=as_dtype(choice.value), ranks_per_host=workers)
    return Target("cpu", device, memory_bytes // workers, choice)


def is_cpu(name: str | None) -> bool:
    """Whether a host's processor is meant where a GPU may be named."""
    return name is not None and name.strip().lower() == "cpu"


def this_cpu(requested_dtype: str, workers: int) -> Target:
    """That of the host this runs on."""
    import psutil  # only where the CPU is asked for: it costs the start of every other plan

    return cpu_target(requested_dtype, workers, psutil.virtual_memory().available, _has_bfloat16())


def _has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16; only Linux says so without asking the processor."""
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in known or "avx512_bf16" in known


def rates(target: Target) -> Rates:
    """What a device and its connections could do at best."""
    if target.device.kind == "cpu":
        import os  # a GPU's plan does without

        cores = max(1, (os.cpu_count() or 1) // target.device.ranks_per_host)
        flops, moved = CORE_FLOPS * cores, CORE_BYTES_PER_S * cores
        achieved = Achieved(ON_A_CORE, ON_A_CORE)
        return Rates(achieved, flops, flops, moved, moved, moved, ON_A_CORE, None, NODE_GPUS)
    pool = target.pool or like(target.device)
    gpu = pool.gpu
    known = {"float16": gpu.fp16_flops, "bfloat16": gpu.bf16_flops, "float32": gpu.fp32_flops}
    return Rates(
        achieved=achieved_by(gpu.compute_capability)._replace(**{name: Range(*share) for name, share in gpu.achieved}),
        flops=known[target.compute_dtype] or gpu.fp32_flops,  # bfloat16 without hardware for it is computed in float32
        wide_flops=gpu.fp32_flops,
        memory_bytes=gpu.bandwidth_bytes_per_s,
        pcie_bytes=gpu.pcie_bytes_per_s,
        link_bytes=gpu.nvlink_bytes_per_s / 2 if pool.nvlink else gpu.pcie_bytes_per_s,
        link=NVLINK if pool.nvlink else PCIE_RING,
        network_bytes=pool.network_bytes_per_s,
        gpus_per_node=pool.gpus_per_node,
    )


def like(device: Device) -> Pool:
    """The catalogue's GPU nearest to one that it does not know: for the order of candidates, not for a time."""
    older = [gpu for gpu in list_gpus() if gpu.compute_capability <= device.compute_capability]
    return any_nodes(max(older or list_gpus(), key=lambda gpu: gpu.compute_capability))


def slowest_links(every: Sequence[Rates]) -> Sequence[Rates]:
    """The rates of GPUs in one group: where they are of several pools, each ring waits for the slowest connection."""
    if len(every) == 1:
        return every
    slowest = min(every, key=lambda each: each.link_bytes * each.link[TYPICAL])
    networks = [each.network_bytes for each in every if each.network_bytes is not None]
    return [
        each._replace(
            link_bytes=slowest.link_bytes,
            link=slowest.link,
            network_bytes=min(networks) if networks else None,
            gpus_per_node=min(one.gpus_per_node for one in every),
        )
        for each in every
    ]
