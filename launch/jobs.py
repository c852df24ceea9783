"""Runs as jobs of a Ray cluster: what travels, who is already writing, and what became of it (Ray's Jobs API)."""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
import yaml
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

import clusters
import launch
import orchestrator
import qlora_core
from clusters.errors import RequestError, first_line, request_error
from launch.report.words import gib
from orchestrator.machine import Machine, machine_of_pool
from orchestrator.order import WAITING
from orchestrator.places import places, put
from orchestrator.plans import Plan
from orchestrator.ray_nodes import cluster_of, gpus_of, types_of
from orchestrator.record import load_record
from orchestrator.spec import RunSpec

PACKAGES = (clusters, launch, orchestrator, qlora_core)
TRAVELS_BYTES = 100 * 1000**2
"""Local files up to so much go along with a job; Ray itself refuses more than 500 MiB."""
MOST_NODES = 10_000
START_SECONDS = 60
"""A cluster that has just been started takes no jobs for some seconds."""
DRIVER_BYTES = 1024**3
"""What drives a run on the head: the job's process, and the attempt's."""
HEAD_NODE = "node:__internal_head__"
"""A resource that Ray gives to the head's node."""
UNDER_WAY = (JobStatus.PENDING, JobStatus.RUNNING)
ORDER_FILE, SPECIFICATION = "machine.json", "run.yaml"
ENTRYPOINT = "python -m launch.job"


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
        has_one = os.environ.get("RAY_AUTH_MODE") == "token"
        rule = "it refuses the token" if has_one else "it wants a token, and none is set"
        remedy = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file with the cluster's token"
    else:
        rule = f"no Jobs API of a Ray answers there: {first_line(error)}"
        remedy = "Give http://HOST:PORT of the dashboard of a head that runs (ray start --head; 8265 by default)"
    return request_error("--address", address, rule, remedy)


def machine_of(address: str) -> tuple[Machine, str | None]:
    """What the workers of a cluster run on, and a remark where something is assumed.

    GPUs are those of the pool with the most of them; without any, workers are processes on its CPUs.

    Raises:
        RequestError: no node is alive, or its GPUs are not in the catalogue.
    """
    try:
        nodes = [node for node in list_nodes(address, limit=MOST_NODES) if node.state == "ALIVE"]
    except Exception as error:
        raise no_jobs(address, error) from None
    resources: list[Mapping[str, float]] = [node.resources_total for node in nodes]
    if not resources:
        raise request_error("--address", address, "that Ray has no node", "Start one: ray start --address=...")
    if not any(each.get("GPU") for each in resources):
        hosts = [each for each in resources if each.get("CPU")] or resources
        least = min(int(each.get("memory", 0)) for each in hosts)
        # a process a node, unless the specification says otherwise
        return Machine(kind="cpu", name=f"CPUs of {len(hosts)} nodes", devices=len(hosts), memory_bytes=least), None
    found = cluster_of([{"Alive": True, "Resources": each} for each in resources], address)
    if not found.pools:
        raise request_error("--address", address, "; ".join(found.unknown), "Give a cluster whose GPUs are known")
    pool = max(found.pools, key=lambda pool: pool.gpus)
    remarks = list(found.remarks)
    kind = None
    if len(found.pools) > 1:
        remarks.append(f"planned for its {pool.gpus} {pool.gpu.name}; it has other GPUs, too")
        # of a wide and a narrow name, A100 and A100-80G, the one that leaves no doubt
        kind = max(
            (name for each in resources for name in types_of(each) if pool.gpu in gpus_of(types_of(each))), key=len
        )
    return machine_of_pool(pool, kind), "; ".join(remarks) or None


# --- submitting -------------------------------------------------------------------------------------------------------


def jobs_of(client: JobSubmissionClient, spec: RunSpec) -> list[Submitted]:
    """The jobs of a run's output folder, in their order."""
    stem = id_stem(spec)
    found = []
    for job in client.list_jobs():
        matched = re.fullmatch(rf"{re.escape(stem)}-(\d+)", job.submission_id or "")
        if matched and job.submission_id:
            found.append(Submitted(job.submission_id, int(matched[1]), job.status))
    return sorted(found, key=lambda job: job.number)


def id_stem(spec: RunSpec) -> str:
    """What the ids of a run's jobs begin with: its name, and what tells its output folder from others."""
    return f"{spec.name}-{hashlib.sha256(spec.output.encode()).hexdigest()[:8]}"


def submit(client: JobSubmissionClient, spec: RunSpec, machine: Machine, plan: Plan, folder: Path) -> str:
    """Submit a run that was planned for `machine`; returns the job's id.

    The id follows from the output folder and the jobs that it has had, and Ray takes an id once: of two submitters at
    the same time one is refused.

    Args:
        folder: an empty one, for what travels.

    Raises:
        RequestError: the run is under way, or too much would have to travel.
    """
    before = jobs_of(client, spec)
    if before and before[-1].status in UNDER_WAY:
        raise under_way(spec, before[-1].id)
    pack(spec, machine, folder)
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
    except RuntimeError as error:
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


def pack(spec: RunSpec, machine: Machine, folder: Path) -> None:
    """Put into `folder` what the job needs: the specification, what it was planned for, and local files that it names.

    Raises:
        RequestError: they are larger than what may travel.
    """
    fields = fields_of(spec)
    local = {place: Path(text) for place, text in places(fields).items() if place != ("output",)}
    local = {place: path for place, path in local.items() if path.is_absolute() and path.exists()}
    size = sum(map(size_of, local.values()))
    if size > TRAVELS_BYTES:
        large = max(local, key=lambda place: size_of(local[place]))
        raise request_error(
            ".".join(large),
            local[large],
            f"{size / 1e6:,.0f} MB would have to travel, and at most {TRAVELS_BYTES / 1e6:.0f} MB do",
            "Put it on storage that all nodes see, and name it by an address (s3://...) or a Hub id",
        )
    for place, path in local.items():
        target = folder / ".".join(place) / path.name
        target.parent.mkdir()
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copy2(path, target)
        put(fields, place, str(target.relative_to(folder)))
    for name, text in texts_of(fields, machine).items():
        (folder / name).write_text(text, encoding="utf-8")


def fields_of(spec: RunSpec) -> dict[str, Any]:
    """A specification for a job, whose cluster is the one that it is in."""
    fields = spec.model_dump(mode="json", exclude_unset=True) | {"output": spec.output}
    fields.pop("cluster", None)
    return fields


def texts_of(fields: Mapping[str, Any], machine: Machine) -> dict[str, str]:
    """What `launch.job` reads, by the files' names: the specification, and what it was planned for."""
    return {
        SPECIFICATION: yaml.safe_dump(dict(fields), sort_keys=False),
        ORDER_FILE: json.dumps(dataclasses.asdict(machine)) + "\n",
    }


def size_of(path: Path) -> int:
    """Bytes of a file, or of all below a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


# --- afterwards -------------------------------------------------------------------------------------------------------


@contextmanager
def known(client: JobSubmissionClient, job: str) -> Iterator[None]:
    """Turn Ray's error about a job that it does not know into one of ours."""
    try:
        yield
    except RuntimeError as error:
        if "does not exist" in str(error) or "404" in str(error):
            rule = "that cluster knows no such job"
            raise request_error("JOB", job, rule, "qlora-submit list shows those it knows") from None
        raise no_jobs(client.get_address(), error) from None


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
        return job.message or None
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
