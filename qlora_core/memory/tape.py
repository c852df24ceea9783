"""A tape: a miniature of PyTorch's autograd that moves sizes instead of numbers, and so finds when memory peaks.

The programs that run on it (`decoder.py`, `step.py`) are transformers', peft's and bitsandbytes' forward passes with
the arithmetic left out. A `Tensor` here holds a `Storage` that has only a size; CPython's reference counting releases
it at the very line where it would release the real tensor, and autograd's own rules say what is saved, in what order
the backward pass runs, and where gradients are summed in place. Nothing about the peak is assumed.

A size is a polynomial in what a search varies, so one run of the tape serves every micro-batch and sequence length:

    bytes = fixed + per_position * S + per_token * B*S + per_score * B*S*S + per_chunk_token * C

with S the sequence length, B the micro-batch and C the tokens of one chunk of the loss.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Literal, NamedTuple

Room = Literal["activations", "logits_and_loss", "dequantization_workspace", "gradients", "communication_buffers"]
DType = Literal["float32", "bfloat16", "float16", "int64", "int32", "int8", "bool"]
Where = tuple[str, ...]
Gradients = Sequence["Tensor | None"]

ITEMSIZE: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int8": 1, "bool": 1}
LEAF_ORDER = 1 << 62
"""AccumulateGrad runs before all else that is ready (torch/csrc/autograd/function.h: sequence number UINT64_MAX)."""


class Size(NamedTuple):
    """Coefficients of 1, S, B*S, B*S*S and C; of bytes or of elements."""

    fixed: int = 0
    per_position: int = 0
    per_token: int = 0
    per_score: int = 0
    per_chunk_token: int = 0

    def plus(self, other: Size) -> Size:
        """The sum."""
        a, b, c, d, e = self
        p, q, r, s, t = other
        return Size(a + p, b + q, c + r, d + s, e + t)

    def times(self, factor: int) -> Size:
        """A whole multiple; by -1 it takes away."""
        a, b, c, d, e = self
        return Size(a * factor, b * factor, c * factor, d * factor, e * factor)


NOTHING = Size()


def sum_of(sizes: Iterable[Size]) -> Size:
    """Their sum."""
    a = b = c = d = e = 0
    for p, q, r, s, t in sizes:
        a, b, c, d, e = a + p, b + q, c + r, d + s, e + t
    return Size(a, b, c, d, e)


def value(size: Size, variables: Sequence[int]) -> int:
    """The polynomial at the values of 1, S, B*S, B*S*S and C."""
    a, b, c, d, e = size
    one, positions, tokens, scores, chunk = variables
    return a * one + b * positions + c * tokens + d * scores + e * chunk


Change = tuple[int, Size, Room | None, Where | None]
"""A storage that comes, goes, or is counted in another room from now on: its number, which is its place in the log; its
bytes; what it is counted in, None where it goes; where it was allocated, None for any other change. A peak can be just
after an allocation only."""
Total = tuple[int, int, int, int, int]
"""The coefficients of a `Size`, of many of which only few are kept."""
Alive = dict[int, tuple[Room, Size]]
"""Every storage that is alive at one place of the log, by its number."""


class Storage:
    """Bytes that live as long as a tensor refers to them."""

    __slots__ = ("holders", "log", "number", "size")

    def __init__(self, tape: Tape, size: Size, room: Room) -> None:
        self.log, self.size, self.holders = tape.log, size, 0
        self.number = len(self.log)
        self.log.append((self.number, size, room, tape.where))

    def __del__(self) -> None:
        self.log.append((self.number, self.size, None, None))

    def move(self, room: Room) -> None:
        """Count these bytes in another room from now on."""
        self.log.append((self.number, self.size, room, None))


class Tensor:
    """A view of a storage, and the node that made it. A parameter has no storage here: weights are counted apart."""

    __slots__ = ("dtype", "node", "numel", "storage")

    def __init__(self, storage: Storage | None, numel: Size, dtype: DType, node: Node | None = None) -> None:
        self.storage, self.numel, self.dtype, self.node = storage, numel, dtype, node
        if storage is not None:
            storage.holders += 1

    def __del__(self) -> None:
        if self.storage is not None:
            self.storage.holders -= 1

    def alias(self, numel: Size | None = None, node: Node | None = None) -> Tensor:
        """Another tensor over the same storage."""
        return Tensor(self.storage, numel or self.numel, self.dtype, node)

    def move(self, room: Room) -> None:
        """Count its storage in another room from now on."""
        if self.storage is not None:
            self.storage.move(room)


class Node:
    """One step of the backward pass: takes its output's gradient, gives one for each input."""

    __slots__ = ("backward", "edges", "order", "room", "where")

    def __init__(
        self,
        order: int,
        edges: tuple[Node | None, ...],
        backward: Callable[[Tensor], Gradients],
        where: Where,
        room: Room = "activations",
    ) -> None:
        self.order, self.edges, self.where, self.room = order, edges, where, room
        self.backward = backward


class RecomputationDone(Exception):
    """All that a checkpointed function had saved has been computed again; the rest of its output is not needed."""


class Frame:
    """A checkpointed function: keeps its input and none of what it saves, and runs again when that is first asked for.

    As torch.utils.checkpoint does with use_reentrant=False (torch/utils/checkpoint.py), early stop included.
    """

    def __init__(self, tape: Tape, program: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.tape, self.program, self.x, self.where = tape, program, x, tape.where[1:]
        self.again = False
        self.saved = 0
        self.kept: dict[int, Tensor] = {}

    def save(self, tensor: Tensor) -> Callable[[], Tensor]:
        """First run: forget `tensor`, promise it. Second run: keep it for the first run's nodes."""
        if not self.again:
            index, self.saved = self.saved, self.saved + 1
            return lambda: self.take(index)
        self.kept[len(self.kept)] = tensor
        if len(self.kept) == self.saved:
            raise RecomputationDone
        return lambda: tensor

    def take(self, index: int) -> Tensor:
        """What the first run saved as number `index`; the checkpoint lets go of it."""
        if not self.again:
            self.again = True
            tape = self.tape
            with tape.inside(self), tape.at(tape.where[0], *self.where, "recomputed"), suppress(RecomputationDone):
                # detached: its gradient leads nowhere
                leaf = None if self.x.node is None else Node(0, (), lambda gradient: (), self.where)
                self.program(self.x.alias(node=leaf))
            tape.copies.clear()
        return self.kept.pop(index)


class Within:
    """One part of a tape's state is another inside a with statement; `contextmanager` would make a slower one."""

    __slots__ = ("name", "tape", "value")

    def __init__(self, tape: Tape, name: str, value: object) -> None:
        self.tape, self.name, self.value = tape, name, value

    def __enter__(self) -> None:
        outer = getattr(self.tape, self.name)
        setattr(self.tape, self.name, self.value)
        self.value = outer

    def __exit__(self, *_: object) -> None:
        setattr(self.tape, self.name, self.value)


class Tape:
    """The running state of a program, and the log of all that came and went: what was alive is read from it later.

    Args:
        keeps_gradients: whether gradients stay where the backward pass makes them; otherwise each goes, as soon as it
            is made, into memory that is counted elsewhere (earlier micro-batches' gradients, a bucket).
        bucket: bytes of the buffer that is made with the first gradient; 0 for none.
        caches_casts: whether autocast keeps its narrow copies of trained float32 leaves.
    """

    def __init__(self, keeps_gradients: bool = True, bucket: int = 0, caches_casts: bool = False) -> None:
        self.keeps_gradients = keeps_gradients
        self.bucket = bucket
        self.caches_casts = caches_casts
        self.log: list[Change] = []
        self.summed: list[tuple[Size, Where]] = []
        """What is added to in place, which allocates nothing and is in no log: its bytes, and where."""
        self.where: Where = ("forward",)
        self.room: Room = "activations"
        self.frame: Frame | None = None
        self.leaves: list[Tensor] = []
        self.held: list[Tensor] = []
        """What nodes that have run hold by themselves: it is not let go of before the graph is."""
        self.tied: Tensor | None = None
        """A trained weight that is used twice: the embedding's, which is the output head's, too."""
        self.copies: list[Tensor] = []
        """Autocast's cache: narrow copies of trained float32 leaves, until the outermost context ends."""
        self._order = 0

    def at(self, *where: str) -> Within:
        """Name where the program is; moments carry it."""
        return Within(self, "where", where)

    def into(self, room: Room) -> Within:
        """Count what is made in here in `room`."""
        return Within(self, "room", room)

    def inside(self, frame: Frame) -> Within:
        """Let `frame` decide what saving means."""
        return Within(self, "frame", frame)

    def new(self, numel: Size, dtype: DType, room: Room | None = None) -> Tensor:
        """A freshly allocated tensor."""
        return Tensor(Storage(self, numel.times(ITEMSIZE[dtype]), room or self.room), numel, dtype)

    def new_view(self, numel: Size, dtype: DType) -> Tensor:
        """A view of a freshly allocated tensor. It keeps its base, so that no other is added to it in place."""
        storage = Storage(self, numel.times(ITEMSIZE[dtype]), self.room)
        storage.holders += 1
        return Tensor(storage, numel, dtype)

    def save(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Keep `tensor` for the backward pass, as far as a checkpoint around allows; gives the way to get it back."""
        kept = tensor.alias()
        return self.frame.save(kept) if self.frame else lambda: kept

    def apply(
        self,
        inputs: Sequence[Tensor],
        numel: Size,
        dtype: DType,
        backward: Callable[[Tensor, Sequence[Tensor]], Gradients],
        saves: Sequence[Tensor] = (),
        saves_output: bool = False,
    ) -> Tensor:
        """An operator's output of `numel` elements.

        `backward` makes the inputs' gradients from the output's and from what was saved: `saves` and, with
        `saves_output`, the output.
        """
        for tensor in inputs:
            if tensor.node is not None:
                break
        else:
            return self.new(numel, dtype)
        kept = [self.save(tensor) for tensor in saves]
        output = self.new(numel, dtype)
        if saves_output:
            kept.append(self.save(output))
        output.node = self.node(inputs, lambda gradient: backward(gradient, [get() for get in kept]))
        return output

    def node(self, inputs: Sequence[Tensor], backward: Callable[[Tensor], Gradients]) -> Node:
        """A node of the backward pass for what is computed from `inputs`."""
        self._order += 1
        return Node(self._order, tuple([tensor.node for tensor in inputs]), backward, self.where[1:], self.room)

    def leaf(self, tensor: Tensor, room: Room) -> Tensor:
        """`tensor` as a leaf whose gradient is kept in `room` (AccumulateGrad steals a gradient nobody else refers to).

        The leaf stays too: its AccumulateGrad node holds it as long as the loss holds the graph.
        """
        kept = tensor.alias()

        def accumulate(gradient: Tensor) -> Gradients:
            if room == "gradients" and self.bucket:
                self.leaves.append(self.new(Size(fixed=self.bucket), "int8", "communication_buffers"))
                self.bucket = 0
            if self.keeps_gradients or room != "gradients":
                gradient.move(room)
                self.leaves.extend((gradient, kept))
            return ()

        tensor.node = Node(LEAF_ORDER, (), accumulate, self.where[1:], room)
        return tensor

    def checkpoint(self, program: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`program(x)`, nothing of it kept but `x`."""
        frame = Frame(self, program, x)
        with self.inside(frame):
            return program(x)

    def reentrant_checkpoint(self, program: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """As torch.utils.checkpoint does with use_reentrant=True.

        The function runs again to its end, and has a backward pass of its own inside the outer one.
        """
        kept, where = x.alias(), self.where[1:]

        def backward(gradient: Tensor) -> Gradients:
            arrived: list[Tensor] = []

            def arrive(of_x: Tensor) -> Gradients:
                arrived.append(of_x)
                return ()

            with self.at("backward", *where, "recomputed"):
                again = program(kept.alias(node=Node(LEAF_ORDER, (), arrive, where)))
            self.copies.clear()
            held_before = len(self.held)
            if again.node is not None:
                self.backward_from(again.node, gradient)
            del self.held[held_before:]
            return arrived

        with self.inside(Frame(self, program, x)):
            output = program(x)
        output.node = self.node((x,), backward)
        return output

    def backward(self, root: Tensor) -> None:
        """Run the backward pass from `root`, a scalar."""
        if root.node is None:
            return
        with self.at("backward", *root.node.where), self.into(root.node.room):
            self.backward_from(root.node, self.new(Size(fixed=1), "float32"))

    def backward_from(self, root: Node, gradient: Tensor, where: Where = ()) -> None:
        """Run the backward pass from the node `root`, whose output has this gradient, within the phase of now.

        It is `where` is said, or else where each node was made.
        """
        waiting = _dependencies(root)
        buffers = {root: gradient}
        del gradient
        ready = [(-root.order, 0, root)]
        pushed = 0
        outer = self.where, self.room
        while ready:
            node = heapq.heappop(ready)[2]
            self.where, self.room = where or (outer[0][0], *node.where), node.room
            edges, gradients = self._run(node, buffers)
            while edges:
                edge, arrived = edges.pop(), gradients.pop()
                if edge is None:
                    continue
                if arrived is not None:
                    self._add(buffers, edge, arrived)
                arrived = None
                waiting[edge] -= 1
                if waiting[edge]:
                    if edge.room == "gradients":  # a tied weight's, which waits for the rest of it
                        buffers[edge].move("gradients")
                else:
                    pushed += 1
                    heapq.heappush(ready, (-edge.order, pushed, edge))
        self.where, self.room = outer

    def _run(self, node: Node, buffers: dict[Node, Tensor]) -> tuple[list[Node | None], list[Tensor | None]]:
        """Run one node and let go of what it saved; its edges and their gradients, last first."""
        gradients = list(node.backward(buffers.pop(node)))
        edges = list(node.edges)
        node.backward, node.edges = _released, ()
        return edges[::-1], gradients[::-1]

    def _add(self, buffers: dict[Node, Tensor], edge: Node, gradient: Tensor) -> None:
        """Sum gradients as torch/csrc/autograd/input_buffer.cpp does: in place where nobody else refers to the sum."""
        if edge not in buffers:
            buffers[edge] = gradient
            return
        total = buffers[edge]
        if total.storage is not None and total.storage.holders > 1:
            buffers[edge] = self.new(total.numel, total.dtype)
        else:
            self.summed.append((total.numel.times(ITEMSIZE[total.dtype]), self.where))


def totals(log: Iterable[Change]) -> Iterator[tuple[int, Where, Total]]:
    """Of each allocation: the place in the log behind it, where it was made, and all that was alive then."""
    a = b = c = d = e = 0
    for place, (_, (p, q, r, s, t), room, where) in enumerate(log, 1):
        if where is not None:
            a, b, c, d, e = a + p, b + q, c + r, d + s, e + t
            yield place, where, (a, b, c, d, e)
        elif room is None:
            a, b, c, d, e = a - p, b - q, c - r, d - s, e - t


def alive_at(log: Iterable[Change], places: Iterable[int]) -> dict[int, Alive]:
    """What was alive at some places of the log, by place."""
    wanted = set(places)
    found: dict[int, Alive] = {}
    alive: Alive = {}
    for place, (number, size, room, _) in enumerate(log, 1):
        if room is None:
            del alive[number]
        else:
            alive[number] = room, size
        if place in wanted:
            found[place] = alive.copy()
    return found


def by_room(alive: Alive) -> dict[Room, Size]:
    """The bytes in each room."""
    rooms: dict[Room, list[Size]] = {}
    for room, size in alive.values():
        rooms.setdefault(room, []).append(size)
    return {room: sum_of(sizes) for room, sizes in rooms.items()}


def _released(gradient: Tensor) -> Gradients:
    """The backward of a node that has run."""
    raise RuntimeError("a node ran twice in the backward pass")


def _dependencies(root: Node) -> dict[Node, int]:
    """How many gradients each node waits for."""
    counts = {root: 0}
    stack = [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            if edge not in counts:
                counts[edge] = 0
                stack.append(edge)
            counts[edge] += 1
    return counts
