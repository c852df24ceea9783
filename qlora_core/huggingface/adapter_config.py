"""adapter_config.json, which peft writes beside a LoRA adapter, and what a recipe says of the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clusters.errors import Problem, request_error

CONFIG = "adapter_config.json"
ELSEWHERE = (
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "exclude_modules",
    "alora_invocation_tokens",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
)
"""Fields of peft's LoraConfig (0.21.2) that change what is trained, and that a recipe does not have."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How adapters are begun (`init_lora_weights`) that changes the base's weights too."""
IN_A_LAYER = re.compile(r"^.*?\.\d+\.")
"""What stands before a module's name in its layer."""
PLAIN = "Convert it to plain LoRA first, as peft documents"
"""What to do with such an adapter."""


def changed_base(config: Mapping[str, Any]) -> str | None:
    """How an adapter began, as a rule that it broke, where that changed the base's weights too; else None."""
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(CHANGES_BASE):
        return f"it began with {begun}, which changed the base's weights too"
    return None


def read_config(folder: Path, where: str = "adapter") -> dict[str, Any]:
    """What the adapter_config.json of a LoRA adapter says.

    Args:
        where: the field or flag that the folder was named by.

    Raises:
        RequestError: there is none, or it is of another kind of adapter.
    """
    try:
        config: object = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        rule = f"the folder holds no {CONFIG}"
        raise request_error(where, folder, rule, "Give the folder that peft's save_pretrained wrote") from None
    except (OSError, ValueError) as error:
        raise request_error(where, folder / CONFIG, f"it cannot be read: {error}", "Copy it again") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(config, dict) or kind != "LORA":
        raise request_error(where, folder, f"it is no LoRA adapter: peft_type is {kind!r}", "Give a LoRA adapter")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        rule = f"it was trained for {config['task_type']}, not for a causal language model"
        raise request_error(where, folder, rule, "Give an adapter of task_type CAUSAL_LM")
    if type(config.get("r")) is not int or config["r"] < 1:
        raise request_error(where, folder, f"its rank r is {config.get('r')!r}", "It must be a whole number from 1 on")
    return config


def continued(config: Mapping[str, Any], recipe: dict[str, Any], folder: Path) -> list[Problem]:
    """Put what `recipe`, a section of a specification, does not say of an adapter into it; returns what differs.

    Its dropout may differ from that of the training before. Targets are compared where the base model is known.
    """
    problems = list(_untrainable(config, folder))
    targets = config.get("target_modules")
    said = {
        "rank": config["r"],
        "alpha": config.get("lora_alpha", 8),
        "dropout": config.get("lora_dropout", 0.0),
        "use_rslora": bool(config.get("use_rslora", False)),
        "use_dora": bool(config.get("use_dora", False)),
    }
    if isinstance(targets, list):
        # of fewer than 20 modules peft writes each with its layer; whether all layers have them is seen at the base
        said["targets"] = sorted({IN_A_LAYER.sub("", str(target)) for target in targets})
    elif isinstance(targets, str):
        said["targets"] = targets if targets == "all-linear" else [targets]
    else:
        problems.append(Problem("adapter", str(folder), "its config names no target_modules", "Name them there"))
    for name, value in said.items():
        here = recipe.setdefault(name, value)
        if name not in ("dropout", "targets") and here != value:
            rule = f"the adapter in {folder} was trained with {value!r}"
            problems.append(Problem(f"recipe.{name}", repr(here), rule, "Leave it out, or start without an adapter"))
    return problems


def _untrainable(config: Mapping[str, Any], folder: Path) -> Iterator[Problem]:
    """What of an adapter could not be trained on."""
    start = "Start without it, or train it with what made it"
    for name in ELSEWHERE:
        if config.get(name):
            rule = f"it has {name}, which a recipe has not"
            yield Problem("adapter", str(folder), rule, start)
    if config.get("bias", "none") != "none":
        yield Problem("adapter", str(folder), f"it trains biases too (bias: {config['bias']})", start)
    if begun := changed_base(config):
        yield Problem("adapter", str(folder), begun, PLAIN)
