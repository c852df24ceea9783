"""Datasets of the Hugging Face Hub: their files, all of one commit, laid out as `datasets` reads the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from clusters.errors import RequestError, first_line, request_error
from qlora_core.huggingface.hub import HubId, well_asked
from qlora_core.training.dataset.options import DataOptions
from qlora_core.training.dataset.readers import PACKED, SUFFIXES, kind_of

PATTERNS = [f"*{suffix}{packed}" for suffix in SUFFIXES for packed in ("", PACKED)]
CARD = "README.md"
"""Says which files belong to which config and split."""


class Fetched(NamedTuple):
    """Files of a dataset, the folder that they lie in, and what names their content."""

    files: list[Path]
    folder: Path
    digest: str


def fetch_dataset(hub: HubId, options: DataOptions, instead: str) -> Fetched:
    """The dataset ``org/name`` or ``org/name@revision``; fetched into huggingface_hub's cache, and read from there.

    Args:
        instead: what else may be given, for who may not have it.

    Raises:
        RequestError: there is no such dataset, config or split, the Hub does not give it, or it is code.
    """
    folder = snapshot(HubId(hub.repo, hub.revision or options.revision), options, instead)
    commit = folder.name
    files = data_files(folder, hub.repo, options)
    digest = f"{hub.repo}@{commit} config={options.config or 'default'} split={options.wanted_split}"
    if options.files is not None:
        digest += f" files={options.files}"
    return Fetched(files, folder, digest)


def snapshot(hub: HubId, options: DataOptions, instead: str) -> Path:
    """The folder of a dataset's files at one commit, which is the folder's name."""
    asked = well_asked(hub, "data.path", instead, "dataset")
    from huggingface_hub import snapshot_download

    from qlora_core.huggingface.hub_refusals import refusal

    wanted = [CARD, *(PATTERNS if options.files is None else [options.files])]
    try:
        return Path(snapshot_download(hub.repo, repo_type="dataset", revision=hub.revision, allow_patterns=wanted))
    except Exception as error:  # the HTTP client's errors have no common base that is ours to import
        raise refusal(asked, error) from None


def data_files(folder: Path, repo: str, options: DataOptions) -> list[Path]:
    """The files of the asked config and split, as the dataset's card or their names say."""
    if options.files is not None:
        found = sorted(path for path in folder.glob(options.files) if path.is_file() and kind_of(path.name))
        if not found:
            raise request_error("data.files", options.files, f"{repo} has no data file that fits", "Check the pattern")
        return found
    import datasets

    datasets.disable_progress_bars()
    try:
        # a local folder: nothing is fetched, and no code of it is run
        builder = datasets.load_dataset_builder(str(folder), name=options.config)
    except Exception as error:  # `datasets` raises whatever its parts do
        raise refused(repo, options, error) from None
    splits: dict[str, Any] = dict(builder.config.data_files or {})
    split = options.wanted_split
    if split not in splits:
        rule = f"{repo} has the splits {', '.join(map(str, splits)) or '(none)'}"
        raise request_error("data.split", split, rule, "Choose one of them")
    return [Path(file) for file in splits[split]]


def refused(repo: str, options: DataOptions, error: Exception) -> RequestError:
    """The error of a repository that `datasets` cannot lay out."""
    reason = first_line(error)
    if "BuilderConfig" in reason or "Config name" in reason:
        return request_error("data.config", options.config or "(none)", reason, "Choose one of those")
    return request_error(
        "data.path", repo, f"it cannot be read as a dataset: {reason}", "Name its files with data.files"
    )
