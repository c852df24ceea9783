"""Where a fine-tune can run: on each number of GPUs of each pool the fastest way that fits, with its time and price."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Literal

from clusters.cluster import Cluster, Pool
from orchestrator.alternatives import Alternatives
from orchestrator.devices import pool_target
from orchestrator.durations import duration
from orchestrator.fleet.jobs import JobForm
from orchestrator.history import History
from orchestrator.planner import fitting_defaults, targets_of
from orchestrator.plans import Alternative
from orchestrator.question import STRATEGY_FIELDS, Candidate, Place, Question
from orchestrator.search import best_of
from orchestrator.space import divides, places
from qlora_core.catalogue import find_model
from qlora_core.recipe import Method, Recipe
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
        price: what it is compared by: its cost, or where a pool of the fleet has no price its GPU hours.
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
    price: float
    way: Alternative

    @property
    def gpus_of_a_node(self) -> int:
        """Taken of each node that it is in."""
        return -(-self.gpus // self.nodes)


def least_of_each_pool(found: Iterable[Option], figure: Callable[[Option], float]) -> list[Option]:
    """Of each pool the option with the least of a figure, in the order of the pools; of those alike the first."""
    least: dict[str, Option] = {}
    for one in found:
        if one.pool not in least or figure(one) < figure(least[one.pool]):
            least[one.pool] = one
    return list(least.values())


def is_priced(fleet: Cluster) -> bool:
    """Whether ways are compared by cost: all pools have a price. Else a sum would mix it with GPU hours."""
    return all(pool.price_per_hour is not None for pool in fleet.pools)


def options(
    job: JobForm, fleet: Cluster, history: History, method: Method | None = None, more: int = 0
) -> list[Option]:
    """The ways to carry a job out in a fleet, each pool by itself; none where it fits nowhere.

    Args:
        method: another than the job's: what the same work takes with it.
        more: only the ways on whole nodes beyond those of a pool, with up to so many more.
    """
    return lasting(ways(job.model, recipe_of(job, method), fleet, history, more), job.tokens, fleet)


def options_of_all(
    jobs: Sequence[tuple[JobForm, Method | None]], fleet: Cluster, history: History, more: int = 0
) -> list[list[Option]]:
    """`options` of several jobs, each with another method or None for its own, in their order.

    Jobs that differ in their data alone are planned once, and many are shared out among this machine's processors.
    """
    asked = [(job.model, recipe_of(job, method)) for job, method in jobs]
    unlike = list(dict.fromkeys(asked))
    ask = partial(_ways_of, fleet=fleet, history=history, more=more)
    processes = min(os.cpu_count() or 1, len(unlike) // JOBS_OF_A_PROCESS)
    if processes < 2:
        found = dict(zip(unlike, ask(unlike), strict=True))
    else:
        parts = shares(unlike, -(-len(unlike) // (2 * processes)))
        # planning makes no cycles, and looking for some takes a sixth of its time
        with ProcessPoolExecutor(processes, multiprocessing.get_context(how_to_start()), gc.disable) as pool:
            answers = pool.map(ask, parts)
            found = dict(zip(chain.from_iterable(parts), chain.from_iterable(answers), strict=True))
    return [lasting(found[each], job.tokens, fleet) for each, (job, _) in zip(asked, jobs, strict=True)]


def how_to_start() -> Literal["fork", "spawn"]:
    """How processes are started: forked ones need not import anew, but would have the locks of other threads."""
    return "fork" if sys.platform == "linux" and threading.active_count() == 1 else "spawn"


def shares(asked: Iterable[tuple[str, Recipe]], most: int) -> list[list[tuple[str, Recipe]]]:
    """What is to be planned by one process, up to so `most` together: of one model, which have much in common.

    Those that take the longest come first, so that no processor works on alone at the end.
    """
    alike: dict[tuple[str, Method], list[tuple[str, Recipe]]] = {}
    for model, recipe in asked:
        alike.setdefault((model, recipe.method), []).append((model, recipe))
    parts = [together[at : at + most] for together in alike.values() for at in range(0, len(together), most)]
    return sorted(parts, key=lambda part: (find_model(part[0][0]).experts == 0, -len(part)))


def recipe_of(job: JobForm, method: Method | None) -> Recipe:
    """A job's recipe, or what it is with another method: without what that does not know."""
    recipe = job.recipe
    if method is None or method == recipe.method:
        return recipe
    if method == "full":
        recipe = replace(recipe, use_rslora=False, use_dora=False, loraplus_lr_ratio=1.0)
    # of another method than qlora it is not quantized
    return replace(recipe, method=method, quantization="nf4" if method == "qlora" else "none")


# --- plans ------------------------------------------------------------------------------------------------------------


def _ways_of(
    asked: Sequence[tuple[str, Recipe]], fleet: Cluster, history: History, more: int
) -> list[list[Alternative]]:
    return [ways(model, recipe, fleet, history, more) for model, recipe in asked]


def ways(model: str, recipe: Recipe, fleet: Cluster, history: History, more: int) -> list[Alternative]:
    """The plans behind `options`, with which a step's time is known, and a run's is not."""
    architecture = find_model(model)
    question = Question(
        architecture,
        recipe,
        fitting_defaults(architecture, Strategy()),
        OPEN,
        whole_step=True,
        objective="cheapest",  # no groups of unlike pools
    ).informed(history)
    others = Alternatives(architecture, None, fleet.currency, history)
    found: list[Alternative] = []
    for target in targets_of(fleet.pools, recipe.compute_dtype, 1):
        pool = target.pool
        if pool is None:
            continue
        groups = beyond(question, pool, more) if more else places(question, [target])
        # as in a run, nothing is moved to a host of whose memory nothing is known
        anyhow = frozenset(STRATEGY_FIELDS) - (frozenset() if pool.host_ram_bytes else {"offload"})
        found += in_pool((question, replace(question, open=anyhow)), groups, pool, others)
    return found


def beyond(question: Question, pool: Pool, more: int) -> Iterator[Place]:
    """Whole nodes of a pool that had up to so many more of them, on more GPUs than it has."""
    for nodes in range(pool.nodes + 1, pool.nodes + more + 1):
        gpus = nodes * pool.gpus_per_node
        if divides(question, gpus):
            grown = replace(pool, nodes=nodes)
            yield Place(((pool_target(grown, question.recipe.compute_dtype, gpus), gpus),))


def in_pool(
    questions: Sequence[Question], groups: Iterable[Place], pool: Pool, others: Alternatives
) -> list[Alternative]:
    """A pool's ways, the fewest GPUs first; more GPUs that make it no faster are left out.

    Each place is asked by the first of `questions` that finds something there: a pool can do no less for having more.
    """
    found: list[Alternative] = []
    fastest = math.inf
    for place in groups:
        if place.nodes > 1 and place.gpus % pool.gpus_per_node:
            continue
        one = next((best for question in questions if (best := best_of(question, place)) is not None), None)
        if one is None:
            continue
        way = others.of("", place, one.target, Candidate(one.recipe, one.strategy), one.needed, ())
        if way.step_time is not None and way.step_time.seconds < fastest:
            fastest = way.step_time.seconds
            found.append(way)
    return found


def lasting(found: Iterable[Alternative], tokens: int, fleet: Cluster) -> list[Option]:
    """Plans as options of a run over so many tokens."""
    sizes = {pool.name: pool.gpus_per_node for pool in fleet.pools}
    priced = is_priced(fleet)
    timed = []
    for way in found:
        run = duration(way.step_time, tokens, way.gpus, way.price_per_hour, way.currency)
        if run is None:
            continue
        share = way.gpus / (way.nodes * sizes[way.gpu])
        prices = (run.price, run.low_price, run.high_price)
        cost, low, high = (None if each is None else each * share for each in prices)
        timed.append(
            Option(
                pool=way.gpu,
                gpus=way.gpus,
                nodes=way.nodes,
                hours=run.seconds / 3600,
                low_hours=run.low_seconds / 3600,
                high_hours=run.high_seconds / 3600,
                cost=cost,
                low_cost=low,
                high_cost=high,
                price=cost if priced and cost is not None else run.gpu_hours,
                way=way,
            )
        )
    return timed
