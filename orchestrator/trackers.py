"""Where a run's figures go: JSON lines, TensorBoard, MLflow, Weights & Biases, each behind one interface.

The driver tracks, not a worker: it reads every event anyway, lives as long as the run, and needs the credentials that
workers on other nodes then need not have.
"""

from __future__ import annotations

import json
import netrc
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from clusters.errors import Problem
from orchestrator.spec import TrackerName, TrackingSpec

FILE_NAME = "metrics.jsonl"
Outcome = Literal["complete", "interrupted", "failed"]


@dataclass(frozen=True, slots=True)
class Tracked:
    """What a tracker is told of a run.

    Attributes:
        id: of the run, the same in all its attempts.
        settings: the recipe, the strategy and the like, flat.
        folder: the run's.
    """

    id: str
    name: str
    project: str
    settings: Mapping[str, Any]
    folder: Path


@dataclass(frozen=True, slots=True)
class Figures:
    """Metrics of one step, by name.

    Attributes:
        time: seconds since 1970.
    """

    step: int
    time: float
    values: Mapping[str, float]


class Tracker(Protocol):
    """Keeps a run's figures. Whatever its methods raise ends the tracking, and never the run."""

    def start(self) -> None:
        """Open the run; an attempt that resumes goes on with the same one."""

    def log(self, figures: Figures) -> None:
        """Keep figures; a name comes once for each step."""

    def finish(self, outcome: Outcome) -> None:
        """The attempt is over."""


class JsonLines:
    """A line of JSON per step and evaluation in the run's folder: for programs, and for what no other tracker got."""

    def __init__(self, run: Tracked) -> None:
        self._path = run.folder / FILE_NAME

    def start(self) -> None:
        """See `Tracker`."""
        if self._path.exists():
            with self._path.open("rb+") as file:  # without the line that a killed process left half-written
                file.truncate(file.read().rfind(b"\n") + 1)

    def log(self, figures: Figures) -> None:
        """See `Tracker`."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": figures.step, "time": figures.time, **figures.values}) + "\n")

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""


def quiet_about_tensorboard(raised: threading.ExceptHookArgs) -> None:
    """Show no traceback of TensorBoard's own thread: it hands its errors on to the next call, where they are told."""
    trace = raised.exc_traceback
    while trace is not None and trace.tb_next is not None:
        if str(trace.tb_frame.f_globals.get("__name__")).startswith("tensorboard."):
            return
        trace = trace.tb_next
    threading.__excepthook__(raised)


class TensorBoard:
    """An event file per attempt in the run's folder, which TensorBoard shows as one run."""

    def __init__(self, run: Tracked) -> None:
        self._folder = run.folder / "tensorboard"
        self._writer: Any = None

    def start(self) -> None:
        """See `Tracker`."""
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = quiet_about_tensorboard
        self._writer = SummaryWriter(self._folder, flush_secs=10)

    def log(self, figures: Figures) -> None:
        """See `Tracker`."""
        for name, value in figures.values.items():
            self._writer.add_scalar(name, value, figures.step, figures.time)

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        self._writer.close()


class Mlflow:
    """A run of an MLflow experiment, found again by a tag: at MLFLOW_TRACKING_URI, else in the run's own folder."""

    TAG = "qlora_run"
    STATUS: Mapping[Outcome, str] = {"complete": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}

    def __init__(self, run: Tracked) -> None:
        self._run = run
        self._client: Any = None
        self._id = ""

    def start(self) -> None:
        """See `Tracker`."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow
        from mlflow.entities import Param

        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self._run.folder / 'mlflow.db'}"
        self._client = client = mlflow.MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(self._run.project)
        experiment = found.experiment_id if found else client.create_experiment(self._run.project)
        before = client.search_runs([experiment], f"tags.{self.TAG} = '{self._run.id}'", max_results=1)
        if before:
            self._id = before[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            return
        self._id = client.create_run(experiment, run_name=self._run.name, tags={self.TAG: self._run.id}).info.run_id
        client.log_batch(self._id, params=[Param(name, str(value)) for name, value in self._run.settings.items()])

    def log(self, figures: Figures) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        milliseconds = int(1000 * figures.time)
        metrics = [Metric(name, value, milliseconds, figures.step) for name, value in figures.values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, self.STATUS[outcome])


class Wandb:
    """A run of Weights & Biases under the run's own id; WANDB_MODE=offline keeps it in the run's folder."""

    def __init__(self, run: Tracked) -> None:
        self._run = run
        self._wandb_run: Any = None

    def start(self) -> None:
        """See `Tracker`."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        # Beside the host's name nothing is kept but settings and figures: no code, no environment, no terminal output.
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._wandb_run = wandb.init(
            project=self._run.project,
            name=self._run.name,
            id=self._run.id,
            resume="allow",
            dir=str(self._run.folder),
            config=dict(self._run.settings),
            settings=settings,
        )
        # W&B's own step only ever rises; an evaluation of a step that was left out before comes after later steps.
        self._wandb_run.define_metric("*", step_metric="step")

    def log(self, figures: Figures) -> None:
        """See `Tracker`."""
        self._wandb_run.log({"step": figures.step, **figures.values})

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`."""
        self._wandb_run.finish(exit_code=0 if outcome == "complete" else 1)


KINDS: Mapping[TrackerName, Callable[[Tracked], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
    "wandb": Wandb,
}


def trackers_of(tracking: TrackingSpec, run: Tracked) -> dict[str, Tracker]:
    """The trackers of a run by name; JSON lines are always among them."""
    return {FILE_NAME: JsonLines(run), **{name: KINDS[name](run) for name in tracking.to}}


def missing(tracking: TrackingSpec) -> list[Problem]:
    """What the named trackers need and is not there: packages, and credentials, which come by environment alone."""
    problems = []
    for name in tracking.to:
        if find_spec(name) is None:
            rule, remedy = f"the package {name} is not installed", f"Run pip install {name}, or leave {name} out"
            problems.append(Problem("tracking.to", name, rule, remedy))
        elif name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI") and find_spec("sqlalchemy") is None:
            rule = "MLFLOW_TRACKING_URI is not set, and MLflow's local store needs the package sqlalchemy"
            problems.append(Problem("tracking.to", name, rule, "Set it, or run pip install mlflow"))
        elif name == "wandb" and not wandb_is_usable():
            rule = "WANDB_API_KEY is not set, and nobody is logged in"
            problems.append(Problem("tracking.to", name, rule, "Set it, or WANDB_MODE=offline"))
    return problems


def wandb_is_usable() -> bool:
    """Whether Weights & Biases needs no key, or has one: in the environment, or where `wandb login` puts it."""
    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("//")[2].partition("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
