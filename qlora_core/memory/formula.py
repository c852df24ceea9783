"""The closed-form estimate: bytes by component and phase, in microseconds, for any recipe, strategy and device.

What stays is counted exactly (`bytes.py`, `residents.py`, `sharding.py`); what comes and goes is a polynomial whose
coefficients one run of the tape found (`step.py`). The peak is the highest of its moments for this micro-batch and
sequence length (`sizes.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import cached_property, lru_cache, partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple

from qlora_core.architecture import ACTIVATIONS, Linear, ModelArchitecture
from qlora_core.memory import bytes as exact
from qlora_core.memory.attention import AttentionKernel, Heads, is_masked, kernel_of
from qlora_core.memory.delta_net import CHUNK
from qlora_core.memory.device import Device
from qlora_core.memory.divided import (
    fetched_ahead,
    head_reduced,
    reduced_after,
    reduced_within,
    shard_of,
    trained_outside,
)
from qlora_core.memory.estimate import Components, Estimate, Phase
from qlora_core.memory.experts import Experts
from qlora_core.memory.families import family_of
from qlora_core.memory.layer import Layer, Projection
from qlora_core.memory.residents import Residents, residents
from qlora_core.memory.sharding import bucket_elements
from qlora_core.memory.sizes import Least, Repeated, Sizes, has_several_chunks
from qlora_core.memory.step import Handling, Logits, Step, undivided
from qlora_core.memory.timeline import course as parts_of
from qlora_core.memory.timeline import timeline
from qlora_core.recipe import Recipe
from qlora_core.strategy import Attention, Strategy

ENDLESS = 2**40
"""A length beyond every sliding window, and a number of ranks beyond every other."""


def estimate(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Estimate:
    """What one rank and one host need for `recipe`, run as `strategy` says on `device`.

    Paged optimizer state is in `paged_bytes` only: the driver moves it to the host when the GPU is full, so neither the
    allocated nor the process bytes count it. "full" loss is the stock one: its logits stay until the step ends.

    Raises:
        ValueError: nothing is trained.
    """
    shape = strategy.micro_batch, recipe.seq_len
    sizes = prepared(architecture, recipe, strategy, device).at(*shape)
    return sizes.estimate(*shape, device.context_bytes, device.ranks_per_host)


def least_bytes(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device, micro_batch: int
) -> int:
    """What is allocated at least, on however many ranks: what fits nowhere is told without a timeline for each number.

    0 where nothing is divided, or where dividing changes how layers run again: there it is not known so quickly.
    """
    if not strategy.zero_stage:
        return 0
    return prepared(architecture, recipe, _least(strategy), device).least_bytes(micro_batch, recipe.seq_len)


@lru_cache(maxsize=256)
def _least(strategy: Strategy) -> Strategy:
    """One that needs no more, but for optimizer state: on so many ranks that nothing is left of what they divide."""
    return replace(
        strategy,
        world_size=ENDLESS,
        gradient_accumulation=1,
        paged_optimizer=False,
        zero_stage=max(strategy.zero_stage, 2),
        offload="all" if strategy.offload == "all" else "none",
    )


def course(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device
) -> list[tuple[str, Phase | None, Components]]:
    """What is on a rank's device in the course of a step: the most in each part of it, in their order.

    Returns:
        For each a name, such as "last layer"; its phase, None before the step begins; and its bytes by component. Of
        the layers there are the first and the last, or so many as a period has: between them, memory changes by as much
        with each of these.
    """
    kinds = prepared(architecture, recipe, strategy, device)
    shape = strategy.micro_batch, recipe.seq_len
    sizes = kinds.at(*shape)
    found: list[tuple[str, Phase | None, Components]] = [("before", None, sizes.between_steps())]
    for (phase, part), candidates in parts_of(kinds.step(*shape)):
        passing: Phase = "forward" if phase == "forward" else "backward"
        name = part if architecture.period == 1 else part.replace(" layer", f" {architecture.period} layers")
        found.append((name, passing, sizes.highest(passing, candidates, *shape)))
    return [*found, ("optimizer", "optimizer", sizes.optimizer_step(*shape))]


def segments(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> int:
    """Bytes of all segments, before fragmentation."""
    sizes = prepared(architecture, recipe, strategy, device)
    return sizes.at(strategy.micro_batch, recipe.seq_len).segments(strategy.micro_batch, recipe.seq_len)


class Kind(NamedTuple):
    """Micro-batches and sequence lengths of which a step is alike but for sizes.

    Attributes:
        single: a micro-batch of 1, which needs fewer copies where attention folds sequences and heads.
        masked: there are masks, as with packing and from a sliding window on.
        several_chunks: of the loss of a trained output head.
    """

    single: bool
    masked: bool
    several_chunks: bool


class Prepared:
    """A recipe and a strategy whose micro-batch and sequence length are open.

    Each kind of these is prepared apart, when it is first asked for.

    Raises:
        ValueError: by its methods; nothing is trained.
    """

    def __init__(
        self, architecture: ModelArchitecture, recipe: dict[str, Any], strategy: dict[str, Any], device: Device
    ) -> None:
        self._architecture, self._recipe, self._strategy, self._device = architecture, recipe, strategy, device
        chunk = CHUNK if architecture.delta_net else 1
        self._layers = Repeated(architecture.periods, architecture.period, chunk)
        self._single_is_special = folds_sequences(architecture, strategy["attention"])
        self._counts_chunks = strategy["loss"] == "chunked" and recipe["method"] == "full"
        self._steps: dict[Kind, tuple[Step, Residents]] = {}
        self._least: dict[Kind, Least | None] = {}
        self._of_kind: dict[Kind, Sizes] = {}

    @cached_property
    def weights_bytes(self) -> int:
        """What the base model's weights alone take, at least; it takes no time to tell."""
        recipe, strategy = self._asked(Kind(False, False, False))[1:3]
        weights = exact.weights(self._architecture, recipe, self._device.compute_dtype)
        constants = sum(size * count for size, count in weights.constants)
        if strategy.offload == "all":
            return constants
        divided = sum(size * count for size, count in (*weights.base, *weights.unquantized))
        return constants + divided // (strategy.world_size if strategy.zero_stage == 3 else 1)

    def reserved_bytes(self, micro_batch: int, seq_len: int) -> int:
        """What is reserved on the GPU, as `estimate` says it, but nothing else of that."""
        return self.at(micro_batch, seq_len).reserved_bytes(micro_batch, seq_len)

    def allocated_bytes(self, micro_batch: int, seq_len: int) -> int:
        """What is allocated: the least that has to be reserved, however well tensors are placed."""
        return self.at(micro_batch, seq_len).allocated_bytes(micro_batch, seq_len)

    def least_bytes(self, micro_batch: int, seq_len: int) -> int:
        """What is allocated at least, but for optimizer state; see the function of this name."""
        kind = self._kind(micro_batch, seq_len)
        if kind not in self._least:
            step, stays = self._parts(kind)
            known = step.sharded and not step.reentrant
            self._least[kind] = Least(stays, timeline(undivided(step)), self._layers) if known else None
        least = self._least[kind]
        return 0 if least is None else least.bytes(micro_batch, seq_len)

    def at(self, micro_batch: int, seq_len: int) -> Sizes:
        """The sizes that hold for these, among others."""
        kind = self._kind(micro_batch, seq_len)
        if kind not in self._of_kind:
            step, stays = self._parts(kind)
            strategy, trained = self._asked(kind)[2], step.layer.trained
            self._of_kind[kind] = Sizes(stays, timeline(step), self._device, strategy, self._layers, trained)
        return self._of_kind[kind]

    @property
    def chunk(self) -> int:
        """Tokens that sequences are filled up to a multiple of."""
        return self._layers.chunk

    def step(self, micro_batch: int, seq_len: int) -> Step:
        """The step of these, among others."""
        return self._parts(self._kind(micro_batch, seq_len))[0]

    def _parts(self, kind: Kind) -> tuple[Step, Residents]:
        """The step, and what stays between steps."""
        if kind not in self._steps:
            asked = self._asked(kind)
            self._steps[kind] = step_of(*asked, chunks=1 + kind.several_chunks), residents(*asked)
        return self._steps[kind]

    def _kind(self, micro_batch: int, seq_len: int) -> Kind:
        return Kind(
            self._single_is_special and micro_batch == 1,
            is_masked(self._architecture, seq_len, self._recipe["packing"]),
            self._counts_chunks and has_several_chunks(micro_batch, seq_len),
        )

    def _asked(self, kind: Kind) -> tuple[ModelArchitecture, Recipe, Strategy, Device]:
        """A recipe and a strategy that stand for all of a kind, but for the chunks of a loss."""
        length = ENDLESS if kind.masked else 1
        recipe = Recipe(**self._recipe, seq_len=length, tokens_per_step=length)
        strategy = Strategy(**self._strategy, micro_batch=1 if kind.single else 2)
        return self._architecture, recipe, strategy, self._device


OPEN = frozenset({"seq_len", "tokens_per_step", "micro_batch"})
"""Fields that a `Prepared` leaves open."""
COUNTED = frozenset({"world_size", "gradient_accumulation"})
"""Fields of a strategy of which `prepared` takes the smallest numbers that stand for all."""
LEARNING = frozenset(
    {
        "alpha",
        "use_rslora",
        "neftune_alpha",
        "learning_rate",
        "schedule",
        "warmup_fraction",
        "weight_decay",
        "beta1",
        "beta2",
        "max_grad_norm",
        "epochs",
        "steps",
        "group_by_length",
    }
)
"""Fields of a recipe that no size depends on."""
RECIPE_FIELDS = tuple(field.name for field in fields(Recipe) if field.name not in OPEN | LEARNING)
STRATEGY_FIELDS = tuple(field.name for field in fields(Strategy) if field.name not in OPEN | COUNTED)
_of_recipe, _of_strategy = attrgetter(*RECIPE_FIELDS), attrgetter(*STRATEGY_FIELDS)


def prepared(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Prepared:
    """What a search over micro-batches and sequence lengths asks; it is the same for all that are alike in the rest.

    Of micro-batches and, where nothing is divided, of ranks it matters only whether there is more than one. The context
    and how many ranks share a host come on top.
    """
    world = strategy.world_size if strategy.zero_stage else min(strategy.world_size, 2)
    several = min(strategy.gradient_accumulation, 2)
    return _prepared(architecture, _of_recipe(recipe), (world, several, *_of_strategy(strategy)), anywhere(device))


@lru_cache(maxsize=256)
def anywhere(device: Device) -> Device:
    """`device` whatever its context and the ranks beside it."""
    return replace(device, context_bytes=0, ranks_per_host=1)


@lru_cache(maxsize=1024)
def _prepared(
    architecture: ModelArchitecture, recipe: tuple[Any, ...], strategy: tuple[Any, ...], device: Device
) -> Prepared:
    return Prepared(
        architecture,
        dict(zip(RECIPE_FIELDS, recipe, strict=True)),
        dict(zip(("world_size", "gradient_accumulation", *STRATEGY_FIELDS), strategy, strict=True)),
        device,
    )


def step_of(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device, *, chunks: int = 1
) -> Step:
    """What the timeline of a step depends on, out of all that is given.

    Args:
        chunks: as a `Step` has it.
    """
    *others, layer = _layers_of(architecture, recipe, strategy, device)
    # while they are checkpointed, all layers keep the same
    unlike, by_window = None, layer.kernel == "masked" and not recipe.packing and architecture.sliding_layers > 0
    if by_window and not strategy.gradient_checkpointing:
        unlike = layer._replace(kernel=kernel_of(architecture, recipe, strategy, device))
    shard = shard_of(architecture, recipe, strategy, device)
    stage, several = strategy.zero_stage, strategy.gradient_accumulation > 1
    in_layers = shard.numel - trained_outside(architecture, recipe)
    layer_gradients = in_layers * shard.gradient_itemsize // architecture.periods
    in_bucket = bucket_elements(shard.numel) * shard.gradient_itemsize
    return Step(
        layer=layer,
        others=tuple(others),
        layers=architecture.periods,
        unlike=unlike,
        unlike_layers=architecture.num_layers - architecture.sliding_layers if unlike is not None else 0,
        masks=_masks(architecture, recipe, strategy),
        vocab=architecture.vocab_size,
        positions=architecture.max_position_embeddings if layer.family.learned_positions else 0,
        dropped_embedding=_drops(architecture, layer.family.embedding_dropout),
        tied=architecture.tied_embeddings,
        checkpointing=strategy.gradient_checkpointing,
        # transformers' gradient_checkpointing_enable sees to it (modeling_utils.py)
        input_needs_gradient=strategy.gradient_checkpointing,
        reentrant=strategy.gradient_checkpointing and stage == 3,
        logits=_logits(architecture),
        loss=strategy.loss,
        chunks=chunks,
        output_held=device.output_held,
        caches_casts=device.plain_autocast,
        gradients=_handling(strategy),
        layer_gradients=layer_gradients,
        bucket=shard.bucket_bytes if stage == 2 or (stage == 1 and not several) else 0,
        layers_to_flush=-(-in_bucket // max(layer_gradients, 1)) if stage >= 2 and shard.fills_buckets else 0,
        part=reduced_within(shard, architecture, recipe, strategy, device),
        head_reduced=head_reduced(shard, architecture, recipe, device),
        reduced_after=reduced_after(shard, architecture, recipe, strategy, device),
        sharded=stage > 0,
        fetched=fetched_ahead(architecture, recipe, device) if stage == 3 else 0,
    )


def _handling(strategy: Strategy) -> Handling:
    """What becomes of a gradient in the backward pass of the last micro-batch."""
    several = strategy.gradient_accumulation > 1
    if strategy.zero_stage >= 2:
        return "taken"
    if strategy.zero_stage == 0 and strategy.world_size > 1:
        return "moved" if several else "accumulated"
    return "accumulated" if several else "kept"


def _layers_of(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Iterator[Layer]:
    """Those of a period; the last one has attention."""
    layer = _layer_of(architecture, recipe, strategy, device)
    if architecture.delta_net is not None:
        linear_attention = [linear for linear in architecture.linears if linear.part == "linear_attention"]
        *into, output = map(partial(_projection, recipe), linear_attention)
        other = layer._replace(qkv=tuple(into), output=output, delta_net=architecture.delta_net, head_norms=None)
        yield from [other] * (architecture.period - 1)
    yield layer


def _layer_of(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device) -> Layer:
    """One with attention."""
    attention = [linear for linear in architecture.linears if linear.part == "attention"]
    shared = [linear for linear in architecture.linears if linear.part == "shared_expert"]
    feed_forward = shared[:3] or [linear for linear in architecture.linears if linear.part == "mlp"]
    project = partial(_projection, recipe)
    family = family_of(architecture.model_type)
    has_alibi = architecture.model_type == "falcon" and bool(architecture.config.get("alibi"))
    return Layer(
        hidden=architecture.hidden_size,
        shape=Heads(
            architecture.num_heads,
            architecture.num_kv_heads,
            architecture.head_dim,
            strategy.micro_batch == 1 and folds_sequences(architecture, strategy.attention),
            device.kind == "cuda",
            architecture.config.get("attn_logit_softcapping") is not None,
            _rotates_partly(architecture),
            architecture.model_type == "gpt_oss",
            architecture.drops_attention,
            "shared" if has_alibi else family.scores,
            architecture.model_type == "falcon",
            architecture.shares_one_key_head,
        ),
        qkv=tuple(map(project, attention[:-1])),
        output=project(attention[-1]),
        feed_forward=tuple(map(project, feed_forward)),
        gated=architecture.gated_mlp,
        parallel=architecture.parallel_attention,
        delta_net=None,
        experts=_experts(architecture, recipe, device),
        shared_gate=next(map(project, shared[3:]), None),
        norm=family.norm or architecture.norm,
        norms=architecture.norms_per_layer,
        activation=family.activation or ACTIVATIONS[architecture.activation],
        family=family,
        rotary=family.rotary and not has_alibi,
        clipped=_clips(architecture, family.clips),
        dropped_residual=_drops(architecture, family.residual_dropout),
        head_norms=family.head_norms if architecture.head_norms else None,
        compute=device.compute_dtype,
        stream=exact.stored_dtype(recipe, device.compute_dtype),
        lora=recipe.lora_dtype,
        rank=recipe.rank,
        dropout=recipe.dropout > 0,
        autocast=recipe.narrows(device.compute_dtype),
        widens=device.plain_autocast or not recipe.narrows(device.compute_dtype),
        dora=recipe.use_dora,
        trained=recipe.method == "full",
        divided=strategy.zero_stage == 3,
        kernel=kernel_in_use(architecture, recipe, strategy, device),
    )


def folds_sequences(architecture: ModelArchitecture, attention: Attention) -> bool:
    """Whether attention makes the sequences' heads one dimension, which is a view of one sequence and else a copy."""
    return attention == "eager" or (attention == "sdpa" and architecture.shares_one_key_head)


def _masks(architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy) -> int:
    """How many attention masks there are, where there are any; sdpa needs none that is just causal."""
    both = 0 < architecture.sliding_layers < architecture.num_layers
    return 2 if both and (strategy.attention == "eager" or recipe.packing) else 1


def _drops(architecture: ModelArchitecture, dropout: tuple[str, float]) -> bool:
    """Whether the base model has that dropout, a field of its config and the default, while it is trained."""
    return bool(architecture.config.get(*dropout))


def _clips(architecture: ModelArchitecture, within: str | None) -> bool:
    """Whether queries, keys and values are clamped, as that object of the config says."""
    config = architecture.config.get(within) if within else architecture.config
    return within is not None and isinstance(config, Mapping) and config.get("clip_qkv") is not None


def _rotates_partly(architecture: ModelArchitecture) -> bool:
    """Whether rotary embedding leaves part of each head alone, or (Phi-3) is written as if it might."""
    family = family_of(architecture.model_type)
    name, default = family.rotated_part
    return family.written_for_a_part or architecture.config.get(name, default) != 1.0


def kernel_in_use(
    architecture: ModelArchitecture, recipe: Recipe, strategy: Strategy, device: Device
) -> AttentionKernel:
    """The kernel of the layers that need the most: those with a mask, where there are any.

    flash_attention_2 knows windows and packed examples without a mask; sdpa takes a mask for all packed layers, with
    which it can neither be flash attention nor take grouped keys as they are. Where layers without a window hold all
    scores, one of those needs more than one with a mask; but where all layers' activations are kept, the many with a
    mask decide, and what the others keep is counted beside theirs (`step_of`).
    """
    kernel = kernel_of(architecture, recipe, strategy, device)
    always = architecture.is_always_masked and not device.keys_expanded
    if strategy.attention == "sdpa" and (recipe.packing or always):
        return "masked_math" if kernel == "math" and architecture.shares_one_key_head else "masked"
    if strategy.attention != "sdpa" or not is_masked(architecture, recipe.seq_len, False):
        return kernel
    scores = kernel == "math" and architecture.sliding_layers < architecture.num_layers
    return "math" if scores and strategy.gradient_checkpointing else "masked"


def _logits(architecture: ModelArchitecture) -> Logits:
    """What the model makes of the output head's product."""
    if architecture.plain_logits:
        return "plain"
    return "capped" if architecture.config.get("final_logit_softcapping") is not None else "scaled"


def _experts(architecture: ModelArchitecture, recipe: Recipe, device: Device) -> Experts | None:
    """The mixture of experts of a layer, if it has one."""
    if not architecture.experts:
        return None
    family = family_of(architecture.model_type)
    router_rank, gate_up_rank, down_rank = exact.expert_ranks(architecture, recipe)
    return Experts(
        hidden=architecture.hidden_size,
        inner=architecture.expert_intermediate_size,
        number=architecture.experts,
        per_token=architecture.experts_per_token,
        scores=family.router_scores,
        normalised=family.router_normalises or bool(architecture.config.get("norm_topk_prob", False)),
        router_rank=router_rank,
        gate_up_rank=gate_up_rank,
        down_rank=down_rank,
        clamped=architecture.model_type == "gpt_oss",
        stored=exact.stored_dtype(recipe, device.compute_dtype),
        lora=recipe.lora_dtype,
        narrow=device.compute_dtype if recipe.narrows(device.compute_dtype) else None,
        trained=recipe.method == "full",
        cuda=device.kind == "cuda",
        grouped=device.has_grouped_products,
    )


def _projection(recipe: Recipe, linear: Linear) -> Projection:
    quantized = exact.is_quantized(linear, recipe)
    storage: Literal["4bit", "8bit", "plain"] = "plain"
    if quantized:
        storage = "8bit" if recipe.quantization == "int8" else "4bit"
    return Projection(
        name=linear.name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        storage=storage,
        blocks=exact.absmax_count(linear.weight_numel, recipe.block_size),
        nested=recipe.double_quantization,
        adapter=exact.is_target(linear, recipe),
        bias=linear.bias,
    )
