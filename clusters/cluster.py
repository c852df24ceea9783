"""stub"""

from __future__ import annotations

from dataclasses import dataclass

from clusters.gpu import Gpu


@dataclass(frozen=True, slots=True)
class Pool:
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

    @property
    def gpus(self) -> int:
        return self.gpus_per_node * self.nodes


@dataclass(frozen=True, slots=True)
class Cluster:
    name: str
    pools: tuple[Pool, ...]
    currency: str | None
    prices_as_of: str | None
    source: str
    unknown: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
