"""How sure a figure over examples is: its 95 % interval when the examples are drawn again, with replacement.

The percentile bootstrap of Efron, "Bootstrap Methods: Another Look at the Jackknife" (Annals of Statistics, 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 5000
CHUNK = 2**22
"""Examples drawn at once, which bounds the memory."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % interval, which a single example does not give."""

    value: float
    low: float | None
    high: float | None

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of a rising function of the figure."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Interval(function(self.value), low, high)


def interval(columns: Sequence[Sequence[float]], statistic: Callable[[Floats], Floats], seed: int = 0) -> Interval:
    """A figure and its 95 % interval over examples.

    Args:
        columns: K quantities of each of N examples, such as their losses and their tokens.
        statistic: from sums over examples, [K, R], to the figure of each of R draws, [R]: a ratio of sums, say.
        seed: of the draws. Two figures over the same examples with the same seed have the same draws.
    """
    table = np.asarray(columns, dtype=np.float64)
    count = table.shape[1]
    value = float(statistic(table.sum(axis=1, keepdims=True))[0])
    if count < 2:
        return Interval(value, None, None)
    random = np.random.default_rng(seed)
    per_chunk = max(1, CHUNK // count)
    drawn = []
    for start in range(0, RESAMPLES, per_chunk):
        draws = random.integers(count, size=(min(per_chunk, RESAMPLES - start), count))
        drawn.append(statistic(np.stack([column[draws].sum(axis=1) for column in table])))
    low, high = np.percentile(np.concatenate(drawn), (2.5, 97.5))
    return Interval(value, float(low), float(high))
