"""The models known by name: ``models/index.json`` lists them, ``models/NAME.json`` holds each one's config fields.

The index is JSON and not YAML because importing a YAML parser alone takes longer than everything done here.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clusters.errors import RequestError, nearest, plain, request_error
from qlora_core.architecture import ModelArchitecture
from qlora_core.huggingface.config import architecture_from_config, architecture_from_folder

if TYPE_CHECKING:
    from qlora_core.huggingface.hub import HubId

_FOLDER = Path(__file__).parent / "models"
_HOW_TO_LIST = "qlora-plan --list-models shows all"
_ALIKE = 0.6
"""From here on a name may have been meant; the difflib documentation's rule of thumb for close matches."""


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model of the catalogue.

    Attributes:
        name: what it is called here.
        aliases: other names for it, Hub ids of its siblings with the same shape among them.
        hub: the Hub id of its weights.
        source: where its config fields were read.
        note: what is special about it, or nothing.
    """

    name: str
    aliases: tuple[str, ...]
    hub: str
    source: str
    note: str

    def architecture(self) -> ModelArchitecture:
        """Its shapes."""
        return _architecture(self)

    def repository(self, given: str) -> str:
        """The Hub id that `given`, one of its names, means: models of one shape differ in their weights."""
        ids = [self.hub, *(alias for alias in self.aliases if "/" in alias)]
        same = [one for one in ids if plain(given) in (plain(one), plain(one.partition("/")[2]))]
        return same[0] if same else self.hub


@functools.cache
def _architecture(entry: CatalogueEntry) -> ModelArchitecture:
    fields = json.loads((_FOLDER / f"{entry.name}.json").read_bytes())
    return architecture_from_config(fields, name=entry.name, source=entry.source)


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One line of the catalogue's listing.

    Attributes:
        entry: what the index says.
        parameters: all its parameters.
    """

    entry: CatalogueEntry
    parameters: int


def find_model(name_or_dir: str) -> ModelArchitecture:
    """The model of that catalogue name or alias, else the one in that folder, else the one of that id on the Hub.

    Upper case, spaces, hyphens and underscores in a name of the catalogue are ignored. Only the last asks the network.

    Raises:
        RequestError: none is there, it is a file, the Hub does not give it, or its config cannot be modelled.
    """
    entry = _by_name().get(plain(name_or_dir))
    if entry is not None:
        return entry.architecture()
    if _is_folder(name_or_dir):
        return architecture_from_folder(os.path.realpath(name_or_dir))  # called as a run calls it
    refuse_file(name_or_dir, name_or_dir, "--model")
    hub = hub_id(name_or_dir)
    if hub is not None:
        from qlora_core.huggingface.hub import find_on_hub  # no other plan needs it

        instead = f"Give a folder with its config.json, or a name of the catalogue; {_HOW_TO_LIST} names"
        return find_on_hub(hub, "--model", near_on_hub(hub.repo) + instead).architecture()
    raise _unknown(name_or_dir)


def refuse_file(given: str, path: str, where: str) -> None:
    """Raise a RequestError where `given` is no name of the catalogue and a file lies at its `path`.

    Its name may be written like a Hub id, which the Hub would be asked about.

    Args:
        where: the flag or field that names it.
    """
    if os.path.isfile(path) and plain(given.partition("@")[0]) not in _by_name():
        raise request_error(where, given, "it is a file", f"Give its folder, {os.path.dirname(given) or '.'}")


def list_models() -> tuple[ListedModel, ...]:
    """All models of the catalogue with their parameters, in its order (by maker and size)."""
    return tuple(ListedModel(entry, entry.architecture().parameters) for entry in _index())


def hub_id(text: str) -> HubId | None:
    """Where the Hub has the model of a catalogue name or Hub id, either with ``@revision`` or not; None for others."""
    from qlora_core.huggingface.hub import HubId, parse_hub_id

    name, separator, revision = text.partition("@")
    entry = _by_name().get(plain(name))
    if entry is not None:
        return HubId(entry.repository(name), revision if separator else None)
    return parse_hub_id(text)


def near_by_name(given: str) -> str:
    """A question with the catalogue's names that may have been meant, or nothing where none is near or it is a path."""
    if _is_path(given):
        return ""
    names = [name for entry in _index() for name in (entry.name, *entry.aliases) if "/" not in name]
    part = plain(given)
    # "llama-3" and "70b" are parts of several names: those come before what merely looks alike.
    parts = [name for name in names if part and (plain(name).startswith(part) or plain(name).endswith(part))]
    # Of these, a name in which the given one's last number goes on comes last: llama-33b is no llama-3.
    parts = sorted(nearest(given, parts, limit=len(parts)), key=lambda name: name[len(given) :][:1].isdigit())
    others = [name for name in nearest(given, names, cutoff=_ALIKE) if name not in parts]
    near = [*parts, *others][: max(3, min(8, len(parts)))]
    return f"Did you mean {', '.join(near)}? " if near else ""


def near_on_hub(repo: str) -> str:
    """A sentence with the catalogue's Hub ids that are most like `repo`, or nothing where none is."""
    known = [name for entry in _index() for name in (entry.hub, *entry.aliases) if "/" in name]
    near = [name for name in nearest(repo[:200], known, cutoff=_ALIKE) if name != repo]
    return f"Nearest in the catalogue: {', '.join(near)}. " if near else ""


@functools.cache
def _index() -> tuple[CatalogueEntry, ...]:
    return tuple(
        CatalogueEntry(one["name"], tuple(one.get("aliases", ())), one["hub"], one["source"], one.get("note", ""))
        for one in json.loads((_FOLDER / "index.json").read_bytes())
    )


@functools.cache
def _by_name() -> dict[str, CatalogueEntry]:
    return {plain(name): entry for entry in _index() for name in (entry.name, *entry.aliases, entry.hub)}


def _is_folder(path: str) -> bool:
    try:
        return bool(path) and Path(path).is_dir()
    except (OSError, ValueError):  # too long a name, no permission, a zero byte
        return False


def _is_path(given: str) -> bool:
    """Whether it is written like a path."""
    return given.startswith(("/", "./", "../", "~")) or given.endswith("/")


def _unknown(given: str) -> RequestError:
    """Why nothing was found: a path and a slip of the pen each get their own answer."""
    where, shown = "--model", given if len(given) <= 200 else f"{given[:197]}..."
    if _is_path(given):
        return request_error(
            where, shown, "there is no such folder", f"Give a folder with a config.json; {_HOW_TO_LIST} names"
        )
    rule = "is neither a catalogue name nor a folder nor a Hub id (org/name)"
    return request_error(where, shown, rule, f"{near_by_name(shown)}{_HOW_TO_LIST} names")
