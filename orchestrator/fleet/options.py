"""Where a fine-tune can run: on each number of GPUs of each pool the fastest way that fits, with its time and price."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Literal

from clusters.cluster import Cluster, Pool
from orchestrator.alternatives import Alternatives
from orchestrator.fleet.jobs import JobForm
from orchestrator.history import History
from orchestrator.planner import fitting_defaults, targets_of
from orchestrator.plans import Alternative, Target
from orchestrator.question import STRATEGY_FIELDS, Candidate, Question
from orchestrator.search import best_of
from orchestrator.space import places
from qlora_core.catalogue import find_model
from qlora_core.recipe import Method
from qlora_core.strategy import Strategy

JOBS_OF_A_PROCESS = 4
"""One that is started takes as long as so many, or so."""
OPEN = frozenset({"world_size", "micro_batch", "gradient_checkpointing", "zero_stage"})
"""What is chosen for each job: what matters most. Where nothing fits a pool so, all of the strategy is."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to carry a job out.

    Attributes:
        pool: the name of the nodes.
        gpus: that it takes: of one node, or whole nodes.
        nodes: that they are in.
        hours, low_hours, high_hours: of a run, as expected, and between which it lies.
        cost, low_cost, high_cost: of the GPUs that it takes, at the pool's price; None where it has none.
        way: the plan behind it.
    """

    pool: str
    gpus: int
    nodes: int
    hours: float
    low_hours: float
    high_hours: float
    cost: float | None
    low_cost: float | None
    high_cost: float | None
    way: Alternative

    @property
    def gpus_of_a_node(self) -> int:
        """Taken of each node that it is in."""
        return -(-self.gpus // self.nodes)

    @property
    def price(self) -> float:
        """What it is compared by: its cost, or where no pool has a price its GPU hours."""
        return self.gpus * self.hours if self.cost is None else self.cost


def least_of_each_pool(found: Iterable[Option], figure: Callable[[Option], float]) -> list[Option]:
    """Of each pool the option with the least of a figure, in the order of the pools; of those alike the first."""
    least: dict[str, Option] = {}
    for one in found:
        if one.pool not in least or figure(one) < figure(least[one.pool]):
            least[one.pool] = one
    return list(least.values())


def options(job: JobForm, fleet: Cluster, history: History, method: Method | None = None) -> list[Option]:
    """The ways to carry a job out in a fleet, each pool by itself; none where it fits nowhere.

    Args:
        method: another than the job's: what the same work takes with it.
    """
    recipe = job.recipe
    if method is not None and method != recipe.method:
        quantization = recipe.quantization if method == "qlora" else "none"
        recipe = replace(recipe, method=method, quantization=quantization)
    architecture = find_model(job.model)
    question = Question(
        architecture,
        recipe,
        fitting_defaults(architecture, Strategy()),
        OPEN,
        whole_step=True,
        objective="cheapest",  # no groups of unlike pools
        spreads=history.spreads(),
    )
    others = Alternatives(architecture, job.tokens, fleet.currency, history)
    found: list[Option] = []
    for target in targets_of(fleet.pools, recipe.compute_dtype, 1):
        pool = target.pool
        if pool is None:
            continue
        # as in a run, nothing is moved to a host of whose memory nothing is known
        rest = frozenset(STRATEGY_FIELDS) - (frozenset() if pool.host_ram_bytes else {"offload"})
        found += in_pool(question, target, pool, others) or in_pool(replace(question, open=rest), target, pool, others)
    return found


def options_of_all(
    jobs: Sequence[tuple[JobForm, Method | None]], fleet: Cluster, history: History
) -> list[list[Option]]:
    """`options` of several jobs, each with another method or None for its own, in their order.

    Many are shared out among this machine's processors.
    """
    processes = min(os.cpu_count() or 1, len(jobs) // JOBS_OF_A_PROCESS)
    if processes < 2:
        return [options(job, fleet, history, method) for job, method in jobs]
    parts = shares(jobs, -(-len(jobs) // (2 * processes)))
    ask = partial(_options_of, fleet=fleet, history=history)
    # planning makes no cycles, and looking for some takes a sixth of its time
    with ProcessPoolExecutor(processes, multiprocessing.get_context(how_to_start()), gc.disable) as pool:
        answers = list(pool.map(ask, [[jobs[index] for index in part] for part in parts]))
    found = dict(zip(chain.from_iterable(parts), chain.from_iterable(answers), strict=True))
    return [found[index] for index in range(len(jobs))]


def how_to_start() -> Literal["fork", "spawn"]:
    """How processes are started: forked ones need not import anew, but would have the locks of other threads."""
    return "fork" if sys.platform == "linux" and threading.active_count() == 1 else "spawn"


def shares(jobs: Sequence[tuple[JobForm, Method | None]], most: int) -> list[list[int]]:
    """Numbers of jobs to be planned by one process, up to so `most` together: of one model, which have much in common.

    Those that take the longest come first, so that no processor works on alone at the end.
    """
    alike: dict[tuple[str, Method | None], list[int]] = {}
    for index, (job, method) in enumerate(jobs):
        alike.setdefault((job.model, method), []).append(index)
    parts = [together[at : at + most] for together in alike.values() for at in range(0, len(together), most)]
    return sorted(parts, key=lambda part: (find_model(jobs[part[0]][0].model).experts == 0, -len(part)))


def _options_of(asked: Sequence[tuple[JobForm, Method | None]], fleet: Cluster, history: History) -> list[list[Option]]:
    return [options(job, fleet, history, method) for job, method in asked]


best_known = lru_cache(maxsize=4096)(best_of)
"""`best_of`, which is the same for jobs that differ in their data alone."""


def in_pool(question: Question, target: Target, pool: Pool, others: Alternatives) -> list[Option]:
    """A pool's options, the fewest GPUs first; more GPUs that make it no faster are left out."""
    found: list[Option] = []
    for place in places(question, [target]):
        if place.nodes > 1 and place.gpus % pool.gpus_per_node:
            continue
        one = best_known(question, place)
        if one is None:
            continue
        way = others.of("", place, one.target, Candidate(one.recipe, one.strategy), one.needed, ())
        if way.duration is None or (found and way.duration.seconds / 3600 >= found[-1].hours):
            continue
        share = place.gpus / (place.nodes * pool.gpus_per_node)
        prices = (way.duration.price, way.duration.low_price, way.duration.high_price)
        cost, low, high = (None if price is None else price * share for price in prices)
        found.append(
            Option(
                pool=pool.name,
                gpus=place.gpus,
                nodes=place.nodes,
                hours=way.duration.seconds / 3600,
                low_hours=way.duration.low_seconds / 3600,
                high_hours=way.duration.high_seconds / 3600,
                cost=cost,
                low_cost=low,
                high_cost=high,
                way=way,
            )
        )
    return found
