"""What a submitted job runs on the cluster: `python -m launch.job`, by the folder that travelled with it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

try:
    import click

    from launch import command
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: the Python of this job, {sys.executable}, has no {error.name}. Install qlora-orchestrator[train] for "
        "the `python` on PATH of the head's node."
    ) from None

FOLDERS = {"model": "base", "adapter": "adapter-before"}
"""The folders of a model and an adapter that travelled, beside the run."""


@click.command("launch.job")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=".",
    help="The folder that travelled.  [default: the one that this is started in]",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def job(folder: Path, debug: bool) -> int:
    """Carry out the run of a folder's run.yaml on the Ray of RAY_ADDRESS, which started this job."""
    from launch.jobs import ORDER_FILE, SPECIFICATION

    command.require_train_extra("a job's Python, the `python` on PATH of the head's node,")
    from launch.train import carry_out
    from orchestrator.machine import Machine
    from orchestrator.spec import ClusterSpec, load_spec

    spec = load_spec((folder / SPECIFICATION).resolve())
    fields = json.loads((folder / ORDER_FILE).read_text(encoding="utf-8"))
    machine = Machine(**{**fields, "compute_capability": tuple(fields["compute_capability"])})
    changes: dict[str, Any] = {"cluster": ClusterSpec(address=os.environ["RAY_ADDRESS"])}
    for field, name in FOLDERS.items():
        travelled = getattr(spec, field)
        if travelled is not None and Path(travelled).is_relative_to(folder.resolve()):
            changes[field] = str(shared(Path(travelled), Path(spec.output) / name))
    spec = spec.model_copy(update=changes)
    # Ray may fetch the folder that travelled anew while the run goes on; a process whose folder is gone starts no other
    Path(spec.output).mkdir(parents=True, exist_ok=True)
    os.chdir(spec.output)
    return carry_out(spec, force=False, machine=machine)


def shared(travelled: Path, target: Path) -> Path:
    """A copy of a folder that all nodes see: what travels lies at another place on each of them."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        beginning = target.with_name(f".{target.name}")
        shutil.rmtree(beginning, ignore_errors=True)
        shutil.copytree(travelled, beginning)
        beginning.rename(target)
    return target


if __name__ == "__main__":
    command.main(job)
