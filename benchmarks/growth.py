"""`make growth`: time and memory of a run against model size, sequence length, workers and checkpoints, on this CPU.

How a search grows with its candidates is in docs/speed.md, a schedule with its runs in docs/capacity.md.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks import start
from benchmarks.place import Place
from benchmarks.reliability import saving
from benchmarks.speed import ROOT, TRAINING, facts, on, spread
from benchmarks.training.case import Case, chosen_dtype, make_model, write_spec
from launch.report.pictures.style import COLORS, MARKERS, Picture, canvas, styled, svg_of
from orchestrator.prepare import prepare
from orchestrator.spec import load_spec
from qlora_core.files import write_json

RESULTS = ROOT / "benchmarks" / "results" / "growth.json"
PLACE = Place(ROOT / "docs" / "benchmarks.md", "make growth")
PICTURE = ROOT / "docs" / "benchmarks" / "growth.svg"
WORK = ROOT / ".cache" / "bench" / "growth"
CASE = Case(layers=4, hidden=256, vocabulary=4096, seq_len=256)
LAYERS, LENGTHS, WORKERS, RANKS = (2, 4, 8, 16), (64, 128, 256, 512), (1, 2, 4), (8, 32, 128)
CASES = {
    "layers": {size: replace(CASE, layers=size) for size in LAYERS},
    "lengths": {size: replace(CASE, seq_len=size) for size in LENGTHS},
}
STEPS, WARM_UP = 12, 6
"""Steps of a run, and how many of them are followed by the storage tracker, which takes time: they are not timed."""
MIB = 1024**2


def written(case: Case, name: str, dtype: str, work: Path = WORK) -> Path:
    """The specification of a case's run, its model made where it is not there."""
    model = make_model(case, work / f"model-{case.layers}")
    return write_spec(case, work / name, model, steps=STEPS, compute_dtype=dtype)


def predicted(specification: Path) -> int:
    """The peak that a run is planned with."""
    return prepare(load_spec(specification)).plan.estimate.gpu.allocated_bytes


def trained(case: Case, name: str, dtype: str) -> dict[str, Any]:
    """Seconds of steps, and bytes at its peak as measured and as predicted, in a process of its own."""
    specification = written(case, name, dtype)
    shutil.rmtree(specification.with_name("out"), ignore_errors=True)
    answer = specification.with_name("answer.json")
    subprocess.run([sys.executable, "-m", "benchmarks.growth", "--train", specification, answer], cwd=ROOT, check=True)
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def train_here(specification: Path) -> dict[str, Any]:
    """What `trained` asks for."""
    from benchmarks.training.loops import Watch, begun
    from qlora_core.quiet import quiet_libraries
    from qlora_core.training.loop import train

    quiet_libraries()
    (run, plan), watch = begun(specification), Watch()
    train(run, watch, None)
    return {
        "seconds": [step["seconds"] for step in watch.steps[WARM_UP:]],
        "measured": max(watch.steps[-1]["peaks"].values()),
        "predicted": plan.estimate.gpu.allocated_bytes,
    }


def started(workers: int, dtype: str) -> dict[str, float]:
    """Seconds until the first step of a run with so many workers is done, and of each step after it."""
    specification = written(CASE, f"workers-{workers}", dtype)
    tokens = f"recipe.tokens_per_step={max(WORKERS) * CASE.seq_len}"
    moments = start.moments(specification, f"strategy.world_size={workers}", "strategy.micro_batch=1", tokens)
    seen = dict(zip(start.PARTS, moments, strict=True))
    record = json.loads((specification.parent / "out" / "run.json").read_text(encoding="utf-8"))
    return {
        "first": seen["the first step is done"],
        "seconds": record["measured"]["step_seconds"],
        "measured": record["measured"]["allocated_bytes"],
        "predicted": record["predicted"]["allocated_bytes"],
    }


def saved(rank: int) -> dict[str, Any]:
    """Bytes of a checkpoint, and seconds that it adds to the steps beside it, round by round."""
    found = saving.measured(WORK / f"rank-{rank}", replace(saving.CASE, rank=rank))
    return {"bytes": found["bytes"], "lost": found["lost_seconds"]}


def grown(name: str, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A table of steps against what grows."""
    yield from (
        f"| {name} | s of a step | quartiles | MiB measured | MiB predicted | error |",
        "| ---: | ---: | --- | ---: | ---: | ---: |",
    )
    for size, row in rows.items():
        error, seconds = row["predicted"] / row["measured"] - 1, spread(row["seconds"])
        steps = f"{seconds['median']:.3f} | {seconds['low']:.3f} to {seconds['high']:.3f}"
        sizes = f"{row['measured'] / MIB:,.1f} | {row['predicted'] / MIB:,.1f} | {error:+z.1%}"
        yield f"| {int(size):,} | {steps} | {sizes} |"
    yield ""


def text_of(results: Mapping[str, Any]) -> str:
    """What is written into the page."""
    lines = [
        f"A Llama of {CASE.layers} layers of width {CASE.hidden}, NF4, rank {CASE.rank}, {CASE.micro_batch} x "
        f"{CASE.seq_len} tokens a step, checkpointed, computed in {results['compute_dtype']}, where nothing else is "
        f"said ({on(results)}). A step is the median of {STEPS - WARM_UP}; "
        "memory is the bytes of live tensors at the peak. "
        f"{CASE.layers} layers and {CASE.seq_len} tokens are the same run, twice: so far do two measurements differ.",
        "",
        *grown("layers", results["layers"]),
        *grown("tokens of a sequence", results["lengths"]),
        f"Workers share the machine's cores and a step of {max(WORKERS)} sequences; memory is the fullest one's.",
        "",
        "| workers | s to the first step | s of a step | MiB measured | MiB predicted |",
        "| ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {workers} | {row['first']:.1f} | {row['seconds']:.3f} | {row['measured'] / MIB:,.1f} | "
            f"{row['predicted'] / MIB:,.1f} |"
            for workers, row in results["workers"].items()
        ),
        "",
        f"The checkpoints of a Llama of {saving.CASE.layers} layers of width {saving.CASE.hidden}, one every "
        f"{saving.EVERY} steps, written while the next steps compute on the same cores. What one adds is how much "
        f"longer the steps take with them than without, for each, the median of {saving.ROUNDS} rounds; what lies on "
        "both sides of zero is less than two runs differ by:",
        "",
        "| rank | MiB of a checkpoint | s that it adds | of the rounds |",
        "| ---: | ---: | ---: | ---: |",
        *(checkpoint_row(rank, row) for rank, row in results["ranks"].items()),
    ]
    return "\n".join(lines) + "\n"


def checkpoint_row(rank: str, row: Mapping[str, Any]) -> str:
    """A line of the table of checkpoints."""
    lost, mib = row["lost"], row["bytes"] / MIB
    return f"| {rank} | {mib:,.1f} | {statistics.median(lost):.3f} | {min(lost):.3f} to {max(lost):.3f} |"


def picture_of(results: Mapping[str, Any]) -> Picture:
    """Time and memory against model size and length."""
    with styled():
        figure = canvas(4.6)
        for column, (name, words) in enumerate((("layers", "layers"), ("lengths", "tokens of a sequence"))):
            sizes = [int(size) for size in results[name]]
            rows: Sequence[Mapping[str, Any]] = list(results[name].values())
            above, below = figure.add_subplot(2, 2, 1 + column), figure.add_subplot(2, 2, 3 + column)
            above.plot(sizes, [spread(row["seconds"])["median"] for row in rows], color=COLORS[2], marker=MARKERS[2])
            above.set_ylabel("s of a step")
            measured, predicted = ([row[kind] / MIB for row in rows] for kind in ("measured", "predicted"))
            below.plot(sizes, measured, color=COLORS[0], marker=MARKERS[0], linestyle="", label="measured")
            below.plot(sizes, predicted, color=COLORS[5], label="predicted")
            below.set_ylabel("MiB at the peak")
            below.legend(frameon=False)
            below.set_xlabel(words)
            for axes in (above, below):
                axes.set_xticks(sizes)
                axes.set_ylim(bottom=0)
    return Picture(figure, "growth", "Time and memory against model size and sequence length", "Lines are predictions.")


@click.command(name="benchmarks.growth")
@click.option("--train", nargs=2, type=click.Path(path_type=Path), help="Used by itself: SPECIFICATION ANSWER.")
def main(train: tuple[Path, Path] | None) -> None:
    """Measure all of it; some minutes."""
    if train is not None:
        write_json(train[1], train_here(train[0]))
        return
    dtype = chosen_dtype()
    results: dict[str, Any] = {
        **facts(*TRAINING),
        "compute_dtype": dtype,
        **{
            what: {str(size): trained(case, f"{what}-{size}", dtype) for size, case in cases.items()}
            for what, cases in CASES.items()
        },
        "workers": {str(workers): started(workers, dtype) for workers in WORKERS},
        "ranks": {str(rank): saved(rank) for rank in RANKS},
    }
    write_json(RESULTS, results)
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(svg_of(picture_of(results)), encoding="utf-8")
    text = text_of(results)
    PLACE.write(text)
    click.echo(text)


if __name__ == "__main__":
    main()
