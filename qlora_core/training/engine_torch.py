"""The plain torch engine: one process, or DistributedDataParallel over several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import saved, trainable
from qlora_core.training.optimizer import build_optimizer, place_in_groups
from qlora_core.training.optimizer_state import MASTER, OptimizerState, Span, add_slot, restore_state, tensors_of


class TorchEngine:
    """Plain torch: one process, or DistributedDataParallel over several. Every rank holds the whole optimizer state."""

    def __init__(self, module: SummedLoss, recipe: Recipe, strategy: Strategy, *, scaled: bool = False) -> None:
        self.module = module
        self._parameters = trainable(module)
        self._max_grad_norm = recipe.max_grad_norm
        self._world_size = strategy.world_size
        self.optimizer = build_optimizer(self._parameters, recipe, strategy)
        self.scaler = torch.amp.GradScaler(next(iter(self._parameters.values())).device.type, enabled=scaled)
        self._replica: nn.Module = module
        if strategy.world_size > 1:
            # The ranks start from the same seed, so nothing is broadcast: the frozen base would be tens of GB.
            self._replica = DistributedDataParallel(
                module, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """See `Engine`."""
        if isinstance(self._replica, DistributedDataParallel) and not last:
            return cast(AbstractContextManager[None], self._replica.no_sync())
        return nullcontext()

    @contextmanager
    def rehearsal(self, last: bool) -> Iterator[None]:
        """See `Engine`."""
        with self.micro_step(last):
            yield
        if last:
            self.optimizer.zero_grad(set_to_none=True)

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Engine`."""
        return cast(torch.Tensor, self._replica(**batch))

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`."""
        self.scaler.scale(loss * self._world_size).backward()  # type: ignore[no-untyped-call]  # DDP averages over ranks

    def step(self) -> float:
        """See `Engine`."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._max_grad_norm)
        self.scaler.step(self.optimizer)  # not where a gradient is not finite
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def saved_weights(self) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in saved(self.module).items()}

    def optimizer_tensors(self) -> Iterator[torch.Tensor]:
        """See `Engine`."""
        return tensors_of(self.optimizer)

    def optimizer_state(self) -> OptimizerState:
        """See `Engine`."""
        if dist.is_initialized() and dist.get_rank() != 0:
            return OptimizerState()
        state = OptimizerState(spans=self.layout()[0])
        for slot, parameter in enumerate(self._parameters.values()):
            add_slot(state, slot, self.optimizer.state[parameter])
        return state

    def restore_optimizer(self, state: OptimizerState) -> None:
        """See `Engine`."""
        places = place_in_groups(self.optimizer)
        for slot, parameter in enumerate(self._parameters.values()):
            tensors, numbers = state.slot(slot)
            tensors.pop(MASTER, None)  # weights of 16 bits are all that there is here
            restore_state(self.optimizer, *places[id(parameter)], tensors, numbers)

    def layout(self) -> tuple[tuple[Span, ...], dict[int, int]]:
        """See `Engine`. Each parameter is a slot."""
        sizes = {slot: parameter.numel() for slot, parameter in enumerate(self._parameters.values())}
        return tuple(Span(name, 0, sizes[slot], slot, 0) for slot, name in enumerate(self._parameters)), sizes
