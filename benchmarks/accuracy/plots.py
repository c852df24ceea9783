"""The plots of docs/accuracy.md and docs/step-time.md: SVG that is the same on every run, readable without colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from benchmarks.accuracy.published import TOLERANCE, scored
from benchmarks.accuracy.t4 import FIGURES, by_formula, t4_rows
from benchmarks.accuracy.throughput import timed
from qlora_core.memory.device import MIB

MARKS = (("o", "#0072B2"), ("s", "#D55E00"), ("^", "#009E73"), ("D", "#CC79A7"), ("v", "#000000"), ("P", "#56B4E9"))
"""Shape and colour of a series: shapes alone tell them apart, and the colours are Okabe and Ito's."""
SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "accuracy",  # ids inside the SVG are made from it, else from a random number
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "figure.facecolor": "white",
}


class Series(NamedTuple):
    """Points with one mark."""

    label: str
    measured: Sequence[float]
    predicted: Sequence[float]


def draw_all(folder: Path) -> None:
    """Write the three plots into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(cast("Any", SETTINGS)):
        _scatter(_t4_series(), "Tesla T4: forty training steps", "GiB", None, folder / "t4.svg")
        _scatter(_published_series(), "Published figures", "GB", TOLERANCE, folder / "published.svg")
        _histogram([one.error for one in scored()], folder / "published_errors.svg")


def draw_times(folder: Path) -> None:
    """Write the plot of docs/step-time.md into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shown: dict[str, list[tuple[float, float]]] = {}
    for one in timed():
        shown.setdefault(one.stack.name, []).append((one.measured, one.predicted.seconds))
    series = [Series(name, [x for x, _ in pairs], [y for _, y in pairs]) for name, pairs in shown.items()]
    with mpl.rc_context(cast("Any", SETTINGS)):
        _scatter(series, "Seconds of an optimizer step", "s", None, folder / "published.svg")


def _t4_series() -> list[Series]:
    series = []
    for figure in ("allocated", "reserved"):
        key = FIGURES[figure][0]
        for quantization, shown in (("nf4", "NF4"), ("none", "16 bit")):
            pairs = [
                (row.measured[key] / 1024, said[figure] / MIB / 1024)
                for row, said in zip(t4_rows(), by_formula(), strict=True)
                if row.quantization == quantization
            ]
            series.append(Series(f"{figure}, {shown}", [x for x, _ in pairs], [y for _, y in pairs]))
    return series


def _published_series() -> list[Series]:
    shown: dict[str, list[tuple[float, float]]] = {}
    counts = {one.stack.name: sum(other.stack is one.stack for other in scored()) for one in scored()}
    for one in scored():
        name = one.stack.name
        if name == "LitGPT":
            name = "LitGPT, 16 bit" if one.row.quantization == "bf16" else "LitGPT, 4 bit"
        elif counts[name] < 3:
            name = "others"
        shown.setdefault(name, []).append((one.row.measured_bytes / 1e9, one.predicted / 1e9))
    return [Series(name, [x for x, _ in pairs], [y for _, y in pairs]) for name, pairs in shown.items()]


def _scatter(series: Sequence[Series], title: str, unit: str, tolerance: float | None, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 5))
    ends = [min(min(one.measured) for one in series) * 0.8, max(max(one.measured) for one in series) * 1.2]
    axes.plot(ends, ends, color="#888888", linewidth=0.8, zorder=1)
    if tolerance is not None:
        for factor in (1 - tolerance / 100, 1 + tolerance / 100):
            axes.plot(ends, [end * factor for end in ends], color="#888888", linewidth=0.8, linestyle="--", zorder=1)
    marks = [*MARKS, *((shape, "#777777") for shape in ("X", "*", "<", ">"))]
    for one, (shape, colour) in zip(series, marks, strict=False):
        axes.scatter(
            one.measured,
            one.predicted,
            s=28,
            marker=shape,
            facecolors="none",
            edgecolors=colour,
            label=one.label,
            zorder=2,
        )
    axes.set(
        xscale="log", yscale="log", xlim=ends, xlabel=f"measured, {unit}", ylabel=f"predicted, {unit}", title=title
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(mpl.ticker.NullFormatter())
        axis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    axes.legend(fontsize=8, loc="upper left")
    _save(figure, path)


def _histogram(errors: Sequence[float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3))
    edges = list(range(-40, 45, 5))
    within = [min(max(error, edges[0]), edges[-1] - 0.001) for error in errors]  # what lies outside goes to the ends
    axes.hist(within, bins=edges, color="#cccccc", edgecolor="black", hatch="//", linewidth=0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(
        xlabel="error, per cent (the outer bars hold all beyond)", ylabel="rows", title="Errors of published figures"
    )
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    # matplotlib leaves blanks at the ends of lines
    lines = [line.rstrip() for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
