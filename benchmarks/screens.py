"""The screens in the documents: each command that is shown with what it prints is run again, and its output put in.

python -m benchmarks.screens
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "planning.md", ROOT / "docs" / "capacity.md")
COLUMNS = 100
BLOCK = re.compile(r"(?<=```console\n)\$ (?P<command>qlora-(?:plan|capacity) [^\n]+)\n(?P<printed>[^$`][^`]*)(?=```)")
"""A block with one command and what it prints; blocks of commands alone are left as they are."""


def shown(document: Path) -> Iterator[tuple[str, str]]:
    """The commands of a document, and what it says that they print."""
    for block in BLOCK.finditer(document.read_text()):
        yield block["command"], block["printed"]


def printed(command: str) -> str:
    """What a command prints on a terminal of COLUMNS, without colours; its warnings last."""
    name, *arguments = shlex.split(command)
    program = str(Path(sys.executable).with_name(name))
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "QLORA_LEDGER": str(ROOT / ".cache" / "no-ledger")}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment)
    return done.stdout + done.stderr


def main() -> None:
    """Write all documents anew."""
    for document in DOCUMENTS:
        text = BLOCK.sub(lambda block: f"$ {block['command']}\n{printed(block['command'])}", document.read_text())
        document.write_text(text)


if __name__ == "__main__":
    main()
