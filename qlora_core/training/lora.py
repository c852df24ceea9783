"""How adapters compute under autocast: without casts for nothing, and added into the product of their layer.

Shapes: B micro-batch, S sequence, T = B * S tokens, I and O features that go in and come out, R rank.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

ADDED_TO = (Linear, Linear4bit)
"""peft's adapted layers whose products are added to. An int8 layer's may be a view that autograd refuses to change."""


def adapt_under_autocast(model: nn.Module) -> None:
    """Have the adapters of a model compute as one needs that runs under autocast only.

    peft gives an input the dtype of the adapter's weights, float32, and autocast makes it narrow again: two copies for
    nothing, of which the second stays for the backward pass. Only a quantized layer leaves it where autocast is on, and
    asks for CUDA's (peft 0.21.2, tuners/lora/bnb.py and layer.py). Nor are there a 4-bit layer's product a second time,
    but where it is a view, the adapter's product, that product scaled, and their sum.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False
        if isinstance(module, ADDED_TO):
            module.forward = MethodType(forward, module)


def forward(layer: Any, x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
    """[B, S, I] -> [B, S, O]: the layer's product, to which one plain adapter's is added where it lies.

    All else is peft's own, and so is ZeRO-3, which gathers a weight when its module is called.
    """
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    if others or named or layer.disable_adapters or layer.merged or layer.lora_variant or name not in layer.lora_A:
        return cast(torch.Tensor, type(layer).forward(layer, x, *others, **named))
    first, second, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    if hasattr(first.weight, "ds_id") or second.bias is not None:
        return cast(torch.Tensor, type(layer).forward(layer, x))
    result = layer.base_layer(x)
    x = layer.lora_dropout[name](x)
    device = x.device.type
    if not torch.is_autocast_enabled(device) or result.dtype != torch.get_autocast_dtype(device):
        return cast(torch.Tensor, result + second(first(x)) * scaling)
    if result._is_view():  # autograd would follow a change of it through its base, with copies
        result = result.clone()
    return cast(torch.Tensor, Update.apply(result, x, first.weight, second.weight, scaling))  # type: ignore[no-untyped-call]


class Update(torch.autograd.Function):
    """result += x A^T B^T * scaling, in the dtype of `result`; it keeps x, x A^T and the weights as they are."""

    @staticmethod
    def forward(
        ctx: Any, result: torch.Tensor, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """[B, S, O], [B, S, I], [R, I], [O, R] -> [B, S, O]."""
        dtype = result.dtype
        ctx.mark_dirty(result)
        ctx.of_x, ctx.scaling = x.dtype, scaling
        x = x.to(dtype)
        inner_TR = F.linear(x.flatten(0, -2), first.to(dtype))
        result.view(-1, result.shape[-1]).addmm_(inner_TR, second.to(dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, inner_TR, first, second)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of `result`, of x and of both weights, each in its own dtype."""
        x, inner_TR, first, second = ctx.saved_tensors
        dtype = inner_TR.dtype
        gradient_TO = gradient.flatten(0, -2)
        of_second = (gradient_TO.t() @ inner_TR).mul_(ctx.scaling)
        of_inner_TR = (gradient_TO @ second.to(dtype)).mul_(ctx.scaling)
        of_first = of_inner_TR.t() @ x.flatten(0, -2)
        of_x = None
        if ctx.needs_input_grad[1]:
            of_x = x.new_empty(x.shape)  # no view of a product, which nothing could be added to in place
            torch.mm(of_inner_TR, first.to(dtype), out=of_x.view(-1, x.shape[-1]))
            of_x = of_x.to(ctx.of_x)
        return gradient, of_x, of_first.to(first.dtype), of_second.to(second.dtype), None
