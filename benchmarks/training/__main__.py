"""`make training`: ours beside TRL's, Unsloth's and a bare loop, with and without Ray; writes docs/benchmarks.md."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.peers import QUIET, installed, run_to_end, versions_of
from benchmarks.speed import ROOT, TRAINING, facts
from benchmarks.training import memory, page
from benchmarks.training.case import Case, chosen_dtype, make_model, write_spec
from benchmarks.training.order import order_of
from benchmarks.turns import Training, by_turns
from clusters.errors import RunFailed
from launch.command import main as run_command
from orchestrator.spec import load_spec
from qlora_core.files import write_json
from qlora_core.recipe import Recipe
from qlora_core.training.layout import lay_out

WORK = ROOT / ".cache" / "bench"
TRL_VERSION, UNSLOTH_VERSION = "1.16.0", "2026.10.9"
UNSLOTH_WITH = ("unsloth_zoo==2026.10.9", "transformers==5.17.0", "trl==1.15.0", "datasets==4.8.5")
"""The newest that this Unsloth takes: other versions would make other figures."""
BOTH = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "trl")
"""What of a peer's environment is written down beside the peer itself."""
WARM_UP = 4
"""First steps of each run, which are left out: ours are followed by the storage tracker."""
PEER_SECONDS = 150
"""After so many a peer's steps end, where a rate is measured: TRL takes bfloat16 where a CPU needs a minute for one."""
CURVE_STEPS = 50
CURVE_LENGTH = 128
RAY_STEPS = 2000
"""More than are made while a run under Ray is timed."""
TURNS, TURN_SECONDS = 40, 5.0
"""Of a run launched by Ray and of one that is not."""
OURS: dict[str, dict[str, Any]] = {
    page.OURS: {"compute_dtype": "float32"},
    page.OURS_BF16: {"compute_dtype": "bfloat16"},
    page.PLANNED: {"compute_dtype": "float32", "planned": True},
    page.PLANNED_BF16: {"compute_dtype": "bfloat16", "planned": True},
    page.PLANNED_WIDE: {"compute_dtype": "bfloat16", "planned": True, "autocast": False},
}
"""Our loops, as changes of `write_spec`."""


@click.command(name="benchmarks.training")
@click.option("--rounds", type=click.IntRange(min=1), default=4, show_default=True, help="Runs of each loop, in turn.")
@click.option("--steps", type=click.IntRange(min=WARM_UP + 1), default=10, show_default=True, help="Steps of a run.")
@click.option("--tiny", is_flag=True, help="A model of a few layers, and no results kept: to try the benchmark itself.")
@click.option("--only-ray", is_flag=True, help="What a launch by Ray costs a step; other results stay as they are.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def command(rounds: int, steps: int, tiny: bool, only_ray: bool, debug: bool) -> int:
    """Measure how training compares; exit code 0, whatever is reached."""
    case = Case(layers=2, hidden=128, vocabulary=1024, seq_len=64) if tiny else Case()
    work = WORK / ("tiny" if tiny else "full")
    model = make_model(case, work / "model")
    auto = chosen_dtype()
    turns = 2 if tiny else TURNS
    if only_ray:
        if not (kept := page.results_file(auto)).exists():
            raise RunFailed(f"There are no other results in {kept}.", "Measure all of them first.")
        results = json.loads(kept.read_text(encoding="utf-8"))
        keep({**results, "ray": beside_ray(case, work, model, turns)}, auto, tiny)
        return 0
    peers = installed_peers()
    rates, peaks = speed(case, work, model, rounds, steps, auto, peers)
    results = {
        "schema_version": 1,
        **facts(*TRAINING),
        "peers": {
            "TRL": versions_of(peers.trl.parents[1], BOTH),
            "Unsloth": versions_of(peers.unsloth.parents[1], (*BOTH, "unsloth", "unsloth_zoo")),
        },
        "case": asdict(case),
        "auto": auto,
        "rounds": rounds,
        "steps": steps - WARM_UP,
        "speed": rates,
        "peaks": peaks,
        "curve": curve(
            replace(case, seq_len=min(case.seq_len, CURVE_LENGTH)), work, model, 8 if tiny else CURVE_STEPS, peers
        ),
        "ray": beside_ray(case, work, model, turns),
        "padding_percent": padding_percent(),
        "memory": [*memory_measured(case, work, model), *memory.rows(traced=not tiny)],
    }
    keep(results, auto, tiny)
    return 0


def keep(results: dict[str, Any], auto: str, tiny: bool) -> None:
    """Show results, and keep them and write the page if they are not `tiny`."""
    if not tiny:
        write_json(page.results_file(auto), results)
        page.write()
    click.echo(page.tables(results))


# --- the loops, each in a process of its own --------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """That of the loops: each decides for itself how many threads it takes, and nothing is asked of the Hub."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    ledger = {"QLORA_LEDGER": str(WORK / "ledger.sqlite")}
    return {**kept, **ledger, **QUIET, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}


def finished(argv: list[str]) -> None:
    """Run a process to its end.

    Raises:
        RunFailed: it ended with another code than 0.
    """
    run_to_end(argv, environment(), ROOT)


def loop(role: str, specification: Path) -> dict[str, Any]:
    """What a loop of `benchmarks.training.loops` measured."""
    answer = specification.with_name("answer.json")
    finished([sys.executable, "-m", "benchmarks.training.loops", role, str(specification), str(answer)])
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def peer_loop(python: Path, script: str, specification: Path, model: Path, **further: Any) -> dict[str, Any]:
    """What a peer's loop measured, over the micro-batches that our last run of the specification left.

    Args:
        python: of the peer's environment.
        script: beside this file.
        further: `dtype`, `exact` and `seconds`, as in an order of `benchmarks.training.trl_loop`.
    """
    folder = specification.parent
    order = {
        "model": str(model),
        "batches": str(folder / "batches.safetensors"),
        "adapter": str(folder / "adapter.safetensors"),
        **order_of(load_spec(specification).recipe),
        "device": "cpu",
        **further,
    }
    write_json(folder / "order.json", order)
    finished(
        [str(python), str(Path(__file__).with_name(script)), str(folder / "order.json"), str(folder / "answer.json")]
    )
    found: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return found


def speed(
    case: Case, work: Path, model: Path, rounds: int, steps: int, auto: str, peers: Peers
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Tokens a second of each loop, a figure per round: of the median step after the warm-up; and our peaks, bytes.

    Where `auto` is float32, a step in bfloat16 takes many times as long, and ours is not asked for it.
    """
    found: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    chosen = {name: changes for name, changes in OURS.items() if changes["compute_dtype"] in ("float32", auto)}
    for _ in range(rounds):
        for name, changes in chosen.items():
            specification = write_spec(case, work / name.replace(", ", "-"), model, steps=steps, **changes)
            measured = loop("ours", specification)
            add(found, name, case, measured)
            peaks[name] = max(measured["peaks"].values())
        specification = work / page.OURS.replace(", ", "-") / "run.yaml"
        add(found, page.BARE, case, loop("bare", specification))
        asked = specification, model
        for name, dtype in ((page.TRL, "bfloat16"), (page.TRL_F32, "float32")):
            add(found, name, case, peer_loop(peers.trl, "trl_loop.py", *asked, dtype=dtype, seconds=PEER_SECONDS))
        add(found, page.UNSLOTH, case, peer_loop(peers.unsloth, "unsloth_loop.py", *asked, seconds=PEER_SECONDS))
    return found, peaks


def add(found: dict[str, list[float]], name: str, case: Case, measured: dict[str, Any]) -> None:
    """One round's figure of a loop; of one that ended within the warm-up, all but its first step count."""
    seconds = measured["seconds"]
    found.setdefault(name, []).append(case.tokens / statistics.median(seconds[WARM_UP:] or seconds[1:]))


def curve(case: Case, work: Path, model: Path, steps: int, peers: Peers) -> dict[str, Any]:
    """The losses of the same steps, all in float32: ours, TRL's and the bare loop's."""
    specification = write_spec(case, work / "curve", model, steps=steps, compute_dtype="float32")
    ours = loop("ours", specification)["losses"]
    bare = loop("bare", specification)["losses"]
    trl = peer_loop(peers.trl, "trl_loop.py", specification, model, dtype="float32", exact=True)["losses"]
    return {"seq_len": case.seq_len, "ours": ours, "trl": trl, "bare": bare}


def beside_ray(case: Case, work: Path, model: Path, turns: int) -> dict[str, Any]:
    """Seconds of a step of our loop, launched by Ray and not, by turns; when, and where.

    Raises:
        RunFailed: one of them cannot be timed.
    """
    short = replace(case, seq_len=min(case.seq_len, 256))

    when = facts(*TRAINING)

    def specified(name: str) -> Path:
        path = write_spec(short, work / "ray" / name, model, steps=RAY_STEPS, compute_dtype="float32")
        if (output := path.with_name("out")).exists():
            shutil.rmtree(output)  # of the last time
        return path

    launched, alone = specified("with"), specified("without")
    loops = [sys.executable, "-m", "benchmarks.training.loops"]
    commands = {
        "with": [str(Path(sys.executable).with_name("qlora-train")), str(launched)],
        "without": [*loops, "timed", str(alone), str(alone.with_name("answer.json"))],
    }
    trainings = {
        name: Training(argv, work / "ray" / name / "out" / "events.jsonl", environment())
        for name, argv in commands.items()
    }
    found = by_turns(trainings, warm_up=WARM_UP, turns=turns, seconds=TURN_SECONDS)
    return {**found, **when}


def memory_measured(case: Case, work: Path, model: Path) -> list[dict[str, Any]]:
    """Tensor bytes of our run and of plain peft's on this machine, both in bfloat16."""
    short = replace(case, micro_batch=1)
    specification = write_spec(short, work / "memory", model, steps=2, compute_dtype="bfloat16")
    return memory.measured_rows(loop("ours", specification)["peaks"], loop("plain peft", specification)["peaks"])


def padding_percent() -> float:
    """The part of packed rows of 2,048 that is padding, for 5,000 lengths as conversations have them."""
    rng = random.Random(0)  # noqa: S311  # not cryptography
    lengths = [min(2048, max(8, round(rng.lognormvariate(5.52, 0.97)))) for _ in range(5000)]
    return 100 * lay_out(lengths, Recipe(seq_len=2048, tokens_per_step=2048, packing=True)).waste


# --- the peers --------------------------------------------------------------------------------------------------------


class Peers(NamedTuple):
    """The Pythons of environments that peers are installed in."""

    trl: Path
    unsloth: Path


def installed_peers() -> Peers:
    """TRL with our versions of all that both use; Unsloth with `UNSLOTH_WITH`, which are older.

    Raises:
        RunFailed: one cannot be installed.
    """
    both = ("torch", "peft", "bitsandbytes")
    trl = installed("trl", TRL_VERSION, (*both, "transformers"))
    # it does without, where text is trained; their binaries are made for one build of torch, which need not be this one
    without = ("torchvision", "xformers")
    unsloth = installed("unsloth", UNSLOTH_VERSION, UNSLOTH_WITH, ours=both, without=without)
    return Peers(*(folder / "bin" / "python" for folder in (trl, unsloth)))


if __name__ == "__main__":
    run_command(command)
