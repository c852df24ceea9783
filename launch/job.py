"""What a submitted job runs on the cluster: `python -m launch.job`, in the folder that travelled with it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import click

from launch import command

MODEL = "base"
"""The folder of a model that travelled, beside the run."""


@click.command("launch.job")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def job(debug: bool) -> int:
    """Carry out the run of this folder's run.yaml on the Ray that started this job."""
    from launch.jobs import ORDER_FILE, SPECIFICATION

    command.require_train_extra("a job's Python, the `python` on PATH of the head's node,")
    from launch.train import carry_out
    from orchestrator.machine import Machine
    from orchestrator.spec import ClusterSpec, load_spec

    spec = load_spec(Path(SPECIFICATION).resolve())
    fields = json.loads(Path(ORDER_FILE).read_text(encoding="utf-8"))
    machine = Machine(**{**fields, "compute_capability": tuple(fields["compute_capability"])})
    travelled = Path(spec.model)
    if travelled.is_relative_to(Path.cwd()):
        spec = spec.model_copy(update={"model": str(shared(travelled, Path(spec.output)))})
    spec = spec.model_copy(update={"cluster": ClusterSpec(address=os.environ["RAY_ADDRESS"])})
    return carry_out(spec, dry_run=False, as_json=False, force=False, fresh=False, machine=machine)


def shared(model: Path, output: Path) -> Path:
    """A copy of a model's folder that all nodes see: what travels lies at another place on each of them."""
    target = output / MODEL
    if not target.exists():
        output.mkdir(parents=True, exist_ok=True)
        beginning = output / f".{MODEL}"
        shutil.rmtree(beginning, ignore_errors=True)
        shutil.copytree(model, beginning)
        beginning.rename(target)
    return target


if __name__ == "__main__":
    command.main(job)
