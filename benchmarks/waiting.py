"""`make waiting`: what threads that spin, or sleep, while they wait for each other cost a step.

Other processes of the machine take a core now and then; the threads of a step then wait for the one that has none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import click

from benchmarks.place import Place
from benchmarks.speed import ROOT, facts, on, spread
from qlora_core.files import write_json

RESULTS = ROOT / "benchmarks" / "results" / "waiting.json"
PLACE = Place(ROOT / "docs" / "performance.md", "make waiting")
WAYS = {
    "as OpenMP has it": {},
    "`GOMP_SPINCOUNT=1000`": {"GOMP_SPINCOUNT": "1000"},
    "`OMP_WAIT_POLICY=passive`": {"OMP_WAIT_POLICY": "passive"},
}
STEPS = (64, 16, 38), (512, 2, 256)
"""A small one and one whose products are large: width, sequences, tokens of one."""
STEP = """
import json, sys, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[1]))
width, sequences, length = map(int, sys.argv[2:])
model = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=width, intermediate_size=3 * width,
                                     num_hidden_layers=2, num_attention_heads=4))
tokens = torch.randint(512, (sequences, length))
def step():
    began = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return time.perf_counter() - began
for _ in range(5):
    step()
print(json.dumps([step() for _ in range(20)]))
"""


def seconds_of_steps(threads: int, step: Sequence[int], environment: dict[str, str]) -> list[float]:
    """Seconds of 20 steps of one of `STEPS` through a Llama of two layers, in a process of its own."""
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    command = [sys.executable, "-c", STEP, *map(str, (threads, *step))]
    done = subprocess.run(command, env={**unset, **environment}, capture_output=True, text=True, check=True)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


@contextmanager
def busy() -> Iterator[None]:
    """One other process that computes all the time."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            yield
        finally:
            other.kill()


@click.command(name="benchmarks.waiting")
def main() -> None:
    """Time a step under each way to wait, alone and beside a busy process."""
    threads, before = os.cpu_count() or 1, facts("torch", "transformers")
    rows: dict[str, list[list[float]]] = {}
    for way, environment in WAYS.items():
        alone = [seconds_of_steps(threads, step, environment) for step in STEPS]
        with busy():
            rows[way] = [*alone, *(seconds_of_steps(threads, step, environment) for step in STEPS)]
    results: dict[str, Any] = {**before, "threads": threads, "seconds": rows}
    write_json(RESULTS, results)
    text = table(results)
    PLACE.write(text)
    click.echo(text)


def table(results: Mapping[str, Any]) -> str:
    """What docs/performance.md shows: of each way the steps of `STEPS`, alone and then beside a busy process."""
    rows, threads = results["seconds"], results["threads"]
    usual = [spread(steps)["median"] for steps in rows["as OpenMP has it"][: len(STEPS)]]
    shown = [f"{sequences} x {tokens}, width {width}" for width, sequences, tokens in STEPS]
    columns = [*shown, *(f"{step}, beside one busy process" for step in shown)]
    milliseconds = " and ".join(f"{1000 * seconds:.1f} ms" for seconds in usual)
    lines = [
        f"A step through a Llama of two layers, {threads} threads, medians of 20 and their quartiles, as ratios to "
        f"the step with OpenMP's own way to wait on a quiet machine, {milliseconds} ({on(results)}):",
        "",
        f"| threads wait | {' | '.join(columns)} |",
        f"| --- |{' ---: |' * len(columns)}",
        *(
            f"| {way} | {' | '.join(of_usual(steps, of) for steps, of in zip(found, usual * 2, strict=True))} |"
            for way, found in rows.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def of_usual(steps: Sequence[float], usual: float) -> str:
    """A cell of the table."""
    found = spread([step / usual for step in steps])
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


if __name__ == "__main__":
    main()
