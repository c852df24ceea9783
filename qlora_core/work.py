"""What one micro-batch computes and moves: floating-point operations by kind, bytes moved, kernels started.

Products are counted from the model's shapes. Everything else is read off the recording that memory is read off, too
(`memory/step.py`): the tape makes each tensor that transformers, peft and bitsandbytes make. Its bytes are what a
kernel writes, and there is about one kernel for each, and one for each sum of gradients. A frozen weight has no
gradient, so the backward pass of a linear layer is one product and not two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from qlora_core.architecture import ModelArchitecture
from qlora_core.memory import bytes as exact
from qlora_core.memory.attention import AttentionKernel, is_masked
from qlora_core.memory.delta_net import CHUNK
from qlora_core.memory.device import Device
from qlora_core.memory.formula import ENDLESS, anywhere, kernel_in_use, step_of
from qlora_core.memory.step import LAST, Step, on_tape, recorded
from qlora_core.memory.tape import Size, Where, sum_of
from qlora_core.recipe import DTYPE_BYTES, Dtype, Recipe
from qlora_core.strategy import Attention, Loss, Strategy

CAUSAL = 2
"""Kernels that know that attention is causal skip the scores above the diagonal: half of them."""
FUSED_BACKWARD = 2.5
"""Backward products of fused attention for each forward one: five for two, the scores are made again (Dao 2023,
"FlashAttention-2", section 4.1)."""
FUSED: frozenset[AttentionKernel] = frozenset({"flash", "efficient", "masked", "flash_cpu"})
SKIPPING: frozenset[AttentionKernel] = FUSED - {"masked"}
WIDE: frozenset[AttentionKernel] = frozenset({"math", "masked_math"})
READ_PER_WRITTEN = 2
"""Bytes moved for each one that is written: a kernel reads about what it writes."""
MOVED_PER_SUM = 3
"""The same, of a gradient that is added to another in place: two are read, one is written."""


class Work(NamedTuple):
    """Of one micro-batch of B sequences of S tokens on one rank, all layers and passes, recomputation included.

    Attributes:
        products: operations of matrix products in the compute dtype, per token.
        product_bytes: bytes that the products of the base model and its head read and write meanwhile.
        wide_products: those in float32, for which there are no tensor cores unless TF32 is allowed, per token.
        fixed, wide_fixed: those of the compute dtype and of float32 that are made whatever the tokens: DoRA's norms.
        attention: operations of attention's products, per token and position (B*S*S).
        wide_attention: whether attention computes in float32.
        fused: whether attention is one kernel that never holds the scores.
        moved: bytes that all other kernels read and write, dequantization apart.
        dequantized: bytes of the dequantized weights that are written.
        kernels: how many are started.
        chunk_kernels: how many more for each chunk of a sequence that linear attention takes.
    """

    products: float
    product_bytes: Size
    wide_products: float
    fixed: float
    wide_fixed: float
    attention: float
    wide_attention: bool
    fused: bool
    moved: Size
    dequantized: int
    kernels: int
    chunk_kernels: int


def work(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Work:
    """The work of a micro-batch of `recipe`, run as `strategy` says on `device`; the same for all lengths and sizes."""
    return _work(
        architecture,
        _of_any_step(recipe, ENDLESS if is_masked(architecture, recipe.seq_len, recipe.packing) else 1),
        _alone(min(strategy.micro_batch, 2), strategy.gradient_checkpointing, strategy.attention, strategy.loss),
        anywhere(device),
    )


@lru_cache(maxsize=256)
def _alone(micro_batch: int, gradient_checkpointing: bool, attention: Attention, loss: Loss) -> Strategy:
    """A strategy with all that the work depends on, and one more micro-batch, whose tape is most often known."""
    return Strategy(
        micro_batch=micro_batch,
        gradient_accumulation=2,
        gradient_checkpointing=gradient_checkpointing,
        attention=attention,
        loss=loss,
    )


@lru_cache(maxsize=256)
def _of_any_step(recipe: Recipe, length: int) -> Recipe:
    """`recipe` without what its work does not depend on; made once, for its fields are checked anew each time."""
    return replace(recipe, seq_len=length, tokens_per_step=length, optimizer="adamw")


@lru_cache(maxsize=256)
def _work(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Work:
    kernel = kernel_in_use(architecture, recipe, strategy, device)
    again = int(strategy.gradient_checkpointing)
    scores = 4 * architecture.num_heads * architecture.head_dim * architecture.attention_layers
    backward = FUSED_BACKWARD if kernel in FUSED else 2.0
    step = step_of(architecture, recipe, strategy, device)
    passes = _passes(step, strategy)
    products, wide = _products(architecture, recipe, device, passes)
    outputs, weights = _of_products(architecture, recipe, device, passes)
    made = _made(step)
    fixed = _norms(architecture, recipe, passes)
    wide_fixed = fixed if _are_wide(recipe, device) else 0
    stream = exact.stored_dtype(recipe, device.compute_dtype)
    return Work(
        products=products,
        product_bytes=outputs.times(READ_PER_WRITTEN).plus(weights),
        wide_products=wide,
        fixed=fixed - wide_fixed,
        wide_fixed=wide_fixed,
        attention=scores * (1 + again + backward) / (CAUSAL if kernel in SKIPPING else 1),
        wide_attention=kernel in WIDE or (stream == "float32" and not recipe.under_autocast),
        fused=kernel in FUSED,
        moved=made.written.plus(outputs.times(-1)).times(READ_PER_WRITTEN).plus(made.summed.times(MOVED_PER_SUM)),
        dequantized=made.dequantized,
        kernels=made.kernels,
        chunk_kernels=_of_chunks(architecture, recipe, device, passes),
    )


# --- matrix products --------------------------------------------------------------------------------------------------


class _Passes(NamedTuple):
    """How often weights are multiplied with.

    Attributes:
        forward, last: of a linear layer, and of the last one of a decoder layer: once, and once more in recomputation.
        head: of the output head; the chunks of a chunked loss are recomputed where it is trained.
        adapters: of an adapter in all: forward, both gradients, recomputation.
        trained: 1 where weights of the base have a gradient, too.
    """

    forward: int
    last: int
    head: int
    adapters: int
    trained: int


def _passes(step: Step, strategy: Strategy) -> _Passes:
    """Recomputation stops at the last tensor that was saved: where nothing behind the last linear layer saves any, and
    that layer has no adapter, its own product is not made again.
    """
    again, layer = int(strategy.gradient_checkpointing), step.layer
    saved_behind = layer.norms == 4 or layer.dropped_residual or layer.experts is not None
    return _Passes(
        forward=1 + again,
        last=1 + again if saved_behind or layer.feed_forward[-1].adapter else 1,
        head=1 + (strategy.loss == "chunked" and layer.trained),
        adapters=3 + again,
        trained=int(layer.trained),
    )


def _products(architecture: ModelArchitecture, recipe: Recipe, device: Device, passes: _Passes) -> tuple[float, float]:
    """Operations of a token in the compute dtype and in float32: 2 for each weight and pass."""
    layers, last = architecture.periods, architecture.linears[-1].weight_numel * architecture.linears[-1].count
    linear = architecture.linear_parameters + _expert_weights_of_a_token(architecture) * architecture.num_layers
    multiplied = linear * (passes.forward + 1 + passes.trained) - layers * last * (passes.forward - passes.last)
    head = architecture.vocab_size * architecture.hidden_size * (passes.head + 1 + passes.trained)
    adapters = 0
    if not passes.trained:
        adapters = sum(size * count for size, count in exact.trainable_tensors(architecture, recipe))
        adapters = min(adapters, linear) if architecture.experts else adapters
    again_wide = 0
    if recipe.use_dora and recipe.dropout:
        # what dropout left of the input is multiplied with the base's weight once more, in the adapter's dtype
        targets = (each for each in architecture.linears if exact.is_target(each, recipe))
        again_wide = (passes.forward + 1) * layers * sum(each.weight_numel * each.count for each in targets)
    base, unquantized = _product_dtypes(recipe, device)
    multiplied_in_chunks, solved = _delta_rule(architecture, passes)
    wide = narrow = 0
    for numel, is_wide in (
        (multiplied_in_chunks, not recipe.narrows(device.compute_dtype)),
        (solved, True),
        (multiplied, base == "float32"),
        (head, unquantized == "float32"),
        (adapters * passes.adapters + again_wide, _are_wide(recipe, device)),
    ):
        if is_wide:
            wide += 2 * numel
        else:
            narrow += 2 * numel
    return (0, wide + narrow) if device.compute_dtype == "float32" else (narrow, wide)


def _delta_rule(architecture: ModelArchitecture, passes: _Passes) -> tuple[int, int]:
    """Multiplications of a token in linear attention: in products, and in solving triangular systems.

    Within its chunk it meets all tokens in three products, and the state in three; each has two on the way back. A
    triangular system takes half a product; on the way back another such system, and a whole product in float32.
    """
    net = architecture.delta_net
    if net is None:
        return 0, 0
    times = (architecture.num_layers - architecture.attention_layers) * net.value_heads
    within, state = CHUNK * (2 * net.key_dim + net.value_dim), 3 * net.key_dim * net.value_dim
    halves = CHUNK * (net.key_dim + net.value_dim) // 2
    return times * (passes.forward + 2) * (within + state), times * (passes.forward + 3) * halves


def _of_chunks(architecture: ModelArchitecture, recipe: Recipe, device: Device, passes: _Passes) -> int:
    """Kernels of each chunk in linear attention's loop, by the operators that autograd runs for one chunk more.

    There are 9 forward and 37 backward, and 8 and 11 more to narrow what is multiplied under autocast.
    """
    forward, backward = (17, 48) if recipe.narrows(device.compute_dtype) else (9, 37)
    layers = architecture.num_layers - architecture.attention_layers
    return layers * (forward * passes.forward + backward)


def _norms(architecture: ModelArchitecture, recipe: Recipe, passes: _Passes) -> float:
    """Operations of DoRA's B A, which peft makes by sending the identity through both: the first has [in, in] rows."""
    if not recipe.use_dora:
        return 0
    of_a_layer = sum(
        linear.count * recipe.rank * linear.in_features * (linear.in_features + linear.out_features)
        for linear in architecture.linears
        if exact.is_target(linear, recipe)
    )
    return 2 * passes.forward * architecture.periods * of_a_layer


def _are_wide(recipe: Recipe, device: Device) -> bool:
    """Whether the adapters' products are in float32."""
    return device.compute_dtype == "float32" or (recipe.lora_dtype == "float32" and not recipe.under_autocast)


def _expert_weights_of_a_token(architecture: ModelArchitecture) -> int:
    """Elements of the experts that a token goes through, of one layer."""
    if not architecture.experts:
        return 0
    return architecture.expert_parameters * architecture.experts_per_token // architecture.experts


def _product_dtypes(recipe: Recipe, device: Device) -> tuple[Dtype, Dtype]:
    """In which the linear layers of the base multiply, and in which the output head does."""
    compute = device.compute_dtype
    unquantized = compute if recipe.under_autocast else exact.stored_dtype(recipe, compute)
    return (unquantized if recipe.quantization == "none" else compute), unquantized


def _of_products(architecture: ModelArchitecture, recipe: Recipe, device: Device, passes: _Passes) -> tuple[Size, Size]:
    """Bytes that the products of linear layers and head write, and those of the weights that they read.

    An adapter's are not among them: with a few dozen features on one side, they move more than they compute.
    """
    base, unquantized = (DTYPE_BYTES[dtype] for dtype in _product_dtypes(recipe, device))
    layers = architecture.periods
    per_token = weights = trained = 0
    for linear in architecture.linears:
        forward = passes.last if linear is architecture.linears[-1] else passes.forward
        per_token += base * layers * linear.count * (linear.out_features * forward + linear.in_features)
        weights += base * layers * linear.count * linear.weight_numel * (forward + 1)
        trained += base * layers * linear.count * linear.weight_numel * passes.trained
    head = architecture.vocab_size * architecture.hidden_size * unquantized
    per_token += unquantized * (architecture.vocab_size * passes.head + architecture.hidden_size)
    weights += head * (passes.head + 1)
    return Size(fixed=trained + head * passes.trained, per_token=per_token), Size(fixed=weights)


# --- all else ---------------------------------------------------------------------------------------------------------


class _Made(NamedTuple):
    """What a step's kernels write, out of the tape's recording.

    Attributes:
        written: bytes of all tensors, those of dequantized weights apart.
        summed: bytes of the gradients that are added to others in place.
        dequantized: bytes of dequantized weights.
        kernels: number of all these.
    """

    written: Size
    summed: Size
    dequantized: int
    kernels: int


def _made(step: Step) -> _Made:
    """Two layers stand for all, and one chunk of the loss for all chunks."""
    fixed, more = _made_at_any_rank(on_tape(step), step.layers)
    rank = step.layer.rank
    return _Made(
        written=fixed.written.plus(more.written.times(rank)),
        summed=fixed.summed.plus(more.summed.times(rank)),
        dequantized=fixed.dequantized + more.dequantized * rank,
        kernels=fixed.kernels,
    )


@lru_cache(maxsize=128)
def _made_at_any_rank(tape: Step, layers: int) -> tuple[_Made, _Made]:
    """What is made in any case, and what each unit of the rank adds; one rank alone fetches nothing ahead."""
    recording = recorded(tape)

    def times(where: Where) -> int:
        return layers - 1 if where[1] == LAST else 1  # the first layer has nothing to give a gradient to

    written, summed, dequantized = Counter[int](), Counter[int](), Counter[int]()  # how often there is each size
    for _, place, room, where in recording.changes:
        if where is not None:
            (dequantized if room == "dequantization_workspace" else written)[place] += times(where)
    for place, where in recording.summed:
        summed[place] += times(where)

    kernels = written.total() + summed.total() + dequantized.total()

    def made(sizes: Sequence[Size]) -> _Made:
        def total(counts: Counter[int]) -> Size:
            return _all_chunks(sum_of(sizes[place].times(count) for place, count in counts.items()))

        return _Made(total(written), total(summed), total(dequantized).fixed, kernels)

    return made([fixed for fixed, _, _ in recording.sizes]), made([more for _, more, _ in recording.sizes])


def _all_chunks(size: Size) -> Size:
    """`size` with all tokens in place of one chunk's."""
    return size._replace(per_token=size.per_token + size.per_chunk_token, per_chunk_token=0)
