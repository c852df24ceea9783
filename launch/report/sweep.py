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
    """What one combination comes to on one GPU: None where it is refused, or has no such GPU."""

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
        refused: what makes no plan, and why.
    """

    title: str
    down: str
    across: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    refused: list[str]


LEGEND = "* fits barely, x does not fit, - refused or without such a GPU"


def sweep_cells(swept: Sweep, plan: Plan) -> Iterator[SweepCells]:
    """One option: a column for each GPU. Two: one for each value of the second, for the plan's GPU.

    Where the GPU is swept itself, or is not the same for all values, it is each value's own.
    """
    first = swept.axes[0]
    plans = [each for each in swept.plans.values() if each is not None]
    refused = [f"{' and '.join(values)}: {why}" for values, why in swept.refused.items()]
    own = any(axis.option == "gpu" for axis in swept.axes)
    if len(swept.axes) == 1:
        gpus = [verdict.gpu for each in (plan, *plans) for verdict in each.verdicts]
        asked: list[str | None] = [None] if own else list(dict.fromkeys(gpus))
        rows = [(value, [cell_on(swept.plans[(value,)], gpu) for gpu in asked]) for value, _ in first.values]
        titles = [gpu or "needed" for gpu in asked]
        yield SweepCells(f"Needed by {first.flag}, in GiB", first.flag, "" if own else "GPU", titles, rows, refused)
        return
    second = swept.axes[1]
    columns = [value for value, _ in second.values]
    own = own or not all(plan.target.name in {verdict.gpu for verdict in each.verdicts} for each in plans)
    gpu = None if own else plan.target.name
    rows = [(value, [cell_on(swept.plans[value, other], gpu) for other in columns]) for value, _ in first.values]
    on = "" if own else f" on {plan.target.name}"
    title = f"Needed by {first.flag} (down) and {second.flag} (across){on}, in GiB"
    yield SweepCells(title, first.flag, second.flag, columns, rows, refused)


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
        yield Text(LEGEND, style="dim")
        yield from map(Text, found.refused)


def cell_on(plan: Plan | None, gpu: str | None) -> Cell:
    """What is needed on one GPU; on the plan's own where none is named."""
    if plan is None or gpu is None:
        return Cell(None if plan is None else plan.verdict)
    return Cell(next((each for each in plan.verdicts if each.gpu == gpu), None))
