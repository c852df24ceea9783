"""What the command tells the process that measures, and what that one saw before its first tensor. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.gpu.matrix import Case
from qlora_core.recipe import Dtype


@dataclass(frozen=True, slots=True)
class Job:
    """One case to measure.

    Attributes:
        kind: where.
        uuid: of the GPU, as nvidia-smi names it.
        result: the file that the answer goes to.
    """

    case: Case
    compute_dtype: Dtype
    kind: Literal["cuda", "cpu"]
    uuid: str | None
    result: Path


@dataclass(frozen=True, slots=True)
class Start:
    """The GPU before the first tensor; None on a CPU, and where nvidia-smi does not answer.

    Attributes:
        used_before: what others use of it, in bytes.
        context_bytes: what the CUDA context of this process takes.
    """

    used_before: int | None
    context_bytes: int | None
