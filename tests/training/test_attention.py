"""Attention on a CPU in 16 bits: result and gradients about as exact as eager attention's, and all else as it was."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from qlora_core.strategy import ATTENTION_BLOCK
from qlora_core.training import attention
from qlora_core.training.attention import CausalAttention, attend_on_a_cpu, attention_forward

SHAPES = [
    pytest.param(2, 4, 4, 2 * ATTENTION_BLOCK, 64, id="whole blocks"),
    pytest.param(1, 8, 2, ATTENTION_BLOCK + 44, 32, id="grouped heads, a part of a block"),
    pytest.param(3, 9, 3, 7, 16, id="less than a block"),
    pytest.param(2, 4, 1, ATTENTION_BLOCK + 1, 128, id="one key head, one row more"),
]


def inputs(batch: int, heads: int, keys: int, length: int, dim: int) -> list[torch.Tensor]:
    """Queries, keys, values, and the gradient of what comes out, as transformers lays them out."""
    torch.manual_seed(0)
    return [
        (factor * torch.randn(batch, length, number, dim)).to(torch.bfloat16).transpose(1, 2)
        for number, factor in ((heads, 2), (keys, 1), (keys, 1), (heads, 1))
    ]


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The relative error."""
    return float((found.double() - wanted).norm() / wanted.norm())


def gradients(attend: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, of: torch.Tensor) -> Any:
    """What comes out, and the gradients of what goes in."""
    leaves = [x.detach().requires_grad_() for x in (query, key, value)]
    output = attend(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, of.to(output.dtype))


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(D)) v written out."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ value


def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Transformers' own composition of operators."""
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], training=True)
    length = query.shape[2]
    mask = torch.full((length, length), torch.finfo(query.dtype).min, dtype=query.dtype).triu(1)[None, None]
    attended, _ = eager_attention_forward(cast(Any, module), query, key, value, mask, query.shape[-1] ** -0.5)
    return cast(torch.Tensor, attended.transpose(1, 2))


def torchs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=key.shape[1] != query.shape[1])


def ours(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, CausalAttention.apply(query, key, value, query.shape[-1] ** -0.5))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("batch", "heads", "keys", "length", "dim"), SHAPES)
def test_result_and_gradients_are_about_as_exact_as_those_of_eager_attention(
    batch: int, heads: int, keys: int, length: int, dim: int
) -> None:
    given = inputs(batch, heads, keys, length, dim)
    yardstick = gradients(exact, *(x.double() for x in given))
    stock, own = (gradients(attend, *given) for attend in (eager, ours))
    for mine, theirs, wanted in zip(own, stock, yardstick, strict=True):
        assert far(mine, wanted) <= 1.3 * far(theirs, wanted)
        assert far(mine, wanted) < 0.01  # two roundings of 2^-9 each, of scores of a few units
    assert all(mine.transpose(1, 2).is_contiguous() for mine in own)


@pytest.mark.parametrize("bias", [10, 100])
def test_keys_with_a_large_bias_are_not_rounded_more_coarsely(bias: float) -> None:
    query, key, value, of = inputs(2, 4, 2, 2 * ATTENTION_BLOCK, 64)
    key = key + bias * torch.randn(1, 2, 1, 64).to(torch.bfloat16)  # scores of tens and hundreds, alike in a row
    yardstick = gradients(exact, *(x.double() for x in (query, key, value, of)))
    of_eager, of_torch, own = (gradients(attend, query, key, value, of) for attend in (eager, torchs, ours))
    assert far(own[0], yardstick[0]) < 0.01 < 2 * far(of_eager[0], yardstick[0])
    for mine, torchs_own, wanted in zip(own[1:], of_torch[1:], yardstick[1:], strict=True):
        assert far(mine, wanted) < max(0.01, 1.5 * far(torchs_own, wanted))


def test_a_later_token_has_no_part_in_an_earlier_ones_gradient() -> None:
    query, key, value, of = inputs(1, 2, 2, ATTENTION_BLOCK + 9, 16)
    of[:, :, 50:] = 0
    _, of_query, of_key, of_value = gradients(ours, query, key, value, of)
    assert all(float(found[:, :, 50:].abs().max()) == 0 for found in (of_query, of_key, of_value))
    assert all(float(found[:, :, :50].abs().max()) > 0 for found in (of_query, of_key, of_value))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two computes."""
    found: list[str] = []

    def own(*given: Any) -> Any:
        found.append("ours")
        return CausalAttention.apply(*given)  # type: ignore[no-untyped-call]

    def stock(*given: Any, **options: Any) -> Any:
        found.append("transformers'")
        return sdpa_attention_forward(*given, **options)

    monkeypatch.setattr(attention, "CausalAttention", SimpleNamespace(apply=own))
    monkeypatch.setattr(attention, "sdpa_attention_forward", stock)
    return found


MODULE = SimpleNamespace(is_causal=True, training=True, num_key_value_groups=1)


@pytest.mark.parametrize(
    ("dtype", "changed", "by"),
    [
        (torch.bfloat16, {}, "ours"),
        (torch.float16, {}, "transformers'"),  # scores may be larger than its largest number
        (torch.float32, {}, "transformers'"),
        (torch.bfloat16, {"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()}, "transformers'"),
        (torch.bfloat16, {"dropout": 0.5}, "transformers'"),
        (torch.bfloat16, {"is_causal": False}, "transformers'"),  # as a vision tower's
        (torch.bfloat16, {"position_bias": torch.zeros(1, 2, 6, 6, dtype=torch.bfloat16)}, "transformers'"),
        (torch.bfloat16, {"module": SimpleNamespace(is_causal=False, training=True)}, "transformers'"),
    ],
)
def test_only_what_is_causal_and_in_bfloat16_is_ours(
    taken: list[str], dtype: torch.dtype, changed: dict[str, Any], by: str
) -> None:
    query, key, value = (torch.randn(1, 2, 6, 8, dtype=dtype, requires_grad=True) for _ in range(3))
    given: dict[str, Any] = {"module": MODULE, "attention_mask": None, **changed}
    output, weights = attention_forward(query=query, key=key, value=value, **given)
    assert taken == [by]
    assert weights is None
    assert output.shape == (1, 6, 2, 8)


@pytest.mark.parametrize(("keys", "scaling"), [(4, None), (2, 0.3)])
def test_it_gives_what_transformers_gives(keys: int, scaling: float | None) -> None:
    query, key, value, _ = inputs(2, 4, keys, 40, 16)
    module = cast(Any, SimpleNamespace(is_causal=True, training=True, num_key_value_groups=4 // keys))
    expected, _ = sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
    found, _ = attention_forward(module, query, key, value, None, scaling=scaling)
    assert not torch.equal(found, expected)  # it is another's
    assert far(found, expected.double()) < 0.01


def test_evaluation_and_what_is_generated_are_transformers_own(taken: list[str]) -> None:
    query, key, value = (torch.randn(1, 2, 6, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    attention_forward(cast(Any, SimpleNamespace(training=False)), query, key, value, None)
    attention_forward(cast(Any, MODULE), query[:, :, :1], key, value, None)
    attention_forward(cast(Any, MODULE), query, key, torch.randn(1, 2, 6, 4, dtype=torch.bfloat16), None)
    assert taken == ["transformers'"] * 3


def test_a_checkpoints_first_run_is_computed_as_its_second(taken: list[str]) -> None:
    for reentrant in (False, True):
        query, key, value = (torch.randn(1, 2, 6, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        output = checkpoint(
            lambda q, k, v: attention_forward(cast(Any, MODULE), q, k, v, None)[0],
            query,
            key,
            value,
            use_reentrant=reentrant,
        )
        output.sum().backward()
    assert taken == ["ours"] * 4


def test_under_autocast_it_is_its_dtype_that_counts(taken: list[str]) -> None:
    query, key, value = (torch.randn(1, 2, 6, 8, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = attention_forward(cast(Any, MODULE), query, key, value, None)
    assert taken == ["ours"]
    assert output.dtype == torch.bfloat16


def test_transformers_finds_it_under_the_name_of_sdpa() -> None:
    attend_on_a_cpu()
    assert AttentionInterface()["sdpa"] is attention_forward
