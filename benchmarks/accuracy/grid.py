"""Two seeded grids of recipes on which the formula is held against the trace."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from clusters.errors import RequestError
from qlora_core.architecture import ModelArchitecture
from qlora_core.catalogue import find_model
from qlora_core.files import write_json
from qlora_core.memory import formula, played
from qlora_core.memory.device import Device
from qlora_core.memory.estimate import GpuEstimate
from qlora_core.memory.reserve import PLAYED, Fragmentation
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

RESULTS = Path(__file__).parents[1] / "results" / "grid.json"
COMBINATIONS, FURTHER = 312, 156
FURTHER_TOKENS = 2048
"""The longest sequence of those."""
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
        apart = {
            recipe.method: recipe.method == "full",
            "dora": recipe.use_dora,
            "plus": recipe.loraplus_lr_ratio != 1,
            f"{strategy.gradient_accumulation}-passes": strategy.gradient_accumulation > 1,
            f"{strategy.world_size}-ranks": strategy.world_size > 1,
        }
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
                *(name for name, is_so in apart.items() if is_so),
            )
        )


class Grid(NamedTuple):
    """Recipes drawn once, and by which part the formula's allocated memory may be off the trace's."""

    combinations: tuple[Combination, ...]
    tolerance: float

    def rows(self) -> tuple[Row, ...]:
        """What all say of them; nothing if the trace was never asked about some."""
        traces = _traces()
        missing = any(str(each) not in traces for each in self.combinations)
        return () if missing else tuple(map(_answered, self.combinations))


@cache
def usual() -> Grid:
    """The first grid: the same every time, every model equally often, and each as often under autocast as without."""
    return Grid(_turns(random.Random(65), COMBINATIONS, _drawn), 0.02)  # noqa: S311  # a sample, not a secret


@cache
def further() -> Grid:
    """What that has none of, nearly all of it: all weights trained, DoRA, LoRA+, several micro-batches and ranks."""
    return Grid(_turns(random.Random(66), FURTHER, _drawn_further), 0.025)  # noqa: S311


def everything() -> tuple[Combination, ...]:
    """Those of both."""
    return usual().combinations + further().combinations


def _turns(chance: random.Random, count: int, draw: Callable[..., Combination]) -> tuple[Combination, ...]:
    models = len(MODELS)
    return tuple(draw(chance, MODELS[turn % models], autocast=turn // models % 2 == 1) for turn in range(count))


def _drawn_further(chance: random.Random, model: str, *, autocast: bool) -> Combination:
    pick: Any = chance.choice
    drawn = _drawn(chance, model, autocast=autocast)
    passes, ranks, seq_len = pick((1, 2, 4)), pick((1, 2)), min(drawn.recipe.seq_len, FURTHER_TOKENS)
    changes: dict[str, Any]
    if pick((True, False, False)):
        changes = {"method": "full", "quantization": "none", "double_quantization": False, "dropout": 0.0}
        changes |= {"lora_dtype": "float32", "upcast": "none"}
    else:  # DoRA under autocast is refused
        changes = {"use_dora": not autocast and pick((True, False)), "loraplus_lr_ratio": pick((1.0, 16.0))}
    tokens = seq_len * drawn.strategy.micro_batch * passes * ranks
    return replace(
        drawn,
        recipe=replace(drawn.recipe, seq_len=seq_len, tokens_per_step=tokens, **changes),
        strategy=replace(drawn.strategy, gradient_accumulation=passes, world_size=ranks),
    )


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
    return traced(everything()[number])


def trace_all(workers: int = 2) -> Iterator[str]:
    """Trace both grids and write `RESULTS`; yields each combination's name as it is done."""
    found = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for combination, row in zip(everything(), pool.map(_traced, range(len(everything()))), strict=True):
            found.append({"combination": str(combination), **row})
            yield str(combination)
    write_json(RESULTS, {"rows": found})


class Row(NamedTuple):
    """What all say of a combination: the trace's `figures`, the formula, and that as it is played where it can be."""

    combination: Combination
    traced: dict[str, int]
    closed: GpuEstimate
    played: GpuEstimate | None


@cache
def _traces() -> dict[str, dict[str, int]]:
    """What the trace last said, by combination."""
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    return {row["combination"]: {figure: row[figure] for figure in FIGURES} for row in found}


@cache
def _answered(each: Combination) -> Row:
    asked = each.architecture, each.recipe, each.strategy, each.device
    try:
        as_played = played.estimate(*asked).gpu
    except RequestError:
        as_played = None
    return Row(each, _traces()[str(each)], formula.estimate(*asked).gpu, as_played)


def all_rows() -> tuple[Row, ...]:
    """Those of both grids."""
    return usual().rows() + further().rows()


# --- how far reserved memory is off -----------------------------------------------------------------------------------

Shares = Sequence[tuple[str, float]]
"""Of each combination its model, and by which part reserved memory exceeds what was found."""


def fragmentation(checkpointing: bool) -> Fragmentation:
    """By how much reserved memory exceeds, in the traces, what the formula finds before it reckons with fragmentation.

    Of the combinations with gradient checkpointing, or of those without: to the nearest five thousandths, the median
    and what nine of ten lie between.
    """
    low, typical, high = _nine_of_ten(_shares(checkpointing))
    return Fragmentation(*(round(200 * share) * 5 for share in (low, typical, high)))


def fragmentation_played() -> Fragmentation:
    """The same of what is found where a step is played, in shares of that; to the nearest thousandth."""
    low, typical, high = _nine_of_ten(_played_shares())
    return Fragmentation(*(round(1000 * share) for share in (low, typical, high)))


def held_out() -> int:
    """How many combinations' reserved memory lies in the interval that those of the other models give."""
    return sum(_held_out(_shares(checkpointing)) for checkpointing in (True, False))


def held_out_played() -> int:
    """The same of those that can be played."""
    return _held_out(_played_shares())


def _held_out(shares: Shares) -> int:
    inside = 0
    for model in MODELS:
        low, _, high = _nine_of_ten([each for each in shares if each[0] != model])
        inside += sum(low <= share <= high for name, share in shares if name == model)
    return inside


def _nine_of_ten(shares: Shares) -> tuple[float, float, float]:
    """What nine of ten lie between, around their median."""
    found = [share for _, share in shares]
    low, *_, high = quantiles(found, n=20, method="inclusive")
    return low, median(found), high


@cache
def _shares(checkpointing: bool) -> Shares:
    shares = []
    for combination, row, gpu, _ in all_rows():
        if combination.strategy.gradient_checkpointing != checkpointing:
            continue
        asked = combination.architecture, combination.recipe, combination.strategy, combination.device
        least = max(gpu.allocated_bytes, formula.segments(*asked))
        scale = math.sqrt(gpu.allocated_bytes * (gpu.allocated_bytes - gpu.phases.after_load))
        shares.append((combination.model, (row["reserved"] - least) / scale))
    return shares


def _played_shares() -> Shares:
    # what an estimate has put on top already is no part of what was found
    typical = 1 + PLAYED.typical / 1000
    return [
        (row.combination.model, row.traced["reserved"] / row.played.reserved_bytes * typical - 1)
        for row in all_rows()
        if row.played is not None
    ]
