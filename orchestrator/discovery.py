"""The cluster that is meant where none is described: a file of one, a Ray that runs, the GPUs of this machine."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from clusters.cluster import Cluster, Pool, load_cluster
from clusters.errors import RequestError, not_installed, request_error
from clusters.gpu import MIB, Gpu, find_gpu

FLAG = "--cluster"
AUTO = "auto"
FORMS = "Give a description's file (docs/clusters.md), HOST:PORT of a Ray that runs, or auto"
SMI_SECONDS = 20.0
"""nvidia-smi answers in a second or two; without the persistence mode it first wakes every GPU."""

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\\]+):\d+")


def find_cluster(text: str) -> Cluster:
    """The cluster that a person means; it has one pool or more.

    Args:
        text: a description's file, HOST:PORT of a running Ray, or auto: the Ray that this machine belongs to
            (RAY_ADDRESS, else the address that `ray start` left), or without one this machine's GPUs.

    Raises:
        RequestError: the file has mistakes, no Ray can be joined there, or nothing with a known GPU is found.
    """
    if text == AUTO:
        return _automatic()
    if is_address(text):
        return running_ray(text)
    if not os.path.exists(text):
        raise request_error(FLAG, text, "there is no such file", FORMS)
    return load_cluster(Path(text))


def is_address(text: str) -> bool:
    """Whether `find_cluster` takes it for HOST:PORT of a running Ray."""
    return bool(_ADDRESS.fullmatch(text)) and not os.path.exists(text)


def running_ray(address: str) -> Cluster:
    """The GPUs of a running Ray's nodes.

    Args:
        address: its HOST:PORT, or auto for the one that this machine belongs to.

    Raises:
        RequestError: Ray is not installed, none can be joined there, it refuses the token, or it has no known GPU.
    """
    if importlib.util.find_spec("ray") is None:
        raise not_installed(FLAG, address, ["ray"])
    from orchestrator import ray_nodes  # here: it loads Ray

    try:
        where = ray_nodes.local_address() if address == AUTO else address
        if where is None:
            raise request_error(FLAG, address, "no Ray runs on this machine", "Start one, or give its HOST:PORT")
        return _with_pools(ray_nodes.read(where))
    except RequestError as error:
        raise error.at(FLAG) from None


def this_machine() -> Cluster | None:
    """The NVIDIA GPUs of this host, with the memory that is free on them now; None where nvidia-smi shows none.

    It heeds CUDA_VISIBLE_DEVICES. A GPU that is not in the catalogue is left out and named in `unknown`.
    """
    seen, _ = _ask_nvidia_smi()
    return _cluster_of(seen) if seen else None


def _automatic() -> Cluster:
    """See `find_cluster`: a Ray that is named and does not answer is an error, one that has ended is none."""
    installed = importlib.util.find_spec("ray") is not None
    if installed or os.environ.get("RAY_ADDRESS"):
        if not installed:
            raise not_installed(FLAG, f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}", ["ray"])
        from orchestrator import ray_nodes  # here: it loads Ray

        if ray_nodes.local_address() is not None:
            return running_ray(AUTO)
    seen, complaint = _ask_nvidia_smi()
    if seen:
        return _with_pools(_cluster_of(seen))
    rays = "no Ray runs here" if installed else "Ray is not installed"
    raise request_error(FLAG, AUTO, f"it found no GPU: {rays}, and {complaint}", FORMS)


def _with_pools(cluster: Cluster) -> Cluster:
    """`cluster`, unless nothing of it can be planned for."""
    if not cluster.pools:
        what = "; ".join(cluster.unknown) or "it has no GPU"
        raise request_error(FLAG, cluster.source, f"no GPU known here was found: {what}", FORMS)
    return cluster


@dataclass(frozen=True, slots=True)
class SeenGpu:
    """A line of nvidia-smi.

    Attributes:
        free_bytes: None where it does not tell, as on systems whose GPU shares the host's memory.
    """

    name: str
    total_bytes: int | None
    free_bytes: int | None
    compute_capability: str


def _ask_nvidia_smi() -> tuple[list[SeenGpu], str]:
    """The GPUs that nvidia-smi shows and, where it shows none, why, as half a sentence."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "there is no nvidia-smi on PATH"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and not re.match(r"\d|GPU-", visible):
        return [], f"CUDA_VISIBLE_DEVICES={visible} names no whole GPU"
    query = "--query-gpu=name,memory.total,memory.free,compute_cap"
    command = [program, query, "--format=csv,noheader,nounits", *([f"--id={visible}"] if visible else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer within {SMI_SECONDS:.0f} s"
    except OSError as error:
        return [], f"nvidia-smi cannot be run: {error.strerror or error}"
    seen = parse_nvidia_smi(done.stdout) if done.returncode == 0 else []
    said = " ".join((done.stdout + done.stderr).split())[:300]
    return seen, f"nvidia-smi shows none{f' ({said})' if said else ''}"


def parse_nvidia_smi(text: str) -> list[SeenGpu]:
    """The lines of ``name, memory.total, memory.free, compute_cap`` in MiB; others, such as warnings, are left out."""
    rows = (row for row in csv.reader(text.splitlines(), skipinitialspace=True) if len(row) == 4)
    return [SeenGpu(name, _mib(total), _mib(free), capability) for name, total, free, capability in rows]


def _mib(text: str) -> int | None:
    """Bytes of a number of MiB; None for "[N/A]" and the like."""
    return int(text) * MIB if re.fullmatch(r"\d{1,9}", text.strip()) else None


def _cluster_of(seen: list[SeenGpu]) -> Cluster:
    """One node, or where it has GPUs of several kinds, a pool for each kind."""
    import psutil  # here: a plan without --cluster does not load it

    pools: dict[str, Pool] = {}
    unknown: dict[str, int] = {}
    ram = psutil.virtual_memory().total
    for one in seen:
        try:
            gpu = find_gpu(one.name)
        except RequestError as error:
            reason = f"{one.name} (compute capability {one.compute_capability}): {error.problems[0].remedy}"
            unknown[reason] = unknown.get(reason, 0) + 1
            continue
        usable = min(gpu.usable_bytes, gpu.usable_bytes if one.free_bytes is None else one.free_bytes)
        pool = pools.get(gpu.name)
        pools[gpu.name] = (
            _pool_here(gpu, one.name, usable, ram)
            if pool is None
            else replace(pool, gpus_per_node=pool.gpus_per_node + 1, usable_bytes=min(pool.usable_bytes, usable))
        )
    return Cluster(
        name="this-machine",
        pools=tuple(pools.values()),
        currency=None,
        prices_as_of=None,
        source="nvidia-smi",
        unknown=tuple(f"{count} x {reason}" for reason, count in unknown.items()),
    )


def _pool_here(gpu: Gpu, shown_name: str, usable_bytes: int, ram: int) -> Pool:
    """A pool of one GPU of this machine."""
    return Pool(
        name=gpu.name,
        gpu=gpu,
        gpus_per_node=1,
        nodes=1,
        usable_bytes=usable_bytes,
        host_ram_bytes=ram,
        disk_bytes=None,
        # The catalogue has one row for the SXM board and the PCIe card of an A100 or V100; only the board has a fabric.
        nvlink=gpu.has_nvlink_fabric and "pcie" not in shown_name.lower(),
        network_bytes_per_s=None,
        price_per_hour=None,
        spot=False,
    )
