"""From a config's fields to shapes, for the model types built like Llama (the rows of `families.DECODERS`)."""

from __future__ import annotations

from qlora_core.architecture import Linear, ModelArchitecture
from qlora_core.huggingface.families import Decoder, Experts, Switch, Window
from qlora_core.huggingface.fields import ConfigFields
from qlora_core.huggingface.modules import placed

_ATTENTIONS = ("full_attention", "sliding_attention")
"""What ``layer_types`` can say of a layer."""


def build(fields: ConfigFields, model_type: str, family: Decoder) -> ModelArchitecture:
    """The architecture of a model of `family`.

    Raises:
        RequestError: fields are missing or wrong; all of them at once.
    """
    hidden, layers, heads = (
        fields.size("hidden_size"),
        fields.size("num_hidden_layers"),
        fields.size("num_attention_heads"),
    )
    vocab = fields.size("vocab_size")
    head_dim = head_dimension(
        fields, hidden, heads, family.head_dim if family.reads_head_dim else None, family.reads_head_dim
    )
    if family.whole_heads and heads * head_dim != hidden:
        rule = f"{heads} heads of it must be hidden_size {hidden} wide: the code of {model_type} fits no other"
        fields.problem("head_dim", str(head_dim), rule, "Correct one of them")
    kv_heads = key_value_heads(fields, heads, family.kv_heads)
    parallel = _on(fields, family.parallel)
    norms = 1 if parallel and family.one_norm_if_parallel else family.norms
    norm_width = {"rms": 1, "layer": 2, "bare": 0}[family.norm] * hidden
    window, windowed_layers = _window(fields, family.window, layers)

    linears = _attention(fields, family, hidden, heads * head_dim, kv_heads * head_dim)
    head_norms = _qk_norms(fields, family, heads, kv_heads, head_dim)
    other = norms * norm_width + head_norms + (heads if family.sinks else 0)
    experts = per_token = expert_size = expert_parameters = shared_size = 0
    if family.experts is None:
        intermediate = fields.count("intermediate_size", family.intermediate)
        linears += _mlp(fields, family, hidden, intermediate)
    else:
        _refuse_mixed_layers(fields)
        experts = fields.count("num_experts", family.experts.number)
        per_token = fields.count("num_experts_per_tok", family.experts.per_token)
        expert_size = fields.count(family.experts.size, family.experts.width)
        intermediate = fields.count("intermediate_size", expert_size)
        expert_parameters = _expert_parameters(family.experts, experts, expert_size, hidden)
        other += expert_parameters + experts * (hidden + (1 if family.experts.bias else 0))
        if per_token > experts:
            fields.problem(
                "num_experts_per_tok", str(per_token), f"is more than the {experts} experts there are", "Correct it"
            )
        if family.experts.shared:
            shared_size = fields.count("shared_expert_intermediate_size", family.experts.shared)
            linears += _shared_expert(hidden, shared_size)
    head_bias = vocab if _on(fields, family.head_bias) else 0
    tied = fields.flag("tie_word_embeddings", family.tied)
    positions = fields.count("max_position_embeddings", family.positions)
    activation = fields.activation(family.activation)
    fields.check()
    return ModelArchitecture(
        name=fields.name,
        source=fields.source,
        model_type=model_type,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=positions,
        tied_embeddings=tied,
        linears=placed(model_type, linears),
        layer_other_parameters=other,
        other_parameters=norm_width + head_bias,
        gated_mlp=len(family.mlp_names) == 3,
        parallel_attention=parallel,
        experts=experts,
        experts_per_token=per_token,
        sliding_window=window,
        sliding_layers=windowed_layers,
        expert_intermediate_size=expert_size,
        shared_expert_intermediate_size=shared_size,
        expert_parameters=expert_parameters,
        activation=activation,
        norm="rms" if family.norm == "rms" else "layer",
        norms_per_layer=norms,
        head_norms=head_norms > 0,
        config=dict(fields.raw),
    )


def head_dimension(fields: ConfigFields, hidden: int, heads: int, absent: int | None, read: bool = True) -> int:
    """The config's ``head_dim`` where the model reads it, else `absent`, else hidden_size / heads."""
    given = fields.optional("head_dim", absent) if read else None
    if given is not None:
        return given
    fields.must_divide("num_attention_heads", heads, "hidden_size", hidden)
    return max(1, hidden // heads)


def key_value_heads(fields: ConfigFields, heads: int, absent: int | None) -> int:
    """The config's ``num_key_value_heads``: `absent` where it is not there, as many as `heads` where it is null."""
    kv_heads = fields.optional("num_key_value_heads", absent) or heads
    fields.must_divide("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    return kv_heads


def _on(fields: ConfigFields, switch: Switch) -> bool:
    return switch if isinstance(switch, bool) else fields.flag(switch.field, switch.default)


def _attention(fields: ConfigFields, family: Decoder, hidden: int, q_width: int, kv_width: int) -> list[Linear]:
    qkv_bias = _on(fields, family.qkv_bias)
    output = Linear(family.o_name, q_width, hidden, _on(fields, family.o_bias))
    if family.fused_qkv:
        return [Linear("qkv_proj", hidden, q_width + 2 * kv_width, qkv_bias), output]
    widths = (("q_proj", q_width * (1 + family.gated_attention)), ("k_proj", kv_width), ("v_proj", kv_width))
    return [*(Linear(name, hidden, width, qkv_bias) for name, width in widths), output]


def _mlp(fields: ConfigFields, family: Decoder, hidden: int, intermediate: int) -> list[Linear]:
    bias = _on(fields, family.mlp_bias)
    *inner, down = family.mlp_names
    if family.fused_gate_up:
        ups = [Linear("gate_up_proj", hidden, 2 * intermediate, bias, "mlp")]
    else:
        ups = [Linear(name, hidden, intermediate, bias, "mlp") for name in inner]
    return [*ups, Linear(down, intermediate, hidden, bias, "mlp")]


def _shared_expert(hidden: int, size: int) -> list[Linear]:
    return [
        Linear("gate_proj", hidden, size, part="shared_expert"),
        Linear("up_proj", hidden, size, part="shared_expert"),
        Linear("down_proj", size, hidden, part="shared_expert"),
        Linear("shared_expert_gate", hidden, 1, part="shared_expert"),
    ]


def _expert_parameters(family: Experts, experts: int, size: int, hidden: int) -> int:
    """Elements of one layer's expert parameters: gate_up [experts, 2 size, hidden], down [experts, hidden, size]."""
    return experts * (3 * size * hidden + (2 * size + hidden if family.bias else 0))


def _qk_norms(fields: ConfigFields, family: Decoder, heads: int, kv_heads: int, head_dim: int) -> int:
    """Elements of one layer's query and key norms."""
    if not family.qk_norm or (family.qk_norm_if is not None and not _on(fields, family.qk_norm_if)):
        return 0
    width = 2 if family.qk_norm == "head" else heads + kv_heads
    return width * head_dim * (2 if family.qk_norm_bias else 1)


def _refuse_mixed_layers(fields: ConfigFields) -> None:
    """Dense layers between the sparse ones would make layers unlike each other, which nothing here can count."""
    rule = "makes some layers dense, and only layers all alike can be modelled"
    if not fields.is_empty("mlp_only_layers"):
        fields.problem("mlp_only_layers", "a list of layers", rule, "Choose another model")
    step = fields.count("decoder_sparse_step", 1)
    if step != 1:
        fields.problem("decoder_sparse_step", str(step), rule, "Choose another model")


def _window(fields: ConfigFields, window: Window | None, layers: int) -> tuple[int | None, int]:
    """The attention window in tokens and how many layers have it, as transformers' configuration classes decide."""
    if window is None or (window.switched and not fields.flag("use_sliding_window", False)):
        return None, 0
    size = fields.optional("sliding_window", window.default)
    listed = fields.per_layer("layer_types", layers) if window.layers != "all" else None
    if size is None:
        return None, 0
    if listed is not None:
        if unknown := [repr(kind)[:40] for kind in listed if kind not in _ATTENTIONS]:
            rule = f"each must be {' or '.join(_ATTENTIONS)}"
            fields.problem("layer_types", ", ".join(dict.fromkeys(unknown))[:80], rule, "Correct them")
        count = sum(kind == "sliding_attention" for kind in listed)
    elif window.layers in ("all", "listed"):
        count = layers
    elif window.layers == "late":
        count = max(0, layers - fields.count("max_window_layers", 28, least=0))
    elif window.layers == "even":
        count = (min(layers, fields.count("max_window_layers", 28, least=0)) + 1) // 2
    elif window.layers == "but_each_nth":
        count = layers - layers // fields.count("sliding_window_pattern", window.period)
    else:
        rope = fields.per_layer("no_rope_layers", layers)
        each = fields.count("no_rope_layer_interval", 4)
        count = layers // each if rope is None else sum(not has_rope for has_rope in rope)
    return (size, count) if count else (None, 0)
