"""The rules of imports: downwards only, and a light planning half."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.ledger import open_ledger

ROOT = Path(__file__).parent.parent
FLOORS = ("clusters", "qlora_core", "orchestrator", "launch")
"""From the ground up."""
HEAVY = frozenset({"torch", "ray", "transformers", "deepspeed", "bitsandbytes", "peft", "numpy", "safetensors"})
HUB = frozenset({"huggingface_hub", "httpx2"})
"""What only a model by Hub id needs."""

PLANNING = (
    "clusters",
    "qlora_core/architecture.py",
    "qlora_core/catalogue.py",
    "qlora_core/checks.py",
    "qlora_core/data.py",
    "qlora_core/files.py",
    "qlora_core/huggingface",
    "qlora_core/recipe.py",
    "qlora_core/strategy.py",
    "qlora_core/targets.py",
    "qlora_core/memory",
    "qlora_core/step_time.py",
    "qlora_core/work.py",
    "orchestrator/__init__.py",
    "orchestrator/alternatives.py",
    "orchestrator/confidence.py",
    "orchestrator/devices.py",
    "orchestrator/discovery.py",
    "orchestrator/durations.py",
    "orchestrator/history.py",
    "orchestrator/nearest.py",
    "orchestrator/plans.py",
    "orchestrator/reasons.py",
    "orchestrator/rules.py",
    "orchestrator/question.py",
    "orchestrator/search.py",
    "orchestrator/space.py",
    "orchestrator/verdicts.py",
    "orchestrator/facade.py",
    "orchestrator/planner.py",
    "orchestrator/spec.py",
    "orchestrator/targets.py",
    "launch/command.py",
    "launch/listing.py",
    "launch/plan.py",
    "launch/devices.py",
    "launch/data.py",
    "launch/request.py",
    "launch/report/divided.py",
    "launch/report/explain.py",
    "launch/report/terminal.py",
    "launch/report/words.py",
)
"""What `qlora-plan` is made of, and the specification, which is read before torch is imported."""
MEASURING = tuple(
    f"qlora_core/memory/{name}.py" for name in ("autocast", "liger", "measure", "recorder", "loading", "trace")
)
"""The estimators that run real code."""


def files_of(*places: str) -> Iterator[Path]:
    for place in places:
        path = ROOT / place
        yield from [path] if path.is_file() else sorted(path.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """The modules that a file imports, anywhere in it, with their lines; not those for type checkers alone."""
    for node in walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module or "", node.lineno


def walk(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from walk(child)


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_point_downwards_only(floor: str) -> None:
    above = (*FLOORS[FLOORS.index(floor) + 1 :], "benchmarks")
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files_of(floor)
        for module, line in imports(path)
        if module.split(".")[0] in above
    ]
    assert not wrong


def test_every_package_is_on_a_floor() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests", "benchmarks"} == set(FLOORS)


def test_the_planning_half_imports_nothing_heavy() -> None:
    measuring = set(files_of(*(place for place in MEASURING if (ROOT / place).exists())))
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files_of(*PLANNING)
        if path not in measuring
        for module, line in imports(path)
        if module.split(".")[0] in HEAVY
    ]
    assert not wrong


def modules_after(statement: str) -> set[str]:
    """The top-level packages that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


RUN = """
import sys
from launch.plan import main
sys.argv = ["qlora-plan", "--model", "65b", "--gpus", "1", *{more}]
try:
    main()
except SystemExit as end:
    assert end.code == 0
"""


def test_importing_the_command_loads_neither_torch_nor_ray_nor_a_yaml_parser() -> None:
    assert not modules_after("import launch.plan") & (
        HEAVY | HUB | {"pydantic", "yaml", "rich", "psutil", "hypothesis"}
    )


def test_what_finds_a_cluster_loads_its_readers_only_where_it_reads() -> None:
    assert not modules_after("import orchestrator.discovery") & (HEAVY | HUB | {"pydantic", "yaml", "rich", "psutil"})


def test_a_plan_as_json_loads_neither_torch_nor_ray_nor_rich() -> None:
    assert not modules_after(RUN.format(more=["--json"])) & (HEAVY | HUB | {"pydantic", "rich", "psutil"})


def test_a_plan_on_the_terminal_loads_neither_torch_nor_ray_nor_what_asks_the_hub() -> None:
    assert not modules_after(RUN.format(more=["--explain"])) & (HEAVY | HUB | {"pydantic", "psutil", "logging"})


def test_a_plan_corrected_by_a_ledger_loads_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_LEDGER", str(tmp_path / "ledger.sqlite"))
    with open_ledger(tmp_path / "ledger.sqlite"):
        pass
    assert not modules_after(RUN.format(more=["--json"])) & (HEAVY | HUB | {"pydantic", "rich", "psutil"})


def test_a_wrong_specification_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: [")
    statement = f"""
import sys
from launch.train import main
sys.argv = ["qlora-train", {os.fspath(tmp_path / "run.yaml")!r}]
try:
    main()
except SystemExit as end:
    assert end.code == 2
"""
    assert not modules_after(statement) & HEAVY


@pytest.mark.parametrize(
    "statement", ["from orchestrator.attempt import import_ray; import_ray()", "import launch.jobs"]
)
def test_what_asks_ray_for_something_does_without_torch(statement: str) -> None:
    assert modules_after(statement) & HEAVY <= {"ray", "numpy", "safetensors"}


def test_a_tokenizer_is_loaded_without_what_models_need_and_models_can_be_afterwards(tiny_base: Path) -> None:
    load = f"""
from qlora_core.training.tokenizer import load_tokenizer
tokenizer = load_tokenizer({os.fspath(tiny_base)!r})
"""
    assert not modules_after(load) & {"accelerate", "peft", "bitsandbytes", "deepspeed"}
    run = f"""
import sys
assert "torch._dynamo" not in sys.modules
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({os.fspath(tiny_base)!r})
words = tokenizer("cat", return_tensors="pt")
assert model(**words).logits.isfinite().all()
assert type(tokenizer) is type(AutoTokenizer.from_pretrained({os.fspath(tiny_base)!r}))
"""
    assert "accelerate" in modules_after(load + run)
