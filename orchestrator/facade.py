"""`plan`: the planner's front door for Python. What it is asked is checked here, all of it at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import get_args

from clusters.cluster import Cluster
from clusters.errors import Problem, RequestError
from clusters.gpu import COMMON, find_gpu
from orchestrator.devices import NODE_GPUS, any_nodes, is_cpu, this_cpu
from orchestrator.history import NOTHING_MEASURED, History
from orchestrator.planner import fitting_defaults, plan_question, targets_of
from orchestrator.plans import Objective, Plan
from orchestrator.question import OPEN_FIELDS, STRATEGY_FIELDS, Question
from orchestrator.rules import check_attention, check_loss, check_packing, check_quantized, check_strategy
from orchestrator.targets import check_targets
from qlora_core.architecture import ModelArchitecture
from qlora_core.catalogue import find_model
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy, broken


def plan(
    model: str | ModelArchitecture,
    *,
    recipe: Recipe | None = None,
    strategy: Strategy | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    cluster: Cluster | None = None,
    objective: Objective | None = None,
    open_fields: Collection[str] = (),
    tokens: int | None = None,
    history: History = NOTHING_MEASURED,
) -> Plan:
    """Whether a fine-tune fits, on what, how long it takes, and the other ways to run it. Prints and plots nothing.

    Without `gpu` and `cluster` the common GPUs are compared. With an `objective`, all fields of the strategy that are
    not given are the planner's to choose, and `gpus` is too if it is not given; `open_fields` opens single ones.

    Args:
        model: a name of the catalogue, a folder, a Hub id, or shapes.
        recipe: what the mathematics fixes; 512 tokens a sequence, rank 64 and so on where it is not given.
        strategy: how it is met; the defaults of `qlora-plan` where it is not given.
        gpu: the catalogue's name of a GPU, or cpu for this host's processor.
        gpus: how many; of a processor, processes.
        cluster: pools of nodes to plan for (`clusters.cluster.load_cluster`).
        objective: what the search looks for.
        open_fields: names of OPEN_FIELDS that may be chosen.
        tokens: that the whole run trains on, for its time and price.
        history: measured runs that correct the plan (`orchestrator.ledger.read_history`).

    Raises:
        RequestError: with everything that is wrong with the request.
    """
    wrong = list(mistakes(strategy, gpu, gpus, objective, open_fields, tokens))
    wrong = wrong or list(contradictions(recipe, strategy, gpu, gpus, cluster, objective, open_fields))
    if wrong:
        raise RequestError(wrong)
    try:
        architecture = find_model(model) if isinstance(model, str) else model
    except RequestError as error:
        raise error.named({"--model": "model"}) from None
    opened = set(open_fields)
    if objective is not None and strategy is None:
        opened |= set(STRATEGY_FIELDS) - ({"world_size"} if gpus else set())
    if objective == "longest":
        opened.add("seq_len")
    given = strategy or fitting_defaults(architecture, Strategy())
    if gpus is not None:
        given = replace(given, world_size=gpus)
    if recipe is not None and strategy is None:
        given = replace(given, gradient_accumulation=max(1, recipe.sequences_per_step // given.world_size))
    # as `qlora-plan` has it, which runs without autocast unless it is asked for
    step = recipe or Recipe(tokens_per_step=512 * given.sequences_per_step, autocast=False)
    if is_cpu(gpu):
        targets = [this_cpu(step.compute_dtype, given.world_size)]
    else:
        number = given.world_size if "world_size" not in opened else NODE_GPUS
        pools = cluster.pools if cluster else [any_nodes(find_gpu(name), number) for name in ([gpu] if gpu else COMMON)]
        targets = targets_of(pools, step.compute_dtype, given.world_size)
    check_targets(architecture, step)
    check_packing(architecture, step)
    check_quantized(architecture, step)
    check_attention(architecture, given.attention, "strategy.{}")
    check_strategy(step, given, "strategy.{}", targets)
    check_loss(architecture, step, given, "strategy.{}", targets)
    question = Question(
        architecture, step, given, frozenset(opened), recipe is not None and strategy is None, objective or "fastest"
    )
    return plan_question(
        question,
        targets,
        tokens=tokens,
        currency=cluster.currency if cluster else None,
        history=history,
        searched=frozenset(STRATEGY_FIELDS) - ({"world_size"} if gpus else set()) if strategy is None else frozenset(),
        alternatives="all",
    )


def mistakes(
    strategy: Strategy | None,
    gpu: str | None,
    gpus: int | None,
    objective: str | None,
    open_fields: Collection[str],
    tokens: int | None,
) -> Iterator[Problem]:
    """What is wrong with arguments of `plan`, each by itself."""
    if strategy is not None:
        for name, value, rule in broken(strategy):
            yield Problem(f"strategy.{name}", str(value), rule, "Correct it")
    if gpu is not None and not is_cpu(gpu):
        try:
            find_gpu(gpu)
        except RequestError as error:
            yield from error.at("gpu").problems
    for where, number in (("gpus", gpus), ("tokens", tokens)):
        if number is not None and (type(number) is not int or number < 1):
            rule = "it must be a whole number, at least 1"
            yield Problem(where, str(number), rule, "Leave it out where it is not known")
    if objective is not None and objective not in get_args(Objective):
        yield Problem("objective", objective, "no such objective", f"There are {', '.join(get_args(Objective))}")
    for name in open_fields:
        if name not in OPEN_FIELDS:
            yield Problem("open_fields", name, "no such field", f"There are {', '.join(OPEN_FIELDS)}")


def contradictions(
    recipe: Recipe | None,
    strategy: Strategy | None,
    gpu: str | None,
    gpus: int | None,
    cluster: Cluster | None,
    objective: str | None,
    open_fields: Collection[str],
) -> Iterator[Problem]:
    """What is wrong with the arguments of `plan` beside each other, each of them being right."""
    if objective is not None and strategy is not None and not open_fields:
        rule = "an objective chooses the strategy, which is given"
        yield Problem("strategy", "", rule, "Leave one of them out, or say in open_fields what may be chosen")
    if cluster is not None and gpu is not None:
        yield Problem("gpu", gpu, "the cluster says which GPUs there are", "Leave one of the two out")
    if cluster is not None and gpus is not None:
        most = max((pool.gpus for pool in cluster.pools), default=0)
        if gpus > most:
            yield Problem("gpus", str(gpus), f"the largest pool has {most}", f"Ask for {most} or fewer")
    if "seq_len" in open_fields and objective != "longest":
        rule = "only the objective longest chooses it"
        yield Problem("open_fields", "seq_len", rule, "Ask for that, or leave it out")
    if recipe is not None and strategy is not None and not open_fields:
        whole = replace(strategy, world_size=gpus or strategy.world_size)
        of_recipe, of_strategy = recipe.sequences_per_step, whole.sequences_per_step
        if of_recipe != of_strategy:
            rule = f"the recipe's step has {of_recipe} sequences, and the strategy's {of_strategy}"
            yield Problem("strategy", "", rule, "Change micro_batch, gradient_accumulation or tokens_per_step")
