"""The published figures as data: one row of a file in tests/data/measured, its units turned into bytes."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "data" / "measured" / "published.csv"
LATER = PUBLISHED.with_name("later.csv")
"""Rows that were looked up when the memory model was done."""

UNITS = {"GiB": 1024**3, "GiB (reported as 72840 MB)": 1024**3, "GiB (reported as 81076 MB)": 1024**3, "GB": 1000**3}
"""Bytes of each unit that the rows are given in."""


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One row, its words left as the document has them.

    Attributes:
        id: its name, which begins with the project's.
        source, model, method, quantization, double_quantization, rank, targets, optimizer, micro_batch, seq_len,
            checkpointing, attention, gpus, sharding, how_measured, notes: the columns.
        stated: the figure as it is written: a number, "fit" or "OOM".
        unit: of the number.
    """

    id: str
    source: str
    model: str
    method: str
    quantization: str
    double_quantization: str
    rank: str
    targets: str
    optimizer: str
    micro_batch: str
    seq_len: str
    checkpointing: str
    attention: str
    gpus: str
    sharding: str
    stated: str
    unit: str
    how_measured: str
    notes: str

    @property
    def measured_bytes(self) -> int:
        """The figure in bytes.

        Raises:
            ValueError: it is not a number.
        """
        return round(float(self.stated) * UNITS[self.unit])


@cache
def published_rows(path: Path = PUBLISHED) -> tuple[PublishedRow, ...]:
    """All rows, in the order of the file."""
    with path.open(newline="") as file:
        return tuple(
            PublishedRow(
                id=row["id"],
                source=row["source_url_or_repo_path"],
                model=row["model"],
                method=row["method"],
                quantization=row["quant"],
                double_quantization=row["double_quant"],
                rank=row["rank"],
                targets=row["targets"],
                optimizer=row["optimizer"],
                micro_batch=row["micro_batch"],
                seq_len=row["seq_len"],
                checkpointing=row["grad_ckpt"],
                attention=row["attn"],
                gpus=row["gpus"],
                sharding=row["sharding"],
                stated=row["peak_gb"],
                unit=row["unit"],
                how_measured=row["how_measured"],
                notes=row["notes"],
            )
            for row in csv.DictReader(file)
        )
