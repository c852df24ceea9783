"""A plan as the specification of a run, which `qlora-train` carries out unchanged."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clusters.errors import Problem, RequestError, request_error
from orchestrator.plans import Plan
from orchestrator.question import STRATEGY_FIELDS
from orchestrator.rules import unbuilt
from qlora_core.files import replace_atomically
from qlora_core.recipe import Recipe

FLAG = "--write"
NO_DATA = "train.jsonl"
"""What stands for the data where none was named."""
HUB_COMMIT = re.compile(r"/([^/]+/[^/]+)/blob/([0-9a-f]{40})/")


def write_run(plan: Plan, options: Mapping[str, Any]) -> None:
    """Write the specification of `plan`.

    Raises:
        RequestError: `qlora-train` would not run it, there is a file of that name, or it cannot be written.
    """
    import yaml  # only where something is written

    path = Path(options["write"])
    if problems := list(refused(plan, path)):
        raise RequestError(problems).named({"recipe.block_size": "--block-size", "recipe.upcast": "--upcast"})
    text = yaml.safe_dump(run_of(plan, options, path.parent), sort_keys=False, allow_unicode=True)
    try:
        with replace_atomically(path) as temporary:
            temporary.write_text(header(plan, options) + text, encoding="utf-8")
    except OSError as error:
        rule = f"it cannot be written: {error.strerror or error}"
        raise request_error(FLAG, path, rule, "Choose a folder that can") from error


def refused(plan: Plan, path: Path) -> Iterator[Problem]:
    """Why that file is not written."""
    yield from unbuilt(plan.recipe)
    if plan.target.stack != "ours":
        rule = "it can be planned, and qlora-train runs its own loop"
        yield Problem("--stack", plan.target.stack, rule, "Leave it out")
    if plan.group is not None:
        rule = f"a run takes the GPUs of one pool, and this is planned for {plan.group}"
        yield Problem(FLAG, str(path), rule, "Ask for fewer --gpus, or give a description with one of the pools")
    if path.is_dir():
        yield Problem(FLAG, str(path), "it is a folder", "Give a file in it, such as run.yaml")
    elif path.exists():
        yield Problem(FLAG, str(path), "there is a file of that name", "Remove it, or write another")


def header(plan: Plan, options: Mapping[str, Any]) -> str:
    """What a reader of the file should know."""
    where = plan.group or f"{plan.strategy.world_size} x {plan.target.name}"
    lines = [f"# Written by qlora-plan for {where}; plan {plan.digest}."]
    if not plan.fits:
        lines.append("# It does not fit there.")
    if options["data"] is None:
        lines.append("# data.path: put in your own.")
    return "\n".join(lines) + "\n"


def run_of(plan: Plan, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of the specification, of a file in `folder`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.architecture.name).strip("-.") or "run"
    default, recipe = Recipe(), plan.recipe
    fields = {
        field.name: getattr(recipe, field.name)
        for field in dataclasses.fields(recipe)
        if getattr(recipe, field.name) != getattr(default, field.name)
        or field.name in ("rank", "seq_len", "tokens_per_step")
    }
    targets = fields.get("targets")
    data = NO_DATA if options["data"] is None else relative(options["data"], folder)
    return {
        "name": f"{name}-{recipe.method}",
        "model": model_of(plan, options["model"], folder),
        "data": {"path": data},
        "recipe": {**fields, **({"targets": list(targets)} if isinstance(targets, tuple) else {})},
        # accumulation follows from the tokens of a step
        "strategy": {field: getattr(plan.strategy, field) for field in STRATEGY_FIELDS},
        **cluster_of(options["cluster"]),
        "output": f"runs/{name}-{recipe.method}",
    }


def cluster_of(asked: str | None) -> dict[str, Any]:
    """The section of a running Ray that was named; a description's machines are for `qlora-submit` to reach."""
    if asked is None:
        return {}
    from orchestrator.discovery import is_address  # no other plan needs it

    return {"cluster": {"address": asked}} if is_address(asked) else {}


def model_of(plan: Plan, asked: str, folder: Path) -> str:
    """The model as a specification names it: a folder by its path, one of the Hub at the commit that was read."""
    if os.path.isdir(os.path.expanduser(asked)):
        return relative(asked, folder)
    found = HUB_COMMIT.search(plan.architecture.source)
    return f"{found[1]}@{found[2]}" if found and found[1] == plan.architecture.name else plan.architecture.name


def relative(path: str, folder: Path) -> str:
    """A path as a file in `folder` has to write it; a name alone would be taken for a model's."""
    text = os.path.relpath(os.path.expanduser(path), folder)
    return text if text.startswith(os.pardir) else os.path.join(os.curdir, text)
