"""The search: the best way to run a recipe on given GPUs, of all strategies that its open fields allow.

Candidates differ in the GPUs they take and in the open fields of recipe and strategy. Those of one place are tried in
the order of their time per token, which takes microseconds to tell; memory, which takes longer, is asked only until one
fits. Nothing is lost by that: the first that fits is the fastest. What fits nowhere even in its leanest form (chunked
loss, paged state, micro-batch 1) is passed over at once. `tests/test_search.py` holds it against trying everything.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

from clusters.cluster import Pool
from orchestrator.devices import pool_target, rates, slowest_links
from orchestrator.plans import Objective, Target
from qlora_core.architecture import ModelArchitecture
from qlora_core.memory.estimate import Estimate
from qlora_core.memory.formula import estimate
from qlora_core.recipe import Recipe
from qlora_core.step_time import TYPICAL, load, times
from qlora_core.strategy import Attention, Loss, Offload, Strategy, ZeroStage

STRATEGY_FIELDS = (
    "world_size",
    "micro_batch",
    "gradient_checkpointing",
    "attention",
    "loss",
    "paged_optimizer",
    "zero_stage",
    "offload",
)
OPEN_FIELDS = (*STRATEGY_FIELDS, "seq_len", "optimizer")
"""What a search may choose, where it is left open."""
LARGEST_MICRO_BATCH = 16
"""The planner takes no larger micro-batch by itself: past it, GPUs gain nothing and memory is risked."""
DEFAULT_STEP_TOKENS = 8192
"""Tokens of a step where neither they nor the micro-batch are given: the default of a recipe."""
LENGTH_STEP = 64
"""A longest length is rounded down to a multiple of this."""
FEW_NODES = 8
"""Of so many nodes every number is tried, of more every power of two and all."""
ALIKE = 1.02
"""Times that differ by no more than this the model cannot tell apart."""
SHARDINGS: tuple[tuple[ZeroStage, Offload], ...] = (
    (0, "none"),
    (1, "none"),
    (2, "none"),
    (2, "optimizer"),
    (3, "none"),
    (3, "optimizer"),
    (3, "all"),
)
"""What DeepSpeed can do, the simplest first: it decides between candidates of the same speed."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what of it may be chosen.

    Attributes:
        architecture: the model.
        recipe, strategy: what is fixed, and what the open fields are without a search.
        open: the fields that may be chosen, of OPEN_FIELDS.
        whole_step: tokens_per_step is fixed; else a step is as large as it comes, about DEFAULT_STEP_TOKENS.
        objective: what is best.
    """

    architecture: ModelArchitecture
    recipe: Recipe
    strategy: Strategy
    open: frozenset[str]
    whole_step: bool
    objective: Objective = "fastest"


@dataclass(frozen=True, slots=True)
class Place:
    """GPUs of one pool, or of several in one data-parallel group."""

    parts: tuple[tuple[Target, int], ...]

    @property
    def gpus(self) -> int:
        """All of them."""
        return sum(count for _, count in self.parts)

    @property
    def nodes(self) -> int:
        """Those that hold them."""
        return sum(nodes_for(target, count) for target, count in self.parts)

    @property
    def price_per_hour(self) -> float | None:
        """Of its nodes, which are rented whole; None where one has no price."""
        total = 0.0
        for target, count in self.parts:
            if target.pool is None or target.pool.price_per_hour is None:
                return None
            total += target.pool.price_per_hour * nodes_for(target, count)
        return total

    @property
    def name(self) -> str:
        """In words: "8 x a100-80gb + 4 x l40s"."""
        return " + ".join(f"{count} x {target.name}" for target, count in self.parts)


def nodes_for(target: Target, count: int) -> int:
    """Nodes that hold so many of a device."""
    return 1 if target.pool is None else -(-count // target.pool.gpus_per_node)


class Candidate(NamedTuple):
    """One way to run at a place."""

    recipe: Recipe
    strategy: Strategy


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

    @property
    def cost_per_token(self) -> float:
        """In the cluster's currency; in GPU seconds where there are no prices."""
        price = self.place.price_per_hour
        return self.seconds_per_token * (self.place.gpus if price is None else price)


def search(question: Question, pools: Sequence[Pool]) -> list[Found]:
    """The best candidate of each place, the best place first; what another beats in every respect is left out."""
    found = [best for place in places(question, pools) if (best := best_of(question, place)) is not None]
    return ranked(question.objective, undominated(found))


def ranked(objective: Objective, found: Iterable[Found]) -> list[Found]:
    """The best first; what is not sure to fit after all that is."""

    def key(one: Found) -> tuple[float, ...]:
        pace, gpus = one.seconds_per_token, one.place.gpus
        first = {
            "fastest": (pace, gpus),
            "cheapest": (one.cost_per_token, pace),
            "fewest-gpus": (gpus, pace),
            "longest": (-one.recipe.seq_len, pace),
        }[objective]
        return (not one.sure, *first)

    return sorted(found, key=key)


def undominated(found: Sequence[Found]) -> list[Found]:
    """Without those that another beats or equals in speed, cost, number of GPUs, length and sureness."""

    def merits(one: Found) -> tuple[float, ...]:
        return (one.seconds_per_token, one.cost_per_token, one.place.gpus, -one.recipe.seq_len, not one.sure)

    kept: list[tuple[tuple[float, ...], Found]] = []
    for merit, one in sorted(((merits(one), one) for one in found), key=lambda pair: pair[0]):
        if not any(all(a <= b for a, b in zip(other, merit, strict=True)) for other, _ in kept):
            kept.append((merit, one))
    return [one for _, one in kept]


# --- places -----------------------------------------------------------------------------------------------------------


def places(question: Question, pools: Sequence[Pool]) -> Iterator[Place]:
    """The groups of GPUs that may be taken: of one pool, and of two unlike ones together."""
    dtype = question.recipe.compute_dtype
    for pool in pools:
        for count in counts(question, pool.gpus, pool.gpus_per_node):
            yield Place(((pool_target(pool, dtype, count), count),))
    if "world_size" in question.open and question.objective == "fastest":
        for both in itertools.combinations(pools, 2):
            if divides(question, sum(pool.gpus for pool in both)):
                yield Place(tuple((pool_target(pool, dtype, pool.gpus), pool.gpus) for pool in both))


def counts(question: Question, gpus: int, gpus_per_node: int) -> list[int]:
    """Numbers of GPUs to try of one pool, those of a step's sequences that come out even."""
    if "world_size" not in question.open:
        wanted = question.strategy.world_size
        return [wanted] if wanted <= gpus else []
    nodes = gpus // gpus_per_node
    inside = {1 << power for power in range(gpus_per_node.bit_length()) if 1 << power <= gpus_per_node}
    several = set(range(1, nodes + 1)) if nodes <= FEW_NODES else {1 << n for n in range(nodes.bit_length())}
    sizes = inside | {gpus_per_node * number for number in several | {nodes} if number}
    fitting = {size for size in sizes if divides(question, size)}
    if question.whole_step:
        sequences = question.recipe.sequences_per_step
        fitting.add(max(size for size in range(1, min(gpus, sequences) + 1) if sequences % size == 0))
    return sorted(fitting)


def divides(question: Question, world: int) -> bool:
    """Whether a step's sequences come out even on so many GPUs."""
    return not question.whole_step or question.recipe.sequences_per_step % world == 0


# --- the candidates of a place ----------------------------------------------------------------------------------------


def candidates(question: Question, place: Place) -> Iterator[Candidate]:
    """All of them, the simplest of equals first; for the longest context at the micro-batch 1 and the length asked."""
    for shape in shapes(question, place.gpus):
        for size, accumulation in micro_batches(question, shape, place.gpus):
            yield at_size(shape, place.gpus, size, accumulation)


def shapes(question: Question, world: int) -> Iterator[Candidate]:
    """The recipes and strategies that the open fields allow, but for micro-batch and length."""
    architecture, given, open_ = question.architecture, question.strategy, question.open
    attentions: list[Attention] = [given.attention]
    if "attention" in open_:
        attentions = ["sdpa", "eager"] if architecture.has_sdpa else ["eager"]
    losses: list[Loss] = [given.loss]
    if "loss" in open_:
        losses = ["chunked", "full"] if architecture.plain_logits else ["full"]
    optimizers = ["adamw", "adamw_8bit"] if "optimizer" in open_ else [question.recipe.optimizer]
    paging = [True, False] if "paged_optimizer" in open_ else [given.paged_optimizer]
    checkpointing = [True, False] if "gradient_checkpointing" in open_ else [given.gradient_checkpointing]
    for (stage, offload), optimizer, keep, attention, loss, paged in itertools.product(
        shardings(question, world), optimizers, checkpointing, attentions, losses, paging
    ):
        if offload != "none" and "paged_optimizer" in open_ and paged:
            continue  # the state is on the host already
        yield Candidate(
            question.recipe if optimizer == question.recipe.optimizer else with_optimizer(question.recipe, optimizer),
            replace(
                given,
                world_size=world,
                gradient_checkpointing=keep,
                attention=attention,
                loss=loss,
                paged_optimizer=paged,
                zero_stage=stage,
                offload=offload,
            ),
        )


def with_optimizer(recipe: Recipe, optimizer: str) -> Recipe:
    """`recipe` with another optimizer."""
    return replace(recipe, optimizer="adamw_8bit" if optimizer == "adamw_8bit" else "adamw")


def shardings(question: Question, world: int) -> list[tuple[ZeroStage, Offload]]:
    """The ZeRO stages and offloads to try: of one GPU nothing is divided, so a stage only serves to offload."""
    given = question.strategy
    return [
        (stage, offload)
        for stage, offload in SHARDINGS
        if (stage == given.zero_stage or "zero_stage" in question.open)
        and (offload == given.offload or "offload" in question.open)
        and (world > 1 or stage in (0, given.zero_stage) or offload != "none")
    ]


def micro_batches(question: Question, shape: Candidate, world: int) -> list[tuple[int, int]]:
    """Micro-batches to try, each with the gradient accumulation that makes the step whole; the largest first."""
    given = shape.strategy
    if "micro_batch" not in question.open or question.objective == "longest":
        size = 1 if "micro_batch" in question.open else given.micro_batch
        if not question.whole_step:
            return [(size, given.gradient_accumulation)]
        share = question.recipe.sequences_per_step // world
        return [(size, share // size)] if share % size == 0 else []
    if question.whole_step:
        share = question.recipe.sequences_per_step // world
    else:
        share = 1 << max(0, (DEFAULT_STEP_TOKENS // (question.recipe.seq_len * world) - 1).bit_length())
    return [(size, share // size) for size in range(min(share, LARGEST_MICRO_BATCH), 0, -1) if share % size == 0]


def at_size(shape: Candidate, world: int, size: int, accumulation: int, seq_len: int | None = None) -> Candidate:
    """A shape with its micro-batch and accumulation, and perhaps another length."""
    length = seq_len or shape.recipe.seq_len
    return Candidate(
        of_length(shape.recipe, length, length * world * size * accumulation),
        replace(shape.strategy, micro_batch=size, gradient_accumulation=accumulation),
    )


@lru_cache(maxsize=1024)
def of_length(recipe: Recipe, seq_len: int, tokens_per_step: int) -> Recipe:
    """`recipe` with another length and step; made once, for its fields are checked anew each time."""
    return replace(recipe, seq_len=seq_len, tokens_per_step=tokens_per_step)


# --- the best of a place ----------------------------------------------------------------------------------------------


class Judge:
    """Memory and time of candidates at one place; estimates are made once."""

    def __init__(self, question: Question, place: Place) -> None:
        self.architecture = question.architecture
        self.targets = [target for target, _ in place.parts]
        self.rates = slowest_links([rates(target) for target in self.targets])
        self.needs: dict[Candidate, tuple[Estimate, Target]] = {}

    def needed(self, candidate: Candidate) -> tuple[Estimate, Target]:
        """The estimate on the kind of GPU with the least to spare, and that kind."""
        if candidate not in self.needs:
            asked = [(estimate(self.architecture, *candidate, target.device), target) for target in self.targets]
            self.needs[candidate] = min(asked, key=lambda pair: pair[1].usable_bytes - pair[0].gpu.process_bytes)
        return self.needs[candidate]

    def fits(self, candidate: Candidate, sure: bool) -> bool:
        """Whether it fits each GPU and, where it is stated, the hosts' memory."""
        for target in self.targets:
            needed = self.needed(candidate)[0] if len(self.targets) == 1 else self._on(candidate, target)
            if bytes_for(needed, target, sure) > target.usable_bytes or not host_has_room(needed, target):
                return False
        return True

    def _on(self, candidate: Candidate, target: Target) -> Estimate:
        return estimate(self.architecture, *candidate, target.device)

    def seconds(self, candidate: Candidate, paged_out: int = 0) -> float:
        """Of a step, as expected: the slowest kind of GPU sets the pace."""
        return max(
            sum(
                times(
                    load(self.architecture, *candidate, target.device),
                    candidate.strategy,
                    candidate.recipe.seq_len,
                    rate,
                    TYPICAL,
                    paged_out,
                )
            )
            for target, rate in zip(self.targets, self.rates, strict=True)
        )

    def paged_out(self, candidate: Candidate) -> int:
        """Bytes of paged state that find no room beside the process."""
        needed, target = self.needed(candidate)
        return max(
            0, min(needed.gpu.paged_bytes, needed.gpu.process_bytes + needed.gpu.paged_bytes - target.usable_bytes)
        )


def bytes_for(needed: Estimate, target: Target, sure: bool) -> int:
    """What a process needs as expected, or in nineteen of twenty cases."""
    return needed.gpu.reserved_interval[1] + target.device.context_bytes if sure else needed.gpu.process_bytes


def host_has_room(needed: Estimate, target: Target) -> bool:
    """Whether a node's memory suffices, where it is stated."""
    ram = target.pool.host_ram_bytes if target.pool is not None else None
    return ram is None or max(needed.host.load_peak_bytes, needed.host.steady_bytes) <= ram


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
    """The fastest that fits; of those that are as fast, as far as the model can tell, the simplest."""
    # the same tokens per step in all candidates of a place
    queue = [
        (judge.seconds(candidate), order, False, candidate)
        for order, candidate in enumerate(candidates(question, place))
    ]
    heapq.heapify(queue)
    lean = Leanest(question, judge, sure)
    failed: dict[Candidate, int] = {}
    best: tuple[int, Candidate] | None = None
    limit = math.inf
    while queue and queue[0][0] <= limit:
        seconds, order, paid, candidate = heapq.heappop(queue)
        size, shape = candidate.strategy.micro_batch, without_size(candidate)
        if (best is not None and order > best[0]) or size >= failed.get(shape, size + 1) or not lean.fits(candidate):
            continue
        if not judge.fits(candidate, sure):
            failed[shape] = size
        elif not paid and (paged_out := judge.paged_out(candidate) if candidate.strategy.paged_optimizer else 0):
            # paging what has no room beside the rest takes time of its own
            heapq.heappush(queue, (judge.seconds(candidate, paged_out), order, True, candidate))
        else:
            best, limit = (order, candidate), min(limit, seconds * ALIKE)
    return best[1] if best else None


class Leanest:
    """Whether candidates of a sharding and checkpointing fit in their leanest form; asked once for each."""

    def __init__(self, question: Question, judge: Judge, sure: bool) -> None:
        self.question, self.judge, self.sure = question, judge, sure
        self.known: dict[Candidate, bool] = {}

    def fits(self, candidate: Candidate) -> bool:
        """Whether the leanest of its kind does."""
        lean = leanest(self.question, candidate)
        if lean not in self.known:
            self.known[lean] = self.judge.fits(lean, self.sure)
        return self.known[lean]


def leanest(question: Question, candidate: Candidate) -> Candidate:
    """A candidate with all that is open at its smallest, but sharding, attention and checkpointing as they are."""
    recipe, strategy = candidate
    open_ = question.open
    if "loss" in open_ and question.architecture.plain_logits:
        strategy = replace(strategy, loss="chunked")
    if "paged_optimizer" in open_ and strategy.offload == "none":
        strategy = replace(strategy, paged_optimizer=True)
    if "optimizer" in open_:
        recipe = with_optimizer(recipe, "adamw_8bit")
    if "micro_batch" in open_:
        accumulation = strategy.micro_batch * strategy.gradient_accumulation
        strategy = replace(strategy, micro_batch=1, gradient_accumulation=accumulation)
    return Candidate(recipe, strategy)


def leanest_of_all(question: Question, place: Place) -> Candidate:
    """The candidate of a place that comes nearest to fitting."""
    judge = Judge(question, place)
    lean = dict.fromkeys(leanest(question, candidate) for candidate in candidates(question, place))

    def missing(candidate: Candidate) -> int:
        needed, target = judge.needed(candidate)
        return needed.gpu.process_bytes - target.usable_bytes

    return min(lean, key=missing)


def without_size(candidate: Candidate) -> Candidate:
    """A candidate but for its micro-batch."""
    return Candidate(candidate.recipe, replace(candidate.strategy, micro_batch=1, gradient_accumulation=1))


def longest(question: Question, place: Place, judge: Judge, sure: bool) -> Candidate | None:
    """The longest context up to the model's positions, in whole LENGTH_STEPs; the fastest of those alike."""
    positions = question.architecture.max_position_embeddings
    lengths = [*range(LENGTH_STEP, positions, LENGTH_STEP), positions]
    best: Candidate | None = None
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
        candidate = at(lengths[longer - 1])
        if best is None or longer > found or judge.seconds(candidate) < judge.seconds(best):
            best, found = candidate, longer
    return best
