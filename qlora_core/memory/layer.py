"""What decides the timeline of one decoder layer, and what all rooms of the tape's programs need.

Shapes: T tokens, H hidden, h query heads, k key and value heads, D head, F feed-forward, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Literal, NamedTuple, ParamSpec, TypeVar

from qlora_core.memory.attention import AttentionKernel, Heads
from qlora_core.memory.experts import Experts
from qlora_core.memory.tape import DType, Size, Tape, Tensor

P = ParamSpec("P")
R = TypeVar("R")
Storage = Literal["4bit", "8bit", "plain"]
Activation = Literal["kernel", "relu", "relu_squared", "composed", "bloom"]
HeadNorms = Literal["", "projected", "together", "rotated"]
"""Where queries and keys are normalised: each as it is projected (Qwen 3), once all are (Gemma 3), or after they were
rotated (Hunyuan)."""
Norm = Literal["rms", "rms_wide", "centred", "layer", "layer_wide", "layer_narrow"]
"""How a norm is computed: RMSNorm written out in float32, which narrows before it multiplies by its weight (Llama) or
after (Gemma), or subtracts the mean, too (Cohere); or torch's LayerNorm, which autocast makes float32, of a float32
copy (OLMo), or as autocast does not see it (Nemotron)."""
WRITTEN_OUT: tuple[Norm, ...] = ("rms", "rms_wide", "centred")

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
        experts: its mixture of experts.
        shared_gate: what weighs the shared expert.
        compute, stream, lora: dtypes of matrix products, of the unquantized weights and with them the residual stream,
            and of the adapters.
        norm: how its norms are computed.
        norms: norms of a layer: four where the outputs of attention and feed-forward are normalised too (Gemma 2, 3);
            in a parallel layer one or two.
        norms_after: only the outputs are normalised (OLMo 2).
        activation: how it is computed.
        scaled: what is added to the residual stream, and the embedding, are multiplied by a number (Granite).
        holds_attended, holds_normed: attention's output, and what it was computed of, have names of their own, and live
            as long as the layer runs.
        splits: a fused projection's product is split into queries, keys and values; else they are slices of it.
        rotary: queries and keys are rotated by their positions.
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
    experts: Experts | None
    shared_gate: Projection | None
    norm: Norm
    norms: int
    norms_after: bool
    activation: Activation
    scaled: bool
    holds_attended: bool
    holds_normed: bool
    splits: bool
    rotary: bool
    dropped_residual: bool
    head_norms: HeadNorms
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
