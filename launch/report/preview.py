"""What the data becomes, before anything is trained on it: counts, lengths, and samples with what is learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from orchestrator.prepare import Prepared
from qlora_core.training.dataset import DataReport
from qlora_core.training.examples import Encoded

SAMPLES = 2
BINS = 10
BAR = 40
"""Columns of the longest bar."""
MARKS = "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}", "\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}"
"""What stands around learned tokens, for eyes and terminals that see no colour."""


def data_words(data: DataReport, seq_len: int) -> str:
    """What became of the data, as clauses."""
    cut = [f"{data.truncated} cut off at {seq_len} tokens"] if data.truncated else []
    clauses = [f"{data.examples} examples in format {data.format}", f"the longest {data.longest} tokens"]
    return ", ".join([*clauses, *cut, *data.left_out()])


def print_preview(console: Console, prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> None:
    """The counts, a histogram of lengths, and the first samples; special tokens are shown as they are."""
    data, train = prepared.data, prepared.train
    console.print(f"Data: {data_words(data, prepared.spec.recipe.seq_len)}.", highlight=False)
    if data.found:
        console.print(f"Format {data.format}, since {data.found}.", highlight=False)
    for line in data.bad_records:
        console.print(f"  left out: {line}", highlight=False, markup=False)
    share = data.learned / data.tokens
    console.print(f"{data.learned:,} of {data.tokens:,} tokens are learned ({share:.0%}).\n", highlight=False)
    console.print(histogram([len(example.ids) for example in train]))
    console.print(f"\nWhat is learned stands between {MARKS[0]} and {MARKS[1]}.", highlight=False)
    for number, example in enumerate(train[:SAMPLES], start=1):
        learned = sum(example.learned)
        console.print(f"\nSample {number}: {len(example.ids)} tokens, {learned} of them learned", highlight=False)
        console.print(Text.assemble(*marked(example, tokenizer)))


def marked(example: Encoded, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, str]]:
    """The text of an example in pieces, each with a style: what is learned, and what is not."""
    for learned, run in groupby(zip(example.ids, example.learned, strict=True), key=lambda pair: pair[1]):
        text = str(tokenizer.decode([token for token, _ in run], skip_special_tokens=False))
        yield (f"{MARKS[0]}{text}{MARKS[1]}", "bold green") if learned else (text, "")


def histogram(lengths: Sequence[int]) -> Table:
    """How many training examples have so many tokens, in at most BINS classes of the same width."""
    width = -(-max(lengths) // BINS)
    counts = count(((length - 1) // width for length in lengths), -(-max(lengths) // width))
    table = Table("tokens", "examples", "", box=None, header_style="italic", pad_edge=False)
    table.columns[0].justify = table.columns[1].justify = "right"
    for place, found in enumerate(counts):
        bar = "#" * -(-BAR * found // max(counts))
        table.add_row(f"{place * width + 1}-{(place + 1) * width}", str(found), bar)
    return table


def count(places: Iterable[int], classes: int) -> list[int]:
    """How many of `places` are in each of so many classes."""
    counts = [0] * classes
    for place in places:
        counts[place] += 1
    return counts
