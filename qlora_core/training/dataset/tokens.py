"""Encoded examples in flat arrays: five bytes a token, however many there are."""

from __future__ import annotations

import hashlib
import io
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from qlora_core.files import replace_atomically


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example: token ids, which of them are learned, and where in the data it stands, in words."""

    ids: list[int]
    learned: list[bool]
    place: str = field(default="", compare=False)


class EncodedExamples(Sequence[Encoded]):
    """Examples as ids [T] int32 and learned [T] uint8, of all examples one after the other, and starts [N + 1].

    Attributes:
        ids, learned, starts: the arrays, shared by all selections of them.
        places: where each stands in the data, a line each, shared likewise.
    """

    def __init__(
        self,
        ids: array[int],
        learned: bytearray,
        starts: array[int],
        places: bytearray,
        order: Sequence[int] | None = None,
    ) -> None:
        self.ids, self.learned, self.starts, self.places = ids, learned, starts, places
        self._order: Sequence[int] = range(len(starts) - 1) if order is None else order

    @classmethod
    def of(cls, examples: Iterable[Encoded] = ()) -> EncodedExamples:
        """These, to which `append` adds."""
        flat = cls(array("i"), bytearray(), array("q", [0]), bytearray())
        for example in examples:
            flat.append(example.ids, bytes(example.learned), example.place)
        return flat

    def append(self, ids: Sequence[int], learned: bytes, place: str) -> None:
        """One more example."""
        self.places += " ".join(place.splitlines()).encode(errors="replace") + b"\n"
        self.ids.extend(ids)
        self.learned += learned
        self.starts.append(len(self.ids))
        self._order = range(len(self.starts) - 1)

    def select(self, indexes: Sequence[int]) -> EncodedExamples:
        """The examples at `indexes`, in that order, without copying a token."""
        order = array("q", (self._order[i] for i in indexes))
        return EncodedExamples(self.ids, self.learned, self.starts, self.places, order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        span = self._span(index)
        place = self._lines[self._order[index]].decode()
        return Encoded(self.ids[span].tolist(), [bool(flag) for flag in self.learned[span]], place)

    @cached_property
    def _lines(self) -> list[bytes]:
        """The places; asked for when all are there."""
        return bytes(self.places).split(b"\n")

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [self.starts[at + 1] - self.starts[at] for at in self._order]

    def records(self) -> list[int]:
        """The record that each example is from, by number; the examples of one are appended one after the other."""
        numbers, before = array("q"), b""
        for line in io.BytesIO(self.places):
            last = numbers[-1] if numbers else -1
            numbers.append(last if line == before != b"\n" else last + 1)
            before = line
        return [numbers[at] for at in self._order]

    def is_whole(self) -> bool:
        """Whether it is all that was appended, in that order."""
        return len(self) == len(self.starts) - 1 and all(index == at for index, at in enumerate(self._order))

    def learned_count(self) -> int:
        """Tokens with a loss: all learned but the first of an example, which nothing predicts."""
        flags = np.frombuffer(self.learned, dtype=np.uint8)
        return sum(int(flags[self.starts[at] + 1 : self.starts[at + 1]].sum()) for at in self._order)

    def highest(self) -> int:
        """The highest token id."""
        return int(np.frombuffer(self.ids, dtype=np.int32).max())

    def digest(self) -> str:
        """SHA-256 over all ids and which of them are learned, as hexadecimal digits."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            span = self._span(index)
            wide = np.frombuffer(self.ids, dtype=np.int32)[span].astype("<i8")
            digest.update(wide.tobytes() + bytes(self.learned[span]) + b"|")
        return digest.hexdigest()

    def _span(self, index: int) -> slice:
        at = self._order[index]
        return slice(self.starts[at], self.starts[at + 1])


def save_examples(examples: Sequence[Encoded], path: Path, **facts: str) -> None:
    """Write examples as one safetensors file, with `facts` as its metadata.

    It has ids [T] int32, learned [T] uint8, starts [N + 1] int64, and places [P] uint8, each ended by a line's end.
    """
    flat = examples if isinstance(examples, EncodedExamples) else EncodedExamples.of(examples)
    if not flat.is_whole():
        flat = EncodedExamples.of(flat)
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "ids": np.frombuffer(flat.ids, dtype=np.int32),
        "learned": np.frombuffer(flat.learned, dtype=np.uint8),
        "starts": np.frombuffer(flat.starts, dtype=np.int64),
        "places": np.frombuffer(flat.places, dtype=np.uint8),
    }
    with replace_atomically(path) as temporary:
        save_file(tensors, temporary, metadata=facts or None)
