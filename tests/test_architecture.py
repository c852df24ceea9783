"""The specification of `qlora_core.architecture`: what transformers builds on the meta device, exactly."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_models import LINEAR_ATTENTION, PIXTRAL, SIGLIP, assert_same, layers_of, on_meta
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from clusters.errors import RequestError
from orchestrator.rules import check_quantized
from qlora_core.architecture import EAGER_ONLY
from qlora_core.huggingface.config import architecture_from_config, architecture_from_folder
from qlora_core.huggingface.families import DECODERS
from qlora_core.huggingface.hybrid import HYBRID
from qlora_core.huggingface.older_decoders import OLDER
from qlora_core.huggingface.seeing import SEEING
from qlora_core.memory.bytes import buffer_bytes
from qlora_core.recipe import Recipe
from qlora_core.training.model import model_class

COMMON: dict[str, object] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, object] = {
    "vocab_size": 160,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 8,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MPT: dict[str, object] = {"d_model": 64, "n_heads": 8, "n_layers": 3, "vocab_size": 160}
FALCON: dict[str, object] = COMMON | {"ffn_hidden_size": 100}
EXPERTS: dict[str, object] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
BIASES: dict[str, object] = {"attention_bias": True, "mlp_bias": True}
DELTA_NET: dict[str, object] = {
    "num_hidden_layers": 6,
    "full_attention_interval": 3,
    "num_key_value_heads": 2,
    "head_dim": 16,
    **LINEAR_ATTENTION,
    "linear_key_head_dim": 16,
}

SMALL: dict[str, list[dict[str, object]]] = {
    "llama": [{}, {"num_key_value_heads": 2, "head_dim": 16, **BIASES}, {"tie_word_embeddings": True}],
    "mistral": [{}, {"head_dim": 16, "num_key_value_heads": 2, "sliding_window": None}],
    "ministral": [{"head_dim": 8}, {"num_key_value_heads": 2, "head_dim": 16, "layer_types": ["full_attention"] * 3}],
    "internlm3": [{"head_dim": 8}, {"num_key_value_heads": 4, "head_dim": 16, **BIASES}],
    "iquestcoder": [{"head_dim": 8}, {"num_key_value_heads": 2, **BIASES}],
    "ernie4_5": [{}, {"num_key_value_heads": 4, "head_dim": 16, "use_bias": True, "tie_word_embeddings": False}],
    "exaone4": [
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 5},
        {"num_key_value_heads": 2, "sliding_window": None, "layer_types": ["full_attention"] * 3},
    ],
    "hunyuan_v1_dense": [{"head_dim": 8}, {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True}],
    "helium": [{"num_key_value_heads": 8, "head_dim": 8}, {"num_key_value_heads": 2, "head_dim": 8, **BIASES}],
    "jais2": [{}, {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": False, "mlp_bias": False}],
    "ministral3": [{"num_key_value_heads": 2, "head_dim": 16}],
    "mixtral": [EXPERTS, EXPERTS | {"sliding_window": 8, "head_dim": 16}],
    "qwen2": [
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
        {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 0},
        {"num_key_value_heads": 8, "head_dim": 16},
    ],
    "qwen2_moe": [
        EXPERTS | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 40},
        EXPERTS
        | {
            "num_key_value_heads": 2,
            "shared_expert_intermediate_size": 40,
            "qkv_bias": False,
            "use_sliding_window": True,
        },
    ],
    "qwen3": [{"num_key_value_heads": 2}, {"num_key_value_heads": None, "head_dim": 16, **BIASES}],
    "qwen3_moe": [EXPERTS, EXPERTS | {"head_dim": 16, "use_sliding_window": True, **BIASES}],
    "gemma": [
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 8, "head_dim": 16, "tie_word_embeddings": False, **BIASES},
    ],
    "gemma2": [{}, {"head_dim": 16, "num_key_value_heads": 2, **BIASES}],
    "gemma3_text": [{}, {"sliding_window_pattern": 2}, {"head_dim": 16, **BIASES}],
    "gemma3": [
        {"text_config": COMMON | {"head_dim": 16}, "vision_config": SIGLIP},
        {
            "text_config": COMMON | {"sliding_window_pattern": 2, "head_dim": 8, **BIASES},
            "vision_config": SIGLIP | {"vision_use_head": True, "num_channels": 1},
            "tie_word_embeddings": False,
        },
    ],
    "qwen3_5": [{"text_config": COMMON | DELTA_NET}],
    "qwen3_5_moe": [{"text_config": COMMON | DELTA_NET | EXPERTS | {"shared_expert_intermediate_size": 40}}],
    "qwen3_5_moe_text": [DELTA_NET | EXPERTS | {"shared_expert_intermediate_size": 40}],
    "qwen3_5_text": [
        DELTA_NET,
        DELTA_NET
        | {
            "layer_types": ["linear_attention", "full_attention"] * 3,
            "linear_num_key_heads": 4,
            "linear_conv_kernel_dim": 3,
            "tie_word_embeddings": True,
            "attention_bias": True,
        },
        DELTA_NET | {"layer_types": ["full_attention"] * 6},
    ],
    "mistral3": [
        {"text_config": COMMON | {"model_type": "ministral3", "head_dim": 16}, "vision_config": PIXTRAL},
        {
            "text_config": COMMON | {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
            "vision_config": PIXTRAL | {"num_channels": 1},
            "multimodal_projector_bias": True,
            "spatial_merge_size": 1,
            "tie_word_embeddings": False,
        },
    ],
    "phi": [{}, {"qk_layernorm": True, "num_key_value_heads": 2}],
    "phi3": [{}, {"num_key_value_heads": 2, "sliding_window": 8, "tie_word_embeddings": True}],
    "stablelm": [
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 2, "qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
    ],
    "olmo": [{}, BIASES | {"clip_qkv": 8.0}],
    "olmo2": [{}, {"num_key_value_heads": 2, **BIASES}],
    "olmo3": [{}, {"num_key_value_heads": 2, "num_hidden_layers": 5}],
    "olmoe": [EXPERTS, EXPERTS | {"num_key_value_heads": 2, "clip_qkv": 8.0, **BIASES}],
    "smollm3": [{}, {"use_sliding_window": True, "sliding_window": 8, "num_hidden_layers": 9, **BIASES}],
    "granite": [{}, {"num_key_value_heads": 2, **BIASES}],
    "granitemoe": [EXPERTS, EXPERTS | {"num_key_value_heads": 2, "attention_bias": True}],
    "cohere": [{}, {"num_key_value_heads": 2, "use_qk_norm": True, **BIASES}],
    "cohere2": [{}, {"num_key_value_heads": 2, "num_hidden_layers": 9, **BIASES}],
    "starcoder2": [{}, {"use_bias": False, "sliding_window": 8, "tie_word_embeddings": False}],
    "gpt_oss": [EXPERTS, EXPERTS | {"head_dim": 16, "num_key_value_heads": 2, "attention_bias": False}],
    "glm": [{}, {"head_dim": 16, "attention_bias": False}],
    "glm4": [{}, {"head_dim": 16, "attention_bias": False}],
    "seed_oss": [{}, {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True, "head_dim": 16}],
    "arcee": [{}, {"num_key_value_heads": 2, **BIASES}],
    "nemotron": [{"num_key_value_heads": 8}, {"num_key_value_heads": 2, "head_dim": 16, **BIASES}],
    "bloom": [{}, {"tie_word_embeddings": False}],
    "codegen": [GPT2 | {"rotary_dim": 4}, GPT2 | {"rotary_dim": 4, "n_inner": 100}],
    "falcon": [
        FALCON,
        FALCON | {"multi_query": False, "bias": True, "alibi": True},
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        FALCON | {"parallel_attn": False, "tie_word_embeddings": False},
    ],
    "gpt2": [GPT2, GPT2 | {"n_inner": 100, "tie_word_embeddings": False}],
    "gpt_bigcode": [GPT2, GPT2 | {"multi_query": False}],
    "gpt_neox": [{}, {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}],
    "gptj": [GPT2 | {"rotary_dim": 4}],
    "mpt": [MPT | {"expansion_ratio": 2}, MPT | {"attn_config": {"clip_qkv": 8.0}}],
    "opt": [
        {"ffn_dim": 100},
        {"ffn_dim": 100, "enable_bias": False, "do_layer_norm_before": False},
        {"ffn_dim": 100, "layer_norm_elementwise_affine": False},
    ],
}
OWN_NAMES = {"gemma3", "gpt2", "gpt_bigcode", "gptj", "codegen", "mpt"}
CASES = [
    pytest.param(model_type, ({} if model_type in OWN_NAMES else COMMON) | extra, id=f"{model_type}-{number}")
    for model_type, variants in SMALL.items()
    for number, extra in enumerate(variants)
]


@pytest.mark.parametrize("model_type", sorted(SMALL))
def test_it_is_known_which_attention_transformers_has(model_type: str) -> None:
    model = on_meta({"model_type": model_type, **SMALL[model_type][0]})
    assert model._supports_sdpa == (model_type not in EAGER_ONLY)


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_the_auto_class_is_the_one_that_knows_the_model(model_type: str, fields: dict[str, Any]) -> None:
    architecture = architecture_from_config({"model_type": model_type, **fields}, name="small", source="test")
    assert architecture.auto_class == model_class(AutoConfig.for_model(model_type, **fields)).__name__


def test_every_model_type_has_a_case() -> None:
    assert set(SMALL) == {*DECODERS, *OLDER, *SEEING, *HYBRID}


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_it_is_what_transformers_builds(model_type: str, fields: dict[str, Any]) -> None:
    architecture = architecture_from_config({"model_type": model_type, **fields}, name="small", source="test")
    assert_same(architecture, on_meta({"model_type": model_type, **fields}))


@pytest.mark.parametrize("model_type", sorted({*DECODERS, *OLDER, *HYBRID} - {"qwen3_5", "qwen3_5_moe"}))
def test_what_a_config_leaves_out_is_as_transformers_has_it(model_type: str) -> None:
    """Of a config with nothing but what is required, at transformers' own sizes of that."""
    default = AutoConfig.for_model(model_type)
    names = ("hidden_size", "num_attention_heads", "vocab_size")
    fields = {"model_type": model_type, "num_hidden_layers": 4, **{name: getattr(default, name) for name in names}}
    if model_type in ("ministral", "hunyuan_v1_dense", "nemotron"):  # transformers' code wants these said
        fields |= {"head_dim": 128, "num_key_value_heads": 8}
    assert_same(architecture_from_config(fields, name="small", source="test"), on_meta(fields))


@pytest.mark.parametrize("model_type", DECODERS)
def test_heads_that_are_not_a_part_of_the_hidden_size_are_those_transformers_builds(model_type: str) -> None:
    fields = {"model_type": model_type, **COMMON, **SMALL[model_type][0], "head_dim": 24}
    if model_type in ("helium", "olmoe"):  # transformers builds them, and fails at the first step
        assert "8 heads of it must be hidden_size 64 wide" in str(refused(fields))
    else:
        assert_same(architecture_from_config(fields, name="small", source="test"), on_meta(fields))


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_tables_beside_the_weights_are_counted(model_type: str, fields: dict[str, Any]) -> None:
    architecture = architecture_from_config({"model_type": model_type, **fields}, name="small", source="test")
    built = sum(buffer.nbytes for buffer in on_meta({"model_type": model_type, **fields}).buffers())
    # frequencies of rotary embedding and a factor are not: some KB at most
    assert 0 <= built - buffer_bytes(architecture) < 4096
    assert (buffer_bytes(architecture) > 0) == (model_type in ("codegen", "gemma3", "gpt_bigcode", "gptj"))


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_it_is_what_a_saved_config_says(model_type: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """A config.json that transformers wrote, with its defaults and new names, is read as the one it was made from."""
    model = on_meta({"model_type": model_type, **fields})
    model.config.save_pretrained(tmp_path)
    assert_same(architecture_from_folder(tmp_path), model)


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_windows_are_transformers_windows(model_type: str, fields: dict[str, Any]) -> None:
    architecture = architecture_from_config({"model_type": model_type, **fields}, name="small", source="test")
    config = AutoConfig.for_model(model_type, **fields).get_text_config()
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or None
    count = (kinds or ["sliding_attention"] * architecture.num_layers).count("sliding_attention") if window else 0
    assert (architecture.sliding_window, architecture.sliding_layers) == (window if count else None, count)


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_quantized_are_the_modules_that_bitsandbytes_replaces(model_type: str, fields: dict[str, Any]) -> None:
    architecture = architecture_from_config({"model_type": model_type, **fields}, name="small", source="test")
    model = on_meta({"model_type": model_type, **fields})
    replaced = replace_with_bnb_linear(
        model,
        modules_to_not_convert=get_keys_to_not_convert(model),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )
    names = [name for name, module in replaced.named_modules() if type(module).__name__ == "Linear4bit"]
    expected = Counter[str]()
    for linear, count in architecture.all_linears():
        expected[linear.name] += count * linear.quantized
    assert Counter(name.rsplit(".", 1)[-1] for name in names) == +expected


@pytest.mark.parametrize(("model_type", "fields"), CASES)
def test_linears_come_in_the_order_of_the_forward_pass(model_type: str, fields: dict[str, Any]) -> None:
    """Attention before the MLP, each in the order it runs; what runs in parallel keeps attention first."""
    architecture = architecture_from_config({"model_type": model_type, **fields}, name="small", source="test")
    config = AutoConfig.for_model(model_type, **fields)
    config._attn_implementation = "eager"
    model = model_class(config).from_config(config, attn_implementation="eager").eval()
    ran: list[tuple[int, str, int]] = []
    for number, layer in enumerate(layers_of(model)[: architecture.period]):
        for name, module in layer.named_modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)):
                of = number, name.rsplit(".", 1)[-1]
                module.register_forward_hook(lambda _module, _in, out, of=of: ran.append((*of, out.shape[-1])))
    with torch.no_grad():
        model(torch.ones(1, 6, dtype=torch.long), use_cache=False)
    expected = [
        (number, linear.name, linear.out_features)
        for number in range(architecture.period)
        for linear in architecture.linears
        if number in linear.within
    ]
    assert [one for one in expected if one in ran] == expected
    if not architecture.experts:
        assert ran == expected


LLAMA: dict[str, object] = {"model_type": "llama", **COMMON}


def test_what_is_wrong_with_either_part_is_reported_at_once() -> None:
    fields = {
        "model_type": "gemma3",
        "text_config": {"num_hidden_layers": 0},
        "vision_config": {"patch_size": "14"},
        "tie_word_embeddings": "no",
    }
    assert {problem.where.removeprefix("bad/config.json: ") for problem in refused(fields).problems} == {
        "text_config: num_hidden_layers",
        "vision_config: patch_size",
        "tie_word_embeddings",
    }


def refused(fields: dict[str, Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        architecture_from_config(fields, name="bad", source="bad/config.json")
    return caught.value


def test_all_missing_fields_are_reported_at_once() -> None:
    error = refused({"model_type": "llama", "vocab_size": 160})
    missing = {problem.where.removeprefix("bad/config.json: ") for problem in error.problems}
    assert missing == {"hidden_size", "num_hidden_layers", "num_attention_heads"}


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("num_attention_heads", 0, "must be a whole number from 1"),
        ("num_hidden_layers", 10**12, "must be a whole number from 1 to 10000"),
        ("num_hidden_layers", True, "must be a whole number"),
        ("hidden_size", "4096", "must be a whole number"),
        ("hidden_size", 4096.0, "must be a whole number"),
        ("hidden_size", -64, "must be a whole number"),
        pytest.param("hidden_size", 10**5000, "too large to show", id="5001 digits"),
        ("hidden_size", 60, "must divide hidden_size 60"),
        ("num_key_value_heads", 3, "must divide num_attention_heads 8"),
        ("tie_word_embeddings", "no", "must be true or false"),
        ("hidden_act", [7], "must be an activation that is modelled: gelu,"),
        ("hidden_act", "foo", "must be an activation that is modelled: gelu,"),
        ("hidden_act", None, "must be an activation that is modelled: gelu,"),
        ("hidden_act", "mish", "must be an activation that is modelled: gelu,"),
    ],
)
def test_wrong_values_are_refused_by_name(field: str, value: object, says: str) -> None:
    message = str(refused(LLAMA | {field: value}))
    assert says in message
    assert field in message or "num_attention_heads" in message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "must name the kind of model"),
        ({"model_type": 7}, "must name the kind of model"),
        ({"model_type": "lama"}, "Nearest known: llama"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "marian", "is_encoder_decoder": True}, "encoder-decoder"),
        (
            {"model_type": "llava", "vision_config": {"depth": 2}},
            "of the models that see or hear, only gemma3, mistral3, qwen3_5, qwen3_5_moe are modelled",
        ),
        ({"model_type": "gemma3", "vision_config": {"model_type": "clip"}}, "must be siglip_vision_model"),
        ({"model_type": "gemma3", "text_config": 7}, "must be an object"),
        ({"model_type": "mamba"}, "state-space"),
        ({"model_type": "deepseek_v3"}, "not all alike"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quantized otherwise"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "cannot be quantized again (got no quant_method)"),
        (LLAMA | {"quantization_config": "gptq"}, "cannot be quantized again (got gptq)"),
        ({"model_type": "qwen3_moe", **COMMON, **EXPERTS, "mlp_only_layers": [0]}, "makes some layers dense"),
        ({"model_type": "mixtral", **COMMON, **EXPERTS, "num_experts_per_tok": 9}, "more than the 4 experts"),
        ({"model_type": "opt", **COMMON, "ffn_dim": 96, "word_embed_proj_dim": 32}, "OPT-350M"),
        ({"model_type": "gemma2", **COMMON, "layer_types": ["full_attention"]}, "one entry for each of the 3 layers"),
        (
            {"model_type": "gemma2", **COMMON, "layer_types": ["full_attention", "slide", 7]},
            "layer_types: each must be full_attention or sliding_attention (got 'slide', 7)",
        ),
    ],
)
def test_what_cannot_be_modelled_is_refused_with_the_reason(fields: dict[str, Any], says: str) -> None:
    assert says in str(refused(fields))


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    ("own", "asked", "says"),
    [
        (NF4 | {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["lm_head"]}, {}, ""),
        ({"load_in_4bit": True}, {"quantization": "fp4", "double_quantization": False}, ""),  # transformers' defaults
        ({"load_in_4bit": True}, {}, "as fp4 without double quantization"),
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, {}, "as int8"),
        (NF4, {"method": "lora", "quantization": "none", "double_quantization": False}, "as nf4 with double"),
        (NF4 | {"llm_int8_skip_modules": ["lm_head", "down_proj"]}, {}, "but for down_proj"),
    ],
)
def test_a_model_already_quantized_by_bitsandbytes_is_planned_only_as_it_is(
    own: dict[str, object], asked: dict[str, Any], says: str
) -> None:
    architecture = architecture_from_config(LLAMA | {"quantization_config": own}, name="x", source="x")
    assert architecture == architecture_from_config(LLAMA, name="x", source="x")
    if not says:
        return check_quantized(architecture, Recipe(**asked))
    with pytest.raises(RequestError, match=says):
        check_quantized(architecture, Recipe(**asked))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[1, 2]", "must hold one JSON object"),
        (b" " * (10 * 1024**2 + 1), "is too large"),
    ],
    ids=["cut off", "binary", "too deep", "too long a number", "a list", "too large"],
)
def test_an_unreadable_config_is_one_clear_error(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(RequestError, match=says):
        architecture_from_folder(tmp_path)


def test_a_folder_that_holds_no_model_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        architecture_from_folder(tmp_path / "nowhere")
    with pytest.raises(RequestError, match=r"has no config\.json"):
        architecture_from_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RequestError, match="holds a LoRA adapter"):
        architecture_from_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="must be a folder"):
        architecture_from_folder(tmp_path / "file")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(RequestError):
        architecture_from_folder(tmp_path)


OTHER_FIELDS = (
    "num_key_value_heads head_dim layer_types use_sliding_window sliding_window sliding_window_pattern "
    "max_window_layers no_rope_layers mlp_only_layers decoder_sparse_step quantization_config "
    "text_config vision_config attention_bias ffn_dim hidden_act tie_word_embeddings num_kv_heads multi_query "
    "new_decoder_architecture shared_expert_intermediate_size per_layer_config"
)
NAMES = st.sampled_from(sorted({*COMMON, *GPT2, *EXPERTS, *OTHER_FIELDS.split()}))
SIMPLE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(1, 64),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.integers(1, 9).map(lambda n: n * 10**4400),
)
VALUES = st.one_of(SIMPLE, st.lists(SIMPLE, max_size=4), st.dictionaries(st.text(max_size=5), SIMPLE, max_size=2))


@settings(max_examples=400, deadline=None)
@given(
    model_type=st.one_of(st.sampled_from(sorted(SMALL)), VALUES),
    base=st.sampled_from([COMMON, COMMON | EXPERTS | {"shared_expert_intermediate_size": 8, "ffn_dim": 9}, GPT2, {}]),
    changes=st.dictionaries(NAMES, VALUES, max_size=4),
)
def test_any_config_is_an_architecture_or_a_request_error(
    model_type: object, base: dict[str, Any], changes: dict[str, Any]
) -> None:
    with suppress(RequestError):
        architecture = architecture_from_config({"model_type": model_type, **base, **changes}, name="any", source="any")
        assert architecture.parameters > 0
        assert all(linear.weight_numel > 0 for linear in architecture.linears)
        assert architecture.num_heads % architecture.num_kv_heads == 0


def test_the_planner_half_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from qlora_core.huggingface.config import architecture_from_config as read;"
        f"read({LLAMA!r}, name='x', source='x');"
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
