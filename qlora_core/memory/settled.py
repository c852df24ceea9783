"""How the weights lie in the caching allocator once they are loaded: how much larger its blocks are than they need be.

`loading.py` runs the real loading; this plays the requests that it is known to make, a few layers of them, and takes
the rest to go on alike.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from qlora_core.architecture import ModelArchitecture
from qlora_core.memory import bytes as exact
from qlora_core.memory.allocator import CachingAllocator
from qlora_core.memory.device import Device
from qlora_core.recipe import DTYPE_BYTES, Recipe

PLAYED_LAYERS = 12
"""From half of them on, each layer is taken to leave as much as those before it did."""
HALF = PLAYED_LAYERS // 2


class Settled(NamedTuple):
    """Bytes after loading, adapters included.

    Attributes:
        slack: allocated beyond what was asked for, rounding to 512 bytes included.
        reserved: all segments.
        holes: what is free in segments of large blocks.
    """

    slack: int
    reserved: int
    holes: tuple[int, ...]


@lru_cache(maxsize=64)
def settled(architecture: ModelArchitecture, recipe: Recipe, device: Device) -> Settled:
    """The weights of `architecture` after loading; `recipe` of any length."""
    layers = architecture.num_layers
    if layers <= PLAYED_LAYERS:
        return _play(architecture, recipe, device, layers)
    some, more = (_play(architecture, recipe, device, count) for count in (HALF, PLAYED_LAYERS))
    beyond = layers - PLAYED_LAYERS
    slack, reserved = (last + (last - first) * beyond // HALF for first, last in zip(some[:2], more[:2], strict=True))
    # sizes that come up again and again; another one has grown, or shrunk, with the number of layers
    before = Counter(some.holes)
    again = (Counter(more.holes) - before).items()
    holes = more.holes + tuple(size for size, count in again if before[size] for _ in range(count * beyond // HALF))
    return Settled(slack, reserved, holes)


def _play(architecture: ModelArchitecture, recipe: Recipe, device: Device, layers: int) -> Settled:
    memory = CachingAllocator()
    item = DTYPE_BYTES[device.compute_dtype]
    plain = _unquantized(architecture, item)
    packed = [
        (linear, exact.is_quantized(linear, recipe), linear.bias)
        for linear in sorted(architecture.linears, key=lambda each: (each.part == "attention", each.name))
        for _ in range(linear.count)
    ]
    weights = sum(linear.weight_numel * item // (4 if quantized else 1) for linear, quantized, _ in packed)
    requested = 0
    if device.warmed_up:
        memory.release(memory.allocate(max(sum(plain) + layers * weights, 1)))
    held = []

    def keep(size: int) -> None:
        nonlocal requested
        requested += size
        held.append((memory.allocate(size), size))

    before, norms, after = plain[:-2], plain[-2], plain[-1]
    for size in before:
        if size:
            keep(size)
    for _ in range(layers):
        for linear, quantized, bias in packed:
            numel = linear.weight_numel
            if bias:
                keep(linear.out_features * item)
            if not quantized:
                keep(numel * item)
                continue
            value = memory.allocate(numel * item)
            keep(-(-numel // 2))
            constants = exact.constant_tensors(numel, recipe)
            if recipe.double_quantization:
                blocks = 4 * exact.absmax_count(numel, recipe.block_size)
                absmax, shifted = memory.allocate(blocks), memory.allocate(blocks)
                for size in constants:
                    keep(size)
                memory.release(shifted)
                memory.release(absmax)
            else:
                for size in constants:
                    keep(size)
            memory.release(value)
        if norms:
            keep(norms)
    if after:
        keep(after)
    if recipe.upcast == "peft" and item == 2:
        for index, (block, size) in enumerate(held):
            if size in plain or recipe.quantization == "none":
                held[index] = memory.allocate(2 * size), 2 * size
                requested += size
                memory.release(block)
    if device.emptied_after_load:
        memory.empty_cache()
    trained = DTYPE_BYTES[exact.trainable_dtype(recipe, device.compute_dtype)]
    if recipe.method != "full":
        for _ in range(layers):
            for linear in architecture.linears:
                if exact.is_target(linear, recipe):
                    keep(recipe.rank * linear.in_features * trained)
                    keep(recipe.rank * linear.out_features * trained)
    return Settled(memory.allocated - requested, memory.reserved, memory.holes())


def _unquantized(architecture: ModelArchitecture, item: int) -> list[int]:
    """Bytes of the output head and the embedding, of one layer's norms together, and of what comes last."""
    return [
        architecture.head_parameters * item,
        architecture.embedding_parameters * item,
        architecture.layer_other_parameters * item,
        architecture.other_parameters * item,
    ]
