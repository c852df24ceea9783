"""Two trainings timed against each other by turns: one goes on for some seconds while all of the other is stopped.

What else happens on a machine is another from minute to minute, by more than what one would measure. Between two turns
there is hardly time for that. Clocks go on for those that are stopped: what one does every minute, it does more often
for each step that counts.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.peers import last_words
from clusters.errors import RunFailed

POLL_SECONDS = 0.2
START_SECONDS = 300.0
"""A training that has not made its first steps after this has failed."""


class Training(NamedTuple):
    """How one is started.

    Attributes:
        events: where it tells of its steps while it runs, a line of JSON each.
    """

    argv: Sequence[str]
    events: Path
    environment: Mapping[str, str]


class Running:
    """A training and all processes below it, which can be stopped and told to go on."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        self._process = subprocess.Popen(
            training.argv, env=training.environment, stdout=subprocess.DEVNULL, stderr=self._printed
        )
        self._family: dict[int, psutil.Process] = {}

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._look_around()
        for process in self._family.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._printed.close()

    def turn(self, seconds: float) -> float | None:
        """Let it go on for so long; the mean seconds of the steps between the first and the last that ended meanwhile.

        None where fewer than two did.

        Raises:
            RunFailed: it has ended.
        """
        self._tell("resume")
        began = time.time()
        time.sleep(seconds)
        self._tell("suspend")
        told = [step["time"] for step in self._steps() if step["time"] >= began]
        return float(told[-1] - told[0]) / (len(told) - 1) if len(told) > 1 else None

    def warm_up(self, steps: int) -> None:
        """Let it make so many steps, and stop it.

        Raises:
            RunFailed: it has ended, or takes too long.
        """
        deadline = time.monotonic() + START_SECONDS
        while len(self._steps()) < steps:
            if time.monotonic() > deadline:
                raise self._failed(f"made no {steps} steps within {START_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
        self._tell("suspend")

    def _steps(self) -> list[dict[str, Any]]:
        """What it told of its steps so far."""
        if self._process.poll() is not None:
            raise self._failed(f"ended with {self._process.returncode} before it was timed")
        if not self._training.events.exists():
            return []
        lines = self._training.events.read_text(encoding="utf-8").splitlines(keepends=True)
        events = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in events if event["event"] == "step"]

    def _failed(self, how: str) -> RunFailed:
        """What became of it, with the last that it printed."""
        self._printed.seek(0)
        said = last_words(self._printed.read())
        return RunFailed(f"{shlex.join(self._training.argv[-4:])} {how}: {said}.", "Run it by itself to see why.")

    def _look_around(self) -> None:
        """Note its processes: when one is gone, nobody can say which it had started."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            self._family |= {each.pid: each for each in (process, *process.children(recursive=True))}

    def _tell(self, what: str) -> None:
        """Stop or resume every process."""
        self._look_around()
        for process in self._family.values():
            with suppress(psutil.NoSuchProcess):
                getattr(process, what)()


def by_turns(trainings: Mapping[str, Training], *, warm_up: int, turns: int, seconds: float) -> dict[str, list[float]]:
    """Mean seconds of a step, by training, of every turn; the order changes from turn to turn.

    Args:
        warm_up: first steps of each that do not count.
        seconds: of a turn. A turn in which one of them made no whole step is left out for all.

    Raises:
        RunFailed: one of them has ended before the last turn was over, or no turn had steps of all.
    """
    found: dict[str, list[float]] = {name: [] for name in trainings}
    with ExitStack() as stack:
        running: dict[str, Running] = {}
        for name, training in trainings.items():
            running[name] = stack.enter_context(Running(training))
            running[name].warm_up(warm_up)
        names = list(trainings)
        for _ in range(turns):
            taken = {name: running[name].turn(seconds) for name in names}
            if all(taken.values()):
                for name, mean in taken.items():
                    found[name].append(mean or 0.0)
            names.reverse()
    if not all(found.values()):
        raise RunFailed(f"No step was begun and over within {seconds:g} s.", "Give them longer turns.")
    return found
