"""The alternatives of a plan as a table of the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from clusters.gpu import GIB
from orchestrator.plans import Alternative, Plan

WORDS = {
    "micro_batch": "micro-batch {}",
    "seq_len": "{} tokens long",
    "rank": "rank {}",
    "world_size": "",
    "tokens_per_step": "",
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
    ("gradient_checkpointing", "true"): "checkpointing",
    ("gradient_checkpointing", "false"): "no checkpointing",
    ("paged_optimizer", "true"): "paged",
    ("paged_optimizer", "false"): "not paged",
    ("zero_stage", "0"): "no ZeRO",
    ("offload", "none"): "no offload",
    ("offload", "optimizer"): "optimizer offloaded",
    ("offload", "all"): "all offloaded",
}


def alternatives_table(plan: Plan) -> Table:
    """One line for each: what it is, its memory, speed, price."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    priced = any(one.price_per_hour is not None for one in plan.alternatives)
    titles = ["", "what changes", "needed\nGiB", "to spare\nGiB", "\ntokens/s", *(["\nper hour"] if priced else [])]
    for title in titles:
        right = title not in ("", "what changes")
        table.add_column(title, justify="right" if right else "left", header_style="dim", no_wrap=right)
    for one in plan.alternatives:
        table.add_row(*cells(one, priced))
    return table


def cells(one: Alternative, priced: bool) -> list[str | Text]:
    """One line."""
    speed = "-" if one.step_time is None else f"{one.step_time.tokens_per_second:,.0f}"
    sure = "" if one.confidence.chance >= 0.95 else f" ({one.confidence.chance:.0%} sure)"
    price = [] if not priced else ["-" if one.price_per_hour is None else f"{one.price_per_hour:,.2f} {one.currency}"]
    return [
        one.place,
        (f"{one.title}: " if one.title else "") + changes_words(one) + sure,
        f"{one.process_bytes / GIB:.2f}",
        f"{(one.usable_bytes - one.process_bytes) / GIB:.2f}",
        speed,
        *price,
    ]


def changes_words(one: Alternative) -> str:
    """What is not as in the plan, in few words."""
    words = [
        FLAGS.get((change.field, change.value), WORDS.get(change.field, f"{change.field} {{}}").format(change.value))
        for change in one.changes
    ]
    return ", ".join(filter(None, words)) or "as asked for"
