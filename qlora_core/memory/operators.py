"""The operators of a training step: what each allocates forward and backward, and what it saves in between.

A function stands for the PyTorch or bitsandbytes operator of its name. The backward formulas are those of
tools/autograd/derivatives.yaml and torch/csrc/autograd/FunctionsManual.cpp (PyTorch 2.13), temporaries included.

Shapes: T tokens (B*S), H hidden, D head, h heads, r rank. A `Size` given as numel counts elements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qlora_core.memory.tape import ITEMSIZE, LEAF_ORDER, DType, Gradients, Node, Room, Size, Tape, Tensor
from qlora_core.strategy import LOSS_PARTS


def promoted(a: Tensor, b: Tensor) -> DType:
    """Dtype of what is computed from both."""
    return a.dtype if a.dtype == b.dtype else "float32"


def cast(tape: Tape, x: Tensor, dtype: DType) -> Tensor:
    """x.to(dtype): `x` itself where it has the dtype already."""
    if x.dtype == dtype:
        return x
    narrow = x.dtype
    return tape.apply((x,), x.numel, dtype, lambda gradient, saved: (tape.new(gradient.numel, narrow),))


def copied(tape: Tape, x: Tensor, dtype: DType | None) -> Tensor:
    """x.to(dtype) where no gradient leads back: `x` itself where it has the dtype, or none is asked for."""
    return x if dtype in (None, x.dtype) else tape.new(x.numel, dtype)


def narrowed(tape: Tape, x: Tensor, dtype: DType | None) -> Tensor:
    """What autocast makes of an input in front of a matrix product; `dtype` is None where it is off.

    Copies of trained float32 leaves are cached (aten/src/ATen/autocast_mode.cpp, cached_cast).
    """
    if dtype is None or x.dtype == dtype:
        return x
    copy = cast(tape, x, dtype)
    if tape.caches_casts and x.dtype == "float32" and x.node is not None and x.node.order == LEAF_ORDER:
        tape.copies.append(copy)
    return copy


def clone(tape: Tape, x: Tensor) -> Tensor:
    """x.clone(); its gradient passes through."""
    return tape.apply((x,), x.numel, x.dtype, lambda gradient, saved: (gradient.alias(),))


def add(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """A + b; the gradient passes through to both, in each one's dtype."""

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        return tuple(
            gradient.alias() if dtype == gradient.dtype else tape.new(gradient.numel, dtype) for dtype in dtypes
        )

    dtypes = a.dtype, b.dtype
    return tape.apply((a, b), a.numel, promoted(a, b), backward)


def scale(tape: Tape, x: Tensor) -> Tensor:
    """X * number."""
    return tape.apply((x,), x.numel, x.dtype, lambda gradient, saved: (tape.new(gradient.numel, gradient.dtype),))


def multiply_constant(tape: Tape, x: Tensor, constant: Tensor) -> Tensor:
    """X * constant (of x's shape or broadcast to it), which needs no gradient and is kept for x's."""
    dtype = x.dtype

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        wide = tape.new(gradient.numel, gradient.dtype)
        return copied(tape, wide, dtype), None

    return tape.apply((x, constant), x.numel, promoted(x, constant), backward, saves=(constant,))


def multiply(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """A * b, both needing a gradient; `b` may be a column that is broadcast over a's rows."""
    shrunk = b.numel != a.numel
    column, dtypes = b.numel, (a.dtype, b.dtype)

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        of_b = tape.new(gradient.numel, gradient.dtype)  # other, self
        if shrunk:
            of_b = tape.new(column, gradient.dtype)
        of_a = tape.new(gradient.numel, gradient.dtype)
        return tuple(copied(tape, of, dtype) for of, dtype in zip((of_a, of_b), dtypes, strict=True))

    return tape.apply((a, b), a.numel, promoted(a, b), backward, saves=(a, b))


def square(tape: Tape, x: Tensor) -> Tensor:
    """x.pow(2); pow_backward computes grad * (2 * x.pow(1)) with both temporaries alive to the end of the line."""

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        power = tape.new(gradient.numel, gradient.dtype)
        twice = tape.new(gradient.numel, gradient.dtype)
        result = tape.new(gradient.numel, gradient.dtype)
        del power, twice
        return (result,)

    return tape.apply((x,), x.numel, x.dtype, backward, saves=(x,))


def row_mean(tape: Tape, x: Tensor, rows: Size) -> Tensor:
    """x.mean(-1, keepdim=True); the gradient is the expanded one divided, as large as x."""
    numel = x.numel
    return tape.apply((x,), rows, x.dtype, lambda gradient, saved: (tape.new(numel, gradient.dtype),))


def less_mean(tape: Tape, x: Tensor, mean: Tensor) -> Tensor:
    """X - mean of each row: the gradient passes through to `x`, and summed up to `mean`."""
    rows = mean.numel

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        negative = tape.new(gradient.numel, gradient.dtype)
        of_mean = tape.new(rows, gradient.dtype)
        del negative
        return gradient.alias(), of_mean

    return tape.apply((x, mean), x.numel, x.dtype, backward)


def reciprocal_root(tape: Tape, x: Tensor) -> Tensor:
    """torch.rsqrt(x + eps)."""
    shifted = scale(tape, x)
    return tape.apply(
        (shifted,), x.numel, x.dtype, lambda gradient, saved: (tape.new(gradient.numel, gradient.dtype),), (), True
    )


def layer_norm_kernel(tape: Tape, x: Tensor, rows: Size, scales: Sequence[Tensor] = ()) -> Tensor:
    """native_layer_norm: saves its input, and mean and reciprocal deviation of each row in float32.

    It saves `scales`, too: weight and bias, where they are not the model's own.
    """
    statistics = tape.new(rows.times(2), "float32")
    return tape.apply(
        (x,),
        x.numel,
        x.dtype,
        lambda gradient, saved: (tape.new(gradient.numel, gradient.dtype),),
        (x, statistics, *scales),
    )


def activation(tape: Tape, x: Tensor) -> Tensor:
    """Silu or gelu: one kernel each way, saves its input."""
    return tape.apply((x,), x.numel, x.dtype, lambda gradient, saved: (tape.new(gradient.numel, gradient.dtype),), (x,))


def relu(tape: Tape, x: Tensor) -> Tensor:
    """ReLU: keeps its result."""
    return tape.apply(
        (x,), x.numel, x.dtype, lambda gradient, saved: (tape.new(gradient.numel, gradient.dtype),), (), True
    )


def composed_gelu(tape: Tape, x: Tensor, wide_power: bool) -> Tensor:
    """0.5 * x * (1 + tanh(c * (x + 0.044715 * x**3))) operator by operator (transformers/activations.py).

    With `wide_power` autocast computes the power in float32.
    """
    half = scale(tape, x)
    # one name for all: in its one expression nothing outlives the operator that takes it
    inner = square(tape, cast(tape, x, "float32") if wide_power else x)
    inner = scale(tape, inner)
    inner = add(tape, x, inner)
    inner = scale(tape, inner)
    inner = tanh(tape, inner)
    inner = clone(tape, inner)
    return multiply(tape, half, inner)


def fast_gelu(tape: Tape, x: Tensor) -> Tensor:
    """0.5 * x * (1 + tanh(x * c * (1 + 0.044715 * x * x))): without a power, it keeps more than `composed_gelu`."""
    half = scale(tape, x)
    outer = scale(tape, x)
    inner = scale(tape, x)
    inner = multiply(tape, inner, x)
    inner = clone(tape, inner)
    outer = multiply(tape, outer, inner)
    del inner
    outer = tanh(tape, outer)
    outer = clone(tape, outer)
    return multiply(tape, half, outer)


def tanh(tape: Tape, x: Tensor) -> Tensor:
    """Keeps its result."""
    return tape.apply(
        (x,), x.numel, x.dtype, lambda gradient, saved: (tape.new(gradient.numel, gradient.dtype),), (), True
    )


SOFT_CAP = (scale, tanh, scale)
"""tanh(x / cap) * cap, operator by operator: each input is let go of when the next has its result."""


def bloom_gelu(tape: Tape, x: Tensor) -> Tensor:
    """The same as a function of its own, which keeps its input only (models/bloom/modeling_bloom.py, GeLUFunction)."""

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        made = [tape.new(x_numel, x_dtype) for _ in range(5)]
        made.clear()
        slope = tape.new(x_numel, x_dtype)
        of_x = tape.new(x_numel, x_dtype)
        del slope
        return (of_x,)

    x_numel, x_dtype = x.numel, x.dtype
    made = [tape.new(x_numel, x_dtype) for _ in range(4)]
    made.clear()
    return tape.apply((x,), x_numel, x_dtype, backward, (x,))


def dropout(tape: Tape, x: Tensor, on_cuda: bool) -> Tensor:
    """Training dropout: a byte mask on CUDA (native_dropout), noise in x's dtype on a CPU, where it comes first."""

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        return (tape.new(gradient.numel, gradient.dtype),)

    if not on_cuda:
        return tape.apply((x,), x.numel, x.dtype, backward, (tape.new(x.numel, x.dtype),))
    output, mask = tape.new(x.numel, x.dtype), tape.new(x.numel, "bool")
    if x.node is not None:
        kept = tape.save(mask)
        output.node = tape.node((x,), lambda gradient: backward(gradient, [kept()]))
    return output


def matmul_weight(tape: Tape, x: Tensor, weight: Tensor, rows: Size, in_features: int, out_features: int) -> Tensor:
    """Multiply the rows of `x` with an unquantized weight [out, in]; `x` is kept only where the weight is trained."""
    needs_input = x.node is not None
    trained = weight.node is not None

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        # [T, in_features] seen as [B, S, in_features], and the product transposed
        of_x = tape.new_view(rows.times(in_features), gradient.dtype) if needs_input else None
        of_weight = tape.new_view(Size(in_features * out_features), gradient.dtype) if trained else None
        return of_x, of_weight

    saves = ((x,) if trained else ()) + ((weight,) if needs_input else ())
    return tape.apply((x, weight), rows.times(out_features), x.dtype, backward, saves)


def linear(
    tape: Tape, x: Tensor, weight: Tensor, rows: Size, into: int, out: int, narrow: DType | None, divided: bool
) -> Tensor:
    """torch.nn.functional.linear of the rows of `x` with a weight [out, into].

    Args:
        narrow: the dtype of products under autocast; None without.
        divided: ZeRO-3 has put DeepSpeed's in its place.
    """
    if divided:
        return divided_linear(tape, x, weight, rows, into, out, narrow)
    x, weight = narrowed(tape, x, narrow), narrowed(tape, weight, narrow)
    return matmul_weight(tape, x, weight, rows, into, out)


def divided_linear(
    tape: Tape, x: Tensor, weight: Tensor, rows: Size, into: int, out: int, narrow: DType | None
) -> Tensor:
    """DeepSpeed's linear under ZeRO-3, LinearFunctionForZeroStage3 (0.19.8, runtime/zero/linear.py).

    It keeps `x` as it came, whether or not the weight is trained, and autocast casts inside: the transposed weight is a
    view, of which no copy is cached. On the way back each input is cast again, the weight's copy until it is done.
    """
    needs_input, trained = x.node is not None, weight.node is not None
    of_inputs = x.dtype, weight.dtype

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        kept_x, kept_weight = saved
        of_x = of_weight = weight_copy = None
        if needs_input:
            weight_copy = copied(tape, kept_weight, narrow)
            of_x = tape.new_view(rows.times(into), gradient.dtype)  # as in `matmul_weight`
        if trained:
            x_copy = copied(tape, kept_x, narrow)
            of_weight = tape.new(Size(into * out), gradient.dtype)
            del x_copy
        del weight_copy
        if of_x is not None:
            of_x = copied(tape, of_x, of_inputs[0])
        if of_weight is not None:
            of_weight = copied(tape, of_weight, of_inputs[1])
        return of_x, of_weight

    copies = copied(tape, x, narrow), copied(tape, weight, narrow)
    output = tape.apply((x, weight), rows.times(out), copies[0].dtype, backward, (x, weight))
    del copies
    return output


def multiply_weight(tape: Tape, x: Tensor, weight: Tensor) -> Tensor:
    """Weight * x, the weight [H] broadcast over rows; `x` is kept only where the weight is trained."""
    trained, dtype, per_weight = weight.node is not None, x.dtype, weight.numel

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        of_weight = tape.new(gradient.numel, gradient.dtype) if trained else None
        of_x = tape.new(gradient.numel, gradient.dtype)
        if of_weight is not None:
            of_weight = tape.new(per_weight, gradient.dtype)
        return copied(tape, of_x, dtype), of_weight

    saves = (weight, x) if trained else (weight,)
    return tape.apply((x, weight), x.numel, promoted(x, weight), backward, saves)


def rotate_half(tape: Tape, x: Tensor) -> Tensor:
    """cat(-x[D/2:], x[:D/2]): each half's gradient is written into zeros as large as x (slice_backward)."""
    half = Size(*(coefficient // 2 for coefficient in x.numel))
    first, second = slice_of(tape, x, half), slice_of(tape, x, half)
    negative = tape.apply(
        (second,), second.numel, x.dtype, lambda gradient, saved: (tape.new(gradient.numel, gradient.dtype),)
    )

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        return gradient.alias(half), gradient.alias(half)

    return tape.apply((negative, first), x.numel, x.dtype, backward)


def slices(tape: Tape, x: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """X cut along its features: views, whose gradients are each written into zeros as large as x."""
    return [slice_of(tape, x, size) for size in sizes]


def slice_of(tape: Tape, x: Tensor, numel: Size) -> Tensor:
    """A view of part of x."""
    whole = x.numel
    part = x.alias(numel)
    if x.node is not None:
        part.node = tape.node((x,), lambda gradient: (tape.new(whole, gradient.dtype),))
    return part


def split(tape: Tape, x: Tensor, sizes: Sequence[Size]) -> list[Tensor]:
    """X.split(sizes) or X.chunk(n): views, whose gradients wait for each other and are then written side by side."""
    whole = x.numel
    parts = [x.alias(size) for size in sizes]
    arrived: list[Tensor] = []

    def backward(gradient: Tensor) -> Gradients:
        arrived.append(gradient)
        if len(arrived) < len(sizes):
            return (None,)
        joined = tape.new(whole, gradient.dtype)
        arrived.clear()
        return (joined,)

    if x.node is not None:
        for part in parts:
            part.node = tape.node((x,), backward)
    return parts


def clamp(tape: Tape, x: Tensor, bounds: int) -> Tensor:
    """x.clamp with one bound or two: keeps x, and makes a byte mask for each bound on the way back."""

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        masks = [tape.new(gradient.numel, "bool") for _ in range(bounds)]
        result = tape.new(gradient.numel, gradient.dtype)
        del masks
        return (result,)

    return tape.apply((x,), x.numel, x.dtype, backward, (x,))


def sigmoid(tape: Tape, x: Tensor) -> Tensor:
    """Sigmoid: keeps its result."""
    return tape.apply(
        (x,), x.numel, x.dtype, lambda gradient, saved: (tape.new(gradient.numel, gradient.dtype),), (), True
    )


def top_k(tape: Tape, x: Tensor, few: Size, cuda: bool) -> tuple[Tensor, Tensor]:
    """The largest of each row, `few` in all, and where they are; the gradient is scattered into zeros as large as x.

    While a mode follows every operator, as the storage tracker on a CPU does, autograd scatters into a copy of them
    (torch/csrc/autograd/FunctionsManual.cpp, value_selecting_reduction_backward_symint).
    """
    whole = x.numel
    places = tape.new(few, "int64")

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        zeros = tape.new(whole, gradient.dtype)
        return (zeros if cuda else tape.new(whole, gradient.dtype),)

    return tape.apply((x,), few, x.dtype, backward, (places,)), places


def relayout(tape: Tape, x: Tensor) -> Tensor:
    """A view whose gradient arrives in another memory order and is copied (reshape of a transposed tensor)."""
    view = x.alias()
    if x.node is not None:
        view.node = tape.node((x,), lambda gradient: (tape.new(gradient.numel, gradient.dtype),))
    return view


def gather_rows(tape: Tape, x: Tensor, numel: Size) -> Tensor:
    """x[rows]: a copy of chosen rows, whose gradient is added into zeros as large as x."""
    whole = x.numel
    return tape.apply((x,), numel, x.dtype, lambda gradient, saved: (tape.new(whole, gradient.dtype),))


def softmax(tape: Tape, x: Tensor, cuda: bool, result: DType = "float32") -> Tensor:
    """Softmax whose result is float32, or narrow as its input is.

    On CUDA float16 scores are widened inside the kernel, and so is the gradient narrowed; all others, bfloat16 too, are
    widened beforehand (aten/src/ATen/native/SoftMax.cpp). Backward CUDA computes grad * output first (cuda/SoftMax.cu,
    softmax_backward_cuda_out).
    """
    if not (cuda and x.dtype == "float16"):
        x = cast(tape, x, result)
    dtype = x.dtype

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        of_x = tape.new(gradient.numel, dtype)
        product = tape.new(gradient.numel, result) if cuda else None
        del product
        return (of_x,)

    return tape.apply((x,), x.numel, result, backward, saves_output=True)


def safe_softmax(tape: Tape, x: Tensor, cuda: bool) -> Tensor:
    """aten::_safe_softmax of float32 scores: softmax, then zeros for rows that are masked throughout.

    What it makes on the way is within one operator, where the storage tracker on a CPU does not see it.
    """
    plain, masked = (tape.new(x.numel, x.dtype), tape.new(x.numel, "bool")) if cuda else (None, None)

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        result = tape.new(gradient.numel, gradient.dtype)
        product = tape.new(gradient.numel, gradient.dtype) if cuda else None
        del product
        return (result,)

    output = tape.apply((x,), x.numel, x.dtype, backward, saves_output=True)
    del plain, masked
    return output


def batched_matmul(tape: Tape, a: Tensor, b: Tensor, numel: Size, copies: tuple[bool, bool, bool]) -> Tensor:
    """torch.matmul of [B, h, ., .] tensors: folded to 3 dimensions, which copies what is not laid out so.

    `copies` says whether `a`, `b` and the result's gradient have to be copied for that.
    """
    a, b = (clone(tape, x) if copied else x for x, copied in zip((a, b), copies, strict=False))
    sizes = a.numel, b.numel

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        folded = tape.new(gradient.numel, gradient.dtype) if copies[2] else gradient
        of_b = tape.new(sizes[1], folded.dtype)  # autograd's generated code takes inputs by their names: mat2, self
        return tape.new(sizes[0], folded.dtype), of_b

    return tape.apply((a, b), numel, a.dtype, backward, (a, b))


def matmul_4bit(tape: Tape, x: Tensor, rows: Size, into: int, out: int, nested_blocks: int) -> Tensor:
    """Bitsandbytes' MatMul4Bit (autograd/_functions.py): dequantizes the weight on the way there and on the way back.

    It keeps no activation: the packed weight and its constants are the model's own. `nested_blocks` is how many absmax
    constants are dequantized first, 0 without double quantization.
    """
    dtype = x.dtype
    room: Room = "dequantization_workspace"

    def dequantized() -> Tensor:
        absmax = tape.new(Size(nested_blocks), "float32", room) if nested_blocks else None
        weight = tape.new(Size(into * out), dtype, room)
        del absmax
        return weight

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        weight = dequantized()
        of_x = tape.new(rows.times(into), dtype)
        del weight
        return (of_x,)

    weight = dequantized()
    output = tape.apply((x,), rows.times(out), dtype, backward)
    del weight
    return output


def matmul_8bit(tape: Tape, x: Tensor, rows: Size, into: int, out: int, cuda: bool) -> Tensor:
    """Bitsandbytes' MatMul8bitLt: keeps its input in `ctx.tensors`, not through save_for_backward.

    No checkpoint sees such a tensor, and the backward pass does not let go of it: it stays alive from the forward pass
    of every layer for as long as the loss. On a CPU bitsandbytes takes MatMul8bitFp, which does the same, and
    dequantizes the weight on the way there, too.
    """
    kept, dtype = x.alias(), x.dtype

    def dequantized() -> Tensor:
        return tape.new(Size(into * out), kept.dtype, "dequantization_workspace")

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        weight = dequantized()
        of_x = tape.new(kept.numel, kept.dtype)
        del weight
        tape.held.append(kept)
        return (of_x,)

    if not cuda:
        weight = dequantized()
        output = tape.apply((x,), rows.times(out), dtype, backward)
        del weight
        return output
    half = cast(tape, x.alias(), "float16")
    quantized = tape.new(x.numel, "int8")
    scales = tape.new(rows, "float32")
    del half
    product = tape.new(rows.times(out), "int32")
    output = tape.apply((x,), rows.times(out), dtype, backward)
    del product, quantized, scales
    return output


def added_in_place(tape: Tape, result: Tensor, x: Tensor, first: Tensor, second: Tensor, inner_numel: Size) -> Tensor:
    """Result += x A^T B^T * scaling (training/lora.py, Update), with `first` A and `second` B.

    It keeps x, x A^T and the weights as they are.
    """
    dtype, of_input, input_numel, needs_input = result.dtype, x.dtype, x.numel, x.node is not None

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        of_second = tape.new(second.numel, dtype)
        copy = copied(tape, second, dtype)
        of_inner = tape.new(inner_numel, dtype)
        del copy
        of_first, of_x = tape.new(first.numel, dtype), None
        if needs_input:
            of_x = tape.new(input_numel, dtype)
            copied(tape, first, dtype)
            of_x = copied(tape, of_x, of_input)
        del of_inner
        return gradient.alias(), of_x, copied(tape, of_first, first.dtype), copied(tape, of_second, second.dtype)

    narrow = copied(tape, x, dtype)
    copy = copied(tape, first, dtype)
    inner = tape.new(inner_numel, dtype)
    del copy
    copied(tape, second, dtype)
    tape.summed.append((result.numel.times(ITEMSIZE[dtype]), tape.where))
    kept = [tape.save(tensor) for tensor in (narrow, inner, first, second)]
    output = result.alias()
    output.node = tape.node((result, x, first, second), lambda gradient: backward(gradient, [get() for get in kept]))
    return output


def log_softmax(tape: Tape, x: Tensor) -> Tensor:
    """log_softmax of float32 logits: keeps its result."""
    return tape.apply(
        (x,), x.numel, x.dtype, lambda gradient, saved: (tape.new(gradient.numel, gradient.dtype),), (), True
    )


def negative_log_likelihood(tape: Tape, x: Tensor) -> Tensor:
    """nll_loss: a scalar from log-probabilities; its gradient is as large as they are."""
    numel, dtype = x.numel, x.dtype
    return tape.apply((x,), Size(fixed=1), dtype, lambda gradient, saved: (tape.new(numel, dtype),), (x,))


def liger_cross_entropy(tape: Tape, x: Tensor, rows: Size, hidden: int, vocab: int) -> Tensor:
    """Liger's summed loss of the rows of `x` by a frozen head, made in one piece: a scalar.

    It makes room for the gradient by `x` first, and its kernel puts the logits' gradient in their place (liger-kernel
    0.8.5, ops/fused_linear_cross_entropy.py; on CUDA, where the head's product is written into one buffer). The logits
    are read twice and written once meanwhile, as what is added to is.
    """
    of_x = tape.new(rows.times(hidden), x.dtype)
    losses, learned = tape.new(rows, "float32"), tape.new(rows, "bool")
    logits = tape.new(rows.times(vocab), x.dtype)
    tape.summed.append((logits.numel.times(ITEMSIZE[logits.dtype]), tape.where))
    del logits
    loss = tape.apply((x,), Size(fixed=1), "float32", lambda gradient, saved: (saved[0].alias(),), (of_x,))
    del losses, learned
    return loss


def into_gradient(tape: Tape, logits: Tensor) -> Tensor:
    """The gradient of the loss by `logits`, which takes their place (training/loss.py): a part at a time is float32."""
    whole, wide = logits.numel, logits.dtype == "float32"

    def part() -> Tensor:
        return tape.new(Size(*(-(-4 * coefficient // LOSS_PARTS) for coefficient in whole)), "int8")

    narrow = None if wide else part()
    chances = part()
    del narrow, chances
    for size in (4, 4, ITEMSIZE[logits.dtype]) if wide else (4, 4, 4, ITEMSIZE[logits.dtype]):
        tape.summed.append((whole.times(size), tape.where))
    return logits.alias()


def differentiated(
    tape: Tape, x: Tensor, program: Callable[[Tensor], Tensor], rows: Size, gradient_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """A loss of the parts of x, a scalar whose gradient by x is made in the forward pass, part by part.

    Args:
        program: what is computed of a part.
        gradient_of: the loss's gradient by that.
    """
    if x.node is None:
        return tape.new(Size(fixed=1), "float32")
    gradient = tape.new(x.numel, x.dtype)
    arrived: list[Tensor] = []

    def arrive(of_part: Tensor) -> Gradients:
        arrived.append(of_part)
        return ()

    part = program(x.alias(rows, Node(LEAF_ORDER, (), arrive, tape.where[1:])))
    if part.node is not None:
        phase, where, *_ = tape.where
        tape.backward_from(part.node, gradient_of(part), (phase, f"{where} gradient"))
    del part
    arrived.clear()
    return tape.apply(
        (x,), Size(fixed=1), "float32", lambda of_sum, saved: (tape.new(saved[0].numel, saved[0].dtype),), (gradient,)
    )
