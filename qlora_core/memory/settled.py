"""How the weights lie in the caching allocator once they are loaded: how much larger its blocks are than they need be.

`loading.py` runs the real loading; this plays the requests that it is known to make, a few layers of them, and takes
the rest to go on alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from qlora_core.architecture import Linear, ModelArchitecture
from qlora_core.memory import bytes as exact
from qlora_core.memory.allocator import Block, CachingAllocator
from qlora_core.memory.arrivals import arrivals
from qlora_core.memory.device import Device
from qlora_core.recipe import DTYPE_BYTES, Quantization, Recipe, Upcast

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


class Loading(NamedTuple):
    """What the loading of a base model depends on beside the model.

    Attributes:
        item: bytes of an element that is not quantized.
        quantization, double_quantization, block_size, upcast: as in a Recipe.
        warmed_up, emptied_after_load: as in a Device.
        threads, draw: as in `arrivals`.
    """

    item: int
    quantization: Quantization
    double_quantization: bool
    block_size: int
    upcast: Upcast
    warmed_up: bool
    emptied_after_load: bool
    threads: int = 0
    draw: int = 0


class Weight(NamedTuple):
    """A linear weight on its way: elements, bytes of its bias, and of its constants if it is quantized."""

    numel: int
    bias: int
    constants: tuple[int, ...]


class Loaded(NamedTuple):
    """A base model in the allocator, and the bytes that were asked for it. Not to be changed: others get it too."""

    memory: CachingAllocator
    requested: int


def settled(architecture: ModelArchitecture, recipe: Recipe, device: Device) -> Settled:
    """The weights of `architecture` after loading; `recipe` of any length."""
    return _settled(architecture, *_loading(architecture, recipe, device))


def loaded(architecture: ModelArchitecture, recipe: Recipe, device: Device, draw: int) -> CachingAllocator:
    """The allocator when all layers are loaded, adapters included: for requests only."""
    loading, adapters = _loading(architecture, recipe, device)
    loading = loading._replace(threads=device.loading_threads, draw=draw)
    memory = _base(architecture, loading, architecture.periods).memory.fork()
    for size in adapters * architecture.periods:
        memory.allocate(size)
    return memory


def _loading(architecture: ModelArchitecture, recipe: Recipe, device: Device) -> tuple[Loading, tuple[int, ...]]:
    """What loading depends on, and the bytes of one period's adapters; a layer, here, is a period."""
    loading = Loading(
        DTYPE_BYTES[device.compute_dtype],
        recipe.quantization,
        recipe.double_quantization,
        recipe.block_size,
        recipe.upcast,
        device.warmed_up,
        device.emptied_after_load,
    )
    item = DTYPE_BYTES[exact.trainable_dtype(recipe, device.compute_dtype)]
    adapters: list[int] = []
    for linear in architecture.linears:
        if exact.is_target(linear, recipe):
            of_one = (recipe.rank * linear.in_features * item, recipe.rank * linear.out_features * item)
            adapters += (of_one + (linear.out_features * item,) * recipe.use_dora) * linear.count
    for numel, count in exact.expert_adapters(architecture, recipe):
        adapters += [numel * item] * (count // architecture.periods)
    return loading, tuple(adapters)


@lru_cache(maxsize=256)
def _settled(architecture: ModelArchitecture, loading: Loading, adapters: tuple[int, ...]) -> Settled:
    layers = architecture.periods
    if layers <= PLAYED_LAYERS:
        return _with_adapters(_base(architecture, loading, layers), adapters * layers)
    some, more = (
        _with_adapters(_base(architecture, loading, count), adapters * count) for count in (HALF, PLAYED_LAYERS)
    )
    beyond = layers - PLAYED_LAYERS
    slack, reserved = (last + (last - first) * beyond // HALF for first, last in zip(some[:2], more[:2], strict=True))
    # sizes that come up again and again; another one has grown, or shrunk, with the number of layers
    before = Counter(some.holes)
    again = (Counter(more.holes) - before).items()
    holes = more.holes + tuple(size for size, count in again if before[size] for _ in range(count * beyond // HALF))
    # no block is smaller than what was asked for, whichever way a few layers lead
    return Settled(max(slack, 0), reserved, holes)


def _with_adapters(base: Loaded, adapters: tuple[int, ...]) -> Settled:
    """The base model, and after it adapters of these bytes."""
    memory = base.memory.fork()
    for size in adapters:
        memory.allocate(size)
    return Settled(memory.allocated - base.requested - sum(adapters), memory.reserved, memory.holes())


def constants_of(linear: Linear, loading: Loading) -> tuple[int, ...]:
    """Bytes of each tensor beside a quantized weight; none where it is not quantized."""
    if loading.quantization == "none" or not linear.quantized:
        return ()
    if loading.quantization == "int8":
        return (4 * linear.out_features,)
    return exact.constant_tensors(linear.weight_numel, loading.block_size, loading.double_quantization)


def weight_of(linear: Linear, loading: Loading) -> Weight:
    """One of the weights of `linear`."""
    bias = linear.out_features * loading.item if linear.bias else 0
    return Weight(linear.weight_numel, bias, constants_of(linear, loading))


@lru_cache(maxsize=64)
def _base(architecture: ModelArchitecture, loading: Loading, layers: int) -> Loaded:
    """The base model, as if it had so many layers."""
    memory = CachingAllocator()
    item = loading.item
    plain = _unquantized(architecture, item)
    of_layer = [
        weight_of(linear, loading)
        for linear in sorted(architecture.linears, key=lambda each: (each.part == "attention", each.name))
        for _ in range(linear.count)
    ]
    tower = architecture.tower
    beside = [weight_of(linear, loading) for linear in tower.linears for _ in range(linear.count)] if tower else []
    per_byte = 1 if loading.quantization == "int8" else 2
    if loading.warmed_up:
        # transformers asks for that of each quantized element, whatever it comes in (quantized_element_size)
        in_linears = sum(
            weight.numel // per_byte if weight.constants else weight.numel * item
            for weight in (*of_layer * layers, *beside)
        )
        memory.release(memory.allocate(max(sum(plain) + in_linears, 1)))
    before, norms, after, idle = plain[:-3], *plain[-3:]
    arriving: list[tuple[int, Weight | None]] = [(size, None) for size in before]
    for _ in range(layers):
        arriving += [*_arriving(of_layer, item), (norms, None)]
    arriving += [(after, None), *_arriving(beside, item), (idle, None)]
    arriving = [each for each in arriving if each[0]]
    held: list[tuple[Block, int]] = []
    come: dict[int, Block] = {}
    sizes = [size for size, _ in arriving]
    for number, comes in arrivals(sizes, loading.threads, loading.draw):
        size, weight = arriving[number]
        if comes:
            come[number] = memory.allocate(size)
            continue
        value = come.pop(number)
        if weight is None:
            held.append((value, size))
            continue
        packed = -(-weight.numel // per_byte)
        held.append((memory.allocate(packed), packed))
        passing = []
        if loading.double_quantization:
            blocks = 4 * exact.absmax_count(weight.numel, loading.block_size)
            passing = [memory.allocate(blocks), memory.allocate(blocks)]  # absmax, and less its mean
        held += [(memory.allocate(each), each) for each in weight.constants]
        for block in reversed(passing):
            memory.release(block)
        memory.release(value)
    requested = sum(size for _, size in held)
    if loading.upcast == "peft" and item == 2:
        for index, (block, size) in enumerate(held):
            if size in plain or loading.quantization == "none":
                held[index] = memory.allocate(2 * size), 2 * size
                requested += size
                memory.release(block)
    if loading.emptied_after_load:
        memory.empty_cache()
    return Loaded(memory, requested)


def _arriving(weights: Iterable[Weight], item: int) -> Iterator[tuple[int, Weight | None]]:
    """The bytes of each tensor as it comes, and the weight where it is quantized then."""
    for weight in weights:
        if weight.bias:
            yield weight.bias, None
        yield weight.numel * item, weight if weight.constants else None


def _unquantized(architecture: ModelArchitecture, item: int) -> list[int]:
    """Bytes of the output head and the embedding, of one layer's norms together, of the last norm, of a tower's."""
    return [
        architecture.head_parameters * item,
        architecture.embedding_parameters * item,
        architecture.layer_other_parameters * item,
        architecture.other_parameters * item,
        architecture.tower.other_parameters * item if architecture.tower else 0,
    ]
