"""What each model type's decoder layer is made of: one row of `DECODERS` for those built like Llama.

Source of every row and default: the configuration and modelling classes of transformers 5.23.0
(``transformers/models/TYPE/configuration_TYPE.py``, ``modeling_TYPE.py``). What bitsandbytes quantizes there:
``integrations/bitsandbytes.py``: ``replace_with_bnb_linear`` takes Conv1D and modules whose type *is* nn.Linear.
Routers and experts are no such modules since transformers 5: they are bare (3-D) parameters, and stay 16-bit.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Flag(NamedTuple):
    """A truth value the config may set: its field and transformers' default."""

    field: str
    default: bool


Switch = bool | Flag


class Experts(NamedTuple):
    """How a family's mixture of experts is built.

    Attributes:
        size: the field with the width of one expert.
        width, number, per_token: that width, how many experts there are, and how many a token is sent to, where the
            config does not say.
        bias: experts and router have biases (gpt-oss).
        shared: the width of a dense expert that works beside the routed ones, with a gate (Qwen2-MoE), where the config
            does not say; 0: there is none.
    """

    width: int
    number: int
    per_token: int
    size: str = "intermediate_size"
    bias: bool = False
    shared: int = 0


class Window(NamedTuple):
    """Which layers attend to a sliding window.

    Attributes:
        layers: all of them; those that ``layer_types`` lists, else all; those from `max_window_layers` on; every one
            but each `period`-th; the even ones below `max_window_layers`; those without rotary positions.
        default: transformers' window where the config has no ``sliding_window``.
        period: transformers' period where the config has no ``sliding_window_pattern``.
        switched: only with ``use_sliding_window``.
    """

    layers: Literal["all", "listed", "late", "but_each_nth", "even", "no_rope"]
    default: int | None = None
    period: int = 2
    switched: bool = False


class Decoder(NamedTuple):
    """A decoder built like Llama's: attention with q, k, v and o, an MLP, norms around them.

    Attributes:
        kv_heads: where the config has no ``num_key_value_heads``; None: as many as attention heads.
        head_dim: where the config has no ``head_dim``; None: hidden_size / heads.
        reads_head_dim: False where the model ignores the config's ``head_dim``.
        whole_heads: all heads together have to be hidden_size wide: the model's code fits no other ``head_dim``.
        intermediate: the MLP's width, where the config does not say.
        tied: tied embeddings, where the config does not say.
        positions: ``max_position_embeddings``, where the config does not say.
        qkv_bias, o_bias, mlp_bias, head_bias: biases of the projections and of the output head.
        gated_attention: the projection of queries makes a gate, too, for what is attended to.
        o_name, mlp_names: module names; two MLP names without a gate, three with one.
        fused_qkv, fused_gate_up: one module for several projections (Phi-3).
        norms: norms of a layer that are hidden_size wide.
        norm: "rms" is written in Python in float32, one weight a feature; "layer" is torch's LayerNorm with weight and
            bias; "bare" is without parameters (OLMo).
        parallel: attention and MLP read the same input.
        one_norm_if_parallel: the second norm falls away then (StableLM).
        qk_norm: norms of queries and keys: one weight for each feature of a head, or of all heads together.
        qk_norm_if: the flag that switches them on; None: always.
        qk_norm_bias: they have a bias too.
        sinks: one attention sink for each head (gpt-oss).
        window: sliding windows.
        experts: mixture of experts instead of the MLP.
        activation: the MLP's, where the config does not say.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    reads_head_dim: bool = True
    whole_heads: bool = False
    intermediate: int = 11008
    tied: bool = False
    positions: int = 2048
    qkv_bias: Switch = False
    o_bias: Switch = False
    mlp_bias: Switch = False
    head_bias: Switch = False
    gated_attention: bool = False
    o_name: str = "o_proj"
    mlp_names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    fused_qkv: bool = False
    fused_gate_up: bool = False
    norms: int = 2
    norm: Literal["rms", "layer", "bare"] = "rms"
    parallel: Switch = False
    one_norm_if_parallel: bool = False
    qk_norm: Literal["", "head", "all"] = ""
    qk_norm_if: Flag | None = None
    qk_norm_bias: bool = False
    sinks: bool = False
    window: Window | None = None
    experts: Experts | None = None
    activation: str = "silu"


_ATTENTION_BIAS = Flag("attention_bias", False)
_MLP_BIAS = Flag("mlp_bias", False)
_USE_BIAS = Flag("use_bias", True)
_QWEN_WINDOW = Window("late", default=4096, switched=True)
_UNGATED = ("up_proj", "down_proj")
_LLAMA = Decoder(qkv_bias=_ATTENTION_BIAS, o_bias=_ATTENTION_BIAS, mlp_bias=_MLP_BIAS)

DECODERS: dict[str, Decoder] = {
    "llama": _LLAMA,
    # transformers loads these two as Llama
    "internlm3": _LLAMA._replace(intermediate=10240, kv_heads=2, head_dim=128, positions=32768),
    "iquestcoder": _LLAMA._replace(intermediate=27648, kv_heads=8, head_dim=128, positions=131072),
    "mistral": Decoder(intermediate=14336, kv_heads=8, positions=131072, window=Window("all", default=4096)),
    "ministral": Decoder(intermediate=14336, kv_heads=8, positions=131072, window=Window("listed", default=4096)),
    "ministral3": Decoder(intermediate=14336, kv_heads=8, head_dim=128, positions=262144, window=Window("all")),
    "mixtral": Decoder(
        kv_heads=8, positions=131072, window=Window("all"), experts=Experts(width=14336, number=8, per_token=2)
    ),
    "qwen2": Decoder(intermediate=22016, kv_heads=32, positions=32768, qkv_bias=True, window=_QWEN_WINDOW),
    "qwen2_moe": Decoder(
        kv_heads=16,
        positions=32768,
        qkv_bias=Flag("qkv_bias", True),
        window=Window("even", default=4096, switched=True),
        experts=Experts(size="moe_intermediate_size", width=1408, number=60, per_token=4, shared=5632),
    ),
    "qwen3": Decoder(
        intermediate=22016,
        kv_heads=32,
        head_dim=128,
        positions=32768,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        qk_norm="head",
        window=_QWEN_WINDOW,
    ),
    "qwen3_moe": Decoder(
        kv_heads=4,
        positions=32768,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        qk_norm="head",
        window=Window("all", default=4096, switched=True),
        experts=Experts(size="moe_intermediate_size", width=768, number=128, per_token=8),
    ),
    "gemma": Decoder(
        intermediate=24576,
        kv_heads=16,
        head_dim=256,
        tied=True,
        positions=8192,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        activation="gelu_pytorch_tanh",
    ),
    "gemma2": Decoder(
        intermediate=9216,
        kv_heads=4,
        head_dim=256,
        tied=True,
        positions=8192,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        norms=4,
        window=Window("but_each_nth", default=4096, period=2),
        activation="gelu_pytorch_tanh",
    ),
    "gemma3_text": Decoder(
        intermediate=9216,
        kv_heads=4,
        head_dim=256,
        tied=True,
        positions=131072,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        norms=4,
        qk_norm="head",
        window=Window("but_each_nth", default=4096, period=6),
        activation="gelu_pytorch_tanh",
    ),
    "phi": Decoder(
        intermediate=8192,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        head_bias=True,
        o_name="dense",
        mlp_names=("fc1", "fc2"),
        norms=1,
        norm="layer",
        parallel=True,
        qk_norm="head",
        qk_norm_if=Flag("qk_layernorm", False),
        qk_norm_bias=True,
        activation="gelu_new",
    ),
    "phi3": Decoder(intermediate=8192, positions=4096, fused_qkv=True, fused_gate_up=True, window=Window("all")),
    "stablelm": Decoder(
        intermediate=6912,
        kv_heads=32,
        reads_head_dim=False,
        positions=4096,
        qkv_bias=Flag("use_qkv_bias", False),
        norm="layer",
        parallel=Flag("use_parallel_residual", False),
        one_norm_if_parallel=True,
        qk_norm="all",
        qk_norm_if=Flag("qk_layernorm", False),
    ),
    "olmo": Decoder(qkv_bias=_ATTENTION_BIAS, o_bias=_ATTENTION_BIAS, norm="bare"),
    "olmo2": Decoder(qkv_bias=_ATTENTION_BIAS, o_bias=_ATTENTION_BIAS, qk_norm="all"),
    "olmo3": Decoder(
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        qk_norm="all",
        window=Window("but_each_nth", default=4096, period=4),
    ),
    "olmoe": Decoder(
        whole_heads=True,
        positions=4096,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        qk_norm="all",
        experts=Experts(width=2048, number=64, per_token=8),
    ),
    "smollm3": Decoder(
        kv_heads=4,
        tied=True,
        positions=32768,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        mlp_bias=_MLP_BIAS,
        window=Window("no_rope", switched=True),
    ),
    "granite": _LLAMA,
    "granitemoe": Decoder(
        qkv_bias=_ATTENTION_BIAS, o_bias=_ATTENTION_BIAS, experts=Experts(width=11008, number=8, per_token=2)
    ),
    "cohere": Decoder(
        intermediate=22528,
        tied=True,
        positions=8192,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        norms=1,
        parallel=True,
        qk_norm="all",
        qk_norm_if=Flag("use_qk_norm", False),
    ),
    "cohere2": Decoder(
        intermediate=22528,
        tied=True,
        positions=8192,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        norms=1,
        parallel=True,
        window=Window("but_each_nth", default=4096, period=4),
    ),
    "starcoder2": Decoder(
        intermediate=12288,
        kv_heads=2,
        tied=True,
        positions=4096,
        qkv_bias=_USE_BIAS,
        o_bias=_USE_BIAS,
        mlp_bias=_USE_BIAS,
        mlp_names=("c_fc", "c_proj"),
        norm="layer",
        window=Window("all"),
        activation="gelu_pytorch_tanh",
    ),
    "gpt_oss": Decoder(
        kv_heads=8,
        head_dim=64,
        positions=131072,
        qkv_bias=Flag("attention_bias", True),
        o_bias=Flag("attention_bias", True),
        sinks=True,
        window=Window("but_each_nth", default=128, period=2),
        experts=Experts(width=2880, number=128, per_token=4, bias=True),
    ),
    "glm": Decoder(
        intermediate=13696,
        kv_heads=2,
        head_dim=128,
        positions=131072,
        qkv_bias=Flag("attention_bias", True),
        fused_gate_up=True,
    ),
    "glm4": Decoder(
        intermediate=13696,
        kv_heads=2,
        head_dim=128,
        positions=131072,
        qkv_bias=Flag("attention_bias", True),
        fused_gate_up=True,
        norms=4,
    ),
    "seed_oss": Decoder(
        intermediate=27648,
        kv_heads=8,
        head_dim=128,
        positions=524288,
        qkv_bias=Flag("attention_bias", True),
        o_bias=Flag("attention_out_bias", False),
        mlp_bias=_MLP_BIAS,
    ),
    "arcee": Decoder(
        intermediate=18432,
        positions=4096,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        mlp_bias=_MLP_BIAS,
        mlp_names=_UNGATED,
        activation="relu2",
    ),
    "ernie4_5": Decoder(
        intermediate=3072,
        kv_heads=2,
        head_dim=128,
        tied=True,
        positions=131072,
        qkv_bias=Flag("use_bias", False),
        o_bias=Flag("use_bias", False),
        mlp_bias=Flag("use_bias", False),
    ),
    "exaone4": Decoder(
        intermediate=16384, kv_heads=32, qk_norm="head", window=Window("but_each_nth", default=4096, period=4)
    ),
    "hunyuan_v1_dense": Decoder(qkv_bias=_ATTENTION_BIAS, o_bias=_ATTENTION_BIAS, qk_norm="head"),
    "helium": Decoder(
        intermediate=7040,
        kv_heads=20,
        head_dim=128,
        whole_heads=True,
        positions=4096,
        qkv_bias=_ATTENTION_BIAS,
        mlp_bias=_MLP_BIAS,
    ),
    "jais2": Decoder(
        intermediate=26624,
        positions=8192,
        qkv_bias=Flag("attention_bias", True),
        o_bias=Flag("attention_bias", True),
        mlp_bias=Flag("mlp_bias", True),
        mlp_names=_UNGATED,
        norm="layer",
        activation="relu2",
    ),
    "nemotron": Decoder(
        intermediate=24576,
        positions=4096,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        mlp_bias=_MLP_BIAS,
        mlp_names=_UNGATED,
        norm="layer",
        activation="relu2",
    ),
}
