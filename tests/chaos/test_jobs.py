"""A submitted run whose client dies and whose node vanishes: the job goes on, and is not started twice."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from job_clusters import job_cluster
from ray_heads import kill_tree
from real_runs import TIMEOUT, Run, make_run
from strikes import Row, Rows

from launch.jobs import id_stem
from orchestrator.spec import load_spec

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workers")]
STEPS = 400


def wait_for_step(run: Run, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not any(event["event"] == "step" and event["step"] >= step for event in run.events()):
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.2)


@pytest.mark.chaos
def test_a_job_outlives_its_client_and_waits_for_a_node_in_place_of_one_that_vanished(
    tmp_path: Path, tiny_base: Path, conversations: Path, rows: Rows
) -> None:
    recipe = {"steps": STEPS, "optimizer": "adamw", "dropout": 0.0, "learning_rate": 1e-3}
    run = make_run(tmp_path, tiny_base, conversations, recipe=recipe, checkpoints={"every_steps": 20}, evaluation={})
    job = f"{id_stem(load_spec(run.specification))}-1"
    with job_cluster() as cluster, cluster.node("127.0.0.2"), cluster.node("127.0.0.3") as going:
        client = cluster.start(run, str(run.specification), "--follow")
        wait_for_step(run, 30)
        client.kill()
        client.wait()
        kill_tree(going)
        struck = time.time()
        code, output = cluster.ask(run, str(run.specification))
        assert (code, f"under way as the job {job}" in output) == (2, True), output
        with cluster.node("127.0.0.4"):
            assert cluster.ask(run, "wait", job)[0] == 0, cluster.ask(run, "logs", job)[1]
        code, output = cluster.ask(run, "list")
        assert [line.split()[:2] for line in output.splitlines()[1:]] == [[job, "succeeded"]]
    assert [event["step"] for event in run.events() if event["event"] == "step"] == list(range(1, STEPS + 1))
    *_, last = run.record["attempts"]
    assert last["from_step"] >= 20
    first = next(event["time"] for event in run.events() if event.get("step") == last["from_step"] + 1)
    rows.add(Row("a submitted run loses its client and a node", True, run.done_twice(), first - struck))
