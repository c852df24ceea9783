"""Reserved memory: the segments PyTorch's caching allocator needs for what a step allocates.

The allocator (c10/cuda/CUDACachingAllocator.cpp) takes memory from the driver in segments and keeps them: requests up
to 1 MiB share segments of 2 MiB, those below 10 MiB segments of 20 MiB, larger ones get a segment of their own in
multiples of 2 MiB. A free block serves any request that fits, and the rest of it later ones; but blocks of different
segments never join. Reserved memory is more than allocated memory because early requests make segments too small for
later ones: the forward pass of a layer leaves blocks of a layer's size, into which the loss's logits do not fit.

The model follows exactly that. The segments are grown over the few moments of a step at which
memory can peak, in their order (layers forward, loss, loss backward, last layer backward). From one moment to the next,
what has died leaves its segment, and what has come is placed, in its order, into the segment with the least room that
holds it, those of the loaded weights among them; what finds none gets a new segment. Two things that come in between
make early segments useless. Checkpoints come when a layer has ended, into what it has left, and the next layer needs
that again. And the last chunk of the loss, which is the smallest, is the first of the backward pass. What the model
leaves out is that the room in a segment may be in several pieces, so what it finds is nearly always too low.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from qlora_core.memory.allocator import LARGE_SEGMENT, OWN_SEGMENT, SMALL, SMALL_SEGMENT, segment_for
from qlora_core.memory.step import Scene, highest
from qlora_core.memory.tape import Size, value
from qlora_core.strategy import Strategy

PLACES = 1 << 20
"""More than there are segments: what is free in a segment, times this, plus the segment's place sort as one number."""


class Fragmentation(NamedTuple):
    """By how much reserved memory exceeds what the model above finds, in thousandths.

    Of the geometric mean of what is allocated and what of it a step brings: what stays all the time is never in the
    way, and the less there is of it, the more a step finds room in its own segments. Between `low` and `high` lie nine
    of ten cases, and `typical` is their median: of the traces of benchmarks/accuracy/grid.py, which tests/test_trace.py
    holds these against.
    """

    low: int
    typical: int
    high: int


CHECKPOINTED = Fragmentation(-5, 45, 220)
KEPT = Fragmentation(-20, 10, 70)
"""Without gradient checkpointing, where most of what a step allocates stays to the backward pass."""


def fragments(strategy: Strategy, allocated: int, varying: int) -> tuple[int, int, int]:
    """How many bytes more than `grown` finds may be reserved: the least, what is typical, the most."""
    scale = math.isqrt(allocated * max(varying, 0))
    low, typical, high = CHECKPOINTED if strategy.gradient_checkpointing else KEPT
    return scale * low // 1000, scale * typical // 1000, scale * high // 1000


class Segments:
    """Segments of large blocks. That the room in one may be in several pieces is left out.

    Attributes:
        taken: bytes of those that were not there before.

    Args:
        holes: what is free in those that were.
    """

    def __init__(self, holes: Iterable[int]) -> None:
        self.taken = 0
        self._left = list(holes)
        self._room: list[int] = []
        self._placed: dict[int, tuple[int, int]] = {}
        self._look_for_room()

    def hold(self, tensors: dict[int, int]) -> None:
        """These and no others, in the order in which they came: bytes by number."""
        left, room, placed = self._left, self._room, self._placed
        if gone := placed.keys() - tensors.keys():
            for number in gone:
                size, place = placed.pop(number)
                left[place] += size
            self._look_for_room()
        for number, size in tensors.items():
            if number in placed:
                continue
            if room and room[-1] >= size * PLACES:
                place = room.pop(bisect_left(room, size * PLACES)) % PLACES
                rest = left[place] - size
                left[place] = rest
            else:
                segment, place = segment_for(size), len(left)
                self.taken += segment
                rest = segment - size
                left.append(rest)
            if rest > SMALL:
                insort(room, rest * PLACES + place)
            placed[number] = size, place

    def keep(self, size: int, count: int) -> None:
        """Tensors of `size` bytes, for good."""
        left, room = self._left, self._room
        while count and size > SMALL and room and room[-1] >= size * PLACES:
            place = room.pop(bisect_left(room, size * PLACES)) % PLACES
            some = min(left[place] // size, count)
            left[place] -= some * size
            insort(room, left[place] * PLACES + place)
            count -= some
        self.taken += packed([(size, count)])

    def _look_for_room(self) -> None:
        self._room[:] = sorted([free * PLACES + place for place, free in enumerate(self._left) if free > SMALL])


def grown(
    stretches: Sequence[Sequence[Scene]],
    variables: Sequence[int],
    holes: Iterable[int],
    kept: Sequence[tuple[int, int]],
    checkpointing: bool,
    last_chunk: int,
) -> int:
    """Bytes of the segments that a step adds to those that are there before.

    Args:
        stretches: what the step passes: layers, loss, loss backward, last layer backward; sizes are polynomials in
            `variables`.
        variables: their values.
        holes: what is free in segments before.
        kept: what the layers in between keep, as bytes of one and how many.
        checkpointing: these are checkpoints.
        last_chunk: tokens of the last chunk of the loss, if it is smaller than others; 0 otherwise.
    """
    layers, loss, loss_backward, last_layer = (highest(stretch, variables).alive for stretch in stretches)
    segments = Segments(holes)
    layer = _large(layers, variables)
    segments.hold(layer)
    if checkpointing:
        segments.hold({})  # they come between two layers, into room that the next one then lacks
    for size, count in kept:
        segments.keep(size, count)
    segments.hold(layer)
    segments.hold(_large(loss, variables))
    if last_chunk:
        # it is the first of the backward pass, and makes segments into which the others do not fit
        segments.hold(_large(loss_backward, (*variables[:-1], last_chunk)))
        segments.hold({})
    segments.hold(_large(loss_backward, variables))
    segments.hold(_large(last_layer, variables))
    return segments.taken


def _large(alive: dict[int, Size], variables: Sequence[int]) -> dict[int, int]:
    """Bytes of those that lie in segments of large blocks."""
    sizes = ((number, value(size, variables)) for number, size in alive.items())
    return {number: size for number, size in sizes if size > SMALL}


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


def slack(sizes: Sequence[tuple[int, int]]) -> int:
    """Bytes that those tensors' blocks are too large: what is left of a segment goes with its last, up to 1 MiB."""
    total = 0
    for size, count in sizes:
        if size > SMALL:
            alike = 1 if size >= OWN_SEGMENT else LARGE_SEGMENT // size
            left = segment_for(size) - alike * size
            if left <= SMALL:
                total += left * (count // alike)
    return total
