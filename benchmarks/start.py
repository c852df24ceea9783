"""`make start`: from the command to the first step, part by part, for a tiny model on this machine's CPU.

What is imported and started takes as long for a large model; loading it and its first step do not.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from benchmarks.place import Place
from benchmarks.speed import ROOT, machine
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
    """Run it a few times, and write the medians."""
    model = make_model(CASE, WORK / "model")
    specification = write_spec(CASE, WORK / "run", model, steps=3)
    moments(specification)  # bytecode and files' caches
    found = [moments(specification) for _ in range(rounds)]
    reached = [statistics.median(each) for each in zip(*found, strict=True)]
    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "rounds": rounds,
        "seconds": dict(zip(PARTS, reached, strict=True)),
    }
    write_json(RESULTS, results)
    lines = [
        f"Medians of {rounds} runs ({results['machine']['processor']}, {results['machine']['cores']} cores, "
        f"{results['date']}):",
        "",
        "| until | seconds from the command | of it |",
        "| --- | ---: | ---: |",
    ]
    before = 0.0
    for part, moment in results["seconds"].items():
        lines.append(f"| {part} | {moment:.1f} | {moment - before:.1f} |")
        before = moment
    text = "\n".join(lines) + "\n"
    PLACE.write(text)
    click.echo(text)


if __name__ == "__main__":
    main()
