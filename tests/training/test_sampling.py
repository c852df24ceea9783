"""Order: the same examples in every step, whatever the number of workers or the micro-batch."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from qlora_core.recipe import Recipe
from qlora_core.training.dataset.tokens import Encoded, save_examples
from qlora_core.training.examples import Examples, Rows
from qlora_core.training.sampling import Order, micro_batches, split_eval

SHAPES = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4, 8]))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    per_step=st.integers(1, 20),
    seed=st.integers(0, 5),
    grouped=st.booleans(),
)
def test_each_epoch_sees_every_row_once(lengths: list[int], per_step: int, seed: int, grouped: bool) -> None:
    order, rows = Order(lengths, per_step, seed, grouped), len(lengths)
    seen = [row for step in range(-(-rows * 2 // per_step)) for row in order.step(step)]
    assert sorted(seen[:rows]) == list(range(rows))
    assert sorted(seen[rows : 2 * rows]) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(Order([1] * 30, 5, seed).epoch(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_grouped_by_length_a_step_is_of_alike_rows_and_the_long_ones_come_at_any_time() -> None:
    lengths = [random.Random(row).randint(1, 1000) for row in range(512)]  # within one megabatch
    order = Order(lengths, 16, seed=0, grouped=True)
    steps = [[lengths[row] for row in order.step(step)] for step in range(32)]
    padding = sum(max(step) * 16 - sum(step) for step in steps) / sum(max(step) * 16 for step in steps)
    assert padding < 0.05  # a sixteenth of 32 evenly spread lengths lies between one step's shortest and longest
    assert [max(step) for step in steps] != sorted((max(step) for step in steps), reverse=True)


def test_a_run_s_steps_are_of_alike_rows_where_its_recipe_groups_by_length(tmp_path: Path) -> None:
    lengths = [*range(1, 65)]
    random.Random(0).shuffle(lengths)
    save_examples([Encoded([1] * n, [True] * n) for n in lengths], tmp_path / "x.safetensors")
    spreads = {}
    for grouped in (True, False):
        recipe = Recipe(group_by_length=grouped, seq_len=64, tokens_per_step=8 * 64)
        rows = Rows(Examples(tmp_path / "x.safetensors"), recipe, seed=0)
        steps = [[rows.lengths[row] for row in rows.order.step(step)] for step in range(8)]
        spreads[grouped] = [max(step) - min(step) for step in steps]
    assert spreads[True] == [7] * 8  # 1 to 64 in eights: each step has eight lengths that follow each other
    assert min(spreads[False]) > 7


@given(shape=SHAPES, lengths=st.lists(st.integers(1, 100), min_size=32, max_size=32))
def test_workers_and_micro_batches_share_a_step_out_without_changing_it(
    shape: tuple[int, int], lengths: list[int]
) -> None:
    world_size, micro_batch = shape
    by_rank = [
        micro_batches(range(32), lengths, rank=rank, world_size=world_size, micro_batch=micro_batch)
        for rank in range(world_size)
    ]
    assert sorted(index for batches in by_rank for batch in batches for index in batch) == list(range(32))
    assert {len(batches) for batches in by_rank} == {32 // (world_size * micro_batch)}
    # the longest example comes first, so the step's memory peak is met at once
    assert max(lengths[index] for batches in by_rank for index in batches[0]) == max(lengths)


@given(examples=st.integers(2, 300), fraction=st.floats(0.001, 0.99), seed=st.integers(0, 3))
def test_a_split_loses_nothing_and_leaves_nothing_empty(examples: int, fraction: float, seed: int) -> None:
    train, held_out = split_eval(range(examples), fraction, seed)
    assert sorted(train + held_out) == list(range(examples))
    assert train
    assert held_out


@given(
    sizes=st.lists(st.integers(1, 4), min_size=2, max_size=50), fraction=st.floats(0.01, 0.99), seed=st.integers(0, 3)
)
def test_the_examples_of_one_record_are_held_out_together(sizes: list[int], fraction: float, seed: int) -> None:
    records = [number for number, size in enumerate(sizes) for _ in range(size)]
    train, held_out = split_eval(records, fraction, seed)
    assert sorted(train + held_out) == list(range(len(records)))
    trained, tried = {records[index] for index in train}, {records[index] for index in held_out}
    assert trained
    assert tried
    assert not trained & tried


def test_no_fraction_and_a_single_example_hold_nothing_out() -> None:
    assert split_eval(range(10), 0.0, 0) == (list(range(10)), [])
    assert split_eval(range(1), 0.5, 0) == ([0], [])
    assert split_eval([0, 0, 0], 0.5, 0) == ([0, 1, 2], [])
