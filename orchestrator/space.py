"""The space of a search: the groups of GPUs that may be taken, and the candidates at each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from orchestrator.devices import on_stack, pool_target
from orchestrator.plans import Target
from orchestrator.question import Candidate, Place, Question, of_length
from orchestrator.rules import can_be_divided, why_not_liger
from qlora_core.recipe import LARGEST, Recipe
from qlora_core.strategy import Attention, Loss, Offload, ZeroStage

LARGEST_MICRO_BATCH = 16
"""The planner takes no larger micro-batch by itself: past it, GPUs gain nothing and memory is risked."""
DEFAULT_STEP_TOKENS = 8192
"""Tokens of a step where neither they nor the micro-batch are given: the default of a recipe."""
FEW_NODES = 8
"""Of so many nodes every number is tried, of more every power of two and all."""
LOSSES: tuple[Loss, ...] = ("liger", "chunked", "full")
"""The leanest first, which is never the slower."""
SHARDINGS: tuple[tuple[ZeroStage, Offload], ...] = (
    (0, "none"),
    (1, "none"),
    (1, "optimizer"),
    (2, "none"),
    (2, "optimizer"),
    (3, "none"),
    (3, "optimizer"),
    (3, "all"),
)
"""What DeepSpeed can do, the simplest first: it decides between candidates of the same speed.

It offloads the optimizer from stage 1 on, but stage 2, where it may be taken, is never worse at that.
"""


def places(question: Question, devices: Sequence[Target]) -> Iterator[Place]:
    """The groups of GPUs that may be taken: of one pool, and of two unlike ones together; a CPU is one by itself."""
    dtype = question.recipe.compute_dtype
    stack = devices[0].stack if devices else "ours"  # they are of one question
    pools = [device.pool for device in devices if device.pool is not None]
    for device in devices:
        if device.pool is None:
            yield Place(((device, question.strategy.world_size),))
    for pool in pools:
        for count in counts(question, pool.gpus, pool.gpus_per_node):
            yield Place(((on_stack(pool_target(pool, dtype, count), stack), count),))
    if "world_size" in question.open and question.objective == "fastest":
        for both in itertools.combinations((pool for pool in pools if pool.exists), 2):
            if divides(question, sum(pool.gpus for pool in both)):
                group = ((on_stack(pool_target(pool, dtype, pool.gpus), stack), pool.gpus) for pool in both)
                yield Place(tuple(group))


def counts(question: Question, gpus: int, gpus_per_node: int) -> list[int]:
    """Numbers of GPUs to try of one pool, those of a step's sequences that come out even."""
    if "world_size" not in question.open:
        wanted = question.strategy.world_size
        return [wanted] if wanted <= gpus else []
    fitting = {size for size in sizes(gpus, gpus_per_node) if divides(question, size)}
    if question.whole_step:
        sequences = question.recipe.sequences_per_step
        fitting.add(max(size for size in range(1, min(gpus, sequences) + 1) if sequences % size == 0))
    return sorted(fitting)


def sizes(gpus: int, gpus_per_node: int) -> set[int]:
    """Powers of two and all in one node, and whole nodes."""
    nodes = gpus // gpus_per_node
    inside = {1 << power for power in range(gpus_per_node.bit_length()) if 1 << power <= gpus_per_node}
    several = set(range(1, nodes + 1)) if nodes <= FEW_NODES else {1 << n for n in range(nodes.bit_length())}
    return inside | {gpus_per_node * number for number in several | {nodes} if number}


def divides(question: Question, world: int) -> bool:
    """Whether a step's sequences come out even on so many GPUs."""
    return not question.whole_step or question.recipe.sequences_per_step % world == 0


def candidates(question: Question, place: Place) -> Iterator[Candidate]:
    """All of them, the simplest of equals first; for the longest context at the micro-batch 1 and the length asked."""
    for shape in shapes(question, place.gpus):
        yield from of_shape(question, shape, place.gpus)


def of_shape(question: Question, shape: Candidate, world: int) -> Iterator[Candidate]:
    """Those of one shape: they differ in the micro-batch alone, the largest first."""
    for size, accumulation in micro_batches(question, shape, world):
        yield at_size(shape, world, size, accumulation)


def shapes(question: Question, world: int) -> Iterator[Candidate]:
    """The recipes and strategies that the open fields allow, but for micro-batch and length."""
    architecture, given, open_ = question.architecture, question.strategy, question.open
    attentions: list[Attention] = [given.attention]
    if "attention" in open_:
        attentions = ["sdpa", "eager"] if architecture.has_sdpa else ["eager"]
    optimizers = ["adamw", "adamw_8bit"] if "optimizer" in open_ else [question.recipe.optimizer]
    paging = [True, False] if "paged_optimizer" in open_ else [given.paged_optimizer]
    checkpointing = [True, False] if "gradient_checkpointing" in open_ else [given.gradient_checkpointing]
    ways = shardings(question, world)
    taken = {stage: losses(question, stage) for stage, _ in ways}
    for (stage, offload), optimizer, keep, attention, loss, paged in itertools.product(
        ways, optimizers, checkpointing, attentions, LOSSES, paging
    ):
        if loss not in taken[stage]:
            continue
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


def losses(question: Question, stage: ZeroStage) -> list[Loss]:
    """The losses to try, the leanest first. Liger's is chosen only where it is installed, but may be asked for."""
    is_open = "loss" in question.open
    taken = LOSSES if is_open else (question.strategy.loss,)
    unknown = is_open and not question.has_liger
    no_liger = unknown or why_not_liger(question.architecture, question.recipe, stage) is not None
    return [loss for loss in taken if loss != "liger" or not no_liger]


@lru_cache(maxsize=256)
def with_optimizer(recipe: Recipe, optimizer: str) -> Recipe:
    """`recipe` with another optimizer; made once, for its fields are checked anew each time."""
    return replace(recipe, optimizer="adamw_8bit" if optimizer == "adamw_8bit" else "adamw")


def shardings(question: Question, world: int) -> list[tuple[ZeroStage, Offload]]:
    """The ZeRO stages and offloads to try: of one GPU nothing is divided, so a stage only serves to offload."""
    given = question.strategy
    if not {"zero_stage", "offload"} & question.open:
        return [(given.zero_stage, given.offload)]
    return [
        (stage, offload)
        for stage, offload in SHARDINGS
        if ("zero_stage" in question.open or stage == given.zero_stage)
        and (stage < 3 or can_be_divided(question.recipe))
        and (offload == given.offload or "offload" in question.open)
        and (stage != 1 or offload == "none" or "zero_stage" not in question.open)
        and (world > 1 or stage in (0, given.zero_stage) or offload != "none")
    ]


def micro_batches(question: Question, shape: Candidate, world: int) -> list[tuple[int, int]]:
    """Micro-batches to try, each with the gradient accumulation that makes the step whole; the largest first.

    None of a step that is larger than a recipe may have.
    """
    most = LARGEST // (shape.recipe.seq_len * world)
    return [(size, several) for size, several in _whole_steps(question, shape, world) if size * several <= most]


def _whole_steps(question: Question, shape: Candidate, world: int) -> list[tuple[int, int]]:
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
        several = max(1, DEFAULT_STEP_TOKENS // (question.recipe.seq_len * world))  # one alone may be longer
        share = 1 << (several - 1).bit_length()
    return [(size, share // size) for size in range(min(share, LARGEST_MICRO_BATCH), 0, -1) if share % size == 0]


def at_size(shape: Candidate, world: int, size: int, accumulation: int, seq_len: int | None = None) -> Candidate:
    """A shape with its micro-batch and accumulation, and perhaps another length."""
    length = seq_len or shape.recipe.seq_len
    return Candidate(
        of_length(shape.recipe, length, length * world * size * accumulation),
        replace(shape.strategy, micro_batch=size, gradient_accumulation=accumulation),
    )
