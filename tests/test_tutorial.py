"""The tutorial, followed word by word in an empty folder: its files are saved as it says, its commands run in order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"
BLOCK = re.compile(r"```(python|yaml|console)\n(.*?)```", re.S)
SHOWN = re.compile(r"```text\n(.*?)```", re.S)
NAMED = re.compile(r"Save\s+this\s+as\s+`([\w.]+)`")


def steps() -> Iterator[tuple[str, str]]:
    """("save NAME", text) and ("run", command), in the order of the page."""
    text, last = TUTORIAL.read_text(), 0
    for block in BLOCK.finditer(text):
        if block[1] == "console":
            yield from (("run", line.removeprefix("$ ")) for line in block[2].splitlines())
        else:
            yield f"save {NAMED.findall(text[last : block.start()])[-1]}", block[2]
        last = block.end()


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_who_follows_the_tutorial_has_an_adapter_that_answers(tmp_path: Path) -> None:
    environment = {**os.environ, "QLORA_LEDGER": str(tmp_path / "ledger.sqlite")}
    printed: dict[str, str] = {}
    for what, text in steps():
        if what != "run":
            (tmp_path / what.removeprefix("save ")).write_text(text)
            continue
        name, *arguments = shlex.split(text)
        program = sys.executable if name == "python" else str(Path(sys.executable).with_name(name))
        done = subprocess.run(
            [program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{text}: {done.stdout}{done.stderr}"
        printed.setdefault(text, done.stdout)  # of a command that stands twice, what it did the first time
    assert "FITS" in printed["qlora-train run.yaml --dry-run"]
    if "bfloat16: " in printed["qlora-train run.yaml --dry-run"]:  # as where the page's figures are from
        said = [line.rstrip() for line in printed["qlora-train run.yaml"].splitlines()]
        shown = "".join(SHOWN.findall(TUTORIAL.read_text()))
        figures = [line for line in shown.splitlines() if "MiB" in line]
        assert len(figures) == 2
        assert [line for line in figures if line not in said] == []
    assert printed["python ask.py"].strip() == "In the cellar."
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    assert (tmp_path / "merged" / "config.json").is_file()
