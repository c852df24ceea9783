"""The engines: every ZeRO stage and DDP learn what one process learns, and know where each parameter's state lies."""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from real_runs import TIMEOUT

pytestmark = pytest.mark.slow

STEPS = 3

RANK = """
import gc, json, os, sys, weakref
import torch, torch.distributed as dist
torch.set_num_threads(1)
specs = json.loads(sys.argv[1])
world = int(os.environ["WORLD_SIZE"])
if world > 1:
    dist.init_process_group("gloo")
from qlora_core.quiet import import_bitsandbytes
import_bitsandbytes()
from qlora_core.memory.measure import StorageMeter
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.examples import Examples, Rows
from qlora_core.training.engines import build_engine
from qlora_core.training.evaluate import eval_loss
from qlora_core.training.loop import one_step, rehearse, TrainingRun
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import autocast_dtype, load_base, make_trainable, trainable
from qlora_core.training.tokenizer import load_tokenizer
from safetensors.torch import save_file
from pathlib import Path

class Silent:
    def event(self, kind, **facts):
        pass
    def alive(self):
        pass
    def stop_requested(self):
        return False

def learn(spec):
    recipe = Recipe(**spec["recipe"])
    strategy = Strategy(world_size=world, micro_batch=spec["micro_batch"], zero_stage=spec["stage"],
                        gradient_accumulation=recipe.sequences_per_step // world // spec["micro_batch"],
                        offload=spec["offload"], paged_optimizer=False)
    cpu = torch.device("cpu")
    model = make_trainable(load_base(spec["base"], recipe, strategy, spec["dtype"], cpu), recipe, 0)
    torch.manual_seed(1)
    for name, weight in trainable(model).items():
        if "lora_B" in name:  # while it is zero, A has no gradient
            torch.nn.init.normal_(weight, std=0.1)
    model.train()
    data = Examples(Path(spec["data"]))
    rank = int(os.environ.get("RANK", 0))
    run = TrainingRun(recipe=recipe, strategy=strategy, seed=0, total_steps=9, save_every=9, model=model,
                      engine=build_engine(SummedLoss(model, "chunked", autocast_dtype(recipe, spec["dtype"])), recipe,
                                          strategy, scaled=spec["dtype"] == "float16"),
                      tokenizer=load_tokenizer(spec["base"]), train_data=Rows(data, recipe, 0), eval_data=data,
                      meter=StorageMeter(), device=cpu, rank=rank, checkpoints=Path("none"), facts={})
    if spec["dtype"] == "float16":  # at the first step the scale is far too large, then right
        run.engine.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-48, growth_interval=1)
    steps, gradients, optimize = [], {}, run.engine.step
    def optimize_noting():
        if not gradients:
            gradients.update({name: weight.grad.clone() for name, weight in trainable(model).items()
                              if weight.grad is not None})
        return optimize()
    run.engine.step = optimize_noting
    losses, compute = [], run.engine.loss
    def compute_noting(batch):
        loss = compute(batch)
        losses.append(weakref.ref(loss))
        return loss
    run.engine.loss = compute_noting
    gc.disable()
    for step in range(spec["steps"]):
        if step == 1 and world > 1:
            rehearse(run, Silent())
        steps.append(one_step(run, step, Silent())[:2])
    alive = sum(loss() is not None for loss in losses)
    gc.enable()
    after = eval_loss(run.engine.module, data, pad_token=0, micro_batch=3, rank=rank, world_size=world, device=cpu)
    weights = run.engine.saved_weights()
    spans = [list(vars(s).values()) if hasattr(s, "__dict__") else [s.parameter, s.parameter_start, s.numel, s.slot,
             s.slot_start] for s in run.engine.optimizer_state().spans]
    packed = [p for p in model.parameters() if type(p).__name__ == "Params4bit"]
    result = {"share": sum(getattr(p, "ds_tensor", p).numel() for p in packed) /
              sum(getattr(p, "ds_numel", p.numel()) for p in packed) if packed else 0,
              "scale": run.engine.scaler.get_scale(), "alive": alive, "steps": steps, "after": after, "spans": spans,
              "numel": {n: w.numel() for n, w in weights.items()},
              "sum": float(sum(w.double().sum() for w in weights.values()))}
    Path(spec["out"], f"{rank}.json").write_text(json.dumps(result))
    save_file(gradients, Path(spec["out"], f"{rank}.safetensors"))

for spec in specs:
    learn(spec)
if world > 1:
    dist.barrier()
os._exit(0)  # gloo's threads sometimes abort a process that takes its interpreter down while they live
"""


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, conversations: Path) -> Path:
    from qlora_core.training.dataset import encode_file
    from qlora_core.training.dataset.tokens import save_examples
    from qlora_core.training.tokenizer import load_tokenizer

    path = tmp_path_factory.mktemp("encoded") / "train.safetensors"
    examples, _ = encode_file(conversations, "auto", load_tokenizer(str(tiny_base)), 64)
    save_examples(examples, path)
    return path


class Learning(NamedTuple):
    """One way to make a few steps of so many sequences."""

    stage: int = 0
    optimizer: str = "adamw"
    micro_batch: int = 2
    sequences: int = 8
    dtype: str = "float32"
    method: str = "qlora"
    offload: str = "none"

    @property
    def recipe(self) -> dict[str, Any]:
        length = 64
        return {
            "method": self.method,
            "quantization": "nf4" if self.method == "qlora" else "none",
            "rank": 4,
            "seq_len": length,
            "tokens_per_step": length * self.sequences,
            "learning_rate": 1e-3,
            "optimizer": self.optimizer,
            "autocast": True,  # it does nothing in float32
        }


class Learned(NamedTuple):
    """What each rank saw and learned, and its gradient of the first step."""

    ranks: list[dict[str, Any]]
    gradients: list[dict[str, Any]]


def learn(folder: Path, base: Path, data: Path, world_size: int, ways: list[Learning]) -> dict[Learning, Learned]:
    """All ways one after the other, on so many ranks, which take longer to start than to learn."""
    from safetensors.torch import load_file

    outs = [folder / str(number) for number, _ in enumerate(ways)]
    specs = [
        {
            "base": str(base),
            "data": str(data),
            "out": str(out),
            "stage": way.stage,
            "micro_batch": way.micro_batch,
            "steps": STEPS,
            "dtype": way.dtype,
            "offload": way.offload,
            "recipe": way.recipe,
        }
        for out, way in zip(outs, ways, strict=True)
    ]
    for out in outs:
        out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(specs)],
            env={
                **os.environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate(timeout=TIMEOUT)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), outputs[0]
    return {
        way: Learned(
            [json.loads((out / f"{rank}.json").read_text()) for rank in range(world_size)],
            [load_file(out / f"{rank}.safetensors") for rank in range(world_size)],
        )
        for out, way in zip(outs, ways, strict=True)
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, encoded: Path) -> dict[Learning, Learned]:
    """What one process learns."""
    ways = [
        Learning(),
        Learning(method="full"),
        Learning(dtype="bfloat16"),
        Learning(dtype="float16"),
        *(Learning(micro_batch=size, sequences=32) for size in (32, 8)),
    ]
    return learn(tmp_path_factory.mktemp("alone"), tiny_base, encoded, 1, ways)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, encoded: Path) -> dict[Learning, Learned]:
    """What two ranks learn. ZeRO-3 comes last: it replaces torch's linear function for the rest of its process."""
    ways = [Learning(micro_batch=4, sequences=32), Learning(0)]
    ways += [Learning(stage, dtype=dtype) for stage in (0, 1, 2) for dtype in ("bfloat16", "float16")]
    ways += [Learning(2, dtype="float16", offload="optimizer")]
    ways += [Learning(stage, optimizer) for stage in (1, 2, 3) for optimizer in ("adamw", "adamw_8bit")]
    ways += [Learning(3, dtype=dtype) for dtype in ("bfloat16", "float16")]
    ways += [Learning(3, dtype="float16", offload="all")]
    ways += [Learning(stage, method="full") for stage in (1, 2, 3)]
    return learn(tmp_path_factory.mktemp("together"), tiny_base, encoded, 2, ways)


def assert_alike(ranks: list[dict[str, Any]], one: dict[str, Any], loss_rel: float, norm_rel: float) -> None:
    """Each rank saw the losses, gradient norms and evaluation of one process."""
    for rank in ranks:
        for (loss, norm), (loss_alone, norm_alone) in zip(rank["steps"], one["steps"], strict=True):
            assert loss == pytest.approx(loss_alone, rel=loss_rel)
            assert norm == pytest.approx(norm_alone, rel=norm_rel)
        assert rank["after"] == pytest.approx(one["after"], rel=loss_rel)
        assert rank["alive"] == 0  # no loss, and nothing that its graph refers to, waits for the cycle collector


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_learn_what_one_process_learns(
    stage: int, alone: dict[Learning, Learned], together: dict[Learning, Learned]
) -> None:
    """The same losses, gradient norms and evaluation: the mean is over the step's tokens, however it is split."""
    [one], ranks = alone[Learning()].ranks, together[Learning(stage)].ranks
    assert_alike(ranks, one, 1e-5, 1e-4)
    for rank in ranks:
        assert rank["share"] == (0.5 if stage == 3 else 1)  # of the packed base
    assert ranks[0]["sum"] == ranks[1]["sum"] == pytest.approx(one["sum"], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_train_all_weights_as_one_process_does(
    stage: int, alone: dict[Learning, Learned], together: dict[Learning, Learned]
) -> None:
    [one], ranks = alone[Learning(method="full")].ranks, together[Learning(stage, method="full")].ranks
    assert_alike(ranks, one, 1e-5, 1e-4)
    assert ranks[0]["sum"] == ranks[1]["sum"] == pytest.approx(one["sum"], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_learn_what_one_process_learns_under_autocast(
    stage: int, alone: dict[Learning, Learned], together: dict[Learning, Learned]
) -> None:
    """As near as bfloat16's 8 bits let sums of other orders be."""
    [one], ranks = alone[Learning(dtype="bfloat16")].ranks, together[Learning(stage, dtype="bfloat16")].ranks
    assert_alike(ranks, one, 2**-8, 2**-6)
    assert ranks[0]["sum"] == ranks[1]["sum"]


@pytest.mark.parametrize(
    ("stage", "offload"), [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "all")]
)
def test_two_ranks_scale_their_losses_in_float16_as_one_process_does(
    stage: int, offload: str, alone: dict[Learning, Learned], together: dict[Learning, Learned]
) -> None:
    """The first step overflows and changes nothing; then the scale falls by 2^48, and doubles after each good step."""
    [one] = copy.deepcopy(alone[Learning(dtype="float16")].ranks)
    ranks = copy.deepcopy(together[Learning(stage, dtype="float16", offload=offload)].ranks)
    for each in (one, *ranks):
        assert [math.isfinite(norm) for _, norm in each["steps"]] == [False, True, True]
        each["steps"][0][1] = 0.0  # infinite, or no number at all
    assert one["steps"][0][0] == pytest.approx(one["steps"][1][0], rel=0.2)
    assert_alike(ranks, one, 2**-9, 2**-7)
    assert [rank["scale"] for rank in ranks] == [2.0**14] * 2
    assert ranks[0]["sum"] == ranks[1]["sum"]


def test_the_scale_under_zero_goes_as_torch_s_scaler_has_it() -> None:
    import random

    import torch

    from qlora_core.training.engine_deepspeed import next_scale

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler, draw = torch.amp.GradScaler("cpu", growth_interval=3), random.Random(0)
    scaler.scale(torch.zeros(()))
    for _ in range(50):
        overflows, before = draw.random() < 0.3, scaler.state_dict()
        weight.grad = torch.full((1,), math.inf if overflows else 1.0)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.state_dict() == next_scale(before, overflows)


def test_a_batch_of_32_has_the_gradient_of_8_by_4_and_of_2_ranks_by_4_by_4(
    alone: dict[Learning, Learned], together: dict[Learning, Learned]
) -> None:
    [whole] = alone[Learning(micro_batch=32, sequences=32)].gradients
    others = alone[Learning(micro_batch=8, sequences=32)].gradients
    others = [*others, *together[Learning(micro_batch=4, sequences=32)].gradients]
    assert len(others) == 3
    assert len(whole) == 2 * 2 * 7  # layers x (A, B) x linears
    for other in others:
        assert other.keys() == whole.keys()
        for name, gradient in whole.items():
            assert float((gradient - other[name]).abs().max()) < 1e-5 * float(gradient.abs().max()), name


def test_what_zero_3_leaves_whole_goes_to_the_rank_s_device(tiny_base: Path) -> None:
    """Meta stands for the GPU: DeepSpeed brings parameters there, and this what hangs on them, and buffers."""
    import bitsandbytes as bnb
    import torch

    from qlora_core.memory.measure import quantization_constants
    from qlora_core.recipe import Recipe
    from qlora_core.strategy import Strategy
    from qlora_core.training.engine_deepspeed import move_undivided
    from qlora_core.training.model import attach_adapters, load_base

    meta, recipe = torch.device("meta"), Recipe(rank=4)
    # asked for on another device, it is loaded on the host
    base = load_base(str(tiny_base), recipe, Strategy(world_size=2, zero_stage=3), "float32", meta)
    model = attach_adapters(base, recipe, 0)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    move_undivided(model, meta)
    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    states = [state for layer in layers for state in (layer.quant_state, layer.weight.quant_state)]
    moved = [*model.buffers(), *(tensor for state in states for tensor in quantization_constants(state))]
    assert {tensor.device for tensor in moved} == {meta}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_ranks_together_hold_each_element_of_the_state_once(stage: int, together: dict[Learning, Learned]) -> None:
    ranks = together[Learning(stage, "adamw_8bit")].ranks
    held: dict[str, list[int]] = {}
    for rank in ranks:
        for name, start, numel, _, _ in rank["spans"]:
            held.setdefault(name, []).extend(range(start, start + numel))
    assert held.keys() == ranks[0]["numel"].keys()
    for name, elements in held.items():
        assert sorted(elements) == list(range(ranks[0]["numel"][name])), name
