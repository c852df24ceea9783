"""The documents: what they show is what the program prints, and what they link to is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import screens

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


SCREENS = [(document.name, *screen) for document in screens.DOCUMENTS for screen in screens.shown(document)]


@pytest.mark.parametrize(("document", "command", "shown"), SCREENS)
def test_what_a_document_shows_is_what_the_command_prints(document: str, command: str, shown: str) -> None:
    assert shown == screens.printed(command), f"make screens writes {document} anew"


def test_five_real_questions_are_shown() -> None:
    assert sum(document == "planning.md" for document, _, _ in SCREENS) >= 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_the_python_of_the_planning_guide_runs() -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "planning.md").read_text(), re.S)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    fits, allocated = printed.split()
    assert fits == "True"
    assert 38e9 < int(allocated) < 44e9  # the paper: 41 GB (QLoRA, section 1)


def test_the_specification_of_the_demo_and_of_the_readme_are_valid(tmp_path: Path) -> None:
    from orchestrator.spec import load_spec

    assert load_spec(ROOT / "examples" / "demo.yaml").name == "demo"
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "run.yaml").write_text("\n".join(line.removeprefix("   ") for line in text.splitlines()))
    assert load_spec(tmp_path / "run.yaml").recipe.rank == 64
