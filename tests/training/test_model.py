"""The model of a run: what is quantized, what is trained, and gradients that an evaluation must not change."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from clusters.errors import RequestError
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy
from qlora_core.training.dataset.tokens import Encoded, save_examples
from qlora_core.training.evaluate import evaluation, sample_answers
from qlora_core.training.examples import Examples
from qlora_core.training.loss import SummedLoss
from qlora_core.training.model import attach_adapters, autocast_dtype, load_base, make_trainable, trainable
from qlora_core.training.optimizer import build_optimizer

CPU = torch.device("cpu")


def qlora(base: Path, recipe: Recipe, strategy: Strategy | None = None) -> SummedLoss:
    strategy = strategy or Strategy()
    model = attach_adapters(load_base(str(base), recipe, strategy, "float32", CPU), recipe, seed=0)
    model.train()
    return SummedLoss(model, strategy.loss)


def leave_zero(model: torch.nn.Module) -> None:
    """Make all B random: while one is zero, its A has no gradient."""
    torch.manual_seed(3)
    for name, weight in trainable(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)


def gradients(module: SummedLoss) -> dict[str, torch.Tensor]:
    leave_zero(module)
    ids = torch.randint(5, 200, (2, 24))
    module.zero_grad()
    module(ids, ids).backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(module).items() if parameter.grad is not None}


def test_linear_layers_are_nf4_with_double_quantization_and_the_rest_is_not(tiny_base: Path) -> None:
    module = qlora(tiny_base, Recipe(rank=4))
    linears = {name: m for name, m in module.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(linears) == 2 * 7
    for layer in linears.values():
        assert layer.weight.dtype == torch.uint8
        assert (layer.weight.quant_state.quant_type, layer.weight.quant_state.nested) == ("nf4", True)
    others = [p for n, p in module.named_parameters() if "embed" in n or "norm" in n or "lm_head" in n]
    assert others
    assert {parameter.dtype for parameter in others} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        ("all-linear", 7),
        (("q_proj", "v_proj"), 2),
        (("down_proj",), 1),
        ((r".*self_attn\..*",), 4),
        ((r".*\.(up|gate)_proj", "q_proj"), 3),
    ],
)
def test_only_adapters_of_the_targets_are_trained(tiny_base: Path, targets: Any, adapted: int) -> None:
    module = qlora(tiny_base, Recipe(rank=4, targets=targets))
    names = list(trainable(module))
    assert len(names) == 2 * 2 * adapted  # layers x (A, B)
    assert all("lora_" in name for name in names)


def test_the_seed_alone_decides_the_adapters(tiny_base: Path) -> None:
    recipe = Recipe(rank=4)
    torch.manual_seed(1)
    first = trainable(qlora(tiny_base, recipe))
    torch.manual_seed(2)
    second = trainable(qlora(tiny_base, recipe))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_evaluation_does_not_change_the_gradients_of_later_steps(tiny_base: Path) -> None:
    """bitsandbytes 0.50.2 repacks weights at an evaluation on CPUs with AVX512-BF16, and gradients go missing."""
    module = qlora(tiny_base, Recipe(rank=4))
    before = gradients(module)
    with evaluation(module):
        ids = torch.arange(5, 25).unsqueeze(0)
        module(ids, ids)
    after = gradients(module)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_checkpointing_and_the_chunked_loss_change_no_gradient(tiny_base: Path) -> None:
    recipe = Recipe(rank=4)
    plain = gradients(qlora(tiny_base, recipe, Strategy(gradient_checkpointing=False, loss="full")))
    lean = gradients(qlora(tiny_base, recipe, Strategy(gradient_checkpointing=True, loss="chunked")))
    assert lean.keys() == plain.keys()
    for name, gradient in plain.items():
        assert float((lean[name] - gradient).norm()) < 1e-5 * float(gradient.norm()), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_layers_are_checkpointed_without_reentry_but_under_zero_3(tiny_base: Path, stage: Any) -> None:
    recipe = Recipe(rank=4)
    base = load_base(str(tiny_base), recipe, Strategy(zero_stage=stage), "float32", CPU)
    model: Any = make_trainable(base, recipe, seed=0)
    for layer in model.get_base_model().model.layers:
        assert layer.gradient_checkpointing
        assert layer._gradient_checkpointing_func.keywords["use_reentrant"] is (stage == 3)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_residual_stream_stays_in_the_compute_dtype_though_adapters_are_float32(
    tiny_base: Path, autocast: bool
) -> None:
    recipe = Recipe(rank=4, autocast=autocast)
    base = load_base(str(tiny_base), recipe, Strategy(), "bfloat16", CPU)
    model: Any = attach_adapters(base, recipe, seed=0).train()
    seen: list[torch.dtype] = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    ids = torch.arange(5, 25).unsqueeze(0)
    SummedLoss(model, "chunked", autocast_dtype(recipe, "bfloat16"))(ids, ids).backward()
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    assert len(seen) >= 2  # once more where they are recomputed
    assert set(seen) == {torch.bfloat16}


def test_pickled_weights_are_not_read(tiny_base: Path, tmp_path: Path) -> None:
    class Boom:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, ("raise SystemExit('a pickle was run')",))

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_base / name).read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Boom()))
    with pytest.raises(OSError, match="safetensors"):
        load_base(str(tmp_path), Recipe(), Strategy(), "float32", CPU)


def test_weights_that_no_file_has_are_not_made_up(tiny_base: Path, tmp_path: Path) -> None:
    """transformers makes them random, and only warns; a head that is taken for tied and is not is such a weight."""
    shutil.copytree(tiny_base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    lost = {"lm_head.weight", "model.layers.1.mlp.up_proj.weight"}
    save_file({name: weight for name, weight in load_file(file).items() if name not in lost}, file, {"format": "pt"})
    with pytest.raises(RequestError, match=r"lm_head\.weight and 1 more, which would be random"):
        load_base(str(tmp_path / "base"), Recipe(), Strategy(), "float32", CPU)


def test_lora_plus_has_the_groups_of_peft(tiny_base: Path) -> None:
    recipe = Recipe(rank=4, use_dora=True, loraplus_lr_ratio=16, learning_rate=1e-4)
    module = qlora(tiny_base, recipe)
    ours = build_optimizer(trainable(module), recipe, Strategy(paged_optimizer=False))
    theirs = create_loraplus_optimizer(cast(Any, module.model), torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)

    def rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
        return {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}

    assert rates(ours) == rates(theirs)
    assert set(rates(ours).values()) == {1e-4, 16e-4}


def test_neftune_adds_bounded_noise_in_training_only(tiny_base: Path) -> None:
    base = load_base(str(tiny_base), Recipe(), Strategy(), "float32", CPU)
    model: Any = make_trainable(base, Recipe(rank=4, neftune_alpha=5), seed=0)
    embedding, ids = model.get_input_embeddings(), torch.arange(5, 25).unsqueeze(0)
    plain = torch.nn.functional.embedding(ids, embedding.weight)
    assert torch.equal(embedding.eval()(ids), plain)
    noise = (embedding.train()(ids) - plain).abs().max()
    assert 0.9 * 5 / (20 * 64) ** 0.5 < noise <= 1.01 * 5 / (20 * 64) ** 0.5


def test_under_autocast_no_copy_of_an_adapter_outlives_its_use(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(rank=4, autocast=True)
    model = attach_adapters(load_base(str(tiny_base), recipe, Strategy(), "bfloat16", CPU), recipe, seed=0).train()
    seen: list[bool] = []
    monkeypatch.setattr(model, "forward", lambda **_: seen.append(torch.is_autocast_cache_enabled()))
    ids = torch.randint(5, 200, (2, 24))
    with pytest.raises(AttributeError):  # what was put in the model's place has no loss
        SummedLoss(model, "full", torch.bfloat16)(ids, ids)
    assert seen == [False]


LORA: dict[str, Any] = {"method": "lora", "quantization": "none"}


@pytest.mark.parametrize("of_method", [{}, LORA], ids=["qlora", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_autocast_loss_and_gradients_are_those_of_torchs_own_context_around_a_plain_model(
    tiny_base: Path, checkpointing: bool, of_method: dict[str, Any]
) -> None:
    strategy = Strategy(gradient_checkpointing=checkpointing, loss="full")
    recipe = Recipe(rank=4, autocast=True, **of_method)
    model = attach_adapters(load_base(str(tiny_base), recipe, strategy, "bfloat16", CPU), recipe, seed=0).train()
    leave_zero(model)
    ids = torch.randint(5, 200, (2, 24))
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(input_ids=ids, labels=ids, use_cache=False).loss
    plain.backward()
    expected = {name: cast(torch.Tensor, weight.grad).clone() for name, weight in trainable(model).items()}
    model.zero_grad()
    tokens = ids[:, 1:].numel()
    loss = SummedLoss(model, "full", autocast_dtype(recipe, "bfloat16"))(ids, ids) / tokens
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-4)  # of another rounding
    for name, weight in trainable(model).items():
        assert weight.dtype == torch.float32
        assert float((cast(torch.Tensor, weight.grad) - expected[name]).norm() / expected[name].norm()) < 0.05, name


def test_answers_are_given_by_adapters_that_run_under_autocast_alone(tiny_base: Path, tmp_path: Path) -> None:
    recipe = Recipe(rank=4, autocast=True)
    model = attach_adapters(load_base(str(tiny_base), recipe, Strategy(), "bfloat16", CPU), recipe, seed=0)
    module = SummedLoss(model, "chunked", torch.bfloat16)
    save_examples([Encoded(list(range(5, 25)), [False] * 5 + [True] * 15)], tmp_path / "x.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    answers = sample_answers(module, tokenizer, Examples(tmp_path / "x.safetensors"), 1, CPU, max_tokens=4)
    assert len(answers) == 1
    assert module(*2 * [torch.randint(5, 200, (1, 8))]).dtype == torch.float32
