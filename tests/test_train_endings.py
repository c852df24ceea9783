"""How qlora-train ends once its run has come to something: what it says, and its exit code. The runs are stand-ins."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from click.testing import CliRunner, Result
from small_runs import stand_in_checkpoint

from clusters.errors import RequestError, RunFailed, request_error
from launch.train import train
from orchestrator import prepare, run
from orchestrator.following import given_up
from orchestrator.prepare import Prepared
from orchestrator.record import Attempt, RunRecord, Status, now, save_record
from orchestrator.recovery import Decision, Failure
from orchestrator.spec import RunSpec, load_spec
from qlora_core.training.manifest import BEST

STEPS = 400
Start = Callable[..., Result]


def record(to_step: int = STEPS, **changes: Any) -> RunRecord:
    """Of a run of one attempt."""
    status: Status = "complete" if to_step == STEPS else "interrupted"
    fields: dict[str, Any] = {
        "id": "1",
        "name": "tiny",
        "status": status,
        "identity": {},
        "total_steps": STEPS,
        "plan": {"choices": [], "verdicts": [{"step_time": None}]},
        "data": {"examples": 9, "format": "text", "tokens": 90, "longest": 16, "truncated": 0, "unlearnable": 0},
        "predicted": {},
        "results": {"eval_before": 2.0, "eval_after": 1.0},
        "attempts": [Attempt(started="2026", from_step=0, to_step=to_step, status=status)],
        "machine": {"name": "a machine"},
    }
    return RunRecord(**{**fields, **changes})


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    """Of a run in a folder whose name has a blank."""
    fields = {"name": "tiny", "model": "base", "data": {"path": "x.jsonl"}, "output": "my run"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    return load_spec(tmp_path / "run.yaml")


@pytest.fixture
def start(spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start the command; the run comes to `record` at once."""

    def started(record: RunRecord, *arguments: str, error: Exception | None = None) -> Result:
        def executed(prepared: RunSpec, *_: Any, **__: Any) -> tuple[RunRecord, bool]:
            Path(prepared.output).mkdir(exist_ok=True)
            save_record(record, Path(prepared.output))
            if record.status == "failed":
                raise error or RunFailed("The loss is nan.", "Look.")
            return record, False

        monkeypatch.setattr(prepare, "prepare", lambda spec, **_: spec)
        monkeypatch.setattr(run, "execute", executed)
        return CliRunner().invoke(train, [str(tmp_path / "run.yaml"), *arguments], standalone_mode=False)

    return started


def test_a_report_that_cannot_be_written_is_a_warning_beside_the_summary(start: Start, spec: RunSpec) -> None:
    (Path(spec.output) / "report.md").mkdir(parents=True)
    result = start(record())
    assert (result.exception, result.return_value) == (None, 0)
    assert "Evaluation loss on held-out examples: 2.0000 before" in result.stdout
    assert "report.md" not in result.stdout
    assert f"warning: output: it cannot be written: Is a directory (got {spec.output}/report.md)" in result.stderr
    assert "--report" not in result.stderr


def test_a_run_that_failed_leaves_a_report_of_how_far_it_came_and_why_it_ended(start: Start, spec: RunSpec) -> None:
    output = Path(spec.output)
    output.mkdir()
    step = {"event": "step", "step": 1, "loss": float("nan"), "learning_rate": 1e-3, "tokens": 9, "seconds": 1.0}
    (output / "events.jsonl").write_text(json.dumps(step) + "\n")
    attempt = Attempt(
        started=now(),
        from_step=0,
        to_step=0,
        status="failed",
        reason="the loss is nan",
        failure=Failure("not finite", "the loss is nan").to_json(),
        decision=dataclasses.asdict(Decision("stop", "the same step would fail again")),
    )
    failed = record(status="failed", attempts=[attempt], results={})
    result = start(failed)
    assert isinstance(result.exception, RunFailed)
    assert "Run tiny: failed\n1 attempt; on the way: not finite (stop)." in result.stdout
    assert str(output / "report.md") in result.stdout
    report = (output / "report.md").read_text()
    assert "Status: failed." in report
    assert "| not finite: the loss is nan | stop: the same step would fail again |" in report
    assert (output / "report.html").is_file()


def failed_at(started: str) -> RunRecord:
    failure, decision = Failure("user", "no").to_json(), dataclasses.asdict(Decision("stop", "it would fail again"))
    one = Attempt(started=started, from_step=0, to_step=0, status="failed", failure=failure, decision=decision)
    return record(status="failed", attempts=[one], results={})


def test_what_a_user_has_to_put_right_leaves_a_report_too(start: Start, spec: RunSpec) -> None:
    asked = request_error("output", spec.output, "a worker does not see it", "Choose storage that all nodes see")
    result = start(failed_at(now()), error=asked)
    assert result.exception is asked
    assert "Run tiny: failed" in result.stdout
    assert (Path(spec.output) / "report.md").is_file()


def test_the_failure_of_an_earlier_start_is_not_shown_as_this_one_s(start: Start, spec: RunSpec) -> None:
    Path(spec.output).mkdir()
    save_record(failed_at("2026"), Path(spec.output))
    result = start(failed_at("2026"), error=RunFailed("The plan does not fit, so nothing was started.", "Change it."))
    assert isinstance(result.exception, RunFailed)
    assert "failed" not in result.stdout
    assert not (Path(spec.output) / "report.md").exists()


@pytest.mark.parametrize(
    ("tried", "told"),
    [
        (1, "Rank 1 failed (error): KeyError: x. It was not tried again: the same code would fail again."),
        (2, "Rank 1 failed (error): KeyError: x. It was tried 2 times; the same code would fail again."),
    ],
)
def test_why_a_run_was_given_up_is_told_also_of_its_first_attempt(tried: int, told: str) -> None:
    attempts = [Attempt(started="2026", from_step=0)] * tried
    decision = Decision("stop", "the same code would fail again")
    error = given_up(Failure("error", "KeyError: x.", rank=1), decision, record(attempts=attempts))
    assert isinstance(error, RunFailed)
    assert error.what == told


def test_an_interrupted_run_says_what_resumes_it(start: Start, spec: RunSpec) -> None:
    result = start(record(to_step=2))
    assert result.return_value == 130
    assert "Interrupted after step 2 of 400. The same command resumes there." in result.stdout
    result = start(record(to_step=2), "--fresh")
    resumes = f"The same command with 'output={spec.output}-2' instead of --fresh resumes there."
    assert (result.return_value, resumes in result.stdout) == (130, True)


@pytest.mark.parametrize(("there", "fresh"), [(None, ""), ("notes.txt", ""), ("run.json", "-2"), ("checkpoints", "-2")])
def test_fresh_starts_beside_a_folder_in_which_a_run_lies(
    start: Start, spec: RunSpec, there: str | None, fresh: str
) -> None:
    Path(spec.output).mkdir()
    if there is not None:
        (Path(spec.output) / there).mkdir()
    assert f"Output: {spec.output}{fresh}\n" in start(record(), "--fresh").stdout
    assert Path(f"{spec.output}-2").exists() == bool(fresh)


def prepared(spec: RunSpec) -> Prepared:
    """As much of it as a complete run is looked at with."""
    return cast(Prepared, SimpleNamespace(spec=spec, identity={}))


def test_a_complete_run_names_its_result_where_it_lies_now(spec: RunSpec) -> None:
    output = Path(spec.output)
    (output / "adapter").mkdir(parents=True)
    save_record(record(adapter="/where/it/was/adapter"), output)
    found, already = run.execute(prepared(spec), cast(Any, None))
    assert (already, found.adapter) == (True, str(output / "adapter"))


def test_a_complete_run_whose_result_is_another_checkpoint_than_is_asked_for_says_where_that_lies(
    spec: RunSpec,
) -> None:
    output, best = Path(spec.output), {"step": 300, "eval_loss": 0.5}
    (output / "adapter").mkdir(parents=True)
    asked = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"result": "best"})})
    save_record(record(results={"best": best}), output)
    assert run.execute(prepared(spec), cast(Any, None))[1]
    with pytest.raises(RequestError, match=r"evaluation\.result: .* is of step 400 where this would be of step 300 "):
        run.execute(prepared(asked), cast(Any, None))
    stand_in_checkpoint(output / "checkpoints", 300).rename(output / "checkpoints" / BEST)
    with pytest.raises(RequestError, match=r"\(got best\)\. Restore what it was, or take .*/checkpoints/best/adapter"):
        run.execute(prepared(asked), cast(Any, None))
    save_record(record(results={"best": best, "result_step": 300}), output)
    assert run.execute(prepared(asked), cast(Any, None))[1]
    with pytest.raises(RequestError, match="is of step 300 where this would be of step 400"):
        run.execute(prepared(spec), cast(Any, None))
    save_record(record(results={"best": {"step": 400, "eval_loss": 0.5}}), output)
    assert run.execute(prepared(asked), cast(Any, None))[1]
