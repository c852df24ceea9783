"""A sweep as tables: what fits where, with the memory that is needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from clusters.gpu import GIB
from launch.sweep import Sweep
from orchestrator.plans import Plan, Verdict


class Cell(NamedTuple):
    """What one combination comes to on one GPU: None where it is refused."""

    verdict: Verdict | None

    @property
    def words(self) -> str:
        """GiB and a mark, readable without colours."""
        if self.verdict is None:
            return "-"
        mark = "*" if self.verdict.barely else " " if self.verdict.fits else "x"
        return f"{self.verdict.confidence.expected_bytes / GIB:.2f} {mark}"

    @property
    def style(self) -> str:
        """As in a heat map: by how much room is left."""
        if self.verdict is None:
            return "dim"
        if not self.verdict.fits:
            return "white on red"
        if self.verdict.barely:
            return "black on yellow"
        tight = self.verdict.headroom_bytes < 0.2 * self.verdict.usable_bytes
        return "black on green" if tight else "white on dark_green"


class SweepCells(NamedTuple):
    """A table of a sweep.

    Attributes:
        title: what it shows.
        down: the option whose values are the rows.
        across: what the columns are.
        columns: their titles.
        rows: a value each, with its cells.
    """

    title: str
    down: str
    across: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


def sweep_cells(swept: Sweep, plan: Plan) -> Iterator[SweepCells]:
    """One option: a column for each GPU. Two: one for each value of the second, for the plan's GPU."""
    first = swept.axes[0]
    if len(swept.axes) == 1:
        columns = [verdict.gpu for verdict in plan.verdicts]
        rows = [(value, [cell_on(swept.plans[(value,)], gpu) for gpu in columns]) for value, _ in first.values]
        yield SweepCells(f"Needed by {first.flag}, in GiB", first.flag, "GPU", columns, rows)
        return
    second = swept.axes[1]
    columns = [value for value, _ in second.values]
    rows = [
        (value, [cell_on(swept.plans[value, other], plan.target.name) for other in columns])
        for value, _ in first.values
    ]
    title = f"Needed by {first.flag} (down) and {second.flag} (across) on {plan.target.name}, in GiB"
    yield SweepCells(title, first.flag, second.flag, columns, rows)


def sweep_tables(swept: Sweep, plan: Plan) -> Iterator[RenderableType]:
    """The tables for a terminal."""
    for found in sweep_cells(swept, plan):
        yield Text(f"\n{found.title}", style="italic")
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column(found.down, justify="right", header_style="dim")
        for title in found.columns:
            table.add_column(title, justify="right", header_style="dim", no_wrap=True)
        for value, cells in found.rows:
            table.add_row(value, *(Text(cell.words, style=cell.style) for cell in cells))
        yield table
        yield Text("* fits barely, x does not fit, - refused", style="dim")


def cell_on(plan: Plan | None, gpu: str) -> Cell:
    """What is needed on one GPU."""
    return Cell(None if plan is None else next((each for each in plan.verdicts if each.gpu == gpu), None))
