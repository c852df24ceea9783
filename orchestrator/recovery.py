"""What follows a failure: from what happened to a decision, by rules that know no cluster.

`decide` is pure. Its rules are one table, `RULES`, from which docs/reliability.md is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from clusters.errors import Problem

Kind = Literal[
    "gpu memory",
    "host memory",
    "worker lost",
    "node lost",
    "preempted",
    "devices back",
    "no room",
    "hung",
    "storage",
    "disk full",
    "no rights",
    "data",
    "not finite",
    "user",
    "error",
]
"""What happened. "devices back": a run that goes on with fewer workers could have more again. "no room": the devices
are there, and others use them. "error": anything that no rule knows, which is a defect of the code or of a library."""
IN_ORDER: frozenset[Kind] = frozenset({"preempted", "devices back"})
"""The workers were asked to end, and left a checkpoint: nothing has failed."""
Action = Literal["retry", "replan", "shrink", "grow", "wait", "stop"]
"""The same plan again; a leaner plan; fewer workers; more; the same plan once what it needs is there again; the end."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How an attempt ended that did not reach the end of its run.

    Attributes:
        message: what was said, in a line.
        rank: the worker it began on, where that is known.
        remedy: what a person can do about it.
        details: a traceback, for --debug.
        measured: the peaks of that worker up to then: bytes by phase, and reserved.
        available: devices that there are, where their number was the reason.
        problems: the mistakes of a request that is wrong.
    """

    kind: Kind
    message: str
    rank: int | None = None
    remedy: str = ""
    details: str = ""
    measured: dict[str, int] = field(default_factory=dict)
    available: int | None = None
    problems: tuple[Problem, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As the run record has it; the traceback stays out."""
        return {
            "kind": self.kind,
            "message": self.message,
            "rank": self.rank,
            "measured": self.measured,
            "available": self.available,
        }


@dataclass(frozen=True, slots=True)
class Rule:
    """What follows one kind of failure.

    Attributes:
        action: what is done.
        why: the reason, as it is told.
        counted: how often in a row, without a checkpoint in between, is bounded by the specification's
            ``recovery.retries``.
        patience: by which `recovery.retries` is multiplied.
        seconds: before the first retry; doubled with each in a row.
        most_seconds: the longest pause.
    """

    action: Action
    why: str
    counted: bool = True
    patience: int = 1
    seconds: float = 0.0
    most_seconds: float = 0.0


RULES: dict[Kind, Rule] = {
    "gpu memory": Rule(
        "replan", "the same plan would run out again; a leaner one has the same tokens per step", counted=False
    ),
    "host memory": Rule("replan", "the same plan would run out again; a leaner one has the same tokens per step"),
    "worker lost": Rule("retry", "a process that dies says nothing about the plan", seconds=1, most_seconds=60),
    "node lost": Rule(
        # about two hours at three retries
        "wait",
        "its devices must come back, or others in their place",
        patience=10,
        seconds=5,
        most_seconds=300,
    ),
    "preempted": Rule("wait", "a checkpoint was written before the node went", counted=False),
    "devices back": Rule("grow", "the run was to have more workers, and a checkpoint was written", counted=False),
    "no room": Rule("stop", "others have used the devices for longer than recovery.wait_minutes"),
    "hung": Rule("retry", "no worker got on for longer than recovery.hang_minutes", seconds=1, most_seconds=60),
    "storage": Rule("retry", "storage that fails often comes back", seconds=5, most_seconds=300),
    "disk full": Rule("stop", "space comes from a person"),
    "no rights": Rule("stop", "rights come from a person"),
    "data": Rule("stop", "the same data would fail again"),
    "not finite": Rule("stop", "the same step would fail again"),
    "user": Rule("stop", "the request itself is wrong"),
    "error": Rule("stop", "the same code would fail again"),
}
assert tuple(RULES) == get_args(Kind)  # noqa: S101  # a kind without a rule is a defect of this file


@dataclass(frozen=True, slots=True)
class Limits:
    """What the specification allows.

    Attributes:
        retries: failures of one kind in a row, without a checkpoint in between, after which the run goes on.
        fewest_workers: so many are enough to go on with.
    """

    retries: int
    fewest_workers: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done after a failure.

    Attributes:
        seconds: to wait before it.
        reason: why, as a sentence without a full stop.
    """

    action: Action
    reason: str
    seconds: float = 0.0


def decide(failure: Failure, since: Sequence[Failure], limits: Limits, workers: int) -> Decision:
    """What follows `failure`.

    Args:
        since: the failures before it after which no further checkpoint was written, in their order.
        workers: of the plan that failed.
    """
    rule = RULES[failure.kind]
    before = sum(one.kind == failure.kind for one in since)
    if rule.action == "stop":
        return Decision("stop", rule.why)
    if limits.retries == 0:
        return Decision("stop", "recovery.retries is 0")
    if rule.counted and before >= limits.retries * rule.patience:
        times = "once" if before == 1 else f"{before} times"
        return Decision("stop", f"it was retried {times} without a checkpoint in between (recovery.retries)")
    seconds = min(rule.seconds * 2**before, rule.most_seconds)
    left = failure.available
    if failure.kind == "node lost" and left is not None and limits.fewest_workers <= left < workers:
        return Decision("shrink", f"{left} of {workers} devices are left, and {limits.fewest_workers} are enough")
    return Decision(rule.action, rule.why, seconds)
