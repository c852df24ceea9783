"""The specification of what is shipped: the wheel, the pins, and a planning half that runs anywhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = {"clusters", "launch", "orchestrator", "qlora_core"}
COMMANDS = {"qlora-capacity", "qlora-plan", "qlora-submit", "qlora-train"}
POSIX_ONLY = {"fcntl", "grp", "pwd", "resource", "termios"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as a user gets it, built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def planner_only(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel and its base dependencies only."""
    environment = tmp_path_factory.mktemp("planner") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip("--python", str(environment), "install", "--constraint", str(ROOT / "constraints.txt"), str(wheel))
    return environment / "bin"


def run(program: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def pip(*arguments: str) -> None:
    """Run pip, and show what it said where it fails."""
    done = run(Path(sys.executable), "-m", "pip", *arguments, folder=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def wheel_text(wheel: Path, ending: str) -> str:
    """The text of the wheel's only file whose name ends like this."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(ending))
        return archive.read(name).decode()


def metadata(wheel: Path) -> Message:
    return Parser().parsestr(wheel_text(wheel, ".dist-info/METADATA"))


def pins() -> dict[str, str]:
    """The version of each package in constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def planning_modules() -> Iterator[Path]:
    """The files of clusters, and launch/plan.py with all of ours that it imports, even inside functions."""
    waiting = [ROOT / "launch" / "plan.py", *(ROOT / "clusters").glob("**/*.py")]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        yield path
        for name in imported(path):
            package, *inner = name.split(".")
            if package not in PACKAGES:
                continue
            # Importing a.b.c runs a/__init__.py and a/b/__init__.py too.
            folders = [ROOT.joinpath(package, *inner[:depth]) for depth in range(len(inner) + 1)]
            files = {folder / "__init__.py" for folder in folders} | {folders[-1].with_suffix(".py")}
            found = {file for file in files if file.is_file()} - seen
            seen |= found
            waiting += found


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, except for annotations; ``from a import b`` may mean ``a`` or ``a.b``."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path}: imports here are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    top_level = {name.partition("/")[0] for name in wheel_names(wheel)}
    assert {name for name in top_level if not name.endswith(".dist-info")} == PACKAGES


def test_the_wheel_holds_every_module_and_catalogue_and_example(wheel: Path) -> None:
    sources = {path for package in PACKAGES for path in (ROOT / package).glob("**/*.py")}
    catalogues = {*(ROOT / "clusters").glob("**/*.yaml"), *(ROOT / "qlora_core" / "models").glob("*.json")}
    assert len(catalogues) > 50
    pages = set((ROOT / "launch").glob("**/*.j2"))
    assert {path.relative_to(ROOT).as_posix() for path in sources | catalogues | pages} <= wheel_names(wheel)


def test_the_wheel_has_four_commands(wheel: Path) -> None:
    scripts = ConfigParser()
    scripts.read_string(wheel_text(wheel, ".dist-info/entry_points.txt"))
    assert set(scripts["console_scripts"]) == COMMANDS


def test_training_is_an_extra(wheel: Path) -> None:
    about = metadata(wheel)
    assert about["Requires-Python"] == ">=3.11"
    extras = ["capacity", "gcs", "ledger", "liger", "report", "s3", "serve", "tasks", "train"]
    assert sorted(about.get_all("Provides-Extra", [])) == extras
    base = {Requirement(line).name for line in about.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert base == {"click", "huggingface-hub", "psutil", "pydantic", "pyyaml", "rich"}


def test_every_pin_is_exact() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    inexact = [line for line in lines if not re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[0-9]+(\.[0-9a-z]+)*", line)]
    assert not inexact  # torch==2.13.0+cpu would keep a GPU's build away


def test_every_declared_dependency_is_pinned_to_a_version_it_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(line for extra in project["project"]["optional-dependencies"].values() for line in extra),
        *project["dependency-groups"]["dev"],
    ]
    pinned = pins()
    for requirement in map(Requirement, declared):
        assert canonicalize_name(requirement.name) in pinned, requirement
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_the_planning_half_imports_no_posix_only_module() -> None:
    modules = list(planning_modules())
    assert ROOT / "qlora_core" / "memory" / "formula.py" in modules  # the walk follows imports
    offenders = {path.relative_to(ROOT).as_posix(): POSIX_ONLY & set(imported(path)) for path in modules}
    assert not {path: names for path, names in offenders.items() if names}


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_planning_needs_the_base_dependencies_only(planner_only: Path, tmp_path: Path) -> None:
    done = run(planner_only / "qlora-plan", "--model", "65b", "--gpus", "1", folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_training_without_its_extra_says_how_to_install_it(planner_only: Path, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("{name: x, model: base, data: {path: train.jsonl}, output: runs/x}")
    done = run(planner_only / "qlora-train", "x.yaml", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert 'pip install ".[train]"' in done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_a_trace_without_that_extra_says_so_too(planner_only: Path, tmp_path: Path) -> None:
    done = run(planner_only / "qlora-plan", "--model", "7b", "--gpu", "t4", "--estimator", "trace", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: --estimator: it needs packages that are not installed: ")
    assert 'pip install ".[train]"' in done.stderr
