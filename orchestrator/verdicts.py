"""Verdicts: whether a request fits on a device, how sure that is, how long a step takes, and how far it could go."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from clusters.gpu import GIB
from orchestrator.confidence import confidence, spread_of
from orchestrator.devices import rates, slowest_links
from orchestrator.history import NOTHING_MEASURED, History
from orchestrator.needs import paged_out
from orchestrator.plans import SURE, Target, Verdict
from qlora_core.architecture import ModelArchitecture
from qlora_core.memory.estimate import Estimate
from qlora_core.memory.formula import prepared
from qlora_core.recipe import Recipe
from qlora_core.step_time import StepTime, step_time
from qlora_core.strategy import Strategy

LARGEST_MICRO_BATCH = 4096
LONGEST_SEQ_LEN = 2**22


def verdict(
    architecture: ModelArchitecture,
    recipe: Recipe,
    strategy: Strategy,
    target: Target,
    needed: Estimate,
    history: History = NOTHING_MEASURED,
    host_usable_bytes: int | None = None,
) -> Verdict:
    """Whether it fits on `target`, with the largest micro-batch and the longest sequence that would."""
    gpu = needed.gpu
    sizes = prepared(architecture, recipe, strategy, target.device)
    context = target.device.context_bytes
    # runs are planned by the formula: how far it was off says nothing of another estimator
    ratios = history.memory_ratios(target, recipe, strategy) if needed.estimator == "formula" else ()
    sure = confidence(needed, context, target.usable_bytes, ratios)
    spread = spread_of(ratios)
    factor = 1 if spread is None else spread.middle

    def with_micro_batch(value: int) -> int:
        return math.ceil(sizes.reserved_bytes(value, recipe.seq_len) * factor) + context

    def with_seq_len(value: int) -> int:
        return math.ceil(sizes.reserved_bytes(strategy.micro_batch, value) * factor) + context

    def limit(size: Callable[[int], int], asked: int, most: int) -> int:
        return largest(size, target.usable_bytes, most, start=(asked, sure.expected_bytes))

    headroom = target.usable_bytes - sure.expected_bytes
    host_fits = None if host_usable_bytes is None else needed.host.most_bytes <= host_usable_bytes
    return Verdict(
        gpu=target.name,
        usable_bytes=target.usable_bytes,
        components=gpu.components,
        allocated_bytes=gpu.allocated_bytes,
        reserved_bytes=gpu.reserved_bytes,
        process_bytes=gpu.process_bytes,
        fits=headroom >= 0 and host_fits is not False,
        headroom_bytes=headroom,
        largest_micro_batch=limit(with_micro_batch, strategy.micro_batch, LARGEST_MICRO_BATCH),
        longest_seq_len=limit(with_seq_len, recipe.seq_len, LONGEST_SEQ_LEN),
        confidence=sure,
        step_time=time_of(architecture, recipe, strategy, [target], needed, history),
        host_fits=host_fits,
    )


def time_of(
    architecture: ModelArchitecture,
    recipe: Recipe,
    strategy: Strategy,
    targets: Sequence[Target],
    needed: Estimate,
    history: History = NOTHING_MEASURED,
) -> StepTime | None:
    """The time of a step on a group of GPUs, of which `needed` is the fullest, as runs there have corrected it.

    Where they are of several kinds, the slowest sets the pace. None where one's rates are not known.
    """
    if any(target.pool is None and target.device.kind == "cuda" for target in targets):
        return None
    moved = paged_out(needed, min(target.usable_bytes for target in targets))
    steps = [
        history.corrected(step_time(architecture, recipe, strategy, target.device, rate, moved), target)
        for target, rate in zip(targets, slowest_links([rates(target) for target in targets]), strict=True)
    ]
    return max(steps, key=lambda step: step.seconds)


def doubt(needed: Estimate, strategy: Strategy, target: Target, answer: Verdict) -> str | None:
    """Whether it hangs on how memory fragments if it fits, as a warning."""
    sure = answer.confidence
    if not 1 - SURE < sure.chance < SURE:
        return None
    exacter = needed.estimator == "formula" and not strategy.zero_stage
    more = ": --estimator played is more exact" if exacter else ""
    return (
        f"{target.name} has {target.usable_bytes / GIB:.2f} GiB usable, and the process needs "
        f"{sure.low_bytes / GIB:.2f} to {sure.high_bytes / GIB:.2f}, by how its memory fragments{more}"
    )


def largest(size: Callable[[int], int], usable: int, limit: int, start: tuple[int, int]) -> int:
    """The largest integer up to `limit` (or `start`'s) whose `size` is at most `usable`; 0 if not even 1's is.

    Sizes hardly ever fall (docs/planning.md) and grow almost linearly, so that a line through two of them leads there
    in a few evaluations where halving takes twenty; after each that does not halve the range, the range is halved.
    `start` is a value and its size, which is known.
    """
    low, high = (0, 0), (max(limit, start[0]) + 1, 0)  # what fits and what does not, each with its size; 0: unknown
    probe = start
    while True:
        before = high[0] - low[0]
        if probe[1] <= usable:
            low = probe
        else:
            high = probe
        gap = high[0] - low[0]
        if gap <= 1:
            return low[0]
        if low[0] == 0:
            value = 1
        elif low[0] == 1 and not high[1]:
            value = 2
        elif high[1] and gap > before // 2:
            value = low[0] + gap // 2
        else:
            (x, size_x), (y, size_y) = (low, high) if high[1] else ((1, size(1)), low)
            steps = (usable - low[1]) * (y - x) // (size_y - size_x) if size_y > size_x else gap
            value = min(low[0] + max(steps, 1), high[0] - 1)
        probe = value, size(value)
