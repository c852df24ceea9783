"""From the command line of `qlora-plan` to a question for the planner, with every mistake in it told at once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from clusters.errors import Problem, RequestError, not_installed, request_error
from clusters.gpu import GIB
from launch.data import Data, measured
from launch.devices import AUTO, Options, place_of
from orchestrator.history import History
from orchestrator.needs import Estimator
from orchestrator.planner import fitting_defaults, plan_question, planned_for
from orchestrator.plans import Alternative, Choice, Plan, Target
from orchestrator.question import STRATEGY_FIELDS, Question, of_length
from orchestrator.rules import (
    check_attention,
    check_even,
    check_loss,
    check_packing,
    check_quantized,
    check_strategy,
    stage_for,
)
from orchestrator.targets import check_targets
from qlora_core.architecture import ModelArchitecture
from qlora_core.catalogue import find_model
from qlora_core.memory import formula
from qlora_core.memory.allocator import AllocatorSettings
from qlora_core.recipe import Mistake, Quantization, Recipe, RecipeError
from qlora_core.strategy import Strategy
from qlora_core.targets import split

T = TypeVar("T")

FLAGS = {
    "quantization": "--quant",
    "dropout": "--lora-dropout",
    "use_rslora": "--rslora",
    "use_dora": "--dora",
    "tokens_per_step": "--tokens-per-step",
}
"""The options that are not called like the recipe's field."""
ADAPTER_OPTIONS = ("rank", "targets", "lora_dtype", "lora_dropout", "rslora", "dora")
OPTION_OF = {
    "world_size": "gpus",
    "gradient_checkpointing": "no_gradient_checkpointing",
    "paged_optimizer": "optimizer",
}
"""The options that are not called like the strategy's field."""
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Of these PyTorch reads the first that is set, even to nothing (2.13, c10/cuda/CUDAAllocatorConfig.h, `instance`);
a comment in c10/core/AllocatorConfig.h has them the other way round."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with all that answers it.

    Attributes:
        question: what is fixed and what is open.
        recipe: the question's, at the length that was asked for: the question's is that of the longest example.
        targets: the devices to answer for, by memory.
        named: the device whose estimate is wanted.
        choices: what was decided on the way here.
        warnings: what the person should know besides.
        host_bytes: memory of a host, where it was stated.
        searched: what the search for alternatives may change.
    """

    question: Question
    recipe: Recipe
    targets: tuple[Target, ...]
    named: str | None
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...]
    host_bytes: int | None
    searched: frozenset[str]
    data: Data
    currency: str | None


def plan_of(
    options: Options,
    given: Collection[str],
    history: History,
    *,
    alternatives: Literal["none", "nearest", "all"] = "none",
) -> Plan:
    """The plan that the command line asks for; `given` are the options that were really passed.

    Raises:
        RequestError: unknown names, and options that contradict each other, all of them.
    """
    asked = asked_by(options, given)
    plan = plan_question(
        asked.question,
        asked.targets,
        asked=asked.named,
        compared=[] if options["compare"] is None else [target.name for target in asked.targets],
        choices=asked.choices,
        host_usable_bytes=asked.host_bytes,
        estimator=estimator_named(options["estimator"]),
        tokens=asked.data.tokens,
        filled=asked.data.filled,
        currency=asked.currency,
        history=history,
        searched=asked.searched,
        alternatives=alternatives,
    )
    return as_asked(replace(plan, warnings=(*asked.warnings, *plan.warnings)), asked)


def as_asked(plan: Plan, asked: Asked) -> Plan:
    """`plan` and its alternatives, which are made for the length of the longest row, at the length asked for."""
    planned, wanted = asked.question.recipe, asked.recipe

    def at_length(recipe: Recipe) -> Recipe:
        if recipe.seq_len != planned.seq_len:  # another one was looked for
            return recipe
        return of_length(recipe, wanted.seq_len, wanted.seq_len * recipe.sequences_per_step)

    def told(change: Choice, way: Alternative) -> Choice:
        if change.field != "tokens_per_step":
            return change
        value, before = (at_length(each).tokens_per_step for each in (way.recipe, plan.recipe))
        reason = f"instead of {before}" if change.reason.startswith("instead of") else change.reason
        return Choice(change.field, str(value), reason)

    def other(way: Alternative) -> Alternative:
        changes = tuple(told(change, way) for change in way.changes)
        return replace(way, recipe=at_length(way.recipe), changes=changes)

    if planned == wanted:
        return plan
    return replace(
        plan,
        recipe=at_length(plan.recipe),
        longest=asked.data.longest,
        alternatives=tuple(map(other, plan.alternatives)),
    )


def asked_by(options: Options, given: Collection[str]) -> Asked:
    """The question of a command line."""
    problems: list[Problem] = []

    def attempt(make: Callable[[], T]) -> T | None:
        try:
            return make()
        except RequestError as error:
            problems.extend(error.problems)
            return None

    architecture = attempt(lambda: find_model(options["model"]))
    place = attempt(lambda: place_of(options))
    world_size = place.world_size if place else 1
    open_fields = open_of(options, given)
    recipe = attempt(lambda: recipe_of(options, world_size))
    choices = list(place.choices) if place else []
    if options["estimator"] != "formula" and "zero_stage" in open_fields:
        open_fields -= {"zero_stage"}
        reason = f"--estimator {options['estimator']} does not follow ZeRO; --estimator formula does"
        choices.append(Choice("zero_stage", "0", reason))
    strategy = strategy_of(options, world_size, open_fields)
    if architecture:
        strategy = attempt(lambda: supported(architecture, strategy, given, choices)) or strategy
    attempt(lambda: check_length(options, given))
    attempt(lambda: check_adapters(options, given))
    host = attempt(lambda: host_ram_of(options["host_ram"]))
    # a recipe with mistakes of its own says nothing of the strategy
    attempt(lambda: check_strategy(recipe or Recipe(), strategy, "--{}", place.targets if place else []))
    if recipe and options["tokens_per_step"]:
        attempt(lambda: check_even(recipe, strategy, open_fields, "--tokens-per-step"))
    data = None
    if architecture and recipe:
        attempt(lambda: check_targets(architecture, recipe, "--targets"))
        attempt(lambda: check_packing(architecture, recipe, "--packing"))
        attempt(lambda: check_quantized(architecture, recipe, "--quant"))
        attempt(lambda: check_loss(architecture, recipe, strategy, "--{}", place.targets if place else []))
        data = attempt(lambda: data_of(options, recipe, choices))
    if problems or architecture is None or place is None or recipe is None or data is None:
        raise RequestError(problems)
    if options["objective"] == "longest":  # of a length that is looked for, data of another say nothing
        data = Data(options["tokens"])
    planned, shortened = planned_for(recipe, data.longest)
    choices += shortened
    searched = (frozenset(STRATEGY_FIELDS) - fixed_by(given)) | open_fields
    return Asked(
        question=Question(
            architecture,
            planned,
            strategy,
            open_fields,
            whole_step=options["tokens_per_step"] is not None,
            objective=options["objective"] or "fastest",
        ),
        recipe=recipe,
        targets=place.targets if host is None else tuple(with_host(target, host) for target in place.targets),
        named=place.named,
        choices=tuple(choices),
        warnings=place.warnings,
        host_bytes=host,
        searched=searched - {"seq_len"},
        data=data,
        currency=place.currency,
    )


# --- what is open -----------------------------------------------------------------------------------------------------


def open_of(options: Options, given: Collection[str]) -> frozenset[str]:
    """The fields that the search may choose: those that are `auto` and, with an objective, those not passed."""
    names = {"micro_batch", "seq_len", "attention", "loss", "zero_stage", "offload"}
    opened = {name for name in names if options[name] == AUTO}
    if options["gpus"] == AUTO:
        opened.add("world_size")
    if options["optimizer"] == AUTO:
        opened |= {"optimizer", "paged_optimizer"}
    if options["objective"] is not None:
        opened |= set(STRATEGY_FIELDS) - fixed_by(given)
        if options["objective"] == "longest" and "seq_len" not in given:
            opened.add("seq_len")
    return frozenset(opened)


def check_adapters(options: Options, given: Collection[str]) -> None:
    """Raise a RequestError for options of adapters where there are none."""
    if options["method"] == "full" and (idle := [name for name in ADAPTER_OPTIONS if name in given]):
        rule = "these are about adapters, and --method full trains all weights and has none"
        flags = ", ".join("--" + name.replace("_", "-") for name in idle)
        raise request_error(flags, "", rule, "Leave them out, or choose --method lora")


def check_length(options: Options, given: Collection[str]) -> None:
    """Raise a RequestError for a length that nobody chooses, or that leaves nothing to choose."""
    longest = options["objective"] == "longest"
    if options["seq_len"] == AUTO and not longest:
        raise request_error("--seq-len", AUTO, "only --objective longest chooses it", "Add that, or give a number")
    if "seq_len" in given and longest:
        raise request_error(
            "--seq-len", options["seq_len"], "--objective longest looks for it", "Leave one of them out"
        )
    if options["tokens_per_step"] and longest:
        rule = "--objective longest looks for the length, and a step has as many sequences of any"
        raise request_error("--tokens-per-step", options["tokens_per_step"], rule, "Leave one of them out")


def fixed_by(given: Collection[str]) -> frozenset[str]:
    """The strategy's fields that the person passed, and whose option was not `auto`."""
    return frozenset(field for field in STRATEGY_FIELDS if OPTION_OF.get(field, field) in given)


# --- recipe and strategy ----------------------------------------------------------------------------------------------


def strategy_of(options: Options, world_size: int, open_fields: Collection[str]) -> Strategy:
    """The strategy of the command line, with the defaults of what is open."""

    def value(name: str, default: Any) -> Any:
        return default if options[name] == AUTO else options[name]

    offload = value("offload", "none")
    return Strategy(
        world_size=world_size,
        micro_batch=value("micro_batch", 1),
        gradient_accumulation=accumulation_of(options, world_size),
        gradient_checkpointing=not options["no_gradient_checkpointing"],
        attention=value("attention", "sdpa"),
        loss=value("loss", "chunked"),
        paged_optimizer=value("optimizer", "paged_adamw_32bit").startswith("paged_"),
        zero_stage=stage_for(offload) if "zero_stage" in open_fields else value("zero_stage", 0),
        offload=offload,
    )


def accumulation_of(options: Options, world_size: int) -> int:
    """How many micro-batches make the step that was asked for; 1 where it does not come out even, which is refused."""
    size, length = options["micro_batch"], options["seq_len"]
    tokens: int | None = options["tokens_per_step"]
    if tokens is None or AUTO in (size, length):
        return 1
    return max(1, tokens // int(size * length * world_size))


def supported(
    architecture: ModelArchitecture, strategy: Strategy, given: Collection[str], choices: list[Choice]
) -> Strategy:
    """`strategy` with what the model's own code has in place of defaults that it has not.

    Raises:
        RequestError: the person asked for what it has not.
    """
    check_attention(architecture, strategy.attention if "attention" in given else "", "--{}")
    fitting = fitting_defaults(architecture, strategy)
    if fitting.attention != strategy.attention:
        reason = f"transformers has no {strategy.attention} for {architecture.model_type}"
        choices.append(Choice("attention", fitting.attention, reason))
    return fitting


def recipe_of(options: Options, world_size: int) -> Recipe:
    """The recipe of the command line."""
    method, targets = options["method"], options["targets"]
    quantization: Quantization = options["quant"] or ("nf4" if method == "qlora" else "none")
    four_bit = quantization in ("nf4", "fp4")
    problems = []
    if options["no_double_quant"] and not four_bit:
        rule = f"only nf4 and fp4 have constants that could be quantized again, and the base is {quantization}"
        problems.append(Problem("--no-double-quant", "", rule, "Leave --no-double-quant out"))
    if options["block_size"] is not None and not four_bit:
        rule = f"only nf4 and fp4 have a constant for each block of weights, and the base is {quantization}"
        problems.append(Problem("--block-size", options["block_size"], rule, "Leave --block-size out"))
    names = split(targets)
    length = 512 if options["seq_len"] == AUTO else options["seq_len"]
    size = 1 if options["micro_batch"] == AUTO else options["micro_batch"]
    try:
        recipe = Recipe(
            method=method,
            quantization=quantization,
            double_quantization=four_bit and not options["no_double_quant"],
            block_size=int(options["block_size"] or 64),  # type: ignore[arg-type]  # the option has the field's values
            rank=options["rank"],
            targets="all-linear" if names == ("all-linear",) else names,
            lora_dtype=options["lora_dtype"],
            dropout=options["lora_dropout"],
            use_rslora=options["rslora"],
            use_dora=options["dora"],
            compute_dtype=options["compute_dtype"],
            upcast=options["upcast"],
            autocast=options["autocast"],
            optimizer="adamw_8bit" if "8bit" in options["optimizer"] else "adamw",
            seq_len=length,
            tokens_per_step=options["tokens_per_step"] or length * size * world_size,
            packing=options["packing"],
        )
    except RecipeError as error:
        fields = {mistake.fields[0] for mistake in error.mistakes}
        own = [each for each in error.mistakes if each.fields[0] != "tokens_per_step" or "seq_len" not in fields]
        made_up = options["tokens_per_step"] is None
        raise RequestError([*problems, *(flag_problem(mistake, made_up) for mistake in own)]) from None
    if problems:
        raise RequestError(problems)
    return recipe


def flag_problem(mistake: Mistake, made_up: bool) -> Problem:
    """A mistake in a recipe, at the option it came from; `made_up`: the step's tokens are what other options make."""
    field = mistake.fields[0]
    flag = FLAGS.get(field, "--" + field.replace("_", "-"))
    if field == "tokens_per_step" and made_up:
        flag = "--seq-len x --micro-batch x --gpus"
    given = str(mistake.given) if isinstance(mistake.given, str | int | float) else ""
    return Problem(flag, given, mistake.rule, mistake.remedy or "qlora-plan --help shows what is possible")


def estimator_named(name: str) -> Estimator:
    """The estimator of that name; the trace needs what training needs, and minds the environment as training does.

    Raises:
        RequestError: it is not installed, or the environment asks its allocator for what is not simulated.
    """
    if name == "formula":
        return formula.estimate
    if name == "played":
        from qlora_core.memory import played  # late: the formula is asked for nearly always

        return played.estimate
    try:
        from qlora_core.quiet import import_bitsandbytes, quiet_libraries

        quiet_libraries()  # before they are imported
        import_bitsandbytes()

        from qlora_core.memory import trace  # torch, transformers, peft and bitsandbytes: seconds
    except ImportError as error:
        raise not_installed("--estimator", "trace", [error.name or str(error)]) from error
    return partial(trace.estimate, settings=allocator_settings())


def allocator_settings() -> AllocatorSettings:
    """What the environment says to PyTorch's allocator.

    Raises:
        RequestError: it says what is not simulated.
    """
    variable = next((name for name in ALLOCATOR_VARIABLES if name in os.environ), ALLOCATOR_VARIABLES[-1])
    try:
        return AllocatorSettings.parse(os.environ.get(variable, ""))
    except RequestError as error:
        raise error.at(variable) from None


def with_host(target: Target, host_bytes: int) -> Target:
    """`target` in nodes with so much memory."""
    return target if target.pool is None else replace(target, pool=replace(target.pool, host_ram_bytes=host_bytes))


def host_ram_of(gib: float | None) -> int | None:
    """The host's memory in bytes, where it was stated."""
    if gib is not None and not math.isfinite(gib * GIB):
        raise request_error("--host-ram", gib, "it must be a number of GiB", "Leave it out where it is not known")
    return None if gib is None else round(gib * GIB)


# --- the data ---------------------------------------------------------------------------------------------------------


def data_of(options: Options, recipe: Recipe, choices: list[Choice]) -> Data:
    """What is known of the data: from --tokens, or from --data by the model's own tokenizer.

    Raises:
        RequestError: both were passed, or the file cannot be read as a run would read it.
    """
    tokens, path = options["tokens"], options["data"]
    if tokens is not None and path is not None:
        raise request_error("--data", path, "--tokens says how much there is already", "Pass one of the two")
    if path is None:
        return Data(tokens)
    from qlora_core.data import is_address  # no other plan needs it

    if is_address(path):
        rule = "it is an address, and what a plan measures is a file of this machine"
        raise request_error("--data", path.split("://")[0] + "://...", rule, "Copy some of it here, or pass --tokens")
    return measured(Path(path), Path(options["model"]).expanduser(), recipe, choices)
