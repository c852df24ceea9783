"""`make profile`: where the time of a training step goes on this machine's CPU, and the floor of its products."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from benchmarks.place import Place
from benchmarks.speed import ROOT, machine
from benchmarks.training.case import Case, chosen_dtype, make_model, write_spec
from qlora_core.files import write_json

RESULTS = ROOT / "benchmarks" / "results" / "profile.json"
PLACE = Place(ROOT / "docs" / "performance.md", "make profile")
WORK = ROOT / ".cache" / "bench" / "profile"
STEPS, FOLLOWED = 12, 6
"""Steps of a run, and how many of them come before the first that is looked at: the storage tracker follows those."""
PRODUCTS = "matrix products"
KINDS = (
    (
        "attention",  # batched products and a softmax of its own are nothing else's
        ("scaled_dot_product", "flash_attention", "CausalAttention", "aten::bmm", "aten::baddbmm", "aten::_softmax"),
    ),
    (PRODUCTS, ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul", "mkldnn")),
    ("dequantization", ("bitsandbytes::dequantize", "bitsandbytes::quantize")),
    ("optimizer", ("optimizer", "foreach", "fused_adam")),
    ("loss", ("softmax", "logsumexp", "nll", "cross_entropy", "gather", "scatter")),
    (
        "copies and casts",
        ("aten::copy_", "aten::to", "aten::_to_copy", "aten::cat", "aten::clone", "aten::fill_", "zero"),
    ),
)
"""Kinds of operators, by what their names have."""
REST = "elementwise and all else"


def kind_of(name: str) -> str:
    """The kind of an operator."""
    return next((kind for kind, words in KINDS if any(word in name for word in words)), REST)


def profiled(specification: Path) -> dict[str, Any]:
    """Seconds of a step by kind of operator, and the operations of its products with the rate of a large one."""
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    from benchmarks.training.loops import Watch, begun
    from qlora_core.quiet import quiet_libraries
    from qlora_core.training.loop import train

    quiet_libraries()
    run, plan = begun(specification)
    active = STEPS - FOLLOWED - 1
    with profile(
        activities=[ProfilerActivity.CPU],
        schedule=schedule(wait=FOLLOWED, warmup=1, active=active, repeat=1),
        with_flops=True,
    ) as found:

        class Stepping(Watch):
            def event(self, kind: str, **facts: Any) -> None:
                if kind == "step":
                    found.step()

        train(run, Stepping(), None)
    spent: dict[str, float] = defaultdict(float)
    operations = 0
    for average in found.key_averages():
        if average.key.startswith("ProfilerStep"):
            continue
        kind = kind_of(average.key)
        spent[kind] += average.self_cpu_time_total / 1e6 / active
        operations += average.flops if kind == PRODUCTS else 0
    dtype = getattr(torch, plan.target.compute_dtype)
    return {
        "seconds": dict(spent),
        "operations": operations / active,
        "rate": rate(dtype),
    }


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
    case = Case()
    model = make_model(case, WORK / "model")
    found = {}
    for dtype in dict.fromkeys(("float32", chosen_dtype())):  # another takes minutes a step
        path = write_spec(case, WORK / dtype, model, steps=STEPS, compute_dtype=dtype, planned=True)
        shutil.rmtree(path.with_name("out"), ignore_errors=True)
        command = [sys.executable, "-m", "benchmarks.training.profiling", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found[dtype] = json.loads(done.stdout.strip().splitlines()[-1])
    results = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "steps": found}
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
    case, here = Case(), results["machine"]
    lines = [
        f"{case.layers} layers of width {case.hidden}, NF4, {case.micro_batch} x {case.seq_len} tokens, as planned "
        f"({here['processor']}, {here['cores']} cores, {results['date']}):",
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
    floors = {dtype: 1000 * steps[dtype]["operations"] / steps[dtype]["rate"] for dtype in dtypes}
    rates = " | ".join(f"{steps[dtype]['rate'] / 1e9:,.0f}" for dtype in dtypes)
    counted = " | ".join(f"{steps[dtype]['operations'] / 1e9:,.0f}" for dtype in dtypes)
    wholes = " | ".join(f"{1000 * sum(steps[dtype]['seconds'].values()):.0f}" for dtype in dtypes)
    lines += [
        f"| **the step** | {wholes} |",
        f"| operations of its products, 10⁹ | {counted} |",
        f"| rate of a large product here, 10⁹ a second | {rates} |",
        f"| floor: these at that rate | {' | '.join(f'{floors[dtype]:.0f}' for dtype in dtypes)} |",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
