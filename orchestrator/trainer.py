"""Ray Train's trainer for an attempt, without what Ray Train starts and does that a run here has no use for."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from orchestrator.order import Order

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
FOREVER_SECONDS = 10 * 365 * 24 * 3600.0
POLL_SECONDS = 1.0
"""The controller waits so long for workers that have ended, and then as long without asking."""
HELD_SECONDS = 0.5
"""A worker that has ended says so after this."""


def trainer_of(order: Order, *, own: bool) -> Any:
    """Ray Train's trainer for an attempt. Ray itself retries nothing: what follows a failure is decided above it."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    # Its one placement group, of all workers or none, stands in Ray's queue for so long.
    os.environ[START_TIMEOUT] = str(FOREVER_SECONDS if order.wait_seconds is None else order.wait_seconds)
    on_gpu = order.device == "cuda"
    common: dict[str, Any] = {
        "train_loop_config": {"order": order},
        "scaling_config": ScalingConfig(
            num_workers=order.strategy.world_size,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if on_gpu else {})},
            accelerator_type=order.accelerator_type,
        ),
        "run_config": RunConfig(
            name=order.checkpoints.name,
            storage_path=str(order.checkpoints.parent),
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
        ),
    }
    if order.rendezvous is not None:
        return lean(DataParallelTrainer, alone=own)(begin, **common)
    from ray.train.torch import TorchConfig, TorchTrainer

    torch_config = TorchConfig(backend="nccl" if on_gpu else "gloo")
    return lean(TorchTrainer, alone=False)(begin, torch_config=torch_config, **common)


def lean(trainer: type[Any], *, alone: bool) -> type[Any]:
    """A trainer without what Ray Train starts and does for every run, and a run here has no use for.

    Its actors are a process each that imports for seconds. One hands out Ray Data's datasets. Where `alone`, others are
    needless too. One frees the workers' places where the controller dies and Ray lives on, another asks an autoscaler
    for nodes, a third shows the controller's state on a dashboard: such a Ray ends with the run and has neither. The
    controller itself runs in this process, with which it ends. What brings workers together when they report is made
    all the same, but killed once they have begun: ours do not report.

    Nor do workers answer while they train. Training is in a thread, and their main thread, idle, would wake a hundred
    times a second, take the interpreter and look for signals (Ray's core_worker.cc), at the cost of the step
    (docs/performance.md, "Tried"). A task holds it instead. The controller's question how it goes is answered
    when training is over, or fails with the worker; that a worker hangs is found without asking it (`supervisor`).

    A Ray that has these elsewhere than 2.60 does as it does by itself.

    Args:
        alone: Ray is of this run alone, and ends with it.
    """
    import ray

    try:
        from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
        from ray.train.v2._internal.callbacks.state_manager import StateManagerCallback
        from ray.train.v2._internal.constants import (
            HEALTH_CHECK_INTERVAL_S_ENV_VAR,
            WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR,
        )
        from ray.train.v2._internal.execution.callback import WorkerGroupCallback
        from ray.train.v2._internal.execution.controller import TrainController
        from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
        from ray.train.v2._internal.logging import LoggingManager
    except ImportError:
        return trainer

    needless: tuple[type[Any], ...] = (DatasetsCallback,)
    if alone:
        needless += PlacementGroupCleanerCallback, StateManagerCallback
        os.environ[WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] = str(FOREVER_SECONDS)
        os.environ[HEALTH_CHECK_INTERVAL_S_ENV_VAR] = str(POLL_SECONDS)

    class Lean(trainer):  # type: ignore[misc]  # Ray is not typed
        def _create_default_callbacks(self) -> list[Any]:
            kept = [each for each in super()._create_default_callbacks() if not isinstance(each, needless)]
            return [*kept, Undisturbed()] if alone else kept

        def _initialize_and_run_controller(self, **given: Any) -> Any:
            if not alone:
                return super()._initialize_and_run_controller(**given)
            given["scaling_policy"] = AsTheyAre(scaling_config=self.scaling_config)
            return controlled_here(TrainController, LoggingManager.get_log_directory(), given)

    class Undisturbed(WorkerGroupCallback):  # type: ignore[misc]
        def after_worker_group_start(self, worker_group: Any) -> None:
            ray.kill(worker_group._worker_group_state.sync_actor)

        def after_worker_group_training_start(self, worker_group: Any) -> None:
            for worker in worker_group.get_workers():
                worker.actor.execute.remote(wait_for_training)

        def before_worker_group_shutdown(self, worker_group: Any) -> None:
            # Ray Train would ask them first: those that go on where another has failed would not answer
            for worker in worker_group.get_workers():
                ray.kill(worker.actor)

    class AsTheyAre(FixedScalingPolicy):  # type: ignore[misc]
        def after_controller_start(self, *_: Any) -> None: ...

        def _maybe_send_resource_request(self) -> None: ...

    return Lean


def controlled_here(controller: type[Any], logs: str | None, given: Mapping[str, Any]) -> Any:
    """Ray Train's result, of a controller that runs in this process, which is the attempt's, and not in an actor.

    Args:
        logs: the folder of Ray Train's logs.
        given: what the controller is made of.
    """
    from ray.runtime_context import RuntimeContext

    # It would log to the command's terminal, where an actor does not.
    os.environ["RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING"] = "0"
    logger = logging.getLogger("ray.train")
    logger.propagate = False
    if logs is not None:
        os.makedirs(logs, exist_ok=True)
        logger.addHandler(logging.FileHandler(os.path.join(logs, "controller.log")))
    RuntimeContext.current_actor = None  # it tells workers which actor it is, for reports that ours do not make
    controlling = controller(**given)
    asyncio.run(controlling.run())
    return controlling.get_result()


def wait_for_training() -> None:
    """Hold a worker's main thread until its training is over."""
    from ray.train.v2._internal.execution.context import get_train_context

    training = get_train_context().execution_context.training_thread_runner
    while training.is_running():  # no join, which a signal's handler may end for good
        time.sleep(HELD_SECONDS)


def begin(config: Mapping[str, Any]) -> None:
    """Ray Train's training function. What it needs is imported where it runs: the attempt's process does without."""
    from qlora_core.quiet import import_bitsandbytes, uncollected

    with uncollected():
        import_bitsandbytes()

        from orchestrator.worker import work

    work(config["order"])
