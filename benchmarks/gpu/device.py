"""The device that is measured on, asked from a process of its own: `python -m benchmarks.gpu.device` prints it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from typing import Any

import psutil
import torch

MIB = 1024**2
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")


def describe() -> dict[str, Any]:
    """The GPU that torch would take, or the CPU where there is none, and the versions of all that allocates.

    `uuids`: of all GPUs, which are taken to be alike; of a CPU None for each core, on which a rank could run.
    """
    if not torch.cuda.is_available():
        return {
            "kind": "cpu",
            "name": platform.processor() or platform.machine(),
            "compute_capability": [0, 0],
            "total_bytes": psutil.virtual_memory().total,
            "free_bytes": psutil.virtual_memory().available,
            "driver": None,
            "uuids": [None] * (os.cpu_count() or 1),
            "versions": versions(),
        }
    properties = torch.cuda.get_device_properties(0)
    uuids = [
        f"GPU-{str(torch.cuda.get_device_properties(each).uuid).removeprefix('GPU-')}"
        for each in range(torch.cuda.device_count())
    ]
    free, total = torch.cuda.mem_get_info(0)
    return {
        "kind": "cuda",
        "name": properties.name,
        "compute_capability": [properties.major, properties.minor],
        "total_bytes": total,
        "free_bytes": free,
        "driver": next(iter(smi(uuids[0], "gpu", "driver_version")), None),
        "uuids": uuids,
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Python, CUDA, and the packages that allocate."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def used_bytes(uuid: str) -> int | None:
    """What nvidia-smi says all processes together use of a GPU; None where it says nothing."""
    lines = smi(uuid, "gpu", "memory.used")
    return int(lines[0]) * MIB if lines and lines[0].isdigit() else None


def process_bytes(uuid: str) -> int | None:
    """What nvidia-smi says this process uses; None where it does not see it, as in most containers."""
    for line in smi(uuid, "compute-apps", "pid,used_memory"):
        pid, _, used = (part.strip() for part in line.partition(","))
        if pid == str(os.getpid()) and used.isdigit():
            return int(used) * MIB
    return None


def smi(uuid: str, what: str, fields: str) -> list[str]:
    """Lines of nvidia-smi's answer about one GPU, sizes in MiB; none where it cannot be asked."""
    # nvidia-smi is where the driver put it, which is on PATH and nowhere fixed
    command = ["nvidia-smi", f"--query-{what}={fields}", "--format=csv,noheader,nounits", f"--id={uuid}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


if __name__ == "__main__":
    json.dump(describe(), sys.stdout)
