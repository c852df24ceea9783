"""How long a whole run takes and what it costs, from the time of one step."""

from __future__ import annotations

import math

from orchestrator.plans import Duration
from qlora_core.step_time import StepTime


def duration(
    step: StepTime | None,
    tokens: int | None,
    gpus: int,
    price_per_hour: float | None,
    currency: str | None,
    steps: int | None = None,
    filled: float | None = None,
) -> Duration | None:
    """A run over `tokens`, all of its nodes together costing `price_per_hour`; None where either is not known.

    Where it is not known how many steps they make, each is taken to be full and the last a whole one. Of data whose
    rows are known, `filled` is the share of their positions that are tokens, and the last step is dropped where it is
    not whole, as a run does (`Recipe.total_steps`).
    """
    if step is None or tokens is None:
        return None
    if filled is not None:
        steps = max(1, math.floor(tokens / (step.tokens * filled) + 1e-9))
        full = steps * filled
    else:
        full = tokens / step.tokens if steps is not None else -(-tokens // step.tokens)
    seconds, low, high = (full * each for each in (step.seconds, step.low, step.high))
    prices = [None] * 3 if price_per_hour is None else [price_per_hour * each / 3600 for each in (seconds, low, high)]
    return Duration(
        tokens=tokens,
        steps=steps if steps is not None else int(full),
        seconds=seconds,
        low_seconds=low,
        high_seconds=high,
        gpu_hours=gpus * seconds / 3600,
        price=prices[0],
        low_price=prices[1],
        high_price=prices[2],
        currency=currency if price_per_hour is not None else None,
    )
