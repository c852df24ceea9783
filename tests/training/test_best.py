"""What evaluations decide: when a run ends before its last step, and which checkpoint becomes its result."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_runs import Watcher, build, encode, recipe_of, tensors

from clusters.errors import RequestError, RunFailed
from launch.report.words import ending
from orchestrator.outcome import finish
from orchestrator.prepare import Prepared, prepare
from orchestrator.record import Attempt, RunRecord, now
from orchestrator.run import open_record, order_of
from orchestrator.spec import load_spec
from orchestrator.worker import gather_measurements
from orchestrator.worker import prepare as build_worker
from qlora_core.memory.measure import meter_for
from qlora_core.training import loop, manifest
from qlora_core.training.loop import Outcome, train

STEPS = 6  # of `build`
Losses = Mapping[int, float]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, conversations: Path) -> Path:
    return encode(conversations, tiny_base, tmp_path_factory.mktemp("encoded"))


@pytest.fixture
def run(tmp_path: Path, tiny_base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """A real run whose evaluations are a stand-in: the loss that is told for a step, and that step as the answers."""

    def trained(
        losses: Losses, name: str = "run", resume: Path | None = None, stop_after: int | None = None, **changes: Any
    ) -> Outcome:
        watcher = Watcher(stop_after)
        first: int = 0 if resume is None else manifest.load_facts(resume)["step"]

        def step() -> int:
            return first + len([event for event in watcher.events if event["event"] == "step"])

        monkeypatch.setattr(loop, "evaluate", lambda run, observer: losses.get(step(), 9.0))
        monkeypatch.setattr(loop, "answers", lambda run: [{"given": f"after step {step()}"}])
        built = build(tiny_base, data, tmp_path / name, recipe_of(), resume)
        return train(dataclasses.replace(built, **{"save_every": 1, **changes}), watcher, resume)

    return trained


@pytest.mark.parametrize(
    ("losses", "patience", "last", "best"),
    [
        ((3, 2, 2.5, 2.2, 1, 0.5), 2, 4, 2),
        ((3, 2, 2.5, 1, 1.5, 0.5), 2, 6, 6),  # counted anew after each that is lower
        ((3, 3, 3, 3, 3, 3), 1, 2, 1),  # the same is not lower
        ((1, 2, 3, 4, 5, 6), 5, 6, 1),
        ((1, 2, 3, 4, 5, 6), 6, 6, 1),
        ((1, 2, 3, 4, 5, 6), None, 6, 1),
    ],
)
def test_a_run_ends_after_so_many_checkpoints_without_a_lower_loss(
    run: Callable[..., Outcome], losses: tuple[float, ...], patience: int | None, last: int, best: int
) -> None:
    came = run(dict(enumerate(losses, start=1)), patience=patience)
    assert (came.step, came.finished) == (last, True)
    assert came.context["best"] == {"step": best, "eval_loss": losses[best - 1]}
    assert came.context["answers_after"] == [{"given": f"after step {last}"}]


def test_the_answers_are_those_of_the_best_where_it_is_the_result(run: Callable[..., Outcome]) -> None:
    came = run({1: 3, 2: 1, 3: 2, 4: 0.5, 5: 2, 6: 2}, result="best")
    assert (came.step, came.context["answers_after"]) == (6, [{"given": "after step 4"}])


def test_what_an_interrupt_saves_is_no_candidate_and_the_run_ends_as_without(
    tmp_path: Path, run: Callable[..., Outcome]
) -> None:
    losses = {2: 2.0, 3: 0.1, 4: 3.0, 6: 4.0}
    asked: dict[str, Any] = {"save_every": 2, "patience": 2, "result": "best"}
    whole = run(losses, "whole", **asked)
    stopped = run(losses, "parts", stop_after=3, **asked)
    assert (stopped.step, stopped.finished) == (3, False)
    resumed = run(losses, "parts", resume=tmp_path / "parts" / manifest.folder_name(3), **asked)
    assert {**resumed.context, "weights": None} == {**whole.context, "weights": None}
    assert whole.context["best"] == {"step": 2, "eval_loss": 2.0}
    for name in (manifest.folder_name(6), manifest.BEST):
        assert tensors(tmp_path / "parts" / name) == tensors(tmp_path / "whole" / name)


def test_a_run_that_was_ended_and_not_recorded_ends_at_once(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    losses = {1: 1.0, 2: 2.0, 3: 3.0}
    ended = run(losses, patience=2)
    again = run(losses, resume=tmp_path / "run" / manifest.folder_name(3), patience=2)
    assert (again.step, again.finished, again.context) == (3, True, {**ended.context, **again.context})


def test_a_copy_of_the_best_that_its_writer_did_not_make_any_more_is_made_at_the_resume(
    tmp_path: Path, run: Callable[..., Outcome]
) -> None:
    run({1: 3.0, 2: 2.0}, stop_after=2)
    checkpoints = tmp_path / "run"
    shutil.rmtree(checkpoints / manifest.BEST)
    run({3: 3.0, 4: 3.0, 5: 3.0, 6: 3.0}, resume=checkpoints / manifest.folder_name(2))
    assert manifest.check(checkpoints / manifest.BEST)["step"] == 2
    assert 2 not in manifest.complete(checkpoints)  # it went with the older ones
    assert manifest.after_step(checkpoints, 2) == checkpoints / manifest.BEST


# --- what becomes of it -----------------------------------------------------------------------------------------------


@pytest.fixture
def ask(tmp_path: Path, tiny_base: Path, conversations: Path) -> Callable[..., Prepared]:
    def prepared(**evaluation: Any) -> Prepared:
        fields = {
            "name": "overfit",
            "model": str(tiny_base),
            "data": {"path": str(conversations), "eval_fraction": evaluation.pop("eval_fraction", 0.1)},
            "recipe": {"rank": 4, "seq_len": 64, "tokens_per_step": 256, "learning_rate": 1e-2, "steps": 4},
            "strategy": {"world_size": 1},
            "checkpoints": {"every_steps": 1, "keep": 1},
            "evaluation": evaluation,
            "output": "out",
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
        return prepare(load_spec(tmp_path / "run.yaml"))

    return prepared


def carried_out(prepared: Prepared, losses: Losses, monkeypatch: pytest.MonkeyPatch) -> tuple[RunRecord, Any, Path]:
    """The run's record before it is finished, what its workers told, and its folder."""
    output = Path(prepared.spec.output)
    output.mkdir()
    record = open_record(prepared, None, output)
    record.attempts.append(Attempt(started=now(), from_step=0))
    watcher, cpu = Watcher(), torch.device("cpu")
    monkeypatch.setattr(
        loop, "evaluate", lambda *_: losses.get(sum(event["event"] == "step" for event in watcher.events), 9.0)
    )
    built = build_worker(order_of(prepared, output, None), 0, cpu, meter_for(cpu))
    came = train(built, watcher, None)
    steps = [event for event in watcher.events if event["event"] == "step"]
    (output / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in steps))
    end = {
        "step": came.step,
        "finished": came.finished,
        "context": came.context,
        "ranks": gather_measurements(built, 1),
        "allocated_is": "tensor bytes",
    }
    return record, end, output


RISING: Losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}


@pytest.mark.parametrize(("result", "step", "loss"), [("last", 4, 2.5), ("best", 2, 1.0)])
def test_the_adapter_is_that_of_the_step_that_was_asked_for(
    ask: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch, result: str, step: int, loss: float
) -> None:
    prepared = ask(result=result)
    record, end, output = carried_out(prepared, RISING, monkeypatch)
    finish(record, end, prepared, output)
    wanted = manifest.after_step(output / "checkpoints", step)
    assert wanted is not None
    name = "adapter_model.safetensors"
    assert (output / "adapter" / name).read_bytes() == (wanted / "adapter" / name).read_bytes()
    assert (record.status, record.results["eval_after"]) == ("complete", loss)
    assert f"| steps | {step} |" in (output / "adapter" / "README.md").read_text()
    said = " ".join(ending(record.results, record.attempts[-1].to_step, record.total_steps))
    assert ("result is of step 2" if result == "best" else "lower, 1.0000, after step 2") in said


def test_a_checkpoint_says_by_which_plan_it_was_made(
    ask: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = ask()
    record, _, output = carried_out(prepared, RISING, monkeypatch)
    fields = manifest.check(output / "checkpoints" / manifest.folder_name(4))
    assert fields["plan"] == record.plan["digest"]
    assert fields["strategy"] == record.plan["strategy"]
    # 256 tokens a step in sequences of 64, on one worker
    assert fields["strategy"]["micro_batch"] * fields["strategy"]["gradient_accumulation"] == 4


def test_a_best_that_is_gone_is_told_and_the_last_may_be_taken(
    ask: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = ask(result="best")
    record, end, output = carried_out(prepared, RISING, monkeypatch)
    shutil.rmtree(output / "checkpoints" / manifest.BEST)
    with pytest.raises(RunFailed, match=r"after step 2.*not there whole"):
        finish(record, end, prepared, output)
    assert not (output / "adapter").exists()
    finish(record, end, ask(result="last"), output)
    assert record.results["eval_after"] == 2.5


def test_an_early_end_is_complete_and_says_why(ask: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = ask(patience=1)
    record, end, output = carried_out(prepared, RISING, monkeypatch)
    finish(record, end, prepared, output)
    assert (record.status, record.attempts[-1].to_step, record.total_steps) == ("complete", 3, 4)
    [ended, lower] = ending(record.results, 3, 4)
    assert ended == "It ended after step 3 of 4: the evaluation loss was not lower at 1 checkpoint(s)."
    assert "checkpoints/best" in lower
    # an interrupt's checkpoint is not evaluated, and one that asks for less patience may end there
    assert ending({**record.results, "eval_after": None}, 3, 4) == [ended]


@pytest.mark.parametrize("asked", [{"patience": 2}, {"result": "best"}])
def test_without_anything_held_out_there_is_nothing_to_go_by(
    ask: Callable[..., Prepared], asked: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match=r"data\.eval_fraction: nothing is held out"):
        ask(eval_fraction=0, **asked)
    ask(eval_fraction=0)
