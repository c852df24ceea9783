"""docs/benchmarks.md: the goals and tables of benchmarks/results/training-*.json, between two marks.

There is one file for each compute dtype that `auto` may be on a CPU: with it all changes that is compared.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.achieved import measured_rates
from benchmarks.place import Place
from benchmarks.speed import ROOT, listed, spread
from benchmarks.tokenization import BATCHED
from benchmarks.training import memory
from qlora_core.catalogue import find_model
from qlora_core.memory.device import Device
from qlora_core.recipe import Recipe
from qlora_core.step_time import load
from qlora_core.strategy import Strategy

FOLDER = ROOT / "benchmarks" / "results"
TOKENIZATION = FOLDER / "tokenization.json"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
PLACE = Place(DOCUMENT, "make training")

OURS, OURS_BF16 = "ours, float32", "ours, bfloat16"
PLANNED, PLANNED_BF16 = "ours as planned, float32", "ours as planned, bfloat16"
PLANNED_WIDE = "ours as planned, bfloat16, adapters in float32"
BARE, TRL, TRL_F32 = "bare loop, float32", "TRL as documented (bfloat16)", "TRL given float32"
UNSLOTH = "Unsloth as documented"
WHOSE = {"ours": "ours", "trl": "TRL as documented", "unsloth": UNSLOTH}
NOT_MEASURED = "not measured yet"
TRL_ON_GPU, UNSLOTH_ON_GPU = "timed-8b-trl", "timed-8b-unsloth"
PLANNED_ON_GPU = {"a run has autocast": "timed-8b-unchecked-autocast", "without it": "timed-8b-unchecked"}
"""Rows of benchmarks/gpu/matrix.py; `qlora-plan --objective fastest` keeps all activations where there is the room."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What was promised, and what was measured.

    Attributes:
        sense: "least" or "most".
        measured: None where it could not be measured.
    """

    text: str
    sense: str
    bound: float
    measured: float | None

    @property
    def row(self) -> str:
        """Of the table."""
        if self.measured is None:
            return f"| {self.text} | at {self.sense} {self.bound:g} | - | {NOT_MEASURED} |"
        reached = self.measured >= self.bound if self.sense == "least" else self.measured <= self.bound
        verdict = "reached" if reached else "**missed**"
        return f"| {self.text} | at {self.sense} {self.bound:g} | {self.measured:.4g} | {verdict} |"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios, each taken within a round."""
    return spread([one / other for one, other in zip(ours, theirs, strict=True)])


def results_file(auto: str) -> Path:
    """Where the results of machines are kept on which the compute dtype is this one unless another is asked for."""
    return FOLDER / f"training-{auto}.json"


def goals_of_speed(results: Mapping[str, Any]) -> Iterator[Goal]:
    """How fast it is to be."""
    speed, ray = results["speed"], results["ray"]
    narrow = results["auto"] == "bfloat16"
    planned = PLANNED_BF16 if narrow else PLANNED
    for alone, as_float32 in ((planned, PLANNED), (OURS_BF16 if narrow else OURS, OURS)):
        text = f"tokens/s: {alone}, which `auto` is here, of {TRL}"
        yield Goal(text, "least", 2.0, ratios(speed[alone], speed[TRL])["median"])
        text = f"tokens/s: {as_float32}, of {TRL_F32}"
        yield Goal(text, "least", 1.5, ratios(speed[as_float32], speed[TRL_F32])["median"])
    measured = ratios(speed[planned], speed[UNSLOTH])["median"] if UNSLOTH in speed else None
    yield Goal(f"tokens/s: {planned}, of {UNSLOTH}", "least", 1.0, measured)
    text = "step time launched by Ray, of the loop's without"
    yield Goal(text, "most", 1.03, ratios(ray["with"], ray["without"])["median"])


def goals(results: Mapping[str, Any]) -> Iterator[Goal]:
    """What the training is to keep to."""
    yield from goals_of_speed(results)
    yield Goal("largest difference of the loss from TRL's", "most", 1e-3, difference(results["curve"], "trl"))
    for model in memory.MODELS:
        for stack in (memory.PLAIN, memory.PLAIN_PAGED):
            text = f"memory above the weights of {model}, less than {stack.name}, %"
            yield Goal(text, "least", 35, 100 * memory.saving(results["memory"], model, stack.name))
    yield Goal("padding waste with packing, %", "most", 3, results["padding_percent"])
    yield Goal("tokenization, of datasets' map with two processes", "least", 0.9, tokenization())
    rates = {row["name"]: row["measured"]["tokens_per_second"] for row in on_gpu()[1]}
    for peer, whose, bound in ((TRL_ON_GPU, "TRL's", 1.15), (UNSLOTH_ON_GPU, "Unsloth's", 1.0)):
        theirs = rates.get(peer)
        for how, row in PLANNED_ON_GPU.items():
            planned = rates.get(row)
            text = f"tokens/s on a GPU, as the planner would run it ({how}), of {whose}, 8B shape"
            yield Goal(text, "least", bound, planned / theirs if planned and theirs else None)


def tokenization() -> float | None:
    """The figure that `benchmarks.tokenization` left; None where it did not run."""
    if not TOKENIZATION.exists():
        return None
    return float(json.loads(TOKENIZATION.read_text(encoding="utf-8"))["median of that"][BATCHED])


def on_gpu() -> tuple[str, list[dict[str, Any]]]:
    """The rows of `make gpu` whose rate was measured, those of the newest file that has any, and what it was run on.

    `products`, in each of them, is the part of the step that its products would take at the rate that this card was
    measured to multiply at; None where that was not measured.
    """
    records = {path: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("gpu-*.json")}
    for path, record in sorted(records.items(), key=lambda one: str(one[1]["date"]), reverse=True):
        if rows := [row for row in record["rows"] if row["steps"] > 2 and row["status"] == "measured"]:
            device, versions = record["device"], record["versions"]
            rows = [{**row, "products": products_share(row, record)} for row in rows]
            installed = ", ".join(
                f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes")
            )
            return f"{device['name']}, {record['date'][:10]}, {installed} (`{path.name}`)", rows
    return "", []


def products_share(row: Mapping[str, Any], record: Mapping[str, Any]) -> float | None:
    """The part of a measured step that its 16-bit products and attention would take at the card's measured rate."""
    rates = measured_rates(record)
    if rates is None:
        return None
    device = Device("cuda", row["compute_dtype"], compute_capability=tuple(record["device"]["compute_capability"]))
    recipe, strategy = Recipe(**row["recipe"]), Strategy(**row["strategy"])
    done = load(find_model(row["model"]), recipe, strategy, device).work
    tokens = strategy.micro_batch * recipe.seq_len
    of_a_micro_batch = done.products * tokens + done.fixed + done.attention * tokens * recipe.seq_len
    seconds = strategy.gradient_accumulation * of_a_micro_batch / statistics.median(rates["products"].values())
    return float(seconds / row["measured"]["step_seconds"])


def gpu_table() -> list[str]:
    """Tokens a second on a GPU, ours and others'."""
    where, rows = on_gpu()
    if not rows:
        return ["On a GPU: not measured yet.", ""]
    lengths = sorted({row["recipe"]["seq_len"] for row in rows}, reverse=True)
    lines = [
        f"On a GPU, {where}; one run of each, rank 16, sequences of {' or '.join(f'{each:,}' for each in lengths)}, "
        "the median step without the first.",
        "Products: the part of a step that they would take at the rate at which the card was measured to multiply.",
        "",
        "| model | run | tokens/s | of TRL's | products | peak allocated, GiB |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    trl = {row["model"]: row["measured"]["tokens_per_second"] for row in rows if row["loop"] == "trl"}
    for row in rows:
        strategy, measured, model = row["strategy"], row["measured"], row["model"]
        kept = "checkpointed" if strategy["gradient_checkpointing"] else "all activations kept"
        length = f" of {row['recipe']['seq_len']:,}" if len(lengths) > 1 else ""
        how = f"{strategy['micro_batch']} at a time{length}, {kept}, {adapters_words(row['recipe'])}"
        name = f"{WHOSE[row['loop']]}: {how}"
        several = strategy["world_size"] > 1
        if several:
            name += f", on {strategy['world_size']} GPUs, ZeRO {strategy['zero_stage']}"
        rate = measured["tokens_per_second"]
        of_trl = f"{rate / trl[model]:.2f}" if model in trl and not several else "-"
        products = NOT_MEASURED if row["products"] is None else f"{row['products']:.2f}"
        peak = f"{measured['allocated_bytes'] / 2**30:.1f}"
        lines.append(f"| {model} | {name} | {rate:,.0f} | {of_trl} | {products} | {peak} |")
    return [*lines, ""]


def adapters_words(recipe: Mapping[str, Any]) -> str:
    """How a row's adapters are stored and computed."""
    return f"adapters {recipe['lora_dtype']}" + (" under autocast" if recipe["autocast"] else "")


def difference(curve: Mapping[str, Any], other: str) -> float:
    """The largest difference of our losses from another loop's over all steps."""
    return max(abs(float(one) - float(their)) for one, their in zip(curve["ours"], curve[other], strict=True))


def tables(results: Mapping[str, Any]) -> str:
    """The results as they stand in the document."""
    case, curve = results["case"], results["curve"]
    lines = [
        *where(results),
        f"The model: {case['layers']} layers of width {case['hidden']}, {case['vocabulary']} words, NF4 with double",
        f"quantization, rank {case['rank']}; {case['micro_batch']} x {case['seq_len']} tokens a step. As planned",
        "it keeps all activations, the others are checkpointed.",
        "",
        *goal_table(goals(results)),
        *speed_table(results),
        f"Loss of the same {len(curve['ours'])} steps of {case['micro_batch']} x {curve['seq_len']}, all in float32:",
        "",
        "| step | ours | TRL | bare loop |",
        "| ---: | ---: | ---: | ---: |",
        *(
            f"| {step + 1} | {curve['ours'][step]:.5f} | {curve['trl'][step]:.5f} | {curve['bare'][step]:.5f} |"
            for step in sorted({0, *range(9, len(curve["ours"]), 10), len(curve["ours"]) - 1})
        ),
        "",
        f"Largest difference over all steps: {difference(curve, 'trl'):.1e} from TRL, "
        f"{difference(curve, 'bare'):.1e} from the bare loop.",
        "",
        "| memory of a step | peak, MiB | above the weights, MiB | ours takes less by |",
        "| --- | ---: | ---: | ---: |",
        *(memory_row(row, results["memory"]) for row in results["memory"]),
        "",
        *gpu_table(),
    ]
    return "\n".join(lines)


def where(results: Mapping[str, Any]) -> list[str]:
    """What was measured on, and how often."""
    on = results["machine"]
    peers = (f"{name}'s environment: {listed(versions)}." for name, versions in results["peers"].items())
    return [
        f"Measured on {results['date']}: {on['processor']}, {on['cores']} cores, {on['system']}, load {on['load']}, on",
        f"which `auto` is {results['auto']};",
        f"{listed(results['versions'])}.",
        *peers,
        f"{results['rounds']} rounds; a figure is the median of {results['steps']} steps after the warm-up. A run of",
        "a peer's ends after two and a half minutes; where that is within the warm-up, all its steps but the first",
        "count.",
    ]


def goal_table(found: Iterable[Goal]) -> list[str]:
    """What was promised and what became of it, a line each."""
    return ["| goal | | measured | |", "| --- | --- | ---: | --- |", *(goal.row for goal in found), ""]


def speed_table(results: Mapping[str, Any]) -> list[str]:
    """Tokens a second of all loops, and the steps with and without Ray."""
    speed, ray = results["speed"], results["ray"]
    of_ray = ratios(ray["with"], ray["without"])
    turns = f"turns of each, {ray['date']}" if "date" in ray else "rounds of their own"
    return [
        f"| loop | tokens/s | of {TRL} | of {TRL_F32} | quartiles of these | peak, MiB |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
        *(speed_row(name, speed, results["peaks"]) for name in speed),
        "",
        f"Ray: {1000 * spread(ray['with'])['median']:.0f} ms a step launched by Ray, "
        f"{1000 * spread(ray['without'])['median']:.0f} ms without, in {len(ray['with'])} {turns}; "
        f"the ratio's quartiles are {of_ray['low']:.2f} and {of_ray['high']:.2f}.",
        "",
    ]


def elsewhere(results: Mapping[str, Any]) -> list[str]:
    """What of the results is another on another kind of CPU."""
    return [
        "### On the other kind of CPU",
        "",
        *where(results),
        "",
        *goal_table(goals_of_speed(results)),
        *speed_table(results),
    ]


def speed_row(name: str, speed: Mapping[str, Sequence[float]], peaks: Mapping[str, int]) -> str:
    """A loop's line: its tokens a second, alone and against TRL's, and where it was followed its memory."""
    cells = [name, f"{spread(speed[name])['median']:,.0f}"]
    quartiles = []
    for trl in (TRL, TRL_F32):
        found = ratios(speed[name], speed[trl])
        cells.append(f"{found['median']:.2f}x")
        quartiles.append(f"{found['low']:.2f} to {found['high']:.2f}")
    peak = f"{peaks[name] / 2**20:,.0f}" if name in peaks else "-"
    return f"| {' | '.join([*cells, ', '.join(quartiles), peak])} |"


def memory_row(row: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    """A stack's line."""
    less = "" if row["stack"] == memory.OURS.name else f"{memory.saving(rows, row['model'], row['stack']):.0%}"
    mib = (f"{row[key] / 2**20:,.0f}" for key in ("peak_bytes", "above_bytes"))
    return f"| {row['model']}: {row['stack']} | {' | '.join(mib)} | {less} |"


def current() -> str:
    """What the document is to show: the tables of the results that are written down, where there are any."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("training-*.json")]
    if not found:
        return f"{NOT_MEASURED.capitalize()}.\n"
    newest, *others = sorted(found, key=lambda results: str(results["date"]), reverse=True)
    return "\n".join([tables(newest), *(line for other in others for line in elsewhere(other))])


def write() -> None:
    """Put the tables into the document."""
    PLACE.write(current())
