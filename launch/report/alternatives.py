"""The alternatives of a plan as a table of the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from clusters.gpu import GIB
from launch.report.words import price_range, sure_words, time_range
from orchestrator.plans import Alternative, Objective, Plan

WORDS = {
    "micro_batch": "micro-batch {}",
    "seq_len": "{} tokens long",
    "rank": "rank {}",
    "world_size": "",
    "tokens_per_step": "{} tokens a step",
    "gradient_accumulation": "",
    "zero_stage": "ZeRO {}",
    "loss": "{} loss",
    "attention": "{} attention",
    "optimizer": "{}",
    "upcast": "upcast {}",
    "method": "{}",
    "quantization": "{} base",
    "double_quantization": "",
    "gpu": "",
}
"""How a change is told; "" where the place or another change says it."""
FLAGS = {
    ("autocast", "true"): "autocast",
    ("gradient_checkpointing", "true"): "checkpointing",
    ("gradient_checkpointing", "false"): "no checkpointing",
    ("paged_optimizer", "true"): "paged",
    ("paged_optimizer", "false"): "not paged",
    ("zero_stage", "0"): "no ZeRO",
    ("offload", "none"): "no offload",
    ("offload", "optimizer"): "optimizer offloaded",
    ("offload", "all"): "all offloaded",
}


ORDER: dict[Objective, str] = {
    "fastest": "the fastest",
    "cheapest": "the cheapest",
    "fewest-gpus": "those with the fewest GPUs",
    "longest": "those with the longest context",
}
Cell = Callable[[Alternative], str]
WHOLE_RUN, PRICE = INTERVALS = "\nwhole run", "\nprice"
"""Columns with a figure and its bounds, which are broken into lines."""


def title_of(plan: Plan) -> str:
    """What the table shows, and in which order."""
    if not plan.fits:
        return "The nearest that would fit, the cheapest for you first"
    return f"Other ways, {ORDER[plan.objective or 'fastest']} first"


def alternatives_table(plan: Plan) -> Table:
    """One line for each: what it is, its memory, speed, time and price."""
    titles, rows = alternative_rows(plan)
    table = Table(box=None, padding=(0, 1, 0, 0))
    for number, title in enumerate(titles):
        table.add_column(
            title,
            justify="left" if number < 2 else "right",
            header_style="dim",
            no_wrap=number >= 2 and title not in INTERVALS,
            overflow="fold",  # which loses no figure where there is no room
        )
    for row in rows:
        cells = zip(titles, row, strict=True)
        table.add_row(*(cell.replace(" (", "\n(") if title in INTERVALS else cell for title, cell in cells))
    return table


def alternative_rows(plan: Plan) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The columns' titles, of which the first two are words, and the cells."""
    columns: dict[str, Cell] = {
        "needed\nGiB": lambda one: f"{one.confidence.expected_bytes / GIB:.2f}",
        "to spare\nGiB": lambda one: f"{one.headroom_bytes / GIB:.2f}",
        "\ntokens/s": lambda one: "-" if one.step_time is None else f"{one.step_time.tokens_per_second:,.0f}",
    }
    if any(one.duration is not None for one in plan.alternatives):
        columns[WHOLE_RUN] = lambda one: "-" if one.duration is None else time_range(one.duration)
    if any(one.price_per_hour is not None for one in plan.alternatives):
        columns[PRICE] = price
    rows = []
    for one in plan.alternatives:
        sure = sure_words(one.confidence.chance)
        what = (f"{one.title}: " if one.title else "") + changes_words(one) + sure
        rows.append((one.place, what, *(cell(one) for cell in columns.values())))
    return ("", "what changes", *columns), rows


def price(one: Alternative) -> str:
    """Of the whole run, or of an hour where its tokens are not known."""
    if one.price_per_hour is None:
        return "-"
    if one.duration is None or one.duration.price is None:
        return f"{one.price_per_hour:,.2f} {one.currency}/h"
    return price_range(one.duration)


def changes_words(one: Alternative) -> str:
    """What is not as in the plan, in few words."""
    words = [
        FLAGS.get((change.field, change.value), WORDS.get(change.field, f"{change.field} {{}}").format(change.value))
        for change in one.changes
    ]
    return ", ".join(filter(None, words)) or "as asked for"
