"""The devices that a command line of `qlora-plan` asks about: a cluster's, those it names, or this machine's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from clusters.errors import Problem, RequestError, request_error
from clusters.gpu import COMMON, find_gpu
from orchestrator.devices import NODE_GPUS, any_nodes, is_cpu, on_stack, pool_target, this_cpu
from orchestrator.plans import Choice, Target

if TYPE_CHECKING:
    from clusters.cluster import Cluster, Pool

Options = Mapping[str, Any]
AUTO = "auto"
STACK_REASONS = {
    "trainer": "asked for: the step of transformers' Trainer and TRL, under torch's plain autocast",
    "loop": "asked for: a plain loop over transformers and peft, which holds its output until the step ends",
}


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices that an answer is for.

    Attributes:
        targets: by memory.
        world_size: how many of one kind work together, unless that is open.
        named: the one whose estimate is wanted.
    """

    targets: tuple[Target, ...]
    world_size: int
    named: str | None = None
    choices: tuple[Choice, ...] = ()
    warnings: tuple[str, ...] = ()
    currency: str | None = None


def place_of(options: Options) -> Devices:
    """The devices of the command line, where the loop of --stack trains."""
    found, stack = devices_of(options), options["stack"]
    if stack == "ours":
        return found
    targets = tuple(on_stack(target, stack) for target in found.targets)
    return replace(found, targets=targets, choices=(*found.choices, Choice("stack", stack, STACK_REASONS[stack])))


def devices_of(options: Options) -> Devices:
    """The devices of the command line: a cluster's, those named, this machine's, or the common ones."""
    if options["cluster"] is not None:
        return of_cluster(options)
    names = names_of(options)
    if names:
        return named_devices(names, options)
    if options["gpus"] is None and (found := this_machine(options)) is not None:
        return found
    common = named_devices(list(COMMON), options)
    if options["gpus"] is None and not any_number(options):
        reason = "this machine shows no NVIDIA GPU, so one of each common kind is looked at"
        common = replace(common, choices=(Choice("gpus", "1", reason),))
    return common


def count_of(options: Options) -> int:
    """The number of GPUs that was passed; 1 without."""
    return options["gpus"] if isinstance(options["gpus"], int) else 1


def any_number(options: Options) -> bool:
    """Whether the number of GPUs is the planner's to choose."""
    return options["gpus"] == AUTO or (options["gpus"] is None and options["objective"] is not None)


def names_of(options: Options) -> list[str]:
    """The kinds of device that were named."""
    compared = options["compare"]
    names = [] if compared is None else [name for name in compared.split(",") if name.strip()]
    if compared is not None and not names:
        raise request_error("--compare", compared, "it names no GPU", "Name some, such as --compare t4,a100-40gb")
    asked = [options["gpu"]] if options["gpu"] is not None else []
    return [*asked, *names]


def named_devices(names: list[str], options: Options) -> Devices:
    """The devices of these names, each once, the smallest memory first.

    Raises:
        RequestError: with every name that is not known.
    """
    targets: dict[str, Target] = {}
    problems: list[Problem] = []
    for name in dict.fromkeys(names):
        try:
            target = target_named(name, options)
            targets[target.name] = target
        except RequestError as error:
            problems.extend(error.at("--gpu" if name == options["gpu"] else "--compare").problems)
    if problems:
        raise RequestError(problems)
    asked = target_named(options["gpu"], options).name if options["gpu"] else None
    note: tuple[Choice, ...] = ()
    if any_number(options) and any(target.pool is not None for target in targets.values()):
        note = (Choice("gpus", f"1 to {NODE_GPUS}", "no number was given, so one node is looked at"),)
    return Devices(by_memory(targets.values()), count_of(options), asked, note)


def by_memory(targets: Collection[Target]) -> tuple[Target, ...]:
    """The smallest memory first."""
    return tuple(sorted(targets, key=lambda target: target.usable_bytes))


def target_named(name: str, options: Options) -> Target:
    """The device of that name: a GPU of the catalogue, or this host's processor."""
    compute_dtype, workers = options["compute_dtype"], count_of(options)
    if is_cpu(name):
        return this_cpu(compute_dtype, workers)
    pool = any_nodes(find_gpu(name), NODE_GPUS if any_number(options) else workers)
    return pool_target(pool, compute_dtype, workers)


def of_cluster(options: Options) -> Devices:
    """The pools of --cluster that have as many GPUs as were asked for."""
    from orchestrator.discovery import find_cluster

    for other in ("gpu", "compare"):
        if options[other] is not None:
            rule, remedy = "--cluster says which GPUs there are", "Leave one of the two out"
            raise request_error(f"--{other}", options[other], rule, remedy)
    cluster = find_cluster(options["cluster"])
    found = pools_of(cluster, options, count_of(options))
    if cluster.prices_as_of is None or all(pool.price_per_hour is None for pool in cluster.pools):
        return found
    as_of = Choice("prices", f"{cluster.currency}, as of {cluster.prices_as_of}", f"{cluster.source} says so")
    return replace(found, choices=(*found.choices, as_of))


def this_machine(options: Options) -> Devices | None:
    """All GPUs of this machine's largest kind; None where it has none."""
    import shutil

    if shutil.which("nvidia-smi") is None:
        return None
    from orchestrator import discovery

    cluster = discovery.this_machine()
    if cluster is None or not cluster.pools:
        return None
    most = max(cluster.pools, key=lambda pool: pool.gpus * pool.usable_bytes)
    found = pools_of(replace(cluster, pools=(most,)), options, most.gpus)
    note = Choice("gpus", str(most.gpus), f"what this machine has: {most.gpus} x {most.gpu.name}")
    left = tuple(f"{pool.gpu.name} of this machine is left out" for pool in cluster.pools if pool is not most)
    return replace(found, choices=(note,), warnings=(*left, *found.warnings))


def pools_of(cluster: Cluster, options: Options, world_size: int) -> Devices:
    """A cluster's pools as devices."""
    enough = [pool for pool in cluster.pools if pool.gpus >= world_size]
    if not enough:
        most = max((pool.gpus for pool in cluster.pools), default=0)
        raise request_error(
            "--gpus", world_size, f"the largest pool has {most}", f"Ask for {most} or fewer, or for auto"
        )
    targets = [target_of(pool, cluster, options, world_size) for pool in enough]
    return Devices(
        by_memory(targets),
        world_size,
        warnings=(*cluster.unknown, *cluster.remarks),
        currency=cluster.currency,
    )


def target_of(pool: Pool, cluster: Cluster, options: Options, world_size: int) -> Target:
    """A pool's GPU, called like its kind where that is unlike the others', else like the pool."""
    alike = sum(other.gpu.name == pool.gpu.name for other in cluster.pools)
    named = replace(pool, name=pool.gpu.name) if alike == 1 else pool
    return pool_target(named, options["compute_dtype"], world_size)
