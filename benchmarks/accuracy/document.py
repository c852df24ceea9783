"""docs/accuracy.md as text: every number in it is computed here from the measured data and the memory model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.accuracy import grid, paper, published, t4
from benchmarks.accuracy.explanations import OLDER_QUANTIZER, Far, far_rows, older_quantizer_is
from benchmarks.accuracy.rows import LATER, UNITS
from benchmarks.accuracy.stacks import STACKS, stack_of
from qlora_core.memory import formula, played
from qlora_core.memory.arrivals import DRAWS
from qlora_core.memory.estimate import GpuEstimate

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "accuracy.md"
PLOTS = DOCUMENT.with_suffix("")
RESULTS = ROOT / "benchmarks" / "results"
GIB = 1024**3

INTRODUCTION = """# How accurate the estimates are

Predicted against measured, for everything measured that could be found: forty training steps on a Tesla T4, the
numbers of QLoRA's paper, and the figures that projects publish about themselves. No number of the memory model is
fitted to any of them. Three yes-or-no facts were read off the T4's rows, for want of a document that states them: that
cudaMalloc's addresses fall, that the 16-bit models were loaded on the host, and that cuBLAS keeps a second workspace.
How far the formula's reserved memory may be off is taken from the traces below, not from measurements. `make accuracy`
writes this page and its plots anew; a test fails where the page is not what it writes.

Errors are in per cent of the measured figure; above zero the prediction is too high. GiB is 1024³ bytes, GB 1000³.
"""

PLANNERS = """What five other planners say of the same rows is in [planners.md](planners.md): the best of them, whose
constants are fitted to these rows, is 0.8 % off on allocated memory and 2.4 % on the process.
"""

ASSUMED = """### What was assumed

Of every row: bfloat16 compute, unless it says float16; the GPU it names, or an A100; samples as long as it says;
nothing empties the allocator's cache after loading. A figure is held against what it says it is: allocated, reserved,
or what nvidia-smi shows; where it says nothing, the last. Of each stack, read in its code or documents:

"""

FIGURES = ("allocated", "reserved", "process")
GPU_REMARKS = """Rows of [`make gpu`](gpu.md), each predicted before it was measured. One number changed after them: for
the process the H200 was taken to have a context of 512 MiB, the default then. What a process of these rows has beyond
its allocator is 742 to 760 MiB, which `clusters/gpus.yaml` has since.
"""

CPU = """## On a CPU

`tests/training/test_measured_ranks.py` runs real steps of a small model on one process, with DDP and with ZeRO 1 to 3,
and follows every tensor: the formula has to be within 2 % of each rank's peak. So it has with the optimizer or all
offloaded: on a CPU that stays in the same memory, and host and device are held to it together.

`tests/test_families.py` does the same on one process with each family that can be planned, 110 small configs, with
LoRA and with QLoRA under autocast, all activations kept: the trace has to be within 0.3 % of each phase's peak, and the
formula within 1 %, of ERNIE 4.5 and Qwen 3.5 within 2 %.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, _t4(), _grid(), _paper(), *_published(), _gpu(), CPU])


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: str = "") -> str:
    """A table in Markdown; `right` names the columns, counted from 0, that are numbers."""
    line = ["---:" if str(column) in right.split() else "---" for column in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, line, *rows)) + "\n"


# --- the T4 -----------------------------------------------------------------------------------------------------------


def _t4() -> str:
    models = {row.model for row in t4.t4_rows()}
    subsets: list[tuple[str, str, dict[str, str]]] = [(figure, figure, {}) for figure in t4.FIGURES]
    for figure in ("allocated", "reserved"):
        for shown, only in (
            ("NF4", {"quantization": "nf4"}),
            ("16 bit", {"quantization": "none"}),
            ("sdpa", {"attention": "sdpa"}),
            ("eager", {"attention": "eager"}),
        ):
            subsets.append((f"{figure}, {shown} only", figure, only))
    return f"""## Forty steps on a Tesla T4

Measured by the authors of fitcheck-llm: {len(models)} models, NF4 and 16 bit, sdpa and eager attention, the second step
of each. After loading, forward, backward and optimizer are peaks of allocated bytes in those phases. Mean and worst
absolute error in per cent. Process is reserved and the CUDA context, which the rows state (140.9 MiB) and no estimator
predicts: it is no second test. Played is the formula but for reserved memory, for which its own timeline is played to
the allocator ([planning.md](planning.md#three-ways-to-the-same-numbers)).

{_errors(t4.MEASURED, subsets)}
{_interval_words(t4.MEASURED)}

The quantized rows were loaded by four threads, as transformers 5.0 to 5.3 did, and no two such runs are alike. What is
predicted of them is the median of {DRAWS} random loadings (`qlora_core/memory/arrivals.py`), and the interval goes from
the least to the most of these, widened by what playing a step leaves open. How long a weight takes is known in the mean
only. That it is distributed exponentially is an assumption, which the rows do not bear out: loadings of one model are
more alike than it says (three runs of SmolLM2-1.7B differ by 12 and 20 MiB of reserved memory, the draws by hundreds),
and the least run ahead fits TinyLlama's memory after loading better. So these intervals are too wide rather than too
narrow. Neither our own training nor transformers since 5.4 loads so.

The rows' authors say of their forty that transformers was 5.17 and peft 0.20: that has no such threads, and empties the
cache after loading, and of both the rows show the contrary. They are taken to be of the versions that the same authors
state of all their other runs: 5.0.0 and 0.19.1.

{PLANNERS}
![Predicted against measured peaks on the T4](accuracy/t4.svg)

### Twelve steps that were looked up later

The same authors hold twelve steps out of their own fit: six models, NF4, rank 16 on the attention's projections, 1 x
1024 (`tests/data/measured/t4_later.json`). They were looked up when the estimators were done, and no number was changed
for them. Of allocated memory they say what the forty do. Of reserved memory the goals for those (a mean of 2.5 % and
8 % at worst by the formula, 1.2 % and 4 % by the trace) are missed here: all twelve were loaded by threads. The
formula's interval leaves out that loading is random.

{_errors(t4.LATER, [(figure, figure, {}) for figure in t4.FIGURES])}
{_interval_words(t4.LATER)}
"""


def _errors(file: Path, subsets: Sequence[tuple[str, str, dict[str, str]]]) -> str:
    """Mean and worst errors of the estimators: a name, a figure and facts of the rows that count, for each line."""
    estimators = {"formula": t4.by_formula(file), "played": t4.by_playing(file)}
    if (traced := t4.by_trace(file)) is not None:
        estimators["trace"] = traced
    head = ["peak", *(f"{name}, {what}" for name in estimators for what in ("mean", "worst"))]
    rows = []
    for shown, figure, only in subsets:
        errors = (error for said in estimators.values() for error in t4.error_of(said, figure, file, **only))
        rows.append([shown, *(f"{error:.2f}" for error in errors)])
    return table(head, rows, "1 2 3 4 5 6")


def _interval_words(file: Path) -> str:
    """What the intervals of reserved memory hold of some rows."""
    rows = []
    for name, estimator in (("formula", formula.estimate), ("played", played.estimate)):
        for shown, only in (("all", None), ("NF4", "nf4"), ("16 bit", "none")):
            inside, of, width = t4.by_interval(estimator, file, only)
            if of:
                rows.append([f"{name}, {shown}", f"{inside} of {of}", f"{width:.1f}"])
    head = ["interval of reserved memory", "holds", "width in the median, %"]
    return f"""{table(head, rows, "1 2")}
It is meant for nine cases of ten."""


# --- the two estimators ----------------------------------------------------------------------------------------------


def _grid() -> str:
    if not grid.all_rows():
        return "## The formula against the trace\n\nNot traced yet: `python -m benchmarks.accuracy --grid`.\n"
    usual, further = grid.usual(), grid.further()
    far = [
        [f"`{row.combination}`", f"{error:+z.1f}"]
        for row in grid.all_rows()
        if abs(error := _errors_beside_trace([(row.closed, row.traced)], "allocated")[0]) > 100 * usual.tolerance
    ]
    playable = sum(row.played is not None for row in grid.all_rows())
    return f"""## The formula against the trace

{len(usual.combinations)} recipes drawn once for {len(grid.MODELS)} models: ranks 8 to 128, micro-batches 1 to 8,
256 to 8192 tokens, with and without checkpointing and autocast, both attentions, both losses, all optimizers, an A100
and a T4. The formula in per cent of the trace:

{_beside_trace(usual.rows())}
{len(further.combinations)} more, nearly all with something of which those have nothing: all weights trained, DoRA,
LoRA+, two ranks with DDP, two and four micro-batches to a step; up to {grid.FURTHER_TOKENS} tokens:

{_beside_trace(further.rows())}
The intervals are taken from all of these. Taken from the other models' traces alone, the formula's holds
{grid.held_out()} of {len(grid.all_rows())}, and the played {grid.held_out_played()} of {playable}. Not played are those
whose layers keep unlike activations, and several chunks of a trained head's loss. If a block of 8 MiB breaks one of a
gigabyte hangs on the order of all that came before, which a closed form does not follow. What is left where it is
followed is chance of the same kind: one block that finds room in one order of events and not in another, and sometimes
it is a large one. Lengths here are powers of two; of others, where a trained head's last chunk is small, less is known.

Allocated memory beyond {100 * usual.tolerance:.0f} %, where blocks of a few MiB, which all layers keep, are handed out
larger than they were asked for in an order that a closed form does not follow:

{table(["combination", "error"], far, "1") if far else "none"}
"""


Said = Sequence[tuple[GpuEstimate, dict[str, int]]]
"""What an estimator says, and the trace's figures of the same."""


def _beside_trace(rows: Sequence[grid.Row]) -> str:
    """Both tables of a grid: errors beside the trace, and how often an interval holds."""
    closed: Said = [(row.closed, row.traced) for row in rows]
    as_played: Said = [(row.played, row.traced) for row in rows if row.played is not None]
    lines = [[figure.replace("_", " "), *_spread(_errors_beside_trace(closed, figure))] for figure in grid.FIGURES]
    after_reserved = grid.FIGURES.index("reserved") + 1
    lines.insert(after_reserved, ["reserved, played", *_spread(_errors_beside_trace(as_played, "reserved"))])
    held = []
    for name, said in (("formula", closed), ("played", as_played)):
        intervals = [(gpu.reserved_interval, traced["reserved"]) for gpu, traced in said]
        inside = sum(low <= traced <= high for (low, high), traced in intervals)
        width = 100 * median((high - low) / traced for (low, high), traced in intervals)
        held.append([name, f"{inside} of {len(said)}", f"{width:.1f}"])
    return f"""{table(["figure", "median", "nine of ten within", "worst", "mean, signed"], lines, "1 2 3 4")}
{table(["interval of reserved memory", "holds", "width in the median, %"], held, "1 2")}"""


def _errors_beside_trace(said: Said, figure: str) -> list[float]:
    """In per cent of the trace."""
    return [100 * (grid.figures(gpu)[figure] / traced[figure] - 1) for gpu, traced in said]


def _spread(errors: Sequence[float]) -> list[str]:
    """The median error and what nine of ten are within, as sizes; the worst and the mean, signed."""
    sizes = sorted(map(abs, errors))
    cells = (median(sizes), sizes[len(sizes) * 9 // 10], max(errors, key=abs), fmean(errors))
    return [f"{cell:.2f}" for cell in cells]


# --- the paper --------------------------------------------------------------------------------------------------------


def _paper() -> str:
    rows = []
    for number in paper.paper_numbers():
        sizes = (number.weights, number.unpaged, number.paged)
        cells = [f"{size / 1e9:.1f} ({number.error(size):+z.0f} %)" for size in sizes]
        rows.append([number.model, f"{number.bits} bit", f"{number.gigabytes:g}", *cells])
    head = ["model", "base", "the paper", "weights alone", "step, state on the GPU", "step, state paged out"]
    return f"""## The numbers of the paper

QLoRA (arXiv 2305.14314) states the memory of its models in GB. A training step of the paper's recipe explains them all:
NF4 with double quantization (or a 16-bit base), rank 64 on all linear layers, one sequence of 512 tokens, gradient
checkpointing, the stock loss, bfloat16 compute. Two variants are shown: adapters and AdamW's moments in bfloat16 on
the GPU, and float32 adapters with paged moments, which allocated memory does not count. The paper's 16-bit numbers are
those of the weights alone, and a LoRA step on them is within {paper.TOLERANCE:.0f} % too. GB:

{table(head, rows, "2 3 4 5")}
`tests/test_published.py` fails where a step is more than {paper.TOLERANCE:.0f} % off.
"""


# --- published figures ------------------------------------------------------------------------------------------------


def _published() -> list[str]:
    scored, listed = published.scored(), published.listed()
    sizes = [abs(one.error) for one in scored]
    within = [sum(size <= limit for size in sizes) for limit in (5, 10, 15)]
    stated = [abs(one.error) for one in scored if _tier_is_stated(one)]
    summary = f"""## Published figures

`tests/data/measured/published.csv` holds {len(scored) + len(listed)} figures from projects' own documents.
{len(scored)} are predicted, {len(listed)} are [not scored](#rows-that-are-not-scored). What a row leaves out is its
stack's default at that version, written down once for each stack [below](#what-was-assumed), and never chosen row by
row.

**Median error {median(sizes):.1f} %**; {within[0]} rows are within 5 %, {within[1]} within 10 %, {within[2]} within
15 %, {len(scored) - within[2]} beyond; {_how_many_are_explained()}. Figures that do
not say what of memory they are ("uses about", "unclear") leave a choice: without those
{len(scored) - len(stated)} rows the median is {median(stated):.1f} %, and with axolotl's taken as reserved instead of
allocated it is {_median_with_axolotl_reserved():.1f} %.

![Predicted against published figures](accuracy/published.svg)

![Distribution of the errors](accuracy/published_errors.svg)

{_by_stack()}"""
    return [summary, _far(), _all_rows(), _later(), _assumptions(), _fits(), _listed()]


def _tier_is_stated(one: published.Scored) -> bool:
    """Whether the row says of itself what of memory it measured."""
    how = one.row.how_measured
    return not any(vague in how for vague in ("uses about", "unclear", "not stated"))


def _median_with_axolotl_reserved() -> float:
    errors = []
    for one in published.scored():
        asked = published.request_of(one.row, one.stack)
        if one.stack.name == "axolotl":
            said = published.predicted_bytes(replace(asked, tier="reserved"), one.stack)
            errors.append(abs(100 * (said / one.row.measured_bytes - 1)))
        else:
            errors.append(abs(one.error))
    return median(errors)


def _by_stack() -> str:
    groups: dict[str, list[float]] = {}
    for one in published.scored():
        name = one.stack.name
        if name == "LitGPT":
            name += ", 16 bit" if one.row.quantization == "bf16" else ", 4 bit"
        groups.setdefault(name, []).append(one.error)
    rows = [[name, str(len(errors)), *_shown(errors)] for name, errors in groups.items()]
    return table(["stack", "rows", "median error", "mean, signed", "worst"], rows, "1 2 3 4")


def _shown(errors: Sequence[float]) -> list[str]:
    """Median of the absolute errors, mean, and the worst."""
    return [f"{median(map(abs, errors)):.1f}", f"{fmean(errors):+z.1f}", f"{max(errors, key=abs):+z.1f}"]


def _how_many_are_explained() -> str:
    answers = [_is_explained(far) for far in far_rows()]
    said = {
        "yes": "of these are explained",
        "contradicted": "contradicted by its own recipe",
        "in part": "only in part",
    }
    return ", ".join(f"{answers.count(answer)} {words}" for answer, words in said.items() if answer in answers)


def _is_explained(far: Far) -> str:
    if far.explanation is not None and far.explanation.impossible:
        return "contradicted"
    return "yes" if far.is_explained else "in part"


def _far() -> str:
    rows = []
    for far in far_rows():
        kind, text = (far.explanation.kind, far.explanation.text) if far.explanation else ("none", "")
        rows.append([far.scored.row.id, f"{far.scored.error:+z.1f}", _is_explained(far), kind, text])
    limit = f"{published.TOLERANCE:.0f} %"
    return f"""### Beyond {limit}, and why

A row counts as explained where its reason, counted in bytes, leaves at most {limit}, and else as explained in part; its
figure is contradicted where what its own recipe allocates for certain is more than {limit} above it.

*{OLDER_QUANTIZER}*: {older_quantizer_is()}

{table(["row", "error", "explained", "reason", "what happened"], rows, "1")}"""


def _all_rows() -> str:
    return f"""### All rows that are scored

{_rows(published.scored())}"""


def _later() -> str:
    later = published.scored(LATER)
    return f"""### Rows that were looked up later

`tests/data/measured/later.csv` holds what peft's method comparison measured and the file above lacks. It was looked up
in November 2026, when the memory model was done, and nothing was changed for it. Median error
{median(abs(one.error) for one in later):.1f} %.

{_rows(later)}"""


def _rows(scored: Sequence[published.Scored]) -> str:
    rows = []
    for one in scored:
        size = UNITS[one.row.unit]
        unit = one.row.unit.split()[0]
        rows.append(
            [one.row.id, one.tier, f"{one.row.stated} {unit}", f"{one.predicted / size:.2f}", f"{one.error:+z.1f}"]
        )
    return table(["row", "what it is", "published", "predicted", "error"], rows, "2 3 4")


def _assumptions() -> str:
    used = {one.stack.name for one in published.scored()} | {
        stack.name for fit in published.fits() if (stack := stack_of(fit.row.id))
    }
    parts = [
        f"**{stack.name}**\n\n" + "".join(f"- {assumption}\n" for assumption in stack.assumptions)
        for stack in STACKS
        if stack.name in used
    ]
    return ASSUMED + "\n".join(parts)


def _fits() -> str:
    rows = [
        [
            fit.row.id,
            "fits" if fit.stated else "out of memory",
            "fits" if fit.predicted else "out of memory",
            f"{fit.predicted_bytes / GIB:.1f} of {fit.usable_bytes / GIB:.1f}",
            "too near to say" if fit.open else "yes" if fit.stated == fit.predicted else "**no**",
        ]
        for fit in published.fits()
    ]
    right = sum(fit.open or fit.stated == fit.predicted for fit in published.fits())
    return f"""### Fits or not

Rows that state no figure, only whether a run fits a Tesla T4. {right} of {len(rows)} agree. They are of 2023, when
bitsandbytes kept the inputs of 4-bit layers (see above), which brings the 7B row that disagrees to within 3 % of the
limit. The 13B row is not explained.

{table(["row", "stated", "predicted", "process, GiB", "agrees"], rows, "3")}"""


def _listed() -> str:
    groups: dict[tuple[str, str], list[str]] = {}
    for one in published.listed():
        groups.setdefault((one.kind, one.reason), []).append(one.row.id)
    counts = Counter(one.kind for one in published.listed())
    rows = [
        [f"{kind} ({counts[kind]})", reason, ", ".join(ids)]
        for (kind, reason), ids in sorted(groups.items(), key=lambda group: -counts[group[0][0]])
    ]
    return f"""### Rows that are not scored

{table(["why", "in particular", "rows"], rows)}"""


# --- GPUs -------------------------------------------------------------------------------------------------------------


def _gpu() -> str:
    """The results of `make gpu`, where there are any."""
    parts = []
    for path in sorted(RESULTS.glob("gpu-*.json")):
        record = json.loads(path.read_text())
        measured = [row for row in record["rows"] if row["status"] == "measured" and row["predicted"]]
        if record.get("dry") or not measured:
            continue
        scores = []
        for figure in FIGURES:
            for estimator in ("formula", "trace"):
                errors = [row["errors_percent"].get(estimator, {}).get(figure) for row in measured]
                known = [abs(error) for error in errors if error is not None]
                if known:
                    scores.append([figure, estimator, str(len(known)), f"{fmean(known):.2f}", f"{max(known):.2f}"])
        rows = [[row["name"], row["model"], *_gpu_cells(row)] for row in measured]
        held = sum(_held(row) for row in measured)
        head = ["row", "model", *(cell for figure in FIGURES for cell in (f"{figure}, GiB", "formula", "trace"))]
        right = " ".join(map(str, range(2, len(head))))
        parts.append(
            f"{record['device']['name']}, {record['date'][:10]}, torch {record['versions']['torch']} (`{path.name}`). "
            f"Errors are in per cent of what was\nmeasured. The formula's interval of reserved memory holds {held} of "
            f"{len(measured)} rows.\n\n"
            f"{table(['peak', 'estimator', 'rows', 'mean', 'worst'], scores, '2 3 4')}\n{table(head, rows, right)}"
        )
    return f"## On GPUs\n\n{GPU_REMARKS}\n" + ("\n".join(parts) or "Not measured yet.\n")


def _held(row: Mapping[str, Any]) -> bool:
    low, high = row["predicted"]["formula"]["reserved_interval"]
    return bool(low <= row["measured"]["reserved_bytes"] <= high)


def _gpu_cells(row: Mapping[str, Any]) -> list[str]:
    cells = []
    for figure in FIGURES:
        cells.append(f"{row['measured'][f'{figure}_bytes'] / 2**30:.2f}")
        errors = [row["errors_percent"].get(estimator, {}).get(figure) for estimator in ("formula", "trace")]
        cells += ["-" if error is None else f"{error:+z.1f}" for error in errors]
    return cells
