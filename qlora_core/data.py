"""What a specification may say of data: where it lies, its format, what is learned of it; and what is told of it.

Read before torch is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, Literal

from qlora_core.huggingface.hub import HubId, parse_hub_id

FormatName = Literal[
    "auto",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt-completion",
    "question-answer",
    "text",
    "oasst1",
    "guanaco",
    "flan-v2",
    "hh-rlhf",
    "unnatural-instructions",
    "chip2",
    "longform",
    "self-instruct",
    "vicuna",
]
Learn = Literal["auto", "assistant", "completion", "all"]

CHAT_TEMPLATE = "chat_template.jinja"
"""The file of a chat template beside a tokenizer or an adapter, as transformers names it."""

LEFT_OUT = {
    "unlearnable": "nothing to learn within the length",
    "empty_answers": "empty answer",
    "masked": "all its answers have weight 0",
    "bad": "bad record",
}
"""Why records are left out, by the fields that count them."""

_ADDRESS = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]*::)*[A-Za-z][A-Za-z0-9+.-]*://")  # chained ones of fsspec's too
_FILE_NAMES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz", ".arrow", ".txt")


def is_address(text: str) -> bool:
    """Whether it is written like ``s3://bucket/name``."""
    return bool(_ADDRESS.match(text))


def has_credentials(address: str) -> bool:
    """Whether an address carries a user, a password, a query or a fragment, where secrets stand."""
    place = address.split("://", 1)[1]
    return "@" in place.split("/", 1)[0] or "?" in place or "#" in place


def without_credentials(address: str) -> str:
    """An address as it may be shown."""
    scheme, place = address.split("://", 1)
    host, slash, rest = place.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{re.split('[?#]', rest)[0]}"


def in_an_epoch(times: float) -> str:
    """How often an epoch has examples, as it is said behind them; nothing for once."""
    return "" if times == 1 else f", {times:g} times an epoch"


def left_out(counts: Mapping[str, Any]) -> list[str]:
    """What of some data is left out, and why, in words; nothing where all is taken.

    Args:
        counts: `qlora_core.training.dataset.DataReport` as a run's record has it.
    """
    return [f"{counts[field]} left out ({why})" for field, why in LEFT_OUT.items() if counts.get(field)]


def hub_dataset(text: str) -> HubId | None:
    """The dataset of the Hub that `text` is written like, ``org/name`` or ``org/name@revision``.

    None where something of that name lies here, or a file is meant.
    """
    if os.path.exists(text) or text.lower().endswith(_FILE_NAMES):
        return None
    return parse_hub_id(text)
