"""Pictures of a fleet's outlook: the schedule, and cost against time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from clusters.hours import NEVER_CLOSES, OpenHours
from launch.report.pictures.style import COLORS, DASHES, INK, MARKERS, Picture, canvas, kind, styled
from orchestrator.fleet.options import is_priced
from orchestrator.fleet.outlook import Outlook
from orchestrator.fleet.schedule import Placed

LATE = "#d00000"
MOST_LANES = 60
"""Nodes that a picture of a schedule shows."""
MOST_BARS = 3000
"""Runs on nodes that it shows, so that a page stays small."""
MOST_HATCHED = 300
"""Of so many bars each is hatched: more are too small for that to be seen. Chromium prints a pattern for each, which
made hundreds of megabytes of a page."""


class Bar(NamedTuple):
    """A run on rows of a node, the GPUs beside each other that it takes there: of the first row, and how many."""

    run: Placed
    row: int
    rows: int


def gantt(answer: Outlook) -> Picture | None:
    """The schedule: a lane for each node that is used; None where nothing is placed."""
    on_node: dict[tuple[str, int], list[Placed]] = defaultdict(list)
    for one in sorted(answer.schedule.placed, key=lambda each: each.start):
        for node in one.nodes:
            on_node[one.option.pool, node].append(one)
    sizes = {pool.name: pool.gpus_per_node for pool in answer.fleet.pools}
    lanes = [
        (pool.name, node) for pool in answer.fleet.pools for node in range(pool.nodes) if (pool.name, node) in on_node
    ]
    shown: list[tuple[str, int, list[Bar]]] = []
    many = 0
    for pool, node in lanes[:MOST_LANES]:
        bars = bars_of(on_node[pool, node], sizes[pool])
        many += len(bars)
        if shown and many > MOST_BARS:
            break
        shown.append((pool, node, bars))
    if not shown:
        return None
    placed = {one.run.job for one in answer.schedule.placed}
    with styled():
        figure = canvas(0.8 + 0.42 * len(shown))
        axes = figure.subplots()
        labelled: set[str] = set()
        hatched = sum(len(bars) for _, _, bars in shown) <= MOST_HATCHED
        for lane, (pool, _, bars) in enumerate(shown):
            row_height = 0.8 / sizes[pool]
            clock = answer.hours.get(pool, NEVER_CLOSES)
            for one, row, rows in bars:
                worked = list(clock.spans(one.start, one.end))
                name, is_late = answer.jobs.jobs[one.run.job].name, one.late_hours > 1e-9
                axes.barh(
                    [lane - 0.4 + row_height * (row + rows / 2)] * len(worked),
                    [end - start for start, end in worked],
                    left=[start for start, _ in worked],
                    height=row_height * rows,
                    edgecolor=LATE if is_late else INK,
                    linewidth=1.6 if is_late else 0.5,
                    label=name if name not in labelled else None,
                    **kind(one.run.job, hatched),
                )
                labelled.add(name)
            for start, end in closed(clock, answer.figures.ends):
                axes.barh(lane, end - start, left=start, height=0.9, color=INK, alpha=0.12, linewidth=0)
        axes.set_yticks(range(len(shown)), [f"{pool} {node + 1}" for pool, node, _ in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("hours from the beginning")
        figure.legend(loc="outside upper right", ncols=min(6, len(placed)), frameon=False)
        rest = "" if len(lanes) == len(shown) else f" {len(lanes) - len(shown):,} more nodes are left out."
        late = " A thick edge: too late." if answer.figures.late else ""
        shut = " Grey: closed; what has begun pauses." if answer.hours else ""
        caption = f"A lane for each node, a row for each GPU.{late}{shut}{rest}"
        return Picture(figure, "schedule", "The schedule", caption)


def closed(clock: OpenHours, until: float) -> Iterator[tuple[float, float]]:
    """When a pool is not open."""
    last = 0.0
    for start, end in clock.spans(0.0, until):
        if start > last:
            yield last, start
        last = end
    if last < until:
        yield last, until


def bars_of(placed: Sequence[Placed], gpus: int) -> list[Bar]:
    """The runs of a node, in the order of their start, on rows that are free, those beside each other together."""
    free = [0.0] * gpus
    found: list[Bar] = []
    for one in placed:
        rows = [row for row in range(gpus) if free[row] <= one.start + 1e-6][: one.option.gpus_of_a_node]
        for row in rows:
            free[row] = one.end
            if found and found[-1].run is one and found[-1].row + found[-1].rows == row:
                found[-1] = found[-1]._replace(rows=found[-1].rows + 1)
            else:
                found.append(Bar(one, row, 1))
    return found


def ways(answer: Outlook) -> Picture | None:
    """Cost, or GPU hours where a pool has no price, against time of each job's ways; None where nothing fits."""
    every = {index: found for index, found in answer.ways.items() if found}
    if not every:
        return None
    shown = {index: found for index, found in every.items() if index < len(COLORS)}
    priced = is_priced(answer.fleet)
    pools = [pool.name for pool in answer.fleet.pools]
    with styled():
        figure = canvas(4.0)
        axes = figure.subplots()
        for number, found in shown.items():
            for pool in pools:
                those = [option for option in found if option.pool == pool]
                axes.plot(
                    [option.hours for option in those],
                    [option.price for option in those],
                    marker=MARKERS[pools.index(pool) % len(MARKERS)],
                    color=COLORS[number],
                    linestyle=DASHES[number],
                    linewidth=0.9,
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("hours of a run")
        axes.set_ylabel(f"cost of a run, {answer.fleet.currency}" if priced else "GPU hours of a run")
        handles = [
            axes.plot([], [], color=COLORS[n], linestyle=DASHES[n], label=answer.jobs.jobs[n].name)[0] for n in shown
        ]
        handles += [
            axes.plot([], [], color="#777777", linestyle="", marker=MARKERS[n % len(MARKERS)], label=f"on {name}")[0]
            for n, name in enumerate(pools)
        ]
        figure.legend(handles=handles, loc="outside right upper", frameon=False, handlelength=3)
        left = "" if len(every) == len(shown) else f" The first {len(COLORS)} jobs."
        caption = f"More GPUs are further left; the line says which job, the marker on which pool.{left}"
        return Picture(figure, "ways", "Cost against time", caption)
