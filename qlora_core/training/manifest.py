"""What makes a folder a checkpoint that can be trusted: a manifest with the hash of every file, written last.

``checkpoint.json`` names the files of its folder with size and SHA-256, beside the facts of the run (step, world size,
plan, versions), and carries a digest of itself. A folder without a valid one is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from clusters.errors import RunFailed
from qlora_core.files import write_json

FILE_NAME = "checkpoint.json"
FORMAT_VERSION = 2
FOLDER = re.compile(r"step-(\d{8})")
BEST = "best"
"""The copy of the checkpoint with the lowest evaluation loss."""
UNFINISHED = re.compile(r"\.(step-\d{8})\..*tmp")


class InvalidCheckpoint(Exception):
    """A folder is no checkpoint that can be trusted; its text says why."""


class File(BaseModel):
    """A file of a checkpoint, as it was written."""

    model_config = ConfigDict(strict=True)

    bytes: NonNegativeInt
    sha256: str


class Manifest(BaseModel):
    """What a manifest must hold; the rest of its fields is for people."""

    model_config = ConfigDict(strict=True)

    step: PositiveInt
    world_size: PositiveInt
    identity: dict[str, Any]
    scheduler: dict[str, Any]
    context: dict[str, Any]
    layout: dict[str, Any]
    files: dict[str, File]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A checkpoint that a resume passed over.

    Attributes:
        folder: where it lies now.
        reason: why, without a full stop.
    """

    folder: Path
    reason: str


def folder_name(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def rank_files(rank: int) -> tuple[str, str]:
    """The names of a rank's files: its optimizer state, and the plain numbers beside it."""
    return f"optimizer-{rank:05d}.safetensors", f"rank-{rank:05d}.json"


def complete(folder: Path) -> dict[int, Path]:
    """The folders that carry a checkpoint's name, by their step, ascending; whether they are valid is not looked at."""
    if not folder.is_dir():
        return {}
    found = {
        int(match[1]): path for path in folder.iterdir() if (match := FOLDER.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def described(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of files in `folder`, by their names relative to it."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in names}


def sha256(path: Path) -> str:
    """The hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of a folder whose files are all there."""
    fields = {"format_version": FORMAT_VERSION, **facts, "files": dict(sorted(files.items()))}
    write_json(folder / FILE_NAME, {**fields, "digest": digest(fields)})


def digest(fields: Mapping[str, Any]) -> str:
    """A hash of a manifest's fields, whatever their order."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The fields of a folder's manifest, which is whole; its files are not looked at.

    Raises:
        InvalidCheckpoint: there is none, or it is damaged.
        RunFailed: another version of this program wrote it.
    """
    try:
        stored: object = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidCheckpoint(f"{FILE_NAME} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"{FILE_NAME} cannot be read ({error})") from None
    if not isinstance(stored, dict):
        raise InvalidCheckpoint(f"{FILE_NAME} holds no object")
    fields = {key: value for key, value in stored.items() if key != "digest"}
    version, whole = fields.get("format_version"), stored.get("digest") == digest(fields)
    if type(version) is int and version != FORMAT_VERSION and (whole or "digest" not in stored):
        raise RunFailed(
            f"The checkpoint {folder} has format version {version}, this program reads {FORMAT_VERSION}.",
            "Resume with the version that wrote it, or start with --fresh.",
        )
    if not whole:
        raise InvalidCheckpoint(f"{FILE_NAME} was changed after it was written")
    check_shape(fields)
    return fields


def check_shape(fields: Mapping[str, Any]) -> None:
    """Raise an InvalidCheckpoint where a manifest lacks what a resume reads, or has it as something else."""
    try:
        listed = Manifest.model_validate(fields)
    except ValidationError as error:
        wrong = error.errors()[0]
        field = ".".join(map(str, wrong["loc"]))
        raise InvalidCheckpoint(f"{FILE_NAME} is wrong in {field}: {wrong['msg']}") from None
    # what a resume loads must be listed, for what is not listed is not looked at
    needed = (name for rank in range(listed.world_size) for name in rank_files(rank))
    missing = next((name for name in needed if name not in listed.files), None)
    if missing is not None:
        raise InvalidCheckpoint(f"{FILE_NAME} lists no {missing}")
    if not any(name.startswith(("adapter/", "model/")) and name.endswith(".safetensors") for name in listed.files):
        raise InvalidCheckpoint(f"{FILE_NAME} lists no weights")


def check(folder: Path, step: int | None = None) -> dict[str, Any]:
    """The fields of a checkpoint's manifest, after all its files were read and found as they were written.

    Args:
        step: that it must be of.

    Raises:
        InvalidCheckpoint: a file is missing, or is not what was written; it is of another step.
        RunFailed: another version of this program wrote it.
    """
    fields = read_manifest(folder)
    if step not in (None, fields["step"]):
        raise InvalidCheckpoint(f"its {FILE_NAME} is of step {fields['step']}")
    for name, wanted in fields["files"].items():
        path = inside(folder, name)
        try:
            size = path.stat().st_size
            if size != wanted["bytes"]:
                raise InvalidCheckpoint(f"{name} has {size} bytes instead of {wanted['bytes']}")
            if sha256(path) != wanted["sha256"]:
                raise InvalidCheckpoint(f"{name} is not what was written: its SHA-256 differs")
        except FileNotFoundError:
            raise InvalidCheckpoint(f"{name} is missing") from None
        except OSError as error:
            raise InvalidCheckpoint(f"{name} cannot be read ({error.strerror or error})") from None
    return fields


def inside(folder: Path, name: str) -> Path:
    """The file of that name in `folder`.

    Raises:
        InvalidCheckpoint: it leads out of the folder.
    """
    parts = PurePosixPath(name)
    try:
        leads_out = not (folder / name).resolve().is_relative_to(folder.resolve())
    except (ValueError, RuntimeError) as error:  # no name of a file, or a link to itself
        raise InvalidCheckpoint(f"{FILE_NAME} names {name!r}, which is no file: {error}") from None
    if parts.is_absolute() or ".." in parts.parts or leads_out:
        raise InvalidCheckpoint(f"{FILE_NAME} names {name!r}, which lies outside its folder")
    return folder / name


def newest_valid(checkpoints: Path) -> tuple[Path | None, list[Skipped]]:
    """The newest checkpoint that can be trusted, and what was newer and could not.

    Raises:
        RunFailed: another version of this program wrote one of them.
    """
    skipped = [
        Skipped(path, "it was not finished when its writer ended")
        for path in sorted(checkpoints.glob(".step-*tmp"), reverse=True)
        if UNFINISHED.fullmatch(path.name)
    ]
    for step, folder in reversed(complete(checkpoints).items()):
        try:
            check(folder, step)
        except InvalidCheckpoint as error:
            skipped.append(Skipped(folder, str(error)))
        else:
            return folder, skipped
    return None, skipped


def after_step(checkpoints: Path, step: int) -> Path | None:
    """The checkpoint after `step` steps, as the best or among the last few; None where none that is whole is there."""
    for folder in (checkpoints / BEST, checkpoints / folder_name(step)):
        with suppress(InvalidCheckpoint, RunFailed):
            check(folder, step)
            return folder
    return None


def is_best(folder: Path) -> bool:
    """Whether the copy beside a checkpoint that is kept as the best is one of it."""
    with suppress(InvalidCheckpoint, RunFailed):
        return bool(read_manifest(folder.with_name(BEST)) == read_manifest(folder))
    return False


def put_aside(skipped: Skipped) -> Path:
    """Rename an invalid checkpoint, so that it is in nobody's way and can still be looked at; remove a half one."""
    folder = skipped.folder
    if UNFINISHED.fullmatch(folder.name):
        shutil.rmtree(folder, ignore_errors=True)
        return folder
    number, aside = 1, folder.with_name(f"{folder.name}.damaged")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.damaged-{number}")
    return folder.rename(aside)


def retire(checkpoints: Path, keep: int) -> list[Path]:
    """Remove the oldest checkpoints, until the last `keep` valid ones stay. Returns those that were removed.

    They are read before: a newer one that cannot be trusted replaces none. One that is not valid is left alone.
    """
    valid = 0
    removed = []
    for step, folder in reversed(complete(checkpoints).items()):
        if valid >= keep:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
            continue
        try:
            check(folder, step)
        except (InvalidCheckpoint, RunFailed):
            continue
        valid += 1
    return removed


def load_facts(folder: Path) -> dict[str, Any]:
    """The fields of a checkpoint's manifest.

    Raises:
        RunFailed: it is damaged, or of another format.
    """
    try:
        return read_manifest(folder)
    except InvalidCheckpoint as error:
        raise damaged(folder, str(error)) from error


def damaged(folder: Path, reason: str) -> RunFailed:
    """The error of a checkpoint that cannot be read."""
    return RunFailed(
        f"The checkpoint {folder} is damaged: {reason}.",
        "Remove that folder: the same command then goes on from the one before, if there is one.",
    )
