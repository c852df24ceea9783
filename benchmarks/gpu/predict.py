"""What the estimators say about a case, as JSON; the time it will take; and how far a measurement is from it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.gpu.matrix import Case, sized
from clusters.errors import RequestError
from clusters.gpu import find_gpu
from orchestrator.devices import as_dtype, compute_dtype
from qlora_core.memory.device import Device
from qlora_core.memory.estimate import Estimate
from qlora_core.memory.formula import estimate as formula

MIB = 1024**2
UNKNOWN_CONTEXT_BYTES = 512 * MIB
"""The default of clusters/gpus.yaml, for a GPU that is not in it."""

UNSLOTH_PYTHON = "UNSLOTH_PYTHON"
"""The environment variable with the Python that has Unsloth, which wants other versions than ours."""
SHORTEST = 512
"""Tokens of a sequence with which a row is timed at least."""
START_SECONDS = 12.0
"""Importing, the CUDA context, the libraries' kernels."""
LOADED_BYTES_PER_S = 1.5e9
"""16-bit weights copied to the GPU and quantized there: a guess on the safe side, corrected by the rows that ran."""
UNSLOTH_SECONDS, WRITTEN_BYTES_PER_S = 45.0, 0.5e9
"""Unsloth's own start, with the kernels that it compiles; the 4-bit base written for it and read again. Likewise."""
STEP_EFFICIENCY = 0.15
"""Likewise, of the catalogue's rate of 16-bit products."""
STEP_FLOPS = {"cuda": 20e12, "cpu": 5e9}
"""Likewise, per second, for a GPU that is not in the catalogue, and a CPU."""
FLOPS_PER_WEIGHT = 8
"""Forward, recomputed forward and the gradient of the input: 2 each for a token; and as much again for the rest."""


def device_of(machine: Mapping[str, Any]) -> Device:
    """What the planner takes the machine's device for, which the context's bytes of the catalogue belong to."""
    capability = tuple(machine["compute_capability"])
    dtype = as_dtype(compute_dtype("auto", machine["kind"], capability).value)
    if machine["kind"] == "cpu":
        return Device(kind="cpu", compute_dtype=dtype)
    try:
        context = find_gpu(machine["name"]).context_bytes
    except RequestError:
        context = UNKNOWN_CONTEXT_BYTES
    return Device(kind="cuda", compute_dtype=dtype, context_bytes=context, compute_capability=capability)


def device_for(case: Case, device: Device) -> Device:
    """`device` with what a case says of how it is used: all its ranks are on one host."""
    ranks = case.strategy.world_size
    return replace(device, output_held=case.output_held, plain_autocast=case.loop == "trl", ranks_per_host=ranks)


def by_formula(case: Case, device: Device) -> dict[str, Any]:
    """The closed form's answer."""
    return _as_json(formula(case.architecture(), case.recipe, case.strategy, device_for(case, device)))


def by_trace(case: Case, device: Device) -> dict[str, Any]:
    """The trace's answer; it imports torch, and takes seconds."""
    from qlora_core.memory.trace import estimate as trace

    return _as_json(trace(case.architecture(), case.recipe, case.strategy, device_for(case, device)))


def too_few(case: Case, machine: Mapping[str, Any]) -> str | None:
    """Why a case cannot be run with the GPUs there are, or None."""
    wanted, there = case.strategy.world_size, len(machine["uuids"])
    return f"it needs {wanted} GPUs, and there {'is 1' if there == 1 else f'are {there}'}" if wanted > there else None


def lacks_a_package(case: Case) -> str | None:
    """Why nobody can run a case's loop or its kernel, or None. TRL's says so itself: it runs in this Python."""
    if case.strategy.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        return "it wants flash-attn, which is not installed"
    if case.loop != "unsloth" or os.environ.get(UNSLOTH_PYTHON):
        return None
    return "it wants a Python that has Unsloth: UNSLOTH=path/to/python"


def does_not_fit(predicted: Mapping[str, Any], free_bytes: int) -> str | None:
    """Why a case is not tried on a GPU with so much free memory, or None.

    Paged state counts in full: managed memory beyond what is free can stall a GPU for everybody on it.
    """
    needed = predicted["process_bytes"] + predicted["paged_bytes"]
    if needed <= free_bytes:
        return None
    return f"it needs {needed / 1024**3:.1f} GiB by the formula, and {free_bytes / 1024**3:.1f} GiB are free"


def fitted(cases: Sequence[Case], device: Device, free_bytes: int) -> list[Case]:
    """`cases`, those that are timed with the longest sequences, and the most of them, that fit: their own or halves.

    All of one model have the same length, and those that are checkpointed, and those that are not, the same
    micro-batch, so that rates can be compared. What does not fit at `SHORTEST` stays as it is, and is skipped.
    """

    def fits(case: Case) -> bool:
        return does_not_fit(by_formula(case, device), free_bytes) is None

    timed = [case for case in cases if case.is_timed]
    sizes: dict[str, tuple[int, int]] = {}
    for model in dict.fromkeys(case.model for case in timed):
        alike: dict[tuple[bool, int], list[Case]] = {}
        for case in (case for case in timed if case.model == model):
            key = not case.strategy.gradient_checkpointing, case.strategy.micro_batch
            alike.setdefault(key, []).append(case)
        groups = [alike[key] for key in sorted(alike)]  # what is checkpointed, as TRL's is, says how long
        for seq_len in halves(groups[0][0].recipe.seq_len, SHORTEST):
            found = [largest_micro_batch(group, seq_len, fits) for group in groups]
            if found[0] is not None:
                for group, most in zip(groups, found, strict=True):
                    sizes.update({case.name: (most, seq_len) for case in group if most is not None})
                break
    return [sized(case, *sizes[case.name]) if case.name in sizes else case for case in cases]


def largest_micro_batch(group: Sequence[Case], seq_len: int, fits: Callable[[Case], bool]) -> int | None:
    """The largest with which all of `group` fit, up to their own; None where not even one sequence does."""
    most = halves(group[0].strategy.micro_batch, 1)
    return next((each for each in most if all(fits(sized(case, each, seq_len)) for case in group)), None)


def halves(most: int, least: int) -> Iterator[int]:
    """`most`, its half and so on, down to `least`."""
    while most >= least:
        yield most
        most //= 2


def seconds(case: Case, machine: Mapping[str, Any]) -> float:
    """About how long a case takes from its start to its result."""
    parameters = case.architecture().parameters
    flops = FLOPS_PER_WEIGHT * parameters * case.recipe.tokens_per_step * case.steps
    rate = STEP_FLOPS[machine["kind"]]
    with contextlib.suppress(RequestError):  # a GPU that is not in the catalogue
        if machine["kind"] == "cuda":
            rate = STEP_EFFICIENCY * find_gpu(machine["name"]).fp16_flops
    peer = UNSLOTH_SECONDS + parameters / WRITTEN_BYTES_PER_S if case.loop == "unsloth" else 0.0
    return START_SECONDS + 2 * parameters / LOADED_BYTES_PER_S + flops / rate + peer


def errors_percent(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, float]:
    """How much too high (or, negative, too low) each predicted figure is, for those that were measured."""
    pairs = {phase: (predicted["phases"][phase], measured["phases"][phase]) for phase in measured["phases"]}
    pairs["allocated"] = (predicted["allocated_bytes"], measured["allocated_bytes"])
    pairs["reserved"] = (predicted["reserved_bytes"], measured["reserved_bytes"])
    # nvidia-smi shows no managed memory, not even while it lies on the GPU (measured on an H200, driver 580)
    pairs["process"] = (predicted["process_bytes"], measured["process_bytes"])
    return {name: round(100 * (said / real - 1), 3) for name, (said, real) in pairs.items() if real}


def _as_json(estimate: Estimate) -> dict[str, Any]:
    gpu = estimate.gpu
    parts = {"components": gpu.components._asdict(), "phases": gpu.phases._asdict()}
    return {**gpu._asdict(), **parts, "reserved_interval": list(gpu.reserved_interval)}
