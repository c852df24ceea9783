"""How sure a verdict is: from the spread of its estimate or, better, from what comparable runs measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.plans import SURE, Confidence, Target
from qlora_core.memory.estimate import Estimate
from qlora_core.recipe import Method, Recipe
from qlora_core.strategy import Strategy

ENOUGH_RUNS = 19
"""Comparable runs from which nine of ten can be told: the smallest of n ratios is below the next run's with a chance of
n / (n + 1), so one in twenty at each end takes 19 (split conformal prediction: Vovk et al., "Algorithmic Learning in a
Random World", 2005; Angelopoulos and Bates 2021, arXiv 2107.07511, section 1)."""
MISSED_AT_EACH_END = 0.05


class Comparable(NamedTuple):
    """What runs have in common whose memory is compared: the kind of device, the method, sharded or not."""

    device: str
    method: Method
    sharded: bool

    @classmethod
    def to(cls, target: Target, recipe: Recipe, strategy: Strategy) -> Comparable:
        """What a run has in common with such."""
        return cls(target.device.kind, recipe.method, strategy.zero_stage > 0)


class Spread(NamedTuple):
    """Measured over predicted reserved bytes: the median, and between what it lies in nine cases of ten."""

    low: float
    middle: float
    high: float


Spreads = tuple[tuple[Comparable, Spread], ...]
"""Of all kinds of runs of which there are enough."""


def spread_of(ratios: Sequence[float]) -> Spread | None:
    """Of comparable runs' ratios; None where these are too few."""
    if len(ratios) < ENOUGH_RUNS:
        return None
    from statistics import median  # fractions and decimals come with it, and most plans need none

    low, high = conformal(ratios)
    return Spread(low, median(ratios), high)


def bounds(needed: Estimate, context_bytes: int, spread: Spread | None) -> tuple[int, int, int]:
    """Bytes of a process: which it ends below in one case of twenty, of two, and in nineteen of twenty."""
    reserved, (low, high) = needed.gpu.reserved_bytes, needed.gpu.reserved_interval
    middle = reserved
    if spread is not None:
        low = math.floor(reserved * spread.low)
        middle, high = math.ceil(reserved * spread.middle), math.ceil(reserved * spread.high)
    return low + context_bytes, middle + context_bytes, high + context_bytes


def confidence(needed: Estimate, context_bytes: int, usable_bytes: int, ratios: Sequence[float] = ()) -> Confidence:
    """How sure it is that a process finds room in `usable_bytes`.

    `ratios` are measured over predicted reserved bytes of comparable runs. With enough of them the interval is
    conformal: it holds the next run with the stated chance, whatever the ratios' distribution. With fewer it is the
    estimator's own.
    """
    spread = spread_of(ratios)
    low, middle, high = bounds(needed, context_bytes, spread)
    basis = f"the estimator's own spread ({needed.estimator})"
    if spread is not None:
        basis = f"{len(ratios)} comparable runs"
    elif ratios:
        runs = "1 comparable run is" if len(ratios) == 1 else f"{len(ratios)} comparable runs are"
        basis += f" ({runs} too few; {ENOUGH_RUNS} are enough)"
    return Confidence(chance_below(usable_bytes, low, middle, high), low, middle, high, basis)


def conformal(ratios: Sequence[float]) -> tuple[float, float]:
    """Bounds that the next run's ratio misses with a chance of one in twenty each.

    Raises:
        ValueError: there are too few ratios to say so.
    """
    if len(ratios) < ENOUGH_RUNS:
        raise ValueError(f"{len(ratios)} ratios are too few for an interval of nine in ten: {ENOUGH_RUNS} are needed")
    ordered = sorted(ratios)
    rank = math.floor((len(ordered) + 1) * MISSED_AT_EACH_END + 1e-9)
    return ordered[rank - 1], ordered[-rank]


def chance_below(bound: float, low: float, middle: float, high: float) -> float:
    """The chance of a value at most `bound` that is below `low`, `middle`, `high` with 1, 10 and 19 chances of 20.

    Linear in between; beyond `low` and `high` nothing is known but that.
    """
    if bound >= high:
        return SURE
    if bound < low:
        return 1 - SURE
    if bound >= middle:
        return 0.5 + (SURE - 0.5) * (bound - middle) / (high - middle)
    return 0.5 - (SURE - 0.5) * (middle - bound) / (middle - low)
