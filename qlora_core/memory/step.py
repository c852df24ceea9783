"""One training step on the tape, with two decoder layers standing for all: its candidate peaks as polynomials.

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
from functools import lru_cache, partial
from operator import itemgetter
from typing import Literal, NamedTuple, TypeVar

from qlora_core.memory import operators as op
from qlora_core.memory.decoder import ROW, Layer, Positions, decoder_layer, module, norm, parameter
from qlora_core.memory.device import MIB
from qlora_core.memory.experts import trainable_numel
from qlora_core.memory.tape import (
    ITEMSIZE,
    LEAF_ORDER,
    NOTHING,
    Alive,
    Change,
    Node,
    Room,
    Size,
    Tape,
    Tensor,
    Total,
    Where,
    alive_at,
    by_room,
    sum_of,
    totals,
)
from qlora_core.strategy import Loss

FIRST, LAST = "first layer", "last layer"
LOSS = ("final norm", "loss")
GRADIENTS: Room = "gradients"
BUFFERS: Room = "communication_buffers"
Handling = Literal["kept", "accumulated", "moved", "taken"]
"""What becomes of a gradient in the backward pass: it is kept; added to one that is there already; added to one that is
there and moved into a bucket with it (DDP); or taken away into a bucket (ZeRO-2 and 3)."""
Part = tuple[str, str]
"""A phase and one of its parts, the first two words of a `Where`."""
ANY_RANK = 1 << 128
"""The adapters' rank while the tape runs: so far above every coefficient that what a size owes to it can be told."""
Logits = Literal["plain", "scaled", "capped"]
Kept = tuple[Room, Size]
"""A storage that a layer keeps: what it is counted in, and its bytes."""
CHUNK_ROW = Size(per_chunk_token=1)
"""One element per token of a chunk of the loss."""


class Step(NamedTuple):
    """What decides the timeline of a training step, whatever its micro-batch and sequence length.

    Attributes:
        layer: one decoder layer.
        layers: how many there are.
        unlike: a layer that keeps something else for the backward pass; None where all are alike.
        unlike_layers: how many of those there are among the others.
        masks: kinds of eager attention masks: of layers with a sliding window, of those without.
        vocab: V.
        tied: the output head is the token embedding.
        checkpointing: gradient checkpointing of each layer.
        input_needs_gradient: the embedding's output is made a leaf (enable_input_require_grads).
        reentrant: checkpointing by use_reentrant=True.
        logits: what becomes of the output head's product before the loss.
        loss: "full" or "chunked".
        output_held: the model's output, logits and graph, stays until the step ends.
        gradients: what becomes of them.
        layer_gradients: bytes of one layer's gradients.
        bucket: the buffer they are reduced in, if it is made by the backward pass; 0 if not.
        layers_to_flush: ZeRO-2: layers of the backward pass after which the bucket is full; 0 if it holds all.
        part: bytes into which a flushed bucket's own part is copied.
        reduced_after: gradients are reduced after the backward pass only (ZeRO-1): bytes by which that exceeds its end.
        sharded: no gradient but one part is left for the optimizer.
        fetched: ZeRO-3's buffer of weights fetched ahead, used up when the output head runs.
    """

    layer: Layer
    layers: int
    unlike: Layer | None
    unlike_layers: int
    masks: int
    vocab: int
    tied: bool
    checkpointing: bool
    input_needs_gradient: bool
    reentrant: bool
    logits: Logits
    loss: Loss
    output_held: bool
    gradients: Handling
    layer_gradients: int
    bucket: int
    layers_to_flush: int
    part: int
    reduced_after: int
    sharded: bool
    fetched: int


class Peak(NamedTuple):
    """A place of the tape's log at which memory may peak: what is alive there, and what the layers in between add."""

    total: Size
    """Both together."""
    where: Where
    place: int
    added: dict[Room, Size]


class Candidate(NamedTuple):
    """A moment at which memory may peak, middle layers included: size by room, and the sum of the rooms."""

    where: Where
    rooms: dict[Room, Size]
    total: Size


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


class Recording(NamedTuple):
    """The tape's log of a step, at any rank.

    Attributes:
        changes: as `Change` has them, with a place in `sizes` for the size.
        summed: what is added to in place, with a place in `sizes`, and where.
        sizes: what is there whatever the rank, and what each unit of it adds.
        marks: places in the log after each layer.
        forward_end: the place in the log at which the forward pass has ended.
        copies: numbers of the storages that autocast keeps until then.
    """

    changes: tuple[tuple[int, int, Room | None, Where | None], ...]
    summed: tuple[tuple[int, Where], ...]
    sizes: tuple[tuple[Size, Size], ...]
    marks: tuple[int, ...]
    forward_end: int
    copies: frozenset[int]

    def at_rank(self, rank: int) -> list[Change]:
        """The log."""
        sizes = self.sizes_at_rank(rank)
        return [(number, sizes[place], room, where) for number, place, room, where in self.changes]

    def sizes_at_rank(self, rank: int) -> list[Size]:
        """What the places in `sizes` stand for."""
        return [fixed.plus(more.times(rank)) for fixed, more in self.sizes]


@lru_cache(maxsize=64)
def recorded(step: Step) -> Recording:
    """The tape's log of a step with the rank `ANY_RANK`: all sizes are linear in it.

    Raises:
        ValueError: nothing is trained.
    """
    tape = Tape(step.gradients == "kept", step.bucket)
    marks: list[int] = []
    held = forward(tape, step, marks)
    if held[0].node is None:
        raise ValueError("nothing is trained: the recipe's targets name no linear layer of the model")
    copies = {copy.storage.number for copy in tape.copies if copy.storage is not None}
    tape.copies.clear()
    forward_end = len(tape.log)
    tape.backward(held[0])
    log = list(tape.log)
    del held
    tape.leaves.clear()  # they refer to the tape: no garbage is left to the cycle collector
    places: dict[Size, int] = {}
    changes = tuple((number, places.setdefault(size, len(places)), room, where) for number, size, room, where in log)
    summed = tuple((places.setdefault(size, len(places)), where) for size, where in tape.summed)
    return Recording(changes, summed, tuple(map(_by_rank, places)), tuple(marks), forward_end, frozenset(copies))


def _by_rank(size: Size) -> tuple[Size, Size]:
    """What of a size is there whatever the rank, and what each unit of it adds."""
    parts = [divmod(coefficient, ANY_RANK) for coefficient in size]
    return Size(*(fixed for _, fixed in parts)), Size(*(more for more, _ in parts))


def on_tape(step: Step) -> Step:
    """What of a step its tape depends on; steps that differ in the rest share one."""
    layer, experts = step.layer, step.layer.experts
    if experts is not None:
        ranks = (experts.router_rank, experts.gate_up_rank, experts.down_rank)
        router, gate_up, down = (rank // layer.rank * ANY_RANK for rank in ranks)
        experts = experts._replace(router_rank=router, gate_up_rank=gate_up, down_rank=down)
    return step._replace(
        layer=layer._replace(rank=ANY_RANK, experts=experts),
        layers=min(step.layers, 2),
        unlike=None,
        unlike_layers=0,
        gradients=step.gradients if step.gradients == "kept" else "taken",
        layer_gradients=0,
        layers_to_flush=0,
        part=0,
        reduced_after=0,
        sharded=False,
    )


class Moments(NamedTuple):
    """What steps with the same tape and rank share.

    Attributes:
        parts: the candidate peaks of each part of a step, as two layers make them.
        alive: what was alive at those, after each layer, and at the ends of both passes.
    """

    recording: Recording
    parts: dict[Part, tuple[Peak, ...]]
    alive: dict[int, Alive]
    stretches: Stretches


@lru_cache(maxsize=64)
def _moments(step: Step, rank: int) -> Moments:
    """Those of a step `on_tape`."""
    recording = recorded(step)
    log = recording.at_rank(rank)
    parts = _peaks_by_part(log)
    places = (peak.place for peaks in parts.values() for peak in peaks)
    alive = alive_at(log, [*recording.marks, recording.forward_end, len(log), *places])
    return Moments(recording, parts, alive, _stretches(parts, alive))


@lru_cache(maxsize=512)
def timeline(step: Step) -> Timeline:
    """The candidate peaks of a step; none of those kept is below another for every size.

    Raises:
        ValueError: nothing is trained.
    """
    recording, parts, alive, stretches = _moments(on_tape(step), step.layer.rank)
    marks, end = recording.marks, len(recording.changes)
    middle = max(step.layers - 2, 0)
    in_between = Counter[Kept]()
    kept: dict[Room, Size] = {}
    forgotten: dict[Room, Size] = {}
    if middle:
        before, after = (alive[mark] for mark in marks)
        in_between = _kept_in_between(step, middle, before, after)
        for (room, size), count in in_between.items():
            kept[room] = kept.get(room, NOTHING).plus(size.times(count))
        gone_by_then = recording.copies & after.keys() - before.keys() - alive[recording.forward_end].keys()
        of_copies = by_room({number: after[number] for number in gone_by_then})
        forgotten = {room: size.times(-middle) for room, size in of_copies.items()}
    made = _made(step, middle)
    kept_after = _sum(kept, forgotten)
    peaks = [*_with_middle(parts, kept, kept_after, made), *_after_flush(step, middle, parts, kept_after)]
    left = _sum(by_room(alive[end]), made)
    if step.reduced_after:
        added = _sum(made, {GRADIENTS: Size(fixed=step.reduced_after)})
        total = sum_of(left.values()).plus(Size(fixed=step.reduced_after))
        peaks.append(Peak(total, ("backward", "gradient reduction"), end, added))
    gone: tuple[Room, ...] = () if step.output_held else ("activations", "logits_and_loss")
    if step.sharded or step.gradients == "moved":
        gone += (GRADIENTS, BUFFERS)
    rest = {room: size for room, size in left.items() if room not in gone}
    return Timeline(
        forward=_candidates(alive, (peak for peak in peaks if peak.where[0] == "forward")),
        backward=_candidates(alive, (peak for peak in peaks if peak.where[0] == "backward")),
        after_backward=Candidate(("backward", FIRST), rest, sum_of(rest.values())),
        stretches=stretches,
        kept=tuple((size, count) for (_, size), count in in_between.items() if _may_be_large(size)),
    )


def _kept_in_between(step: Step, middle: int, before: Alive, after: Alive) -> Counter[Kept]:
    """What the layers in between keep; what is alive `before` and `after` the last one runs forward is given."""
    unlike = min(step.unlike_layers, middle) if step.unlike is not None else 0
    kept = _kept(before, after, middle - unlike)
    if step.unlike is not None:
        recording = recorded(on_tape(step._replace(layer=step.unlike)))
        alive = alive_at(recording.at_rank(step.unlike.rank), recording.marks)
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
        part: tuple(Peak(Size(*total), where, place, {}) for total, where, place in above_others(found))
        for part, found in parts.items()
    }


def _made(step: Step, middle: int) -> dict[Room, Size]:
    """What the backward pass of the layers in between leaves, or takes away."""
    if step.gradients == "kept":
        # what the tape's two layers do not have: linears that stand for several, or work beside them (shared experts)
        beside = min(step.layers, 2) * (step.layer_gradients - gradient_bytes(step.layer))
        return {GRADIENTS: Size(fixed=middle * step.layer_gradients + beside)}
    if step.gradients == "moved":
        return {GRADIENTS: Size(fixed=-(step.layers - 1) * step.layer_gradients)}
    return {GRADIENTS: Size(fixed=step.part)} if step.layers_to_flush else {}


def _after_flush(
    step: Step, middle: int, parts: Mapping[Part, Sequence[Peak]], kept: dict[Room, Size]
) -> Iterator[Peak]:
    """The backward pass of the layer in which ZeRO-2's bucket is full for the first time."""
    if not step.layers_to_flush:
        return
    done = min(step.layers_to_flush - 1, middle)
    left = {room: size.times(middle - done) if middle else size for room, size in _one_layer(kept, middle).items()}
    left[GRADIENTS] = Size(fixed=step.part)
    more = sum_of(left.values())
    for peak in parts["backward", LAST]:
        yield peak._replace(total=peak.total.plus(more), added=left)


def _one_layer(kept: dict[Room, Size], middle: int) -> dict[Room, Size]:
    """What one layer's forward pass keeps, from what `middle` of them keep."""
    return {room: Size(*(coefficient // middle for coefficient in size)) for room, size in kept.items()}


def forward(tape: Tape, step: Step, marks: list[int]) -> tuple[Tensor, ...]:
    """The forward pass; the loss first, then what a caller of transformers holds on to beside it."""
    with tape.at("forward", "embedding"):
        fetched = tape.new(Size(fixed=step.fetched), "int8", BUFFERS)
    held = [decoder(tape, step, marks)]
    del fetched
    if step.loss == "chunked":
        return (chunked_loss(tape, step, held[0]),)
    return full_loss(tape, step, held)


def decoder(tape: Tape, step: Step, marks: list[int]) -> Tensor:
    """Embedding, layers, final norm: [T] -> [T, H]. `marks` gets the place in the log after each layer."""
    layer = step.layer
    with tape.at("forward", "embedding"):
        hidden = embedded = embedding(tape, step)
        if layer.scaled:
            hidden = embedded = op.scale(tape, embedded)
        positions = Positions(
            tape.new(Size(per_position=layer.shape.dim), layer.stream),
            tape.new(Size(per_position=layer.shape.dim), layer.stream),
            _mask(tape, step),
        )
    run = partial(decoder_layer, tape, layer, positions)
    for name in (FIRST, LAST) if step.layers > 1 else (LAST,):
        with tape.at("forward", name):
            if step.reentrant:
                hidden = tape.reentrant_checkpoint(run, hidden)
            else:
                hidden = tape.checkpoint(run, hidden) if step.checkpointing else run(hidden)
        marks.append(len(tape.log))
    with tape.at("forward", "final norm"):
        hidden = norm(tape, layer, hidden, ROW)
    del embedded  # transformers' inputs_embeds lives as long as its forward pass
    return hidden


def _mask(tape: Tape, step: Step) -> Tensor | None:
    """The mask that layers share: added to eager scores, or of booleans."""
    layer = step.layer
    if layer.kernel == "eager":
        return tape.new(Size(per_score=step.masks), layer.stream)
    return tape.new(Size(per_score=1), "bool") if layer.kernel == "masked" else None


def embedding(tape: Tape, step: Step) -> Tensor:
    """The token embedding's output, made a leaf where peft has to make it need a gradient."""
    layer = step.layer
    numel = ROW.times(layer.hidden)
    weight = parameter(tape, layer, step.vocab * layer.hidden, layer.stream)
    if layer.trained and step.tied:
        # added to the output head's gradient, which is there already
        weight.node = Node(LEAF_ORDER, (), lambda gradient: (), tape.where[1:])
    output = tape.apply(
        (weight,), numel, layer.stream, lambda gradient, saved: (tape.new(weight_numel, gradient.dtype),)
    )
    weight_numel = weight.numel
    return tape.leaf(output, "activations") if step.input_needs_gradient and not layer.trained else output


@module
def head(tape: Tape, step: Step, hidden: Tensor, rows: Size) -> Tensor:
    """The output head: [rows, H] -> [rows, V]."""
    layer = step.layer
    weight = parameter(tape, layer, step.vocab * layer.hidden, layer.stream)
    hidden, weight = op.narrowed(tape, hidden, layer.narrow), op.narrowed(tape, weight, layer.narrow)
    return op.matmul_weight(tape, hidden, weight, rows, layer.hidden, step.vocab)


def cross_entropy(tape: Tape, logits: Tensor) -> Tensor:
    """The loss of float32 copies of the logits."""
    wide = op.cast(tape, logits, "float32")
    return op.negative_log_likelihood(tape, op.log_softmax(tape, wide))


def full_loss(tape: Tape, step: Step, held: list[Tensor]) -> tuple[Tensor, ...]:
    """The loss of all logits at once, and the logits where the caller holds the model's output.

    In transformers' own loss the hidden states, which are `held`, live on; ours comes after the model has returned.
    """
    with tape.at("forward", "loss"), tape.into("logits_and_loss"):
        logits = head(tape, step, held[0], ROW)
        if not step.output_held:
            held.clear()
        if step.logits == "scaled":
            logits = op.scale(tape, logits)
        elif step.logits == "capped":
            logits = op.soft_capped(tape, logits)
        loss = cross_entropy(tape, logits)
        return (loss, logits) if step.output_held else (loss,)


def chunked_loss(tape: Tape, step: Step, hidden: Tensor) -> Tensor:
    """The loss of LOSS_CHUNK_TOKENS labelled tokens at a time, each chunk checkpointed; one chunk stands for all."""
    with tape.at("forward", "loss"):
        hidden = op.gather_rows(tape, hidden, hidden.numel)
        with tape.into("logits_and_loss"):
            chunk = op.slice_of(tape, hidden, CHUNK_ROW.times(step.layer.hidden))
            return tape.checkpoint(lambda x: cross_entropy(tape, head(tape, step, x, CHUNK_ROW)), chunk)


def gradient_bytes(layer: Layer) -> int:
    """Gradients of one layer's trainable weights, as the tape makes them."""
    projections = [*layer.qkv, layer.output, *layer.feed_forward]
    if layer.shared_gate is not None:
        projections.append(layer.shared_gate)
    of_experts = trainable_numel(layer.experts) if layer.experts is not None else 0
    if layer.trained:
        norms = (2 - layer.parallel) * layer.hidden if layer.scaled_norm else 0
        return (sum(p.in_features * p.out_features for p in projections) + of_experts + norms) * ITEMSIZE[layer.stream]
    numel = sum(layer.rank * (p.in_features + p.out_features) for p in projections if p.adapter)
    return (numel + of_experts) * ITEMSIZE[layer.lora]


def _with_middle(
    parts: Mapping[Part, Sequence[Peak]],
    kept: dict[Room, Size],
    kept_after: dict[Room, Size],
    gradients: dict[Room, Size],
) -> list[Peak]:
    """Each with the layers between the first and the last: before they run, after, or after their backward pass.

    What they keep is less once the forward pass has ended, and with it autocast.
    """
    nothing: dict[Room, Size] = {}
    peaks: list[Peak] = []
    for (phase, part), found in parts.items():
        added = nothing if phase == "forward" else gradients
        if part not in ("embedding", FIRST):
            added = kept if phase == "forward" else kept_after
        more = sum_of(added.values())
        peaks += [peak._replace(total=peak.total.plus(more), added=added) for peak in found]
    return sorted(peaks, key=lambda peak: peak.place)


def _candidates(alive: Mapping[int, Alive], peaks: Iterable[Peak]) -> tuple[Candidate, ...]:
    """Those of `peaks` that are the highest for some size."""
    kept = above_others(peaks)
    return tuple(Candidate(peak.where, _sum(by_room(alive[peak.place]), peak.added), peak.total) for peak in kept)


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
    return any(size[1:]) or size.fixed > MIB


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
    stretches = (("forward", (FIRST, LAST)), ("forward", LOSS), ("backward", LOSS), ("backward", (LAST,)))
    return tuple(
        tuple(
            Scene(peak.total, _large(alive[peak.place]))
            for peak in above_others(
                sorted((peak for name in names for peak in parts.get((phase, name), ())), key=lambda p: p.place)
            )
        )
        for phase, names in stretches
    )
