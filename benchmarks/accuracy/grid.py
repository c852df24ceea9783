"""A seeded grid of recipes on which the formula is held against the trace."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from clusters.errors import RequestError
from qlora_core.architecture import ModelArchitecture
from qlora_core.catalogue import find_model
from qlora_core.files import write_json
from qlora_core.memory import formula, played
from qlora_core.memory.device import Device
from qlora_core.memory.estimate import GpuEstimate
from qlora_core.memory.reserve import Fragmentation
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

RESULTS = Path(__file__).parents[1] / "results" / "grid.json"
COMBINATIONS = 312
TOLERANCE = 0.02
"""Of allocated memory by the formula, beside the trace's."""
MODELS = (
    "smollm2-135m",
    "smollm2-360m",
    "qwen2.5-0.5b",
    "qwen3-0.6b",
    "tinyllama-1.1b",
    "llama-3.2-1b",
    "gemma-2-2b",
    "gemma-3-1b",
    "phi-2",
    "pythia-1.4b",
    "opt-1.3b",
    "mistral-7b",
    "phi-3-mini",
)
T4 = Device(kind="cuda", compute_dtype="float16", compute_capability=(7, 5))
A100 = Device(kind="cuda", compute_dtype="bfloat16", compute_capability=(8, 0))
FIGURES = ("allocated", "reserved", "after_load", "forward", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class Combination:
    """One question for both estimators."""

    model: str
    recipe: Recipe
    strategy: Strategy
    device: Device

    @property
    def architecture(self) -> ModelArchitecture:
        """Its model's shapes."""
        return find_model(self.model)

    def __str__(self) -> str:
        strategy, recipe = self.strategy, self.recipe
        return "-".join(
            (
                self.model,
                f"{strategy.micro_batch}x{recipe.seq_len}",
                strategy.attention,
                strategy.loss,
                "checkpointed" if strategy.gradient_checkpointing else "kept",
                f"r{recipe.rank}",
                recipe.quantization,
                recipe.optimizer + ("-paged" if strategy.paged_optimizer else ""),
                recipe.upcast,
                self.device.compute_dtype + ("-autocast" if recipe.under_autocast else ""),
            )
        )


@cache
def combinations() -> tuple[Combination, ...]:
    """The grid: the same every time, every model equally often, and each as often under autocast as without."""
    chance = random.Random(65)  # noqa: S311  # a sample, not a secret
    models, turns = len(MODELS), range(COMBINATIONS)
    return tuple(_drawn(chance, MODELS[turn % models], autocast=turn // models % 2 == 1) for turn in turns)


def _drawn(chance: random.Random, model: str, *, autocast: bool) -> Combination:
    pick: Any = chance.choice
    micro_batch, seq_len = pick((1, 2, 4, 8)), pick((256, 512, 1024, 2048, 4096, 8192))
    architecture = find_model(model)
    seq_len = min(seq_len, architecture.max_position_embeddings)
    quantization = pick(("nf4", "nf4", "nf4", "fp4", "none"))
    eager = not architecture.has_sdpa or pick((True, False, False))
    recipe = Recipe(
        method="lora" if quantization == "none" else "qlora",
        quantization=quantization,
        double_quantization=quantization != "none" and pick((True, True, False)),
        rank=pick((8, 16, 64, 128)),
        dropout=pick((0.0, 0.0, 0.05)),
        lora_dtype=pick(("float32", "float32", "bfloat16")),
        upcast=pick(("none", "none", "peft")),
        autocast=autocast,
        optimizer=pick(("adamw", "adamw_8bit")),
        seq_len=seq_len,
        tokens_per_step=seq_len * micro_batch,
    )
    strategy = Strategy(
        micro_batch=micro_batch,
        gradient_checkpointing=pick((True, True, False)),
        attention="eager" if eager else "sdpa",
        loss=pick(("full", "chunked")) if architecture.plain_logits else "full",
        paged_optimizer=pick((True, False)),
    )
    return Combination(model, recipe, strategy, pick((A100, A100, T4)))


def figures(gpu: GpuEstimate) -> dict[str, int]:
    """The figures that both estimators give, in bytes."""
    phases = gpu.phases
    return {
        "allocated": gpu.allocated_bytes,
        "reserved": gpu.reserved_bytes,
        "after_load": phases.after_load,
        "forward": phases.forward,
        "backward": phases.backward,
        "optimizer": phases.optimizer,
    }


def traced(combination: Combination) -> dict[str, int]:
    """What the trace says of a combination."""
    from qlora_core.memory import trace  # only here: the formula's side needs no torch

    return figures(
        trace.estimate(combination.architecture, combination.recipe, combination.strategy, combination.device).gpu
    )


def _traced(number: int) -> dict[str, int]:
    return traced(combinations()[number])


def trace_all(workers: int = 2) -> Iterator[str]:
    """Trace the whole grid and write `RESULTS`; yields each combination's name as it is done."""
    rows = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for combination, found in zip(combinations(), pool.map(_traced, range(COMBINATIONS)), strict=True):
            rows.append({"combination": str(combination), **found})
            yield str(combination)
    write_json(RESULTS, {"rows": rows})


def results() -> list[dict[str, Any]] | None:
    """What the trace last said of the grid; None if it was never asked about this one."""
    if not RESULTS.exists():
        return None
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"]
    names = [str(combination) for combination in combinations()]
    return rows if [row["combination"] for row in rows] == names else None


def fragmentation(checkpointing: bool) -> Fragmentation:
    """By how much reserved memory exceeds, in the traces, what the formula finds before it reckons with fragmentation.

    Of the combinations with gradient checkpointing, or of those without: to the nearest five thousandths, the median
    and what nine of ten lie between.
    """
    low, *_, high = quantiles(shares := _shares(checkpointing), n=20, method="inclusive")
    return Fragmentation(*(round(200 * share) * 5 for share in (low, median(shares), high)))


def fragmentation_played() -> Fragmentation:
    """The same of what is found where a step is played, in shares of that; to the nearest thousandth."""
    low, *_, high = quantiles(shares := [share for _, share in _played_shares()], n=20, method="inclusive")
    return Fragmentation(*(round(1000 * share) for share in (low, median(shares), high)))


def held_out_played() -> int:
    """How many of the played lie in the interval that those of the other models give."""
    inside = 0
    for model in MODELS:
        others = [share for name, share in _played_shares() if name != model]
        low, *_, high = quantiles(others, n=20, method="inclusive")
        inside += sum(low <= share <= high for name, share in _played_shares() if name == model)
    return inside


def held_out() -> int:
    """How many combinations' reserved memory lies in the interval that those of the other models give."""
    inside = 0
    for checkpointing in (True, False):
        for model in MODELS:
            low, *_, high = quantiles(_shares(checkpointing, without=model), n=20, method="inclusive")
            inside += sum(low <= share <= high for share in _shares(checkpointing, only=model))
    return inside


def _shares(checkpointing: bool, only: str = "", without: str = "") -> list[float]:
    """Of each combination, what `fragmentation` counts."""
    return [
        share
        for model, checkpointed, share in _all_shares()
        if checkpointed == checkpointing and model != without and only in ("", model)
    ]


@cache
def _all_shares() -> tuple[tuple[str, bool, float], ...]:
    shares = []
    for combination, row in zip(combinations(), results() or [], strict=True):
        asked = combination.architecture, combination.recipe, combination.strategy, combination.device
        gpu = formula.estimate(*asked).gpu
        least = max(gpu.allocated_bytes, formula.segments(*asked))
        scale = math.sqrt(gpu.allocated_bytes * (gpu.allocated_bytes - gpu.phases.after_load))
        share = (row["reserved"] - least) / scale
        shares.append((combination.model, combination.strategy.gradient_checkpointing, share))
    return tuple(shares)


@cache
def by_playing() -> tuple[GpuEstimate | None, ...]:
    """What the formula says of each combination where it plays the step; None where it cannot."""
    found: list[GpuEstimate | None] = []
    for each in combinations():
        try:
            found.append(played.estimate(each.architecture, each.recipe, each.strategy, each.device).gpu)
        except RequestError:
            found.append(None)
    return tuple(found)


@cache
def _played_shares() -> tuple[tuple[str, float], ...]:
    return tuple(
        (combination.model, row["reserved"] / gpu.reserved_bytes - 1)
        for combination, row, gpu in zip(combinations(), results() or [], by_playing(), strict=True)
        if gpu is not None
    )
