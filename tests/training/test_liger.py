"""Liger's loss: its real kernels, by Triton's interpreter, beside torch's; and where it is taken, and refused."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from click.testing import CliRunner
from small_runs import encode
from torch import nn

from clusters.errors import RequestError
from clusters.gpu import find_gpu
from launch.plan import plan
from orchestrator.devices import cpu_target, gpu_target
from orchestrator.planner import plan_run
from orchestrator.plans import Target
from orchestrator.spec import RunSpec, StrategySpec
from qlora_core.catalogue import find_model
from qlora_core.memory import formula
from qlora_core.recipe import Recipe
from qlora_core.strategy import Loss, Strategy
from qlora_core.training.loss import LogitChange, SummedLoss, chunked_cross_entropy

ROOT = Path(__file__).parents[2]
LIGER = ROOT / ".cache" / "liger"
"""Where `make suite` puts liger-kernel and Triton: beside the environment, all of whose imports would take longer."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, conversations: Path) -> dict[str, Any]:
    """What tests/liger_checks.py finds."""
    if not LIGER.is_dir():
        pytest.skip("liger-kernel is not in .cache/liger, where `make suite` puts it")
    folder = tmp_path_factory.mktemp("liger")
    places = os.pathsep.join(map(str, (LIGER, ROOT, ROOT / "examples", ROOT / "tests")))
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tests" / "liger_checks.py",
            tiny_base,
            encode(conversations, tiny_base, folder),
            folder,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": places},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "with a bias"])
def test_it_equals_the_stock_loss_and_its_gradient_to_float32_rounding(found: dict[str, Any], case: str) -> None:
    off = found["equal"][case]["liger"]
    assert off["value"] < 1e-6
    assert off["gradient"] < 1e-6


@pytest.mark.slow
def test_in_16_bits_it_is_as_near_as_torch_s(found: dict[str, Any]) -> None:
    """Both round the logits and their gradient to bfloat16, of which a unit in the last place is 0.8 %."""
    off = found["equal"]["in 16 bits"]
    assert off["liger"]["value"] < 1e-3
    assert off["liger"]["gradient"] < 2**-7
    assert off["liger"]["gradient"] < 2 * off["chunked"]["gradient"]


@pytest.mark.slow
def test_a_model_s_loss_is_the_one_that_transformers_takes_the_mean_of(found: dict[str, Any]) -> None:
    stock = found["model"]["stock"]
    assert found["model"]["trained"] == pytest.approx(stock, rel=1e-6)
    assert found["model"]["evaluated"] == pytest.approx(stock, rel=1e-6)


@pytest.mark.slow
def test_a_batch_with_nothing_to_learn_adds_nothing(found: dict[str, Any]) -> None:
    assert found["nothing"] == {"value": 0.0, "has_gradient": True}


@pytest.mark.slow
def test_a_run_learns_the_same_with_it(found: dict[str, Any]) -> None:
    assert len(found["run"]["liger"]) == 6
    assert found["run"]["liger"] == pytest.approx(found["run"]["chunked"], rel=1e-6)


@pytest.mark.slow
def test_formula_and_trace_agree_about_it(found: dict[str, Any]) -> None:
    assert len(found["estimates"]) == 6
    for each in found["estimates"]:
        assert each["formula"] == pytest.approx(each["trace"], rel=0.01), each["of"]


# --- where it is taken ------------------------------------------------------------------------------------------------


def run_spec(**strategy: Any) -> RunSpec:
    recipe = {"seq_len": 2048, "tokens_per_step": 2048 * 16}
    data = {"path": "data.jsonl"}
    return RunSpec.model_validate(
        {"name": "run", "model": "llama-3.1-8b", "data": data, "recipe": recipe, "strategy": strategy, "output": "out"}
    )


def gpu(*, has_liger: bool) -> Target:
    return dataclasses.replace(gpu_target(find_gpu("a100-80gb"), "auto"), has_liger=has_liger)


def test_a_run_takes_it_where_it_is_installed() -> None:
    architecture = find_model("llama-3.1-8b")
    taken = {has: plan_run(run_spec(), architecture, gpu(has_liger=has), 1).strategy.loss for has in (True, False)}
    assert taken == {True: "liger", False: "chunked"}


@pytest.mark.parametrize("strategy", [{"loss": "chunked"}, {"zero_stage": 3, "offload": "all"}])
def test_nor_where_the_specification_rules_it_out(strategy: dict[str, Any]) -> None:
    found = plan_run(run_spec(**strategy), find_model("llama-3.1-8b"), gpu(has_liger=True), 1)
    assert found.strategy.loss == "chunked"


def test_no_zero_3_is_chosen_beside_it() -> None:
    """70B in four parts would be fastest so; with Liger's loss the base stays whole."""
    recipe = Recipe(seq_len=512, tokens_per_step=512 * 64)
    spec = run_spec(world_size=4, loss="liger").model_copy(update={"recipe": recipe})
    small = dataclasses.replace(gpu(has_liger=True), usable_bytes=24 * 2**30)
    found = plan_run(spec, find_model("llama-3.1-70b"), small, 4)
    assert not found.fits
    assert (found.strategy.loss, found.strategy.zero_stage) in {("liger", stage) for stage in (0, 1, 2)}
    free = spec.model_copy(update={"strategy": StrategySpec(world_size=4)})
    assert plan_run(free, find_model("llama-3.1-70b"), small, 4).strategy.zero_stage == 3


def test_it_holds_the_logits_of_a_chunk_once_in_16_bits() -> None:
    """By hand: 1,024 x 128,256 logits x 2 bytes, where torch has them in float32 besides, more than once."""
    architecture, recipe = find_model("llama-3.2-1b"), Recipe(rank=16, seq_len=2048, tokens_per_step=2048)
    parts = formula.estimate(architecture, recipe, Strategy(loss="liger"), gpu(has_liger=True).device).gpu
    logits = 1024 * 128_256 * 2
    assert parts.peak_phase == "forward"
    assert logits <= parts.components.logits_and_loss < 1.1 * logits


def test_the_document_s_table_is_the_formula_s() -> None:
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").partition("## The loss")[2]
    recipe, device = Recipe(seq_len=2048, tokens_per_step=2048), gpu(has_liger=True).device
    for loss in get_args(Loss):
        row = next(line for line in text.splitlines() if line.startswith(f"| `{loss}` | "))
        found = [
            formula.estimate(find_model(name), recipe, Strategy(loss=loss), device).gpu.allocated_bytes / 2**30
            for name in ("llama-3.2-1b", "qwen2.5-0.5b")
        ]
        assert row.split(" | ")[-2:] == [f"{found[0]:.2f}", f"{found[1]:.2f} |"]


# --- where it is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--zero-stage", "3", "--gpus", "2"], "where ZeRO 3 does not have it whole"),
        (["--method", "full"], "in the head's own 16 bits"),
        (["--upcast", "peft"], "is not modelled"),
        (["--model", "gemma-2-2b"], "what gemma2 makes of its logits"),
        (["--gpu", "cpu"], "its kernels need a CUDA GPU"),
    ],
)
def test_what_it_does_not_go_with_is_refused(options: list[str], rule: str) -> None:
    arguments = ["--model", "7b", "--gpu", "a100-80gb", "--loss", "liger", *options]
    with pytest.raises(RequestError, match=rf"--loss: .*{rule}.* \(got liger\)\. Take the chunked loss"):
        plan.main(arguments, standalone_mode=False)


def test_a_run_on_a_cpu_is_refused() -> None:
    target = cpu_target("float32", 1, 2**34, False)
    with pytest.raises(RequestError, match=r"strategy\.loss: its kernels need a CUDA GPU"):
        plan_run(run_spec(loss="liger"), find_model("llama-3.1-8b"), target, 1)


def test_nor_does_it_pass_over_what_a_model_makes_of_its_logits() -> None:
    head, hidden, labels = nn.Linear(2, 3).requires_grad_(False), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)

    def fused(*_: object) -> torch.Tensor:
        return torch.zeros(())

    for change in (LogitChange(factor=0.25), LogitChange(divisor=8.0), LogitChange(cap=30.0)):
        with pytest.raises(ValueError, match="a head's own logits"):
            chunked_cross_entropy(head, hidden, labels, change, fused)
    assert chunked_cross_entropy(head, hidden, labels, LogitChange(factor=1.0), fused) == 0


MISSING = r"not installed: liger-kernel .*pip install \"\.\[liger\]\""


def test_where_it_is_not_installed_a_worker_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    with pytest.raises(RequestError, match=rf"strategy\.loss: .*{MISSING}"):
        SummedLoss(nn.Linear(1, 1), "liger")


def test_nor_is_it_traced_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qlora_core.memory.liger", None)
    arguments = ["--model", "smollm2-135m", "--gpu", "h200", "--loss", "liger", "--estimator", "trace"]
    with pytest.raises(RequestError, match=rf"--estimator: .*{MISSING}"):
        plan.main(arguments, standalone_mode=False)


def test_the_explanation_says_what_is_held() -> None:
    arguments = ["--model", "llama-3.1-8b", "--gpu", "h200", "--loss", "liger", "--explain"]
    told = CliRunner().invoke(plan, arguments, standalone_mode=False)
    assert "512 x 128,256 x 2 bytes" in told.stdout
    assert "once, then their gradient in their place" in " ".join(told.stdout.split())
