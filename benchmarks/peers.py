"""Programs of others that ours is held against: from the package index, each in an environment of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from clusters.errors import RunFailed

ROOT = Path(__file__).parents[1]
PEERS = ROOT / ".cache" / "peers"


def installed(name: str, version: str, options: Sequence[str] = ()) -> Path:
    """The environment of a distribution, made where it is not there, with our versions of what both use.

    Args:
        options: of pip.

    Raises:
        RunFailed: it cannot be installed.
    """
    folder = PEERS / f"{name}-{version}"
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        python = str(folder / "bin" / "python")
        wanted = [f"{name}=={version}", *options, "--constraint", str(ROOT / "constraints.txt")]
        for step in ([sys.executable, "-m", "venv", str(folder)], [python, "-m", "pip", "install", "-q", *wanted]):
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise RunFailed(f"{name} {version} could not be installed: {last}.", "It needs a package index.")
        (folder / "installed").touch()
    return folder


def put_in_hub_cache(home: Path, model: str, config: str) -> None:
    """Lay a model's config.json where huggingface_hub looks for it with HF_HOME=`home`, as if it had been fetched."""
    commit = "0" * 40
    cache = home / "hub" / f"models--{model.replace('/', '--')}"
    (cache / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text(commit)
    (cache / "snapshots" / commit / "config.json").write_text(config)
