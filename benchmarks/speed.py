"""`make speed`: how long planning takes, as ratios; writes benchmarks/results/speed.json and docs/speed.md's tables."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from benchmarks import search
from benchmarks.peers import PEERS, installed, put_in_hub_cache, versions_of
from benchmarks.place import Place
from clusters.errors import RunFailed
from clusters.gpu import find_gpu
from launch.command import main as run_command
from orchestrator.devices import gpu_target
from qlora_core.catalogue import find_model
from qlora_core.files import write_json
from qlora_core.memory.formula import estimate, prepared
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "speed.json"
DOCUMENT = ROOT / "docs" / "speed.md"
PLACE = Place(DOCUMENT, "make speed")

PEER, PEER_VERSION = "fitcheck-llm", "0.3.1"
PEER_PACKAGES = (PEER, "huggingface_hub", "click", "rich")
PEER_MODEL = "huggyllama/llama-65b"
PEER_COMMAND = (
    f"{PEER_MODEL} --qlora --double-quant --lora-r 64 --lora-targets full --batch-size 1 --seq-len 512 --flash-attn"
    " --gpu a6000"
)
"""The same question for one of the eight GPUs: NF4, double quantization, rank 64 on all linear layers, 1 x 512."""

BARE, PLAN, FITCHECK = "bare imports", "qlora-plan", "fitcheck"
ESTIMATE_CALLS = 300
PACKAGES = ("qlora-orchestrator", "pydantic", "click", "rich", "pyyaml")
"""What a plan is made with."""
TRAINING = ("torch", "transformers", "peft", "bitsandbytes", "ray")
"""What a run is made with."""
TRACE = """
import json, time
begin = time.perf_counter()
from clusters.gpu import find_gpu
from orchestrator.devices import gpu_target
from qlora_core.catalogue import find_model
from qlora_core.memory.trace import estimate
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
loaded = time.perf_counter()
device = gpu_target(find_gpu("a100-40gb"), "auto").device
estimate(find_model("65b"), Recipe(tokens_per_step=512), Strategy(), device)
print(json.dumps({"import_s": loaded - begin, "estimate_s": time.perf_counter() - loaded}))
"""


@dataclass(frozen=True, slots=True)
class Command:
    """A process that is started again and again.

    Attributes:
        name: what it is called in the tables.
        argv: the program and its arguments.
    """

    name: str
    argv: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Goal:
    """What was promised, and what was measured.

    Attributes:
        measured: None where it could not be measured.
    """

    text: str
    most: float
    measured: float | None

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.measured is None:
            return "not measured"
        return "reached" if self.measured <= self.most else "**missed**"


@click.command(name="benchmarks.speed")
@click.option("--rounds", type=click.IntRange(min=1), default=40, show_default=True, help="Starts of each command.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(rounds: int, debug: bool) -> int:
    """Measure the planner's speed; exit code 0, whatever is reached."""
    peer = install_peer()
    times = interleaved(commands(peer), rounds, environment())
    results = {
        "schema_version": 1,
        **facts(*PACKAGES),
        "peer": {
            "command": f"fitcheck {PEER_COMMAND}",
            "versions": versions_of(peer, PEER_PACKAGES),
        },
        "rounds": rounds,
        "cold_start": cold_start_rows(times),
        "estimate": {name: in_us(call_times(ask)) for name, ask in questions().items()},
        "search": search.results(),
        "trace": trace_times(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, results)
    text = tables(results)
    PLACE.write(text)
    click.echo(text)
    return 0


# --- cold starts ------------------------------------------------------------------------------------------------------


def bare_imports() -> Command:
    """What everything is held against, and by how long it takes, how fast a machine is."""
    return Command(BARE, (sys.executable, "-c", "import pydantic, click, rich.table"))


def commands(peer: Path) -> list[Command]:
    """What is started: the imports that everything is held against, our command, and the peer's."""
    scripts = Path(sys.executable).parent
    plan = (str(scripts / "qlora-plan"), "--model", "65b", "--gpus", "1")
    return [
        bare_imports(),
        Command(PLAN, plan),
        Command(f"{PLAN} --json", (*plan, "--json")),
        Command(f"{PLAN} --gpu rtx-a6000", (*plan, "--gpu", "rtx-a6000")),
        Command(FITCHECK, (str(peer / "bin" / "fitcheck"), *PEER_COMMAND.split())),
    ]


def environment() -> dict[str, str]:
    """That of the processes: bytecode is kept, as an installation has it, and the Hub is its cache."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(PEERS / "hub"), "COLUMNS": "100"}


def interleaved(started: Sequence[Command], rounds: int, env: Mapping[str, str]) -> dict[str, list[float]]:
    """Seconds of each command in each round, after one that warms up; every round begins with another of them.

    Raises:
        RunFailed: a command ends with neither 0 nor 1 (it does not fit), or prints nothing.
    """
    times: dict[str, list[float]] = {one.name: [] for one in started}
    for round_ in range(rounds + 1):
        first = round_ % len(started)
        for one in (*started[first:], *started[:first]):
            begin = time.perf_counter()
            done = subprocess.run(one.argv, env=env, cwd=ROOT, capture_output=True, text=True)
            elapsed = time.perf_counter() - begin
            silent = not done.stdout and (one.name != BARE or done.returncode)
            if silent or done.returncode not in (0, 1):
                last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise RunFailed(f"{one.name} ended with {done.returncode}: {last}.", "Run it by itself to see why.")
            if round_:
                times[one.name].append(elapsed)
    return times


def cold_start_rows(times: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Any]]:
    """Of each command its milliseconds, and its ratio to the bare imports of the same round."""
    return {
        name: {
            "ms": spread([1e3 * value for value in values]),
            "ratio": spread([value / bare for value, bare in zip(values, times[BARE], strict=True)]),
        }
        for name, values in times.items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles: other work on the machine makes outliers in one direction."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": middle, "low": low, "high": high}


# --- estimates in process ---------------------------------------------------------------------------------------------


def questions() -> dict[str, Callable[[int], object]]:
    """What is asked of the formula, by how much of it is new; each takes a number that makes it new."""
    architecture = find_model("65b")
    device = gpu_target(find_gpu("a100-40gb"), "auto").device
    strategy, recipe = Strategy(), Recipe(tokens_per_step=512)

    def same(_: int) -> object:
        return estimate(architecture, Recipe(tokens_per_step=512), strategy, device)

    def length(number: int) -> object:
        return estimate(architecture, Recipe(seq_len=513 + number, tokens_per_step=513 + number), strategy, device)

    def micro_batch(number: int) -> object:
        return estimate(architecture, Recipe(tokens_per_step=512), Strategy(micro_batch=3 + number), device)

    def reserved_bytes(number: int) -> object:
        return prepared(architecture, recipe, strategy, device).reserved_bytes(3 + number, 512)

    def rank(number: int) -> object:
        return estimate(architecture, Recipe(rank=65 + number, tokens_per_step=512), strategy, device)

    return {
        "the same again": same,
        "another sequence length": length,
        "another micro-batch": micro_batch,
        "another micro-batch, its process bytes alone": reserved_bytes,
        "another structure (rank)": rank,
    }


def call_times(ask: Callable[[int], object], calls: int = ESTIMATE_CALLS) -> list[float]:
    """Seconds of each call; the recipe is made in it, too."""
    times = []
    for number in range(calls):
        begin = time.perf_counter()
        ask(number)
        times.append(time.perf_counter() - begin)
    return times


def in_us(times: Sequence[float]) -> dict[str, float]:
    """Their spread in microseconds."""
    return spread([1e6 * value for value in times])


def trace_times() -> dict[str, Any]:
    """Seconds of the traced estimate of 65B in a process of its own; why not, where there is none."""
    if not (ROOT / "qlora_core" / "memory" / "trace.py").exists():
        return {"missing": "not built"}
    done = subprocess.run([sys.executable, "-c", TRACE], env=environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"missing": f"failed: {(done.stderr.strip().splitlines() or [str(done.returncode)])[-1]}"}
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


# --- the peer, and what all of it ran on ------------------------------------------------------------------------------


def install_peer() -> Path:
    """The peer's environment, with 65B's config in its Hub cache.

    Raises:
        RunFailed: it cannot be installed.
    """
    config = (ROOT / "qlora_core" / "models" / "llama-65b.json").read_text(encoding="utf-8")
    put_in_hub_cache(PEERS / "hub", PEER_MODEL, config)
    return installed(PEER, PEER_VERSION)


def facts(*packages: str) -> dict[str, Any]:
    """What every file of results says: when something was measured, on what, and with which versions of `packages`."""
    versions = {name: metadata.version(name) for name in packages}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions},
    }


def listed(versions: Mapping[str, str] | str) -> str:
    """Versions in words; that they were not recorded, where they were not."""
    if isinstance(versions, str):
        return f"versions {versions}"
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def on(results: Mapping[str, Any]) -> str:
    """What all results of a file were measured on, and with, in words."""
    here = results["machine"]
    return f"{here['processor']}, {here['cores']} cores, {results['date']}; {listed(results['versions'])}"


def machine() -> dict[str, Any]:
    """The processor, and how busy it was."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


# --- the tables -------------------------------------------------------------------------------------------------------


def goals(results: Mapping[str, Any]) -> Iterator[Goal]:
    """What the planner is to keep to."""
    plan, peer = (results["cold_start"][name] for name in (PLAN, FITCHECK))
    ratio, peers = plan["ratio"]["median"], peer["ratio"]["median"]
    yield Goal(f"cold start of {PLAN}, of the bare imports'", 2.2, ratio)
    yield Goal(f"cold start of {PLAN}, of fitcheck's", 0.5, ratio / peers)
    for name, us in results["estimate"].items():
        yield Goal(f"one estimate, {name}, µs", 100, us["median"])
    yield from (Goal(*goal) for goal in search.goals(results["search"]))
    yield Goal("65B traced, s", 10, results["trace"].get("estimate_s"))


def tables(results: Mapping[str, Any]) -> str:
    """The results as they stand in the document."""
    on, peer = results["machine"], results["peer"]["versions"]
    installed, peers = listed(results["versions"]), listed(peer)
    trace = results["trace"]
    lines = [
        f"Measured on {results['date']}: {on['processor']}, {on['cores']} cores, {on['system']}, load {on['load']};",
        f"{installed}.",
        f"The peer: {peers}. Each command was started {results['rounds']} times.",
        "",
        "| goal | at most | measured | |",
        "| --- | ---: | ---: | --- |",
        *(
            f"| {goal.text} | {goal.most:g} | {'-' if goal.measured is None else significant(goal.measured)} "
            f"| {goal.verdict} |"
            for goal in goals(results)
        ),
        "",
        "| cold start | ratio to the bare imports | quartiles | ms |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| `{name}` | {row['ratio']['median']:.2f} | {row['ratio']['low']:.2f} to {row['ratio']['high']:.2f} "
            f"| {row['ms']['median']:.0f} |"
            for name, row in results["cold_start"].items()
        ),
        "",
        "| one estimate of 65B, in process | µs | quartiles |",
        "| --- | ---: | ---: |",
        *(
            f"| {name} | {us['median']:.0f} | {us['low']:.0f} to {us['high']:.0f} |"
            for name, us in results["estimate"].items()
        ),
        *search.table(results["search"]),
        "",
        f"65B traced: {trace['missing']}."
        if "missing" in trace
        else f"65B traced: {trace['estimate_s']:.1f} s, after {trace['import_s']:.1f} s of imports.",
        "",
    ]
    return "\n".join(lines)


def significant(value: float) -> str:
    """A number with as many digits as say something."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    run_command(command)
