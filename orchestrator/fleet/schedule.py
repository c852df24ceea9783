"""A schedule: which run is carried out when, on which GPUs of which nodes.

For a few hundred runs by a solver (OR-tools' CP-SAT), which says how far from the best its answer can be; beyond that,
and to begin with, by rules that place one run after the other.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter, itemgetter
from types import MappingProxyType

from clusters.cluster import Cluster, Pool
from clusters.hours import NEVER_CLOSES, OpenHours
from orchestrator.fleet.jobs import Run
from orchestrator.fleet.options import Option, least_of_each_pool

ALWAYS_OPEN: Mapping[str, OpenHours] = MappingProxyType({})
"""The hours of pools of which none closes."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A run in a schedule.

    Attributes:
        start, end: hours from the beginning. Between them it pauses while its pool is closed.
        nodes: the numbers of the pool's nodes that it is on, from 0.
    """

    run: Run
    option: Option
    start: float
    end: float
    nodes: tuple[int, ...]

    @property
    def late_hours(self) -> float:
        """After its deadline; 0 where it has none or keeps it."""
        return 0.0 if self.run.due is None else max(0.0, self.end - self.run.due)

    @property
    def waited_hours(self) -> float:
        """Between being asked for and beginning."""
        return self.start - self.run.release


@dataclass(frozen=True, slots=True)
class Schedule:
    """All runs that fit somewhere, and those that fit nowhere.

    Attributes:
        by: "solver" or "rules".
        least_late: weighted hours too late that no schedule can go below.
        least_price: what no schedule can cost less than.
        order: of ORDERS, the one by which the rules placed the runs.
    """

    placed: tuple[Placed, ...]
    nowhere: tuple[Run, ...]
    by: str
    least_late: float
    least_price: float
    order: int = 0

    @property
    def late(self) -> float:
        """Hours too late, weighted by priority."""
        return math.fsum(one.run.priority * one.late_hours for one in self.placed)

    @property
    def price(self) -> float:
        """The sum of the options' prices."""
        return math.fsum(one.option.price for one in self.placed)

    @property
    def merit(self) -> tuple[float, float, float]:
        """Less is better: hours too late, then price, then hours waited; sums are the same in whatever order."""
        return self.late, self.price, math.fsum(one.waited_hours for one in self.placed)


def in_turn(placed: Iterable[Placed], gpus_of_a_node: Mapping[str, int]) -> tuple[Placed, ...]:
    """Each run on its nodes as early as they have room beside the runs before it, in the order of their starts.

    It is for pools that never close. Where there was room for all, none begins later than before; of those that start
    together the shorter goes first.
    """
    on_node: dict[tuple[str, int], list[tuple[float, float, int]]] = defaultdict(list)
    moved = []
    for one in sorted(placed, key=lambda each: (each.start, each.end)):
        pool, wanted = one.option.pool, one.option.gpus_of_a_node
        taken = [on_node[pool, node] for node in one.nodes]
        ends = {end for node in taken for _, end, _ in node if end > one.run.release}
        start = next(
            moment
            for moment in sorted({one.run.release, *ends})
            if all(
                most_taken(node, moment, moment + one.option.hours) + wanted <= gpus_of_a_node[pool] for node in taken
            )
        )
        end = start + one.option.hours
        for node in taken:
            node.append((start, end, wanted))
        moved.append(replace(one, start=start, end=end))
    return tuple(moved)


def most_taken(node: Iterable[tuple[float, float, int]], start: float, end: float) -> int:
    """The most GPUs of a node that are taken at a time between two, by those that have it from when to when."""
    within = [one for one in node if one[0] < end and one[1] > start]
    begins = {start, *(begin for begin, _, _ in within if begin > start)}
    return max(sum(gpus for begin, until, gpus in within if begin <= moment < until) for moment in begins)


# --- by rules ---------------------------------------------------------------------------------------------------------


@dataclass
class Nodes:
    """A pool's nodes while runs are placed: from when on each GPU is free, of each node in order."""

    pool: Pool
    free: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.free = [[0.0] * self.pool.gpus_per_node for _ in range(self.pool.nodes)]
        # nodes by when so many of their GPUs are free; entries that are out of date are passed over
        self._queues: dict[int, list[tuple[float, int]]] = {}
        # by GPUs of a node and nodes; what was found holds until something is taken
        self._earliest: dict[tuple[int, int], float] = {}

    def earliest(self, option: Option) -> float:
        """When an option's GPUs could be had."""
        size = option.gpus_of_a_node, option.nodes
        if size not in self._earliest:
            self._earliest[size] = max(moment for moment, _ in self._soonest(option))
        return self._earliest[size]

    def take(self, option: Option, end: float) -> tuple[int, ...]:
        """Take an option's GPUs until `end`; returns the nodes."""
        nodes = tuple(node for _, node in self._soonest(option))
        self._earliest.clear()
        for node in nodes:
            gpus = self.free[node]
            gpus[: option.gpus_of_a_node] = [end] * option.gpus_of_a_node
            gpus.sort()
            for wanted, queue in self._queues.items():
                heapq.heappush(queue, (gpus[wanted - 1], node))
        return nodes

    def _soonest(self, option: Option) -> list[tuple[float, int]]:
        wanted = option.gpus_of_a_node
        if wanted not in self._queues:
            self._queues[wanted] = [(gpus[wanted - 1], node) for node, gpus in enumerate(self.free)]
            heapq.heapify(self._queues[wanted])
        queue = self._queues[wanted]
        found: list[tuple[float, int]] = []
        seen: set[int] = set()
        while len(found) < option.nodes:
            moment, node = heapq.heappop(queue)
            if node not in seen and moment == self.free[node][wanted - 1]:
                found.append((moment, node))
                seen.add(node)
        for entry in found:
            heapq.heappush(queue, entry)
        return found


ORDERS: tuple[Callable[[Run], tuple[float, ...]], ...] = (
    lambda run: (run.release, math.inf if run.due is None else run.due, -run.priority),
    lambda run: (math.inf if run.due is None else run.due, run.release),
    lambda run: (-run.priority, run.release),
)
"""In which runs are placed: as they are asked for, by deadline, by priority."""


def by_rules(
    runs: Sequence[Run],
    ways: Mapping[int, Sequence[Option]],
    fleet: Cluster,
    order: int | None = None,
    hours: Mapping[str, OpenHours] = ALWAYS_OPEN,
) -> Schedule:
    """The best of several orders in which each run takes the cheapest option that keeps its deadline.

    Where none keeps it, or there is no deadline, the one that ends first; of runs without one, the cheapest that does
    not wait.

    Args:
        order: the only one of ORDERS that is tried.
        hours: of the pools that close.
    """
    found = [
        replace(placed_in_order(sorted(runs, key=key), ways, fleet, hours), order=number)
        for number, key in enumerate(ORDERS)
        if order in (None, number)
    ]
    return min(found, key=attrgetter("merit"))


def placed_in_order(
    runs: Iterable[Run], ways: Mapping[int, Sequence[Option]], fleet: Cluster, hours: Mapping[str, OpenHours]
) -> Schedule:
    """Place one run after the other."""
    nodes = {pool.name: Nodes(pool) for pool in fleet.pools}
    clocks = {pool.name: hours.get(pool.name, NEVER_CLOSES) for pool in fleet.pools}
    cheapest_first = {
        job: sorted(((each.price, each, nodes[each.pool], clocks[each.pool]) for each in options), key=itemgetter(0))
        for job, options in ways.items()
    }
    quickest = {job: least_of_each_pool(options, attrgetter("hours")) for job, options in ways.items()}
    placed, nowhere, least_late, least_price = [], [], 0.0, 0.0
    for run in runs:
        best: tuple[tuple[float, ...], Option, float, float] | None = None
        for price, option, where, clock in cheapest_first[run.job]:
            if best is not None and best[0] < (0.0, 0.0, price):
                break  # it is neither late nor waits, and all that follow cost more
            start = clock.begin(max(run.release, where.earliest(option)))
            end = clock.end(start, option.hours)
            if end == math.inf:
                continue
            late = 0.0 if run.due is None else max(0.0, end - run.due)
            waits = run.due is None and start > run.release
            merit = (late, float(waits), end if late or waits else price, end)
            if best is None or merit < best[0]:
                best = merit, option, start, end
        if best is None:
            nowhere.append(run)
            continue
        _, option, start, end = best
        placed.append(Placed(run, option, start, end, nodes[option.pool].take(option, end)))
        if run.due is not None:
            alone = min(
                clocks[one.pool].end(clocks[one.pool].begin(run.release), one.hours) for one in quickest[run.job]
            )
            least_late += run.priority * max(0.0, alone - run.due)
        least_price += cheapest_first[run.job][0][0]
    return Schedule(tuple(placed), tuple(nowhere), "rules", least_late, least_price)
