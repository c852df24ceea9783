"""What one micro-batch computes and moves: floating-point operations by kind, bytes written, kernels started.

Products are counted from the model's shapes. Everything else is read off the tape (`memory/tape.py`), which makes each
tensor that transformers, peft and bitsandbytes make: its bytes are what a kernel writes, and there is about one kernel
for each. A frozen weight has no gradient, so the backward pass of a linear layer is one product and not two.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from qlora_core.architecture import ModelArchitecture
from qlora_core.memory import bytes as exact
from qlora_core.memory.attention import AttentionKernel, is_masked
from qlora_core.memory.device import Device
from qlora_core.memory.formula import ENDLESS, kernel_in_use, step_of
from qlora_core.memory.step import LAST, forward
from qlora_core.memory.tape import NOTHING, Size, Tape
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

CAUSAL = 2
"""Kernels that never hold the scores skip those above the diagonal: half of them."""
FUSED_BACKWARD = 2.5
"""Backward products of fused attention for each forward one: five for two, the scores are made again (Dao 2023,
"FlashAttention-2", section 4.1)."""
FUSED: frozenset[AttentionKernel] = frozenset({"flash", "efficient", "flash_cpu"})


class Work(NamedTuple):
    """Of one micro-batch of B sequences of S tokens on one rank, all layers and passes, recomputation included.

    Attributes:
        products: operations of matrix products in the compute dtype, per token.
        wide_products: those in float32, for which there are no tensor cores unless TF32 is allowed, per token.
        attention: operations of attention's products, per token and position (B*S*S).
        wide_attention: whether attention computes in float32.
        fused: whether attention is one kernel that never holds the scores.
        written: bytes that kernels write, dequantization apart: coefficients of 1, S, B*S, B*S*S.
        dequantized: bytes of the dequantized weights that are written.
        kernels: how many are started.
    """

    products: float
    wide_products: float
    attention: float
    wide_attention: bool
    fused: bool
    written: Size
    dequantized: int
    kernels: int


def work(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Work:
    """The work of a micro-batch of `recipe`, run as `strategy` says on `device`; the same for all lengths and sizes."""
    length = ENDLESS if is_masked(architecture, recipe.seq_len) else 1
    return _work(
        architecture,
        replace(recipe, seq_len=length, tokens_per_step=length, optimizer="adamw"),
        Strategy(
            micro_batch=min(strategy.micro_batch, 2),
            gradient_checkpointing=strategy.gradient_checkpointing,
            attention=strategy.attention,
            loss=strategy.loss,
        ),
        replace(device, context_bytes=0, ranks_per_host=1),
    )


@lru_cache(maxsize=256)
def _work(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Work:
    kernel = kernel_in_use(architecture, recipe, strategy, device)
    again = 1 if strategy.gradient_checkpointing else 0
    products, wide = _products(architecture, recipe, strategy, device, again)
    scores = 4 * architecture.num_heads * architecture.head_dim * architecture.num_layers
    backward = FUSED_BACKWARD if kernel in FUSED else 2.0
    attention = scores * (1 + again + backward) / (CAUSAL if kernel in FUSED else 1)
    written, dequantized, kernels = _written(architecture, recipe, strategy, device)
    stream = exact.stored_dtype(recipe, device.compute_dtype)
    wide_attention = kernel == "math" or (stream == "float32" and not recipe.autocast)
    return Work(products, wide, attention, wide_attention, kernel in FUSED, written, dequantized, kernels)


def _products(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device, again: int
) -> tuple[float, float]:
    """Operations of a token in the compute dtype and in float32: 2 for each weight and pass."""
    trained = recipe.method == "full"
    passes = 2 + again + trained  # forward, input's gradient, recomputation, weight's gradient
    linear = architecture.linear_parameters + _expert_weights_of_a_token(architecture) * architecture.num_layers
    head = architecture.vocab_size * architecture.hidden_size
    head_passes = 2 + (strategy.loss == "chunked") + trained  # chunks are checkpointed
    adapters = 0
    if not trained:
        numel = sum(size * count for size, count in exact.trainable_tensors(architecture, recipe))
        adapters = numel if not architecture.experts else min(numel, linear)
    stream = exact.stored_dtype(recipe, device.compute_dtype)
    wide = narrow = 0.0
    base_is_wide = recipe.quantization == "none" and stream == "float32" and not recipe.autocast
    for numel, times, is_wide in (
        (linear, passes, base_is_wide),
        (head, head_passes, stream == "float32" and not recipe.autocast),
        (adapters, 3 + again, recipe.lora_dtype == "float32" and not recipe.autocast),
    ):
        if is_wide:
            wide += 2 * numel * times
        else:
            narrow += 2 * numel * times
    return (0.0, wide + narrow) if device.compute_dtype == "float32" else (narrow, wide)


def _expert_weights_of_a_token(architecture: ModelArchitecture) -> int:
    """Elements of the experts that a token goes through, of one layer."""
    if not architecture.experts:
        return 0
    return architecture.expert_parameters * architecture.experts_per_token // architecture.experts


def _written(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device
) -> tuple[Size, int, int]:
    """Bytes of all tensors that are made, of those that are dequantized weights, and their number; two layers stand for all, and one chunk of the loss for all."""
    step = step_of(architecture, recipe, strategy, device)
    tape = Tape()
    marks: list[int] = []
    tape.backward(forward(tape, step, marks)[0])
    tape.leaves.clear()
    total, dequantized, kernels = NOTHING, 0, 0
    for _, size, room, where in tape.log:
        if where is None:
            continue
        # of all layers but the first; that one has nothing to give a gradient to
        times = step.layers - 1 if where[1] == LAST else 1
        kernels += times
        if room == "dequantization_workspace":
            dequantized += times * size.fixed
        else:
            total = total.plus(size.times(times))
    fixed, position, token, score, chunk = total
    return Size(fixed, position, token + chunk, score), dequantized, kernels
