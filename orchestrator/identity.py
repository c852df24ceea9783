"""What makes a run the same run: a resume under the same name must find all of it unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clusters.errors import Problem, RequestError
from orchestrator.spec import RunSpec
from qlora_core.recipe import Recipe
from qlora_core.training.dataset import DataReport

SAMPLED_BYTES = 2**20


def identity(
    spec: RunSpec,
    model: str,
    data: DataReport,
    compute_dtype: str,
    *,
    adapter: str | None = None,
    evaluated: DataReport | None = None,
) -> dict[str, Any]:
    """Model, data, recipe and seed of a run, flat, by the specification's field paths.

    Args:
        model: a digest of the base model's folder, or its Hub id with the commit.
        adapter: the digest of the adapter that it starts from; None for fresh ones.
        evaluated: what became of the examples to evaluate on; None where they are held out of the data.
    """
    return {
        "name": spec.name,
        "model": model,
        "adapter": adapter,
        "data": data.digest,
        "data as tokens": data.token_digest,  # the tokenizer and its chat template are part of it
        "data.format": data.format,
        "data.eval_fraction": spec.data.eval_fraction,
        "evaluated as tokens": None if evaluated is None else evaluated.token_digest,
        "seed": spec.seed,
        **{f"recipe.{name}": value for name, value in spec.recipe.to_json().items()},
        "recipe.compute_dtype": compute_dtype,
    }


def model_fingerprint(folder: Path) -> str:
    """A digest of a model's folder: its config, and of each weight file the name, the size and both ends.

    Hashing 130 GB would take minutes at every start. A file's beginning holds names, types and places of all tensors,
    its end the last weights; two trainings of one model differ in both files' ends.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLED_BYTES))
            file.seek(max(0, size - SAMPLED_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def check_same(before: Mapping[str, Any], after: Mapping[str, Any], folder: Path | str) -> None:
    """Raise a RequestError that shows each difference between a run and what would resume it.

    What a recipe did not have yet when the run was started was as its default is.
    """
    defaults = {f"recipe.{name}": value for name, value in Recipe().to_json().items()}
    before = {**{key: value for key, value in defaults.items() if key in after}, **before}
    problems = [
        Problem(
            key,
            repr(after.get(key)),
            f"the run in {folder} was started with {before.get(key)!r}",
            "Restore that to resume it, choose another name and output, or start anew beside it with --fresh",
        )
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if problems:
        raise RequestError(problems)
