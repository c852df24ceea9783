"""The run: each case predicted, then measured by a child process, in the time there is; the record after every row."""

from __future__ import annotations

import contextlib
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from benchmarks.gpu import predict
from benchmarks.gpu.job import Job
from benchmarks.gpu.matrix import Case
from benchmarks.gpu.tracer import Tracers
from qlora_core.files import write_json

ROOT = Path(__file__).parents[2]
SCHEMA_VERSION = 1
CHILD = (sys.executable, "-m", "benchmarks.gpu.child")
GRACE = 3.0
"""A case is stopped after this many times the time that it should take."""
TRACE_SECONDS = 60.0
"""A trace that is not there by then is recorded as missing, and the row measured without it."""

LOG_LINES = 15
"""The last of what a failed child printed, which its row keeps."""

Row = dict[str, Any]


class Record:
    """The JSON of a run, written whole after every change, so that an interruption loses nothing.

    What an earlier run of the same versions measured on the same kind of device is kept, where the file is there.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any]) -> None:
        self._out = out
        self._facts = facts
        self.rows = measured_before(out, facts)

    def has(self, case: Case) -> bool:
        """Whether this very case was measured."""
        asked = case.as_json()
        return any(row["status"] == "measured" and asked.items() <= row.items() for row in self.rows)

    def put(self, row: Row) -> None:
        """Add a row, in place of one of the same name."""
        self.rows = [other for other in self.rows if other["name"] != row["name"]] + [row]
        write_json(self._out, {"schema_version": SCHEMA_VERSION, **self._facts, "rows": self.rows})


def measured_before(out: Path, facts: Mapping[str, Any]) -> list[Row]:
    """The rows that a file of an earlier run measured, if that was of the same device and versions."""
    if not out.exists():
        return []
    before = json.loads(out.read_text(encoding="utf-8"))
    if identity(before) != identity({"schema_version": SCHEMA_VERSION, **facts}):
        return []
    return [row for row in before["rows"] if row["status"] == "measured"]


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two runs must have in common for their rows to stand in one file."""
    return (
        record["schema_version"],
        record.get("dry"),
        record.get("device", {}).get("name"),
        record.get("device", {}).get("driver"),
        record.get("versions"),
    )


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of a run. `minutes` count from when it is made."""

    minutes: float
    start: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the end, 0 after it."""
        return max(self.start + 60 * self.minutes - time.monotonic(), 0.0)


def run(
    cases: Sequence[Case], machine: Mapping[str, Any], record: Record, clock: Clock, tell: Callable[[Row], None]
) -> None:
    """Put every case into `record`: measured, or skipped or failed with the reason. `tell` sees each row as it ends.

    Those that the record has are not measured again.
    """
    cases = [case for case in cases if not record.has(case)]
    if not cases:
        return
    device = predict.device_of(machine)
    pace = 1.0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tracers = stack.enter_context(Tracers(cases, device, folder))
        children = stack.enter_context(contextlib.closing(waiting(CHILD, folder, len(cases))))
        for case in cases:
            formula = predict.by_formula(case, device)
            row: Row = {**case.as_json(), "compute_dtype": device.compute_dtype, "predicted": {"formula": formula}}
            should_take = pace * predict.seconds(case, machine)
            reason = predict.does_not_fit(formula, machine["free_bytes"]) or too_late(should_take, clock)
            if reason is not None:
                row.update(status="skipped", reason=reason)
            else:
                row["predicted"]["trace"] = tracers.answer(case, min(TRACE_SECONDS, clock.left))
                row["status"] = "predicted"
                record.put(row)
                began = time.monotonic()
                job = Job(case, device.compute_dtype, machine["kind"], machine["uuid"], folder / f"{case.name}.json")
                row = concluded(row, answer(next(children), job, min(GRACE * should_take + 30, clock.left)))
                row["seconds"] = round(time.monotonic() - began, 1)
                if row["status"] == "measured":
                    # half of the new, half of the old: one odd row must not decide for all
                    pace = pace * (1 + row["seconds"] / should_take) / 2
            record.put(row)
            tell(row)


def too_late(should_take: float, clock: Clock) -> str | None:
    """Why a case is not begun any more, or None."""
    if should_take <= clock.left:
        return None
    return f"it takes about {should_take:.0f} s, and {clock.left:.0f} s are left"


@dataclass(frozen=True, slots=True)
class Child:
    """A process that measures, and the file with what it printed."""

    process: subprocess.Popen[bytes]
    log: Path


def waiting(command: Sequence[str], folder: Path, most: int) -> Generator[Child]:
    """Up to `most` processes that load while the one before them measures. What still waits is ended at the end."""

    def start(number: int) -> Child:
        path = folder / f"child-{number}.log"
        with path.open("wb") as log:
            return Child(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log), path)

    spare = start(0)
    try:
        for number in range(1, most):
            child, spare = spare, start(number)
            yield child
        yield spare
    finally:
        spare.process.kill()
        spare.process.communicate()


def answer(child: Child, job: Job, limit: float) -> dict[str, Any]:
    """What a child says about a job: `measured`, or `failed` with the reason, whatever became of the child."""
    process = child.process
    try:
        process.communicate(pickle.dumps(job), timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped: it had not ended after {limit:.0f} s"}
    finally:
        process.kill()
        process.wait()
    if job.result.exists():
        said = cast(dict[str, Any], json.loads(job.result.read_text(encoding="utf-8")))
    elif process.returncode < 0:
        said = {"failed": f"its process was killed by signal {-process.returncode}"}
    else:
        said = {"failed": f"its process ended with exit code {process.returncode} and no answer"}
    if "failed" in said:
        said["log"] = child.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return said


def concluded(row: Row, said: Mapping[str, Any]) -> Row:
    """`row` with what its child said, and how far each prediction was from it."""
    if "failed" in said:
        return {**row, "status": "failed", "reason": said["failed"], "log": said.get("log", [])}
    errors = {
        estimator: predict.errors_percent(predicted, said["measured"])
        for estimator, predicted in row["predicted"].items()
        if "failed" not in predicted
    }
    return {**row, "status": "measured", "measured": said["measured"], "errors_percent": errors}
