"""Reserved memory more exactly: a step's own timeline, played to PyTorch's caching allocator layer by layer.

How memory fragments hangs on the order in which everything came and went before, so a closed form (`reserve.py`) can
only say in which range it lies. The tape knows that order. Here its log of three layers, of which the one in the middle
stands for all between the first and the last, is served by the simulated allocator (`allocator.py`), beginning with
what loading left (`settled.py`): a step and the optimizer's state, then a second step up to its highest moments.
That takes some tens of milliseconds, where the closed form takes as many microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import count as numbers_from
from typing import Any, NamedTuple

from clusters.errors import request_error
from qlora_core.architecture import ModelArchitecture
from qlora_core.memory import bytes as exact
from qlora_core.memory import formula
from qlora_core.memory.allocator import ROUNDING, SMALL, SMALL_SEGMENT, Block
from qlora_core.memory.arrivals import DRAWS, lowest_middle_highest
from qlora_core.memory.device import Device
from qlora_core.memory.estimate import Estimate
from qlora_core.memory.formula import Prepared
from qlora_core.memory.reserve import PLAYED, packed
from qlora_core.memory.settled import loaded
from qlora_core.memory.sizes import variables_of
from qlora_core.memory.step import FIRST, LAST, MIDDLE, Step, on_tape, recorded
from qlora_core.memory.tape import Room, Where, value
from qlora_core.recipe import DTYPE_BYTES, Recipe
from qlora_core.strategy import Strategy

LAYERS = (FIRST, MIDDLE, LAST)
BACKWARD_LAYERS = 2
"""Layers whose backward pass the last step plays: those after them have more room than these had."""


class Move(NamedTuple):
    """A storage that comes or goes.

    Attributes:
        comes: else it goes.
        away: of a layer's storage, how many layers before (below 0) or after this one its layer is; None outside.
        slot: which of its layer's it is, or its number on the tape.
        size: its place among the tape's sizes.
    """

    comes: bool
    away: int | None
    slot: int
    size: int


class Part(NamedTuple):
    """A piece of the tape's log: one layer's forward or backward pass, or what lies between such.

    Attributes:
        phase: "forward" or "backward".
        layer: which of `LAYERS`; None outside.
    """

    phase: str
    layer: str | None
    moves: Sequence[Move]


class Passed(NamedTuple):
    """A `Part` for one micro-batch and sequence length: its large blocks with their sizes, and small ones' bytes."""

    phase: str
    layer: str | None
    moves: tuple[tuple[bool, int | None, int, int], ...]
    small: int
    most_small: int


def estimate(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Estimate:
    """As `formula.estimate`, with reserved memory as it is played. A CPU reserves what it allocates.

    Raises:
        ValueError: nothing is trained.
        RequestError: it cannot be played: see `_refused`.
    """
    needed = formula.estimate(architecture, recipe, strategy, device)._replace(estimator="played")
    if device.kind == "cpu":
        return needed
    sizes = formula.prepared(architecture, recipe, strategy, device)
    step = sizes.step(strategy.micro_batch, recipe.seq_len)
    if (rule := _refused(step, strategy, recipe)) is not None:
        raise request_error("--estimator", "played", rule, "Use --estimator formula")
    gpu = needed.gpu
    draws = range(DRAWS if device.loading_threads else 1)
    runs = [Player(architecture, recipe, strategy, device, sizes, step, draw).reserved() for draw in draws]
    least = max(gpu.allocated_bytes, gpu.phases.after_load)
    found = zip(lowest_middle_highest(runs), PLAYED, strict=True)
    low, reserved, high = (max(least, run * (1000 + share) // 1000) for run, share in found)
    return needed._replace(
        gpu=gpu._replace(
            reserved_bytes=reserved,
            process_bytes=reserved + device.context_bytes,
            reserved_interval=(low, high),
        )
    )


def _refused(step: Step, strategy: Strategy, recipe: Recipe) -> str | None:
    """Why it cannot be played, if so."""
    if strategy.zero_stage:
        return f"it plays a rank that holds all it trains, and ZeRO stage {strategy.zero_stage} divides it"
    if step.unlike is not None:
        return "it plays layers that are all alike, and without checkpointing those with a window keep something else"
    if step.chunks > 1:
        return "it plays chunks of the loss that are alike, and of a trained output head's the last is smaller"
    return None


class Player:
    """Plays the steps of one request: that of `estimate`, what is prepared of it, and which draw of `arrivals`."""

    def __init__(
        self,
        architecture: ModelArchitecture,
        recipe: Recipe,
        strategy: Strategy,
        device: Device,
        sizes: Prepared,
        step: Step,
        draw: int,
    ) -> None:
        self._layers = step.layers
        self._recipe, self._strategy = recipe, strategy
        self._device = device
        variables = variables_of(strategy.micro_batch, recipe.seq_len, sizes.chunk)
        self._pass = {kept: _passed(step, kept, variables) for kept in set(_passes(strategy))}
        self._memory = loaded(architecture, recipe, device, draw)
        self._buffers = packed([(exact.buffer_bytes(architecture), 1)])
        self._tensors = exact.trainable_tensors(architecture, recipe)
        self._item = DTYPE_BYTES[exact.trainable_dtype(recipe, device.compute_dtype)]
        self._paged = strategy.paged_optimizer
        self._all_trained = recipe.method == "full"
        """Then the embedding's backward pass, the last of all, may be the highest moment."""
        self._small = self._most_small = 0

    def reserved(self) -> int:
        """Bytes of all segments, at their most."""
        memory = self._memory
        for size in self._device.blas_workspaces:  # the first product of each thread asks for one
            memory.allocate(size)
        if self._strategy.world_size > 1:
            self._come(self._item * numel for numel in _in_turn(self._tensors))  # DistributedDataParallel's buckets
        passes = _passes(self._strategy)
        lasting = self._small
        for step in range(2):
            left: list[Block] = []
            for number, keeps_gradients in enumerate(passes):
                last = number == len(passes) - 1
                left += self._one_pass(self._pass[keeps_gradients], whole=self._all_trained or not (step and last))
            if self._strategy.world_size > 1:  # the last backward pass has moved all gradients into buckets
                self._go(left)
                left = []
            if not step:
                before = self._small
                self._optimize()
                lasting += self._small - before
            self._go(left)
            self._small = lasting
        small = -(-self._most_small // SMALL_SEGMENT) * SMALL_SEGMENT
        return self._buffers + memory.reserved + small

    def _one_pass(self, parts: Sequence[Passed], *, whole: bool) -> list[Block]:
        """Forward and backward pass; what is left at their end. Not `whole` ends when the highest moments are over."""
        allocate, release = self._memory.allocate, self._memory.release
        held: list[dict[int, Block]] = [{} for _ in range(self._layers)]
        outside: dict[int, Block] = {}
        small, most_small = self._small, self._most_small
        for phase, layer, moves, small_change, small_peak in parts:
            for at in self._numbers(phase, layer, whole):
                most_small = max(most_small, small + small_peak)
                small += small_change
                for comes, away, slot, size in moves:
                    if comes:
                        (outside if away is None else held[at])[slot] = allocate(size)
                        continue
                    if away is None:
                        found = outside.pop(slot, None)
                    elif layer is not None:
                        found = held[at + away].pop(slot, None) if 0 <= at + away < self._layers else None
                    else:  # what ends for layers outside of them, ends for all in between alike
                        for other in self._numbers(phase, LAYERS[away], whole=True):
                            if (block := held[other].pop(slot, None)) is not None:
                                release(block)
                        continue
                    if found is not None:
                        release(found)
        self._small, self._most_small = small, most_small
        return [block for blocks in (*held, outside) for block in blocks.values()]

    def _numbers(self, phase: str, layer: str | None, whole: bool) -> Sequence[int]:
        """The layers that a part of the tape stands for, in the order of its pass."""
        last = self._layers - 1
        if layer is None:
            return (0,)
        alike = {FIRST: range(1), MIDDLE: range(1, last), LAST: range(last, last + 1)}[layer]
        if phase == "forward":
            return alike
        ends = 0 if whole else last + 1 - BACKWARD_LAYERS
        return [number for number in reversed(alike) if number >= ends]

    def _optimize(self) -> None:
        """The first optimizer step: its state comes, and with torch's AdamW the roots of all moments of a group."""
        of_one = partial(exact.state_tensors, recipe=self._recipe, itemsize=self._item, paged=self._paged)
        self._come(size for numel in _in_turn(self._tensors) for size in of_one(numel)[0])
        if self._recipe.optimizer == "adamw_8bit" or self._paged:
            return
        for group in exact.optimizer_groups(self._tensors, self._recipe):
            small = self._small
            roots = self._come(self._item * numel for numel in _in_turn(group))
            self._small = small
            self._go(roots)

    def _come(self, sizes: Iterable[int]) -> list[Block]:
        """Blocks for tensors of these bytes; of small ones only their sum is known."""
        blocks = []
        for size in sizes:
            if size > SMALL:
                blocks.append(self._memory.allocate(size))
            else:
                self._small += _rounded(size)
        self._most_small = max(self._most_small, self._small)
        return blocks

    def _go(self, blocks: Iterable[Block]) -> None:
        """Give blocks back."""
        for block in blocks:
            self._memory.release(block)


def _rounded(size: int) -> int:
    """Bytes of a block for so many."""
    return -(-size // ROUNDING) * ROUNDING


def _in_turn(tensors: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Elements of each of the tensors (elements of one, how many), layer by layer."""
    for number in range(max(count for _, count in tensors)):
        for numel, count in tensors:
            if number < count:
                yield numel


def _passes(strategy: Strategy) -> tuple[bool, ...]:
    """Of the micro-batches of a step that differ, in their order: whether its gradients are kept where they are made.

    The first ones' are, to be added to; with DistributedDataParallel the last one's go into a bucket.
    """
    return (True, False) if strategy.gradient_accumulation > 1 else (strategy.world_size == 1,)


def _passed(step: Step, keeps_gradients: bool, variables: Sequence[int]) -> tuple[Passed, ...]:
    """The parts of a pass, with bytes."""
    tape = on_tape(step)._replace(gradients="kept" if keeps_gradients else "taken", layers=min(step.layers, 3))
    polynomials = recorded(tape).sizes_of(step)
    sizes = [value(size, variables) for size in polynomials]
    found = []
    for phase, layer, moves in _parts(tape):
        large = []
        small = most_small = 0
        for comes, away, slot, place in moves:
            size = sizes[place]
            if size > SMALL:
                large.append((comes, away, slot, size))
            elif size:
                small += _rounded(size) if comes else -_rounded(size)
                most_small = max(most_small, small)
        found.append(Passed(phase, layer, tuple(large), small, most_small))
    return tuple(found)


@lru_cache(maxsize=32)
def _parts(tape: Step) -> tuple[Part, ...]:
    """The tape's log in its parts."""
    changes = recorded(tape).changes
    layers = LAYERS if tape.layers > 2 else (FIRST, LAST)
    homes = _homes(changes, layers)
    parts: list[Part] = []
    moves: list[Move] = []
    for number, place, room, where in changes:
        if where is not None:
            phase, layer = where[0], where[1] if where[1] in LAYERS else None
            if not parts or (phase, layer) != parts[-1][:2]:
                moves = []
                parts.append(Part(phase, layer, moves))
        elif room is not None:
            continue
        away, slot = _seen_from(parts[-1].layer, homes.get(number), number, layers)
        moves.append(Move(where is not None, away, slot, place))
    return tuple(parts)


def _homes(
    changes: Sequence[tuple[int, int, Room | None, Where | None]], layers: Sequence[str]
) -> dict[int, tuple[int, int]]:
    """Of each storage of a layer: which of the tape's it is, and its slot, which in all layers stands for the same.

    The first layer may make what the others do not: copies of an embedding that is narrower than their inputs.
    """
    made: dict[str, list[tuple[int, tuple[Any, ...]]]] = {layer: [] for layer in layers}
    for number, place, _, where in changes:
        if where is not None and where[1] in layers:
            made[where[1]].append((number, (where[0], place, *where[2:])))
    usual = [kind for _, kind in made[LAST]]
    homes = {}
    for index, layer in enumerate(layers):
        slots, others = iter(enumerate(usual)), numbers_from(len(usual))
        expected = next(slots, None)
        for number, kind in made[layer]:
            if expected is not None and kind == expected[1]:
                homes[number] = index, expected[0]
                expected = next(slots, None)
            else:
                homes[number] = index, next(others)
    return homes


def _seen_from(
    layer: str | None, home: tuple[int, int] | None, number: int, layers: Sequence[str]
) -> tuple[int | None, int]:
    """How far away a storage's layer is from `layer`, or which of `LAYERS` it is, seen from outside; and its slot."""
    if home is None:
        return None, number
    kind, slot = home
    return LAYERS.index(layers[kind]) if layer is None else kind - layers.index(layer), slot
