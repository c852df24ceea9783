"""`make planners`: other planners from the package index, each in an environment of its own, asked what we are asked.

Writes benchmarks/results/planners.json and the tables of docs/planners.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import fmean, median
from typing import Any

import click

from benchmarks.accuracy import t4
from benchmarks.peers import installed, put_in_hub_cache
from benchmarks.place import Place
from benchmarks.speed import ROOT, facts
from clusters.errors import RunFailed
from launch.command import main as run_command
from qlora_core.files import write_json
from qlora_core.memory import formula, played
from qlora_core.memory.device import MIB

RESULTS = ROOT / "benchmarks" / "results" / "planners.json"
PLACE = Place(ROOT / "docs" / "planners.md", "make planners")
SCRIPT = Path(__file__).with_name("asked.py")
FIGURES = ("allocated", "reserved", "process", "after loading")
"""What a planner may say, of those that a row has."""
TIMED = 200
PACKAGES = ("qlora-orchestrator", "torch", "transformers", "peft", "bitsandbytes")
"""What our own answers are made with."""


@dataclass(frozen=True, slots=True)
class Planner:
    """One from the package index.

    Attributes:
        name: its distribution.
        version: the one that is asked.
        claims: what it says of itself, and what is held against it.
        with_ours: it is asked in our environment, where it is a dependency, or needs our torch and transformers.
    """

    name: str
    version: str
    claims: str
    with_ours: bool = False


PLANNERS = (
    Planner("fitcheck-llm", "0.3.1", "measured these rows itself, and fits constants to them"),
    Planner("canifinetune", "0.4.1", "peak reserved on an RTX 4080; without its safety margin"),
    Planner("peft-doctor", "0.9.2", "a formula-based planning estimate of training VRAM"),
    Planner("qmemcalc", "0.1.1", "GPU memory of QLoRA and LoRA", with_ours=True),
    Planner("accelerate", metadata.version("accelerate"), "the model's size alone (`estimate-memory`)", with_ours=True),
)


def python_of(planner: Planner) -> Path:
    """The Python in which a planner is asked; its environment is made where it is not there.

    Raises:
        RunFailed: it cannot be installed.
    """
    if planner.name == "accelerate":
        return Path(sys.executable)
    options = ["--no-deps"] if planner.with_ours else []
    return installed(planner.name, planner.version, options) / "bin" / "python"


def asked(planner: Planner, rows: Sequence[Mapping[str, Any]], hub: Path) -> dict[str, Any]:
    """What a planner answers."""
    variables = {**os.environ, "HF_HOME": str(hub), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    python = python_of(planner)
    if planner.with_ours:
        variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))
    command = [str(python), str(SCRIPT), planner.name]
    done = subprocess.run(command, input=json.dumps(rows), capture_output=True, text=True, env=variables)
    if done.returncode:
        raise RunFailed(f"{planner.name} failed: {done.stderr.strip().splitlines()[-1]}.", "Look at asked.py.")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def questions(folder: Path) -> list[dict[str, Any]]:
    """The rows, each with its model's shapes in a folder and in a Hub cache, as if they had been fetched."""
    rows: list[dict[str, Any]] = json.loads(t4.MEASURED.read_text())["rows"]
    for row, ours in zip(rows, t4.t4_rows(), strict=True):
        place, config = folder / str(row["model"]).replace("/", "--"), json.dumps(row["config"])
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(config)
        put_in_hub_cache(folder, str(row["model"]), config)
        row |= {"folder": str(place), "parameters": ours.architecture.parameters}
    return rows


def errors(answers: Sequence[Mapping[str, Any]], figure: str) -> dict[str, float] | None:
    """The errors of one figure in per cent, over the rows that were answered; None where it is none of a planner's."""
    said = [
        100 * (answer[figure] / row.measured[t4.FIGURES[figure][0]] - 1)
        for answer, row in zip(answers, t4.t4_rows(), strict=True)
        if figure in answer
    ]
    if not said:
        return None
    worst = max(said, key=abs)
    return {"rows": len(said), "mean": fmean(map(abs, said)), "median": median(map(abs, said)), "worst": worst}


def ours() -> dict[str, dict[str, Any]]:
    """Our own answers, in MiB, and microseconds of one by the formula and where it is played."""
    answers = {"ours, trace": t4.by_trace(), "ours, played": t4.by_playing(), "ours, formula": t4.by_formula()}
    found: dict[str, dict[str, Any]] = {
        name: {"answers": [{figure: one[figure] / MIB for figure in FIGURES} for one in said]}
        for name, said in answers.items()
        if said is not None
    }
    row = t4.t4_rows()[0]
    for name, estimator, times in (("ours, played", played.estimate, 5), ("ours, formula", formula.estimate, TIMED)):
        took = []
        for _ in range(times):
            began = time.perf_counter()
            estimator(row.architecture, row.recipe, row.strategy, row.device)
            took.append(time.perf_counter() - began)
        found[name]["us"] = 1e6 * median(took)
    return found


@click.command(name="benchmarks.planners")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(debug: bool) -> int:
    """Ask all of them, and write what came out."""
    everyone: dict[str, dict[str, Any]] = ours()
    with tempfile.TemporaryDirectory() as folder:
        rows = questions(Path(folder))
        for planner in PLANNERS:
            everyone[f"{planner.name} {planner.version}"] = {
                **asked(planner, rows, Path(folder)),
                "claims": planner.claims,
            }
    results = {
        "schema_version": 1,
        **facts(*PACKAGES),
        "rows": len(t4.t4_rows()),
        "planners": {
            name: {
                "claims": one.get("claims", ""),
                "errors": {figure: errors(one["answers"], figure) for figure in FIGURES},
                "us": one.get("us"),
                "answers": one["answers"],
            }
            for name, one in everyone.items()
        },
    }
    write_json(RESULTS, results)
    text = tables(results)
    PLACE.write(text)
    click.echo(text)
    return 0


def tables(results: Mapping[str, Any]) -> str:
    """What docs/planners.md shows."""
    lines = [f"Asked on {results['date']} ({results['machine']['processor']}). Errors in per cent, mean and worst:", ""]
    lines += [f"| planner | {' | '.join(FIGURES)} | µs an answer | |", f"| --- |{' ---: |' * (len(FIGURES) + 1)} --- |"]
    for name, one in results["planners"].items():
        cells = [
            "-" if error is None else f"{error['mean']:.1f}, {error['worst']:+.0f}" for error in one["errors"].values()
        ]
        if name.startswith("ours"):
            cells = [f"{error['mean']:.2f}, {error['worst']:+.1f}" for error in one["errors"].values()]
        took = "-" if one["us"] is None else f"{one['us']:,.0f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {took} | {one['claims']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(command)
