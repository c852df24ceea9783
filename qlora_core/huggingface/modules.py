"""Where each model type's modules are: the names by which peft finds a layer's linears, and what is beside them.

Source: the modelling classes of transformers 5.23.0 (``transformers/models/TYPE/modeling_TYPE.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from qlora_core.architecture import Linear, ModelArchitecture

HEAD = "lm_head"
"""The output head, in every model type."""


class Modules(NamedTuple):
    """The names of a model's modules.

    Attributes:
        layers: the list of the decoder layers.
        attention, mlp: what holds their linears in a layer; nothing where the layer itself does.
        beside: the other modules of a layer, of every variant that a config can ask for.
        outside: the other modules outside the layers; the token embedding first.
        tower: what belongs to no language model, where the model sees.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    mlp: str = "mlp"
    beside: tuple[str, ...] = ("mlp.act_fn", "input_layernorm", "post_attention_layernorm")
    outside: tuple[str, ...] = ("model.embed_tokens", "model.norm", "model.rotary_emb")
    tower: tuple[str, ...] = ()


_LLAMA = Modules()
_QUERY_AND_KEY = ("self_attn.q_norm", "self_attn.k_norm")
_LINEAR_ATTENTION = ("linear_attn.conv1d", "linear_attn.norm")
_AROUND = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
_NORMED_AFTER = _LLAMA._replace(
    beside=("mlp.act_fn", "post_attention_layernorm", "post_feedforward_layernorm", *_QUERY_AND_KEY)
)
_EXPERTS = ("mlp.gate", "mlp.experts", "mlp.experts.act_fn", "input_layernorm", "post_attention_layernorm")
_GEMMA3 = _LLAMA._replace(beside=(*_LLAMA.beside, *_AROUND, *_QUERY_AND_KEY))
_BESIDE_A_TOWER: dict[str, Any] = {
    "layers": "model.language_model.layers",
    "outside": tuple(name.replace("model.", "model.language_model.") for name in _LLAMA.outside),
    "tower": ("model.vision_tower", "model.multi_modal_projector"),
}
_GPT2 = Modules(
    "transformer.h",
    "attn",
    beside=("ln_1", "ln_2", "attn.attn_dropout", "attn.resid_dropout", "mlp.act", "mlp.dropout"),
    outside=("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f"),
)
_FALCON = Modules(
    "transformer.h",
    "self_attention",
    beside=("self_attention.attention_dropout", "mlp.act", "input_layernorm", "post_attention_layernorm"),
    outside=("transformer.word_embeddings", "transformer.ln_f", "transformer.rotary_emb"),
)

MODULES: dict[str, Modules] = {
    "mixtral": _LLAMA._replace(beside=_EXPERTS),
    "qwen2_moe": _LLAMA._replace(beside=(*_EXPERTS, "mlp.shared_expert.act_fn")),
    "exaone4": _NORMED_AFTER,
    "hunyuan_v1_dense": _LLAMA._replace(
        beside=(*_LLAMA.beside, "self_attn.query_layernorm", "self_attn.key_layernorm")
    ),
    "qwen3": _LLAMA._replace(beside=(*_LLAMA.beside, *_QUERY_AND_KEY)),
    "qwen3_moe": _LLAMA._replace(beside=(*_EXPERTS, *_QUERY_AND_KEY)),
    "qwen3_5_moe_text": _LLAMA._replace(
        beside=(*_EXPERTS, "mlp.shared_expert.act_fn", *_QUERY_AND_KEY, *_LINEAR_ATTENTION)
    ),
    "qwen3_5_text": _LLAMA._replace(beside=(*_LLAMA.beside, *_QUERY_AND_KEY, *_LINEAR_ATTENTION)),
    "gemma2": _LLAMA._replace(beside=(*_LLAMA.beside, *_AROUND)),
    "gemma3": _GEMMA3._replace(**_BESIDE_A_TOWER),
    "gemma3_text": _GEMMA3,
    "mistral3": _LLAMA._replace(**_BESIDE_A_TOWER),
    "phi": _LLAMA._replace(
        beside=(
            "mlp.activation_fn",
            "input_layernorm",
            "resid_dropout",
            "self_attn.q_layernorm",
            "self_attn.k_layernorm",
        ),
        outside=("model.embed_tokens", "model.rotary_emb", "model.embed_dropout", "model.final_layernorm"),
    ),
    "phi3": _LLAMA._replace(
        beside=(
            "mlp.activation_fn",
            "input_layernorm",
            "post_attention_layernorm",
            "resid_attn_dropout",
            "resid_mlp_dropout",
        ),
    ),
    "stablelm": _LLAMA._replace(
        beside=(
            *_LLAMA.beside,
            "dropout",
            *(f"self_attn.{one}_layernorm{inner}" for one in "qk" for inner in ("", ".norms", ".norms.0")),
        ),
    ),
    "olmo2": _NORMED_AFTER,
    "olmo3": _NORMED_AFTER,
    "olmoe": _LLAMA._replace(beside=(*_EXPERTS, *_QUERY_AND_KEY)),
    "granitemoe": _LLAMA._replace(
        beside=(
            "input_layernorm",
            "post_attention_layernorm",
            *(f"block_sparse_moe{inner}" for inner in ("", ".router", ".experts", ".experts.act_fn")),
        ),
    ),
    "cohere": _LLAMA._replace(beside=("mlp.act_fn", "input_layernorm", *_QUERY_AND_KEY)),
    "cohere2": _LLAMA._replace(beside=("mlp.act_fn", "input_layernorm")),
    "starcoder2": _LLAMA._replace(beside=("mlp.act", "input_layernorm", "post_attention_layernorm")),
    "gpt_oss": _LLAMA._replace(beside=("mlp.router", "mlp.experts", "input_layernorm", "post_attention_layernorm")),
    "glm": _LLAMA._replace(beside=("mlp.activation_fn", "input_layernorm", "post_attention_layernorm")),
    "glm4": _LLAMA._replace(
        beside=(
            "mlp.activation_fn",
            "input_layernorm",
            "post_attention_layernorm",
            "post_self_attn_layernorm",
            "post_mlp_layernorm",
        ),
    ),
    "bloom": Modules(
        "transformer.h",
        "self_attention",
        beside=(
            "self_attention.attention_dropout",
            "mlp.gelu_impl",
            "input_layernorm",
            "post_attention_layernorm",
        ),
        outside=("transformer.word_embeddings", "transformer.word_embeddings_layernorm", "transformer.ln_f"),
    ),
    "codegen": _GPT2,
    "falcon": _FALCON._replace(beside=(*_FALCON.beside, "ln_attn", "ln_mlp")),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": Modules(
        "gpt_neox.layers",
        "attention",
        beside=(
            "mlp.act",
            "input_layernorm",
            "post_attention_layernorm",
            "post_attention_dropout",
            "post_mlp_dropout",
        ),
        outside=(
            "gpt_neox.embed_in",
            "gpt_neox.emb_dropout",
            "gpt_neox.final_layer_norm",
            "gpt_neox.rotary_emb",
        ),
    ),
    "gptj": _GPT2,
    "mpt": Modules(
        "transformer.blocks",
        "attn",
        "ffn",
        beside=("norm_1", "norm_2", "ffn.act", "resid_attn_dropout"),
        outside=("transformer.wte", "transformer.norm_f"),
    ),
    "opt": Modules(
        "model.decoder.layers",
        "self_attn",
        "",
        beside=("activation_fn", "self_attn_layer_norm", "final_layer_norm"),
        outside=("model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.final_layer_norm"),
    ),
}
"""By model type; those that are not here have Llama's."""


def modules_of(model_type: str) -> Modules:
    """Where the modules of that type are."""
    return MODULES.get(model_type, _LLAMA)


def placed(model_type: str, linears: Iterable[Linear]) -> tuple[Linear, ...]:
    """`linears` with their modules' names in the first decoder layer that has them."""
    modules = modules_of(model_type)
    holders = {
        "attention": modules.attention,
        "linear_attention": "linear_attn",
        "mlp": modules.mlp,
        "shared_expert": f"{modules.mlp}.shared_expert",
    }

    def path(linear: Linear) -> str:
        holder = modules.mlp if linear.name == "shared_expert_gate" else holders[linear.part]
        return ".".join(part for part in (modules.layers, str(linear.within[0]), holder, linear.name) if part)

    return tuple(replace(linear, path=path(linear)) for linear in linears)


def in_layer(path: str, number: int) -> str:
    """The name that a module of one decoder layer has in another."""
    return re.sub(r"\.\d+\.", f".{number}.", path, count=1)


def layers_of(architecture: ModelArchitecture, linear: Linear) -> list[int]:
    """The numbers of the decoder layers that have it."""
    return [number for number in range(architecture.num_layers) if number % architecture.period in linear.within]


def not_linear(architecture: ModelArchitecture) -> Iterator[str]:
    """The names of all modules but the layers' linears: containers, norms, activations, embeddings, output head."""
    modules = modules_of(architecture.whole_type)
    first = f"{modules.layers}.0"
    beside = [f"{first}.{name}" for name in modules.beside]
    linears = (in_layer(linear.path, 0) for linear in architecture.linears)
    inside = {parent for path in (*beside, *linears) for parent in _above(path)}
    yield from modules.outside
    yield HEAD
    yield from _above(first)
    of_layer = [first, *beside, *sorted(parent for parent in inside if parent.startswith(f"{first}."))]
    for number in range(architecture.num_layers):
        yield from (in_layer(f"{name}.", number)[:-1] for name in of_layer)


def tower_expression(model_type: str) -> str | None:
    """What matches the names of all modules that belong to no language model; None where there are none."""
    tower = modules_of(model_type).tower
    return "|".join(rf"{re.escape(name)}\..*" for name in tower) or None


def _above(path: str) -> Iterator[str]:
    """The modules that hold it."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
