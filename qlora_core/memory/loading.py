"""Loads a model on the meta device in the order, and with the temporaries, of transformers, bitsandbytes and peft."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoConfig
from transformers.core_model_loading import dot_natural_key
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from qlora_core.architecture import ModelArchitecture
from qlora_core.memory.device import Device
from qlora_core.memory.measure import quantization_constants
from qlora_core.memory.recorder import Recorder
from qlora_core.memory.replay import EMPTY_CACHE, WEIGHT, WEIGHTS_LOADED
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.model import (
    TORCH_DTYPES,
    attach_adapters,
    model_class,
    quantization_config,
    train_all,
    trainable,
)


def built(architecture: ModelArchitecture, strategy: Strategy, device: Device) -> Any:
    """The model that transformers builds of the config, without memory."""
    config = AutoConfig.for_model(**architecture.whole_config)
    with torch.device("meta"):
        return model_class(config).from_config(
            config,
            attn_implementation="eager" if strategy.attention == "eager" else "sdpa",
            dtype=TORCH_DTYPES[device.compute_dtype],
        )


def load(base: Any, recipe: Recipe, strategy: Strategy, device: Device, recorder: Recorder) -> nn.Module:
    """`base` with its adapters, loaded in the order and with the temporaries of transformers and peft.

    transformers/core_model_loading.py and modeling_utils.py (5.23): one request for as much as the model will take,
    given back at once, so that it is cached; then each weight in the order of its name, quantized before the next.
    """
    dtype = TORCH_DTYPES[device.compute_dtype]
    kept = dict(base.named_buffers())
    if (quantization := quantization_config(recipe, dtype)) is not None:
        base = replace_with_bnb_linear(
            base, modules_to_not_convert=get_keys_to_not_convert(base), quantization_config=quantization
        )
        base.is_loaded_in_4bit = True
    with recorder:
        if device.kind == "cuda" and device.warmed_up:
            recorder.brief(_warm_up_bytes(base), "unquantized_weights")()
        _load_weights(base, dtype, recorder, quantized=quantization is not None)
    for buffer in kept.values():
        recorder.follow(buffer, "unquantized_weights")
    if recipe.upcast == "peft":
        _upcast(base, recorder)
    if device.emptied_after_load:
        recorder.mark(EMPTY_CACHE)
    base.requires_grad_(False)
    base.config.use_cache = False
    if strategy.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.method == "full":
        return train_all(base)
    if recipe.upcast == "peft" and strategy.gradient_checkpointing:
        base.enable_input_require_grads()
    return _adapted(base, recipe, dtype, recorder)


def _warm_up_bytes(model: nn.Module) -> int:
    """What transformers asks for at once before it loads (modeling_utils.py, get_total_byte_count)."""
    sizes = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            packed = isinstance(module, bnb.nn.Linear4bit) and name == "weight"
            sizes[id(parameter)] = parameter.numel() * (0.5 if packed else parameter.element_size())
    return int(sum(sizes.values()))


def _load_weights(model: nn.Module, dtype: torch.dtype, recorder: Recorder, *, quantized: bool) -> None:
    """Each weight as it comes from the checkpoint, quantized where it is to be."""
    seen: dict[int, nn.Parameter] = {}
    # Falcon's linears, of a type of their own, are left as they are by a recipe that quantizes
    linears = bnb.nn.Linear4bit if quantized else (nn.Linear, Conv1D)
    for name in sorted(dict(model.named_parameters()), key=dot_natural_key):
        holder, _, last = name.rpartition(".")
        module = model.get_submodule(holder)
        old = getattr(module, last)
        if id(old) in seen:
            continue
        is_base = isinstance(module, linears) and last == "weight"
        recorder.room = "base_weights" if is_base else "unquantized_weights"
        recorder.mark(WEIGHT)
        value = _from_checkpoint(old, dtype)
        if isinstance(module, bnb.nn.Linear4bit) and last == "weight":
            new = bnb.nn.Params4bit(value, requires_grad=False, **old.__dict__)._quantize("meta")
            for constant in quantization_constants(new.quant_state):
                recorder.move(constant, "quantization_constants")
        else:
            new = nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
        module.register_parameter(last, new)
        seen[id(new)] = new
        del value, old, new
    recorder.mark(WEIGHTS_LOADED)
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None:
        recorder.move(head.weight, "unquantized_weights")
    model.tie_weights()  # type: ignore[operator]
    recorder.room = "activations"


def _from_checkpoint(parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
    """A weight on the device; that of several experts is put together from theirs (MergeModulelist)."""
    shape = parameter.shape
    if len(shape) == 3:
        pieces = [torch.empty(shape[1:], dtype=dtype, device="meta") for _ in range(shape[0])]
        return torch.stack(pieces)
    return torch.empty(shape, dtype=dtype, device="meta")


def _upcast(model: nn.Module, recorder: Recorder) -> None:
    """peft.prepare_model_for_kbit_training (utils/other.py): every 16-bit parameter but the 4-bit ones, in turn."""
    with recorder:
        recorder.room = "unquantized_weights"
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and not isinstance(parameter, bnb.nn.Params4bit):
                parameter.data = parameter.data.to(torch.float32)
        recorder.room = "activations"


def _adapted(base: nn.Module, recipe: Recipe, dtype: torch.dtype, recorder: Recorder) -> nn.Module:
    """`base` with adapters, made on the CPU, moved in the base's dtype, then cast (peft's tuners/lora/layer.py)."""
    with torch.device("meta"):
        model: nn.Module = attach_adapters(base, recipe, seed=0)
    moved = recipe.quantization == "none" and dtype != torch.float32
    narrow = []
    if moved:
        narrow = [recorder.brief(2 * parameter.numel(), "lora_weights") for parameter in trainable(model).values()]
    for index, parameter in enumerate(trainable(model).values()):
        recorder.follow(parameter, "lora_weights")
        if moved:
            narrow[index]()
    return model
