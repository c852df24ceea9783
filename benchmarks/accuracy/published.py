"""Published figures, predicted: from a row to a request of ours, or to the reason why there is none; and the scores."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from benchmarks.accuracy.rows import PUBLISHED, PublishedRow, published_rows
from benchmarks.accuracy.shapes import architecture_named
from benchmarks.accuracy.stacks import Stack, stack_of
from clusters.gpu import find_gpu
from qlora_core.architecture import ModelArchitecture
from qlora_core.memory.device import Device
from qlora_core.memory.formula import estimate
from qlora_core.recipe import Dtype, Recipe
from qlora_core.strategy import Attention, Strategy

Tier = Literal["allocated", "reserved", "process", "after loading"]

TIERS: tuple[tuple[str, Tier], ...] = (
    ("after model init", "after loading"),
    ("max_memory_allocated", "allocated"),
    ("uses about", "allocated"),
    ("reserved", "reserved"),
    ("max memory over run", "reserved"),
    ("torchtune", "allocated"),
    ("nvidia-smi", "process"),
    ("NVML", "process"),
    ("screenshot", "process"),
    ("unclear", "process"),
    ("fit/OOM", "process"),
)
"""What a row's figure is to be held against, by the first of these words found in `how_measured`. torchtune's and
axolotl's logs begin with active bytes, which are allocated ones; what nobody explains is what nvidia-smi shows."""

GPUS = (
    ("RTX 4080", "rtx-4080"),
    ("RTX 4090", "rtx-4090"),
    ("RTX 3090", "rtx-3090"),
    ("A10G", "a10g"),
    ("A100-SXM4-40GB", "a100-40gb"),
    ("A100 40GB", "a100-40gb"),
    ("H100", "h100-80gb"),
    ("L40S", "l40s"),
    ("T4", "t4"),
)
"""The GPU by the first of these names found in the row; else an A100."""

TOLERANCE = 15.0
"""Per cent; of a row beyond it explanations.py says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a row asks of the memory model."""

    architecture: ModelArchitecture
    recipe: Recipe
    strategy: Strategy
    device: Device
    tier: Tier
    usable_bytes: int


@dataclass(frozen=True, slots=True)
class Listed:
    """A row that is not scored, and why."""

    row: PublishedRow
    kind: str
    reason: str


@dataclass(frozen=True, slots=True)
class Scored:
    """A row beside its prediction."""

    row: PublishedRow
    stack: Stack
    tier: Tier
    predicted: int

    @property
    def error(self) -> float:
        """Per cent by which the prediction is above the figure."""
        return 100 * (self.predicted / self.row.measured_bytes - 1)


@dataclass(frozen=True, slots=True)
class Fit:
    """A row that states only whether it fits, beside what we say."""

    row: PublishedRow
    stated: bool
    predicted_bytes: int
    between: tuple[int, int]
    usable_bytes: int

    @property
    def open(self) -> bool:
        """Whether fragmentation decides."""
        return self.between[0] <= self.usable_bytes < self.between[1]

    @property
    def predicted(self) -> bool:
        """Whether it fits by our count."""
        return self.predicted_bytes <= self.usable_bytes


# --- which rows are scored --------------------------------------------------------------------------------------------

OTHER_SHARDING, BOUND, NO_FIGURE = "other sharding system", "a bound, not a peak", "fits or not, no figure"
OTHER_STACK, OTHER_METHOD, TOO_LITTLE = "a stack without a description", "another method", "does not state enough"


def why_listed(row: PublishedRow) -> tuple[str, str] | None:
    """The kind of reason and the reason for which a row is not scored; None if it is."""
    for applies, kind, reason in (
        ("FSDP" in row.sharding, OTHER_SHARDING, row.sharding),
        ("fit/OOM" in row.how_measured, NO_FIGURE, "compared below as a yes or no"),
        ("boundary" in row.how_measured, BOUND, "the longest context that fits a GPU"),
        ("not a peak" in row.how_measured, BOUND, "sizes of components, no step"),
        ("adapter" in row.method, OTHER_METHOD, f"{row.method} is not LoRA"),
        ("unsloth" in row.attention, OTHER_STACK, "Unsloth's kernels and offloaded checkpoints"),
        ("act offload" in row.notes or "activation offload" in row.notes, OTHER_STACK, "offloaded activations"),
        ("low-memory recipe" in row.optimizer, OTHER_STACK, "the optimizer runs inside the backward pass"),
        (architecture_named(row.model) is None, TOO_LITTLE, f"model: {row.model}"),
        ("unclear" in row.targets, TOO_LITTLE, "the adapters' targets"),
        ("not stated" in row.checkpointing, TOO_LITTLE, "gradient checkpointing and adapters"),
        ("VLM" in row.notes, TOO_LITTLE, "images: their tokens, and the vision part"),
        ("unpacked" in row.notes, TOO_LITTLE, "the samples' length: at most 4096, not packed"),
        (not row.seq_len.isdigit() and "init" not in row.how_measured, TOO_LITTLE, f"length: {row.seq_len}"),
        (stack_of(row.id) is None, TOO_LITTLE, "how its stack trains"),
    ):
        if applies:
            return kind, reason
    return None


# --- from a row to a request ------------------------------------------------------------------------------------------


def request_of(row: PublishedRow, stack: Stack) -> Request:
    """What the row asks of us, with its stack's defaults where it is silent.

    Raises:
        ValueError: the row does not state enough.
    """
    architecture = architecture_named(row.model)
    if architecture is None:
        raise ValueError(f"{row.id}: no such model is known")
    gpu = find_gpu(next((name for text, name in GPUS if text in row.gpus), "a100-80gb"))
    targets = _targets(row, architecture)
    quantization = _quantization(row)
    quantized = quantization != "none"
    if stack.own_models:
        architecture = replace(architecture, activation=architecture.activation.partition("_")[0])
    if not stack.ties:
        architecture = replace(architecture, tied_embeddings=False)
    if quantized:
        architecture = _quantized_as(architecture, stack, targets)
    length = int(row.seq_len) if row.seq_len.isdigit() else 512
    optimizer = "adamw_8bit" if "8bit" in row.optimizer else "adamw"
    upcast = "peft" if quantized and stack.upcast == "quantized" else "none"
    world = int(row.gpus.split("x")[0]) if row.sharding.startswith("DeepSpeed") else 1
    fields: dict[str, Any] = {
        "method": "full" if row.method == "full" else "qlora" if quantized else "lora",
        "quantization": quantization,
        "double_quantization": row.double_quantization == "True"
        if row.double_quantization
        else stack.double_quantization,
        "rank": int(row.rank or DEFAULT_RANK),
        "targets": targets,
        "lora_dtype": stack.lora_dtype,
        "dropout": _dropout(row, stack),
        "use_dora": "use_dora True" in row.notes,
        "upcast": upcast,
        "autocast": stack.autocast,
        "optimizer": optimizer,
        "seq_len": length,
        "tokens_per_step": length * int(row.micro_batch) * stack.accumulation * world,
    }
    strategy = Strategy(
        world_size=world,
        micro_batch=int(row.micro_batch),
        gradient_accumulation=stack.accumulation,
        gradient_checkpointing=row.checkpointing.startswith("True"),
        attention=_attention(row, architecture),
        loss="full" if not architecture.plain_logits or "step: +compile" in row.notes else stack.loss,
        paged_optimizer="paged" in row.optimizer or (quantized and stack.paged_when_quantized),
        zero_stage=3 if "ZeRO-3" in row.sharding else 2 if "ZeRO-2" in row.sharding else 0,
    )
    device = Device(
        kind="cuda",
        compute_dtype=_compute_dtype(row),
        context_bytes=gpu.context_bytes,
        compute_capability=gpu.compute_capability,
        emptied_after_load=False,
        output_held=stack.output_held,
        plain_autocast=True,
        keys_expanded=stack.own_models,
    )
    return Request(architecture, Recipe(**fields), strategy, device, _tier(row), gpu.usable_bytes)


DEFAULT_RANK = 8
"""Of peft's LoraConfig and of LongLoRA's script: what the rows without a rank used."""
_DEFAULT_TARGETS = {
    "longlora-": "q+k+v+o",
    "hf4bit-": "q+v",
    "torchtune-31-8b-lora": "q+v",
    "torchtune-31-8b-qlora": "all linear",
}
"""Targets that rows leave to their stack's default, by the beginning of their ids."""


def _targets(row: PublishedRow, architecture: ModelArchitecture) -> Any:
    """The row's targets as a recipe names them: attention's fused projection is meant where q, k or v are."""
    text = next((text for prefix, text in _DEFAULT_TARGETS.items() if row.id.startswith(prefix)), row.targets)
    if row.method == "full" or "all linear" in text or "all-linear" in text:
        return "all-linear"
    words = set(re.split(r"\W+|_proj", text.split("(")[1] if text.startswith("attention (") else text.split("(")[0]))
    attention = [linear.name for linear in architecture.linears if linear.part == "attention"]
    mlp = [linear.name for linear in architecture.linears if linear.part == "mlp"]
    names: list[str] = []
    if len(attention) == 2:
        names += attention[:1] if words & {"q", "k", "v"} else []
    else:
        names += [name for letter, name in zip("qkv", attention, strict=False) if letter in words]
    names += attention[-1:] if "o" in words else []
    names += mlp if "mlp" in words else [name for name in mlp if name.split("_")[0] in words]
    return "all-linear" if len(names) == len(attention) + len(mlp) else tuple(names)


def _quantized_as(architecture: ModelArchitecture, stack: Stack, targets: Any) -> ModelArchitecture:
    """`architecture` with those of its linear layers quantized that the stack quantizes."""
    if stack.quantizes == "replaced":
        return architecture
    return replace(
        architecture,
        linears=tuple(
            replace(linear, quantized=stack.quantizes == "all" or targets == "all-linear" or linear.name in targets)
            for linear in architecture.linears
        ),
    )


def _quantization(row: PublishedRow) -> Any:
    text = row.quantization
    if text.startswith(("nf4", "4-bit")):
        return "nf4"
    return "fp4" if text.startswith("fp4") else "int8" if text.startswith("int8") else "none"


def _attention(row: PublishedRow, architecture: ModelArchitecture) -> Attention:
    if not architecture.has_sdpa:
        return "eager"
    text = row.attention.lower()
    return "flash_attention_2" if "flash" in text or "fa2" in text else "sdpa"


def _compute_dtype(row: PublishedRow) -> Dtype:
    return "float16" if "fp16" in row.quantization and "bf16" not in row.quantization else "bfloat16"


def _dropout(row: PublishedRow, stack: Stack) -> float:
    stated = re.search(r"dropout (\d\.\d+|0\b)", row.notes)
    return float(stated[1]) if stated else stack.dropout


def _tier(row: PublishedRow) -> Tier:
    return next((tier for word, tier in TIERS if word in row.how_measured), "process")


def predicted_bytes(asked: Request, stack: Stack) -> int:
    """The prediction that the row's figure is held against."""
    gpu = estimate(asked.architecture, asked.recipe, asked.strategy, asked.device).gpu
    if asked.strategy.zero_stage == 3 and stack.divides_while_loading:
        return max(gpu.phases.forward, gpu.phases.backward, gpu.phases.optimizer) + asked.device.context_bytes
    return {
        "allocated": gpu.allocated_bytes,
        "reserved": gpu.reserved_bytes,
        "process": gpu.process_bytes,
        "after loading": gpu.phases.after_load,
    }[asked.tier]


# --- the scores -------------------------------------------------------------------------------------------------------


@cache
def scored(path: Path = PUBLISHED) -> tuple[Scored, ...]:
    """All rows of a file that are scored, in its order."""
    found: list[Scored] = []
    for row in published_rows(path):
        stack = stack_of(row.id)
        if stack is None or why_listed(row) is not None:
            continue
        asked = request_of(row, stack)
        found.append(Scored(row, stack, asked.tier, predicted_bytes(asked, stack)))
    return tuple(found)


@cache
def listed() -> tuple[Listed, ...]:
    """All rows that are not scored, in the order of the file."""
    reasons = ((row, why_listed(row)) for row in published_rows())
    return tuple(Listed(row, *reason) for row, reason in reasons if reason is not None)


@cache
def fits() -> tuple[Fit, ...]:
    """The rows that state whether a run fits, in the order of the file."""
    found: list[Fit] = []
    for row in published_rows():
        stack = stack_of(row.id)
        if stack is not None and row.stated in ("fit", "OOM"):
            asked = request_of(row, stack)
            gpu = estimate(asked.architecture, asked.recipe, asked.strategy, asked.device).gpu
            low, high = (bound + asked.device.context_bytes for bound in gpu.reserved_interval)
            said = predicted_bytes(asked, stack)
            found.append(Fit(row, row.stated == "fit", said, (low, high), asked.usable_bytes))
    return tuple(found)
