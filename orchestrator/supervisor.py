"""Supervises one attempt of a run: Ray Train in a thread, its events passed on, interrupts made harmless."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from clusters.errors import RequestError, RunFailed, last_line
from orchestrator.ray_runtime import ray_session
from orchestrator.worker import Order, work
from qlora_core.files import replace_atomically

POLL_SECONDS = 0.1
EventHandler = Callable[[dict[str, Any]], None]


class Interrupted(Exception):
    """The run was asked to stop before there was anything to save."""


def run_attempt(order: Order, *, address: str | None, on_event: EventHandler) -> dict[str, Any]:
    """Run workers until they are done, or have stopped at an interrupt. Returns their last event, ``end``.

    Args:
        address: a running Ray, or None to start one for this attempt.
        on_event: called in this thread with each event that rank 0 writes.

    Raises:
        RequestError: what a worker found wrong with the request.
        RunFailed: the workers failed, with the reason of the first that did.
        Interrupted: an interrupt before the first step.
    """
    order.stop_file.unlink(missing_ok=True)
    if order.rendezvous is not None:
        order.rendezvous.unlink(missing_ok=True)
    forget_ray_state(order.checkpoints)
    events = EventReader(order.events)
    # Ray's own handler of SIGTERM, which ends the process, is installed by ray.init: ours must come after it.
    with ray_session(address, order.strategy.world_size), interrupts(order.stop_file) as interrupt:
        check_resources(order, address)
        if address is None and (port := ray.nodes()[0].get("MetricsExportPort")):
            on_event({"event": "prometheus", "url": f"http://127.0.0.1:{port}/metrics"})
        on_event({"event": "phase", "phase": "starting workers"})
        fit = FitThread(trainer_of(order))
        fit.start()
        last: dict[str, Any] = {}
        while fit.is_alive():
            fit.join(POLL_SECONDS)
            for event in events.new():
                last = event
                on_event(event)
            if interrupt.is_set() and last.get("event", "phase") == "phase":  # the loop has not begun
                raise Interrupted
        for event in events.new():
            last = event
            on_event(event)
        if fit.error is not None:
            raise explained(fit.error)
    order.stop_file.unlink(missing_ok=True)
    if last.get("event") != "end":
        raise RunFailed("The workers ended without a result.", f"Look at {order.events} for the last thing they did.")
    return last


class FitThread(threading.Thread):
    """`trainer.fit()` beside the main thread, where Ray would handle interrupts by aborting without saving."""

    def __init__(self, trainer: DataParallelTrainer) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        """Fit, and keep what went wrong."""
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error


def trainer_of(order: Order) -> DataParallelTrainer:
    """Ray Train's trainer for an attempt. Ray itself retries nothing: what follows a failure is decided above it."""
    on_gpu = order.device == "cuda"
    common: dict[str, Any] = {
        "train_loop_config": {"order": order},
        "scaling_config": ScalingConfig(
            num_workers=order.strategy.world_size,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if on_gpu else {})},
        ),
        "run_config": RunConfig(
            name=order.checkpoints.name,
            storage_path=str(order.checkpoints.parent),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    }
    if order.rendezvous is not None:
        return DataParallelTrainer(work, **common)
    return TorchTrainer(work, torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"), **common)


def forget_ray_state(checkpoints: Path) -> None:
    """Remove Ray's own notes on checkpoints and what a killed attempt left half-written.

    Which checkpoint a run resumes from is decided by which folders are complete, not by Ray's memory of them, which
    ends a run when a folder was removed by hand.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    for leftover in checkpoints.glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def check_resources(order: Order, address: str | None) -> None:
    """Refuse what a running Ray cannot place: Ray Train would wait for it forever."""
    if address is None:
        return
    kind = "GPU" if order.device == "cuda" else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if there < order.strategy.world_size:
        raise RunFailed(
            f"The Ray at {address} has {there} {kind}s, the plan needs {order.strategy.world_size}.",
            "Lower strategy.world_size or add nodes.",
        )


def explained(error: BaseException) -> Exception:
    """The first worker's own error, or a RunFailed that says what Ray Train said."""
    if isinstance(error, WorkerGroupError):
        failures = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
        for failure in failures:
            cause = root(failure)
            if isinstance(cause, RequestError | RunFailed):
                return cause
        if failures:
            cause = root(failures[0])
            text = last_line(cause)
            failed = RunFailed(
                f"A worker failed: {type(cause).__name__}: {text}.",
                "The same command goes on from the last checkpoint, if there is one. --debug shows the traceback.",
            )
            failed.__cause__ = failures[0]
            return failed
    failed = RunFailed(f"Ray Train failed: {error}.", "--debug shows the traceback.")
    failed.__cause__ = error
    return failed


def root(error: BaseException) -> BaseException:
    """The user-level exception inside Ray's wrappers."""
    while True:
        inner = getattr(error, "_base_exc", None) or getattr(error, "cause", None)
        if not isinstance(inner, BaseException):
            return error
        error = inner


class EventReader:
    """Reads a growing file of JSON lines from where it ended when the reader was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Lines that were completed since the last call."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            if self._offset > os.fstat(file.fileno()).st_size:  # its last steps are about to be done again
                self._offset = 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)


def keep_events_until(path: Path, step: int) -> None:
    """Drop events after `step` from a run's file: those steps are about to be done again."""
    if not path.exists():
        return
    with replace_atomically(path) as temporary, temporary.open("w", encoding="utf-8") as kept:
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
                wanted = event["event"] in ("step", "eval") and event["step"] <= step
            except (ValueError, TypeError, KeyError):
                continue  # a line that a killed worker left half-written
            if wanted:
                kept.write(line + "\n")


@contextmanager
def interrupts(stop_file: Path) -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the current step; the second ends the process.

    Outside the main thread signals cannot be handled, and the caller keeps its own handling.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(signum: int, frame: object) -> None:
        if asked.is_set():
            # Ray's processes die with this one: the kernel kills them when their parent ends (PR_SET_PDEATHSIG).
            os._exit(128 + signum)
        asked.set()
        # Where not even an empty file can be written, only a second signal helps.
        with suppress(OSError):
            stop_file.touch()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
