"""How each model type's code goes about it where that decides memory, beside its shapes: one row of `FAMILIES`.

Source: the configuration and modelling classes of transformers 5.23.0 (``transformers/models/TYPE/modeling_TYPE.py``,
``configuration_TYPE.py``). What is in no row is as in Llama's.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from qlora_core.architecture import Activation

Norm = Literal["rms", "rms_wide", "centred", "layer", "layer_wide", "layer_narrow"]
"""How a norm is computed: RMSNorm written out in float32, which narrows before it multiplies by its weight (Llama) or
after (Gemma), or subtracts the mean, too (Cohere); or torch's LayerNorm, which autocast makes float32, of a float32
copy (OLMo), or as autocast does not see it (Nemotron)."""
WRITTEN_OUT: tuple[Norm, ...] = ("rms", "rms_wide", "centred")
HeadNorms = Literal["projected", "together", "rotated"]
"""Where queries and keys are normalised: each as it is projected (Qwen 3), once all are (Gemma 3), or after they were
rotated (Hunyuan)."""
Scores = Literal["plain", "shared", "biased", "summed", "wide"]
"""Eager scores q k / sqrt(D) + mask; where ALiBi makes a mask for each head that all layers share (Falcon); with ALiBi
added in float32, and then filled by a mask (MPT); with ALiBi added by the product itself (BLOOM); or of float32 queries
and keys (GPT-J, CodeGen)."""
RouterScores = Literal["softmax_wide", "softmax", "top_k_wide", "top_k"]
"""How a router weighs experts: by a softmax over all whose result stays float32 (Mixtral) or is narrowed (Qwen, OLMoE);
or over the chosen ones, of float32 logits (Granite) or not (gpt-oss)."""


class Family(NamedTuple):
    """What of a model type's code decides memory.

    Attributes:
        norm: how norms are computed; None: as the architecture says.
        activation: how it is computed; None: as its name says.
        norms_after: only the outputs of attention and feed-forward are normalised.
        head_norms: where queries and keys are.
        rotary: queries and keys are rotated by their positions; Falcon's are not where it has ALiBi.
        rotated_part: the config's field of the part of a head that is rotated, and its default.
        written_for_a_part: it is written as if only a part were rotated.
        learned_positions: an embedding of positions is added to that of tokens.
        scores, router_scores: how they are made.
        router_normalises: a token's weights are divided by their sum, whatever the config says.
        gated_attention: queries come with a gate for what is attended to, which is as wide.
        clips: the object of the config that may have ``clip_qkv``, which queries, keys and values are clamped to: ""
            is the config itself; None: the code knows none.
        splits: a fused projection's product is split or chunked; else queries, keys and values are slices of it.
        scaled: what is added to the residual stream, and the embedding, are multiplied by a number of the config.
        normed_embedding: what the layers begin with is normalised.
        embedding_dropout, residual_dropout: the config's field of the base model's own dropout of what the layers begin
            with and of what they add, and its default.
        holds_attended, holds_normed: attention's output, and what it was computed of, have names of their own, and live
            as long as the layer runs.
        returns_weights: layers return attention's weights, which live on until the next layer has returned.
    """

    norm: Norm | None = None
    activation: Activation | None = None
    norms_after: bool = False
    head_norms: HeadNorms = "projected"
    rotary: bool = True
    rotated_part: tuple[str, float] = ("partial_rotary_factor", 1.0)
    written_for_a_part: bool = False
    learned_positions: bool = False
    scores: Scores = "plain"
    router_scores: RouterScores = "softmax"
    router_normalises: bool = False
    gated_attention: bool = False
    clips: str | None = None
    splits: bool = False
    scaled: bool = False
    normed_embedding: bool = False
    embedding_dropout: tuple[str, float] = ("", 0.0)
    residual_dropout: tuple[str, float] = ("", 0.0)
    holds_attended: bool = False
    holds_normed: bool = False
    returns_weights: bool = False


LLAMA = Family()
_COHERE = Family(norm="centred", head_norms="together")
_GLM = Family(rotated_part=("partial_rotary_factor", 0.5))
_OLMO2 = Family(norm="rms_wide", norms_after=True)
_QWEN3_5 = Family(norm="rms_wide", rotated_part=("partial_rotary_factor", 0.25), gated_attention=True)
_GPT2 = Family(
    rotary=False,
    learned_positions=True,
    splits=True,
    embedding_dropout=("embd_pdrop", 0.1),
    residual_dropout=("resid_pdrop", 0.1),
    holds_attended=True,
)
_GPTJ = Family(
    scores="wide",
    embedding_dropout=("embd_pdrop", 0.0),
    residual_dropout=("resid_pdrop", 0.0),
    returns_weights=True,
)

FAMILIES: dict[str, Family] = {
    "bloom": Family(
        activation="bloom",
        rotary=False,
        scores="summed",
        normed_embedding=True,
        holds_attended=True,
        returns_weights=True,
    ),
    "codegen": _GPTJ,
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "exaone4": Family(norms_after=True, head_norms="together"),
    "falcon": Family(
        residual_dropout=("hidden_dropout", 0.0), holds_attended=True, holds_normed=True, returns_weights=True
    ),
    "gemma": Family(norm="rms_wide"),
    "gemma2": Family(norm="rms_wide"),
    "gemma3_text": Family(norm="rms_wide", head_norms="together"),
    "glm": _GLM,
    "glm4": _GLM,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": Family(
        rotated_part=("rotary_pct", 0.25),
        splits=True,
        embedding_dropout=("hidden_dropout", 0.0),
        residual_dropout=("hidden_dropout", 0.0),
    ),
    "gpt_oss": Family(router_scores="top_k"),
    "gptj": _GPTJ,
    "granite": Family(scaled=True),
    "granitemoe": Family(scaled=True, router_scores="top_k_wide"),
    "hunyuan_v1_dense": Family(head_norms="rotated"),
    "mixtral": Family(router_scores="softmax_wide", router_normalises=True),
    "mpt": Family(
        rotary=False, scores="biased", clips="attn_config", splits=True, holds_attended=True, returns_weights=True
    ),
    "nemotron": Family(norm="layer_narrow", rotated_part=("partial_rotary_factor", 0.5)),
    "olmo": Family(norm="layer_wide", clips=""),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "olmoe": Family(clips=""),
    "opt": Family(rotary=False, learned_positions=True, residual_dropout=("dropout", 0.1)),
    "phi": Family(
        head_norms="together",
        rotated_part=("partial_rotary_factor", 0.5),
        embedding_dropout=("embd_pdrop", 0.0),
        residual_dropout=("resid_pdrop", 0.0),
    ),
    "phi3": Family(written_for_a_part=True, residual_dropout=("resid_pdrop", 0.0)),
    "qwen3_5_moe_text": _QWEN3_5._replace(router_normalises=True),
    "qwen3_5_text": _QWEN3_5,
    "seed_oss": Family(residual_dropout=("residual_dropout", 0.1)),
    "stablelm": Family(
        head_norms="together",
        rotated_part=("partial_rotary_factor", 0.25),
        residual_dropout=("hidden_dropout", 0.0),
        holds_attended=True,
        holds_normed=True,
    ),
    "starcoder2": Family(embedding_dropout=("embedding_dropout", 0.0), residual_dropout=("residual_dropout", 0.0)),
}


def family_of(model_type: str) -> Family:
    """That of a model type."""
    return FAMILIES.get(model_type, LLAMA)
