"""From the command line of `qlora-plan` to a question for the planner, with every mistake in it told at once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from clusters.errors import Problem, RequestError, request_error
from clusters.gpu import COMMON, GIB, find_gpu
from orchestrator.devices import NODE_GPUS, any_nodes, cpu_target, pool_target
from orchestrator.history import History
from orchestrator.planner import EstimatorFunction, at_length, fitting_defaults, plan_question
from orchestrator.plans import Choice, Plan, Target
from orchestrator.rules import check_architecture, check_strategy
from orchestrator.search import STRATEGY_FIELDS, Question
from orchestrator.targets import check_targets
from qlora_core.architecture import ModelArchitecture
from qlora_core.catalogue import find_model
from qlora_core.memory import formula
from qlora_core.memory.allocator import AllocatorSettings
from qlora_core.recipe import Mistake, Quantization, Recipe, RecipeError
from qlora_core.strategy import Strategy
from qlora_core.targets import split

if TYPE_CHECKING:
    from clusters.cluster import Cluster, Pool

T = TypeVar("T")
Options = Mapping[str, Any]
AUTO = "auto"

FLAGS = {
    "quantization": "--quant",
    "dropout": "--lora-dropout",
    "tokens_per_step": "--tokens-per-step",
}
"""The options that are not called like the recipe's field."""
OPTION_OF = {
    "world_size": "gpus",
    "gradient_checkpointing": "no_gradient_checkpointing",
    "paged_optimizer": "optimizer",
}
"""The options that are not called like the strategy's field."""


@dataclass(frozen=True, slots=True)
class Data:
    """The data of a run.

    Attributes:
        tokens: that it trains on, padding counted.
        longest: of the longest example; None where that is not known.
    """

    tokens: int | None = None
    longest: int | None = None


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
        choices=asked.choices,
        host_usable_bytes=asked.host_bytes,
        estimator=estimator_named(options["estimator"]),
        tokens=asked.data.tokens,
        currency=asked.currency,
        history=history,
        searched=asked.searched,
        alternatives=alternatives,
    )
    recipe = plan.recipe if asked.question.open else asked.recipe
    return replace(plan, recipe=recipe, warnings=(*asked.warnings, *plan.warnings))


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
    recipe = attempt(lambda: recipe_of(options, world_size, open_fields))
    strategy = strategy_of(options, world_size)
    choices = list(place.choices) if place else []
    if architecture:
        strategy = attempt(lambda: supported(architecture, strategy, given, choices)) or strategy
    host = attempt(lambda: host_ram_of(options["host_ram"]))
    attempt(lambda: check_strategy(strategy, "--{}", place.targets if place else []))
    data = None
    if architecture and recipe:
        attempt(lambda: check_targets(architecture, recipe, "--targets"))
        data = attempt(lambda: data_of(options, architecture, recipe, choices))
    if problems or architecture is None or place is None or recipe is None or data is None:
        raise RequestError(problems)
    planned = recipe
    if data.longest is not None and data.longest < recipe.seq_len:
        planned = at_length(recipe, data.longest)
        reason = f"the longest example has {data.longest} of {recipe.seq_len} tokens"
        choices.append(Choice("planned length", str(data.longest), reason))
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
        targets=place.targets,
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


def fixed_by(given: Collection[str]) -> frozenset[str]:
    """The strategy's fields that the person passed, and whose option was not `auto`."""
    return frozenset(field for field in STRATEGY_FIELDS if OPTION_OF.get(field, field) in given)


# --- recipe and strategy ----------------------------------------------------------------------------------------------


def strategy_of(options: Options, world_size: int) -> Strategy:
    """The strategy of the command line, with the defaults of what is open."""

    def value(name: str, default: Any) -> Any:
        return default if options[name] == AUTO else options[name]

    return Strategy(
        world_size=world_size,
        micro_batch=value("micro_batch", 1),
        gradient_accumulation=accumulation_of(options, world_size),
        gradient_checkpointing=not options["no_gradient_checkpointing"],
        attention=value("attention", "sdpa"),
        loss=value("loss", "chunked"),
        paged_optimizer=value("optimizer", "paged_adamw_32bit").startswith("paged_"),
        zero_stage=value("zero_stage", 0),
        offload=value("offload", "none"),
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
    asked = {name: getattr(strategy, name) if name in given else "" for name in ("attention", "loss")}
    check_architecture(architecture, asked["attention"], asked["loss"], "--{}")
    fitting = fitting_defaults(architecture, strategy)
    if fitting.attention != strategy.attention:
        reason = f"transformers has no {strategy.attention} for {architecture.model_type}"
        choices.append(Choice("attention", fitting.attention, reason))
    if fitting.loss != strategy.loss:
        choices.append(Choice("loss", fitting.loss, f"{architecture.model_type} changes its logits before the loss"))
    return fitting


def recipe_of(options: Options, world_size: int, open_fields: Collection[str]) -> Recipe:
    """The recipe of the command line."""
    method, targets = options["method"], options["targets"]
    quantization: Quantization = options["quant"] or ("nf4" if method == "qlora" else "none")
    four_bit = quantization in ("nf4", "fp4")
    problems = []
    if options["no_double_quant"] and not four_bit:
        rule = f"only nf4 and fp4 have constants that could be quantized again, and the base is {quantization}"
        problems.append(Problem("--no-double-quant", "", rule, "Leave --no-double-quant out"))
    names = split(targets)
    length = 512 if options["seq_len"] == AUTO else options["seq_len"]
    size = 1 if options["micro_batch"] == AUTO else options["micro_batch"]
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
            seq_len=length,
            tokens_per_step=options["tokens_per_step"] or length * size * world_size,
        )
    except RecipeError as error:
        fields = {mistake.fields[0] for mistake in error.mistakes}
        own = [each for each in error.mistakes if each.fields[0] != "tokens_per_step" or "seq_len" not in fields]
        made_up = options["tokens_per_step"] is None
        raise RequestError([*problems, *(flag_problem(mistake, made_up) for mistake in own)]) from None
    fixed = size * world_size
    closed = not {"micro_batch", "world_size"} & set(open_fields)
    if options["tokens_per_step"] and closed and recipe.sequences_per_step % fixed:
        rule = f"a step of {recipe.sequences_per_step} sequences does not come out even in {fixed} at a time"
        remedy = f"The nearest is {max(1, round(recipe.sequences_per_step / fixed)) * fixed * length}"
        problems.append(Problem("--tokens-per-step", str(options["tokens_per_step"]), rule, remedy))
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


def host_ram_of(gib: float | None) -> int | None:
    """The host's memory in bytes, where it was stated."""
    if gib is not None and not math.isfinite(gib * GIB):
        raise request_error("--host-ram", gib, "it must be a number of GiB", "Leave it out where it is not known")
    return None if gib is None else round(gib * GIB)


# --- the data ---------------------------------------------------------------------------------------------------------


def data_of(options: Options, architecture: ModelArchitecture, recipe: Recipe, choices: list[Choice]) -> Data:
    """What is known of the data: from --tokens, or from --data by the model's own tokenizer.

    Raises:
        RequestError: both were passed, or the file cannot be read as a run would read it.
    """
    tokens, path = options["tokens"], options["data"]
    if tokens is not None and path is not None:
        raise request_error("--data", path, "--tokens says how much there is already", "Pass one of the two")
    if path is None:
        return Data(tokens)
    from launch.data import measured

    return measured(Path(path), architecture, recipe, choices)


# --- the devices ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices that an answer is for.

    Attributes:
        targets: by memory.
        world_size: how many of one kind work together, unless that is open.
        named: the one whose estimate is wanted.
    """

    targets: tuple[Target, ...]
    world_size: int
    named: str | None = None
    choices: tuple[Choice, ...] = ()
    warnings: tuple[str, ...] = ()
    currency: str | None = None


def place_of(options: Options) -> Devices:
    """The devices of the command line: a cluster's, those named, this machine's, or the common ones."""
    if options["cluster"] is not None:
        return of_cluster(options)
    names = names_of(options)
    if names:
        return named_devices(names, options)
    if options["gpus"] is None and (found := this_machine(options)) is not None:
        return found
    note: tuple[Choice, ...] = ()
    if options["gpus"] is None:
        note = (Choice("gpus", "1", "this machine shows no NVIDIA GPU, so one of each common kind is looked at"),)
    return replace(named_devices(list(COMMON), options), named=None, choices=note)


def count_of(options: Options, otherwise: int = 1) -> int:
    """The number of GPUs that was passed."""
    return options["gpus"] if isinstance(options["gpus"], int) else otherwise


def names_of(options: Options) -> list[str]:
    """The kinds of device that were named."""
    compared = options["compare"]
    names = [] if compared is None else [name for name in compared.split(",") if name.strip()]
    if compared is not None and not names:
        raise request_error("--compare", compared, "it names no GPU", "Name some, such as --compare t4,a100-40gb")
    asked = [options["gpu"]] if options["gpu"] is not None else []
    return [*asked, *names]


def named_devices(names: list[str], options: Options) -> Devices:
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
    asked = target_named(options["gpu"], options).name if options["gpu"] else None
    return Devices(by_memory(targets.values()), count_of(options), asked)


def by_memory(targets: Collection[Target]) -> tuple[Target, ...]:
    """The smallest memory first."""
    return tuple(sorted(targets, key=lambda target: target.usable_bytes))


def target_named(name: str, options: Options) -> Target:
    """The device of that name: a GPU of the catalogue, or this host's processor."""
    compute_dtype, workers = options["compute_dtype"], count_of(options)
    if name.strip().lower() != "cpu":
        pool = any_nodes(
            find_gpu(name),
            count_of(options, 1 if options["gpus"] is None and options["objective"] is None else NODE_GPUS),
        )
        return pool_target(pool, compute_dtype, workers)
    import psutil  # only where the CPU is asked for: it costs the start of every other plan

    return cpu_target(compute_dtype, workers, psutil.virtual_memory().available, has_amx())


def has_amx() -> bool:
    """Whether this processor has AMX tiles; only Linux says so without asking the processor."""
    try:
        return "amx_tile" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def of_cluster(options: Options) -> Devices:
    """The pools of --cluster that have as many GPUs as were asked for."""
    from orchestrator.discovery import find_cluster

    for other in ("gpu", "compare"):
        if options[other] is not None:
            rule, remedy = "--cluster says which GPUs there are", "Leave one of the two out"
            raise request_error(f"--{other}", options[other], rule, remedy)
    cluster = find_cluster(options["cluster"])
    return pools_of(cluster, options, count_of(options))


def this_machine(options: Options) -> Devices | None:
    """All GPUs of this machine's largest kind; None where it has none."""
    import shutil

    if shutil.which("nvidia-smi") is None:
        return None
    from orchestrator import discovery

    cluster = discovery.this_machine()
    if cluster is None or not cluster.pools:
        return None
    most = max(cluster.pools, key=lambda pool: pool.gpus * pool.usable_bytes)
    found = pools_of(replace(cluster, pools=(most,)), options, most.gpus)
    note = Choice("gpus", str(most.gpus), f"what this machine has: {most.gpus} x {most.gpu.name}")
    left = tuple(f"{pool.gpu.name} of this machine is left out" for pool in cluster.pools if pool is not most)
    return replace(found, choices=(note,), warnings=(*left, *found.warnings))


def pools_of(cluster: Cluster, options: Options, world_size: int) -> Devices:
    """A cluster's pools as devices."""
    enough = [pool for pool in cluster.pools if pool.gpus >= world_size]
    if not enough:
        most = max((pool.gpus for pool in cluster.pools), default=0)
        raise request_error(
            "--gpus", world_size, f"the largest pool has {most}", f"Ask for {most} or fewer, or for auto"
        )
    targets = [target_of(pool, cluster, options, world_size) for pool in enough]
    return Devices(
        by_memory(targets),
        world_size,
        warnings=(*cluster.unknown, *cluster.remarks),
        currency=cluster.currency,
    )


def target_of(pool: Pool, cluster: Cluster, options: Options, world_size: int) -> Target:
    """A pool's GPU, called like its kind where that is unlike the others', else like the pool."""
    alike = sum(other.gpu.name == pool.gpu.name for other in cluster.pools)
    named = replace(pool, name=pool.gpu.name) if alike == 1 else pool
    return pool_target(named, options["compute_dtype"], world_size)
