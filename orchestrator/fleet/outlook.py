"""What a fleet carries, and the questions behind it: one more node, a pool lost, a purchase, other methods."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from statistics import mean
from typing import NamedTuple

from clusters.cluster import Cluster, Pool
from clusters.hours import NEVER_CLOSES, OpenHours
from orchestrator.fleet.jobs import WEEK_HOURS, JobForm, JobList, Run
from orchestrator.fleet.options import Option, least_of_each_pool, options_of_all
from orchestrator.fleet.schedule import Placed, Schedule, by_rules
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
        cost, low_cost, high_cost: of the GPUs taken; None where a pool that is used has no price, or none is.
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
    """So many nodes more of a pool's kind with which all that can fits, and keeps its deadline.

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
        gpus, hours, cost, low_cost, high_cost: of the cheapest way; None where it fits nowhere.
    """

    job: str
    method: Method
    gpus: int | None
    hours: float | None
    cost: float | None
    low_cost: float | None
    high_cost: float | None


@dataclass(frozen=True, slots=True)
class Outlook:
    """The answer of `qlora-capacity`.

    Attributes:
        hours: when those pools are open that close, by their names.
        ways: of each job, by its index.
        impossible: jobs whose deadline no GPUs of the fleet as it is can keep, even all alone.
        by_rules: the figures that the changes are to be held against.
        purchases: see `Buying`.
        no_purchase_keeps, no_purchase_fits: names of its `late` and `nowhere`.
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
    purchases: tuple[Purchase, ...] | None
    no_purchase_keeps: tuple[str, ...]
    no_purchase_fits: tuple[str, ...]
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
    asked: list[tuple[JobForm, Method | None]] = [(job, None) for job in jobs.jobs]
    ways = dict(enumerate(options_of_all(asked, fleet, history)))
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
            'The schedule is by rules alone: OR-tools is not installed (in a checkout: pip install ".[capacity]").'
        )
    else:
        from orchestrator.fleet.solver import by_solver, is_too_large

        if is_too_large(runs, ways, fleet):
            remarks.append("The schedule is by rules alone: there are too many runs and nodes for the solver.")
        elif (solved := by_solver(runs, ways, fleet, begun, seconds)) is None:
            remarks.append(
                f"The schedule is by rules alone: the solver found none in {seconds:g} s; a longer --seconds may do."
            )
        else:
            schedule = solved
    unpriced = [pool.name for pool in fleet.pools if pool.price_per_hour is None]
    if unpriced and len(unpriced) < len(fleet.pools):
        remarks.append(f"Ways are compared by GPU hours: no price is given for {' and '.join(unpriced)}.")
    impossible = tuple(
        job.name
        for index, job in enumerate(jobs.jobs)
        if job.deadline_hours is not None
        and ways[index]
        and min(option.hours for option in ways[index]) > job.deadline_hours
    )
    work = Work(fleet, runs, ways, begun.order, hours)
    more = 1 if is_kept(schedule) else MOST_NODES
    beyond = dict(enumerate(options_of_all(asked, fleet, history, more)))
    bought = purchases(work, beyond, schedule)
    return Outlook(
        fleet=fleet,
        jobs=jobs,
        hours=hours,
        ways=ways,
        schedule=schedule,
        figures=figures_of(schedule),
        by_rules=figures_of(begun),
        impossible=impossible,
        changes=tuple(changes(work, beyond)),
        purchases=bought.purchases,
        no_purchase_keeps=tuple(jobs.jobs[index].name for index in bought.late),
        no_purchase_fits=tuple(jobs.jobs[index].name for index in bought.nowhere),
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
    """The sum of a price over runs; None where one has none, or there are none."""
    prices = [getattr(one.option, which) for one in placed]
    return None if not prices or any(price is None for price in prices) else float(sum(prices))


@dataclass(frozen=True, slots=True)
class Work:
    """What is placed by rules again and again, on one fleet and another, in the same order of ORDERS."""

    fleet: Cluster
    runs: Sequence[Run]
    ways: Mapping[int, Sequence[Option]]
    order: int | None = None
    hours: Mapping[str, OpenHours] = field(default_factory=dict)

    def without(self, pool: Pool) -> Schedule:
        """Its schedule with a pool lost."""
        less = replace(self.fleet, pools=tuple(each for each in self.fleet.pools if each is not pool))
        left = {job: [way for way in each if way.pool != pool.name] for job, each in self.ways.items()}
        return by_rules(self.runs, left, less, self.order, self.hours)

    def with_more(self, pool: Pool, more: int, beyond: Mapping[int, Sequence[Option]]) -> Schedule:
        """Its schedule with so many more nodes in a pool, and the ways `beyond` today's nodes that they open."""
        nodes = pool.nodes + more
        grown = tuple(replace(each, nodes=nodes) if each is pool else each for each in self.fleet.pools)
        ways = {
            job: [*each, *(way for way in beyond[job] if way.pool == pool.name and way.nodes <= nodes)]
            for job, each in self.ways.items()
        }
        return by_rules(self.runs, ways, replace(self.fleet, pools=grown), self.order, self.hours)

    def earliest_end(self, run: Run, found: Sequence[Option]) -> float:
        """When a run could have ended, all alone; infinite where it fits nowhere."""
        clocks = ((self.hours.get(one.pool, NEVER_CLOSES), one) for one in found)
        return min((clock.end(clock.begin(run.release), one.hours) for clock, one in clocks), default=math.inf)


def is_kept(schedule: Schedule) -> bool:
    """Whether all runs fit and no deadline is missed."""
    figures = figures_of(schedule)
    return not figures.nowhere and not figures.late


def changes(work: Work, beyond: Mapping[int, Sequence[Option]]) -> list[Change]:
    """One more node of each pool; each pool lost.

    Args:
        beyond: of each job, the ways on more nodes than a pool has.
    """
    pools = work.fleet.pools
    more = [Change(f"one more node of {pool.name}", figures_of(work.with_more(pool, 1, beyond))) for pool in pools]
    lost = [Change(f"without {pool.name}", figures_of(work.without(pool))) for pool in pools if len(pools) > 1]
    return more + lost


class Buying(NamedTuple):
    """What more nodes could do for a schedule.

    Attributes:
        purchases: of each kind of node the fewest more with which all runs fit and keep their deadlines, but for those
            named below, the cheapest first; None where no number of nodes would change anything.
        late: jobs with runs whose deadlines none would keep. They are carried out, too.
        nowhere: jobs that fit nowhere then, either.
    """

    purchases: tuple[Purchase, ...] | None
    late: list[int]
    nowhere: list[int]


def purchases(work: Work, beyond: Mapping[int, Sequence[Option]], schedule: Schedule) -> Buying:
    """What more nodes of one kind could do.

    Args:
        beyond: of each job, the ways on up to MOST_NODES more nodes than a pool has.
        schedule: which may keep all that can be kept: then nothing is bought.
    """
    quickest = {job: least_of_each_pool([*each, *beyond[job]], attrgetter("hours")) for job, each in work.ways.items()}
    ends = {run: work.earliest_end(run, quickest[run.job]) for run in work.runs}
    homeless = {run for run, end in ends.items() if end == math.inf}
    too_late = {run for run, end in ends.items() if run.due is not None and run.due + 1e-9 < end < math.inf}
    late, nowhere = sorted({run.job for run in too_late}), sorted({run.job for run in homeless})
    missed = {one.run for one in schedule.placed if one.late_hours > 1e-9}
    if (too_late | homeless).issuperset(missed.union(schedule.nowhere)):
        return Buying(None, late, nowhere)
    wanted = [replace(run, due=None) if run in too_late else run for run in work.runs if run not in homeless]
    asked = replace(work, runs=wanted)
    found = []
    for pool in work.fleet.pools:
        number = fewest(asked, pool, beyond)
        if number is not None:
            open_hours = work.hours.get(pool.name, NEVER_CLOSES).opened(WEEK_HOURS)
            price = None if pool.price_per_hour is None else number * pool.price_per_hour * open_hours
            found.append(Purchase(pool.name, number, price))
    found.sort(key=lambda one: (one.per_week is None, one.per_week or 0.0, one.nodes))
    return Buying(tuple(found), late, nowhere)


def fewest(work: Work, pool: Pool, beyond: Mapping[int, Sequence[Option]]) -> int | None:
    """How many more nodes of a pool it takes, up to MOST_NODES; None where that does not do.

    0 where the deadlines that can be kept are missed for the sake of those that cannot.
    """

    def enough(more: int) -> bool:
        return is_kept(work.with_more(pool, more, beyond))

    if enough(0):
        return 0
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
                ByMethod(job.name, method, *[None] * 5)
                if best is None
                else ByMethod(job.name, method, best.gpus, best.hours, best.cost, best.low_cost, best.high_cost)
            )
    return found
