"""The result of a run, which transformers and peft load without us: an adapter's folder, or a whole model's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_core.files import publish_folder, write_json
from qlora_core.recipe import Recipe

CARD = """---
library_name: peft
---
# {name}

A LoRA adapter (rank {rank}) for `{base}`, trained on a base in {quantization}.
{results}
```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{import_quantization}

base = AutoModelForCausalLM.from_pretrained(
    {base!r}{revision}, dtype=torch.{compute_dtype}{load_quantization}
)
model = PeftModel.from_pretrained(base, {folder!r})
tokenizer = AutoTokenizer.from_pretrained({base!r}{revision})
```
"""

MODEL_CARD = """---
library_name: transformers
---
# {name}

All weights of `{base}`, trained further in {compute_dtype}.
{results}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({folder!r})
```
"""

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
)

QUANTIZATION = """,
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type={type!r}, bnb_4bit_use_double_quant={double},
        bnb_4bit_compute_dtype=torch.{compute_dtype},
    ),"""


def export_adapter(
    checkpoint: Path,
    folder: Path,
    *,
    name: str,
    base: str,
    commit: str | None,
    recipe: Recipe,
    compute_dtype: str,
    results: Mapping[str, Any],
) -> None:
    """Copy the adapter of a checkpoint to `folder`, with a card that says how to load it; whole or not at all.

    Args:
        base: the base model's folder, or its Hub id.
        commit: the Hub's commit of it, or None for a folder.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(checkpoint / "adapter", temporary)
    four_bit = recipe.quantization in ("nf4", "fp4")
    card = CARD.format(
        base=base,
        revision="" if commit is None else f", revision={commit!r}",
        name=name,
        rank=recipe.rank,
        quantization=f"4-bit {recipe.quantization.upper()}" if four_bit else compute_dtype,
        results=listed(results),
        import_quantization=", BitsAndBytesConfig" if four_bit else "",
        compute_dtype=compute_dtype,
        load_quantization=QUANTIZATION.format(
            type=recipe.quantization, double=recipe.double_quantization, compute_dtype=compute_dtype
        )
        if four_bit
        else "",
        folder=str(folder),
    )
    (temporary / "README.md").write_text(card, encoding="utf-8")
    name_base(temporary / "adapter_config.json", base, commit)
    publish_folder(temporary, folder)


def export_model(
    checkpoint: Path,
    folder: Path,
    *,
    name: str,
    base: str,
    base_folder: Path,
    compute_dtype: str,
    results: Mapping[str, Any],
) -> None:
    """Copy the model of a checkpoint to `folder`, with the base's tokenizer and a card; whole or not at all.

    Args:
        base: the base model's folder, or its Hub id.
        base_folder: where it lies on this machine.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(checkpoint / "model", temporary)
    for pattern in TOKENIZER_FILES:
        for path in base_folder.glob(pattern):
            if path.is_file() and not (temporary / path.name).exists():
                shutil.copy(path, temporary / path.name)
    card = MODEL_CARD.format(
        name=name, base=base, compute_dtype=compute_dtype, results=listed(results), folder=str(folder)
    )
    (temporary / "README.md").write_text(card, encoding="utf-8")
    publish_folder(temporary, folder)


def listed(results: Mapping[str, Any]) -> str:
    """Results as a list of a card."""
    return "".join(f"\n- {key}: {value}" for key, value in results.items()) + ("\n" if results else "")


def name_base(config: Path, base: str, commit: str | None) -> None:
    """Put the base model's name into peft's config, where the place that it was loaded from is: a folder of a cache."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields.update(base_model_name_or_path=base, revision=commit)
    write_json(config, fields)
