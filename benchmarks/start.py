"""`make start`: from the command to the first step, part by part, for a tiny model on this machine's CPU.

What is imported and started takes as long for a large model; loading it and its first step do not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.place import Place
from benchmarks.speed import ROOT, TRAINING, facts, on, spread
from benchmarks.training.case import Case, make_model, write_spec
from qlora_core.files import write_json

RESULTS = ROOT / "benchmarks" / "results" / "start.json"
PLACE = Place(ROOT / "docs" / "performance.md", "make start")
WORK = ROOT / ".cache" / "bench" / "start"
CASE = Case(layers=2, hidden=128, vocabulary=1024, seq_len=64)
PARTS = (
    "the plan is shown",
    "workers are asked for",
    "a worker begins to load the model",
    "it has loaded it",
    "the base is evaluated",
    "the first step is done",
    "all steps are done",
    "the command ends",
)
"""Moments, in their order."""


def moments(specification: Path, *overrides: str) -> list[float]:
    """Seconds from the start of the command to each moment of one run, of which `overrides` replace fields."""
    out = specification.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("qlora-train")), str(specification), *overrides]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "QLORA_LEDGER": str(WORK / "ledger.sqlite")}
    began, seen = time.time(), dict.fromkeys(PARTS[:2], 0.0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as process:
        if process.stdout is None:
            raise RuntimeError("no output")
        for line in process.stdout:
            for mark, part in (("FITS", PARTS[0]), ("starting workers", PARTS[1])):
                if line.startswith(mark):
                    seen[part] = time.time() - began
    ended = time.time() - began
    events: list[dict[str, Any]] = list(map(json.loads, (out / "events.jsonl").read_text().splitlines()))
    phases = [event["time"] for event in events if event["event"] == "phase"]
    evaluated = next(event["time"] for event in events if event["event"] == "eval")
    steps = [event["time"] for event in events if event["event"] == "step"]
    inside = [phases[0], phases[1], evaluated, steps[0], steps[-1]]
    return [*seen.values(), *(moment - began for moment in inside), ended]


@click.command(name="benchmarks.start")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def main(rounds: int) -> None:
    """Run it a few times, and write when each part was done."""
    model = make_model(CASE, WORK / "model")
    specification = write_spec(CASE, WORK / "run", model, steps=3)
    moments(specification)  # bytecode and files' caches
    found = [moments(specification) for _ in range(rounds)]
    seconds = dict(zip(PARTS, map(list, zip(*found, strict=True)), strict=True))
    results: dict[str, Any] = {**facts(*TRAINING), "seconds": seconds}
    write_json(RESULTS, results)
    text = table(results)
    PLACE.write(text)
    click.echo(text)


def table(results: Mapping[str, Any]) -> str:
    """What docs/performance.md shows."""
    reached = {part: spread(moments) for part, moments in results["seconds"].items()}
    lines = [
        f"Medians of {len(results['seconds'][PARTS[0]])} runs ({on(results)}):",
        "",
        "| until | seconds from the command | quartiles | of it |",
        "| --- | ---: | --- | ---: |",
    ]
    before = 0.0
    for part, found in reached.items():
        moment = found["median"]
        quartiles = f"{found['low']:.1f} to {found['high']:.1f}"
        lines.append(f"| {part} | {moment:.1f} | {quartiles} | {moment - before:.1f} |")
        before = moment
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
