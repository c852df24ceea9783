"""What a request for data may say besides its path and format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from qlora_core.data import Learn


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How data is read and learned from.

    Attributes:
        learn: assistant: every answer; completion: the last one; all: every token; auto: assistant, and for text all.
        columns: the data's own names of columns, by the names that a format has for them.
        split: of a folder, a dataset on disk or of the Hub; None is train, where there are any.
        config: of a dataset of the Hub: its subset.
        files: a glob, of a folder or a dataset of the Hub: what is read of it.
        revision: of a dataset of the Hub; None is that of its default branch.
        max_bad: records that may be left out as bad: how many, or below 1 the fraction.
        day: what a chat template that writes the date is told; None is today.
        vocab_size: rows of the model's embedding, which no token id may pass; None is not known.
        cache: the folder of encoded data; None keeps nothing.
    """

    learn: Learn = "auto"
    columns: Mapping[str, str] | None = None
    split: str | None = None
    config: str | None = None
    files: str | None = None
    revision: str | None = None
    max_bad: float = 0
    day: date | None = None
    vocab_size: int | None = None
    cache: Path | None = None

    @property
    def wanted_split(self) -> str:
        """The split that is read where the data has any."""
        return self.split or "train"
