"""Examples as tokens: one safetensors file that every worker maps, its rows, and the batches made from them."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qlora_core.files import replace_atomically
from qlora_core.recipe import Recipe
from qlora_core.training.layout import lay_out
from qlora_core.training.sampling import Order, micro_batches

IGNORED = -100
"""Label of a token that is not learned, as in transformers."""
Batch = Mapping[str, torch.Tensor | None]
"""A micro-batch: what `SummedLoss` is called with."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example: token ids, which of them are learned, and where in the data it stands, in words."""

    ids: list[int]
    learned: list[bool]
    place: str = field(default="", compare=False)


def save_examples(examples: Sequence[Encoded], path: Path) -> None:
    """Write examples as one safetensors file.

    It has ids [T] int32, learned [T] uint8, starts [N + 1] int64, and places [P] uint8, each ended by a line's end.
    """
    ids, learned, starts = array("i"), bytearray(), [0]  # five bytes a token, where lists of numbers take forty
    places = bytearray()
    for example in examples:
        ids.extend(example.ids)
        learned += bytes(example.learned)
        starts.append(len(ids))
        places += as_line(example.place)
    tensors = {
        "ids": _flat(ids, torch.int32),
        "learned": _flat(learned, torch.uint8),
        "starts": torch.tensor(starts, dtype=torch.int64),
        "places": _flat(places, torch.uint8),
    }
    with replace_atomically(path) as temporary:
        save_file(tensors, temporary)


def _flat(values: array[int] | bytearray, dtype: torch.dtype) -> torch.Tensor:
    """Values as a tensor over the same memory; torch makes none of an empty buffer."""
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


def as_line(place: str) -> bytes:
    """A place as one line of many."""
    return " ".join(place.splitlines()).encode(errors="replace") + b"\n"


class Examples(Sequence[tuple[torch.Tensor, torch.Tensor]]):
    """Examples of a file that `save_examples` wrote, memory-mapped: (ids, learned) by index.

    Attributes:
        lengths: tokens of each example.
        learned: tokens with a loss of each example.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self._ids, self._learned = file.get_tensor("ids"), file.get_tensor("learned").bool()
            self._starts: list[int] = file.get_tensor("starts").tolist()
            self._places = file.get_tensor("places")
        self.lengths = [end - start for start, end in zip(self._starts, self._starts[1:], strict=False)]
        # the first token of an example is never predicted
        self.learned = [int(self[index][1][1:].sum()) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        span = slice(self._starts[index], self._starts[index + 1])
        return self._ids[span].long(), self._learned[span]

    def places(self, indexes: Sequence[int]) -> list[str]:
        """Where in the data these examples stand, or else their numbers; asked for after a failure."""
        lines = self._places.numpy().tobytes().split(b"\n")
        return [lines[index].decode() or f"number {index + 1}" for index in indexes]

    def batch(self, indexes: Sequence[int], pad_token: int, device: torch.device) -> Batch:
        """The examples of a micro-batch as [B, S] tensors, padded on the right to its longest."""
        width = max(self.lengths[index] for index in indexes)
        ids_BS = torch.full((len(indexes), width), pad_token)
        mask_BS = torch.zeros((len(indexes), width), dtype=torch.long)
        labels_BS = torch.full((len(indexes), width), IGNORED)
        for row, index in enumerate(indexes):
            ids, learned = self[index]
            ids_BS[row, : len(ids)] = ids
            mask_BS[row, : len(ids)] = 1
            labels_BS[row, : len(ids)] = torch.where(learned, ids, IGNORED)
        return {
            "input_ids_BS": ids_BS.to(device),
            "attention_mask_BS": mask_BS.to(device),
            "labels_BS": labels_BS.to(device),
        }


class Rows:
    """What training batches are made of: the examples of a file one by one, or packed into rows (see `layout`).

    Attributes:
        members: the examples of each row, by their indexes.
        lengths: tokens of each row.
        learned: tokens with a loss of each row.
        order: in which steps see them.
    """

    def __init__(self, examples: Examples, recipe: Recipe, seed: int) -> None:
        self._examples, self._packed = examples, recipe.packing
        layout = lay_out(examples.lengths, recipe)
        self.members, self.lengths = layout.rows, layout.lengths
        self.learned = [sum(examples.learned[index] for index in row) for row in layout.rows]
        self.order = Order(self.lengths, recipe.sequences_per_step, seed, recipe.group_by_length)

    def __len__(self) -> int:
        return len(self.members)

    def example(self, index: int) -> torch.Tensor:
        """The tokens of an example, [S]."""
        return cast(torch.Tensor, self._examples[index][0])

    def places(self, indexes: Sequence[int]) -> list[str]:
        """Where in the data these examples stand."""
        return self._examples.places(indexes)

    def largest_micro_batch(self, total_steps: int, micro_batch: int) -> list[int]:
        """The rows of the micro-batch, over a whole run, with most positions, and among those with most to learn."""

        def size(batch: list[int]) -> tuple[int, int]:
            return self.lengths[batch[0]] * len(batch), sum(self.learned[row] for row in batch)

        # of each step the first: it has the step's longest rows
        return max(
            (
                micro_batches(self.order.step(step), self.lengths, rank=0, world_size=1, micro_batch=micro_batch)[0]
                for step in range(total_steps)
            ),
            key=size,
        )

    def batch(self, rows: Sequence[int], pad_token: int, device: torch.device) -> Batch:
        """The rows of a micro-batch as [B, S] tensors, padded on the right to its longest.

        Packed rows have positions that begin anew with each example instead of an attention mask: by these
        transformers tells examples apart (masking_utils.py, find_packed_sequence_indices), in padding too.
        """
        if not self._packed:
            return self._examples.batch([self.members[row][0] for row in rows], pad_token, device)
        width = max(self.lengths[row] for row in rows)
        ids_BS = torch.full((len(rows), width), pad_token)
        positions_BS = torch.zeros((len(rows), width), dtype=torch.long)
        labels_BS = torch.full((len(rows), width), IGNORED)
        for place, row in enumerate(rows):
            start = 0
            for index in self.members[row]:
                ids, learned = self._examples[index]
                span = slice(start, start + len(ids))
                ids_BS[place, span] = ids
                positions_BS[place, span] = torch.arange(len(ids))
                labels_BS[place, span] = torch.where(learned, ids, IGNORED)
                labels_BS[place, start] = IGNORED  # before it stands another example
                start += len(ids)
            positions_BS[place, start:] = torch.arange(width - start)
        return {
            "input_ids_BS": ids_BS.to(device),
            "attention_mask_BS": None,
            "position_ids_BS": positions_BS.to(device),
            "labels_BS": labels_BS.to(device),
        }


def iterate_eval_batches(count: int, *, rank: int, world_size: int, micro_batch: int) -> Iterator[list[int]]:
    """Batches of evaluation examples for one rank; all ranks get the same number of batches, some perhaps empty."""
    per_round = world_size * micro_batch
    for start in range(0, count, per_round):
        first = start + rank * micro_batch
        yield list(range(first, min(first + micro_batch, count)))
