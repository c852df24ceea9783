"""How good one system's answers are in percent of another's, by a judge: the measure of the QLoRA paper's tables.

Dettmers et al. 2023, "QLoRA", section 5.2: a judge gives both answers to a question a score out of ten, once with
either first, since judges favour the answer that they see first; a system's score is its part of the other's, and the
mean of both orders is reported, with its 95 % confidence interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clusters.errors import RunFailed
from qlora_core.bootstrap import Interval, interval

Judge = Callable[[str, str, str], tuple[float, float]]
"""From a question, the first answer and the second to a score of each: numbers from 0 on, more is better."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What two systems answered to one question."""

    question: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """The scores of one pair, in both orders.

    Attributes:
        shown_first: of the first system and the second, where the first system's answer was shown first.
        shown_second: of the same two, where it was shown second.
    """

    shown_first: tuple[float, float]
    shown_second: tuple[float, float]


@dataclass(frozen=True, slots=True)
class RelativeScore:
    """The first system's score in percent of the second's.

    Attributes:
        shown_first, shown_second: where its answers were shown first, and second.
        mean: of both orders.
        wins, ties, losses: questions by the sum of both orders' scores.
    """

    shown_first: Interval
    shown_second: Interval
    mean: Interval
    wins: int
    ties: int
    losses: int


def judge_both_orders(pairs: Sequence[Pair], judge: Judge) -> list[Judgement]:
    """The judgements of all pairs.

    Raises:
        RunFailed: the judge failed, or gave something else than two scores.
    """
    judgements = []
    for number, pair in enumerate(pairs, start=1):
        first = scores(judge, pair.question, pair.first, pair.second, number)
        second = scores(judge, pair.question, pair.second, pair.first, number)
        judgements.append(Judgement(first, (second[1], second[0])))
    return judgements


def scores(judge: Judge, question: str, first: str, second: str, number: int) -> tuple[float, float]:
    """What the judge says of two answers, checked. See `judge_both_orders`."""
    remedy = "It takes (question, first answer, second answer) and returns two numbers from 0 on."
    try:
        given = judge(question, first, second)
    except Exception as error:  # it is not our code: whatever it raises is told, and not a defect of ours
        raise RunFailed(
            f"The judge failed at question {number} with {type(error).__name__}: {error}.", remedy
        ) from error
    try:
        one, other = (float(value) for value in given)
    except (TypeError, ValueError):
        raise RunFailed(f"The judge returned {given!r} for question {number}.", remedy) from None
    if not (math.isfinite(one) and math.isfinite(other) and one >= 0 and other >= 0):
        raise RunFailed(f"The judge returned {given!r} for question {number}.", remedy)
    return one, other


def relative_score(judgements: Sequence[Judgement]) -> RelativeScore:
    """The first system's score in percent of the second's, over all questions.

    Raises:
        RunFailed: the second system was never given a point.
    """
    columns = [
        [judgement.shown_first[0] for judgement in judgements],
        [judgement.shown_first[1] for judgement in judgements],
        [judgement.shown_second[0] for judgement in judgements],
        [judgement.shown_second[1] for judgement in judgements],
    ]
    if not (sum(columns[1]) and sum(columns[3])):
        raise RunFailed("The second system's answers were given no point.", "Nothing can be a part of that.")
    differences = [sum(row[0::2]) - sum(row[1::2]) for row in zip(*columns, strict=True)]
    return RelativeScore(
        shown_first=interval(columns[:2], lambda sums: 100 * sums[0] / sums[1]),
        shown_second=interval(columns[2:], lambda sums: 100 * sums[0] / sums[1]),
        mean=interval(columns, lambda sums: 50 * (sums[0] / sums[1] + sums[2] / sums[3])),
        wins=sum(difference > 0 for difference in differences),
        ties=sum(difference == 0 for difference in differences),
        losses=sum(difference < 0 for difference in differences),
    )
