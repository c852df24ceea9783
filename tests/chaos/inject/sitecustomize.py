"""Faults for the workers of a run, as $QLORA_FAULTS names them: Python imports this file where it is on PYTHONPATH.

A list of {"fault", "step", "rank", "attempts"}. There is no GPU here whose memory could run out, so the error that
torch raises then is raised in its place; host memory really runs out, under a limit that is set for the process.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import resource
import sys
from types import ModuleType
from typing import Any

BALLAST: list[Any] = []
LOOP = "qlora_core.training.loop"


class Harm(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the training loop as it is, and puts the faults before its steps."""

    def __init__(self, faults: list[dict[str, Any]]) -> None:
        self._faults = faults
        self._loader: Any = None

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != LOOP:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        one_step = module.one_step

        def harmed(run: Any, step: int, observer: Any) -> Any:
            for fault in self._faults:
                here = fault["rank"] == run.rank and fault["step"] == step + 1 and run.attempt in fault["attempts"]
                if here:
                    happen(fault["fault"])
            return one_step(run, step, observer)

        module.one_step = harmed


def happen(fault: str) -> None:
    """Let it happen to this process."""
    import torch

    if fault == "gpu memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")
    if fault == "host memory":
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, resource.RLIM_INFINITY))
        torch.empty(2**28, dtype=torch.uint8)
    if fault == "full gpu":  # really: something else fills it, with what this process does not use just now
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        BALLAST.append(torch.empty(free - 2**26, dtype=torch.uint8, device="cuda"))
    if fault == "secret":  # a library tells what it was given
        raise RuntimeError(f"upload refused for {os.environ['HF_TOKEN']}")
    if fault == "stop":
        os.kill(os.getpid(), 19)  # SIGSTOP: it hangs


if faults := os.environ.get("QLORA_FAULTS"):
    sys.meta_path.insert(0, Harm(json.loads(faults)))
