"""What is asked of the planner, and what may be chosen to answer it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from orchestrator.confidence import Comparable, Spread, Spreads
from orchestrator.history import History
from orchestrator.plans import Objective, Plan, Target
from qlora_core.architecture import ModelArchitecture
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

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


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and what of it may be chosen.

    Attributes:
        architecture: the model.
        recipe, strategy: what is fixed, and what the open fields are without a search.
        open: the fields that may be chosen, of OPEN_FIELDS.
        whole_step: tokens_per_step is fixed; else a step is as large as it comes, about DEFAULT_STEP_TOKENS.
        objective: what is best.
        has_liger: Liger's kernels are installed where it is to run, so that its loss may be chosen.
        spreads, paces: what earlier runs measured, which corrects what fits and how long a step takes.
    """

    architecture: ModelArchitecture
    recipe: Recipe
    strategy: Strategy
    open: frozenset[str]
    whole_step: bool
    objective: Objective = "fastest"
    has_liger: bool = False
    spreads: Spreads = ()
    paces: tuple[tuple[str, float], ...] = ()

    def informed(self, history: History) -> Question:
        """The same, with what earlier runs measured."""
        return replace(self, spreads=history.spreads(), paces=history.paces())

    def spread(self, target: Target, sharded: bool) -> Spread | None:
        """That of the runs that are comparable; None where there are too few."""
        kind = Comparable(target.device.kind, self.recipe.method, sharded)
        return dict(self.spreads).get(kind)

    def pace(self, target: Target) -> float:
        """By which factor steps took longer than predicted on such a device."""
        return dict(self.paces).get(target.device_name, 1.0)


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


def place_of(plan: Plan) -> Place:
    """The GPUs of a plan for one kind."""
    return Place(((plan.target, plan.strategy.world_size),))


def nodes_for(target: Target, count: int) -> int:
    """Nodes that hold so many of a device."""
    return 1 if target.pool is None else -(-count // target.pool.gpus_per_node)


class Candidate(NamedTuple):
    """One way to run at a place."""

    recipe: Recipe
    strategy: Strategy


@lru_cache(maxsize=1024)
def of_length(recipe: Recipe, seq_len: int, tokens_per_step: int) -> Recipe:
    """`recipe` with another length and step; made once, for its fields are checked anew each time."""
    return replace(recipe, seq_len=seq_len, tokens_per_step=tokens_per_step)
