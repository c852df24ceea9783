"""Recovery from a real CUDA out-of-memory: tests/chaos/test_cuda.py, in the time that is left."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu.runner import LOG_LINES, ROOT, Clock, too_late

PACKAGES = ("pytest", "xdist", "ray", "deepspeed")
COMMAND = (sys.executable, "-m", "pytest", "-m", "", "-q", "tests/chaos/test_cuda.py")
SECONDS = 120.0
"""What is left at least where it is begun: a guess, for a start of Ray, an out-of-memory, and a second attempt."""
RESERVED = SECONDS + 10.0
"""What the rows leave to it: the last of them may be stopped when their time is up, which takes a moment."""


def reserved(clock: Clock) -> float:
    """Seconds that the rows leave to it; none where it cannot run, or would take more than half of the time."""
    return 0.0 if missing() or clock.left < 2 * RESERVED else RESERVED


def missing() -> list[str]:
    """The packages that it wants and that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def measure(clock: Clock) -> dict[str, Any]:
    """What became of it: its row of docs/reliability.md; else `skipped` or `failed` with the reason."""
    if lacking := missing():
        return {"skipped": f"it wants packages that are not installed: {', '.join(lacking)}"}
    if (reason := too_late(SECONDS, clock)) is not None:
        return {"skipped": reason}
    limit = clock.left
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log"
        with log.open("wb") as file:
            environment = {**os.environ, "CHAOS_ROWS": str(rows)}
            process = subprocess.Popen(COMMAND, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"stopped: it had not ended after {limit:.0f} s"}
        finally:
            end(process)
        if code == 0 and rows.exists():
            row: dict[str, Any] = json.loads(rows.read_text(encoding="utf-8").splitlines()[-1])
            return row
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        return {"failed": f"pytest ended with exit code {code}", "log": said}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, and the run below it, which is in a session of its own; nothing, where it has ended."""
    if process.poll() is None:
        whole = psutil.Process(process.pid)
        for each in [*whole.children(recursive=True), whole]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()
