"""The run record: what a run was, predicted, measured and learned. JSON beside the run, versioned."""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from clusters.errors import request_error
from qlora_core.files import replace_atomically, write_json

SAMPLES_NAME = "data/samples.json"
"""Of a run's folder: a few of its examples as text. Not in the record, which others may read in a ledger."""
FILE_NAME = "run.json"
SPECIFICATION_NAME = "specification.yaml"
REPORT_NAME, REPORT_PAGE_NAME = "report.md", "report.html"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "ray", "qlora-orchestrator")
Status = Literal["running", "complete", "interrupted", "failed"]


class Attempt(BaseModel):
    """One try inside a run."""

    model_config = ConfigDict(extra="forbid")

    started: str
    """UTC, ISO 8601."""
    from_step: int
    """The step of the checkpoint that it resumed from; 0 for a start."""
    placed: str | None = None
    """When its workers first told something, and so had their devices; when it ended, where they never did. Records of
    earlier versions do not have it."""
    price_per_hour: float | None = None
    """What its nodes cost, in `currency`; None where nobody said."""
    currency: str | None = None
    ended: str | None = None
    status: Status = "running"
    to_step: int | None = None
    """Optimizer steps done when it ended."""
    reason: str | None = None
    """Why it ended, where it did not run to its end."""
    strategy: dict[str, Any] = {}
    """How it was run: the plan's, as later attempts may have another."""
    process_bytes: int | None = None
    """What the plan said of the fullest rank's process."""
    failure: dict[str, Any] | None = None
    """What happened: kind, message, rank, and what was measured on that rank until then."""
    decision: dict[str, Any] | None = None
    """What followed: action, reason, seconds waited."""
    skipped: list[dict[str, str]] = []
    """Checkpoints that it did not resume from though they were newer, each with the reason."""


class RunRecord(BaseModel):
    """See the module's first line. Fields are only ever added; a change of meaning raises `schema_version`."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    id: str
    name: str
    status: Status = "running"
    identity: dict[str, Any]
    """What a resume must find unchanged: model, data, recipe, seed."""
    specification: dict[str, Any] = {}
    """What was asked for beyond the defaults, as a file says it; records of earlier versions do not have it."""
    total_steps: int
    plan: dict[str, Any]
    """The plan of the last attempt, as `qlora-plan --json` prints it."""
    data: dict[str, Any]
    """What became of the data."""
    predicted: dict[str, Any]
    """Bytes on the fullest rank, by phase and at the peak."""
    measured: dict[str, Any] | None = None
    """Bytes on the fullest rank, by phase and at the peak, and of each rank."""
    results: dict[str, Any] = {}
    """Evaluation loss and perplexity before and after, sample answers, the best checkpoint."""
    attempts: list[Attempt] = []
    adapter: str | None = None
    """The folder of the result, for peft."""
    weights: str | None = None
    """With method full, the folder of the result, for transformers."""
    machine: dict[str, str] = {}
    versions: dict[str, str] = {}


def now() -> str:
    """The time, UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_id() -> str:
    """A name for a run that no other run has."""
    return uuid.uuid4().hex


def versions() -> dict[str, str]:
    """Versions of what a run depends on; what is not installed is left out."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def load_record(folder: Path) -> RunRecord | None:
    """The record in a run's folder, or None where there is none.

    Raises:
        RequestError: there is one, and it is not ours or of a later version.
    """
    path = folder / FILE_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return RunRecord.model_validate(fields)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise request_error(
            "output",
            path,
            f"it is no run record that this version reads: {reason}",
            "Choose another output folder, or --fresh",
        ) from None


def save_specification(fields: Mapping[str, Any], folder: Path) -> None:
    """Write what was asked for as `qlora-train` reads it, whole or not at all."""
    with replace_atomically(folder / SPECIFICATION_NAME) as temporary:
        temporary.write_text(yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True), encoding="utf-8")


def save_record(record: RunRecord, folder: Path) -> None:
    """Write the record, whole or not at all."""
    write_json(folder / FILE_NAME, record.model_dump(mode="json"))


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; lines that are none are passed over."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events
