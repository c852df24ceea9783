"""Encoded data, kept by what it was made from: a safetensors file each, in the user's cache folder.

It may be deleted at any time. What is damaged, or cannot be written, is passed over: the data is encoded anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from array import array
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from qlora_core.training.dataset.options import DataOptions
from qlora_core.training.dataset.readers import kind_of
from qlora_core.training.dataset.report import DataReport
from qlora_core.training.dataset.sources import Source
from qlora_core.training.dataset.tokens import EncodedExamples, save_examples

VERSION = 5
"""Raised when the same data becomes other tokens, or is kept otherwise."""
LIMIT_BYTES = 20 * 2**30
"""Of the whole folder; what was not used for longest goes first."""


def cache_folder() -> Path:
    """Where encoded data is kept: QLORA_CACHE, else below the user's cache folder."""
    if given := os.environ.get("QLORA_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-orchestrator" / "tokens"


def models_folder() -> Path:
    """Where models by address are kept, beside the encoded data."""
    return cache_folder().with_name("models")


def key_of(
    source: Source, format_: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, options: DataOptions
) -> str | None:
    """The name of the data as tokens; None where the tokenizer cannot be told from another, or nothing is kept."""
    if options.cache is None or not tokenizer.is_fast:
        return None
    template = tokenizer.chat_template
    made_from = [
        VERSION,
        *(metadata.version(package) for package in ("transformers", "tokenizers", "jinja2")),
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()),
        template,
        # a template that writes the date is another one tomorrow
        str(options.day or date.today()) if "strftime_now" in str(template) else "",
        source.digest,
        source.shown,  # stands in the report, and a file's suffix says how it is read
        kind_of(source.shown),
        format_,
        seq_len,
        options.learn,
        sorted((options.columns or {}).items()),
        options.wanted_split,
        options.max_bad,
    ]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()


def load(folder: Path | None, key: str | None) -> tuple[EncodedExamples, DataReport] | None:
    """The data of that name; None where there is none that is whole."""
    if folder is None or key is None:
        return None
    path = folder / f"{key}.safetensors"
    try:
        with safe_open(path, framework="np") as file:
            fields = json.loads(file.metadata()["report"])
            fields |= {name: tuple(fields[name]) for name in ("bad_records", "unread")}
            report = DataReport(**fields)
            ids, starts = array("i"), array("q")
            ids.frombytes(file.get_tensor("ids").astype(np.int32).tobytes())
            starts.frombytes(file.get_tensor("starts").astype(np.int64).tobytes())
            learned, places = (bytearray(file.get_tensor(name).tobytes()) for name in ("learned", "places"))
            examples = EncodedExamples(ids, learned, starts, places)
        if starts[-1] != len(ids) or len(learned) != len(ids) or places.count(b"\n") != len(examples):
            return None
        if examples.digest() != report.token_digest:
            return None
        os.utime(path)
    except (OSError, SafetensorError, ValueError, TypeError, LookupError):
        return None
    return examples, report


def save(folder: Path | None, key: str | None, examples: EncodedExamples, report: DataReport) -> None:
    """Keep data under that name, whole or not at all, and the folder within its limit."""
    if folder is None or key is None:
        return
    with contextlib.suppress(OSError, SafetensorError):
        save_examples(examples, folder / f"{key}.safetensors", report=json.dumps(dataclasses.asdict(report)))
    with contextlib.suppress(OSError):
        shrink(folder, LIMIT_BYTES)


def shrink(folder: Path, limit: int) -> None:
    """Delete what was not used for longest until the folder's data is within `limit` bytes."""
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for path in files:
        total += path.stat().st_size
        if total > limit:
            path.unlink(missing_ok=True)
