"""The catalogues of models and GPUs, printed: a line each, or one JSON object."""

from __future__ import annotations

import json
from typing import Any

import click

from clusters.gpu import GIB, Gpu, list_gpus
from qlora_core.catalogue import ListedModel, list_models
from qlora_core.memory.device import Device

SCHEMA_VERSION = 1


def print_models(as_json: bool) -> None:
    """Print the models known by name."""
    models = list_models()
    if as_json:
        print_json("models", [model_row(model) for model in models])
        return
    click.echo(f"{'MODEL':<20}{'PARAMETERS':>12}  ALSO CALLED")
    for model in models:
        line = f"{model.entry.name:<20}{parameters(model.parameters):>12}  {', '.join(model.entry.aliases)}"
        click.echo(line.rstrip())


def print_gpus(as_json: bool) -> None:
    """Print the GPUs known by name."""
    gpus = list_gpus()
    if as_json:
        print_json("gpus", [gpu_row(gpu) for gpu in gpus])
        return
    click.echo(f"{'GPU':<20}{'MEMORY':>8}{'USABLE':>14}  {'ARCHITECTURE':<14}{'CAPABILITY':<12}BFLOAT16")
    for gpu in gpus:
        memory, usable = f"{gpu.memory_bytes // GIB} GiB", f"{gpu.usable_bytes / GIB:.2f} GiB"
        capability = ".".join(map(str, gpu.compute_capability))
        bfloat16 = "yes" if gpu.supports_bfloat16 else "no"
        click.echo(f"{gpu.name:<20}{memory:>8}{usable:>14}  {gpu.architecture:<14}{capability:<12}{bfloat16}")
    click.echo(f"{'cpu':<20}{'':>8}{'':>14}  this host's processor and its free memory")


def print_json(kind: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as the one object that other programs read."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, kind: rows}, indent=2))


def model_row(model: ListedModel) -> dict[str, Any]:
    """A model as data."""
    entry = model.entry
    return {
        "name": entry.name,
        "aliases": list(entry.aliases),
        "hub": entry.hub,
        "parameters": model.parameters,
        "source": entry.source,
        "note": entry.note,
    }


def gpu_row(gpu: Gpu) -> dict[str, Any]:
    """A GPU as data."""
    return {
        "name": gpu.name,
        "aliases": list(gpu.aliases),
        "architecture": gpu.architecture,
        "compute_capability": ".".join(map(str, gpu.compute_capability)),
        "memory_bytes": gpu.memory_bytes,
        "usable_bytes": gpu.usable_bytes,
        "context_bytes": gpu.context_bytes,
        "bandwidth_bytes_per_s": gpu.bandwidth_bytes_per_s,
        "fp16_flops": gpu.fp16_flops,
        "bf16_flops": gpu.bf16_flops,
        "nvlink_bytes_per_s": gpu.nvlink_bytes_per_s,
        "pcie_bytes_per_s": gpu.pcie_bytes_per_s,
        "dtypes": ["float32", "float16", *(["bfloat16"] if gpu.supports_bfloat16 else [])],
        "attention_kernels": attention_kernels(gpu),
        "source": gpu.source,
    }


def attention_kernels(gpu: Gpu) -> list[str]:
    """PyTorch's kernels of scaled_dot_product_attention that run on it, and the package flash-attn."""
    device = Device("cuda", "float16", compute_capability=gpu.compute_capability)
    return [
        "math",
        "efficient",  # from compute capability 5.0 on (PyTorch 2.13, ATen/native/transformers/cuda/sdp_utils.cpp)
        *(["flash"] if device.flash_attention else []),
        *(["flash_attention_2"] if gpu.supports_flash_attention else []),
    ]


def parameters(count: int) -> str:
    """A number of parameters as people say it: 65.29 B, 134.5 M."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
