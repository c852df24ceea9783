"""The ledger: one row per run in SQLite, with what was predicted and what was measured."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.history import NOTHING_MEASURED, History, MeasuredRun, RanOut, ledger_path

if TYPE_CHECKING:
    from orchestrator.record import RunRecord  # a pydantic model, which `qlora-plan` need not import to read a ledger

SCHEMA_VERSION = 1
LATEST_RUNS = 500
"""More of the past says little about the next run."""
TABLE = """
CREATE TABLE IF NOT EXISTS runs (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    folder TEXT NOT NULL,
    status TEXT NOT NULL,
    started TEXT NOT NULL,
    model TEXT NOT NULL,
    device TEXT NOT NULL,
    plan_digest TEXT NOT NULL,
    predicted_allocated_bytes INTEGER NOT NULL,
    measured_allocated_bytes INTEGER,
    record TEXT NOT NULL
)
"""


@contextmanager
def open_ledger(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to the ledger, made if it does not exist; commits at the end, closes always."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=30)) as connection, connection:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"{path} was written by a later version (schema {version})")
        connection.execute(TABLE)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        yield connection


def enter(record: RunRecord, folder: Path, path: Path | None = None) -> None:
    """Put a run's row into the ledger, in place of its earlier one.

    Raises:
        OSError, sqlite3.Error: the ledger cannot be written; the run itself is not harmed by that.
    """
    measured = record.measured or {}
    row = (
        record.id,
        record.name,
        str(folder),
        record.status,
        record.attempts[0].started if record.attempts else "",
        record.plan["model"]["name"],
        record.plan["estimate"]["gpu"]["name"],
        record.plan["digest"],
        record.predicted["allocated_bytes"],
        measured.get("allocated_bytes"),
        json.dumps(record.model_dump(mode="json")),
    )
    with open_ledger(path or ledger_path()) as connection:
        connection.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)


def known_history(tell: Callable[[str], None]) -> History:
    """What earlier runs measured; nothing, and a remark, where the ledger cannot be read."""
    path = ledger_path()
    if not path.exists():
        return NOTHING_MEASURED
    try:
        return read_history(path)
    except OSError as error:
        tell(f"The ledger {path} was not read: {error}. The plan is not corrected by it.")
        return NOTHING_MEASURED


def read_history(path: Path) -> History:
    """The latest runs of a ledger: what the complete ones measured, and which plans ran out of memory.

    Raises:
        OSError: it is no ledger that this version reads.
    """
    try:
        with open_ledger(path) as connection:
            rows = connection.execute(
                "SELECT status, record FROM runs ORDER BY started DESC LIMIT ?", (LATEST_RUNS,)
            ).fetchall()
        records = [(status, json.loads(record)) for status, record in rows]
        return History(
            runs=tuple(measured_run(record) for status, record in records if status == "complete"),
            ran_out=tuple(each for _, record in records for each in ran_out(record)),
        )
    except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
        raise OSError(f"it is no ledger that this version reads ({error})") from error


def ran_out(record: dict[str, Any]) -> Iterator[RanOut]:
    """The plans of a run's record that ran out of GPU memory."""
    plan = record["plan"]
    for attempt in record["attempts"]:
        failure, needed = attempt.get("failure"), attempt.get("process_bytes")
        if failure and failure["kind"] == "gpu memory" and needed:
            yield RanOut(
                gpu=plan["estimate"]["gpu"]["name"],
                model=plan["model"]["name"],
                recipe=plan["recipe"],
                process_bytes=needed,
                usable_bytes=plan["verdicts"][0]["usable_bytes"],
            )


def measured_run(record: dict[str, Any]) -> MeasuredRun:
    """A run's record as later plans compare themselves with it."""
    plan, predicted, measured = record["plan"], record["predicted"], record["measured"] or {}
    # on a CPU nothing is reserved: its tensors are what is predicted and measured
    memory = "reserved_bytes" if record["machine"].get("kind") == "cuda" else "allocated_bytes"
    return MeasuredRun(
        device=record["machine"].get("kind", ""),
        gpu=plan["estimate"]["gpu"]["name"],
        method=plan["recipe"]["method"],
        sharded=plan["strategy"]["zero_stage"] > 0,
        memory_ratio=ratio(measured.get(memory), predicted.get(memory)),
        time_ratio=ratio(measured.get("step_seconds"), predicted.get("step_seconds")),
    )


def ratio(measured: float | None, predicted: float | None) -> float | None:
    """Measured over predicted, where there are both."""
    return measured / predicted if measured and predicted else None
