"""The card of what a run made: what it was made from, how, at what cost, what it can do, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from qlora_core.data import CHAT_TEMPLATE, in_an_epoch
from qlora_core.perplexity import perplexity
from qlora_core.recipe import Recipe

CARD = "README.md"
GIB = 1024**3
METHOD_TAGS = {"qlora": ["lora", "qlora"], "lora": ["lora"], "full": []}
LOADING = """```python
import torch
from peft import PeftModel
from transformers import {imported}

base = {auto_class}.from_pretrained(
    {base!r}{revision}, dtype=torch.{compute_dtype}{quantization}
)
model = PeftModel.from_pretrained(base, "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained({base!r}{revision}{template})
```"""
LOADING_MODEL = """```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("path/to/this/folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```"""
QUANTIZATION = """,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type={type!r}, bnb_4bit_use_double_quant={double},
        bnb_4bit_compute_dtype=torch.{compute_dtype},
    ),"""

SUMMARY = re.compile(r"^(A LoRA adapter of rank \d+ for `[^`\n]+`, trained on a base in \S+)\.$", re.MULTILINE)
"""Of an adapter, as `summary` has it."""
LOADED = re.compile(r"(?<=^## Loading\n\n)```python\n.*?^```$", re.MULTILINE | re.DOTALL)
"""The code by which a card says how to load."""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card tells of a run, as its record has it. No path of the machine gets into a card.

    Attributes:
        base: the base model's folder, or its Hub id.
        commit: the Hub's commit of it, or None for a folder.
        auto_class: of transformers, that loads it.
        chat_template: with which conversations were written in place of the tokenizer's; None for its own.
        datasets: by what each is called, what became of it: examples, tokens, digest and so on.
        strategy: how the plan spread the step.
        predicted, measured: bytes of the fullest rank, by phase and at the peak, and seconds of a step.
        results: evaluation before and after.
        versions: of the packages.
    """

    name: str
    base: str
    commit: str | None
    auto_class: str
    recipe: Recipe
    compute_dtype: str
    steps: int
    chat_template: str | None
    datasets: Mapping[str, Mapping[str, Any]]
    strategy: Mapping[str, Any]
    predicted: Mapping[str, Any]
    measured: Mapping[str, Any] | None
    results: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def public_base(self) -> str:
        """The base as others may know it: its Hub id, or the folder's own name."""
        return self.base if self.commit else PurePath(self.base).name


def card(facts: CardFacts) -> str:
    """The whole card, with the front matter that the Hub reads."""
    recipe, settings = facts.recipe, facts.recipe.to_json()
    if recipe.steps is not None:
        del settings["epochs"]  # which then say nothing
    relation = "finetune" if recipe.method == "full" else "adapter"
    front = ModelCardData(
        base_model=facts.base if facts.commit else None,
        library_name="transformers" if recipe.method == "full" else "peft",
        pipeline_tag="text-generation",
        tags=[f"base_model:{relation}:{facts.base}"] * bool(facts.commit) + METHOD_TAGS[recipe.method],
    )
    sections = [
        f"# {facts.name}",
        summary(facts),
        evaluation(facts.results),
        data(facts),
        "## Recipe\n\n" + table({**settings, "compute_dtype": facts.compute_dtype, "steps": facts.steps}),
        "## Plan\n\n" + table(facts.strategy),
        measurements(facts.predicted, facts.measured),
        "## Loading\n\n" + loading(facts),
        "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    ]
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n" + "\n\n".join(filter(None, sections)) + "\n"))


def merged_card(adapter_card: str, *, name: str, base: str, repo: str | None, auto_class: str, dtype: str) -> str:
    """The card of a model that an adapter was merged into: the adapter's own, where it is one of ours, made true of it.

    Args:
        adapter_card: empty where the adapter has none.
        name: the title where that is none of ours.
        base: the name of the folder that was merged into.
        repo: where the Hub has that; None where it does not.
        auto_class: of transformers, that loads the model.
        dtype: of its weights.
    """
    merged = f"merged into `{repo or base}` in {dtype}."
    code = LOADING_MODEL.format(auto_class=auto_class)
    known = own_card(adapter_card)
    if known is None:
        fields, text = {}, f"# {name}\n\nA LoRA adapter, {merged}\n\n## Loading\n\n{code}\n"
    else:
        fields = cast(Any, known.data).to_dict()
        figures = "All figures here are from before the merge, which may change them a little."
        text = SUMMARY.sub(lambda found: f"{found[1]}, and {merged} {figures}", known.text)
        text = LOADED.sub(lambda found: code, text)
    model = repo or fields.get("base_model")
    others = [
        tag for tag in fields.get("tags", ()) if tag not in METHOD_TAGS["qlora"] and "base_model:" not in str(tag)
    ]
    changed = {
        "base_model": model,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:finetune:{model}"] * isinstance(model, str) + others,
    }
    front = ModelCardData(**{**fields, **changed})
    return str(ModelCard(f"---\n{front.to_yaml()}\n---\n{text}"))


def own_card(text: str) -> ModelCard | None:
    """The card in a file, where it is that of an adapter and `card` wrote it."""
    if not (SUMMARY.search(text) and LOADED.search(text)):
        return None
    try:
        return ModelCard(text)
    except (ValueError, YAMLError):  # its front matter was changed, and is no longer any
        return None


def summary(facts: CardFacts) -> str:
    """What it is, in a sentence."""
    recipe = facts.recipe
    if recipe.method == "full":
        return f"All weights of `{facts.public_base}`, trained further in {facts.compute_dtype}."
    stored = recipe.quantization.upper() if recipe.quantization != "none" else facts.compute_dtype
    return f"A LoRA adapter of rank {recipe.rank} for `{facts.public_base}`, trained on a base in {stored}."


def table(fields: Mapping[str, Any]) -> str:
    """Names and values; lists as text, and what is nothing left out."""
    rows = [
        f"| {name} | {', '.join(map(str, value)) if isinstance(value, list | tuple) else value} |"
        for name, value in fields.items()
        if value is not None
    ]
    return "\n".join(["| | |", "| --- | --- |", *rows])


def evaluation(results: Mapping[str, Any]) -> str:
    """Loss and perplexity on held-out examples, before and after."""
    losses = (results.get("eval_before"), results.get("eval_after"))
    if None in losses:
        return ""
    before, after = (float(loss) for loss in losses if loss is not None)
    return "\n".join(
        [
            "## Evaluation\n",
            "| on held-out examples | before | after |",
            "| --- | ---: | ---: |",
            f"| loss | {before:.4f} | {after:.4f} |",
            f"| perplexity | {perplexity(before):.2f} | {perplexity(after):.2f} |",
        ]
    )


def data(facts: CardFacts) -> str:
    """What it learned from, by name, size and digest."""
    said = [
        f"`{name}`: {known['examples']} examples in format {known['format']}, {known['tokens']} tokens; "
        f"{known['truncated']} cut off at {facts.recipe.seq_len} tokens{in_an_epoch(known['times'])}. "
        f"SHA-256 `{known['digest']}`."
        for name, known in facts.datasets.items()
    ]
    return "\n\n".join(["## Data", *said])


def measurements(predicted: Mapping[str, Any], measured: Mapping[str, Any] | None) -> str:
    """Memory and time, predicted beside measured."""
    if measured is None:
        return ""
    rows = [(phase, bytes_, measured["phases"][phase]) for phase, bytes_ in predicted["phases"].items()]
    rows.append(("peak", predicted["allocated_bytes"], measured["allocated_bytes"]))
    if reserved := measured.get("reserved_bytes"):  # on a GPU
        rows.append(("reserved", predicted["reserved_bytes"], reserved))
    lines = [f"| {title}, GiB | {guess / GIB:.3f} | {found / GIB:.3f} |" for title, guess, found in rows]
    seconds = predicted.get("step_seconds"), measured.get("step_seconds")
    if None not in seconds:
        lines.append(f"| a step, seconds | {seconds[0]:.3f} | {seconds[1]:.3f} |")
    head = ["| fullest rank | predicted | measured |", "| --- | ---: | ---: |"]
    return "\n".join([f"## Measurements\n\nMemory: {measured['allocated_is']}.\n", *head, *lines])


def loading(facts: CardFacts) -> str:
    """How plain transformers and peft load it."""
    recipe = facts.recipe
    if recipe.method == "full":
        return LOADING_MODEL.format(auto_class=facts.auto_class)
    four_bit = recipe.quantization in ("nf4", "fp4")
    quantization = QUANTIZATION.format(
        type=recipe.quantization, double=recipe.double_quantization, compute_dtype=facts.compute_dtype
    )
    own = facts.chat_template is not None
    return LOADING.format(
        template=f', chat_template=open("path/to/this/folder/{CHAT_TEMPLATE}").read()' if own else "",
        auto_class=facts.auto_class,
        imported=f"{facts.auto_class}, AutoTokenizer" + (", BitsAndBytesConfig" if four_bit else ""),
        base=facts.base if facts.commit else f"path/to/{facts.public_base}",
        revision=f", revision={facts.commit!r}" if facts.commit else "",
        compute_dtype=facts.compute_dtype,
        quantization=quantization if four_bit else "",
    )
