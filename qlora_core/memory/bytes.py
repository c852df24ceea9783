"""Exact bytes of what stays: quantized weights and their constants, adapters, optimizer states.

Sources: bitsandbytes 0.50.2, functional.py (quantize_4bit, int8_vectorwise_quant) and optim/optimizer.py
(Optimizer2State); peft 0.21.2, tuners/lora/layer.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from qlora_core.architecture import Linear, ModelArchitecture
from qlora_core.recipe import DTYPE_BYTES, Dtype, Recipe
from qlora_core.targets import EXPERT_TARGETS, chosen, chosen_experts

NESTED_BLOCK = 256
"""absmax constants that share one second-level constant (functional.py, quantize_4bit)."""
CODE_BYTES = 16 * 4
"""The code book of a 4-bit weight, float32."""
NESTED_CODE_BYTES = 256 * 4
"""The code book of its quantized constants, float32."""
OFFSET_BYTES = 4
"""Mean of the absmax constants, float32."""
PAGED_NUMEL = 100_000
"""Tensors smaller than this are not paged (optim/optimizer.py, get_state_buffer)."""
QUANTIZED_STATE_NUMEL = 4096
"""Tensors smaller than this keep 32-bit state (optim/optimizer.py, min_8bit_size)."""
STATE_BLOCK = 256
"""Elements of 8-bit state that share one absmax (optim/optimizer.py, init_state)."""
STATE_CODE_BYTES = 2 * 256 * 4
"""The two code books of 8-bit states, once per optimizer."""


def absmax_count(numel: int, block_size: int) -> int:
    """Blocks, and so absmax constants, of a weight."""
    return -(-numel // block_size)


def constant_tensors(numel: int, block_size: int, double_quantization: bool) -> tuple[int, ...]:
    """Bytes of each constant tensor of one 4-bit weight of `numel` elements."""
    blocks = absmax_count(numel, block_size)
    if not double_quantization:
        return (4 * blocks, CODE_BYTES)
    return (blocks, 4 * -(-blocks // NESTED_BLOCK), NESTED_CODE_BYTES, CODE_BYTES, OFFSET_BYTES)


class Weights(NamedTuple):
    """The bytes of every tensor of a model's weights, by component: (bytes of one, how many)."""

    base: tuple[tuple[int, int], ...]
    constants: tuple[tuple[int, int], ...]
    unquantized: tuple[tuple[int, int], ...]


def stored_dtype(recipe: Recipe, compute: Dtype) -> Dtype:
    """Dtype of the weights that are not quantized."""
    return "float32" if recipe.upcast == "peft" else compute


def trainable_dtype(recipe: Recipe, compute: Dtype) -> Dtype:
    """Dtype of the trained weights: the adapters', or the whole model's with method full."""
    return stored_dtype(recipe, compute) if recipe.method == "full" else recipe.lora_dtype


def is_quantized(linear: Linear, recipe: Recipe) -> bool:
    """Whether bitsandbytes replaces `linear`."""
    return linear.quantized and recipe.quantization != "none"


@lru_cache(maxsize=256)
def weights(architecture: ModelArchitecture, recipe: Recipe, compute: Dtype) -> Weights:
    """All tensors of the base model as loaded on one rank, unsharded."""
    item = DTYPE_BYTES[stored_dtype(recipe, compute)]
    base: list[tuple[int, int]] = []
    constants: list[tuple[int, int]] = []
    other = [
        (architecture.embedding_parameters * item, 1),
        (architecture.head_parameters * item, 1),
        (architecture.other_parameters * item, 1),
    ]
    periods = architecture.periods
    if norms := architecture.layer_other_parameters:
        # norms are one tensor of [hidden] each; anything larger (3-D experts) is few tensors in each layer
        hidden, of_layer = architecture.hidden_size, norms // architecture.period
        pieces = architecture.period * (max(1, of_layer // hidden) if of_layer < 16 * hidden else 2)
        smaller = norms // pieces
        other.append((smaller * item, periods * (pieces - 1)))
        other.append(((norms - smaller * (pieces - 1)) * item, periods))
    if architecture.tower:
        other.append((architecture.tower.other_parameters * item, 1))
    for linear, count in architecture.all_linears():
        numel = linear.weight_numel
        if recipe.quantization == "none":
            base.append((numel * item, count))
        elif not is_quantized(linear, recipe):
            other.append((numel * item, count))
        elif recipe.quantization == "int8":
            base.append((numel, count))
            constants.append((4 * linear.out_features, count))
        else:
            base.append((-(-numel // 2), count))
            of_one = constant_tensors(numel, recipe.block_size, recipe.double_quantization)
            constants.extend((size, count) for size in of_one)
        if linear.bias:
            other.append((linear.out_features * item, count))
    return Weights(tuple(base), tuple(constants), tuple(other))


def buffer_bytes(architecture: ModelArchitecture) -> int:
    """Bytes of the tables that some models keep beside their weights; no rank is without all of them.

    A vision tower numbers its patches; GPT-BigCode has a causal mask, GPT-J and CodeGen sines and cosines in each layer
    (modeling_*.py); of the others what there is has a few numbers.
    """
    positions = architecture.max_position_embeddings
    if architecture.model_type == "gpt_bigcode":
        return positions * positions
    if architecture.model_type in ("codegen", "gptj"):
        rotated = architecture.config.get("rotary_dim", 64)
        width = rotated if isinstance(rotated, int) else architecture.hidden_size
        return 4 * architecture.num_layers * positions * width
    return architecture.tower.buffer_bytes if architecture.tower else 0


def is_target(linear: Linear, recipe: Recipe) -> bool:
    """Whether `linear` gets an adapter."""
    return recipe.method != "full" and chosen(recipe.targets, linear.path)


@lru_cache(maxsize=256)
def trainable_tensors(architecture: ModelArchitecture, recipe: Recipe) -> tuple[tuple[int, int], ...]:
    """Elements of each trainable tensor: (elements of one, how many).

    Raises:
        ValueError: there is none.
    """
    if recipe.method == "full":
        return tuple((numel, count) for numel, count in _all_tensors(architecture) if numel)
    tensors: list[tuple[int, int]] = []
    for linear in architecture.linears:
        if is_target(linear, recipe):
            count = architecture.periods * linear.count
            tensors.append((recipe.rank * linear.in_features, count))
            tensors.append((recipe.rank * linear.out_features, count))
            if recipe.use_dora:
                tensors.append((linear.out_features, count))
    tensors += expert_adapters(architecture, recipe)
    if not tensors:
        raise ValueError("nothing is trained: the recipe's targets name no linear layer of the model")
    return tuple(tensors)


def expert_adapters(architecture: ModelArchitecture, recipe: Recipe) -> Iterator[tuple[int, int]]:
    """Adapters of all layers' routers and experts, as elements of one and how many.

    Each expert has a rank of its own, gate and up together twice that.
    """
    hidden, inner, experts = architecture.hidden_size, architecture.expert_intermediate_size, architecture.experts
    router, gate_up, down = expert_ranks(architecture, recipe)
    parts = ((router, hidden, experts), (gate_up * experts, hidden, 2 * inner), (down * experts, inner, hidden))
    for rank, in_features, out_features in parts:
        if rank:
            yield rank * in_features, architecture.num_layers
            yield rank * out_features, architecture.num_layers


def expert_ranks(architecture: ModelArchitecture, recipe: Recipe) -> tuple[int, int, int]:
    """Rank of the adapters of the router and of each expert's gate and up together and down; 0 without."""
    names = EXPERT_TARGETS.get(architecture.model_type)
    if names is None or recipe.method == "full":
        return 0, 0, 0
    adapted = chosen_experts(recipe.targets, architecture.model_type)
    router, gate_up, down = (name in adapted for name in (names.router, names.fused[0], names.down))
    return router * recipe.rank, gate_up * 2 * recipe.rank, down * recipe.rank


def _all_tensors(architecture: ModelArchitecture) -> Iterator[tuple[int, int]]:
    """What method full trains: of a model that sees, the language model."""
    periods, others = architecture.periods, architecture.period - 1
    yield architecture.embedding_parameters, 1
    yield architecture.head_parameters, 1
    yield architecture.other_parameters, 1
    of_layer = architecture.layer_other_parameters // architecture.period
    if others:
        yield of_layer, periods * others
    yield architecture.layer_other_parameters - of_layer * others, periods
    for linear in architecture.linears:
        yield linear.weight_numel, periods * linear.count
        if linear.bias:
            yield linear.out_features, periods * linear.count


class OptimizerState(NamedTuple):
    """Bytes of the optimizer's state: on the device, and in managed memory."""

    resident: int
    paged: int


def optimizer_groups(tensors: Sequence[tuple[int, int]], recipe: Recipe) -> list[Sequence[tuple[int, int]]]:
    """Trainable tensors as the optimizer steps them, group by group: LoRA+ has A, then B and DoRA's magnitudes."""
    if recipe.loraplus_lr_ratio == 1:
        return [tensors]
    of_one = 3 if recipe.use_dora else 2
    return [tensors[::of_one], [each for index, each in enumerate(tensors) if index % of_one]]


def state_tensors(numel: int, recipe: Recipe, itemsize: int, paged: bool) -> tuple[list[int], int]:
    """Bytes of each tensor of state that AdamW keeps on the device of one trainable tensor, and its managed bytes.

    torch's AdamW keeps both moments in the weights' dtype (`itemsize` bytes); bitsandbytes', which is used where the
    state is 8-bit or paged, in float32 or block-wise in 8 bits.
    """
    eight = recipe.optimizer == "adamw_8bit"
    moment, constants = numel * (4 if eight or paged else itemsize), list[int]()
    if eight and numel >= QUANTIZED_STATE_NUMEL:
        moment, constants = numel, 2 * [4 * -(-numel // STATE_BLOCK)]
    if paged and numel >= PAGED_NUMEL:
        return constants, 2 * moment
    return [moment, moment, *constants], 0


def optimizer_state(tensors: Iterable[tuple[int, int]], recipe: Recipe, itemsize: int, paged: bool) -> OptimizerState:
    """That of all tensors, given as (elements of one, how many); 8-bit state has code books for all."""
    resident = managed = 0
    for numel, count in tensors:
        kept, moved = state_tensors(numel, recipe, itemsize, paged)
        resident += sum(kept) * count
        managed += moved * count
    return OptimizerState(resident + (STATE_CODE_BYTES if recipe.optimizer == "adamw_8bit" else 0), managed)
