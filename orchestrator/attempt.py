"""One attempt of a run: Ray, and Ray Train's workers on it, until they end or fail.

It is carried out in a process of its own, since Ray ends the process that drives it when its raylet or its head is
gone; what supervises the run must outlive that. A process that is part of a Ray already, as a trial of a sweep is, has
the attempt in a thread.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import psutil

from orchestrator.order import WAITING, Order
from orchestrator.recovery import Failure

END_SECONDS = 10.0
"""A process that was told to end is killed after this."""
LOOK_SECONDS = 5.0
"""Its descendants are looked for this often, which walks all processes of the machine. What it started later than that
before it died ends by itself, as all of a Ray's processes do when the one above them is gone."""
GROWING_SECONDS = 10.0
"""Devices that came back are looked for this often by a run that goes on with fewer."""
DRAINING_SECONDS = 1.0
"""Nodes that are to be taken away are asked for this often: cloud providers give notice of 30 s to 2 min."""
SOON_SECONDS = 5.0
"""Workers that have not begun after this may be waiting for their devices; so often it is looked."""
AGAIN_SECONDS = 600.0
"""What is waited for is told again after this; before recovery.hang_minutes are over."""
Message = dict[str, Any]
"""An event for the run's display, or {"failure": Failure}, or {"done": True}, which are the last."""


class Attempt(Protocol):
    """An attempt under way.

    Attributes:
        can_be_killed: whether `kill` ends its workers.
    """

    can_be_killed: bool

    def message(self, seconds: float) -> Message | None:
        """What it says next; None where it says nothing in so many seconds, and at once where it has ended."""

    def ended(self) -> bool:
        """It has nothing more to say."""

    def kill(self) -> None:
        """End it and all its processes, now."""


def start(order: Order, address: str | None) -> Attempt:
    """Begin an attempt.

    Args:
        address: a running Ray, or None to start one for this attempt.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return InThread(order, address)
    process = READY.get() or InProcess()
    READY.set(None)
    process.begin(order, address)
    return process


@contextmanager
def ready() -> Iterator[None]:
    """Let the process of the first attempt that starts in this block import what it needs while the run is planned."""
    READY.set(InProcess())
    try:
        yield
    finally:
        if (unused := READY.get()) is not None:
            READY.set(None)
            unused.kill()


class InProcess:
    """An attempt in a process of its own, which imports what it needs before it is told to begin."""

    can_be_killed = True

    def __init__(self) -> None:
        spawn = get_context("spawn")  # a forked one would have our threads' locks
        self._messages, theirs = spawn.Pipe()
        self._process = spawn.Process(target=run_alone, args=(theirs,), name="attempt", daemon=True)
        with terminal_held_off():
            self._process.start()
        theirs.close()
        self._family: dict[int, psutil.Process] = {}
        self._looked = 0.0
        self._over = self._said_all = self._shared = False

    def begin(self, order: Order, address: str | None) -> None:
        """Carry out `order` on a running Ray, or, without its address, on one of its own."""
        self._shared = address is not None
        with suppress(OSError):  # it is gone, as its silence will tell
            self._messages.send((order, address))

    def message(self, seconds: float) -> Message | None:
        """See `Attempt`."""
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._look_around()
        try:
            if self._messages.poll(seconds):
                message: Message = self._messages.recv()
                self._said_all = "done" in message or "failure" in message
                return message
        except (EOFError, OSError):
            self._over = True
        return None

    def ended(self) -> bool:
        """See `Attempt`."""
        return self._over

    def kill(self) -> None:
        """See `Attempt`. Also after it has ended by itself, for what it may have left behind.

        A Ray that others use too is left in order, if that is possible.
        """
        self._look_around()
        if self._shared:
            self._process.join(END_SECONDS if self._said_all else 0)
        with suppress(ValueError):
            self._process.kill()
            self._process.join()
        for process in self._family.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(list(self._family.values()), timeout=END_SECONDS)
        self._messages.close()

    def _look_around(self) -> None:
        """Note its descendants: when it is gone, nobody can say which they were."""
        self._looked = time.monotonic()
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                self._family[process.pid] = process


class InThread(threading.Thread):
    """An attempt in this process, which is part of a Ray."""

    can_be_killed = False

    def __init__(self, order: Order, address: str | None) -> None:
        super().__init__(name="attempt", daemon=True)
        self._order, self._address = order, address
        self._said: SimpleQueue[Message] = SimpleQueue()
        self.start()

    def run(self) -> None:
        """See `threading.Thread`."""
        carry_out(self._order, self._address, self._said.put)

    def message(self, seconds: float) -> Message | None:
        """See `Attempt`."""
        with suppress(Empty):
            return self._said.get(timeout=seconds)
        return None

    def ended(self) -> bool:
        """See `Attempt`."""
        return not self.is_alive() and self._said.empty()

    def kill(self) -> None:
        """See `Attempt`. Its workers end with the trial that it is part of."""


READY: ContextVar[InProcess | None] = ContextVar("READY", default=None)
"""The process of the next attempt, where one was started before there was an order for it."""


@contextmanager
def terminal_held_off() -> Iterator[None]:
    """Keep the terminal's Ctrl-C from a process that is started here, until that lets it in."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_alone(messages: Connection) -> None:
    """What the process of an attempt does."""
    os.setsid()  # the terminal's Ctrl-C is for the process that supervises
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # one that came before is forgotten
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, handler)
    threading.Thread(target=end_with_parent, daemon=True).start()
    with suppress(Exception):  # what is wrong is told when it is wanted
        import_ray()
    try:
        order, address = messages.recv()
    except EOFError:  # there is to be none
        return
    carry_out(order, address, messages.send)
    messages.close()
    sys.stdout.flush()
    os._exit(0)  # all is said and Ray is shut down; threads of libraries must not hold this up


def import_ray() -> None:
    """Import what `carry_out` needs: it takes seconds."""
    from qlora_core.quiet import uncollected

    with uncollected():
        from orchestrator import failures, ray_runtime, trainer  # noqa: F401

        ray_runtime.set_defaults()
        import ray.train.v2.api.data_parallel_trainer  # noqa: F401


def end_with_parent() -> None:
    """Wait for the end of the process that supervises, and end too; Ray's processes follow."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def carry_out(order: Order, address: str | None, say: Callable[[Message], None]) -> None:
    """Run the workers, and say how it went: before Ray is shut down, which takes seconds."""
    from orchestrator.failures import failure_of, told_by
    from orchestrator.ray_runtime import ray_session

    said = False
    try:
        with ray_session(address, order.strategy.world_size) as own:
            try:
                fit(order, address, say, own=own)
            except BaseException as error:
                say({"failure": failure_of(error) if (told := told_by(error)) is None else told})
            else:
                say({"done": True})
            said = True
    except BaseException as error:
        if not said:
            say({"failure": failure_of(error)})


def fit(order: Order, address: str | None, say: Callable[[Message], None], *, own: bool) -> None:
    """Let Ray Train run the workers to their end, on a Ray of this run alone or on another."""
    import ray

    from orchestrator.trainer import trainer_of

    check_resources(order, address)
    if address is None and (port := ray.nodes()[0].get("MetricsExportPort", 0)) > 0:  # -1 without ray[default]
        say({"event": "prometheus", "url": f"http://127.0.0.1:{port}/metrics"})
    say({"event": "phase", "phase": "starting workers"})
    trainer = trainer_of(order, own=own)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failed.append(error)

    # beside the main thread, where Ray would handle signals by aborting without saving
    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    told = address is None  # a Ray on this machine alone is not drained, and does not grow
    looked = time.monotonic()
    queue = Queue(order)
    while thread.is_alive():
        thread.join(DRAINING_SECONDS)
        if told:
            continue
        if (waits := queue.waits()) is not None:
            say({"event": "phase", "phase": waits})
        if draining() & hosts(order):
            told = True
            say({"event": "preempted"})
        elif order.more_workers and time.monotonic() - looked >= GROWING_SECONDS:
            looked = time.monotonic()
            available = min(order.strategy.world_size + unused(order), max(order.more_workers))
            if told := min(order.more_workers) <= available:
                say({"event": "devices back", "available": available})
    if failed:
        raise failed[0]


class Queue:
    """What an attempt waits for while others use the devices that it is to have."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._begun = False
        self._next = time.monotonic() + SOON_SECONDS
        self._told, self._at = "", 0.0

    def waits(self) -> str | None:
        """What to say of it: when it begins or changes, and now and then; None where there is nothing to say.

        Raises:
            WorkerFailed: a node is gone, and what is waited for cannot come.
        """
        import ray

        now = time.monotonic()
        if self._begun or now < self._next:
            return None
        self._next = now + SOON_SECONDS
        if hosts(self._order):
            self._begun = True
            return None
        wanted, total = self._order.strategy.world_size, there(self._order)
        if total < wanted:
            raise gone(self._order, total)
        # a placement group's id ends in that of its job
        job = ray.get_runtime_context().get_job_id()
        groups = ray.util.placement_group_table()
        if not any(group["state"] == "PENDING" for name, group in groups.items() if name.endswith(job)):
            return None
        available = free(self._order)
        text = f"{WAITING}{wanted} {resource(self._order)}{'s at once' * (wanted > 1)}: {available} of {total} are free"
        if available >= wanted:
            text += f", and {int(ray.available_resources().get('CPU', 0))} CPUs, of which each worker takes one"
        if text == self._told and now - self._at < AGAIN_SECONDS:
            return None
        self._told, self._at = text, now
        return text


def draining() -> set[str]:
    """The ids of nodes that are about to be taken away."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def hosts(order: Order) -> set[str]:
    """The ids of the nodes on which the workers are, as they have left them."""
    return {path.read_text(encoding="utf-8") for path in order.alive.glob("rank-*")}


def resource(order: Order) -> str:
    """What Ray calls the device of a worker."""
    return "GPU" if order.device == "cuda" else "CPU"


def nodes_of(order: Order) -> dict[str, Mapping[str, float]]:
    """What the nodes have that are not about to be taken away and have the GPUs that are asked for, by their ids."""
    import ray

    gone = draining()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in gone}
    wanted = f"accelerator_type:{order.accelerator_type}" if order.accelerator_type else resource(order)
    return {node: resources for node, resources in nodes.items() if wanted in resources}


def there(order: Order) -> int:
    """The devices of these nodes."""
    return sum(int(resources.get(resource(order), 0)) for resources in nodes_of(order).values())


def free(order: Order) -> int:
    """Those of them that nobody has taken."""
    from ray._private.state import state

    available = state.available_resources_per_node()
    return sum(int(available.get(node, {}).get(resource(order), 0)) for node in nodes_of(order))


def unused(order: Order) -> int:
    """The devices beside the workers' that nobody has taken."""
    return max(0, min(free(order), there(order) - order.strategy.world_size))


def check_resources(order: Order, address: str | None) -> None:
    """Refuse what a running Ray cannot place: Ray Train would wait for it forever."""
    if address is None:
        return
    found, wanted = there(order), order.strategy.world_size
    if found < wanted:
        raise gone(order, found)


def gone(order: Order, found: int) -> Exception:
    """The failure of a Ray that has fewer devices than the plan needs."""
    from orchestrator.failures import WorkerFailed

    what = f"Ray has {found} {resource(order)}s, the plan needs {order.strategy.world_size}."
    remedy = "Lower strategy.world_size or add nodes."
    return WorkerFailed(Failure("node lost", what, remedy=remedy, available=found))
