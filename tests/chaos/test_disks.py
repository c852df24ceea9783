"""What happens to a run's folder: a real small disk fills up, or a checkpoint is harmed between two starts."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from real_runs import TIMEOUT, Run, make_run
from strikes import Row, Rows

from qlora_core.training.manifest import complete, newest_valid

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.xdist_group("workers")]

STEPS = 200


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def new_run(tmp_path: Path, tiny_base: Path, conversations: Path) -> Callable[[Path], Run]:
    def make(output: Path) -> Run:
        tmp_path.mkdir(exist_ok=True)
        changes: dict[str, dict[str, Any]] = {
            "recipe": {"steps": STEPS},
            "checkpoints": {"every_steps": 10},
            "evaluation": {},
        }
        run = make_run(tmp_path, tiny_base, conversations, **changes)
        run.folder = output
        return run

    return make


def test_a_disk_that_fills_up_ends_the_run_clearly_and_it_goes_on_after_space_is_made(
    small_disk: Path, new_run: Callable[[Path], Run], rows: Rows
) -> None:
    run = new_run(small_disk / "out")
    process = run.start(f"output={run.folder}")
    run.wait_for_step(25, process)
    with (small_disk / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(os.urandom(4096))
        except OSError:
            pass
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1, output
    assert "Traceback" not in output
    assert "No space left" in output
    safe, skipped = newest_valid(run.folder / "checkpoints")
    assert safe is not None
    assert not [one for one in skipped if one.folder.name.startswith("step-")]
    (small_disk / "ballast").unlink()
    struck = time.time()
    code, output = run.finish(f"output={run.folder}")
    assert code == 0, output
    from_step = run.record["attempts"][-1]["from_step"]
    assert from_step == int(safe.name.removeprefix("step-"))
    first = next(event["time"] for event in run.events() if event.get("step") == from_step + 1)
    rows.add(Row("the disk is full, then has space again", True, run.done_twice(), first - struck))


def test_a_checkpoint_harmed_between_two_starts_is_passed_over_and_kept(
    tmp_path: Path, new_run: Callable[[Path], Run]
) -> None:
    run = new_run(tmp_path / "out")
    process = run.start()
    run.wait_for_step(35, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=TIMEOUT)
    last = max(complete(run.folder / "checkpoints").values())
    victim = last / "adapter" / "adapter_model.safetensors"
    os.truncate(victim, victim.stat().st_size // 2)
    code, output = run.finish()
    assert code == 0, output
    words = " ".join(output.split())
    assert f"The checkpoint {last.name} was passed over: adapter/adapter_model.safetensors has" in words
    assert (last.parent / f"{last.name}.damaged").is_dir()
    attempt = run.record["attempts"][-1]
    assert [one["checkpoint"] for one in attempt["skipped"]] == [last.name]
    assert attempt["from_step"] < int(last.name.removeprefix("step-"))
