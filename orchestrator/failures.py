"""What an exception of a worker, or its death, is in the words of `recovery`."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError

from clusters.errors import (
    NO_RIGHTS,
    NO_SPACE,
    NotFinite,
    RayNotStarted,
    RequestError,
    RunFailed,
    StorageFailed,
    last_line,
    without_secrets,
)
from orchestrator.recovery import Failure, Kind

GPU_MEMORY = re.compile(
    r"(?i)\b(cuda|hip|nccl|triton)\b.*out of memory|cudaErrorMemoryAllocation|CU[A-Z]+_STATUS_ALLOC_FAILED", re.S
)
"""How it is said where torch's own error is not raised: by CUDA's driver, NCCL, Triton and CUDA's libraries."""
HOST_MEMORY = re.compile(r"can't allocate memory|[Cc]annot allocate memory|std::bad_alloc|not enough memory: you tried")
PEER = re.compile(
    r"[Cc]onnection (was )?(closed|reset|refused)|[Bb]roken pipe|Socket [Tt]imeout|Timed out waiting"
    r"|\b([Gg]loo|(ProcessGroup)?NCCL|TCPStore)\b(?! built in)"
)
"""How a worker notices that another is gone; a torch without NCCL says so each time."""
NOT_OF_STORAGE = frozenset({None, errno.EISDIR, errno.ENOTDIR})
"""OSErrors of a wrong path, or by which a library says that a file is not what it wants: the same would fail again. A
file that is not there may come back: a share that is away is an empty folder."""
FIRST: tuple[Kind, ...] = (
    "gpu memory",
    "host memory",
    "user",
    "data",
    "not finite",
    "disk full",
    "no rights",
    "storage",
    "no room",
    "error",
    "preempted",
    "node lost",
    "hung",
    "worker lost",
)
"""Of what several ranks say, the first of these is the cause: the others notice only that it is gone."""


class WorkerFailed(Exception):
    """What a worker raises in the place of the exception that ended it: typed, and safe to send."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure)

    def __str__(self) -> str:
        return self.failure.message


def failure_of(error: BaseException, rank: int | None = None, measured: Mapping[str, int] | None = None) -> Failure:
    """An exception as a failure."""
    details = without_secrets("".join(traceback.format_exception(error)))
    what, remedy = last_line(error), ""
    if isinstance(error, RunFailed):
        what, remedy = error.what, error.remedy
    elif isinstance(error, RequestError):
        what = str(error)
    else:
        what = f"{type(error).__name__}: {what}"
    problems = error.problems if isinstance(error, RequestError) else ()
    return Failure(
        kind_of(error), without_secrets(what), rank, remedy, details, dict(measured or {}), problems=problems
    )


def kind_of(error: BaseException) -> Kind:
    """What kind of failure an exception is."""
    text = str(error)
    torch: Any = sys.modules.get("torch")  # where it is not imported, which takes seconds, the error is none of its
    if isinstance(error, RuntimeError) and (
        (torch and isinstance(error, torch.OutOfMemoryError)) or GPU_MEMORY.search(text)
    ):
        return "gpu memory"
    if isinstance(error, MemoryError) or HOST_MEMORY.search(text):
        return "host memory"
    if isinstance(error, RequestError):
        return "user"
    if isinstance(error, NotFinite):
        return "not finite"
    if isinstance(error, StorageFailed | OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return kind_of_storage(error)
    if isinstance(error, RayNotStarted):
        return "worker lost"
    if isinstance(error, RunFailed):
        return "error"
    if isinstance(error, SafetensorError):
        return "data"  # a checkpoint's are told as such
    if torch and isinstance(error, torch.distributed.DistError):
        return "worker lost"
    if isinstance(error, ConnectionError | TimeoutError) or (isinstance(error, RuntimeError) and PEER.search(text)):
        return "worker lost"
    return "error"


def kind_of_storage(error: StorageFailed | OSError) -> Kind:
    """What kind of failure an error of files is, by its number."""
    if error.errno in NO_SPACE:
        return "disk full"
    if error.errno in NO_RIGHTS:
        return "no rights"
    if isinstance(error, OSError) and error.errno in NOT_OF_STORAGE:
        return "error"
    return "storage"


def cause(failures: Mapping[int, Failure]) -> Failure:
    """Of what each rank says, what it began with.

    Args:
        failures: by rank, at least one.
    """
    return min(failures.values(), key=lambda one: (FIRST.index(one.kind), one.rank is None, one.rank or 0))


def lost(error: Any, rank: int) -> Failure:
    """The death of a worker, as Ray reports it."""
    inner = getattr(error, "health_check_failure", error)
    text = str(inner)
    name = type(inner).__name__
    if getattr(inner, "preempted", False):
        return Failure("preempted", f"the node of rank {rank} was preempted", rank)
    if name == "OutOfMemoryError" or "memory pressure" in text or "due to the node running low on memory" in text:
        return Failure("host memory", f"Ray ended rank {rank}, for its node ran out of memory", rank)
    if name == "NodeDiedError" or "node has died" in text.lower():
        return Failure("node lost", f"the node of rank {rank} is gone", rank)
    return Failure("worker lost", f"the process of rank {rank} is gone", rank)


def told_by(error: BaseException) -> Failure | None:
    """What the workers said of a failure of their group, or what became of them; None where it is another error."""
    from ray.exceptions import RayActorError, RayError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2.api.exceptions import PreemptionError

    if isinstance(error, WorkerFailed):
        return error.failure
    if isinstance(error, PreemptionError):
        return Failure("preempted", "a node was taken away before the workers had ended")
    if isinstance(error, RayActorError):
        return Failure("node lost", "Ray Train's controller is gone")
    if isinstance(error, ControllerError):
        inner = root(error.controller_failure)
        # of no public module of Ray's
        if type(inner).__name__ == "WorkerGroupStartupTimeoutError":
            return Failure(
                "no room",
                "The devices that the run waited for were not free in time.",
                remedy="Start it again when they are, or raise recovery.wait_minutes.",
            )
        if isinstance(inner, RayError) or type(inner).__module__.startswith("ray."):
            return Failure("node lost", f"the workers could not be placed: {last_line(inner)}")
        return failure_of(inner)  # they were, and then one could not join the others
    if not isinstance(error, WorkerGroupError) or not error.worker_failures:
        return None
    said: dict[int, Failure] = {}
    for rank, raised in error.worker_failures.items():
        inner = root(raised)
        if isinstance(inner, WorkerFailed):
            said[rank] = inner.failure
        elif inner is raised:
            said[rank] = lost(raised, rank)
        else:
            said[rank] = failure_of(inner, rank)
    return cause(said)


def root(error: BaseException) -> BaseException:
    """The user-level exception inside Ray's wrappers."""
    while True:
        inner = getattr(error, "_base_exc", None) or getattr(error, "cause", None)
        if not isinstance(inner, BaseException):
            return error
        error = inner
