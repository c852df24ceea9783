"""A real Ray head for tests, with token authentication, that nothing of a test's own has started."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SECONDS = 60


@contextmanager
def ray_head(*options: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Its HOST:PORT, and the environment that its users set; all of its processes end with the block.

    Its files are apart from those of any other Ray; their folder's name is short, as that of a socket must be.
    """
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        token = Path(folder) / "token"
        token.write_text(uuid.uuid4().hex * 2)
        users = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": folder}
        port = free_port()
        dashboard = [] if any("dashboard" in option for option in options) else ["--include-dashboard=false"]
        head = ray_start(users, "--head", f"--port={port}", *dashboard, *options)
        try:
            deadline = time.monotonic() + SECONDS
            # `ray start` leaves the address when the node has joined.
            while not (Path(folder) / "ray" / "ray_current_cluster").exists() and time.monotonic() < deadline:
                time.sleep(0.2)
            yield f"127.0.0.1:{port}", users
        finally:
            kill_tree(head)


def free_port() -> int:
    """A port of this machine that nothing listens on just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@contextmanager
def ray_node(address: str, users: dict[str, str], ip: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """One more node of a head's Ray on this machine, at a loopback address of its own, for as long as the block."""
    before = node_count(address, users)
    node = ray_start(users, f"--address={address}", f"--node-ip-address={ip}", *options)
    try:
        deadline = time.monotonic() + SECONDS
        while node_count(address, users) <= before and time.monotonic() < deadline:
            time.sleep(0.5)
        yield node
    finally:
        kill_tree(node)


def ray_start(users: dict[str, str], *options: str) -> subprocess.Popen[bytes]:
    """`ray start`, which stays and says nothing."""
    bin_folder = Path(sys.executable).parent
    return subprocess.Popen(
        [bin_folder / "ray", "start", "--disable-usage-stats", "--block", *options],
        env={**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", **users},  # a job's `python`
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """kill -9 a process and all that it has started."""
    with suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


def node_count(address: str, users: dict[str, str]) -> int:
    """Nodes of a Ray that are alive."""
    return len(alive_nodes(address, users))


def alive_nodes(address: str, users: dict[str, str]) -> dict[str, str]:
    """The ids of a Ray's nodes that are alive, by their IP addresses; asked by a process that only looks."""
    code = (
        "import json, sys, ray; from ray._raylet import GcsClient; "
        "nodes = GcsClient(address=sys.argv[1]).get_all_node_info().values(); "
        "print(json.dumps({n.node_manager_address: n.node_id.hex() for n in nodes if n.state == 0}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, address], env={**os.environ, **users}, capture_output=True, text=True, check=True
    )
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def drain(address: str, users: dict[str, str], node: str, seconds: int) -> None:
    """Give notice that a node will be taken away, as a cloud does before it takes a spot instance."""
    subprocess.run(
        [Path(sys.executable).with_name("ray"), "drain-node", f"--address={address}", f"--node-id={node}",
         "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the cloud wants it back",
         f"--deadline-remaining-seconds={seconds}"],
        env={**os.environ, **users},
        check=True,
        capture_output=True,
    )  # fmt: skip
