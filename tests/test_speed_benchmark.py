"""`make speed`: its measuring and its tables, on commands and results made for the purpose. Nothing here is timed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import search, speed
from clusters.errors import RunFailed
from orchestrator.question import OPEN_FIELDS

TIMES = {
    speed.BARE: [0.1, 0.2, 0.4],
    speed.PLAN: [0.2, 0.4, 0.8],
    speed.FITCHECK: [0.5, 1.0, 1.6],
}
"""Three rounds on a machine that became slower and slower."""


def python(name: str, code: str) -> speed.Command:
    return speed.Command(name, (sys.executable, "-c", code))


def results(**changes: Any) -> dict[str, Any]:
    """What a run writes down."""
    us = {"median": 50.0, "low": 40.0, "high": 60.0}
    return {
        "date": "2026-01-01",
        "machine": {"processor": "a processor", "cores": 2, "system": "Linux", "load": 0.5},
        "versions": {"python": "3.11"},
        "peer": {"versions": {"fitcheck-llm": "0.3.1"}},
        "rounds": 3,
        "cold_start": speed.cold_start_rows(TIMES),
        "estimate": {"the same again": us, "another structure (rank)": {**us, "median": 7000.0}},
        "search": [],
        "trace": {"missing": "not built"},
        **changes,
    }


def test_every_command_is_started_once_a_round_after_one_to_warm_up(tmp_path: Path) -> None:
    log = tmp_path / "log"
    started = [python(name, f"print({name!r}, file=open({os.fspath(log)!r}, 'a')); print(1)") for name in "abc"]
    times = speed.interleaved(started, 3, os.environ)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert log.read_text().split() == list("abcbcacababc")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; print('no such GPU', file=sys.stderr); sys.exit(2)", "ended with 2: no such GPU"),
        ("raise ImportError('no click')", "ended with 1: ImportError: no click"),
        ("", "ended with 0: it said nothing"),
    ],
    ids=["a wrong request", "an error", "no answer"],
)
def test_a_command_that_does_not_answer_ends_the_benchmark(code: str, said: str) -> None:
    with pytest.raises(RunFailed, match=said):
        speed.interleaved([python("broken", code)], 1, os.environ)


def test_ratios_are_taken_within_a_round() -> None:
    rows = speed.cold_start_rows(TIMES)
    assert rows[speed.PLAN]["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert rows[speed.FITCHECK]["ratio"] == {"median": 5.0, "low": 4.5, "high": 5.0}
    assert rows[speed.PLAN]["ms"]["median"] == pytest.approx(400)


@pytest.mark.parametrize("name", list(speed.questions()))
def test_every_question_about_an_estimate_is_answered(name: str) -> None:
    assert len(speed.call_times(speed.questions()[name], calls=2)) == 2


def test_the_tables_say_what_is_reached_and_what_is_not() -> None:
    verdicts = {goal.text: goal.verdict for goal in speed.goals(results())}
    assert verdicts == {
        "cold start of qlora-plan, of the bare imports'": "reached",  # 2.0 of at most 2.2
        "cold start of qlora-plan, of fitcheck's": "reached",  # 2.0 of 5.0
        "one estimate, the same again, µs": "reached",
        "one estimate, another structure (rank), µs": "**missed**",
        "a search over 20,000 candidates or more, s of one core": "not measured",
        "a search over 1,024 GPUs in 5 pools, s of one core": "not measured",
        "65B traced, s": "not measured",
    }
    text = speed.tables(results())
    assert "| 100 | 7,000 | **missed** |" in text
    assert "65B traced: not built." in text
    assert "8.0 s" in speed.tables(results(trace={"import_s": 5.0, "estimate_s": 8.0}))


def test_a_searchs_goals_are_held_against_the_smallest_space_that_is_large_enough_and_the_whole_cluster() -> None:
    sizes = {"1 pool": (5_000, 0.5), "3 pools": (20_000, 1.9), "4 pools": (30_000, 2.5)}
    rows = [
        {"name": name, "places": 9, "candidates": candidates, "seconds": seconds, "peak_bytes": 16 * 1024**2}
        for name, (candidates, seconds) in {**sizes, search.SPACES[-1].name: (40_000, 5.5)}.items()
    ]
    assert [measured for *_, measured in search.goals(rows)] == [1.9, 5.5]
    text = speed.tables(results(search=rows))
    assert "| 2 | 1.90 | reached |" in text
    assert "| 5 | 5.50 | **missed** |" in text
    assert "| 3 pools | 9 | 20,000 | 1.90 | 95 | 16 |" in text


def test_the_largest_space_is_what_its_goal_says() -> None:
    question, devices = search.question_of(search.SPACES[-1])
    assert sum(device.pool.gpus for device in devices if device.pool is not None) == 1024
    assert len(devices) == 5
    assert question.open == set(OPEN_FIELDS) - {"seq_len"}


def test_the_document_shows_the_results_that_are_written_down() -> None:
    found = json.loads(speed.RESULTS.read_text(encoding="utf-8"))
    shown = speed.PLACE.read()
    assert shown == speed.tables(found)


def test_the_commands_are_those_of_the_document() -> None:
    names = [one.name for one in speed.commands(Path("peer"))]
    assert names[0] == speed.BARE
    assert {speed.PLAN, speed.FITCHECK} <= set(names)
    assert "PYTHONDONTWRITEBYTECODE" not in speed.environment()
    assert speed.environment()["HF_HUB_OFFLINE"] == "1"


def test_the_machine_and_the_versions_are_named() -> None:
    facts = speed.facts(*speed.PACKAGES)
    assert facts["machine"]["processor"]
    assert set(facts["versions"]) >= {"python", "pydantic", "click", "rich"}
