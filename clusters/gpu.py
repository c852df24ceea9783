"""The GPUs known by name: memory as vendors say and as CUDA gives it, rates, links. The numbers: ``gpus.yaml``."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusters.errors import nearest, plain, request_error

GIB, MIB, GB = 1024**3, 1024**2, 1000**3

COMMON = ("t4", "rtx-4090", "a100-40gb", "l40s", "rtx-a6000", "a100-80gb", "h100-80gb", "h200")
"""What a plan shows when no GPU is asked for, by memory."""

_FILE = Path(__file__).parent / "gpus.yaml"
_COMMENT = re.compile("^#.*", re.MULTILINE)
"""Emptied and not taken out, so that an error names the right line."""
_USABLE = 0.975
_USABLE_WITH_INLINE_ECC = 0.91
"""The part of the memory that CUDA gives, for cards without an observation; the head of gpus.yaml says why."""

_PCIE_LANE_BYTES_PER_S = {3: 8e9 * 128 / 130 / 8, 4: 16e9 * 128 / 130 / 8, 5: 32e9 * 128 / 130 / 8}
"""One lane in one direction: transfers a second, 128b/130b code, 8 bits a byte (PCI Express base specification)."""

_MAKERS_WORDS = ("nvidia", "geforce", "tesla", "quadro")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of NVIDIA GPU.

    Attributes:
        name: what it is called here.
        aliases: other names, those that torch.cuda.get_device_name gives among them.
        architecture: "ampere", "hopper", ...
        compute_capability: major and minor.
        memory_bytes: what the vendor says; vendors write GB and mean GiB.
        usable_bytes: the total of torch.cuda.mem_get_info, contexts of processes included.
        usable_seen: that total was seen in a public message; else a rule made it.
        bandwidth_bytes_per_s: of its memory.
        fp32_flops: of CUDA cores, a second: what float32 products take while TF32 is not allowed.
        fp16_flops, bf16_flops: dense, accumulating in float32, a second; None where the hardware has no such rate.
        nvlink_bytes_per_s: both directions together; 0 without.
        nvlink_bridge: that NVLink couples two cards, and only where a bridge was put on them.
        pcie_generation: 3, 4 or 5.
        pcie_bytes_per_s: one direction.
        context_bytes: a CUDA context, as nvidia-smi shows it before the first tensor.
        context_measured: on a GPU of this architecture; else it is the stated default.
        achieved: what it was measured to achieve of its rates, by the names of `qlora_core.step_time.Achieved`: at the
            slow end, typically and at the fast end. Empty where nobody measured.
        source: the document the numbers are from.
    """

    name: str
    aliases: tuple[str, ...]
    architecture: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    usable_bytes: int
    usable_seen: bool
    bandwidth_bytes_per_s: int
    fp32_flops: int
    fp16_flops: int
    bf16_flops: int | None
    nvlink_bytes_per_s: int
    nvlink_bridge: bool
    pcie_generation: int
    pcie_bytes_per_s: int
    context_bytes: int
    context_measured: bool
    achieved: tuple[tuple[str, tuple[float, ...]], ...]
    source: str

    @property
    def has_nvlink_fabric(self) -> bool:
        """Whether all GPUs of a board reach each other over NVLink; a bridge reaches one card only."""
        return self.nvlink_bytes_per_s > 0 and not self.nvlink_bridge

    @property
    def supports_bfloat16(self) -> bool:
        """Whether it multiplies bfloat16 matrices in hardware: compute capability 8.0 (CUDA C++ programming guide)."""
        return self.compute_capability >= (8, 0)

    @property
    def supports_flash_attention(self) -> bool:
        """Whether FlashAttention-2 runs on it: Ampere or newer (README of Dao-AILab/flash-attention)."""
        return self.compute_capability >= (8, 0)


def find_gpu(name: str) -> Gpu:
    """The GPU of that name or alias; upper case, spaces, hyphens, underscores and the maker's name are ignored.

    Raises:
        RequestError: no such GPU is known.
    """
    gpu = _by_name().get(_bare(name))
    if gpu is not None:
        return gpu
    shown = name if len(name) <= 200 else f"{name[:197]}..."
    names = [gpu.name for gpu in list_gpus()]
    # "a100" is not one GPU but two: what begins so comes before what merely looks alike.
    near = [one for one in names if _bare(name) and plain(one).startswith(_bare(name))] or nearest(_bare(shown), names)
    hint = f"Did you mean {', '.join(near)}? " if near else ""
    raise request_error("--gpu", shown, "is not a GPU known here", f"{hint}qlora-plan --list-gpus shows all")


@functools.cache
def list_gpus() -> tuple[Gpu, ...]:
    """All known GPUs, the smallest usable memory first."""
    document = json.loads(_COMMENT.sub("", _FILE.read_text(encoding="utf-8")))
    contexts = document["context_mib"]
    return tuple(
        sorted((_gpu(row, contexts) for row in document["gpus"]), key=lambda gpu: (gpu.usable_bytes, gpu.name))
    )


def _gpu(row: Mapping[str, Any], contexts: Mapping[str, float]) -> Gpu:
    """A row of gpus.yaml, its units turned into bytes and operations a second."""
    major, minor = row["compute_capability"].split(".")
    generation, lanes = (int(part) for part in row["pcie"].split("x"))
    rule = _USABLE_WITH_INLINE_ECC if row.get("inline_ecc") else _USABLE
    bf16 = row.get("bf16_tflops")
    return Gpu(
        name=row["name"],
        aliases=tuple(row.get("aliases", ())),
        architecture=row["architecture"],
        compute_capability=(int(major), int(minor)),
        memory_bytes=row["memory_gib"] * GIB,
        usable_bytes=math.floor(row.get("usable_gib", row["memory_gib"] * rule) * GIB),
        usable_seen="usable_gib" in row,
        bandwidth_bytes_per_s=round(row["bandwidth_gb_per_s"] * GB),
        fp32_flops=round(row["fp32_tflops"] * 1e12),
        fp16_flops=round(row["fp16_tflops"] * 1e12),
        bf16_flops=None if bf16 is None else round(bf16 * 1e12),
        nvlink_bytes_per_s=round(row.get("nvlink_gb_per_s", 0) * GB),
        nvlink_bridge=row.get("nvlink_bridge", False),
        pcie_generation=generation,
        pcie_bytes_per_s=round(_PCIE_LANE_BYTES_PER_S[generation] * lanes),
        context_bytes=round(contexts.get(row["architecture"], contexts["default"]) * MIB),
        context_measured=row["architecture"] in contexts,
        achieved=tuple((name, tuple(ends)) for name, ends in row.get("achieved", {}).items()),
        source=row["source"],
    )


@functools.cache
def _by_name() -> dict[str, Gpu]:
    return {_bare(name): gpu for gpu in list_gpus() for name in (gpu.name, *gpu.aliases)}


def _bare(name: str) -> str:
    """`name` as it is compared: as `plain` has it, without the words of the maker's product lines."""
    bare = plain(name)
    for word in _MAKERS_WORDS:
        bare = bare.replace(word, "")
    return bare
