"""Why a search chose what it chose: each choice beside the best other one, which does not fit or is slower."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from clusters.gpu import GIB
from orchestrator.needs import bytes_for, host_has_room
from orchestrator.plans import Choice
from orchestrator.question import Candidate, Place, Question
from orchestrator.search import ALIKE, Found, Judge
from orchestrator.space import LARGEST_MICRO_BATCH, micro_batches, shapes

NAMES: dict[str, dict[Any, str]] = {
    "gradient_checkpointing": {True: "gradient checkpointing", False: "keeping all activations"},
    "loss": {"full": "all logits at once", "chunked": "logits in chunks", "liger": "Liger's kernel"},
    "attention": {"sdpa": "sdpa", "eager": "eager attention", "flash_attention_2": "flash_attention_2"},
    "paged_optimizer": {True: "paged state", False: "state that is not paged"},
    "optimizer": {"adamw": "32-bit state", "adamw_8bit": "8-bit state"},
    "zero_stage": {stage: f"ZeRO {stage}" if stage else "no ZeRO" for stage in range(4)},
    "offload": {"none": "no offload", "optimizer": "offloading the optimizer", "all": "offloading all"},
}
"""What each value is called in a reason."""


def reasons(question: Question, found: Found) -> Iterator[Choice]:
    """A choice with its reason for each field that was open."""
    judge = Judge(question, found.place)
    chosen = Candidate(found.recipe, found.strategy)
    for field in (name for name in NAMES if name in question.open):
        value = value_of(chosen, field)
        yield Choice(field, text(value), reason(question, judge, chosen, field, found))
    if "micro_batch" in question.open:
        yield Choice("micro_batch", str(found.strategy.micro_batch), micro_batch_reason(question, judge, chosen, found))
    if "world_size" in question.open:
        yield Choice("world_size", str(found.place.gpus), place_reason(question, found))
    if "seq_len" in question.open and question.objective == "longest":
        positions = question.architecture.max_position_embeddings
        ends = found.recipe.seq_len == positions
        why = "all positions that the model was trained for" if ends else f"the longest that fits, of {positions}"
        yield Choice("seq_len", str(found.recipe.seq_len), why)


def hopeless(question: Question) -> Iterator[Choice]:
    """Where nothing fits: what was chosen for need, once for all."""
    if fields := sorted(question.open - {"world_size", "seq_len"}):
        names = ", ".join(fields).replace("_", " ")
        yield Choice("left open", names, "each as lean as it can be, and it still does not fit")


def value_of(candidate: Candidate, field: str) -> object:
    """The value of a field of recipe or strategy."""
    return candidate.recipe.optimizer if field == "optimizer" else getattr(candidate.strategy, field)


def text(value: object) -> str:
    """A value as JSON and YAML write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def reason(question: Question, judge: Judge, chosen: Candidate, field: str, found: Found) -> str:
    """What the best other value of one field would be like."""
    others = [
        other for other in alike_but(question, chosen, field) if value_of(other, field) != value_of(chosen, field)
    ]
    if not others:
        return only_one(field, chosen, judge)
    own = judge.seconds(chosen, judge.paged_out(chosen))
    better = sorted((other for other in others if judge.seconds(other) < own), key=judge.seconds)
    if field == "zero_stage" and chosen.strategy.zero_stage:
        better = others = others[:1]  # the simplest: whoever sees a stage asks why it takes ZeRO at all
    for other in better:
        if missing := why_not(judge, other, found):
            return f"{NAMES[field][value_of(other, field)]} {missing}"
    best = min(others, key=judge.seconds)
    slower = judge.seconds(best, judge.paged_out(best)) / own - 1
    name = NAMES[field][value_of(best, field)]
    if slower < 0.02:
        paged = field == "paged_optimizer" and chosen.strategy.paged_optimizer
        return "survives spikes of memory, at no cost" if paged else f"{name} would be no faster"
    return f"{name} would take {slower:.0%} longer"


def only_one(field: str, chosen: Candidate, judge: Judge) -> str:
    """Why there was nothing to choose."""
    strategy = chosen.strategy
    if field == "paged_optimizer" and strategy.offload != "none":
        return "the state is on the host already"
    if field == "zero_stage" and strategy.offload != "none":
        return f"offloading needs it: {strategy.offload}"
    if field == "offload" and strategy.paged_optimizer:
        return "the optimizer's state is paged, so it goes to the host by itself where memory is short"
    if field in ("zero_stage", "offload") and strategy.world_size == 1:
        return "there is one worker, so there is nothing to share out"
    return f"{judge.architecture.model_type} knows no other" if field in ("attention", "loss") else "there is no other"


def alike_but(question: Question, chosen: Candidate, field: str) -> Iterator[Candidate]:
    """Candidates that differ in one field, the simplest first.

    ZeRO's stage and offload go together, and what is not offloaded may be paged.
    """
    own = chosen.strategy
    apart = {field}
    if field in ("zero_stage", "offload"):
        apart = {"zero_stage", "offload"} if own.offload == "none" else {"zero_stage", "offload", "paged_optimizer"}
    for shape in shapes(question, own.world_size):
        other = Candidate(
            replace(chosen.recipe, optimizer=shape.recipe.optimizer),
            replace(shape.strategy, micro_batch=own.micro_batch, gradient_accumulation=own.gradient_accumulation),
        )
        if {name for name in NAMES if value_of(other, name) != value_of(chosen, name)} <= apart:
            yield other


def why_not(judge: Judge, other: Candidate, found: Found) -> str | None:
    """Why a faster candidate was not taken, in GiB; None where it fits."""
    if judge.fits(other, found.sure):
        return None
    needed, target = judge.needed(other)
    spread = judge.spread(target, other.strategy.zero_stage > 0)
    bytes_ = bytes_for(needed, target, found.sure, spread)
    if bytes_ <= target.usable_bytes and not host_has_room(needed, target):
        return f"would need {needed.host.most_bytes / GIB:.1f} GiB of a host"
    most = "up to " if found.sure and bytes_ != bytes_for(needed, target, False, spread) else ""
    parts = needed.gpu.components
    base = parts.base_weights + parts.quantization_constants
    alone = f", {base / GIB:.1f} of it the base alone" if base > bytes_ / 2 else ""
    return f"would need {most}{bytes_ / GIB:.1f} of {target.usable_bytes / GIB:.1f} GiB{alone}"


def micro_batch_reason(question: Question, judge: Judge, chosen: Candidate, found: Found) -> str:
    """Why it is no larger."""
    own = chosen.strategy.micro_batch
    larger = [size for size, _ in micro_batches(question, chosen, found.place.gpus) if size > own]
    if question.objective == "longest":
        return "the room is for the context"
    if not larger:
        return "larger ones gain little" if own == LARGEST_MICRO_BATCH else "all sequences of a GPU's share of the step"
    share = own * chosen.strategy.gradient_accumulation
    other = Candidate(
        chosen.recipe,
        replace(chosen.strategy, micro_batch=min(larger), gradient_accumulation=share // min(larger)),
    )
    missing = why_not(judge, other, found)
    return f"{min(larger)} {missing}" if missing else "larger ones gain less than others' choices would lose"


def place_reason(question: Question, found: Found) -> str:
    """Why these GPUs, and what a slow kind costs a fast one."""
    place = found.place
    best = {
        "fastest": "the most tokens a second",
        "cheapest": "the lowest price of a token"
        if place.price_per_hour is not None
        else "the fewest GPU hours; no prices are known",
        "fewest-gpus": "the fewest that it fits on",
        "longest": "the longest context",
    }[question.objective]
    return "; ".join(filter(None, (f"{place.name}: {best}", waiting(question, found))))


def waiting(question: Question, found: Found) -> str:
    """What is lost where unlike GPUs are in one group: all wait for the slowest in every step."""
    if len(found.place.parts) == 1:
        return ""
    chosen = Candidate(found.recipe, found.strategy)
    world = found.place.gpus
    alone = {}
    for target, count in found.place.parts:
        own = Judge(question, Place(((target, world),)))
        alone[f"{count} x {target.name}"] = own.seconds(chosen)
    slowest = max(alone, key=lambda name: alone[name])
    quickest = min(alone, key=lambda name: alone[name])
    idle = 1 - alone[quickest] / alone[slowest]
    if idle < ALIKE - 1:
        return ""
    return f"all wait for {slowest} in every step, so {quickest} stand idle {idle:.0%} of the time"
