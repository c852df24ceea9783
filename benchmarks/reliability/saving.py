"""What checkpoints cost: the same steps with and without one every few, in turn, in this process."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.case import Case, make_model, write_spec
from orchestrator.prepare import prepare
from orchestrator.run import open_record, order_of
from orchestrator.spec import load_spec
from orchestrator.worker import prepare as build
from qlora_core.memory.measure import meter_for
from qlora_core.training.loop import train

CASE = Case(layers=8, hidden=512, vocabulary=8192, seq_len=128, micro_batch=2, rank=64)
STEPS, EVERY, ROUNDS = 40, 5, 3
WARM_UP = 5
"""First steps, which are left out: they are followed by the storage tracker."""
MINUTE = 60.0
CPU = torch.device("cpu")


class Clock:
    """An observer that notes when each step was done. See `qlora_core.training.loop.Observer`."""

    def __init__(self) -> None:
        self.times: dict[int, float] = {}
        self.saved = 0

    def event(self, kind: str, **facts: Any) -> None:
        """See `Observer`."""
        if kind == "step":
            self.times[facts["step"]] = time.perf_counter()

    def alive(self) -> None:
        """See `Observer`."""

    def stop_requested(self) -> bool:
        """See `Observer`."""
        return False

    def checkpoint_saved(self, path: Path, step: int) -> None:
        """See `Observer`."""
        self.saved += 1


def measured(work: Path, case: Case = CASE) -> dict[str, Any]:
    """Seconds that each checkpoint adds to the steps beside it, and its size."""
    specification = write_spec(case, work / "saving", make_model(case, work / "saving-model"), steps=STEPS)
    without, beside = [], []
    size = 0
    for _ in range(ROUNDS):
        without.append(seconds(specification, 1000)[0])
        taken, size = seconds(specification, EVERY)
        beside.append(taken)
    # the one after the last step is in neither
    saves = len(range(WARM_UP, STEPS - 1, EVERY))
    lost = [(one - other) / saves for one, other in zip(beside, without, strict=True)]
    return {
        "bytes": size,
        "step_seconds": statistics.median(without) / (STEPS - WARM_UP),
        "saves": saves,
        "lost_seconds": lost,
        "percent_at_one_a_minute": 100 * statistics.median(lost) / MINUTE,
    }


def seconds(specification: Path, every: int) -> tuple[float, int]:
    """What the steps after the warm-up take together, and the bytes of the last checkpoint."""
    spec = load_spec(specification, [f"checkpoints.every_steps={every}"])
    prepared, output = prepare(spec), Path(spec.output)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    open_record(prepared, None, output)
    run = build(order_of(prepared, output, None), 0, CPU, meter_for(CPU))
    clock = Clock()
    train(dataclasses.replace(run, save_every=every), clock, None)
    last = output / "checkpoints" / f"step-{STEPS:08d}"
    size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    return clock.times[STEPS] - clock.times[WARM_UP], size
