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
from orchestrator.fleet.schedule import Placed, Schedule, moved_forward

UNITS_PER_HOUR = 20
"""Times are whole numbers of three minutes; a run's are rounded up."""
MOST_CHOICES = 20_000
"""Nodes on which options could be placed, over all runs: more than this the solver does not get through."""
PRICE_STEPS = 1000
"""The dearest option's price as a whole number."""
WORKERS = 1
"""With more, which of several best schedules is found would be chance."""


def by_solver(
    runs: Sequence[Run], ways: Mapping[int, Sequence[Option]], fleet: Cluster, begun: Schedule, seconds: float
) -> Schedule | None:
    """A schedule that is no worse than `begun`, and what none can go below; None where it is too large.

    First as few weighted hours too late as can be, then as low a price; then no run waits for nothing.

    Args:
        seconds: that it may take.
    """
    from ortools.sat.python import cp_model

    nodes = {pool.name: pool.nodes for pool in fleet.pools}
    per_node = {pool.name: pool.gpus_per_node for pool in fleet.pools}
    placeable = [run for run in runs if ways[run.job]]
    if sum(nodes[option.pool] for run in placeable for option in ways[run.job]) > MOST_CHOICES:
        return None
    model = cp_model.CpModel()
    # one after the other all would have ended by then
    longest = (units(max(option.hours for option in ways[run.job])) for run in placeable)
    horizon = units(max((run.release for run in placeable), default=0.0)) + sum(longest) + 1
    dearest = max((option.price for run in placeable for option in ways[run.job]), default=0.0) or 1.0
    hints = {id(one.run): one for one in begun.placed}
    on_node: dict[tuple[str, int], list[tuple[Any, int]]] = defaultdict(list)
    chosen: dict[tuple[int, int], Any] = {}
    placed_on: dict[tuple[int, int, int], Any] = {}
    starts, lates, prices = [], [], []
    for index, run in enumerate(placeable):
        hint = hints[id(run)]
        release = units(run.release)
        start = model.new_int_var(release, horizon, f"start {index}")
        starts.append(start)
        model.add_hint(start, units(hint.start))
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
            duration = units(option.hours)
            prices.append(math.ceil(PRICE_STEPS * option.price / dearest) * takes)
            model.add(start + duration <= horizon).only_enforce_if(takes)
            if late is not None and run.due is not None:
                model.add(late >= start + duration - math.floor(run.due * UNITS_PER_HOUR)).only_enforce_if(takes)
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
    most = PRICE_STEPS * len(placeable) + 1
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
                begin = max(run.release, solver.value(starts[index]) / UNITS_PER_HOUR)
                on = tuple(n for n in range(nodes[option.pool]) if solver.boolean_value(placed_on[index, number, n]))
                placed.append(Placed(run, option, begin, begin + option.hours, on))
    bound = max(0, math.floor(solver.best_objective_bound))
    proven = max(begun.least_late, bound // most / UNITS_PER_HOUR)
    # when a run begins is the same to it where no deadline depends on it
    found = Schedule(moved_forward(placed, per_node), begun.nowhere, "solver", proven, begun.least_price)
    best = min(found, begun, key=attrgetter("merit"))
    # runs last a little less than the solver's steps: what it proves holds to a step a run
    return replace(best, by="solver", least_late=min(proven, best.late))


def units(hours: float) -> int:
    """Hours as a whole number of the solver's units, rounded up."""
    return math.ceil(hours * UNITS_PER_HOUR - 1e-9)
