"""A model's files of weights: mapped, and written anew shard by shard, so that no more than one is in memory."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from safetensors.torch import save_file

from clusters.errors import request_error
from qlora_core.files import write_json

INDEX = "model.safetensors.index.json"
COPIED = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
)
"""What of the base's folder goes with its weights: no code, and no other weights."""


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a model's files."""
    with opened(folder) as files:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}


@contextmanager
def opened(folder: Path) -> Iterator[dict[str, Any]]:
    """A model's files, mapped and not read, by the names of their tensors."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in weight_files(folder)]
        yield {name: file for file in files for name in file.keys()}  # noqa: SIM118, they are no mappings


def weight_files(folder: Path) -> list[Path]:
    """The files that make up the model: those of its index, where there is one."""
    index = folder / INDEX
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(listed))]
    whole = folder / "model.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def write_shards(
    source: Path,
    folder: Path,
    *,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
    max_shard_size: int | str,
) -> tuple[int, int]:
    """Write a model's weights again, each as `change` gives it; returns (files, bytes).

    Args:
        change: from a tensor's name and value to its new value, of the same shape.
        dtype: of what is written, but for integers, which stay as they are.
        max_shard_size: bytes of a file, or a text such as "5GB".

    Raises:
        RequestError: `max_shard_size` is no size.
    """
    with opened(source) as files:
        sizes = {name: stored_bytes(file.get_slice(name), dtype) for name, file in files.items()}
        try:
            if str(max_shard_size).lstrip().startswith(("-", "0")):
                raise ValueError(max_shard_size)
            split = split_state_dict_into_shards_factory(
                sizes,
                get_storage_size=lambda size: size,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=max_shard_size,
            )
        except ValueError:
            rule = "it is no size of a file"
            raise request_error("max shard size", max_shard_size, rule, "Write 5GB or 500MB, say") from None
        for file_name, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                tensor = change(name, files[name].get_tensor(name))
                shard[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            save_file(shard, folder / file_name, metadata={"format": "pt"})
    if split.is_sharded:
        metadata = {"total_size": sum(sizes.values())}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": split.tensor_to_filename})
    return len(split.filename_to_tensors), sum(sizes.values())


INTEGER_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
"""By safetensors' names of the dtypes that are kept as they are."""


def stored_bytes(tensor: Any, dtype: torch.dtype) -> int:
    """The bytes of a tensor (a slice of a safetensors file) once its floating point numbers have `dtype`."""
    numel: int = math.prod(tensor.get_shape())
    return numel * INTEGER_BYTES.get(tensor.get_dtype(), dtype.itemsize)


def copy_config(base: Path, folder: Path, dtype: str) -> None:
    """Copy a model's configuration, with a new dtype in it."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = dtype
    write_json(folder / "config.json", config)


def copy_beside(base: Path, folder: Path) -> None:
    """Copy what goes with a model's weights, its tokenizer and so on, but for files that `folder` has already."""
    for pattern in COPIED:
        for path in base.glob(pattern):
            target = folder / path.relative_to(base)
            if path.is_file() and path.suffix not in (".py", ".bin", ".pt") and not target.exists():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
