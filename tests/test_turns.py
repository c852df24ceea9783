"""Two trainings timed by turns: while one goes on, the other stands still."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.turns import Training, by_turns
from clusters.errors import RunFailed

TRAINING = """
import json, sys, time
events, steps, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
for step in range(steps):
    began = time.perf_counter()
    time.sleep(seconds)
    facts = {"event": "step", "time": time.time(), "seconds": time.perf_counter() - began}
    with open(events, "a") as file:
        file.write(json.dumps({"event": "phase"}) + "\\n" + json.dumps(facts) + "\\n")
"""
# its steps are made by a child, as a Ray worker is one
PARENT = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"


def training(folder: Path, name: str, *, steps: int = 10**6, seconds: float = 0.02) -> Training:
    events = folder / name
    argv = [sys.executable, "-c", PARENT, TRAINING, str(events), str(steps), str(seconds)]
    return Training(argv, events, dict(os.environ))


def moments(training: Training) -> list[float]:
    """When steps were over."""
    lines = training.events.read_text().splitlines()
    return [event["time"] for event in map(json.loads, lines) if event["event"] == "step"]


def runs_of(one: Training, other: Training) -> list[str]:
    """Whose steps followed each other, without repetitions."""
    told = sorted([(time, "one") for time in moments(one)] + [(time, "other") for time in moments(other)])
    names = [name for _, name in told]
    return [name for at, name in enumerate(names) if not at or names[at - 1] != name]


def test_one_stands_still_while_the_other_goes_on_and_both_are_gone_afterwards(tmp_path: Path) -> None:
    one, other = training(tmp_path, "one"), training(tmp_path, "other")
    found = by_turns({"one": one, "other": other}, warm_up=2, turns=4, seconds=0.5)
    assert {name: len(means) for name, means in found.items()} == {"one": 4, "other": 4}
    assert all(mean >= 0.02 for means in found.values() for mean in means)  # what a step sleeps
    # warm-up, then one other, other one, one other, other one
    assert runs_of(one, other) == ["one", "other", "one", "other", "one", "other", "one"]
    named = {part for process in psutil.process_iter(["cmdline"]) for part in process.info["cmdline"] or ()}
    assert not named & {str(one.events), str(other.events)}


def test_one_that_ends_before_it_was_timed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="ended with 0 before it was timed"):
        by_turns({"short": training(tmp_path, "short", steps=3)}, warm_up=2, turns=2, seconds=0.5)


def test_a_step_during_which_it_was_stopped_does_not_count(tmp_path: Path) -> None:
    trainings = {"slow": training(tmp_path, "slow", seconds=1.0), "fast": training(tmp_path, "fast")}
    with pytest.raises(RunFailed, match=r"No step was begun and over within 0\.5 s"):
        by_turns(trainings, warm_up=1, turns=2, seconds=0.5)
