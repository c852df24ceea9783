"""Trained adapters from outside, in peft's layout: read, checked against a base model, and put on it by name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig

from clusters.errors import Problem, RequestError, first_line, request_error
from qlora_core.data import CHAT_TEMPLATE
from qlora_core.huggingface.adapter_config import CONFIG, PLAIN, changed_base, read_config
from qlora_core.recipe import Recipe
from qlora_core.training.model import attach_adapters, model_class

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts in front of the base model's module names."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
KEY = re.compile(re.escape(PREFIX) + r"(.+?)(?:\.base_layer)*\.lora_([AB])\.weight")
"""peft wraps a mixture's experts once for each of their parameters, one wrapper in the other."""


@dataclass(frozen=True, slots=True)
class TrainedAdapter:
    """An adapter's folder, read and not loaded.

    Attributes:
        config: what adapter_config.json says.
        shapes: of each tensor of adapter_model.safetensors.
        digest: of config and weights; what makes it the same adapter.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    digest: str

    def chat_template(self) -> str | None:
        """What conversations were written with that it was trained on; None for the tokenizer's."""
        path = self.folder / CHAT_TEMPLATE
        return path.read_text(encoding="utf-8") if path.is_file() else None


def read_adapter(folder: Path, where: str = "adapter") -> TrainedAdapter:
    """The LoRA adapter in `folder`; only its JSON and the header of its safetensors are read as such.

    Args:
        where: the field or flag that the folder was named by.

    Raises:
        RequestError: there is none, it is damaged, a pickle, or no LoRA adapter of a causal language model.
    """
    config = read_config(folder, where)
    weights = folder / WEIGHTS
    if not weights.is_file():
        rule = f"the folder holds no {WEIGHTS}"
        raise request_error(where, folder, rule, "Save the adapter with save_pretrained; pickles are not read")
    try:
        with safe_open(weights, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping
        digest = hashlib.sha256((folder / CONFIG).read_bytes())
        with weights.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    except (OSError, SafetensorError) as error:
        raise request_error(where, weights, f"it is damaged: {error}", "Copy it again") from error
    return TrainedAdapter(folder, config, shapes, digest.hexdigest())


def load_adapters(base: nn.Module, folders: Mapping[str, Path]) -> PeftModel:
    """`base` with several trained adapters on it, frozen; ``set_adapter(name)`` chooses, and the first is active.

    Args:
        base: a causal language model of transformers, quantized or not, without adapters.
        folders: by name, adapters in peft's layout. Nothing but JSON and safetensors is read.

    Raises:
        RequestError: a name that peft cannot use, an adapter that cannot be read, or one of another base model.
    """
    problems = [
        Problem("--adapter", name, "an adapter's name is letters, digits, hyphens and underscores", "Rename it")
        for name in folders
        if not NAME.fullmatch(name)
    ]
    adapters = {}
    for name, folder in folders.items():
        try:
            adapters[name] = read_adapter(folder, f"--adapter {name}")
            check_fits(adapters[name], base, f"--adapter {name}")
            if rule := changed_base(adapters[name].config):  # the other adapters belong to the base as it is
                problems.append(Problem(f"--adapter {name}", str(folder), rule, PLAIN))
        except RequestError as error:
            problems += error.problems
    if problems:
        raise RequestError(problems)
    if not adapters:
        raise request_error("--adapter", "", "there is none", "Name at least one")
    model = base
    for name, adapter in adapters.items():
        model = _with_adapter(model, name, adapter)
    adapted = cast(PeftModel, model)
    adapted.set_adapter(next(iter(adapters)))
    adapted.requires_grad_(False)
    return adapted


def _with_adapter(model: nn.Module, name: str, adapter: TrainedAdapter) -> PeftModel:
    """`model` with one more adapter."""
    where = f"--adapter {name}"
    try:
        if not isinstance(model, PeftModel):
            config = cast(LoraConfig, LoraConfig.from_pretrained(str(adapter.folder)))
            config.task_type, config.inference_mode = cast(Any, "CAUSAL_LM"), True
            model = cast(PeftModel, get_peft_model(cast(Any, model), config, adapter_name=name))
        outcome = cast(Any, model).load_adapter(str(adapter.folder), adapter_name=name, use_safetensors=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise request_error(where, adapter.folder, f"peft does not load it: {first_line(error)}", MATCHING) from error
    missing = [key for key in outcome.missing_keys if f".{name}." in f"{key}." and "lora_" in key]
    if wrong := [*outcome.unexpected_keys, *missing]:
        raise request_error(where, adapter.folder, f"its weights do not fit its own config: {wrong[0]}", MATCHING)
    return model


MATCHING = "Give an adapter that was trained on this base model"


def check_fits(adapter: TrainedAdapter, base: nn.Module, where: str = "adapter") -> None:
    """Raise a RequestError where an adapter's matrices have other sizes than the layers of `base` that they are for."""
    modules = dict(base.named_modules())
    for key, shape in adapter.shapes.items():
        found = KEY.fullmatch(key)
        if found is None:  # routers, experts, embeddings, magnitudes: peft itself compares those
            continue
        path, part = found.groups()
        module = modules.get(path)
        if module is None:
            raise request_error(
                where, adapter.folder, f"it adapts {path}, which the base model does not have", MATCHING
            )
        sizes = next(_features(module), None)
        size = shape[1] if part == "A" else shape[0]
        if sizes is not None and size != sizes["AB".index(part)]:
            side = "inputs" if part == "A" else "outputs"
            rule = f"its {path} has {size} {side}, the base model's has {sizes['AB'.index(part)]}"
            raise request_error(where, adapter.folder, rule, MATCHING)


def check_continues(adapter: TrainedAdapter, base: Path, recipe: Recipe) -> None:
    """Raise a RequestError where `recipe`, on the base model in the folder `base`, makes other adapters than that.

    The adapters are made on the meta device by peft itself, so any kind of layer is compared.
    """
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        model = attach_adapters(model_class(config).from_config(config), recipe, seed=0)
    here = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    there = adapter.shapes
    for name in sorted(here.keys() & there.keys()):
        if here[name] != there[name]:
            layer = name.removeprefix(PREFIX).removesuffix(".weight")
            rule = f"its {layer} is {list(there[name])}, with this base model and recipe it would be {list(here[name])}"
            raise request_error("adapter", adapter.folder, rule, MATCHING)
    if here.keys() != there.keys():
        of_recipe, of_adapter = (", ".join(sorted({_module(name) for name in names})) for names in (here, there))
        differing = ", ".join(sorted(here.keys() ^ there.keys())[:2])
        rule = (
            f"the adapter in {adapter.folder} adapts {of_adapter}, and these choose {of_recipe} (such as {differing})"
        )
        remedy = "Leave the targets out to take the adapter's, or give an adapter of this base model"
        raise request_error("recipe.targets", recipe.targets, rule, remedy)


def _module(key: str) -> str:
    """The last name of the module that a tensor of an adapter belongs to."""
    return key.partition(".lora_")[0].rpartition(".")[2]


def _features(module: nn.Module) -> Iterator[tuple[int, int]]:
    """Inputs and outputs of a linear layer; transformers' Conv1D calls them otherwise."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        if all(hasattr(module, name) for name in names):
            inputs, outputs = (int(getattr(module, name)) for name in names)
            yield inputs, outputs
