"""A LoRA adapter on the tape, plain or with DoRA's magnitudes, as peft computes it (0.21.2, tuners/lora)."""

from __future__ import annotations

from qlora_core.memory import operators as op
from qlora_core.memory.layer import Layer, Projection, module
from qlora_core.memory.tape import Room, Size, Tape, Tensor

WORKSPACE: Room = "dequantization_workspace"


def adapter(tape: Tape, layer: Layer, x: Tensor, projection: Projection, rows: Size) -> Tensor:
    """lora_B(lora_A(dropout(x))) * scaling."""
    rank = layer.rank
    return op.scale(
        tape,
        adapter_linear(
            tape,
            layer,
            adapter_linear(tape, layer, dropped(tape, layer, x), rows, projection.in_features, rank),
            rows,
            rank,
            projection.out_features,
        ),
    )


def updated(tape: Tape, layer: Layer, x: Tensor, result: Tensor, projection: Projection, rows: Size) -> Tensor:
    """`result` with the adapter's product added where it lies, if it is narrow (training/lora.py, forward)."""
    if result.dtype != layer.narrow:
        return op.add(tape, result, adapter(tape, layer, x, projection, rows))
    rank, into, out = layer.rank, projection.in_features, projection.out_features
    x, changed = dropped(tape, layer, x), result
    if projection.storage == "plain" and projection.bias:  # a view of what addmm gave, as a 4-bit layer's can be, too
        changed = op.clone(tape, result)
    first, second = (tape.leaf(Tensor(None, Size(n * rank), layer.lora), "gradients") for n in (into, out))
    return op.added_in_place(tape, changed, x, first, second, rows.times(rank))


@module
def dropped(tape: Tape, layer: Layer, x: Tensor) -> Tensor:
    """LoRA dropout; peft puts an identity there at probability 0."""
    return op.dropout(tape, x, layer.shape.cuda) if layer.dropout else x


@module
def adapter_linear(tape: Tape, layer: Layer, x: Tensor, rows: Size, into: int, out: int) -> Tensor:
    """One of an adapter's two linears; under autocast its input and weight are cast to the compute dtype."""
    weight = tape.leaf(Tensor(None, Size(into * out), layer.lora), "gradients")
    return op.linear(tape, x, weight, rows, into, out, layer.narrow, layer.divided)


def with_magnitude(tape: Tape, layer: Layer, x: Tensor, result: Tensor, projection: Projection, rows: Size) -> Tensor:
    """`result` with the adapter and DoRA's magnitudes (tuners/lora/variants.py, DoraLinearVariant.forward)."""
    if not layer.dropout:
        return op.add(tape, result, decomposed(tape, layer, x, result, projection, rows))
    x = dropped(tape, layer, x)
    return op.add(tape, result, decomposed(tape, layer, x, None, projection, rows))


@module
def decomposed(
    tape: Tape, layer: Layer, x: Tensor, base_result: Tensor | None, projection: Projection, rows: Size
) -> Tensor:
    """What DoRA adds (tuners/lora/dora.py, DoraLinearLayer.forward).

    All of B A, the weight and their sum are made, to take the norm of each output's row: the identity goes through both
    linears, in the adapter's dtype. Nothing leads back from there, but its graph lives as long as B A: with it the
    identity, unless a checkpoint has seen to it that nothing is kept.
    """
    rank, into, out = layer.rank, projection.in_features, projection.out_features
    identity = tape.new(Size(into * into), layer.lora)
    narrow = tape.new(Size(into * rank), layer.lora)
    product = tape.new(Size(into * out), layer.lora)  # peft's lora_weight
    if tape.frame is not None and not tape.frame.again:
        del identity, narrow
    magnitude = tape.leaf(Tensor(None, Size(out), layer.lora), "gradients")
    weight = base_weight(tape, layer, projection)
    scaled = tape.new(Size(into * out), x.dtype)
    summed = tape.new(Size(into * out), x.dtype)
    del scaled
    norm = tape.new(Size(out), x.dtype)
    del summed
    scale = tape.apply(
        (magnitude, norm),
        Size(out),
        x.dtype,
        lambda gradient, saved: (tape.new(gradient.numel, gradient.dtype), None),
        (norm,),
    )
    lora_result = adapter_linear(tape, layer, x, rows, into, rank)
    lora_result = adapter_linear(tape, layer, lora_result, rows, rank, out)
    if base_result is None:
        base_result = op.matmul_weight(tape, x, weight, rows, into, out)
    elif projection.bias:
        base_result = op.clone(tape, base_result)
    update = op.add(
        tape,
        op.multiply(tape, base_result, op.clone(tape, scale)),
        op.scale(tape, op.multiply(tape, lora_result, scale)),
    )
    del product, weight
    return update


def base_weight(tape: Tape, layer: Layer, projection: Projection) -> Tensor:
    """The base layer's weight in the adapter's dtype: dequantized where it is quantized, itself where it has it."""
    numel = Size(projection.in_features * projection.out_features)
    if projection.storage == "plain":
        weight = Tensor(None, numel, layer.stream)
    else:
        absmax = tape.new(Size(projection.blocks), "float32", WORKSPACE) if projection.nested else None
        weight = tape.new(numel, layer.compute, WORKSPACE)
        del absmax
    return weight if weight.dtype == layer.lora else tape.new(numel, layer.lora, WORKSPACE)
