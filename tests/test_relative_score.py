"""The relative score of two systems and how sure it is, against what is counted by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.errors import RunFailed
from qlora_core.bootstrap import interval
from qlora_core.relative_score import Judgement, Pair, judge_both_orders, relative_score


def test_each_order_is_a_part_of_the_others_sum_and_the_mean_is_that_of_both_orders() -> None:
    score = relative_score([Judgement((8, 10), (9, 9)), Judgement((10, 8), (6, 10)), Judgement((6, 6), (6, 6))])
    assert score.shown_first.value == pytest.approx(100 * 24 / 24)
    assert score.shown_second.value == pytest.approx(100 * 21 / 25)
    assert score.mean.value == pytest.approx((100 + 84) / 2)
    assert (score.wins, score.ties, score.losses) == (0, 1, 2)  # 17 to 19, 16 to 18, 12 to 12


def test_a_judge_that_favours_what_it_sees_first_is_averaged_out() -> None:
    def favours_the_first(question: str, first: str, second: str) -> tuple[float, float]:
        return len(first) + 2, len(second)

    pairs = [Pair("?", "abcd", "efgh"), Pair("?", "ij", "kl")]
    judgements = judge_both_orders(pairs, favours_the_first)
    assert judgements == [Judgement((6, 4), (4, 6)), Judgement((4, 2), (2, 4))]
    score = relative_score(judgements)
    assert score.shown_first.value == pytest.approx(100 * 10 / 6)
    assert score.shown_second.value == pytest.approx(100 * 6 / 10)
    assert (score.wins, score.ties, score.losses) == (0, 2, 0)


def test_the_same_answers_are_100_percent_of_each_other_with_certainty() -> None:
    mean = relative_score([Judgement((value, value), (value, value)) for value in (3, 7, 10)]).mean
    assert (mean.value, mean.low, mean.high) == (100, 100, 100)


def test_of_two_examples_the_interval_is_that_of_the_four_draws_there_are() -> None:
    # 1 and 1, 1 and 3, 3 and 1, 3 and 3: the mean is 1 or 3 with probability a quarter each, far above 2.5 %
    found = interval([[1.0, 3.0], [1.0, 1.0]], lambda sums: sums[0] / sums[1])
    assert (found.value, found.low, found.high) == (2, 1, 3)
    alone = interval([[1.0], [1.0]], lambda sums: sums[0] / sums[1])
    assert (alone.value, alone.low, alone.high) == (1, None, None)


def test_of_many_examples_the_interval_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(5, 2, size=900)
    found = interval([list(values), [1.0] * 900], lambda sums: sums[0] / sums[1])
    half = 1.96 * values.std() / math.sqrt(900)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


@given(st.lists(st.tuples(*[st.floats(1, 10)] * 4), min_size=2, max_size=20))
def test_the_mean_lies_between_both_orders_and_within_its_interval(rows: list[tuple[float, ...]]) -> None:
    score = relative_score([Judgement(row[:2], row[2:]) for row in rows])  # type: ignore[arg-type]
    low, high = sorted((score.shown_first.value, score.shown_second.value))
    assert low - 1e-9 <= score.mean.value <= high + 1e-9
    assert score.mean.low is not None
    assert score.mean.high is not None
    assert score.mean.low - 1e-9 <= score.mean.value <= score.mean.high + 1e-9


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (None, "returned None for question 1"),
        ((1, 2, 3), "returned (1, 2, 3)"),
        ((1, -1), "returned (1, -1)"),
        ((1, math.nan), "returned (1, nan)"),
        (("ten", 1), "returned ('ten', 1)"),
    ],
)
def test_what_is_no_pair_of_scores_is_told_with_the_question(answer: object, shown: str) -> None:
    with pytest.raises(RunFailed, match=re.escape(shown)):
        judge_both_orders([Pair("?", "a", "b")], lambda *_: answer)  # type: ignore[arg-type]


def test_a_judge_that_fails_is_told_and_points_for_nobody_are_no_measure() -> None:
    def fails(*_: str) -> tuple[float, float]:
        raise KeyError("no key for the service")

    with pytest.raises(RunFailed, match=r"failed at question 1 with KeyError: 'no key for the service'"):
        judge_both_orders([Pair("?", "a", "b")], fails)
    with pytest.raises(RunFailed, match="were given no point"):
        relative_score([Judgement((1, 0), (1, 0))])
