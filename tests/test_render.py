"""Manifests: valid by the schemas of those who read them, sized by the plan, and carried out where that can be here."""

from __future__ import annotations

import copy
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from job_clusters import job_cluster
from ray.autoscaler._private.command_runner import SSHCommandRunner
from ray.autoscaler._private.util import fillout_defaults
from real_runs import Run, make_run

from clusters.errors import RequestError
from clusters.gpu import GIB
from clusters.kuberay import LONGEST_NAME, resource_name
from clusters.workload import Workload, nodes_for
from launch.plan import plan
from launch.render import Asked, place
from launch.submit import submit
from launch.travel import read_order
from orchestrator.machine import target_of
from orchestrator.prepare import prepare
from orchestrator.spec import load_spec

RAY_JOB = Path(__file__).parent / "data" / "kuberay" / "rayjobs-v1.schema.json.gz"
TEAM = """
name: team
region: eu-central-1
pools:
- {name: big, gpu: a100-80gb, gpus_per_node: 8, nodes: 2, host_ram_gib: 2048,
   node_labels: {nvidia.com/gpu.product: NVIDIA-A100-SXM4-80GB}, partition: a100, instance_type: p4de.24xlarge}
- {name: desk, gpu: rtx-4090, gpus_per_node: 4, nodes: 2, hosts: [10.0.0.1], ssh_user: ada}
"""

Render = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, tiny_base: Path, conversations: Path) -> Run:
    return make_run(tmp_path, tiny_base, conversations, checkpoints={"every_steps": 2})


@pytest.fixture
def render(run: Run, tmp_path: Path) -> Render:
    (tmp_path / "team.yaml").write_text(TEAM)

    def ask(form: str, *options: str) -> Result:
        found = CliRunner().invoke(
            submit, [str(run.specification), "--render", form, *options], standalone_mode=False, catch_exceptions=True
        )
        if found.exception is not None and not isinstance(found.exception, RequestError):
            raise found.exception
        return found

    return ask


def documents(result: Result) -> tuple[dict[str, Any], dict[str, Any]]:
    config, job = yaml.safe_load_all(result.stdout)
    return config, job


VOLUME = ("--volume", "runs:/")
"""Every path of a test lies on it."""


def workers(number: int) -> tuple[str, ...]:
    """A sequence of a step for each."""
    return (f"strategy.world_size={number}", "strategy.micro_batch=1", f"recipe.tokens_per_step={64 * number}")


TEAMS_GPUS = ("--cluster", "team.yaml", *workers(8))


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    monkeypatch.chdir(tmp_path)
    return TEAMS_GPUS


# --- KubeRay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [False, True], ids=["on CPUs", "on GPUs"])
def test_pods_and_config_are_what_kubernetes_own_schema_takes_and_no_field_more(
    render: Render, team: tuple[str, ...], gpus: bool
) -> None:
    more = (*team, "--secret", "hub") if gpus else ()
    config, job = documents(render("kuberay", *VOLUME, *more))
    kubernetes_validate.validate(config, "1.31", strict=True)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pods = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": job["metadata"], "template": group["template"]}
        kubernetes_validate.validate(pods, "1.31", strict=True)


@pytest.mark.parametrize("gpus", [False, True], ids=["on CPUs", "on GPUs"])
def test_a_ray_job_is_what_kuberays_published_definition_takes_and_no_field_more(
    render: Render, team: tuple[str, ...], gpus: bool
) -> None:
    schema = json.loads(gzip.decompress(RAY_JOB.read_bytes()))
    more = (*team, "--secret", "hub", "--queue", "team", "--priority", "high") if gpus else ()
    _, job = documents(render("kuberay", *VOLUME, *more))
    jsonschema.validate(job, closed(schema))
    job["spec"]["entrypointNumCPU"] = 1
    with pytest.raises(jsonschema.ValidationError, match="entrypointNumCPU"):
        jsonschema.validate(job, closed(schema))


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` without fields that it does not name: a cluster drops them without a word."""
    found = copy.deepcopy(schema)
    del found["properties"]["metadata"]  # said elsewhere: ObjectMeta
    found["properties"]["metadata"] = {}
    close(found)
    return found


def close(schema: Any) -> None:
    if isinstance(schema, list):
        for each in schema:
            close(each)
    elif isinstance(schema, dict):
        if "properties" in schema and "x-kubernetes-preserve-unknown-fields" not in schema:
            schema.setdefault("additionalProperties", False)
        for each in schema.values():
            close(each)


def test_workers_have_the_gpus_of_the_plan_on_as_few_nodes_as_can_be_and_its_host_memory(
    render: Render, team: tuple[str, ...]
) -> None:
    config, job = documents(render("kuberay", *VOLUME, *team, "--queue", "team-a", "--priority", "high"))
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 1)
    pod = group["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "8"
    assert pod["containers"][0]["resources"]["requests"] == limits
    assert limits["memory"].endswith("Mi")
    assert int(limits["memory"][:-2]) >= 4 * 1024  # /dev/shm and Ray's processes, before what the plan says
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in json.dumps(head)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert json.loads(config["data"]["order.json"])["machine"]["name"] == "a100-80gb"
    assert job["spec"]["metadata"]["workers"] == "8"


@pytest.mark.parametrize(
    ("number", "per_node", "expected"), [(8, 8, (1, 8)), (12, 8, (2, 6)), (7, 4, (7, 1)), (1, 8, (1, 1))]
)
def test_nodes_are_alike(number: int, per_node: int, expected: tuple[int, int]) -> None:
    assert nodes_for(number, per_node) == expected


def test_with_an_image_nothing_is_installed_and_without_one_all_versions_are_pinned(render: Render) -> None:
    _, job = documents(render("kuberay", *VOLUME, "--image", "registry.example/qlora:7"))
    assert "runtimeEnvYAML" not in job["spec"]
    assert "registry.example/qlora:7" in json.dumps(job)
    _, job = documents(render("kuberay", *VOLUME, "--package", "https://files.example/qlora-0.1.0-py3-none-any.whl"))
    wanted = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["pip"]
    assert wanted[0] == "https://files.example/qlora-0.1.0-py3-none-any.whl"
    assert {name.partition("==")[0] for name in wanted[1:]} >= {"torch", "transformers", "peft", "bitsandbytes"}
    assert all("==" in name and "+" not in name for name in wanted[1:])
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    assert f"rayproject/ray:{ray.__version__}-{python}" in json.dumps(job)


def test_what_no_pod_would_see_is_refused_all_at_once(render: Render, run: Run, tmp_path: Path) -> None:
    missing = render("kuberay").exception
    assert isinstance(missing, RequestError)
    assert "Add --volume CLAIM:MOUNT" in str(missing)
    elsewhere = render("kuberay", "--volume", "runs:/mnt/runs").exception
    assert isinstance(elsewhere, RequestError)
    assert {problem.where for problem in elsewhere.problems} == {"output", "data.path", "model"}
    for wrong in ("runs", "runs:mnt", "Ru ns:/mnt"):
        assert "it is no CLAIM:MOUNT" in str(render("kuberay", "--volume", wrong).exception)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (("--pool", "big"), "no cluster is described"),
        (("--cluster", "team.yaml", "--pool", "small"), "team.yaml has no such pool"),
        (("--follow",), "a manifest is printed, not submitted"),
    ],
)
def test_options_that_say_nothing_are_refused(
    render: Render, team: tuple[str, ...], options: tuple[str, ...], rule: str
) -> None:
    assert rule in str(render("slurm", *options).exception)


@pytest.mark.parametrize(
    ("form", "options", "wrong"),
    [
        ("slurm", ("--secret", "hub", "--volume", "a:/b", "--image", "foo"), ["--image", "--volume", "--secret"]),
        ("ray-cluster", ("--queue", "q", "--priority", "p", "--volume", "v:/x"), ["--volume", "--queue", "--priority"]),
        ("kuberay", ("--queue", "team a!", "--priority", "\u00fcber"), ["--queue", "--priority"]),
        ("kuberay", ("--secret", "My Secret", "--image", ""), ["--image", "--secret"]),
        ("kuberay", ("--image", "foo", "--package", "bar"), ["--package"]),
        ("slurm", ("--queue", "gpu\n#SBATCH --account=other"), ["--queue"]),
    ],
)
def test_options_that_a_form_cannot_take_are_refused_all_at_once(
    render: Render, form: str, options: tuple[str, ...], wrong: list[str]
) -> None:
    found = render(form, *options).exception
    assert isinstance(found, RequestError)
    assert [problem.where for problem in found.problems] == wrong


NODES = """
name: nodes
pools:
- {name: small, gpu: a100-80gb, gpus_per_node: 2, nodes: 8, host_ram_gib: 16, network_gbit_per_s: 10, nvlink: false}
"""


def test_a_manifest_is_planned_for_the_nodes_that_are_described(render: Render, tmp_path: Path) -> None:
    (tmp_path / "nodes.yaml").write_text(NODES)
    config, _ = documents(render("kuberay", *VOLUME, "--cluster", str(tmp_path / "nodes.yaml"), *workers(4)))
    (tmp_path / "order.json").write_text(config["data"]["order.json"])
    target = target_of(read_order(tmp_path).machine, "auto", 4)
    pool = target.pool
    assert pool is not None
    assert (pool.gpus_per_node, pool.nodes, pool.nvlink) == (2, 8, False)
    assert (pool.host_ram_bytes, pool.network_bytes_per_s) == (16 * 1024**3, 1_250_000_000)
    assert target.device.ranks_per_host == 2


@pytest.mark.parametrize("number", ["4", "auto"])
@pytest.mark.parametrize(
    ("stated", "fits"),
    [("host_ram_gib: 64", True), ("host_ram_gib: 0.0001", False), ("network_gbit_per_s: 0.01", True)],
)
def test_a_manifests_plan_says_what_qlora_plan_says_of_the_same_pool(
    run: Run, tiny_base: Path, tmp_path: Path, stated: str, fits: bool, number: str
) -> None:
    cluster = tmp_path / "nodes.yaml"
    cluster.write_text(f"name: nodes\npools:\n- {{name: p, gpu: a100-80gb, gpus_per_node: 2, nodes: 2, {stated}}}\n")
    more = ["recipe.tokens_per_step=256", "recipe.autocast=false", f"strategy.world_size={number}"]
    more += ["strategy.micro_batch=1", "strategy.zero_stage=3", "strategy.offload=none"]
    spec = load_spec(run.specification, more)
    asked = Asked("slurm", cluster, *[None] * 7)
    prepared = prepare(spec, machine=place(asked, spec).machine)
    mine, strategy = prepared.plan, prepared.plan.strategy
    options = ["--micro-batch", "1", "--gpus", "4", "--zero-stage", "3", "--rank", "4", "--lora-dropout", "0.05"]
    options += ["--seq-len", str(prepared.longest), "--attention", strategy.attention, "--loss", strategy.loss]
    options += [] if strategy.gradient_checkpointing else ["--no-gradient-checkpointing"]
    options += ["--optimizer", "paged_adamw_8bit" if strategy.paged_optimizer else "adamw_8bit"]
    asking = ["--model", str(tiny_base), "--cluster", str(cluster), "--json", *options]
    told = CliRunner().invoke(plan, asking, standalone_mode=False)
    assert told.return_value == (0 if fits else 1), told.output
    theirs = json.loads(told.stdout)
    found = mine.to_json()
    assert found["estimate"]["host"] == theirs["estimate"]["host"]
    assert found["verdicts"] == theirs["verdicts"]
    assert mine.fits is fits


@pytest.mark.parametrize("form", ["kuberay", "slurm"])
def test_a_node_larger_than_the_pools_is_not_asked_for(render: Render, tmp_path: Path, form: str) -> None:
    (tmp_path / "nodes.yaml").write_text(NODES.replace("host_ram_gib: 16", "host_ram_gib: 4"))
    options = ("--cluster", str(tmp_path / "nodes.yaml"), *workers(4), *(VOLUME if form == "kuberay" else ()))
    refused = render(form, *options).exception
    # beside the plan 2 GiB of /dev/shm, 2 GiB for Ray and 3 GiB for each of 2 workers, as docs/clusters.md has it
    assert "--cluster: a node is asked for 10." in str(refused)
    assert "and host_ram_gib is 4" in str(refused)


@pytest.mark.parametrize(
    ("workers_per_node", "gpus", "gib"), [(1, False, 6), (8, False, 13), (1, True, 8), (8, True, 29)]
)
def test_a_node_is_asked_for_memory_for_each_of_its_workers(workers_per_node: int, gpus: bool, gib: int) -> None:
    # 1 GiB of the plan; eight workers of a CPU were measured to take 3.2 to 4 GiB before any data
    asked = Workload("n", {}, "/runs/n", {}, 1, workers_per_node, gpus, GIB, "2.56")
    assert asked.node_bytes == gib * GIB


def test_a_plan_whose_host_memory_does_not_suffice_is_not_rendered(render: Render, tmp_path: Path) -> None:
    (tmp_path / "nodes.yaml").write_text(NODES.replace("host_ram_gib: 16", "host_ram_gib: 0.0001"))
    refused = render("ray-cluster", "--cluster", str(tmp_path / "nodes.yaml"), *workers(4))
    assert refused.return_value == 1
    assert "its host needs" in " ".join(refused.stderr.split())
    assert not refused.stdout


def test_options_of_manifests_are_refused_without_one(run: Run) -> None:
    found = CliRunner().invoke(submit, [str(run.specification), "--queue", "team"], standalone_mode=False)
    assert "it is about a manifest" in str(found.exception)


@given(st.text(max_size=120), st.text(max_size=120))
def test_names_are_dns_labels_and_stay_apart(first: str, second: str) -> None:
    name = resource_name(f"{first}-1a2b3c4d")
    assert 1 <= len(name) <= LONGEST_NAME
    assert name[0].isalpha()
    assert not name.endswith("-")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert name == resource_name(f"{first}-1a2b3c4d")
    if len(f"{first}-1a2b3c4d") > LONGEST_NAME and first != second:
        assert name != resource_name(f"{second}-{'x' * LONGEST_NAME}")


@pytest.mark.chaos
@pytest.mark.xdist_group("cluster")
def test_what_a_ray_job_says_is_carried_out_by_a_ray_that_was_started_as_it_says(
    render: Render, run: Run, tmp_path: Path
) -> None:
    """The operator's part, pods, volumes and the image, is done by hand here: there is no Kubernetes."""
    config, job = documents(render("kuberay", *VOLUME, "--image", "this-machine"))
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    for name, text in config["data"].items():
        (mounted / name).write_text(text)
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    started = [f"--{name}={value}" for name, value in group["rayStartParams"].items()]
    with job_cluster() as cluster, cluster.node("127.0.0.2", *started), cluster.node("127.0.0.3", *started):
        entrypoint = job["spec"]["entrypoint"].replace("/etc/qlora", str(mounted))
        submitter = Path(sys.executable).with_name("ray")
        environment = {**run.environment, **cluster.users, "RAY_API_SERVER_ADDRESS": cluster.address}
        options = ["--metadata-json", json.dumps(job["spec"]["metadata"])]
        done = subprocess.run(
            [submitter, "job", "submit", *options, "--", *entrypoint.split()],
            env=environment,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.record["status"] == "complete"
    assert run.record["attempts"][0]["strategy"]["world_size"] == group["replicas"] == 2


# --- Slurm ------------------------------------------------------------------------------------------------------------


def test_a_batch_script_is_a_shells_and_asks_for_what_the_plan_says(render: Render, team: tuple[str, ...]) -> None:
    script = render("slurm", *team, "--priority", "long").stdout
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    for wanted in (
        "exclusive",
        "nodes=1",
        "gpus-per-node=8",
        "partition=a100",
        "qos=long",
        "ntasks-per-node=1",
        "requeue",
    ):
        assert f"#SBATCH --{wanted}\n" in script
    checked = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "--severity=warning", "-"],
        input=script,
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("of_ray", "code", "said"),
    [
        ('while [ "$1" != -- ]; do shift; done; shift; exec "$@"', 3, ""),
        ("echo 'Error: Ray is already started on this node.' >&2; exit 1", 1, "Ray did not start on the nodes"),
    ],
    ids=["the run ends with 3", "Ray does not start"],
)
def test_a_batch_script_with_fakes_of_slurm_and_ray_ends_as_the_run_does(
    render: Render, team: tuple[str, ...], tmp_path: Path, of_ray: str, code: int, said: str
) -> None:
    script = tmp_path / "job.sh"
    script.write_text(render("slurm", *team).stdout)
    fakes = {
        "scontrol": "echo node-1",
        # a step gets as many cores as it asks for
        "srun": 'echo "$@" > asked; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "ray": of_ray,
        "python": "exit 3",
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node-1", "SLURM_JOB_NUM_NODES": "1"}
    cores = {"SLURM_CPUS_PER_TASK": "32"}
    environment = {**os.environ, **slurm, **cores, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "--cpus-per-task=32 " in (tmp_path / "asked").read_text()


# --- Ray's cluster launcher -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["big", "desk"])
def test_a_cluster_for_rays_launcher_is_what_rays_own_schema_takes(
    render: Render, tmp_path: Path, team: tuple[str, ...], pool: str
) -> None:
    number = {"big": 16, "desk": 4}[pool]
    found = render("ray-cluster", "--cluster", "team.yaml", "--pool", pool, *workers(number))
    fields = yaml.safe_load(found.stdout)
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(fields, schema)
    assert "--dashboard-host=127.0.0.1" in fields["head_start_ray_commands"][1]
    if pool == "desk":
        assert fields["provider"] == {"type": "local", "head_ip": "10.0.0.1", "worker_ips": []}
        assert logs_in(fields) == "ada@10.0.0.1"
    else:
        assert fields["provider"] == {"type": "aws", "region": "eu-central-1"}
        node = fields["available_node_types"]["workers"]
        assert node["node_config"] == {"InstanceType": "p4de.24xlarge"}
        assert (node["min_workers"], fields["max_workers"]) == (2, 2)


def logs_in(fields: dict[str, Any]) -> str:
    """Whom Ray's launcher would be on the head, by its own code."""
    whole = fillout_defaults(fields)
    runner = SSHCommandRunner(
        "", "10.0.0.1", None, whole["auth"], whole["cluster_name"], subprocess, use_internal_ip=False
    )
    return f"{runner.ssh_user}@{whole['provider']['head_ip']}"


def test_a_launcher_wants_machines(render: Render, tmp_path: Path, team: tuple[str, ...]) -> None:
    assert "it needs machines to start" in str(render("ray-cluster").exception)
    few = render("ray-cluster", "--cluster", "team.yaml", "--pool", "desk", *workers(8)).exception
    assert "the plan has 2 nodes, and 1 hosts are named" in str(few)
    (tmp_path / "nobody.yaml").write_text(TEAM.replace(", ssh_user: ada", ""))
    nobody = render("ray-cluster", "--cluster", "nobody.yaml", "--pool", "desk", *workers(4)).exception
    assert "Add ssh_user" in str(nobody)
    (tmp_path / "bare.yaml").write_text("name: bare\npools:\n- {name: some, gpu: a100-80gb, gpus_per_node: 8}\n")
    bare = render("ray-cluster", "--cluster", "bare.yaml", *workers(8)).exception
    assert "it says neither the hosts of that pool, nor its instance_type" in str(bare)
