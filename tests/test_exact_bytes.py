"""What is counted without a GPU is what bitsandbytes and peft allocate: to the byte, component by component."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import bitsandbytes.functional
import pytest
import torch
from meta_models import on_meta
from peft import prepare_model_for_kbit_training
from test_architecture import CASES
from torch import nn
from transformers import AutoConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from qlora_core import catalogue
from qlora_core.catalogue import find_model, list_models
from qlora_core.huggingface.config import architecture_from_config
from qlora_core.memory.device import Device
from qlora_core.memory.measure import quantization_constants
from qlora_core.memory.residents import residents
from qlora_core.recipe import Dtype, Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.model import attach_adapters, load_base, model_class, quantization_config

STRATEGY = Strategy(attention="eager")
"""Eager, because it is the attention that every family has."""
Sizes = Counter[str]
QUANTIZED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def said(architecture: Any, recipe: Recipe, dtype: Dtype) -> Sizes:
    """Bytes by component, as the memory model has them."""
    loaded = residents(architecture, recipe, STRATEGY, Device(kind="cpu", compute_dtype=dtype)).loaded
    return +Counter(loaded)


def held(model: nn.Module, recipe: Recipe) -> Sizes:
    """Bytes of all storages of a model, by component. Each is counted once: tied embeddings share theirs.

    The base weights are those of the quantized linear layers, or, where nothing is to be quantized, of all but the
    output head. Of buffers, those that are tables are counted, and rotary frequencies and the like left out.
    """
    seen: dict[int, tuple[str, int]] = {}

    def hold(part: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            storage = tensor.untyped_storage()
            seen.setdefault(storage._cdata, (part, storage.nbytes()))

    head = model.get_output_embeddings()  # type: ignore[operator]
    kinds = (nn.Linear, Conv1D) if recipe.quantization == "none" else QUANTIZED
    linears = [module for module in model.modules() if isinstance(module, kinds) and module is not head]
    base = {id(module.weight) for module in linears}
    for name, parameter in model.named_parameters():
        part = "base_weights" if id(parameter) in base else "unquantized_weights"
        hold("lora_weights" if "lora_" in name else part, parameter)
        if (state := getattr(parameter, "quant_state", None)) is not None:
            for tensor in quantization_constants(state):
                hold("quantization_constants", tensor)
    for buffer in model.buffers():
        if buffer.dim() > 1:
            hold("unquantized_weights", buffer)
    for module in linears:
        if isinstance(module, bnb.nn.Linear8bitLt):
            hold("quantization_constants", module.weight.SCB)
            hold("quantization_constants", module.state.SCB)
    sizes: Sizes = Counter()
    for part, size in seen.values():
        sizes[part] += size
    return +sizes


# --- small models of every family, really quantized -------------------------------------------------------------------


def loaded(folder: Path, fields: dict[str, Any], recipe: Recipe, dtype: Dtype) -> nn.Module:
    """A random model, saved, then loaded by our own training."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**fields)
    model_class(config).from_config(config).to(torch.bfloat16).save_pretrained(folder)
    base = load_base(str(folder), recipe, STRATEGY, dtype, torch.device("cpu"))
    if recipe.upcast == "peft":
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)  # in place
    model: nn.Module = attach_adapters(base, recipe, seed=0)
    return model


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_a_small_model_of_every_family(model_type: str, fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {"model_type": model_type, **fields}
    recipe = Recipe(rank=4)
    architecture = architecture_from_config(fields, name="small", source="test")
    assert said(architecture, recipe, "bfloat16") == held(loaded(tmp_path, fields, recipe, "bfloat16"), recipe)


FAMILIES: dict[str, dict[str, Any]] = {
    case.id: {"model_type": case.values[0], **case.values[1]}  # type: ignore[dict-item]
    for case in CASES
    if case.id in ("llama-1", "qwen2-0", "gemma2-1", "mixtral-0", "qwen3_moe-0", "falcon-2", "gpt2-0")
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"double_quantization": False}, "float16"),
        ({"quantization": "fp4", "rank": 7}, "float32"),
        ({"quantization": "int8"}, "float16"),
        ({"lora_dtype": "bfloat16"}, "bfloat16"),
        ({"upcast": "peft"}, "bfloat16"),
        ({"method": "lora", "quantization": "none"}, "bfloat16"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_a_small_model_under_other_recipes(family: str, changes: dict[str, Any], dtype: Dtype, tmp_path: Path) -> None:
    recipe = Recipe(**{"rank": 4, **changes})
    architecture = architecture_from_config(FAMILIES[family], name="small", source="test")
    assert said(architecture, recipe, dtype) == held(loaded(tmp_path, FAMILIES[family], recipe, dtype), recipe)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama-1", ("q_proj", "v_proj")),
        ("mixtral-0", ("q_proj", "w1", "w3", "w2")),
        ("qwen3_moe-0", ("gate", "down_proj")),
    ],
)
def test_a_small_model_with_some_targets(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    recipe = Recipe(rank=4, targets=targets)
    architecture = architecture_from_config(FAMILIES[family], name="small", source="test")
    assert said(architecture, recipe, "bfloat16") == held(
        loaded(tmp_path, FAMILIES[family], recipe, "bfloat16"), recipe
    )


# --- every model of the catalogue, on the meta device -----------------------------------------------------------------


@pytest.fixture
def _code_book_for_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made on the meta device, bitsandbytes' 8-bit map would have no values to check itself with."""
    monkeypatch.setitem(bitsandbytes.functional.name2qmap, "dynamic", bitsandbytes.functional.create_dynamic_map())


def quantize_on_meta(model: nn.Module, kind: Literal["nf4", "fp4"]) -> None:
    """Do to every layer what loading does: packed bytes with a QuantState for the weight, 16 bits for the bias."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = module.weight.to(torch.bfloat16)
            packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=True, quant_type=kind)
            module.weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.to(torch.bfloat16), requires_grad=False)


NAMES = [listed.entry.name for listed in list_models()]
QUICK = [listed.entry.name for listed in list_models() if listed.parameters < 2**34]
SAMPLE = random.Random(0).sample(QUICK, 10)
"""What is looked at every time; `make grids` looks at all."""


@pytest.mark.usefixtures("_code_book_for_meta")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SAMPLE else pytest.mark.grid) for name in NAMES]
)
def test_every_model_of_the_catalogue(name: str) -> None:
    fields = json.loads((Path(catalogue.__file__).parent / "models" / f"{name}.json").read_bytes())
    recipe = Recipe()
    model = on_meta(fields)
    skipped = get_keys_to_not_convert(model)
    for parameter in model.parameters():  # as from_pretrained does: tables stay as they were made
        parameter.data = parameter.data.to(torch.bfloat16)
    config = quantization_config(recipe, torch.bfloat16)
    model = replace_with_bnb_linear(model, modules_to_not_convert=skipped, quantization_config=config)
    quantize_on_meta(model, "nf4")
    assert said(find_model(name), recipe, "bfloat16") == held(attach_adapters(model, recipe, seed=0), recipe)
