"""Records, identities and the ledger: what a run leaves for later ones."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from clusters.errors import RequestError
from orchestrator import history, ledger
from orchestrator.identity import check_same, model_fingerprint
from orchestrator.ledger import time_ratio
from orchestrator.outcome import steps_measured
from orchestrator.record import Attempt, RunRecord, load_record, save_record
from qlora_core.perplexity import perplexity


def record(**changes: Any) -> RunRecord:
    fields: dict[str, Any] = {
        "id": "a1",
        "name": "run",
        "identity": {"seed": 0},
        "total_steps": 5,
        "plan": {"model": {"name": "m"}, "estimate": {"gpu": {"name": "cpu"}}, "digest": "d"},
        "data": {},
        "predicted": {"allocated_bytes": 10},
        "attempts": [Attempt(started="2026-01-01T00:00:00+00:00", from_step=0)],
    }
    return RunRecord(**{**fields, **changes})


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = record(measured={"allocated_bytes": 11})
    save_record(written, tmp_path)
    assert load_record(tmp_path) == written
    assert load_record(tmp_path / "none") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 2}', "\xff"])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(RequestError, match="it is no run record that this version reads"):
        load_record(tmp_path)


def test_the_ledger_has_one_row_a_run_which_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.sqlite"
    ledger.enter(record(), tmp_path, path)
    ledger.enter(record(status="complete", measured={"allocated_bytes": 11}), tmp_path, path)
    ledger.enter(record(id="b2"), tmp_path, path)
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT id, status, measured_allocated_bytes FROM runs ORDER BY id").fetchall()
    assert rows == [("a1", "complete", 11), ("b2", "running", None)]


def test_a_ledger_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(OSError, match="later version"):
        ledger.enter(record(), tmp_path, path)


def test_its_place_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_LEDGER", str(tmp_path / "x.sqlite"))
    assert history.ledger_place() == tmp_path / "x.sqlite"


def test_a_resume_shows_every_difference_at_once(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as error:
        check_same({"seed": 0, "recipe.rank": 8, "data": "x"}, {"seed": 1, "recipe.rank": 16, "data": "x"}, tmp_path)
    assert [problem.where for problem in error.value.problems] == ["recipe.rank", "seed"]
    assert "was started with 8" in str(error.value)
    check_same({"seed": 0}, {"seed": 0}, tmp_path)


def test_a_model_is_known_by_its_config_and_by_both_ends_of_its_weights(tmp_path: Path, tiny_base: Path) -> None:
    before = model_fingerprint(tiny_base)
    for name, offset in (("config.json", 5), ("model.safetensors", 200), ("model.safetensors", -3)):
        folder = tmp_path / f"{name}{offset}"
        shutil.copytree(tiny_base, folder)
        content = bytearray((folder / name).read_bytes())
        content[offset] ^= 1
        (folder / name).write_bytes(content)
        assert model_fingerprint(folder) != before
    shutil.copytree(tiny_base, tmp_path / "copy")
    assert model_fingerprint(tmp_path / "copy") == before


def test_a_run_of_an_earlier_version_is_the_same_where_what_is_new_is_as_its_default(tmp_path: Path) -> None:
    check_same({"recipe.rank": 8}, {"recipe.rank": 8, "recipe.packing": False}, tmp_path)
    with pytest.raises(RequestError, match=r"recipe\.packing"):
        check_same({"recipe.rank": 8}, {"recipe.rank": 8, "recipe.packing": True}, tmp_path)


def test_the_perplexity_of_a_run_that_diverged_is_infinite_and_no_error() -> None:
    assert perplexity(0.0) == 1
    assert perplexity(800.0) == math.inf


def test_a_step_s_time_is_that_of_the_attempts_which_ran_as_the_last_one_did(tmp_path: Path) -> None:
    """Of each without its first step, which warms up, and without those that were done once more."""
    four, two = {"world_size": 4}, {"world_size": 2}
    attempts = [Attempt(started="", from_step=at, strategy=how) for at, how in ((0, two), (3, four), (6, two))]
    seconds = [9.0, 1.0, 1.0, 90.0, 7.0, 7.0, 9.0, 2.0, 3.0]  # steps 1 to 9
    events: list[dict[str, Any]] = [{"event": "phase", "phase": "training"}]
    events += [{"event": "step", "step": at + 1, "seconds": took, "tokens": 60} for at, took in enumerate(seconds)]
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    untold = {"positions_per_second": None}  # by an earlier version
    of_all = {"step_seconds": 1.5, "tokens_per_second": 45.0}  # of 1, 1, 2 and 3
    assert steps_measured(path, attempts) == {**of_all, **untold}
    of_four = {"step_seconds": 7.0, "tokens_per_second": pytest.approx(60 / 7)}
    assert steps_measured(path, attempts[:2]) == {**of_four, **untold}
    for event in events[7:]:  # steps 7 to 9, of a run that was resumed by this version; 7 warms up
        event["positions"] = 90
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert steps_measured(path, attempts) == {**of_all, "positions_per_second": 37.5}  # of 45 and 30
    assert steps_measured(path, [Attempt(started="", from_step=8)])["step_seconds"] is None


def test_later_plans_go_by_a_position_s_time_since_rows_may_be_shorter_than_planned_and_padded() -> None:
    predicted, measured = {"step_seconds": 2.0, "tokens_per_second": 500.0}, {"step_seconds": 1.0}
    assert time_ratio(predicted, measured) == 0.5  # an earlier version's record
    measured["tokens_per_second"] = 400.0
    assert time_ratio(predicted, measured) == 1.25  # an earlier version's, which does not tell of padding
    assert time_ratio(predicted, {**measured, "positions_per_second": 800.0}) == 0.625
    assert time_ratio(predicted, {}) is None
