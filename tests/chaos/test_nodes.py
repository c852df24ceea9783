"""Nodes of a real Ray that are taken away, with notice and without: the run goes on with what is left."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray_heads import alive_nodes, drain, kill_tree, ray_head, ray_node
from real_runs import TIMEOUT, Run, make_run
from strikes import Row, Rows

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workers")]

STEPS = 400
GOING = "127.0.0.3"


@dataclass
class Cluster:
    """A head without CPUs, on which runs are started, and two nodes with one each."""

    address: str
    users: dict[str, str]
    going: subprocess.Popen[bytes]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with (
        ray_head("--num-cpus=0") as (address, users),
        ray_node(address, users, "127.0.0.2", "--num-cpus=1"),
        ray_node(address, users, GOING, "--num-cpus=1") as going,
    ):
        yield Cluster(address, users, going)


def started(
    folder: Path, base: Path, data: Path, cluster: Cluster, steps: int = STEPS
) -> tuple[Run, subprocess.Popen[str]]:
    """A run on both nodes, in the midst of training."""
    recipe: dict[str, Any] = {"steps": steps, "optimizer": "adamw", "dropout": 0.0, "compute_dtype": "float32"}
    changes: dict[str, dict[str, Any]] = {
        "recipe": {**recipe, "learning_rate": 1e-3},
        "checkpoints": {"every_steps": 20},
        "evaluation": {},
        "cluster": {"address": cluster.address},
        "recovery": {"min_workers": 1},
    }
    run = make_run(folder, base, data, **changes)
    run.environment |= cluster.users
    process = run.start()
    run.wait_for_step(30, process)
    return run, process


def all_steps_once(run: Run) -> bool:
    return [event["step"] for event in run.events() if event["event"] == "step"] == list(range(1, STEPS + 1))


@pytest.mark.chaos
def test_notice_of_a_preemption_leads_to_a_checkpoint_and_costs_no_step(
    tmp_path: Path, tiny_base: Path, conversations: Path, cluster: Cluster, rows: Rows
) -> None:
    run, process = started(tmp_path, tiny_base, conversations, cluster)
    drain(cluster.address, cluster.users, alive_nodes(cluster.address, cluster.users)[GOING], seconds=60)
    struck = time.time()
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    attempts = run.record["attempts"]
    assert attempts[0]["failure"]["kind"] == "preempted"
    assert attempts[0]["to_step"] % 20  # a checkpoint of its own, between those that were due
    assert [one["from_step"] for one in attempts[1:]] == [attempts[0]["to_step"]] * (len(attempts) - 1)
    assert attempts[-1]["strategy"]["world_size"] == 1
    assert all_steps_once(run)
    first = next(event["time"] for event in run.events() if event.get("step") == attempts[0]["to_step"] + 1)
    rows.add(Row("notice of a preemption (Ray drains a node)", True, run.done_twice(), first - struck))


@pytest.mark.chaos
def test_a_node_that_vanishes_costs_the_steps_since_the_last_checkpoint(
    tmp_path: Path, tiny_base: Path, conversations: Path, cluster: Cluster, rows: Rows
) -> None:
    run, process = started(tmp_path, tiny_base, conversations, cluster)
    kill_tree(cluster.going)
    struck = time.time()
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    attempts = run.record["attempts"]
    assert attempts[0]["failure"]["kind"] in ("node lost", "worker lost")
    assert "shrink" in [one["decision"]["action"] for one in attempts[:-1]]
    assert attempts[-1]["strategy"]["world_size"] == 1
    assert all_steps_once(run)
    from_step = attempts[-1]["from_step"]
    assert from_step >= 20
    first = next(event["time"] for event in run.events() if event.get("step") == from_step + 1)
    rows.add(Row("a node vanishes", True, run.done_twice(), first - struck))


@pytest.mark.chaos
def test_a_run_with_fewer_workers_takes_devices_that_come_back(
    tmp_path: Path, tiny_base: Path, conversations: Path, cluster: Cluster, rows: Rows
) -> None:
    run, process = started(tmp_path, tiny_base, conversations, cluster, steps=20_000)
    kill_tree(cluster.going)
    run.wait_for(lambda: run.workers_of_attempts()[-1] == 1, process)
    with ray_node(cluster.address, cluster.users, "127.0.0.4", "--num-cpus=1"):
        struck = time.time()
        run.wait_for(lambda: run.workers_of_attempts()[-1] == 2, process)
        run.wait_for_step(run.record["attempts"][-1]["from_step"] + 5, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130, output
    *_, alone, grown = run.record["attempts"]
    assert (alone["failure"]["kind"], alone["decision"]["action"]) == ("devices back", "grow")
    assert alone["status"] == "interrupted"
    assert grown["from_step"] == alone["to_step"]  # nothing is done twice
    for attempt in (alone, grown):
        strategy = attempt["strategy"]
        assert strategy["world_size"] * strategy["micro_batch"] * strategy["gradient_accumulation"] == 8
    assert [event["step"] for event in run.events() if event["event"] == "step"] == list(range(1, grown["to_step"] + 1))
    first = next(event["time"] for event in run.events() if event.get("step") == grown["from_step"] + 1)
    rows.add(Row("devices come back to a run with fewer", True, run.done_twice(), first - struck))
