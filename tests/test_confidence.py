"""How sure a verdict is: intervals that hold the next run as often as they say, and a ledger that corrects."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from clusters.gpu import find_gpu
from orchestrator.confidence import ENOUGH_RUNS, chance_below, confidence, conformal
from orchestrator.devices import gpu_target
from orchestrator.history import History, MeasuredRun, RanOut
from orchestrator.plans import Target
from orchestrator.verdicts import verdict
from qlora_core.catalogue import find_model
from qlora_core.memory import played
from qlora_core.memory.estimate import Estimate
from qlora_core.memory.formula import estimate
from qlora_core.recipe import Method, Recipe
from qlora_core.step_time import StepTime, Times
from qlora_core.strategy import Strategy

GIB = 1024**3
L4 = gpu_target(find_gpu("l4"), "auto")


def needing(low: float, reserved: float, high: float) -> Estimate:
    """An estimate of these reserved bytes."""
    any_ = estimate(find_model("tinyllama-1.1b"), Recipe(), Strategy(), L4.device)
    gpu = any_.gpu._replace(
        reserved_bytes=round(reserved), reserved_interval=(round(low), round(high)), allocated_bytes=0
    )
    return any_._replace(gpu=gpu)


# --- what runs measured -----------------------------------------------------------------------------------------------

ROUNDS = 2000
DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "normal": lambda chance: chance.gauss(1.02, 0.03),
    "skewed": lambda chance: 0.97 + chance.lognormvariate(-4, 1),
    "two kinds of runs": lambda chance: chance.gauss(0.98, 0.004) if chance.random() < 0.8 else chance.gauss(1.2, 0.01),
    "heavy tails": lambda chance: 1 + 0.01 * chance.gauss(0, 1) / max(1e-9, abs(chance.gauss(0, 1))),
    "rounded, so that many are the same": lambda chance: round(chance.gauss(1, 0.02), 2),
}


@pytest.mark.parametrize("runs", [19, 20, 50, 200])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_next_run_is_in_the_interval_in_nine_of_ten_cases_whatever_the_distribution(
    distribution: str, runs: int
) -> None:
    draw, chance = DISTRIBUTIONS[distribution], random.Random(f"{distribution} {runs}")
    below = above = 0
    for _ in range(ROUNDS):
        low, high = conformal([draw(chance) for _ in range(runs)])
        measured = draw(chance)
        below += measured < low
        above += measured > high
    # 1 in 20 at each end, and three standard errors of 2000 rounds: 3 sqrt(0.05 x 0.95 / 2000) = 0.0146
    assert below / ROUNDS <= 0.05 + 0.0146
    assert above / ROUNDS <= 0.05 + 0.0146
    if not distribution.startswith("rounded"):
        # No wider than it has to be. Of 50 the second is taken: a chance of 2 in 51 at each end is the least of these.
        assert (below + above) / ROUNDS >= 2 * 2 / 51 - 3 * (0.0784 * 0.9216 / ROUNDS) ** 0.5


def test_the_bounds_are_the_ratios_of_which_one_in_twenty_lie_outside() -> None:
    ratios = [1 + number / 1000 for number in range(1, 20)]
    assert conformal(ratios[::-1]) == (1.001, 1.019)  # the least and the most of 19: 1 / (19 + 1) each
    ratios = [1 + number / 1000 for number in range(1, 40)]
    assert conformal(ratios) == (1.002, 1.038)  # the second of 39: 2 / (39 + 1)


def test_too_few_runs_are_refused_an_interval() -> None:
    assert ENOUGH_RUNS == 19
    with pytest.raises(ValueError, match="18 ratios are too few"):
        conformal([1.0] * 18)


def test_enough_runs_make_the_interval() -> None:
    # 10 GiB predicted; of 19 runs the least had 0.9 of it, the median 1.0 and the most 1.1; the context is 1 GiB
    ratios = [0.9 + number / 90 for number in range(19)]
    sure = confidence(needing(9.9 * GIB, 10 * GIB, 10.1 * GIB), GIB, 11 * GIB, ratios)
    assert sure.low_bytes == pytest.approx(10 * GIB, abs=2)
    assert sure.high_bytes == pytest.approx(12 * GIB, abs=2)
    assert sure.expected_bytes == pytest.approx(11 * GIB, abs=2)
    assert sure.chance == pytest.approx(0.5)
    assert sure.basis == "19 comparable runs"


@pytest.mark.parametrize("runs", [0, 1, 18])
def test_with_fewer_the_interval_is_the_estimator_s_own_and_that_is_said(runs: int) -> None:
    sure = confidence(needing(9 * GIB, 10 * GIB, 12 * GIB), GIB, 11 * GIB, [3.0] * runs)
    assert (sure.low_bytes, sure.high_bytes) == (10 * GIB, 13 * GIB)
    assert sure.chance == 0.5
    assert sure.basis.startswith("the estimator's own spread (formula)")
    assert ("too few" in sure.basis) == (runs > 0)
    if runs:
        assert f"{runs} comparable run" in sure.basis
        assert "19 are enough" in sure.basis


# --- chances ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usable", "chance"),
    [
        (0, 0.05),
        (99, 0.05),
        (100, 0.05),
        (110, 0.275),  # half way between 1 and 10 of 20
        (120, 0.5),
        (140, 0.6125),  # a quarter of the way from 10 to 19 of 20
        (160, 0.725),
        (200, 0.95),
        (10**6, 0.95),
    ],
)
def test_the_chance_to_fit_is_linear_between_the_bounds_and_nothing_is_known_beyond(usable: int, chance: float) -> None:
    assert chance_below(usable, 100, 120, 200) == pytest.approx(chance)


def test_where_all_runs_measured_the_same_there_is_nothing_between() -> None:
    chances = [chance_below(usable, 100, 100, 100) for usable in (99, 100, 101)]
    assert chances == pytest.approx([0.05, 0.95, 0.95])


def test_more_room_is_never_less_sure() -> None:
    chances = [round(chance_below(usable, 100, 120, 200), 12) for usable in range(90, 210)]
    assert chances == sorted(chances)


# --- the ledger -------------------------------------------------------------------------------------------------------


def run(
    time: float | None = None,
    memory: float | None = None,
    *,
    device: str = "cuda",
    gpu: str = "l4",
    method: Method = "qlora",
    sharded: bool = False,
) -> MeasuredRun:
    return MeasuredRun(device, gpu, method, sharded, memory, time)


STEP = StepTime(
    seconds=10.0, low=8.0, high=14.0, parts=Times(4.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5), tokens=8192, floor=6.0
)


def test_without_a_run_on_that_device_a_time_stays_as_it_is() -> None:
    elsewhere = History((run(2.0, gpu="a100-80gb"), run(2.0, gpu="cpu", device="cpu"), run(None)))
    assert elsewhere.corrected(STEP, L4) == STEP


def test_a_few_runs_move_a_time_by_their_median() -> None:
    # one straggler among three: 1.2, 1.3 and 9 times what was predicted
    moved = History((run(9.0), run(1.2), run(1.3))).corrected(STEP, L4)
    assert moved.seconds == pytest.approx(13.0)
    assert (moved.low, moved.high) == pytest.approx((8 * 1.3, 14 * 1.3))
    assert sum(moved.parts) == pytest.approx(13.0)
    assert (moved.correction, moved.runs, moved.tokens) == (1.3, 3, 8192)


def test_enough_runs_make_the_interval_of_a_time() -> None:
    # of 19 runs the least took 1.1 and the most 1.28 of what was predicted, and the median 1.19
    moved = History(tuple(run(1.1 + number / 100) for number in range(19))).corrected(STEP, L4)
    assert moved.seconds == pytest.approx(11.9)
    assert (moved.low, moved.high) == pytest.approx((11.0, 12.8))


def test_a_pool_s_runs_are_those_on_its_kind_of_gpu() -> None:
    assert L4.pool is not None
    pool: Target = dataclasses.replace(L4, name="small", pool=dataclasses.replace(L4.pool, name="small"))
    assert History((run(1.5),)).corrected(STEP, pool).seconds == pytest.approx(15.0)


def test_a_plan_that_ran_out_leaves_less_room_for_the_same_run_in_proportion_to_what_was_free() -> None:
    recipe = json.loads(json.dumps({**Recipe().to_json(), "compute_dtype": L4.compute_dtype}))
    usable = L4.usable_bytes
    history = History(ran_out=(RanOut("l4", "llama-7b", recipe, 20 * 10**9, usable),))
    assert history.room(L4, "llama-7b", Recipe()) == 18 * 10**9
    assert history.room(dataclasses.replace(L4, usable_bytes=usable // 2), "llama-7b", Recipe()) == pytest.approx(
        9 * 10**9, rel=1e-6
    )
    assert history.room(L4, "llama-13b", Recipe()) is None
    assert history.room(L4, "llama-7b", Recipe(rank=8)) is None
    assert history.room(dataclasses.replace(L4, name="t4"), "llama-7b", Recipe()) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 32.0},
        {"use_rslora": True},
        {"learning_rate": 1e-4},
        {"schedule": "cosine", "warmup_fraction": 0.1},
        {"weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95},
        {"max_grad_norm": 1.0},
        {"epochs": 3.0},
        {"steps": 100},
    ],
)
def test_nor_is_there_more_room_for_what_takes_as_much(changes: dict[str, Any]) -> None:
    recipe, strategy, other = Recipe(), Strategy(), Recipe(**changes)
    model = find_model("llama-2-7b")
    needed, needs = (estimate(model, each, strategy, L4.device) for each in (recipe, other))
    assert needs == needed  # what the memory model says is what decides
    as_recorded = json.loads(json.dumps({**recipe.to_json(), "compute_dtype": L4.compute_dtype}))
    history = History(ran_out=(RanOut("l4", "llama-7b", as_recorded, 20 * 10**9, L4.usable_bytes),))
    assert history.room(L4, "llama-7b", other) == 18 * 10**9


@pytest.mark.parametrize("changes", [{"seq_len": 1024}, {"dropout": 0.1}, {"optimizer": "adamw_8bit"}])
def test_of_what_may_take_another_amount_nothing_is_known(changes: dict[str, Any]) -> None:
    recipe = json.loads(json.dumps({**Recipe().to_json(), "compute_dtype": L4.compute_dtype}))
    history = History(ran_out=(RanOut("l4", "llama-7b", recipe, 20 * 10**9, L4.usable_bytes),))
    assert history.room(L4, "llama-7b", Recipe(**changes)) is None


def test_memory_is_compared_with_runs_of_the_same_method_and_device_divided_or_not() -> None:
    runs = (
        run(memory=1.01),
        run(memory=1.02, gpu="a100-80gb"),  # another GPU: the allocator is the same
        run(memory=1.3, method="full"),
        run(memory=1.4, sharded=True),
        run(memory=1.5, device="cpu"),
        run(memory=None),
    )
    history = History(runs)
    assert history.memory_ratios(L4, Recipe(), Strategy()) == [1.01, 1.02]
    assert history.memory_ratios(L4, Recipe(), Strategy(zero_stage=2)) == [1.4]
    assert history.memory_ratios(L4, Recipe(method="full", quantization="none"), Strategy()) == [1.3]


def test_what_runs_measured_corrects_the_formula_which_planned_them_and_no_other_estimator() -> None:
    history = History(tuple(run(memory=1.1) for _ in range(ENOUGH_RUNS)))
    bases = {}
    for name, estimator in (("formula", estimate), ("played", played.estimate)):
        needed = estimator(find_model("llama-7b"), Recipe(), Strategy(), L4.device)
        answer = verdict(find_model("llama-7b"), Recipe(), Strategy(), L4, needed, history)
        bases[name] = answer.confidence.basis
    assert bases == {"formula": "19 comparable runs", "played": "the estimator's own spread (played)"}
