"""The file of a cluster description: its fields, and all its mistakes in one error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from clusters.errors import Problem, RequestError
from clusters.gpu import find_gpu
from clusters.hours import check_hours
from clusters.mistakes import mistakes, mistakes_of_each, shown
from clusters.yaml_file import PlainName, read_yaml

WHERE = "cluster description"
START = "Start from clusters/examples/two-pools.yaml"


def _day(value: object) -> object:
    """A validator: YAML reads a day that is not quoted as a date already."""
    if isinstance(value, str):
        try:
            return date.fromisoformat(value)
        except ValueError:
            pass
    if not isinstance(value, date) or isinstance(value, datetime):
        raise ValueError("it should be a day such as 2026-11-01")
    return value


# The upper bounds are far beyond what is built; they catch a slip of the unit before it becomes a plan.
Gibibytes = Annotated[float, Field(gt=0, le=2**30)]
Day = Annotated[date, BeforeValidator(_day)]


Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._/-]{0,251}[A-Za-z0-9])?$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PoolForm(_Section):
    """Nodes that are alike."""

    name: PlainName
    """Names the pool; letters, digits, dots, hyphens and underscores."""
    gpu: str
    """A GPU of `qlora-plan --list-gpus`."""
    gpus_per_node: Annotated[int, Field(ge=1, le=1024)]
    """GPUs in one node."""
    nodes: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Nodes that may be used at most."""
    host_ram_gib: Gibibytes | None = None
    """Main memory of one node, in GiB; without it nothing is said about offloading."""
    disk_gib: Gibibytes | None = None
    """Disk of one node for the model and checkpoints, in GiB."""
    network_gbit_per_s: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    """Network of one node in one direction, all its cards together, in Gbit/s (10**9 bits)."""
    price_per_hour: Annotated[float, Field(ge=0, le=1_000_000)] | None = None
    """Price of one node for an hour, all its GPUs included, in the cluster's currency."""
    spot: bool = False
    """The nodes may be taken away at any time."""
    nvlink: bool | None = None
    """The GPUs of a node reach each other over NVLink; left out, whatever is usual for that GPU: true for boards with
    a fabric of NVLink (SXM), false where NVLink is a bridge between two cards, or does not exist."""
    hours: Annotated[str, Field(max_length=500), AfterValidator(check_hours)] | None = None
    """When they may be used, as OpenStreetMap writes opening hours, by the clock on their wall; left out, always."""
    node_labels: Annotated[dict[Label, Label], Field(max_length=20)] = Field(default_factory=dict)
    """Labels of the pool's nodes on Kubernetes, by which a rendered job finds them."""
    partition: PlainName | None = None
    """The pool's partition on Slurm."""
    instance_type: PlainName | None = None
    """What AWS calls its machines, for Ray's cluster launcher; the cluster's `region` says where."""
    hosts: Annotated[list[PlainName], Field(max_length=1000)] = Field(default_factory=list)
    """Addresses of its machines, for Ray's cluster launcher where no cloud makes them; the first one is the head."""
    ssh_user: PlainName | None = None
    """Who logs in on these machines over SSH."""


class ClusterForm(_Section):
    """A cluster, from its YAML file."""

    name: PlainName
    """Names the cluster; letters, digits, dots, hyphens and underscores."""
    currency: PlainName | None = None
    """Of all prices, such as EUR; required where a pool has a price."""
    prices_as_of: Day | None = None
    """The day the prices held, as YYYY-MM-DD."""
    region: PlainName | None = None
    """Of AWS, for Ray's cluster launcher."""
    pools: Annotated[list[Any], Field(min_length=1, max_length=200)]
    """The pools, one or more, each with a name of its own."""


def read_forms(path: Path) -> tuple[ClusterForm, tuple[PoolForm, ...]]:
    """The cluster and its pools as the file has them.

    Raises:
        RequestError: with every mistake of the file.
    """
    fields = read_yaml(path, WHERE, START)
    pools = fields.get("pools")
    pools = pools if isinstance(pools, list) else []
    problems = [
        *mistakes(ClusterForm, fields),
        *_without_currency(fields, pools),
        *mistakes_of_each("pool", PoolForm, pools, "gpu", find_gpu),
    ]
    if problems:
        raise RequestError(problems)
    return ClusterForm.model_validate(fields), tuple(PoolForm.model_validate(pool) for pool in pools)


def _without_currency(fields: Mapping[str, Any], pools: Sequence[Any]) -> Iterator[Problem]:
    """A price in nothing cannot be compared."""
    priced = [pool for pool in pools if isinstance(pool, dict) and pool.get("price_per_hour") is not None]
    if priced and fields.get("currency") is None:
        price = shown(priced[0]["price_per_hour"])
        yield Problem("currency", "", f"a pool has a price ({price} per hour) and no currency is named", "Add it")
