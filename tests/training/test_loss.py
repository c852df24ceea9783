"""The loss: transformers' own value, whichever way it is computed, without ever holding all logits when chunked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_core.memory.measure import StorageTracker
from qlora_core.strategy import LOSS_CHUNK_TOKENS
from qlora_core.training.examples import IGNORED
from qlora_core.training.loss import SummedLoss, chunked_cross_entropy


@pytest.mark.parametrize("kind", ["full", "chunked"])
def test_it_is_the_sum_that_transformers_takes_the_mean_of(tiny_base: Path, kind: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    torch.manual_seed(1)
    ids = torch.randint(5, 200, (3, 40))
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :10] = IGNORED
    loss = SummedLoss(base, "full" if kind == "full" else "chunked")(ids, labels)
    learned = int((labels[:, 1:] != IGNORED).sum())
    expected = base(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert float(loss.detach()) / learned == pytest.approx(float(expected.detach()), rel=1e-6)


def changing_model(model_type: str, **changes: Any) -> Any:
    """A small one, whose logits are large enough for a cap to matter."""
    config = AutoConfig.for_model(
        model_type,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        initializer_range=0.2,
        **changes,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("trained", ["adapters", "all weights"])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_chunks_of_changed_logits_have_the_loss_and_gradients_of_transformers(
    model_type: str, changes: dict[str, float], trained: str
) -> None:
    model = changing_model(model_type, **changes)
    if trained == "adapters":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # while it is zero, A has no gradient
                nn.init.normal_(weight, std=0.1)
    ids = torch.randint(1, 64, (8, 300))
    labels = ids.clone()
    labels[:, :10] = IGNORED
    learned = int((labels[:, 1:] != IGNORED).sum())
    assert learned > 2 * LOSS_CHUNK_TOKENS
    stock, chunked = model(input_ids=ids, labels=labels).loss * learned, SummedLoss(model, "chunked")(ids, labels)
    assert float(chunked.detach()) == pytest.approx(float(stock.detach()), rel=1e-6)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    of_stock, of_chunks = (torch.autograd.grad(loss, list(weights.values())) for loss in (stock, chunked))
    for name, expected, found in zip(weights, of_stock, of_chunks, strict=True):
        assert float((found - expected).norm()) < 1e-5 * float(expected.norm()), name


@pytest.mark.parametrize("trained", [False, True])
def test_chunked_gradients_equal_those_of_the_whole(trained: bool) -> None:
    torch.manual_seed(0)
    rows = 2 * LOSS_CHUNK_TOKENS + 7  # an uneven number of chunks
    head = nn.Linear(16, 50, bias=False).requires_grad_(trained)
    hidden, labels = torch.randn(rows, 16), torch.randint(0, 50, (rows,))
    gradients = []
    for chunked in (False, True):
        leaf = hidden.clone().requires_grad_()
        whole = nn.functional.cross_entropy(head(leaf), labels, reduction="sum")
        loss = chunked_cross_entropy(head, leaf, labels) if chunked else whole
        assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
        head.zero_grad()
        (loss / 3).backward()  # type: ignore[no-untyped-call]
        gradients.append([leaf.grad, head.weight.grad] if trained else [leaf.grad])
    for of_whole, of_chunks in zip(*gradients, strict=True):
        assert of_whole is not None
        assert of_chunks is not None
        # the sums of thousands of numbers of either sign, whose order is the processor's
        assert float((of_whole - of_chunks).abs().max()) <= 5e-6 * float(of_whole.abs().max())


def test_in_16_bits_the_step_s_divisor_is_not_rounded_with_the_gradient() -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    hidden, labels = torch.randn(600, 16, dtype=torch.bfloat16), torch.randint(0, 50, (600,))
    one, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    third = chunked_cross_entropy(head, one, labels) / 3  # a third is 0.2 % off in bfloat16
    third.backward()  # type: ignore[no-untyped-call]
    stock = nn.functional.cross_entropy(exact @ head.weight.double().T, labels, reduction="sum") / 3
    stock.backward()  # type: ignore[no-untyped-call]
    assert one.grad is not None
    assert exact.grad is not None
    assert one.grad.dtype == torch.bfloat16
    scale = (one.grad.double() * exact.grad).sum() / exact.grad.square().sum()
    assert float(scale) == pytest.approx(1, abs=5e-4)


@pytest.mark.parametrize("trained", [False, True])
def test_chunked_never_holds_the_logits_of_all_tokens(trained: bool) -> None:
    vocabulary, chunks = 512, 8
    rows = chunks * LOSS_CHUNK_TOKENS
    head = nn.Linear(4, vocabulary, bias=False).requires_grad_(trained)
    hidden = torch.randn(rows, 4, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.long)
    with StorageTracker() as tracker:
        chunked_cross_entropy(head, hidden, labels).backward()  # type: ignore[no-untyped-call]
    all_logits = rows * vocabulary * 4
    assert tracker.peak < 0.5 * all_logits


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("trained", "products"), [(False, 2), (True, 4)])
def test_a_frozen_head_makes_its_logits_once(trained: bool, products: int) -> None:
    """Forward, and by the hidden states; a trained head's once more, and by itself."""
    head, chunks = nn.Linear(8, 16, bias=False).requires_grad_(trained), 3
    hidden = torch.randn(chunks * LOSS_CHUNK_TOKENS, 8, requires_grad=True)
    with Products() as made:  # type: ignore[no-untyped-call]
        chunked_cross_entropy(head, hidden, torch.zeros(len(hidden), dtype=torch.long)).backward()  # type: ignore[no-untyped-call]
    assert made.count == chunks * products


def test_a_batch_with_nothing_to_learn_adds_nothing() -> None:
    hidden = torch.randn(0, 4, requires_grad=True)
    assert float(chunked_cross_entropy(nn.Linear(4, 8), hidden, torch.zeros(0, dtype=torch.long))) == 0.0
