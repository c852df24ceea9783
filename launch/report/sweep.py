"""A sweep as tables of the terminal: what fits where, with the memory that is needed."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from clusters.gpu import GIB
from launch.sweep import Sweep
from orchestrator.plans import Plan, Verdict


def sweep_tables(swept: Sweep, plan: Plan) -> Iterator[RenderableType]:
    """One option: a column for each GPU. Two: one for each value of the second, for the plan's GPU."""
    first = swept.axes[0]
    if len(swept.axes) == 1:
        yield Text(f"\nNeeded by {first.flag}, in GiB", style="italic")
        columns = [verdict.gpu for verdict in plan.verdicts]
        rows = [(value, [cell_on(swept.plans[(value,)], gpu) for gpu in columns]) for value, _ in first.values]
    else:
        second = swept.axes[1]
        yield Text(
            f"\nNeeded by {first.flag} (down) and {second.flag} (across) on {plan.target.name}, in GiB", style="italic"
        )
        columns = [value for value, _ in second.values]
        rows = [
            (value, [cell_on(swept.plans[value, other], plan.target.name) for other in columns])
            for value, _ in first.values
        ]
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column(first.flag, justify="right", header_style="dim")
    for title in columns:
        table.add_column(title, justify="right", header_style="dim", no_wrap=True)
    for value, cells in rows:
        table.add_row(value, *cells)
    yield table
    yield Text("* fits barely, x does not fit, - refused", style="dim")


def cell_on(plan: Plan | None, gpu: str) -> Text:
    """What is needed on one GPU, with a mark and a colour for whether it fits."""
    verdict = None if plan is None else next((each for each in plan.verdicts if each.gpu == gpu), None)
    if verdict is None:
        return Text("-", style="dim")
    return Text(f"{verdict.process_bytes / GIB:.2f} {mark(verdict)}", style=style(verdict))


def mark(verdict: Verdict) -> str:
    """Readable without colours."""
    return "*" if verdict.barely else " " if verdict.fits else "x"


def style(verdict: Verdict) -> str:
    """As in a heat map: by how much room is left."""
    if not verdict.fits:
        return "white on red"
    if verdict.barely:
        return "black on yellow"
    return "black on green" if verdict.process_bytes > 0.8 * verdict.usable_bytes else "white on dark_green"
