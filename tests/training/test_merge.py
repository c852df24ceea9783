"""A merge gives what peft's merge_and_unload gives, in less memory; what cannot be merged is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_models import small_gemma3, small_mistral3, small_qwen3_5
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from clusters.errors import RequestError, RunFailed
from qlora_core.memory.measure import StorageMeter
from qlora_core.training.merge import Merged, merged_folder
from qlora_core.training.model import class_in


def llama(**changes: Any) -> LlamaForCausalLM:
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **changes}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape))


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def adapter_for(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter that changes much, as if it were trained."""
    model = class_in(base).from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    model = get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return saved(model, folder)


def merge(base: Path, adapter: Path, folder: Path, dtype: str = "float32", size: int | str = "5GB") -> Merged:
    with merged_folder(base, adapter, folder, dtype=dtype, max_shard_size=size) as (_, merged):
        return merged


def by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The reference: everything in memory at once."""
    model = class_in(base).from_pretrained(base, dtype=torch.float32)
    whole: dict[str, torch.Tensor] = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return whole


PAIR = ["q_proj", "v_proj"]
GPT2 = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {}),
        (llama, {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}),
        (llama, {"use_dora": True}),
        (
            llama,
            {
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"v_proj": 32},
                "layers_to_transform": [1],
                "target_modules": PAIR,
            },
        ),
        (lambda: llama(tie_word_embeddings=True), {}),
        (lambda: llama(attention_bias=True), {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
        (lambda: GPT2LMHeadModel(GPT2), {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        (lambda: small_gemma3(96), {}),
        (lambda: small_qwen3_5(96), {}),
        (lambda: small_mistral3(96), {}),
    ],
    ids=[
        "LoRA",
        "rsLoRA",
        "DoRA",
        "patterns",
        "tied",
        "embeddings",
        "Conv1D",
        "vision",
        "linear attention",
        "mistral3",
    ],
)
def test_a_merge_gives_the_weights_that_peft_gives(
    make: Callable[[], Any], options: dict[str, Any], tmp_path: Path
) -> None:
    base = saved(make(), tmp_path / "base", max_shard_size="20KB")
    adapter = adapter_for(base, tmp_path / "adapter", **options)
    merged = merge(base, adapter, tmp_path / "merged", size="20KB")
    loaded = class_in(tmp_path / "merged").from_pretrained(tmp_path / "merged").state_dict()
    expected = by_peft(base, adapter)
    assert loaded.keys() == expected.keys()
    changed = 0
    unmerged = class_in(base).from_pretrained(base, dtype=torch.float32).state_dict()
    for name, weight in expected.items():
        torch.testing.assert_close(loaded[name], weight, rtol=0, atol=1e-6)
        changed += not torch.equal(weight, unmerged[name])
    assert changed == merged.layers > 0
    files = list((tmp_path / "merged").glob("*.safetensors"))
    assert len(files) == merged.shards > 1
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == merged.bytes
    assert set(index["weight_map"].values()) == {path.name for path in files}


def test_a_base_saved_without_its_head_has_other_names_and_merges_too(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2)
    base = saved(model.transformer, tmp_path / "base")
    (base / "config.json").write_text(json.dumps({**GPT2.to_dict(), "architectures": ["GPT2LMHeadModel"]}))
    adapter = adapter_for(base, tmp_path / "adapter", target_modules=["c_attn"])
    assert merge(base, adapter, tmp_path / "merged").layers == 2
    with safe_open(tmp_path / "merged" / "model.safetensors", framework="pt") as file:
        expected = by_peft(base, adapter)["transformer.h.1.attn.c_attn.weight"]
        torch.testing.assert_close(file.get_tensor("h.1.attn.c_attn.weight"), expected, rtol=0, atol=1e-6)


def test_the_sum_is_rounded_once_and_the_config_says_the_dtype(tmp_path: Path, tiny_base: Path) -> None:
    adapter = adapter_for(tiny_base, tmp_path / "adapter")
    merge(tiny_base, adapter, tmp_path / "merged", dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, weight in by_peft(tiny_base, adapter).items():
        torch.testing.assert_close(loaded.state_dict()[name], weight.bfloat16(), rtol=2**-7, atol=1e-6)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tiny_base / name).read_bytes()


def test_the_merged_model_has_a_card_that_names_no_path_of_the_machine(tmp_path: Path, tiny_base: Path) -> None:
    adapter = adapter_for(tiny_base, tmp_path / "adapter")
    assert "library_name: peft" in (adapter / "README.md").read_text()  # peft's own, to be filled in
    merge(tiny_base, adapter, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "A LoRA adapter, merged into `tiny` in float32." in card
    assert "AutoModelForCausalLM.from_pretrained(" in card
    assert str(tiny_base.parent) not in card

    (adapter / "README.md").write_bytes(b"\xff")
    merge(tiny_base, adapter, tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card.replace("# merged", "# again")


def test_it_needs_the_memory_of_a_shard_and_a_layer_and_not_of_the_model(tmp_path: Path) -> None:
    base = saved(llama(hidden_size=64, intermediate_size=128, num_hidden_layers=40), tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter", r=2)
    shard, largest_layer = 200_000, 4 * 64 * 128
    meter = StorageMeter()
    with meter.phase("forward"):
        merged = merge(base, adapter, tmp_path / "merged", size=shard)
    assert merged.bytes > 25 * shard
    # of the layer: the base's weight, its float32 copy, the product of the adapter's matrices
    assert meter.peaks().forward < shard + 4 * largest_layer


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        # both matrices of q, k, v, o and one of gate, up, down, in two layers
        ({"hidden_size": 64}, "on this base; 21 more tensors differ"),
        ({"num_hidden_layers": 1}, "and this base has no such layer; 13 more tensors differ"),
        ({"num_hidden_layers": 3}, "it stops below model.layers.2.self_attn.q_proj, the first of 7 further layers"),
    ],
)
def test_a_merge_into_a_base_of_another_size_is_refused_and_writes_nothing(
    changes: dict[str, int], shown: str, tmp_path: Path
) -> None:
    adapter = adapter_for(saved(llama(), tmp_path / "base"), tmp_path / "adapter")
    other = saved(llama(**changes), tmp_path / "other")
    with pytest.raises(RequestError) as refused:
        merge(other, adapter, tmp_path / "merged")
    assert "was trained on a base of another size or kind" in str(refused.value)
    assert shown in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]


def test_a_base_of_another_kind_has_none_of_the_targets(tmp_path: Path) -> None:
    adapter = adapter_for(saved(llama(), tmp_path / "base"), tmp_path / "adapter")
    other = saved(GPT2LMHeadModel(GPT2), tmp_path / "other")
    with pytest.raises(RequestError, match=r"another size or kind: .*Target modules"):
        merge(other, adapter, tmp_path / "merged")


def test_files_of_another_size_than_their_config_are_refused(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter", target_modules=["up_proj"])
    saved(llama(intermediate_size=64), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", base)
    with pytest.raises(RequestError, match=r"should be \[48, 32\], and in the base's files are \[64, 32\]; 1 more"):
        merge(base, adapter, tmp_path / "merged")


def test_it_never_merges_into_a_quantized_base(tmp_path: Path, tiny_base: Path) -> None:
    adapter = adapter_for(tiny_base, tmp_path / "adapter")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=quantization)
    with pytest.raises(RequestError, match=r"stored quantized \(bitsandbytes\): to merge into them would cost"):
        merge(saved(quantized, tmp_path / "quantized"), adapter, tmp_path / "merged")


def test_tied_embeddings_and_fused_experts_are_refused_with_the_reason(tmp_path: Path) -> None:
    tied = saved(llama(tie_word_embeddings=True), tmp_path / "tied")
    adapter = adapter_for(tied, tmp_path / "one", target_modules=["embed_tokens"])
    with pytest.raises(RequestError, match="embed_tokens shares its weight with the other embedding"):
        merge(tied, adapter, tmp_path / "merged")
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    experts = saved(
        MixtralForCausalLM(MixtralConfig(num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, **shape)),
        tmp_path / "experts",
    )
    adapter = adapter_for(
        experts, tmp_path / "two", target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]
    )
    with pytest.raises(RequestError, match="adapters on fused parameters, such as a mixture's experts"):
        merge(experts, adapter, tmp_path / "merged")
    adapter = adapter_for(experts, tmp_path / "three", target_modules=["q_proj", "v_proj"])
    assert merge(experts, adapter, tmp_path / "merged").layers == 2  # what is no expert is merged as everywhere


def test_what_float16_cannot_hold_fails_and_leaves_nothing(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter", lora_alpha=10_000_000)
    with pytest.raises(RunFailed, match=r"not finite in torch.float16"):
        merge(base, adapter, tmp_path / "merged", dtype="float16")
    assert not list(tmp_path.glob("*merged*"))
