"""A run as a manifest: for KubeRay, Slurm or Ray's cluster launcher; no cluster is contacted."""

from __future__ import annotations

import dataclasses
import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from clusters import kuberay, ray_launcher, slurm
from clusters.cluster import Cluster, Pool, chosen_pool, load_cluster
from clusters.errors import Problem, RequestError, request_error
from clusters.gpu import GIB
from clusters.workload import Volume, Workload, nodes_for
from launch import jobs
from launch.report.words import gib
from launch.travel import JobOrder, fields_of, texts_of
from orchestrator.machine import Machine, describe, machine_of_pool
from orchestrator.places import places
from orchestrator.plans import Plan
from orchestrator.prepare import Prepared
from orchestrator.spec import RunSpec

PACKAGE = "qlora-orchestrator"


class Asked(NamedTuple):
    """What the command line says of a manifest.

    Attributes:
        form: "kuberay", "slurm" or "ray-cluster".
        cluster: the description's file; None renders workers on CPUs.
        pool: of the description; None takes the one with the most GPUs.
        image: with all that a run imports; None takes Ray's and installs what this machine has.
        package: how pip finds this package.
        volume: CLAIM:MOUNT, what the pods share.
        secret, queue, priority: see `Workload`.
    """

    form: str
    cluster: Path | None
    pool: str | None
    image: str | None
    package: str | None
    volume: str | None
    secret: str | None
    queue: str | None
    priority: str | None


WITH_FORM = {
    "kuberay": ("image", "package", "volume", "secret", "queue", "priority"),
    "slurm": ("queue", "priority"),
    "ray-cluster": ("image", "package"),
}
"""The options, beside cluster and pool, of which each form says something."""
LABEL = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
IMAGE = r"[A-Za-z0-9][A-Za-z0-9._/:@-]*"
WORDING = {
    ("kuberay", "queue"): (LABEL, "the value of a label of Kubernetes"),
    ("kuberay", "priority"): (LABEL, "the value of a label of Kubernetes"),
    ("kuberay", "secret"): (r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", "the name of a Secret of Kubernetes"),
    ("slurm", "queue"): (r"[A-Za-z0-9._,-]+", "the name of a partition"),
    ("slurm", "priority"): (r"[A-Za-z0-9._-]+", "the name of a quality of service"),
    ("kuberay", "image"): (IMAGE, "the name of an image"),
    ("ray-cluster", "image"): (IMAGE, "the name of an image"),
}
"""How they may be written, and what they are."""


class Place(NamedTuple):
    """Where a run is to be carried out: a pool of a described cluster, or CPUs."""

    machine: Machine
    cluster: Cluster | None = None
    pool: Pool | None = None


def place(asked: Asked, spec: RunSpec) -> Place:
    """What the run is planned for.

    Raises:
        RequestError: options that do not go with the form, and a description with mistakes or without that pool.
    """
    check_options(asked)
    if asked.cluster is None:
        workers = spec.strategy_request.world_size
        here = describe()
        # nothing is known of the nodes: each is taken to be like this machine
        return Place(dataclasses.replace(here, kind="cpu", devices=workers if isinstance(workers, int) else 1))
    cluster = load_cluster(asked.cluster)
    pool = chosen_pool(cluster, asked.pool)
    return Place(machine_of_pool(pool, currency=cluster.currency), cluster, pool)


def check_options(asked: Asked) -> None:
    """Raise a RequestError for options of which the form says nothing, and for what it cannot be told."""
    problems = []
    for name in WITH_FORM["kuberay"]:
        value: str | None = getattr(asked, name)
        if value is None:
            continue
        pattern, what = WORDING.get((asked.form, name), (r".+", "text on one line"))
        if name not in WITH_FORM[asked.form]:
            rule = f"--render {asked.form} has no place for it"
            problems.append(Problem(f"--{name}", value, rule, "Leave it out"))
        elif not re.fullmatch(pattern, value):
            problems.append(Problem(f"--{name}", value, f"it is not {what}", "Correct it"))
    if asked.image is not None and asked.package is not None:
        rule = "the image has all that a run imports, and nothing is installed"
        problems.append(Problem("--package", asked.package, rule, "Leave one of the two out"))
    if problems:
        raise RequestError(problems)


def rendered(asked: Asked, prepared: Prepared, where: Place, *, force: bool) -> str:
    """The manifest; with `force` of a run that is carried out even if it cannot fit.

    Raises:
        RequestError: something would have to travel, the form lacks what it needs, or no node has what it asks for.
    """
    order = JobOrder(where.machine, prepared.base.architecture.name, force)
    workload = workload_of(asked, prepared.spec, prepared.plan, where, order)
    if asked.form in ("kuberay", "slurm"):
        check_host_ram(asked, workload, where.pool)
        return kuberay.render(workload) if asked.form == "kuberay" else slurm.render(workload)
    if where.cluster is None or where.pool is None:
        raise request_error("--render", "ray-cluster", "it needs machines to start", "Add --cluster FILE")
    return ray_launcher.render(workload, where.cluster, where.pool)


def workload_of(asked: Asked, spec: RunSpec, plan: Plan, where: Place, order: JobOrder) -> Workload:
    """What the run asks of the cluster."""
    volume = shared_volume(asked, spec)
    workers = plan.strategy.world_size
    gpus = where.pool is not None
    nodes, on_each = nodes_for(workers, where.pool.gpus_per_node if where.pool is not None else 1)
    host = plan.estimate.host.most_bytes
    ray_version = metadata.version("ray")
    return Workload(
        name=jobs.id_stem(spec),
        files=texts_of(fields_of(spec), order),  # paths stay as they are
        output=spec.output,
        metadata=jobs.metadata(spec, plan),
        nodes=nodes,
        workers_per_node=on_each,
        gpus=gpus,
        # without a GPU a worker's tensors are the host's
        host_bytes=host if gpus else max(host, on_each * plan.estimate.gpu.process_bytes),
        ray_version=ray_version,
        image=asked.image,
        requirements=pinned(asked.package),
        volume=volume,
        secret=asked.secret,
        queue=asked.queue or (where.pool.partition if where.pool is not None and asked.form == "slurm" else None),
        priority=asked.priority,
        node_labels=dict(where.pool.node_labels) if where.pool is not None else {},
    )


def check_host_ram(asked: Asked, workload: Workload, pool: Pool | None) -> None:
    """Raise a RequestError for nodes larger than the pool's, which Kubernetes and Slurm would wait for or refuse."""
    if pool is None or pool.host_ram_bytes is None or workload.node_bytes <= pool.host_ram_bytes:
        return
    rule = (
        f"a node is asked for {gib(workload.node_bytes)} of memory, {gib(workload.host_bytes)} of them for the plan, "
        f"and host_ram_gib is {pool.host_ram_bytes / GIB:g}"
    )
    remedy = "Take nodes with more, offload less, or plan for fewer workers a node"
    raise request_error("--cluster", f"{asked.cluster}, pool {pool.name}", rule, remedy)


def shared_volume(asked: Asked, spec: RunSpec) -> Volume | None:
    """What the pods of a Kubernetes share, with all that the run reads and writes by a path.

    Raises:
        RequestError: it is missing, misspelt, or something lies elsewhere.
    """
    if asked.form != "kuberay":
        return None  # the nodes see the folders of this machine
    paths = {".".join(place): path for place, path in places(spec.model_dump()).items() if Path(path).is_absolute()}
    if asked.volume is None:
        remedy = "Add --volume CLAIM:MOUNT, a PersistentVolumeClaim that all nodes write, mounted here at MOUNT, too"
        raise request_error("output", spec.output, "a pod sees no folder of this machine", remedy)
    claim, _, mount = asked.volume.partition(":")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", claim) or not Path(mount).is_absolute():
        raise request_error("--volume", asked.volume, "it is no CLAIM:MOUNT", "Write training-data:/mnt/runs, say")
    outside = [
        Problem(field, path, f"it does not lie on the volume, {mount}", "Put it there, or name it by an address")
        for field, path in paths.items()
        if not Path(path).is_relative_to(mount)
    ]
    if outside:
        raise RequestError(outside)
    return Volume(claim, mount)


def pinned(package: str | None) -> tuple[str, ...]:
    """This package and what it trains with, in the versions of this machine, as pip reads them; Ray comes by itself.

    Args:
        package: how pip finds this package; None: by its name and version.
    """
    found = {}
    for line in metadata.requires(PACKAGE) or ():
        wanted = re.match(r"[A-Za-z0-9._-]+", line)
        if wanted is not None and ("extra ==" not in line or re.search(r"extra == ['\"]train['\"]", line)):
            name = wanted.group().lower()
            if name != "ray":
                # a build for CPUs or for a version of CUDA is the machine's matter
                found[name] = metadata.version(name).partition("+")[0]
    own = package or f"{PACKAGE}=={metadata.version(PACKAGE)}"
    return (own, *(f"{name}=={version}" for name, version in sorted(found.items())))
