"""The memory that QLoRA's paper states for its models (arXiv 2305.14314), and the recipes behind the numbers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from qlora_core.catalogue import find_model
from qlora_core.memory.device import Device
from qlora_core.memory.formula import estimate
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

TOLERANCE = 12.0
"""Per cent within which each of the paper's numbers is to be met."""

STATED: tuple[tuple[str, Literal[4, 16], float], ...] = (
    ("7b", 4, 5),
    ("13b", 4, 10),
    ("33b", 4, 21),
    ("65b", 4, 41),
    ("13b", 16, 26),
    ("33b", 16, 66),
)
"""Model, bits and GB (1000**3 bytes), from the paper's comparison of Guanaco, Vicuna and Open Assistant."""

A100 = Device(kind="cuda", compute_dtype="bfloat16", compute_capability=(8, 0))


@dataclass(frozen=True, slots=True)
class PaperNumber:
    """One number of the paper beside ours, in bytes.

    Attributes:
        model: the catalogue's name.
        bits: of the base's weights.
        gigabytes: what the paper says.
        weights: the base model alone.
        unpaged: a training step with bfloat16 adapters and AdamW's state on the GPU, in bfloat16 too.
        paged: a training step with float32 adapters and AdamW's state paged out.
    """

    model: str
    bits: Literal[4, 16]
    gigabytes: float
    weights: int
    unpaged: int
    paged: int

    def error(self, predicted: int) -> float:
        """Per cent by which `predicted` bytes are above the paper's number."""
        return 100 * (predicted / 1e9 / self.gigabytes - 1)


@cache
def paper_numbers() -> tuple[PaperNumber, ...]:
    """All six."""
    return tuple(_number(*stated) for stated in STATED)


def recipe(bits: Literal[4, 16], **changes: Any) -> Recipe:
    """The paper's recipe (appendix B.2): NF4 and double quantization, rank 64 on all linear layers, length 512."""
    base: dict[str, Any] = {} if bits == 4 else {"method": "lora", "quantization": "none"}
    fixed = {"rank": 64, "seq_len": 512, "tokens_per_step": 512, "autocast": False}
    return Recipe(**{**fixed, **base, **changes})


def _number(name: str, bits: Literal[4, 16], gigabytes: float) -> PaperNumber:
    architecture = find_model(name)
    unpaged, paged = (
        estimate(
            architecture,
            recipe(bits, lora_dtype=dtype),
            Strategy(micro_batch=1, gradient_checkpointing=True, loss="full", paged_optimizer=out),
            A100,
        ).gpu
        for dtype, out in (("bfloat16", False), ("float32", True))
    )
    parts = unpaged.components
    weights = parts.base_weights + parts.quantization_constants + parts.unquantized_weights
    return PaperNumber(architecture.name, bits, gigabytes, weights, unpaged.allocated_bytes, paged.allocated_bytes)
