"""What a worker is told to do: data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_core.recipe import Dtype, Recipe
from qlora_core.strategy import Strategy

RAY_SESSION = "QLORA_RAY_SESSION"
"""A variable of a job's environment: the session of the Ray that started it, whose end is the job's too."""
WAITING = "waiting for "
"""What is said while others use the devices begins so."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is told to do: data only, all paths absolute and seen by every node.

    Attributes:
        name: the run's, by which its figures are found among those of others.
        model: the base model's folder where the run was planned; a node that has none there fetches `model_name`.
        device: "cuda" or "cpu".
        examples: the folder with train.safetensors and eval.safetensors.
        adapter: a trained adapter to start from, in peft's layout.
        events: the file to which rank 0 appends what happens, a JSON object a line.
        alive: the folder in which each rank touches a file of its own while it gets on.
        stop_file: the run ends after the step in which this file appears.
        keep: checkpoints that stay.
        attempt: the number of this try of the run, from 1.
        facts: what identifies the run inside its checkpoints.
        rendezvous: the file through which workers of this machine find each other; None where Ray Train, whose store
            listens on all interfaces, has joined them over the network.
        predicted: the plan's bytes, as `metrics_of` takes them.
        accelerator_type: what Ray calls the GPUs that workers must have; None where any will do.
        wait_seconds: how long it waits for devices that others use; None: without end.
        model_name: what others load the base by: the folder, its address, or the Hub id.
        model_commit: of the Hub's repository; None for any other.
        patience, result: see `TrainingRun`.
        more_workers: the numbers with which the run could go on if as many devices came back.
    """

    name: str
    model: str
    adapter: Path | None
    recipe: Recipe
    strategy: Strategy
    compute_dtype: Dtype
    device: str
    seed: int
    total_steps: int
    save_every: int
    keep: int
    examples: Path
    checkpoints: Path
    events: Path
    alive: Path
    stop_file: Path
    resume_from: Path | None
    attempt: int
    facts: Mapping[str, Any]
    rendezvous: Path | None
    predicted: Mapping[str, Any]
    eval_every: int | None = None
    patience: int | None = None
    result: Literal["last", "best"] = "last"
    more_workers: tuple[int, ...] = ()
    accelerator_type: str | None = None
    wait_seconds: float | None = None
    model_name: str = ""
    model_commit: str | None = None
