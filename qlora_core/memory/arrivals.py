"""In which order threads bring weights onto a device while one thread quantizes them: transformers 5.0 to 5.3.

Since then transformers brings each weight when the one before is in its place (its pull request 44576), and so do we.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush

DRAWS = 19
"""So many runs: in one run more, a figure lies between the lowest and the highest of them with a chance of nine in ten,
as the n+1 values are in any order."""


def lowest_middle_highest(figures: Iterable[int]) -> tuple[int, int, int]:
    """Of a figure of an odd number of runs."""
    ordered = sorted(figures)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]


def arrivals(sizes: Sequence[int], threads: int, draw: int) -> Iterator[tuple[int, bool]]:
    """What happens to weights of these bytes, in its order: (weight, whether it comes or is put in its place).

    Memory for a weight is asked for when a thread takes it up, in the weights' order; it is put in its place when it
    and all before it have come, which takes no time beside. Threads run far ahead where a large weight comes first: an
    embedding takes one of them as long as many layers take the others. How long a weight takes is known in the mean
    only, as proportional to its bytes; of all distributions the exponential one assumes least (it has the most entropy
    of those with a given mean). Without threads each weight is put in its place when it has come.

    Source: transformers 5.0, core_model_loading.py (GLOBAL_WORKERS, spawn_materialize, convert).
    """
    if not threads:
        for weight in range(len(sizes)):
            yield weight, True
            yield weight, False
        return
    from random import Random  # late: planning for ourselves needs none

    chance = Random(draw)  # noqa: S311  # a sample, not a secret
    free = [0.0] * threads
    happening: list[tuple[float, int, bool]] = []
    settled = 0.0
    for weight, size in enumerate(sizes):
        taken_up = heappop(free)
        come = taken_up + size * chance.expovariate(1.0)
        heappush(free, come)
        settled = max(settled, come)
        happening += [(taken_up, weight, True), (settled, weight, False)]
    # of what happens at once, the earlier weight is first: a thread is free when one has come
    for _, weight, comes in sorted(happening, key=lambda each: (each[0], each[1], not each[2])):
        yield weight, comes
