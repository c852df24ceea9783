"""qlora-submit: hand a run to a Ray cluster as a job, follow it there, and fetch what came of it."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clusters.errors import RunFailed, request_error
from launch import command
from launch.command import require_train_extra
from orchestrator.spec import RunSpec, load_spec

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

POLL_SECONDS = 1.0
PIPED_WIDTH = 200
"""Columns where there is no terminal: nothing is cut off."""
STOP_SECONDS = 120.0
"""A job that was asked to stop may take so long to finish its step and write its checkpoint."""

FORMS = ("kuberay", "slurm", "ray-cluster")
"""Of manifests; see launch/render.py."""

Command = Callable[..., Any]


def of_cluster(function: Command) -> Command:
    """The options of every command here."""
    function = click.option("--debug", is_flag=True, help="Show tracebacks.")(function)
    return click.option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        default="http://127.0.0.1:8265",
        show_default=True,
        metavar="http://HOST:PORT",
        help="The dashboard of the cluster's head. [env: RAY_API_SERVER_ADDRESS]",
    )(function)


def of_job(function: Command) -> Command:
    """A command about one job."""
    return click.argument("job", metavar="JOB")(of_cluster(function))


@click.command("status")
@of_job
def status(job: str, address: str, debug: bool) -> int:
    """Where a job stands."""
    from launch import jobs

    client = client_of(address)
    found = jobs.details(client, job)
    show(found, jobs.says(client, found))
    return 0


@click.command("logs")
@click.option("--follow", is_flag=True, help="Until the job ends.")
@of_job
def logs(job: str, follow: bool, address: str, debug: bool) -> int:
    """What a job has printed."""
    from launch import jobs

    client = client_of(address)
    if follow:
        return followed(client, job)
    with jobs.known(client, job):
        click.echo(client.get_job_logs(job), nl=False)
    return 0


@click.command("wait")
@of_job
def wait(job: str, address: str, debug: bool) -> int:
    """Wait for the end of a job; the exit code is the run's."""
    return code_of(waited(client_of(address), job))


@click.command("stop")
@of_job
def stop(job: str, address: str, debug: bool) -> int:
    """Stop a job after its step, with a checkpoint; the same run submitted again goes on from there."""
    from launch import jobs

    client = client_of(address)
    found = jobs.details(client, job)
    if found.status not in jobs.UNDER_WAY:
        click.echo(f"{job} has ended already: {found.status.value.lower()}.")
        return 0
    output = Path((found.metadata or {}).get("output", ""))
    if output.is_absolute() and (output / "run.json").exists():
        (output / ".stop").touch()
        deadline = time.monotonic() + STOP_SECONDS
        while found.status in jobs.UNDER_WAY and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            found = jobs.details(client, job)
    if found.status in jobs.UNDER_WAY:  # it has not begun, or its folder is not to be seen from here
        client.stop_job(job)
        found = waited(client, job)
    click.echo(f"{job} has ended: {found.status.value.lower()}.")
    if so_far := jobs.progress(output):
        click.echo(f"The run: {so_far}.")
    return 0


@click.command("list")
@of_cluster
def list_jobs(address: str, debug: bool) -> int:
    """The runs that were submitted to a cluster, the newest first."""
    from rich.table import Table

    from launch import jobs
    from launch.report.words import echo

    client = client_of(address)
    table = Table(box=None)
    for name in ("job", "status", "model", "workers", "predicted", "owner", "submitted", "waits"):
        table.add_column(name, no_wrap=True)
    for one in jobs.ours(client.list_jobs()):
        said = one.metadata or {}
        facts = (said.get(name, "") for name in ("model", "workers", "predicted", "owner"))
        waits = jobs.says(client, one) or ""
        table.add_row(one.submission_id, one.status.value.lower(), *facts, moment(one.start_time), waits)
    echo(table if table.row_count else "No run was submitted to this cluster.", piped_width=PIPED_WIDTH)
    return 0


@click.command("result")
@click.option(
    "--to", type=click.Path(path_type=Path, file_okay=False), help="Copy adapter and report into this folder."
)
@of_job
def result(job: str, to: Path | None, address: str, debug: bool) -> int:
    """Where the adapter and the report of a job are, or a copy of them."""
    from launch import jobs
    from launch.report.run_report import FILE_NAME, PAGE_NAME

    found = jobs.details(client_of(address), job)
    output = Path((found.metadata or {}).get("output", ""))
    kept = [
        output / name for name in ("adapter", "model", FILE_NAME, PAGE_NAME, "run.json") if (output / name).exists()
    ]
    if found.status in jobs.UNDER_WAY:
        raise RunFailed(f"{job} has not ended: {found.status.value.lower()}.", f"qlora-submit wait {job}")
    if not kept:
        where = f"It wrote to {output} of the cluster's nodes, which holds nothing that can be seen from here."
        raise RunFailed(where, "Fetch it from a node, or submit with an output on storage that this machine sees.")
    if to is None:
        for path in kept:
            click.echo(path)
        return 0
    if to.exists() and any(to.iterdir()):
        raise request_error("--to", to, "it is not empty", "Name a new folder")
    to.mkdir(parents=True, exist_ok=True)
    for path in kept:
        if path.is_dir():
            shutil.copytree(path, to / path.name)
        else:
            shutil.copy2(path, to)
        click.echo(to / path.name)
    return 0


@click.command("qlora-submit", cls=command.WithSubcommands, subcommands=(status, logs, wait, stop, list_jobs, result))
@click.argument("specification", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--follow", is_flag=True, help="Show what it prints until it ends; the exit code is the run's.")
@click.option("--force", is_flag=True, help="Submit even if the plan says that it cannot fit.")
@click.option(
    "--render", type=click.Choice(FORMS), help="Print a manifest instead, for a cluster that is made for the run."
)
@click.option(
    "--cluster",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --render: the description of the cluster (docs/clusters.md); without one, workers are on CPUs.",
)
@click.option("--pool", help="With --cluster: the pool to run on.  [default: the one with the most GPUs]")
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
    spec = load_spec(specification, overrides)
    require_train_extra("qlora-submit")
    from qlora_core.quiet import quiet_libraries

    quiet_libraries()
    if render is not None:
        return print_manifest(spec, force, {"form": render, **manifest})
    from launch import jobs
    from launch.report.terminal import print_plan
    from orchestrator.prepare import prepare

    client = jobs.connect(address)
    if remark := jobs.another_ray(client):
        command.warn(remark)
    if complete(spec):
        click.echo(f"The run in {spec.output} is complete already; nothing was submitted.")
        return 0
    machine, remark = jobs.machine_of(address)
    if remark:
        command.warn(remark)
    prepared = prepare(spec, tell=lambda text: click.echo(text, err=True), machine=machine)
    print_plan(prepared.plan)
    if not prepared.plan.fits and not force:
        command.fail("The plan does not fit, so nothing was submitted.", "Change what it shows, or pass --force.")
        return 1
    with tempfile.TemporaryDirectory(prefix="qlora-job-") as folder:
        job = jobs.submit(client, spec, machine, prepared.plan, Path(folder))
    click.echo(f"\nSubmitted as {job}.")
    if follow:
        return followed(client, job)
    click.echo(f"Follow it: qlora-submit logs {job} --follow")
    return 0


def check_manifest(render: str | None, options: Mapping[str, Any], follow: bool) -> None:
    """Raise a RequestError for options that say nothing here."""
    given = [name for name, value in options.items() if value is not None]
    if render is None and given:
        rule = "it is about a manifest"
        raise request_error(f"--{given[0]}", options[given[0]], rule, f"Add --render {' or '.join(FORMS)}")
    if render is not None and follow:
        raise request_error("--follow", "", "a manifest is printed, not submitted", "Leave it out")
    if options["pool"] is not None and options["cluster"] is None:
        raise request_error("--pool", options["pool"], "no cluster is described", "Add --cluster FILE")


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
    click.echo(rendered(asked, prepared, where), nl=False)
    return 0


def complete(spec: RunSpec) -> bool:
    """Whether the run in the output folder has come to its end; what else lies there the job looks at."""
    from orchestrator.record import load_record

    record = load_record(Path(spec.output))
    return record is not None and record.status == "complete"


def client_of(address: str) -> JobSubmissionClient:
    """The Jobs API at an address."""
    require_train_extra("qlora-submit")
    from launch import jobs

    return jobs.connect(address)


def waited(client: JobSubmissionClient, job: str) -> JobDetails:
    """A job at its end."""
    from launch import jobs

    while (found := jobs.details(client, job)).status in jobs.UNDER_WAY:
        time.sleep(POLL_SECONDS)
    return found


def followed(client: JobSubmissionClient, job: str) -> int:
    """Print what a job prints until it ends; the exit code is the run's."""
    from launch import jobs

    shown = 0
    while True:
        ended = (found := jobs.details(client, job)).status not in jobs.UNDER_WAY
        with jobs.known(client, job):
            text = client.get_job_logs(job)
        click.echo(text[shown:], nl=False)
        shown = len(text)
        if ended:
            return code_of(found)
        time.sleep(POLL_SECONDS)


def code_of(job: JobDetails) -> int:
    """The exit code of a job's run: its own, 130 where the job was stopped, else 1 with Ray's reason."""
    if job.driver_exit_code is not None and job.status.value != "STOPPED":
        return int(job.driver_exit_code)
    if job.status.value == "SUCCEEDED":
        return 0
    if job.status.value == "STOPPED":
        return command.INTERRUPTED
    command.fail(f"{job.submission_id} failed before its run began: {job.message}")
    return 1


def show(job: JobDetails, waits: str | None) -> None:
    """A job, a fact on each line."""
    from launch import jobs

    facts = {"job": job.submission_id, "status": job.status.value.lower(), **(job.metadata or {})}
    facts |= {"submitted": moment(job.start_time)}
    if job.end_time:
        facts["ended"] = moment(job.end_time)
    if waits is not None:
        facts["waits"] = waits
    elif job.message and job.status.value == "FAILED":
        facts["Ray says"] = job.message
    if so_far := jobs.progress(Path((job.metadata or {}).get("output", ""))):
        facts["the run"] = so_far
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")


def moment(milliseconds: int | None) -> str:
    """A time of Ray's, UTC."""
    return "" if not milliseconds else f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%S}"


def main() -> None:
    """The console script."""
    command.main(submit)
