"""Alternatives to a plan: what the search found beside it, or the nearest requests that would fit where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from orchestrator.confidence import Comparable, confidence
from orchestrator.durations import duration
from orchestrator.history import History
from orchestrator.nearest import changes, nearest
from orchestrator.needs import bytes_for, host_has_room, needs
from orchestrator.plans import Alternative, Choice, Plan, Target
from orchestrator.question import Candidate, Place, Question
from orchestrator.reasons import waiting
from orchestrator.rules import warnings
from orchestrator.search import Found
from orchestrator.verdicts import time_of
from qlora_core.architecture import ModelArchitecture
from qlora_core.memory.estimate import Estimate

WORTH = 1.05
"""An alternative to a request that fits is this much faster; less is not worth a line."""


@dataclass(frozen=True, slots=True)
class Alternatives:
    """What all alternatives to a plan have in common.

    Attributes:
        tokens: of the whole run, where they are known.
        currency: of prices.
        history: measured runs.
        filled: the share of a row's positions that those tokens are, where they are of data.
    """

    architecture: ModelArchitecture
    tokens: int | None
    currency: str | None
    history: History
    filled: float | None = None

    def beside(
        self, question: Question, found: Sequence[Found], than: Candidate, seconds_per_token: float | None
    ) -> Iterator[Alternative]:
        """What the search found for a question, with its pace and differences beside a plan.

        Where unlike GPUs would be in one group, what the slow ones cost is a warning of it.
        """
        for one in found:
            pace = ""
            if seconds_per_token is not None:
                pace = f"{seconds_per_token / one.seconds_per_token:.2f} times as fast"
            candidate = Candidate(one.recipe, one.strategy)
            way = self.of(pace, one.place, one.target, candidate, one.needed, tuple(changes(than, candidate)))
            idle = waiting(question, one)
            yield replace(way, warnings=(*way.warnings, f"{way.place}: {idle}")) if idle else way

    def faster(self, found: list[Found], plan: Plan) -> list[Found]:
        """Those that are faster than a request as it was made."""
        step = plan.verdict.step_time
        return [one for one in found if step is None or one.seconds_per_token * WORTH < step.seconds / step.tokens]

    def nearest(self, plan: Plan) -> Iterator[Alternative]:
        """The nearest that would fit, where a request does not."""
        spreads = dict(self.history.spreads())

        def fits(candidate: Candidate, target: Target, sure: bool) -> bool:
            needed = needs(self.architecture, *candidate, target)
            most = bytes_for(needed, target, sure, spreads.get(Comparable.to(target, *candidate)))
            ram = plan.host_usable_bytes
            room = ram is None or needed.host.most_bytes <= ram
            return room and most <= target.usable_bytes and host_has_room(needed, target)

        for one in nearest(self.architecture, Candidate(plan.recipe, plan.strategy), plan.target, fits):
            place = Place(((one.target, one.candidate.strategy.world_size),))
            needed = needs(self.architecture, *one.candidate, one.target)
            yield self.of(one.title, place, one.target, one.candidate, needed, one.changes)

    def of(
        self,
        title: str,
        place: Place,
        target: Target,
        candidate: Candidate,
        needed: Estimate,
        differences: tuple[Choice, ...],
    ) -> Alternative:
        """An alternative with its confidence, time and price; `target` is the fullest GPU of `place`."""
        recipe, strategy = candidate
        ratios = self.history.memory_ratios(target, recipe, strategy)
        targets = [each for each, _ in place.parts]
        step = time_of(self.architecture, recipe, strategy, targets, needed, self.history)
        price = place.price_per_hour
        return Alternative(
            title=title,
            place=place.name,
            gpu=target.name,
            gpus=place.gpus,
            nodes=place.nodes,
            recipe=recipe,
            strategy=strategy,
            usable_bytes=target.usable_bytes,
            process_bytes=needed.gpu.process_bytes,
            confidence=confidence(needed, target.device.context_bytes, target.usable_bytes, ratios),
            step_time=step,
            duration=duration(step, self.tokens, place.gpus, price, self.currency, filled=self.filled),
            price_per_hour=price,
            currency=None if price is None else self.currency,
            changes=differences,
            warnings=tuple(warnings(self.architecture, recipe, strategy, targets)),
        )
