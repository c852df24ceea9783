"""The search: the best way to run a recipe on given GPUs, of all strategies that its open fields allow.

Candidates differ in the GPUs they take and in the open fields of recipe and strategy. Those of one place are tried in
the order of their time per token, which takes microseconds to tell; memory, which takes longer, is asked only until one
fits. Nothing is lost by that: what was not asked is slower, or no simpler and as fast. What fits nowhere even in its
leanest form (chunked loss, paged state, micro-batch 1) is passed over at once. `tests/test_search.py` holds it against
trying everything.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

from orchestrator.confidence import Spread
from orchestrator.devices import rates, slowest_links
from orchestrator.needs import bytes_for, host_has_room, needs, paged_out
from orchestrator.plans import Objective, Target
from orchestrator.question import Candidate, Place, Question
from orchestrator.space import at_size, candidates, losses, micro_batches, places, shapes, with_optimizer
from qlora_core.memory.estimate import Estimate
from qlora_core.memory.formula import least_bytes, prepared
from qlora_core.recipe import Recipe
from qlora_core.step_time import TYPICAL, Load, load, times
from qlora_core.strategy import Strategy

LENGTH_STEP = 64
"""A longest length is rounded down to a multiple of this."""
ALIKE = 1.02
"""Times that differ by no more than this the model cannot tell apart."""


@dataclass(frozen=True)
class Found:
    """A candidate that fits.

    Attributes:
        needed: the estimate on the fullest kind of GPU.
        target: that kind.
        seconds: of a step, as expected, paging included.
        sure: it fits even where memory fragments more than in nineteen of twenty cases.
    """

    place: Place
    recipe: Recipe
    strategy: Strategy
    target: Target
    needed: Estimate
    seconds: float
    sure: bool

    @cached_property
    def seconds_per_token(self) -> float:
        """Of the whole group."""
        return self.seconds / (self.strategy.sequences_per_step * self.recipe.seq_len)


def search(question: Question, devices: Sequence[Target], compared: Collection[str] = ()) -> list[Found]:
    """The best candidate of each place, the best place first; what another beats in every respect is left out.

    But for the best of each device whose name is in `compared`: somebody wants to see it beside the others.
    """
    found = [best for place in places(question, devices) if (best := best_of(question, place)) is not None]
    kept = undominated(found)
    for name in set(compared) - {one.target.name for one in kept}:
        kept += ranked(question.objective, [one for one in found if one.target.name == name])[:1]
    return ranked(question.objective, kept)


def ranked(objective: Objective, found: Sequence[Found]) -> list[Found]:
    """The best first; what is not sure to fit after all that is."""

    def key(priced: tuple[Found, float]) -> tuple[float, ...]:
        one, cost = priced
        pace, gpus = one.seconds_per_token, one.place.gpus
        first = {
            "fastest": (pace, gpus),
            "cheapest": (cost, pace),
            "fewest-gpus": (gpus, pace),
            "longest": (-one.recipe.seq_len, gpus, pace),
        }[objective]
        return (not one.sure, *first)

    return [one for one, _ in sorted(zip(found, costs(found), strict=True), key=key)]


def undominated(found: Sequence[Found]) -> list[Found]:
    """Without those that another beats or equals in speed, cost, number of GPUs, length and sureness."""
    merits = [
        (one.seconds_per_token, cost, one.place.gpus, -one.recipe.seq_len, not one.sure)
        for one, cost in zip(found, costs(found), strict=True)
    ]
    kept: list[tuple[tuple[float, ...], Found]] = []
    for merit, one in sorted(zip(merits, found, strict=True), key=lambda pair: pair[0]):
        if not any(all(a <= b for a, b in zip(other, merit, strict=True)) for other, _ in kept):
            kept.append((merit, one))
    return [one for _, one in kept]


def costs(found: Sequence[Found]) -> list[float]:
    """What a token costs on each, by the prices of the places; in GPU seconds where none has a price.

    A place without a price is dearer than all that have one: how much it costs nobody knows.
    """
    prices = [one.place.price_per_hour for one in found]
    if all(price is None for price in prices):
        return [one.seconds_per_token * one.place.gpus for one in found]
    known = [math.inf if price is None else price for price in prices]
    return [one.seconds_per_token * price for one, price in zip(found, known, strict=True)]


# --- the best of a place ----------------------------------------------------------------------------------------------


class Judge:
    """Memory and time of candidates at one place, as earlier runs correct them; estimates are made once."""

    def __init__(self, question: Question, place: Place) -> None:
        self.architecture = question.architecture
        self.targets = [target for target, _ in place.parts]
        self.spread = question.spread
        self.rooms = [
            (target, [self._room(target, question.spread(target, sharded)) for sharded in (False, True)])
            for target in self.targets
        ]
        self.rates = slowest_links([rates(target) for target in self.targets])
        self.paces = [question.pace(target) for target in self.targets]
        self.needs: dict[Candidate, tuple[Estimate, Target]] = {}

    def needed(self, candidate: Candidate) -> tuple[Estimate, Target]:
        """The estimate on the kind of GPU with the least to spare, and that kind."""
        if candidate not in self.needs:
            asked = [(self._on(candidate, target), target) for target in self.targets]
            self.needs[candidate] = max(asked, key=lambda pair: self.missing(candidate, pair[0], pair[1], False))
        return self.needs[candidate]

    def missing(self, candidate: Candidate, needed: Estimate, target: Target, sure: bool) -> int:
        """Bytes that a process needs beyond what a GPU can give; negative where it has room."""
        return (
            bytes_for(needed, target, sure, self.spread(target, candidate.strategy.zero_stage > 0))
            - target.usable_bytes
        )

    def fits(self, candidate: Candidate, sure: bool) -> bool:
        """Whether it fits each GPU and, where it is stated, the hosts' memory."""
        if not self.may_fit(candidate):
            return False
        for target in self.targets:
            needed = self.needed(candidate)[0] if len(self.targets) == 1 else self._on(candidate, target)
            if self.missing(candidate, needed, target, sure) > 0 or not host_has_room(needed, target):
                return False
        return True

    def may_fit(self, candidate: Candidate) -> bool:
        """Whether its weights, and then its tensors, do: most that do not fit are told without the allocator."""
        recipe, strategy = candidate
        for target, rooms in self.rooms:
            sizes = prepared(self.architecture, recipe, strategy, target.device)
            room = rooms[strategy.zero_stage > 0]
            if sizes.weights_bytes > room or sizes.allocated_bytes(strategy.micro_batch, recipe.seq_len) > room:
                return False
        return True

    def may_fit_on_more(self, shape: Candidate, size: int) -> bool:
        """Whether a micro-batch of this size might on more GPUs: what could not is told without asking about these."""
        recipe, strategy = shape
        for target, rooms in self.rooms:
            room = rooms[strategy.zero_stage > 0]
            if least_bytes(self.architecture, recipe, strategy, target.device, size) > room:
                return False
        return True

    @staticmethod
    def _room(target: Target, spread: Spread | None) -> float:
        """The most bytes of tensors that may be predicted: no less than they is reserved."""
        room = target.usable_bytes - target.device.context_bytes
        return room if spread is None else room / spread.middle

    def _on(self, candidate: Candidate, target: Target) -> Estimate:
        return needs(self.architecture, *candidate, target)

    def seconds(self, candidate: Candidate, paged_out: int = 0) -> float:
        """Of a step, as expected: the slowest kind of GPU sets the pace."""
        size, accumulation = candidate.strategy.micro_batch, candidate.strategy.gradient_accumulation
        return self.pace(self.loads(candidate), candidate, size, accumulation, paged_out)

    def loads(self, candidate: Candidate) -> list[Load]:
        """What a step asks of each kind of GPU."""
        return [load(self.architecture, *candidate, target.device) for target in self.targets]

    def pace(self, loads: list[Load], shape: Candidate, size: int, accumulation: int, paged_out: int = 0) -> float:
        """The seconds of a step of a shape with another micro-batch and accumulation."""
        world, length = shape.strategy.world_size, shape.recipe.seq_len
        each = zip(loads, self.rates, self.paces, strict=True)
        return max(
            [
                factor * sum(times(one, world, size, accumulation, length, rate, TYPICAL, paged_out))
                for one, rate, factor in each
            ]
        )

    def paged_out(self, candidate: Candidate) -> int:
        """Bytes of paged state that find no room beside the process."""
        needed, target = self.needed(candidate)
        return paged_out(needed, target.usable_bytes)


def best_of(question: Question, place: Place) -> Found | None:
    """The best candidate of a place: one that is sure to fit, else one that fits as expected; None without."""
    judge = Judge(question, place)
    pick = longest if question.objective == "longest" and "seq_len" in question.open else fastest
    for sure in (True, False):
        chosen = pick(question, place, judge, sure)
        if chosen is not None:
            needed, target = judge.needed(chosen)
            seconds = judge.seconds(chosen, judge.paged_out(chosen))
            return Found(place, chosen.recipe, chosen.strategy, target, needed, seconds, sure)
    return None


def fastest(question: Question, place: Place, judge: Judge, sure: bool) -> Candidate | None:
    """The fastest that fits; of those that are as fast, as far as the model can tell, the simplest.

    Of what may be as fast as the fastest of all, the simplest is asked first: where it fits, no other need be.
    """
    lean = Leanest(question, judge)
    waiting = entries(question, place, judge)
    limit: float | None = None  # of what is as fast as the fastest that fits, once that is known
    while waiting:
        soonest = min(waiting, key=_seconds)
        alike = limit or soonest.seconds * ALIKE
        asked = simplest = min((each for each in waiting if each.seconds <= alike), key=_order)
        if limit is None and any(
            each.order < simplest.order and each.seconds <= simplest.seconds * ALIKE for each in waiting
        ):
            asked = soonest  # a simpler one may be as fast as the fastest that fits, if that is not the soonest
        waiting.remove(asked)
        candidate = at_size(asked.shape.candidate, place.gpus, asked.size, asked.accumulation)
        if not lean.may_fit(candidate):
            continue  # nor do those with smaller micro-batches
        if not judge.fits(candidate, sure):
            waiting += asked.shape.next(judge)
        elif not asked.paid and (paged_out := judge.paged_out(candidate) if candidate.strategy.paged_optimizer else 0):
            # paging what has no room beside the rest takes time of its own
            waiting.append(asked._replace(paid=True, seconds=judge.seconds(candidate, paged_out)))
            waiting += asked.shape.next(judge)
        elif asked is simplest:
            return candidate
        else:
            limit = asked.seconds * ALIKE
            waiting.append(asked)
    return None


def entries(question: Question, place: Place, judge: Judge) -> list[Entry]:
    """The candidates of a place, of each shape the one with the largest micro-batch that may fit."""
    found: list[Entry] = []
    order = 0
    for candidate in shapes(question, place.gpus):
        sizes = [(order + at, *each) for at, each in enumerate(micro_batches(question, candidate, place.gpus))]
        order += len(sizes)
        alike = [sizes]
        if candidate.strategy.attention == "eager":
            # a micro-batch of 1 is another load there
            alike = [[each for each in sizes if each[1] > 1], [each for each in sizes if each[1] == 1]]
        for together in filter(None, alike):
            one = candidate._replace(strategy=replace(candidate.strategy, micro_batch=together[0][1]))
            found += Shape(candidate, iter(together), judge.loads(one)).next(judge)
    return found


@dataclass(slots=True, eq=False)
class Shape:
    """Candidates that differ in the micro-batch alone.

    Attributes:
        candidate: one of them.
        untried: their places in the order of all, micro-batches and gradient accumulations, the largest first.
        loads: what a step of theirs asks of each kind of GPU.
    """

    candidate: Candidate
    untried: Iterator[tuple[int, int, int]]
    loads: list[Load]

    def next(self, judge: Judge) -> list[Entry]:
        """The one with the next smaller micro-batch that may fit, if any: it is no faster than those before it."""
        for order, size, accumulation in self.untried:
            if judge.may_fit_on_more(self.candidate, size):
                seconds = judge.pace(self.loads, self.candidate, size, accumulation)
                return [Entry(seconds, order, size, accumulation, self)]
        return []


class Entry(NamedTuple):
    """A candidate that waits to be asked for.

    Attributes:
        seconds: of its step.
        order: its place in the order of all, the simplest first.
        size, accumulation: its micro-batch and gradient accumulation.
        shape: all else.
        paid: its seconds include paging.
    """

    seconds: float
    order: int
    size: int
    accumulation: int
    shape: Shape
    paid: bool = False


_seconds, _order = attrgetter("seconds"), attrgetter("order")


class Leanest:
    """Whether candidates of a sharding and checkpointing may fit in their leanest form; asked once for each."""

    def __init__(self, question: Question, judge: Judge) -> None:
        self.question, self.judge = question, judge
        self.known: dict[Candidate, bool] = {}

    def may_fit(self, candidate: Candidate) -> bool:
        """Whether the leanest of its kind may."""
        lean = leanest(self.question, candidate)
        if lean not in self.known:
            self.known[lean] = self.judge.may_fit(lean)
        return self.known[lean]


def leanest(question: Question, candidate: Candidate) -> Candidate:
    """A candidate with all that is open at its smallest, but sharding, attention and checkpointing as they are."""
    recipe, strategy = candidate
    open_ = question.open
    if "loss" in open_:
        strategy = replace(strategy, loss=losses(question, strategy.zero_stage)[0])
    if "paged_optimizer" in open_ and strategy.offload == "none":
        strategy = replace(strategy, paged_optimizer=True)
    if "optimizer" in open_:
        recipe = with_optimizer(recipe, "adamw_8bit")
    if "micro_batch" in open_:
        accumulation = strategy.micro_batch * strategy.gradient_accumulation
        strategy = replace(strategy, micro_batch=1, gradient_accumulation=accumulation)
    return Candidate(recipe, strategy)


def leanest_of_all(question: Question, place: Place) -> Candidate:
    """The candidate of a place that comes nearest to fitting; what is asked, where each step there is too large."""
    judge = Judge(question, place)
    lean = dict.fromkeys(leanest(question, candidate) for candidate in candidates(question, place))

    def missing(candidate: Candidate) -> int:
        return judge.missing(candidate, *judge.needed(candidate), False)

    return min(lean, key=missing, default=Candidate(question.recipe, question.strategy))


def longest(question: Question, place: Place, judge: Judge, sure: bool) -> Candidate | None:
    """The longest context up to the model's positions, in whole LENGTH_STEPs; the fastest of those as long.

    As in `fastest`, the simplest of those that are as fast. Memory falls a little where a length is a whole number of
    the loss's chunks; that a longer one would fit again beyond lengths that do not is not counted on.
    """
    positions = question.architecture.max_position_embeddings
    lengths = [*range(LENGTH_STEP, positions, LENGTH_STEP), positions]
    as_long: list[Candidate] = []
    found = 0  # so many of the lengths fit
    for shape in candidates(question, place):
        strategy = shape.strategy

        def at(length: int, shape: Candidate = shape, strategy: Strategy = strategy) -> Candidate:
            return at_size(shape, place.gpus, strategy.micro_batch, strategy.gradient_accumulation, length)

        def too_long(length: int, at: Callable[[int], Candidate] = at) -> bool:
            return not judge.fits(at(length), sure)

        if too_long(lengths[max(found - 1, 0)]):
            continue
        longer = bisect_left(lengths, True, lo=found, key=too_long)
        if longer > found:
            as_long, found = [], longer
        as_long.append(at(lengths[longer - 1]))
    paces = [judge.seconds(each, judge.paged_out(each)) for each in as_long]
    return next((each for each, pace in zip(as_long, paces, strict=True) if pace <= min(paces) * ALIKE), None)
