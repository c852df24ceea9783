"""The planner behind HTTP: its schema holds for whatever is asked, and it says what the command says."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from click.testing import CliRunner
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings

from launch.api.application import application
from launch.api.parameters import options
from launch.plan import plan

APP = application()
schema = schemathesis.openapi.from_asgi("/openapi.json", APP)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(APP) as found:
        yield found


@schema.include(path="/api/plan").parametrize()
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_api_keeps_its_schema(case: Any) -> None:
    """Valid questions are answered, or refused as ones that do not go together; all others are told what is wrong."""
    if (case.query or {}).get("objective") or "auto" in (case.query or {}).values():
        return  # a search is answered by another process, which this one has not started
    response = case.call()
    if response.status_code == 409:
        assert response.json()["problems"]
        case.validate_response(response, excluded_checks=[schemathesis.checks.positive_data_acceptance])
    else:
        case.validate_response(response)


def ask(*arguments: str) -> Any:
    return json.loads(CliRunner().invoke(plan, [*arguments, "--json"], standalone_mode=False).stdout)


@pytest.mark.parametrize("where", ["plan", "ways"])
def test_an_answer_is_the_command_s(client: TestClient, where: str) -> None:
    asked = {"model": "33b", "gpu": "rtx-4090", "seq-len": "1024", "rank": "16"}
    asked |= {"no-double-quant": "true", "block-size": "128"}
    found = client.get(f"/api/{where}", params=asked).json()
    command = found["command"].split()
    assert command[0] == "qlora-plan"
    expected = ask(*command[1:])
    if where == "plan":
        expected["alternatives"] = []
    assert found["plan"] == expected
    assert found["fits"] == any(bar["fits"] for bar in found["bars"])
    for bar in found["bars"]:
        assert sum(bar["groups"]) == bar["process_bytes"]


def test_a_search_is_answered_too(client: TestClient) -> None:
    found = client.get("/api/plan", params={"model": "7b", "gpu": "l40s", "objective": "fastest"}).json()
    assert found["plan"]["objective"] == "fastest"


def test_a_search_s_process_that_is_killed_is_replaced() -> None:
    app = application()
    asked = {"model": "7b", "gpu": "l40s"}
    with TestClient(app) as client:
        assert client.get("/api/ways", params=asked).status_code == 200
        [child] = app.state.pool._processes
        psutil.Process(child).kill()
        assert client.get("/api/ways", params=asked).status_code == 200


def test_where_each_is_killed_it_is_told_as_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    ends_at_once = partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"), os._exit, (9,))
    monkeypatch.setattr("launch.api.application.second_process", ends_at_once)
    with TestClient(application()) as client:
        for address in ("/api/ways", "/report"):
            response = client.get(address, params={"model": "7b"})
            assert response.status_code == 503
            [problem] = response.json()["problems"]
            assert "was ended twice" in problem["rule"]


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ({}, 422, [("--model", "required")]),
        ({"model": "no-such-model"}, 422, [("--model", "none of those")]),
        ({"model": "/etc"}, 422, [("--model", "none of those")]),
        ({"model": "7b", "rank": "0", "gpu": "abacus"}, 422, [("--rank", "greater"), ("--gpu", "none of those")]),
        ({"model": "7b", "seq-len": "x"}, 422, [("--seq-len", "or input should be 'auto'")]),
        ({"model": "7b", "data": "/etc/passwd"}, 422, [("--data", "no such parameter")]),
        ({"model": "7b", "targets": "(a+)+$"}, 422, [("--targets", "pattern")]),
        ({"model": "7b", "lora-dropout": "nan"}, 422, [("--lora-dropout", "finite")]),
        ({"model": "7b", "method": "full", "quant": "nf4"}, 409, [("--quant", "unquantized")]),
        ({"model": "7b", "block-size": "96"}, 422, [("--block-size", "'64'")]),
        ({"model": "7b", "quant": "int8", "block-size": "128"}, 409, [("--block-size", "only nf4 and fp4")]),
    ],
)
def test_what_is_wrong_is_told_of_its_parameter(
    client: TestClient, asked: dict[str, str], status: int, said: list[tuple[str, str]]
) -> None:
    response = client.get("/api/plan", params=asked)
    assert response.status_code == status
    told = {one["where"]: one for one in response.json()["problems"]}
    for where, words in said:
        assert words in told[where]["rule"], told
        assert told[where]["remedy"]


def test_no_parameter_reads_or_writes_a_file() -> None:
    assert not options().keys() & {"cluster", "data", "write", "reports", "figures", "estimator", "sweeps", "compare"}


def test_it_answers_to_its_own_names_alone_and_lets_no_other_page_in() -> None:
    with TestClient(application(hosts=("localhost",)), base_url="http://localhost") as client:
        assert client.get("/api/plan", params={"model": "7b"}).status_code == 200
        assert client.get("/", headers={"Host": "elsewhere.example"}).status_code == 400
        page = client.get("/")
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]
        assert "access-control-allow-origin" not in page.headers
        assert not re.search(r"(src|href)=\"(https?:)?//", page.text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "ip"), [((), "127.0.0.1"), (("--host", "127.0.0.2"), "127.0.0.2"), (("--host", "::1"), "::1")]
)
def test_it_listens_on_loopback_and_ends_by_ctrl_c(given: tuple[str, ...], ip: str) -> None:
    command = [str(Path(sys.executable).parent / "qlora-plan"), "serve", *given, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            shown = f"[{ip}]" if ":" in ip else ip
            assert re.match(rf"http://{re.escape(shown)}:\d+/ ", line)
            connections = psutil.Process(process.pid).net_connections()
            listening = [one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN]
            assert listening == [ip]
            assert httpx.get(line.split()[0]).status_code == 200  # it answers to the name that it says
            port = re.findall(r":(\d+)/", line)[0]
            second = subprocess.run([*command[:-1], port], capture_output=True, text=True, timeout=60)
            assert second.returncode == 2
            assert "cannot be listened on" in second.stderr
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
            assert (process.returncode, errors) == (0, "")
        finally:
            process.kill()
