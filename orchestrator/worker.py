"""One worker of a run: what happens inside each process that Ray Train starts."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from ray import train as ray_train
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device

from orchestrator.gauges import Gauges
from orchestrator.metrics import metrics_of
from qlora_core.files import replace_folder
from qlora_core.memory.measure import meter_for
from qlora_core.quiet import quiet_libraries
from qlora_core.recipe import Dtype, Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.checkpoint import complete, expired, load_adapter
from qlora_core.training.engines import build_engine
from qlora_core.training.examples import Examples, Rows
from qlora_core.training.loop import TrainingRun, train
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import load_base, load_tokenizer, make_trainable

LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker is told to do: data only, all paths absolute and seen by every node.

    Attributes:
        name: the run's, by which its figures are found among those of others.
        device: "cuda" or "cpu".
        examples: the folder with train.safetensors and eval.safetensors.
        adapter: a trained adapter to start from, in peft's layout.
        events: the file to which rank 0 appends what happens, a JSON object a line.
        stop_file: the run ends after the step in which this file appears.
        keep: checkpoints that stay.
        facts: what identifies the run inside its checkpoints.
        rendezvous: the file through which workers of this machine find each other; None where Ray Train, whose store
            listens on all interfaces, has joined them over the network.
        predicted: the plan's bytes, as `metrics_of` takes them.
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
    stop_file: Path
    resume_from: Path | None
    facts: Mapping[str, Any]
    rendezvous: Path | None
    predicted: Mapping[str, Any]
    eval_every: int | None = None


class RunObserver:
    """Passes on what the loop tells: events into the run's file, figures to Ray, checkpoints to Ray Train."""

    def __init__(self, order: Order, rank: int) -> None:
        self._order = order
        self._rank = rank
        # Line buffered: the file is read while it grows.
        self._file = order.events.open("a", encoding="utf-8", buffering=1) if rank == 0 else None
        self._gauges = Gauges(order.name, rank)

    def event(self, kind: str, **facts: Any) -> None:
        """See `loop.Observer`."""
        if self._file is not None:
            self._file.write(json.dumps({"event": kind, "time": time.time(), **facts}) + "\n")
        self._gauges.show(metrics_of({"event": kind, **facts}, self._order.predicted))

    def stop_requested(self) -> bool:
        """See `loop.Observer`."""
        return self._order.stop_file.exists()

    def checkpoint_saved(self, path: Path, metrics: Mapping[str, Any]) -> None:
        """See `loop.Observer`."""
        if self._rank == 0:
            if metrics["best"] is not None and metrics["best"]["step"] == metrics["step"]:
                keep_best(path)
            found = complete(path.parent)
            for step in expired(list(found), self._order.keep):
                shutil.rmtree(found[step])
        # The files are in place already, renamed when they were whole; Ray is told, and copies nothing.
        ray_train.report(
            {"step": metrics["step"], "eval_loss": metrics["eval_loss"]},
            checkpoint=Checkpoint.from_directory(str(path)),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )


def keep_best(path: Path) -> None:
    """Copy a checkpoint to ``best`` beside it, so that it outlives the last few."""
    with replace_folder(path.with_name("best")) as temporary:
        shutil.copytree(path, temporary)


def work(config: Mapping[str, Any]) -> None:
    """Ray Train's training function: build everything this rank needs, and train."""
    order: Order = config["order"]
    context = ray_train.get_context()
    rank = context.get_world_rank()
    if order.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Several workers on one machine must share its cores, or they fight for them. Ray gives each one thread
    # (OMP_NUM_THREADS, by its CPUs), too few also beside a GPU: ZeRO-3 quantizes, and offloading steps, on the host.
    torch.set_num_threads(max(1, usable_cores() // context.get_local_world_size()))
    quiet_libraries()
    if order.rendezvous is not None:
        join(order, order.rendezvous, rank)
    device = get_device() if order.device == "cuda" else torch.device("cpu")
    observer = RunObserver(order, rank)
    observer.event("phase", phase="loading the base model")
    run = prepare(order, rank, device)
    observer.event("phase", phase="resuming" if order.resume_from else "evaluating the base model")
    outcome = train(run, observer, order.resume_from)
    observer.event(
        "end",
        step=outcome.step,
        finished=outcome.finished,
        context=outcome.context,
        ranks=gather_measurements(run, order.strategy.world_size),
        allocated_is=run.meter.allocated_is,
    )


def join(order: Order, rendezvous: Path, rank: int) -> None:
    """Make this worker one of the process group, over loopback alone."""
    world_size = order.strategy.world_size
    local_rank = ray_train.get_context().get_local_rank()
    # DeepSpeed asks the environment who it is.
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(local_rank)})
    os.environ.update({"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE, "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE})
    dist.init_process_group(
        "nccl" if order.device == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
    )


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(order: Order, rank: int, device: torch.device) -> TrainingRun:
    """Load, quantize, adapt and wrap the model; map the data."""
    meter = meter_for(device)
    folder = order.model
    if order.resume_from is not None and order.recipe.method == "full":
        folder = str(order.resume_from / "model")
    base = load_base(folder, order.recipe, order.strategy, order.compute_dtype, device)
    model = make_trainable(base, order.recipe, order.seed)
    if isinstance(model, PeftModel):
        start = order.adapter if order.resume_from is None else order.resume_from / "adapter"
        if start is not None:
            load_adapter(model, start)
    model.train()
    meter.loaded(model)
    with meter.setup():
        engine = build_engine(SummedLoss(model, order.strategy.loss), order.recipe, order.strategy)
    return TrainingRun(
        recipe=order.recipe,
        strategy=order.strategy,
        seed=order.seed,
        total_steps=order.total_steps,
        save_every=order.save_every,
        eval_every=order.eval_every,
        model=model,
        engine=engine,
        tokenizer=load_tokenizer(order.model),
        train_data=Rows(Examples(order.examples / "train.safetensors"), order.recipe, order.seed),
        eval_data=Examples(order.examples / "eval.safetensors"),
        meter=meter,
        device=device,
        rank=rank,
        checkpoints=order.checkpoints,
        facts=order.facts,
    )


def gather_measurements(run: TrainingRun, world_size: int) -> list[dict[str, Any]]:
    """Measured peaks of every rank, by rank."""
    mine = {**dataclasses.asdict(run.meter.peaks()), "reserved": run.meter.reserved()}
    if world_size == 1:
        return [mine]
    everyone: list[dict[str, Any]] = [{} for _ in range(world_size)]
    dist.all_gather_object(everyone, mine)
    return everyone
