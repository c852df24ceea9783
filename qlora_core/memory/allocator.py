"""PyTorch's CUDA caching allocator as far as sizes go: what is allocated and reserved after each request and release.

Rules and constants are those of c10/cuda/CUDACachingAllocator.cpp and c10/core/AllocatorConfig.h (PyTorch 2.13):
requests are rounded up to 512 bytes; those up to 1 MiB share segments of 2 MiB, those below 10 MiB segments of 20 MiB,
larger ones get segments of their own in multiples of 2 MiB; the smallest free block that holds a request serves it;
what it leaves is split off, unless it is at most 1 MiB of a large block: then the block is handed out, and counted,
whole. Of blocks alike the one at the lowest address serves, and cudaMalloc's addresses fall: on the eager rows of
tests/data/measured/t4_single_gpu.json rising ones leave reserved memory 4 % too low, falling ones are right to 0.1 %.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass

from clusters.errors import request_error

MIB = 1024**2
ROUNDING = 512
"""kMinBlockSize."""
SMALL = 1 * MIB
"""kSmallSize: requests up to this are served from small segments, and what is left of a large block stays with it."""
SMALL_SEGMENT = 2 * MIB
"""kSmallBuffer; also the multiple that large segments are rounded to (kRoundLarge)."""
LARGE_SEGMENT = 20 * MIB
"""kLargeBuffer."""
OWN_SEGMENT = 10 * MIB
"""kMinLargeAlloc: requests from this on get a segment of their own."""
ENDLESS = 1 << 60
"""The address range behind an expandable segment."""


@dataclass(frozen=True, slots=True)
class AllocatorSettings:
    """What PYTORCH_ALLOC_CONF, or PYTORCH_CUDA_ALLOC_CONF, changes.

    Attributes:
        expandable_segments: one growing segment per pool instead of one for each request that finds no block.
        max_split_bytes: blocks above this are never split, and smaller requests never get one; None for no such limit.
    """

    expandable_segments: bool = False
    max_split_bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """The settings of a string such as "expandable_segments:True,max_split_size_mb:128".

        Raises:
            RequestError: an option that is not simulated, or a value that PyTorch would not take.
        """
        expandable, split = False, None
        for option in filter(None, text.replace(" ", "").split(",")):
            name, _, value = option.partition(":")
            if name == "expandable_segments" and value in ("True", "False"):
                expandable = value == "True"
            elif name == "max_split_size_mb" and value.isdigit() and int(value) * MIB > LARGE_SEGMENT:
                split = int(value) * MIB
            elif name == "max_split_size_mb":
                rule = "max_split_size_mb must be a whole number above 20"
                raise request_error("PYTORCH_ALLOC_CONF", option, rule, "Choose 21 or more")
            else:
                rule = "only expandable_segments:True or False and max_split_size_mb:N are simulated"
                raise request_error("PYTORCH_ALLOC_CONF", option, rule, "Leave the option out")
        return cls(expandable, split)


class Block:
    """A piece of a segment: in use, free, or (of an expandable segment) an address range without memory."""

    __slots__ = ("free", "mapped", "next", "offset", "previous", "segment", "size", "small")

    def __init__(self, size: int, segment: int, offset: int, small: bool, mapped: bool = True) -> None:
        self.size, self.segment, self.offset, self.small, self.mapped = size, segment, offset, small, mapped
        self.free = True
        self.previous: Block | None = None
        self.next: Block | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """The order in which free blocks are tried: smallest first, then by address."""
        return self.size, self.segment, self.offset


Free = tuple[int, int, int, Block]
"""A free block behind its key: no two keys are alike, so that comparing two of these never gets to the blocks."""


class CachingAllocator:
    """One device's allocator, with memory without limit.

    Attributes:
        allocated, reserved: bytes now, as torch.cuda.memory_allocated and memory_reserved count them.
        peak_allocated, peak_reserved: their highest values since `reset_peaks`.
    """

    def __init__(self, settings: AllocatorSettings | None = None) -> None:
        self.settings = settings or AllocatorSettings()
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._free: dict[bool, list[Free]] = {True: [], False: []}
        self._segments = 0
        self._arenas: dict[bool, list[Block]] = {True: [], False: []}
        """Of expandable segments: address ranges without memory, by address."""

    def reset_peaks(self) -> None:
        """Begin to look for the highest values anew."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def allocate(self, size: int) -> Block:
        """A block for `size` bytes (above 0); give it back with `release`."""
        size = max(ROUNDING, -(-size // ROUNDING) * ROUNDING)
        small = size <= SMALL
        block = self._cached(size, small) or self._from_driver(size, small)
        rest = block.size - size
        if rest >= ROUNDING and self._splits(small, size, rest):
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated
        return block

    def release(self, block: Block) -> None:
        """Give a block back: it joins its free neighbours and is kept for later requests."""
        self.allocated -= block.size
        block.free = True
        self._keep(self._joined(block))

    def empty_cache(self) -> None:
        """torch.cuda.empty_cache(): free segments go back to the driver, and an expandable one's free pages."""
        for small, kept in self._free.items():
            blocks = [entry[3] for entry in kept]
            kept.clear()
            for block in blocks:
                if self.settings.expandable_segments:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    self.reserved -= block.size
                else:
                    insort(self._free[small], (*block.key, block))

    def fork(self) -> CachingAllocator:
        """Another one in this state, for requests only: what this one handed out is given back to this one.

        Raises:
            ValueError: segments are expandable, and grow at what lies before them.
        """
        if self.settings.expandable_segments:
            raise ValueError("an allocator with expandable segments cannot be forked")
        other = CachingAllocator(self.settings)
        other.allocated, other.reserved = self.allocated, self.reserved
        other.peak_allocated, other.peak_reserved = self.peak_allocated, self.peak_reserved
        other._segments = self._segments
        other._free = {
            small: [(size, segment, offset, Block(size, segment, offset, small)) for size, segment, offset, _ in free]
            for small, free in self._free.items()
        }
        return other

    def holes(self) -> tuple[int, ...]:
        """What is free in segments of large blocks, the smallest first."""
        return tuple(size for size, *_ in self._free[False])

    def _cached(self, size: int, small: bool) -> Block | None:
        """The best free block, taken out of its pool."""
        free, limit = self._free[small], self.settings.max_split_bytes
        index = bisect_left(free, (size, -ENDLESS))
        if self.settings.expandable_segments:
            # a block at the growing end counts as large as it could become, and so comes last
            growing = [place for place in range(index, len(free)) if _grows(free[place][3])]
            inner = next((place for place in range(index, len(free)) if not _grows(free[place][3])), None)
            index = inner if inner is not None else (growing[0] if growing else len(free))
        if index == len(free):
            return None
        block = free[index][3]
        if limit is not None and (
            (size < limit <= block.size) or (size >= limit and block.size >= size + LARGE_SEGMENT)
        ):
            return None
        free.pop(index)
        return block

    def _from_driver(self, size: int, small: bool) -> Block:
        """A new segment, or more pages of the expandable one."""
        if self.settings.expandable_segments:
            return self._mapped(size, small)
        segment = SMALL_SEGMENT if small else segment_for(size)
        self._segments += 1
        self._reserve(segment)
        return Block(segment, -self._segments, 0, small)

    def _mapped(self, size: int, small: bool) -> Block:
        """Memory for the first address range that has room for `size` bytes with the free block before it."""
        ranges = self._arenas[small]
        if not ranges:
            self._segments += 1
            ranges.append(Block(ENDLESS, self._segments, 0, small, mapped=False))
        page = SMALL_SEGMENT if small else LARGE_SEGMENT
        for hole in ranges:
            before = hole.previous if hole.previous is not None and hole.previous.free else None
            missing = size - (before.size if before else 0)
            if missing <= hole.size:
                break
        pages = -(-missing // page) * page
        block = Block(pages, hole.segment, hole.offset, small)
        _insert_before(hole, block)
        hole.size, hole.offset = hole.size - pages, hole.offset + pages
        if not hole.size:
            _unlink(hole)
            ranges.remove(hole)
        self._reserve(pages)
        return self._joined(block)

    def _unmap(self, block: Block) -> None:
        """Give the whole pages inside a free block of an expandable segment back."""
        page = SMALL_SEGMENT if block.small else LARGE_SEGMENT
        start = -(-block.offset // page) * page
        end = (block.offset + block.size) // page * page
        if end <= start:
            insort(self._free[block.small], (*block.key, block))
            return
        hole = Block(end - start, block.segment, start, block.small, mapped=False)
        tail = block.offset + block.size - end
        block.size = start - block.offset
        _insert_after(block, hole)
        if tail:
            rest = Block(tail, block.segment, end, block.small)
            _insert_after(hole, rest)
            insort(self._free[block.small], (*rest.key, rest))
        if block.size:
            insort(self._free[block.small], (*block.key, block))
        else:
            _unlink(block)
        self.reserved -= end - start
        ranges = self._arenas[block.small]
        for other in (hole.next, hole.previous):
            if other is not None and not other.mapped:
                hole.offset = min(hole.offset, other.offset)
                hole.size += other.size
                _unlink(other)
                ranges.remove(other)
        insort(ranges, hole, key=lambda each: each.offset)

    def _splits(self, small: bool, size: int, rest: int) -> bool:
        """Whether what a request of `size` bytes leaves of a block becomes a block of its own."""
        if small or self.settings.expandable_segments:
            return True
        return rest > SMALL and size < (self.settings.max_split_bytes or math.inf)

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.size - size, block.segment, block.offset + size, block.small)
        block.size = size
        _insert_after(block, rest)
        self._keep(rest)

    def _joined(self, block: Block) -> Block:
        """`block` and its free neighbours, which leave their pool, as one."""
        for other in (block.previous, block.next):
            if other is None or not other.free or not other.mapped:
                continue
            free = self._free[other.small]
            free.pop(bisect_left(free, other.key))
            block.offset = min(block.offset, other.offset)
            block.size += other.size
            _unlink(other)
        return block

    def _keep(self, block: Block) -> None:
        insort(self._free[block.small], (*block.key, block))

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)


def segment_for(size: int) -> int:
    """The segment the allocator asks the driver for to serve a request of `size` bytes above 1 MiB."""
    return LARGE_SEGMENT if size < OWN_SEGMENT else -(-size // SMALL_SEGMENT) * SMALL_SEGMENT


def _grows(block: Block) -> bool:
    return block.next is not None and not block.next.mapped


def _insert_after(block: Block, new: Block) -> None:
    new.previous, new.next = block, block.next
    if block.next is not None:
        block.next.previous = new
    block.next = new


def _insert_before(block: Block, new: Block) -> None:
    new.previous, new.next = block.previous, block
    if block.previous is not None:
        block.previous.next = new
    block.previous = new


def _unlink(block: Block) -> None:
    if block.previous is not None:
        block.previous.next = block.next
    if block.next is not None:
        block.next.previous = block.previous
