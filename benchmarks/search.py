"""How long a search takes and how much memory it needs, over growing spaces: a part of `make speed`.

The machine may be shared, so what is measured is the processor's time of one process (`time.process_time`), which waits
for nobody; a search uses one core. Each search runs in a process of its own, so that none finds what another prepared.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clusters.cluster import load_cluster
from clusters.errors import RunFailed
from orchestrator.planner import fitting_defaults, targets_of
from orchestrator.plans import Target
from orchestrator.question import STRATEGY_FIELDS, Question
from orchestrator.search import search
from orchestrator.space import candidates, places
from qlora_core.catalogue import find_model
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "clusters" / "examples" / "thousand.yaml"
MODEL = "65b"
OPEN = frozenset(STRATEGY_FIELDS) | {"optimizer"}
"""All that decides how a recipe is run, and the optimizer."""
LARGE, LARGE_S = 20_000, 2.0
"""A space of at least so many candidates is searched in so many seconds."""
WHOLE_S = 5.0
"""All pools of the cluster are searched in so many seconds."""


class Space(NamedTuple):
    """What is searched.

    Attributes:
        name: what it is called in the table.
        pools: so many of the cluster's, in their order in its file.
        sequences: of a step; the more divisors it has, the more micro-batches and groups of GPUs there are.
    """

    name: str
    pools: int
    sequences: int


SPACES = (
    Space("1 pool", 1, 1024),
    Space("2 pools", 2, 1024),
    Space("3 pools", 3, 1024),
    Space("4 pools", 4, 1024),
    Space("5 pools, 1,024 GPUs", 5, 1024),
)


def question_of(space: Space) -> tuple[Question, list[Target]]:
    """65B on the space's pools, 2,048 tokens a sequence, everything open that a search may choose."""
    cluster, architecture = load_cluster(CLUSTER), find_model(MODEL)
    recipe = Recipe(seq_len=2048, tokens_per_step=2048 * space.sequences)
    strategy = fitting_defaults(architecture, Strategy())
    question = Question(architecture, recipe, strategy, OPEN, whole_step=True)
    return question, targets_of(cluster.pools[: space.pools], recipe.compute_dtype, 1)


def measured(space: Space, trace_memory: bool) -> dict[str, Any]:
    """One search of `space` in this process, which has searched nothing before.

    With `trace_memory` its peak of Python's memory instead of its time: following allocations takes time of its own.
    """
    question, devices = question_of(space)
    taken = list(places(question, devices))
    found = {
        "gpus": sum(device.pool.gpus for device in devices if device.pool is not None),
        "places": len(taken),
        "candidates": sum(1 for place in taken for _ in candidates(question, place)),
    }
    if trace_memory:
        tracemalloc.start()
        search(question, devices)
        return {**found, "peak_bytes": tracemalloc.get_traced_memory()[1]}
    begin = time.process_time()
    best = search(question, devices)[0]
    return {**found, "seconds": time.process_time() - begin, "best": best.place.name}


def results(rounds: int = 3) -> list[dict[str, Any]]:
    """Of each space its size, the least time of `rounds` searches, and the peak of memory."""
    rows = []
    for space in SPACES:
        timed = [in_a_process(space, trace_memory=False) for _ in range(rounds)]
        fastest = min(timed, key=lambda row: float(row["seconds"]))
        peak = in_a_process(space, trace_memory=True)["peak_bytes"]
        rows.append({"name": space.name, **fastest, "peak_bytes": peak})
    return rows


def in_a_process(space: Space, trace_memory: bool) -> dict[str, Any]:
    """`measured`, in a process of its own.

    Raises:
        RunFailed: it did not end well.
    """
    argv = [sys.executable, "-m", "benchmarks.search", json.dumps([*space, trace_memory])]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunFailed(f"the search of {space.name} ended with {done.returncode}: {last}.", "Run it to see why.")
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def goals(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, float | None]]:
    """What was promised, at most how many seconds, and what was measured, if anything was."""
    large = [row for row in rows if row["candidates"] >= LARGE]
    smallest = min(large, key=lambda row: int(row["candidates"]), default=None)
    yield (
        f"a search over {LARGE:,} candidates or more, s of one core",
        LARGE_S,
        smallest["seconds"] if smallest else None,
    )
    whole = next((row for row in rows if row["name"] == SPACES[-1].name), None)
    yield "a search over 1,024 GPUs in 5 pools, s of one core", WHOLE_S, whole["seconds"] if whole else None


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The results as they stand in the document."""
    if not rows:
        return []
    return [
        "",
        "| a search for 65B, everything open | places | candidates | s of one core | µs a candidate | peak, MiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['name']} | {row['places']} | {row['candidates']:,} | {row['seconds']:.2f} "
            f"| {1e6 * row['seconds'] / row['candidates']:.0f} | {row['peak_bytes'] / 1024**2:.0f} |"
            for row in rows
        ),
    ]


if __name__ == "__main__":
    *fields, trace_memory = json.loads(sys.argv[1])
    print(json.dumps(measured(Space(*fields), trace_memory)))
