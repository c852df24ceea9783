"""A plan and a run on one screen of the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clusters.gpu import GIB, MIB
from launch import command
from launch.listing import parameters
from launch.report.components import COMPONENT_TITLES
from launch.report.words import echo, error, gib, price_range, time_range
from orchestrator.plans import Duration, Plan, Verdict
from qlora_core.architecture import ModelArchitecture
from qlora_core.step_time import StepTime

if TYPE_CHECKING:
    from launch.sweep import Sweep

BAR_WIDTH = 24


@dataclass(frozen=True, slots=True)
class Bar:
    """A share of a whole as a bar, in plain letters where the terminal has no others."""

    share: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        mark = "#" if options.ascii_only else "█"
        yield Text(mark * round(self.share * BAR_WIDTH), style="cyan")

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, round(self.share * BAR_WIDTH))


def print_plan(plan: Plan, *, explained: bool = False, swept: Sweep | None = None, err: bool = False) -> None:
    """Print a plan to stdout, or with `err` to stderr; its warnings to stderr."""
    for warning in plan.warnings:
        command.warn(warning)
    echo(*screen(plan, swept), *(_explanation(plan) if explained else ()), err=err)


def _explanation(plan: Plan) -> Iterator[RenderableType]:
    """Where every gigabyte goes."""
    from launch.report.explain import explain  # late: few ask for it

    for section in explain(plan):
        yield Text(f"\n{section.title}", style="bold")
        for line in section.lines:
            yield Padding(Text(line), (0, 0, 0, 2))


def plan_screen(plan: Plan) -> RenderableType:
    """A plan and its warnings, for a run's display."""
    return Group(*screen(plan), *(Text(f"warning: {warning}", style="yellow") for warning in plan.warnings))


def screen(plan: Plan, swept: Sweep | None = None) -> Iterator[RenderableType]:
    """A plan: the verdict first, then what was asked, where the memory goes, and what it fits on."""
    yield verdict_line(plan)
    yield Text()
    yield request_table(plan)
    yield Text(f"\nAt the peak, {plan.estimate.gpu.peak_moment}", style="italic")
    yield memory_table(plan)
    yield Text("\nFits on (sizes in GiB; what is largest and longest fits as likely as not)", style="italic")
    yield verdicts_table(plan)
    if plan.alternatives:
        from launch.report.alternatives import alternatives_table, title_of

        yield Text(f"\n{title_of(plan)}", style="italic")
        yield alternatives_table(plan)
    if swept is not None:
        from launch.report.sweep import sweep_tables

        yield from sweep_tables(swept, plan)


def verdict_line(plan: Plan) -> Text:
    """Whether it fits, on what, with what to spare."""
    name, host = plan.architecture.name, plan.estimate.host
    shown = plan.verdict
    count = (
        f"{plan.strategy.world_size} x " if plan.strategy.world_size > 1 and plan.target.device.kind == "cuda" else ""
    )
    others = [] if plan.group else [one.gpu for one in plan.verdicts if one.fits and one is not shown]
    if shown.headroom_bytes >= 0:
        text = f"{name} on {plan.group or count + shown.gpu}, {gib(shown.headroom_bytes)} to spare"
    else:
        text = f"{name} on {count}{shown.gpu}, {gib(-shown.headroom_bytes)} short{' on each' if count else ''}"
    if plan.host_fits is False and plan.host_usable_bytes is not None:
        text += f"; its host needs {gib(host.most_bytes)} of memory and has {gib(plan.host_usable_bytes)}"
    if others:
        text += f"; it fits on {count}{others[0]}" if not shown.fits else f"; and on {len(others)} of the others"
    elif len(plan.verdicts) > 1 and not plan.group:
        text += "; no other shown fits" if shown.fits else f"; none of the {len(plan.verdicts)} shown fits"
    return verdict_word(plan) + Text(text, style="bold")


def verdict_word(plan: Plan) -> Text:
    """FITS, FITS BARELY with its chance, or DOES NOT FIT."""
    if not plan.fits:
        return Text("DOES NOT FIT  ", style="bold red")
    if plan.verdict.barely:
        return Text(f"FITS BARELY ({plan.verdict.confidence.chance:.0%})  ", style="bold yellow")
    return Text("FITS  ", style="bold green")


def request_table(plan: Plan) -> Table:
    """What was asked, and what was chosen for it."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, words in request_rows(plan):
        table.add_row(name, words)
    return table


def request_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    """What was asked, and what was chosen for it, each with its name."""
    yield "model", model_words(plan.architecture)
    yield "base", base_words(plan)
    yield "trained", trained_words(plan)
    yield "step", step_words(plan)
    yield "strategy", strategy_words(plan)
    if plan.fits and plan.verdict.step_time is not None:
        yield "speed", speed_words(plan.verdict.step_time)
    if plan.fits and plan.duration is not None:
        yield "whole run", duration_words(plan.duration, plan.target.device.kind)
    for choice in plan.choices:
        yield choice.field.replace("_", " "), f"{choice.value}: {choice.reason}"


def model_words(architecture: ModelArchitecture) -> str:
    """The model and its size, and what of it idles."""
    words = f"{architecture.name}, {parameters(architecture.parameters)} parameters"
    if tower := architecture.tower:
        words += f", {parameters(tower.parameters)} of them for images, which idle on text"
    return words


def speed_words(step: StepTime) -> str:
    """Tokens a second, between which bounds, and what corrected them."""
    slow, expected, fast = (step.tokens / seconds for seconds in (step.high, step.seconds, step.low))
    runs = f", as {step.runs} measured run{'s' if step.runs > 1 else ''} here corrected it" if step.runs else ""
    return f"about {expected:,.0f} tokens/s ({slow:,.0f} to {fast:,.0f}{runs})"


def duration_words(run: Duration, kind: str) -> str:
    """How long a run takes on devices of a kind and what it costs, each with its bounds."""
    steps = "1 step" if run.steps == 1 else f"{run.steps:,} steps"
    words = f"{steps} in {time_range(run)}"
    if kind == "cuda":
        words += f", {run.gpu_hours:,.1f} GPU hours"
    return words if run.price is None else f"{words}, {price_range(run)}"


def base_words(plan: Plan) -> str:
    """How the base is stored."""
    recipe = plan.recipe
    if recipe.quantization == "none":
        return f"{plan.target.compute_dtype}, not quantized"
    store = recipe.quantization.upper()
    if recipe.quantization in ("nf4", "fp4") and recipe.double_quantization:
        store += " + double quantization"
    if recipe.block_size != 64:
        store += f", a constant for {recipe.block_size} weights"
    return store + (", the rest cast to float32 as peft does" if recipe.upcast == "peft" else "")


def trained_words(plan: Plan) -> str:
    """What is trained, and with what."""
    recipe = plan.recipe
    what = (
        "all weights"
        if recipe.method == "full"
        else f"{'DoRA' if recipe.use_dora else 'LoRA'} of rank {recipe.rank} in {recipe.lora_dtype} on {targets(plan)}"
    )
    state = "8-bit AdamW" if recipe.optimizer == "adamw_8bit" else "AdamW"
    return f"{what}, {'paged ' if plan.strategy.paged_optimizer else ''}{state}"


def step_words(plan: Plan) -> str:
    """The tokens of a step."""
    strategy = plan.strategy
    words = f"micro-batch {strategy.micro_batch} x {plan.recipe.seq_len} tokens"
    if strategy.gradient_accumulation > 1:
        words += f", {strategy.gradient_accumulation} times"
    if strategy.world_size > 1:
        words += f", on {strategy.world_size} {'GPUs' if plan.target.device.kind == 'cuda' else 'processes'}"
    return words


def strategy_words(plan: Plan) -> str:
    """How the step is met."""
    strategy = plan.strategy
    words = (
        f"ZeRO {strategy.zero_stage}" if strategy.zero_stage else "",
        {"none": "", "optimizer": "optimizer offloaded", "all": "all offloaded"}[strategy.offload],
        "gradient checkpointing" if strategy.gradient_checkpointing else "no gradient checkpointing",
        f"{strategy.attention} attention",
        f"{strategy.loss} loss",
        "autocast" if plan.recipe.under_autocast else "",
    )
    return ", ".join(filter(None, words))


def targets(plan: Plan) -> str:
    """LoRA's targets in a few words."""
    chosen = plan.recipe.targets
    return chosen if isinstance(chosen, str) else ", ".join(chosen)


class Line(NamedTuple):
    """A line of the table of memory: its size as text, its share of the allocated bytes, or a remark."""

    title: str
    size: str
    share: float | None
    remark: str = ""


def memory_table(plan: Plan) -> Table:
    """A bar per component, then their sum and what it becomes on the device."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(min_width=24, no_wrap=True)
    table.add_column(min_width=10, justify="right", no_wrap=True)
    table.add_column(min_width=5, justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for title, size, share, remark in memory_lines(plan):
        style = "bold" if title == "allocated" else ""
        beside = Text(remark, style="dim") if share is None else Bar(share)
        table.add_row(Text(title, style), Text(size, style), "" if share is None else f"{share:.1%}", beside)
    return table


def memory_lines(plan: Plan) -> Iterator[Line]:
    """The components, their sum, and what it becomes on the device and the host, all in one unit."""
    gpu, host = plan.estimate.gpu, plan.estimate.host
    unit, name = (GIB, "GiB") if gpu.allocated_bytes >= GIB else (MIB, "MiB")

    def size_text(size: int) -> str:
        return f"{size / unit:.2f} {name}"

    for component, size in gpu.components._asdict().items():
        if size >= unit / 200:
            yield Line(COMPONENT_TITLES[component], size_text(size), size / gpu.allocated_bytes)
    yield Line("allocated", size_text(gpu.allocated_bytes), None, "the sum: what tensors take")
    if plan.target.device.kind == "cuda":
        low, high = (f"{bound / unit:.2f}" for bound in gpu.reserved_interval)
        held = "held by the caching allocator" if low == high else f"fragmentation: {low} to {high}"
        yield Line("reserved", size_text(gpu.reserved_bytes), None, held)
        yield Line("process", size_text(gpu.process_bytes), None, "in nvidia-smi: CUDA context too")
        if (sure := plan.verdict.confidence).expected_bytes != gpu.process_bytes:
            yield Line("as measured", size_text(sure.expected_bytes), None, f"by {sure.basis}")
    if gpu.paged_bytes:
        yield Line("paged", size_text(gpu.paged_bytes), None, "managed memory, outside the sum")
    for title, size in (("host, loading", host.load_peak_bytes), ("host, training", host.steady_bytes)):
        if size:
            yield Line(title, size_text(size), None, "of the host, for all its ranks")


VERDICT_COLUMNS = (
    "",
    "",
    "\nusable",
    "\nneeded",
    "\nto spare",
    "largest\nmicro-batch",
    "longest\nsequence",
    "\ntokens/s",
)


def verdicts_table(plan: Plan) -> Table:
    """One line per device."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in VERDICT_COLUMNS:
        table.add_column(title, justify="right" if title else "left", no_wrap=True, header_style="dim")
    for verdict in plan.verdicts:
        table.add_row(*verdict_cells(verdict))
    return table


def verdict_cells(verdict: Verdict) -> tuple[str | Text, ...]:
    """One device's line."""
    sizes = (verdict.usable_bytes, verdict.confidence.expected_bytes, verdict.headroom_bytes)
    limits = (verdict.largest_micro_batch, verdict.longest_seq_len)
    return (
        verdict.gpu,
        verdict_cell(verdict),
        *(f"{size / GIB:.2f}" for size in sizes),
        *(str(limit) if limit else "-" for limit in limits),
        f"{verdict.step_time.tokens_per_second:,.0f}" if verdict.fits and verdict.step_time else "-",
    )


def verdict_cell(verdict: Verdict) -> Text:
    """Yes, no, or the chance where it is neither."""
    if verdict.barely:
        return Text(f"{verdict.confidence.chance:.0%}", style="yellow")
    return Text("yes", style="green") if verdict.fits else Text("no", style="red")


def measured_table(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> Table:
    """Predicted beside measured memory, by phase, of the fullest rank."""
    table = Table(box=None, padding=(0, 2, 0, 0), title="\nMemory of the fullest rank", title_justify="left")
    for title in ("", "predicted", "measured", "error"):
        table.add_column(title, justify="left" if not title else "right")
    for title, guess, found in memory_rows(predicted, measured):
        table.add_row(title, gib(guess), gib(found), error(guess, found))
    return table


def memory_rows(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(title, predicted bytes, measured bytes) for the peak, what was reserved where there is such, and each phase."""
    yield "peak", predicted["allocated_bytes"], measured["allocated_bytes"]
    if reserved := measured.get("reserved_bytes"):  # a CPU's tensors are all there is
        yield "reserved", predicted["reserved_bytes"], reserved
    for phase in ("after_load", "forward", "backward", "optimizer"):
        yield phase.replace("_", " "), predicted["phases"][phase], measured["phases"][phase]
