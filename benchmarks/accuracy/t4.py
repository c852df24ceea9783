"""Training steps measured on a Tesla T4, as requests of ours, and what the estimators say of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from qlora_core.architecture import ModelArchitecture
from qlora_core.huggingface.config import architecture_from_config
from qlora_core.memory import formula, played
from qlora_core.memory.device import MIB, Device
from qlora_core.memory.estimate import Estimate, GpuEstimate
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "tests" / "data" / "measured" / "t4_single_gpu.json"
LATER = MEASURED.with_name("t4_later.json")
"""Rows that were looked up when the memory model was done."""
TRACED = ROOT / "benchmarks" / "results" / "t4_trace.json"
"""What the trace said of each row, in bytes by figure: written by `python -m benchmarks.accuracy --trace`."""

Estimator = Callable[[ModelArchitecture, Recipe, Strategy, Device], Estimate]

FIGURES: dict[str, tuple[str, Callable[[GpuEstimate], int]]] = {
    "allocated": ("peak_allocated_mib", lambda gpu: gpu.allocated_bytes),
    "reserved": ("peak_reserved_mib", lambda gpu: gpu.reserved_bytes),
    "process": ("process_mib", lambda gpu: gpu.process_bytes),
    "after loading": ("after_load_allocated_mib", lambda gpu: gpu.phases.after_load),
    "forward": ("peak_forward_mib", lambda gpu: gpu.phases.forward),
    "backward": ("peak_backward_mib", lambda gpu: gpu.phases.backward),
    "optimizer": ("peak_optimizer_mib", lambda gpu: gpu.phases.optimizer),
}
"""By name: the measured figure's key, and where an estimate has it."""


@dataclass(frozen=True, slots=True)
class T4Row:
    """One measured step and the request that describes it.

    Attributes:
        model: its Hub id.
        quantization, attention: as in a Recipe and a Strategy.
        measured: the figures, in MiB.
        architecture, recipe, strategy, device: what an estimator is asked.
    """

    model: str
    quantization: str
    attention: str
    measured: Mapping[str, float]
    architecture: ModelArchitecture
    recipe: Recipe
    strategy: Strategy
    device: Device


class Error(NamedTuple):
    """Absolute errors over some rows, in per cent."""

    mean: float
    worst: float


@cache
def t4_rows(file: Path = MEASURED) -> tuple[T4Row, ...]:
    """All rows, in the order of the file."""
    return tuple(_row(row, file) for row in json.loads(file.read_text())["rows"])


@cache
def by_formula(file: Path = MEASURED) -> tuple[dict[str, int], ...]:
    """What the closed form says of each row: bytes by figure."""
    return tuple(_figures(row, formula.estimate) for row in t4_rows(file))


@cache
def by_playing(file: Path = MEASURED) -> tuple[dict[str, int], ...]:
    """What the formula says where it plays the step to the allocator: as much but for reserved and process."""
    return tuple(_figures(row, played.estimate) for row in t4_rows(file))


def by_trace(file: Path = MEASURED) -> tuple[dict[str, int], ...] | None:
    """What the trace said of each row when it last ran; None if it never did."""
    if not TRACED.exists():
        return None
    rows: list[dict[str, int]] = json.loads(TRACED.read_text())[file.stem]
    return tuple(rows)


def run_trace() -> None:
    """Trace all rows, some seconds each, and write what comes out."""
    from qlora_core.memory import trace  # late: it imports torch and transformers

    rows = {file.stem: [_figures(row, trace.estimate) for row in t4_rows(file)] for file in (MEASURED, LATER)}
    TRACED.parent.mkdir(parents=True, exist_ok=True)
    TRACED.write_text(json.dumps({"estimator": "trace", "unit": "bytes", **rows}, indent=1) + "\n")


def error_of(estimated: Iterable[Mapping[str, int]], figure: str, file: Path = MEASURED, **only: str) -> Error:
    """The errors of one figure, over the rows with these facts (quantization, attention)."""
    sizes = [
        abs(100 * (said[figure] / MIB / row.measured[FIGURES[figure][0]] - 1))
        for row, said in zip(t4_rows(file), estimated, strict=True)
        if all(getattr(row, fact) == value for fact, value in only.items())
    ]
    return Error(fmean(sizes), max(sizes))


def by_interval(estimator: Estimator, file: Path = MEASURED, quantization: str | None = None) -> tuple[int, int, float]:
    """How many rows' reserved memory lies in an estimator's interval, of how many, and its width in the median.

    The width is in per cent of the measured figure. `quantization` leaves those rows only.
    """
    inside, widths = 0, []
    for row in t4_rows(file):
        if quantization not in (None, row.quantization):
            continue
        low, high = estimator(row.architecture, row.recipe, row.strategy, row.device).gpu.reserved_interval
        measured = row.measured["peak_reserved_mib"] * MIB
        inside += low <= measured <= high
        widths.append(100 * (high - low) / measured)
    return inside, len(widths), median(widths or [0.0])


def _figures(row: T4Row, estimator: Estimator) -> dict[str, int]:
    gpu = estimator(row.architecture, row.recipe, row.strategy, row.device).gpu
    return {figure: bytes_of(gpu) for figure, (_, bytes_of) in FIGURES.items()}


def _row(row: Mapping[str, Any], file: Path) -> T4Row:
    quantized = row["quantization"] != "none"
    return T4Row(
        model=row["model"],
        quantization=row["quantization"],
        attention=row["attention"],
        measured=row["measured_mib"],
        architecture=_architecture(row, file),
        recipe=Recipe(
            method=row["method"],
            quantization=row["quantization"],
            double_quantization=row["double_quant"],
            rank=row["lora_rank"],
            targets=tuple(row["lora_targets"]),
            lora_dtype=row["lora_dtype"],
            dropout=row["lora_dropout"],
            upcast=row["upcast"],
            autocast=False,
            seq_len=row["seq_len"],
            tokens_per_step=row["micro_batch"] * row["seq_len"],
        ),
        strategy=Strategy(
            micro_batch=row["micro_batch"],
            gradient_checkpointing=row["gradient_checkpointing"],
            attention=row["attention"],
            loss="full",
            paged_optimizer=False,
        ),
        device=Device(
            kind="cuda",
            compute_dtype=row["compute_dtype"],
            context_bytes=int(row["measured_mib"]["cuda_context_mib"] * MIB),
            compute_capability=(7, 5),
            # peft before 0.20 and a plain loop that keeps the model's output; keys and values expanded by a shim
            emptied_after_load=False,
            output_held=True,
            keys_expanded=True,
            # 16-bit models were loaded on the host and moved: after loading all twenty rows are right to the byte so.
            # Four threads loaded what was quantized, as transformers 5.0 to 5.3 did: no two runs of it are alike.
            warmed_up=quantized,
            loading_threads=4 if quantized else 0,
        ),
    )


def _architecture(row: Mapping[str, Any], file: Path) -> ModelArchitecture:
    """Its shapes, from the config fields of the row itself."""
    fields = {**row["config"], "max_position_embeddings": 8192}
    return architecture_from_config(fields, name=row["model"], source=file.name)
