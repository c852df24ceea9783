"""The planner: what a request needs, where it fits, and what to choose where the person left it open."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from clusters.errors import Problem, RequestError
from clusters.gpu import GIB, Gpu
from orchestrator.plans import Choice, Plan, Target, Verdict
from qlora_core.architecture import ModelArchitecture
from qlora_core.memory.device import Device
from qlora_core.memory.estimate import Estimate
from qlora_core.memory.formula import estimate, prepared
from qlora_core.recipe import Dtype, Recipe
from qlora_core.strategy import Strategy, ZeroStage

EstimatorFunction = Callable[[ModelArchitecture, Recipe, Strategy, Device], Estimate]
"""What the formula and the trace both are."""

if TYPE_CHECKING:
    from orchestrator.spec import RunSpec, StrategySpec  # reads YAML, which `qlora-plan` need not import

LARGEST_MICRO_BATCH = 4096
LONGEST_SEQ_LEN = 2**22
ON_CPU = "paging needs CUDA; on a CPU the state is ordinary memory"
AUTO_MICRO_BATCH = 16
"""The planner takes no larger micro-batch by itself: past it, GPUs gain nothing and memory is risked."""


def compute_dtype(requested: str, kind: str, capability: tuple[int, int], has_amx: bool = False) -> Choice:
    """The dtype of activations and dequantized weights, with its reason."""
    if requested != "auto":
        reason = "asked for"
        if requested == "bfloat16" and kind == "cuda" and capability < (8, 0):
            reason = f"asked for, though compute capability {capability[0]}.{capability[1]} only emulates it"
        return Choice("compute_dtype", requested, reason)
    if kind == "cpu":
        if has_amx:
            return Choice("compute_dtype", "bfloat16", "this CPU has AMX tiles for bfloat16")
        return Choice(
            "compute_dtype", "float32", "a CPU without AMX computes about 1.5 times faster in it than in bfloat16"
        )
    if capability >= (8, 0):
        return Choice("compute_dtype", "bfloat16", "the GPU has bfloat16 (Ampere and later)")
    return Choice("compute_dtype", "float16", "the GPU is older than Ampere and has no bfloat16")


def gpu_target(gpu: Gpu, requested_dtype: str, ranks_per_host: int = 1) -> Target:
    """A GPU of the catalogue as the target of a plan."""
    choice = compute_dtype(requested_dtype, "cuda", gpu.compute_capability)
    device = Device(
        kind="cuda",
        compute_dtype=as_dtype(choice.value),
        context_bytes=gpu.context_bytes,
        compute_capability=gpu.compute_capability,
        ranks_per_host=ranks_per_host,
    )
    return Target(gpu.name, device, gpu.usable_bytes, choice)


def cpu_target(requested_dtype: str, workers: int, memory_bytes: int, has_amx: bool = False) -> Target:
    """A host's CPU as the target of a plan: `workers` processes share its free memory."""
    choice = compute_dtype(requested_dtype, "cpu", (0, 0), has_amx)
    device = Device(kind="cpu", compute_dtype=as_dtype(choice.value), ranks_per_host=workers)
    return Target("cpu", device, memory_bytes // workers, choice)


def as_dtype(value: str) -> Dtype:
    """`value` as one of the dtypes that a recipe knows."""
    known: dict[str, Dtype] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
    return known[value]


def verdict(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, target: Target, needed: Estimate
) -> Verdict:
    """Whether it fits on `target`, with the largest micro-batch and the longest sequence that would."""
    gpu = needed.gpu
    sizes = prepared(architecture, recipe, strategy, target.device)

    def with_micro_batch(value: int) -> int:
        return sizes.process_bytes(value, recipe.seq_len)

    def with_seq_len(value: int) -> int:
        return sizes.process_bytes(strategy.micro_batch, value)

    def limit(size: Callable[[int], int], asked: int, most: int) -> int:
        return largest(size, target.usable_bytes, most, start=(asked, gpu.process_bytes))

    headroom = target.usable_bytes - gpu.process_bytes
    return Verdict(
        gpu=target.name,
        usable_bytes=target.usable_bytes,
        allocated_bytes=gpu.allocated_bytes,
        reserved_bytes=gpu.reserved_bytes,
        process_bytes=gpu.process_bytes,
        fits=headroom >= 0,
        headroom_bytes=headroom,
        largest_micro_batch=limit(with_micro_batch, strategy.micro_batch, LARGEST_MICRO_BATCH),
        longest_seq_len=limit(with_seq_len, recipe.seq_len, LONGEST_SEQ_LEN),
    )


def largest(size: Callable[[int], int], usable: int, limit: int, start: tuple[int, int]) -> int:
    """The largest integer up to `limit` (or `start`'s) whose `size` is at most `usable`; 0 if not even 1's is.

    Sizes never fall and grow almost linearly, so that a line through two of them leads there in a few evaluations
    where halving takes twenty; after each that does not halve the range, the range is halved. `start` is a value and
    its size, which is known.
    """
    low, high = (0, 0), (max(limit, start[0]) + 1, 0)  # what fits and what does not, each with its size; 0: unknown
    probe = start
    while True:
        before = high[0] - low[0]
        if probe[1] <= usable:
            low = probe
        else:
            high = probe
        gap = high[0] - low[0]
        if gap <= 1:
            return low[0]
        if low[0] == 0:
            value = 1
        elif low[0] == 1 and not high[1]:
            value = 2
        elif high[1] and gap > before // 2:
            value = low[0] + gap // 2
        else:
            (x, size_x), (y, size_y) = (low, high) if high[1] else ((1, size(1)), low)
            steps = (usable - low[1]) * (y - x) // (size_y - size_x) if size_y > size_x else gap
            value = min(low[0] + max(steps, 1), high[0] - 1)
        probe = value, size(value)


def plan_request(
    architecture: ModelArchitecture,
    recipe: Recipe,
    strategy: Strategy,
    targets: Sequence[Target],
    *,
    asked: str | None = None,
    choices: Sequence[Choice] = (),
    host_usable_bytes: int | None = None,
    estimator: EstimatorFunction = estimate,
) -> Plan:
    """Answer a request exactly as it was made, for each of `targets` (ordered by memory, at least one).

    `estimator` answers the request itself; the limits of a verdict are the formula's. `asked` names the target whose
    estimate is wanted; else it is the first that fits, else the last.
    """
    estimates = [estimator(architecture, recipe, strategy, target.device) for target in targets]
    verdicts = tuple(
        verdict(architecture, recipe, strategy, target, needed)
        for target, needed in zip(targets, estimates, strict=True)
    )
    wanted = (index for index, answer in enumerate(verdicts) if (answer.gpu == asked if asked else answer.fits))
    shown = next(wanted, len(targets) - 1)
    decided = [targets[shown].dtype_choice, *choices]
    if strategy.paged_optimizer and targets[shown].device.kind == "cpu":
        strategy = dataclasses.replace(strategy, paged_optimizer=False)
        decided.append(Choice("paged_optimizer", "false", ON_CPU))
    return Plan(
        architecture=architecture,
        recipe=recipe,
        strategy=strategy,
        target=targets[shown],
        estimate=estimates[shown],
        verdicts=verdicts,
        choices=tuple(decided),
        warnings=(
            *warnings(architecture, recipe, strategy, targets),
            *open_verdict(estimates[shown], targets[shown]),
        ),
        host_usable_bytes=host_usable_bytes,
    )


def open_verdict(needed: Estimate, target: Target) -> Iterator[str]:
    """Whether fragmentation may decide the verdict."""
    low, high = (bound + target.device.context_bytes for bound in needed.gpu.reserved_interval)
    if low <= target.usable_bytes < high:
        yield (
            f"{target.name} has {target.usable_bytes / GIB:.2f} GiB usable, and the process needs {low / GIB:.2f} to "
            f"{high / GIB:.2f}, by how its memory fragments: --estimator trace is more exact"
        )


def warnings(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, targets: Sequence[Target]
) -> Iterator[str]:
    """What can be computed, but hardly run."""
    if recipe.seq_len > architecture.max_position_embeddings:
        yield (
            f"seq-len {recipe.seq_len} is longer than the {architecture.max_position_embeddings} positions that "
            f"{architecture.name} was trained for; its position embedding would have to be stretched"
        )
    without = [target.name for target in targets if not target.device.flash_attention]
    if strategy.attention == "flash_attention_2" and without:
        yield f"flash_attention_2 needs an Ampere GPU or newer, so it does not run on {', '.join(without)}"


def plan_run(
    spec: RunSpec, architecture: ModelArchitecture, target: Target, devices: int, *, longest: int | None = None
) -> Plan:
    """The plan of a run: what the specification fixed stays, the rest is chosen.

    There are `devices` of the kind `target`. `longest` is the tokens of the longest example, where the data is known;
    memory is planned for it.

    Raises:
        RequestError: the fixed parts contradict each other.
    """
    recipe = spec.recipe
    choices: list[Choice] = []
    if longest is not None and longest < recipe.seq_len:
        choices.append(
            Choice("planned length", str(longest), f"the longest example has {longest} of {recipe.seq_len} tokens")
        )
    planned = recipe if longest is None else at_length(recipe, min(longest, recipe.seq_len))
    request = spec.strategy_request
    world_size = choose_world_size(request, recipe, devices, target, choices)
    check_architecture(architecture, request)
    strategies = candidates(architecture, request, recipe, world_size, target)
    check_strategy(strategies[0], "strategy.{}", [target])
    fitting = (
        strategy
        for strategy in strategies
        if prepared(architecture, planned, strategy, target.device).process_bytes(strategy.micro_batch, planned.seq_len)
        <= target.usable_bytes
    )
    best = plan_request(architecture, planned, next(fitting, strategies[-1]), [target])
    choices += strategy_choices(request, best)
    return dataclasses.replace(best, recipe=recipe, choices=(*best.choices, *choices))


def check_strategy(strategy: Strategy, where: str, targets: Sequence[Target]) -> None:
    """Raise a RequestError for what neither DeepSpeed nor any of `targets` can do.

    `where` is how a field is written where the person wrote it, with {} for its name.
    """
    problems = []
    if strategy.offload != "none" and strategy.zero_stage == 0:
        rule, remedy = (
            "only DeepSpeed offloads, and ZeRO stage 0 is without it",
            "Choose ZeRO stage 2 or 3, or no offload",
        )
        problems.append(Problem(where.format("offload"), strategy.offload, rule, remedy))
    if strategy.offload == "all" and strategy.zero_stage in (1, 2):
        rule, remedy = "only ZeRO stage 3 offloads the base model", "Choose ZeRO stage 3, or offload the optimizer"
        problems.append(Problem(where.format("offload"), "all", rule, remedy))
    no_gpu = bool(targets) and all(target.device.kind == "cpu" for target in targets)
    if strategy.attention == "flash_attention_2" and no_gpu:
        problems.append(Problem(where.format("attention"), "flash_attention_2", "it needs a CUDA GPU", "Use sdpa"))
    if problems:
        raise RequestError(problems)


def at_length(recipe: Recipe, seq_len: int) -> Recipe:
    """`recipe` with sequences of another length, and as many of them in a step."""
    return dataclasses.replace(recipe, seq_len=seq_len, tokens_per_step=seq_len * recipe.sequences_per_step)


def choose_world_size(
    request: StrategySpec, recipe: Recipe, devices: int, target: Target, choices: list[Choice]
) -> int:
    """The number of workers: as asked, or all GPUs that divide the step evenly; one process on a CPU."""
    sequences = recipe.sequences_per_step
    if request.world_size != "auto":
        world_size, where = request.world_size, "strategy.world_size"
        problems = []
        if target.device.kind == "cuda" and world_size > devices:
            rule = f"there {'is 1 GPU' if devices == 1 else f'are {devices} GPUs'}"
            problems.append(Problem(where, str(world_size), rule, "Ask for no more than that"))
        if sequences % world_size:
            rule = f"it must divide the {sequences} sequences of a step (tokens_per_step / seq_len)"
            remedy = f"Use {nearest_divisors(sequences, world_size)}, or change recipe.tokens_per_step"
            problems.append(Problem(where, str(world_size), rule, remedy))
        if problems:
            raise RequestError(problems)
        return world_size
    if target.device.kind == "cpu":
        choices.append(Choice("world_size", "1", "processes on one CPU share its cores"))
        return 1
    world_size = max(size for size in divisors(sequences) if size <= max(devices, 1))
    found = "the only GPU" if devices == 1 else f"all {devices} GPUs"
    reason = found if world_size == devices else f"of {devices} GPUs; it must divide {sequences} sequences"
    choices.append(Choice("world_size", str(world_size), reason))
    return world_size


def check_architecture(architecture: ModelArchitecture, request: StrategySpec) -> None:
    """Raise a RequestError for a strategy that the model's own code cannot follow."""
    problems = []
    if request.attention == "sdpa" and not architecture.has_sdpa:
        rule = f"transformers has no such attention for {architecture.model_type}"
        problems.append(Problem("strategy.attention", "sdpa", rule, "Use eager"))
    if request.loss == "chunked" and not architecture.plain_logits:
        rule = f"{architecture.model_type} changes its logits before the loss, which chunks would leave out"
        problems.append(Problem("strategy.loss", "chunked", rule, "Use full"))
    if problems:
        raise RequestError(problems)


def candidates(
    architecture: ModelArchitecture, request: StrategySpec, recipe: Recipe, world_size: int, target: Target
) -> list[Strategy]:
    """Strategies that meet the request, the preferred first: less communication, then larger micro-batches.

    Raises:
        RequestError: a fixed micro-batch that does not divide a rank's share of the step.
    """
    share = recipe.sequences_per_step // world_size
    if request.micro_batch == "auto":
        sizes = [size for size in reversed(divisors(share)) if size <= AUTO_MICRO_BATCH]
    elif share % request.micro_batch == 0:
        sizes = [request.micro_batch]
    else:
        workers = "one worker" if world_size == 1 else f"each of {world_size} workers"
        rule = f"it must divide the {share} sequences of a step on {workers}"
        remedy = f"Use {nearest_divisors(share, request.micro_batch)}, or change recipe.tokens_per_step"
        raise RequestError([Problem("strategy.micro_batch", str(request.micro_batch), rule, remedy)])
    return [
        Strategy(
            world_size=world_size,
            micro_batch=size,
            gradient_accumulation=share // size,
            gradient_checkpointing=request.gradient_checkpointing is not False,
            attention=("sdpa" if architecture.has_sdpa else "eager")
            if request.attention == "auto"
            else request.attention,
            loss=("chunked" if architecture.plain_logits else "full") if request.loss == "auto" else request.loss,
            paged_optimizer=target.device.kind == "cuda" and request.paged_optimizer is not False,
            zero_stage=stage,
            offload="none" if request.offload == "auto" else request.offload,
        )
        for stage in zero_stages(request, world_size)
        for size in sizes
    ]


def zero_stages(request: StrategySpec, world_size: int) -> list[ZeroStage]:
    """The ZeRO stages to try, plain torch first: each stage saves memory and costs communication."""
    if request.zero_stage != "auto":
        return [request.zero_stage]
    if request.offload == "all":
        return [3]
    if request.offload == "optimizer":
        return [2, 3]
    return [0, 2, 3] if world_size > 1 else [0]


def strategy_choices(request: StrategySpec, plan: Plan) -> Iterator[Choice]:
    """Why the open parts of a strategy became what they are; also what was asked for and could not be."""
    strategy = plan.strategy
    if request.micro_batch == "auto":
        reason = "the largest that fits" if plan.fits else "the smallest, and it still does not fit"
        if plan.fits and strategy.micro_batch == AUTO_MICRO_BATCH:
            reason = "larger ones gain nothing"
        yield Choice("micro_batch", str(strategy.micro_batch), reason)
    if request.zero_stage == "auto":
        reasons = {
            0: "everything fits on each GPU, so nothing is sharded",
            2: "gradients and optimizer state do not fit whole on each GPU",
            3: "the base model does not fit whole on each GPU",
        }
        if strategy.offload != "none":
            reasons |= {2: "it offloads the optimizer", 3: f"it offloads what was asked for: {strategy.offload}"}
        if strategy.world_size == 1:
            reasons[0] = "there is one worker, so there is nothing to share out"
        yield Choice("zero_stage", str(strategy.zero_stage), reasons[strategy.zero_stage])
    if request.attention == "auto" and not plan.architecture.has_sdpa:
        yield Choice("attention", "eager", f"transformers has no sdpa for {plan.architecture.model_type}")
    if request.loss == "auto" and not plan.architecture.plain_logits:
        yield Choice("loss", "full", f"{plan.architecture.model_type} changes its logits before the loss")
    if plan.target.device.kind == "cpu":
        if request.paged_optimizer is not False:
            yield Choice("paged_optimizer", "false", ON_CPU)
    elif request.paged_optimizer == "auto":
        yield Choice("paged_optimizer", "true", "survives spikes of memory")


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    small = [value for value in range(1, math.isqrt(number) + 1) if number % value == 0]
    return small + [number // value for value in reversed(small) if value * value != number]


def nearest_divisors(number: int, wanted: int) -> str:
    """The divisors of `number` next to `wanted`, in words."""
    known = divisors(number)
    below = [str(value) for value in known if value < wanted][-1:]
    above = [str(value) for value in known if value > wanted][:1]
    return " or ".join(below + above)
