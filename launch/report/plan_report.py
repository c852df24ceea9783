"""A plan as a report: what was asked, where the memory goes, what fits, and the other ways."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from launch.report.alternatives import alternative_rows, title_of
from launch.report.document import Document, Section, drawn
from launch.report.explain import explain
from launch.report.sweep import LEGEND, SweepCells, sweep_cells
from launch.report.terminal import VERDICT_COLUMNS, memory_lines, request_rows, verdict_cells, verdict_line
from launch.report.words import on_one_line
from launch.sweep import Sweep
from orchestrator.plans import Plan


def document(plan: Plan, swept: Sweep | None = None, command: str = "") -> Document:
    """The whole report; `command` is what asks for the plan again."""
    return Document(verdict_line(plan).plain, tuple(sections(plan, swept, command)))


def sections(plan: Plan, swept: Sweep | None, command: str) -> Iterator[Section]:
    """Its parts, in order."""
    yield Section("What was asked", ("", ""), list(request_rows(plan)), " ".join(plan.warnings))
    lines = [
        (line.title, line.size, "" if line.share is None else f"{line.share:.1%}", line.remark)
        for line in memory_lines(plan)
    ]
    at = f"At the peak, {plan.estimate.gpu.peak_moment}."
    yield Section("Memory", ("of the GPU", " size", " share", ""), lines, at, draw=drawn("memory", "needed", plan))
    yield Section("In the course of a step", draw=drawn("memory", "over_a_step", plan))
    columns = ("GPU", "fits", *(f" {on_one_line(title)}" for title in VERDICT_COLUMNS[2:]))
    cells = [
        tuple(cell.plain if isinstance(cell, Text) else cell for cell in verdict_cells(verdict))
        for verdict in plan.verdicts
    ]
    yield Section("Fits on", columns, cells, "Sizes in GiB; what is largest and longest fits as likely as not.")
    yield Section("What fits", draw=drawn("memory", "what_fits", plan))
    if plan.alternatives:
        titles, rows = alternative_rows(plan)
        columns = ("where", titles[1], *(f" {on_one_line(title)}" for title in titles[2:]))
        yield Section(title_of(plan), columns, rows, draw=drawn("memory", "ways", plan))
    for found in sweep_cells(swept, plan) if swept is not None else ():
        yield swept_section(found)
    for part in explain(plan):
        yield Section(part.title, text=tuple(part.lines))
    if command:
        yield Section("Ask again", text=(command,))


def swept_section(found: SweepCells) -> Section:
    """A sweep's table and its heat map."""
    rows = [(value, *(cell.words for cell in cells)) for value, cells in found.rows]
    columns = (found.down, *(f" {column}" for column in found.columns))
    return Section(found.title, columns, rows, LEGEND, tuple(found.refused), drawn("memory", "heat", found))
