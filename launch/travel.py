"""What goes along with a job: its specification, what was decided for it, and the local files that it names."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from clusters.errors import request_error
from orchestrator.machine import Machine
from orchestrator.places import Place, places, put
from orchestrator.spec import RunSpec

TRAVELS_BYTES = 100 * 1000**2
"""Local files up to so much go along with a job; Ray itself refuses more than 500 MiB."""
ORDER_FILE, SPECIFICATION = "order.json", "run.yaml"


@dataclasses.dataclass(frozen=True, slots=True)
class JobOrder:
    """What was decided where a job was submitted or rendered.

    Attributes:
        machine: what it was planned for.
        model: what the base is called in plans and records, wherever its files come to lie.
        force: it is carried out even if the plan says that it cannot fit.
    """

    machine: Machine
    model: str
    force: bool


def texts_of(fields: Mapping[str, Any], order: JobOrder) -> dict[str, str]:
    """What `launch.job` reads, by the files' names: the specification, and what was decided."""
    return {
        SPECIFICATION: yaml.safe_dump(dict(fields), sort_keys=False),
        ORDER_FILE: json.dumps(dataclasses.asdict(order)) + "\n",
    }


def read_order(folder: Path) -> JobOrder:
    """What was decided for the job whose files came into `folder`."""
    fields = json.loads((folder / ORDER_FILE).read_text(encoding="utf-8"))
    machine = fields["machine"]
    machine["compute_capability"] = tuple(machine["compute_capability"])
    return JobOrder(**{**fields, "machine": Machine(**machine)})


def fields_of(spec: RunSpec) -> dict[str, Any]:
    """A specification for a job, whose cluster is the one that it is in."""
    fields = spec.model_dump(mode="json", exclude_unset=True) | {"output": spec.output}
    fields.pop("cluster", None)
    return fields


def travelling(spec: RunSpec, shared: Sequence[Path] = ()) -> dict[Place, Path]:
    """The local files and folders that must go along, by the fields that name them.

    Args:
        shared: folders that all nodes see at the same path; what lies in them stays there.

    Raises:
        RequestError: they are larger than what may travel.
    """
    named = {place: Path(text) for place, text in places(fields_of(spec)).items() if place != ("output",)}
    local = {
        place: path
        for place, path in named.items()
        if path.is_absolute() and path.exists() and not any(map(path.is_relative_to, shared))
    }
    size = sum(map(size_of, local.values()))
    if size > TRAVELS_BYTES:
        large = max(local, key=lambda place: size_of(local[place]))
        raise request_error(
            ".".join(large),
            local[large],
            f"{size / 1e6:,.0f} MB would have to travel, and at most {TRAVELS_BYTES / 1e6:.0f} MB do",
            "Put it into a folder that all nodes see at the same path and add --shared FOLDER, or name it by an "
            "address (s3://...) or a Hub id",
        )
    return local


def pack(spec: RunSpec, order: JobOrder, local: Mapping[Place, Path], folder: Path) -> None:
    """Put into `folder` what the job needs; `local` is what `travelling` found."""
    fields = fields_of(spec)
    for place, path in local.items():
        target = folder / ".".join(place) / path.name
        target.parent.mkdir()
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copy2(path, target)
        put(fields, place, str(target.relative_to(folder)))
    for name, text in texts_of(fields, order).items():
        (folder / name).write_text(text, encoding="utf-8")


def size_of(path: Path) -> int:
    """Bytes of a file, or of all below a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)
