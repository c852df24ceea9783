"""Pictures of a fleet's outlook: the schedule, and cost against time."""

from __future__ import annotations

from launch.report.pictures.style import COLORS, INK, MARKERS, Picture, canvas, kind, styled
from orchestrator.fleet.outlook import Outlook

LATE = "#d00000"
MOST_LANES = 60
"""Nodes that a picture of a schedule shows."""


def gantt(answer: Outlook) -> Picture | None:
    """The schedule: a lane for each node that is used; None where nothing is placed."""
    placed = answer.schedule.placed
    used = {(one.option.pool, node) for one in placed for node in one.nodes}
    lanes = [
        (pool.name, node) for pool in answer.fleet.pools for node in range(pool.nodes) if (pool.name, node) in used
    ]
    shown = lanes[:MOST_LANES]
    if not shown:
        return None
    names = list(dict.fromkeys(answer.jobs.jobs[one.run.job].name for one in placed))
    with styled():
        figure = canvas(0.8 + 0.42 * len(shown))
        axes = figure.subplots()
        sizes = {pool.name: pool.gpus_per_node for pool in answer.fleet.pools}
        labelled: set[str] = set()
        for lane, (pool, node) in enumerate(shown):
            taken: list[list[float]] = [[0.0] for _ in range(sizes[pool])]
            for one in sorted(placed, key=lambda each: each.start):
                if one.option.pool != pool or node not in one.nodes:
                    continue
                name = answer.jobs.jobs[one.run.job].name
                rows = [row for row, ends in enumerate(taken) if ends[-1] <= one.start + 1e-6]
                for row in rows[: one.option.gpus_of_a_node]:
                    taken[row].append(one.end)
                    axes.barh(
                        lane - 0.4 + 0.8 * (row + 0.5) / sizes[pool],
                        one.end - one.start,
                        left=one.start,
                        height=0.8 / sizes[pool],
                        edgecolor=LATE if one.late_hours > 1e-9 else INK,
                        linewidth=1.6 if one.late_hours > 1e-9 else 0.5,
                        label=name if name not in labelled else None,
                        **kind(names.index(name)),
                    )
                    labelled.add(name)
        axes.set_yticks(range(len(shown)), [f"{pool} {node + 1}" for pool, node in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("hours from the beginning")
        figure.legend(loc="outside upper right", ncols=min(6, len(names)), frameon=False)
        rest = "" if len(lanes) == len(shown) else f" {len(lanes) - len(shown)} more nodes are left out."
        late = " A thick edge: too late." if answer.figures.late else ""
        return Picture(figure, "schedule", "The schedule", f"A lane for each node, a row for each GPU.{late}{rest}")


def ways(answer: Outlook) -> Picture | None:
    """Cost, or GPU hours without prices, against time of each job's ways; None where nothing fits."""
    every = {job.name: answer.ways[index] for index, job in enumerate(answer.jobs.jobs) if answer.ways[index]}
    if not every:
        return None
    priced = all(option.cost is not None for options in every.values() for option in options)
    pools = [pool.name for pool in answer.fleet.pools]
    with styled():
        figure = canvas(4.0)
        axes = figure.subplots()
        for number, (_, options) in enumerate(list(every.items())[: len(COLORS)]):
            for pool in pools:
                those = [option for option in options if option.pool == pool]
                axes.plot(
                    [option.hours for option in those],
                    [option.price for option in those],
                    marker=MARKERS[pools.index(pool) % len(MARKERS)],
                    color=COLORS[number],
                    linewidth=0.8,
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("hours of a run")
        axes.set_ylabel(f"cost of a run, {answer.fleet.currency}" if priced else "GPU hours of a run")
        handles = [
            axes.plot([], [], color=COLORS[n], label=name)[0] for n, name in enumerate(list(every)[: len(COLORS)])
        ]
        handles += [
            axes.plot([], [], color="#777777", linestyle="", marker=MARKERS[n % len(MARKERS)], label=f"on {name}")[0]
            for n, name in enumerate(pools)
        ]
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
        left = "" if len(every) <= len(COLORS) else f" The first {len(COLORS)} jobs."
        caption = f"More GPUs are further left; the marker says on which pool.{left}"
        return Picture(figure, "ways", "Cost against time", caption)
