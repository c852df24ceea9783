"""Which rows a step trains on. It depends on the seed and the step alone, never on how many workers there are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

MEGABATCH_STEPS = 50
"""Steps whose rows are sorted together by length, as in transformers' LengthGroupedSampler (trainer_pt_utils.py)."""


class Order:
    """The order of a run's rows: shuffled anew in every epoch, or grouped by length.

    Epochs follow each other without a gap: a step may hold the end of one and the beginning of the next.

    Args:
        lengths: tokens of each row.
        per_step: rows of one optimizer step, over all ranks and micro-batches.
        grouped: put rows of alike length into one step.
    """

    def __init__(self, lengths: Sequence[int], per_step: int, seed: int, grouped: bool = False) -> None:
        self._lengths, self._per_step, self._seed, self._grouped = lengths, per_step, seed, grouped
        self._epoch = lru_cache(maxsize=2)(self.epoch)

    def step(self, step: int) -> list[int]:
        """The rows of optimizer step `step`, from 0."""
        rows, first = len(self._lengths), step * self._per_step
        return [self._epoch(position // rows)[position % rows] for position in range(first, first + self._per_step)]

    def epoch(self, epoch: int) -> list[int]:
        """The order of all rows in one epoch."""
        order = list(range(len(self._lengths)))
        shuffle = random.Random(f"order/{self._seed}/{epoch}").shuffle
        shuffle(order)
        if not self._grouped:
            return order
        # Rows are cut into steps where the steps really begin, and the steps shuffled: sorted by length, the long rows
        # would all come at the beginning of a megabatch, and with them the high losses.
        per_step = self._per_step
        lead = min(-epoch * len(order) % per_step, len(order))
        steps: list[list[int]] = []
        for start in range(lead, len(order), per_step * MEGABATCH_STEPS):
            megabatch = order[start : start + per_step * MEGABATCH_STEPS]
            megabatch.sort(key=lambda row: -self._lengths[row])
            steps += [megabatch[first : first + per_step] for first in range(0, len(megabatch), per_step)]
        rest = [steps.pop()] if steps and len(steps[-1]) < per_step else []
        shuffle(steps)
        return order[:lead] + [row for rows in [*steps, *rest] for row in rows]


def split_eval(records: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indexes of examples for training and for evaluation, ascending; evaluation gets at least one of two records.

    Args:
        records: the record that each example is from, whose examples share text: they are kept together.
        fraction: of the records that are held out.
    """
    order = list(dict.fromkeys(records))
    random.Random(f"split/{seed}").shuffle(order)
    held_out = set(order[: held_out_of(len(order), fraction)])
    indexes = range(len(records))
    return [at for at in indexes if records[at] not in held_out], [at for at in indexes if records[at] in held_out]


def held_out_of(records: int, fraction: float) -> int:
    """How many of so many records are held out: none, or at least one, and never all."""
    return min(records - 1, max(1, round(records * fraction))) if fraction and records > 1 else 0


def repeated(indexes: Sequence[int], times: float, seed: str) -> list[int]:
    """`indexes` so often. What a whole number leaves over is drawn by the seed; there is at least one in the end."""
    rounds = int(times)
    part = max(0 if rounds else 1, round(len(indexes) * (times - rounds)))
    drawn = random.Random(seed).sample(range(len(indexes)), part)
    return [*indexes] * rounds + [indexes[at] for at in sorted(drawn)]


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int], *, rank: int, world_size: int, micro_batch: int
) -> list[list[int]]:
    """The micro-batches of one rank for one optimizer step, the longest first.

    Inside a step the order is free, since its gradient is a sum. Sorting by length puts alike lengths into one
    micro-batch (less padding), gives all ranks alike work, and meets the step's memory peak at once.

    Args:
        rows: those of the step.
        lengths: tokens of each row of the run, by index.
    """
    ordered = sorted(rows, key=lambda row: (-lengths[row], row))
    chunks = [ordered[start : start + micro_batch] for start in range(0, len(ordered), micro_batch)]
    return chunks[rank::world_size]
