"""Whether a merged model is the adapter: both are loaded as anyone would load them, and their losses compared."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel

from clusters.errors import RunFailed
from qlora_core.training.evaluate import example_losses
from qlora_core.training.examples import Examples
from qlora_core.training.model import TORCH_DTYPES, class_in

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
"""The largest difference of two losses that rounding explains: about the dtype's spacing at 1, over the layers."""


@dataclass(frozen=True, slots=True)
class Check:
    """Mean losses on the same examples.

    Attributes:
        merged: of the merged model.
        unmerged: of the base in the merged model's dtype, with the adapter on it.
    """

    merged: float
    unmerged: float


def check_merged(
    merged: Path, base: Path, adapter: Path, examples: Examples, dtype: str, device: torch.device
) -> Check:
    """Compare a merged model with its base and adapter, one after the other: each needs a whole model's memory.

    Raises:
        RunFailed: their losses differ by more than rounding explains.
    """
    with loaded(merged, dtype, device) as model:
        after = mean_loss(model, examples, device)
    with loaded(base, dtype, device) as model:
        before = mean_loss(PeftModel.from_pretrained(model, adapter), examples, device)
    if not math.isclose(after, before, abs_tol=TOLERANCE[dtype], rel_tol=TOLERANCE[dtype]):
        raise RunFailed(
            f"The merged model's loss is {after:.4f}, and that of the base with its adapter {before:.4f}, so nothing "
            "was written.",
            "Please report it; --no-check writes it all the same.",
        )
    return Check(merged=after, unmerged=before)


@contextmanager
def loaded(folder: Path, dtype: str, device: torch.device) -> Iterator[Any]:
    """A model as plain transformers loads it, and gone afterwards."""
    model = class_in(folder).from_pretrained(
        folder, dtype=TORCH_DTYPES[dtype], device_map={"": device}, use_safetensors=True, trust_remote_code=False
    )
    try:
        yield model
    finally:
        del model
        gc.collect()
        torch.cuda.empty_cache()


def mean_loss(model: Any, examples: Examples, device: torch.device) -> float:
    """The mean -log p over all learned tokens."""
    return sum(example_losses(cast(Any, model), examples, device)) / sum(examples.learned)
