"""What a fleet carries, and the questions behind it: one more node, a pool lost, a purchase, other methods."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from clusters.cluster import Cluster, Pool
from clusters.hours import NEVER_CLOSES, OpenHours
from orchestrator.fleet.jobs import WEEK_HOURS, JobList, Run
from orchestrator.fleet.options import Option, options_of_all
from orchestrator.fleet.schedule import ALWAYS_OPEN, Placed, Schedule, by_rules
from orchestrator.history import History
from qlora_core.recipe import Method

SOLVER_SECONDS = 3.0
MOST_NODES = 64
"""A purchase is looked for up to so many nodes of a kind."""
METHODS: tuple[Method, ...] = ("qlora", "lora", "full")


@dataclass(frozen=True, slots=True)
class Figures:
    """A schedule in numbers.

    Attributes:
        late: runs that miss their deadline.
        late_hours: by how much, all together.
        waited_hours: of the mean run.
        cost, low_cost, high_cost: of the GPUs taken; None where a pool that is used has no price.
        gpu_hours: of all runs.
        ends: hours until the last run has ended.
    """

    runs: int
    nowhere: int
    late: int
    late_hours: float
    waited_hours: float
    cost: float | None
    low_cost: float | None
    high_cost: float | None
    gpu_hours: float
    ends: float


@dataclass(frozen=True, slots=True)
class Change:
    """What another fleet would come to, planned by rules as the fleet is for the comparison."""

    title: str
    figures: Figures


@dataclass(frozen=True, slots=True)
class Purchase:
    """So many nodes more of a pool's kind with which no deadline is missed.

    Attributes:
        per_week: what they cost a week, for the hours of the first in which they may be used; None without a price.
    """

    pool: str
    nodes: int
    per_week: float | None


@dataclass(frozen=True, slots=True)
class ByMethod:
    """What one run of a job takes at least, with each method.

    Attributes:
        gpus, hours, cost: of the cheapest way; None where it fits nowhere.
    """

    job: str
    method: Method
    gpus: int | None
    hours: float | None
    cost: float | None


@dataclass(frozen=True, slots=True)
class Outlook:
    """The answer of `qlora-capacity`.

    Attributes:
        hours: when those pools are open that close, by their names.
        ways: of each job, by its index.
        impossible: jobs whose deadline no GPUs of the fleet can keep, even all alone.
        by_rules: the figures that the changes are to be held against.
        remarks: what was assumed or left out.
    """

    fleet: Cluster
    jobs: JobList
    hours: Mapping[str, OpenHours]
    ways: Mapping[int, Sequence[Option]]
    schedule: Schedule
    figures: Figures
    by_rules: Figures
    impossible: tuple[str, ...]
    changes: tuple[Change, ...]
    purchases: tuple[Purchase, ...]
    methods: tuple[ByMethod, ...]
    remarks: tuple[str, ...]

    def utilization(self) -> dict[str, float]:
        """The part of each pool's open GPU hours that is taken, until the last run has ended."""
        return {pool.name: self._taken(pool) for pool in self.fleet.pools}

    def _taken(self, pool: Pool) -> float:
        taken = sum(one.option.hours * one.option.gpus for one in self.schedule.placed if one.option.pool == pool.name)
        opened = self.hours.get(pool.name, NEVER_CLOSES).opened(self.figures.ends)
        return taken / (pool.gpus * opened) if opened else 0.0


def outlook(
    fleet: Cluster, jobs: JobList, history: History, seconds: float = SOLVER_SECONDS, *, other_methods: bool = False
) -> Outlook:
    """What a fleet comes to with a list of jobs.

    Args:
        history: measured runs, which correct times.
        seconds: that the solver may take.
        other_methods: say what the same work takes by them, which takes two times as long again.
    """
    runs = jobs.runs()
    ways = dict(enumerate(options_of_all([(job, None) for job in jobs.jobs], fleet, history)))
    hours = {pool.name: OpenHours(pool.hours, jobs.begins) for pool in fleet.pools if pool.hours is not None}
    begun = by_rules(runs, ways, fleet, hours=hours)
    remarks: list[str] = []
    schedule = begun
    if hours:
        remarks.append(
            f"{' and '.join(hours)}: a run pauses when its pool closes, and goes on when it opens."
            " The schedule is by rules alone: the solver knows no hours."
        )
    elif importlib.util.find_spec("ortools") is None:
        remarks.append(
            'The schedule is by rules alone: OR-tools is not installed (pip install "qlora-orchestrator[capacity]").'
        )
    else:
        from orchestrator.fleet.solver import by_solver

        solved = by_solver(runs, ways, fleet, begun, seconds)
        if solved is None:
            remarks.append("The schedule is by rules alone: there are too many runs and nodes for the solver.")
        else:
            schedule = solved
    impossible = tuple(
        job.name
        for index, job in enumerate(jobs.jobs)
        if job.deadline_hours is not None
        and ways[index]
        and min(option.hours for option in ways[index]) > job.deadline_hours
    )
    return Outlook(
        fleet=fleet,
        jobs=jobs,
        hours=hours,
        ways=ways,
        schedule=schedule,
        figures=figures_of(schedule),
        by_rules=figures_of(begun),
        impossible=impossible,
        changes=tuple(changes(fleet, runs, ways, begun.order, hours)),
        purchases=tuple(purchases(fleet, runs, ways, begun, hours)) if not impossible else (),
        methods=tuple(by_method(fleet, jobs, ways, history)) if other_methods else (),
        remarks=tuple(remarks),
    )


def figures_of(schedule: Schedule) -> Figures:
    """A schedule in numbers."""
    placed = schedule.placed
    late = [one for one in placed if one.late_hours > 1e-9]
    return Figures(
        runs=len(placed) + len(schedule.nowhere),
        nowhere=len(schedule.nowhere),
        late=len(late),
        late_hours=sum(one.late_hours for one in late),
        waited_hours=mean(one.waited_hours for one in placed) if placed else 0.0,
        cost=total(placed, "cost"),
        low_cost=total(placed, "low_cost"),
        high_cost=total(placed, "high_cost"),
        gpu_hours=sum(one.option.gpus * one.option.hours for one in placed),
        ends=max((one.end for one in placed), default=0.0),
    )


def total(placed: Sequence[Placed], which: str) -> float | None:
    """The sum of a price over runs; None where one has none."""
    prices = [getattr(one.option, which) for one in placed]
    return None if any(price is None for price in prices) else float(sum(prices))


def changes(
    fleet: Cluster,
    runs: Sequence[Run],
    ways: Mapping[int, Sequence[Option]],
    order: int | None = None,
    hours: Mapping[str, OpenHours] = ALWAYS_OPEN,
) -> list[Change]:
    """One more node of each pool; each pool lost; the runs placed in the same order as before."""
    found = []
    for pool in fleet.pools:
        more = with_nodes(fleet, pool.name, pool.nodes + 1)
        found.append(Change(f"one more node of {pool.name}", figures_of(by_rules(runs, ways, more, order, hours))))
    for pool in fleet.pools if len(fleet.pools) > 1 else ():
        less = replace(fleet, pools=tuple(each for each in fleet.pools if each is not pool))
        left = {job: [way for way in each if way.pool != pool.name] for job, each in ways.items()}
        found.append(Change(f"without {pool.name}", figures_of(by_rules(runs, left, less, order, hours))))
    return found


def with_nodes(fleet: Cluster, name: str, nodes: int) -> Cluster:
    """`fleet` with another number of nodes in a pool. Runs take no more GPUs than before."""
    return replace(
        fleet, pools=tuple(replace(pool, nodes=nodes) if pool.name == name else pool for pool in fleet.pools)
    )


def purchases(
    fleet: Cluster,
    runs: Sequence[Run],
    ways: Mapping[int, Sequence[Option]],
    begun: Schedule,
    hours: Mapping[str, OpenHours] = ALWAYS_OPEN,
) -> list[Purchase]:
    """Of each kind of node the fewest more with which all deadlines are kept, the cheapest first; none if they are."""
    if begun.late == 0:
        return []
    found = []
    for pool in fleet.pools:
        number = fewest(fleet, pool, runs, ways, begun.order, hours)
        if number is not None:
            open_hours = hours.get(pool.name, NEVER_CLOSES).opened(WEEK_HOURS)
            price = None if pool.price_per_hour is None else number * pool.price_per_hour * open_hours
            found.append(Purchase(pool.name, number, price))
    return sorted(found, key=lambda one: (one.per_week is None, one.per_week or 0.0, one.nodes))


def fewest(
    fleet: Cluster,
    pool: Pool,
    runs: Sequence[Run],
    ways: Mapping[int, Sequence[Option]],
    order: int | None = None,
    hours: Mapping[str, OpenHours] = ALWAYS_OPEN,
) -> int | None:
    """How many more nodes of a pool it takes, up to MOST_NODES; None where that does not do."""

    def enough(more: int) -> bool:
        return by_rules(runs, ways, with_nodes(fleet, pool.name, pool.nodes + more), order, hours).late == 0

    step = 1
    while step <= MOST_NODES and not enough(step):
        step *= 2
    if step > MOST_NODES:
        return None
    low, high = step // 2, step  # not enough, enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def by_method(fleet: Cluster, jobs: JobList, ways: Mapping[int, Sequence[Option]], history: History) -> list[ByMethod]:
    """What each job takes at least with QLoRA, LoRA and all weights."""
    asked = [(job, method) for job in jobs.jobs for method in METHODS if method != job.recipe.method]
    others = dict(
        zip(((job.name, method) for job, method in asked), options_of_all(asked, fleet, history), strict=True)
    )
    found = []
    for index, job in enumerate(jobs.jobs):
        for method in METHODS:
            known = ways[index] if job.recipe.method == method else others[job.name, method]
            best = min(known, key=lambda option: option.price, default=None)
            found.append(
                ByMethod(
                    job.name,
                    method,
                    None if best is None else best.gpus,
                    None if best is None else best.hours,
                    None if best is None else best.cost,
                )
            )
    return found
