"""Carried out by tests/training/test_liger.py in a process of its own: Liger's real kernels, by Triton's interpreter.

They run on a CPU's tensors then. Prints what it found as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from small_runs import Watcher, build, recipe_of
from torch import nn
from transformers import AutoModelForCausalLM

from clusters.gpu import find_gpu
from orchestrator.devices import gpu_target
from qlora_core.catalogue import find_model
from qlora_core.memory import formula, trace
from qlora_core.recipe import Recipe
from qlora_core.strategy import Attention, Loss, Strategy
from qlora_core.training import loss as losses
from qlora_core.training.engines import build_engine
from qlora_core.training.loop import train
from qlora_core.training.loss import SummedLoss, chunked_cross_entropy, liger_cross_entropy

ROWS, WIDTH, VOCABULARY, CHUNK = 150, 16, 130, 64
"""Three chunks, of which the last is shorter, and a vocabulary that is no power of two."""


class Worth(NamedTuple):
    """A loss, and its gradient by the hidden states."""

    value: float
    gradient: torch.Tensor

    def off(self, exact: Worth) -> dict[str, float]:
        """How far it is from the exact one, of that."""
        most = exact.gradient.abs().max()
        gradient = (self.gradient.double() - exact.gradient).abs().max() / most
        return {"value": abs(self.value / exact.value - 1), "gradient": float(gradient)}


def worth(loss: torch.Tensor, hidden: torch.Tensor) -> Worth:
    (loss / 3).backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    return Worth(float(loss.detach()), hidden.grad)


def equality(dtype: torch.dtype, *, bias: bool) -> dict[str, Any]:
    """Liger's, and torch's in chunks, beside the whole in float64."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(False)
    hidden, labels = torch.randn(ROWS, WIDTH, dtype=dtype) * 3, torch.randint(0, VOCABULARY, (ROWS,))
    wide = hidden.double().requires_grad_()
    logits = nn.functional.linear(wide, head.weight.double(), None if head.bias is None else head.bias.double())
    exact = worth(nn.functional.cross_entropy(logits, labels, reduction="sum"), wide)
    found = {}
    for name, fused in (("liger", liger_cross_entropy()), ("chunked", None)):
        leaf = hidden.clone().requires_grad_()
        found[name] = worth(chunked_cross_entropy(head, leaf, labels, fused=fused), leaf).off(exact)
    return found


def nothing_to_learn() -> dict[str, Any]:
    hidden = torch.randn(0, WIDTH, requires_grad=True)
    head = nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)
    loss = chunked_cross_entropy(head, hidden, torch.zeros(0, dtype=torch.long), fused=liger_cross_entropy())
    loss.backward()  # type: ignore[no-untyped-call]
    return {"value": float(loss.detach()), "has_gradient": hidden.grad is not None}


def of_a_model(base: Path) -> dict[str, float]:
    """With gradients and without, as an evaluation has it, beside the mean that transformers takes."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    torch.manual_seed(1)
    ids = torch.randint(5, 200, (2, 40))
    labels = ids.clone()
    labels[:, :10] = -100
    learned = int((labels[:, 1:] != -100).sum())
    loss = SummedLoss(model, "liger")
    model.enable_input_require_grads()
    with torch.no_grad():
        evaluated = float(loss(ids, labels))
    return {
        "stock": float(model(input_ids=ids, labels=labels).loss.detach()) * learned,
        "trained": float(loss(ids, labels).detach()),
        "evaluated": evaluated,
    }


def a_run(base: Path, data: Path, folder: Path) -> dict[str, list[float]]:
    """The losses of a run's steps by each kind of loss."""
    found: dict[str, list[float]] = {}
    kinds: tuple[Loss, ...] = ("liger", "chunked")
    for kind in kinds:
        run, watcher = build(base, data, folder / kind, recipe_of()), Watcher()
        engine = build_engine(SummedLoss(run.model, kind), run.recipe, run.strategy)
        train(dataclasses.replace(run, engine=engine), watcher, None)
        found[kind] = [event["loss"] for event in watcher.events if event["event"] == "step"]
    return found


def estimates() -> list[dict[str, Any]]:
    """Formula and trace of some models' steps on a GPU; the trace runs Liger's own code, its kernels apart."""
    device = gpu_target(find_gpu("a100-80gb"), "auto").device
    cases: tuple[tuple[str, int, bool, Attention], ...] = (
        ("qwen2.5-0.5b", 2, True, "sdpa"),
        ("smollm2-135m", 4, False, "sdpa"),
        ("gemma-3-1b", 1, True, "eager"),
    )
    found = []
    for name, micro_batch, checkpointing, attention in cases:
        recipe = Recipe(rank=16, seq_len=2048, tokens_per_step=2048 * micro_batch)
        strategy = Strategy(
            micro_batch=micro_batch, gradient_checkpointing=checkpointing, attention=attention, loss="liger"
        )
        request = find_model(name), recipe, strategy, device
        for phase in ("forward", "backward"):
            both = [getattr(of(*request).gpu.phases, phase) for of in (formula.estimate, trace.estimate)]
            found.append({"of": f"{name}, {phase}", "formula": both[0], "trace": both[1]})
    return found


def main(base: Path, data: Path, folder: Path) -> None:
    with mock.patch.object(losses, "LOSS_CHUNK_TOKENS", CHUNK):
        found = {
            "equal": {
                "plain": equality(torch.float32, bias=False),
                "with a bias": equality(torch.float32, bias=True),
                "in 16 bits": equality(torch.bfloat16, bias=False),
            },
            "nothing": nothing_to_learn(),
            "model": of_a_model(base),
            "run": a_run(base, data, folder),
        }
    print(json.dumps({**found, "estimates": estimates()}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
