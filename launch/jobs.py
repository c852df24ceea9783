"""Runs as jobs of a Ray cluster: what it has, who is already writing, and what became of them (Ray's Jobs API)."""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import ray
from ray.exceptions import RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from tenacity import Retrying, retry_if_exception, retry_if_exception_type, stop_after_delay, wait_fixed

import clusters
import launch
import orchestrator
import qlora_core
from clusters.cluster import Cluster, Pool, chosen_pool
from clusters.errors import Problem, RequestError, first_line, request_error
from launch.report.words import gib
from launch.travel import JobOrder, pack
from orchestrator.machine import Machine, machine_of_pool
from orchestrator.order import WAITING
from orchestrator.places import Place
from orchestrator.plans import Plan
from orchestrator.ray_nodes import cluster_of, gpus_of, types_of
from orchestrator.record import load_record
from orchestrator.spec import RunSpec

PACKAGES = (clusters, launch, orchestrator, qlora_core)
MOST_NODES = 10_000
DASHBOARD = "Give http://HOST:PORT of the dashboard of a head that runs (ray start --head; 8265 by default)"
START_SECONDS = 60
"""A cluster that has just been started takes no jobs for some seconds."""
LOST_SECONDS = 300
"""Who follows a job tries for so long to find a cluster again that does not answer any more."""
DRIVER_BYTES = 1024**3
"""What drives a run on the head: the job's process, and the attempt's."""
HEAD_NODE = "node:__internal_head__"
"""A resource that Ray gives to the head's node."""
UNDER_WAY = (JobStatus.PENDING, JobStatus.RUNNING)
ENTRYPOINT = "python -m launch.job"
NOT_STARTED = f"{WAITING}the head to start it"
"""What Ray says in two sentences of a job that has no room yet, or whose files are not unpacked yet."""
Answer = TypeVar("Answer")


class NoAnswer(RequestError):
    """No Jobs API answers at an address, or it does not any more."""


class Submitted(NamedTuple):
    """A job of a run. `number` counts those of the same output folder."""

    id: str
    number: int
    status: JobStatus


def connect(address: str) -> JobSubmissionClient:
    """The Jobs API of a cluster.

    Args:
        address: http://HOST:PORT of the head's dashboard, 8265 by default.

    Raises:
        RequestError: nothing answers there, it is no Ray, or it refuses the token.
    """
    if not address.startswith(("http://", "https://")):  # Ray would look for something else there, for a minute
        raise request_error("--address", address, "it does not begin with http:// or https://", DASHBOARD)
    logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.ERROR)  # of files of more than 10 MB
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of each package that is uploaded
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers it to what it is given
    try:
        return JobSubmissionClient(address)
    except Exception as error:  # Ray raises what its libraries do: ConnectionError, RuntimeError, its own
        raise no_jobs(address, error) from None


def no_jobs(address: str, error: Exception) -> RequestError:
    """The error of a cluster whose Jobs API cannot be used."""
    if re.search(r"[Aa]uthenticat|[Uu]nauthorized|[Ff]orbidden|\b40[13]\b", str(error)):
        remedy = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
        return request_error("--address", address, token_rule(), remedy)
    rule = f"no Jobs API of a Ray answers there: {first_line(error)}"
    return NoAnswer([Problem("--address", address, rule, DASHBOARD)])


def token_rule() -> str:
    """What is wrong with the token that this machine has for a cluster, where the cluster does not take it."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return "it wants a token, and none is set"
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not os.environ.get("RAY_AUTH_TOKEN"):
        if not file.is_file():
            return f"it wants a token, and there is no file {file}"
        if not file.stat().st_size:
            return f"it wants a token, and the file {file} is empty"
    return "it refuses the token"


def machine_of(address: str, pool: str | None = None, described: Cluster | None = None) -> tuple[Machine, str | None]:
    """What the workers of a cluster run on, and a remark where something is assumed.

    GPUs are those of a pool, by default the one with the most of them; without any, workers are processes on CPUs.

    Args:
        pool: of the description, or without one as `qlora-plan --cluster HOST:PORT` names it.
        described: the pool's GPUs and how many of them are meant; what there is of them the cluster says.

    Raises:
        RequestError: no node is alive, its GPUs are not in the catalogue, or it has no such pool.
    """
    try:
        nodes = [node for node in list_nodes(address, limit=MOST_NODES) if node.state == "ALIVE"]
    except Exception as error:
        raise no_jobs(address, error) from None
    resources: list[Mapping[str, float]] = [node.resources_total for node in nodes]
    if not resources:
        raise request_error("--address", address, "that Ray has no node", "Start one: ray start --address=...")
    if not any(each.get("GPU") for each in resources):
        if pool is not None or described is not None:
            where, given = ("--cluster", described.source) if described is not None else ("--pool", pool)
            raise request_error(where, given, "that Ray has no GPU", "Leave --cluster and --pool out to take its CPUs")
        hosts = [each for each in resources if each.get("CPU")] or resources
        least = min(int(each.get("memory", 0)) for each in hosts)
        # a process a node, unless the specification says otherwise
        name = f"CPUs of {len(hosts)} node{'s' * (len(hosts) > 1)}"
        return Machine(kind="cpu", name=name, devices=len(hosts), memory_bytes=least), None
    found = cluster_of([{"Alive": True, "Resources": each} for each in resources], address)
    if not found.pools:
        raise request_error("--address", address, "; ".join(found.unknown), "Give a cluster whose GPUs are known")
    taken = chosen_pool(found, pool) if described is None else as_described(found, described, pool)
    remarks = [*found.remarks, *(f"not planned for: {each}" for each in found.unknown)]
    kind = None
    if len(found.pools) > 1 and pool is None and described is None:
        others = " or ".join(each.name for each in found.pools if each is not taken)
        remarks.append(f"planned for its {taken.gpus} {taken.gpu.name}; --pool {others} takes others")
    if len(found.pools) > 1 or found.unknown:
        # of a wide and a narrow name, A100 and A100-80G, the one that leaves no doubt
        kind = max(
            (name for each in resources for name in types_of(each) if taken.gpu in gpus_of(types_of(each))), key=len
        )
    currency = None if described is None else described.currency
    return machine_of_pool(taken, kind, currency), "; ".join(remarks) or None


def as_described(found: Cluster, described: Cluster, name: str | None) -> Pool:
    """What a running Ray has of a described pool: its GPUs, on no more nodes, with no more memory than were meant.

    Without a name it is the one with the most of them.

    Network, NVLink and price, of which Ray says nothing, are those of the description.

    Raises:
        RequestError: it has no such nodes.
    """
    wanted = chosen_pool(described, name)
    for pool in found.pools:
        if (pool.gpu, pool.gpus_per_node) == (wanted.gpu, wanted.gpus_per_node):
            return replace(
                pool,
                nodes=min(pool.nodes, wanted.nodes),
                host_ram_bytes=min(filter(None, (pool.host_ram_bytes, wanted.host_ram_bytes)), default=None),
                network_bytes_per_s=wanted.network_bytes_per_s,
                nvlink=wanted.nvlink,
                price_per_hour=wanted.price_per_hour,
            )
    where, given = ("--pool", name) if name is not None else ("--cluster", described.source)
    rule = f"no node of {found.source} has {wanted.gpus_per_node} {wanted.gpu.name}, as its pool {wanted.name} has"
    there = ", ".join(f"{pool.nodes} with {pool.gpus_per_node} {pool.gpu.name}" for pool in found.pools)
    raise request_error(where, given, rule, f"Start such nodes, or give another pool by --pool: there are {there}")


# --- submitting -------------------------------------------------------------------------------------------------------


def jobs_of(client: JobSubmissionClient, spec: RunSpec) -> list[Submitted]:
    """The jobs of a run's output folder, under whatever name, in their order."""
    found = []
    for job in client.list_jobs():
        matched = re.fullmatch(rf".+-{folder_digest(spec)}-(\d+)", job.submission_id or "")
        if matched and job.submission_id:
            found.append(Submitted(job.submission_id, int(matched[1]), job.status))
    return sorted(found, key=lambda job: job.number)


def id_stem(spec: RunSpec) -> str:
    """What the ids of a run's jobs begin with: its name, and what tells its output folder from others."""
    return f"{spec.name}-{folder_digest(spec)}"


def folder_digest(spec: RunSpec) -> str:
    """What tells a run's output folder from others in the ids of jobs."""
    return hashlib.sha256(spec.output.encode()).hexdigest()[:8]


def submit(
    client: JobSubmissionClient, spec: RunSpec, order: JobOrder, plan: Plan, local: Mapping[Place, Path], folder: Path
) -> str:
    """Submit a run that was planned; returns the job's id.

    The id follows from the output folder and the jobs that it has had, and Ray takes an id once: of two submitters at
    the same time one is refused.

    Args:
        local: what `travelling` found.
        folder: an empty one, for what travels.

    Raises:
        RequestError: the run is under way.
    """
    before = jobs_of(client, spec)
    for job in before:
        if job.status in UNDER_WAY:
            raise under_way(spec, job.id)
    pack(spec, order, local, folder)
    wanted = f"{id_stem(spec)}-{before[-1].number + 1 if before else 1}"
    retrying = Retrying(
        stop=stop_after_delay(START_SECONDS), wait=wait_fixed(2), retry=retry_if_exception(is_starting), reraise=True
    )
    try:
        return str(
            retrying(
                client.submit_job,
                entrypoint=ENTRYPOINT,
                submission_id=wanted,
                runtime_env={
                    "working_dir": str(folder),
                    "py_modules": [str(Path(str(package.__file__)).parent) for package in PACKAGES],
                    "excludes": ["__pycache__"],
                },
                metadata=metadata(spec, plan),
                # beside the head, whose end is the cluster's too, and no more of them than its memory holds
                entrypoint_memory=DRIVER_BYTES,
                entrypoint_resources={HEAD_NODE: 0.001},
            )
        )
    except (RuntimeError, OSError, RayError) as error:
        if "already exists" in str(error):
            raise under_way(spec, wanted) from None
        raise no_jobs(client.get_address(), error) from None


def is_starting(error: BaseException) -> bool:
    """Whether a cluster has only just begun, and takes no jobs yet."""
    return "No available agent" in str(error)


def under_way(spec: RunSpec, job: str) -> RequestError:
    """The error of a second writer."""
    rule = f"the run in that folder is under way as the job {job}"
    return request_error("output", spec.output, rule, f"Follow it: qlora-submit logs {job} --follow; or stop it first")


def metadata(spec: RunSpec, plan: Plan) -> dict[str, str]:
    """What Ray shows of the job to everybody who may see the cluster: nothing secret."""
    return {
        "run": spec.name,
        "model": Path(spec.model).name if Path(spec.model).is_absolute() else spec.model,
        "output": spec.output,
        "owner": getpass.getuser(),
        "plan": plan.digest,
        "predicted": f"{gib(plan.estimate.gpu.process_bytes)} a worker",
        "workers": str(plan.strategy.world_size),
    }


# --- afterwards -------------------------------------------------------------------------------------------------------


@contextmanager
def known(client: JobSubmissionClient, job: str) -> Iterator[None]:
    """Turn Ray's error about a job that it does not know into one of ours."""
    try:
        yield
    except (RuntimeError, OSError, RayError) as error:  # OSError: a connection that breaks off
        if isinstance(error, RuntimeError) and re.search("does not exist|status code 404", str(error)):
            rule = "that cluster knows no such job"
            raise request_error("JOB", job, rule, "qlora-submit list shows those it knows") from None
        raise no_jobs(client.get_address(), error) from None


def steadily(client: JobSubmissionClient, job: str, ask: Callable[[str], Answer]) -> Answer:
    """What a cluster that has answered before says of a job, also where the connection is lost for some minutes.

    Raises:
        RequestError: it knows no such job, or is not to be found again.
    """

    def asked() -> Answer:
        with known(client, job):
            return ask(job)

    stop = stop_after_delay(LOST_SECONDS)
    retrying = Retrying(stop=stop, wait=wait_fixed(2), retry=retry_if_exception_type(NoAnswer), reraise=True)
    try:
        return retrying(asked)
    except NoAnswer as error:
        rule = f"the connection was lost, and for {LOST_SECONDS} s nothing has answered; the job goes on without it"
        remedy = f"Later: qlora-submit wait {job}"
        raise request_error("--address", client.get_address(), rule, remedy) from error


def details(client: JobSubmissionClient, job: str) -> JobDetails:
    """What Ray knows of a job.

    Raises:
        RequestError: it knows no such job.
    """
    with known(client, job):
        return client.get_job_info(job)


def ours(jobs: Sequence[JobDetails]) -> list[JobDetails]:
    """Those that are runs, the newest first."""
    return sorted(
        (job for job in jobs if job.submission_id and "run" in (job.metadata or {}) and job.entrypoint == ENTRYPOINT),
        key=lambda job: job.start_time or 0,
        reverse=True,
    )


def progress(output: Path) -> str | None:
    """How far a run has come, by its files, where they can be seen from here."""
    record = load_record(output)
    if record is None:
        return None
    last = None
    events = output / "events.jsonl"
    if events.exists():
        for line in events.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n") and (event := json.loads(line))["event"] in ("step", "phase"):
                last = event
    where = "" if last is None else f", {last['phase']}" if last["event"] == "phase" else f", step {last['step']}"
    return f"{record.status}, attempt {len(record.attempts)}{where} of {record.total_steps} steps"


def says(client: JobSubmissionClient, job: JobDetails) -> str | None:
    """What a job waits for, in its own words or in Ray's; None where it waits for nothing."""
    if job.status is JobStatus.PENDING:
        return NOT_STARTED
    if job.status is not JobStatus.RUNNING or job.submission_id is None:
        return None
    with known(client, job.submission_id):
        lines = client.get_job_logs(job.submission_id).splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return last if last.startswith(WAITING) else None


def another_ray(client: JobSubmissionClient) -> str | None:
    """A remark where the head runs another version of Ray than this machine."""
    version = client.get_version()
    answer = client._do_request("GET", "/api/version")
    theirs = answer.json().get("ray_version", version)
    return None if theirs == ray.__version__ else f"The head runs Ray {theirs}, this machine {ray.__version__}."
