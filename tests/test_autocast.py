"""Autocast on the meta device: PyTorch's own lists, what a CPU really casts, and its cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from qlora_core.memory.autocast import NARROWED, OPTIONAL, PROMOTED, followed, narrowed, operators

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
CPU_ONLY = {"cat", "stack", "index_copy"}


@pytest.mark.parametrize(
    ("macro", "names"),
    [
        ("AT_FORALL_LOWER_PRECISION_FP", NARROWED),
        ("AT_FORALL_FP32_SET_OPT_DTYPE", OPTIONAL),
        ("AT_FORALL_PROMOTE", PROMOTED - CPU_ONLY),
    ],
)
def test_the_lists_are_those_of_pytorchs_header(macro: str, names: frozenset[str]) -> None:
    listed = re.search(rf"#define {macro}\(_\)((?:.*\\\n)*.*)", HEADER.read_text())
    assert listed is not None
    assert names == set(re.findall(r"_\((\w+)[,)]", listed[1]))


def test_cuda_casts_what_its_header_lists() -> None:
    listed = re.findall(
        r"^  _\((\w+)(?:, (\w+))?\) *\\?$", HEADER.read_text().split("AT_FORALL_LOWER_PRECISION_FP")[1], re.M
    )
    known = {str(operator).removeprefix("aten.") for operator in operators("cuda")}
    assert len(listed) > 80
    assert {f"{name}.{overload or 'default'}" for name, overload in listed} <= known


ON_EACH: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": F.linear,
    "matmul": lambda x, w: x @ w.T,
    "softmax": lambda x, w: F.softmax(x, -1),
    "layer_norm": lambda x, w: F.layer_norm(x, (8,)),
    "pow": lambda x, w: x.pow(3),
    "sum": lambda x, w: x.sum(-1),
    "cat": lambda x, w: torch.cat([x, w]),
    "mse_loss": lambda x, w: F.mse_loss(x, x + 1),
    "silu": lambda x, w: F.silu(x),
    "add": lambda x, w: x + w,
}


@pytest.mark.parametrize("name", ON_EACH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_results_have_the_dtypes_they_have_on_a_real_cpu(name: str, dtype: torch.dtype) -> None:
    def result(device: str) -> torch.dtype:
        x, w = torch.ones(8, 8, dtype=dtype, device=device), torch.ones(8, 8, device=device)
        with torch.autocast("cpu", torch.bfloat16):
            return ON_EACH[name](x, w).dtype

    with followed("cpu", casts=True):
        said = result("meta")
    assert said == result("cpu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    # docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast to"
    [
        ("linear", torch.float16),
        ("matmul", torch.float16),
        ("softmax", torch.float32),
        ("layer_norm", torch.float32),
        ("pow", torch.float32),
        ("sum", torch.float32),
        ("mse_loss", torch.float32),
        ("silu", torch.float16),
    ],
)
def test_results_have_the_dtypes_that_are_documented_for_cuda(name: str, dtype: torch.dtype) -> None:
    x, w = torch.ones(8, 8, dtype=torch.float16, device="meta"), torch.ones(8, 8, device="meta")
    with followed("cuda", casts=True), torch.autocast("cuda", torch.float16):
        assert ON_EACH[name](x, w).dtype == dtype


def test_copies_of_trained_float32_leaves_are_kept_until_the_outermost_context_ends() -> None:
    trained = torch.nn.Parameter(torch.empty(4, 4, device="meta"))
    frozen = torch.empty(4, 4, device="meta")
    with followed("cuda", casts=True):
        with torch.autocast("cuda", torch.bfloat16):
            copy = narrowed(trained)
            with torch.autocast("cuda", enabled=False):
                assert narrowed(trained) is trained
            assert narrowed(trained) is copy
            assert narrowed(frozen) is not narrowed(frozen)
        with torch.autocast("cuda", torch.bfloat16):
            assert narrowed(trained) is not copy


def test_code_that_asks_is_told_what_it_is_told_on_the_device() -> None:
    # without a device type CUDA's state is meant, as peft means it
    for kind, answer in (("cuda", True), ("cpu", False)):
        with followed(kind, casts=True), torch.autocast("meta", torch.bfloat16):  # type: ignore[arg-type]
            assert torch.is_autocast_enabled() is answer
            assert torch.is_autocast_enabled("meta")
            assert torch.get_autocast_dtype("meta") == torch.bfloat16


def test_pytorch_is_as_before_afterwards() -> None:
    before = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype, torch.clear_autocast_cache
    with followed("cuda", casts=True):
        pass
    assert (torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype, torch.clear_autocast_cache) == before
    weight = torch.empty(4, 4, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(weight, weight).dtype == torch.float32
