"""What transformers builds from a config on the meta device: the yardstick of the architecture and catalogue tests."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from qlora_core.architecture import ModelArchitecture
from qlora_core.training.model import model_class

PIXTRAL: dict[str, object] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
"""A small vision tower."""
SIGLIP = PIXTRAL | {"vision_use_head": False}
"""Another."""
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
"""The language model of a small one that sees."""
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
"""Small linear attention."""


def small_gemma3(vocab_size: int) -> Gemma3ForConditionalGeneration:
    """A random one that sees; its files give its modules other names than it does."""
    text = {**TEXT, "vocab_size": vocab_size}
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=SIGLIP))


def small_mistral3(vocab_size: int) -> Mistral3ForConditionalGeneration:
    """A random one that sees, and has no form for text alone."""
    text = {**TEXT, "model_type": "ministral3", "vocab_size": vocab_size}
    torch.manual_seed(0)
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=PIXTRAL))


def small_qwen3_5(vocab_size: int) -> Qwen3_5ForConditionalGeneration:
    """A random one as it is published: it sees, and what is trained of it, on text, is its language model alone."""
    text = {**TEXT, "vocab_size": vocab_size, "num_hidden_layers": 4, "tie_word_embeddings": True}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 0, 0], "partial_rotary_factor": 0.25}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    torch.manual_seed(0)
    config = Qwen3_5Config(
        text_config={**text, **LINEAR_ATTENTION, "full_attention_interval": 2, "rope_parameters": rope},
        vision_config={**vision, "num_position_embeddings": 4},
        tie_word_embeddings=True,
    )
    return Qwen3_5ForConditionalGeneration(config)


def on_meta(fields: dict[str, Any]) -> Any:
    """The model that transformers builds from `fields`, without memory for its weights."""
    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        return model_class(config).from_config(config)


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
    layers = linears_of_a_layer(model)
    assert len(layers) == architecture.num_layers
    for number, layer in enumerate(layers):
        there = (each for each in architecture.linears if number % architecture.period in each.within)
        assert layer == Counter((each.name, each.in_features, each.out_features, each.bias) for each in there)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert architecture.tied_embeddings is (head is embedding)
    assert architecture.embedding_parameters == embedding.numel()
