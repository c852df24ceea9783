"""Where a request does not fit: what is offered instead fits, says what it costs, and comes in the order of that."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from clusters.gpu import find_gpu, list_gpus
from orchestrator.devices import cpu_target, gpu_target
from orchestrator.history import NOTHING_MEASURED, History, MeasuredRun
from orchestrator.planner import plan_question
from orchestrator.plans import Alternative, Plan, Target
from orchestrator.question import Question
from qlora_core.catalogue import find_model
from qlora_core.memory.estimate import Estimate
from qlora_core.memory.formula import estimate
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

GIB = 1024**3
LARGER = "a larger GPU"
ORDER = [
    # nothing but the code is another
    "sdpa attention",
    "autocast",
    "no float32 upcast",
    # the same step, more slowly
    "a chunked loss",
    "a smaller micro-batch",
    "paged optimizer state",
    "gradient checkpointing",
    # the same step, for more money
    "a higher ZeRO stage",
    "more GPUs",
    "offloading",
    # another step
    "8-bit optimizer state",
    "a 4-bit base (QLoRA)",
    "shorter sequences",
    "a smaller rank",
    LARGER,
]
"""From what costs the person least to what costs most."""

Fields = dict[str, Any]


def target(gpu: str, usable: float | None = None) -> Target:
    found = gpu_target(find_gpu(gpu), "auto")
    return found if usable is None else dataclasses.replace(found, usable_bytes=round(usable * GIB))


def answer(
    model: str,
    on: Target,
    recipe: Fields | None = None,
    strategy: Fields | None = None,
    history: History = NOTHING_MEASURED,
) -> Plan:
    """What is said to a request of which nothing may be chosen."""
    how = Strategy(**(strategy or {}))
    fields: Fields = {"seq_len": 512, **(recipe or {})}
    what = Recipe(**fields, tokens_per_step=fields["seq_len"] * how.sequences_per_step)
    asked = Question(find_model(model), what, how, frozenset(), whole_step=False)
    return plan_question(asked, [on], alternatives="nearest", history=history)


def titles(plan: Plan) -> list[str]:
    return [each.title for each in plan.alternatives]


def needs(plan: Plan, offered: Alternative) -> Estimate:
    """Asked anew, on the GPU that is offered."""
    device = plan.target.device
    if offered.gpu != plan.target.name:
        device = gpu_target(find_gpu(offered.gpu), "auto").device
    device = dataclasses.replace(device, ranks_per_host=min(offered.gpus, 8))
    return estimate(plan.architecture, offered.recipe, offered.strategy, device)


REQUESTS: dict[str, tuple[str, Target, Fields, Fields]] = {
    "a large micro-batch": ("7b", target("t4"), {"seq_len": 2048}, {"micro_batch": 16}),
    "another stack": (
        "7b",
        target("rtx-3060", 6.5),
        {"upcast": "peft"},
        {"loss": "full", "attention": "eager", "paged_optimizer": False, "micro_batch": 2},
    ),
    "all activations kept": ("13b", target("rtx-4090"), {"seq_len": 2048}, {"gradient_checkpointing": False}),
    "state that is not paged": ("7b", target("rtx-3070", 5.8), {"rank": 128}, {"paged_optimizer": False}),
    "a 16-bit base": ("7b", target("rtx-3080"), {"method": "lora", "quantization": "none"}, {}),
    "weights that are too large": ("65b", target("rtx-4090"), {}, {}),
    "full fine-tuning": ("7b", target("rtx-3090"), {"method": "full", "quantization": "none"}, {}),
    "all at once": (
        "33b",
        target("rtx-4090"),
        {"seq_len": 2048, "rank": 256},
        {"micro_batch": 16, "loss": "full", "gradient_checkpointing": False, "paged_optimizer": False},
    ),
    "adapters computed in float32": (
        "7b",
        target("rtx-3090", 12.5),
        {"seq_len": 1024, "autocast": False},
        {"gradient_checkpointing": False},
    ),
    "two GPUs": ("33b", target("t4"), {}, {"world_size": 2}),
}


@pytest.fixture(scope="module", params=REQUESTS)
def refused(request: pytest.FixtureRequest) -> Plan:
    plan = answer(*REQUESTS[request.param])
    assert not plan.fits
    assert plan.alternatives
    return plan


def test_all_that_is_offered_fits_and_says_its_numbers(refused: Plan) -> None:
    for offered in refused.alternatives:
        needed = needs(refused, offered).gpu.process_bytes
        assert offered.process_bytes == needed
        assert needed <= offered.usable_bytes
        if offered.gpu == refused.target.name:
            assert offered.usable_bytes == refused.target.usable_bytes
        else:
            assert (offered.title, offered.usable_bytes) == (LARGER, find_gpu(offered.gpu).usable_bytes)
        assert offered.step_time is not None
        assert offered.confidence.low_bytes <= needed <= offered.confidence.high_bytes


def test_with_enough_runs_all_that_is_offered_fits_as_they_would_have() -> None:
    history = History(tuple(MeasuredRun("cuda", "rtx-4090", "qlora", False, 1.15, None) for _ in range(19)))
    plan = answer("33b", target("rtx-4090"), {"seq_len": 2048}, history=history)
    assert (plan.fits, plan.verdict.largest_micro_batch, plan.verdict.longest_seq_len) == (False, 0, 0)
    assert plan.verdict.headroom_bytes < 0
    before = answer("33b", target("rtx-4090"), {"seq_len": 2048})
    assert before.fits, "else this request says nothing"
    alike = [each for each in plan.alternatives if not each.strategy.zero_stage]
    assert len(alike) >= 2
    for offered in alike:
        gpu = needs(plan, offered).gpu
        process = 1.15 * gpu.reserved_bytes + gpu.process_bytes - gpu.reserved_bytes
        assert process <= offered.usable_bytes
        assert offered.headroom_bytes == pytest.approx(offered.usable_bytes - process, abs=1)
    assert all(offered.fits and offered.confidence.chance == 0.95 for offered in plan.alternatives)


def test_what_changes_is_told_field_by_field_and_nothing_else_does(refused: Plan) -> None:
    for offered in refused.alternatives:
        before: Fields = {**dataclasses.asdict(refused.recipe), **dataclasses.asdict(refused.strategy)}
        after: Fields = {**dataclasses.asdict(offered.recipe), **dataclasses.asdict(offered.strategy)}
        differing = {name: after[name] for name in after if after[name] != before[name]}
        told = {change.field: change.value for change in offered.changes}
        if offered.title == LARGER:
            assert not differing
            assert told == {"gpu": offered.gpu}
            continue
        assert told == {
            name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in differing.items()
        }
        assert all(change.reason for change in offered.changes)
        assert offered.strategy.sequences_per_step == offered.recipe.sequences_per_step


def test_the_cheapest_sacrifice_comes_first(refused: Plan) -> None:
    alone = [ORDER.index(title) for title in titles(refused) if title in ORDER]
    assert alone == sorted(set(alone))
    for title in titles(refused):
        if title not in ORDER:  # several together, each after the cheaper ones
            parts = [ORDER.index(part) for part in title.split(", ")]
            assert len(parts) > 1
            assert parts == sorted(set(parts))


def test_what_makes_it_fit_alone_is_offered_and_what_does_not_is_not(refused: Plan) -> None:
    recipe, strategy = refused.recipe, refused.strategy
    without: Fields = {"zero_stage": strategy.zero_stage}
    single: dict[str, list[tuple[Fields, Fields]]] = {
        "no float32 upcast": [({"upcast": "none"}, {})],
        "sdpa attention": [({}, {"attention": "sdpa"})],
        "a chunked loss": [({}, {"loss": "chunked"})],
        "paged optimizer state": [({}, {"paged_optimizer": True})],
        "gradient checkpointing": [({}, {"gradient_checkpointing": True})],
        "8-bit optimizer state": [({"optimizer": "adamw_8bit"}, {})],
        "a smaller micro-batch": [
            ({}, {"micro_batch": size, "gradient_accumulation": strategy.micro_batch // size})
            for size in range(1, strategy.micro_batch)
            if strategy.micro_batch % size == 0
        ],
    }
    if recipe.autocast is False:
        single["autocast"] = [({"autocast": True}, {})]
    if recipe.method == "lora":
        single["a 4-bit base (QLoRA)"] = [({"method": "qlora", "quantization": "nf4"}, {})]
    if recipe.method != "full":
        ranks = [rank for rank in (4, 8, 16, 32, 64, 128) if rank < recipe.rank]
        single["a smaller rank"] = [({"rank": rank}, {}) for rank in ranks]
    for title, ways in single.items():
        needed = [
            estimate(
                refused.architecture,
                dataclasses.replace(recipe, **new),
                dataclasses.replace(strategy, **{**without, **how}),
                refused.target.device,
            )
            for new, how in ways
        ]
        fits = any(each.gpu.process_bytes <= refused.target.usable_bytes for each in needed)
        assert (title in titles(refused)) == fits, title


def test_the_mildest_form_that_fits_is_offered() -> None:
    plan = answer(*REQUESTS["a large micro-batch"])
    offered = next(each for each in plan.alternatives if each.title == "a smaller micro-batch")
    size = offered.strategy.micro_batch
    assert 1 < size < 16, "else this request says nothing"
    twice = dataclasses.replace(offered.strategy, micro_batch=2 * size)
    needed = estimate(plan.architecture, plan.recipe, twice, plan.target.device).gpu
    usable = plan.target.usable_bytes - plan.target.device.context_bytes
    assert needed.reserved_interval[1] > usable, "twice as much is not sure to fit"


def test_where_no_single_sacrifice_suffices_they_are_combined() -> None:
    plan = answer(*REQUESTS["all at once"])
    own = [each for each in plan.alternatives if each.title != LARGER]
    assert own
    together = own[0]
    assert {"a smaller micro-batch", "gradient checkpointing"} <= set(together.title.split(", "))
    assert not set(ORDER) & {each.title for each in own}, "nothing is offered alone"
    assert together.strategy.micro_batch < 16
    assert together.strategy.gradient_checkpointing


def test_the_larger_gpu_is_the_smallest_on_which_the_request_fits_as_it_is() -> None:
    plan = answer("65b", target("rtx-4090"))
    (larger,) = (each for each in plan.alternatives if each.title == LARGER)
    assert larger.recipe == plan.recipe
    assert larger.strategy == plan.strategy
    # NF4 of 64.8e9 weights of linear layers is 32.4 GB, its constants 1/64 + 4/64/256 bytes of each, 1.03 GB more, and
    # embedding and head 2 x 0.52 GB: 34.5 GB, 32.1 GiB, before adapters. 48 GB cards have it; cards of 32 GiB have not.
    assert find_gpu(larger.gpu).memory_bytes == 48 * GIB
    for gpu in list_gpus():
        if plan.target.usable_bytes < gpu.usable_bytes < find_gpu(larger.gpu).usable_bytes:
            smaller = gpu_target(gpu, "auto")
            needed = estimate(plan.architecture, plan.recipe, plan.strategy, smaller.device).gpu
            assert needed.reserved_interval[1] + gpu.context_bytes > gpu.usable_bytes, "not sure to fit"


def test_a_request_that_fits_is_offered_nothing() -> None:
    plan = answer("7b", target("rtx-4090"))
    assert plan.fits
    assert plan.alternatives == ()


def test_where_nothing_of_the_kind_helps_only_a_larger_gpu_is_left() -> None:
    plan = answer("7b", target("rtx-3070", 0.5))  # the CUDA context alone is as large
    assert titles(plan) == [LARGER]


def test_on_a_cpu_nothing_is_offered_that_needs_a_gpu() -> None:
    plan = answer("7b", cpu_target("auto", 1, 5 * GIB), {"seq_len": 2048}, {"micro_batch": 8, "paged_optimizer": False})
    assert not plan.fits
    assert not {"paged optimizer state", "more GPUs", "offloading", LARGER} & set(titles(plan))


@pytest.mark.parametrize(
    ("per_node", "nodes", "accumulation", "gpus"),
    [
        (3, 1, 1, 3),
        (6, 1, 1, 4),
        (3, 2, 4, 3),  # 2 take a step of 4 sequences as it is, but are too few
        (6, 1, 6, 6),  # 4 do not take one of 6
    ],
)
def test_of_a_pool_its_whole_nodes_are_offered_and_first_what_leaves_the_step_as_it_is(
    per_node: int, nodes: int, accumulation: int, gpus: int
) -> None:
    on = target("rtx-3090")
    assert on.pool is not None
    pool = dataclasses.replace(on.pool, gpus_per_node=per_node, nodes=nodes, exists=True, host_ram_bytes=512 * GIB)
    # 70 billion weights in 4 bits are 33 GiB and more, so that two of 24 GiB hold their halves, but not with the rest
    plan = answer("llama-3.1-70b", dataclasses.replace(on, pool=pool), {}, {"gradient_accumulation": accumulation})
    (more,) = (each for each in plan.alternatives if each.title == "more GPUs")
    assert more.gpus == gpus


def test_the_hosts_memory_counts_where_it_is_stated() -> None:
    on = target("rtx-4090", 16)
    assert on.pool is not None
    recipe: Fields = {"method": "full", "quantization": "none"}
    # DeepSpeed's CPU Adam keeps a float32 copy and two float32 moments of 3.21e9 parameters there: 35.9 GiB and more
    for ram, offered in ((None, True), (96, True), (35, False)):
        pool = dataclasses.replace(on.pool, host_ram_bytes=None if ram is None else ram * GIB)
        plan = answer("llama-3.2-3b", dataclasses.replace(on, pool=pool), recipe, {"paged_optimizer": False})
        assert any("offloading" in title for title in titles(plan)) == offered, ram
