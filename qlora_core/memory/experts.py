"""A mixture of experts on the tape: router, rows sorted by expert, grouped products, peft's adapters on 3-D weights.

transformers 5.23, integrations/moe.py: `grouped_mm_experts_forward`, the default on CUDA and on a CPU alike
(modeling_utils.py, get_correct_experts_implementation), and the routers of models/*/modeling_*.py. peft 0.21,
tuners/lora/layer.py: a `ParamWrapper` adds an adapter to a parameter by computing the whole adapted parameter, all
experts' at once, for every forward pass. Local variables mirror theirs, as in `decoder.py`.

What CUDA does was read and not measured: grouped products need sm80 (moe.py, _can_use_grouped_mm) and allocate their
results only; cuBLAS copies a batch of matrices none of whose strides is 1 (aten/src/ATen/native/cuda/Blas.cpp,
prepare_batch_matrix_for_cublas), which the factors [E, out, r] are. Left out as small: CUTLASS' pointers and workspace,
and what sorting the N experts' numbers needs.

Shapes: T tokens, E experts, k experts of a token, N rows (T*k), H hidden, F feed-forward of one expert, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from qlora_core.memory import operators as op
from qlora_core.memory.families import RouterScores
from qlora_core.memory.tape import DType, Gradients, Size, Tape, Tensor

ROW = Size(per_token=1)
"""One element per token."""


class Experts(NamedTuple):
    """What decides the timeline of one layer's router and experts.

    Attributes:
        hidden, inner, number, per_token: H, F, E, k.
        scores: how the router weighs experts.
        normalised: a token's weights are divided by their sum.
        router_rank, gate_up_rank, down_rank: rank of the adapters of each expert, gate and up together; 0 without.
        clamped: gpt-oss' gate, interleaved and clamped, and its biases.
        stored, lora: dtypes of the weights and of the adapters.
        narrow: the dtype of products under autocast; None without.
        trained: all weights are trained (method full).
        cuda: on CUDA, not a CPU.
        grouped: torch's grouped product; transformers' own loop otherwise.
    """

    hidden: int
    inner: int
    number: int
    per_token: int
    scores: RouterScores
    normalised: bool
    router_rank: int
    gate_up_rank: int
    down_rank: int
    clamped: bool
    stored: DType
    lora: DType
    narrow: DType | None
    trained: bool
    cuda: bool
    grouped: bool


class Routing(NamedTuple):
    """A router's output: logits [T, E], the weights and numbers of each token's experts [T, k]."""

    logits: Tensor
    weights: Tensor
    chosen: Tensor


Factors = tuple[Tensor, Tensor]
"""LoRA of all experts: [E, out, r] and [E, r, in], in the dtype of the weights."""


def trainable_numel(experts: Experts) -> int:
    """Elements that are trained, as the tape makes their gradients."""
    hidden, inner, count = experts.hidden, experts.inner, experts.number
    if experts.trained:
        return count * (hidden + 3 * hidden * inner)
    of_router = experts.router_rank * (hidden + count)
    return of_router + count * (experts.gate_up_rank * (hidden + 2 * inner) + experts.down_rank * (inner + hidden))


# --- the router -------------------------------------------------------------------------------------------------------


def route(tape: Tape, experts: Experts, x: Tensor) -> Routing:
    """[T, H] -> the weights of each token's k experts."""
    few = ROW.times(experts.per_token)
    with tape.at(*tape.where, "router"):
        weight = _weight(tape, experts, experts.number * experts.hidden)
        if experts.router_rank:
            # computed once to see that it fits, then again (torch/nn/utils/parametrize.py, register_parametrization)
            delta = _delta(tape, experts)
            tried = tape.new(weight.numel, experts.stored)
            del tried
            weight = op.add(tape, weight, delta)
        if experts.narrow is not None:
            x, weight = op.cast(tape, x, experts.narrow), op.cast(tape, weight, experts.narrow)
        logits = op.matmul_weight(tape, x, weight, ROW, experts.hidden, experts.number)
        if experts.scores in ("softmax_wide", "softmax"):
            values, chosen = op.top_k(tape, op.softmax(tape, logits, experts.cuda), few, experts.cuda)
        else:
            wide = op.cast(tape, logits, "float32") if experts.scores == "top_k_wide" else logits
            values, chosen = op.top_k(tape, wide, few, experts.cuda)
            values = _softmax_of_few(tape, values)
        if experts.normalised:
            values = op.multiply(tape, values, op.row_mean(tape, values, ROW))
        return Routing(logits, values if experts.scores == "softmax_wide" else op.cast(tape, values, x.dtype), chosen)


def _weight(tape: Tape, experts: Experts, numel: int) -> Tensor:
    """A weight of the base model: trained with method full only."""
    weight = Tensor(None, Size(numel), experts.stored)
    return tape.leaf(weight, "gradients") if experts.trained else weight


def _delta(tape: Tape, experts: Experts) -> Tensor:
    """The router's adapter as one matrix: lora_B @ lora_A * scaling (Linear.get_delta_weight)."""
    rank, hidden, count = experts.router_rank, experts.hidden, experts.number
    into = tape.leaf(Tensor(None, Size(rank * hidden), experts.lora), "gradients")
    out = tape.leaf(Tensor(None, Size(rank * count), experts.lora), "gradients")

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        return tape.new(Size(rank * count), gradient.dtype), tape.new(Size(rank * hidden), gradient.dtype)

    product = tape.apply((out, into), Size(count * hidden), experts.lora, backward, (out, into))
    return op.cast(tape, op.scale(tape, product), experts.stored)


def _softmax_of_few(tape: Tape, x: Tensor) -> Tensor:
    """Softmax over the chosen experts only, in their dtype."""
    return tape.apply(
        (x,), x.numel, x.dtype, lambda gradient, saved: (tape.new(gradient.numel, gradient.dtype),), saves_output=True
    )


# --- the experts ------------------------------------------------------------------------------------------------------


def compute(
    tape: Tape, experts: Experts, hidden: Tensor, routing: Routing, activated: Callable[[Tensor], Tensor]
) -> Tensor:
    """[T, H] -> [T, H]: each token's row once per expert of its, through that expert, weighted and added up.

    Args:
        activated: the activation of an expert's gate.
    """
    with tape.at(*tape.where, "experts"):
        wide, inner = experts.hidden, experts.inner
        rows = ROW.times(experts.per_token)
        # the wrapper of `down_proj` is around that of `gate_up_proj`; what a wrapper adapts lives until it returns
        down_factors = _factors(tape, experts, experts.down_rank, inner, wide)
        gate_up_factors = _factors(tape, experts, experts.gate_up_rank, wide, 2 * inner)
        sorted_ids, order = tape.new(rows, "int64"), tape.new(rows, "int64")
        states = chosen_rows(tape, experts, hidden, rows.times(wide), tape.new(rows, "int64"))
        weights = chosen_rows(tape, experts, routing.weights, rows, order)
        counted = tape.new(rows, "int32")
        biases = tape.new(rows.times(2 * inner), experts.stored) if experts.clamped else None
        gate_up = _adapted(tape, experts, gate_up_factors, wide, 2 * inner)
        with tape.at(*tape.where, "gate_up_proj"):
            out = grouped(tape, experts, op.cast(tape, states, experts.stored), gate_up, rows, wide, 2 * inner)
        out = (clamped_gate if experts.clamped else _gate)(tape, out, rows.times(inner), activated)
        if experts.clamped:
            biases = tape.new(rows.times(wide), experts.stored)
        down = _adapted(tape, experts, down_factors, inner, wide)
        with tape.at(*tape.where, "down_proj"):
            out = grouped(tape, experts, op.cast(tape, out, experts.stored), down, rows, inner, wide)
        weighted = _weighted(tape, out, weights)
        inverse = tape.new(rows, "int64")
        numbers = tape.new(rows, "int64")
        del numbers
        weighted = chosen_rows(tape, experts, weighted, rows.times(wide), inverse)
        result = op.cast(tape, _summed(tape, weighted, ROW.times(wide)), hidden.dtype)
        del biases, sorted_ids, counted, gate_up, down
        return result


def _factors(tape: Tape, experts: Experts, rank: int, into: int, out: int) -> Factors | None:
    """An adapter's factors for all experts (ParamWrapper.get_delta_factors), and the trial of what they make."""
    if not rank:
        return None
    count = experts.number
    narrow = tape.leaf(Tensor(None, Size(count * rank * into), experts.lora), "gradients")
    broad = tape.leaf(Tensor(None, Size(count * rank * out), experts.lora), "gradients")
    # lora_B is [out, r*E]: its gradient arrives as [E, out, r] and is laid out anew
    left = op.cast(tape, op.relayout(tape, broad), experts.stored)
    right = op.cast(tape, narrow, experts.stored)
    copied = tape.new(left.numel, experts.stored) if experts.cuda else None
    tried = tape.new(Size(count * into * out), experts.stored)  # see `route`
    del tried, copied
    return left, right


def _adapted(tape: Tape, experts: Experts, factors: Factors | None, into: int, out: int) -> Tensor:
    """All experts' weights [E, out, in]: the base's own, or baddbmm(base, left, right), as large again."""
    numel = experts.number * into * out
    if factors is None:
        return _weight(tape, experts, numel)
    left, right = factors
    of_left, of_right = left.numel, right.numel

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        left = tape.new(of_left, gradient.dtype)
        left = tape.new(of_left, gradient.dtype)  # times alpha
        copied = tape.new(of_left, gradient.dtype) if experts.cuda else None
        right = tape.new(of_right, gradient.dtype)
        del copied
        right = tape.new(of_right, gradient.dtype)
        return left, right

    copied = tape.new(of_left, left.dtype) if experts.cuda else None
    weight = tape.apply((left, right), Size(numel), experts.stored, backward, (left, right))
    del copied
    return weight


def grouped(tape: Tape, experts: Experts, x: Tensor, weight: Tensor, rows: Size, into: int, out: int) -> Tensor:
    """Each row times its expert's weight: [N, in] -> [N, out].

    transformers' own loop, an operator of its own, keeps the rows and makes all weights' gradient in any case.
    """
    needs_weight = weight.node is not None or not experts.grouped
    numel = Size(experts.number * into * out)

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        of_weight = tape.new(numel, gradient.dtype) if needs_weight else None
        return tape.new(rows.times(into), gradient.dtype), of_weight

    return tape.apply((x, weight), rows.times(out), x.dtype, backward, (x, weight) if needs_weight else (weight,))


def _gate(tape: Tape, x: Tensor, half: Size, activated: Callable[[Tensor], Tensor]) -> Tensor:
    """act(gate) * up, of gate and up beside each other."""
    gate, up = op.split(tape, x, [half, half])
    return op.multiply(tape, activated(gate), up)


def clamped_gate(tape: Tape, x: Tensor, half: Size, activated: Callable[[Tensor], Tensor]) -> Tensor:
    """gpt-oss: (up + 1) * gate * sigmoid(alpha * gate), both clamped, which alternate in x."""
    gate, up = op.slices(tape, x, [half, half])
    gate = op.clamp(tape, gate, 1)
    up = op.clamp(tape, up, 2)
    glu = op.multiply(tape, gate, op.sigmoid(tape, op.scale(tape, gate)))
    return op.multiply(tape, op.clone(tape, up), glu)


def _weighted(tape: Tape, x: Tensor, column: Tensor) -> Tensor:
    """X * column, in the wider dtype of both: [N, H], [N, 1] -> [N, H]."""
    narrow, rows = x.dtype, column.numel

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        of_x = tape.new(gradient.numel, gradient.dtype)
        product = tape.new(gradient.numel, gradient.dtype)
        if narrow != gradient.dtype:
            of_x = tape.new(gradient.numel, narrow)
        of_column = tape.new(rows, gradient.dtype)
        del product
        return of_x, of_column

    return tape.apply((x, column), x.numel, op.promoted(x, column), backward, (x, column))


def chosen_rows(tape: Tape, experts: Experts, x: Tensor, numel: Size, index: Tensor) -> Tensor:
    """x[index]; the gradient is added into zeros as large as x, on CUDA sorted by row (cuda/Indexing.cu).

    While a mode follows every operator, as the storage tracker on a CPU does, autograd adds not into them but into a
    copy of them (torch/csrc/autograd/FunctionsManual.cpp, index_backward: areAnyTensorSubclassLike).
    """
    whole = x.numel

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        zeros = tape.new(whole, gradient.dtype)
        if not experts.cuda:
            return (tape.new(whole, gradient.dtype),)
        by_row = [tape.new(places, "int64") for _ in range(3)]
        del by_row
        return (zeros,)

    places = index.numel
    return tape.apply((x,), numel, x.dtype, backward, (index,))


def _summed(tape: Tape, x: Tensor, numel: Size) -> Tensor:
    """The rows of each token added up; its gradient is written out to all of them."""
    whole = x.numel
    return tape.apply((x,), numel, x.dtype, lambda gradient, saved: (tape.new(whole, gradient.dtype),))
