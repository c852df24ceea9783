"""The architectures that published rows name: the catalogue's, and shapes of models whose config was not seen quoted.

The latter are good enough to weigh a model and are kept out of the catalogue, which holds nothing unseen: each gives
the parameter count its row states to 0.2 %.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from clusters.errors import RequestError
from qlora_core.architecture import ModelArchitecture
from qlora_core.catalogue import find_model
from qlora_core.huggingface.config import architecture_from_config

SAME_SHAPE = {
    "decapoda-research/llama-7b-hf": "llama-7b",
    "decapoda-research/llama-13b-hf": "llama-13b",
    # Mistral's 24B models of 2025 differ in their vision part and their data, not in their decoder
    "mistralai/Devstral-Small-2507": "mistral-small-24b",
    "mistralai/Magistral-Small-2506": "mistral-small-24b",
}
"""Models that have the shapes of one in the catalogue."""

_COMMON: dict[str, Any] = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
UNSEEN: dict[str, dict[str, Any]] = {
    "mistralai/Ministral-8B-Instruct-2410": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "sliding_window": None,
        **_COMMON,
    },
    "allenai/Olmo-3-7B-Instruct-SFT": {
        "model_type": "olmo3",
        "vocab_size": 100278,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "sliding_window": 4096,
        **_COMMON,
    },
    "ByteDance-Seed/Seed-OSS-36B-Instruct": {
        "model_type": "seed_oss",
        "vocab_size": 155136,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 80,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        **_COMMON,
    },
    # Apertus has an MLP without a gate, as Arcee has; its head norms are left out. Its activation xIELU is one kernel
    # where the package is installed that axolotl's document recommends for less memory, and keeps what gelu's keeps
    "swiss-ai/Apertus-8B-Instruct-2509": {
        "model_type": "arcee",
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "gelu",
        **_COMMON,
    },
    # the first Qwen's decoder is Qwen2's, but for one layer that makes query, key and value
    **{
        f"qwen-{size}": {
            "model_type": "qwen2",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "intermediate_size": feed_forward,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "hidden_act": "silu",
            **_COMMON,
        }
        for size, vocab, hidden, feed_forward, layers, heads in (
            ("1.8b", 151936, 2048, 5504, 24, 16),
            ("7b", 151936, 4096, 11008, 32, 32),
            ("14b", 152064, 5120, 13696, 40, 40),
            ("72b", 152064, 8192, 24576, 80, 64),
        )
    },
}
"""Config fields by Hub id: from transformers' configuration classes where those state them (Seed-OSS, Olmo 3, Apertus)
and otherwise recalled, and accepted because the parameter count agrees."""


@cache
def architecture_named(model: str) -> ModelArchitecture | None:
    """The architecture of the model a row names; None where it names none that is known."""
    if model in UNSEEN:
        unseen = architecture_from_config(UNSEEN[model], name=model, source="not seen quoted")
        return _with_fused_attention(unseen) if model.startswith("qwen-") else unseen
    try:
        return find_model(SAME_SHAPE.get(model, model))
    except RequestError:
        return None


def _with_fused_attention(architecture: ModelArchitecture) -> ModelArchitecture:
    """`architecture` with one linear layer for query, key and value."""
    query, key, value, *others = architecture.linears
    out = query.out_features + key.out_features + value.out_features
    path = query.path.replace(query.name, "c_attn")
    return replace(architecture, linears=(replace(query, name="c_attn", out_features=out, path=path), *others))
