"""qlora-submit: hand a run to a Ray cluster as a job, or print a manifest of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from clusters.cluster import load_cluster
from clusters.errors import request_error
from launch import command
from launch.command import require_train_extra
from launch.submitted import followed, list_jobs, logs, of_cluster, result, status, stop, wait
from orchestrator.spec import RunSpec, load_spec

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

FORMS = ("kuberay", "slurm", "ray-cluster")
"""Of manifests; see launch/render.py."""
ELSEWHERE = ("cluster", "pool")
"""Options of manifests that say something without one, too."""


@click.command("qlora-submit", cls=command.WithSubcommands, subcommands=(status, logs, wait, stop, list_jobs, result))
@click.argument("specification", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--follow", is_flag=True, help="Show what it prints until it ends; the exit code is the run's.")
@click.option("--force", is_flag=True, help="Submit even if the plan says that it cannot fit.")
@click.option("--fresh", is_flag=True, help="Start anew in a folder beside the output folder, if a run lies there.")
@click.option(
    "--shared",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False, resolve_path=True),
    help="A folder that all nodes see at the same path: data and models in it stay there. May be given several times.",
)
@click.option(
    "--render", type=click.Choice(FORMS), help="Print a manifest instead, for a cluster that is made for the run."
)
@click.option(
    "--cluster",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The description of the cluster (docs/clusters.md). With --render and without one, workers are on CPUs.",
)
@click.option("--pool", help="The pool to run on.  [default: the one with the most GPUs]")
@click.option("--image", help="With --render: a container image with all that a run imports.")
@click.option("--package", help="With --render and no --image: how pip finds this package, such as a wheel's address.")
@click.option("--volume", metavar="CLAIM:MOUNT", help="With --render kuberay: what all pods share.")
@click.option("--secret", help="With --render kuberay: the Secret whose keys become the pods' environment.")
@click.option("--queue", help="With --render: Kueue's local queue, or Slurm's partition.")
@click.option("--priority", help="With --render: Kueue's priority class, or Slurm's quality of service.")
@of_cluster
@click.version_option(package_name="qlora-orchestrator")
def submit(
    specification: Path,
    overrides: tuple[str, ...],
    follow: bool,
    force: bool,
    fresh: bool,
    shared: tuple[Path, ...],
    render: str | None,
    address: str,
    debug: bool,
    **manifest: Any,
) -> int:
    """Submit the run of a SPECIFICATION to a Ray cluster, planned for what that cluster has.

    The same run again goes on from its last checkpoint; while it is under way it is refused. Exit code 1, with the
    plan, if it cannot fit.
    """
    check_manifest(render, manifest, follow)
    if render is not None and shared:
        raise request_error("--shared", shared[0], "with a manifest nothing travels", "Leave it out")
    spec = load_spec(specification, overrides)
    check_cluster(spec, address if render is None else None)
    require_train_extra("qlora-submit")
    from qlora_core.quiet import quiet_libraries

    quiet_libraries()
    from launch import jobs
    from launch.report.terminal import print_plan
    from launch.travel import JobOrder, travelling
    from orchestrator.prepare import prepare
    from orchestrator.record import load_record
    from orchestrator.run import finished

    if render is not None:
        return print_manifest(beside(spec, None) if fresh else spec, force, {"form": render, **manifest})
    client = jobs.connect(address)
    if remark := jobs.another_ray(client):
        command.warn(remark)
    if fresh:
        spec = beside(spec, client)
        click.echo(f"Output: {spec.output}")
    local = travelling(spec, shared)
    described = None if manifest["cluster"] is None else load_cluster(manifest["cluster"])
    machine, remark = jobs.machine_of(address, manifest["pool"], described)
    if remark:
        command.warn(remark)
    prepared = prepare(spec, tell=lambda text: click.echo(text, err=True), machine=machine)
    record = load_record(Path(spec.output))
    if record is not None and finished(prepared, record) is not None:
        click.echo(
            f"The run in {spec.output} is complete already; nothing was submitted. --fresh starts anew beside it."
        )
        return 0
    print_plan(prepared.plan)
    if not prepared.plan.fits and not force:
        command.fail("The plan does not fit, so nothing was submitted.", "Change what it shows, or pass --force.")
        return 1
    order = JobOrder(machine, prepared.base.architecture.name, force)
    with tempfile.TemporaryDirectory(prefix="qlora-job-") as folder:
        job = jobs.submit(client, spec, order, prepared.plan, local, Path(folder))
    click.echo(f"\nSubmitted as {job}.")
    if follow:
        return followed(client, job)
    click.echo(f"Follow it: qlora-submit logs {job} --follow")
    return 0


def check_manifest(render: str | None, options: Mapping[str, Any], follow: bool) -> None:
    """Raise a RequestError for options that say nothing here."""
    given = [name for name, value in options.items() if value is not None and name not in ELSEWHERE]
    if render is None and given:
        rule = "it is about a manifest"
        raise request_error(f"--{given[0]}", options[given[0]], rule, f"Add --render {' or '.join(FORMS)}")
    if render is not None and follow:
        raise request_error("--follow", "", "a manifest is printed, not submitted", "Leave it out")
    if render is not None and options["pool"] is not None and options["cluster"] is None:
        raise request_error("--pool", options["pool"], "no cluster is described", "Add --cluster FILE")


def check_cluster(spec: RunSpec, address: str | None) -> None:
    """Raise a RequestError for a specification that names another cluster; without an address, one made for it."""
    if spec.cluster == "auto":
        return
    named = spec.cluster.address.rpartition(":")[0].strip("[]")
    if address is None or named != urlsplit(address).hostname:
        rule = f"the run is handed to {address or 'a cluster that is made for it'}, which is another"
        raise request_error("cluster.address", spec.cluster.address, rule, "Leave it out, or add cluster=auto")


def beside(spec: RunSpec, client: JobSubmissionClient | None) -> RunSpec:
    """The run with the first output folder beside its own in which no run lies, nor is one known to the cluster."""
    from launch import jobs
    from launch.train import free_output

    def put(folder: Path) -> RunSpec:
        return spec.model_copy(update={"output": str(folder)})

    def known(folder: Path) -> bool:
        return client is not None and bool(jobs.jobs_of(client, put(folder)))

    return put(free_output(spec, known))


def print_manifest(spec: RunSpec, force: bool, options: Mapping[str, Any]) -> int:
    """Print a manifest; the plan and remarks go to stderr."""
    from launch.render import Asked, place, rendered
    from launch.report.terminal import print_plan
    from orchestrator.prepare import prepare

    asked = Asked(**options)
    where = place(asked, spec)
    prepared = prepare(spec, tell=lambda text: click.echo(text, err=True), machine=where.machine)
    fits = prepared.plan.fits or force
    print_plan(prepared.plan, err=True)
    if not fits:
        command.fail("The plan does not fit, so no manifest is printed.", "Change what it shows, or pass --force.")
        return 1
    click.echo(rendered(asked, prepared, where, force=force), nl=False)
    return 0


def main() -> None:
    """The console script."""
    command.main(submit)
