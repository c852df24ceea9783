"""What vLLM asks of an adapter that it is to serve, by its documents and sources; nothing of it is run here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be (vLLM, vllm/config/lora.py, MaxLoRARanks; later versions also take 1); 16 unless
it is given."""


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
