"""Ray around a run: a private one on loopback with a token of its own, or one that is running already."""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Ray's stub of its extension leaves it out

from clusters.errors import RayNotStarted, RequestError, RunFailed, first_line, request_error
from orchestrator.order import RAY_SESSION

OBJECT_STORE_BYTES = 100 * 1024**2
"""A run moves no data through Ray's object store; its default is a third of the host's memory."""
IDLE = re.compile(r"/(autoscaler/\w+/monitor|dashboard/dashboard|_private/log_monitor)\.py$")
"""Scripts of Ray that run beside it: what asks for nodes, the head of a dashboard without pages, and what passes
workers' output on to drivers that want it."""
PATIENT = {"timeout_ms_task_wait_for_death_info": 10_000}
"""What a worker died of, such as memory, is told by the task that it had then (`trainer.lean`), if Ray learns of it
within this; by default a second, for which a machine without memory may be too slow."""
SHUTDOWN_SECONDS = 10.0
CONNECT_SECONDS = 5.0


def set_defaults() -> None:
    """Set what Ray, Ray Train and the workers read from the environment, where the user has not."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # What is about to be taken away is looked for in `attempt`, so Ray Train need not start an actor that does.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray starts a process for each core ahead, and none of them is taken: Ray Train's have an environment of their own.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")


@contextmanager
def ray_session(address: str | None, workers: int) -> Iterator[bool]:
    """Ray for the length of the block, and whether it was started here; none of its processes then outlives it.

    In a process that is part of a Ray already, as a trial of a sweep is, it is that one.

    Args:
        address: HOST:PORT of a running Ray, or None to start one.
        workers: processes that must be placed on a Ray that is started here.

    Raises:
        RequestError: no Ray answers at `address`, or it refuses the token.
        RunFailed: this process is a job of another Ray than answers there now.
    """
    if ray.is_initialized():
        yield False
        return
    set_defaults()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        connect(address, options)
        try:
            yield False
        finally:
            ray.shutdown()
        return
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with private_token(), loopback_only(), seldom_looked_at():
        try:
            ray.init(
                address="local",
                num_cpus=max(workers + 1, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _system_config=PATIENT,
                **options,
            )
        except Exception as error:  # Ray raises bare exceptions when its own processes do not come up
            raise RayNotStarted(f"Ray could not be started: {error}", "Look at its logs below /tmp/ray.") from error
        started = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
        try:
            end_idle(started)
            yield True
        finally:
            ray.shutdown()
            end(started)


def connect(address: str, options: dict[str, Any]) -> None:
    """Join the Ray at `address` with the token that its user has set up."""
    check_reachable(address)
    check_token(address)
    try:
        joined = ray.init(address=address, **options)
    except (OSError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        raise no_ray(address, error) from None
    mine, there = os.environ.get(RAY_SESSION), Path(joined.address_info["session_dir"]).name
    if mine not in (None, there):  # its jobs are others: nobody could see this one there, nor stop it
        ray.shutdown()
        raise RunFailed(
            f"The Ray that started this job is gone, and another answers at {address}.", "Submit the run again."
        )


def check_reachable(address: str) -> None:
    """Raise a RequestError where nothing listens at `address`: ray.init would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise no_ray(address, error) from None


def check_token(address: str) -> None:
    """Raise a RequestError where the Ray at `address` refuses the token: ray.init tries for 20 s, then says nothing."""
    try:
        ensure_token_if_auth_enabled(create_token_if_missing=False)  # without one a GcsClient ends the process
        with quiet_stderr():
            GcsClient(address=address)
    except (OSError, ray.exceptions.RayError, RuntimeError, ValueError) as error:
        raise no_ray(address, error) from None


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep back what Ray's C++ prints past Python's streams, such as a warning of its own beside each error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def no_ray(address: str, error: Exception) -> RequestError:
    """The error of a Ray that cannot be joined."""
    # without Ray's advice, which is longer than ours
    reason = first_line(error).partition(". Ensure that the token")[0].removesuffix(".")
    return request_error(
        "cluster.address",
        address,
        f"no Ray could be joined there: {reason}",
        "Check that it is HOST:PORT of a head that runs and that this machine is one of its nodes; for a cluster with "
        "token authentication set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
    )


@cache
def process_token() -> str:
    """The token of every Ray that this process starts: Ray reads it once per process."""
    return secrets.token_hex(32)


@contextmanager
def private_token() -> Iterator[None]:
    """Token authentication for a Ray of our own, with a token that dies with this process and is written nowhere.

    ray.init turns token authentication on for a new Ray unless RAY_AUTH_MODE says otherwise, and takes RAY_AUTH_TOKEN
    before a token file (ray/_private/authentication/authentication_token_setup.py, enable_token_auth_by_default).
    """
    with environment(RAY_AUTH_MODE=None, RAY_AUTH_TOKEN=process_token()):
        yield


@contextmanager
def loopback_only() -> Iterator[None]:
    """Let a Ray that is started here bind its servers to 127.0.0.1.

    ray.init replaces a loopback address that is asked for by the host's own (ray/_private/services.py,
    resolve_ip_for_localhost) and then listens on every interface, except where multi-node clusters are switched off,
    as they are on laptops.
    """
    enabled, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        with environment(**{ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled


@contextmanager
def seldom_looked_at() -> Iterator[None]:
    """Let a Ray that is started here keep no list of tasks, for which nobody asks, and look at its node each 30 s.

    Its agent looks at every process of the machine for a node's figures, by default each 5 s. What the user has set
    stays.
    """
    wanted = {"RAY_task_events_report_interval_ms": "0", "REPORTER_UPDATE_INTERVAL_MS": "30000"}
    with environment(**{name: os.environ.get(name, value) for name, value in wanted.items()}):
        yield


@contextmanager
def environment(**wanted: str | None) -> Iterator[None]:
    """Environment variables for the length of the block; None: it is not set."""
    before = {name: os.environ.get(name) for name in wanted}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    put(wanted)
    try:
        yield
    finally:
        put(before)


def end_idle(processes: list[psutil.Process]) -> int:
    """Kill those of Ray's own that have nothing to do in a run, but look around all the time and hold memory.

    ray.init starts them whatever it is asked for (ray/_private/node.py, start_head_processes and start_ray_processes).

    Returns:
        How many they were.
    """
    killed = 0
    for process in processes:
        with suppress(psutil.Error):  # it is gone, or cannot be looked at
            if any(map(IDLE.search, process.cmdline())):
                process.kill()
                killed += 1
    return killed


def end(processes: list[psutil.Process]) -> None:
    """Wait for processes that were told to end, and kill those that do not."""
    children = []
    for process in processes:
        try:
            children += process.children(recursive=True)
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs([*processes, *children], timeout=SHUTDOWN_SECONDS)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
