"""docs/step-time.md as text: the step-time model, and its predictions beside published figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from benchmarks.accuracy import throughput
from benchmarks.accuracy.document import RESULTS, ROOT, table
from benchmarks.accuracy.stacks import STACKS
from benchmarks.accuracy.throughput import Timed
from benchmarks.gpu.achieved import achieved, measured_rates
from clusters.gpu import Gpu, find_gpu
from orchestrator.devices import any_nodes, pool_target, rates
from qlora_core import step_time
from qlora_core.catalogue import find_model
from qlora_core.recipe import Recipe
from qlora_core.step_time import Range, StepTime, achieved_by
from qlora_core.strategy import Strategy

DOCUMENT = ROOT / "docs" / "step-time.md"
PLOTS = DOCUMENT.with_suffix("")

INTRODUCTION = """# How long a step takes

A plan's step time is a roofline: what a step computes and moves, over what a GPU computes and moves in a second. What
is achieved of each rate is a range with a source, so the answer is an interval and never a bare number: its low end
is the step if everything is achieved at the fast end, its high end if everything is at the slow end. No range is
fitted to the rows below; but [some are not independent of them](#what-the-rows-found). `make accuracy` writes this
page; a test fails where it is not what it writes.

## The model

A rank runs kernels one after another, so their times add up. Of one micro-batch of B sequences of S tokens:

- **products**: 2 operations a token, weight and pass, over the tensor cores' rate; or the bytes that these products
  read and write over the memory's rate, if that takes longer. Passes: forward, the input's gradient, the weight's
  gradient if it is trained, recomputation; the chunked loss recomputes a head that is trained.
- **adapters**: products in float32, over the CUDA cores' float32 rate: TF32 is off unless somebody allows it.
- **attention**: 4 x heads x head size x layers operations a token and position; forward 1, backward 2.5 (fused) or 2,
  recomputation 1; half of that where the kernel skips what is above the diagonal.
- **memory**: every other kernel reads and writes the bytes of the tensors that it makes. They are read off the tape
  that the memory formula runs ([planning.md](planning.md)), line by line what transformers, peft and bitsandbytes do.
- **dequantization**: the 16-bit weights that are made of 4-bit ones, forward, backward and in recomputation.
- **starting**: kernels over what a processor starts in a second, as far as that is longer than all of the above.

An optimizer step is as many micro-batches as are accumulated, the sums of their gradients, and:

- **exchange**: rings, in which (n - 1)/n of all bytes pass each connection. DDP and ZeRO-1: gradients twice a step.
  ZeRO-2: gradients every micro-batch, weights once a step. ZeRO-3: gradients once and weights twice every micro-batch.
  Less what computing hides.
- **host**: what is fetched from the host and written back under offload, AdamW on the host, paged state that found no
  room.
- **optimizer**: what clipping and AdamW read and write, in the dtype of what is trained; or starting their kernels.

`qlora_core/work.py` counts, `qlora_core/step_time.py` times, `orchestrator/devices.py` has a GPU's rates.

## What is achieved of each rate

"""

SOURCES: tuple[tuple[str, str, Range, str], ...] = (
    ("float32 products", "CUDA cores", step_time.WIDE_PRODUCTS, "ours"),
    ("memory", "bandwidth", step_time.MEMORY, "H100 NVL 0.78 to 0.84 (BabelStream 5.0), V100 0.87, A100 0.75, T4 0.75"),
    (
        "4-bit dequantization",
        "bandwidth",
        step_time.DEQUANTIZING,
        "0.28 from LitGPT's 4-bit and 16-bit runs, times 1.36 to 2.07 since (bitsandbytes pull request 1747)",
    ),
    ("NVLink", "one direction", step_time.NVLINK, "0.78 on 8 A100, 0.82 on 8 H200 (stas00/ml-engineering)"),
    (
        "GPUs over PCIe",
        "one direction",
        step_time.PCIE_RING,
        "0.45 to 0.55 on RTX 5090 (NVIDIA/nccl issue 1639); a tenth on boards with few lanes (fsdp_qlora's RTX 3090)",
    ),
    ("network", "of a node", step_time.NETWORK, "0.31 untuned RoCE (CCI-MOC/roce-testing), 0.74 EFA (ml-engineering)"),
    ("PCIe to the host", "one direction", step_time.PCIE, "0.82 A100 (jdh4/della-gpu-A100), 0.88 H200 (nvbandwidth)"),
    ("managed memory", "one direction", step_time.MANAGED, '"half or worse" (bitsandbytes, optimizers.mdx)'),
    (
        "kernels started",
        "a second",
        step_time.STARTED_PER_SECOND,
        "11 microseconds each forward on a B200's host (ml-engineering), 5 to 25 elsewhere",
    ),
    ("the host's AdamW", "elements a second", step_time.HOST_ADAM, "at least 1e9 (DeepSpeed issue 7474)"),
    ("exchange hidden", "of it", step_time.OVERLAP, "from none to all, for want of a measurement"),
)
"""What is achieved, of what, and the source in short; the constants' docstrings have it in full."""

BY_CAPABILITY = """Products and fused attention depend on the GPU's generation. The fast end of products is the best
large product that somebody measured; the slow end is what whole training runs reach with all else included; typical is
in between, and ours. T4: it sustains 0.37 under its 70 W (NVIDIA, forum thread 264462). Attention: FlashAttention-2's
own charts for A100 and H100; other generations are taken to be alike. The constants' docstrings have all sources.

"""

FINDINGS = """## What the rows found

They were used to look for terms that were missing or counted twice, and so they are no test of a model that never saw
them. Before the changes 40 of 57 lay inside, with a median error of 17 %. Each was changed for all rows at once:

- AdamW's traffic was counted for float32, whatever is trained: twice too much for a model in bfloat16.
- What a product of the base model or the head writes was counted as another kernel's traffic, too.
- Gradients that autograd adds in place, and those that accumulation adds to earlier ones, were not counted.
- Recomputation stops at the last tensor that was saved: a layer's last product is not made again unless it has an
  adapter or something behind it saves.
- A product of few tokens takes at least as long as reading its weights.
- ZeRO-3 with full fine-tuning gathered its weights as base weights and again as trained ones.
- Sliding-window attention under a mask is a fused kernel, too, which skips nothing.

Three ranges share a source with rows. The 11 microseconds of a kernel are from the forward pass of ml-engineering's
benchmark, whose training steps are two of the rows; the slow end of a B200's products, 0.38, was read off one of these
two. The slow end of GPUs over PCIe was derived from FSDP rows of fsdp_qlora's two RTX 3090, which are not predicted,
while that machine's two DDP rows are.
"""

FAR = {
    "canifinetune": "The published figures are means of two or three steps, the first, cold one among them, under "
    "Windows on a card that draws the screen: the shorter the step, the longer beside ours.",
    "fsdp_qlora": "The RTX 4090 did better than our fast end.",
    "LLaMA-Factory": "Rows of 16,384 and 32,768 tokens are faster than ours. The document does not say that samples "
    "filled these lengths, and its throughput rises up to 16,384, while attention's work for each token grows.",
    "Qwen": "Micro-batches of 256 to 2,048 tokens are slower than ours. A product of so few rows does not fill the "
    "GPU's multiprocessors (the model has one efficiency for all sizes), and peft's modules cost Python time. The rows "
    "of full fine-tuning hardly change from 256 to 2,048 tokens: DeepSpeed's hooks around modules are not counted.",
}
"""Why rows lie outside their interval, as far as it can be told from their documents: guesses, none of them tried."""

HELD_AGAINST = """## What it was never held against

T4, L4, V100 and H100 (the H100 rows that exist are of FP8, of Triton kernels or of FSDP); fp4 and int8; eager
attention; mixture-of-experts models; ZeRO-1 and ZeRO-2; any offload; paged state that was really paged out; two nodes
or more; a CPU. Of ZeRO-3 there are rows of one model family on one kind of GPU, of DDP rows of one stack. A prediction
for any of these rests on the formula alone.

Not in the model: products that are too small to fill a GPU, DeepSpeed's hooks, the data loader, evaluation and
checkpoints, thermal limits, one rank waiting for another. They all make a step longer.
"""


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION + _ranges(), _scores(), FINDINGS, _outside(), _on_gpu(), _rows(), _assumptions(), _listed()]
    return "\n".join([*parts, HELD_AGAINST])


def _cells(achieved: Range) -> list[str]:
    return [f"{share:,.0f}" if share >= 1000 else f"{share:.2f}" for share in achieved]


def _ranges() -> str:
    head = ["what", "of", "slow", "typical", "fast", "source"]
    rates = [[what, of, *_cells(achieved), source] for what, of, achieved, source in SOURCES]
    by_capability = [
        [f"{major}.{minor}", what, *_cells(achieved)]
        for what, known in (("products", step_time.PRODUCTS), ("attention", step_time.ATTENTION))
        for (major, minor), achieved in known.items()
    ]
    generations = table(["compute capability from", "what", "slow", "typical", "fast"], by_capability, "2 3 4")
    return table(head, rates, "2 3 4") + "\n" + BY_CAPABILITY + generations


def _scores() -> str:
    timed, listed = throughput.timed(), throughput.listed()
    sizes = [abs(one.error) for one in timed]
    inside = sum(one.inside for one in timed)
    width = median(one.predicted.high / one.predicted.low for one in timed)
    groups: dict[str, list[Timed]] = {}
    for one in timed:
        groups.setdefault(one.stack.name, []).append(one)
    rows = [[name, *_summary(members)] for name, members in groups.items()]
    lengths = [
        [f"{low:,} to {high:,}", *_summary(members)]
        for low, high in ((1, 1023), (1024, 2047), (2048, 1 << 20))
        if (members := [one for one in timed if low <= int(one.row["micro_batch"]) * int(one.row["seq_len"]) <= high])
    ]
    lengths[-1][0] = "2,048 and more"
    head = ["rows", "inside", "median error", "mean, signed"]
    return f"""## Predictions beside published figures

`tests/data/measured/throughput.csv` holds {len(timed) + len(listed)} figures from projects' own documents, of which
{len(timed)} are predicted and {len(listed)} [are not](#rows-that-are-not-predicted). What a row leaves out is its
stack's default, written down once for each stack [below](#what-was-assumed).

**{inside} of {len(timed)} lie inside the interval; the median error of the expected time is {median(sizes):.0f} %.**
In the median the interval's high end is {width:.1f} times its low end. Errors are in per cent of the published time;
above zero the prediction is too long. Many rows are of one stack and one GPU: they are no {len(timed)} independent
tests.

{table(["stack", *head], rows, "1 2 3 4")}
By the tokens of a micro-batch:

{table(["tokens", *head], lengths, "1 2 3 4")}
![Predicted against published seconds of a step](step-time/published.svg)
"""


def _summary(members: Sequence[Timed]) -> list[str]:
    errors = [one.error for one in members]
    inside = sum(one.inside for one in members)
    return [str(len(members)), str(inside), f"{median(map(abs, errors)):.0f}", f"{fmean(errors):+z.0f}"]


def _outside() -> str:
    rows = []
    for name, text in FAR.items():
        members = [one for one in throughput.timed() if one.stack.name == name and not one.inside]
        rows.append([name, str(len(members)), text])
    return f"""## Outside the interval

Why, as far as the documents tell; none of it was tried.

{table(["stack", "rows", "what may have happened"], rows, "1")}"""


def _on_gpu() -> str:
    """The rows of `make gpu` with enough steps for a rate."""
    parts = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        gpu = replace(find_gpu(record["device"]["name"]), achieved=())  # what was measured here is no prediction
        rows = []
        for row in record["rows"]:
            if row["status"] != "measured" or row["steps"] <= 2:
                continue
            said = expected(row, gpu)
            seconds = row["measured"]["step_seconds"]
            rows.append(
                [
                    row["name"],
                    _seconds(seconds),
                    _seconds(said.seconds),
                    f"{_seconds(said.low)} to {_seconds(said.high)}",
                    "yes" if said.low <= seconds <= said.high else "**no**",
                    f"{100 * (said.seconds / seconds - 1):+z.0f}",
                ]
            )
        head = ["row", "measured, s", "expected, s", "interval, s", "inside", "error"]
        if rows:
            where = f"{record['device']['name']}, {record['date'][:10]} (`{path.name}`):"
            parts.append(f"{where}\n\n{table(head, rows, '1 2 3 5')}\n{_rates(record, gpu)}")
    return f"""## Measured by ourselves

No range above was changed after these rows. Rows of `make gpu` that make two steps only are left out: the second is not
warm yet.

{"".join(parts) or "Not measured yet."}"""


def achieved_rows(record: Mapping[str, Any], gpu: Gpu) -> list[list[str]]:
    """What a GPU was measured to achieve of each rate, beside what is taken where nothing was measured."""
    nominal = rates(pool_target(any_nodes(gpu, 1), record["rates"]["compute_dtype"], 1))
    taken = achieved_by(gpu.compute_capability)
    return [[what, *_cells(each), *_cells(getattr(taken, what))] for what, each in achieved(record, nominal).items()]


def _rates(record: Mapping[str, Any], gpu: Gpu) -> str:
    if measured_rates(record) is None:
        return "What it achieves of each rate: not measured yet.\n"
    rows = achieved_rows(record, gpu)
    head = ["what", *(f"{end}, {whose}" for whose in ("measured", "taken before") for end in Range._fields)]
    return f"What it achieves of each rate:\n\n{table(head, rows, '1 2 3 4 5 6')}"


def expected(row: Mapping[str, Any], gpu: Gpu) -> StepTime:
    """The step time of a row of `make gpu`."""
    strategy = Strategy(**row["strategy"])
    recipe = Recipe(**row["recipe"])
    target = pool_target(any_nodes(gpu, strategy.world_size), "auto", strategy.world_size)
    device = replace(target.device, plain_autocast=row["loop"] == "trl")
    return step_time.step_time(find_model(row["model"]), recipe, strategy, device, rates(target))


def _rows() -> str:
    rows = []
    for one in throughput.timed():
        said = one.predicted
        name, seconds = max(said.parts._asdict().items(), key=lambda part: part[1])
        rows.append(
            [
                one.row["id"],
                _seconds(one.measured),
                _seconds(said.seconds),
                f"{_seconds(said.low)} to {_seconds(said.high)}",
                "yes" if one.inside else "**no**",
                f"{one.error:+z.0f}",
                f"{name} {100 * seconds / said.seconds:.0f} %",
            ]
        )
    head = ["row", "published, s", "expected, s", "interval, s", "inside", "error", "most of it"]
    return f"""## All rows that are predicted

{table(head, rows, "1 2 3 5")}"""


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def _assumptions() -> str:
    used = {one.stack.name for one in throughput.timed()}
    parts = [
        f"**{stack.name}**\n\n" + "".join(f"- {assumption}\n" for assumption in stack.assumptions)
        for stack in STACKS
        if stack.name in used
    ]
    return f"""## What was assumed

Of every row: the GPUs of one machine, bfloat16, samples as long as the row says, no evaluation. Gradient checkpointing
where a row is silent: {" and ".join(throughput.CHECKPOINTING_BY_DEFAULT)} use it. What concerns memory only is left in:
these are the same stacks as in [accuracy.md](accuracy.md).

""" + "\n".join(parts)


def _listed() -> str:
    groups: dict[tuple[str, str], list[str]] = {}
    for one in throughput.listed():
        groups.setdefault((one.kind, one.reason), []).append(one.row["id"])
    counts = Counter(one.kind for one in throughput.listed())
    rows = [
        [f"{kind} ({counts[kind]})", reason, ", ".join(ids)]
        for (kind, reason), ids in sorted(groups.items(), key=lambda group: -counts[group[0][0]])
    ]
    return f"""## Rows that are not predicted

{table(["why", "in particular", "rows"], rows)}"""
