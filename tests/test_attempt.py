"""The process of an attempt, before it has an order."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.state import state

from orchestrator.attempt import READY, ready, there, unused
from orchestrator.order import Order
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy


def process_that_is_ready() -> psutil.Process:
    process = READY.get()
    assert process is not None
    return psutil.Process(process._process.pid)


def test_a_process_that_was_made_ready_ends_with_its_block_where_no_attempt_took_it() -> None:
    with ready():
        process = process_that_is_ready()
        assert process.is_running()
    assert READY.get() is None
    assert not process.is_running()


def test_the_ctrl_c_of_a_terminal_does_not_reach_it_however_early() -> None:
    with ready():
        process = process_that_is_ready()
        process.send_signal(signal.SIGINT)  # before it has left the terminal's session
        deadline = time.monotonic() + 60
        while os.getsid(process.pid) != process.pid:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.5)  # it has let signals in
        assert process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("accelerator_type", "of_all", "not_taken"),
    [
        ("A100", 8, 2),  # of the 8 free L40S it can use none, nor the A100 of the nodes that are dead or go
        ("L40S", 8, 4),  # beside 4 workers
        (None, 16, 10),
    ],
)
def test_devices_are_back_only_where_they_are_of_the_kind_that_the_run_is_planned_for(
    monkeypatch: pytest.MonkeyPatch, accelerator_type: str | None, of_all: int, not_taken: int
) -> None:
    def node(name: str, gpus: int, kind: str, *, alive: bool = True) -> dict[str, object]:
        return {"NodeID": name, "Alive": alive, "Resources": {"GPU": float(gpus), f"accelerator_type:{kind}": 1.0}}

    nodes = [
        {"NodeID": "head", "Alive": True, "Resources": {"CPU": 2.0}},
        node("a", 4, "A100"),
        node("b", 4, "A100"),
        node("c", 8, "L40S"),
        node("gone", 4, "A100", alive=False),
        node("going", 4, "A100"),
    ]
    available = {"head": {"CPU": 2.0}, "a": {}, "b": {"GPU": 2.0}, "c": {"GPU": 8.0}, "going": {"GPU": 4.0}}
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(state, "get_draining_nodes", lambda: {"going": 0})
    monkeypatch.setattr(state, "available_resources_per_node", lambda: available)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.0, "GPU": 14.0})
    order = order_of(accelerator_type, workers=4)
    assert there(order) == of_all
    assert unused(order) == not_taken


def order_of(accelerator_type: str | None, workers: int) -> Order:
    nowhere = Path("/nowhere")
    return Order(
        name="run",
        model="base",
        adapter=None,
        recipe=Recipe(),
        strategy=Strategy(world_size=workers),
        compute_dtype="bfloat16",
        device="cuda",
        seed=0,
        total_steps=1,
        save_every=1,
        keep=1,
        examples=nowhere,
        checkpoints=nowhere,
        events=nowhere,
        alive=nowhere,
        stop_file=nowhere,
        resume_from=None,
        attempt=1,
        facts={},
        rendezvous=None,
        predicted={},
        accelerator_type=accelerator_type,
    )
