"""A decoder layer's forward pass on the tape: transformers' Llama family with peft's adapters, line by line.

Local variables mirror transformers' (models/llama/modeling_llama.py): a name that lives on keeps its tensor alive there
and here. `module` stands for nn.Module.__call__, whose frame keeps a module's arguments until it returns.

Shapes: T tokens, H hidden, h query heads, k key and value heads, D head, F feed-forward, r rank.
"""

from __future__ import annotations

from functools import partial

from qlora_core.memory import operators as op
from qlora_core.memory.adapter import adapter, updated, with_magnitude
from qlora_core.memory.attention import attend
from qlora_core.memory.delta_net import gated_delta_net
from qlora_core.memory.experts import Experts, compute, route
from qlora_core.memory.families import WRITTEN_OUT
from qlora_core.memory.layer import ROW, Layer, Positions, Projection, module, parameter
from qlora_core.memory.tape import Size, Tape, Tensor

INDEXED = (op.slice_of, op.gather_rows, op.gather_rows)
"""How queries, keys and values are taken out of what is projected, where one head of keys is picked by index."""


@module
def decoder_layer(tape: Tape, layer: Layer, positions: Positions, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """[T, H] -> [T, H], and eager attention's weights."""
    residual = hidden
    if not layer.family.norms_after:
        hidden = norm(tape, layer, hidden, ROW)
    normed = hidden if layer.family.holds_normed else None
    attended, weights = self_attention(tape, layer, hidden, positions)  # transformers, too, lets the weights live on
    if layer.dropped_residual:
        attended = op.dropout(tape, attended, layer.shape.cuda)
    if layer.parallel:
        if layer.norms > 1:
            hidden = norm(tape, layer, residual, ROW)
        fed = feed_forward(tape, layer, hidden)
        if layer.dropped_residual:
            fed = op.dropout(tape, fed, layer.shape.cuda)
        return op.add(tape, residual, op.add(tape, attended, fed)), weights
    hidden = attended
    if layer.norms == 4 or layer.family.norms_after:
        hidden = norm(tape, layer, hidden, ROW)
    if not layer.family.holds_attended:
        del attended
    if layer.family.scaled:
        hidden = op.scale(tape, hidden)
    hidden = op.add(tape, residual, hidden)
    residual = hidden
    if not layer.family.norms_after:
        hidden = norm(tape, layer, hidden, ROW)
    if layer.experts is not None:
        hidden = mixture(tape, layer, layer.experts, hidden)
    else:
        hidden = feed_forward(tape, layer, hidden)
    del normed
    if layer.dropped_residual:
        hidden = op.dropout(tape, hidden, layer.shape.cuda)
    if layer.norms == 4 or layer.family.norms_after:
        hidden = norm(tape, layer, hidden, ROW)
    if layer.family.scaled:
        hidden = op.scale(tape, hidden)
    return op.add(tape, residual, hidden), weights


@module
def norm(tape: Tape, layer: Layer, x: Tensor, rows: Size) -> Tensor:
    """RMSNorm in float32 as transformers writes it, or the LayerNorm kernel; `rows` are normalised one by one."""
    weight = parameter(tape, layer, layer.hidden, layer.stream)
    with tape.at(*tape.where, "norm"):
        if layer.norm not in WRITTEN_OUT:
            return layer_norm(tape, layer, x, rows)
        dtype = x.dtype
        x = op.cast(tape, x, "float32")
        if layer.norm == "centred":
            mean = op.row_mean(tape, x, rows)
            variance = op.row_mean(tape, op.square(tape, op.less_mean(tape, x, mean)), rows)
            x = op.less_mean(tape, x, mean)
        else:
            variance = op.row_mean(tape, op.square(tape, x), rows)
        x = op.multiply(tape, x, op.reciprocal_root(tape, variance))
        if layer.norm == "rms":
            return op.multiply_weight(tape, op.cast(tape, x, dtype), weight)
        x = op.multiply_weight(tape, x, weight)
        return op.cast(tape, x, dtype)


def layer_norm(tape: Tape, layer: Layer, x: Tensor, rows: Size) -> Tensor:
    """LayerNorm as one kernel: in float32 where autocast makes it so, or where the model does, and narrowed again."""
    if layer.norm == "layer_wide":
        return op.cast(tape, op.layer_norm_kernel(tape, op.cast(tape, x, "float32"), rows), x.dtype)
    if layer.norm == "layer" and layer.autocast and layer.shape.cuda:  # weight and bias, too, become float32
        scales = tape.new(Size(2 * layer.hidden), "float32")
        return op.layer_norm_kernel(tape, op.cast(tape, x, "float32"), rows, (scales,))
    if layer.norm == "layer_narrow" and layer.narrow is not None:
        x = op.cast(tape, x, layer.narrow)
    return op.layer_norm_kernel(tape, x, rows)


@module
def self_attention(tape: Tape, layer: Layer, hidden: Tensor, positions: Positions) -> tuple[Tensor, Tensor | None]:
    """[T, H] -> [T, H], and eager attention's weights; queries are [T, h*D], keys and values [T, k*D]."""
    if layer.delta_net is not None:
        projected = [linear(tape, layer, hidden, projection, ROW) for projection in layer.qkv]
        attended = gated_delta_net(tape, layer, layer.delta_net, *projected)
        return linear(tape, layer, attended, layer.output, ROW), None
    shape, gate = layer.shape, None
    if len(layer.qkv) == 1:
        cut = op.split if layer.family.splits else op.slices
        joined = linear(tape, layer, hidden, layer.qkv[0], ROW)
        if layer.clipped:
            joined = op.clamp(tape, joined, 2)
        widths = [ROW.times(heads * shape.dim) for heads in (shape.queries, shape.keys, shape.keys)]
        if shape.indexed:
            query, key, value = (make(tape, joined, width) for make, width in zip(INDEXED, widths, strict=True))
        else:
            query, key, value = cut(tape, joined, widths)
        del joined
    else:
        query = linear(tape, layer, hidden, layer.qkv[0], ROW)
        if layer.family.gated_attention:
            half = ROW.times(shape.queries * shape.dim)
            query, gate = op.split(tape, query, [half, half])
            gate = op.clone(tape, gate)  # head by head it lies beside the queries
        if layer.head_norms == "projected":
            query = norm(tape, layer, query, ROW.times(shape.queries))
        key = linear(tape, layer, hidden, layer.qkv[1], ROW)
        if layer.head_norms == "projected":
            key = norm(tape, layer, key, ROW.times(shape.keys))
        value = linear(tape, layer, hidden, layer.qkv[2], ROW)
        if layer.clipped:  # in place there, of which autograd keeps a copy: as much as a result and what it came of
            query, key, value = (op.clamp(tape, x, 2) for x in (query, key, value))
    if layer.head_norms == "together":
        query, key = normalised(tape, layer, query, key)
    if layer.rotary:
        with tape.at(*tape.where, "rotary"):
            query, key = rotated(tape, query, positions), rotated(tape, key, positions)
    if layer.head_norms == "rotated":
        query, key = normalised(tape, layer, query, key)
    with tape.at(*tape.where, "attention"):
        attended, weights = attend(
            tape, layer.kernel, query, key, value, layer.shape, layer.stream, layer.narrow, positions.mask
        )
    if gate is not None:
        attended = op.multiply(tape, attended, op.sigmoid(tape, gate))
    return linear(tape, layer, attended, layer.output, ROW), weights


def normalised(tape: Tape, layer: Layer, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys, head by head."""
    shape = layer.shape
    query = norm(tape, layer, query, ROW.times(shape.queries))
    return query, norm(tape, layer, key, ROW.times(shape.keys))


def rotated(tape: Tape, x: Tensor, positions: Positions) -> Tensor:
    """X * cos + rotate_half(x) * sin."""
    return op.add(
        tape,
        op.multiply_constant(tape, x, positions.cosine),
        op.multiply_constant(tape, op.rotate_half(tape, x), positions.sine),
    )


@module
def mixture(tape: Tape, layer: Layer, experts: Experts, x: Tensor) -> Tensor:
    """[T, H] -> [T, H]: each token through some of the experts and, where there is one, the shared expert."""
    shared = feed_forward(tape, layer, x) if layer.shared_gate is not None else None
    routing = route(tape, experts, x)
    output = compute(tape, experts, x, routing, partial(activated, tape, layer))
    if layer.shared_gate is None or shared is None:
        return output
    gate = op.sigmoid(tape, linear(tape, layer, x, layer.shared_gate, ROW))
    shared = op.multiply(tape, shared, gate)
    return op.add(tape, output, shared)


@module
def feed_forward(tape: Tape, layer: Layer, x: Tensor) -> Tensor:
    """[T, H] -> [T, F] -> [T, H], gated or not."""
    *into, down = layer.feed_forward
    if not layer.gated:
        return linear(tape, layer, activated(tape, layer, linear(tape, layer, x, into[0], ROW)), down, ROW)
    if len(into) == 1:
        half = ROW.times(into[0].out_features // 2)
        gate, up = op.slices(tape, linear(tape, layer, x, into[0], ROW), [half, half])
        product = op.multiply(tape, activated(tape, layer, gate), up)
        del gate, up
        return linear(tape, layer, product, down, ROW)
    return linear(
        tape,
        layer,
        op.multiply(
            tape,
            activated(tape, layer, linear(tape, layer, x, into[0], ROW)),
            linear(tape, layer, x, into[1], ROW),
        ),
        down,
        ROW,
    )


@module
def activated(tape: Tape, layer: Layer, x: Tensor) -> Tensor:
    """SiLU or GELU as one kernel, ReLU, its square, or one of the GELUs that transformers composes (activations.py)."""
    with tape.at(*tape.where, "activation"):
        if layer.activation == "relu":
            return op.relu(tape, x)
        if layer.activation == "relu_squared":
            x = op.relu(tape, x)
            # autocast computes powers in float32
            return op.square(tape, op.cast(tape, x, "float32") if layer.autocast and layer.shape.cuda else x)
        if layer.activation == "composed":
            return op.composed_gelu(tape, x, layer.autocast and layer.shape.cuda)
        if layer.activation == "fast":
            return op.fast_gelu(tape, x)
        if layer.activation == "quick":
            return op.multiply(tape, x, op.sigmoid(tape, op.scale(tape, x)))
        return op.bloom_gelu(tape, x) if layer.activation == "bloom" else op.activation(tape, x)


@module
def linear(tape: Tape, layer: Layer, x: Tensor, projection: Projection, rows: Size) -> Tensor:
    """A linear layer with its adapter, as peft computes it (tuners/lora/bnb.py and layer.py)."""
    with tape.at(*tape.where, projection.name):
        result = base_linear(tape, layer, x, projection, rows)
        if not projection.adapter:
            return result
        expected = result.dtype
        if not (layer.widens or layer.divided or projection.storage == "8bit"):
            return updated(tape, layer, x, result, projection, rows)
        if projection.storage == "4bit":
            result = op.clone(tape, result)
        # on CUDA the quantized layers' adapters leave it to autocast
        converts = projection.storage == "plain" or not (layer.autocast and layer.shape.cuda)
        if converts and layer.widens:
            x = op.cast(tape, x, layer.lora)
        if layer.dora:
            return op.cast(tape, with_magnitude(tape, layer, x, result, projection, rows), expected)
        if projection.storage == "plain":
            result = op.add(tape, result, adapter(tape, layer, x, projection, rows))
            return op.cast(tape, result, expected)
        update = adapter(tape, layer, x, projection, rows)
        if converts:
            update = op.cast(tape, update, expected)
        return op.add(tape, result, update)


@module
def base_linear(tape: Tape, layer: Layer, x: Tensor, projection: Projection, rows: Size) -> Tensor:
    """The frozen (or, with method full, trained) weight's product."""
    into, out = projection.in_features, projection.out_features
    if projection.storage == "4bit":
        narrow = op.cast(tape, x, layer.compute)
        product = op.matmul_4bit(tape, narrow, rows, into, out, projection.blocks if projection.nested else 0)
        return op.cast(tape, product, x.dtype)
    if projection.storage == "8bit":
        return op.matmul_8bit(tape, x, rows, into, out, layer.shape.cuda)
    weight = parameter(tape, layer, into * out, layer.stream)
    return op.linear(tape, x, weight, rows, into, out, layer.narrow, layer.divided)
