"""What comparable runs measured, beside what was predicted for them: it corrects the next plan."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click

from clusters.errors import request_error
from orchestrator.confidence import ENOUGH_RUNS, Comparable, Spreads, conformal, spread_of
from orchestrator.plans import Target
from qlora_core.memory.formula import LEARNING
from qlora_core.recipe import Method, Recipe
from qlora_core.step_time import StepTime, Times
from qlora_core.strategy import Strategy

LEANER = 0.9
"""A plan that follows one that ran out of memory needs at most this part of what that one was to need."""


class MeasuredRun(NamedTuple):
    """One finished run, as far as later plans compare themselves with it.

    Attributes:
        device: "cuda" or "cpu".
        gpu: the device's name.
        method: of its recipe.
        sharded: whether DeepSpeed divided anything.
        memory_ratio: measured over predicted reserved bytes (on a CPU, of tensors); None where it was not measured.
        time_ratio: measured over predicted seconds of a token or of padding, before any correction; None without one.
    """

    device: str
    gpu: str
    method: Method
    sharded: bool
    memory_ratio: float | None
    time_ratio: float | None


class RanOut(NamedTuple):
    """A plan that should have fitted and ran out of GPU memory.

    Attributes:
        gpu: the device's name.
        model: the model's name.
        recipe: as JSON values.
        process_bytes: what it said of the fullest rank's process.
        usable_bytes: what there was for it.
    """

    gpu: str
    model: str
    recipe: Mapping[str, Any]
    process_bytes: int
    usable_bytes: int


@dataclass(frozen=True, slots=True)
class History:
    """Earlier runs, the latest first.

    Attributes:
        runs: those that were finished.
        ran_out: plans of all.
    """

    runs: tuple[MeasuredRun, ...] = ()
    ran_out: tuple[RanOut, ...] = ()

    def room(self, target: Target, model: str, recipe: Recipe) -> int | None:
        """Bytes that a process may need where plans for the same model and memory ran out; None where none has.

        In proportion to what was usable then: something else may have filled the GPU.
        """
        as_recorded = json.loads(json.dumps({**recipe.to_json(), "compute_dtype": target.compute_dtype}))
        asked = of_memory(as_recorded)
        found = [
            LEANER * one.process_bytes * target.usable_bytes / one.usable_bytes
            for one in self.ran_out
            if (one.gpu, one.model, of_memory(one.recipe)) == (target.name, model, asked)
        ]
        return int(min(found)) if found else None

    def memory_ratios(self, target: Target, recipe: Recipe, strategy: Strategy) -> list[float]:
        """Of the runs that are comparable."""
        return self._ratios().get(Comparable.to(target, recipe, strategy), [])

    def spreads(self) -> Spreads:
        """How much memory such runs took of what was predicted, where there are enough of them."""
        known = ((kind, spread_of(ratios)) for kind, ratios in self._ratios().items())
        return tuple((kind, spread) for kind, spread in known if spread is not None)

    def _ratios(self) -> dict[Comparable, list[float]]:
        found: dict[Comparable, list[float]] = {}
        for run in self.runs:
            if run.memory_ratio is not None:
                found.setdefault(Comparable(run.device, run.method, run.sharded), []).append(run.memory_ratio)
        return found

    def paces(self) -> tuple[tuple[str, float], ...]:
        """By which factor steps on a device, which is named, took longer than predicted: the median of its runs."""
        devices = dict.fromkeys(run.gpu for run in self.runs if run.time_ratio is not None)
        return tuple((device, middle(self.time_ratios(device))) for device in devices)

    def time_ratios(self, device: str) -> list[float]:
        """Of the runs on that very device."""
        return [run.time_ratio for run in self.runs if run.time_ratio is not None and run.gpu == device]

    def corrected(self, step: StepTime, target: Target) -> StepTime:
        """A step's time by what such steps took: the median, and nine of ten once there are enough of them."""
        ratios = self.time_ratios(target.device_name)
        if not ratios:
            return step
        factor = middle(ratios)
        low, high = step.low * factor, step.high * factor
        if len(ratios) >= ENOUGH_RUNS:
            below, above = conformal(ratios)
            low, high = step.seconds * below, step.seconds * above
        return step._replace(
            seconds=step.seconds * factor,
            low=low,
            high=high,
            parts=Times(*(part * factor for part in step.parts)),
            correction=factor,
            runs=len(ratios),
        )


def middle(ratios: Sequence[float]) -> float:
    """Their median."""
    from statistics import median  # fractions and decimals come with it, and most plans need none

    return median(ratios)


def of_memory(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe, as JSON values, that decide what its steps take."""
    return {name: value for name, value in recipe.items() if name not in LEARNING}


NOTHING_MEASURED = History()


def ledger_place() -> Path | str:
    """Where runs are entered: $QLORA_LEDGER, a file or the URL of a PostgreSQL; or the user's application folder.

    Raises:
        RequestError: it is the URL of something else.
    """
    named = os.environ.get("QLORA_LEDGER")
    if named and named.startswith(("postgresql://", "postgres://", "postgresql+psycopg://")):
        return named
    if named and "://" in named:
        rule, remedy = "only a PostgreSQL is named by a URL", "Give a file's path, or postgresql://HOST/DATABASE"
        raise request_error("QLORA_LEDGER", f"{named.split('://')[0]}://...", rule, remedy)
    return Path(named or Path(click.get_app_dir("qlora-orchestrator")) / "ledger.sqlite")
