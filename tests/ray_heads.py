"""A real Ray head for tests, with token authentication, that nothing of a test's own has started."""

from __future__ import annotations

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
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        head = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", "--head", f"--port={port}", "--include-dashboard=false",
             "--disable-usage-stats", "--block", *options],
            env={**os.environ, **users},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + SECONDS
            # `ray start` leaves the address when the node has joined.
            while not (Path(folder) / "ray" / "ray_current_cluster").exists() and time.monotonic() < deadline:
                time.sleep(0.2)
            yield f"127.0.0.1:{port}", users
        finally:
            for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            head.wait()
