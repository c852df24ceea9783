"""Adapter folders in peft's layout: what they are, and what others ask of them before they serve them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from clusters.errors import request_error

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be (vLLM, vllm/config/lora.py, MaxLoRARanks; later versions also take 1); 16 unless
it is given."""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """What an adapter's folder says of it.

    Raises:
        RequestError: it is no LoRA adapter in peft's layout, or its weights are pickled.
    """
    remedy = "Give a run's folder, or an adapter's with adapter_config.json and adapter_model.safetensors"
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise request_error("adapter", folder, f"{CONFIG} cannot be read there: {error}", remedy) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise request_error("adapter", folder, f"it is no LoRA adapter: its peft_type is {kind}", remedy)
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        rule = "its weights are pickled, which are not read" if pickled else f"{WEIGHTS} is missing"
        raise request_error("adapter", folder, rule, "Save it with peft's save_pretrained, as safetensors")
    return config


def adapter_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of an adapter, by the name in its file.

    Raises:
        RequestError: the file is damaged.
    """
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no mapping
    except (SafetensorError, OSError) as error:
        rule = f"{WEIGHTS} is damaged: {error}"
        raise request_error("adapter", folder, rule, "Copy it again") from None


def vllm_rank(config: Mapping[str, Any]) -> int | None:
    """The smallest `--max-lora-rank` with which vLLM serves an adapter, or None where its rank is above all of them."""
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def outside_vllm(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Why vLLM would refuse an adapter or compute something else than it was trained to; empty where it would not.

    By its sources (vllm/lora/peft_helper.py, PEFTHelper; vllm/lora/utils.py, parse_fine_tuned_lora_name), not tried.

    Args:
        config: the adapter's configuration.
        names: of its tensors.
    """
    found = []
    if vllm_rank(config) is None:
        found.append(f"its rank {config['r']} is above {VLLM_RANKS[-1]}, the largest --max-lora-rank")
    if config.get("modules_to_save"):
        found.append("it has whole modules beside its adapters (modules_to_save)")
    if config.get("use_dora"):
        found.append("DoRA is not supported")
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        found.append("biases of adapters are not supported")
    if config.get("alpha_pattern") or config.get("rank_pattern"):
        found.append("ranks and alphas by module are not read: r and lora_alpha would be taken for all")
    plain = (".lora_A.weight", ".lora_B.weight")
    others = sorted(name for name in names if not name.endswith(plain) and "lora_magnitude_vector" not in name)
    if others:
        found.append(f"tensors other than lora_A and lora_B are refused, such as {others[0]}")
    return found
