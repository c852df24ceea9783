"""What a run would learn from: the data's counts, the lengths of its examples, and some of them token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from launch.report.terminal import Bar
from launch.report.words import mixture, visible, written_otherwise
from qlora_core.data import in_an_epoch
from qlora_core.training import layout
from qlora_core.training.dataset import DataReport
from qlora_core.training.dataset.tokens import Encoded
from qlora_core.training.shown import chosen, with_loss

BINS = 10
SHOWN_TOKENS = 60
"""Of a run of tokens that are all learned, or all not; its middle is left out."""
LEARN_WORDS = {"assistant": "the answers", "completion": "the last answer", "all": "all tokens"}


def print_preview(
    console: Console,
    reports: Mapping[str, DataReport],
    evaluated: Sequence[DataReport],
    examples: Sequence[Encoded],
    lengths: Sequence[int],
    seq_len: int,
    tokenizer: Any,
) -> None:
    """Print each dataset's counts, a histogram of the lengths, and samples from beginning, middle and end.

    Args:
        reports: of what is learned, by name.
        evaluated: of what is evaluated on, where it is other data; it has its counts alone.
        examples: those that are learned.
    """
    tables = [counts(report, seq_len) for report in reports.values()]
    if len(tables) > 1:
        shares = mixture({name: asdict(report) for name, report in reports.items()})
        tables = [part for said, table in zip(shares, tables, strict=True) for part in (Text(said), table, Text())]
    others = [part for report in evaluated for part in (Text("\nEvaluated on"), counts(report, seq_len))]
    console.print(Group(*tables, histogram(lengths), *others), highlight=False, markup=False, emoji=False)
    console.print(
        "\n+ is learned; - is not, its label is -100. | stands between tokens.", highlight=False, markup=False
    )
    for index in chosen(len(examples)):
        example = examples[index]
        flags = with_loss(example)
        heading = f"\nExample {index + 1} of {len(examples)}: {len(flags)} tokens, {sum(flags)} learned"
        console.print(heading, highlight=False, markup=False)
        for line in lines_of(example.ids, flags, lambda token: tokenizer.decode([token])):
            console.print(Padding(line, (0, 0, 0, 2)), highlight=False, markup=False, emoji=False)


def counts(report: DataReport, seq_len: int) -> RenderableType:
    """What was found in a dataset, and what became of it."""
    table = Table.grid(padding=(0, 2))
    rows = [
        ("data", report.source + in_an_epoch(report.times)),
        ("format", report.format + (f": {report.found}" if report.found else "")),
        ("not read", ", ".join(report.unread)),
        ("written with", report.layout),
        ("learned", f"{LEARN_WORDS[report.learn]}: {report.learned:,} of {report.tokens:,} tokens"),
        ("examples", f"{report.examples:,}, the longest {report.longest:,} tokens"),
        ("cut off", f"{report.truncated:,} at {seq_len:,} tokens"),
        ("in pieces", f"{report.in_pieces:,} texts longer than that" if report.in_pieces else ""),
        ("left out", ", ".join(report.left_out()).replace(" left out", "") or "none"),
        *(("", bad) for bad in report.bad_records),
        *(("chat template", said) for said in written_otherwise(report.divided, report.shortened)),
    ]
    for name, value in rows:
        if value:
            table.add_row(Text(name), Text(visible(value)))
    return table


def histogram(lengths: Sequence[int]) -> RenderableType:
    """How many examples are how long, in bins of one width."""
    width, bins = layout.histogram(lengths, BINS)
    table = Table(box=None, pad_edge=False, title="\nTokens of an example", title_justify="left", title_style="")
    table.add_column("tokens", justify="right")
    table.add_column("examples", justify="right")
    table.add_column("")
    for index, count in enumerate(bins):
        span = f"{index * width + 1:,} to {(index + 1) * width:,}" if width > 1 else f"{index + 1:,}"
        table.add_row(span, f"{count:,}", Bar(count / max(bins)))
    return table


def lines_of(ids: Sequence[int], flags: Sequence[bool], decode: Callable[[int], str]) -> Iterator[Text]:
    """A line for each run of tokens that are learned, or are not."""
    for learned, run in groupby(zip(ids, flags, strict=True), key=lambda pair: pair[1]):
        tokens = [visible(decode(token)) for token, _ in run]
        if (more := len(tokens) - SHOWN_TOKENS) > 0:
            half = SHOWN_TOKENS // 2
            tokens = [*tokens[:half], f"... {more} more ...", *tokens[-half:]]
        yield Text(f"{'+' if learned else '-'} {'|'.join(tokens)}", style="green" if learned else "dim")
