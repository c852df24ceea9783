"""What the device achieves of each rate that a step's time is made of: `python -m benchmarks.gpu.rates` prints it.

The kernels are those of a training step at its shapes, 2,048 and 8,192 tokens of Llama 3.1 8B: what
`qlora_core.step_time` takes from others' documents where nothing was measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch.utils.benchmark import Timer

from qlora_core.step_time import READ_PER_DEQUANTIZED


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured.

    Attributes:
        tokens: of micro-batches.
        hidden, inner, narrow: widths of a layer, of its feed-forward and of its keys and values.
        heads: of attention; each 128 wide, or as wide as fits.
        ranks: of adapters.
        copied: bytes to and from the host.
        seconds: that each is repeated for, at least.
    """

    tokens: tuple[int, ...] = (2048, 8192)
    hidden: int = 4096
    inner: int = 14336
    narrow: int = 1024
    heads: int = 32
    ranks: tuple[int, ...] = (16, 64)
    copied: int = 2**28
    seconds: float = 0.2


SMALL = Sizes(tokens=(64, 128), hidden=256, inner=704, narrow=128, heads=8, ranks=(8,), copied=2**20, seconds=0.01)
"""For a dry run on a CPU."""


def measured(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Operations, bytes or kernels a second, by what it is and by shape."""
    found: dict[str, dict[str, float]] = {}
    for what, shape, done, call in everything(device, dtype, sizes):
        found.setdefault(what, {})[shape] = done / seconds(call, sizes.seconds)
    return found


def seconds(call: Callable[[], Any], at_least: float) -> float:
    """The median of `call`, the device's kernels included, over blocks of calls that take so long together."""
    return Timer("call()", globals={"call": call}).blocked_autorange(min_run_time=at_least).median


Measured = tuple[str, str, float, Callable[[], Any]]
"""What it is, its shape, how much of it is done by a call, and the call."""


def everything(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Measured]:
    """All that is measured, one after the other."""
    torch.backends.cuda.matmul.allow_tf32 = False
    for tokens in sizes.tokens:
        x = torch.randn(tokens, sizes.inner, device=device, dtype=dtype)
        yield from products(x, sizes)
        yield from wide_products(x, sizes)
        yield from attention(x, sizes)
        yield from memory(x)
    yield from dequantization(device, dtype, sizes)
    yield from to_host(device, sizes)
    yield starting(device)


def products(x: torch.Tensor, sizes: Sizes) -> Iterator[Measured]:
    """Of a base weight, as its forward pass makes them."""
    for width, outputs in ((sizes.hidden, sizes.hidden), (sizes.hidden, sizes.inner), (sizes.inner, sizes.hidden)):
        yield product("products", x[:, :width].contiguous(), outputs)


def wide_products(x: torch.Tensor, sizes: Sizes) -> Iterator[Measured]:
    """Of an adapter in float32, down to its rank and up again."""
    shapes = ((sizes.hidden, rank) for rank in sizes.ranks), ((rank, sizes.hidden) for rank in sizes.ranks)
    for width, outputs in chain.from_iterable(shapes):
        yield product("wide_products", x[:, :width].float(), outputs)


def product(what: str, inputs: torch.Tensor, outputs: int) -> Measured:
    """Of a weight in the dtype of its inputs: 2 operations a token and weight."""
    tokens, width = inputs.shape
    weight = inputs.new_empty(outputs, width).normal_()
    shape = f"{tokens} x {width} x {outputs}"
    return what, shape, 2.0 * tokens * width * outputs, partial(torch.matmul, inputs, weight.T)


def attention(x: torch.Tensor, sizes: Sizes) -> Iterator[Measured]:
    """Causal, one sequence, forward and backward: 3.5 times 4 operations a head's width and pair, of which half."""
    tokens, width = len(x), sizes.hidden // sizes.heads
    query, key, value = (
        x[:, : sizes.hidden].reshape(1, tokens, sizes.heads, width).transpose(1, 2).detach().requires_grad_()
        for _ in range(3)
    )
    given = torch.ones_like(query)

    def call() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        torch.autograd.grad(out, (query, key, value), given)

    done = 3.5 * 4 * sizes.hidden * tokens * tokens / 2
    yield "attention", f"{tokens} tokens, {sizes.heads} heads of {width}", done, call


def memory(x: torch.Tensor) -> Iterator[Measured]:
    """Kernels that read and write and hardly compute."""
    size = x.numel() * x.element_size()
    shape = f"{len(x)} x {x.shape[1]}"
    other, out = torch.randn_like(x), torch.empty_like(x)
    yield "memory", f"add, {shape}", 3.0 * size, partial(torch.add, x, other, out=out)
    yield "memory", f"silu, {shape}", 2.0 * size, partial(torch.nn.functional.silu, x)


def dequantization(device: torch.device, dtype: torch.dtype, sizes: Sizes) -> Iterator[Measured]:
    """4-bit weights to 16-bit ones by bitsandbytes' kernel, as many bytes as the model counts for it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for outputs, width in ((sizes.narrow, sizes.hidden), (sizes.hidden, sizes.hidden), (sizes.inner, sizes.hidden)):
        packed, state = quantize_4bit(
            torch.randn(outputs, width, device=device, dtype=dtype), blocksize=64, quant_type="nf4"
        )
        done = READ_PER_DEQUANTIZED * outputs * width * dtype.itemsize
        yield (
            "dequantization",
            f"{outputs} x {width}",
            done,
            partial(dequantize_4bit, packed, state),
        )


def to_host(device: torch.device, sizes: Sizes) -> Iterator[Measured]:
    """Pinned memory, both directions, one at a time."""
    there = torch.empty(sizes.copied, dtype=torch.uint8, device=device)
    here = torch.empty(sizes.copied, dtype=torch.uint8, pin_memory=device.type == "cuda")
    yield "pcie", "to the GPU", float(sizes.copied), partial(there.copy_, here, non_blocking=True)
    yield "pcie", "to the host", float(sizes.copied), partial(here.copy_, there, non_blocking=True)


def starting(device: torch.device, count: int = 500) -> Measured:
    """Kernels of one number each, forward and backward by autograd: what starts them is all that takes time."""
    first = torch.ones(1, device=device, requires_grad=True)

    def call() -> None:
        x = first
        for _ in range(count):
            x = x * 1.0001
        torch.autograd.grad(x, first)

    return "starting", f"{count} products and their gradients", 2.0 * count, call


def main() -> None:
    """Measure on `cuda` or `cpu`, the first argument, in the dtype that is the second; small shapes on a CPU."""
    kind, dtype = sys.argv[1:]
    sizes = Sizes() if kind == "cuda" else SMALL
    found = measured(torch.device(kind), getattr(torch, dtype), sizes)
    json.dump({"compute_dtype": dtype, "measured": found}, sys.stdout)


if __name__ == "__main__":
    main()
