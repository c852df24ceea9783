"""What turns losses into weight updates over all ranks: the two engines behind one interface.

The contract of every engine: the gradient of a step is the SUM of the gradients of all losses given to `backward`, over
all micro-batches and all ranks. The loop divides by the step's labelled tokens, so the mean is right for any split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from qlora_core.training.loss import SummedLoss
from qlora_core.training.optimizer_state import OptimizerState, Span


class Engine(Protocol):
    """See the module's first lines for the contract."""

    module: SummedLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales losses, so that gradients do not vanish in float16; it does nothing where it is not enabled."""

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """The forward and backward pass of one micro-batch run inside; `last` of its optimizer step or not."""

    def rehearsal(self, last: bool) -> AbstractContextManager[None]:
        """As `micro_step`, but of no step: after the last one nothing is left of it. The gradient must be 0."""

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The summed loss of one micro-batch, shape []."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` to the step's."""

    def step(self) -> float:
        """Clip, update the weights, clear the gradient. Returns the gradient's global norm before clipping."""

    def saved_weights(self) -> dict[str, torch.Tensor]:
        """Copies on the CPU of what a checkpoint holds (`model.saved`), whole; every rank must call it."""

    def optimizer_tensors(self) -> Iterator[torch.Tensor]:
        """What this rank's optimizer holds beside the weights: its state, and weights of its own where it has such."""

    def optimizer_state(self) -> OptimizerState:
        """A copy of this rank's optimizer state; empty where another rank holds the same."""

    def restore_optimizer(self, state: OptimizerState) -> None:
        """Put back what `optimizer_state` gave under the same layout, or what `reshard.laid_out` made for this one."""

    def layout(self) -> tuple[tuple[Span, ...], dict[int, int]]:
        """Which parameter lies where in this rank's optimizer state, and the elements of each of its slots."""
