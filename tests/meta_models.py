"""What transformers builds from a config on the meta device: the yardstick of the architecture and catalogue tests."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from qlora_core.architecture import ModelArchitecture

SIGLIP: dict[str, object] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}
"""A small vision tower."""


def small_gemma3(vocab_size: int) -> Gemma3ForConditionalGeneration:
    """A random one that sees; its files give its modules other names than it does."""
    text = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config={**text, **heads}, vision_config=SIGLIP))


def on_meta(fields: dict[str, Any]) -> Any:
    """The model that transformers builds from `fields`, without memory for its weights."""
    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def layers_of(model: Any) -> torch.nn.ModuleList:
    """The decoder's layers."""
    return next(module for module in model.get_decoder().modules() if isinstance(module, torch.nn.ModuleList))


def linears_of_a_layer(model: Any) -> list[Counter[tuple[str, int, int, bool]]]:
    """For each decoder layer: (module's last name, in, out, has a bias) of its linear modules."""
    return [
        Counter(
            (name.rsplit(".", 1)[-1], *reversed(module.weight.shape), module.bias is not None)
            if isinstance(module, torch.nn.Linear)
            else (name.rsplit(".", 1)[-1], *module.weight.shape, True)
            for name, module in layer.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D))
        )
        for layer in layers_of(model)
    ]


def assert_same(architecture: ModelArchitecture, model: Any) -> None:
    """`architecture` counts what `model` has: parameters, linear layers of every decoder layer, the tie of the head."""
    assert architecture.parameters == sum(parameter.numel() for parameter in model.parameters())
    expected = Counter((each.name, each.in_features, each.out_features, each.bias) for each in architecture.linears)
    layers = linears_of_a_layer(model)
    assert len(layers) == architecture.num_layers
    assert all(layer == expected for layer in layers)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert architecture.tied_embeddings is (head is embedding)
    assert architecture.embedding_parameters == embedding.numel()
