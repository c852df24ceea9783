"""Where data lies: a file, a folder of files, an Arrow dataset, one of the Hub, or an address of fsspec's."""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clusters.errors import Problem, RequestError, first_line, request_error
from qlora_core.data import hub_dataset, is_address
from qlora_core.training.dataset.hub import fetch_dataset
from qlora_core.training.dataset.options import DataOptions
from qlora_core.training.dataset.readers import Records, kind_of, read_file

INSTEAD = "Give a file of JSON lines, JSON, CSV or Parquet, a folder of these, or a dataset of the Hub"
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words for a split in a file's or folder's name (as `datasets` has them, data_files.py)."""


@dataclass(frozen=True, slots=True)
class Source:
    """Data that can be read.

    Attributes:
        shown: what a person would call it.
        digest: names the content in a run's identity.
        records: reads it from the beginning, one record after the other.
    """

    shown: str
    digest: str
    records: Callable[[], Records]


@contextlib.contextmanager
def open_source(path: str, options: DataOptions) -> Iterator[Source]:
    """The data at `path`; what was fetched for it from an address is gone afterwards.

    Raises:
        RequestError: there is none, or it cannot be read.
    """
    if is_address(path):
        from qlora_core.remote import local_copy

        with local_copy(path) as local:
            yield on_disk(local, path, options)
        return
    if (hub := hub_dataset(path)) is not None:
        files, folder, digest = fetch_dataset(hub, options, INSTEAD)
        yield of_files(files, folder, hub.repo, digest)
        return
    yield on_disk(Path(path), path, options)


def on_disk(path: Path, shown: str, options: DataOptions) -> Source:
    """The data of a file or folder of this machine."""
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return arrow(path, shown, options)
        refuse(options, "a folder of files", ("config", "revision"))
        return of_files(files_of(path, options), path, shown)
    refuse(options, "a single file", ("split", "config", "files", "revision"))
    if not path.is_file():
        raise request_error("data.path", shown, "there is no such file", INSTEAD)
    if not os.access(path, os.R_OK):
        raise request_error("data.path", shown, "it may not be read", "Change its permissions")
    return Source(shown, file_digest(path), lambda: read_file(path, shown))


def refuse(options: DataOptions, kind: str, names: Sequence[str]) -> None:
    """Raise a RequestError for each of these options that is given: they mean nothing for this kind of data."""
    problems = [
        Problem(f"data.{name}", str(value), f"the data is {kind}, of which it says nothing", "Leave it out")
        for name in names
        if (value := getattr(options, name)) is not None
    ]
    if problems:
        raise RequestError(problems)


def of_files(files: Sequence[Path], folder: Path, shown: str, digest: str | None = None) -> Source:
    """Files of a folder as one source; each is named by where it lies in the folder."""

    def records() -> Records:
        for file in files:
            yield from read_file(file, f"{shown}/{file.relative_to(folder).as_posix()}")

    if digest is None:
        whole = hashlib.sha256()
        for file in files:
            whole.update(f"{file.relative_to(folder).as_posix()} {file_digest(file)}\n".encode())
        digest = whole.hexdigest()
    return Source(shown, digest, records)


def files_of(folder: Path, options: DataOptions) -> list[Path]:
    """The data files of a folder that belong to the asked split, in the order of their names.

    Where none names a split, all belong to train; where only some do, which ones are meant cannot be told.
    """
    split = options.wanted_split
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and kind_of(path.name)]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if options.files is not None:
        found = [path for path in found if fnmatch.fnmatch(path.relative_to(folder).as_posix(), options.files)]
    if not found:
        rule = f"the folder holds no data file{'' if options.files is None else f' that fits {options.files!r}'}"
        raise request_error("data.path", folder, rule, INSTEAD)
    splits = {path: split_of(path.relative_to(folder).as_posix()) for path in found}
    named = {split for split in splits.values() if split}
    if not named and split == "train":
        return found
    unnamed = [path.relative_to(folder).as_posix() for path in found if not splits[path]]
    if named and unnamed:
        more = f" and {len(unnamed) - 3} more" if len(unnamed) > 3 else ""
        rule = f"some of its files name a split and others do not: {', '.join(unnamed[:3])}{more}"
        raise request_error("data.path", folder, rule, "Name those that are meant with data.files, such as 'train*'")
    chosen = [path for path in found if splits[path] == split]
    if not chosen:
        rule = f"the folder has no file of that split; its files name {', '.join(sorted(named)) or 'none'}"
        raise request_error("data.split", split, rule, "Choose one of them, or name files with data.files")
    return chosen


def split_of(name: str) -> str:
    """The split that a file's name or the nearest of its folders' names tells; nothing where none does."""
    for part in reversed(name.lower().split("/")):
        words = set(re.split(r"[^a-z]+", part))
        for split, known in SPLITS.items():
            if words & set(known):
                return split
    return ""


def arrow(path: Path, shown: str, options: DataOptions) -> Source:
    """A dataset that `datasets` has saved to disk, mapped into memory."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # `datasets` raises whatever its parts do
        raise request_error("data.path", shown, f"it cannot be read as saved dataset: {first_line(error)}", INSTEAD)  # noqa: B904
    folder, nowhere = path, ("config", "files", "revision")
    if isinstance(dataset, datasets.DatasetDict):
        refuse(options, "a saved dataset", nowhere)
        split = options.wanted_split
        if split not in dataset:
            rule = f"the dataset has the splits {', '.join(dataset)}"
            raise request_error("data.split", split, rule, "Choose one of them")
        dataset, folder = dataset[split], path / split
    else:
        refuse(options, "a saved dataset without splits", ("split", *nowhere))
    dataset = dataset.with_format(None)  # the one that it was saved with may leave columns out

    def records() -> Records:
        for number, record in enumerate(dataset, start=1):
            yield f"{shown}, row {number}", dict(record)

    whole = hashlib.sha256()
    for file in sorted(folder.glob("*.arrow")):
        whole.update(file_digest(file).encode())
    return Source(shown, whole.hexdigest(), records)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
