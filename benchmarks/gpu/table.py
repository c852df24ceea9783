"""The summary in the terminal: what was measured, and how far each prediction was from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

GIB = 1024**3
FIGURES = ("allocated", "reserved", "process")


def one_line(row: Mapping[str, Any]) -> str:
    """A row as it ends."""
    where = f"{row['name']} ({row['model']})"
    if row["status"] != "measured":
        return f"{where}: {row['status']}: {row['reason']}"
    said = f"{where}: {row['measured']['allocated_bytes'] / GIB:.3f} GiB allocated"
    if not row["errors_percent"]:
        return f"{said}, by a loop that is not modelled"
    return f"{said}, formula {row['errors_percent']['formula']['allocated']:+.2f} %"


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table of the measured rows, then what was skipped or failed."""
    table = Table(title="Measured in GiB, and how far from it formula / trace are, in per cent", box=None)
    table.add_column("case", no_wrap=True)
    for figure in FIGURES:
        table.add_column(figure, justify="right", no_wrap=True)
        table.add_column("%", justify="right", no_wrap=True)
    measured = [row for row in rows if row["status"] == "measured"]
    for row in measured:
        cells = [row["name"]]
        for figure in FIGURES:
            size = row["measured"][f"{figure}_bytes"]
            cells += [f"{size / GIB:.3f}" if size else "-", _errors(row, figure)]
        table.add_row(*cells)
    console.print(table)
    for row in rows:
        if row["status"] != "measured":
            console.print(one_line(row), highlight=False, soft_wrap=True)
    console.print(f"{len(measured)} of {len(rows)} rows measured.", highlight=False)


def rates_line(said: Mapping[str, Any]) -> str:
    """The median of what the device achieves of each rate."""
    if "measured" not in said:
        return f"Rates: not measured: {said.get('failed', 'not asked')}"
    medians = (f"{what} {statistics.median(found.values()):.3g}" for what, found in said["measured"].items())
    return f"Operations, bytes or kernels a second, medians: {', '.join(medians)}."


def recovery_line(said: Mapping[str, Any]) -> str:
    """What became of a run that memory ran out of."""
    if "survived" not in said:
        reason = said.get("failed") or said.get("skipped") or "not asked"
        return f"Recovery from CUDA out-of-memory: not measured: {reason}"
    return (
        f"Recovery from CUDA out-of-memory: survived, {said['steps_lost']} steps done twice, {said['seconds']:.0f} s."
    )


def _errors(row: Mapping[str, Any], figure: str) -> str:
    said = [row["errors_percent"].get(estimator, {}).get(figure) for estimator in ("formula", "trace")]
    return " / ".join("-" if error is None else f"{error:+.1f}" for error in said)
