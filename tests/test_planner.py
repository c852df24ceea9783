"""What the planner decides, and why: compute dtype, workers, micro-batch, ZeRO; and the laws its plans obey."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusters.errors import RequestError
from clusters.gpu import find_gpu
from orchestrator import plan
from orchestrator.devices import compute_dtype, cpu_target, gpu_target
from orchestrator.history import NOTHING_MEASURED, History, MeasuredRun
from orchestrator.planner import divisors, plan_request, plan_run
from orchestrator.plans import SURE, Plan, Target
from orchestrator.rules import check_strategy
from orchestrator.spec import RunSpec
from orchestrator.verdicts import LARGEST_MICRO_BATCH, LONGEST_SEQ_LEN, largest
from qlora_core.architecture import ModelArchitecture
from qlora_core.catalogue import find_model
from qlora_core.recipe import Recipe
from qlora_core.strategy import Offload, Strategy, ZeroStage

GIB = 1024**3
LLAMA = find_model("llama-7b")


def gpu(name: str = "a100-40gb", workers: int = 1, usable: int | None = None) -> Target:
    target = gpu_target(find_gpu(name), "auto", workers)
    return target if usable is None else dataclasses.replace(target, usable_bytes=usable)


def request(
    recipe: Recipe | None = None, strategy: Strategy | None = None, *targets: Target, model: ModelArchitecture = LLAMA
) -> Plan:
    return plan_request(model, recipe or Recipe(), strategy or Strategy(), targets or (gpu(),))


def needed(plan: Plan) -> int:
    return plan.estimate.gpu.process_bytes


def run(
    target: Target | None = None,
    devices: int = 1,
    *,
    longest: int | None = None,
    history: History = NOTHING_MEASURED,
    at_most: int | None = None,
    model: Any = LLAMA,
    **fields: Any,
) -> Plan:
    """The plan of a specification: 16 sequences of 512 tokens a step, unless said otherwise."""
    wanted = {"name": "demo", "model": "base", "data": {"path": "x.jsonl"}, "output": "out", **fields}
    spec = RunSpec.model_validate(wanted)
    return plan_run(spec, model, target or gpu(), devices, longest=longest, history=history, at_most=at_most)


def choices(plan: Plan) -> dict[str, tuple[str, str]]:
    found = {choice.field: (choice.value, choice.reason) for choice in plan.choices}
    assert len(found) == len(plan.choices), "each choice once"
    return found


# --- float16 ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_trained_in_float16_is_refused() -> None:
    model = find_model("qwen2.5-0.5b")
    assert run(gpu("t4"), model=model).target.compute_dtype == "float16"
    with pytest.raises(RequestError, match=r"recipe\.lora_dtype: in float16 losses are scaled"):
        run(gpu("t4"), recipe={"lora_dtype": "bfloat16"}, model=model)
    with pytest.raises(RequestError, match=r"recipe\.method: its weights would be float16 too"):
        run(gpu("t4"), recipe={"method": "full", "quantization": "none"}, model=model)


# --- compute dtype ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "kind", "capability", "has_bfloat16", "dtype", "why"),
    [
        ("auto", "cuda", (7, 5), False, "float16", "older than Ampere"),  # Turing: no bfloat16 tensor cores
        ("auto", "cuda", (7, 0), False, "float16", "older than Ampere"),
        ("auto", "cuda", (8, 0), False, "bfloat16", "Ampere"),
        ("auto", "cuda", (8, 9), False, "bfloat16", "Ampere"),
        ("auto", "cuda", (9, 0), False, "bfloat16", "Ampere"),
        ("auto", "cpu", (0, 0), False, "float32", "without AMX"),
        ("auto", "cpu", (0, 0), True, "bfloat16", "AMX"),
        ("float32", "cuda", (9, 0), False, "float32", "asked for"),
        ("float16", "cpu", (0, 0), True, "float16", "asked for"),
        ("bfloat16", "cuda", (8, 0), False, "bfloat16", "asked for"),
        ("bfloat16", "cuda", (7, 5), False, "bfloat16", "7.5 only emulates it"),
    ],
)
def test_the_compute_dtype_and_its_reason(
    requested: str, kind: str, capability: tuple[int, int], has_bfloat16: bool, dtype: str, why: str
) -> None:
    choice = compute_dtype(requested, kind, capability, has_bfloat16)
    assert (choice.field, choice.value) == ("compute_dtype", dtype)
    assert why in choice.reason


def test_processes_on_a_cpu_share_its_memory() -> None:
    assert cpu_target("auto", 4, 8 * GIB).usable_bytes == 2 * GIB


# --- searching --------------------------------------------------------------------------------------------------------


@given(
    threshold=st.integers(0, 3000),
    limit=st.integers(1, 2000),
    start=st.integers(1, 2500),
    curve=st.sampled_from(["line", "parabola", "stairs", "plateau", "jump"]),
)
@settings(deadline=None)
def test_largest_is_where_halving_would_find_it(threshold: int, limit: int, start: int, curve: str) -> None:
    sizes: dict[str, Callable[[int], int]] = {
        "line": lambda value: 1000 + 7 * value,
        "parabola": lambda value: value * value,
        "stairs": lambda value: value // 64 * 4096,
        "plateau": lambda value: max(10**5, 300 * value),
        "jump": lambda value: 5 * value if value < 700 else 10**9,
    }
    size = sizes[curve]
    usable = size(threshold) if threshold else -1
    most = max(limit, start)
    expected = max((value for value in range(1, most + 1) if size(value) <= usable), default=0)
    assert largest(size, usable, limit, (start, size(start))) == expected


def test_largest_needs_few_evaluations_of_what_grows_in_a_line() -> None:
    asked: list[int] = []

    def size(value: int) -> int:
        asked.append(value)
        return 10 * GIB + 1_234_567 * value

    limit = 10_000
    assert largest(size, 10 * GIB + 1_234_567 * limit, 2**22, (512, 10 * GIB + 1_234_567 * 512)) == limit
    assert len(asked) <= 8


@pytest.mark.parametrize(
    ("number", "expected"), [(1, [1]), (7, [1, 7]), (16, [1, 2, 4, 8, 16]), (36, [1, 2, 3, 4, 6, 9, 12, 18, 36])]
)
def test_divisors(number: int, expected: list[int]) -> None:
    assert divisors(number) == expected


def test_divisors_of_a_very_large_step_take_no_time() -> None:
    assert len(divisors(2**40)) == 41


# --- a request is answered as it is -----------------------------------------------------------------------------------


def test_the_first_target_that_fits_is_shown_else_the_last_else_the_one_asked_for() -> None:
    small, middle, large = gpu("t4", usable=GIB), gpu("rtx-4090"), gpu("h200")
    assert request(None, None, small, middle, large).target.name == "rtx-4090"
    assert request(None, None, small).target.name == "t4"
    plan = plan_request(LLAMA, Recipe(), Strategy(), (small, middle), asked="t4")
    assert plan.target.name == "t4"
    assert plan.fits, "it fits on the other that is shown"


def test_a_sequence_longer_than_the_positions_is_warned_of() -> None:
    assert request(Recipe(seq_len=2048)).warnings == ()
    (warning,) = request(Recipe(seq_len=4096)).warnings
    assert "2048" in warning


def test_nodes_that_may_be_taken_away_and_a_disk_that_is_too_small_are_warned_of() -> None:
    target = gpu("l4")
    assert target.pool is not None
    assert request(None, None, target).warnings == ()
    stored = 6_738_415_616 * 2  # Llama 7B in 16 bits
    for disk, spot, said in (
        (stored, False, []),
        (stored - 1, False, ["12.6 GiB in 16 bits"]),
        (None, True, ["taken away"]),
    ):
        there = dataclasses.replace(target.pool, disk_bytes=disk, spot=spot)
        warned = request(None, None, dataclasses.replace(target, pool=there)).warnings
        assert len(warned) == len(said)
        assert all(words in one for words, one in zip(said, warned, strict=True))


def test_workers_on_gpus_that_nobody_knows_share_their_host_too() -> None:
    unknown = dataclasses.replace(gpu("a100-80gb"), name="NVIDIA Nobody", pool=None)
    plan = run(unknown, devices=4)
    assert plan.target.device.ranks_per_host == plan.strategy.world_size == 4


def test_host_memory_decides_where_it_is_stated() -> None:
    strategy = Strategy(zero_stage=2, offload="optimizer")
    free = plan_request(LLAMA, Recipe(), strategy, [gpu()])
    most = max(free.estimate.host.load_peak_bytes, free.estimate.host.steady_bytes)
    assert free.host_fits is None
    for usable, fits in ((most, True), (most - 1, False)):
        plan = plan_request(LLAMA, Recipe(), strategy, [gpu()], hosts=[usable])
        assert (plan.host_fits, plan.fits) == (fits, fits)


def test_each_host_decides_for_its_own_gpus_and_the_first_that_both_fits_is_shown() -> None:
    strategy = Strategy(zero_stage=2, offload="optimizer")
    small, large = gpu("l40s"), gpu("a100-80gb")
    needs = plan_request(LLAMA, Recipe(), strategy, [small]).estimate.host.most_bytes
    for hosts, shown in (([None, None], small), ([needs - 1, needs], large), ([needs, needs - 1], small)):
        plan = plan_request(LLAMA, Recipe(), strategy, [small, large], hosts=hosts)
        assert (plan.fits, plan.target, plan.host_usable_bytes) == (True, shown, hosts[shown is large])
        assert [verdict.fits for verdict in plan.verdicts] == [host != needs - 1 for host in hosts]
    assert all(verdict.headroom_bytes > 0 for verdict in plan.verdicts)
    assert not plan_request(LLAMA, Recipe(), strategy, [small, large], hosts=[needs - 1] * 2).fits


def test_paged_state_that_finds_no_room_on_a_gpu_is_its_host_s_to_hold() -> None:
    # 32 layers of width 4096, 11008 inside: adapters of rank 64 are 160 million weights with two moments in float32
    state = 8 * 32 * 64 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    process = needed(request())
    shared = Strategy(world_size=2, gradient_accumulation=1)
    for room, moved in ((state, 0), (state // 4, 3 * state // 4), (0, state)):
        alone = request(None, None, gpu(usable=process + room))
        assert alone.fits
        assert alone.estimate.host.steady_bytes == moved
        # two ranks need more each, for DDP's buckets, and put twice as much on their host
        of_two = needed(request(None, shared, gpu(workers=2)))
        both = request(None, shared, gpu(workers=2, usable=of_two + room))
        assert both.estimate.host.steady_bytes == 2 * moved
    alone = request(None, None, gpu(usable=process))
    for ram, fits in ((state, True), (state - 1, False)):
        assert plan_request(LLAMA, Recipe(), Strategy(), [alone.target], hosts=[ram]).fits is fits


@pytest.mark.parametrize(
    ("stage", "offload", "right"),
    [
        (0, "optimizer", False),
        (0, "all", False),
        (1, "all", False),
        (2, "all", False),
        (3, "all", True),
        (2, "optimizer", True),
    ],
)
def test_only_deepspeed_offloads_and_only_stage_3_offloads_all(stage: ZeroStage, offload: Offload, right: bool) -> None:
    strategy = Strategy(zero_stage=stage, offload=offload)
    if right:
        check_strategy(Recipe(), strategy, "strategy.{}", [gpu()])
        return
    with pytest.raises(RequestError) as error:
        check_strategy(Recipe(), strategy, "strategy.{}", [gpu()])
    assert error.value.problems[0].where == "strategy.offload"


@pytest.mark.parametrize("asked", [{"zero_stage": 3}, {"offload": "all"}, {"zero_stage": 3, "offload": "all"}])
def test_int8_under_zero_3_is_refused_with_one_error(asked: dict[str, Any]) -> None:
    # only stage 3 offloads the base; bitsandbytes computes with the whole of an int8 weight (Linear8bitLt, state.CB)
    with pytest.raises(RequestError) as error:
        run(gpu(workers=2), 2, recipe={"quantization": "int8"}, strategy=asked)
    (problem,) = error.value.problems
    assert (problem.where, problem.given) == ("strategy.zero_stage", "3")
    assert "int8" in problem.rule
    assert "nf4" in problem.remedy


def test_zero_3_is_chosen_where_only_it_fits_but_never_for_int8() -> None:
    # a 4-bit base of 65 billion is about 33 GB, and lies whole on no GPU of 24 GB
    quantized = {
        quantization: run(
            gpu("rtx-4090", workers=4),
            4,
            model=find_model("llama-65b"),
            recipe={"quantization": quantization, "double_quantization": quantization == "nf4"},
        )
        for quantization in ("nf4", "int8")
    }
    assert (quantized["nf4"].fits, quantized["nf4"].strategy.zero_stage) == (True, 3)
    assert not quantized["int8"].fits
    assert quantized["int8"].strategy.zero_stage < 3


# --- a run is planned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "sequences", "expected"),
    [(1, 16, 1), (4, 16, 4), (3, 16, 2), (8, 12, 6), (5, 7, 1), (64, 16, 16)],
)
def test_the_world_size_is_the_most_gpus_that_divide_the_step(devices: int, sequences: int, expected: int) -> None:
    plan = run(gpu(workers=devices), devices, recipe={"tokens_per_step": 512 * sequences})
    assert plan.strategy.world_size == expected
    value, reason = choices(plan)["world_size"]
    assert value == str(expected)
    assert str(devices) in reason or devices == 1


def test_on_a_cpu_one_process_is_chosen_and_more_may_be_asked_for() -> None:
    assert run(cpu_target("auto", 1, 64 * GIB), 1).strategy.world_size == 1
    assert run(cpu_target("auto", 2, 64 * GIB), 1, strategy={"world_size": 2}).strategy.world_size == 2


def test_a_world_size_must_exist_and_divide_the_step() -> None:
    with pytest.raises(RequestError) as error:
        run(gpu(), 2, strategy={"world_size": 3})
    assert [problem.where for problem in error.value.problems] == ["strategy.world_size"] * 2
    assert "2 GPUs" in error.value.problems[0].rule
    assert "2 or 4" in error.value.problems[1].remedy  # the divisors of 16 beside 3


@pytest.mark.parametrize(("sequences", "expected"), [(1, 1), (6, 6), (16, 16), (40, 10), (22, 11), (17, 1), (64, 16)])
def test_the_micro_batch_is_the_largest_divisor_up_to_16_where_memory_is_plenty(sequences: int, expected: int) -> None:
    plan = run(gpu("h200"), recipe={"tokens_per_step": 512 * sequences})
    assert plan.strategy.micro_batch == expected
    assert plan.strategy.sequences_per_step == sequences


def test_a_model_gets_the_attention_that_its_own_code_has() -> None:
    """Gemma 2: no sdpa in transformers. Its logits go through a tanh, in chunks too."""
    gemma = find_model("gemma-2-2b")
    plan = run(gpu(), model=gemma, strategy={"loss": "chunked"})
    assert (plan.strategy.attention, plan.strategy.loss) == ("eager", "chunked")
    assert "attention" in choices(plan)
    with pytest.raises(RequestError) as error:
        run(gpu(), model=gemma, strategy={"attention": "sdpa"})
    assert [problem.where for problem in error.value.problems] == ["strategy.attention"]


def test_packing_is_refused_where_packed_examples_would_see_each_other() -> None:
    with pytest.raises(RequestError) as error:
        run(gpu(), model=find_model("falcon-7b"), recipe={"packing": True})
    assert [problem.where for problem in error.value.problems] == ["recipe.packing"]


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    four = request(Recipe(tokens_per_step=8192), Strategy(micro_batch=4, gradient_accumulation=4))
    at_most = four.verdict.confidence.high_bytes  # in nineteen cases of twenty
    plan = run(gpu(usable=at_most), strategy={"gradient_checkpointing": True, "loss": "chunked"})
    assert plan.strategy.micro_batch == 4
    value, reason = choices(plan)["micro_batch"]
    assert value == "4"
    assert reason.startswith("8 would need up to")


@pytest.mark.parametrize("ratio", [0.9, 1.15])
def test_a_plan_of_at_most_so_many_bytes_needs_no_more_of_them_whatever_runs_measured(ratio: float) -> None:
    history = History(tuple(MeasuredRun("cuda", "a100-40gb", "qlora", False, ratio, None) for _ in range(19)))
    first = run(history=history)
    at_most = needed(first) * 9 // 10
    plan = run(history=history, at_most=at_most)
    assert needed(plan) <= at_most
    assert plan.fits
    context = needed(first) - first.estimate.gpu.reserved_bytes
    assert ratio * first.estimate.gpu.reserved_bytes + context <= first.target.usable_bytes
    assert first.fits


def test_a_micro_batch_that_is_asked_for_is_kept_or_refused_with_the_ones_that_divide() -> None:
    assert run(strategy={"micro_batch": 2}).strategy.gradient_accumulation == 8
    with pytest.raises(RequestError) as error:
        run(strategy={"micro_batch": 5})
    (problem,) = error.value.problems
    assert problem.where == "strategy.micro_batch"
    assert "4 or 8" in problem.remedy


def test_zero_is_climbed_only_as_far_as_memory_makes_it_necessary() -> None:
    wanted = Recipe(method="lora", quantization="none", tokens_per_step=16 * 512)

    def least(stage: ZeroStage) -> int:
        # not paged: what finds no room would be moved in every step, and sharding be faster for that
        strategy = Strategy(world_size=4, gradient_accumulation=4, zero_stage=stage, paged_optimizer=False)
        return plan_request(LLAMA, wanted, strategy, [gpu(workers=4)]).verdict.confidence.high_bytes

    assert least(0) > least(2) > least(3)
    fixed: dict[str, Any] = {
        "recipe": wanted.to_json(),
        "strategy": {"gradient_checkpointing": True, "micro_batch": 1, "paged_optimizer": False},
    }
    for stage in (0, 2, 3):
        plan = run(gpu(workers=4, usable=least(stage)), 4, **fixed)
        assert plan.fits
        assert plan.strategy.zero_stage == stage
        assert choices(plan)["zero_stage"][0] == str(stage)
    hopeless = run(gpu(workers=4, usable=GIB), 4, recipe=wanted.to_json())
    assert not hopeless.fits
    assert (hopeless.strategy.zero_stage, hopeless.strategy.micro_batch) == (3, 1)
    fields, why = choices(hopeless)["left open"]
    assert {"micro batch", "zero stage", "loss"} <= set(fields.split(", "))
    assert "still does not fit" in why
    assert [reason for _, reason in choices(hopeless).values()].count(why) == 1
    assert not {"micro_batch", "zero_stage", "loss"} & set(choices(hopeless)), "their values are the strategy's to tell"


def test_one_gpu_has_nothing_to_share_out() -> None:
    plan = run(gpu("t4"))
    assert plan.strategy.zero_stage == 0
    assert "one worker" in choices(plan)["zero_stage"][1]


@pytest.mark.parametrize(("offload", "stage"), [("optimizer", 2), ("all", 3)])
def test_offloading_brings_the_zero_stage_that_it_needs(offload: str, stage: int) -> None:
    plan = run(strategy={"offload": offload})
    assert plan.strategy.zero_stage == stage
    assert choices(plan)["zero_stage"][0] == str(stage)


def test_a_run_of_all_weights_is_divided_as_far_as_it_has_to_be() -> None:
    full: dict[str, Any] = {"recipe": {"method": "full", "quantization": "none"}}
    # weights are 13.5 GB: beside those 15 GB have no room for gradients and masters, divided by 8 as they may be
    assert run(gpu(workers=8, usable=14 * GIB), 8, **full).strategy.zero_stage == 3
    # where they stay whole, their gradients do not fit beside them undivided
    wanted = Recipe(method="full", quantization="none")
    assert plan("7b", recipe=wanted, gpu="rtx-5090", gpus=8, open_fields={"zero_stage"}).strategy.zero_stage == 2
    offloaded = run(gpu(workers=4), 4, strategy={"offload": "optimizer"}, **full).strategy
    assert (offloaded.zero_stage, offloaded.offload) == (2, "optimizer")


def test_offloading_without_zero_is_refused() -> None:
    with pytest.raises(RequestError) as error:
        run(strategy={"offload": "optimizer", "zero_stage": 0})
    assert error.value.problems[0].where == "strategy.offload"


@pytest.mark.parametrize("asked", ["auto", True])
def test_that_a_cpu_cannot_page_is_said(asked: object) -> None:
    plan = run(cpu_target("auto", 1, 64 * GIB), strategy={"paged_optimizer": asked})
    assert plan.strategy.paged_optimizer is False
    value, reason = choices(plan)["paged_optimizer"]
    assert value == "false"
    assert "CUDA" in reason


def test_flash_attention_on_a_cpu_is_refused() -> None:
    with pytest.raises(RequestError) as error:
        run(cpu_target("auto", 1, 64 * GIB), strategy={"attention": "flash_attention_2"})
    assert error.value.problems[0].where == "strategy.attention"


def test_memory_is_planned_for_the_longest_example_and_the_recipe_stays_as_it_was() -> None:
    plan = run(longest=100, strategy={"micro_batch": 4})
    shorter = run(strategy={"micro_batch": 4}, recipe={"seq_len": 100, "tokens_per_step": 1600})
    assert plan.estimate == shorter.estimate
    assert plan.recipe == Recipe()
    assert choices(plan)["planned length"][0] == "100"
    assert "planned length" not in choices(run(longest=512))
    assert "planned length" not in choices(run(longest=5000))


# --- the digest -------------------------------------------------------------------------------------------------------


def test_the_digest_names_what_would_be_run_and_nothing_else() -> None:
    plan = request()
    assert plan.digest == request().digest
    assert plan.digest == request(None, None, gpu("h200")).digest, "another GPU of the same dtype runs the same"
    assert plan.digest == dataclasses.replace(plan, warnings=("x",), choices=()).digest


@pytest.mark.parametrize(
    "other",
    [
        request(Recipe(rank=32)),
        request(Recipe(learning_rate=1e-4)),
        request(None, Strategy(micro_batch=2)),
        request(None, Strategy(loss="full")),
        request(None, None, gpu("t4")),
        request(model=find_model("llama-2-7b")),
    ],
    ids=["rank", "learning rate", "micro-batch", "loss", "compute dtype", "model"],
)
def test_the_digest_changes_with_each_of_its_parts(other: Plan) -> None:
    assert other.digest != request().digest


# --- laws -------------------------------------------------------------------------------------------------------------

LLAMA_3 = find_model("llama-3.1-8b")

RECIPES = st.builds(
    lambda quantization, rank, length, upcast: Recipe(
        method="lora" if quantization == "none" else "qlora",
        quantization=quantization,
        rank=rank,
        seq_len=length,
        tokens_per_step=length * 16,
        upcast=upcast,
    ),
    st.sampled_from(["nf4", "int8", "none"]),
    st.integers(1, 256),
    st.integers(1, 4096),
    st.sampled_from(["none", "peft"]),
)
STRATEGIES = st.builds(
    lambda micro_batch, checkpointing, loss, paged, workers: Strategy(
        world_size=workers,
        micro_batch=micro_batch,
        gradient_checkpointing=checkpointing,
        loss=loss,
        paged_optimizer=paged,
    ),
    st.integers(1, 16),
    st.booleans(),
    st.sampled_from(["chunked", "full"]),
    st.booleans(),
    st.sampled_from([1, 2]),
)
MODELS = st.sampled_from([LLAMA, LLAMA_3])


def surely_needed(plan: Plan) -> int:
    """The smallest memory of which the plan says FITS."""
    return plan.estimate.gpu.reserved_interval[1] + plan.target.device.context_bytes


@given(model=MODELS, recipe=RECIPES, strategy=STRATEGIES, data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_fits_still_fits_with_less(
    model: ModelArchitecture, recipe: Recipe, strategy: Strategy, data: st.DataObject
) -> None:
    plan = request(recipe, strategy, model=model)
    exactly = gpu(usable=surely_needed(plan))
    length = data.draw(st.integers(1, recipe.seq_len))
    shorter = dataclasses.replace(recipe, seq_len=length, tokens_per_step=16 * length)
    thinner = dataclasses.replace(recipe, rank=data.draw(st.integers(1, recipe.rank)))
    fewer = dataclasses.replace(strategy, micro_batch=data.draw(st.integers(1, strategy.micro_batch)))
    assert request(recipe, strategy, exactly, model=model).verdict.confidence.chance == SURE
    assert request(shorter, strategy, exactly, model=model).fits
    assert request(recipe, fewer, exactly, model=model).fits
    # bitsandbytes pages tensors of 100,000 elements and more: a smaller rank may leave more of the state on the GPU
    unpaged = dataclasses.replace(strategy, paged_optimizer=False)
    room = gpu(usable=surely_needed(request(recipe, unpaged, model=model)))
    assert request(thinner, unpaged, room, model=model).fits


@given(recipe=RECIPES, strategy=STRATEGIES, usable=st.integers(GIB, 100 * GIB))
@settings(max_examples=12, deadline=None)
def test_a_verdict_s_limits_are_true(recipe: Recipe, strategy: Strategy, usable: int) -> None:
    target = gpu(usable=usable)
    (verdict,) = request(recipe, strategy, target).verdicts
    assert verdict.fits == (verdict.headroom_bytes >= 0) == (verdict.process_bytes <= usable)
    micro_batch, length = verdict.largest_micro_batch, verdict.longest_seq_len

    def fits_with(micro_batch: int, length: int) -> bool:
        asked = dataclasses.replace(recipe, seq_len=length, tokens_per_step=16 * length)
        return request(asked, dataclasses.replace(strategy, micro_batch=micro_batch), target).fits

    assert micro_batch == 0 or fits_with(micro_batch, recipe.seq_len)
    assert micro_batch == LARGEST_MICRO_BATCH or not fits_with(micro_batch + 1, recipe.seq_len)
    assert length == 0 or fits_with(strategy.micro_batch, length)
    assert length == LONGEST_SEQ_LEN or not fits_with(strategy.micro_batch, length + 1)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        ({"objective": "best"}, ["objective"]),
        ({"gpus": 0, "tokens": -4}, ["gpus", "tokens"]),
        ({"objective": "fastest", "strategy": Strategy()}, ["strategy"]),
        ({"recipe": Recipe(tokens_per_step=8192), "strategy": Strategy(micro_batch=5)}, ["strategy"]),
        ({"open_fields": ["rank"]}, ["open_fields"]),
    ],
)
def test_contradictory_arguments_are_refused_all_at_once(arguments: dict[str, Any], where: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        plan("7b", **arguments)
    assert [problem.where for problem in error.value.problems] == where
