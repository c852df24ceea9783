"""`make figures`: the pictures of docs/memory.md, after the QLoRA paper's, from our own code; seconds, no GPU."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch

from benchmarks.speed import ROOT
from clusters.gpu import GIB, find_gpu
from launch.report.components import grouped
from launch.report.pictures.memory import layers_of
from launch.report.pictures.style import COLORS, INK, MARKERS, Picture, canvas, stacked, styled, svg_of
from orchestrator.devices import gpu_target
from qlora_core import nf4
from qlora_core.catalogue import find_model
from qlora_core.memory import formula
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

FOLDER = ROOT / "docs" / "memory"
NORMAL = 1 << 20
"""Weights that are quantized for the picture of errors."""
BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
MODELS = ("7b", "13b", "33b", "65b")
WAYS = (
    ("all weights, 16 bit", Recipe(method="full", quantization="none", double_quantization=False), False),
    ("LoRA, 16-bit base", Recipe(method="lora", quantization="none", double_quantization=False, autocast=False), False),
    ("QLoRA, paged", Recipe(autocast=False), True),
)
"""Methods, and whether their optimizer is paged: as in the paper's first figure."""
WIDEST = 150
"""GiB that the picture of methods shows."""
LENGTHS = tuple(512 * number for number in range(1, 13))


def levels() -> Picture:
    """NF4's levels under the density of the weights that they are made for."""
    normal = NormalDist(0, 1 / NormalDist().inv_cdf(nf4.OUTERMOST))
    xs = [number / 200 - 1.25 for number in range(501)]
    with styled():
        figure = canvas(2.8)
        axes = figure.subplots()
        axes.fill_between(xs, [normal.pdf(x) for x in xs], color=COLORS[4], alpha=0.35, linewidth=0)
        tall = normal.pdf(0)
        for level in nf4.nf4_levels().tolist():
            axes.plot([level, level], [0, normal.pdf(level)], color=COLORS[0], linewidth=1.6)
        for number in range(16):
            axes.plot([number / 7.5 - 1], [-0.06 * tall], marker="|", color=COLORS[5], markersize=9)
        axes.plot([], [], color=COLORS[0], label="the sixteen levels of NF4")
        axes.plot([], [], color=COLORS[5], marker="|", linestyle="", label="sixteen even levels (int4)")
        axes.set_yticks([])
        axes.set_xlabel("weight, divided by the largest of its block")
        axes.legend(frameon=False)
    return Picture(figure, "levels", "The levels of NF4", "Dense where weights are.")


def errors() -> Picture:
    """What quantization costs in precision and in bits, by the size of a block."""
    weights = torch.randn(NORMAL, generator=torch.Generator().manual_seed(0))
    even = torch.linspace(-1, 1, 16)
    with styled():
        figure = canvas(3.2)
        left, right = figure.subplots(1, 2)
        for number, (name, table) in enumerate((("NF4", nf4.nf4_levels()), ("sixteen even levels", even))):
            found = []
            for block in BLOCKS:
                again = nf4.dequantize_blocks(*nf4.quantize_blocks(weights, table, block), table, block)
                found.append(100 * float((again - weights).norm() / weights.norm()))
            left.plot(BLOCKS, found, color=COLORS[number * 5], marker=MARKERS[number], label=name)
        constants = {"in float32": 32.0, "quantized again": 8 + 32 / nf4.NESTED_BLOCK}
        for number, (name, bits) in enumerate(constants.items()):
            of_each = [4 + bits / block for block in BLOCKS]
            right.plot(BLOCKS, of_each, color=COLORS[5 - number * 5], marker=MARKERS[number], label=f"constants {name}")
        for axes, words in ((left, "relative error, %"), (right, "bits of a weight")):
            axes.set_xscale("log", base=2)
            axes.set_xticks(BLOCKS, [str(block) for block in BLOCKS], rotation=45)
            axes.set_xlabel("weights in a block")
            axes.set_ylabel(words)
            axes.axvline(nf4.BLOCK, color=INK, linewidth=0.6, linestyle=":")
            axes.legend(frameon=False)
    return Picture(figure, "errors", "Error and size by block", "Of normal weights; the dotted line is the default.")


def methods() -> Picture:
    """Memory of one step by model and method."""
    device = gpu_target(find_gpu("a100-80gb"), "auto", 1).device
    labels, rows = [], []
    for model in MODELS:
        architecture = find_model(model)
        for name, recipe, paged in WAYS:
            gpu = formula.estimate(architecture, recipe, Strategy(paged_optimizer=paged), device).gpu
            labels.append(f"{model}: {name}")
            rows.append(grouped(gpu.components, gpu.process_bytes - gpu.allocated_bytes))
    layers = layers_of(rows, GIB, least=GIB / 20)
    with styled():
        figure = canvas(1.2 + 0.3 * len(rows))
        axes = figure.subplots()
        stacked(axes, labels, layers, lambda size: f"{size:.1f}")
        for size in (24, 48, 80):
            axes.axvline(size, color=INK, linewidth=1.0, linestyle=(0, (3, 1)))
            axes.annotate(f"{size} GB", (size, -0.6), (2, 2), textcoords="offset points")
        for row, total in enumerate(sum(sizes) / GIB for sizes in rows):
            if total > WIDEST:
                axes.annotate(
                    f"{total:.0f} →", (WIDEST, row), (-6, 0), textcoords="offset points", ha="right", va="center"
                )
        axes.set_xlim(0, WIDEST)
        axes.set_xlabel("GiB on one GPU")
        figure.legend(loc="outside upper left", ncols=4, frameon=False)
    return Picture(figure, "methods", "Memory by method", "One sequence of 512 tokens, activations checkpointed.")


def paging() -> Picture:
    """What a paged optimizer leaves on the GPU, over the sequence length."""
    gpu = find_gpu("l40s")
    device, model = gpu_target(gpu, "auto", 1).device, find_model("65b")
    with styled():
        figure = canvas(3.0)
        axes = figure.subplots()
        for number, (name, paged) in enumerate((("state on the GPU", False), ("state paged", True))):
            strategy = Strategy(paged_optimizer=paged)
            sizes = [
                formula.estimate(
                    model, Recipe(seq_len=length, tokens_per_step=length, autocast=False), strategy, device
                ).gpu.process_bytes
                / GIB
                for length in LENGTHS
            ]
            axes.plot(LENGTHS, sizes, color=COLORS[number * 5], marker=MARKERS[number], label=name)
        axes.axhline(gpu.usable_bytes / GIB, color=INK, linestyle=(0, (3, 1)), label="what an L40S can give")
        axes.set_ylim(bottom=math.floor(min(sizes) - 2))
        axes.set_xlabel("tokens of the sequence")
        axes.set_ylabel("GiB, the whole process")
        axes.legend(frameon=False)
    return Picture(figure, "paging", "A paged optimizer", "65B with rank 64: two moments of float32 for each adapter.")


def main() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for picture in (levels(), errors(), methods(), paging()):
        (FOLDER / f"{picture.name}.svg").write_text(svg_of(picture), encoding="utf-8")


if __name__ == "__main__":
    main()
