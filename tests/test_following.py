"""How a run goes on after a failure, on a machine with GPUs that is only described: no worker is started."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from launch.report.run_report import spent_seconds
from orchestrator import run
from orchestrator.following import decided, more_workers, told
from orchestrator.ledger import device_seconds, faults
from orchestrator.machine import Machine
from orchestrator.prepare import Prepared, prepare, resized
from orchestrator.record import Attempt, RunRecord
from orchestrator.recovery import Failure
from orchestrator.spec import load_spec
from orchestrator.supervisor import AttemptFailed

FOUR_GPUS = Machine(
    kind="cuda", name="NVIDIA A100-SXM4-80GB", devices=4, memory_bytes=70 * 1024**3, compute_capability=(8, 0)
)
SEQUENCES = 12


@pytest.fixture
def prepared(tmp_path: Path, tiny_base: Path, conversations: Path) -> Callable[..., Prepared]:
    def make(**strategy: Any) -> Prepared:
        fields = {
            "name": "tiny",
            "model": str(tiny_base),
            "data": {"path": str(conversations), "eval_fraction": 0.1},
            "output": str(tmp_path / "out"),
            "recipe": {"seq_len": 64, "tokens_per_step": 64 * SEQUENCES, "steps": 4, "optimizer": "adamw"},
            "strategy": strategy,
            "recovery": {"min_workers": 1},
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(fields))
        return prepare(load_spec(path), machine=FOUR_GPUS)

    return make


def record(*workers: int) -> RunRecord:
    attempts = [Attempt(started="2026", from_step=0, strategy={"world_size": number}) for number in workers]
    return RunRecord(id="1", name="tiny", identity={}, total_steps=4, plan={}, data={}, predicted={}, attempts=attempts)


def test_out_of_host_memory_beside_gpus_brings_back_what_is_kept_on_the_host(
    prepared: Callable[..., Prepared],
) -> None:
    before = prepared(world_size=2, zero_stage=3, offload="optimizer")
    failure = Failure("host memory", "std::bad_alloc", rank=1)
    decision, after = decided(failure, [], before)
    assert decision.action == "replan"
    assert (after.plan.strategy.offload, after.plan.strategy.world_size) == ("none", 2)
    assert after.plan.strategy.zero_stage < 3  # under which each rank loads a model on the host
    assert after.plan.estimate.host.most_bytes <= 0.9 * before.plan.estimate.host.most_bytes
    assert after.plan.strategy.sequences_per_step == SEQUENCES
    assert "on the host" in told(failure, decision, before, after, 2)


def test_where_nothing_lies_on_the_host_out_of_host_memory_is_tried_again(prepared: Callable[..., Prepared]) -> None:
    before = prepared(world_size=1, zero_stage=0, offload="none", paged_optimizer=False)
    decision, after = decided(Failure("host memory", "std::bad_alloc"), [], before)
    assert (decision.action, after) == ("retry", before)


@pytest.mark.parametrize(("left", "workers"), [(3, 3), (2, 2), (1, 1)])
def test_lost_devices_leave_the_tokens_of_a_step_as_they_were(
    prepared: Callable[..., Prepared], left: int, workers: int
) -> None:
    before = prepared(world_size=4, zero_stage=2)
    decision, after = decided(Failure("node lost", "gone", available=left), [], before)
    assert decision.action == "shrink"
    assert (after.plan.strategy.world_size, after.plan.strategy.sequences_per_step) == (workers, SEQUENCES)


def test_a_run_grows_to_what_was_asked_for_and_no_further(prepared: Callable[..., Prepared]) -> None:
    whole = prepared(world_size=4, zero_stage=2)
    alone = resized(whole, 1)
    assert alone is not None
    assert more_workers(alone, record(4, 1)) == (2, 3, 4)
    assert more_workers(whole, record(4)) == ()
    # the specification was changed between two starts
    assert more_workers(prepared(world_size=2, zero_stage=2), record(4)) == ()
    chosen = resized(prepared(zero_stage=2), 1)
    assert chosen is not None
    assert more_workers(chosen, record(2, 1)) == (2,)  # what it had, where nobody asked for a number
    for available, workers in ((2, 2), (4, 4)):
        decision, grown = decided(Failure("devices back", "there again", available=available), [], alone)
        assert (decision.action, grown.plan.strategy.world_size) == ("grow", workers)
        assert grown.plan.strategy.sequences_per_step == SEQUENCES


def test_what_a_run_takes_and_costs_goes_by_the_tokens_that_its_rows_have(
    prepared: Callable[..., Prepared], conversations: Path
) -> None:
    before = prepared(world_size=4, zero_stage=2)
    nodes = replace(FOUR_GPUS, gpus_per_node=2, node_hour_price=5.0, currency="EUR")
    run = replace(before, machine=nodes)
    assert (one := before.plan.duration) is not None
    assert one.price is None
    learned = before.train.lengths
    assert (one.steps, one.tokens) == (4, round(sum(learned) / len(learned) * SEQUENCES * 4))
    step = before.plan.verdict.step_time
    assert step is not None
    assert one.seconds == pytest.approx(one.tokens / step.tokens * step.seconds)
    assert one.gpu_hours == pytest.approx(4 * one.seconds / 3600)
    alone = resized(run, 1)
    assert alone is not None
    assert (fewer := alone.plan.duration) is not None
    assert (fewer.tokens, fewer.currency) == (one.tokens, "EUR")
    assert fewer.price == pytest.approx(5.0 * fewer.seconds / 3600)  # whether both of a node's GPUs are taken or not
    assert (three := resized(run, 3)) is not None
    assert (more := three.plan.duration) is not None
    assert more.price == pytest.approx(2 * 5.0 * more.seconds / 3600)
    assert more.gpu_hours == pytest.approx(3 * more.seconds / 3600)


def test_devices_that_come_back_are_no_failure(prepared: Callable[..., Prepared]) -> None:
    whole = prepared(world_size=4, zero_stage=2)
    alone = resized(whole, 1)
    assert alone is not None
    back = Failure("devices back", "4 devices are there again", available=4)
    decision, grown = decided(back, [], alone)
    text = told(back, decision, alone, grown, 7)
    assert text.startswith(
        "Stopped (devices back): 4 devices are there again. It goes on from step 7 with more workers"
    )
    assert json.dumps(back.to_json())


STARTED = datetime.fromisoformat("2026-11-30T10:00:00+00:00").timestamp()
PHASE = {"event": "phase", "phase": "loading the base model"}


def beginning_again(prepared: Prepared, *told: dict[str, Any], torn: str = "") -> RunRecord:
    """The record of a run whose first attempt, begun at STARTED, was killed with its driver, once the next begins."""
    output = Path(prepared.spec.output)
    output.mkdir()
    (output / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in told) + torn)
    attempt = Attempt(started="2026-11-30T10:00:00+00:00", from_step=0, strategy={"world_size": 4})
    found = record(4).model_copy(update={"attempts": [attempt]})
    run.begin_attempt(prepared, found, output, cast(Any, None))
    return found


def test_an_attempt_whose_driver_was_killed_cost_what_it_held_and_is_a_fault(prepared: Callable[..., Prepared]) -> None:
    found = beginning_again(
        prepared(world_size=4, zero_stage=2),
        {"event": "step", "step": 0, "time": STARTED - 500},  # of an attempt before it
        {**PHASE, "time": STARTED + 100},  # after it had stood in a queue
        {"event": "step", "step": 60, "time": STARTED + 160.7},
        torn='{"event": "st',
    )
    killed, again = found.attempts
    assert (killed.status, killed.ended) == ("failed", "2026-11-30T10:02:40+00:00")
    assert (killed.failure or {})["kind"] == "worker lost"
    assert (again.status, again.ended) == ("running", None)
    fields = found.model_dump()
    assert (faults(fields), device_seconds(fields), spent_seconds(found)) == (1, 4 * 60, 60)


def test_one_that_was_killed_before_its_workers_told_anything_is_a_fault_that_cost_nothing(
    prepared: Callable[..., Prepared],
) -> None:
    before = {"event": "step", "step": 0, "time": STARTED - 500}
    found = beginning_again(prepared(world_size=4, zero_stage=2), before)
    fields = found.model_dump()
    assert (found.attempts[0].ended, faults(fields), device_seconds(fields)) == (found.attempts[0].started, 1, 0)


@pytest.mark.parametrize("placed", [True, False])
def test_what_an_attempt_waits_in_a_queue_is_not_what_it_held(
    placed: bool, prepared: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(["2026-11-30T12:00:00+00:00"])

    def run_attempt(*_: object, on_event: Callable[[dict[str, Any]], None], **__: object) -> dict[str, Any]:
        on_event({"event": "phase", "phase": "waiting for 4 GPUs at once: 0 of 4 are free"})
        if placed:
            on_event({**PHASE, "time": STARTED + 7200})
            on_event({"event": "step", "step": 1, "time": STARTED + 9000})
        raise AttemptFailed(Failure("no room", "others have used the devices"))

    monkeypatch.setattr(run, "run_attempt", run_attempt)
    monkeypatch.setattr(run, "now", lambda: next(clock))
    before = prepared(world_size=4, zero_stage=2)
    waited = Attempt(started="2026-11-30T10:00:00+00:00", from_step=0, strategy={"world_size": 4})
    found = record(4).model_copy(update={"attempts": [waited]})
    with pytest.raises(AttemptFailed):
        run.attempted(before, found, Path(before.spec.output), threading.Event(), lambda event: None)
    waited.ended = "2026-11-30T12:30:00+00:00" if placed else "2026-11-30T12:00:00+00:00"
    held = 1800 if placed else 0
    assert (device_seconds(found.model_dump()), spent_seconds(found)) == (4 * held, held)
