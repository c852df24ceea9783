"""A run's figures among Ray's own metrics, which Ray's dashboard and Prometheus read."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge

from orchestrator.metrics import MEMORY


class Gauges:
    """Shows figures at the Prometheus endpoint of the worker's node: train/loss is `ray_qlora_train_loss` there.

    Args:
        run: what the tag `run` says.
        rank: what the tag `rank` says. Ranks above 0 show their memory only: all else is the same on all of them.
    """

    def __init__(self, run: str, rank: int) -> None:
        self._tags = {"run": run, "rank": str(rank)}
        self._memory_only = rank > 0
        self._gauges: dict[str, Gauge] = {}

    def show(self, figures: Mapping[str, float]) -> None:
        """Set the gauge of each figure; Ray's agent on the node collects it within seconds."""
        for name, value in figures.items():
            if self._memory_only and not name.startswith(MEMORY):
                continue
            if name not in self._gauges:
                label = f"qlora_{name.replace('/', '_')}"
                self._gauges[name] = Gauge(label, f"{name} of a fine-tune", tag_keys=tuple(self._tags))
            self._gauges[name].set(value, self._tags)
