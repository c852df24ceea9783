"""One worker of a run: what happens inside each process that Ray Train starts."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from peft import PeftModel
from ray import train as ray_train
from ray.train.torch import get_device

from clusters.errors import request_error
from orchestrator.base import base_on_this_node
from orchestrator.failures import WorkerFailed, failure_of
from orchestrator.gauges import Gauges
from orchestrator.metrics import metrics_of
from orchestrator.order import Order
from qlora_core.memory.measure import Meter, held_bytes, meter_for, weight_bytes
from qlora_core.quiet import quiet_libraries
from qlora_core.training.engines import build_engine
from qlora_core.training.examples import Examples, Rows
from qlora_core.training.group import join_group
from qlora_core.training.loop import TrainingRun, train
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import autocast_dtype, load_base, make_trainable
from qlora_core.training.restore import load_adapter
from qlora_core.training.tokenizer import load_tokenizer

ALIVE_SECONDS = 1.0
SHARED_SECONDS = 60.0
"""What one node writes may take so long to be seen by another: NFS clients keep what they know of a folder for 30 to
60 s (nfs(5), acdirmin and acdirmax)."""


class RunObserver:
    """Passes on what the loop tells: events into the run's file, figures to Ray."""

    def __init__(self, order: Order, rank: int) -> None:
        self._order = order
        self._rank = rank
        # Line buffered: the file is read while it grows.
        self._file = order.events.open("a", encoding="utf-8", buffering=1) if rank == 0 else None
        self._gauges = Gauges(order.name, rank)
        self._alive, self._touched = order.alive / f"rank-{rank}", 0.0
        self._lock = threading.Lock()  # checkpoints are told of by the thread that wrote them

    def event(self, kind: str, **facts: Any) -> None:
        """See `loop.Observer`."""
        if self._file is not None:
            with self._lock:
                self._file.write(json.dumps({"event": kind, "time": time.time(), **facts}) + "\n")
        self._gauges.show(metrics_of({"event": kind, **facts}, self._order.predicted))

    def stop_requested(self) -> bool:
        """See `loop.Observer`."""
        return self._order.stop_file.exists()

    def alive(self) -> None:
        """See `loop.Observer`. What supervises the run looks at the time of the file."""
        if time.monotonic() - self._touched >= ALIVE_SECONDS:
            self._touched = time.monotonic()
            with suppress(OSError):  # of a full disk the next checkpoint tells
                os.utime(self._alive)

    def checkpoint_saved(self, path: Path, step: int) -> None:
        """See `loop.Observer`."""
        self.event("checkpoint", step=step, path=str(path))


def work(order: Order) -> None:
    """Build everything that this rank needs, and train.

    Raises:
        WorkerFailed: with what happened; how much memory was in use is part of it.
    """
    context = ray_train.get_context()
    rank = context.get_world_rank()
    meter = None
    try:
        if order.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        # Several workers on one machine must share its cores, or they fight for them. Ray gives each one thread
        # (OMP_NUM_THREADS, by its CPUs), too few also beside a GPU: there ZeRO-3 quantizes and offloading steps on the
        # host.
        torch.set_num_threads(max(1, usable_cores() // context.get_local_world_size()))
        quiet_libraries()
        # Alone, only DeepSpeed asks for a group, whose thread under gloo looks a hundred times a second who calls.
        if order.rendezvous is not None and (order.strategy.world_size > 1 or order.strategy.zero_stage):
            local_rank = context.get_local_rank()
            join_group(order.device, order.rendezvous, rank, local_rank, order.strategy.world_size)
        check_shared(order, rank)
        device = get_device() if order.device == "cuda" else torch.device("cpu")
        meter = meter_for(device)
        carry_out(order, rank, device, meter)
    except Exception as error:
        measured = {} if meter is None else {**meter.peaks()._asdict(), "reserved": meter.reserved()}
        # alone: Ray would write the chain into its logs, and what the original says may hold a secret
        raise WorkerFailed(failure_of(error, rank, measured)) from None


def check_shared(order: Order, rank: int) -> None:
    """See whether this node sees the run's folder: in the first minute, not when the first checkpoint is written.

    Raises:
        RequestError: it does not.
    """
    host, everyone = socket.gethostname(), {f"rank-{number}" for number in range(order.strategy.world_size)}
    remedy = "Choose a folder on storage that all nodes see"
    try:
        (order.alive / f"rank-{rank}").write_text(ray.get_runtime_context().get_node_id(), encoding="utf-8")
    except OSError as error:
        rule = f"the node {host} cannot write there: {error.strerror or error}"
        raise request_error("output", order.checkpoints.parent, rule, remedy) from error
    deadline = time.monotonic() + SHARED_SECONDS
    while missing := everyone - {path.name for path in order.alive.iterdir()}:
        if time.monotonic() > deadline:
            rule = f"the node {host} does not see there what {', '.join(sorted(missing))} wrote"
            raise request_error("output", order.checkpoints.parent, rule, remedy)
        time.sleep(0.1)


def carry_out(order: Order, rank: int, device: torch.device, meter: Meter) -> None:
    """Load, train and tell."""
    observer = RunObserver(order, rank)
    observer.event("phase", phase="loading the base model")
    run = prepare(order, rank, device, meter)
    first = "evaluating the base model" if len(run.eval_data) else "training"
    observer.event("phase", phase="resuming" if order.resume_from else first)
    outcome = train(run, observer, order.resume_from)
    observer.event(
        "end",
        step=outcome.step,
        finished=outcome.finished,
        context=outcome.context,
        ranks=gather_measurements(run, order.strategy.world_size),
        allocated_is=run.meter.allocated_is,
    )


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare(order: Order, rank: int, device: torch.device, meter: Meter) -> TrainingRun:
    """Load, quantize, adapt and wrap the model; map the data."""
    here = base_on_this_node(
        Path(order.model), order.model_name, order.model_commit, str(order.facts["identity"]["model"])
    )
    folder = str(here)
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
    loss = SummedLoss(model, order.strategy.loss, autocast_dtype(order.recipe, order.compute_dtype))
    with meter.setup():
        engine = build_engine(loss, order.recipe, order.strategy, scaled=order.compute_dtype == "float16")
    return TrainingRun(
        recipe=order.recipe,
        strategy=order.strategy,
        seed=order.seed,
        total_steps=order.total_steps,
        save_every=order.save_every,
        eval_every=order.eval_every,
        patience=order.patience,
        result=order.result,
        model=model,
        engine=engine,
        tokenizer=load_tokenizer(str(here)),
        train_data=Rows(Examples(order.examples / "train.safetensors"), order.recipe, order.seed),
        eval_data=Examples(order.examples / "eval.safetensors"),
        meter=meter,
        device=device,
        rank=rank,
        checkpoints=order.checkpoints,
        facts=order.facts,
        keep=order.keep,
        attempt=order.attempt,
    )


def gather_measurements(run: TrainingRun, world_size: int) -> list[dict[str, Any]]:
    """Measured peaks of every rank, and what it holds of the weights, by rank."""
    frozen, trained = weight_bytes(run.model)
    mine = {
        **run.meter.peaks()._asdict(),
        "reserved": run.meter.reserved(),
        "frozen_weights": frozen,
        "trained_weights": trained,
        "optimizer_state": held_bytes(run.engine.optimizer_tensors(), run.device),
    }
    if world_size == 1:
        return [mine]
    everyone: list[dict[str, Any]] = [{} for _ in range(world_size)]
    dist.all_gather_object(everyone, mine)
    return everyone
