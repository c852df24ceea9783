"""A schedule by constraint programming: OR-tools' CP-SAT, begun from the one by rules."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

from clusters.cluster import Cluster
from orchestrator.fleet.jobs import Run
from orchestrator.fleet.options import Option
from orchestrator.fleet.schedule import Placed, Schedule, in_turn

UNITS_PER_HOUR = 3600
"""Times are whole seconds, or more where the sums would be too large."""
LARGEST_SUM = 2**60
"""Of the objective: the solver counts in 64 bits."""
MOST_CHOICES = 20_000
"""Nodes on which options could be placed, over all runs: more than this the solver does not get through."""
PRICE_STEPS = 1000
"""The dearest option's price as a whole number."""
WORKERS = 1
"""With more, which of several best schedules is found would be chance."""


def is_too_large(runs: Sequence[Run], ways: Mapping[int, Sequence[Option]], fleet: Cluster) -> bool:
    """Whether there are too many runs and nodes for the solver."""
    nodes = {pool.name: pool.nodes for pool in fleet.pools}
    choices = {job: sum(nodes[option.pool] for option in found) for job, found in ways.items()}
    return sum(choices[run.job] for run in runs) > MOST_CHOICES


def by_solver(
    runs: Sequence[Run], ways: Mapping[int, Sequence[Option]], fleet: Cluster, begun: Schedule, seconds: float
) -> Schedule | None:
    """A schedule that is no worse than `begun`, and what none can go below; None where no time was left to find one.

    First as few weighted hours too late as can be, then as low a price; then no run waits for nothing. To the solver
    times are whole units, all but deadlines rounded down: what it proves then holds for every schedule, and its own
    is carried out in its order.

    Args:
        seconds: that it may take.
    """
    from ortools.sat.python import cp_model

    nodes = {pool.name: pool.nodes for pool in fleet.pools}
    per_node = {pool.name: pool.gpus_per_node for pool in fleet.pools}
    placeable = [run for run in runs if ways[run.job]]
    model = cp_model.CpModel()
    most = PRICE_STEPS * len(placeable) + 1
    # one after the other all would have ended by then
    last = max((run.release for run in placeable), default=0.0)
    until = last + math.fsum(max(option.hours for option in ways[run.job]) for run in placeable) + 1
    weighted = most * until * (1 + sum(run.priority for run in placeable if run.due is not None))
    per_hour = max(1, min(UNITS_PER_HOUR, math.floor(LARGEST_SUM / weighted)))
    horizon = math.ceil(until * per_hour)
    dearest = max((option.price for run in placeable for option in ways[run.job]), default=0.0) or 1.0
    hints = {id(one.run): one for one in begun.placed}
    on_node: dict[tuple[str, int], list[tuple[Any, int]]] = defaultdict(list)
    chosen: dict[tuple[int, int], Any] = {}
    placed_on: dict[tuple[int, int, int], Any] = {}
    starts, lates, prices = [], [], []
    for index, run in enumerate(placeable):
        hint = hints[id(run)]
        start = model.new_int_var(math.floor(run.release * per_hour), horizon, f"start {index}")
        starts.append(start)
        model.add_hint(start, math.floor(hint.start * per_hour))
        late = None
        if run.due is not None:
            late = model.new_int_var(0, horizon, f"late {index}")
            lates.append(run.priority * late)
        present = []
        for number, option in enumerate(ways[run.job]):
            takes = model.new_bool_var(f"{index} by {number}")
            chosen[index, number] = takes
            present.append(takes)
            model.add_hint(takes, option is hint.option)
            duration = math.floor(option.hours * per_hour)
            prices.append(math.ceil(PRICE_STEPS * option.price / dearest) * takes)
            model.add(start + duration <= horizon).only_enforce_if(takes)
            if late is not None and run.due is not None:
                model.add(late >= start + duration - math.ceil(run.due * per_hour)).only_enforce_if(takes)
            each = []
            for node in range(nodes[option.pool]):
                here = model.new_bool_var(f"{index} by {number} on {node}")
                placed_on[index, number, node] = here
                each.append(here)
                model.add_hint(here, option is hint.option and node in hint.nodes)
                interval = model.new_optional_fixed_size_interval_var(start, duration, here, f"{index} {number} {node}")
                on_node[option.pool, node].append((interval, option.gpus_of_a_node))
            model.add(sum(each) == option.nodes * takes)
        model.add_exactly_one(present)
    for (pool, _), intervals in on_node.items():
        model.add_cumulative([each for each, _ in intervals], [gpus for _, gpus in intervals], per_node[pool])
    model.minimize(most * sum(lates) + sum(prices))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = WORKERS
    solver.parameters.random_seed = 0
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None
    placed = []
    for index, run in enumerate(placeable):
        for number, option in enumerate(ways[run.job]):
            if solver.boolean_value(chosen[index, number]):
                begin = max(run.release, solver.value(starts[index]) / per_hour)
                on = tuple(n for n in range(nodes[option.pool]) if solver.boolean_value(placed_on[index, number, n]))
                placed.append(Placed(run, option, begin, begin + option.hours, on))
    proven = max(begun.least_late, max(0, math.floor(solver.best_objective_bound)) // most / per_hour)
    found = Schedule(in_turn(placed, per_node), begun.nowhere, "solver", proven, begun.least_price)
    best = min(found, begun, key=attrgetter("merit"))
    return replace(best, by="solver", least_late=min(proven, best.late))
