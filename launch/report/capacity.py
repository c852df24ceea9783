"""What a fleet comes to, as a report and as JSON. All numbers come from `Outlook`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from functools import cache
from operator import attrgetter
from typing import Any

from launch.report.document import Document, Section, drawn
from launch.report.words import gib, money, money_range, sure_words, what_bounds_are
from orchestrator.fleet.jobs import JobForm
from orchestrator.fleet.options import Option, is_priced, least_of_each_pool
from orchestrator.fleet.outlook import MOST_NODES, ByMethod, Change, Figures, Outlook
from orchestrator.fleet.schedule import Placed
from qlora_core.strategy import Strategy

SCHEMA_VERSION = 1
MOST_ROWS = 40
"""Runs that a table lists; JSON has all."""
MOST_WAYS = 200
"""Ways that a table lists."""
MOST_LISTED = 2000
"""Rows of a table that has one for each job, so that a page stays small."""
MOST_NAMES = 12
"""Jobs that a sentence names."""


def document(answer: Outlook) -> Document:
    """The whole report."""
    return Document(f"What {answer.fleet.name} can carry", tuple(sections(answer)))


def sections(answer: Outlook) -> Iterator[Section]:
    """All that is told, in order."""
    yield overview(answer)
    yield where_they_fit(answer)
    yield schedule(answer)
    yield pools(answer)
    yield Section(
        "What would change it",
        ("fleet", " too late", " hours too late", " mean wait, h", " cost", " last end, h"),
        [
            changed("as it is", answer.by_rules, answer),
            *(changed(one.title, one.figures, answer) for one in answer.changes),
        ],
        "All of these are scheduled by rules, so that they can be compared; the schedule above may be better.",
    )
    if answer.figures.late or answer.figures.nowhere:
        yield purchases(answer)
    if answer.methods:
        yield methods(answer)


def overview(answer: Outlook) -> Section:
    """The figures of the schedule."""
    figures, plan = answer.figures, answer.schedule
    rows = [
        ("runs", f"{figures.runs:,}"),
        ("fit nowhere", f"{figures.nowhere:,}"),
        ("miss their deadline", f"{figures.late:,}, by {figures.late_hours:,.1f} h together"),
        (
            "weighted hours too late",
            f"{plan.late:,.1f}; no schedule has fewer than {plan.least_late:,.1f}",
        ),
        ("cost", cost_words(figures, answer)),
        ("GPU hours", f"{figures.gpu_hours:,.1f}"),
        ("mean wait", f"{figures.waited_hours:,.1f} h"),
        ("last end", f"{figures.ends:,.1f} h"),
        ("scheduled by", plan.by),
    ]
    late = []
    if answer.impossible:
        late = [f"No GPUs of the fleet as it is keep the deadline of {named(answer.impossible)}."]
    return Section(
        f"{answer.fleet.name}: {len(answer.jobs.jobs)} jobs", ("", " "), rows, " ".join([*answer.remarks, *late])
    )


def cost_words(figures: Figures, answer: Outlook) -> str:
    """The cost with its interval."""
    if figures.nowhere == figures.runs:
        return "none: nothing fits"
    if figures.cost is None:
        return "not known: a pool that is used has no price"
    found = interval(figures, answer)
    if not is_priced(answer.fleet):
        return found
    if answer.fleet.prices_as_of is not None:
        found += f", prices as of {answer.fleet.prices_as_of}"
    return f"{found}; no schedule costs less than {money(answer.schedule.least_price, answer.fleet.currency)}"


def where_they_fit(answer: Outlook) -> Section:
    """Each job's ways; where these are too many to be read, its cheapest on each pool."""
    rows: list[tuple[str, ...]] = []
    number = sum(map(len, answer.ways.values()))
    note = f"Hours: as expected, and the upper bound; bounds are {most_words(answer)}."
    if number > MOST_WAYS:
        note += f" The cheapest on each pool, of {number:,} ways; --json has all."
    for index, job in enumerate(answer.jobs.jobs):
        ways = answer.ways[index]
        if not ways:
            rows.append((whose(job), job.model, "fits nowhere", "", "", "", ""))
        for option in ways if number <= MOST_WAYS else least_of_each_pool(ways, attrgetter("price")):
            rows.append((whose(job), job.model, *way(option, answer)))
    return Section(
        "Where each job fits",
        ("job", "model", "on", " hours", " to", " cost", " GiB a GPU"),
        rows[:MOST_LISTED],
        note + left_out(rows),
        draw=drawn("fleet", "ways", answer),
    )


def most_words(answer: Outlook) -> str:
    """What lies between the bounds of ways, by how many runs their GPUs have."""
    steps = [option.way.step_time for ways in answer.ways.values() for option in ways]
    return " or ".join(dict.fromkeys(what_bounds_are(step.runs) for step in steps if step is not None))


def whose(job: JobForm) -> str:
    """A job's name, and its owner's."""
    return job.name if job.owner is None else f"{job.name} ({job.owner})"


def way(option: Option, answer: Outlook) -> tuple[str, ...]:
    """A way's cells."""
    return (
        f"{option.gpus} x {option.pool}{sure_words(option.way.confidence.chance)}",
        hours(option.hours),
        hours(option.high_hours),
        interval(option, answer),
        gib(option.way.confidence.expected_bytes).removesuffix(" GiB"),
    )


def schedule(answer: Outlook) -> Section:
    """The first runs of the schedule, and the first of those that are too late."""
    placed = sorted(answer.schedule.placed, key=lambda one: (one.start, one.run.job))
    late = [one for one in placed if one.late_hours > 1e-9]
    first = {id(one) for one in [*placed[:MOST_ROWS], *late[:MOST_ROWS]]}
    shown = placed if len(placed) <= MOST_ROWS else [one for one in placed if id(one) in first]
    note = ""
    if len(shown) < len(placed):
        those = ""
        if late:
            those = f", and {'all' if len(late) <= MOST_ROWS else f'the first {MOST_ROWS} of'} {len(late):,} too late"
        note = f"The first {MOST_ROWS} of {len(placed):,}{those}; --json has all."
    return Section(
        "Schedule (hours from the beginning)",
        ("run", "on", "nodes", " asked for", " start", " end", " due", ""),
        [placed_cells(one, answer) for one in shown],
        note,
        draw=drawn("fleet", "gantt", answer),
    )


def placed_cells(one: Placed, answer: Outlook) -> tuple[str, ...]:
    """A run's cells."""
    job = answer.jobs.jobs[one.run.job]
    return (
        job.name if job.per_week is None else f"{job.name} {one.run.number}",
        f"{one.option.gpus} x {one.option.pool}",
        ", ".join(str(node + 1) for node in one.nodes),
        f"{one.run.release:,.1f}",
        f"{one.start:,.1f}",
        f"{one.end:,.1f}",
        "-" if one.run.due is None else f"{one.run.due:,.1f}",
        f"{one.late_hours:,.1f} h too late" if one.late_hours > 1e-9 else "",
    )


def changed(title: str, figures: Figures, answer: Outlook) -> tuple[str, ...]:
    """A fleet's cells."""
    late = f"{figures.late:,}" + (f", {figures.nowhere:,} nowhere" if figures.nowhere else "")
    return (
        title,
        late,
        f"{figures.late_hours:,.1f}",
        f"{figures.waited_hours:,.1f}",
        interval(figures, answer),
        f"{figures.ends:,.1f}",
    )


def pools(answer: Outlook) -> Section:
    """What each pool is, and how much of it is taken; when it is open, where one closes."""
    used = answer.utilization()
    rows = [
        (
            pool.name + (" (spot)" if pool.spot else ""),
            str(pool.gpus),
            f"{used[pool.name]:.0%}",
            "-" if pool.price_per_hour is None else money(pool.price_per_hour * pool.nodes, answer.fleet.currency),
            pool.hours or "always",
        )
        for pool in answer.fleet.pools
    ]
    columns = ("pool", " GPUs", " taken", " price an hour", "open")
    note = "Taken: of the GPU hours until the last run has ended."
    if not answer.hours:
        return Section("Pools", columns[:-1], [row[:-1] for row in rows], note)
    note = f"Taken: of the open GPU hours until the last run has ended. Hour 0: {answer.jobs.begins:%A}, 0:00."
    return Section("Pools", columns, rows, note)


def purchases(answer: Outlook) -> Section:
    """What more nodes of each kind keep all deadlines."""
    title, columns = "The smallest purchase that keeps all deadlines", ("pool", " more nodes", " a week")
    left = []
    if answer.no_purchase_keeps:
        left.append(
            f"No number up to {MOST_NODES} of one kind keeps the deadline of {named(answer.no_purchase_keeps)}."
        )
    if answer.no_purchase_fits:
        left.append(f"With none of these does {named(answer.no_purchase_fits)} fit anywhere.")
    if answer.purchases is None:
        return Section(title, text=("More nodes would change nothing.", *left))
    rows = [
        (one.pool, str(one.nodes), "-" if one.per_week is None else money(one.per_week, answer.fleet.currency))
        for one in answer.purchases
    ]
    does = {one.pool for one in answer.purchases}
    rows += [(pool.name, f"not with up to {MOST_NODES}", "") for pool in answer.fleet.pools if pool.name not in does]
    note = "Nodes of one kind at a time, with all runs placed by rules."
    return Section(title, columns, rows, " ".join([note, *left]))


def methods(answer: Outlook) -> Section:
    """Each job's cheapest way with each method."""
    rows = []
    for one in answer.methods:
        fits = one.gpus is not None
        rows.append(
            (
                one.job,
                one.method,
                str(one.gpus) if fits else "fits nowhere",
                "" if one.hours is None else hours(one.hours),
                interval(one, answer) if fits else "",
            )
        )
    title, columns = "The same work by other methods: the cheapest way", ("job", "method", " GPUs", " hours", " cost")
    return Section(title, columns, rows[:MOST_LISTED], left_out(rows).strip())


def left_out(rows: Sequence[object]) -> str:
    """What is said of rows that a table has no room for."""
    rest = len(rows) - MOST_LISTED
    return f" The first {MOST_LISTED:,} rows; {rest:,} more are left out." if rest > 0 else ""


def named(jobs: Sequence[str]) -> str:
    """Jobs by their names, as far as a sentence can hold them."""
    rest = len(jobs) - MOST_NAMES
    return ", ".join(jobs[:MOST_NAMES]) + (f" and {rest:,} more" if rest > 0 else "")


def hours(value: float) -> str:
    """A time of a run."""
    return f"{value:,.1f}" if value >= 1 else f"{value:.2f}"


def interval(costing: Option | Figures | ByMethod, answer: Outlook) -> str:
    """What something costs, and between which it lies; a dash where a pool has no price."""
    return money_range(costing.cost, costing.low_cost, costing.high_cost, answer.fleet.currency)


def as_json(answer: Outlook) -> str:
    """It as one object; hours from the beginning, prices in `currency`."""
    names = [job.name for job in answer.jobs.jobs]
    fields: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "fleet": answer.fleet.name,
        "currency": answer.fleet.currency,
        "scheduled_by": answer.schedule.by,
        "figures": dataclasses.asdict(answer.figures),
        "weighted_hours_too_late": answer.schedule.late,
        "weighted_hours_too_late_at_least": answer.schedule.least_late,
        "jobs": [
            {
                "name": job.name,
                "model": job.model,
                "owner": job.owner,
                "ways": [way_json(one) for one in answer.ways[index]],
            }
            for index, job in enumerate(answer.jobs.jobs)
        ],
        "impossible": list(answer.impossible),
        "schedule": [
            {
                "job": names[one.run.job],
                "number": one.run.number,
                "pool": one.option.pool,
                "gpus": one.option.gpus,
                "nodes": list(one.nodes),
                "release": one.run.release,
                "start": one.start,
                "end": one.end,
                "due": one.run.due,
                "late_hours": one.late_hours,
            }
            for one in answer.schedule.placed
        ],
        "nowhere": [{"job": names[run.job], "number": run.number} for run in answer.schedule.nowhere],
        "utilization": answer.utilization(),
        "by_rules": dataclasses.asdict(answer.by_rules),
        "changes": [change_json(one) for one in answer.changes],
        "purchases": [dataclasses.asdict(one) for one in answer.purchases or ()],
        "no_purchase_keeps": list(answer.no_purchase_keeps),
        "no_purchase_fits": list(answer.no_purchase_fits),
        "methods": [dataclasses.asdict(one) for one in answer.methods],
        "remarks": list(answer.remarks),
    }
    return json.dumps(fields, indent=2)


def way_json(option: Option) -> dict[str, Any]:
    """A way's fields."""
    names = (field.name for field in dataclasses.fields(option) if field.name not in ("price", "way"))
    fields = {name: getattr(option, name) for name in names}
    plan = option.way
    told = {"process_bytes": plan.process_bytes, "confidence": plan.confidence._asdict()}
    return {**fields, **told, "strategy": strategy_json(plan.strategy)}


@cache
def strategy_json(strategy: Strategy) -> dict[str, Any]:
    """A strategy's fields, which many ways have in common."""
    return dataclasses.asdict(strategy)


def change_json(change: Change) -> dict[str, Any]:
    """A change's fields."""
    return {"title": change.title, **dataclasses.asdict(change.figures)}
