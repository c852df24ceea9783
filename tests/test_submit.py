"""Runs submitted to a real Ray head with token authentication, whose two nodes have a CPU each."""

from __future__ import annotations

import subprocess
import threading
import time
import venv
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from click.testing import CliRunner
from job_clusters import SECRET, job_cluster
from job_clusters import Cluster as JobCluster
from ray.job_submission import JobStatus
from real_runs import TIMEOUT, Run, make_run

from clusters.cluster import Cluster, load_cluster
from clusters.errors import RequestError
from launch import jobs
from launch.jobs import id_stem
from launch.submit import beside, check_cluster, submit
from orchestrator.machine import Machine
from orchestrator.spec import load_spec

STEPS = 300


@pytest.fixture(scope="module")
def cluster() -> Iterator[JobCluster]:
    with job_cluster() as found, found.node("127.0.0.2"), found.node("127.0.0.3"):
        yield found


def run_of(folder: Path, base: Path, data: Path, steps: int) -> Run:
    recipe = {"steps": steps, "optimizer": "adamw", "dropout": 0.0, "learning_rate": 1e-3}
    return make_run(folder, base, data, recipe=recipe, checkpoints={"every_steps": 50}, evaluation={})


@pytest.mark.slow
@pytest.mark.xdist_group("cluster")
def test_of_two_submitters_one_writes(
    tmp_path: Path, tiny_base: Path, conversations: Path, cluster: JobCluster
) -> None:
    run = run_of(tmp_path, tiny_base, conversations, steps=4)
    specification = str(run.specification)
    both = [cluster.start(run, specification, "--follow") for _ in range(2)]
    ended = sorted((process.wait(TIMEOUT), process.communicate()[0]) for process in both)
    assert [code for code, _ in ended] == [0, 2], ended
    job = f"{id_stem(load_spec(run.specification))}-1"
    assert f"Submitted as {job}." in ended[0][1]
    assert "Run tiny: complete" in ended[0][1]
    assert f"under way as the job {job}" in ended[1][1]
    assert [event["step"] for event in run.events() if event["event"] == "step"] == [1, 2, 3, 4]
    code, output = cluster.ask(run, "result", job, "--to", str(tmp_path / "mine"))
    assert code == 0, output
    assert (tmp_path / "mine" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "mine" / "report.md").is_file()
    code, output = cluster.ask(run, specification)
    assert code == 0
    assert "complete already; nothing was submitted" in output
    code, output = cluster.ask(run, specification, "seed=7")
    assert code == 2
    assert "was started with" in output, "another run is not complete because this one is"
    for secret in (SECRET, Path(cluster.users["RAY_AUTH_TOKEN_PATH"]).read_text()):
        assert secret not in cluster.shown()
        assert secret not in cluster.ask(run, "logs", job)[1]


@pytest.mark.chaos
@pytest.mark.xdist_group("cluster")
def test_a_stopped_run_goes_on_when_it_is_submitted_again(
    tmp_path: Path, tiny_base: Path, conversations: Path, cluster: JobCluster
) -> None:
    run = run_of(tmp_path, tiny_base, conversations, steps=STEPS)
    specification = str(run.specification)
    job = f"{id_stem(load_spec(run.specification))}-1"
    code, output = cluster.ask(run, specification)
    assert code == 0, output
    assert f"Submitted as {job}." in output
    deadline = time.monotonic() + TIMEOUT
    while not any(event["event"] == "step" and event["step"] >= 10 for event in run.events()):
        assert time.monotonic() < deadline, cluster.ask(run, "logs", job)[1]
        time.sleep(0.2)
    code, output = cluster.ask(run, "status", job)
    assert code == 0
    assert "running" in output
    assert f"of {STEPS} steps" in output
    code, output = cluster.ask(run, "stop", job)
    assert code == 0, output
    assert cluster.ask(run, "wait", job)[0] == 130
    [first] = run.record["attempts"]
    assert first["status"] == "interrupted"
    assert first["to_step"] % 50  # a checkpoint of its own, between those that were due

    code, output = cluster.ask(run, specification, "--follow")
    assert code == 0, output
    assert f"Submitted as {job[:-1]}2." in output
    assert "Run tiny: complete" in output
    assert [event["step"] for event in run.events() if event["event"] == "step"] == list(range(1, STEPS + 1))
    code, output = cluster.ask(run, "list")
    listed = [line.split()[:2] for line in output.splitlines()[1:]]
    assert [words for words in listed if words[0].startswith(job[:-1])] == [
        [f"{job[:-1]}2", "succeeded"],
        [job, "stopped"],
    ]


@pytest.mark.slow
@pytest.mark.xdist_group("cluster")
def test_a_cluster_that_does_not_answer_is_told_in_a_line(
    tmp_path: Path, tiny_base: Path, conversations: Path, cluster: JobCluster
) -> None:
    run = run_of(tmp_path, tiny_base, conversations, steps=2)
    (tmp_path / "wrong").write_text("not the token")
    (tmp_path / "none").write_text("")
    wrong, none = ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / name)} for name in ("wrong", "none"))
    password = cluster.address.replace("://", "://someone:hunter22@")
    for users, address, message in (
        ({**cluster.users, **wrong}, cluster.address, "it refuses the token"),
        ({**cluster.users, **wrong}, password, "it refuses the token (got http://***@127.0.0.1:"),
        ({**cluster.users, **none}, cluster.address, f"the file {tmp_path}/none is empty"),
        ({"HOME": str(tmp_path)}, cluster.address, "it wants a token, and none is set"),
        (cluster.users, "http://127.0.0.1:9", "no Jobs API of a Ray answers there"),
        (cluster.users, cluster.address.removeprefix("http://"), "it does not begin with http:// or https://"),
        ({**cluster.users, "RAY_AUTH_TOKEN_PATH": "/nonexist"}, cluster.address, "there is no file /nonexist"),
        ({"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}, cluster.address, f"no file {tmp_path}/.ray/auth_token"),
    ):
        code, output = JobCluster(address, users).ask(run, "list")
        assert code == 2
        assert message in output
        assert "hunter22" not in output
        assert len(output.splitlines()) == 1
    code, output = cluster.ask(run, "status", "nothing")
    assert (code, "knows no such job" in output) == (2, True)


@pytest.mark.slow
@pytest.mark.xdist_group("cluster")
def test_a_job_that_ray_has_not_started_is_stopped_at_once_and_shown_in_a_line(
    tmp_path: Path, tiny_base: Path, conversations: Path, cluster: JobCluster
) -> None:
    run = run_of(tmp_path, tiny_base, conversations, steps=2)
    resources = '--entrypoint-resources={"nobody has it": 1}'
    cluster.ray("submit", "--no-wait", "--submission-id=never", resources, "--", "sleep", "1")
    assert "waiting for the head to start it" in cluster.ask(run, "status", "never")[1]
    code, output = cluster.ask(run, "stop", "never")
    assert (code, output) == (0, "never has not started: Ray ends it as soon as it would.\n")


@pytest.mark.slow
@pytest.mark.xdist_group("cluster")
def test_a_plan_that_cannot_fit_is_carried_out_if_it_is_forced_and_under_the_names_that_it_was_shown_with(
    tmp_path: Path, tiny_base: Path, conversations: Path
) -> None:
    run = run_of(tmp_path, tiny_base, conversations, steps=2)
    specification = str(run.specification)
    with job_cluster() as cluster, cluster.node("127.0.0.2", f"--memory={2**20}"), cluster.node("127.0.0.3"):
        code, output = cluster.ask(run, specification)
        assert (code, "Change what it shows, or pass --force" in output) == (1, True), output
        code, output = cluster.ask(run, specification, "--force", "--follow")
        assert code == 0, output
        shown = cluster.ask(run, "status", f"{id_stem(load_spec(run.specification))}-1")[1]
    plan = run.record["plan"]
    assert plan["digest"] in shown
    assert plan["model"]["name"] == str(tiny_base)
    assert run.record["status"] == "complete"


HOLD = """
import ray, time
ray.init()
ray.get(ray.util.placement_group([{"CPU": 1}] * 2, strategy="SPREAD").ready())
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.xdist_group("cluster")
def test_a_run_waits_for_what_others_use_says_so_and_begins_when_it_is_free(
    tmp_path: Path, tiny_base: Path, conversations: Path, cluster: JobCluster
) -> None:
    (tmp_path / "hold.py").write_text(HOLD)
    cluster.ray("submit", "--no-wait", "--submission-id=other", "--", "python", str(tmp_path / "hold.py"))
    wait_until(lambda: "\nheld" in cluster.ray("logs", "other"))
    run = run_of(tmp_path, tiny_base, conversations, steps=2)
    specification = str(run.specification)
    code, output = cluster.ask(run, specification, "recovery.wait_minutes=0.2", "--follow")
    assert code == 1, output
    assert "waiting for 2 CPUs at once: 0 of 2 are free" in output
    assert "The devices that the run waited for were not free in time. Start it again" in output
    [attempt] = run.record["attempts"]
    assert (attempt["failure"]["kind"], attempt["decision"]["action"]) == ("no room", "stop")

    code, output = cluster.ask(run, specification)
    assert code == 0, output
    job = f"{id_stem(load_spec(run.specification))}-2"
    waits = "waiting for 2 CPUs at once: 0 of 2 are free"
    wait_until(lambda: waits in cluster.ask(run, "status", job)[1])
    assert waits in cluster.ask(run, "list")[1]
    cluster.ray("stop", "--no-wait", "other")
    assert cluster.ask(run, "wait", job)[0] == 0
    assert run.record["status"] == "complete"


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_python_without_our_packages_is_told_in_a_line(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    done = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", "-m", "launch.job"],
        env={"PYTHONPATH": str(Path(__file__).parent.parent)},  # as Ray adds what travelled
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "has no click. Install qlora-orchestrator[train] for the `python` on PATH" in done.stderr
    assert len(done.stderr.splitlines()) == 1


class StandInForAnotherRay(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"version": "4", "ray_version": "9.9.9", "ray_commit": "none", "session_name": "s"}')

    def log_message(self, *_: Any) -> None:
        pass


def test_a_stand_in_for_a_head_of_another_ray_is_remarked() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), StandInForAnotherRay) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = jobs.connect(f"http://127.0.0.1:{server.server_port}")
        remark = jobs.another_ray(client)
        server.shutdown()
    assert remark == f"The head runs Ray 9.9.9, this machine {ray.__version__}."


def described(*resources: dict[str, float]) -> list[Any]:
    """Nodes as Ray's state API lists them, the first of them dead."""
    alive = [SimpleNamespace(state="ALIVE", resources_total=each) for each in resources]
    return [SimpleNamespace(state="DEAD", resources_total={"GPU": 99.0, "accelerator_type:H200": 1.0}), *alive]


def test_the_plan_is_for_what_the_cluster_says_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"CPU": 8.0, "memory": 2.0**37}
    a100 = {**memory, "GPU": 8.0, "accelerator_type:A100-80G": 1.0, "accelerator_type:A100": 1.0}
    l40s = {**memory, "GPU": 4.0, "accelerator_type:L40S": 1.0}
    head = {"CPU": 0.0, "memory": 2.0**33}

    def machine(*nodes: dict[str, float]) -> tuple[Machine, str | None]:
        monkeypatch.setattr(jobs, "list_nodes", lambda address, limit: described(*nodes))
        return jobs.machine_of("http://there")

    found, remark = machine(head, a100, a100, l40s)
    assert (found.kind, found.name, found.devices) == ("cuda", "a100-80gb", 16)
    assert (found.compute_capability, found.accelerator_type) == ((8, 0), "A100-80G")
    assert remark == "planned for its 16 a100-80gb; --pool l40s-x4 takes others"
    found, remark = machine(head, a100)
    assert (found.devices, found.accelerator_type, remark) == (8, None, None)  # there are no others to land on
    mi300x, unnamed = {**memory, "GPU": 8.0, "accelerator_type:MI300X": 1.0}, {**memory, "GPU": 2.0}
    found, remark = machine(head, l40s, mi300x, unnamed)
    assert (found.name, found.devices, found.accelerator_type) == ("l40s", 4, "L40S")  # but for that on any of the 14
    assert remark == (
        "not planned for: 8 GPUs: Ray calls them MI300X; not planned for: 2 GPUs: Ray does not say what they are"
    )
    found, remark = machine(head, memory, {**memory, "memory": 2.0**36})
    assert (found.kind, found.devices, found.memory_bytes, remark) == ("cpu", 2, 2**36, None)
    with pytest.raises(RequestError, match="Ray calls them TPU-V9"):
        machine({**memory, "GPU": 1.0, "accelerator_type:TPU-V9": 1.0})
    with pytest.raises(RequestError, match="that Ray has no node"):
        machine()


TEAM = """
name: team
currency: EUR
pools:
- {name: big, gpu: a100-80gb, gpus_per_node: 8, nodes: 4, price_per_hour: 20}
- {name: desk, gpu: l40s, gpus_per_node: 4}
- {name: new, gpu: h200, gpus_per_node: 8}
"""


def test_a_pool_is_chosen_by_name_or_by_the_description_that_plans_were_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a100, l40s = ({"GPU": gpus, f"accelerator_type:{name}": 1.0} for name, gpus in (("A100-80G", 8.0), ("L40S", 4.0)))
    (tmp_path / "team.yaml").write_text(TEAM)
    team = load_cluster(tmp_path / "team.yaml")

    def machine(pool: str | None, cluster: Cluster | None = None, nodes: int = 2) -> tuple[str, int, str | None]:
        monkeypatch.setattr(jobs, "list_nodes", lambda address, limit: described(a100, a100, *[l40s] * nodes))
        found, remark = jobs.machine_of("http://there", pool, cluster)
        assert remark is None
        return found.name, found.devices, found.accelerator_type

    assert machine("l40s-x4") == ("l40s", 8, "L40S")
    assert machine("desk", team) == ("l40s", 4, "L40S")  # of the two nodes that are there one was meant
    assert machine("big", team) == ("a100-80gb", 16, "A100-80G")  # of the four that were meant two are there
    assert machine(None, team) == ("a100-80gb", 16, "A100-80G")
    priced, _ = jobs.machine_of("http://there", "big", team)
    assert (priced.node_hour_price, priced.currency) == (20, "EUR")
    unpriced, _ = jobs.machine_of("http://there")
    assert (unpriced.node_hour_price, unpriced.currency) == (None, None)
    (tmp_path / "largest.yaml").write_text("name: l\npools:\n- {name: most, gpu: h200, gpus_per_node: 16, nodes: 9}\n")
    largest = load_cluster(tmp_path / "largest.yaml")
    for pool, cluster, message in (
        ("desk", None, "Ray at http://there has no such pool (got desk). Give one of a100-80gb-x8, l40s-x4"),
        ("new", team, "no node of Ray at http://there has 8 h200, as its pool new has (got new)"),
        (
            None,
            largest,
            f"--cluster: no node of Ray at http://there has 16 h200, as its pool most has (got {largest.source})",
        ),
        ("old", team, "team.yaml has no such pool (got old). Give one of big, desk, new"),
    ):
        with pytest.raises(RequestError) as error:
            machine(pool, cluster)
        assert message in str(error.value)
    monkeypatch.setattr(jobs, "list_nodes", lambda address, limit: described({"CPU": 8.0}))
    with pytest.raises(RequestError, match="that Ray has no GPU"):
        jobs.machine_of("http://there", "desk")


def test_network_nvlink_and_memory_are_the_descriptions_and_no_more_memory_than_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"GPU": 2.0, "accelerator_type:A100-80G": 1.0, "memory": 24.0 * 2**30, "object_store_memory": 8.0 * 2**30}
    monkeypatch.setattr(jobs, "list_nodes", lambda address, limit: described(node, node))
    pool = "{name: p, gpu: a100-80gb, gpus_per_node: 2, nodes: 2, network_gbit_per_s: 10, nvlink: false"
    for stated, expected in ((", host_ram_gib: 16}", 16), (", host_ram_gib: 64}", 32), ("}", 32)):
        (tmp_path / "team.yaml").write_text(f"name: team\npools:\n- {pool}{stated}\n")
        found, _ = jobs.machine_of("http://there", None, load_cluster(tmp_path / "team.yaml"))
        assert (found.gpus_per_node, found.nvlink, found.network_bytes_per_s) == (2, False, 1_250_000_000)
        assert found.host_ram_bytes == expected * 2**30
    found, _ = jobs.machine_of("http://there")
    assert (found.gpus_per_node, found.nvlink, found.network_bytes_per_s) == (2, True, None)  # by the kind of GPU
    assert found.host_ram_bytes == 32 * 2**30


@pytest.mark.parametrize("options", [("--address", "http://10.0.0.1:8265"), ("--render", "slurm")])
def test_a_specification_that_names_another_cluster_is_refused(
    tmp_path: Path, tiny_base: Path, conversations: Path, options: tuple[str, ...]
) -> None:
    run = run_of(tmp_path, tiny_base, conversations, steps=2)
    asked = [str(run.specification), "cluster={address: '10.9.9.9:6379'}", *options]
    found = CliRunner().invoke(submit, asked, standalone_mode=False)
    assert isinstance(found.exception, RequestError)
    assert "cluster.address: the run is handed to" in str(found.exception)
    check_cluster(load_spec(run.specification, ["cluster={address: '10.0.0.1:6379'}"]), "http://10.0.0.1:8265")


class Listing:
    """A stand-in for a Jobs API, with jobs of those ids."""

    def __init__(self, *jobs: str) -> None:
        self._jobs = jobs

    def list_jobs(self) -> list[Any]:
        return [SimpleNamespace(submission_id=job, status=JobStatus.RUNNING) for job in self._jobs]


def test_a_folder_has_one_writer_whatever_the_run_is_called_and_fresh_takes_the_next_that_is_free(
    tmp_path: Path, tiny_base: Path, conversations: Path
) -> None:
    spec = load_spec(run_of(tmp_path, tiny_base, conversations, steps=2).specification)
    client: Any = Listing("other-run", f"{id_stem(spec.model_copy(update={'name': 'another'}))}-3")
    assert [job.number for job in jobs.jobs_of(client, spec)] == [3]
    (tmp_path / "out-2" / "checkpoints").mkdir(parents=True)
    assert beside(spec, client).output == str(tmp_path / "out-3")
    assert beside(spec, None).output == spec.output


def test_two_output_folders_have_jobs_of_unlike_names(tmp_path: Path, tiny_base: Path, conversations: Path) -> None:
    stems = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        stems.add(id_stem(load_spec(run_of(tmp_path / name, tiny_base, conversations, steps=2).specification)))
    assert len(stems) == 2
