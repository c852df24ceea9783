"""The shapes of a causal language model, read from its Hugging Face ``config.json``: what memory is counted with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

EAGER_ONLY = frozenset({"bloom", "codegen", "gemma2", "gpt_oss", "gptj", "mpt"})
"""Model types whose attention has no sdpa form (transformers 5.23: `_supports_sdpa` of their classes)."""
MIXES_PACKED = frozenset({"bloom", "falcon", "gpt_oss", "mpt", "opt", "qwen3_5_moe_text", "qwen3_5_text"})
"""Model types whose code makes its attention mask without the positions (transformers 5.23, the calls of
create_causal_mask in their modeling_*.py), or does not begin linear attention anew with each example, so that packed
examples would see each other."""
ALWAYS_MASKED = frozenset({"falcon"})
"""Model types that hand sdpa a mask also where it is just causal (transformers 5.23, `allow_is_causal_skip=False`)."""
DROPS_ATTENTION = frozenset({"gpt2", "gpt_bigcode"})
"""Model types that drop out a tenth of attention's weights unless the config says otherwise (configuration_*.py)."""
NO_TEXT_FORM = frozenset({"mistral3"})
"""Model types that see of which transformers has no causal language model for text (``AutoModelForCausalLM``)."""
Activation = Literal["kernel", "relu", "relu_squared", "composed", "fast", "quick", "bloom"]
ACTIVATIONS: Mapping[str, Activation] = {
    **dict.fromkeys(("gelu", "gelu_pytorch_tanh", "hardswish", "leaky_relu", "relu6", "silu", "swish"), "kernel"),
    **dict.fromkeys(("relu", "sigmoid", "tanh"), "relu"),
    "relu2": "relu_squared",
    **dict.fromkeys(("gelu_new", "gelu_accurate", "gelu_python_tanh"), "composed"),
    "gelu_fast": "fast",
    "quick_gelu": "quick",
}
"""How those of transformers are computed that are modelled (5.23, activations.py): as one kernel that keeps its input,
or its result; or written out in Python, each in its own way."""
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config fields of models that change the output head's logits before the loss (Gemma 2, Cohere, Granite)."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a decoder layer (or `count` alike ones of a period): an ``nn.Linear`` or a GPT-2 ``Conv1D``.

    Routers and experts of transformers 5 are bare parameters, and counted in `layer_other_parameters`.

    Attributes:
        name: last part of the module's name, ``q_proj``.
        in_features, out_features: its weight is [out_features, in_features].
        bias: whether it has a bias of out_features.
        part: where it works, for the order of activations.
        count: how many of it a period of decoder layers has.
        quantized: whether bitsandbytes replaces it: its type must *be* nn.Linear or Conv1D (Falcon's is a subclass).
        within: which layers of a period have it.
        path: its module's name in the first of these, ``model.layers.0.self_attn.q_proj``.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool = False
    part: Literal["attention", "linear_attention", "mlp", "router", "expert", "shared_expert"] = "attention"
    count: int = 1
    quantized: bool = True
    within: tuple[int, ...] = (0,)
    path: str = ""

    @property
    def weight_numel(self) -> int:
        """Elements of one weight."""
        return self.in_features * self.out_features


class DeltaNet(NamedTuple):
    """Linear attention by the gated delta rule, in all layers of a period but the last (Qwen 3.5).

    Attributes:
        key_heads, value_heads, key_dim, value_dim: each key head serves value_heads / key_heads value heads.
        kernel: tokens that its causal convolution sees.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int

    @property
    def convolved(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


class Tower(NamedTuple):
    """What a model that sees has beside its language model. Trained on text, it is loaded, and does nothing.

    Attributes:
        model_type: transformers' type of the whole model; `ModelArchitecture.model_type` is its language model's.
        linears: its linear layers, `count` of them in all; bitsandbytes replaces these too.
        other_parameters: parameters that are in none of their weights (biases, norms, embeddings, the projector).
        buffer_bytes: tables beside its weights.
        config: the whole model's raw fields, for the trace.
    """

    model_type: str
    linears: tuple[Linear, ...]
    other_parameters: int
    buffer_bytes: int
    config: Mapping[str, object]

    @property
    def parameters(self) -> int:
        """All its parameters."""
        return sum(linear.weight_numel * linear.count for linear in self.linears) + self.other_parameters


@dataclass(frozen=True, slots=True)
class ModelArchitecture:
    """A decoder-only transformer as the memory model sees it. All its periods of decoder layers are alike.

    A period is one layer, but where layers of several kinds take turns.

    Attributes:
        name: the catalogue's name, the folder or the Hub id it was asked for by.
        source: where the config comes from (URL, folder), with its revision where known.
        model_type: transformers' model type.
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size: as transformers names
            them.
        max_position_embeddings: positions the model was trained for.
        tied_embeddings: the output head shares the embedding's weight.
        linears: the linear layers of ONE period, in the order of the forward pass; not the output head.
        layer_other_parameters: parameters of one period that are in no linear weight or linear bias (norms, routers,
            3-D experts, convolutions); they are never quantized.
        other_parameters: parameters outside the layers that are neither token embedding nor the output head's weight
            (final norm, learned positions, the output head's bias).
        gated_mlp: gate and up projections, their product goes down (SwiGLU, GeGLU).
        parallel_attention: attention and mlp read the same input (Falcon, GPT-NeoX, Phi-2).
        experts, experts_per_token: 0 and 0 without mixture of experts.
        sliding_window: attention window in tokens, or None.
        sliding_layers: how many layers have that window; the others see everything.
        expert_intermediate_size, shared_expert_intermediate_size: MLP widths of one routed and of the shared expert; 0
            without.
        expert_parameters: elements of one layer's 3-D expert parameters; a part of layer_other_parameters.
        activation: the MLP's activation, as transformers names it.
        norm: "rms" is written out in Python over a float32 copy (Llama's and its like), "layer" is one torch kernel.
        norms_per_layer: norms of one layer that are hidden_size wide.
        head_norms: queries and keys are normalised too.
        period: how many layers repeat; it divides num_layers.
        delta_net: what all layers of a period but the last have in place of attention.
        tower: what a model that sees has beside the decoder; None for the others.
        config: the raw fields.
    """

    name: str
    source: str
    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tied_embeddings: bool
    linears: tuple[Linear, ...]
    layer_other_parameters: int
    other_parameters: int
    gated_mlp: bool = True
    parallel_attention: bool = False
    experts: int = 0
    experts_per_token: int = 0
    sliding_window: int | None = None
    sliding_layers: int = 0
    expert_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    expert_parameters: int = 0
    activation: str = "silu"
    norm: Literal["rms", "layer"] = "rms"
    norms_per_layer: int = 2
    head_norms: bool = False
    period: int = 1
    delta_net: DeltaNet | None = None
    tower: Tower | None = None
    config: Mapping[str, object] = field(default_factory=dict, repr=False, compare=False)

    def __hash__(self) -> int:
        """Of what tells models apart: a search asks for it all the time."""
        return hash((self.name, self.hidden_size, self.num_layers, self.vocab_size))

    @property
    def periods(self) -> int:
        """How often a period is repeated: the number of layers, where all are alike."""
        return self.num_layers // self.period

    @property
    def attention_layers(self) -> int:
        """How many layers compare each token with all before it."""
        return self.num_layers if self.delta_net is None else self.periods

    @property
    def whole_type(self) -> str:
        """The model type of the checkpoint: where modules are depends on it."""
        return self.tower.model_type if self.tower else self.model_type

    @property
    def whole_config(self) -> Mapping[str, object]:
        """The checkpoint's config, from which transformers builds the model."""
        return self.tower.config if self.tower else self.config

    @property
    def auto_class(self) -> str:
        """The Auto class of transformers that loads the checkpoint."""
        return "AutoModelForImageTextToText" if self.whole_type in NO_TEXT_FORM else "AutoModelForCausalLM"

    @property
    def language_model(self) -> ModelArchitecture:
        """Without what does nothing on text."""
        return replace(self, tower=None) if self.tower else self

    @property
    def has_sdpa(self) -> bool:
        """Whether transformers computes its attention with torch's scaled_dot_product_attention."""
        return self.model_type not in EAGER_ONLY

    @property
    def is_always_masked(self) -> bool:
        """Whether sdpa is handed a mask also where it is just causal."""
        return self.model_type in ALWAYS_MASKED

    @property
    def shares_one_key_head(self) -> bool:
        """Whether its code hands torch's scaled_dot_product_attention one key head and does not say that it is shared.

        So does Falcon's with ``multi_query`` (transformers 5.23, models/falcon/modeling_falcon.py).
        """
        expands = self.config.get("new_decoder_architecture", False)
        return self.model_type == "falcon" and not expands and self.num_kv_heads == 1 < self.num_heads

    @property
    def drops_attention(self) -> bool:
        """Whether attention's weights are dropped out while the model is trained."""
        by_default = self.model_type in DROPS_ATTENTION
        return bool(self.config.get("attention_dropout", self.config.get("attn_pdrop", by_default)))

    @property
    def keeps_packed_apart(self) -> bool:
        """Whether packed examples are hidden from each other; tests/training/test_packing.py shows it."""
        return self.model_type not in MIXES_PACKED

    @property
    def plain_logits(self) -> bool:
        """Whether the output head's product is what the loss is taken of."""
        return all(self.config.get(name) in (None, 1, 1.0) for name in LOGIT_CHANGES)

    @property
    def embedding_parameters(self) -> int:
        """Elements of the token embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Elements of an output head of its own: 0 when tied."""
        return 0 if self.tied_embeddings else self.vocab_size * self.hidden_size

    def all_linears(self) -> Iterator[tuple[Linear, int]]:
        """Every linear layer, with how many of it the whole model has; the output head is none of them."""
        yield from ((linear, self.periods * linear.count) for linear in self.linears)
        if self.tower:
            yield from ((linear, linear.count) for linear in self.tower.linears)

    @property
    def linear_parameters(self) -> int:
        """Elements of all linear weights of all layers, without biases."""
        return self.periods * sum(linear.weight_numel * linear.count for linear in self.linears)

    @property
    def parameters(self) -> int:
        """All parameters, as ``model.num_parameters()`` counts them."""
        biases = sum(linear.out_features * linear.count for linear in self.linears if linear.bias)
        return (
            self.linear_parameters
            + self.periods * (self.layer_other_parameters + biases)
            + self.embedding_parameters
            + self.head_parameters
            + self.other_parameters
            + (self.tower.parameters if self.tower else 0)
        )
