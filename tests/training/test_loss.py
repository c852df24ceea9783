"""The loss: transformers' own value, whichever way it is computed, without ever holding all logits when chunked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_core.memory.measure import StorageTracker
from qlora_core.strategy import LOSS_CHUNK_TOKENS
from qlora_core.training.loss import IGNORED, SummedLoss, chunked_cross_entropy


@pytest.mark.parametrize("kind", ["full", "chunked"])
def test_it_is_the_sum_that_transformers_takes_the_mean_of(tiny_base: Path, kind: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    torch.manual_seed(1)
    ids = torch.randint(5, 200, (3, 40))
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :10] = IGNORED
    loss = SummedLoss(base, "full" if kind == "full" else "chunked")(ids, mask, labels)
    learned = int((labels[:, 1:] != IGNORED).sum())
    expected = base(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert float(loss.detach()) / learned == pytest.approx(float(expected.detach()), rel=1e-6)


def test_chunked_gradients_equal_those_of_the_whole() -> None:
    torch.manual_seed(0)
    rows = 2 * LOSS_CHUNK_TOKENS + 7  # an uneven number of chunks
    head = nn.Linear(16, 50, bias=False)
    hidden, labels = torch.randn(rows, 16), torch.randint(0, 50, (rows,))
    gradients = []
    for chunked in (False, True):
        leaf = hidden.clone().requires_grad_()
        whole = nn.functional.cross_entropy(head(leaf), labels, reduction="sum")
        (chunked_cross_entropy(head, leaf, labels) if chunked else whole).backward()  # type: ignore[no-untyped-call]
        gradients.append(leaf.grad)
    whole_gradient, chunked_gradient = gradients
    assert whole_gradient is not None
    assert chunked_gradient is not None
    assert torch.allclose(whole_gradient, chunked_gradient, rtol=1e-5, atol=1e-6)


def test_chunked_never_holds_the_logits_of_all_tokens() -> None:
    vocabulary, chunks = 512, 8
    rows = chunks * LOSS_CHUNK_TOKENS
    head = nn.Linear(4, vocabulary, bias=False)
    hidden = torch.randn(rows, 4, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.long)
    with StorageTracker() as tracker:
        chunked_cross_entropy(head, hidden, labels).backward()  # type: ignore[no-untyped-call]
    all_logits = rows * vocabulary * 4
    assert tracker.peak < 0.5 * all_logits


def test_a_batch_with_nothing_to_learn_adds_nothing() -> None:
    hidden = torch.randn(0, 4, requires_grad=True)
    assert float(chunked_cross_entropy(nn.Linear(4, 8), hidden, torch.zeros(0, dtype=torch.long))) == 0.0
