"""Several datasets learned from together: one after the other in memory, some more often in an epoch than others."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace

from qlora_core.training.dataset.report import SHOWN_PROBLEMS, DataReport
from qlora_core.training.dataset.tokens import EncodedExamples
from qlora_core.training.sampling import repeated, split_eval


def together(datasets: Sequence[EncodedExamples]) -> EncodedExamples:
    """All examples of whole datasets, in their order."""
    first, *others = datasets
    if not others:
        return first
    ids, learned, starts, places = array("i"), bytearray(), array("q", [0]), bytearray()
    for one in datasets:
        before = len(ids)
        ids += one.ids
        learned += one.learned
        places += one.places
        starts.extend(before + start for start in one.starts[1:])
    return EncodedExamples(ids, learned, starts, places)


def divide(
    datasets: Sequence[tuple[EncodedExamples, DataReport]], eval_fraction: float, seed: int
) -> tuple[EncodedExamples, EncodedExamples]:
    """The examples of an epoch, each dataset's so often as its report says, and those held out of each by its records.

    Args:
        datasets: whole ones.
    """
    train, held_out, before = array("q"), array("q"), 0
    for number, (one, report) in enumerate(datasets):
        learned, out = split_eval(one.records(), eval_fraction, seed)
        train.extend(before + at for at in repeated(learned, report.times, f"times/{seed}/{number}"))
        held_out.extend(before + at for at in out)
        before += len(one)
    whole = together([examples for examples, _ in datasets])
    return whole.select(train), whole.select(held_out)


def combined(reports: Sequence[DataReport]) -> DataReport:
    """What became of several datasets as of one, before they are repeated; its digest says how often they are."""
    first, *others = reports
    digest = "; ".join(report.digest + ("" if report.times == 1 else f" x{report.times:g}") for report in reports)
    if not others:
        return replace(first, digest=digest)

    def words(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(value for value in values if value))

    return DataReport(
        format=words(report.format for report in reports),
        examples=sum(report.examples for report in reports),
        truncated=sum(report.truncated for report in reports),
        unlearnable=sum(report.unlearnable for report in reports),
        longest=max(report.longest for report in reports),
        tokens=sum(report.tokens for report in reports),
        digest=digest,
        token_digest="; ".join(report.token_digest for report in reports),
        source=words(report.source for report in reports),
        learn=words(report.learn for report in reports),
        layout=words(report.layout for report in reports),
        learned=sum(report.learned for report in reports),
        unread=tuple(dict.fromkeys(column for report in reports for column in report.unread)),
        in_pieces=sum(report.in_pieces for report in reports),
        divided=sum(report.divided for report in reports),
        shortened=sum(report.shortened for report in reports),
        empty_answers=sum(report.empty_answers for report in reports),
        masked=sum(report.masked for report in reports),
        bad=sum(report.bad for report in reports),
        bad_records=tuple(bad for report in reports for bad in report.bad_records)[:SHOWN_PROBLEMS],
    )
