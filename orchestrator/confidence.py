"""How sure a verdict is: from the spread of its estimate or, better, from what comparable runs measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from orchestrator.plans import SURE, Confidence
from qlora_core.memory.estimate import Estimate

ENOUGH_RUNS = 19
"""Comparable runs from which nine of ten can be told: the smallest of n ratios is below the next run's with a chance of
n / (n + 1), so one in twenty at each end takes 19 (split conformal prediction: Vovk et al., "Algorithmic Learning in a
Random World", 2005; Angelopoulos and Bates 2021, arXiv 2107.07511, section 1)."""
MISSED_AT_EACH_END = 0.05


def confidence(needed: Estimate, context_bytes: int, usable_bytes: int, ratios: Sequence[float] = ()) -> Confidence:
    """How sure it is that a process finds room in `usable_bytes`.

    `ratios` are measured over predicted reserved bytes of comparable runs. With enough of them the interval is
    conformal: it holds the next run with the stated chance, whatever the ratios' distribution. With fewer it is the
    estimator's own.
    """
    gpu = needed.gpu
    low, middle, high = float(gpu.reserved_interval[0]), float(gpu.reserved_bytes), float(gpu.reserved_interval[1])
    basis = f"the estimator's own spread ({needed.estimator})"
    if len(ratios) >= ENOUGH_RUNS:
        from statistics import median  # fractions and decimals come with it, and most plans need none

        below, above = conformal(ratios)
        low, middle, high = (gpu.reserved_bytes * ratio for ratio in (below, median(ratios), above))
        basis = f"{len(ratios)} comparable runs"
    elif ratios:
        runs = "1 comparable run is" if len(ratios) == 1 else f"{len(ratios)} comparable runs are"
        basis += f" ({runs} too few; {ENOUGH_RUNS} are enough)"
    low, middle, high = (bound + context_bytes for bound in (low, middle, high))
    return Confidence(chance_below(usable_bytes, low, middle, high), math.floor(low), math.ceil(high), basis)


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
