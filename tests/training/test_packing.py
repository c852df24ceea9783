"""Packing: rows as full as they can be, in which no example sees another; and the rehearsal of the largest of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from meta_models import LINEAR_ATTENTION, PIXTRAL, SIGLIP
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from qlora_core.architecture import MIXES_PACKED
from qlora_core.memory.measure import StorageTracker
from qlora_core.recipe import Recipe
from qlora_core.training.dataset.tokens import Encoded, save_examples
from qlora_core.training.examples import Examples, Rows
from qlora_core.training.layout import lay_out, pack
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import model_class
from qlora_core.training.sampling import micro_batches

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "gemma3": {"head_dim": 8, "sliding_window": 8},
    "mistral3": {"model_type": "ministral3", "head_dim": 8},
    "phi3": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}
HYBRID = {"head_dim": 8, "full_attention_interval": 2, "initializer_range": 0.05, **LINEAR_ATTENTION}
OLDER: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4, "hidden_size": 32},
    "falcon": {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "alibi": False},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "activation_dropout": 0.0, "dropout": 0.0},
    "qwen3_5_text": HYBRID,
    "qwen3_5_moe_text": {
        **HYBRID,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}
"""The first have names of their own for the shape; defaults of what is not named are small enough here."""
SDPA_TOO = ("llama", "qwen3", "mistral", "gemma3_text", "gemma3", "mistral3", "gpt_neox")


def causal_model(model_type: str, attention: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    fields = {**SHAPE, **MODELS.get(model_type, {}), **changes}
    if vision := {"gemma3": SIGLIP, "mistral3": PIXTRAL}.get(model_type):
        fields = {"text_config": fields, "vision_config": vision}
    config = AutoConfig.for_model(model_type, **fields)
    return model_class(config).from_config(config, attn_implementation=attention)


def written(folder: Path, lengths: Sequence[int]) -> Examples:
    """Examples of random tokens, the later half of each learned."""
    chance = random.Random(0)
    examples = [
        Encoded([chance.randrange(1, 64) for _ in range(n)], [place >= n // 2 for place in range(n)]) for n in lengths
    ]
    save_examples(examples, folder / "x.safetensors")
    return Examples(folder / "x.safetensors")


def recipe(packing: bool, seq_len: int = 32) -> Recipe:
    return Recipe(packing=packing, seq_len=seq_len, tokens_per_step=4 * seq_len)


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [(name, "eager") for name in MODELS] + [(name, "sdpa") for name in SDPA_TOO],
)
@pytest.mark.parametrize("loss", ["chunked", "full"])
def test_the_loss_of_packed_examples_and_its_gradient_are_those_of_each_alone(
    tmp_path: Path, model_type: str, attention: str, loss: Any
) -> None:
    model = get_peft_model(
        causal_model(model_type, attention), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    summed = SummedLoss(model, loss)
    examples = written(tmp_path, [11, 3, 20, 7, 2, 14, 18, 9])
    results = []
    for packing in (False, True):
        rows = Rows(examples, recipe(packing), seed=0)
        total = torch.zeros(())
        model.zero_grad()
        # alone: one example a batch, without a mask of any kind to err in
        for batch in [[row] for row in range(len(rows))] if not packing else [list(range(len(rows)))]:
            value = summed(**rows.batch(batch, 0, CPU))
            value.backward()
            total = total + value.detach()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((len(rows), total, gradients))
    (alone, loss_alone, gradients_alone), (packed, loss_packed, gradients_packed) = results
    assert (alone, packed) == (8, 3)
    assert float(loss_packed) == pytest.approx(float(loss_alone), rel=1e-5)
    assert gradients_packed.keys() == gradients_alone.keys()
    for name, gradient in gradients_alone.items():
        assert float((gradients_packed[name] - gradient).norm()) < 1e-5 * float(gradient.norm()), name


@pytest.mark.parametrize(
    ("model_type", "attention"),
    [(name, "eager") for name in (*MODELS, *OLDER)] + [(name, "sdpa") for name in (*SDPA_TOO, "falcon", "opt")],
)
def test_examples_that_are_padded_in_one_batch_learn_what_each_learns_alone(
    tmp_path: Path, model_type: str, attention: str
) -> None:
    """Though no attention mask says what padding is."""
    model = causal_model(model_type, attention, **OLDER.get(model_type, {}))
    rows = Rows(written(tmp_path, [11, 3, 20, 7]), recipe(False), seed=0)
    summed, found = SummedLoss(model.eval(), "full"), []
    for batches in ([[0], [1], [2], [3]], [[0, 1, 2, 3]]):
        model.zero_grad()
        losses = [summed(**rows.batch(batch, 0, CPU)) for batch in batches]
        total = sum(losses)
        total.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((float(total.detach()), gradients))
    (alone, gradients_alone), (padded, gradients_padded) = found
    assert padded == pytest.approx(alone, rel=1e-6)
    for name, gradient in gradients_alone.items():
        torch.testing.assert_close(gradients_padded[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_padded_micro_batch_needs_no_more_than_a_full_one(tmp_path: Path) -> None:
    """With a mask, grouped keys and values would be copied out to all heads, and kept beside the mask."""
    peaks = []
    for lengths in ([32, 32, 32], [32, 20, 5]):
        rows = Rows(written(tmp_path, lengths), recipe(False), seed=0)
        summed = SummedLoss(causal_model("llama", "sdpa"), "full")
        batch = rows.batch([0, 1, 2], 0, CPU)
        with StorageTracker() as tracker:
            summed(**batch).backward()
        peaks.append(tracker.peak)
    assert peaks[1] == peaks[0]


@pytest.mark.parametrize("model_type", sorted(MIXES_PACKED - {"gpt_oss", "mpt"}))
def test_a_model_that_is_refused_would_mix_what_is_packed(tmp_path: Path, model_type: str) -> None:
    summed = SummedLoss(causal_model(model_type, "eager", **OLDER[model_type]).eval(), "full")
    examples = written(tmp_path, [11, 13])
    together, alone = Rows(examples, recipe(True), seed=0), Rows(examples, recipe(False), seed=0)
    packed = float(summed(**together.batch([0], 0, CPU)).detach())
    assert packed != pytest.approx(
        sum(float(summed(**alone.batch([row], 0, CPU)).detach()) for row in range(2)), rel=1e-5
    )


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_packed_rows_hold_every_example_once_and_none_too_much(lengths: list[int]) -> None:
    rows = pack(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 64 for row in rows)


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[int]:
    """The textbook's: the fullest row that takes it, looked for among all rows. The rows' sums."""
    sums: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, total in enumerate(sums) if total + length <= capacity]
        if fitting:
            sums[max(fitting, key=lambda row: sums[row])] += length
        else:
            sums.append(length)
    return sorted(sums)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=100))
def test_rows_are_those_of_best_fit_decreasing(lengths: list[int]) -> None:
    assert sorted(sum(lengths[index] for index in row) for row in pack(lengths, 50)) == best_fit_decreasing(lengths, 50)


def test_at_most_three_per_cent_of_packed_rows_is_padding() -> None:
    """Lengths as of conversations: lognormal, median 250 tokens, one in six beyond 660, cut off at 2,048."""
    chance = random.Random(0)
    lengths = [min(2048, max(8, round(chance.lognormvariate(5.52, 0.97)))) for _ in range(5000)]
    one_each = lay_out(lengths, Recipe(seq_len=2048, tokens_per_step=2048))
    packed = lay_out(lengths, Recipe(seq_len=2048, tokens_per_step=2048, packing=True))
    assert one_each.waste > 0.7
    assert packed.waste < 0.03


@pytest.mark.parametrize(
    ("packing", "lengths", "tokens", "positions"),
    [
        (False, [7, 2, 9, 5], 23, 28),  # 9 beside 7, 5 beside 2
        (False, [6, 6, 6, 6], 24, 24),
        (True, [20, 12] * 4, 128, 128),  # four full rows
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_s_positions_are_the_tokens_and_the_padding_of_all_its_micro_batches(
    tmp_path: Path, packing: bool, lengths: list[int], tokens: int, positions: int, world_size: int
) -> None:
    rows = Rows(written(tmp_path, lengths), recipe(packing), seed=0)
    step = rows.order.step(0)
    assert sum(rows.lengths[row] for row in step) == tokens
    assert rows.positions(step, micro_batch=2) == positions
    computed = 0
    for rank in range(world_size):
        for batch in micro_batches(step, rows.lengths, rank=rank, world_size=world_size, micro_batch=2):
            computed += rows.batch(batch, 0, CPU)["input_ids_BS"].numel()
    assert computed == positions


def test_the_largest_micro_batch_of_a_run_is_found_among_those_it_will_see(tmp_path: Path) -> None:
    lengths = [4, 30, 8, 29, 5, 28, 6, 7, 3, 9, 10, 11]
    rows = Rows(written(tmp_path, lengths), recipe(False), seed=0)
    for steps in (1, 3):
        seen = [sorted((lengths[row] for row in rows.order.step(step)), reverse=True) for step in range(steps)]
        found = rows.largest_micro_batch(steps, micro_batch=2)
        assert lengths[found[0]] == max(step[0] for step in seen)
        assert len(found) == 2
