"""A plan as a page: the terminal's screen as one self-contained HTML file, or as Markdown."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from clusters.errors import request_error
from launch.report.terminal import screen
from launch.sweep import Sweep
from orchestrator.plans import Plan
from qlora_core.files import replace_atomically

FLAG = "--report"
WIDTH = 120


def check_report(file: str) -> None:
    """Raise a RequestError for an ending that names no form of a report."""
    if Path(file).suffix.lower() not in (".html", ".md"):
        raise request_error(FLAG, file, "its ending names no form of a report", "Write FILE.html or FILE.md")


def write_plan_report(file: str, plan: Plan, swept: Sweep | None) -> None:
    """Write `plan` to `file`, in the form that its ending names; a page of that name is replaced.

    Raises:
        RequestError: another ending, or it cannot be written.
    """
    check_report(file)
    path = Path(file)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    console.print(*screen(plan, swept), sep="\n")
    for warning in plan.warnings:
        console.print(f"warning: {warning}")
    if path.suffix.lower() == ".html":
        page = console.export_html(inline_styles=True)
    else:
        page = f"# {plan.architecture.name} on {plan.target.name}\n\n```\n{console.export_text().rstrip()}\n```\n"
    try:
        with replace_atomically(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        rule = f"it cannot be written: {error.strerror or error}"
        raise request_error(FLAG, file, rule, "Choose a folder that can") from error
