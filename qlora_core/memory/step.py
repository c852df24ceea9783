"""One training step on the tape, with two decoder layers standing for all: its candidate peaks as polynomials.

All layers are alike, so what layer i adds to what is alive is known from two of them: r bytes per layer that the
forward pass leaves, and g bytes of gradients that the backward pass leaves. The live memory while layer i works is
linear in i; its maximum lies at the first or at the last layer. The other n - 2 layers are put in between in closed
form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache, partial
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
    Node,
    Room,
    Size,
    Tape,
    Tensor,
    Where,
    by_room,
    sum_of,
)
from qlora_core.strategy import Loss

FIRST, LAST = "first layer", "last layer"
LOSS = ("final norm", "loss")
GRADIENTS: Room = "gradients"
BUFFERS: Room = "communication_buffers"
Handling = Literal["kept", "accumulated", "moved", "taken"]
"""What becomes of a gradient in the backward pass: it is kept; added to one that is there already; added to one that is
there and moved into a bucket with it (DDP); or taken away into a bucket (ZeRO-2 and 3)."""
Allocation = tuple[int, Where, Size]
"""See `Tape.totals`."""
Logits = Literal["plain", "scaled", "capped"]
CHUNK_ROW = Size(per_chunk_token=1)
"""One element per token of a chunk of the loss."""


class Step(NamedTuple):
    """What decides the timeline of a training step, whatever its micro-batch and sequence length.

    Attributes:
        layer: one decoder layer.
        layers: how many there are.
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


class Scene(NamedTuple):
    """A moment as the caching allocator sees it: storages by number, the two layers' and the loss's."""

    total: Size
    alive: dict[int, Size]


Moving = TypeVar("Moving", Peak, Candidate, Scene)


class Timeline(NamedTuple):
    """A step's candidate peaks by phase, and what is alive after the backward pass, while the optimizer works."""

    forward: tuple[Candidate, ...]
    backward: tuple[Candidate, ...]
    after_backward: Candidate
    stretches: tuple[tuple[Scene, ...], ...]
    """The candidate peaks of layers, loss, loss backward and last layer backward: what the allocator has to fit."""
    middle: Size
    """What the layers in between keep meanwhile."""


@lru_cache(maxsize=512)
def timeline(step: Step) -> Timeline:
    """The candidate peaks of a step; none of those kept is below another for every size.

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
    end = len(tape.log)
    del held
    tape.leaves.clear()  # they refer to the tape: no garbage is left to the cycle collector
    alive = tape.alive_at([*marks, forward_end, end])
    middle = max(step.layers - 2, 0)
    kept: dict[Room, Size] = {}
    forgotten: dict[Room, Size] = {}
    if middle:
        before, after = (alive[mark] for mark in marks)
        kept = {
            room: size.plus(before_it.times(-1)).times(middle)
            for room, size in by_room(after).items()
            for before_it in [by_room(before).get(room, NOTHING)]
        }
        gone_by_then = copies & after.keys() - before.keys() - alive[forward_end].keys()
        forgotten = {
            room: size.times(-middle) for room, size in by_room({each: after[each] for each in gone_by_then}).items()
        }
    made = _made(step, middle)
    allocations = list(tape.totals())
    kept_after = _sum(kept, forgotten)
    peaks = [*_with_middle(allocations, kept, kept_after, made), *_after_flush(step, middle, allocations, kept_after)]
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
        forward=_candidates(tape, (peak for peak in peaks if peak.where[0] == "forward")),
        backward=_candidates(tape, (peak for peak in peaks if peak.where[0] == "backward")),
        after_backward=Candidate(("backward", FIRST), rest, sum_of(rest.values())),
        stretches=_stretches(tape, allocations),
        middle=sum_of(kept.values()),
    )


def _made(step: Step, middle: int) -> dict[Room, Size]:
    """What the backward pass of the layers in between leaves, or takes away."""
    if step.gradients == "kept":
        # what the tape's two layers do not have: linears that stand for several, or work beside them (shared experts)
        beside = min(step.layers, 2) * (step.layer_gradients - gradient_bytes(step.layer))
        return {GRADIENTS: Size(fixed=middle * step.layer_gradients + beside)}
    if step.gradients == "moved":
        return {GRADIENTS: Size(fixed=-(step.layers - 1) * step.layer_gradients)}
    return {GRADIENTS: Size(fixed=step.part)} if step.layers_to_flush else {}


def _after_flush(step: Step, middle: int, allocations: Sequence[Allocation], kept: dict[Room, Size]) -> Iterator[Peak]:
    """The backward pass of the layer in which ZeRO-2's bucket is full for the first time."""
    if not step.layers_to_flush:
        return
    done = min(step.layers_to_flush - 1, middle)
    left = {room: size.times(middle - done) if middle else size for room, size in _one_layer(kept, middle).items()}
    left[GRADIENTS] = Size(fixed=step.part)
    more = sum_of(left.values())
    for place, where, total in allocations:
        if where[:2] == ("backward", LAST):
            yield Peak(total.plus(more), where, place, left)


def _one_layer(kept: dict[Room, Size], middle: int) -> dict[Room, Size]:
    """What one layer's forward pass keeps, from what `middle` of them keep."""
    return {room: Size(*(coefficient // middle for coefficient in size)) for room, size in kept.items()}


def forward(tape: Tape, step: Step, marks: list[int]) -> tuple[Tensor, ...]:
    """The forward pass; the loss first, then what a caller of transformers holds on to beside it."""
    with tape.at("forward", "embedding"):
        fetched = tape.new(Size(fixed=step.fetched), "int8", BUFFERS)
    hidden = decoder(tape, step, marks)
    del fetched
    if step.loss == "chunked":
        return (chunked_loss(tape, step, hidden),)
    return full_loss(tape, step, hidden)


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


def full_loss(tape: Tape, step: Step, hidden: Tensor) -> tuple[Tensor, ...]:
    """Transformers' causal loss, and the logits where the caller holds the model's output."""
    with tape.at("forward", "loss"), tape.into("logits_and_loss"):
        logits = head(tape, step, hidden, ROW)
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
    allocations: Sequence[Allocation],
    kept: dict[Room, Size],
    kept_after: dict[Room, Size],
    gradients: dict[Room, Size],
) -> Iterator[Peak]:
    """Each with the layers between the first and the last: before they run, after, or after their backward pass.

    What they keep is less once the forward pass has ended, and with it autocast.
    """
    nothing: dict[Room, Size] = {}
    of_kept, of_kept_after, of_gradients = (sum_of(each.values()) for each in (kept, kept_after, gradients))
    for place, where, total in allocations:
        if where[1] not in ("embedding", FIRST):
            forward = where[0] == "forward"
            yield Peak(total.plus(of_kept if forward else of_kept_after), where, place, kept if forward else kept_after)
        elif where[0] == "forward":
            yield Peak(total, where, place, nothing)
        else:
            yield Peak(total.plus(of_gradients), where, place, gradients)


def _candidates(tape: Tape, peaks: Iterable[Peak]) -> tuple[Candidate, ...]:
    """Those of `peaks` that are the highest for some size."""
    kept = _skyline(peaks)
    alive = tape.alive_at(peak.place for peak in kept)
    return tuple(Candidate(peak.where, _sum(by_room(alive[peak.place]), peak.added), peak.total) for peak in kept)


def _sum(rooms: dict[Room, Size], more: dict[Room, Size]) -> dict[Room, Size]:
    """Both together, room by room."""
    total = dict(rooms)
    for room, size in more.items():
        total[room] = total.get(room, NOTHING).plus(size)
    return total


def _skyline(candidates: Iterable[Moving]) -> tuple[Moving, ...]:
    """Those that are above all others for some size: no other is at least as large in every coefficient."""
    kept: list[Moving] = []
    for candidate in sorted(candidates, key=lambda c: c.total, reverse=True):
        _, b, c, d, e = candidate.total  # in this order, no `fixed` is larger than one before
        for other in kept:
            _, q, r, s, t = other.total
            if q >= b and r >= c and s >= d and t >= e:
                break
        else:
            kept.append(candidate)
    return tuple(kept)


def _large(alive: Alive) -> dict[int, Size]:
    """Without what is small at every size of the input: it lies in small segments."""
    return {number: size for number, (_, size) in alive.items() if any(size[1:]) or size.fixed > MIB}


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


def _stretches(tape: Tape, allocations: Sequence[Allocation]) -> tuple[tuple[Scene, ...], ...]:
    """The candidate peaks of four stretches of a step, in their order."""
    stretches = (("forward", (FIRST, LAST)), ("forward", LOSS), ("backward", LOSS), ("backward", (LAST,)))
    skylines = [
        _skyline(
            Peak(total, where, place, {})
            for place, where, total in allocations
            if where[0] == phase and where[1] in parts
        )
        for phase, parts in stretches
    ]
    alive = tape.alive_at(peak.place for skyline in skylines for peak in skyline)
    return tuple(tuple(Scene(peak.total, _large(alive[peak.place])) for peak in skyline) for skyline in skylines)
