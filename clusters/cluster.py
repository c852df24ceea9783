"""A cluster as planning sees it: pools of nodes that are alike, and the description of one in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clusters.errors import request_error
from clusters.gpu import GIB, Gpu, find_gpu

if TYPE_CHECKING:
    from clusters.cluster_file import ClusterForm, PoolForm

BYTES_PER_GBIT = 1000**3 // 8


@dataclass(frozen=True, slots=True)
class Pool:
    """Nodes that are alike.

    Attributes:
        name: unlike that of any other pool of the cluster.
        gpu: what every GPU of theirs is.
        gpus_per_node: of one node.
        nodes: how many may be used at most.
        usable_bytes: of one GPU, contexts of processes included; what the catalogue says unless the machine said less.
        host_ram_bytes: of one node; None where it is not stated.
        disk_bytes: of one node; None where it is not stated.
        nvlink: the GPUs of a node reach each other over NVLink; else over PCIe.
        network_bytes_per_s: of one node, one direction; None where it is not stated.
        price_per_hour: of one node, in the cluster's currency; None where it is not stated.
        spot: the nodes may be taken away at any time.
        hours: when they may be used (clusters/hours.py); None where they always may be.
        exists: somebody has these nodes; else any number of any nodes with this GPU are meant.
        node_labels: of the nodes on Kubernetes, names and values.
        partition: on Slurm.
        instance_type: of AWS.
        hosts: addresses of the machines.
        ssh_user: who logs in there.
    """

    name: str
    gpu: Gpu
    gpus_per_node: int
    nodes: int
    usable_bytes: int
    host_ram_bytes: int | None
    disk_bytes: int | None
    nvlink: bool
    network_bytes_per_s: int | None
    price_per_hour: float | None
    spot: bool
    hours: str | None = None
    exists: bool = True
    node_labels: tuple[tuple[str, str], ...] = ()
    partition: str | None = None
    instance_type: str | None = None
    hosts: tuple[str, ...] = ()
    ssh_user: str | None = None

    @property
    def gpus(self) -> int:
        """All GPUs of all nodes."""
        return self.gpus_per_node * self.nodes


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where a fine-tune may run.

    Attributes:
        name: what people call it.
        pools: none where every GPU found is unknown here.
        currency: of the prices; None where there are none.
        prices_as_of: the day the prices held, as YYYY-MM-DD.
        source: where this is from: a file's path, nvidia-smi, or the address of a Ray.
        region: of AWS; None where it is not stated.
        unknown: GPUs that were found and left out, a sentence each.
        remarks: what was assumed because the source does not say it, a sentence each.
    """

    name: str
    pools: tuple[Pool, ...]
    currency: str | None
    prices_as_of: str | None
    source: str
    unknown: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    region: str | None = None


def chosen_pool(cluster: Cluster, name: str | None) -> Pool:
    """The pool of that name; without one, the pool with the most GPUs.

    Raises:
        RequestError: there is no such pool.
    """
    pools = {pool.name: pool for pool in cluster.pools}
    if name is None:
        return max(cluster.pools, key=lambda pool: pool.gpus)
    if name not in pools:
        raise request_error("--pool", name, f"{cluster.source} has no such pool", f"Give one of {', '.join(pools)}")
    return pools[name]


def load_cluster(path: Path) -> Cluster:
    """The cluster that a YAML file describes (docs/clusters.md).

    Raises:
        RequestError: with every mistake of the file.
    """
    from clusters.cluster_file import read_forms  # here: it loads pydantic and a YAML parser

    form, pools = read_forms(path)
    return _cluster(form, pools, str(path))


def _cluster(form: ClusterForm, pools: tuple[PoolForm, ...], source: str) -> Cluster:
    return Cluster(
        name=form.name,
        pools=tuple(_pool(pool) for pool in pools),
        currency=form.currency,
        prices_as_of=form.prices_as_of.isoformat() if form.prices_as_of else None,
        source=source,
        region=form.region,
    )


def _pool(form: PoolForm) -> Pool:
    """A pool of a file, its units turned into bytes."""
    gpu = find_gpu(form.gpu)
    return Pool(
        name=form.name,
        gpu=gpu,
        gpus_per_node=form.gpus_per_node,
        nodes=form.nodes,
        usable_bytes=gpu.usable_bytes,
        host_ram_bytes=_scaled(form.host_ram_gib, GIB),
        disk_bytes=_scaled(form.disk_gib, GIB),
        nvlink=gpu.has_nvlink_fabric if form.nvlink is None else form.nvlink,
        network_bytes_per_s=_scaled(form.network_gbit_per_s, BYTES_PER_GBIT),
        price_per_hour=form.price_per_hour,
        spot=form.spot,
        hours=form.hours,
        node_labels=tuple(form.node_labels.items()),
        partition=form.partition,
        instance_type=form.instance_type,
        hosts=tuple(form.hosts),
        ssh_user=form.ssh_user,
    )


def _scaled(value: float | None, unit: int) -> int | None:
    return None if value is None else round(value * unit)
