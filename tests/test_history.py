"""What earlier runs measured corrects the next plan: memory's confidence, and the time of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_plan_command import Ask, ask
from test_record import record

from orchestrator import ledger

__all__ = ["ask"]
PREDICTED = 10_000_000


def enter_runs(
    path: Path, count: int, *, slower: float = 1.0, larger: float = 1.0, plan: dict[str, Any], gpu: str = "l4"
) -> None:
    """Complete runs of `plan` on `gpu`, each `slower` and `larger` than predicted."""
    plan = {**plan, "estimate": {**plan["estimate"], "gpu": {**plan["estimate"]["gpu"], "name": gpu}}}
    for number in range(count):
        run = record(
            id=f"run-{number}",
            status="complete",
            plan=plan,
            machine={"kind": "cuda", "name": gpu},
            predicted={"reserved_bytes": PREDICTED, "allocated_bytes": PREDICTED, "step_seconds": 2.0},
            measured={
                "reserved_bytes": round(PREDICTED * larger),
                "allocated_bytes": PREDICTED,
                "step_seconds": 2 * slower,
            },
        )
        ledger.enter(run, path.parent, path)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_LEDGER", str(tmp_path / "ledger.sqlite"))
    return tmp_path / "ledger.sqlite"


ASKED = ("--model", "7b", "--gpu", "l4", "--tokens", "1M", "--json")


def test_runs_that_were_slower_on_that_gpu_make_the_next_plan_slower(ask: Ask, path: Path) -> None:
    before = ask(*ASKED).json
    assert before["verdicts"][0]["step_time"]["runs"] == 0
    enter_runs(path, 3, slower=1.5, plan=before)
    after = ask(*ASKED).json
    step = after["verdicts"][0]["step_time"]
    assert (step["runs"], step["correction"]) == (3, pytest.approx(1.5))
    assert step["seconds"] == pytest.approx(1.5 * before["verdicts"][0]["step_time"]["seconds"])
    assert after["duration"]["seconds"] == pytest.approx(1.5 * before["duration"]["seconds"])
    assert "3 measured runs" in ask(*ASKED[:-1]).out


def test_runs_on_another_gpu_say_nothing_of_this_one_s_speed(ask: Ask, path: Path) -> None:
    before = ask(*ASKED).json
    enter_runs(path, 3, slower=1.5, plan=before, gpu="t4")
    assert ask(*ASKED).json["verdicts"][0]["step_time"] == before["verdicts"][0]["step_time"]


def test_memory_is_taken_from_runs_once_there_are_nineteen(ask: Ask, path: Path) -> None:
    before = ask(*ASKED).json
    enter_runs(path, 18, larger=1.2, plan=before)
    few = ask(*ASKED).json["verdicts"][0]["confidence"]
    assert (few["low_bytes"], few["high_bytes"]) == (
        before["verdicts"][0]["confidence"]["low_bytes"],
        before["verdicts"][0]["confidence"]["high_bytes"],
    )
    assert "18 comparable runs are too few" in few["basis"]
    enter_runs(path, 19, larger=1.2, plan=before)
    verdict = ask(*ASKED).json["verdicts"][0]
    context = verdict["process_bytes"] - verdict["reserved_bytes"]
    assert verdict["confidence"]["basis"] == "19 comparable runs"
    assert verdict["confidence"]["low_bytes"] == pytest.approx(1.2 * verdict["reserved_bytes"] + context, abs=2)
    assert verdict["confidence"]["high_bytes"] == pytest.approx(1.2 * verdict["reserved_bytes"] + context, abs=2)


def test_what_nineteen_runs_say_decides_whether_it_fits(ask: Ask, path: Path) -> None:
    tight = ("--model", "33b", "--gpu", "rtx-4090", "--json")
    before = ask(*tight)
    assert before.code == 0
    enter_runs(path, 19, larger=2.0, plan=before.json)
    assert ask(*tight).code == 1


def test_a_broken_ledger_is_told_and_not_used(ask: Ask, path: Path) -> None:
    path.write_bytes(b"no database" * 100)
    answer = ask(*ASKED)
    assert answer.code == 0
    assert "was not read" in answer.err
    assert json.loads(answer.out)["verdicts"][0]["step_time"]["runs"] == 0
