"""A base and its adapter merged into one model of 16 bit, shard by shard, so that no machine needs to hold it whole.

peft merges each layer, alone: what rsLoRA, DoRA, patterns of ranks and transposed weights mean is its to know. Which
layers there are it tells on a skeleton of the base on the meta device, which has no weights.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings
from transformers.pytorch_utils import Conv1D

from clusters.errors import RequestError, RunFailed, first_line, request_error
from qlora_core.data import CHAT_TEMPLATE
from qlora_core.files import replace_folder
from qlora_core.huggingface.adapter_config import PLAIN, changed_base
from qlora_core.training.adapters import PREFIX, WEIGHTS, read_adapter
from qlora_core.training.card import CARD, merged_card
from qlora_core.training.model import TORCH_DTYPES, class_in, model_class
from qlora_core.training.shards import copy_beside, copy_config, stored_shapes, write_shards

NUMBER = re.compile(r"\.(\d+)\.")
"""A layer's number in the name of a module."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer that an adapter changes.

    Attributes:
        module: the base's layer, on the meta device.
        config: peft's configuration of this layer alone.
        tensors: its adapter: names in the adapter's file by the names that they have where the layer is alone.
    """

    module: nn.Module
    config: LoraConfig
    tensors: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge came to.

    Attributes:
        layers: layers that were changed.
        shards: files of weights.
        bytes: of all weights.
    """

    layers: int
    shards: int
    bytes: int


@contextmanager
def merged_folder(
    base: Path, adapter: Path, folder: Path, *, dtype: str, max_shard_size: int | str, repo: str | None = None
) -> Iterator[tuple[Path, Merged]]:
    """Merge into a temporary folder, which becomes `folder` when the block ends well: there it can be checked.

    Args:
        base: the base model's folder, in 16 or 32 bit.
        dtype: of the merged weights. The sum is made in float32, and rounded once.
        max_shard_size: bytes of a file, or a text such as "5GB". About as much memory is needed, and a layer more.
        repo: where the Hub has the base, for the card; None for a folder, of which the card has the name alone.

    Raises:
        RequestError: the base is quantized, the adapter is for another base, or peft's layers cannot be found in its
            files.
        RunFailed: a merged weight is not finite, or the disk is full.
    """
    layers = plan_merge(base, adapter)
    try:
        with replace_folder(folder) as temporary, safe_open(adapter / WEIGHTS, framework="pt") as trained:
            temporary.mkdir(parents=True)

            def change(name: str, weight: torch.Tensor) -> torch.Tensor:
                return merged_weight(layers[name], weight, trained, TORCH_DTYPES[dtype]) if name in layers else weight

            shards, size = write_shards(
                base, temporary, change=change, dtype=TORCH_DTYPES[dtype], max_shard_size=max_shard_size
            )
            copy_config(base, temporary, dtype)
            if (template := adapter / CHAT_TEMPLATE).is_file():
                shutil.copyfile(template, temporary / CHAT_TEMPLATE)
            copy_beside(base, temporary)
            before = adapter / CARD
            text = merged_card(
                before.read_text(encoding="utf-8", errors="replace") if before.is_file() else "",
                name=folder.name,
                base=base.absolute().name,
                repo=repo,
                auto_class=class_in(base).__name__,
                dtype=dtype,
            )
            (temporary / CARD).write_text(text, encoding="utf-8")
            yield temporary, Merged(layers=len(layers), shards=shards, bytes=size)
    except (OSError, SafetensorError) as error:
        raise RunFailed(
            f"The merged model could not be written to {folder}: {error}.", "Free space, or choose another folder."
        ) from error


def plan_merge(base: Path, adapter: Path) -> dict[str, Layer]:
    """The layers that an adapter changes, by the names of their weights in the base's files.

    Raises:
        RequestError: see `merged_folder`.
    """
    read = read_adapter(adapter)
    refuse_unmergeable(read.config, adapter)
    skeleton = skeleton_of(base)
    embeddings = (skeleton.get_input_embeddings(), skeleton.get_output_embeddings())
    tied = embeddings if skeleton.config.tie_word_embeddings else ()
    config = LoraConfig.from_pretrained(str(adapter))
    config.base_model_name_or_path = None  # peft would warn that it is another than where the base lies
    try:
        model = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    except ValueError as error:  # none of its target modules is there
        raise another_base(base, adapter, str(error).splitlines()[0]) from None
    check_shapes(model, read.shapes, base, adapter)
    if deeper := unadapted_above(model, config):
        raise another_base(base, adapter, f"it stops below {deeper[0]}, the first of {len(deeper)} further layers")
    stored = stored_shapes(base)
    prefix, names = f"{skeleton.base_model_prefix}.", stored_names(skeleton, stored)
    layers, refused = {}, []
    for path, module in adapted(model):
        layer = module.get_base_layer()
        # Files that were saved from the model without its head lack the first part of the names.
        full, short = f"{path}.weight", f"{path.removeprefix(prefix)}.weight"
        weight = names.get(full) or names.get(short) or full
        if not isinstance(layer, nn.Linear | Conv1D | nn.Embedding):
            refused.append(f"{path} is a {type(layer).__name__} to peft, which is not merged by itself")
        elif layer in tied:
            refused.append(f"{path} shares its weight with the other embedding, which a merge would change too")
        elif stored.get(weight) != tuple(layer.weight.shape):
            there = f"are {list(stored[weight])}" if weight in stored else "are not there by that name"
            refused.append(
                f"the weights of {path} should be {list(layer.weight.shape)}, and in the base's files {there}"
            )
        else:
            layers[weight] = Layer(layer, alone(config, module), own_tensors(read.shapes, path))
    if refused:
        more = f"; {len(refused) - 1} more layers are refused" if len(refused) > 1 else ""
        remedy = "Merge it in one piece with peft's merge_and_unload, or serve the adapter as it is"
        raise request_error("base", base, f"the adapter cannot be merged layer by layer: {refused[0]}{more}", remedy)
    return layers


def stored_names(skeleton: Any, stored: Iterable[str]) -> dict[str, str]:
    """The names in a model's files by those that its modules give them: transformers renames some as it loads."""
    renamings = [each for each in get_model_conversion_mapping(skeleton) if isinstance(each, WeightRenaming)]
    return {apply_renamings(name, renamings): name for name in stored}


def adapted(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """The layers that peft adapts, by their names in the base."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name.removeprefix(PREFIX), module


def refuse_unmergeable(fields: Mapping[str, Any], adapter: Path) -> None:
    """Raise a RequestError for adapters with more than what one layer's merge can hold."""
    for field, what in (
        ("modules_to_save", "whole modules beside its adapters"),
        ("target_parameters", "adapters on fused parameters, such as a mixture's experts"),
        ("trainable_token_indices", "single trained tokens"),
    ):
        if fields.get(field):
            rule = f"it has {what} ({field}), which are not merged layer by layer"
            raise request_error("adapter", adapter, rule, "Merge it with peft's merge_and_unload, in one piece")
    if begun := changed_base(fields):
        raise request_error("adapter", adapter, begun, PLAIN)
    if fields.get("bias", "none") != "none" or fields.get("lora_bias"):
        rule = "it has trained biases, which are not merged"
        raise request_error("adapter", adapter, rule, "Merge it with peft's merge_and_unload, in one piece")


def skeleton_of(base: Path) -> Any:
    """The base model without weights, on the meta device.

    Raises:
        RequestError: it is quantized, or transformers does not know it.
    """
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            method = dict(config.quantization_config).get("quant_method", "some way")
            rule = f"its weights are stored quantized ({method}): to merge into them would cost the model quality"
            raise request_error("base", base, rule, "Give the model in 16 bit that it was made from, with --base")
        with torch.device("meta"):
            return model_class(config).from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise request_error(
            "base", base, f"transformers cannot build it: {first_line(error)}", "Give another with --base"
        ) from None


def check_shapes(model: PeftModel, given: Mapping[str, tuple[int, ...]], base: Path, adapter: Path) -> None:
    """Raise a RequestError unless the adapter's tensors are those that peft would train on this base."""
    wanted = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    wrong = [name for name in given if given[name] != wanted.get(name)]
    missing = [name for name in wanted if name not in given]
    if not wrong and not missing:
        return
    if wrong:
        name = wrong[0]
        is_there = f"it would be {list(wanted[name])} on this base" if name in wanted else "this base has no such layer"
        what = f"{name.removeprefix(PREFIX)} is {list(given[name])}, and {is_there}"
    else:
        what = f"the base's {missing[0].removeprefix(PREFIX)} has no counterpart in it"
    count = len(wrong) + len(missing)
    raise another_base(base, adapter, f"{what}{f'; {count - 1} more tensors differ' if count > 1 else ''}")


def unadapted_above(model: PeftModel, config: LoraConfig) -> list[str]:
    """The layers of the base above the last of their kind that peft adapts, where it adapts all from the first on.

    For "all-linear" peft stores the names of all layers that there were, so that those of a deeper base stay as they
    are, and nothing else tells that it is another one.
    """
    if config.layers_to_transform is not None or isinstance(config.target_modules, str):
        return []  # a choice of layers
    reached: dict[str, set[int]] = {}
    for path, _ in adapted(model):
        if number := NUMBER.search(path):
            reached.setdefault(NUMBER.sub(".*.", path, count=1), set()).add(int(number[1]))
    above = []
    for path in (name.removeprefix(PREFIX) for name, _ in model.named_modules()):
        number = NUMBER.search(path)
        numbers = reached.get(NUMBER.sub(".*.", path, count=1), set())
        if number and numbers == set(range(len(numbers))) and numbers and int(number[1]) not in numbers:
            above.append(path)
    return above


def another_base(base: Path, adapter: Path, reason: str) -> RequestError:
    """The error of an adapter that was trained on another model."""
    return request_error(
        "base",
        base,
        f"the adapter {adapter} was trained on a base of another size or kind: {reason}",
        "Give the base that it was trained on with --base",
    )


def alone(config: LoraConfig, module: LoraLayer) -> LoraConfig:
    """The configuration for one layer that is called "layer"."""
    name = module.active_adapters[0]
    return dataclasses.replace(
        config,
        r=module.r[name],
        lora_alpha=module.lora_alpha[name],
        target_modules=["layer"],
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,  # others look at the weight, and change it
        task_type=None,
        base_model_name_or_path=None,
    )


def own_tensors(names: Iterable[str], path: str) -> dict[str, str]:
    """The tensors of one layer among `names`, by the names that they have where that layer is alone."""
    start = f"{PREFIX}{path}."
    return {f"{PREFIX}layer.{name.removeprefix(start)}": name for name in names if name.startswith(start)}


def merged_weight(layer: Layer, weight: torch.Tensor, trained: Any, dtype: torch.dtype) -> torch.Tensor:
    """A layer's weight with its adapter merged by peft in float32, as `dtype`.

    Args:
        weight: the base's, in any floating dtype.
        trained: the adapter's file, opened.
    """
    holder = cast(Any, nn.Module())
    holder.layer = copy.deepcopy(layer.module)
    holder.layer.weight = nn.Parameter(weight.to(torch.float32, copy=True), requires_grad=False)
    if getattr(holder.layer, "bias", None) is not None:  # it is not the adapter's to change
        holder.layer.bias = nn.Parameter(torch.zeros(tuple(holder.layer.bias.shape)), requires_grad=False)
    model = cast(Any, get_peft_model(holder, layer.config))
    set_peft_model_state_dict(model, {name: trained.get_tensor(given).float() for name, given in layer.tensors.items()})
    merged = cast(torch.Tensor, model.merge_and_unload().layer.weight.data).to(dtype)
    if not torch.isfinite(merged).all():
        raise RunFailed(f"A merged weight is not finite in {dtype}.", "Choose --dtype bfloat16 or float32.")
    return merged
