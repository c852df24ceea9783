"""What was done to runs and what became of them, kept for the table of docs/reliability.md."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One fault.

    Attributes:
        fault: what was done.
        survived: the run came to its end.
        steps_lost: steps that were done twice.
        seconds: from the fault to the first step after it, or None where there was none to come.
    """

    fault: str
    survived: bool
    steps_lost: int
    seconds: float | None


class Rows:
    """Appends to the file that $CHAOS_ROWS names; to none where it is not set."""

    def add(self, row: Row) -> None:
        """Keep a row."""
        if path := os.environ.get("CHAOS_ROWS"):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
