"""The planner: answers a request as it was made, and chooses what it leaves open."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from clusters.cluster import Pool
from clusters.errors import Problem, RequestError, request_error
from clusters.gpu import GIB
from orchestrator.devices import pool_target
from orchestrator.durations import duration
from orchestrator.history import NOTHING_MEASURED, History
from orchestrator.needs import Estimator, needs
from orchestrator.plans import Alternative, Choice, Plan, Target, at_longest
from orchestrator.question import STRATEGY_FIELDS, Candidate, Place, Question, place_of
from orchestrator.rules import (
    check_attention,
    check_even,
    check_float16,
    check_loss,
    check_packing,
    check_quantized,
    check_strategy,
    stage_for,
    warnings,
)
from orchestrator.verdicts import doubt, verdict
from qlora_core.architecture import ModelArchitecture
from qlora_core.memory.formula import estimate
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

if TYPE_CHECKING:
    from orchestrator.search import Found
    from orchestrator.spec import RunSpec, StrategySpec  # reads YAML, which `qlora-plan` need not import

ON_CPU = "paging needs CUDA; on a CPU the state is ordinary memory"
MOST_ALTERNATIVES = 5


def targets_of(pools: Sequence[Pool], requested_dtype: str, workers: int) -> list[Target]:
    """The pools' GPUs as targets of a plan, the smallest memory first."""
    every = (pool_target(pool, requested_dtype, workers) for pool in pools)
    return sorted(every, key=lambda target: target.usable_bytes)


def fitting_defaults(architecture: ModelArchitecture, strategy: Strategy) -> Strategy:
    """`strategy` with the attention that the model's own code has."""
    return strategy if architecture.has_sdpa or strategy.attention != "sdpa" else replace(strategy, attention="eager")


# --- a request --------------------------------------------------------------------------------------------------------


def plan_question(
    question: Question,
    targets: Sequence[Target],
    *,
    asked: str | None = None,
    compared: Collection[str] = (),
    choices: Sequence[Choice] = (),
    host_usable_bytes: int | None = None,
    estimator: Estimator = estimate,
    tokens: int | None = None,
    filled: float | None = None,
    currency: str | None = None,
    history: History = NOTHING_MEASURED,
    searched: frozenset[str] = frozenset(),
    alternatives: Literal["none", "nearest", "all"] = "none",
) -> Plan:
    """Answer a question: what is fixed as it is, what is open as the search finds it best.

    `targets` are ordered by memory, at least one. Alternatives to what was asked for come from a search that may change
    the fields `searched`; "nearest": only where nothing fits. `compared` are names of targets of which the best way is
    told even where another's is better in everything. `tokens` are those of the whole run, and where they are of
    data, `filled` is the share of a row's positions that they are. See `plan_request` for the rest.
    """
    question = question.informed(history)
    if all(target.device.kind == "cpu" for target in targets):
        # processes on one CPU share its cores, and nothing is paged there
        question = replace(question, open=question.open - {"world_size", "paged_optimizer"})
        searched -= {"world_size", "paged_optimizer"}
    if question.whole_step:
        check_even(question.recipe, question.strategy, question.open, "tokens_per_step")
    common: dict[str, Any] = {"estimator": estimator, "history": history}
    run: dict[str, Any] = {"tokens": tokens, "filled": filled, "currency": currency}
    asked_for, decided = Candidate(question.recipe, question.strategy), list(choices)
    if question.open:
        from orchestrator.reasons import hopeless  # the search's rooms take a while to import
        from orchestrator.search import leanest_of_all, search
        from orchestrator.space import candidates, places

        if found := search(question, targets, compared):
            without = sorted(set(compared) - {one.target.name for one in found})
            decided += [Choice("compare", name, "it does not fit, whatever is chosen") for name in without]
            return chosen(question, found, compared, decided, host_usable_bytes, common, run)
        alone = Place(((targets[-1], question.strategy.world_size),))
        even = (place for place in places(question, targets[-1:]) if any(candidates(question, place)))
        most = max(even, key=lambda place: place.gpus, default=alone)
        asked_for = leanest_of_all(question, most)
        decided += hopeless(question)
    answer = plan_request(
        question.architecture,
        *asked_for,
        targets,
        asked=asked,
        choices=decided,
        hosts=hosts_of(targets, host_usable_bytes),
        **common,
    )
    place = place_of(answer)
    answer = replace(
        answer,
        duration=duration(answer.verdict.step_time, tokens, place.gpus, place.price_per_hour, currency, filled=filled),
    )
    if alternatives == "none" or (alternatives == "nearest" and answer.fits):
        return answer
    from orchestrator.alternatives import Alternatives
    from orchestrator.nearest import under_autocast
    from orchestrator.search import search

    others = Alternatives(question.architecture, history=history, **run)
    if not answer.fits:
        return beside(answer, others.nearest(answer))
    # on all that somebody has; of kinds that are only looked at, on the one shown
    devices = [target for target in targets if target.pool is not None and target.pool.exists] or [answer.target]
    # as a run has it, and faster: who asks without may like to know
    narrow = under_autocast(question.recipe, answer.target.compute_dtype)
    better = others.faster(search(replace(question, recipe=narrow, open=searched), devices), answer)
    step = answer.verdict.step_time
    pace = None if step is None else step.seconds / step.tokens
    return beside(answer, others.beside(question, better[:MOST_ALTERNATIVES], asked_for, pace))


def chosen(
    question: Question,
    found: Sequence[Found],
    compared: Collection[str],
    choices: Sequence[Choice],
    host_usable_bytes: int | None,
    common: dict[str, Any],
    run: dict[str, Any],
) -> Plan:
    """The best that a search found as the plan, and the others beside it."""
    from orchestrator.alternatives import Alternatives
    from orchestrator.reasons import reasons

    others = Alternatives(question.architecture, history=common["history"], **run)
    best = found[0]
    candidate = Candidate(best.recipe, best.strategy)
    group = sorted((target for target, _ in best.place.parts), key=lambda target: target.usable_bytes)
    answer = plan_request(
        question.architecture,
        *candidate,
        group,
        asked=best.target.name,
        choices=[*choices, *reasons(question, best)],
        hosts=hosts_of(group, host_usable_bytes),
        **common,
    )
    mine = others.of("", best.place, best.target, candidate, best.needed, ())
    answer = replace(
        answer,
        # all of the group's GPUs, which may be of two kinds, set the pace
        verdicts=tuple(replace(verdict, step_time=mine.step_time) for verdict in answer.verdicts),
        group=best.place.name if len(best.place.parts) > 1 else None,
        duration=mine.duration,
        objective=question.objective,
    )
    first = {name: next((one for one in found if one.target.name == name), best) for name in compared}
    shown = [
        one for number, one in enumerate(found[1:]) if number < MOST_ALTERNATIVES or one is first.get(one.target.name)
    ]
    return beside(answer, others.beside(question, shown, candidate, best.seconds_per_token))


def beside(answer: Plan, alternatives: Iterable[Alternative]) -> Plan:
    """A plan with its alternatives; what is to be known of several of them is told once."""
    every = tuple(alternatives)
    told = dict.fromkeys([*answer.warnings, *(warning for one in every for warning in one.warnings)])
    return replace(answer, alternatives=every, warnings=tuple(told))


def hosts_of(targets: Sequence[Target], stated: int | None) -> list[int | None]:
    """Memory of a node of each target: as stated for all, else as its pool says."""
    return [stated or (None if target.pool is None else target.pool.host_ram_bytes) for target in targets]


def plan_request(
    architecture: ModelArchitecture,
    recipe: Recipe,
    strategy: Strategy,
    targets: Sequence[Target],
    *,
    asked: str | None = None,
    choices: Sequence[Choice] = (),
    hosts: Sequence[int | None] | None = None,
    estimator: Estimator = estimate,
    history: History = NOTHING_MEASURED,
) -> Plan:
    """Answer a request exactly as it was made, for each of `targets` (ordered by memory, at least one).

    `estimator` answers the request itself; the limits of a verdict are the formula's. `asked` names the target whose
    estimate is wanted; else it is the first that fits, else the last. `hosts` are the bytes of each target's host; what
    nobody stated decides nothing.
    """
    hosts = hosts or [None] * len(targets)
    estimates = [needs(architecture, recipe, strategy, target, estimator) for target in targets]
    verdicts = tuple(
        verdict(architecture, recipe, strategy, target, needed, history, host)
        for target, needed, host in zip(targets, estimates, hosts, strict=True)
    )
    wanted = (index for index, answer in enumerate(verdicts) if (answer.gpu == asked if asked else answer.fits))
    shown = next(wanted, len(targets) - 1)
    decided = [targets[shown].dtype_choice, *autocast_choice(recipe, targets[shown]), *choices]
    if strategy.paged_optimizer and targets[shown].device.kind == "cpu":
        strategy = replace(strategy, paged_optimizer=False)
        decided.append(Choice("paged_optimizer", "false", ON_CPU))
    unsure = doubt(estimates[shown], strategy, targets[shown], verdicts[shown])
    return Plan(
        architecture=architecture,
        recipe=recipe,
        strategy=strategy,
        target=targets[shown],
        estimate=estimates[shown],
        verdicts=verdicts,
        choices=tuple(decided),
        warnings=(*warnings(architecture, recipe, strategy, targets), *([unsure] if unsure else [])),
        host_usable_bytes=hosts[shown],
    )


def autocast_choice(recipe: Recipe, target: Target) -> Iterator[Choice]:
    """What `autocast: auto` came to, where it makes a difference."""
    if recipe.autocast != "auto" or recipe.lora_dtype != "float32" or target.compute_dtype == "float32":
        return
    if recipe.use_dora:
        yield Choice("autocast", "false", "what it makes of DoRA's products is not modelled")
    elif recipe.under_autocast:
        reason = f"the float32 adapters' products in {target.compute_dtype}: faster, and without float32 copies"
        yield Choice("autocast", "true", reason)


# --- a run ------------------------------------------------------------------------------------------------------------


def plan_run(
    spec: RunSpec,
    architecture: ModelArchitecture,
    target: Target,
    devices: int,
    *,
    longest: int | None = None,
    history: History = NOTHING_MEASURED,
    at_most: int | None = None,
) -> Plan:
    """The plan of a run: what the specification fixed stays, the rest is chosen for speed.

    There are `devices` of the kind `target`. `longest` is the tokens of the longest example or packed row, where the
    data is known; memory is planned for it. `at_most` are the bytes of a process that are looked for, where a plan that
    should have fitted did not.

    The specification holds nothing that `prepare.refuse_unbuilt` refuses.

    Raises:
        RequestError: the fixed parts contradict each other.
    """
    recipe, request = spec.recipe, spec.strategy_request
    planned, choices = planned_for(recipe, longest)
    world_size = choose_world_size(request, recipe, devices, target, choices)
    target = shared_by(target, world_size, devices)
    check_attention(architecture, request.attention, "strategy.{}")
    check_packing(architecture, recipe)
    check_quantized(architecture, recipe)
    check_micro_batch(request, recipe, world_size)
    question = question_of(request, architecture, planned, world_size, target).informed(history)
    if target.compute_dtype == "float16":
        check_float16(recipe)
    check_strategy(recipe, question.strategy, "strategy.{}", [target])
    check_loss(architecture, recipe, question.strategy, "strategy.{}", [target])
    from orchestrator.reasons import hopeless, reasons
    from orchestrator.search import best_of, leanest_of_all

    room = target
    if at_most is not None and (within := as_measured(question, target, at_most)) < target.usable_bytes:
        room = replace(target, usable_bytes=within)
        reason = "a plan for this that was to need a tenth more, and should have fitted, ran out of memory"
        choices.append(Choice("process", f"at most {at_most / GIB:.2f} GiB", reason))
    place = Place(((room, world_size),))
    best = best_of(question, place)
    if best is None:
        candidate = leanest_of_all(question, place)
        choices += hopeless(question)
    else:
        candidate = Candidate(best.recipe, best.strategy)
        choices += reasons(question, best)
    answer = plan_request(architecture, *candidate, [target], hosts=hosts_of([target], None), history=history)
    if target.device.kind == "cpu" and request.paged_optimizer is not False:
        choices.append(Choice("paged_optimizer", "false", ON_CPU))
    return replace(answer, recipe=recipe, longest=longest, choices=(*answer.choices, *choices))


def shared_by(target: Target, world_size: int, devices: int) -> Target:
    """`target` for so many workers, as many of them on a host as a node of its pool, else this machine, has GPUs."""
    if target.device.kind == "cpu":
        return target
    a_node = devices if target.pool is None else target.pool.gpus_per_node
    return replace(target, device=replace(target.device, ranks_per_host=min(world_size, a_node)))


def as_measured(question: Question, target: Target, process_bytes: int) -> int:
    """What a process that is predicted to need so many bytes takes at least, by earlier runs."""
    context = target.device.context_bytes
    spreads = (question.spread(target, sharded) for sharded in (False, True))
    return context + int((process_bytes - context) * min(1 if one is None else one.middle for one in spreads))


def question_of(
    request: StrategySpec, architecture: ModelArchitecture, recipe: Recipe, world_size: int, target: Target
) -> Question:
    """A specification's strategy as a question: what is auto is open."""
    defaults = fitting_defaults(architecture, Strategy(world_size=world_size))
    given: dict[str, Any] = {
        field: getattr(defaults, field) if getattr(request, field) == "auto" else getattr(request, field)
        for field in STRATEGY_FIELDS
    }
    open_fields = {field for field in STRATEGY_FIELDS if getattr(request, field) == "auto"} - {"world_size"}
    if target.device.kind == "cpu":
        given["paged_optimizer"] = False
        open_fields -= {"paged_optimizer"}
    if request.offload == "auto":
        open_fields -= {"offload"}  # a run offloads only where it was asked to: the host's memory need not be known
    elif request.zero_stage == "auto":
        given["zero_stage"] = stage_for(request.offload)
    return Question(
        architecture,
        recipe,
        Strategy(**given),
        frozenset(open_fields),
        whole_step=True,
        has_liger=target.has_liger,
    )


def planned_for(recipe: Recipe, longest: int | None) -> tuple[Recipe, list[Choice]]:
    """`recipe` as it is planned for data (`plans.at_longest`), and that choice where there is one."""
    planned = at_longest(recipe, longest)
    if planned is recipe:
        return recipe, []
    kind = "packed row" if recipe.packing else "example"
    reason = f"the longest {kind} has {longest} of {recipe.seq_len} tokens"
    return planned, [Choice("planned length", str(longest), reason)]


def choose_world_size(
    request: StrategySpec, recipe: Recipe, devices: int, target: Target, choices: list[Choice]
) -> int:
    """The number of workers: as asked, or the most GPUs that divide the step evenly; one process on a CPU."""
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


def check_micro_batch(request: StrategySpec, recipe: Recipe, world_size: int) -> None:
    """Raise a RequestError for a fixed micro-batch that does not divide a rank's share of the step."""
    share = recipe.sequences_per_step // world_size
    if request.micro_batch == "auto" or share % request.micro_batch == 0:
        return
    workers = "one worker" if world_size == 1 else f"each of {world_size} workers"
    rule = f"it must divide the {share} sequences of a step on {workers}"
    remedy = f"Use {nearest_divisors(share, request.micro_batch)}, or change recipe.tokens_per_step"
    raise request_error("strategy.micro_batch", request.micro_batch, rule, remedy)


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
