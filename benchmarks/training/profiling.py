"""`make profile`: where the time and the memory of a training step go on this machine's CPU, and the time's floor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.place import Place
from benchmarks.speed import ROOT, TRAINING, facts, on, spread
from benchmarks.training.case import Case, chosen_dtype, make_model, write_spec
from launch.report.components import COMPONENT_TITLES
from orchestrator.plans import Plan
from qlora_core.files import write_json
from qlora_core.memory.tape import value
from qlora_core.step_time import READ_PER_DEQUANTIZED, load

RESULTS = ROOT / "benchmarks" / "results" / "profile.json"
PLACE = Place(ROOT / "docs" / "performance.md", "make profile")
WORK = ROOT / ".cache" / "bench" / "profile"
FOLLOWED, TIMED, PROFILED = 6, 6, 5
"""Steps of a run: the storage tracker follows the first, the next are timed, and one more warms up the profiler."""
PRODUCTS, OPTIMIZER = "matrix products", "optimizer"
MIB = 2**20
KINDS = (
    (
        "attention",  # batched products and a softmax of its own are nothing else's
        ("scaled_dot_product", "flash_attention", "CausalAttention", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
    ),
    (PRODUCTS, ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul", "mkldnn")),
    ("dequantization", ("bitsandbytes::dequantize", "bitsandbytes::quantize")),
    ("loss", ("softmax", "logsumexp", "nll", "cross_entropy", "gather", "scatter")),
    (
        "copies and casts",
        ("aten::copy_", "aten::to", "aten::_to_copy", "aten::cat", "aten::clone", "aten::fill_", "zero"),
    ),
)
"""Kinds of operators, by what their names have. All that the engine's step calls is the optimizer's."""
REST = "elementwise and all else"


def kind_of(event: Any) -> str:
    """The kind of an operator that the profiler saw, a `FunctionEvent`."""
    above = event
    while above is not None:
        if above.name == OPTIMIZER:
            return OPTIMIZER
        above = above.cpu_parent
    return next((kind for kind, words in KINDS if any(word in event.name for word in words)), REST)


def profiled(specification: Path) -> dict[str, Any]:
    """Seconds of a step by kind of operator and without the profiler, its peak, and what its floor is made of."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function, schedule

    from benchmarks.training.loops import Watch, begun
    from qlora_core.quiet import quiet_libraries
    from qlora_core.training.loop import train

    quiet_libraries()
    run, plan = begun(specification)
    run.engine.step = record_function(OPTIMIZER)(run.engine.step)  # type: ignore[method-assign]
    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=FOLLOWED + TIMED, warmup=1, active=PROFILED, repeat=1),
        with_flops=True,
    ) as found:

        class Stepping(Watch):
            def event(self, kind: str, **facts: Any) -> None:
                super().event(kind, **facts)
                if kind == "step":
                    found.step()

        watch = Stepping()
        train(run, watch, None)
    spent: dict[str, float] = defaultdict(float)
    operations = 0
    for event in found.events():
        if event.name.startswith("ProfilerStep"):
            continue
        kind = kind_of(event)
        spent[kind] += event.self_cpu_time_total / 1e6 / PROFILED
        operations += event.flops if kind == PRODUCTS else 0
    dtype = getattr(torch, plan.target.compute_dtype)
    components = plan.estimate.gpu.components._asdict()
    return {
        "seconds": dict(spent),
        "unprofiled": [step["seconds"] for step in watch.steps[FOLLOWED : FOLLOWED + TIMED]],
        "operations": operations / PROFILED,
        **counted(plan),
        "rate": rate(dtype),
        "copied": copied(),
        "peak": max(watch.steps[-1]["peaks"].values()),
        "components": {name: size for name, size in components.items() if size},
    }


def counted(plan: Plan) -> dict[str, float]:
    """What the profiler does not count of a step, as the step-time model does: attention's operations, bytes moved."""
    strategy, seq_len = plan.strategy, plan.recipe.seq_len
    work, state = load(plan.architecture, plan.recipe, strategy, plan.target.device)
    tokens = strategy.micro_batch * seq_len
    moved = value(work.moved, (1, seq_len, tokens, tokens * seq_len, 0)) + READ_PER_DEQUANTIZED * work.dequantized
    return {
        "attention": strategy.gradient_accumulation * work.attention * tokens * seq_len,
        "bytes": strategy.gradient_accumulation * moved + state.optimizer_bytes,
    }


def copied(size: int = 2**28) -> float:
    """Bytes a second that a large copy reads and writes, the best of a few."""
    import torch

    source = torch.ones(size // 4)
    target, best = torch.zeros_like(source), 0.0
    for _ in range(8):
        began = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * size / (time.perf_counter() - began))
    return best


def rate(dtype: Any, side: int = 1536) -> float:
    """Operations a second of a large product, the best of a few."""
    import torch

    left, right = torch.randn(side, side, dtype=dtype), torch.randn(side, side, dtype=dtype)
    best = 0.0
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(left, right)
        best = max(best, 2 * side**3 / (time.perf_counter() - began))
    return best


@click.command(name="benchmarks.training.profiling")
@click.argument("specification", required=False, type=click.Path(path_type=Path))
def main(specification: Path | None) -> None:
    """Profile our loop in each dtype that this CPU multiplies, in a process of its own, and write what came out."""
    if specification is not None:
        click.echo(json.dumps(profiled(specification)))
        return
    case, steps = Case(), FOLLOWED + TIMED + 1 + PROFILED
    model = make_model(case, WORK / "model")
    found, before = {}, facts(*TRAINING)
    for dtype in dict.fromkeys(("float32", chosen_dtype())):  # another takes minutes a step
        path = write_spec(case, WORK / dtype, model, steps=steps, compute_dtype=dtype, planned=True)
        shutil.rmtree(path.with_name("out"), ignore_errors=True)
        command = [sys.executable, "-m", "benchmarks.training.profiling", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[dtype] = json.loads(done.stdout.strip().splitlines()[-1])
    results = {**before, "steps": found}
    write_json(RESULTS, results)
    text = table(results)
    PLACE.write(text)
    click.echo(text)


def table(results: dict[str, Any]) -> str:
    """What docs/performance.md shows."""
    steps = results["steps"]
    dtypes = list(steps)
    kinds = sorted(
        {kind for one in steps.values() for kind in one["seconds"]},
        key=lambda kind: -steps[dtypes[0]]["seconds"].get(kind, 0),
    )
    case = Case()
    lines = [
        f"{case.layers} layers of width {case.hidden}, NF4, {case.micro_batch} x {case.seq_len} tokens, as planned "
        f"({on(results)}):",
        "",
        "| ms of a step | " + " | ".join(dtypes) + " |",
        "| --- |" + " ---: |" * len(dtypes),
    ]
    for kind in kinds:
        cells = []
        for dtype in dtypes:
            seconds = steps[dtype]["seconds"]
            spent = seconds.get(kind, 0.0)
            cells.append(f"{1000 * spent:.0f} ({spent / sum(seconds.values()):.0%})")
        lines.append(f"| {kind} | {' | '.join(cells)} |")

    def row(name: str, of: Callable[[dict[str, Any]], str]) -> str:
        return f"| {name} | {' | '.join(of(steps[dtype]) for dtype in dtypes)} |"

    lines += [
        row("**the step**", lambda one: f"{1000 * sum(one['seconds'].values()):.0f}"),
        row("**without the profiler**, and quartiles", lambda one: unprofiled(one["unprofiled"])),
        row("operations of its products, 10⁹", lambda one: f"{one['operations'] / 1e9:,.0f}"),
        row("operations of attention, 10⁹", lambda one: f"{one['attention'] / 1e9:,.1f}"),
        row("rate of a large product here, 10⁹ a second", lambda one: f"{one['rate'] / 1e9:,.0f}"),
        row("bytes that all else moves, 10⁹", lambda one: f"{one['bytes'] / 1e9:,.1f}"),
        row("rate of a large copy here, 10⁹ bytes a second", lambda one: f"{one['copied'] / 1e9:,.1f}"),
        row("floor: operations and bytes at these rates", lambda one: f"{1000 * floor(one):.0f}"),
        row("the step without the profiler, of its floor", lambda one: f"{of_floor(one):.2f}"),
    ]
    names = list(dict.fromkeys(name for one in steps.values() for name in one["components"]))
    lines += ["", "| MiB at the peak | " + " | ".join(dtypes) + " |", "| --- |" + " ---: |" * len(dtypes)]
    lines += [row(COMPONENT_TITLES[name], component(name)) for name in names]
    lines += [
        row("**predicted**: the sum", lambda one: f"{sum(one['components'].values()) / MIB:,.1f}"),
        row("**measured**", lambda one: f"{one['peak'] / MIB:,.1f}"),
    ]
    return "\n".join(lines) + "\n"


def unprofiled(seconds: Sequence[float]) -> str:
    """The median of steps and its quartiles, in ms."""
    found = spread([1000 * each for each in seconds])
    return f"{found['median']:.0f}, {found['low']:.0f} to {found['high']:.0f}"


def floor(one: Mapping[str, Any]) -> float:
    """Seconds of a step whose operations and bytes all took as long as those of a large product and a large copy."""
    return float((one["operations"] + one["attention"]) / one["rate"] + one["bytes"] / one["copied"])


def of_floor(one: Mapping[str, Any]) -> float:
    """How many times its floor a step takes."""
    return spread(one["unprofiled"])["median"] / floor(one)


def component(name: str) -> Callable[[Mapping[str, Any]], str]:
    """A cell of the table of memory."""
    return lambda one: f"{one['components'].get(name, 0) / MIB:,.1f}"


if __name__ == "__main__":
    main()
