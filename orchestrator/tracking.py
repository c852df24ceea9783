"""Passes a run's figures to its trackers: each in a thread of its own, so that none can hold up or end the run."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from clusters.errors import first_line, without_secrets
from orchestrator.metrics import metrics_of
from orchestrator.prepare import Prepared
from orchestrator.record import RunRecord
from orchestrator.trackers import FILE_NAME, Figures, Outcome, Tracked, Tracker, trackers_of

START_SECONDS = 20.0
"""What a tracker gets to open the run before the workers are started."""
FINISH_SECONDS = 30.0
"""What a tracker gets to send what is left when the run is over."""


class Tracking:
    """Tells trackers each figure of a run once.

    Args:
        trackers: by name.
        seen: the last step of each figure that an earlier attempt has told.
        predicted: see `metrics_of`.
        tell: is told of a tracker that fails, once.
    """

    def __init__(
        self,
        trackers: Mapping[str, Tracker],
        seen: Mapping[str, int],
        predicted: Mapping[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self._seen = dict(seen)
        self._predicted = predicted
        self._lanes = [Lane(name, tracker, tell) for name, tracker in trackers.items()]
        self._tell = tell
        for lane in self._lanes:
            lane.start()
        for lane in self._lanes:
            # Ray's processes end with the session. One that a tracker starts must not be taken for one of them.
            lane.opened.wait(START_SECONDS)

    def event(self, event: Mapping[str, Any]) -> None:
        """Track what is new in an event of the workers: a resumed run does some steps again."""
        found = metrics_of(event, self._predicted)
        new = {name: value for name, value in found.items() if event["step"] > self._seen.get(name, -1)}
        if new:
            self._seen.update(dict.fromkeys(new, event["step"]))
            for lane in self._lanes:
                lane.queue.put(Figures(event["step"], event["time"], new))

    def finish(self, outcome: Outcome) -> None:
        """Wait until all is told, but not longer than FINISH_SECONDS for each tracker."""
        for lane in self._lanes:
            lane.queue.put(outcome)
        for lane in self._lanes:
            lane.join(FINISH_SECONDS)
            if lane.is_alive():
                self._tell(
                    f"Tracking by {lane.name} was not finished within {FINISH_SECONDS:.0f} s; {FILE_NAME} has all."
                )


class Lane(threading.Thread):
    """One tracker, and what it is still to be told."""

    def __init__(self, name: str, tracker: Tracker, tell: Callable[[str], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.queue: SimpleQueue[Figures | Outcome] = SimpleQueue()
        self.opened = threading.Event()
        self._tracker = tracker
        self._tell = tell

    def run(self) -> None:
        """Pass on figures until the end, or until the tracker fails."""
        try:
            self._tracker.start()
            self.opened.set()
            while isinstance(told := self.queue.get(), Figures):
                self._tracker.log(told)
            self._tracker.finish(told)
        except Exception as error:  # whatever a library or the network may raise: the run is worth more
            reason = without_secrets(first_line(error))
            self._tell(f"Tracking by {self.name} ended, the run goes on: {reason}")
        finally:
            self.opened.set()


@contextmanager
def tracked(
    prepared: Prepared, record: RunRecord, output: Path, tell: Callable[[str], None]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Track an attempt: gives what is to be called with each of its events."""
    plan, spec = prepared.plan, prepared.spec
    settings = {
        "model": spec.model,
        "seed": spec.seed,
        "total_steps": record.total_steps,
        **{f"recipe.{name}": value for name, value in spec.recipe.to_json().items()},
        **{f"strategy.{name}": value for name, value in dataclasses.asdict(plan.strategy).items()},
        "compute_dtype": plan.target.compute_dtype,
        "plan": plan.digest,
        **{f"versions.{name}": version for name, version in record.versions.items()},
    }
    run = Tracked(id=record.id, name=record.name, project=spec.tracking.project, settings=settings, folder=output)
    tracking = Tracking(trackers_of(spec.tracking, run), told(output / FILE_NAME), record.predicted, tell)
    try:
        yield tracking.event
    finally:
        # the record says how the attempt ended by the time that this block does
        tracking.finish("failed" if record.status == "running" else record.status)


def told(path: Path) -> dict[str, int]:
    """The last step of each figure in a run's metrics.jsonl."""
    if not path.exists():
        return {}
    last: dict[str, int] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            figures = json.loads(line)
            step = int(figures["step"])
        except (ValueError, TypeError, KeyError):
            continue  # a line that a killed process left half-written
        last |= {name: max(step, last.get(name, step)) for name in figures}
    return last
