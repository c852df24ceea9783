"""What a run comes to: how its attempts ended, what was measured and learned, and the result in its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from clusters.errors import RunFailed, request_error
from orchestrator.plans import Plan
from orchestrator.prepare import Prepared
from orchestrator.record import Attempt, RunRecord, Status, now, read_events
from qlora_core.perplexity import perplexity
from qlora_core.training.card import CardFacts
from qlora_core.training.export import export_adapter, export_model
from qlora_core.training.manifest import after_step, folder_name, load_facts, newest_valid


def result_folder(prepared: Prepared, output: Path) -> Path:
    """Where the result of a run lies: an adapter, or with method full a model."""
    return output / ("model" if prepared.spec.recipe.method == "full" else "adapter")


def check_result(record: RunRecord, prepared: Prepared, output: Path) -> None:
    """Raise a RequestError where the result of a complete run is not of the checkpoint that is asked for."""
    asked, reached = prepared.spec.evaluation.result, record.attempts[-1].to_step
    best = record.results.get("best")
    wanted = best["step"] if asked == "best" and best is not None else reached
    given = record.results.get("result_step", reached)
    if wanted == given:
        return
    kept = None if wanted is None else after_step(output / "checkpoints", wanted)
    instead = f"take {kept / result_folder(prepared, output).name}" if kept else "start anew beside it with --fresh"
    rule = f"the run in {output} is complete, and its result is of step {given} where this would be of step {wanted}"
    raise request_error("evaluation.result", asked, rule, f"Restore what it was, or {instead}")


def predicted(plan: Plan) -> dict[str, Any]:
    """What a plan says of the fullest rank, to be held against what is measured."""
    gpu, step = plan.estimate.gpu, plan.verdict.step_time
    return {
        "allocated_bytes": gpu.allocated_bytes,
        "reserved_bytes": gpu.reserved_bytes,
        "peak_phase": gpu.peak_phase,
        "peak_moment": gpu.peak_moment,
        "phases": gpu.phases._asdict(),
        # as the model says it, before any correction, which later runs would else correct again
        "step_seconds": None if step is None else step.seconds / step.correction,
        "tokens_per_second": None if step is None else step.tokens_per_second * step.correction,
    }


def close(record: RunRecord, status: Status, reason: str | None, output: Path) -> int:
    """Note how the last attempt ended; returns the step of the last checkpoint."""
    reached, _ = newest_valid(output / "checkpoints")
    step: int = load_facts(reached)["step"] if reached else 0
    attempt = record.attempts[-1]
    attempt.ended, attempt.status, attempt.to_step, attempt.reason = now(), status, step, reason
    record.status = status
    return step


def finish(record: RunRecord, end: Mapping[str, Any], prepared: Prepared, output: Path) -> None:
    """Put what the workers measured and learned into the record, and export the result of a finished run."""
    status: Status = "complete" if end["finished"] else "interrupted"
    reached = close(record, status, None, output)
    if reached != end["step"]:
        raise RunFailed(
            f"The workers ended after step {end['step']}, and the last valid checkpoint is of step {reached}.",
            "Look at the storage of the output folder, and start the same run again.",
        )
    same_plan = len({json.dumps(one.strategy, sort_keys=True) for one in record.attempts}) == 1
    record.measured = merged_measurement(end, record.measured if same_plan else None)
    if record.measured is not None:
        record.measured |= steps_measured(output / "events.jsonl", record.attempts)
    record.results = {**end["context"], **perplexities(end["context"])}
    if not end["finished"]:
        return
    checkpoint = output / "checkpoints" / folder_name(reached)
    best = record.results.get("best")
    if prepared.spec.evaluation.result == "best" and best is not None and best["step"] != reached:
        if (found := after_step(output / "checkpoints", best["step"])) is None:
            raise RunFailed(
                f"The checkpoint after step {best['step']}, which had the lowest evaluation loss, is not there whole.",
                "Start the same run again with evaluation.result=last: the last checkpoint is there.",
            )
        checkpoint = found
        record.results |= {"eval_after": best["eval_loss"]}
        record.results |= {**perplexities(record.results), "result_step": best["step"]}
    folder = result_folder(prepared, output)
    facts = card_facts(record, prepared, record.results.get("result_step", reached))
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


def card_facts(record: RunRecord, prepared: Prepared, steps: int) -> CardFacts:
    """What the result's card tells of its run; the result is what was learned in `steps`."""
    step = prepared.plan.verdict.step_time
    return CardFacts(
        name=record.name,
        base=prepared.base.name,
        commit=prepared.base.commit,
        auto_class=prepared.plan.architecture.auto_class,
        recipe=prepared.spec.recipe,
        compute_dtype=prepared.plan.target.compute_dtype,
        steps=steps,
        chat_template=prepared.spec.data.chat_template,
        datasets=record.data["datasets"] or {Path(prepared.spec.data.learned[""].path).name: record.data},
        strategy=record.plan["strategy"],
        # of a step's time what was shown: the record's is without what earlier runs have corrected
        predicted={**record.predicted, "step_seconds": None if step is None else step.seconds},
        measured=record.measured,
        results=record.results,
        versions=record.versions,
    )


def steps_measured(events: Path, attempts: Sequence[Attempt]) -> dict[str, float | None]:
    """The median time of a step, and tokens a second, without padding and with it (positions); None where none says so.

    Of all attempts that were run as the last one was, each without its first step, which warms up.
    """
    steps = {event["step"]: event for event in read_events(events) if event["event"] == "step"}
    alike = []
    for number, attempt in enumerate(attempts):
        until = min((later.from_step for later in attempts[number + 1 :]), default=math.inf)
        own = [step for step in sorted(steps) if attempt.from_step < step <= until]
        if attempt.strategy == attempts[-1].strategy:
            alike += [steps[step] for step in own[1:]]
    told = [event for event in alike if "positions" in event]  # events of earlier versions do not tell them
    return {
        "step_seconds": median(event["seconds"] for event in alike) if alike else None,
        "tokens_per_second": median(event["tokens"] / event["seconds"] for event in alike) if alike else None,
        "positions_per_second": median(event["positions"] / event["seconds"] for event in told) if told else None,
    }


def merged_measurement(end: Mapping[str, Any], before: dict[str, Any] | None) -> dict[str, Any] | None:
    """The measured peaks of the fullest rank, and those of all ranks, over this attempt and the ones before.

    None where no attempt that could say so has trained a step.
    """
    ranks: list[dict[str, int]] = end["ranks"]
    if not any(rank["optimizer"] for rank in ranks):
        return before
    if before is not None and len(before["ranks"]) == len(ranks):
        ranks = [  # records of earlier versions lack some figures
            {key: max(value, old.get(key, 0)) for key, value in new.items()}
            for new, old in zip(ranks, before["ranks"], strict=True)
        ]
    phases = {phase: max(rank[phase] for rank in ranks) for phase in ("after_load", "forward", "backward", "optimizer")}
    return {
        "allocated_bytes": max(phases.values()),
        "reserved_bytes": max(rank["reserved"] for rank in ranks),
        "allocated_is": end["allocated_is"],
        "phases": phases,
        "weights": {kind: max(rank[f"{kind}_weights"] for rank in ranks) for kind in ("frozen", "trained")},
        "optimizer_state": max(rank["optimizer_state"] for rank in ranks),
        "ranks": ranks,
    }
