"""`python -m benchmarks.gpu`: measure the matrix on this machine's GPU, each row predicted before. See docs/gpu.md."""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.gpu import recovery, runner, table
from benchmarks.gpu.matrix import chosen
from clusters.errors import RunFailed, request_error
from launch.command import main as run_command

RESULTS = runner.ROOT / "benchmarks" / "results"
DRY_OUT = runner.ROOT / ".cache" / "benchmarks" / "gpu-dry.json"
PROBE = (sys.executable, "-m", "benchmarks.gpu.device")


@click.command(name="benchmarks.gpu")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=9.0, show_default=True, help="At most.")
@click.option("--dry", is_flag=True, help="A handful of rows with small shapes on the CPU.")
@click.option("--only", default="", metavar="NAME,...", help="Rows whose name or model begins so.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The JSON. Default: benchmarks/results/.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(minutes: float, dry: bool, only: str, out: Path | None, debug: bool) -> int:
    """Measure peaks of real training steps on this machine's GPU, beside what is predicted for them."""
    clock = runner.Clock(minutes)
    cases = list(chosen(dry=dry, only=tuple(word for word in only.split(",") if word)))
    if not cases:
        raise request_error("--only", only, "no row begins so", "benchmarks/gpu/matrix.py lists them")
    if dry and out is not None and out.resolve().is_relative_to(RESULTS):
        raise request_error("--out", out, "a dry run is no result", "Leave it away, or name another folder")
    if dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for all processes that are started here
    machine = probe()
    if not dry and machine["kind"] != "cuda":
        raise request_error("device", machine["kind"], "torch sees no CUDA GPU", "DRY=1 shows the rows on a CPU, small")
    if missing := [name for name, version in machine["versions"].items() if version is None and name != "cuda"]:
        raise request_error(
            "packages", ", ".join(missing), "they are not installed", "Give their wheels: WHEELS=folder"
        )
    out = out or (DRY_OUT if dry else default_out(machine["name"]))
    console = Console()
    record = runner.Record(out, {"dry": dry, "date": now(), "minutes": minutes, **split(machine)})
    if record.rates is None or "failed" in record.rates:
        record.put_rates(runner.ask_rates(machine, clock))
    recovers = not dry and not only and "survived" not in (record.recovery or {})
    for_rows = clock.less(recovery.reserved(clock)) if recovers else clock
    runner.run(cases, machine, record, for_rows, lambda row: console.print(table.one_line(row), highlight=False))
    if recovers:
        record.put_recovery(recovery.measure(clock))
    table.show(record.rows, console)
    console.print(table.rates_line(record.rates or {}), highlight=False)
    console.print(table.recovery_line(record.recovery or {}), highlight=False)
    console.print(f"Written to {record.out}", highlight=False, soft_wrap=True)
    return 0 if any(row["status"] == "measured" for row in record.rows) else 1


def probe() -> dict[str, Any]:
    """The machine's device, asked in a process that ends before anything is measured.

    Raises:
        RunFailed: there is no torch that could be asked.
    """
    done = subprocess.run(PROBE, cwd=runner.ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunFailed(f"The device cannot be asked for: {reason}.", "Give a Python with torch: make gpu PYTHON=...")
    machine: dict[str, Any] = json.loads(done.stdout)
    return machine


def split(machine: dict[str, Any]) -> dict[str, Any]:
    """What the record says of the machine: the device, and the versions."""
    device = {name: value for name, value in machine.items() if name not in ("versions", "uuids")}
    return {"device": device, "versions": machine["versions"]}


def default_out(name: str) -> Path:
    """The file of a result: device and day."""
    return RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{now()[:10]}.json"


def now() -> str:
    """The date and time, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    run_command(command)
