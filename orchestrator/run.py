"""A run from its plan to its adapter: resume or start, supervise, record."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from clusters.errors import RequestError, RunFailed, request_error
from orchestrator import ledger
from orchestrator.history import ledger_path
from orchestrator.identity import check_same
from orchestrator.plans import Plan
from orchestrator.prepare import Prepared
from orchestrator.ray_runtime import check_reachable
from orchestrator.record import Attempt, RunRecord, load_record, new_id, now, save_record, versions
from orchestrator.supervisor import Interrupted, keep_events_until, run_attempt
from orchestrator.tracking import tracked
from orchestrator.worker import Order
from qlora_core.perplexity import perplexity
from qlora_core.training.card import CardFacts
from qlora_core.training.checkpoint import complete, load_facts
from qlora_core.training.examples import save_examples
from qlora_core.training.export import export_adapter, export_model


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


def free_output(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... where no run lies."""
    number, candidate = 1, folder
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


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
    if record is not None:
        check_same(record.identity, prepared.identity, output)
        if record.status == "complete" and result_folder(prepared, output).is_dir():
            return record, True
    display.planned(prepared)
    if not prepared.plan.fits and not force:
        raise RunFailed(
            "The plan does not fit, so nothing was started.", "Change what the plan shows, or pass --force."
        )
    # All that could make the request wrong is looked at before anything is written.
    resume = latest(output / "checkpoints")
    if resume is not None:
        check_resumable(resume, prepared)
    if prepared.spec.cluster != "auto":
        check_reachable(prepared.spec.cluster.address)
    with only_writer(output):
        record = open_record(prepared, record, output)
        run_to_end(prepared, record, resume, output, display)
    return record, False


def result_folder(prepared: Prepared, output: Path) -> Path:
    """Where the result of a run lies: an adapter, or with method full a model."""
    return output / ("model" if prepared.spec.recipe.method == "full" else "adapter")


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Hold the run's folder, so that no second process writes the same checkpoints.

    Raises:
        RequestError: another process holds it, or it cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock")
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


def run_to_end(prepared: Prepared, record: RunRecord, resume: Path | None, output: Path, display: Display) -> None:
    """One attempt, and whatever it comes to is in the record."""
    spec = prepared.spec
    start = load_facts(resume)["step"] if resume else 0
    if resume is not None:
        display.resuming(start, prepared.total_steps, resume)
    keep_events_until(output / "events.jsonl", start)
    record.attempts.append(Attempt(started=now(), from_step=start))
    record.status = "running"
    save(record, output, display)
    with tracked(prepared, record, output, display.note) as track:

        def on_event(event: Mapping[str, Any]) -> None:
            display.event(event)
            track(event)

        try:
            end = run_attempt(
                order_of(prepared, output, resume),
                address=None if spec.cluster == "auto" else spec.cluster.address,
                on_event=on_event,
            )
            finish(record, end, prepared, output)
        except BaseException as error:
            status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            reached = latest(output / "checkpoints")
            step = load_facts(reached)["step"] if reached else 0
            close_attempt(record, status, step, str(error) or type(error).__name__)
            save(record, output, display)
            raise
        save(record, output, display)


def open_record(prepared: Prepared, record: RunRecord | None, output: Path) -> RunRecord:
    """The run's record for a new attempt, and its folder with the encoded data."""
    plan = prepared.plan
    try:
        save_examples(prepared.train, output / "data" / "train.safetensors")
        save_examples(prepared.held_out, output / "data" / "eval.safetensors")
    except (OSError, SafetensorError) as error:
        raise unwritable(output, error if isinstance(error, OSError) else OSError(str(error))) from error
    fields: dict[str, Any] = {
        "plan": plan.to_json(),
        "predicted": predicted(plan),
        "data": {
            **dataclasses.asdict(prepared.data),
            "rows": len(prepared.layout.rows),
            "padding_percent": round(100 * prepared.layout.waste, 2),
        },
        "machine": {"kind": prepared.machine.kind, "name": prepared.machine.name},
        "versions": versions(),
    }
    if record is not None:
        return record.model_copy(update=fields)
    return RunRecord(
        id=new_id(), name=prepared.spec.name, identity=prepared.identity, total_steps=prepared.total_steps, **fields
    )


def predicted(plan: Plan) -> dict[str, Any]:
    """What a plan says of the fullest rank, to be held against what is measured."""
    gpu, step = plan.estimate.gpu, plan.verdict.step_time
    return {
        "allocated_bytes": gpu.allocated_bytes,
        "reserved_bytes": gpu.reserved_bytes,
        "peak_phase": gpu.peak_phase,
        "peak_moment": gpu.peak_moment,
        "phases": dataclasses.asdict(gpu.phases),
        # as the model says it, before any correction, which later runs would else correct again
        "step_seconds": None if step is None else step.seconds / step.correction,
    }


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
    except (OSError, sqlite3.Error) as error:
        # The ledger serves later plans; this run does not depend on it.
        display.note(f"The ledger {ledger_path()} was not updated: {error}.")


def latest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = complete(checkpoints)
    return found[max(found)] if found else None


def check_resumable(checkpoint: Path, prepared: Prepared) -> None:
    """Raise a RequestError for a checkpoint of another run, or one that lays the optimizer state out in another way."""
    facts = load_facts(checkpoint)
    check_same(facts["identity"], prepared.identity, checkpoint)
    for field in ("world_size", "zero_stage"):
        wanted, there = getattr(prepared.plan.strategy, field), facts[field]
        if wanted != there:
            raise request_error(
                f"strategy.{field}",
                wanted,
                f"the checkpoint {checkpoint} was written with {there}, and resuming with another is not built yet",
                f"Set strategy.{field} to {there}, or start anew beside it with --fresh",
            )


def order_of(prepared: Prepared, output: Path, resume: Path | None) -> Order:
    """What the workers are told."""
    spec, plan = prepared.spec, prepared.plan
    return Order(
        name=spec.name,
        model=str(prepared.base.folder),
        adapter=None if spec.adapter is None else Path(spec.adapter),
        recipe=spec.recipe,
        strategy=plan.strategy,
        compute_dtype=plan.target.compute_dtype,
        device=plan.target.device.kind,
        seed=spec.seed,
        total_steps=prepared.total_steps,
        save_every=spec.checkpoints.every_steps,
        eval_every=spec.evaluation.every_steps,
        keep=spec.checkpoints.keep,
        examples=output / "data",
        checkpoints=output / "checkpoints",
        events=output / "events.jsonl",
        stop_file=output / ".stop",
        resume_from=resume,
        rendezvous=output / ".rendezvous" if spec.cluster == "auto" else None,
        predicted=predicted(plan),
        facts={
            "plan": plan.digest,
            "zero_stage": plan.strategy.zero_stage,
            "identity": prepared.identity,
            "versions": versions(),
        },
    )


def close_attempt(record: RunRecord, status: Any, step: int, reason: str | None) -> None:
    """Note how the last attempt ended."""
    attempt = record.attempts[-1]
    attempt.ended, attempt.status, attempt.to_step, attempt.reason = now(), status, step, reason
    record.status = status


def finish(record: RunRecord, end: Mapping[str, Any], prepared: Prepared, output: Path) -> None:
    """Put what the workers measured and learned into the record, and export the result of a finished run."""
    close_attempt(record, "complete" if end["finished"] else "interrupted", end["step"], None)
    record.measured = merged_measurement(end, record.measured)
    if record.measured is not None:
        record.measured["step_seconds"] = step_seconds(output / "events.jsonl")
    record.results = {**end["context"], **perplexities(end["context"])}
    checkpoint = latest(output / "checkpoints")
    if not end["finished"] or checkpoint is None:
        return
    folder, facts = result_folder(prepared, output), card_facts(record, prepared)
    try:
        if prepared.spec.recipe.method == "full":
            export_model(checkpoint, folder, prepared.base.folder, facts)
            record.weights = str(folder)
        else:
            export_adapter(checkpoint, folder, facts)
            record.adapter = str(folder)
    except OSError as error:
        raise RunFailed(
            f"The result could not be written to {folder}: {error}.",
            "Put that right and start the same run again: the last checkpoint holds it.",
        ) from error


def perplexities(context: Mapping[str, Any]) -> dict[str, float]:
    """The exponentials of the evaluation losses, where there are any."""
    return {
        f"perplexity_{when}": perplexity(context[f"eval_{when}"])
        for when in ("before", "after")
        if context.get(f"eval_{when}") is not None
    }


def card_facts(record: RunRecord, prepared: Prepared) -> CardFacts:
    """What the result's card tells of its run."""
    return CardFacts(
        name=record.name,
        base=prepared.base.name,
        commit=prepared.base.commit,
        recipe=prepared.spec.recipe,
        compute_dtype=prepared.plan.target.compute_dtype,
        steps=record.total_steps,
        data_name=Path(prepared.spec.data.path).name,
        data=record.data,
        strategy=record.plan["strategy"],
        predicted=record.predicted,
        measured=record.measured,
        results=record.results,
        versions=record.versions,
    )


def step_seconds(events: Path) -> float | None:
    """The median time of a step, the first of the run left out, which warms up; None where no other was made."""
    seconds = [
        event["seconds"] for event in map(json.loads, events.read_text().splitlines()) if event["event"] == "step"
    ]
    return median(seconds[1:]) if len(seconds) > 1 else None


def merged_measurement(end: Mapping[str, Any], before: dict[str, Any] | None) -> dict[str, Any] | None:
    """The measured peaks of the fullest rank, and those of all ranks, over this attempt and the ones before.

    None where no attempt that could say so has trained a step.
    """
    ranks: list[dict[str, int]] = end["ranks"]
    if not any(rank["optimizer"] for rank in ranks):
        return before
    if before is not None and len(before["ranks"]) == len(ranks):
        ranks = [
            {key: max(value, old[key]) for key, value in new.items()}
            for new, old in zip(ranks, before["ranks"], strict=True)
        ]
    phases = {phase: max(rank[phase] for rank in ranks) for phase in ("after_load", "forward", "backward", "optimizer")}
    return {
        "allocated_bytes": max(phases.values()),
        "reserved_bytes": max(rank["reserved"] for rank in ranks),
        "allocated_is": end["allocated_is"],
        "phases": phases,
        "ranks": ranks,
    }
