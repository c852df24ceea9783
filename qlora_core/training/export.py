"""The result of a run, which transformers and peft load without us: an adapter's folder, or a whole model's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qlora_core.data import CHAT_TEMPLATE
from qlora_core.files import replace_folder, write_json
from qlora_core.huggingface.adapter_config import CONFIG
from qlora_core.training.card import CARD, CardFacts, card
from qlora_core.training.shards import copy_beside


def export_adapter(checkpoint: Path, folder: Path, facts: CardFacts) -> None:
    """Copy the adapter of a checkpoint to `folder`, with its card and a template of its own; whole or not at all."""
    with replace_folder(folder) as temporary:
        shutil.copytree(checkpoint / "adapter", temporary)
        write_template(temporary, facts)
        (temporary / CARD).write_text(card(facts), encoding="utf-8")
        name_base(temporary / CONFIG, facts.base, facts.commit)


def export_model(checkpoint: Path, folder: Path, base: Path, facts: CardFacts) -> None:
    """Copy the model of a checkpoint to `folder`, with the base's tokenizer and a card; whole or not at all.

    Args:
        base: the base model's folder on this machine.
    """
    with replace_folder(folder) as temporary:
        shutil.copytree(checkpoint / "model", temporary)
        write_template(temporary, facts)
        copy_beside(base, temporary)
        (temporary / CARD).write_text(card(facts), encoding="utf-8")


def write_template(folder: Path, facts: CardFacts) -> None:
    """Write the run's own chat template, where it has one, by the name under which transformers looks for it."""
    if facts.chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(facts.chat_template, encoding="utf-8")


def name_base(config: Path, base: str, commit: str | None) -> None:
    """Put the base model's name into peft's config, where the place that it was loaded from is: a folder of a cache."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields.update(base_model_name_or_path=base, revision=commit)
    write_json(config, fields)
