"""A plan as data: recipe, strategy, GPUs, estimate, verdicts, time, price, alternatives, the reason of each choice."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from clusters.cluster import Pool
from qlora_core.architecture import ModelArchitecture
from qlora_core.memory.device import Device, Stack
from qlora_core.memory.estimate import Components, Estimate
from qlora_core.recipe import Dtype, Recipe
from qlora_core.step_time import StepTime
from qlora_core.strategy import Strategy

SCHEMA_VERSION = 1
SURE = 0.95
"""Verdicts are sure from this chance on."""

Objective = Literal["fastest", "cheapest", "fewest-gpus", "longest"]


class Choice(NamedTuple):
    """One thing the planner decided, or changed, and why."""

    field: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Target:
    """A device that a plan is held against.

    Attributes:
        name: the catalogue's name, or "cpu".
        device: what an estimate depends on.
        usable_bytes: what a process of ours can have of its memory, CUDA context included.
        dtype_choice: the compute dtype of `device`, with its reason.
        pool: the nodes it is one of, for its rates, links and price; None where nothing is known of them.
        has_liger: Liger's kernels are known to be installed there.
        stack: whose loop trains there, which `device` has in its fields.
    """

    name: str
    device: Device
    usable_bytes: int
    dtype_choice: Choice
    pool: Pool | None = None
    has_liger: bool = False
    stack: Stack = "ours"

    @property
    def device_name(self) -> str:
        """What runs on such a device are entered under."""
        return self.name if self.pool is None else self.pool.gpu.name

    @property
    def compute_dtype(self) -> Dtype:
        """The compute dtype."""
        return self.device.compute_dtype


class Confidence(NamedTuple):
    """How sure a verdict is.

    Attributes:
        chance: that the process finds room; never below 0.05 nor above 0.95, beyond which nothing is known.
        low_bytes, high_bytes: of the process, between which it ends in nine cases of ten.
        expected_bytes: of the process, which it is as likely to need less of as more.
        basis: what that is taken from, in words.
    """

    chance: float
    low_bytes: int
    expected_bytes: int
    high_bytes: int
    basis: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request fits on one kind of device, and how far it could be taken there.

    Attributes:
        components: the allocated bytes, at the moment of the peak.
        largest_micro_batch, longest_seq_len: with all else as asked for; 0 where not even 1 fits.
        headroom_bytes: usable minus expected bytes; negative where it does not fit.
        fits: in the GPU's memory, and in the host's where that is stated.
        confidence: how sure it is to fit the GPU's.
        step_time: of one optimizer step there; None where nothing is known of its rates.
        host_fits: whether the host's memory suffices; None where nobody said how much there is.
    """

    gpu: str
    usable_bytes: int
    components: Components
    allocated_bytes: int
    reserved_bytes: int
    process_bytes: int
    fits: bool
    headroom_bytes: int
    largest_micro_batch: int
    longest_seq_len: int
    confidence: Confidence
    step_time: StepTime | None = None
    host_fits: bool | None = None

    @property
    def barely(self) -> bool:
        """Whether it fits, but not for sure."""
        return self.fits and self.confidence.chance < SURE


class Duration(NamedTuple):
    """A whole run: its time, and its price where one is known.

    Attributes:
        tokens: that it trains on, padding left out.
        steps: optimizer steps.
        seconds, low_seconds, high_seconds: as expected, and between which it lies.
        gpu_hours: as expected.
        price, low_price, high_price: of the nodes it takes, in `currency`; None without prices.
    """

    tokens: int
    steps: int
    seconds: float
    low_seconds: float
    high_seconds: float
    gpu_hours: float
    price: float | None = None
    low_price: float | None = None
    high_price: float | None = None
    currency: str | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another way to run, found by the search.

    Attributes:
        title: what sets it apart, in a few words.
        place: the GPUs, in words: "8 x a100-80gb".
        gpu: the kind whose memory decides.
        gpus, nodes: how many.
        recipe, strategy: complete.
        usable_bytes, process_bytes: of the fullest GPU.
        confidence: how sure it is to fit.
        step_time: of an optimizer step; None where nothing is known of the rates.
        duration: of the whole run; None where nobody said how many tokens it has.
        price_per_hour: of all its nodes; None without prices.
        currency: of the price.
        changes: what is not as in the request, with reasons.
        warnings: what the person should know; the plan's has them too.
    """

    title: str
    place: str
    gpu: str
    gpus: int
    nodes: int
    recipe: Recipe
    strategy: Strategy
    usable_bytes: int
    process_bytes: int
    confidence: Confidence
    step_time: StepTime | None
    duration: Duration | None
    price_per_hour: float | None
    currency: str | None
    changes: tuple[Choice, ...]
    warnings: tuple[str, ...]

    @property
    def headroom_bytes(self) -> int:
        """Usable minus expected bytes; negative where it does not fit."""
        return self.usable_bytes - self.confidence.expected_bytes

    @property
    def fits(self) -> bool:
        """Whether its process finds room, as expected."""
        return self.headroom_bytes >= 0

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON has them."""
        return {
            "title": self.title,
            "place": self.place,
            "gpu": self.gpu,
            "gpus": self.gpus,
            "nodes": self.nodes,
            "recipe": self.recipe.to_json(),
            "strategy": dataclasses.asdict(self.strategy),
            "usable_bytes": self.usable_bytes,
            "process_bytes": self.process_bytes,
            "headroom_bytes": self.headroom_bytes,
            "fits": self.fits,
            "confidence": self.confidence._asdict(),
            "step_time": time_json(self.step_time),
            "duration": None if self.duration is None else self.duration._asdict(),
            "price_per_hour": self.price_per_hour,
            "currency": self.currency,
            "changes": [change._asdict() for change in self.changes],
            "warnings": list(self.warnings),
        }


def at_longest(recipe: Recipe, longest: int | None) -> Recipe:
    """`recipe` at the length of the longest row of data, where that is known and shorter; as many in a step."""
    if longest is None or longest >= recipe.seq_len:
        return recipe
    return dataclasses.replace(recipe, seq_len=longest, tokens_per_step=longest * recipe.sequences_per_step)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `qlora-plan` answers and `qlora-train` runs.

    Attributes:
        target: the device whose estimate is shown: the one asked for, else the smallest that fits, else the largest.
        verdicts: one per kind of device that was looked at, in the order of their memory.
        choices: what was decided for the person, with reasons.
        warnings: what the person should know, such as a sequence longer than the model's positions; of the alternatives
            too.
        host_usable_bytes: memory of the target's host, where it was stated; None leaves the host undecided.
        group: all GPUs in words, where unlike kinds work together: `target` is the fullest of them; None otherwise.
        duration: of the whole run; None where nobody said how many tokens it has.
        objective: what was looked for, where something was; None where the request is answered as it was made.
        alternatives: other ways to run, the best first; where nothing fits, the nearest that would.
        longest: tokens of the data's longest row, where they are known: memory and time are those of rows so long.
    """

    architecture: ModelArchitecture
    recipe: Recipe
    strategy: Strategy
    target: Target
    estimate: Estimate
    verdicts: tuple[Verdict, ...]
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...] = ()
    host_usable_bytes: int | None = None
    group: str | None = None
    duration: Duration | None = None
    objective: Objective | None = None
    alternatives: tuple[Alternative, ...] = ()
    longest: int | None = None

    @property
    def planned(self) -> Recipe:
        """The recipe as its memory and time are estimated: at the length of the longest row, where that is shorter."""
        return at_longest(self.recipe, self.longest)

    @property
    def fits(self) -> bool:
        """Whether it fits on at least one of the devices looked at, and in its host's memory where that was stated."""
        return any(verdict.fits for verdict in self.verdicts)

    @property
    def verdict(self) -> Verdict:
        """That of the target."""
        return next(verdict for verdict in self.verdicts if verdict.gpu == self.target.name)

    @property
    def host_fits(self) -> bool | None:
        """Whether the memory of the target's host suffices; None where nobody said how much there is."""
        return self.verdict.host_fits

    @property
    def digest(self) -> str:
        """A short name of what would be run: model, recipe, strategy and compute dtype."""
        import hashlib  # a plan on the terminal does without, and OpenSSL takes a while to load

        decided = {
            "model": self.architecture.name,
            "recipe": self.recipe.to_json(),
            "strategy": dataclasses.asdict(self.strategy),
            "compute_dtype": self.target.compute_dtype,
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """The plan in the stable form that other programs read; see docs/planning.md."""
        architecture, gpu = self.architecture, self.estimate.gpu
        return {
            "schema_version": SCHEMA_VERSION,
            "model": {
                "name": architecture.name,
                "parameters": architecture.parameters,
                "model_type": architecture.model_type,
                "layers": architecture.num_layers,
                "hidden_size": architecture.hidden_size,
                "vocab_size": architecture.vocab_size,
                "source": architecture.source,
            },
            "recipe": {**self.recipe.to_json(), "compute_dtype": self.target.compute_dtype},
            "strategy": dataclasses.asdict(self.strategy),
            "estimator": self.estimate.estimator,
            "estimate": {
                "gpu": {
                    "name": self.target.name,
                    "components": gpu.components._asdict(),
                    "peak_phase": gpu.peak_phase,
                    "peak_moment": gpu.peak_moment,
                    "phases": gpu.phases._asdict(),
                    "allocated_bytes": gpu.allocated_bytes,
                    "reserved_bytes": gpu.reserved_bytes,
                    "reserved_interval": list(gpu.reserved_interval),
                    "process_bytes": gpu.process_bytes,
                    "paged_bytes": gpu.paged_bytes,
                },
                "host": {**self.estimate.host._asdict(), "fits": self.host_fits},
            },
            "verdicts": [verdict_json(verdict) for verdict in self.verdicts],
            "duration": None if self.duration is None else self.duration._asdict(),
            "group": self.group,
            "objective": self.objective,
            "alternatives": [alternative.to_json() for alternative in self.alternatives],
            "choices": [choice._asdict() for choice in self.choices],
            "warnings": list(self.warnings),
            "digest": self.digest,
        }


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict's fields as JSON has them."""
    nested = ("components", "confidence", "step_time")
    names = (field.name for field in dataclasses.fields(verdict) if field.name not in nested)
    return {
        **{name: getattr(verdict, name) for name in names},
        "components": verdict.components._asdict(),
        "confidence": verdict.confidence._asdict(),
        "step_time": time_json(verdict.step_time),
    }


def time_json(step: StepTime | None) -> dict[str, Any] | None:
    """A step's time as JSON has it, in seconds."""
    if step is None:
        return None
    return {
        "seconds": step.seconds,
        "low_seconds": step.low,
        "high_seconds": step.high,
        "floor_seconds": step.floor,
        "tokens": step.tokens,
        "tokens_per_second": step.tokens_per_second,
        "parts": step.parts._asdict(),
        "correction": step.correction,
        "runs": step.runs,
    }
