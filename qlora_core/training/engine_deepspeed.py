"""The DeepSpeed engine: ZeRO 1, 2 and 3 over a frozen 4-bit base with float32 adapters."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import bitsandbytes as bnb
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from qlora_core.memory.sharding import bucket_elements
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import saved, trainable
from qlora_core.training.optimizer import build_optimizer
from qlora_core.training.optimizer_state import MASTER, OptimizerState, Span, add_slot, restore_state, tensors_of


def deepspeed_config(recipe: Recipe, strategy: Strategy, trainable: int) -> dict[str, Any]:
    """The configuration of a recipe and a strategy.

    There is no bf16 or fp16 section: it would cast the float32 adapters to 16 bit and keep float32 copies of them. The
    base computes in the recipe's compute dtype by itself. train_batch_size is left to DeepSpeed, which derives it.

    Args:
        trainable: elements of all trained weights, which bound the buckets.
    """
    zero: dict[str, Any] = {
        "stage": strategy.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket_elements(trainable),
        "allgather_bucket_size": bucket_elements(trainable),
    }
    if strategy.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if strategy.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": strategy.micro_batch,
        "gradient_accumulation_steps": strategy.gradient_accumulation,
        "gradient_clipping": recipe.max_grad_norm,
        # bitsandbytes' optimizers are not on DeepSpeed's list; tests/training/test_engines.py shows that they learn
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }


class DeepSpeedEngine:
    """ZeRO over the trainable weights (1, 2), or over the quantized base too (3). See `engine.Engine`."""

    def __init__(self, module: SummedLoss, recipe: Recipe, strategy: Strategy, *, scaled: bool = False) -> None:
        if get_accelerator().device_name() == "cpu":
            avoid_compiling()
        deepspeed_logger.setLevel(logging.WARNING)
        self.module = module
        self._parameters = trainable(module)
        self._stage = strategy.zero_stage
        # DeepSpeed averages over ranks and divides by the micro-batches of a step; the engine's contract is a sum
        self._undo_mean = strategy.world_size * strategy.gradient_accumulation
        parameters = list(self._parameters.values())
        self._weights_are_wide = all(parameter.dtype == torch.float32 for parameter in parameters)
        config = deepspeed_config(recipe, strategy, sum(map(elements, parameters)))
        if self._stage == 3:
            divide(module, config)
        self._engine: Any = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(self._parameters, recipe, strategy),
            config=config,
            model_parameters=parameters,
        )[0]
        self._zero: Any = self._engine.optimizer
        self.optimizer = cast(torch.optim.Optimizer, self._zero.optimizer)
        # its scale and its rules; DeepSpeed itself unscales the gradients, and makes no step where they overflow
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaled)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """See `Engine`."""
        yield
        if not last:
            self._engine.step()  # counts the micro-batch; the update comes with the last

    @contextmanager
    def rehearsal(self, last: bool) -> Iterator[None]:
        """See `Engine`."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield
        # the way back to counting micro-batches, which set_gradient_accumulation_boundary has not (0.19.8)
        self._engine._is_gradient_accumulation_boundary = None
        if last:
            self._discard()

    def loss(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `Engine`."""
        return cast(torch.Tensor, self._engine(**batch))

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`."""
        self._zero.loss_scaler.cur_scale = self.scaler.get_scale()
        self._engine.backward(loss * self._undo_mean)

    def step(self) -> float:
        """See `Engine`."""
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(next_scale(self.scaler.state_dict(), not math.isfinite(norm)))
        return norm

    def saved_weights(self) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        if self._stage < 3:
            return {name: parameter.detach().to("cpu", copy=True) for name, parameter in saved(self.module).items()}
        weights = {}
        for name, parameter in saved(self.module).items():
            # small ones are whole, and would be divided at the end, only to be fetched again by the next step
            is_whole = cast(Any, parameter).ds_status == ZeroParamStatus.AVAILABLE
            with nullcontext() if is_whole else deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().to("cpu", copy=True)
        return weights

    def optimizer_tensors(self) -> Iterator[torch.Tensor]:
        """See `Engine`. The flat partitions are copies of the weights."""
        yield from tensors_of(self.optimizer)
        yield from self._slots()

    def optimizer_state(self) -> OptimizerState:
        """See `Engine`."""
        state = OptimizerState(spans=tuple(self._spans()))
        for slot, flat in enumerate(self._slots()):
            # float32 masters say more than 16-bit weights do
            masters = {} if self._weights_are_wide else {MASTER: flat}
            add_slot(state, slot, {**self.optimizer.state[flat], **masters})
        return state

    def restore_optimizer(self, state: OptimizerState) -> None:
        """See `Engine`."""
        for slot, flat in enumerate(self._slots()):
            group_index = self._zero.sub_group_to_group_id[slot] if self._stage == 3 else slot
            group = self.optimizer.param_groups[group_index]
            # ZeRO-3 puts a sub-group's flat partition into the optimizer only while it steps
            held, group["params"] = group["params"], [flat]
            tensors, numbers = state.slot(slot)
            if (master := tensors.pop(MASTER, None)) is not None and not self._weights_are_wide:
                flat.data.copy_(master)
            try:
                restore_state(self.optimizer, group_index, 0, tensors, numbers)
            finally:
                group["params"] = held

    def layout(self) -> tuple[tuple[Span, ...], dict[int, int]]:
        """See `Engine`. Each flat partition is a slot."""
        return tuple(self._spans()), {slot: flat.numel() for slot, flat in enumerate(self._slots())}

    def _discard(self) -> None:
        """Drop all gradients, as DeepSpeed does where those of a step overflow (0.19.8, `step` of each optimizer)."""
        if self._stage == 3:
            self._zero._pre_step()
            self._zero._overflow_clean_up(prev_scale=None)
            return
        self._zero.micro_step_id = INITIAL_MICRO_STEP_ID
        self._zero.zero_grad(set_to_none=True)
        self._zero._release_preflattened_grad_buffers()
        for group in list(self._zero.averaged_gradients):
            self._zero.averaged_gradients[group] = self._zero.all_grad_tensors[group] = None
        if self._zero.cpu_offload:
            self._zero._offload_accumulated_param_ids = set()
            self._zero.reset_cpu_buffers()

    def _slots(self) -> list[torch.Tensor]:
        """The flat partitions of this rank, which the base optimizer updates."""
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _spans(self) -> Iterator[Span]:
        """Which parameter lies where in this rank's flat partitions."""
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        rank = dist.get_rank()
        if self._stage == 3:
            for slot, group in enumerate(self._zero.fp16_groups):
                start = 0
                for parameter in group:
                    part = parameter.partition_numel()
                    first = rank * part
                    numel = max(0, min(part, parameter.ds_numel - first))  # the last rank's part may be padded
                    if numel:
                        yield Span(names[id(parameter)], first, numel, slot, start)
                    start += part
            return
        for slot, group in enumerate(self._zero.round_robin_bit16_groups):
            size = self._zero.partition_size[slot]
            low, high = rank * size, (rank + 1) * size
            for parameter, offset in zip(group, self._zero.round_robin_bit16_offsets[slot], strict=True):
                first, last = max(low, offset), min(high, offset + parameter.numel())
                if first < last:
                    yield Span(names[id(parameter)], first - offset, last - first, slot, first - low)


def next_scale(state: Mapping[str, Any], overflowed: bool) -> dict[str, Any]:
    """The state of a GradScaler after a step, as its `update` makes it, which only knows gradients that it unscaled."""
    good = 0 if overflowed else state["_growth_tracker"] + 1
    factor = state["backoff_factor"] if overflowed else 1.0
    if good == state["growth_interval"]:
        good, factor = 0, state["growth_factor"]
    return {**state, "scale": state["scale"] * factor, "_growth_tracker": good}


def divide(module: nn.Module, config: dict[str, Any]) -> None:
    """Bring this rank's parts of `module`, which is whole on the host, to its device: one parameter after the other.

    deepspeed.initialize would move the whole module there first, unless its parameters are divided already (DeepSpeed
    0.19.8, engine.py, _configure_distributed_model). On a CPU all stays where it is; the way to a GPU has not been
    tried on one.
    """
    deepspeed.init_distributed()
    # as DeepSpeed divides what is not divided yet (runtime/zero/parameter_offload.py, _convert_to_zero_parameters)
    dtype = next(module.parameters()).dtype
    divided = deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
    move_undivided(module, divided.local_device)
    # the pieces that whole parameters left in the allocator's cache; the plan takes them for gone
    get_accelerator().empty_cache()


def move_undivided(module: nn.Module, device: torch.device) -> None:
    """Move what ZeRO-3 leaves whole and where it is, being no parameter: buffers, and constants of 4-bit weights."""
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))
    for parameter in module.parameters():
        if isinstance(parameter, bnb.nn.Params4bit):
            parameter.quant_state.to(device)  # in place, for the layer refers to it too


def elements(parameter: Any) -> int:
    """Elements of a parameter, also of one that ZeRO-3 has divided."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def avoid_compiling() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives for the CPU.

    It would take a minute at the first run of a machine, for a speed-up that multi-socket inference sees; gloo serves.
    """
    deepspeed.ops.__compatible_ops__ = {}
