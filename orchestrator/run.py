"""A run from its plan to its adapter: resume or start, supervise, record."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from clusters.errors import RequestError, RunFailed, request_error, without_secrets
from orchestrator import ledger
from orchestrator.following import Following, WorkerTraceback, decided, given_up, more_workers, told
from orchestrator.history import ledger_place
from orchestrator.identity import check_same
from orchestrator.offsite import Offsite, offsite
from orchestrator.order import Order
from orchestrator.outcome import check_result, close, finish, predicted, result_folder
from orchestrator.prepare import Prepared
from orchestrator.question import place_of
from orchestrator.record import (
    REPORT_NAME,
    REPORT_PAGE_NAME,
    SAMPLES_NAME,
    SPECIFICATION_NAME,
    Attempt,
    RunRecord,
    load_record,
    new_id,
    now,
    read_events,
    save_record,
    save_specification,
    versions,
)
from orchestrator.recovery import IN_ORDER, Decision, Failure
from orchestrator.supervisor import (
    POLL_SECONDS,
    AttemptFailed,
    Interrupted,
    interrupts,
    keep_events_until,
    run_attempt,
)
from orchestrator.trackers import FILE_NAME as METRICS_NAME
from orchestrator.tracking import tracked
from qlora_core.files import write_json
from qlora_core.training.dataset.tokens import save_examples
from qlora_core.training.layout import histogram
from qlora_core.training.manifest import BEST, folder_name, is_best, load_facts, newest_valid, put_aside

LOCK = ".lock"
"""Held by who carries out a run; the file stays."""


class Display(Protocol):
    """What a person sees of a run."""

    def planned(self, prepared: Prepared) -> None:
        """The plan, before anything is started."""

    def resuming(self, step: int, total: int, checkpoint: Path) -> None:
        """The run goes on from a checkpoint."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Something happened in the workers."""

    def note(self, text: str) -> None:
        """A remark beside the run."""


def execute(prepared: Prepared, display: Display, *, force: bool = False) -> tuple[RunRecord, bool]:
    """Run what was prepared to its end; resume it where it stopped; do nothing where it is complete.

    Returns the run's record, and whether the run was complete already.

    Raises:
        RequestError: another run lies in the output folder, it cannot be written, or the run is under way already.
        RunFailed: the run failed, or the plan does not fit; the record says how far it came.
        Interrupted: it was stopped before there was anything to save.
    """
    output = Path(prepared.spec.output)
    record = load_record(output)
    if record is not None and (complete := finished(prepared, record)) is not None:
        return complete, True
    display.planned(prepared)
    if not prepared.plan.fits and not force:
        raise RunFailed(
            "The plan does not fit, so nothing was started.", "Change what the plan shows, or pass --force."
        )
    # All that could make the request wrong is looked at before anything is written.
    resume, _ = newest_valid(output / "checkpoints")
    if resume is not None:
        check_same(load_facts(resume)["identity"], prepared.identity, resume)
    elif record is None and not (output / LOCK).exists():  # which a run leaves that ended before it was recorded
        check_free(prepared, output)
    if prepared.spec.cluster != "auto":
        from orchestrator.ray_runtime import check_reachable  # here: it loads Ray

        check_reachable(prepared.spec.cluster.address)
    with only_writer(output), offsite(prepared.spec, display.note) as storage:
        if storage is not None and (fetched := storage.fetch(output / "checkpoints", prepared.identity)):
            display.note(f"The checkpoint {fetched.name} came from {prepared.spec.checkpoints.storage}.")
        record = open_record(prepared, record, output)
        run_to_end(prepared, record, output, display, storage)
        if storage is not None and record.status == "complete":
            storage.keep(result_folder(prepared, output))
    return record, False


def check_free(prepared: Prepared, output: Path) -> None:
    """Raise a RequestError where a run would replace files in its output folder that are no run's."""
    if output.resolve() == prepared.base.folder.resolve():
        remedy = "Choose another folder: a run's files would be among the model's"
        raise request_error("output", output, "it is the folder of the model", remedy)
    result = result_folder(prepared, output).name
    written = (result, SPECIFICATION_NAME, SAMPLES_NAME, REPORT_NAME, REPORT_PAGE_NAME, METRICS_NAME)
    if there := [name for name in written if (output / name).exists()]:
        rule = f"no run is recorded there, and a run would replace {', '.join(there)}"
        raise request_error("output", output, rule, "Choose another folder, or move them away")


def finished(prepared: Prepared, record: RunRecord) -> RunRecord | None:
    """The record of the output folder, which is given, if its run has come to its end and its result lies there.

    Raises:
        RequestError: another run lies there, or this one with another result than is asked for.
    """
    output = Path(prepared.spec.output)
    check_same(record.identity, prepared.identity, output)
    if record.status != "complete" or not (result := result_folder(prepared, output)).is_dir():
        return None
    check_result(record, prepared, output)
    # where it lies now: the run's folder may have been moved since
    return record.model_copy(update={"weights" if record.weights else "adapter": str(result)})


def save_if_possible(record: RunRecord, output: Path, display: Display) -> None:
    """Write the record of a run that has failed: why it has is to be told, also where that cannot be written down."""
    try:
        save(record, output, display)
    except RunFailed as error:
        display.note(str(error))


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Hold the run's folder, so that no second process writes the same checkpoints.

    Raises:
        RequestError: another process holds it, or it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise request_error(
            "output", output, "another process is carrying out this run", "Wait for it, or choose another output"
        ) from None
    except OSError as error:
        raise unwritable(output, error) from error
    try:
        yield
    finally:
        lock.release()


def unwritable(output: Path, error: OSError) -> RequestError:
    """The error of an output folder that cannot be written."""
    reason = f"it cannot be written: {error.strerror or error}"
    return request_error("output", output, reason, "Choose a folder that can, with free space")


def run_to_end(prepared: Prepared, record: RunRecord, output: Path, display: Display, storage: Offsite | None) -> None:
    """Attempts until one comes to the end, or nothing sensible is left; what each came to is in the record."""
    stop_file = output / ".stop"
    since: list[Failure] = []
    stop_file.unlink(missing_ok=True)
    with interrupts(stop_file) as interrupt:
        following: Following | None = Following(prepared, 0.0)
        while following is not None and paused(following.seconds, interrupt, stop_file):
            prepared = following.prepared
            begin_attempt(prepared, record, output, display)
            with tracked(prepared, record, output, display.note) as track:

                def on_event(event: Mapping[str, Any], track: Callable[..., None] = track) -> None:
                    display.event(event)
                    track(event)
                    if storage is not None and event["event"] == "checkpoint":
                        storage.keep(checkpoint := Path(event["path"]))
                        if is_best(checkpoint):
                            storage.keep(checkpoint.with_name(BEST))

                following = attempt_once(prepared, record, since, output, display, interrupt, on_event)
        if following is not None:  # somebody asked to stop while it waited
            record.status = "interrupted"
            save(record, output, display)


def attempt_once(
    prepared: Prepared,
    record: RunRecord,
    since: list[Failure],
    output: Path,
    display: Display,
    interrupt: threading.Event,
    on_event: Callable[[Mapping[str, Any]], None],
) -> Following | None:
    """Carry out the attempt that was begun; how the run goes on, or None where it has come to its end.

    Args:
        since: the failures since the last checkpoint; one more is noted there.
    """
    try:
        end = attempted(prepared, record, output, interrupt, on_event)
        finish(record, end, prepared, output)
        save(record, output, display)
        return None
    except AttemptFailed as error:
        failure = error.failure
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        close(record, "interrupted" if stopped else "failed", str(error) or type(error).__name__, output)
        save_if_possible(record, output, display)
        raise
    last = record.attempts[-1]
    step = close(record, "interrupted" if failure.kind in IN_ORDER else "failed", failure.message, output)
    if step > last.from_step:
        since.clear()
    decision, following = decided(failure, since, prepared, first=len(record.attempts) == 1)
    since.append(failure)
    last.failure, last.decision = failure.to_json(), dataclasses.asdict(decision)
    save_if_possible(record, output, display)
    if decision.action == "stop":
        raise given_up(failure, decision, record) from WorkerTraceback(failure.details)
    display.note(told(failure, decision, prepared, following, step))
    return Following(following, decision.seconds)


def begin_attempt(prepared: Prepared, record: RunRecord, output: Path, display: Display) -> None:
    """Find where to go on, and open an attempt from there in the record."""
    resume, skipped = newest_valid(output / "checkpoints")
    told_of = []
    for one in skipped:
        aside = put_aside(one)
        told_of.append({"checkpoint": one.folder.name, "reason": one.reason})
        kept = "" if aside == one.folder else f" It is kept as {aside.name}."
        display.note(f"The checkpoint {one.folder.name} was passed over: {one.reason}.{kept}")
    start = load_facts(resume)["step"] if resume else 0
    for earlier in record.attempts:
        if earlier.status == "running":
            close_abandoned(earlier, start, output / "events.jsonl")
    if resume is not None:
        display.resuming(start, prepared.total_steps, resume)
    keep_events_until(output / "events.jsonl", start)
    plan = prepared.plan
    record.plan, record.predicted = plan.to_json(), predicted(plan)
    record.attempts.append(
        Attempt(
            started=now(),
            from_step=start,
            strategy=dataclasses.asdict(plan.strategy),
            process_bytes=plan.estimate.gpu.process_bytes,
            price_per_hour=place_of(plan).price_per_hour,
            currency=prepared.machine.currency,
            skipped=told_of,
        )
    )
    record.status = "running"
    save(record, output, display)


def close_abandoned(attempt: Attempt, step: int, events: Path) -> None:
    """Note how an attempt ended whose process was gone before it could: it was alive when its workers last told of it.

    Args:
        step: of the last checkpoint.
        events: what they told, from before it is cut to `step`.
    """
    told = told_at(events)
    attempt.placed, attempt.ended = (told[0], told[-1]) if told else (attempt.started, attempt.started)
    attempt.status, attempt.to_step, attempt.reason = "failed", step, "the process that carried it out ended"
    attempt.failure = Failure("worker lost", attempt.reason).to_json()
    attempt.decision = dataclasses.asdict(Decision("retry", "the same run was started again"))


def told_at(events: Path) -> list[str]:
    """When the workers of the last attempt told something, UTC, ISO 8601; a phase is the first that they tell."""
    told = itertools.dropwhile(lambda event: event["event"] != "phase", read_events(events))
    moments = (datetime.fromtimestamp(event["time"], UTC) for event in told if "time" in event)
    return [moment.isoformat(timespec="seconds") for moment in moments]


def attempted(
    prepared: Prepared,
    record: RunRecord,
    output: Path,
    interrupt: threading.Event,
    on_event: Callable[[Mapping[str, Any]], None],
) -> dict[str, Any]:
    """Carry out the attempt that was begun: see `run_attempt`."""
    spec, attempt = prepared.spec, record.attempts[-1]
    start = attempt.from_step
    resume = output / "checkpoints" / folder_name(start) if start else None
    if not interrupt.is_set():
        (output / ".stop").unlink(missing_ok=True)  # of a preemption

    def pass_on(event: Mapping[str, Any]) -> None:
        if attempt.placed is None and "time" in event:  # what workers tell has a time, what is said of them has none
            attempt.placed = now()
        on_event(event)

    try:
        return run_attempt(
            order_of(prepared, output, resume, len(record.attempts), more_workers(prepared, record)),
            address=None if spec.cluster == "auto" else spec.cluster.address,
            interrupt=interrupt,
            hang_seconds=60 * spec.recovery.hang_minutes,
            on_event=pass_on,
        )
    finally:
        attempt.placed = attempt.placed or now()


def paused(seconds: float, interrupt: threading.Event, stop_file: Path) -> bool:
    """Wait; whether nobody asked to stop meanwhile."""
    deadline = time.monotonic() + seconds
    while not (interrupt.is_set() or (stop_file.exists() and seconds)):
        if time.monotonic() >= deadline:
            return True
        interrupt.wait(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))
    return False


def open_record(prepared: Prepared, record: RunRecord | None, output: Path) -> RunRecord:
    """The run's record for a new attempt, and its folder with the encoded data."""
    plan, specification = prepared.plan, prepared.spec.model_dump(mode="json", exclude_defaults=True)
    try:
        save_specification(specification, output)
        save_examples(prepared.train, output / "data" / "train.safetensors")
        save_examples(prepared.held_out, output / "data" / "eval.safetensors")
        write_json(output / SAMPLES_NAME, prepared.samples)
    except (OSError, SafetensorError) as error:
        raise unwritable(output, error if isinstance(error, OSError) else OSError(str(error))) from error
    fields: dict[str, Any] = {
        "specification": specification,
        "plan": plan.to_json(),
        "predicted": predicted(plan),
        "data": {
            **dataclasses.asdict(prepared.data),
            "datasets": prepared.datasets,
            "evaluated": None if prepared.evaluated is None else dataclasses.asdict(prepared.evaluated),
            "rows": len(prepared.layout.rows),
            "padding_percent": round(100 * prepared.layout.waste, 2),
            "row_lengths": dict(zip(("bin_tokens", "counts"), histogram(prepared.layout.lengths), strict=True)),
        },
        "machine": {"kind": prepared.machine.kind, "name": prepared.machine.name},
        "versions": versions(),
    }
    if record is not None:
        return record.model_copy(update=fields)
    return RunRecord(
        id=new_id(), name=prepared.spec.name, identity=prepared.identity, total_steps=prepared.total_steps, **fields
    )


def save(record: RunRecord, output: Path, display: Display) -> None:
    """Write the record beside the run and into the ledger."""
    try:
        save_record(record, output)
    except OSError as error:
        raise RunFailed(
            f"The run record in {output} could not be written: {error}.", "Free space on that disk."
        ) from error
    try:
        ledger.enter(record, output)
    except OSError as error:
        # The ledger serves later plans; this run does not depend on it.
        display.note(f"The ledger {without_secrets(str(ledger_place()))} was not updated: {error}.")


def order_of(
    prepared: Prepared, output: Path, resume: Path | None, attempt: int = 1, more_workers: tuple[int, ...] = ()
) -> Order:
    """What the workers are told."""
    spec, plan = prepared.spec, prepared.plan
    return Order(
        name=spec.name,
        model=str(prepared.base.folder),
        model_name=prepared.base.name,
        model_commit=prepared.base.commit,
        adapter=None if spec.adapter is None else Path(spec.adapter),
        recipe=spec.recipe,
        strategy=plan.strategy,
        compute_dtype=plan.target.compute_dtype,
        device=plan.target.device.kind,
        seed=spec.seed,
        total_steps=prepared.total_steps,
        save_every=spec.checkpoints.every_steps,
        eval_every=spec.evaluation.every_steps,
        patience=spec.evaluation.patience,
        result=spec.evaluation.result,
        keep=spec.checkpoints.keep,
        examples=output / "data",
        checkpoints=output / "checkpoints",
        events=output / "events.jsonl",
        alive=output / ".alive",
        stop_file=output / ".stop",
        resume_from=resume,
        attempt=attempt,
        more_workers=more_workers,
        wait_seconds=None if spec.recovery.wait_minutes is None else 60 * spec.recovery.wait_minutes,
        accelerator_type=prepared.machine.accelerator_type,
        rendezvous=output / ".rendezvous" if spec.cluster == "auto" else None,
        predicted=predicted(plan),
        facts={
            "plan": plan.digest,
            "strategy": dataclasses.asdict(plan.strategy),  # the rest of the plan is in the identity
            "identity": prepared.identity,
            "versions": versions(),
        },
    )
