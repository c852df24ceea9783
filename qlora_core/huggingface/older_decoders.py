"""From a config's fields to shapes, for the model types not built like Llama: GPT-2 and its descendants, OPT, Falcon.

Source: the configuration and modelling classes of transformers 5.23.0 (``transformers/models/TYPE``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qlora_core.architecture import Linear, ModelArchitecture
from qlora_core.huggingface.decoder import head_dimension
from qlora_core.huggingface.fields import ConfigFields
from qlora_core.huggingface.modules import placed


def _gpt2(fields: ConfigFields) -> ModelArchitecture:
    """GPT-2: transformers' Conv1D modules, which bitsandbytes replaces as it does nn.Linear."""
    return _gpt2_like(fields, "gpt2", kv_heads=None)


def _gpt_bigcode(fields: ConfigFields) -> ModelArchitecture:
    """StarCoder: GPT-2 with one key and value head."""
    return _gpt2_like(fields, "gpt_bigcode", kv_heads=1 if fields.flag("multi_query", True) else None)


def _gpt2_like(fields: ConfigFields, model_type: str, kv_heads: int | None) -> ModelArchitecture:
    hidden, inner = _hidden_and_inner(fields)
    heads = fields.size("num_attention_heads")
    head_dim = head_dimension(fields, hidden, heads, None, read=False)
    kv_heads = kv_heads or heads
    positions = fields.count("max_position_embeddings", 1024)
    if fields.flag("add_cross_attention", False):
        fields.problem(
            "add_cross_attention", "true", "cross-attention reads an encoder, which is not modelled", "Set it to false"
        )
    return _architecture(
        fields,
        model_type,
        linears=(
            Linear("c_attn", hidden, hidden + 2 * kv_heads * head_dim, True),
            Linear("c_proj", hidden, hidden, True),
            Linear("c_fc", hidden, inner, True, "mlp"),
            Linear("c_proj", inner, hidden, True, "mlp"),
        ),
        kv_heads=kv_heads,
        norms=2,
        other_parameters=positions * hidden + 2 * hidden,
        tied=True,
        positions=positions,
        activation="gelu_new" if model_type == "gpt2" else "gelu_pytorch_tanh",
    )


def _opt(fields: ConfigFields) -> ModelArchitecture:
    """OPT: learned positions with an offset of 2; biases and norms' weights can be switched off."""
    hidden, inner = fields.size("hidden_size"), fields.count("ffn_dim", 3072)
    bias = fields.flag("enable_bias", True)
    norm_width = 2 * hidden if fields.flag("layer_norm_elementwise_affine", True) else 0
    positions = fields.count("max_position_embeddings", 2048)
    embedding_width = fields.count("word_embed_proj_dim", hidden)
    if embedding_width != hidden:
        fields.problem(
            "word_embed_proj_dim",
            str(embedding_width),
            f"embeddings of another width than hidden_size {hidden} (only OPT-350M has them) are not modelled",
            "Choose another OPT",
        )
    final_norm = fields.flag("do_layer_norm_before", True) and not fields.flag("_remove_final_layer_norm", False)
    return _architecture(
        fields,
        "opt",
        linears=(
            *(Linear(name, hidden, hidden, bias) for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
            Linear("fc1", hidden, inner, bias, "mlp"),
            Linear("fc2", inner, hidden, bias, "mlp"),
        ),
        norms=2,
        norm_width=norm_width,
        other_parameters=(positions + 2) * hidden + (norm_width if final_norm else 0),
        tied=True,
        positions=positions,
        activation="relu",
    )


def _falcon(fields: ConfigFields) -> ModelArchitecture:
    """Falcon.

    Its linear layers are of a subclass of nn.Linear. bitsandbytes wants the type itself, and leaves them in 16 bits.
    """
    hidden, inner = _hidden_and_inner(fields, "ffn_hidden_size")
    heads = fields.size("num_attention_heads")
    head_dim = head_dimension(fields, hidden, heads, None, read=False)
    new = fields.flag("new_decoder_architecture", False)
    kv_heads = 1 if fields.flag("multi_query", True) and not new else fields.count("num_kv_heads", heads)
    fields.must_divide("num_kv_heads", kv_heads, "num_attention_heads", heads)
    parallel = fields.flag("parallel_attn", True)
    norms = 1 if parallel and fields.count("num_ln_in_parallel_attn", 2 if new else 1) != 2 else 2
    bias = fields.flag("bias", False)
    return _architecture(
        fields,
        "falcon",
        linears=(
            Linear("query_key_value", hidden, (heads + 2 * kv_heads) * head_dim, bias, quantized=False),
            Linear("dense", hidden, hidden, bias, quantized=False),
            Linear("dense_h_to_4h", hidden, inner, bias, "mlp", quantized=False),
            Linear("dense_4h_to_h", inner, hidden, bias, "mlp", quantized=False),
        ),
        kv_heads=kv_heads,
        norms=norms,
        other_parameters=2 * hidden,
        tied=True,
        parallel=parallel or new,
        activation="gelu",
    )


def _gpt_neox(fields: ConfigFields) -> ModelArchitecture:
    """GPT-NeoX and Pythia."""
    hidden, inner = fields.size("hidden_size"), fields.count("intermediate_size", 24_576)
    return _architecture(
        fields,
        "gpt_neox",
        linears=_megatron_linears(hidden, inner, fields.flag("attention_bias", True)),
        norms=2,
        other_parameters=2 * hidden,
        parallel=fields.flag("use_parallel_residual", True),
        activation="gelu",
    )


def _bloom(fields: ConfigFields) -> ModelArchitecture:
    """BLOOM: ALiBi, a norm after the embedding; its MLP is always four times as wide."""
    hidden = fields.size("hidden_size")
    return _architecture(
        fields,
        "bloom",
        linears=_megatron_linears(hidden, 4 * hidden, True),
        norms=2,
        other_parameters=4 * hidden,
        tied=True,
        positions=fields.count("seq_length", 2048),
    )


def _megatron_linears(hidden: int, inner: int, attention_bias: bool) -> tuple[Linear, ...]:
    return (
        Linear("query_key_value", hidden, 3 * hidden, attention_bias),
        Linear("dense", hidden, hidden, attention_bias),
        Linear("dense_h_to_4h", hidden, inner, True, "mlp"),
        Linear("dense_4h_to_h", inner, hidden, True, "mlp"),
    )


def _gptj(fields: ConfigFields) -> ModelArchitecture:
    """GPT-J: separate projections without bias, one norm."""
    hidden, _ = _hidden_and_inner(fields)
    attention = [Linear(name, hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    return _gptj_like(fields, "gptj", attention)


def _codegen(fields: ConfigFields) -> ModelArchitecture:
    """CodeGen: GPT-J with one module for the three projections."""
    hidden, _ = _hidden_and_inner(fields)
    return _gptj_like(fields, "codegen", [Linear("qkv_proj", hidden, 3 * hidden), Linear("out_proj", hidden, hidden)])


def _gptj_like(fields: ConfigFields, model_type: str, attention: Sequence[Linear]) -> ModelArchitecture:
    hidden, inner = _hidden_and_inner(fields)
    mlp = (Linear("fc_in", hidden, inner, True, "mlp"), Linear("fc_out", inner, hidden, True, "mlp"))
    return _architecture(
        fields,
        model_type,
        linears=(*attention, *mlp),
        norms=1,
        other_parameters=2 * hidden + fields.size("vocab_size"),  # final norm, bias of the output head
        parallel=True,
        activation="gelu_new",
    )


def _mpt(fields: ConfigFields) -> ModelArchitecture:
    """MPT: ALiBi, no biases at all. transformers' MptMLP is four times as wide whatever ``expansion_ratio`` says."""
    hidden = fields.size("hidden_size")
    inner = 4 * hidden
    return _architecture(
        fields,
        "mpt",
        linears=(
            Linear("Wqkv", hidden, 3 * hidden),
            Linear("out_proj", hidden, hidden),
            Linear("up_proj", hidden, inner, part="mlp"),
            Linear("down_proj", inner, hidden, part="mlp"),
        ),
        norms=2,
        norm_width=hidden,
        other_parameters=hidden,
        tied=True,
    )


def _hidden_and_inner(fields: ConfigFields, inner: str = "n_inner") -> tuple[int, int]:
    """Hidden and MLP width; the latter is four times the former where the config does not say."""
    hidden = fields.size("hidden_size")
    return hidden, fields.count(inner, 4 * hidden)


def _architecture(
    fields: ConfigFields,
    model_type: str,
    *,
    linears: Sequence[Linear],
    norms: int,
    other_parameters: int,
    kv_heads: int | None = None,
    norm_width: int | None = None,
    tied: bool = False,
    parallel: bool = False,
    positions: int | None = None,
    activation: str | None = None,
) -> ModelArchitecture:
    """The rest that these families have in common.

    `norm_width` is the elements of one norm; None stands for torch's LayerNorm, a weight and a bias for each feature.
    `activation` is the default; None stands for GELU whatever the config says.

    Raises:
        RequestError: fields are missing or wrong; all of them at once.
    """
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    layers, vocab = fields.size("num_hidden_layers"), fields.size("vocab_size")
    head_dim = head_dimension(fields, hidden, heads, None, read=False)
    positions = fields.count("max_position_embeddings", 2048) if positions is None else positions
    tied = fields.flag("tie_word_embeddings", tied)
    activation = "gelu" if activation is None else fields.activation(activation)
    fields.check()
    return ModelArchitecture(
        name=fields.name,
        source=fields.source,
        model_type=model_type,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        head_dim=head_dim,
        intermediate_size=linears[-1].in_features,
        vocab_size=vocab,
        max_position_embeddings=positions,
        tied_embeddings=tied,
        linears=placed(model_type, linears),
        layer_other_parameters=norms * (2 * hidden if norm_width is None else norm_width),
        other_parameters=other_parameters,
        gated_mlp=False,
        parallel_attention=parallel,
        activation=activation,
        norm="layer",
        norms_per_layer=norms,
        config=dict(fields.raw),
    )


OLDER: dict[str, Callable[[ConfigFields], ModelArchitecture]] = {
    "bloom": _bloom,
    "codegen": _codegen,
    "falcon": _falcon,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt_bigcode,
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "mpt": _mpt,
    "opt": _opt,
}
"""How each of these model types is read."""
