"""Perplexity, of losses that have no end too."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """The exponential of a mean loss in nats per token; infinite where a float has no room for it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
