"""Programs of others that ours is held against: from the package index, each in an environment of its own."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from clusters.errors import RunFailed

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".cache" / "peers"


QUIET = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
"""Environment variables with which a peer asks nothing of the network."""


def installed(
    name: str,
    version: str,
    options: Sequence[str] = (),
    *,
    ours: Sequence[str] | None = None,
    without: Sequence[str] = (),
) -> Path:
    """The environment of a distribution, made where it is not there, with our versions of what both use.

    Its folder's name has a digest of all that was asked for: where a version of ours changes, it is made anew.

    Args:
        options: of pip, or more to install.
        ours: of what our version is taken; None: of all. For a distribution that does not work with some of ours.
        without: what is taken out again.

    Raises:
        RunFailed: it cannot be installed.
    """
    constraints = ROOT / "constraints.txt"
    wanted = [f"{name}=={version}", *options, *(() if ours is None else pinned(ours))]
    held = constraints.read_text(encoding="utf-8") if ours is None else ""
    digest = hashlib.sha256("\n".join([*wanted, *without, held]).encode()).hexdigest()
    folder = PEERS / f"{name}-{version}-{digest[:8]}"
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        wanted += ["--constraint", str(constraints)] if ours is None else []
        pip = [str(folder / "bin" / "python"), "-m", "pip"]
        steps = [[sys.executable, "-m", "venv", str(folder)], [*pip, "install", "-q", *wanted]]
        steps += [[*pip, "uninstall", "-q", "-y", *without]] if without else []
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                reason = last_words(done.stderr)
                raise RunFailed(f"{name} {version} could not be installed: {reason}.", "It needs a package index.")
        (folder / "installed").touch()
    return folder


def versions_of(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The versions that an environment has of some distributions."""
    site = [str(each) for each in folder.glob("lib/python*/site-packages")]
    found = {one.name: one.version for one in metadata.distributions(path=site)}
    return {name: found[name] for name in names}


def run_to_end(argv: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
    """Run a process in `folder` to its end.

    Raises:
        RunFailed: it ended with another code than 0.
    """
    done = subprocess.run(argv, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        said = f"{' '.join(argv[:4])} ended with {done.returncode}: {last_words(done.stderr)}."
        raise RunFailed(said, "Run it by itself to see why.")


def last_words(printed: str) -> str:
    """The last line of what a process printed."""
    return (printed.strip().splitlines() or ["it said nothing"])[-1]


def pinned(names: Sequence[str]) -> list[str]:
    """What constraints.txt says of these distributions."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.partition("==")[0] in names]


def put_in_hub_cache(home: Path, model: str, config: str) -> None:
    """Lay a model's config.json where huggingface_hub looks for it with HF_HOME=`home`, as if it had been fetched."""
    commit = "0" * 40
    cache = home / "hub" / f"models--{model.replace('/', '--')}"
    (cache / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots" / commit / "config.json").write_text(config)
