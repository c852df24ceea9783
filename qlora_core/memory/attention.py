"""Attention kernels on the tape: what eager attention, flash and memory-efficient attention keep and need.

Shapes: T tokens, B micro-batch, S sequence, h query heads, k key and value heads, D head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from qlora_core.architecture import ModelArchitecture
from qlora_core.memory import operators as op
from qlora_core.memory.device import Device
from qlora_core.memory.families import Scores
from qlora_core.memory.tape import DType, Gradients, Size, Tape, Tensor
from qlora_core.recipe import Recipe
from qlora_core.strategy import ATTENTION_BLOCK, Strategy

AttentionKernel = Literal["eager", "flash", "efficient", "masked", "math", "masked_math", "flash_cpu"]
"""masked, masked_math: the memory-efficient one and the math kernel with a mask of their own."""


def is_masked(architecture: ModelArchitecture, seq_len: int, packing: bool) -> bool:
    """Whether packing, or a sliding window at this length, needs a mask of its own (transformers' masking_utils.py)."""
    window = architecture.sliding_window
    return packing or (window is not None and architecture.sliding_layers > 0 and seq_len >= window)


def kernel_of(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> AttentionKernel:
    """The attention kernel that really runs where no mask is needed: flash needs sm80 and 16 bits, whoever calls it.

    transformers hands grouped keys over as they are (integrations/sdpa_attention.py, use_gqa_in_sdpa), and the
    memory-efficient kernel takes none (PyTorch 2.13, sdp_utils.cpp): then the math kernel runs, with all scores. So it
    does on a CPU, whose flash kernel knows no dropout (sdp_utils_cpp.cpp). One key head that is not said to be shared
    is taken by cuDNN's kernel alone, which is asked first on sm90 and sm100 and after the math kernel elsewhere
    (sdp_utils.cpp, check_prefer_cudnn_attention), and counted as flash.
    """
    if strategy.attention == "eager":
        return "eager"
    refused = architecture.shares_one_key_head and strategy.attention == "sdpa" and not device.keys_expanded
    if device.kind == "cpu":
        return "math" if architecture.drops_attention or refused else "flash_cpu"
    wide = device.compute_dtype == "float32" or (recipe.upcast == "peft" and not recipe.under_autocast)
    if device.flash_attention and not wide and (not refused or device.compute_capability in CUDNN_FIRST):
        return "flash"
    grouped = architecture.num_heads != architecture.num_kv_heads and architecture.head_dim <= LARGEST_GROUPED_HEAD
    return "math" if refused or (grouped and not device.keys_expanded) else "efficient"


class Heads(NamedTuple):
    """The shape of attention: query heads, key and value heads, their dimension; and where it runs.

    Attributes:
        single_sequence: the micro-batch is 1, so that folding batch and heads is a view.
        cuda: CUDA's softmax kernels, not a CPU's.
        capped: eager scores pass a soft cap (Gemma 2).
        partial: only part of a head is rotated, and put together with the rest again.
        sinks: each head's softmax has a learned score beside those of the keys (gpt-oss).
        dropped: attention's weights are dropped out.
        scores: how they are made, and with which mask.
        in_place: they are scaled in place (Falcon).
        indexed: the one head of keys and that of values are picked by index, which copies them (Falcon).
    """

    queries: int
    keys: int
    dim: int
    single_sequence: bool
    cuda: bool
    capped: bool = False
    partial: bool = False
    sinks: bool = False
    dropped: bool = False
    scores: Scores = "plain"
    in_place: bool = False
    indexed: bool = False


CUDNN_FIRST = ((9, 0), (10, 0))
"""Compute capabilities on which cuDNN's attention comes before all others."""
LARGEST_GROUPED_HEAD = 256
"""transformers expands grouped keys itself where heads are larger (integrations/sdpa_attention.py)."""
ROW = Size(per_token=1)
SCORE = Size(per_score=1)


def attend(
    tape: Tape,
    kernel: AttentionKernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: Heads,
    mask: DType,
    narrow: DType | None,
    shared: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """[T, h*D], [T, k*D], [T, k*D] -> [T, h*D] and, from eager attention, the weights [B, h, S, S].

    Args:
        mask: the dtype of what is added to eager scores.
        narrow: autocast's dtype; None without.
        shared: the mask of all layers.
    """
    if kernel != "eager":
        query, key, value = (op.narrowed(tape, x, narrow) for x in (query, key, value))
    if kernel in ("eager", "efficient", "masked"):
        key, value = repeated(tape, key, shape), repeated(tape, value, shape)
    if kernel == "eager":
        if shape.in_place:
            return falcon_eager(tape, query, key, value, shape, mask, narrow)
        return eager(tape, query, key, value, shape, mask, narrow)
    if kernel in ("math", "masked_math"):
        return math(tape, query, key, value, shape, masked=kernel == "masked_math"), None
    if kernel == "flash_cpu" and query.dtype == "bfloat16" and shape.scores != "shared":
        return causal_on_a_cpu(tape, query, key, value, shape), None
    attended = fused(tape, kernel, query, key, value, shape, shared)
    # flash, which on a CPU takes masks too, lays its result out as the queries are: if put together, head by head
    by_head = shape.partial and (kernel == "flash" or not shape.cuda)
    return (op.clone(tape, attended) if by_head else attended), None


def repeated(tape: Tape, x: Tensor, shape: Heads) -> Tensor:
    """repeat_kv: keys or values copied out to all query heads; the gradient is summed back."""
    if shape.keys > 1 or shape.queries == 1:
        return spread(tape, x, shape)
    numel, dtype = x.numel, x.dtype
    view = x.alias(ROW.times(shape.queries * shape.dim))  # one head's is as good as a copy for all
    if x.node is not None:
        view.node = tape.node((x,), lambda gradient: (tape.new(numel, dtype),))
    return view


def fused(
    tape: Tape,
    kernel: AttentionKernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shape: Heads,
    shared: Tensor | None,
) -> Tensor:
    """One kernel that never holds the scores: it keeps inputs, mask, output and a float32 logsumexp per head.

    Backward (ATen/native/transformers/cuda/attention_backward.cu, flash_attn/flash_api.cpp) it needs a float32 row sum
    per head; flash also a float32 accumulator of the query's gradient and, for grouped keys, the gradients of the
    expanded keys and values before they are summed.
    """
    wide = ROW.times(shape.queries * shape.dim)
    rows = ROW.times(shape.queries)
    biases: tuple[Tensor, ...] = ()
    if shape.scores == "shared" and shared is not None:
        biases = (shared,)  # taken as it is
    elif kernel == "masked":
        inverted = tape.new(SCORE, "bool")  # of the mask that all layers share
        biases = (tape.new(SCORE, query.dtype),)
        del inverted
    logsumexp = tape.new(rows, "float32")

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        made: list[Tensor] = []
        results = tuple(tape.new(numel, dtype) for numel in sizes)
        if shape.cuda:
            made.append(tape.new(rows, "float32"))
        if kernel == "flash":
            made.append(tape.new(wide, "float32"))
            if shape.queries != shape.keys:
                made.extend(tape.new(wide, dtype) for _ in range(2))
        return results

    sizes, dtype = (query.numel, key.numel, value.numel), query.dtype
    return tape.apply(
        (query, key, value), query.numel, dtype, backward, (query, key, value, *biases, logsumexp), saves_output=True
    )


def causal_on_a_cpu(tape: Tape, query: Tensor, key: Tensor, value: Tensor, shape: Heads) -> Tensor:
    """Attention of our own, which keeps its inputs alone (training/attention.py).

    What a block needs is said of the last one; a sequence is taken to have the tokens of a block at least.
    """
    dtype, sizes = query.dtype, (query.numel, key.numel, value.numel)
    block = ROW.times(shape.queries * ATTENTION_BLOCK)

    def flat() -> tuple[Tensor, Tensor | None]:
        # the keys without their mean, and the values, but where they lie head by head
        return tape.new(sizes[1], dtype), tape.new(sizes[2], dtype) if shape.keys > 1 else None

    def later() -> Tensor:
        return tape.new(Size(fixed=ATTENTION_BLOCK**2), "bool")

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        mask, of_query, *folded = later(), *(tape.new(sizes[0], dtype) for _ in range(3))
        flattened = flat()
        wide = [tape.new(size, "float32") for size in sizes[1:]]
        chances, of_chances, of_scores = (tape.new(block, dtype) for _ in range(3))
        del chances, of_chances, of_scores
        results = (of_query, *(tape.new(size, dtype) for size in sizes[1:]))
        del folded, flattened, wide, mask
        return results

    output = tape.apply((query, key, value), sizes[0], dtype, backward, (query, key, value))
    mask, folded, flattened = later(), tape.new(sizes[0], dtype), flat()
    scores, chances = (tape.new(block, dtype) for _ in range(2))
    del scores, chances, flattened, folded, mask
    return output


def eager(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, shape: Heads, mask: DType, narrow: DType | None
) -> tuple[Tensor, Tensor]:
    """softmax(q k / sqrt(D) + mask) v with all scores [B, h, S, S] in memory, as transformers writes it."""
    several = not shape.single_sequence
    numel, dtype = SCORE.times(shape.queries), query.dtype
    if shape.scores == "wide":
        query, key = op.cast(tape, query, "float32"), op.cast(tape, key, "float32")
    elif shape.scores == "summed" and several:
        query, key, value = (op.clone(tape, x) for x in (query, key, value))  # folded before, and locals from then on
        several = False
    named: list[Tensor] = []  # what has a name of its own there, and lives as long as the function runs
    # [B, h, S, D] as a view of [B, S, h, D] folds to [B*h, S, D] without a copy for one sequence only; keys and values
    # that were copied out to all heads are laid out so, and those of one head are a view of it still
    several_keys = several and shape.keys in (1, shape.queries)
    weights = product(tape, query, key, numel, (several, several_keys, False), narrow)
    if shape.scores == "summed":
        named.append(weights)
    else:
        weights = op.scale(tape, weights)
    if shape.capped:
        for change in op.SOFT_CAP:
            weights = change(tape, weights)
    if shape.scores == "biased":
        weights = op.add(tape, weights, Tensor(None, numel, "float32"))
        weights = op.scale(tape, weights)  # filled by the mask, which takes as much
    else:
        weights = op.add(tape, weights, Tensor(None, numel, mask))
    if shape.scores in ("biased", "summed"):
        named.append(weights)
    if shape.sinks:
        weights = softmax_with_sinks(tape, weights, shape)
    else:
        # where it is not asked for float32, CUDA's autocast makes it that, and a CPU's leaves it narrow
        result: DType = weights.dtype if shape.scores == "wide" and not shape.cuda else "float32"
        probabilities = op.softmax(tape, weights, shape.cuda, result)
        if shape.scores == "wide":
            del weights  # two statements there, and one elsewhere
        weights = op.cast(tape, probabilities, dtype)
        del probabilities
    if shape.dropped:
        weights = op.dropout(tape, weights, shape.cuda)
    attended = product(tape, weights, value, query.numel, (False, several_keys, several), narrow)
    named.clear()
    return op.clone(tape, attended), weights


def falcon_eager(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, shape: Heads, mask: DType, narrow: DType | None
) -> tuple[Tensor, Tensor]:
    """The same as Falcon's code has it (5.23, models/falcon/modeling_falcon.py): scores are scaled in place.

    With ALiBi they become float32 first, and all have names, which live until attention returns. The softmax is in the
    dtype that comes out of the norm.
    """
    several = not shape.single_sequence
    several_keys = several and shape.keys in (1, shape.queries)
    numel = SCORE.times(shape.queries)
    scores = product(tape, query, key, numel, (several, several_keys, False), narrow)
    named: list[Tensor] = []
    if shape.scores == "shared":
        named.append(scores)
        scores = op.cast(tape, scores, "float32")
        named.append(scores)
        scores = op.add(tape, scores, Tensor(None, numel, "float32"))
        named.append(scores)
    scores = op.relayout(tape, scores)  # in place: only its gradient is another tensor
    masked = op.add(tape, scores, Tensor(None, numel, mask))
    weights = op.softmax(tape, masked, shape.cuda, "float32" if narrow is not None and shape.cuda else mask)
    del scores, masked
    if shape.dropped and named:
        weights = op.dropout(tape, weights, shape.cuda)
    attended = product(tape, weights, value, query.numel, (False, several_keys, several), narrow)
    named.clear()
    return op.clone(tape, attended), weights


def product(
    tape: Tape, a: Tensor, b: Tensor, numel: Size, copies: tuple[bool, bool, bool], narrow: DType | None
) -> Tensor:
    """torch.matmul as autocast calls it."""
    return op.batched_matmul(tape, op.narrowed(tape, a, narrow), op.narrowed(tape, b, narrow), numel, copies)


def softmax_with_sinks(tape: Tape, x: Tensor, shape: Heads) -> Tensor:
    """[B, h, S, S] -> [B, h, S, S]: a softmax in the scores' dtype over one more column, of which the rest is used.

    transformers 5.23, models/gpt_oss/modeling_gpt_oss.py (eager_attention_forward): the largest score is taken away
    first. Its gradient is scattered into zeros, into a copy of them while a mode follows operators (`op.top_k`).
    """
    column, scores = ROW.times(shape.queries), x.numel
    wide, dtype = scores.plus(column), x.dtype

    def of_difference(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        negative = tape.new(wide, dtype)
        of_largest = tape.new(column, dtype)
        del negative
        return gradient.alias(), of_largest

    def of_softmax(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        result = tape.new(wide, dtype)
        product = tape.new(wide, dtype) if shape.cuda else None
        del product
        return (result,)

    x = tape.apply((x,), wide, dtype, lambda gradient, saved: (gradient.alias(scores),))
    largest, _places = op.top_k(tape, x, column, shape.cuda)
    x = tape.apply((x, largest), wide, dtype, of_difference)
    return op.slice_of(tape, tape.apply((x,), wide, dtype, of_softmax, saves_output=True), scores)


def math(tape: Tape, query: Tensor, key: Tensor, value: Tensor, shape: Heads, *, masked: bool) -> Tensor:
    """PyTorch's own composition, in float32 (aten/src/ATen/native/transformers/attention.cpp, ..._attention_math).

    Args:
        masked: a mask is given, of booleans; with one key head, which is copied out to all where there are sequences to
            fold with.
    """
    numel, dtype, several = SCORE.times(shape.queries), query.dtype, not shape.single_sequence
    bias = tape.new(SCORE, dtype) if masked else None
    query_acc, key_acc, value_acc = (op.cast(tape, x, "float32") for x in (query, key, value))
    query = op.scale(tape, query_acc)
    mask = None if masked else tape.new(SCORE, "float32")
    key, value = (key_acc, value_acc) if masked else (spread(tape, x, shape) for x in (key_acc, value_acc))
    scaled = op.scale(tape, key)
    if masked:  # the products spread one key head themselves, and sum its gradient at once
        scaled = repeated(tape, scaled, shape)
    folded = masked and several
    # queries that were put together of two parts lie head by head; the mask is added in place
    weights = op.batched_matmul(tape, query, scaled, numel, (several and not shape.partial, folded, False))
    del scaled
    weights = op.safe_softmax(tape, weights, shape.cuda)
    if shape.dropped:
        weights = op.dropout(tape, weights, shape.cuda)
    if masked:
        value = repeated(tape, value, shape)
    attended = op.batched_matmul(tape, weights, value, query.numel, (False, folded, False))
    narrow = op.cast(tape, attended, dtype)
    unused = op.cast(tape, weights, dtype)
    # locals of that function
    del mask, bias, unused, query_acc, key_acc, value_acc, query, key, value, weights, attended
    return op.clone(tape, narrow)


def spread(tape: Tape, x: Tensor, shape: Heads) -> Tensor:
    """Keys or values copied out to all query heads, one head's too (repeat_interleave); the gradient is summed back."""
    if shape.queries == shape.keys:
        return x
    numel, dtype = x.numel, x.dtype
    wide = ROW.times(shape.queries * shape.dim)
    return tape.apply((x,), wide, dtype, lambda gradient, saved: (tape.new(numel, dtype),))
