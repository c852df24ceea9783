"""Linear attention by the gated delta rule on the tape, as transformers' own PyTorch code computes it.

transformers 5.23, models/qwen3_5/modeling_qwen3_5.py: `Qwen3_5GatedDeltaNet` and what it calls, which is what runs
where flash-linear-attention and causal-conv1d are not installed; with them a layer needs less. The rule itself is in
float32, and takes 64 tokens at a time, one chunk after another. Local variables mirror theirs, as in `decoder.py`.

On CUDA the convolution's input lies as cuDNN takes it (channels last), which was read and not measured: no copy is
counted, and no workspace of cuDNN's.

Shapes: T tokens, n key heads, m value heads, K and V their dimensions, C channels of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_core.architecture import DeltaNet
from qlora_core.memory import operators as op
from qlora_core.memory.layer import ROW, Layer, module, parameter
from qlora_core.memory.tape import ITEMSIZE, DType, Gradients, Size, Tape, Tensor

CHUNK = 64
"""Tokens of a chunk; a sequence is filled up to whole ones."""


def gated_delta_net(tape: Tape, layer: Layer, net: DeltaNet, mixed: Tensor, z: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """[T, C], [T, m*V], [T, m], [T, m] -> [T, m*V]: what its projections made, to what its last one takes."""
    heads, of_keys, of_values = net.value_heads, net.key_heads * net.key_dim, net.value_heads * net.value_dim
    with tape.at(*tape.where, "convolution"):
        mixed = op.activation(tape, convolution(tape, layer, net, mixed))
    query, key, value = op.split(tape, mixed, [ROW.times(each) for each in (of_keys, of_keys, of_values)])
    beta = op.sigmoid(tape, b)
    rate = parameter(tape, layer, heads, layer.stream)
    shift = Tensor(None, Size(heads), layer.stream)  # trained or not, its gradient is a few numbers
    g = op.multiply_weight(tape, softplus(tape, op.add(tape, op.cast(tape, a, "float32"), shift)), rate)
    with tape.at(*tape.where, "delta rule"):
        attended = delta_rule(tape, net, query, key, value, g, beta, layer.narrow)
    return gated_norm(tape, layer, net, attended, z)


@module
def gated_norm(tape: Tape, layer: Layer, net: DeltaNet, x: Tensor, gate: Tensor) -> Tensor:
    """RMSNorm of each head, times SiLU of the gate in float32 (`Qwen3_5RMSNormGated`)."""
    with tape.at(*tape.where, "norm"):
        dtype, rows = x.dtype, ROW.times(net.value_heads)
        x = op.cast(tape, x, "float32")
        variance = op.row_mean(tape, op.square(tape, x), rows)
        x = op.multiply(tape, x, op.reciprocal_root(tape, variance))
        x = op.multiply_weight(tape, op.cast(tape, x, dtype), parameter(tape, layer, net.value_dim, layer.stream))
        x = op.multiply(tape, x, op.activation(tape, op.cast(tape, gate, "float32")))
        return op.cast(tape, x, dtype)


@module
def delta_rule(
    tape: Tape,
    net: DeltaNet,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    narrow: DType | None,
) -> Tensor:
    """`torch_chunk_gated_delta_rule`: [T, n*K] twice, [T, m*V], [T, m] twice -> [T, m*V].

    Its products are narrow under autocast, whatever their operands are.
    """
    dtype, rows = query.dtype, ROW.times(net.value_heads)
    if net.key_heads != net.value_heads:
        wide = rows.times(net.key_dim)
        query, key = repeated(tape, query, wide), repeated(tape, key, wide)
    query, key, value, beta, decay = [relaid(tape, x, "float32") for x in (query, key, value, beta, g)]
    query = unit(tape, query, rows)
    key = unit(tape, key, rows)
    query = op.scale(tape, query)
    query, key, value = [op.scale(tape, x) for x in (query, key, value)]  # filled up to whole chunks, which copies
    beta, decay = [op.scale(tape, x) for x in (beta, decay)]
    v_beta = op.multiply(tape, value, beta)
    k_beta = op.multiply(tape, key, beta)
    cum_decay = cumulated(tape, decay)
    pairs = rows.times(CHUNK)
    pairwise_decay = differences(tape, cum_decay, pairs)
    pairwise_decay = op.scale(tape, pairwise_decay)  # filled with -inf above the diagonal
    pairwise_decay = exponential(tape, pairwise_decay)
    ut_system = op.multiply(tape, product(tape, k_beta, key, pairs, narrow), pairwise_decay)
    intra_chunk_attn = op.multiply(tape, product(tape, query, key, pairs, narrow), pairwise_decay)
    decayed_k_beta = op.multiply(tape, k_beta, exponential(tape, cum_decay))
    new_values = solved(tape, ut_system, v_beta)
    k_cumdecay = solved(tape, ut_system, decayed_k_beta)
    query = op.multiply(tape, query, exponential(tape, cum_decay))
    key = op.multiply(tape, key, exponential(tape, op.scale(tape, cum_decay)))
    core_attn_out = scanned(tape, net, new_values, k_cumdecay, query, intra_chunk_attn, key, narrow)
    return relaid(tape, core_attn_out, dtype)


def unit(tape: Tape, x: Tensor, rows: Size) -> Tensor:
    """Each head's vector divided by its length (`l2norm`)."""
    inv_norm = op.reciprocal_root(tape, row_sum(tape, op.multiply(tape, x, x), rows))
    return op.multiply(tape, x, inv_norm)


def product(tape: Tape, a: Tensor, b: Tensor, pairs: Size, narrow: DType | None) -> Tensor:
    """A b^T of each chunk and head."""
    a, b = op.narrowed(tape, a, narrow), op.narrowed(tape, b, narrow)
    return op.batched_matmul(tape, a, b, pairs, (False, False, False))


def scanned(
    tape: Tape,
    net: DeltaNet,
    values: Tensor,
    k_cumdecay: Tensor,
    query: Tensor,
    intra: Tensor,
    key: Tensor,
    narrow: DType | None,
) -> Tensor:
    """The recurrence over chunks, as one operator: [T, m*V] and what it attends with -> [T, m*V].

    Each chunk keeps the state [m, K, V] that it began with, and what it multiplies: slices of its inputs and the new
    values, or narrow copies, one for each product, under autocast. On the way back a chunk's gradient is
    written into zeros as large as all chunks' (select_backward), which those of the others are added to, and the
    output's is copied for each chunk that was written into it (CopySlices).
    """
    of_states = ROW.times(net.value_heads * net.key_dim * net.value_dim // CHUNK)
    inputs = (values, k_cumdecay, query, intra, key)
    sizes: list[tuple[Size, DType]] = [(of_states, "float32")]
    if narrow is None:
        sizes.append((values.numel, "float32"))
    else:
        multiplied = (k_cumdecay.numel, query.numel, intra.numel, key.numel, *[values.numel] * 2, *[of_states] * 2)
        sizes += [(numel, narrow) for numel in multiplied]
    # where a checkpoint forgets them, each chunk's are gone when the next one's come
    passing = tape.frame is not None and not tape.frame.again
    kept = [Tensor(None, *size) if passing else tape.new(*size) for size in sizes]
    if narrow is None:
        kept += inputs[1:]
    numels = tuple(x.numel for x in inputs)
    largest = max(numels, key=lambda size: size.per_token)

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        # each chunk fills as many zeros and adds them up, three reads and writes in a sum, and copies the output's
        moved = 4 * sum(numel.per_token for numel in numels) + 2 * gradient.numel.per_token
        tape.summed.append((Size(per_score=ITEMSIZE["float32"] * moved // (3 * CHUNK)), tape.where))
        copied = tape.new(gradient.numel, "float32")
        made = tuple(tape.new(numel, "float32") for numel in numels)
        arriving = tape.new(largest, "float32")
        del copied, arriving
        return made

    return tape.apply(inputs, values.numel, "float32", backward, kept)


# --- operators --------------------------------------------------------------------------------------------------------


def convolution(tape: Tape, layer: Layer, net: DeltaNet, x: Tensor) -> Tensor:
    """A causal convolution of each channel by itself: it keeps its input and its weight in any case."""
    weight = parameter(tape, layer, net.convolved * net.kernel, layer.stream)
    x = op.narrowed(tape, x, layer.narrow)
    trained = layer.trained

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        of_x = tape.new(gradient.numel, gradient.dtype)
        return of_x, tape.new(weight.numel, gradient.dtype) if trained else None

    return tape.apply((x, weight), x.numel, x.dtype, backward, (x,))


def softplus(tape: Tape, x: Tensor) -> Tensor:
    """log(1 + exp(x)): keeps its input."""
    return op.activation(tape, x)


def repeated(tape: Tape, x: Tensor, numel: Size) -> Tensor:
    """Key heads copied out to all value heads (repeat_interleave); the gradient is summed back."""
    whole = x.numel
    return tape.apply((x,), numel, x.dtype, lambda gradient, saved: (tape.new(whole, gradient.dtype),))


def relaid(tape: Tape, x: Tensor, dtype: DType) -> Tensor:
    """x.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format): a copy."""
    narrow = x.dtype
    return tape.apply((x,), x.numel, dtype, lambda gradient, saved: (tape.new(gradient.numel, narrow),))


def row_sum(tape: Tape, x: Tensor, rows: Size) -> Tensor:
    """x.sum(-1, keepdim=True); the gradient is an expanded view."""
    numel = x.numel
    return tape.apply((x,), rows, x.dtype, lambda gradient, saved: (gradient.alias(numel),))


def cumulated(tape: Tape, x: Tensor) -> Tensor:
    """x.cumsum: the gradient is turned around, summed up and turned around again."""

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        turned = tape.new(gradient.numel, gradient.dtype)
        summed = tape.new(gradient.numel, gradient.dtype)
        del turned
        result = tape.new(gradient.numel, gradient.dtype)
        del summed
        return (result,)

    return tape.apply((x,), x.numel, x.dtype, backward)


def differences(tape: Tape, x: Tensor, pairs: Size) -> Tensor:
    """x.unsqueeze(4) - x.unsqueeze(3): of all pairs of a chunk."""
    rows = x.numel

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        first = tape.new(rows, gradient.dtype)
        negative = tape.new(gradient.numel, gradient.dtype)
        second = tape.new(rows, gradient.dtype)
        del negative, second
        return (first,)

    return tape.apply((x,), pairs, x.dtype, backward)


def exponential(tape: Tape, x: Tensor) -> Tensor:
    """x.exp(): keeps its result."""
    return op.relu(tape, x)


def solved(tape: Tape, system: Tensor, x: Tensor) -> Tensor:
    """linalg.solve_triangular: keeps system and result (FunctionsManual.cpp, linalg_solve_triangular_backward)."""
    pairs = system.numel

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        of_x = tape.new(gradient.numel, gradient.dtype)
        made = tape.new(pairs, gradient.dtype)
        negative = tape.new(pairs, gradient.dtype)
        del made
        of_system = tape.new(pairs, gradient.dtype)
        del negative
        return of_system, of_x

    return tape.apply((system, x), x.numel, x.dtype, backward, (system,), saves_output=True)
