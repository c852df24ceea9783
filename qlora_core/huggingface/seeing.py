"""Models that see, as they are trained on text: a decoder that is modelled, and beside it a vision tower that idles.

Source: ``transformers/models/gemma3``, ``siglip``, ``mistral3``, ``pixtral`` of transformers 5.23.0
(configuration_*.py, modeling_*.py). It is what the Auto classes build from their config, so that an adapter's names are
those that others expect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from clusters.errors import Problem, RequestError
from qlora_core.architecture import Linear, ModelArchitecture, Tower
from qlora_core.huggingface.decoder import build
from qlora_core.huggingface.families import DECODERS
from qlora_core.huggingface.fields import ConfigFields
from qlora_core.huggingface.modules import placed

_GEMMA3_TEXT = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}
"""The sizes of ``Gemma3TextConfig``: the published configs leave out those that are theirs."""


class Seen(NamedTuple):
    """What a `Tower` has, but for the type and the config of the whole model."""

    linears: tuple[Linear, ...]
    other_parameters: int
    buffer_bytes: int


class Parts(NamedTuple):
    """What a model that sees is made of.

    Attributes:
        texts: the types that its language model can have, the default first.
        text: its language model's sizes where its part of the config leaves them out.
        vision: its tower's type.
        tower: what the tower and the projector to so many features have, of the whole config and of the tower's.
    """

    texts: tuple[str, ...]
    text: Mapping[str, object]
    vision: str
    tower: Callable[[ConfigFields, ConfigFields, int], Seen]


def composed(fields: ConfigFields, model_type: str) -> ModelArchitecture:
    """A model that sees.

    Raises:
        RequestError: fields of either part are missing or wrong; all of them at once.
    """
    parts = _PARTS[model_type]
    # the head is tied, or not, where the whole model's config says so
    tied = {"tie_word_embeddings": fields.flag("tie_word_embeddings", True)}
    text = fields.part("text_config", parts.texts, absent=parts.text, fixed=tied)
    seen = fields.part("vision_config", (parts.vision,), absent={}, fixed={})
    problems: list[Problem] = []
    text_type = text.text("model_type", parts.texts[0])
    decoder = None
    try:
        decoder = build(text, text_type, DECODERS.get(text_type, DECODERS[parts.texts[0]]))
    except RequestError as error:
        problems += error.problems
    tower = Tower(model_type, *parts.tower(fields, seen, decoder.hidden_size if decoder else 1), dict(fields.raw))
    for part in (fields, seen):
        try:
            part.check()
        except RequestError as error:
            problems += error.problems
    if decoder is None or problems:
        raise RequestError(problems)
    return replace(decoder, linears=placed(model_type, decoder.linears), tower=tower)


def _siglip(whole: ConfigFields, fields: ConfigFields, text_hidden: int) -> Seen:
    """SigLIP's encoder and Gemma's projection of what it sees to `text_hidden` features."""
    hidden, inner = fields.count("hidden_size", 768), fields.count("intermediate_size", 3072)
    layers = fields.count("num_hidden_layers", 12)
    image, patch = fields.count("image_size", 224), fields.count("patch_size", 16)
    has_head = fields.flag("vision_use_head", True)
    mlps = layers + has_head
    linears = (
        *(Linear(name, hidden, hidden, count=layers) for name in ("k_proj", "v_proj", "q_proj", "out_proj")),
        Linear("fc1", hidden, inner, count=mlps),
        Linear("fc2", inner, hidden, count=mlps),
    )
    biases = 4 * layers * hidden + mlps * (inner + hidden)
    norms = (2 * layers + 1 + has_head) * 2 * hidden
    positions = (image // patch) ** 2
    embeddings = hidden * (fields.count("num_channels", 3) * patch**2 + 1 + positions)
    # the head asks with one vector; its attention is torch's own, whose projections bitsandbytes leaves alone
    head = hidden + 4 * hidden * (hidden + 1) if has_head else 0
    projector = hidden * text_hidden + hidden
    return Seen(linears, biases + norms + embeddings + head + projector, 8 * positions)  # their numbers, int64


def _pixtral(whole: ConfigFields, fields: ConfigFields, text_hidden: int) -> Seen:
    """Pixtral's encoder and Mistral's projection of what it sees to `text_hidden` features."""
    hidden, inner = fields.count("hidden_size", 1024), fields.count("intermediate_size", 4096)
    layers, patch = fields.count("num_hidden_layers", 24), fields.count("patch_size", 16 if fields.raw else 14)
    merged = whole.count("spatial_merge_size", 2) ** 2
    biases = 2 * text_hidden if whole.flag("multimodal_projector_bias", False) else 0
    linears = (
        *(Linear(name, hidden, hidden, count=layers) for name in ("k_proj", "v_proj", "q_proj", "o_proj")),
        *(Linear(name, hidden, inner, count=layers) for name in ("gate_proj", "up_proj")),
        Linear("down_proj", inner, hidden, count=layers),
        Linear("merging_layer", merged * hidden, hidden),
        Linear("linear_1", hidden, text_hidden),
        Linear("linear_2", text_hidden, text_hidden),
    )
    norms = (2 * layers + 1 + 1) * hidden
    patches = hidden * fields.count("num_channels", 3) * patch**2
    return Seen(linears, norms + patches + biases, 0)


_PARTS = {
    "gemma3": Parts(("gemma3_text",), _GEMMA3_TEXT, "siglip_vision_model", _siglip),
    "mistral3": Parts(("mistral", "ministral3"), {}, "pixtral", _pixtral),
}
SEEING: dict[str, Callable[[ConfigFields], ModelArchitecture]] = {
    model_type: partial(composed, model_type=model_type) for model_type in _PARTS
}
"""By model type."""
