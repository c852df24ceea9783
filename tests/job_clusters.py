"""A real Ray head that takes jobs, with token authentication, and what its users ask of it."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray_heads import free_port, ray_head, ray_node
from real_runs import TIMEOUT, Run

COMMAND = Path(sys.executable).with_name("qlora-submit")
SECRET = "hf_wJalrXUtnFEMIK7MDENGbPxRfiCY"  # noqa: S105  (nobody's)


@dataclass
class Cluster:
    """The address of its Jobs API, the environment that its users set, and where its nodes join."""

    address: str
    users: dict[str, str]
    head: str = ""

    def node(self, ip: str, *options: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
        """One more node, with a CPU."""
        return ray_node(self.head, self.users, ip, "--num-cpus=1", *options)

    def start(self, run: Run, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [COMMAND, *arguments],
            env={**run.environment, **self.users, "RAY_API_SERVER_ADDRESS": self.address, "HF_TOKEN": SECRET},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ask(self, run: Run, *arguments: str) -> tuple[int, str]:
        process = self.start(run, *arguments)
        output, _ = process.communicate(timeout=TIMEOUT)
        return process.returncode, output

    def ray(self, *arguments: str) -> str:
        """What `ray job` says."""
        environment = {**os.environ, **self.users, "RAY_API_SERVER_ADDRESS": self.address}
        command = [str(COMMAND.with_name("ray")), "job", *arguments]
        return str(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    def shown(self) -> str:
        """All that Ray tells of its jobs to whoever asks."""
        token = Path(self.users["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            text: str = answer.read().decode()
        return text


@contextmanager
def job_cluster(*options: str) -> Iterator[Cluster]:
    """A head without CPUs for workers."""
    port = free_port()
    ports = (f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}")
    with ray_head("--num-cpus=0", "--include-dashboard=true", *ports, *options) as (address, users):
        yield Cluster(f"http://127.0.0.1:{port}", users, address)
