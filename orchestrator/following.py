"""How a run goes on after a failure: the decision, the plan that it leads to, and what a person is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from clusters.errors import RequestError, RunFailed
from clusters.gpu import GIB
from orchestrator.history import LEANER
from orchestrator.nearest import changes
from orchestrator.planner import divisors
from orchestrator.prepare import Prepared, leaner, leaner_on_host, resized
from orchestrator.question import Candidate
from orchestrator.record import RunRecord
from orchestrator.recovery import IN_ORDER, Decision, Failure, Limits, decide


class Following(NamedTuple):
    """How a run goes on: in so many seconds, with this plan."""

    prepared: Prepared
    seconds: float


def decided(
    failure: Failure, since: Sequence[Failure], prepared: Prepared, *, first: bool = False
) -> tuple[Decision, Prepared]:
    """What follows a failure, and the run as it then goes on.

    Args:
        first: it was the run's first attempt: what is not there then was not lost.
    """
    spec, workers = prepared.spec, prepared.plan.strategy.world_size
    limits = Limits(spec.recovery.retries, spec.recovery.min_workers or workers)
    decision = decide(failure, since, limits, workers)
    following: Prepared | None = prepared
    if first and decision.action == "wait" and failure.available is not None:
        return Decision("stop", "there have never been as many"), prepared
    if decision.action == "replan":
        needed, device = prepared.plan.estimate, prepared.plan.target.device
        if failure.kind == "host memory" and device.kind == "cuda":
            following = leaner_on_host(prepared, int(LEANER * needed.host.most_bytes))
        else:
            following = leaner(prepared, int(LEANER * needed.gpu.process_bytes))
        if following is None and failure.kind == "host memory":
            # what else runs on that host may have taken it
            reason = "no plan is leaner, but the host may have more free now"
            return dataclasses.replace(decision, action="retry", reason=reason), prepared
    elif decision.action in ("shrink", "grow"):
        following = resized(prepared, failure.available or 1)
    if following is None:
        return Decision("stop", "no plan for it is left"), prepared
    return decision, following


def more_workers(prepared: Prepared, record: RunRecord) -> tuple[int, ...]:
    """The numbers of workers that a run which goes on with fewer than it was to have could have again, ascending."""
    now_has, asked = prepared.plan.strategy.world_size, prepared.spec.strategy_request.world_size
    before = max(attempt.strategy.get("world_size", 0) for attempt in record.attempts)
    most = asked if isinstance(asked, int) else before
    sizes = [size for size in divisors(prepared.spec.recipe.sequences_per_step) if now_has < size <= most]
    return tuple(
        size for size in sizes if (found := resized(prepared, size)) and found.plan.strategy.world_size == size
    )


def told(failure: Failure, decision: Decision, before: Prepared, after: Prepared, step: int) -> str:
    """A failure and what follows, as a person is told."""
    on = "" if failure.rank is None or before.plan.strategy.world_size == 1 else f" on rank {failure.rank}"
    where = f"from step {step}" if step else "from the start"
    actions = {
        "retry": f"It goes on {where} with the same plan",
        "wait": f"It goes on {where} as soon as what it needs is there",
        "replan": f"It goes on {where} with a leaner plan: {difference(before, after)}",
        "shrink": f"It goes on {where} with fewer workers: {difference(before, after)}",
        "grow": f"It goes on {where} with more workers: {difference(before, after)}",
    }
    pause = f", in {decision.seconds:.0f} s" if decision.seconds else ""
    ended = "Stopped" if failure.kind in IN_ORDER else "Failed"
    return f"{ended} ({failure.kind}{on}): {failure.message.rstrip('.')}. {actions[decision.action]}{pause}."


def difference(before: Prepared, after: Prepared) -> str:
    """What another plan does differently, and what it needs."""
    old, new = (Candidate(each.plan.recipe, each.plan.strategy) for each in (before, after))
    changed = ", ".join(f"{one.field} {one.value} {one.reason}" for one in changes(old, new))
    needed, needs = before.plan.estimate, after.plan.estimate
    predicted = f"{needs.gpu.process_bytes / GIB:.2f} GiB predicted instead of {needed.gpu.process_bytes / GIB:.2f}"
    if after.plan.target.device.kind == "cuda" and needs.host.most_bytes < needed.host.most_bytes:
        hosts = f"{needs.host.most_bytes / GIB:.2f} instead of {needed.host.most_bytes / GIB:.2f}"
        predicted += f", and on the host {hosts}"
    return f"{changed}; {predicted}"


def given_up(failure: Failure, decision: Decision, record: RunRecord) -> RunFailed | RequestError:
    """The error of a run that ends here."""
    if failure.kind == "user":
        return RequestError(failure.problems) if failure.problems else RunFailed(failure.message, failure.remedy)
    tried = len(record.attempts)
    tries = f"It was tried {tried} times;" if tried > 1 else "It was not tried again:"
    remedy = failure.remedy or (
        "The same command goes on from the last checkpoint, if there is one. --debug shows the traceback."
    )
    on = "A worker failed" if failure.rank is None else f"Rank {failure.rank} failed"
    what = failure.message if failure.remedy else f"{on} ({failure.kind}): {failure.message}"
    return RunFailed(f"{what.rstrip('.')}. {tries} {decision.reason}.", remedy)


class WorkerTraceback(Exception):
    """The traceback of a worker, which --debug shows."""
