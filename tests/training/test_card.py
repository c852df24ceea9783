"""The model card, read as the Hub reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard

from qlora_core.recipe import Recipe
from qlora_core.training.card import CardFacts, card, merged_card
from qlora_core.training.export import export_adapter, export_model

PHASES = {"after_load": 2**30, "forward": 2**31, "backward": 3 * 2**30, "optimizer": 2**31}
FACTS = CardFacts(
    name="guanaco",
    base="org/base",
    commit="c" * 40,
    auto_class="AutoModelForCausalLM",
    recipe=Recipe(rank=16),
    compute_dtype="bfloat16",
    steps=120,
    chat_template=None,
    datasets={
        "oasst1.jsonl": {"examples": 9, "format": "messages", "tokens": 900, "truncated": 1, "digest": "d1", "times": 1}
    },
    strategy={"world_size": 2, "micro_batch": 4, "attention": "sdpa"},
    predicted={"phases": PHASES, "allocated_bytes": 3 * 2**30, "step_seconds": 1.5},
    measured={
        "phases": {**PHASES, "backward": 2**32},
        "allocated_bytes": 2**32,
        "allocated_is": "tensor bytes",
        "step_seconds": 2.0,
    },
    results={"eval_before": 2.0, "eval_after": 1.0},
    versions={"torch": "2.13.0"},
)


def front(card: str) -> dict[str, Any]:
    fields: dict[str, Any] = cast(Any, ModelCard(card).data).to_dict()
    return fields


def test_the_hub_reads_its_front_matter() -> None:
    data = front(card(FACTS))
    assert data["base_model"] == "org/base"
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["base_model:adapter:org/base", "lora", "qlora"]


def test_it_tells_data_recipe_plan_measurements_and_results() -> None:
    text = ModelCard(card(FACTS)).text
    for shown in (
        "| perplexity | 7.39 | 2.72 |",  # e squared and e
        "`oasst1.jsonl`: 9 examples in format messages, 900 tokens; 1 cut off at 512 tokens. SHA-256 `d1`",
        "| rank | 16 |",
        "| steps | 120 |",
        "| micro_batch | 4 |",
        "| backward, GiB | 3.000 | 4.000 |",
        "| peak, GiB | 3.000 | 4.000 |",
        "| a step, seconds | 1.500 | 2.000 |",
        "torch 2.13.0",
        f"'org/base', revision='{'c' * 40}', dtype=torch.bfloat16",
        "bnb_4bit_quant_type='nf4'",
    ):
        assert shown in text


def test_no_path_of_the_machine_gets_into_it() -> None:
    text = card(replace(FACTS, base="/home/ada/secret/tiny", commit=None))
    assert "/home/ada" not in text
    assert "path/to/tiny" in text
    assert "base_model" not in front(text)


def test_what_was_not_measured_or_evaluated_is_left_out() -> None:
    text = card(replace(FACTS, measured=None, results={}, recipe=Recipe(method="lora", quantization="none")))
    assert "## Measurements" not in text
    assert "## Evaluation" not in text
    assert "BitsAndBytesConfig" not in text
    assert "on a base in bfloat16" in text


def test_a_model_of_which_all_weights_were_trained_is_no_adapter() -> None:
    text = card(replace(FACTS, recipe=Recipe(method="full", quantization="none")))
    data = front(text)
    assert (data["library_name"], data["tags"]) == ("transformers", ["base_model:finetune:org/base"])
    assert "All weights of `org/base`" in text
    assert "PeftModel" not in text


def merged(adapter_card: str, **given: Any) -> str:
    facts = {"name": "out", "base": "tiny", "repo": None, "auto_class": "AutoModelForCausalLM", "dtype": "bfloat16"}
    return merged_card(adapter_card, **{**facts, **given})


def test_the_card_of_a_merged_model_is_its_adapters_without_what_is_true_of_the_adapter_alone() -> None:
    before = ModelCard(card(FACTS))
    text = merged(str(before), repo="org/base")
    assert front(text) == {
        "base_model": "org/base",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:finetune:org/base"],
    }
    assert (
        "A LoRA adapter of rank 16 for `org/base`, trained on a base in NF4, and merged into `org/base` in bfloat16. "
        "All figures here are from before the merge, which may change them a little.\n"
    ) in text
    assert 'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder", dtype="auto")' in text
    for gone in ("peft", "PeftModel", "BitsAndBytesConfig"):
        assert gone not in text
    kept = before.text[before.text.index("## Evaluation") : before.text.index("## Loading")]
    assert kept in text
    assert text.startswith("---\n")
    assert text.endswith("## Versions\n\ntorch 2.13.0\n")


def test_a_merged_models_card_names_the_base_that_it_was_merged_into_and_keeps_what_the_user_wrote() -> None:
    edited = card(FACTS).replace("tags:\n", "license: mit\ntags:\n- birds\n").replace("## Data", "By Ada.\n\n## Data")
    elsewhere = merged(edited, repo="org/mirror")
    assert (front(elsewhere)["base_model"], front(elsewhere)["license"]) == ("org/mirror", "mit")
    assert front(elsewhere)["tags"] == ["base_model:finetune:org/mirror", "birds"]
    assert "By Ada.\n\n## Data" in elsewhere
    here = merged(edited)
    assert front(here)["base_model"] == "org/base"
    assert "for `org/base`, trained on a base in NF4, and merged into `tiny` in bfloat16." in here


def test_a_model_merged_from_an_adapter_without_a_card_of_ours_has_a_short_one() -> None:
    broken = card(FACTS).replace("library_name: peft", "library_name: [")
    for other in ("", "---\nlibrary_name: peft\n---\n# A card of peft's\n", broken):
        text = merged(other, repo="org/base", auto_class="AutoModelForImageTextToText")
        assert front(text)["tags"] == ["base_model:finetune:org/base"]
        assert "# out\n\nA LoRA adapter, merged into `org/base` in bfloat16.\n\n## Loading" in text
        assert 'AutoModelForImageTextToText.from_pretrained("path/to/this/folder", dtype="auto")' in text
        assert "peft" not in text
    assert "base_model" not in front(merged(""))


def test_a_chat_template_of_its_own_goes_with_the_result(tmp_path: Path) -> None:
    for name, file in (("adapter", "adapter_config.json"), ("model", "config.json"), (".", "chat_template.jinja")):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file).write_text("{}")
    own = replace(FACTS, chat_template="{{ 'é' }}")
    export_adapter(tmp_path, tmp_path / "a", own)
    export_model(tmp_path, tmp_path / "m", tmp_path, own)  # the base has another
    for folder in ("a", "m"):
        assert (tmp_path / folder / "chat_template.jinja").read_text(encoding="utf-8") == "{{ 'é' }}"
    assert 'chat_template=open("path/to/this/folder/chat_template.jinja").read()' in card(own)
    export_adapter(tmp_path, tmp_path / "b", FACTS)
    assert not (tmp_path / "b" / "chat_template.jinja").exists()
    assert "chat_template" not in card(FACTS)
