"""kill -9 of a random process of a run at a random moment, by seed: every run ends, and ends bit for bit the same."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from real_runs import TIMEOUT, Run, make_run
from strikes import Row, Rows

from qlora_core.training.manifest import newest_valid

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.xdist_group("workers")]

STEPS, EVERY = 200, 10
VICTIMS = ("worker", "raylet", "head", "attempt", "driver")
"""head: Ray's GCS server; attempt: the process that drives Ray; driver: the one that was started."""
SEEDS = 30


def victim(run: Run, kind: str, driver: int) -> psutil.Process | None:
    """The process to kill; None where there is none of that kind at the moment."""
    if kind == "driver":
        return psutil.Process(driver)
    if kind == "worker":
        workers = run.workers()
        return random.choice(workers) if workers else None
    for process in run.processes():
        try:
            name, words = process.name(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        wanted = {"raylet": name == "raylet", "head": name == "gcs_server", "attempt": "multiprocessing.spawn" in words}
        if wanted[kind]:
            return process
    return None


@dataclass(frozen=True)
class Whole:
    """A run that nothing happened to."""

    digest: str
    seconds: float


@pytest.fixture(scope="module")
def new_run(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, conversations: Path) -> Callable[[str], Run]:
    def make(name: str) -> Run:
        changes = {"recipe": {"steps": STEPS}, "checkpoints": {"every_steps": EVERY}, "evaluation": {}}
        return make_run(tmp_path_factory.mktemp(name), tiny_base, conversations, **changes)

    return make


@pytest.fixture(scope="module")
def whole(new_run: Callable[[str], Run]) -> Whole:
    run, started = new_run("whole"), time.monotonic()
    code, output = run.finish()
    assert code == 0, output
    return Whole(run.adapter_digest, time.monotonic() - started)


def strike(run: Run, seed: int, whole: Whole, rows: Rows) -> None:
    """Kill once, start again where the driver was the victim, and hold the end against an unharmed run's."""
    drawn = random.Random(seed)
    random.seed(seed)
    kind = VICTIMS[seed % len(VICTIMS)]
    process = run.start()
    if seed % 3:  # most in the midst of training, which is short beside the start
        run.wait_for_step(drawn.randrange(1, STEPS // 2), process)
    else:
        # or sooner, where the machine is faster than it was while nothing happened to the run
        struck_at = time.monotonic() + drawn.uniform(0.1, 0.9) * whole.seconds
        while time.monotonic() < struck_at and not run.has_done(STEPS - EVERY):
            time.sleep(0.1)
    while (target := victim(run, kind, process.pid)) is None and process.poll() is None:
        time.sleep(0.1)  # it does not exist yet
    assert target is not None, "the run was over before there was anything to kill"
    safe, _ = newest_valid(run.folder / "checkpoints")
    target.kill()
    struck = time.time()
    if kind == "driver":
        process.communicate()
        run.assert_nothing_is_left()
        process = run.start()
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert run.adapter_digest == whole.digest
    attempts = run.record["attempts"]
    if len(attempts) == 1:  # all was learned and saved when it was struck
        rows.add(Row(f"kill -9 of the {kind}", True, 0, None))
        return
    from_step = attempts[-1]["from_step"]
    assert from_step >= (int(safe.name.removeprefix("step-")) if safe else 0)
    again = [event["time"] for event in run.events() if event["event"] == "step" and event["step"] == from_step + 1]
    rows.add(
        Row(
            fault=f"kill -9 of the {kind}",
            survived=True,
            steps_lost=run.done_twice(),
            seconds=again[0] - struck if again and again[0] > struck else None,
        )
    )
    run.assert_nothing_is_left()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_killed_process_costs_no_more_than_the_steps_since_the_last_checkpoint(
    seed: int, new_run: Callable[[str], Run], whole: Whole, rows: Rows
) -> None:
    strike(new_run(f"struck-{seed}"), seed, whole, rows)
