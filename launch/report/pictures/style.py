"""How pictures look, and how they become part of a page or a file."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qlora",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo", "+++", "---")
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#999999")
"""Those of Okabe and Ito, which people who see fewer colours can tell apart."""
MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (5, 1, 1, 1)),
    (0, (9, 2)),
    (0, (3, 3)),
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (1, 4)),
)
"""Of lines, so that what is printed without colours can be told apart, too."""
INK = "#000000"
"""Drawn with this, a thing has the ink of the page, light or dark."""
WIDTH = 10.0


class Picture(NamedTuple):
    """A picture, what it is called as a file, what it is, and what is to be known of it, each in some words."""

    figure: Figure
    name: str
    label: str
    caption: str


def styled() -> AbstractContextManager[None]:
    """A context manager: figures are made in our style."""
    return mpl.rc_context(STYLE)


def canvas(height: float) -> Any:
    """An empty figure of the usual width; to be called within `styled`."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def kind(number: int, hatched: bool = True) -> dict[str, Any]:
    """Colour and, unless told otherwise, hatch of the kind of that number; the first 64 are all unlike."""
    hatch = {"hatch": HATCHES[(number + number // len(COLORS)) % len(HATCHES)]} if hatched else {}
    return {"facecolor": COLORS[number % len(COLORS)], **hatch}


def stacked(
    axes: Any, labels: Sequence[str], layers: Mapping[int, tuple[str, Sequence[float]]], words: Callable[[float], str]
) -> None:
    """Horizontal bars, one for each label, of layers with their names, by their kinds; each ends with its sum."""
    left = [0.0] * len(labels)
    for number, (name, sizes) in layers.items():
        axes.barh(range(len(labels)), sizes, left=left, label=name, edgecolor=INK, linewidth=0.5, **kind(number))
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for row, total in enumerate(left):
        axes.annotate(words(total), (total, row), xytext=(4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def svg_of(picture: Picture, **options: Any) -> str:
    """A picture as SVG."""
    buffer = io.StringIO()
    with styled():
        picture.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, **options)
    return buffer.getvalue()


def inline(picture: Picture) -> str:
    """A picture as SVG for a page: black becomes the page's ink, and it has a name for who cannot see it."""
    svg = svg_of(picture, transparent=True)
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # each picture numbers its parts from 1, and a page has several
    svg = re.sub(r'\b(id="|url\(#|xlink:href="#)', rf"\g<1>{picture.name}-", svg)
    # text has matplotlib's black by default, and no colour of its own
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{picture.label}" fill="currentColor" ', 1)
    return "\n".join(line.rstrip() for line in svg.splitlines())


def save(picture: Picture, folder: Path) -> None:
    """Write a picture as NAME.svg and NAME.png, on white."""
    (folder / f"{picture.name}.svg").write_text(svg_of(picture), encoding="utf-8")
    with styled():
        picture.figure.savefig(folder / f"{picture.name}.png", dpi=150)
