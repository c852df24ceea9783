"""docs/reliability.md: the rules from the code, and what faults did to real runs, from reliability.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.speed import ROOT
from orchestrator.recovery import RULES, Rule

RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
DOCUMENT = ROOT / "docs" / "reliability.md"
PLOT = ROOT / "docs" / "reliability" / "four-ways.svg"
RULES_MARKS = ("<!-- make chaos writes the rules from here -->\n", "<!-- the rules to here -->\n")
FAULTS_MARKS = ("<!-- make chaos writes the faults from here -->\n", "<!-- the faults to here -->\n")
GOAL_PERCENT = 2.0


def rules() -> str:
    """What follows each kind of failure, as a table."""
    rows = (f"| {kind} | {rule.action} | {often(rule)} | {pause(rule)} | {rule.why} |" for kind, rule in RULES.items())
    return "\n".join(
        [
            "| what happened | what follows | how often in a row | pause | why |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def often(rule: Rule) -> str:
    """The bound of a rule."""
    if rule.action == "stop":
        return "-"
    if not rule.counted:
        return "no bound"
    return "`retries`" if rule.patience == 1 else f"{rule.patience} x `retries`"


def pause(rule: Rule) -> str:
    """The pause of a rule."""
    return f"{rule.seconds:g} s, doubled, at most {rule.most_seconds:g} s" if rule.seconds else "-"


def faults(results: Mapping[str, Any]) -> str:
    """What was done to runs and what became of them, and what checkpoints cost."""
    on, saving = results["machine"], results["saving"]
    installed = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    percent = saving["percent_at_one_a_minute"]
    reached = "reached" if percent <= GOAL_PERCENT else "**missed**"
    goal = f"goal: at most {GOAL_PERCENT:g} %: {reached}"
    lost = ", ".join(f"{1000 * value:.0f}" for value in saving["lost_seconds"])
    return "\n".join(
        [
            f"Measured on {results['date']}: {on['processor']}, {on['cores']} cores, {on['system']};",
            f"{installed}.",
            "",
            "| fault | injected | survived | steps done twice, most | seconds to the next step, median | most |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
            *rows(results["faults"]),
            "",
            f"A checkpoint of {saving['bytes'] / 1e6:.0f} MB every {saving['every']} steps of "
            f"{1000 * saving['step_seconds']:.0f} ms, against none, in {len(saving['lost_seconds'])} rounds: each cost "
            f"{lost} ms. At one a minute that is {percent:.2f} % of the time ({goal}).",
            "",
        ]
    )


def rows(found: list[Mapping[str, Any]]) -> Iterator[str]:
    """A line for each kind of fault."""
    ordered = sorted(found, key=lambda row: str(row["fault"]))
    for fault, group in groupby(ordered, key=lambda row: str(row["fault"])):
        each = list(group)
        times = [row["seconds"] for row in each if row["seconds"] is not None]
        cells = [f"{statistics.median(times):.0f}", f"{max(times):.0f}"] if times else ["-", "-"]
        survived = sum(bool(row["survived"]) for row in each)
        lost = max(row["steps_lost"] for row in each)
        yield f"| {fault} | {len(each)} | {survived} | {lost} | {cells[0]} | {cells[1]} |"


def plot(curves: Mapping[str, Any], path: Path) -> None:
    """Draw the loss of a run that was interrupted in four ways over that of one that was not."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "reliability"
    figure, axes = plt.subplots(figsize=(8, 3.5))
    for name, label, width, color in (
        ("whole", "never interrupted", 4, "#c9d6e8"),
        ("harmed", "interrupted in four ways", 1, "#1f3b6f"),
    ):
        steps = sorted(map(int, curves[name]))
        axes.plot(steps, [curves[name][str(step)] for step in steps], label=label, linewidth=width, color=color)
    top = max(curves["whole"].values())
    for step, what in curves["interrupted"]:
        axes.axvline(step, color="#b03030", linewidth=0.8, linestyle="--")
        axes.annotate(what, (step, top), rotation=90, va="top", ha="right", fontsize=7, color="#b03030")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(loc="lower left", fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    # matplotlib leaves blanks at the ends of lines
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text(encoding="utf-8").splitlines()))


def between(text: str, marks: tuple[str, str], new: str) -> str:
    """`text` with what stands between two marks replaced."""
    before, rest = text.split(marks[0])
    return before + marks[0] + new + marks[1] + rest.split(marks[1])[1]


def render() -> str:
    """The document as it is to be."""
    text = between(DOCUMENT.read_text(encoding="utf-8"), RULES_MARKS, rules())
    found = faults(json.loads(RESULTS.read_text(encoding="utf-8"))) if RESULTS.exists() else "Not measured yet.\n"
    return between(text, FAULTS_MARKS, found)
