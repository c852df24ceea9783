"""qlora-train sweep: which trials there are, and real ones that Ray Tune runs."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from real_runs import TIMEOUT
from rich.console import Console

from clusters.errors import RequestError
from launch.train_sweep import run
from orchestrator.trials import trials_of, values_of

COMMAND = Path(sys.executable).with_name("qlora-train")
Told = tuple[int, str, str]


@pytest.fixture
def specification(tmp_path: Path, tiny_base: Path, conversations: Path) -> Path:
    fields = {
        "name": "tiny",
        "model": str(tiny_base),
        "data": {"path": str(conversations), "eval_fraction": 0.1},
        "recipe": {"rank": 4, "seq_len": 64, "tokens_per_step": 512, "learning_rate": 0.01, "steps": 3},
        "strategy": {"world_size": 1, "micro_batch": 2},
        "output": "sweep",
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("recipe.learning_rate=1e-4,2e-4", ["1e-4", "2e-4"]),
        ("recipe.targets=[q_proj,v_proj],all-linear", ["[q_proj,v_proj]", "all-linear"]),
        ("strategy={micro_batch: 1, zero_stage: 0},auto", ["{micro_batch: 1, zero_stage: 0}", "auto"]),
        ("data.path='a,b.jsonl'", ["'a,b.jsonl'"]),
        ("data.path=s3://bucket/a.jsonl,b.jsonl", ["s3://bucket/a.jsonl", "b.jsonl"]),
        ("recipe.rank=8", ["8"]),
        ("recipe.targets=[q_proj", ["[q_proj"]),
        ("recipe.rank=", [""]),
    ],
)
def test_commas_part_values_but_not_inside_brackets_and_quotes(override: str, values: list[str]) -> None:
    assert values_of(override) == values


def test_the_time_left_is_shown_also_where_a_step_takes_a_minute(
    specification: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    clock, shown = [1000.0], io.StringIO()
    trial, _ = trials_of(specification, ["seed=7,8"])

    def trials_run(outcomes: Any, output: Path, on_step: Callable[..., None]) -> list[Any]:
        for step in range(1, 5):
            clock[0] += 60
            on_step(trial, step, 5)
        deadline = time.monotonic() + 10  # rich draws the bar again every tenth of a second
        while "0:06:00" not in shown.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        return []

    monkeypatch.setattr("orchestrator.sweep.run_trials", trials_run)
    run(
        Console(file=shown, force_terminal=True, color_system=None, width=80, get_time=lambda: clock[0]),
        [],
        2,
        tmp_path,
    )
    assert "4/10 0:06:00" in shown.getvalue()  # of two trials of 5 steps, 6 are left


def test_there_is_a_trial_for_each_combination_in_a_folder_of_its_own(specification: Path) -> None:
    trials = trials_of(specification, ["recipe.learning_rate=1e-3,2e-3", "seed=7", "recipe.rank=4,8,8"])
    assert [trial.name for trial in trials] == [
        "learning_rate=1e-3,rank=4",
        "learning_rate=1e-3,rank=8",
        "learning_rate=2e-3,rank=4",
        "learning_rate=2e-3,rank=8",
    ]
    assert [(trial.spec.recipe.learning_rate, trial.spec.recipe.rank) for trial in trials] == [
        (1e-3, 4),
        (1e-3, 8),
        (2e-3, 4),
        (2e-3, 8),
    ]
    assert {trial.spec.seed for trial in trials} == {7}
    assert [Path(trial.spec.output) for trial in trials] == [
        specification.parent / "sweep" / trial.name for trial in trials
    ]
    assert len({trial.spec.name for trial in trials}) == 4


def test_a_name_that_is_no_folders_is_changed_and_stays_the_same_and_its_own(specification: Path) -> None:
    override = "recipe.targets=[q_proj,v_proj],[q_proj;v_proj],['../../../etc']"
    first, second, third = (trial.name for trial in trials_of(specification, [override]))
    assert first == trials_of(specification, ["recipe.targets=[q_proj,v_proj],all-linear"])[0].name
    assert first != second
    assert all("/" not in name and "[" not in name for name in (first, second, third))


def test_some_of_many_are_drawn_by_the_seed(specification: Path) -> None:
    overrides = ["recipe.rank=" + ",".join(map(str, range(1, 41)))]
    drawn = [trial.name for trial in trials_of(specification, overrides, at_most=5)]
    assert len(set(drawn)) == 5
    assert drawn == [trial.name for trial in trials_of(specification, overrides, at_most=5)]
    assert drawn != [trial.name for trial in trials_of(specification, [*overrides, "seed=1"], at_most=5)]


def test_the_mistakes_of_all_trials_are_told_at_once(specification: Path) -> None:
    with pytest.raises(RequestError) as told:
        trials_of(specification, ["recipe.rank=0,4,many", "recipe.learning_rate=-1"])
    message = str(told.value)
    assert message.count("recipe.learning_rate") == 1
    assert "got 0)" in message
    assert 'got "many")' in message
    with pytest.raises(RequestError, match="nothing is held out"):
        trials_of(specification, ["recipe.rank=4,8", "data.eval_fraction=0"])


@pytest.mark.parametrize("overrides", [["recipe.rank=4"], ["nonsense"]])
def test_a_sweep_of_nothing_is_refused(specification: Path, overrides: list[str]) -> None:
    with pytest.raises(RequestError, match="no field has several values"):
        trials_of(specification, overrides)


# --- real ones --------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(specification: Path) -> Callable[..., Told]:
    def run(*arguments: str) -> Told:
        environment = {**os.environ, "QLORA_LEDGER": str(specification.with_name("ledger.sqlite"))}
        command = [str(COMMAND), "sweep", str(specification), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_what_does_not_fit_is_planned_and_not_started(sweep: Callable[..., Told], specification: Path) -> None:
    huge = "strategy.micro_batch=1,100000000"
    code, told, _ = sweep(huge, "recipe.tokens_per_step=6400000000", "--dry-run", "--json")
    assert code == 0
    assert [trial["status"] for trial in json.loads(told)["trials"]] == ["not started", "does not fit"]
    assert not (specification.parent / "sweep").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_trials_are_runs_of_their_own_and_the_best_has_the_lowest_loss(
    sweep: Callable[..., Told], specification: Path
) -> None:
    override = "recipe.learning_rate=1e-2,1e-5"
    folder = specification.parent / "sweep"
    # the second trial fails: where its folder should be, a file is
    folder.mkdir()
    (folder / "learning_rate=1e-5").write_text("")
    code, told, errors = sweep(override, "--json")
    assert code == 1, errors
    summary: dict[str, Any] = json.loads(told)
    assert summary == json.loads((folder / "sweep.json").read_text())
    complete, failed = summary["trials"]
    assert (complete["name"], complete["status"]) == ("learning_rate=1e-2", "complete")
    assert (failed["name"], failed["status"]) == ("learning_rate=1e-5", "failed")
    assert "it cannot be written" in failed["reason"]
    assert summary["best"] == "learning_rate=1e-2"

    # again: what is complete is not done again, and what failed is
    before = (folder / "learning_rate=1e-2" / "run.json").read_bytes()
    (folder / "learning_rate=1e-5").unlink()
    code, told, errors = sweep(override)
    assert code == 0, errors
    assert (folder / "learning_rate=1e-2" / "run.json").read_bytes() == before
    summary = json.loads((folder / "sweep.json").read_text())
    losses = {}
    for trial in summary["trials"]:
        name = trial["name"]
        record = json.loads((folder / name / "run.json").read_text())
        assert (record["status"], trial["status"]) == ("complete", "complete")
        assert record["plan"]["recipe"]["learning_rate"] == float(name.removeprefix("learning_rate="))
        assert (folder / name / "adapter" / "adapter_config.json").is_file()
        assert (folder / name / "report.md").is_file()
        losses[name] = record["results"]["eval_after"]
        assert trial["eval_loss"] == losses[name]
    assert summary["best"] == min(losses, key=losses.__getitem__)
    assert "Best: " + summary["best"] in told
    assert [trial["name"] for trial in summary["trials"]] == sorted(losses, key=losses.__getitem__)
