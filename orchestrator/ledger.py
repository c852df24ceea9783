"""The ledger: one row per run, with what was predicted and what was measured.

It is a file of SQLite, or where a team shares one, a PostgreSQL by its URL.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clusters.errors import without_secrets
from orchestrator.history import NOTHING_MEASURED, History, MeasuredRun, RanOut, ledger_place

if TYPE_CHECKING:
    from orchestrator.record import RunRecord  # a pydantic model, which `qlora-plan` need not import to read a ledger

LATEST_RUNS = 500
"""More of the past says little about the next run."""
CONNECT_SECONDS = 10
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE IF NOT EXISTS runs (
            id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            folder TEXT NOT NULL,
            status TEXT NOT NULL,
            started TEXT NOT NULL,
            model TEXT NOT NULL,
            device TEXT NOT NULL,
            plan_digest TEXT NOT NULL,
            predicted_allocated_bytes BIGINT NOT NULL,
            measured_allocated_bytes BIGINT,
            record TEXT NOT NULL
        )
        """,
    ),
    (
        "ALTER TABLE runs ADD COLUMN tokens_per_second DOUBLE PRECISION",
        "ALTER TABLE runs ADD COLUMN faults INTEGER",
        "ALTER TABLE runs ADD COLUMN device_seconds DOUBLE PRECISION",
    ),
)
"""What makes each version of the schema from the one before, in SQLite and in PostgreSQL. Only ever added to."""
COLUMNS = (
    "id", "name", "folder", "status", "started", "model", "device", "plan_digest", "predicted_allocated_bytes",
    "measured_allocated_bytes", "record", "tokens_per_second", "faults", "device_seconds",
)  # fmt: skip
ENTER = (
    f"INSERT INTO runs ({', '.join(COLUMNS)}) VALUES ({', '.join(f':{name}' for name in COLUMNS)})"  # noqa: S608
    f" ON CONFLICT (id) DO UPDATE SET {', '.join(f'{name} = excluded.{name}' for name in COLUMNS[1:])}"
)
LATEST = (
    "SELECT id, folder, status, record FROM runs WHERE (CAST(:model AS TEXT) IS NULL OR model = :model"
    "   OR substr(model, length(model) - length(:model)) = '/' || :model)"
    " AND (CAST(:device AS TEXT) IS NULL OR device = :device) ORDER BY started DESC, id LIMIT :limit"
)


class Connection(Protocol):
    """A transaction in either of the databases; SQL has its values by name, as in ``:limit``."""

    def execute(self, sql: str, values: Mapping[str, Any] | None = None) -> list[Any]:
        """The rows of a statement; none where it has no result."""

    def version(self) -> int:
        """Of the schema; 0 where nothing was ever entered."""

    def set_version(self, version: int) -> None:
        """Note what the schema is now."""


class _Sqlite:
    """A `Connection` to a file."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, sql: str, values: Mapping[str, Any] | None = None) -> list[Any]:
        return self._connection.execute(sql, values or {}).fetchall()

    def version(self) -> int:
        return int(self._connection.execute("PRAGMA user_version").fetchone()[0])

    def set_version(self, version: int) -> None:
        self._connection.execute(f"PRAGMA user_version = {version}")


class _Postgres:
    """A `Connection` to a server, through SQLAlchemy."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def execute(self, sql: str, values: Mapping[str, Any] | None = None) -> list[Any]:
        from sqlalchemy import text

        result = self._connection.execute(text(sql), values or {})
        return list(result) if result.returns_rows else []

    def version(self) -> int:
        [[there]] = self.execute("SELECT to_regclass('ledger_version') IS NOT NULL")
        return self.execute("SELECT version FROM ledger_version")[0][0] if there else 0

    def set_version(self, version: int) -> None:
        self.execute("CREATE TABLE IF NOT EXISTS ledger_version (version INTEGER NOT NULL)")
        self.execute("DELETE FROM ledger_version")
        self.execute("INSERT INTO ledger_version VALUES (:version)", {"version": version})


@contextmanager
def open_ledger(place: Path | str, *, to_write: bool = True) -> Iterator[Connection]:
    """A transaction in a ledger; its schema is that of this version where it is written to.

    Args:
        place: the file of a SQLite, which is made if it does not exist, or the URL of a PostgreSQL.

    Raises:
        OSError: it cannot be opened, read or written, or was written by a later version.
    """
    shown = without_secrets(str(place))
    try:
        with _sqlite(place, to_write) if isinstance(place, Path) else _postgres(place, to_write) as connection:
            version = connection.version()
            if version > len(MIGRATIONS):
                raise OSError(f"{shown} was written by a later version (schema {version})")
            if to_write and version < len(MIGRATIONS):
                for statement in (each for migration in MIGRATIONS[version:] for each in migration):
                    connection.execute(statement)
                connection.set_version(len(MIGRATIONS))
            yield connection
    except sqlite3.Error as error:
        raise OSError(str(error)) from error


@contextmanager
def _sqlite(path: Path, to_write: bool) -> Iterator[Connection]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=30, isolation_level=None)) as connection:
        # the lock comes first: of two that both find an old schema one waits, and finds the new one
        connection.execute("BEGIN IMMEDIATE" if to_write else "BEGIN")
        try:
            yield _Sqlite(connection)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


@contextmanager
def _postgres(url: str, to_write: bool) -> Iterator[Connection]:
    try:
        import psycopg  # noqa: F401
        import sqlalchemy
    except ImportError as error:
        raise OSError(
            'a shared ledger needs packages that are not installed: in a checkout, pip install ".[ledger]"'
        ) from error
    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:  # a port that is no number
        raise OSError("it is no URL of a database: write postgresql://USER@HOST:PORT/DATABASE") from error
    try:
        # libpq reads the password, where the URL has none, from PGPASSWORD, PGPASSFILE or ~/.pgpass
        engine = sqlalchemy.create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            poolclass=sqlalchemy.NullPool,
            connect_args={"connect_timeout": CONNECT_SECONDS},
        )
        with engine.begin() as connection:
            if to_write:
                connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(hashtext('qlora ledger'))"))
            yield _Postgres(connection)
    except sqlalchemy.exc.SQLAlchemyError as error:
        reason = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
        raise OSError(without_secrets(" ".join(str(reason).split()))) from error


def enter(record: RunRecord, folder: Path, place: Path | str | None = None) -> None:
    """Put a run's row into the ledger, in place of its earlier one.

    Raises:
        OSError: the ledger cannot be written; the run itself is not harmed by that.
    """
    measured = record.measured or {}
    fields = record.model_dump(mode="json")
    row = {
        "id": record.id,
        "name": record.name,
        "folder": str(folder),
        "status": record.status,
        "started": record.attempts[0].started if record.attempts else "",
        "model": record.plan["model"]["name"],
        "device": record.plan["estimate"]["gpu"]["name"],
        "plan_digest": record.plan["digest"],
        "predicted_allocated_bytes": record.predicted["allocated_bytes"],
        "measured_allocated_bytes": measured.get("allocated_bytes"),
        "record": json.dumps(fields),
        "tokens_per_second": tokens_per_second(fields),
        "faults": faults(fields),
        "device_seconds": device_seconds(fields),
    }
    with open_ledger(ledger_place() if place is None else place) as connection:
        connection.execute(ENTER, row)


def tokens_per_second(record: Mapping[str, Any]) -> float | None:
    """Over all devices, without padding, of a step in the middle; None where it was not measured."""
    measured = record["measured"] or {}
    if measured.get("tokens_per_second"):
        return float(measured["tokens_per_second"])
    seconds = measured.get("step_seconds")  # an earlier version's record, by the most that a step can have
    return record["plan"]["recipe"]["tokens_per_step"] / seconds if seconds else None


def faults(record: Mapping[str, Any]) -> int:
    """Attempts that ended by a failure."""
    return sum(attempt.get("failure") is not None for attempt in record["attempts"])


def device_seconds(record: Mapping[str, Any]) -> float:
    """Seconds of all devices over all attempts that have ended."""
    total = 0.0
    for attempt in record["attempts"]:
        total += held_seconds(attempt) * attempt.get("strategy", {}).get("world_size", 1)
    return total


def held_seconds(attempt: Mapping[str, Any]) -> float:
    """For how long an attempt held its devices: not while it stood in Ray's queue; 0 where it has not ended."""
    if not attempt.get("ended"):
        return 0.0
    since = attempt.get("placed") or attempt["started"]  # records of earlier versions have the start alone
    return (datetime.fromisoformat(attempt["ended"]) - datetime.fromisoformat(since)).total_seconds()


def own_cost(record: Mapping[str, Any]) -> tuple[float, str] | None:
    """What the nodes of a run's attempts have cost, and in which currency; None where no attempt had a price."""
    priced = [one for one in record["attempts"] if one.get("price_per_hour") is not None and one.get("currency")]
    currencies = {one["currency"] for one in priced}
    if len(currencies) != 1:  # euros and dollars are not added up
        return None
    return sum(held_seconds(one) * one["price_per_hour"] / 3600 for one in priced), currencies.pop()


def known_history(tell: Callable[[str], None]) -> History:
    """What earlier runs measured; nothing, and a remark, where the ledger cannot be read."""
    place = ledger_place()
    if isinstance(place, Path) and not place.exists():
        return NOTHING_MEASURED
    try:
        return read_history(place)
    except OSError as error:
        shown = without_secrets(str(place))
        tell(f"The ledger {shown} was not read: {error}. The plan is not corrected by it.")
        return NOTHING_MEASURED


def latest(
    place: Path | str, limit: int, model: str | None = None, device: str | None = None
) -> list[tuple[str, str, str, dict[str, Any]]]:
    """The id, folder, status and record of the latest runs of a ledger, of a model and on a device where one is named.

    A model that is a folder goes by its own name, too, as the table shows it.

    Raises:
        OSError: it cannot be read.
    """
    with open_ledger(place, to_write=False) as connection:
        asked = {"limit": limit, "model": model, "device": device}
        rows = connection.execute(LATEST, asked) if connection.version() else []
    try:
        return [(run, folder, status, json.loads(record)) for run, folder, status, record in rows]
    except ValueError as error:
        raise OSError(f"it is no ledger that this version reads ({error})") from error


def read_history(place: Path | str) -> History:
    """The latest runs of a ledger: what the complete ones measured, and which plans ran out of memory.

    Raises:
        OSError: it is no ledger that this version reads.
    """
    found = [(status, record) for _, _, status, record in latest(place, LATEST_RUNS)]
    try:
        return History(
            runs=tuple(measured_run(record) for status, record in found if status == "complete"),
            ran_out=tuple(each for _, record in found for each in ran_out(record)),
        )
    except (KeyError, TypeError, ValueError) as error:
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
        time_ratio=time_ratio(predicted, measured),
    )


def time_ratio(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> float | None:
    """Of a position's time, since a step's rows may be shorter than those planned for.

    Padding takes as long as tokens do, and a plan knows of none. Of a token's time, or a step's, in older records.
    """
    pace = measured.get("positions_per_second") or measured.get("tokens_per_second")
    by_positions = ratio(predicted.get("tokens_per_second"), pace)
    return by_positions or ratio(measured.get("step_seconds"), predicted.get("step_seconds"))


def ratio(measured: float | None, predicted: float | None) -> float | None:
    """Measured over predicted, where there are both."""
    return measured / predicted if measured and predicted else None
