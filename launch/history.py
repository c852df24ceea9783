"""What earlier runs measured, for the commands that plan."""

from __future__ import annotations

from pathlib import Path

from launch import command
from orchestrator.history import NOTHING_MEASURED, History, ledger_place


def known() -> History:
    """What runs entered in the ledger measured."""
    place = ledger_place()
    if isinstance(place, Path) and not place.exists():
        return NOTHING_MEASURED
    from orchestrator.ledger import known_history  # SQLite and the records' form, where there is something to read

    return known_history(command.warn)
