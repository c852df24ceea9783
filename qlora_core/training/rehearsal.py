"""The rehearsal: a run's largest micro-batch in its first minute, so that what will not fit is known by then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora_core.training.examples import Rows
from qlora_core.training.sampling import micro_batches


def largest_micro_batch(rows: Rows, total_steps: int, micro_batch: int) -> list[int]:
    """The rows of the micro-batch, over a whole run, with most positions, and among those with most learned tokens."""

    def size(batch: list[int]) -> tuple[int, int]:
        return rows.lengths[batch[0]] * len(batch), sum(rows.learned[row] for row in batch)

    # of each step the first: it has the step's longest rows
    return max(
        (
            micro_batches(rows.order.step(step), rows.lengths, rank=0, world_size=1, micro_batch=micro_batch)[0]
            for step in range(total_steps)
        ),
        key=size,
    )


@contextmanager
def same_random_numbers_afterwards(device: torch.device) -> Iterator[None]:
    """What is drawn inside, for dropout and for noise, is drawn once more by what follows."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
