"""The documents: what they show is what the program prints, and what they link to is there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pytest
from browsers import needs_chromium

from benchmarks import figures, screens
from benchmarks.reliability import page
from clusters.gpu import GIB, find_gpu
from launch.report.pictures.style import Picture, svg_of
from orchestrator.devices import gpu_target
from orchestrator.recovery import RULES
from qlora_core.architecture import ModelArchitecture
from qlora_core.catalogue import find_model
from qlora_core.memory import trace
from qlora_core.memory.formula import estimate
from qlora_core.recipe import Recipe
from qlora_core.strategy import Strategy

ROOT = Path(__file__).parents[1]
A100 = gpu_target(find_gpu("a100-80gb"), "auto", 1).device
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


SCREENS = [(document.name, *screen) for document in screens.DOCUMENTS for screen in screens.shown(document)]


@pytest.mark.parametrize(("document", "command", "shown"), SCREENS)
def test_what_a_document_shows_is_what_the_command_prints(document: str, command: str, shown: str) -> None:
    assert shown == screens.printed(command), f"make screens writes {document} anew"


def test_the_page_on_reliability_has_the_rules_of_the_code_and_the_faults_that_were_measured() -> None:
    assert page.DOCUMENT.read_text() == page.render(), "make chaos writes it anew"
    rows = [line for line in page.rules().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(RULES)


def test_what_the_page_on_accuracy_says_of_other_planners_was_measured() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "planners.json").read_text())["planners"][
        "fitcheck-llm 0.3.1"
    ]
    allocated, process = (found["errors"][figure]["mean"] for figure in ("allocated", "process"))
    said = f"is {allocated:.1f} % off on allocated memory and {process:.1f} % on the process."
    assert said in (ROOT / "docs" / "accuracy.md").read_text().replace("\n", " ")


def test_five_real_questions_are_shown() -> None:
    assert sum(document == "planning.md" for document, _, _ in SCREENS) >= 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_ci_fails_where_a_test_is_skipped_for_want_of_a_browser_or_a_permission() -> None:
    [pattern] = re.findall(r"grep -wE '(.*)' ", (ROOT / ".ci" / "run").read_text())
    reasons = [needs_chromium.kwargs["reason"], "needs the right to mount a small file system"]
    told = [f"SKIPPED [1] tests/test_one.py:1: {reason}" for reason in [*reasons, "root may write everywhere"]]
    found = subprocess.run(["grep", "-wE", pattern], input="\n".join(told), capture_output=True, text=True).stdout
    assert found.splitlines() == told[:2]


def test_the_site_is_built_and_every_link_and_anchor_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    commands = (tmp_path / "site" / "reference" / "commands.html").read_text()
    assert "Usage: qlora-submit status" in commands
    fields = (tmp_path / "site" / "reference" / "configuration.html").read_text()
    assert "Seeds the adapters, the split and the order of the data." in fields


def test_the_readme_holds_its_memory_against_others_as_it_was_measured() -> None:
    results = ROOT / "benchmarks" / "results"
    planners = json.loads((results / "planners.json").read_text())["planners"]
    on_t4 = [planners[name]["errors"]["allocated"]["mean"] for name in ("ours, formula", "ours, trace")]
    peer = min(one["errors"]["allocated"]["mean"] for name, one in planners.items() if can_be_nearest(name, one))
    rows = json.loads((results / "gpu-nvidia-h200-2026-11-27.json").read_text())["rows"]
    formula, traced, whole, whole_traced = (
        fmean(abs(row["errors_percent"][estimator][tier]) for row in rows if row["status"] == "measured")
        for tier in ("allocated", "process")
        for estimator in ("formula", "trace")
    )
    readme = (ROOT / "README.md").read_text()
    both = "{:.2f} % by the formula, {:.2f} % traced"
    assert f"{both.format(*on_t4)}; the nearest other planner {peer:.1f} %, with constants fitted" in readme
    assert f"{both.format(formula, traced)}; of the whole process {whole:.1f} % and {whole_traced:.1f} %" in readme


def test_make_bench_runs_all_that_the_benchmarks_page_lists_but_what_it_says_it_does_not() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text().partition("## Training")[0]
    listed = re.findall(r"`make (\w+)`", "".join(line for line in page.splitlines() if line.startswith("|")))
    assert "`make chaos`, `make scale`) is not in it" in page
    [bench] = re.findall(r"^bench: ([a-z ]+) ##", (ROOT / "Makefile").read_text(), re.M)
    assert set(bench.split()) == set(listed) - {"chaos", "scale", "gpu"}


@pytest.mark.parametrize("draw", [figures.levels, figures.methods, figures.paging], ids=lambda draw: draw.__name__)
def test_the_pictures_of_memory_are_those_that_are_drawn_now(draw: Callable[[], Picture]) -> None:
    picture = draw()
    assert svg_of(picture) == (figures.FOLDER / f"{picture.name}.svg").read_text()


def can_be_nearest(name: str, planner: dict[str, Any]) -> bool:
    return not name.startswith("ours") and planner["errors"]["allocated"] is not None


def test_the_python_of_the_planning_guide_runs() -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "planning.md").read_text(), re.S)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    fits, allocated = printed.split()
    assert fits == "True"
    assert 38e9 < int(allocated) < 44e9  # the paper: 41 GB (QLoRA, section 1)


class Dora(NamedTuple):
    """What docs/methods.md says of DoRA's memory, and of what it says it."""

    model: ModelArchitecture
    recipe: Recipe
    strategy: Strategy
    gib: str
    plain_gib: str
    traced_more: str


@pytest.fixture
def dora() -> Dora:
    [(model, rank, micro_batch, seq_len, *figures)] = re.findall(
        r"DoRA: (\S+), NF4, rank (\d+), (\d+) x (\d+) on an A100 is ([\d.]+) GiB in place of ([\d.]+) \(allocated, "
        r"formula; the trace says ([\d.]+) % more\)",
        methods(),
    )
    tokens = int(micro_batch) * int(seq_len)
    recipe = Recipe(rank=int(rank), seq_len=int(seq_len), tokens_per_step=tokens, use_dora=True, autocast=False)
    return Dora(find_model(model), recipe, Strategy(micro_batch=int(micro_batch)), *figures)


def test_what_peft_s_casts_take_under_autocast_is_what_the_formula_says() -> None:
    [(model, rank, micro_batch, seq_len, ours, plain)] = re.findall(
        r"16-bit LoRA of (\S+), rank (\d+), (\d+) x (\d+), all activations kept, on an A100 is ([\d.]+) GiB in place "
        r"of ([\d.]+) \(allocated, formula\)",
        methods(),
    )
    tokens = int(micro_batch) * int(seq_len)
    recipe = Recipe(method="lora", quantization="none", rank=int(rank), seq_len=int(seq_len), tokens_per_step=tokens)
    strategy = Strategy(micro_batch=int(micro_batch), gradient_checkpointing=False)
    for shown, device in ((ours, A100), (plain, dataclasses.replace(A100, plain_autocast=True))):
        assert shown == f"{estimate(find_model(model), recipe, strategy, device).gpu.allocated_bytes / GIB:.2f}"


def methods() -> str:
    """docs/methods.md in one line."""
    return " ".join((ROOT / "docs" / "methods.md").read_text().split())


def test_the_memory_of_dora_is_what_the_formula_says(dora: Dora) -> None:
    for recipe, shown in ((dora.recipe, dora.gib), (dataclasses.replace(dora.recipe, use_dora=False), dora.plain_gib)):
        said = estimate(dora.model, recipe, dora.strategy, A100).gpu.allocated_bytes
        assert shown == f"{said / GIB:.2f}"


@pytest.mark.grid  # it follows a model of 8 billion through all of its layers
def test_the_memory_of_dora_is_what_the_trace_says(dora: Dora) -> None:
    said, traced = (
        of(dora.model, dora.recipe, dora.strategy, A100).gpu.allocated_bytes for of in (estimate, trace.estimate)
    )
    assert dora.traced_more == f"{100 * (traced / said - 1):.1f}"


def test_the_specification_of_the_demo_and_of_the_readme_are_valid(tmp_path: Path) -> None:
    from orchestrator.spec import load_spec

    assert load_spec(ROOT / "examples" / "demo.yaml").name == "demo"
    [text] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "run.yaml").write_text("\n".join(line.removeprefix("   ") for line in text.splitlines()))
    assert load_spec(tmp_path / "run.yaml").recipe.rank == 64
