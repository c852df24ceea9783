"""The peak of our recipe beside that of plain peft, above the weights: by the planner's own estimators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from clusters.gpu import find_gpu
from orchestrator.devices import gpu_target
from qlora_core.catalogue import find_model
from qlora_core.memory import formula
from qlora_core.memory.estimate import Estimate
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

MODELS = ("llama-3.1-8b", "65b")
SEQ_LEN = 2048
GPU = "h200"
"""Holds them all; which one it is changes a few MiB of workspaces."""


@dataclass(frozen=True, slots=True)
class Stack:
    """A way to train: ours, or one that people have without us.

    Attributes:
        upcast: "peft" where peft.prepare_model_for_kbit_training is called.
        loss: "full" is transformers' own.
        paged: whether the optimizer's state is in managed memory.
        autocast: as a recipe has it.
    """

    name: str
    upcast: Any
    loss: Any
    paged: bool
    autocast: Literal["auto"] | bool = False


OURS = Stack("ours", "none", "chunked", paged=True, autocast="auto")
PLAIN = Stack("plain peft, as documented", "peft", "full", paged=False)
PLAIN_PAGED = Stack("plain peft with our paged optimizer", "peft", "full", paged=True)
STACKS = (OURS, PLAIN, PLAIN_PAGED)
MEASURED = "small, measured"


def estimate(model: str, stack: Stack, *, traced: bool) -> Estimate:
    """What a step of 1 x SEQ_LEN needs: NF4 with double quantization, rank 64 on all linear layers, checkpointing."""
    recipe = Recipe(seq_len=SEQ_LEN, tokens_per_step=SEQ_LEN, upcast=stack.upcast, autocast=stack.autocast)
    strategy = Strategy(loss=stack.loss, paged_optimizer=stack.paged)
    device = gpu_target(find_gpu(GPU), "auto").device
    if not traced:
        return formula.estimate(find_model(model), recipe, strategy, device)
    from qlora_core.memory import trace

    return trace.estimate(find_model(model), recipe, strategy, device)


def weights(found: Estimate) -> int:
    """Bytes of the base as a plan without upcast holds it: what no recipe can do without."""
    parts = found.gpu.components
    return parts.base_weights + parts.quantization_constants + parts.unquantized_weights


def rows(*, traced: bool) -> Iterator[dict[str, Any]]:
    """A row per model and stack: peak, and what of it lies above the weights, adapters and all."""
    for model in MODELS:
        base = None
        for stack in STACKS:
            found = estimate(model, stack, traced=traced)
            base = weights(found) if base is None else base  # of ours, which comes first
            peak = found.gpu.allocated_bytes
            yield {"model": model, "stack": stack.name, "peak_bytes": peak, "above_bytes": peak - base}


def measured_rows(ours: dict[str, int], plain: dict[str, int]) -> list[dict[str, Any]]:
    """The same of two runs on this machine, from their peaks by phase; both optimizers are plain torch's."""
    base = ours["after_load"]  # plain peft's is larger where it is upcast: that is what it costs
    return [
        {"model": MEASURED, "stack": name, "peak_bytes": max(peaks.values()), "above_bytes": max(peaks.values()) - base}
        for name, peaks in ((OURS.name, ours), (PLAIN.name, plain))
    ]


def saving(found: list[dict[str, Any]], model: str, stack: str) -> float:
    """What part of a stack's memory above the weights ours does without."""
    above = {row["stack"]: row["above_bytes"] for row in found if row["model"] == model}
    return float(1 - above[OURS.name] / above[stack])
