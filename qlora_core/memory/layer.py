"""What decides the timeline of one decoder layer, and what all rooms of the tape's programs need.

Shapes: T tokens, H hidden, h query heads, k key and value heads, D head, F feed-forward, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Literal, NamedTuple, ParamSpec, TypeVar

from qlora_core.architecture import Activation, DeltaNet
from qlora_core.memory.attention import AttentionKernel, Heads
from qlora_core.memory.experts import Experts
from qlora_core.memory.families import Family, HeadNorms, Norm
from qlora_core.memory.tape import DType, Size, Tape, Tensor

P = ParamSpec("P")
R = TypeVar("R")
Storage = Literal["4bit", "8bit", "plain"]

ROW = Size(per_token=1)
"""One element per token."""


class Projection(NamedTuple):
    """A linear layer as the tape needs it.

    Attributes:
        name: its name, for the words of a moment.
        in_features, out_features: its weight is [out_features, in_features].
        storage: how bitsandbytes keeps it.
        blocks: absmax constants of its weight, dequantized on the way when `nested`.
        nested: whether its constants are quantized again.
        adapter: whether it has a LoRA adapter.
        bias: whether it adds one.
    """

    name: str
    in_features: int
    out_features: int
    storage: Storage
    blocks: int
    nested: bool
    adapter: bool
    bias: bool


class Layer(NamedTuple):
    """What decides the timeline of one decoder layer.

    Attributes:
        qkv, output, feed_forward: its projections; one `qkv` is a fused one. With experts, the feed-forward is the
            shared expert's, or none.
        delta_net: what it has in place of attention; the projections of that are `qkv`, then.
        experts: its mixture of experts.
        shared_gate: what weighs the shared expert.
        compute, stream, lora: dtypes of matrix products, of the unquantized weights and with them the residual stream,
            and of the adapters.
        norm: how its norms are computed.
        norms: norms of a layer: four where the outputs of attention and feed-forward are normalised too (Gemma 2, 3);
            in a parallel layer one or two.
        activation: how it is computed.
        family: what else of the model type's code decides memory.
        rotary: queries and keys are rotated by their positions.
        clipped: queries, keys and values are clamped.
        dropped_residual: what is added to the residual stream passes a dropout of the base model's own.
        widens: peft gives the inputs of adapters the dtype of their weights.
        dora: adapters have magnitudes (DoRA).
        trained: all weights are trained (method full).
        divided: ZeRO-3 divides the weights, and has linears of its own.
    """

    hidden: int
    shape: Heads
    qkv: tuple[Projection, ...]
    output: Projection
    feed_forward: tuple[Projection, ...]
    gated: bool
    parallel: bool
    delta_net: DeltaNet | None
    experts: Experts | None
    shared_gate: Projection | None
    norm: Norm
    norms: int
    activation: Activation
    family: Family
    rotary: bool
    clipped: bool
    dropped_residual: bool
    head_norms: HeadNorms | None
    compute: DType
    stream: DType
    lora: DType
    rank: int
    dropout: bool
    autocast: bool
    widens: bool
    dora: bool
    trained: bool
    divided: bool
    kernel: AttentionKernel

    @property
    def narrow(self) -> DType | None:
        """The dtype of products under autocast; None without."""
        return self.compute if self.autocast else None


class Positions(NamedTuple):
    """What all layers share: rotary tables [S, D] and, for eager attention, the mask [B, 1, S, S]."""

    cosine: Tensor
    sine: Tensor
    mask: Tensor | None


def module(call: Callable[P, R]) -> Callable[P, R]:
    """nn.Module.__call__: the caller's arguments stay alive until the module returns."""

    @wraps(call)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        return call(*args, **kwargs)

    return held


def parameter(tape: Tape, layer: Layer, numel: int, dtype: DType) -> Tensor:
    """A weight of the base model: trained with method full only."""
    weight = Tensor(None, Size(numel), dtype)
    return tape.leaf(weight, "gradients") if layer.trained else weight
