"""Models of the Hugging Face Hub: their files, from its cache or over the network, all of one commit.

``huggingface_hub`` is imported where the Hub is really asked: no other plan pays for it. Its environment variables
hold: HF_HOME and HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clusters.errors import RequestError, request_error
from qlora_core.architecture import ModelArchitecture
from qlora_core.huggingface.config import architecture_from_file

if TYPE_CHECKING:
    from qlora_core.huggingface.hub_refusals import Asked, Kind

ANSWER_WITHIN_SECONDS = 5
"""For each address of the Hub, unless HF_HUB_ETAG_TIMEOUT says otherwise; a Hub that is there answers within one."""
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""How configs and tokenizers end. Code (.py) is not among them."""


@dataclass(frozen=True, slots=True)
class HubId:
    """A model of the Hub.

    Attributes:
        repo: ``org/name``.
        revision: a branch, tag or commit; None is the default branch.
    """

    repo: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model of the Hub at one commit, its config.json in the cache.

    Attributes:
        repo: ``org/name``.
        commit: all 40 digits of it.
        config: the config.json; the model's other files lie beside it once they are fetched.
        endpoint: the Hub's address.
        sizes: the repository's files with their bytes; None where the Hub did not answer, and the cache did.
        silence: then, what kept it from answering.
    """

    repo: str
    commit: str
    config: Path
    endpoint: str
    sizes: Mapping[str, int] | None = None
    silence: Exception | None = None

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.config.parent

    @property
    def pinned(self) -> str:
        """``org/name@commit``."""
        return f"{self.repo}@{self.commit}"

    def architecture(self) -> ModelArchitecture:
        """Its shapes.

        Raises:
            RequestError: its config cannot be modelled.
        """
        source = f"{self.endpoint}/{self.repo}/blob/{self.commit}/{CONFIG}"
        return architecture_from_file(self.config, name=self.repo, source=source)


def parse_hub_id(text: str) -> HubId | None:
    """The Hub id that `text` looks like, ``org/name`` or ``org/name@revision``; None where it looks otherwise."""
    repo, separator, revision = text.partition("@")
    organization, slash, name = repo.partition("/")
    if not (organization and slash and name) or "/" in name or organization in (".", "..", "~"):
        return None
    return HubId(repo, revision if separator else None)


def find_on_hub(hub: HubId, where: str, instead: str) -> HubModel:
    """The model with its config.json, from the Hub; from the cache where the Hub is silent, or the commit is given.

    Args:
        where: the flag or field that names it, for messages.
        instead: what to do where the Hub cannot help, as a sentence without a full stop.

    Raises:
        RequestError: there is no such model or revision, access to it is refused, it has no config.json, or it is not
            in the cache and the Hub does not answer.
    """
    asked = well_asked(hub, where, instead)
    cached = _cached(hub)
    if cached is not None and hub.revision is not None and _COMMIT.fullmatch(hub.revision):
        return cached  # a commit never changes
    return _ask(asked, cached)


def fetch_model(model: HubModel, where: str, instead: str, tell: Callable[[str], None]) -> Path:
    """The folder with all that training needs of a model: configs, tokenizer, safetensors; fetches what is missing.

    Args:
        where, instead: see `find_on_hub`.
        tell: is told of each weight file before it is fetched, for that may take long.

    Raises:
        RequestError: the repository has no safetensors, access to them is refused, or they are not all in the cache and
            the Hub does not answer.
    """
    if _is_whole(model.folder):
        return model.folder
    asked = well_asked(HubId(model.repo, model.commit), where, instead)

    from huggingface_hub import hf_hub_download

    from qlora_core.huggingface.hub_refusals import refusal

    if model.silence is not None:
        raise refusal(asked, model.silence)
    if model.sizes is None:
        model = _ask(asked, None)
    sizes = model.sizes or {}
    _refuse_without_safetensors(sizes, asked)
    try:
        # One file after the other, because snapshot_download passes over a refusal where a part is in the cache.
        for name in sorted(name for name in sizes if "/" not in name and name.endswith(_SMALL_FILES)):
            hf_hub_download(model.repo, name, revision=model.commit)
        missing = [name for name in _weight_files(model.folder) if not (model.folder / name).is_file()]
        for number, name in enumerate(missing, 1):
            size = f" ({sizes[name] / 1000**3:.2f} GB)" if sizes.get(name) else ""
            tell(f"Fetching {model.repo} at {model.commit[:8]}, file {number} of {len(missing)}: {name}{size}")
            hf_hub_download(model.repo, name, revision=model.commit)
    except Exception as error:  # the HTTP client's errors have no common base that is ours to import
        raise refusal(asked, error) from None
    return model.folder


def well_asked(hub: HubId, where: str, instead: str, kind: Kind = "model") -> Asked:
    """What is asked for, found to be well written; the library is imported and quiet from here on."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Or else the first request of a day is preceded by one for a list of coding agents, which waits too.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        import huggingface_hub.constants  # reads the environment; first, because other parts print what it raises
    except ValueError as error:
        rule = f"an HF_... environment variable cannot be read: {error}"
        raise request_error("environment", "", rule, "Correct it, HF_HUB_ETAG_TIMEOUT for instance") from None

    from qlora_core.huggingface.hub_refusals import Asked, refusal

    asked = Asked(where, hub.repo, hub.revision, instead, kind)
    try:
        huggingface_hub.hf_hub_url(hub.repo, CONFIG)
    except ValueError as error:
        raise refusal(asked, error) from None
    if hub.revision is not None and (not _REVISION.fullmatch(hub.revision) or ".." in hub.revision):
        raise asked.refuse("what follows the @ is no revision", "Give a branch, a tag or a commit, or leave it out")
    return asked


def _cached(hub: HubId) -> HubModel | None:
    """The model as far as it lies in the cache, if its config does."""
    from huggingface_hub import try_to_load_from_cache

    from qlora_core.huggingface.hub_refusals import endpoint

    try:
        found = try_to_load_from_cache(hub.repo, CONFIG, revision=hub.revision)
    except OSError:  # not readable: what writing to it says is clearer
        return None
    if not isinstance(found, str):
        return None
    config = Path(found)
    return HubModel(hub.repo, config.parent.name, config, endpoint())


def _ask(asked: Asked, cached: HubModel | None) -> HubModel:
    """The model as the Hub has it now; `cached` where the Hub is silent."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    from qlora_core.huggingface.hub_refusals import endpoint, is_silence, refusal

    patience = constants.HF_HUB_ETAG_TIMEOUT if "HF_HUB_ETAG_TIMEOUT" in os.environ else ANSWER_WITHIN_SECONDS
    try:
        # First, because it is tried once only: hf_hub_download goes on for minutes where nothing answers.
        info = HfApi().model_info(asked.repo, revision=asked.revision, timeout=patience, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        _refuse_without_config(sizes, asked)
        config = Path(hf_hub_download(asked.repo, CONFIG, revision=asked.revision))
    except RequestError:
        raise
    except Exception as error:  # the HTTP client's errors have no common base that is ours to import
        if cached is not None and is_silence(error):
            return replace(cached, silence=error)
        raise refusal(asked, error) from None
    return HubModel(asked.repo, config.parent.name, config, endpoint(), sizes)


def _weight_files(folder: Path) -> list[str]:
    """The weight files that a fetched model has, as transformers chooses them."""
    if not (folder / INDEX).is_file():
        return [WEIGHTS]
    return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))


def _is_whole(folder: Path) -> bool:
    """Whether weights and tokenizer lie in the cache."""
    try:
        weights = _weight_files(folder)
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return False
    there = all((folder / name).is_file() for name in weights)
    return there and any((folder / name).is_file() for name in _TOKENIZERS)


def _refuse_without_config(sizes: Mapping[str, int], asked: Asked) -> None:
    """Raise a RequestError for a repository that holds something else than a model of transformers."""
    if CONFIG in sizes:
        return
    if "adapter_config.json" in sizes:
        raise asked.refuse("it is a LoRA adapter, not a model", "Give the model it was trained on")
    gguf = any(name.endswith(".gguf") for name in sizes)
    rule = f"the repository has no {CONFIG}{', but GGUF files, which transformers does not train' if gguf else ''}"
    raise asked.refuse(rule, "Give the repository that the model was first published in")


def _refuse_without_safetensors(sizes: Mapping[str, int], asked: Asked) -> None:
    """Raise a RequestError for a repository without weights that can be read safely."""
    if WEIGHTS in sizes or INDEX in sizes:
        return
    pickle = next((name for name in sizes if name.endswith(_PICKLES)), None)
    rule = f"the repository has neither {WEIGHTS} nor {INDEX}"
    if pickle is not None:
        rule = f"its weights are pickles ({pickle}), which can run code when they are read, and so are not"
    raise asked.refuse(rule, "Choose a revision or a model with safetensors, or convert it and give the folder")
