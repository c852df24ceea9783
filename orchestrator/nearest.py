"""Where a request does not fit: the nearest requests that would, in the order of what they cost the person."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from clusters.gpu import GIB, Gpu, list_gpus
from orchestrator.devices import any_nodes, on_stack, pool_target
from orchestrator.plans import Choice, Target
from orchestrator.question import Candidate, of_length
from orchestrator.rules import can_be_divided
from orchestrator.space import sizes
from qlora_core.architecture import ModelArchitecture
from qlora_core.recipe import LARGEST, Dtype, Recipe
from qlora_core.strategy import Offload, ZeroStage

Fits = Callable[[Candidate, Target, bool], bool]
"""Whether a candidate fits a target: for sure, or only more likely than not."""
MOST_GPUS = 64


@dataclass(frozen=True, slots=True)
class Nearby:
    """One way to make a request fit.

    Attributes:
        title: what is given up.
        changes: each field that changes, with what that costs.
    """

    title: str
    candidate: Candidate
    target: Target
    changes: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Sacrifice:
    """Something that can be given up.

    Attributes:
        variants: from the mildest form to the strongest.
        harmless: the run learns the same, only more slowly or for more money.
    """

    title: str
    costs: str
    variants: tuple[Candidate, ...]
    harmless: bool = True


def nearest(architecture: ModelArchitecture, asked: Candidate, target: Target, usable: Fits) -> Iterator[Nearby]:
    """Each single change that makes `asked` fit on GPUs of `target`'s kind; the needed combination where none does.

    Harmless ones first, and their combination before the run is made to learn something else.
    """
    found: list[Nearby] = []
    every = list(sacrifices(architecture, asked, target))
    for harmless in (True, False):
        for sacrifice in (each for each in every if each.harmless == harmless):
            if (variant := mildest(sacrifice.variants, target, usable)) is not None:
                costs = tuple(changes(asked, variant, sacrifice.costs))
                found.append(Nearby(sacrifice.title, variant, on(target, variant), costs))
        if not found and (both := combined(architecture, asked, target, usable, harmless_only=harmless)):
            found.append(both)
    yield from found
    if (larger := larger_gpu(asked, target, usable)) is not None:
        yield larger


def under_autocast(recipe: Recipe, compute_dtype: Dtype) -> Recipe:
    """`recipe` under autocast where that makes products of float32 adapters narrower; else as it is."""
    if recipe.under_autocast or not recipe.may_autocast or recipe.lora_dtype != "float32":
        return recipe
    narrow = replace(recipe, autocast=True)
    return narrow if narrow.narrows(compute_dtype) else recipe


def mildest(variants: Sequence[Candidate], target: Target, usable: Fits) -> Candidate | None:
    """The first that is sure to fit, else the first that is likely to; None without."""
    for sure in (True, False):
        for variant in variants:
            if usable(variant, on(target, variant), sure):
                return variant
    return None


def sacrifices(architecture: ModelArchitecture, asked: Candidate, target: Target) -> Iterator[Sacrifice]:
    """What can be given up, the cheapest for the person first."""
    recipe, strategy = asked
    cuda = target.device.kind == "cuda"
    if strategy.attention == "eager" and architecture.has_sdpa:
        yield Sacrifice("sdpa attention", "nothing", (Candidate(recipe, replace(strategy, attention="sdpa")),))
    if (autocast := under_autocast(recipe, target.compute_dtype)) is not recipe:
        costs = f"precision: the adapters' products are in {target.compute_dtype}"
        yield Sacrifice("autocast", costs, (Candidate(autocast, strategy),))
    if recipe.upcast == "peft":
        yield Sacrifice("no float32 upcast", "nothing known", (Candidate(replace(recipe, upcast="none"), strategy),))
    if strategy.loss == "full":
        chunked = Candidate(recipe, replace(strategy, loss="chunked"))
        costs = "the output head is computed once more" if recipe.method == "full" else "nothing"
        yield Sacrifice("a chunked loss", costs, (chunked,))
    if strategy.micro_batch > 1:
        share = strategy.micro_batch * strategy.gradient_accumulation
        sizes = [size for size in range(strategy.micro_batch - 1, 0, -1) if share % size == 0]
        smaller = (replace(strategy, micro_batch=size, gradient_accumulation=share // size) for size in sizes)
        yield Sacrifice(
            "a smaller micro-batch",
            "some speed; the step is the same",
            tuple(Candidate(recipe, one) for one in smaller),
        )
    if not strategy.paged_optimizer and cuda and strategy.offload == "none":
        paged = Candidate(recipe, replace(strategy, paged_optimizer=True))
        yield Sacrifice("paged optimizer state", "traffic over PCIe where memory is short", (paged,))
    if not strategy.gradient_checkpointing:
        kept = Candidate(recipe, replace(strategy, gradient_checkpointing=True))
        yield Sacrifice("gradient checkpointing", "about a third more computing", (kept,))
    if cuda:
        if strategy.world_size > 1:
            higher = tuple(Candidate(recipe, replace(strategy, zero_stage=stage)) for stage in _higher_stages(asked))
            yield Sacrifice("a higher ZeRO stage", "traffic between the GPUs in each step", higher)
        yield Sacrifice("more GPUs", "their price", tuple(on_more(asked, target)))
        yield Sacrifice("offloading", "traffic over PCIe in each step, and host memory", tuple(offloaded(asked)))
    if recipe.optimizer == "adamw":
        narrow = Candidate(replace(recipe, optimizer="adamw_8bit"), strategy)
        yield Sacrifice("8-bit optimizer state", "moments of lower precision", (narrow,), harmless=False)
    if recipe.method == "lora":
        quantized = replace(recipe, method="qlora", quantization="nf4", double_quantization=True)
        costs = "time for dequantization, and the base's precision"
        yield Sacrifice("a 4-bit base (QLoRA)", costs, (Candidate(quantized, strategy),), harmless=False)
    yield Sacrifice("shorter sequences", "context", tuple(shorter(asked)), harmless=False)
    if recipe.method != "full":
        ranks = [rank for rank in (128, 64, 32, 16, 8, 4) if rank < recipe.rank]
        thinner = tuple(Candidate(replace(recipe, rank=rank), strategy) for rank in ranks)
        yield Sacrifice("a smaller rank", "capacity of the adapters", thinner, harmless=False)


def on_more(asked: Candidate, target: Target) -> Iterator[Candidate]:
    """Twice as many GPUs and so on, with the ZeRO stage that divides the least of what has to be divided.

    Of a pool that exists, the numbers that a search tries. One that changes the step is passed over where more do not.
    """
    recipe, strategy = asked
    own = strategy.world_size
    worlds = [own << power for power in range(1, MOST_GPUS.bit_length()) if own << power <= MOST_GPUS]
    if target.pool is not None and target.pool.exists:
        worlds = sorted(size for size in sizes(target.pool.gpus, target.pool.gpus_per_node) if size > own)
    even = [world for world in worlds if recipe.sequences_per_step % (world * strategy.micro_batch) == 0]
    for world in (each for each in worlds if each in even or each > max(even, default=0)):
        for stage in _stages(asked):
            accumulation = strategy.gradient_accumulation
            tokens = recipe.seq_len * world * strategy.micro_batch * accumulation
            if world in even:
                accumulation = recipe.sequences_per_step // (world * strategy.micro_batch)
                tokens = recipe.tokens_per_step
            if tokens <= LARGEST:
                yield Candidate(
                    of_length(recipe, recipe.seq_len, tokens),
                    replace(strategy, world_size=world, zero_stage=stage, gradient_accumulation=accumulation),
                )


def _stages(asked: Candidate) -> tuple[ZeroStage, ...]:
    stages: tuple[ZeroStage, ...] = (2, 3) if can_be_divided(asked.recipe) else (2,)
    return tuple(stage for stage in stages if stage >= asked.strategy.zero_stage)


def _higher_stages(asked: Candidate) -> tuple[ZeroStage, ...]:
    return tuple(stage for stage in _stages(asked) if stage > asked.strategy.zero_stage)


def offloaded(asked: Candidate) -> Iterator[Candidate]:
    """The optimizer's state on the host, then the base too."""
    ways: tuple[tuple[ZeroStage, Offload], ...] = ((2, "optimizer"), (3, "optimizer"), (3, "all"))
    for stage, offload in ways:
        strategy = replace(asked.strategy, zero_stage=stage, offload=offload, paged_optimizer=False)
        if stage in _stages(asked) and offload != asked.strategy.offload:
            yield Candidate(asked.recipe, strategy)


def shorter(asked: Candidate) -> Iterator[Candidate]:
    """Shorter sequences, as many of them: in 64 steps at most, of whole 64s."""
    recipe, strategy = asked
    step = 64 * -(-recipe.seq_len // 64**2)
    for length in range((recipe.seq_len - 1) // step * step, 0, -step):
        yield Candidate(of_length(recipe, length, length * recipe.sequences_per_step), strategy)


def on(target: Target, candidate: Candidate) -> Target:
    """`target` for as many GPUs as `candidate` takes."""
    pool, world = target.pool, candidate.strategy.world_size
    if pool is None:
        return target
    if world > pool.gpus:
        pool = replace(any_nodes(pool.gpu, world), host_ram_bytes=pool.host_ram_bytes)
    device = replace(target.device, ranks_per_host=min(world, pool.gpus_per_node))
    return replace(target, pool=pool, device=device)


def combined(
    architecture: ModelArchitecture, asked: Candidate, target: Target, usable: Fits, *, harmless_only: bool
) -> Nearby | None:
    """The changes of all kinds together, each as strong as it can be, up to the first that makes it fit."""
    now, given_up, costs = asked, [], []
    every = sacrifices(architecture, asked, target)
    for title in [each.title for each in every if each.harmless or not harmless_only]:
        sacrifice = next((each for each in sacrifices(architecture, now, target) if each.title == title), None)
        if sacrifice is None or not sacrifice.variants:
            continue
        given_up.append(title)
        costs.append(sacrifice.costs)
        if (variant := mildest(sacrifice.variants, target, usable)) is not None:
            found = tuple(changes(asked, variant, "; ".join(costs)))
            return Nearby(", ".join(given_up), variant, on(target, variant), found)
        now = sacrifice.variants[-1]
    return None


def larger_gpu(asked: Candidate, target: Target, usable: Fits) -> Nearby | None:
    """The smallest GPU of the catalogue that the request fits on as it is."""
    if target.pool is None:
        return None
    for gpu in list_gpus():
        place = target_for(gpu, target, asked)
        if gpu.usable_bytes > target.usable_bytes and usable(asked, place, True):
            change = Choice("gpu", gpu.name, f"another GPU; {gpu.usable_bytes / GIB:.1f} GiB usable")
            return Nearby("a larger GPU", asked, place, (change,))
    return None


def target_for(gpu: Gpu, target: Target, asked: Candidate) -> Target:
    """Another GPU in the place of `target`."""
    requested = target.dtype_choice.value if target.dtype_choice.reason.startswith("asked") else "auto"
    other = pool_target(any_nodes(gpu, asked.strategy.world_size), requested, asked.strategy.world_size)
    return on_stack(other, target.stack)


def changes(asked: Candidate, other: Candidate, costs: str = "") -> Iterator[Choice]:
    """The fields in which `other` differs, with what that costs."""
    for old, new in ((asked.recipe, other.recipe), (asked.strategy, other.strategy)):
        for field in (each.name for each in fields(new)):
            if getattr(old, field) != getattr(new, field):
                value = getattr(new, field)
                yield Choice(
                    field,
                    str(value).lower() if isinstance(value, bool) else str(value),
                    f"costs {costs}" if costs else f"instead of {getattr(old, field)}",
                )
