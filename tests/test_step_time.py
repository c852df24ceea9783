"""The time of a step: every term by hand from stated rates, and what must hold for all of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_core.catalogue import find_model
from qlora_core.memory.device import Device
from qlora_core.recipe import Recipe
from qlora_core.step_time import (
    MANAGED,
    MEMORY,
    NETWORK,
    SLOW,
    TYPICAL,
    UNSTATED_NETWORK,
    Achieved,
    Load,
    Range,
    Rates,
    StateLoad,
    StepTime,
    Times,
    by_capability,
    load,
    ring_seconds,
    step_time,
    times,
)
from qlora_core.strategy import Strategy

ALL = Range(1, 1, 1)
RATES = Rates(
    achieved=Achieved(products=Range(0.5, 0.8, 0.9), attention=Range(0.3, 0.5, 0.6)),
    flops=312e12,
    wide_flops=19.5e12,
    memory_bytes=2e12,
    pcie_bytes=32e9,
    link_bytes=300e9,
    link=Range(0.6, 0.8, 0.9),
    network_bytes=None,
    gpus_per_node=8,
)
A100 = Device(kind="cuda", compute_dtype="bfloat16", compute_capability=(8, 0))
PARAMETERS = 6_738_415_616  # Llama 2 7B, its model card's 6.74B
ADAPTERS = 32 * 64 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # rank 64 on all linear layers


def asked(**changes: Any) -> tuple[Recipe, Strategy]:
    """A recipe and a strategy of 16-bit LoRA, unless `changes` say otherwise."""
    names = Strategy.__dataclass_fields__
    strategy = Strategy(**{"paged_optimizer": False, **{k: v for k, v in changes.items() if k in names}})
    fields = {"method": "lora", "quantization": "none", **{k: v for k, v in changes.items() if k not in names}}
    length = fields.setdefault("seq_len", 512)
    return Recipe(**{**fields, "tokens_per_step": length * strategy.sequences_per_step}), strategy


def loaded(model: str = "llama-2-7b", **changes: Any) -> Load:
    return load(find_model(model), *asked(**changes), A100)


def state_of(model: str = "llama-2-7b", **changes: Any) -> StateLoad:
    return loaded(model, **changes).state


def timed(model: str = "llama-2-7b", rates: Rates = RATES, paged_out: int = 0, **changes: Any) -> StepTime:
    return step_time(find_model(model), *asked(**changes), A100, rates, paged_out)


# --- between GPUs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "part"), [(1, 0), (2, 1 / 2), (4, 3 / 4), (8, 7 / 8)])
def test_a_ring_passes_all_but_one_part_of_its_bytes(world: int, part: float) -> None:
    assert ring_seconds(world, RATES, TYPICAL) == pytest.approx(part / (300e9 * 0.8))


def test_between_nodes_the_slower_of_links_and_network_counts() -> None:
    assert ring_seconds(16, RATES, TYPICAL) == pytest.approx(1 / 2 / (UNSTATED_NETWORK * NETWORK.typical))
    fast = RATES._replace(network_bytes=400e9)
    assert ring_seconds(16, fast, TYPICAL) == pytest.approx(7 / 8 / (300e9 * 0.8))


def test_ddp_reduces_float32_gradients_once_a_step_in_two_passes_of_a_ring() -> None:
    said = state_of(world_size=4)
    assert (said.reduced_each, said.reduced, said.gathered) == (0, 2 * 4 * ADAPTERS, 0)
    assert state_of(world_size=1).reduced == 0


def test_zero_2_reduces_with_every_micro_batch_and_gathers_once() -> None:
    said = state_of(world_size=4, zero_stage=2)
    assert (said.reduced_each, said.reduced, said.gathered) == (4 * ADAPTERS, 4 * ADAPTERS, 0)


def test_zero_3_gathers_all_weights_forward_and_backward() -> None:
    said = state_of(world_size=4, zero_stage=3)
    assert (said.reduced_each, said.reduced) == (4 * ADAPTERS, 0)
    assert said.gathered == 2 * (2 * PARAMETERS + 4 * ADAPTERS)


def test_zero_3_gathers_weights_that_are_all_trained_no_more_often() -> None:
    assert state_of(method="full", world_size=4, zero_stage=3).gathered == 2 * 2 * PARAMETERS


def test_computing_hides_an_exchange_by_half_typically_and_not_at_all_at_worst() -> None:
    seconds = 2 * 4 * ADAPTERS * ring_seconds(2, RATES, SLOW)
    said, strategy = loaded(world_size=2), asked(world_size=2)[1]
    shape = 2, strategy.micro_batch, strategy.gradient_accumulation, 512
    assert times(said, *shape, RATES, SLOW).exchange == pytest.approx(seconds)
    typical = 2 * 4 * ADAPTERS * ring_seconds(2, RATES, TYPICAL)
    assert times(said, *shape, RATES, TYPICAL).exchange == pytest.approx(typical / 2)


def test_two_nodes_over_ten_gigabits_are_slower_than_one_node() -> None:
    together = RATES._replace(gpus_per_node=16)
    assert timed(world_size=16).seconds > timed(world_size=16, rates=together).seconds


# --- to the host, and the optimizer -----------------------------------------------------------------------------------


def test_the_roofline_is_what_the_nominal_rates_allow() -> None:
    computing = timed(micro_batch=8, seq_len=2048)
    products = 3 * 2 * (PARAMETERS - 2 * 32000 * 4096) * 8 * 2048  # a forward pass, its recomputation, one backward
    assert 1.0 < computing.floor / (products / 312e12) < 1.6  # the rest is attention, the head, adapters, what is moved
    assert computing.floor < computing.low
    # gradients in float32, over a network that is slower than all else: two nodes pass half of them twice
    network = RATES._replace(network_bytes=1e6)
    assert timed(world_size=16, rates=network).floor == pytest.approx(2 * 4 * ADAPTERS / 2 / 1e6, rel=0.01)
    # and what is paged out goes over PCIe twice
    extra = timed(paged_out=32 * 10**9).floor - timed().floor
    assert extra == pytest.approx(2.0, rel=0.01)


def test_what_is_paged_out_comes_in_and_goes_out_again() -> None:
    more = timed(paged_out=10**9).seconds - timed().seconds
    assert more == pytest.approx(2 * 1e9 / (32e9 * MANAGED.typical))


def test_an_offloaded_optimizer_sends_gradients_and_gets_weights_in_float32() -> None:
    said = state_of(world_size=2, zero_stage=2, offload="optimizer")
    assert said.to_host == ADAPTERS // 2 * (4 + 4)
    assert said.on_host == ADAPTERS // 2
    assert said.fetched == 0


def test_offloaded_weights_are_fetched_by_each_rank_forward_and_backward() -> None:
    said = state_of(world_size=2, zero_stage=3, offload="all")
    assert said.fetched == 2 * 2 * PARAMETERS // 2


@pytest.mark.parametrize(
    ("changes", "elements", "expected"),
    [
        # clipping moves a gradient three times; foreach AdamW moves 20 elements in 8 operators
        ({}, ADAPTERS, 4 * (20 + 3)),
        ({"lora_dtype": "bfloat16"}, ADAPTERS, 2 * (20 + 3)),
        ({"method": "full"}, PARAMETERS, 2 * (20 + 3)),
        # bitsandbytes: weight in and out, gradient in, two float32 moments in and out
        ({"paged_optimizer": True}, ADAPTERS, 3 * 4 + 4 * 4 + 3 * 4),
        # two moments of a byte
        ({"optimizer": "adamw_8bit"}, ADAPTERS, 3 * 4 + 4 + 3 * 4),
        ({"world_size": 2, "zero_stage": 1}, ADAPTERS // 2, 4 * (20 + 3)),
    ],
)
def test_adamw_moves_what_its_kernels_read_and_write(changes: dict[str, Any], elements: int, expected: int) -> None:
    assert state_of(**changes).optimizer_bytes == elements * expected


def test_adamw_on_a_b200_takes_what_was_measured() -> None:
    # ml-engineering's table for Llama 3.1 8B and Llama 3.2 1B: 637.3 - 590.7 ms and 58.8 - 48.8 ms, without clipping
    for model, measured in (("llama-3.1-8b", 0.0466), ("llama-3.2-1b", 0.0100)):
        said = state_of(model, method="full").optimizer_bytes * 20 / 23 / (7.7e12 * MEMORY.typical)
        assert said == pytest.approx(measured, rel=0.25)


def test_accumulated_gradients_are_added_to_those_before() -> None:
    one, two = timed(method="full"), timed(method="full", gradient_accumulation=2)
    added = 3 * 2 * PARAMETERS / (2e12 * MEMORY.typical)
    assert two.parts.memory == pytest.approx(2 * one.parts.memory + added)
    assert two.parts.products == pytest.approx(2 * one.parts.products)
    assert two.parts.optimizer == one.parts.optimizer


# --- one GPU ----------------------------------------------------------------------------------------------------------


def test_products_take_their_operations_over_the_achieved_rate() -> None:
    said = timed(seq_len=4096)
    assert said.parts.products == pytest.approx(loaded(seq_len=4096).work.products * 4096 / (312e12 * 0.8))


def test_products_of_few_tokens_take_as_long_as_reading_their_weights() -> None:
    said = timed(seq_len=8).parts.products
    # forward, recomputation, backward; the input embedding is looked up and not multiplied
    weights = 2 * (3 * (PARAMETERS - 2 * 32000 * 4096) + 3 * 32000 * 4096)
    assert said == pytest.approx(weights / (2e12 * MEMORY.typical), rel=0.01)


def test_a_small_model_waits_for_its_kernels_to_be_started() -> None:
    short, longer = (timed("smollm2-135m", seq_len=length) for length in (64, 128))
    assert short.parts.starting == max(short.parts)
    assert longer.seconds == pytest.approx(short.seconds, rel=0.02)


def test_a_step_is_the_sum_of_its_parts_and_counts_all_ranks_tokens() -> None:
    said = timed(world_size=4, micro_batch=2, gradient_accumulation=3)
    assert said.seconds == sum(said.parts)
    assert said.tokens == 4 * 2 * 3 * 512
    assert said.tokens_per_second == pytest.approx(said.tokens / said.seconds)


def test_the_newest_generation_that_is_not_newer_than_the_gpu_counts() -> None:
    known = {(7, 5): Range(1, 2, 3), (8, 0): Range(4, 5, 6)}
    assert by_capability(known, (8, 6)).slow == 4
    assert by_capability(known, (7, 5)).slow == 1
    assert by_capability(known, (6, 1)).slow == 1


# --- for all ----------------------------------------------------------------------------------------------------------

CHANGES = st.fixed_dictionaries(
    {
        "seq_len": st.sampled_from([1, 64, 500, 2048, 16384]),
        "micro_batch": st.integers(1, 16),
        "gradient_accumulation": st.integers(1, 8),
        "gradient_checkpointing": st.booleans(),
        "world_size": st.sampled_from([1, 2, 8, 16]),
        "zero_stage": st.sampled_from([0, 1, 2, 3]),
        "loss": st.sampled_from(["full", "chunked"]),
        "lora_dtype": st.sampled_from(["float32", "bfloat16"]),
    }
)
MODELS = st.sampled_from(["smollm2-135m", "llama-2-7b", "mixtral-8x7b"])


@settings(max_examples=60, deadline=None)
@given(MODELS, CHANGES)
def test_the_interval_holds_the_expected_time(model: str, changes: dict[str, Any]) -> None:
    said = timed(model, **changes)
    assert 0 < said.low <= said.seconds <= said.high
    assert min(said.parts) >= 0


@settings(max_examples=60, deadline=None)
@given(MODELS, CHANGES, st.sampled_from(["seq_len", "micro_batch", "gradient_accumulation"]))
def test_more_tokens_never_take_less_time(model: str, changes: dict[str, Any], grows: str) -> None:
    # one sequence is a case of its own: torch copies less for it
    changes["micro_batch"] += 1
    more = {**changes, grows: changes[grows] + 1}
    assert timed(model, **more).seconds >= timed(model, **changes).seconds * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(MODELS, CHANGES, st.sampled_from(["flops", "wide_flops", "memory_bytes", "link_bytes", "pcie_bytes"]))
def test_a_faster_gpu_never_takes_longer(model: str, changes: dict[str, Any], field: str) -> None:
    faster = RATES._replace(**{field: 2 * getattr(RATES, field)})
    assert timed(model, rates=faster, **changes).seconds <= timed(model, **changes).seconds * (1 + 1e-9)


def test_all_parts_have_a_name_that_the_report_can_show() -> None:
    assert set(Times._fields) == set(timed().parts._asdict())
