"""The fields of a specification that say where something lies: made absolute, kept free of secrets, replaced."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clusters.errors import Problem
from qlora_core.data import has_credentials, hub_dataset, is_address, without_credentials

Place = tuple[str, ...]
"""A field by the sections that it lies in: ("data", "datasets", "chats", "path")."""


def places(fields: Mapping[str, Any]) -> dict[Place, str]:
    """What a specification's fields say of where something lies; those that hold a mistake are passed over."""
    data = _section(fields, "data")
    found: dict[Place, Any] = {(name,): fields.get(name) for name in ("model", "adapter", "output")}
    found |= {("data", name): data.get(name) for name in ("path", "eval_path")}
    datasets = _section(data, "datasets")
    found |= {("data", "datasets", name, "path"): _section(datasets, name).get("path") for name in datasets}
    found["checkpoints", "storage"] = _section(fields, "checkpoints").get("storage")
    return {place: text for place, text in found.items() if isinstance(text, str)}


def put(fields: dict[str, Any], place: Place, text: str) -> None:
    """Let a field say that instead."""
    *sections, name = place
    for section in sections:
        fields = fields[section]
    fields[name] = text


def resolve(fields: dict[str, Any], folder: Path) -> None:
    """Make the paths of a right specification in `folder` absolute.

    An address stays as it is. A model that is no folder there, and is not written like one, stays a name; data that is
    not there and is written like a dataset of the Hub is one.
    """
    for place, text in places(fields).items():
        path = absolute(folder, text)
        if place == ("model",):
            stays = not os.path.isdir(path) and not text.startswith(("/", "./", "../", "~"))
        elif place[0] == "data":
            stays = is_address(text) or (not os.path.exists(path) and hub_dataset(text) is not None)
        else:
            stays = place[0] == "checkpoints"
        if not stays:
            put(fields, place, path)


def absolute(folder: Path, text: str) -> str:
    """A specification's path, which is relative to its folder."""
    return os.path.realpath(os.path.join(folder, os.path.expanduser(text)))


def refuse_credentials(fields: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with addresses that carry secrets: they would stand in records and logs. They are not shown."""
    rule = "an address must not carry a user, a password, a query or a fragment"
    remedy = "Leave credentials to the environment, as the storage's own tools read them"
    return [
        Problem(".".join(map(str, place)), without_credentials(text), rule, remedy)
        for place, text in places(fields).items()
        if is_address(text) and has_credentials(text)
    ]


def _section(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of the file; an empty one where it is none."""
    section = fields.get(name)
    return section if isinstance(section, dict) else {}
