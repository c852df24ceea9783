"""The candidate peaks of a training step as polynomials, out of what its tape recorded.

All layers are alike, so what layer i adds to what is alive is known from two of them: r bytes per layer that the
forward pass leaves, and g bytes of gradients that the backward pass leaves. The live memory while layer i works is
linear in i; its maximum lies at the first or at the last layer. The other n - 2 layers are put in between in closed
form; where some of them attend without a sliding window and keep something else, those count as what one of them keeps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple, TypeVar

from qlora_core.memory.device import MIB
from qlora_core.memory.step import (
    BUFFERS,
    FIRST,
    GRADIENTS,
    LAST,
    Recording,
    Step,
    on_tape,
    period_gradient_bytes,
    recorded,
)
from qlora_core.memory.tape import (
    NOTHING,
    Alive,
    Change,
    Room,
    Size,
    Total,
    Where,
    alive_at,
    by_room,
    sum_of,
    totals,
)

Part = tuple[str, str]
"""A phase and one of its parts, the first two words of a `Where`."""
STRETCHES: tuple[tuple[Part, ...], ...] = (
    (("forward", FIRST), ("forward", LAST)),
    (("forward", "final norm"), ("forward", "loss")),
    # a frozen head's chunks have their backward pass in the forward pass
    (("forward", "loss gradient"), ("backward", "final norm"), ("backward", "loss")),
    (("backward", LAST),),
)
"""Layers, loss, loss backward and last layer backward."""
Kept = tuple[Room, Size]
"""A storage that a layer keeps: what it is counted in, and its bytes."""


class Peak(NamedTuple):
    """A place of the tape's log at which memory may peak: what is alive there, and what the layers in between add."""

    total: Size
    """Both together."""
    where: Where
    place: int
    added: dict[Room, Size]
    keeping: int
    """How many of the layers in between keep what the backward pass needs."""


class Candidate(NamedTuple):
    """A moment at which memory may peak, middle layers included: size by room, and the sum of the rooms."""

    where: Where
    rooms: dict[Room, Size]
    total: Size
    keeping: int
    """As a `Peak`'s."""


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A moment as the caching allocator sees it: storages by number, the two layers' and the loss's.

    It is made once for all steps with the same tape, and equals none but itself.
    """

    total: Size
    alive: dict[int, Size]


Moving = TypeVar("Moving", Candidate, Scene)
Stretches = tuple[tuple[Scene, ...], ...]
"""The candidate peaks of layers, loss, loss backward and last layer backward: what the allocator has to fit."""
Headed = TypeVar("Headed", Peak, tuple[Total, Where, int], tuple[Total])
_total = itemgetter(0)


class Timeline(NamedTuple):
    """A step's candidate peaks by phase, and what is alive after the backward pass, while the optimizer works."""

    forward: tuple[Candidate, ...]
    backward: tuple[Candidate, ...]
    after_backward: Candidate
    stretches: Stretches
    kept: tuple[tuple[Size, int], ...]
    """What the layers in between keep meanwhile and may be large: the bytes of a storage, and how many are alike."""


class Moments(NamedTuple):
    """What steps with the same tape and rank share.

    Attributes:
        parts: the candidate peaks of each part of a step, as two layers make them.
        alive: what was alive at those, after each layer, and at the ends of both passes.
        rooms: the bytes in each room at some of these places, which many steps ask for.
    """

    recording: Recording
    parts: dict[Part, tuple[Peak, ...]]
    alive: dict[int, Alive]
    stretches: Stretches
    rooms: dict[int, dict[Room, Size]]

    def rooms_at(self, place: int) -> dict[Room, Size]:
        """The bytes in each room at one of the places."""
        if place not in self.rooms:
            self.rooms[place] = by_room(self.alive[place])
        return self.rooms[place]


@lru_cache(maxsize=256)
def _moments(tape: Step, rank: int, fetched: int) -> Moments:
    """Those of the steps with this `on_tape`, rank and buffer of weights fetched ahead."""
    recording = recorded(tape)
    log = recording.of(tape._replace(layer=tape.layer._replace(rank=rank), fetched=fetched))
    parts = _peaks_by_part(log)
    places = (peak.place for peaks in parts.values() for peak in peaks)
    alive = alive_at(log, [*recording.marks, recording.forward_end, recording.loss_end, len(log), *places])
    return Moments(recording, parts, alive, _stretches(parts, alive), {})


class Whole(NamedTuple):
    """A step with all its layers.

    Attributes:
        peaks: its candidate peaks, those of the layers in between included.
        left: what the backward pass of the layers in between leaves: gradients, and what stays as long as the loss.
        in_between: what those layers keep meanwhile.
    """

    moments: Moments
    peaks: list[Peak]
    left: dict[Room, Size]
    in_between: Counter[Kept]


def _whole(step: Step) -> Whole:
    """A step with all its layers, from what two of them do."""
    moments = _moments(on_tape(step), step.layer.rank, step.fetched)
    recording, parts, alive, *_ = moments
    marks = recording.marks
    middle = max(step.layers - 2, 0)
    in_between = Counter[Kept]()
    kept: dict[Room, Size] = {}
    forgotten: dict[Room, Size] = {}
    held: dict[Room, Size] = {}
    if middle:
        before, after = (alive[mark] for mark in marks)
        in_between = _kept_in_between(step, middle, before, after)
        for (room, size), count in in_between.items():
            kept[room] = kept.get(room, NOTHING).plus(size.times(count))
        gone_by_then = recording.copies & after.keys() - before.keys() - alive[recording.forward_end].keys()
        of_copies = by_room({number: after[number] for number in gone_by_then})
        forgotten = {room: size.times(-middle) for room, size in of_copies.items()}
        of_one = alive[len(recording.changes)].keys() & after.keys() - before.keys()
        held = {room: size.times(middle) for room, size in by_room({n: after[n] for n in of_one}).items()}
    left = _sum(_made(step, middle), held)
    kept_after = _sum(kept, forgotten)
    peaks = [*_with_middle(parts, middle, kept, kept_after, left), *_after_flush(step, middle, parts, kept_after)]
    if step.head_reduced:
        added = _sum(kept_after, {GRADIENTS: Size(fixed=step.head_reduced)})
        total = sum_of(moments.rooms_at(recording.loss_end).values()).plus(sum_of(added.values()))
        peaks.append(Peak(total, ("backward", "loss"), recording.loss_end, added, middle))
    return Whole(moments, peaks, left, in_between)


@lru_cache(maxsize=1024)
def timeline(step: Step) -> Timeline:
    """The candidate peaks of a step; none of those kept is below another for every size.

    Raises:
        ValueError: nothing is trained.
    """
    moments, peaks, left_between, in_between = _whole(step)
    end = len(moments.recording.changes)
    left = _sum(moments.rooms_at(end), left_between)
    if step.reduced_after:
        added = _sum(left_between, {GRADIENTS: Size(fixed=step.reduced_after)})
        total = sum_of(left.values()).plus(Size(fixed=step.reduced_after))
        peaks.append(Peak(total, ("backward", "gradient reduction"), end, added, 0))
    gone: tuple[Room, ...] = () if step.output_held else ("activations", "logits_and_loss")
    if step.sharded or step.gradients == "moved":
        gone += (GRADIENTS, BUFFERS)
    rest = {room: size for room, size in left.items() if room not in gone}
    return Timeline(
        forward=_candidates(moments, (peak for peak in peaks if peak.where[0] == "forward")),
        backward=_candidates(moments, (peak for peak in peaks if peak.where[0] == "backward")),
        after_backward=Candidate(("backward", FIRST), rest, sum_of(rest.values()), 0),
        stretches=moments.stretches,
        kept=tuple((size, count) for (_, size), count in in_between.items() if _may_be_large(size)),
    )


def course(step: Step) -> list[tuple[Part, tuple[Candidate, ...]]]:
    """The candidate peaks of each part of a step, in the order in which they come; of the layers the first and last.

    Raises:
        ValueError: nothing is trained.
    """
    moments, peaks, *_ = _whole(step)
    parts: dict[Part, list[Peak]] = {}
    for peak in peaks:
        parts.setdefault((peak.where[0], peak.where[1]), []).append(peak)
    return [(part, _candidates(moments, found)) for part, found in parts.items()]


def _kept_in_between(step: Step, middle: int, before: Alive, after: Alive) -> Counter[Kept]:
    """What the layers in between keep; what is alive `before` and `after` the last one runs forward is given."""
    unlike = min(step.unlike_layers, middle) if step.unlike is not None else 0
    kept = _kept(before, after, middle - unlike)
    if step.unlike is not None:
        unlike_step = step._replace(layer=step.unlike)
        recording = recorded(on_tape(unlike_step))
        alive = alive_at(recording.of(unlike_step), recording.marks)
        first, last = (alive[mark] for mark in recording.marks)
        kept.update(_kept(first, last, unlike))
    return kept


def _kept(before: Alive, after: Alive, layers: int) -> Counter[Kept]:
    """What so many layers keep, of which one adds to what is alive what `after` has more than `before`."""
    more = Counter(after.values())
    more.subtract(before.values())
    return Counter({kept: layers * count for kept, count in more.items() if count})


def _peaks_by_part(log: Iterable[Change]) -> dict[Part, tuple[Peak, ...]]:
    """The candidate peaks of each part of a step, as its two layers make them.

    Layers in between add the same to all of one part: what is below another before is below it afterwards.
    """
    parts: dict[Part, list[tuple[Total, Where, int]]] = {}
    by_where: dict[Where, list[tuple[Total, Where, int]]] = {}
    for place, where, total in totals(log):
        if where not in by_where:
            by_where[where] = parts.setdefault((where[0], where[1]), [])
        by_where[where].append((total, where, place))
    return {
        part: tuple(Peak(Size(*total), where, place, {}, 0) for total, where, place in above_others(found))
        for part, found in parts.items()
    }


def _made(step: Step, middle: int) -> dict[Room, Size]:
    """What the backward pass of the layers in between leaves, or takes away."""
    if step.gradients == "kept":
        # what the tape's two layers do not have: linears that stand for several, or work beside them (shared experts)
        beside = min(step.layers, 2) * (step.layer_gradients - period_gradient_bytes(step))
        return {GRADIENTS: Size(fixed=middle * step.layer_gradients + beside)}
    if step.gradients == "moved":
        return {GRADIENTS: Size(fixed=-(step.layers - 1) * step.layer_gradients)}
    return {GRADIENTS: Size(fixed=step.part)} if step.layers_to_flush else {}


def _after_flush(
    step: Step, middle: int, parts: Mapping[Part, Sequence[Peak]], kept: dict[Room, Size]
) -> Iterator[Peak]:
    """The backward pass of the layer in which the bucket of ZeRO 2 or 3 is full for the first time."""
    if not step.layers_to_flush:
        return
    done = min(step.layers_to_flush - 1, middle)
    left = {room: size.times(middle - done) if middle else size for room, size in _one_layer(kept, middle).items()}
    left[GRADIENTS] = Size(fixed=step.part)
    more = sum_of(left.values())
    for peak in parts["backward", LAST]:
        yield peak._replace(total=peak.total.plus(more), added=left, keeping=middle - done)


def _one_layer(kept: dict[Room, Size], middle: int) -> dict[Room, Size]:
    """What one layer's forward pass keeps, from what `middle` of them keep."""
    return {room: Size(*(coefficient // middle for coefficient in size)) for room, size in kept.items()}


def _with_middle(
    parts: Mapping[Part, Sequence[Peak]],
    middle: int,
    kept: dict[Room, Size],
    kept_after: dict[Room, Size],
    left: dict[Room, Size],
) -> list[Peak]:
    """Each with the layers between the first and the last: before they run, after, or after their backward pass.

    What they keep is less once the forward pass has ended, and with it autocast.
    """
    nothing: dict[Room, Size] = {}
    peaks: list[Peak] = []
    for (phase, part), found in parts.items():
        added, keeping = nothing if phase == "forward" else left, 0
        if part not in ("embedding", FIRST):
            added, keeping = kept if phase == "forward" else kept_after, middle
        more = sum_of(added.values())
        peaks += [peak._replace(total=peak.total.plus(more), added=added, keeping=keeping) for peak in found]
    return sorted(peaks, key=lambda peak: peak.place)


def _candidates(moments: Moments, peaks: Iterable[Peak]) -> tuple[Candidate, ...]:
    """Those of `peaks` that are the highest for some size."""
    kept = above_others(peaks)
    return tuple(
        Candidate(peak.where, _sum(moments.rooms_at(peak.place), peak.added), peak.total, peak.keeping) for peak in kept
    )


def _sum(rooms: dict[Room, Size], more: dict[Room, Size]) -> dict[Room, Size]:
    """Both together, room by room."""
    total = dict(rooms)
    for room, size in more.items():
        total[room] = total.get(room, NOTHING).plus(size)
    return total


def above_others(candidates: Iterable[Headed]) -> list[Headed]:
    """Those that are above all others for some size: no other's total is at least as large in every coefficient.

    The total comes first in each; of those alike the first stays.
    """
    kept: list[Headed] = []
    for candidate in sorted(candidates, key=_total, reverse=True):
        _, b, c, d, e = candidate[0]  # in this order, no `fixed` is larger than one before
        for other in kept:
            _, q, r, s, t = other[0]
            if q >= b and r >= c and s >= d and t >= e:
                break
        else:
            kept.append(candidate)
    return kept


def _large(alive: Alive) -> dict[int, Size]:
    """Without what is small at every size of the input: it lies in small segments."""
    return {number: size for number, (_, size) in alive.items() if _may_be_large(size)}


def _may_be_large(size: Size) -> bool:
    fixed, per_position, per_token, per_score, per_chunk_token = size
    return fixed > MIB or bool(per_token or per_position or per_score or per_chunk_token)


def highest(candidates: Sequence[Moving], variables: Sequence[int]) -> Moving:
    """The candidate that is the highest where the polynomials' variables have these values."""
    _, positions, tokens, scores, chunk = variables
    best, most = candidates[0], -math.inf
    for candidate in candidates:
        a, b, c, d, e = candidate.total
        size = a + b * positions + c * tokens + d * scores + e * chunk
        if size > most:
            most, best = size, candidate
    return best


def _stretches(parts: Mapping[Part, Sequence[Peak]], alive: Mapping[int, Alive]) -> Stretches:
    """The candidate peaks of four stretches of a step, in their order."""
    return tuple(
        tuple(
            Scene(peak.total, _large(alive[peak.place]))
            for peak in above_others(
                sorted((peak for part in stretch for peak in parts.get(part, ())), key=lambda p: p.place)
            )
        )
        for stretch in STRETCHES
    )
