"""From a Hugging Face ``config.json`` to the shapes of its model, or the reason why it cannot be modelled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from clusters.errors import RequestError, nearest, request_error
from qlora_core.architecture import ModelArchitecture
from qlora_core.huggingface.decoder import build
from qlora_core.huggingface.families import DECODERS
from qlora_core.huggingface.fields import ConfigFields
from qlora_core.huggingface.hybrid import HYBRID
from qlora_core.huggingface.older_decoders import OLDER
from qlora_core.huggingface.seeing import SEEING

_OF_PARTS = {**SEEING, **HYBRID}
_SEE = [model_type for model_type in _OF_PARTS if not model_type.endswith("_text")]
_READ_BY = {**OLDER, **_OF_PARTS}
"""The kinds that are not one of `DECODERS`, with what reads their config."""
LARGEST_CONFIG_BYTES = 10 * 1024**2
"""No config.json is larger; a weights file given by mistake is."""


def architecture_from_config(fields: Mapping[str, object], *, name: str, source: str) -> ModelArchitecture:
    """The architecture that a parsed ``config.json`` describes.

    Args:
        fields: the JSON object. Fields that are absent are what transformers' configuration class makes them, except
            the sizes, which must be there.
        name: what the model is called from here on.
        source: where the config comes from; it goes into messages.

    Raises:
        RequestError: the model is of a kind that cannot be modelled, or fields are missing or wrong (all at once).
    """
    known = sorted((*DECODERS, *_READ_BY))
    _refuse_other_kinds(fields, source, known)
    model_type = str(fields["model_type"])
    reader = ConfigFields(fields, name=name, source=source)
    if model_type in DECODERS:
        return build(reader, model_type, DECODERS[model_type])
    return _READ_BY[model_type](reader)


def architecture_from_folder(path: str | Path) -> ModelArchitecture:
    """The architecture of the model saved in a folder, from its ``config.json``.

    Raises:
        RequestError: there is no readable ``config.json``, or `architecture_from_config` refuses what it says.
    """
    file = Path(path) / "config.json"
    try:
        if not file.is_file():
            raise _no_config(Path(path))
    except OSError as error:
        raise _unreadable(str(file), error) from error
    return architecture_from_file(file, name=str(path), source=str(file))


def architecture_from_file(file: Path, *, name: str, source: str) -> ModelArchitecture:
    """The architecture that a ``config.json`` describes; `name` and `source` as in `architecture_from_config`.

    Raises:
        RequestError: it cannot be read or is not JSON, or `architecture_from_config` refuses what it says.
    """
    try:
        if file.stat().st_size > LARGEST_CONFIG_BYTES:
            raise request_error(
                source, f"{file.stat().st_size} bytes", "is too large for a config.json", "Check the file"
            )
        fields = json.loads(file.read_bytes().decode())  # UTF-8, as transformers reads it
    except OSError as error:
        raise _unreadable(source, error) from error
    except (ValueError, RecursionError) as error:
        raise request_error(
            source, str(error)[:120], "is not valid JSON", "Download the model's config.json again"
        ) from error
    if not isinstance(fields, dict):
        kind = type(fields).__name__
        raise request_error(source, f"a {kind}", "must hold one JSON object", "Download the model's config.json again")
    return architecture_from_config(fields, name=name, source=source)


def _unreadable(source: str, error: OSError) -> RequestError:
    """The error of a config that the operating system does not give."""
    return request_error(source, error.strerror or str(error), "cannot be read", "Check its permissions")


def _no_config(folder: Path) -> RequestError:
    """Why a folder holds no model: the message a person can act on."""
    if not folder.exists():
        return request_error(
            str(folder), "", "there is no such folder", "Give a folder with a config.json, or a catalogue name"
        )
    if not folder.is_dir():
        return request_error(
            str(folder), "a file", "must be a folder", "Give the folder that holds the model's config.json"
        )
    if (folder / "config.json").exists():
        return request_error(
            str(folder / "config.json"), "", "is not a file", "Give the model's config.json in its place"
        )
    if (folder / "adapter_config.json").exists():
        return request_error(str(folder), "", "holds a LoRA adapter, not a model", "Give the model it was trained on")
    return request_error(str(folder), "", "has no config.json", "Give the folder that holds the model's config.json")


_OTHER_PARTS = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower")
_MIXED = "its layers are not all alike, and only layers all alike can be modelled"
_REASONS = {
    "bart": "an encoder-decoder is not a causal language model",
    "t5": "an encoder-decoder is not a causal language model",
    "bert": "an encoder is not a causal language model",
    "roberta": "an encoder is not a causal language model",
    "deepseek_v2": _MIXED,
    "deepseek_v3": _MIXED,
    "glm4_moe": _MIXED,
    "jamba": _MIXED,
    "qwen3_next": _MIXED,
    "mamba": "state-space layers have no attention, and are not modelled",
    "mamba2": "state-space layers have no attention, and are not modelled",
}


def _refuse_other_kinds(fields: Mapping[str, object], source: str, known: list[str]) -> None:
    """Raise for what has no decoder with layers all alike that is known, or is already quantized otherwise."""
    model_type = fields.get("model_type")
    where = f"{source}: model_type"
    if not isinstance(model_type, str) or not model_type:
        given = "" if model_type is None else type(model_type).__name__
        raise request_error(where, given, "must name the kind of model", f"Known kinds: {', '.join(known)}")
    shown = model_type[:80]
    if fields.get("is_encoder_decoder") is True:
        raise request_error(
            where, shown, "an encoder-decoder is not a causal language model", "Choose a decoder-only model"
        )
    part = next((part for part in _OTHER_PARTS if fields.get(part)), None)
    if part is not None and model_type not in _OF_PARTS:
        raise request_error(
            f"{source}: {part}",
            shown,
            f"of the models that see or hear, only {', '.join(_SEE)} are modelled, trained on text",
            "Choose one of them, or a text-only model",
        )
    if fields.get("per_layer_config"):
        raise request_error(f"{source}: per_layer_config", shown, _MIXED, "Choose another model")
    if model_type not in known:
        rule = _REASONS.get(model_type, "this kind of model is not known")
        near = nearest(shown, known)
        hint = f"Nearest known: {', '.join(near)}. " if near else ""
        raise request_error(where, shown, rule, f"{hint}Known kinds: {', '.join(known)}")
    quantization = fields.get("quantization_config")
    if quantization is None:
        return
    method = quantization
    if isinstance(quantization, Mapping):
        loads = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
        method = quantization.get("quant_method", "bitsandbytes" if loads else "no quant_method")
    if method != "bitsandbytes":
        given = method[:80] if isinstance(method, str) else type(method).__name__
        raise request_error(
            f"{source}: quantization_config",
            given,
            "weights quantized otherwise cannot be quantized again",
            "Choose the 16-bit model",
        )
