"""What turns losses into weight updates over all ranks: the two engines behind one interface.

The contract of every engine: the gradient of a step is the SUM of the gradients of all losses given to `backward`, over
all micro-batches and all ranks. The loop divides by the step's labelled tokens, so the mean is right for any split.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from qlora_core.training.loss import SummedLoss
from qlora_core.training.optimizer import state_tensors


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


class Engine(Protocol):
    """See the module's first lines for the contract."""

    module: SummedLoss
    optimizer: torch.optim.Optimizer

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """The forward and backward pass of one micro-batch run inside; `last` of its optimizer step or not."""

    def rehearsal(self) -> AbstractContextManager[None]:
        """A forward and a backward pass run inside that are of no step: the gradient of their loss must be 0."""

    def loss(self, batch: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
        """The summed loss of one micro-batch, shape []."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` to the step's."""

    def step(self) -> float:
        """Clip, update the weights, clear the gradient. Returns the gradient's global norm before clipping."""

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """All trained parameters on the CPU, whole; every rank must call it."""

    def optimizer_state(self) -> OptimizerState:
        """This rank's optimizer state; empty where another rank holds the same."""

    def restore_optimizer(self, state: OptimizerState) -> None:
        """Put back what `optimizer_state` gave, under the same strategy."""


def add_slot(state: OptimizerState, slot: int, values: Mapping[str, object]) -> None:
    """Put one slot's optimizer state into `state`."""
    tensors, numbers = state_tensors(values)
    state.tensors.update({f"{slot}.{key}": value for key, value in tensors.items()})
    state.numbers.update({f"{slot}.{key}": value for key, value in numbers.items()})
