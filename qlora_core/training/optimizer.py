"""The optimizer of a recipe, and its learning rate schedule."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import get_scheduler

from qlora_core.memory.bytes import PAGED_NUMEL
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

OUT_OF_MEMORY = 2
"""CUDA_ERROR_OUT_OF_MEMORY (CUDA driver API, CUresult)."""


class AdamW(bnb.optim.AdamW):  # type: ignore[misc]
    """bitsandbytes' own, which raises where there is no memory to page: its library prints the error and exits."""

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The state of a parameter.

        Raises:
            torch.OutOfMemoryError: managed memory of that size cannot be had.
        """
        if self.is_paged and p.device.type == "cuda" and p.numel() >= PAGED_NUMEL:
            check_managed(p.numel() * dtype.itemsize)
        return cast(torch.Tensor, super().get_state_buffer(p, dtype))


def check_managed(size: int) -> None:
    """Raise a torch.OutOfMemoryError where CUDA gives no managed memory of `size` bytes."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:  # an AMD GPU, or none: a plan is traced
        return
    address = ctypes.c_uint64()
    status = driver.cuMemAllocManaged(ctypes.byref(address), ctypes.c_size_t(size), 1)  # CU_MEM_ATTACH_GLOBAL
    if status == OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"CUDA out of memory. {size} bytes of managed memory were asked for.")
    if status == 0:
        driver.cuMemFree_v2(address)


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], recipe: Recipe, strategy: Strategy
) -> torch.optim.Optimizer:
    """AdamW as the recipe and the strategy name it: torch's for unpaged 32-bit state, bitsandbytes' otherwise.

    Args:
        parameters: the trained ones by name.
    """
    common: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.beta1, recipe.beta2),
        "weight_decay": recipe.weight_decay,
    }
    groups = parameter_groups(parameters, recipe)
    if recipe.optimizer == "adamw" and not strategy.paged_optimizer:
        return torch.optim.AdamW(groups, **common)
    bits = 8 if recipe.optimizer == "adamw_8bit" else 32
    return cast(
        torch.optim.Optimizer,
        AdamW(groups, optim_bits=bits, is_paged=strategy.paged_optimizer, **common),
    )


def parameter_groups(parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> list[dict[str, Any]]:
    """All in one group; with LoRA+ two, of which the second, the adapters' B and DoRA's magnitudes, learns faster.

    As peft.optimizers.create_loraplus_optimizer divides them (0.21.2, optimizers/loraplus.py), with the recipe's weight
    decay for both.
    """
    if recipe.loraplus_lr_ratio == 1:
        return [{"params": list(parameters.values())}]
    faster = {name for name, parameter in parameters.items() if "lora_B" in name or "lora_magnitude_vector" in name}
    rates = (recipe.learning_rate, recipe.learning_rate * recipe.loraplus_lr_ratio)
    return [
        {"params": [value for name, value in parameters.items() if (name in faster) is fast], "lr": rate}
        for fast, rate in zip((False, True), rates, strict=True)
    ]


def place_in_groups(optimizer: torch.optim.Optimizer) -> dict[int, tuple[int, int]]:
    """The group and the index in it of each parameter, by its id."""
    return {
        id(parameter): (number, index)
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
    }


def build_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Transformers' schedule of that name: linear warm-up, then constant, linear or cosine decay towards 0.

    Taken one step later, so that neither the first step nor the last has a learning rate of 0 and trains nothing.
    """
    names = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
    shape = get_scheduler(
        names[recipe.schedule],
        optimizer,
        num_warmup_steps=round(recipe.warmup_fraction * total_steps),
        num_training_steps=total_steps + 1,
    ).lr_lambdas[0]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step + 1))
