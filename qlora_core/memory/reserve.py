"""Reserved memory: the segments PyTorch's caching allocator needs for what a step allocates.

The allocator (c10/cuda/CUDACachingAllocator.cpp) takes memory from the driver in segments and keeps them: requests up
to 1 MiB share segments of 2 MiB, those below 10 MiB segments of 20 MiB, larger ones get a segment of their own in
multiples of 2 MiB. A free block serves any request that fits, and the rest of it later ones; but blocks of different
segments never join. Reserved memory is more than allocated memory because early requests make segments too small for
later ones: the forward pass of a layer leaves blocks of a layer's size, into which the loss's logits do not fit.

The model follows exactly that. The segments are grown over the few moments of a step at which
memory can peak, in their order (layers forward, loss, loss backward, last layer backward). From one moment to the next,
what has died leaves its segment, and what has come is placed, largest first, into the segment with the least room that
holds it; what finds none gets a new segment. What it leaves out is that the room in a segment may be in several pieces:
where many sizes mix (eager attention), reserved memory comes out too low.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qlora_core.memory.allocator import LARGE_SEGMENT, OWN_SEGMENT, SMALL, SMALL_SEGMENT, segment_for
from qlora_core.memory.attention import AttentionKernel
from qlora_core.memory.step import Stretches
from qlora_core.strategy import Strategy

PLACES = 1 << 20
"""More than there are segments: what is free in a segment, times this, plus the segment's place sort as one number."""


class Fragmentation(NamedTuple):
    """By how much reserved memory exceeds what the model above finds, in thousandths of what a step allocates.

    Between `low` and `high` lie nine of ten cases, and `typical` is their median: of the traces of
    benchmarks/accuracy/grid.py, which tests/test_trace.py holds these against.
    """

    low: int
    typical: int
    high: int


FRAGMENTATION: dict[AttentionKernel, Fragmentation] = {
    "eager": Fragmentation(-50, 100, 340),
    "flash": Fragmentation(10, 130, 390),
    "efficient": Fragmentation(-710, 50, 300),
    "masked": Fragmentation(0, 190, 730),
    "math": Fragmentation(-210, 20, 340),
}
KEPT = Fragmentation(0, 20, 120)
"""Without gradient checkpointing, where most of what a step allocates stays to the backward pass."""


def fragmentation(kernel: AttentionKernel, strategy: Strategy) -> Fragmentation:
    """How far reserved memory may be from what `grown` finds."""
    return FRAGMENTATION[kernel] if strategy.gradient_checkpointing else KEPT


def grown(stretches: Stretches, variables: Sequence[int], empty: Iterable[int]) -> int:
    """Bytes of all segments after the highest scene of each stretch; `empty` segments are there before.

    Sizes are polynomials in `variables`.
    """
    _, positions, tokens, scores, chunk = variables
    left = list(empty)
    total = sum(left)
    room = sorted(free * PLACES + place for place, free in enumerate(left) if free > SMALL)
    placed: dict[int, tuple[int, int]] = {}
    for gone, come in stretches.turns(variables):
        for number in gone:
            if number not in placed:  # small
                continue
            size, place = placed.pop(number)
            free = left[place]
            if free > SMALL:
                room.remove(free * PLACES + place)
            left[place] = free + size
            room.append((free + size) * PLACES + place)
        room.sort()
        arrivals: dict[int, tuple[int, ...]] = {}
        for (a, b, c, d, e), numbers in come:
            size = a + b * positions + c * tokens + d * scores + e * chunk
            if size > SMALL:
                if size in arrivals:
                    numbers = tuple(sorted((*numbers, *arrivals[size]), reverse=True))
                arrivals[size] = numbers
        for size in sorted(arrivals, reverse=True):
            needed, segment = size * PLACES, segment_for(size)
            for number in arrivals[size]:
                if room and room[-1] >= needed:
                    free, place = divmod(room.pop(bisect_left(room, needed)) - needed, PLACES)
                    left[place] = free
                else:
                    free, place = segment - size, len(left)
                    total += segment
                    left.append(free)
                if free > SMALL:
                    insort(room, free * PLACES + place)
                placed[number] = size, place
    return total


def packed(sizes: Sequence[tuple[int, int]]) -> int:
    """Bytes of the segments of long-lived tensors (bytes of one, how many), each size in segments of its own."""
    total = small = 0
    for size, count in sizes:
        if size <= SMALL:
            small += -(-size // 512) * 512 * count
        elif size >= OWN_SEGMENT:
            total += segment_for(size) * count
        else:
            total += -(-count // (LARGE_SEGMENT // size)) * LARGE_SEGMENT
    return total + -(-small // SMALL_SEGMENT) * SMALL_SEGMENT
