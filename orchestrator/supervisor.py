"""Supervises one attempt of a run: its events passed on, interrupts made harmless, hangs noticed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from orchestrator import attempt
from orchestrator.order import Order
from orchestrator.recovery import Failure
from qlora_core.files import replace_atomically

POLL_SECONDS = 0.25
"""So late events are seen at most. Looking more often takes time from a worker's threads where there are few cores."""
LOADING = 6
"""Loading and quantizing the base may take so many times as long as a step before the run is taken for hung."""
EventHandler = Callable[[dict[str, Any]], None]


class Interrupted(Exception):
    """The run was asked to stop before there was anything to save."""


class AttemptFailed(Exception):
    """An attempt did not reach the end of its run."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure.message)


def run_attempt(
    order: Order, *, address: str | None, interrupt: threading.Event, hang_seconds: float, on_event: EventHandler
) -> dict[str, Any]:
    """Run workers until they are done, or have stopped at an interrupt. Returns their last event, ``end``.

    Args:
        address: a running Ray, or None to start one for this attempt.
        interrupt: set by a signal, which has left the order's stop file too.
        hang_seconds: the attempt is ended when no worker has got on for so long.
        on_event: called in this thread with each event that rank 0 writes.

    Raises:
        AttemptFailed: with what happened.
        Interrupted: an interrupt before the first step.
    """
    if order.rendezvous is not None:
        order.rendezvous.unlink(missing_ok=True)
    shutil.rmtree(order.alive, ignore_errors=True)
    order.alive.mkdir(parents=True)
    forget_ray_state(order.checkpoints)
    events = EventReader(order.events)
    running = attempt.start(order, address)
    watchdog = Watchdog(order.alive, hang_seconds)
    last: dict[str, Any] = {}
    failure: Failure | None = None
    asked: Failure | None = None  # why the workers were asked to end

    def pass_on() -> None:
        nonlocal last
        for event in events.new():
            last = event
            watchdog.saw(event)
            on_event(event)

    try:
        while failure is None:
            message = running.message(POLL_SECONDS)
            pass_on()
            if address is None and running.can_be_killed and last.get("event") == "end":
                break  # nobody else uses this Ray, so it need not be left in order
            if message is None:
                if running.ended():
                    failure = Failure("node lost", "the Ray of this run, or the process that drives it, is gone")
                elif hung := watchdog.hung():
                    # workers that cannot be ended would be in the way of the next attempt's
                    failure = Failure("hung" if running.can_be_killed else "error", hung)
            elif message.get("done"):
                break
            elif "failure" in message:
                failure = message["failure"]
            elif message["event"] in ("preempted", "devices back"):
                asked = asked_to_end(message)
                order.stop_file.touch()  # the workers end after their step, with a checkpoint
            else:
                watchdog.saw(message)
                on_event(message)
            wanted = interrupt.is_set() or (asked is None and order.stop_file.exists())
            if wanted and last.get("event", "phase") == "phase":  # the loop has not begun
                raise Interrupted
    finally:
        running.kill()
        shutil.rmtree(order.alive, ignore_errors=True)
    pass_on()
    if last.get("event") == "end" and last["finished"]:
        return last  # whatever happened after all was learned and saved
    if failure is not None:
        raise AttemptFailed(failure)
    if last.get("event") != "end":
        raise AttemptFailed(Failure("error", "the workers ended without a result", remedy=f"Look at {order.events}."))
    if asked is not None and not interrupt.is_set():
        raise AttemptFailed(asked)
    return last


def asked_to_end(message: Mapping[str, Any]) -> Failure:
    """Why an attempt ends in order, before its run does."""
    if message["event"] == "preempted":
        return Failure("preempted", "a node is taken away")
    available = message["available"]
    return Failure("devices back", f"{available} devices are there again", available=available)


class Watchdog:
    """Notices that no worker gets on any more.

    Args:
        folder: where each rank touches a file of its own when it has done something.
        seconds: without any of that, after which they hang; `LOADING` times as long before the first step.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds
        self._since = time.time()
        self._loading = True

    def saw(self, event: dict[str, Any]) -> None:
        """An event came."""
        self._since = time.time()
        self._loading = event["event"] == "phase"

    def hung(self) -> str | None:
        """What to say of it, if they hang."""
        now, limit = time.time(), self._seconds * (LOADING if self._loading else 1)
        if now - self._since <= limit:
            return None
        touched = {path.name: path.stat().st_mtime for path in self._folder.glob("rank-*")}
        silent = now - max([self._since, *touched.values()])
        if silent <= limit:
            return None
        first = f", first {min(touched, key=lambda name: touched[name])}" if touched else ""
        return f"no worker got on for {silent:.0f} s{first}"


def forget_ray_state(checkpoints: Path) -> None:
    """Remove Ray's own notes: which checkpoint a run resumes from is decided by which are valid."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)


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
            # a progress line hides the cursor, and nobody else shows it again
            cursor = "\x1b[?25h\n" if os.isatty(2) else ""
            told = f"{cursor}Ended at once: the same command goes on from the last checkpoint, if there is one.\n"
            with suppress(OSError):
                os.write(2, told.encode())
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
