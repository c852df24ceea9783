"""The benchmarks of one page each: what their results say of where they are from, and tables; nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile, record_function

from benchmarks import fleet, growth, load, start, waiting
from benchmarks.place import Place
from benchmarks.speed import listed
from benchmarks.training import profiling

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
NOT_RECORDED = "not recorded"
FACTS: dict[str, Any] = {
    "date": "2026-01-01",
    "machine": {"processor": "a processor", "cores": 2, "system": "Linux", "load": 0.5},
    "versions": {"python": "3.11", "torch": "2.13"},
}
SAID = "(a processor, 2 cores, 2026-01-01; python 3.11, torch 2.13)"
PAGES: tuple[tuple[Place, Path, Callable[[dict[str, Any]], str]], ...] = (
    (load.PLACE, load.RESULTS, load.words),
    (start.PLACE, start.RESULTS, start.table),
    (waiting.PLACE, waiting.RESULTS, waiting.table),
    (fleet.PLACE, fleet.RESULTS, fleet.table),
    (growth.PLACE, growth.RESULTS, growth.text_of),
    (profiling.PLACE, profiling.RESULTS, profiling.table),
)


def recorded(path: Path) -> dict[str, Any]:
    """Results, if they are of the benchmark as it is now."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["versions"] == NOT_RECORDED and path != load.RESULTS:
        pytest.skip("measured before its versions and rounds were kept")
    return found


@pytest.mark.parametrize(
    "name", ["fleet", "growth", "load", "planners", "profile", "speed", "start", "training-bfloat16", "waiting"]
)
def test_results_say_when_on_what_and_with_which_versions_they_were_measured(name: str) -> None:
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert found["date"] > "2026-11"
    assert found["machine"]["processor"]
    assert found["versions"] == NOT_RECORDED or found["versions"]["python"]
    assert listed(NOT_RECORDED) == "versions not recorded"


@pytest.mark.parametrize(("place", "path", "text"), PAGES, ids=[path.stem for _, path, _ in PAGES])
def test_a_page_shows_the_results_that_are_written_down(
    place: Place, path: Path, text: Callable[[dict[str, Any]], str]
) -> None:
    assert place.read() == text(recorded(path))


def test_a_start_is_told_with_the_spread_of_its_rounds() -> None:
    rounds = {part: [number + 0.0, number + 1.0, number + 4.0] for number, part in enumerate(start.PARTS)}
    text = start.table({**FACTS, "seconds": rounds})
    assert f"Medians of 3 runs {SAID}:" in text
    assert "| the plan is shown | 1.0 | 0.5 to 2.5 | 1.0 |" in text
    assert "| workers are asked for | 2.0 | 1.5 to 3.5 | 1.0 |" in text


def test_steps_that_wait_are_told_as_ratios_to_the_usual_ones() -> None:
    usual, twice = [0.1, 0.2, 0.3], [0.2, 0.4, 0.6]
    rows = {way: [usual, usual, twice, twice] for way in waiting.WAYS}
    text = waiting.table({**FACTS, "threads": 2, "seconds": rows})
    assert f"on a quiet machine, 200.0 ms and 200.0 ms {SAID}:" in text
    cells = "1.00 (0.75 to 1.25) | 1.00 (0.75 to 1.25) | 2.00 (1.50 to 2.50) | 2.00 (1.50 to 2.50)"
    assert f"| as OpenMP has it | {cells} |" in text


def test_questions_about_a_fleet_are_told_with_the_spread_of_their_rounds() -> None:
    took = {name: [1.0, 2.0, 6.0] for name in fleet.MOST}
    text = fleet.table({**FACTS, "bare_ms": 77, "seconds": took, "cpu_seconds": took})
    assert "| 10,000 runs of 7 jobs, by rules | 60 | 2.0 | 1.5 to 4.0 | reached | 2.0 |" in text
    slow = {name: [seconds * 4 for seconds in took[name]] for name in took}
    assert fleet.table({**FACTS, "bare_ms": 77, "seconds": slow, "cpu_seconds": slow}).count("**missed**") == 2


# --- growth -----------------------------------------------------------------------------------------------------------


def test_growth_names_its_dtype_and_the_spread_of_its_steps() -> None:
    row = {"seconds": [0.1, 0.2, 0.3], "measured": 2**20, "predicted": 2**21}
    results = {**FACTS, "compute_dtype": "bfloat16", "layers": {"2": row}, "lengths": {"64": row}}
    text = growth.text_of({**results, "workers": {}, "ranks": {}})
    assert "checkpointed, computed in bfloat16, where nothing else is said " + SAID in text
    assert "| 2 | 0.200 | 0.150 to 0.250 | 1.0 | 2.0 | +100.0% |" in text


@pytest.mark.parametrize("what", list(growth.CASES))
def test_what_growth_says_was_predicted_is_what_is_predicted_now(what: str, tmp_path: Path) -> None:
    results = recorded(growth.RESULTS)
    for size, case in growth.CASES[what].items():
        specification = growth.written(case, f"{what}-{size}", results["compute_dtype"], tmp_path)
        assert growth.predicted(specification) == results[what][str(size)]["predicted"], (what, size)


# --- where a step's time goes -----------------------------------------------------------------------------------------


def test_what_the_optimizers_step_calls_is_the_optimizers_whatever_it_is_named() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    optimizer = torch.optim.AdamW([weight])
    step = record_function(profiling.OPTIMIZER)(optimizer.step)
    with profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        (torch.ones(8, 64) @ weight).square().sum().backward()  # type: ignore[no-untyped-call]
        step()
    kinds: dict[str, set[str]] = {}
    for event in found.events():
        kinds.setdefault(profiling.kind_of(event), set()).add(event.name)
    assert {"aten::lerp_", "aten::addcdiv_"} <= kinds[profiling.OPTIMIZER]
    assert "aten::mm" in kinds[profiling.PRODUCTS]
    assert not kinds[profiling.OPTIMIZER] & kinds[profiling.PRODUCTS]


def test_a_step_is_held_against_what_its_operations_and_its_bytes_take_at_least() -> None:
    one: Mapping[str, Any] = {
        "seconds": {profiling.PRODUCTS: 0.9, profiling.OPTIMIZER: 0.1},
        "unprofiled": [0.7, 0.9, 1.1],
        "operations": 30e9,
        "attention": 10e9,
        "rate": 100e9,
        "bytes": 2e9,
        "copied": 10e9,
        "components": {"base_weights": 2**20, "activations": 3 * 2**20},
        "peak": 5 * 2**20,
    }
    text = profiling.table({**FACTS, "steps": {"bfloat16": one}})
    assert "| optimizer | 100 (10%) |" in text
    assert "| **without the profiler**, and quartiles | 900, 800 to 1000 |" in text
    assert "| floor: operations and bytes at these rates | 600 |" in text  # 40 of 100, and 2 of 10
    assert "| the step without the profiler, of its floor | 1.50 |" in text
    assert "| base weights | 1.0 |" in text
    assert "| **predicted**: the sum | 4.0 |" in text
    assert "| **measured** | 5.0 |" in text
