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

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from qlora_core.memory.allocator import LARGE_SEGMENT, OWN_SEGMENT, ROUNDING, SMALL, SMALL_SEGMENT, segment_for
from qlora_core.memory.tape import Size, value
from qlora_core.memory.timeline import Scene, Stretches, highest

PLACES = 1 << 20
"""More than there are segments: what is free in a segment, times this, plus the segment's place sort as one number."""
SMALL_ROOM = SMALL * PLACES + PLACES - 1
"""The most of such a number with which a segment is full: large blocks are never smaller."""


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


CHECKPOINTED = Fragmentation(-15, 50, 195)
KEPT = Fragmentation(-25, 10, 65)
"""Without gradient checkpointing, where most of what a step allocates stays to the backward pass."""
PLAYED = Fragmentation(-20, 0, 29)
"""By how much it exceeds what `played.py` finds instead, in thousandths of that."""


class Turn(NamedTuple):
    """What goes from one moment to the next, and then what comes, in its order.

    Each is a tensor, and the place of its size among a script's.
    """

    gone: tuple[tuple[int, int], ...]
    come: tuple[tuple[int, int], ...]


class Script(NamedTuple):
    """The moments of a step, for one choice of the highest scenes.

    Attributes:
        sizes: of all tensors, polynomials whose values are bytes times `PLACES`.
        of_last_chunk: sizes of the last chunk of the loss come behind those: each as the place of what it is elsewhere,
            and what a token of a chunk takes of it.
        before, after: turns up to what the layers in between keep, and from there.
        tensors: how many there are.
    """

    sizes: tuple[Size, ...]
    of_last_chunk: tuple[tuple[int, int], ...]
    before: tuple[Turn, ...]
    after: tuple[Turn, ...]
    tensors: int


class Growth:
    """The segments of large blocks that a step adds to those of the loaded weights.

    Args:
        stretches: what the step passes.
        kept: what the layers in between keep: the bytes of one, and how many.
        checkpointing: these are checkpoints.
        holes: what is free in the segments of the loaded weights.
    """

    def __init__(
        self, stretches: Stretches, kept: Sequence[tuple[Size, int]], checkpointing: bool, holes: Iterable[int]
    ) -> None:
        self._stretches, self._kept, self._checkpointing = stretches, kept, checkpointing
        self._left = [free * PLACES + place for place, free in enumerate(holes)]
        self._room = sorted(room for room in self._left if room > SMALL_ROOM)

    def kept(self, variables: Sequence[int]) -> list[tuple[int, int]]:
        """What the layers in between keep, where the polynomials' variables have these values."""
        return [(value(size, variables), count) for size, count in self._kept]

    def at(self, variables: Sequence[int], last_chunk: int) -> int:
        """Bytes, where the polynomials' variables have these values.

        The last chunk of a loss that is computed again in the backward pass has `last_chunk` tokens if it is smaller
        than others; 0 otherwise.
        """
        _, positions, tokens, scores, chunk = variables
        scenes = tuple([highest(scenes, variables) for scenes in self._stretches])
        script = _script(scenes, self._checkpointing, last_chunk > 0)
        sizes = [a + b * positions + c * tokens + d * scores + e * chunk for a, b, c, d, e in script.sizes]
        less = chunk - last_chunk
        sizes += [sizes[place] - less * of_token for place, of_token in script.of_last_chunk]
        segments = Segments(self._left, self._room, script.tensors)
        segments.play(script.before, sizes)
        for size, count in self.kept(variables):
            segments.keep(size, count)
        segments.play(script.after, sizes)
        return segments.taken


class Segments:
    """Segments of large blocks. That the room in one may be in several pieces is left out.

    Attributes:
        taken: bytes of those that were not there before.

    Args:
        left: what is free in those that were.
        room: those of them with room, by that.
        tensors: how many will be placed.
    """

    def __init__(self, left: Sequence[int], room: Sequence[int], tensors: int) -> None:
        self.taken = 0
        self._left, self._room = list(left), list(room)
        self._places = [0] * tensors

    def play(self, turns: Iterable[Turn], sizes: Sequence[int]) -> None:
        """Go through these moments."""
        left, room, places, taken = self._left, self._room, self._places, 0
        for gone, come in turns:
            for tensor, of in gone:
                size = sizes[of]
                if size > SMALL_ROOM:
                    place = places[tensor]
                    before = left[place]
                    if before > SMALL_ROOM:
                        del room[bisect_left(room, before)]
                    left[place] = after = before + size
                    insort(room, after)
            for tensor, of in come:
                size = sizes[of]
                if size <= SMALL_ROOM:
                    continue
                index = bisect_left(room, size)
                if index < len(room):
                    rest = room.pop(index) - size
                    places[tensor] = place = rest % PLACES
                    left[place] = rest
                else:
                    segment = segment_for(size // PLACES)
                    taken += segment
                    places[tensor] = place = len(left)
                    rest = segment * PLACES - size + place
                    left.append(rest)
                if rest > SMALL_ROOM:
                    insort(room, rest)
        self.taken += taken

    def keep(self, size: int, count: int) -> None:
        """Tensors of `size` bytes, for good."""
        if size > SMALL:
            left, room, needed = self._left, self._room, size * PLACES
            first = last = bisect_left(room, needed)
            rests = []
            while count and last < len(room):
                some = min(room[last] // needed, count)
                rest = room[last] - some * needed
                left[rest % PLACES] = rest
                if rest > SMALL_ROOM:
                    rests.append(rest)
                count -= some
                last += 1
            del room[first:last]
            for rest in rests:
                insort(room, rest)
        self.taken += packed([(size, count)])


@lru_cache(maxsize=256)
def _script(scenes: tuple[Scene, ...], checkpointing: bool, with_last_chunk: bool) -> Script:
    layers, loss, loss_backward, last_layer = (scene.alive for scene in scenes)
    tensors: dict[int, int] = {}
    places: dict[Size, int] = {}
    for number, size in ((number, size) for scene in scenes for number, size in scene.alive.items()):
        tensors.setdefault(number, len(tensors))
        places.setdefault(size.times(PLACES), len(places))
    of_last_chunk: dict[tuple[int, int], int] = {}
    alive: dict[int, int] = {}

    def turn(scene: dict[int, Size], last_chunk: bool = False) -> Turn:
        gone = tuple((tensors[number], alive.pop(number)) for number in [*alive] if number not in scene)
        come = []
        for number, size in scene.items():
            if number not in alive:
                of = places[size.times(PLACES)]
                if last_chunk and size.per_chunk_token:
                    of_token = size.per_chunk_token * PLACES
                    of = len(places) + of_last_chunk.setdefault((of, of_token), len(of_last_chunk))
                alive[number] = of
                come.append((tensors[number], of))
        return Turn(gone, tuple(come))

    # checkpoints come between two layers, into room that the next one then lacks
    before = [turn(layers), turn({})] if checkpointing else [turn(layers)]
    after = [turn(layers), turn(loss)]
    if with_last_chunk:
        # it is the first of the backward pass, and makes segments into which the others do not fit
        after += [turn(loss_backward, last_chunk=True), turn({})]
    after += [turn(loss_backward), turn(last_layer)]
    return Script(tuple(places), tuple(of_last_chunk), tuple(before), tuple(after), len(tensors))


def packed(sizes: Sequence[tuple[int, int]]) -> int:
    """Bytes of the segments of long-lived tensors (bytes of one, how many), each size in segments of its own."""
    total = small = 0
    for size, count in sizes:
        if size <= SMALL:
            small += -(-size // ROUNDING) * ROUNDING * count
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
