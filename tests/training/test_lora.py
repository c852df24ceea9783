"""Adapters: on which base and how scaled; under autocast peft's own numbers, and nothing as large as the product."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from qlora_core.memory.measure import StorageTracker
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.lora import Update, adapt_under_autocast
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import attach_adapters, autocast_dtype, load_base, trainable

CPU = torch.device("cpu")
LORA: dict[str, Any] = {"method": "lora", "quantization": "none"}


def test_the_update_and_its_gradients_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    shapes = (2, 5, 7), (2, 5, 3), (4, 3), (7, 4)
    result, x, first, second = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def updated(result: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, Update.apply(result * 1, *others, 0.5))  # type: ignore[no-untyped-call]

    expected = result + (x @ first.T @ second.T) * 0.5
    assert torch.allclose(updated(result, x, first, second), expected, rtol=1e-12)
    assert torch.autograd.gradcheck(updated, (result, x, first, second))
    assert torch.autograd.gradcheck(updated, (result, x.mT.contiguous().mT, first, second))  # not as it is laid out


class Adapted(nn.Module):
    """A linear layer of 16 bits with an adapter that is not zero, as peft makes it."""

    def __init__(self, *, bias: bool, rank: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer: Any = nn.Linear(64, 96, bias=bias, dtype=torch.bfloat16)
        config = LoraConfig(r=rank, lora_alpha=8, target_modules=["layer"])
        self.layer = cast(Any, get_peft_model(cast(Any, self), config)).base_model.model.layer
        for weights in (self.layer.lora_A, self.layer.lora_B):
            weights["default"].weight.data = torch.randn(weights["default"].weight.shape) / 8

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Under autocast."""
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return cast(torch.Tensor, self.layer(x))


def results(adapted: Adapted, x: torch.Tensor, of_output: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and all gradients of the layer."""
    leaf = x.clone().requires_grad_()
    adapted.zero_grad()
    output = adapted(leaf)
    output.backward(of_output)  # type: ignore[no-untyped-call]
    gradients = {name: cast(torch.Tensor, weight.grad).clone() for name, weight in trainable(adapted).items()}
    return {"output": output.detach(), "x": cast(torch.Tensor, leaf.grad), **gradients}


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])  # with one, torch gives a view
def test_in_16_bits_it_is_nearer_to_the_exact_result_than_pefts_own(bias: bool) -> None:
    adapted = Adapted(bias=bias)
    torch.manual_seed(1)
    x, of_output = (torch.randn(2, 24, size, dtype=torch.bfloat16) for size in (64, 96))
    pefts = results(adapted, x, of_output)
    adapt_under_autocast(adapted)
    ours = results(adapted, x, of_output)
    exact = {
        name: weight.detach().double().requires_grad_()
        for name, weight in [("x", x), *((name, weight) for name, weight in adapted.named_parameters())]
    }
    base, first, second = (
        next(value for name, value in exact.items() if part in name) for part in ("base_layer.weight", "A", "B")
    )
    output = exact["x"] @ base.T + (exact["x"] @ first.T @ second.T) * 2  # alpha 8 at rank 4
    if bias:
        output = output + exact["layer.base_layer.bias"]
    output.backward(of_output.double())  # type: ignore[no-untyped-call]
    yardstick = {name: value.grad for name, value in exact.items()} | {"output": output.detach()}

    def far(found: dict[str, torch.Tensor]) -> dict[str, float]:
        wanted = {name: cast(torch.Tensor, yardstick[name]) for name in found}
        return {name: float((found[name].double() - wanted[name]).norm() / wanted[name].norm()) for name in found}

    of_ours, of_peft = far(ours), far(pefts)
    assert of_ours["output"] < of_peft["output"] < 0.01  # one rounding in place of three
    assert all(of_ours[name] <= 1.1 * of_peft[name] + 1e-4 for name in of_ours)


def test_nothing_is_made_that_is_as_large_as_the_layers_product() -> None:
    adapted, rows = Adapted(bias=False), 512
    x = torch.randn(1, rows, 64, dtype=torch.bfloat16, requires_grad=True)
    of_product = rows * 96 * 2
    peaks = {}
    for ours in (False, True):
        if ours:
            adapt_under_autocast(adapted)
        with StorageTracker() as tracker:
            adapted(x)
        peaks[ours] = tracker.peak / of_product
    assert peaks[False] > 3
    assert peaks[True] < 2  # the product itself and, as it is new to the tracker, its input, two thirds as large


@pytest.mark.parametrize("of_method", [{}, LORA], ids=["qlora", "lora"])
def test_an_adapter_keeps_its_layers_input_and_no_copy_of_it_or_of_a_weight(
    tiny_base: Path, of_method: dict[str, Any]
) -> None:
    recipe = Recipe(rank=4, autocast=True, **of_method)
    model = attach_adapters(load_base(str(tiny_base), recipe, Strategy(), "bfloat16", CPU), recipe, seed=0).train()
    module = SummedLoss(model, "full", autocast_dtype(recipe, "bfloat16"))
    layer = next(layer for name, layer in model.named_modules() if name.endswith("layers.1.mlp.up_proj"))
    kept: list[torch.Tensor] = []
    inputs: list[torch.Tensor] = []

    def forward(x: torch.Tensor) -> Any:
        inputs.append(x)
        with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):  # type: ignore[func-returns-value]
            return plain(x)

    plain, layer.forward = layer.forward, forward
    module(*2 * [torch.randint(5, 200, (2, 24))])
    own = {inputs[0].data_ptr(), *(weight.data_ptr() for weight in layer.parameters())}
    copies = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert any(tensor.data_ptr() == inputs[0].data_ptr() for tensor in kept)
    assert [tensor.shape for tensor in copies if tensor.dim()] == [(48, 4)]  # what is between its two matrices


@pytest.mark.parametrize("use_autocast", [False, True])
@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])  # by the rank, 4, or its root
def test_an_adapter_s_product_is_scaled_by_alpha_over_the_rank_or_in_rslora_over_its_root(
    tiny_base: Path, use_rslora: bool, scale: float, use_autocast: bool
) -> None:
    recipe = Recipe(rank=4, alpha=16, use_rslora=use_rslora, autocast=use_autocast)
    model = attach_adapters(load_base(str(tiny_base), recipe, Strategy(), "bfloat16", CPU), recipe, seed=0)
    SummedLoss(model, "full", autocast_dtype(recipe, "bfloat16"))
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert len(layers) == 2 * 7
    torch.manual_seed(0)
    for layer in layers:
        first, second = (matrices["default"].weight.detach() for matrices in (layer.lora_A, layer.lora_B))
        second.normal_()
        x = torch.randn(1, 24, layer.in_features, dtype=torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=use_autocast):
            added = layer(x) - layer.base_layer(x)
        expected = scale * x.float() @ first.T @ second.T
        assert float((added - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("double_quantization", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_a_4_bit_base_has_the_recipe_s_format_and_its_constants_are_quantized_again_or_not(
    tiny_base: Path, quantization: Any, double_quantization: bool
) -> None:
    recipe = Recipe(rank=4, quantization=quantization, double_quantization=double_quantization)
    base = load_base(str(tiny_base), recipe, Strategy(), "float32", CPU)
    states = [layer.weight.quant_state for layer in base.modules() if isinstance(layer, Linear4bit)]
    assert len(states) == 2 * 7
    assert {(state.quant_type, state.nested) for state in states} == {(quantization, double_quantization)}
    assert {state.absmax.dtype for state in states} == {torch.uint8 if double_quantization else torch.float32}


def test_variants_of_lora_several_adapters_and_none_are_pefts_own() -> None:
    adapted = Adapted(bias=False)
    layer = cast(Any, adapted.layer)
    torch.manual_seed(1)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)

    def with_peft_and_ours() -> tuple[torch.Tensor, torch.Tensor]:
        of_peft = type(layer).forward
        with torch.autocast("cpu", torch.bfloat16):
            return of_peft(layer, x), layer(x)

    adapt_under_autocast(adapted)
    assert not torch.equal(*with_peft_and_ours())  # rounded once in place of three times
    layer.lora_variant["default"] = Doubled()
    assert torch.equal(*with_peft_and_ours())
    del layer.lora_variant["default"]
    layer.update_layer("another", 2, 4, init_lora_weights=False, config=LoraConfig(init_lora_weights=False))
    layer.set_adapter(["default", "another"])
    assert torch.equal(*with_peft_and_ours())
    layer.enable_adapters(False)
    assert torch.equal(*with_peft_and_ours())


class Doubled:
    """A variant that gives twice the layer's product."""

    @staticmethod
    def forward(layer: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        """See peft's LoraVariant."""
        return result * 2


def test_peft_is_told_to_leave_inputs_as_they_are() -> None:
    adapted = Adapted(bias=False)
    adapt_under_autocast(adapted)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    assert cast(Any, adapted.layer)._cast_input_dtype(x, torch.float32) is x


def test_what_is_not_in_autocasts_dtype_stays_as_it_is() -> None:
    adapted = Adapted(bias=False)
    adapt_under_autocast(adapted)
    layer = cast(Any, adapted.layer)
    layer.base_layer.float()
    x = torch.randn(2, 3, 64)
    product = layer.base_layer(x)
    expected = product + layer.lora_B["default"](layer.lora_A["default"](x)) * 2
    assert torch.equal(layer(x), expected)
