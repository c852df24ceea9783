"""What a submitted job runs on the cluster: `python -m launch.job`, by the folder that travelled with it."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

try:
    import click

    from launch import command
    from qlora_core.files import replace_folder
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: the Python of this job, {sys.executable}, has no {error.name}. Install qlora-orchestrator[train] for "
        "the `python` on PATH of the head's node."
    ) from None

FOLDERS = {"model": "base", "adapter": "adapter-before"}
"""What the folders of a model and an adapter that travelled are called beside the run, before a digest."""


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
    command.require_train_extra("a job's Python, the `python` on PATH of the head's node,")
    from launch.train import carry_out
    from launch.travel import SPECIFICATION, read_order
    from orchestrator.order import RAY_SESSION
    from orchestrator.spec import ClusterSpec, load_spec

    spec = load_spec((folder / SPECIFICATION).resolve())
    order = read_order(folder)
    changes: dict[str, Any] = {"cluster": ClusterSpec(address=os.environ["RAY_ADDRESS"])}
    for field, name in FOLDERS.items():
        travelled = getattr(spec, field)
        if travelled is not None and Path(travelled).is_relative_to(folder.resolve()):
            changes[field] = str(shared(Path(travelled), Path(spec.output), name))
    spec = spec.model_copy(update=changes)
    # Ray may fetch the folder that travelled anew while the run goes on; a process whose folder is gone starts no other
    Path(spec.output).mkdir(parents=True, exist_ok=True)
    if session := next((part for part in folder.resolve().parts if part.startswith("session_")), None):
        os.environ[RAY_SESSION] = session  # Ray has what travels in the folder of its session
    os.chdir(spec.output)
    return carry_out(spec, force=order.force, machine=order.machine, model_name=order.model)


def shared(travelled: Path, output: Path, name: str) -> Path:
    """A copy of a folder that all nodes see, since what travels lies at another place on each of them.

    It is called by its contents: what an earlier submission brought is not taken for what was changed since.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in travelled.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(travelled)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    target = output / f"{name}-{digest.hexdigest()[:8]}"
    if not target.exists():
        output.mkdir(parents=True, exist_ok=True)
        with replace_folder(target) as beginning:
            shutil.copytree(travelled, beginning)
    return target


if __name__ == "__main__":
    command.main(job)
