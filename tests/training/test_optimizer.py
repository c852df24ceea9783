"""Learning rates beside transformers' own schedules, and clipped gradients beside torch's own clipping."""

from __future__ import annotations

import copy
import ctypes
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import get_scheduler

from qlora_core.memory.bytes import PAGED_NUMEL
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.engine_torch import TorchEngine
from qlora_core.training.loss import SummedLoss
from qlora_core.training.optimizer import build_optimizer, build_scheduler, check_managed

STEPS = 10
PEAK = 1e-3
UNPAGED = Strategy(paged_optimizer=False)


def of_schedule(schedule: Any, warmup_fraction: float, **fields: Any) -> Recipe:
    return Recipe(schedule=schedule, warmup_fraction=warmup_fraction, learning_rate=PEAK, **fields)


def rates(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[list[float]]:
    """The learning rate of each group at each step."""
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return used


def ours(recipe: Recipe) -> list[list[float]]:
    names = ("q.lora_A.weight", "q.lora_B.weight")
    optimizer = build_optimizer({name: nn.Parameter(torch.zeros(1)) for name in names}, recipe, UNPAGED)
    return rates(optimizer, build_scheduler(optimizer, recipe, STEPS), STEPS)


def test_memory_that_cannot_be_paged_is_an_error_of_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[Any] = []
    driver = SimpleNamespace(  # CUDA's, with a gigabyte
        cuMemAllocManaged=lambda address, size, flags: 2 if size.value > 2**30 else 0, cuMemFree_v2=freed.append
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    check_managed(2**30)
    assert len(freed) == 1
    with pytest.raises(torch.OutOfMemoryError, match="1073741825 bytes of managed memory"):
        check_managed(2**30 + 1)
    assert len(freed) == 1


def test_memory_for_what_is_paged_is_asked_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("qlora_core.training.optimizer.check_managed", asked.append)
    monkeypatch.setattr(bnb.optim.AdamW, "get_state_buffer", lambda *given: torch.zeros(0))  # it would page on a GPU
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in ("q.lora_A.weight", "q.lora_B.weight")}
    optimizer: Any = build_optimizer(parameters, Recipe(), Strategy(paged_optimizer=True))
    for numel in (PAGED_NUMEL - 1, PAGED_NUMEL):
        on_gpu = SimpleNamespace(device=SimpleNamespace(type="cuda"), numel=lambda numel=numel: numel)
        optimizer.get_state_buffer(on_gpu, torch.float32)
    assert asked == [4 * PAGED_NUMEL]


@pytest.mark.parametrize(("warmup_fraction", "warmup_steps"), [(0.0, 0), (0.2, 2), (1.0, 10)])
@pytest.mark.parametrize(
    ("schedule", "theirs"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")]
)
def test_learning_rates_are_those_of_transformers_one_step_later(
    schedule: str, theirs: str, warmup_fraction: float, warmup_steps: int
) -> None:
    reference = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=PEAK)
    # one step more than the run has, of which the first is left out
    scheduler = get_scheduler(theirs, reference, num_warmup_steps=warmup_steps, num_training_steps=STEPS + 1)
    expected = [rate for (rate,) in rates(reference, scheduler, STEPS + 1)[1:]]
    used = [rate for (rate,) in ours(of_schedule(schedule, warmup_fraction))]
    assert used == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1 - done),
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
    ],
)
def test_no_step_has_a_learning_rate_of_0(schedule: str, decay: Callable[[float], float]) -> None:
    # by hand: half the peak, the peak, and eight steps of the way to what would be the eleventh, where a decay ends
    factors = [0.5, 1.0, *(decay(step / 9) for step in range(1, 9))]
    used = [rate for (rate,) in ours(of_schedule(schedule, 0.2))]
    assert used == pytest.approx([PEAK * factor for factor in factors], rel=1e-12)
    assert min(used) > 0


def test_the_faster_group_of_loraplus_keeps_its_ratio_at_every_step() -> None:
    for slow, fast in ours(of_schedule("cosine", 0.2, loraplus_lr_ratio=16.0)):
        assert fast == pytest.approx(16 * slow, rel=1e-12)


# --- clipping ---------------------------------------------------------------------------------------------------------


class Products(nn.Module):
    """Losses whose gradients are their inputs: of one weight in 2 numbers, of another in 1; a third is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (self.first * first).sum() + (self.second * second * self.frozen).sum()


def test_the_gradient_of_all_micro_batches_is_clipped_to_its_global_norm_as_torch_does() -> None:
    recipe = Recipe(max_grad_norm=1.3, learning_rate=0.1, weight_decay=0.01)
    module = Products()
    reference = copy.deepcopy(module)
    engine = TorchEngine(cast(SummedLoss, module), recipe, UNPAGED)
    weights = [reference.first, reference.second]
    adamw = torch.optim.AdamW(weights, lr=0.1, weight_decay=0.01)
    seen: list[list[float]] = []
    engine.optimizer.register_step_pre_hook(
        lambda *_: seen.append([*module.first.grad.tolist(), *module.second.grad.tolist()])  # type: ignore[union-attr]
    )
    # (3, 4, 12) in two parts, of norm 13; then one below the limit, which stays as it is; then one far above it
    steps = [[([1.0, 4.0], [2.0]), ([2.0, 0.0], [10.0])], [([0.3, -0.4], [0.0])], [([-200.0, 10.0], [7.0])]]
    norms = []
    for step in steps:
        adamw.zero_grad()
        for number, (first, second) in enumerate(step):
            batch = {"first": torch.tensor(first), "second": torch.tensor(second)}
            with engine.micro_step(last=number == len(step) - 1):
                engine.backward(engine.loss(batch))
            reference(**batch).backward()
        expected = nn.utils.clip_grad_norm_(weights, 1.3)
        clipped = [number for weight in weights for number in cast(torch.Tensor, weight.grad).tolist()]
        adamw.step()
        norms.append(engine.step())
        assert norms[-1] == float(expected)
        assert seen[-1] == clipped
        assert torch.equal(module.first, reference.first)
        assert torch.equal(module.second, reference.second)
    assert norms == pytest.approx([13, 0.5, math.sqrt(200**2 + 10**2 + 7**2)])
    assert seen[0] == pytest.approx([0.3, 0.4, 1.2], rel=1e-6)
    assert seen[1] == pytest.approx([0.3, -0.4, 0])
    assert module.frozen.item() == 1
