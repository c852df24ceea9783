"""The devices of a machine as a run finds them: what a worker there would compute on."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from typing import Literal

import psutil

from clusters.cluster import Pool
from clusters.errors import RequestError
from clusters.gpu import find_gpu
from orchestrator.devices import any_nodes, as_dtype, compute_dtype, cpu_target, pool_target
from orchestrator.plans import Target
from qlora_core.memory.device import Device

UNKNOWN_CONTEXT_BYTES = 512 * 1024**2
"""A worker's CUDA context on a GPU that is not in clusters/gpus.yaml: the default there."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What one node offers, or the nodes of a pool together.

    Attributes:
        devices: GPUs, or 1 for the CPU.
        memory_bytes: of the fullest GPU as the driver reports it free, or the host's available memory.
        has_bfloat16: whether the CPU multiplies bfloat16: it has AMX or AVX512-BF16.
        accelerator_type: what Ray calls its GPUs, where workers must not get others.
        has_liger: liger-kernel is installed there.
        gpus_per_node, host_ram_bytes, network_bytes_per_s, nvlink: as of a `Pool`, where the nodes of one are meant;
            None where nobody said, as of a machine that describes itself.
        node_hour_price: what one of these nodes costs for an hour, in `currency`; None where nobody said.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    devices: int
    memory_bytes: int
    compute_capability: tuple[int, int] = (0, 0)
    has_bfloat16: bool = False
    accelerator_type: str | None = None
    has_liger: bool = False
    gpus_per_node: int | None = None
    host_ram_bytes: int | None = None
    network_bytes_per_s: int | None = None
    nvlink: bool | None = None
    node_hour_price: float | None = None
    currency: str | None = None


def machine_of_pool(pool: Pool, accelerator_type: str | None = None, currency: str | None = None) -> Machine:
    """What the nodes of a pool offer, all together; its price is in `currency`."""
    return Machine(
        kind="cuda",
        name=pool.gpu.name,
        devices=pool.gpus,
        memory_bytes=pool.usable_bytes,
        compute_capability=pool.gpu.compute_capability,
        accelerator_type=accelerator_type,
        gpus_per_node=pool.gpus_per_node,
        host_ram_bytes=pool.host_ram_bytes,
        network_bytes_per_s=pool.network_bytes_per_s,
        nvlink=pool.nvlink,
        node_hour_price=pool.price_per_hour,
        currency=currency,
    )


def describe() -> Machine:
    """The machine that this process runs on."""
    import torch  # here: who asks a cluster instead does without

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        free = min(torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count()))
        return Machine(
            kind="cuda",
            name=properties.name,
            devices=torch.cuda.device_count(),
            memory_bytes=free,
            compute_capability=(properties.major, properties.minor),
            has_liger=importlib.util.find_spec("liger_kernel") is not None,
        )
    return Machine(
        kind="cpu",
        name=f"CPU with {os.cpu_count()} cores",
        devices=1,
        memory_bytes=psutil.virtual_memory().available,
        has_bfloat16=torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported(),
    )


def target_of(machine: Machine, requested_dtype: str, workers: int) -> Target:
    """The target of a plan for `workers` on this machine; on a CPU they share its memory."""
    if machine.kind == "cpu":
        return cpu_target(requested_dtype, workers, machine.memory_bytes, machine.has_bfloat16)
    try:
        pool = nodes_of(machine)
    except RequestError:  # its memory is known all the same, and nothing else of it
        choice = compute_dtype(requested_dtype, "cuda", machine.compute_capability)
        device = Device(
            kind="cuda",
            compute_dtype=as_dtype(choice.value),
            context_bytes=UNKNOWN_CONTEXT_BYTES,
            compute_capability=machine.compute_capability,
            ranks_per_host=workers,
        )
        target = Target(machine.name, device, machine.memory_bytes, choice)
    else:
        target = pool_target(pool, requested_dtype, workers)
    return replace(target, has_liger=machine.has_liger)


def nodes_of(machine: Machine) -> Pool:
    """The nodes of a machine's GPUs, called like these: as they were described, else as many as would hold them.

    Raises:
        RequestError: its GPU is not in the catalogue.
    """
    pool = replace(any_nodes(find_gpu(machine.name), machine.devices), usable_bytes=machine.memory_bytes)
    if machine.gpus_per_node is None:
        return pool
    return replace(
        pool,
        gpus_per_node=machine.gpus_per_node,
        nodes=machine.devices // machine.gpus_per_node,
        host_ram_bytes=machine.host_ram_bytes,
        network_bytes_per_s=machine.network_bytes_per_s,
        price_per_hour=machine.node_hour_price,
        nvlink=pool.nvlink if machine.nvlink is None else machine.nvlink,
        exists=True,
    )
