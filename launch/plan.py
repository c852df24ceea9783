"""qlora-plan: how much memory a fine-tune needs, and which GPUs it fits on. Imports neither torch nor ray."""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from clusters.errors import Problem, RequestError, request_error
from clusters.gpu import COMMON, GIB, find_gpu
from launch import command
from orchestrator.planner import EstimatorFunction, check_strategy, cpu_target, gpu_target, plan_request
from orchestrator.plans import Plan, Target
from orchestrator.targets import check_targets
from qlora_core.catalogue import find_model
from qlora_core.memory import formula
from qlora_core.memory.allocator import AllocatorSettings
from qlora_core.recipe import Mistake, Quantization, Recipe, RecipeError
from qlora_core.strategy import Strategy
from qlora_core.targets import split

T = TypeVar("T")

NOT_BUILT = ("--cluster", "--data", "--objective", "--report", "--sweep", "--tokens", "--write")
"""Options of the command's contract whose part is not built yet; each is refused by name instead of ignored."""

FLAGS = {
    "quantization": "--quant",
    "dropout": "--lora-dropout",
    "tokens_per_step": "--seq-len x --micro-batch x --gpus",
}
"""The options that are not called like the recipe's field."""


def refuse(context: click.Context, parameter: click.Parameter, value: object) -> None:
    """Refuse an option whose part is not built."""
    if value is not None:
        name = parameter.opts[0]
        raise request_error(name, str(value), "this part is not built yet", f"Leave {name} out")


def not_built(function: Any) -> Any:
    """Give the command the options that are refused, hidden from --help."""
    for name in NOT_BUILT:
        function = click.option(name, metavar="VALUE", hidden=True, expose_value=False, callback=refuse)(function)
    return function


@click.command("qlora-plan", context_settings={"max_content_width": 120})
@click.option("--model", metavar="NAME|DIR|HUB_ID", help="Of the catalogue, a folder, or org/name[@revision].")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="Data-parallel GPUs.")
@click.option("--gpu", metavar="NAME", help="The kind of GPU, or cpu. Omitted: the common kinds are compared.")
@click.option("--compare", metavar="NAME,...", help="Several kinds of GPU beside each other; they join that of --gpu.")
@click.option("--method", type=click.Choice(["qlora", "lora", "full"]), default="qlora", show_default=True)
@click.option("--quant", type=click.Choice(["nf4", "fp4", "int8", "none"]), help="The base's weights.  [default: nf4]")
@click.option("--no-double-quant", is_flag=True, help="Keep the quantization constants in float32.")
@click.option("--rank", type=click.IntRange(min=1), default=64, show_default=True, help="LoRA rank.")
@click.option(
    "--targets",
    metavar="NAME,...",
    default="all-linear",
    show_default=True,
    help="LoRA's layers: all-linear, or names and regular expressions of modules.",
)
@click.option(
    "--lora-dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True
)
@click.option("--lora-dropout", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True)
@click.option(
    "--optimizer",
    type=click.Choice(["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]),
    default="paged_adamw_32bit",
    show_default=True,
)
@click.option("--micro-batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at a time.")
@click.option("--seq-len", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of a sequence.")
@click.option(
    "--attention", type=click.Choice(["sdpa", "eager", "flash_attention_2"]), default="sdpa", show_default=True
)
@click.option("--no-gradient-checkpointing", is_flag=True, help="Keep all activations.")
@click.option("--loss", type=click.Choice(["full", "chunked"]), default="chunked", show_default=True)
@click.option(
    "--compute-dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto goes by the GPU.",
)
@click.option(
    "--upcast",
    type=click.Choice(["none", "peft"]),
    default="none",
    show_default=True,
    help="peft: prepare_model_for_kbit_training's cast to float32.",
)
@click.option("--autocast", is_flag=True, help="The forward pass runs under torch.autocast.")
@click.option("--zero-stage", type=click.IntRange(0, 3), default=0, show_default=True, help="DeepSpeed ZeRO; 0: none.")
@click.option("--offload", type=click.Choice(["none", "optimizer", "all"]), default="none", show_default=True)
@click.option("--host-ram", type=click.FloatRange(min=0, min_open=True), metavar="GIB", help="Host memory to fit into.")
@click.option("--estimator", type=click.Choice(["formula", "trace"]), default="formula", show_default=True)
@click.option("--explain", is_flag=True, help="Say where each gigabyte comes from, and what each choice saves.")
@click.option("--list-models", "list_kind", flag_value="models", help="List the catalogue of models.")
@click.option("--list-gpus", "list_kind", flag_value="gpus", help="List the catalogue of GPUs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/planning.md).")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="qlora-orchestrator")
@not_built
def plan(**options: Any) -> int:
    """Plan a fine-tune: memory by component, and which GPUs it fits on.

    Exit code 0: it fits (on at least one of the GPUs shown); 1: it does not; 2: the request is wrong.
    """
    if options["list_kind"]:
        from launch import listing

        (listing.print_models if options["list_kind"] == "models" else listing.print_gpus)(options["as_json"])
        return 0
    if options["model"] is None:
        raise click.UsageError("Missing option --model; --list-models shows what is known by name.")
    answer = plan_of(options)
    if options["as_json"]:
        print_json(answer, options["explain"])
    else:
        from launch.report.terminal import print_plan  # rich takes a while, and JSON does without

        print_plan(answer, explained=options["explain"])
    return 0 if answer.fits else 1


def print_json(plan: Plan, explained: bool) -> None:
    """Print a plan as JSON to stdout, its warnings to stderr."""
    answer = plan.to_json()
    if explained:
        from launch.report.explain import explain

        answer["explanation"] = [{"title": part.title, "lines": list(part.lines)} for part in explain(plan)]
    for warning in plan.warnings:
        command.warn(warning)
    click.echo(json.dumps(answer, indent=2))


def plan_of(options: dict[str, Any]) -> Plan:
    """The plan that the command line asks for.

    Raises:
        RequestError: unknown names, and options that contradict each other, all of them.
    """
    problems: list[Problem] = []

    def attempt(make: Callable[[], T]) -> T | None:
        try:
            return make()
        except RequestError as error:
            problems.extend(error.problems)
            return None

    architecture = attempt(lambda: find_model(options["model"]))
    recipe = attempt(lambda: recipe_of(options))
    targets = attempt(lambda: targets_of(options))
    strategy = strategy_of(options)
    host_ram = attempt(lambda: host_ram_of(options["host_ram"]))
    attempt(lambda: check_strategy(strategy, "--{}", targets or []))
    if architecture and recipe:
        attempt(lambda: check_targets(architecture, recipe, "--targets"))
    if problems or architecture is None or recipe is None or targets is None:
        raise RequestError(problems)
    asked = target_named(options["gpu"], options).name if options["gpu"] else None
    estimator = estimator_named(options["estimator"])
    return plan_request(
        architecture, recipe, strategy, targets, asked=asked, host_usable_bytes=host_ram, estimator=estimator
    )


def estimator_named(name: str) -> EstimatorFunction:
    """The estimator of that name; the trace needs what training needs, and minds PYTORCH_ALLOC_CONF as training does.

    Raises:
        RequestError: it is not installed.
    """
    if name == "formula":
        return formula.estimate
    try:
        from qlora_core.quiet import quiet_libraries

        quiet_libraries()  # before they are imported
        from qlora_core.memory import trace  # torch, transformers, peft and bitsandbytes: seconds
    except ImportError as error:
        rule = f"it runs the real training code, and {error.name or error} is not installed"
        remedy = "pip install 'qlora-orchestrator[train]', or use --estimator formula"
        raise request_error("--estimator", "trace", rule, remedy) from error
    settings = AllocatorSettings.parse(os.environ.get("PYTORCH_ALLOC_CONF", ""))
    return partial(trace.estimate, settings=settings)


def strategy_of(options: dict[str, Any]) -> Strategy:
    """The strategy of the command line."""
    return Strategy(
        world_size=options["gpus"],
        micro_batch=options["micro_batch"],
        gradient_checkpointing=not options["no_gradient_checkpointing"],
        attention=options["attention"],
        loss=options["loss"],
        paged_optimizer=options["optimizer"].startswith("paged_"),
        zero_stage=options["zero_stage"],
        offload=options["offload"],
    )


def recipe_of(options: dict[str, Any]) -> Recipe:
    """The recipe of the command line."""
    method, targets = options["method"], options["targets"]
    quantization: Quantization = options["quant"] or ("nf4" if method == "qlora" else "none")
    four_bit = quantization in ("nf4", "fp4")
    problems = []
    if options["no_double_quant"] and not four_bit:
        rule = f"only nf4 and fp4 have constants that could be quantized again, and the base is {quantization}"
        problems.append(Problem("--no-double-quant", "", rule, "Leave --no-double-quant out"))
    names = split(targets)
    try:
        recipe = Recipe(
            method=method,
            quantization=quantization,
            double_quantization=four_bit and not options["no_double_quant"],
            rank=options["rank"],
            targets="all-linear" if names == ("all-linear",) else names,
            lora_dtype=options["lora_dtype"],
            dropout=options["lora_dropout"],
            compute_dtype=options["compute_dtype"],
            upcast=options["upcast"],
            autocast=options["autocast"],
            optimizer="adamw_8bit" if "8bit" in options["optimizer"] else "adamw",
            seq_len=options["seq_len"],
            tokens_per_step=options["seq_len"] * options["micro_batch"] * options["gpus"],
        )
    except RecipeError as error:
        fields = {mistake.fields[0] for mistake in error.mistakes}
        own = [each for each in error.mistakes if each.fields[0] != "tokens_per_step" or "seq_len" not in fields]
        raise RequestError([*problems, *map(flag_problem, own)]) from None
    if problems:
        raise RequestError(problems)
    return recipe


def flag_problem(mistake: Mistake) -> Problem:
    """A mistake in a recipe, at the option it came from."""
    field = mistake.fields[0]
    flag = FLAGS.get(field, "--" + field.replace("_", "-"))
    given = str(mistake.given) if isinstance(mistake.given, str | int | float) else ""
    return Problem(flag, given, mistake.rule, mistake.remedy or "qlora-plan --help shows what is possible")


def host_ram_of(gib: float | None) -> int | None:
    """The host's memory in bytes, where it was stated."""
    if gib is not None and not math.isfinite(gib * GIB):
        raise request_error("--host-ram", gib, "it must be a number of GiB", "Leave it out where it is not known")
    return None if gib is None else round(gib * GIB)


def targets_of(options: dict[str, Any]) -> list[Target]:
    """The devices to answer for, by memory: those asked for, or the common GPUs."""
    compared = options["compare"]
    names = [] if compared is None else [name for name in compared.split(",") if name.strip()]
    if compared is not None and not names:
        raise request_error("--compare", compared, "it names no GPU", "Name some, such as --compare t4,a100-40gb")
    asked = [options["gpu"]] if options["gpu"] is not None else []
    return targets_named([*asked, *names] or list(COMMON), options)


def targets_named(names: list[str], options: dict[str, Any]) -> list[Target]:
    """The devices of these names, each once, the smallest memory first.

    Raises:
        RequestError: with every name that is not known.
    """
    targets: dict[str, Target] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            target = target_named(name, options)
            targets[target.name] = target
        except RequestError as error:
            problems.extend(error.problems)
    if problems:
        raise RequestError(problems)
    return sorted(targets.values(), key=lambda target: target.usable_bytes)


def target_named(name: str, options: dict[str, Any]) -> Target:
    """The device of that name: a GPU of the catalogue, or this host's processor."""
    compute_dtype, workers = options["compute_dtype"], options["gpus"]
    if name.strip().lower() != "cpu":
        return gpu_target(find_gpu(name), compute_dtype, workers)
    import psutil  # only where the CPU is asked for: it costs the start of every other plan

    return cpu_target(compute_dtype, workers, psutil.virtual_memory().available, has_amx())


def has_amx() -> bool:
    """Whether this processor has AMX tiles; only Linux says so without asking the processor."""
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def main() -> None:
    """The console script."""
    gc.disable()  # it ends in a moment, and collecting would be a tenth of that
    command.main(plan)
