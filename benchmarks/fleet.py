"""`make fleet`: how long `qlora-capacity` takes for 50 jobs on eight pools, and for ten thousand runs or jobs.

Each question is asked by the command itself, in a process of its own, as somebody would ask it.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.place import Place
from benchmarks.speed import ROOT, Goal, bare_imports, environment, facts, interleaved, on, spread
from qlora_core.files import write_json

RESULTS = ROOT / "benchmarks" / "results" / "fleet.json"
DOCUMENT = ROOT / "docs" / "capacity.md"
PLACE = Place(DOCUMENT, "make fleet")
EXAMPLES = ROOT / "clusters" / "examples"
FLEET = EXAMPLES / "thousand-nodes.yaml"
MODELS = (
    "llama-3.1-8b",
    "qwen2.5-7b",
    "mistral-7b-v0.1",
    "llama-3.1-70b",
    "33b",
    "mixtral-8x7b",
    "7b",
    "13b",
    "65b",
    "qwen2.5-14b",
)
MANY = EXAMPLES / "jobs" / "thousand-nodes.yaml"
SECONDS = 1.0
"""For the solver, which takes all that it may where it does not prove that nothing is better."""
ROUNDS = 3
MOST = {
    "50 jobs of 10 models with one recipe, each with other data": 5,
    "50 jobs of which no two have model, rank and length alike": 5,
    "10,000 runs of 7 jobs, by rules": 60,
    "10,000 jobs of 10 models, each with other data or another deadline, by rules": 60,
}
"""What is asked, and the seconds that it may take at most."""


def jobs_of(count: int, *, unlike: bool) -> dict[str, Any]:
    """A list of jobs of ten models: no two with model, rank and length alike, or all with one recipe and other data."""
    jobs = []
    for number in range(count):
        length, rank = (256 * (1 + number % 12), 8 * (1 + number // len(MODELS))) if unlike else (2048, 16)
        recipe = {"rank": rank, "seq_len": length, "tokens_per_step": 64 * length}
        model, tokens, due = MODELS[number % len(MODELS)], f"{10 + number % 100}M", 48 + number // 100
        jobs.append(
            {"name": f"job-{number}", "model": model, "tokens": tokens, "deadline_hours": due, "recipe": recipe}
        )
    return {"jobs": jobs}


def asked(fleet: Path, jobs: Path) -> tuple[float, float]:
    """Seconds on the clock, and of processors, for one question."""
    command = [str(Path(sys.executable).with_name("qlora-capacity")), str(fleet), "--jobs", str(jobs)]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    users = {**os.environ, "QLORA_LEDGER": str(ROOT / ".cache" / "no-ledger")}
    done = subprocess.run([*command, "--seconds", str(SECONDS)], capture_output=True, text=True, env=users)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1):
        raise SystemExit(done.stderr)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def bare_milliseconds() -> float:
    """What the bare imports of `make speed` take on this machine now."""
    bare = bare_imports()
    return 1e3 * statistics.median(interleaved([bare], 7, environment())[bare.name])


@click.command(name="benchmarks.fleet")
def main() -> None:
    """Ask, and write what it took."""
    before = facts("qlora-orchestrator", "ortools")
    with tempfile.TemporaryDirectory() as folder:
        alike, unlike, many = (Path(folder) / f"{name}.yaml" for name in ("alike", "unlike", "many"))
        alike.write_text(yaml.safe_dump(jobs_of(50, unlike=False)))
        unlike.write_text(yaml.safe_dump(jobs_of(50, unlike=True)))
        many.write_text(yaml.safe_dump(jobs_of(10_000, unlike=False)))
        always_open = Path(folder) / "fleet.yaml"
        description = yaml.safe_load(FLEET.read_text(encoding="utf-8"))
        for pool in description["pools"]:
            pool.pop("hours", None)  # a fleet with hours is scheduled by rules alone
        always_open.write_text(yaml.safe_dump(description))
        files = ((always_open, alike), (always_open, unlike), (FLEET, MANY), (FLEET, many))
        questions = dict(zip(MOST, files, strict=True))
        bare = bare_milliseconds()
        rounds = [{name: asked(*files) for name, files in questions.items()} for _ in range(ROUNDS)]
    results = {
        **before,
        "bare_ms": round((bare + bare_milliseconds()) / 2),
        "seconds": {name: [each[name][0] for each in rounds] for name in MOST},
        "cpu_seconds": {name: [each[name][1] for each in rounds] for name in MOST},
    }
    write_json(RESULTS, results)
    said = table(results)
    PLACE.write(said)
    click.echo(said)


def table(results: Mapping[str, Any]) -> str:
    """What docs/capacity.md shows."""
    rows = []
    for name, most in MOST.items():
        clock, processors = (spread(results[of][name]) for of in ("seconds", "cpu_seconds"))
        seconds = f"{clock['median']:.1f} | {clock['low']:.1f} to {clock['high']:.1f}"
        verdict = Goal(name, most, clock["median"]).verdict
        rows.append(f"| {name} | {most} | {seconds} | {verdict} | {processors['median']:.1f} |")
    return "\n".join(
        [
            f"On the eight pools of a thousand nodes, medians of {ROUNDS} ({on(results)}; {SECONDS:.0f} s for the "
            f"solver; `make fleet` asks again). How fast the machine was then tell the imports that "
            f"[speed.md](speed.md) holds everything against: they took {results['bare_ms']} ms.",
            "",
            "| | at most | seconds | quartiles | | of processors |",
            "| --- | ---: | ---: | --- | --- | ---: |",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main()
