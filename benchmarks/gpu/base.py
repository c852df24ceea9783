"""A base model of random weights, made from a config alone and loaded by transformers as one from files is.

The weights of a checkpoint file are read one at a time when transformers comes to them, and quantized before the next
(core_model_loading.py, convert_and_load_state_dict_in_model). Random ones are made at that same moment, so that a 65B
model never has its 16-bit form in memory, and loading leaves on the GPU what loading from files leaves there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from qlora_core.recipe import Dtype, Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.model import frozen, loading_options, model_class

STORED = torch.bfloat16
"""The dtype of the weights, as models are published."""
SPREAD = 0.02
"""Their standard deviation, as transformers initialises (`initializer_range`)."""
DISTINCT = 2**22
"""How many random numbers are drawn; larger weights repeat them. Memory does not ask what is in it."""


class RandomWeight:
    """A weight that does not exist until it is indexed with `...`, as a slice of a safetensors file.

    Args:
        shape: of the weight.
        shared: weights of one shape are one tensor. Only where each is copied to another device anyway.
    """

    def __init__(self, shape: torch.Size, *, shared: bool) -> None:
        self.shape = shape
        self.dtype = STORED
        self._shared = shared

    def __getitem__(self, index: Any) -> torch.Tensor:
        """The weight on the CPU; norms and biases are ones, so that numbers stay in range through many layers."""
        weight = _weight(tuple(self.shape))[index]
        return weight if self._shared else weight.clone()


def random_base(
    fields: Mapping[str, Any], recipe: Recipe, strategy: Strategy, compute_dtype: Dtype, device: torch.device
) -> nn.Module:
    """What `load_base` gives for a folder with this ``config.json`` and random weights, without the folder.

    Args:
        fields: of the ``config.json``.
        compute_dtype: dtype of activations, of dequantized and of unquantized weights.
    """
    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        skeleton = model_class(config).from_config(config)
    # parameters that are tied are listed once, as files hold them once
    weights = {
        name: RandomWeight(parameter.shape, shared=device.type != "cpu")
        for name, parameter in skeleton.named_parameters()
    }
    options = loading_options(recipe, strategy, compute_dtype, device)
    # the model's own class, because AutoModel wants to look for code in a folder
    return frozen(type(skeleton).from_pretrained(None, config=config, state_dict=weights, **options), strategy)


@cache
def _weight(shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=STORED)
    numel = prod(shape)
    return _numbers().repeat(-(-numel // DISTINCT))[:numel].view(shape)


@cache
def _numbers() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (SPREAD * torch.randn(DISTINCT, generator=generator)).to(STORED)
