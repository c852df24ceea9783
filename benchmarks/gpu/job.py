"""What the command tells the process that measures, and what that one saw before its first tensor. Data only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.gpu.matrix import Case
from qlora_core.recipe import Dtype


@dataclass(frozen=True, slots=True)
class Job:
    """One case to measure, or one rank of it.

    Attributes:
        kind: where.
        uuid: of the GPU, as nvidia-smi names it.
        result: the file that the answer goes to.
        limit: the most that torch's allocator may hold, in bytes; None: what there is.
        rank: of the case's strategy.
        rendezvous: the file through which its ranks find each other, where there are several.
    """

    case: Case
    compute_dtype: Dtype
    kind: Literal["cuda", "cpu"]
    uuid: str | None
    result: Path
    limit: int | None = None
    rank: int = 0
    rendezvous: Path | None = None

    @property
    def place(self) -> str:
        """The device, as torch calls it."""
        return f"cuda:{self.rank}" if self.kind == "cuda" else "cpu"


@dataclass(frozen=True, slots=True)
class Start:
    """The GPU before the first tensor; None on a CPU, and where nvidia-smi does not answer.

    Attributes:
        used_before: what others use of it, in bytes.
        context_bytes: what the CUDA context of this process takes.
    """

    used_before: int | None
    context_bytes: int | None
