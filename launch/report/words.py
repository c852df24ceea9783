"""Sizes and times as people read them, and tables without blanks at the ends of their lines."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from clusters.gpu import GIB, MIB
from orchestrator.confidence import ENOUGH_RUNS
from orchestrator.plans import SURE, Duration

if TYPE_CHECKING:
    from rich.console import RenderableType


def gib(value: int) -> str:
    """Bytes as GiB; as MiB below a tenth of one."""
    return f"{value / GIB:.2f} GiB" if abs(value) >= GIB // 10 else f"{value / MIB:.2f} MiB"


def size_text(value: int) -> str:
    """Bytes in the unit that suits them, with two digits."""
    if value >= GIB:
        return f"{value / GIB:.2f} GiB"
    return f"{value / MIB:.2f} MiB" if value >= MIB / 100 else f"{value} bytes"


def number(value: int) -> str:
    """A count, its digits in groups."""
    return f"{value:,}"


def error(predicted: int, measured: int) -> str:
    """How far a prediction is off; above zero it is too high."""
    return f"{(predicted - measured) / measured:+z.1%}" if measured else "-"


LEAST_WIDTH = 80
"""Columns: tables lose figures on fewer, so a terminal that is narrower breaks their lines itself."""


def on_one_line(title: str) -> str:
    """A column's title, which a terminal shows on two lines."""
    return " ".join(title.split())


def echo(*renderables: RenderableType, piped_width: int | None = None, err: bool = False) -> None:
    """Print on stdout, or with `err` on stderr, as rich lays it out, without blanks at the ends of lines.

    Args:
        piped_width: columns where there is no terminal; None: as many as a terminal would have.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)  # a name in brackets is a name
    if piped_width is not None and not console.is_terminal:
        console.width = piped_width
    console.width = max(console.width, LEAST_WIDTH)
    with console.capture() as captured:
        for each in renderables:
            console.print(each)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()), err=err)


def time_words(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def time_range(run: Duration) -> str:
    """A run's time, and between which it lies."""
    return f"{time_words(run.seconds)} ({time_words(run.low_seconds)} to {time_words(run.high_seconds)})"


def price_range(run: Duration) -> str:
    """A run's price in its currency, and between which it lies."""
    return money_range(run.price, run.low_price, run.high_price, run.currency)


def money_range(amount: float | None, low: float | None, high: float | None, currency: str | None) -> str:
    """An amount of money, and between which it lies; a dash where it is not known."""
    if amount is None or low is None or high is None:
        return "-"
    return f"{money(amount, currency)} ({low:,.2f} to {high:,.2f})"


def money(amount: float, currency: str | None) -> str:
    """An amount of money."""
    return f"{amount:,.2f} {currency or ''}".rstrip()


def sure_words(chance: float) -> str:
    """How sure it is that something fits, where that is not nearly certain."""
    return "" if chance >= SURE else f" ({chance:.0%} sure)"


def what_bounds_are(runs: int) -> str:
    """What lies between the bounds of a time that so many runs have corrected (docs/step-time.md)."""
    return "nine times of ten" if runs >= ENOUGH_RUNS else "from the fast to the slow end of what is achieved"


UNITS = {"MiB": 1 / 1024, "GiB": 1, "s": 1, "min": 60, "h": 3600, "days": 86400}
"""Of the texts of `gib` and `time_words`, which change from cell to cell of a column."""


def number_of(text: str) -> float | None:
    """The number that a cell begins with, by which a column is sorted; None where it begins with none."""
    found = re.match(r"([-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?) ?([^\W\d]*)", text)
    return float(found[1].replace(",", "")) * UNITS.get(found[2], 1) if found else None


def visible(text: str) -> str:
    """Text on one line: line breaks and other control characters, which could steer a terminal, are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def mixture(datasets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What each of several datasets contributes, in sentences.

    Args:
        datasets: by name, `qlora_core.training.dataset.DataReport` as a run's record has it.
    """
    from qlora_core.data import in_an_epoch  # late: it brings the Hub, which a plan seldom needs

    learned = {name: one["learned"] * one["times"] for name, one in datasets.items()}
    return [
        f"{name}: {one['examples']} examples in format {one['format']}{in_an_epoch(one['times'])}; "
        f"{learned[name] / sum(learned.values()):.1%} of the learned tokens."
        for name, one in datasets.items()
    ]


def ending(results: Mapping[str, Any], last: int | None, total: int) -> list[str]:
    """What the evaluations decided of a run that is complete, or left to be decided, in sentences.

    Args:
        results: those of its record.
        last: the step that it came to.
        total: its steps.
    """
    said = []
    if last is not None and last < total:
        so_often = f"{results['not_lower']} checkpoint(s)"
        said.append(f"It ended after step {last} of {total}: the evaluation loss was not lower at {so_often}.")
    best = results.get("best")
    if "result_step" in results:
        said.append(f"The result is of step {results['result_step']}, whose evaluation loss was the lowest.")
    elif best is not None and (after := results["eval_after"]) is not None and best["eval_loss"] < after:
        lower = f"{best['eval_loss']:.4f}, after step {best['step']}"
        said.append(f"The evaluation loss was lower, {lower}: that checkpoint is kept as checkpoints/best.")
    return said


def written_otherwise(divided: int, shortened: int) -> list[str]:
    """What a chat template made of conversations, in sentences; nothing where it wrote them as they are.

    Args:
        divided, shortened: see `qlora_core.training.dataset.DataReport`.
    """
    said = []
    if divided:
        said.append(
            f"{divided} conversations became an example for each answer: the chat template writes an answer otherwise "
            "once another turn follows."
        )
    if shortened:
        said.append(f"{shortened} examples lack a part of an answer, or its tools: the chat template leaves it out.")
    return said
