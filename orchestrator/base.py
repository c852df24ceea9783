"""The base model of a run: from the specification's word for it to a folder on this machine and what it is known by."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from clusters.errors import Problem, RequestError, request_error
from orchestrator.identity import check_same, model_fingerprint
from orchestrator.record import load_record
from orchestrator.spec import RunSpec
from qlora_core.architecture import ModelArchitecture
from qlora_core.catalogue import hub_id, near_by_name, near_on_hub
from qlora_core.data import is_address
from qlora_core.huggingface.config import architecture_from_folder
from qlora_core.huggingface.hub import HubId, fetch_model, find_on_hub
from qlora_core.huggingface.stored import unlike
from qlora_core.remote import model_folder
from qlora_core.training.dataset.cache import models_folder
from qlora_core.training.shards import opened

UNPACKED = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the dtypes whose tensors have the shapes of their modules."""
INSTEAD = "Give a folder with config.json, *.safetensors and the tokenizer"


@dataclass(frozen=True, slots=True)
class Base:
    """The base model, all its files on this machine.

    Attributes:
        folder: where they lie.
        name: what others load it by: the folder, its address, or the Hub id.
        commit: of the Hub's repository; None for any other.
        identity: what a resume must find unchanged.
        architecture: its shapes.
    """

    folder: Path
    name: str
    commit: str | None
    identity: str
    architecture: ModelArchitecture


def find_base(spec: RunSpec, tell: Callable[[str], None]) -> Base:
    """The base model of a specification: a folder, an address, else the catalogue's or the Hub's; fetched if need be.

    Args:
        tell: is told of each weight file before it is fetched.

    Raises:
        RequestError: there is none, the Hub does not give it, it cannot be modelled, its weights are not whole or
            another model's than its config, or the run in the output folder was started with another commit.
    """
    if is_address(spec.model):
        return base_in(model_folder(spec.model, models_folder(), tell), spec.model)
    folder = Path(spec.model)
    # A specification's folders are absolute; what is not was no folder beside it, though it may be one from here.
    if folder.is_absolute() and folder.is_dir():
        return base_in(folder, spec.model)
    hub = hub_id(spec.model)
    if hub is None:
        rule = "training needs a folder with the model's weights, a name of the catalogue or a Hub id (org/name)"
        raise request_error("model", spec.model, rule, near_by_name(spec.model[:200]) + INSTEAD)
    if spec.model.startswith(hub.repo):
        instead = near_on_hub(hub.repo) + INSTEAD
    else:
        instead = f"The catalogue's {spec.model} is {hub.repo} on the Hub. {INSTEAD}"
    return base_from_hub(hub, instead, Path(spec.output), tell)


def base_in(folder: Path, name: str) -> Base:
    """The model in a folder.

    Raises:
        RequestError: it cannot be modelled, or its weights are not whole or another model's than its config.
    """
    architecture = replace(architecture_from_folder(folder), name=name)
    check_weights(folder)
    check_fits(folder, architecture)
    return Base(folder, name, None, model_fingerprint(folder), architecture)


def base_from_hub(hub: HubId, instead: str, output: Path, tell: Callable[[str], None]) -> Base:
    """The model of that Hub id: at the commit of the run in `output`, where there is one and no revision is given.

    Args:
        instead: see `find_on_hub`.

    Raises:
        RequestError: see `find_base`.
    """
    record = load_record(output)
    before = "" if record is None else str(record.identity.get("model", ""))
    repo, _, commit = before.partition("@")
    if hub.revision is None and repo == hub.repo:
        hub = HubId(hub.repo, commit)
    model = find_on_hub(hub, "model", instead)
    if record is not None:
        # The run's other differences are told later; this one before many gigabytes are fetched.
        check_same({"model": before}, {"model": model.pinned}, output)
    architecture = model.architecture()
    folder = fetch_model(model, "model", instead, tell)
    check_weights(folder)
    check_fits(folder, architecture)
    return Base(folder, model.repo, model.commit, model.pinned, architecture)


def base_on_this_node(folder: Path, name: str, commit: str | None, identity: str) -> Path:
    """The folder of a run's base model on a node of a cluster: `folder`, or where it is not there a copy, made once.

    Args:
        name, commit, identity: see `Base`.

    Raises:
        RequestError: it cannot be fetched, or is another one.
    """
    if folder.is_dir():
        return folder
    if commit is not None:
        model = find_on_hub(HubId(name, commit), "model", INSTEAD)
        here, found = fetch_model(model, "model", INSTEAD, said_by_nobody), model.pinned
    elif is_address(name):
        here = model_folder(name, models_folder(), said_by_nobody)
        found = model_fingerprint(here)
    else:
        rule = f"the node {socket.gethostname()} does not see that folder"
        raise request_error("model", folder, rule, "Put it on storage that all nodes see, or name it by an address")
    if found != identity:
        rule = f"what the node {socket.gethostname()} fetched is another model than the run was planned for"
        raise request_error("model", name, rule, "Leave the files there alone while the run goes on")
    return here


def said_by_nobody(_: str) -> None:
    """A worker tells nobody what it fetches."""


def check_weights(folder: Path) -> None:
    """Raise a RequestError for weight files that are missing or cut off, before any worker reads them."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        rule = "the folder holds no *.safetensors"
        raise request_error("model", folder, rule, "Save the model with save_pretrained; pickles are not read")
    problems = []
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            listed = set()
            problems.append(Problem("model", str(index), "its list of weight files cannot be read", "Copy it again"))
        for name in sorted(listed - {file.name for file in files}):
            problems.append(
                Problem("model", str(folder / name), "the index lists it, and it is missing", "Copy it again")
            )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            problems.append(Problem("model", str(file), f"it is damaged: {error}", "Copy it again"))
    if problems:
        raise RequestError(problems)


def check_fits(folder: Path, architecture: ModelArchitecture) -> None:
    """Raise a RequestError for whole weight files that hold another model than config.json, as `unlike` tells them."""
    with opened(folder) as files:

        def shape_of(name: str) -> tuple[int, ...] | None:
            tensor = files[name].get_slice(name)
            return tuple(tensor.get_shape()) if tensor.get_dtype() in UNPACKED else None

        rule = unlike(architecture, files.keys(), shape_of)
    if rule:
        raise request_error("model", folder, rule, "Copy config.json and the weight files again, from one model")
