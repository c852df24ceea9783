"""Models that see, as they are trained on text: a decoder that is modelled, and beside it a vision tower that idles.

Source: ``transformers/models/gemma3``, ``siglip`` of transformers 5.23.0 (configuration_*.py, modeling_*.py). It is
what ``AutoModelForCausalLM`` builds from their config, so that an adapter's names are those that others expect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

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


def gemma3(fields: ConfigFields) -> ModelArchitecture:
    """Gemma 3 from 4B on.

    Raises:
        RequestError: fields of either part are missing or wrong; all of them at once.
    """
    given = _part(fields, "text_config")
    # the head is tied, or not, where the whole model's config says so
    tied = {"tie_word_embeddings": fields.flag("tie_word_embeddings", True)}
    text = ConfigFields({**_GEMMA3_TEXT, **given, **tied}, name=fields.name, source=f"{fields.source}: text_config")
    seen = ConfigFields(_part(fields, "vision_config"), name=fields.name, source=f"{fields.source}: vision_config")
    problems: list[Problem] = []
    for model_type, part in (("gemma3_text", text), ("siglip_vision_model", seen)):
        if part.text("model_type", model_type) != model_type:
            named = str(part.raw["model_type"])[:80]
            part.problem("model_type", named, f"must be {model_type}", "Choose another model")
    decoder = None
    try:
        decoder = build(text, "gemma3_text", DECODERS["gemma3_text"])
    except RequestError as error:
        problems += error.problems
    tower = Tower("gemma3", *_siglip(seen, decoder.hidden_size if decoder else 1), dict(fields.raw))
    for part in (fields, seen):
        try:
            part.check()
        except RequestError as error:
            problems += error.problems
    if decoder is None or problems:
        raise RequestError(problems)
    return replace(decoder, linears=placed("gemma3", decoder.linears), tower=tower)


SEEING: dict[str, Callable[[ConfigFields], ModelArchitecture]] = {"gemma3": gemma3}
"""By model type."""


def _part(fields: ConfigFields, name: str) -> Mapping[str, object]:
    """One of the configs within a config; that of the whole model where it is absent has transformers' defaults."""
    value = fields.raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        fields.problem(name, type(value).__name__, "must be an object with the fields of that part", "Correct it")
        return {}
    return value


def _siglip(fields: ConfigFields, text_hidden: int) -> tuple[tuple[Linear, ...], int, int]:
    """SigLIP's encoder and the projection of what it sees to `text_hidden` features: what a `Tower` has of them."""
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
    return linears, biases + norms + embeddings + head + projector, 8 * positions  # their numbers, int64
