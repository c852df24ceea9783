"""`make chaos`, after the faults of tests/chaos: measures what checkpoints cost, and writes docs/reliability.md."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from benchmarks.reliability import page, saving
from benchmarks.speed import ROOT, facts
from launch.command import main as run_command
from qlora_core.files import write_json

WORK = ROOT / ".cache" / "chaos"
PACKAGES = ("torch", "bitsandbytes", "peft", "deepspeed", "ray")


@click.command(name="benchmarks.reliability")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(debug: bool) -> int:
    """Write the page from what the tests left in $CHAOS_ROWS and $CHAOS_CURVES."""
    rows = Path(os.environ.get("CHAOS_ROWS", WORK / "rows.jsonl"))
    curves = json.loads(Path(os.environ.get("CHAOS_CURVES", WORK / "curves.json")).read_text(encoding="utf-8"))
    os.environ["QLORA_LEDGER"] = str(WORK / "ledger.sqlite")
    results = {
        "schema_version": 1,
        **facts(*PACKAGES),
        "faults": [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()],
        "curves": curves,
        "saving": {"every": saving.EVERY, **saving.measured(WORK)},
    }
    write_json(page.RESULTS, results)
    page.plot(curves, page.PLOT)
    page.DOCUMENT.write_text(page.render(), encoding="utf-8")
    click.echo(page.faults(results))
    return 0


if __name__ == "__main__":
    run_command(command)
