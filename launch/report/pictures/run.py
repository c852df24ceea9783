"""Pictures of a run: its losses, predicted beside measured memory, and how long its sequences are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launch.report.pictures.memory import unit_of
from launch.report.pictures.style import COLORS, INK, Picture, canvas, kind, styled


def losses(steps: Sequence[Mapping[str, Any]], evaluated: Sequence[Mapping[str, Any]]) -> Picture | None:
    """The loss of each step, and of the held-out examples; None where no step was made."""
    if not steps:
        return None
    with styled():
        figure = canvas(3.6)
        axes = figure.subplots()
        axes.plot(
            [event["step"] for event in steps],
            [event["loss"] for event in steps],
            color=COLORS[0],
            linewidth=1.2,
            label="training",
        )
        if evaluated:
            axes.plot(
                [event["step"] for event in evaluated],
                [event["eval_loss"] for event in evaluated],
                color=COLORS[5],
                linestyle="--",
                marker="o",
                label="held out",
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per token")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    return Picture(figure, "loss", "Loss by step", "Of the tokens that are learned.")


def predicted_and_measured(rows: Sequence[tuple[str, int, int]]) -> Picture | None:
    """Predicted beside measured bytes of the peak and of each phase; None where nothing was measured."""
    if not rows:
        return None
    unit, name = unit_of(max(max(guess, found) for _, guess, found in rows))
    with styled():
        figure = canvas(0.9 + 0.5 * len(rows))
        axes = figure.subplots()
        for number, title in enumerate(("predicted", "measured")):
            places = [row + 0.4 * number - 0.2 for row in range(len(rows))]
            sizes = [(guess, found)[number] / unit for _, guess, found in rows]
            axes.barh(places, sizes, height=0.38, label=title, edgecolor=INK, linewidth=0.5, **kind(number))
            for place, size in zip(places, sizes, strict=True):
                axes.annotate(f"{size:.2f}", (size, place), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(rows)), [title for title, _, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(name)
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return Picture(figure, "measured", "Predicted and measured memory", "Of the fullest rank, by phase of a step.")


def row_lengths(lengths: Mapping[str, Any]) -> Picture:
    """How many sequences are how long."""
    width, counts = lengths["bin_tokens"], lengths["counts"]
    with styled():
        figure = canvas(2.8)
        axes = figure.subplots()
        places = [width * (number + 0.5) for number in range(len(counts))]
        axes.bar(places, counts, width=width, edgecolor=INK, linewidth=0.5, **kind(0))
        axes.set_xlim(0, width * len(counts))
        axes.set_xlabel("tokens of a sequence")
        axes.set_ylabel("sequences")
    return Picture(figure, "lengths", "Lengths of the sequences", f"In bins of {width} tokens.")
