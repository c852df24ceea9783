"""The figures of a run, flat and by stable names: the same in every tracker, in metrics.jsonl and in Ray's metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qlora_core.perplexity import perplexity

MEMORY = "memory/"
"""What begins so differs from rank to rank; all else is the whole run's."""

STEP_FIELDS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "seconds": "train/step_seconds",
}
"""Which figure a field of a step's event is."""


def metrics_of(event: Mapping[str, Any], predicted: Mapping[str, Any]) -> dict[str, float]:
    """The figures in an event of the training loop; none in one that is neither a step nor an evaluation.

    Args:
        predicted: the plan's bytes, as a run's record has them: `phases` and `reserved_bytes`.

    What is not finite is left out: JSON has no word for it, and a run ends at it and says so.
    """
    if event["event"] == "step":
        found = {name: event[field] for field, name in STEP_FIELDS.items()}
        found["train/tokens_per_second"] = event["tokens"] / event["seconds"]
        found |= memory_of(event["peaks"], "measured") | memory_of(predicted["phases"], "predicted")
        if event["reserved"]:  # a CPU has no caching allocator
            found |= memory_of({"reserved": event["reserved"]}, "measured")
            found |= memory_of({"reserved": predicted["reserved_bytes"]}, "predicted")
    elif event["event"] == "eval" and event["eval_loss"] is not None:
        loss = event["eval_loss"]
        found = {"eval/loss": loss, "eval/perplexity": perplexity(loss)}
    else:
        found = {}
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


def memory_of(peaks: Mapping[str, int], kind: str) -> dict[str, float]:
    """Bytes by phase as figures, such as memory/backward/predicted_bytes."""
    return {f"{MEMORY}{phase}/{kind}_bytes": peak for phase, peak in peaks.items()}
