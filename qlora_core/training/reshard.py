"""Optimizer state for another number of ranks, ZeRO stage or optimizer: back to parameters, and laid out anew.

Each rank's state says by its spans which parameter lies where. Moments of 32 or 16 bits are moved as they are; those of
8 bits are dequantized, moved, and quantized again over the blocks of the new layout, which changes each by at most half
a step of its block's code book.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bitsandbytes import functional

from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.optimizer_state import BLOCK, MOMENTS, OptimizerState, Span

CODES = {"state1": True, "state2": False}
"""Whether a moment's code book is signed."""


@dataclass(slots=True)
class Whole:
    """The optimizer state by parameter.

    Attributes:
        tensors: for each parameter its moments, and its float32 master weights where there are any, float32, flat.
        numbers: plain numbers that are the same for all, such as the step count.
    """

    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


def layout_of(recipe: Recipe, strategy: Strategy) -> dict[str, Any]:
    """What the raw state's layout hangs on; where it is the same, that state is put back bit for bit."""
    return {
        "zero_stage": strategy.zero_stage,
        "ranks": strategy.world_size if strategy.zero_stage else 1,  # without ZeRO all hold the same
        "optimizer": "torch" if recipe.optimizer == "adamw" and not strategy.paged_optimizer else "bitsandbytes",
    }


def whole(states: Sequence[OptimizerState]) -> Whole:
    """The state of all ranks, by parameter.

    Args:
        states: by rank; a replica of another rank's is empty.
    """
    found = Whole()
    sizes: dict[str, int] = {}
    for state in states:
        for span in state.spans:
            sizes[span.parameter] = max(sizes.get(span.parameter, 0), span.parameter_start + span.numel)
    for state in states:
        for slot in sorted({span.slot for span in state.spans}):
            tensors, numbers = state.slot(slot)
            found.numbers |= numbers
            moments = wide(tensors)
            if (step := moments.pop("step", None)) is not None:  # torch's is a tensor
                found.numbers["step"] = float(step)
            for span in (each for each in state.spans if each.slot == slot):
                parts = found.tensors.setdefault(span.parameter, {})
                for key, tensor in moments.items():
                    if key not in parts:
                        parts[key] = torch.zeros(sizes[span.parameter])
                    values = tensor.view(-1)[span.slot_start : span.slot_start + span.numel]
                    parts[key][span.parameter_start : span.parameter_start + span.numel] = values
    return found


def wide(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A slot's state under torch's names, in float32."""
    found = {}
    for key, tensor in tensors.items():
        if key.startswith("absmax"):
            continue
        if tensor.dtype == torch.uint8:
            code = functional.create_dynamic_map(signed=CODES[key])
            absmax = tensors[key.replace("state", "absmax")]
            tensor = functional.dequantize_blockwise(tensor.view(-1), absmax=absmax, code=code, blocksize=BLOCK)
        found[MOMENTS.get(key, key)] = tensor.float()
    return found


def laid_out(state: Whole, spans: Sequence[Span], sizes: Mapping[int, int]) -> OptimizerState:
    """The part of a state that belongs to one rank, under torch's names and in float32.

    Args:
        spans: what lies where on that rank.
        sizes: elements of each slot; what no span covers is padding, and 0.
    """
    rank = OptimizerState(spans=tuple(spans))
    for slot, size in sizes.items():
        mine = [span for span in spans if span.slot == slot]
        for key in dict.fromkeys(key for span in mine for key in state.tensors.get(span.parameter, {})):
            flat = torch.zeros(size)
            for span in mine:
                values = state.tensors[span.parameter][key]
                part = values[span.parameter_start : span.parameter_start + span.numel]
                flat[span.slot_start : span.slot_start + span.numel] = part
            rank.tensors[f"{slot}.{key}"] = flat
        rank.numbers.update({f"{slot}.{key}": value for key, value in state.numbers.items()})
    return rank
