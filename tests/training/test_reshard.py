"""Optimizer state for another layout: by hand on a few numbers, and from every engine's state to every other's."""

from __future__ import annotations

import itertools
import random

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.optimizer_state import BLOCK, OptimizerState, Span, add_slot, restore_state
from qlora_core.training.reshard import laid_out, layout_of, whole


def test_by_hand_from_two_padded_ranks_to_a_slot_for_each_parameter() -> None:
    """a has 3 elements and b 2, in one flat partition of 6 over two ranks: a0 a1 a2 | b0 b1 and one of padding."""
    first = OptimizerState(
        tensors={"0.exp_avg": torch.tensor([1.0, 2.0, 3.0]), "0.step": torch.tensor(7.0)},
        spans=(Span("a", 0, 3, 0, 0),),
    )
    second = OptimizerState(
        tensors={"0.exp_avg": torch.tensor([4.0, 5.0, 9.0]), "0.step": torch.tensor(7.0)},
        spans=(Span("b", 0, 2, 0, 0),),
    )
    found = whole([first, second])
    assert {name: parts["exp_avg"].tolist() for name, parts in found.tensors.items()} == {
        "a": [1.0, 2.0, 3.0],
        "b": [4.0, 5.0],
    }
    assert found.numbers == {"step": 7.0}
    alone = laid_out(found, [Span("a", 0, 3, 0, 0), Span("b", 0, 2, 1, 0)], {0: 3, 1: 2})
    assert alone.tensors["0.exp_avg"].tolist() == [1.0, 2.0, 3.0]
    assert alone.tensors["1.exp_avg"].tolist() == [4.0, 5.0]
    assert alone.numbers == {"0.step": 7.0, "1.step": 7.0}
    # three ranks of two each: a0 a1 | a2 b0 | b1 and padding
    middle = laid_out(found, [Span("a", 2, 1, 0, 0), Span("b", 0, 1, 0, 1)], {0: 2})
    last = laid_out(found, [Span("b", 1, 1, 0, 0)], {0: 2})
    assert middle.tensors["0.exp_avg"].tolist() == [3.0, 4.0]
    assert last.tensors["0.exp_avg"].tolist() == [5.0, 0.0]


def flat(sizes: dict[str, int], world: int) -> list[tuple[tuple[Span, ...], dict[int, int]]]:
    """What lies where when all parameters, one behind the other, are cut into as many equal parts, as ZeRO 2 does."""
    share = -(-sum(sizes.values()) // world)
    ranks = []
    for rank in range(world):
        spans, offset = [], 0
        for name, size in sizes.items():
            low, high = max(rank * share, offset), min((rank + 1) * share, offset + size)
            if low < high:
                spans.append(Span(name, low - offset, high - low, 0, low - rank * share))
            offset += size
        ranks.append((tuple(spans), {0: share}))
    return ranks


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5), worlds=st.lists(st.integers(1, 6), max_size=4))
def test_nothing_is_lost_over_any_numbers_of_ranks(sizes: list[int], worlds: list[int]) -> None:
    drawn = random.Random(str((sizes, worlds)))
    named = {f"p{number}": size for number, size in enumerate(sizes)}
    values = {name: torch.tensor([drawn.random() for _ in range(size)]) for name, size in named.items()}
    state = whole(
        [
            OptimizerState(
                tensors={f"{slot}.exp_avg": value for slot, value in enumerate(values.values())},
                spans=tuple(Span(name, 0, size, slot, 0) for slot, (name, size) in enumerate(named.items())),
            )
        ]
    )
    for world in worlds:
        state = whole([laid_out(state, *rank) for rank in flat(named, world)])
    assert {name: parts["exp_avg"].tolist() for name, parts in state.tensors.items()} == {
        name: value.tolist() for name, value in values.items()
    }


SIZE = 5000
"""More than the 4096 elements from which bitsandbytes' state has 8 bits."""
KINDS = ("torch", "32 bits", "8 bits")


def optimizer_of(kind: str, parameter: nn.Parameter) -> torch.optim.Optimizer:
    if kind == "torch":
        return torch.optim.AdamW([parameter], lr=1e-2)
    found: torch.optim.Optimizer = bnb.optim.AdamW([parameter], lr=1e-2, optim_bits=int(kind.split()[0]))
    return found


def trained(kind: str, steps: int = 3) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A parameter and its optimizer after a few steps of gradients drawn by step."""
    parameter = nn.Parameter(torch.zeros(SIZE))
    optimizer = optimizer_of(kind, parameter)
    go_on(parameter, optimizer, range(steps))
    return parameter, optimizer


def go_on(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        parameter.grad = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        optimizer.step()


def state_of(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> OptimizerState:
    state = OptimizerState(spans=(Span("p", 0, SIZE, 0, 0),))
    add_slot(state, 0, optimizer.state[parameter])
    return state


@pytest.mark.parametrize(("before", "after"), itertools.product(KINDS, KINDS))
def test_the_next_step_with_another_optimizer_is_that_of_one_that_stayed(before: str, after: str) -> None:
    parameter, optimizer = trained(before)
    other = nn.Parameter(parameter.detach().clone())
    changed = optimizer_of(after, other)
    moved = laid_out(whole([state_of(parameter, optimizer)]), [Span("p", 0, SIZE, 0, 0)], {0: SIZE})
    restore_state(changed, 0, 0, *moved.slot(0))
    go_on(parameter, optimizer, range(3, 4))
    go_on(other, changed, range(3, 4))
    # a step moves each weight by about the learning rate; 8 bits round the moments
    exact = "8 bits" not in (before, after)
    torch.testing.assert_close(other.detach(), parameter.detach(), rtol=0, atol=1e-6 if exact else 2e-3)


def test_8_bit_moments_come_back_within_half_a_step_of_their_code_book() -> None:
    parameter, optimizer = trained("8 bits")
    first = whole([state_of(parameter, optimizer)])
    parts = flat({"p": SIZE}, 3)
    for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        code = bnb.functional.create_dynamic_map(signed=signed)
        widest = float((code[1:] - code[:-1]).max())
        rounded = []
        for rank in parts:
            moment = laid_out(first, *rank).tensors[f"0.{key}"]
            codes, constants = bnb.functional.quantize_blockwise(moment, code=code, blocksize=BLOCK)
            rounded.append(
                bnb.functional.dequantize_blockwise(codes, absmax=constants.absmax, code=code, blocksize=BLOCK)
            )
        again = torch.cat(rounded)[:SIZE]
        moment = first.tensors["p"][key]
        assert float((again - moment).abs().max()) <= widest / 2 * float(moment.abs().max()) * (1 + 1e-6)


def test_the_raw_state_is_kept_where_its_layout_is_the_same() -> None:
    def layout(
        world: int, stage: int, *, paged: bool = False, optimizer: str = "adamw", micro_batch: int = 1
    ) -> object:
        recipe = Recipe(optimizer=optimizer)  # type: ignore[arg-type]
        strategy = Strategy(
            world_size=world,
            zero_stage=stage,  # type: ignore[arg-type]
            paged_optimizer=paged,
            micro_batch=micro_batch,
        )
        return layout_of(recipe, strategy)

    assert layout(2, 2) == layout(2, 2, micro_batch=4)
    assert layout(1, 0) == layout(2, 0)  # every rank holds all of it
    assert layout(2, 2) != layout(3, 2)
    assert layout(2, 2) != layout(2, 3)
    assert layout(1, 0) != layout(1, 0, paged=True)  # another optimizer
    assert layout(1, 0, optimizer="adamw_8bit") == layout(1, 0, optimizer="adamw_8bit", paged=True)
