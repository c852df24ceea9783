"""The run: each case predicted, then measured by a child process, in the time there is; the record after every row."""

from __future__ import annotations

import contextlib
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

from benchmarks.gpu import predict
from benchmarks.gpu.job import Job
from benchmarks.gpu.matrix import Case
from benchmarks.gpu.tracer import Tracers
from clusters.errors import request_error
from qlora_core.files import write_json
from qlora_core.recipe import Dtype

ROOT = Path(__file__).parents[2]
SCHEMA_VERSION = 1
CHILD = (sys.executable, "-m", "benchmarks.gpu.child")
RATES = (sys.executable, "-m", "benchmarks.gpu.rates")
GRACE = 3.0
"""A case is stopped after this many times the time that it should take."""
RATES_SECONDS = 90.0
"""The same of what the device achieves."""
TRACE_SECONDS = 60.0
"""A trace that is not there by then is recorded as missing, and the row measured without it."""

LOG_LINES = 15
"""The last of what a failed child printed, which its row keeps."""

Row = dict[str, Any]


class Record:
    """The JSON of a run, written whole after every change, so that an interruption loses nothing.

    What an earlier run of the same versions measured on the same kind of device is kept, where the file is there; a
    file of other ones is left as it is, and a name that is free is taken.

    Attributes:
        out: the file.
        sized_for: bytes that were free on the device at the first start, whose sizes are gone on with; None at that.

    Raises:
        RequestError: it cannot be read or written.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any]) -> None:
        try:
            self.out, earlier = measured_before(out, facts)
            self._facts = {**facts, **{what: earlier.get(what) for what in ("rates", "recovery")}}
            if "device" in earlier:
                self._facts["device"] = earlier["device"]
            self.sized_for: int | None = earlier.get("device", {}).get("free_bytes")
            self.rows: list[Row] = [row for row in earlier.get("rows", []) if row["status"] == "measured"]
            self._write()
        except OSError as error:
            rule = f"it cannot be read and written: {error.strerror or error}"
            raise request_error("--out", out, rule, "Name a file in a folder of your own") from error

    @property
    def rates(self) -> dict[str, Any] | None:
        """What `benchmarks.gpu.rates` said; None before it was asked, `failed` with the reason where it did not end."""
        return cast(dict[str, Any] | None, self._facts["rates"])

    def put_rates(self, said: Mapping[str, Any]) -> None:
        """Add what the device achieves."""
        self._facts["rates"] = said
        self._write()

    @property
    def recovery(self) -> dict[str, Any] | None:
        """What `benchmarks.gpu.recovery` said; None before it was asked."""
        return cast(dict[str, Any] | None, self._facts["recovery"])

    def put_recovery(self, said: Mapping[str, Any]) -> None:
        """Add what became of a run that memory ran out of."""
        self._facts["recovery"] = said
        self._write()

    def has(self, case: Case) -> bool:
        """Whether this very case was measured."""
        asked = case.as_json()
        return any(row["status"] == "measured" and asked.items() <= row.items() for row in self.rows)

    def put(self, row: Row) -> None:
        """Add a row, in place of one of the same name."""
        self.rows = [other for other in self.rows if other["name"] != row["name"]] + [row]
        self._write()

    def _write(self) -> None:
        write_json(self.out, {"schema_version": SCHEMA_VERSION, **self._facts, "rows": self.rows})


def measured_before(out: Path, facts: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The file of an earlier run of the same device and versions, and what it says; else a name that is free."""
    wanted, named, number = identity({"schema_version": SCHEMA_VERSION, **facts}), out, 1
    while out.exists():
        if identity(before := written(out)) == wanted:
            return out, before
        out = named.with_stem(f"{named.stem}-{(number := number + 1)}")
    return out, {}


def written(path: Path) -> dict[str, Any]:
    """The record in a file.

    Raises:
        RequestError: it holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        is_one = isinstance(record, dict) and isinstance(record.get("rows"), list)
    except ValueError:
        is_one = False
    if not is_one:
        rule = "it is no record of `make gpu`, which is a JSON object with rows"
        raise request_error("--out", path, rule, "Move it away, or name another file")
    return cast(dict[str, Any], record)


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two runs must have in common for their rows to stand in one file."""
    return (
        record.get("schema_version"),
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

    def less(self, seconds: float) -> Clock:
        """The same, which ends so much earlier."""
        return replace(self, minutes=self.minutes - seconds / 60)


def ask_rates(machine: Mapping[str, Any], clock: Clock) -> dict[str, Any]:
    """What the device achieves of each rate, said by a process of its own; else `failed` with the reason."""
    command = [*RATES, machine["kind"], predict.device_of(machine).compute_dtype]
    limit = min(RATES_SECONDS, clock.left)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped: it had not ended after {limit:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["it said nothing"])[-1]}
    return cast(dict[str, Any], json.loads(done.stdout.splitlines()[-1]))


def run(
    cases: Sequence[Case], machine: Mapping[str, Any], record: Record, clock: Clock, tell: Callable[[Row], None]
) -> None:
    """Put every case into `record`: measured, or skipped or failed with the reason. `tell` sees each row as it ends.

    Those that the record has are not measured again.
    """
    device = predict.device_of(machine)
    sized = predict.fitted(cases, device, record.sized_for or machine["free_bytes"])
    cases = [case for case in sized if not record.has(case)]
    if not cases:
        return
    pace = 1.0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tracers = stack.enter_context(Tracers([case for case in cases if case.is_modelled], device, folder))
        most = sum(case.strategy.world_size for case in cases)
        children = stack.enter_context(contextlib.closing(waiting(CHILD, folder, most)))
        for case in cases:
            formula = predict.by_formula(case, device)
            predicted = {"formula": formula} if case.is_modelled else {}
            row: Row = {**case.as_json(), "compute_dtype": device.compute_dtype, "predicted": predicted}
            should_take = pace * predict.seconds(case, machine)
            reason = (
                predict.too_few(case, machine)
                or predict.lacks_a_package(case)
                or predict.does_not_fit(formula, machine["free_bytes"])
                or too_late(should_take, clock)
            )
            if reason is not None:
                row.update(status="skipped", reason=reason)
            else:
                if case.is_modelled:
                    predicted["trace"] = tracers.answer(case, min(TRACE_SECONDS, clock.left))
                row["status"] = "predicted"
                record.put(row)
                began = time.monotonic()
                limit = formula["reserved_interval"][1] if case.limited else None
                jobs = list(jobs_of(case, device.compute_dtype, machine, folder, limit))
                said = answer([next(children) for _ in jobs], jobs, min(GRACE * should_take + 30, clock.left))
                row = concluded(row, said)
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


def jobs_of(
    case: Case, compute_dtype: Dtype, machine: Mapping[str, Any], folder: Path, limit: int | None
) -> Iterator[Job]:
    """The job of each rank of a case."""
    ranks = case.strategy.world_size
    rendezvous = folder / f"{case.name}.rendezvous" if ranks > 1 else None
    for rank in range(ranks):
        result = folder / f"{case.name}-{rank}.json"
        yield Job(case, compute_dtype, machine["kind"], machine["uuids"][rank], result, limit, rank, rendezvous)


def answer(children: Sequence[Child], jobs: Sequence[Job], limit: float) -> dict[str, Any]:
    """What the ranks' children say: `measured`, or `failed` with the reason, whatever became of them.

    Of several ranks it is what the one says that allocated most, with what each allocated. Where one fails, the others,
    who would wait for it, are stopped.
    """
    until = time.monotonic() + limit
    processes = [child.process for child in children]
    try:
        for process, job in zip(processes, jobs, strict=True):
            with contextlib.suppress(BrokenPipeError), cast(IO[bytes], process.stdin) as pipe:
                pipe.write(pickle.dumps(job))  # one that has ended takes nothing, and why is read below
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            if time.monotonic() > until:
                return {"failed": f"stopped: it had not ended after {limit:.0f} s"}
            time.sleep(0.02)
        ended = [rank for rank, code in enumerate(codes) if code is not None]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    every = [said_by(children[rank], jobs[rank]) for rank in ended]
    for rank, said in zip(ended, every, strict=True):
        if "failed" in said:
            return {**said, "failed": f"rank {rank}: {said['failed']}"} if len(jobs) > 1 else said
    largest = max(every, key=lambda said: said["measured"].get("allocated_bytes", 0))
    if len(jobs) > 1:
        allocated = [said["measured"]["allocated_bytes"] for said in every]
        largest["measured"]["allocated_bytes_by_rank"] = allocated
    return largest


def said_by(child: Child, job: Job) -> dict[str, Any]:
    """What an ended child says about its job."""
    process = child.process
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
