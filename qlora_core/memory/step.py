"""One training step on the tape, two or three decoder layers standing for all: what comes and goes, in its order.

`timeline.py` finds the peaks in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from typing import Literal, NamedTuple

from qlora_core.memory import operators as op
from qlora_core.memory.decoder import decoder_layer, norm
from qlora_core.memory.experts import trainable_numel
from qlora_core.memory.families import WRITTEN_OUT
from qlora_core.memory.layer import ROW, Layer, Positions, module, parameter
from qlora_core.memory.tape import (
    ITEMSIZE,
    Change,
    Gradients,
    Room,
    Size,
    Tape,
    Tensor,
    Where,
)
from qlora_core.strategy import Loss

FIRST, MIDDLE, LAST = "first layer", "layer in between", "last layer"
GRADIENTS: Room = "gradients"
BUFFERS: Room = "communication_buffers"
Handling = Literal["kept", "accumulated", "moved", "taken"]
"""What becomes of a gradient in the backward pass: it is kept; added to one that is there already; added to one that is
there and moved into a bucket with it (DDP); or taken away into a bucket (ZeRO-2 and 3)."""
ANY_RANK = 1 << 128
"""The adapters' rank while the tape runs: so far above every coefficient that what a size owes to it can be told."""
ANY_FETCHED = 1 << 256
"""The buffer of weights fetched ahead while the tape runs: above all that is made of the rank."""
Logits = Literal["plain", "scaled", "capped"]
CHANGES: dict[Logits, tuple[Callable[[Tape, Tensor], Tensor], ...]] = {
    "plain": (),
    "scaled": (op.scale,),
    "capped": op.SOFT_CAP,
}
"""What becomes of the output head's product before the loss."""
CHUNK_ROW = Size(per_chunk_token=1)
"""One element per token of a chunk of the loss."""


class Step(NamedTuple):
    """What decides the timeline of a training step, whatever its micro-batch and sequence length.

    Attributes:
        layer: one decoder layer, the last one of a period.
        others: those before it in a period, where layers of several kinds take turns.
        layers: how many periods there are; what is said of layers below is said of these.
        unlike: a layer that keeps something else for the backward pass; None where all are alike.
        unlike_layers: how many of those there are among the others.
        masks: how many attention masks there are where the kernel takes any: of layers with a sliding window, and of
            those without.
        vocab: V.
        positions: rows of a table of learned positions; 0 without.
        dropped_embedding: what the layers begin with passes a dropout of the base model's own.
        tied: the output head is the token embedding.
        checkpointing: gradient checkpointing of each layer.
        input_needs_gradient: the embedding's output is made a leaf (enable_input_require_grads).
        reentrant: checkpointing by use_reentrant=True.
        logits: what becomes of the output head's product before the loss.
        loss: "full", "chunked" or "liger".
        chunks: how many of the loss there are on the tape: two if a trained output head has several, else one.
        output_held: the model's output, logits and graph, stays until the step ends.
        caches_casts: autocast keeps narrow copies of trained weights until it ends.
        gradients: what becomes of them.
        layer_gradients: bytes of one layer's gradients.
        bucket: the buffer they are reduced in, if it is made by the backward pass; 0 if not.
        layers_to_flush: ZeRO 2 and 3: layers of the backward pass after which the bucket is full; 0 if it holds all.
        part: bytes that there are more from then on: in ZeRO-2 what the bucket's own part is copied into.
        head_reduced: bytes by which reducing a trained head's gradient exceeds the end of its backward pass.
        reduced_after: gradients are reduced after the backward pass only: bytes by which that exceeds its end.
        sharded: no gradient but one part is left for the optimizer.
        fetched: ZeRO-3's buffer of weights fetched ahead, used up when the output head runs.
    """

    layer: Layer
    others: tuple[Layer, ...]
    layers: int
    unlike: Layer | None
    unlike_layers: int
    masks: int
    vocab: int
    positions: int
    dropped_embedding: bool
    tied: bool
    checkpointing: bool
    input_needs_gradient: bool
    reentrant: bool
    logits: Logits
    loss: Loss
    chunks: int
    output_held: bool
    caches_casts: bool
    gradients: Handling
    layer_gradients: int
    bucket: int
    layers_to_flush: int
    part: int
    head_reduced: int
    reduced_after: int
    sharded: bool
    fetched: int

    @property
    def period(self) -> tuple[Layer, ...]:
        """The layers of one."""
        return *self.others, self.layer


class Recording(NamedTuple):
    """The tape's log of a step, at any rank and with any buffer of weights fetched ahead.

    Attributes:
        changes: as `Change` has them, with a place in `sizes` for the size.
        summed: what is added to in place, with a place in `sizes`, and where.
        sizes: what is there in any case, what each unit of the rank adds, and whether it is that buffer.
        marks: places in the log after each layer.
        forward_end: the place in the log at which the forward pass has ended.
        loss_end: the place at which the backward pass of all behind the layers has.
        copies: numbers of the storages that autocast keeps until then.
    """

    changes: tuple[tuple[int, int, Room | None, Where | None], ...]
    summed: tuple[tuple[int, Where], ...]
    sizes: tuple[tuple[Size, Size, int], ...]
    marks: tuple[int, ...]
    forward_end: int
    loss_end: int
    copies: frozenset[int]

    def of(self, step: Step) -> list[Change]:
        """The log of a step with this tape."""
        sizes = self.sizes_of(step)
        return [(number, sizes[place], room, where) for number, place, room, where in self.changes]

    def sizes_of(self, step: Step) -> list[Size]:
        """What the places in `sizes` stand for."""
        rank, fetched = step.layer.rank, Size(fixed=step.fetched)
        return [fetched if is_fetched else fixed.plus(more.times(rank)) for fixed, more, is_fetched in self.sizes]


@lru_cache(maxsize=128)
def recorded(step: Step) -> Recording:
    """The tape's log of a step `on_tape`: all sizes are linear in its rank, `ANY_RANK`.

    Raises:
        ValueError: nothing is trained.
    """
    tape = Tape(step.gradients == "kept", step.bucket, step.caches_casts)
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
    tape.tied = None
    tape.held.clear()
    tape.leaves.clear()  # they refer to the tape: no garbage is left to the cycle collector
    places: dict[Size, int] = {}
    changes = tuple((number, places.setdefault(size, len(places)), room, where) for number, size, room, where in log)
    summed = tuple((places.setdefault(size, len(places)), where) for size, where in tape.summed)
    in_layers = (at for at, (*_, where) in enumerate(log) if where is not None and where[:2] == ("backward", LAST))
    ends = forward_end, next(in_layers, len(log))
    return Recording(changes, summed, tuple(map(_parts_of, places)), tuple(marks), *ends, frozenset(copies))


def _parts_of(size: Size) -> tuple[Size, Size, int]:
    """What of a size is there in any case, what each unit of the rank adds, and whether it is `ANY_FETCHED`."""
    is_fetched, fixed = divmod(size.fixed, ANY_FETCHED)
    parts = [divmod(coefficient, ANY_RANK) for coefficient in (fixed, *size[1:])]
    return Size(*(fixed for _, fixed in parts)), Size(*(more for more, _ in parts)), is_fetched


def on_tape(step: Step) -> Step:
    """What of a step its tape depends on; steps that differ in the rest share one."""
    *others, layer = map(_at_any_rank, step.period)
    return step._replace(
        layer=layer,
        others=tuple(others),
        layers=min(step.layers, 2),
        unlike=None,
        unlike_layers=0,
        gradients=step.gradients if step.gradients == "kept" else "taken",
        layer_gradients=0,
        layers_to_flush=0,
        part=0,
        head_reduced=0,
        reduced_after=0,
        sharded=False,
        fetched=ANY_FETCHED if step.fetched else 0,
    )


def _at_any_rank(layer: Layer) -> Layer:
    """`layer` with adapters of `ANY_RANK`."""
    experts = layer.experts
    if experts is not None:
        ranks = (experts.router_rank, experts.gate_up_rank, experts.down_rank)
        router, gate_up, down = (rank // layer.rank * ANY_RANK for rank in ranks)
        experts = experts._replace(router_rank=router, gate_up_rank=gate_up, down_rank=down)
    return layer._replace(rank=ANY_RANK, experts=experts)


def undivided(step: Step) -> Step:
    """A step with the same tensors but for gradients and the buffers that dividing takes: it needs no more."""
    return step._replace(
        gradients="taken",
        layer_gradients=0,
        bucket=0,
        layers_to_flush=0,
        part=0,
        head_reduced=0,
        reduced_after=0,
        sharded=False,
        fetched=0,
    )


def forward(tape: Tape, step: Step, marks: list[int]) -> tuple[Tensor, ...]:
    """The forward pass; the loss first, then what a caller of transformers holds on to beside it."""
    with tape.at("forward", "embedding"):
        fetched = tape.new(Size(fixed=step.fetched), "int8", BUFFERS)
    held = [decoder(tape, step, marks)]
    del fetched
    return full_loss(tape, step, held) if step.loss == "full" else (chunked_loss(tape, step, held),)


def decoder(tape: Tape, step: Step, marks: list[int]) -> Tensor:
    """Embedding, layers, final norm: [T] -> [T, H]. `marks` gets the place in the log after each layer."""
    layer = step.layer
    with tape.at("forward", "embedding"):
        hidden = embedded = embedding(tape, step)
        if layer.family.scaled:
            hidden = embedded = op.scale(tape, embedded)
        if step.positions:
            hidden, learned = with_positions(tape, step, embedded)
        if layer.family.normed_embedding:
            hidden = norm(tape, layer, embedded, ROW)
        if step.dropped_embedding:
            hidden = op.dropout(tape, hidden, layer.shape.cuda)
        positions = Positions(
            tape.new(Size(per_position=layer.shape.dim), layer.stream),
            tape.new(Size(per_position=layer.shape.dim), layer.stream),
            _mask(tape, step),
        )
    returned: list[Tensor | None] = []

    def run(of: Layer, hidden: Tensor) -> Tensor:
        hidden, weights = decoder_layer(tape, of, positions, hidden)
        if layer.family.returns_weights and tape.where[0] == "forward":
            returned[:] = [weights]  # until the next layer has returned
        return hidden

    for name in (*(FIRST, MIDDLE)[: step.layers - 1], LAST):
        for number, of in enumerate(step.period):
            place = (str(number),) if step.others else ()
            with tape.at("forward", name, *place):
                if step.reentrant:
                    hidden = tape.reentrant_checkpoint(partial(run, of), hidden)
                else:
                    hidden = tape.checkpoint(partial(run, of), hidden) if step.checkpointing else run(of, hidden)
        marks.append(len(tape.log))
    with tape.at("forward", "final norm"):
        hidden = norm(tape, layer, hidden, ROW)
    returned.clear()
    del embedded  # transformers' inputs_embeds lives as long as its forward pass
    if step.positions:
        del learned
    return hidden


def _mask(tape: Tape, step: Step) -> Tensor | None:
    """The mask that layers share: added to eager scores, or of booleans."""
    layer = step.layer
    if layer.shape.scores == "shared":
        return tape.new(Size(per_score=layer.shape.queries), layer.stream)
    if layer.kernel == "eager":
        return tape.new(Size(per_score=step.masks), layer.stream)
    return tape.new(Size(per_score=step.masks), "bool") if layer.kernel in ("masked", "masked_math") else None


def embedding(tape: Tape, step: Step) -> Tensor:
    """The token embedding's output, made a leaf where peft has to make it need a gradient."""
    layer = step.layer
    numel = ROW.times(layer.hidden)
    weight = parameter(tape, layer, step.vocab * layer.hidden, layer.stream)
    if layer.trained and step.tied:
        tape.tied = weight
    output = tape.apply(
        (weight,), numel, layer.stream, lambda gradient, saved: (tape.new(weight_numel, gradient.dtype),)
    )
    weight_numel = weight.numel
    return tape.leaf(output, "activations") if step.input_needs_gradient and not layer.trained else output


def with_positions(tape: Tape, step: Step, embedded: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of embedding and learned positions [S, H], and these, which live as long as the decoder runs."""
    layer = step.layer
    weight = parameter(tape, layer, step.positions * layer.hidden, layer.stream)
    rows = tape.new(Size(per_position=layer.hidden), layer.stream)

    def backward(gradient: Tensor, saved: Sequence[Tensor]) -> Gradients:
        return gradient.alias(), tape.new(weight.numel, gradient.dtype) if layer.trained else None

    return tape.apply((embedded, weight), embedded.numel, layer.stream, backward), rows


def head_weight(tape: Tape, step: Step) -> Tensor:
    """The output head's: its gradient waits for the embedding's, where they are tied."""
    return tape.tied or parameter(tape, step.layer, step.vocab * step.layer.hidden, step.layer.stream)


@module
def head(tape: Tape, step: Step, hidden: Tensor, weight: Tensor, rows: Size) -> Tensor:
    """The output head: [rows, H] -> [rows, V]."""
    layer = step.layer
    return op.linear(tape, hidden, weight, rows, layer.hidden, step.vocab, layer.narrow, layer.divided)


def cross_entropy(tape: Tape, logits: Tensor) -> Tensor:
    """The loss of float32 copies of the logits."""
    wide = op.cast(tape, logits, "float32")
    return op.negative_log_likelihood(tape, op.log_softmax(tape, wide))


def predicted(tape: Tape, step: Step, hidden: Tensor, weight: Tensor, rows: Size) -> Tensor:
    """The logits: what the model makes of its output head's product, one operator after the other."""
    logits = head(tape, step, hidden, weight, rows)
    for change in CHANGES[step.logits]:
        logits = change(tape, logits)
    return logits


def full_loss(tape: Tape, step: Step, held: list[Tensor]) -> tuple[Tensor, ...]:
    """The loss of all logits at once, and the logits where the caller holds the model's output.

    In transformers' own loss the hidden states, which are `held`, live on; ours comes after the model has returned.
    """
    with tape.at("forward", "loss"), tape.into("logits_and_loss"):
        logits = predicted(tape, step, held[0], head_weight(tape, step), ROW)
        if not step.output_held:
            held.clear()
        loss = cross_entropy(tape, logits)
        return (loss, logits) if step.output_held else (loss,)


def chunked_loss(tape: Tape, step: Step, held: list[Tensor]) -> Tensor:
    """The loss of LOSS_CHUNK_TOKENS labelled tokens at a time; one chunk stands for all.

    The hidden states, which are `held`, are let go of when those of labelled tokens are copied. A frozen head's chunk
    has its backward pass inside the forward pass; a trained one's is checkpointed. Of a trained head two stand for
    several: the gradient of the head that the second makes is added to the first one's. What all give the hidden states
    waits until the last has.
    """

    def logits(weight: Tensor, x: Tensor) -> Tensor:
        return predicted(tape, step, x, weight, CHUNK_ROW)

    def by_kernel(x: Tensor) -> Tensor:
        return op.liger_cross_entropy(tape, x, CHUNK_ROW, step.layer.hidden, step.vocab)

    rows = CHUNK_ROW.times(step.layer.hidden)
    with tape.at("forward", "loss"):
        hidden = op.gather_rows(tape, held[0], held[0].numel)
        held.clear()
        with tape.into("logits_and_loss"):
            of_chunk = partial(logits, head_weight(tape, step))
            if step.layer.trained:
                chunks = op.slices(tape, hidden, [rows] * step.chunks)
                del hidden
                losses = [tape.checkpoint(lambda x: cross_entropy(tape, of_chunk(x)), chunk) for chunk in chunks]
                return reduce(partial(op.add, tape), losses)
            if step.loss == "liger":
                return op.differentiated(tape, hidden, by_kernel, rows, lambda _: tape.new(Size(fixed=1), "float32"))
            return op.differentiated(tape, hidden, of_chunk, rows, partial(op.into_gradient, tape))


def period_gradient_bytes(step: Step) -> int:
    """Gradients of one period's trainable weights, as the tape makes them."""
    return sum(map(gradient_bytes, step.period))


def gradient_bytes(layer: Layer) -> int:
    """Gradients of one layer's trainable weights, as the tape makes them."""
    projections = [*layer.qkv, layer.output, *layer.feed_forward]
    if layer.shared_gate is not None:
        projections.append(layer.shared_gate)
    of_experts = trainable_numel(layer.experts) if layer.experts is not None else 0
    if layer.trained:
        norms = (2 - layer.parallel) * layer.hidden if layer.norm in WRITTEN_OUT else 0
        return (sum(p.in_features * p.out_features for p in projections) + of_experts + norms) * ITEMSIZE[layer.stream]
    numel = sum(
        layer.rank * (p.in_features + p.out_features) + layer.dora * p.out_features for p in projections if p.adapter
    )
    return (numel + of_experts) * ITEMSIZE[layer.lora]
