"""The architectures that published rows name: the catalogue's, and shapes of models whose config was not seen quoted.

The latter are good enough to weigh a model and are kept out of the catalogue, which holds nothing unseen: each gives
the parameter count its row states to 0.2 %.
"""

from __future__ import annotations

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
    # Apertus has an MLP without a gate, as Arcee has; its activation xIELU and its head norms are left out
    "swiss-ai/Apertus-8B-Instruct-2509": {
        "model_type": "arcee",
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 21504,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "relu2",
        **_COMMON,
    },
}
"""Config fields by Hub id: from transformers' configuration classes where those state them (Seed-OSS, Olmo 3, Apertus)
and otherwise recalled, and accepted because the parameter count agrees."""


@cache
def architecture_named(model: str) -> ModelArchitecture | None:
    """The architecture of the model a row names; None where it names none that is known."""
    if model in UNSEEN:
        return architecture_from_config(UNSEEN[model], name=model, source="not seen quoted")
    try:
        return find_model(SAME_SHAPE.get(model, model))
    except RequestError:
        return None
