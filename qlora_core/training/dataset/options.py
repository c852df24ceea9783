"""What a request for data may say besides its path and format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Learn = Literal["auto", "assistant", "completion", "all"]


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How data is read and learned from.

    Attributes:
        learn: assistant: every answer; completion: the last one; all: every token; auto: assistant, and for text all.
        split: of a folder whose files are named by splits, or of a dataset on disk.
        max_bad: records that may be left out as bad: how many, or below 1 the fraction.
        vocab_size: rows of the model's embedding, which no token id may pass; None is not known.
    """

    learn: Learn = "auto"
    split: str = "train"
    max_bad: float = 0
    vocab_size: int | None = None
