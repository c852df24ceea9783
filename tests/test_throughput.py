"""Published training speeds beside their predictions; docs/step-time.md is made of the same numbers."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from benchmarks.accuracy import plots, step_time_page
from benchmarks.accuracy.shapes import architecture_named
from benchmarks.accuracy.stacks import stack_of
from benchmarks.accuracy.throughput import listed, request_of, seconds_of, throughput_rows, timed


def test_every_row_is_predicted_or_listed_with_a_reason() -> None:
    ids = [row["id"] for row in throughput_rows()]
    assert len(ids) == len(set(ids)) == 122
    assert sorted(ids) == sorted([*(one.row["id"] for one in timed()), *(one.row["id"] for one in listed())])
    assert {one.kind for one in listed()} == {"other sharding system", "other kernels", "does not state enough"}
    assert len(timed()) == 57


def test_seven_of_ten_lie_inside_the_interval_and_the_median_error_is_at_most_a_fifth() -> None:
    assert sum(one.inside for one in timed()) >= 0.7 * len(timed())
    assert median(abs(one.error) for one in timed()) <= 20


def test_every_stack_with_rows_outside_says_why() -> None:
    assert {one.stack.name for one in timed() if not one.inside} == set(step_time_page.FAR)


@pytest.mark.parametrize(
    ("row_id", "seconds"),
    [
        # 0.0588 s a step as stated
        ("mlengineering-llama-3.2-1b-full-512", 0.0588),
        # 1024 samples in 875 s, a step of two GPUs is 16 of them
        ("answerai-2x3090-llama2-7b-qlora-2048-b8-ddp", 875 / 1024 * 16),
        # 2295 tokens/s, a step is four micro-batches of 1024
        ("llamafactory-7b-a100-flash_attention_2-1024", 4 * 1024 / 2295),
    ],
)
def test_a_rows_figure_is_the_time_of_an_optimizer_step(row_id: str, seconds: float) -> None:
    [measured] = [one.measured for one in timed() if one.row["id"] == row_id]
    assert measured == pytest.approx(seconds, rel=1e-3)


def test_the_first_qwens_have_one_layer_for_query_key_and_value() -> None:
    architecture = architecture_named("qwen-7b")
    assert architecture is not None
    names = [linear.name for linear in architecture.linears]
    assert names == ["c_attn", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert architecture.linears[0].weight_numel == 4096 * 3 * 4096


def test_a_row_that_is_silent_gets_its_stacks_defaults() -> None:
    [row] = [row for row in throughput_rows() if row["id"] == "qwen-72b-lora-1024"]
    stack = stack_of(row["id"])
    assert stack is not None
    asked = request_of(row, stack)
    assert asked.strategy.gradient_checkpointing
    assert asked.strategy.zero_stage == 3
    assert asked.strategy.sequences_per_step == 4 * 8
    assert seconds_of(row, asked.strategy) == 29.4


def test_the_page_is_what_the_command_writes() -> None:
    assert step_time_page.DOCUMENT.read_text() == step_time_page.render(), "run `make accuracy`"


def test_the_plot_is_what_the_command_draws(tmp_path: Path) -> None:
    plots.draw_times(tmp_path)
    [drawn] = tmp_path.iterdir()
    assert drawn.read_bytes() == (step_time_page.PLOTS / drawn.name).read_bytes()
