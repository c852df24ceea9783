"""Raw optimizer state: which parameter lies where in it, and its way out of an optimizer and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional

CODE_BOOKS = ("qmap1", "qmap2")
"""State of bitsandbytes' 8-bit optimizers that is the same constant in every run; it is not saved."""
MOMENTS = {"state1": "exp_avg", "state2": "exp_avg_sq"}
"""bitsandbytes' names of Adam's moments, and torch's."""
BLOCK = 256
"""Elements that share a constant in bitsandbytes' 8-bit state (0.50.2, optim/optimizer.py, init_state)."""
MASTER = "master"
"""Key of a slot's float32 weights among its state, where ZeRO keeps such beside weights of 16 bits."""


@dataclass(frozen=True, slots=True)
class Span:
    """Where a run of one parameter's elements lies in the optimizer state of a rank.

    Attributes:
        parameter: the trained parameter's name.
        parameter_start: first element, counted in the flattened parameter.
        numel: elements.
        slot: the tensor of the optimizer that holds them (a parameter, or ZeRO's flat partition).
        slot_start: first element in that tensor.
    """

    parameter: str
    parameter_start: int
    numel: int
    slot: int
    slot_start: int


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """The raw optimizer state of one rank.

    Attributes:
        tensors: state tensors by "SLOT.KEY", as the optimizer holds them (8-bit state stays 8-bit).
        numbers: plain numbers by "SLOT.KEY", such as the step count.
        spans: which parameter lies where, so that the state can be laid out for another number of ranks.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()

    def slot(self, slot: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Tensors and numbers of one slot, by key."""
        prefix = f"{slot}."
        return (
            {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)},
            {name.removeprefix(prefix): value for name, value in self.numbers.items() if name.startswith(prefix)},
        )


def add_slot(state: OptimizerState, slot: int, values: Mapping[str, object]) -> None:
    """Put one slot's optimizer state into `state`."""
    tensors, numbers = state_tensors(values)
    state.tensors.update({f"{slot}.{key}": value for key, value in tensors.items()})
    state.numbers.update({f"{slot}.{key}": value for key, value in numbers.items()})


def state_tensors(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """A copy of one parameter's optimizer state as (tensors, plain numbers), without constants that are rebuilt."""
    tensors = {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in CODE_BOOKS
    }
    numbers = {key: value for key, value in state.items() if isinstance(value, int | float)}
    return tensors, numbers


def restore_state(
    optimizer: torch.optim.Optimizer,
    group_index: int,
    parameter_index: int,
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, float],
) -> None:
    """Put saved state back for one parameter of `optimizer`.

    It is as `state_tensors` took it, or as `reshard.laid_out` has it: under torch's names and in float32, whatever the
    optimizer.
    """
    group = optimizer.param_groups[group_index]
    parameter = group["params"][parameter_index]
    if isinstance(optimizer, bnb.optim.optimizer.Optimizer8bit):
        # bitsandbytes allocates the state itself: in managed memory if paged, with its code books if 8-bit
        optimizer.init_state(group, parameter, group_index, parameter_index)
        state = optimizer.state[parameter]
        names = {moment: own for own, moment in MOMENTS.items()}
        for key, value in tensors.items():
            own = names.get(key, key)
            if own != key and state[own].dtype == torch.uint8:
                book, constants = own.replace("state", "qmap"), own.replace("state", "absmax")
                codes, absmax = quantized(value.to(parameter.device), state[book])
                state[own].view(-1).copy_(codes)
                state[constants].copy_(absmax)
            elif key != "step":
                state[own].view(-1).copy_(value.view(-1))
        state.update({"step": int(numbers["step"])} if "step" in numbers else {})
        return
    # torch keeps "step" on the CPU and the moments beside the parameter
    state = optimizer.state[parameter]
    for key, value in tensors.items():
        if key == "step":
            state[key] = value.clone()
        else:
            state[key] = value.to(parameter.device, parameter.dtype, copy=True).view_as(parameter)
    for key, number in numbers.items():
        state[key] = torch.tensor(float(number)) if key == "step" else number


def quantized(moment: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A moment as codes of 8 bits, and the largest absolute value of each block."""
    codes, constants = functional.quantize_blockwise(moment.view(-1), code=code, blocksize=BLOCK)
    return codes, constants.absmax


def tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """All tensors of an optimizer's state."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
