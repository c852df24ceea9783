"""What follows a failure: every kind, every state of the budgets, and who of several ranks is believed."""

from __future__ import annotations

import errno
import itertools
from typing import get_args

import pytest
import torch
from safetensors import SafetensorError

from clusters.errors import NotFinite, RayNotStarted, RunFailed, StorageFailed, request_error, without_secrets
from orchestrator.failures import WorkerFailed, cause, failure_of, kind_of, lost, told_by
from orchestrator.recovery import RULES, Decision, Failure, Kind, Limits, decide

KINDS: tuple[Kind, ...] = get_args(Kind)
ENDS = {"no room", "disk full", "no rights", "data", "not finite", "user", "error"}
"""Of a person's making, or of the code's: the same would fail again."""
UNBOUNDED = {"gpu memory", "preempted", "devices back"}
"""A leaner plan exists or not; where workers are asked to end it costs no step."""


def failure(kind: Kind) -> Failure:
    return Failure(kind, "it failed")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("retries", [0, 1, 3])
@pytest.mark.parametrize("before", [0, 1, 2, 3, 50])
def test_every_kind_at_every_state_of_its_budget(kind: Kind, retries: int, before: int) -> None:
    decision = decide(failure(kind), [failure(kind)] * before, Limits(retries, 2), 2)
    most = 10 * retries if kind == "node lost" else retries  # a node takes longer to come back than a process
    goes_on = kind not in ENDS and retries > 0 and (kind in UNBOUNDED or before < most)
    assert (decision.action != "stop") == goes_on
    assert decision.reason
    assert decision.seconds >= 0


@pytest.mark.parametrize(("kind", "other"), itertools.permutations(KINDS, 2))
def test_budgets_are_kept_by_kind(kind: Kind, other: Kind) -> None:
    alone = decide(failure(kind), [], Limits(2, 1), 1)
    assert decide(failure(kind), [failure(other)] * 9, Limits(2, 1), 1) == alone


def test_out_of_memory_is_never_tried_again_with_the_same_plan() -> None:
    for kind in ("gpu memory", "host memory"):
        assert decide(failure(kind), [], Limits(3, 1), 1).action == "replan"


def test_pauses_double_up_to_a_limit() -> None:
    pauses = [decide(failure("storage"), [failure("storage")] * n, Limits(99, 1), 1).seconds for n in range(9)]
    assert pauses[:4] == [5, 10, 20, 40]
    assert pauses[-1] == 300


@pytest.mark.parametrize(
    ("available", "fewest", "action"),
    [(None, 1, "wait"), (0, 1, "wait"), (1, 1, "shrink"), (2, 1, "shrink"), (3, 1, "wait"), (1, 2, "wait")],
)
def test_lost_nodes_are_waited_for_unless_fewer_workers_are_enough(
    available: int | None, fewest: int, action: str
) -> None:
    lost_node = Failure("node lost", "gone", available=available)
    assert decide(lost_node, [], Limits(3, fewest), 3).action == action


def test_every_kind_has_a_rule_with_a_reason() -> None:
    assert set(RULES) == set(KINDS)
    assert all(rule.why for rule in RULES.values())
    assert isinstance(decide(failure("error"), [], Limits(3, 1), 1), Decision)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), "gpu memory"),
        (RuntimeError("CUDA error: out of memory"), "gpu memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "gpu memory"),
        (RuntimeError("CUDA driver error: out of memory"), "gpu memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "gpu memory"),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously"), "gpu memory"),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error (run with "
                "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call to CUDA function "
                "failed.\nLast error:\nCuda failure 2 'out of memory'"
            ),
            "gpu memory",
        ),
        (RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB."), "gpu memory"),
        (MemoryError(), "host memory"),
        (torch.distributed.DistBackendError("NCCL error: mmap failed: Cannot allocate memory"), "host memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), "host memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "host memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk full"),
        (StorageFailed("It could not be written.", "Free space.", errno.ENOSPC), "disk full"),
        (StorageFailed("It could not be written.", "Look.", errno.EIO), "storage"),
        (OSError(errno.EIO, "Input/output error"), "storage"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory"),
            "storage",
        ),  # of a share that is away for a while
        (PermissionError(errno.EACCES, "Permission denied"), "no rights"),
        (StorageFailed("It could not be written.", "Make it writable.", errno.EROFS), "no rights"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), "error"),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), "error"),
        (OSError("/models/x does not appear to have a file named config.json."), "error"),  # transformers'
        (ValueError("template /data/igloo/chat.jinja is wrong"), "error"),
        (RuntimeError("template /data/igloo/chat.jinja is wrong"), "error"),
        (KeyError("gloo"), "error"),
        (torch.distributed.DistBackendError("NCCL error"), "worker lost"),
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1234"), "worker lost"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "worker lost"),
        (NotFinite("The loss is nan.", "Lower it."), "not finite"),
        (request_error("recipe.rank", 0, "it is too small", "Raise it"), "user"),
        (SafetensorError("Error while deserializing header: HeaderTooLarge"), "data"),
        (RayNotStarted("Ray could not be started: the node timed out.", "Look."), "worker lost"),
        (RunFailed("Something else.", "Look."), "error"),
        (KeyError("oops"), "error"),
    ],
)
def test_an_exception_is_classified(error: Exception, kind: Kind) -> None:
    assert kind_of(error) == kind


def test_real_exhaustion_of_host_memory_is_recognised() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert kind_of(raised.value) == "host memory"


def test_of_several_ranks_the_first_cause_is_believed() -> None:
    gone = failure_of(RuntimeError("Connection closed by peer"), 0)
    full = failure_of(torch.OutOfMemoryError("CUDA out of memory"), 1, {"forward": 7, "reserved": 9})
    found = cause({0: gone, 1: full})
    assert (found.kind, found.rank, found.measured) == ("gpu memory", 1, {"forward": 7, "reserved": 9})
    assert cause({0: gone}).kind == "worker lost"


def test_what_workers_said_comes_out_of_ray_s_errors() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train import WorkerGroupError
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

    wrong = request_error("recipe.rank", 0, "it is too small", "Raise it")
    raised = UserExceptionWithTraceback(WorkerFailed(failure_of(wrong, 1)), "trace")
    dead = WorkerHealthCheckFailedError("a check failed", ActorDiedError())
    said = told_by(WorkerGroupError("text", {0: dead, 1: raised}))
    assert said is not None
    assert (said.kind, said.problems) == ("user", wrong.problems)
    alone = told_by(WorkerGroupError("text", {0: dead}))
    assert alone is not None
    assert (alone.kind, alone.rank) == ("worker lost", 0)
    assert told_by(ValueError("of ours")) is None


def test_a_worker_that_cannot_join_the_others_is_told_apart_from_one_without_a_place() -> None:
    from ray.exceptions import RayTaskError
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError

    # as Ray gives it where torch is a build for CPUs: the traceback of the worker comes first, and in colours
    cause = RuntimeError("Distributed package doesn't have NCCL built in")
    header = "\x1b[36mray::execute._setup_torch_process_group()\x1b[39m (pid=17557, ip=127.0.0.2)\n  File ..."
    raised = RayTaskError("execute", f"{header}\nRuntimeError: {cause}", cause)
    for error in (raised, raised.as_instanceof_cause()):
        said = told_by(ControllerError(error))
        assert said is not None
        assert (said.kind, said.message) == ("error", f"RuntimeError: {cause}"), "not retried: it would fail again"
    away = told_by(ControllerError(WorkerGroupStartupFailedError("a node died\nwhile its worker began")))
    assert away is not None
    assert (away.kind, away.message) == ("node lost", "the workers could not be placed: while its worker began")
    peer = RuntimeError("[TCPStore] Connection reset by peer")
    broken = told_by(ControllerError(RayTaskError("execute", str(peer), peer)))
    assert broken is not None
    assert broken.kind == "worker lost"


def test_a_failure_carries_its_traceback_and_its_remedy_but_no_traceback_into_the_record() -> None:
    try:
        raise RunFailed("The disk is broken.", "Replace it.")
    except RunFailed as error:
        found = failure_of(error, 2)
    assert (found.message, found.remedy, found.rank) == ("The disk is broken.", "Replace it.", 2)
    assert "Traceback" in found.details
    assert "details" not in found.to_json()


def test_secrets_of_the_environment_stay_out_of_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_SECRET_KEY", "wJalrXUtnFEMI")
    found = failure_of(ValueError("denied for wJalrXUtnFEMI at https://me:wJalrXUtnFEMI@host/x"))
    assert "wJalrXUtnFEMI" not in found.message + found.details


@pytest.mark.parametrize(
    "name",
    [
        "AZURE_STORAGE_CONNECTION_STRING",
        "PGPASS",
        "DB_PASSWD",
        "AWS_CREDENTIALS",
        "DATABASE_PWD",
        "SENTRY_DSN",
        "X_SAS",
    ],
)
def test_values_of_variables_that_hold_secrets_are_not_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "AccountKey=hunter22")
    monkeypatch.setenv("PWD", "/home/me/runs")
    told = without_secrets(
        "AccountKey=hunter22 is refused at https://host/x?sig=abc&X-Amz-Signature=dead in /home/me/runs"
    )
    assert told == "*** is refused at https://host/x?*** in /home/me/runs"


def test_a_password_in_an_address_is_in_no_message() -> None:
    wrong = request_error("--address", "http://me:hunter22@host:8265", "nothing at http://me:hunter22@host", "Start it")
    assert str(wrong) == "--address: nothing at http://***@host (got http://***@host:8265). Start it."
    assert str(request_error("model", "hub://org/name@main", "r", "m")).endswith("(got hub://org/name@main). m.")


def test_ray_s_memory_monitor_and_lost_nodes_are_told_apart() -> None:
    from ray.exceptions import NodeDiedError, OutOfMemoryError

    assert lost(OutOfMemoryError("Task was killed due to the node running low on memory."), 1).kind == "host memory"
    assert lost(NodeDiedError("its node has died"), 1).kind == "node lost"
