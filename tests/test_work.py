"""What a micro-batch computes and moves: counted by hand from the shapes of models, and by torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from meta_models import LINEAR_ATTENTION
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from qlora_core.catalogue import find_model
from qlora_core.huggingface.config import architecture_from_config
from qlora_core.memory.device import Device
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.work import Work, work

A100 = Device(kind="cuda", compute_dtype="bfloat16", compute_capability=(8, 0))
CPU = Device(kind="cpu", compute_dtype="float32")
CPU_16_BITS = Device(kind="cpu", compute_dtype="bfloat16")

# Llama 2 7B: 32 layers of four weights of 4096 x 4096 and three of 4096 x 11008, a head of 32000 x 4096
LINEAR = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
DOWN = 32 * 4096 * 11008
HEAD = 32000 * 4096
ADAPTERS = 32 * 64 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # rank 64 on all of them


def counted(model: str = "llama-2-7b", device: Device = A100, **changes: Any) -> Work:
    """The work of LoRA without recomputation and with the stock loss, unless `changes` say otherwise."""
    names = Strategy.__dataclass_fields__
    of_strategy = {name: value for name, value in changes.items() if name in names}
    of_recipe = {name: value for name, value in changes.items() if name not in names}
    strategy = Strategy(**{"gradient_checkpointing": False, "loss": "full", **of_strategy})
    fields = {"method": "lora", "quantization": "none", "seq_len": 512, "autocast": False, **of_recipe}
    fields["tokens_per_step"] = fields["seq_len"]
    return work(find_model(model), Recipe(**fields), strategy, device)


# --- products ---------------------------------------------------------------------------------------------------------


def test_a_frozen_weight_is_multiplied_with_twice_forward_and_for_the_inputs_gradient() -> None:
    assert counted().products == 2 * 2 * (LINEAR + HEAD)


def test_a_trained_weight_has_a_gradient_too() -> None:
    assert counted(method="full").products == 3 * 2 * (LINEAR + HEAD)


def test_recomputation_is_one_more_forward_pass_of_the_layers_but_not_of_the_head() -> None:
    assert counted(gradient_checkpointing=True).products == 2 * (3 * LINEAR + 2 * HEAD)


def test_recomputation_leaves_out_the_last_product_where_nothing_needs_its_result() -> None:
    again = counted(gradient_checkpointing=True, targets=("q_proj", "v_proj"))
    assert again.products == 2 * (3 * LINEAR - DOWN + 2 * HEAD)


def test_the_chunked_loss_computes_the_logits_of_a_trained_head_only_twice() -> None:
    assert counted(loss="chunked").products == 2 * (2 * LINEAR + 2 * HEAD)
    assert counted(loss="chunked", method="full").products == 2 * (3 * LINEAR + 4 * HEAD)


def test_float32_adapters_have_no_tensor_cores_unless_autocast_narrows_them() -> None:
    assert counted().wide_products == 3 * 2 * ADAPTERS
    assert counted(gradient_checkpointing=True).wide_products == 4 * 2 * ADAPTERS
    under_autocast = counted(autocast=True)
    assert under_autocast.wide_products == 0
    assert under_autocast.products == 2 * 2 * (LINEAR + HEAD) + 3 * 2 * ADAPTERS
    assert counted(lora_dtype="bfloat16").wide_products == 0


def test_pefts_upcast_makes_the_heads_products_float32() -> None:
    upcast = counted(method="qlora", quantization="nf4", upcast="peft")
    assert upcast.products == 2 * 2 * LINEAR
    assert upcast.wide_products == 2 * 2 * HEAD + 3 * 2 * ADAPTERS


def test_a_token_goes_through_two_of_mixtrals_eight_experts() -> None:
    # 32 layers: queries and output 4096 x 4096, keys and values 4096 x 1024, and an expert's three 4096 x 14336
    expected = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 2 * 3 * 4096 * 14336) + HEAD
    # the router, 4096 x 8, may be counted or not
    assert counted("mixtral-8x7b", targets=("q_proj",)).products == pytest.approx(4 * expected, rel=1e-3)


def test_products_read_their_weights_and_what_goes_in_and_write_what_comes_out() -> None:
    into, out = 6 * 4096 + 11008, 4 * 4096 + 2 * 11008 + 4096
    moved = counted().product_bytes
    assert moved.fixed == 2 * 2 * (LINEAR + HEAD)
    assert moved.per_token == 2 * 2 * (32 * (into + out) + 4096 + 32000)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_torch_counts_the_same_operations(checkpointing: bool) -> None:
    shape = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(**shape, attn_implementation="eager", use_cache=False, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.zeros(2, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    architecture = architecture_from_config(
        {"model_type": "llama", "tie_word_embeddings": False, "hidden_act": "silu", **shape}, name="tiny", source="here"
    )
    recipe = Recipe(method="full", quantization="none", seq_len=16, tokens_per_step=32)
    strategy = Strategy(micro_batch=2, gradient_checkpointing=checkpointing, attention="eager", loss="full")
    said = work(architecture, recipe, strategy, CPU)
    assert said.products == 0
    assert counter.get_total_flops() == said.wide_products * 32 + said.attention * 32 * 16


# --- attention --------------------------------------------------------------------------------------------------------


def test_attention_multiplies_queries_with_keys_and_weights_with_values() -> None:
    # of a token and a position: 2 products x 2 operations x 4096 features x 32 layers; twice that backward
    assert counted(attention="eager").attention == 4 * 4096 * 32 * 3


def test_flash_attention_skips_the_half_above_the_diagonal_and_makes_scores_again_backward() -> None:
    assert counted().attention == 4 * 4096 * 32 * (1 + 2.5) / 2
    assert counted(gradient_checkpointing=True).attention == 4 * 4096 * 32 * (1 + 1 + 2.5) / 2


def test_under_a_sliding_windows_mask_nothing_is_skipped() -> None:
    assert counted("mistral-7b-v0.1", seq_len=2048).attention == 4 * 4096 * 32 * 3.5 / 2
    masked = counted("mistral-7b-v0.1", seq_len=8192)
    assert masked.attention == 4 * 4096 * 32 * 3.5
    assert masked.fused


# --- linear attention -------------------------------------------------------------------------------------------------

VIEWS = {"view", "_unsafe_view", "transpose", "select", "slice", "expand", "unsqueeze", "as_strided", "alias", "detach"}
EMPTY = {"empty", "empty_strided", "new_empty_strided", "empty_like"}


class KernelCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves __init_subclass__ untyped
    """Counts operators that compute; the zeros and the copy of a selected part's gradient are two."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name not in VIEWS | EMPTY
        self.count += name == "select_backward"
        return func(*args, **(kwargs or {}))


def one_chunk_more(mode: Callable[[], Any], of: Callable[[Any], int], autocast: bool = False) -> tuple[int, int]:
    """What transformers' gated delta rule takes more for one chunk more, forward and backward."""
    found = []
    for tokens in (4 * 64, 5 * 64):
        keys = [torch.randn(1, tokens, 2, 16, requires_grad=True) for _ in range(2)]
        values = torch.randn(1, tokens, 4, 8, requires_grad=True)
        decay, beta = (torch.rand(1, tokens, 4, requires_grad=True) for _ in range(2))
        with mode() as counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out, _ = torch_chunk_gated_delta_rule(*keys, values, -decay, beta)
            forward = of(counter)
            out.sum().backward()
            found.append((forward, of(counter) - forward))
    (less_forward, less_backward), (more_forward, more_backward) = found
    return more_forward - less_forward, more_backward - less_backward


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_each_chunk_of_linear_attention_starts_as_many_kernels_as_torch_runs(autocast: bool) -> None:
    forward, backward = one_chunk_more(KernelCounter, lambda counter: counter.count, autocast)
    alone = counted("qwen3.5-0.8b", autocast=autocast, lora_dtype="float32")  # 18 of 24 layers have it
    assert alone.chunk_kernels == 18 * (forward + backward)
    assert counted("qwen3.5-0.8b", autocast=autocast, gradient_checkpointing=True).chunk_kernels == 18 * (
        2 * forward + backward
    )
    assert counted().chunk_kernels == 0


@pytest.mark.slow
def test_the_products_of_linear_attention_are_those_that_torch_counts() -> None:
    forward, backward = one_chunk_more(lambda: FlopCounterMode(display=False), lambda mode: mode.get_total_flops())
    fields = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    config = {"model_type": "qwen3_5_text", "vocab_size": 160, **fields, **LINEAR_ATTENTION, "linear_key_head_dim": 16}
    with_it = architecture_from_config(config, name="linear", source="a test")
    recipe = Recipe(method="lora", quantization="none", lora_dtype="bfloat16", autocast=False)
    strategy = Strategy(gradient_checkpointing=False, loss="full")
    # all else in 16 bits: what is left is the rule, of 3 layers, and the two triangular systems that torch leaves out
    wide = work(with_it, recipe, strategy, CPU_16_BITS).wide_products
    systems = 2 * (1 + 1) * 4 * 64 * (16 + 8) // 2
    assert wide == 3 * ((forward + backward) // 64 + systems)


# --- all else ---------------------------------------------------------------------------------------------------------


def test_4_bit_weights_become_16_bit_ones_in_every_pass() -> None:
    said = counted(method="qlora", quantization="nf4", double_quantization=False, gradient_checkpointing=True)
    assert said.dequantized == 3 * 2 * LINEAR
    assert counted().dequantized == 0


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
@pytest.mark.parametrize("model", ["llama-2-7b", "gemma-2-9b", "falcon-7b", "mixtral-8x7b", "gpt2", "phi-3-mini"])
def test_products_take_no_more_out_of_the_tape_than_is_there(model: str, method: str, checkpointing: bool) -> None:
    quantization = "nf4" if method == "qlora" else "none"
    said = counted(model, method=method, quantization=quantization, gradient_checkpointing=checkpointing)
    assert min(said.moved) >= 0
    assert said.moved.per_token > 0
    assert said.kernels > 0


def test_kernels_grow_with_the_layers_and_not_with_the_tokens() -> None:
    architecture, recipe = find_model("llama-2-7b"), Recipe(method="lora", quantization="none")
    one, two, three = (
        work(replace(architecture, num_layers=layers), recipe, Strategy(micro_batch=4), A100).kernels
        for layers in (10, 20, 30)
    )
    assert three - two == two - one > 10 * 100  # a layer of Llama starts about 45 kernels forward alone


def test_adapters_move_bytes_that_a_full_fine_tune_does_not() -> None:
    # peft adds, of 7 layers, at least the result, the update and their sum in bfloat16
    more = counted(lora_dtype="bfloat16").moved.per_token - counted(method="full").moved.per_token
    assert more > 32 * 2 * 3 * (4 * 4096 + 2 * 11008 + 4096)
