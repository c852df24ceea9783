"""Models of which most layers have linear attention, and every so many attention: Qwen 3.5, trained on text.

Source: ``transformers/models/qwen3_5``, ``qwen3_5_moe`` of transformers 5.23.0 (configuration_*.py, modeling_*.py).
``AutoModelForCausalLM`` makes of the published configs, which have a vision tower, the language model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from qlora_core.architecture import DeltaNet, Linear, ModelArchitecture
from qlora_core.huggingface.decoder import build
from qlora_core.huggingface.families import Decoder, Experts, Flag
from qlora_core.huggingface.fields import ConfigFields
from qlora_core.huggingface.modules import placed

_BIAS = Flag("attention_bias", False)
_DENSE = Decoder(
    intermediate=12_288,
    kv_heads=4,
    head_dim=256,
    positions=32_768,
    qkv_bias=_BIAS,
    o_bias=_BIAS,
    gated_attention=True,
    qk_norm="head",
)
_DECODERS = {
    "qwen3_5_text": _DENSE,
    "qwen3_5_moe_text": _DENSE._replace(
        kv_heads=2, experts=Experts(size="moe_intermediate_size", width=512, number=256, per_token=8, shared=512)
    ),
}
_SIZES = {
    "qwen3_5_text": {
        "vocab_size": 248_320,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
    },
    "qwen3_5_moe_text": {
        "vocab_size": 248_320,
        "hidden_size": 2048,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
    },
}
"""Those of the configuration classes: a config within a config leaves out what is theirs."""
_KINDS = ("linear_attention", "full_attention")


def whole(fields: ConfigFields, text_type: str) -> ModelArchitecture:
    """The language model of one that sees.

    Raises:
        RequestError: fields are missing or wrong; all of them at once.
    """
    given = fields.raw.get("text_config")
    if not isinstance(given, Mapping):
        fields.problem("text_config", type(given).__name__, "must be an object with the fields of that part", "Add it")
        fields.check()
    quantized = {name: value for name, value in fields.raw.items() if name == "quantization_config"}
    text = fields.part("text_config", (text_type,), absent=_SIZES[text_type], fixed=quantized)
    return language_model(text, text_type)


def language_model(fields: ConfigFields, text_type: str) -> ModelArchitecture:
    """The language model by itself.

    Raises:
        RequestError: fields are missing or wrong; all of them at once.
    """
    period = _period(fields)
    net = DeltaNet(
        key_heads=fields.count("linear_num_key_heads", 16),
        value_heads=fields.count("linear_num_value_heads", 32),
        key_dim=fields.count("linear_key_head_dim", 128),
        value_dim=fields.count("linear_value_head_dim", 128),
        kernel=fields.count("linear_conv_kernel_dim", 4),
    )
    fields.must_divide("linear_num_key_heads", net.key_heads, "linear_num_value_heads", net.value_heads)
    decoder = build(fields, text_type, _DECODERS[text_type])
    if period == 1:
        return decoder
    hidden, values = decoder.hidden_size, net.value_heads * net.value_dim
    first, last = tuple(range(period - 1)), (period - 1,)
    mixing = (
        Linear("in_proj_qkv", hidden, net.convolved),
        Linear("in_proj_z", hidden, values),
        Linear("in_proj_b", hidden, net.value_heads),
        Linear("in_proj_a", hidden, net.value_heads),
        Linear("out_proj", values, hidden),
    )
    attention = [linear for linear in decoder.linears if linear.part == "attention"]
    shared = [linear for linear in decoder.linears if linear.part != "attention"]
    linears = (
        *(replace(linear, part="linear_attention", count=len(first), within=first) for linear in mixing),
        *(replace(linear, within=last) for linear in attention),
        *(replace(linear, count=period, within=(*first, *last)) for linear in shared),
    )
    # the convolution, dt_bias and A_log, and the norm of what is attended to, instead of norms of queries and keys
    beside = net.convolved * net.kernel + 2 * net.value_heads + net.value_dim - 2 * decoder.head_dim
    return replace(
        decoder,
        linears=placed(text_type, linears),
        layer_other_parameters=period * decoder.layer_other_parameters + (period - 1) * beside,
        period=period,
        delta_net=net,
    )


def _period(fields: ConfigFields) -> int:
    """How many layers repeat: each period ends with one that has attention."""
    layers = fields.size("num_hidden_layers")
    kinds = fields.per_layer("layer_types", layers)
    if kinds is None:
        interval = fields.count("full_attention_interval", 4)
        kinds = [_KINDS[(number + 1) % interval == 0] for number in range(layers)]
    if unknown := next((kind for kind in kinds if kind not in _KINDS), None):
        fields.problem("layer_types", str(unknown)[:80], f"must be {' or '.join(_KINDS)}", "Correct it")
        return 1
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    if not period or kinds != (["linear_attention"] * (period - 1) + ["full_attention"]) * (layers // period):
        rule = "is modelled only where so many layers with linear attention and one with attention take turns"
        fields.problem("layer_types", f"{len(kinds)} layers", rule, "Choose another model")
        return 1
    return period


HYBRID: dict[str, Callable[[ConfigFields], ModelArchitecture]] = {
    "qwen3_5": partial(whole, text_type="qwen3_5_text"),
    "qwen3_5_moe": partial(whole, text_type="qwen3_5_moe_text"),
    **{text_type: partial(language_model, text_type=text_type) for text_type in _DECODERS},
}
"""By model type."""
