"""Traces, made ahead of the measurements by processes of their own that see no GPU: `python -m benchmarks.gpu.tracer`.

A trace takes seconds of one core, and the command that waits for the GPU should load no torch.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from benchmarks.gpu.matrix import Case
from benchmarks.gpu.predict import by_trace
from qlora_core.files import write_json
from qlora_core.memory.device import Device

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "benchmarks.gpu.tracer")
MOST = 3
"""Processes that trace."""


class Tracers:
    """The traces of all cases, in their order. A context manager, at whose end the processes are gone."""

    def __init__(self, cases: Sequence[Case], device: Device, folder: Path) -> None:
        count = max(1, min(MOST, len(cases), (os.cpu_count() or 1) // 2))
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started: list[subprocess.Popen[bytes]] = []
        for index in range(count):
            share = cases[index::count]
            process = _start(pickle.dumps((share, device, folder)), folder / f"tracer-{index}")
            self._started.append(process)
            self._processes.update(dict.fromkeys((case.name for case in share), process))

    def answer(self, case: Case, limit: float) -> dict[str, Any]:
        """The trace of a case, waited for at most `limit` seconds; `failed` with the reason where there is none."""
        until = time.monotonic() + limit
        while not (file := _file(self._folder, case)).exists():
            if self._processes[case.name].poll() is not None and not file.exists():
                return {"failed": "the tracing process has ended"}
            if time.monotonic() > until:
                return {"failed": f"not ready after {limit:.0f} s"}
            time.sleep(0.05)
        return cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))

    def __enter__(self) -> Tracers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._started:
            process.kill()
            process.wait()


def _start(order: bytes, place: Path) -> subprocess.Popen[bytes]:
    place.with_suffix(".order").write_bytes(order)
    # a process that imports bitsandbytes opens a CUDA context if it can, and would be in the measurements
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with place.with_suffix(".order").open("rb") as stdin, place.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(COMMAND, cwd=ROOT, env=environment, stdin=stdin, stdout=log, stderr=log)


def _file(folder: Path, case: Case) -> Path:
    return folder / f"{case.name}.trace.json"


def main() -> None:
    """Trace the cases that stdin names, one file each."""
    cases, device, folder = pickle.load(sys.stdin.buffer)  # noqa: S301  (from the process that started this one)
    for case in cases:
        try:
            answer = by_trace(case, device)
        except Exception as error:  # a measurement without a trace is still one
            answer = {"failed": f"{type(error).__name__}: {error}"}
        write_json(_file(folder, case), answer)


if __name__ == "__main__":
    main()
