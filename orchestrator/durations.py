"""How long a whole run takes and what it costs, from the time of one step."""

from __future__ import annotations

from orchestrator.plans import Duration
from qlora_core.step_time import StepTime


def duration(
    step: StepTime | None, tokens: int | None, gpus: int, price_per_hour: float | None, currency: str | None
) -> Duration | None:
    """A run over `tokens`, all of its nodes together costing `price_per_hour`; None where either is not known.

    The last step is a whole one, as a run's is.
    """
    if step is None or tokens is None:
        return None
    steps = -(-tokens // step.tokens)
    seconds, low, high = (steps * each for each in (step.seconds, step.low, step.high))
    prices = [None] * 3 if price_per_hour is None else [price_per_hour * each / 3600 for each in (seconds, low, high)]
    return Duration(
        tokens=tokens,
        steps=steps,
        seconds=seconds,
        low_seconds=low,
        high_seconds=high,
        gpu_hours=gpus * seconds / 3600,
        price=prices[0],
        low_price=prices[1],
        high_price=prices[2],
        currency=currency if price_per_hour is not None else None,
    )
