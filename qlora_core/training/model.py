"""The model of a run: the base as bitsandbytes stores it, and what is trained: peft's adapters, or all weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
)
from transformers.integrations.neftune import neftune_post_forward_hook

from clusters.errors import request_error
from qlora_core.huggingface.modules import modules_of, tower_expression
from qlora_core.recipe import Dtype, Recipe
from qlora_core.strategy import Strategy
from qlora_core.targets import for_peft
from qlora_core.training.attention import attend_on_a_cpu

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def autocast_dtype(recipe: Recipe, compute_dtype: Dtype) -> torch.dtype | None:
    """The dtype of a recipe's torch.autocast; None without it, and in float32, which it would not change."""
    return TORCH_DTYPES[compute_dtype] if recipe.narrows(compute_dtype) else None


def model_class(config: PreTrainedConfig) -> Any:
    """The Auto class that makes the model of `config`: some that see have no form that is for text alone."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def class_in(folder: str | Path) -> Any:
    """The Auto class that loads the model in `folder`."""
    return model_class(AutoConfig.from_pretrained(folder, trust_remote_code=False))


def load_base(model: str, recipe: Recipe, strategy: Strategy, compute_dtype: Dtype, device: torch.device) -> nn.Module:
    """The base model, every weight frozen, quantized as the recipe says: on `device`, but on the host under ZeRO-3.

    Args:
        model: a folder in the Hugging Face layout.
        compute_dtype: dtype of activations, of dequantized and of unquantized weights.

    Only safetensors are read, and no code of the model's folder is run. Nothing is cast to float32 afterwards, unlike
    peft.prepare_model_for_kbit_training, whose float32 embedding doubles the residual stream and its checkpoints.

    Raises:
        RequestError: weights of the model are in none of its files; transformers makes them random, and only warns.
    """
    options = loading_options(recipe, strategy, compute_dtype, device)
    base, report = class_in(model).from_pretrained(model, trust_remote_code=False, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        rule = f"its files lack {missing[0]}{more}, which would be random numbers"
        raise request_error("model", model, rule, "Give a model whose files are whole, with a config that fits them")
    return frozen(base, strategy)


def loading_options(recipe: Recipe, strategy: Strategy, compute_dtype: Dtype, device: torch.device) -> dict[str, Any]:
    """What transformers' `from_pretrained` is told about the base, wherever its weights come from. See `load_base`."""
    divided = strategy.zero_stage == 3
    dtype = TORCH_DTYPES[compute_dtype]
    return {
        "dtype": dtype,
        "quantization_config": quantization_config(recipe, dtype),
        "attn_implementation": strategy.attention,
        # transformers does not shard a quantized model while it loads (modeling_utils.py, get_init_context): under
        # ZeRO-3 it is whole on the host first, from where engine_deepspeed.divide brings a rank's parts to its device
        "device_map": {"": torch.device("cpu") if divided else device},
        "use_safetensors": True,
    }


def frozen(base: Any, strategy: Strategy) -> nn.Module:
    """`base`, just loaded, with every weight frozen and its activations kept as the strategy says."""
    # the pieces that loading left in the allocator's cache; the plan takes them for gone (Device.emptied_after_load)
    torch.cuda.empty_cache()
    base.requires_grad_(False)
    base.config.use_cache = False
    keep_weights_trainable_through(base)
    attend_on_a_cpu()
    if strategy.gradient_checkpointing:
        # Non-reentrant, because reentrant checkpointing loses the gradient unless its input requires one. But ZeRO-3
        # frees gathered parameters between forward and recomputation, which the non-reentrant variant's metadata check
        # takes for a change of the saved tensors: there it is the reentrant one, and the input is made to need grad.
        reentrant = strategy.zero_stage == 3
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            base.enable_input_require_grads()
    return cast(nn.Module, base)


def quantization_config(recipe: Recipe, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Bitsandbytes' configuration for a recipe, or None for an unquantized base."""
    if recipe.quantization == "none":
        return None
    if recipe.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quantization,
        bnb_4bit_use_double_quant=recipe.double_quantization,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_weights_trainable_through(base: nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights for inference.

    On a CPU with AVX512-BF16, bitsandbytes 0.50.2 repacks a layer's weight at its first evaluation without gradient
    (nn/modules.py, Linear4bit.forward); afterwards the layer passes no gradient to its input, without a warning, so
    that training after an evaluation silently learns the wrong thing.
    """
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def make_trainable(base: nn.Module, recipe: Recipe, seed: int) -> nn.Module:
    """`base`, all frozen, with what the recipe trains: adapters on it, or with method full all its weights.

    With method full the weights, their gradients and torch's optimizer state have the dtype that the base was loaded
    in, as the memory model has it; ZeRO keeps float32 masters beside weights of 16 bits.
    """
    model = train_all(base) if recipe.method == "full" else attach_adapters(base, recipe, seed)
    if recipe.neftune_alpha:
        add_noise(model, recipe.neftune_alpha)
    return model


def train_all(base: nn.Module) -> nn.Module:
    """`base` with all weights trained that text leads through: those of a vision tower would get no gradient."""
    base.requires_grad_(True)
    for name in modules_of(cast(Any, base).config.model_type).tower:
        base.get_submodule(name).requires_grad_(False)
    return base


def add_noise(model: nn.Module, alpha: float) -> None:
    """Let the token embedding add NEFTune's noise to its output while it is in training mode.

    transformers' own hook (integrations/neftune.py); its random numbers are PyTorch's, whose state a checkpoint holds.
    It goes before the hook that makes the output a leaf for gradient checkpointing, which would else be held besides.
    """
    embedding = cast(Any, model).get_input_embeddings()
    embedding.neftune_noise_alpha = alpha
    embedding.register_forward_hook(neftune_post_forward_hook, prepend=True)


def attach_adapters(base: nn.Module, recipe: Recipe, seed: int) -> PeftModel:
    """`base` with freshly initialised LoRA adapters; the same seed gives the same adapters on every rank."""
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=cast(int, recipe.alpha),
        lora_dropout=recipe.dropout,
        target_modules=for_peft(recipe.targets),
        # text does not lead through a vision tower: its adapters would get no gradient, for which DDP would wait
        exclude_modules=tower_expression(cast(Any, base).config.model_type),
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast(PeftModel, get_peft_model(cast(Any, base), config))
    dtype = TORCH_DTYPES[recipe.lora_dtype]
    for parameter in trainable(model).values():
        parameter.data = parameter.data.to(dtype)
    return model


def saved(module: nn.Module) -> dict[str, nn.Parameter]:
    """What a checkpoint holds, by name: what is trained, or without adapters the whole model, a frozen tower too."""
    adapted = any(isinstance(part, PeftModel) for part in module.modules())
    return trainable(module) if adapted else dict(module.named_parameters())


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in the model's own order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
