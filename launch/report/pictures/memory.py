"""Pictures of a plan: memory by component, in the course of a step, over length and micro-batch; cost against time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.patches import Rectangle

from clusters.gpu import GIB, MIB
from launch.report.components import GROUPS, grouped
from launch.report.pictures.style import COLORS, INK, MARKERS, Picture, canvas, kind, stacked, styled
from launch.report.sweep import SweepCells
from launch.report.words import sure_words, what_bounds_are
from orchestrator.plans import Alternative, Plan, Verdict
from qlora_core.memory.formula import course, prepared

LENGTHS = tuple(2**power for power in range(8, 18))
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)


def unit_of(most: int) -> tuple[int, str]:
    """What sizes up to `most` are told in: bytes, and its name."""
    return (GIB, "GiB") if most >= GIB // 2 else (MIB, "MiB")


def needed(plan: Plan) -> Picture:
    """What is needed on each kind of GPU by component, with what each can give."""
    verdicts = plan.verdicts
    most = max(verdict.process_bytes for verdict in verdicts)
    unit, name = unit_of(most)
    rows = [grouped(one.components, one.process_bytes - one.allocated_bytes) for one in verdicts]
    layers = layers_of(rows, unit, least=unit / 200)
    with styled():
        figure = canvas(1.1 + 0.34 * len(verdicts))
        axes = figure.subplots()
        stacked(axes, [label(one) for one in verdicts], layers, lambda size: f"{size:.2f}")
        capacities = [one.usable_bytes / unit for one in verdicts]
        shown = max(most / unit * 1.12, min(capacities) * 1.05)
        for row, capacity in enumerate(capacities):
            line = {"color": INK, "linewidth": 2.2, "linestyle": (0, (3, 1))}
            if capacity <= shown:
                axes.plot([capacity, capacity], [row - 0.45, row + 0.45], **line)
        axes.plot([], [], label="can be used", **line)
        axes.set_xlim(0, shown)
        axes.set_xlabel(name)
        figure.legend(loc="outside upper left", ncols=4, frameon=False)
    beyond = " Where no line is seen, it lies beyond the picture." if max(capacities) > shown else ""
    caption = f"Of the fullest GPU, at the moment of the peak; the dashed line is what the GPU can give.{beyond}"
    return Picture(figure, "memory", "Memory by component on each kind of GPU", caption)


def layers_of(rows: Sequence[Sequence[int]], unit: int, least: float) -> dict[int, tuple[str, list[float]]]:
    """The layers of `stacked` bars, from each bar's bytes by group; groups that are nowhere `least` are left out."""
    return {
        number: (title, [row[number] / unit for row in rows])
        for number, title in enumerate(GROUPS)
        if any(row[number] >= least for row in rows)
    }


def label(verdict: Verdict) -> str:
    """A GPU and whether it fits."""
    if verdict.barely:
        return f"{verdict.gpu}: {verdict.confidence.chance:.0%}"
    return f"{verdict.gpu}: {'fits' if verdict.fits else 'no'}"


def over_a_step(plan: Plan) -> Picture:
    """Allocated memory in the course of a step, by component."""
    moments = course(plan.architecture, plan.planned, plan.strategy, plan.target.device)
    rows = [grouped(components) for _, _, components in moments]
    totals = [sum(row) for row in rows]
    unit, name = unit_of(max(totals))
    with styled():
        figure = canvas(4.2)
        axes = figure.subplots()
        below = [0.0] * len(rows)
        for number, title in enumerate(GROUPS):
            sizes = [row[number] / unit for row in rows]
            above = [low + size for low, size in zip(below, sizes, strict=True)]
            if max(sizes) >= max(totals) / unit / 500:
                axes.fill_between(
                    range(len(rows)), below, above, label=title, edgecolor=INK, linewidth=0.5, **kind(number)
                )
            below = above
        axes.plot(range(len(rows)), below, color=INK, linewidth=1.2)
        peak = max(range(len(rows)), key=totals.__getitem__)
        axes.annotate(
            f"{totals[peak] / unit:.2f} {name}", (peak, below[peak]), (0, 5), textcoords="offset points", ha="center"
        )
        axes.set_xticks(
            range(len(rows)), [part_words(part, phase) for part, phase, _ in moments], rotation=35, ha="right"
        )
        axes.set_xlim(0, len(rows) - 1)
        axes.set_ylim(0, max(below) * 1.1)
        axes.set_ylabel(name)
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
    trace = "" if plan.estimate.estimator == "formula" else " By the formula."
    caption = f"The most in each part of a step; from the first layer to the last it changes evenly.{trace}"
    return Picture(figure, "step", "Memory in the course of a training step", caption)


def part_words(part: str, phase: str | None) -> str:
    """A part of a step."""
    if phase in (None, "optimizer"):
        return {"before": "before the step", "optimizer": "optimizer step"}[part]
    return f"{phase}: {part}"


def what_fits(plan: Plan) -> Picture:
    """The process's memory over sequence length and micro-batch, all else as planned, with what fits."""
    target = plan.target
    sizes = prepared(plan.architecture, plan.planned, plan.strategy, target.device)
    lengths = sorted({*LENGTHS, plan.planned.seq_len})
    batches = sorted({*MICRO_BATCHES, plan.strategy.micro_batch})
    context = target.device.context_bytes
    # what is predicted, as earlier runs have corrected it
    factor = (plan.verdict.confidence.expected_bytes - context) / plan.verdict.reserved_bytes
    table = [[sizes.reserved_bytes(batch, length) * factor + context for length in lengths] for batch in batches]
    unit, name = unit_of(max(plan.verdict.process_bytes, GIB // 2))
    with styled():
        figure = canvas(0.9 + 0.36 * len(batches))
        axes = figure.subplots()
        share = [[size / target.usable_bytes for size in row] for row in table]
        words = [[f"{'x ' * (size > target.usable_bytes)}{size / unit:,.1f}" for size in row] for row in table]
        shaded(axes, share, words)
        asked = lengths.index(plan.planned.seq_len), batches.index(plan.strategy.micro_batch)
        corner = (asked[0] - 0.5, asked[1] - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d55e00", linewidth=2, clip_on=False))
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
        axes.set_xlabel("tokens of a sequence")
        axes.set_ylabel("micro-batch")
    caption = (
        f"{name} of the process on {target.name}, which can give {target.usable_bytes / unit:.1f}, all else as "
        "planned, as expected; x does not fit. The plan is framed."
    )
    return Picture(figure, "fits", "What fits, by sequence length and micro-batch", caption)


def ways(plan: Plan) -> Picture | None:
    """Price, or GPU hours, against time of the plan and its alternatives; None where their times are not known."""
    timed = [one for one in plan.alternatives if one.fits and one.duration is not None]
    mine = plan.duration if plan.fits else None
    if not timed or (mine is None and len(timed) < 2):
        return None
    durations = [one.duration for one in timed if one.duration is not None]
    every = durations if mine is None else [mine, *durations]
    priced = all(each.price is not None for each in every)
    with styled():
        figure = canvas(3.6)
        axes = figure.subplots()
        names = ["as planned"] * (mine is not None) + [named(one) for one in timed]
        for number, (each, name) in enumerate(zip(every, names, strict=True)):
            cost = each.price if priced and each.price is not None else each.gpu_hours
            bounds = ((each.seconds - each.low_seconds) / 3600,), ((each.high_seconds - each.seconds) / 3600,)
            look = {"marker": MARKERS[number % len(MARKERS)], "color": COLORS[number % len(COLORS)], "linestyle": ""}
            axes.errorbar(each.seconds / 3600, cost, xerr=bounds, label=name, elinewidth=0.8, capsize=3, **look)
        runs = {one.step_time.runs for one in timed if one.step_time is not None}
        axes.set_xlabel(f"hours of the whole run, {what_bounds_are(min(runs, default=0))}")
        axes.set_ylabel(f"price, {every[0].currency}" if priced else "GPU hours")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        figure.legend(loc="outside right upper", frameon=False)
    return Picture(figure, "ways", "Cost against time", "Further left is sooner, further down is cheaper.")


def named(one: Alternative) -> str:
    """An alternative in few words."""
    sure = sure_words(one.confidence.chance)
    return (f"{one.title}, {one.place}" if one.title else one.place) + sure


def heat(swept: SweepCells) -> Picture:
    """A sweep: what is needed, and whether it fits."""
    cells = [[cell.verdict for cell in row] for _, row in swept.rows]
    with styled():
        figure = canvas(0.9 + 0.36 * len(cells))
        axes = figure.subplots()
        share = [
            [math.nan if one is None else 1 - one.headroom_bytes / one.usable_bytes for one in row] for row in cells
        ]
        shaded(axes, share, [[heat_words(one) for one in row] for row in cells])
        axes.set_xticks(range(len(swept.columns)), swept.columns)
        axes.set_yticks(range(len(cells)), [value for value, _ in swept.rows])
        axes.set_ylabel(swept.down)
        axes.set_xlabel(swept.across)
    return Picture(figure, "sweep", "What was swept", "GiB of the process; x does not fit.")


def heat_words(verdict: Verdict | None) -> str:
    """A cell of a sweep."""
    return "-" if verdict is None else f"{'' if verdict.fits else 'x '}{verdict.confidence.expected_bytes / GIB:.1f}"


def shaded(axes: Any, shares: Sequence[Sequence[float]], words: Sequence[Sequence[str]]) -> None:
    """A table of cells, the darker the more of the GPU is taken, and blank where that is too little; each has words."""
    # rectangles and not an image, which a page would have to fetch
    edges = [column - 0.5 for column in range(len(shares[0]) + 1)], [row - 0.5 for row in range(len(shares) + 1)]
    fitting = [[share if share <= 1 else math.nan for share in of_row] for of_row in shares]
    axes.pcolormesh(*edges, fitting, cmap="Blues", vmin=0, vmax=1.25)
    axes.invert_yaxis()
    for row, (of_row, texts) in enumerate(zip(shares, words, strict=True)):
        for column, (share, text) in enumerate(zip(of_row, texts, strict=True)):
            # on a cell's own blue whatever suits it, on a blank one the page's ink
            color = INK if not share <= 1 else "#1b1f24" if share < 0.6 else "#ffffff"
            axes.text(column, row, text, ha="center", va="center", color=color)
