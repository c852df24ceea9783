"""The commands of qlora-submit about jobs that were submitted: where they stand, their end, and what came of them."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clusters.errors import RunFailed, first_line, request_error
from launch import command
from launch.command import require_train_extra

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

POLL_SECONDS = 1.0
PIPED_WIDTH = 1000
"""Columns where there is no terminal: a line for each job, and nothing is cut off."""
STOP_SECONDS = 120.0
"""A job that was asked to stop may take so long to finish its step and write its checkpoint, or to end by a signal."""

COPYING = ".beginning"
"""In it `result` copies, so that what breaks off is not taken for a result."""

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
        click.echo(f"{job} has ended already: {standing(found)}.")
        return 0
    if found.status.value == "PENDING":  # no process of it reads our file, and Ray acts once there is one
        with jobs.known(client, job):
            client.stop_job(job)
        click.echo(f"{job} has not started: Ray ends it as soon as it would.")
        return 0
    output = Path((found.metadata or {}).get("output", ""))
    if output.is_absolute() and (output / "run.json").exists():
        (output / ".stop").touch()
        deadline = time.monotonic() + STOP_SECONDS
        while found.status in jobs.UNDER_WAY and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            found = jobs.steadily(client, job, client.get_job_info)
    if found.status in jobs.UNDER_WAY:  # it has not begun, or its folder is not to be seen from here
        with jobs.known(client, job):
            client.stop_job(job)
        found = waited(client, job, STOP_SECONDS)
    click.echo(f"{job} has ended: {standing(found)}.")
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
        table.add_column(name, no_wrap=name in ("job", "status"), overflow="fold")
    for one in jobs.ours(client.list_jobs()):
        said = one.metadata or {}
        facts = (said.get(name, "") for name in ("model", "workers", "predicted", "owner"))
        waits = jobs.says(client, one) or ""
        table.add_row(one.submission_id, standing(one), *facts, moment(one.start_time), waits)
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
    from orchestrator.record import REPORT_NAME, REPORT_PAGE_NAME

    found = jobs.details(client_of(address), job)
    output = Path((found.metadata or {}).get("output", ""))
    kept = [
        output / name
        for name in ("adapter", "model", REPORT_NAME, REPORT_PAGE_NAME, "run.json")
        if (output / name).exists()
    ]
    if found.status in jobs.UNDER_WAY:
        raise RunFailed(f"{job} has not ended: {standing(found)}.", f"qlora-submit wait {job}")
    if not kept:
        where = f"It wrote to {output} of the cluster's nodes, which holds nothing that can be seen from here."
        raise RunFailed(where, "Fetch it from a node, or submit with an output on storage that this machine sees.")
    if to is None:
        for path in kept:
            click.echo(path)
        return 0
    copy_into(to, kept)
    return 0


def copy_into(to: Path, kept: Sequence[Path]) -> None:
    """Copy files and folders into a new or empty folder: all of them, or none.

    Raises:
        RequestError: it is not empty, or they cannot be copied there.
    """
    beginning = to / COPYING
    try:
        to.mkdir(parents=True, exist_ok=True)
        if any(path != beginning for path in to.iterdir()):
            raise request_error("--to", to, "it is not empty", "Name a new folder")
        shutil.rmtree(beginning, ignore_errors=True)  # of a copy that broke off
        try:
            for path in kept:
                if path.is_dir():
                    shutil.copytree(path, beginning / path.name)
                else:
                    beginning.mkdir(exist_ok=True)
                    shutil.copy2(path, beginning)
            for path in kept:
                (beginning / path.name).rename(to / path.name)
                click.echo(to / path.name)
        finally:
            shutil.rmtree(beginning, ignore_errors=True)
    except OSError as error:
        rule = f"the result cannot be copied there: {error.strerror or first_line(error)}"
        raise request_error("--to", to, rule, "Name a folder that can be written, with free space") from error


def client_of(address: str) -> JobSubmissionClient:
    """The Jobs API at an address."""
    require_train_extra("qlora-submit")
    from launch import jobs

    return jobs.connect(address)


def waited(client: JobSubmissionClient, job: str, seconds: float = math.inf) -> JobDetails:
    """A job at its end.

    Raises:
        RunFailed: it has not come to it in so many seconds.
    """
    from launch import jobs

    deadline = time.monotonic() + seconds
    while (found := jobs.steadily(client, job, client.get_job_info)).status in jobs.UNDER_WAY:
        if time.monotonic() > deadline:
            raise RunFailed(
                f"{job} has not ended {seconds:.0f} s after Ray was asked to.", f"qlora-submit status {job}"
            )
        time.sleep(POLL_SECONDS)
    return found


def followed(client: JobSubmissionClient, job: str) -> int:
    """Print what a job prints until it ends; the exit code is the run's."""
    from launch import jobs

    shown = 0
    while True:
        ended = (found := jobs.steadily(client, job, client.get_job_info)).status not in jobs.UNDER_WAY
        text = jobs.steadily(client, job, client.get_job_logs)
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


def standing(job: JobDetails) -> str:
    """A job's status in a word: Ray's, but one that was asked to stop has not failed."""
    by_us = job.status.value == "FAILED" and job.driver_exit_code == command.INTERRUPTED
    return "stopped" if by_us else str(job.status.value.lower())


def show(job: JobDetails, waits: str | None) -> None:
    """A job, a fact on each line."""
    from launch import jobs

    facts = {"job": job.submission_id, "status": standing(job), **(job.metadata or {})}
    facts |= {"submitted": moment(job.start_time)}
    if job.end_time:
        facts["ended"] = moment(job.end_time)
    if waits is not None:
        facts["waits"] = waits
    elif job.message and standing(job) == "failed":
        facts["Ray says"] = job.message
    if so_far := jobs.progress(Path((job.metadata or {}).get("output", ""))):
        facts["the run"] = so_far
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:<{width}}  {value}")


def moment(milliseconds: int | None) -> str:
    """A time of Ray's, UTC."""
    return "" if not milliseconds else f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%S}"
