"""Published figures of training speed, predicted: from a row to a step's time, or to the reason why there is none."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from benchmarks.accuracy.rows import ROOT
from benchmarks.accuracy.shapes import architecture_named
from benchmarks.accuracy.stacks import Stack, stack_of
from clusters.gpu import find_gpu
from orchestrator.devices import any_nodes, pool_target, rates
from qlora_core.architecture import ModelArchitecture
from qlora_core.memory.device import Device
from qlora_core.recipe import Recipe
from qlora_core.step_time import Rates, StepTime, step_time
from qlora_core.strategy import Strategy

THROUGHPUT = ROOT / "tests" / "data" / "measured" / "throughput.csv"
CHECKPOINTING_BY_DEFAULT = ("Qwen", "LLaMA-Factory")
"""Stacks that checkpoint where a row is silent: Qwen's scripts ask for it, LLaMA-Factory does unless told not to
(disable_gradient_checkpointing, src/llamafactory/hparams/model_args.py)."""

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Request:
    """What a row asks of the step-time model."""

    architecture: ModelArchitecture
    recipe: Recipe
    strategy: Strategy
    device: Device
    rates: Rates


@dataclass(frozen=True, slots=True)
class Timed:
    """A row beside its prediction.

    Attributes:
        row: as the file has it.
        stack: what it was measured with.
        measured: seconds of an optimizer step.
        predicted: the same, predicted.
    """

    row: Row
    stack: Stack
    measured: float
    predicted: StepTime

    @property
    def error(self) -> float:
        """Per cent by which the prediction is longer than the published time."""
        return 100 * (self.predicted.seconds / self.measured - 1)

    @property
    def inside(self) -> bool:
        """Whether the published time lies in the predicted interval."""
        return self.predicted.low <= self.measured <= self.predicted.high


@dataclass(frozen=True, slots=True)
class Listed:
    """A row that is not scored, and why."""

    row: Row
    kind: str
    reason: str


@cache
def throughput_rows() -> tuple[Row, ...]:
    """All rows, in the order of the file."""
    with THROUGHPUT.open(newline="") as file:
        return tuple(csv.DictReader(file))


# --- which rows are scored --------------------------------------------------------------------------------------------

OTHER_SHARDING, OTHER_KERNELS, TOO_LITTLE = "other sharding system", "other kernels", "does not state enough"


def why_listed(row: Row) -> tuple[str, str] | None:
    """The kind of reason and the reason for which a row is not scored; None if it is."""
    for applies, kind, reason in (
        (row["compute_dtype"] == "float8", OTHER_KERNELS, "products in FP8"),
        (row["sharding"] not in ("none", "ddp", "zero3"), OTHER_SHARDING, row["sharding"]),
        (row["attention"] == "unsloth", OTHER_KERNELS, "Unsloth's"),
        ("Triton" in row["notes"], OTHER_KERNELS, "Transformer Engine and Triton"),
        ("compile" in row["notes"] or "the optimizer fused" in row["notes"], OTHER_KERNELS, "torch.compile"),
        (not row["gpu"], TOO_LITTLE, "which A100: 40 and 80 GB differ in bandwidth"),
        (architecture_named(row["model"]) is None, TOO_LITTLE, f"model: {row['model']}"),
        (stack_of(row["id"]) is None, TOO_LITTLE, "how its stack trains"),
    ):
        if applies:
            return kind, reason
    return None


# --- from a row to a request ------------------------------------------------------------------------------------------


def request_of(row: Row, stack: Stack) -> Request:
    """What the row asks of us, with its stack's defaults where it is silent.

    Raises:
        ValueError: the row does not state enough.
    """
    architecture = architecture_named(row["model"])
    if architecture is None:
        raise ValueError(f"{row['id']}: no such model is known")
    world, length, micro_batch = int(row["gpus"]), int(row["seq_len"]), int(row["micro_batch"])
    accumulation = int(row["gradient_accumulation"] or stack.accumulation)
    quantized = row["method"] == "qlora"
    fields: dict[str, Any] = {
        "method": row["method"],
        "quantization": "nf4" if quantized else "none",
        "double_quantization": row["double_quantization"] == "true"
        if row["double_quantization"]
        else stack.double_quantization,
        "rank": int(row["rank"] or 1),
        "targets": _targets(row),
        "lora_dtype": stack.lora_dtype,
        "dropout": stack.dropout,
        "upcast": "peft" if quantized and stack.upcast == "quantized" else "none",
        "autocast": stack.autocast,
        "optimizer": "adamw_8bit" if "8bit" in row["optimizer"] else "adamw",
        "seq_len": length,
        "tokens_per_step": length * micro_batch * accumulation * world,
    }
    deepspeed = row["sharding"] == "zero3" or (stack.name == "Qwen" and row["method"] == "full")
    strategy = Strategy(
        world_size=world,
        micro_batch=micro_batch,
        gradient_accumulation=accumulation,
        gradient_checkpointing=row["gradient_checkpointing"] == "true"
        if row["gradient_checkpointing"]
        else stack.name in CHECKPOINTING_BY_DEFAULT,
        attention="flash_attention_2" if row["attention"] == "flash_attention_2" else "sdpa",
        loss=stack.loss,
        paged_optimizer="paged" in row["optimizer"],
        zero_stage=3 if deepspeed else 0,
    )
    target = pool_target(any_nodes(find_gpu(row["gpu"]), world), "bfloat16", world)
    device = replace(target.device, plain_autocast=True)
    return Request(architecture, Recipe(**fields), strategy, device, rates(target))


def _targets(row: Row) -> Any:
    if row["method"] == "full" or row["targets"] in ("all-linear", "c_attn,c_proj,w1,w2"):
        return "all-linear"
    return tuple(row["targets"].split(","))


def seconds_of(row: Row, strategy: Strategy) -> float:
    """Seconds of an optimizer step, out of what the row states."""
    stated, sequences, length = float(row["value"]), strategy.sequences_per_step, int(row["seq_len"])
    return {
        "s/step": stated,
        "samples/s": sequences / stated,
        "tokens/s total": sequences * length / stated,
        "tokens/s per GPU": sequences * length / strategy.world_size / stated,
    }[row["unit"]]


def predicted(asked: Request) -> StepTime:
    """The prediction that the row's figure is held against."""
    return step_time(asked.architecture, asked.recipe, asked.strategy, asked.device, asked.rates)


# --- the scores -------------------------------------------------------------------------------------------------------


@cache
def timed() -> tuple[Timed, ...]:
    """All rows that are scored, in the order of the file."""
    found: list[Timed] = []
    for row in throughput_rows():
        stack = stack_of(row["id"])
        if stack is None or why_listed(row) is not None:
            continue
        asked = request_of(row, stack)
        found.append(Timed(row, stack, seconds_of(row, asked.strategy), predicted(asked)))
    return tuple(found)


@cache
def listed() -> tuple[Listed, ...]:
    """All rows that are not scored, in the order of the file."""
    reasons = ((row, why_listed(row)) for row in throughput_rows())
    return tuple(Listed(row, *reason) for row, reason in reasons if reason is not None)
