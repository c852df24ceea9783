"""The GPUs of a running Ray: from what its nodes say of themselves to pools."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray._private.utils import read_ray_address

from clusters.cluster import Cluster, Pool
from clusters.errors import RequestError, plain, request_error
from clusters.gpu import Gpu, find_gpu, list_gpus
from orchestrator.ray_runtime import check_reachable, connect

TYPE_PREFIX = "accelerator_type:"
WHOLE_NAME = "geforce"
"""Ray keeps the whole product name of these (ray/_private/accelerators/nvidia_gpu.py)."""


def local_address() -> str | None:
    """The Ray that this machine belongs to: RAY_ADDRESS, else what `ray start` left if something listens there."""
    named = os.environ.get("RAY_ADDRESS")
    if named and named != "auto":
        return named
    try:
        address = read_ray_address(get_default_ray_temp_dir())
        if address:
            check_reachable(address)
    except (OSError, RequestError):  # the file outlives a Ray that was killed
        return None
    return address or None


def read(address: str) -> Cluster:
    """The cluster of the Ray at `address`.

    Raises:
        RequestError: none can be joined there, it refuses the token, or no node of it has a GPU.
    """
    connect(address, {"log_to_driver": False, "logging_level": logging.ERROR})
    try:
        nodes = ray.nodes()
    finally:
        ray.shutdown()
    return cluster_of(nodes, address)


def cluster_of(nodes: Sequence[Mapping[str, Any]], address: str) -> Cluster:
    """Pools of alike nodes, from the list of ray.nodes().

    Raises:
        RequestError: no node that is alive has a GPU.
    """
    pools: dict[tuple[str, int], Pool] = {}
    unknown: dict[str, int] = {}
    remarks: dict[str, None] = {}
    for node in nodes:
        resources = node["Resources"]
        gpus = int(resources.get("GPU", 0))
        if not node["Alive"] or not gpus:
            continue
        types = types_of(resources)
        candidates = gpus_of(types)
        if not candidates:
            reason = f"Ray calls them {' and '.join(types)}" if types else "Ray does not say what they are"
            unknown[reason] = unknown.get(reason, 0) + gpus
            continue
        gpu = candidates[0]
        if len(candidates) > 1:
            names = " or ".join(each.name for each in candidates)
            remark = f"Ray calls GPUs {' and '.join(types)}, which may be {names}: {gpu.name} is assumed, the smallest"
            remarks[remark] = None
        pool = _pool(gpu, gpus, resources)
        same = pools.get((gpu.name, gpus))
        pools[gpu.name, gpus] = pool if same is None else _with_one_more(same, pool.host_ram_bytes)
    if not pools and not unknown:
        raise request_error("cluster.address", address, "no node of that Ray has a GPU", "Give another cluster")
    return Cluster(
        name="ray",
        pools=tuple(pools.values()),
        currency=None,
        prices_as_of=None,
        source=f"Ray at {address}",
        unknown=tuple(f"{count} GPUs: {reason}" for reason, count in unknown.items()),
        remarks=tuple(remarks),
    )


def types_of(resources: Mapping[str, float]) -> list[str]:
    """What Ray calls the GPUs of a node."""
    return sorted(name.removeprefix(TYPE_PREFIX) for name in resources if name.startswith(TYPE_PREFIX))


def gpus_of(types: Sequence[str]) -> list[Gpu]:
    """What a node's GPUs may be, the smallest first; a node may have a wide and a narrow name, A100 and A100-80G."""
    sets = [_named(name) for name in types]
    return [gpu for gpu in list_gpus() if sets and all(gpu in each for each in sets)]


def _named(name: str) -> list[Gpu]:
    """The GPUs that Ray may call so: its names leave out what follows the model, as in A100 or A100-80G."""
    try:
        exact = [find_gpu(name)]
    except RequestError:
        exact = []
    if exact and name.lower().startswith(WHOLE_NAME):
        return exact
    parts = [plain(part) for part in name.split("-")]
    return exact + [gpu for gpu in list_gpus() if gpu not in exact and _begins(gpu.name.split("-"), parts)]


def _begins(of_gpu: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether a name begins with whole `parts`; a size in gigabytes may lack its B."""
    *first, last = parts
    return list(of_gpu[: len(first)]) == first and list(of_gpu[len(first) : len(parts)]) in ([last], [f"{last}b"])


def _pool(gpu: Gpu, gpus: int, resources: Mapping[str, float]) -> Pool:
    """A pool of one node."""
    # Ray offers as `memory` what was free when the node started less its object store, which is empty in a training
    # run (ray/_private/resource_and_label_spec.py, _resolve_memory_resources): together, what was free.
    ram = round(resources.get("memory", 0) + resources.get("object_store_memory", 0))
    return Pool(
        name=f"{gpu.name}-x{gpus}",
        gpu=gpu,
        gpus_per_node=gpus,
        nodes=1,
        usable_bytes=gpu.usable_bytes,
        host_ram_bytes=ram or None,
        disk_bytes=None,
        nvlink=gpu.has_nvlink_fabric,
        network_bytes_per_s=None,
        price_per_hour=None,
        spot=False,
    )


def _with_one_more(pool: Pool, ram: int | None) -> Pool:
    """`pool` with another node; of unlike memory the least."""
    least = None if pool.host_ram_bytes is None or ram is None else min(pool.host_ram_bytes, ram)
    return replace(pool, nodes=pool.nodes + 1, host_ram_bytes=least)
