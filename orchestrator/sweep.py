"""Runs the trials of a sweep through Ray Tune, each as a run of its own with its plan, record and checkpoints."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune

from clusters.errors import Problem, RequestError, RunFailed, last_line
from orchestrator.machine import Machine, describe
from orchestrator.plans import Plan
from orchestrator.prepare import Prepared, prepare
from orchestrator.ray_runtime import ray_session
from orchestrator.record import load_record
from orchestrator.run import execute, only_writer
from orchestrator.spec import RunSpec
from orchestrator.supervisor import POLL_SECONDS, EventReader, Interrupted, interrupts
from orchestrator.trials import Trial
from qlora_core.files import write_json
from qlora_core.quiet import quiet_libraries

FILE_NAME = "sweep.json"
Status = Literal["complete", "interrupted", "failed", "does not fit", "not started"]


@dataclass(slots=True)
class Outcome:
    """What becomes of a trial.

    Attributes:
        plan: made before any trial is started.
        reason: why it failed.
        measured_bytes: allocated on the fullest rank.
        result: the folder of its adapter, or with method full of its model.
    """

    trial: Trial
    plan: Plan
    status: Status = "not started"
    reason: str | None = None
    eval_loss: float | None = None
    perplexity: float | None = None
    step_seconds: float | None = None
    measured_bytes: int | None = None
    result: str | None = None

    @property
    def predicted_bytes(self) -> int:
        """What the plan says is allocated on the fullest rank."""
        return self.plan.estimate.gpu.allocated_bytes

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.trial.name,
            "swept": dict(self.trial.swept),
            "output": self.trial.spec.output,
            "status": self.status,
            "reason": self.reason,
            "eval_loss": self.eval_loss,
            "perplexity": self.perplexity,
            "step_seconds": self.step_seconds,
            "predicted_bytes": self.predicted_bytes,
            "measured_bytes": self.measured_bytes,
            "result": self.result,
        }


def plan_trials(trials: Iterable[Trial], tell: Callable[[str], None]) -> list[Outcome]:
    """The plan of each trial. What does not fit is not started.

    Raises:
        RequestError: with what is wrong with any of the trials.
    """
    outcomes = []
    problems: dict[Problem, None] = {}
    for trial in trials:
        try:
            plan = prepare(trial.spec, tell).plan
        except RequestError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        outcomes.append(Outcome(trial, plan, "not started" if plan.fits else "does not fit"))
    if problems:
        raise RequestError(list(problems))
    return outcomes


def run_trials(outcomes: Sequence[Outcome], output: Path, on_step: Callable[[Trial, int, int], None]) -> list[Outcome]:
    """Run what fits and is not complete yet; what became of all trials, the lowest evaluation loss first.

    A first interrupt stops each trial after its step, with a checkpoint, and starts no other; the same sweep goes on.

    Args:
        output: the sweep's folder; ``sweep.json`` is written there.
        on_step: called with a trial, the step that it has done, and how many it has.

    Raises:
        RequestError: another process carries out this sweep, or its folder cannot be written.
        RunFailed: Ray Tune failed.
    """
    fitting = [outcome for outcome in outcomes if outcome.plan.fits]
    cluster = fitting[0].trial.spec.cluster
    workers = max(outcome.plan.strategy.world_size for outcome in fitting)
    # as many as the GPUs carry; on a CPU, whose memory they would share, one after the other
    machine = describe()
    at_once = max(1, machine.devices // workers)
    with only_writer(output), tempfile.TemporaryDirectory(prefix="qlora-sweep-") as folder:
        stop_file = output / ".stop"
        stop_file.unlink(missing_ok=True)
        address = None if cluster == "auto" else cluster.address
        with ray_session(address, at_once * workers), interrupts(stop_file) as interrupt:
            tuning = Tuning(tuner_of([outcome.trial for outcome in fitting], at_once, machine, stop_file, Path(folder)))
            tuning.start()
            watched = [
                (outcome.trial, EventReader(Path(outcome.trial.spec.output) / "events.jsonl")) for outcome in fitting
            ]
            while tuning.is_alive():
                tuning.join(POLL_SECONDS)
                for trial, events in watched:
                    for event in events.new():
                        if event["event"] == "step":
                            on_step(trial, event["step"], event["total"])
                if interrupt.is_set():
                    stop(trial for trial, _ in watched)
        stop_file.unlink(missing_ok=True)
        if tuning.error is not None:
            raise RunFailed(f"Ray Tune failed: {tuning.error}.", "--debug shows the traceback.") from tuning.error
        for outcome in fitting:
            end(outcome, tuning.reasons.get(outcome.trial.name))
        ranked = sorted(outcomes, key=lambda outcome: (outcome.eval_loss is None, outcome.eval_loss or 0.0))
        write_json(output / FILE_NAME, summary(ranked))
    return ranked


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The outcomes, the best first, as JSON values."""
    best = outcomes[0].trial.name if outcomes and outcomes[0].eval_loss is not None else None
    return {"schema_version": 1, "best": best, "trials": [outcome.to_json() for outcome in outcomes]}


def stop(trials: Iterable[Trial]) -> None:
    """Ask trials that run to end after their step. Asked again and again: one that just begins forgets it."""
    for trial in trials:
        with suppress(OSError):  # it has no folder yet, or its disk is full
            (Path(trial.spec.output) / ".stop").touch()


def tuner_of(trials: Iterable[Trial], at_once: int, machine: Machine, stop_file: Path, folder: Path) -> tune.Tuner:
    """Ray Tune's tuner. What it keeps of the trials goes into `folder` and is not needed: their records are."""
    # no loggers beside ours, and none of the boxes that Tune prints
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    # A trial reads and writes this machine's files; its workers may be anywhere.
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    label = next(name for name in node["Resources"] if name.startswith("node:") and "internal_head" not in name)
    return tune.Tuner(
        # no CPU, which its own workers might wait for without end
        tune.with_resources(run_trial, tune.PlacementGroupFactory([{"CPU": 0, label: 0.001}])),
        param_space={
            "trial": tune.grid_search([(trial.name, trial.spec) for trial in trials]),
            "machine": machine,
            "stop_file": stop_file,
        },
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
        run_config=tune.RunConfig(name="trials", storage_path=str(folder), verbose=0),
    )


def run_trial(config: Mapping[str, Any]) -> dict[str, Any]:
    """One trial, in a process of Ray Tune's. Its workers are placed by Ray Train on the same Ray.

    It is planned for the machine as it was before the sweep: another trial may have filled one of its GPUs by now.
    """
    spec: RunSpec
    name, spec = config["trial"]
    quiet_libraries()
    reason = None
    if not config["stop_file"].exists():
        try:
            execute(prepare(spec, machine=config["machine"]), Silent())
        except Interrupted:
            pass
        except (RequestError, RunFailed) as error:
            reason = str(error)
    return {"name": name, "reason": reason}


class Silent:
    """A run's display that shows nothing. See `orchestrator.run.Display`."""

    def planned(self, prepared: Prepared) -> None:
        """See `Display`."""

    def resuming(self, step: int, total: int, checkpoint: Path) -> None:
        """See `Display`."""

    def event(self, event: Mapping[str, Any]) -> None:
        """See `Display`."""

    def note(self, text: str) -> None:
        """See `Display`."""


class Tuning(threading.Thread):
    """`tuner.fit()` beside the main thread, where Ray Tune would handle interrupts by killing trials.

    Attributes:
        reasons: by trial, why it failed; None where it did not.
    """

    def __init__(self, tuner: tune.Tuner) -> None:
        super().__init__(name="ray-tune", daemon=True)
        self._tuner = tuner
        self.reasons: dict[str, str | None] = {}
        self.error: BaseException | None = None

    def run(self) -> None:
        """Fit, and keep what the trials said and what went wrong."""
        try:
            for result in self._tuner.fit():
                name, _ = result.config["trial"]
                said = (result.metrics or {}).get("reason")
                self.reasons[name] = said if result.error is None else f"its process ended: {last_line(result.error)}"
        except BaseException as error:
            self.error = error


def end(outcome: Outcome, reason: str | None) -> None:
    """Put into an outcome why its trial failed, or what its record says."""
    if reason is not None:
        outcome.status, outcome.reason = "failed", reason
        return
    record = load_record(Path(outcome.trial.spec.output))
    if record is None:
        return
    outcome.status = record.status if record.status in ("complete", "failed") else "interrupted"
    measured = record.measured or {}
    outcome.measured_bytes, outcome.step_seconds = measured.get("allocated_bytes"), measured.get("step_seconds")
    if record.status == "complete":
        outcome.eval_loss = record.results.get("eval_after")
        outcome.perplexity = record.results.get("perplexity_after")
        outcome.result = record.adapter or record.weights
