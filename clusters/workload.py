"""What a run asks of a cluster that is made for it: the words of all manifests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SHARED_MEMORY_BYTES = 2 * 1024**3
"""Of a node: Ray's object store, which is empty in a training run, and what NCCL keeps in /dev/shm."""
OBJECT_STORE_BYTES = 512 * 1024**2
RAY_BYTES = 2 * 1024**3
"""Of a node: Ray's own processes, its agents and the workers that it keeps idle."""
WORKER_BYTES = 1024**3
"""Of a worker beside the plan: Python and the libraries. Without a GPU half of it was measured, ZeRO 2 included."""
CUDA_WORKER_BYTES = 3 * 1024**3
"""The same with a GPU, for what CUDA's libraries and its context take of the host; that was not measured."""
HEAD_BYTES = 8 * 1024**3
"""Of the head, where the run is driven and planned anew; no worker is there."""
HEAD_CPUS = 2
CPUS_PER_WORKER = 4
"""A worker of its own, Ray's threads, and reading ahead."""


@dataclass(frozen=True, slots=True)
class Volume:
    """Storage that all nodes see: a claim (Kubernetes) and where it is mounted."""

    claim: str
    mount: str


@dataclass(frozen=True, slots=True)
class Workload:
    """A planned run.

    Attributes:
        name: stable: that of the run and of its output folder.
        files: texts that go along, by name; `python -m launch.job` reads them.
        output: the run's folder, which all nodes see.
        metadata: what may be shown to everybody who sees the cluster.
        nodes: of workers, all alike.
        workers_per_node: processes of a node.
        gpus: whether each of them has a GPU.
        host_bytes: what the plan says the workers of a node take of its main memory.
        ray_version: of the head and the workers.
        image: a container with all that the run imports; None takes Ray's and installs `requirements`.
        requirements: pinned, as pip reads them.
        volume: what the pods share.
        secret: a Secret whose keys become the pods' environment: credentials of the Hub, of storage and trackers.
        queue: Kueue's local queue, or Slurm's partition.
        priority: Kueue's priority class, or Slurm's quality of service.
        node_labels: of the nodes that the workers are to land on.
    """

    name: str
    files: Mapping[str, str]
    output: str
    metadata: Mapping[str, str]
    nodes: int
    workers_per_node: int
    gpus: bool
    host_bytes: int
    ray_version: str
    image: str | None = None
    requirements: tuple[str, ...] = ()
    volume: Volume | None = None
    secret: str | None = None
    queue: str | None = None
    priority: str | None = None
    node_labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def node_bytes(self) -> int:
        """Main memory to ask for on a node of workers."""
        of_worker = CUDA_WORKER_BYTES if self.gpus else WORKER_BYTES
        return self.host_bytes + SHARED_MEMORY_BYTES + RAY_BYTES + of_worker * self.workers_per_node

    @property
    def node_cpus(self) -> int:
        """Cores to ask for on a node of workers."""
        return CPUS_PER_WORKER * self.workers_per_node


def nodes_for(workers: int, per_node: int) -> tuple[int, int]:
    """Alike nodes for `workers`, as few as there can be, and workers on each."""
    on_each = max(number for number in range(1, per_node + 1) if workers % number == 0)
    return workers // on_each, on_each
