"""The Ray of a run: on loopback alone, behind a token, and gone afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
from ray_heads import ray_head

from clusters.errors import RequestError
from orchestrator.order import RAY_SESSION
from orchestrator.ray_runtime import ray_session

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("workers")]

SESSION = """
    import json, os, psutil, ray, time
    from orchestrator import ray_runtime
    from orchestrator.ray_runtime import ray_session
    end_idle, ended = ray_runtime.end_idle, []
    ray_runtime.end_idle = lambda processes: ended.append(end_idle(processes))
    with ray_session(None, 2):
        time.sleep(1)  # until those that were killed are zombies
        children = psutil.Process().children(recursive=True)
        family = [process for process in children if process.status() != "zombie"]
        listening = sorted({connection.laddr.ip for process in [psutil.Process(), *family]
                            for connection in process.net_connections("inet") if connection.status == "LISTEN"})
        mode = ray.get(ray.remote(lambda: os.environ.get("RAY_AUTH_MODE")).remote())
        token = os.environ["RAY_AUTH_TOKEN"]
        shown = [part for process in family for part in process.cmdline() if token in part]
        cpus = ray.cluster_resources()["CPU"]
        scripts = [part.rpartition("/")[2] for process in family for part in process.cmdline()]
    left = [process.pid for process in family if process.is_running() and process.status() != "zombie"]
    print(json.dumps({"listening": listening, "mode": mode, "shown": shown, "cpus": cpus, "left": left,
                      "scripts": scripts, "ended": ended, "environment": "RAY_AUTH_TOKEN" in os.environ}))
"""


def test_it_listens_on_loopback_wants_a_token_and_leaves_nothing() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SESSION)], capture_output=True, text=True, check=True
    )
    facts = json.loads(answer.stdout.splitlines()[-1])
    assert all(address.removeprefix("::ffff:").startswith("127.") or address == "::1" for address in facts["listening"])
    assert facts["listening"]
    assert facts["mode"] == "token"
    assert facts["shown"] == []  # no command line shows the token
    assert facts["cpus"] >= 3
    assert facts["left"] == []
    assert facts["ended"] == [3]
    assert "gcs_server" in facts["scripts"]
    assert not {"monitor.py", "dashboard.py", "log_monitor.py"} & {*facts["scripts"]}  # nothing for them to do
    assert not facts["environment"]


def test_an_address_where_no_ray_runs_is_a_wrong_request() -> None:
    with pytest.raises(RequestError, match=r"cluster\.address: no Ray could be joined there.*refused"):
        ray_session("127.0.0.1:1", 1).__enter__()


JOB = """
    import sys
    from clusters.errors import RunFailed
    from orchestrator.ray_runtime import ray_session
    import ray
    try:
        with ray_session(sys.argv[1], 1):
            print("joined", ray.get_runtime_context().get_job_id())
    except RunFailed as error:
        print(error, ray.is_initialized())
"""


def test_a_job_does_not_join_the_ray_that_took_the_place_of_its_own() -> None:
    code = textwrap.dedent(JOB)
    with ray_head("--num-cpus=1") as (address, users):
        for session, said in (
            ({RAY_SESSION: "session_of_another"}, f"another answers at {address}. Submit the run again. False"),
            ({}, "joined"),
        ):
            environment = {**os.environ, **users, **session}
            command = [sys.executable, "-c", code, address]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            assert said in done.stdout
