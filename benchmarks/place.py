"""The place in a document that a benchmark writes: between two comments, of which the first names its command."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

END = "<!-- to here -->\n"


class Place(NamedTuple):
    """Where a command, such as "make speed", writes."""

    document: Path
    command: str

    def read(self) -> str:
        """What is there."""
        return self._parts()[1]

    def write(self, text: str) -> None:
        """Put `text` there."""
        before, _, after = self._parts()
        self.document.write_text(before + text + after, encoding="utf-8")

    def _parts(self) -> tuple[str, str, str]:
        begin = f"<!-- {self.command} writes from here -->\n"
        before, rest = self.document.read_text(encoding="utf-8").split(begin)
        there, _, after = rest.partition(END)
        return before + begin, there, END + after
