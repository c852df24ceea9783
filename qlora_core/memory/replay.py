"""What a run allocates and releases, event by event, and what the caching allocator makes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

from qlora_core.memory.allocator import AllocatorSettings, Block, CachingAllocator
from qlora_core.memory.arrivals import arrivals
from qlora_core.memory.estimate import Phase


class Allocated(NamedTuple):
    """A storage of `size` bytes was made."""

    number: int
    size: int
    room: str
    where: str


class Released(NamedTuple):
    """A storage was let go."""

    number: int


class Moved(NamedTuple):
    """A storage counts for another component from now on."""

    number: int
    room: str


class Marked(NamedTuple):
    """Something begins: a phase of a step, the next weight to load; or the cache is emptied."""

    name: str


Event = Allocated | Released | Moved | Marked
WEIGHT, WEIGHTS_LOADED, LOADED, EMPTY_CACHE = "weight", "weights loaded", "loaded", "empty_cache"
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class Replayed:
    """Recorded events as a device's memory serves them, in bytes.

    Attributes:
        after_load: allocated when the first step begins.
        peaks: the highest allocated of the second step, by phase.
        allocated, reserved: the highest of the second step, and of the whole run from the first step on.
        rooms: requested bytes by component at the highest moment.
        where: what was at work then.
    """

    after_load: int
    peaks: dict[Phase, int]
    allocated: int
    reserved: int
    rooms: dict[str, int]
    where: str


def replay(events: Sequence[Event], caching: bool, settings: AllocatorSettings | None = None) -> Replayed:
    """Play `events` to PyTorch's CUDA caching allocator or, if not `caching`, count requested bytes."""
    memory = CachingAllocator(settings) if caching else Exactly()
    blocks: dict[int, Block] = {}
    second = second_step(events)
    after_load = highest = peak = 0
    where = phase = ""
    peaks = dict.fromkeys(PHASES, 0)
    for index, event in enumerate(events):
        if isinstance(event, Allocated):
            blocks[event.number] = memory.allocate(event.size)
            if index > second and memory.allocated > peaks[phase]:
                peaks[phase] = memory.allocated
                if memory.allocated > highest:
                    highest, peak, where = memory.allocated, index, event.where
        elif isinstance(event, Released):
            memory.release(blocks.pop(event.number))
        elif isinstance(event, Marked):
            if event.name in PHASES:
                phase = event.name
                if index > second:
                    peaks[phase] = max(peaks[phase], memory.allocated)
            elif event.name == LOADED:
                after_load = memory.allocated
                memory.reset_peaks()
            elif event.name == EMPTY_CACHE:
                memory.empty_cache()
    return Replayed(
        after_load, cast(dict[Phase, int], peaks), highest, memory.peak_reserved, rooms(events[: peak + 1]), where
    )


class Exactly:
    """Memory that serves every request with as many bytes, as the storage tracker counts them on a CPU."""

    def __init__(self) -> None:
        self.allocated = self.peak_reserved = 0

    def allocate(self, size: int) -> Block:
        """`size` bytes."""
        self.allocated += size
        self.peak_reserved = max(self.peak_reserved, self.allocated)
        return Block(size, 0, 0, small=False)

    def release(self, block: Block) -> None:
        """Give them back."""
        self.allocated -= block.size

    def reset_peaks(self) -> None:
        """Begin to look for the highest value anew."""
        self.peak_reserved = self.allocated

    def empty_cache(self) -> None:
        """Nothing is cached."""


def second_step(events: Sequence[Event]) -> int:
    """The index just before the first forward pass after the first optimizer step."""
    stepped = False
    for index, event in enumerate(events):
        if isinstance(event, Marked):
            if stepped and event.name == "forward":
                return index - 1
            stepped = stepped or event.name == "optimizer"
    return len(events)


def rooms(events: Iterable[Event]) -> dict[str, int]:
    """Requested bytes alive after `events`, by component."""
    alive: dict[int, tuple[int, str]] = {}
    for event in events:
        if isinstance(event, Allocated):
            alive[event.number] = event.size, event.room
        elif isinstance(event, Released):
            del alive[event.number]
        elif isinstance(event, Moved):
            alive[event.number] = alive[event.number][0], event.room
    sizes: Counter[str] = Counter()
    for size, room in alive.values():
        sizes[room] += size
    return dict(sizes)


def loaded_by_threads(events: Sequence[Event], threads: int, draw: int) -> list[Event]:
    """`events` in an order in which so many threads may bring weights while each is put in its place (`arrivals`).

    A weight's first event after its mark is its arrival.
    """
    before: list[Event] = []
    weights: list[list[Event]] = []
    after: list[Event] = []
    part = before
    for event in events:
        if isinstance(event, Marked) and event.name == WEIGHT:
            weights.append([])
            part = weights[-1]
        elif isinstance(event, Marked) and event.name == WEIGHTS_LOADED:
            part = after
        else:
            part.append(event)
    order = before
    sizes = [cast(Allocated, weight[0]).size for weight in weights]
    for number, comes in arrivals(sizes, threads, draw):
        order += weights[number][:1] if comes else weights[number][1:]
    return order + after
