"""LoRA's targets choose the layers that peft chooses; what peft refuses is refused before anything is loaded."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from meta_models import on_meta
from test_architecture import CASES
from transformers.pytorch_utils import Conv1D

from clusters.errors import RequestError
from orchestrator.targets import check_targets
from qlora_core.architecture import ModelArchitecture
from qlora_core.huggingface.config import architecture_from_config
from qlora_core.huggingface.modules import in_layer, layers_of, modules_of, not_linear
from qlora_core.memory.bytes import trainable_tensors
from qlora_core.recipe import Recipe, RecipeError
from qlora_core.targets import split
from qlora_core.training.model import attach_adapters, trainable

FIELDS: dict[str, dict[str, Any]] = {
    str(case.id): {"model_type": case.values[0], **case.values[1]}  # type: ignore[dict-item]
    for case in CASES
}


def architecture_of(family: str) -> ModelArchitecture:
    return architecture_from_config(FIELDS[family], name="small", source="test")


def recipe(*targets: str, **changes: Any) -> Recipe:
    return Recipe(**{"rank": 4, "targets": targets, **changes})


def trained_by_peft(family: str, asked: Recipe) -> int:
    """Elements that are trained where our training attaches the adapters."""
    model = on_meta(FIELDS[family]).requires_grad_(False)
    return sum(parameter.numel() for parameter in trainable(attach_adapters(model, asked, seed=0)).values())


def counted(family: str, asked: Recipe) -> int:
    """Elements that are trained, as the planner counts them."""
    check_targets(architecture_of(family), asked)
    return sum(numel * count for numel, count in trainable_tensors(architecture_of(family), asked))


def refusal(family: str, asked: Recipe) -> str:
    with pytest.raises(RequestError) as error:
        check_targets(architecture_of(family), asked)
    return str(error.value)


# --- where the modules are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FIELDS)
def test_linears_have_the_names_that_transformers_gives_their_modules(family: str) -> None:
    architecture, model = architecture_of(family), on_meta(FIELDS[family])
    head = model.get_output_embeddings()
    tower = modules_of(architecture.whole_type).tower
    there = {name: module for name, module in model.named_modules() if name and not name.startswith(tower)}
    expected = {
        name for name, module in there.items() if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    }
    assert expected == {
        in_layer(linear.path, number) for linear in architecture.linears for number in layers_of(architecture, linear)
    }
    # of StableLM's norms, one a head, the first stands for all
    others = {re.sub(r"norms\.\d+", "norms.0", name) for name in there} - expected
    assert others <= set(not_linear(architecture))


# --- names and regular expressions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama-1", (r".*\.(q|v)_proj",)),
        ("llama-1", (r"model\.layers\.\d+\.mlp\..*_proj",)),
        ("llama-1", (r".*self_attn\..*",)),
        ("llama-1", (r".*_proj",)),
        ("llama-1", (r".*\.q_proj", "down_proj")),
        ("llama-1", (r".*\.q_proj", r".*\.layers\.[0-9]{1,2}\.mlp\.up_proj")),
        ("llama-1", ("self_attn.q_proj", "mlp.down_proj")),
        ("llama-0", (r"(?i:.*\.Q_PROJ)",)),
        ("gpt2-0", ("c_proj",)),
        ("gpt2-0", ("mlp.c_proj",)),
        ("gpt2-0", (r"transformer\.h\.\d+\.attn\.c_.*",)),
        ("opt-0", (r".*\.fc[12]",)),
        ("opt-0", (r".*self_attn\.\w+_proj",)),
        ("mpt-0", (r".*ffn\.(up|down)_proj", "Wqkv")),
        ("phi3-0", (r".*\.(qkv|gate_up)_proj",)),
        ("falcon-0", (r".*dense.*",)),
        ("gpt_neox-0", (r".*attention\.(query_key_value|dense)",)),
        ("qwen2_moe-0", (r".*shared_expert\.(gate|up|down)_proj",)),
        ("qwen2_moe-0", ("gate_proj",)),
        ("gemma3-0", ("q_proj", "v_proj")),  # SigLIP's have these names too
        ("gemma3-1", (r".*self_attn\..*_proj", "down_proj")),
        ("granitemoe-0", (r".*\.q_proj",)),
        ("mixtral-0", (r".*\.(q|k|v|o)_proj",)),
        ("mixtral-0", (r".*\.w[123]",)),
        ("mixtral-0", (r".*\.w2", "gate")),
        ("mixtral-0", ("w1", "w2", "w3")),
        ("qwen3_moe-0", (r".*_proj",)),
        ("qwen3_moe-0", (r".*\.experts\.down_proj",)),
        ("qwen3_moe-0", ("gate_proj", "up_proj")),
        ("qwen3_moe-0", (r".*\.(gate|up)_proj", "q_proj")),
        ("olmoe-0", (r".*mlp\.gate",)),
        ("olmoe-0", ("gate", "v_proj")),
    ],
)
def test_the_planner_counts_what_peft_trains(family: str, targets: tuple[str, ...]) -> None:
    assert counted(family, recipe(*targets)) == trained_by_peft(family, recipe(*targets)) > 0


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        (r".*\.layers\.\d{1,2}\.mlp\..*,q_proj", (r".*\.layers\.\d{1,2}\.mlp\..*", "q_proj")),
        (r".*\.(q|v)[,_]proj,,x", (r".*\.(q|v)[,_]proj", "x")),
        (r"a(b,c),d\(,e", ("a(b,c)", r"d\(", "e")),
        ("[,", ("[",)),
        (",", ()),
    ],
)
def test_commas_separate_targets_outside_brackets(text: str, targets: tuple[str, ...]) -> None:
    assert split(text) == targets


@pytest.mark.parametrize("target", ["(", "*", "[a", "a{99999999999999999999}", "(?P<x>a)(?P<x>b)", "(?<=a+)b"])
def test_what_is_no_regular_expression_is_a_mistake_of_the_recipe(target: str) -> None:
    with pytest.raises(RecipeError, match="neither a name nor a regular expression") as error:
        recipe("q_proj", target)
    assert [mistake.given for mistake in error.value.mistakes] == [target]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "target", "says"),
    [
        ("llama-0", "q_prj", ["no linear layer of that name", "Did you mean q_proj?", "gate_proj, up_proj, down_proj"]),
        ("llama-0", "q_proj.*", ["matches the whole name of no linear layer", "model.layers.0.self_attn.q_proj"]),
        ("llama-0", r".*layers\.[12]\..*_proj", ["chooses q_proj in 2 of 3 layers", r"as .*\.q_proj does"]),
        ("llama-0", "layers.1.mlp.up_proj", ["chooses up_proj in 1 of 3 layers"]),
    ],
)
def test_targets_that_choose_nothing_or_only_some_layers_are_refused(family: str, target: str, says: list[str]) -> None:
    message = refusal(family, recipe("v_proj", target))
    for words in (*says, f"got {target}"):
        assert words in message


@pytest.mark.parametrize(
    ("family", "target", "other"),
    [
        ("llama-0", r".*mlp|.*q_proj", "model.layers.0.mlp"),
        ("llama-0", r".*mlp\..*", "model.layers.0.mlp.act_fn"),
        ("llama-0", r".*\d+.*", "model.layers.0"),
        ("qwen3-0", r".*self_attn\..*", "model.layers.0.self_attn.q_norm"),
        ("starcoder2-0", r".*mlp\..*", "model.layers.0.mlp.act"),
        ("opt-0", r"model\.decoder\.layers\.\d+\.\w+", "activation_fn"),
        ("qwen2_moe-0", r".*\.(up_proj|gate)", "model.layers.0.mlp.gate"),
        ("mixtral-0", r".*experts.*|.*q_proj", "model.layers.0.mlp.experts"),
    ],
)
def test_what_peft_cannot_adapt_is_refused_as_peft_refuses_it(family: str, target: str, other: str) -> None:
    assert f"{other} too" in refusal(family, recipe(target))
    with pytest.raises(ValueError, match=re.escape("is not supported")):
        trained_by_peft(family, recipe(target))


@pytest.mark.parametrize("target", [r".*(lm_head|q_proj)", r".*(embed_tokens|q_proj)"])
def test_output_head_and_embedding_get_no_adapters(target: str) -> None:
    assert "only linear layers of the decoder layers" in refusal("llama-0", recipe(target))


# --- mixtures of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "targets", "missing"),
    [
        ("qwen3_moe-0", ("gate_proj", "down_proj"), "up_proj"),
        ("qwen3_moe-0", ("up_proj",), "gate_proj"),
        ("olmoe-0", ("q_proj", "gate_proj"), "up_proj"),
        ("mixtral-0", ("w1", "w2"), "w3"),
        ("mixtral-0", (r".*\.w3",), "w1"),
    ],
)
def test_half_of_a_fused_parameter_is_refused_as_peft_refuses_it(
    family: str, targets: tuple[str, ...], missing: str
) -> None:
    message = refusal(family, recipe(*targets))
    assert f"without {missing}: transformers has both" in message
    assert f"Add {missing}" in message
    with pytest.raises(ValueError, match=f"without also targeting {missing}"):
        trained_by_peft(family, recipe(*targets))


@pytest.mark.parametrize("targets", ["all-linear", ("gate",), ("q_proj", "w2")])
def test_dropout_on_experts_is_refused_as_peft_refuses_it(targets: Any) -> None:
    asked = recipe(targets=targets, dropout=0.05)
    assert "peft has no dropout for routers and experts" in refusal("mixtral-0", asked)
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        trained_by_peft("mixtral-0", asked)


def test_dropout_on_attention_of_a_mixture_of_experts_is_fine() -> None:
    asked = recipe("q_proj", r".*\.v_proj", dropout=0.05)
    assert counted("mixtral-0", asked) == trained_by_peft("mixtral-0", asked)
