"""A few examples as people read them: their text, in parts that are learned and parts that are not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from qlora_core.training.dataset.tokens import Encoded

SAMPLES = 3


class Part(TypedDict):
    """Tokens in a row that all have a loss, or of which none has, as text."""

    text: str
    learned: bool


class Shown(TypedDict):
    """An example: its number among `of`, its tokens, and its parts in order."""

    number: int
    of: int
    tokens: int
    parts: list[Part]


def chosen(examples: int) -> list[int]:
    """The indexes of the samples: from the data's beginning, middle and end."""
    return sorted({index * (examples - 1) // max(1, SAMPLES - 1) for index in range(SAMPLES)}) if examples else []


def with_loss(example: Encoded) -> list[bool]:
    """Which of its tokens have a loss: nothing stands before the first to predict it from."""
    return [False, *example.learned[1:]]


def samples(examples: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> list[Shown]:
    """Some of the examples, decoded."""
    found: list[Shown] = []
    for index in chosen(len(examples)):
        example = examples[index]
        runs = groupby(zip(example.ids, with_loss(example), strict=True), key=lambda pair: pair[1])
        parts = [
            Part(text=str(tokenizer.decode([token for token, _ in run])), learned=learned) for learned, run in runs
        ]
        found.append(Shown(number=index + 1, of=len(examples), tokens=len(example.ids), parts=parts))
    return found
