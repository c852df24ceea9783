"""Examples as a worker has them: a file of tokens that it maps, its rows, and the batches made from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open

from qlora_core.recipe import Recipe
from qlora_core.training.layout import lay_out
from qlora_core.training.sampling import Order, micro_batches

IGNORED = -100
"""Label of a token that is not learned, as in transformers."""
Batch = Mapping[str, torch.Tensor]
"""A micro-batch: what `SummedLoss` is called with."""


class Examples(Sequence[tuple[torch.Tensor, torch.Tensor]]):
    """Examples of a file that `save_examples` wrote, memory-mapped: (ids, learned) by index.

    Attributes:
        lengths: tokens of each example.
        learned: tokens with a loss of each example.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            # as NumPy has them: a tensor that is cut out of another holds all of that, which a StorageMeter would count
            ids, learned, places = (file.get_tensor(name).numpy() for name in ("ids", "learned", "places"))
            self._starts: list[int] = file.get_tensor("starts").tolist()
        self._ids, self._learned, self._places = ids, learned.view(bool), places
        spans = list(pairwise(self._starts))
        self.lengths = [end - start for start, end in spans]
        # the first token of an example is never predicted
        self.learned = [int(self._learned[start + 1 : end].sum()) for start, end in spans]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        span = slice(self._starts[index], self._starts[index + 1])
        return torch.from_numpy(self._ids[span].astype("int64")), torch.from_numpy(self._learned[span])

    def places(self, indexes: Sequence[int]) -> list[str]:
        """Where in the data these examples stand, or else their numbers; asked for after a failure."""
        lines = self._places.tobytes().split(b"\n")
        return [lines[index].decode() or f"number {index + 1}" for index in indexes]

    def batch(self, indexes: Sequence[int], pad_token: int, device: torch.device) -> Batch:
        """The examples of a micro-batch as [B, S] tensors, padded on the right to its longest.

        There is no attention mask: no token attends to what comes after it, and padding has no label. With one,
        transformers would leave flash attention, and keep grouped keys and values as copies for all heads.
        """
        width = max(self.lengths[index] for index in indexes)
        ids_BS = torch.full((len(indexes), width), pad_token)
        labels_BS = torch.full((len(indexes), width), IGNORED)
        for row, index in enumerate(indexes):
            ids, learned = self[index]
            ids_BS[row, : len(ids)] = ids
            labels_BS[row, : len(ids)] = torch.where(learned, ids, IGNORED)
        return {"input_ids_BS": ids_BS.to(device), "labels_BS": labels_BS.to(device)}


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
        """The rows of the micro-batch, over a whole run, with most positions."""

        def size(batch: list[int]) -> int:
            return self.lengths[batch[0]] * len(batch)

        # of each step the first: it has the step's longest rows
        return max(
            (
                micro_batches(self.order.step(step), self.lengths, rank=0, world_size=1, micro_batch=micro_batch)[0]
                for step in range(total_steps)
            ),
            key=size,
        )

    def positions(self, rows: Sequence[int], micro_batch: int) -> int:
        """Of a step with these rows, over all ranks: their tokens, and the padding that `batch` adds to them."""
        batches = micro_batches(rows, self.lengths, rank=0, world_size=1, micro_batch=micro_batch)
        return sum(self.lengths[batch[0]] * len(batch) for batch in batches)

    def batch(self, rows: Sequence[int], pad_token: int, device: torch.device) -> Batch:
        """The rows of a micro-batch as [B, S] tensors, padded on the right to its longest.

        Packed rows have positions that begin anew with each example: by these transformers tells examples apart
        (masking_utils.py, find_packed_sequence_indices), in padding too.
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
            "position_ids_BS": positions_BS.to(device),
            "labels_BS": labels_BS.to(device),
        }


def iterate_eval_batches(count: int, *, rank: int, world_size: int, micro_batch: int) -> Iterator[list[int]]:
    """Batches of evaluation examples for one rank; all ranks get the same number of batches, some perhaps empty."""
    per_round = world_size * micro_batch
    for start in range(0, count, per_round):
        first = start + rank * micro_batch
        yield list(range(first, min(first + micro_batch, count)))
