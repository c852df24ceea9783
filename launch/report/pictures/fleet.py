"""Pictures of a fleet's outlook: the schedule, and cost against time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from clusters.hours import NEVER_CLOSES, OpenHours
from launch.report.pictures.style import COLORS, DASHES, INK, MARKERS, WIDTH, Picture, canvas, kind, styled
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
MOST_IN_LEGEND = 12
"""Jobs: among more a reader does not find the one that a bar looks like, and names are written into bars."""
LANE_INCHES = 0.42
LETTER_INCHES = 0.0084
"""The width of a letter for each point of its size; most are narrower."""
LINE_INCHES = 0.12
"""What a name takes of height."""
NAME: dict[str, Any] = {
    "fontsize": 7,
    "va": "center",
    "color": "#111111",
    "bbox": {"facecolor": "#ffffff", "edgecolor": "none", "pad": 0.5},
}
"""A name in a bar: dark on white, on a dark page too."""


class Bar(NamedTuple):
    """A run on rows of a node, the GPUs beside each other that it takes there: of the first row, and how many."""

    run: Placed
    row: int
    rows: int


Lane = tuple[str, int, list[Bar]]
"""A node: its pool's name, its number, and what it carries."""


def lanes_of(answer: Outlook) -> tuple[list[Lane], int]:
    """The nodes that are used, as far as a picture shows them, and how many more there are."""
    on_node: dict[tuple[str, int], list[Placed]] = defaultdict(list)
    for one in sorted(answer.schedule.placed, key=lambda each: each.start):
        for node in one.nodes:
            on_node[one.option.pool, node].append(one)
    used = [(pool, node) for pool in answer.fleet.pools for node in range(pool.nodes) if (pool.name, node) in on_node]
    shown: list[Lane] = []
    many = 0
    for pool, node in used[:MOST_LANES]:
        bars = bars_of(on_node[pool.name, node], pool.gpus_per_node)
        many += len(bars)
        if shown and many > MOST_BARS:
            break
        shown.append((pool.name, node, bars))
    return shown, len(used) - len(shown)


def gantt(answer: Outlook) -> Picture | None:
    """The schedule: a lane for each node that is used; None where nothing is placed."""
    shown, left_out = lanes_of(answer)
    if not shown:
        return None
    sizes = {pool.name: pool.gpus_per_node for pool in answer.fleet.pools}
    hatched = sum(len(bars) for _, _, bars in shown) <= MOST_HATCHED
    jobs = sorted({one.run.job for _, _, bars in shown for one, _, _ in bars})
    names = {job: answer.jobs.jobs[job].name for job in jobs}
    in_bars = len(jobs) > (MOST_IN_LEGEND if hatched else len(COLORS))
    columns = max(1, min(6, len(jobs), int(WIDTH / (0.8 + 9 * LETTER_INCHES * max(map(len, names.values()))))))
    lane_inches = LANE_INCHES
    if in_bars:  # the row of a GPU is as high as a name, as far as that fits on a page
        lane_inches = max(LANE_INCHES, min(0.2 * max(sizes[pool] for pool, _, _ in shown), 9 / len(shown)))
    legend_inches = 0 if in_bars else 0.2 * ((len(jobs) - 1) // columns)
    with styled():
        figure = canvas(0.8 + lane_inches * len(shown) + legend_inches)
        axes = figure.subplots()
        labelled: set[str] = set()
        for lane, (pool, _, bars) in enumerate(shown):
            row_height = 0.8 / sizes[pool]
            clock = answer.hours.get(pool, NEVER_CLOSES)
            for one, row, rows in bars:
                worked = list(clock.spans(one.start, one.end))
                name, is_late = names[one.run.job], one.late_hours > 1e-9
                axes.barh(
                    [lane - 0.4 + row_height * (row + rows / 2)] * len(worked),
                    [end - start for start, end in worked],
                    left=[start for start, _ in worked],
                    height=row_height * rows,
                    edgecolor=LATE if is_late else INK,
                    linewidth=1.6 if is_late else 0.5,
                    label=name if name not in labelled else None,
                    **kind(jobs.index(one.run.job), hatched and not in_bars),
                )
                labelled.add(name)
                if in_bars:
                    start, end = max(worked, key=lambda each: each[1] - each[0])
                    wide = (end - start) / answer.figures.ends * (WIDTH - 2)
                    middle = lane - 0.4 + row_height * (row + rows / 2)
                    write_name(axes, name, start, middle, (wide, lane_inches * row_height * rows))
            for start, end in closed(clock, answer.figures.ends):
                axes.barh(lane, end - start, left=start, height=0.9, color=INK, alpha=0.12, linewidth=0)
        axes.set_yticks(range(len(shown)), [f"{pool} {node + 1}" for pool, node, _ in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlabel("hours from the beginning")
        if not in_bars:
            figure.legend(loc="outside upper right", ncols=columns, frameon=False)
        rest = f" {left_out:,} more nodes are left out." if left_out else ""
        late = " A thick edge: too late." if answer.figures.late else ""
        shut = " Grey: closed; what has begun pauses." if answer.hours else ""
        named = " A bar has its job's name, or the end of it, where there is room." if in_bars else ""
        caption = f"A lane for each node, a row for each GPU.{named}{late}{shut}{rest}"
        return Picture(figure, "schedule", "The schedule", caption)


def write_name(axes: Any, name: str, start: float, middle: float, inches: tuple[float, float]) -> None:
    """Write a bar's name into it, upright where it is higher than wide, as far as there is room.

    Of what is too long the end is written: names of many jobs are often told apart by that.
    """
    wide, high = inches
    most = int(max(inches) / (LETTER_INCHES * NAME["fontsize"]))
    text = name if len(name) <= most else f"…{name[2 - most :]}" if most > 3 else ""  # that sign is two letters wide
    if text and min(inches) > LINE_INCHES:
        axes.text(start, middle, text, rotation=90 if high > wide else 0, **NAME)


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
