"""`qlora-capacity ledger`: what all runs predicted and measured, as a table or as a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from clusters.cluster import Cluster, load_cluster
from clusters.errors import not_installed, request_error, without_secrets
from launch.report.words import echo, gib
from orchestrator.history import ledger_place
from orchestrator.ledger import device_seconds, faults, latest, own_cost, tokens_per_second
from qlora_core.files import replace_atomically

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

HOUR = 3600.0
SHOWN, ALL = 50, 2**31
"""Runs, where nobody says how many: on a screen, and in a file."""
PIPED_WIDTH = 220
"""Columns where there is no terminal: nothing is cut off."""
WIDEST = 10_000
"""Columns, in which any table has room."""
WORDS = 5
"""Columns of words; those after them have figures."""
GROUPS = (
    ("name", "model", "device"),
    ("started", "status"),
    ("predicted", "measured", "tokens/s"),
    ("faults", "hours", "cost"),
)
"""What stands below each other where the terminal is narrow: names first, then the figures."""

Row = dict[str, Any]


@click.command("ledger")
@click.option("--limit", type=click.IntRange(min=1), help="The latest so many runs.  [default: 50; with --export, all]")
@click.option("--model", help="Only runs of this model.")
@click.option("--device", help="Only runs on this GPU.")
@click.option(
    "--cluster",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A description with prices (docs/clusters.md): what the runs cost there.",
)
@click.option(
    "--export",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write all that is known into a .csv, .parquet or .json.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def ledger(
    limit: int | None,
    model: str | None,
    device: str | None,
    cluster: Path | None,
    export: Path | None,
    as_json: bool,
    debug: bool,
) -> int:
    """The runs of the ledger, the latest first: $QLORA_LEDGER, or the one in the user's application folder."""
    write = None if export is None else writer_of(export)
    prices = None if cluster is None else hourly(load_cluster(cluster), cluster)
    shown = SHOWN if export is None else ALL
    found = rows_of(shown if limit is None else limit, model, device, prices)
    if export is not None and write is not None:
        try:
            with replace_atomically(export) as temporary:
                write(found, temporary)
        except OSError as error:
            raise request_error("--export", export, f"it cannot be written: {error}", "Choose another file") from error
        click.echo(f"{len(found)} runs written to {export}.")
    elif as_json:
        click.echo(json.dumps(found, indent=2))
    elif found:
        show(found)
    else:
        click.echo(why_none(filtered=model is not None or device is not None))
    return 0


def rows_of(
    limit: int, model: str | None, device: str | None, prices: Mapping[str, tuple[float, str]] | None
) -> list[Row]:
    """The latest runs, each with its figures; bytes, seconds and tokens a second.

    Raises:
        RequestError: the ledger cannot be read.
    """
    place = ledger_place()
    if isinstance(place, Path) and not place.exists():
        return []
    try:
        return [row_of(*each, prices) for each in latest(place, limit, model, device)]
    except (OSError, KeyError, TypeError) as error:
        rule, remedy = f"it was not read: {error}", "Name another with QLORA_LEDGER, or put that right"
        raise request_error("QLORA_LEDGER", without_secrets(str(place)), rule, remedy) from error


def row_of(
    run: str, folder: str, status: str, record: Mapping[str, Any], prices: Mapping[str, tuple[float, str]] | None
) -> Row:
    """One run's figures; what it cost by `prices`, or without any by that of the cluster which it was planned for."""
    plan, predicted, measured = record["plan"], record["predicted"], record["measured"] or {}
    device = plan["estimate"]["gpu"]["name"]
    seconds = device_seconds(record)
    paid = own_cost(record)
    if prices is not None:
        per_hour, currency = prices.get(device, (None, None))
        paid = None if per_hour is None or currency is None else (per_hour * seconds / HOUR, currency)
    return {
        "run": run,
        "name": record["name"],
        "status": status,
        "started": record["attempts"][0]["started"] if record["attempts"] else None,
        "folder": folder,
        "model": plan["model"]["name"],
        "device": device,
        "workers": plan["strategy"]["world_size"],
        "plan": plan["digest"],
        "predicted_allocated_bytes": predicted["allocated_bytes"],
        "measured_allocated_bytes": measured.get("allocated_bytes"),
        "predicted_reserved_bytes": predicted.get("reserved_bytes"),
        "measured_reserved_bytes": measured.get("reserved_bytes"),
        "predicted_step_seconds": predicted.get("step_seconds"),
        "measured_step_seconds": measured.get("step_seconds"),
        "tokens_per_second": tokens_per_second(record),
        "attempts": len(record["attempts"]),
        "faults": faults(record),
        "device_seconds": seconds,
        "cost": None if paid is None else paid[0],
        "currency": None if paid is None else paid[1],
    }


def hourly(cluster: Cluster, path: Path) -> dict[str, tuple[float, str]]:
    """What an hour of one GPU costs, by its name; the cheapest pool's.

    Raises:
        RequestError: no pool has a price.
    """
    found: dict[str, tuple[float, str]] = {}
    for pool in cluster.pools:
        if pool.price_per_hour is not None and cluster.currency is not None:
            price = pool.price_per_hour / pool.gpus_per_node
            if pool.gpu.name not in found or price < found[pool.gpu.name][0]:
                found[pool.gpu.name] = (price, cluster.currency)
    if not found:
        raise request_error("--cluster", path, "no pool of it has a price", "Add price_per_hour and currency")
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def writer_of(path: Path) -> Callable[[Sequence[Row], Path], None]:
    """What writes rows into a file of this kind.

    Raises:
        RequestError: the name has none of the known endings, or a package is missing.
    """
    writers = {".csv": write_csv, ".parquet": write_parquet, ".json": write_rows_json}
    if path.suffix not in writers:
        raise request_error("--export", path, f"its name ends in none of {', '.join(writers)}", "Name it so")
    if path.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise not_installed("--export", path, ["pyarrow"]) from None
    return writers[path.suffix]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Comma-separated, with a header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["run"])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(rows: Sequence[Row], path: Path) -> None:
    """Apache Parquet."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def write_rows_json(rows: Sequence[Row], path: Path) -> None:
    """A list of objects."""
    path.write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")


# --- the terminal -----------------------------------------------------------------------------------------------------


def why_none(filtered: bool) -> str:
    """What is said where there is no run to show; `filtered`: only some were asked for."""
    place = ledger_place()
    if isinstance(place, Path) and not place.exists():
        return f"There is no ledger at {place} yet."
    return f"No run {'of that kind ' if filtered else ''}is in the ledger."


@dataclass(frozen=True, slots=True)
class Fitting:
    """A table with a run on each line, or where there is no room for it the one that has several lines for each."""

    wide: Table
    narrow: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        whole = console.measure(self.wide, options=options.update_width(WIDEST)).maximum
        yield self.wide if whole <= options.max_width else self.narrow


def show(rows: Sequence[Row]) -> None:
    """A table of the runs, of which there is one at least."""
    from rich.table import Table

    has_cost = any(row["cost"] is not None for row in rows)
    texts = [cells(row, has_cost) for row in rows]
    wide = Table(box=None)
    for number, title in enumerate(texts[0]):
        wide.add_column(title, no_wrap=True, justify="left" if number < WORDS else "right")
    narrow = Table(box=None, padding=(0, 2, 1, 0), pad_edge=False, show_header=False)
    groups = [[title for title in group if title in texts[0]] for group in GROUPS]
    for number in range(len(groups)):
        # names alone may be broken: a figure in two pieces is read as two
        narrow.add_column(no_wrap=number > 0, overflow="fold", justify="left" if number < 2 else "right")
    narrow.add_row(*map("\n".join, groups), style="bold")  # a row: heads of unlike heights stand at their bottom
    for text in texts:
        wide.add_row(*text.values())
        narrow.add_row(*("\n".join(text[title] for title in group) for group in groups))
    echo(Fitting(wide, narrow), piped_width=PIPED_WIDTH)


def cells(row: Row, has_cost: bool) -> dict[str, str]:
    """A run's texts by the titles of their columns."""
    kind = "reserved" if row["measured_reserved_bytes"] else "allocated"
    found = {
        "name": row["name"],
        "started": (row["started"] or "").replace("T", " ")[:16],
        "status": row["status"],
        "model": Path(row["model"]).name if Path(row["model"]).is_absolute() else row["model"],
        "device": f"{row['workers']} x {row['device']}",
        "predicted": in_gib(row[f"predicted_{kind}_bytes"]),
        "measured": in_gib(row[f"measured_{kind}_bytes"]),
        "tokens/s": "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
        "faults": str(row["faults"]),
        "hours": f"{row['device_seconds'] / HOUR:.2f}",
    }
    if has_cost:
        found["cost"] = "" if row["cost"] is None else f"{row['cost']:,.2f} {row['currency']}"
    return found


def in_gib(size: int | None) -> str:
    """A size, where it is known."""
    return "" if size is None else gib(size)
